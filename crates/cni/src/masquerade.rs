//! `ipMasq`: what pods say to the world beyond the virtual network leaves with the node's address, since only that one has
//! a way out there. The built-in form of the rule that the documentation of the original asks people to add by hand.
//!
//! One nft table per network and subnet, `azure-ipmasq-<8 hex>-<8 hex>`: what comes from the subnet and leaves by the NIC is
//! masqueraded, unless it goes to an exempt range, to the subnet itself or to the platform's address 168.63.129.16, which
//! has to see who asks. It is made by ADD and goes with a GC that leaves the network no pod, or that finds `ipMasq` off.

use ipnet::Ipv4Net;
use linux::{
    nft::{Chain, ChainKind, Datum, Element, Family, Field, HookPoint, Nft, Rule, Set, Table},
    sysctl,
};

use crate::{
    links::{KernelError, filter},
    steps,
};

const TABLE_PREFIX: &str = "azure-ipmasq-";
/// Wire server, DNS and load balancer probes of the platform.
const PLATFORM: &str = "168.63.129.16/32";
/// After the destination's translation, as everybody's source translation.
const SOURCE_NAT: i32 = 100;

/// What is exempt unless `nonMasqueradeCIDRs` says otherwise: the private ranges, as with the ip-masq-agent.
pub const EXEMPT: [&str; 3] = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"];

fn hash(text: &str) -> String {
    let hash = hmac_sha256::Hash::hash(text.as_bytes());
    hash[..4].iter().map(|b| format!("{b:02x}")).collect()
}

fn prefix(network: &str) -> String {
    format!("{TABLE_PREFIX}{}-", hash(network))
}

fn table(network: &str, master: &str, subnet: Ipv4Net, exempt: &[Ipv4Net]) -> Table {
    let mut ranges = exempt.to_vec();
    ranges.push(subnet);
    ranges.extend(PLATFORM.parse::<Ipv4Net>());
    let mut table = Table::new(Family::Ip, format!("{}{}", prefix(network), hash(&subnet.to_string())));
    // Ranges of a set may not overlap.
    let elements = Ipv4Net::aggregate(&ranges)
        .into_iter()
        .map(|range| Element::key([Datum::Net(range)]));
    table.sets = vec![Set::new("exempt", [Field::IpDaddr]).intervals().with(elements)];
    let masquerade = Rule::new()
        .oifname(master)
        .saddr(subnet)
        .not_in_set([Field::IpDaddr], "exempt")
        .counter()
        .masquerade();
    table.chains = vec![Chain::base(
        "postrouting",
        ChainKind::Nat,
        HookPoint::Postrouting,
        SOURCE_NAT,
        [masquerade],
    )];
    table
}

/// Makes the network's table for `subnet` unless it is there as it should be.
pub fn ensure(network: &str, master: &str, subnet: Ipv4Net, exempt: &[Ipv4Net]) -> Result<(), KernelError> {
    let mut nft = Nft::open().map_err(filter("opening the packet filter"))?;
    nft.ensure(&table(network, master, subnet.trunc(), exempt))
        .map_err(filter(format!("making the rule that masquerades pods of {subnet}")))?;
    steps::reached("masqueraded");
    Ok(())
}

/// Removes all tables of the network. Success if there are none.
pub fn remove(network: &str) -> Result<(), KernelError> {
    // Asking the packet filter would load it on machines that never use it.
    if sysctl::get("net/netfilter/nf_conntrack_count").is_err() {
        return Ok(());
    }
    let mut nft = Nft::open().map_err(filter("opening the packet filter"))?;
    let tables = nft.tables().map_err(filter("listing tables"))?;
    for (family, name) in tables {
        if family == Family::Ip as u8 && name.starts_with(&prefix(network)) {
            nft.delete_table(Family::Ip, &name)
                .map_err(filter(format!("deleting table {name}")))?;
        }
    }
    steps::reached("masquerade-gone");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exempt_ranges_are_merged_and_hold_the_subnet_and_the_platform() {
        let exempt: Vec<Ipv4Net> = ["10.0.0.0/9", "10.128.0.0/9", "10.1.0.0/16"]
            .map(|t| t.parse().unwrap())
            .to_vec();
        let made = table("azure", "eth0", "20.0.0.0/24".parse().unwrap(), &exempt);
        let ranges: Vec<&Datum> = made.sets[0].elements.iter().map(|e| &e.key[0]).collect();
        let net = |t: &str| Datum::Net(t.parse().unwrap());
        assert_eq!(
            ranges,
            [&net("10.0.0.0/8"), &net("20.0.0.0/24"), &net("168.63.129.16/32")]
        );
        assert!(made.name.starts_with(&prefix("azure")) && !made.name.starts_with(&prefix("azure2")));
        assert_eq!(made, table("azure", "eth0", "20.0.0.0/24".parse().unwrap(), &exempt));
    }
}

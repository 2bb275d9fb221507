//! Public addresses that a virtual network's own flows leave by, and those of single instances in both directions.
//!
//! ```text
//!  prerouting -99   public address of an instance -> its private address
//!  postrouting 99   towards the edge, the first that applies:
//!                   subnet with a NAT gateway -> one of the gateway's addresses, any port
//!                   instance with a public address -> that address
//!                   SNAT ports at a load balancer's frontend -> that address, within the ports
//!  postrouting 100  everything else: the virtual network's transit address (`oaks-vnet`)
//! ```
//! Within its ports a source may use each one towards every other end; a flow that finds none is dropped.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use linux::nft::{
    Balance, Chain, ChainKind, Datum, Element, Family, Field, HookPoint, NatTarget, Rule, Set, Table, Verdict,
};
use vnet_model::fabric::{Protocol, VnetSpec};

use super::balancer::{numbers, set_timeouts, timeouts};
use crate::names::{EDGE_LINK, OUTBOUND_TABLE};

/// Comment of the counting rule for subnets whose NAT gateway has no address.
pub const NO_ADDRESS: &str = "the subnet's NAT gateway has no address";

/// The table of `vnet`; without chains if nothing leaves but by the default way.
pub fn outbound(vnet: &VnetSpec) -> Table {
    use Field::{Dport, IpDaddr, IpSaddr, L4Proto};
    let mut table = Table::new(Family::Ip, OUTBOUND_TABLE);
    let by_gateway = vnet.subnets.iter().filter(|s| s.nat_gateway.is_some());
    let by_gateway: Vec<_> = by_gateway.collect();
    if by_gateway.is_empty() && vnet.instance_addresses.is_empty() && vnet.outbound.is_empty() {
        return table;
    }
    let gateways = vnet.nat_gateways.iter().map(|g| (Protocol::All, g.idle_timeout_s));
    let instances = vnet
        .instance_addresses
        .iter()
        .map(|i| (Protocol::All, i.idle_timeout_s));
    let rules = vnet.outbound.iter().map(|o| (o.protocol, o.idle_timeout_s));
    table.timeouts = timeouts(gateways.chain(instances).chain(rules));
    let used: BTreeSet<&str> = by_gateway.iter().filter_map(|s| s.nat_gateway.as_deref()).collect();
    let chain = |key: &str| format!("gateway-{key}");
    table.sets = vec![
        Set::verdict_map("gateways", [IpSaddr])
            .intervals()
            .with(by_gateway.iter().map(|s| {
                let key = s.nat_gateway.as_deref().unwrap_or_default();
                Element::verdict([Datum::Net(s.prefix)], Verdict::goto(chain(key)))
            })),
        Set::map("instances-out", [IpSaddr], [IpDaddr]).with(
            vnet.instance_addresses
                .iter()
                .map(|i| Element::data([Datum::Ip(i.private)], [Datum::Ip(i.public)])),
        ),
        Set::map("instances-in", [IpDaddr], [IpDaddr]).with(
            vnet.instance_addresses
                .iter()
                .map(|i| Element::data([Datum::Ip(i.public)], [Datum::Ip(i.private)])),
        ),
        Set::map("ports", [IpSaddr, L4Proto], [IpDaddr, Dport, Dport]).with(vnet.outbound.iter().flat_map(|o| {
            numbers(o.protocol).iter().map(|p| {
                Element::data(
                    [Datum::Ip(o.private), Datum::Proto(*p)],
                    [Datum::Ip(o.public), Datum::Port(o.first_port), Datum::Port(o.last_port)],
                )
            })
        })),
    ];
    for key in used {
        let gateway = vnet.nat_gateways.iter().find(|g| g.key == key);
        let rules = match gateway.filter(|g| !g.addresses.is_empty()) {
            Some(g) => {
                let target = NatTarget::OneAddressOf {
                    by: Balance::Random,
                    addresses: g.addresses.clone(),
                };
                let idle = set_timeouts(Protocol::All, g.idle_timeout_s);
                idle.chain([Rule::new().snat(target)]).collect()
            }
            None => vec![Rule::new().counter().drop().comment(NO_ADDRESS)],
        };
        table.chains.push(Chain::regular(chain(key), rules));
    }
    let leaving = || Rule::new().oifname(EDGE_LINK);
    let mut leave = vec![leaving().vmap([IpSaddr], "gateways")];
    leave.extend(idle_rules(vnet, &mut table));
    leave.extend([
        leaving().snat(NatTarget::Map {
            fields: vec![IpSaddr],
            map: "instances-out".to_owned(),
            port: false,
        }),
        leaving().snat(NatTarget::PortRange {
            fields: vec![IpSaddr, L4Proto],
            map: "ports".to_owned(),
        }),
    ]);
    let arrive = Rule::new().dnat(NatTarget::Map {
        fields: vec![IpDaddr],
        map: "instances-in".to_owned(),
        port: false,
    });
    table.chains.extend([
        Chain::base("arrive", ChainKind::Nat, HookPoint::Prerouting, -99, [arrive]),
        Chain::base("leave", ChainKind::Nat, HookPoint::Postrouting, 99, leave),
    ]);
    table
}

/// Timeouts of flows by instances' addresses and outbound rules: one set of sources per protocol and time.
fn idle_rules(vnet: &VnetSpec, table: &mut Table) -> Vec<Rule> {
    let instances = vnet
        .instance_addresses
        .iter()
        .map(|i| (i.private, Protocol::All, i.idle_timeout_s));
    // An instance's own address decides, as it does for the translation.
    let own: BTreeSet<Ipv4Addr> = vnet.instance_addresses.iter().map(|i| i.private).collect();
    let by_rule = vnet.outbound.iter().filter(|o| !own.contains(&o.private));
    let all: Vec<(Ipv4Addr, Protocol, u32)> = instances
        .chain(by_rule.map(|o| (o.private, o.protocol, o.idle_timeout_s)))
        .collect();
    let times: BTreeSet<(Protocol, u32)> = all.iter().map(|(_, p, t)| (*p, *t)).filter(|(_, t)| *t > 0).collect();
    let mut rules = Vec::new();
    for (n, (protocol, idle_s)) in times.into_iter().enumerate() {
        let set = format!("idle-{n}");
        let sources = all.iter().filter(|(_, p, t)| (*p, *t) == (protocol, idle_s));
        table
            .sets
            .push(Set::new(set.clone(), [Field::IpSaddr]).with(sources.map(|(a, ..)| Element::key([Datum::Ip(*a)]))));
        for mut rule in set_timeouts(protocol, idle_s) {
            let timeout = rule.statements.pop();
            let rule = rule.oifname(EDGE_LINK).in_set([Field::IpSaddr], set.clone());
            rules.extend(timeout.map(|t| rule.then(t)));
        }
    }
    rules
}

/// Public addresses of the network that its flows may leave with.
pub fn leaving_addresses(vnet: &VnetSpec) -> BTreeSet<Ipv4Addr> {
    let gateways = vnet.nat_gateways.iter().flat_map(|g| g.addresses.iter().copied());
    let instances = vnet.instance_addresses.iter().map(|i| i.public);
    gateways
        .chain(instances)
        .chain(vnet.outbound.iter().map(|o| o.public))
        .collect()
}

/// Public addresses that lead into the network.
pub fn public_addresses(vnet: &VnetSpec, pool: ipnet::Ipv4Net) -> BTreeSet<Ipv4Addr> {
    let frontends = vnet.frontends.iter().map(|f| f.address);
    frontends
        .chain(leaving_addresses(vnet))
        .filter(|a| pool.contains(a))
        .collect()
}

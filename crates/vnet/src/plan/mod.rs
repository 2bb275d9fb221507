//! From specs to what the namespaces shall hold: pure, without handles, indexes or IO.
//!
//! ```text
//!  host namespace            edge namespace                 one namespace per virtual network
//!  <instance>-edge ==== host      v<hash> ======= edge            n<hash> ======= eth0 of a machine or group
//!    pool -> edge             lo: API endpoints             lo: 168.63.129.16     (router MAC on this side)
//!                             frontends -> their vnet       /32 per NIC address, permanent neighbours
//! ```
//! Transit addresses: the range's first is the host's, the second the edge's, the fourth and later belong to virtual
//! networks by slot. No link needs ARP: every neighbour is permanent.
//!
//! What is not allowed is answered (administratively prohibited), so that callers fail at once; only forged sources and
//! strangers from the uplink are dropped without a word.
//!
//! Chains in a virtual network's namespace, by hook and priority (for tables that others install beside ours):
//! prerouting -150 (and input 0 of ARP) anti-spoofing, and the cluster mark on packets from group ports; prerouting -140, input -10 and
//! forward 10 security groups; prerouting -90 marks for route tables; prerouting -110 is left to the
//! service proxy, which reads the mark; prerouting -101 refuses frontends without backends; prerouting -100 frontends and
//! cluster DNS, -99 public addresses of instances; input 0 protects the namespace's own sockets; postrouting 95 machines that reach themselves, 99
//! public addresses of the network, 100 outward translation, 90 is left to the
//! service proxy.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use linux::netlink::RouteKind;
use linux::nft::Table;
use vnet_model::Mac;
use vnet_model::fabric::{EdgeSpec, NicSpec};

use crate::names::nic_link;

mod balancer;
mod edge;
mod hosts;
mod outbound;
mod routing;
mod security;
mod sites;
mod spoofing;
mod vnet;

pub use balancer::{FORGOTTEN, NOT_A_SOURCE, ended_addresses, ended_ways};
pub use edge::{edge_side_mac, host_link_macs, plan_edge, plan_host, vnet_side_mac};
pub use hosts::{UNKNOWN_PEER, VxlanPlan, vxlans};
pub use outbound::NO_ADDRESS;
pub use security::DENIED;
pub use sites::{NOT_OF_SITE, here as sites_here};
pub use spoofing::{ROGUE_DHCP, SPOOFED, SPOOFED_ARP, SPOOFED_ND, SPOOFED_RA};
pub use vnet::{peer_mac, plan_vnet, vnet_sysctls};

/// What a namespace shall hold. Entries on links that are not there yet wait for them.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NamespacePlan {
    /// Set before anything else.
    pub sysctls: Vec<(String, String)>,
    pub addresses: BTreeSet<PlannedAddress>,
    pub routes: BTreeSet<PlannedRoute>,
    pub neighbours: BTreeSet<PlannedNeighbour>,
    pub rules: BTreeSet<PlannedRule>,
    pub forwardings: BTreeSet<PlannedForwarding>,
    pub tables: Vec<Table>,
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct PlannedAddress {
    pub link: String,
    pub address: IpNet,
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct PlannedRoute {
    pub destination: IpNet,
    /// Absent for routes that refuse.
    pub link: Option<String>,
    pub gateway: Option<IpAddr>,
    pub source: Option<IpAddr>,
    pub kind: RouteKind,
    /// The kernel's table, `main` unless said.
    pub table: Option<u32>,
}

/// Marked packets are routed by another table first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct PlannedRule {
    pub mark: u32,
    pub mask: u32,
    pub table: u32,
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct PlannedNeighbour {
    pub link: String,
    pub address: IpAddr,
    pub mac: Mac,
}

/// Where a VXLAN device sends frames for a MAC address.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct PlannedForwarding {
    pub link: String,
    pub mac: Mac,
    pub to: Ipv4Addr,
}

impl NamespacePlan {
    /// A router that speaks IPv4 only and believes its routes rather than the reverse path.
    fn router() -> Self {
        let sysctls = [
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv4.conf.all.rp_filter", "0"),
            ("net.ipv4.conf.default.rp_filter", "0"),
            ("net.ipv4.conf.all.send_redirects", "0"),
            ("net.ipv4.conf.default.send_redirects", "0"),
            // Every refused caller shall know at once; the kernel's bound on answers in all stays.
            ("net.ipv4.icmp_ratelimit", "0"),
        ];
        let mut plan = Self::default();
        plan.set(&sysctls);
        plan
    }

    fn set(&mut self, sysctls: &[(&str, &str)]) {
        let owned = sysctls.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        self.sysctls.extend(owned);
    }

    fn address(&mut self, link: &str, address: impl Into<IpNet>) {
        self.addresses.insert(PlannedAddress {
            link: link.to_owned(),
            address: address.into(),
        });
    }

    fn route(&mut self, destination: impl Into<IpNet>, link: &str) {
        self.add_route(destination.into(), link, None, None);
    }

    /// Out of `link` without a gateway; what is sent from here itself has the source `source`.
    fn route_from(&mut self, destination: impl Into<IpNet>, link: &str, source: Ipv4Addr) {
        self.add_route(destination.into(), link, None, Some(source.into()));
    }

    fn route_via(&mut self, destination: impl Into<IpNet>, link: &str, gateway: Ipv4Addr, source: Option<Ipv4Addr>) {
        self.add_route(destination.into(), link, Some(gateway.into()), source.map(IpAddr::from));
    }

    fn add_route(&mut self, destination: IpNet, link: &str, gateway: Option<IpAddr>, source: Option<IpAddr>) {
        let link = Some(link.to_owned());
        self.routes.insert(PlannedRoute {
            destination,
            link,
            gateway,
            source,
            kind: RouteKind::Unicast,
            table: None,
        });
    }

    fn refuse(&mut self, destination: impl Into<IpNet>) {
        let destination = destination.into();
        let kind = RouteKind::Unreachable;
        self.routes.insert(PlannedRoute {
            destination,
            link: None,
            gateway: None,
            source: None,
            kind,
            table: None,
        });
    }

    /// The addresses behind a NIC's port.
    pub fn port(&mut self, nic: &NicSpec) {
        let link = nic_link(&nic.key);
        for address in nic.addresses() {
            self.route(Ipv4Net::from(address), &link);
            self.neighbour(&link, address, nic.mac);
        }
    }

    fn neighbour(&mut self, link: &str, address: Ipv4Addr, mac: Mac) {
        self.neighbours.insert(PlannedNeighbour {
            link: link.to_owned(),
            address: address.into(),
            mac,
        });
    }
}

/// Addresses of the links between host, edge and virtual networks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Transit {
    range: Ipv4Net,
}

/// First offset in the transit range that belongs to a virtual network.
const FIRST_SLOT: u32 = 4;

impl Transit {
    pub fn of(edge: &EdgeSpec) -> Self {
        Self {
            range: edge.transit.trunc(),
        }
    }

    fn at(self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.range.network()).saturating_add(offset))
    }

    pub fn host(self) -> Ipv4Addr {
        self.at(1)
    }

    pub fn edge(self) -> Ipv4Addr {
        self.at(2)
    }

    /// Address that a virtual network's outward traffic comes from.
    pub fn vnet(self, slot: u32) -> Ipv4Addr {
        self.at(FIRST_SLOT + slot)
    }

    /// The slot of a virtual network's transit address.
    pub fn slot_of(self, address: Ipv4Addr) -> Option<u32> {
        let offset = u32::from(address).checked_sub(u32::from(self.range.network()))?;
        let slot = offset.checked_sub(FIRST_SLOT)?;
        (self.range.contains(&address) && slot < self.slots()).then_some(slot)
    }

    /// How many virtual networks fit.
    pub fn slots(self) -> u32 {
        let all = 1_u64 << (32 - self.range.prefix_len());
        u32::try_from(all).unwrap_or(u32::MAX).saturating_sub(FIRST_SLOT + 1)
    }
}

/// Gives each virtual network a slot: those that have one keep it, the others get the lowest free. `None` if they do not
/// fit.
pub fn assign_slots<'a>(
    vnets: impl IntoIterator<Item = &'a str>,
    held: &BTreeMap<String, u32>,
    slots: u32,
) -> Option<BTreeMap<String, u32>> {
    let vnets: Vec<&str> = vnets.into_iter().collect();
    let mut out = BTreeMap::new();
    let mut taken = BTreeSet::new();
    for vnet in &vnets {
        if let Some(slot) = held.get(*vnet)
            && taken.insert(*slot)
        {
            out.insert((*vnet).to_owned(), *slot);
        }
    }
    let mut next = 0;
    for vnet in vnets {
        if out.contains_key(vnet) {
            continue;
        }
        while taken.contains(&next) {
            next += 1;
        }
        if next >= slots {
            return None;
        }
        taken.insert(next);
        out.insert(vnet.to_owned(), next);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_stay_and_fill_gaps() {
        let held = BTreeMap::from([("b".to_owned(), 1), ("gone".to_owned(), 0)]);
        let slots = assign_slots(["a", "b", "c"], &held, 3).unwrap();
        assert_eq!(
            slots,
            BTreeMap::from([("a".to_owned(), 0), ("b".to_owned(), 1), ("c".to_owned(), 2)])
        );
        assert!(assign_slots(["a", "b", "c"], &held, 2).is_none());
    }

    #[test]
    fn transit_addresses_follow_the_range() {
        let transit = Transit::of(&EdgeSpec::default());
        assert_eq!(transit.host().to_string(), "100.127.192.1");
        assert_eq!(transit.vnet(3).to_string(), "100.127.192.7");
        assert_eq!(transit.slot_of(transit.vnet(3)), Some(3));
        assert_eq!(transit.slot_of(transit.edge()), None);
    }
}

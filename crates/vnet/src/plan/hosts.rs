//! What stands on other hosts: routes by the VXLAN device, and the way back for what came in through another host.
//!
//! ```text
//!  host A                                             host B
//!  n<hash> - network - vxlan ==== UDP 4789 ==== vxlan - network - n<hash>
//! ```
//! A remote address is one route through its host. The next hop is written as that host's underlay address, which is a
//! permanent neighbour on the device with the far device's MAC, which is one forwarding entry: so entries grow with hosts,
//! and only routes with addresses. Nothing floods, learns or asks.
//!
//! A packet between peers crosses the peering on the host of the greater key's NIC, in both directions: each namespace on
//! the way sees all of the flow. Filters stand at NICs, so each is applied once, by the NIC's own host.
//!
//! The platform's own connections (168.63.129.16) travel under an address of their host and are 168.63.129.16 again where they
//! arrive, so that a NIC's host lets them by as its own.
//!
//! Who comes from outside the network (through a frontend of another host, say) is answered by way of the host that he came
//! through: the connection keeps that host's number in its mark, and answers look up that host's table.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use linux::netlink::RouteKind;
use linux::nft::{
    CT_NEW, Chain, ChainKind, Datum, Element, Family, Field, HookPoint, NatTarget, Rule, Set, Statement, Table,
};
use vnet_model::fabric::{FabricSpec, VnetSpec};
use vnet_model::underlay::{EDGE_VNI, RemoteHostSpec, UnderlaySpec, vxlan_mac};
use vnet_model::{Mac, WIRE_SERVER};

use super::{NamespacePlan, PlannedForwarding, PlannedRoute, PlannedRule};
use crate::names::{HOSTS_TABLE, VXLAN_LINK};

/// Comment of the counting rule for VXLAN datagrams from addresses that are no host of ours.
pub const UNKNOWN_PEER: &str = "unknown underlay peer";

/// The kernel's number of the first host's table, after those of route tables.
const FIRST_TABLE: u32 = 3000;
/// Bits of marks that hold a host's number, and the one that tells it from a route table's.
const MARK_MASK: u32 = 0xffff_0000;
const MARK_FLAG: u32 = 0x8000_0000;
const MARK_SHIFT: u32 = 16;

/// A VXLAN device that shall be in a namespace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct VxlanPlan {
    pub vni: u32,
    pub mac: Mac,
    pub mtu: u32,
    pub local: Ipv4Addr,
    pub port: u16,
}

/// The devices of the edge and of one network.
pub fn vxlans(spec: &FabricSpec, vnet: Option<&VnetSpec>) -> Option<VxlanPlan> {
    let underlay = spec.underlay.as_ref()?;
    let vni = match vnet {
        None => EDGE_VNI,
        Some(vnet) => vnet.vni?,
    };
    Some(VxlanPlan {
        vni,
        mac: vxlan_mac(vni, underlay.address),
        mtu: underlay.inner_mtu(),
        local: underlay.address,
        port: underlay.port,
    })
}

/// Neighbours and forwarding entries of every other host on the device of `vni`.
fn neighbours(plan: &mut NamespacePlan, vni: u32, underlay: &UnderlaySpec) {
    for host in &underlay.hosts {
        let mac = vxlan_mac(vni, host.address);
        plan.neighbour(VXLAN_LINK, host.address, mac);
        plan.forwardings.insert(PlannedForwarding {
            link: VXLAN_LINK.to_owned(),
            mac,
            to: host.address,
        });
    }
}

/// Adds to the plan of `vnet` what leads to other hosts, and returns the table that leads back.
pub fn elsewhere(spec: &FabricSpec, vnet: &VnetSpec, plan: &mut NamespacePlan) -> Table {
    let mut table = Table::new(Family::Ip, HOSTS_TABLE);
    let (Some(underlay), Some(vni)) = (&spec.underlay, vnet.vni) else {
        return table;
    };
    let own = link_address(underlay.number);
    plan.address(VXLAN_LINK, Ipv4Net::from(own));
    neighbours(plan, vni, underlay);
    for host in &underlay.hosts {
        for far in [link_address(host.number), platform_address(host.number)] {
            plan.route_via(Ipv4Net::from(far), VXLAN_LINK, host.address, Some(own));
        }
    }
    for (address, host) in remote_addresses(spec, vnet) {
        if let Some(host) = underlay.host(host) {
            plan.route_via(Ipv4Net::from(address), VXLAN_LINK, host.address, Some(own));
        }
    }
    for site in &vnet.sites {
        let host = site.host.as_deref().and_then(|h| underlay.host(h));
        for prefix in host.iter().flat_map(|_| &site.prefixes) {
            let Some(host) = host else { continue };
            plan.route_via(*prefix, VXLAN_LINK, host.address, Some(own));
        }
    }
    way_back(vnet, underlay, plan, &mut table);
    // Transit addresses and the platform's mean something else on the next host.
    table.chains.push(Chain::base(
        "abroad",
        ChainKind::Nat,
        HookPoint::Postrouting,
        99,
        [
            Rule::new()
                .saddr(WIRE_SERVER)
                .oifname(VXLAN_LINK)
                .snat(NatTarget::to(platform_address(underlay.number), None)),
            Rule::new()
                .saddr(spec.edge.transit)
                .oifname(VXLAN_LINK)
                .snat(NatTarget::to(own, None)),
            Rule::new()
                .iifname(VXLAN_LINK)
                .saddr(platform_range())
                .snat(NatTarget::to(WIRE_SERVER, None)),
        ],
    ));
    // A NIC that forwards may send with any other source.
    table.chains.push(Chain::base(
        "forged",
        ChainKind::Filter,
        HookPoint::Prerouting,
        -151,
        [Rule::new()
            .is_not(Field::Iifname, Datum::IfName(VXLAN_LINK.to_owned()))
            .saddr(platform_range())
            .counter()
            .drop()
            .comment(super::spoofing::SPOOFED)],
    ));
    table
}

/// Addresses behind other hosts, with the host: the network's own, and its peers' that are reached through there.
fn remote_addresses<'a>(spec: &'a FabricSpec, vnet: &'a VnetSpec) -> impl Iterator<Item = (Ipv4Addr, &'a str)> {
    let pairs = spec.peered();
    let crossed: Vec<&VnetSpec> = spec
        .vnets
        .iter()
        .filter(|other| pairs.contains(&(vnet.key.as_str(), other.key.as_str())))
        .collect();
    let own = std::iter::once(vnet).chain(crossed);
    let nics = own.flat_map(|v| &v.nics);
    let of_nics = nics.filter_map(|n| Some((n, n.host.as_deref()?)));
    let of_nics = of_nics.flat_map(|(n, host)| n.addresses().map(move |a| (a, host)));
    of_nics.chain(vnet.remote_local.iter().map(|r| (r.address, r.host.as_str())))
}

fn mark(host: &RemoteHostSpec) -> u32 {
    MARK_FLAG | u32::from(host.number) << MARK_SHIFT
}

fn way_back(vnet: &VnetSpec, underlay: &UnderlaySpec, plan: &mut NamespacePlan, table: &mut Table) {
    if underlay.hosts.is_empty() {
        return;
    }
    let inside = vnet.prefixes.iter().chain(vnet.peers.iter().flat_map(|p| &p.prefixes));
    let inside = Ipv4Net::aggregate(&inside.copied().collect());
    table.sets = vec![
        Set::new("inside", [Field::IpSaddr])
            .intervals()
            .with(inside.into_iter().map(|p| Element::key([Datum::Net(p)]))),
    ];
    let (mut arriving, mut answering) = (Vec::new(), Vec::new());
    for host in &underlay.hosts {
        let (number, value) = (FIRST_TABLE + u32::from(host.number), mark(host));
        plan.rules.insert(PlannedRule {
            mark: value,
            mask: MARK_MASK,
            table: number,
        });
        plan.routes.insert(PlannedRoute {
            destination: Ipv4Net::default().into(),
            link: Some(VXLAN_LINK.to_owned()),
            gateway: Some(host.address.into()),
            source: Some(link_address(underlay.number).into()),
            kind: RouteKind::Unicast,
            table: Some(number),
        });
        let mac = Datum::Mac(vxlan_mac(vnet.vni.unwrap_or(0), host.address).0);
        arriving.push(
            Rule::new()
                .is(Field::EtherSaddr, mac)
                .then(Statement::SetCtMark { value, mask: MARK_MASK }),
        );
        let answer = Statement::CtMarkBits { value, mask: MARK_MASK };
        answering.push(Rule::new().then(answer).set_mark(value, MARK_MASK).accept());
    }
    let mut rules = vec![
        Rule::new()
            .iifname(VXLAN_LINK)
            .ct_state(CT_NEW)
            .not_in_set([Field::IpSaddr], "inside")
            .jump("arriving"),
        Rule::new().iifname(VXLAN_LINK).accept(),
    ];
    rules.extend(answering);
    table.chains = vec![
        Chain::regular("arriving", arriving),
        // After the marks of route tables: a question's way decides over the answerer's own routes.
        Chain::base("back", ChainKind::Filter, HookPoint::Prerouting, -89, rules),
        Chain::base(
            "unmark",
            ChainKind::Filter,
            HookPoint::Postrouting,
            -200,
            [Rule::new().set_mark(0, MARK_MASK)],
        ),
    ];
}

/// Address of a host on its VXLAN devices: refusals go out with it, and what must not keep its source. The range is
/// link-local: no network and no pool holds it.
fn link_address(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(169, 254, 240 | high, low)
}

/// What the platform's connections from a host come from between hosts.
fn platform_address(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(169, 254, 224 | high, low)
}

/// All of [`platform_address`]es.
pub fn platform_range() -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 224, 0), 20)
}

/// Adds to the edge's plan the way to the public addresses that stand in other hosts' edges. Returns what `sources` may
/// hold beside the networks' links, and the chain that gives the way a source: transit ranges may be equal on all hosts.
pub fn between_edges(spec: &FabricSpec, plan: &mut NamespacePlan) -> (Vec<Element>, Option<Chain>) {
    let Some(underlay) = &spec.underlay else {
        return (Vec::new(), None);
    };
    let own = link_address(underlay.number);
    plan.address(VXLAN_LINK, Ipv4Net::from(own));
    neighbours(plan, EDGE_VNI, underlay);
    let mut sources = Vec::new();
    for host in &underlay.hosts {
        let far = link_address(host.number);
        plan.route_via(Ipv4Net::from(far), VXLAN_LINK, host.address, Some(own));
        sources.push(Element::key([Datum::IfName(VXLAN_LINK.to_owned()), Datum::Ip(far)]));
        for endpoint in &host.endpoints {
            plan.route_via(Ipv4Net::from(*endpoint), VXLAN_LINK, host.address, Some(own));
        }
    }
    let translate = Chain::base(
        "between-edges",
        ChainKind::Nat,
        HookPoint::Postrouting,
        100,
        [Rule::new().oifname(VXLAN_LINK).snat(NatTarget::to(own, None))],
    );
    (sources, Some(translate))
}

/// Adds to the host's table what keeps strangers out of the VXLAN devices, which take a datagram from anyone.
pub fn guard(spec: &FabricSpec, table: &mut Table) {
    let Some(underlay) = &spec.underlay else { return };
    let hosts: BTreeSet<Ipv4Addr> = underlay.hosts.iter().map(|h| h.address).collect();
    table
        .sets
        .push(Set::new("underlay", [Field::IpSaddr]).with(hosts.into_iter().map(|a| Element::key([Datum::Ip(a)]))));
    table.chains.push(Chain::base(
        "underlay",
        ChainKind::Filter,
        HookPoint::Input,
        -10,
        [Rule::new()
            .daddr(underlay.address)
            .udp_dport(underlay.port)
            .not_in_set([Field::IpSaddr], "underlay")
            .counter()
            .drop()
            .comment(UNKNOWN_PEER)],
    ));
}

//! One virtual network's namespace.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use linux::nft::{
    Chain, ChainKind, Datum, Element, Family, Field, HookPoint, NatTarget, Reject, Rule, Set, Statement, TCP, Table,
    UDP,
};
use vnet_model::WIRE_SERVER;
use vnet_model::fabric::{FabricSpec, NicKind, VnetSpec};
use vnet_model::instance::METADATA_SERVICE;

use super::{NamespacePlan, Transit};
use crate::names::{EDGE_LINK, VNET_TABLE, VXLAN_LINK, nic_link, peer_link, vnet_link};

/// The namespace of `vnet`, which has transit slot `slot`.
pub fn plan_vnet(vnet: &VnetSpec, spec: &FabricSpec, slot: u32) -> NamespacePlan {
    let transit = Transit::of(&spec.edge);
    let outward = transit.vnet(slot);
    let mut plan = NamespacePlan::router();
    plan.sysctls = vnet_sysctls();
    plan.address("lo", Ipv4Net::from(WIRE_SERVER));
    plan.address("lo", Ipv4Net::from(METADATA_SERVICE));
    for local in &vnet.local {
        plan.address("lo", Ipv4Net::from(*local));
    }
    plan.address(EDGE_LINK, Ipv4Net::from(outward));
    plan.route_via(Ipv4Net::default(), EDGE_LINK, transit.edge(), Some(outward));
    plan.neighbour(EDGE_LINK, transit.edge(), super::edge::edge_side_mac(&vnet.key));
    for prefix in &vnet.prefixes {
        // Addresses that nobody has end here instead of leaving by the default route.
        plan.refuse(*prefix);
    }
    for peer in &vnet.peers {
        let link = peer_link(&peer.vnet);
        plan.neighbour(&link, PEER_GATEWAY, peer_mac(&peer.vnet, &vnet.key));
        for prefix in &peer.prefixes {
            // Refusals go out with an address that the peer does not have itself.
            plan.route_via(*prefix, &link, PEER_GATEWAY, Some(outward));
        }
    }
    for nic in vnet.nics_here() {
        plan.port(nic);
    }
    for public in super::outbound::public_addresses(vnet, spec.edge.pool) {
        // A port without a rule must not go round between the edge and here.
        plan.refuse(Ipv4Net::from(public));
    }
    let routes = super::routing::routing(vnet, &mut plan, transit.edge(), outward);
    let hosts = super::hosts::elsewhere(spec, vnet, &mut plan);
    let sites = super::sites::sites(vnet, &mut plan, outward);
    plan.tables = vec![
        protection(vnet, outward),
        super::spoofing::arp(vnet),
        super::spoofing::ip6(),
        super::balancer::balancer(vnet),
        super::outbound::outbound(vnet),
        super::security::security(vnet),
        routes,
        hosts,
        sites,
    ];
    plan
}

/// Sysctls of a virtual network's namespace, to be set before it has links. IPv6 is on without any address, so that what
/// NICs say in it is seen, counted and dropped by a rule and not by the device.
pub fn vnet_sysctls() -> Vec<(String, String)> {
    let mut plan = NamespacePlan::router();
    plan.set(&[
        ("net.ipv6.conf.all.addr_gen_mode", "1"),
        ("net.ipv6.conf.default.addr_gen_mode", "1"),
        ("net.ipv6.conf.all.disable_ipv6", "0"),
        ("net.ipv6.conf.default.disable_ipv6", "0"),
    ]);
    plan.sysctls
}

/// How each end of a link between peers sees the other one.
const PEER_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The end in `vnet` of its link to its peer `other`.
pub fn peer_mac(vnet: &str, other: &str) -> vnet_model::Mac {
    vnet_model::Mac::derived(&format!("{vnet}/{other}/peer"))
}

fn protection(vnet: &VnetSpec, outward: Ipv4Addr) -> Table {
    use Field::{IpDaddr, IpSaddr, L4Proto};
    let marks = vnet.nics_here().filter_map(|nic| {
        let NicKind::Group { cluster: Some(cluster) } = &nic.kind else {
            return None;
        };
        let mark = vnet.clusters.iter().find(|c| c.cluster == *cluster)?.mark;
        Some(Element::data([Datum::IfName(nic_link(&nic.key))], [Datum::Mark(mark)]))
    });
    let own_ports = [(TCP, 80), (TCP, 53), (UDP, 53)];
    let dns_ports = vnet
        .clusters
        .iter()
        .flat_map(|c| [(TCP, c.dns_port), (UDP, c.dns_port)]);
    let sockets = own_ports
        .into_iter()
        .chain(dns_ports)
        .map(|(proto, port)| Element::key([Datum::Ip(WIRE_SERVER), Datum::Proto(proto), Datum::Port(port)]))
        .chain([Element::key([
            Datum::Ip(METADATA_SERVICE),
            Datum::Proto(TCP),
            Datum::Port(80),
        ])]);

    let mut table = Table::new(Family::Ip, VNET_TABLE);
    table.sets = vec![
        Set::map("marks", [Field::Iifname], [Field::Mark]).with(marks),
        Set::new("sockets", [IpDaddr, L4Proto, Field::Dport]).with(sockets),
        Set::new("local", [IpDaddr]).with(vnet.local.iter().map(|a| Element::key([Datum::Ip(*a)]))),
        Set::new("inside", [IpSaddr])
            .intervals()
            .with(vnet.prefixes.iter().map(|p| Element::key([Datum::Net(*p)]))),
        Set::new("peers", [Field::Iifname]).with(vnet.peers.iter().map(|p| Element::key([name(&peer_link(&p.vnet))]))),
        Set::new("peers-forwarding", [Field::Iifname]).with(
            vnet.peers
                .iter()
                .filter(|p| p.access && p.forwarded)
                .map(|p| Element::key([name(&peer_link(&p.vnet))])),
        ),
        Set::new("peer-sources", [Field::Iifname, IpSaddr]).intervals().with(
            vnet.peers.iter().filter(|p| p.access).flat_map(|p| {
                let link = peer_link(&p.vnet);
                p.prefixes
                    .iter()
                    .map(move |n| Element::key([name(&link), Datum::Net(*n)]))
            }),
        ),
    ];
    table.sets.extend(super::spoofing::senders(vnet));
    table
        .sets
        .push(Set::new("sites", [Field::Iifname]).with(super::sites::links(vnet)));
    let edge_or_own = |rule: Rule| {
        rule.is_not(Field::Iifname, name(EDGE_LINK))
            .is_not(Field::Iifname, name("lo"))
    };
    // Sites have a table of their own.
    let no_port = |rule: Rule| edge_or_own(rule).not_in_set([Field::Iifname], "sites");
    table.chains = vec![
        Chain::regular(
            "from-peer",
            [
                Rule::new().in_set([Field::Iifname, IpSaddr], "peer-sources").accept(),
                Rule::new()
                    .in_set([Field::Iifname], "peers-forwarding")
                    .not_in_set([IpSaddr], "inside")
                    .accept(),
                Rule::new()
                    .counter()
                    .reject(Reject::AdminProhibited)
                    .comment("not allowed by the peering"),
            ],
        ),
        Chain::base(
            "ports",
            ChainKind::Filter,
            HookPoint::Prerouting,
            -150,
            [
                // Before everything else: who knows another's connection could join it with a forged packet.
                // What comes from another host was looked at there.
                super::spoofing::forged(|rule| no_port(rule).is_not(Field::Iifname, name(VXLAN_LINK))),
                Rule::new().established().accept(),
                super::spoofing::rogue_dhcp(),
                Rule::new().in_set([Field::Iifname], "peers").goto("from-peer"),
                Rule::new().then(Statement::SetMarkMap {
                    fields: vec![Field::Iifname],
                    map: "marks".to_owned(),
                }),
            ],
        ),
        Chain::base(
            "input",
            ChainKind::Filter,
            HookPoint::Input,
            0,
            [
                Rule::new().established().accept(),
                Rule::new().iifname("lo").accept(),
                no_port(Rule::new())
                    .is_not(Field::Iifname, name(VXLAN_LINK))
                    .not_in_set([Field::Iifname], "peers")
                    .in_set([IpDaddr, L4Proto, Field::Dport], "sockets")
                    .accept(),
                edge_or_own(Rule::new()).in_set([IpDaddr], "local").accept(),
                Rule::new()
                    .counter()
                    .reject(Reject::AdminProhibited)
                    .comment("no such socket"),
            ],
        ),
        Chain::base(
            "outward",
            ChainKind::Nat,
            HookPoint::Postrouting,
            100,
            [Rule::new()
                .oifname(EDGE_LINK)
                .in_set([IpSaddr], "inside")
                .snat(NatTarget::to(outward, None))],
        ),
    ];
    // Every packet would meet it.
    if !vnet.peers.is_empty() {
        table.chains.push(Chain::base(
            "through",
            ChainKind::Filter,
            HookPoint::Forward,
            0,
            [
                Rule::new().established().accept(),
                // Peerings are not transitive, and lead to nobody's outside.
                Rule::new()
                    .in_set([Field::Iifname], "peers")
                    .not_in_set([IpDaddr], "inside")
                    .counter()
                    .reject(Reject::AdminProhibited)
                    .comment("through a peering"),
            ],
        ));
    }
    table
}

pub(super) fn name(link: &str) -> Datum {
    Datum::IfName(link.to_owned())
}

/// The virtual network's end of its link to the edge.
pub(super) fn vnet_side_mac(vnet: &str) -> vnet_model::Mac {
    vnet_model::Mac::derived(&format!("{}/vnet", vnet_link(vnet)))
}

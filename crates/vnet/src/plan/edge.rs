//! The edge's namespace, and the host's part of the border.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;
use linux::nft::{Chain, ChainKind, Datum, Element, Family, Field, Hook, HookPoint, Reject, Rule, Set, Table};
use vnet_model::Mac;
use vnet_model::fabric::FabricSpec;

use super::{NamespacePlan, Transit};
use crate::names::{EDGE_TABLE, HOST_LINK, host_link, host_table, vnet_link};

/// The edge's end of its link to a virtual network.
pub fn edge_side_mac(vnet: &str) -> Mac {
    Mac::derived(&format!("{}/edge", vnet_link(vnet)))
}

/// The virtual network's end of that link.
pub fn vnet_side_mac(vnet: &str) -> Mac {
    super::vnet::vnet_side_mac(vnet)
}

/// Both ends of the link between host and edge: the host's, the edge's.
pub fn host_link_macs(instance: &str) -> (Mac, Mac) {
    let of = |end| Mac::derived(&format!("{}/{end}", host_link(instance)));
    (of("host"), of("edge"))
}

/// The edge's namespace; `slots` has every virtual network of the spec. `has_uplink` leads what is for nobody here to
/// the host; without it such packets are refused.
pub fn plan_edge(spec: &FabricSpec, slots: &BTreeMap<String, u32>, has_uplink: bool) -> NamespacePlan {
    let transit = Transit::of(&spec.edge);
    let mut plan = NamespacePlan::router();
    plan.set(&[
        ("net.ipv6.conf.all.disable_ipv6", "1"),
        ("net.ipv6.conf.default.disable_ipv6", "1"),
    ]);
    let (host_mac, _) = host_link_macs(&spec.instance);
    plan.address(HOST_LINK, Ipv4Net::from(transit.edge()));
    plan.route(Ipv4Net::from(transit.host()), HOST_LINK);
    plan.neighbour(HOST_LINK, transit.host(), host_mac);
    plan.refuse(spec.edge.pool);
    plan.refuse(spec.edge.transit);
    if has_uplink {
        plan.route_via(Ipv4Net::default(), HOST_LINK, transit.host(), None);
    }
    for endpoint in &spec.edge.endpoints {
        plan.address("lo", Ipv4Net::from(*endpoint));
    }
    let (mut sources, between_edges) = super::hosts::between_edges(spec, &mut plan);
    for vnet in &spec.vnets {
        let Some(slot) = slots.get(&vnet.key) else { continue };
        let (link, address) = (vnet_link(&vnet.key), transit.vnet(*slot));
        plan.route(Ipv4Net::from(address), &link);
        plan.neighbour(&link, address, vnet_side_mac(&vnet.key));
        sources.push(Element::key([Datum::IfName(link.clone()), Datum::Ip(address)]));
        for public in super::outbound::public_addresses(vnet, spec.edge.pool) {
            plan.route_via(Ipv4Net::from(public), &link, address, None);
        }
        let leaving = super::outbound::leaving_addresses(vnet).into_iter();
        sources.extend(leaving.map(|a| Element::key([Datum::IfName(link.clone()), Datum::Ip(a)])));
    }
    let mut table = edge_table(spec, sources, transit);
    table.chains.extend(between_edges);
    plan.tables = vec![table];
    plan
}

fn edge_table(spec: &FabricSpec, sources: Vec<Element>, transit: Transit) -> Table {
    use Field::{IpDaddr, IpSaddr};
    let endpoints = spec.edge.endpoints.iter().map(|e| Element::key([Datum::Ip(*e)]));
    let mut table = Table::new(Family::Ip, EDGE_TABLE);
    table.sets = vec![
        Set::new("sources", [Field::Iifname, IpSaddr]).with(sources),
        Set::new("endpoints", [IpDaddr]).with(endpoints),
    ];
    let not_from = |rule: Rule, link: &str| rule.is_not(Field::Iifname, Datum::IfName(link.to_owned()));
    table.chains = vec![
        Chain::base(
            "sources",
            ChainKind::Filter,
            HookPoint::Prerouting,
            -150,
            [
                Rule::new().established().accept(),
                not_from(not_from(Rule::new(), HOST_LINK), "lo")
                    .not_in_set([Field::Iifname, IpSaddr], "sources")
                    .counter()
                    .drop()
                    .comment(super::SPOOFED),
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
                Rule::new().in_set([IpDaddr], "endpoints").accept(),
                Rule::new()
                    .counter()
                    .reject(Reject::AdminProhibited)
                    .comment("no such endpoint"),
            ],
        ),
        Chain {
            name: "between".to_owned(),
            hook: Some(Hook {
                kind: ChainKind::Filter,
                point: HookPoint::Forward,
                priority: 0,
                drop: true,
            }),
            rules: vec![
                Rule::new().established().accept(),
                // To public addresses from everywhere; translated addresses are reached by nobody directly.
                Rule::new().daddr(spec.edge.pool).accept(),
                not_from(Rule::new(), HOST_LINK)
                    .oifname(HOST_LINK)
                    .is_not(IpDaddr, Datum::Net(transit.range))
                    .accept(),
                Rule::new()
                    .counter()
                    .reject(Reject::AdminProhibited)
                    .comment("not public"),
            ],
        },
    ];
    table
}

/// The host's namespace: only what hangs on the edge's link, and one table. `uplink` is the link outward traffic leaves
/// by.
pub fn plan_host(spec: &FabricSpec, uplink: Option<&str>) -> NamespacePlan {
    let transit = Transit::of(&spec.edge);
    let link = host_link(&spec.instance);
    let (_, edge_mac) = host_link_macs(&spec.instance);
    let sysctls = vec![(format!("net/ipv6/conf/{link}/disable_ipv6"), "1".to_owned())];
    let mut plan = NamespacePlan {
        sysctls,
        ..NamespacePlan::default()
    };
    plan.address(&link, Ipv4Net::from(transit.host()));
    plan.route_via(spec.edge.pool, &link, transit.edge(), Some(transit.host()));
    plan.neighbour(&link, transit.edge(), edge_mac);
    let mut table = Table::new(Family::Ip, host_table(&spec.instance));
    let to_host = Chain::base(
        "input",
        ChainKind::Filter,
        HookPoint::Input,
        -10,
        [
            Rule::new().iifname(&link).established().accept(),
            Rule::new()
                .iifname(&link)
                .counter()
                .reject(Reject::AdminProhibited)
                .comment("from a virtual network to the host"),
        ],
    );
    let mut through = vec![
        Rule::new().iifname(&link).established().accept(),
        Rule::new().oifname(&link).established().accept(),
    ];
    if let Some(uplink) = uplink {
        plan.route_via(spec.edge.transit, &link, transit.edge(), Some(transit.host()));
        plan.sysctls
            .push((format!("net/ipv4/conf/{link}/forwarding"), "1".to_owned()));
        through.push(Rule::new().iifname(&link).oifname(uplink).accept());
        // Public addresses are this platform's own: the world behind the uplink does not know the way back to them.
        let masquerade =
            [spec.edge.transit, spec.edge.pool].map(|net| Rule::new().saddr(net).oifname(uplink).masquerade());
        table.chains.push(Chain::base(
            "outward",
            ChainKind::Nat,
            HookPoint::Postrouting,
            100,
            masquerade,
        ));
    }
    through.push(
        Rule::new()
            .iifname(&link)
            .counter()
            .reject(Reject::AdminProhibited)
            .comment("outward without an uplink"),
    );
    through.push(
        Rule::new()
            .oifname(&link)
            .counter()
            .drop()
            .comment("through the host to the edge"),
    );
    table.chains.push(to_host);
    table.chains.push(Chain::base(
        "through",
        ChainKind::Filter,
        HookPoint::Forward,
        -10,
        through,
    ));
    super::hosts::guard(spec, &mut table);
    plan.tables = vec![table];
    plan
}

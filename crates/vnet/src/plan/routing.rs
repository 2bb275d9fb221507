//! Route tables of subnets: packets from their NICs carry the table's number in the upper half of the mark, and a rule of
//! the kernel looks that table up before `main`.
//!
//! A table holds the subnet's own routes and, for what the system routes more precisely, entries that send the search on
//! to `main`; so the longest prefix wins whoever set it. The mark is set after translation and taken off before anyone
//! else looks. Flows by a load balancer's frontend stay on the fabric's own way.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use linux::netlink::RouteKind;
use linux::nft::{Chain, ChainKind, Datum, Element, Family, Field, HookPoint, Rule, Set, Table};
use vnet_model::fabric::{NextHop, VnetSpec};

use super::{NamespacePlan, PlannedRoute, PlannedRule};
use crate::names::{EDGE_LINK, ROUTES_TABLE, nic_link};

/// The kernel's number of the first route table.
const FIRST_TABLE: u32 = 1000;
const MARK_SHIFT: u32 = 16;
const MARK_MASK: u32 = 0xffff_0000;

/// Adds routes and rules to the plan of `vnet`, and returns the table that marks. `gateway` is the edge, `outward` the
/// address that the network leaves by.
pub fn routing(vnet: &VnetSpec, plan: &mut NamespacePlan, gateway: Ipv4Addr, outward: Ipv4Addr) -> Table {
    let mut table = Table::new(Family::Ip, ROUTES_TABLE);
    let used: BTreeSet<&str> = vnet.subnets.iter().filter_map(|s| s.route_table.as_deref()).collect();
    let own = vnet.route_tables.iter().filter(|t| used.contains(t.key.as_str()));
    let mut marking = Vec::new();
    for (n, own) in (1..).zip(own) {
        let number = FIRST_TABLE + n;
        let mark = n << MARK_SHIFT;
        plan.rules.insert(PlannedRule {
            mark,
            mask: MARK_MASK,
            table: number,
        });
        let beyond = vnet.peers.iter().flat_map(|p| &p.prefixes);
        let beyond = beyond.chain(vnet.sites.iter().flat_map(|s| &s.prefixes));
        let system = vnet.prefixes.iter().chain(beyond);
        let mut routes: BTreeMap<Ipv4Net, NextHop> = system.map(|p| (*p, NextHop::VnetLocal)).collect();
        let known: Vec<Ipv4Net> = routes.keys().copied().collect();
        routes.extend(own.routes.iter().map(|r| (r.prefix, r.next_hop)));
        for (prefix, hop) in routes {
            let special = |kind| (None, None, None, kind);
            let (link, via, source, kind) = match hop {
                NextHop::VnetLocal if known.iter().any(|k| k.contains(&prefix)) => special(RouteKind::Throw),
                NextHop::VnetLocal | NextHop::None => special(RouteKind::Prohibit),
                NextHop::Internet => (
                    Some(EDGE_LINK.to_owned()),
                    Some(gateway.into()),
                    Some(outward.into()),
                    RouteKind::Unicast,
                ),
                NextHop::VirtualAppliance(address) => match vnet
                    .nic_of(address)
                    // On another host nothing tells a packet for the appliance from one for its destination.
                    .filter(|n| n.ip_forwarding && n.host.is_none())
                {
                    Some(nic) => (Some(nic_link(&nic.key)), Some(address.into()), None, RouteKind::Unicast),
                    None => special(RouteKind::Prohibit),
                },
            };
            plan.routes.insert(PlannedRoute {
                destination: prefix.into(),
                link,
                gateway: via,
                source,
                kind,
                table: Some(number),
            });
        }
        let here = |subnet: &str| {
            let subnet = vnet.subnet(subnet).and_then(|s| s.route_table.as_deref());
            subnet == Some(own.key.as_str())
        };
        let ports = vnet.nics_here().filter(|nic| here(&nic.subnet));
        let set = format!("table-{n}");
        table.sets.push(
            Set::new(set.clone(), [Field::Iifname])
                .with(ports.map(|nic| Element::key([Datum::IfName(nic_link(&nic.key))]))),
        );
        marking.push(Rule::new().in_set([Field::Iifname], set).set_mark(mark, MARK_MASK));
    }
    if marking.is_empty() {
        return table;
    }
    let frontends: BTreeSet<Ipv4Addr> = vnet.frontends.iter().map(|f| f.address).collect();
    table.sets.push(
        Set::new("frontends", [Field::IpDaddr]).with(frontends.into_iter().map(|a| Element::key([Datum::Ip(a)]))),
    );
    marking.insert(0, Rule::new().in_set([Field::CtOriginalIpDaddr], "frontends").accept());
    table.chains = vec![
        Chain::base("mark", ChainKind::Filter, HookPoint::Prerouting, -90, marking),
        Chain::base(
            "unmark",
            ChainKind::Filter,
            HookPoint::Postrouting,
            -200,
            [Rule::new().set_mark(0, MARK_MASK)],
        ),
    ];
    table
}

//! Makes a namespace hold what its plan says: reads what is there, sends only the differences.

use std::collections::{BTreeSet, HashMap};
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::path::Path;

use ipnet::IpNet;
use linux::conntrack::{Conntrack, Translation};
use linux::netlink::{Address, Forwarding, Link, Neighbour, Request, Route, RouteEntry, RouteKind, RoutingRule};
use linux::netns::NetNs;
use linux::nft::{Change, Family, Nft, Table};
use linux::sysctl;

use crate::Error;
use crate::plan::{NamespacePlan, PlannedAddress, PlannedForwarding, PlannedNeighbour, PlannedRoute, PlannedRule};

/// Which links of the namespace are ours to rule over.
#[derive(Clone, Copy)]
pub enum Scope<'a> {
    /// The whole namespace.
    All,
    /// Only what hangs on this link: the host's namespace.
    Link(&'a str),
}

/// Number of `main` and of routes that were not made by the kernel itself.
const TABLE_MAIN: u32 = 254;
const PROTOCOL_KERNEL: u8 = 2;
/// Tables of subnets and of other hosts, and where their rules stand: between the kernel's for `local` and `main`.
const OWN_TABLES: RangeInclusive<u32> = 1000..=7999;
const RULE_PRIORITY: u32 = 10000;

/// Sockets of one namespace, kept open: opening costs more than a request.
pub struct Handles {
    pub ns: NetNs,
    pub route: Route,
    pub nft: Nft,
    conntrack: Conntrack,
}

impl Handles {
    pub fn open(ns: NetNs) -> Result<Self, Error> {
        let (route, nft, conntrack) = ns.run(|| (Route::open(), Nft::open(), Conntrack::open()))?;
        Ok(Self {
            ns,
            route: route?,
            nft: nft?,
            conntrack: conntrack?,
        })
    }

    /// Deletes these links, those that are there. Returns how many were asked for.
    pub fn delete_links(&mut self, names: &[String]) -> Result<usize, Error> {
        let requests: Vec<Request> = names.iter().map(|n| Request::delete_link_named(n)).collect();
        self.route.run_all(&requests)?;
        Ok(requests.len())
    }

    /// Deletes every connection of these addresses: their next owner shall not inherit any.
    pub fn forget(&mut self, addresses: &BTreeSet<Ipv4Addr>) -> Result<(), Error> {
        self.conntrack.forget(addresses)?;
        Ok(())
    }

    /// Deletes the connections that load balancers led these ways.
    pub fn forget_translated(&mut self, ways: &BTreeSet<Translation>) -> Result<(), Error> {
        self.conntrack.forget_translated(ways)?;
        Ok(())
    }
}

/// Brings the namespace to `plan` and returns how many changes that took. `known` is the plan it was brought to last, if
/// this process did that: then only the differences between the plans are sent and nothing is read.
pub fn converge(
    handles: &mut Handles,
    plan: &NamespacePlan,
    scope: Scope<'_>,
    known: Option<&NamespacePlan>,
) -> Result<usize, Error> {
    let mut changes = 0;
    if known.is_none_or(|k| k.sysctls != plan.sysctls) {
        changes += set_sysctls(handles, &plan.sysctls)?;
    }
    if known.is_none() && matches!(scope, Scope::All) {
        changes += raise(&mut handles.route, plan)?;
    }
    let requests = match known {
        Some(known) => since(&mut handles.route, known, plan)?,
        None => afresh(&mut handles.route, plan, scope)?,
    };
    changes += requests.len();
    handles.route.run_all(&requests)?;
    for (n, table) in plan.tables.iter().enumerate() {
        if table.family == Family::Ip6 && !has_ip6() {
            continue;
        }
        let before = known.and_then(|k| k.tables.get(n)).filter(|k| same_table(k, table));
        let change = match before {
            Some(before) => handles.nft.update(before, table)?,
            None => handles.nft.ensure(table)?,
        };
        changes += usize::from(change == Change::Changed);
    }
    Ok(changes)
}

fn same_table(a: &Table, b: &Table) -> bool {
    a.name == b.name && a.family == b.family
}

/// Whether the kernel speaks IPv6 at all.
pub fn has_ip6() -> bool {
    Path::new("/proc/sys/net/ipv6").is_dir()
}

/// Sets those that differ; returns how many that were.
pub fn set_sysctls(handles: &Handles, wanted: &[(String, String)]) -> Result<usize, Error> {
    let set = || -> Result<usize, sysctl::Error> {
        let mut changes = 0;
        for (key, value) in wanted {
            match sysctl::set(key, value) {
                Ok(before) => changes += usize::from(before != *value),
                // A kernel without IPv6 has nothing to switch off.
                Err(sysctl::Error::Read { .. }) if key.contains("ipv6") => {}
                Err(e) => return Err(e),
            }
        }
        Ok(changes)
    };
    Ok(handles.ns.run(set)??)
}

/// What the kernel holds, or shall hold, with link indexes.
#[derive(Default)]
pub struct Entries {
    pub addresses: BTreeSet<Address>,
    pub neighbours: BTreeSet<Neighbour>,
    pub routes: BTreeSet<RouteEntry>,
    pub rules: BTreeSet<RoutingRule>,
    pub forwardings: BTreeSet<Forwarding>,
}

impl Entries {
    /// A plan's entries on links that are there and up; those of other links wait.
    pub fn planned(plan: &NamespacePlan, links: &[Link]) -> Self {
        let links: HashMap<&str, u32> = links
            .iter()
            .filter(|l| l.up)
            .map(|l| (l.name.as_str(), l.index))
            .collect();
        let index = |name: &str| links.get(name).copied();
        let address = |a: &PlannedAddress| {
            Some(Address {
                link: index(&a.link)?,
                address: a.address,
                no_prefix_route: false,
            })
        };
        let neighbour = |n: &PlannedNeighbour| {
            let (link, mac) = (index(&n.link)?, Some(n.mac.0));
            Some(Neighbour {
                link,
                address: n.address,
                mac,
                proxy: false,
                permanent: true,
            })
        };
        let forwarding = |f: &PlannedForwarding| {
            Some(Forwarding {
                link: index(&f.link)?,
                mac: f.mac.0,
                to: f.to,
            })
        };
        Self {
            forwardings: plan.forwardings.iter().filter_map(forwarding).collect(),
            addresses: plan.addresses.iter().filter_map(address).collect(),
            neighbours: plan.neighbours.iter().filter_map(neighbour).collect(),
            routes: plan.routes.iter().filter_map(|r| entry(r, index)).collect(),
            rules: plan.rules.iter().map(rule).collect(),
        }
    }

    /// The kernel's IPv4 entries that are ours to rule over.
    pub fn found(route: &mut Route, links: &[Link], scope: Scope<'_>) -> Result<Self, Error> {
        let ours = |link: Option<u32>| match scope {
            Scope::All => true,
            Scope::Link(name) => link.is_some() && links.iter().any(|l| l.name == name && Some(l.index) == link),
        };
        let made = |r: &RouteEntry| {
            (r.table == TABLE_MAIN || OWN_TABLES.contains(&r.table)) && r.protocol != PROTOCOL_KERNEL && ours(r.link)
        };
        let v4 = |a: &IpNet| matches!(a, IpNet::V4(_));
        Ok(Self {
            addresses: route
                .addresses()?
                .into_iter()
                .filter(|a| v4(&a.address) && !a.address.addr().is_loopback() && ours(Some(a.link)))
                .collect(),
            neighbours: route
                .neighbours()?
                .into_iter()
                .filter(|n| n.address.is_ipv4() && n.permanent && !n.address.is_loopback() && ours(Some(n.link)))
                .collect(),
            routes: route
                .routes()?
                .into_iter()
                .filter(|r| v4(&r.destination) && made(r))
                .collect(),
            rules: match scope {
                Scope::All => route
                    .rules()?
                    .into_iter()
                    .filter(|r| r.priority == RULE_PRIORITY)
                    .collect(),
                Scope::Link(_) => BTreeSet::new(),
            },
            forwardings: match scope {
                Scope::All => route.forwardings()?.into_iter().collect(),
                Scope::Link(_) => BTreeSet::new(),
            },
        })
    }

    /// The requests that lead from these entries to `wanted`, deletions first.
    fn requests_to(&self, wanted: &Self) -> Vec<Request> {
        let mut out: Vec<Request> = Vec::new();
        out.extend(self.rules.difference(&wanted.rules).map(Request::delete_rule));
        out.extend(
            self.addresses
                .difference(&wanted.addresses)
                .map(Request::delete_address),
        );
        out.extend(
            self.neighbours
                .difference(&wanted.neighbours)
                .map(Request::delete_neighbour),
        );
        let stale = self.forwardings.difference(&wanted.forwardings);
        out.extend(stale.map(Request::delete_forwarding));
        // A route to the same place is replaced by its addition, so only places that no longer have one are deleted.
        let place = |r: &RouteEntry| (r.table, r.destination, r.metric);
        let places: BTreeSet<_> = wanted.routes.iter().map(place).collect();
        let stale = self
            .routes
            .difference(&wanted.routes)
            .filter(|r| !places.contains(&place(r)));
        out.extend(stale.map(Request::delete_route));
        out.extend(wanted.addresses.difference(&self.addresses).map(Request::add_address));
        out.extend(
            wanted
                .neighbours
                .difference(&self.neighbours)
                .map(Request::add_neighbour),
        );
        let fresh = wanted.forwardings.difference(&self.forwardings);
        out.extend(fresh.map(Request::add_forwarding));
        // Routes without a gateway first: a gateway's own route may be among them.
        let mut fresh: Vec<&RouteEntry> = wanted.routes.difference(&self.routes).collect();
        fresh.sort_by_key(|r| r.gateway.is_some());
        out.extend(fresh.into_iter().map(Request::add_route));
        // A rule counts once its table is complete.
        out.extend(wanted.rules.difference(&self.rules).map(Request::add_rule));
        out
    }
}

/// Links that the plan speaks of and that somebody set down.
pub fn lowered<'a>(plan: &NamespacePlan, links: &'a [Link]) -> Vec<&'a Link> {
    let addresses = plan.addresses.iter().map(|a| a.link.as_str());
    let neighbours = plan.neighbours.iter().map(|n| n.link.as_str());
    let routes = plan.routes.iter().filter_map(|r| r.link.as_deref());
    let named: BTreeSet<&str> = addresses.chain(neighbours).chain(routes).collect();
    let down = links.iter().filter(|l| !l.up);
    down.filter(|l| named.contains(l.name.as_str())).collect()
}

/// Sets such links up again.
fn raise(route: &mut Route, plan: &NamespacePlan) -> Result<usize, Error> {
    let links = route.links()?;
    let requests: Vec<Request> = lowered(plan, &links)
        .iter()
        .map(|l| Request::set_up(l.index, true))
        .collect();
    route.run_all(&requests)?;
    Ok(requests.len())
}

/// The requests for what a plan has on one link.
pub fn on_link(route: &mut Route, plan: &NamespacePlan, link: &str) -> Result<Vec<Request>, Error> {
    let only = NamespacePlan {
        addresses: plan.addresses.iter().filter(|a| a.link == link).cloned().collect(),
        neighbours: plan.neighbours.iter().filter(|n| n.link == link).cloned().collect(),
        routes: plan
            .routes
            .iter()
            .filter(|r| r.link.as_deref() == Some(link))
            .cloned()
            .collect(),
        ..NamespacePlan::default()
    };
    let links = route.links()?;
    Ok(Entries::default().requests_to(&Entries::planned(&only, &links)))
}

fn afresh(route: &mut Route, plan: &NamespacePlan, scope: Scope<'_>) -> Result<Vec<Request>, Error> {
    let links = route.links()?;
    let there = Entries::found(route, &links, scope)?;
    Ok(there.requests_to(&Entries::planned(plan, &links)))
}

/// The requests for what differs between two plans. Entries of links that went meanwhile went with them.
fn since(route: &mut Route, known: &NamespacePlan, plan: &NamespacePlan) -> Result<Vec<Request>, Error> {
    let only = |a: &NamespacePlan, b: &NamespacePlan| NamespacePlan {
        addresses: a.addresses.difference(&b.addresses).cloned().collect(),
        neighbours: a.neighbours.difference(&b.neighbours).cloned().collect(),
        routes: a.routes.difference(&b.routes).cloned().collect(),
        rules: a.rules.difference(&b.rules).copied().collect(),
        forwardings: a.forwardings.difference(&b.forwardings).cloned().collect(),
        ..NamespacePlan::default()
    };
    let (gone, come) = (only(known, plan), only(plan, known));
    if gone == come {
        return Ok(Vec::new());
    }
    let links = route.links()?;
    Ok(Entries::planned(&gone, &links).requests_to(&Entries::planned(&come, &links)))
}

fn rule(rule: &PlannedRule) -> RoutingRule {
    RoutingRule {
        v6: false,
        priority: RULE_PRIORITY,
        iif: None,
        mark: Some((rule.mark, rule.mask)),
        table: rule.table,
    }
}

/// The route with its link's index; `None` while the link is not there.
fn entry(route: &PlannedRoute, index: impl Fn(&str) -> Option<u32>) -> Option<RouteEntry> {
    let mut out = match (&route.link, route.gateway) {
        (None, _) => RouteEntry::special(route.destination, route.kind),
        (Some(link), None) => RouteEntry::via_link(route.destination, index(link)?),
        (Some(link), Some(gateway)) => RouteEntry::via_gateway(route.destination, index(link)?, gateway),
    };
    debug_assert!(route.link.is_some() || route.kind != RouteKind::Unicast);
    out.source = route.source;
    out.table = route.table.unwrap_or(TABLE_MAIN);
    Some(out)
}

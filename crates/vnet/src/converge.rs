//! Makes a namespace hold what its plan says: reads what is there, sends only the differences.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::IpNet;
use linux::conntrack::Conntrack;
use linux::netlink::{Address, Link, Neighbour, Request, Route, RouteEntry, RouteKind};
use linux::netns::NetNs;
use linux::nft::{Change, Nft, Table};
use linux::sysctl;

use crate::Error;
use crate::plan::{NamespacePlan, PlannedRoute};

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

    /// Deletes the ports that `stale` picks, and every connection of `addresses`: the next owner of an address shall not
    /// inherit any. Returns the number of ports.
    pub fn delete_ports(
        &mut self,
        stale: impl Fn(&str) -> bool,
        addresses: &BTreeSet<Ipv4Addr>,
    ) -> Result<usize, Error> {
        let links = self.route.links()?;
        let requests: Vec<Request> = links
            .iter()
            .filter(|l| stale(&l.name))
            .map(|l| Request::delete_link(l.index))
            .collect();
        self.route.run_all(&requests)?;
        self.conntrack.forget(addresses)?;
        Ok(requests.len())
    }
}

/// Brings the namespace to `plan` and returns how many changes that took. `known` are the tables as they were applied
/// last, if this process applied them: then only their differences are sent.
pub fn converge(
    handles: &mut Handles,
    plan: &NamespacePlan,
    scope: Scope<'_>,
    known: Option<&[Table]>,
) -> Result<usize, Error> {
    let mut changes = set_sysctls(handles, &plan.sysctls)?;
    let requests = differences(&mut handles.route, plan, scope)?;
    changes += requests.len();
    handles.route.run_all(&requests)?;
    for (n, table) in plan.tables.iter().enumerate() {
        let before = known
            .and_then(|k| k.get(n))
            .filter(|k| k.name == table.name && k.family == table.family);
        let change = match before {
            Some(before) => handles.nft.update(before, table)?,
            None => handles.nft.ensure(table)?,
        };
        changes += usize::from(change == Change::Changed);
    }
    Ok(changes)
}

fn set_sysctls(handles: &Handles, wanted: &[(String, String)]) -> Result<usize, Error> {
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

fn differences(route: &mut Route, plan: &NamespacePlan, scope: Scope<'_>) -> Result<Vec<Request>, Error> {
    let links: BTreeMap<String, Link> = route.links()?.into_iter().map(|l| (l.name.clone(), l)).collect();
    let ours = |link: Option<u32>| match scope {
        Scope::All => true,
        Scope::Link(name) => link.is_some() && links.get(name).map(|l| l.index) == link,
    };
    let index = |name: &str| links.get(name).filter(|l| l.up).map(|l| l.index);
    let (mut add, mut remove) = (Vec::new(), Vec::new());

    let wanted: BTreeSet<Address> = plan
        .addresses
        .iter()
        .filter_map(|a| {
            Some(Address {
                link: index(&a.link)?,
                address: a.address,
                no_prefix_route: false,
            })
        })
        .collect();
    let there: BTreeSet<Address> = route
        .addresses()?
        .into_iter()
        .filter(|a| matches!(a.address, IpNet::V4(_)) && ours(Some(a.link)) && !a.address.addr().is_loopback())
        .collect();
    remove.extend(there.difference(&wanted).map(Request::delete_address));
    add.extend(wanted.difference(&there).map(Request::add_address));

    let wanted: BTreeSet<Neighbour> = plan
        .neighbours
        .iter()
        .filter_map(|n| {
            let (link, mac) = (index(&n.link)?, Some(n.mac.0));
            Some(Neighbour {
                link,
                address: n.address,
                mac,
                proxy: false,
                permanent: true,
            })
        })
        .collect();
    let there: BTreeSet<Neighbour> = route
        .neighbours()?
        .into_iter()
        .filter(|n| n.address.is_ipv4() && n.permanent && ours(Some(n.link)) && !n.address.is_loopback())
        .collect();
    remove.extend(there.difference(&wanted).map(Request::delete_neighbour));
    add.extend(wanted.difference(&there).map(Request::add_neighbour));

    let wanted: BTreeSet<RouteEntry> = plan.routes.iter().filter_map(|r| entry(r, index)).collect();
    let there: BTreeSet<RouteEntry> = route
        .routes()?
        .into_iter()
        .filter(|r| matches!(r.destination, IpNet::V4(_)) && r.table == TABLE_MAIN && r.protocol != PROTOCOL_KERNEL)
        .filter(|r| ours(r.link))
        .collect();
    // A route to the same place is replaced by its addition, so only places that no longer have one are deleted.
    let places: BTreeSet<(IpNet, u32)> = wanted.iter().map(|r| (r.destination, r.metric)).collect();
    let stale = there
        .difference(&wanted)
        .filter(|r| !places.contains(&(r.destination, r.metric)));
    remove.extend(stale.map(Request::delete_route));
    // Routes without a gateway first: a gateway's own route may be among them.
    let mut fresh: Vec<&RouteEntry> = wanted.difference(&there).collect();
    fresh.sort_by_key(|r| r.gateway.is_some());
    add.extend(fresh.into_iter().map(Request::add_route));

    remove.extend(add);
    Ok(remove)
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
    Some(out)
}

//! What an apply would change, without changing anything: the plans compared with the kernel, namespace by namespace.
//!
//! It reads by sockets of its own and knows nothing of what a running host agent remembers, so it tells the same whether
//! one runs or not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use linux::netlink::{Link, RouteEntry, RouteKind, format_mac};
use linux::netns::{self, NetNs};
use linux::nft::{Family, Table};
use linux::sysctl;
use vnet_model::fabric::{FabricSpec, VnetSpec};

use crate::converge::{Entries, Handles, Scope, has_ip6, lowered};
use crate::fabric::slot_in;
use crate::join::{is_device, joined};
use crate::names::{
    EDGE_LINK, HOST_LINK, VXLAN_LINK, edge_pin, host_link, is_nic_link, is_peer_link, is_vnet_link, nic_link,
    peer_link, pins, vnet_link, vnet_of_pin, vnet_pin,
};
use crate::plan::{NamespacePlan, Transit, VxlanPlan, assign_slots, plan_edge, plan_host, plan_vnet, vxlans};
use crate::{Error, Fabric};

/// One thing that an apply would do.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Difference {
    /// `host`, `edge`, or a virtual network's key.
    pub namespace: String,
    pub action: Action,
    /// `route 10.1.0.4/32 dev n0123456789ab`, `table ip oaks-nsg`, ...
    pub what: String,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Action {
    Remove,
    Change,
    Add,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.action {
            Action::Remove => '-',
            Action::Change => '~',
            Action::Add => '+',
        };
        write!(f, "{sign} {}: {}", self.namespace, self.what)
    }
}

/// What [`Fabric::apply`] of `spec` would change on the host whose network namespace the calling thread is in; empty if
/// everything is as planned. What hangs on links that an apply would make first is not listed by itself.
///
/// # Errors
/// What an apply would refuse; and what cannot be read.
pub fn diff(instance: &str, run_dir: &Path, spec: &FabricSpec) -> Result<Vec<Difference>, Error> {
    let uplink = Fabric::open(instance, run_dir)?.check(spec)?;
    let mut host = Handles::open(NetNs::current()?)?;
    let mut out = Differences::default();
    out.strangers(run_dir, spec);

    let mut spaces = BTreeMap::new();
    for vnet in &spec.vnets {
        match netns::open(&vnet_pin(run_dir, &vnet.key)) {
            Ok(ns) => drop(spaces.insert(vnet.key.as_str(), Handles::open(ns)?)),
            Err(_) => out.add(&vnet.key, "the network's namespace with all it holds"),
        }
    }
    let transit = Transit::of(&spec.edge);
    let mut held = BTreeMap::new();
    for (key, handles) in &mut spaces {
        held.extend(slot_in(handles, transit)?.map(|slot| ((*key).to_owned(), slot)));
    }
    let slots =
        assign_slots(spec.vnets.iter().map(|v| v.key.as_str()), &held, transit.slots()).ok_or(Error::TooManyVnets {
            count: spec.vnets.len(),
        })?;

    let mut edge = match netns::open(&edge_pin(run_dir)) {
        Ok(ns) => Some(Handles::open(ns)?),
        Err(_) => {
            out.add("edge", "the edge's namespace with all it holds");
            None
        }
    };
    if let Some(edge) = &mut edge {
        let link = host_link(instance);
        if !joined(&mut host.route, &link, &mut edge.route, HOST_LINK)? {
            out.add("host", &format!("link {link} to the edge"));
        }
        for (key, handles) in &mut spaces {
            if !joined(&mut edge.route, &vnet_link(key), &mut handles.route, EDGE_LINK)? {
                out.add(key, "link to the edge");
            }
        }
        let known: BTreeSet<String> = spec.vnets.iter().map(|v| vnet_link(&v.key)).collect();
        out.links("edge", edge, |name| is_vnet_link(name) && !known.contains(name))?;
        out.vxlan("edge", edge, vxlans(spec, None).as_ref())?;
        out.namespace("edge", edge, &plan_edge(spec, &slots, uplink.is_some()), Scope::All)?;
    }
    out.peers(spec, &mut spaces)?;
    for vnet in &spec.vnets {
        let (Some(handles), Some(slot)) = (spaces.get_mut(vnet.key.as_str()), slots.get(&vnet.key)) else {
            continue;
        };
        out.unknown_links(spec, vnet, handles)?;
        out.vxlan(&vnet.key, handles, vxlans(spec, Some(vnet)).as_ref())?;
        out.namespace(&vnet.key, handles, &plan_vnet(vnet, spec, *slot), Scope::All)?;
    }
    let mut plan = plan_host(spec, uplink.as_deref());
    plan.sysctls
        .extend(uplink.map(|u| (format!("net/ipv4/conf/{u}/forwarding"), "1".to_owned())));
    out.namespace("host", &mut host, &plan, Scope::Link(&host_link(instance)))?;
    out.0.sort();
    Ok(out.0)
}

#[derive(Default)]
struct Differences(Vec<Difference>);

impl Differences {
    fn push(&mut self, action: Action, namespace: &str, what: &str) {
        self.0.push(Difference {
            namespace: namespace.to_owned(),
            action,
            what: what.to_owned(),
        });
    }

    fn add(&mut self, namespace: &str, what: &str) {
        self.push(Action::Add, namespace, what);
    }

    /// Networks that the spec does not have.
    fn strangers(&mut self, run_dir: &Path, spec: &FabricSpec) {
        let entries = std::fs::read_dir(pins(run_dir));
        for pin in entries.into_iter().flatten().flatten() {
            let name = pin.file_name().to_string_lossy().into_owned();
            if let Some(key) = vnet_of_pin(&name).filter(|key| !spec.vnets.iter().any(|v| v.key == *key)) {
                self.push(Action::Remove, key, "the network's namespace with all it holds");
            }
        }
    }

    fn links(&mut self, namespace: &str, handles: &mut Handles, stale: impl Fn(&str) -> bool) -> Result<(), Error> {
        for link in handles.route.links()?.iter().filter(|l| stale(&l.name)) {
            self.push(Action::Remove, namespace, &format!("link {}", link.name));
        }
        Ok(())
    }

    /// Ports of NICs and links to peers that the spec does not have.
    fn unknown_links(&mut self, spec: &FabricSpec, vnet: &VnetSpec, handles: &mut Handles) -> Result<(), Error> {
        let ports: BTreeSet<String> = vnet.nics_here().map(|n| nic_link(&n.key)).collect();
        let pairs = spec.peered();
        let other = |(a, b): &(&str, &str)| match (*a == vnet.key, *b == vnet.key) {
            (true, _) => Some(peer_link(b)),
            (_, true) => Some(peer_link(a)),
            _ => None,
        };
        let peers: BTreeSet<String> = pairs.iter().filter_map(other).collect();
        self.links(&vnet.key, handles, |name| {
            is_nic_link(name) && !ports.contains(name) || is_peer_link(name) && !peers.contains(name)
        })
    }

    /// The device to other hosts.
    fn vxlan(&mut self, namespace: &str, handles: &mut Handles, wanted: Option<&VxlanPlan>) -> Result<(), Error> {
        let there = handles.route.link(VXLAN_LINK)?;
        let same = |link: &Link, wanted: &VxlanPlan| is_device(link, wanted) && link.mtu == wanted.mtu;
        match (there, wanted) {
            (None, Some(_)) => self.add(namespace, &format!("link {VXLAN_LINK} to other hosts")),
            (Some(_), None) => self.push(Action::Remove, namespace, &format!("link {VXLAN_LINK} to other hosts")),
            (Some(link), Some(wanted)) if !same(&link, wanted) => {
                self.push(Action::Change, namespace, &format!("link {VXLAN_LINK} to other hosts"));
            }
            _ => {}
        }
        Ok(())
    }

    fn peers<'a>(&mut self, spec: &'a FabricSpec, spaces: &mut BTreeMap<&'a str, Handles>) -> Result<(), Error> {
        for (a, b) in spec.peered() {
            let Some(mut far) = spaces.remove(b) else { continue };
            let whole = match spaces.get_mut(a) {
                Some(near) => joined(&mut near.route, &peer_link(b), &mut far.route, &peer_link(a)),
                None => Ok(true),
            };
            if let Some(v) = spec.vnets.iter().find(|v| v.key == b) {
                spaces.insert(&v.key, far);
            }
            if !whole? {
                self.add(a, &format!("link to the peer {b}"));
            }
        }
        Ok(())
    }

    fn namespace(
        &mut self,
        name: &str,
        handles: &mut Handles,
        plan: &NamespacePlan,
        scope: Scope<'_>,
    ) -> Result<(), Error> {
        let read = || -> Vec<(String, Option<String>)> {
            let now = |key: &str| sysctl::get(key).ok();
            plan.sysctls.iter().map(|(key, _)| (key.clone(), now(key))).collect()
        };
        for ((key, now), (_, wanted)) in handles.ns.run(read)?.into_iter().zip(&plan.sysctls) {
            match now {
                Some(now) if now != *wanted => {
                    self.push(Action::Change, name, &format!("sysctl {key} from {now} to {wanted}"));
                }
                _ => {}
            }
        }
        let links = handles.route.links()?;
        if matches!(scope, Scope::All) {
            for link in lowered(plan, &links) {
                self.push(Action::Change, name, &format!("link {} to up", link.name));
            }
        }
        let (there, wanted) = (
            Entries::found(&mut handles.route, &links, scope)?,
            Entries::planned(plan, &links),
        );
        let (there, wanted) = (lines(&there, &links), lines(&wanted, &links));
        for line in there.difference(&wanted) {
            self.push(Action::Remove, name, line);
        }
        for line in wanted.difference(&there) {
            self.push(Action::Add, name, line);
        }
        for table in &plan.tables {
            self.table(name, handles, table)?;
        }
        Ok(())
    }

    fn table(&mut self, name: &str, handles: &mut Handles, table: &Table) -> Result<(), Error> {
        let family = match table.family {
            Family::Inet => "inet",
            Family::Ip => "ip",
            Family::Arp => "arp",
            Family::Bridge => "bridge",
            Family::Ip6 => "ip6",
        };
        if table.family == Family::Ip6 && !has_ip6() {
            return Ok(());
        }
        let chains = handles.nft.chains(table.family, &table.name)?;
        let what = format!("table {family} {}", table.name);
        if chains.is_empty() {
            self.add(name, &what);
        } else if !chains.contains(&table.plan_mark()) {
            self.push(Action::Change, name, &format!("{what}: rules or elements"));
        }
        Ok(())
    }
}

/// Entries in words; those of links that went meanwhile with the link's number.
fn lines(entries: &Entries, links: &[Link]) -> BTreeSet<String> {
    let link = |index: u32| {
        let found = links.iter().find(|l| l.index == index);
        found.map_or_else(|| index.to_string(), |l| l.name.clone())
    };
    let mac = |mac: Option<[u8; 6]>| mac.map_or_else(|| "none".to_owned(), format_mac);
    let addresses = entries
        .addresses
        .iter()
        .map(|a| format!("address {} dev {}", a.address, link(a.link)));
    let neighbours = entries
        .neighbours
        .iter()
        .map(|n| format!("neighbour {} dev {} lladdr {}", n.address, link(n.link), mac(n.mac)));
    let routes = entries.routes.iter().map(|r| route(r, &link));
    let rules = entries.rules.iter().map(ToString::to_string);
    let forwardings = entries
        .forwardings
        .iter()
        .map(|f| format!("forwarding {} dev {} to {}", format_mac(f.mac), link(f.link), f.to));
    let addresses = addresses.chain(neighbours).chain(forwardings);
    addresses.chain(routes).chain(rules).collect()
}

fn route(route: &RouteEntry, link: &impl Fn(u32) -> String) -> String {
    let kind = match route.kind {
        RouteKind::Unicast => "",
        RouteKind::Local => "local ",
        RouteKind::Blackhole => "blackhole ",
        RouteKind::Unreachable => "unreachable ",
        RouteKind::Prohibit => "prohibit ",
        RouteKind::Throw => "throw ",
    };
    let some = |word: &str, value: Option<String>| value.map_or_else(String::new, |v| format!(" {word} {v}"));
    let table = (route.table != 254).then(|| route.table.to_string());
    format!(
        "route {kind}{}{}{}{}{}",
        route.destination,
        some("via", route.gateway.map(|g: IpAddr| g.to_string())),
        some("dev", route.link.map(link)),
        some("src", route.source.map(|s| s.to_string())),
        some("table", table),
    )
}

//! What all modes share: owners of host links, errors, the node's NIC, and removal by name.
//!
//! Nothing is written down outside the kernel. A host link carries its owner as its alias; a pod's MAC is a hash of its
//! owner, so neighbours name theirs too. Routes and neighbours of a link end with it; those on a bridge are found by MAC.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use linux::{
    netlink::{self, Address, Link, Mac, Neighbour, Request, Route, RouteEntry, RouteKind},
    netns::NetNs,
    sysctl,
};
use thiserror::Error;

use crate::{pool::Key, steps};

pub(crate) const LINK_PREFIX: &str = "azv";
const ALIAS_WORD: &str = "azure-vnet";
/// `IFALIASZ` - 1.
const ALIAS_BYTES_MAX: usize = 255;

#[derive(Debug, Error)]
pub enum KernelError {
    #[error("{doing}")]
    Netlink {
        doing: String,
        #[source]
        source: netlink::Error,
    },
    #[error("{doing}")]
    Nft {
        doing: String,
        #[source]
        source: linux::nft::Error,
    },
    #[error("{doing}")]
    Sysctl {
        doing: String,
        #[source]
        source: sysctl::Error,
    },
    #[error("entering the pod's namespace")]
    Enter {
        #[source]
        source: linux::netns::Error,
    },
    #[error("interface {ifname} exists already in the namespace of container {container_id}")]
    Exists { ifname: String, container_id: String },
    #[error("link {link} belongs to another attachment: {alias}")]
    Foreign { link: String, alias: String },
    #[error("mode: tunnel carries no IPv6, but IPAM gave {address}; take IPv6 out of the pool, or use another mode")]
    NoIpv6InTunnel { address: IpAddr },
    #[error(
        "bridge: {link} was not made by azure-vnet (it is a {kind} link with MAC {mac}); name another one or remove it"
    )]
    ForeignBridge { link: String, kind: String, mac: String },
    #[error("IPAM gave neither a gateway for {address} nor a subnet that has one")]
    NoGateway { address: IpNet },
    #[error("no network interface of this machine fits: {reason}")]
    NoMaster { reason: String },
    #[error("{what} is missing or different: expected {expected}, found {found}")]
    Differs {
        what: String,
        expected: String,
        found: String,
    },
}

pub(crate) fn doing(what: impl Into<String>) -> impl FnOnce(netlink::Error) -> KernelError {
    let doing = what.into();
    move |source| KernelError::Netlink { doing, source }
}

pub(crate) fn filter(what: impl Into<String>) -> impl FnOnce(linux::nft::Error) -> KernelError {
    let doing = what.into();
    move |source| KernelError::Nft { doing, source }
}

/// Owner of a host link, as its alias says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// As [`network_tag`].
    pub network: String,
    pub key: Key,
    pub container_id: String,
    pub ifname: String,
}

/// The network's name, or a hash where the name would not fit into an alias.
pub fn network_tag(name: &str) -> String {
    if name.len() <= 100 {
        return name.to_owned();
    }
    hmac_sha256::Hash::hash(name.as_bytes())
        .iter()
        .take(20)
        .map(|b| format!("{b:02x}"))
        .collect()
}

impl Owner {
    pub(crate) fn alias(&self) -> String {
        let short = format!("{ALIAS_WORD} {} {}", self.network, self.key.0);
        let full = format!("{short} {} {}", self.container_id, self.ifname);
        if full.len() <= ALIAS_BYTES_MAX { full } else { short }
    }

    pub(crate) fn parse(alias: &str) -> Option<Self> {
        let mut words = alias.split(' ');
        if words.next()? != ALIAS_WORD {
            return None;
        }
        let mut next = || words.next().unwrap_or_default().to_owned();
        Some(Self {
            network: next(),
            key: Key(next()),
            container_id: next(),
            ifname: next(),
        })
    }
}

/// One attachment, ready to be made.
#[derive(Clone, Debug)]
pub struct Plan {
    pub owner: Owner,
    /// Name in the pod.
    pub ifname: String,
    pub addresses: Vec<Leased>,
    pub mtu: u32,
    /// NIC of the node: packets for pods enter there.
    pub master: Link,
}

/// An address as IPAM gives it.
#[derive(Clone, Copy, Debug)]
pub struct Leased {
    /// With the prefix length of its subnet.
    pub net: IpNet,
    pub gateway: Option<IpAddr>,
}

impl Plan {
    pub(crate) fn ips(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().map(|a| a.net.addr())
    }

    pub(crate) fn has_v6(&self) -> bool {
        self.ips().any(|a| a.is_ipv6())
    }
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Name and MAC of the bridge, if there is one.
    pub bridge: Option<(String, String)>,
    pub host_link: String,
    pub host_mac: String,
    pub pod_mac: String,
    /// As the pod has them, each with its gateway.
    pub addresses: Vec<(IpNet, IpAddr)>,
}

/// Both ends of an attachment: the pod's namespace, and a socket in the machine's namespace and in the pod's.
pub struct Ends {
    pub ns: NetNs,
    /// This process's own namespace.
    pub home: NetNs,
    pub host: Route,
    pub pod: Route,
}

impl Ends {
    /// What has to happen in the pod before its link is made.
    ///
    /// # Errors
    /// `Exists` if the pod has a link `ifname` already.
    pub fn prepare(&mut self, container_id: &str, ifname: &str) -> Result<Prepared, KernelError> {
        let looking = || format!("looking for {ifname} and lo in the pod's namespace");
        let found = self.pod.links_named(&[ifname, "lo"]).map_err(doing(looking()))?;
        match &found[..] {
            [None, Some(lo)] => Ok(Prepared {
                down_loopback: (!lo.up).then_some(lo.index),
            }),
            [Some(_), _] => Err(KernelError::Exists {
                ifname: ifname.to_owned(),
                container_id: container_id.to_owned(),
            }),
            _ => Err(doing(looking())(netlink::Error::NoLink { name: "lo".into() })),
        }
    }

    /// Waits until the links on both sides take packets. One that does not within the wait is left to the pod, which then sees
    /// what it would have seen anyway.
    ///
    /// The kernel takes packets for a new IPv6 address only once a worker has made the route to it, also if the address is not
    /// to be looked for elsewhere first.
    pub(crate) fn settle(&mut self, plan: &Plan, inner: u32, outer: &[u32]) -> Result<(), KernelError> {
        let waiting = || doing("waiting for the links to take packets");
        self.pod.settle_all(&[inner]).map_err(waiting())?;
        self.host.settle_all(outer).map_err(waiting())?;
        let wanted: Vec<IpNet> = plan.ips().filter(IpAddr::is_ipv6).map(IpNet::from).collect();
        let end = Instant::now() + netlink::CARRIER_WAIT;
        while !wanted.is_empty() {
            let routes = self.pod.routes().map_err(waiting())?;
            let is_local = |net: &IpNet| {
                routes
                    .iter()
                    .any(|r| r.kind == RouteKind::Local && r.destination == *net)
            };
            if wanted.iter().all(is_local) || Instant::now() >= end {
                break;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Makes the veth pair and returns the indexes of its ends, the host's first. A host link left by a dead ADD of the same
    /// attachment is replaced.
    pub(crate) fn make(&mut self, create: &Request, name: &str, plan: &Plan) -> Result<(u32, u32), KernelError> {
        let making = || format!("making the veth pair {name} and {}", plan.ifname);
        let made = match self.host.create(create.clone()) {
            Err(e) if e.errno() == Some(libc::EEXIST) && remove_link(&mut self.host, name, &plan.owner.key)? => {
                self.host.create(create.clone())
            }
            other => other,
        };
        if let Some(Link {
            index,
            peer_index: Some(peer),
            ..
        }) = made.map_err(doing(making()))?
        {
            return Ok((index, peer));
        }
        let index = |route: &mut Route, name: &str| Ok(route.need_link(name).map_err(doing(making()))?.index);
        Ok((index(&mut self.host, name)?, index(&mut self.pod, &plan.ifname)?))
    }
}

/// What the pod's link of that name needs before IPv6 addresses: some runtimes switch IPv6 off in the namespace, and a pod
/// listens to nobody's advertisements, since its routes are made for it.
pub(crate) fn prepare_v6(ends: &Ends, plan: &Plan) -> Result<(), KernelError> {
    if !plan.has_v6() {
        return Ok(());
    }
    let settings = || {
        set6(&plan.ifname, "disable_ipv6", "0")?;
        set6(&plan.ifname, "accept_ra", "0")
    };
    ends.ns
        .visit(&ends.home, settings)
        .map_err(|source| KernelError::Enter { source })?
}

/// What [`Ends::prepare`] found.
#[derive(Clone, Copy, Debug)]
pub struct Prepared {
    down_loopback: Option<u32>,
}

impl Prepared {
    /// A namespace that never had an address has no local table, and forwarding fails in it without a word.
    pub(crate) fn requests(self) -> Vec<Request> {
        self.down_loopback
            .map(|lo| Request::set_up(lo, true))
            .into_iter()
            .collect()
    }
}

pub(crate) fn permanent(link: u32, address: IpAddr, mac: Mac) -> Neighbour {
    Neighbour {
        link,
        address,
        mac: Some(mac),
        proxy: false,
        permanent: true,
    }
}

pub(crate) fn default_route(v4: bool) -> IpNet {
    if v4 {
        IpNet::V4(Ipv4Net::default())
    } else {
        IpNet::V6(Ipv6Net::default())
    }
}

/// The same without a prefix: `/32` or `/128`.
pub(crate) fn alone(net: IpNet) -> IpNet {
    IpNet::from(net.addr())
}

/// Packets for pods enter by the NIC, which therefore has to forward.
pub(crate) fn forward_from(nic: &Link) -> Result<(), KernelError> {
    if nic.forwarding == Some(true) {
        return Ok(());
    }
    set(&nic.name, "forwarding", "1")
}

/// Lets IPv6 packets that come in by these links leave by others. Kernels from 6.17 on have a setting per link for it. Before,
/// there is one for all of a namespace only, and with it a NIC that learns its routes from advertisements has to be told to
/// go on doing so.
pub(crate) fn forward_v6_from(nic: &str, link: &str) -> Result<(), KernelError> {
    const OWN: &str = "force_forwarding";
    set6(link, "disable_ipv6", "0")?;
    if sysctl::get(&format!("net/ipv6/conf/{nic}/{OWN}")).is_ok() {
        set6(nic, OWN, "1")?;
        return set6(link, OWN, "1");
    }
    if sysctl::get(&format!("net/ipv6/conf/{nic}/accept_ra")).is_ok_and(|v| v == "1") {
        set6(nic, "accept_ra", "2")?;
    }
    set6("all", "forwarding", "1")
}

/// Sets `net/ipv4/conf/<link>/<what>`.
pub(crate) fn set(link: &str, what: &str, value: &str) -> Result<(), KernelError> {
    set_in(4, link, what, value)
}

/// Sets `net/ipv6/conf/<link>/<what>`.
pub(crate) fn set6(link: &str, what: &str, value: &str) -> Result<(), KernelError> {
    set_in(6, link, what, value)
}

fn set_in(version: u8, link: &str, what: &str, value: &str) -> Result<(), KernelError> {
    let key = format!("net/ipv{version}/conf/{link}/{what}");
    sysctl::set(&key, value)
        .map(|_| ())
        .map_err(|source| KernelError::Sysctl {
            doing: format!("setting IPv{version} {what} of {link}"),
            source,
        })
}

pub(crate) fn remove_link(host: &mut Route, name: &str, key: &Key) -> Result<bool, KernelError> {
    let Some(link) = host.link(name).map_err(doing(format!("looking for {name}")))? else {
        return Ok(false);
    };
    if let Some(owner) = link.alias.as_deref().and_then(Owner::parse)
        && owner.key != *key
    {
        return Err(KernelError::Foreign {
            link: name.to_owned(),
            alias: link.alias.unwrap_or_default(),
        });
    }
    host.run(Request::delete_link(link.index))
        .map_err(doing(format!("deleting {name}")))?;
    Ok(true)
}

/// Removes the attachment's link and what a bridge still knows of the pod. Success if there is nothing.
pub fn detach(key: &Key) -> Result<bool, KernelError> {
    let mut host = Route::open().map_err(doing("opening the host's namespace"))?;
    let removed = remove_link(&mut host, &key.link_name(), key);
    steps::reached("link-deleted");
    let mac = key.mac();
    let neighbours = host.neighbours().map_err(doing("listing neighbours"))?;
    let traces: Vec<Neighbour> = neighbours
        .into_iter()
        .filter(|n| n.permanent && n.mac == Some(mac))
        .collect();
    forget(&mut host, &traces)?;
    removed
}

/// Removes the pods' routes first and the neighbours that tell of them last, so that a crash in between is no loss.
pub(crate) fn forget(host: &mut Route, neighbours: &[Neighbour]) -> Result<(), KernelError> {
    if neighbours.is_empty() {
        return Ok(());
    }
    let routes: Vec<Request> = neighbours
        .iter()
        .map(|n| Request::delete_route(&RouteEntry::via_link(IpNet::from(n.address), n.link)))
        .collect();
    host.run_all(&routes).map_err(doing("deleting routes to pods"))?;
    steps::reached("route-deleted");
    let neighbours: Vec<Request> = neighbours.iter().map(Request::delete_neighbour).collect();
    host.run_all(&neighbours)
        .map_err(doing("deleting pods from the neighbours"))?;
    steps::reached("neighbour-deleted");
    Ok(())
}

/// A pod link on the host and the addresses routed to it.
#[derive(Clone, Debug)]
pub struct Live {
    pub link: Link,
    /// Absent for a link whose ADD died before it was named.
    pub owner: Option<Owner>,
    pub addresses: Vec<IpAddr>,
}

/// Every pod link of this host, of all networks.
pub fn live() -> Result<Vec<Live>, KernelError> {
    let mut host = Route::open().map_err(doing("opening the host's namespace"))?;
    let links = host.links().map_err(doing("listing links"))?;
    let links: Vec<Link> = links
        .into_iter()
        .filter(|l| l.name.starts_with(LINK_PREFIX) && l.kind.as_deref() == Some("veth"))
        .filter(|l| l.name.len() == 14 && l.name.bytes().skip(3).all(|b| b.is_ascii_hexdigit()))
        .collect();
    if links.is_empty() {
        return Ok(Vec::new());
    }
    let routes = host.routes().map_err(doing("listing routes"))?;
    let neighbours = host.neighbours().map_err(doing("listing neighbours"))?;
    Ok(links
        .into_iter()
        .map(|link| {
            let owner = link.alias.as_deref().and_then(Owner::parse);
            let mac = owner.as_ref().map(|o| o.key.mac());
            let routed = routes
                .iter()
                .filter(|r| r.link == Some(link.index) && r.table == 254)
                .filter(|r| r.destination.prefix_len() == r.destination.max_prefix_len())
                .map(|r| r.destination.addr());
            // A pod behind a bridge is known there by its MAC.
            let bridged = neighbours
                .iter()
                .filter(|n| n.permanent && n.mac == mac && mac.is_some())
                .map(|n| n.address);
            let addresses: BTreeSet<IpAddr> = routed.chain(bridged).collect();
            Live {
                owner,
                addresses: addresses.into_iter().collect(),
                link,
            }
        })
        .collect())
}

/// Removes links in one batch; all are tried, the first error is returned.
pub fn remove(links: &[Link]) -> Result<(), KernelError> {
    if links.is_empty() {
        return Ok(());
    }
    let mut host = Route::open().map_err(doing("opening the host's namespace"))?;
    let requests: Vec<Request> = links.iter().map(|l| Request::delete_link(l.index)).collect();
    host.run_all(&requests)
        .map_err(doing("deleting the links of attachments that are gone"))?;
    steps::reached("link-deleted");
    Ok(())
}

/// The node's NIC: `name` if given, else the one with `mac`, else the default route's. `hint` is the name of the link that
/// had `mac` when the pool was learned; it saves reading all links.
pub fn master(
    host: &mut Route,
    name: Option<&str>,
    mac: Option<&str>,
    hint: Option<&str>,
) -> Result<Link, KernelError> {
    if let Some(name) = name {
        return host
            .need_link(name)
            .map_err(doing(format!("looking for master {name}")));
    }
    let mac = mac.filter(|m| *m != "*");
    if let (Some(mac), Some(hint)) = (mac, hint) {
        let found = host.link(hint).map_err(doing(format!("looking for {hint}")))?;
        if let Some(link) = found.filter(|l| has_mac(l, mac)) {
            return Ok(link);
        }
    }
    let links = host.links().map_err(doing("listing links"))?;
    if let Some(mac) = mac {
        let addresses = host.addresses().map_err(doing("listing addresses"))?;
        return nic(&links, &addresses, mac)
            .cloned()
            .ok_or_else(|| KernelError::NoMaster {
                reason: format!("none has MAC {mac}"),
            });
    }
    let routes = host.routes().map_err(doing("listing routes"))?;
    let default = routes
        .iter()
        .filter(|r| r.destination.prefix_len() == 0 && r.table == 254)
        .min_by_key(|r| (r.destination.addr().is_ipv6(), r.metric))
        .and_then(|r| r.link);
    links
        .into_iter()
        .find(|l| Some(l.index) == default)
        .ok_or_else(|| KernelError::NoMaster {
            reason: "there is no default route and `master` is not set".into(),
        })
}

fn has_mac(link: &Link, mac: &str) -> bool {
    link.mac.is_some_and(|m| netlink::format_mac(m) == mac) && !link.name.starts_with(LINK_PREFIX)
}

/// The NIC with `mac`. Several links can share one (an accelerated NIC and its virtual function): the one with an address
/// counts.
fn nic<'a>(links: &'a [Link], addresses: &[Address], mac: &str) -> Option<&'a Link> {
    let has_address = |l: &Link| {
        addresses
            .iter()
            .any(|a| a.link == l.index && !matches!(a.address, IpNet::V6(n) if n.addr().is_unicast_link_local()))
    };
    links
        .iter()
        .filter(|l| has_mac(l, mac))
        .min_by_key(|l| (!has_address(l), l.index))
}

/// The NICs of this machine by MAC address (lower case with colons): all links but the pods'.
pub fn local_nics() -> Result<BTreeMap<String, String>, KernelError> {
    let mut host = Route::open().map_err(doing("opening the host's namespace"))?;
    let links = host.links().map_err(doing("listing links"))?;
    let addresses = host.addresses().map_err(doing("listing addresses"))?;
    let macs = links
        .iter()
        .filter(|l| !l.name.starts_with(LINK_PREFIX))
        .filter_map(|l| l.mac.map(netlink::format_mac));
    Ok(macs
        .filter_map(|mac| {
            let name = nic(&links, &addresses, &mac)?.name.clone();
            Some((mac, name))
        })
        .collect())
}

/// The error of a CHECK that found `found`.
pub(crate) fn differs(what: impl Into<String>, expected: impl ToString, found: impl ToString) -> KernelError {
    KernelError::Differs {
        what: what.into(),
        expected: expected.to_string(),
        found: found.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_names_its_owner_and_always_fits() {
        for (network, id) in [("azure".to_owned(), "c".repeat(64)), ("n".repeat(400), "c".repeat(400))] {
            let key = Key("0123456789abcdef0123456789abcdef01234567".into());
            let owner = Owner {
                network: network_tag(&network),
                key,
                container_id: id,
                ifname: "eth0".into(),
            };
            let alias = owner.alias();
            assert!(alias.len() <= ALIAS_BYTES_MAX, "{}", alias.len());
            let back = Owner::parse(&alias).unwrap();
            assert_eq!((back.network, back.key), (owner.network, owner.key));
        }
        assert_eq!(Owner::parse("somebody else's"), None);
    }
}

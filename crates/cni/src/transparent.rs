//! Transparent mode: a routed veth per pod. Plans are data; [`attach`] and [`detach`] touch the kernel.
//!
//! On the host: the link `azv<11 hex>`, a /32 route to the pod and a permanent neighbour for it. In the pod: the link as
//! the runtime names it, its address as /32, and a default route through 169.254.1.1, whose permanent neighbour is the
//! host's end. Nothing is written down elsewhere: the host's link carries its owner as its alias, and routes and
//! neighbours end with it, so a crash at any step leaves at most one link that DEL or GC finds by name.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use linux::{
    netlink::{self, Address, Link, Mac, Neighbour, Request, Route, RouteEntry, Veth, VethPeer},
    netns::NetNs,
    sysctl,
};
use thiserror::Error;

use crate::pool::Key;

/// What pods see as their gateway. No machine has this address; only its neighbour entry matters.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The host's end of every pod has the same address, as the original's: it is only ever one hop away from one pod.
pub const HOST_MAC: Mac = [0xaa; 6];

const LINK_PREFIX: &str = "azv";
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
    Sysctl {
        doing: String,
        #[source]
        source: sysctl::Error,
    },
    #[error("interface {ifname} exists already in the namespace of container {container_id}")]
    Exists { ifname: String, container_id: String },
    #[error("link {link} belongs to another attachment: {alias}")]
    Foreign { link: String, alias: String },
    #[error("address {address} is not IPv4; transparent mode is IPv4 only")]
    NotIpv4 { address: IpAddr },
    #[error("no network interface of this machine fits: {reason}")]
    NoMaster { reason: String },
    #[error("{what} is missing or different: expected {expected}, found {found}")]
    Differs {
        what: String,
        expected: String,
        found: String,
    },
}

fn doing(what: impl Into<String>) -> impl FnOnce(netlink::Error) -> KernelError {
    let doing = what.into();
    move |source| KernelError::Netlink { doing, source }
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
    use sha2::{Digest, Sha256};
    if name.len() <= 100 {
        return name.to_owned();
    }
    Sha256::digest(name)
        .iter()
        .take(20)
        .map(|b| format!("{b:02x}"))
        .collect()
}

impl Owner {
    fn alias(&self) -> String {
        let short = format!("{ALIAS_WORD} {} {}", self.network, self.key.0);
        let full = format!("{short} {} {}", self.container_id, self.ifname);
        if full.len() <= ALIAS_BYTES_MAX { full } else { short }
    }

    fn parse(alias: &str) -> Option<Self> {
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
    pub addresses: Vec<Ipv4Addr>,
    pub mtu: u32,
    /// NIC of the node: packets for pods enter there.
    pub master: String,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Attached {
    pub host_link: String,
    pub host_mac: String,
    pub pod_mac: String,
}

/// Whether `ifname` is in the namespace.
pub fn pod_has_link(ns: &NetNs, ifname: &str) -> Result<bool, KernelError> {
    let looking = || format!("looking for {ifname} in the pod's namespace");
    let mut pod = Route::open_in(ns).map_err(doing(looking()))?;
    Ok(pod.link(ifname).map_err(doing(looking()))?.is_some())
}

/// Makes the attachment. A host link left by a dead ADD of the same attachment is replaced.
///
/// # Errors
/// The caller rolls back with [`detach`]; nothing else is left.
pub fn attach(ns: &NetNs, plan: &Plan) -> Result<Attached, KernelError> {
    let name = plan.owner.key.link_name();
    let mut host = Route::open().map_err(doing("opening the host's namespace"))?;
    let mut pod = Route::open_in(ns).map_err(doing("opening the pod's namespace"))?;
    remove_link(&mut host, &name, &plan.owner.key)?;

    // A namespace that never had an address has no local table, and forwarding fails in it without a word.
    let lo = pod
        .need_link("lo")
        .map_err(doing("looking for lo in the pod's namespace"))?;
    if !lo.up {
        pod.run(Request::set_up(lo.index, true))
            .map_err(doing("bringing up lo in the pod's namespace"))?;
    }

    let pod_mac = plan.owner.key.mac();
    let veth = Veth {
        name: name.clone(),
        mac: Some(HOST_MAC),
        mtu: Some(plan.mtu),
        up: true,
        peer: VethPeer {
            name: plan.ifname.clone(),
            mac: Some(pod_mac),
            mtu: Some(plan.mtu),
            netns: Some(std::os::fd::AsFd::as_fd(ns)),
        },
    };
    host.run(Request::create_veth(&veth))
        .map_err(doing(format!("making the veth pair {name} and {}", plan.ifname)))?;
    let host_index = host
        .need_link(&name)
        .map_err(doing(format!("looking for {name}")))?
        .index;
    let pod_link = pod
        .need_link(&plan.ifname)
        .map_err(doing("looking for the pod's link"))?
        .index;

    let gateway = Neighbour {
        link: pod_link,
        address: GATEWAY.into(),
        mac: Some(HOST_MAC),
        proxy: false,
        permanent: true,
    };
    let mut inside = vec![Request::set_up(pod_link, true)];
    inside.extend(plan.addresses.iter().map(|a| {
        Request::add_address(&Address {
            link: pod_link,
            address: IpNet::from(IpAddr::V4(*a)),
            no_prefix_route: false,
        })
    }));
    inside.push(Request::add_neighbour(&gateway));
    inside.push(Request::add_route(&RouteEntry::via_gateway(
        default_route(),
        pod_link,
        GATEWAY,
    )));
    pod.run_all(&inside)
        .map_err(doing(format!("configuring {} in the pod", plan.ifname)))?;

    for link in [&name, &plan.master] {
        set(link, "forwarding")?;
    }
    // Answers a pod that lost the neighbour entry of its gateway.
    set(&name, "proxy_arp")?;

    // The route comes last: traffic reaches the pod only when the pod can answer.
    let mut outside = vec![Request::set_alias(host_index, &plan.owner.alias())];
    for address in &plan.addresses {
        let address = IpAddr::V4(*address);
        outside.push(Request::add_neighbour(&Neighbour {
            link: host_index,
            address,
            mac: Some(pod_mac),
            proxy: false,
            permanent: true,
        }));
        outside.push(Request::add_route(&RouteEntry::via_link(
            IpNet::from(address),
            host_index,
        )));
    }
    host.run_all(&outside)
        .map_err(doing(format!("configuring {name} on the host")))?;

    Ok(Attached {
        host_link: name,
        host_mac: netlink::format_mac(HOST_MAC),
        pod_mac: netlink::format_mac(pod_mac),
    })
}

fn default_route() -> IpNet {
    IpNet::V4(ipnet::Ipv4Net::default())
}

fn set(link: &str, what: &str) -> Result<(), KernelError> {
    let key = format!("net/ipv4/conf/{link}/{what}");
    sysctl::set(&key, "1")
        .map(|_| ())
        .map_err(|source| KernelError::Sysctl {
            doing: format!("switching on {what} of {link}"),
            source,
        })
}

fn remove_link(host: &mut Route, name: &str, key: &Key) -> Result<bool, KernelError> {
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

/// Removes the attachment's link, and with it routes, neighbours and the pod's end. Success if there is none.
pub fn detach(key: &Key) -> Result<bool, KernelError> {
    let mut host = Route::open().map_err(doing("opening the host's namespace"))?;
    remove_link(&mut host, &key.link_name(), key)
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
    Ok(links
        .into_iter()
        .map(|link| Live {
            owner: link.alias.as_deref().and_then(Owner::parse),
            addresses: routes
                .iter()
                .filter(|r| r.link == Some(link.index) && r.table == 254)
                .filter(|r| r.destination.prefix_len() == r.destination.max_prefix_len())
                .map(|r| r.destination.addr())
                .collect(),
            link,
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
        .map_err(doing("deleting the links of attachments that are gone"))
}

/// The node's NIC: `name` if given, else the one with `mac`, else the default route's.
pub fn master(name: Option<&str>, mac: Option<&str>) -> Result<Link, KernelError> {
    let mut host = Route::open().map_err(doing("opening the host's namespace"))?;
    if let Some(name) = name {
        return host
            .need_link(name)
            .map_err(doing(format!("looking for master {name}")));
    }
    let links = host.links().map_err(doing("listing links"))?;
    if let Some(mac) = mac.filter(|m| *m != "*") {
        // Several links can share a MAC (an accelerated NIC and its virtual function): the one with an address counts.
        let addresses = host.addresses().map_err(doing("listing addresses"))?;
        let has_address = |l: &Link| {
            addresses
                .iter()
                .any(|a| a.link == l.index && a.address.addr().is_ipv4())
        };
        return links
            .into_iter()
            .filter(|l| l.mac.is_some_and(|m| netlink::format_mac(m) == mac) && !l.name.starts_with(LINK_PREFIX))
            .min_by_key(|l| (!has_address(l), l.index))
            .ok_or_else(|| KernelError::NoMaster {
                reason: format!("none has MAC {mac}"),
            });
    }
    let routes = host.routes().map_err(doing("listing routes"))?;
    let default = routes
        .iter()
        .filter(|r| r.destination == default_route() && r.table == 254)
        .min_by_key(|r| r.metric)
        .and_then(|r| r.link);
    links
        .into_iter()
        .find(|l| Some(l.index) == default)
        .ok_or_else(|| KernelError::NoMaster {
            reason: "there is no default route and `master` is not set".into(),
        })
}

/// MAC addresses of all links but the pods', lower case with colons.
pub fn local_macs() -> Result<Vec<String>, KernelError> {
    let mut host = Route::open().map_err(doing("opening the host's namespace"))?;
    let links = host.links().map_err(doing("listing links"))?;
    Ok(links
        .into_iter()
        .filter(|l| !l.name.starts_with(LINK_PREFIX))
        .filter_map(|l| l.mac.map(netlink::format_mac))
        .collect())
}

/// Compares the kernel with what the plan would make; the first difference is the error.
pub fn check(ns: &NetNs, owner: &Owner, ifname: &str, addresses: &[Ipv4Addr]) -> Result<(), KernelError> {
    fn differs(what: impl Into<String>, expected: impl ToString, found: impl ToString) -> KernelError {
        KernelError::Differs {
            what: what.into(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
    let name = owner.key.link_name();
    let mut host = Route::open().map_err(doing("opening the host's namespace"))?;
    let mut pod = Route::open_in(ns).map_err(doing("opening the pod's namespace"))?;
    let reading = || "reading the kernel's tables".to_owned();

    let outer = host.link(&name).map_err(doing(reading()))?;
    let outer = outer.ok_or_else(|| differs(format!("host link {name}"), "a veth", "nothing"))?;
    let inner = pod.link(ifname).map_err(doing(reading()))?;
    let inner = inner.ok_or_else(|| differs(format!("pod link {ifname}"), "a veth", "nothing"))?;
    for (link, mac) in [(&outer, HOST_MAC), (&inner, owner.key.mac())] {
        if !link.up {
            return Err(differs(format!("state of {}", link.name), "up", "down"));
        }
        if link.mac != Some(mac) {
            let found = link.mac.map(netlink::format_mac).unwrap_or_default();
            return Err(differs(
                format!("MAC of {}", link.name),
                netlink::format_mac(mac),
                found,
            ));
        }
    }
    if inner.peer_index != Some(outer.index) {
        return Err(differs(format!("other end of {ifname}"), &name, "another link"));
    }
    let found_alias = outer.alias.clone().unwrap_or_default();
    if Owner::parse(&found_alias).is_none_or(|o| o.key != owner.key) {
        return Err(differs(format!("owner of {name}"), owner.alias(), found_alias));
    }

    let host_routes = host.routes().map_err(doing(reading()))?;
    let pod_addresses = pod.addresses().map_err(doing(reading()))?;
    for address in addresses {
        let net = IpNet::from(IpAddr::V4(*address));
        if !pod_addresses
            .iter()
            .any(|a| a.link == inner.index && a.address.addr() == net.addr())
        {
            return Err(differs(format!("address of {ifname}"), net, "none such"));
        }
        if !host_routes
            .iter()
            .any(|r| r.destination == net && r.link == Some(outer.index))
        {
            return Err(differs("route on the host", format!("{net} dev {name}"), "none such"));
        }
    }
    let default = default_route();
    let pod_routes = pod.routes().map_err(doing(reading()))?;
    if !pod_routes
        .iter()
        .any(|r| r.destination == default && r.gateway == Some(GATEWAY.into()) && r.link == Some(inner.index))
    {
        return Err(differs(
            "route in the pod",
            format!("default via {GATEWAY} dev {ifname}"),
            "none such",
        ));
    }
    let neighbours = pod.neighbours().map_err(doing(reading()))?;
    if !neighbours
        .iter()
        .any(|n| n.link == inner.index && n.address == GATEWAY && n.mac == Some(HOST_MAC))
    {
        return Err(differs(
            "neighbour in the pod",
            format!("{GATEWAY} at {}", netlink::format_mac(HOST_MAC)),
            "none such",
        ));
    }
    Ok(())
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

//! The routing socket: sends [`Request`]s, many in one datagram, and lists links, addresses, routes and neighbours.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::types::{Address, BridgePort, Forwarding, Link, Neighbour, RouteEntry, RoutingRule};
use super::wire::{self, NLMSG_ERROR, fra, ifa, ifla, nda, rta, rtm};
use super::{Attributes, Error, Frame, Request, Socket, attributes, error_of, u16_at, u32_at};
use crate::netns::{self, NetNs};

/// Requests per datagram: their acknowledgements must fit the default receive buffer.
const BATCH: usize = 64;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_ECHO: u16 = 8;
const NLM_F_DUMP: u16 = 0x300;
/// How long [`Route::settle`] waits.
pub const CARRIER_WAIT: std::time::Duration = std::time::Duration::from_millis(500);

/// A blocking routing socket of one network namespace. Keep it: opening costs more than a request.
pub struct Route {
    socket: Socket,
}

impl Route {
    /// Opens a socket in the calling thread's namespace.
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            socket: Socket::open(netlink_sys::protocols::NETLINK_ROUTE)?.strict()?,
        })
    }

    /// Opens a socket in `ns`; it stays there.
    pub fn open_in(ns: &NetNs) -> Result<Self, Error> {
        ns.run(Self::open).map_err(|e| Error::Open {
            source: io::Error::other(e),
        })?
    }

    /// As [`Route::open_in`], for programs of one thread: see [`NetNs::visit`].
    pub fn visit(ns: &NetNs, home: &NetNs) -> Result<Self, Error> {
        ns.visit(home, Self::open).map_err(|e| Error::Open {
            source: io::Error::other(e),
        })?
    }

    /// The namespace this socket lives in.
    pub fn netns(&self) -> Result<NetNs, netns::Error> {
        NetNs::of_socket(&self.socket.inner)
    }

    /// Sends one request and waits for its answer.
    pub fn run(&mut self, request: Request) -> Result<(), Error> {
        self.run_all(&[request])
    }

    /// Sends all requests in order, many per datagram. Later ones are tried even if an earlier one fails; the first
    /// error is returned.
    pub fn run_all(&mut self, requests: &[Request]) -> Result<(), Error> {
        let mut first_error = None;
        for chunk in requests.chunks(BATCH) {
            for result in self.run_chunk(chunk, 0, |_| {})? {
                if let Err(e) = result {
                    first_error.get_or_insert(e);
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Like [`Route::run_all`], but returns the result of every request.
    pub fn run_each(&mut self, requests: &[Request]) -> Result<Vec<Result<(), Error>>, Error> {
        let mut all = Vec::with_capacity(requests.len());
        for chunk in requests.chunks(BATCH) {
            all.extend(self.run_chunk(chunk, 0, |_| {})?);
        }
        Ok(all)
    }

    /// Makes a link and returns it as it was made. Kernels before 6.2 do not tell it in their answer; then it is `None`.
    pub fn create(&mut self, request: Request) -> Result<Option<Link>, Error> {
        let mut made = None;
        let results = self.run_chunk(&[request], NLM_F_ECHO, |frame| {
            if frame.kind == rtm::NEWLINK {
                made = link(frame.payload);
            }
        })?;
        results.into_iter().collect::<Result<Vec<()>, Error>>()?;
        Ok(made)
    }

    fn run_chunk(
        &mut self,
        requests: &[Request],
        flags: u16,
        mut told: impl FnMut(&Frame<'_>),
    ) -> Result<Vec<Result<(), Error>>, Error> {
        let Some(head) = requests.first() else {
            return Ok(Vec::new());
        };
        let first = self.socket.take_sequences(requests.len() as u32);
        let mut bytes = Vec::new();
        for (request, sequence) in requests.iter().zip(first..) {
            request.encode(sequence, flags, &mut bytes);
        }
        self.socket.send(&bytes, &head.what)?;
        let mut results: Vec<Option<Result<(), Error>>> = requests.iter().map(|_| None).collect();
        let mut missing = requests.len();
        while missing > 0 {
            self.socket.receive(true, &head.what, |frame| {
                let at = frame.sequence.wrapping_sub(first) as usize;
                if at >= requests.len() || results[at].is_some() {
                    return Ok(());
                }
                if frame.kind != NLMSG_ERROR {
                    told(&frame);
                    return Ok(());
                }
                let request = &requests[at];
                let refused = error_of(&frame, &request.what)
                    .filter(|e| e.errno().is_none_or(|n| !request.tolerated.contains(&n)));
                results[at] = Some(refused.map_or(Ok(()), Err));
                missing -= 1;
                Ok(())
            })?;
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// Every link, by index.
    pub fn links(&mut self) -> Result<Vec<Link>, Error> {
        let mut get = Attributes(vec![0; 16]);
        get.number(ifla::EXT_MASK, wire::RTEXT_FILTER_SKIP_STATS);
        let mut links = self.list(rtm::GETLINK, get, rtm::NEWLINK, "list links", link)?;
        links.sort_by_key(|l| l.index);
        Ok(links)
    }

    /// One link by name.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, Error> {
        Ok(self.links_named(&[name])?.pop().flatten())
    }

    /// Links by name, as many results as names, in one exchange.
    pub fn links_named(&mut self, names: &[&str]) -> Result<Vec<Option<Link>>, Error> {
        let what = || format!("look up link {}", names.join(", "));
        let first = self.socket.take_sequences(names.len() as u32);
        let mut bytes = Vec::new();
        for (name, sequence) in names.iter().zip(first..) {
            let mut get = Attributes(vec![0; 16]);
            get.text(ifla::IFNAME, name);
            get.number(ifla::EXT_MASK, wire::RTEXT_FILTER_SKIP_STATS);
            wire::message(rtm::GETLINK, NLM_F_REQUEST | NLM_F_ACK, sequence, &get.0, &mut bytes);
        }
        self.exchange(&bytes, first, names.len(), &what)
    }

    /// Sends `count` questions for links, numbered from `first`; `None` where there is no such link.
    fn exchange(
        &mut self,
        questions: &[u8],
        first: u32,
        count: usize,
        what: &dyn Fn() -> String,
    ) -> Result<Vec<Option<Link>>, Error> {
        self.socket.send(questions, &what())?;
        let mut found: Vec<Option<Link>> = (0..count).map(|_| None).collect();
        let (mut missing, mut failed) = (count, None);
        while missing > 0 {
            self.socket.receive(true, "look up links", |frame| {
                let at = frame.sequence.wrapping_sub(first) as usize;
                if at >= count {
                    return Ok(());
                }
                match frame.kind {
                    NLMSG_ERROR => {
                        missing -= 1;
                        let refused = error_of(&frame, &what()).filter(|e| e.errno() != Some(libc::ENODEV));
                        failed = failed.take().or(refused);
                    }
                    rtm::NEWLINK => {
                        found[at] = Some(link(frame.payload).ok_or_else(|| Error::Malformed { what: what() })?);
                    }
                    _ => {}
                }
                Ok(())
            })?;
        }
        failed.map_or(Ok(found), Err)
    }

    /// Waits until a link of a pair that was just set up carries packets, at most [`CARRIER_WAIT`]; returns whether it does.
    /// The end that went up first drops what it is given until the kernel's link watch has run. From Linux 6.7 on to ask for
    /// the link lets it run; earlier ones are asked again.
    pub fn settle(&mut self, name: &str) -> Result<bool, Error> {
        let end = std::time::Instant::now() + CARRIER_WAIT;
        while !self.need_link(name)?.carries {
            if std::time::Instant::now() >= end {
                return Ok(false);
            }
            std::thread::park_timeout(std::time::Duration::from_millis(1));
        }
        Ok(true)
    }

    /// As [`Route::settle`], for several links by index.
    pub fn settle_all(&mut self, links: &[u32]) -> Result<bool, Error> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(20);
        let mut rest = links.to_vec();
        loop {
            let what = || format!("look at links {rest:?}");
            let mut requests = Vec::new();
            let first = self.socket.take_sequences(rest.len() as u32);
            for (index, sequence) in rest.iter().zip(first..) {
                let mut get = Attributes(vec![0; 16]);
                get.0[4..8].copy_from_slice(&index.to_ne_bytes());
                get.number(ifla::EXT_MASK, wire::RTEXT_FILTER_SKIP_STATS);
                wire::message(rtm::GETLINK, NLM_F_REQUEST | NLM_F_ACK, sequence, &get.0, &mut requests);
            }
            let found = self.exchange(&requests, first, rest.len(), &what)?;
            rest.retain(|index| !found.iter().flatten().any(|l| l.index == *index && l.carries));
            if rest.is_empty() || start.elapsed() > CARRIER_WAIT {
                return Ok(rest.is_empty());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
    }

    /// One link by name, or [`Error::NoLink`].
    pub fn need_link(&mut self, name: &str) -> Result<Link, Error> {
        self.link(name)?.ok_or_else(|| Error::NoLink { name: name.to_owned() })
    }

    /// Every address, IPv4 and IPv6, sorted.
    pub fn addresses(&mut self) -> Result<Vec<Address>, Error> {
        let get = Attributes(vec![0; 8]);
        let mut all = self.list(rtm::GETADDR, get, rtm::NEWADDR, "list addresses", address)?;
        all.sort();
        Ok(all)
    }

    /// Every unicast, local and blackhole-like route of all tables, IPv4 and IPv6, sorted; multipath routes are left out.
    pub fn routes(&mut self) -> Result<Vec<RouteEntry>, Error> {
        let get = Attributes(vec![0; 12]);
        let mut all = self.list(rtm::GETROUTE, get, rtm::NEWROUTE, "list routes", route)?;
        all.sort();
        Ok(all)
    }

    /// Routing rules that choose a table by incoming link, mark or nothing, IPv4 and IPv6, sorted; others are left out.
    pub fn rules(&mut self) -> Result<Vec<RoutingRule>, Error> {
        let get = Attributes(vec![0; 12]);
        let mut all = self.list(rtm::GETRULE, get, rtm::NEWRULE, "list routing rules", rule)?;
        all.sort();
        Ok(all)
    }

    /// Neighbours and proxy entries, IPv4 and IPv6, sorted.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>, Error> {
        let mut all = Vec::new();
        for flags in [0, wire::NTF_PROXY] {
            let mut get = Attributes(vec![0; 12]);
            get.0[10] = flags;
            all.extend(self.list(rtm::GETNEIGH, get, rtm::NEWNEIGH, "list neighbours", neighbour)?);
        }
        all.sort();
        all.dedup();
        Ok(all)
    }

    /// Permanent forwarding entries of VXLAN devices, sorted.
    pub fn forwardings(&mut self) -> Result<Vec<Forwarding>, Error> {
        let mut get = Attributes(vec![0; 12]);
        get.0[0] = wire::AF_BRIDGE;
        let mut all = self.list(rtm::GETNEIGH, get, rtm::NEWNEIGH, "list forwarding entries", forwarding)?;
        all.sort();
        Ok(all)
    }

    fn list<T>(
        &mut self,
        get: u16,
        body: Attributes,
        listed: u16,
        what: &str,
        pick: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let request = |sequence| {
            let mut bytes = Vec::new();
            wire::message(get, NLM_F_REQUEST | NLM_F_DUMP, sequence, &body.0, &mut bytes);
            bytes
        };
        self.socket.dump(request, what, |frame| {
            Ok((frame.kind == listed).then(|| pick(frame.payload)).flatten())
        })
    }
}

fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

fn number(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|b| u32::from_ne_bytes(*b))
}

/// Of either family, by the length.
fn ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
        _ => None,
    }
}

/// `struct ifinfomsg` and attributes.
fn link(payload: &[u8]) -> Option<Link> {
    let (header, rest) = payload.split_at_checked(16)?;
    let mut out = Link {
        index: u32_at(header, 4),
        name: String::new(),
        mac: None,
        mtu: 0,
        up: u32_at(header, 8) & wire::IFF_UP != 0,
        carries: false,
        kind: None,
        peer_index: None,
        alias: None,
        group: 0,
        master: None,
        port: None,
        forwarding: None,
    };
    for (kind, value) in attributes(rest) {
        match kind {
            ifla::IFNAME => out.name = text(value),
            ifla::ADDRESS => out.mac = value.try_into().ok(),
            ifla::MTU => out.mtu = number(value)?,
            // IF_OPER_UP of RFC 2863.
            ifla::OPERSTATE => out.carries = value.first() == Some(&6),
            ifla::LINK => out.peer_index = number(value),
            ifla::IFALIAS => out.alias = Some(text(value)),
            ifla::GROUP => out.group = number(value)?,
            ifla::MASTER => out.master = number(value),
            ifla::LINKINFO => {
                let get = |wanted| attributes(value).find(|(k, _)| *k == wanted).map(|(_, v)| v);
                out.kind = get(ifla::INFO_KIND).map(text);
                if get(ifla::INFO_SLAVE_KIND).map(text).as_deref() == Some("bridge") {
                    out.port = get(ifla::INFO_SLAVE_DATA).map(bridge_port);
                }
            }
            ifla::AF_SPEC => out.forwarding = ipv4_forwarding(value),
            _ => {}
        }
    }
    Some(out)
}

fn bridge_port(facts: &[u8]) -> BridgePort {
    let is = |wanted| attributes(facts).any(|(k, v)| k == wanted && v.first().is_some_and(|b| *b != 0));
    BridgePort {
        hairpin: is(ifla::BRPORT_MODE),
        isolated: is(ifla::BRPORT_ISOLATED),
    }
}

/// The IPv4 setting, out of what all families tell: an array of numbers in the order of their ids.
fn ipv4_forwarding(families: &[u8]) -> Option<bool> {
    let inet = attributes(families).find(|(k, _)| *k == u16::from(wire::AF_INET))?.1;
    let values = attributes(inet).find(|(k, _)| *k == ifla::INET_CONF)?.1;
    let at = 4 * (usize::from(wire::DEVCONF_FORWARDING) - 1);
    Some(number(values.get(at..)?)? != 0)
}

/// `struct ifaddrmsg` and attributes.
fn address(payload: &[u8]) -> Option<Address> {
    let (header, rest) = payload.split_at_checked(8)?;
    let (mut local, mut other, mut flags) = (None, None, 0);
    for (kind, value) in attributes(rest) {
        match kind {
            ifa::LOCAL => local = ip(value),
            ifa::ADDRESS => other = ip(value),
            ifa::FLAGS => flags = number(value)?,
            _ => {}
        }
    }
    Some(Address {
        link: u32_at(header, 4),
        address: IpNet::new(local.or(other)?, header[1]).ok()?,
        no_prefix_route: flags & wire::IFA_F_NOPREFIXROUTE != 0,
    })
}

/// `struct rtmsg` and attributes.
fn route(payload: &[u8]) -> Option<RouteEntry> {
    const RTNH_F_ONLINK: u32 = 4;
    let (header, rest) = payload.split_at_checked(12)?;
    let kind = wire::route_kind(header[7])?;
    let any = match header[0] {
        wire::AF_INET => IpAddr::from([0; 4]),
        wire::AF_INET6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let (mut destination, mut link, mut gateway, mut source) = (any, None, None, None);
    let (mut metric, mut table) = (0, u32::from(header[4]));
    for (kind, value) in attributes(rest) {
        match kind {
            rta::DST => destination = ip(value)?,
            rta::OIF => link = number(value),
            rta::GATEWAY => gateway = ip(value),
            rta::PREFSRC => source = ip(value),
            rta::PRIORITY => metric = number(value)?,
            rta::TABLE => table = number(value)?,
            rta::MULTIPATH => return None,
            _ => {}
        }
    }
    Some(RouteEntry {
        destination: IpNet::new(destination, header[1]).ok()?,
        kind,
        link,
        gateway,
        onlink: u32_at(header, 8) & RTNH_F_ONLINK != 0,
        source,
        metric,
        table,
        protocol: header[5],
    })
}

/// `struct fib_rule_hdr` and attributes; `None` for rules that ask for more or do something else.
fn rule(payload: &[u8]) -> Option<RoutingRule> {
    const TO_TABLE: u8 = 1;
    let (header, rest) = payload.split_at_checked(12)?;
    if header[7] != TO_TABLE || !matches!(header[0], wire::AF_INET | wire::AF_INET6) {
        return None;
    }
    let mut out = RoutingRule {
        v6: header[0] == wire::AF_INET6,
        priority: 0,
        iif: None,
        mark: None,
        table: u32::from(header[4]),
    };
    // The kernel tells neither where a rule does not look at marks, and a value of 0 never.
    let (mut value, mut mask) = (0, 0);
    for (kind, v) in attributes(rest) {
        match kind {
            fra::PRIORITY => out.priority = number(v)?,
            fra::IIFNAME => out.iif = Some(text(v)),
            fra::TABLE => out.table = number(v)?,
            fra::FWMARK => value = number(v)?,
            fra::FWMASK => mask = number(v)?,
            fra::DST | fra::SRC => return None,
            _ => {}
        }
    }
    out.mark = (mask != 0).then_some((value, mask));
    Some(out)
}

/// `struct ndmsg` and attributes, of the bridge family.
fn forwarding(payload: &[u8]) -> Option<Forwarding> {
    let (header, rest) = payload.split_at_checked(12)?;
    let get = |wanted| attributes(rest).find(|(k, _)| *k == wanted).map(|(_, v)| v);
    (u16_at(header, 8) == wire::NUD_PERMANENT).then_some(Forwarding {
        link: u32_at(header, 4),
        mac: get(nda::LLADDR)?.try_into().ok()?,
        to: <[u8; 4]>::try_from(get(nda::DST)?).ok()?.into(),
    })
}

/// `struct ndmsg` and attributes.
fn neighbour(payload: &[u8]) -> Option<Neighbour> {
    let (header, rest) = payload.split_at_checked(12)?;
    let get = |wanted| attributes(rest).find(|(k, _)| *k == wanted).map(|(_, v)| v);
    Some(Neighbour {
        link: u32_at(header, 4),
        address: ip(get(nda::DST)?)?,
        mac: get(nda::LLADDR).and_then(|m| m.try_into().ok()),
        proxy: header[10] & wire::NTF_PROXY != 0,
        permanent: u16_at(header, 8) == wire::NUD_PERMANENT,
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Ipv4Conf, RouteKind, Veth, VethPeer, Vxlan};
    use super::*;
    use crate::netns;
    use std::net::Ipv4Addr;
    use std::path::Path;

    fn in_private_host(test: impl FnOnce() + Send + 'static) {
        let host = move || {
            netns::become_private_host(&[Path::new("/run")]).unwrap();
            test();
        };
        std::thread::spawn(host).join().unwrap();
    }

    #[test]
    fn a_veth_is_born_in_its_namespace_with_addresses_and_routes() {
        in_private_host(|| {
            let ns = netns::create_named(Path::new("/run/n/b")).unwrap();
            let mut here = Route::open().unwrap();
            let mut there = Route::open_in(&ns).unwrap();
            let veth = Veth {
                name: "a0".into(),
                mac: Some([2, 0, 0, 0, 0, 1]),
                mtu: Some(1400),
                up: true,
                peer: VethPeer {
                    name: "eth0".into(),
                    mac: Some([2, 0, 0, 0, 0, 2]),
                    mtu: Some(1400),
                    netns: Some(std::os::fd::AsFd::as_fd(&ns)),
                },
            };
            let made = here.create(Request::create_veth(&veth).in_group(7)).unwrap();
            let refused = here.run(Request::create_veth(&veth)).unwrap_err();
            assert_eq!(refused.errno(), Some(libc::EEXIST), "{refused:?}");
            let index = here.need_link("a0").unwrap().index;
            here.run(Request::set_alias(index, "first")).unwrap();
            let a = here.need_link("a0").unwrap();
            let born = there.need_link("eth0").unwrap();
            assert!(!born.up);
            if let Some(made) = made {
                let told = (made.name.as_str(), made.index, made.peer_index, made.group);
                assert_eq!(told, ("a0", index, Some(born.index), 7));
            }
            let forward = Ipv4Conf {
                forwarding: Some(true),
                proxy_arp: Some(true),
            };
            assert_eq!(here.need_link("a0").unwrap().forwarding, Some(false));
            here.run(Request::change_link(index).ipv4_conf(forward)).unwrap();
            assert_eq!(here.need_link("a0").unwrap().forwarding, Some(true));
            for key in ["forwarding", "proxy_arp"] {
                let key = format!("net/ipv4/conf/a0/{key}");
                assert_eq!(crate::sysctl::get(&key).unwrap(), "1");
            }
            there.run(Request::set_up(born.index, true)).unwrap();
            assert!(here.settle_all(&[index]).unwrap() && there.settle_all(&[born.index]).unwrap());
            assert!(here.settle("a0").unwrap());
            let b = there.need_link("eth0").unwrap();
            assert_eq!(
                (a.mac, a.mtu, a.up, a.alias.as_deref()),
                (veth.mac, 1400, true, Some("first"))
            );
            assert_eq!(
                (b.mac, b.mtu, b.up, b.peer_index),
                (veth.peer.mac, 1400, true, Some(a.index))
            );
            assert_eq!(a.kind.as_deref(), Some("veth"));
            assert!(here.link("eth0").unwrap().is_none());
            let both = here.links_named(&["eth0", "a0", "lo"]).unwrap();
            assert_eq!(
                both.iter().map(Option::is_some).collect::<Vec<_>>(),
                [false, true, true]
            );

            let address = Address {
                link: b.index,
                address: "10.1.0.4/24".parse().unwrap(),
                no_prefix_route: true,
            };
            let gateway = Neighbour {
                link: b.index,
                address: "10.1.0.1".parse().unwrap(),
                mac: Some([2, 0, 0, 0, 0, 1]),
                proxy: false,
                permanent: true,
            };
            let any: IpNet = "0.0.0.0/0".parse().unwrap();
            let route = RouteEntry::via_gateway(any, b.index, gateway.address).with_source(address.address.addr());
            let requests = [
                Request::add_address(&address),
                Request::add_neighbour(&gateway),
                Request::add_route(&route),
                Request::add_route(&RouteEntry::special(
                    "10.9.0.0/16".parse::<IpNet>().unwrap(),
                    RouteKind::Blackhole,
                )),
            ];
            there.run_all(&requests).unwrap();
            there.run_all(&requests).unwrap(); // again: nothing changes
            assert!(there.addresses().unwrap().contains(&address));
            assert!(there.neighbours().unwrap().contains(&gateway));
            let routes = there.routes().unwrap();
            assert!(routes.contains(&route), "{routes:#?}");
            assert!(routes.iter().any(|r| r.kind == RouteKind::Blackhole));
            let bad = there.run(Request::add_route(&RouteEntry::via_link(
                "10.2.0.0/24".parse::<IpNet>().unwrap(),
                99,
            )));
            assert_eq!(bad.unwrap_err().errno(), Some(libc::ENODEV));

            there
                .run_all(&[
                    Request::delete_route(&route),
                    Request::delete_route(&route),
                    Request::delete_neighbour(&gateway),
                    Request::delete_neighbour(&gateway),
                    Request::delete_address(&address),
                    Request::delete_address(&address),
                ])
                .unwrap();
            here.run_all(&[Request::delete_link(a.index), Request::delete_link_named("a0")])
                .unwrap();
            assert!(there.link("eth0").unwrap().is_none());
        });
    }

    #[test]
    fn a_bridge_its_ports_and_a_policy_rule() {
        in_private_host(|| {
            let mut route = Route::open().unwrap();
            let mac = [2, 0, 0, 0, 0, 9];
            route.run(Request::create_bridge("br0", mac, Some(1400))).unwrap();
            let bridge = route.need_link("br0").unwrap();
            assert_eq!(
                (bridge.kind.as_deref(), bridge.mac, bridge.up),
                (Some("bridge"), Some(mac), true)
            );
            let end = |name: &str| VethPeer {
                name: name.into(),
                mac: None,
                mtu: None,
                netns: None,
            };
            let veth = Veth {
                name: "p0".into(),
                mac: None,
                mtu: None,
                up: true,
                peer: end("p1"),
            };
            route.run(Request::create_veth(&veth).on_bridge(bridge.index)).unwrap();
            let port = route.need_link("p0").unwrap();
            assert_eq!(port.master, Some(bridge.index));
            let wanted = BridgePort {
                hairpin: true,
                isolated: true,
            };
            route.run(Request::set_bridge_port(port.index, wanted)).unwrap();
            assert_eq!(route.need_link("p0").unwrap().port, Some(wanted));
            assert_eq!(
                route.need_link("br0").unwrap().mac,
                Some(mac),
                "a port's MAC is not taken over"
            );
            for v6 in [false, true] {
                for (iif, mark) in [
                    (Some("br0".to_owned()), Some((0, 0x10))),
                    (Some("br0".to_owned()), None),
                    (None, Some((7, u32::MAX))),
                ] {
                    let rule = RoutingRule {
                        v6,
                        priority: 100,
                        iif,
                        mark,
                        table: 4242,
                    };
                    let found = |route: &mut Route| {
                        let rules = route.rules().unwrap();
                        rules.into_iter().filter(|r| r.priority == 100).collect::<Vec<_>>()
                    };
                    for _ in 0..2 {
                        route.run(Request::add_rule(&rule)).unwrap();
                    }
                    assert_eq!(found(&mut route), std::slice::from_ref(&rule));
                    for _ in 0..2 {
                        route.run(Request::delete_rule(&rule)).unwrap();
                    }
                    assert!(found(&mut route).is_empty());
                }
            }
        });
    }

    #[test]
    fn a_vxlan_device_with_forwarding_entries() {
        in_private_host(|| {
            let ns = netns::create_named(Path::new("/run/n/v")).unwrap();
            let mut here = Route::open().unwrap();
            let mut there = Route::open_in(&ns).unwrap();
            let vxlan = Vxlan {
                name: "vx".into(),
                mac: Some([2, 0, 0, 0, 0, 7]),
                mtu: Some(1450),
                vni: 77,
                local: Ipv4Addr::LOCALHOST,
                port: 4789,
                netns: Some(std::os::fd::AsFd::as_fd(&ns)),
            };
            here.run(Request::create_vxlan(&vxlan)).unwrap();
            assert!(here.link("vx").unwrap().is_none(), "it was born elsewhere");
            let born = there.need_link("vx").unwrap();
            assert_eq!(
                (born.mtu, born.mac, born.kind.as_deref()),
                (1450, vxlan.mac, Some("vxlan"))
            );
            let entry = Forwarding {
                link: born.index,
                mac: [2, 0, 0, 0, 0, 8],
                to: Ipv4Addr::new(192, 0, 2, 8),
            };
            for _ in 0..2 {
                there.run(Request::add_forwarding(&entry)).unwrap();
            }
            assert_eq!(there.forwardings().unwrap(), [entry]);
            for _ in 0..2 {
                there.run(Request::delete_forwarding(&entry)).unwrap();
            }
            assert_eq!(there.forwardings().unwrap(), []);
        });
    }

    #[test]
    fn many_requests_fit_many_datagrams() {
        in_private_host(|| {
            let mut route = Route::open().unwrap();
            let requests: Vec<Request> = (0..500u32)
                .map(|i| {
                    let host = IpAddr::from([10, 3, (i >> 8) as u8, i as u8]);
                    Request::add_route(&RouteEntry::special(IpNet::from(host), RouteKind::Unreachable))
                })
                .collect();
            route.run_all(&requests).unwrap();
            let made = route
                .routes()
                .unwrap()
                .iter()
                .filter(|r| r.kind == RouteKind::Unreachable)
                .count();
            assert!(made >= 500, "{made}");
        });
    }
}

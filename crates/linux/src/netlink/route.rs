//! The routing socket: sends [`Request`]s, many in one datagram, and lists links, addresses, routes and neighbours.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_ERROR, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{InfoBridgePort, InfoPortData, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};

use super::types::{Address, BridgePort, Forwarding, Link, Neighbour, PolicyRule, RouteEntry, RouteKind, RoutingRule};
use super::{Error, Frame, Request, Socket, error_of};
use crate::netns::NetNs;

/// Requests per datagram: their acknowledgements must fit the default receive buffer.
const BATCH: usize = 64;

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

    /// Sends one request and waits for its answer.
    pub fn run(&mut self, request: Request) -> Result<(), Error> {
        self.run_all(&[request])
    }

    /// Sends all requests in order, many per datagram. Later ones are tried even if an earlier one fails; the first
    /// error is returned.
    pub fn run_all(&mut self, requests: &[Request]) -> Result<(), Error> {
        let mut first_error = None;
        for chunk in requests.chunks(BATCH) {
            for result in self.run_chunk(chunk)? {
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
            all.extend(self.run_chunk(chunk)?);
        }
        Ok(all)
    }

    fn run_chunk(&mut self, requests: &[Request]) -> Result<Vec<Result<(), Error>>, Error> {
        let Some(head) = requests.first() else {
            return Ok(Vec::new());
        };
        let first = self.socket.take_sequences(requests.len() as u32);
        let mut bytes = Vec::new();
        for (request, sequence) in requests.iter().zip(first..) {
            request.encode(sequence, &mut bytes);
        }
        self.socket.send(&bytes, &head.what)?;
        let mut results: Vec<Option<Result<(), Error>>> = requests.iter().map(|_| None).collect();
        let mut missing = requests.len();
        while missing > 0 {
            self.socket.receive(true, &head.what, |frame| {
                let at = frame.sequence.wrapping_sub(first) as usize;
                if frame.kind != NLMSG_ERROR || at >= requests.len() || results[at].is_some() {
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
        let mut links = self.list(Message::GetLink(LinkMessage::default()), "list links", |m| match m {
            Message::NewLink(m) => Some(link(m)),
            _ => None,
        })?;
        links.sort_by_key(|l| l.index);
        Ok(links)
    }

    /// One link by name.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, Error> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let what = format!("look up link {name}");
        let sequence = self.socket.take_sequences(1);
        self.socket.send(
            &encode(Message::GetLink(message), NLM_F_REQUEST | NLM_F_ACK, sequence),
            &what,
        )?;
        let (mut found, mut done, mut failed) = (None, false, None);
        while !done {
            self.socket.receive(true, &what, |frame| {
                if frame.sequence != sequence {
                } else if frame.kind == NLMSG_ERROR {
                    done = true;
                    failed = error_of(&frame, &what);
                } else if let Message::NewLink(m) = decode(&frame, &what)? {
                    found = Some(link(m));
                }
                Ok(())
            })?;
        }
        match failed {
            Some(e) if e.errno() == Some(libc::ENODEV) => Ok(None),
            Some(e) => Err(e),
            None => Ok(found),
        }
    }

    /// One link by name, or [`Error::NoLink`].
    pub fn need_link(&mut self, name: &str) -> Result<Link, Error> {
        self.link(name)?.ok_or_else(|| Error::NoLink { name: name.to_owned() })
    }

    /// Every address, IPv4 and IPv6, sorted.
    pub fn addresses(&mut self) -> Result<Vec<Address>, Error> {
        let mut all = self.list(
            Message::GetAddress(AddressMessage::default()),
            "list addresses",
            |m| match m {
                Message::NewAddress(m) => address(&m),
                _ => None,
            },
        )?;
        all.sort();
        Ok(all)
    }

    /// Every unicast, local and blackhole-like route of all tables, IPv4 and IPv6, sorted; multipath routes are left out.
    pub fn routes(&mut self) -> Result<Vec<RouteEntry>, Error> {
        let mut all = self.list(Message::GetRoute(RouteMessage::default()), "list routes", |m| match m {
            Message::NewRoute(m) => route(&m),
            _ => None,
        })?;
        all.sort();
        Ok(all)
    }

    /// IPv4 routing rules by mark, sorted; others are left out.
    pub fn rules(&mut self) -> Result<Vec<RoutingRule>, Error> {
        let mut get = RuleMessage::default();
        get.header.family = AddressFamily::Inet;
        let mut all = self.list(Message::GetRule(get), "list routing rules", |m| match m {
            Message::NewRule(m) => rule(&m),
            _ => None,
        })?;
        all.sort();
        Ok(all)
    }

    /// Neighbours and proxy entries, IPv4 and IPv6, sorted.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>, Error> {
        let mut all = Vec::new();
        for flags in [NeighbourFlags::empty(), NeighbourFlags::Proxy] {
            let mut message = NeighbourMessage::default();
            message.header.flags = flags;
            all.extend(
                self.list(Message::GetNeighbour(message), "list neighbours", |m| match m {
                    Message::NewNeighbour(m) => neighbour(&m),
                    _ => None,
                })?,
            );
        }
        all.sort();
        all.dedup();
        Ok(all)
    }

    /// Permanent forwarding entries of VXLAN devices, sorted.
    pub fn forwardings(&mut self) -> Result<Vec<Forwarding>, Error> {
        let mut get = NeighbourMessage::default();
        get.header.family = AddressFamily::Bridge;
        let mut all = self.list(Message::GetNeighbour(get), "list forwarding entries", |m| match m {
            Message::NewNeighbour(m) => forwarding(&m),
            _ => None,
        })?;
        all.sort();
        Ok(all)
    }

    /// IPv4 policy rules that choose a table by the incoming link, sorted; others are left out.
    pub fn policy_rules(&mut self) -> Result<Vec<PolicyRule>, Error> {
        let mut get = RuleMessage::default();
        get.header.family = AddressFamily::Inet;
        let mut all = self.list(Message::GetRule(get), "list policy rules", |m| match m {
            Message::NewRule(m) => policy_rule(&m),
            _ => None,
        })?;
        all.sort();
        Ok(all)
    }

    fn list<T>(&mut self, get: Message, what: &str, pick: impl Fn(Message) -> Option<T>) -> Result<Vec<T>, Error> {
        self.socket.dump(
            |sequence| encode(get.clone(), NLM_F_REQUEST | NLM_F_DUMP, sequence),
            what,
            |frame| Ok(pick(decode(frame, what)?)),
        )
    }
}

fn encode(message: Message, flags: u16, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn decode(frame: &Frame<'_>, what: &str) -> Result<Message, Error> {
    let mut header = NetlinkHeader::default();
    header.message_type = frame.kind;
    Message::deserialize(&header, frame.payload).map_err(|_| Error::Malformed { what: what.to_owned() })
}

fn link(m: LinkMessage) -> Link {
    let mut out = Link {
        index: m.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: m.header.flags.contains(LinkFlags::Up),
        kind: None,
        peer_index: None,
        alias: None,
        group: 0,
        master: None,
        port: None,
    };
    for attribute in m.attributes {
        match attribute {
            LinkAttribute::IfName(name) => out.name = name,
            LinkAttribute::Address(mac) => out.mac = mac.try_into().ok(),
            LinkAttribute::Mtu(mtu) => out.mtu = mtu,
            LinkAttribute::Link(peer) => out.peer_index = Some(peer),
            LinkAttribute::IfAlias(alias) => out.alias = Some(alias),
            LinkAttribute::Group(group) => out.group = group,
            LinkAttribute::Controller(index) => out.master = Some(index),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => out.kind = Some(kind.to_string()),
                        LinkInfo::PortData(InfoPortData::BridgePort(facts)) => out.port = Some(bridge_port(&facts)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    out
}

fn bridge_port(facts: &[InfoBridgePort]) -> BridgePort {
    let mut out = BridgePort::default();
    for fact in facts {
        match fact {
            InfoBridgePort::HairpinMode(on) => out.hairpin = *on,
            InfoBridgePort::Isolated(on) => out.isolated = *on,
            _ => {}
        }
    }
    out
}

fn address(m: &AddressMessage) -> Option<Address> {
    let (mut local, mut other, mut flags) = (None, None, AddressFlags::empty());
    for attribute in &m.attributes {
        match attribute {
            AddressAttribute::Local(a) => local = Some(*a),
            AddressAttribute::Address(a) => other = Some(*a),
            AddressAttribute::Flags(f) => flags = *f,
            _ => {}
        }
    }
    Some(Address {
        link: m.header.index,
        address: IpNet::new(local.or(other)?, m.header.prefix_len).ok()?,
        no_prefix_route: flags.contains(AddressFlags::Noprefixroute),
    })
}

fn route(m: &RouteMessage) -> Option<RouteEntry> {
    let kind = match m.header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Local => RouteKind::Local,
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::Prohibit => RouteKind::Prohibit,
        RouteType::Throw => RouteKind::Throw,
        _ => return None,
    };
    let any = match m.header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let (mut destination, mut link, mut gateway, mut source) = (any, None, None, None);
    let (mut metric, mut table) = (0, u32::from(m.header.table));
    for attribute in &m.attributes {
        match attribute {
            RouteAttribute::Destination(a) => destination = ip(a)?,
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Gateway(a) => gateway = ip(a),
            RouteAttribute::PrefSource(a) => source = ip(a),
            RouteAttribute::Priority(p) => metric = *p,
            RouteAttribute::Table(t) => table = *t,
            RouteAttribute::MultiPath(_) => return None,
            _ => {}
        }
    }
    Some(RouteEntry {
        destination: IpNet::new(destination, m.header.destination_prefix_length).ok()?,
        kind,
        link,
        gateway,
        onlink: m.header.flags.contains(RouteFlags::Onlink),
        source,
        metric,
        table,
        protocol: m.header.protocol.into(),
    })
}

fn policy_rule(m: &RuleMessage) -> Option<PolicyRule> {
    let (mut priority, mut iif, mut table) = (0, None, u32::from(m.header.table));
    let (mut value, mut mask) = (0, 0);
    for attribute in &m.attributes {
        match attribute {
            RuleAttribute::Priority(p) => priority = *p,
            RuleAttribute::Iifname(name) => iif = Some(name.clone()),
            RuleAttribute::Table(t) => table = *t,
            RuleAttribute::FwMark(v) => value = *v,
            RuleAttribute::FwMask(m) => mask = *m,
            _ => {}
        }
    }
    Some(PolicyRule {
        priority,
        iif: iif?,
        mark: (mask != 0).then_some((value, mask)),
        table,
    })
}

fn rule(m: &RuleMessage) -> Option<RoutingRule> {
    let (mut priority, mut mark, mut mask, mut table) = (0, None, u32::MAX, u32::from(m.header.table));
    for attribute in &m.attributes {
        match attribute {
            RuleAttribute::Priority(p) => priority = *p,
            RuleAttribute::FwMark(v) => mark = Some(*v),
            RuleAttribute::FwMask(v) => mask = *v,
            RuleAttribute::Table(t) => table = *t,
            _ => {}
        }
    }
    Some(RoutingRule {
        priority,
        mark: mark?,
        mask,
        table,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some(IpAddr::V4(*a)),
        RouteAddress::Inet6(a) => Some(IpAddr::V6(*a)),
        _ => None,
    }
}

fn forwarding(m: &NeighbourMessage) -> Option<Forwarding> {
    let (mut to, mut mac) = (None, None);
    for attribute in &m.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => to = Some(*a),
            // The family is the bridges', so the crate does not know the address for one.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                to = <[u8; 4]>::try_from(bytes.as_slice()).ok().map(Ipv4Addr::from);
            }
            NeighbourAttribute::LinkLayerAddress(m) => mac = m.clone().try_into().ok(),
            _ => {}
        }
    }
    (m.header.state == NeighbourState::Permanent).then_some(Forwarding {
        link: m.header.ifindex,
        mac: mac?,
        to: to?,
    })
}

fn neighbour(m: &NeighbourMessage) -> Option<Neighbour> {
    let (mut at, mut mac) = (None, None);
    for attribute in &m.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => at = Some(IpAddr::V4(*a)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => at = Some(IpAddr::V6(*a)),
            NeighbourAttribute::LinkLayerAddress(m) => mac = m.clone().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour {
        link: m.header.ifindex,
        address: at?,
        mac,
        proxy: m.header.flags.contains(NeighbourFlags::Proxy),
        permanent: m.header.state == NeighbourState::Permanent,
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Veth, VethPeer, Vxlan};
    use super::*;
    use crate::netns;
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
            here.run(Request::create_veth(&veth).in_group(7)).unwrap();
            let refused = here.run(Request::create_veth(&veth)).unwrap_err();
            assert_eq!(refused.errno(), Some(libc::EEXIST), "{refused:?}");
            let index = here.need_link("a0").unwrap().index;
            here.run(Request::set_alias(index, "first")).unwrap();
            let a = here.need_link("a0").unwrap();
            let born = there.need_link("eth0").unwrap();
            assert!(!born.up);
            there.run(Request::set_up(born.index, true)).unwrap();
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
            let rule = PolicyRule {
                priority: 100,
                iif: "br0".into(),
                mark: Some((0, 0x10)),
                table: 4242,
            };
            for _ in 0..2 {
                route.run(Request::add_policy_rule(&rule)).unwrap();
            }
            assert_eq!(route.policy_rules().unwrap(), [rule.clone()]);
            for _ in 0..2 {
                route.run(Request::delete_policy_rule(&rule)).unwrap();
            }
            assert!(route.policy_rules().unwrap().is_empty());
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

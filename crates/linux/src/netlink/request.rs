//! One change each, ready to be sent alone or many in one datagram.
//!
//! # Source
//! `linux/rtnetlink.h`, `if_link.h`, `if_addr.h`, `neighbour.h`, `fib_rules.h` of Linux 6.12; the numbers are ABI.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;

use super::Attributes;
use super::types::{
    Address, BridgePort, Forwarding, Ipv4Conf, Mac, Neighbour, RouteEntry, RouteKind, RoutingRule, Veth, VethPeer,
    Vxlan,
};
use super::wire::{self, fra, ifa, ifla, nda, rta, rtm};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;

/// A change to the kernel's routing state. Additions replace what is there with the same key; deletions succeed if the
/// thing is not there. Only link creation refuses an existing name.
#[derive(Clone, Debug)]
pub struct Request {
    kind: u16,
    flags: u16,
    /// Fixed header and attributes.
    body: Vec<u8>,
    /// For error texts.
    pub(super) what: String,
    /// Error numbers that mean "already so".
    pub(super) tolerated: &'static [i32],
}

impl Request {
    fn new(kind: u16, flags: u16, body: Attributes, what: String) -> Self {
        Self {
            kind,
            flags,
            body: body.0,
            what,
            tolerated: &[],
        }
    }

    fn tolerating(self, tolerated: &'static [i32]) -> Self {
        Self { tolerated, ..self }
    }

    /// Encodes with a sequence number, acknowledgement asked for.
    pub(super) fn encode(&self, sequence: u32, more_flags: u16, out: &mut Vec<u8>) {
        let flags = NLM_F_REQUEST | NLM_F_ACK | self.flags | more_flags;
        wire::message(self.kind, flags, sequence, &self.body, out);
    }

    /// More attributes for a request about a link; no effect on other requests.
    fn with(self, fill: impl FnOnce(&mut Attributes)) -> Self {
        if self.kind != rtm::NEWLINK {
            return self;
        }
        let mut body = Attributes(self.body);
        fill(&mut body);
        Self { body: body.0, ..self }
    }

    /// Makes a veth pair; `EEXIST` if either name is taken.
    pub fn create_veth(veth: &Veth<'_>) -> Self {
        let VethPeer { name, mac, mtu, netns } = &veth.peer;
        let mut link = link_message(0, Some(veth.up));
        link.text(ifla::IFNAME, &veth.name);
        hardware(&mut link, veth.mac, veth.mtu);
        one_queue(&mut link);
        link.nest(ifla::LINKINFO, |info| {
            info.text(ifla::INFO_KIND, "veth").nest(ifla::INFO_DATA, |data| {
                data.nest(ifla::VETH_INFO_PEER, |peer| {
                    peer.0.extend(link_message(0, None).0);
                    peer.text(ifla::IFNAME, name);
                    hardware(peer, *mac, *mtu);
                    one_queue(peer);
                    in_netns(peer, *netns);
                });
            });
        });
        let what = format!("make veth {} - {name}", veth.name);
        Self::new(rtm::NEWLINK, NLM_F_CREATE | NLM_F_EXCL, link, what)
    }

    /// Puts the link that a creation makes into a group, for [`Request::delete_group`]; no effect on other requests.
    pub fn in_group(self, group: u32) -> Self {
        self.with(|link| {
            link.number(ifla::GROUP, group);
        })
    }

    /// Makes the link that a creation makes a port of a bridge; no effect on other requests.
    pub fn on_bridge(self, bridge: u32) -> Self {
        self.with(|link| {
            link.number(ifla::MASTER, bridge);
        })
    }

    /// Makes a bridge, up, with a MAC of its own: left alone it would take over that of one of its ports. It has no
    /// multicast snooping, since frames for groups go to every port anyway where nobody asks for groups.
    pub fn create_bridge(name: &str, mac: Mac, mtu: Option<u32>) -> Self {
        let mut link = link_message(0, Some(true));
        link.text(ifla::IFNAME, name);
        hardware(&mut link, Some(mac), mtu);
        link.nest(ifla::LINKINFO, |info| {
            info.text(ifla::INFO_KIND, "bridge").nest(ifla::INFO_DATA, |data| {
                data.u8(ifla::BR_MCAST_SNOOPING, 0);
            });
        });
        Self::new(
            rtm::NEWLINK,
            NLM_F_CREATE | NLM_F_EXCL,
            link,
            format!("make bridge {name}"),
        )
    }

    /// Makes a VXLAN device without learning; its forwarding entries are set one by one.
    pub fn create_vxlan(vxlan: &Vxlan<'_>) -> Self {
        let mut link = link_message(0, None);
        link.text(ifla::IFNAME, &vxlan.name);
        hardware(&mut link, vxlan.mac, vxlan.mtu);
        in_netns(&mut link, vxlan.netns);
        link.nest(ifla::LINKINFO, |info| {
            info.text(ifla::INFO_KIND, "vxlan").nest(ifla::INFO_DATA, |data| {
                data.number(ifla::VXLAN_ID, vxlan.vni)
                    .bytes(ifla::VXLAN_LOCAL, &vxlan.local.octets())
                    .bytes(ifla::VXLAN_PORT, &vxlan.port.to_be_bytes())
                    .u8(ifla::VXLAN_LEARNING, 0);
            });
        });
        Self::new(
            rtm::NEWLINK,
            NLM_F_CREATE | NLM_F_EXCL,
            link,
            format!("make vxlan {}", vxlan.name),
        )
    }

    /// A change of a link that is there, without any part yet: see [`Request::alias`], [`Request::bridge_port`],
    /// [`Request::ipv4_conf`].
    pub fn change_link(link: u32) -> Self {
        Self::new(rtm::NEWLINK, 0, link_message(link, None), format!("change link {link}"))
    }

    /// Adds free text that stays with the link to a [`Request::change_link`].
    pub fn alias(self, alias: &str) -> Self {
        self.with(|link| {
            link.bytes(ifla::IFALIAS, alias.as_bytes());
        })
    }

    /// Adds what a bridge does with the link to a [`Request::change_link`]; the link must be its port already.
    pub fn bridge_port(self, port: BridgePort) -> Self {
        self.with(|link| {
            link.nest(ifla::LINKINFO, |info| {
                info.text(ifla::INFO_SLAVE_KIND, "bridge")
                    .nest(ifla::INFO_SLAVE_DATA, |data| {
                        data.u8(ifla::BRPORT_MODE, port.hairpin.into())
                            .u8(ifla::BRPORT_ISOLATED, port.isolated.into());
                    });
            });
        })
    }

    /// Adds IPv4 settings to a [`Request::change_link`]: the same as the link's files below `net/ipv4/conf`, without
    /// opening any of them. A NIC that merges segments (LRO) keeps merging, unlike after a write to its `forwarding`.
    pub fn ipv4_conf(self, conf: Ipv4Conf) -> Self {
        self.with(|link| {
            link.nest(ifla::AF_SPEC, |families| {
                families.nest(wire::AF_INET.into(), |inet| {
                    inet.nest(ifla::INET_CONF, |values| {
                        for (id, value) in [
                            (wire::DEVCONF_FORWARDING, conf.forwarding),
                            (wire::DEVCONF_PROXY_ARP, conf.proxy_arp),
                        ] {
                            if let Some(on) = value {
                                values.number(id, on.into());
                            }
                        }
                    });
                });
            });
        })
    }

    /// The link must be a bridge's port already.
    pub fn set_bridge_port(link: u32, port: BridgePort) -> Self {
        let what = format!("set how the bridge treats link {link}");
        Self {
            what,
            ..Self::change_link(link).bridge_port(port)
        }
    }

    pub fn set_up(link: u32, up: bool) -> Self {
        let what = format!("set link {link} {}", if up { "up" } else { "down" });
        Self::new(rtm::SETLINK, 0, link_message(link, Some(up)), what)
    }

    pub fn set_mtu(link: u32, mtu: u32) -> Self {
        let what = format!("set the MTU of link {link} to {mtu}");
        Self::link_attribute(link, ifla::MTU, &mtu.to_ne_bytes(), what)
    }

    pub fn set_mac(link: u32, mac: Mac) -> Self {
        let what = format!("set the MAC of link {link} to {}", super::format_mac(mac));
        Self::link_attribute(link, ifla::ADDRESS, &mac, what)
    }

    /// The link must be down.
    pub fn rename(link: u32, name: &str) -> Self {
        let with_end: Vec<u8> = name.bytes().chain([0]).collect();
        Self::link_attribute(link, ifla::IFNAME, &with_end, format!("rename link {link} to {name}"))
    }

    /// Free text that stays with the link.
    pub fn set_alias(link: u32, alias: &str) -> Self {
        let what = format!("set the alias of link {link}");
        Self::link_attribute(link, ifla::IFALIAS, alias.as_bytes(), what)
    }

    /// Puts the link into a group, so that [`Request::delete_group`] can end many at once.
    pub fn set_group(link: u32, group: u32) -> Self {
        let what = format!("set the group of link {link} to {group}");
        Self::link_attribute(link, ifla::GROUP, &group.to_ne_bytes(), what)
    }

    pub fn move_to(link: u32, netns: BorrowedFd<'_>) -> Self {
        let what = format!("move link {link} to another network namespace");
        let mut message = link_message(link, None);
        in_netns(&mut message, Some(netns));
        Self::new(rtm::SETLINK, 0, message, what)
    }

    fn link_attribute(link: u32, kind: u16, value: &[u8], what: String) -> Self {
        let mut message = link_message(link, None);
        message.bytes(kind, value);
        Self::new(rtm::SETLINK, 0, message, what)
    }

    pub fn delete_link(link: u32) -> Self {
        let what = format!("delete link {link}");
        Self::new(rtm::DELLINK, 0, link_message(link, None), what).tolerating(&[libc::ENODEV])
    }

    pub fn delete_link_named(name: &str) -> Self {
        let mut message = link_message(0, None);
        message.text(ifla::IFNAME, name);
        Self::new(rtm::DELLINK, 0, message, format!("delete link {name}")).tolerating(&[libc::ENODEV])
    }

    /// Deletes every link of `group` with one wait for the kernel's grace period instead of one per link.
    pub fn delete_group(group: u32) -> Self {
        let mut message = link_message(0, None);
        message.number(ifla::GROUP, group);
        Self::new(rtm::DELLINK, 0, message, format!("delete link group {group}")).tolerating(&[libc::ENODEV])
    }

    pub fn add_address(address: &Address) -> Self {
        let what = format!("add address {} to link {}", address.address, address.link);
        Self::new(
            rtm::NEWADDR,
            NLM_F_CREATE | NLM_F_REPLACE,
            address_message(address),
            what,
        )
    }

    pub fn delete_address(address: &Address) -> Self {
        let what = format!("delete address {} of link {}", address.address, address.link);
        Self::new(rtm::DELADDR, 0, address_message(address), what).tolerating(&[libc::EADDRNOTAVAIL, libc::ENODEV])
    }

    pub fn add_route(route: &RouteEntry) -> Self {
        let what = format!("add route to {}", route.destination);
        Self::new(rtm::NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, route_message(route), what)
    }

    pub fn delete_route(route: &RouteEntry) -> Self {
        let what = format!("delete route to {}", route.destination);
        Self::new(rtm::DELROUTE, 0, route_message(route), what).tolerating(&[libc::ESRCH, libc::ENODEV])
    }

    /// Also succeeds if the rule is there.
    pub fn add_rule(rule: &RoutingRule) -> Self {
        // Without EXCL the kernel would keep the same rule many times.
        Self::new(
            rtm::NEWRULE,
            NLM_F_CREATE | NLM_F_EXCL,
            rule_message(rule),
            format!("add {rule}"),
        )
        .tolerating(&[libc::EEXIST])
    }

    pub fn delete_rule(rule: &RoutingRule) -> Self {
        Self::new(rtm::DELRULE, 0, rule_message(rule), format!("delete {rule}")).tolerating(&[libc::ENOENT])
    }

    pub fn add_neighbour(neighbour: &Neighbour) -> Self {
        let what = format!("add neighbour {} on link {}", neighbour.address, neighbour.link);
        Self::new(
            rtm::NEWNEIGH,
            NLM_F_CREATE | NLM_F_REPLACE,
            neighbour_message(neighbour),
            what,
        )
    }

    pub fn delete_neighbour(neighbour: &Neighbour) -> Self {
        let what = format!("delete neighbour {} of link {}", neighbour.address, neighbour.link);
        Self::new(rtm::DELNEIGH, 0, neighbour_message(neighbour), what).tolerating(&[libc::ENOENT, libc::ENODEV])
    }

    pub fn add_forwarding(forwarding: &Forwarding) -> Self {
        let what = format!("lead frames on link {} to {}", forwarding.link, forwarding.to);
        Self::new(
            rtm::NEWNEIGH,
            NLM_F_CREATE | NLM_F_REPLACE,
            forwarding_message(forwarding),
            what,
        )
    }

    pub fn delete_forwarding(forwarding: &Forwarding) -> Self {
        let what = format!("lead no frames on link {} to {}", forwarding.link, forwarding.to);
        Self::new(rtm::DELNEIGH, 0, forwarding_message(forwarding), what).tolerating(&[libc::ENOENT, libc::ENODEV])
    }
}

/// `struct ifinfomsg`; `up` sets or clears that flag alone.
fn link_message(index: u32, up: Option<bool>) -> Attributes {
    let flags = u32::from(up == Some(true)) * wire::IFF_UP;
    let change = u32::from(up.is_some()) * wire::IFF_UP;
    let mut out = Vec::with_capacity(192);
    out.extend([0; 4]);
    for part in [index, flags, change] {
        out.extend(part.to_ne_bytes());
    }
    Attributes(out)
}

fn hardware(link: &mut Attributes, mac: Option<Mac>, mtu: Option<u32>) {
    if let Some(mac) = mac {
        link.bytes(ifla::ADDRESS, &mac);
    }
    if let Some(mtu) = mtu {
        link.number(ifla::MTU, mtu);
    }
}

/// A veth has one queue each way unless asked for more; but not asked at all, the kernel makes one per processor, takes
/// all but one out of use and waits for a grace period, at both ends and with every other change of a link waiting too.
fn one_queue(veth: &mut Attributes) {
    veth.number(ifla::NUM_TX_QUEUES, 1).number(ifla::NUM_RX_QUEUES, 1);
}

fn in_netns(link: &mut Attributes, netns: Option<BorrowedFd<'_>>) {
    if let Some(netns) = netns {
        link.bytes(ifla::NET_NS_FD, &netns.as_raw_fd().to_ne_bytes());
    }
}

/// An address attribute in the family's length.
fn put(out: &mut Attributes, kind: u16, address: IpAddr) {
    match address {
        IpAddr::V4(a) => out.bytes(kind, &a.octets()),
        IpAddr::V6(a) => out.bytes(kind, &a.octets()),
    };
}

/// `struct ifaddrmsg`.
fn address_message(address: &Address) -> Attributes {
    const SCOPE_HOST: u8 = 254;
    let ip = address.address.addr();
    let scope = if ip.is_loopback() { SCOPE_HOST } else { 0 };
    let mut out = Attributes(vec![wire::family(ip), address.address.prefix_len(), 0, scope]);
    out.0.extend(address.link.to_ne_bytes());
    put(&mut out, ifa::LOCAL, ip);
    put(&mut out, ifa::ADDRESS, ip);
    let mut flags = 0;
    if address.no_prefix_route {
        flags |= wire::IFA_F_NOPREFIXROUTE;
    }
    // Whoever sets an address of IPv6 here knows that nobody else has it; it is usable at once.
    if ip.is_ipv6() {
        flags |= wire::IFA_F_NODAD;
    }
    if flags != 0 {
        out.number(ifa::FLAGS, flags);
    }
    out
}

/// `struct rtmsg`.
fn route_message(route: &RouteEntry) -> Attributes {
    const SCOPE_UNIVERSE: u8 = 0;
    const SCOPE_LINK: u8 = 253;
    const SCOPE_HOST: u8 = 254;
    const RTNH_F_ONLINK: u32 = 4;
    let destination = route.destination;
    let scope = match route.kind {
        RouteKind::Unicast if route.gateway.is_none() && destination.addr().is_ipv4() => SCOPE_LINK,
        RouteKind::Local => SCOPE_HOST,
        _ => SCOPE_UNIVERSE,
    };
    let mut out = Attributes(vec![
        wire::family(destination.addr()),
        destination.prefix_len(),
        0,
        0,
        // Tables above 255 stand in the attribute only.
        u8::try_from(route.table).unwrap_or(0),
        route.protocol,
        scope,
        wire::route_type(route.kind),
    ]);
    out.0.extend((u32::from(route.onlink) * RTNH_F_ONLINK).to_ne_bytes());
    out.number(rta::TABLE, route.table);
    if destination.prefix_len() > 0 {
        put(&mut out, rta::DST, IpNet::network(&destination));
    }
    if let Some(link) = route.link {
        out.number(rta::OIF, link);
    }
    if let Some(gateway) = route.gateway {
        put(&mut out, rta::GATEWAY, gateway);
    }
    if let Some(source) = route.source {
        put(&mut out, rta::PREFSRC, source);
    }
    if route.metric != 0 {
        out.number(rta::PRIORITY, route.metric);
    }
    out
}

/// `struct fib_rule_hdr`.
fn rule_message(rule: &RoutingRule) -> Attributes {
    const TO_TABLE: u8 = 1;
    let family = if rule.v6 { wire::AF_INET6 } else { wire::AF_INET };
    let mut out = Attributes(vec![family, 0, 0, 0]);
    out.0
        .extend([u8::try_from(rule.table).unwrap_or(0), 0, 0, TO_TABLE, 0, 0, 0, 0]);
    out.number(fra::PRIORITY, rule.priority);
    if let Some(iif) = &rule.iif {
        out.text(fra::IIFNAME, iif);
    }
    if let Some((value, mask)) = rule.mark {
        out.number(fra::FWMARK, value).number(fra::FWMASK, mask);
    }
    out.number(fra::TABLE, rule.table);
    out
}

/// `struct ndmsg`.
fn neighbour_header(family: u8, link: u32, flags: u8) -> Attributes {
    let mut out = Attributes(vec![family, 0, 0, 0]);
    out.0.extend(link.to_ne_bytes());
    out.0.extend(wire::NUD_PERMANENT.to_ne_bytes());
    out.0.extend([flags, 0]);
    out
}

fn neighbour_message(neighbour: &Neighbour) -> Attributes {
    let flags = if neighbour.proxy { wire::NTF_PROXY } else { 0 };
    let mut out = neighbour_header(wire::family(neighbour.address), neighbour.link, flags);
    put(&mut out, nda::DST, neighbour.address);
    if let Some(mac) = neighbour.mac {
        out.bytes(nda::LLADDR, &mac);
    }
    out
}

/// A forwarding entry is a neighbour of the bridge family that the device itself keeps.
fn forwarding_message(forwarding: &Forwarding) -> Attributes {
    let mut out = neighbour_header(wire::AF_BRIDGE, forwarding.link, wire::NTF_SELF);
    out.bytes(nda::LLADDR, &forwarding.mac)
        .bytes(nda::DST, &forwarding.to.octets());
    out
}

//! One change each, ready to be sent alone or many in one datagram.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth, InfoVxlan, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};

use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

use super::types::{
    Address, BridgePort, Forwarding, Mac, Neighbour, PolicyRule, RouteEntry, RouteKind, RoutingRule, Veth, VethPeer,
    Vxlan,
};

/// A change to the kernel's routing state. Additions replace what is there with the same key; deletions succeed if the
/// thing is not there. Only link creation refuses an existing name.
#[derive(Clone, Debug)]
pub struct Request {
    message: Message,
    flags: u16,
    /// For error texts.
    pub(super) what: String,
    /// Error numbers that mean "already so".
    pub(super) tolerated: &'static [i32],
}

impl Request {
    fn new(message: Message, flags: u16, what: String) -> Self {
        Self {
            message,
            flags,
            what,
            tolerated: &[],
        }
    }

    fn tolerating(self, tolerated: &'static [i32]) -> Self {
        Self { tolerated, ..self }
    }

    /// Encodes with a sequence number, acknowledgement asked for.
    pub(super) fn encode(&self, sequence: u32, out: &mut Vec<u8>) {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | self.flags;
        header.sequence_number = sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(self.message.clone()));
        message.finalize();
        let start = out.len();
        out.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut out[start..]);
    }

    /// Makes a veth pair; `EEXIST` if either name is taken.
    pub fn create_veth(veth: &Veth<'_>) -> Self {
        let VethPeer { name, mac, mtu, netns } = &veth.peer;
        let mut peer = link_message(0);
        peer.attributes.push(LinkAttribute::IfName(name.clone()));
        peer.attributes.extend(hardware(*mac, *mtu));
        peer.attributes
            .extend(netns.map(|ns| LinkAttribute::NetNsFd(ns.as_raw_fd())));
        let mut link = link_message(0);
        set_flag(&mut link, veth.up);
        link.attributes.push(LinkAttribute::IfName(veth.name.clone()));
        link.attributes.extend(hardware(veth.mac, veth.mtu));
        link.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        Self::new(
            Message::NewLink(link),
            NLM_F_CREATE | NLM_F_EXCL,
            format!("make veth {} - {name}", veth.name),
        )
    }

    /// Puts the link that a creation makes into a group, for [`Request::delete_group`]; no effect on other requests.
    pub fn in_group(mut self, group: u32) -> Self {
        if let Message::NewLink(link) = &mut self.message {
            link.attributes.push(LinkAttribute::Group(group));
        }
        self
    }

    /// Makes the link that a creation makes a port of a bridge; no effect on other requests.
    pub fn on_bridge(mut self, bridge: u32) -> Self {
        if let Message::NewLink(link) = &mut self.message {
            link.attributes.push(LinkAttribute::Controller(bridge));
        }
        self
    }

    /// Makes a bridge, up, with a MAC of its own: left alone it would take over that of one of its ports. It has no
    /// multicast snooping, since frames for groups go to every port anyway where nobody asks for groups.
    pub fn create_bridge(name: &str, mac: Mac, mtu: Option<u32>) -> Self {
        let mut link = link_message(0);
        set_flag(&mut link, true);
        link.attributes.push(LinkAttribute::IfName(name.to_owned()));
        link.attributes.extend(hardware(Some(mac), mtu));
        link.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Bridge),
            LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::MulticastSnooping(false)])),
        ]));
        Self::new(
            Message::NewLink(link),
            NLM_F_CREATE | NLM_F_EXCL,
            format!("make bridge {name}"),
        )
    }

    /// The link must be a bridge's port already.
    pub fn set_bridge_port(link: u32, port: BridgePort) -> Self {
        let mut message = link_message(link);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![
                InfoBridgePort::HairpinMode(port.hairpin),
                InfoBridgePort::Isolated(port.isolated),
            ])),
        ]));
        Self::new(
            Message::NewLink(message),
            0,
            format!("set how the bridge treats link {link}"),
        )
    }

    /// Makes a VXLAN device without learning; its forwarding entries are set one by one.
    pub fn create_vxlan(vxlan: &Vxlan<'_>) -> Self {
        let mut link = link_message(0);
        link.attributes.push(LinkAttribute::IfName(vxlan.name.clone()));
        link.attributes.extend(hardware(vxlan.mac, vxlan.mtu));
        link.attributes
            .extend(vxlan.netns.map(|ns| LinkAttribute::NetNsFd(ns.as_raw_fd())));
        link.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![
                InfoVxlan::Id(vxlan.vni),
                InfoVxlan::Local(vxlan.local),
                InfoVxlan::Port(vxlan.port),
                InfoVxlan::Learning(false),
            ])),
        ]));
        Self::new(
            Message::NewLink(link),
            NLM_F_CREATE | NLM_F_EXCL,
            format!("make vxlan {}", vxlan.name),
        )
    }

    pub fn set_up(link: u32, up: bool) -> Self {
        let mut message = link_message(link);
        message.header.change_mask = LinkFlags::Up;
        set_flag(&mut message, up);
        Self::new(
            Message::SetLink(message),
            0,
            format!("set link {link} {}", if up { "up" } else { "down" }),
        )
    }

    pub fn set_mtu(link: u32, mtu: u32) -> Self {
        Self::link_attribute(
            link,
            LinkAttribute::Mtu(mtu),
            format!("set the MTU of link {link} to {mtu}"),
        )
    }

    pub fn set_mac(link: u32, mac: Mac) -> Self {
        let what = format!("set the MAC of link {link} to {}", super::format_mac(mac));
        Self::link_attribute(link, LinkAttribute::Address(mac.to_vec()), what)
    }

    /// The link must be down.
    pub fn rename(link: u32, name: &str) -> Self {
        Self::link_attribute(
            link,
            LinkAttribute::IfName(name.to_owned()),
            format!("rename link {link} to {name}"),
        )
    }

    /// Free text that stays with the link.
    pub fn set_alias(link: u32, alias: &str) -> Self {
        Self::link_attribute(
            link,
            LinkAttribute::IfAlias(alias.to_owned()),
            format!("set the alias of link {link}"),
        )
    }

    /// Puts the link into a group, so that [`Request::delete_group`] can end many at once.
    pub fn set_group(link: u32, group: u32) -> Self {
        Self::link_attribute(
            link,
            LinkAttribute::Group(group),
            format!("set the group of link {link} to {group}"),
        )
    }

    pub fn move_to(link: u32, netns: BorrowedFd<'_>) -> Self {
        let what = format!("move link {link} to another network namespace");
        Self::link_attribute(link, LinkAttribute::NetNsFd(netns.as_raw_fd()), what)
    }

    fn link_attribute(link: u32, attribute: LinkAttribute, what: String) -> Self {
        let mut message = link_message(link);
        message.attributes.push(attribute);
        Self::new(Message::SetLink(message), 0, what)
    }

    pub fn delete_link(link: u32) -> Self {
        Self::new(Message::DelLink(link_message(link)), 0, format!("delete link {link}")).tolerating(&[libc::ENODEV])
    }

    pub fn delete_link_named(name: &str) -> Self {
        let mut message = link_message(0);
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        Self::new(Message::DelLink(message), 0, format!("delete link {name}")).tolerating(&[libc::ENODEV])
    }

    /// Deletes every link of `group` with one wait for the kernel's grace period instead of one per link.
    pub fn delete_group(group: u32) -> Self {
        let mut message = link_message(0);
        message.attributes.push(LinkAttribute::Group(group));
        Self::new(Message::DelLink(message), 0, format!("delete link group {group}")).tolerating(&[libc::ENODEV])
    }

    pub fn add_address(address: &Address) -> Self {
        let what = format!("add address {} to link {}", address.address, address.link);
        Self::new(
            Message::NewAddress(address_message(address)),
            NLM_F_CREATE | NLM_F_REPLACE,
            what,
        )
    }

    pub fn delete_address(address: &Address) -> Self {
        let what = format!("delete address {} of link {}", address.address, address.link);
        Self::new(Message::DelAddress(address_message(address)), 0, what)
            .tolerating(&[libc::EADDRNOTAVAIL, libc::ENODEV])
    }

    pub fn add_route(route: &RouteEntry) -> Self {
        let what = format!("add route to {}", route.destination);
        Self::new(
            Message::NewRoute(route_message(route)),
            NLM_F_CREATE | NLM_F_REPLACE,
            what,
        )
    }

    pub fn delete_route(route: &RouteEntry) -> Self {
        let what = format!("delete route to {}", route.destination);
        Self::new(Message::DelRoute(route_message(route)), 0, what).tolerating(&[libc::ESRCH, libc::ENODEV])
    }

    pub fn add_policy_rule(rule: &PolicyRule) -> Self {
        let what = format!("add policy rule for packets from {}", rule.iif);
        // Without EXCL the kernel would keep the same rule many times.
        Self::new(Message::NewRule(policy_rule(rule)), NLM_F_CREATE | NLM_F_EXCL, what).tolerating(&[libc::EEXIST])
    }

    pub fn delete_policy_rule(rule: &PolicyRule) -> Self {
        let what = format!("delete policy rule for packets from {}", rule.iif);
        Self::new(Message::DelRule(policy_rule(rule)), 0, what).tolerating(&[libc::ENOENT])
    }

    /// Also succeeds if the rule is there.
    pub fn add_rule(rule: &RoutingRule) -> Self {
        let what = format!("add routing rule for mark {:#x}", rule.mark);
        Self::new(Message::NewRule(rule_message(rule)), NLM_F_CREATE | NLM_F_EXCL, what).tolerating(&[libc::EEXIST])
    }

    pub fn delete_rule(rule: &RoutingRule) -> Self {
        let what = format!("delete routing rule for mark {:#x}", rule.mark);
        Self::new(Message::DelRule(rule_message(rule)), 0, what).tolerating(&[libc::ENOENT])
    }

    pub fn add_neighbour(neighbour: &Neighbour) -> Self {
        let what = format!("add neighbour {} on link {}", neighbour.address, neighbour.link);
        Self::new(
            Message::NewNeighbour(neighbour_message(neighbour)),
            NLM_F_CREATE | NLM_F_REPLACE,
            what,
        )
    }

    pub fn delete_neighbour(neighbour: &Neighbour) -> Self {
        let what = format!("delete neighbour {} of link {}", neighbour.address, neighbour.link);
        Self::new(Message::DelNeighbour(neighbour_message(neighbour)), 0, what)
            .tolerating(&[libc::ENOENT, libc::ENODEV])
    }

    pub fn add_forwarding(forwarding: &Forwarding) -> Self {
        let what = format!("lead frames on link {} to {}", forwarding.link, forwarding.to);
        Self::new(
            Message::NewNeighbour(forwarding_message(forwarding)),
            NLM_F_CREATE | NLM_F_REPLACE,
            what,
        )
    }

    pub fn delete_forwarding(forwarding: &Forwarding) -> Self {
        let what = format!("lead no frames on link {} to {}", forwarding.link, forwarding.to);
        Self::new(Message::DelNeighbour(forwarding_message(forwarding)), 0, what)
            .tolerating(&[libc::ENOENT, libc::ENODEV])
    }
}

/// A forwarding entry is a neighbour of the bridge family that the device itself keeps.
fn forwarding_message(forwarding: &Forwarding) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = netlink_packet_route::AddressFamily::Bridge;
    message.header.ifindex = forwarding.link;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(forwarding.mac.to_vec()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet(forwarding.to)),
    ];
    message
}

fn link_message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn set_flag(message: &mut LinkMessage, up: bool) {
    message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    message.header.change_mask |= LinkFlags::Up;
}

fn hardware(mac: Option<Mac>, mtu: Option<u32>) -> impl Iterator<Item = LinkAttribute> {
    mac.map(|m| LinkAttribute::Address(m.to_vec()))
        .into_iter()
        .chain(mtu.map(LinkAttribute::Mtu))
}

fn address_message(address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.address.addr());
    message.header.prefix_len = address.address.prefix_len();
    message.header.index = address.link;
    message.header.scope = if address.address.addr().is_loopback() {
        AddressScope::Host
    } else {
        AddressScope::Universe
    };
    message.attributes.push(AddressAttribute::Local(address.address.addr()));
    message
        .attributes
        .push(AddressAttribute::Address(address.address.addr()));
    if address.no_prefix_route {
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Noprefixroute));
    }
    message
}

fn route_message(route: &RouteEntry) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.destination.addr());
    header.destination_prefix_length = route.destination.prefix_len();
    header.protocol = RouteProtocol::from(route.protocol);
    // Tables above 255 stand in the attribute only.
    header.table = u8::try_from(route.table).unwrap_or(0);
    (header.kind, header.scope) = match route.kind {
        RouteKind::Unicast if route.gateway.is_none() && !is_v6(&route.destination) => {
            (RouteType::Unicast, RouteScope::Link)
        }
        RouteKind::Unicast => (RouteType::Unicast, RouteScope::Universe),
        RouteKind::Local => (RouteType::Local, RouteScope::Host),
        RouteKind::Blackhole => (RouteType::BlackHole, RouteScope::Universe),
        RouteKind::Unreachable => (RouteType::Unreachable, RouteScope::Universe),
        RouteKind::Throw => (RouteType::Throw, RouteScope::Universe),
        RouteKind::Prohibit => (RouteType::Prohibit, RouteScope::Universe),
    };
    if route.onlink {
        header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    if route.destination.prefix_len() > 0 {
        attributes.push(RouteAttribute::Destination(RouteAddress::from(
            route.destination.network(),
        )));
    }
    attributes.extend(route.link.map(RouteAttribute::Oif));
    attributes.extend(route.gateway.map(|g| RouteAttribute::Gateway(RouteAddress::from(g))));
    attributes.extend(route.source.map(|s| RouteAttribute::PrefSource(RouteAddress::from(s))));
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    message
}

fn rule_message(rule: &RoutingRule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = netlink_packet_route::AddressFamily::Inet;
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or(0);
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::FwMark(rule.mark),
        RuleAttribute::FwMask(rule.mask),
        RuleAttribute::Table(rule.table),
    ];
    message
}

fn neighbour_message(neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.address);
    message.header.ifindex = neighbour.link;
    message.header.state = NeighbourState::Permanent;
    if neighbour.proxy {
        message.header.flags = NeighbourFlags::Proxy;
    }
    message
        .attributes
        .push(NeighbourAttribute::Destination(match neighbour.address {
            IpAddr::V4(a) => NeighbourAddress::Inet(a),
            IpAddr::V6(a) => NeighbourAddress::Inet6(a),
        }));
    message
        .attributes
        .extend(neighbour.mac.map(|m| NeighbourAttribute::LinkLayerAddress(m.to_vec())));
    message
}

fn policy_rule(rule: &PolicyRule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = netlink_packet_route::AddressFamily::Inet;
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or(0);
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Iifname(rule.iif.clone()),
        RuleAttribute::Table(rule.table),
    ];
    if let Some((value, mask)) = rule.mark {
        message
            .attributes
            .extend([RuleAttribute::FwMark(value), RuleAttribute::FwMask(mask)]);
    }
    message
}

fn is_v6(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(_))
}

fn family(address: IpAddr) -> netlink_packet_route::AddressFamily {
    match address {
        IpAddr::V4(_) => netlink_packet_route::AddressFamily::Inet,
        IpAddr::V6(_) => netlink_packet_route::AddressFamily::Inet6,
    }
}

//! Numbers and frames of the routing family, as far as they are used here, and the message parts both directions share.
//!
//! Written by hand: the typed crate (netlink-packet-route 0.34) decodes every attribute of every kind of link, which made up
//! a third of the plug-ins' size, and could not say several of the things that are needed (IPv4 settings, bridge ports).
//!
//! # Source
//! `linux/rtnetlink.h`, `if_link.h`, `if_addr.h`, `neighbour.h`, `fib_rules.h` of Linux 6.12; the numbers are ABI.

use std::net::IpAddr;

use super::types::RouteKind;

pub const AF_INET: u8 = 2;
pub const AF_BRIDGE: u8 = 7;
pub const AF_INET6: u8 = 10;
pub const IFF_UP: u32 = 1;
pub const NLMSG_ERROR: u16 = 2;
pub const NLMSG_DONE: u16 = 3;
pub const IFA_F_NODAD: u32 = 0x02;
pub const IFA_F_NOPREFIXROUTE: u32 = 0x200;
pub const NUD_PERMANENT: u16 = 0x80;
pub const NTF_SELF: u8 = 2;
pub const NTF_PROXY: u8 = 8;
/// Listings of links without their counters, which are most of an answer.
pub const RTEXT_FILTER_SKIP_STATS: u32 = 8;
/// `linux/ip.h`, from 1 on; listed as an array from 0 on.
pub const DEVCONF_FORWARDING: u16 = 1;
pub const DEVCONF_PROXY_ARP: u16 = 3;

/// Message types.
pub mod rtm {
    pub const NEWLINK: u16 = 16;
    pub const DELLINK: u16 = 17;
    pub const GETLINK: u16 = 18;
    pub const SETLINK: u16 = 19;
    pub const NEWADDR: u16 = 20;
    pub const DELADDR: u16 = 21;
    pub const GETADDR: u16 = 22;
    pub const NEWROUTE: u16 = 24;
    pub const DELROUTE: u16 = 25;
    pub const GETROUTE: u16 = 26;
    pub const NEWNEIGH: u16 = 28;
    pub const DELNEIGH: u16 = 29;
    pub const GETNEIGH: u16 = 30;
    pub const NEWRULE: u16 = 32;
    pub const DELRULE: u16 = 33;
    pub const GETRULE: u16 = 34;
}

/// Attributes of links, and of what is nested in them.
pub mod ifla {
    pub const ADDRESS: u16 = 1;
    pub const IFNAME: u16 = 3;
    pub const MTU: u16 = 4;
    pub const LINK: u16 = 5;
    pub const MASTER: u16 = 10;
    pub const OPERSTATE: u16 = 16;
    pub const LINKINFO: u16 = 18;
    pub const IFALIAS: u16 = 20;
    pub const AF_SPEC: u16 = 26;
    pub const GROUP: u16 = 27;
    pub const NET_NS_FD: u16 = 28;
    pub const EXT_MASK: u16 = 29;
    pub const NUM_TX_QUEUES: u16 = 31;
    pub const NUM_RX_QUEUES: u16 = 32;

    pub const INFO_KIND: u16 = 1;
    pub const INFO_DATA: u16 = 2;
    pub const INFO_SLAVE_KIND: u16 = 4;
    pub const INFO_SLAVE_DATA: u16 = 5;

    pub const VETH_INFO_PEER: u16 = 1;
    pub const BR_MCAST_SNOOPING: u16 = 23;
    pub const BRPORT_MODE: u16 = 4;
    pub const BRPORT_ISOLATED: u16 = 33;
    pub const VXLAN_ID: u16 = 1;
    pub const VXLAN_LOCAL: u16 = 4;
    pub const VXLAN_LEARNING: u16 = 7;
    pub const VXLAN_PORT: u16 = 15;
    pub const INET_CONF: u16 = 1;
}

/// Attributes of addresses.
pub mod ifa {
    pub const ADDRESS: u16 = 1;
    pub const LOCAL: u16 = 2;
    pub const FLAGS: u16 = 8;
}

/// Attributes of routes.
pub mod rta {
    pub const DST: u16 = 1;
    pub const OIF: u16 = 4;
    pub const GATEWAY: u16 = 5;
    pub const PRIORITY: u16 = 6;
    pub const PREFSRC: u16 = 7;
    pub const MULTIPATH: u16 = 9;
    pub const TABLE: u16 = 15;
}

/// Attributes of routing rules.
pub mod fra {
    pub const DST: u16 = 1;
    pub const SRC: u16 = 2;
    pub const IIFNAME: u16 = 3;
    pub const PRIORITY: u16 = 6;
    pub const FWMARK: u16 = 10;
    pub const TABLE: u16 = 15;
    pub const FWMASK: u16 = 16;
}

/// Attributes of neighbours.
pub mod nda {
    pub const DST: u16 = 1;
    pub const LLADDR: u16 = 2;
}

/// Appends one message: header, then `body` (fixed part and attributes).
pub fn message(kind: u16, flags: u16, sequence: u32, body: &[u8], out: &mut Vec<u8>) {
    let size = (super::HEADER_LEN + body.len()) as u32;
    out.extend(size.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend([0; 4]);
    out.extend(body);
    out.resize(out.len().next_multiple_of(4), 0);
}

pub fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

const ROUTE_TYPES: [(RouteKind, u8); 6] = [
    (RouteKind::Unicast, 1),
    (RouteKind::Local, 2),
    (RouteKind::Blackhole, 6),
    (RouteKind::Unreachable, 7),
    (RouteKind::Prohibit, 8),
    (RouteKind::Throw, 9),
];

pub fn route_type(kind: RouteKind) -> u8 {
    ROUTE_TYPES.iter().find(|(k, _)| *k == kind).map_or(1, |(_, n)| *n)
}

/// `None` for broadcast, multicast and the like.
pub fn route_kind(number: u8) -> Option<RouteKind> {
    ROUTE_TYPES.iter().find(|(_, n)| *n == number).map(|(k, _)| *k)
}

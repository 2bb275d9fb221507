//! What the kernel's routing tables hold, as plain data.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::BorrowedFd;

use ipnet::IpNet;

/// Ethernet address, first octet first.
pub type Mac = [u8; 6];

/// `12:34:56:78:9a:bc`.
pub fn format_mac(mac: Mac) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// A link as listed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<Mac>,
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Packets given to it go out (operational state up); links that cannot tell, such as `lo`, say no.
    pub carries: bool,
    /// `veth`, `vxlan`, ...; absent for plain devices such as `lo`.
    pub kind: Option<String>,
    /// Index of the other end of a veth, in that end's namespace.
    pub peer_index: Option<u32>,
    pub alias: Option<String>,
    pub group: u32,
    /// Index of the bridge (or other upper device) this link is a port of.
    pub master: Option<u32>,
    /// How the bridge treats it, if it is a bridge's port.
    pub port: Option<BridgePort>,
    /// Its IPv4 setting `forwarding`; absent if the kernel did not tell.
    pub forwarding: Option<bool>,
}

/// What a bridge does with one of its ports.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BridgePort {
    /// Frames may leave by the port they came in by.
    pub hairpin: bool,
    /// Frames go to and come from ports that are not isolated only; the bridge's own device is none.
    pub isolated: bool,
}

/// IPv4 settings of a link; what is `None` stays as it is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Ipv4Conf {
    /// Packets that come in by this link may leave by another one.
    pub forwarding: Option<bool>,
    /// ARP queries for what lies beyond another link are answered.
    pub proxy_arp: Option<bool>,
}

/// A veth pair to be made; both ends get MAC and MTU in the same request, so nothing can rewrite them in between.
#[derive(Clone, Debug)]
pub struct Veth<'a> {
    pub name: String,
    pub mac: Option<Mac>,
    pub mtu: Option<u32>,
    pub up: bool,
    pub peer: VethPeer<'a>,
}

/// The other end, born in `netns` (the socket's own namespace if absent). It is born down: the kernel ties the two ends
/// together after it configured this one, and a veth without its other end cannot go up.
#[derive(Clone, Debug)]
pub struct VethPeer<'a> {
    pub name: String,
    pub mac: Option<Mac>,
    pub mtu: Option<u32>,
    pub netns: Option<BorrowedFd<'a>>,
}

/// A VXLAN device to be made, without learning; it may be born in `netns` while its underlay stays in the socket's.
#[derive(Clone, Debug)]
pub struct Vxlan<'a> {
    pub name: String,
    pub mac: Option<Mac>,
    pub mtu: Option<u32>,
    /// 24 bits.
    pub vni: u32,
    pub local: Ipv4Addr,
    pub port: u16,
    pub netns: Option<BorrowedFd<'a>>,
}

/// An address on a link.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub struct Address {
    pub link: u32,
    /// Address with its prefix length.
    pub address: IpNet,
    /// Do not make the subnet's route (`noprefixroute`).
    pub no_prefix_route: bool,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Ord, PartialOrd)]
pub enum RouteKind {
    #[default]
    Unicast,
    Local,
    Blackhole,
    Unreachable,
    Prohibit,
    /// The search goes on in the next table.
    Throw,
}

/// Packets that fit are routed by `table`. A rule without `iif` and `mark` fits every packet of its family.
#[derive(Clone, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub struct RoutingRule {
    /// Of IPv6 packets; of IPv4 packets otherwise.
    pub v6: bool,
    /// Lower is asked first: 0 is the table of local addresses, 32766 the main table.
    pub priority: u32,
    /// Only packets that came in by this link.
    pub iif: Option<String>,
    /// Only packets whose mark has this value under this mask.
    pub mark: Option<(u32, u32)>,
    pub table: u32,
}

impl fmt::Display for RoutingRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.v6 { "IPv6" } else { "IPv4" };
        write!(f, "{family} routing rule {} to table {}", self.priority, self.table)?;
        if let Some(iif) = &self.iif {
            write!(f, " for packets from {iif}")?;
        }
        match self.mark {
            Some((value, mask)) => write!(f, " with mark {value:#x}/{mask:#x}"),
            None => Ok(()),
        }
    }
}

/// A route of one table.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub struct RouteEntry {
    pub destination: IpNet,
    pub kind: RouteKind,
    /// Output link; absent for blackholes.
    pub link: Option<u32>,
    pub gateway: Option<IpAddr>,
    /// The gateway is on the link whatever the addresses say.
    pub onlink: bool,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    pub metric: u32,
    /// 254 is `main`, 255 `local`.
    pub table: u32,
    /// Who made it: 2 the kernel, 3 boot, 4 static.
    pub protocol: u8,
}

/// Routes made here carry this number (`static`), so that listings can leave the kernel's own aside.
pub(crate) const PROTOCOL_STATIC: u8 = 4;
pub(crate) const TABLE_MAIN: u32 = 254;

impl RouteEntry {
    /// A unicast route of the main table out of `link`.
    pub fn via_link(destination: impl Into<IpNet>, link: u32) -> Self {
        Self {
            destination: destination.into(),
            kind: RouteKind::Unicast,
            link: Some(link),
            gateway: None,
            onlink: false,
            source: None,
            metric: 0,
            table: TABLE_MAIN,
            protocol: PROTOCOL_STATIC,
        }
    }

    /// A route of the main table through `gateway`, which is taken to be on `link`.
    pub fn via_gateway(destination: impl Into<IpNet>, link: u32, gateway: impl Into<IpAddr>) -> Self {
        Self {
            gateway: Some(gateway.into()),
            onlink: true,
            ..Self::via_link(destination, link)
        }
    }

    /// A route of the main table that answers or drops instead of forwarding.
    pub fn special(destination: impl Into<IpNet>, kind: RouteKind) -> Self {
        Self {
            kind,
            link: None,
            ..Self::via_link(destination, 0)
        }
    }

    pub fn with_source(self, source: impl Into<IpAddr>) -> Self {
        Self {
            source: Some(source.into()),
            ..self
        }
    }
}

/// Where a VXLAN device sends frames for a MAC address.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub struct Forwarding {
    pub link: u32,
    pub mac: Mac,
    /// Underlay address of the other device.
    pub to: Ipv4Addr,
}

/// A permanent neighbour, or an address answered for (proxy).
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub struct Neighbour {
    pub link: u32,
    pub address: IpAddr,
    /// Absent for proxy entries.
    pub mac: Option<Mac>,
    pub proxy: bool,
    /// Set by hand, never expires.
    pub permanent: bool,
}

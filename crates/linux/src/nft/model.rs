//! A table as plain data: what is wanted, comparable and hashable, without handles or ids.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::Ipv4Net;

use super::Rule;

/// Which packets a table sees.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Family {
    Inet = 1,
    Ip = 2,
    /// ARP packets; hook points input and output only.
    Arp = 3,
    /// Frames between ports of bridges; addresses of IP packets can be matched, connections not on every kernel.
    Bridge = 7,
    Ip6 = 10,
}

/// One table. Everything of a plan belongs into one, since it is replaced or deleted as a whole.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Table {
    pub family: Family,
    pub name: String,
    pub timeouts: Vec<CtTimeout>,
    pub sets: Vec<Set>,
    pub chains: Vec<Chain>,
}

/// How long connections of a protocol are remembered, for rules that name it ([`super::Statement::SetCtTimeout`]). IPv4.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct CtTimeout {
    pub name: String,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Without a packet either way; of a TCP connection that stands, or of a UDP flow.
    pub idle_s: u32,
}

/// A set, or a map if `value` is given.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Set {
    pub name: String,
    /// One field, or several that are looked up together.
    pub key: Vec<Field>,
    pub value: Option<ValueType>,
    /// Keys may be ranges or prefixes.
    pub interval: bool,
    /// Rules add elements ([`super::Statement::Update`]).
    pub dynamic: bool,
    /// Elements live this long unless they say otherwise.
    pub timeout_ms: Option<u64>,
    pub elements: Vec<Element>,
}

/// What a map's elements hold.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum ValueType {
    Verdict,
    Data(Vec<Field>),
}

/// One element: its key (as many data as the set has fields) and, in a map, its value.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Element {
    pub key: Vec<Datum>,
    pub value: Option<Value>,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Value {
    Verdict(Verdict),
    Data(Vec<Datum>),
}

/// A chain; a base chain if it has a hook.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Chain {
    pub name: String,
    pub hook: Option<Hook>,
    pub rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Hook {
    pub kind: ChainKind,
    pub point: HookPoint,
    /// Lower runs first: raw -300, mangle -150, destination NAT -100, filter 0, source NAT 100.
    pub priority: i32,
    /// What happens to a packet that reaches the end: accept, or drop.
    pub drop: bool,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ChainKind {
    Filter,
    Nat,
    Route,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum HookPoint {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

impl HookPoint {
    /// ARP numbers its two hook points by itself.
    pub(super) fn number(self, family: Family) -> u32 {
        match (family, self) {
            (Family::Arp, Self::Input) => 0,
            (Family::Arp, Self::Output) => 1,
            _ => self as u32,
        }
    }
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Verdict {
    Accept,
    Drop,
    Return,
    Continue,
    Jump(String),
    Goto(String),
}

/// Something of a packet or its connection that can be compared or looked up.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Field {
    IpSaddr,
    IpDaddr,
    /// The frame's sender; for incoming Ethernet frames.
    EtherSaddr,
    /// Whom an ARP packet speaks of: the sender's hardware address, and its IPv4 address.
    ArpEtherSaddr,
    ArpIpSaddr,
    Ip6Saddr,
    Ip6Daddr,
    /// TCP 6, UDP 17, ...
    L4Proto,
    Sport,
    Dport,
    IcmpType,
    Icmp6Type,
    Mark,
    CtMark,
    /// Destination of the connection's first packet, before translation.
    CtOriginalIpDaddr,
    CtOriginalDport,
    /// Source of the connection's first packet.
    CtOriginalIpSaddr,
    Iifname,
    Oifname,
    /// Group of the incoming link; its data are [`Datum::Integer`].
    Iifgroup,
    NfProto,
    /// A bare number, host byte order: keys of numbered choices.
    Integer,
}

/// A value of a field; `Net` and the ranges only where prefixes or intervals are allowed.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Datum {
    Ip(Ipv4Addr),
    Net(Ipv4Net),
    IpRange(Ipv4Addr, Ipv4Addr),
    Ip6(Ipv6Addr),
    Mac([u8; 6]),
    Proto(u8),
    Port(u16),
    PortRange(u16, u16),
    Mark(u32),
    IfName(String),
    Integer(u32),
    /// Every value of the field (for interval sets).
    Any,
}

/// IP protocol numbers.
pub const ICMP: u8 = 1;
pub const ICMP6: u8 = 58;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

impl Table {
    pub fn new(family: Family, name: impl Into<String>) -> Self {
        Self {
            family,
            name: name.into(),
            timeouts: Vec::new(),
            sets: Vec::new(),
            chains: Vec::new(),
        }
    }

    /// Name of the empty chain that marks a table as made from exactly this plan, `plan-<16 hex>`. It changes with
    /// anything in the table; another build of this program may compute another one, which costs one replacement.
    pub fn plan_mark(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        format!("plan-{:016x}", hasher.finish())
    }
}

impl Set {
    /// A set of exact keys.
    pub fn new(name: impl Into<String>, key: impl Into<Vec<Field>>) -> Self {
        Self {
            name: name.into(),
            key: key.into(),
            value: None,
            interval: false,
            dynamic: false,
            timeout_ms: None,
            elements: Vec::new(),
        }
    }

    /// A map from exact keys to verdicts.
    pub fn verdict_map(name: impl Into<String>, key: impl Into<Vec<Field>>) -> Self {
        Self {
            value: Some(ValueType::Verdict),
            ..Self::new(name, key)
        }
    }

    /// A map from exact keys to data.
    pub fn map(name: impl Into<String>, key: impl Into<Vec<Field>>, value: impl Into<Vec<Field>>) -> Self {
        Self {
            value: Some(ValueType::Data(value.into())),
            ..Self::new(name, key)
        }
    }

    /// Allows ranges and prefixes in keys.
    pub fn intervals(self) -> Self {
        Self { interval: true, ..self }
    }

    /// Lets rules add elements that live `timeout_ms`.
    pub fn dynamic(self, timeout_ms: u64) -> Self {
        Self {
            dynamic: true,
            timeout_ms: Some(timeout_ms),
            ..self
        }
    }

    pub fn with(mut self, elements: impl IntoIterator<Item = Element>) -> Self {
        self.elements.extend(elements);
        self
    }
}

impl Element {
    pub fn key(key: impl Into<Vec<Datum>>) -> Self {
        Self {
            key: key.into(),
            value: None,
        }
    }

    pub fn verdict(key: impl Into<Vec<Datum>>, verdict: Verdict) -> Self {
        Self {
            key: key.into(),
            value: Some(Value::Verdict(verdict)),
        }
    }

    pub fn data(key: impl Into<Vec<Datum>>, data: impl Into<Vec<Datum>>) -> Self {
        Self {
            key: key.into(),
            value: Some(Value::Data(data.into())),
        }
    }
}

impl Chain {
    /// A chain that is jumped to.
    pub fn regular(name: impl Into<String>, rules: impl Into<Vec<Rule>>) -> Self {
        Self {
            name: name.into(),
            hook: None,
            rules: rules.into(),
        }
    }

    /// A base chain that accepts what reaches its end.
    pub fn base(
        name: impl Into<String>,
        kind: ChainKind,
        point: HookPoint,
        priority: i32,
        rules: impl Into<Vec<Rule>>,
    ) -> Self {
        Self {
            name: name.into(),
            hook: Some(Hook {
                kind,
                point,
                priority,
                drop: false,
            }),
            rules: rules.into(),
        }
    }
}

impl Verdict {
    pub fn goto(chain: impl Into<String>) -> Self {
        Self::Goto(chain.into())
    }

    pub fn jump(chain: impl Into<String>) -> Self {
        Self::Jump(chain.into())
    }
}

//! Rules: statements evaluated from left to right until one does not match.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::{Datum, Field, TCP, UDP, Verdict};

/// One rule. Build with [`Rule::new`] and the chained methods, or from [`Statement`]s.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Rule {
    pub statements: Vec<Statement>,
    /// Shown by `nft list` and by [`super::Nft::counters`].
    pub comment: Option<String>,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Statement {
    /// `field == value`; a `Net` compares under its mask.
    Is {
        field: Field,
        value: Datum,
        negate: bool,
    },
    /// The fields together are, or are not, in the set.
    InSet {
        fields: Vec<Field>,
        set: String,
        negate: bool,
    },
    /// Takes the verdict found under the fields; goes on if there is none.
    VerdictMap {
        fields: Vec<Field>,
        map: String,
    },
    /// Any of these bits of the connection's state (`CT_*`) is set, or none is.
    CtState {
        mask: u32,
        negate: bool,
    },
    /// Any of these bits of the connection's status (`CT_STATUS_*`) is set, or none is.
    CtStatus {
        mask: u32,
        negate: bool,
    },
    /// A TCP segment whose flags under `mask` are, or are not, `value` (`TCP_*`).
    TcpFlags {
        mask: u8,
        value: u8,
        negate: bool,
    },
    /// A new connection gets the table's [`super::CtTimeout`] of that name.
    SetCtTimeout {
        name: String,
    },
    /// Any of these bits of the packet's mark is set, or none is.
    MarkBits {
        mask: u32,
        negate: bool,
    },
    /// These bits of the connection's mark are `value`.
    CtMarkBits {
        value: u32,
        mask: u32,
    },
    /// The destination is, or is not, an address of this namespace.
    FibLocal {
        negate: bool,
    },
    Counter,
    /// `mark = (mark & !mask) | value`.
    SetMark {
        value: u32,
        mask: u32,
    },
    SetCtMark {
        value: u32,
        mask: u32,
    },
    /// The mark becomes what the map `[Mark]` holds under the fields; goes on unchanged if it holds nothing.
    SetMarkMap {
        fields: Vec<Field>,
        map: String,
    },
    /// Adds or refreshes an element of a dynamic set or map.
    Update {
        set: String,
        key: Vec<Field>,
        value: Vec<Datum>,
        timeout_ms: Option<u64>,
    },
    Dnat(NatTarget),
    Snat(NatTarget),
    Masquerade,
    /// To a port of this namespace.
    Redirect {
        port: u16,
    },
    /// One of the verdicts, chosen per packet.
    Choose {
        by: Balance,
        verdicts: Vec<Verdict>,
    },
    Reject(Reject),
    Verdict(Verdict),
}

/// Where a translation goes. IPv4.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum NatTarget {
    To {
        address: Ipv4Addr,
        port: Option<u16>,
    },
    /// Looked up; the map's value is `[IpDaddr]`, or `[IpDaddr, Dport]` if `port`.
    Map {
        fields: Vec<Field>,
        map: String,
        port: bool,
    },
    /// Looked up; the map's value is `[IpDaddr, Dport, Dport]`: an address, the first and the last port.
    PortRange {
        fields: Vec<Field>,
        map: String,
    },
    /// One of these, chosen per connection; the port stays if it can.
    OneAddressOf {
        by: Balance,
        addresses: Vec<Ipv4Addr>,
    },
    /// One of these, chosen per connection.
    OneOf {
        by: Balance,
        targets: Vec<(Ipv4Addr, u16)>,
    },
}

/// How one of several is chosen.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Balance {
    Random,
    RoundRobin,
    /// The same choice for the same values of the fields, while the number of choices stays.
    Hash(Vec<Field>),
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Reject {
    TcpReset,
    NoRoute,
    PortUnreachable,
    HostUnreachable,
    AdminProhibited,
}

pub const CT_INVALID: u32 = 1;
pub const CT_ESTABLISHED: u32 = 2;
pub const CT_RELATED: u32 = 4;
pub const CT_NEW: u32 = 8;
pub const CT_STATUS_SNAT: u32 = 16;
pub const CT_STATUS_DNAT: u32 = 32;

pub const TCP_FIN: u8 = 1;
pub const TCP_SYN: u8 = 2;
pub const TCP_RST: u8 = 4;
pub const TCP_ACK: u8 = 16;

impl Rule {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn then(mut self, statement: Statement) -> Self {
        self.statements.push(statement);
        self
    }

    pub fn comment(self, comment: impl Into<String>) -> Self {
        Self {
            comment: Some(comment.into()),
            ..self
        }
    }

    pub fn is(self, field: Field, value: Datum) -> Self {
        self.then(Statement::Is {
            field,
            value,
            negate: false,
        })
    }

    pub fn is_not(self, field: Field, value: Datum) -> Self {
        self.then(Statement::Is {
            field,
            value,
            negate: true,
        })
    }

    pub fn iifname(self, name: impl Into<String>) -> Self {
        self.is(Field::Iifname, Datum::IfName(name.into()))
    }

    pub fn oifname(self, name: impl Into<String>) -> Self {
        self.is(Field::Oifname, Datum::IfName(name.into()))
    }

    pub fn saddr(self, net: impl Into<Ipv4Net>) -> Self {
        self.is(Field::IpSaddr, Datum::Net(net.into()))
    }

    pub fn daddr(self, net: impl Into<Ipv4Net>) -> Self {
        self.is(Field::IpDaddr, Datum::Net(net.into()))
    }

    pub fn proto(self, protocol: u8) -> Self {
        self.is(Field::L4Proto, Datum::Proto(protocol))
    }

    pub fn tcp_dport(self, port: u16) -> Self {
        self.proto(TCP).is(Field::Dport, Datum::Port(port))
    }

    pub fn udp_dport(self, port: u16) -> Self {
        self.proto(UDP).is(Field::Dport, Datum::Port(port))
    }

    pub fn in_set(self, fields: impl Into<Vec<Field>>, set: impl Into<String>) -> Self {
        self.then(Statement::InSet {
            fields: fields.into(),
            set: set.into(),
            negate: false,
        })
    }

    pub fn not_in_set(self, fields: impl Into<Vec<Field>>, set: impl Into<String>) -> Self {
        self.then(Statement::InSet {
            fields: fields.into(),
            set: set.into(),
            negate: true,
        })
    }

    pub fn vmap(self, fields: impl Into<Vec<Field>>, map: impl Into<String>) -> Self {
        self.then(Statement::VerdictMap {
            fields: fields.into(),
            map: map.into(),
        })
    }

    /// Established or related.
    pub fn established(self) -> Self {
        self.ct_state(CT_ESTABLISHED | CT_RELATED)
    }

    pub fn ct_state(self, mask: u32) -> Self {
        self.then(Statement::CtState { mask, negate: false })
    }

    /// A TCP segment that does not open a connection.
    pub fn tcp_not_syn(self) -> Self {
        self.proto(TCP).then(Statement::TcpFlags {
            mask: TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK,
            value: TCP_SYN,
            negate: true,
        })
    }

    pub fn set_ct_timeout(self, name: impl Into<String>) -> Self {
        self.then(Statement::SetCtTimeout { name: name.into() })
    }

    pub fn counter(self) -> Self {
        self.then(Statement::Counter)
    }

    pub fn accept(self) -> Self {
        self.then(Statement::Verdict(Verdict::Accept))
    }

    pub fn drop(self) -> Self {
        self.then(Statement::Verdict(Verdict::Drop))
    }

    pub fn ret(self) -> Self {
        self.then(Statement::Verdict(Verdict::Return))
    }

    pub fn jump(self, chain: impl Into<String>) -> Self {
        self.then(Statement::Verdict(Verdict::Jump(chain.into())))
    }

    pub fn goto(self, chain: impl Into<String>) -> Self {
        self.then(Statement::Verdict(Verdict::Goto(chain.into())))
    }

    pub fn dnat(self, target: NatTarget) -> Self {
        self.then(Statement::Dnat(target))
    }

    pub fn snat(self, target: NatTarget) -> Self {
        self.then(Statement::Snat(target))
    }

    pub fn masquerade(self) -> Self {
        self.then(Statement::Masquerade)
    }

    pub fn reject(self, with: Reject) -> Self {
        self.then(Statement::Reject(with))
    }

    pub fn set_mark(self, value: u32, mask: u32) -> Self {
        self.then(Statement::SetMark { value, mask })
    }
}

impl NatTarget {
    pub fn to(address: Ipv4Addr, port: impl Into<Option<u16>>) -> Self {
        Self::To {
            address,
            port: port.into(),
        }
    }

    pub fn map(fields: impl Into<Vec<Field>>, map: impl Into<String>) -> Self {
        Self::Map {
            fields: fields.into(),
            map: map.into(),
            port: true,
        }
    }
}

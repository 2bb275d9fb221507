//! The wire form of rules: registers, expressions and attributes.
//!
//! # Source
//! `linux/netfilter/nf_tables.h`. Written here because the typed crate covers about half of these expressions and none of
//! the data in verdict maps; every number in an nftables attribute is big endian, data keep the packet's order.

use crate::netlink::Attributes;

use super::{Balance, Datum, Error, Field, NatTarget, Reject, Rule, Statement, Verdict};

/// First 32-bit register, NFT_REG32_00.
const REG: u32 = 8;
const REGISTERS: u32 = 16;
const VERDICT_REG: u32 = 0;

impl Field {
    /// Bytes of one value.
    pub(super) fn len(self) -> usize {
        match self {
            Field::L4Proto | Field::NfProto | Field::IcmpType | Field::Icmp6Type => 1,
            Field::EtherSaddr | Field::ArpEtherSaddr => 6,
            Field::Sport | Field::Dport | Field::CtOriginalDport => 2,
            Field::Ip6Saddr | Field::Ip6Daddr | Field::Iifname | Field::Oifname => 16,
            _ => 4,
        }
    }

    /// Number by which the `nft` tool knows the type, for its listings.
    fn type_id(self) -> u32 {
        match self {
            Field::NfProto => 2,
            Field::Integer | Field::Iifgroup => 4,
            Field::IpSaddr
            | Field::IpDaddr
            | Field::ArpIpSaddr
            | Field::CtOriginalIpDaddr
            | Field::CtOriginalIpSaddr => 7,
            Field::Ip6Saddr | Field::Ip6Daddr => 8,
            Field::EtherSaddr | Field::ArpEtherSaddr => 9,
            Field::L4Proto => 12,
            Field::Sport | Field::Dport | Field::CtOriginalDport => 13,
            Field::IcmpType => 14,
            Field::Icmp6Type => 29,
            Field::Mark | Field::CtMark => 19,
            Field::Iifname | Field::Oifname => 41,
        }
    }

    fn slots(self) -> u32 {
        self.len().div_ceil(4) as u32
    }

    fn is_v4(self) -> bool {
        matches!(self, Field::IpSaddr | Field::IpDaddr)
    }
}

/// Type number and length of a key or value made of `fields`.
pub(super) fn type_and_length(fields: &[Field]) -> (u32, u32) {
    match fields {
        [one] => (one.type_id(), one.len() as u32),
        many => (
            many.iter().fold(0, |t, f| t << 6 | f.type_id()),
            many.iter().map(|f| f.slots() * 4).sum(),
        ),
    }
}

/// First and last value of a datum, each of the field's length; equal if it is a single value.
fn bounds(field: Field, datum: &Datum) -> Result<(Vec<u8>, Vec<u8>), Error> {
    let one = |bytes: Vec<u8>| (bytes.clone(), bytes);
    let out = match datum {
        Datum::Ip(a) => one(a.octets().to_vec()),
        Datum::Net(n) => (n.network().octets().to_vec(), n.broadcast().octets().to_vec()),
        Datum::IpRange(a, b) => (a.octets().to_vec(), b.octets().to_vec()),
        Datum::Ip6(a) => one(a.octets().to_vec()),
        Datum::Mac(m) => one(m.to_vec()),
        Datum::Proto(p) => one(vec![*p]),
        Datum::Port(p) => one(p.to_be_bytes().to_vec()),
        Datum::PortRange(a, b) => (a.to_be_bytes().to_vec(), b.to_be_bytes().to_vec()),
        Datum::Mark(m) | Datum::Integer(m) => one(m.to_ne_bytes().to_vec()),
        Datum::IfName(name) => {
            let mut bytes = name.as_bytes().to_vec();
            if bytes.len() > 15 {
                return Err(Error::LinkName { name: name.clone() });
            }
            bytes.resize(16, 0);
            one(bytes)
        }
        Datum::Any => (vec![0; field.len()], vec![0xff; field.len()]),
    };
    if out.0.len() == field.len() {
        Ok(out)
    } else {
        Err(Error::Mismatch {
            field,
            datum: datum.clone(),
        })
    }
}

/// First and last bytes of a whole key or value; parts of a concatenation are padded to four bytes.
pub(super) fn key_bounds(fields: &[Field], data: &[Datum]) -> Result<(Vec<u8>, Vec<u8>), Error> {
    if fields.len() != data.len() {
        return Err(Error::KeyLength {
            fields: fields.len(),
            data: data.len(),
        });
    }
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for (field, datum) in fields.iter().zip(data) {
        let (a, b) = bounds(*field, datum)?;
        first.extend(a);
        last.extend(b);
        if fields.len() > 1 {
            first.resize(first.len().next_multiple_of(4), 0);
            last.resize(last.len().next_multiple_of(4), 0);
        }
    }
    Ok((first, last))
}

/// A key or value that must be single.
pub(super) fn exact(fields: &[Field], data: &[Datum]) -> Result<Vec<u8>, Error> {
    let (first, last) = key_bounds(fields, data)?;
    if first == last {
        Ok(first)
    } else {
        Err(Error::NotExact { data: data.to_vec() })
    }
}

pub(super) fn verdict(out: &mut Attributes, kind: u16, verdict: &Verdict) {
    let (code, chain): (i32, Option<&str>) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Continue => (-1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5, None),
    };
    out.nest(kind, |data| {
        data.nest(2, |v| {
            v.u32(1, code as u32);
            if let Some(chain) = chain {
                v.text(2, chain);
            }
        });
    });
}

fn value(out: &mut Attributes, kind: u16, bytes: &[u8]) {
    out.nest(kind, |data| {
        data.bytes(1, bytes);
    });
}

/// A map without a name that a rule brings along.
pub(super) struct InlineMap {
    pub id: u32,
    pub values: InlineValues,
}

pub(super) enum InlineValues {
    Verdicts(Vec<Verdict>),
    Targets(Vec<(std::net::Ipv4Addr, u16)>),
    Addresses(Vec<std::net::Ipv4Addr>),
}

/// Encodes the expressions of one rule.
pub(super) struct RuleEncoder<'a> {
    out: Attributes,
    /// The family decides whether IPv4 fields need a check first.
    inet: bool,
    v4_checked: bool,
    next_id: &'a mut u32,
    pub inline: Vec<InlineMap>,
}

/// Placeholder of an unnamed map's name; the kernel fills in the number.
pub(super) const INLINE_NAME: &str = "__map%d";

impl<'a> RuleEncoder<'a> {
    pub fn new(inet: bool, next_id: &'a mut u32) -> Self {
        Self {
            out: Attributes::default(),
            inet,
            v4_checked: false,
            next_id,
            inline: Vec::new(),
        }
    }

    /// The list of expressions, and the unnamed maps that must exist before the rule.
    pub fn finish(mut self, rule: &Rule) -> Result<(Vec<u8>, Vec<InlineMap>), Error> {
        for statement in &rule.statements {
            self.statement(statement)?;
        }
        Ok((self.out.0, self.inline))
    }

    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Attributes)) {
        self.out.nest(1, |e| {
            e.text(1, name).nest(2, fill);
        });
    }

    fn load(&mut self, field: Field, reg: u32) -> Result<(), Error> {
        if self.inet && field.is_v4() && !self.v4_checked {
            const NFPROTO_IPV4: u8 = 2;
            self.v4_checked = true;
            self.load(Field::NfProto, reg)?;
            self.compare(reg, &[NFPROTO_IPV4], false);
        }
        let payload = |base, offset| Some((base, offset));
        let (link, network, transport) = (0, 1, 2);
        let place = match field {
            Field::EtherSaddr => payload(link, 6),
            Field::IpSaddr => payload(network, 12),
            Field::IpDaddr => payload(network, 16),
            Field::ArpEtherSaddr => payload(network, 8),
            Field::ArpIpSaddr => payload(network, 14),
            Field::Ip6Saddr => payload(network, 8),
            Field::Ip6Daddr => payload(network, 24),
            Field::Sport | Field::IcmpType | Field::Icmp6Type => payload(transport, 0),
            Field::Dport => payload(transport, 2),
            _ => None,
        };
        if let Some((base, offset)) = place {
            self.expression("payload", |e| {
                e.u32(1, reg).u32(2, base).u32(3, offset).u32(4, field.len() as u32);
            });
            return Ok(());
        }
        let meta = match field {
            Field::Mark => Some(3),
            Field::Iifname => Some(6),
            Field::Oifname => Some(7),
            Field::Iifgroup => Some(20),
            Field::NfProto => Some(15),
            Field::L4Proto => Some(16),
            _ => None,
        };
        if let Some(key) = meta {
            self.expression("meta", |e| {
                e.u32(2, key).u32(1, reg);
            });
            return Ok(());
        }
        let (key, original) = match field {
            Field::CtMark => (3, false),
            Field::CtOriginalDport => (12, true),
            Field::CtOriginalIpSaddr => (19, true),
            Field::CtOriginalIpDaddr => (20, true),
            other => return Err(Error::NotLoadable { field: other }),
        };
        self.ct(key, reg, original);
        Ok(())
    }

    fn ct(&mut self, key: u32, reg: u32, original: bool) {
        self.expression("ct", |e| {
            e.u32(2, key).u32(1, reg);
            if original {
                e.u8(3, 0);
            }
        });
    }

    /// Loads the fields one after the other, each at a 32-bit border; returns their length.
    fn load_all(&mut self, fields: &[Field]) -> Result<u32, Error> {
        let slots: u32 = fields.iter().map(|f| f.slots()).sum();
        if slots > REGISTERS {
            return Err(Error::TooManyFields { slots });
        }
        let mut reg = REG;
        for field in fields {
            self.load(*field, reg)?;
            reg += field.slots();
        }
        Ok(slots * 4)
    }

    fn compare(&mut self, reg: u32, bytes: &[u8], negate: bool) {
        self.expression("cmp", |e| {
            e.u32(1, reg).u32(2, u32::from(negate));
            value(e, 3, bytes);
        });
    }

    /// `reg = (reg & mask) ^ xor`.
    fn bitwise(&mut self, reg: u32, mask: &[u8], xor: &[u8]) {
        self.expression("bitwise", |e| {
            e.u32(1, reg).u32(2, reg).u32(3, mask.len() as u32);
            value(e, 4, mask);
            value(e, 5, xor);
        });
    }

    fn immediate(&mut self, reg: u32, bytes: &[u8]) {
        self.expression("immediate", |e| {
            e.u32(1, reg);
            value(e, 2, bytes);
        });
    }

    fn lookup(&mut self, set: &str, id: Option<u32>, result: Option<u32>, negate: bool) {
        self.expression("lookup", |e| {
            e.text(1, set).u32(2, REG);
            if let Some(result) = result {
                e.u32(3, result);
            }
            if let Some(id) = id {
                e.u32(4, id);
            }
            if negate {
                e.u32(5, 1);
            }
        });
    }

    fn bits(&mut self, ct_key: u32, mask: u32, negate: bool) {
        self.ct(ct_key, REG, false);
        self.bitwise(REG, &mask.to_ne_bytes(), &[0; 4]);
        // "any bit set" is "not equal to zero".
        self.compare(REG, &[0; 4], !negate);
    }

    fn choose(&mut self, by: &Balance, count: usize) -> Result<(), Error> {
        if count == 0 {
            return Err(Error::NoChoice);
        }
        let modulus = count as u32;
        match by {
            Balance::Random | Balance::RoundRobin => {
                let random = u32::from(*by == Balance::Random);
                self.expression("numgen", |e| {
                    e.u32(1, REG).u32(2, modulus).u32(3, random).u32(4, 0);
                });
            }
            Balance::Hash(fields) => {
                let length = self.load_all(fields)?;
                self.expression("hash", |e| {
                    e.u32(1, REG)
                        .u32(2, REG)
                        .u32(3, length)
                        .u32(4, modulus)
                        .u32(5, 0x6f61_6b73)
                        .u32(6, 0)
                        .u32(7, 0);
                });
            }
        }
        Ok(())
    }

    fn inline_map(&mut self, values: InlineValues, result: u32) {
        *self.next_id += 1;
        let id = *self.next_id;
        self.inline.push(InlineMap { id, values });
        self.lookup(INLINE_NAME, Some(id), Some(result), false);
    }

    fn mark(&mut self, ct: bool, set: u32, mask: u32) {
        let name = if ct { "ct" } else { "meta" };
        if mask == u32::MAX {
            self.immediate(REG, &set.to_ne_bytes());
        } else {
            self.expression(name, |e| {
                e.u32(2, 3).u32(1, REG);
            });
            self.bitwise(REG, &(!mask).to_ne_bytes(), &set.to_ne_bytes());
        }
        // Both kinds name the mark 3; only the attribute of the source register differs.
        self.expression(name, |e| {
            e.u32(2, 3).u32(if ct { 4 } else { 3 }, REG);
        });
    }

    fn nat(&mut self, destination: bool, target: &NatTarget) -> Result<(), Error> {
        let mut last_port = false;
        let has_port = match target {
            NatTarget::To { address, port } => {
                self.immediate(REG, &address.octets());
                if let Some(port) = port {
                    self.immediate(REG + 1, &port.to_be_bytes());
                }
                port.is_some()
            }
            NatTarget::Map { fields, map, port } => {
                self.load_all(fields)?;
                self.lookup(map, None, Some(REG), false);
                *port
            }
            NatTarget::PortRange { fields, map } => {
                self.load_all(fields)?;
                self.lookup(map, None, Some(REG), false);
                last_port = true;
                true
            }
            NatTarget::OneAddressOf { addresses, .. } if addresses.len() == 1 => {
                return self.nat(destination, &NatTarget::to(addresses[0], None));
            }
            NatTarget::OneAddressOf { by, addresses } => {
                self.choose(by, addresses.len())?;
                self.inline_map(InlineValues::Addresses(addresses.clone()), REG);
                false
            }
            NatTarget::OneOf { targets, .. } if targets.len() == 1 => {
                let (address, port) = targets[0];
                return self.nat(
                    destination,
                    &NatTarget::To {
                        address,
                        port: Some(port),
                    },
                );
            }
            NatTarget::OneOf { by, targets } => {
                self.choose(by, targets.len())?;
                self.inline_map(InlineValues::Targets(targets.clone()), REG);
                true
            }
        };
        self.expression("nat", |e| {
            e.u32(1, u32::from(destination)).u32(2, 2).u32(3, REG);
            if has_port {
                e.u32(5, REG + 1);
            }
            if last_port {
                e.u32(6, REG + 2);
            }
        });
        Ok(())
    }

    fn statement(&mut self, statement: &Statement) -> Result<(), Error> {
        match statement {
            Statement::Is {
                field,
                value: Datum::Net(net),
                negate,
            } if net.prefix_len() < 32 => {
                if field.len() != 4 || matches!(field, Field::Mark | Field::CtMark | Field::Integer) {
                    return Err(Error::Mismatch {
                        field: *field,
                        datum: Datum::Net(*net),
                    });
                }
                self.load(*field, REG)?;
                self.bitwise(REG, &net.netmask().octets(), &[0; 4]);
                self.compare(REG, &net.network().octets(), *negate);
            }
            Statement::Is { field, value, negate } => {
                let bytes = exact(&[*field], std::slice::from_ref(value))?;
                self.load(*field, REG)?;
                self.compare(REG, &bytes, *negate);
            }
            Statement::InSet { fields, set, negate } => {
                self.load_all(fields)?;
                self.lookup(set, None, None, *negate);
            }
            Statement::VerdictMap { fields, map } => {
                self.load_all(fields)?;
                self.lookup(map, None, Some(VERDICT_REG), false);
            }
            Statement::CtState { mask, negate } => self.bits(0, *mask, *negate),
            Statement::CtStatus { mask, negate } => self.bits(2, *mask, *negate),
            Statement::TcpFlags { mask, value, negate } => {
                const FLAGS_OFFSET: u32 = 13;
                self.expression("payload", |e| {
                    e.u32(1, REG).u32(2, 2).u32(3, FLAGS_OFFSET).u32(4, 1);
                });
                self.bitwise(REG, &[*mask], &[0]);
                self.compare(REG, &[*value], *negate);
            }
            Statement::SetCtTimeout { name } => self.expression("objref", |e| {
                e.u32(1, super::batch::OBJECT_CT_TIMEOUT).text(2, name);
            }),
            Statement::MarkBits { mask, negate } => {
                self.load(Field::Mark, REG)?;
                self.bitwise(REG, &mask.to_ne_bytes(), &[0; 4]);
                // "any bit set" is "not equal to zero".
                self.compare(REG, &[0; 4], !negate);
            }
            Statement::CtMarkBits { value, mask } => {
                self.load(Field::CtMark, REG)?;
                self.bitwise(REG, &mask.to_ne_bytes(), &[0; 4]);
                self.compare(REG, &(value & mask).to_ne_bytes(), false);
            }
            Statement::FibLocal { negate } => {
                const RTN_LOCAL: u32 = 2;
                self.expression("fib", |e| {
                    e.u32(1, REG).u32(2, 3).u32(3, 2);
                });
                self.compare(REG, &RTN_LOCAL.to_ne_bytes(), *negate);
            }
            Statement::Counter => self.expression("counter", |e| {
                e.u64(1, 0).u64(2, 0);
            }),
            Statement::SetMark { value, mask } => self.mark(false, *value, *mask),
            Statement::SetCtMark { value, mask } => self.mark(true, *value, *mask),
            Statement::SetMarkMap { fields, map } => {
                self.load_all(fields)?;
                self.lookup(map, None, Some(REG), false);
                self.expression("meta", |e| {
                    e.u32(2, 3).u32(3, REG);
                });
            }
            Statement::Update {
                set,
                key,
                value,
                timeout_ms,
            } => {
                let slots = self.load_all(key)? / 4;
                let mut reg = REG + slots;
                for datum in value {
                    let bytes = datum_bytes(datum)?;
                    self.immediate(reg, &bytes);
                    reg += bytes.len().div_ceil(4) as u32;
                }
                self.expression("dynset", |e| {
                    e.text(1, set).u32(3, 1).u32(4, REG);
                    if !value.is_empty() {
                        e.u32(5, REG + slots);
                    }
                    if let Some(ms) = timeout_ms {
                        e.u64(6, *ms);
                    }
                });
            }
            Statement::Dnat(target) => self.nat(true, target)?,
            Statement::Snat(target) => self.nat(false, target)?,
            Statement::Masquerade => self.expression("masq", |_| {}),
            Statement::Redirect { port } => {
                self.immediate(REG, &port.to_be_bytes());
                self.expression("redir", |e| {
                    e.u32(1, REG);
                });
            }
            Statement::Choose { by, verdicts } => match &verdicts[..] {
                [one] => self.verdict(one),
                _ => {
                    self.choose(by, verdicts.len())?;
                    self.inline_map(InlineValues::Verdicts(verdicts.clone()), VERDICT_REG);
                }
            },
            Statement::Reject(with) => {
                let (kind, code) = match with {
                    Reject::TcpReset => (1, 0),
                    Reject::NoRoute => (2, 0),
                    Reject::PortUnreachable => (2, 1),
                    Reject::HostUnreachable => (2, 2),
                    Reject::AdminProhibited => (2, 3),
                };
                // The family-independent kind exists only in inet tables; elsewhere the ICMP codes are asked for.
                let (kind, code) = if self.inet || kind != 2 {
                    (kind, code)
                } else {
                    (0, [0, 3, 1, 13][code as usize])
                };
                self.expression("reject", |e| {
                    e.u32(1, kind).u8(2, code);
                });
            }
            Statement::Verdict(v) => self.verdict(v),
        }
        Ok(())
    }

    fn verdict(&mut self, v: &Verdict) {
        self.expression("immediate", |e| {
            e.u32(1, VERDICT_REG);
            verdict(e, 2, v);
        });
    }
}

fn datum_bytes(datum: &Datum) -> Result<Vec<u8>, Error> {
    let field = match datum {
        Datum::Ip(_) => Field::IpDaddr,
        Datum::Ip6(_) => Field::Ip6Daddr,
        Datum::Proto(_) => Field::L4Proto,
        Datum::Port(_) => Field::Dport,
        Datum::Mark(_) | Datum::Integer(_) => Field::Mark,
        Datum::IfName(_) => Field::Iifname,
        _ => {
            return Err(Error::NotExact {
                data: vec![datum.clone()],
            });
        }
    };
    exact(&[field], std::slice::from_ref(datum))
}

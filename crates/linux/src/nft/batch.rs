//! One transaction: all of its changes happen, or none.

use crate::netlink::Attributes;

use super::encode::{INLINE_NAME, InlineValues, RuleEncoder, exact, key_bounds, type_and_length, verdict};
use super::{Chain, ChainKind, CtTimeout, Datum, Element, Error, Family, Field, Set, TCP, Table, Value, ValueType};

const NEWTABLE: u8 = 0;
const DELTABLE: u8 = 2;
const NEWCHAIN: u8 = 3;
const DELCHAIN: u8 = 5;
const NEWRULE: u8 = 6;
const NEWSET: u8 = 9;
const NEWSETELEM: u8 = 12;
const DELSETELEM: u8 = 14;
const NEWOBJECT: u8 = 18;

const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

const SET_ANONYMOUS: u32 = 0x1;
const SET_CONSTANT: u32 = 0x2;
const SET_INTERVAL: u32 = 0x4;
const SET_MAP: u32 = 0x8;
const SET_TIMEOUT: u32 = 0x10;
const SET_EVAL: u32 = 0x20;
const SET_CONCAT: u32 = 0x80;
const ELEMENT_INTERVAL_END: u32 = 1;
/// `NFT_DATA_VERDICT`.
const VERDICT_TYPE: u32 = 0xffff_ff00;

/// `NFT_OBJECT_CT_TIMEOUT`.
pub(super) const OBJECT_CT_TIMEOUT: u32 = 7;

/// A list attribute holds at most 64 KiB.
const ELEMENTS_PER_MESSAGE: usize = 400;

/// Collects changes; [`super::Nft::apply`] makes them.
#[derive(Default)]
pub struct Batch {
    pub(super) messages: Vec<Message>,
    next_id: u32,
}

pub(super) struct Message {
    pub kind: u8,
    pub flags: u16,
    pub family: u8,
    pub body: Vec<u8>,
    pub what: String,
}

impl Batch {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    fn push(&mut self, kind: u8, flags: u16, family: Family, what: String, fill: impl FnOnce(&mut Attributes)) {
        let mut body = Attributes::default();
        fill(&mut body);
        self.messages.push(Message {
            kind,
            flags,
            family: family as u8,
            body: body.0,
            what,
        });
    }

    /// Makes an empty table if there is none.
    pub fn add_table(&mut self, family: Family, name: &str) {
        self.push(NEWTABLE, NLM_F_CREATE, family, format!("add table {name}"), |a| {
            a.text(1, name).u32(2, 0);
        });
    }

    /// Deletes a table with all it holds; nothing happens if there is none.
    pub fn delete_table(&mut self, family: Family, name: &str) {
        // Adding first makes the deletion safe on kernels without a message for "delete if there".
        self.add_table(family, name);
        self.push(DELTABLE, 0, family, format!("delete table {name}"), |a| {
            a.text(1, name);
        });
    }

    /// Makes the table exactly as given, whatever it was before.
    pub fn replace_table(&mut self, table: &Table) -> Result<(), Error> {
        self.delete_table(table.family, &table.name);
        self.add_table(table.family, &table.name);
        for timeout in &table.timeouts {
            self.add_timeout(table, timeout);
        }
        for set in &table.sets {
            self.add_set(table, set);
        }
        for chain in &table.chains {
            self.add_chain(table, chain);
        }
        self.add_chain(table, &Chain::regular(table.plan_mark(), []));
        for set in &table.sets {
            self.elements(NEWSETELEM, table, set, &set.elements)?;
        }
        for chain in &table.chains {
            for rule in &chain.rules {
                self.add_rule(table, chain, rule)?;
            }
        }
        Ok(())
    }

    /// Turns `old` into `new`: by elements alone if chains, rules and sets are equal, otherwise by replacement. Empty if
    /// they are equal.
    pub fn update_table(&mut self, old: &Table, new: &Table) -> Result<(), Error> {
        if old == new {
            return Ok(());
        }
        let same_shape = old.family == new.family
            && old.name == new.name
            && old.chains == new.chains
            && old.timeouts == new.timeouts
            && old.sets.len() == new.sets.len()
            && old.sets.iter().zip(&new.sets).all(|(a, b)| {
                a == b
                    || (!b.dynamic
                        && Set {
                            elements: Vec::new(),
                            ..a.clone()
                        } == Set {
                            elements: Vec::new(),
                            ..b.clone()
                        })
            });
        if !same_shape {
            return self.replace_table(new);
        }
        for (a, b) in old.sets.iter().zip(&new.sets) {
            let (before, after): (std::collections::HashSet<_>, std::collections::HashSet<_>) =
                (a.elements.iter().collect(), b.elements.iter().collect());
            let gone: Vec<Element> = a.elements.iter().filter(|e| !after.contains(e)).cloned().collect();
            let come: Vec<Element> = b.elements.iter().filter(|e| !before.contains(e)).cloned().collect();
            self.elements(DELSETELEM, new, b, &gone)?;
            self.elements(NEWSETELEM, new, b, &come)?;
        }
        self.push(DELCHAIN, 0, old.family, "move the plan mark".to_owned(), |a| {
            a.text(1, &old.name).text(3, &old.plan_mark());
        });
        self.add_chain(new, &Chain::regular(new.plan_mark(), []));
        Ok(())
    }

    /// Adds elements to a set of an existing table. The plan mark no longer tells the table's content after this.
    pub fn add_elements(&mut self, table: &Table, set: &Set, elements: &[Element]) -> Result<(), Error> {
        self.elements(NEWSETELEM, table, set, elements)
    }

    /// Deletes elements; one that is not there fails the whole batch.
    pub fn delete_elements(&mut self, table: &Table, set: &Set, elements: &[Element]) -> Result<(), Error> {
        self.elements(DELSETELEM, table, set, elements)
    }

    fn add_set(&mut self, table: &Table, set: &Set) {
        let (key_type, key_len) = type_and_length(&set.key);
        let concatenated = set.interval && set.key.len() > 1;
        let mut flags = 0;
        for (on, flag) in [
            (set.interval, SET_INTERVAL),
            (concatenated, SET_CONCAT),
            (set.value.is_some(), SET_MAP),
            (set.dynamic, SET_EVAL),
            (set.timeout_ms.is_some(), SET_TIMEOUT),
        ] {
            flags |= if on { flag } else { 0 };
        }
        self.next_id += 1;
        let id = self.next_id;
        self.push(
            NEWSET,
            NLM_F_CREATE,
            table.family,
            format!("add set {} of {}", set.name, table.name),
            |a| {
                a.text(1, &table.name)
                    .text(2, &set.name)
                    .u32(3, flags)
                    .u32(4, key_type)
                    .u32(5, key_len)
                    .u32(10, id);
                match &set.value {
                    Some(ValueType::Verdict) => {
                        a.u32(6, VERDICT_TYPE).u32(7, 0);
                    }
                    Some(ValueType::Data(fields)) => {
                        let (data_type, data_len) = type_and_length(fields);
                        a.u32(6, data_type).u32(7, data_len);
                    }
                    None => {}
                }
                if concatenated {
                    a.nest(9, |desc| {
                        desc.nest(2, |list| {
                            for field in &set.key {
                                list.nest(1, |e| {
                                    e.u32(1, field.len() as u32);
                                });
                            }
                        });
                    });
                }
                if let Some(ms) = set.timeout_ms {
                    a.u64(11, ms);
                }
            },
        );
    }

    fn add_timeout(&mut self, table: &Table, timeout: &CtTimeout) {
        const NFPROTO_IPV4: u16 = 2;
        const TCP_ESTABLISHED: u16 = 3;
        const UDP_UNREPLIED: u16 = 1;
        const UDP_REPLIED: u16 = 2;
        let states = match timeout.protocol {
            TCP => &[TCP_ESTABLISHED][..],
            _ => &[UDP_UNREPLIED, UDP_REPLIED],
        };
        let what = format!("add timeout {} of {}", timeout.name, table.name);
        self.push(NEWOBJECT, NLM_F_CREATE, table.family, what, |a| {
            a.text(1, &table.name)
                .text(2, &timeout.name)
                .u32(3, OBJECT_CT_TIMEOUT)
                .nest(4, |data| {
                    data.bytes(1, &NFPROTO_IPV4.to_be_bytes())
                        .u8(2, timeout.protocol)
                        .nest(3, |policy| {
                            for state in states {
                                policy.u32(*state, timeout.idle_s);
                            }
                        });
                });
        });
    }

    fn add_chain(&mut self, table: &Table, chain: &Chain) {
        let what = format!("add chain {} of {}", chain.name, table.name);
        self.push(NEWCHAIN, NLM_F_CREATE, table.family, what, |a| {
            a.text(1, &table.name).text(3, &chain.name);
            if let Some(hook) = &chain.hook {
                a.nest(4, |h| {
                    h.u32(1, hook.point.number(table.family)).u32(2, hook.priority as u32);
                });
                a.u32(5, u32::from(!hook.drop));
                a.text(
                    7,
                    match hook.kind {
                        ChainKind::Filter => "filter",
                        ChainKind::Nat => "nat",
                        ChainKind::Route => "route",
                    },
                );
            }
        });
    }

    fn add_rule(&mut self, table: &Table, chain: &Chain, rule: &super::Rule) -> Result<(), Error> {
        let encoder = RuleEncoder::new(table.family == Family::Inet, &mut self.next_id);
        let (expressions, inline) = encoder.finish(rule)?;
        for map in inline {
            self.inline_map(table, map.id, map.values)?;
        }
        let about = rule.comment.as_deref().unwrap_or("without comment");
        let what = format!("add a rule ({about}) to chain {} of {}", chain.name, table.name);
        self.push(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, table.family, what, |a| {
            a.text(1, &table.name)
                .text(2, &chain.name)
                .nest(4, |e| e.0.extend(expressions));
            if let Some(comment) = &rule.comment {
                // A type-length-value list; type 0 is the comment, closed by a zero byte.
                let text: String = comment.chars().filter(char::is_ascii).take(120).collect();
                let mut data = vec![0, text.len() as u8 + 1];
                data.extend(text.as_bytes());
                data.push(0);
                a.bytes(7, &data);
            }
        });
        Ok(())
    }

    fn inline_map(&mut self, table: &Table, id: u32, values: InlineValues) -> Result<(), Error> {
        let (data_type, data_len) = match &values {
            InlineValues::Verdicts(_) => (VERDICT_TYPE, 0),
            InlineValues::Targets(_) => type_and_length(&TARGET),
            InlineValues::Addresses(_) => type_and_length(&TARGET[..1]),
        };
        let data = match &values {
            InlineValues::Addresses(_) => &TARGET[..1],
            _ => &TARGET[..],
        };
        let (key_type, key_len) = type_and_length(&[Field::Integer]);
        let what = || format!("add an unnamed map of {}", table.name);
        self.push(NEWSET, NLM_F_CREATE, table.family, what(), |a| {
            a.text(1, &table.name)
                .text(2, INLINE_NAME)
                .u32(3, SET_ANONYMOUS | SET_CONSTANT | SET_MAP);
            a.u32(4, key_type)
                .u32(5, key_len)
                .u32(6, data_type)
                .u32(7, data_len)
                .u32(10, id);
            // For listings: the numbers are in host byte order.
            a.bytes(13, &[0, 4, 1, 0, 0, 0]);
        });
        let numbered = |n: usize, value| Element {
            key: vec![Datum::Integer(n as u32)],
            value: Some(value),
        };
        let elements: Vec<Element> = match values {
            InlineValues::Verdicts(v) => v
                .into_iter()
                .map(Value::Verdict)
                .enumerate()
                .map(|(n, v)| numbered(n, v))
                .collect(),
            InlineValues::Targets(t) => {
                let datum = |(address, port)| Value::Data(vec![Datum::Ip(address), Datum::Port(port)]);
                t.into_iter()
                    .map(datum)
                    .enumerate()
                    .map(|(n, v)| numbered(n, v))
                    .collect()
            }
            InlineValues::Addresses(a) => a
                .into_iter()
                .map(|a| Value::Data(vec![Datum::Ip(a)]))
                .enumerate()
                .map(|(n, v)| numbered(n, v))
                .collect(),
        };
        for chunk in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let mut list = Attributes::default();
            for element in chunk {
                encode_element(&mut list, &[Field::Integer], Some(data), false, element, NEWSETELEM)?;
            }
            self.push(NEWSETELEM, NLM_F_CREATE, table.family, what(), |a| {
                a.text(1, &table.name)
                    .text(2, INLINE_NAME)
                    .u32(4, id)
                    .nest(3, |l| l.0.extend(list.0));
            });
        }
        Ok(())
    }

    fn elements(&mut self, kind: u8, table: &Table, set: &Set, elements: &[Element]) -> Result<(), Error> {
        let fields = match &set.value {
            Some(ValueType::Data(fields)) => Some(&fields[..]),
            _ => None,
        };
        for chunk in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let mut list = Attributes::default();
            for element in chunk {
                encode_element(&mut list, &set.key, fields, set.interval, element, kind)?;
            }
            let verb = if kind == NEWSETELEM { "add" } else { "delete" };
            let what = format!("{verb} {} elements of {} in {}", chunk.len(), set.name, table.name);
            let flags = if kind == NEWSETELEM { NLM_F_CREATE } else { 0 };
            self.push(kind, flags, table.family, what, |a| {
                a.text(1, &table.name)
                    .text(2, &set.name)
                    .nest(3, |l| l.0.extend(list.0));
            });
        }
        Ok(())
    }
}

/// Address and port, the value of a choice of translation targets.
const TARGET: [Field; 2] = [Field::IpDaddr, Field::Dport];

fn encode_element(
    list: &mut Attributes,
    key: &[Field],
    data: Option<&[Field]>,
    interval: bool,
    element: &Element,
    kind: u8,
) -> Result<(), Error> {
    let mut encoded_value = Attributes::default();
    match &element.value {
        // A deletion names the key alone.
        _ if kind == DELSETELEM => {}
        Some(Value::Verdict(v)) => verdict(&mut encoded_value, 2, v),
        Some(Value::Data(d)) => {
            let bytes = exact(data.unwrap_or_default(), d)?;
            encoded_value.nest(2, |v| {
                v.bytes(1, &bytes);
            });
        }
        None => {}
    }
    let key_attribute = |e: &mut Attributes, kind, bytes: &[u8]| {
        e.nest(kind, |v| {
            v.bytes(1, bytes);
        });
    };
    if !interval {
        let bytes = exact(key, &element.key)?;
        list.nest(1, |e| {
            key_attribute(e, 1, &bytes);
            e.0.extend(&encoded_value.0);
        });
        return Ok(());
    }
    let (first, last) = key_bounds(key, &element.key)?;
    list.nest(1, |e| {
        key_attribute(e, 1, &first);
        if key.len() > 1 {
            key_attribute(e, 10, &last);
        }
        e.0.extend(&encoded_value.0);
    });
    if key.len() == 1
        && let Some(beyond) = successor(&last)
    {
        // One field: the end is an element of its own, the first value that is no longer inside.
        list.nest(1, |e| {
            key_attribute(e, 1, &beyond);
            e.u32(3, ELEMENT_INTERVAL_END);
        });
    }
    Ok(())
}

/// The next big-endian number, `None` after the last.
fn successor(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut out = bytes.to_vec();
    for byte in out.iter_mut().rev() {
        let (next, wrapped) = byte.overflowing_add(1);
        *byte = next;
        if !wrapped {
            return Some(out);
        }
    }
    None
}

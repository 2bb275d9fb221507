//! nftables without the `nft` program: tables as plain data, applied in one transaction.
//!
//! A caller builds a [`Table`] and calls [`Nft::ensure`]: it reads one chain name, and only if the table is not made from
//! the same plan it is replaced, atomically, with connections kept (connection tracking does not depend on rules).
//! A caller that remembers its last table uses [`Nft::update`], which changes set elements alone where it can.
//!
//! Only IPv4 is translated; IPv6 fields can be matched.

use std::io;

use thiserror::Error;

use crate::netlink::{self, Attributes, Socket, attributes, error_of};
use crate::netns::NetNs;

mod batch;
mod encode;
mod model;
mod rule;

pub use batch::Batch;
pub use model::{
    Chain, ChainKind, CtTimeout, Datum, Element, Family, Field, Hook, HookPoint, ICMP, ICMP6, Set, TCP, Table, UDP,
    Value, ValueType, Verdict,
};
pub use rule::{
    Balance, CT_ESTABLISHED, CT_INVALID, CT_NEW, CT_RELATED, CT_STATUS_DNAT, CT_STATUS_SNAT, NatTarget, Reject, Rule,
    Statement, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN,
};

const NETLINK_NETFILTER: isize = 12;
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const GETTABLE: u8 = 1;
const GETCHAIN: u8 = 4;
const GETRULE: u8 = 7;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;

#[derive(Debug, Error)]
pub enum Error {
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    #[error("link name {name:?} is longer than 15 bytes")]
    LinkName { name: String },
    #[error("{datum:?} is not a value of {field:?}")]
    Mismatch { field: Field, datum: Datum },
    #[error("a key of {data} values for {fields} fields")]
    KeyLength { fields: usize, data: usize },
    #[error("{data:?} is a range where a single value is needed")]
    NotExact { data: Vec<Datum> },
    #[error("{field:?} cannot be read from a packet")]
    NotLoadable { field: Field },
    #[error("a key of {slots} registers, 16 are there")]
    TooManyFields { slots: u32 },
    #[error("a choice between no alternatives")]
    NoChoice,
}

/// What [`Nft::ensure`] did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    None,
    Changed,
}

/// A rule's counter.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Counter {
    pub chain: String,
    /// The rule's comment, empty if it has none.
    pub comment: String,
    pub packets: u64,
    pub bytes: u64,
}

/// A blocking nftables socket of one network namespace.
pub struct Nft {
    socket: Socket,
}

impl Nft {
    /// Opens a socket in the calling thread's namespace.
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            socket: Socket::open(NETLINK_NETFILTER)?,
        })
    }

    /// Opens a socket in `ns`; it stays there.
    pub fn open_in(ns: &NetNs) -> Result<Self, Error> {
        ns.run(Self::open).map_err(|e| netlink::Error::Open {
            source: io::Error::other(e),
        })?
    }

    /// Makes all changes of the batch, or none. The error names the first change that was refused.
    pub fn apply(&mut self, batch: &Batch) -> Result<(), Error> {
        if batch.is_empty() {
            return Ok(());
        }
        let count = batch.messages.len() as u32;
        let first = self.socket.take_sequences(count + 2);
        let mut bytes = Vec::new();
        frame(&mut bytes, BATCH_BEGIN, NLM_F_REQUEST, first, 0, SUBSYSTEM, &[]);
        for (message, n) in batch.messages.iter().zip(1u32..) {
            // The last one's acknowledgement tells that the whole batch went through.
            let flags = NLM_F_REQUEST | message.flags | if n == count { NLM_F_ACK } else { 0 };
            frame(
                &mut bytes,
                kind(message.kind),
                flags,
                first + n,
                message.family,
                0,
                &message.body,
            );
        }
        frame(
            &mut bytes,
            BATCH_END,
            NLM_F_REQUEST,
            first + count + 1,
            0,
            SUBSYSTEM,
            &[],
        );
        let what = &batch.messages[0].what;
        self.socket
            .reserve_send(bytes.len().saturating_mul(2).max(256 * 1024))?;
        self.socket.send(&bytes, what)?;
        // The kernel answered while it took the batch, so everything there is to read is there.
        let (mut done, mut refused) = (false, None);
        while self.socket.receive(false, what, |frame| {
            let at = frame.sequence.wrapping_sub(first);
            if frame.kind != NLMSG_ERROR || at > count + 1 {
                return Ok(());
            }
            let message = batch.messages.get((at as usize).wrapping_sub(1));
            match error_of(&frame, message.map_or("apply the batch", |m| &m.what)) {
                Some(e) => refused = refused.take().or(Some(e)),
                None => done = true,
            }
            Ok(())
        })? {}
        match refused {
            Some(e) => Err(e.into()),
            None if done => Ok(()),
            None => Err(netlink::Error::NoAnswer { what: what.clone() }.into()),
        }
    }

    /// Makes the table as given unless it is already made from the same plan.
    pub fn ensure(&mut self, table: &Table) -> Result<Change, Error> {
        if self.has_chain(table.family, &table.name, &table.plan_mark())? {
            return Ok(Change::None);
        }
        let mut batch = Batch::new();
        batch.replace_table(table)?;
        self.apply(&batch)?;
        Ok(Change::Changed)
    }

    /// Turns `old`, which must be what is there, into `new`; only set elements are touched if nothing else differs.
    pub fn update(&mut self, old: &Table, new: &Table) -> Result<Change, Error> {
        let mut batch = Batch::new();
        batch.update_table(old, new)?;
        self.apply(&batch)?;
        Ok(if batch.is_empty() {
            Change::None
        } else {
            Change::Changed
        })
    }

    /// Deletes a table with all it holds; success if there is none.
    pub fn delete_table(&mut self, family: Family, name: &str) -> Result<(), Error> {
        let mut batch = Batch::new();
        batch.delete_table(family, name);
        self.apply(&batch)
    }

    /// Every table: family number and name.
    pub fn tables(&mut self) -> Result<Vec<(u8, String)>, Error> {
        self.list(GETTABLE, 0, Vec::new(), "list tables", |family, a| {
            a.text(1).map(|name| (family, name))
        })
    }

    /// Whether there is such a chain, without listing the others.
    pub fn has_chain(&mut self, family: Family, table: &str, chain: &str) -> Result<bool, Error> {
        let what = format!("look up chain {chain} of {table}");
        let mut body = Attributes::default();
        body.text(1, table).text(3, chain);
        let sequence = self.socket.take_sequences(1);
        let mut bytes = Vec::new();
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        frame(&mut bytes, kind(GETCHAIN), flags, sequence, family as u8, 0, &body.0);
        self.socket.send(&bytes, &what)?;
        let mut answer = None;
        while answer.is_none() {
            self.socket.receive(true, &what, |frame| {
                if frame.kind == NLMSG_ERROR && frame.sequence == sequence {
                    answer = Some(error_of(&frame, &what));
                }
                Ok(())
            })?;
        }
        match answer.flatten() {
            None => Ok(true),
            Some(e) if e.errno() == Some(libc::ENOENT) => Ok(false),
            Some(e) => Err(e.into()),
        }
    }

    /// Names of a table's chains; none if there is no such table.
    pub fn chains(&mut self, family: Family, table: &str) -> Result<Vec<String>, Error> {
        self.list(GETCHAIN, family as u8, Vec::new(), "list chains", |_, a| {
            if a.text(1)? == table { a.text(3) } else { None }
        })
    }

    /// Counters of a table's rules, in rule order; rules without a counter are left out.
    pub fn counters(&mut self, family: Family, table: &str) -> Result<Vec<Counter>, Error> {
        self.list(GETRULE, family as u8, Vec::new(), "list rules", |_, a| {
            if a.text(1)? != table {
                return None;
            }
            let (packets, bytes) = attributes(a.get(4)?).find_map(|(_, expression)| {
                let expression = View(expression);
                let data = View(expression.get(2)?);
                let number = |kind| Some(u64::from_be_bytes(data.get(kind)?.try_into().ok()?));
                (expression.text(1)? == "counter").then_some((number(2)?, number(1)?))
            })?;
            let comment = a.get(7).and_then(|u| match u {
                [0, length, text @ ..] => text.get(..(*length as usize).saturating_sub(1)),
                _ => None,
            });
            let comment = String::from_utf8_lossy(comment.unwrap_or_default()).into_owned();
            Some(Counter {
                chain: a.text(2)?,
                comment,
                packets,
                bytes,
            })
        })
    }

    fn list<T>(
        &mut self,
        get: u8,
        family: u8,
        body: Vec<u8>,
        what: &str,
        pick: impl Fn(u8, View<'_>) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let request = |sequence| {
            let mut bytes = Vec::new();
            frame(
                &mut bytes,
                kind(get),
                NLM_F_REQUEST | NLM_F_DUMP,
                sequence,
                family,
                0,
                &body,
            );
            bytes
        };
        Ok(self.socket.dump(request, what, |frame| {
            let malformed = || netlink::Error::Malformed { what: what.to_owned() };
            let family = *frame.payload.first().ok_or_else(malformed)?;
            Ok(pick(family, View(frame.payload.get(4..).ok_or_else(malformed)?)))
        })?)
    }
}

const NLMSG_ERROR: u16 = 2;

fn kind(message: u8) -> u16 {
    SUBSYSTEM << 8 | u16::from(message)
}

pub(crate) fn frame(out: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, body: &[u8]) {
    let size = (16 + 4 + body.len()) as u32;
    out.extend(size.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend([0; 4]);
    out.extend([family, 0]);
    out.extend(resource.to_be_bytes());
    out.extend(body);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Attributes of one level.
#[derive(Clone, Copy)]
struct View<'a>(&'a [u8]);

impl<'a> View<'a> {
    fn get(self, kind: u16) -> Option<&'a [u8]> {
        attributes(self.0).find(|(k, _)| *k == kind).map(|(_, value)| value)
    }

    fn text(self, kind: u16) -> Option<String> {
        Some(
            String::from_utf8_lossy(self.get(kind)?)
                .trim_end_matches('\0')
                .to_owned(),
        )
    }
}

#[cfg(test)]
mod tests;

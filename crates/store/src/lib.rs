//! Revisioned byte KV with transactions and watch. Knows no Kubernetes.
//!
//! A process opens one [`Engine`]; every hosted cluster is one [`Keyspace`] in it. A write is a [`Txn`]: a list of
//! checks on modification revisions and a list of puts and deletes that take effect together, durably, at one new
//! [`Revision`]. Committed transactions come out twice, in commit order: synchronously to the keyspace's one
//! [`Observer`] (before the writer is answered, so that an in-memory index is never behind an acknowledgement), and to
//! any number of [`Watch`]es, each a cursor on a bounded history.
//!
//! The engine does not cache values: readers keep what they need (the API server holds every object). It keeps one
//! number per key, the modification revision that checks compare.
//!
//! Engines: [`LocalEngine`] (fjall, group commit, one fdatasync per batch), [`EtcdEngine`] (an etcd that several processes
//! share) and [`ModelEngine`] (in memory, deterministic, for tests and simulation). `tests/conformance.rs` runs one suite
//! on all.

mod core;
mod etcd;
mod history;
mod local;
mod model;

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

pub use etcd::{ETCD_TXN_OPS_MAX, EtcdConfig, EtcdEngine, EtcdTls};
pub use history::{Watch, WatchError};
pub use local::{LocalEngine, LocalStats};
pub use model::ModelEngine;

/// Position in a keyspace's history. Strictly increasing per keyspace, gaps allowed, 0 before the first write.
pub type Revision = u64;

/// Largest number of operations in one transaction.
pub const TXN_OPS_MAX: usize = 4096;
/// Largest key plus value of one operation, in bytes.
pub const ENTRY_BYTES_MAX: usize = 8 * 1024 * 1024;

/// An opaque companion of a written value that travels to the observer and the watches of this process and is never
/// stored (the API server passes the header it already parsed).
pub type Attachment = Arc<dyn Any + Send + Sync>;

/// A precondition: the key's last write happened at exactly `mod_rev`; 0 means the key is absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub key: Bytes,
    pub mod_rev: Revision,
}

impl Check {
    /// Requires that `key` does not exist.
    pub fn absent(key: impl Into<Bytes>) -> Self {
        Self {
            key: key.into(),
            mod_rev: 0,
        }
    }

    /// Requires that `key` was last written at `mod_rev`.
    pub fn at(key: impl Into<Bytes>, mod_rev: Revision) -> Self {
        Self {
            key: key.into(),
            mod_rev,
        }
    }
}

/// One effect of a transaction.
#[derive(Clone)]
pub enum Op {
    Put {
        key: Bytes,
        value: Bytes,
        attachment: Option<Attachment>,
    },
    Delete {
        key: Bytes,
        attachment: Option<Attachment>,
    },
}

impl Op {
    pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Op::Put {
            key: key.into(),
            value: value.into(),
            attachment: None,
        }
    }

    pub fn delete(key: impl Into<Bytes>) -> Self {
        Op::Delete {
            key: key.into(),
            attachment: None,
        }
    }

    /// The same operation with `attachment` travelling beside it.
    pub fn with(mut self, new: Attachment) -> Self {
        match &mut self {
            Op::Put { attachment, .. } | Op::Delete { attachment, .. } => *attachment = Some(new),
        }
        self
    }

    pub fn key(&self) -> &Bytes {
        match self {
            Op::Put { key, .. } | Op::Delete { key, .. } => key,
        }
    }

    fn size(&self) -> usize {
        match self {
            Op::Put { key, value, .. } => key.len() + value.len(),
            Op::Delete { key, .. } => key.len(),
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Put { key, value, .. } => write!(f, "Put({key:?}, {} bytes)", value.len()),
            Op::Delete { key, .. } => write!(f, "Delete({key:?})"),
        }
    }
}

/// One committed transaction.
#[derive(Clone, Debug)]
pub struct Batch {
    pub revision: Revision,
    pub ops: Arc<[Op]>,
}

/// One stored key at its newest revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: Bytes,
    pub value: Bytes,
    pub mod_rev: Revision,
}

/// Sees every committed transaction of a keyspace, in order, from one thread at a time, before its writer is answered.
/// Transactions of other processes come without attachments.
///
/// # Assumptions
/// `committed` is quick (it runs on the engine's committer thread) and never writes to the engine.
pub trait Observer: Send + Sync + 'static {
    fn committed(&self, batch: &Batch);
}

/// Why a store operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("precondition on key {key:?} failed: expected revision {expected}, found {found}")]
    Conflict {
        key: Bytes,
        expected: Revision,
        found: Revision,
    },
    #[error("transaction has {what} of {size}, more than {max}")]
    TooLarge {
        what: &'static str,
        size: usize,
        max: usize,
    },
    #[error("invalid keyspace name {0:?}")]
    InvalidName(String),
    #[error("keyspace {0:?} was dropped")]
    Dropped(String),
    #[error("the store is closed")]
    Closed,
    #[error("the store stopped after a failed write; restart to recover the acknowledged state")]
    Poisoned,
    #[error("etcd did not say whether the transaction happened; read before trying again")]
    Indeterminate {
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{action} the store failed")]
    Io {
        action: &'static str,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("stored entry under key {key:?} is malformed: {reason}")]
    Corrupt { key: Bytes, reason: &'static str },
}

impl Error {
    /// True when the caller lost a race and may read again and retry.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Error::Conflict { .. })
    }
}

/// A set of keyspaces that share one committer.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// Opens the keyspace, creating it durably if it does not exist. Blocks on disk the first time. Later calls return
    /// the same handle.
    fn keyspace(&self, name: &str) -> Result<Arc<dyn Keyspace>, Error>;
    /// Deletes the keyspace with all it holds. Succeeds when there is none. Later writes through old handles fail
    /// with [`Error::Dropped`].
    async fn drop_keyspace(&self, name: &str) -> Result<(), Error>;
    /// Names of all keyspaces, ascending.
    fn list_keyspaces(&self) -> Vec<String>;
}

/// One revisioned map of bytes.
#[async_trait]
pub trait Keyspace: Send + Sync + 'static {
    fn name(&self) -> &str;
    /// Revision of the newest committed transaction.
    fn revision(&self) -> Revision;
    /// Feeds every entry whose key starts with `prefix` to `each`, ascending by byte order. Reads disk: for opening
    /// and recovery, not for serving. Transactions that commit meanwhile may or may not be seen.
    fn range(&self, prefix: &[u8], each: &mut dyn FnMut(Entry)) -> Result<(), Error>;
    /// Commits `ops` at one new revision if every check holds against the state before it.
    ///
    /// # Guarantees
    /// `Ok` means durable. An `Err` other than [`Error::Closed`], [`Error::Poisoned`] and [`Error::Indeterminate`] means
    /// nothing was written.
    ///
    /// # Cancel safety
    /// A dropped future may or may not have committed.
    async fn txn(&self, checks: Vec<Check>, ops: Vec<Op>) -> Result<Revision, Error>;
    /// Transactions after `after`, in order. `Compacted` if `after` is older than the history kept.
    fn watch(&self, after: Revision) -> Result<Watch, WatchError>;
    /// Installs the observer of all later transactions, replacing an earlier one.
    fn observe(&self, observer: Arc<dyn Observer>);
    /// Whether other processes write here, too, so that what this one has seen may be old.
    fn is_shared(&self) -> bool {
        false
    }
    /// Waits until everything that was committed before the call, by any process, has been observed here. At once where
    /// only this process writes.
    async fn sync(&self) -> Result<(), Error> {
        Ok(())
    }
    /// Largest number of operations that one transaction takes here.
    fn txn_ops_max(&self) -> usize {
        TXN_OPS_MAX
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    let ok = !name.is_empty()
        && name.len() <= 200
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if ok {
        Ok(())
    } else {
        Err(Error::InvalidName(name.to_owned()))
    }
}

fn check_size(checks: &[Check], ops: &[Op]) -> Result<(), Error> {
    let count = checks.len().max(ops.len());
    if count > TXN_OPS_MAX {
        return Err(Error::TooLarge {
            what: "a number of operations",
            size: count,
            max: TXN_OPS_MAX,
        });
    }
    match ops.iter().map(Op::size).max() {
        Some(size) if size > ENTRY_BYTES_MAX => Err(Error::TooLarge {
            what: "an entry size in bytes",
            size,
            max: ENTRY_BYTES_MAX,
        }),
        _ => Ok(()),
    }
}

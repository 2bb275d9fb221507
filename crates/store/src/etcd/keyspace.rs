//! One keyspace in etcd.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use prost::Message;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tonic::Code;

use super::client::{Client, failed};
use super::wire::{self, Compare, KeyValue, RangeRequest, TxnRequest};
use super::{ETCD_TXN_OPS_MAX, block_on, prefix_end, pump};
use crate::core::Core;
use crate::{Batch, Check, Entry, Error, Keyspace, Observer, Op, Revision, Watch, WatchError, check_size};

/// Entries read at once.
const PAGE: i64 = 1000;
/// etcd's default `--max-request-bytes`, for messages: the server decides.
const ETCD_REQUEST_BYTES_MAX: usize = 1536 * 1024;
/// How long a writer waits for its own transaction to come back, and a reader for what others wrote.
const CATCH_UP: Duration = Duration::from_secs(10);

pub fn index_key(prefix: &str, name: &str) -> Bytes {
    format!("{prefix}n/{name}").into()
}

pub fn data_prefix(prefix: &str, name: &str) -> Bytes {
    format!("{prefix}s/{name}/").into()
}

pub struct EtcdKeyspace {
    pub(super) core: Core,
    pub(super) client: Client,
    runtime: Handle,
    /// `<prefix>s/<name>/`.
    pub(super) root: Bytes,
    /// etcd's revision when the keyspace was opened; what is read before the pump runs is read at it.
    opened: i64,
    /// When the mark was made: what tells this keyspace from another of the same name.
    pub(super) created: i64,
    writer: u64,
    sequence: AtomicU64,
    /// Own transactions on their way, by sequence: their operations with attachments.
    in_flight: Mutex<HashMap<u64, Arc<[Op]>>>,
    /// Newest etcd revision that the pump has passed.
    passed: watch::Sender<i64>,
    dropped: AtomicBool,
    pumping: AtomicBool,
    me: Weak<EtcdKeyspace>,
}

impl EtcdKeyspace {
    /// Makes the keyspace if there is none, and notes where it stands.
    pub(super) async fn open_in(
        client: Client,
        runtime: Handle,
        (prefix, name): (String, String),
        writer: u64,
    ) -> Result<Arc<Self>, Error> {
        let root = data_prefix(&prefix, &name);
        let mark = join(&root, b"m", b"");
        let request = TxnRequest {
            compare: vec![Compare::created_at(mark.clone(), 0)],
            success: vec![
                wire::put(mark.clone(), mark_value(0, 0)),
                wire::put(index_key(&prefix, &name), Bytes::new()),
            ],
            failure: Vec::new(),
        };
        client.idempotent_txn(request).await?;
        let request = RangeRequest {
            key: mark,
            keys_only: true,
            ..RangeRequest::default()
        };
        let found = client.range(request).await?;
        let Some(kv) = found.kvs.first() else {
            return Err(Error::Dropped(name));
        };
        let opened = found.header.as_ref().map_or(kv.mod_revision, |h| h.revision);
        Ok(Arc::new_cyclic(|me| Self {
            core: Core::new(&name, HashMap::new(), kv.mod_revision as Revision),
            client,
            runtime,
            root,
            opened,
            created: kv.create_revision,
            writer,
            sequence: AtomicU64::new(1),
            in_flight: Mutex::default(),
            passed: watch::Sender::new(opened),
            dropped: AtomicBool::new(false),
            pumping: AtomicBool::new(false),
            me: me.clone(),
        }))
    }

    pub(super) fn open(
        client: Client,
        runtime: Handle,
        prefix: &str,
        name: &str,
        writer: u64,
    ) -> impl Future<Output = Result<Arc<Self>, Error>> + Send + 'static {
        Self::open_in(client, runtime, (prefix.to_owned(), name.to_owned()), writer)
    }

    pub(super) fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::Acquire)
    }

    pub(super) fn mark_dropped(&self) {
        self.dropped.store(true, Ordering::Release);
        self.core.mark_dropped();
        // Whoever waits for the pump looks again.
        self.passed.send_modify(|_| {});
    }

    /// Follows etcd from where the keyspace was opened. Once.
    fn start(&self) {
        if self.pumping.swap(true, Ordering::AcqRel) {
            return;
        }
        self.runtime.spawn(pump::run(self.me.clone(), self.opened));
    }

    pub(super) fn entry_key<'k>(&self, key: &'k Bytes) -> Option<&'k [u8]> {
        key.strip_prefix(&*self.root)?.strip_prefix(b"d")
    }

    pub(super) fn is_mark(&self, key: &Bytes) -> bool {
        key.strip_prefix(&*self.root) == Some(b"m")
    }

    /// The operations of the transaction that wrote `mark`, if it was this process's.
    pub(super) fn own_ops(&self, mark: &[u8]) -> Option<Arc<[Op]>> {
        let (writer, rest) = mark.split_first_chunk::<8>()?;
        let sequence = u64::from_be_bytes(*rest.first_chunk::<8>()?);
        if u64::from_be_bytes(*writer) != self.writer {
            return None;
        }
        self.in_flight.lock().remove(&sequence)
    }

    pub(super) fn publish(&self, batch: Batch) {
        self.core.publish(batch);
    }

    pub(super) fn pass(&self, revision: i64) {
        self.passed.send_modify(|passed| *passed = revision.max(*passed));
    }

    /// Every entry whose key starts with `prefix` at etcd's revision `at`, without or with values.
    pub(super) async fn read(&self, prefix: &[u8], at: i64, keys_only: bool) -> Result<Vec<KeyValue>, Error> {
        let mut key = join(&self.root, b"d", prefix);
        let range_end = prefix_end_bytes(&key);
        let mut all = Vec::new();
        loop {
            let request = RangeRequest {
                key: key.clone(),
                range_end: range_end.clone(),
                limit: PAGE,
                revision: at,
                keys_only,
            };
            let page = self.client.range(request).await?;
            if let Some(last) = page.kvs.last() {
                // The smallest key after it.
                key = join(&last.key, b"\0", b"");
            }
            let more = page.more;
            all.extend(page.kvs);
            if !more {
                return Ok(all);
            }
        }
    }

    /// etcd's revision now, if the keyspace still exists.
    pub(super) async fn newest(&self) -> Result<i64, Error> {
        let request = RangeRequest {
            key: join(&self.root, b"m", b""),
            keys_only: true,
            ..RangeRequest::default()
        };
        let found = self.client.range(request).await?;
        match (found.kvs.first(), found.header) {
            (Some(kv), Some(header)) if kv.create_revision == self.created => Ok(header.revision),
            _ => Err(Error::Dropped(self.core.name.clone())),
        }
    }

    /// Waits until the pump has passed `revision`.
    async fn caught_up(&self, revision: i64) -> Result<(), Error> {
        let mut passed = self.passed.subscribe();
        let waiting = passed.wait_for(|at| *at >= revision || self.is_dropped());
        match tokio::time::timeout(CATCH_UP, waiting).await {
            Ok(Ok(_)) if self.is_dropped() => Err(Error::Dropped(self.core.name.clone())),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::Closed),
            Err(_) => Err(failed(
                "following",
                format!("revision {revision} did not come from etcd's watch in 10 s").into(),
            )),
        }
    }

    async fn propose(&self, checks: Vec<Check>, ops: Vec<Op>) -> Result<Revision, Error> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let mark = join(&self.root, b"m", b"");
        let mut compare = vec![Compare::created_at(mark.clone(), self.created)];
        let mut failure = vec![wire::get(mark.clone())];
        for check in &checks {
            let key = join(&self.root, b"d", &check.key);
            compare.push(Compare::modified_at(key.clone(), check.mod_rev as i64));
            failure.push(wire::get(key));
        }
        let mut success: Vec<_> = ops
            .iter()
            .map(|op| match op {
                Op::Put { key, value, .. } => wire::put(join(&self.root, b"d", key), value.clone()),
                Op::Delete { key, .. } => wire::delete(join(&self.root, b"d", key), Bytes::new()),
            })
            .collect();
        success.push(wire::put(mark, mark_value(self.writer, sequence)));
        let request = TxnRequest {
            compare,
            success,
            failure,
        };
        let size = request.encoded_len();
        self.in_flight.lock().insert(sequence, ops.into());
        let _forget = Forget {
            keyspace: self,
            sequence,
        };
        let response = match self.client.txn(request).await {
            Ok(response) => response,
            Err(status) => return Err(refused(status, size)),
        };
        if response.succeeded {
            let revision = response.header.map_or(0, |h| h.revision);
            self.caught_up(revision).await?;
            return Ok(revision as Revision);
        }
        let mut found = response.responses.iter().map(|r| {
            let kv = r.range.as_ref().and_then(|r| r.kvs.first());
            kv.map_or((0, 0), |kv| (kv.create_revision, kv.mod_revision as Revision))
        });
        if found.next().is_none_or(|(created, _)| created != self.created) {
            self.mark_dropped();
            return Err(Error::Dropped(self.core.name.clone()));
        }
        let lost = checks
            .into_iter()
            .zip(found)
            .find(|(check, (_, found))| *found != check.mod_rev);
        match lost {
            Some((check, (_, found))) => Err(Error::Conflict {
                key: check.key,
                expected: check.mod_rev,
                found,
            }),
            None => Err(failed(
                "writing",
                "etcd refused a transaction whose checks all hold".into(),
            )),
        }
    }
}

/// Takes an own transaction from the list whatever became of it.
struct Forget<'k> {
    keyspace: &'k EtcdKeyspace,
    sequence: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.keyspace.in_flight.lock().remove(&self.sequence);
    }
}

#[async_trait]
impl Keyspace for EtcdKeyspace {
    fn name(&self) -> &str {
        &self.core.name
    }

    fn revision(&self) -> Revision {
        self.core.revision()
    }

    /// Reads one state: that at opening until somebody observes, watches or writes, then the newest that has come in.
    fn range(&self, prefix: &[u8], each: &mut dyn FnMut(Entry)) -> Result<(), Error> {
        let at = *self.passed.borrow();
        let (me, prefix) = (self.me.upgrade().ok_or(Error::Closed)?, prefix.to_vec());
        let found = block_on(&self.runtime, async move { me.read(&prefix, at, false).await })?;
        for kv in found {
            let Some(key) = self.entry_key(&kv.key) else { continue };
            each(Entry {
                key: Bytes::copy_from_slice(key),
                value: kv.value,
                mod_rev: kv.mod_revision as Revision,
            });
        }
        Ok(())
    }

    async fn txn(&self, checks: Vec<Check>, ops: Vec<Op>) -> Result<Revision, Error> {
        check_size(&checks, &ops)?;
        let count = checks.len().max(ops.len());
        if count > ETCD_TXN_OPS_MAX {
            return Err(Error::TooLarge {
                what: "a number of operations",
                size: count,
                max: ETCD_TXN_OPS_MAX,
            });
        }
        if self.is_dropped() {
            return Err(Error::Dropped(self.core.name.clone()));
        }
        self.start();
        let me = self.me.upgrade().ok_or(Error::Closed)?;
        let proposing = self.runtime.spawn(async move { me.propose(checks, ops).await });
        proposing.await.map_err(|_| Error::Closed)?
    }

    fn watch(&self, after: Revision) -> Result<Watch, WatchError> {
        self.start();
        self.core.watch(after)
    }

    fn observe(&self, observer: Arc<dyn Observer>) {
        self.core.observe(observer);
        self.start();
    }

    fn is_shared(&self) -> bool {
        true
    }

    async fn sync(&self) -> Result<(), Error> {
        self.start();
        let me = self.me.upgrade().ok_or(Error::Closed)?;
        let syncing = self.runtime.spawn(async move {
            let request = RangeRequest {
                key: join(&me.root, b"m", b""),
                keys_only: true,
                ..RangeRequest::default()
            };
            let found = me.client.range(request).await?;
            match found.kvs.first() {
                Some(kv) if kv.create_revision == me.created => me.caught_up(kv.mod_revision).await,
                _ => {
                    me.mark_dropped();
                    Err(Error::Dropped(me.core.name.clone()))
                }
            }
        });
        syncing.await.map_err(|_| Error::Closed)?
    }

    fn txn_ops_max(&self) -> usize {
        ETCD_TXN_OPS_MAX
    }
}

fn join(root: &[u8], kind: &[u8], key: &[u8]) -> Bytes {
    let mut joined = BytesMut::with_capacity(root.len() + kind.len() + key.len());
    joined.put_slice(root);
    joined.put_slice(kind);
    joined.put_slice(key);
    joined.freeze()
}

/// As [`prefix_end`], for prefixes of any bytes below a keyspace's root.
fn prefix_end_bytes(prefix: &Bytes) -> Bytes {
    let kept = prefix.iter().rposition(|b| *b != 0xff).map_or(0, |at| at + 1);
    prefix_end(&prefix.slice(..kept))
}

fn mark_value(writer: u64, sequence: u64) -> Bytes {
    let mut value = BytesMut::with_capacity(16);
    value.put_u64(writer);
    value.put_u64(sequence);
    value.freeze()
}

/// What etcd's refusal of a transaction means. Only some codes say that nothing was written.
fn refused(status: tonic::Status, size: usize) -> Error {
    match status.code() {
        Code::InvalidArgument | Code::ResourceExhausted | Code::OutOfRange if is_size(status.message()) => {
            Error::TooLarge {
                what: "a size in bytes",
                size,
                max: ETCD_REQUEST_BYTES_MAX,
            }
        }
        Code::InvalidArgument
        | Code::ResourceExhausted
        | Code::OutOfRange
        | Code::FailedPrecondition
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented => failed("writing", Box::new(status)),
        _ => Error::Indeterminate {
            source: Box::new(status),
        },
    }
}

fn is_size(message: &str) -> bool {
    message.contains("too large") || message.contains("too many operations")
}

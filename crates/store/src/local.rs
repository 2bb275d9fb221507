//! The local engine: one fjall database per process, one fjall keyspace per hosted cluster, one committer thread.
//!
//! Writers queue transactions; the committer takes what is waiting (at most [`BATCH_TXNS_MAX`]), checks each against
//! the state that includes the ones before it, writes all of them as one fjall batch with one fdatasync, publishes
//! them in order and answers the writers. If the write fails the engine is poisoned: nothing of that batch was
//! acknowledged, and a restart recovers exactly what was.
//!
//! On disk, per fjall keyspace: `d` + key -> revision (8 bytes, big endian) + value, and `m` -> the newest revision,
//! which outlives deletions. fjall is log and recovery only, so its caches are small.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use fjall::{Database, KeyspaceCreateOptions, PersistMode};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::core::Core;
use crate::{
    Batch, Check, Engine, Entry, Error, Keyspace, Observer, Op, Revision, Watch, WatchError, check_name, check_size,
};

/// Transactions that may wait for the committer; more writers wait for room.
const QUEUE_TXNS_MAX: usize = 4096;
/// Transactions made durable by one fdatasync.
const BATCH_TXNS_MAX: usize = 512;
/// Bytes after which a batch is closed.
const BATCH_BYTES_MAX: usize = 16 * 1024 * 1024;
/// fjall's block cache: only recovery reads.
const CACHE_BYTES: u64 = 4 * 1024 * 1024;
/// fjall's memtable per keyspace: values already live in the API server's memory, so flush early.
const MEMTABLE_BYTES: u64 = 4 * 1024 * 1024;
/// fjall's smallest allowed journal budget.
const JOURNAL_BYTES: u64 = 64 * 1024 * 1024;

const DATA: u8 = b'd';
const META_REVISION: &[u8] = b"m";

/// Counters of the committer since the engine was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalStats {
    pub txns: u64,
    pub conflicts: u64,
    /// fdatasync calls; `txns / syncs` is the mean size of a group commit.
    pub syncs: u64,
    pub bytes: u64,
    /// Transactions waiting now, of at most 4096.
    pub queued: u64,
    /// Times a writer found the queue full and had to wait.
    pub queue_full: u64,
}

#[derive(Default)]
struct Counters {
    txns: AtomicU64,
    conflicts: AtomicU64,
    syncs: AtomicU64,
    bytes: AtomicU64,
    queue_full: AtomicU64,
}

/// Durable engine over one directory.
pub struct LocalEngine {
    db: Database,
    open: Mutex<BTreeMap<String, Arc<LocalKeyspace>>>,
    queue: mpsc::Sender<Request>,
    shared: Arc<Shared>,
}

struct Shared {
    poisoned: AtomicBool,
    counters: Counters,
}

enum Request {
    Txn {
        keyspace: Arc<LocalKeyspace>,
        checks: Vec<Check>,
        ops: Vec<Op>,
        done: oneshot::Sender<Result<Revision, Error>>,
    },
    Drop {
        keyspace: Arc<LocalKeyspace>,
        done: oneshot::Sender<Result<(), Error>>,
    },
}

impl LocalEngine {
    /// Opens or creates the database in `dir` and starts the committer thread. Blocks on disk.
    ///
    /// # Errors
    /// `Io` when another process holds the directory, or on a disk fault.
    pub fn open(dir: &Path) -> Result<Arc<Self>, Error> {
        let db = Database::builder(dir)
            .cache_size(CACHE_BYTES)
            .worker_threads(1)
            .max_cached_files(Some(64))
            .max_journaling_size(JOURNAL_BYTES)
            .manual_journal_persist(true)
            .open()
            .map_err(|e| io("opening", e))?;
        let (queue, requests) = mpsc::channel(QUEUE_TXNS_MAX);
        let shared = Arc::new(Shared {
            poisoned: AtomicBool::new(false),
            counters: Counters::default(),
        });
        let committer = Committer {
            db: db.clone(),
            shared: shared.clone(),
        };
        std::thread::Builder::new()
            .name("store-commit".to_owned())
            .spawn(move || committer.run(requests))
            .map_err(|e| io("starting the committer of", e))?;
        Ok(Arc::new(Self {
            db,
            open: Mutex::default(),
            queue,
            shared,
        }))
    }

    pub fn stats(&self) -> LocalStats {
        let c = &self.shared.counters;
        LocalStats {
            txns: c.txns.load(Ordering::Relaxed),
            conflicts: c.conflicts.load(Ordering::Relaxed),
            syncs: c.syncs.load(Ordering::Relaxed),
            bytes: c.bytes.load(Ordering::Relaxed),
            queued: (self.queue.max_capacity() - self.queue.capacity()) as u64,
            queue_full: c.queue_full.load(Ordering::Relaxed),
        }
    }
}

#[async_trait]
impl Engine for LocalEngine {
    fn keyspace(&self, name: &str) -> Result<Arc<dyn Keyspace>, Error> {
        check_name(name)?;
        let mut open = self.open.lock();
        if let Some(keyspace) = open.get(name) {
            return Ok(keyspace.clone());
        }
        let created = !self.db.keyspace_exists(name);
        let tree = self
            .db
            .keyspace(name, || {
                KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES)
            })
            .map_err(|e| io("opening a keyspace of", e))?;
        if created {
            self.db.persist(PersistMode::SyncAll).map_err(|e| io("syncing", e))?;
        }
        let (mods, revision) = recover(&tree)?;
        let keyspace = Arc::new_cyclic(|me| LocalKeyspace {
            core: Core::new(name, mods, revision),
            tree,
            queue: self.queue.clone(),
            shared: self.shared.clone(),
            me: me.clone(),
        });
        open.insert(name.to_owned(), keyspace.clone());
        Ok(keyspace)
    }

    async fn drop_keyspace(&self, name: &str) -> Result<(), Error> {
        if !self.db.keyspace_exists(name) {
            return Ok(());
        }
        self.keyspace(name)?;
        let Some(keyspace) = self.open.lock().remove(name) else {
            return Ok(());
        };
        let (done, answer) = oneshot::channel();
        self.queue
            .send(Request::Drop { keyspace, done })
            .await
            .map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?
    }

    fn list_keyspaces(&self) -> Vec<String> {
        let mut names: Vec<String> = self.db.list_keyspace_names().iter().map(|n| n.to_string()).collect();
        names.sort();
        names
    }
}

struct LocalKeyspace {
    core: Core,
    tree: fjall::Keyspace,
    queue: mpsc::Sender<Request>,
    shared: Arc<Shared>,
    me: Weak<LocalKeyspace>,
}

#[async_trait]
impl Keyspace for LocalKeyspace {
    fn name(&self) -> &str {
        &self.core.name
    }

    fn revision(&self) -> Revision {
        self.core.revision()
    }

    fn range(&self, prefix: &[u8], each: &mut dyn FnMut(Entry)) -> Result<(), Error> {
        let mut full = vec![DATA];
        full.extend_from_slice(prefix);
        for item in self.tree.prefix(full) {
            let (key, value) = item.into_inner().map_err(|e| io("reading", e))?;
            let key = Bytes::copy_from_slice(&key[1..]);
            let (mod_rev, value) = split(&key, &value)?;
            each(Entry {
                key,
                value: Bytes::copy_from_slice(value),
                mod_rev,
            });
        }
        Ok(())
    }

    async fn txn(&self, checks: Vec<Check>, ops: Vec<Op>) -> Result<Revision, Error> {
        check_size(&checks, &ops)?;
        let keyspace = self.me.upgrade().ok_or(Error::Closed)?;
        let (done, answer) = oneshot::channel();
        let request = Request::Txn {
            keyspace,
            checks,
            ops,
            done,
        };
        match self.queue.try_send(request) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(Error::Closed),
            Err(mpsc::error::TrySendError::Full(request)) => {
                self.shared.counters.queue_full.fetch_add(1, Ordering::Relaxed);
                self.queue.send(request).await.map_err(|_| Error::Closed)?;
            }
        }
        answer.await.map_err(|_| Error::Closed)?
    }

    fn watch(&self, after: Revision) -> Result<Watch, WatchError> {
        self.core.watch(after)
    }

    fn observe(&self, observer: Arc<dyn Observer>) {
        self.core.observe(observer);
    }
}

/// Reads the revision of every key and the newest revision of the keyspace.
fn recover(tree: &fjall::Keyspace) -> Result<(HashMap<Bytes, Revision>, Revision), Error> {
    let newest = match tree.get(META_REVISION).map_err(|e| io("reading", e))? {
        None => 0,
        Some(raw) => <[u8; 8]>::try_from(&*raw)
            .map(u64::from_be_bytes)
            .map_err(|_| Error::Corrupt {
                key: Bytes::from_static(META_REVISION),
                reason: "the revision is not 8 bytes",
            })?,
    };
    let mut mods = HashMap::new();
    let mut max = newest;
    for item in tree.prefix([DATA]) {
        let (key, value) = item.into_inner().map_err(|e| io("reading", e))?;
        let key = Bytes::copy_from_slice(&key[1..]);
        let (mod_rev, _) = split(&key, &value)?;
        max = max.max(mod_rev);
        mods.insert(key, mod_rev);
    }
    Ok((mods, max))
}

fn split<'a>(key: &Bytes, raw: &'a [u8]) -> Result<(Revision, &'a [u8]), Error> {
    match raw.split_first_chunk::<8>() {
        Some((revision, value)) => Ok((u64::from_be_bytes(*revision), value)),
        None => Err(Error::Corrupt {
            key: key.clone(),
            reason: "shorter than its revision",
        }),
    }
}

fn io(action: &'static str, source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Io {
        action,
        source: Box::new(source),
    }
}

struct Accepted {
    keyspace: Arc<LocalKeyspace>,
    batch: Batch,
    done: oneshot::Sender<Result<Revision, Error>>,
}

struct Committer {
    db: Database,
    shared: Arc<Shared>,
}

impl Committer {
    fn run(self, mut requests: mpsc::Receiver<Request>) {
        while let Some(first) = requests.blocking_recv() {
            let mut accepted = Vec::new();
            let mut bytes = 0;
            let mut next = Some(first);
            while let Some(request) = next.take() {
                match request {
                    Request::Txn {
                        keyspace,
                        checks,
                        ops,
                        done,
                    } => {
                        self.accept(keyspace, &checks, ops, done, &mut accepted, &mut bytes);
                    }
                    Request::Drop { keyspace, done } => {
                        self.commit(std::mem::take(&mut accepted));
                        keyspace.core.mark_dropped();
                        let dropped = self
                            .db
                            .delete_keyspace(keyspace.tree.clone())
                            .map_err(|e| io("dropping", e));
                        let synced = self.db.persist(PersistMode::SyncAll).map_err(|e| io("syncing", e));
                        let _ = done.send(dropped.and(synced));
                    }
                }
                if accepted.len() < BATCH_TXNS_MAX && bytes < BATCH_BYTES_MAX {
                    next = requests.try_recv().ok();
                }
            }
            self.commit(accepted);
        }
        if let Err(error) = self.db.persist(PersistMode::SyncAll) {
            tracing::error!(%error, "last sync of the store failed");
        }
    }

    fn accept(
        &self,
        keyspace: Arc<LocalKeyspace>,
        checks: &[Check],
        ops: Vec<Op>,
        done: oneshot::Sender<Result<Revision, Error>>,
        accepted: &mut Vec<Accepted>,
        bytes: &mut usize,
    ) {
        if self.shared.poisoned.load(Ordering::Acquire) {
            let _ = done.send(Err(Error::Poisoned));
            return;
        }
        match keyspace.core.accept(checks, ops) {
            Ok(batch) => {
                *bytes += batch.ops.iter().map(Op::size).sum::<usize>();
                accepted.push(Accepted { keyspace, batch, done });
            }
            Err(error) => {
                self.shared.counters.conflicts.fetch_add(1, Ordering::Relaxed);
                let _ = done.send(Err(error));
            }
        }
    }

    /// Writes, syncs, publishes and answers. One fjall batch gives all its items one sequence number, so a key that
    /// several transactions touch is written once, with its last value.
    fn commit(&self, accepted: Vec<Accepted>) {
        if accepted.is_empty() {
            return;
        }
        let mut last: HashMap<(u64, &[u8]), (&LocalKeyspace, Revision, &Op)> = HashMap::new();
        let mut newest: HashMap<u64, (&LocalKeyspace, Revision)> = HashMap::new();
        for entry in &accepted {
            let id = entry.keyspace.tree.id();
            newest.insert(id, (&entry.keyspace, entry.batch.revision));
            for op in entry.batch.ops.iter() {
                last.insert((id, op.key()), (&entry.keyspace, entry.batch.revision, op));
            }
        }
        let mut batch = self.db.batch().durability(Some(PersistMode::SyncData));
        let mut bytes = 0;
        for (keyspace, revision, op) in last.into_values() {
            let mut key = BytesMut::with_capacity(1 + op.key().len());
            key.put_u8(DATA);
            key.put_slice(op.key());
            match op {
                Op::Put { value, .. } => {
                    let mut raw = BytesMut::with_capacity(8 + value.len());
                    raw.put_u64(revision);
                    raw.put_slice(value);
                    bytes += key.len() + raw.len();
                    batch.insert(&keyspace.tree, &key[..], &raw[..]);
                }
                Op::Delete { .. } => batch.remove(&keyspace.tree, &key[..]),
            }
        }
        for (keyspace, revision) in newest.into_values() {
            batch.insert(&keyspace.tree, META_REVISION, revision.to_be_bytes());
        }
        if let Err(error) = batch.commit() {
            tracing::error!(%error, txns = accepted.len(), "group commit failed, the store stops");
            self.shared.poisoned.store(true, Ordering::Release);
            for entry in accepted {
                let _ = entry.done.send(Err(Error::Poisoned));
            }
            return;
        }
        let counters = &self.shared.counters;
        counters.txns.fetch_add(accepted.len() as u64, Ordering::Relaxed);
        counters.syncs.fetch_add(1, Ordering::Relaxed);
        counters.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        for Accepted { keyspace, batch, done } in accepted {
            let revision = batch.revision;
            keyspace.core.publish(batch);
            let _ = done.send(Ok(revision));
        }
    }
}

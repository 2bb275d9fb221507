//! What both engines share: checking transactions against modification revisions and publishing committed batches.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::history::History;
use crate::{Batch, Check, Error, Observer, Op, Revision, Watch, WatchError};

/// Revisions as the committer sees them, including transactions that are not durable yet.
struct Pending {
    mods: HashMap<Bytes, Revision>,
    revision: Revision,
}

/// One keyspace's bookkeeping.
pub(crate) struct Core {
    pub(crate) name: String,
    pending: Mutex<Pending>,
    published: AtomicU64,
    dropped: AtomicBool,
    history: Arc<History>,
    observer: Mutex<Option<Arc<dyn Observer>>>,
}

impl Core {
    pub(crate) fn new(name: &str, mods: HashMap<Bytes, Revision>, revision: Revision) -> Self {
        Self {
            name: name.to_owned(),
            pending: Mutex::new(Pending { mods, revision }),
            published: AtomicU64::new(revision),
            dropped: AtomicBool::new(false),
            history: History::new(revision),
            observer: Mutex::new(None),
        }
    }

    pub(crate) fn revision(&self) -> Revision {
        self.published.load(Ordering::Acquire)
    }

    /// Checks a transaction and, if it holds, gives it the next revision. The caller must make it durable and
    /// [`publish`](Self::publish) it, in the same order, or stop the engine.
    pub(crate) fn accept(&self, checks: &[Check], ops: Vec<Op>) -> Result<Batch, Error> {
        if self.dropped.load(Ordering::Acquire) {
            return Err(Error::Dropped(self.name.clone()));
        }
        let mut pending = self.pending.lock();
        for check in checks {
            let found = pending.mods.get(&check.key).copied().unwrap_or(0);
            if found != check.mod_rev {
                return Err(Error::Conflict {
                    key: check.key.clone(),
                    expected: check.mod_rev,
                    found,
                });
            }
        }
        pending.revision += 1;
        let revision = pending.revision;
        for op in &ops {
            match op {
                Op::Put { key, .. } => {
                    pending.mods.insert(key.clone(), revision);
                }
                Op::Delete { key, .. } => {
                    pending.mods.remove(key);
                }
            }
        }
        Ok(Batch {
            revision,
            ops: ops.into(),
        })
    }

    /// Makes a durable batch visible: to the observer, then to watches.
    pub(crate) fn publish(&self, batch: Batch) {
        let observer = self.observer.lock().clone();
        if let Some(observer) = observer {
            observer.committed(&batch);
        }
        self.published.store(batch.revision, Ordering::Release);
        self.history.push(batch);
    }

    pub(crate) fn watch(&self, after: Revision) -> Result<Watch, WatchError> {
        self.history.watch(after)
    }

    pub(crate) fn observe(&self, observer: Arc<dyn Observer>) {
        *self.observer.lock() = Some(observer);
    }

    pub(crate) fn mark_dropped(&self) {
        self.dropped.store(true, Ordering::Release);
    }
}

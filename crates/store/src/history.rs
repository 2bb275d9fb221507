//! The bounded history of a keyspace and the cursors that read it.
//!
//! One ring of committed batches per keyspace; a [`Watch`] owns a position, not a queue, so a slow reader costs nothing
//! until the ring has moved past it, and then it is told.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{Batch, Revision};

/// Batches kept per keyspace. With attachments shared by the reader's own memory this holds only old values.
const HISTORY_BATCHES_MAX: usize = 1024;
/// Bytes of keys and values kept per keyspace.
const HISTORY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Why a watch cannot go on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WatchError {
    #[error("revision {requested} is older than the kept history, which starts after {floor}")]
    Compacted { requested: Revision, floor: Revision },
    #[error("the keyspace is closed")]
    Closed,
}

#[derive(Debug)]
struct Ring {
    batches: VecDeque<Batch>,
    bytes: usize,
    /// Everything up to here is no longer in `batches`.
    floor: Revision,
}

/// The ring and its wake-up signal.
#[derive(Debug)]
pub(crate) struct History {
    ring: Mutex<Ring>,
    newest: watch::Sender<Revision>,
}

impl History {
    pub(crate) fn new(floor: Revision) -> Arc<Self> {
        let ring = Ring {
            batches: VecDeque::new(),
            bytes: 0,
            floor,
        };
        Arc::new(Self {
            ring: Mutex::new(ring),
            newest: watch::Sender::new(floor),
        })
    }

    pub(crate) fn push(&self, batch: Batch) {
        let revision = batch.revision;
        {
            let mut ring = self.ring.lock();
            ring.bytes += size(&batch);
            ring.batches.push_back(batch);
            while ring.batches.len() > HISTORY_BATCHES_MAX || (ring.bytes > HISTORY_BYTES_MAX && ring.batches.len() > 1)
            {
                let Some(old) = ring.batches.pop_front() else { break };
                ring.bytes -= size(&old);
                ring.floor = old.revision;
            }
        }
        self.newest.send_replace(revision);
    }

    pub(crate) fn watch(self: &Arc<Self>, after: Revision) -> Result<Watch, WatchError> {
        let floor = self.ring.lock().floor;
        if after < floor {
            return Err(WatchError::Compacted {
                requested: after,
                floor,
            });
        }
        Ok(Watch {
            history: Arc::downgrade(self),
            newest: self.newest.subscribe(),
            at: after,
        })
    }
}

fn size(batch: &Batch) -> usize {
    batch.ops.iter().map(crate::Op::size).sum()
}

/// A cursor on a keyspace's committed batches.
#[derive(Debug)]
pub struct Watch {
    history: std::sync::Weak<History>,
    newest: watch::Receiver<Revision>,
    at: Revision,
}

impl Watch {
    /// The next batch after the last one returned; waits for it.
    ///
    /// # Errors
    /// `Compacted` when the reader fell behind the history (read the state again), `Closed` when the keyspace is gone.
    ///
    /// # Cancel safety
    /// Safe: a batch is consumed only when it is returned.
    pub async fn next(&mut self) -> Result<Batch, WatchError> {
        loop {
            {
                let history = self.history.upgrade().ok_or(WatchError::Closed)?;
                self.newest.borrow_and_update();
                let ring = history.ring.lock();
                if self.at < ring.floor {
                    return Err(WatchError::Compacted {
                        requested: self.at,
                        floor: ring.floor,
                    });
                }
                let index = ring.batches.partition_point(|b| b.revision <= self.at);
                if let Some(batch) = ring.batches.get(index) {
                    self.at = batch.revision;
                    return Ok(batch.clone());
                }
            }
            self.newest.changed().await.map_err(|_| WatchError::Closed)?;
        }
    }
}

//! A bounded channel that counts: how much went in, how often it was full, how deep it got.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::mpsc;

/// Counters of one queue, readable from anywhere.
#[derive(Debug, Default)]
pub struct QueueCounters {
    pushed: AtomicU64,
    refused: AtomicU64,
    depth: AtomicUsize,
    depth_max: AtomicUsize,
}

impl QueueCounters {
    /// Items accepted since creation.
    pub fn pushed(&self) -> u64 {
        self.pushed.load(Ordering::Relaxed)
    }

    /// Items refused because the queue was full.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Items waiting now.
    pub fn depth(&self) -> usize {
        self.depth.load(Ordering::Relaxed)
    }

    /// Most items that ever waited.
    pub fn depth_max(&self) -> usize {
        self.depth_max.load(Ordering::Relaxed)
    }

    fn entered(&self) {
        self.pushed.fetch_add(1, Ordering::Relaxed);
        let depth = self.depth.fetch_add(1, Ordering::Relaxed) + 1;
        self.depth_max.fetch_max(depth, Ordering::Relaxed);
    }
}

/// Why an item was not queued; the item comes back.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushError<T> {
    /// The queue holds as many items as it may.
    #[error("queue is full")]
    Full(T),
    /// The receiver is gone.
    #[error("queue is closed")]
    Closed(T),
}

/// Makes a queue of at most `capacity` (at least 1) items.
pub fn bounded<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = mpsc::channel(capacity.max(1));
    let counters = Arc::new(QueueCounters::default());
    (
        Sender {
            inner: sender,
            counters: counters.clone(),
        },
        Receiver {
            inner: receiver,
            counters,
        },
    )
}

/// The sending half; clones share the bound.
#[derive(Debug)]
pub struct Sender<T> {
    inner: mpsc::Sender<T>,
    counters: Arc<QueueCounters>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            counters: self.counters.clone(),
        }
    }
}

impl<T> Sender<T> {
    /// Queues without waiting.
    pub fn try_send(&self, item: T) -> Result<(), PushError<T>> {
        // Counted before the item becomes visible, so that the receiver never counts below zero.
        match self.inner.try_reserve() {
            Ok(permit) => {
                self.counters.entered();
                permit.send(item);
                Ok(())
            }
            Err(mpsc::error::TrySendError::Full(())) => {
                self.counters.refused.fetch_add(1, Ordering::Relaxed);
                Err(PushError::Full(item))
            }
            Err(mpsc::error::TrySendError::Closed(())) => Err(PushError::Closed(item)),
        }
    }

    /// Waits for room. Cancel safe: the item is queued or dropped with the future, never half.
    pub async fn send(&self, item: T) -> Result<(), PushError<T>> {
        match self.inner.reserve().await {
            Ok(permit) => {
                self.counters.entered();
                permit.send(item);
                Ok(())
            }
            Err(_) => Err(PushError::Closed(item)),
        }
    }

    /// The receiver is gone.
    pub fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }

    /// The queue's counters.
    pub fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver<T> {
    inner: mpsc::Receiver<T>,
    counters: Arc<QueueCounters>,
}

impl<T> Receiver<T> {
    /// The next item; `None` once all senders are gone and the queue is empty. Cancel safe.
    pub async fn recv(&mut self) -> Option<T> {
        let item = self.inner.recv().await;
        if item.is_some() {
            self.counters.depth.fetch_sub(1, Ordering::Relaxed);
        }
        item
    }

    /// An item if one waits now.
    pub fn try_recv(&mut self) -> Option<T> {
        let item = self.inner.try_recv().ok();
        if item.is_some() {
            self.counters.depth.fetch_sub(1, Ordering::Relaxed);
        }
        item
    }

    /// The queue's counters.
    pub fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn refuses_and_counts_when_full() {
        let (tx, mut rx) = bounded(2);
        tx.try_send(1).unwrap();
        tx.send(2).await.unwrap();
        assert_eq!(tx.try_send(3), Err(PushError::Full(3)));
        assert_eq!(rx.recv().await, Some(1));
        let counters = tx.counters();
        assert_eq!(
            (
                counters.pushed(),
                counters.refused(),
                counters.depth(),
                counters.depth_max()
            ),
            (2, 1, 1, 2)
        );
        drop(rx);
        assert_eq!(tx.try_send(4), Err(PushError::Closed(4)));
    }
}

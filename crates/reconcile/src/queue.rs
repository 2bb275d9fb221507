//! A deduplicating queue of keys: equal keys wait once and never run at once; failures come back later and later.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use stdx::{BackoffPolicy, Rng};
use tokio::sync::Notify;
use tokio::time::Instant;

/// Delay after failures: 5 ms doubling to 30 s.
const RETRY: BackoffPolicy = BackoffPolicy::doubling(Duration::from_millis(5), Duration::from_secs(30));

/// A queue. Clones are the same queue. Its length is bounded by the number of distinct keys.
pub struct Queue<K> {
    inner: Arc<Inner<K>>,
}

struct Inner<K> {
    state: Mutex<State<K>>,
    wake: Notify,
    retry: BackoffPolicy,
}

struct State<K> {
    ready: VecDeque<K>,
    /// Keys in `ready`, and keys that changed while being worked on.
    dirty: HashSet<K>,
    working: HashSet<K>,
    /// When delayed keys are due; an entry whose time differs from `due` is stale.
    delayed: BinaryHeap<Reverse<(Instant, u64)>>,
    delayed_keys: HashMap<u64, K>,
    due: HashMap<K, (Instant, u64)>,
    failures: HashMap<K, u32>,
    sequence: u64,
    closed: bool,
    rng: Rng,
    counters: Counters,
}

/// What a queue has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Keys offered.
    pub added: u64,
    /// Keys handed to workers.
    pub taken: u64,
    /// Keys that came back after a failure.
    pub retried: u64,
    /// Keys ready now.
    pub depth: usize,
    /// Most keys that were ever ready.
    pub depth_max: usize,
}

impl<K> Clone for Queue<K> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
        }
    }
}

impl<K> fmt::Debug for Queue<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("counters", &self.inner.state.lock().counters)
            .finish()
    }
}

impl<K: Hash + Eq + Clone> Default for Queue<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Hash + Eq + Clone> Queue<K> {
    /// An empty queue.
    pub fn new() -> Self {
        Self::with_retry(RETRY)
    }

    /// An empty queue with its own delays after failures.
    pub fn with_retry(retry: BackoffPolicy) -> Self {
        let state = State {
            ready: VecDeque::new(),
            dirty: HashSet::new(),
            working: HashSet::new(),
            delayed: BinaryHeap::new(),
            delayed_keys: HashMap::new(),
            due: HashMap::new(),
            failures: HashMap::new(),
            sequence: 0,
            closed: false,
            rng: Rng::from_entropy(),
            counters: Counters::default(),
        };
        Self {
            inner: Arc::new(Inner {
                state: Mutex::new(state),
                wake: Notify::new(),
                retry,
            }),
        }
    }

    /// Queues the key unless it waits already. A key being worked on runs once more afterwards. A closed queue takes
    /// nothing.
    pub fn add(&self, key: K) {
        let mut state = self.inner.state.lock();
        if state.closed {
            return;
        }
        state.counters.added += 1;
        if state.offer(key) {
            drop(state);
            self.inner.wake.notify_one();
        }
    }

    /// Queues the key after a delay; an earlier delay for the same key wins.
    pub fn add_after(&self, key: K, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let mut state = self.inner.state.lock();
        if state.closed {
            return;
        }
        state.counters.added += 1;
        state.delay(key, delay);
        drop(state);
        // A worker may be waiting for a later deadline.
        self.inner.wake.notify_one();
    }

    /// Queues the key after its own growing delay.
    pub fn retry(&self, key: K) {
        let mut state = self.inner.state.lock();
        state.counters.retried += 1;
        let failures = state.failures.entry(key.clone()).or_default();
        let n = *failures;
        *failures = n.saturating_add(1);
        let delay = self.inner.retry.delay(n, &mut state.rng);
        state.delay(key, delay);
        drop(state);
        self.inner.wake.notify_one();
    }

    /// Forgets the key's failures.
    pub fn forget(&self, key: &K) {
        self.inner.state.lock().failures.remove(key);
    }

    /// Failures of the key since it was last forgotten.
    pub fn failures(&self, key: &K) -> u32 {
        self.inner.state.lock().failures.get(key).copied().unwrap_or_default()
    }

    /// The next key, to be given back with [`Self::done`]; `None` once the queue is closed. Cancel safe.
    pub async fn next(&self) -> Option<K> {
        loop {
            let notified = self.inner.wake.notified();
            let deadline = {
                let mut state = self.inner.state.lock();
                if state.closed {
                    drop(state);
                    // Pass the news on to the next waiter.
                    self.inner.wake.notify_one();
                    return None;
                }
                state.promote(Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    state.dirty.remove(&key);
                    state.working.insert(key.clone());
                    state.counters.taken += 1;
                    state.counters.depth = state.ready.len();
                    let more = !state.ready.is_empty();
                    drop(state);
                    if more {
                        self.inner.wake.notify_one();
                    }
                    return Some(key);
                }
                state.delayed.peek().map(|Reverse((at, _))| *at)
            };
            match deadline {
                None => notified.await,
                Some(at) => {
                    let _ = tokio::time::timeout_at(at, notified).await;
                }
            }
        }
    }

    /// Ends the work on a key; it becomes ready again if it was added meanwhile.
    pub fn done(&self, key: &K) {
        let mut state = self.inner.state.lock();
        state.working.remove(key);
        if state.dirty.contains(key) {
            state.ready.push_back(key.clone());
            state.measure();
            drop(state);
            self.inner.wake.notify_one();
        }
    }

    /// Lets every worker end; keys still waiting are dropped.
    pub fn close(&self) {
        self.inner.state.lock().closed = true;
        self.inner.wake.notify_waiters();
        self.inner.wake.notify_one();
    }

    /// What the queue has done.
    pub fn counters(&self) -> Counters {
        self.inner.state.lock().counters
    }

    /// Nothing is ready and nothing is being worked on; delayed keys do not count.
    pub fn is_idle(&self) -> bool {
        let state = self.inner.state.lock();
        state.ready.is_empty() && state.working.is_empty()
    }
}

impl<K: Hash + Eq + Clone> State<K> {
    /// Marks the key dirty; true if it became ready.
    fn offer(&mut self, key: K) -> bool {
        if !self.dirty.insert(key.clone()) || self.working.contains(&key) {
            return false;
        }
        self.ready.push_back(key);
        self.measure();
        true
    }

    fn measure(&mut self) {
        self.counters.depth = self.ready.len();
        self.counters.depth_max = self.counters.depth_max.max(self.counters.depth);
    }

    fn delay(&mut self, key: K, delay: Duration) {
        let at = Instant::now() + delay;
        if let Some((earlier, sequence)) = self.due.get(&key).copied() {
            if earlier <= at {
                return;
            }
            self.delayed_keys.remove(&sequence);
        }
        self.sequence += 1;
        let sequence = self.sequence;
        self.delayed.push(Reverse((at, sequence)));
        self.delayed_keys.insert(sequence, key.clone());
        self.due.insert(key, (at, sequence));
    }

    fn promote(&mut self, now: Instant) {
        while let Some(Reverse((at, sequence))) = self.delayed.peek().copied() {
            let Some(key) = self.delayed_keys.get(&sequence).cloned() else {
                self.delayed.pop();
                continue;
            };
            if at > now {
                return;
            }
            self.delayed.pop();
            self.delayed_keys.remove(&sequence);
            self.due.remove(&key);
            self.offer(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn equal_keys_wait_once_and_never_run_at_once() {
        let queue = Queue::new();
        queue.add("a");
        queue.add("a");
        let first = queue.next().await.unwrap();
        queue.add("a");
        assert!(
            tokio::time::timeout(Duration::from_secs(9), queue.next())
                .await
                .is_err()
        );
        queue.done(&first);
        assert_eq!(queue.next().await, Some("a"));
        queue.done(&"a");
        assert!(queue.is_idle());
        assert_eq!(queue.counters().taken, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn the_earliest_delay_wins_and_failures_grow() {
        let queue = Queue::with_retry(BackoffPolicy {
            jitter: 0.0,
            ..BackoffPolicy::doubling(Duration::from_secs(1), Duration::from_secs(60))
        });
        let start = Instant::now();
        queue.add_after("a", Duration::from_secs(10));
        queue.add_after("a", Duration::from_secs(5));
        queue.add_after("a", Duration::from_secs(20));
        assert_eq!(queue.next().await, Some("a"));
        assert_eq!(start.elapsed().as_secs(), 5);
        queue.done(&"a");
        assert!(
            tokio::time::timeout(Duration::from_secs(60), queue.next())
                .await
                .is_err(),
            "stale delays are gone"
        );
        for expected in [1, 2, 4] {
            let start = Instant::now();
            queue.retry("b");
            assert_eq!(queue.next().await, Some("b"));
            assert_eq!(start.elapsed().as_secs(), expected);
            queue.done(&"b");
        }
        queue.forget(&"b");
        assert_eq!(queue.failures(&"b"), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_key_wakes_a_worker_that_waits_for_a_delay_and_close_ends_all() {
        let queue = Queue::new();
        queue.add_after(1, Duration::from_secs(3600));
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let queue = queue.clone();
                tokio::spawn(async move {
                    let mut seen = 0;
                    while let Some(key) = queue.next().await {
                        seen += 1;
                        queue.done(&key);
                    }
                    seen
                })
            })
            .collect();
        tokio::task::yield_now().await;
        for key in 10..20 {
            queue.add(key);
        }
        let start = Instant::now();
        while !queue.is_idle() {
            tokio::task::yield_now().await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        queue.close();
        let mut total = 0;
        for worker in workers {
            total += worker.await.unwrap();
        }
        assert_eq!(total, 10);
    }
}

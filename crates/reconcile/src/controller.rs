//! The loop of a controller: take a key, reconcile it from state, bring it back if it failed.

use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use stdx::Shutdown;

use crate::{Error, Queue, Retry};

/// When to look at the same key again without a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requeue {
    /// Only after a change.
    Done,
    /// After this long.
    After(Duration),
}

/// Reconciles keys of `queue` with `workers` at once until `shutdown`; equal keys never run at once. Failures come back
/// with growing delay, a panic counts as a failure. Returns when every worker has ended its current key.
pub async fn run_controller<K, F, Fut>(name: &str, queue: Queue<K>, workers: usize, reconcile: F, shutdown: Shutdown)
where
    K: Hash + Eq + Clone + fmt::Display + Send + Sync + 'static,
    F: Fn(K) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Requeue, Error>> + Send,
{
    let reconcile = Arc::new(reconcile);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..workers.max(1) {
        let (name, queue, reconcile) = (name.to_owned(), queue.clone(), reconcile.clone());
        tasks.spawn(async move {
            while let Some(key) = queue.next().await {
                let outcome = AssertUnwindSafe(reconcile(key.clone())).catch_unwind().await;
                match outcome {
                    Ok(Ok(requeue)) => {
                        queue.forget(&key);
                        if let Requeue::After(delay) = requeue {
                            queue.add_after(key.clone(), delay);
                        }
                    }
                    Ok(Err(error)) => failed(&name, &queue, &key, &error),
                    Err(_) => {
                        tracing::error!(controller = name, key = %key, "reconcile panicked");
                        queue.retry(key.clone());
                    }
                }
                queue.done(&key);
            }
        });
    }
    shutdown.wait().await;
    queue.close();
    while tasks.join_next().await.is_some() {}
}

fn failed<K: Hash + Eq + Clone + fmt::Display>(name: &str, queue: &Queue<K>, key: &K, error: &Error) {
    let text = stdx::chain(error).to_string();
    // Losing a race is the normal case of optimistic writes: the event that won is already on its way here.
    if error.is_conflict() || error.is_already_exists() || error.is_not_found() {
        tracing::debug!(controller = name, key = %key, error = text, "reconcile lost a race");
    } else {
        tracing::warn!(controller = name, key = %key, error = text, "reconcile failed");
    }
    match error.retry() {
        Retry::Soon(delay) if delay > Duration::from_secs(1) => queue.add_after(key.clone(), delay),
        // `Never` means not before someone changes something; that change may be missed, so it is still tried, ever
        // more rarely.
        Retry::Never | Retry::Soon(_) | Retry::AfterResync => queue.retry(key.clone()),
    }
}

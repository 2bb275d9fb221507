//! Events end an hour after their last write, as upstream's do; nothing else expires.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::time;
use jiff::SignedDuration;

use crate::admission::Claims;
use crate::cluster::Cluster;
use crate::handlers::write;
use crate::object::Object;

const EVENT_TTL: SignedDuration = SignedDuration::from_hours(1);
const SWEEP_EVERY: Duration = Duration::from_secs(60);
/// Deletions per sweep; the rest waits for the next, so that a sweep never floods the store.
const SWEEP_MAX: usize = 2000;

/// Sweeps until the cluster stops.
pub async fn run(cluster: std::sync::Weak<Cluster>, shutdown: stdx::Shutdown) {
    while shutdown.or_stop(tokio::time::sleep(SWEEP_EVERY)).await.is_some() {
        let Some(cluster) = cluster.upgrade() else { return };
        sweep(&cluster).await;
    }
}

async fn sweep(cluster: &Arc<Cluster>) {
    let Some(served) = cluster.resource("", "v1", "events") else {
        return;
    };
    let now = time::now(&*cluster.clock);
    let old = |event: &Object| {
        let value = event.value();
        let series = value["series"]["lastObservedTime"].as_str();
        let last = series
            .or(value["lastTimestamp"].as_str())
            .or(value["metadata"]["creationTimestamp"].as_str());
        last.and_then(|t| time::parse(t).ok())
            .is_some_and(|t| now.duration_since(t) > EVENT_TTL)
    };
    let events = served.resource.snapshot();
    for event in events.values().filter(|e| old(e)).take(SWEEP_MAX) {
        // A lost race means that the event was just written again and stays.
        if let Err(status) = write::remove(cluster, &served, event, Claims::default()).await {
            tracing::warn!(
                cluster = cluster.name(),
                message = status.message,
                "removing an old event failed"
            );
            return;
        }
    }
}

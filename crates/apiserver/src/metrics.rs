//! Counters with upstream's names, one registry per cluster.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    pub verb: String,
    pub group: String,
    pub version: String,
    pub resource: String,
    pub subresource: String,
    pub code: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DurationLabels {
    pub verb: String,
    pub group: String,
    pub resource: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabels {
    pub request_kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ResourceLabels {
    pub resource: String,
}

/// See the module.
pub struct Metrics {
    pub requests: Family<RequestLabels, Counter>,
    pub durations: Family<DurationLabels, Histogram>,
    pub inflight: Family<KindLabels, Gauge>,
    pub objects: Family<ResourceLabels, Gauge>,
    pub audit: Arc<crate::audit::Counters>,
    registry: Registry,
}

fn buckets() -> Histogram {
    Histogram::new([
        0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
    ])
}

impl Default for Metrics {
    fn default() -> Self {
        let requests = Family::default();
        let durations = Family::new_with_constructor(buckets as fn() -> Histogram);
        let inflight = Family::default();
        let objects = Family::default();
        let mut registry = Registry::default();
        // The encoder appends `_total` to counters.
        registry.register(
            "apiserver_request",
            "Requests by verb, resource and code",
            requests.clone(),
        );
        registry.register(
            "apiserver_request_duration_seconds",
            "Response latency, watches excluded",
            durations.clone(),
        );
        registry.register(
            "apiserver_current_inflight_requests",
            "Requests in progress",
            inflight.clone(),
        );
        registry.register(
            "apiserver_storage_objects",
            "Stored objects by resource",
            objects.clone(),
        );
        let audit = Arc::new(crate::audit::Counters::default());
        registry.register(
            "apiserver_audit_event",
            "Audit events written or handed over to be",
            audit.events.clone(),
        );
        registry.register(
            "apiserver_audit_dropped",
            "Audit events dropped because the queue was full",
            audit.dropped.clone(),
        );
        registry.register(
            "apiserver_audit_blocked",
            "Requests that waited for room in the audit queue",
            audit.blocked.clone(),
        );
        registry.register(
            "apiserver_audit_error",
            "Audit events lost because the log could not be written",
            audit.errors.clone(),
        );
        Metrics {
            audit,
            requests,
            durations,
            inflight,
            objects,
            registry,
        }
    }
}

impl Metrics {
    /// The exposition text.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Formatting into a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut out, &self.registry);
        out
    }
}

//! Events about pods and the node. Emitting never waits: a bounded queue feeds one sender, which folds repetitions.

use std::{
    collections::HashMap,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
};

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    jiff::Timestamp,
};
use serde_json::json;
use stdx::SharedClock;
use tokio::sync::mpsc;

use crate::{
    api::NodeApi,
    clock::{ms_between, now, time},
    pod::view::PodView,
};

/// Waiting events; more are dropped and counted.
const QUEUE: usize = 512;
/// Equal events within this time become one with a count.
const FOLD_MS: i64 = 600_000;
/// Remembered events for folding.
const REMEMBERED: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Normal,
    Warning,
}

struct Raised {
    about: ObjectReference,
    level: Level,
    reason: String,
    message: String,
    at: Timestamp,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Events {
    tx: mpsc::Sender<Raised>,
    clock: SharedClock,
    dropped: Arc<AtomicU64>,
}

impl Events {
    /// The handle, and the task that sends until every handle is dropped.
    pub fn new(api: Arc<dyn NodeApi>, node: String, clock: SharedClock) -> (Self, impl Future<Output = ()> + Send) {
        let (tx, rx) = mpsc::channel(QUEUE);
        (
            Self {
                tx,
                clock,
                dropped: Arc::default(),
            },
            send(api, node, rx),
        )
    }

    /// About a pod, or one of its containers (`spec.containers{name}`).
    pub fn pod(&self, view: &PodView, container: Option<&str>, level: Level, reason: &str, message: impl Into<String>) {
        let field_path = container.map(|name| {
            let member = view.member(name);
            let list = member
                .and_then(|m| m.path.split('[').next())
                .unwrap_or("spec.containers");
            format!("{list}{{{name}}}")
        });
        self.raise(
            ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                namespace: Some(view.namespace.clone()),
                name: Some(view.name.clone()),
                uid: Some(view.uid.clone()),
                resource_version: view.pod.metadata.resource_version.clone(),
                field_path,
            },
            level,
            reason,
            message.into(),
        );
    }

    /// About the node itself.
    pub fn node(&self, name: &str, level: Level, reason: &str, message: impl Into<String>) {
        let about = ObjectReference {
            kind: Some("Node".into()),
            name: Some(name.to_owned()),
            uid: Some(name.to_owned()),
            ..Default::default()
        };
        self.raise(about, level, reason, message.into());
    }

    /// How many events were dropped because the queue was full.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn raise(&self, about: ObjectReference, level: Level, reason: &str, message: String) {
        let raised = Raised {
            about,
            level,
            reason: reason.to_owned(),
            message,
            at: now(&self.clock),
        };
        if self.tx.try_send(raised).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Namespace, name, count and last time of an event that is written.
type Sent = (String, String, i32, Timestamp);

async fn send(api: Arc<dyn NodeApi>, node: String, mut rx: mpsc::Receiver<Raised>) {
    let mut sent: HashMap<(String, String, String), Sent> = HashMap::new();
    while let Some(e) = rx.recv().await {
        let key = (
            format!(
                "{}/{}",
                e.about.uid.as_deref().unwrap_or_default(),
                e.about.field_path.as_deref().unwrap_or_default()
            ),
            e.reason.clone(),
            e.message.clone(),
        );
        if let Some((namespace, name, count, last)) = sent.get_mut(&key)
            && ms_between(*last, e.at) < FOLD_MS
        {
            *count += 1;
            *last = e.at;
            let patch = json!({"count": *count, "lastTimestamp": time(e.at)});
            if api.patch_event(namespace, name, patch).await.is_ok() {
                continue;
            }
        }
        let namespace = e.about.namespace.clone().unwrap_or_else(|| "default".into());
        let of = e.about.name.clone().unwrap_or_default();
        let name = format!("{of}.{:x}", e.at.as_nanosecond());
        let mut event = Event {
            involved_object: e.about,
            type_: Some(if e.level == Level::Normal { "Normal" } else { "Warning" }.to_owned()),
            reason: Some(e.reason),
            message: Some(e.message.chars().take(1024).collect()),
            count: Some(1),
            first_timestamp: Some(time(e.at)),
            last_timestamp: Some(time(e.at)),
            source: Some(EventSource {
                component: Some("kubelet".into()),
                host: Some(node.clone()),
            }),
            reporting_component: Some("kubelet".into()),
            reporting_instance: Some(node.clone()),
            ..Default::default()
        };
        event.metadata.name = Some(name.clone());
        event.metadata.namespace = Some(namespace.clone());
        match api.create_event(&event).await {
            Ok(()) => {
                if sent.len() >= REMEMBERED {
                    let at = e.at;
                    sent.retain(|_, (.., last)| ms_between(*last, at) < FOLD_MS / 4);
                    if sent.len() >= REMEMBERED {
                        sent.clear();
                    }
                }
                sent.insert(key, (namespace, name, 1, e.at));
            }
            Err(error) => tracing::debug!(error = %stdx::chain(&error), "event not written"),
        }
    }
}

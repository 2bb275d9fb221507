//! Events for people: written in the background, counted up instead of repeated, limited per object.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::time;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde_json::json;
use stdx::queue::{self, QueueCounters, Receiver, Sender};
use stdx::{SharedClock, Shutdown};

use crate::{Client, Error, Kind, Patch};

/// Events waiting to be written; more are dropped and counted.
const PENDING_MAX: usize = 1024;
/// Distinct events remembered for counting up.
const REMEMBERED_MAX: usize = 2048;
/// Events an object may cause at once, and how often one more is allowed after that (upstream's spam filter).
const BURST: f64 = 25.0;
const REFILL: Duration = Duration::from_secs(300);

/// Whether something is as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventType {
    /// Information.
    Normal,
    /// Something may be wrong.
    Warning,
}

impl EventType {
    fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// Records events of one component. Clones share the queue. Recording never waits and never fails.
#[derive(Debug, Clone)]
pub struct Recorder {
    sender: Sender<Note>,
    component: Arc<str>,
    host: Arc<str>,
}

#[derive(Debug)]
struct Note {
    regarding: ObjectReference,
    kind: EventType,
    reason: String,
    message: String,
    component: Arc<str>,
    host: Arc<str>,
}

impl Recorder {
    /// Starts the writer, which ends with `shutdown`. Call inside a tokio runtime. `host` may be empty.
    pub fn new(client: Client, component: &str, host: &str, clock: SharedClock, shutdown: Shutdown) -> Self {
        let (sender, receiver) = queue::bounded(PENDING_MAX);
        let writer = Writer {
            client,
            clock,
            seen: HashMap::new(),
            buckets: HashMap::new(),
            sequence: 0,
        };
        tokio::spawn(async move {
            shutdown.or_stop(writer.run(receiver)).await;
        });
        Self {
            sender,
            component: component.into(),
            host: host.into(),
        }
    }

    /// The same writer for another component, so that one process has one.
    pub fn for_component(&self, component: &str) -> Self {
        Self {
            sender: self.sender.clone(),
            component: component.into(),
            host: self.host.clone(),
        }
    }

    /// Records an event about a typed object.
    pub fn event<K: Kind>(&self, object: &K, kind: EventType, reason: &str, message: impl Into<String>) {
        self.event_for(reference(object), kind, reason, message);
    }

    /// Records an event about whatever `regarding` names.
    pub fn event_for(&self, regarding: ObjectReference, kind: EventType, reason: &str, message: impl Into<String>) {
        let note = Note {
            regarding,
            kind,
            reason: reason.to_owned(),
            message: message.into(),
            component: self.component.clone(),
            host: self.host.clone(),
        };
        // Full: dropped and counted by the queue.
        let _ = self.sender.try_send(note);
    }

    /// Counters of the queue of unwritten events.
    pub fn counters(&self) -> &Arc<QueueCounters> {
        self.sender.counters()
    }
}

/// What an event about this object names.
pub fn reference<K: Kind>(object: &K) -> ObjectReference {
    let meta = object.metadata();
    ObjectReference {
        api_version: Some(K::API_VERSION.to_owned()),
        kind: Some(K::KIND.to_owned()),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        field_path: None,
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Same {
    uid: String,
    namespace: String,
    name: String,
    field: String,
    kind: EventType,
    reason: String,
    message: String,
    component: Arc<str>,
}

struct Seen {
    event: String,
    count: i32,
    order: u64,
}

struct Bucket {
    tokens: f64,
    at: Duration,
}

struct Writer {
    client: Client,
    clock: SharedClock,
    seen: HashMap<Same, Seen>,
    buckets: HashMap<(Arc<str>, String), Bucket>,
    sequence: u64,
}

impl Writer {
    async fn run(mut self, mut receiver: Receiver<Note>) {
        while let Some(note) = receiver.recv().await {
            if !self.allowed(&note) {
                tracing::debug!(
                    reason = note.reason,
                    name = note.regarding.name,
                    "event dropped: object too noisy"
                );
                continue;
            }
            if let Err(error) = self.write(&note).await {
                let gone = error.is_namespace_terminating() || error.is_not_found();
                if !gone {
                    tracing::warn!(reason = note.reason, error = %stdx::chain(&error), "event not written");
                }
            }
        }
    }

    fn allowed(&mut self, note: &Note) -> bool {
        let now = self.clock.monotonic();
        if self.buckets.len() > REMEMBERED_MAX {
            self.buckets.clear();
        }
        let object = format!(
            "{}/{}/{}",
            note.regarding.kind.as_deref().unwrap_or_default(),
            note.regarding.namespace.as_deref().unwrap_or_default(),
            note.regarding.name.as_deref().unwrap_or_default()
        );
        let bucket = self
            .buckets
            .entry((note.component.clone(), object))
            .or_insert(Bucket { tokens: BURST, at: now });
        let refill = now.saturating_sub(bucket.at).as_secs_f64() / REFILL.as_secs_f64();
        bucket.tokens = (bucket.tokens + refill).min(BURST);
        bucket.at = now;
        if bucket.tokens < 1.0 {
            return false;
        }
        bucket.tokens -= 1.0;
        true
    }

    async fn write(&mut self, note: &Note) -> Result<(), Error> {
        let regarding = &note.regarding;
        let namespace = regarding
            .namespace
            .clone()
            .filter(|ns| !ns.is_empty())
            .unwrap_or_else(|| "default".to_owned());
        let same = Same {
            uid: regarding.uid.clone().unwrap_or_default(),
            namespace: namespace.clone(),
            name: regarding.name.clone().unwrap_or_default(),
            field: regarding.field_path.clone().unwrap_or_default(),
            kind: note.kind,
            reason: note.reason.clone(),
            message: note.message.clone(),
            component: note.component.clone(),
        };
        let now = time::now(&*self.clock);
        self.sequence += 1;
        if let Some(seen) = self.seen.get_mut(&same) {
            seen.count += 1;
            seen.order = self.sequence;
            let patch = Patch::Merge(json!({"count": seen.count, "lastTimestamp": time::rfc3339(now)}));
            match self
                .client
                .patch::<Event>(Some(&namespace), &seen.event, &patch, None)
                .await
            {
                // Events expire: write a new one.
                Err(error) if error.is_not_found() => {}
                other => return other.map(drop),
            }
        }
        let nanos = now.as_nanosecond() as u64;
        // The sequence keeps names apart under a clock that stands still.
        let name = format!("{}.{:x}", same.name, nanos.wrapping_add(self.sequence));
        let event = Event {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            involved_object: regarding.clone(),
            reason: Some(note.reason.clone()),
            message: Some(note.message.chars().take(1024).collect()),
            source: Some(EventSource {
                component: Some(note.component.to_string()),
                host: Some(note.host.to_string()).filter(|h| !h.is_empty()),
            }),
            reporting_component: Some(note.component.to_string()),
            reporting_instance: Some(note.host.to_string()),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            count: Some(1),
            type_: Some(note.kind.as_str().to_owned()),
            ..Event::default()
        };
        self.client.create(Some(&namespace), &event).await?;
        if self.seen.len() >= REMEMBERED_MAX
            && let Some(oldest) = self
                .seen
                .iter()
                .min_by_key(|(_, seen)| seen.order)
                .map(|(same, _)| same.clone())
        {
            self.seen.remove(&oldest);
        }
        self.seen.insert(
            same,
            Seen {
                event: name,
                count: 1,
                order: self.sequence,
            },
        );
        Ok(())
    }
}

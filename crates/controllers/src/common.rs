//! What several controllers ask of pods and owners.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use apimachinery::selector::LabelSelector;
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector as WireSelector, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use parking_lot::Mutex;
use reconcile::{Change, Entry, Header, Informer, Key, Kind};

/// The key of a typed object.
pub fn key_of<K: Kind>(object: &K) -> Key {
    let meta = object.metadata();
    Key::new(
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    )
}

/// The uid of a typed object; empty if it was never stored.
pub fn uid_of<K: Kind>(object: &K) -> &str {
    object.metadata().uid.as_deref().unwrap_or_default()
}

/// The name of a typed object.
pub fn name_of<K: Kind>(object: &K) -> &str {
    object.metadata().name.as_deref().unwrap_or_default()
}

/// Deletion was asked for.
pub fn is_deleting<K: Kind>(object: &K) -> bool {
    object.metadata().deletion_timestamp.is_some()
}

/// A reference that makes `owner` the controller of an object.
pub fn controller_reference<K: Kind>(owner: &K) -> OwnerReference {
    OwnerReference {
        api_version: K::API_VERSION.to_owned(),
        kind: K::KIND.to_owned(),
        name: name_of(owner).to_owned(),
        uid: uid_of(owner).to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The selector of a workload. A null or invalid selector selects nothing, so that a mistake never claims pods.
pub fn selector(wire: Option<&WireSelector>) -> LabelSelector {
    let value = serde_json::to_value(wire).unwrap_or_default();
    LabelSelector::from_object(&value).unwrap_or_else(|_| LabelSelector::nothing())
}

/// One condition of a pod.
pub fn pod_condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    pod.status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|c| c.type_ == kind)
}

/// The pod's phase; empty before the first status.
pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default()
}

/// The pod has ended.
pub fn is_terminal(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// The pod counts as one of its workload's replicas: neither ended nor being deleted.
pub fn is_active(pod: &Pod) -> bool {
    !is_terminal(pod) && !is_deleting(pod)
}

/// The Ready condition is True.
pub fn is_ready(pod: &Pod) -> bool {
    pod_condition(pod, "Ready").is_some_and(|c| c.status == "True")
}

/// When a pod that is ready counts as available: `Some(0)` now, `Some(wait)` after that long, `None` if not ready.
pub fn available_in(pod: &Pod, min_ready_s: i32, now: Timestamp) -> Option<Duration> {
    let ready = pod_condition(pod, "Ready").filter(|c| c.status == "True")?;
    if min_ready_s <= 0 {
        return Some(Duration::ZERO);
    }
    let since = ready.last_transition_time.as_ref().map_or(now, |t| t.0);
    let passed = apimachinery::time::since(now, since);
    Some(Duration::from_secs(min_ready_s as u64).saturating_sub(passed))
}

/// Objects of `informer` that `owner` manages or could adopt: those whose controller it is, and those in its namespace
/// without a controller that its selector matches.
pub fn claimable<K: Kind>(informer: &Informer<K>, owner: &Key, uid: &str, selector: &LabelSelector) -> Vec<Arc<Entry>> {
    let mine = |h: &Header| h.controller().is_some_and(|c| c.uid == uid);
    let orphan = |h: &Header| h.controller().is_none() && !h.deleting && selector.matches(&h.labels);
    informer
        .store()
        .list_in(&owner.ns)
        .into_iter()
        .filter(|e| mine(&e.header) || orphan(&e.header))
        .collect()
}

/// Pods by the node they are bound to, kept by a handler.
#[derive(Default)]
pub struct PodsByNode {
    index: Mutex<HashMap<String, BTreeSet<Key>>>,
}

impl PodsByNode {
    /// Follows the informer from now on.
    pub fn follow(pods: &Informer<Pod>) -> Arc<Self> {
        let this = Arc::new(Self::default());
        let (weak, typed) = (Arc::downgrade(&this), pods.clone());
        pods.on_change(move |change| {
            if let Some(this) = weak.upgrade() {
                this.apply(change, &typed);
            }
        });
        this
    }

    fn apply(&self, change: &Change, typed: &Informer<Pod>) {
        let node = |entry: &Entry| {
            typed
                .typed(entry)
                .and_then(|p| p.spec.as_ref().and_then(|s| s.node_name.clone()))
        };
        let key = change.key();
        // A pod is bound once, so an update needs no look at the old state.
        match (&change.old, &change.new) {
            (_, Some(new)) => {
                if let Some(node) = node(new) {
                    self.index.lock().entry(node).or_default().insert(key.clone());
                }
            }
            (Some(old), None) => {
                if let Some(node) = node(old) {
                    let mut index = self.index.lock();
                    if let Some(keys) = index.get_mut(&node) {
                        keys.remove(key);
                        if keys.is_empty() {
                            index.remove(&node);
                        }
                    }
                }
            }
            (None, None) => {}
        }
    }

    /// Keys of the pods bound to `node`, ascending.
    pub fn on(&self, node: &str) -> Vec<Key> {
        self.index.lock().get(node).into_iter().flatten().cloned().collect()
    }

    /// Names of nodes that pods are bound to.
    pub fn nodes(&self) -> Vec<String> {
        self.index.lock().keys().cloned().collect()
    }
}

/// Writes a controller has made and not yet seen in its informer. Until it has, its view is stale and it must not act.
#[derive(Default)]
pub struct Unseen {
    /// Per controller key: uid and resource version of what was written.
    writes: Mutex<HashMap<Key, Vec<(String, String)>>>,
}

impl Unseen {
    /// Remembers a create or update as the server returned it.
    pub fn wrote<K: Kind>(&self, by: &Key, object: &K) {
        let meta = object.metadata();
        let write = (
            meta.uid.clone().unwrap_or_default(),
            meta.resource_version.clone().unwrap_or_default(),
        );
        self.writes.lock().entry(by.clone()).or_default().push(write);
    }

    /// Whether the informer has caught up with every write of `by`.
    pub fn caught_up<K: Kind>(&self, by: &Key, informer: &Informer<K>) -> bool {
        let mut writes = self.writes.lock();
        let Some(pending) = writes.get_mut(by) else { return true };
        pending.retain(|(uid, version)| !informer.store().has_seen(uid, version));
        if pending.is_empty() {
            writes.remove(by);
            return true;
        }
        false
    }

    /// Forgets a key that is gone.
    pub fn forget(&self, by: &Key) {
        self.writes.lock().remove(by);
    }
}

/// When an informer lags behind our own writes, events wake us; this is the net below.
pub const STALE_RECHECK: Duration = Duration::from_millis(500);

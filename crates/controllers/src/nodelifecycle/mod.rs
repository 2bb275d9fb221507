//! Notices nodes that fell silent, taints nodes by their conditions, and takes pods off nodes that no longer hold them.
//!
//! A node lives as long as its lease in `kube-node-lease` is renewed, or its status is posted. Renewals are timed by our
//! own clock when they are seen, so that a node's clock does not matter. Each node has one timer, set to the moment its
//! silence would be too long or the next pod would have to leave; nothing is polled.

pub mod plan;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use parking_lot::Mutex;
use reconcile::informer::Selection;
use reconcile::{DeleteParams, Error, EventType, Informer, Key, Patch, Queue, Recorder, Requeue, run_controller};
use serde_json::json;

use crate::Context;
use crate::common::{PodsByNode, is_active, is_ready, name_of, uid_of};
use plan::{Leave, condition, leave, silent_conditions, taints};

const NAME: &str = "node-controller";
const EVICTION: &str = "taint-eviction-controller";
const WORKERS: usize = 4;
const LEASE_NAMESPACE: &str = "kube-node-lease";

struct Controller {
    context: Context,
    recorder: Recorder,
    evictions: Recorder,
    nodes: Informer<Node>,
    pods: Informer<Pod>,
    on_node: Arc<PodsByNode>,
    /// When each node last gave a sign of life, by our monotonic clock.
    alive: Mutex<HashMap<String, Alive>>,
}

#[derive(Default)]
struct Alive {
    at: Duration,
    /// The last signs by source, to tell a new one from an old one read again.
    signs: HashMap<&'static str, String>,
}

pub(crate) async fn run(context: Context) {
    let queue: Queue<Key> = Queue::new();
    let leases: Informer<Lease> = context.informers.get_selection(Selection {
        namespace: LEASE_NAMESPACE.to_owned(),
        ..Selection::default()
    });
    let pods: Informer<Pod> = context.informers.get();
    let on_node = PodsByNode::follow(&pods);
    let this = Arc::new(Controller {
        recorder: context.recorder.for_component(NAME),
        evictions: context.recorder.for_component(EVICTION),
        nodes: context.informers.get(),
        on_node,
        pods,
        alive: Mutex::default(),
        context,
    });
    let (sink, weak, typed) = (queue.clone(), Arc::downgrade(&this), this.nodes.clone());
    this.nodes.on_change(move |change| {
        let Some(this) = weak.upgrade() else { return };
        let name = &change.key().name;
        match change.new.as_ref().and_then(|entry| typed.typed(entry)) {
            Some(node) => this.heard(name, "status", heartbeat(&node)),
            None => {
                this.alive.lock().remove(name);
            }
        }
        sink.add(change.key().clone());
    });
    let (weak, typed) = (Arc::downgrade(&this), leases.clone());
    leases.on_change(move |change| {
        let (Some(this), Some(entry)) = (weak.upgrade(), &change.new) else {
            return;
        };
        let renewed = typed
            .typed(entry)
            .and_then(|l| l.spec.as_ref().and_then(|s| s.renew_time.clone()));
        if let Some(at) = renewed {
            this.heard(&change.key().name, "lease", at.0.to_string());
        }
    });
    let (sink, weak) = (queue.clone(), Arc::downgrade(&this));
    this.pods.on_change(move |change| {
        // A pod that came to a tainted node may have to leave it; on other nodes nothing follows.
        let (Some(this), None, Some(new)) = (weak.upgrade(), &change.old, &change.new) else {
            return;
        };
        let node = this
            .pods
            .typed(new)
            .and_then(|p| p.spec.as_ref().and_then(|s| s.node_name.clone()));
        if let Some(node) = node {
            sink.add(Key::new("", node));
        }
    });
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.nodes.wait_synced().await;
        this.pods.wait_synced().await;
        leases.wait_synced().await;
    };
    if shutdown.or_stop(synced).await.is_none() {
        return;
    }
    let work = move |key| {
        let this = this.clone();
        async move { this.reconcile(key).await }
    };
    run_controller(NAME, queue, WORKERS, work, shutdown).await;
}

/// The newest heartbeat among the conditions that the kubelet itself posts.
fn heartbeat(node: &Node) -> String {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    let ready = conditions
        .into_iter()
        .flatten()
        .find(|c| c.type_ == "Ready" && c.status != "Unknown");
    ready
        .and_then(|c| c.last_heartbeat_time.as_ref())
        .map(|t| t.0.to_string())
        .unwrap_or_default()
}

impl Controller {
    /// Notes a sign of life, if it is a new one. The first sight of a node counts as one; an empty sign is none.
    fn heard(&self, node: &str, source: &'static str, sign: String) {
        let at = self.context.config.clock.monotonic();
        let mut alive = self.alive.lock();
        let known = alive
            .entry(node.to_owned())
            .or_insert_with(|| Alive { at, ..Alive::default() });
        if !sign.is_empty() && known.signs.get(source) != Some(&sign) {
            known.at = at;
            known.signs.insert(source, sign);
        }
    }

    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let Some(node) = self.nodes.by_key(&key) else {
            return Ok(Requeue::Done);
        };
        let name = &key.name;
        let clock = &self.context.config.clock;
        let heard_at = self.alive.lock().get(name).map_or_else(|| clock.monotonic(), |a| a.at);
        let silence = clock.monotonic().saturating_sub(heard_at);
        let grace = self.context.config.node_grace;
        let mut next = None;
        let now = self.context.now();
        let mut node = node;
        if silence < grace {
            next = Some(grace - silence);
        } else if let Some(conditions) = silent_conditions(&node, now) {
            let was_ready = condition(&node, "Ready") == "True";
            let patch = Patch::Merge(json!({
                "metadata": {"uid": uid_of(&*node), "resourceVersion": node.metadata.resource_version},
                "status": {"conditions": conditions},
            }));
            node = Arc::new(self.context.client.patch(None, name, &patch, Some("status")).await?);
            tracing::info!(
                node = name,
                silent_s = silence.as_secs(),
                "node is silent, its status is unknown"
            );
            if was_ready {
                self.say_not_ready(&node);
            }
        }
        if let Some(taints) = taints(&node, now) {
            let patch = Patch::Merge(json!({
                "metadata": {"uid": uid_of(&*node), "resourceVersion": node.metadata.resource_version},
                "spec": {"taints": taints},
            }));
            node = Arc::new(self.context.client.patch(None, name, &patch, None).await?);
        }
        let pods: Vec<Arc<Pod>> = self
            .on_node
            .on(name)
            .iter()
            .filter_map(|k| self.pods.by_key(k))
            .collect();
        if matches!(condition(&node, "Ready"), "False" | "Unknown") {
            for pod in pods.iter().filter(|p| is_active(p) && is_ready(p)) {
                self.mark_not_ready(pod).await?;
            }
        }
        for pod in &pods {
            match leave(&node, pod, now) {
                Leave::Never => {}
                Leave::Now => self.evict(pod).await?,
                Leave::In(wait) => next = Some(next.map_or(wait, |n: Duration| n.min(wait))),
            }
        }
        Ok(next.map_or(Requeue::Done, Requeue::After))
    }

    fn say_not_ready(&self, node: &Node) {
        let text = format!("Node {} status is now: NodeNotReady", name_of(node));
        self.recorder.event(node, EventType::Normal, "NodeNotReady", text);
    }

    /// Takes the pod out of Services: nobody vouches for it any more.
    async fn mark_not_ready(&self, pod: &Pod) -> Result<(), Error> {
        let now = apimachinery::time::rfc3339(self.context.now());
        let patch = Patch::Strategic(json!({
            "metadata": {"uid": uid_of(pod)},
            "status": {"conditions": [{"type": "Ready", "status": "False", "lastTransitionTime": now}]},
        }));
        self.recorder
            .event(pod, EventType::Warning, "NodeNotReady", "Node is not ready");
        ignore_gone(
            self.context
                .client
                .patch::<Pod>(pod.metadata.namespace.as_deref(), name_of(pod), &patch, Some("status"))
                .await,
        )
    }

    async fn evict(&self, pod: &Pod) -> Result<(), Error> {
        let (client, ns, name) = (&self.context.client, pod.metadata.namespace.as_deref(), name_of(pod));
        let text = format!("Marking for deletion Pod {}/{name}", ns.unwrap_or_default());
        self.evictions
            .event(pod, EventType::Normal, "TaintManagerEviction", text);
        let now = apimachinery::time::rfc3339(self.context.now());
        let patch = Patch::Strategic(json!({
            "metadata": {"uid": uid_of(pod)},
            "status": {"conditions": [{
                "type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager",
                "message": "Taint manager: deleting due to NoExecute taint", "lastTransitionTime": now,
            }]},
        }));
        ignore_gone(client.patch::<Pod>(ns, name, &patch, Some("status")).await)?;
        ignore_gone(client.delete::<Pod>(ns, name, &DeleteParams::uid(uid_of(pod))).await)
    }
}

fn ignore_gone<T>(result: Result<T, Error>) -> Result<(), Error> {
    match result {
        Err(error) if !error.is_not_found() && !error.is_conflict() => Err(error),
        _ => Ok(()),
    }
}

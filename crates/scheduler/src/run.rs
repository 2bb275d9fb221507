//! The loop: follow pods and nodes, decide in batches under one lock, bind and report outside of it.

use std::sync::{Arc, Weak};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use parking_lot::Mutex;
use reconcile::{Change, Client, Error, EventType, Informer, Informers, Patch, Recorder};
use serde_json::{Value, json};
use stdx::{Backoff, BackoffPolicy, RealClock, Rng, SharedClock, Shutdown};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

use crate::cache::Cache;
use crate::model::{NodeInfo, PodInfo};
use crate::pending::Pending;
use crate::plan::{Decision, plan};

/// Pods that name another scheduler are left alone.
pub const SCHEDULER_NAME: &str = "default-scheduler";
/// Decisions made before the lock is given up.
const BATCH: usize = 32;
/// Writes under way at once.
const WRITES_MAX: usize = 64;
/// Delay after a binding that failed.
const RETRY: BackoffPolicy = BackoffPolicy::doubling(Duration::from_millis(100), Duration::from_secs(10));

struct World {
    cache: Cache,
    pending: Pending,
    /// Something may have made room since parked pods were last looked at.
    room: bool,
}

struct Shared {
    world: Mutex<World>,
    wake: Notify,
    client: Client,
    recorder: Recorder,
    clock: SharedClock,
    pods: Informer<Pod>,
}

enum Work {
    Bind { pod: Arc<PodInfo>, node: String },
    Refuse { pod: Arc<PodInfo>, message: Arc<str> },
}

/// Schedules pods of one cluster until `shutdown`; returns when the writes under way have ended.
pub async fn run(client: Client, informers: Informers, shutdown: Shutdown) {
    let clock = RealClock::shared();
    let recorder = Recorder::new(client.clone(), SCHEDULER_NAME, "", clock.clone(), shutdown.clone());
    let pods = informers.get::<Pod>();
    let nodes = informers.get::<Node>();
    let namespaces = informers.get::<Namespace>();
    let shared = Arc::new(Shared {
        world: Mutex::new(World {
            cache: Cache::default(),
            pending: Pending::default(),
            room: false,
        }),
        wake: Notify::new(),
        client,
        recorder,
        clock,
        pods: pods.clone(),
    });
    // Handlers hold the shared state weakly: the informers outlive a scheduler that was stopped.
    let weak = Arc::downgrade(&shared);
    namespaces.on_change(move |change| {
        if let Some(shared) = weak.upgrade() {
            let labels = change.new.as_ref().map(|entry| entry.header.labels.clone());
            shared.world.lock().cache.set_namespace(&change.key().name, labels);
        }
    });
    let (weak, typed) = (Arc::downgrade(&shared), nodes.clone());
    nodes.on_change(move |change| {
        if let Some(shared) = weak.upgrade() {
            shared.node_changed(change, &typed);
        }
    });
    let weak = Arc::downgrade(&shared);
    pods.on_change(move |change| {
        if let Some(shared) = weak.upgrade() {
            shared.pod_changed(change);
        }
    });
    // A decision before the nodes are known would report that there are none.
    let synced = async {
        nodes.wait_synced().await;
        pods.wait_synced().await;
        namespaces.wait_synced().await;
    };
    if shutdown.or_stop(synced).await.is_none() {
        return;
    }
    decide_and_write(&shared, &shutdown).await;
}

async fn decide_and_write(shared: &Arc<Shared>, shutdown: &Shutdown) {
    let permits = Arc::new(Semaphore::new(WRITES_MAX));
    let mut writes = JoinSet::new();
    let mut stopped = Box::pin(shutdown.wait());
    loop {
        let work = shared.decide();
        if work.is_empty() {
            // Cancel safety: both futures only signal; no state is lost when the other one wins.
            tokio::select! {
                () = &mut stopped => break,
                () = shared.wake.notified() => continue,
            }
        }
        for item in work {
            let Ok(permit) = permits.clone().acquire_owned().await else {
                return;
            };
            let shared = shared.clone();
            writes.spawn(async move {
                match item {
                    Work::Bind { pod, node } => shared.bind(pod, node).await,
                    Work::Refuse { pod, message } => shared.refuse(&pod, &message).await,
                }
                drop(permit);
            });
            while writes.try_join_next().is_some() {}
        }
        if shutdown.is_triggered() {
            break;
        }
        // In paused or single-threaded runtimes the writes must get a turn.
        tokio::task::yield_now().await;
    }
    while writes.join_next().await.is_some() {}
}

impl Shared {
    fn node_changed(&self, change: &Change, typed: &Informer<Node>) {
        let mut world = self.world.lock();
        match change.new.as_ref().map(|entry| typed.typed(entry)) {
            Some(Some(node)) => world.room |= world.cache.set_node(NodeInfo::parse(&node)),
            // A node that cannot be read cannot be used.
            None | Some(None) => {
                world.cache.remove_node(&change.key().name);
                // What waits may have to say so in other words.
                world.cache.touch();
                world.room = true;
            }
        }
        let room = world.room;
        drop(world);
        if room {
            self.wake.notify_one();
        }
    }

    fn pod_changed(&self, change: &Change) {
        match change.new.as_ref().and_then(|entry| self.pods.typed(entry)) {
            Some(pod) => self.consider(PodInfo::parse(&pod)),
            None => {
                let uid = &change.latest().header.uid;
                let mut world = self.world.lock();
                world.pending.remove(uid);
                self.removed(&mut world, uid);
            }
        }
    }

    fn removed(&self, world: &mut World, uid: &str) {
        if world.cache.remove_pod(uid) {
            world.room = true;
            self.wake.notify_one();
        }
    }

    /// Takes a pod's newest state into account.
    fn consider(&self, pod: PodInfo) {
        let pod = Arc::new(pod);
        let mut world = self.world.lock();
        if pod.terminal {
            world.pending.remove(&pod.uid);
            self.removed(&mut world, &pod.uid);
        } else if !pod.node.is_empty() {
            world.pending.remove(&pod.uid);
            let known = world.cache.node_of(&pod.uid) == Some(&pod.node)
                && world.cache.pod(&pod.uid).is_some_and(|old| same_load(old, &pod));
            if !known {
                let node = pod.node.clone();
                world.cache.place(pod, &node);
                if world.pending.wake_sociable() {
                    world.cache.touch();
                    self.wake.notify_one();
                }
            }
        } else if world.cache.node_of(&pod.uid).is_some() {
            // Decided; the binding is on its way.
        } else if pod.deleting || pod.gated || !(pod.scheduler.is_empty() || pod.scheduler == SCHEDULER_NAME) {
            world.pending.remove(&pod.uid);
        } else if world.pending.upsert(pod) {
            self.wake.notify_one();
        }
    }

    /// Decides a batch. Each decision counts for the next one.
    fn decide(&self) -> Vec<Work> {
        let mut work = Vec::new();
        let mut world = self.world.lock();
        let World { cache, pending, room } = &mut *world;
        if std::mem::take(room) {
            pending.wake();
        }
        while work.len() < BATCH {
            let Some(pod) = pending.pop() else { break };
            let (class, generation) = (pod.class(), cache.generation());
            let message = match pending.refusal(class, generation) {
                Some(message) => message,
                None => match plan(cache, &pod) {
                    Decision::Bind { node, looked_at } => {
                        cache.advance(looked_at);
                        cache.place(pod.clone(), &node);
                        pending.remove(&pod.uid);
                        work.push(Work::Bind { pod, node });
                        continue;
                    }
                    Decision::Unschedulable { message } => {
                        let message: Arc<str> = message.into();
                        pending.remember_refusal(class, generation, message.clone());
                        message
                    }
                },
            };
            pending.park(&pod.uid);
            let said = pod
                .reported
                .as_ref()
                .is_some_and(|(reason, text)| reason == "Unschedulable" && **text == *message);
            if !said {
                work.push(Work::Refuse { pod, message });
            }
        }
        if !work.is_empty() {
            tracing::debug!(decided = work.len(), pending = pending.len(), "placed a batch");
        }
        work
    }

    async fn bind(self: &Arc<Self>, pod: Arc<PodInfo>, node: String) {
        let key = &pod.key;
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding",
            "metadata": {"name": key.name, "namespace": key.ns, "uid": pod.uid},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        let outcome: Result<Value, Error> = self
            .client
            .create_subresource::<Pod, _, _>(Some(&key.ns), &key.name, "binding", &binding)
            .await;
        match outcome {
            Ok(_) => {
                let text = format!("Successfully assigned {key} to {node}");
                self.recorder
                    .event_for(reference(&pod), EventType::Normal, "Scheduled", text);
            }
            Err(error) => {
                if error.is_not_found() || error.is_conflict() {
                    tracing::debug!(pod = %key, node, error = %stdx::chain(&error), "binding lost a race");
                } else {
                    tracing::warn!(pod = %key, node, error = %stdx::chain(&error), "binding failed");
                }
                tokio::spawn(settle(Arc::downgrade(self), pod));
            }
        }
    }

    /// Says on the pod and in an event why it has no place.
    async fn refuse(self: &Arc<Self>, pod: &PodInfo, message: &str) {
        self.recorder
            .event_for(reference(pod), EventType::Warning, "FailedScheduling", message);
        let mut condition = json!({
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message,
        });
        if pod.reported.is_none() {
            condition["lastTransitionTime"] = apimachinery::time::now_rfc3339(&*self.clock).into();
        }
        let patch = Patch::Strategic(json!({"metadata": {"uid": pod.uid}, "status": {"conditions": [condition]}}));
        let key = &pod.key;
        match self
            .client
            .patch::<Pod>(Some(&key.ns), &key.name, &patch, Some("status"))
            .await
        {
            Ok(_) => {}
            Err(error) if error.is_not_found() || error.is_conflict() => {}
            Err(error) => {
                tracing::warn!(pod = %key, error = %stdx::chain(&error), "condition not written");
                let (shared, uid) = (Arc::downgrade(self), pod.uid.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(RETRY.delay(0, &mut Rng::from_entropy())).await;
                    if let Some(shared) = shared.upgrade()
                        && shared.world.lock().pending.unpark(&uid)
                    {
                        shared.wake.notify_one();
                    }
                });
            }
        }
    }
}

/// Finds out what became of a pod whose binding failed. Until then it stays counted: the answer may have been lost after
/// the binding was made, and its place must not be given away.
async fn settle(shared: Weak<Shared>, pod: Arc<PodInfo>) {
    let mut rng = Rng::from_entropy();
    let mut backoff = Backoff::new(RETRY);
    loop {
        tokio::time::sleep(backoff.next(&mut rng)).await;
        let Some(shared) = shared.upgrade() else { return };
        let key = &pod.key;
        let Ok(live) = shared.client.get_opt::<Pod>(Some(&key.ns), &key.name).await else {
            continue;
        };
        let live = live
            .map(|live| PodInfo::parse(&live))
            .filter(|live| live.uid == pod.uid);
        if live.as_ref().is_none_or(|live| live.node.is_empty()) {
            shared.removed(&mut shared.world.lock(), &pod.uid);
        }
        if let Some(live) = live {
            shared.consider(live);
        }
        return;
    }
}

/// Whether the counted pod and its newest state are the same to others.
fn same_load(old: &PodInfo, new: &PodInfo) -> bool {
    old.requests == new.requests && old.labels == new.labels && old.ports == new.ports && old.deleting == new.deleting
}

fn reference(pod: &PodInfo) -> k8s_openapi::api::core::v1::ObjectReference {
    k8s_openapi::api::core::v1::ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(pod.key.ns.clone()),
        name: Some(pod.key.name.clone()),
        uid: Some(pod.uid.clone()),
        ..Default::default()
    }
}

//! Runs one pod of each DaemonSet on every node that is one for it.
//!
//! Watches DaemonSets, Pods, Nodes and revisions. Pods are bound by the scheduler: each names its node by affinity. The
//! history of templates is kept as ControllerRevisions; an update replaces pods node by node.

pub mod fit;
pub mod plan;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use futures::future::join_all;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet};
use k8s_openapi::api::core::v1::{Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use reconcile::{DeleteParams, Error, EventType, Informer, Key, Queue, Recorder, Requeue, run_controller};

use crate::Context;
use crate::common::{STALE_RECHECK, Unseen, controller_reference, is_deleting, key_of, name_of, uid_of};
use crate::history::{self, HASH};
use plan::plan;

const NAME: &str = "daemonset-controller";
const WORKERS: usize = 2;

struct Controller {
    context: Context,
    recorder: Recorder,
    sets: Informer<DaemonSet>,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    revisions: Informer<ControllerRevision>,
    unseen: Unseen,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        recorder: context.recorder.for_component(NAME),
        sets: context.informers.get(),
        pods: context.informers.get(),
        nodes: context.informers.get(),
        revisions: context.informers.get(),
        unseen: Unseen::default(),
        context,
    });
    let sink = queue.clone();
    this.sets.on_change(move |change| sink.add(change.key().clone()));
    for owned in [this.pods.store(), this.revisions.store()] {
        let sink = queue.clone();
        owned.on_change(Box::new(move |change| {
            for entry in [&change.old, &change.new].into_iter().flatten() {
                if let Some(owner) = entry.header.controller().filter(|o| o.kind == "DaemonSet") {
                    sink.add(Key::new(entry.header.key.ns.clone(), owner.name.clone()));
                }
            }
        }));
    }
    let (sink, sets, nodes) = (queue.clone(), this.sets.clone(), this.nodes.clone());
    this.nodes.on_change(move |change| {
        // A heartbeat changes nothing here; labels and taints do.
        let part = |entry: &Option<Arc<reconcile::Entry>>| {
            let node = nodes.typed(entry.as_ref()?)?;
            let spec = node.spec.clone().unwrap_or_default();
            Some((node.metadata.labels.clone(), spec.taints, spec.unschedulable))
        };
        if part(&change.old) != part(&change.new) {
            for set in sets.list() {
                sink.add(key_of(&*set));
            }
        }
    });
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.sets.wait_synced().await;
        this.pods.wait_synced().await;
        this.nodes.wait_synced().await;
        this.revisions.wait_synced().await;
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

impl Controller {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let Some(set) = self.sets.by_key(&key) else {
            self.unseen.forget(&key);
            return Ok(Requeue::Done);
        };
        if !self.unseen.caught_up(&key, &self.pods) {
            return Ok(Requeue::After(STALE_RECHECK));
        }
        let Some(spec) = set.spec.as_ref() else {
            return Ok(Requeue::Done);
        };
        let client = &self.context.client;
        let revisions = self.revisions.by_owner(uid_of(&*set));
        let hash = match is_deleting(&*set) {
            true => Some(String::new()),
            false => history::carry_out(client, &key, history::plan(&*set, &spec.template, &revisions)).await?,
        };
        let Some(hash) = hash else { return Ok(Requeue::Done) };
        let pods = self.pods.by_owner(uid_of(&*set));
        let plan = plan(&set, &hash, &pods, &self.nodes.list(), self.context.now());
        for name in &plan.failed {
            let text = format!("Found failed daemon pod {}/{name}, will try to kill it", key.ns);
            self.recorder.event(&*set, EventType::Warning, "FailedDaemonPod", text);
        }
        let outcome = self.act(&key, &set, &hash, &plan).await;
        if set.status.as_ref() != Some(&plan.status) {
            let mut update = (*set).clone();
            update.status = Some(plan.status.clone());
            match client.update_status(Some(&key.ns), &update).await {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
        }
        outcome?;
        let in_use = |h: &str| {
            h == hash
                || pods
                    .iter()
                    .any(|p| p.metadata.labels.as_ref().and_then(|l| l.get(HASH)).map(String::as_str) == Some(h))
        };
        let limit = spec.revision_history_limit.unwrap_or(10).max(0) as usize;
        history::truncate(client, &key, history::expendable(&revisions, in_use, limit)).await?;
        Ok(plan.requeue.map_or(Requeue::Done, Requeue::After))
    }

    async fn act(&self, key: &Key, set: &DaemonSet, hash: &str, plan: &plan::Plan) -> Result<(), Error> {
        let deletions = plan.delete.iter().filter_map(|name| self.pods.get(&key.ns, name));
        for result in join_all(deletions.map(|pod| self.delete(key, set, pod))).await {
            result?;
        }
        // Slow start: when the first pod is refused, two hundred others are not tried.
        let (mut at, mut batch) = (0, 1);
        while at < plan.create.len() {
            let end = (at + batch).min(plan.create.len());
            let made = plan.create[at..end]
                .iter()
                .map(|node| self.create(key, set, hash, node));
            for result in join_all(made).await {
                result?;
            }
            at = end;
            batch *= 2;
        }
        Ok(())
    }

    async fn delete(&self, key: &Key, set: &DaemonSet, pod: Arc<Pod>) -> Result<(), Error> {
        let name = name_of(&*pod);
        let params = DeleteParams::uid(uid_of(&*pod));
        match self.context.client.delete::<Pod>(Some(&key.ns), name, &params).await {
            Ok(()) => {
                let text = format!("Deleted pod: {name}");
                self.recorder.event(set, EventType::Normal, "SuccessfulDelete", text);
                Ok(())
            }
            Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn create(&self, key: &Key, set: &DaemonSet, hash: &str, node: &str) -> Result<(), Error> {
        match self
            .context
            .client
            .create(Some(&key.ns), &pod_of(key, set, hash, node))
            .await
        {
            Ok(pod) => {
                self.unseen.wrote(key, &pod);
                let text = format!("Created pod: {}", name_of(&pod));
                self.recorder.event(set, EventType::Normal, "SuccessfulCreate", text);
                Ok(())
            }
            Err(error) if error.is_namespace_terminating() => Ok(()),
            Err(error) => {
                let why = error
                    .status()
                    .map_or_else(|| stdx::chain(&error).to_string(), |s| s.message.clone());
                self.recorder.event(
                    set,
                    EventType::Warning,
                    "FailedCreate",
                    format!("Error creating: {why}"),
                );
                Err(error)
            }
        }
    }
}

/// The pod of the set for one node.
fn pod_of(key: &Key, set: &DaemonSet, hash: &str, node: &str) -> Pod {
    let template = set.spec.as_ref().map(|s| s.template.clone()).unwrap_or_default();
    let meta = template.metadata.unwrap_or_default();
    let mut labels = meta.labels.unwrap_or_default();
    labels.insert(HASH.to_owned(), hash.to_owned());
    let mut spec = template.spec.unwrap_or_default();
    fit::tolerate(&mut spec);
    // Upstream replaces whatever terms the template has: they were looked at when the node was chosen.
    let affinity = spec
        .affinity
        .get_or_insert_default()
        .node_affinity
        .get_or_insert_default();
    affinity.required_during_scheduling_ignored_during_execution = Some(NodeSelector {
        node_selector_terms: vec![NodeSelectorTerm {
            match_fields: Some(vec![NodeSelectorRequirement {
                key: "metadata.name".to_owned(),
                operator: "In".to_owned(),
                values: Some(vec![node.to_owned()]),
            }]),
            ..NodeSelectorTerm::default()
        }],
    });
    Pod {
        metadata: ObjectMeta {
            namespace: Some(key.ns.clone()),
            generate_name: Some(format!("{}-", key.name)),
            labels: Some(labels),
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![controller_reference(set)]),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        status: None,
    }
}

//! Keeps as many pods as each ReplicaSet asks for.
//!
//! Watches ReplicaSets and Pods. A pod's change wakes its controller; the change of a pod without controller wakes every
//! ReplicaSet of the namespace that selects it. After a write the controller waits until its informer shows it.

pub mod plan;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use futures::future::join_all;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use reconcile::{
    Change, DeleteParams, Error, EventType, Informer, Key, Patch, Queue, Recorder, Requeue, run_controller,
};
use serde_json::json;

use crate::Context;
use crate::common::{STALE_RECHECK, Unseen, claimable, controller_reference, name_of, selector, uid_of};
use plan::{Plan, plan, set_failure};

const NAME: &str = "replicaset-controller";
const WORKERS: usize = 8;

struct Controller {
    context: Context,
    recorder: Recorder,
    sets: Informer<ReplicaSet>,
    pods: Informer<Pod>,
    unseen: Unseen,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        recorder: context.recorder.for_component(NAME),
        sets: context.informers.get(),
        pods: context.informers.get(),
        unseen: Unseen::default(),
        context,
    });
    let sink = queue.clone();
    this.sets.on_change(move |change| sink.add(change.key().clone()));
    let (sink, sets) = (queue.clone(), this.sets.clone());
    this.pods.on_change(move |change| {
        for key in affected(change, &sets) {
            sink.add(key);
        }
    });
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.sets.wait_synced().await;
        this.pods.wait_synced().await;
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

/// The ReplicaSets a pod's change concerns.
fn affected(change: &Change, sets: &Informer<ReplicaSet>) -> Vec<Key> {
    let mut keys: Vec<Key> = Vec::new();
    for entry in [&change.old, &change.new].into_iter().flatten() {
        match entry.header.controller() {
            Some(owner) if owner.kind == "ReplicaSet" => {
                let key = Key::new(entry.header.key.ns.clone(), owner.name.clone());
                if !keys.contains(&key) {
                    keys.push(key);
                }
            }
            Some(_) => {}
            // Nobody's pod: whoever selects it may adopt it.
            None if change.new.is_some() && !entry.header.deleting => {
                let selecting = sets
                    .list_in(&entry.header.key.ns)
                    .into_iter()
                    .filter(|rs| selector(rs.spec.as_ref().map(|s| &s.selector)).matches(&entry.header.labels));
                keys.extend(selecting.map(|rs| crate::common::key_of(&*rs)));
            }
            None => {}
        }
    }
    keys
}

impl Controller {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let Some(rs) = self.sets.by_key(&key) else {
            self.unseen.forget(&key);
            return Ok(Requeue::Done);
        };
        if !self.unseen.caught_up(&key, &self.pods) {
            return Ok(Requeue::After(STALE_RECHECK));
        }
        let selector = selector(rs.spec.as_ref().map(|s| &s.selector));
        let entries = claimable(&self.pods, &key, uid_of(&*rs), &selector);
        let pods: Vec<Arc<Pod>> = entries.iter().filter_map(|e| self.pods.typed(e)).collect();
        let mut plan = plan(&rs, &pods, &self.related(&rs), self.context.now());
        let outcome = self.act(&key, &rs, &plan).await;
        let failure = match &outcome {
            Ok(()) if plan.create == 0 && plan.delete.is_empty() && plan.adopt.is_empty() => None,
            // What was started is not yet seen; an earlier failure stands until it is.
            Ok(()) => keep_failure(&rs),
            Err(error) => {
                let reason = if plan.create > 0 {
                    "FailedCreate"
                } else {
                    "FailedDelete"
                };
                Some((reason, stdx::chain(error).to_string()))
            }
        };
        set_failure(&mut plan.status, failure, self.context.now());
        self.write_status(&key, &rs, plan.status).await?;
        outcome?;
        Ok(plan.requeue.map_or(Requeue::Done, Requeue::After))
    }

    /// Pods per node of all ReplicaSets with the same controller (a Deployment's old and new ones).
    fn related(&self, rs: &ReplicaSet) -> HashMap<String, usize> {
        let owner = rs
            .metadata
            .owner_references
            .iter()
            .flatten()
            .find(|o| o.controller == Some(true));
        let siblings: Vec<String> = match owner {
            Some(owner) => self
                .sets
                .store()
                .by_owner(&owner.uid)
                .iter()
                .map(|e| e.header.uid.clone())
                .collect(),
            None => vec![uid_of(rs).to_owned()],
        };
        let mut counts = HashMap::new();
        for pod in siblings.iter().flat_map(|uid| self.pods.by_owner(uid)) {
            if let Some(node) = pod.spec.as_ref().and_then(|s| s.node_name.clone())
                && crate::common::is_active(&pod)
            {
                *counts.entry(node).or_default() += 1;
            }
        }
        counts
    }

    async fn act(&self, key: &Key, rs: &ReplicaSet, plan: &Plan) -> Result<(), Error> {
        for name in &plan.adopt {
            let Some(pod) = self.pods.get(&key.ns, name) else {
                continue;
            };
            let mut owners = pod.metadata.owner_references.clone().unwrap_or_default();
            owners.push(controller_reference(rs));
            self.set_owners(key, &pod, owners).await?;
        }
        for name in &plan.release {
            let Some(pod) = self.pods.get(&key.ns, name) else {
                continue;
            };
            let mut owners = pod.metadata.owner_references.clone().unwrap_or_default();
            owners.retain(|o| o.uid != uid_of(rs));
            self.set_owners(key, &pod, owners).await?;
        }
        // Slow start: when the first pod is refused, five hundred others are not tried.
        let (mut left, mut batch) = (plan.create, 1);
        while left > 0 {
            let size = batch.min(left);
            let results = join_all((0..size).map(|_| self.create(key, rs))).await;
            for result in results {
                result?;
            }
            left -= size;
            batch *= 2;
        }
        let deletions = plan.delete.iter().filter_map(|name| self.pods.get(&key.ns, name));
        for result in join_all(deletions.map(|pod| self.delete(key, rs, pod))).await {
            result?;
        }
        Ok(())
    }

    /// Replaces the owners of a pod, if nobody changed it meanwhile.
    async fn set_owners(
        &self,
        key: &Key,
        pod: &Pod,
        owners: Vec<k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference>,
    ) -> Result<(), Error> {
        let patch = Patch::Merge(json!({"metadata": {
            "uid": uid_of(pod), "resourceVersion": pod.metadata.resource_version, "ownerReferences": owners,
        }}));
        let written: Pod = self
            .context
            .client
            .patch(Some(&key.ns), name_of(pod), &patch, None)
            .await?;
        self.unseen.wrote(key, &written);
        Ok(())
    }

    async fn create(&self, key: &Key, rs: &ReplicaSet) -> Result<(), Error> {
        let template = rs.spec.as_ref().and_then(|s| s.template.clone()).unwrap_or_default();
        let meta = template.metadata.unwrap_or_default();
        let pod = Pod {
            metadata: ObjectMeta {
                namespace: Some(key.ns.clone()),
                generate_name: Some(format!("{}-", key.name)),
                labels: meta.labels,
                annotations: meta.annotations,
                finalizers: meta.finalizers,
                owner_references: Some(vec![controller_reference(rs)]),
                ..ObjectMeta::default()
            },
            spec: template.spec,
            status: None,
        };
        match self.context.client.create(Some(&key.ns), &pod).await {
            Ok(pod) => {
                self.unseen.wrote(key, &pod);
                self.recorder.event(
                    rs,
                    EventType::Normal,
                    "SuccessfulCreate",
                    format!("Created pod: {}", name_of(&pod)),
                );
                Ok(())
            }
            // The namespace goes, and this ReplicaSet with it.
            Err(error) if error.is_namespace_terminating() => Ok(()),
            Err(error) => {
                let text = format!("Error creating: {}", message(&error));
                self.recorder.event(rs, EventType::Warning, "FailedCreate", text);
                Err(error)
            }
        }
    }

    async fn delete(&self, key: &Key, rs: &ReplicaSet, pod: Arc<Pod>) -> Result<(), Error> {
        let name = name_of(&*pod);
        match self
            .context
            .client
            .delete::<Pod>(Some(&key.ns), name, &DeleteParams::uid(uid_of(&*pod)))
            .await
        {
            Ok(()) => {
                self.recorder.event(
                    rs,
                    EventType::Normal,
                    "SuccessfulDelete",
                    format!("Deleted pod: {name}"),
                );
                Ok(())
            }
            Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
            Err(error) => {
                let text = format!("Error deleting: {}", message(&error));
                self.recorder.event(rs, EventType::Warning, "FailedDelete", text);
                Err(error)
            }
        }
    }

    async fn write_status(&self, key: &Key, rs: &ReplicaSet, status: ReplicaSetStatus) -> Result<(), Error> {
        if rs.status.as_ref() == Some(&status) {
            return Ok(());
        }
        let mut update = rs.clone();
        update.status = Some(status);
        match self.context.client.update_status(Some(&key.ns), &update).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn keep_failure(rs: &ReplicaSet) -> Option<(&str, String)> {
    let failure = rs
        .status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|c| c.type_ == "ReplicaFailure")?;
    Some((failure.reason.as_deref()?, failure.message.clone().unwrap_or_default()))
}

/// The server's own sentence where there is one.
fn message(error: &Error) -> String {
    error
        .status()
        .map_or_else(|| stdx::chain(error).to_string(), |s| s.message.clone())
}

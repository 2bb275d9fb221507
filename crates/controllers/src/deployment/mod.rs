//! Rolls each Deployment's pods from template to template through ReplicaSets.
//!
//! Watches Deployments, ReplicaSets and Pods (a Recreate waits for the last old pod). After a write the controller waits
//! until its informer shows it.

pub mod plan;
pub mod rollout;
pub mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet};
use k8s_openapi::api::core::v1::Pod;
use reconcile::{
    Change, DeleteParams, Error, EventType, Informer, Key, Patch, Queue, Recorder, Requeue, run_controller,
};
use serde_json::json;

use crate::Context;
use crate::common::{
    STALE_RECHECK, Unseen, claimable, controller_reference, is_terminal, key_of, name_of, selector, uid_of,
};
use plan::{Action, plan};

const NAME: &str = "deployment-controller";
const WORKERS: usize = 4;

struct Controller {
    context: Context,
    recorder: Recorder,
    deployments: Informer<Deployment>,
    sets: Informer<ReplicaSet>,
    pods: Informer<Pod>,
    unseen: Unseen,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        recorder: context.recorder.for_component(NAME),
        deployments: context.informers.get(),
        sets: context.informers.get(),
        pods: context.informers.get(),
        unseen: Unseen::default(),
        context,
    });
    let sink = queue.clone();
    this.deployments.on_change(move |change| sink.add(change.key().clone()));
    let (sink, deployments) = (queue.clone(), this.deployments.clone());
    this.sets.on_change(move |change| {
        for key in affected(change, &deployments) {
            sink.add(key);
        }
    });
    let (sink, sets) = (queue.clone(), this.sets.clone());
    this.pods.on_change(move |change| {
        // Only the end of a pod matters here, to a Recreate; the rest comes by the ReplicaSet's status.
        if !change.is_deletion() {
            return;
        }
        let owner = change.latest().header.controller().filter(|o| o.kind == "ReplicaSet");
        let set = owner.and_then(|o| sets.store().by_uid(&o.uid));
        if let Some(owner) = set
            .as_ref()
            .and_then(|rs| rs.header.controller())
            .filter(|o| o.kind == "Deployment")
        {
            sink.add(Key::new(change.key().ns.clone(), owner.name.clone()));
        }
    });
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.deployments.wait_synced().await;
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

fn affected(change: &Change, deployments: &Informer<Deployment>) -> Vec<Key> {
    let mut keys: Vec<Key> = Vec::new();
    for entry in [&change.old, &change.new].into_iter().flatten() {
        match entry.header.controller() {
            Some(owner) if owner.kind == "Deployment" => {
                let key = Key::new(entry.header.key.ns.clone(), owner.name.clone());
                if !keys.contains(&key) {
                    keys.push(key);
                }
            }
            Some(_) => {}
            None if change.new.is_some() && !entry.header.deleting => {
                let selecting = deployments
                    .list_in(&entry.header.key.ns)
                    .into_iter()
                    .filter(|d| selector(d.spec.as_ref().map(|s| &s.selector)).matches(&entry.header.labels));
                keys.extend(selecting.map(|d| key_of(&*d)));
            }
            None => {}
        }
    }
    keys
}

impl Controller {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let Some(d) = self.deployments.by_key(&key) else {
            self.unseen.forget(&key);
            return Ok(Requeue::Done);
        };
        if !self.unseen.caught_up(&key, &self.sets) {
            return Ok(Requeue::After(STALE_RECHECK));
        }
        let sets = self.claim(&key, &d).await?;
        let plan = plan(&d, &sets, self.old_pods_run(&d, &sets), self.context.now());
        let mut status = plan.status;
        for action in &plan.actions {
            if let Err(error) = self.act(&key, &d, &sets, action).await {
                if matches!(action, Action::Create(_)) && error.is_already_exists() {
                    // Another template hashes alike: count it, and the next name differs.
                    let collisions = d.status.as_ref().and_then(|s| s.collision_count).unwrap_or_default();
                    status.collision_count = Some(collisions + 1);
                    self.write_status(&key, &d, status).await?;
                }
                return Err(error);
            }
        }
        self.write_status(&key, &d, status).await?;
        Ok(plan.requeue.map_or(Requeue::Done, Requeue::After))
    }

    /// The ReplicaSets under the Deployment's control, after adopting and releasing.
    async fn claim(&self, key: &Key, d: &Deployment) -> Result<Vec<Arc<ReplicaSet>>, Error> {
        let selector = selector(d.spec.as_ref().map(|s| &s.selector));
        let mut sets = Vec::new();
        for entry in claimable(&self.sets, key, uid_of(d), &selector) {
            let Some(rs) = self.sets.typed(&entry) else { continue };
            let mine = entry.header.controller().is_some();
            let selected = selector.matches(&entry.header.labels);
            let mut owners = rs.metadata.owner_references.clone().unwrap_or_default();
            match (mine, selected) {
                (true, true) => sets.push(rs),
                _ if crate::common::is_deleting(d) || entry.header.deleting => {}
                (true, false) => {
                    owners.retain(|o| o.uid != uid_of(d));
                    self.set_owners(key, &rs, owners).await?;
                }
                (false, _) => {
                    owners.push(controller_reference(d));
                    sets.push(Arc::new(self.set_owners(key, &rs, owners).await?));
                }
            }
        }
        Ok(sets)
    }

    async fn set_owners(
        &self,
        key: &Key,
        rs: &ReplicaSet,
        owners: Vec<k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference>,
    ) -> Result<ReplicaSet, Error> {
        let patch = Patch::Merge(json!({"metadata": {
            "uid": uid_of(rs), "resourceVersion": rs.metadata.resource_version, "ownerReferences": owners,
        }}));
        let written = self
            .context
            .client
            .patch(Some(&key.ns), name_of(rs), &patch, None)
            .await?;
        self.unseen.wrote(key, &written);
        Ok(written)
    }

    /// Whether a pod of a template other than the current one is still there, terminating ones included.
    fn old_pods_run(&self, d: &Deployment, sets: &[Arc<ReplicaSet>]) -> bool {
        let recreate = d.spec.as_ref().and_then(|s| s.strategy.as_ref()?.type_.as_deref()) == Some("Recreate");
        if !recreate {
            return false;
        }
        let current = plan::current_set(d, sets).map(uid_of);
        let old = sets.iter().filter(|rs| Some(uid_of(&***rs)) != current);
        old.flat_map(|rs| self.pods.by_owner(uid_of(&**rs)))
            .any(|pod| !is_terminal(&pod))
    }

    async fn act(&self, key: &Key, d: &Deployment, sets: &[Arc<ReplicaSet>], action: &Action) -> Result<(), Error> {
        let client = &self.context.client;
        match action {
            Action::Create(rs) => {
                let made: ReplicaSet = match client.create(Some(&key.ns), &**rs).await {
                    Ok(made) => made,
                    Err(error) if error.is_namespace_terminating() => return Ok(()),
                    Err(error) => {
                        let existing = if error.is_already_exists() {
                            self.ours(key, d, rs).await
                        } else {
                            None
                        };
                        match existing {
                            // Made by an earlier run whose answer was lost.
                            Some(made) => made,
                            None => return Err(error),
                        }
                    }
                };
                self.unseen.wrote(key, &made);
                let to = rs.spec.as_ref().and_then(|s| s.replicas).unwrap_or_default();
                if to > 0 {
                    self.scaled(d, name_of(&made), 0, to);
                }
            }
            Action::Scale {
                name,
                from,
                to,
                annotations,
                min_ready_s,
            } => {
                let Some(rs) = sets.iter().find(|rs| name_of(&***rs) == name) else {
                    return Ok(());
                };
                let mut patch = json!({
                    "metadata": {"uid": uid_of(&**rs), "annotations": annotations},
                    "spec": {"replicas": to},
                });
                if let Some(seconds) = min_ready_s {
                    patch["spec"]["minReadySeconds"] = (*seconds).into();
                }
                let written: ReplicaSet = client.patch(Some(&key.ns), name, &Patch::Merge(patch), None).await?;
                self.unseen.wrote(key, &written);
                if from != to {
                    self.scaled(d, name, *from, *to);
                }
            }
            Action::Revision(revision) => {
                let patch =
                    Patch::Merge(json!({"metadata": {"uid": uid_of(d), "annotations": {plan::REVISION: revision}}}));
                let _: Deployment = client.patch(Some(&key.ns), &key.name, &patch, None).await?;
            }
            Action::Delete(name) => {
                let Some(rs) = sets.iter().find(|rs| name_of(&***rs) == name) else {
                    return Ok(());
                };
                let params = DeleteParams {
                    resource_version: rs.metadata.resource_version.clone(),
                    ..DeleteParams::uid(uid_of(&**rs))
                };
                match client.delete::<ReplicaSet>(Some(&key.ns), name, &params).await {
                    Err(error) if error.is_not_found() => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// The ReplicaSet that already has the name, if it is of the same Deployment and template.
    async fn ours(&self, key: &Key, d: &Deployment, rs: &ReplicaSet) -> Option<ReplicaSet> {
        let there: ReplicaSet = self.context.client.get(Some(&key.ns), name_of(rs)).await.ok()?;
        let owner = there
            .metadata
            .owner_references
            .iter()
            .flatten()
            .find(|o| o.controller == Some(true))?;
        let sets = [Arc::new(there.clone())];
        (owner.uid == uid_of(d) && plan::current_set(d, &sets).is_some()).then_some(there)
    }

    fn scaled(&self, d: &Deployment, name: &str, from: i32, to: i32) {
        let way = if to > from { "up" } else { "down" };
        let text = format!("Scaled {way} replica set {name} from {from} to {to}");
        self.recorder.event(d, EventType::Normal, "ScalingReplicaSet", text);
    }

    async fn write_status(&self, key: &Key, d: &Deployment, status: DeploymentStatus) -> Result<(), Error> {
        if d.status.as_ref() == Some(&status) {
            return Ok(());
        }
        // The revision annotation may just have been written, so the status alone is sent, with the uid as its guard.
        let mut patch = json!({"metadata": {"uid": uid_of(d)}, "status": status});
        // A field that is no longer set must be cleared, not kept.
        let fields = [
            "conditions",
            "collisionCount",
            "replicas",
            "updatedReplicas",
            "readyReplicas",
            "availableReplicas",
            "unavailableReplicas",
            "terminatingReplicas",
        ];
        if let Some(map) = patch["status"].as_object_mut() {
            for field in fields {
                map.entry(field).or_insert(serde_json::Value::Null);
            }
        }
        match self
            .context
            .client
            .patch::<Deployment>(Some(&key.ns), &key.name, &Patch::Merge(patch), Some("status"))
            .await
        {
            Err(error) if error.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }
}

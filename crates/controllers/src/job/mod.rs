//! Runs the pods of Jobs until as many have succeeded as each Job asks for, or it has failed.
//!
//! Watches Jobs and Pods. After a write the controller waits until its informer shows it. A pod holds a finalizer until its
//! end is counted; pods whose Job is gone are let go. Jobs of another manager (`managedBy`) are left alone.

pub mod indexes;
pub mod plan;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::join_all;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use reconcile::{
    Change, DeleteParams, Error, EventType, Informer, Key, Patch, Queue, Recorder, Requeue, run_controller,
};
use serde_json::json;

use crate::Context;
use crate::common::{STALE_RECHECK, Unseen, claimable, controller_reference, name_of, selector, uid_of};
use plan::{FINALIZER, INDEX, Plan, plan};

const NAME: &str = "job-controller";
const WORKERS: usize = 5;
/// Who manages a Job that does not say.
const OWN: &str = "kubernetes.io/job-controller";

struct Controller {
    context: Context,
    recorder: Recorder,
    jobs: Informer<Job>,
    pods: Informer<Pod>,
    unseen: Unseen,
    /// Status writes are waited for too: counting from an old status would count twice.
    unseen_status: Unseen,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        recorder: context.recorder.for_component(NAME),
        jobs: context.informers.get(),
        pods: context.informers.get(),
        unseen: Unseen::default(),
        unseen_status: Unseen::default(),
        context,
    });
    let sink = queue.clone();
    this.jobs.on_change(move |change| sink.add(change.key().clone()));
    let sink = queue.clone();
    this.pods.on_change(move |change| {
        if let Some(key) = affected(change) {
            sink.add(key);
        }
    });
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.jobs.wait_synced().await;
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

/// The Job a pod's change concerns.
fn affected(change: &Change) -> Option<Key> {
    let entry = change.new.as_ref().or(change.old.as_ref())?;
    let owner = entry.header.controller().filter(|o| o.kind == "Job")?;
    Some(Key::new(entry.header.key.ns.clone(), owner.name.clone()))
}

impl Controller {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let Some(job) = self.jobs.by_key(&key) else {
            self.unseen.forget(&key);
            self.unseen_status.forget(&key);
            self.let_go(&key).await?;
            return Ok(Requeue::Done);
        };
        let manager = job.spec.as_ref().and_then(|s| s.managed_by.as_deref());
        if manager.is_some_and(|m| m != OWN) {
            return Ok(Requeue::Done);
        }
        if !self.unseen.caught_up(&key, &self.pods) || !self.unseen_status.caught_up(&key, &self.jobs) {
            return Ok(Requeue::After(STALE_RECHECK));
        }
        let wire = job.spec.as_ref().and_then(|s| s.selector.as_ref());
        let pods: Vec<Arc<Pod>> = claimable(&self.pods, &key, uid_of(&*job), &selector(wire))
            .iter()
            .filter(|e| e.header.controller().is_some_and(|c| c.uid == uid_of(&*job)))
            .filter_map(|e| self.pods.typed(e))
            .collect();
        let plan = plan(&job, &pods, self.context.now());
        if plan.remove {
            let params = DeleteParams {
                propagation: Some("Foreground"),
                ..DeleteParams::uid(uid_of(&*job))
            };
            return match self
                .context
                .client
                .delete::<Job>(Some(&key.ns), &key.name, &params)
                .await
            {
                Err(error) if !error.is_not_found() => Err(error),
                _ => Ok(Requeue::Done),
            };
        }
        self.act(&key, &job, &plan).await?;
        Ok(plan.requeue.map_or(Requeue::Done, Requeue::After))
    }

    /// Pods of a Job that is gone must not wait for it.
    async fn let_go(&self, key: &Key) -> Result<(), Error> {
        for entry in self.pods.store().list_in(&key.ns) {
            let owner = entry.header.controller();
            let ours = owner.is_some_and(|o| o.kind == "Job" && o.name == key.name);
            if ours && let Some(pod) = self.pods.typed(&entry) {
                self.release(key, &pod).await?;
            }
        }
        Ok(())
    }

    async fn release(&self, key: &Key, pod: &Pod) -> Result<(), Error> {
        let mut finalizers = pod.metadata.finalizers.clone().unwrap_or_default();
        if !finalizers.iter().any(|f| f == FINALIZER) {
            return Ok(());
        }
        finalizers.retain(|f| f != FINALIZER);
        let patch = Patch::Merge(json!({"metadata": {
            "uid": uid_of(pod), "resourceVersion": pod.metadata.resource_version, "finalizers": finalizers,
        }}));
        let ns = pod.metadata.namespace.as_deref();
        match self.context.client.patch::<Pod>(ns, name_of(pod), &patch, None).await {
            Ok(written) => {
                // A pod that was only held by this goes with the write, and its informer never shows that version.
                if written.metadata.deletion_timestamp.is_none() {
                    self.unseen.wrote(key, &written);
                }
                Ok(())
            }
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn act(&self, key: &Key, job: &Job, plan: &Plan) -> Result<(), Error> {
        if job.status.as_ref() != Some(&plan.status) {
            let mut update = job.clone();
            update.status = Some(plan.status.clone());
            match self.context.client.update_status(Some(&key.ns), &update).await {
                Ok(written) => self.unseen_status.wrote(key, &written),
                Err(error) if error.is_not_found() => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        for (reason, message, warning) in &plan.events {
            let kind = if *warning {
                EventType::Warning
            } else {
                EventType::Normal
            };
            self.recorder.event(job, kind, reason, message.clone());
        }
        let pods = plan.release.iter().filter_map(|name| self.pods.get(&key.ns, name));
        let released = join_all(pods.map(|pod| async move { self.release(key, &pod).await })).await;
        released.into_iter().collect::<Result<Vec<()>, Error>>()?;
        let deletions = plan.delete.iter().filter_map(|name| self.pods.get(&key.ns, name));
        for result in join_all(deletions.map(|pod| self.delete(key, job, pod))).await {
            result?;
        }
        // Slow start: when the first pod is refused, five hundred others are not tried.
        let (mut at, mut batch) = (0, 1);
        while at < plan.create.len() {
            let end = (at + batch).min(plan.create.len());
            let made = plan.create[at..end].iter().map(|index| self.create(key, job, *index));
            for result in join_all(made).await {
                result?;
            }
            at = end;
            batch *= 2;
        }
        Ok(())
    }

    async fn delete(&self, key: &Key, job: &Job, pod: Arc<Pod>) -> Result<(), Error> {
        let name = name_of(&*pod);
        let params = DeleteParams::uid(uid_of(&*pod));
        match self.context.client.delete::<Pod>(Some(&key.ns), name, &params).await {
            Ok(()) => {
                let text = format!("Deleted pod: {name}");
                self.recorder.event(job, EventType::Normal, "SuccessfulDelete", text);
                Ok(())
            }
            Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn create(&self, key: &Key, job: &Job, index: Option<i32>) -> Result<(), Error> {
        match self
            .context
            .client
            .create(Some(&key.ns), &pod_of(key, job, index))
            .await
        {
            Ok(pod) => {
                self.unseen.wrote(key, &pod);
                let text = format!("Created pod: {}", name_of(&pod));
                self.recorder.event(job, EventType::Normal, "SuccessfulCreate", text);
                Ok(())
            }
            Err(error) if error.is_namespace_terminating() => Ok(()),
            Err(error) => {
                let why = error
                    .status()
                    .map_or_else(|| stdx::chain(&error).to_string(), |s| s.message.clone());
                let text = format!("Error creating: {why}");
                self.recorder.event(job, EventType::Warning, "FailedCreate", text);
                Err(error)
            }
        }
    }
}

/// A pod of the Job, with its index if it has one.
fn pod_of(key: &Key, job: &Job, index: Option<i32>) -> Pod {
    let template = job.spec.as_ref().map(|s| s.template.clone()).unwrap_or_default();
    let meta = template.metadata.unwrap_or_default();
    let (mut labels, mut annotations) = (meta.labels, meta.annotations);
    let mut spec = template.spec;
    let mut prefix = format!("{}-", key.name);
    if let Some(index) = index {
        let text = index.to_string();
        prefix = format!("{}-{text}-", key.name);
        labels.get_or_insert_default().insert(INDEX.to_owned(), text.clone());
        annotations
            .get_or_insert_with(BTreeMap::new)
            .insert(INDEX.to_owned(), text.clone());
        if let Some(spec) = &mut spec {
            spec.hostname = Some(format!("{}-{text}", key.name));
            let inits = spec.init_containers.iter_mut().flatten();
            for container in inits.chain(&mut spec.containers) {
                let env = container.env.get_or_insert_default();
                if !env.iter().any(|e| e.name == "JOB_COMPLETION_INDEX") {
                    env.push(index_variable());
                }
            }
        }
    }
    let mut finalizers = meta.finalizers.unwrap_or_default();
    finalizers.push(FINALIZER.to_owned());
    Pod {
        metadata: ObjectMeta {
            namespace: Some(key.ns.clone()),
            generate_name: Some(prefix),
            labels,
            annotations,
            finalizers: Some(finalizers),
            owner_references: Some(vec![controller_reference(job)]),
            ..ObjectMeta::default()
        },
        spec,
        status: None,
    }
}

fn index_variable() -> EnvVar {
    EnvVar {
        name: "JOB_COMPLETION_INDEX".to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                api_version: Some("v1".to_owned()),
                field_path: format!("metadata.annotations['{INDEX}']"),
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    }
}

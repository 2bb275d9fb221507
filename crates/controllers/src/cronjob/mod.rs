//! Makes a Job at each time of a CronJob's schedule, and forgets old ones.
//!
//! Watches CronJobs and their Jobs; between changes it wakes at the next time.

pub mod plan;

use std::sync::Arc;

use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use reconcile::{DeleteParams, Error, EventType, Informer, Key, Queue, Recorder, Requeue, run_controller};

use crate::Context;
use crate::common::{STALE_RECHECK, Unseen, controller_reference, name_of, uid_of};
use plan::{job_name, plan, reference};

const NAME: &str = "cronjob-controller";
const WORKERS: usize = 5;
const SCHEDULED_AT: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";

struct Controller {
    context: Context,
    recorder: Recorder,
    crons: Informer<CronJob>,
    jobs: Informer<Job>,
    unseen: Unseen,
    unseen_status: Unseen,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        recorder: context.recorder.for_component(NAME),
        crons: context.informers.get(),
        jobs: context.informers.get(),
        unseen: Unseen::default(),
        unseen_status: Unseen::default(),
        context,
    });
    let sink = queue.clone();
    this.crons.on_change(move |change| sink.add(change.key().clone()));
    let sink = queue.clone();
    this.jobs.on_change(move |change| {
        for entry in [&change.old, &change.new].into_iter().flatten() {
            if let Some(owner) = entry.header.controller().filter(|o| o.kind == "CronJob") {
                sink.add(Key::new(entry.header.key.ns.clone(), owner.name.clone()));
            }
        }
    });
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.crons.wait_synced().await;
        this.jobs.wait_synced().await;
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
        let Some(cron) = self.crons.by_key(&key) else {
            self.unseen.forget(&key);
            self.unseen_status.forget(&key);
            return Ok(Requeue::Done);
        };
        if !self.unseen.caught_up(&key, &self.jobs) || !self.unseen_status.caught_up(&key, &self.crons) {
            return Ok(Requeue::After(STALE_RECHECK));
        }
        let jobs = self.jobs.by_owner(uid_of(&*cron));
        let mut plan = plan(&cron, &jobs, self.context.now());
        for (reason, message, warning) in &plan.events {
            let kind = if *warning {
                EventType::Warning
            } else {
                EventType::Normal
            };
            self.recorder.event(&*cron, kind, reason, message.clone());
        }
        for name in plan.forget.iter().chain(&plan.replace) {
            self.delete(&key, &cron, &jobs, name).await?;
        }
        if let Some(at) = plan.start
            && let Some(job) = self.start(&key, &cron, at).await?
        {
            let active = plan.status.active.get_or_insert_default();
            active.retain(|r| !plan.replace.iter().any(|n| r.name.as_ref() == Some(n)));
            if !active.iter().any(|r| r.uid == job.metadata.uid) {
                active.push(reference(&job));
            }
            plan.status.last_schedule_time = Some(Time(at));
        }
        if cron.status.as_ref() != Some(&plan.status) {
            let mut update = (*cron).clone();
            update.status = Some(plan.status);
            match self.context.client.update_status(Some(&key.ns), &update).await {
                Ok(written) => self.unseen_status.wrote(&key, &written),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(plan.requeue.map_or(Requeue::Done, Requeue::After))
    }

    async fn delete(&self, key: &Key, cron: &CronJob, jobs: &[Arc<Job>], name: &str) -> Result<(), Error> {
        let Some(job) = jobs.iter().find(|j| name_of(&***j) == name) else {
            return Ok(());
        };
        let params = DeleteParams {
            propagation: Some("Background"),
            ..DeleteParams::uid(uid_of(&**job))
        };
        match self.context.client.delete::<Job>(Some(&key.ns), name, &params).await {
            Ok(()) => {
                let text = format!("Deleted job {name}");
                self.recorder.event(cron, EventType::Normal, "SuccessfulDelete", text);
                Ok(())
            }
            Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The Job for a time; one that is there already is it, if it is ours.
    async fn start(&self, key: &Key, cron: &CronJob, at: Timestamp) -> Result<Option<Job>, Error> {
        let template = cron.spec.job_template.clone();
        let meta = template.metadata.unwrap_or_default();
        let mut annotations = meta.annotations.unwrap_or_default();
        annotations.insert(SCHEDULED_AT.to_owned(), apimachinery::time::rfc3339(at));
        let name = job_name(&key.name, at);
        let job = Job {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(key.ns.clone()),
                labels: meta.labels,
                annotations: Some(annotations),
                owner_references: Some(vec![controller_reference(cron)]),
                ..ObjectMeta::default()
            },
            spec: template.spec,
            status: None,
        };
        match self.context.client.create(Some(&key.ns), &job).await {
            Ok(made) => {
                self.unseen.wrote(key, &made);
                self.recorder.event(
                    cron,
                    EventType::Normal,
                    "SuccessfulCreate",
                    format!("Created job {name}"),
                );
                Ok(Some(made))
            }
            Err(error) if error.is_namespace_terminating() => Ok(None),
            Err(error) if error.is_already_exists() => {
                let there: Option<Job> = self.context.client.get_opt(Some(&key.ns), &name).await?;
                let ours = |j: &Job| {
                    let owners = j.metadata.owner_references.iter().flatten();
                    owners
                        .into_iter()
                        .any(|o| o.controller == Some(true) && o.uid == uid_of(cron))
                };
                Ok(there.filter(ours))
            }
            Err(error) => {
                let why = error
                    .status()
                    .map_or_else(|| stdx::chain(&error).to_string(), |s| s.message.clone());
                let text = format!("Error creating job: {why}");
                self.recorder.event(cron, EventType::Warning, "FailedCreate", text);
                Err(error)
            }
        }
    }
}

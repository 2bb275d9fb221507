//! The task of one pod: look, plan, report, act, wait. Fed by a cell that holds the newest version of the object.
//!
//! Long actions run beside the loop, so that a delete is seen while an image is pulled. The loop alone changes what is
//! remembered; actions answer through [`Note`]s and their result.

mod launch;

use std::{collections::HashMap, sync::Arc, time::Duration};

use k8s_openapi::{api::core::v1::PodStatus, jiff::Timestamp};
use parking_lot::Mutex;
use sandbox::{ContainerState, ContainerStatus, Error, SandboxState, SandboxStatus};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::{after_ms, after_s, ms_between},
    config::Refusal,
    events::Level,
    fields::FieldContext,
    kubelet::{Core, Desired},
    pod::{
        ops,
        plan::{Busy, Facts, Key, Memory, Phase, Plan, PodRuntime, Probed, Waiting, plan},
        refuse,
        start::{TERMINATION_PATH, TERMINATION_POLICY, termination_file},
        status::{StatusFacts, probed, status},
        view::PodView,
        writer::Writer,
    },
    probes::Probing,
};

/// How often a pod that may be admitted later asks again.
const ADMIT_AGAIN_MS: i64 = 5_000;
/// A termination message may be so long, upstream's limit; the log's end that stands in for it is shorter.
const MESSAGE_MAX: usize = 4096;
const LOG_END_MAX: usize = 2048;
const LOG_END_LINES: usize = 80;

/// From actions under way to the loop.
#[derive(Debug)]
pub enum Note {
    /// This container of the pod exists (again look at it).
    Container(String),
    /// Its postStart hook failed.
    HookFailed(String),
}

pub type Notes = mpsc::Sender<Note>;
/// Container id and what its probes say.
type Verdict = (String, Probed);

/// What others may see of a worker, kept current by it.
#[derive(Default)]
pub struct Seen {
    pub runtime: PodRuntime,
    pub status: PodStatus,
    pub phase: Option<Phase>,
    /// Requests of the pod: thousandths of a core, bytes.
    pub request: (i64, i64),
    /// What a relist found where it differs; the worker takes it.
    pub relisted: Option<PodRuntime>,
}

enum Outcome {
    Sandbox(Result<Option<SandboxStatus>, Waiting>),
    Container(Result<(), Waiting>),
    Killed,
    SandboxStopped,
    Cleaned(bool),
    Deleted(bool),
    Volumes,
}

pub struct Worker {
    core: Arc<Core>,
    desired: watch::Receiver<Desired>,
    poke: Arc<Notify>,
    seen: Arc<Mutex<Seen>>,
    view: Arc<PodView>,
    gone: bool,
    runtime: PodRuntime,
    memory: Memory,
    messages: HashMap<String, String>,
    probers: HashMap<String, AbortHandle>,
    cancels: HashMap<Key, CancellationToken>,
    running: JoinSet<(Key, Outcome)>,
    notes: (Notes, mpsc::Receiver<Note>),
    verdicts: (mpsc::Sender<Verdict>, mpsc::Receiver<Verdict>),
    last: PodStatus,
    writer: Writer,
    stop_grace_s: Option<i64>,
    admitted: bool,
    /// Ran before this agent did, and the hooks have not been told yet.
    adopted: bool,
    admit_at: Option<Timestamp>,
    volumes_at: Instant,
}

impl Worker {
    /// A worker for the pod in `desired`, with what the runtime already has of it.
    pub fn new(
        core: Arc<Core>,
        desired: watch::Receiver<Desired>,
        poke: Arc<Notify>,
        seen: Arc<Mutex<Seen>>,
        runtime: PodRuntime,
    ) -> Self {
        let (view, gone) = {
            let d = desired.borrow();
            (Arc::new(PodView::new(d.pod.clone())), d.gone)
        };
        seen.lock().request = (view.request_milli("cpu"), view.request_milli("memory") / 1000);
        let last = view.pod.status.clone().unwrap_or_default();
        let writer = Writer::start(
            core.clone(),
            view.namespace.clone(),
            view.name.clone(),
            view.uid.clone(),
            last.clone(),
        );
        let start_time = last.start_time.as_ref().map(|t| t.0);
        let adopted = runtime.sandbox.is_some();
        let mut memory = Memory {
            start_time,
            ..Default::default()
        };
        if view.deleting() && adopted {
            // A former agent may have begun the stop: what is left is what the API says.
            memory.stop_deadline = view.pod.metadata.deletion_timestamp.as_ref().map(|t| t.0);
        }
        let refresh = Duration::from_secs(core.config.tuning.volume_refresh_s);
        Self {
            stop_grace_s: memory
                .stop_deadline
                .and(view.pod.metadata.deletion_grace_period_seconds),
            core,
            desired,
            poke,
            seen,
            view,
            gone,
            runtime,
            memory,
            messages: HashMap::new(),
            probers: HashMap::new(),
            cancels: HashMap::new(),
            running: JoinSet::new(),
            notes: mpsc::channel(64),
            verdicts: mpsc::channel(16),
            last,
            writer,
            admitted: adopted,
            adopted,
            admit_at: None,
            volumes_at: Instant::now() + refresh,
        }
    }

    /// Runs until nothing of the pod is left here, and the API was asked to delete the object or has done so. Returns
    /// whether the object was seen to be gone.
    pub async fn run(mut self) -> bool {
        loop {
            // An action's notes come before its end: with all of them taken, nothing that exists is unknown here.
            while let Ok(note) = self.notes.1.try_recv() {
                self.note(note).await;
            }
            self.refresh().await;
            self.admit().await;
            let now = self.core.now();
            self.deadline(now);
            let facts = Facts {
                view: &self.view,
                gone: self.gone,
                runtime: &self.runtime,
                memory: &self.memory,
                now,
            };
            let plan = plan(&facts);
            if let Some((reason, message)) = plan.ended.clone() {
                self.core.events.pod(&self.view, None, Level::Normal, &reason, &message);
                self.memory.ended = Some((reason, message));
                continue;
            }
            if plan.phase == Phase::Gone {
                break;
            }
            if plan.cancel_starts {
                self.cancels.values().for_each(CancellationToken::cancel);
                self.probers.drain().for_each(|(_, p)| p.abort());
            }
            self.report(&plan, now);
            let mut wake = plan.wake_at;
            for action in plan.actions {
                self.launch(action, now);
            }
            if self.memory.refused.is_some()
                && let Some(at) = self.admit_at
            {
                wake = Some(wake.map_or(at, |w| w.min(at)));
            }
            self.wait(wake, now).await;
        }
        self.probers.drain().for_each(|(_, p)| p.abort());
        self.gone
    }

    async fn wait(&mut self, wake: Option<Timestamp>, now: Timestamp) {
        let wake = wake.map(|at| {
            let ms = u64::try_from(ms_between(now, at)).unwrap_or(0);
            // One more: timestamps are cut to the millisecond.
            Instant::now() + Duration::from_millis(ms + 1)
        });
        let volumes_at = (self.refreshable()).then_some(self.volumes_at);
        let timer = async |at: Option<Instant>| match at {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        };
        tokio::select! {
            // Every arm is cancel safe: receivers keep what is not taken, `Notify` keeps its permit.
            changed = self.desired.changed() => if changed.is_ok() { self.take_desired() } else { self.gone = true },
            () = self.poke.notified() => {}
            Some(note) = self.notes.1.recv() => self.note(note).await,
            Some((id, verdict)) = self.verdicts.1.recv() => drop(self.memory.probes.insert(id, verdict)),
            Some(done) = self.running.join_next() => if let Ok((key, outcome)) = done { self.finish(key, outcome) },
            () = timer(wake) => {}
            () = timer(volumes_at) => self.refresh_volumes(),
        }
    }

    fn take_desired(&mut self) {
        let d = self.desired.borrow_and_update().clone();
        self.gone |= d.gone;
        let old = &self.view.pod.metadata;
        let new = &d.pod.metadata;
        if old.labels != new.labels || old.annotations != new.annotations {
            self.volumes_at = Instant::now();
        }
        self.view = Arc::new(PodView::new(d.pod));
    }

    /// Brings `runtime` up to date, container by container: what has ended stays ended.
    async fn refresh(&mut self) {
        let runtime = self.core.config.runtime.clone();
        let relisted = self.seen.lock().relisted.take();
        if let Some(found) = relisted {
            self.take_relisted(found);
        }
        if let Some(s) = self.runtime.sandbox.clone()
            && s.state == SandboxState::Ready
        {
            match runtime.sandbox_status(&s.id).await {
                Ok(now) => self.runtime.sandbox = Some(now),
                Err(Error::NotFound { .. }) => {
                    self.runtime.sandbox = Some(SandboxStatus {
                        state: SandboxState::NotReady,
                        ..s
                    });
                }
                Err(e) => tracing::warn!(sandbox = %s.id, error = %stdx::chain(&e), "sandbox status not read"),
            }
        }
        let live: Vec<String> = self
            .runtime
            .containers
            .iter()
            .filter(|c| c.state != ContainerState::Exited)
            .map(|c| c.id.clone())
            .collect();
        for id in live {
            self.look(&id).await;
        }
        for c in self.runtime.containers.clone() {
            match c.state {
                ContainerState::Running => self.watch_probes(&c),
                ContainerState::Exited => self.ended(&c),
                ContainerState::Created => {}
            }
        }
        self.seen.lock().runtime = self.runtime.clone();
    }

    /// Takes over what the runtime has and the worker does not know: left by an action that failed half-way.
    fn take_relisted(&mut self, found: PodRuntime) {
        if self.memory.busy.contains_key(&Key::Sandbox) {
            return;
        }
        if let Some(s) = found.sandbox {
            let newer = self
                .runtime
                .sandbox
                .as_ref()
                .is_none_or(|k| k.id != s.id && k.pod.attempt <= s.pod.attempt);
            if newer && !self.memory.cleaned {
                self.runtime.sandbox = Some(s);
            }
        }
        for c in found.containers {
            let busy = self.memory.busy.contains_key(&Key::Container(c.name.clone()));
            if !busy && !self.runtime.containers.iter().any(|k| k.id == c.id) {
                self.runtime.containers.push(c);
            }
        }
    }

    async fn look(&mut self, id: &str) {
        match self.core.config.runtime.container_status(id).await {
            Ok(c) => match self.runtime.containers.iter_mut().find(|o| o.id == id) {
                Some(slot) => *slot = c,
                None => self.runtime.containers.push(c),
            },
            Err(Error::NotFound { .. }) => {
                // Its record is lost. What was seen running has ended somehow; the rest never was.
                self.runtime
                    .containers
                    .retain(|c| c.id != id || c.state == ContainerState::Running);
                if let Some(c) = self.runtime.containers.iter_mut().find(|c| c.id == id) {
                    c.state = ContainerState::Exited;
                    c.exit_code = 137;
                    c.reason = "ContainerStatusUnknown".into();
                    c.message = "The container could not be located".into();
                    c.finished_at = Some(self.core.config.clock.now());
                }
            }
            Err(e) => tracing::warn!(container = %id, error = %stdx::chain(&e), "container status not read"),
        }
    }

    fn watch_probes(&mut self, c: &ContainerStatus) {
        if self.memory.probes.contains_key(&c.id) {
            return;
        }
        let Some(m) = self.view.member(&c.name) else { return };
        let mut first = probed(m, c, &self.memory.probes);
        // An adopted container starts from what its status says, so that restarting the agent makes nothing unready.
        let written = self
            .last
            .container_statuses
            .iter()
            .chain(&self.last.init_container_statuses)
            .flatten();
        let own = format!("://{}", c.id);
        if let Some(s) = written
            .into_iter()
            .find(|s| s.container_id.as_deref().is_some_and(|id| id.ends_with(&own)))
        {
            first.started |= s.started == Some(true);
            first.ready |= s.ready && first.started;
        }
        self.memory.probes.insert(c.id.clone(), first.clone());
        self.memory.waits.remove(&c.name);
        if !Probing::needed(m) || self.view.deleting() {
            return;
        }
        let sandbox = self.runtime.sandbox.as_ref();
        let own = sandbox
            .and_then(|s| s.ips.first().copied())
            .filter(|_| !self.view.host_network());
        let probing = Probing {
            core: self.core.clone(),
            view: self.view.clone(),
            member: m.clone(),
            container_id: c.id.clone(),
            sandbox_id: c.sandbox_id.clone(),
            pod_ip: own.or_else(|| self.core.config.addresses.first().copied()),
            first,
        };
        let task = tokio::spawn(probing.run(self.verdicts.0.clone()));
        self.probers.insert(c.id.clone(), task.abort_handle());
    }

    fn ended(&mut self, c: &ContainerStatus) {
        self.memory.probes.remove(&c.id);
        if let Some(p) = self.probers.remove(&c.id) {
            p.abort();
        }
        if self.messages.contains_key(&c.id) {
            return;
        }
        let mut text = String::new();
        if c.annotations.contains_key(TERMINATION_PATH) {
            let file = termination_file(&self.core, &self.view.uid, &c.name, c.attempt);
            let bytes = std::fs::read(file).unwrap_or_default();
            text = String::from_utf8_lossy(&bytes[..bytes.len().min(MESSAGE_MAX)]).into_owned();
            let fall_back = c
                .annotations
                .get(TERMINATION_POLICY)
                .is_some_and(|p| p == "FallbackToLogsOnError");
            if text.is_empty() && fall_back && c.exit_code != 0 {
                let path = ops::log_dir(&self.core, &self.view)
                    .join(&c.name)
                    .join(format!("{}.log", c.attempt));
                text = crate::server::logs::end_of(&path, LOG_END_LINES, LOG_END_MAX);
            }
        }
        self.messages.insert(c.id.clone(), text);
    }

    async fn note(&mut self, note: Note) {
        match note {
            Note::Container(id) => self.look(&id).await,
            Note::HookFailed(id) => {
                self.look(&id).await;
                let p = self.memory.probes.entry(id).or_default();
                p.kill = Some(("failed postStart hook".into(), None));
            }
        }
    }

    /// Asks once whether the pod may run here, and again while the answer may change.
    async fn admit(&mut self) {
        if std::mem::take(&mut self.adopted) {
            self.core.config.hooks.adopted(&self.view.pod).await;
        }
        let now = self.core.now();
        if self.admitted || self.gone || self.view.deleting() {
            return;
        }
        if self.admit_at.is_some_and(|at| now < at) {
            return;
        }
        if let Some(phase) = self.last.phase.as_deref()
            && matches!(phase, "Succeeded" | "Failed")
        {
            self.admitted = true;
            return;
        }
        self.memory.start_time.get_or_insert(now);
        let answer = match refuse::check(&self.view, self.core.config.features) {
            Ok(()) => match self.core.fits(&self.view) {
                Ok(()) => self.core.config.hooks.admit(&self.view.pod).await,
                Err(r) => Err(r),
            },
            Err(r) => Err(r),
        };
        match answer {
            Ok(()) => {
                self.admitted = true;
                self.memory.refused = None;
            }
            Err(refusal) => self.refuse(refusal, now),
        }
    }

    fn refuse(&mut self, refusal: Refusal, now: Timestamp) {
        if self.memory.refused.as_ref() != Some(&refusal) {
            self.core
                .events
                .pod(&self.view, None, Level::Warning, &refusal.reason, refusal.to_string());
        }
        if refusal.terminal {
            self.admitted = true;
        } else {
            self.admit_at = Some(after_ms(now, ADMIT_AGAIN_MS));
        }
        self.memory.refused = Some(refusal);
    }

    /// Keeps the time by which a pod that is being deleted must be dead. It only ever comes nearer.
    fn deadline(&mut self, now: Timestamp) {
        let mut nearer = |at: Timestamp| {
            self.memory.stop_deadline = Some(self.memory.stop_deadline.map_or(at, |d| d.min(at)));
        };
        if self.gone {
            nearer(after_s(now, 1));
        } else if self.view.deleting() {
            let own = i64::try_from(self.view.grace_s()).unwrap_or(30);
            let grace = self.view.pod.metadata.deletion_grace_period_seconds.unwrap_or(own);
            if self.stop_grace_s != Some(grace) {
                self.stop_grace_s = Some(grace);
                nearer(after_s(now, grace));
            }
        }
    }

    fn report(&mut self, plan: &Plan, now: Timestamp) {
        {
            let mut seen = self.seen.lock();
            seen.phase = Some(plan.phase);
        }
        let facts = StatusFacts {
            view: &self.view,
            runtime: &self.runtime,
            memory: &self.memory,
            plan,
            node_ips: &self.core.config.addresses,
            runtime_name: self.core.runtime_name(),
            messages: &self.messages,
            now,
            last: &self.last,
        };
        let next = status(&facts);
        if self.gone || next == self.last {
            return;
        }
        let ready = |s: &PodStatus| {
            s.conditions
                .iter()
                .flatten()
                .find(|c| c.type_ == "Ready")
                .map(|c| c.status.clone())
                .unwrap_or_default()
        };
        let reasons = |s: &PodStatus| -> Vec<String> {
            let all = s.init_container_statuses.iter().chain(&s.container_statuses).flatten();
            all.filter_map(|c| c.state.as_ref()?.waiting.as_ref()?.reason.clone())
                .filter(|r| r != "ContainerCreating" && r != "PodInitializing")
                .collect()
        };
        let urgent = next.phase != self.last.phase && next.phase.as_deref() != Some("Pending")
            || ready(&next) != ready(&self.last) && !ready(&self.last).is_empty()
            || reasons(&next) != reasons(&self.last)
            || self.view.deleting();
        let backing_off = plan.waiting.iter().filter(|(_, w)| w.reason == "CrashLoopBackOff");
        for (name, w) in backing_off {
            if self.last.container_statuses.iter().flatten().any(|c| {
                c.name == *name
                    && c.state
                        .as_ref()
                        .and_then(|s| s.waiting.as_ref())
                        .is_some_and(|l| l.reason.as_deref() == Some(&w.reason))
            }) {
                continue;
            }
            let message = format!(
                "Back-off restarting failed container {name} in pod {}({})",
                self.view.name, self.view.uid
            );
            self.core
                .events
                .pod(&self.view, Some(name), Level::Warning, "BackOff", message);
        }
        self.last = next.clone();
        self.seen.lock().status = next.clone();
        self.writer.write(next, urgent);
    }

    fn refreshable(&self) -> bool {
        self.runtime.sandbox_ready().is_some()
            && !self.gone
            && !self.view.deleting()
            && !self.memory.busy.contains_key(&Key::Volumes)
            && self.view.spec().volumes.iter().flatten().any(|v| {
                v.config_map.is_some() || v.secret.is_some() || v.downward_api.is_some() || v.projected.is_some()
            })
    }

    fn refresh_volumes(&mut self) {
        self.volumes_at = Instant::now() + Duration::from_secs(self.core.config.tuning.volume_refresh_s);
        let (core, view) = (self.core.clone(), self.view.clone());
        let pod_ips = self.runtime.sandbox.as_ref().map(|s| s.ips.clone()).unwrap_or_default();
        self.spawn(Key::Volumes, Busy::Other, async move {
            let ctx = FieldContext {
                view: &view,
                node: &core.config.capacity,
                host_ips: &core.config.addresses,
                pod_ips: &pod_ips,
            };
            if let Err(e) = core.volumes.set_up(&ctx, false, core.now()).await {
                tracing::warn!(pod = %view.name, error = %stdx::chain(&e), "volumes not refreshed");
            }
            Outcome::Volumes
        });
    }
}

//! What to do next for one pod: a pure function over the pod, what the runtime says, what is remembered, and the time.
//!
//! Nothing here waits. A plan names actions that are not under way yet, the phase (for people and tests), why containers
//! wait, and when to look again. It is asked again after every change, so it may be asked twice about the same state.
//!
//! Phases: `Accepted -> Sandboxing -> Initializing(n) -> Running -> Ending -> Finished`, from each of them `Stopping`
//! (the pod is being deleted) `-> Reaping -> Gone`, and `Refused` for what never starts.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::jiff::Timestamp;
use sandbox::{ContainerState, ContainerStatus, SandboxState, SandboxStatus};

use crate::{
    clock::{after_ms, after_s, from_system, ms_between},
    config::Refusal,
    pod::view::{Kind, Member, PodView},
};

/// Annotation of a runtime container: the image its spec named.
pub const IMAGE: &str = "oaks.internal/image";

/// Upstream's container back-off: first 10 s, doubled up to 5 minutes, forgotten after twice the maximum.
const BACKOFF_FIRST_MS: i64 = 10_000;
const BACKOFF_MAX_MS: i64 = 300_000;

/// How long a failed pull is shown as such before it is shown as backing off.
const PULL_ERROR_SHOWN_MS: i64 = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Accepted,
    Refused,
    Sandboxing,
    Initializing(usize),
    Running,
    /// The pod is over; what still runs is being stopped.
    Ending,
    /// Over and stopped. The records stay for logs until the pod is deleted.
    Finished,
    Stopping,
    Reaping,
    Gone,
}

/// What an action occupies while it runs; one action per key at a time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    Sandbox,
    Container(String),
    /// A shorter deadline for a container that is already being stopped.
    Hurry(String),
    Volumes,
    Delete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    Starting,
    /// Will be dead at that time at the latest.
    Stopping(Timestamp),
    Other,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Volumes, network, sandbox. `old` is removed first.
    StartSandbox {
        attempt: u32,
        old: Option<String>,
    },
    StartContainer {
        name: String,
        attempt: u32,
    },
    Kill {
        id: String,
        name: String,
        grace_s: u64,
        why: Why,
    },
    /// A kill is under way and must end sooner.
    Hurry {
        id: String,
        name: String,
        grace_s: u64,
    },
    StopSandbox {
        id: String,
    },
    /// Removes containers, sandbox and the pod's directory.
    Clean,
    DeleteObject,
}

impl Action {
    pub fn key(&self) -> Key {
        match self {
            Self::StartSandbox { .. } | Self::StopSandbox { .. } | Self::Clean => Key::Sandbox,
            Self::StartContainer { name, .. } | Self::Kill { name, .. } => Key::Container(name.clone()),
            Self::Hurry { name, .. } => Key::Hurry(name.clone()),
            Self::DeleteObject => Key::Delete,
        }
    }
}

/// Why a container is stopped.
#[derive(Clone, Debug, PartialEq)]
pub enum Why {
    Deleted,
    /// The pod is over (deadline, or its main containers have ended).
    Over,
    /// A probe's verdict.
    Unhealthy(String),
    /// Its image in the spec changed.
    Changed,
}

/// Why a container does not run yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Waiting {
    pub reason: String,
    pub message: String,
}

/// A failed attempt and when the next one may be made.
#[derive(Clone, Debug, PartialEq)]
pub struct Wait {
    pub waiting: Waiting,
    pub retry_at: Timestamp,
    /// Delay that led to `retry_at`, doubled by the next failure.
    pub delay_ms: i64,
}

/// Restart delay of one container.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    pub delay_ms: i64,
    pub last: Timestamp,
}

impl Backoff {
    /// The entry after a restart at `now`.
    pub fn next(old: Option<Self>, now: Timestamp) -> Self {
        let delay_ms = match old {
            Some(b) if !b.expired(now) => (b.delay_ms * 2).min(BACKOFF_MAX_MS),
            _ => BACKOFF_FIRST_MS,
        };
        Self { delay_ms, last: now }
    }

    fn expired(self, at: Timestamp) -> bool {
        ms_between(self.last, at) > 2 * BACKOFF_MAX_MS
    }
}

/// Verdicts of the probes of one running container.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Probed {
    /// The startup probe has succeeded, or there is none.
    pub started: bool,
    pub ready: bool,
    /// A liveness or startup probe gave up: why, and the grace that the probe asks for.
    pub kill: Option<(String, Option<u64>)>,
}

/// What the worker remembers between two looks. Lost with the agent; everything that matters is rebuilt from the runtime.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    pub busy: HashMap<Key, Busy>,
    pub waits: HashMap<String, Wait>,
    pub sandbox_wait: Option<Wait>,
    pub restarts: HashMap<String, Backoff>,
    /// By container id.
    pub probes: HashMap<String, Probed>,
    pub refused: Option<Refusal>,
    pub start_time: Option<Timestamp>,
    /// When the pod must be dead, once it is being deleted.
    pub stop_deadline: Option<Timestamp>,
    /// The pod is over for another reason than its containers' exit codes: reason and message.
    pub ended: Option<(String, String)>,
    /// The API object is deleted.
    pub object_gone: bool,
    /// Everything local is removed.
    pub cleaned: bool,
}

/// What the runtime says about this pod.
#[derive(Clone, Debug, Default)]
pub struct PodRuntime {
    /// The newest sandbox.
    pub sandbox: Option<SandboxStatus>,
    pub containers: Vec<ContainerStatus>,
}

impl PodRuntime {
    pub fn latest(&self, name: &str) -> Option<&ContainerStatus> {
        self.containers
            .iter()
            .filter(|c| c.name == name)
            .max_by_key(|c| c.attempt)
    }

    pub fn previous(&self, name: &str) -> Option<&ContainerStatus> {
        let latest = self.latest(name)?.attempt;
        self.containers
            .iter()
            .filter(|c| c.name == name && c.attempt < latest)
            .max_by_key(|c| c.attempt)
    }

    pub fn sandbox_ready(&self) -> Option<&SandboxStatus> {
        self.sandbox.as_ref().filter(|s| s.state == SandboxState::Ready)
    }

    fn in_sandbox(&self, name: &str, sandbox: &SandboxStatus) -> Option<&ContainerStatus> {
        self.latest(name).filter(|c| c.sandbox_id == sandbox.id)
    }

    fn next_attempt(&self, name: &str) -> u32 {
        self.latest(name).map_or(0, |c| c.attempt + 1)
    }
}

pub struct Facts<'a> {
    pub view: &'a PodView,
    /// The object is not in the API any more.
    pub gone: bool,
    pub runtime: &'a PodRuntime,
    pub memory: &'a Memory,
    pub now: Timestamp,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub phase: Phase,
    pub actions: Vec<Action>,
    /// Container name -> why it waits, beyond what the runtime shows.
    pub waiting: BTreeMap<String, Waiting>,
    pub wake_at: Option<Timestamp>,
    /// Starts under way should give up at their next step.
    pub cancel_starts: bool,
    /// Set once: the pod ended for this reason (active deadline).
    pub ended: Option<(String, String)>,
}

/// How the containers of a finished pod count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Succeeded,
    Failed,
}

/// The outcome once nothing of the pod will run again; `None` while something may.
pub fn outcome(view: &PodView, runtime: &PodRuntime, memory: &Memory) -> Option<Outcome> {
    if memory.ended.is_some() || memory.refused.as_ref().is_some_and(|r| r.terminal) {
        return Some(Outcome::Failed);
    }
    match view.pod.status.as_ref().and_then(|s| s.phase.as_deref()) {
        Some("Succeeded") => return Some(Outcome::Succeeded),
        Some("Failed") => return Some(Outcome::Failed),
        _ => {}
    }
    let over = |m: &Member| {
        runtime
            .latest(m.name())
            .filter(|c| c.state == ContainerState::Exited)
            .filter(|c| !m.restart.again(c.exit_code))
    };
    if let Some(failed) = view
        .init
        .iter()
        .filter(|m| m.kind == Kind::Init)
        .find_map(|m| over(m).filter(|c| c.exit_code != 0))
        && view.main.iter().all(|m| runtime.latest(m.name()).is_none())
    {
        tracing::trace!(container = %failed.name, "init container failed for good");
        return Some(Outcome::Failed);
    }
    let ends: Vec<_> = view.main.iter().map(over).collect::<Option<_>>()?;
    if ends.is_empty() {
        return None;
    }
    Some(if ends.iter().all(|c| c.exit_code == 0) {
        Outcome::Succeeded
    } else {
        Outcome::Failed
    })
}

/// Decides. See the module's text.
pub fn plan(f: &Facts<'_>) -> Plan {
    let mut p = Planner { f, plan: Plan::empty() };
    p.plan.phase = p.decide();
    p.plan
}

impl Plan {
    fn empty() -> Self {
        Self {
            phase: Phase::Accepted,
            actions: Vec::new(),
            waiting: BTreeMap::new(),
            wake_at: None,
            cancel_starts: false,
            ended: None,
        }
    }
}

struct Planner<'a> {
    f: &'a Facts<'a>,
    plan: Plan,
}

impl Planner<'_> {
    fn decide(&mut self) -> Phase {
        let f = self.f;
        if f.gone || f.view.deleting() {
            return self.stop();
        }
        if f.memory.refused.as_ref().is_some_and(|r| !r.terminal) && f.runtime.sandbox.is_none() {
            return Phase::Refused;
        }
        self.deadline();
        if self.plan.ended.is_some() || outcome(f.view, f.runtime, f.memory).is_some() {
            return self.end();
        }
        let Some(sandbox) = f.runtime.sandbox_ready() else {
            return self.sandbox();
        };
        let mains_exist = f
            .view
            .main
            .iter()
            .any(|m| f.runtime.in_sandbox(m.name(), sandbox).is_some());
        for (i, m) in f.view.init.iter().enumerate() {
            match m.kind {
                Kind::Sidecar => {
                    if !self.keep(m, sandbox) && !mains_exist {
                        self.pending_after(i + 1);
                        return Phase::Initializing(i);
                    }
                }
                Kind::Init | Kind::Main | Kind::Ephemeral => {
                    if mains_exist {
                        continue;
                    }
                    let done = f
                        .runtime
                        .in_sandbox(m.name(), sandbox)
                        .is_some_and(|c| c.state == ContainerState::Exited && c.exit_code == 0);
                    if !done {
                        self.keep(m, sandbox);
                        self.pending_after(i + 1);
                        return Phase::Initializing(i);
                    }
                }
            }
        }
        for m in f.view.main.iter().chain(&f.view.ephemeral) {
            self.keep(m, sandbox);
        }
        Phase::Running
    }

    fn busy(&self, key: &Key) -> Option<Busy> {
        self.f.memory.busy.get(key).copied()
    }

    fn wake(&mut self, at: Timestamp) {
        self.plan.wake_at = Some(self.plan.wake_at.map_or(at, |w| w.min(at)));
    }

    fn wait(&mut self, name: &str, reason: &str, message: impl Into<String>) {
        let waiting = Waiting {
            reason: reason.into(),
            message: message.into(),
        };
        self.plan.waiting.insert(name.to_owned(), waiting);
    }

    /// Init containers from `i` on and all others wait for the ones before.
    fn pending_after(&mut self, i: usize) {
        let f = self.f;
        for m in f.view.init.iter().skip(i).chain(&f.view.main) {
            self.wait(m.name(), "PodInitializing", "");
        }
    }

    fn deadline(&mut self) {
        let f = self.f;
        let (Some(s), Some(start)) = (f.view.spec().active_deadline_seconds, f.memory.start_time) else {
            return;
        };
        let end = after_s(start, s);
        if f.memory.ended.is_some() || outcome(f.view, f.runtime, f.memory).is_some() {
        } else if f.now >= end {
            self.plan.ended = Some((
                "DeadlineExceeded".into(),
                "Pod was active on the node longer than the specified deadline".into(),
            ));
        } else {
            self.wake(end);
        }
    }

    fn sandbox(&mut self) -> Phase {
        let f = self.f;
        // What an old sandbox left running is stopped with it; a live process in a dead sandbox is the runtime's lag.
        if self.busy(&Key::Sandbox).is_some() {
            return Phase::Sandboxing;
        }
        if let Some(wait) = &f.memory.sandbox_wait {
            for m in f.view.members() {
                self.wait(m.name(), &wait.waiting.reason, wait.waiting.message.clone());
            }
            if f.now < wait.retry_at {
                self.wake(wait.retry_at);
                return Phase::Sandboxing;
            }
        }
        let old = f.runtime.sandbox.as_ref();
        let attempt = old.map_or(0, |s| s.pod.attempt + 1);
        self.plan.actions.push(Action::StartSandbox {
            attempt,
            old: old.map(|s| s.id.clone()),
        });
        Phase::Sandboxing
    }

    /// Starts, restarts or stops one container as it needs. True if it runs and has started up.
    fn keep(&mut self, m: &Member, sandbox: &SandboxStatus) -> bool {
        let f = self.f;
        let key = Key::Container(m.name().to_owned());
        let busy = self.busy(&key);
        let Some(c) = f.runtime.in_sandbox(m.name(), sandbox) else {
            if busy.is_none() {
                // Never again, if it ended for good in a sandbox that is lost.
                let ended = f
                    .runtime
                    .latest(m.name())
                    .is_some_and(|c| c.state == ContainerState::Exited && !m.restart.again(c.exit_code));
                if !ended || m.kind == Kind::Init {
                    self.start(m);
                }
            }
            return false;
        };
        match c.state {
            ContainerState::Created => {
                // Made but not started, and nobody is at it: a former agent died in between, or the start failed.
                if busy.is_none() {
                    self.start(m);
                }
                false
            }
            ContainerState::Running => {
                let probed = f.memory.probes.get(&c.id);
                let changed = m.kind == Kind::Main && c.annotations.get(IMAGE).is_some_and(|i| i != m.image());
                if busy.is_none() {
                    let verdict = probed.and_then(|p| p.kill.clone());
                    let kill = match verdict {
                        Some((message, grace)) => Some((Why::Unhealthy(message), grace)),
                        None if changed => Some((Why::Changed, None)),
                        None => None,
                    };
                    if let Some((why, grace)) = kill {
                        let grace_s = grace.unwrap_or_else(|| f.view.grace_s());
                        let (id, name) = (c.id.clone(), m.name().to_owned());
                        self.plan.actions.push(Action::Kill { id, name, grace_s, why });
                    }
                }
                probed.is_some_and(|p| p.started)
            }
            ContainerState::Exited => {
                if busy.is_some() || !m.restart.again(c.exit_code) {
                    return false;
                }
                let finished = from_system(c.finished_at.unwrap_or(c.created_at));
                let until = match f.memory.restarts.get(m.name()) {
                    Some(b) if !b.expired(finished) => Some((after_ms(finished, b.delay_ms), b.delay_ms)),
                    _ => None,
                };
                match until {
                    Some((at, delay_ms)) if f.now < at => {
                        self.wake(at);
                        let text = format!(
                            "back-off {} restarting failed container={} pod={}_{}({})",
                            human_s(delay_ms / 1000),
                            m.name(),
                            f.view.name,
                            f.view.namespace,
                            f.view.uid
                        );
                        self.wait(m.name(), "CrashLoopBackOff", text);
                    }
                    _ => self.start(m),
                }
                false
            }
        }
    }

    fn start(&mut self, m: &Member) {
        let f = self.f;
        if let Some(w) = f.memory.waits.get(m.name()) {
            // What failed is shown first, that it is being waited for a little later, as upstream's next sync does.
            let shown_until = after_ms(w.retry_at, PULL_ERROR_SHOWN_MS - w.delay_ms);
            if w.waiting.reason == "ErrImagePull" && f.now >= shown_until {
                let text = format!("Back-off pulling image \"{}\": {}", m.image(), w.waiting.message);
                self.wait(m.name(), "ImagePullBackOff", text);
            } else {
                self.wait(m.name(), &w.waiting.reason, w.waiting.message.clone());
                self.wake(shown_until);
            }
            if f.now < w.retry_at {
                self.wake(w.retry_at);
                return;
            }
        }
        let attempt = f.runtime.next_attempt(m.name());
        self.plan.actions.push(Action::StartContainer {
            name: m.name().to_owned(),
            attempt,
        });
    }

    /// The pod is over: stop what runs, then the sandbox.
    fn end(&mut self) -> Phase {
        let f = self.f;
        self.plan.cancel_starts = true;
        let deadline = after_s(f.now, i64::try_from(f.view.grace_s()).unwrap_or(30));
        if self.kill_all(deadline, Why::Over) || f.memory.busy.keys().any(|k| *k != Key::Volumes) {
            return Phase::Ending;
        }
        if let Some(s) = f.runtime.sandbox_ready() {
            self.plan.actions.push(Action::StopSandbox { id: s.id.clone() });
            return Phase::Ending;
        }
        Phase::Finished
    }

    /// The pod is being deleted: stop, clean, delete the object.
    fn stop(&mut self) -> Phase {
        let f = self.f;
        self.plan.cancel_starts = true;
        let deadline = f.memory.stop_deadline.unwrap_or(f.now);
        if self.kill_all(deadline, Why::Deleted) || f.memory.busy.keys().any(|k| *k != Key::Delete) {
            return Phase::Stopping;
        }
        if !f.memory.cleaned {
            self.plan.actions.push(Action::Clean);
            return Phase::Reaping;
        }
        if f.gone || f.memory.object_gone {
            return Phase::Gone;
        }
        if self.busy(&Key::Delete).is_none() {
            self.plan.actions.push(Action::DeleteObject);
        }
        Phase::Reaping
    }

    /// Stops everything: first all but the sidecars, then these one by one, the last started first. True while
    /// something runs.
    fn kill_all(&mut self, deadline: Timestamp, why: Why) -> bool {
        let f = self.f;
        let left_ms = ms_between(f.now, deadline).max(0);
        let grace_s = u64::try_from((left_ms + 999) / 1000).unwrap_or(0);
        let is_sidecar = |name: &str| f.view.init.iter().any(|m| m.kind == Kind::Sidecar && m.name() == name);
        let running: Vec<&ContainerStatus> = f
            .runtime
            .containers
            .iter()
            .filter(|c| c.state == ContainerState::Running)
            .collect();
        let mut targets: Vec<&ContainerStatus> = running.iter().copied().filter(|c| !is_sidecar(&c.name)).collect();
        if targets.is_empty() {
            let last = f
                .view
                .init
                .iter()
                .rev()
                .filter(|m| m.kind == Kind::Sidecar)
                .find_map(|m| running.iter().copied().find(|c| c.name == m.name()));
            targets.extend(last);
        }
        for c in targets {
            let (id, name) = (c.id.clone(), c.name.clone());
            match self.busy(&Key::Container(name.clone())) {
                None => self.plan.actions.push(Action::Kill {
                    id,
                    name,
                    grace_s,
                    why: why.clone(),
                }),
                Some(Busy::Stopping(at)) if ms_between(deadline, at) > 1000 => {
                    if self.busy(&Key::Hurry(name.clone())).is_none() {
                        self.plan.actions.push(Action::Hurry { id, name, grace_s });
                    }
                }
                Some(_) => {}
            }
        }
        !running.is_empty()
    }
}

/// Go's way to print whole seconds: `10s`, `1m20s`, `5m0s`.
fn human_s(s: i64) -> String {
    if s < 60 {
        format!("{s}s")
    } else {
        format!("{}m{}s", s / 60, s % 60)
    }
}

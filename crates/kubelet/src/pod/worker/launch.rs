//! Actions of a plan, started beside the worker's loop, and what they come to.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use sandbox::ContainerState;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Outcome, Worker};
use crate::{
    clock::{after_ms, after_s},
    pod::{
        ops::{self, Kill},
        plan::{Action, Backoff, Busy, Key, Wait, Waiting, Why},
        start::Start,
    },
};

/// First and longest wait after a failed start of a container or sandbox.
const IMAGE_FIRST_MS: i64 = 10_000;
const OTHER_FIRST_MS: i64 = 1_000;
const WAIT_MAX_MS: i64 = 300_000;

impl Worker {
    pub(super) fn spawn(&mut self, key: Key, busy: Busy, work: impl Future<Output = Outcome> + Send + 'static) {
        self.memory.busy.insert(key.clone(), busy);
        self.running.spawn(async move { (key, work.await) });
    }

    /// Starts an action beside the loop, unless its key is occupied.
    pub(super) fn launch(&mut self, action: Action, now: Timestamp) {
        let key = action.key();
        if self.memory.busy.contains_key(&key) {
            return;
        }
        let (core, view) = (self.core.clone(), self.view.clone());
        let cancel = CancellationToken::new();
        match action {
            Action::StartSandbox { attempt, old } => {
                self.cancels.insert(key.clone(), cancel.clone());
                self.spawn(key, Busy::Starting, async move {
                    Outcome::Sandbox(ops::sandbox(&core, &view, attempt, old, &cancel).await)
                });
            }
            Action::StartContainer { name, attempt } => {
                let (Some(member), Some(sandbox)) =
                    (view.member(&name).cloned(), self.runtime.sandbox_ready().cloned())
                else {
                    return;
                };
                let latest = self.runtime.latest(&name);
                if latest.is_some_and(|c| c.state == ContainerState::Exited) && !self.memory.waits.contains_key(&name) {
                    let next = Backoff::next(self.memory.restarts.get(&name).copied(), now);
                    self.memory.restarts.insert(name.clone(), next);
                }
                let of_it = self.runtime.containers.iter().filter(|c| c.name == name);
                let old = of_it
                    .filter(|c| c.attempt + 1 < attempt && c.state == ContainerState::Exited)
                    .map(|c| c.id.clone());
                let unstarted = latest
                    .filter(|c| c.state == ContainerState::Created)
                    .map(|c| c.id.clone());
                let start = Start {
                    old: old.collect(),
                    unstarted,
                    core,
                    view,
                    member,
                    attempt,
                    sandbox,
                    cancel: cancel.clone(),
                    notes: self.notes.0.clone(),
                };
                let gone: Vec<String> = start.old.iter().chain(&start.unstarted).cloned().collect();
                self.runtime.containers.retain(|c| !gone.contains(&c.id));
                self.cancels.insert(key.clone(), cancel);
                self.spawn(
                    key,
                    Busy::Starting,
                    async move { Outcome::Container(start.run().await) },
                );
            }
            Action::Kill { id, name, grace_s, why } => {
                if why == Why::Changed {
                    self.memory.restarts.remove(&name);
                }
                if let Some(p) = self.probers.remove(&id) {
                    p.abort();
                }
                let sandbox = self.runtime.sandbox.clone();
                let until = after_s(now, i64::try_from(grace_s).unwrap_or(i64::MAX / 2000));
                let kill = Kill {
                    core,
                    view,
                    id,
                    name,
                    grace_s,
                    why,
                    sandbox,
                };
                self.spawn(key, Busy::Stopping(until), async move {
                    kill.run().await;
                    Outcome::Killed
                });
            }
            Action::Hurry { id, grace_s, .. } => self.spawn(key, Busy::Other, async move {
                let _ = core.config.runtime.stop_container(&id, grace_s).await;
                Outcome::Killed
            }),
            Action::StopSandbox { id } => self.spawn(key, Busy::Other, async move {
                ops::stop_sandbox(&core, &view, &id).await;
                Outcome::SandboxStopped
            }),
            Action::Clean => {
                let sandbox = self.runtime.sandbox.as_ref().map(|s| s.id.clone());
                let containers: Vec<String> = self.runtime.containers.iter().map(|c| c.id.clone()).collect();
                let logs = Some(ops::log_dir(&core, &view));
                self.spawn(key, Busy::Other, async move {
                    let identity = view.identity(0);
                    Outcome::Cleaned(
                        ops::clean(&core, &view.uid, &identity, sandbox.as_deref(), &containers, logs).await,
                    )
                });
            }
            Action::DeleteObject => {
                let flushed = self.writer.flushed();
                self.spawn(key, Busy::Other, async move {
                    // The API should have seen the exit codes before the object goes.
                    let _ = tokio::time::timeout(Duration::from_secs(5), flushed).await;
                    Outcome::Deleted(ops::delete_object(&core, &view).await)
                });
            }
        }
    }

    /// Takes in what an action came to.
    pub(super) fn finish(&mut self, key: Key, outcome: Outcome) {
        self.memory.busy.remove(&key);
        self.cancels.remove(&key);
        match outcome {
            Outcome::Sandbox(Ok(Some(status))) => {
                self.memory.sandbox_wait = None;
                self.runtime.sandbox = Some(status);
            }
            Outcome::Sandbox(Ok(None)) => {}
            Outcome::Sandbox(Err(waiting)) => {
                // The old sandbox, if any, was removed or will be tried again.
                self.memory.sandbox_wait = Some(self.later(self.memory.sandbox_wait.as_ref(), waiting));
            }
            Outcome::Container(result) => {
                let Key::Container(name) = key else { return };
                match result {
                    Ok(()) => drop(self.memory.waits.remove(&name)),
                    Err(waiting) => {
                        let wait = self.later(self.memory.waits.get(&name), waiting);
                        self.memory.waits.insert(name, wait);
                    }
                }
            }
            Outcome::Cleaned(done) => {
                self.memory.cleaned = done;
                if done {
                    self.volumes_at = Instant::now() + Duration::from_secs(3600);
                }
            }
            Outcome::Deleted(done) => self.memory.object_gone |= done,
            Outcome::Killed | Outcome::SandboxStopped | Outcome::Volumes => {}
        }
    }

    fn later(&self, old: Option<&Wait>, waiting: Waiting) -> Wait {
        let first = if waiting.reason == "ErrImagePull" {
            IMAGE_FIRST_MS
        } else {
            OTHER_FIRST_MS
        };
        let same = old.filter(|w| w.waiting.reason == waiting.reason);
        let delay_ms = same.map_or(first, |w| (w.delay_ms * 2).min(WAIT_MAX_MS));
        Wait {
            waiting,
            retry_at: after_ms(self.core.now(), delay_ms),
            delay_ms,
        }
    }
}

//! The plan as a table: a state, and the phase and actions that follow. And one walk over random states that no plan may
//! take twice.

use std::time::{Duration, UNIX_EPOCH};

use k8s_openapi::jiff::Timestamp;
use proptest::prelude::*;
use sandbox::{ContainerState, ContainerStatus, PodIdentity, SandboxState, SandboxStatus};
use serde_json::{Value, json};

use super::plan::*;
use crate::{
    clock::after_s,
    pod::view::PodView,
    testing::{pod, pod_with},
};

fn at(s: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + s).unwrap()
}

fn sandbox(state: SandboxState) -> SandboxStatus {
    SandboxStatus {
        id: "s0".into(),
        pod: PodIdentity {
            uid: "u1".into(),
            namespace: "default".into(),
            name: "p".into(),
            attempt: 0,
        },
        state,
        created_at: UNIX_EPOCH,
        ips: vec![],
        labels: Default::default(),
        annotations: Default::default(),
    }
}

fn container(name: &str, attempt: u32, state: ContainerState, code: i32) -> ContainerStatus {
    ContainerStatus {
        id: format!("{name}{attempt}"),
        sandbox_id: "s0".into(),
        name: name.into(),
        attempt,
        state,
        created_at: UNIX_EPOCH,
        started_at: None,
        finished_at: Some(UNIX_EPOCH + Duration::from_secs(1_000_000)),
        exit_code: code,
        reason: String::new(),
        message: String::new(),
        image: String::new(),
        image_ref: String::new(),
        log_path: Default::default(),
        labels: Default::default(),
        annotations: Default::default(),
    }
}

struct Case {
    view: PodView,
    runtime: PodRuntime,
    memory: Memory,
    now: Timestamp,
    gone: bool,
}

impl Case {
    fn new(spec: Value) -> Self {
        Self {
            view: PodView::new(pod(spec)),
            runtime: PodRuntime::default(),
            memory: Memory::default(),
            now: at(0),
            gone: false,
        }
    }

    fn deleting(spec: Value) -> Self {
        let view = PodView::new(pod_with(
            json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 30}),
            spec,
        ));
        let memory = Memory {
            stop_deadline: Some(at(30)),
            ..Default::default()
        };
        Self {
            view,
            runtime: PodRuntime::default(),
            memory,
            now: at(0),
            gone: false,
        }
    }

    fn sandbox(mut self, state: SandboxState) -> Self {
        self.runtime.sandbox = Some(sandbox(state));
        self
    }

    fn has(mut self, name: &str, state: ContainerState, code: i32) -> Self {
        let attempt = self.runtime.containers.iter().filter(|c| c.name == name).count();
        let c = container(name, u32::try_from(attempt).unwrap(), state, code);
        if state == ContainerState::Running {
            self.memory.probes.insert(
                c.id.clone(),
                Probed {
                    started: true,
                    ready: true,
                    kill: None,
                },
            );
        }
        self.runtime.containers.push(c);
        self
    }

    fn busy(mut self, key: Key, busy: Busy) -> Self {
        self.memory.busy.insert(key, busy);
        self
    }

    fn plan(&self) -> Plan {
        plan(&Facts {
            view: &self.view,
            gone: self.gone,
            runtime: &self.runtime,
            memory: &self.memory,
            now: self.now,
        })
    }

    #[track_caller]
    fn gives(&self, phase: Phase, actions: &[Action]) -> Plan {
        let p = self.plan();
        assert_eq!((p.phase, p.actions.as_slice()), (phase, actions));
        p
    }
}

fn one() -> Value {
    json!({"containers": [{"name": "a", "image": "i"}]})
}

fn start(name: &str, attempt: u32) -> Action {
    Action::StartContainer {
        name: name.into(),
        attempt,
    }
}

fn kill(name: &str, grace_s: u64, why: Why) -> Action {
    Action::Kill {
        id: format!("{name}0"),
        name: name.into(),
        grace_s,
        why,
    }
}

use ContainerState::{Exited, Running};
use SandboxState::{NotReady, Ready};

#[test]
fn from_nothing_to_running() {
    Case::new(one()).gives(Phase::Sandboxing, &[Action::StartSandbox { attempt: 0, old: None }]);
    Case::new(one())
        .busy(Key::Sandbox, Busy::Starting)
        .gives(Phase::Sandboxing, &[]);
    Case::new(one()).sandbox(Ready).gives(Phase::Running, &[start("a", 0)]);
    let c = Case::new(one())
        .sandbox(Ready)
        .busy(Key::Container("a".into()), Busy::Starting);
    c.gives(Phase::Running, &[]);
    Case::new(one())
        .sandbox(Ready)
        .has("a", Running, 0)
        .gives(Phase::Running, &[]);
}

#[test]
fn a_lost_sandbox_takes_everything_with_it() {
    let c = Case::new(one()).sandbox(NotReady).has("a", Exited, 137);
    c.gives(
        Phase::Sandboxing,
        &[Action::StartSandbox {
            attempt: 1,
            old: Some("s0".into()),
        }],
    );
}

#[test]
fn init_containers_one_by_one_and_sidecars_beside() {
    let spec = json!({
        "initContainers": [
            {"name": "x", "image": "i"},
            {"name": "side", "image": "i", "restartPolicy": "Always"},
            {"name": "y", "image": "i"},
        ],
        "containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}],
    });
    let c = Case::new(spec.clone()).sandbox(Ready);
    let p = c.gives(Phase::Initializing(0), &[start("x", 0)]);
    assert_eq!(p.waiting["a"].reason, "PodInitializing");
    let c = c.has("x", Exited, 0);
    c.gives(Phase::Initializing(1), &[start("side", 0)]);
    let mut c = c.has("side", Running, 0);
    c.gives(Phase::Initializing(2), &[start("y", 0)]);
    // A sidecar that has not started up yet holds the next ones.
    c.memory.probes.get_mut("side0").unwrap().started = false;
    c.gives(Phase::Initializing(1), &[]);
    c.memory.probes.get_mut("side0").unwrap().started = true;
    let c = c.has("y", Exited, 0);
    c.gives(Phase::Running, &[start("a", 0), start("b", 0)]);
    // Once main containers exist, a sidecar that ends is restarted without holding anything up.
    let mut c = Case::new(spec)
        .sandbox(Ready)
        .has("x", Exited, 0)
        .has("y", Exited, 0)
        .has("a", Running, 0);
    c.runtime.containers.push(container("side", 0, Exited, 1));
    c.gives(Phase::Running, &[start("side", 1), start("b", 0)]);
}

#[test]
fn restarts_wait_for_their_backoff() {
    let mut c = Case::new(one()).sandbox(Ready).has("a", Exited, 1);
    c.gives(Phase::Running, &[start("a", 1)]);
    let first = Backoff::next(None, at(-5));
    assert_eq!(first.delay_ms, 10_000);
    c.memory.restarts.insert("a".into(), first);
    let p = c.gives(Phase::Running, &[]);
    assert_eq!(p.wake_at, Some(at(10)));
    assert_eq!(
        p.waiting["a"].message,
        "back-off 10s restarting failed container=a pod=p_default(u1)"
    );
    c.now = at(10);
    c.gives(Phase::Running, &[start("a", 1)]);
    let mut b = first;
    for want in [20_000, 40_000, 80_000, 160_000, 300_000, 300_000] {
        b = Backoff::next(Some(b), at(0));
        assert_eq!(b.delay_ms, want);
    }
    assert_eq!(Backoff::next(Some(b), at(601)).delay_ms, 10_000);
}

#[test]
fn restart_policies() {
    for (policy, code, restarts, result) in [
        ("Always", 0, true, None),
        ("OnFailure", 1, true, None),
        ("OnFailure", 0, false, Some(Outcome::Succeeded)),
        ("Never", 1, false, Some(Outcome::Failed)),
        ("Never", 0, false, Some(Outcome::Succeeded)),
    ] {
        let mut spec = one();
        spec["restartPolicy"] = json!(policy);
        let c = Case::new(spec).sandbox(Ready).has("a", Exited, code);
        let stop = Action::StopSandbox { id: "s0".into() };
        let want = if restarts { vec![start("a", 1)] } else { vec![stop] };
        assert_eq!(c.plan().actions, want, "{policy} {code}");
        assert_eq!(outcome(&c.view, &c.runtime, &c.memory), result, "{policy} {code}");
    }
}

#[test]
fn verdicts_and_changes_kill() {
    let mut c = Case::new(one()).sandbox(Ready).has("a", Running, 0);
    c.memory.probes.get_mut("a0").unwrap().kill = Some(("failed liveness probe".into(), Some(3)));
    c.gives(
        Phase::Running,
        &[kill("a", 3, Why::Unhealthy("failed liveness probe".into()))],
    );
    let mut c = Case::new(one()).sandbox(Ready).has("a", Running, 0);
    c.runtime.containers[0].annotations.insert(IMAGE.into(), "older".into());
    c.gives(Phase::Running, &[kill("a", 30, Why::Changed)]);
}

#[test]
fn deletion_stops_then_cleans_then_deletes() {
    let spec = json!({
        "initContainers": [{"name": "side", "image": "i", "restartPolicy": "Always"}],
        "containers": [{"name": "a", "image": "i"}],
    });
    let mut c = Case::deleting(spec)
        .sandbox(Ready)
        .has("side", Running, 0)
        .has("a", Running, 0);
    let p = c.gives(Phase::Stopping, &[kill("a", 30, Why::Deleted)]);
    assert!(p.cancel_starts);
    c.runtime.containers[1].state = Exited;
    c.now = at(10);
    c.gives(Phase::Stopping, &[kill("side", 20, Why::Deleted)]);
    c.runtime.containers[0].state = Exited;
    c.gives(Phase::Reaping, &[Action::Clean]);
    c.memory.cleaned = true;
    c.gives(Phase::Reaping, &[Action::DeleteObject]);
    c.memory.object_gone = true;
    c.gives(Phase::Gone, &[]);
}

#[test]
fn a_shorter_grace_hurries_a_kill() {
    let key = Key::Container("a".into());
    let mut c = Case::deleting(one())
        .sandbox(Ready)
        .has("a", Running, 0)
        .busy(key, Busy::Stopping(at(30)));
    c.gives(Phase::Stopping, &[]);
    c.gone = true;
    c.memory.stop_deadline = Some(at(1));
    c.gives(
        Phase::Stopping,
        &[Action::Hurry {
            id: "a0".into(),
            name: "a".into(),
            grace_s: 1,
        }],
    );
}

#[test]
fn deletion_waits_for_a_start_under_way() {
    let c = Case::deleting(one())
        .sandbox(Ready)
        .busy(Key::Container("a".into()), Busy::Starting);
    c.gives(Phase::Stopping, &[]);
}

#[test]
fn the_active_deadline_ends_a_pod() {
    let mut spec = one();
    spec["activeDeadlineSeconds"] = json!(60);
    let mut c = Case::new(spec).sandbox(Ready).has("a", Running, 0);
    c.memory.start_time = Some(at(0));
    assert_eq!(c.gives(Phase::Running, &[]).wake_at, Some(at(60)));
    c.now = at(60);
    let p = c.plan();
    assert_eq!(p.ended.as_ref().map(|e| e.0.as_str()), Some("DeadlineExceeded"));
    c.memory.ended = p.ended;
    c.gives(Phase::Ending, &[kill("a", 30, Why::Over)]);
    c.runtime.containers[0].state = Exited;
    c.gives(Phase::Ending, &[Action::StopSandbox { id: "s0".into() }]);
    c.runtime.sandbox.as_mut().unwrap().state = NotReady;
    c.gives(Phase::Finished, &[]);
}

#[test]
fn failed_pulls_are_shown_then_back_off() {
    let mut c = Case::new(one()).sandbox(Ready);
    let waiting = Waiting {
        reason: "ErrImagePull".into(),
        message: "no".into(),
    };
    c.memory.waits.insert(
        "a".into(),
        Wait {
            waiting,
            retry_at: at(10),
            delay_ms: 10_000,
        },
    );
    let p = c.gives(Phase::Running, &[]);
    assert_eq!(
        (p.waiting["a"].reason.as_str(), p.wake_at),
        ("ErrImagePull", Some(at(1)))
    );
    c.now = at(1);
    let p = c.gives(Phase::Running, &[]);
    assert_eq!(
        (p.waiting["a"].reason.as_str(), p.wake_at),
        ("ImagePullBackOff", Some(at(10)))
    );
    c.now = at(10);
    c.gives(Phase::Running, &[start("a", 0)]);
}

/// Applies an action as if it had succeeded at once.
fn apply(c: &mut Case, action: Action, code: i32) {
    match action {
        Action::StartSandbox { attempt, .. } => {
            let mut s = sandbox(Ready);
            s.id = format!("s{attempt}");
            s.pod.attempt = attempt;
            c.runtime.sandbox = Some(s);
        }
        Action::StartContainer { name, attempt } => {
            let mut made = container(&name, attempt, Running, code);
            made.sandbox_id = c.runtime.sandbox.as_ref().unwrap().id.clone();
            c.memory.probes.insert(
                made.id.clone(),
                Probed {
                    started: true,
                    ready: true,
                    kill: None,
                },
            );
            c.memory.restarts.insert(name, Backoff::next(None, c.now));
            c.runtime.containers.push(made);
        }
        Action::Kill { id, .. } | Action::Hurry { id, .. } => {
            if let Some(k) = c.runtime.containers.iter_mut().find(|k| k.id == id) {
                k.state = Exited;
                k.exit_code = 137;
            }
        }
        Action::StopSandbox { .. } => c.runtime.sandbox.as_mut().unwrap().state = NotReady,
        Action::Clean => {
            c.runtime = PodRuntime::default();
            c.memory.cleaned = true;
        }
        Action::DeleteObject => c.memory.object_gone = true,
    }
}

proptest! {
    /// Whatever ends, dies or is deleted in between: actions never name one key twice, nothing starts while the pod is
    /// being stopped, and a deleted pod comes to its end.
    #[test]
    fn every_walk_ends(steps in prop::collection::vec((0u8..6, 0i32..3), 0..40), policy in 0usize..3, side in any::<bool>()) {
        let mut spec = json!({"containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}],
            "restartPolicy": (["Always", "OnFailure", "Never"][policy])});
        if side {
            spec["initContainers"] = json!([{"name": "x", "image": "i"}, {"name": "s", "image": "i", "restartPolicy": "Always"}]);
        }
        let mut c = Case::new(spec.clone());
        for (what, code) in steps {
            match what {
                0..=2 => {
                    let p = c.plan();
                    let mut keys: Vec<_> = p.actions.iter().map(Action::key).collect();
                    let all = keys.len();
                    keys.sort_by_key(|k| format!("{k:?}"));
                    keys.dedup();
                    prop_assert_eq!(all, keys.len());
                    for a in p.actions {
                        apply(&mut c, a, code);
                    }
                }
                3 => {
                    if let Some(k) = c.runtime.containers.iter_mut().find(|k| k.state == Running) {
                        k.state = Exited;
                        k.exit_code = code;
                    }
                }
                4 => c.now = after_s(c.now, 20),
                _ => {
                    if let Some(s) = &mut c.runtime.sandbox {
                        s.state = NotReady;
                        for k in &mut c.runtime.containers {
                            k.state = Exited;
                        }
                    }
                }
            }
        }
        let Case { runtime, memory, .. } = c;
        let mut c = Case { runtime, ..Case::deleting(spec) };
        c.memory.probes = memory.probes;
        for _ in 0..12 {
            let p = c.plan();
            for a in p.actions {
                let starts = matches!(a, Action::StartContainer { .. } | Action::StartSandbox { .. });
                prop_assert!(!starts);
                apply(&mut c, a, 0);
            }
        }
        prop_assert_eq!(c.plan().phase, Phase::Gone);
    }
}

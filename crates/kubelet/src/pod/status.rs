//! The pod's status as the API should show it: a pure function of what the plan was made from.
//!
//! Phase never goes back from Succeeded or Failed. Conditions keep their transition time while their status holds.
//! Conditions of others (readiness gates, `PodScheduled`, `DisruptionTarget`) are read, never written, except that a pod
//! without `PodScheduled` (bound by its creator) gets it.

use std::{collections::HashMap, net::IpAddr};

use k8s_openapi::{
    api::core::v1::{
        ContainerState as ApiState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
        ContainerStatus as ApiStatus, HostIP, PodCondition, PodIP, PodStatus,
    },
    jiff::Timestamp,
};
use sandbox::{ContainerState, ContainerStatus};

use crate::{
    clock::{from_system, time},
    pod::{
        plan::{Busy, Memory, Outcome, Plan, PodRuntime, Probed, outcome},
        view::{Kind, Member, PodView},
    },
};

pub struct StatusFacts<'a> {
    pub view: &'a PodView,
    pub runtime: &'a PodRuntime,
    pub memory: &'a Memory,
    pub plan: &'a Plan,
    /// The node's addresses, primary first.
    pub node_ips: &'a [IpAddr],
    /// Scheme of container ids.
    pub runtime_name: &'a str,
    /// Termination messages by container id.
    pub messages: &'a HashMap<String, String>,
    pub now: Timestamp,
    /// What was last computed, or what the API has.
    pub last: &'a PodStatus,
}

/// Computes the whole status.
pub fn status(f: &StatusFacts<'_>) -> PodStatus {
    let statuses = |members: &[Member]| -> Vec<ApiStatus> { members.iter().map(|m| container(f, m)).collect() };
    let init = statuses(&f.view.init);
    let main = statuses(&f.view.main);
    let ephemeral = statuses(&f.view.ephemeral);
    let over = outcome(f.view, f.runtime, f.memory).or_else(|| deleted(f));
    let stopped = f.runtime.containers.iter().all(|c| c.state != ContainerState::Running);
    let phase = match over {
        // The phase turns only when the last process is gone: nobody may count on a pod that still writes.
        Some(Outcome::Succeeded) if stopped => "Succeeded",
        Some(Outcome::Failed) if stopped => "Failed",
        _ => phase(f, &init, &main),
    };
    let (reason, message) = match (&f.memory.refused, &f.memory.ended) {
        (_, Some((reason, message))) => (Some(reason.clone()), Some(message.clone())),
        (Some(r), None) => (Some(r.reason.clone()), Some(r.to_string())),
        (None, None) => (f.last.reason.clone(), f.last.message.clone()),
    };
    let reason = if f.memory.refused.is_none() && f.memory.ended.is_none() && over.is_none() {
        None
    } else {
        reason
    };
    let message = reason.as_ref().and(message);
    let ips = addresses(f);
    let mut out = PodStatus {
        phase: Some(phase.to_owned()),
        reason,
        message,
        observed_generation: f.view.pod.metadata.generation,
        start_time: f.memory.start_time.map(time).or_else(|| f.last.start_time.clone()),
        qos_class: Some(f.view.qos().as_str().to_owned()),
        host_ip: f.node_ips.first().map(ToString::to_string),
        host_ips: (!f.node_ips.is_empty()).then(|| f.node_ips.iter().map(|ip| HostIP { ip: ip.to_string() }).collect()),
        pod_ip: ips.first().cloned(),
        pod_ips: (!ips.is_empty()).then(|| ips.into_iter().map(|ip| PodIP { ip }).collect()),
        init_container_statuses: (!init.is_empty()).then_some(init),
        container_statuses: Some(main),
        ephemeral_container_statuses: (!ephemeral.is_empty()).then_some(ephemeral),
        ..Default::default()
    };
    out.conditions = Some(conditions(f, &out));
    out
}

/// A pod that was deleted ends with a phase of its own once its containers have ended (upstream since 1.27).
fn deleted(f: &StatusFacts<'_>) -> Option<Outcome> {
    if !f.view.deleting() || f.memory.busy.values().any(|b| *b == Busy::Starting) {
        return None;
    }
    let ended = |m: &Member| f.runtime.latest(m.name()).is_some_and(|c| c.exit_code == 0);
    Some(if f.view.main.iter().all(ended) {
        Outcome::Succeeded
    } else {
        Outcome::Failed
    })
}

fn addresses(f: &StatusFacts<'_>) -> Vec<String> {
    if f.view.host_network() {
        return if f.runtime.sandbox.is_some() {
            f.node_ips.iter().map(ToString::to_string).collect()
        } else {
            vec![]
        };
    }
    match f.runtime.sandbox_ready() {
        Some(s) if !s.ips.is_empty() => s.ips.iter().map(ToString::to_string).collect(),
        // A finished pod keeps its last address in its status, as upstream's does.
        _ => f.last.pod_ips.iter().flatten().map(|p| p.ip.clone()).collect(),
    }
}

fn phase(f: &StatusFacts<'_>, init: &[ApiStatus], main: &[ApiStatus]) -> &'static str {
    let pending_init = f.view.init.iter().zip(init).any(|(m, s)| {
        let exited_well = s
            .state
            .as_ref()
            .and_then(|s| s.terminated.as_ref())
            .is_some_and(|t| t.exit_code == 0);
        match m.kind {
            Kind::Sidecar => s.started != Some(true),
            Kind::Init | Kind::Main | Kind::Ephemeral => !exited_well,
        }
    });
    let begun = |s: &ApiStatus| {
        let state = s.state.as_ref();
        state.is_some_and(|s| s.running.is_some() || s.terminated.is_some())
            || s.last_state.as_ref().is_some_and(|l| l.terminated.is_some())
    };
    let any = main.iter().any(begun);
    if (pending_init && !any) || !main.iter().all(begun) {
        "Pending"
    } else {
        "Running"
    }
}

/// Started and ready of one container. Without a prober's word yet, a container with no such probe counts at once.
pub fn probed(m: &Member, c: &ContainerStatus, probes: &HashMap<String, Probed>) -> Probed {
    if let Some(p) = probes.get(&c.id) {
        return p.clone();
    }
    let started = m.container.startup_probe.is_none();
    Probed {
        started,
        ready: started && m.container.readiness_probe.is_none(),
        kill: None,
    }
}

fn terminated(f: &StatusFacts<'_>, c: &ContainerStatus) -> ApiState {
    let message = f.messages.get(&c.id).cloned().filter(|m| !m.is_empty());
    let message = message.or_else(|| (!c.message.is_empty()).then(|| c.message.clone()));
    let reason = match c.reason.as_str() {
        "" if c.exit_code == 0 => "Completed",
        "" => "Error",
        other => other,
    };
    ApiState {
        terminated: Some(ContainerStateTerminated {
            container_id: Some(id(f, c)),
            exit_code: c.exit_code,
            finished_at: c.finished_at.map(|t| time(from_system(t))),
            started_at: c.started_at.map(|t| time(from_system(t))),
            message,
            reason: Some(reason.to_owned()),
            signal: None,
        }),
        ..Default::default()
    }
}

fn waiting(reason: &str, message: &str) -> ApiState {
    ApiState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message: (!message.is_empty()).then(|| message.to_owned()),
        }),
        ..Default::default()
    }
}

fn id(f: &StatusFacts<'_>, c: &ContainerStatus) -> String {
    format!("{}://{}", f.runtime_name, c.id)
}

fn container(f: &StatusFacts<'_>, m: &Member) -> ApiStatus {
    let name = m.name();
    let latest = f.runtime.latest(name);
    let planned = f.plan.waiting.get(name);
    let remembered = f.memory.waits.get(name).map(|w| &w.waiting);
    let mut last_state = f
        .runtime
        .previous(name)
        .filter(|c| c.state == ContainerState::Exited)
        .map(|c| terminated(f, c));
    let (mut ready, mut started) = (false, Some(false));
    let restarting = |c: &ContainerStatus| {
        (m.kind == Kind::Sidecar || outcome(f.view, f.runtime, f.memory).is_none())
            && !f.view.deleting()
            && m.restart.again(c.exit_code)
    };
    let state = match latest {
        Some(c) if c.state == ContainerState::Running => {
            let p = probed(m, c, &f.memory.probes);
            (ready, started) = (p.ready, Some(p.started));
            if m.kind == Kind::Init {
                ready = false;
            }
            let started_at = c.started_at.map(|t| time(from_system(t)));
            ApiState {
                running: Some(ContainerStateRunning { started_at }),
                ..Default::default()
            }
        }
        Some(c) if c.state == ContainerState::Exited => {
            // Init containers are ready when they have ended well.
            ready = m.kind == Kind::Init && c.exit_code == 0;
            match (planned, remembered) {
                (Some(w), _) | (None, Some(w)) if restarting(c) => {
                    last_state = Some(terminated(f, c));
                    waiting(&w.reason, &w.message)
                }
                _ => terminated(f, c),
            }
        }
        _ => {
            let default = if f.view.init.is_empty() || m.kind != Kind::Main {
                "ContainerCreating"
            } else {
                "PodInitializing"
            };
            let refused = f.memory.refused.as_ref();
            match (planned, remembered, refused) {
                (Some(w), ..) => waiting(&w.reason, &w.message),
                (None, Some(w), _) => waiting(&w.reason, &w.message),
                (None, None, Some(r)) => waiting(&r.reason, &r.to_string()),
                (None, None, None) => waiting(default, ""),
            }
        }
    };
    let seen = latest.filter(|c| c.state != ContainerState::Created);
    ApiStatus {
        name: name.to_owned(),
        image: seen.map_or_else(
            || m.image().to_owned(),
            |c| {
                if c.image.is_empty() {
                    m.image().to_owned()
                } else {
                    c.image.clone()
                }
            },
        ),
        image_id: seen.map(|c| c.image_ref.clone()).unwrap_or_default(),
        container_id: seen.map(|c| id(f, c)),
        ready,
        started: if m.kind == Kind::Ephemeral { None } else { started },
        restart_count: latest.map_or(0, |c| i32::try_from(c.attempt).unwrap_or(i32::MAX)),
        state: Some(state),
        last_state: Some(last_state.unwrap_or_default()),
        ..Default::default()
    }
}

fn conditions(f: &StatusFacts<'_>, s: &PodStatus) -> Vec<PodCondition> {
    let over = outcome(f.view, f.runtime, f.memory);
    let done = matches!(s.phase.as_deref(), Some("Succeeded"));
    let ended = matches!(s.phase.as_deref(), Some("Succeeded" | "Failed"));
    let names = |list: Vec<&str>| format!("[{}]", list.join(" "));

    let sandboxed = f.runtime.sandbox_ready().is_some();
    let incomplete: Vec<&str> = f
        .view
        .init
        .iter()
        .zip(s.init_container_statuses.iter().flatten())
        .filter(|(m, st)| {
            if m.kind == Kind::Sidecar {
                st.started != Some(true)
            } else {
                !st.ready
            }
        })
        .map(|(m, _)| m.name())
        .collect();
    let mains_begun = f.view.main.iter().any(|m| f.runtime.latest(m.name()).is_some());
    let initialized = if done {
        (true, Some("PodCompleted".to_owned()), None)
    } else if incomplete.is_empty() || mains_begun {
        (true, None, None)
    } else {
        let message = format!("containers with incomplete status: {}", names(incomplete));
        (false, Some("ContainersNotInitialized".to_owned()), Some(message))
    };

    let unready: Vec<&str> = f
        .view
        .init
        .iter()
        .filter(|m| m.kind == Kind::Sidecar)
        .zip(s.init_container_statuses.iter().flatten().filter(|st| {
            f.view
                .init
                .iter()
                .any(|m| m.kind == Kind::Sidecar && m.name() == st.name)
        }))
        .chain(f.view.main.iter().zip(s.container_statuses.iter().flatten()))
        .filter(|(_, st)| !st.ready)
        .map(|(m, _)| m.name())
        .collect();
    let containers_ready = if done {
        (false, Some("PodCompleted".to_owned()), None)
    } else if ended || over == Some(Outcome::Failed) {
        (false, Some("PodFailed".to_owned()), None)
    } else if unready.is_empty() {
        (true, None, None)
    } else {
        let message = format!("containers with unready status: {}", names(unready));
        (false, Some("ContainersNotReady".to_owned()), Some(message))
    };

    let existing = f.view.pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let gates: Vec<&str> = f
        .view
        .spec()
        .readiness_gates
        .iter()
        .flatten()
        .map(|g| g.condition_type.as_str())
        .filter(|t| !existing.clone().any(|c| c.type_ == **t && c.status == "True"))
        .collect();
    let ready = if containers_ready.0 && !gates.is_empty() {
        let message = gates
            .iter()
            .map(|g| {
                format!("corresponding condition of pod readiness gate \"{g}\" does not exist or is not \"True\".")
            })
            .collect::<Vec<_>>()
            .join("\n");
        (false, Some("ReadinessGatesNotReady".to_owned()), Some(message))
    } else {
        containers_ready.clone()
    };

    let mut list = vec![
        ("PodReadyToStartContainers", (sandboxed, None, None)),
        ("Initialized", initialized),
        ("Ready", ready),
        ("ContainersReady", containers_ready),
    ];
    if !existing.clone().any(|c| c.type_ == "PodScheduled") {
        list.push(("PodScheduled", (true, None, None)));
    }
    list.into_iter()
        .map(|(type_, (value, reason, message))| {
            let status = if value { "True" } else { "False" };
            let old = f
                .last
                .conditions
                .iter()
                .flatten()
                .find(|c| c.type_ == type_)
                .filter(|c| c.status == status);
            PodCondition {
                type_: type_.to_owned(),
                status: status.to_owned(),
                reason,
                message,
                last_probe_time: None,
                last_transition_time: old
                    .and_then(|c| c.last_transition_time.clone())
                    .or_else(|| Some(time(f.now))),
                observed_generation: f.view.pod.metadata.generation,
            }
        })
        .collect()
}

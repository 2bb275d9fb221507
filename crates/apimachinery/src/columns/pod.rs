//! The row of a pod: readiness, restarts, and the one word for its state.

use jiff::Timestamp;
use serde_json::Value;

use super::{at, int, list, since, text};
use crate::meta;

/// Name to node: `Name Ready Status Restarts Age IP Node NominatedNode ReadinessGates`.
pub(super) fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let s = summary(pod);
    let restarts = match (s.restarts, &s.last_restart) {
        (n, Some(at)) if n != 0 => format!("{n} ({} ago)", since(Some(at), now)),
        (n, _) => n.to_string(),
    };
    let or_none = |t: &str| {
        if t.is_empty() {
            "<none>".to_owned()
        } else {
            t.to_owned()
        }
    };
    let ip = list(pod, &["status", "podIPs"])
        .first()
        .map_or("", |p| text(p, &["ip"]));
    vec![
        meta::name(pod).into(),
        format!("{}/{}", s.ready, s.total).into(),
        s.reason.into(),
        restarts.into(),
        super::age(pod, now),
        or_none(ip).into(),
        or_none(text(pod, &["spec", "nodeName"])).into(),
        or_none(text(pod, &["status", "nominatedNodeName"])).into(),
        readiness_gates(pod).into(),
    ]
}

struct Summary {
    reason: String,
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: Option<String>,
}

fn summary(pod: &Value) -> Summary {
    let status = &pod["status"];
    let phase = text(status, &["phase"]);
    let conditions = list(status, &["conditions"]);
    let mut reason = Some(text(status, &["reason"]))
        .filter(|r| !r.is_empty())
        .unwrap_or(phase)
        .to_owned();
    if conditions
        .iter()
        .any(|c| c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated")
    {
        reason = "SchedulingGated".into();
    }
    let init_specs = list(pod, &["spec", "initContainers"]);
    let sidecar = |name: &str| {
        init_specs
            .iter()
            .any(|c| c["name"] == name && c["restartPolicy"] == "Always")
    };
    let mut s = Summary {
        reason,
        ready: 0,
        total: list(pod, &["spec", "containers"]).len()
            + init_specs.iter().filter(|c| c["restartPolicy"] == "Always").count(),
        restarts: 0,
        last_restart: None,
    };
    let mut sidecar_restarts = 0;
    let mut last_sidecar_restart = None;
    let mut initializing = false;
    for (i, c) in list(status, &["initContainerStatuses"]).iter().enumerate() {
        let restartable = sidecar(text(c, &["name"]));
        s.restarts += int(c, &["restartCount"]);
        later(&mut s.last_restart, c);
        if restartable {
            sidecar_restarts += int(c, &["restartCount"]);
            later(&mut last_sidecar_restart, c);
        }
        let terminated = at(c, &["state", "terminated"]);
        if terminated.is_some_and(|t| int(t, &["exitCode"]) == 0) {
            continue;
        }
        if restartable && c["started"] == true {
            s.ready += usize::from(c["ready"] == true);
            continue;
        }
        let waiting = text(c, &["state", "waiting", "reason"]);
        s.reason = match terminated {
            Some(t) => format!("Init:{}", ended(t)),
            None if !waiting.is_empty() && waiting != "PodInitializing" => format!("Init:{waiting}"),
            None => format!("Init:{i}/{}", init_specs.len()),
        };
        initializing = true;
        break;
    }

    let condition = |ty: &str| conditions.iter().any(|c| c["type"] == ty && c["status"] == "True");
    if !initializing || condition("Initialized") {
        s.restarts = sidecar_restarts;
        s.last_restart = last_sidecar_restart;
        containers(&mut s, status, condition("Ready"));
    }

    if meta::deletion_timestamp(pod).is_some() {
        if status["reason"] == "NodeLost" {
            s.reason = "Unknown".into();
        } else if !matches!(phase, "Succeeded" | "Failed") {
            s.reason = "Terminating".into();
        }
    }
    s
}

fn containers(s: &mut Summary, status: &Value, pod_ready: bool) {
    let mut running = false;
    let mut error = String::new();
    for c in list(status, &["containerStatuses"]).iter().rev() {
        s.restarts += int(c, &["restartCount"]);
        later(&mut s.last_restart, c);
        let waiting = text(c, &["state", "waiting", "reason"]);
        if !waiting.is_empty() {
            s.reason = waiting.to_owned();
        } else if let Some(t) = at(c, &["state", "terminated"]) {
            s.reason = ended(t);
            if int(t, &["exitCode"]) != 0 {
                error.clone_from(&s.reason);
            }
        } else if c["ready"] == true && at(c, &["state", "running"]).is_some() {
            running = true;
            s.ready += 1;
        }
    }
    if s.reason == "Completed" {
        if running && pod_ready {
            s.reason = "Running".into();
        } else if !error.is_empty() {
            s.reason = error;
        } else if running {
            s.reason = "NotReady".into();
        }
    }
}

/// Why a container ended: its reason, signal or exit code.
fn ended(terminated: &Value) -> String {
    let reason = text(terminated, &["reason"]);
    let signal = int(terminated, &["signal"]);
    if !reason.is_empty() {
        reason.to_owned()
    } else if signal != 0 {
        format!("Signal:{signal}")
    } else {
        format!("ExitCode:{}", int(terminated, &["exitCode"]))
    }
}

/// Keeps the later end; the texts are UTC of one form, so they compare as times.
fn later(last: &mut Option<String>, container: &Value) {
    let at = text(container, &["lastState", "terminated", "finishedAt"]);
    if !at.is_empty() && last.as_deref().is_none_or(|l| l < at) {
        *last = Some(at.to_owned());
    }
}

fn readiness_gates(pod: &Value) -> String {
    let gates = list(pod, &["spec", "readinessGates"]);
    if gates.is_empty() {
        return "<none>".into();
    }
    let conditions = list(pod, &["status", "conditions"]);
    let open = |g: &&Value| {
        conditions
            .iter()
            .any(|c| c["type"] == g["conditionType"] && c["status"] == "True")
    };
    format!("{}/{}", gates.iter().filter(open).count(), gates.len())
}

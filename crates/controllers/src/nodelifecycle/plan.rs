//! What a node's silence or conditions mean for its status, its taints and its pods. Pure.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::common::{is_deleting, is_terminal};

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Conditions that make a taint while True.
const PRESSURES: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];
/// Conditions a silent node no longer vouches for.
const VOUCHED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];
/// How long pods that say nothing about these taints stay: what admission writes into pods upstream.
const DEFAULT_TOLERATION: Duration = Duration::from_secs(300);

/// Conditions of a silent node, where they differ from what it has.
pub fn silent_conditions(node: &Node, now: Timestamp) -> Option<Vec<NodeCondition>> {
    let mut conditions = node
        .status
        .as_ref()
        .and_then(|s| s.conditions.clone())
        .unwrap_or_default();
    let mut changed = false;
    for kind in VOUCHED {
        match conditions.iter_mut().find(|c| c.type_ == kind) {
            Some(c) if c.status == "Unknown" => {}
            Some(c) => {
                c.status = "Unknown".to_owned();
                c.reason = Some("NodeStatusUnknown".to_owned());
                c.message = Some("Kubelet stopped posting node status.".to_owned());
                c.last_transition_time = Some(Time(now));
                changed = true;
            }
            None => {
                conditions.push(NodeCondition {
                    type_: kind.to_owned(),
                    status: "Unknown".to_owned(),
                    reason: Some("NodeStatusNeverUpdated".to_owned()),
                    message: Some("Kubelet never posted node status.".to_owned()),
                    last_heartbeat_time: node.metadata.creation_timestamp.clone(),
                    last_transition_time: Some(Time(now)),
                });
                changed = true;
            }
        }
    }
    changed.then_some(conditions)
}

/// The status of one condition; empty if absent.
pub fn condition<'a>(node: &'a Node, kind: &str) -> &'a str {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .find(|c| c.type_ == kind)
        .map_or("", |c| c.status.as_str())
}

/// The taints the node should have, where they differ from what it has. Taints of others are kept, and so is the time
/// at which one of ours was added. A node that never had a Ready condition is not judged: it is just registering.
pub fn taints(node: &Node, now: Timestamp) -> Option<Vec<Taint>> {
    let current = node.spec.as_ref().and_then(|s| s.taints.clone()).unwrap_or_default();
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    let ready = condition(node, "Ready");
    match ready {
        "False" => wanted.extend([(NOT_READY, "NoSchedule"), (NOT_READY, "NoExecute")]),
        "Unknown" => wanted.extend([(UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")]),
        _ => {}
    }
    for (kind, key) in PRESSURES {
        if condition(node, kind) == "True" {
            wanted.push((key, "NoSchedule"));
        }
    }
    if node.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or_default() {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    let ours = |t: &Taint| {
        let by_ready = [NOT_READY, UNREACHABLE].contains(&t.key.as_str());
        // While nothing is known, a taint set at registration stays.
        (by_ready && !ready.is_empty())
            || t.key == UNSCHEDULABLE
            || PRESSURES
                .iter()
                .any(|(kind, key)| t.key == *key && !condition(node, kind).is_empty())
    };
    let is_wanted = |t: &Taint| wanted.iter().any(|(key, effect)| t.key == *key && t.effect == *effect);
    let mut next: Vec<Taint> = current.iter().filter(|t| !ours(t) || is_wanted(t)).cloned().collect();
    for (key, effect) in wanted {
        if !next.iter().any(|t| t.key == key && t.effect == effect) {
            next.push(Taint {
                key: key.to_owned(),
                effect: effect.to_owned(),
                time_added: (effect == "NoExecute").then_some(Time(now)),
                ..Taint::default()
            });
        }
    }
    (next != current).then_some(next)
}

/// When a pod must leave its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// It may stay.
    Never,
    /// It must go now.
    Now,
    /// It must go after this long, if nothing changes.
    In(Duration),
}

/// When the node's NoExecute taints drive the pod out. Of several finite tolerations the shortest counts.
pub fn leave(node: &Node, pod: &Pod, now: Timestamp) -> Leave {
    if is_deleting(pod) || is_terminal(pod) {
        return Leave::Never;
    }
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_ref());
    let tolerations = pod.spec.as_ref().and_then(|s| s.tolerations.as_ref());
    let mut leave = Leave::Never;
    for taint in taints.into_iter().flatten().filter(|t| t.effect == "NoExecute") {
        let matching: Vec<_> = tolerations
            .into_iter()
            .flatten()
            .filter(|t| scheduler_rules::tolerates(t, taint))
            .collect();
        let added = taint.time_added.as_ref().map_or(now, |t| t.0);
        let passed = apimachinery::time::since(now, added);
        let stay = if matching.is_empty() {
            let by_default = [NOT_READY, UNREACHABLE].contains(&taint.key.as_str());
            if by_default {
                Some(DEFAULT_TOLERATION)
            } else {
                Some(Duration::ZERO)
            }
        } else {
            matching
                .iter()
                .filter_map(|t| t.toleration_seconds)
                .min()
                .map(|s| Duration::from_secs(s.max(0) as u64))
        };
        leave = match (leave, stay) {
            (_, None) | (Leave::Now, _) => leave,
            (_, Some(stay)) if stay <= passed => Leave::Now,
            (Leave::In(other), Some(stay)) => Leave::In(other.min(stay - passed)),
            (Leave::Never, Some(stay)) => Leave::In(stay - passed),
        };
    }
    leave
}

/// The one rule shared in meaning with the scheduler, which this crate does not depend on.
mod scheduler_rules {
    use k8s_openapi::api::core::v1::{Taint, Toleration};

    /// Whether the toleration accepts the taint.
    pub fn tolerates(t: &Toleration, taint: &Taint) -> bool {
        let text = |v: &Option<String>| v.clone().unwrap_or_default();
        let (effect, key) = (text(&t.effect), text(&t.key));
        if (!effect.is_empty() && effect != taint.effect) || (!key.is_empty() && key != taint.key) {
            return false;
        }
        match text(&t.operator).as_str() {
            "Exists" => true,
            "" | "Equal" => !key.is_empty() && text(&t.value) == text(&taint.value),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NOW: &str = "2026-01-02T03:04:05Z";

    fn now() -> Timestamp {
        NOW.parse().unwrap()
    }

    fn node(ready: &str, spec: Value) -> Node {
        let conditions = if ready.is_empty() {
            json!([])
        } else {
            json!([{"type": "Ready", "status": ready}])
        };
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": spec, "status": {"conditions": conditions}}))
            .unwrap()
    }

    fn keys(taints: Option<Vec<Taint>>) -> Option<Vec<String>> {
        Some(
            taints?
                .iter()
                .map(|t| format!("{}:{}", t.key.trim_start_matches("node.kubernetes.io/"), t.effect))
                .collect(),
        )
    }

    #[test]
    fn silence_turns_conditions_unknown_once() {
        let mut n = node("True", json!({}));
        let conditions = silent_conditions(&n, now()).unwrap();
        let text: Vec<String> = conditions
            .iter()
            .map(|c| format!("{} {}", c.type_, c.reason.as_deref().unwrap()))
            .collect();
        assert_eq!(
            text,
            [
                "Ready NodeStatusUnknown",
                "MemoryPressure NodeStatusNeverUpdated",
                "DiskPressure NodeStatusNeverUpdated",
                "PIDPressure NodeStatusNeverUpdated"
            ]
        );
        n.status.as_mut().unwrap().conditions = Some(conditions);
        assert_eq!(silent_conditions(&n, now()), None);
    }

    #[test]
    fn taints_follow_conditions_and_leave_others_alone() {
        let other = json!({"taints": [{"key": "gpu", "effect": "NoSchedule"}]});
        let list = |items: &[&str]| Some(items.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        assert_eq!(keys(taints(&node("True", other.clone()), now())), None);
        assert_eq!(
            keys(taints(&node("Unknown", other), now())),
            list(&["gpu:NoSchedule", "unreachable:NoSchedule", "unreachable:NoExecute"])
        );
        let tainted = json!({"taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]});
        assert_eq!(keys(taints(&node("", tainted.clone()), now())), None);
        assert_eq!(keys(taints(&node("True", tainted), now())), list(&[]));
        assert_eq!(
            keys(taints(&node("True", json!({"unschedulable": true})), now())),
            list(&["unschedulable:NoSchedule"])
        );
    }

    #[test]
    fn pods_leave_when_their_tolerations_say() {
        let gone = |added: &str| {
            node(
                "Unknown",
                json!({"taints": [
            {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": added}]}),
            )
        };
        let pod = |tolerations: Value| -> Pod {
            serde_json::from_value(
                json!({"metadata": {"name": "p"}, "spec": {"containers": [], "tolerations": tolerations}}),
            )
            .unwrap()
        };
        let unreachable =
            |s: Value| json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": s}]);
        let long_ago = "2026-01-02T03:00:05Z";
        assert_eq!(
            leave(&gone(NOW), &pod(json!([])), now()),
            Leave::In(Duration::from_secs(300))
        );
        assert_eq!(
            leave(&gone(long_ago), &pod(unreachable(json!(300))), now()),
            Leave::In(Duration::from_secs(60))
        );
        assert_eq!(leave(&gone(long_ago), &pod(unreachable(json!(240))), now()), Leave::Now);
        assert_eq!(
            leave(&gone(long_ago), &pod(unreachable(Value::Null)), now()),
            Leave::Never
        );
        let custom = node("True", json!({"taints": [{"key": "out", "effect": "NoExecute"}]}));
        assert_eq!(leave(&custom, &pod(json!([])), now()), Leave::Now);
    }
}

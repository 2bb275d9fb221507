//! Whether a node is one for the pods of a DaemonSet. Pure.
//!
//! # Source
//! `NodeShouldRunDaemonPod` and `AddOrUpdateDaemonPodTolerations` of Kubernetes 1.36.

use apimachinery::selector::LabelSelector;
use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm, PodSpec, Taint, Toleration};
use serde_json::json;

use crate::common::name_of;

/// Taints that the pods of every DaemonSet tolerate: `(key, effect)`.
const TOLERATED: [(&str, &str); 6] = [
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
];

/// Gives a pod's spec the tolerations of a DaemonSet's pods.
pub fn tolerate(spec: &mut PodSpec) {
    let host = (spec.host_network == Some(true)).then_some(("node.kubernetes.io/network-unavailable", "NoSchedule"));
    let list = spec.tolerations.get_or_insert_default();
    for (key, effect) in TOLERATED.into_iter().chain(host) {
        let same = |t: &Toleration| t.key.as_deref() == Some(key) && t.effect.as_deref() == Some(effect);
        list.retain(|t| !same(t));
        list.push(Toleration {
            key: Some(key.to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some(effect.to_owned()),
            ..Toleration::default()
        });
    }
}

/// Whether a pod of `spec` (with its tolerations) shall run on the node, and whether one that runs there may stay.
pub fn fits(spec: &PodSpec, node: &Node) -> (bool, bool) {
    if !selected(spec, node) {
        return (false, false);
    }
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_ref());
    let bad = |effects: &[&str]| {
        taints
            .into_iter()
            .flatten()
            .any(|t| effects.contains(&t.effect.as_str()) && !tolerated(spec, t))
    };
    (!bad(&["NoSchedule", "NoExecute"]), !bad(&["NoExecute"]))
}

fn tolerated(spec: &PodSpec, taint: &Taint) -> bool {
    spec.tolerations.iter().flatten().any(|t| {
        let effect = t.effect.as_deref().unwrap_or_default();
        let key = t.key.as_deref().unwrap_or_default();
        (effect.is_empty() || effect == taint.effect)
            && (key.is_empty() || key == taint.key)
            && match t.operator.as_deref() {
                Some("Exists") => true,
                _ => {
                    !key.is_empty()
                        && t.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
                }
            }
    })
}

fn selected(spec: &PodSpec, node: &Node) -> bool {
    let name = name_of(node);
    if spec.node_name.as_deref().is_some_and(|n| !n.is_empty() && n != name) {
        return false;
    }
    let empty = Default::default();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    if spec
        .node_selector
        .iter()
        .flatten()
        .any(|(k, v)| labels.get(k) != Some(v))
    {
        return false;
    }
    let required = spec
        .affinity
        .as_ref()
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    let Some(required) = required else { return true };
    let term = |t: &NodeSelectorTerm| {
        let empty =
            t.match_expressions.iter().flatten().next().is_none() && t.match_fields.iter().flatten().next().is_none();
        !empty
            && all(t.match_expressions.as_deref(), &|key| labels.get(key).cloned())
            && all(t.match_fields.as_deref(), &|key| {
                (key == "metadata.name").then(|| name.to_owned())
            })
    };
    required.node_selector_terms.iter().any(term)
}

fn all(requirements: Option<&[NodeSelectorRequirement]>, value: &dyn Fn(&str) -> Option<String>) -> bool {
    requirements.into_iter().flatten().all(|r| {
        let found = value(&r.key);
        let values: Vec<&str> = r.values.iter().flatten().map(String::as_str).collect();
        let number = |text: Option<&str>| text.and_then(|t| t.parse::<i64>().ok());
        match r.operator.as_str() {
            "Gt" | "Lt" => match (number(found.as_deref()), number(values.first().copied())) {
                (Some(a), Some(b)) => (r.operator == "Gt" && a > b) || (r.operator == "Lt" && a < b),
                _ => false,
            },
            // The rest means the same as with labels.
            _ => {
                let expression = json!({"matchExpressions": [{"key": "k", "operator": r.operator, "values": values}]});
                let map: std::collections::BTreeMap<String, String> =
                    found.map(|v| ("k".to_owned(), v)).into_iter().collect();
                LabelSelector::from_object(&expression).is_ok_and(|s| s.matches(&map))
            }
        }
    })
}

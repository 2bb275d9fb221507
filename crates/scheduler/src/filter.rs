//! What rules a node out, in upstream's order and words.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use k8s_openapi::api::core::v1::Taint;

use crate::cache::{Cache, NodeState};
use crate::model::{PodInfo, PodTerm, Spread};

const UNSCHEDULABLE_TAINT: &str = "node.kubernetes.io/unschedulable";
const NOT_READY_TAINT: &str = "node.kubernetes.io/not-ready";

/// What is the same for every node while one pod is placed: where matching pods are.
#[derive(Debug, Default)]
pub struct Prepared<'a> {
    /// Per required affinity term: places with a matching pod.
    affinity: Vec<(&'a PodTerm, BTreeSet<&'a str>)>,
    /// No pod anywhere matches, and the pod matches its own terms: it may be the first.
    first_of_group: bool,
    /// Places the pod's own anti-affinity rules out.
    repelled: BTreeSet<(&'a str, &'a str)>,
    /// Places that pods already there keep it from.
    refused: BTreeSet<(&'a str, &'a str)>,
    /// Per hard spread constraint: matching pods per place, and the smallest count.
    spread: Vec<(&'a Spread, HashMap<&'a str, i64>, i64)>,
}

impl<'a> Prepared<'a> {
    /// Counts matching pods; looks at every placed pod only if the pod has rules about other pods.
    pub fn new(cache: &'a Cache, pod: &'a PodInfo) -> Self {
        let mut out = Self::default();
        for (node, other) in cache.repelling() {
            for term in &other.anti_affinity {
                if let Some((key, value)) = node.info.labels.get_key_value(&term.topology_key)
                    && term.selects(pod, cache.namespaces())
                {
                    out.refused.insert((key, value));
                }
            }
        }
        let places = |term: &'a PodTerm| {
            cache
                .nodes()
                .filter_map(|node| {
                    let place = node.info.labels.get_key_value(&term.topology_key)?;
                    node.pods
                        .values()
                        .any(|p| term.selects(p, cache.namespaces()))
                        .then_some(place)
                })
                .map(|(key, value)| (key.as_str(), value.as_str()))
                .collect::<BTreeSet<_>>()
        };
        for term in &pod.affinity {
            out.affinity
                .push((term, places(term).into_iter().map(|(_, value)| value).collect()));
        }
        out.first_of_group = !pod.affinity.is_empty()
            && out
                .affinity
                .iter()
                .all(|(term, places)| places.is_empty() && term.selects(pod, cache.namespaces()));
        for term in &pod.anti_affinity {
            out.repelled.extend(places(term));
        }
        for constraint in pod.spread.iter().filter(|c| c.hard) {
            let counts = count(cache, pod, constraint);
            let fewest = if (counts.len() as i64) < constraint.min_domains {
                0
            } else {
                counts.values().copied().min().unwrap_or_default()
            };
            out.spread.push((constraint, counts, fewest));
        }
        out
    }
}

/// Matching pods per place, over the nodes the pod may run on by its node selector and affinity.
pub(crate) fn count<'a>(cache: &'a Cache, pod: &PodInfo, constraint: &Spread) -> HashMap<&'a str, i64> {
    let mut counts: HashMap<&str, i64> = HashMap::new();
    for node in cache.nodes().filter(|n| node_affinity(pod, n)) {
        if let Some(place) = node.info.labels.get(&constraint.topology_key) {
            let here = node
                .pods
                .values()
                .filter(|p| p.key.ns == pod.key.ns && !p.deleting && constraint.selector.matches(&p.labels))
                .count();
            *counts.entry(place).or_default() += here as i64;
        }
    }
    counts
}

/// Why the node cannot take the pod; empty if it can. More than one reason only for resources.
pub fn reasons(node: &NodeState, pod: &PodInfo, prepared: &Prepared<'_>) -> Vec<String> {
    let one = |reason: &str| vec![reason.to_owned()];
    let blocking = |key: &str| Taint {
        key: key.to_owned(),
        effect: "NoSchedule".to_owned(),
        ..Taint::default()
    };
    if node.info.unschedulable && !pod.tolerates(&blocking(UNSCHEDULABLE_TAINT)) {
        return one("node(s) were unschedulable");
    }
    if let Some(taint) = node
        .info
        .taints
        .iter()
        .find(|t| matches!(t.effect.as_str(), "NoSchedule" | "NoExecute") && !pod.tolerates(t))
    {
        let value = taint.value.as_deref().unwrap_or_default();
        return vec![format!("node(s) had untolerated taint {{{}: {value}}}", taint.key)];
    }
    if node.info.not_ready && !pod.tolerates(&blocking(NOT_READY_TAINT)) {
        return one("node(s) were not ready");
    }
    if !node_affinity(pod, node) {
        return one("node(s) didn't match Pod's node affinity/selector");
    }
    if pod
        .ports
        .iter()
        .any(|p| node.pods.values().flat_map(|o| &o.ports).any(|o| o.conflicts(p)))
    {
        return one("node(s) didn't have free ports for the requested pod ports");
    }
    let short = shortages(node, pod);
    if !short.is_empty() {
        return short;
    }
    for (constraint, counts, fewest) in &prepared.spread {
        let Some(place) = node.info.labels.get(&constraint.topology_key) else {
            return one("node(s) didn't match pod topology spread constraints (missing required label)");
        };
        let own = i64::from(constraint.selector.matches(&pod.labels));
        let here = counts.get(place.as_str()).copied().unwrap_or_default();
        if here + own - fewest > constraint.max_skew {
            return one("node(s) didn't match pod topology spread constraints");
        }
    }
    let in_any = |places: &BTreeSet<(&str, &str)>| {
        !places.is_empty()
            && places
                .iter()
                .any(|(key, value)| node.info.labels.get(*key).is_some_and(|v| v == value))
    };
    let together = prepared.affinity.iter().all(|(term, places)| {
        node.info
            .labels
            .get(&term.topology_key)
            .is_some_and(|place| prepared.first_of_group || places.contains(place.as_str()))
    });
    if !together {
        return one("node(s) didn't match pod affinity rules");
    }
    if in_any(&prepared.repelled) {
        return one("node(s) didn't match pod anti-affinity rules");
    }
    if in_any(&prepared.refused) {
        return one("node(s) didn't satisfy existing pods anti-affinity rules");
    }
    Vec::new()
}

/// `nodeSelector` and required node affinity.
pub fn node_affinity(pod: &PodInfo, node: &NodeState) -> bool {
    pod.node_selector
        .iter()
        .all(|(k, v)| node.info.labels.get(k) == Some(v))
        && pod
            .node_required
            .as_ref()
            .is_none_or(|terms| terms.iter().any(|t| t.matches(&node.info)))
}

fn shortages(node: &NodeState, pod: &PodInfo) -> Vec<String> {
    let mut out = Vec::new();
    if node.pods.len() as i64 + 1 > node.info.pods_max {
        out.push("Too many pods".to_owned());
    }
    let (want, have, used) = (&pod.requests, &node.info.allocatable, &node.requested);
    let mut check = |name: &str, want: i64, have: i64, used: i64| {
        if want > 0 && want > have - used {
            out.push(format!("Insufficient {name}"));
        }
    };
    check("cpu", want.cpu_milli, have.cpu_milli, used.cpu_milli);
    check("memory", want.memory_bytes, have.memory_bytes, used.memory_bytes);
    check(
        "ephemeral-storage",
        want.ephemeral_bytes,
        have.ephemeral_bytes,
        used.ephemeral_bytes,
    );
    for (name, want) in &want.other {
        let of = |list: &BTreeMap<String, i64>| list.get(name).copied().unwrap_or_default();
        check(name, *want, of(&have.other), of(&used.other));
    }
    out
}

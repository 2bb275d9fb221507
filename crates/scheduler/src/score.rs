//! Which of the nodes that can take a pod is best. Each part gives 0 to 100 after normalization; weights are upstream's
//! defaults.

use std::collections::HashMap;

use crate::cache::{Cache, NodeState};
use crate::filter::count;
use crate::model::PodInfo;

const MAX: i64 = 100;
const WEIGHT_TAINTS: i64 = 3;
const WEIGHT_NODE_AFFINITY: i64 = 2;
const WEIGHT_SPREAD: i64 = 2;
const WEIGHT_POD_AFFINITY: i64 = 2;
const HOSTNAME: &str = "kubernetes.io/hostname";
const ZONE: &str = "topology.kubernetes.io/zone";

/// Total score per candidate, in the order given.
pub fn scores(cache: &Cache, pod: &PodInfo, candidates: &[&NodeState]) -> Vec<i64> {
    let mut totals: Vec<i64> = candidates
        .iter()
        .map(|n| least_allocated(n, pod) + balanced(n, pod))
        .collect();
    let mut add = |weight: i64, values: Vec<i64>| {
        for (total, value) in totals.iter_mut().zip(values) {
            *total += weight * value;
        }
    };
    let disliked = |n: &&NodeState| {
        n.info
            .taints
            .iter()
            .filter(|t| t.effect == "PreferNoSchedule" && !pod.tolerates(t))
            .count() as i64
    };
    add(
        WEIGHT_TAINTS,
        fewer_is_better(candidates.iter().map(disliked).collect()),
    );
    if !pod.node_preferred.is_empty() {
        let liked = |n: &&NodeState| {
            pod.node_preferred
                .iter()
                .filter(|(_, term)| term.matches(&n.info))
                .map(|(weight, _)| weight)
                .sum()
        };
        add(
            WEIGHT_NODE_AFFINITY,
            more_is_better(candidates.iter().map(liked).collect()),
        );
    }
    if let Some(counts) = spread(cache, pod, candidates) {
        add(WEIGHT_SPREAD, spread_out(counts));
    }
    if !pod.pod_preferred.is_empty() {
        add(WEIGHT_POD_AFFINITY, between(pod_affinity(cache, pod, candidates)));
    }
    totals
}

/// Share of cpu and memory that would be left, as a mean.
fn least_allocated(node: &NodeState, pod: &PodInfo) -> i64 {
    let left = |have: i64, used: i64, want: i64| {
        if have <= 0 {
            0
        } else {
            (have - used - want).max(0) * MAX / have
        }
    };
    let (cpu, memory) = (node.info.allocatable.cpu_milli, node.info.allocatable.memory_bytes);
    (left(cpu, node.scored.0, pod.score_requests.0) + left(memory, node.scored.1, pod.score_requests.1)) / 2
}

/// How alike the used shares of cpu and memory would be.
fn balanced(node: &NodeState, pod: &PodInfo) -> i64 {
    let share = |have: i64, used: i64, want: i64| {
        if have <= 0 {
            1.0
        } else {
            ((used + want) as f64 / have as f64).min(1.0)
        }
    };
    let (have, used, want) = (&node.info.allocatable, &node.requested, &pod.requests);
    let cpu = share(have.cpu_milli, used.cpu_milli, want.cpu_milli);
    let memory = share(have.memory_bytes, used.memory_bytes, want.memory_bytes);
    ((1.0 - (cpu - memory).abs() / 2.0) * MAX as f64) as i64
}

/// Matching pods at each candidate's places. Without constraints of its own, a pod is spread from the others of its
/// controller over hosts first and zones second.
fn spread(cache: &Cache, pod: &PodInfo, candidates: &[&NodeState]) -> Option<Vec<f64>> {
    if pod.spread.is_empty() {
        let owner = pod.owner.as_ref()?;
        let here = |n: &NodeState| n.owners.get(owner).copied().unwrap_or_default();
        let mut zones: HashMap<&str, i64> = HashMap::new();
        for node in cache.nodes() {
            if let Some(zone) = node.info.labels.get(ZONE) {
                *zones.entry(zone).or_default() += here(node);
            }
        }
        let zone = |n: &NodeState| n.info.labels.get(ZONE).and_then(|z| zones.get(z.as_str())).copied();
        return Some(
            candidates
                .iter()
                .map(|n| here(n) as f64 + zone(n).unwrap_or_default() as f64 * 0.5)
                .collect(),
        );
    }
    let mut totals = vec![0.0; candidates.len()];
    let mut any = false;
    for constraint in pod.spread.iter().filter(|c| !c.hard) {
        any = true;
        let counts = count(cache, pod, constraint);
        // Many small places must not outweigh few large ones.
        let weight = if constraint.topology_key == HOSTNAME {
            1.0
        } else {
            ((counts.len() + 2) as f64).ln()
        };
        // A node without the label is the worst place.
        let worst = counts.values().copied().max().unwrap_or_default() + constraint.max_skew;
        for (total, node) in totals.iter_mut().zip(candidates) {
            let place = node.info.labels.get(&constraint.topology_key);
            let here = place.map_or(worst, |p| counts.get(p.as_str()).copied().unwrap_or_default());
            *total += here as f64 * weight;
        }
    }
    any.then_some(totals)
}

fn pod_affinity(cache: &Cache, pod: &PodInfo, candidates: &[&NodeState]) -> Vec<i64> {
    let mut totals = vec![0; candidates.len()];
    for (weight, term) in &pod.pod_preferred {
        let mut counts: HashMap<&str, i64> = HashMap::new();
        for node in cache.nodes() {
            if let Some(place) = node.info.labels.get(&term.topology_key) {
                let here = node
                    .pods
                    .values()
                    .filter(|p| term.selects(p, cache.namespaces()))
                    .count();
                *counts.entry(place).or_default() += here as i64;
            }
        }
        for (total, node) in totals.iter_mut().zip(candidates) {
            let place = node.info.labels.get(&term.topology_key);
            *total += weight * place.and_then(|p| counts.get(p.as_str())).copied().unwrap_or_default();
        }
    }
    totals
}

fn more_is_better(values: Vec<i64>) -> Vec<i64> {
    let max = values.iter().copied().max().unwrap_or_default();
    values
        .into_iter()
        .map(|v| if max == 0 { 0 } else { v * MAX / max })
        .collect()
}

fn fewer_is_better(values: Vec<i64>) -> Vec<i64> {
    more_is_better(values).into_iter().map(|v| MAX - v).collect()
}

/// The least loaded place gets 100 and the most loaded 0, so that one pod's difference always counts.
fn spread_out(values: Vec<f64>) -> Vec<i64> {
    let (min, max) = values
        .iter()
        .fold((f64::MAX, 0.0f64), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
    values
        .into_iter()
        .map(|v| {
            if max <= min {
                MAX
            } else {
                ((max - v) / (max - min) * MAX as f64) as i64
            }
        })
        .collect()
}

/// Scales from the smallest to the largest, which may be negative.
fn between(values: Vec<i64>) -> Vec<i64> {
    let (min, max) = (
        values.iter().copied().min().unwrap_or_default(),
        values.iter().copied().max().unwrap_or_default(),
    );
    values
        .into_iter()
        .map(|v| if max == min { 0 } else { (v - min) * MAX / (max - min) })
        .collect()
}

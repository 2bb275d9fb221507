//! One placement decision: pure, over a [`Cache`] and a pod.

use std::collections::BTreeMap;

use crate::cache::{Cache, NodeState};
use crate::filter::{Prepared, reasons};
use crate::model::PodInfo;
use crate::score::scores;

/// On small clusters every node is looked at; on large ones the search ends after enough that fit.
const ENOUGH_MIN: usize = 100;

/// Where a pod goes, or why nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Bind to this node.
    Bind {
        /// Name of the node.
        node: String,
        /// Nodes looked at.
        looked_at: usize,
    },
    /// No node fits.
    Unschedulable {
        /// Upstream's sentence: how many nodes, and how many for which reason.
        message: String,
    },
}

/// Places one pod. Virtual nodes are taken only when no machine fits, so that a pod that tolerates both bursts last.
pub fn plan(cache: &Cache, pod: &PodInfo) -> Decision {
    let total = cache.nodes().count();
    if total == 0 {
        return Decision::Unschedulable {
            message: "no nodes available to schedule pods".to_owned(),
        };
    }
    let prepared = Prepared::new(cache, pod);
    let enough = enough(total);
    let mut why: BTreeMap<String, usize> = BTreeMap::new();
    let mut looked_at = 0;
    for virtual_pass in [false, true] {
        let mut fitting: Vec<&NodeState> = Vec::new();
        for node in cache.nodes_from_cursor().filter(|n| n.info.is_virtual == virtual_pass) {
            looked_at += 1;
            let reasons = reasons(node, pod, &prepared);
            if reasons.is_empty() {
                fitting.push(node);
                if fitting.len() >= enough {
                    break;
                }
            }
            for reason in reasons {
                *why.entry(reason).or_default() += 1;
            }
        }
        if let Some(node) = best(cache, pod, &fitting) {
            return Decision::Bind { node, looked_at };
        }
    }
    let mut parts: Vec<String> = why
        .into_iter()
        .map(|(reason, count)| format!("{count} {reason}"))
        .collect();
    parts.sort();
    Decision::Unschedulable {
        message: format!("0/{total} nodes are available: {}.", parts.join(", ")),
    }
}

/// How many fitting nodes are enough to choose from, as upstream: half of them at 100 nodes, less of more, at least 5 %.
fn enough(total: usize) -> usize {
    if total < ENOUGH_MIN {
        return total;
    }
    let percent = 50usize.saturating_sub(total / 125).max(5);
    (total * percent / 100).max(ENOUGH_MIN)
}

/// The highest score; among equals the fewest pods, then the first in search order.
fn best(cache: &Cache, pod: &PodInfo, fitting: &[&NodeState]) -> Option<String> {
    match fitting {
        [] => return None,
        [only] => return Some(only.info.name.clone()),
        _ => {}
    }
    let scores = scores(cache, pod, fitting);
    let mut chosen = 0;
    for i in 1..fitting.len() {
        let better = (scores[i], std::cmp::Reverse(fitting[i].pods.len()));
        if better > (scores[chosen], std::cmp::Reverse(fitting[chosen].pods.len())) {
            chosen = i;
        }
    }
    Some(fitting[chosen].info.name.clone())
}

//! What a DaemonSet needs next. Pure.
//!
//! # Source
//! `pkg/controller/daemon` of Kubernetes 1.36, without surge.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;

use super::fit;
use crate::common::{available_in, is_deleting, is_ready, name_of, phase};
use crate::history::HASH;

/// Pods made or deleted in one go.
const BURST: usize = 250;

/// The next step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// Names of nodes that need a pod.
    pub create: Vec<String>,
    /// Names of pods to delete.
    pub delete: Vec<String>,
    /// Names of pods that failed, among those to delete.
    pub failed: Vec<String>,
    pub status: DaemonSetStatus,
    pub requeue: Option<Duration>,
}

/// The node a pod of a DaemonSet is for: the one it is bound to, else the one its affinity names.
pub fn node_of(pod: &Pod) -> Option<&str> {
    let spec = pod.spec.as_ref()?;
    if let Some(bound) = spec.node_name.as_deref().filter(|n| !n.is_empty()) {
        return Some(bound);
    }
    let affinity = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    let terms = &affinity
        .required_during_scheduling_ignored_during_execution
        .as_ref()?
        .node_selector_terms;
    let field = terms
        .iter()
        .flat_map(|t| t.match_fields.iter().flatten())
        .find(|f| f.key == "metadata.name")?;
    field.values.as_ref()?.first().map(String::as_str)
}

/// Plans for `set` at template `hash` over its own pods and all nodes.
pub fn plan(set: &DaemonSet, hash: &str, pods: &[Arc<Pod>], nodes: &[Arc<Node>], now: Timestamp) -> Plan {
    let spec = set.spec.clone().unwrap_or_default();
    let mut template = spec.template.spec.clone().unwrap_or_default();
    fit::tolerate(&mut template);
    let mut by_node: BTreeMap<&str, Vec<&Arc<Pod>>> = BTreeMap::new();
    for pod in pods {
        if let Some(node) = node_of(pod) {
            by_node.entry(node).or_default().push(pod);
        }
    }
    let min_ready_s = spec.min_ready_seconds.unwrap_or_default();
    let mut plan = Plan::default();
    let mut status = DaemonSetStatus {
        observed_generation: set.metadata.generation,
        collision_count: set.status.as_ref().and_then(|s| s.collision_count),
        conditions: set.status.as_ref().and_then(|s| s.conditions.clone()),
        ..DaemonSetStatus::default()
    };
    let (mut available, mut updated) = (0, 0);
    let mut old: Vec<(bool, &Arc<Pod>)> = Vec::new();
    // Nodes where a pod is on its way out or not yet available.
    let mut unavailable = 0;
    let mut names: Vec<&Arc<Node>> = nodes.iter().collect();
    names.sort_by_key(|n| name_of(&***n).to_owned());
    for node in names {
        let name = name_of(&**node);
        let here = by_node.remove(name).unwrap_or_default();
        let (run, stay) = fit::fits(&template, node);
        let live: Vec<&Arc<Pod>> = here.iter().copied().filter(|p| !is_deleting(&***p)).collect();
        if !run {
            if !live.is_empty() {
                status.number_misscheduled += 1;
                if !stay {
                    plan.delete.extend(live.iter().map(|p| name_of(&***p).to_owned()));
                }
            }
            continue;
        }
        status.desired_number_scheduled += 1;
        let (failed, running): (Vec<&Arc<Pod>>, Vec<&Arc<Pod>>) = live
            .into_iter()
            .partition(|p| matches!(phase(p), "Failed" | "Succeeded"));
        for pod in failed {
            plan.failed.push(name_of(&**pod).to_owned());
            plan.delete.push(name_of(&**pod).to_owned());
        }
        let mut running = running;
        running.sort_by_key(|p| {
            (
                !is_ready(p),
                p.metadata.creation_timestamp.clone(),
                name_of(&***p).to_owned(),
            )
        });
        plan.delete
            .extend(running.iter().skip(1).map(|p| name_of(&***p).to_owned()));
        let Some(pod) = running.first() else {
            unavailable += 1;
            // While one is going, its successor waits.
            if here.is_empty() {
                plan.create.push(name.to_owned());
            }
            continue;
        };
        status.current_number_scheduled += 1;
        let is_available = match available_in(pod, min_ready_s, now) {
            Some(Duration::ZERO) => true,
            Some(wait) => {
                plan.requeue = Some(plan.requeue.map_or(wait, |r| r.min(wait)));
                false
            }
            None => false,
        };
        status.number_ready += i32::from(is_ready(pod));
        available += i32::from(is_available);
        unavailable += i32::from(!is_available);
        let current = pod
            .metadata
            .labels
            .as_ref()
            .and_then(|l| l.get(HASH))
            .map(String::as_str)
            == Some(hash);
        if current {
            updated += 1;
        } else {
            old.push((is_available, pod));
        }
    }
    // Nodes that are gone: the pods bound there are the pod collector's, those that were to be bound go now.
    for pod in by_node.into_values().flatten() {
        let bound = pod
            .spec
            .as_ref()
            .and_then(|s| s.node_name.as_deref())
            .is_some_and(|n| !n.is_empty());
        if !bound && !is_deleting(&**pod) {
            plan.delete.push(name_of(&**pod).to_owned());
        }
    }
    roll(
        &mut plan,
        &spec.update_strategy.unwrap_or_default(),
        old,
        unavailable,
        status.desired_number_scheduled,
    );
    status.number_available = Some(available);
    status.number_unavailable = Some((status.desired_number_scheduled - available).max(0));
    status.updated_number_scheduled = Some(updated);
    plan.status = status;
    plan.create.truncate(BURST);
    plan.delete.truncate(BURST);
    if is_deleting(set) {
        plan.create.clear();
    }
    plan
}

/// Deletes pods of old templates: those that are not available at once, others as far as the strategy lets.
fn roll(
    plan: &mut Plan,
    strategy: &k8s_openapi::api::apps::v1::DaemonSetUpdateStrategy,
    old: Vec<(bool, &Arc<Pod>)>,
    unavailable: i32,
    desired: i32,
) {
    if strategy.type_.as_deref() == Some("OnDelete") {
        return;
    }
    let wire = strategy.rolling_update.as_ref().and_then(|r| r.max_unavailable.clone());
    let most = match wire.unwrap_or(IntOrString::Int(1)) {
        IntOrString::Int(n) => n,
        // Rounded up, and at least one, or nothing would ever be replaced.
        IntOrString::String(text) => {
            let percent: i32 = text.trim_end_matches('%').parse().unwrap_or_default();
            (desired * percent + 99) / 100
        }
    }
    .max(1);
    let mut room = (most - unavailable).max(0);
    for (is_available, pod) in old {
        if !is_available {
            plan.delete.push(name_of(&**pod).to_owned());
        } else if room > 0 {
            room -= 1;
            plan.delete.push(name_of(&**pod).to_owned());
        }
    }
}

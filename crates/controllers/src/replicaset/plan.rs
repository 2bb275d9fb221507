//! What a ReplicaSet needs next. Pure.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::common::{available_in, is_active, is_deleting, is_ready, is_terminal, name_of, phase, selector, uid_of};

/// Pods made or deleted in one go.
pub const BURST: usize = 500;
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// The next step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// Names of pods to take over.
    pub adopt: Vec<String>,
    /// Names of pods to let go: ours, but no longer selected.
    pub release: Vec<String>,
    /// How many pods to make.
    pub create: usize,
    /// Names of pods to delete, most expendable first.
    pub delete: Vec<String>,
    /// What the status should say.
    pub status: ReplicaSetStatus,
    /// When a ready pod becomes available without any event.
    pub requeue: Option<Duration>,
}

/// Plans for `rs` over the pods that are its own or that it may adopt. `related` counts the pods of the same workload
/// per node, for the choice of whom to delete.
pub fn plan(rs: &ReplicaSet, pods: &[Arc<Pod>], related: &HashMap<String, usize>, now: Timestamp) -> Plan {
    let spec = rs.spec.as_ref();
    let wanted = spec.and_then(|s| s.replicas).unwrap_or(1).max(0) as usize;
    let min_ready_s = spec.and_then(|s| s.min_ready_seconds).unwrap_or_default();
    let selector = selector(spec.map(|s| &s.selector));
    let mut plan = Plan::default();
    let mut own: Vec<&Arc<Pod>> = Vec::new();
    for pod in pods {
        let selected = selector.matches(&pod.metadata.labels);
        let controller = pod
            .metadata
            .owner_references
            .iter()
            .flatten()
            .find(|o| o.controller == Some(true));
        match controller {
            Some(owner) if owner.uid != uid_of(rs) => {}
            Some(_) if selected => own.push(pod),
            Some(_) if is_deleting(rs) || is_deleting(&**pod) => {}
            Some(_) => plan.release.push(name_of(&**pod).to_owned()),
            None if selected && is_active(pod) && !is_deleting(rs) => plan.adopt.push(name_of(&**pod).to_owned()),
            None => {}
        }
    }
    let active: Vec<&Arc<Pod>> = own.iter().copied().filter(|p| is_active(p)).collect();
    plan.status = status(rs, &own, &active, min_ready_s, now, &mut plan.requeue);
    // Adoption comes first: what is adopted need not be made.
    if is_deleting(rs) || !plan.adopt.is_empty() {
        return plan;
    }
    match active.len().cmp(&wanted) {
        Ordering::Less => plan.create = (wanted - active.len()).min(BURST),
        Ordering::Greater => {
            let surplus = (active.len() - wanted).min(BURST);
            let active = by_expendability(active, related);
            plan.delete = active[..surplus].iter().map(|p| name_of(&***p).to_owned()).collect();
        }
        Ordering::Equal => {}
    }
    plan
}

fn status(
    rs: &ReplicaSet,
    own: &[&Arc<Pod>],
    active: &[&Arc<Pod>],
    min_ready_s: i32,
    now: Timestamp,
    requeue: &mut Option<Duration>,
) -> ReplicaSetStatus {
    let spec = rs.spec.as_ref();
    let template = spec
        .and_then(|s| s.template.as_ref()?.metadata.as_ref()?.labels.clone())
        .unwrap_or_default();
    let fully = |p: &&&Arc<Pod>| {
        template
            .iter()
            .all(|(k, v)| p.metadata.labels.as_ref().and_then(|l| l.get(k)) == Some(v))
    };
    let mut available = 0;
    for pod in active {
        match available_in(pod, min_ready_s, now) {
            Some(Duration::ZERO) => available += 1,
            Some(wait) => *requeue = Some(requeue.map_or(wait, |r| r.min(wait))),
            None => {}
        }
    }
    let terminating = own.iter().filter(|p| is_deleting(&****p) && !is_terminal(p)).count() as i32;
    ReplicaSetStatus {
        replicas: active.len() as i32,
        fully_labeled_replicas: Some(active.iter().filter(fully).count() as i32),
        ready_replicas: Some(active.iter().filter(|p| is_ready(p)).count() as i32),
        available_replicas: Some(available),
        terminating_replicas: Some(terminating),
        observed_generation: rs.metadata.generation,
        conditions: rs.status.as_ref().and_then(|s| s.conditions.clone()),
    }
}

/// Sets or clears the ReplicaFailure condition.
pub fn set_failure(status: &mut ReplicaSetStatus, failure: Option<(&str, String)>, now: Timestamp) {
    const KIND: &str = "ReplicaFailure";
    let conditions = status.conditions.get_or_insert_default();
    match failure {
        Some((reason, message)) => {
            let same = conditions
                .iter()
                .any(|c| c.type_ == KIND && c.reason.as_deref() == Some(reason) && c.status == "True");
            if !same {
                conditions.retain(|c| c.type_ != KIND);
                conditions.push(ReplicaSetCondition {
                    type_: KIND.to_owned(),
                    status: "True".to_owned(),
                    reason: Some(reason.to_owned()),
                    message: Some(message),
                    last_transition_time: Some(Time(now)),
                });
            }
        }
        None => conditions.retain(|c| c.type_ != KIND),
    }
    if conditions.is_empty() {
        status.conditions = None;
    }
}

/// Orders pods for deletion. Upstream ranks by how many related pods the node had at the start; here each pod taken
/// lowers its node's rank, so that what remains stays spread.
fn by_expendability<'a>(mut pods: Vec<&'a Arc<Pod>>, related: &HashMap<String, usize>) -> Vec<&'a Arc<Pod>> {
    pods.sort_by(|a, b| expendable_first((a, 0), (b, 0)));
    let mut taken: HashMap<String, usize> = HashMap::new();
    let mut ranked: Vec<(&Arc<Pod>, usize)> = Vec::with_capacity(pods.len());
    for pod in pods {
        let node = node_of(pod);
        let crowd = related.get(&node).copied().unwrap_or_default();
        let before = taken.entry(node).or_default();
        ranked.push((pod, crowd.saturating_sub(*before)));
        *before += 1;
    }
    ranked.sort_by(|a, b| expendable_first((a.0, a.1), (b.0, b.1)));
    ranked.into_iter().map(|(pod, _)| pod).collect()
}

fn node_of(pod: &Pod) -> String {
    pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default()
}

/// Upstream's order: not bound, not running, not ready, cheap by annotation, crowded node, shortly ready, restarting,
/// young.
fn expendable_first((a, crowd_a): (&Pod, usize), (b, crowd_b): (&Pod, usize)) -> Ordering {
    let node = node_of;
    let rank = |p: &Pod| match phase(p) {
        "Running" => 2,
        "Unknown" => 1,
        _ => 0,
    };
    let cost = |p: &Pod| {
        let text = p.metadata.annotations.as_ref().and_then(|a| a.get(DELETION_COST));
        text.and_then(|t| t.parse::<i32>().ok()).unwrap_or_default()
    };
    let ready_at = |p: &Pod| crate::common::pod_condition(p, "Ready").and_then(|c| c.last_transition_time.clone());
    let restarts = |p: &Pod| {
        let all = p.status.as_ref().and_then(|s| s.container_statuses.as_ref());
        all.into_iter()
            .flatten()
            .map(|c| c.restart_count)
            .max()
            .unwrap_or_default()
    };
    let created = |p: &Pod| p.metadata.creation_timestamp.clone();
    node(a)
        .is_empty()
        .cmp(&node(b).is_empty())
        .reverse()
        .then_with(|| rank(a).cmp(&rank(b)))
        .then_with(|| is_ready(a).cmp(&is_ready(b)))
        .then_with(|| cost(a).cmp(&cost(b)))
        .then_with(|| crowd_b.cmp(&crowd_a))
        .then_with(|| {
            if is_ready(a) && is_ready(b) {
                ready_at(b).cmp(&ready_at(a))
            } else {
                Ordering::Equal
            }
        })
        .then_with(|| restarts(b).cmp(&restarts(a)))
        .then_with(|| created(b).cmp(&created(a)))
        .then_with(|| name_of(a).cmp(name_of(b)))
}

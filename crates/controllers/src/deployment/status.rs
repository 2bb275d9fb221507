//! What a Deployment's status says, conditions included. Pure.

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::common::name_of;

pub const PROGRESSING: &str = "Progressing";
pub const AVAILABLE: &str = "Available";
pub const REPLICA_FAILURE: &str = "ReplicaFailure";
pub const NEW_SET_AVAILABLE: &str = "NewReplicaSetAvailable";

/// One condition of a status.
pub fn condition<'a>(status: Option<&'a DeploymentStatus>, kind: &str) -> Option<&'a DeploymentCondition> {
    status?.conditions.as_ref()?.iter().find(|c| c.type_ == kind)
}

/// Sets a condition. The transition time moves only when the status value changes; an equal condition is left alone.
pub fn set_condition(
    status: &mut DeploymentStatus,
    kind: &str,
    value: bool,
    reason: &str,
    message: String,
    now: Timestamp,
) {
    let value = if value { "True" } else { "False" };
    let conditions = status.conditions.get_or_insert_default();
    let old = conditions.iter_mut().find(|c| c.type_ == kind);
    if let Some(old) = &old
        && old.status == value
        && old.reason.as_deref() == Some(reason)
    {
        return;
    }
    let same = old.as_ref().filter(|o| o.status == value);
    let since = same.and_then(|o| o.last_transition_time.clone()).unwrap_or(Time(now));
    let fresh = DeploymentCondition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(since),
    };
    // In place: a changed order would be a changed status.
    match old {
        Some(old) => *old = fresh,
        None => conditions.push(fresh),
    }
}

fn remove_condition(status: &mut DeploymentStatus, kind: &str) {
    if let Some(conditions) = &mut status.conditions {
        conditions.retain(|c| c.type_ != kind);
    }
}

/// Counts over all ReplicaSets; conditions are carried over from the Deployment.
pub fn counts(
    d: &Deployment,
    new: Option<&ReplicaSet>,
    all: &[&ReplicaSet],
    unavailable_max: i32,
    now: Timestamp,
) -> DeploymentStatus {
    let sum = |f: fn(&ReplicaSet) -> i32| all.iter().map(|rs| f(rs)).sum::<i32>();
    let available = sum(|rs| {
        rs.status
            .as_ref()
            .and_then(|s| s.available_replicas)
            .unwrap_or_default()
    });
    let wanted = sum(|rs| rs.spec.as_ref().and_then(|s| s.replicas).unwrap_or_default());
    let old = d.status.as_ref();
    let mut status = DeploymentStatus {
        observed_generation: d.metadata.generation,
        replicas: Some(sum(|rs| rs.status.as_ref().map_or(0, |s| s.replicas))),
        updated_replicas: Some(new.and_then(|rs| rs.status.as_ref()).map_or(0, |s| s.replicas)),
        ready_replicas: Some(sum(|rs| {
            rs.status.as_ref().and_then(|s| s.ready_replicas).unwrap_or_default()
        })),
        available_replicas: Some(available),
        unavailable_replicas: Some((wanted - available).max(0)),
        terminating_replicas: Some(sum(|rs| {
            rs.status
                .as_ref()
                .and_then(|s| s.terminating_replicas)
                .unwrap_or_default()
        })),
        collision_count: old.and_then(|s| s.collision_count),
        conditions: old.and_then(|s| s.conditions.clone()),
    };
    let replicas = d.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    if available >= replicas - unavailable_max {
        let text = "Deployment has minimum availability.".to_owned();
        set_condition(&mut status, AVAILABLE, true, "MinimumReplicasAvailable", text, now);
    } else {
        let text = "Deployment does not have minimum availability.".to_owned();
        set_condition(&mut status, AVAILABLE, false, "MinimumReplicasUnavailable", text, now);
    }
    status
}

/// All replicas are of the newest template and available, and no others run.
pub fn is_complete(d: &Deployment, status: &DeploymentStatus) -> bool {
    let replicas = d.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    status.updated_replicas == Some(replicas)
        && status.replicas == Some(replicas)
        && status.available_replicas == Some(replicas)
        && status.observed_generation >= d.metadata.generation
}

/// Adds what is known about progress: conditions Progressing and ReplicaFailure.
pub fn progress(
    d: &Deployment,
    status: &mut DeploymentStatus,
    new: Option<&ReplicaSet>,
    all: &[&ReplicaSet],
    now: Timestamp,
) {
    let deadline_s = d
        .spec
        .as_ref()
        .and_then(|s| s.progress_deadline_seconds)
        .filter(|s| *s != i32::MAX);
    let current = condition(Some(status), PROGRESSING).cloned();
    let was_complete = status.replicas == status.updated_replicas
        && current
            .as_ref()
            .is_some_and(|c| c.reason.as_deref() == Some(NEW_SET_AVAILABLE));
    if let Some(deadline_s) = deadline_s
        && !was_complete
    {
        let what = match new {
            Some(rs) => format!("ReplicaSet \"{}\"", name_of(rs)),
            None => format!("Deployment \"{}\"", name_of(d)),
        };
        if is_complete(d, status) {
            let text = format!("{what} has successfully progressed.");
            set_condition(status, PROGRESSING, true, NEW_SET_AVAILABLE, text, now);
        } else if moved(d, status) {
            let text = format!("{what} is progressing.");
            set_condition(status, PROGRESSING, true, "ReplicaSetUpdated", text, now);
            // Unlike other conditions, this one's update time says when progress was last seen.
            if let Some(c) = status.conditions.iter_mut().flatten().find(|c| c.type_ == PROGRESSING) {
                c.last_update_time = Some(Time(now));
            }
        } else if timed_out(current.as_ref(), deadline_s, now) {
            let text = format!("{what} has timed out progressing.");
            set_condition(status, PROGRESSING, false, "ProgressDeadlineExceeded", text, now);
        }
    }
    let failure = new.into_iter().chain(all.iter().copied()).find_map(|rs| {
        rs.status
            .as_ref()?
            .conditions
            .as_ref()?
            .iter()
            .find(|c| c.type_ == REPLICA_FAILURE && c.status == "True")
    });
    match failure {
        Some(c) => {
            let (reason, message) = (
                c.reason.clone().unwrap_or_default(),
                c.message.clone().unwrap_or_default(),
            );
            set_condition(status, REPLICA_FAILURE, true, &reason, message, now);
        }
        None => remove_condition(status, REPLICA_FAILURE),
    }
}

/// Something went forward since the last status: more of the new, fewer of the old, more ready.
fn moved(d: &Deployment, new: &DeploymentStatus) -> bool {
    let old = d.status.clone().unwrap_or_default();
    let n = |v: Option<i32>| v.unwrap_or_default();
    let outdated = |s: &DeploymentStatus| n(s.replicas) - n(s.updated_replicas);
    n(new.updated_replicas) > n(old.updated_replicas)
        || outdated(new) < outdated(&old)
        || n(new.ready_replicas) > n(old.ready_replicas)
        || n(new.available_replicas) > n(old.available_replicas)
}

fn timed_out(progressing: Option<&DeploymentCondition>, deadline_s: i32, now: Timestamp) -> bool {
    let Some(c) = progressing else { return false };
    match c.reason.as_deref() {
        Some(NEW_SET_AVAILABLE | "DeploymentPaused") => false,
        Some("ProgressDeadlineExceeded") => true,
        _ => {
            let last = c.last_update_time.as_ref().map_or(now, |t| t.0);
            apimachinery::time::since(now, last).as_secs() >= deadline_s.max(0) as u64
        }
    }
}

/// Time left until a rollout that does not move has timed out.
pub fn time_left(d: &Deployment, status: &DeploymentStatus, now: Timestamp) -> Option<std::time::Duration> {
    let deadline_s = d.spec.as_ref()?.progress_deadline_seconds.filter(|s| *s != i32::MAX)?;
    let c = condition(Some(status), PROGRESSING)?;
    if is_complete(d, status)
        || matches!(
            c.reason.as_deref(),
            Some("ProgressDeadlineExceeded" | "DeploymentPaused" | NEW_SET_AVAILABLE)
        )
    {
        return None;
    }
    let passed = apimachinery::time::since(now, c.last_update_time.as_ref()?.0);
    // A second later than the deadline, because timestamps have whole seconds.
    Some(std::time::Duration::from_secs(deadline_s.max(0) as u64 + 1).saturating_sub(passed))
}

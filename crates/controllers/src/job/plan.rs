//! What a Job needs next. Pure.
//!
//! Ended pods are counted exactly once: a pod carries a finalizer; when it has ended, its uid goes into the status as
//! uncounted, then the finalizer goes, then the uid becomes part of a number. Whoever deletes pods in between loses nothing.
//!
//! # Source
//! `pkg/controller/job` of Kubernetes 1.36.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::batch::v1::{Job, JobCondition, JobStatus, PodFailurePolicyRule, UncountedTerminatedPods};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::indexes;
use crate::common::{is_deleting, is_ready, is_terminal, name_of, phase, uid_of};

/// Keeps an ended pod until it is counted.
pub const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
/// Annotation, and label, of a pod's index.
pub const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// Pods made or deleted in one go.
const BURST: usize = 500;
/// Ended pods counted in one go.
const COUNT_MAX: usize = 500;
/// Delay after the first failure; it doubles with each one that follows.
const BACKOFF: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_secs(600);

/// The next step. The status is written first, then finalizers go, then pods come or go.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    pub status: JobStatus,
    /// Names of ended pods that the status has counted.
    pub release: Vec<String>,
    /// Pods to make; with an index for Indexed Jobs.
    pub create: Vec<Option<i32>>,
    /// Names of pods to delete.
    pub delete: Vec<String>,
    pub requeue: Option<Duration>,
    /// Reason and text of an event, and whether it is a warning.
    pub events: Vec<(&'static str, String, bool)>,
    /// The Job is done for so long that it goes.
    pub remove: bool,
}

fn condition<'s>(status: &'s JobStatus, kind: &str) -> Option<&'s JobCondition> {
    status
        .conditions
        .iter()
        .flatten()
        .find(|c| c.type_ == kind && c.status == "True")
}

/// Complete or Failed.
pub fn is_finished(status: &JobStatus) -> bool {
    condition(status, "Complete").is_some() || condition(status, "Failed").is_some()
}

fn has_finalizer(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
}

/// The index of a pod of an Indexed Job.
pub fn index_of(pod: &Pod) -> Option<i32> {
    pod.metadata.annotations.as_ref()?.get(INDEX)?.parse().ok()
}

/// A pod that ended, or is made to end before it could succeed.
fn has_failed(pod: &Pod, job: &Job) -> bool {
    let only_ended = job.spec.as_ref().and_then(|s| s.pod_replacement_policy.as_deref()) == Some("Failed");
    phase(pod) == "Failed" || (!only_ended && is_deleting(pod) && phase(pod) != "Succeeded")
}

/// Plans for `job` over all pods that are its own.
pub fn plan(job: &Job, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let spec = job.spec.clone().unwrap_or_default();
    let indexed = spec.completion_mode.as_deref() == Some("Indexed");
    let mut plan = Plan {
        status: job.status.clone().unwrap_or_default(),
        ..Plan::default()
    };
    if is_finished(&plan.status) {
        release_counted(&mut plan, pods);
        expire(&mut plan, job, now);
        return plan;
    }
    let suspended = spec.suspend == Some(true);
    if !suspended && plan.status.start_time.is_none() {
        plan.status.start_time = Some(Time(now));
    }
    fold(&mut plan.status, pods);
    let mut verdict = condition(&plan.status, "FailureTarget").map(|c| {
        (
            c.reason.clone().unwrap_or_default(),
            c.message.clone().unwrap_or_default(),
        )
    });
    count(&mut plan, job, pods, indexed, &mut verdict);

    let active: Vec<&Arc<Pod>> = pods.iter().filter(|p| !is_terminal(p) && !is_deleting(&***p)).collect();
    let terminating = pods.iter().filter(|p| is_deleting(&***p) && !is_terminal(p)).count();
    let uncounted = plan.status.uncounted_terminated_pods.clone().unwrap_or_default();
    let waiting = |list: &Option<Vec<String>>| list.as_ref().map_or(0, Vec::len) as i32;
    let succeeded = match indexed {
        true => indexes::count(plan.status.completed_indexes.as_deref().unwrap_or_default()),
        false => plan.status.succeeded.unwrap_or_default() + waiting(&uncounted.succeeded),
    };
    let failed = plan.status.failed.unwrap_or_default() + waiting(&uncounted.failed);
    let limit = spec.backoff_limit.unwrap_or(6);
    if verdict.is_none() {
        verdict = failure(&spec, &plan.status, &active, failed, limit, now);
    }
    let complete = match spec.completions {
        Some(wanted) => succeeded >= wanted,
        None => succeeded > 0 && active.is_empty(),
    };
    let done = verdict.is_some() || complete;

    plan.status.active = Some(active.len() as i32);
    plan.status.ready = Some(active.iter().filter(|p| is_ready(p)).count() as i32);
    plan.status.terminating = Some(terminating as i32);
    if done {
        plan.delete = active.iter().map(|p| name_of(&***p).to_owned()).take(BURST).collect();
        finish(&mut plan, verdict, active.is_empty() && terminating == 0, now);
    } else {
        suspend(&mut plan, suspended, now);
        if suspended {
            plan.delete = active.iter().map(|p| name_of(&***p).to_owned()).take(BURST).collect();
        } else {
            if let Some(limit) = spec.active_deadline_seconds {
                let passed = plan
                    .status
                    .start_time
                    .as_ref()
                    .map_or(Duration::ZERO, |t| apimachinery::time::since(now, t.0));
                wake(
                    &mut plan,
                    Duration::from_secs(limit.max(0) as u64).saturating_sub(passed),
                );
            }
            if !is_deleting(job) {
                place(&mut plan, job, pods, &active, succeeded, indexed, terminating, now);
            }
        }
    }
    plan
}

fn wake(plan: &mut Plan, after: Duration) {
    plan.requeue = Some(plan.requeue.map_or(after, |r| r.min(after)));
}

/// Uncounted pods whose finalizer is gone become part of the numbers.
fn fold(status: &mut JobStatus, pods: &[Arc<Pod>]) {
    let Some(mut uncounted) = status.uncounted_terminated_pods.take() else {
        return;
    };
    let held: BTreeSet<&str> = pods.iter().filter(|p| has_finalizer(p)).map(|p| uid_of(&**p)).collect();
    for (list, number) in [
        (&mut uncounted.succeeded, &mut status.succeeded),
        (&mut uncounted.failed, &mut status.failed),
    ] {
        let Some(uids) = list else { continue };
        let before = uids.len();
        uids.retain(|uid| held.contains(uid.as_str()));
        *number = Some(number.unwrap_or_default() + (before - uids.len()) as i32);
        if uids.is_empty() {
            *list = None;
        }
    }
    if uncounted != UncountedTerminatedPods::default() {
        status.uncounted_terminated_pods = Some(uncounted);
    }
}

/// Takes ended pods into the uncounted ones, and plans the end of their finalizers.
fn count(plan: &mut Plan, job: &Job, pods: &[Arc<Pod>], indexed: bool, verdict: &mut Option<(String, String)>) {
    let mut uncounted = plan.status.uncounted_terminated_pods.take().unwrap_or_default();
    let mut completed = indexes::parse(plan.status.completed_indexes.as_deref().unwrap_or_default());
    let completions = job.spec.as_ref().and_then(|s| s.completions).unwrap_or_default();
    for pod in pods.iter().filter(|p| has_finalizer(p)) {
        let uid = uid_of(&**pod).to_owned();
        let known = |list: &Option<Vec<String>>| list.iter().flatten().any(|u| *u == uid);
        if known(&uncounted.succeeded) || known(&uncounted.failed) {
            plan.release.push(name_of(&**pod).to_owned());
            continue;
        }
        if plan.release.len() >= COUNT_MAX {
            break;
        }
        if phase(pod) == "Succeeded" {
            if indexed {
                // A second pod of an index that is done counts for nothing.
                match index_of(pod) {
                    Some(index) if index < completions && completed.insert(index) => {
                        uncounted.succeeded.get_or_insert_default().push(uid);
                    }
                    _ => {}
                }
            } else {
                uncounted.succeeded.get_or_insert_default().push(uid);
            }
        } else if has_failed(pod, job) {
            match judged(job, pod) {
                Judgement::Count => uncounted.failed.get_or_insert_default().push(uid),
                Judgement::Ignore => {}
                Judgement::FailJob(message) => {
                    verdict.get_or_insert(("PodFailurePolicy".to_owned(), message));
                    uncounted.failed.get_or_insert_default().push(uid);
                }
            }
        } else {
            continue;
        }
        plan.release.push(name_of(&**pod).to_owned());
    }
    if indexed {
        plan.status.completed_indexes = Some(indexes::print(&completed)).filter(|t| !t.is_empty());
    }
    if uncounted != UncountedTerminatedPods::default() {
        plan.status.uncounted_terminated_pods = Some(uncounted);
    }
}

fn release_counted(plan: &mut Plan, pods: &[Arc<Pod>]) {
    plan.release = pods
        .iter()
        .filter(|p| has_finalizer(p) && (is_terminal(p) || is_deleting(&***p)))
        .map(|p| name_of(&**p).to_owned())
        .collect();
}

/// What the Job's failure policy says of a failed pod.
enum Judgement {
    Count,
    Ignore,
    FailJob(String),
}

fn judged(job: &Job, pod: &Pod) -> Judgement {
    let policy = job.spec.as_ref().and_then(|s| s.pod_failure_policy.as_ref());
    let rules = policy.map(|p| p.rules.as_slice()).unwrap_or_default();
    for (i, rule) in rules.iter().enumerate() {
        let Some(what) = matches(rule, pod) else { continue };
        return match rule.action.as_str() {
            "Ignore" => Judgement::Ignore,
            "FailJob" => Judgement::FailJob(format!("{what} matching FailJob rule at index {i}")),
            _ => Judgement::Count,
        };
    }
    Judgement::Count
}

fn matches(rule: &PodFailurePolicyRule, pod: &Pod) -> Option<String> {
    let key = format!(
        "{}/{}",
        pod.metadata.namespace.as_deref().unwrap_or_default(),
        name_of(pod)
    );
    let status = pod.status.as_ref()?;
    if let Some(codes) = &rule.on_exit_codes {
        let all = status
            .init_container_statuses
            .iter()
            .chain(&status.container_statuses)
            .flatten();
        for container in all {
            let named = codes.container_name.as_ref().is_none_or(|n| *n == container.name);
            let Some(code) = exit_code(container).filter(|c| named && *c != 0) else {
                continue;
            };
            let listed = codes.values.contains(&code);
            if listed == (codes.operator == "In") {
                let name = &container.name;
                return Some(format!("Container {name} for pod {key} failed with exit code {code}"));
            }
        }
        return None;
    }
    for pattern in rule.on_pod_conditions.iter().flatten() {
        let found = status.conditions.iter().flatten().find(|c| c.type_ == pattern.type_);
        if found.is_some_and(|c| c.status == pattern.status.as_deref().unwrap_or("True")) {
            return Some(format!("Pod {key} has condition {}", pattern.type_));
        }
    }
    None
}

fn exit_code(container: &ContainerStatus) -> Option<i32> {
    Some(container.state.as_ref()?.terminated.as_ref()?.exit_code)
}

/// Why the Job has failed, if it has.
fn failure(
    spec: &k8s_openapi::api::batch::v1::JobSpec,
    status: &JobStatus,
    active: &[&Arc<Pod>],
    failed: i32,
    limit: i32,
    now: Timestamp,
) -> Option<(String, String)> {
    let on_failure = spec.template.spec.as_ref().and_then(|s| s.restart_policy.as_deref()) == Some("OnFailure");
    let restarts: i32 = active
        .iter()
        .filter_map(|p| p.status.as_ref())
        .flat_map(|s| s.init_container_statuses.iter().chain(&s.container_statuses).flatten())
        .map(|c| c.restart_count)
        .sum();
    let past = on_failure && if limit == 0 { restarts > 0 } else { restarts >= limit };
    if failed > limit || past {
        let text = "Job has reached the specified backoff limit";
        return Some(("BackoffLimitExceeded".to_owned(), text.to_owned()));
    }
    let deadline = spec.active_deadline_seconds.filter(|_| spec.suspend != Some(true))?;
    let started = status.start_time.as_ref()?.0;
    let passed = apimachinery::time::since(now, started);
    (passed >= Duration::from_secs(deadline.max(0) as u64)).then(|| {
        let text = "Job was active longer than specified deadline";
        ("DeadlineExceeded".to_owned(), text.to_owned())
    })
}

fn set(status: &mut JobStatus, kind: &str, value: &str, reason: &str, message: &str, now: Timestamp) -> bool {
    let conditions = status.conditions.get_or_insert_default();
    if conditions.iter().any(|c| c.type_ == kind && c.status == value) {
        return false;
    }
    conditions.retain(|c| c.type_ != kind);
    conditions.push(JobCondition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_probe_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    });
    true
}

/// First it is decided, then, when no pod is left to wait for, it is done.
fn finish(plan: &mut Plan, verdict: Option<(String, String)>, ended: bool, now: Timestamp) {
    const REACHED: (&str, &str) = ("CompletionsReached", "Reached expected number of succeeded pods");
    let (target, last, reason, message) = match &verdict {
        Some((reason, message)) => ("FailureTarget", "Failed", reason.as_str(), message.as_str()),
        None => ("SuccessCriteriaMet", "Complete", REACHED.0, REACHED.1),
    };
    set(&mut plan.status, target, "True", reason, message, now);
    if !ended || plan.status.uncounted_terminated_pods.is_some() {
        return;
    }
    if set(&mut plan.status, last, "True", reason, message, now) {
        match verdict {
            Some((reason, message)) => {
                let reason = match reason.as_str() {
                    "DeadlineExceeded" => "DeadlineExceeded",
                    "PodFailurePolicy" => "PodFailurePolicy",
                    _ => "BackoffLimitExceeded",
                };
                plan.events.push((reason, message, true));
            }
            None => {
                plan.status.completion_time = Some(Time(now));
                plan.events.push(("Completed", "Job completed".to_owned(), false));
            }
        }
    }
}

fn suspend(plan: &mut Plan, suspended: bool, now: Timestamp) {
    let was = condition(&plan.status, "Suspended").is_some();
    if suspended && !was {
        set(
            &mut plan.status,
            "Suspended",
            "True",
            "JobSuspended",
            "Job suspended",
            now,
        );
        plan.status.start_time = None;
        plan.events.push(("Suspended", "Job suspended".to_owned(), false));
    } else if !suspended && was {
        set(&mut plan.status, "Suspended", "False", "JobResumed", "Job resumed", now);
        plan.status.start_time = Some(Time(now));
        plan.events.push(("Resumed", "Job resumed".to_owned(), false));
    } else if suspended {
        plan.status.start_time = None;
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "one call site, and a struct would only rename the arguments"
)]
fn place(
    plan: &mut Plan,
    job: &Job,
    pods: &[Arc<Pod>],
    active: &[&Arc<Pod>],
    succeeded: i32,
    indexed: bool,
    terminating: usize,
    now: Timestamp,
) {
    let spec = job.spec.as_ref();
    let parallelism = spec.and_then(|s| s.parallelism).unwrap_or(1).max(0);
    let wanted = match spec.and_then(|s| s.completions) {
        None if succeeded > 0 => active.len() as i32,
        None => parallelism,
        Some(completions) => parallelism.min(completions - succeeded),
    };
    let wanted = wanted.max(0) as usize;
    if active.len() > wanted {
        let mut expendable: Vec<&&Arc<Pod>> = active.iter().collect();
        expendable.sort_by_key(|p| {
            let running = phase(p) == "Running";
            (
                running,
                is_ready(p),
                std::cmp::Reverse(index_of(p)),
                name_of(&****p).to_owned(),
            )
        });
        let surplus = (active.len() - wanted).min(BURST);
        plan.delete = expendable[..surplus]
            .iter()
            .map(|p| name_of(&****p).to_owned())
            .collect();
        return;
    }
    let waits = spec.and_then(|s| s.pod_replacement_policy.as_deref()) == Some("Failed");
    let present = active.len() + if waits { terminating } else { 0 };
    let missing = wanted.saturating_sub(present).min(BURST);
    if missing == 0 {
        return;
    }
    let delay = backoff(pods, job, now);
    if !delay.is_zero() {
        wake(plan, delay);
        return;
    }
    if !indexed {
        plan.create = vec![None; missing];
        return;
    }
    let mut taken = indexes::parse(plan.status.completed_indexes.as_deref().unwrap_or_default());
    let holding = pods
        .iter()
        .filter(|p| !is_terminal(p) && (waits || !is_deleting(&***p)));
    taken.extend(holding.filter_map(|p| index_of(p)));
    let completions = spec.and_then(|s| s.completions).unwrap_or_default();
    plan.create = (0..completions)
        .filter(|i| !taken.contains(i))
        .take(missing)
        .map(Some)
        .collect();
}

/// Time until a pod may be made after failures in a row.
fn backoff(pods: &[Arc<Pod>], job: &Job, now: Timestamp) -> Duration {
    let last_success = pods
        .iter()
        .filter(|p| phase(p) == "Succeeded")
        .map(|p| ended_at(p, now))
        .max();
    let failures: Vec<Timestamp> = pods
        .iter()
        .filter(|p| phase(p) == "Failed" && has_failed(p, job))
        .map(|p| ended_at(p, now))
        .filter(|at| last_success.is_none_or(|s| *at > s))
        .collect();
    let Some(last) = failures.iter().max() else {
        return Duration::ZERO;
    };
    let doublings = (failures.len() - 1).min(16) as u32;
    let delay = BACKOFF.saturating_mul(1 << doublings).min(BACKOFF_MAX);
    delay.saturating_sub(apimachinery::time::since(now, *last))
}

/// When the last container of an ended pod ended.
fn ended_at(pod: &Pod, now: Timestamp) -> Timestamp {
    let status = pod.status.as_ref();
    let containers = status.and_then(|s| s.container_statuses.as_ref()).into_iter().flatten();
    let finished = containers.filter_map(|c| c.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref());
    let created = pod.metadata.creation_timestamp.as_ref();
    finished.map(|t| t.0).max().or(created.map(|t| t.0)).unwrap_or(now)
}

fn expire(plan: &mut Plan, job: &Job, now: Timestamp) {
    let Some(ttl) = job.spec.as_ref().and_then(|s| s.ttl_seconds_after_finished) else {
        return;
    };
    let ended = condition(&plan.status, "Complete").or(condition(&plan.status, "Failed"));
    let since = ended.and_then(|c| c.last_transition_time.as_ref()).map_or(now, |t| t.0);
    let left = Duration::from_secs(ttl.max(0) as u64).saturating_sub(apimachinery::time::since(now, since));
    if left.is_zero() {
        plan.remove = !is_deleting(job);
    } else {
        wake(plan, left);
    }
}

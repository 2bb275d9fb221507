use std::sync::Arc;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::plan::*;

fn now() -> Timestamp {
    apimachinery::time::parse("2026-01-02T03:10:00Z").unwrap()
}

fn job(spec: Value, status: Value) -> Job {
    let mut spec = spec;
    spec["template"] = json!({"spec": {"containers": [], "restartPolicy": "Never"}});
    serde_json::from_value(
        json!({"metadata": {"name": "j", "namespace": "n", "uid": "u"}, "spec": spec, "status": status}),
    )
    .unwrap()
}

fn pod(name: &str, phase: &str, rest: Value) -> Arc<Pod> {
    let mut value = json!({"metadata": {"name": name, "namespace": "n", "uid": name, "finalizers": [FINALIZER]},
        "status": {"phase": phase, "containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": false,
            "restartCount": 0, "state": {"terminated": {"exitCode": 3, "finishedAt": "2026-01-02T03:00:00Z"}}}]}});
    for (key, part) in rest.as_object().unwrap() {
        for (k, v) in part.as_object().unwrap() {
            value[key][k] = v.clone();
        }
    }
    Arc::new(serde_json::from_value(value).unwrap())
}

fn plain(name: &str, phase: &str) -> Arc<Pod> {
    pod(name, phase, json!({}))
}

fn condition(plan: &Plan, kind: &str) -> Option<String> {
    let found = plan.status.conditions.iter().flatten().find(|c| c.type_ == kind)?;
    Some(format!(
        "{} {}",
        found.status,
        found.reason.as_deref().unwrap_or_default()
    ))
}

/// The plan's status written back and its releases done.
fn after(job: &Job, plan: &Plan, pods: &[Arc<Pod>]) -> (Job, Vec<Arc<Pod>>) {
    let mut job = job.clone();
    job.status = Some(plan.status.clone());
    let pods = pods.iter().map(|p| {
        let mut p = (**p).clone();
        if plan.release.iter().any(|n| Some(n) == p.metadata.name.as_ref()) {
            p.metadata.finalizers = None;
        }
        Arc::new(p)
    });
    (job, pods.collect())
}

#[test]
fn pods_are_made_up_to_parallelism_and_never_more_than_are_missing() {
    let count = |spec: Value, status: Value, pods: &[Arc<Pod>]| plan(&job(spec, status), pods, now()).create.len();
    assert_eq!(count(json!({"parallelism": 3, "completions": 5}), json!({}), &[]), 3);
    assert_eq!(
        count(
            json!({"parallelism": 3, "completions": 5}),
            json!({"succeeded": 4}),
            &[]
        ),
        1
    );
    assert_eq!(count(json!({"parallelism": 2}), json!({}), &[]), 2);
    let running = [plain("a", "Running")];
    assert_eq!(
        count(json!({"parallelism": 2, "completions": 2}), json!({}), &running),
        1
    );
    // A work queue in which one has succeeded gets no new workers.
    assert_eq!(count(json!({"parallelism": 2}), json!({"succeeded": 1}), &running), 0);
    let two = [plain("a", "Running"), plain("b", "Pending")];
    let less = plan(
        &job(json!({"parallelism": 1, "completions": 2}), json!({})),
        &two,
        now(),
    );
    assert_eq!(less.delete, ["b"]);
}

#[test]
fn an_end_is_counted_once_whatever_happens_in_between() {
    let j = job(
        json!({"parallelism": 1, "completions": 1}),
        json!({"startTime": "2026-01-02T03:00:00Z"}),
    );
    let pods = [plain("a", "Succeeded")];
    let first = plan(&j, &pods, now());
    assert_eq!(
        (first.release.as_slice(), first.status.succeeded),
        (&["a".to_owned()][..], None)
    );
    assert_eq!(
        condition(&first, "SuccessCriteriaMet").unwrap(),
        "True CompletionsReached"
    );
    assert_eq!(condition(&first, "Complete"), None, "not before it is counted");
    // The same again before the finalizer went: nothing is counted twice.
    let (j, _) = after(&j, &first, &pods);
    let again = plan(&j, &pods, now());
    assert_eq!(
        again.status.uncounted_terminated_pods,
        first.status.uncounted_terminated_pods
    );
    let (j, pods) = after(&j, &first, &pods);
    let done = plan(&j, &pods, now());
    assert_eq!(
        (done.status.succeeded, done.status.uncounted_terminated_pods.clone()),
        (Some(1), None)
    );
    assert_eq!(condition(&done, "Complete").unwrap(), "True CompletionsReached");
    assert!(done.status.completion_time.is_some());
    // And if the pod vanished altogether after it was noted.
    let gone = plan(&j, &[], now());
    assert_eq!(gone.status.succeeded, Some(1));
    let (j, pods) = after(&j, &done, &pods);
    let rest = plan(&j, &pods, now());
    assert_eq!(
        (rest.status, rest.create.len()),
        (done.status, 0),
        "nothing to do at rest"
    );
}

#[test]
fn failures_wait_longer_each_time_and_end_the_job() {
    let spec = json!({"parallelism": 1, "completions": 1, "backoffLimit": 2});
    let recent = |name: &str| {
        let ended = json!([{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 1, "finishedAt": "2026-01-02T03:09:55Z"}}}]);
        pod(name, "Failed", json!({"status": {"containerStatuses": ended}}))
    };
    let first = plan(&job(spec.clone(), json!({})), &[recent("a")], now());
    assert_eq!((first.create.len(), first.requeue.unwrap().as_secs()), (0, 5));
    let second = plan(&job(spec.clone(), json!({})), &[recent("a"), recent("b")], now());
    assert_eq!(second.requeue.unwrap().as_secs(), 15);
    let running = plain("d", "Running");
    let last = plan(&job(spec.clone(), json!({"failed": 3})), &[running], now());
    assert_eq!(condition(&last, "FailureTarget").unwrap(), "True BackoffLimitExceeded");
    assert_eq!(
        (condition(&last, "Failed"), last.delete.as_slice()),
        (None, &["d".to_owned()][..])
    );
    let (j, _) = after(&job(spec, json!({"failed": 3})), &last, &[]);
    assert_eq!(
        condition(&plan(&j, &[], now()), "Failed").unwrap(),
        "True BackoffLimitExceeded"
    );
}

#[test]
fn deadlines_suspension_and_time_to_live() {
    let late = job(
        json!({"parallelism": 1, "completions": 1, "activeDeadlineSeconds": 60}),
        json!({"startTime": "2026-01-02T03:08:00Z"}),
    );
    assert_eq!(
        condition(&plan(&late, &[], now()), "Failed").unwrap(),
        "True DeadlineExceeded"
    );
    let suspended = job(
        json!({"parallelism": 2, "completions": 2, "suspend": true}),
        json!({"startTime": "2026-01-02T03:08:00Z"}),
    );
    let pods = [plain("a", "Running")];
    let p = plan(&suspended, &pods, now());
    assert_eq!(
        (p.delete.len(), p.create.len(), p.status.start_time.is_none()),
        (1, 0, true)
    );
    assert_eq!(condition(&p, "Suspended").unwrap(), "True JobSuspended");
    let mut resumed = suspended.clone();
    resumed.status = Some(p.status);
    resumed.spec.as_mut().unwrap().suspend = Some(false);
    let p = plan(&resumed, &[], now());
    assert_eq!(
        (condition(&p, "Suspended").unwrap(), p.create.len()),
        ("False JobResumed".to_owned(), 2)
    );
    let complete =
        json!({"conditions": [{"type": "Complete", "status": "True", "lastTransitionTime": "2026-01-02T03:09:00Z"}]});
    let kept = plan(
        &job(json!({"ttlSecondsAfterFinished": 90}), complete.clone()),
        &[],
        now(),
    );
    assert_eq!((kept.remove, kept.requeue.unwrap().as_secs()), (false, 30));
    assert!(plan(&job(json!({"ttlSecondsAfterFinished": 60}), complete), &[], now()).remove);
}

#[test]
fn every_index_succeeds_once() {
    let spec = json!({"parallelism": 3, "completions": 5, "completionMode": "Indexed"});
    let at = |name: &str, phase: &str, index: i32| {
        pod(
            name,
            phase,
            json!({"metadata": {"annotations": {INDEX: index.to_string()}}}),
        )
    };
    let p = plan(
        &job(spec.clone(), json!({"completedIndexes": "0,2"})),
        &[at("a", "Running", 1)],
        now(),
    );
    assert_eq!(p.create, [Some(3), Some(4)]);
    let twice = [
        at("a", "Succeeded", 1),
        at("b", "Succeeded", 1),
        at("c", "Succeeded", 3),
    ];
    let p = plan(&job(spec, json!({"completedIndexes": "0,2"})), &twice, now());
    assert_eq!(p.status.completed_indexes.as_deref(), Some("0-3"));
    assert_eq!((p.release.len(), p.create.as_slice()), (3, &[Some(4)][..]));
}

#[test]
fn a_failure_policy_decides_by_exit_code_and_condition() {
    let with = |action: &str, code: i32| {
        json!({"parallelism": 1, "completions": 1, "backoffLimit": 0, "podFailurePolicy": {"rules": [
            {"action": action, "onExitCodes": {"operator": "In", "values": [code]}}]}})
    };
    let pods = [plain("a", "Failed")];
    let failed = plan(&job(with("FailJob", 3), json!({})), &pods, now());
    let reason = failed
        .status
        .conditions
        .iter()
        .flatten()
        .find(|c| c.type_ == "FailureTarget")
        .unwrap();
    assert_eq!(
        reason.message.as_deref().unwrap(),
        "Container c for pod n/a failed with exit code 3 matching FailJob rule at index 0"
    );
    let ignored = plan(&job(with("Ignore", 3), json!({})), &pods, now());
    assert_eq!(
        (ignored.release.len(), ignored.status.uncounted_terminated_pods),
        (1, None)
    );
    let other = plan(&job(with("Ignore", 4), json!({})), &pods, now());
    assert_eq!(condition(&other, "FailureTarget").unwrap(), "True BackoffLimitExceeded");
}

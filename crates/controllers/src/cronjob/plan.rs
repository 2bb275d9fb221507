//! What a CronJob needs next. Pure.
//!
//! # Source
//! `pkg/controller/cronjob` of Kubernetes 1.36.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::cron::Schedule;
use k8s_openapi::api::batch::v1::{CronJob, CronJobStatus, Job};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use k8s_openapi::jiff::tz::TimeZone;

use crate::common::{name_of, uid_of};
use crate::job::plan::is_finished;

/// Times looked at one by one; of a longer gap only the end is.
const STEPS_MAX: usize = 100;

/// The next step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// The time to make a Job for.
    pub start: Option<Timestamp>,
    /// Names of Jobs to delete before that: running ones that are replaced.
    pub replace: Vec<String>,
    /// Names of Jobs that are no longer kept as history.
    pub forget: Vec<String>,
    pub status: CronJobStatus,
    pub requeue: Option<Duration>,
    /// Reason and text of an event, and whether it is a warning.
    pub events: Vec<(&'static str, String, bool)>,
}

/// The zone of a CronJob; UTC if it names none, as the control plane's own.
pub fn zone(cron: &CronJob) -> Option<TimeZone> {
    match cron.spec.time_zone.as_deref() {
        None => Some(TimeZone::UTC),
        Some("UTC" | "Etc/UTC") => Some(TimeZone::UTC),
        Some(_) => None,
    }
}

fn finished(job: &Job) -> bool {
    job.status.as_ref().is_some_and(is_finished)
}

fn succeeded(job: &Job) -> bool {
    let conditions = job.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .any(|c| c.type_ == "Complete" && c.status == "True")
}

/// A reference to a running Job.
pub fn reference(job: &Job) -> ObjectReference {
    ObjectReference {
        api_version: Some("batch/v1".to_owned()),
        kind: Some("Job".to_owned()),
        namespace: job.metadata.namespace.clone(),
        name: job.metadata.name.clone(),
        uid: job.metadata.uid.clone(),
        resource_version: job.metadata.resource_version.clone(),
        ..ObjectReference::default()
    }
}

/// Plans for `cron` over its own Jobs.
pub fn plan(cron: &CronJob, jobs: &[Arc<Job>], now: Timestamp) -> Plan {
    let spec = &cron.spec;
    let mut plan = Plan {
        status: cron.status.clone().unwrap_or_default(),
        ..Plan::default()
    };
    let mut active = plan.status.active.take().unwrap_or_default();
    active.retain(|r| {
        let job = jobs.iter().find(|j| Some(uid_of(&***j)) == r.uid.as_deref());
        if let Some(job) = job.filter(|j| finished(j)) {
            let how = if succeeded(job) { "Complete" } else { "Failed" };
            let text = format!("Saw completed job: {}, condition: {how}", name_of(&**job));
            plan.events.push(("SawCompletedJob", text, false));
        }
        job.is_some_and(|j| !finished(j))
    });
    for job in jobs.iter().filter(|j| !finished(j)) {
        if !active.iter().any(|r| r.uid.as_deref() == Some(uid_of(&**job))) {
            active.push(reference(job));
        }
    }
    let ended = jobs
        .iter()
        .filter(|j| succeeded(j))
        .filter_map(|j| j.status.as_ref()?.completion_time.clone());
    if let Some(last) = ended.map(|t| t.0).max()
        && plan.status.last_successful_time.as_ref().is_none_or(|t| t.0 < last)
    {
        plan.status.last_successful_time = Some(Time(last));
    }
    for (wanted, limit) in [
        (true, spec.successful_jobs_history_limit.unwrap_or(3)),
        (false, spec.failed_jobs_history_limit.unwrap_or(1)),
    ] {
        let mut old: Vec<&Arc<Job>> = jobs.iter().filter(|j| finished(j) && succeeded(j) == wanted).collect();
        old.sort_by_key(|j| {
            (
                j.status.as_ref().and_then(|s| s.start_time.clone()),
                name_of(&***j).to_owned(),
            )
        });
        let surplus = old.len().saturating_sub(limit.max(0) as usize);
        plan.forget
            .extend(old[..surplus].iter().map(|j| name_of(&***j).to_owned()));
    }
    let running: Vec<String> = active.iter().filter_map(|r| r.name.clone()).collect();
    plan.status.active = (!active.is_empty()).then_some(active);
    if cron.metadata.deletion_timestamp.is_some() || spec.suspend == Some(true) {
        return plan;
    }
    let (Ok(schedule), Some(zone)) = (Schedule::parse(&spec.schedule), zone(cron)) else {
        let text = format!("unparseable schedule: {:?}", spec.schedule);
        plan.events.push(("UnparseableSchedule", text, true));
        return plan;
    };
    if let Some(next) = schedule.next(now, &zone) {
        // A little later than the time itself, so that the time has come.
        plan.requeue = Some(apimachinery::time::since(next, now) + Duration::from_millis(100));
    }
    let deadline = spec.starting_deadline_seconds;
    let Some((due, many)) = latest(cron, &schedule, &zone, deadline, now) else {
        return plan;
    };
    if many {
        let text = "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew";
        plan.events.push(("TooManyMissedTimes", text.to_owned(), true));
    }
    if deadline.is_some_and(|s| apimachinery::time::since(now, due).as_secs() as i64 > s) {
        let text = format!(
            "Missed scheduled time to start a job: {}",
            apimachinery::time::rfc3339(due)
        );
        plan.events.push(("MissSchedule", text, true));
        return plan;
    }
    match spec.concurrency_policy.as_deref() {
        Some("Forbid") if !running.is_empty() => {
            let text = "Not starting job because prior execution is running and concurrency policy is Forbid";
            plan.events.push(("JobAlreadyActive", text.to_owned(), false));
            return plan;
        }
        Some("Replace") => plan.replace = running,
        _ => {}
    }
    plan.start = Some(due);
    plan
}

/// The newest time that has come and has no Job yet, and whether very many were missed before it.
fn latest(
    cron: &CronJob,
    schedule: &Schedule,
    zone: &TimeZone,
    deadline_s: Option<i64>,
    now: Timestamp,
) -> Option<(Timestamp, bool)> {
    let last = cron.status.as_ref().and_then(|s| s.last_schedule_time.as_ref());
    let created = cron.metadata.creation_timestamp.as_ref();
    let mut at = last.or(created).map_or(now, |t| t.0);
    if let Some(seconds) = deadline_s {
        at = at.max(Timestamp::from_second(now.as_second() - seconds).ok()?);
    }
    let mut due = None;
    for step in 0.. {
        let Some(next) = schedule.next(at, zone).filter(|next| *next <= now) else {
            break;
        };
        if step == STEPS_MAX {
            // Near the present: twice the last interval back from now holds a time again.
            let interval = apimachinery::time::since(next, at).as_secs() as i64;
            let near = Timestamp::from_second(now.as_second() - 2 * interval.max(60)).ok()?;
            let mut at = near.max(next);
            let mut newest = next;
            while let Some(next) = schedule.next(at, zone).filter(|next| *next <= now) {
                (newest, at) = (next, next);
            }
            return Some((newest, true));
        }
        due = Some(next);
        at = next;
    }
    Some((due?, false))
}

/// Name of the Job for a time.
pub fn job_name(cron: &str, at: Timestamp) -> String {
    format!("{cron}-{}", at.as_second() / 60)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn cron(spec: Value, status: Value) -> CronJob {
        let mut all = json!({"schedule": "*/10 * * * *", "concurrencyPolicy": "Allow",
            "jobTemplate": {"spec": {"template": {"spec": {"containers": []}}}}});
        for (k, v) in spec.as_object().unwrap() {
            all[k] = v.clone();
        }
        serde_json::from_value(
            json!({"metadata": {"name": "c", "uid": "u", "creationTimestamp": "2026-01-02T03:01:00Z"},
            "spec": all, "status": status}),
        )
        .unwrap()
    }

    fn job(name: &str, end: Option<&str>) -> Arc<Job> {
        let conditions = end
            .map(|kind| json!([{"type": kind, "status": "True"}]))
            .unwrap_or_default();
        let time = format!("2026-01-02T03:{:0>2}:00Z", name.trim_start_matches(char::is_alphabetic));
        Arc::new(
            serde_json::from_value(
                json!({"metadata": {"name": name, "uid": name}, "status": {"conditions": conditions,
                "startTime": time, "completionTime": end.filter(|e| *e == "Complete").map(|_| time.clone())}}),
            )
            .unwrap(),
        )
    }

    fn at(text: &str) -> Timestamp {
        apimachinery::time::parse(text).unwrap()
    }

    fn start(cron: &CronJob, jobs: &[Arc<Job>], now: &str) -> String {
        let p = plan(cron, jobs, at(now));
        p.start.map_or_else(
            || p.events.first().map_or("waits".to_owned(), |e| e.0.to_owned()),
            apimachinery::time::rfc3339,
        )
    }

    #[test]
    fn a_job_for_the_newest_time_that_has_come() {
        let plain = cron(json!({}), json!({}));
        assert_eq!(start(&plain, &[], "2026-01-02T03:09:59Z"), "waits");
        assert_eq!(
            plan(&plain, &[], at("2026-01-02T03:09:00Z")).requeue.unwrap().as_secs(),
            60
        );
        assert_eq!(start(&plain, &[], "2026-01-02T03:10:00Z"), "2026-01-02T03:10:00Z");
        assert_eq!(start(&plain, &[], "2026-01-02T03:35:00Z"), "2026-01-02T03:30:00Z");
        let done = cron(json!({}), json!({"lastScheduleTime": "2026-01-02T03:30:00Z"}));
        assert_eq!(start(&done, &[], "2026-01-02T03:35:00Z"), "waits");
        assert_eq!(
            start(&cron(json!({"suspend": true}), json!({})), &[], "2026-01-02T03:35:00Z"),
            "waits"
        );
        let p = plan(&plain, &[], at("2026-02-02T03:35:00Z"));
        assert_eq!(
            (p.start, p.events[0].0),
            (Some(at("2026-02-02T03:30:00Z")), "TooManyMissedTimes")
        );
        let strict = cron(json!({"startingDeadlineSeconds": 100}), json!({}));
        assert_eq!(
            start(&strict, &[], "2026-01-02T03:35:00Z"),
            "waits",
            "only the last 100 s count"
        );
        assert_eq!(start(&strict, &[], "2026-01-02T03:31:00Z"), "2026-01-02T03:30:00Z");
        let utc = cron(json!({"schedule": "0 5 * * *", "timeZone": "Etc/UTC"}), json!({}));
        assert_eq!(start(&utc, &[], "2026-01-02T05:00:00Z"), "2026-01-02T05:00:00Z");
        let other = cron(json!({"timeZone": "Europe/Berlin"}), json!({}));
        assert_eq!(start(&other, &[], "2026-01-02T05:00:00Z"), "UnparseableSchedule");
        assert_eq!(job_name("c", at("2026-01-02T03:10:00Z")), "c-29455390");
    }

    #[test]
    fn one_that_still_runs_is_joined_waited_for_or_replaced() {
        let now = "2026-01-02T03:10:00Z";
        let running = [job("j1", None)];
        let with = |policy: &str| cron(json!({"concurrencyPolicy": policy}), json!({}));
        assert_eq!(start(&with("Allow"), &running, now), now);
        assert_eq!(start(&with("Forbid"), &running, now), "JobAlreadyActive");
        assert_eq!(start(&with("Forbid"), &[job("j1", Some("Failed"))], now), now);
        let p = plan(&with("Replace"), &running, at(now));
        assert_eq!((p.replace, p.start), (vec!["j1".to_owned()], Some(at(now))));
        assert_eq!(p.status.active.unwrap().len(), 1);
    }

    #[test]
    fn history_is_kept_as_long_as_asked() {
        let jobs = [
            job("a1", Some("Complete")),
            job("b2", Some("Complete")),
            job("c3", Some("Failed")),
            job("d4", Some("Failed")),
            job("e5", Some("Complete")),
        ];
        let p = plan(
            &cron(json!({"successfulJobsHistoryLimit": 1}), json!({})),
            &jobs,
            at("2026-01-02T03:09:00Z"),
        );
        assert_eq!(p.forget, ["a1", "b2", "c3"]);
        assert_eq!(p.status.last_successful_time.unwrap().0, at("2026-01-02T03:05:00Z"));
    }
}

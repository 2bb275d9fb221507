//! Defaults of Jobs and CronJobs.

use serde_json::Value;

use super::{Object, absent, child, template, text};

pub(super) fn job(object: &mut Object) {
    // A Job without labels has those of its pods.
    let labels = object
        .get("spec")
        .and_then(|s| s["template"]["metadata"].get("labels"))
        .filter(|l| l.as_object().is_some_and(|l| !l.is_empty()))
        .cloned();
    if let Some(labels) = labels {
        child(object, "metadata").entry("labels").or_insert(labels);
    }
    spec(child(object, "spec"));
}

fn spec(spec: &mut Object) {
    let null = |spec: &Object, key: &str| spec.get(key).is_none_or(Value::is_null);
    if null(spec, "completions") && null(spec, "parallelism") {
        absent(spec, "completions", 1);
    }
    absent(spec, "parallelism", 1);
    absent(spec, "backoffLimit", 6);
    absent(spec, "suspend", false);
    text(spec, "completionMode", "NonIndexed");
    let replacement = if null(spec, "podFailurePolicy") {
        "TerminatingOrFailed"
    } else {
        "Failed"
    };
    text(spec, "podReplacementPolicy", replacement);
    let rules = spec.get_mut("podFailurePolicy").and_then(|p| p.get_mut("rules"));
    super::each(rules, |rule| {
        super::each(rule.get_mut("onPodConditions"), |pattern| {
            text(pattern, "status", "True")
        });
    });
    template(spec);
}

pub(super) fn cron_job(object: &mut Object) {
    let own = child(object, "spec");
    text(own, "concurrencyPolicy", "Allow");
    absent(own, "suspend", false);
    absent(own, "successfulJobsHistoryLimit", 3);
    absent(own, "failedJobsHistoryLimit", 1);
    // The Job's own defaults are set when it is made; its pods' already here, as upstream's.
    if let Some(Value::Object(job)) = own.get_mut("jobTemplate")
        && let Some(Value::Object(job)) = job.get_mut("spec")
    {
        template(job);
    }
}

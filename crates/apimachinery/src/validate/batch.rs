//! Jobs and CronJobs.
//!
//! # Source
//! `pkg/apis/batch/validation` of Kubernetes 1.36.

use serde_json::Value;

use super::workload::label_selector;
use super::{Errors, list, pod, text};
use crate::field::FieldError;
use crate::meta;
use crate::selector::LabelSelector;

/// Bounds of Indexed Jobs.
const PARALLELISM_MAX: i64 = 100_000;
/// Longest name of a CronJob: its Jobs append eleven characters.
const CRON_NAME_MAX: usize = 52;
/// Fields of a Job whose machinery is not there: an object that has them is refused, so that nothing is promised.
const NOT_SERVED: [&str; 3] = ["backoffLimitPerIndex", "maxFailedIndexes", "successPolicy"];

pub(super) fn job(errors: &mut Errors, object: &Value) {
    spec(errors, "spec", &object["spec"]);
    let spec = &object["spec"];
    if spec["selector"].is_null() {
        errors.required("spec.selector", "");
        return;
    }
    label_selector(errors, "spec.selector", &spec["selector"]);
    let labels: std::collections::BTreeMap<String, String> = meta::labels(&spec["template"])
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
    if LabelSelector::from_object(&spec["selector"]).is_ok_and(|s| !s.matches(&labels)) {
        let shown = spec["template"]["metadata"]["labels"].clone();
        errors.invalid(
            "spec.template.metadata.labels",
            shown,
            "`selector` does not match template `labels`",
        );
    }
}

/// A Job's spec, of its own or of a CronJob's template.
fn spec(errors: &mut Errors, path: &str, spec: &Value) {
    let at = |field: &str| format!("{path}.{field}");
    for field in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
    ] {
        errors.non_negative(&at(field), &spec[field]);
    }
    for field in NOT_SERVED {
        if !spec[field].is_null() {
            errors.forbidden(at(field), "is not served yet");
        }
    }
    match text(spec, "completionMode") {
        "" | "NonIndexed" => {}
        "Indexed" => {
            if spec["completions"].is_null() {
                errors.required(at("completions"), "when completion mode is Indexed");
            }
            if let Some(n) = spec["parallelism"].as_i64().filter(|n| *n > PARALLELISM_MAX) {
                let detail = format!("must be less than or equal to {PARALLELISM_MAX} when completion mode is Indexed");
                errors.invalid(at("parallelism"), n, &detail);
            }
        }
        other => errors.push(FieldError::not_supported(
            at("completionMode"),
            other,
            &["NonIndexed", "Indexed"],
        )),
    }
    let policy = text(&spec["template"]["spec"], "restartPolicy");
    failure_policy(errors, path, spec, policy);
    match text(spec, "podReplacementPolicy") {
        "" | "Failed" => {}
        "TerminatingOrFailed" if spec["podFailurePolicy"].is_null() => {}
        "TerminatingOrFailed" => errors.push(FieldError::not_supported(
            at("podReplacementPolicy"),
            "TerminatingOrFailed",
            &["Failed"],
        )),
        other => errors.push(FieldError::not_supported(
            at("podReplacementPolicy"),
            other,
            &["Failed", "TerminatingOrFailed"],
        )),
    }
    errors.labels(&at("template.metadata.labels"), &spec["template"]["metadata"]["labels"]);
    pod::spec(errors, &at("template.spec"), &spec["template"]["spec"], true);
    let at = at("template.spec.restartPolicy");
    match policy {
        "" => errors.required(at, "valid values: \"OnFailure\", \"Never\""),
        "OnFailure" | "Never" => {}
        other => errors.push(FieldError::not_supported(at, other, &["OnFailure", "Never"])),
    }
}

fn failure_policy(errors: &mut Errors, path: &str, spec: &Value, restart: &str) {
    let policy = &spec["podFailurePolicy"];
    if policy.is_null() {
        return;
    }
    let path = format!("{path}.podFailurePolicy");
    if restart != "Never" {
        errors.invalid(
            &path,
            policy.clone(),
            "only \"Never\" is supported when podFailurePolicy is specified",
        );
    }
    for (i, rule) in list(&policy["rules"]).iter().enumerate() {
        let at = |field: &str| format!("{path}.rules[{i}].{field}");
        match text(rule, "action") {
            "" => errors.required(
                at("action"),
                "valid values: [\"Count\" \"FailIndex\" \"FailJob\" \"Ignore\"]",
            ),
            "Ignore" | "FailJob" | "Count" => {}
            "FailIndex" => errors.invalid(at("action"), "FailIndex", "requires the backoffLimitPerIndex to be set"),
            other => errors.push(FieldError::not_supported(
                at("action"),
                other,
                &["Count", "FailIndex", "FailJob", "Ignore"],
            )),
        }
        let (codes, conditions) = (&rule["onExitCodes"], list(&rule["onPodConditions"]));
        match (codes.is_null(), conditions.is_empty()) {
            (false, false) => errors.invalid(
                format!("{path}.rules[{i}]"),
                rule.clone(),
                "specifying both OnExitCodes and OnPodConditions is not supported",
            ),
            (true, true) => errors.invalid(
                format!("{path}.rules[{i}]"),
                rule.clone(),
                "specifying one of OnExitCodes and OnPodConditions is required",
            ),
            _ => {}
        }
        if !codes.is_null() {
            match text(codes, "operator") {
                "In" | "NotIn" => {}
                other => errors.push(FieldError::not_supported(
                    at("onExitCodes.operator"),
                    other,
                    &["In", "NotIn"],
                )),
            }
            let values = list(&codes["values"]);
            if values.is_empty() {
                errors.invalid(
                    at("onExitCodes.values"),
                    codes["values"].clone(),
                    "at least one value is required",
                );
            }
            if text(codes, "operator") == "In" && values.iter().any(|v| *v == 0) {
                errors.invalid(at("onExitCodes.values"), 0, "must not be 0 for the In operator");
            }
        }
    }
}

pub(super) fn job_update(errors: &mut Errors, new: &Value, old: &Value) {
    let (new, old) = (&new["spec"], &old["spec"]);
    let resized = new["completionMode"] == "Indexed" && new["completions"] == new["parallelism"];
    if !resized {
        errors.immutable("spec.completions", &new["completions"], &old["completions"]);
    }
    errors.immutable("spec.selector", &new["selector"], &old["selector"]);
    errors.immutable("spec.completionMode", &new["completionMode"], &old["completionMode"]);
    errors.immutable(
        "spec.podFailurePolicy",
        &new["podFailurePolicy"],
        &old["podFailurePolicy"],
    );
    errors.immutable("spec.managedBy", &new["managedBy"], &old["managedBy"]);
    // Where a suspended Job will run may still be said.
    let mut template = new["template"].clone();
    if old["suspend"] == true {
        for field in ["nodeSelector", "tolerations", "affinity", "schedulingGates"] {
            match old["template"]["spec"].get(field) {
                Some(value) => template["spec"][field] = value.clone(),
                None => {
                    template["spec"].as_object_mut().map(|s| s.remove(field));
                }
            }
        }
        for field in ["labels", "annotations"] {
            template["metadata"][field] = old["template"]["metadata"][field].clone();
        }
    }
    errors.immutable("spec.template", &template, &old["template"]);
}

pub(super) fn cron_job(errors: &mut Errors, object: &Value) {
    let name = meta::name(object);
    if name.len() > CRON_NAME_MAX {
        errors.invalid("metadata.name", name, "must be no more than 52 characters");
    }
    let spec_ = &object["spec"];
    match text(spec_, "schedule") {
        "" => errors.required("spec.schedule", ""),
        schedule if schedule.contains("TZ") => {
            let detail = "cannot use TZ or CRON_TZ in schedule, use timeZone field instead";
            errors.invalid("spec.schedule", schedule, detail);
        }
        schedule => {
            if let Err(error) = crate::cron::Schedule::parse(schedule) {
                errors.invalid("spec.schedule", schedule, &error.to_string());
            }
        }
    }
    match spec_["timeZone"].as_str() {
        None => {}
        Some("") => errors.invalid("spec.timeZone", "", "timeZone must be nil or non-empty string"),
        Some(zone) if zone.eq_ignore_ascii_case("local") => {
            errors.invalid(
                "spec.timeZone",
                zone,
                "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones",
            );
        }
        Some("UTC" | "Etc/UTC") => {}
        // A schedule in a zone that nobody can compute would run at wrong times.
        Some(zone) => errors.invalid(
            "spec.timeZone",
            zone,
            "only UTC is served: there is no time zone database yet",
        ),
    }
    match text(spec_, "concurrencyPolicy") {
        "Allow" | "Forbid" | "Replace" => {}
        "" => errors.required("spec.concurrencyPolicy", ""),
        other => errors.push(FieldError::not_supported(
            "spec.concurrencyPolicy",
            other,
            &["Allow", "Forbid", "Replace"],
        )),
    }
    for field in [
        "startingDeadlineSeconds",
        "successfulJobsHistoryLimit",
        "failedJobsHistoryLimit",
    ] {
        errors.non_negative(&format!("spec.{field}"), &spec_[field]);
    }
    let path = "spec.jobTemplate.spec";
    let template = &spec_["jobTemplate"]["spec"];
    spec(errors, path, template);
    if template["manualSelector"] == true {
        errors.push(FieldError::not_supported(
            format!("{path}.manualSelector"),
            true,
            &["nil", "false"],
        ));
    }
}

//! DaemonSets and disruption budgets.
//!
//! # Source
//! `pkg/apis/apps/validation` and `pkg/apis/policy/validation` of Kubernetes 1.36.

use serde_json::Value;

use super::workload::{amount, int_or_percent, label_selector, selector_and_template};
use super::{Errors, text};
use crate::field::FieldError;

pub(super) fn daemon_set(errors: &mut Errors, object: &Value) {
    let spec = &object["spec"];
    selector_and_template(errors, spec);
    errors.non_negative("spec.minReadySeconds", &spec["minReadySeconds"]);
    errors.non_negative("spec.revisionHistoryLimit", &spec["revisionHistoryLimit"]);
    let path = "spec.updateStrategy";
    match text(&spec["updateStrategy"], "type") {
        "OnDelete" => {}
        "RollingUpdate" => {
            let rolling = &spec["updateStrategy"]["rollingUpdate"];
            for field in ["maxUnavailable", "maxSurge"] {
                int_or_percent(errors, &format!("{path}.rollingUpdate.{field}"), &rolling[field]);
            }
            if amount(&rolling["maxSurge"]) > 0 {
                errors.forbidden(format!("{path}.rollingUpdate.maxSurge"), "is not served yet");
            } else if amount(&rolling["maxUnavailable"]) == 0 {
                errors.required(
                    format!("{path}.rollingUpdate.maxUnavailable"),
                    "cannot be 0 when maxSurge is 0",
                );
            }
        }
        other => errors.push(FieldError::not_supported(path, other, &["OnDelete", "RollingUpdate"])),
    }
}

pub(super) fn disruption_budget(errors: &mut Errors, object: &Value) {
    let spec = &object["spec"];
    let given = |field: &str| !spec[field].is_null();
    if given("minAvailable") && given("maxUnavailable") {
        errors.invalid(
            "spec",
            spec.clone(),
            "minAvailable and maxUnavailable cannot be both set",
        );
    }
    for field in ["minAvailable", "maxUnavailable"] {
        if given(field) {
            let path = format!("spec.{field}");
            int_or_percent(errors, &path, &spec[field]);
            if spec[field].is_string() && amount(&spec[field]) > 100 {
                errors.invalid(path, spec[field].clone(), "must not be greater than 100%");
            }
        }
    }
    label_selector(errors, "spec.selector", &spec["selector"]);
    match text(spec, "unhealthyPodEvictionPolicy") {
        "" | "IfHealthyBudget" | "AlwaysAllow" => {}
        other => errors.push(FieldError::not_supported(
            "spec.unhealthyPodEvictionPolicy",
            other,
            &["IfHealthyBudget", "AlwaysAllow"],
        )),
    }
}

//! Deployments and ReplicaSets.

use serde_json::Value;

use super::{Errors, list, names, pod, text};
use crate::field::FieldError;
use crate::meta;
use crate::selector::LabelSelector;

pub(super) fn deployment(errors: &mut Errors, object: &Value) {
    let spec = &object["spec"];
    errors.non_negative("spec.replicas", &spec["replicas"]);
    selector_and_template(errors, spec);
    strategy(errors, &spec["strategy"]);
    errors.non_negative("spec.minReadySeconds", &spec["minReadySeconds"]);
    errors.non_negative("spec.revisionHistoryLimit", &spec["revisionHistoryLimit"]);
    errors.non_negative("spec.progressDeadlineSeconds", &spec["progressDeadlineSeconds"]);
    if let Some(deadline) = spec["progressDeadlineSeconds"].as_i64()
        && deadline <= spec["minReadySeconds"].as_i64().unwrap_or_default()
    {
        errors.invalid(
            "spec.progressDeadlineSeconds",
            deadline,
            "must be greater than minReadySeconds",
        );
    }
}

/// Counts of a status: none is negative, none of `parts` above all replicas, no more available than ready.
pub(super) fn status(errors: &mut Errors, object: &Value, parts: &[&str]) {
    let status = &object["status"];
    let count = |part: &str| status[part].as_i64().unwrap_or_default();
    for part in ["replicas"].iter().chain(parts) {
        errors.non_negative(&format!("status.{part}"), &status[*part]);
    }
    for part in parts.iter().filter(|p| count(p) > count("replicas")) {
        errors.invalid(
            format!("status.{part}"),
            count(part),
            "cannot be greater than status.replicas",
        );
    }
    if count("availableReplicas") > count("readyReplicas") {
        errors.invalid(
            "status.availableReplicas",
            count("availableReplicas"),
            "cannot be greater than readyReplicas",
        );
    }
}

pub(super) fn replica_set(errors: &mut Errors, object: &Value) {
    let spec = &object["spec"];
    errors.non_negative("spec.replicas", &spec["replicas"]);
    errors.non_negative("spec.minReadySeconds", &spec["minReadySeconds"]);
    selector_and_template(errors, spec);
}

pub(super) fn selector_and_template(errors: &mut Errors, spec: &Value) {
    let selector = &spec["selector"];
    if selector.is_null() {
        errors.required("spec.selector", "");
    } else {
        label_selector(errors, "spec.selector", selector);
        let empty =
            |key: &str| selector[key].as_object().is_none_or(|o| o.is_empty()) && list(&selector[key]).is_empty();
        if empty("matchLabels") && empty("matchExpressions") {
            errors.invalid(
                "spec.selector",
                selector.clone(),
                "empty selector is invalid for deployment",
            );
        }
    }
    let parsed = if selector.is_null() {
        Ok(LabelSelector::nothing())
    } else {
        LabelSelector::from_object(selector)
    };
    let Ok(parsed) = parsed else {
        errors.invalid("spec.selector", selector.clone(), "invalid label selector");
        return;
    };
    let template = &spec["template"];
    let labels: std::collections::BTreeMap<String, String> = meta::labels(template)
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
    if !parsed.is_everything() && !parsed.matches(&labels) {
        let shown = &template["metadata"]["labels"];
        errors.invalid(
            "spec.template.metadata.labels",
            shown.clone(),
            "`selector` does not match template `labels`",
        );
    }
    errors.labels("spec.template.metadata.labels", &template["metadata"]["labels"]);
    for key in template["metadata"]["annotations"]
        .as_object()
        .into_iter()
        .flat_map(|a| a.keys())
    {
        errors.messages(
            "spec.template.metadata.annotations",
            key,
            names::qualified(&key.to_lowercase()),
        );
    }
    pod::spec(errors, "spec.template.spec", &template["spec"], true);
    let policy = text(&template["spec"], "restartPolicy");
    if policy != "Always" {
        errors.push(FieldError::not_supported(
            "spec.template.spec.restartPolicy",
            policy,
            &["Always"],
        ));
    }
    if !template["spec"]["activeDeadlineSeconds"].is_null() {
        let detail = "activeDeadlineSeconds in ReplicaSet is not Supported";
        errors.forbidden("spec.template.spec.activeDeadlineSeconds", detail);
    }
}

/// A label selector of an object.
pub(super) fn label_selector(errors: &mut Errors, path: &str, selector: &Value) {
    errors.labels(&format!("{path}.matchLabels"), &selector["matchLabels"]);
    for (i, e) in list(&selector["matchExpressions"]).iter().enumerate() {
        let at = |field: &str| format!("{path}.matchExpressions[{i}].{field}");
        let values = list(&e["values"]);
        match text(e, "operator") {
            "In" | "NotIn" if values.is_empty() => {
                errors.required(at("values"), "must be specified when `operator` is 'In' or 'NotIn'");
            }
            "In" | "NotIn" => {}
            "Exists" | "DoesNotExist" if values.is_empty() => {}
            "Exists" | "DoesNotExist" => {
                errors.forbidden(
                    at("values"),
                    "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                );
            }
            other => errors.invalid(at("operator"), other, "not a valid selector operator"),
        }
        errors.messages(&at("key"), text(e, "key"), names::qualified(text(e, "key")));
        for (j, v) in values.iter().enumerate() {
            let v = v.as_str().unwrap_or_default();
            errors.messages(&format!("{}[{j}]", at("values")), v, names::label_value(v));
        }
    }
}

fn strategy(errors: &mut Errors, strategy: &Value) {
    let path = "spec.strategy";
    match text(strategy, "type") {
        "Recreate" => {
            if !strategy["rollingUpdate"].is_null() {
                let detail = "may not be specified when strategy `type` is 'Recreate'";
                errors.forbidden(format!("{path}.rollingUpdate"), detail);
            }
        }
        "RollingUpdate" => {
            let rolling = &strategy["rollingUpdate"];
            if rolling.is_null() {
                errors.required(
                    format!("{path}.rollingUpdate"),
                    "this should be defaulted and never be nil",
                );
                return;
            }
            for field in ["maxUnavailable", "maxSurge"] {
                int_or_percent(errors, &format!("{path}.rollingUpdate.{field}"), &rolling[field]);
            }
            let at = format!("{path}.rollingUpdate.maxUnavailable");
            if amount(&rolling["maxUnavailable"]) == 0 && amount(&rolling["maxSurge"]) == 0 {
                errors.invalid(
                    &at,
                    rolling["maxUnavailable"].clone(),
                    "may not be 0 when `maxSurge` is 0",
                );
            }
            if rolling["maxUnavailable"].is_string() && amount(&rolling["maxUnavailable"]) > 100 {
                errors.invalid(&at, rolling["maxUnavailable"].clone(), "must not be greater than 100%");
            }
        }
        _ => errors.push(FieldError::not_supported(
            path,
            strategy.clone(),
            &["Recreate", "RollingUpdate"],
        )),
    }
}

pub(super) fn int_or_percent(errors: &mut Errors, path: &str, value: &Value) {
    match value.as_str() {
        Some(text) => {
            let digits = text
                .strip_suffix('%')
                .is_some_and(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()));
            if !digits {
                let detail = "a valid percent string must be a numeric string followed by an ending '%' \
                              (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')";
                errors.invalid(path, text, detail);
            }
        }
        None => errors.non_negative(path, value),
    }
}

/// The number of an amount or of a percentage.
pub(super) fn amount(value: &Value) -> i64 {
    match value {
        Value::String(s) => s.trim_end_matches('%').parse().unwrap_or_default(),
        other => other.as_i64().unwrap_or_default(),
    }
}

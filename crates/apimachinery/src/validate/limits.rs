//! ResourceQuotas and LimitRanges.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Errors, list, names, text};
use crate::field::FieldError;
use crate::quantity::Quantity;
use crate::usage::{self, Amounts};

/// Names a quota may limit besides qualified ones.
const QUOTA_NAMES: [&str; 17] = [
    "cpu",
    "memory",
    "ephemeral-storage",
    "requests.cpu",
    "requests.memory",
    "requests.storage",
    "requests.ephemeral-storage",
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
    "pods",
    "resourcequotas",
    "services",
    "replicationcontrollers",
    "secrets",
    "persistentvolumeclaims",
    "configmaps",
];
/// Counts: no fractions.
const INTEGERS: [&str; 9] = [
    "pods",
    "resourcequotas",
    "services",
    "replicationcontrollers",
    "secrets",
    "configmaps",
    "persistentvolumeclaims",
    "services.nodeports",
    "services.loadbalancers",
];
const SCOPES: [&str; 7] = [
    "Terminating",
    "NotTerminating",
    "BestEffort",
    "NotBestEffort",
    "PriorityClass",
    "CrossNamespacePodAffinity",
    "VolumeAttributesClass",
];

pub(super) fn resource_quota(errors: &mut Errors, object: &Value) {
    hard(errors, "spec.hard", &object["spec"]["hard"]);
    scopes(errors, &object["spec"]);
    selector(errors, &object["spec"]);
    hard(errors, "status.hard", &object["status"]["hard"]);
    hard(errors, "status.used", &object["status"]["used"]);
}

fn hard(errors: &mut Errors, path: &str, map: &Value) {
    for (name, value) in map.as_object().into_iter().flatten() {
        let at = format!("{path}[{name}]");
        let wrong = names::qualified(name);
        if !wrong.is_empty() {
            errors.messages(&at, name, wrong);
        } else if !name.contains('/') && !is_quota_name(name) {
            errors.invalid(&at, name.as_str(), "must be a standard resource for quota");
        }
        let Some(amount) = usage::quantity(value) else { continue };
        if amount.is_negative() {
            errors.invalid(&at, value.clone(), "must be greater than or equal to 0");
        }
        if (INTEGERS.contains(&name.as_str()) || name.starts_with("count/")) && amount.milli() % 1000 != 0 {
            errors.invalid(&at, value.clone(), "must be an integer");
        }
    }
}

fn is_quota_name(name: &str) -> bool {
    QUOTA_NAMES.contains(&name)
        || matches!(name, "services.nodeports" | "services.loadbalancers")
        || name.starts_with("hugepages-")
        || name.starts_with("requests.hugepages-")
}

/// What a scope allows in `hard`: all of them are about pods; best-effort pods have nothing but their number.
fn fits(scope: &str, name: &str) -> bool {
    match scope {
        "BestEffort" => matches!(name, "pods" | "count/pods"),
        "VolumeAttributesClass" => usage::counted(name) == ("", "persistentvolumeclaims"),
        _ => usage::counted(name) == ("", "pods"),
    }
}

fn scopes(errors: &mut Errors, spec: &Value) {
    let given: BTreeSet<&str> = list(&spec["scopes"]).iter().filter_map(Value::as_str).collect();
    for scope in &given {
        if !SCOPES.contains(scope) {
            errors.invalid("spec.scopes", spec["scopes"].clone(), "unsupported scope");
            continue;
        }
        for name in spec["hard"].as_object().into_iter().flat_map(|h| h.keys()) {
            if !fits(scope, name) {
                let detail = "unsupported scope applied to resource";
                errors.invalid("spec.scopes", spec["scopes"].clone(), detail);
            }
        }
    }
    for pair in [["BestEffort", "NotBestEffort"], ["Terminating", "NotTerminating"]] {
        if pair.iter().all(|s| given.contains(s)) {
            errors.invalid("spec.scopes", spec["scopes"].clone(), "conflicting scopes");
        }
    }
}

fn selector(errors: &mut Errors, spec: &Value) {
    let path = "spec.scopeSelector.matchExpressions";
    let expressions = &spec["scopeSelector"]["matchExpressions"];
    let mut given = BTreeSet::new();
    for expression in list(expressions) {
        let scope = text(expression, "scopeName");
        given.insert(scope);
        if !SCOPES.contains(&scope) {
            errors.invalid(format!("{path}.scopeName"), scope, "unsupported scope");
        }
        for name in spec["hard"].as_object().into_iter().flat_map(|h| h.keys()) {
            if SCOPES.contains(&scope) && !fits(scope, name) {
                let detail = "unsupported scope applied to resource";
                errors.invalid("spec.scopeSelector", spec["scopeSelector"].clone(), detail);
            }
        }
        let operator = text(expression, "operator");
        let selectable = matches!(scope, "PriorityClass" | "VolumeAttributesClass");
        if !selectable && operator != "Exists" {
            let detail = "must be 'Exist' when scope is any of ResourceQuotaScopeTerminating, \
                          ResourceQuotaScopeNotTerminating, ResourceQuotaScopeBestEffort, \
                          ResourceQuotaScopeNotBestEffort or ResourceQuotaScopeCrossNamespacePodAffinity";
            errors.invalid(format!("{path}.operator"), operator, detail);
        }
        let values = list(&expression["values"]);
        match operator {
            "In" | "NotIn" if values.is_empty() => {
                let detail = "must be at least one value when `operator` is 'In' or 'NotIn' for scope selector";
                errors.required(format!("{path}.values"), detail);
            }
            "In" | "NotIn" => {}
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                let detail = "must be no value when `operator` is 'Exist' or 'DoesNotExist' for scope selector";
                errors.invalid(format!("{path}.values"), expression["values"].clone(), detail);
            }
            "Exists" | "DoesNotExist" => {}
            other => errors.invalid(format!("{path}.operator"), other, "not a valid selector operator"),
        }
    }
    for pair in [["BestEffort", "NotBestEffort"], ["Terminating", "NotTerminating"]] {
        if pair.iter().all(|s| given.contains(s)) {
            errors.invalid(
                "spec.scopeSelector",
                spec["scopeSelector"].clone(),
                "conflicting scopes",
            );
        }
    }
}

pub(super) fn limit_range(errors: &mut Errors, object: &Value) {
    let mut types = BTreeSet::new();
    for (i, item) in list(&object["spec"]["limits"]).iter().enumerate() {
        let path = format!("spec.limits[{i}]");
        let kind = text(item, "type");
        if kind.is_empty() {
            errors.required(format!("{path}.type"), "");
        } else {
            errors.messages(&format!("{path}.type"), kind, names::qualified(kind));
            if !kind.contains('/') && !matches!(kind, "Container" | "Pod" | "PersistentVolumeClaim") {
                let detail = "must be a standard limit type or fully qualified";
                errors.invalid(format!("{path}.type"), kind, detail);
            }
        }
        if !types.insert(kind) {
            errors.push(FieldError::duplicate(format!("{path}.type"), kind));
        }
        limit_item(errors, &path, kind, item);
    }
}

fn limit_item(errors: &mut Errors, path: &str, kind: &str, item: &Value) {
    let of = |field: &str| usage::amounts(&item[field]);
    let (min, max, default, request, ratio) = (
        of("min"),
        of("max"),
        of("default"),
        of("defaultRequest"),
        of("maxLimitRequestRatio"),
    );
    for field in ["max", "min"] {
        names_of(errors, &format!("{path}.{field}"), item, field);
    }
    for field in ["default", "defaultRequest"] {
        if kind == "Pod" && !of(field).is_empty() {
            errors.forbidden(format!("{path}.{field}"), "may not be specified when `type` is 'Pod'");
        } else {
            names_of(errors, &format!("{path}.{field}"), item, field);
        }
    }
    names_of(
        errors,
        &format!("{path}.maxLimitRequestRatio"),
        item,
        "maxLimitRequestRatio",
    );
    if kind == "PersistentVolumeClaim" && !min.contains_key("storage") && !max.contains_key("storage") {
        let detail = "either minimum or maximum storage value is required, but neither was provided";
        errors.required(format!("{path}.limits"), detail);
    }
    let all: BTreeSet<&String> = [&min, &max, &default, &request, &ratio]
        .into_iter()
        .flat_map(Amounts::keys)
        .collect();
    for name in all {
        compare(errors, path, name, ("min", "min", &min), ("max", "max", &max));
        let (request, default) = (
            ("defaultRequest", "default request", &request),
            ("default", "default", &default),
        );
        compare(errors, path, name, ("min", "min", &min), request);
        compare(errors, path, name, request, ("max", "max", &max));
        compare(errors, path, name, request, default);
        compare(errors, path, name, ("min", "min", &min), default);
        compare(errors, path, name, default, ("max", "max", &max));
        if let Some(ratio) = ratio.get(name) {
            ratio_fits(
                errors,
                &format!("{path}.maxLimitRequestRatio[{name}]"),
                *ratio,
                min.get(name),
                max.get(name),
            );
        }
    }
}

fn names_of(errors: &mut Errors, path: &str, item: &Value, field: &str) {
    for (name, value) in item[field].as_object().into_iter().flatten() {
        let at = format!("{path}[{name}]");
        errors.messages(&at, name, names::qualified(name));
        if usage::quantity(value).is_some_and(|q| q.is_negative()) {
            errors.invalid(&at, value.clone(), "must be greater than or equal to 0");
        }
    }
}

/// Field, its name in messages, its amounts.
type Side<'a> = (&'static str, &'static str, &'a Amounts);

/// The lower side must not be above the higher; the error stands at the lower one.
fn compare(errors: &mut Errors, path: &str, name: &str, low: Side, high: Side) {
    let (Some(a), Some(b)) = (low.2.get(name), high.2.get(name)) else {
        return;
    };
    if a <= b {
        return;
    }
    let (low_name, high_name) = match (low.0, high.0) {
        ("defaultRequest", "default") => ("default request", "default limit"),
        _ => (low.1, high.1),
    };
    let detail = format!("{low_name} value {a} is greater than {high_name} value {b}");
    errors.invalid(format!("{path}.{}[{name}]", low.0), a.to_string(), &detail);
}

fn ratio_fits(errors: &mut Errors, path: &str, ratio: Quantity, min: Option<&Quantity>, max: Option<&Quantity>) {
    if ratio.milli() < 1000 {
        errors.invalid(path, ratio.to_string(), &format!("ratio {ratio} is less than 1"));
    }
    if let (Some(min), Some(max)) = (min, max)
        && min.milli() > 0
    {
        let most = max.milli() as f64 / min.milli() as f64;
        if ratio.milli() as f64 / 1000.0 > most {
            let detail = format!("ratio {ratio} is greater than max/min = {most:.6}");
            errors.invalid(path, ratio.to_string(), &detail);
        }
    }
}

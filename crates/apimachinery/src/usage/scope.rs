//! Which objects a quota is about.

use serde_json::Value;

/// Whether the quota counts the object: all its scopes match. A quota with scopes is about pods only.
pub fn applies(quota: &Value, group: &str, plural: &str, object: &Value) -> bool {
    let spec = &quota["spec"];
    let scopes = spec["scopes"].as_array().map_or(&[][..], Vec::as_slice);
    let selectors = spec["scopeSelector"]["matchExpressions"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    if scopes.is_empty() && selectors.is_empty() {
        return true;
    }
    if (group, plural) != ("", "pods") {
        return false;
    }
    scopes
        .iter()
        .filter_map(Value::as_str)
        .all(|scope| in_scope(object, scope))
        && selectors.iter().all(|requirement| selected(object, requirement))
}

fn in_scope(pod: &Value, scope: &str) -> bool {
    let spec = &pod["spec"];
    let ends = spec["activeDeadlineSeconds"].as_i64().is_some_and(|s| s >= 0);
    match scope {
        "Terminating" => ends,
        "NotTerminating" => !ends,
        "BestEffort" => best_effort(pod),
        "NotBestEffort" => !best_effort(pod),
        "PriorityClass" => !class(pod).is_empty(),
        "CrossNamespacePodAffinity" => crosses_namespaces(spec),
        _ => false,
    }
}

fn class(pod: &Value) -> &str {
    pod["spec"]["priorityClassName"].as_str().unwrap_or_default()
}

fn best_effort(pod: &Value) -> bool {
    if let Some(qos) = pod["status"]["qosClass"].as_str().filter(|q| !q.is_empty()) {
        return qos == "BestEffort";
    }
    let totals = super::totals(pod);
    let none = |amounts: &super::Amounts| {
        ["cpu", "memory"]
            .iter()
            .all(|name| amounts.get(*name).is_none_or(|q| q.is_zero()))
    };
    none(&totals.requests) && none(&totals.limits)
}

fn selected(pod: &Value, requirement: &Value) -> bool {
    let scope = requirement["scopeName"].as_str().unwrap_or_default();
    if scope != "PriorityClass" {
        // The other scopes are there or not: only `Exists` is valid for them.
        return in_scope(pod, scope);
    }
    let class = class(pod);
    let listed = || {
        requirement["values"]
            .as_array()
            .is_some_and(|values| values.iter().any(|v| v == class))
    };
    match requirement["operator"].as_str() {
        Some("Exists") => !class.is_empty(),
        Some("DoesNotExist") => class.is_empty(),
        Some("In") => !class.is_empty() && listed(),
        // As with labels, what is absent is in no list.
        Some("NotIn") => !listed(),
        _ => false,
    }
}

fn crosses_namespaces(spec: &Value) -> bool {
    ["podAffinity", "podAntiAffinity"].iter().any(|kind| {
        let affinity = &spec["affinity"][*kind];
        let list = |key: &str| affinity[key].as_array().cloned().unwrap_or_default();
        let required = list("requiredDuringSchedulingIgnoredDuringExecution");
        let preferred = list("preferredDuringSchedulingIgnoredDuringExecution")
            .into_iter()
            .map(|t| t["podAffinityTerm"].clone());
        required.into_iter().chain(preferred).any(|term| {
            term["namespaces"].as_array().is_some_and(|n| !n.is_empty()) || term["namespaceSelector"].is_object()
        })
    })
}

//! LimitRange: what containers that name nothing get, and what is too small, too large or too far apart.
//!
//! # Source
//! `plugin/pkg/admission/limitranger` of Kubernetes 1.36.

use std::collections::BTreeMap;

use apimachinery::meta;
use apimachinery::quantity::Quantity;
use apimachinery::status::Status;
use apimachinery::usage::{self, Amounts};
use serde_json::{Value, json};

use super::Operation;
use crate::handlers::Context;
use crate::registry;

/// Says what was filled in.
const ANNOTATION: &str = "kubernetes.io/limit-ranger";

/// Items of every LimitRange of the request's namespace.
fn items(cx: &Context) -> Vec<Value> {
    let Some(ranges) = cx.cluster.resource("", "v1", "limitranges") else {
        return Vec::new();
    };
    let objects = ranges.resource.snapshot();
    registry::scan(&objects, cx.namespace(), None)
        .flat_map(|(_, range)| range.value()["spec"]["limits"].as_array().cloned().unwrap_or_default())
        .collect()
}

/// Fills in what a new pod's containers leave open.
pub fn fill(cx: &Context, pod: &mut Value) {
    let (mut limits, mut requests) = (Amounts::new(), Amounts::new());
    for item in items(cx).iter().filter(|i| i["type"] == "Container") {
        // The first range that says something wins.
        for (field, into) in [("default", &mut limits), ("defaultRequest", &mut requests)] {
            for (name, amount) in usage::amounts(&item[field]) {
                into.entry(name).or_insert(amount);
            }
        }
    }
    if limits.is_empty() && requests.is_empty() {
        return;
    }
    let mut notes = Vec::new();
    for (list, word) in [("containers", "container"), ("initContainers", "init container")] {
        let Some(containers) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else {
            continue;
        };
        for container in containers {
            let name = container["name"].as_str().unwrap_or_default().to_owned();
            for (field, what, defaults) in [("requests", "request", &requests), ("limits", "limit", &limits)] {
                let set = complete(container, field, defaults);
                if !set.is_empty() {
                    notes.push(format!("{} {what} for {word} {name}", set.join(", ")));
                }
            }
        }
    }
    if !notes.is_empty()
        && let Some(metadata) = meta::metadata_mut(pod)
    {
        let annotations = metadata.entry("annotations").or_insert_with(|| json!({}));
        annotations[ANNOTATION] = format!("LimitRanger plugin set: {}", notes.join("; ")).into();
    }
}

/// Sets what is absent in `resources.<field>`; the names set.
fn complete(container: &mut Value, field: &str, defaults: &Amounts) -> Vec<String> {
    let mut set = Vec::new();
    for (name, amount) in defaults {
        let present = container["resources"][field].get(name).is_some_and(|v| !v.is_null());
        if !present {
            container["resources"][field][name] = amount.to_string().into();
            set.push(name.clone());
        }
    }
    set
}

/// Refuses what a LimitRange of the namespace does not allow.
pub fn check(cx: &Context, operation: Operation, new: &Value) -> Result<(), Status> {
    let errors: Vec<String> = match (cx.served.info.group.as_str(), cx.served.info.plural.as_str(), operation) {
        ("", "pods", Operation::Create) => items(cx).iter().flat_map(|item| check_pod(item, new)).collect(),
        ("", "persistentvolumeclaims", Operation::Create | Operation::Update(_)) => {
            items(cx).iter().flat_map(|item| check_claim(item, new)).collect()
        }
        _ => return Ok(()),
    };
    // Upstream collects into a set: what holds of several containers alike is said once.
    let mut unique: Vec<String> = Vec::new();
    for error in errors {
        if !unique.contains(&error) {
            unique.push(error);
        }
    }
    let why = match unique.as_slice() {
        [] => return Ok(()),
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    };
    Err(Status::forbidden(&cx.target.group_resource(), meta::name(new), &why))
}

fn check_pod(item: &Value, pod: &Value) -> Vec<String> {
    let kind = item["type"].as_str().unwrap_or_default();
    let mut errors = Vec::new();
    match kind {
        "Container" => {
            for list in ["containers", "initContainers"] {
                for container in pod["spec"][list].as_array().into_iter().flatten() {
                    let requests = usage::amounts(&container["resources"]["requests"]);
                    let limits = usage::amounts(&container["resources"]["limits"]);
                    bounds(&mut errors, item, kind, &requests, &limits);
                }
            }
        }
        "Pod" => {
            let totals = usage::totals(pod);
            bounds(&mut errors, item, kind, &totals.requests, &totals.limits);
        }
        _ => {}
    }
    errors
}

fn check_claim(item: &Value, claim: &Value) -> Vec<String> {
    const KIND: &str = "PersistentVolumeClaim";
    let mut errors = Vec::new();
    if item["type"] != KIND {
        return errors;
    }
    let requests = usage::amounts(&claim["spec"]["resources"]["requests"]);
    for (name, least) in usage::amounts(&item["min"]) {
        at_least(&mut errors, KIND, &name, least, requests.get(&name), None);
    }
    for (name, most) in usage::amounts(&item["max"]) {
        match requests.get(&name) {
            None => errors.push(format!(
                "maximum {name} usage per {KIND} is {most}.  No request is specified"
            )),
            Some(asked) if *asked > most => {
                errors.push(format!(
                    "maximum {name} usage per {KIND} is {most}, but request is {asked}"
                ));
            }
            Some(_) => {}
        }
    }
    errors
}

fn bounds(errors: &mut Vec<String>, item: &Value, kind: &str, requests: &Amounts, limits: &Amounts) {
    let of = |field: &str| -> BTreeMap<String, Quantity> { usage::amounts(&item[field]) };
    for (name, least) in of("min") {
        at_least(errors, kind, &name, least, requests.get(&name), limits.get(&name));
    }
    for (name, most) in of("max") {
        let head = format!("maximum {name} usage per {kind} is {most}");
        match (limits.get(&name), requests.get(&name)) {
            (None, _) => errors.push(format!("{head}.  No limit is specified")),
            (Some(limit), _) if *limit > most => errors.push(format!("{head}, but limit is {limit}")),
            (_, Some(request)) if *request > most => errors.push(format!("{head}, but request is {request}")),
            _ => {}
        }
    }
    for (name, most) in of("maxLimitRequestRatio") {
        let head = format!("{name} max limit to request ratio per {kind} is {most}");
        let set = |side: &Amounts| side.get(&name).copied().filter(|q| !q.is_zero());
        match (set(requests), set(limits)) {
            (None, _) => errors.push(format!("{head}, but no request is specified or request is 0")),
            (_, None) => errors.push(format!("{head}, but no limit is specified or limit is 0")),
            (Some(request), Some(limit)) => {
                let ratio = limit.milli() as f64 / request.milli() as f64;
                if ratio * 1000.0 > most.milli() as f64 {
                    errors.push(format!("{head}, but provided ratio is {ratio:.6}"));
                }
            }
        }
    }
}

fn at_least(
    errors: &mut Vec<String>,
    kind: &str,
    name: &str,
    least: Quantity,
    request: Option<&Quantity>,
    limit: Option<&Quantity>,
) {
    let head = format!("minimum {name} usage per {kind} is {least}");
    match (request, limit) {
        (None, _) => errors.push(format!("{head}.  No request is specified")),
        (Some(request), _) if *request < least => errors.push(format!("{head}, but request is {request}")),
        (_, Some(limit)) if *limit < least => errors.push(format!("{head}, but limit is {limit}")),
        _ => {}
    }
}

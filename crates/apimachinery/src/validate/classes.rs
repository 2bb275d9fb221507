//! Classes, revisions and templates: kinds that are only kept.

use serde_json::Value;

use super::{Errors, names, text};
use crate::field::FieldError;
use crate::meta;

/// Highest priority that users can define.
const USER_PRIORITY_MAX: i64 = 1_000_000_000;
/// Names with this prefix are the system's.
const SYSTEM: &str = "system-";
/// Bounds of a storage class's parameters.
const PARAMETERS_MAX: usize = 512;
const PARAMETERS_BYTES_MAX: usize = 256 * 1024;
/// Longest name of an ingress controller.
const CONTROLLER_BYTES_MAX: usize = 250;

/// The priority classes that every cluster has.
pub const SYSTEM_PRIORITIES: [(&str, i64, &str); 2] = [
    (
        "system-node-critical",
        2_000_001_000,
        "Used for system critical pods that must not be moved from their current node.",
    ),
    (
        "system-cluster-critical",
        2_000_000_000,
        "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
    ),
];

pub(super) fn priority_class(errors: &mut Errors, object: &Value) {
    let value = object["value"].as_i64().unwrap_or_default();
    let name = meta::name(object);
    if name.starts_with(SYSTEM) {
        let why = match SYSTEM_PRIORITIES.iter().find(|(n, ..)| *n == name) {
            None => Some(format!("{name} is not a known system priority class")),
            Some((_, v, _)) if *v != value => Some(format!("value of {name} PriorityClass must be {v}")),
            Some(_) if object["globalDefault"] == true => {
                Some(format!("globalDefault of {name} PriorityClass must be false"))
            }
            Some(_) => None,
        };
        if let Some(why) = why {
            let detail =
                format!("priority class names with '{SYSTEM}' prefix are reserved for system use only. error: {why}");
            errors.forbidden("metadata.name", &detail);
        }
    } else if value > USER_PRIORITY_MAX {
        let detail = format!("maximum allowed value of a user defined priority is {USER_PRIORITY_MAX}");
        errors.forbidden("value", &detail);
    }
    let policy = &object["preemptionPolicy"];
    if !policy.is_null() {
        errors.one_of("preemptionPolicy", policy, &["PreemptLowerPriority", "Never"]);
    }
}

pub(super) fn priority_class_update(errors: &mut Errors, new: &Value, old: &Value) {
    let value = |o: &Value| o["value"].as_i64().unwrap_or_default();
    if value(new) != value(old) {
        errors.forbidden("value", "may not be changed in an update.");
    }
    errors.immutable("preemptionPolicy", &new["preemptionPolicy"], &old["preemptionPolicy"]);
}

pub(super) fn storage_class(errors: &mut Errors, object: &Value) {
    match text(object, "provisioner") {
        "" => errors.required("provisioner", ""),
        name => errors.messages("provisioner", name, names::qualified(&name.to_lowercase())),
    }
    let mut bytes = 0;
    let parameters = object["parameters"].as_object();
    if parameters.is_some_and(|p| p.len() > PARAMETERS_MAX) {
        errors.push(FieldError::too_long("parameters", PARAMETERS_MAX));
    }
    for (key, value) in parameters.into_iter().flatten() {
        if key.is_empty() {
            errors.invalid("parameters", "", "field can not be empty.");
        }
        bytes += key.len() + value.as_str().map_or(0, str::len);
    }
    if bytes > PARAMETERS_BYTES_MAX {
        errors.push(FieldError::too_long("parameters", PARAMETERS_BYTES_MAX));
    }
    if !text(object, "reclaimPolicy").is_empty() {
        errors.one_of("reclaimPolicy", &object["reclaimPolicy"], &["Delete", "Retain"]);
    }
    errors.one_of(
        "volumeBindingMode",
        &object["volumeBindingMode"],
        &["Immediate", "WaitForFirstConsumer"],
    );
}

pub(super) fn storage_class_update(errors: &mut Errors, new: &Value, old: &Value) {
    for field in ["parameters", "provisioner", "reclaimPolicy", "volumeBindingMode"] {
        errors.immutable(field, &new[field], &old[field]);
    }
}

pub(super) fn ingress_class(errors: &mut Errors, object: &Value) {
    let path = "spec.controller";
    let controller = text(&object["spec"], "controller");
    if controller.len() > CONTROLLER_BYTES_MAX {
        errors.push(FieldError::too_long(path, CONTROLLER_BYTES_MAX));
    }
    match controller.split_once('/') {
        _ if controller.is_empty() => errors.required(path, ""),
        Some((host, rest)) if !host.is_empty() && !rest.is_empty() => {
            errors.messages(path, host, names::dns_subdomain(host));
        }
        _ => errors.invalid(
            path,
            controller,
            "must be a domain-prefixed path (such as \"acme.io/foo\")",
        ),
    }
    let parameters = &object["spec"]["parameters"];
    if parameters.is_null() {
        return;
    }
    reference(errors, "spec.parameters", parameters);
    let namespace = text(parameters, "namespace");
    let path = "spec.parameters.namespace";
    match text(parameters, "scope") {
        "" => errors.required("spec.parameters.scope", ""),
        "Namespace" if namespace.is_empty() => errors.required(path, "`parameters.scope` is set to 'Namespace'"),
        "Namespace" => errors.messages(path, namespace, names::dns_label(namespace)),
        "Cluster" if !namespace.is_empty() => errors.forbidden(path, "`parameters.scope` is set to 'Cluster'"),
        "Cluster" => {}
        _ => errors.one_of("spec.parameters.scope", &parameters["scope"], &["Cluster", "Namespace"]),
    }
}

/// A typed reference: group, kind, name.
pub(super) fn reference(errors: &mut Errors, path: &str, reference: &Value) {
    if let Some(group) = reference["apiGroup"].as_str() {
        errors.messages(&format!("{path}.apiGroup"), group, names::dns_subdomain(group));
    }
    for field in ["kind", "name"] {
        let path = format!("{path}.{field}");
        match text(reference, field) {
            "" => errors.required(path, ""),
            value => errors.messages(&path, value, names::path_segment(value)),
        }
    }
}

pub(super) fn controller_revision(errors: &mut Errors, object: &Value, created: bool) {
    errors.non_negative("revision", &object["revision"]);
    match &object["data"] {
        _ if !created => {}
        Value::Null => errors.required("data", "data is mandatory"),
        Value::Object(_) => {}
        _ => errors.required("data", "data must be a valid JSON object"),
    }
}

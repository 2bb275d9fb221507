//! Object metadata.

use serde_json::Value;

use super::{Errors, list, names, text};
use crate::gvk::Gvk;

/// Most bytes of all annotations together.
const ANNOTATIONS_BYTES_MAX: usize = 256 * 1024;

pub(super) type NameRule = fn(&str) -> Vec<String>;

/// How the names of a kind look; `None` for kinds that are not stored.
pub(super) fn name_rule(gvk: &Gvk) -> Option<NameRule> {
    match (&*gvk.group, &*gvk.kind) {
        ("", "Namespace" | "Service") => Some(names::dns_label),
        ("networking.k8s.io", "IPAddress") => Some(names::ip),
        ("policy", "PodDisruptionBudget") => Some(names::dns_subdomain),
        ("rbac.authorization.k8s.io", _) => Some(names::path_segment),
        ("authentication.k8s.io" | "authorization.k8s.io" | "autoscaling" | "policy" | "meta.k8s.io", _)
        | ("", "Binding") => None,
        (_, kind) if kind.ends_with("Options") => None,
        _ => Some(names::dns_subdomain),
    }
}

pub(super) fn create(errors: &mut Errors, object: &Value, rule: NameRule) {
    let meta = &object["metadata"];
    match text(meta, "name") {
        "" => errors.required("metadata.name", "name or generateName is required"),
        name => errors.messages("metadata.name", name, rule(name)),
    }
    let namespace = text(meta, "namespace");
    if !namespace.is_empty() {
        errors.messages("metadata.namespace", namespace, names::dns_label(namespace));
    }
    errors.non_negative("metadata.generation", &meta["generation"]);
    common(errors, meta);
    finalizers(errors, meta);
}

pub(super) fn update(errors: &mut Errors, new: &Value, old: &Value) {
    let (new, old) = (&new["metadata"], &old["metadata"]);
    if old["deletionTimestamp"].is_string() {
        let added: Vec<String> = list(&new["finalizers"])
            .iter()
            .filter(|f| !list(&old["finalizers"]).contains(f))
            .filter_map(|f| f.as_str().map(|f| format!("{f:?}")))
            .collect();
        if !added.is_empty() {
            errors.forbidden(
                "metadata.finalizers",
                &format!(
                    "no new finalizers can be added if the object is being deleted, found new finalizers [{}]",
                    added.join(", ")
                ),
            );
        }
    }
    let generation = |m: &Value| m["generation"].as_i64().unwrap_or_default();
    if generation(new) < generation(old) {
        errors.invalid("metadata.generation", generation(new), "must not be decremented");
    }
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ] {
        errors.immutable(&format!("metadata.{field}"), &new[field], &old[field]);
    }
    common(errors, new);
    finalizers(errors, new);
}

/// Metadata of an object inside another: it may have no name.
pub(super) fn embedded(errors: &mut Errors, meta: &Value) {
    for (field, rule) in [
        ("name", names::path_segment as NameRule),
        ("namespace", names::dns_label as NameRule),
    ] {
        let value = text(meta, field);
        if !value.is_empty() {
            errors.messages(&format!("metadata.{field}"), value, rule(value));
        }
    }
    for field in ["labels", "annotations"] {
        for (key, value) in meta[field].as_object().into_iter().flatten() {
            if !value.is_string() {
                errors.invalid(format!("metadata.{field}[{key}]"), value.clone(), "must be a string");
            }
        }
    }
    common(errors, meta);
    finalizers(errors, meta);
}

fn common(errors: &mut Errors, meta: &Value) {
    errors.labels("metadata.labels", &meta["labels"]);
    let mut bytes = 0;
    for (key, value) in meta["annotations"].as_object().into_iter().flatten() {
        errors.messages("metadata.annotations", key, names::qualified(&key.to_lowercase()));
        bytes += key.len() + value.as_str().map_or(0, str::len);
    }
    if bytes > ANNOTATIONS_BYTES_MAX {
        errors.push(crate::field::FieldError::too_long(
            "metadata.annotations",
            ANNOTATIONS_BYTES_MAX,
        ));
    }
    let path = "metadata.ownerReferences";
    let mut controller: Option<String> = None;
    for owner in list(&meta["ownerReferences"]) {
        let (_, version) = crate::gvk::split_api_version(text(owner, "apiVersion"));
        if version.is_empty() {
            errors.invalid(
                format!("{path}.apiVersion"),
                text(owner, "apiVersion"),
                "version must not be empty",
            );
        }
        for field in ["kind", "name", "uid"] {
            if text(owner, field).is_empty() {
                errors.invalid(format!("{path}.{field}"), "", "must not be empty");
            }
        }
        if owner["controller"] == true {
            let this = format!("{}/{}", text(owner, "kind"), text(owner, "name"));
            match &controller {
                Some(first) => {
                    let detail = format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {this}"
                    );
                    errors.invalid(path, meta["ownerReferences"].clone(), &detail);
                }
                None => controller = Some(this),
            }
        }
    }
}

/// Finalizers without a domain are the system's own.
pub(super) fn known_finalizers(errors: &mut Errors, object: &Value) {
    for (i, name) in list(&object["metadata"]["finalizers"]).iter().enumerate() {
        let text = name.as_str().unwrap_or_default();
        if !text.contains('/') && !matches!(text, "kubernetes" | "orphan" | "foregroundDeletion") {
            errors.invalid(
                format!("metadata.finalizers[{i}]"),
                text,
                "name is neither a standard finalizer name nor is it fully qualified",
            );
        }
    }
}

fn finalizers(errors: &mut Errors, meta: &Value) {
    let all: Vec<&str> = list(&meta["finalizers"]).iter().filter_map(Value::as_str).collect();
    for name in &all {
        errors.messages("metadata.finalizers", name, names::qualified(name));
    }
    if all.contains(&"orphan") && all.contains(&"foregroundDeletion") {
        let detail = "finalizer foregroundDeletion and orphan cannot be both set";
        errors.invalid("metadata.finalizers", meta["finalizers"].clone(), detail);
    }
}

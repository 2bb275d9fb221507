//! Roles and bindings.

use serde_json::Value;

use super::{Errors, list, names, text, workload};
use crate::field::FieldError;

const GROUP: &str = "rbac.authorization.k8s.io";

pub(super) fn rules(errors: &mut Errors, object: &Value, namespaced: bool) {
    for (i, rule) in list(&object["rules"]).iter().enumerate() {
        let at = |field: &str| format!("rules[{i}].{field}");
        let empty = |field: &str| list(&rule[field]).is_empty();
        if empty("verbs") {
            errors.required(at("verbs"), "verbs must contain at least one value");
        }
        if !empty("nonResourceURLs") {
            let urls = &rule["nonResourceURLs"];
            if namespaced {
                let detail = "namespaced rules cannot apply to non-resource URLs";
                errors.invalid(at("nonResourceURLs"), urls.clone(), detail);
            }
            if !empty("apiGroups") || !empty("resources") || !empty("resourceNames") {
                let detail = "rules cannot apply to both regular resources and non-resource URLs";
                errors.invalid(at("nonResourceURLs"), urls.clone(), detail);
            }
            continue;
        }
        if empty("apiGroups") {
            errors.required(at("apiGroups"), "resource rules must supply at least one api group");
        }
        if empty("resources") {
            errors.required(at("resources"), "resource rules must supply at least one resource");
        }
    }
    if object["aggregationRule"].is_object() {
        let path = "aggregationRule.clusterRoleSelectors";
        let selectors = list(&object["aggregationRule"]["clusterRoleSelectors"]);
        if selectors.is_empty() {
            errors.required(
                path,
                "at least one clusterRoleSelector required if aggregationRule is non-nil",
            );
        }
        for (i, selector) in selectors.iter().enumerate() {
            workload::label_selector(errors, &format!("{path}[{i}]"), selector);
        }
    }
}

pub(super) fn binding(errors: &mut Errors, object: &Value, namespaced: bool) {
    let role = &object["roleRef"];
    if text(role, "apiGroup") != GROUP {
        errors.push(FieldError::not_supported(
            "roleRef.apiGroup",
            text(role, "apiGroup"),
            &[GROUP],
        ));
    }
    let kinds: &[&str] = if namespaced {
        &["Role", "ClusterRole"]
    } else {
        &["ClusterRole"]
    };
    if !kinds.contains(&text(role, "kind")) {
        errors.push(FieldError::not_supported("roleRef.kind", text(role, "kind"), kinds));
    }
    match text(role, "name") {
        "" => errors.required("roleRef.name", ""),
        name => errors.messages("roleRef.name", name, names::path_segment(name)),
    }
    for (i, subject) in list(&object["subjects"]).iter().enumerate() {
        let at = |field: &str| format!("subjects[{i}].{field}");
        let (kind, name, group) = (text(subject, "kind"), text(subject, "name"), text(subject, "apiGroup"));
        if name.is_empty() {
            errors.required(at("name"), "");
        }
        match kind {
            "ServiceAccount" => {
                if !name.is_empty() {
                    errors.messages(&at("name"), name, names::dns_subdomain(name));
                }
                if !group.is_empty() {
                    errors.push(FieldError::not_supported(at("apiGroup"), group, &[""]));
                }
                if !namespaced && text(subject, "namespace").is_empty() {
                    errors.required(at("namespace"), "");
                }
            }
            "User" | "Group" if group != GROUP => {
                errors.push(FieldError::not_supported(at("apiGroup"), group, &[GROUP]));
            }
            "User" | "Group" => {}
            other => errors.push(FieldError::not_supported(
                at("kind"),
                other,
                &["ServiceAccount", "User", "Group"],
            )),
        }
    }
}

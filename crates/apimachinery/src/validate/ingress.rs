//! Ingresses.

use serde_json::Value;

use super::{Errors, classes, list, names, text};
use crate::meta;

const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";
const FORBIDDEN_PARTS: [&str; 5] = ["//", "/./", "/../", "%2f", "%2F"];
const FORBIDDEN_ENDS: [&str; 2] = ["/..", "/."];

pub(super) fn ingress(errors: &mut Errors, object: &Value) {
    let spec = &object["spec"];
    let rules = list(&spec["rules"]);
    let default = &spec["defaultBackend"];
    if rules.is_empty() && default.is_null() {
        let detail = "either `defaultBackend` or `rules` must be specified";
        errors.invalid("spec", Value::Null, detail);
    }
    if !default.is_null() {
        backend(errors, "spec.defaultBackend", default);
    }
    for (i, rule) in rules.iter().enumerate() {
        let path = format!("spec.rules[{i}]");
        let name = text(rule, "host");
        if !name.is_empty() {
            if name.parse::<std::net::IpAddr>().is_ok() {
                errors.invalid(format!("{path}.host"), name, "must be a DNS name, not an IP address");
            }
            host(errors, &format!("{path}.host"), name);
        }
        let http = &rule["http"];
        if http.is_null() {
            continue;
        }
        let paths = list(&http["paths"]);
        if paths.is_empty() {
            errors.required(format!("{path}.http.paths"), "");
        }
        for (j, one) in paths.iter().enumerate() {
            http_path(errors, &format!("{path}.http.paths[{j}]"), one);
        }
    }
    for (i, tls) in list(&spec["tls"]).iter().enumerate() {
        let path = format!("spec.tls[{i}]");
        for (j, name) in list(&tls["hosts"]).iter().enumerate() {
            host(errors, &format!("{path}.hosts[{j}]"), name.as_str().unwrap_or_default());
        }
        let secret = text(tls, "secretName");
        if !secret.is_empty() {
            errors.messages(&format!("{path}.secretName"), secret, names::dns_subdomain(secret));
        }
    }
    if let Some(class) = spec["ingressClassName"].as_str() {
        errors.messages("spec.ingressClassName", class, names::dns_subdomain(class));
    }
}

/// What is checked of a new object only.
pub(super) fn created(errors: &mut Errors, object: &Value) {
    if let (Some(annotation), Some(class)) = (
        meta::annotation(object, CLASS_ANNOTATION),
        object["spec"]["ingressClassName"].as_str(),
    ) && annotation != class
    {
        let path = format!("annotations.{CLASS_ANNOTATION}");
        errors.invalid(
            path,
            annotation,
            "must match `ingressClassName` when both are specified",
        );
    }
}

fn host(errors: &mut Errors, path: &str, name: &str) {
    let rule = if name.contains('*') {
        names::wildcard_subdomain
    } else {
        names::dns_subdomain
    };
    errors.messages(path, name, rule(name));
}

fn http_path(errors: &mut Errors, path: &str, value: &Value) {
    let at = format!("{path}.path");
    let given = text(value, "path");
    let absolute = "must be an absolute path";
    match value["pathType"].as_str() {
        None => {
            errors.required(format!("{path}.pathType"), "pathType must be specified");
            return;
        }
        Some("Exact" | "Prefix") => {
            if !given.starts_with('/') {
                errors.invalid(&*at, given, absolute);
            }
            for part in FORBIDDEN_PARTS.iter().filter(|p| given.contains(**p)) {
                errors.invalid(&*at, given, &format!("must not contain '{part}'"));
            }
            for end in FORBIDDEN_ENDS.iter().filter(|e| given.ends_with(**e)) {
                errors.invalid(&*at, given, &format!("cannot end with '{end}'"));
            }
        }
        Some("ImplementationSpecific") => {
            if !given.is_empty() && !given.starts_with('/') {
                errors.invalid(&*at, given, absolute);
            }
        }
        Some(_) => errors.one_of(
            &format!("{path}.pathType"),
            &value["pathType"],
            &["Exact", "ImplementationSpecific", "Prefix"],
        ),
    }
    backend(errors, &format!("{path}.backend"), &value["backend"]);
}

fn backend(errors: &mut Errors, path: &str, value: &Value) {
    let (service, resource) = (&value["service"], &value["resource"]);
    match (service.is_null(), resource.is_null()) {
        (false, false) => {
            errors.invalid(path, "", "cannot set both resource and service backends");
            return;
        }
        (true, true) => {
            errors.invalid(path, "", "resource or service backend is required");
            return;
        }
        (true, false) => {
            classes::reference(errors, &format!("{path}.resource"), resource);
            return;
        }
        (false, true) => {}
    }
    match text(service, "name") {
        "" => errors.required(format!("{path}.service.name"), ""),
        name => errors.messages(&format!("{path}.service.name"), name, names::dns_label(name)),
    }
    let name = text(&service["port"], "name");
    let number = service["port"]["number"].as_i64().unwrap_or_default();
    match (name.is_empty(), number) {
        (true, 0) => errors.required(path, "port name or number is required"),
        (true, _) => errors.port_number(&format!("{path}.service.port.number"), &service["port"]["number"]),
        (false, 0) => errors.messages(&format!("{path}.service.port.name"), name, names::port_name(name)),
        (false, _) => errors.invalid(path, "", "cannot set both port name & port number"),
    }
}

//! Probes and lifecycle hooks.

use serde_json::Value;

use super::{Errors, list, text};
use crate::field::FieldError;

/// Every probe and hook of a container.
pub(super) fn all(errors: &mut Errors, path: &str, container: &Value) {
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let p = &container[name];
        if p.is_null() {
            continue;
        }
        let path = format!("{path}.{name}");
        handler(errors, &path, p);
        for field in [
            "initialDelaySeconds",
            "timeoutSeconds",
            "periodSeconds",
            "successThreshold",
            "failureThreshold",
        ] {
            errors.non_negative(&format!("{path}.{field}"), &p[field]);
        }
        let grace = &p["terminationGracePeriodSeconds"];
        if grace.as_i64().is_some_and(|g| g <= 0) {
            errors.invalid(
                format!("{path}.terminationGracePeriodSeconds"),
                grace.clone(),
                "must be greater than 0",
            );
        }
        if name == "readinessProbe" {
            if !grace.is_null() {
                let detail = "must not be set for readinessProbes";
                errors.invalid(format!("{path}.terminationGracePeriodSeconds"), grace.clone(), detail);
            }
        } else if p["successThreshold"].as_i64() != Some(1) {
            errors.invalid(
                format!("{path}.successThreshold"),
                p["successThreshold"].clone(),
                "must be 1",
            );
        }
    }
    for hook in ["postStart", "preStop"] {
        let h = &container["lifecycle"][hook];
        if !h.is_null() {
            handler(errors, &format!("{path}.lifecycle.{hook}"), h);
        }
    }
}

fn handler(errors: &mut Errors, path: &str, holder: &Value) {
    let mut found = 0;
    for name in ["exec", "httpGet", "tcpSocket", "grpc", "sleep"] {
        let h = &holder[name];
        if h.is_null() {
            continue;
        }
        let path = format!("{path}.{name}");
        found += 1;
        if found > 1 {
            errors.forbidden(path, "may not specify more than 1 handler type");
            continue;
        }
        match name {
            "exec" if list(&h["command"]).is_empty() => errors.required(format!("{path}.command"), ""),
            "httpGet" => {
                if text(h, "path").is_empty() {
                    errors.required(format!("{path}.path"), "");
                }
                errors.port_number_or_name(&format!("{path}.port"), &h["port"]);
                if !matches!(text(h, "scheme"), "HTTP" | "HTTPS") {
                    errors.push(FieldError::not_supported(
                        format!("{path}.scheme"),
                        text(h, "scheme"),
                        &["HTTP", "HTTPS"],
                    ));
                }
            }
            "tcpSocket" => errors.port_number_or_name(&format!("{path}.port"), &h["port"]),
            "grpc" => errors.port_number(&format!("{path}.port"), &h["port"]),
            _ => {}
        }
    }
    if found == 0 {
        errors.required(path, "must specify a handler type");
    }
}

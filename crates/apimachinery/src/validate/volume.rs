//! Volumes and where containers mount them.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Errors, list, names, text};
use crate::field::FieldError;

/// Checks the volumes and returns the names that mounts may use.
pub(super) fn volumes<'v>(errors: &mut Errors, path: &str, volumes: &'v Value) -> BTreeSet<&'v str> {
    let mut known = BTreeSet::new();
    for (i, v) in list(volumes).iter().enumerate() {
        let path = format!("{path}[{i}]");
        let before = errors.0.len();
        source(errors, &path, v);
        let name = text(v, "name");
        if name.is_empty() {
            errors.required(format!("{path}.name"), "");
        } else {
            errors.messages(&format!("{path}.name"), name, names::dns_label(name));
        }
        if known.contains(name) {
            errors.push(FieldError::duplicate(format!("{path}.name"), name));
        }
        if errors.0.len() == before {
            known.insert(name);
        }
    }
    known
}

fn source(errors: &mut Errors, path: &str, volume: &Value) {
    let sources: Vec<&String> = volume
        .as_object()
        .into_iter()
        .flat_map(|o| o.keys())
        .filter(|k| *k != "name")
        .collect();
    if sources.is_empty() {
        errors.required(path, "must specify a volume type");
    }
    for (i, name) in sources.iter().enumerate() {
        let at = format!("{path}.{name}");
        if i > 0 {
            errors.forbidden(at, "may not specify more than 1 volume type");
            continue;
        }
        let v = &volume[name.as_str()];
        let mut need = |field: &str| {
            if text(v, field).is_empty() {
                errors.required(format!("{at}.{field}"), "");
            }
        };
        match name.as_str() {
            "secret" => need("secretName"),
            "configMap" => need("name"),
            "persistentVolumeClaim" => need("claimName"),
            "csi" => need("driver"),
            "nfs" => ["server", "path"].into_iter().for_each(need),
            "hostPath" => {
                need("path");
                if text(v, "path").split('/').any(|part| part == "..") {
                    errors.invalid(format!("{at}.path"), text(v, "path"), "must not contain '..'");
                }
            }
            _ => {}
        }
        let mode = &v["defaultMode"];
        if mode.as_i64().is_some_and(|m| !(0..=0o777).contains(&m)) {
            let detail = "must be a number between 0 and 0777 (octal), both inclusive";
            errors.invalid(format!("{at}.defaultMode"), mode.clone(), detail);
        }
        if matches!(name.as_str(), "secret" | "configMap") {
            for (j, item) in list(&v["items"]).iter().enumerate() {
                let at = format!("{at}.items[{j}]");
                if text(item, "key").is_empty() {
                    errors.required(format!("{at}.key"), "");
                }
                relative(errors, &format!("{at}.path"), text(item, "path"), true);
            }
        }
    }
}

pub(super) fn mounts(errors: &mut Errors, path: &str, container: &Value, volumes: &BTreeSet<&str>) {
    let mut taken = BTreeSet::new();
    for (i, m) in list(&container["volumeMounts"]).iter().enumerate() {
        let at = |field: &str| format!("{path}.volumeMounts[{i}].{field}");
        let (name, mount) = (text(m, "name"), text(m, "mountPath"));
        if name.is_empty() {
            errors.required(at("name"), "");
        }
        if !volumes.contains(name) {
            errors.push(FieldError::not_found(at("name"), name));
        }
        if mount.is_empty() {
            errors.required(at("mountPath"), "");
        }
        if !taken.insert(mount) {
            errors.invalid(at("mountPath"), mount, "must be unique");
        }
        let (sub, expr) = (text(m, "subPath"), text(m, "subPathExpr"));
        if !sub.is_empty() {
            relative(errors, &format!("{path}.volumeMounts.subPath"), sub, false);
        }
        if !expr.is_empty() {
            if !sub.is_empty() {
                errors.invalid(
                    at("subPathExpr"),
                    expr,
                    "subPathExpr and subPath are mutually exclusive",
                );
            }
            relative(errors, &format!("{path}.volumeMounts.subPathExpr"), expr, false);
        }
    }
}

fn relative(errors: &mut Errors, path: &str, value: &str, required: bool) {
    if value.is_empty() && required {
        errors.required(path, "");
        return;
    }
    if value.starts_with('/') {
        errors.invalid(path, value, "must be a relative path");
    }
    if value.split('/').any(|part| part == "..") {
        errors.invalid(path, value, "must not contain '..'");
    }
}

//! ConfigMaps, Secrets, nodes, leases and small request kinds.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::{Errors, list, names, pod, text};
use crate::field::FieldError;

/// Most bytes of data in a Secret or ConfigMap.
const DATA_BYTES_MAX: usize = 1024 * 1024;

pub(super) fn secret(errors: &mut Errors, object: &Value) {
    let mut bytes = 0;
    for (key, value) in object["data"].as_object().into_iter().flatten() {
        errors.messages(&format!("data[{key}]"), key, names::config_key(key));
        bytes += value.as_str().map_or(0, |v| v.len() / 4 * 3);
    }
    if bytes > DATA_BYTES_MAX {
        errors.push(FieldError::too_long("data", DATA_BYTES_MAX));
    }
    let data = &object["data"];
    // `stringData` becomes data before it is stored, so either satisfies a requirement.
    let has = |key: &str| !data[key].is_null() || !object["stringData"][key].is_null();
    let mut need = |key: &str| {
        if !has(key) {
            errors.required(format!("data[{key}]"), "");
        }
    };
    match text(object, "type") {
        "kubernetes.io/service-account-token" => {
            let key = "kubernetes.io/service-account.name";
            if text(&object["metadata"]["annotations"], key).is_empty() {
                errors.required(format!("metadata.annotations[{key}]"), "");
            }
        }
        "kubernetes.io/dockercfg" => {
            need(".dockercfg");
            registry_credentials(errors, object, ".dockercfg");
        }
        "kubernetes.io/dockerconfigjson" => {
            need(".dockerconfigjson");
            registry_credentials(errors, object, ".dockerconfigjson");
        }
        "kubernetes.io/basic-auth" if !has("username") && !has("password") => {
            need("username");
            need("password");
        }
        "kubernetes.io/ssh-auth" => need("ssh-privatekey"),
        "kubernetes.io/tls" => {
            need("tls.crt");
            need("tls.key");
        }
        _ => {}
    }
}

fn registry_credentials(errors: &mut Errors, object: &Value, key: &str) {
    let decoded = match (&object["stringData"][key], &object["data"][key]) {
        (Value::String(plain), _) => plain.clone().into_bytes(),
        (_, Value::String(encoded)) => STANDARD.decode(encoded).unwrap_or_default(),
        _ => return,
    };
    if let Err(e) = serde_json::from_slice::<Map<String, Value>>(&decoded) {
        errors.invalid(format!("data[{key}]"), "<secret contents redacted>", &e.to_string());
    }
}

pub(super) fn config_map(errors: &mut Errors, object: &Value) {
    let mut bytes = 0;
    for (key, value) in object["data"].as_object().into_iter().flatten() {
        let path = format!("data[{key}]");
        errors.messages(&path, key, names::config_key(key));
        if !object["binaryData"][key].is_null() {
            errors.invalid(path, key.as_str(), "duplicate of key present in binaryData");
        }
        bytes += value.as_str().map_or(0, str::len);
    }
    for (key, value) in object["binaryData"].as_object().into_iter().flatten() {
        errors.messages(&format!("binaryData[{key}]"), key, names::config_key(key));
        bytes += value.as_str().map_or(0, |v| v.len() / 4 * 3);
    }
    if bytes > DATA_BYTES_MAX {
        errors.push(FieldError::too_long("", DATA_BYTES_MAX));
    }
}

pub(super) fn node(errors: &mut Errors, object: &Value) {
    let mut taken = Vec::new();
    for (i, taint) in list(&object["spec"]["taints"]).iter().enumerate() {
        let path = format!("metadata.taints[{i}]");
        let (key, value, effect) = (text(taint, "key"), text(taint, "value"), text(taint, "effect"));
        errors.messages(&format!("{path}.key"), key, names::qualified(key));
        let wrong = names::label_value(value);
        if !wrong.is_empty() {
            errors.invalid(format!("{path}.value"), value, &wrong.join(";"));
        }
        pod::taint_effect(errors, &format!("{path}.effect"), effect, false);
        if taken.contains(&(key, effect)) {
            let mut error = FieldError::duplicate(path, taint.clone());
            error.detail = "taints must be unique by key and effect pair".into();
            errors.push(error);
        }
        taken.push((key, effect));
    }
    for list in ["capacity", "allocatable"] {
        for (name, value) in object["status"][list].as_object().into_iter().flatten() {
            let quantity = value.as_str().and_then(|v| crate::quantity::Quantity::parse(v).ok());
            if quantity.is_some_and(|q| q.is_negative()) {
                errors.invalid(
                    format!("status.{list}[{name}]"),
                    value.clone(),
                    "must be greater than or equal to 0",
                );
            }
        }
    }
}

pub(super) fn lease(errors: &mut Errors, object: &Value) {
    let spec = &object["spec"];
    if let Some(seconds) = spec["leaseDurationSeconds"].as_i64().filter(|s| *s <= 0) {
        errors.invalid("spec.leaseDurationSeconds", seconds, "must be greater than 0");
    }
    errors.non_negative("spec.leaseTransitions", &spec["leaseTransitions"]);
}

pub(super) fn binding(errors: &mut Errors, object: &Value) {
    let target = &object["target"];
    if !matches!(text(target, "kind"), "" | "Node") {
        errors.push(FieldError::not_supported(
            "target.kind",
            text(target, "kind"),
            &["Node", "<empty>"],
        ));
    }
    if text(target, "name").is_empty() {
        errors.required("target.name", "");
    }
}

pub(super) fn token_request(errors: &mut Errors, object: &Value) {
    let seconds = object["spec"]["expirationSeconds"].as_i64().unwrap_or(3600);
    if seconds < 600 {
        errors.invalid(
            "spec.expirationSeconds",
            seconds,
            "may not specify a duration less than 10 minutes",
        );
    } else if seconds > 1 << 32 {
        errors.invalid(
            "spec.expirationSeconds",
            seconds,
            "may not specify a duration larger than 2^32 seconds",
        );
    }
}

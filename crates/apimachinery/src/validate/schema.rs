//! Custom kinds: what their schema says beyond types.

use serde_json::Value;

use super::{Errors, meta};
use crate::field::FieldError;
use crate::gvk::Gvk;
use crate::table::TypeTable;

/// Deepest nesting that is checked.
const DEPTH_MAX: usize = 64;

/// Field errors of an object of an overlay kind: its metadata, required fields, choices, bounds and unique list keys.
/// `old` is given for an update. Patterns are not checked.
pub fn custom(table: &TypeTable, gvk: &Gvk, object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Errors::default();
    if let Some(rule) = meta::name_rule(gvk) {
        match old {
            Some(old) => meta::update(&mut errors, object, old),
            None => meta::create(&mut errors, object, rule),
        }
    }
    if let Some(schema) = table.kind_of(gvk).and_then(|k| k.def.schema.clone()) {
        check(&mut errors, "", object, &schema, 0);
    }
    errors.0
}

fn check(errors: &mut Errors, path: &str, value: &Value, schema: &Value, depth: usize) {
    if depth > DEPTH_MAX || (value.is_null() && schema["nullable"] == true) {
        return;
    }
    let join = |key: &str| {
        if path.is_empty() {
            key.to_owned()
        } else {
            format!("{path}.{key}")
        }
    };
    if let Some(choices) = schema["enum"].as_array()
        && !choices.contains(value)
    {
        let shown: Vec<&str> = choices.iter().filter_map(Value::as_str).collect();
        errors.push(FieldError::not_supported(path, value.clone(), &shown));
    }
    match value {
        Value::Object(object) => {
            for key in schema["required"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
            {
                if !object.contains_key(key) {
                    errors.required(join(key), "");
                }
            }
            for (key, value) in object {
                if let Some(schema) = schema["properties"].get(key) {
                    check(errors, &join(key), value, schema, depth + 1);
                } else if schema["additionalProperties"].is_object() {
                    check(errors, &join(key), value, &schema["additionalProperties"], depth + 1);
                }
            }
        }
        Value::Array(items) => {
            if let Some(max) = schema["maxItems"].as_u64().filter(|max| items.len() as u64 > *max) {
                errors.push(FieldError::too_many(path, items.len(), max as usize));
            }
            if let Some(min) = schema["minItems"].as_u64().filter(|min| (items.len() as u64) < *min) {
                errors.invalid(path, items.len(), &format!("should have at least {min} items"));
            }
            unique(errors, path, items, schema);
            for (i, item) in items.iter().enumerate() {
                check(errors, &format!("{path}[{i}]"), item, &schema["items"], depth + 1);
            }
        }
        Value::String(text) => {
            let length = text.chars().count() as u64;
            if let Some(max) = schema["maxLength"].as_u64().filter(|max| length > *max) {
                errors.push(FieldError::too_long(path, max as usize));
            }
            if let Some(min) = schema["minLength"].as_u64().filter(|min| length < *min) {
                errors.invalid(path, text.as_str(), &format!("should be at least {min} chars long"));
            }
        }
        Value::Number(number) => {
            let number = number.as_f64().unwrap_or_default();
            if let Some(min) = schema["minimum"].as_f64().filter(|min| number < *min) {
                errors.invalid(
                    path,
                    value.clone(),
                    &format!("should be greater than or equal to {min}"),
                );
            }
            if let Some(max) = schema["maximum"].as_f64().filter(|max| number > *max) {
                errors.invalid(path, value.clone(), &format!("should be less than or equal to {max}"));
            }
        }
        Value::Bool(_) | Value::Null => {}
    }
}

fn unique(errors: &mut Errors, path: &str, items: &[Value], schema: &Value) {
    let keys: Vec<&str> = match schema["x-kubernetes-list-type"].as_str() {
        Some("set") => Vec::new(),
        Some("map") => schema["x-kubernetes-list-map-keys"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect(),
        _ => return,
    };
    let same = |a: &Value, b: &Value| {
        if keys.is_empty() {
            a == b
        } else {
            keys.iter().all(|k| a[*k] == b[*k])
        }
    };
    for (i, item) in items.iter().enumerate() {
        if items[..i].iter().any(|before| same(before, item)) {
            errors.push(FieldError::duplicate(format!("{path}[{i}]"), item.clone()));
        }
    }
}

//! Whole objects inside objects (`x-kubernetes-embedded-resource`).

use serde_json::Value;

use super::{Additional, Node, Structural, join};
use crate::field::FieldError;
use crate::validate::embedded_metadata;

impl Structural {
    /// What is wrong with the type and metadata of embedded objects.
    pub(crate) fn check_embedded(&self, object: &Value) -> Vec<FieldError> {
        let mut errors = Vec::new();
        walk(&self.root, "", object, &mut errors);
        errors
    }
}

fn walk(node: &Node, path: &str, value: &Value, errors: &mut Vec<FieldError>) {
    match value {
        Value::Object(fields) => {
            if node.embedded {
                resource(path, value, errors);
            }
            for (key, value) in fields {
                match (node.properties.get(key.as_str()), &node.additional) {
                    (Some(property), _) => walk(property, &join(path, key), value, errors),
                    (None, Additional::Schema(inner)) => walk(inner, &format!("{path}[{key}]"), value, errors),
                    _ => {}
                }
            }
        }
        Value::Array(items) => {
            if let Some(inner) = &node.items {
                for (i, item) in items.iter().enumerate() {
                    walk(inner, &format!("{path}[{i}]"), item, errors);
                }
            }
        }
        _ => {}
    }
}

fn resource(path: &str, object: &Value, errors: &mut Vec<FieldError>) {
    for key in ["apiVersion", "kind"] {
        match object.get(key) {
            None | Some(Value::Null) => errors.push(FieldError::required(join(path, key), "")),
            Some(Value::String(text)) if text.is_empty() => {
                errors.push(FieldError::required(join(path, key), "must not be empty"));
            }
            Some(Value::String(text)) if key == "apiVersion" && text.matches('/').count() > 1 => {
                let detail = format!("unexpected GroupVersion string: {text}");
                errors.push(FieldError::invalid(join(path, key), text.as_str(), &detail));
            }
            Some(Value::String(_)) => {}
            Some(other) => {
                let detail = "must be a string";
                errors.push(FieldError::invalid(join(path, key), other.clone(), detail));
            }
        }
    }
    if let Some(metadata) = object.get("metadata").filter(|m| !m.is_null()) {
        errors.extend(embedded_metadata(&join(path, "metadata"), metadata));
    }
}

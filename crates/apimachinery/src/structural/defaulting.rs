//! Filling in what a schema says is there when nothing is.

use serde_json::Value;

use super::{Additional, Node, Structural, prune};
use crate::field::FieldError;

impl Structural {
    /// Sets defaults in place. A null that its schema does not allow is replaced by the default, or dropped if there is
    /// none. Idempotent.
    pub fn default(&self, object: &mut Value) {
        apply(object, &self.root);
    }

    /// What is wrong with the defaults of a schema: unknown fields in them, and values that do not satisfy it. Paths are
    /// below `path`.
    pub fn check_defaults(&self, path: &str) -> Vec<FieldError> {
        let mut errors = Vec::new();
        check(&self.root, path, &mut errors);
        errors
    }
}

fn is_wrong_null(value: &Value, node: &Node) -> bool {
    value.is_null() && !node.nullable
}

fn apply(value: &mut Value, node: &Node) {
    match value {
        Value::Object(fields) => {
            for (name, property) in &node.properties {
                let missing = fields.get(&**name).is_none_or(|v| is_wrong_null(v, property));
                if !missing {
                    continue;
                }
                match &property.default {
                    Some(default) => drop(fields.insert(name.to_string(), default.clone())),
                    None => drop(fields.remove(&**name)),
                }
            }
            fields.retain(|name, value| {
                let inner = match (node.properties.get(name.as_str()), &node.additional) {
                    (Some(property), _) => property,
                    (None, Additional::Schema(inner)) => inner,
                    _ => return true,
                };
                if is_wrong_null(value, inner) {
                    match &inner.default {
                        Some(default) => *value = default.clone(),
                        None => return false,
                    }
                }
                apply(value, inner);
                true
            });
        }
        Value::Array(items) => {
            let Some(inner) = node.items.as_deref() else { return };
            for item in items {
                if let Some(default) = &inner.default
                    && is_wrong_null(item, inner)
                {
                    *item = default.clone();
                }
                apply(item, inner);
            }
        }
        _ => {}
    }
}

fn check(node: &Node, path: &str, errors: &mut Vec<FieldError>) {
    if let Some(default) = &node.default {
        let at = format!("{path}.default");
        let mut pruned = default.clone();
        prune::prune_default(&mut pruned, node);
        if pruned != *default {
            errors.push(FieldError::invalid(
                &*at,
                default.clone(),
                "must not have unknown fields",
            ));
        }
        let found = node.check_value(default);
        errors.extend(found.into_iter().map(|mut error| {
            error.path = if error.path.is_empty() {
                at.clone()
            } else {
                format!("{at}.{}", error.path)
            };
            error
        }));
    }
    if let Some(items) = &node.items {
        check(items, &format!("{path}.items"), errors);
    }
    for (name, property) in &node.properties {
        check(property, &format!("{path}.properties[{name}]"), errors);
    }
}

//! Lists whose items must differ: sets, and lists of objects told apart by keys.

use std::collections::HashMap;

use serde_json::Value;

use super::{Additional, Node, Structural, join};
use crate::field::FieldError;
use crate::table::ListKind;

impl Structural {
    /// Items that occur twice in sets and keyed lists. Lists that are as they were in `old` are left alone.
    pub(crate) fn check_lists(&self, object: &Value, old: Option<&Value>) -> Vec<FieldError> {
        let mut errors = Vec::new();
        walk(&self.root, "", object, old, &mut errors);
        errors
    }
}

fn walk(node: &Node, path: &str, value: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    if old.is_some_and(|old| old == value) {
        return;
    }
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let (inner, at) = match (node.properties.get(key.as_str()), &node.additional) {
                    (Some(property), _) => (property, join(path, key)),
                    (None, Additional::Schema(inner)) => (&**inner, format!("{path}[{key}]")),
                    _ => continue,
                };
                walk(inner, &at, value, old.and_then(|o| o.get(key)), errors);
            }
        }
        Value::Array(items) => {
            match node.list {
                ListKind::Set => duplicates(path, items, |item| item.to_string(), Value::clone, errors),
                ListKind::Map => keyed(node, path, items, errors),
                _ => {}
            }
            if let Some(inner) = &node.items {
                for (i, item) in items.iter().enumerate() {
                    walk(inner, &format!("{path}[{i}]"), item, None, errors);
                }
            }
        }
        _ => {}
    }
}

fn keyed(node: &Node, path: &str, items: &[Value], errors: &mut Vec<FieldError>) {
    for (i, item) in items.iter().enumerate() {
        if !item.is_object() && !item.is_null() {
            let detail = "must be an object for an array of list-type map";
            errors.push(FieldError::invalid(format!("{path}[{i}]"), item.clone(), detail));
            return;
        }
    }
    let keys = |item: &Value| -> Value {
        let found = node.list_keys.iter();
        found
            .filter_map(|key| Some((key.to_string(), item.get(&**key)?.clone())))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    duplicates(path, items, |item| keys(item).to_string(), keys, errors);
}

/// Reports the second of equal items, once for each.
fn duplicates(
    path: &str,
    items: &[Value],
    identity: impl Fn(&Value) -> String,
    shown: impl Fn(&Value) -> Value,
    errors: &mut Vec<FieldError>,
) {
    let mut seen: HashMap<String, usize> = HashMap::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let times = seen.entry(identity(item)).or_default();
        *times += 1;
        if *times == 2 {
            errors.push(FieldError::duplicate(format!("{path}[{i}]"), shown(item)));
        }
    }
}

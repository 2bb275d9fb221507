//! Dropping fields that a schema does not name.

use serde_json::Value;

use super::{Additional, META_FIELDS, Node, Structural};

/// Most paths that are collected; more unknown fields are dropped all the same.
const UNKNOWN_MAX: usize = 100;

impl Structural {
    /// Drops unknown fields of an object, apart from `apiVersion`, `kind` and `metadata`, and returns their paths, sorted.
    pub fn prune(&self, object: &mut Value) -> Vec<String> {
        let mut unknown = Unknown::default();
        prune(object, Some(&self.root), true, &mut unknown);
        unknown.found.sort();
        unknown.found
    }
}

#[derive(Default)]
struct Unknown {
    path: Vec<String>,
    found: Vec<String>,
}

impl Unknown {
    fn record(&mut self, key: &str) {
        if self.found.len() < UNKNOWN_MAX {
            let mut path = self.path.concat();
            if !path.is_empty() {
                path.push('.');
            }
            self.found.push(path + key);
        }
    }

    fn within<T>(&mut self, segment: String, walk: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(segment);
        let out = walk(self);
        self.path.pop();
        out
    }

    fn key<T>(&mut self, key: &str, walk: impl FnOnce(&mut Self) -> T) -> T {
        let dot = if self.path.is_empty() { "" } else { "." };
        self.within(format!("{dot}{key}"), walk)
    }
}

/// Without a node nothing is known, so objects lose all fields.
pub(super) fn prune_default(value: &mut Value, node: &super::Node) {
    prune(value, Some(node), node.embedded, &mut Unknown::default());
}

fn prune(value: &mut Value, node: Option<&Node>, resource: bool, unknown: &mut Unknown) {
    let open = node.is_some_and(|n| n.preserve);
    let resource = resource || node.is_some_and(|n| n.embedded);
    match value {
        Value::Object(fields) => fields.retain(|key, value| {
            let Some(node) = node else {
                unknown.record(key);
                return false;
            };
            if resource && META_FIELDS.contains(&key.as_str()) {
                return true;
            }
            if let Some(property) = node.properties.get(key.as_str()) {
                unknown.key(key, |u| prune(value, Some(property), false, u));
                return true;
            }
            match &node.additional {
                Additional::Schema(inner) => unknown.key(key, |u| prune(value, Some(inner), false, u)),
                Additional::Allowed | Additional::Forbidden => unknown.key(key, |u| prune(value, None, false, u)),
                Additional::Unset if open => {}
                Additional::Unset => {
                    unknown.record(key);
                    return false;
                }
            }
            true
        }),
        Value::Array(items) => {
            let inner = node.and_then(|n| n.items.as_deref());
            for (i, item) in items.iter_mut().enumerate() {
                if open && inner.is_none() {
                    continue;
                }
                unknown.within(format!("[{i}]"), |u| prune(item, inner, false, u));
            }
        }
        _ => {}
    }
}

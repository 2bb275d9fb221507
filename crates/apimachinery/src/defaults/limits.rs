//! Defaults of LimitRanges: what the bounds say about containers that name nothing.

use serde_json::{Map, Value};

use super::{Object, child};

/// The default limit is the maximum, the default request the default limit, else the minimum.
pub(super) fn limit_range_item(item: &mut Object) {
    if item.get("type").is_none_or(|t| t != "Container") {
        return;
    }
    let map = |item: &Object, key: &str| -> Map<String, Value> {
        item.get(key).and_then(Value::as_object).cloned().unwrap_or_default()
    };
    for (from, to) in [
        ("max", "default"),
        ("default", "defaultRequest"),
        ("min", "defaultRequest"),
    ] {
        for (name, amount) in map(item, from) {
            child(item, to).entry(name).or_insert(amount);
        }
    }
}

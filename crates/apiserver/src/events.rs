//! Events are stored once, as core events, and served in two groups whose fields have different names.

use serde_json::{Map, Value};

/// `(core name, events.k8s.io name)`.
const RENAMED: [(&str, &str); 6] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];
const REPORTER: (&str, &str) = ("reportingComponent", "reportingController");

fn rename(event: &mut Map<String, Value>, from: &str, to: &str) {
    if let Some(value) = event.remove(from) {
        event.insert(to.into(), value);
    }
}

/// A core event as `events.k8s.io/v1`.
pub fn from_core(event: &mut Value) {
    let Some(map) = event.as_object_mut() else { return };
    map.insert("apiVersion".into(), "events.k8s.io/v1".into());
    for (core, new) in RENAMED.into_iter().chain([REPORTER]) {
        rename(map, core, new);
    }
}

/// An `events.k8s.io/v1` event as core event.
pub fn to_core(event: &mut Value) {
    let Some(map) = event.as_object_mut() else { return };
    map.insert("apiVersion".into(), "v1".into());
    for (core, new) in RENAMED.into_iter().chain([REPORTER]) {
        rename(map, new, core);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_ways_is_the_same() {
        let core = json!({"apiVersion": "v1", "kind": "Event", "involvedObject": {"name": "a"}, "message": "m",
            "reportingComponent": "c", "count": 2, "reason": "r"});
        let mut event = core.clone();
        from_core(&mut event);
        assert_eq!(
            (&event["note"], &event["regarding"]["name"]),
            (&json!("m"), &json!("a"))
        );
        to_core(&mut event);
        assert_eq!(event, core);
    }
}

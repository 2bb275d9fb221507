//! Laws of apply, over generated configurations of several managers.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

const NOW: &str = "2026-01-01T00:00:00Z";

/// Labels, a scalar, and a list by key whose items have parts.
fn config() -> impl Strategy<Value = Value> {
    let labels = prop::collection::btree_map("[ab]", "[12]", 0..3);
    let containers = prop::collection::btree_map(
        "[xyz]",
        (
            prop::option::of("[12]"),
            prop::collection::btree_map(80_u16..83, prop::bool::ANY, 0..3),
        ),
        0..4,
    );
    (labels, prop::option::of(0..3_i64), containers).prop_map(|(labels, replicas, containers)| {
        let containers: Vec<Value> = containers.into_iter().map(container).collect();
        let mut spec = Map::new();
        if let Some(replicas) = replicas {
            spec.insert("replicas".into(), replicas.into());
        }
        if !containers.is_empty() {
            spec.insert("template".into(), json!({"spec": {"containers": containers}}));
        }
        let mut metadata = json!({"name": "w", "namespace": "d"});
        if !labels.is_empty() {
            metadata["labels"] = json!(labels);
        }
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec})
    })
}

fn container((name, (image, ports)): (String, (Option<String>, BTreeMap<u16, bool>))) -> Value {
    let mut out = json!({"name": name});
    if let Some(image) = image {
        out["image"] = image.into();
    }
    if !ports.is_empty() {
        let port = |(number, tcp): (&u16, &bool)| match tcp {
            true => json!({"containerPort": number}),
            false => json!({"containerPort": number, "protocol": "UDP"}),
        };
        out["ports"] = ports.iter().map(port).collect();
    }
    out
}

fn run(live: Option<&Value>, config: &Value, manager: &str, force: bool) -> Result<Value, ApplyError> {
    let writer = Writer {
        manager,
        subresource: "",
        now: NOW,
        ignored: &[],
    };
    let gvk = Gvk::new("apps", "v1", "Deployment");
    apply(&TypeTable::builtin(), &gvk, live, config, &writer, force)
}

fn fields(value: &Value) -> Set {
    let table = TypeTable::builtin();
    let shape = Shape::of_kind(&table, &Gvk::new("apps", "v1", "Deployment"));
    merge::field_set(&table, shape, value)
}

/// The object without what belongs to nobody.
fn content(value: &Value) -> (Value, Value) {
    (value["metadata"]["labels"].clone(), value["spec"].clone())
}

proptest! {
    #[test]
    fn one_applier_gets_what_it_asks_for(first in config(), second in config()) {
        let made = run(None, &first, "a", false).unwrap();
        prop_assert_eq!(content(&made), content(&first));
        let again = run(Some(&made), &first, "a", false).unwrap();
        prop_assert_eq!(&again, &made, "a second time changes nothing");
        let changed = run(Some(&made), &second, "a", false).unwrap();
        prop_assert_eq!(fields(&json!({"m": changed["metadata"]["labels"], "spec": changed["spec"]})).paths().len(),
            fields(&json!({"m": second["metadata"]["labels"], "spec": second["spec"]})).paths().len(),
            "what is no longer named goes: {} of {}", changed, second);
    }

    #[test]
    fn forced_applies_end_with_the_last_word_and_one_owner(configs in prop::collection::vec((config(), 0..3_usize), 1..6)) {
        let mut live: Option<Value> = None;
        for (config, who) in &configs {
            let manager = ["a", "b", "c"][*who];
            let free = run(live.as_ref(), config, manager, false);
            let forced = run(live.as_ref(), config, manager, true).unwrap();
            if let Ok(free) = free {
                prop_assert_eq!(&free, &forced, "force matters only where there is a conflict");
            }
            let again = run(Some(&forced), config, manager, false).unwrap();
            prop_assert_eq!(&again, &forced, "who has just forced has no conflict");
            // Everything that was asked for is there with its value.
            let table = TypeTable::builtin();
            let shape = Shape::of_kind(&table, &Gvk::new("apps", "v1", "Deployment"));
            let merged = merge::merge(&table, shape, Some(&forced), config);
            let diff = diff::compare(&table, shape, Some(&forced), Some(&merged));
            prop_assert!(diff.is_empty(), "{:?}", diff);
            // Every owned field exists.
            let there = fields(&forced);
            for entry in forced["metadata"]["managedFields"].as_array().unwrap() {
                let owned = Set::parse(&entry["fieldsV1"]).unwrap();
                for path in owned.paths() {
                    let named = merge::with_named(&table, shape, &there);
                    prop_assert!(named.has(&path), "{:?} is owned and absent in {}", path, forced);
                }
            }
            live = Some(forced);
        }
    }
}

//! Laws of the patches over generated objects.

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

/// Trees without null, a few levels deep.
fn tree() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        (-5i64..5).prop_map(Value::from),
        "[a-c~/]{0,3}".prop_map(Value::from)
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            btree_map("[a-c~/]{1,2}", inner, 0..4).prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

fn object() -> impl Strategy<Value = Value> {
    btree_map("[a-c]", tree(), 0..4).prop_map(|m| Value::Object(m.into_iter().collect()))
}

/// The merge patch that turns `from` into `to`.
fn difference(from: &Value, to: &Value) -> Value {
    let (Value::Object(from), Value::Object(to)) = (from, to) else {
        return to.clone();
    };
    let mut out = Map::new();
    for key in from.keys().filter(|k| !to.contains_key(*k)) {
        out.insert(key.clone(), Value::Null);
    }
    for (key, value) in to {
        match from.get(key) {
            Some(old) if old == value => {}
            Some(old) if old.is_object() && value.is_object() => drop(out.insert(key.clone(), difference(old, value))),
            _ => drop(out.insert(key.clone(), value.clone())),
        }
    }
    Value::Object(out)
}

/// Every path of a tree.
fn paths(value: &Value, prefix: &str, out: &mut Vec<String>) {
    out.push(prefix.to_owned());
    match value {
        Value::Object(map) => {
            for (k, v) in map {
                paths(v, &format!("{prefix}/{}", k.replace('~', "~0").replace('/', "~1")), out);
            }
        }
        Value::Array(list) => list
            .iter()
            .enumerate()
            .for_each(|(i, v)| paths(v, &format!("{prefix}/{i}"), out)),
        _ => {}
    }
}

fn container() -> impl Strategy<Value = Value> {
    let env = btree_map("[A-C]", "[x-z]", 0..3);
    ("[a-d]", "[p-r]", env).prop_map(|(name, image, env)| {
        let env: Vec<Value> = env
            .into_iter()
            .map(|(name, value)| json!({ "name": name, "value": value }))
            .collect();
        json!({ "name": name, "image": image, "env": env })
    })
}

fn pod() -> impl Strategy<Value = Value> {
    let labels = btree_map("[a-c]", "[x-z]", 0..3);
    (vec(container(), 0..4), labels, any::<bool>()).prop_map(|(mut containers, labels, host)| {
        containers.sort_by_key(|c| c["name"].as_str().unwrap_or_default().to_owned());
        containers.dedup_by_key(|c| c["name"].clone());
        json!({ "metadata": { "labels": labels }, "spec": { "containers": containers, "hostNetwork": host } })
    })
}

fn strategic(object: &Value, patch: &Value) -> Value {
    let mut object = object.clone();
    strategic_merge(&TypeTable::builtin(), &Gvk::new("", "v1", "Pod"), &mut object, patch).unwrap();
    object
}

fn containers(pod: &Value) -> &[Value] {
    pod["spec"]["containers"].as_array().map_or(&[], Vec::as_slice)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_merge_patch_reaches_its_target_and_stays(from in object(), to in object()) {
        let patch = difference(&from, &to);
        let mut doc = from;
        merge_patch(&mut doc, &patch).unwrap();
        prop_assert_eq!(&doc, &to);
        merge_patch(&mut doc, &patch).unwrap();
        prop_assert_eq!(&doc, &to);
    }

    #[test]
    fn json_patch_finds_every_path_and_undoes_what_it_adds(doc in object(), value in tree(), pick in any::<prop::sample::Index>()) {
        let mut all = Vec::new();
        paths(&doc, "", &mut all);
        let path = &all[pick.index(all.len())];
        let found = doc.pointer(path).unwrap();
        let mut work = doc.clone();
        json_patch(&mut work, &json!([{ "op": "test", "path": path, "value": found }])).unwrap();
        prop_assert_eq!(&work, &doc);
        let inside = match found {
            Value::Object(map) if !map.contains_key("new") => Some(format!("{path}/new")),
            Value::Array(_) => Some(format!("{path}/0")),
            _ => None,
        };
        if let Some(place) = inside {
            let ops = json!([{ "op": "add", "path": place, "value": value }, { "op": "remove", "path": place }]);
            json_patch(&mut work, &ops).unwrap();
            prop_assert_eq!(&work, &doc);
        }
        let failing = json!([{ "op": "replace", "path": path, "value": value }, { "op": "remove", "path": "/no/such" }]);
        prop_assert!(json_patch(&mut work, &failing).is_err());
        prop_assert_eq!(&work, &doc);
    }

    #[test]
    fn json_patch_never_panics(doc in object(), ops in tree(), op in "add|remove|replace|move|copy|test", path in "(/[a-c0-1~-]{0,2}){0,3}", from in "(/[a-c0-1]){0,3}") {
        let mut work = doc.clone();
        if json_patch(&mut work, &ops).is_err() {
            prop_assert_eq!(&work, &doc);
        }
        let _ = json_patch(&mut work, &json!([{ "op": op, "path": path, "from": from, "value": 1 }]));
    }

    #[test]
    fn strategic_merge_with_itself_or_nothing_changes_nothing(pod in pod()) {
        prop_assert_eq!(&strategic(&pod, &pod), &pod);
        prop_assert_eq!(&strategic(&pod, &json!({})), &pod);
    }

    #[test]
    fn strategic_merge_is_idempotent_and_keeps_keys_unique(pod in pod(), patch in pod()) {
        let once = strategic(&pod, &patch);
        prop_assert_eq!(&strategic(&once, &patch), &once);
        let mut names: Vec<&Value> = containers(&once).iter().map(|c| &c["name"]).collect();
        let count = names.len();
        names.sort_by_key(|n| n.to_string());
        names.dedup();
        prop_assert_eq!(names.len(), count);
        for wanted in containers(&patch) {
            let found = containers(&once).iter().find(|c| c["name"] == wanted["name"]).unwrap();
            prop_assert_eq!(&found["image"], &wanted["image"]);
        }
    }

    #[test]
    fn strategic_order_puts_the_named_in_order(pod in pod(), patch in pod()) {
        let mut order: Vec<Value> = containers(&patch).iter().map(|c| json!({ "name": c["name"] })).collect();
        order.reverse();
        let mut patch = patch;
        patch["spec"]["containers"].as_array_mut().unwrap().reverse();
        patch["spec"]["$setElementOrder/containers"] = order.clone().into();
        let merged = strategic(&pod, &patch);
        let named: Vec<Value> = containers(&merged)
            .iter()
            .map(|c| json!({ "name": c["name"] }))
            .filter(|c| order.contains(c))
            .collect();
        prop_assert_eq!(named, order);
    }
}

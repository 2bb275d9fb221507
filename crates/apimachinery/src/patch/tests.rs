use serde_json::json;

use super::*;

#[test]
fn json_patch_is_all_or_nothing() {
    let mut doc = json!({"a": [1, 2], "b": {"c~/d": 1}});
    let before = doc.clone();
    let ops = json!([{"op": "add", "path": "/a/-", "value": 3}, {"op": "test", "path": "/a/0", "value": 9}]);
    assert!(matches!(
        json_patch(&mut doc, &ops),
        Err(PatchError::Unprocessable { .. })
    ));
    assert_eq!(doc, before);
    let ops = json!([
        {"op": "test", "path": "/b/c~0~1d", "value": 1.0},
        {"op": "add", "path": "/a/1", "value": 7},
        {"op": "move", "from": "/b", "path": "/e"},
        {"op": "copy", "from": "/a/0", "path": "/f"},
        {"op": "remove", "path": "/a/0"},
        {"op": "replace", "path": "/a/0", "value": 8}
    ]);
    json_patch(&mut doc, &ops).unwrap();
    assert_eq!(doc, json!({"a": [8, 2], "e": {"c~/d": 1}, "f": 1}));
    let ops = json!([{"op": "remove", "path": "/none"}]);
    assert_eq!(json_patch(&mut doc, &ops).unwrap_err().to_status().code(), 422);
}

#[test]
fn merge_patch_follows_the_rfc_examples() {
    for (target, patch, want) in [
        (json!({"a": "b"}), json!({"a": null}), json!({})),
        (
            json!({"a": {"b": "c"}}),
            json!({"a": {"b": "d", "c": null}}),
            json!({"a": {"b": "d"}}),
        ),
        (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
        (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
    ] {
        let mut doc = target;
        merge_patch(&mut doc, &patch).unwrap();
        assert_eq!(doc, want);
    }
}

fn deployment(object: Value, patch: Value) -> Result<Value, PatchError> {
    let mut object = object;
    strategic_merge(
        &TypeTable::builtin(),
        &Gvk::new("apps", "v1", "Deployment"),
        &mut object,
        &patch,
    )?;
    Ok(object)
}

fn pod(spec: Value, patch: Value) -> Result<Value, PatchError> {
    let mut object = json!({ "spec": spec });
    let gvk = Gvk::new("", "v1", "Pod");
    strategic_merge(&TypeTable::builtin(), &gvk, &mut object, &json!({ "spec": patch }))?;
    Ok(object["spec"].take())
}

#[test]
fn lists_merge_by_key_and_maps_by_field() {
    let spec = |containers: Value| json!({"spec": {"template": {"spec": {"containers": containers}}}});
    let old = spec(json!([{"name": "a", "image": "x:1", "env": [{"name": "K", "value": "1"}]}, {"name": "b"}]));
    let patch = spec(json!([{"name": "a", "image": "x:2", "env": [{"name": "L", "value": "2"}]}]));
    let want = spec(json!([
        {"name": "a", "image": "x:2", "env": [{"name": "L", "value": "2"}, {"name": "K", "value": "1"}]},
        {"name": "b"}
    ]));
    assert_eq!(deployment(old, patch).unwrap(), want);
    let old = json!({"metadata": {"labels": {"a": "1", "b": "2"}}});
    let got = deployment(old, json!({"metadata": {"labels": {"a": null, "c": "3"}}})).unwrap();
    assert_eq!(got, json!({"metadata": {"labels": {"b": "2", "c": "3"}}}));
}

#[test]
fn directives_steer_the_merge() {
    let two = json!({"containers": [{"name": "a"}, {"name": "b"}]});
    let got = pod(two.clone(), json!({"containers": [{"name": "a", "$patch": "delete"}]})).unwrap();
    assert_eq!(got, json!({"containers": [{"name": "b"}]}));
    let got = pod(
        two.clone(),
        json!({"containers": [{"$patch": "replace"}, {"name": "z"}]}),
    )
    .unwrap();
    assert_eq!(got, json!({"containers": [{"name": "z"}]}));
    let got = pod(
        two.clone(),
        json!({"$setElementOrder/containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}], "containers": [{"name": "c"}]}),
    );
    assert_eq!(
        got.unwrap(),
        json!({"containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}]})
    );
    let wrong = json!({"$setElementOrder/containers": [{"name": "a"}], "containers": [{"name": "c"}]});
    assert!(pod(two, wrong).is_err());

    let volumes = json!({"volumes": [{"name": "v", "emptyDir": {}}]});
    let patch = json!({"volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/x"}}]});
    assert_eq!(
        pod(volumes, patch).unwrap(),
        json!({"volumes": [{"name": "v", "hostPath": {"path": "/x"}}]})
    );

    let meta = json!({"metadata": {"finalizers": ["a", "b"]}});
    let got = deployment(
        meta,
        json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"]}}),
    );
    assert_eq!(got.unwrap(), json!({"metadata": {"finalizers": ["c", "b"]}}));
    let strategy = json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
    let got = deployment(
        strategy,
        json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
    );
    assert_eq!(got.unwrap(), json!({"spec": {"strategy": {"type": "Recreate"}}}));
}

#[test]
fn missing_merge_keys_and_custom_kinds_are_refused() {
    let spec = json!({"containers": [{"name": "a"}]});
    let error = pod(spec, json!({"containers": [{"image": "x"}]})).unwrap_err();
    assert!(
        error.to_string().contains("does not contain declared merge key: name"),
        "{error}"
    );
    let gvk = Gvk::new("example.test", "v1", "Widget");
    let error = strategic_merge(&TypeTable::builtin(), &gvk, &mut json!({}), &json!({})).unwrap_err();
    assert_eq!(error.to_status().code(), 415);
}

//! Server-side apply over the in-process service, and the managedFields of ordinary writes.

mod common;

use common::{Api, api};
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";

async fn apply(api: &Api, path: &str, config: Value) -> (u16, Value) {
    api.call("PATCH", path, "application/apply-patch+yaml", config.to_string())
        .await
}

fn map(data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": data})
}

fn deployment(replicas: Option<i64>) -> Value {
    let mut value = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "w"}, "spec": {
        "selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 80}]}]}}}});
    if let Some(replicas) = replicas {
        value["spec"]["replicas"] = replicas.into();
    }
    value
}

/// `manager operation subresource` of every entry.
fn managers(object: &Value) -> Vec<String> {
    let entries = object["metadata"]["managedFields"].as_array();
    let text = |v: &Value| v.as_str().unwrap_or("-").to_owned();
    entries
        .into_iter()
        .flatten()
        .map(|e| {
            format!(
                "{} {} {}",
                text(&e["manager"]),
                text(&e["operation"]),
                text(&e["subresource"])
            )
        })
        .collect()
}

#[tokio::test]
async fn apply_makes_changes_and_meets_others() {
    let api = api().await;
    let path = format!("{MAPS}/a?fieldManager=one");
    let (code, made) = apply(&api, &path, map(json!({"x": "1"}))).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(managers(&made), ["one Apply -"]);
    assert_eq!(
        made["metadata"]["managedFields"][0]["fieldsV1"],
        json!({"f:data": {"f:x": {}}})
    );
    let (code, same) = apply(&api, &path, map(json!({"x": "1"}))).await;
    assert_eq!((code, &same), (200, &made), "no change is no write");
    let other = format!("{MAPS}/a?fieldManager=two");
    let (code, refused) = apply(&api, &other, map(json!({"x": "2", "y": "1"}))).await;
    assert_eq!((code, &refused["reason"]), (409, &json!("Conflict")));
    assert_eq!(
        refused["message"],
        "Apply failed with 1 conflict: conflict with \"one\": .data.x"
    );
    assert_eq!(
        refused["details"]["causes"],
        json!([{"reason": "FieldManagerConflict", "message": "conflict with \"one\"", "field": ".data.x"}])
    );
    let (code, forced) = apply(&api, &format!("{other}&force=true"), map(json!({"x": "2", "y": "1"}))).await;
    assert_eq!((code, &forced["data"]), (200, &json!({"x": "2", "y": "1"})));
    assert_eq!(managers(&forced), ["two Apply -"]);
    let (_, patched) = api
        .merge(&format!("{MAPS}/a?fieldManager=three"), json!({"data": {"x": "3"}}))
        .await;
    assert_eq!(managers(&patched), ["two Apply -", "three Update -"]);
    let (code, dry) = apply(&api, &format!("{other}&dryRun=All"), map(json!({}))).await;
    assert_eq!((code, &dry["data"]), (200, &json!({"x": "3"})));
    let (_, read) = api.get(&format!("{MAPS}/a")).await;
    assert_eq!(read["data"], json!({"x": "3", "y": "1"}));
    let (_, list) = api.get(MAPS).await;
    let listed = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .find(|i| i["metadata"]["name"] == "a");
    assert_eq!(listed.unwrap()["metadata"], read["metadata"]);
}

#[tokio::test]
async fn apply_is_checked() {
    let api = api().await;
    let (code, refused) = apply(&api, &format!("{MAPS}/a"), map(json!({}))).await;
    assert_eq!(code, 422);
    assert_eq!(
        refused["message"],
        "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch"
    );
    let path = format!("{MAPS}/a?fieldManager=one");
    let mut unknown = map(json!({}));
    unknown["dada"] = json!({});
    let (code, refused) = apply(&api, &path, unknown).await;
    assert_eq!(code, 500);
    assert_eq!(
        refused["message"],
        "failed to create typed patch object (/a; v1, Kind=ConfigMap): .dada: field not declared in schema"
    );
    let mut managed = map(json!({}));
    managed["metadata"]["managedFields"] = json!([{"manager": "x"}]);
    let (code, refused) = apply(&api, &path, managed).await;
    assert_eq!(
        (code, &refused["message"]),
        (400, &json!("metadata.managedFields must be nil"))
    );
    let mut versioned = map(json!({"x": "1"}));
    let (_, made) = apply(&api, &path, versioned.clone()).await;
    versioned["metadata"]["resourceVersion"] = "1".into();
    versioned["data"]["x"] = "2".into();
    let (code, _) = apply(&api, &path, versioned.clone()).await;
    assert_eq!(code, 409);
    versioned["metadata"]["resourceVersion"] = made["metadata"]["resourceVersion"].clone();
    assert_eq!(apply(&api, &path, versioned).await.0, 200);
    let (code, _) = api.merge(&format!("{MAPS}/a?force=true"), json!({})).await;
    assert_eq!(code, 422);
    let mut foreign = map(json!({}));
    foreign["metadata"]["name"] = "b".into();
    assert_eq!(apply(&api, &path, foreign).await.0, 400);
    let yaml = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: from-yaml\ndata:\n  k: v\n";
    let (code, made) = api
        .call(
            "PATCH",
            &format!("{MAPS}/from-yaml?fieldManager=one"),
            "application/apply-patch+yaml",
            yaml,
        )
        .await;
    assert_eq!((code, &made["data"]["k"]), (201, &json!("v")));
}

#[tokio::test]
async fn every_write_says_who_and_through_what() {
    let api = api().await;
    let (code, made) = apply(&api, &format!("{DEPLOYMENTS}/w?fieldManager=one"), deployment(Some(1))).await;
    assert_eq!(code, 201, "{made}");
    let fields = made["metadata"]["managedFields"][0]["fieldsV1"].to_string();
    assert!(!fields.contains("dnsPolicy"), "defaults belong to nobody: {fields}");
    assert!(
        fields.contains(r#"k:{\"containerPort\":80,\"protocol\":\"TCP\"}"#),
        "{fields}"
    );

    let status = json!({"status": {"replicas": 1, "observedGeneration": 1}});
    let (code, after) = api
        .merge(&format!("{DEPLOYMENTS}/w/status?fieldManager=ctl"), status)
        .await;
    assert_eq!(code, 200);
    assert_eq!(managers(&after), ["one Apply -", "ctl Update status"]);
    let scale = json!({"spec": {"replicas": 3}});
    let (code, _) = api
        .merge(&format!("{DEPLOYMENTS}/w/scale?fieldManager=hpa"), scale)
        .await;
    assert_eq!(code, 200);
    let (_, read) = api.get(&format!("{DEPLOYMENTS}/w")).await;
    assert_eq!(read["spec"]["replicas"], 3);
    assert!(
        managers(&read).contains(&"hpa Update scale".to_owned()),
        "{:?}",
        managers(&read)
    );
    let (code, refused) = apply(&api, &format!("{DEPLOYMENTS}/w?fieldManager=one"), deployment(Some(1))).await;
    assert_eq!(code, 409);
    assert_eq!(
        refused["message"],
        "Apply failed with 1 conflict: conflict with \"hpa\" with subresource \"scale\" using apps/v1: .spec.replicas"
    );
    // Not naming the field leaves it to its new owner.
    let (code, left) = apply(&api, &format!("{DEPLOYMENTS}/w?fieldManager=one"), deployment(None)).await;
    assert_eq!((code, &left["spec"]["replicas"]), (200, &json!(3)));
    let config = json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": {"name": "w"},
        "spec": {"replicas": 5}});
    let (code, _) = apply(&api, &format!("{DEPLOYMENTS}/w/scale?fieldManager=two"), config.clone()).await;
    assert_eq!(code, 409);
    let (code, scaled) = apply(
        &api,
        &format!("{DEPLOYMENTS}/w/scale?fieldManager=two&force=true"),
        config,
    )
    .await;
    assert_eq!((code, &scaled["spec"]["replicas"]), (200, &json!(5)));
    let config = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "w"},
        "status": {"replicas": 5}, "spec": {"replicas": 9}});
    let (code, after) = apply(
        &api,
        &format!("{DEPLOYMENTS}/w/status?fieldManager=ctl2&force=1"),
        config,
    )
    .await;
    assert_eq!(
        (code, &after["status"]["replicas"], &after["spec"]["replicas"]),
        (200, &json!(5), &json!(5)),
        "{after}"
    );
    let (code, _) = apply(
        &api,
        &format!("{DEPLOYMENTS}/none/status?fieldManager=x"),
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "status": {}}),
    )
    .await;
    assert_eq!(code, 404);
}

#[tokio::test]
async fn ownership_is_kept_reset_and_rewritten() {
    let api = api().await;
    let (_, made) = api
        .post(MAPS, json!({"metadata": {"name": "a"}, "data": {"k": "v"}}))
        .await;
    assert_eq!(
        managers(&made),
        ["test Update -"],
        "without agent and manager it is the user"
    );
    let entry = &made["metadata"]["managedFields"][0];
    assert_eq!(entry["fieldsV1"], json!({"f:data": {".": {}, "f:k": {}}}));
    assert_eq!(
        (&entry["apiVersion"], &entry["fieldsType"]),
        (&json!("v1"), &json!("FieldsV1"))
    );
    assert_eq!(entry["time"], made["metadata"]["creationTimestamp"]);
    let mut without = made.clone();
    without["metadata"].as_object_mut().unwrap().remove("managedFields");
    without["data"]["k"] = "w".into();
    let (_, kept) = api.put(&format!("{MAPS}/a"), without).await;
    assert_eq!(managers(&kept), ["test Update -"]);
    let rewrite = json!([{"op": "replace", "path": "/metadata/managedFields/0/operation", "value": "Apply"}]);
    let (code, rewritten) = api
        .call(
            "PATCH",
            &format!("{MAPS}/a"),
            "application/json-patch+json",
            rewrite.to_string(),
        )
        .await;
    assert_eq!((code, managers(&rewritten)), (200, vec!["test Apply -".to_owned()]));
    for (name, reset) in [("a", json!([{}])), ("b", json!([]))] {
        api.post(MAPS, json!({"metadata": {"name": name}})).await;
        let path = format!("{MAPS}/{name}");
        let (code, plain) = api.merge(&path, json!({"metadata": {"managedFields": reset}})).await;
        assert_eq!((code, plain["metadata"].get("managedFields")), (200, None), "{reset}");
        let (_, still) = api.merge(&path, json!({"data": {"z": "1"}})).await;
        assert_eq!(still["metadata"].get("managedFields"), None);
    }
}

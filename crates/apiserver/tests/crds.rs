//! CustomResourceDefinitions and their instances.

mod common;

use common::{Api, api};
use serde_json::{Value, json};

const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
const WIDGETS: &str = "/apis/example.com/v1/namespaces/default/widgets";

fn schema() -> Value {
    json!({"type": "object", "required": ["spec"], "properties": {
        "spec": {"type": "object", "required": ["size"], "properties": {
            "size": {"type": "integer", "minimum": 1, "maximum": 10, "format": "int32"},
            "color": {"type": "string", "enum": ["red", "green"], "default": "red"},
            "name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5, "minLength": 2, "nullable": true},
            "port": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "ports": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["port"],
                "items": {"type": "object", "required": ["port"], "properties": {
                    "port": {"type": "integer"}, "text": {"type": "string"}}}},
            "replicas": {"type": "integer"},
            "address": {"type": "string", "format": "ipv4"},
            "either": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
                "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
            "template": {"type": "object", "x-kubernetes-embedded-resource": true,
                "x-kubernetes-preserve-unknown-fields": true}}},
        "status": {"type": "object", "properties": {
            "phase": {"type": "string"}, "replicas": {"type": "integer"}, "selector": {"type": "string"}}}}})
}

fn definition() -> Value {
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced",
            "names": {"plural": "widgets", "kind": "Widget", "shortNames": ["wg"], "categories": ["all"]},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema()},
                "subresources": {"status": {}, "scale": {"specReplicasPath": ".spec.replicas",
                    "statusReplicasPath": ".status.replicas", "labelSelectorPath": ".status.selector"}},
                "selectableFields": [{"jsonPath": ".spec.color"}],
                "additionalPrinterColumns": [
                    {"name": "Size", "type": "integer", "jsonPath": ".spec.size", "description": "how large"},
                    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}]}]}})
}

fn widget(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": name}, "spec": spec})
}

async fn with_widgets() -> Api {
    let api = api().await;
    let (code, made) = api.post(CRDS, definition()).await;
    assert_eq!(code, 201, "{made}");
    api
}

fn condition<'v>(definition: &'v Value, ty: &str) -> &'v Value {
    let list = definition["status"]["conditions"].as_array().unwrap();
    list.iter().find(|c| c["type"] == ty).unwrap_or(&Value::Null)
}

#[tokio::test]
async fn a_definition_is_served_when_its_creation_is_answered() {
    let api = with_widgets().await;
    let (_, crd) = api.get(&format!("{CRDS}/widgets.example.com")).await;
    assert_eq!(condition(&crd, "Established")["status"], "True", "{crd}");
    assert_eq!(condition(&crd, "NamesAccepted")["reason"], "NoConflicts");
    assert_eq!(crd["status"]["storedVersions"], json!(["v1"]));
    assert_eq!(crd["status"]["acceptedNames"]["listKind"], "WidgetList");
    assert_eq!(crd["metadata"]["generation"], 1);

    let (code, list) = api.get("/apis/example.com/v1").await;
    assert_eq!(code, 200);
    let names: Vec<&str> = list["resources"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["widgets", "widgets/status", "widgets/scale"]);
    assert_eq!(list["resources"][0]["shortNames"], json!(["wg"]));
    let (_, groups) = api.get("/apis").await;
    assert!(
        groups["groups"]
            .as_array()
            .unwrap()
            .iter()
            .any(|g| g["name"] == "example.com")
    );

    let (_, v3) = api.get("/openapi/v3").await;
    let url = v3["paths"]["apis/example.com/v1"]["serverRelativeURL"]
        .as_str()
        .unwrap()
        .to_owned();
    let (_, doc) = api.get(&url).await;
    let schema = &doc["components"]["schemas"]["com.example.v1.Widget"];
    assert_eq!(
        schema["properties"]["spec"]["properties"]["size"]["maximum"], 10.0,
        "{schema}"
    );
    assert!(doc["paths"]["/apis/example.com/v1/namespaces/{namespace}/widgets/{name}/scale"].is_object());
    let (_, v2) = api.get("/openapi/v2").await;
    assert!(v2["definitions"]["com.example.v1.Widget"].is_object());
    assert!(v2["definitions"]["io.k8s.api.core.v1.Pod"].is_object());
    assert!(v2["paths"]["/apis/example.com/v1/widgets"].is_object());

    // Another schema is another document.
    let (code, _) = api
        .call(
            "PATCH",
            &format!("{CRDS}/widgets.example.com"),
            "application/json-patch+json",
            json!([{"op": "add", "path": "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/extra",
                "value": {"type": "string"}}])
            .to_string(),
        )
        .await;
    assert_eq!(code, 200);
    let (_, v3) = api.get("/openapi/v3").await;
    assert_ne!(v3["paths"]["apis/example.com/v1"]["serverRelativeURL"], url);
    let (_, v2) = api.get("/openapi/v2").await;
    let spec = &v2["definitions"]["com.example.v1.Widget"]["properties"]["spec"];
    assert!(spec["properties"]["extra"].is_object());

    let (code, _) = api.delete(&format!("{CRDS}/widgets.example.com")).await;
    assert_eq!(code, 200);
    gone(&api, "/apis/example.com/v1").await;
    let (_, v2) = api.get("/openapi/v2").await;
    assert!(v2["definitions"].get("com.example.v1.Widget").is_none());
}

/// Waits for a path to be not found.
async fn gone(api: &Api, path: &str) {
    let wait = async {
        while api.get(path).await.0 != 404 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), wait)
        .await
        .unwrap();
}

#[tokio::test]
async fn instances_have_defaults_and_lose_unknown_fields() {
    let api = with_widgets().await;
    let spec = json!({"size": 3, "unknown": 1, "free": {"any": {"thing": [1]}}, "name": null, "port": "http",
        "template": {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"a": 1}}});
    let (code, made) = api.post(WIDGETS, widget("a", spec)).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(made["spec"]["color"], "red");
    assert_eq!(made["spec"]["free"], json!({"any": {"thing": [1]}}));
    assert_eq!(made["spec"]["template"]["spec"], json!({"a": 1}));
    assert!(made["spec"].get("unknown").is_none());
    assert_eq!(made["spec"].get("name"), Some(&Value::Null), "nullable");
    assert_eq!(made["metadata"]["generation"], 1);

    let strict = format!("{WIDGETS}?fieldValidation=Strict");
    let (code, refused) = api
        .post(&strict, widget("b", json!({"size": 1, "x": 1, "y": {"z": 1}})))
        .await;
    assert_eq!(code, 400);
    assert_eq!(
        refused["message"],
        "Widget in version \"v1\" cannot be handled as a Widget: strict decoding error: unknown field \"spec.x\", unknown field \"spec.y\""
    );
    let twice = r#"{"apiVersion":"example.com/v1","kind":"Widget","metadata":{"name":"b"},"spec":{"size":1,"size":2}}"#;
    let (code, refused) = api.call("POST", &strict, "application/json", twice).await;
    assert_eq!(code, 400);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("duplicate field \"spec.size\""),
        "{refused}"
    );
}

#[tokio::test]
async fn values_are_checked_in_upstreams_words() {
    let api = with_widgets().await;
    for (spec, want) in [
        (json!({}), "spec.size: Required value"),
        (
            json!({"size": "x"}),
            "spec.size: Invalid value: \"string\": spec.size in body must be of type integer: \"string\"",
        ),
        (json!({"size": null}), "spec.size: Required value"),
        (
            json!({"size": 0}),
            "spec.size: Invalid value: 0: spec.size in body should be greater than or equal to 1",
        ),
        (
            json!({"size": 11}),
            "spec.size: Invalid value: 11: spec.size in body should be less than or equal to 10",
        ),
        (
            json!({"size": 1, "color": "blue"}),
            "spec.color: Unsupported value: \"blue\": supported values: \"red\", \"green\"",
        ),
        (
            json!({"size": 1, "name": "ABC"}),
            "spec.name: Invalid value: \"ABC\": spec.name in body should match '^[a-z]+$'",
        ),
        (
            json!({"size": 1, "name": "abcdef"}),
            "spec.name: Too long: may not be more than 5 bytes",
        ),
        (
            json!({"size": 1, "name": "a"}),
            "spec.name: Invalid value: \"a\": spec.name in body should be at least 2 chars long",
        ),
        (
            json!({"size": 1, "port": true}),
            "spec.port in body must be of type integer,string: \"boolean\"",
        ),
        (
            json!({"size": 1, "labels": {"a": 1}}),
            "spec.labels.a in body must be of type string: \"integer\"",
        ),
        (
            json!({"size": 1, "tags": ["a", "b", "a"]}),
            "spec.tags[2]: Duplicate value: \"a\"",
        ),
        (
            json!({"size": 1, "ports": [{"port": 1}, {"port": 1}]}),
            "spec.ports[1]: Duplicate value: {\"port\":1}",
        ),
        (
            json!({"size": 1, "address": "10.0.0"}),
            "spec.address in body must be of type ipv4: \"10.0.0\"",
        ),
        (
            json!({"size": 1, "either": {}}),
            "<nil>: Invalid value: \"\": \"spec.either\" must validate one and only one schema (oneOf). Found none valid",
        ),
        (
            json!({"size": 1, "template": {"metadata": {}}}),
            "spec.template.apiVersion: Required value, spec.template.kind: Required value",
        ),
    ] {
        let (code, refused) = api.post(WIDGETS, widget("w", spec)).await;
        let message = refused["message"].as_str().unwrap();
        assert_eq!((code, refused["reason"].as_str()), (422, Some("Invalid")), "{message}");
        assert!(
            message.starts_with("Widget.example.com \"w\" is invalid: "),
            "{message}"
        );
        assert!(message.contains(want), "{message}\nwanted {want}");
    }
    let (code, _) = api
        .post(WIDGETS, widget("w", json!({"size": 1, "either": {"a": "x"}})))
        .await;
    assert_eq!(code, 201);
}

#[tokio::test]
async fn status_and_scale_are_subresources() {
    let api = with_widgets().await;
    let mut w = widget("a", json!({"size": 1, "replicas": 2}));
    w["status"] = json!({"phase": "sent"});
    let (_, made) = api.post(WIDGETS, w).await;
    assert!(made.get("status").is_none());
    let (code, done) = api
        .merge(
            &format!("{WIDGETS}/a/status"),
            json!({"status": {"replicas": 1, "selector": "app=a"}, "spec": {"size": 9}}),
        )
        .await;
    assert_eq!(
        (code, &done["spec"]["size"], &done["metadata"]["generation"]),
        (200, &json!(1), &json!(1))
    );
    let (code, scale) = api.get(&format!("{WIDGETS}/a/scale")).await;
    assert_eq!(code, 200);
    assert_eq!(
        (&scale["kind"], &scale["spec"], &scale["status"]),
        (
            &json!("Scale"),
            &json!({"replicas": 2}),
            &json!({"replicas": 1, "selector": "app=a"})
        )
    );
    let (code, scale) = api
        .merge(&format!("{WIDGETS}/a/scale"), json!({"spec": {"replicas": 5}}))
        .await;
    assert_eq!((code, &scale["spec"]["replicas"]), (200, &json!(5)));
    let (_, w) = api.get(&format!("{WIDGETS}/a")).await;
    assert_eq!(
        (&w["spec"]["replicas"], &w["metadata"]["generation"]),
        (&json!(5), &json!(2))
    );
    let managers: Vec<&str> = w["metadata"]["managedFields"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["subresource"].as_str().unwrap_or(""))
        .collect();
    assert!(
        managers.contains(&"scale") && managers.contains(&"status"),
        "{managers:?}"
    );
}

#[tokio::test]
async fn selectors_columns_and_media_types() {
    let api = with_widgets().await;
    api.post(WIDGETS, widget("r", json!({"size": 1}))).await;
    api.post(WIDGETS, widget("g", json!({"size": 2, "color": "green"})))
        .await;
    let (_, list) = api.get(&format!("{WIDGETS}?fieldSelector=spec.color%3Dgreen")).await;
    assert_eq!(list["kind"], "WidgetList");
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    assert_eq!(list["items"][0]["kind"], "Widget");
    let (code, refused) = api.get(&format!("{WIDGETS}?fieldSelector=spec.size%3D1")).await;
    assert_eq!(code, 400, "{refused}");
    let mut watch = api
        .watch(&format!("{WIDGETS}?watch=true&fieldSelector=spec.color%3Dgreen"))
        .await;
    assert_eq!(watch.next().await["object"]["metadata"]["name"], "g");
    api.merge(&format!("{WIDGETS}/g"), json!({"spec": {"color": "red"}}))
        .await;
    assert_eq!(watch.next().await["type"], "DELETED");

    let (code, table) = common::call_accept(
        &api.service,
        "GET",
        WIDGETS,
        "application/json;as=Table;v=v1;g=meta.k8s.io",
    )
    .await;
    assert_eq!(code, 200);
    let names: Vec<&str> = table["columnDefinitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["Name", "Size", "Age"]);
    assert_eq!(table["columnDefinitions"][1]["description"], "how large");
    assert_eq!(table["rows"][0]["cells"][1], 2);
    let protobuf = "application/vnd.kubernetes.protobuf";
    assert_eq!(common::call_accept(&api.service, "GET", WIDGETS, protobuf).await.0, 406);
    assert_eq!(api.call("POST", WIDGETS, protobuf, "k8s\0").await.0, 415);
    let (code, refused) = api
        .call(
            "PATCH",
            &format!("{WIDGETS}/g"),
            "application/strategic-merge-patch+json",
            "{}",
        )
        .await;
    assert_eq!(code, 415, "{refused}");
}

#[tokio::test]
async fn apply_follows_the_lists_of_the_schema() {
    let api = with_widgets().await;
    let apply = |manager: &str, spec: Value| {
        let path = format!("{WIDGETS}/a?fieldManager={manager}");
        let body = widget("a", spec).to_string();
        let api = &api;
        async move { api.call("PATCH", &path, "application/apply-patch+yaml", body).await }
    };
    let (code, made) = apply(
        "one",
        json!({"size": 1, "ports": [{"port": 80, "text": "a"}], "tags": ["x"]}),
    )
    .await;
    assert_eq!(code, 201, "{made}");
    let (code, both) = apply("two", json!({"ports": [{"port": 443}], "tags": ["y"]})).await;
    assert_eq!(code, 200, "{both}");
    assert_eq!(both["spec"]["ports"], json!([{"port": 80, "text": "a"}, {"port": 443}]));
    assert_eq!(both["spec"]["tags"], json!(["x", "y"]));
    let (code, conflict) = apply("two", json!({"ports": [{"port": 80, "text": "b"}]})).await;
    assert_eq!(code, 409, "{conflict}");
    assert_eq!(conflict["details"]["causes"][0]["field"], ".spec.ports[port=80].text");
    let (code, refused) = apply("one", json!({"size": 1, "nope": 1})).await;
    assert_eq!(code, 500);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains(".spec.nope: field not declared in schema"),
        "{refused}"
    );
}

fn two_versions() -> Value {
    let mut crd = definition();
    let old = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
        "size": {"type": "integer"}, "color": {"type": "string"}, "legacy": {"type": "string", "default": "old"}}}}});
    crd["spec"]["versions"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "v1beta1", "served": true, "storage": false,
        "deprecated": true, "schema": {"openAPIV3Schema": old}}));
    crd
}

#[tokio::test]
async fn versions_share_their_objects() {
    let api = api().await;
    assert_eq!(api.post(CRDS, two_versions()).await.0, 201);
    let (_, group) = api.get("/apis/example.com").await;
    assert_eq!(group["preferredVersion"]["version"], "v1");
    let beta = "/apis/example.com/v1beta1/namespaces/default/widgets";
    let mut old = widget("a", json!({"size": 4, "legacy": "x"}));
    old["apiVersion"] = "example.com/v1beta1".into();
    let (code, made) = api.post(beta, old).await;
    assert_eq!(
        (code, made["apiVersion"].as_str()),
        (201, Some("example.com/v1beta1")),
        "{made}"
    );
    let (_, v1) = api.get(&format!("{WIDGETS}/a")).await;
    assert_eq!(v1["apiVersion"], "example.com/v1");
    assert_eq!(
        v1["spec"],
        json!({"size": 4, "color": "red"}),
        "what v1 does not know is not stored"
    );
    let (_, list) = api.get(beta).await;
    assert_eq!(list["items"][0]["apiVersion"], "example.com/v1beta1");
    let mut watch = api.watch(&format!("{beta}?watch=true")).await;
    assert_eq!(watch.next().await["object"]["apiVersion"], "example.com/v1beta1");

    // Another storage version: old objects stay readable, and both versions are noted.
    let (_, mut crd) = api.get(&format!("{CRDS}/widgets.example.com")).await;
    crd["spec"]["versions"][0]["storage"] = false.into();
    crd["spec"]["versions"][1]["storage"] = true.into();
    let (code, crd) = api.put(&format!("{CRDS}/widgets.example.com"), crd).await;
    assert_eq!(code, 200, "{crd}");
    assert_eq!(crd["status"]["storedVersions"], json!(["v1", "v1beta1"]));
    assert_eq!(crd["metadata"]["generation"], 2);
    let (_, again) = api.get(&format!("{WIDGETS}/a")).await;
    assert_eq!(again["spec"], v1["spec"]);
    // A version that objects may be stored at cannot go.
    let mut less = crd.clone();
    less["spec"]["versions"].as_array_mut().unwrap().remove(0);
    let (code, refused) = api.put(&format!("{CRDS}/widgets.example.com"), less).await;
    assert_eq!(code, 422);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("status.storedVersions[0]: Invalid value: \"v1\": missing from spec.versions")
    );
    // A version that is not served any more is gone at once, and its watches end.
    let mut unserved = crd;
    unserved["spec"]["versions"][0]["served"] = false.into();
    assert_eq!(api.put(&format!("{CRDS}/widgets.example.com"), unserved).await.0, 200);
    assert_eq!(api.get(&format!("{WIDGETS}/a")).await.0, 404);
}

#[tokio::test]
async fn defaults_reach_objects_that_were_stored_before() {
    let api = with_widgets().await;
    api.post(WIDGETS, widget("a", json!({"size": 1}))).await;
    let mut watch = api.watch(&format!("{WIDGETS}?watch=true")).await;
    assert_eq!(watch.next().await["type"], "ADDED");
    let path = format!("{CRDS}/widgets.example.com");
    let (_, mut crd) = api.get(&path).await;
    let spec = &mut crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    spec["later"] = json!({"type": "string", "default": "new"});
    spec["color"] = json!({"type": "string", "maxLength": 2});
    assert_eq!(api.put(&path, crd).await.0, 200);
    assert!(watch.ended().await, "watches of the schema before end");
    let (_, a) = api.get(&format!("{WIDGETS}/a")).await;
    assert_eq!(a["spec"], json!({"size": 1, "color": "red", "later": "new"}));
    // What the new schema refuses and nobody touches does not stop other changes.
    let (code, a) = api.merge(&format!("{WIDGETS}/a"), json!({"spec": {"size": 2}})).await;
    assert_eq!(code, 200, "{a}");
    let (code, refused) = api
        .merge(&format!("{WIDGETS}/a"), json!({"spec": {"color": "green"}}))
        .await;
    assert_eq!(code, 422, "{refused}");
}

#[tokio::test]
async fn definitions_and_instances_outlive_a_restart() {
    use apiserver::{ApiServer, ApiServerConfig, ClusterConfig, NoDialer, UserInfo};
    let dir = tempfile::tempdir().unwrap();
    let engine = store::ModelEngine::new();
    let start = async || {
        let server = ApiServer::new(ApiServerConfig {
            engine: engine.clone(),
            dialer: std::sync::Arc::new(NoDialer),
            data_dir: dir.path().to_owned(),
            clock: stdx::RealClock::shared(),
        });
        let config = ClusterConfig::new("c", "https://127.0.0.1:6443");
        let cluster = server.create_cluster(config).await.unwrap();
        (cluster.local_service(UserInfo::admin("test")), cluster)
    };
    let (service, cluster) = start().await;
    let json = "application/json";
    common::call(&service, "POST", CRDS, json, definition().to_string()).await;
    let made = widget("a", json!({"size": 1})).to_string();
    assert_eq!(common::call(&service, "POST", WIDGETS, json, made).await.0, 201);
    cluster.stop();
    let (service, _cluster) = start().await;
    let (code, a) = common::call(&service, "GET", &format!("{WIDGETS}/a"), json, "").await;
    assert_eq!((code, &a["spec"]), (200, &json!({"size": 1, "color": "red"})), "{a}");
    let made = widget("b", json!({"size": 1})).to_string();
    assert_eq!(common::call(&service, "POST", WIDGETS, json, made).await.0, 201);
}

#[tokio::test]
async fn names_are_given_once() {
    let api = with_widgets().await;
    let mut other = definition();
    other["metadata"]["name"] = "gadgets.example.com".into();
    other["spec"]["names"] = json!({"plural": "gadgets", "kind": "Widget", "shortNames": ["wg"]});
    assert_eq!(api.post(CRDS, other).await.0, 201);
    let path = format!("{CRDS}/gadgets.example.com");
    let (_, crd) = api.get(&path).await;
    let accepted = condition(&crd, "NamesAccepted");
    assert_eq!(
        (&accepted["status"], &accepted["reason"]),
        (&json!("False"), &json!("ListKindConflict")),
        "{crd}"
    );
    assert_eq!(condition(&crd, "Established")["status"], "False");
    assert_eq!(api.get("/apis/example.com/v1/gadgets").await.0, 404);
    // It gets them when they are free.
    api.delete(&format!("{CRDS}/widgets.example.com")).await;
    let wait = async {
        while condition(&api.get(&path).await.1, "Established")["status"] != "True" {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), wait)
        .await
        .unwrap();
    assert_eq!(api.get("/apis/example.com/v1/gadgets").await.0, 200);
}

#[tokio::test]
async fn a_definition_takes_its_instances_with_it() {
    let api = with_widgets().await;
    for i in 0..20 {
        let mut w = widget(&format!("w{i}"), json!({"size": 1}));
        if i == 7 {
            w["metadata"]["finalizers"] = json!(["example.com/hold"]);
        }
        assert_eq!(api.post(WIDGETS, w).await.0, 201);
    }
    let path = format!("{CRDS}/widgets.example.com");
    let (code, crd) = api.delete(&path).await;
    assert_eq!(
        (code, &crd["metadata"]["finalizers"]),
        (200, &json!(["customresourcecleanup.apiextensions.k8s.io"]))
    );
    assert_eq!(condition(&crd, "Terminating")["status"], "True");
    let left = async {
        while api.get(WIDGETS).await.1["items"]
            .as_array()
            .is_none_or(|i| i.len() != 1)
        {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), left)
        .await
        .unwrap();
    let (code, refused) = api.post(WIDGETS, widget("new", json!({"size": 1}))).await;
    assert_eq!(code, 405);
    assert_eq!(
        refused["message"],
        "create not allowed while custom resource definition is terminating"
    );
    let (code, _) = api
        .merge(&format!("{WIDGETS}/w7"), json!({"metadata": {"finalizers": null}}))
        .await;
    assert_eq!(code, 200);
    gone(&api, &path).await;
    gone(&api, WIDGETS).await;
    // The same definition again begins empty.
    assert_eq!(api.post(CRDS, definition()).await.0, 201);
    assert_eq!(api.get(WIDGETS).await.1["items"], json!([]));
}

#[tokio::test]
async fn no_instance_survives_a_definition_deleted_under_writes() {
    let api = with_widgets().await;
    let writer = async |w: usize| {
        let mut made = 0;
        for i in 0.. {
            let name = format!("w{w}-{i}");
            match api.post(WIDGETS, widget(&name, json!({"size": 1}))).await.0 {
                201 => made += 1,
                404 | 405 => break,
                other => panic!("{other}"),
            }
        }
        made
    };
    let deleter = async {
        while api.get(WIDGETS).await.1["items"].as_array().unwrap().len() < 20 {
            tokio::task::yield_now().await;
        }
        assert_eq!(api.delete(&format!("{CRDS}/widgets.example.com")).await.0, 200);
    };
    let (made, ()) = tokio::join!(futures::future::join_all((0..4).map(writer)), deleter);
    assert!(made.iter().all(|n| *n > 0), "{made:?}");
    gone(&api, &format!("{CRDS}/widgets.example.com")).await;
    assert_eq!(api.post(CRDS, definition()).await.0, 201);
    assert_eq!(api.get(WIDGETS).await.1["items"], json!([]));
}

#[tokio::test]
async fn definitions_are_checked_in_upstreams_words() {
    let api = api().await;
    let cases: [(&str, Value, &str); 22] = [
        (
            "/metadata/name",
            json!("x.example.com"),
            "metadata.name: Invalid value: \"x.example.com\": must be spec.names.plural+\".\"+spec.group",
        ),
        (
            "/spec/scope",
            json!("Global"),
            "spec.scope: Unsupported value: \"Global\": supported values: \"Cluster\", \"Namespaced\"",
        ),
        (
            "/spec/versions/0/storage",
            json!(false),
            "must have exactly one version marked as storage version",
        ),
        (
            "/spec/versions/0/name",
            json!("V1"),
            "spec.versions[0].name: Invalid value: \"V1\": a DNS-1035 label",
        ),
        (
            "/spec/versions/0/schema",
            Value::Null,
            "spec.versions[0].schema.openAPIV3Schema: Required value",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/type",
            json!("string"),
            "only \"object\" is allowed as the type at the root",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/type",
            Value::Null,
            "spec.validation.openAPIV3Schema.properties[spec].type: Required value: must not be empty for specified object fields",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/size/type",
            json!("int"),
            "Unsupported value: \"int\"",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/size/default",
            json!("x"),
            "properties[size].default: Invalid value: \"string\"",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/name/pattern",
            json!("("),
            "must be a valid regular expression, but isn't",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/name/pattern",
            json!("(a{1000}){1000}"),
            "must be a valid regular expression, but isn't",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/ports/items/required",
            json!([]),
            "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/tags/uniqueItems",
            json!(true),
            "uniqueItems cannot be set to true",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/size/$ref",
            json!("#/x"),
            "$ref is not supported",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/oneOf",
            json!([{"properties": {"zzz": {"minimum": 1}}}]),
            "properties[zzz]: Required value: because it is defined in",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/oneOf",
            json!([{"type": "object"}]),
            "oneOf[0].type: Forbidden: must be empty to be structural",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/metadata",
            json!({"type": "object", "properties": {"labels": {"type": "object"}}}),
            "must not specify anything other than name and generateName, but metadata is implicitly specified",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/x-kubernetes-validations",
            json!([{"rule": "self.size > 0"}]),
            "x-kubernetes-validations: Forbidden: validation rules in CEL are not supported by this server",
        ),
        (
            "/spec/conversion",
            json!({"strategy": "Webhook", "webhook": {"conversionReviewVersions": ["v1"]}}),
            "spec.conversion.strategy: Forbidden: conversion by webhook is not supported by this server",
        ),
        (
            "/spec/versions/0/selectableFields",
            json!([{"jsonPath": ".spec.free"}]),
            "must point to a field of type string, boolean or integer",
        ),
        (
            "/spec/versions/0/subresources/scale/specReplicasPath",
            json!(".status.x"),
            "should be a json path under .spec",
        ),
        (
            "/spec/group",
            json!("widgets.k8s.io"),
            "protected groups must have approval annotation \\\"api-approved.kubernetes.io\\\"",
        ),
    ];
    for (path, value, want) in cases {
        let mut crd = definition();
        let (parent, key) = path.rsplit_once('/').unwrap();
        crd.pointer_mut(parent).unwrap()[key] = value;
        let (code, refused) = api.post(CRDS, crd).await;
        let message = refused["message"].as_str().unwrap_or_default();
        assert_eq!(code, 422, "{path}: {refused}");
        assert!(
            message.contains(&want.replace("\\\"", "\"")),
            "{path}: {message}\nwanted {want}"
        );
    }
    // Unknown words of a schema are told like unknown fields.
    let mut crd = definition();
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["propertees"] = json!({});
    let (code, refused) = api.post(&format!("{CRDS}?fieldValidation=Strict"), crd).await;
    assert_eq!(code, 400);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("unknown field \"spec.versions[0].schema.openAPIV3Schema.properties.spec.propertees\""),
        "{refused}"
    );
}

#[tokio::test]
async fn huge_and_deep_schemas_are_refused() {
    let api = api().await;
    let mut deep = json!({"type": "string"});
    for _ in 0..110 {
        deep = json!({"type": "object", "properties": {"a": deep}});
    }
    let mut crd = definition();
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] = deep;
    let (code, refused) = api.post(CRDS, crd).await;
    assert!(matches!(code, 400 | 422), "{code} {refused}");
    let mut wide = definition();
    wide["spec"]["versions"][0]["selectableFields"] = json!([]);
    let many: serde_json::Map<String, Value> = (0..30_000)
        .map(|i| (format!("f{i}"), json!({"type": "string"})))
        .collect();
    wide["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] =
        json!({"type": "object", "properties": many});
    let (code, refused) = api.post(CRDS, wide).await;
    assert_eq!(code, 201, "large is not too large: {}", refused["message"]);
}

#[tokio::test]
async fn definitions_travel_as_protobuf() {
    let api = with_widgets().await;
    let path = format!("{CRDS}/widgets.example.com");
    let table = apimachinery::table::TypeTable::builtin();
    let gvk = apimachinery::gvk::Gvk::new("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
    let (_, crd) = api.get(&path).await;
    let bytes = apimachinery::codec::to_protobuf(&table, &gvk, &crd).unwrap();
    let back = apimachinery::codec::from_protobuf(&table, &gvk, &bytes).unwrap();
    assert_eq!(back["spec"], crd["spec"]);
    let (code, same) = api
        .call("PUT", &path, "application/vnd.kubernetes.protobuf", bytes)
        .await;
    assert_eq!((code, &same["metadata"]["generation"]), (200, &json!(1)), "{same}");
}

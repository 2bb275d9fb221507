//! Custom resources under the controllers: owners, dependents, and content of namespaces like any other kind.

mod world;

use reconcile::Error;
use serde_json::{Value, json};
use world::World;

const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
const WIDGETS: &str = "/apis/example.com/v1/namespaces/default/widgets";
const MAPS: &str = "/api/v1/namespaces/default/configmaps";

async fn define(w: &World) {
    let crd = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "widgets", "kind": "Widget"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema":
                {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}});
    post(w, CRDS, crd).await.unwrap();
}

async fn post(w: &World, path: &str, value: Value) -> Result<Value, Error> {
    w.client.request(http::Method::POST, path, Some(&value)).await
}

async fn delete(w: &World, path: &str) {
    let _: Value = w
        .client
        .request::<_, ()>(http::Method::DELETE, path, None)
        .await
        .unwrap();
}

async fn gone(w: &World, path: &str) {
    w.until(path, async || {
        let got = w.client.request::<Value, ()>(http::Method::GET, path, None).await;
        got.is_err_and(|e| e.is_not_found())
    })
    .await;
}

async fn make(w: &World, path: &str, kind: &str, name: &str, owner: Option<&Value>) -> Value {
    let api_version = if kind == "Widget" { "example.com/v1" } else { "v1" };
    let mut object = json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": name}});
    if let Some(owner) = owner {
        object["metadata"]["ownerReferences"] = json!([{"apiVersion": owner["apiVersion"], "kind": owner["kind"],
            "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}]);
    }
    post(w, path, object).await.unwrap()
}

#[tokio::test]
async fn custom_owners_and_dependents_are_collected() {
    let w = World::new().await;
    define(&w).await;
    let widget = make(&w, WIDGETS, "Widget", "owner", None).await;
    make(&w, MAPS, "ConfigMap", "dependent", Some(&widget)).await;
    let map = make(&w, MAPS, "ConfigMap", "root", None).await;
    make(&w, WIDGETS, "Widget", "leaf", Some(&map)).await;
    delete(&w, &format!("{WIDGETS}/owner")).await;
    gone(&w, &format!("{MAPS}/dependent")).await;
    delete(&w, &format!("{MAPS}/root")).await;
    gone(&w, &format!("{WIDGETS}/leaf")).await;

    // With the definition go its objects, and what they own; and all of it works again for the definition's next life.
    for round in ["one", "two"] {
        let widget = make(&w, WIDGETS, "Widget", round, None).await;
        make(&w, MAPS, "ConfigMap", round, Some(&widget)).await;
        delete(&w, &format!("{CRDS}/widgets.example.com")).await;
        gone(&w, &format!("{MAPS}/{round}")).await;
        gone(&w, &format!("{CRDS}/widgets.example.com")).await;
        define(&w).await;
    }
}

#[tokio::test]
async fn namespaces_go_with_their_custom_objects() {
    let w = World::new().await;
    define(&w).await;
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}});
    post(&w, "/api/v1/namespaces", namespace).await.unwrap();
    let path = "/apis/example.com/v1/namespaces/team/widgets";
    make(&w, path, "Widget", "a", None).await;
    delete(&w, "/api/v1/namespaces/team").await;
    gone(&w, "/api/v1/namespaces/team").await;
    let left: Value = w.client.request::<_, ()>(http::Method::GET, path, None).await.unwrap();
    assert_eq!(left["items"], json!([]));
}

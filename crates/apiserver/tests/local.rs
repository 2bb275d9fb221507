//! Verbs over the in-process service: no socket, no TLS.

mod common;

use common::api;
use serde_json::{Value, json};

fn config_map(name: &str, label: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"l": label}}, "data": {"k": "v"}})
}

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

#[tokio::test]
async fn objects_live_and_die() {
    let api = api().await;
    let (code, made) = api.post(MAPS, config_map("a", "1")).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(
        (&made["kind"], &made["apiVersion"]),
        (&json!("ConfigMap"), &json!("v1"))
    );
    assert!(!made["metadata"]["uid"].as_str().unwrap().is_empty());
    let (code, again) = api.post(MAPS, config_map("a", "1")).await;
    assert_eq!((code, again["reason"].as_str()), (409, Some("AlreadyExists")));
    let (_, read) = api.get(&format!("{MAPS}/a")).await;
    assert_eq!(read, made);

    let mut changed = made.clone();
    changed["data"]["k"] = "w".into();
    let (code, updated) = api.put(&format!("{MAPS}/a"), changed.clone()).await;
    assert_eq!(code, 200, "{updated}");
    assert_ne!(
        updated["metadata"]["resourceVersion"],
        made["metadata"]["resourceVersion"]
    );
    let (code, stale) = api.put(&format!("{MAPS}/a"), changed.clone()).await;
    assert_eq!((code, stale["reason"].as_str()), (409, Some("Conflict")));
    let (_, same) = api.put(&format!("{MAPS}/a"), updated.clone()).await;
    assert_eq!(
        same["metadata"]["resourceVersion"], updated["metadata"]["resourceVersion"],
        "no change is no write"
    );
    let (code, patched) = api
        .merge(&format!("{MAPS}/a"), json!({"data": {"x": "y", "k": null}}))
        .await;
    assert_eq!((code, &patched["data"]), (200, &json!({"x": "y"})));
    let json_patch =
        r#"[{"op": "test", "path": "/data/x", "value": "y"}, {"op": "add", "path": "/data/z", "value": "1"}]"#;
    let (code, patched) = api
        .call("PATCH", &format!("{MAPS}/a"), "application/json-patch+json", json_patch)
        .await;
    assert_eq!((code, &patched["data"]["z"]), (200, &json!("1")));
    let uid = json!({"preconditions": {"uid": "other"}});
    let (code, _) = api
        .call("DELETE", &format!("{MAPS}/a"), "application/json", uid.to_string())
        .await;
    assert_eq!(code, 409);
    let (code, gone) = api.delete(&format!("{MAPS}/a")).await;
    assert_eq!((code, gone["status"].as_str()), (200, Some("Success")));
    let (code, missing) = api.get(&format!("{MAPS}/a")).await;
    assert_eq!(
        (code, missing["message"].as_str()),
        (404, Some("configmaps \"a\" not found"))
    );
}

#[tokio::test]
async fn lists_page_select_and_expire() {
    let api = api().await;
    for i in 0..10 {
        api.post(
            MAPS,
            config_map(&format!("m{i}"), if i % 2 == 0 { "even" } else { "odd" }),
        )
        .await;
    }
    let (_, all) = api.get(MAPS).await;
    assert_eq!(all["items"].as_array().unwrap().len(), 10);
    assert_eq!(all["kind"], "ConfigMapList");
    let (_, even) = api.get(&format!("{MAPS}?labelSelector=l%3Deven")).await;
    assert_eq!(even["items"].as_array().unwrap().len(), 5);
    let (_, one) = api.get(&format!("{MAPS}?fieldSelector=metadata.name%3Dm3")).await;
    assert_eq!(one["items"][0]["metadata"]["name"], "m3");
    let (code, bad) = api.get(&format!("{MAPS}?fieldSelector=data.k%3Dv")).await;
    assert_eq!(code, 400);
    assert!(
        bad["message"]
            .as_str()
            .unwrap()
            .contains("\"data.k\" is not a known field selector")
    );

    let (_, first) = api.get(&format!("{MAPS}?limit=4")).await;
    assert_eq!(first["metadata"]["remainingItemCount"], 6);
    // The second page shows the state of the first, whatever happens in between.
    api.delete(&format!("{MAPS}/m9")).await;
    let token = first["metadata"]["continue"].as_str().unwrap();
    let (_, rest) = api.get(&format!("{MAPS}?limit=100&continue={token}")).await;
    assert_eq!(rest["items"].as_array().unwrap().len(), 6);
    assert_eq!(
        rest["metadata"]["resourceVersion"],
        first["metadata"]["resourceVersion"]
    );
    let (code, _) = api.get(&format!("{MAPS}?continue=nonsense")).await;
    assert_eq!(code, 400);
    let (code, future) = api.get(&format!("{MAPS}?resourceVersion=99999999")).await;
    assert_eq!(
        (code, &future["details"]["causes"][0]["reason"]),
        (504, &json!("ResourceVersionTooLarge"))
    );
    let (code, _) = api.get(&format!("{MAPS}?resourceVersion=0")).await;
    assert_eq!(code, 200);
}

#[tokio::test]
async fn watches_tell_everything_once() {
    let api = api().await;
    let (_, before) = api.get(MAPS).await;
    let rv = before["metadata"]["resourceVersion"].as_str().unwrap();
    let mut all = api.watch(&format!("{MAPS}?watch=1&resourceVersion={rv}")).await;
    let mut selected = api
        .watch(&format!("{MAPS}?watch=1&resourceVersion={rv}&labelSelector=l%3Dyes"))
        .await;
    api.post(MAPS, config_map("a", "no")).await;
    api.merge(&format!("{MAPS}/a"), json!({"metadata": {"labels": {"l": "yes"}}}))
        .await;
    api.merge(&format!("{MAPS}/a"), json!({"data": {"k": "2"}})).await;
    api.merge(&format!("{MAPS}/a"), json!({"metadata": {"labels": {"l": "no"}}}))
        .await;
    api.delete(&format!("{MAPS}/a")).await;
    for want in ["ADDED a", "MODIFIED a", "MODIFIED a", "MODIFIED a", "DELETED a"] {
        assert_eq!(all.brief().await, want);
    }
    assert_eq!(selected.brief().await, "ADDED a");
    assert_eq!(selected.brief().await, "MODIFIED a");
    let left = selected.next().await;
    assert_eq!(
        (left["type"].as_str(), left["object"]["data"]["k"].as_str()),
        (Some("DELETED"), Some("2"))
    );
    // The same again from the same place.
    let mut resumed = api.watch(&format!("{MAPS}?watch=1&resourceVersion={rv}")).await;
    assert_eq!(resumed.brief().await, "ADDED a");
}

#[tokio::test]
async fn watch_lists_end_their_beginning_with_a_bookmark() {
    let api = api().await;
    api.post(MAPS, config_map("a", "1")).await;
    let query = "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let mut watch = api.watch(&format!("{MAPS}?{query}")).await;
    assert_eq!(watch.brief().await, "ADDED a");
    let mark = watch.next().await;
    assert_eq!(mark["type"], "BOOKMARK");
    assert_eq!(
        mark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"],
        "true"
    );
    api.post(MAPS, config_map("b", "1")).await;
    assert_eq!(watch.brief().await, "ADDED b");
    let (code, _) = api.get(&format!("{MAPS}?watch=1&sendInitialEvents=true")).await;
    assert_eq!(code, 400);
}

#[tokio::test]
async fn an_old_watch_is_refused_and_a_slow_one_falls_out() {
    let api = api().await;
    let (_, before) = api.get(MAPS).await;
    let rv = before["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let mut slow = api.watch(&format!("{MAPS}?watch=1&resourceVersion={rv}")).await;
    api.post(MAPS, config_map("a", "1")).await;
    for i in 0..5000 {
        let (code, _) = api
            .merge(&format!("{MAPS}/a"), json!({"data": {"k": i.to_string()}}))
            .await;
        assert_eq!(code, 200);
    }
    let event = slow.next().await;
    assert_eq!(
        (event["type"].as_str(), &event["object"]["code"]),
        (Some("ERROR"), &json!(410))
    );
    let (code, expired) = api.get(&format!("{MAPS}?watch=1&resourceVersion={rv}")).await;
    assert_eq!((code, expired["reason"].as_str()), (410, Some("Expired")));
}

#[tokio::test]
async fn bad_input_is_named() {
    let api = api().await;
    let check = async |content_type: &str, data: &str, code: u16, says: &str| {
        let (got, status) = api.call("POST", MAPS, content_type, data.to_owned()).await;
        assert_eq!(got, code, "{data}: {status}");
        let message = status["message"].as_str().unwrap_or_default();
        assert!(message.contains(says), "{message:?} does not say {says:?}");
    };
    check("application/json", "{\"metadata\":", 400, "EOF").await;
    check("application/yaml", "a: [b", 400, "").await;
    check("application/json", "[]", 400, "").await;
    check(
        "application/json",
        r#"{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}}"#,
        400,
        "Secret",
    )
    .await;
    check("text/plain", "x", 415, "media types").await;
    check("application/vnd.kubernetes.protobuf", "k8s", 400, "").await;
    check("application/json", r#"{"metadata": {}}"#, 422, "name").await;
    check(
        "application/json",
        r#"{"metadata": {"name": "x", "namespace": "other"}}"#,
        400,
        "namespace",
    )
    .await;
    let (code, status) = api
        .call(
            "POST",
            &format!("{MAPS}?fieldValidation=Strict"),
            "application/json",
            r#"{"metadata": {"name": "x"}, "dat": {}, "dat": {}}"#,
        )
        .await;
    assert_eq!(code, 400);
    assert!(
        status["message"]
            .as_str()
            .unwrap()
            .contains("strict decoding error: unknown field \"dat\""),
        "{status}"
    );
    let huge = format!(
        r#"{{"metadata": {{"name": "x"}}, "data": {{"k": "{}"}}}}"#,
        "x".repeat(3 << 20)
    );
    let (code, _) = api.call("POST", MAPS, "application/json", huge).await;
    assert_eq!(code, 413);
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let (code, _) = api.call("POST", MAPS, "application/json", deep).await;
    assert_eq!(code, 400);
    for (path, code) in [
        ("/api/v1/nonsense", 404),
        ("/apis/no.group/v1/pods", 404),
        ("/nonsense", 404),
    ] {
        assert_eq!(api.get(path).await.0, code, "{path}");
    }
    assert_eq!(api.get("/api/v1/configmaps").await.0, 200, "still answers");
}

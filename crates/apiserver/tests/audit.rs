//! The audit log: what stands in it, and what never does.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use apiserver::audit::{AuditConfig, DEFAULT_POLICY, LogConfig, Policy};
use apiserver::{ApiServer, ApiServerConfig, Cluster, ClusterConfig, NoDialer, UserInfo};
use common::call;
use http::Request;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use store::ModelEngine;
use tower::ServiceExt;

struct Audited {
    cluster: Arc<Cluster>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

async fn audited(policy: &str) -> Audited {
    let dir = tempfile::tempdir().unwrap();
    let server = ApiServer::new(ApiServerConfig {
        engine: ModelEngine::new(),
        dialer: Arc::new(NoDialer),
        data_dir: dir.path().to_owned(),
        clock: stdx::RealClock::shared(),
    });
    let path = dir.path().join("audit.log");
    let mut config = ClusterConfig::new("c", "https://127.0.0.1:6443");
    config.audit = Some(AuditConfig {
        policy: Policy::parse(policy).unwrap(),
        log: LogConfig::new(&path),
    });
    Audited {
        cluster: server.create_cluster(config).await.unwrap(),
        path,
        _dir: dir,
    }
}

/// Events until `done` of them; the writer is a thread of its own.
fn events(path: &Path, done: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let events: Vec<Value> = text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
        if done(&events) {
            return events;
        }
        assert!(Instant::now() < end, "never; the log holds:\n{text}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn of<'e>(events: &'e [Value], verb: &str, stage: &str) -> Vec<&'e Value> {
    events
        .iter()
        .filter(|e| e["verb"] == verb && e["stage"] == stage)
        .collect()
}

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

#[tokio::test]
async fn every_stage_has_upstreams_fields() {
    let all = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitManagedFields: true\nrules: [{level: RequestResponse}]";
    let a = audited(all).await;
    let admin = a.cluster.local_service(UserInfo::admin("boss"));
    let body = json!({"metadata": {"name": "m"}, "data": {"k": "v"}}).to_string();
    let request = Request::post(MAPS)
        .header("content-type", "application/json")
        .header("user-agent", "kubectl/v1.36")
        .header("audit-id", "chosen")
        .header("x-forwarded-for", "192.0.2.7")
        .header("impersonate-user", "alice")
        .header("impersonate-group", "system:masters")
        .body(common::body(body))
        .unwrap();
    let response = admin.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status().as_u16(), 201);
    assert_eq!(response.headers()["audit-id"], "chosen");
    let events_ = events(&a.path, |e| !of(e, "create", "ResponseComplete").is_empty());
    assert_eq!(of(&events_, "create", "RequestReceived").len(), 1);
    let event = of(&events_, "create", "ResponseComplete")[0];
    assert_eq!(event["kind"], "Event");
    assert_eq!(event["apiVersion"], "audit.k8s.io/v1");
    assert_eq!(event["level"], "RequestResponse");
    assert_eq!(event["auditID"], "chosen");
    assert_eq!(event["requestURI"], MAPS);
    assert_eq!(event["user"]["username"], "boss");
    assert_eq!(event["impersonatedUser"]["username"], "alice");
    assert_eq!(event["sourceIPs"], json!(["192.0.2.7"]));
    assert_eq!(event["userAgent"], "kubectl/v1.36");
    assert_eq!(
        event["objectRef"],
        json!({"resource": "configmaps", "namespace": "default", "name": "m", "apiVersion": "v1"})
    );
    assert_eq!(event["responseStatus"]["code"], 201);
    assert_eq!(event["annotations"]["authorization.k8s.io/decision"], "allow");
    assert_eq!(event["requestObject"]["data"]["k"], "v");
    assert!(event["responseObject"]["metadata"]["uid"].is_string());
    assert!(
        event["responseObject"]["metadata"]["managedFields"].is_null(),
        "{event}"
    );
    for time in ["requestReceivedTimestamp", "stageTimestamp"] {
        assert!(
            event[time]
                .as_str()
                .is_some_and(|t| t.ends_with('Z') && t.contains('.')),
            "{event}"
        );
    }

    // A watch has a beginning and, when its client goes, an end.
    let request = Request::get(format!("{MAPS}?watch=1")).body(common::body("")).unwrap();
    let mut watch = admin.clone().oneshot(request).await.unwrap().into_body();
    assert!(watch.frame().await.is_some());
    events(&a.path, |e| !of(e, "watch", "ResponseStarted").is_empty());
    drop(watch);
    let events_ = events(&a.path, |e| !of(e, "watch", "ResponseComplete").is_empty());
    assert_eq!(of(&events_, "watch", "RequestReceived").len(), 1);

    let nobody = a.cluster.local_service(UserInfo::new("bob", Vec::<String>::new()));
    let (code, _) = call(&nobody, "GET", MAPS, "", "").await;
    assert_eq!(code, 403);
    let events_ = events(&a.path, |e| !of(e, "list", "ResponseComplete").is_empty());
    let event = of(&events_, "list", "ResponseComplete")[0];
    assert_eq!(event["annotations"]["authorization.k8s.io/decision"], "forbid");
    assert_eq!(event["responseStatus"]["reason"], "Forbidden");
}

#[tokio::test]
async fn the_default_policy_writes_no_secret_and_no_noise() {
    let a = audited(DEFAULT_POLICY).await;
    let admin = a.cluster.local_service(UserInfo::admin("boss"));
    let secret = json!({"metadata": {"name": "s"}, "stringData": {"password": "hunter2"}}).to_string();
    let path = "/api/v1/namespaces/default/secrets";
    assert_eq!(call(&admin, "POST", path, "application/json", secret).await.0, 201);
    assert_eq!(call(&admin, "GET", "/healthz", "", "").await.0, 200);
    let patch = json!({"stringData": {"password": "hunter2"}}).to_string();
    call(
        &admin,
        "PATCH",
        &format!("{path}/s"),
        "application/merge-patch+json",
        patch,
    )
    .await;
    let service = json!({"metadata": {"name": "svc"}, "spec": {"ports": [{"port": 80}]}}).to_string();
    call(
        &admin,
        "POST",
        "/api/v1/namespaces/default/services",
        "application/json",
        service,
    )
    .await;
    let events = events(&a.path, |e| of(e, "create", "ResponseComplete").len() == 2);
    let text = std::fs::read_to_string(&a.path).unwrap();
    assert!(!text.contains("hunter2") && !text.contains("aHVudGVyMg"), "{text}");
    assert!(!text.contains("healthz"), "{text}");
    assert!(events.iter().all(|e| e["stage"] != "RequestReceived"));
    let service = of(&events, "create", "ResponseComplete")[1];
    assert_eq!(
        (&service["level"], &service["requestObject"]["kind"]),
        (&json!("Request"), &Value::Null)
    );
    assert_eq!(service["requestObject"]["spec"]["ports"][0]["port"], 80);
    assert!(service["responseObject"].is_null());
}

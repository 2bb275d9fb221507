//! The client and the informers against a scripted server, in paused time.
//!
//! The script is a list of steps; each request must be the next step's, and gets that step's answer. Requests after the
//! last step wait for ever, as a quiet watch does.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use parking_lot::Mutex;
use serde_json::{Value, json};
use stdx::{ManualClock, Shutdown};

use crate::error::Optional;
use crate::{
    Body, BoxError, Client, DeleteParams, EventType, Informers, Key, ListParams, LocalService, Patch, Queue, Recorder,
    Requeue, Retry, full_body, run_controller,
};

enum Answer {
    Json(u16, Value),
    /// Frames, then the end of the body.
    Watch(Vec<Value>),
    /// Frames, then silence.
    OpenWatch(Vec<Value>),
    /// Frames, then a broken connection.
    BrokenWatch(Vec<Value>),
    Refused,
}

#[derive(Clone, Default)]
struct Server {
    steps: Arc<Mutex<VecDeque<(&'static str, Answer)>>>,
    seen: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Server {
    fn new(steps: Vec<(&'static str, Answer)>) -> Self {
        Self {
            steps: Arc::new(Mutex::new(steps.into())),
            seen: Arc::default(),
        }
    }

    fn client(&self) -> Client {
        let this = self.clone();
        Client::local(LocalService::new(tower::service_fn(move |request| {
            this.clone().answer(request)
        })))
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let (parts, body) = request.into_parts();
        let line = format!("{} {}", parts.method, parts.uri);
        let body = body.collect().await?.to_bytes();
        self.seen
            .lock()
            .push((line.clone(), serde_json::from_slice(&body).unwrap_or(Value::Null)));
        let step = self.steps.lock().pop_front();
        let Some((expected, answer)) = step else {
            return std::future::pending().await;
        };
        assert!(line.starts_with(expected), "expected {expected}, got {line}");
        let lines = |frames: Vec<Value>| frames.iter().map(|f| format!("{f}\n")).collect::<String>();
        let (code, body) = match answer {
            Answer::Refused => return Err("connection refused".into()),
            Answer::Json(code, value) => (code, full_body(value.to_string())),
            Answer::Watch(frames) => (200, full_body(lines(frames))),
            Answer::OpenWatch(frames) | Answer::BrokenWatch(frames) if frames.is_empty() => (200, full_body("")),
            Answer::OpenWatch(frames) => {
                let (mut tx, body) = http_body_util::channel::Channel::<Bytes, BoxError>::new(4);
                let text = lines(frames);
                tokio::spawn(async move {
                    // Cut in the middle, as networks do.
                    let (a, b) = text.split_at(text.len() / 2);
                    let _ = tx.send_data(Bytes::from(a.to_owned())).await;
                    let _ = tx.send_data(Bytes::from(b.to_owned())).await;
                    std::future::pending::<()>().await;
                    drop(tx);
                });
                (200, Body::new(body))
            }
            Answer::BrokenWatch(frames) => {
                let (mut tx, body) = http_body_util::channel::Channel::<Bytes, BoxError>::new(4);
                let text = lines(frames);
                tokio::spawn(async move {
                    let _ = tx.send_data(Bytes::from(text)).await;
                    tx.abort("connection reset".into());
                });
                (200, Body::new(body))
            }
        };
        Ok(Response::builder().status(code).body(body)?)
    }

    fn lines(&self) -> Vec<String> {
        self.seen.lock().iter().map(|(line, _)| line.clone()).collect()
    }
}

fn pod(name: &str, rv: u64) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata":
        {"namespace": "d", "name": name, "uid": format!("uid-{name}"), "resourceVersion": rv.to_string()}})
}

fn frame(kind: &str, object: Value) -> Value {
    json!({"type": kind, "object": object})
}

fn list(rv: u64, items: Vec<Value>) -> Answer {
    Answer::Json(
        200,
        json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": rv.to_string()},
        "items": items}),
    )
}

fn status(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
        "message": format!("it is {reason}")})
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

fn names(informer: &crate::Informer<Pod>) -> Vec<String> {
    informer
        .list()
        .iter()
        .map(|p| p.metadata.name.clone().unwrap_or_default())
        .collect()
}

#[tokio::test(start_paused = true)]
async fn lists_then_watches_and_resumes_where_each_watch_ended() {
    let server = Server::new(vec![
        ("GET /api/v1/pods", Answer::Refused),
        ("GET /api/v1/pods", list(10, vec![pod("a", 5), pod("b", 6)])),
        (
            "GET /api/v1/pods?watch=1&allowWatchBookmarks=true&timeoutSeconds=300&resourceVersion=10",
            Answer::Watch(vec![frame("ADDED", pod("c", 11)), frame("DELETED", pod("a", 12))]),
        ),
        (
            "GET /api/v1/pods?watch=1&allowWatchBookmarks=true&timeoutSeconds=300&resourceVersion=12",
            Answer::BrokenWatch(vec![frame(
                "BOOKMARK",
                json!({"kind": "Pod", "metadata": {"resourceVersion": "20"}}),
            )]),
        ),
        (
            "GET /api/v1/pods?watch=1&allowWatchBookmarks=true&timeoutSeconds=300&resourceVersion=20",
            Answer::OpenWatch(vec![frame("MODIFIED", pod("b", 21))]),
        ),
    ]);
    let informers = Informers::new(server.client());
    let pods = informers.get::<Pod>();
    let mut keys = pods.subscribe();
    pods.wait_synced().await;
    until("the last watch", || {
        pods.get("d", "b")
            .is_some_and(|p| p.metadata.resource_version.as_deref() == Some("21"))
    })
    .await;
    assert_eq!(names(&pods), ["b", "c"]);
    assert_eq!(pods.lists(), 1);
    let mut heard = Vec::new();
    for _ in 0..5 {
        heard.push(keys.recv().await.unwrap().name);
    }
    assert_eq!(heard, ["a", "b", "c", "a", "b"]);
    informers.stop().await;
}

#[tokio::test(start_paused = true)]
async fn lists_again_when_the_version_is_gone_and_tells_of_what_went_missing() {
    let server = Server::new(vec![
        ("GET /api/v1/pods", list(10, vec![pod("a", 5), pod("b", 6)])),
        (
            "GET /api/v1/pods?watch=1",
            Answer::Watch(vec![frame("ERROR", status(410, "Expired"))]),
        ),
        ("GET /api/v1/pods", list(30, vec![pod("b", 6), pod("c", 25)])),
        ("GET /api/v1/pods?watch=1", Answer::Json(410, status(410, "Expired"))),
        ("GET /api/v1/pods", list(40, vec![pod("c", 25)])),
    ]);
    let informers = Informers::new(server.client());
    let pods = informers.get::<Pod>();
    let deleted = Arc::new(Mutex::new(Vec::new()));
    let sink = deleted.clone();
    pods.on_change(move |change| {
        if change.is_deletion() {
            sink.lock().push(change.key().to_string());
        }
    });
    until("three lists", || pods.lists() == 3).await;
    assert_eq!(names(&pods), ["c"]);
    assert_eq!(*deleted.lock(), ["d/a", "d/b"]);
}

#[tokio::test(start_paused = true)]
async fn one_informer_per_resource_and_selection() {
    let server = Server::new(vec![]);
    let informers = Informers::new(server.client());
    let typed = informers.get::<Pod>();
    let dynamic = informers.get_dynamic(crate::ResourceId::of::<Pod>());
    let selected = informers.get_selected::<Pod>("spec.nodeName=n1");
    assert!(Arc::ptr_eq(typed.store(), dynamic.store()));
    assert!(!Arc::ptr_eq(typed.store(), selected.store()));
    until("both lists", || server.lines().len() == 2).await;
    let mut lines = server.lines();
    lines.sort();
    assert_eq!(
        lines,
        ["GET /api/v1/pods", "GET /api/v1/pods?fieldSelector=spec.nodeName%3Dn1"]
    );
}

#[tokio::test(start_paused = true)]
async fn calls_carry_preconditions_and_errors_carry_the_status() {
    let server = Server::new(vec![
        (
            "GET /api/v1/namespaces/d/pods/a",
            Answer::Json(404, status(404, "NotFound")),
        ),
        (
            "DELETE /api/v1/namespaces/d/pods/a",
            Answer::Json(409, status(409, "Conflict")),
        ),
        (
            "PATCH /api/v1/namespaces/d/pods/a/status",
            Answer::Json(200, pod("a", 7)),
        ),
        (
            "POST /api/v1/namespaces/d/configmaps",
            Answer::Json(503, json!("overloaded")),
        ),
        (
            "GET /api/v1/namespaces/d/pods?labelSelector=a%3Db",
            Answer::Json(200, json!({"metadata": {}, "items": null})),
        ),
    ]);
    let client = server.client();
    assert!(client.get::<Pod>(Some("d"), "a").await.optional().unwrap().is_none());
    let error = client
        .delete::<Pod>(Some("d"), "a", &DeleteParams::uid("u1"))
        .await
        .unwrap_err();
    assert!(error.is_conflict() && error.retry() == Retry::AfterResync);
    assert_eq!(
        stdx::chain(&error).to_string(),
        "DELETE /api/v1/namespaces/d/pods/a: it is Conflict"
    );
    assert_eq!(server.seen.lock()[1].1["preconditions"]["uid"], "u1");
    let patched: Pod = client
        .patch(Some("d"), "a", &Patch::Merge(json!({"status": {}})), Some("status"))
        .await
        .unwrap();
    assert_eq!(patched.metadata.name.as_deref(), Some("a"));
    let map = ConfigMap {
        metadata: ObjectMeta {
            namespace: Some("d".into()),
            name: Some("m".into()),
            ..Default::default()
        },
        ..Default::default()
    };
    let error = client.create(None, &map).await.unwrap_err();
    assert_eq!((error.code(), error.retry()), (Some(503), Retry::Soon(Duration::ZERO)));
    assert!(
        client
            .list::<Pod>(Some("d"), &ListParams::labels("a=b"))
            .await
            .unwrap()
            .items
            .is_empty()
    );
    let error = client.get::<Pod>(Some("d"), "never answered").await.unwrap_err();
    assert!(
        stdx::chain(&error)
            .to_string()
            .ends_with("never%20answered: no answer within 30 s")
    );
}

#[tokio::test(start_paused = true)]
async fn a_controller_retries_failures_and_panics_and_ends_with_its_token() {
    let queue = Queue::new();
    let runs = Arc::new(Mutex::new(Vec::new()));
    let shutdown = Shutdown::new();
    let (log, again) = (
        runs.clone(),
        Server::new(vec![("GET /api/v1/pods", Answer::Refused)]).client(),
    );
    let work = move |key: Key| {
        let (log, client) = (log.clone(), again.clone());
        async move {
            let run = {
                let mut log = log.lock();
                log.push(key.name.clone());
                log.iter().filter(|name| **name == key.name).count()
            };
            match (key.name.as_str(), run) {
                ("fails", 1) => client
                    .list::<Pod>(None, &ListParams::default())
                    .await
                    .map(|_| Requeue::Done),
                ("panics", 1) => panic!("a bug"),
                ("again", 1) => Ok(Requeue::After(Duration::from_secs(60))),
                _ => Ok(Requeue::Done),
            }
        }
    };
    let task = tokio::spawn({
        let (queue, shutdown) = (queue.clone(), shutdown.clone());
        async move { run_controller("test", queue, 2, work, shutdown).await }
    });
    for name in ["fails", "panics", "again", "fine"] {
        queue.add(Key::new("", name));
    }
    until("all runs", || runs.lock().len() == 7).await;
    shutdown.trigger();
    task.await.unwrap();
    let mut runs = runs.lock().clone();
    runs.sort();
    assert_eq!(runs, ["again", "again", "fails", "fails", "fine", "panics", "panics"]);
}

#[tokio::test(start_paused = true)]
async fn equal_events_count_up_and_noisy_objects_are_limited() {
    let mut steps = vec![
        (
            "POST /api/v1/namespaces/d/events",
            Answer::Json(201, json!({"metadata": {}, "involvedObject": {}})),
        ),
        (
            "PATCH /api/v1/namespaces/d/events/a.",
            Answer::Json(200, json!({"metadata": {}, "involvedObject": {}})),
        ),
        (
            "PATCH /api/v1/namespaces/d/events/a.",
            Answer::Json(404, status(404, "NotFound")),
        ),
    ];
    for _ in 0..100 {
        steps.push((
            "POST /api/v1/namespaces/d/events",
            Answer::Json(201, json!({"metadata": {}, "involvedObject": {}})),
        ));
    }
    let server = Server::new(steps);
    let clock = Arc::new(ManualClock::at_unix(1_767_323_045));
    let recorder = Recorder::new(server.client(), "tester", "", clock, Shutdown::new());
    let pod: Pod = serde_json::from_value(pod("a", 5)).unwrap();
    for _ in 0..3 {
        recorder.event(&pod, EventType::Warning, "Odd", "it is odd");
    }
    until("three events", || server.seen.lock().len() == 4).await;
    let event: Event = serde_json::from_value(server.seen.lock()[0].1.clone()).unwrap();
    assert_eq!(event.type_.as_deref(), Some("Warning"));
    assert_eq!(event.involved_object.uid.as_deref(), Some("uid-a"));
    assert_eq!(
        server.seen.lock()[1].1,
        json!({"count": 2, "lastTimestamp": "2026-01-02T03:04:05Z"})
    );
    for n in 0..50 {
        recorder.event(&pod, EventType::Normal, "Noise", format!("noise {n}"));
    }
    until("the queue drained", || recorder.counters().depth() == 0).await;
    until("the burst", || server.seen.lock().len() == 26).await;
    assert_eq!(server.steps.lock().len(), 103 - 26);
}

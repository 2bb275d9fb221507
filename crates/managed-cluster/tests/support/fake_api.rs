//! A Kubernetes API in memory, enough for controllers: any kind, optimistic writes, generations, the status subresource,
//! finalizers, merge patches, label and field selectors, watches with history. It checks nothing else.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use reconcile::{Body, BoxError, LocalService, full_body};
use serde_json::{Value, json};
use tokio::sync::watch;

/// Collection (`oaks.internal/v1alpha1/machines`), namespace, name.
type ObjectKey = (String, String, String);

#[derive(Default)]
struct State {
    revision: u64,
    objects: BTreeMap<ObjectKey, Value>,
    /// Every event since the start: revision, collection, type, object.
    events: Vec<(u64, String, &'static str, Value)>,
}

/// Clones share the state.
#[derive(Clone)]
pub struct FakeApi {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
}

struct Target {
    collection: String,
    ns: String,
    name: String,
    sub: String,
}

fn target(path: &str) -> Option<Target> {
    let mut parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    let root = parts.first().copied()?;
    let gv = match root {
        "api" => parts.drain(..2).nth(1)?.to_owned(),
        "apis" => parts.drain(..3).skip(1).collect::<Vec<_>>().join("/"),
        _ => return None,
    };
    let mut ns = String::new();
    if parts.first() == Some(&"namespaces") && parts.len() > 2 {
        ns = parts[1].to_owned();
        parts.drain(..2);
    }
    let mut parts = parts.into_iter().map(str::to_owned);
    let plural = parts.next()?;
    Some(Target {
        collection: format!("{gv}/{plural}"),
        ns,
        name: parts.next().unwrap_or_default(),
        sub: parts.next().unwrap_or_default(),
    })
}

fn failure(status: u16, reason: &str, message: &str) -> (StatusCode, Value) {
    let code = StatusCode::from_u16(status).unwrap();
    (
        code,
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": status}),
    )
}

fn merge(base: &mut Value, patch: &Value) {
    let Value::Object(p) = patch else {
        *base = patch.clone();
        return;
    };
    if !base.is_object() {
        *base = json!({});
    }
    for (k, v) in p {
        if v.is_null() {
            base.as_object_mut().unwrap().remove(k);
        } else {
            merge(&mut base[k], v);
        }
    }
}

fn matches(object: &Value, query: &BTreeMap<String, String>) -> bool {
    let labels = query.get("labelSelector").map(String::as_str).unwrap_or_default();
    let fields = query.get("fieldSelector").map(String::as_str).unwrap_or_default();
    let label_ok = labels
        .split(',')
        .filter(|t| !t.is_empty())
        .all(|t| match t.split_once('=') {
            Some((k, v)) => object["metadata"]["labels"][k] == v.trim_start_matches('='),
            None => !object["metadata"]["labels"][t].is_null(),
        });
    let field_ok = fields.split(',').filter(|t| !t.is_empty()).all(|t| {
        let (k, v) = t.split_once('=').unwrap();
        object
            .pointer(&format!("/{}", k.replace('.', "/")))
            .and_then(Value::as_str)
            .unwrap_or_default()
            == v
    });
    label_ok && field_ok
}

impl FakeApi {
    pub fn new() -> Self {
        Self {
            state: Arc::default(),
            changed: watch::Sender::new(0),
        }
    }

    pub fn service(&self) -> LocalService {
        let api = self.clone();
        LocalService::new(tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { api.respond(request).await }
        }))
    }

    async fn respond(&self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let (parts, body) = request.into_parts();
        let bytes = body.collect().await?.to_bytes();
        let query: BTreeMap<String, String> = arm::http::pairs(parts.uri.query().unwrap_or_default())
            .into_iter()
            .collect();
        let Some(target) = target(parts.uri.path()) else {
            let (code, v) = failure(404, "NotFound", "no such path");
            return Ok(Response::builder().status(code).body(full_body(v.to_string()))?);
        };
        if query.contains_key("watch") {
            let from = query.get("resourceVersion").and_then(|r| r.parse().ok()).unwrap_or(0);
            return Ok(Response::new(self.watch(target.collection, query, from)));
        }
        let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let (code, v) = self.act(&parts.method, &target, body, &query);
        Ok(Response::builder().status(code).body(full_body(v.to_string()))?)
    }

    fn watch(&self, collection: String, query: BTreeMap<String, String>, from: u64) -> Body {
        let (api, receiver) = (self.clone(), self.changed.subscribe());
        let stream = futures::stream::unfold((from, receiver), move |(seen, mut receiver)| {
            let (api, collection, query) = (api.clone(), collection.clone(), query.clone());
            async move {
                loop {
                    let next: Vec<_> = {
                        let state = api.state.lock().unwrap();
                        state.events.iter().filter(|e| e.0 > seen).cloned().collect()
                    };
                    if let Some(last) = next.last().map(|e| e.0) {
                        let lines: String = next
                            .iter()
                            .filter(|e| e.1 == collection && matches(&e.3, &query))
                            .map(|e| format!("{}\n", json!({"type": e.2, "object": e.3})))
                            .collect();
                        let frame = Frame::data(Bytes::from(lines));
                        return Some((Ok::<_, BoxError>(frame), (last, receiver)));
                    }
                    if receiver.changed().await.is_err() {
                        return None;
                    }
                }
            }
        });
        StreamBody::new(stream).boxed_unsync()
    }

    fn act(
        &self,
        method: &Method,
        t: &Target,
        mut body: Value,
        query: &BTreeMap<String, String>,
    ) -> (StatusCode, Value) {
        let mut state = self.state.lock().unwrap();
        let key = (t.collection.clone(), t.ns.clone(), t.name.clone());
        let reply = match *method {
            Method::GET if t.name.is_empty() => {
                let items: Vec<Value> = state
                    .objects
                    .iter()
                    .filter(|(k, v)| k.0 == t.collection && (t.ns.is_empty() || k.1 == t.ns) && matches(v, query))
                    .map(|(_, v)| v.clone())
                    .collect();
                (
                    StatusCode::OK,
                    json!({"kind": "List", "metadata": {"resourceVersion": state.revision.to_string()}, "items": items}),
                )
            }
            Method::GET => match state.objects.get(&key) {
                Some(o) => (StatusCode::OK, o.clone()),
                None => failure(404, "NotFound", "not found"),
            },
            Method::POST if !t.sub.is_empty() => failure(404, "NotFound", "no such subresource"),
            Method::POST => {
                let name = body["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                let key = (key.0, key.1, name);
                if state.objects.contains_key(&key) {
                    return failure(409, "AlreadyExists", "exists");
                }
                body["metadata"]["uid"] = json!(uuid::Uuid::new_v4().to_string());
                body["metadata"]["generation"] = json!(1);
                body["metadata"]["creationTimestamp"] =
                    json!(apimachinery::time::now_rfc3339(&*stdx::clock::RealClock::shared()));
                if !t.ns.is_empty() {
                    body["metadata"]["namespace"] = json!(t.ns);
                }
                state.put(key, body, "ADDED")
            }
            Method::PUT | Method::PATCH => {
                let Some(old) = state.objects.get(&key).cloned() else {
                    return failure(404, "NotFound", "not found");
                };
                let mut new = if method == Method::PATCH {
                    let mut new = old.clone();
                    merge(&mut new, &body);
                    new
                } else {
                    let sent = body["metadata"]["resourceVersion"].as_str().unwrap_or_default();
                    if !sent.is_empty() && old["metadata"]["resourceVersion"] != sent {
                        return failure(409, "Conflict", "changed");
                    }
                    body
                };
                if t.sub == "status" {
                    let status = new["status"].take();
                    new = old.clone();
                    new["status"] = status;
                } else {
                    new["status"] = old["status"].clone();
                }
                for f in ["uid", "generation", "creationTimestamp", "deletionTimestamp"] {
                    new["metadata"][f] = old["metadata"][f].clone();
                }
                new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
                if new["spec"] != old["spec"] {
                    new["metadata"]["generation"] = json!(old["metadata"]["generation"].as_i64().unwrap_or(0) + 1);
                }
                if new == old {
                    return (StatusCode::OK, old);
                }
                state.put_or_drop(key, new)
            }
            Method::DELETE => {
                let Some(mut old) = state.objects.get(&key).cloned() else {
                    return failure(404, "NotFound", "not found");
                };
                if old["metadata"]["deletionTimestamp"].is_null() {
                    old["metadata"]["deletionTimestamp"] =
                        json!(apimachinery::time::now_rfc3339(&*stdx::clock::RealClock::shared()));
                    old["metadata"]["generation"] = json!(old["metadata"]["generation"].as_i64().unwrap_or(0) + 1);
                }
                state.put_or_drop(key, old)
            }
            _ => failure(405, "MethodNotAllowed", "method"),
        };
        let revision = state.revision;
        drop(state);
        self.changed.send_replace(revision);
        reply
    }
}

impl State {
    fn put(&mut self, key: ObjectKey, mut object: Value, event: &'static str) -> (StatusCode, Value) {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        strip_nulls(&mut object);
        self.events.push((self.revision, key.0.clone(), event, object.clone()));
        if event == "DELETED" {
            self.objects.remove(&key);
        } else {
            self.objects.insert(key, object.clone());
        }
        (
            if event == "ADDED" {
                StatusCode::CREATED
            } else {
                StatusCode::OK
            },
            object,
        )
    }

    /// An object on its way out goes with its last finalizer.
    fn put_or_drop(&mut self, key: ObjectKey, object: Value) -> (StatusCode, Value) {
        let held = object["metadata"]["finalizers"]
            .as_array()
            .is_some_and(|f| !f.is_empty());
        let event = if object["metadata"]["deletionTimestamp"].is_string() && !held {
            "DELETED"
        } else {
            "MODIFIED"
        };
        self.put(key, object, event)
    }
}

fn strip_nulls(object: &mut Value) {
    if let Some(m) = object["metadata"].as_object_mut() {
        m.retain(|_, v| !v.is_null());
    }
    if let Some(o) = object.as_object_mut() {
        o.retain(|_, v| !v.is_null());
    }
}

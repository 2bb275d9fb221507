//! The audit log of one cluster: who asked what, and what became of it.
//!
//! The policy decides once who asks is known. A [`Trail`] follows one request through the router; it writes an event per
//! stage, with upstream's fields. Bodies are kept while they pass, up to a bound.
//!
//! # Source
//! `staging/src/k8s.io/apiserver/pkg/audit` and `pkg/endpoints/filters/audit.go` of Kubernetes 1.36.

mod log;
mod policy;

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Poller, Poll};

use apimachinery::codec::{self, Media};
use apimachinery::gvk::Gvk;
use apimachinery::{meta, time};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Response};
use http_body::Frame;
use http_body_util::BodyExt;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::auth::{Attributes, Decision, UserInfo};
use crate::cluster::Cluster;
use crate::handlers::write;
use crate::{Body, BoxError, respond};

pub use log::{Counters, Log, LogConfig};
pub use policy::{DEFAULT_POLICY, Level, Policy, PolicyError, Stage, Verdict};

/// Most of an answer that is kept for the log.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// Longest audit id that a client may choose.
const ID_BYTES_MAX: usize = 64;
const AUDIT_ID: &str = "audit-id";

/// How a cluster is audited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    pub policy: Policy,
    pub log: LogConfig,
}

/// The address a connection comes from; an extension of its requests.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub IpAddr);

/// Policy and log of a cluster.
pub struct Auditor {
    pub policy: Policy,
    pub log: Log,
}

/// One request on its way.
pub struct Trail {
    cluster: Arc<Cluster>,
    event: Mutex<Event>,
    sent: Arc<Mutex<Kept>>,
}

struct Event {
    verdict: Verdict,
    /// All fields but stage, time and bodies.
    base: Value,
    media: Option<Media>,
    gvk: Option<Gvk>,
    done: bool,
}

/// Bytes that passed by.
#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    /// There were more than are kept.
    cut: bool,
}

impl Trail {
    /// Begins the trail of a request, if the cluster is audited.
    pub fn begin(cluster: &Arc<Cluster>, parts: &Parts, attributes: &Attributes, version: &str) -> Option<Arc<Trail>> {
        cluster.auditor.as_ref()?;
        let now = time::now_micro(&*cluster.clock);
        let header = |name: &str| parts.headers.get(name).and_then(|v| v.to_str().ok());
        let id = header(AUDIT_ID)
            .filter(|id| !id.is_empty() && id.len() <= ID_BYTES_MAX)
            .map_or_else(|| cluster.new_uid(), str::to_owned);
        let uri = parts.uri.path_and_query().map_or("/", |p| p.as_str());
        let mut base = json!({
            "kind": "Event", "apiVersion": "audit.k8s.io/v1", "auditID": id, "requestURI": uri,
            "verb": attributes.verb, "user": {}, "requestReceivedTimestamp": now,
        });
        let addresses = source_addresses(&parts.headers, parts.extensions.get::<Peer>());
        if !addresses.is_empty() {
            base["sourceIPs"] = json!(addresses);
        }
        if let Some(agent) = header("user-agent") {
            base["userAgent"] = agent.into();
        }
        let mut gvk = None;
        if !attributes.resource.is_empty() {
            let mut reference = json!({"resource": attributes.resource, "apiVersion": version});
            for (key, value) in [
                ("namespace", &attributes.namespace),
                ("name", &attributes.name),
                ("apiGroup", &attributes.group),
                ("subresource", &attributes.subresource),
            ] {
                if !value.is_empty() {
                    reference[key] = value.as_str().into();
                }
            }
            base["objectRef"] = reference;
            gvk = cluster
                .resource(&attributes.group, version, &attributes.resource)
                .map(|s| match s.info.subresource(&attributes.subresource) {
                    Some(sub) => sub.kind.clone(),
                    None => s.info.gvk.clone(),
                });
        }
        let media = match parts.method {
            http::Method::PATCH => Some(Media::Yaml),
            _ => write::media_of(&parts.headers),
        };
        Some(Arc::new(Trail {
            cluster: cluster.clone(),
            event: Mutex::new(Event {
                verdict: Verdict::default(),
                base,
                media,
                gvk,
                done: false,
            }),
            sent: Arc::default(),
        }))
    }

    /// Who asks is known: the policy decides, and the first stage is written.
    pub async fn decide(&self, user: &UserInfo, attributes: &Attributes) {
        let Some(auditor) = &self.cluster.auditor else { return };
        {
            let mut event = self.event.lock();
            event.base["user"] = shown(user);
            event.verdict = auditor.policy.verdict(user, attributes);
            event.base["level"] = json!(event.verdict.level);
        }
        self.write(Stage::RequestReceived, None, None).await;
    }

    /// Nobody was let in: what is known is written as metadata.
    pub fn refused(&self) {
        let mut event = self.event.lock();
        event.verdict.level = Level::Metadata;
        event.base["level"] = json!(Level::Metadata);
    }

    /// The request acts as somebody else.
    pub fn impersonated(&self, user: &UserInfo) {
        self.event.lock().base["impersonatedUser"] = shown(user);
    }

    /// What the authorizers said.
    pub fn authorized(&self, decision: &Decision) {
        let (word, reason) = match decision {
            Decision::Allow(reason) => ("allow", reason),
            Decision::Deny(reason) => ("forbid", reason),
        };
        self.event.lock().base["annotations"] = json!({
            "authorization.k8s.io/decision": word, "authorization.k8s.io/reason": reason,
        });
    }

    /// The body, kept while it is read if the policy wants it.
    pub fn watch_request(&self, body: Body) -> Body {
        if self.event.lock().verdict.level < Level::Request {
            return body;
        }
        Tee {
            body,
            kept: self.sent.clone(),
            max: write::BODY_BYTES_MAX,
            end: None,
        }
        .boxed_unsync()
    }

    /// Writes the last stage, or for a long-running request that its answer began and, when its body ends, the last one.
    pub async fn answered(self: &Arc<Self>, mut response: Response<Body>, long: bool) -> Response<Body> {
        let (level, id) = {
            let event = self.event.lock();
            (
                event.verdict.level,
                event.base["auditID"].as_str().unwrap_or_default().to_owned(),
            )
        };
        if let Ok(id) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(AUDIT_ID, id);
        }
        if level == Level::None {
            return response;
        }
        let code = response.status().as_u16();
        if long && response.status().is_success() || code == 101 {
            self.write(Stage::ResponseStarted, Some(code), None).await;
            let end = End {
                trail: self.clone(),
                code,
            };
            return response.map(|body| {
                Tee {
                    body,
                    kept: Arc::default(),
                    max: 0,
                    end: Some(end),
                }
                .boxed_unsync()
            });
        }
        if level < Level::RequestResponse && code < 400 {
            self.write(Stage::ResponseComplete, Some(code), None).await;
            return response;
        }
        // Short answers are whole in memory anyway; long lists are passed on and not kept.
        let (parts, body) = response.into_parts();
        let size = http_body::Body::size_hint(&body).exact().unwrap_or(u64::MAX);
        if size > ANSWER_BYTES_MAX as u64 {
            self.write(Stage::ResponseComplete, Some(code), None).await;
            return Response::from_parts(parts, body);
        }
        let bytes = match body.collect().await {
            Ok(collected) => collected.to_bytes(),
            Err(_) => Bytes::new(),
        };
        let answer = self.object(&bytes, media_of_answer(&parts.headers));
        self.write(Stage::ResponseComplete, Some(code), answer).await;
        Response::from_parts(parts, respond::full(bytes))
    }

    /// A body as a tree, in whatever encoding it came.
    fn object(&self, bytes: &[u8], media: Option<Media>) -> Option<Value> {
        let event = self.event.lock();
        let mut value = match media? {
            Media::Protobuf => {
                let fallback = event.gvk.clone().unwrap_or_else(|| Gvk::new("", "v1", "Status"));
                codec::from_protobuf(&self.cluster.table(), &fallback, bytes).ok()?
            }
            media => codec::parse_untyped(media, bytes).ok()?,
        };
        if event.verdict.omit_managed_fields {
            drop_managed_fields(&mut value);
        }
        Some(value)
    }

    fn compose(&self, stage: Stage, code: Option<u16>, answer: Option<Value>) -> Option<Value> {
        let sent = match stage {
            Stage::RequestReceived => None,
            _ => {
                let kept = std::mem::take(&mut *self.sent.lock());
                let whole = !kept.bytes.is_empty() && !kept.cut;
                let media = self.event.lock().media;
                let sent = if whole { self.object(&kept.bytes, media) } else { None };
                // A stream has two stages with the same request.
                *self.sent.lock() = kept;
                sent
            }
        };
        let mut event = self.event.lock();
        if event.verdict.level == Level::None || event.verdict.omit_stages.contains(&stage) {
            return None;
        }
        if stage == Stage::ResponseComplete && std::mem::replace(&mut event.done, true) {
            return None;
        }
        let mut out = event.base.clone();
        out["stage"] = json!(stage);
        out["stageTimestamp"] = time::now_micro(&*self.cluster.clock).into();
        if let Some(sent) = sent {
            if out["objectRef"].is_object() && out["verb"] == "create" && out["objectRef"]["name"].is_null() {
                let name = meta::name(&sent);
                if !name.is_empty() {
                    out["objectRef"]["name"] = name.into();
                }
            }
            out["requestObject"] = sent;
        }
        if let Some(code) = code {
            out["responseStatus"] = json!({"metadata": {}, "code": code});
        }
        if let Some(answer) = answer {
            if answer["kind"] == "Status" {
                for key in ["status", "message", "reason"] {
                    if answer[key].is_string() {
                        out["responseStatus"][key] = answer[key].clone();
                    }
                }
            }
            if event.verdict.level == Level::RequestResponse {
                out["responseObject"] = answer;
            }
        }
        Some(out)
    }

    async fn write(&self, stage: Stage, code: Option<u16>, answer: Option<Value>) {
        if let (Some(event), Some(auditor)) = (self.compose(stage, code, answer), &self.cluster.auditor) {
            auditor.log.write(event).await;
        }
    }
}

/// The addresses a request passed through, first the client's: what proxies say, then the connection's own.
fn source_addresses(headers: &HeaderMap, peer: Option<&Peer>) -> Vec<String> {
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let forwarded = header("x-forwarded-for").split(',').chain([header("x-real-ip")]);
    let mut out: Vec<String> = Vec::new();
    let peer = peer.map(|p| p.0.to_canonical());
    for address in forwarded.filter_map(|a| a.trim().parse::<IpAddr>().ok()).chain(peer) {
        let text = address.to_string();
        if out.last() != Some(&text) {
            out.push(text);
        }
    }
    out
}

fn shown(user: &UserInfo) -> Value {
    let mut value = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        value["uid"] = user.uid.clone().into();
    }
    if !user.extra.is_empty() {
        value["extra"] = json!(user.extra);
    }
    value
}

fn media_of_answer(headers: &HeaderMap) -> Option<Media> {
    // What is compressed was large; it is not unpacked for the log.
    if headers.contains_key(http::header::CONTENT_ENCODING) {
        return None;
    }
    let kind = headers.get(http::header::CONTENT_TYPE)?.to_str().ok()?;
    match kind.split(';').next().unwrap_or_default().trim() {
        "application/json" => Some(Media::Json),
        "application/yaml" => Some(Media::Yaml),
        crate::negotiate::PROTOBUF => Some(Media::Protobuf),
        _ => None,
    }
}

fn drop_managed_fields(value: &mut Value) {
    let drop = |object: &mut Value| {
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
    };
    for item in value
        .get_mut("items")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        drop(item);
    }
    drop(value);
}

/// Writes the last stage of a stream when its body is dropped.
struct End {
    trail: Arc<Trail>,
    code: u16,
}

impl Drop for End {
    fn drop(&mut self) {
        let event = self.trail.compose(Stage::ResponseComplete, Some(self.code), None);
        if let (Some(event), Some(auditor)) = (event, &self.trail.cluster.auditor) {
            auditor.log.write_now(event);
        }
    }
}

/// A body whose bytes are kept while they pass.
struct Tee {
    body: Body,
    kept: Arc<Mutex<Kept>>,
    max: usize,
    #[expect(dead_code, reason = "its drop is what counts")]
    end: Option<End>,
}

impl http_body::Body for Tee {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if self.max > 0
            && let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            let mut kept = self.kept.lock();
            if kept.bytes.len() + data.len() > self.max {
                *kept = Kept {
                    bytes: Vec::new(),
                    cut: true,
                };
            } else if !kept.cut {
                kept.bytes.extend_from_slice(data);
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

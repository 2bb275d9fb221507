//! Watches: a cursor per client on the resource's event ring.
//!
//! A stream makes frames only when the client reads, so a slow client holds no queue; when the ring has moved past its
//! cursor it gets one ERROR event (410) and the end of the stream.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::status::Status;
use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::list::{check_not_future, parse_rv};
use super::{Context, Filter};
use crate::cluster::Cluster;
use crate::negotiate::{As, Media, Output};
use crate::object::Object;
use crate::registry::{Event, EventKind, Next, Start, scan};
use crate::served::Served;
use crate::{Body, BoxError, respond};

/// Time between bookmarks.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// Shortest life of a watch without `timeoutSeconds`; up to as much again is added so that clients spread.
const LIFETIME_MIN: Duration = Duration::from_secs(1800);
/// Events taken from the ring at once.
const EVENTS_AT_ONCE: usize = 256;

/// Opens a watch.
pub fn watch(cx: &Context) -> Result<Response<Body>, Status> {
    let output = cx.output(true)?;
    if output.media == Media::Yaml {
        return Err(Status::not_acceptable(&[
            "application/json",
            "application/vnd.kubernetes.protobuf",
        ]));
    }
    let filter = Filter::of(cx)?;
    let resource = cx.served.resource.clone();
    let bookmarks = cx.query.flag("allowWatchBookmarks");
    let (rv, how) = (cx.query.get("resourceVersion"), cx.query.get("resourceVersionMatch"));
    let send_initial = cx
        .query
        .has("sendInitialEvents")
        .then(|| cx.query.flag("sendInitialEvents"));
    match (send_initial, how) {
        (Some(_), "NotOlderThan") | (None, "") => {}
        (Some(_), _) => {
            return Err(Status::bad_request(
                "resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        (None, _) => {
            return Err(Status::bad_request(
                "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch",
            ));
        }
    }
    let asked = if matches!(rv, "" | "0") {
        None
    } else {
        Some(parse_rv(rv)?)
    };
    if let Some(rv) = asked {
        check_not_future(cx, rv)?;
    }
    let with_state = match send_initial {
        Some(choice) => choice,
        None => asked.is_none(),
    };

    // The receiver is made before the state is read, so no wake-up is missed.
    let changed = resource.subscribe();
    let (initial, from) = if with_state || asked.is_none() {
        let view = cx.cluster.registry.view(&resource);
        let objects: Vec<_> = if with_state {
            scan(&view.objects, &filter.namespace, None)
                .filter(|(_, o)| filter.matches(o))
                .map(|(_, o)| o.clone())
                .collect()
        } else {
            Vec::new()
        };
        (objects, view.revision)
    } else {
        (Vec::new(), asked.unwrap_or_default())
    };
    let cursor = match resource.start_after(from) {
        Start::At(cursor) => cursor,
        Start::TooOld { floor } => return Err(Status::too_old(from, floor)),
    };

    let seconds: Option<u64> = match cx.query.get("timeoutSeconds") {
        "" => None,
        text => Some(
            text.parse()
                .map_err(|_| Status::bad_request(&format!("timeoutSeconds: not a number: {text:?}")))?,
        ),
    };
    let lifetime = match seconds {
        Some(s) if s > 0 => Duration::from_secs(s),
        _ => LIFETIME_MIN + Duration::from_secs(cx.cluster.random_below(LIFETIME_MIN.as_secs())),
    };
    let now = Instant::now();
    let watcher = Watcher {
        cluster: cx.cluster.clone(),
        served: cx.served.clone(),
        filter,
        output,
        include: cx.query.get("includeObject").to_owned(),
        initial: initial.into_iter(),
        end_initial: (send_initial == Some(true) && bookmarks).then_some(from),
        cursor,
        changed,
        bookmarks,
        next_bookmark: now + BOOKMARK_EVERY,
        deadline: now + lifetime,
        headers_sent: false,
        done: false,
    };
    let stream = futures::stream::unfold(watcher, |mut w| async move {
        let chunk = w.next_chunk().await?;
        Some((Ok::<_, BoxError>(Frame::data(chunk)), w))
    });
    let content_type = match output.media {
        Media::Protobuf => "application/vnd.kubernetes.protobuf;stream=watch",
        _ => "application/json",
    };
    let mut response = respond::bytes(StatusCode::OK, content_type, Bytes::new());
    *response.body_mut() = StreamBody::new(stream).boxed_unsync();
    response
        .headers_mut()
        .insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    Ok(response)
}

struct Watcher {
    cluster: Arc<Cluster>,
    served: Arc<Served>,
    filter: Filter,
    output: Output,
    include: String,
    initial: std::vec::IntoIter<Arc<Object>>,
    /// Revision of the bookmark that ends the initial events.
    end_initial: Option<u64>,
    cursor: u64,
    changed: tokio::sync::watch::Receiver<u64>,
    bookmarks: bool,
    next_bookmark: Instant,
    deadline: Instant,
    headers_sent: bool,
    done: bool,
}

impl Watcher {
    /// The next piece of the stream; `None` ends it.
    async fn next_chunk(&mut self) -> Option<Bytes> {
        let mut out = Vec::new();
        while out.is_empty() {
            if self.done {
                return None;
            }
            self.fill(&mut out);
            if !out.is_empty() || self.done {
                continue;
            }
            let wake = if self.bookmarks {
                self.next_bookmark.min(self.deadline)
            } else {
                self.deadline
            };
            // Cancel safety: nothing is taken from the ring while waiting.
            tokio::select! {
                changed = self.changed.changed() => {
                    if changed.is_err() {
                        self.done = true;
                    }
                }
                () = tokio::time::sleep_until(wake) => self.timer(&mut out),
                () = self.cluster.shutdown.wait() => self.done = true,
                () = self.served.retired.wait() => {
                    // What happened until then is still told: the last deletions of a kind that goes.
                    let mut before = None;
                    while !self.done && before.replace(self.cursor) != Some(self.cursor) {
                        self.events(&mut out);
                    }
                    self.done = true;
                }
            }
        }
        Some(out.into())
    }

    fn timer(&mut self, out: &mut Vec<u8>) {
        let now = Instant::now();
        if self.bookmarks {
            self.next_bookmark = now + BOOKMARK_EVERY;
            // Read the revision first: every event at or below it is then in the ring and is sent before it.
            let revision = self.cluster.registry.revision();
            self.events(out);
            if !self.done {
                self.bookmark(revision, false, out);
            }
        }
        if now >= self.deadline {
            self.done = true;
        }
    }

    fn fill(&mut self, out: &mut Vec<u8>) {
        while out.len() < respond::CHUNK_BYTES {
            let Some(object) = self.initial.next() else { break };
            self.frame("ADDED", &object, out);
        }
        if !out.is_empty() {
            return;
        }
        if let Some(revision) = self.end_initial.take() {
            self.bookmark(revision, true, out);
            return;
        }
        if Instant::now() >= self.deadline {
            self.done = true;
            return;
        }
        self.changed.borrow_and_update();
        self.events(out);
    }

    fn events(&mut self, out: &mut Vec<u8>) {
        loop {
            match self.served.resource.events_from(self.cursor, EVENTS_AT_ONCE) {
                Next::Nothing => return,
                Next::FellOut { floor } => {
                    let status = Status::expired(&format!("too old resource version: the watch fell behind {floor}"));
                    self.raw_frame("ERROR", &status.to_value(), out);
                    self.done = true;
                    return;
                }
                Next::Events(events) => {
                    for event in events {
                        self.cursor += 1;
                        self.event(&event, out);
                    }
                    if out.len() >= respond::CHUNK_BYTES {
                        return;
                    }
                }
            }
        }
    }

    fn event(&mut self, event: &Event, out: &mut Vec<u8>) {
        let before = event.previous.as_ref().is_some_and(|o| self.filter.matches(o));
        let after = event.kind != EventKind::Deleted && self.filter.matches(&event.object);
        match (before, after) {
            (false, false) => {}
            (false, true) => self.frame("ADDED", &event.object, out),
            (true, true) => self.frame("MODIFIED", &event.object, out),
            (true, false) => match (event.kind, &event.previous) {
                (EventKind::Deleted, _) | (_, None) => self.frame("DELETED", &event.object, out),
                (_, Some(previous)) => self.frame("DELETED", &previous.at(event.rv), out),
            },
        }
    }

    fn frame(&mut self, kind: &str, object: &Arc<Object>, out: &mut Vec<u8>) {
        match (self.output.shape, self.output.media) {
            (As::Object, Media::Json) if self.served.shares_storage_version() => {
                let object = self.served.shown(object);
                json_frame(kind, |out| object.write_json(out), out);
            }
            (As::Partial(version), Media::Json) => json_frame(kind, |out| object.write_partial(version, out), out),
            (As::Table(version), _) => {
                let headers = !std::mem::replace(&mut self.headers_sent, true);
                let objects = std::slice::from_ref(object);
                let table = respond::table(
                    &self.cluster,
                    &self.served,
                    objects,
                    version,
                    &self.include,
                    headers,
                    json!({}),
                );
                self.raw_frame(kind, &table, out);
            }
            (_, Media::Protobuf) => {
                let body = respond::encode_object(&self.cluster, &self.served, object, self.output, &self.include);
                out.extend_from_slice(&apimachinery::codec::watch_event_to_protobuf(kind, &body));
            }
            _ => self.raw_frame(kind, &self.served.value(object), out),
        }
    }

    /// Frames a tree that is no stored object.
    fn raw_frame(&self, kind: &str, value: &Value, out: &mut Vec<u8>) {
        if self.output.media == Media::Protobuf
            && let Some(body) = respond::encode(&self.cluster, value, Media::Protobuf)
        {
            out.extend_from_slice(&apimachinery::codec::watch_event_to_protobuf(kind, &body));
            return;
        }
        json_frame(kind, |out| out.extend_from_slice(&respond::to_vec(value)), out);
    }

    fn bookmark(&mut self, revision: u64, end_initial: bool, out: &mut Vec<u8>) {
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if end_initial {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let info = &self.served.info;
        let value = match self.output.shape {
            As::Table(version) => {
                json!({"kind": "Table", "apiVersion": format!("meta.k8s.io/{version}"), "metadata": metadata,
                    "columnDefinitions": null, "rows": []})
            }
            As::Partial(version) => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": format!("meta.k8s.io/{version}"), "metadata": metadata})
            }
            As::Object => json!({"kind": info.kind, "apiVersion": info.api_version(), "metadata": metadata}),
        };
        self.raw_frame("BOOKMARK", &value, out);
    }
}

fn json_frame(kind: &str, object: impl FnOnce(&mut Vec<u8>), out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"type\":\"");
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(b"\",\"object\":");
    object(out);
    out.extend_from_slice(b"}\n");
}

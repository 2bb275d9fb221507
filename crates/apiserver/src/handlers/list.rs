//! get and list: splicing stored bytes into answers.

use std::sync::Arc;

use apimachinery::field::FieldError;
use apimachinery::status::Status;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{Response, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Context, Filter};
use crate::negotiate::{As, Media, Output, media_type};
use crate::object::Object;
use crate::registry::{View, scan};
use crate::{Body, respond};

/// One object.
pub fn get(cx: &Context) -> Result<Response<Body>, Status> {
    let output = cx.output(true)?;
    if !matches!(cx.query.get("resourceVersion"), "" | "0") {
        check_not_future(cx, parse_rv(cx.query.get("resourceVersion"))?)?;
    }
    let object = cx.find()?;
    Ok(cx.object(StatusCode::OK, &object, output))
}

/// Position of a list that continues; what clients treat as opaque.
#[derive(Debug, Deserialize, Serialize)]
struct Continue {
    v: String,
    /// Revision of the first page; -1 continues at the newest state.
    rv: i64,
    /// Key of the last object given.
    start: String,
}

impl Continue {
    fn encode(&self) -> String {
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default())
    }

    fn decode(text: &str) -> Result<Self, Status> {
        let bad =
            |what: String| Status::bad_request(&format!("invalid continue token: continue key is not valid: {what}"));
        let raw = URL_SAFE_NO_PAD
            .decode(text.trim_end_matches('='))
            .map_err(|e| bad(e.to_string()))?;
        let token: Continue = serde_json::from_slice(&raw).map_err(|e| bad(e.to_string()))?;
        if token.v != "meta.k8s.io/v1" || token.rv == 0 || token.rv < -1 {
            return Err(bad(format!("incorrect version or revision in {:?}", token.v)));
        }
        Ok(token)
    }
}

/// Reads a resourceVersion parameter.
pub fn parse_rv(text: &str) -> Result<u64, Status> {
    text.parse()
        .map_err(|_| Status::bad_request(&format!("Invalid value: {text:?}: resourceVersion: must be a number")))
}

/// A revision that this server has not reached is answered 504, as upstream's cache does after waiting.
pub fn check_not_future(cx: &Context, rv: u64) -> Result<(), Status> {
    // A list may have shown a change a moment before the whole transaction counts as visible.
    let current = cx.cluster.registry.revision().max(cx.served.resource.newest());
    if rv <= current {
        Ok(())
    } else {
        Err(Status::too_large_resource_version(rv, current))
    }
}

fn choose_view(cx: &Context, limit: usize) -> Result<(View, Option<Continue>), Status> {
    let registry = &cx.cluster.registry;
    let resource = &cx.served.resource;
    let (rv, how) = (cx.query.get("resourceVersion"), cx.query.get("resourceVersionMatch"));
    let token = cx.query.get("continue");
    if !token.is_empty() {
        if !matches!(rv, "" | "0") {
            return Err(Status::bad_request(
                "specifying resource version is not allowed when using continue",
            ));
        }
        let token = Continue::decode(token)?;
        if token.rv == -1 {
            return Ok((registry.view(resource), Some(token)));
        }
        return match registry.view_at(resource, token.rv as u64) {
            Some(view) => Ok((view, Some(token))),
            None => {
                let fresh = Continue { rv: -1, ..token };
                let mut status = Status::expired(
                    "The provided continue parameter is too old to display a consistent list result. You can start a new \
                     list without the continue parameter, or use the continue token in this response to retrieve the \
                     remainder of the results. Continuing with the provided token results in an inconsistent list.",
                );
                status.metadata.continue_ = fresh.encode();
                Err(status)
            }
        };
    }
    match (rv, how) {
        ("", "") | ("0", "" | "NotOlderThan") => Ok((registry.view(resource), None)),
        ("", _) => Err(Status::invalid_options(
            "ListOptions",
            FieldError::forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ),
        )),
        ("0", "Exact") => Err(Status::invalid_options(
            "ListOptions",
            FieldError::forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
            ),
        )),
        (rv, how @ ("" | "NotOlderThan" | "Exact")) => {
            let rv = parse_rv(rv)?;
            check_not_future(cx, rv)?;
            if how == "Exact" || (how.is_empty() && limit > 0) {
                let view = registry.view_at(resource, rv);
                return view.map(|v| (v, None)).ok_or_else(|| Status::expired(&too_old(rv)));
            }
            Ok((registry.view(resource), None))
        }
        (_, other) => Err(Status::bad_request(&format!(
            "resourceVersionMatch: Unsupported value: {other:?}: supported values: \"Exact\", \"NotOlderThan\", \"\""
        ))),
    }
}

/// Message of an expired revision.
pub fn too_old(rv: u64) -> String {
    format!("The provided resource version is too old: {rv}")
}

/// A page of objects and what a list's metadata says about it.
pub struct Page {
    pub objects: Vec<Arc<Object>>,
    metadata: Map<String, Value>,
}

/// Selects the objects of a list request.
pub fn page(cx: &Context) -> Result<Page, Status> {
    let filter = Filter::of(cx)?;
    let limit = match cx.query.get("limit") {
        "" => 0,
        text => text
            .parse::<i64>()
            .map_err(|_| Status::bad_request(&format!("limit: not a number: {text:?}")))?
            .max(0) as usize,
    };
    let (view, token) = choose_view(cx, limit)?;
    let mut metadata = Map::new();
    metadata.insert("resourceVersion".into(), view.revision.to_string().into());
    let mut objects = Vec::new();

    if let Some(name) = &filter.name
        && (!filter.namespace.is_empty() || !cx.served.info.namespaced)
    {
        let key = crate::registry::key(&filter.namespace, name);
        objects.extend(view.objects.get(&*key).filter(|o| filter.matches(o)).cloned());
        return Ok(Page { objects, metadata });
    }

    let mut rest = scan(
        &view.objects,
        &filter.namespace,
        token.as_ref().map(|t| t.start.as_str()),
    );
    let mut last = None;
    let mut next = None;
    for (key, object) in rest.by_ref() {
        if !filter.matches(object) {
            continue;
        }
        if limit > 0 && objects.len() == limit {
            next = Some(());
            break;
        }
        objects.push(object.clone());
        last = Some(key.clone());
    }
    if let (Some(()), Some(last)) = (next, last) {
        if !filter.is_selective() {
            let remaining = 1 + rest.count();
            metadata.insert("remainingItemCount".into(), remaining.into());
        }
        let rv = view.revision as i64;
        let token = Continue {
            v: "meta.k8s.io/v1".into(),
            rv,
            start: last.to_string(),
        };
        metadata.insert("continue".into(), token.encode().into());
        cx.cluster.registry.pin(&cx.served.resource, &view);
    }
    Ok(Page { objects, metadata })
}

/// A collection.
pub fn list(cx: &Context) -> Result<Response<Body>, Status> {
    let output = cx.output(true)?;
    let page = page(cx)?;
    Ok(answer(cx, page, output))
}

/// Answers a page in the negotiated form.
pub fn answer(cx: &Context, page: Page, output: Output) -> Response<Body> {
    let gzip = respond::accepts_gzip(&cx.headers);
    let info = &cx.served.info;
    let metadata = Value::Object(page.metadata);
    match (output.shape, output.media) {
        (As::Object, Media::Json) => {
            let head = json!({"kind": info.list_kind(), "apiVersion": info.api_version(), "metadata": metadata});
            let served = cx.served.clone();
            let item = move |object: &Arc<Object>, out: &mut Vec<u8>| {
                if !served.shares_storage_version() {
                    let mut value = served.value(object);
                    if let Some(map) = value.as_object_mut() {
                        map.remove("apiVersion");
                        map.remove("kind");
                    }
                    out.extend_from_slice(&respond::to_vec(&value));
                } else if served.info.custom {
                    served.shown(object).write_json(out);
                } else {
                    object.write_item(out);
                }
            };
            respond::stream("application/json", pieces(&head, page.objects, item), gzip)
        }
        (As::Partial(version), Media::Json) => {
            let api_version = format!("meta.k8s.io/{version}");
            let head = json!({"kind": "PartialObjectMetadataList", "apiVersion": api_version, "metadata": metadata});
            let item = move |object: &Arc<Object>, out: &mut Vec<u8>| object.write_partial(version, out);
            respond::stream("application/json", pieces(&head, page.objects, item), gzip)
        }
        (shape, media) => {
            let list = match shape {
                As::Table(version) => {
                    let include = cx.query.get("includeObject");
                    respond::table(&cx.cluster, &cx.served, &page.objects, version, include, true, metadata)
                }
                As::Object => {
                    let items: Vec<Value> = page.objects.iter().map(|o| cx.served.value(o)).collect();
                    json!({"kind": info.list_kind(), "apiVersion": info.api_version(), "metadata": metadata, "items": items})
                }
                As::Partial(version) => {
                    let items: Vec<Value> = page
                        .objects
                        .iter()
                        .map(|o| {
                            let mut out = Vec::new();
                            o.write_partial(version, &mut out);
                            serde_json::from_slice(&out).unwrap_or_default()
                        })
                        .collect();
                    json!({"kind": "PartialObjectMetadataList", "apiVersion": format!("meta.k8s.io/{version}"),
                        "metadata": metadata, "items": items})
                }
            };
            match respond::encode(&cx.cluster, &list, media) {
                Some(body) => {
                    let response = respond::bytes(StatusCode::OK, media_type(media), Bytes::new());
                    respond::compress(response, body.into(), gzip)
                }
                None => respond::json(StatusCode::OK, &list),
            }
        }
    }
}

/// Cuts a list into pieces of about 64 KiB: the head without its closing brace, the items, the end.
fn pieces(
    head: &Value,
    objects: Vec<Arc<Object>>,
    item: impl Fn(&Arc<Object>, &mut Vec<u8>) + Send + 'static,
) -> impl Iterator<Item = Bytes> + Send + 'static {
    let mut start = respond::to_vec(head);
    start.pop();
    start.extend_from_slice(b",\"items\":[");
    let mut pending = Some(start);
    let mut objects = objects.into_iter();
    let mut first = true;
    std::iter::from_fn(move || {
        let mut out = pending.take()?;
        loop {
            match objects.next() {
                None => {
                    out.extend_from_slice(b"]}\n");
                    return Some(out.into());
                }
                Some(object) => {
                    if !first {
                        out.push(b',');
                    }
                    first = false;
                    item(&object, &mut out);
                    if out.len() >= respond::CHUNK_BYTES {
                        pending = Some(Vec::with_capacity(respond::CHUNK_BYTES + 8192));
                        return Some(out.into());
                    }
                }
            }
        }
    })
}

//! Building answers: bodies, Status objects, objects in the negotiated form, compression.

use std::io::Write;
use std::sync::Arc;

use apimachinery::columns;
use apimachinery::status::Status;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, VARY};
use http::{HeaderMap, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use serde_json::{Value, json};

use crate::Body;
use crate::cluster::Cluster;
use crate::negotiate::{As, Media, Output, media_type};
use crate::object::Object;
use crate::served::Served;

/// Bodies above this are compressed when the client accepts it.
const GZIP_BYTES_MIN: usize = 128 * 1024;
/// Size of the pieces that long answers are sent in.
pub const CHUNK_BYTES: usize = 64 * 1024;

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// An answer with a complete body.
pub fn bytes(code: StatusCode, content_type: &str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = code;
    let value = HeaderValue::from_str(content_type).unwrap_or(HeaderValue::from_static("application/octet-stream"));
    response.headers_mut().insert(CONTENT_TYPE, value);
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

pub fn text(code: StatusCode, body: impl Into<String>) -> Response<Body> {
    bytes(code, "text/plain; charset=utf-8", body.into())
}

pub fn json(code: StatusCode, value: &Value) -> Response<Body> {
    bytes(code, "application/json", to_vec(value))
}

/// A tree of JSON values always serializes.
pub fn to_vec(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

/// A failure in the negotiated encoding.
pub fn status(cluster: &Cluster, status: &Status, output: Output) -> Response<Body> {
    let code = StatusCode::from_u16(status.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = value(
        cluster,
        code,
        &status.to_value(),
        Output {
            shape: As::Object,
            ..output
        },
    );
    let retry = status.to_value()["details"]["retryAfterSeconds"].as_u64();
    if let Some(seconds) = retry {
        response.headers_mut().insert("retry-after", HeaderValue::from(seconds));
    }
    if code == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(
            "www-authenticate",
            HeaderValue::from_static("Bearer realm=\"kubernetes-master\""),
        );
    }
    response
}

/// Encodes a tree that carries `apiVersion` and `kind`.
pub fn encode(cluster: &Cluster, value: &Value, media: Media) -> Option<Vec<u8>> {
    match media {
        Media::Json => Some(to_vec(value)),
        Media::Yaml => Some(apimachinery::codec::to_yaml(value).into_bytes()),
        Media::Protobuf => {
            let gvk = apimachinery::gvk::Gvk::of(value)?;
            apimachinery::codec::to_protobuf(&cluster.table(), &gvk, value).ok()
        }
    }
}

/// Answers a tree in the negotiated encoding, or JSON if the kind has no such encoding.
pub fn value(cluster: &Cluster, code: StatusCode, value: &Value, output: Output) -> Response<Body> {
    match encode(cluster, value, output.media) {
        Some(body) => bytes(code, media_type(output.media), body),
        None => json(code, value),
    }
}

/// Encodes one object in the negotiated form.
pub fn encode_object(cluster: &Cluster, served: &Served, object: &Arc<Object>, output: Output, include: &str) -> Bytes {
    let object = &served.shown(object);
    match (output.shape, output.media) {
        (As::Object, Media::Json) => with_version(served, object),
        (As::Object, Media::Protobuf) => {
            let encoded = if served.shares_storage_version() {
                object.protobuf(|value| encode(cluster, value, Media::Protobuf))
            } else {
                encode(cluster, &served.value(object), Media::Protobuf).map(Bytes::from)
            };
            encoded.unwrap_or_else(|| object.json())
        }
        (As::Object, Media::Yaml) => encode(cluster, &served.value(object), Media::Yaml)
            .unwrap_or_default()
            .into(),
        (As::Partial(version), Media::Json) => {
            let mut out = Vec::new();
            object.write_partial(version, &mut out);
            out.into()
        }
        (As::Partial(version), media) => encode(cluster, &partial_value(object, version), media)
            .unwrap_or_default()
            .into(),
        (As::Table(version), media) => {
            let table = table(
                cluster,
                served,
                std::slice::from_ref(object),
                version,
                include,
                true,
                json!({}),
            );
            encode(cluster, &table, media).unwrap_or_else(|| to_vec(&table)).into()
        }
    }
}

/// The object's JSON with the `apiVersion` it is served at.
pub fn with_version(served: &Served, object: &Arc<Object>) -> Bytes {
    if served.shares_storage_version() {
        object.json()
    } else {
        to_vec(&served.value(object)).into()
    }
}

fn partial_value(object: &Object, version: &str) -> Value {
    let mut out = Vec::new();
    object.write_partial(version, &mut out);
    serde_json::from_slice(&out).unwrap_or_default()
}

/// A `Table` of objects. `metadata` is the list's metadata; without `headers` the column definitions are null, as in all
/// but the first event of a watch.
pub fn table(
    cluster: &Cluster,
    served: &Served,
    objects: &[Arc<Object>],
    version: &str,
    include: &str,
    headers: bool,
    metadata: Value,
) -> Value {
    let now = apimachinery::time::now(&*cluster.clock);
    let definitions = columns::definitions(&served.info);
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let value = served.value(object);
            let cells = columns::row(&served.info, &value, now);
            let object = match include {
                "None" => Value::Null,
                "Object" => value.clone(),
                _ => partial_value(object, version),
            };
            let conditions = columns::row_conditions(&served.info, &value);
            let mut row = json!({"cells": cells, "object": object});
            if !conditions.is_empty() {
                row["conditions"] = conditions.into();
            }
            row
        })
        .collect();
    let mut metadata = metadata;
    if let (Some(map), [only]) = (metadata.as_object_mut(), objects)
        && map.is_empty()
    {
        map.insert("resourceVersion".into(), only.rv.to_string().into());
    }
    let definitions = if headers {
        definitions.iter().map(|d| d.to_value()).collect()
    } else {
        Value::Null
    };
    json!({
        "kind": "Table",
        "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": metadata,
        "columnDefinitions": definitions,
        "rows": rows,
    })
}

/// Whether the client takes gzip.
pub fn accepts_gzip(headers: &HeaderMap) -> bool {
    headers
        .get_all(http::header::ACCEPT_ENCODING)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .any(|e| matches!(e.split(';').next().map(str::trim), Some("gzip")))
}

/// Compresses a complete answer if it is large and the client takes gzip.
pub fn compress(response: Response<Body>, body: Bytes, gzip: bool) -> Response<Body> {
    let (mut parts, _) = response.into_parts();
    if !gzip || body.len() < GZIP_BYTES_MIN {
        return Response::from_parts(parts, full(body));
    }
    mark_gzip(&mut parts.headers);
    Response::from_parts(parts, full(gzip_all(&body)))
}

pub fn gzip_all(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    // Writing into a Vec cannot fail.
    let _ = encoder.write_all(body);
    encoder.finish().unwrap_or_default()
}

fn mark_gzip(headers: &mut HeaderMap) {
    headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    headers.insert(VARY, HeaderValue::from_static("Accept-Encoding"));
}

/// An answer sent piece by piece; pieces are made when the client has taken the ones before. With `gzip`, and more than
/// 128 KiB in sight, it is compressed on the way.
pub fn stream(
    content_type: &str,
    mut pieces: impl Iterator<Item = Bytes> + Send + 'static,
    gzip: bool,
) -> Response<Body> {
    let mut head = Vec::new();
    let mut size = 0;
    while size < GZIP_BYTES_MIN {
        let Some(piece) = pieces.next() else {
            return bytes(StatusCode::OK, content_type, head.concat());
        };
        size += piece.len();
        head.push(piece);
    }
    let all = head.into_iter().chain(pieces);
    let mut response = bytes(StatusCode::OK, content_type, Bytes::new());
    if gzip {
        mark_gzip(response.headers_mut());
        *response.body_mut() = body_of(Gzip {
            pieces: all,
            encoder: Some(GzEncoder::new(Vec::new(), Compression::fast())),
        });
    } else {
        *response.body_mut() = body_of(all);
    }
    response
}

fn body_of(pieces: impl Iterator<Item = Bytes> + Send + 'static) -> Body {
    StreamBody::new(futures::stream::iter(pieces.map(|p| Ok(Frame::data(p))))).boxed_unsync()
}

struct Gzip<I> {
    pieces: I,
    encoder: Option<GzEncoder<Vec<u8>>>,
}

impl<I: Iterator<Item = Bytes>> Iterator for Gzip<I> {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        loop {
            let encoder = self.encoder.as_mut()?;
            match self.pieces.next() {
                Some(piece) => {
                    let _ = encoder.write_all(&piece);
                    if encoder.get_ref().len() >= CHUNK_BYTES {
                        return Some(std::mem::take(encoder.get_mut()).into());
                    }
                }
                None => return self.encoder.take()?.finish().ok().map(Bytes::from),
            }
        }
    }
}

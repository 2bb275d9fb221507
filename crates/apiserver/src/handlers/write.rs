//! What all writes share: reading bodies, system metadata, and the transaction itself.

use std::sync::Arc;

use apimachinery::codec::{self, Decoded, Validation};
use apimachinery::gvk::Gvk;
use apimachinery::meta;
use apimachinery::status::Status;
use bytes::Bytes;
use http::HeaderMap;
use http_body_util::BodyExt;
use serde_json::{Map, Value};
use store::{Check, Op};

use super::Context;
use crate::admission::Claims;
use crate::cluster::Cluster;
use crate::negotiate::{self, Media};
use crate::object::Object;
use crate::seal::Sealer;
use crate::served::Served;
use crate::{Body, crds};

/// Longest accepted body, as upstream's.
pub const BODY_BYTES_MAX: usize = codec::BODY_BYTES_MAX;
/// Of a body that is too large so much is read and thrown away: a client that still sends when the answer comes sees a broken
/// stream instead of the answer.
const DRAINED_BYTES_MAX: usize = 64 << 20;
/// Attempts of a write that loses races before the client is told.
pub const ATTEMPTS_MAX: usize = 8;

/// Reads a whole body of bounded length.
pub async fn body(mut body: Body) -> Result<Bytes, Status> {
    let mut parts: Vec<Bytes> = Vec::new();
    let mut size = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Status::bad_request(&format!("reading the request body failed: {e}")))?;
        if let Ok(data) = frame.into_data() {
            size += data.len();
            if size <= BODY_BYTES_MAX {
                parts.push(data);
            } else if size > DRAINED_BYTES_MAX {
                break;
            }
        }
    }
    if size > BODY_BYTES_MAX {
        return Err(Status::too_large(BODY_BYTES_MAX));
    }
    Ok(if parts.len() == 1 {
        parts.remove(0)
    } else {
        parts.concat().into()
    })
}

/// The encoding of a body by its `Content-Type`; JSON if none is given.
pub fn media(cx: &Context) -> Result<Media, Status> {
    let accepted: &[&str] = if cx.served.info.custom {
        &["application/json", "application/yaml"]
    } else {
        &["application/json", "application/yaml", negotiate::PROTOBUF]
    };
    let media = media_of(&cx.headers).ok_or_else(|| Status::unsupported_media_type(accepted))?;
    if media == Media::Protobuf && cx.served.info.custom {
        return Err(Status::unsupported_media_type(accepted));
    }
    Ok(media)
}

/// The encoding named by `Content-Type`, if it is one of objects.
pub fn media_of(headers: &HeaderMap) -> Option<Media> {
    match negotiate::content_type(headers).as_str() {
        "" | "application/json" => Some(Media::Json),
        "application/yaml" => Some(Media::Yaml),
        negotiate::PROTOBUF => Some(Media::Protobuf),
        _ => None,
    }
}

/// The `fieldValidation` parameter.
pub fn validation(cx: &Context) -> Result<Validation, Status> {
    match cx.query.get("fieldValidation") {
        "Strict" => Ok(Validation::Strict),
        "" | "Warn" => Ok(Validation::Warn),
        "Ignore" => Ok(Validation::Ignore),
        other => Err(Status::bad_request(&format!(
            "fieldValidation: Unsupported value: {other:?}: supported values: \"Ignore\", \"Strict\", \"Warn\""
        ))),
    }
}

/// Decodes a body as an object of `gvk`.
pub fn decode(cx: &Context, gvk: &Gvk, bytes: &[u8]) -> Result<Decoded, Status> {
    codec::decode(&cx.types(), gvk, media(cx)?, bytes, validation(cx)?).map_err(|e| e.to_status())
}

/// Makes the body's namespace agree with the path's.
pub fn agree_on_namespace(cx: &Context, value: &mut Value) -> Result<(), Status> {
    let given = meta::namespace(value).to_owned();
    let metadata = metadata_mut(value)?;
    if !cx.served.info.namespaced {
        metadata.remove("namespace");
        return Ok(());
    }
    if !given.is_empty() && given != cx.target.namespace {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    metadata.insert("namespace".into(), cx.target.namespace.clone().into());
    Ok(())
}

/// The object's metadata, made if absent.
pub fn metadata_mut(value: &mut Value) -> Result<&mut Map<String, Value>, Status> {
    meta::metadata_mut(value).ok_or_else(|| Status::bad_request("metadata is not an object"))
}

/// Now, as `metav1.Time`.
pub fn now(cluster: &Cluster) -> String {
    apimachinery::time::now_rfc3339(&*cluster.clock)
}

/// Why a transaction did not happen.
pub enum Lost {
    /// The object itself changed or appeared.
    Object,
    /// Something claimed beside it (an address, a port) was taken.
    Claim(String),
}

/// Stores an object: `old` says which revision it replaces, if any. Without `commit` it only encodes (dry run).
pub async fn put(
    cluster: &Cluster,
    served: &Served,
    old: Option<&Arc<Object>>,
    value: &Value,
    claims: Claims,
    commit: bool,
) -> Result<Result<Arc<Object>, Lost>, Status> {
    let encoded = served.encode(value);
    if let Some(old) = old
        && old.encoded.bytes == encoded.bytes
        && claims.is_empty()
    {
        return Ok(Ok(old.clone()));
    }
    if !commit {
        return Ok(Ok(Object::new(encoded, old.map_or(0, |o| o.rv))));
    }
    // An instance must not come to be after the last one was deleted with its definition.
    let mut gate = None;
    if let Some(custom) = served.custom.as_ref().filter(|_| old.is_none()) {
        let open = custom.gate.read().await;
        if *open {
            return Err(crds::refused(served, "create"));
        }
        gate = Some(open);
    }
    let key = served
        .resource
        .store_key(&encoded.header.namespace, &encoded.header.name);
    let mut checks = vec![Check::at(key.clone(), old.map_or(0, |o| o.rv))];
    let value = if Sealer::covers(&key) {
        cluster
            .pki
            .sealer
            .seal(&key, &encoded.bytes)
            .map_err(|e| Status::internal(&e.to_string()))?
    } else {
        encoded.bytes.clone()
    };
    let mut ops = vec![Op::put(key.clone(), value).with(Arc::new(encoded.clone()))];
    claims.add_to(&mut checks, &mut ops);
    let written = cluster.keyspace.txn(checks, ops).await;
    drop(gate);
    match written {
        Ok(rv) => Ok(Ok(Object::new(encoded, rv))),
        Err(error) => lost(cluster, error, &key).await.map(Err),
    }
}

/// Removes an object at exactly the revision of `old`.
pub async fn remove(
    cluster: &Cluster,
    served: &Served,
    old: &Arc<Object>,
    claims: Claims,
) -> Result<Result<u64, Lost>, Status> {
    let header = old.header();
    let key = served.resource.store_key(&header.namespace, &header.name);
    let mut checks = vec![Check::at(key.clone(), old.rv)];
    let mut ops = vec![Op::delete(key.clone())];
    claims.add_to(&mut checks, &mut ops);
    match cluster.keyspace.txn(checks, ops).await {
        Ok(rv) => Ok(Ok(rv)),
        Err(error) => lost(cluster, error, &key).await.map(Err),
    }
}

/// What a failed transaction means. After a lost race the winner's write is visible here, so that another attempt sees it.
async fn lost(cluster: &Cluster, error: store::Error, object: &Bytes) -> Result<Lost, Status> {
    if error.is_conflict() && cluster.keyspace.is_shared() {
        cluster
            .keyspace
            .sync()
            .await
            .map_err(|e| crate::router::unreachable(cluster, &e))?;
    }
    match error {
        store::Error::Conflict { key, .. } if key == *object => Ok(Lost::Object),
        store::Error::Conflict { key, .. } => Ok(Lost::Claim(String::from_utf8_lossy(&key).into_owned())),
        store::Error::TooLarge { .. } => Err(Status::too_large(BODY_BYTES_MAX)),
        error => {
            tracing::error!(error = %stdx::chain(&error), "a write to the store failed");
            Err(Status::internal(&format!("storing the object failed: {error}")))
        }
    }
}

//! Protobuf as Kubernetes frames it: the `k8s\0` magic, a `runtime.Unknown` envelope, and the object's message.
//!
//! Absent and zero are equal on this wire for fields without presence, so zero values of such fields never become JSON.

mod decode;
mod encode;

use serde_json::Value;

use super::wire;
use crate::gvk::{Gvk, split_api_version};
use crate::table::{KindRef, TypeTable};

const MAGIC: &[u8; 4] = b"k8s\0";

/// Why an object has no protobuf form, or bytes are not one.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ProtoError {
    /// Custom kinds, tables and unknown kinds travel as JSON only.
    #[error("kind {kind} has no protobuf form")]
    NoProtobuf { kind: String },
    #[error("protobuf object does not start with the magic prefix")]
    Magic,
    #[error("malformed protobuf at {at}: {why}")]
    Malformed { at: String, why: &'static str },
    /// A tree that does not fit its type (decode it first).
    #[error("field {field} does not fit its type")]
    Unfit { field: String },
}

fn kind<'t>(table: &'t TypeTable, gvk: &Gvk) -> Result<KindRef<'t>, ProtoError> {
    let none = || ProtoError::NoProtobuf { kind: gvk.to_string() };
    table
        .kind_of(gvk)
        .filter(|k| k.def.name.starts_with("io.k8s."))
        .ok_or_else(none)
}

/// Encodes an object of kind `gvk` (lists and Status too) with magic and envelope.
///
/// # Errors
/// `NoProtobuf`, `Unfit`.
pub fn to_protobuf(table: &TypeTable, gvk: &Gvk, value: &Value) -> Result<Vec<u8>, ProtoError> {
    let kind = kind(table, gvk)?;
    let raw = encode::message(table, kind.def, value)?;
    let mut meta = Vec::new();
    wire::put_bytes(&mut meta, 1, gvk.api_version().as_bytes());
    wire::put_bytes(&mut meta, 2, gvk.kind.as_bytes());
    let mut out = Vec::with_capacity(raw.len() + meta.len() + 24);
    out.extend_from_slice(MAGIC);
    wire::put_bytes(&mut out, 1, &meta);
    wire::put_bytes(&mut out, 2, &raw);
    wire::put_bytes(&mut out, 3, b"");
    wire::put_bytes(&mut out, 4, b"");
    Ok(out)
}

/// Decodes an object. The kind is the envelope's; `expected` is taken where the envelope names none.
///
/// # Errors
/// `Magic`, `Malformed`, `NoProtobuf`.
pub fn from_protobuf(table: &TypeTable, expected: &Gvk, bytes: &[u8]) -> Result<Value, ProtoError> {
    let body = bytes.strip_prefix(MAGIC).ok_or(ProtoError::Magic)?;
    let envelope = |why| ProtoError::Malformed {
        at: "envelope".into(),
        why,
    };
    let mut raw: &[u8] = &[];
    let (mut api_version, mut kind_name) = (String::new(), String::new());
    for field in wire::fields(body) {
        match field.map_err(envelope)? {
            (1, wire::Data::Bytes(meta)) => {
                for field in wire::fields(meta) {
                    let (number, data) = field.map_err(envelope)?;
                    let wire::Data::Bytes(text) = data else {
                        return Err(envelope("type meta is not text"));
                    };
                    let text = std::str::from_utf8(text).map_err(|_| envelope("type meta is not UTF-8"))?;
                    match number {
                        1 => api_version = text.to_owned(),
                        2 => kind_name = text.to_owned(),
                        _ => {}
                    }
                }
            }
            (2, wire::Data::Bytes(b)) => raw = b,
            (3, wire::Data::Bytes(b)) if !b.is_empty() => return Err(envelope("content encoding is not supported")),
            _ => {}
        }
    }
    let (group, version) = split_api_version(&api_version);
    let gvk = match (api_version.is_empty(), kind_name.is_empty()) {
        (_, true) => expected.clone(),
        (true, false) => expected.with_kind(&kind_name),
        (false, false) => Gvk::new(group, version, &kind_name),
    };
    let kind = kind(table, &gvk)?;
    let mut object = decode::message(table, kind.def, raw)?;
    object.insert("apiVersion".into(), gvk.api_version().into());
    object.insert("kind".into(), (*gvk.kind).into());
    if gvk.kind.ends_with("List") && kind.def.field("items").is_some() {
        object.entry("items").or_insert_with(|| Value::Array(Vec::new()));
    }
    Ok(Value::Object(object))
}

/// One frame of a protobuf watch: four bytes of length and a WatchEvent. `object` has its own magic and envelope.
pub fn watch_event_to_protobuf(event: &str, object: &[u8]) -> Vec<u8> {
    let mut raw = Vec::with_capacity(object.len() + 6);
    wire::put_bytes(&mut raw, 1, object);
    let mut body = vec![0; 4];
    wire::put_bytes(&mut body, 1, event.as_bytes());
    wire::put_bytes(&mut body, 2, &raw);
    let length = (body.len() - 4) as u32;
    body[..4].copy_from_slice(&length.to_be_bytes());
    body
}

/// The event type and the object of one frame's body (without the four bytes of length).
///
/// # Errors
/// `Malformed`.
pub fn watch_event_from_protobuf(body: &[u8]) -> Result<(String, &[u8]), ProtoError> {
    let malformed = |why| ProtoError::Malformed {
        at: "watch event".into(),
        why,
    };
    let (mut event, mut object): (String, &[u8]) = (String::new(), &[]);
    for field in wire::fields(body) {
        match field.map_err(malformed)? {
            (1, wire::Data::Bytes(b)) => event = String::from_utf8_lossy(b).into_owned(),
            (2, wire::Data::Bytes(raw)) => {
                for field in wire::fields(raw) {
                    if let (1, wire::Data::Bytes(b)) = field.map_err(malformed)? {
                        object = b;
                    }
                }
            }
            _ => {}
        }
    }
    Ok((event, object))
}

#[cfg(test)]
mod tests;

//! Trees to messages. Fields go out by ascending number, map entries by key, as upstream's encoder writes them.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::super::scalar;
use super::super::wire;
use super::{ProtoError, to_protobuf};
use crate::gvk::Gvk;
use crate::table::{Field, SchemaOr, Ty, TypeDef, TypeTable};

/// Encoded fields by number; repeated ones are already together.
type Parts = BTreeMap<u32, Vec<u8>>;

pub(super) fn message(table: &TypeTable, def: &TypeDef, value: &Value) -> Result<Vec<u8>, ProtoError> {
    let object = value.as_object().ok_or_else(|| ProtoError::Unfit {
        field: def.short_name().into(),
    })?;
    let mut parts = Parts::new();
    let mut embedded: BTreeMap<u32, Parts> = BTreeMap::new();
    for (name, value) in object {
        let Some(field) = def.field(name) else { continue };
        let Some(number) = field.proto else { continue };
        if value.is_null() {
            continue;
        }
        let into = match field.embedded_in {
            Some(outer) => embedded.entry(outer).or_default(),
            None => &mut parts,
        };
        put(table, into.entry(number).or_default(), number, field, value)?;
    }
    for (number, inner) in embedded {
        let bytes = inner.into_values().flatten().collect::<Vec<u8>>();
        wire::put_bytes(parts.entry(number).or_default(), number, &bytes);
    }
    Ok(parts.into_values().flatten().collect())
}

fn put(table: &TypeTable, out: &mut Vec<u8>, number: u32, field: &Field, value: &Value) -> Result<(), ProtoError> {
    let unfit = || ProtoError::Unfit {
        field: field.name.to_string(),
    };
    match &field.ty {
        Ty::List(item) => {
            for value in value.as_array().ok_or_else(unfit)? {
                one(table, out, number, item, value).map_err(|e| e.unwrap_or_else(unfit))?;
            }
            Ok(())
        }
        Ty::Map(item) => {
            let mut entries: Vec<_> = value.as_object().ok_or_else(unfit)?.iter().collect();
            entries.sort_by_key(|(k, _)| k.as_str());
            for (key, value) in entries {
                let mut entry = Vec::new();
                wire::put_bytes(&mut entry, 1, key.as_bytes());
                one(table, &mut entry, 2, item, value).map_err(|e| e.unwrap_or_else(unfit))?;
                wire::put_bytes(out, number, &entry);
            }
            Ok(())
        }
        ty => one(table, out, number, ty, value).map_err(|e| e.unwrap_or_else(unfit)),
    }
}

/// `Err(None)`: the value does not fit; the caller knows the field's name.
fn one(table: &TypeTable, out: &mut Vec<u8>, number: u32, ty: &Ty, value: &Value) -> Result<(), Option<ProtoError>> {
    match ty {
        Ty::String => wire::put_bytes(out, number, value.as_str().ok_or(None)?.as_bytes()),
        Ty::Bytes => {
            let bytes = STANDARD.decode(value.as_str().ok_or(None)?).map_err(|_| None)?;
            wire::put_bytes(out, number, &bytes);
        }
        Ty::Bool => wire::put_uint(out, number, value.as_bool().ok_or(None)?.into()),
        Ty::Int32 | Ty::Int64 => wire::put_uint(out, number, value.as_i64().ok_or(None)? as u64),
        Ty::Double => wire::put_fixed64(out, number, value.as_f64().ok_or(None)?.to_bits()),
        Ty::Quantity => {
            let mut inner = Vec::new();
            wire::put_bytes(&mut inner, 1, value.as_str().ok_or(None)?.as_bytes());
            wire::put_bytes(out, number, &inner);
        }
        Ty::IntOrString => {
            let (is_text, int, text) = match value {
                Value::String(s) => (1, 0, s.as_str()),
                other => (0, other.as_i64().ok_or(None)?, ""),
            };
            let mut inner = Vec::new();
            wire::put_uint(&mut inner, 1, is_text);
            wire::put_uint(&mut inner, 2, int as u64);
            wire::put_bytes(&mut inner, 3, text.as_bytes());
            wire::put_bytes(out, number, &inner);
        }
        // The zero time: null in JSON, which only maps hold.
        Ty::Time | Ty::MicroTime if value.is_null() => wire::put_bytes(out, number, &[]),
        Ty::Time | Ty::MicroTime => {
            let t = scalar::timestamp(value.as_str().ok_or(None)?).map_err(|_| None)?;
            let nanos = if *ty == Ty::Time {
                0
            } else {
                t.subsec_nanosecond() / 1000 * 1000
            };
            let mut inner = Vec::new();
            wire::put_uint(&mut inner, 1, t.as_second() as u64);
            wire::put_uint(&mut inner, 2, nanos as u64);
            wire::put_bytes(out, number, &inner);
        }
        Ty::Fields => {
            let mut inner = Vec::new();
            wire::put_bytes(&mut inner, 1, &serde_json::to_vec(value).map_err(|_| None)?);
            wire::put_bytes(out, number, &inner);
        }
        Ty::Raw => {
            // An object of a known kind travels as protobuf, anything else as JSON.
            let known = Gvk::of(value).and_then(|gvk| to_protobuf(table, &gvk, value).ok());
            let bytes = match known {
                Some(bytes) => bytes,
                None => serde_json::to_vec(value).map_err(|_| None)?,
            };
            let mut inner = Vec::new();
            wire::put_bytes(&mut inner, 1, &bytes);
            wire::put_bytes(out, number, &inner);
        }
        Ty::Strings => {
            let mut inner = Vec::new();
            for text in value.as_array().ok_or(None)? {
                wire::put_bytes(&mut inner, 1, text.as_str().ok_or(None)?.as_bytes());
            }
            wire::put_bytes(out, number, &inner);
        }
        Ty::Object(id) => wire::put_bytes(out, number, &message(table, table.ty(*id), value)?),
        Ty::Json => {
            let mut inner = Vec::new();
            wire::put_bytes(&mut inner, 1, value.to_string().as_bytes());
            wire::put_bytes(out, number, &inner);
        }
        Ty::SchemaOr(or, schema) => {
            let def = table.ty(*schema);
            let mut inner = Vec::new();
            match (or, value) {
                (SchemaOr::Bool, Value::Bool(allows)) => wire::put_uint(&mut inner, 1, u64::from(*allows)),
                (SchemaOr::Bool, value) => {
                    wire::put_uint(&mut inner, 1, 1);
                    wire::put_bytes(&mut inner, 2, &message(table, def, value)?);
                }
                (SchemaOr::Array, Value::Array(items)) => {
                    for item in items {
                        wire::put_bytes(&mut inner, 2, &message(table, def, item)?);
                    }
                }
                (SchemaOr::Strings, Value::Array(items)) => {
                    for item in items {
                        wire::put_bytes(&mut inner, 2, item.as_str().ok_or(None)?.as_bytes());
                    }
                }
                (_, value) => wire::put_bytes(&mut inner, 1, &message(table, def, value)?),
            }
            wire::put_bytes(out, number, &inner);
        }
        Ty::Duration | Ty::Any | Ty::List(_) | Ty::Map(_) => return Err(None),
    }
    Ok(())
}

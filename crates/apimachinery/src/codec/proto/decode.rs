//! Messages to trees, with the presence rules of the JSON form.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value};

use super::super::scalar;
use super::super::wire::{self, Data};
use super::{ProtoError, from_protobuf};
use crate::gvk::Gvk;
use crate::table::{Field, SchemaOr, Ty, TypeDef, TypeId, TypeTable};

/// Deepest nesting of messages.
const DEPTH_MAX: usize = 64;

type Object = Map<String, Value>;

pub(super) fn message(table: &TypeTable, def: &TypeDef, bytes: &[u8]) -> Result<Object, ProtoError> {
    let mut object = Object::new();
    read(table, def, None, bytes, &mut object, 0)?;
    Ok(object)
}

/// Reads the fields of `def` that live in the message itself (`embedded` none) or in one embedded message.
fn read(
    table: &TypeTable,
    def: &TypeDef,
    embedded: Option<u32>,
    bytes: &[u8],
    object: &mut Object,
    depth: usize,
) -> Result<(), ProtoError> {
    let malformed = |at: &str, why| ProtoError::Malformed { at: at.to_owned(), why };
    if depth > DEPTH_MAX {
        return Err(malformed(def.short_name(), "nested too deeply"));
    }
    for entry in wire::fields(bytes) {
        let (number, data) = entry.map_err(|why| malformed(def.short_name(), why))?;
        let mine = |f: &&Field| f.embedded_in == embedded && f.proto == Some(number);
        let Some(field) = def.fields.iter().find(mine) else {
            if embedded.is_none()
                && def.fields.iter().any(|f| f.embedded_in == Some(number))
                && let Data::Bytes(inner) = data
            {
                read(table, def, Some(number), inner, object, depth + 1)?;
            }
            continue;
        };
        let at = |why| ProtoError::Malformed {
            at: format!("{}.{}", def.short_name(), field.name),
            why,
        };
        match &field.ty {
            Ty::List(item) => {
                let slot = object.entry(&*field.name).or_insert_with(|| Value::Array(Vec::new()));
                let Value::Array(list) = slot else {
                    return Err(at("is not a list"));
                };
                match (&**item, &data) {
                    // Packed numbers.
                    (Ty::Int32 | Ty::Int64 | Ty::Bool, Data::Bytes(packed)) => {
                        let mut rest = *packed;
                        while !rest.is_empty() {
                            let n = wire::varint(&mut rest).map_err(at)?;
                            list.push(
                                value(table, item, Data::Varint(n), depth)?.ok_or_else(|| at("wrong wire type"))?,
                            );
                        }
                    }
                    _ => list.push(value(table, item, data, depth)?.ok_or_else(|| at("wrong wire type"))?),
                }
            }
            Ty::Map(item) => {
                let Data::Bytes(entry) = data else {
                    return Err(at("map entry is not a message"));
                };
                let (mut key, mut found) = (String::new(), None);
                for part in wire::fields(entry) {
                    match part.map_err(at)? {
                        (1, Data::Bytes(k)) => key = text(k).map_err(at)?,
                        (2, v) => found = value(table, item, v, depth)?,
                        _ => {}
                    }
                }
                let slot = object.entry(&*field.name).or_insert_with(|| Value::Object(Map::new()));
                let Value::Object(map) = slot else {
                    return Err(at("is not a map"));
                };
                map.insert(key, found.unwrap_or_else(|| zero(item)));
            }
            ty => {
                let value = value(table, ty, data, depth)?.ok_or_else(|| at("wrong wire type"))?;
                let dropped = value.is_null() || (field.omitempty && !field.pointer && is_zero(&value));
                if dropped {
                    object.remove(&*field.name);
                } else {
                    object.insert(field.name.to_string(), value);
                }
            }
        }
    }
    Ok(())
}

/// `None`: the wire type does not fit.
fn value(table: &TypeTable, ty: &Ty, data: Data<'_>, depth: usize) -> Result<Option<Value>, ProtoError> {
    let malformed = |why| ProtoError::Malformed {
        at: format!("{ty:?}"),
        why,
    };
    Ok(Some(match (ty, data) {
        (Ty::String, Data::Bytes(b)) => text(b).map_err(malformed)?.into(),
        (Ty::Bytes, Data::Bytes(b)) => STANDARD.encode(b).into(),
        (Ty::Bool, Data::Varint(n)) => (n != 0).into(),
        (Ty::Int32, Data::Varint(n)) => (n as i32).into(),
        (Ty::Int64, Data::Varint(n)) => (n as i64).into(),
        (Ty::Double, Data::Fixed64(n)) => scalar::double(f64::from_bits(n)),
        (Ty::Quantity, Data::Bytes(b)) => {
            let inner = sub(b, 1).map_err(malformed)?.unwrap_or(b"0");
            let parsed = scalar::from_text(&Ty::Quantity, &text(inner).map_err(malformed)?);
            parsed
                .and_then(Result::ok)
                .ok_or_else(|| malformed("is not a quantity"))?
        }
        (Ty::IntOrString, Data::Bytes(b)) => {
            let (mut is_text, mut int, mut words) = (false, 0i32, String::new());
            for field in wire::fields(b) {
                match field.map_err(malformed)? {
                    (1, Data::Varint(n)) => is_text = n == 1,
                    (2, Data::Varint(n)) => int = n as i32,
                    (3, Data::Bytes(s)) => words = text(s).map_err(malformed)?,
                    _ => {}
                }
            }
            if is_text { words.into() } else { int.into() }
        }
        (Ty::Time | Ty::MicroTime, Data::Bytes(b)) => {
            if b.is_empty() {
                return Ok(Some(Value::Null));
            }
            let (mut seconds, mut nanos) = (0i64, 0i32);
            for field in wire::fields(b) {
                match field.map_err(malformed)? {
                    (1, Data::Varint(n)) => seconds = n as i64,
                    (2, Data::Varint(n)) => nanos = n as i32,
                    _ => {}
                }
            }
            let t = Timestamp::new(seconds, nanos).map_err(|_| malformed("time is out of range"))?;
            if *ty == Ty::Time {
                crate::time::rfc3339(t).into()
            } else {
                crate::time::micro(t).into()
            }
        }
        (Ty::Fields, Data::Bytes(b)) => match sub(b, 1).map_err(malformed)? {
            Some(raw) if !raw.is_empty() => serde_json::from_slice(raw).map_err(|_| malformed("is not JSON"))?,
            _ => Value::Null,
        },
        (Ty::Raw, Data::Bytes(b)) => match sub(b, 1).map_err(malformed)? {
            Some(raw) if raw.starts_with(super::MAGIC) => {
                if depth > DEPTH_MAX {
                    return Err(malformed("nested too deeply"));
                }
                from_protobuf(table, &Gvk::new("", "", ""), raw)?
            }
            Some(raw) if !raw.is_empty() => serde_json::from_slice(raw).map_err(|_| malformed("is not JSON"))?,
            _ => Value::Null,
        },
        (Ty::Strings, Data::Bytes(b)) => {
            let mut list = Vec::new();
            for field in wire::fields(b) {
                if let (1, Data::Bytes(s)) = field.map_err(malformed)? {
                    list.push(text(s).map_err(malformed)?.into());
                }
            }
            Value::Array(list)
        }
        (Ty::Json, Data::Bytes(b)) => match sub(b, 1).map_err(malformed)? {
            Some(raw) if !raw.is_empty() => serde_json::from_slice(raw).map_err(|_| malformed("is not JSON"))?,
            _ => Value::Null,
        },
        (Ty::SchemaOr(or, schema), Data::Bytes(b)) => schema_or(table, *or, *schema, b, depth + 1)?,
        (Ty::Object(id), Data::Bytes(b)) => {
            let mut inner = Object::new();
            read(table, table.ty(*id), None, b, &mut inner, depth + 1)?;
            Value::Object(inner)
        }
        _ => return Ok(None),
    }))
}

/// A schema (field 1, of the boolean form 2), or what stands in its place.
fn schema_or(table: &TypeTable, or: SchemaOr, id: TypeId, bytes: &[u8], depth: usize) -> Result<Value, ProtoError> {
    let malformed = |why| ProtoError::Malformed {
        at: "JSONSchemaProps".into(),
        why,
    };
    let schema = |b: &[u8]| -> Result<Value, ProtoError> {
        let mut inner = Object::new();
        read(table, table.ty(id), None, b, &mut inner, depth)?;
        Ok(Value::Object(inner))
    };
    let (mut allows, mut single, mut many) = (false, None, Vec::new());
    for field in wire::fields(bytes) {
        match (or, field.map_err(malformed)?) {
            (SchemaOr::Bool, (1, Data::Varint(n))) => allows = n != 0,
            (SchemaOr::Bool, (2, Data::Bytes(b))) | (_, (1, Data::Bytes(b))) => single = Some(schema(b)?),
            (SchemaOr::Array, (2, Data::Bytes(b))) => many.push(schema(b)?),
            (SchemaOr::Strings, (2, Data::Bytes(b))) => many.push(text(b).map_err(malformed)?.into()),
            _ => {}
        }
    }
    Ok(match (or, single, many.is_empty()) {
        (_, _, false) => Value::Array(many),
        (_, Some(schema), _) => schema,
        (SchemaOr::Bool, None, _) => Value::Bool(allows),
        _ => Value::Null,
    })
}

/// The last bytes field of that number.
fn sub(bytes: &[u8], number: u32) -> Result<Option<&[u8]>, &'static str> {
    let mut found = None;
    for field in wire::fields(bytes) {
        if let (n, Data::Bytes(b)) = field?
            && n == number
        {
            found = Some(b);
        }
    }
    Ok(found)
}

fn text(bytes: &[u8]) -> Result<String, &'static str> {
    std::str::from_utf8(bytes)
        .map(str::to_owned)
        .map_err(|_| "is not UTF-8")
}

/// Zero of a scalar; an empty object is kept, as the JSON form keeps empty structures.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::String(s) => s.is_empty(),
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::Array(a) => a.is_empty(),
        Value::Null => true,
        Value::Object(_) => false,
    }
}

fn zero(ty: &Ty) -> Value {
    match ty {
        Ty::String | Ty::Bytes => "".into(),
        Ty::Bool => false.into(),
        Ty::Int32 | Ty::Int64 | Ty::Double | Ty::IntOrString => 0.into(),
        Ty::Quantity => "0".into(),
        Ty::Strings | Ty::List(_) => Value::Array(Vec::new()),
        _ => Value::Object(Map::new()),
    }
}

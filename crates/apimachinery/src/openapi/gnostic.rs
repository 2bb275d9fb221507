//! The v2 document as protobuf, in gnostic's schema (`openapi.v2`). Field numbers are that schema's.

use serde_json::Value;

use crate::codec::wire::{put_bytes, put_uint};

pub(super) fn document(doc: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    text(&mut out, 1, &doc["swagger"]);
    let mut info = Vec::new();
    text(&mut info, 1, &doc["info"]["title"]);
    text(&mut info, 2, &doc["info"]["version"]);
    put_bytes(&mut out, 2, &info);
    let mut paths = Vec::new();
    for (path, item) in entries(&doc["paths"]) {
        put_bytes(&mut paths, 2, &named(path, &path_item(item)));
    }
    put_bytes(&mut out, 8, &paths);
    let mut definitions = Vec::new();
    for (name, definition) in entries(&doc["definitions"]) {
        put_bytes(&mut definitions, 1, &named(name, &schema(definition)));
    }
    put_bytes(&mut out, 9, &definitions);
    out
}

fn path_item(item: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    for (method, number) in [("get", 2), ("put", 3), ("post", 4), ("delete", 5), ("patch", 8)] {
        if let Some(op) = item.get(method) {
            put_bytes(&mut out, number, &operation(op));
        }
    }
    for p in list(&item["parameters"]) {
        put_bytes(&mut out, 9, &parameters_item(p));
    }
    out
}

fn operation(op: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    texts(&mut out, 1, &op["tags"]);
    text(&mut out, 5, &op["operationId"]);
    texts(&mut out, 6, &op["produces"]);
    texts(&mut out, 7, &op["consumes"]);
    for p in list(&op["parameters"]) {
        put_bytes(&mut out, 8, &parameters_item(p));
    }
    let mut responses = Vec::new();
    for (code, r) in entries(&op["responses"]) {
        let mut response = Vec::new();
        text(&mut response, 1, &r["description"]);
        if let Some(s) = r.get("schema") {
            put_bytes(&mut response, 2, &wrap(1, &schema(s)));
        }
        put_bytes(&mut responses, 1, &named(code, &wrap(1, &response)));
    }
    put_bytes(&mut out, 9, &responses);
    texts(&mut out, 10, &op["schemes"]);
    extensions(&mut out, 13, op);
    out
}

/// `ParametersItem { parameter: Parameter { body | non body } }`
fn parameters_item(p: &Value) -> Vec<u8> {
    let place = p["in"].as_str().unwrap_or_default();
    let mut inner = Vec::new();
    let parameter = if place == "body" {
        text(&mut inner, 2, &p["name"]);
        text(&mut inner, 3, &p["in"]);
        flag(&mut inner, 4, &p["required"]);
        put_bytes(&mut inner, 5, &schema(&p["schema"]));
        wrap(1, &inner)
    } else {
        // Query and path parameters number their fields differently from `allow_empty_value` on.
        let query = place == "query";
        let shift = u32::from(query);
        flag(&mut inner, 1, &p["required"]);
        text(&mut inner, 2, &p["in"]);
        text(&mut inner, 4, &p["name"]);
        text(&mut inner, 5 + shift, &p["type"]);
        flag(&mut inner, 18 + shift, &p["uniqueItems"]);
        wrap(2, &wrap(if query { 3 } else { 4 }, &inner))
    };
    wrap(1, &parameter)
}

fn schema(s: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    text(&mut out, 1, &s["$ref"]);
    text(&mut out, 2, &s["format"]);
    text(&mut out, 3, &s["title"]);
    text(&mut out, 4, &s["description"]);
    if let Some(default) = s.get("default") {
        put_bytes(&mut out, 5, &any(default));
    }
    for (key, number) in [("maxLength", 11), ("minLength", 12)] {
        if let Some(n) = s[key].as_i64() {
            put_uint(&mut out, number, n as u64);
        }
    }
    text(&mut out, 13, &s["pattern"]);
    for (key, number) in [("maxItems", 14), ("minItems", 15)] {
        if let Some(n) = s[key].as_i64() {
            put_uint(&mut out, number, n as u64);
        }
    }
    texts(&mut out, 19, &s["required"]);
    for value in list(&s["enum"]) {
        put_bytes(&mut out, 20, &any(value));
    }
    match &s["additionalProperties"] {
        Value::Object(_) => put_bytes(&mut out, 21, &wrap(1, &schema(&s["additionalProperties"]))),
        Value::Bool(b) => {
            let mut inner = Vec::new();
            put_uint(&mut inner, 2, u64::from(*b));
            put_bytes(&mut out, 21, &inner);
        }
        _ => {}
    }
    if let Some(ty) = s["type"].as_str() {
        put_bytes(&mut out, 22, &wrap(1, ty.as_bytes()));
    }
    if s["items"].is_object() {
        put_bytes(&mut out, 23, &wrap(1, &schema(&s["items"])));
    }
    if s["properties"].is_object() {
        let mut properties = Vec::new();
        for (name, property) in entries(&s["properties"]) {
            put_bytes(&mut properties, 1, &named(name, &schema(property)));
        }
        put_bytes(&mut out, 25, &properties);
    }
    extensions(&mut out, 31, s);
    out
}

fn extensions(out: &mut Vec<u8>, number: u32, holder: &Value) {
    for (name, value) in entries(holder).filter(|(k, _)| k.starts_with("x-")) {
        put_bytes(out, number, &named(name, &any(value)));
    }
}

/// `Any { yaml }`: JSON is YAML, and readers parse the text.
fn any(value: &Value) -> Vec<u8> {
    wrap(2, format!("{value}\n").as_bytes())
}

/// `Named* { name, value }`
fn named(name: &str, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_bytes(&mut out, 1, name.as_bytes());
    put_bytes(&mut out, 2, value);
    out
}

fn wrap(number: u32, inner: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_bytes(&mut out, number, inner);
    out
}

fn text(out: &mut Vec<u8>, number: u32, value: &Value) {
    if let Some(t) = value.as_str().filter(|t| !t.is_empty()) {
        put_bytes(out, number, t.as_bytes());
    }
}

fn texts(out: &mut Vec<u8>, number: u32, value: &Value) {
    for t in list(value).iter().filter_map(Value::as_str) {
        put_bytes(out, number, t.as_bytes());
    }
}

fn flag(out: &mut Vec<u8>, number: u32, value: &Value) {
    if value == true {
        put_uint(out, number, 1);
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn entries(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flatten().map(|(k, v)| (k.as_str(), v))
}

//! OpenAPI documents, derived from the table: v2 as JSON and as gnostic protobuf (what older kubectl reads before it
//! applies), v3 by group and version (what current kubectl reads).
//!
//! Documents are large and change only with the table: keep a [`Documents`] per table.

mod gnostic;
mod operations;
mod schema;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::table::{KUBERNETES_VERSION, TypeTable};
use operations::{Body, Operation};
use schema::{Dialect, Schemas};

/// Every document of one table, made at first use.
#[derive(Debug)]
pub struct Documents {
    table: Arc<TypeTable>,
    v2_json: OnceLock<Bytes>,
    v2_proto: OnceLock<Bytes>,
    /// By path below `/openapi/v3/`: `api/v1`, `apis/apps/v1`.
    v3: OnceLock<BTreeMap<String, Bytes>>,
    index: OnceLock<Bytes>,
}

impl Documents {
    pub fn new(table: Arc<TypeTable>) -> Documents {
        Documents {
            table,
            v2_json: OnceLock::new(),
            v2_proto: OnceLock::new(),
            v3: OnceLock::new(),
            index: OnceLock::new(),
        }
    }

    /// `/openapi/v2` as JSON.
    pub fn v2_json(&self) -> Bytes {
        self.v2_json.get_or_init(|| v2_json(&self.table)).clone()
    }

    /// `/openapi/v2` as gnostic protobuf.
    pub fn v2_proto(&self) -> Bytes {
        self.v2_proto.get_or_init(|| v2_proto(&self.table)).clone()
    }

    /// `/openapi/v3`: the index, with the hash of each document in its URL.
    pub fn v3_index(&self) -> Bytes {
        self.index
            .get_or_init(|| index(self.all_v3()).to_string().into())
            .clone()
    }

    /// `/openapi/v3/<path>`, for example `apis/apps/v1`; `None` if no such group and version is served.
    pub fn v3(&self, path: &str) -> Option<Bytes> {
        self.all_v3().get(path.trim_matches('/')).cloned()
    }

    fn all_v3(&self) -> &BTreeMap<String, Bytes> {
        self.v3.get_or_init(|| all_v3(&self.table))
    }
}

/// The v2 document as JSON.
pub fn v2_json(table: &TypeTable) -> Bytes {
    v2(table).to_string().into()
}

/// The v2 document as gnostic protobuf (`openapi.v2.Document`).
pub fn v2_proto(table: &TypeTable) -> Bytes {
    gnostic::document(&v2(table)).into()
}

/// The index of v3 documents.
pub fn v3_index(table: &TypeTable) -> Value {
    index(&all_v3(table))
}

/// The v3 document of one group and version; `None` if not served.
pub fn v3(table: &TypeTable, group: &str, version: &str) -> Option<Bytes> {
    let operations = operations::all(table, |g, v| g == group && v == version);
    if operations.is_empty() {
        return None;
    }
    let mut schemas = Schemas::new(table, Dialect::V3);
    let mut paths: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
    for op in &operations {
        let entry = paths.entry(&op.path).or_default();
        path_parameters(op, entry, Dialect::V3);
        entry.insert(op.method.into(), v3_operation(op, &mut schemas));
    }
    schemas.add_kinds(|g, v| g == group && v == version);
    let document = json!({
        "openapi": "3.0.0",
        "info": { "title": "Kubernetes", "version": KUBERNETES_VERSION },
        "paths": paths,
        "components": { "schemas": schemas.finish() },
    });
    Some(document.to_string().into())
}

fn all_v3(table: &TypeTable) -> BTreeMap<String, Bytes> {
    let mut out = BTreeMap::new();
    for (group, versions) in crate::discovery::groups(table) {
        for version in versions {
            let path = if group.is_empty() {
                format!("api/{version}")
            } else {
                format!("apis/{group}/{version}")
            };
            if let Some(document) = v3(table, group, version) {
                out.insert(path, document);
            }
        }
    }
    out
}

fn index(documents: &BTreeMap<String, Bytes>) -> Value {
    let paths: Map<String, Value> = documents
        .iter()
        .map(|(path, bytes)| {
            let hash: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02X}")).collect();
            (
                path.clone(),
                json!({ "serverRelativeURL": format!("/openapi/v3/{path}?hash={hash}") }),
            )
        })
        .collect();
    json!({ "paths": paths })
}

fn v2(table: &TypeTable) -> Value {
    let operations = operations::all(table, |_, _| true);
    let mut schemas = Schemas::new(table, Dialect::V2);
    let mut paths: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
    for op in &operations {
        let entry = paths.entry(&op.path).or_default();
        path_parameters(op, entry, Dialect::V2);
        entry.insert(op.method.into(), v2_operation(op, &mut schemas));
    }
    schemas.add_kinds(|_, _| true);
    json!({
        "swagger": "2.0",
        "info": { "title": "Kubernetes", "version": KUBERNETES_VERSION },
        "paths": paths,
        "definitions": schemas.finish(),
    })
}

fn path_parameters(op: &Operation, entry: &mut Map<String, Value>, dialect: Dialect) {
    let names = op
        .path
        .split('/')
        .filter_map(|p| p.strip_prefix('{')?.strip_suffix('}'));
    let all: Vec<Value> = names
        .map(|name| parameter("path", name, "string", true, dialect))
        .collect();
    if !all.is_empty() {
        entry.insert("parameters".into(), all.into());
    }
}

fn parameter(place: &str, name: &str, ty: &str, required: bool, dialect: Dialect) -> Value {
    let mut out = match dialect {
        Dialect::V2 => json!({ "in": place, "name": name, "type": ty, "uniqueItems": true }),
        Dialect::V3 => json!({ "in": place, "name": name, "schema": { "type": ty, "uniqueItems": true } }),
    };
    if required {
        out["required"] = true.into();
    }
    out
}

/// Responses by code: what an operation answers when it works.
fn codes(op: &Operation) -> &'static [&'static str] {
    match op.method {
        "post" => &["200", "201", "202"],
        "put" | "patch" => &["200", "201"],
        "delete" => &["200", "202"],
        _ => &["200"],
    }
}

fn common(op: &Operation) -> Map<String, Value> {
    let gvk = json!({ "group": &*op.gvk.group, "version": &*op.gvk.version, "kind": &*op.gvk.kind });
    let mut out = Map::new();
    out.insert("operationId".into(), op.id.clone().into());
    out.insert("tags".into(), json!([op.tag]));
    out.insert("x-kubernetes-action".into(), op.action.into());
    out.insert("x-kubernetes-group-version-kind".into(), gvk);
    out
}

fn v2_operation(op: &Operation, schemas: &mut Schemas) -> Value {
    let mut parameters = Vec::new();
    let consumes: Vec<&str> = match &op.body {
        Body::Patch(types) => types.to_vec(),
        _ => vec!["*/*"],
    };
    let body = match &op.body {
        Body::None => None,
        Body::Patch(_) => Some((schemas.patch(), true)),
        Body::Type { name, required } => Some((schemas.reference(name), *required)),
    };
    if let Some((schema, required)) = body {
        let mut body = json!({ "in": "body", "name": "body", "schema": schema });
        if required {
            body["required"] = true.into();
        }
        parameters.push(body);
    }
    parameters.extend(
        op.query
            .iter()
            .map(|(name, ty)| parameter("query", name, ty, false, Dialect::V2)),
    );
    let schema = op
        .answer
        .as_ref()
        .map_or(json!({ "type": "string" }), |name| schemas.reference(name));
    let mut responses = Map::new();
    for code in codes(op) {
        responses.insert((*code).into(), json!({ "description": "OK", "schema": schema }));
    }
    responses.insert("401".into(), json!({ "description": "Unauthorized" }));
    let mut out = common(op);
    out.insert("consumes".into(), consumes.into());
    out.insert("produces".into(), op.produces().into());
    out.insert("schemes".into(), json!(["https"]));
    out.insert("responses".into(), responses.into());
    if !parameters.is_empty() {
        out.insert("parameters".into(), parameters.into());
    }
    Value::Object(out)
}

fn v3_operation(op: &Operation, schemas: &mut Schemas) -> Value {
    let mut out = common(op);
    let content = |types: &[&str], schema: &Value| -> Value {
        types
            .iter()
            .map(|t| ((*t).to_owned(), json!({ "schema": schema })))
            .collect::<Map<_, _>>()
            .into()
    };
    let body = match &op.body {
        Body::None => None,
        Body::Patch(types) => Some((content(types, &schemas.patch()), true)),
        Body::Type { name, required } => Some((content(&["*/*"], &schemas.reference(name)), *required)),
    };
    if let Some((content, required)) = body {
        let mut body = json!({ "content": content });
        if required {
            body["required"] = true.into();
        }
        out.insert("requestBody".into(), body);
    }
    let query: Vec<Value> = op
        .query
        .iter()
        .map(|(name, ty)| parameter("query", name, ty, false, Dialect::V3))
        .collect();
    if !query.is_empty() {
        out.insert("parameters".into(), query.into());
    }
    let schema = op
        .answer
        .as_ref()
        .map_or(json!({ "type": "string" }), |name| schemas.reference(name));
    let mut responses = Map::new();
    for code in codes(op) {
        responses.insert(
            (*code).into(),
            json!({ "description": "OK", "content": content(op.produces(), &schema) }),
        );
    }
    responses.insert("401".into(), json!({ "description": "Unauthorized" }));
    out.insert("responses".into(), responses.into());
    Value::Object(out)
}

#[cfg(test)]
mod tests;

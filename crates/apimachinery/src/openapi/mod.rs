//! OpenAPI documents, derived from the table: v2 as JSON and as gnostic protobuf (what older kubectl reads before it
//! applies), v3 by group and version (what current kubectl reads).
//!
//! Documents are large and change only with the table: keep a [`Documents`] per table.

mod gnostic;
mod operations;
mod schema;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::table::{KUBERNETES_VERSION, ResourceInfo, TypeTable};
use operations::{Body, Operation};
use schema::{Dialect, Schemas};

/// Every document of one table, made at first use.
///
/// Documents of a table that lies on another one (see [`Documents::beside`]) take the other's as they are and add what is
/// new: a kind that comes or goes costs its own part only.
#[derive(Debug)]
pub struct Documents {
    table: Arc<TypeTable>,
    base: Option<Arc<Documents>>,
    v2: OnceLock<V2>,
    /// By path below `/openapi/v3/`: `api/v1`, `apis/apps/v1`. Without the base's.
    v3: OnceLock<Arc<BTreeMap<String, Document>>>,
    /// The same of the documents before these: what did not change is taken from there.
    before: Option<Arc<BTreeMap<String, Document>>>,
    index: OnceLock<Bytes>,
}

/// The v2 document in both forms, and what another document needs to build on it. No tree is kept: it would be ten times
/// as large.
#[derive(Debug)]
struct V2 {
    json: Bytes,
    /// Places of the entries of `paths` and `definitions` in `json`.
    paths: Range<usize>,
    definitions: Range<usize>,
    proto: Bytes,
    /// Names of all definitions.
    names: BTreeSet<String>,
}

#[derive(Clone, Debug)]
struct Document {
    bytes: Bytes,
    hash: String,
    parts: Vec<Part>,
}

/// What a group and version's document is made of, per resource: equal parts make equal documents.
#[derive(Clone, Debug)]
struct Part {
    /// Names, scope and subresources.
    facts: String,
    schema: Option<Arc<Value>>,
}

impl Part {
    fn of(table: &TypeTable, r: &ResourceInfo) -> Part {
        let subresources: Vec<&str> = r.subresources.iter().map(|s| s.name.as_str()).collect();
        Part {
            facts: format!(
                "{}/{}/{}/{}/{subresources:?}",
                r.plural, r.kind, r.list_kind, r.namespaced
            ),
            schema: table.ty(r.ty).schema.clone(),
        }
    }

    fn same(&self, other: &Part) -> bool {
        let schema = match (&self.schema, &other.schema) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        schema && self.facts == other.facts
    }
}

impl Documents {
    pub fn new(table: Arc<TypeTable>) -> Documents {
        Documents {
            table,
            base: None,
            v2: OnceLock::new(),
            v3: OnceLock::new(),
            before: None,
            index: OnceLock::new(),
        }
    }

    /// The documents of `table`, which has the resources of `base`'s table and custom ones beside them. Follows `before`,
    /// whose documents of groups and versions that stayed the same are taken over.
    pub fn beside(table: Arc<TypeTable>, base: Arc<Documents>, before: &Documents) -> Documents {
        // Documents that nobody asked for were not made: those before them may still serve.
        let made = before
            .base
            .as_ref()
            .and_then(|_| before.v3.get().or(before.before.as_ref()));
        Documents {
            base: Some(base),
            before: made.cloned(),
            ..Documents::new(table)
        }
    }

    /// Whether a resource is new here.
    fn is_own(&self, r: &ResourceInfo) -> bool {
        let base = self.base.as_ref();
        base.is_none_or(|b| b.table.resource(&r.group, &r.version, &r.plural).is_none())
    }

    fn v2(&self) -> &V2 {
        self.v2.get_or_init(|| {
            let base = self.base.as_ref().map(|b| b.v2());
            let operations = operations::all(&self.table, |r| self.is_own(r));
            let mut schemas = Schemas::new(&self.table, Dialect::V2);
            let mut paths: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
            for op in &operations {
                let entry = paths.entry(&op.path).or_default();
                path_parameters(op, entry, Dialect::V2);
                entry.insert(op.method.into(), v2_operation(op, &mut schemas));
            }
            schemas.add_kinds(|r| self.is_own(r));
            let mut definitions = schemas.finish();
            let mut names = base.map(|b| b.names.clone()).unwrap_or_default();
            definitions.retain(|name, _| !names.contains(name));
            names.extend(definitions.keys().cloned());

            let own = json!({"swagger": "2.0", "info": info(), "paths": paths, "definitions": definitions});
            // Messages that follow each other merge: lists of paths and definitions grow.
            let proto = [base.map_or(&[][..], |b| &b.proto), &gnostic::document(&own)].concat();
            let mut json = format!("{{\"swagger\":\"2.0\",\"info\":{},\"paths\":{{", info()).into_bytes();
            let part = |json: &mut Vec<u8>, key: &str, range: fn(&V2) -> Range<usize>| {
                let start = json.len();
                json.extend_from_slice(base.map_or(&[][..], |b| &b.json[range(b)]));
                let new = own[key].to_string();
                let new = &new[1..new.len() - 1];
                if json.len() > start && !new.is_empty() {
                    json.push(b',');
                }
                json.extend_from_slice(new.as_bytes());
                start..json.len()
            };
            let paths = part(&mut json, "paths", |b| b.paths.clone());
            json.extend_from_slice(b"},\"definitions\":{");
            let definitions = part(&mut json, "definitions", |b| b.definitions.clone());
            json.extend_from_slice(b"}}");
            V2 {
                json: json.into(),
                paths,
                definitions,
                proto: proto.into(),
                names,
            }
        })
    }

    /// `/openapi/v2` as JSON.
    pub fn v2_json(&self) -> Bytes {
        self.v2().json.clone()
    }

    /// `/openapi/v2` as gnostic protobuf.
    pub fn v2_proto(&self) -> Bytes {
        self.v2().proto.clone()
    }

    /// `/openapi/v3`: the index, with the hash of each document in its URL.
    pub fn v3_index(&self) -> Bytes {
        self.index
            .get_or_init(|| {
                let mut all: BTreeMap<&String, &Document> = BTreeMap::new();
                if let Some(base) = &self.base {
                    all.extend(base.own_v3().iter());
                }
                all.extend(self.own_v3().iter());
                let paths: Map<String, Value> = all
                    .into_iter()
                    .map(|(path, document)| {
                        let url = format!("/openapi/v3/{path}?hash={}", document.hash);
                        (path.clone(), json!({ "serverRelativeURL": url }))
                    })
                    .collect();
                json!({ "paths": paths }).to_string().into()
            })
            .clone()
    }

    /// `/openapi/v3/<path>`, for example `apis/apps/v1`; `None` if no such group and version is served.
    pub fn v3(&self, path: &str) -> Option<Bytes> {
        let path = path.trim_matches('/');
        let found = self.own_v3().get(path).map(|d| d.bytes.clone());
        found.or_else(|| self.base.as_ref()?.v3(path))
    }

    fn own_v3(&self) -> &Arc<BTreeMap<String, Document>> {
        self.v3.get_or_init(|| {
            let mut out = BTreeMap::new();
            for (group, versions) in crate::discovery::groups(&self.table) {
                for version in versions {
                    let here = |r: &&ResourceInfo| r.group == group && r.version == version;
                    if !self.table.resources().filter(here).any(|r| self.is_own(r)) {
                        continue;
                    }
                    let parts: Vec<Part> = self
                        .table
                        .resources()
                        .filter(here)
                        .map(|r| Part::of(&self.table, r))
                        .collect();
                    let path = if group.is_empty() {
                        format!("api/{version}")
                    } else {
                        format!("apis/{group}/{version}")
                    };
                    let known = self.before.as_ref().and_then(|b| b.get(&path));
                    let same = |known: &&Document| {
                        known.parts.len() == parts.len() && known.parts.iter().zip(&parts).all(|(a, b)| a.same(b))
                    };
                    if let Some(known) = known.filter(same) {
                        out.insert(path, known.clone());
                    } else if let Some(bytes) = v3(&self.table, group, version) {
                        let hash = Sha256::digest(&bytes).iter().map(|b| format!("{b:02X}")).collect();
                        out.insert(path, Document { bytes, hash, parts });
                    }
                }
            }
            Arc::new(out)
        })
    }
}

fn info() -> Value {
    json!({ "title": "Kubernetes", "version": KUBERNETES_VERSION })
}

/// The v2 document as JSON.
pub fn v2_json(table: &Arc<TypeTable>) -> Bytes {
    Documents::new(table.clone()).v2_json()
}

/// The v2 document as gnostic protobuf (`openapi.v2.Document`).
pub fn v2_proto(table: &Arc<TypeTable>) -> Bytes {
    Documents::new(table.clone()).v2_proto()
}

/// The v3 document of one group and version; `None` if not served.
pub fn v3(table: &TypeTable, group: &str, version: &str) -> Option<Bytes> {
    let wanted = |r: &ResourceInfo| r.group == group && r.version == version;
    let operations = operations::all(table, wanted);
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
    schemas.add_kinds(wanted);
    let document = json!({
        "openapi": "3.0.0",
        "info": info(),
        "paths": paths,
        "components": { "schemas": schemas.finish() },
    });
    Some(document.to_string().into())
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

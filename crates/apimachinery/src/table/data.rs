//! Reads the generated data.

use std::collections::HashMap;
use std::io::Read;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::served::SERVED;
use super::{
    EXTENSIONS, Field, KUBERNETES_VERSION, ListKind, ResourceInfo, SchemaOr, Subresource, Ty, TypeDef, TypeId,
    TypeTable,
};
use crate::gvk::Gvk;

static DATA: &[u8] = include_bytes!("../../data/types.json.gz");

#[derive(Deserialize)]
struct Data {
    version: String,
    types: Vec<TypeRow>,
    resources: Vec<ResourceRow>,
}

#[derive(Deserialize)]
struct TypeRow {
    n: String,
    #[serde(default)]
    gvk: Option<(String, String, String)>,
    #[serde(default)]
    mt: Option<String>,
    /// Numbers of embedded messages.
    #[serde(default)]
    i: Vec<u32>,
    f: Vec<FieldRow>,
}

#[derive(Deserialize)]
struct FieldRow {
    n: String,
    t: String,
    /// r required, p pointer, o omitempty.
    #[serde(default)]
    x: String,
    #[serde(default)]
    p: Option<u32>,
    #[serde(default)]
    w: Option<usize>,
    #[serde(default)]
    lt: Option<String>,
    #[serde(default)]
    lk: Vec<Box<str>>,
    #[serde(default)]
    mk: Option<Box<str>>,
    #[serde(default)]
    ps: Option<String>,
    #[serde(default)]
    mt: Option<String>,
    #[serde(default)]
    d: Option<Value>,
}

#[derive(Deserialize)]
struct ResourceRow {
    g: String,
    v: String,
    r: String,
    s: String,
    k: (String, String, String),
    ns: bool,
    verbs: Vec<String>,
    sn: Option<Vec<String>>,
    cat: Option<Vec<String>>,
    subs: Vec<SubRow>,
}

#[derive(Deserialize)]
struct SubRow {
    n: String,
    k: (String, String, String),
    v: Vec<String>,
}

/// Builds the built-in table. Panics if the committed data does not fit this code, which a test would show.
pub(super) fn load() -> TypeTable {
    let mut text = String::new();
    flate2::read::GzDecoder::new(DATA)
        .read_to_string(&mut text)
        .expect("generated data unpacks");
    let data: Data = serde_json::from_str(&text).expect("generated data has the form of this reader");
    assert_eq!(data.version, KUBERNETES_VERSION, "generated data is of another release");

    let ids: HashMap<&str, TypeId> = data
        .types
        .iter()
        .enumerate()
        .map(|(i, t)| (t.n.as_str(), TypeId(i as u32)))
        .collect();
    let mut table = TypeTable {
        types: Vec::with_capacity(data.types.len()),
        by_name: HashMap::new(),
        by_kind: HashMap::new(),
        base: None,
        resources: Vec::new(),
        by_plural: HashMap::new(),
    };
    for row in &data.types {
        let fields = row.f.iter().map(|f| field(f, &row.i, &ids)).collect();
        let gvk = row.gvk.as_ref().map(|(g, v, k)| Gvk::new(g, v, k));
        let mut def = TypeDef::new(&row.n, gvk, fields);
        def.atomic = row.mt.as_deref() == Some("atomic");
        table.push(def);
    }
    for r in data.resources {
        let Some((_, _, subresources_on)) = SERVED.iter().find(|(g, plural, _)| *g == r.g && *plural == r.r) else {
            continue;
        };
        let gvk = Gvk::new(&r.k.0, &r.k.1, &r.k.2);
        let ty = *table
            .by_kind
            .get(&gvk)
            .unwrap_or_else(|| panic!("no type for served kind {gvk}"));
        let subresources = r
            .subs
            .into_iter()
            .filter(|s| subresources_on.contains(&s.n.as_str()))
            .map(|s| Subresource {
                name: s.n,
                kind: Gvk::new(&s.k.0, &s.k.1, &s.k.2),
                verbs: s.v,
            })
            .collect();
        table.resources.push(Arc::new(ResourceInfo {
            group: r.g,
            version: r.v,
            plural: r.r,
            singular: r.s,
            gvk,
            ty,
            namespaced: r.ns,
            short_names: r.sn.unwrap_or_default(),
            categories: r.cat.unwrap_or_default(),
            verbs: r.verbs,
            subresources,
            columns: Vec::new(),
            custom: false,
            list_kind: format!("{}List", r.k.2),
            kind: r.k.2,
            scale: None,
            selectable: Vec::new(),
            deprecation: None,
            storage_version: None,
        }));
    }
    assert_eq!(
        table.resources.len(),
        SERVED.len(),
        "a served resource is not in the generated data"
    );
    table.index();
    table
}

fn field(row: &FieldRow, embedded: &[u32], ids: &HashMap<&str, TypeId>) -> Field {
    let strategy = row.ps.as_deref().unwrap_or("");
    Field {
        name: row.n.as_str().into(),
        ty: ty(&row.t, ids),
        proto: row.p,
        embedded_in: row.w.map(|w| embedded[w]),
        required: row.x.contains('r'),
        pointer: row.x.contains('p'),
        omitempty: row.x.contains('o'),
        list: match row.lt.as_deref() {
            Some("map") => ListKind::Map,
            Some("set") => ListKind::Set,
            Some("atomic") => ListKind::Atomic,
            _ => ListKind::Unset,
        },
        list_keys: row.lk.clone(),
        merge_key: row.mk.clone(),
        patch_merge: strategy.split(',').any(|s| s == "merge"),
        patch_retain_keys: strategy.split(',').any(|s| s == "retainKeys"),
        atomic_map: row.mt.as_deref() == Some("atomic"),
        default: row.d.clone(),
    }
}

/// The type of schemas.
fn schema(ids: &HashMap<&str, TypeId>) -> TypeId {
    ids[format!("{EXTENSIONS}JSONSchemaProps").as_str()]
}

fn ty(text: &str, ids: &HashMap<&str, TypeId>) -> Ty {
    if let Some(rest) = text.strip_prefix("[]") {
        return Ty::List(Box::new(ty(rest, ids)));
    }
    if let Some(rest) = text.strip_prefix("{}") {
        return Ty::Map(Box::new(ty(rest, ids)));
    }
    if let Some(name) = text.strip_prefix('#') {
        return Ty::Object(
            *ids.get(name)
                .unwrap_or_else(|| panic!("no type {name} in the generated data")),
        );
    }
    match text {
        "string" => Ty::String,
        "bool" => Ty::Bool,
        "int32" => Ty::Int32,
        "int64" => Ty::Int64,
        "double" => Ty::Double,
        "bytes" => Ty::Bytes,
        "intstr" => Ty::IntOrString,
        "quantity" => Ty::Quantity,
        "time" => Ty::Time,
        "microtime" => Ty::MicroTime,
        "duration" => Ty::Duration,
        "fields" => Ty::Fields,
        "raw" => Ty::Raw,
        "strings" => Ty::Strings,
        "json" => Ty::Json,
        "schema-or-array" => Ty::SchemaOr(SchemaOr::Array, schema(ids)),
        "schema-or-bool" => Ty::SchemaOr(SchemaOr::Bool, schema(ids)),
        "schema-or-strings" => Ty::SchemaOr(SchemaOr::Strings, schema(ids)),
        other => panic!("unknown type word {other} in the generated data"),
    }
}

//! Types as schemas, in the words of v2 and of v3.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::discovery;
use crate::table::{EXTENSIONS, Field, ListKind, META, ResourceInfo, SchemaOr, Ty, TypeDef, TypeTable};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    V2,
    V3,
}

const QUANTITY: &str = "io.k8s.apimachinery.pkg.api.resource.Quantity";
const INT_OR_STRING: &str = "io.k8s.apimachinery.pkg.util.intstr.IntOrString";
const TIME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Time";
const MICRO_TIME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime";
const FIELDS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1";
const RAW: &str = "io.k8s.apimachinery.pkg.runtime.RawExtension";
const PATCH: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Patch";

/// Collects the definitions that a document refers to.
pub(super) struct Schemas<'t> {
    table: &'t TypeTable,
    dialect: Dialect,
    queue: Vec<String>,
    seen: BTreeSet<String>,
}

impl<'t> Schemas<'t> {
    pub fn new(table: &'t TypeTable, dialect: Dialect) -> Schemas<'t> {
        Schemas {
            table,
            dialect,
            queue: Vec::new(),
            seen: BTreeSet::new(),
        }
    }

    /// A reference to a definition, which the document will hold.
    pub fn reference(&mut self, name: &str) -> Value {
        if self.seen.insert(name.to_owned()) {
            self.queue.push(name.to_owned());
        }
        let place = match self.dialect {
            Dialect::V2 => "#/definitions/",
            Dialect::V3 => "#/components/schemas/",
        };
        json!({ "$ref": format!("{place}{name}") })
    }

    /// The schema of every patch.
    pub fn patch(&mut self) -> Value {
        self.reference(PATCH)
    }

    /// Adds the kinds of the served resources, their lists and what their subresources exchange.
    pub fn add_kinds(&mut self, wanted: impl Fn(&ResourceInfo) -> bool) {
        let table = self.table;
        for r in table.resources().filter(|r| wanted(r)) {
            let subs = r.subresources.iter().map(|s| s.kind.clone());
            for gvk in [r.gvk.clone(), r.gvk.with_kind(&r.list_kind())].into_iter().chain(subs) {
                if let Some(kind) = table.kind_of(&gvk) {
                    self.reference(&kind.def.name);
                }
            }
        }
        self.reference(&format!("{META}Status"));
        self.reference(&format!("{META}DeleteOptions"));
    }

    /// Every definition that was referred to, directly or not.
    pub fn finish(mut self) -> Map<String, Value> {
        let mut out = Map::new();
        while let Some(name) = self.queue.pop() {
            let schema = match leaf(&name, self.dialect) {
                Some(schema) => schema,
                None => match self.table.ty_named(&name) {
                    Some(id) => self.definition(self.table.ty(id)),
                    None => continue,
                },
            };
            out.insert(name, schema);
        }
        out
    }

    fn definition(&mut self, def: &TypeDef) -> Value {
        if let Some(schema) = &def.schema {
            return self.custom(def, schema);
        }
        let mut out = Map::new();
        out.insert("type".into(), "object".into());
        let mut properties = Map::new();
        let mut required = Vec::new();
        for field in &def.fields {
            properties.insert(field.name.to_string(), self.field(field));
            if field.required {
                required.push(Value::from(&*field.name));
            }
        }
        if !properties.is_empty() {
            out.insert("properties".into(), properties.into());
        }
        if !required.is_empty() {
            required.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
            out.insert("required".into(), required.into());
        }
        if def.atomic {
            out.insert("x-kubernetes-map-type".into(), "atomic".into());
        }
        self.kinds(def, &mut out);
        Value::Object(out)
    }

    fn kinds(&self, def: &TypeDef, out: &mut Map<String, Value>) {
        let mut kinds = Vec::new();
        let short = def.short_name();
        if *def.name == format!("{META}DeleteOptions") {
            // Delete options may come with the version of any built-in group.
            let builtin = self.table.base().map_or(self.table, |base| base);
            for (group, versions) in discovery::groups(builtin) {
                kinds.extend(
                    versions
                        .iter()
                        .map(|v| json!({ "group": group, "kind": short, "version": v })),
                );
            }
        } else if let Some(gvk) = &def.gvk {
            kinds.push(json!({ "group": &*gvk.group, "kind": &*gvk.kind, "version": &*gvk.version }));
        }
        if !kinds.is_empty() {
            out.insert("x-kubernetes-group-version-kind".into(), kinds.into());
        }
    }

    fn field(&mut self, field: &Field) -> Value {
        let zero = !field.pointer && field.default.is_none();
        let mut out = self.ty(&field.ty);
        if self.dialect == Dialect::V3
            && let Some(reference) = out.get("$ref").cloned()
        {
            out = json!({ "allOf": [{ "$ref": reference }] });
            if zero && matches!(field.ty, Ty::Object(_)) {
                out["default"] = json!({});
            }
        }
        if let (Dialect::V3, Some(default)) = (self.dialect, &field.default) {
            out["default"] = default.clone();
        }
        let list = match field.list {
            ListKind::Unset => None,
            ListKind::Atomic => Some("atomic"),
            ListKind::Set => Some("set"),
            ListKind::Map => Some("map"),
        };
        if let Some(list) = list {
            out["x-kubernetes-list-type"] = list.into();
        }
        if !field.list_keys.is_empty() {
            out["x-kubernetes-list-map-keys"] = field.list_keys.iter().map(|k| Value::from(&**k)).collect();
        }
        if let Some(key) = &field.merge_key {
            out["x-kubernetes-patch-merge-key"] = (&**key).into();
        }
        if let Some(strategy) = field.patch_strategy() {
            out["x-kubernetes-patch-strategy"] = strategy.into();
        }
        if field.atomic_map {
            out["x-kubernetes-map-type"] = "atomic".into();
        }
        out
    }

    fn ty(&mut self, ty: &Ty) -> Value {
        match ty {
            Ty::String => json!({ "type": "string" }),
            Ty::Duration => json!({ "type": "string" }),
            Ty::Bool => json!({ "type": "boolean" }),
            Ty::Int32 => json!({ "type": "integer", "format": "int32" }),
            Ty::Int64 => json!({ "type": "integer", "format": "int64" }),
            Ty::Double => json!({ "type": "number", "format": "double" }),
            Ty::Bytes => json!({ "type": "string", "format": "byte" }),
            Ty::IntOrString => self.reference(INT_OR_STRING),
            Ty::Quantity => self.reference(QUANTITY),
            Ty::Time => self.reference(TIME),
            Ty::MicroTime => self.reference(MICRO_TIME),
            Ty::Fields => self.reference(FIELDS),
            Ty::Raw => self.reference(RAW),
            Ty::Strings => json!({ "type": "array", "items": { "type": "string" } }),
            Ty::Any => json!({}),
            Ty::Json => self.reference(&format!("{EXTENSIONS}JSON")),
            Ty::SchemaOr(or, schema) => {
                let word = match or {
                    SchemaOr::Array => "OrArray",
                    SchemaOr::Bool => "OrBool",
                    SchemaOr::Strings => "OrStringArray",
                };
                self.reference(&format!("{}{word}", self.table.ty(*schema).name))
            }
            Ty::Object(id) => {
                let def = self.table.ty(*id);
                self.reference(&def.name.clone())
            }
            Ty::List(item) => {
                let mut items = self.ty(item);
                if self.dialect == Dialect::V3
                    && let Some(reference) = items.get("$ref").cloned()
                {
                    items = json!({ "allOf": [{ "$ref": reference }], "default": {} });
                }
                json!({ "type": "array", "items": items })
            }
            Ty::Map(value) => {
                let value = self.ty(value);
                json!({ "type": "object", "additionalProperties": value })
            }
        }
    }

    /// A custom kind: its own schema with the machinery's fields in place.
    fn custom(&mut self, def: &TypeDef, schema: &Value) -> Value {
        let mut out = if schema.is_object() {
            restrict(schema, self.dialect)
        } else {
            json!({})
        };
        let open = !out["properties"].is_object();
        out["type"] = "object".into();
        if open && self.dialect == Dialect::V2 {
            // Without properties, v2 readers take any content.
            if let Some(object) = out.as_object_mut() {
                object.remove("properties");
            }
        } else {
            let metadata = self.reference(&format!("{META}ObjectMeta"));
            out["properties"]["apiVersion"] = json!({ "type": "string" });
            out["properties"]["kind"] = json!({ "type": "string" });
            out["properties"]["metadata"] = match self.dialect {
                Dialect::V2 => metadata,
                Dialect::V3 => json!({ "allOf": [metadata] }),
            };
        }
        if let Some(object) = out.as_object_mut() {
            self.kinds(def, object);
        }
        out
    }
}

/// What is kept of a custom schema. v2 knows fewer words; a part that keeps unknown fields has no listed properties there.
fn restrict(schema: &Value, dialect: Dialect) -> Value {
    let Value::Object(schema) = schema else {
        return schema.clone();
    };
    let mut out = Map::new();
    let flag = |key: &str| schema.get(key).is_some_and(|v| v == true);
    let either = flag("x-kubernetes-int-or-string");
    let open = flag("x-kubernetes-preserve-unknown-fields");
    for (key, value) in schema {
        let kept = match (key.as_str(), dialect) {
            ("properties", Dialect::V2) if open => continue,
            ("type", Dialect::V2) if either || open || flag("nullable") => continue,
            ("properties", _) => {
                let inner = value.as_object().into_iter().flatten();
                inner
                    .map(|(k, v)| (k.clone(), restrict(v, dialect)))
                    .collect::<Map<_, _>>()
                    .into()
            }
            ("items" | "additionalProperties", _) => restrict(value, dialect),
            ("anyOf" | "oneOf" | "allOf" | "not" | "nullable" | "default", Dialect::V2) => continue,
            ("x-kubernetes-validations", Dialect::V2) => continue,
            _ => value.clone(),
        };
        out.insert(key.clone(), kept);
    }
    let mut out = Value::Object(out);
    if flag("x-kubernetes-embedded-resource") && dialect == Dialect::V3 {
        // A whole object: the reader learns of the fields that every object has.
        out["properties"]["apiVersion"] = json!({ "type": "string" });
        out["properties"]["kind"] = json!({ "type": "string" });
        out["properties"]["metadata"] =
            json!({ "allOf": [{ "$ref": format!("#/components/schemas/{META}ObjectMeta") }] });
        let mut required = vec![Value::from("kind"), "apiVersion".into()];
        required.extend(
            schema
                .get("required")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .cloned(),
        );
        out["required"] = required.into();
    }
    out
}

fn leaf(name: &str, dialect: Dialect) -> Option<Value> {
    Some(match (name, dialect) {
        (QUANTITY, Dialect::V2) => json!({ "type": "string" }),
        (QUANTITY, Dialect::V3) => json!({ "oneOf": [{ "type": "string" }, { "type": "number" }] }),
        (INT_OR_STRING, Dialect::V2) => json!({ "type": "string", "format": "int-or-string" }),
        (INT_OR_STRING, Dialect::V3) => {
            json!({ "format": "int-or-string", "oneOf": [{ "type": "integer" }, { "type": "string" }] })
        }
        (TIME | MICRO_TIME, _) => json!({ "type": "string", "format": "date-time" }),
        (FIELDS | RAW | PATCH, _) => json!({ "type": "object" }),
        // Anything: what these hold has no single type.
        (any, _)
            if any
                .strip_prefix(EXTENSIONS)
                .is_some_and(|n| n == "JSON" || n.starts_with("JSONSchemaPropsOr")) =>
        {
            json!({})
        }
        _ => return None,
    })
}

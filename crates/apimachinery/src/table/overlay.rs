//! Kinds that come at run time: an OpenAPI v3 schema becomes table types.

use std::sync::Arc;

use serde_json::Value;

use super::{Field, KindDef, ListKind, META, ResourceInfo, Subresource, Ty, TypeDef, TypeId, TypeTable};
use crate::gvk::Gvk;
use crate::structural::{CompileError, Structural};

/// Deepest schema that becomes types; anything below is kept as sent.
const DEPTH_MAX: usize = 64;

/// How much of a kind becomes types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    Full,
    /// The object itself, without its fields.
    Shallow,
}

pub(super) fn add(table: &mut TypeTable, kind: KindDef, depth: Depth) -> Result<(), (Gvk, CompileError)> {
    let gvk = Gvk::new(&kind.group, &kind.version, &kind.kind);
    // Definition names reverse the group, as published schemas of custom kinds do.
    let reversed: Vec<&str> = kind.group.split('.').rev().collect();
    let name = format!("{}.{}.{}", reversed.join("."), kind.version, kind.kind);
    let more = kind.more;
    let structural = match more.compiled {
        Some(compiled) => compiled,
        None => Arc::new(Structural::compile(&kind.schema).map_err(|error| (gvk.clone(), error))?),
    };
    let none = Value::Null;
    let parts = match depth {
        Depth::Full => &*kind.schema,
        Depth::Shallow => &none,
    };
    let top = Top {
        gvk: gvk.clone(),
        schema: kind.schema.clone(),
        structural,
    };
    let ty = object(table, &name, parts, Some(top), 0);
    let list_kind = match more.list_kind.as_str() {
        "" => format!("{}List", kind.kind),
        given => given.to_owned(),
    };

    let list_meta = table.ty_named(&format!("{META}ListMeta"));
    let mut items = Field::new("items", Ty::List(Box::new(Ty::Object(ty))));
    items.required = true;
    let mut fields = vec![
        Field::new("apiVersion", Ty::String),
        Field::new("kind", Ty::String),
        items,
    ];
    fields.extend(list_meta.map(|id| Field::new("metadata", Ty::Object(id))));
    table.push(TypeDef::new(
        // Named after the kind of lists, which may be any.
        &name.replace(&format!(".{}", kind.kind), &format!(".{list_kind}")),
        Some(gvk.with_kind(&list_kind)),
        fields,
    ));

    let verbs = |list: &[&str]| list.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>();
    let status = Subresource {
        name: "status".into(),
        kind: gvk.clone(),
        verbs: verbs(&["get", "patch", "update"]),
    };
    let mut subresources = Vec::new();
    if kind.status_subresource {
        subresources.push(status);
    }
    if more.scale.is_some() {
        subresources.push(Subresource {
            name: "scale".into(),
            kind: Gvk::new("autoscaling", "v1", "Scale"),
            verbs: verbs(&["get", "patch", "update"]),
        });
    }
    let info = ResourceInfo {
        group: kind.group,
        version: kind.version,
        plural: kind.plural,
        singular: kind.singular,
        kind: kind.kind,
        gvk,
        ty,
        namespaced: kind.namespaced,
        short_names: kind.short_names,
        categories: kind.categories,
        verbs: verbs(&[
            "delete",
            "deletecollection",
            "get",
            "list",
            "patch",
            "create",
            "update",
            "watch",
        ]),
        subresources,
        columns: kind.columns,
        custom: true,
        list_kind,
        scale: more.scale,
        selectable: more.selectable,
        deprecation: more.deprecation,
        storage_version: more.storage_version,
    };
    let same = |r: &ResourceInfo| r.group == info.group && r.version == info.version && r.plural == info.plural;
    match table.resources.iter_mut().find(|r| same(r)) {
        Some(old) => *old = Arc::new(info),
        None => table.resources.push(Arc::new(info)),
    }
    Ok(())
}

/// What only the type of whole objects has.
struct Top {
    gvk: Gvk,
    schema: Arc<Value>,
    structural: Arc<Structural>,
}

/// Adds the type of an object schema. At the top (`gvk` given) the three common fields are the machinery's own.
fn object(table: &mut TypeTable, name: &str, schema: &Value, kind: Option<Top>, depth: usize) -> TypeId {
    let mut fields = Vec::new();
    let top = kind.is_some();
    let resource = top || schema["x-kubernetes-embedded-resource"] == true;
    if resource {
        fields.push(Field::new("apiVersion", Ty::String));
        fields.push(Field::new("kind", Ty::String));
        let meta = table.ty_named(&format!("{META}ObjectMeta"));
        fields.push(Field::new("metadata", meta.map_or(Ty::Any, Ty::Object)));
    }
    let required = |n: &str| schema["required"].as_array().is_some_and(|a| a.iter().any(|r| r == n));
    for (property, sub) in schema["properties"].as_object().into_iter().flatten() {
        if resource && matches!(property.as_str(), "apiVersion" | "kind" | "metadata") {
            continue;
        }
        let mut field = Field::new(
            property,
            schema_ty(table, &format!("{name}.{property}"), sub, depth + 1),
        );
        field.required = required(property);
        field.default = sub.get("default").cloned();
        field.atomic_map = sub["x-kubernetes-map-type"] == "atomic";
        field.list = match sub["x-kubernetes-list-type"].as_str() {
            Some("map") => ListKind::Map,
            Some("set") => ListKind::Set,
            Some("atomic") => ListKind::Atomic,
            _ => ListKind::Unset,
        };
        let keys = sub["x-kubernetes-list-map-keys"].as_array();
        field.list_keys = keys
            .into_iter()
            .flatten()
            .filter_map(|k| k.as_str().map(Into::into))
            .collect();
        fields.push(field);
    }
    let mut def = TypeDef::new(name, kind.as_ref().map(|k| k.gvk.clone()), fields);
    let open = schema["x-kubernetes-preserve-unknown-fields"] == true;
    def.preserve_unknown = open || !schema["properties"].is_object();
    def.atomic = schema["x-kubernetes-map-type"] == "atomic";
    if let Some(kind) = kind {
        def.schema = Some(kind.schema);
        def.structural = Some(kind.structural);
    }
    table.push(def)
}

fn schema_ty(table: &mut TypeTable, name: &str, schema: &Value, depth: usize) -> Ty {
    if depth > DEPTH_MAX {
        return Ty::Any;
    }
    if schema["x-kubernetes-int-or-string"] == true {
        return Ty::IntOrString;
    }
    match (schema["type"].as_str(), schema["format"].as_str()) {
        (Some("string"), _) => Ty::String,
        (Some("boolean"), _) => Ty::Bool,
        (Some("integer"), Some("int32")) => Ty::Int32,
        (Some("integer"), _) => Ty::Int64,
        (Some("number"), _) => Ty::Double,
        (Some("array"), _) => Ty::List(Box::new(schema_ty(
            table,
            &format!("{name}[]"),
            &schema["items"],
            depth + 1,
        ))),
        (Some("object"), _) if schema["properties"].is_object() || schema["x-kubernetes-embedded-resource"] == true => {
            Ty::Object(object(table, name, schema, None, depth))
        }
        (Some("object"), _) if schema["additionalProperties"].is_object() => {
            let value = &schema["additionalProperties"];
            Ty::Map(Box::new(schema_ty(table, &format!("{name}{{}}"), value, depth + 1)))
        }
        (Some("object"), _) => Ty::Map(Box::new(Ty::Any)),
        _ => Ty::Any,
    }
}

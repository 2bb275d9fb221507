//! Kinds that come at run time: an OpenAPI v3 schema becomes table types.

use std::sync::Arc;

use serde_json::Value;

use super::{Field, KindDef, ListKind, META, ResourceInfo, Subresource, Ty, TypeDef, TypeId, TypeTable};
use crate::gvk::Gvk;

/// Deepest schema that becomes types; anything below is kept as sent.
const DEPTH_MAX: usize = 64;

pub(super) fn add(table: &mut TypeTable, kind: KindDef) {
    let gvk = Gvk::new(&kind.group, &kind.version, &kind.kind);
    // Definition names reverse the group, as published schemas of custom kinds do.
    let reversed: Vec<&str> = kind.group.split('.').rev().collect();
    let name = format!("{}.{}.{}", reversed.join("."), kind.version, kind.kind);
    let ty = object(table, &name, &kind.schema, Some(gvk.clone()), 0);

    let list_meta = table.by_name.get(format!("{META}ListMeta").as_str()).copied();
    let mut items = Field::new("items", Ty::List(Box::new(Ty::Object(ty))));
    items.required = true;
    let mut fields = vec![
        Field::new("apiVersion", Ty::String),
        Field::new("kind", Ty::String),
        items,
    ];
    fields.extend(list_meta.map(|id| Field::new("metadata", Ty::Object(id))));
    table.push(TypeDef::new(
        &format!("{name}List"),
        Some(gvk.with_kind(&format!("{}List", kind.kind))),
        fields,
    ));

    let verbs = |list: &[&str]| list.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>();
    let status = Subresource {
        name: "status".into(),
        kind: gvk.clone(),
        verbs: verbs(&["get", "patch", "update"]),
    };
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
        subresources: if kind.status_subresource {
            vec![status]
        } else {
            Vec::new()
        },
        columns: kind.columns,
        custom: true,
    };
    let same = |r: &ResourceInfo| r.group == info.group && r.version == info.version && r.plural == info.plural;
    match table.resources.iter_mut().find(|r| same(r)) {
        Some(old) => *old = info,
        None => table.resources.push(info),
    }
}

/// Adds the type of an object schema. At the top (`gvk` given) the three common fields are the machinery's own.
fn object(table: &mut TypeTable, name: &str, schema: &Value, gvk: Option<Gvk>, depth: usize) -> TypeId {
    let mut fields = Vec::new();
    if gvk.is_some() {
        fields.push(Field::new("apiVersion", Ty::String));
        fields.push(Field::new("kind", Ty::String));
        let meta = table.by_name.get(format!("{META}ObjectMeta").as_str()).copied();
        fields.push(Field::new("metadata", meta.map_or(Ty::Any, Ty::Object)));
    }
    let required = |n: &str| schema["required"].as_array().is_some_and(|a| a.iter().any(|r| r == n));
    for (property, sub) in schema["properties"].as_object().into_iter().flatten() {
        if gvk.is_some() && matches!(property.as_str(), "apiVersion" | "kind" | "metadata") {
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
    let top = gvk.is_some();
    let mut def = TypeDef::new(name, gvk, fields);
    let open = schema["x-kubernetes-preserve-unknown-fields"] == true;
    def.preserve_unknown = open || !schema["properties"].is_object();
    def.atomic = schema["x-kubernetes-map-type"] == "atomic";
    if top {
        def.schema = Some(Arc::new(schema.clone()));
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
        (Some("object"), _) if schema["properties"].is_object() => Ty::Object(object(table, name, schema, None, depth)),
        (Some("object"), _) if schema["additionalProperties"].is_object() => {
            let value = &schema["additionalProperties"];
            Ty::Map(Box::new(schema_ty(table, &format!("{name}{{}}"), value, depth + 1)))
        }
        (Some("object"), _) => Ty::Map(Box::new(Ty::Any)),
        _ => Ty::Any,
    }
}

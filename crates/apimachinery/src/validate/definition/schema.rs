//! Schemas of custom kinds: words that are not supported, and facts that contradict each other.

use serde_json::Value;

use super::super::{Errors, list, text};
use super::{compiled, structural};
use crate::field::FieldError;
use crate::structural::DEPTH_MAX;

const TYPES: [&str; 6] = ["array", "boolean", "integer", "number", "object", "string"];
/// Words at the root of a schema whose kind has a status subresource.
const ROOT_WORDS: [&str; 23] = [
    "description",
    "type",
    "format",
    "title",
    "maximum",
    "exclusiveMaximum",
    "minimum",
    "exclusiveMinimum",
    "maxLength",
    "minLength",
    "pattern",
    "maxItems",
    "minItems",
    "uniqueItems",
    "multipleOf",
    "required",
    "items",
    "properties",
    "externalDocs",
    "example",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
    "nullable",
];
const ROOT_FIELDS: &str = "[Description Type Format Title Maximum ExclusiveMaximum Minimum ExclusiveMinimum MaxLength MinLength Pattern MaxItems MinItems UniqueItems MultipleOf Required Items Properties ExternalDocs Example XPreserveUnknownFields XValidations]";

/// The schema of whole objects; `status`: whether the kind has a status subresource.
pub(super) fn schema(errors: &mut Errors, path: &str, schema: &Value, status: bool) {
    let Some(words) = schema.as_object() else { return };
    let before = errors.0.len();
    if status {
        let ty = text(schema, "type");
        if !matches!(ty, "" | "object") {
            let detail =
                "only \"object\" is allowed as the type at the root of the schema if the status subresource is enabled";
            errors.invalid(format!("{path}.type"), ty, detail);
        } else if words.keys().any(|w| !ROOT_WORDS.contains(&w.as_str())) {
            let detail = format!(
                "only {ROOT_FIELDS} fields are allowed at the root of the schema if the status subresource is enabled"
            );
            errors.invalid(path, schema.clone(), &detail);
        }
    }
    if schema["nullable"] == true {
        errors.forbidden(format!("{path}.nullable"), "nullable cannot be true at the root");
    }
    let shape = structural::check(path, schema);
    if shape.is_empty()
        && let Some(compiled) = compiled(errors, path, schema)
    {
        errors.0.extend(compiled.check_defaults(path));
    }
    errors.0.extend(shape);
    let walk = Place {
        root: true,
        meta: false,
        no_default: None,
    };
    part(errors, path, schema, walk, 0);
    // A pattern that does not compile is told once.
    let mut found = errors.0.split_off(before);
    found.dedup();
    errors.0.extend(found);
}

#[derive(Clone, Copy)]
struct Place {
    root: bool,
    /// Within the type or metadata of a resource.
    meta: bool,
    /// Why defaults are forbidden here.
    no_default: Option<&'static str>,
}

fn part(errors: &mut Errors, path: &str, schema: &Value, place: Place, depth: usize) {
    if depth > DEPTH_MAX || !schema.is_object() {
        return;
    }
    words(errors, path, schema, place);
    let inner = Place { root: false, ..place };
    let additional = &schema["additionalProperties"];
    if additional.is_object() || additional == &Value::Bool(false) {
        let named = schema["properties"].as_object().is_some_and(|p| !p.is_empty());
        if named {
            let detail = "additionalProperties and properties are mutual exclusive";
            errors.forbidden(format!("{path}.additionalProperties"), detail);
        }
    }
    let below = Place {
        no_default: match place.meta {
            true => Some("inside additionalProperties applying to object metadata"),
            false => place.no_default,
        },
        ..inner
    };
    part(
        errors,
        &format!("{path}.additionalProperties"),
        additional,
        below,
        depth + 1,
    );
    let resource = place.root || schema["x-kubernetes-embedded-resource"] == true;
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let mut below = inner;
        if resource && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
            below.meta = true;
            if place.root {
                below.no_default = Some(match name.as_str() {
                    "apiVersion" => "in top-level apiVersion",
                    "kind" => "in top-level kind",
                    _ => "in top-level metadata",
                });
            }
        }
        part(
            errors,
            &format!("{path}.properties[{name}]"),
            property,
            below,
            depth + 1,
        );
    }
    part(errors, &format!("{path}.not"), &schema["not"], inner, depth + 1);
    for key in ["allOf", "oneOf", "anyOf"] {
        for (i, schema) in list(&schema[key]).iter().enumerate() {
            part(errors, &format!("{path}.{key}[{i}]"), schema, inner, depth + 1);
        }
    }
    part(errors, &format!("{path}.items"), &schema["items"], inner, depth + 1);
    lists(errors, path, schema);
    if !list(&schema["x-kubernetes-validations"]).is_empty() {
        let detail = "validation rules in CEL are not supported by this server";
        errors.forbidden(format!("{path}.x-kubernetes-validations"), detail);
    }
}

fn words(errors: &mut Errors, path: &str, schema: &Value, place: Place) {
    let ty = text(schema, "type");
    if ty == "null" {
        let detail = "type cannot be set to null, use nullable as an alternative";
        errors.forbidden(format!("{path}.type"), detail);
    } else if !ty.is_empty() && !TYPES.contains(&ty) {
        errors.push(FieldError::not_supported(format!("{path}.type"), ty, &TYPES));
    }
    if !schema["default"].is_null()
        && let Some(reason) = place.no_default
    {
        errors.forbidden(format!("{path}.default"), &format!("must not be set {reason}"));
    }
    for word in [
        "id",
        "additionalItems",
        "patternProperties",
        "definitions",
        "dependencies",
        "$ref",
    ] {
        let empty = match &schema[word] {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            Value::Object(map) => map.is_empty() && word != "additionalItems",
            _ => false,
        };
        if !empty {
            errors.forbidden(format!("{path}.{word}"), &format!("{word} is not supported"));
        }
    }
    if schema["items"].is_array() {
        errors.forbidden(
            format!("{path}.items"),
            "items must be a schema object and not an array",
        );
    }
    if place.meta && schema["x-kubernetes-embedded-resource"] == true {
        let detail = "must not be used inside of resource meta";
        errors.forbidden(format!("{path}.x-kubernetes-embedded-resource"), detail);
    }
    if schema["uniqueItems"] == true {
        let detail = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic";
        errors.forbidden(format!("{path}.uniqueItems"), detail);
    }
    if schema["x-kubernetes-preserve-unknown-fields"] == false {
        let at = format!("{path}.x-kubernetes-preserve-unknown-fields");
        errors.invalid(at, false, "must be true or undefined");
    }
}

/// What the extensions about lists and maps say, and what they need.
fn lists(errors: &mut Errors, path: &str, schema: &Value) {
    let ty = text(schema, "type");
    let needs = |errors: &mut Errors, wanted: &str, extension: &str| {
        let detail = format!("must be {wanted} if {extension} is specified");
        match ty {
            "" => errors.required(format!("{path}.type"), &detail),
            ty => errors.invalid(format!("{path}.type"), ty, &detail),
        }
    };
    if let Some(map) = schema["x-kubernetes-map-type"].as_str() {
        if ty != "object" {
            needs(errors, "object", "x-kubernetes-map-type");
        }
        if !matches!(map, "atomic" | "granular") {
            let at = format!("{path}.x-kubernetes-map-type");
            errors.push(FieldError::not_supported(at, map, &["atomic", "granular"]));
        }
    }
    let items = &schema["items"];
    let kind = schema["x-kubernetes-list-type"].as_str();
    if let Some(kind) = kind {
        if ty != "array" {
            needs(errors, "array", "x-kubernetes-list-type");
        } else if kind == "set" {
            let detail = "must be atomic as item of a list with x-kubernetes-list-type=set";
            let (word, value) = match text(items, "type") {
                "array" => (
                    "x-kubernetes-list-type",
                    items["x-kubernetes-list-type"].as_str().unwrap_or("atomic"),
                ),
                "object" => ("x-kubernetes-map-type", text(items, "x-kubernetes-map-type")),
                _ => ("", "atomic"),
            };
            if value != "atomic" {
                errors.invalid(format!("{path}.items.{word}"), value, detail);
            }
        }
        if !matches!(kind, "atomic" | "set" | "map") {
            let at = format!("{path}.x-kubernetes-list-type");
            errors.push(FieldError::not_supported(at, kind, &["atomic", "set", "map"]));
        }
        if matches!(kind, "set" | "map") && items["nullable"] == true {
            let detail = format!("cannot be nullable when x-kubernetes-list-type is {kind}");
            errors.forbidden(format!("{path}.items.nullable"), &detail);
        }
    }
    let keys = list(&schema["x-kubernetes-list-map-keys"]);
    if !keys.is_empty() && kind != Some("map") {
        let (at, detail) = (
            format!("{path}.x-kubernetes-list-type"),
            "must be map if x-kubernetes-list-map-keys is non-empty",
        );
        match kind {
            None => errors.required(at, detail),
            Some(kind) => errors.invalid(at, kind, detail),
        }
    }
    if kind == Some("map") {
        keyed(errors, path, schema);
    }
}

fn keyed(errors: &mut Errors, path: &str, schema: &Value) {
    let (items, keys) = (&schema["items"], &schema["x-kubernetes-list-map-keys"]);
    if list(keys).is_empty() {
        let detail = "must not be empty if x-kubernetes-list-type is map";
        errors.required(format!("{path}.x-kubernetes-list-map-keys"), detail);
    }
    if items.is_null() {
        let detail = "must have a schema if x-kubernetes-list-type is map";
        errors.required(format!("{path}.items"), detail);
        return;
    }
    if text(items, "type") != "object" {
        let detail = "must be object if parent array's x-kubernetes-list-type is map";
        errors.invalid(format!("{path}.items.type"), text(items, "type"), detail);
        return;
    }
    let at = format!("{path}.x-kubernetes-list-map-keys");
    for (i, key) in list(keys).iter().enumerate() {
        let key = key.as_str().unwrap_or_default();
        let place = format!("{path}.items.properties[{key}]");
        if list(keys)[..i].iter().any(|k| k == key) {
            errors.invalid(&*at, keys.clone(), "must not contain duplicate entries");
        }
        let Some(property) = items["properties"].get(key) else {
            errors.invalid(&*at, keys.clone(), "entries must all be names of item properties");
            continue;
        };
        if matches!(text(property, "type"), "array" | "object") {
            let detail = "must be a scalar type if parent array's x-kubernetes-list-type is map";
            errors.invalid(format!("{place}.type"), text(items, "type"), detail);
        }
        if property["default"].is_null() && !list(&items["required"]).iter().any(|r| r == key) {
            let detail =
                "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property";
            errors.required(format!("{place}.default"), detail);
        }
        if property["nullable"] == true {
            let detail = "this property is in x-kubernetes-list-map-keys, so it cannot be nullable";
            errors.forbidden(format!("{place}.nullable"), detail);
        }
    }
}

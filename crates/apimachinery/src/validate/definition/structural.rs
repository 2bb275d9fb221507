//! Whether a schema is structural: every field has a type outside of `allOf`, `anyOf`, `oneOf` and `not`, and those
//! say nothing but bounds on values.

use serde_json::{Value, json};

use super::super::{Errors, list, text};
use crate::field::FieldError;
use crate::structural::{DEPTH_MAX, Pattern};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Root,
    Item,
    Field,
}

/// Combinations, with whether they are lists.
const JUNCTORS: [&str; 3] = ["anyOf", "allOf", "oneOf"];

/// What keeps the schema from being structural, sorted as text.
pub(super) fn check(path: &str, schema: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    invariants(&mut errors, path, schema, Level::Root, 0);
    completeness(&mut errors, path, schema, path, schema, 0);
    let mut found = errors.0;
    found.sort_by_cached_key(ToString::to_string);
    found
}

/// The forms in which `x-kubernetes-int-or-string` may name its two types.
fn is_either(any_of: &Value) -> bool {
    *any_of == json!([{"type": "integer"}, {"type": "string"}])
}

fn invariants(errors: &mut Errors, path: &str, schema: &Value, level: Level, depth: usize) {
    if depth > DEPTH_MAX || !schema.is_object() {
        return;
    }
    let flag = |key: &str| schema[key] == true;
    let ty = text(schema, "type");
    if ty == "array" && schema["items"].is_null() {
        errors.required(format!("{path}.items"), "must be specified");
    }
    invariants(
        errors,
        &format!("{path}.items"),
        &schema["items"],
        Level::Item,
        depth + 1,
    );
    let properties = schema["properties"].as_object();
    for (name, property) in properties.into_iter().flatten() {
        let at = format!("{path}.properties[{name}]");
        invariants(errors, &at, property, Level::Field, depth + 1);
    }
    let additional = &schema["additionalProperties"];
    if !additional.is_null() {
        if level == Level::Root {
            errors.forbidden(format!("{path}.additionalProperties"), "must not be used at the root");
        }
        invariants(
            errors,
            &format!("{path}.additionalProperties"),
            additional,
            Level::Field,
            depth + 1,
        );
    }
    let (either, open, embedded) = (
        flag("x-kubernetes-int-or-string"),
        flag("x-kubernetes-preserve-unknown-fields"),
        flag("x-kubernetes-embedded-resource"),
    );
    for (set, key) in [(open, "preserve-unknown-fields"), (embedded, "embedded-resource")] {
        if either && set {
            let detail = "must be false if x-kubernetes-int-or-string is true";
            errors.invalid(format!("{path}.x-kubernetes-{key}"), true, detail);
        }
    }
    let skip_any = is_either(&schema["anyOf"]);
    let skip_first = is_either(&schema["allOf"][0]["anyOf"]);
    values(errors, path, schema, skip_any, skip_first, depth);

    let meta = level == Level::Root || embedded;
    if embedded && ty != "object" {
        let detail = "must be object if x-kubernetes-embedded-resource is true";
        match ty {
            "" => errors.required(format!("{path}.type"), detail),
            ty => errors.invalid(format!("{path}.type"), ty, detail),
        }
    } else if ty.is_empty() && !either && !open {
        let detail = match level {
            Level::Root => "must not be empty at the root",
            Level::Item => "must not be empty for specified array items",
            Level::Field => "must not be empty for specified object fields",
        };
        errors.required(format!("{path}.type"), detail);
    }
    if embedded && !additional.is_null() {
        let detail = "must not be used if x-kubernetes-embedded-resource is set";
        errors.forbidden(format!("{path}.additionalProperties"), detail);
    }
    if level == Level::Root && !ty.is_empty() && ty != "object" {
        errors.invalid(format!("{path}.type"), ty, "must be object at the root");
    }
    if meta {
        for name in ["kind", "apiVersion"] {
            let property = &schema["properties"][name];
            if property.is_object() && text(property, "type") != "string" {
                let at = format!("{path}.properties[{name}].type");
                errors.invalid(at, text(property, "type"), "must be string");
            }
        }
        metadata(errors, path, &schema["properties"]["metadata"], level);
    }
    if embedded && !open && properties.is_none_or(serde_json::Map::is_empty) {
        let detail =
            "must not be empty if x-kubernetes-embedded-resource is true without x-kubernetes-preserve-unknown-fields";
        errors.required(format!("{path}.properties"), detail);
    }
}

fn metadata(errors: &mut Errors, path: &str, schema: &Value, level: Level) {
    let Some(fields) = schema.as_object() else { return };
    let path = format!("{path}.properties[metadata]");
    if text(schema, "type") != "object" {
        errors.invalid(format!("{path}.type"), text(schema, "type"), "must be object");
    }
    if level != Level::Root {
        return;
    }
    let named = |p: &Value| {
        p.as_object()
            .is_some_and(|p| !p.is_empty() && p.keys().all(|k| k == "name" || k == "generateName"))
    };
    let harmless = fields.iter().all(|(key, value)| match key.as_str() {
        "type" | "default" => true,
        "properties" => named(value) || value.as_object().is_some_and(serde_json::Map::is_empty),
        _ => false,
    });
    if !harmless {
        let detail = "must not specify anything other than name and generateName, but metadata is implicitly specified";
        errors.forbidden(path, detail);
    }
}

fn values(errors: &mut Errors, path: &str, schema: &Value, skip_any: bool, skip_first: bool, depth: usize) {
    for key in JUNCTORS {
        if key == "anyOf" && skip_any {
            continue;
        }
        for (i, inner) in list(&schema[key]).iter().enumerate() {
            let skip = key == "allOf" && i == 0 && skip_first;
            nested(errors, &format!("{path}.{key}[{i}]"), inner, skip, depth + 1);
        }
    }
    nested(errors, &format!("{path}.not"), &schema["not"], false, depth + 1);
    let pattern = text(schema, "pattern");
    if !pattern.is_empty()
        && let Err(why) = Pattern::compile(pattern)
    {
        let detail = format!("must be a valid regular expression, but isn't: {why}");
        errors.invalid(format!("{path}.pattern"), pattern, &detail);
    }
}

fn nested(errors: &mut Errors, path: &str, schema: &Value, skip_any: bool, depth: usize) {
    if depth > DEPTH_MAX || !schema.is_object() {
        return;
    }
    values(errors, path, schema, skip_any, false, depth);
    nested(errors, &format!("{path}.items"), &schema["items"], false, depth + 1);
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        nested(
            errors,
            &format!("{path}.properties[{name}]"),
            property,
            false,
            depth + 1,
        );
    }
    let present = |key: &str| match &schema[key] {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => true,
    };
    for (key, must) in [
        ("type", "be empty"),
        ("additionalProperties", "be undefined"),
        ("default", "be undefined"),
        ("title", "be empty"),
        ("description", "be empty"),
        ("nullable", "be false"),
        ("x-kubernetes-preserve-unknown-fields", "be false"),
        ("x-kubernetes-embedded-resource", "be false"),
        ("x-kubernetes-int-or-string", "be false"),
        ("x-kubernetes-list-map-keys", "be empty"),
        ("x-kubernetes-list-type", "be undefined"),
        ("x-kubernetes-map-type", "be undefined"),
        ("x-kubernetes-validations", "be empty"),
    ] {
        let set = match key {
            "default" | "additionalProperties" => !schema[key].is_null(),
            _ => present(key),
        };
        if set {
            errors.forbidden(format!("{path}.{key}"), &format!("must {must} to be structural"));
        }
    }
    if schema["properties"].get("metadata").is_some() {
        let detail = "must not be specified in a nested context";
        errors.forbidden(format!("{path}.properties[metadata]"), detail);
    }
}

/// Every field that a combination mentions must be there outside of it. `at` is the place in the schema, `from` in the
/// combination.
fn completeness(errors: &mut Errors, at: &str, schema: &Value, from: &str, rules: &Value, depth: usize) {
    let combined = JUNCTORS.into_iter().flat_map(|key| {
        let inner = list(&rules[key]).iter().enumerate();
        inner.map(move |(i, inner)| (format!("{from}.{key}[{i}]"), inner))
    });
    let not = std::iter::once((format!("{from}.not"), &rules["not"]));
    for (from, inner) in combined.chain(not) {
        nested_completeness(errors, at, Some(schema), &from, inner, depth + 1);
    }
}

fn nested_completeness(errors: &mut Errors, at: &str, schema: Option<&Value>, from: &str, rules: &Value, depth: usize) {
    if depth > DEPTH_MAX || !rules.is_object() {
        return;
    }
    let Some(schema) = schema.filter(|s| s.is_object()) else {
        errors.required(at, &format!("because it is defined in {from}"));
        return;
    };
    completeness(errors, at, schema, from, rules, depth);
    let (items_at, items_from) = (format!("{at}.items"), format!("{from}.items"));
    nested_completeness(
        errors,
        &items_at,
        schema.get("items"),
        &items_from,
        &rules["items"],
        depth + 1,
    );
    for (name, property) in rules["properties"].as_object().into_iter().flatten() {
        let (at, from) = (format!("{at}.properties[{name}]"), format!("{from}.properties[{name}]"));
        nested_completeness(errors, &at, schema["properties"].get(name), &from, property, depth + 1);
    }
}

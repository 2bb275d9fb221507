//! CustomResourceDefinitions.
//!
//! Paths are upstream's: what all versions have in common stands at `spec.validation`, `spec.subresources`,
//! `spec.additionalPrinterColumns`, as it did when definitions had one version.
//!
//! Not built, and refused by name: rules in CEL (`x-kubernetes-validations`) and conversion by webhook.
//!
//! # Source
//! `k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation`, 0.36 (behaviour only).

mod schema;
mod structural;

use serde_json::Value;

use super::{Errors, list, names, text};
use crate::field::FieldError;
use crate::structural::Structural;

const COLUMN_TYPES: [&str; 5] = ["boolean", "date", "integer", "number", "string"];
const COLUMN_FORMATS: [&str; 8] = [
    "byte",
    "date",
    "date-time",
    "double",
    "float",
    "int32",
    "int64",
    "password",
];
/// Most selectable fields of one version.
const SELECTABLE_MAX: usize = 8;
/// The annotation by which groups of the Kubernetes community say that an API was reviewed.
const APPROVED: &str = "api-approved.kubernetes.io";

/// Whether the definition may be served: no condition says otherwise, and it was accepted once.
pub fn is_established(definition: &Value) -> bool {
    list(&definition["status"]["conditions"])
        .iter()
        .any(|c| c["type"] == "Established" && c["status"] == "True")
}

/// What the name of a definition must be, beyond a DNS subdomain.
pub(super) fn name(errors: &mut Errors, definition: &Value) {
    let name = text(&definition["metadata"], "name");
    let spec = &definition["spec"];
    if name != format!("{}.{}", text(&spec["names"], "plural"), text(spec, "group")) {
        errors.invalid("metadata.name", name, "must be spec.names.plural+\".\"+spec.group");
    }
}

pub(super) fn content(errors: &mut Errors, definition: &Value, old: Option<&Value>) {
    let spec = &definition["spec"];
    self::spec(errors, spec);
    if let Some(old) = old {
        let old_spec = &old["spec"];
        if is_established(old) {
            errors.immutable("spec.scope", &spec["scope"], &old_spec["scope"]);
            errors.immutable("spec.names.kind", &spec["names"]["kind"], &old_spec["names"]["kind"]);
        }
        errors.immutable("spec.group", &spec["group"], &old_spec["group"]);
        errors.immutable(
            "spec.names.plural",
            &spec["names"]["plural"],
            &old_spec["names"]["plural"],
        );
    }
    names_of(errors, "status.acceptedNames", &definition["status"]["acceptedNames"]);
    stored_versions(errors, definition);
    approval(errors, definition, old);
    if spec["preserveUnknownFields"] == true && old.is_none_or(|o| o["spec"]["preserveUnknownFields"] != true) {
        let detail =
            "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in spec.versions[*].schema instead";
        errors.invalid("spec.preserveUnknownFields", true, detail);
    }
}

/// Whether the group belongs to the Kubernetes community, and the definition's state of approval: `None` if it is fine,
/// else whether there is an annotation and what is wrong.
pub fn approval_problem(group: &str, annotation: Option<&str>) -> Option<(bool, String)> {
    let community = |domain: &str| group == domain || group.ends_with(&format!(".{domain}"));
    if !community("k8s.io") && !community("kubernetes.io") {
        return None;
    }
    let see = "see https://github.com/kubernetes/enhancements/pull/1111";
    match annotation.filter(|a| !a.is_empty()) {
        None => Some((
            false,
            format!("protected groups must have approval annotation {APPROVED:?}, {see}"),
        )),
        Some(reason) if reason.starts_with("unapproved") => None,
        Some(url)
            if url
                .split_once("://")
                .is_some_and(|(s, rest)| !s.is_empty() && rest.contains('/')) =>
        {
            None
        }
        Some(_) => Some((
            true,
            format!(
                "protected groups must have approval annotation {APPROVED:?} with either a URL or a reason starting with \"unapproved\", {see}"
            ),
        )),
    }
}

fn approval(errors: &mut Errors, definition: &Value, old: Option<&Value>) {
    fn annotation(d: &Value) -> Option<&str> {
        d["metadata"]["annotations"][APPROVED].as_str()
    }
    let group = text(&definition["spec"], "group");
    let state = |d: &Value| approval_problem(group, annotation(d)).map(|(given, _)| given);
    if old.is_some_and(|old| state(old) == state(definition)) {
        return;
    }
    let path = format!("metadata.annotations[{APPROVED}]");
    match approval_problem(group, annotation(definition)) {
        Some((true, why)) => errors.invalid(path, annotation(definition).unwrap_or_default(), &why),
        Some((false, why)) => errors.required(path, &why),
        None => {}
    }
}

fn stored_versions(errors: &mut Errors, definition: &Value) {
    let path = "status.storedVersions";
    let stored = &definition["status"]["storedVersions"];
    if list(stored).is_empty() {
        errors.invalid(path, Value::Null, "must have at least one stored version");
        return;
    }
    let versions = list(&definition["spec"]["versions"]);
    for version in versions.iter().filter(|v| v["storage"] == true) {
        if !list(stored).contains(&version["name"]) {
            let detail = format!("must have the storage version {}", text(version, "name"));
            errors.invalid(path, stored.clone(), &detail);
        }
    }
    for (i, name) in list(stored).iter().enumerate() {
        if !versions.iter().any(|v| v["name"] == *name) {
            let n = name.as_str().unwrap_or_default();
            let detail = format!(
                "missing from spec.versions; {n} was previously a storage version, and must remain in spec.versions until a storage migration ensures no data remains persisted in {n} and removes {n} from status.storedVersions"
            );
            errors.invalid(format!("{path}[{i}]"), n, &detail);
        }
    }
}

fn spec(errors: &mut Errors, spec: &Value) {
    let group = text(spec, "group");
    if group.is_empty() {
        errors.required("spec.group", "");
    } else if let [_, ..] = names::dns_subdomain(group)[..] {
        errors.invalid("spec.group", group, &names::dns_subdomain(group).join(","));
    } else if !group.contains('.') {
        errors.invalid("spec.group", group, "should be a domain with at least one dot");
    }
    errors.one_of("spec.scope", &spec["scope"], &["Cluster", "Namespaced"]);

    let versions = list(&spec["versions"]);
    // What all versions share is one thing in upstream's model, at the top.
    let common = |key: &str| {
        let first = versions.first().and_then(|v| v.get(key));
        first.is_some_and(|f| !f.is_null() && versions.iter().all(|v| v.get(key) == Some(f)))
    };
    let place = |key: &str, top: &str, i: usize| match common(key) {
        true if i == 0 => Some(format!("spec.{top}")),
        true => None,
        false => Some(format!("spec.versions[{i}].{key}")),
    };
    for (i, version) in versions.iter().enumerate() {
        let at = format!("spec.versions[{i}]");
        if version["schema"]["openAPIV3Schema"].is_null() {
            errors.required(format!("{at}.schema.openAPIV3Schema"), "");
        }
        let name = text(version, "name");
        let wrong = names::dns_1035_label(name);
        if !wrong.is_empty() {
            errors.invalid(format!("{at}.name"), name, &wrong.join(","));
            if i == 0 {
                // The first version stands at the top in upstream's model too.
                errors.invalid("spec.version", name, &wrong.join(","));
            }
        }
        deprecation(errors, &at, version);
        if let Some(path) = place("schema", "validation", i) {
            let status = version["subresources"]["status"].is_object();
            schema::schema(
                errors,
                &format!("{path}.openAPIV3Schema"),
                &version["schema"]["openAPIV3Schema"],
                status,
            );
        }
        if let Some(path) = place("subresources", "subresources", i) {
            subresources(errors, &path, &version["subresources"]);
        }
        if let Some(path) = place("additionalPrinterColumns", "additionalPrinterColumns", i) {
            for (j, column) in list(&version["additionalPrinterColumns"]).iter().enumerate() {
                self::column(errors, &format!("{path}[{j}]"), column);
            }
        }
        if let Some(path) = place("selectableFields", "selectableFields", i) {
            selectable(errors, &path, version);
        }
    }
    let mut seen: Vec<&str> = versions.iter().map(|v| text(v, "name")).collect();
    seen.sort_unstable();
    if seen.windows(2).any(|pair| pair[0] == pair[1]) {
        errors.invalid(
            "spec.versions",
            spec["versions"].clone(),
            "must contain unique version names",
        );
    }
    if versions.iter().filter(|v| v["storage"] == true).count() != 1 {
        let detail = "must have exactly one version marked as storage version";
        errors.invalid("spec.versions", spec["versions"].clone(), detail);
    }
    for field in ["plural", "singular", "kind", "listKind"] {
        if text(&spec["names"], field).is_empty() {
            errors.required(format!("spec.names.{field}"), "");
        }
    }
    names_of(errors, "spec.names", &spec["names"]);
    conversion(errors, &spec["conversion"]);
}

fn conversion(errors: &mut Errors, conversion: &Value) {
    let path = "spec.conversion";
    match text(conversion, "strategy") {
        "None" => {
            if conversion["webhook"].is_object() {
                let detail = "should not be set when strategy is not set to Webhook";
                errors.forbidden(format!("{path}.webhookClientConfig"), detail);
            }
        }
        "Webhook" => errors.forbidden(
            format!("{path}.strategy"),
            "conversion by webhook is not supported by this server: only None is",
        ),
        "" => errors.required(format!("{path}.strategy"), ""),
        other => errors.push(FieldError::not_supported(
            format!("{path}.strategy"),
            other,
            &["None", "Webhook"],
        )),
    }
}

fn deprecation(errors: &mut Errors, path: &str, version: &Value) {
    let Some(warning) = version["deprecationWarning"].as_str() else {
        return;
    };
    let path = format!("{path}.deprecationWarning");
    if version["deprecated"] != true {
        errors.invalid(path, warning, "can only be set for deprecated versions");
        return;
    }
    if warning.len() > 256 {
        errors.invalid(&*path, warning, "must be <= 256 characters long");
    }
    if warning.is_empty() {
        errors.invalid(&*path, warning, "must not be an empty string");
    }
    if let Some((i, _)) = warning.char_indices().find(|(_, c)| c.is_control()) {
        let detail =
            format!("must only contain printable UTF-8 characters; non-printable character found at index {i}");
        errors.invalid(&*path, warning, &detail);
    }
}

fn names_of(errors: &mut Errors, path: &str, names: &Value) {
    let label = |errors: &mut Errors, at: String, name: &str, mixed: bool| {
        let lower = name.to_lowercase();
        let wrong = names::dns_1035_label(if mixed { &lower } else { name });
        if name.is_empty() || wrong.is_empty() {
            return;
        }
        let wrong = wrong.join(",");
        let detail = match mixed {
            true => format!("may have mixed case, but should otherwise match: {wrong}"),
            false => wrong,
        };
        errors.invalid(at, name, &detail);
    };
    for (field, mixed) in [
        ("plural", false),
        ("singular", false),
        ("kind", true),
        ("listKind", true),
    ] {
        label(errors, format!("{path}.{field}"), text(names, field), mixed);
    }
    let each = |errors: &mut Errors, field: &str| {
        for (i, name) in list(&names[field]).iter().enumerate() {
            let name = name.as_str().unwrap_or_default();
            let wrong = names::dns_1035_label(name);
            if !wrong.is_empty() {
                errors.invalid(format!("{path}.{field}[{i}]"), name, &wrong.join(","));
            }
        }
    };
    each(errors, "shortNames");
    let kind = text(names, "kind");
    if !kind.is_empty() && kind == text(names, "listKind") {
        errors.invalid(
            format!("{path}.listKind"),
            kind,
            "kind and listKind may not be the same",
        );
    }
    each(errors, "categories");
}

fn column(errors: &mut Errors, path: &str, column: &Value) {
    if text(column, "name").is_empty() {
        errors.required(format!("{path}.name"), "");
    }
    let types = format!("must be one of {}", COLUMN_TYPES.join(","));
    match text(column, "type") {
        "" => errors.required(format!("{path}.type"), &types),
        ty if !COLUMN_TYPES.contains(&ty) => errors.invalid(format!("{path}.type"), ty, &types),
        _ => {}
    }
    let format = text(column, "format");
    if !format.is_empty() && !COLUMN_FORMATS.contains(&format) {
        let detail = format!("must be one of {}", COLUMN_FORMATS.join(","));
        errors.invalid(format!("{path}.format"), format, &detail);
    }
    match text(column, "jsonPath") {
        "" => errors.required(format!("{path}.JSONPath"), ""),
        json_path => {
            simple_path(errors, &format!("{path}.JSONPath"), json_path);
        }
    }
}

fn simple_path(errors: &mut Errors, path: &str, json_path: &str) -> bool {
    let simple = json_path.starts_with('.');
    if !simple {
        errors.invalid(path, json_path, "must be a simple json path starting with .");
    }
    simple
}

fn subresources(errors: &mut Errors, path: &str, subresources: &Value) {
    let scale = &subresources["scale"];
    if !scale.is_object() {
        return;
    }
    let path = format!("{path}.scale");
    for (field, root) in [("specReplicasPath", ".spec"), ("statusReplicasPath", ".status")] {
        let at = format!("{path}.{field}");
        match text(scale, field) {
            "" => errors.required(at, ""),
            given => {
                if simple_path(errors, &at, given) && !given.starts_with(&format!("{root}.")) {
                    errors.invalid(at, given, &format!("should be a json path under {root}"));
                }
            }
        }
    }
    let selector = text(scale, "labelSelectorPath");
    let at = format!("{path}.labelSelectorPath");
    if !selector.is_empty()
        && simple_path(errors, &at, selector)
        && !selector.starts_with(".spec.")
        && !selector.starts_with(".status.")
    {
        errors.invalid(at, selector, "should be a json path under either .spec or .status");
    }
}

/// `spec.color` of `.spec.color`, for paths of plain names only.
pub fn selectable_path(json_path: &str) -> Option<String> {
    let rest = json_path.strip_prefix('.')?;
    let plain = |part: &str| {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        !part.is_empty() && part.chars().all(word)
    };
    rest.split('.').all(plain).then(|| rest.to_owned())
}

fn selectable(errors: &mut Errors, path: &str, version: &Value) {
    let mut seen = Vec::new();
    for (i, field) in list(&version["selectableFields"]).iter().enumerate() {
        let at = format!("{path}[{i}].jsonPath");
        let given = text(field, "jsonPath");
        if given.is_empty() {
            errors.required(at, "");
            continue;
        }
        let found = selectable_path(given).and_then(|plain| {
            let schema = &version["schema"]["openAPIV3Schema"];
            let schema = plain.split('.').try_fold(schema, |at, key| at["properties"].get(key))?;
            Some((plain, schema))
        });
        let Some((plain, schema)) = found else {
            errors.invalid(at, given, "is an invalid path: does not refer to a valid field");
            continue;
        };
        if plain.split('.').next() == Some("metadata") {
            errors.invalid(&*at, given, "must not point to fields in metadata");
        }
        if !matches!(text(schema, "type"), "string" | "boolean" | "integer") {
            let detail = "must point to a field of type string, boolean or integer. Enum string fields and strings with formats are allowed.";
            errors.invalid(&*at, given, detail);
        }
        if seen.contains(&plain) {
            errors.push(FieldError::duplicate(at, given));
        } else {
            seen.push(plain);
        }
    }
    if seen.len() > SELECTABLE_MAX {
        errors.push(FieldError::too_many(path, seen.len(), SELECTABLE_MAX));
    }
}

/// Whether a schema is structural, for the condition of definitions that were stored before that was demanded: the
/// errors, in upstream's order.
pub fn structural_errors(path: &str, schema: &Value) -> Vec<FieldError> {
    structural::check(path, schema)
}

fn compiled(errors: &mut Errors, path: &str, schema: &Value) -> Option<Structural> {
    match Structural::compile(schema) {
        Ok(compiled) => Some(compiled),
        Err(error) => {
            errors.invalid(path, "", &error.to_string());
            None
        }
    }
}

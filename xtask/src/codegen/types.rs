//! The type table's data: schemas, proto numbers, JSON presence rules, resources and verbs, joined into one file.
//!
//! Facts only: every description and comment of the sources is dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::gostruct::{self, GoField, Structs};
use super::proto::{self, Messages};
use super::sources::{API_VERSION, KUBERNETES_VERSION, module, repository, write_gz};

/// API groups whose types are included (stable versions only), with the Go package and swagger prefix of each.
const GROUPS: [(&str, &str); 15] = [
    ("", "core"),
    ("apps", "apps"),
    ("authentication.k8s.io", "authentication"),
    ("authorization.k8s.io", "authorization"),
    ("autoscaling", "autoscaling"),
    ("batch", "batch"),
    ("certificates.k8s.io", "certificates"),
    ("coordination.k8s.io", "coordination"),
    ("discovery.k8s.io", "discovery"),
    ("events.k8s.io", "events"),
    ("networking.k8s.io", "networking"),
    ("policy", "policy"),
    ("rbac.authorization.k8s.io", "rbac"),
    ("scheduling.k8s.io", "scheduling"),
    ("storage.k8s.io", "storage"),
];

/// The group of CustomResourceDefinition, which lives in a module of its own: group, module, package and definition prefix.
const EXTENSIONS: &str = "apiextensions.k8s.io";
const EXTENSIONS_MODULE: &str = "k8s.io/apiextensions-apiserver";
const EXTENSIONS_PACKAGE: &str = "apiextensions/v1";
const EXTENSIONS_PREFIX: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.";

fn is_known_group(name: &str) -> bool {
    name == EXTENSIONS || GROUPS.iter().any(|(g, _)| *g == name)
}

/// Machinery types that clients send or ask for although the published schemas omit them.
const MACHINERY: [&str; 14] = [
    "APIGroup",
    "APIGroupList",
    "APIResourceList",
    "APIVersions",
    "CreateOptions",
    "DeleteOptions",
    "GetOptions",
    "List",
    "ListOptions",
    "PartialObjectMetadata",
    "PartialObjectMetadataList",
    "PatchOptions",
    "Status",
    "UpdateOptions",
];

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";

/// Definitions that are values on the JSON wire, with the table's word for each.
fn leaf(definition: &str) -> Option<&'static str> {
    Some(match definition {
        "io.k8s.apimachinery.pkg.util.intstr.IntOrString" => "intstr",
        "io.k8s.apimachinery.pkg.api.resource.Quantity" => "quantity",
        "io.k8s.apimachinery.pkg.apis.meta.v1.Time" => "time",
        "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime" => "microtime",
        "io.k8s.apimachinery.pkg.apis.meta.v1.Duration" => "duration",
        "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1" => "fields",
        "io.k8s.apimachinery.pkg.runtime.RawExtension" => "raw",
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON" => "json",
        _ => return None,
    })
}

/// Definitions that are a schema or something simpler in its place, with the table's word for each.
fn schema_or(definition: &str) -> Option<&'static str> {
    Some(match definition.strip_prefix(EXTENSIONS_PREFIX)? {
        "JSONSchemaPropsOrArray" => "schema-or-array",
        "JSONSchemaPropsOrBool" => "schema-or-bool",
        "JSONSchemaPropsOrStringArray" => "schema-or-strings",
        _ => return None,
    })
}

struct Facts {
    definitions: Map<String, Value>,
    v3: Map<String, Value>,
    messages: Messages,
    /// Go package path (`core/v1`, `meta/v1`) to its structs.
    structs: BTreeMap<String, Structs>,
    discovery: Value,
}

/// Writes `crates/apimachinery/data/types.json.gz` and the golden triples beside it.
pub fn generate() -> Result<()> {
    let api = module("k8s.io/api", API_VERSION)?;
    let machinery = module("k8s.io/apimachinery", API_VERSION)?;
    let kubernetes = module("k8s.io/kubernetes", KUBERNETES_VERSION)?;
    let extensions = module(EXTENSIONS_MODULE, API_VERSION)?;
    let facts = read(&api, &machinery, &kubernetes, &extensions)?;

    let mut queue: Vec<String> = facts
        .definitions
        .keys()
        .filter(|d| {
            GROUPS
                .iter()
                .any(|(_, p)| d.starts_with(&format!("io.k8s.api.{p}.v1.")))
        })
        .cloned()
        .collect();
    queue.extend(MACHINERY.iter().map(|k| format!("{META}{k}")));
    let kinds = ["CustomResourceDefinition", "CustomResourceDefinitionList"];
    queue.extend(kinds.iter().map(|k| format!("{EXTENSIONS_PREFIX}{k}")));
    let mut done: BTreeMap<String, Value> = BTreeMap::new();
    while let Some(name) = queue.pop() {
        if done.contains_key(&name) || leaf(&name).is_some() {
            continue;
        }
        let (ty, refs) = facts.describe(&name).with_context(|| format!("describe {name}"))?;
        queue.extend(refs);
        done.insert(name, ty);
    }
    let types: Vec<Value> = done.into_values().collect();
    let kinds: Vec<String> = types
        .iter()
        .filter_map(|t| {
            let part = |i: usize| t["gvk"][i].as_str().filter(|p| !p.is_empty());
            Some(format!("{}.{}.{}", part(0).unwrap_or("core"), part(1)?, part(2)?))
        })
        .collect();
    let resources = facts.resources()?;
    println!("{} types, {} resources", types.len(), resources.len());
    let data = json!({ "version": KUBERNETES_VERSION, "types": types, "resources": resources });
    let dir = repository().join("crates/apimachinery/data");
    write_gz(&dir.join("types.json.gz"), serde_json::to_string(&data)?.as_bytes())?;
    super::golden::generate(&api, &dir, &kinds)
}

fn read(api: &Path, machinery: &Path, kubernetes: &Path, extensions: &Path) -> Result<Facts> {
    let json = |path: &str| -> Result<Value> {
        let path = kubernetes.join(path);
        serde_json::from_slice(&std::fs::read(&path)?).with_context(|| format!("parse {}", path.display()))
    };
    let object = |v: &Value| v.as_object().cloned().unwrap_or_default();
    let definitions = object(&json("api/openapi-spec/swagger.json")?["definitions"]);
    let mut v3 = Map::new();
    for group in GROUPS.iter().map(|(g, _)| *g).chain([EXTENSIONS]) {
        let file = if group.is_empty() {
            "api__v1".into()
        } else {
            format!("apis__{group}__v1")
        };
        let doc = json(&format!("api/openapi-spec/v3/{file}_openapi.json"))?;
        v3.extend(object(&doc["components"]["schemas"]));
    }
    let mut messages = Messages::new();
    let mut structs = BTreeMap::new();
    for (_, package) in GROUPS {
        proto::read(&api.join(format!("{package}/v1/generated.proto")), &mut messages)?;
        gostruct::read(
            &api.join(format!("{package}/v1")),
            structs.entry(format!("{package}/v1")).or_default(),
        )?;
    }
    let package = extensions.join("pkg/apis/apiextensions/v1");
    proto::read(&package.join("generated.proto"), &mut messages)?;
    gostruct::read(&package, structs.entry(EXTENSIONS_PACKAGE.into()).or_default())?;
    proto::read(&machinery.join("pkg/apis/meta/v1/generated.proto"), &mut messages)?;
    gostruct::read(
        &machinery.join("pkg/apis/meta/v1"),
        structs.entry("meta/v1".into()).or_default(),
    )?;
    Ok(Facts {
        definitions,
        v3,
        messages,
        structs,
        discovery: json("api/discovery/aggregated_v2.json")?,
    })
}

impl Facts {
    /// One type's entry and the definitions it refers to.
    fn describe(&self, definition: &str) -> Result<(Value, Vec<String>)> {
        // Go's proto packages have no hyphens.
        let message = format!(
            "k8s.io.{}",
            definition
                .strip_prefix("io.k8s.")
                .context("foreign definition")?
                .replace('-', "_")
        );
        let parts: Vec<&str> = definition.rsplitn(4, '.').collect();
        let (kind, package) = (parts[0], format!("{}/{}", parts[2], parts[1]));
        let structs = self
            .structs
            .get(&package)
            .with_context(|| format!("no Go package {package}"))?;
        let go = structs.get(kind).with_context(|| format!("no Go struct {kind}"))?;
        let mut out = Map::new();
        out.insert("n".into(), json!(definition));
        let schema = self.definitions.get(definition);
        let mut refs = Vec::new();

        let mut inlines = Vec::new();
        let mut fields = Vec::new();
        // JSON fields in Go's order: own, and those of embedded structs.
        let mut all: Vec<(GoField, Option<usize>, String)> = Vec::new();
        for f in go {
            if !f.inline {
                all.push((f.clone(), None, message.clone()));
                continue;
            }
            if f.ty == "TypeMeta" || f.ty == "metav1.TypeMeta" {
                let extra = ["kind", "apiVersion"].map(|json| GoField {
                    json: json.into(),
                    number: None,
                    pointer: false,
                    omitempty: true,
                    inline: false,
                    ty: "string".into(),
                });
                all.extend(extra.into_iter().map(|g| (g, None, message.clone())));
                continue;
            }
            let inner_message = message
                .rsplit_once('.')
                .map(|(p, _)| format!("{p}.{}", f.ty))
                .unwrap_or_default();
            let embedded = structs.get(&f.ty).with_context(|| format!("embedded {}", f.ty))?;
            let number = f
                .number
                .with_context(|| format!("embedded {} has no field number", f.ty))?;
            inlines.push(json!(number));
            let index = inlines.len() - 1;
            for g in embedded {
                ensure!(!g.inline, "embedded struct within embedded struct {}", f.ty);
                all.push((g.clone(), Some(index), inner_message.clone()));
            }
        }
        let required: BTreeSet<&str> = schema
            .and_then(|s| s["required"].as_array())
            .map(|a| a.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        let mut seen = BTreeSet::new();
        for (g, inline, owner) in &all {
            if !seen.insert(g.json.clone()) {
                continue;
            }
            let entry = self
                .field(g, *inline, owner, schema, definition, &required, &mut refs)
                .with_context(|| format!("field {}", g.json))?;
            fields.push(entry);
        }
        if let Some(props) = schema.and_then(|s| s["properties"].as_object()) {
            for name in props.keys() {
                ensure!(seen.contains(name), "schema field {name} has no Go field");
            }
        }
        if !inlines.is_empty() {
            out.insert("i".into(), Value::Array(inlines));
        }
        if let Some(gvks) = schema.and_then(|s| s["x-kubernetes-group-version-kind"].as_array()) {
            if gvks.len() == 1 {
                let g = &gvks[0];
                out.insert("gvk".into(), json!([g["group"], g["version"], g["kind"]]));
            }
        }
        if let Some(mt) = schema.and_then(|s| s.get("x-kubernetes-map-type")) {
            out.insert("mt".into(), mt.clone());
        }
        out.insert("f".into(), Value::Array(fields));
        Ok((Value::Object(out), refs))
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one call site, and a struct would only rename the arguments"
    )]
    fn field(
        &self,
        g: &GoField,
        inline: Option<usize>,
        owner: &str,
        schema: Option<&Value>,
        definition: &str,
        required: &BTreeSet<&str>,
        refs: &mut Vec<String>,
    ) -> Result<Value> {
        let message = self
            .messages
            .get(owner)
            .with_context(|| format!("no message {owner}"))?;
        let wire = g.number.and_then(|n| message.iter().find(|f| f.number == n));
        let property = schema.map(|s| &s["properties"][&g.json]).filter(|p| !p.is_null());
        let mut ty = match (property, wire) {
            (Some(p), _) => schema_type(p, refs)?,
            (None, Some(w)) => wire_type(w, refs)?,
            (None, None) if matches!(g.json.as_str(), "kind" | "apiVersion") => "string".into(),
            (None, None) => bail!("neither schema nor wire type"),
        };
        if let Some(w) = wire {
            let mut wire_refs = Vec::new();
            let on_wire = wire_type(w, &mut wire_refs)?;
            if on_wire != ty {
                match (ty.as_str(), on_wire.as_str()) {
                    // A named list of strings is a message of its own on the protobuf wire.
                    (t, x) if (x.ends_with(".ExtraValue") || x.ends_with(".Verbs")) && t.ends_with("[]string") => {
                        ty = format!("{}strings", t.trim_end_matches("[]string"));
                    }
                    ("bytes", "string") | ("string", "bytes") => {}
                    (t, x) => bail!("schema says {t}, protobuf says {x}"),
                }
            }
        }
        let mut out = Map::new();
        out.insert("n".into(), json!(g.json));
        out.insert("t".into(), json!(ty));
        let mut flags = String::new();
        if required.contains(g.json.as_str()) {
            flags.push('r');
        }
        if g.pointer {
            flags.push('p');
        }
        if g.omitempty {
            flags.push('o');
        }
        if !flags.is_empty() {
            out.insert("x".into(), json!(flags));
        }
        if let Some(number) = g.number {
            out.insert("p".into(), json!(number));
        }
        if let Some(i) = inline {
            out.insert("w".into(), json!(i));
        }
        if let Some(p) = property {
            for (from, to) in [
                ("x-kubernetes-list-type", "lt"),
                ("x-kubernetes-list-map-keys", "lk"),
                ("x-kubernetes-patch-merge-key", "mk"),
                ("x-kubernetes-patch-strategy", "ps"),
                ("x-kubernetes-map-type", "mt"),
            ] {
                if let Some(v) = p.get(from) {
                    out.insert(to.into(), v.clone());
                }
            }
        }
        let default = &self.v3.get(definition).unwrap_or(&Value::Null)["properties"][&g.json]["default"];
        let empty = matches!(default, Value::Null)
            || *default == json!("")
            || *default == json!(0)
            || *default == json!(false)
            || *default == json!({});
        if !empty {
            out.insert("d".into(), default.clone());
        }
        Ok(Value::Object(out))
    }

    fn resources(&self) -> Result<Vec<Value>> {
        let mut out = Vec::new();
        let legacy =
            json!({ "metadata": { "name": "" }, "versions": [{ "version": "v1", "resources": legacy_resources()? }] });
        let groups = self.discovery["items"].as_array().context("discovery items")?;
        for group in std::iter::once(&legacy).chain(groups) {
            let name = group["metadata"]["name"].as_str().unwrap_or_default();
            if !is_known_group(name) {
                continue;
            }
            for version in group["versions"].as_array().context("versions")? {
                if version["version"] != "v1" {
                    continue;
                }
                for r in version["resources"].as_array().context("resources")? {
                    let plural = r["resource"].as_str().context("resource")?;
                    let kind = |k: &Value| {
                        let or = |v: &Value, d: &str| v.as_str().filter(|s| !s.is_empty()).unwrap_or(d).to_owned();
                        json!([or(&k["group"], name), or(&k["version"], "v1"), k["kind"]])
                    };
                    let mut subs = Vec::new();
                    for s in r["subresources"].as_array().unwrap_or(&Vec::new()) {
                        let sub = s["subresource"].as_str().context("subresource")?;
                        let mut kind = kind(&s["responseKind"]);
                        // Discovery leaves the group of machinery kinds open; these two live elsewhere.
                        if let Some(k) = kind[2].as_str().map(str::to_owned) {
                            match k.as_str() {
                                "Scale" => kind = json!(["autoscaling", "v1", k]),
                                "Eviction" => kind = json!(["policy", "v1", k]),
                                "TokenRequest" => kind = json!(["authentication.k8s.io", "v1", k]),
                                _ => {}
                            }
                        }
                        subs.push(json!({ "n": sub, "k": kind, "v": s["verbs"] }));
                    }
                    out.push(json!({
                        "g": name, "v": "v1", "r": plural, "s": r["singularResource"], "k": kind(&r["responseKind"]),
                        "ns": r["scope"] == "Namespaced", "verbs": r["verbs"], "sn": r["shortNames"],
                        "cat": r["categories"], "subs": subs,
                    }));
                }
            }
        }
        Ok(out)
    }
}

/// The core group's resources, which the published aggregated document of `/apis` does not hold.
fn legacy_resources() -> Result<Vec<Value>> {
    let dir = module("k8s.io/kubernetes", KUBERNETES_VERSION)?;
    let list: Value = serde_json::from_slice(&std::fs::read(dir.join("api/discovery/api__v1.json"))?)?;
    let mut out: Vec<Value> = Vec::new();
    for r in list["resources"].as_array().context("resources")? {
        let name = r["name"].as_str().context("name")?;
        let kind = json!({ "group": r["group"], "version": r["version"], "kind": r["kind"] });
        match name.split_once('/') {
            None => out.push(json!({
                "resource": name, "singularResource": r["singularName"], "responseKind": kind,
                "scope": if r["namespaced"] == true { "Namespaced" } else { "Cluster" },
                "verbs": r["verbs"], "shortNames": r["shortNames"], "categories": r["categories"], "subresources": [],
            })),
            Some((parent, sub)) => {
                if sub.contains('/') {
                    continue;
                }
                let parent = out
                    .iter_mut()
                    .find(|o| o["resource"] == parent)
                    .context("parent first")?;
                let subs = parent["subresources"].as_array_mut().context("array")?;
                subs.push(json!({ "subresource": sub, "responseKind": kind, "verbs": r["verbs"] }));
            }
        }
    }
    Ok(out)
}

fn schema_type(p: &Value, refs: &mut Vec<String>) -> Result<String> {
    if let Some(r) = p["$ref"].as_str() {
        let name = r.strip_prefix("#/definitions/").context("ref")?;
        if let Some(leaf) = leaf(name) {
            return Ok(leaf.into());
        }
        if let Some(word) = schema_or(name) {
            return Ok(word.into());
        }
        refs.push(name.to_owned());
        return Ok(format!("#{name}"));
    }
    Ok(match (p["type"].as_str(), p["format"].as_str()) {
        (Some("string"), Some("byte")) => "bytes".into(),
        (Some("string"), _) => "string".into(),
        (Some("boolean"), _) => "bool".into(),
        (Some("integer"), Some("int32")) => "int32".into(),
        (Some("integer"), _) => "int64".into(),
        (Some("number"), _) => "double".into(),
        (Some("array"), _) => format!("[]{}", schema_type(&p["items"], refs)?),
        (Some("object"), _) if p["additionalProperties"].is_object() => {
            format!("{{}}{}", schema_type(&p["additionalProperties"], refs)?)
        }
        other => bail!("schema of unknown form {other:?}"),
    })
}

fn wire_type(w: &proto::ProtoField, refs: &mut Vec<String>) -> Result<String> {
    let one = match w.ty.as_str() {
        "float" => "double".into(),
        s if !s.contains('.') => s.to_owned(),
        message => {
            let definition = format!("io.k8s.{}", message.strip_prefix("k8s.io.").context("foreign message")?);
            let definition = definition.replace("apiextensions_apiserver", "apiextensions-apiserver");
            match leaf(&definition).or_else(|| schema_or(&definition)) {
                Some(word) => word.into(),
                None => {
                    refs.push(definition.clone());
                    format!("#{definition}")
                }
            }
        }
    };
    Ok(match (w.repeated, w.map) {
        (true, _) => format!("[]{one}"),
        (_, true) => format!("{{}}{one}"),
        _ => one,
    })
}

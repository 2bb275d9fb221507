//! One definition, as far as the server has to remember it.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::meta;
use apimachinery::structural::Structural;
use apimachinery::table::{KindDef, KindMore, PrinterColumn, ScalePaths, TypeTable};
use apimachinery::validate;
use serde_json::Value;
use tokio::sync::RwLock;

use super::CLEANUP;
use crate::registry::Resource;
use crate::served::{Custom, Served, VersionSchema};

/// The names of a kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    pub plural: String,
    pub singular: String,
    pub kind: String,
    pub list_kind: String,
    pub short: Vec<String>,
    pub categories: Vec<String>,
}

impl Names {
    pub fn read(names: &Value) -> Names {
        let text = |key: &str| names[key].as_str().unwrap_or_default().to_owned();
        let list = |key: &str| {
            let words = names[key].as_array().into_iter().flatten();
            words.filter_map(|w| w.as_str().map(str::to_owned)).collect()
        };
        Names {
            plural: text("plural"),
            singular: text("singular"),
            kind: text("kind"),
            list_kind: text("listKind"),
            short: list("shortNames"),
            categories: list("categories"),
        }
    }

    pub fn to_value(&self) -> Value {
        let mut out = serde_json::Map::new();
        for (key, text) in [
            ("plural", &self.plural),
            ("singular", &self.singular),
            ("kind", &self.kind),
            ("listKind", &self.list_kind),
        ] {
            if !text.is_empty() || matches!(key, "plural" | "kind") {
                out.insert(key.into(), text.clone().into());
            }
        }
        for (key, words) in [("shortNames", &self.short), ("categories", &self.categories)] {
            if !words.is_empty() {
                out.insert(key.into(), words.clone().into());
            }
        }
        Value::Object(out)
    }
}

/// One version, compiled once per generation of its definition.
pub struct Version {
    pub kind: KindDef,
    pub served: bool,
    /// The built-in types and this kind's, in full: what server-side apply walks.
    pub table: Arc<TypeTable>,
}

/// See the module's documentation.
pub struct Known {
    pub rv: u64,
    pub uid: String,
    pub generation: i64,
    pub group: String,
    /// The names asked for.
    pub names: Names,
    /// The names granted.
    pub accepted: Names,
    pub established: bool,
    pub deleting: bool,
    /// Whether its instances are still to be deleted with it.
    pub cleanup: bool,
    pub approval: Option<String>,
    pub versions: Arc<Vec<Version>>,
    pub schemas: Arc<BTreeMap<String, VersionSchema>>,
    pub storage: String,
    /// Held open by creations of instances.
    pub gate: Arc<RwLock<bool>>,
    /// What is served now, by version.
    pub serving: parking_lot::Mutex<BTreeMap<String, Arc<Served>>>,
}

impl Known {
    /// Reads a definition. What `before` compiled stays if nothing that matters changed.
    pub fn read(value: &Value, rv: u64, before: Option<Known>, builtin: &Arc<TypeTable>) -> Known {
        let spec = &value["spec"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let before = before.filter(|b| b.uid == meta::uid(value));
        let generation = meta::generation(value);
        let accepted = Names::read(&value["status"]["acceptedNames"]);
        let deleting = meta::deletion_timestamp(value).is_some();
        let same = before
            .as_ref()
            .filter(|b| b.generation == generation && b.accepted == accepted && b.deleting == deleting);
        let (versions, schemas) = match same {
            Some(b) => (b.versions.clone(), b.schemas.clone()),
            None => compile(value, &accepted, before.as_ref(), builtin),
        };
        let list = spec["versions"].as_array();
        let storage = list.into_iter().flatten().find(|v| v["storage"] == true);
        let group = text(&spec["group"]);
        Known {
            rv,
            uid: meta::uid(value).to_owned(),
            generation,
            storage: format!("{group}/{}", storage.map(|s| text(&s["name"])).unwrap_or_default()),
            names: Names::read(&spec["names"]),
            established: validate::is_established(value),
            deleting,
            cleanup: meta::finalizers(value).any(|f| f == CLEANUP),
            approval: value["metadata"]["annotations"]["api-approved.kubernetes.io"]
                .as_str()
                .map(str::to_owned),
            serving: match same {
                Some(b) if b.established == validate::is_established(value) => {
                    parking_lot::Mutex::new(b.serving.lock().clone())
                }
                _ => parking_lot::Mutex::default(),
            },
            gate: before.map_or_else(|| Arc::new(RwLock::new(false)), |b| b.gate),
            accepted,
            group,
            versions,
            schemas,
        }
    }

    /// The resource of one version.
    pub fn serve(&self, version: &Version, instances: &Arc<Resource>) -> Arc<Served> {
        let mut serving = self.serving.lock();
        let served = serving.entry(version.kind.version.clone()).or_insert_with(|| {
            let api_version = format!("{}/{}", self.group, version.kind.version);
            let structural = self.schemas.get(&api_version).map(|s| s.structural.clone());
            let custom = Custom {
                storage: self.storage.clone(),
                schemas: self.schemas.clone(),
                terminating: self.deleting,
                gate: self.gate.clone(),
                table: version.table.clone(),
            };
            let info = version.table.resources().next().cloned();
            let info = info.unwrap_or_else(|| unreachable!("the table holds the version's own resource"));
            Arc::new(Served::new(info, instances.clone(), structural, Some(custom)))
        });
        served.clone()
    }
}

/// Compiles all versions. A schema that cannot be compiled (validation refuses those) leaves its version out.
fn compile(
    definition: &Value,
    names: &Names,
    before: Option<&Known>,
    builtin: &Arc<TypeTable>,
) -> (Arc<Vec<Version>>, Arc<BTreeMap<String, VersionSchema>>) {
    let spec = &definition["spec"];
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let group = text(spec, "group");
    let (mut versions, mut schemas) = (Vec::new(), BTreeMap::new());
    let storage = spec["versions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|v| v["storage"] == true);
    let storage = storage.map(|s| text(s, "name"));
    for version in spec["versions"].as_array().into_iter().flatten() {
        let name = text(version, "name");
        let api_version = format!("{group}/{name}");
        let source = &version["schema"]["openAPIV3Schema"];
        // A schema that stayed as it was is not compiled again, and objects checked under it need no second look.
        let known = before.and_then(|before| {
            let same = |v: &&Version| v.kind.version == name && *v.kind.schema == *source;
            before.versions.iter().find(same)?;
            before.schemas.get(&api_version).cloned()
        });
        let schema = match known {
            Some(schema) => schema,
            None => match Structural::compile(source) {
                Ok(structural) => VersionSchema::new(Arc::new(structural)),
                Err(error) => {
                    tracing::error!(definition = meta::name(definition), version = name, %error, "a schema is not usable");
                    continue;
                }
            },
        };
        let scale = &version["subresources"]["scale"];
        let path = |key: &str| text(scale, key).trim_start_matches('.').to_owned();
        let columns = version["additionalPrinterColumns"].as_array().into_iter().flatten();
        let selectable = version["selectableFields"].as_array().into_iter().flatten();
        let deprecation = (version["deprecated"] == true).then(|| match version["deprecationWarning"].as_str() {
            Some(warning) => warning.to_owned(),
            None => format!("{api_version} {} is deprecated", names.kind),
        });
        let kind = KindDef {
            group: group.clone(),
            version: name,
            kind: names.kind.clone(),
            plural: names.plural.clone(),
            singular: names.singular.clone(),
            namespaced: spec["scope"] == "Namespaced",
            short_names: names.short.clone(),
            categories: names.categories.clone(),
            columns: columns
                .map(|c| PrinterColumn {
                    name: text(c, "name"),
                    ty: text(c, "type"),
                    json_path: text(c, "jsonPath"),
                    priority: c["priority"].as_i64().unwrap_or_default() as i32,
                    format: text(c, "format"),
                    description: match c["description"].as_str().filter(|d| !d.is_empty()) {
                        Some(given) => given.to_owned(),
                        None => format!(
                            "Custom resource definition column (in JSONPath format): {}",
                            text(c, "jsonPath")
                        ),
                    },
                })
                .collect(),
            schema: Arc::new(source.clone()),
            status_subresource: version["subresources"]["status"].is_object(),
            more: KindMore {
                list_kind: names.list_kind.clone(),
                scale: scale.is_object().then(|| ScalePaths {
                    spec_replicas: path("specReplicasPath"),
                    status_replicas: path("statusReplicasPath"),
                    selector: Some(path("labelSelectorPath")).filter(|p| !p.is_empty()),
                }),
                selectable: selectable
                    .filter_map(|f| validate::selectable_path(f["jsonPath"].as_str().unwrap_or_default()))
                    .collect(),
                deprecation,
                compiled: Some(schema.structural.clone()),
                storage_version: storage.clone(),
            },
        };
        let Ok(table) = builtin.with_type(&kind) else { continue };
        versions.push(Version {
            table,
            served: version["served"] == true,
            kind,
        });
        schemas.insert(api_version, schema);
    }
    (Arc::new(versions), Arc::new(schemas))
}

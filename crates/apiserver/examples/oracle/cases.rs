//! Cases as data: one YAML file per kind.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

/// One kind's objects. From them the [`crate::script`] follows.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Kind {
    /// The file's name.
    #[serde(skip)]
    pub name: String,
    /// Where its objects are; namespaced ones in namespace `oracle`.
    pub path: String,
    /// What is created, read, changed and deleted.
    pub minimal: Value,
    /// Created besides, each by name: what is defaulted in larger objects. JSON merge patches of `minimal`.
    #[serde(default)]
    pub objects: BTreeMap<String, Value>,
    /// JSON merge patches of `minimal` that creation refuses.
    #[serde(default)]
    pub invalid: BTreeMap<String, Value>,
    /// JSON merge patches of the stored object, one after the other, refused or not.
    #[serde(default)]
    pub updates: BTreeMap<String, Value>,
    /// JSON merge patches of its status subresource.
    #[serde(default)]
    pub status: BTreeMap<String, Value>,
    /// Strategic merge patches of the stored object.
    #[serde(default)]
    pub strategic: BTreeMap<String, Value>,
    /// Configurations that two managers apply, one after the other: `(manager, merge patch of minimal)`.
    #[serde(default)]
    pub applies: Vec<(String, Value)>,
    /// Field selectors of lists.
    #[serde(default)]
    pub selectors: Vec<String>,
    /// Reviews and the like cannot be read back.
    #[serde(default)]
    pub create_only: bool,
}

/// All of a folder, by name.
pub fn read(dir: &Path) -> Result<Vec<Kind>> {
    let mut kinds = vec![];
    for entry in fs::read_dir(dir)
        .with_context(|| format!("reading {}", dir.display()))?
        .flatten()
    {
        let path = entry.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if path.extension().is_none_or(|e| e != "yaml") || name == "known" {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        let mut kind: Kind = serde_saphyr::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
        kind.name = name;
        kinds.push(kind);
    }
    kinds.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(kinds)
}

/// RFC 7386.
pub fn merged(base: &Value, patch: &Value) -> Value {
    let Value::Object(patch) = patch else {
        return patch.clone();
    };
    let mut out = base.as_object().cloned().unwrap_or_default();
    for (key, value) in patch {
        if value.is_null() {
            out.remove(key);
        } else {
            let old = out.get(key).cloned().unwrap_or_default();
            out.insert(key.clone(), merged(&old, value));
        }
    }
    Value::Object(out)
}

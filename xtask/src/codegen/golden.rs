//! Golden objects: one fully populated object per kind, as JSON and as protobuf, packed into one file.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::sources::write_gz;

/// Writes `golden.json.gz`: `{ "<group>.<version>.<Kind>": { "json": .., "pb": "<hex>" } }`, with every one of `kinds`
/// that is published: the type table knows kinds that are not served too.
pub fn generate(api: &Path, dir: &Path, kinds: &[String]) -> Result<()> {
    let base = api.join("testdata/HEAD");
    let mut kinds: Vec<&String> = kinds
        .iter()
        .filter(|k| base.join(format!("{k}.json")).exists())
        .collect();
    kinds.sort();
    let mut out = Map::new();
    for kind in kinds {
        let object = std::fs::read(base.join(format!("{kind}.json"))).with_context(|| format!("golden {kind}"))?;
        let object: Value = serde_json::from_slice(&object)?;
        let pb = std::fs::read(base.join(format!("{kind}.pb")))?;
        let hex: String = pb.iter().map(|b| format!("{b:02x}")).collect();
        out.insert(kind.clone(), json!({ "json": object, "pb": hex }));
    }
    println!("{} goldens", out.len());
    write_gz(
        &dir.join("golden.json.gz"),
        serde_json::to_string(&Value::Object(out))?.as_bytes(),
    )
}

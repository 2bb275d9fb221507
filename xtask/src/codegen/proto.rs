//! Reads `generated.proto` files: message and field names, numbers and types.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

/// A field of a message. `ty` is a scalar name or a full message name (`k8s.io.api.core.v1.Pod`).
#[derive(Clone, Debug)]
pub struct ProtoField {
    pub number: u32,
    pub ty: String,
    pub repeated: bool,
    pub map: bool,
}

/// Full message name to fields in file order.
pub type Messages = BTreeMap<String, Vec<ProtoField>>;

const SCALARS: [&str; 8] = ["string", "bytes", "bool", "int32", "int64", "uint32", "double", "float"];

/// Adds every message of one file.
pub fn read(path: &Path, into: &mut Messages) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let mut package = String::new();
    let mut message: Option<(String, Vec<ProtoField>)> = None;
    for line in text.lines().map(str::trim) {
        if line.starts_with("//") || line.is_empty() {
            continue;
        }
        if let Some(rest) = line.strip_prefix("package ") {
            package = rest.trim_end_matches(';').to_owned();
        } else if let Some(rest) = line.strip_prefix("message ") {
            let name = rest.trim_end_matches('{').trim();
            message = Some((format!("{package}.{name}"), Vec::new()));
        } else if line == "}" {
            if let Some((name, fields)) = message.take() {
                into.insert(name, fields);
            }
        } else if let Some((_, fields)) = &mut message
            && let Some((left, right)) = line.split_once('=')
        {
            let number = right.trim().split([';', ' ']).next().unwrap_or_default();
            let number = number.parse().with_context(|| format!("field number in {line:?}"))?;
            let left = left.trim();
            let resolve = |ty: &str| match ty.strip_prefix('.') {
                Some(full) => full.to_owned(),
                None if SCALARS.contains(&ty) || ty.contains('.') => ty.to_owned(),
                None => format!("{package}.{ty}"),
            };
            let field = if let Some(rest) = left.strip_prefix("map<") {
                let (inner, _) = rest.split_once('>').context("map type")?;
                let (_, value) = inner.split_once(',').context("map value")?;
                ProtoField {
                    number,
                    ty: resolve(value.trim()),
                    repeated: false,
                    map: true,
                }
            } else {
                let words: Vec<&str> = left.split_whitespace().collect();
                let [label, ty, _] = words[..] else { continue };
                ProtoField {
                    number,
                    ty: resolve(ty),
                    repeated: label == "repeated",
                    map: false,
                }
            };
            fields.push(field);
        }
    }
    Ok(())
}

//! Reads struct tags of `types.go` files: JSON names, field numbers, pointers, omitempty, inlining.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

/// A struct field as its tags say.
#[derive(Clone, Debug)]
pub struct GoField {
    pub json: String,
    /// Protobuf field number; `None` where the field is not on that wire.
    pub number: Option<u32>,
    pub pointer: bool,
    pub omitempty: bool,
    pub inline: bool,
    /// Go type as written, without the pointer star.
    pub ty: String,
}

/// Struct name to fields, for one Go package directory.
pub type Structs = BTreeMap<String, Vec<GoField>>;

/// Reads every non-generated Go file of `dir` (a package) into `into`.
pub fn read(dir: &Path, into: &mut Structs) -> Result<()> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .with_context(|| format!("list {}", dir.display()))?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|x| x == "go"))
        .filter(|p| !p.file_name().is_some_and(|n| n.to_string_lossy().contains("generated")))
        .collect();
    files.sort();
    for file in files {
        let text = std::fs::read_to_string(&file)?;
        let mut current: Option<(String, Vec<GoField>)> = None;
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("type ") {
                if let Some(name) = rest.strip_suffix(" struct {") {
                    current = Some((name.trim().to_owned(), Vec::new()));
                } else if let Some(name) = rest.strip_suffix(" struct{}") {
                    into.insert(name.trim().to_owned(), Vec::new());
                }
            } else if line == "}" {
                if let Some((name, fields)) = current.take() {
                    into.insert(name, fields);
                }
            } else if let Some((_, fields)) = &mut current
                && let Some(field) = parse_field(line)
            {
                fields.push(field);
            }
        }
    }
    Ok(())
}

fn parse_field(line: &str) -> Option<GoField> {
    let line = line.trim();
    if line.starts_with("//") {
        return None;
    }
    let (decl, tags) = line.split_once('`')?;
    let tags = tags.split('`').next()?;
    let json_tag = tag(tags, "json")?;
    let mut parts = json_tag.split(',');
    let json = parts.next()?.to_owned();
    let rest: Vec<&str> = parts.collect();
    let inline = rest.contains(&"inline");
    let words: Vec<&str> = decl.split_whitespace().collect();
    let ty = *words.last()?;
    let number = tag(tags, "protobuf").and_then(|t| t.split(',').nth(1)?.parse().ok());
    Some(GoField {
        json,
        number,
        pointer: ty.starts_with('*'),
        omitempty: rest.contains(&"omitempty") || rest.contains(&"omitzero"),
        inline,
        ty: ty.trim_start_matches('*').to_owned(),
    })
}

fn tag<'a>(tags: &'a str, name: &str) -> Option<&'a str> {
    let at = tags.find(&format!("{name}:\""))? + name.len() + 2;
    tags[at..].split('"').next()
}

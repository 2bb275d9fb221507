//! Differences that are known, with their reason.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::compare::Difference;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    kind: String,
    case: String,
    path: String,
    reason: String,
    #[serde(skip)]
    used: bool,
}

pub struct Known(Vec<Entry>);

impl Known {
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Self(
            serde_saphyr::from_str(&text).with_context(|| format!("reading {}", path.display()))?,
        ))
    }

    /// Why this difference is expected, if it is.
    pub fn reason(&mut self, kind: &str, case: &str, difference: &Difference) -> Option<&str> {
        let entry = self
            .0
            .iter_mut()
            .find(|e| matches(&e.kind, kind) && matches(&e.case, case) && matches(&e.path, &difference.path))?;
        entry.used = true;
        Some(&entry.reason)
    }

    /// Entries that no difference has met.
    pub fn unused(&self) -> impl Iterator<Item = String> {
        self.0
            .iter()
            .filter(|e| !e.used)
            .map(|e| format!("{} {} {}", e.kind, e.case, e.path))
    }
}

/// `*` stands for any text.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, "")) => text.starts_with(start),
        Some((start, rest)) => text
            .strip_prefix(start)
            .is_some_and(|t| t.char_indices().any(|(i, _)| matches(rest, &t[i..]))),
    }
}

//! Field selectors: equality and inequality, joined by commas, with backslash escapes.

use std::fmt;

use super::SelectorError;

/// Equality or inequality of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FieldOp {
    /// `field=value` or `field==value`.
    Equals,
    /// `field!=value`.
    NotEquals,
}

/// One term of a field selector.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FieldRequirement {
    /// Dotted path, as the kind declares it.
    pub field: String,
    /// The comparison.
    pub op: FieldOp,
    /// The value compared with, unescaped.
    pub value: String,
}

/// A conjunction of field requirements. Which fields a kind supports is the server's business.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct FieldSelector {
    /// The terms, in the order given.
    pub requirements: Vec<FieldRequirement>,
}

impl FieldSelector {
    /// Parses `a=b,c!=d`. Backslash escapes comma, equals and itself in values. Empty text matches everything.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for term in split_unescaped(text) {
            if term.is_empty() {
                continue;
            }
            let bad = || SelectorError::FieldTerm {
                selector: text.to_owned(),
                term: term.to_owned(),
            };
            let at = term.find(['=', '!']).ok_or_else(bad)?;
            let (field, rest) = term.split_at(at);
            let (op, raw) = if let Some(raw) = rest.strip_prefix("!=") {
                (FieldOp::NotEquals, raw)
            } else if let Some(raw) = rest.strip_prefix("==").or_else(|| rest.strip_prefix('=')) {
                (FieldOp::Equals, raw)
            } else {
                return Err(bad());
            };
            let value = unescape(raw).ok_or_else(bad)?;
            requirements.push(FieldRequirement {
                field: field.to_owned(),
                op,
                value,
            });
        }
        Ok(Self { requirements })
    }

    /// Whether the object is selected; `get` gives the field's value, the empty string where the object has none.
    pub fn matches<'a>(&self, mut get: impl FnMut(&str) -> &'a str) -> bool {
        self.requirements
            .iter()
            .all(|r| (get(&r.field) == r.value) == (r.op == FieldOp::Equals))
    }

    /// The value `field` must equal, if the selector says so.
    pub fn exact(&self, field: &str) -> Option<&str> {
        self.requirements
            .iter()
            .find(|r| r.op == FieldOp::Equals && r.field == field)
            .map(|r| r.value.as_str())
    }

    /// Selects every object.
    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty()
    }
}

impl fmt::Display for FieldSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, r) in self.requirements.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            let op = if r.op == FieldOp::Equals { "=" } else { "!=" };
            let value = r.value.replace('\\', "\\\\").replace(',', "\\,").replace('=', "\\=");
            write!(f, "{}{op}{value}", r.field)?;
        }
        Ok(())
    }
}

fn split_unescaped(text: &str) -> Vec<&str> {
    let mut terms = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                terms.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    terms
}

fn unescape(raw: &str) -> Option<String> {
    let mut out = String::with_capacity(raw.len());
    let mut chars = raw.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => out.push(chars.next().filter(|c| matches!(c, '\\' | ',' | '='))?),
            '=' => return None,
            other => out.push(other),
        }
    }
    Some(out)
}

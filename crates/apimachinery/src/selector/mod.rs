//! Label and field selectors, in query-string and object form, with upstream's matching rules.
//!
//! `!=` and `notin` match objects that lack the key. An empty selector matches everything; a *null* label selector
//! object matches nothing ([`LabelSelector::nothing`]).

mod field;
mod parse;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde_json::Value;

pub use field::{FieldOp, FieldRequirement, FieldSelector};
use parse::{Parser, Token};

/// Why a selector was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// Text that does not follow the grammar.
    #[error("unable to parse requirement: found '{found}', expected: {expected}")]
    Syntax {
        /// What stood there.
        found: String,
        /// What should have stood there.
        expected: &'static str,
    },
    /// A key that is no qualified name.
    #[error("key: Invalid value: {key:?}: {reason}")]
    Key {
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value no label can have.
    #[error("values[0][{key}]: Invalid value: {value:?}: {reason}")]
    Value {
        /// The key the value belongs to.
        key: String,
        /// The value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An operator with the wrong number or kind of values.
    #[error("values: Invalid value: {values:?}: {reason}")]
    Values {
        /// The values.
        values: Vec<String>,
        /// What is wrong with them.
        reason: &'static str,
    },
    /// An operator this selector does not know.
    #[error("{operator:?} is not a valid label selector operator")]
    Operator {
        /// The operator.
        operator: String,
    },
    /// An object where a field has the wrong type.
    #[error("{field}: expected {expected}")]
    Shape {
        /// Path of the field.
        field: &'static str,
        /// The expected type.
        expected: &'static str,
    },
    /// A field selector term without operator.
    #[error("invalid selector: '{selector}'; can't understand '{term}'")]
    FieldTerm {
        /// The whole selector.
        selector: String,
        /// The term.
        term: String,
    },
}

/// Anything labels can be looked up in.
pub trait Labels {
    /// The value of `key`, if the object has that label.
    fn label(&self, key: &str) -> Option<&str>;
}

impl Labels for BTreeMap<String, String> {
    fn label(&self, key: &str) -> Option<&str> {
        self.get(key).map(String::as_str)
    }
}

impl Labels for HashMap<String, String> {
    fn label(&self, key: &str) -> Option<&str> {
        self.get(key).map(String::as_str)
    }
}

impl<K: AsRef<str>, V: AsRef<str>> Labels for [(K, V)] {
    fn label(&self, key: &str) -> Option<&str> {
        self.iter().find(|(k, _)| k.as_ref() == key).map(|(_, v)| v.as_ref())
    }
}

impl<K: AsRef<str>, V: AsRef<str>> Labels for Vec<(K, V)> {
    fn label(&self, key: &str) -> Option<&str> {
        self.as_slice().label(key)
    }
}

/// A JSON object of strings, as `metadata.labels` is; anything else has no labels.
impl Labels for Value {
    fn label(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }
}

impl<L: Labels> Labels for Option<L> {
    fn label(&self, key: &str) -> Option<&str> {
        self.as_ref().and_then(|labels| labels.label(key))
    }
}

impl<L: Labels + ?Sized> Labels for &L {
    fn label(&self, key: &str) -> Option<&str> {
        (**self).label(key)
    }
}

/// What a requirement asks of one label.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LabelOp {
    /// The value is one of these.
    In(Vec<String>),
    /// The key is absent or its value none of these.
    NotIn(Vec<String>),
    /// The key is present.
    Exists,
    /// The key is absent.
    DoesNotExist,
    /// The value is an integer above this one.
    Greater(i64),
    /// The value is an integer below this one.
    Less(i64),
}

/// One term of a label selector.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LabelRequirement {
    /// The label's key.
    pub key: String,
    /// The condition on its value.
    pub op: LabelOp,
}

impl LabelRequirement {
    /// Whether `labels` meet this requirement.
    pub fn matches<L: Labels + ?Sized>(&self, labels: &L) -> bool {
        let value = labels.label(&self.key);
        match &self.op {
            LabelOp::In(values) => value.is_some_and(|v| values.iter().any(|x| x == v)),
            LabelOp::NotIn(values) => value.is_none_or(|v| values.iter().all(|x| x != v)),
            LabelOp::Exists => value.is_some(),
            LabelOp::DoesNotExist => value.is_none(),
            LabelOp::Greater(than) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *than),
            LabelOp::Less(than) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *than),
        }
    }
}

/// A conjunction of label requirements, or the selector that matches nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct LabelSelector {
    requirements: Vec<LabelRequirement>,
    nothing: bool,
}

impl LabelSelector {
    /// Matches every object.
    pub fn everything() -> Self {
        Self::default()
    }

    /// Matches no object.
    pub fn nothing() -> Self {
        Self {
            requirements: Vec::new(),
            nothing: true,
        }
    }

    /// Matches objects that have all these labels, as a Service's or ReplicationController's selector does.
    pub fn from_map<K: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (K, V)>) -> Self {
        let requirements = pairs
            .into_iter()
            .map(|(k, v)| LabelRequirement {
                key: k.into(),
                op: LabelOp::In(vec![v.into()]),
            })
            .collect();
        Self {
            requirements,
            nothing: false,
        }
    }

    /// A selector of these terms.
    pub fn from_requirements(requirements: Vec<LabelRequirement>) -> Self {
        Self {
            requirements,
            nothing: false,
        }
    }

    /// Parses the query form: `a=b,c!=d,e in (f,g),h notin (i),j,!k,l>5`. Empty text matches everything.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut parser = Parser { text, pos: 0 };
        let mut requirements = Vec::new();
        if parser.peek() == Token::End {
            return Ok(Self::everything());
        }
        loop {
            requirements.push(parser.requirement()?);
            match parser.next() {
                Token::Comma => {}
                Token::End => return Ok(Self::from_requirements(requirements)),
                other => return Err(other.unexpected("',' or 'end of string'")),
            }
        }
    }

    /// Reads a `metav1.LabelSelector` object: `matchLabels` and `matchExpressions`. Null matches nothing, an empty
    /// object everything.
    pub fn from_object(object: &Value) -> Result<Self, SelectorError> {
        let Some(map) = object.as_object() else {
            return if object.is_null() {
                Ok(Self::nothing())
            } else {
                Err(SelectorError::Shape {
                    field: "selector",
                    expected: "an object",
                })
            };
        };
        let mut requirements = Vec::new();
        match map.get("matchLabels") {
            None | Some(Value::Null) => {}
            Some(Value::Object(labels)) => {
                for (key, value) in labels {
                    let value = value.as_str().ok_or(SelectorError::Shape {
                        field: "matchLabels",
                        expected: "strings",
                    })?;
                    requirements.push(requirement(key, "In", vec![value.to_owned()])?);
                }
            }
            Some(_) => {
                return Err(SelectorError::Shape {
                    field: "matchLabels",
                    expected: "an object",
                });
            }
        }
        match map.get("matchExpressions") {
            None | Some(Value::Null) => {}
            Some(Value::Array(items)) => {
                for item in items {
                    let text = |field| item.get(field).and_then(Value::as_str).unwrap_or_default();
                    let values = match item.get("values") {
                        None | Some(Value::Null) => Vec::new(),
                        Some(Value::Array(values)) => values
                            .iter()
                            .map(|v| v.as_str().map(str::to_owned))
                            .collect::<Option<Vec<_>>>()
                            .ok_or(SelectorError::Shape {
                                field: "matchExpressions[].values",
                                expected: "strings",
                            })?,
                        Some(_) => {
                            return Err(SelectorError::Shape {
                                field: "matchExpressions[].values",
                                expected: "an array",
                            });
                        }
                    };
                    let operator = text("operator");
                    if !matches!(operator, "In" | "NotIn" | "Exists" | "DoesNotExist") {
                        return Err(SelectorError::Operator {
                            operator: operator.to_owned(),
                        });
                    }
                    requirements.push(requirement(text("key"), operator, values)?);
                }
            }
            Some(_) => {
                return Err(SelectorError::Shape {
                    field: "matchExpressions",
                    expected: "an array",
                });
            }
        }
        Ok(Self::from_requirements(requirements))
    }

    /// Whether an object with these labels is selected.
    pub fn matches<L: Labels + ?Sized>(&self, labels: &L) -> bool {
        !self.nothing && self.requirements.iter().all(|r| r.matches(labels))
    }

    /// Matches every object.
    pub fn is_everything(&self) -> bool {
        !self.nothing && self.requirements.is_empty()
    }

    /// The terms, in the order given.
    pub fn requirements(&self) -> &[LabelRequirement] {
        &self.requirements
    }
}

/// Prints the query form, which parses back to an equal selector (except [`LabelSelector::nothing`], which has none).
impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, LabelRequirement { key, op }) in self.requirements.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            match op {
                LabelOp::In(values) if values.len() == 1 => write!(f, "{key}={}", values[0])?,
                LabelOp::In(values) => write!(f, "{key} in ({})", values.join(","))?,
                LabelOp::NotIn(values) if values.len() == 1 => write!(f, "{key}!={}", values[0])?,
                LabelOp::NotIn(values) => write!(f, "{key} notin ({})", values.join(","))?,
                LabelOp::Exists => f.write_str(key)?,
                LabelOp::DoesNotExist => write!(f, "!{key}")?,
                LabelOp::Greater(than) => write!(f, "{key}>{than}")?,
                LabelOp::Less(than) => write!(f, "{key}<{than}")?,
            }
        }
        Ok(())
    }
}

/// Builds a checked requirement from its object form; the operator is one of In, NotIn, Exists, DoesNotExist, Gt, Lt.
pub fn requirement(key: &str, operator: &str, values: Vec<String>) -> Result<LabelRequirement, SelectorError> {
    if let Some(reason) = qualified_name_problem(key) {
        return Err(SelectorError::Key {
            key: key.to_owned(),
            reason,
        });
    }
    for value in &values {
        if let Some(reason) = label_value_problem(value) {
            return Err(SelectorError::Value {
                key: key.to_owned(),
                value: value.clone(),
                reason,
            });
        }
    }
    let some = |values: Vec<String>| {
        if values.is_empty() {
            Err(SelectorError::Values {
                values,
                reason: "for 'in', 'notin' operators, values set can't be empty",
            })
        } else {
            Ok(values)
        }
    };
    let none = |values: Vec<String>| {
        if values.is_empty() {
            Ok(())
        } else {
            Err(SelectorError::Values {
                values,
                reason: "values set must be empty for exists and does not exist",
            })
        }
    };
    let integer = |values: Vec<String>| match values.as_slice() {
        [one] => match one.parse::<i64>() {
            Ok(n) => Ok(n),
            Err(_) => Err(SelectorError::Values {
                values,
                reason: "for 'Gt', 'Lt' operators, the value must be an integer",
            }),
        },
        _ => Err(SelectorError::Values {
            values,
            reason: "for 'Gt', 'Lt' operators, exactly one value is required",
        }),
    };
    let op = match operator {
        "In" => LabelOp::In(some(values)?),
        "NotIn" => LabelOp::NotIn(some(values)?),
        "Exists" => {
            none(values)?;
            LabelOp::Exists
        }
        "DoesNotExist" => {
            none(values)?;
            LabelOp::DoesNotExist
        }
        "Gt" => LabelOp::Greater(integer(values)?),
        "Lt" => LabelOp::Less(integer(values)?),
        other => {
            return Err(SelectorError::Operator {
                operator: other.to_owned(),
            });
        }
    };
    Ok(LabelRequirement {
        key: key.to_owned(),
        op,
    })
}

/// What is wrong with a label key, if anything.
pub fn qualified_name_problem(key: &str) -> Option<String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if let Some(prefix) = prefix {
        let label_ok = |l: &str| {
            !l.is_empty()
                && l.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !l.starts_with('-')
                && !l.ends_with('-')
        };
        if prefix.is_empty() {
            return Some("prefix part must be non-empty".to_owned());
        }
        if prefix.len() > 253 || !prefix.split('.').all(label_ok) {
            return Some("prefix part must be a lowercase RFC 1123 subdomain".to_owned());
        }
    }
    if name.is_empty() {
        return Some("name part must be non-empty".to_owned());
    }
    if name.len() > 63 {
        return Some("name part must be no more than 63 bytes".to_owned());
    }
    (!word_ok(name)).then(|| {
        "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an \
         alphanumeric character"
            .to_owned()
    })
}

/// What is wrong with a label value, if anything. The empty value is fine.
pub fn label_value_problem(value: &str) -> Option<String> {
    if value.len() > 63 {
        return Some("must be no more than 63 bytes".to_owned());
    }
    (!value.is_empty() && !word_ok(value)).then(|| {
        "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start \
         and end with an alphanumeric character"
            .to_owned()
    })
}

fn word_ok(word: &str) -> bool {
    let bytes = word.as_bytes();
    bytes
        .iter()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}

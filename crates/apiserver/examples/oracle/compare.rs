//! Differences of two answers, by path.

use std::fmt;

use serde_json::Value;

/// One place where the answers differ.
pub struct Difference {
    /// As in `/spec/ports/0/protocol`; `code` and `warnings` for what is not in the body.
    pub path: String,
    pub ours: Option<Value>,
    pub theirs: Option<Value>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |v: &Option<Value>| match v {
            Some(v) => {
                let text = v.to_string();
                match text.char_indices().nth(600) {
                    Some((end, _)) => format!("{}...", &text[..end]),
                    None => text,
                }
            }
            None => "(absent)".to_owned(),
        };
        write!(
            f,
            "{}\n        ours   {}\n        theirs {}",
            self.path,
            show(&self.ours),
            show(&self.theirs)
        )
    }
}

/// Arrays of different lengths are one difference.
pub fn differences(path: &str, ours: &Value, theirs: &Value, found: &mut Vec<Difference>) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let path = format!("{path}/{}", key.replace('~', "~0").replace('/', "~1"));
                match (a.get(key), b.get(key)) {
                    (Some(a), Some(b)) => differences(&path, a, b, found),
                    (a, b) => found.push(Difference {
                        path,
                        ours: a.cloned(),
                        theirs: b.cloned(),
                    }),
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                differences(&format!("{path}/{i}"), a, b, found);
            }
        }
        (a, b) if a == b => {}
        (a, b) => found.push(Difference {
            path: if path.is_empty() {
                "/".to_owned()
            } else {
                path.to_owned()
            },
            ours: Some(a.clone()),
            theirs: Some(b.clone()),
        }),
    }
}

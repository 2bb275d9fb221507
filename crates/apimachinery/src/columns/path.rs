//! Cells of custom kinds: the part of JSONPath that printer columns use.

use jiff::Timestamp;
use serde_json::Value;

use super::since;

/// The cell at `path`; `null` if nothing is there.
pub(super) fn cell(object: &Value, path: &str, ty: &str, now: Timestamp) -> Value {
    let Some(found) = find(object, path) else {
        return Value::Null;
    };
    match ty {
        "date" => since(found.as_str(), now).into(),
        "string" => match found {
            Value::String(_) => found.clone(),
            other => other.to_string().into(),
        },
        _ => found.clone(),
    }
}

/// First value that `path` selects. Understands `.a.b`, `['a']`, `[0]`, `[*]` and `[?(@.a=="x")]`.
fn find<'v>(object: &'v Value, path: &str) -> Option<&'v Value> {
    let mut rest = path
        .trim()
        .trim_start_matches('{')
        .trim_end_matches('}')
        .trim_start_matches('$');
    let mut node = object;
    while !rest.is_empty() {
        if let Some(tail) = rest.strip_prefix('[') {
            let end = closing(tail)?;
            node = bracket(node, &tail[..end])?;
            rest = &tail[end + 1..];
            continue;
        }
        rest = rest.strip_prefix('.').unwrap_or(rest);
        let end = key_end(rest);
        if end == 0 {
            return None;
        }
        node = node.get(rest[..end].replace("\\.", "."))?;
        rest = &rest[end..];
    }
    Some(node)
}

fn key_end(text: &str) -> usize {
    let bytes = text.as_bytes();
    (0..bytes.len())
        .find(|i| bytes[*i] == b'[' || (bytes[*i] == b'.' && (*i == 0 || bytes[i - 1] != b'\\')))
        .unwrap_or(text.len())
}

/// Place of the bracket that closes, quotes respected.
fn closing(text: &str) -> Option<usize> {
    let mut quote = None;
    text.char_indices()
        .find(|(_, c)| {
            match (quote, c) {
                (Some(q), c) if q == *c => quote = None,
                (None, '"' | '\'') => quote = Some(*c),
                _ => {}
            }
            quote.is_none() && *c == ']'
        })
        .map(|(i, _)| i)
}

fn bracket<'v>(node: &'v Value, inner: &str) -> Option<&'v Value> {
    if let Some(filter) = inner.strip_prefix("?(").and_then(|f| f.strip_suffix(')')) {
        let (left, right) = filter.split_once("==")?;
        let left = left.trim().strip_prefix('@')?;
        let right = unquote(right.trim());
        let matches = |v: &&Value| match find(v, left) {
            Some(Value::String(s)) => s == right,
            Some(other) => other.to_string().as_str() == right,
            None => false,
        };
        return node.as_array()?.iter().find(matches);
    }
    if inner == "*" {
        return node.as_array()?.first();
    }
    match inner.parse::<usize>() {
        Ok(index) => node.get(index),
        Err(_) => node.get(unquote(inner)),
    }
}

fn unquote(text: &str) -> &str {
    text.trim_matches(|c| c == '"' || c == '\'')
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn paths_of_printer_columns() {
        let object = json!({"spec": {"n": 3, "a.b": "dot", "list": ["x", "y"]},
            "status": {"conditions": [{"type": "A", "status": "False"}, {"type": "Ready", "status": "True"}]}});
        let now = Timestamp::UNIX_EPOCH;
        for (path, ty, want) in [
            (".spec.n", "integer", json!(3)),
            (".spec.n", "string", json!("3")),
            (".spec['a.b']", "string", json!("dot")),
            (".spec.a\\.b", "string", json!("dot")),
            (".spec.list[1]", "string", json!("y")),
            (
                ".status.conditions[?(@.type==\"Ready\")].status",
                "string",
                json!("True"),
            ),
            (".spec.none", "string", Value::Null),
            (".spec.none", "integer", Value::Null),
            (".[", "string", Value::Null),
        ] {
            assert_eq!(cell(&object, path, ty, now), want, "{path}");
        }
    }
}

//! What two servers cannot agree on: identities, versions, times, drawn names and addresses. They are replaced by a mark, not
//! removed: their presence is compared.

use serde_json::Value;

/// Replaces them everywhere in a body.
pub fn normal(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                match (key.as_str(), &mut *value) {
                    ("uid" | "resourceVersion" | "continue", Value::String(text)) if !text.is_empty() => {
                        *text = format!("<{key}>");
                    }
                    ("nodePort" | "healthCheckNodePort", Value::Number(_)) => *value = "<port>".into(),
                    ("clusterIP", Value::String(ip)) if ip.contains('.') => *ip = "<ip>".to_owned(),
                    ("clusterIPs", Value::Array(ips)) => ips.iter_mut().for_each(|ip| *ip = "<ip>".into()),
                    ("token", Value::String(text)) => *text = "<token>".to_owned(),
                    _ => normal(value),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(normal),
        Value::String(text) => *text = words(text),
        _ => {}
    }
}

/// Times, uids and drawn suffixes inside a text.
fn words(text: &str) -> String {
    if is_time(text) {
        return "<time>".to_owned();
    }
    if is_age(text) {
        return "<age>".to_owned();
    }
    let mut out = String::new();
    let mut rest = text;
    while !rest.is_empty() {
        if is_uid(rest) {
            out.push_str("<uid>");
            rest = &rest[36..];
            continue;
        }
        if let Some(after) = rest.strip_prefix("kube-api-access-") {
            out.push_str("kube-api-access-<drawn>");
            rest = after.get(5..).unwrap_or_default();
            continue;
        }
        if let Some(after) = rest.strip_prefix("drawn-") {
            out.push_str("drawn-<drawn>");
            rest = after.get(5..).unwrap_or_default();
            continue;
        }
        let end = rest.chars().next().map_or(0, char::len_utf8);
        out.push_str(&rest[..end]);
        rest = &rest[end..];
    }
    out
}

fn is_time(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() >= 20 && bytes[4] == b'-' && bytes[7] == b'-' && bytes[10] == b'T' && text.ends_with('Z')
}

fn is_age(text: &str) -> bool {
    matches!(text.strip_suffix('s').map(str::parse::<u32>), Some(Ok(n)) if n < 60)
}

fn is_uid(text: &str) -> bool {
    let Some(bytes) = text.as_bytes().get(..36) else {
        return false;
    };
    bytes.iter().enumerate().all(|(i, b)| match i {
        8 | 13 | 18 | 23 => *b == b'-',
        _ => b.is_ascii_hexdigit(),
    })
}

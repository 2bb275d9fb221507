//! Sets of field paths, in the form that managedFields has on the wire.
//!
//! A set is a tree of JSON objects keyed by path elements: `f:<field>`, `k:<keys of an item>`, `v:<value of an item>`,
//! `i:<index>`. A path is a member if its object is empty or has the key `.`. Keeping the wire form means that entries
//! nobody touches are never rebuilt.

use serde_json::{Map, Value};

/// A set of field paths.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Set(pub(super) Map<String, Value>);

/// Key of the path itself.
const SELF: &str = ".";
/// Deepest set that is taken from a client.
const DEPTH_MAX: usize = 100;

fn is_member(node: &Map<String, Value>) -> bool {
    node.is_empty() || node.contains_key(SELF)
}

/// A node from its two facts; `None` if it would be in no set.
fn node(member: bool, mut below: Map<String, Value>) -> Option<Value> {
    below.remove(SELF);
    match (member, below.is_empty()) {
        (false, true) => return None,
        (true, false) => {
            below.insert(SELF.into(), Value::Object(Map::new()));
        }
        _ => {}
    }
    Some(Value::Object(below))
}

static EMPTY: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);

fn object(value: &Value) -> &Map<String, Value> {
    value.as_object().unwrap_or(&EMPTY)
}

fn children(map: &Map<String, Value>) -> impl Iterator<Item = (&String, &Map<String, Value>)> {
    map.iter().filter(|(k, _)| *k != SELF).map(|(k, v)| (k, object(v)))
}

impl Set {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Reads a set that a client sent: elements are brought into their canonical form. `None` if it is malformed.
    pub(super) fn parse(value: &Value) -> Option<Set> {
        parse(value, 0).map(Set)
    }

    /// Adds a child: `member` says whether the child itself is in the set, `below` what is under it.
    pub(super) fn put(&mut self, element: &str, member: bool, below: Set) {
        if let Some(node) = node(member, below.0) {
            self.0.insert(element.to_owned(), node);
        }
    }

    pub(super) fn child(&self, element: &str) -> Option<(bool, &Map<String, Value>)> {
        let map = object(self.0.get(element)?);
        Some((is_member(map), map))
    }

    pub(super) fn has(&self, path: &[String]) -> bool {
        let mut map = &self.0;
        for element in path {
            match map.get(element) {
                Some(next) => map = object(next),
                None => return false,
            }
        }
        !path.is_empty() && is_member(map)
    }

    /// Takes out one path, not what is below it.
    pub(super) fn remove(&mut self, path: &[String]) {
        fn go(map: &mut Map<String, Value>, path: &[String]) {
            let Some(Value::Object(inner)) = map.get_mut(&path[0]) else {
                return;
            };
            let mut member = is_member(inner);
            match path.len() {
                1 => member = false,
                _ => go(inner, &path[1..]),
            }
            let below = std::mem::take(inner);
            match node(member, below) {
                Some(node) => map.insert(path[0].clone(), node),
                None => map.remove(&path[0]),
            };
        }
        if !path.is_empty() {
            go(&mut self.0, path);
        }
    }

    /// Takes out a top-level field and everything below it.
    pub(super) fn remove_tree(&mut self, field: &str) {
        self.0.remove(&format!("f:{field}"));
    }

    pub(super) fn unite(&mut self, other: &Set) {
        fn go(into: &mut Map<String, Value>, from: &Map<String, Value>) {
            for (key, theirs) in children(from) {
                match into.get_mut(key) {
                    Some(Value::Object(ours)) => {
                        let member = is_member(ours) || is_member(theirs);
                        go(ours, theirs);
                        let below = std::mem::take(ours);
                        if let Some(node) = node(member, below) {
                            into.insert(key.clone(), node);
                        }
                    }
                    _ => {
                        into.insert(key.clone(), Value::Object(theirs.clone()));
                    }
                }
            }
        }
        go(&mut self.0, &other.0);
    }

    pub(super) fn subtract(&mut self, other: &Set) {
        fn go(from: &mut Map<String, Value>, what: &Map<String, Value>) {
            for (key, theirs) in children(what) {
                let Some(Value::Object(ours)) = from.get_mut(key) else {
                    continue;
                };
                let member = is_member(ours) && !is_member(theirs);
                go(ours, theirs);
                let below = std::mem::take(ours);
                match node(member, below) {
                    Some(node) => from.insert(key.clone(), node),
                    None => from.remove(key),
                };
            }
        }
        go(&mut self.0, &other.0);
    }

    pub(super) fn intersection(&self, other: &Set) -> Set {
        fn go(a: &Map<String, Value>, b: &Map<String, Value>) -> Map<String, Value> {
            let mut out = Map::new();
            for (key, theirs) in children(b) {
                let Some(ours) = a.get(key).map(object) else { continue };
                if let Some(node) = node(is_member(ours) && is_member(theirs), go(ours, theirs)) {
                    out.insert(key.clone(), node);
                }
            }
            out
        }
        Set(go(&self.0, &other.0))
    }

    /// Every path, members of a level before what lies below them.
    pub(super) fn paths(&self) -> Vec<Vec<String>> {
        fn go(map: &Map<String, Value>, path: &mut Vec<String>, out: &mut Vec<Vec<String>>) {
            for (key, inner) in children(map) {
                if is_member(inner) {
                    let mut full = path.clone();
                    full.push(key.clone());
                    out.push(full);
                }
            }
            for (key, inner) in children(map) {
                path.push(key.clone());
                go(inner, path, out);
                path.pop();
            }
        }
        let mut out = Vec::new();
        go(&self.0, &mut Vec::new(), &mut out);
        out
    }
}

fn parse(value: &Value, depth: usize) -> Option<Map<String, Value>> {
    let map = value.as_object().filter(|_| depth < DEPTH_MAX)?;
    let mut out = Map::new();
    for (key, inner) in map {
        let key = match key.split_once(':') {
            None if key == SELF => key.clone(),
            Some(("f", _)) => key.clone(),
            Some((kind @ ("k" | "v" | "i"), text)) => {
                let value: Value = serde_json::from_str(text).ok()?;
                if (kind == "k" && !value.is_object()) || (kind == "i" && !value.is_i64()) {
                    return None;
                }
                format!("{kind}:{value}")
            }
            _ => return None,
        };
        out.insert(key, Value::Object(parse(inner, depth + 1)?));
    }
    Some(out)
}

/// A path as messages show it: `.spec.containers[name="a"].image`.
pub(super) fn display(path: &[String]) -> String {
    let mut out = String::new();
    for element in path {
        match element.split_once(':') {
            Some(("f", name)) => {
                out.push('.');
                out.push_str(name);
            }
            Some(("k", keys)) => {
                let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                let keys: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
                out.push_str(&format!("[{}]", keys.join(",")));
            }
            Some(("v", value)) => out.push_str(&format!("[={value}]")),
            Some((_, index)) => out.push_str(&format!("[{index}]")),
            None => out.push_str(element),
        }
    }
    out
}

//! Laying a configuration over an object, and taking fields out of one.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::set::{self, Set};
use super::shape::{Parts, Shape};
use crate::table::TypeTable;

/// Whether every list by key or set of a configuration has items that can be told apart.
///
/// # Errors
/// The first fault: `.spec.containers: duplicate entries for key [name="a"]`.
pub(super) fn check(table: &TypeTable, shape: Shape<'_>, value: &Value) -> Result<(), String> {
    fn go(table: &TypeTable, shape: Shape<'_>, value: &Value, path: &mut Vec<String>) -> Result<(), String> {
        match shape.parts(value) {
            Parts::Fields => {
                for (name, inner) in value.as_object().into_iter().flatten() {
                    path.push(format!("f:{name}"));
                    go(table, shape.field(table, name).0, inner, path)?;
                    path.pop();
                }
            }
            Parts::Items => {
                let mut seen = BTreeSet::new();
                for (i, item) in value.as_array().into_iter().flatten().enumerate() {
                    let element = shape
                        .element(table, item)
                        .map_err(|why| format!("{}: element {i}: {why}", set::display(path)))?;
                    if !seen.insert(element.clone()) {
                        let key = set::display(std::slice::from_ref(&element));
                        return Err(format!("{}: duplicate entries for key {key}", set::display(path)));
                    }
                    path.push(element);
                    go(table, shape.item(table), item, path)?;
                    path.pop();
                }
            }
            Parts::None => {}
        }
        Ok(())
    }
    go(table, shape, value, &mut Vec::new())
}

/// The fields that an object has.
pub(super) fn field_set(table: &TypeTable, shape: Shape<'_>, value: &Value) -> Set {
    place_set(table, shape, value).1
}

/// Whether the place itself is a field, and what is below.
fn place_set(table: &TypeTable, shape: Shape<'_>, value: &Value) -> (bool, Set) {
    let mut below = Set::default();
    match shape.parts(value) {
        Parts::Fields => {
            for (name, inner) in value.as_object().into_iter().flatten() {
                let (child, field) = shape.field(table, name);
                let (member, under) = place_set(table, child, inner);
                let empty = inner.is_null() || inner.as_object().is_some_and(Map::is_empty);
                below.put(&format!("f:{name}"), member || empty || field.is_none(), under);
            }
        }
        Parts::Items => {
            let mut seen: BTreeMap<String, (usize, &Value)> = BTreeMap::new();
            for item in value.as_array().into_iter().flatten() {
                if let Ok(element) = shape.element(table, item) {
                    seen.entry(element).or_insert((0, item)).0 += 1;
                }
            }
            for (element, (count, item)) in seen {
                let under = match count {
                    1 => place_set(table, shape.item(table), item).1,
                    _ => Set::default(),
                };
                below.put(&element, true, under);
            }
        }
        Parts::None => {
            let hollow = value.is_null() && !matches!(shape, Shape::Leaf);
            return (!hollow, below);
        }
    }
    (false, below)
}

/// `config` over `live`: objects by field, sets and lists by key item by item, everything else replaced.
pub(super) fn merge(table: &TypeTable, shape: Shape<'_>, live: Option<&Value>, config: &Value) -> Value {
    let Some(live) = live.filter(|l| !l.is_null()) else {
        return config.clone();
    };
    match (shape.parts(live), shape.parts(config), live, config) {
        (Parts::Fields, Parts::Fields, Value::Object(a), Value::Object(b)) => {
            let mut out = a.clone();
            for (name, inner) in b {
                let child = shape.field(table, name).0;
                let merged = merge(table, child, a.get(name), inner);
                out.insert(name.clone(), merged);
            }
            Value::Object(out)
        }
        (Parts::Items, Parts::Items, Value::Array(a), Value::Array(b)) if !(a.is_empty() && b.is_empty()) => {
            Value::Array(merge_items(table, shape, a, b))
        }
        // A null names no part, so every part stays.
        (Parts::Fields | Parts::Items, _, _, Value::Null) => live.clone(),
        _ => config.clone(),
    }
}

/// Items of both in the live order, except that those of the configuration come in its order.
fn merge_items(table: &TypeTable, shape: Shape<'_>, live: &[Value], config: &[Value]) -> Vec<Value> {
    let inner = shape.item(table);
    let element = |item: &Value| shape.element(table, item).unwrap_or_default();
    let old: Vec<String> = live.iter().map(element).collect();
    let new: Vec<String> = config.iter().map(element).collect();
    let in_new: BTreeSet<&String> = new.iter().collect();
    let mut counts: BTreeMap<&String, (usize, usize)> = BTreeMap::new();
    for (i, e) in old.iter().enumerate() {
        counts.entry(e).or_insert((0, i)).0 += 1;
    }
    let merged = |j: usize| match counts.get(&new[j]) {
        // Live items with one key between them are replaced, not merged.
        Some((1, i)) => merge(table, inner, Some(&live[*i]), &config[j]),
        _ => config[j].clone(),
    };
    // Items of both, in the configuration's order: the next one marks where its new neighbours go.
    let mut shared = new.iter().filter(|e| counts.contains_key(e)).peekable();
    let mut out = Vec::with_capacity(live.len().max(config.len()));
    let mut done: BTreeSet<&String> = BTreeSet::new();
    let (mut i, mut j) = (0, 0);
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() {
            if old[i] == new[j] {
                out.push(merged(j));
                done.insert(&new[j]);
                i += 1;
                j += 1;
                shared.next();
                continue;
            }
            if in_new.contains(&old[i]) && shared.peek().is_some_and(|next| **next != old[i]) {
                i += 1;
                continue;
            }
        }
        if i < old.len() {
            if !in_new.contains(&old[i]) {
                out.push(live[i].clone());
                i += 1;
                continue;
            }
            if done.contains(&old[i]) {
                i += 1;
            }
        }
        if j < new.len() {
            out.push(merged(j));
            done.insert(&new[j]);
            if shared.peek().is_some_and(|next| **next == new[j]) {
                shared.next();
            }
            j += 1;
        }
    }
    out
}

/// The value without the fields of `what`. Containers that lose everything go too.
pub(super) fn remove(table: &TypeTable, shape: Shape<'_>, value: &Value, what: &Set) -> Option<Value> {
    match shape.parts(value) {
        Parts::Fields => {
            let map = value.as_object()?;
            let mut out = Map::new();
            for (name, inner) in map {
                let kept = match what.child(&format!("f:{name}")) {
                    None => Some(inner.clone()),
                    Some((true, _)) => None,
                    Some((false, below)) => remove(table, shape.field(table, name).0, inner, &Set(below.clone())),
                };
                if let Some(kept) = kept {
                    out.insert(name.clone(), kept);
                }
            }
            (!out.is_empty()).then_some(Value::Object(out))
        }
        Parts::Items => {
            let mut out = Vec::new();
            for item in value.as_array().into_iter().flatten() {
                let element = shape.element(table, item).unwrap_or_default();
                match what.child(&element) {
                    None => out.push(item.clone()),
                    Some((true, _)) => {}
                    Some((false, below)) => out.extend(remove(table, shape.item(table), item, &Set(below.clone()))),
                }
            }
            (!out.is_empty()).then_some(Value::Array(out))
        }
        Parts::None => match (shape, value) {
            // Only its parts were named, and it has none.
            (Shape::Leaf, Value::Object(_) | Value::Array(_)) => None,
            _ => Some(value.clone()),
        },
    }
}

/// The set with every declared field on the way to a member: `a.b` brings `a` if `a` is a field of a struct.
pub(super) fn with_named(table: &TypeTable, shape: Shape<'_>, set: &Set) -> Set {
    let mut out = Set::default();
    for (element, _) in &set.0 {
        let Some((member, below)) = set.child(element).filter(|_| element != ".") else {
            continue;
        };
        let (inner, declared) = match element.strip_prefix("f:") {
            Some(name) => {
                let (inner, field) = shape.field(table, name);
                (inner, field.is_some())
            }
            None => (shape.item(table), false),
        };
        let below = with_named(table, inner, &Set(below.clone()));
        out.put(element, member || (declared && !below.is_empty()), below);
    }
    out
}

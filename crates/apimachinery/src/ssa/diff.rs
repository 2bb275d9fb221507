//! Which fields an object gained, changed and lost.

use std::collections::BTreeMap;

use serde_json::Value;

use super::set::Set;
use super::shape::{Parts, Shape};
use crate::table::{Field, Ty, TypeTable};

/// The outcome of a comparison.
#[derive(Debug, Default)]
pub(super) struct Diff {
    pub added: Set,
    pub modified: Set,
    pub removed: Set,
}

impl Diff {
    pub(super) fn is_empty(&self) -> bool {
        self.added.is_empty() && self.modified.is_empty() && self.removed.is_empty()
    }
}

/// One side at one place.
#[derive(Clone, Copy, Debug)]
enum Side<'a> {
    Absent,
    /// A struct that upstream's types hold by value: there and empty although no JSON shows it. So `spec` as such is
    /// nobody's, and `spec.strategy.rollingUpdate` (a pointer) is somebody's.
    Zero,
    Is(&'a Value),
}

/// What was found at one place: whether the place itself, and what below it.
#[derive(Default)]
struct Found {
    added: bool,
    modified: bool,
    removed: bool,
    below: Diff,
}

/// Compares two objects of one shape. An absent object is an empty one.
pub(super) fn compare(table: &TypeTable, shape: Shape<'_>, old: Option<&Value>, new: Option<&Value>) -> Diff {
    place(
        table,
        shape,
        old.map_or(Side::Zero, Side::Is),
        new.map_or(Side::Zero, Side::Is),
    )
    .below
}

fn place(table: &TypeTable, shape: Shape<'_>, old: Side<'_>, new: Side<'_>) -> Found {
    let mut found = Found::default();
    let parts = |side: Side<'_>| match side {
        Side::Is(v) => shape.parts(v),
        _ => Parts::None,
    };
    let empty = |side: Side<'_>| match side {
        Side::Is(Value::Array(a)) => a.is_empty(),
        Side::Is(Value::Object(o)) => o.is_empty(),
        Side::Is(Value::Null) | Side::Zero | Side::Absent => true,
        Side::Is(_) => false,
    };
    match (old, new) {
        (Side::Is(a), Side::Is(b)) if a == b => return found,
        (Side::Absent | Side::Zero, Side::Absent | Side::Zero) => return found,
        _ => {}
    }
    let kind = match (parts(old), parts(new)) {
        (Parts::Fields, Parts::Fields | Parts::None) | (Parts::None, Parts::Fields) => Parts::Fields,
        (Parts::Items, Parts::Items | Parts::None) | (Parts::None, Parts::Items) => Parts::Items,
        _ => Parts::None,
    };
    // A place without parts on either side is one field, so that empty and absent differ.
    if kind == Parts::None || (empty(old) && empty(new)) {
        match (old, new) {
            (Side::Absent, _) => found.added = true,
            (_, Side::Absent) => found.removed = true,
            (Side::Zero, Side::Is(v)) | (Side::Is(v), Side::Zero) if empty(Side::Is(v)) => {}
            _ => found.modified = true,
        }
        return found;
    }
    // A scalar where the other side has parts: the place itself changed too.
    let scalar = |side: Side<'_>| matches!(side, Side::Is(v) if shape.parts(v) == Parts::None && !v.is_null());
    found.modified = scalar(old) || scalar(new);
    match kind {
        Parts::Fields => fields(table, shape, old, new, &mut found.below),
        _ => items(table, shape, old, new, &mut found.below),
    }
    found.added = matches!(old, Side::Absent);
    found.removed = matches!(new, Side::Absent);
    found
}

/// The side's value of a field.
fn get<'a>(side: Side<'a>, name: &str, field: Option<&Field>) -> Side<'a> {
    let by_value = || field.is_some_and(|f| f.proto.is_some() && !f.pointer && matches!(f.ty, Ty::Object(_)));
    // Lists that are never left out are null there where they have no items.
    let no_omit =
        || field.is_some_and(|f| f.proto.is_some() && !f.omitempty && matches!(f.ty, Ty::List(_) | Ty::Map(_)));
    match side {
        Side::Absent => Side::Absent,
        Side::Is(Value::Object(map)) => match map.get(name) {
            Some(value) => Side::Is(value),
            None if by_value() || no_omit() => Side::Zero,
            None => Side::Absent,
        },
        Side::Zero | Side::Is(_) if by_value() || no_omit() => Side::Zero,
        _ => Side::Absent,
    }
}

fn fields(table: &TypeTable, shape: Shape<'_>, old: Side<'_>, new: Side<'_>, out: &mut Diff) {
    let mut child = |name: &str| {
        let (inner, field) = shape.field(table, name);
        let found = place(table, inner, get(old, name, field), get(new, name, field));
        put(out, &format!("f:{name}"), found);
    };
    let (a, b) = (as_object(old), as_object(new));
    for name in a.into_iter().flat_map(|m| m.keys()) {
        child(name);
    }
    for name in b.into_iter().flat_map(|m| m.keys()) {
        if a.is_none_or(|a| !a.contains_key(name)) {
            child(name);
        }
    }
}

fn as_object<'a>(side: Side<'a>) -> Option<&'a serde_json::Map<String, Value>> {
    match side {
        Side::Is(Value::Object(map)) => Some(map),
        _ => None,
    }
}

/// Items of a list by their path element; items that share one stay together.
fn index<'a>(table: &TypeTable, shape: Shape<'_>, side: Side<'a>) -> BTreeMap<String, Vec<&'a Value>> {
    let mut map: BTreeMap<String, Vec<&Value>> = BTreeMap::new();
    if let Side::Is(Value::Array(list)) = side {
        for item in list {
            if let Ok(element) = shape.element(table, item) {
                map.entry(element).or_default().push(item);
            }
        }
    }
    map
}

fn items(table: &TypeTable, shape: Shape<'_>, old: Side<'_>, new: Side<'_>, out: &mut Diff) {
    let inner = shape.item(table);
    let (a, b) = (index(table, shape, old), index(table, shape, new));
    for element in a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))) {
        let l = a.get(element).map_or(&[][..], Vec::as_slice);
        let r = b.get(element).map_or(&[][..], Vec::as_slice);
        let found = match (l, r) {
            ([_, _, ..], [_, _, ..]) => Found {
                modified: l != r,
                ..Found::default()
            },
            // Items with one key between them are one field together; it ends or begins here.
            ([_, _, ..], _) => Found {
                removed: true,
                ..place(table, inner, Side::Absent, of(r.first()))
            },
            (_, [_, _, ..]) => Found {
                added: true,
                ..place(table, inner, of(l.first()), Side::Absent)
            },
            _ => place(table, inner, of(l.first()), of(r.first())),
        };
        put(out, element, found);
    }
}

fn of<'a>(value: Option<&&'a Value>) -> Side<'a> {
    value.map_or(Side::Absent, |v| Side::Is(v))
}

fn put(out: &mut Diff, element: &str, found: Found) {
    out.added.put(element, found.added, found.below.added);
    out.modified.put(element, found.modified, found.below.modified);
    out.removed.put(element, found.removed, found.below.removed);
}

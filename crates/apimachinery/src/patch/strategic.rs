//! Strategic merge: objects merge by field, lists by their merge key, directives steer both.
//!
//! Directives: `$patch: replace|delete|merge`, `$retainKeys`, `$deleteFromPrimitiveList/<field>`,
//! `$setElementOrder/<field>`.

use serde_json::{Map, Value};

use super::PatchError;
use crate::table::{Field, Ty, TypeDef, TypeId, TypeTable};

const PATCH: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const SET_ORDER: &str = "$setElementOrder/";

type Object = Map<String, Value>;

pub(super) fn apply(table: &TypeTable, id: TypeId, object: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let Value::Object(patch) = patch else {
        return Err(malformed("a strategic merge patch is an object".into()));
    };
    let Value::Object(original) = &*object else {
        return Err(malformed("the patched value is not an object".into()));
    };
    let mut work = original.clone();
    merge_map(table, Some(table.ty(id)), &mut work, patch.clone())?;
    *object = Value::Object(work);
    Ok(())
}

fn merge_map(
    table: &TypeTable,
    def: Option<&TypeDef>,
    original: &mut Object,
    mut patch: Object,
) -> Result<(), PatchError> {
    if let Some(directive) = patch.remove(PATCH) {
        match directive.as_str() {
            Some("replace") => {
                *original = clean(patch);
                return Ok(());
            }
            Some("delete") => {
                original.clear();
                return Ok(());
            }
            Some("merge") => {}
            _ => return Err(malformed(format!("unknown patch type {directive} found"))),
        }
    }
    if let Some(keep) = patch.remove(RETAIN) {
        let keep = keep
            .as_array()
            .ok_or_else(|| malformed("$retainKeys is not a list".into()))?;
        let kept = |key: &str| keep.iter().any(|k| k == key);
        if let Some((key, _)) = patch
            .iter()
            .find(|(k, v)| !k.starts_with('$') && !v.is_null() && !kept(k))
        {
            return Err(malformed(format!(
                "$retainKeys doesn't contain field {key:?} of the patch"
            )));
        }
        original.retain(|k, _| kept(k));
    }

    let mut orders = Vec::new();
    let mut deletions = Vec::new();
    let mut plain = Vec::new();
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix(SET_ORDER) {
            orders.push((field.to_owned(), list_of(&key, value)?));
        } else if let Some(field) = key.strip_prefix(DELETE_FROM) {
            deletions.push((field.to_owned(), list_of(&key, value)?));
        } else {
            plain.push((key, value));
        }
    }
    // Order is judged against the list as it was before this patch.
    let before: Vec<Vec<Value>> = orders
        .iter()
        .map(|(field, _)| {
            original
                .get(field)
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default()
        })
        .collect();
    for (field, order) in &orders {
        if let Some((_, Value::Array(items))) = plain.iter().find(|(k, _)| k == field) {
            check_order(field, items, order, merge_key(def, field))?;
        }
    }

    for (field, values) in deletions {
        if let Some(Value::Array(list)) = original.get_mut(&field) {
            list.retain(|v| !values.contains(v));
        }
    }
    for (key, value) in plain {
        let field = def.and_then(|d| d.field(&key));
        merge_value(table, field, original, key, value)?;
    }
    for ((field, order), before) in orders.into_iter().zip(before) {
        let key = merge_key(def, &field);
        if let Some(Value::Array(list)) = original.get_mut(&field) {
            *list = reorder(std::mem::take(list), &order, &before, key);
        }
    }
    Ok(())
}

fn merge_value(
    table: &TypeTable,
    field: Option<&Field>,
    original: &mut Object,
    key: String,
    value: Value,
) -> Result<(), PatchError> {
    if value.is_null() {
        original.remove(&key);
        return Ok(());
    }
    let merges = field.is_none_or(|f| f.patch_merge || !matches!(f.ty, Ty::List(_)));
    match (original.get_mut(&key), value) {
        (Some(Value::Object(old)), Value::Object(new)) => {
            let def = field.and_then(|f| object_type(table, &f.ty));
            let mut new = new;
            // `retainKeys` without `merge` still merges: the directive itself says what stays.
            if field.is_some_and(|f| matches!(f.ty, Ty::Raw | Ty::Fields)) {
                new.remove(PATCH);
                *old = clean(new);
                return Ok(());
            }
            merge_map(table, def, old, new)
        }
        (Some(Value::Array(old)), Value::Array(new)) if merges && field.is_some() => {
            let merged = merge_list(table, field, std::mem::take(old), new)?;
            *old = merged;
            Ok(())
        }
        (None, Value::Array(new)) if field.is_some_and(|f| f.patch_merge) => {
            let merged = merge_list(table, field, Vec::new(), new)?;
            original.insert(key, Value::Array(merged));
            Ok(())
        }
        (None, Value::Object(new)) => {
            let deleted = new.get(PATCH).is_some_and(|d| d == "delete");
            if !deleted {
                original.insert(key, Value::Object(clean(new)));
            }
            Ok(())
        }
        (_, new) => {
            original.insert(key, clean_value(new));
            Ok(())
        }
    }
}

fn merge_list(
    table: &TypeTable,
    field: Option<&Field>,
    mut old: Vec<Value>,
    new: Vec<Value>,
) -> Result<Vec<Value>, PatchError> {
    let item_type = field.and_then(|f| match &f.ty {
        Ty::List(item) => object_type(table, item),
        _ => None,
    });
    let Some(key) = field.and_then(|f| f.merge_key.as_deref()) else {
        if new.iter().any(Value::is_object) {
            return Err(malformed("cannot merge a list of objects that has no merge key".into()));
        }
        let (before, order) = (old.clone(), new.clone());
        for value in new {
            if !old.contains(&value) {
                old.push(value);
            }
        }
        return Ok(reorder(old, &order, &before, None));
    };
    // A `replace` element turns the whole list into its other elements.
    let replaces = |v: &Value| v.get(PATCH).is_some_and(|d| d == "replace");
    if new.iter().any(replaces) {
        let rest = new
            .into_iter()
            .filter(|v| !replaces(v) && v.get(PATCH).is_none_or(|d| d != "delete"));
        return Ok(rest.map(clean_value).collect());
    }
    // Elements of the patch keep its order; those it does not name keep their places, behind new ones.
    let (before, order) = (old.clone(), new.clone());
    for value in new {
        let Value::Object(mut item) = value else {
            return Err(malformed(format!(
                "list with merge key {key:?} holds a value that is not an object"
            )));
        };
        let id = item.get(key).cloned().ok_or_else(|| {
            let shown = Value::Object(item.clone());
            malformed(format!("map: {shown} does not contain declared merge key: {key}"))
        })?;
        let matches = |v: &Value| v.get(key) == Some(&id);
        match item.get(PATCH).map(|d| d.as_str().unwrap_or_default()) {
            Some("delete") => old.retain(|v| !matches(v)),
            Some("merge") | None => {
                item.remove(PATCH);
                match old.iter_mut().find(|v| matches(v)) {
                    Some(Value::Object(found)) => merge_map(table, item_type, found, item)?,
                    _ => {
                        let mut fresh = Object::new();
                        merge_map(table, item_type, &mut fresh, item)?;
                        old.push(Value::Object(fresh));
                    }
                }
            }
            Some(other) => return Err(malformed(format!("unknown patch type {other:?} found"))),
        }
    }
    Ok(reorder(old, &order, &before, Some(key)))
}

/// Puts the elements that `order` names into that order; the others keep their places relative to it.
fn reorder(list: Vec<Value>, order: &[Value], before: &[Value], key: Option<&str>) -> Vec<Value> {
    let position = |haystack: &[Value], value: &Value| haystack.iter().position(|v| same_element(v, value, key));
    let (mut named, mut others): (Vec<Value>, Vec<Value>) =
        list.into_iter().partition(|v| position(order, v).is_some());
    named.sort_by_key(|v| position(order, v));
    others.sort_by_key(|v| position(before, v).unwrap_or(usize::MAX));
    let mut out = Vec::with_capacity(named.len() + others.len());
    let (mut named, mut others) = (named.into_iter().peekable(), others.into_iter().peekable());
    loop {
        let other_first = match (others.peek(), named.peek()) {
            (Some(o), Some(n)) => matches!((position(before, o), position(before, n)), (Some(a), Some(b)) if a < b),
            (Some(_), None) => true,
            (None, _) => false,
        };
        match if other_first { others.next() } else { named.next() } {
            Some(value) => out.push(value),
            None => return out,
        }
    }
}

fn check_order(field: &str, items: &[Value], order: &[Value], key: Option<&str>) -> Result<(), PatchError> {
    let mut last = None;
    for item in items.iter().filter(|i| i.get(PATCH).is_none()) {
        let at = order.iter().position(|o| same_element(o, item, key));
        if at.is_none() || at < last {
            return Err(malformed(format!(
                "The order in patch list doesn't match $setElementOrder list of {field:?}"
            )));
        }
        last = at;
    }
    Ok(())
}

fn same_element(a: &Value, b: &Value, key: Option<&str>) -> bool {
    match key {
        Some(key) => a.get(key).is_some() && a.get(key) == b.get(key),
        None => a == b,
    }
}

fn merge_key<'d>(def: Option<&'d TypeDef>, field: &str) -> Option<&'d str> {
    def?.field(field)?.merge_key.as_deref()
}

fn object_type<'t>(table: &'t TypeTable, ty: &Ty) -> Option<&'t TypeDef> {
    if let Ty::Object(id) = ty {
        Some(table.ty(*id))
    } else {
        None
    }
}

fn list_of(key: &str, value: Value) -> Result<Vec<Value>, PatchError> {
    match value {
        Value::Array(list) => Ok(list),
        _ => Err(malformed(format!("{key} is not a list"))),
    }
}

/// New content without directives and without nulls.
fn clean(map: Object) -> Object {
    map.into_iter()
        .filter(|(k, v)| {
            !v.is_null() && k != PATCH && k != RETAIN && !k.starts_with(DELETE_FROM) && !k.starts_with(SET_ORDER)
        })
        .map(|(k, v)| (k, clean_value(v)))
        .collect()
}

fn clean_value(value: Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(clean(map)),
        Value::Array(list) => {
            let deleted = |v: &Value| v.get(PATCH).is_some_and(|d| d == "delete");
            Value::Array(list.into_iter().filter(|v| !deleted(v)).map(clean_value).collect())
        }
        other => other,
    }
}

fn malformed(detail: String) -> PatchError {
    PatchError::Malformed { detail }
}

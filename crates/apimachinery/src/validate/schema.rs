//! Custom kinds: their metadata, and what their schema says.

use serde_json::Value;

use super::{Errors, meta};
use crate::field::FieldError;
use crate::gvk::Gvk;
use crate::table::TypeTable;

/// Field errors of an object of an overlay kind: its metadata, and everything its schema says. `old` is given for an
/// update: parts that are as they were there are no errors.
pub fn custom(table: &TypeTable, gvk: &Gvk, object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Errors::default();
    if let Some(rule) = meta::name_rule(gvk) {
        match old {
            Some(old) => meta::update(&mut errors, object, old),
            None => meta::create(&mut errors, object, rule),
        }
    }
    if let Some(structural) = table.kind_of(gvk).and_then(|k| k.def.structural.as_ref()) {
        errors.0.extend(structural.check(object, old));
        errors.0.extend(structural.check_embedded(object));
        errors.0.extend(structural.check_lists(object, old));
    }
    errors.0
}

/// Errors of the metadata of an object that is a field of another, with paths below `path`.
pub(crate) fn embedded(path: &str, metadata: &Value) -> Vec<FieldError> {
    if !metadata.is_object() {
        return vec![FieldError::invalid(path, metadata.clone(), "must be an object")];
    }
    let mut errors = Errors::default();
    meta::embedded(&mut errors, metadata);
    let mut found = errors.0;
    for error in &mut found {
        let rest = error.path.strip_prefix("metadata").unwrap_or_default();
        error.path = format!("{path}{rest}");
    }
    found
}

//! Checks that every kind has in common: names. The checks of each kind come from apimachinery.

use apimachinery::field::FieldError;
use apimachinery::gvk::Gvk;
use apimachinery::meta;
use serde_json::Value;

pub fn create(_gvk: &Gvk, value: &Value) -> Vec<FieldError> {
    let name = meta::name(value);
    if name.is_empty() {
        return vec![FieldError::required(
            "metadata.name",
            "name or generateName is required",
        )];
    }
    let bad = name.len() > 253 || name == "." || name == ".." || name.contains(['/', '%']);
    if bad {
        vec![FieldError::invalid(
            "metadata.name",
            name,
            "must be a valid object name",
        )]
    } else {
        Vec::new()
    }
}

pub fn update(_gvk: &Gvk, _new: &Value, _old: &Value) -> Vec<FieldError> {
    Vec::new()
}

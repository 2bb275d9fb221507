//! Tables: upstream's columns per kind, and the cells of one object.
//!
//! Cells of wide columns (priority 1) are always there; clients hide them.

mod classes;
mod duration;
mod kinds;
mod more;
mod path;
mod pod;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::meta;
use crate::table::ResourceInfo;
pub use duration::human_duration;

/// One column of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct ColumnDef {
    pub name: String,
    /// `string`, `integer`, `number`, `boolean` or `date`.
    pub ty: String,
    /// `name` for the column that identifies the object.
    pub format: String,
    pub description: String,
    /// 0 always shown, 1 only by `-o wide`.
    pub priority: i32,
}

impl ColumnDef {
    /// As `columnDefinitions` of a `meta.k8s.io/v1` Table holds it.
    pub fn to_value(&self) -> Value {
        json!({
            "name": self.name, "type": self.ty, "format": self.format, "description": self.description,
            "priority": self.priority,
        })
    }
}

/// A built-in column: name, type, priority.
type Column = (&'static str, &'static str, i32);

/// The columns of a resource's table, in order. Never empty.
pub fn definitions(resource: &ResourceInfo) -> Vec<ColumnDef> {
    let def = |name: &str, ty: &str, priority| ColumnDef {
        name: name.into(),
        ty: ty.into(),
        format: if name == "Name" { "name".into() } else { String::new() },
        description: String::new(),
        priority,
    };
    if resource.custom {
        let mut out = vec![def("Name", "string", 0)];
        out.extend(resource.columns.iter().map(|c| ColumnDef {
            format: c.format.clone(),
            description: c.description.clone(),
            ..def(&c.name, &c.ty, c.priority)
        }));
        if resource.columns.is_empty() {
            out.push(def("Age", "date", 0));
        }
        return out;
    }
    let columns = kinds::columns(&resource.group, &resource.plural);
    columns
        .iter()
        .map(|(name, ty, priority)| def(name, ty, *priority))
        .collect()
}

/// The cells of one object, as many as [`definitions`] has columns.
pub fn row(resource: &ResourceInfo, object: &Value, now: Timestamp) -> Vec<Value> {
    if resource.custom {
        let mut out = vec![Value::from(meta::name(object))];
        out.extend(
            resource
                .columns
                .iter()
                .map(|c| path::cell(object, &c.json_path, &c.ty, now)),
        );
        if resource.columns.is_empty() {
            out.push(age(object, now));
        }
        return out;
    }
    kinds::cells(&resource.group, &resource.plural, object, now)
}

/// Conditions of a row: finished pods have one.
pub fn row_conditions(resource: &ResourceInfo, object: &Value) -> Vec<Value> {
    if (resource.group.as_str(), resource.plural.as_str()) != ("", "pods") {
        return Vec::new();
    }
    let (reason, message) = match object["status"]["phase"].as_str() {
        Some("Succeeded") => ("Succeeded", "The pod has completed successfully."),
        Some("Failed") => ("Failed", "The pod failed."),
        _ => return Vec::new(),
    };
    vec![json!({ "type": "Completed", "status": "True", "reason": reason, "message": message })]
}

fn age(object: &Value, now: Timestamp) -> Value {
    since(Some(meta::creation_timestamp(object)), now).into()
}

/// Time since `at`; `<unknown>` if there is none.
fn since(at: Option<&str>, now: Timestamp) -> String {
    match at.filter(|t| !t.is_empty()).and_then(|t| crate::time::parse(t).ok()) {
        Some(at) => human_duration(now.duration_since(at)),
        None => "<unknown>".into(),
    }
}

/// Text at a path of keys; empty if there is none.
fn text<'v>(object: &'v Value, path: &[&str]) -> &'v str {
    at(object, path).and_then(Value::as_str).unwrap_or_default()
}

/// Whole number at a path of keys; 0 if there is none.
fn int(object: &Value, path: &[&str]) -> i64 {
    at(object, path).and_then(Value::as_i64).unwrap_or_default()
}

/// Elements of a list at a path of keys.
fn list<'v>(object: &'v Value, path: &[&str]) -> &'v [Value] {
    at(object, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn at<'v>(object: &'v Value, path: &[&str]) -> Option<&'v Value> {
    path.iter().try_fold(object, |v, key| v.get(key))
}

#[cfg(test)]
mod tests;

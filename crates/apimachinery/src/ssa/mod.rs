//! Server-side apply: who owns which field, and how an applied configuration merges into an object.
//!
//! An object's `metadata.managedFields` names, per manager, the fields it set last. Ordinary writes move ownership to the
//! writer ([`track`]); an apply states the whole of what its manager wants ([`apply`]): fields it names are merged and
//! owned, fields it named before and no longer does go unless someone else owns them, and a field that another manager
//! holds with another value is a conflict unless forced. What is one field and what has parts is the type table's:
//! atomic, granular, sets, lists by key.
//!
//! Entries of other versions of the kind are kept as they are: nothing here converts between versions.
//!
//! # Source
//! KEP-555; behaviour as `k8s.io/apimachinery` 0.36 with `structured-merge-diff` v6.

mod conflict;
mod diff;
mod managed;
mod merge;
mod set;
mod shape;

use serde_json::{Map, Value};

use crate::codec;
use crate::gvk::Gvk;
use crate::meta;
use crate::table::TypeTable;
pub use conflict::{ApplyError, Conflict};
use managed::{Entry, Managed};
pub use set::Set;
use shape::Shape;

/// Manager of the fields that an object had before its ownership was tracked.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// The manager whose client-side apply kept its last configuration in an annotation.
const KUBECTL: &str = "kubectl";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Fields that nobody owns: the server's own, and those that name the object.
const UNOWNED: [&str; 11] = [
    "apiVersion",
    "kind",
    "metadata",
    "metadata.name",
    "metadata.namespace",
    "metadata.creationTimestamp",
    "metadata.selfLink",
    "metadata.uid",
    "metadata.generation",
    "metadata.managedFields",
    "metadata.resourceVersion",
];

/// Who writes, and through what.
#[derive(Clone, Copy, Debug)]
pub struct Writer<'a> {
    pub manager: &'a str,
    /// Empty for the object itself.
    pub subresource: &'a str,
    /// Now, RFC 3339 with seconds.
    pub now: &'a str,
    /// Top-level fields this write cannot set (`status` on the main resource): never owned through it.
    pub ignored: &'a [&'a str],
}

/// Sets `new.metadata.managedFields` after a create (`live` absent), update or patch.
///
/// `sent` is what the client sent as managedFields: `[]` or `[{}]` ends the tracking of the object, a well-formed list
/// replaces the live entries first, anything else leaves them. An object that is not tracked stays so.
pub fn track(
    table: &TypeTable,
    gvk: &Gvk,
    live: Option<&Value>,
    new: &mut Value,
    sent: Option<Value>,
    writer: &Writer<'_>,
) {
    if let Some(metadata) = meta::metadata_mut(new) {
        metadata.remove("managedFields");
    }
    let present = live.and_then(|l| l["metadata"].get("managedFields"));
    let live_entries = || present.cloned().and_then(Managed::decode);
    let mut managed = match sent {
        // The usual write sends back what it read: nothing to check, nothing to copy.
        Some(sent) if Some(&sent) == present => Managed::decode(sent).unwrap_or_default(),
        Some(sent) if writer.subresource.is_empty() => match managed::is_reset(&sent) {
            true => Managed::default(),
            false => Managed::decode_foreign(sent)
                .filter(|m| !m.entries.is_empty())
                .or_else(live_entries)
                .unwrap_or_default(),
        },
        _ => live_entries().unwrap_or_default(),
    };
    if managed.entries.is_empty() && live.is_some() {
        return;
    }
    let shape = Shape::of_kind(table, gvk);
    managed.update(table, shape, gvk, live, new, writer);
    managed.store(new);
}

/// Merges `config` into `live` (absent: an object is made) on behalf of `writer.manager`. The result has its
/// managedFields; it is not defaulted, validated or admitted.
///
/// `config` is decoded and not defaulted, so that only what the client wrote is owned.
///
/// # Errors
/// `Conflicts` unless forced; `Malformed` for lists whose items cannot be told apart.
pub fn apply(
    table: &TypeTable,
    gvk: &Gvk,
    live: Option<&Value>,
    config: &Value,
    writer: &Writer<'_>,
    force: bool,
) -> Result<Value, ApplyError> {
    let shape = Shape::of_kind(table, gvk);
    merge::check(table, shape, config).map_err(|detail| ApplyError::Malformed {
        object: object_name(gvk, config),
        detail,
    })?;
    let mut base = live.cloned().unwrap_or_else(|| Value::Object(Map::new()));
    let entries = base
        .get_mut("metadata")
        .and_then(Value::as_object_mut)
        .and_then(|m| m.remove("managedFields"));
    let mut managed = entries.and_then(Managed::decode).unwrap_or_default();
    if managed.entries.is_empty() && live.is_some() {
        let before = Writer {
            manager: BEFORE_FIRST_APPLY,
            subresource: "",
            ..*writer
        };
        managed.update(table, shape, gvk, None, &base, &before);
    }
    let mut applied = managed.apply(table, shape, gvk, &base, config, writer, force);
    if let Err(ApplyError::Conflicts(conflicts)) = &applied
        && writer.manager == KUBECTL
        && let Some(allowed) = last_applied(table, shape, gvk, &base)
    {
        // What client-side apply set and nobody changed since is kubectl's already.
        let left: Vec<Conflict> = conflicts.iter().filter(|c| !allowed.has(&c.path)).cloned().collect();
        applied = match left.is_empty() {
            true => managed.apply(table, shape, gvk, &base, config, writer, true),
            false => Err(ApplyError::Conflicts(left)),
        };
    }
    let (mut object, managed) = applied?;
    if writer.manager == KUBECTL && meta::annotation(&object, LAST_APPLIED).is_some_and(|a| !a.is_empty()) {
        let text = format!("{}\n", without_last_applied(config));
        object["metadata"]["annotations"][LAST_APPLIED] = text.into();
    }
    managed.store(&mut object);
    Ok(object)
}

/// `default/web; apps/v1, Kind=Deployment`, as messages name the configuration.
pub fn object_name(gvk: &Gvk, config: &Value) -> String {
    format!("{}/{}; {gvk}", meta::namespace(config), meta::name(config))
}

fn without_last_applied(config: &Value) -> Value {
    let mut config = config.clone();
    if let Some(annotations) = config["metadata"].get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.remove(LAST_APPLIED);
    }
    config
}

/// Fields of the configuration that client-side apply remembers, as far as the object still has their values.
fn last_applied(table: &TypeTable, shape: Shape<'_>, gvk: &Gvk, live: &Value) -> Option<Set> {
    let text = meta::annotation(live, LAST_APPLIED)?;
    let value: Value = serde_json::from_str(text).ok()?;
    let last = codec::decode_value(table, gvk, value, codec::Validation::Ignore)
        .ok()?
        .value;
    let mut set = merge::field_set(table, shape, &last);
    let diff = diff::compare(table, shape, Some(&last), Some(live));
    for part in [&diff.modified, &diff.added, &diff.removed] {
        set.subtract(part);
    }
    Some(set)
}

fn unowned(ignored: &[&str], set: &mut Set) {
    for name in ignored {
        set.remove_tree(name);
    }
    for path in UNOWNED {
        set.remove(&path.split('.').map(|p| format!("f:{p}")).collect::<Vec<_>>());
    }
}

fn entry_of<'a>(entries: &'a mut [Entry], like: &Entry) -> Option<&'a mut Entry> {
    entries.iter_mut().find(|e| e.same_manager(like))
}

#[cfg(test)]
mod laws;
#[cfg(test)]
mod tests;

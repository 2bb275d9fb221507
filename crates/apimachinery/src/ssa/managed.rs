//! The entries of `metadata.managedFields`: reading, moving ownership, bounding their number, writing.

use std::cmp::Ordering;

use serde_json::{Map, Value, json};

use super::conflict::{ApplyError, Conflict};
use super::diff::{self, Diff};
use super::merge;
use super::set::Set;
use super::shape::Shape;
use super::{Writer, entry_of, unowned};
use crate::gvk::Gvk;
use crate::meta;
use crate::table::TypeTable;

/// Most entries of ordinary writes; the oldest beyond share one.
const UPDATE_MANAGERS_MAX: usize = 10;
/// Name of that shared entry.
const ANCIENT: &str = "ancient-changes";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Operation {
    Apply,
    Update,
}

/// One manager's fields.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub manager: String,
    pub operation: Operation,
    pub api_version: String,
    pub subresource: String,
    pub time: Option<String>,
    pub set: Set,
}

impl Entry {
    fn new(writer: &Writer<'_>, operation: Operation, gvk: &Gvk, set: Set) -> Entry {
        Entry {
            manager: writer.manager.to_owned(),
            operation,
            api_version: gvk.api_version(),
            subresource: writer.subresource.to_owned(),
            time: Some(writer.now.to_owned()),
            set,
        }
    }

    /// An applier is one whatever the version; a manager of updates is one per version.
    pub(super) fn same_manager(&self, other: &Entry) -> bool {
        self.manager == other.manager
            && self.operation == other.operation
            && self.subresource == other.subresource
            && (self.operation == Operation::Apply || self.api_version == other.api_version)
    }

    fn display(&self) -> String {
        let mut out = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            out += &format!(" with subresource {:?}", self.subresource);
        }
        if self.operation == Operation::Update {
            out += &format!(" using {}", self.api_version);
        }
        out
    }

    fn order(&self, other: &Entry) -> Ordering {
        self.operation
            .cmp(&other.operation)
            .then_with(|| self.time.cmp(&other.time))
            .then_with(|| self.manager.cmp(&other.manager))
            .then_with(|| self.api_version.cmp(&other.api_version))
            .then_with(|| self.subresource.cmp(&other.subresource))
    }

    fn decode(mut value: Value, foreign: bool) -> Option<Entry> {
        let mut text = |key: &str| match value.get_mut(key).map(Value::take) {
            Some(Value::String(text)) => text,
            _ => String::new(),
        };
        let operation = match text("operation").as_str() {
            "Apply" => Operation::Apply,
            "Update" => Operation::Update,
            _ => return None,
        };
        let api_version = text("apiVersion");
        if api_version.is_empty() || text("fieldsType") != "FieldsV1" {
            return None;
        }
        let (manager, subresource) = (text("manager"), text("subresource"));
        let time = Some(text("time")).filter(|t| !t.is_empty());
        let set = match value.get_mut("fieldsV1").map(Value::take) {
            None | Some(Value::Null) => Set::default(),
            Some(fields) if foreign => Set::parse(&fields)?,
            Some(Value::Object(fields)) => Set(fields),
            Some(_) => return None,
        };
        Some(Entry {
            manager,
            operation,
            api_version,
            subresource,
            time,
            set,
        })
    }

    fn encode(self) -> Value {
        let mut out = Map::new();
        let operation = match self.operation {
            Operation::Apply => "Apply",
            Operation::Update => "Update",
        };
        out.insert("apiVersion".into(), self.api_version.into());
        out.insert("fieldsType".into(), "FieldsV1".into());
        out.insert("fieldsV1".into(), Value::Object(self.set.0));
        out.insert("manager".into(), self.manager.into());
        out.insert("operation".into(), operation.into());
        if !self.subresource.is_empty() {
            out.insert("subresource".into(), self.subresource.into());
        }
        if let Some(time) = self.time {
            out.insert("time".into(), time.into());
        }
        Value::Object(out)
    }
}

/// Whether a client sent the lists that end the tracking of an object: `[]`, `[{}]`.
pub(super) fn is_reset(sent: &Value) -> bool {
    match sent.as_array().map(Vec::as_slice) {
        Some([]) => true,
        Some([one]) => *one == json!({}),
        _ => false,
    }
}

/// All entries of an object.
#[derive(Clone, Debug, Default)]
pub(super) struct Managed {
    pub entries: Vec<Entry>,
}

impl Managed {
    /// Reads what this module wrote; `None` if any entry is malformed.
    pub(super) fn decode(value: Value) -> Option<Managed> {
        Managed::read(value, false)
    }

    /// As [`Managed::decode`], for what a client sent.
    pub(super) fn decode_foreign(value: Value) -> Option<Managed> {
        Managed::read(value, true)
    }

    fn read(value: Value, foreign: bool) -> Option<Managed> {
        let Value::Array(entries) = value else { return None };
        let entries = entries.into_iter().map(|e| Entry::decode(e, foreign));
        Some(Managed {
            entries: entries.collect::<Option<_>>()?,
        })
    }

    /// Writes the entries into the object's metadata; none leave no field.
    pub(super) fn store(mut self, object: &mut Value) {
        let Some(metadata) = meta::metadata_mut(object) else {
            return;
        };
        self.entries.sort_by(Entry::order);
        if self.entries.is_empty() {
            metadata.remove("managedFields");
        } else {
            let entries = self.entries.into_iter().map(Entry::encode).collect();
            metadata.insert("managedFields".into(), Value::Array(entries));
        }
    }

    /// Gives every field that differs between `live` and `new` to an ordinary writer.
    pub(super) fn update(
        &mut self,
        table: &TypeTable,
        shape: Shape<'_>,
        gvk: &Gvk,
        live: Option<&Value>,
        new: &Value,
        writer: &Writer<'_>,
    ) {
        let mut diff = diff::compare(table, shape, live, Some(new));
        if diff.is_empty() {
            return;
        }
        for part in [&mut diff.added, &mut diff.modified, &mut diff.removed] {
            for name in writer.ignored {
                part.remove_tree(name);
            }
        }
        let Diff {
            added,
            modified,
            removed,
        } = diff;
        let mut mine = added;
        mine.unite(&modified);
        let version = gvk.api_version();
        for entry in self.entries.iter_mut().filter(|e| e.api_version == version) {
            entry.set.subtract(&mine);
            entry.set.subtract(&removed);
        }
        unowned(writer.ignored, &mut mine);
        if !mine.is_empty() {
            let entry = Entry::new(writer, Operation::Update, gvk, mine);
            match entry_of(&mut self.entries, &entry) {
                Some(old) => {
                    old.set.unite(&entry.set);
                    old.time = entry.time;
                }
                None => self.entries.push(entry),
            }
        }
        self.entries.retain(|e| !e.set.is_empty());
        self.cap();
    }

    /// The result of applying `config` to `live` (which has no managedFields), and who owns what then.
    #[expect(
        clippy::too_many_arguments,
        reason = "table, shape and kind belong together and have no type of their own"
    )]
    pub(super) fn apply(
        &self,
        table: &TypeTable,
        shape: Shape<'_>,
        gvk: &Gvk,
        live: &Value,
        config: &Value,
        writer: &Writer<'_>,
        force: bool,
    ) -> Result<(Value, Managed), ApplyError> {
        let mut managed = self.clone();
        let mut merged = merge::merge(table, shape, Some(live), config);
        let mut set = merge::field_set(table, shape, config);
        for name in writer.ignored {
            set.remove_tree(name);
        }
        let mut entry = Entry::new(writer, Operation::Apply, gvk, set);
        let last = entry_of(&mut managed.entries, &entry).map(|e| std::mem::replace(e, entry.clone()));
        if last.is_none() {
            managed.entries.push(entry.clone());
        }
        if let Some(last) = last.as_ref().filter(|l| !l.set.is_empty()) {
            merged = managed.prune(table, shape, merged, &last.set);
            // An object that lost all its fields is gone now; where the configuration names it as empty, it is empty.
            merged = merge::merge(table, shape, Some(&merged), config);
        }

        let mut diff = diff::compare(table, shape, Some(live), Some(&merged));
        for part in [&mut diff.added, &mut diff.modified, &mut diff.removed] {
            for name in writer.ignored {
                part.remove_tree(name);
            }
        }
        let same = diff.is_empty();
        let mut changed = diff.added;
        changed.unite(&diff.modified);
        let mut conflicts = Vec::new();
        for other in &mut managed.entries {
            if other.same_manager(&entry) || other.api_version != entry.api_version {
                continue;
            }
            let taken = other.set.intersection(&changed);
            let manager = other.display();
            conflicts.extend(taken.paths().into_iter().map(|path| Conflict {
                manager: manager.clone(),
                path,
            }));
            other.set.subtract(&taken);
            other.set.subtract(&diff.removed);
        }
        if !force && !conflicts.is_empty() {
            conflicts.sort_by(|a, b| a.manager.cmp(&b.manager));
            return Err(ApplyError::Conflicts(conflicts));
        }
        unowned(writer.ignored, &mut entry.set);
        if let Some(last) = last.filter(|_| same) {
            // Nothing changed, so the entry keeps its time and the object its bytes.
            entry.time = last.time;
        }
        if let Some(mine) = entry_of(&mut managed.entries, &entry) {
            *mine = entry;
        }
        managed.entries.retain(|e| !e.set.is_empty());
        Ok((merged, managed))
    }

    /// Takes out what the manager applied last time, not this time, and nobody else owns.
    fn prune(&self, table: &TypeTable, shape: Shape<'_>, merged: Value, last: &Set) -> Value {
        let named = |set: &Set| merge::with_named(table, shape, set);
        let fields = |value: &Value| named(&merge::field_set(table, shape, value));
        let empty = || Value::Object(Map::new());
        let take = |what: &Set| merge::remove(table, shape, &merged, what).unwrap_or_else(empty);
        let last = named(last);
        let all = fields(&merged);
        let mut owned = Set::default();
        for entry in &self.entries {
            owned.unite(&entry.set);
        }
        // What others own comes back.
        let mut gone = all.clone();
        gone.subtract(&fields(&take(&last)));
        gone.subtract(&named(&owned));
        // What went with its container but was never this manager's comes back too.
        let pruned = take(&gone);
        let mut dangling = all;
        dangling.subtract(&fields(&pruned));
        take(&dangling.intersection(&last))
    }

    /// Keeps the newest managers of ordinary writes and joins older ones per version.
    fn cap(&mut self) {
        let mut updates = self.entries.iter().filter(|e| e.operation == Operation::Update).count();
        if updates <= UPDATE_MANAGERS_MAX {
            return;
        }
        self.entries.sort_by(Entry::order);
        let mut at = self.entries.partition_point(|e| e.operation == Operation::Apply);
        while at < self.entries.len() && updates > UPDATE_MANAGERS_MAX {
            let oldest = &self.entries[at];
            let next = (at + 1..self.entries.len()).find(|i| self.entries[*i].api_version == oldest.api_version);
            let Some(next) = next else {
                at += 1;
                continue;
            };
            let second = self.entries.remove(next);
            let bucket = &mut self.entries[at];
            bucket.manager = ANCIENT.into();
            bucket.subresource = String::new();
            bucket.set.unite(&second.set);
            bucket.time = second.time;
            updates -= 1;
        }
    }
}

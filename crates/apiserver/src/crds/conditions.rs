//! Which names a definition gets, and the conditions that follow. Pure.
//!
//! # Source
//! The naming, establishing, nonstructuralschema and apiapproval controllers of `k8s.io/apiextensions-apiserver` 0.36.

use std::collections::BTreeMap;

use apimachinery::table::TypeTable;
use apimachinery::validate;
use serde_json::{Value, json};

use super::definition::{Known, Names};

/// A condition: type, status, reason, message.
pub type Condition = (&'static str, &'static str, String, String);

/// What of a definition's status follows from itself alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Needs {
    /// What keeps its schema from being structural.
    violations: Option<String>,
    /// Its present conditions.
    present: Vec<(String, String, String, String)>,
}

/// A change of a definition's status.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    accepted: Names,
    set: Vec<Condition>,
    remove: Vec<&'static str>,
}

impl Update {
    pub fn apply(&self, definition: &mut Value, now: &str) {
        definition["status"]["acceptedNames"] = self.accepted.to_value();
        for (ty, status, reason, message) in &self.set {
            set(definition, now, ty, status, reason, message);
        }
        if let Some(list) = definition["status"].get_mut("conditions").and_then(Value::as_array_mut) {
            list.retain(|c| !self.remove.iter().any(|r| c["type"] == *r));
        }
    }
}

/// Sets a condition; its time changes with its status only.
pub fn set(definition: &mut Value, now: &str, ty: &str, status: &str, reason: &str, message: &str) {
    let slot = &mut definition["status"]["conditions"];
    if !slot.is_array() {
        *slot = json!([]);
    }
    let Some(list) = slot.as_array_mut() else { return };
    let mut new =
        json!({"type": ty, "status": status, "lastTransitionTime": now, "reason": reason, "message": message});
    match list.iter_mut().find(|c| c["type"] == ty) {
        Some(old) => {
            if old["status"] == status {
                new["lastTransitionTime"] = old["lastTransitionTime"].clone();
            }
            *old = new;
        }
        None => list.push(new),
    }
}

/// Reads what [`plan`] needs of a definition that changed.
pub fn needs(definition: &Value) -> Needs {
    let mut violations = Vec::new();
    for (i, version) in definition["spec"]["versions"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let path = format!("spec.versions[{i}].schema.openAPIV3Schema");
        violations.extend(validate::structural_errors(
            &path,
            &version["schema"]["openAPIV3Schema"],
        ));
    }
    let text = |c: &Value, key: &str| c[key].as_str().unwrap_or_default().to_owned();
    let present = definition["status"]["conditions"].as_array().into_iter().flatten();
    Needs {
        violations: (!violations.is_empty()).then(|| {
            let texts: Vec<String> = violations.iter().map(ToString::to_string).collect();
            match &texts[..] {
                [one] => one.clone(),
                all => format!("[{}]", all.join(", ")),
            }
        }),
        present: present
            .map(|c| {
                (
                    text(c, "type"),
                    text(c, "status"),
                    text(c, "reason"),
                    text(c, "message"),
                )
            })
            .collect(),
    }
}

/// What must change in a definition's status; `None` if nothing. `fresh` is given when the definition itself changed;
/// otherwise only names that another one took or left can matter.
pub fn plan(known: &BTreeMap<String, Known>, name: &str, builtin: &TypeTable, fresh: Option<Needs>) -> Option<Update> {
    let this = known.get(name)?;
    let (accepted, conflict) = names(known, name, this, builtin);
    let established = this.established || conflict.is_none();
    if fresh.is_none() && accepted == this.accepted && established == this.established {
        return None;
    }
    let mut wanted: Vec<Condition> = Vec::new();
    match &conflict {
        None => wanted.push((
            "NamesAccepted",
            "True",
            "NoConflicts".into(),
            "no conflicts found".into(),
        )),
        Some((reason, message)) => wanted.push(("NamesAccepted", "False", (*reason).into(), message.clone())),
    }
    // Once established, always: what is stored must stay reachable.
    match established {
        true => wanted.push((
            "Established",
            "True",
            "InitialNamesAccepted".into(),
            "the initial names have been accepted".into(),
        )),
        false => wanted.push((
            "Established",
            "False",
            "NotAccepted".into(),
            "not all names are accepted".into(),
        )),
    }
    let mut remove = Vec::new();
    let fresh = fresh.unwrap_or_default();
    match fresh.violations {
        Some(why) => wanted.push(("NonStructuralSchema", "True", "Violations".into(), why)),
        None => remove.push("NonStructuralSchema"),
    }
    match approval(this) {
        Some(condition) => wanted.push(condition),
        None => remove.push("KubernetesAPIApprovalPolicyConformant"),
    }
    let is_there = |c: &Condition| {
        let mut present = fresh.present.iter();
        present.any(|(ty, status, reason, message)| *ty == c.0 && *status == c.1 && *reason == c.2 && *message == c.3)
    };
    remove.retain(|ty| fresh.present.iter().any(|(present, ..)| present == ty));
    wanted.retain(|c| !is_there(c));
    let nothing = wanted.is_empty() && remove.is_empty() && accepted == this.accepted;
    (!nothing).then_some(Update {
        accepted,
        set: wanted,
        remove,
    })
}

fn approval(this: &Known) -> Option<Condition> {
    const TYPE: &str = "KubernetesAPIApprovalPolicyConformant";
    let annotation = this.approval.as_deref();
    if let Some((given, why)) = validate::approval_problem(&this.group, annotation) {
        let reason = if given {
            "InvalidAnnotation"
        } else {
            "MissingAnnotation"
        };
        return Some((TYPE, "False", reason.into(), why));
    }
    // Only groups of the community need one.
    validate::approval_problem(&this.group, None)?;
    let annotation = annotation.unwrap_or_default();
    Some(match annotation.starts_with("unapproved") {
        true => (
            TYPE,
            "False",
            "UnapprovedAnnotation".into(),
            format!("not approved: {annotation:?}"),
        ),
        false => (
            TYPE,
            "True",
            "ApprovedAnnotation".into(),
            format!("approved in {annotation}"),
        ),
    })
}

/// The names that a definition can have beside the others of its group, and the last conflict if it cannot have all.
fn names(
    known: &BTreeMap<String, Known>,
    name: &str,
    this: &Known,
    builtin: &TypeTable,
) -> (Names, Option<(&'static str, String)>) {
    let (mut resources, mut kinds) = (Vec::new(), Vec::new());
    for (_, other) in known.iter().filter(|(n, k)| *n != name && k.group == this.group) {
        let names = &other.accepted;
        resources.extend([names.plural.clone(), names.singular.clone()]);
        resources.extend(names.short.iter().cloned());
        kinds.extend([names.kind.clone(), names.list_kind.clone()]);
    }
    for info in builtin.resources().filter(|r| r.group == this.group) {
        resources.extend([info.plural.clone(), info.singular.clone()]);
        resources.extend(info.short_names.iter().cloned());
        kinds.extend([info.kind.clone(), info.list_kind()]);
    }
    let (asked, mut granted) = (&this.names, this.accepted.clone());
    let mut conflict = None;
    let taken = |all: &[String], name: &str| !name.is_empty() && all.iter().any(|n| n == name);
    let in_use = |name: &str| format!("{name:?} is already in use");
    for (field, asked, granted, all) in [
        ("PluralConflict", &asked.plural, &mut granted.plural, &resources),
        ("SingularConflict", &asked.singular, &mut granted.singular, &resources),
    ] {
        match asked != granted && taken(all, asked) {
            true => conflict = Some((field, in_use(asked))),
            false => granted.clone_from(asked),
        }
    }
    let before = &this.accepted.short;
    let short: Vec<&String> = asked
        .short
        .iter()
        .filter(|s| !before.contains(s) && taken(&resources, s))
        .collect();
    match short.as_slice() {
        [] => granted.short.clone_from(&asked.short),
        all => {
            let texts: Vec<String> = all.iter().map(|s| in_use(s)).collect();
            let text = match &texts[..] {
                [one] => one.clone(),
                all => format!("[{}]", all.join(", ")),
            };
            conflict = Some(("ShortNamesConflict", text));
        }
    }
    for (field, asked, granted, all) in [
        ("KindConflict", &asked.kind, &mut granted.kind, &kinds),
        ("ListKindConflict", &asked.list_kind, &mut granted.list_kind, &kinds),
    ] {
        match asked != granted && taken(all, asked) {
            true => conflict = Some((field, in_use(asked))),
            false => granted.clone_from(asked),
        }
    }
    granted.categories.clone_from(&asked.categories);
    (granted, conflict)
}

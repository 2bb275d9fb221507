//! What an object's owners and dependents mean for it. Pure.

use reconcile::Owner;

/// The finalizer of a foreground deletion.
pub const FOREGROUND: &str = "foregroundDeletion";
/// The finalizer of an orphaning deletion.
pub const ORPHAN: &str = "orphan";

/// What is known of one owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnerState {
    /// It lives.
    Solid,
    /// It is being deleted and waits for its dependents.
    Waiting,
    /// It does not exist (any more).
    Absent,
}

/// What happens to an object with owners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It stays as it is.
    Keep,
    /// It stays, without its references to these uids.
    Unref(Vec<String>),
    /// It is deleted, and nobody waits for its own dependents.
    DeleteBackground,
    /// It is deleted, and its own dependents first: the owner waits for all of them.
    DeleteForeground,
}

/// Decides over all owners at once: one solid owner keeps the object, and then the others are only references.
pub fn fate(owners: &[(Owner, OwnerState)], has_blocking_dependents: bool) -> Fate {
    let with = |state: OwnerState| owners.iter().filter(move |(_, s)| *s == state).map(|(o, _)| o);
    if owners.is_empty() {
        return Fate::Keep;
    }
    if with(OwnerState::Solid).next().is_some() {
        let dead: Vec<String> = owners
            .iter()
            .filter(|(_, s)| *s != OwnerState::Solid)
            .map(|(o, _)| o.uid.clone())
            .collect();
        return if dead.is_empty() { Fate::Keep } else { Fate::Unref(dead) };
    }
    if with(OwnerState::Waiting).next().is_some() && has_blocking_dependents {
        return Fate::DeleteForeground;
    }
    Fate::DeleteBackground
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(uid: &str) -> Owner {
        Owner {
            api_version: "v1".into(),
            kind: "X".into(),
            name: uid.into(),
            uid: uid.into(),
            controller: false,
            block_owner_deletion: true,
        }
    }

    #[test]
    fn one_living_owner_keeps_an_object() {
        use OwnerState::{Absent, Solid, Waiting};
        let of = |states: &[OwnerState]| -> Vec<_> {
            states
                .iter()
                .enumerate()
                .map(|(i, s)| (owner(&i.to_string()), *s))
                .collect()
        };
        assert_eq!(fate(&[], true), Fate::Keep);
        assert_eq!(fate(&of(&[Solid]), true), Fate::Keep);
        assert_eq!(
            fate(&of(&[Solid, Absent, Waiting]), false),
            Fate::Unref(vec!["1".into(), "2".into()])
        );
        assert_eq!(fate(&of(&[Absent, Absent]), true), Fate::DeleteBackground);
        assert_eq!(fate(&of(&[Absent, Waiting]), true), Fate::DeleteForeground);
        assert_eq!(fate(&of(&[Waiting]), false), Fate::DeleteBackground);
    }
}

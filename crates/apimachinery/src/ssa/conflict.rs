//! What an apply is refused for.

use std::fmt::Write;

use super::set;
use crate::status::Status;

/// A field that someone else owns with another value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The owner as messages name it: `"kubectl" with subresource "scale" using apps/v1`.
    pub manager: String,
    pub(super) path: Vec<String>,
}

impl Conflict {
    /// `.spec.replicas`.
    pub fn field(&self) -> String {
        set::display(&self.path)
    }
}

/// Why an apply did not happen.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Ordered by manager, then by path. Never empty.
    #[error("{}", message(.0))]
    Conflicts(Vec<Conflict>),
    /// The configuration does not fit its kind.
    #[error("failed to create typed patch object ({object}): {detail}")]
    Malformed { object: String, detail: String },
}

impl ApplyError {
    /// 409 with one cause per conflict; 500 for a malformed configuration, as upstream has it.
    pub fn to_status(&self) -> Status {
        match self {
            ApplyError::Conflicts(conflicts) => {
                let causes = conflicts
                    .iter()
                    .map(|c| (format!("conflict with {}", c.manager), c.field()))
                    .collect();
                Status::apply_conflict(&self.to_string(), causes)
            }
            ApplyError::Malformed { .. } => Status::untyped(&self.to_string()),
        }
    }
}

fn message(conflicts: &[Conflict]) -> String {
    if let [one] = conflicts {
        return format!(
            "Apply failed with 1 conflict: conflict with {}: {}",
            one.manager,
            one.field()
        );
    }
    let mut out = format!("Apply failed with {} conflicts: ", conflicts.len());
    let mut last = None;
    for conflict in conflicts {
        if last != Some(&conflict.manager) {
            let gap = if last.is_some() { "\n" } else { "" };
            // Writing to a String cannot fail.
            let _ = write!(out, "{gap}conflicts with {}:", conflict.manager);
            last = Some(&conflict.manager);
        }
        let _ = write!(out, "\n- {}", conflict.field());
    }
    out
}

//! The three patches: JSON patch (RFC 6902), merge patch (RFC 7386) and strategic merge.
//!
//! All work on trees and leave the object unchanged when they fail. The caller checks the result with
//! [`crate::codec::decode_value`], as a patch may bring unknown fields and wrong types.

mod json;
mod merge;
mod strategic;

use serde_json::Value;

use crate::gvk::Gvk;
use crate::status::Status;
use crate::table::TypeTable;

/// Why a patch cannot be applied.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PatchError {
    /// The patch itself is malformed.
    #[error("error decoding patch: {detail}")]
    Malformed { detail: String },
    #[error("The allowed maximum operations in a JSON patch is {limit}, got {found}")]
    TooManyOperations { limit: usize, found: usize },
    /// The patch is well-formed and does not fit the object.
    #[error("{detail}")]
    Unprocessable { detail: String },
    #[error("Unable to accumulate copy size: limit is {limit} bytes")]
    CopyTooLarge { limit: usize },
    /// Strategic merge of a kind without merge rules.
    #[error("strategic merge patch is not supported for {kind}")]
    Unsupported { kind: String },
}

impl PatchError {
    /// 400 for a malformed patch, 413 over a limit, 415 for an unsupported kind, 422 if it does not fit the object.
    pub fn to_status(&self) -> Status {
        match self {
            PatchError::Malformed { .. } => Status::bad_request(&self.to_string()),
            PatchError::TooManyOperations { .. } | PatchError::CopyTooLarge { .. } => {
                let mut status = Status::too_large(0);
                status.message = format!("Request entity too large: {self}");
                status
            }
            PatchError::Unprocessable { .. } => Status::unprocessable(),
            PatchError::Unsupported { .. } => Status::unsupported_media_type(&[
                "application/json-patch+json",
                "application/merge-patch+json",
                "application/apply-patch+yaml",
            ]),
        }
    }
}

/// Applies the operations of a JSON patch (`ops`: the array) in order; all or nothing.
pub fn json_patch(object: &mut Value, ops: &Value) -> Result<(), PatchError> {
    json::apply(object, ops)
}

/// Applies a merge patch: objects merge, null deletes, everything else replaces.
pub fn merge_patch(object: &mut Value, patch: &Value) -> Result<(), PatchError> {
    if !patch.is_object() {
        return Err(PatchError::Malformed {
            detail: "a merge patch is an object".into(),
        });
    }
    merge::apply(object, patch);
    Ok(())
}

/// Applies a strategic merge patch by the kind's merge keys and strategies.
///
/// # Errors
/// `Unsupported` for kinds of an overlay: they have no merge rules (answer 415).
pub fn strategic_merge(table: &TypeTable, gvk: &Gvk, object: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let unsupported = || PatchError::Unsupported { kind: gvk.to_string() };
    let kind = table.kind_of(gvk).ok_or_else(unsupported)?;
    if table.resource_of_kind(gvk).is_some_and(|r| r.custom) {
        return Err(unsupported());
    }
    strategic::apply(table, kind.id, object, patch)
}

#[cfg(test)]
mod laws;
#[cfg(test)]
mod tests;

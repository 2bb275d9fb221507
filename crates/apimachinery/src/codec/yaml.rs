//! YAML as clients send it: one document, JSON's data model, bounded expansion.

use serde::de::DeserializeSeed;
use serde_json::Value;
use serde_saphyr::options::{DuplicateKeyPolicy, MergeKeyPolicy};

use super::object::Seed;

/// Longest line that is not folded; more than any body holds.
const LINE_CHARS_MAX: usize = 1 << 30;

fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::LastWins,
        merge_keys: MergeKeyPolicy::Merge,
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
            max_replay_stack_depth: 32,
            max_alias_expansions_per_anchor: 1_000,
        },
    }
}

/// Reads the one document through `seed`.
pub(super) fn with_deserializer(bytes: &[u8], seed: Seed<'_>) -> Result<Value, String> {
    serde_saphyr::with_deserializer_from_slice_with_options(bytes, options(), |de| seed.deserialize(de))
        .map_err(|e| e.to_string())
}

/// The one document as a tree.
pub(super) fn parse(bytes: &[u8]) -> Result<Value, String> {
    serde_saphyr::from_slice_with_options(bytes, options()).map_err(|e| e.to_string())
}

/// A tree as YAML text. Long text stays on one line: simpler readers take no folded text for keys and certificates.
pub(super) fn print(value: &Value) -> String {
    let options = serde_saphyr::ser_options! { folded_wrap_chars: LINE_CHARS_MAX, min_fold_chars: LINE_CHARS_MAX };
    serde_saphyr::to_string_with_options(value, options).unwrap_or_else(|e| format!("# not printable: {e}\n"))
}

//! Bytes to trees and back: strict decoding of JSON, YAML and protobuf against the type table.
//!
//! A decoded tree has `apiVersion` and `kind`, only known fields (custom kinds may keep unknown ones), no nulls in typed
//! places, quantities and times in canonical form. Problems that strict decoding reports are collected with their paths.

mod object;
mod proto;
mod scalar;
pub(crate) mod wire;
mod yaml;

use serde::de::DeserializeSeed;
use serde_json::Value;

use crate::gvk::{Gvk, split_api_version};
use crate::table::TypeTable;
pub use proto::{ProtoError, from_protobuf, to_protobuf, watch_event_from_protobuf, watch_event_to_protobuf};

/// Media types of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Media {
    Json,
    Yaml,
    Protobuf,
}

/// What `fieldValidation` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Validation {
    /// Unknown fields are dropped, of duplicates the last wins.
    Ignore,
    /// As `Ignore`, and each becomes a warning.
    #[default]
    Warn,
    /// Any is an error.
    Strict,
}

/// An object and what was strange about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    pub value: Value,
    /// Texts for `Warning` headers: `unknown field "spec.x"`. Empty unless asked for.
    pub warnings: Vec<String>,
}

/// Longest accepted body.
pub const BODY_BYTES_MAX: usize = 3 * 1024 * 1024;
/// Most problems that are collected for one object.
const PROBLEMS_MAX: usize = 100;

/// Why bytes are not the expected object.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("request entity too large: limit is {limit}")]
    TooLarge { limit: usize },
    /// The text has no valid syntax, or no object at its top.
    #[error("couldn't get version/kind; json parse error: {detail}")]
    Syntax { detail: String },
    #[error("Object 'Kind' is missing in '{text}'")]
    KindMissing { text: String },
    #[error("the API version in the data ({found}) does not match the expected API version ({expected})")]
    VersionMismatch { found: String, expected: String },
    #[error(
        "{found} in version \"{version}\" cannot be handled as a {expected}: converting to {expected} is not possible"
    )]
    KindMismatch {
        found: String,
        version: String,
        expected: String,
    },
    /// A value of the wrong type.
    #[error("{kind} in version \"{version}\" cannot be handled as a {kind}: {detail}")]
    Type {
        kind: String,
        version: String,
        detail: String,
    },
    /// Unknown or duplicate fields under strict validation.
    #[error("{kind} in version \"{version}\" cannot be handled as a {kind}: strict decoding error: {}", problems.join(", "))]
    Strict {
        kind: String,
        version: String,
        problems: Vec<String>,
    },
    /// The body names a kind that nobody knows.
    #[error(
        "{found} in version \"{version}\" cannot be handled as a {expected}: no kind \"{found}\" is registered for version \"{api_version}\""
    )]
    Unregistered {
        found: String,
        version: String,
        api_version: String,
        expected: String,
    },
    #[error("no kind \"{kind}\" is registered for version \"{version}\"")]
    UnknownKind { kind: String, version: String },
    #[error("object in protobuf is malformed")]
    Protobuf(#[source] ProtoError),
}

impl DecodeError {
    /// The answer to a client: 413 for a body over the limit, 415 for protobuf of a kind that has none, else 400.
    pub fn to_status(&self) -> crate::status::Status {
        use crate::status::Status;
        match self {
            DecodeError::TooLarge { limit } => Status::too_large(*limit),
            DecodeError::Protobuf(ProtoError::NoProtobuf { .. }) => {
                Status::unsupported_media_type(&["application/json", "application/yaml"])
            }
            DecodeError::Protobuf(source) => Status::bad_request(&format!("{self}: {source}")),
            _ => Status::bad_request(&self.to_string()),
        }
    }
}

/// Decodes one object of kind `gvk`. A missing `apiVersion` or `kind` is filled in; a different one is an error.
///
/// # Errors
/// See [`DecodeError`]; never partial results.
pub fn decode(
    table: &TypeTable,
    gvk: &Gvk,
    media: Media,
    bytes: &[u8],
    validation: Validation,
) -> Result<Decoded, DecodeError> {
    if bytes.len() > BODY_BYTES_MAX {
        return Err(DecodeError::TooLarge { limit: BODY_BYTES_MAX });
    }
    match media {
        Media::Json => {
            let mut de = serde_json::Deserializer::from_slice(bytes);
            run(table, gvk, validation, |seed| {
                let value = seed.deserialize(&mut de).map_err(|e| e.to_string())?;
                de.end().map_err(|e| e.to_string())?;
                Ok(value)
            })
        }
        Media::Yaml => run(table, gvk, validation, |seed| yaml::with_deserializer(bytes, seed)),
        Media::Protobuf => {
            let value = from_protobuf(table, gvk, bytes).map_err(DecodeError::Protobuf)?;
            check_kind(table, gvk, &value)?;
            Ok(Decoded {
                value,
                warnings: Vec::new(),
            })
        }
    }
}

/// Checks a tree as [`decode`] does its bytes: after a patch, or for objects made in process.
pub fn decode_value(
    table: &TypeTable,
    gvk: &Gvk,
    value: Value,
    validation: Validation,
) -> Result<Decoded, DecodeError> {
    run(table, gvk, validation, |seed| {
        seed.deserialize(value).map_err(|e| e.to_string())
    })
}

/// Parses a patch or another untyped body: JSON or YAML to a tree, nulls kept.
///
/// # Errors
/// `TooLarge`, `Syntax`.
pub fn parse_untyped(media: Media, bytes: &[u8]) -> Result<Value, DecodeError> {
    if bytes.len() > BODY_BYTES_MAX {
        return Err(DecodeError::TooLarge { limit: BODY_BYTES_MAX });
    }
    match media {
        Media::Json => serde_json::from_slice(bytes).map_err(|e| DecodeError::Syntax { detail: e.to_string() }),
        Media::Yaml => yaml::parse(bytes).map_err(|detail| DecodeError::Syntax { detail }),
        Media::Protobuf => Err(DecodeError::Syntax {
            detail: "protobuf has no untyped form".into(),
        }),
    }
}

/// An object as YAML text, keys in the order that JSON has them.
pub fn to_yaml(value: &Value) -> String {
    yaml::print(value)
}

fn run(
    table: &TypeTable,
    gvk: &Gvk,
    validation: Validation,
    read: impl FnOnce(object::Seed<'_>) -> Result<Value, String>,
) -> Result<Decoded, DecodeError> {
    let unknown = || DecodeError::UnknownKind {
        kind: gvk.kind.to_string(),
        version: gvk.api_version(),
    };
    let kind = table.kind_of(gvk).ok_or_else(unknown)?;
    let ctx = object::Context::new(table);
    let read = read(ctx.seed(kind.id));
    let fatal = ctx.fatal.take();
    let named = |k: &str| (k.to_owned(), gvk.version.to_string());
    let mut value = match (read, fatal) {
        (Ok(value), _) => value,
        (Err(_), Some(detail)) => {
            let (kind, version) = named(&gvk.kind);
            return Err(DecodeError::Type { kind, version, detail });
        }
        (Err(detail), None) => return Err(DecodeError::Syntax { detail }),
    };
    check_kind(table, gvk, &value)?;
    if let Some(object) = value.as_object_mut() {
        object.entry("apiVersion").or_insert_with(|| gvk.api_version().into());
        object.entry("kind").or_insert_with(|| (*gvk.kind).into());
    }
    let mut problems = ctx.problems.take();
    if let Some(structural) = &kind.def.structural {
        let unknown = structural.prune(&mut value);
        problems.sort_by_key(|p| !p.starts_with("duplicate"));
        problems.extend(unknown.iter().map(|path| format!("unknown field {path:?}")));
    }
    let warnings = match validation {
        Validation::Ignore => Vec::new(),
        Validation::Warn => problems,
        Validation::Strict if problems.is_empty() => problems,
        Validation::Strict => {
            let (kind, version) = named(&gvk.kind);
            return Err(DecodeError::Strict {
                kind,
                version,
                problems,
            });
        }
    };
    Ok(Decoded { value, warnings })
}

fn check_kind(table: &TypeTable, gvk: &Gvk, value: &Value) -> Result<(), DecodeError> {
    let text = |field: &str| value.get(field).and_then(Value::as_str).filter(|s| !s.is_empty());
    let options = gvk.kind.ends_with("Options");
    let api_version = text("apiVersion").map_or_else(|| gvk.api_version(), str::to_owned);
    let found = text("kind").unwrap_or(&gvk.kind);
    let (group, version) = split_api_version(&api_version);
    let given = Gvk::new(group, version, found);
    if given != *gvk && !options && table.kind_of(&given).is_none() {
        return Err(DecodeError::Unregistered {
            found: found.to_owned(),
            version: version.to_owned(),
            expected: gvk.kind.to_string(),
            api_version,
        });
    }
    if let Some(found) = text("apiVersion")
        && found != gvk.api_version()
        && !options
    {
        return Err(DecodeError::VersionMismatch {
            found: found.into(),
            expected: gvk.api_version(),
        });
    }
    if let Some(found) = text("kind")
        && found != &*gvk.kind
    {
        let version = text("apiVersion")
            .map_or(&*gvk.version, |v| split_api_version(v).1)
            .to_owned();
        return Err(DecodeError::KindMismatch {
            found: found.into(),
            version,
            expected: gvk.kind.to_string(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;

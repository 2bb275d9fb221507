//! Errors about fields, with the machinery's wording.

use std::fmt;

use serde_json::Value;

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldErrorKind {
    NotFound,
    Required,
    Duplicate,
    Invalid,
    TypeInvalid,
    NotSupported,
    Forbidden,
    TooLong,
    TooMany,
    Internal,
}

impl FieldErrorKind {
    /// As `details.causes[].reason` carries it.
    pub fn reason(self) -> &'static str {
        match self {
            FieldErrorKind::NotFound => "FieldValueNotFound",
            FieldErrorKind::Required => "FieldValueRequired",
            FieldErrorKind::Duplicate => "FieldValueDuplicate",
            FieldErrorKind::Invalid => "FieldValueInvalid",
            FieldErrorKind::TypeInvalid => "FieldValueTypeInvalid",
            FieldErrorKind::NotSupported => "FieldValueNotSupported",
            FieldErrorKind::Forbidden => "FieldValueForbidden",
            FieldErrorKind::TooLong => "FieldValueTooLong",
            FieldErrorKind::TooMany => "FieldValueTooMany",
            FieldErrorKind::Internal => "InternalError",
        }
    }

    fn words(self) -> &'static str {
        match self {
            FieldErrorKind::NotFound => "Not found",
            FieldErrorKind::Required => "Required value",
            FieldErrorKind::Duplicate => "Duplicate value",
            FieldErrorKind::Invalid | FieldErrorKind::TypeInvalid => "Invalid value",
            FieldErrorKind::NotSupported => "Unsupported value",
            FieldErrorKind::Forbidden => "Forbidden",
            FieldErrorKind::TooLong => "Too long",
            FieldErrorKind::TooMany => "Too many",
            FieldErrorKind::Internal => "Internal error",
        }
    }
}

/// One field's error. Displays as `spec.replicas: Invalid value: -1: must be ...`.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    /// `spec.containers[0].name`
    pub path: String,
    pub kind: FieldErrorKind,
    /// The offending value; not shown for the kinds that need none.
    pub value: Value,
    pub detail: String,
}

impl FieldError {
    pub fn new(kind: FieldErrorKind, path: impl Into<String>, value: impl Into<Value>, detail: &str) -> FieldError {
        FieldError {
            path: path.into(),
            kind,
            value: value.into(),
            detail: detail.into(),
        }
    }

    pub fn required(path: impl Into<String>, detail: &str) -> FieldError {
        FieldError::new(FieldErrorKind::Required, path, Value::Null, detail)
    }

    pub fn invalid(path: impl Into<String>, value: impl Into<Value>, detail: &str) -> FieldError {
        FieldError::new(FieldErrorKind::Invalid, path, value, detail)
    }

    pub fn forbidden(path: impl Into<String>, detail: &str) -> FieldError {
        FieldError::new(FieldErrorKind::Forbidden, path, Value::Null, detail)
    }

    pub fn duplicate(path: impl Into<String>, value: impl Into<Value>) -> FieldError {
        FieldError::new(FieldErrorKind::Duplicate, path, value, "")
    }

    pub fn not_found(path: impl Into<String>, value: impl Into<Value>) -> FieldError {
        FieldError::new(FieldErrorKind::NotFound, path, value, "")
    }

    pub fn not_supported(path: impl Into<String>, value: impl Into<Value>, supported: &[&str]) -> FieldError {
        let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        FieldError::new(
            FieldErrorKind::NotSupported,
            path,
            value,
            &format!("supported values: {}", list.join(", ")),
        )
    }

    /// `max` in bytes.
    pub fn too_long(path: impl Into<String>, max: usize) -> FieldError {
        let unit = if max == 1 { "byte" } else { "bytes" };
        FieldError::new(
            FieldErrorKind::TooLong,
            path,
            Value::Null,
            &format!("may not be more than {max} {unit}"),
        )
    }

    pub fn too_many(path: impl Into<String>, actual: usize, max: usize) -> FieldError {
        let unit = if max == 1 { "item" } else { "items" };
        FieldError::new(
            FieldErrorKind::TooMany,
            path,
            actual,
            &format!("must have at most {max} {unit}"),
        )
    }

    /// The text without the path.
    pub fn body(&self) -> String {
        let words = self.kind.words();
        let shown = match self.kind {
            FieldErrorKind::Required
            | FieldErrorKind::Forbidden
            | FieldErrorKind::TooLong
            | FieldErrorKind::Internal => words.to_owned(),
            _ => match &self.value {
                Value::String(s) => format!("{words}: {s:?}"),
                other => format!("{words}: {other}"),
            },
        };
        if self.detail.is_empty() {
            shown
        } else {
            format!("{shown}: {}", self.detail)
        }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.body())
    }
}

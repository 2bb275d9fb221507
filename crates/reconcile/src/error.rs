//! What can go wrong when talking to the API.

use std::time::Duration;

use serde::Deserialize;

use crate::BoxError;

/// The `metav1.Status` a server answered with.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct ApiStatus {
    /// HTTP code.
    pub code: u16,
    /// Machine-readable reason: `NotFound`, `Conflict`, ...
    pub reason: String,
    /// Text for people.
    pub message: String,
    /// Details, if the server gave any.
    pub details: Option<StatusDetails>,
}

/// `Status.details`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct StatusDetails {
    /// Name of the object.
    pub name: String,
    /// Resource or kind.
    pub kind: String,
    /// Uid of the object.
    pub uid: String,
    /// When to try again, in seconds.
    pub retry_after_seconds: u64,
    /// One per bad field or cause.
    pub causes: Vec<StatusCause>,
}

/// One entry of `Status.details.causes`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct StatusCause {
    /// Machine-readable reason.
    pub reason: String,
    /// Text for people.
    pub message: String,
    /// Path of the field.
    pub field: String,
}

/// When the same call may be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It will fail again until someone changes something.
    Never,
    /// After this long or the caller's own backoff, whichever is longer.
    Soon(Duration),
    /// After reading the object again.
    AfterResync,
}

/// The part of a call that failed.
#[derive(Debug, thiserror::Error)]
pub enum ErrorKind {
    /// The server answered with a failure.
    #[error("{}", .0.message)]
    Status(Box<ApiStatus>),
    /// No answer: connection, TLS or body failed.
    #[error("no answer")]
    Transport(#[source] BoxError),
    /// No answer in time.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The answer is not what the caller expected.
    #[error("cannot decode the answer")]
    Decode(#[source] serde_json::Error),
    /// The request could not be built.
    #[error("cannot build the request")]
    Request(#[source] BoxError),
    /// The answer is larger than the client accepts.
    #[error("the answer is larger than {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: usize,
    },
    /// A field the caller relies on is absent.
    #[error("the object has no {field}")]
    Missing {
        /// Path of the field.
        field: &'static str,
    },
    /// The client's configuration is unusable.
    #[error("{what}")]
    Config {
        /// Which part.
        what: &'static str,
        /// Why.
        #[source]
        source: BoxError,
    },
}

/// A failed call: what was tried, and why it failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation}")]
pub struct Error {
    /// Verb and path, or the step of the configuration.
    pub operation: String,
    /// Why.
    #[source]
    pub kind: ErrorKind,
}

impl Error {
    /// An error of `kind` while doing `operation`.
    pub fn new(operation: impl Into<String>, kind: ErrorKind) -> Self {
        Self {
            operation: operation.into(),
            kind,
        }
    }

    /// The server's `Status`, if the server answered.
    pub fn status(&self) -> Option<&ApiStatus> {
        match &self.kind {
            ErrorKind::Status(status) => Some(status),
            _ => None,
        }
    }

    /// The HTTP code, if the server answered with a failure.
    pub fn code(&self) -> Option<u16> {
        self.status().map(|s| s.code)
    }

    fn has_reason(&self, reason: &str) -> bool {
        self.status().is_some_and(|s| s.reason == reason)
    }

    /// The object does not exist.
    pub fn is_not_found(&self) -> bool {
        self.has_reason("NotFound") || self.code() == Some(404)
    }

    /// A precondition (resourceVersion, uid) did not hold.
    pub fn is_conflict(&self) -> bool {
        self.has_reason("Conflict")
    }

    /// An object of this name exists.
    pub fn is_already_exists(&self) -> bool {
        self.has_reason("AlreadyExists")
    }

    /// The resource version is too old to go on from.
    pub fn is_gone(&self) -> bool {
        matches!(self.status(), Some(s) if s.code == 410 || s.reason == "Expired" || s.reason == "Gone")
    }

    /// The object was refused as invalid.
    pub fn is_invalid(&self) -> bool {
        self.has_reason("Invalid")
    }

    /// The caller may not do this.
    pub fn is_forbidden(&self) -> bool {
        self.has_reason("Forbidden")
    }

    /// The namespace of the object is being deleted, so nothing new can be made in it.
    pub fn is_namespace_terminating(&self) -> bool {
        let cause = |s: &ApiStatus| {
            s.details
                .as_ref()
                .is_some_and(|d| d.causes.iter().any(|c| c.reason == "NamespaceTerminating"))
        };
        self.is_forbidden()
            && self
                .status()
                .is_some_and(|s| cause(s) || s.message.contains("because it is being terminated"))
    }

    /// When to try again.
    pub fn retry(&self) -> Retry {
        let soon = |seconds| Retry::Soon(Duration::from_secs(seconds));
        match &self.kind {
            ErrorKind::Transport(_) | ErrorKind::Timeout(_) => soon(0),
            ErrorKind::Decode(_) | ErrorKind::Request(_) | ErrorKind::TooLarge { .. } | ErrorKind::Config { .. } => {
                Retry::Never
            }
            ErrorKind::Missing { .. } => Retry::AfterResync,
            ErrorKind::Status(status) => match status.code {
                409 | 410 => Retry::AfterResync,
                429 | 500..=599 => soon(status.details.as_ref().map_or(0, |d| d.retry_after_seconds)),
                _ => Retry::Never,
            },
        }
    }
}

/// `Ok(None)` instead of a not-found error.
pub trait Optional<T> {
    /// Turns not-found into `None`.
    fn optional(self) -> Result<Option<T>, Error>;
}

impl<T> Optional<T> for Result<T, Error> {
    fn optional(self) -> Result<Option<T>, Error> {
        match self {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

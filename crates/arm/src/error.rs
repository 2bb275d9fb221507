//! Faults of the front door: an HTTP status and the body that ARM's clients print.
//!
//! Messages say what to change. Nothing internal (object names of home, Rust errors' chains) goes into them; the chain is logged.

use http::StatusCode;
use serde_json::{Value, json};
use thiserror::Error;

/// One refused or failed request.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{code}: {message}")]
pub struct Fault {
    pub status: StatusCode,
    /// ARM's code, for example `ResourceGroupNotFound`.
    pub code: String,
    pub message: String,
    /// JSON path or resource that the fault is about.
    pub target: Option<String>,
}

/// Result of everything that answers a request.
pub type Answer<T> = Result<T, Fault>;

impl Fault {
    pub fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            code: code.to_owned(),
            message: message.into(),
            target: None,
        }
    }

    pub fn bad_request(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub fn conflict(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, message)
    }

    pub fn not_found(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }

    /// A field of the body: `target` is its JSON path.
    pub fn field(code: &str, path: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let path = path.into();
        let mut f = Self::bad_request(code, format!("{path}: {problem}"));
        f.target = Some(path);
        f
    }

    pub fn group_not_found(name: &str) -> Self {
        Self::not_found(
            "ResourceGroupNotFound",
            format!("Resource group '{name}' could not be found."),
        )
    }

    /// `kind_and_name` as ARM words it: `Microsoft.Network/virtualNetworks/v1`.
    pub fn resource_not_found(kind_and_name: &str, group: &str) -> Self {
        let message = format!("The Resource '{kind_and_name}' under resource group '{group}' was not found.");
        Self::not_found("ResourceNotFound", message)
    }

    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PRECONDITION_FAILED, "PreconditionFailed", message)
    }

    /// The platform itself could not do it (home does not answer); the request may be sent again.
    pub fn internal(doing: &str) -> Self {
        let message = format!(
            "The platform could not finish {doing}. The request can be repeated; the server's log has the cause."
        );
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", message)
    }

    /// The body ARM's clients parse.
    pub fn to_value(&self) -> Value {
        let mut error = json!({"code": self.code, "message": self.message});
        if let Some(t) = &self.target {
            error["target"] = json!(t);
        }
        json!({"error": error})
    }
}

impl From<resources::views::ViewError> for Fault {
    fn from(e: resources::views::ViewError) -> Self {
        Self::field("InvalidRequestContent", e.path, e.problem)
    }
}

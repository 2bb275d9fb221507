//! `Status`, the answer to every failed request: reasons, codes, messages and details as clients match on them.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::field::FieldError;
use crate::gvk::Gvk;

/// A `v1` Status. Serializes with `apiVersion` and `kind`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    api_version: ApiVersion,
    kind: Kind,
    pub metadata: ListMeta,
    /// `Success` or `Failure`.
    pub status: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<Details>,
    /// HTTP code; 0 is left out.
    #[serde(skip_serializing_if = "is_zero_code")]
    pub code: u16,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct ApiVersion(String);
impl Default for ApiVersion {
    fn default() -> Self {
        ApiVersion("v1".into())
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Kind(String);
impl Default for Kind {
    fn default() -> Self {
        Kind("Status".into())
    }
}

/// The list metadata that a Status carries.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ListMeta {
    #[serde(rename = "continue", skip_serializing_if = "String::is_empty")]
    pub continue_: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub resource_version: String,
}

/// What a Status is about.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Details {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// Resource (plural) or kind, depending on the reason.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    #[serde(skip_serializing_if = "is_zero")]
    pub retry_after_seconds: i32,
}

/// One cause of a failure.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cause {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
}

fn is_zero_code(n: &u16) -> bool {
    *n == 0
}

fn is_zero(n: &i32) -> bool {
    *n == 0
}

/// Splits `deployments.apps` into resource and group.
fn split(resource: &str) -> (&str, &str) {
    resource.split_once('.').unwrap_or((resource, ""))
}

fn details(resource: &str, name: &str) -> Details {
    let (kind, group) = split(resource);
    Details {
        name: name.into(),
        group: group.into(),
        kind: kind.into(),
        ..Details::default()
    }
}

/// `resource` is a group resource everywhere: `pods`, `deployments.apps`.
impl Status {
    fn failure(code: u16, reason: &str, message: String) -> Status {
        Status {
            status: "Failure".into(),
            message,
            reason: reason.into(),
            code,
            ..Status::default()
        }
    }

    fn about(mut self, details: Details) -> Status {
        self.details = Some(details);
        self
    }

    /// 200 with the deleted object's coordinates.
    /// Of a deletion: without a code in the body, as upstream.
    pub fn success(resource: &str, name: &str, uid: &str) -> Status {
        let details = Details {
            uid: uid.into(),
            ..details(resource, name)
        };
        Status {
            status: "Success".into(),
            ..Status::default()
        }
        .about(details)
    }

    pub fn not_found(resource: &str, name: &str) -> Status {
        Status::failure(404, "NotFound", format!("{resource} {name:?} not found")).about(details(resource, name))
    }

    /// A path that no resource serves.
    pub fn path_not_found() -> Status {
        let message = "the server could not find the requested resource".to_owned();
        Status::failure(404, "NotFound", message).about(Details::default())
    }

    pub fn already_exists(resource: &str, name: &str) -> Status {
        let message = format!("{resource} {name:?} already exists");
        Status::failure(409, "AlreadyExists", message).about(details(resource, name))
    }

    /// `why` as upstream: `the object has been modified; please apply your changes to the latest version and try again`.
    pub fn conflict(resource: &str, name: &str, why: &str) -> Status {
        let message = format!("Operation cannot be fulfilled on {resource} {name:?}: {why}");
        Status::failure(409, "Conflict", message).about(details(resource, name))
    }

    /// The conflict of an update with an old resource version.
    pub fn modified(resource: &str, name: &str) -> Status {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        Status::conflict(resource, name, why)
    }

    /// The conflict of an apply; `causes` are pairs of message and field.
    pub fn apply_conflict(message: &str, causes: Vec<(String, String)>) -> Status {
        let causes = causes
            .into_iter()
            .map(|(message, field)| Cause {
                reason: "FieldManagerConflict".into(),
                message,
                field,
            })
            .collect();
        Status::failure(409, "Conflict", message.into()).about(Details {
            causes,
            ..Details::default()
        })
    }

    /// 500 without a reason: what upstream answers for errors it has no status for.
    pub fn untyped(message: &str) -> Status {
        Status::failure(500, "", message.into())
    }

    pub fn invalid(kind: &Gvk, name: &str, errors: &[FieldError]) -> Status {
        let mut seen = Vec::new();
        for error in errors {
            let text = error.to_string();
            if !seen.contains(&text) {
                seen.push(text);
            }
        }
        let all = if seen.len() == 1 {
            seen.remove(0)
        } else {
            format!("[{}]", seen.join(", "))
        };
        let qualified = if kind.group.is_empty() {
            kind.kind.to_string()
        } else {
            format!("{}.{}", kind.kind, kind.group)
        };
        let causes = errors
            .iter()
            .map(|e| Cause {
                reason: e.kind.reason().into(),
                message: e.body(),
                field: e.path.clone(),
            })
            .collect();
        let message = format!("{qualified} {name:?} is invalid: {all}");
        Status::failure(422, "Invalid", message).about(Details {
            name: name.into(),
            group: kind.group.to_string(),
            kind: kind.kind.to_string(),
            causes,
            ..Details::default()
        })
    }

    /// A well-formed request that cannot be applied to the object: a patch whose test fails, for example. Upstream does not
    /// tell why.
    pub fn unprocessable() -> Status {
        let message = "the server rejected our request due to an error in our request".to_owned();
        Status::failure(422, "Invalid", message).about(Details::default())
    }

    /// `name` and `resource` may be empty.
    pub fn forbidden(resource: &str, name: &str, why: &str) -> Status {
        let message = match (resource, name) {
            ("", _) => format!("forbidden: {why}"),
            (_, "") => format!("{resource} is forbidden: {why}"),
            _ => format!("{resource} {name:?} is forbidden: {why}"),
        };
        Status::failure(403, "Forbidden", message).about(details(resource, name))
    }

    pub fn bad_request(why: &str) -> Status {
        Status::failure(400, "BadRequest", why.into())
    }

    pub fn unauthorized() -> Status {
        Status::failure(401, "Unauthorized", "Unauthorized".into())
    }

    pub fn gone(why: &str) -> Status {
        Status::failure(410, "Gone", why.into())
    }

    /// History before the asked resource version is gone.
    pub fn expired(why: &str) -> Status {
        Status::failure(410, "Expired", why.into())
    }

    /// The usual expiry of a watch or an exact list.
    pub fn too_old(asked: u64, oldest: u64) -> Status {
        Status::expired(&format!("too old resource version: {asked} ({oldest})"))
    }

    /// The resource version lies in the future: 504 with the cause that clients know.
    pub fn too_large_resource_version(asked: u64, current: u64) -> Status {
        let message = format!("Timeout: Too large resource version: {asked}, current: {current}");
        let cause = Cause {
            reason: "ResourceVersionTooLarge".into(),
            message: "Too large resource version".into(),
            ..Cause::default()
        };
        Status::failure(504, "Timeout", message).about(Details {
            causes: vec![cause],
            retry_after_seconds: 1,
            ..Details::default()
        })
    }

    pub fn too_large(limit_bytes: usize) -> Status {
        let message = format!("Request entity too large: limit is {limit_bytes}");
        Status::failure(413, "RequestEntityTooLarge", message)
    }

    pub fn unsupported_media_type(accepted: &[&str]) -> Status {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        Status::failure(415, "UnsupportedMediaType", message)
    }

    /// As upstream answers where its router, not its decoder, refuses a media type: patches of built-in kinds.
    pub fn unrouted_media_type() -> Status {
        let message = "415: Unsupported Media Type".to_owned();
        Status::failure(415, "UnsupportedMediaType", message).about(Details::default())
    }

    /// A bad parameter of a request; `kind` as in `ListOptions`.
    pub fn invalid_options(kind: &str, error: FieldError) -> Status {
        Status::invalid(&Gvk::new("meta.k8s.io", "v1", kind), "", &[error])
    }

    pub fn not_acceptable(offered: &[&str]) -> Status {
        let message = format!("only the following media types are accepted: {}", offered.join(", "));
        Status::failure(406, "NotAcceptable", message)
    }

    /// `action` as in `create`, `patch`.
    pub fn method_not_allowed(resource: &str, action: &str) -> Status {
        let message = format!("{action} is not supported on resources of kind {resource:?}");
        Status::failure(405, "MethodNotAllowed", message).about(details(resource, ""))
    }

    pub fn internal(why: &str) -> Status {
        let cause = Cause {
            message: why.into(),
            ..Cause::default()
        };
        let message = format!("Internal error occurred: {why}");
        Status::failure(500, "InternalError", message).about(Details {
            causes: vec![cause],
            ..Details::default()
        })
    }

    pub fn timeout(why: &str, retry_after_seconds: i32) -> Status {
        let details = Details {
            retry_after_seconds,
            ..Details::default()
        };
        Status::failure(504, "Timeout", format!("Timeout: {why}")).about(details)
    }

    pub fn server_timeout(resource: &str, operation: &str, retry_after_seconds: i32) -> Status {
        let message = format!(
            "The {operation} operation against {resource} could not be completed at this time, please try again."
        );
        Status::failure(500, "ServerTimeout", message).about(Details {
            retry_after_seconds,
            ..details(resource, operation)
        })
    }

    pub fn too_many_requests(why: &str, retry_after_seconds: i32) -> Status {
        let details = Details {
            retry_after_seconds,
            ..Details::default()
        };
        Status::failure(429, "TooManyRequests", why.into()).about(details)
    }

    pub fn service_unavailable(why: &str) -> Status {
        Status::failure(503, "ServiceUnavailable", why.into())
    }

    /// HTTP code of the answer.
    /// The HTTP code; a success may leave it out of its body.
    pub fn code(&self) -> u16 {
        if self.code == 0 && self.status == "Success" {
            return 200;
        }
        self.code
    }

    pub fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_else(|_| json!({ "kind": "Status", "apiVersion": "v1" }))
    }

    /// Reads a Status that another server sent; `None` if it is none.
    pub fn from_value(value: &Value) -> Option<Status> {
        (value.get("kind")? == "Status")
            .then(|| serde_json::from_value(value.clone()).ok())
            .flatten()
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Status {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_clients_match_on() {
        let s = Status::not_found("deployments.apps", "web");
        assert_eq!(s.message, "deployments.apps \"web\" not found");
        assert_eq!(
            s.to_value(),
            json!({
                "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "code": 404,
                "reason": "NotFound", "message": "deployments.apps \"web\" not found",
                "details": { "name": "web", "group": "apps", "kind": "deployments" },
            })
        );
        let gvk = Gvk::new("apps", "v1", "Deployment");
        let errors = [
            FieldError::required("spec.selector", ""),
            FieldError::invalid("spec.replicas", -1, "must be >= 0"),
        ];
        let s = Status::invalid(&gvk, "web", &errors);
        assert_eq!(
            s.message,
            "Deployment.apps \"web\" is invalid: [spec.selector: Required value, \
             spec.replicas: Invalid value: -1: must be >= 0]"
        );
        assert_eq!(s.details.as_ref().unwrap().causes[0].reason, "FieldValueRequired");
        assert_eq!(Status::from_value(&s.to_value()), Some(s));
    }
}

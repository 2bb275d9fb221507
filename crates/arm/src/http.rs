//! Requests and replies as plain data, between the sockets ([`crate::server`]) and the handlers.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::{Map, Value};

use crate::error::{Answer, Fault};

/// Seconds a client waits between polls. Clients treat a missing value, and 0, as 30 seconds.
pub const RETRY_AFTER_S: u32 = 1;

/// One request, read completely.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: Method,
    pub path: String,
    /// Query parameters, names folded to lower case, last one wins.
    pub query: BTreeMap<String, String>,
    pub if_match: Option<String>,
    pub if_none_match: Option<String>,
    pub authorization: Option<String>,
    pub body: Bytes,
}

impl Request {
    pub fn param(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }

    /// The body as a JSON object.
    pub fn json(&self) -> Answer<Map<String, Value>> {
        match serde_json::from_slice(&self.body) {
            Ok(Value::Object(o)) => Ok(o),
            Ok(_) => Err(Fault::bad_request(
                "InvalidRequestContent",
                "The request content must be a JSON object.",
            )),
            Err(e) => {
                let message = format!("The request content was invalid and could not be deserialized: '{e}'.");
                Err(Fault::bad_request("InvalidRequestContent", message))
            }
        }
    }

    /// The body as a form.
    pub fn form(&self) -> Vec<(String, String)> {
        pairs(&String::from_utf8_lossy(&self.body))
    }
}

/// `a=b&c=d` with percent and plus decoding.
pub fn pairs(text: &str) -> Vec<(String, String)> {
    let decode = |s: &str| {
        percent_encoding::percent_decode_str(&s.replace('+', " "))
            .decode_utf8_lossy()
            .into_owned()
    };
    let parts = text.split('&').filter(|p| !p.is_empty());
    parts
        .map(|p| {
            p.split_once('=')
                .map_or_else(|| (decode(p), String::new()), |(k, v)| (decode(k), decode(v)))
        })
        .collect()
}

/// One reply.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: Vec<(&'static str, String)>,
    pub body: Option<Value>,
}

impl Reply {
    pub fn json(status: StatusCode, body: Value) -> Self {
        Self {
            status,
            headers: vec![],
            body: Some(body),
        }
    }

    pub fn ok(body: Value) -> Self {
        Self::json(StatusCode::OK, body)
    }

    pub fn empty(status: StatusCode) -> Self {
        Self {
            status,
            headers: vec![],
            body: None,
        }
    }

    /// `{"value": [...]}`
    pub fn list(items: Vec<Value>) -> Self {
        Self::ok(serde_json::json!({"value": items}))
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Marks a reply that is not the last word: the client comes back after a second.
    pub fn pending(self) -> Self {
        self.with("Retry-After", RETRY_AFTER_S.to_string())
    }

    /// A GET of a resource; one that is still changing says when to look again.
    pub fn resource(status: StatusCode, body: Value) -> Self {
        let state = body["properties"]["provisioningState"].as_str().unwrap_or("Succeeded");
        let terminal = crate::home::is_terminal(state);
        let reply = Self::json(status, body);
        if terminal { reply } else { reply.pending() }
    }
}

impl From<Fault> for Reply {
    fn from(f: Fault) -> Self {
        let reply = Self::json(f.status, f.to_value());
        match f.status {
            StatusCode::UNAUTHORIZED => reply.with("WWW-Authenticate", "Bearer error=\"invalid_token\""),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => reply.pending(),
            _ => reply,
        }
    }
}

//! What every controller, node agent and proxy stands on: a client over a `tower::Service`, informers that keep objects
//! as bytes, a keyed queue, a controller loop, an event recorder.
//!
//! Data flows: [`Client`] -> one reflector per kind (list, then watch) -> [`informer::Informer`] store -> change
//! handlers -> [`Queue`] -> [`run_controller`] -> [`Client`]. The client's service is the API server itself when both
//! live in one process ([`Client::local`]: no socket, no TLS), HTTPS elsewhere ([`Client::https`]).

pub mod client;
pub mod controller;
pub mod discovery;
pub mod error;
pub mod exec;
pub mod https;
pub mod informer;
pub mod leader;
pub mod queue;
pub mod recorder;
pub mod reflector;
pub mod resource;
pub mod store;
#[cfg(test)]
mod tests;

pub use client::{Client, DeleteParams, List, ListParams, Patch};
pub use controller::{Requeue, run_controller};
pub use error::{ApiStatus, Error, ErrorKind, Retry};
pub use exec::{LogParams, Output};
pub use https::{Dial, HttpsConfig, Identity};
pub use informer::{Informer, Informers, Subscription};
pub use queue::Queue;
pub use recorder::{EventType, Recorder};
pub use resource::{Kind, ResourceId};
pub use store::{Change, Entry, Header, Key, Owner};

/// Any error, boxed.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A request or response body.
pub type Body = http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, BoxError>;
/// The API as a service: in process, or a connection pool.
pub type LocalService = tower::util::BoxCloneSyncService<http::Request<Body>, http::Response<Body>, BoxError>;

/// A body of these bytes.
pub fn full_body(bytes: impl Into<bytes::Bytes>) -> Body {
    use http_body_util::BodyExt;
    Body::new(http_body_util::Full::new(bytes.into()).map_err(|never| match never {}))
}

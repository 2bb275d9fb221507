//! What a node needs from the API server, and nothing else: the upper seam of the kubelet.
//!
//! [`NodeApi`] is narrow on purpose. The real one ([`crate::client::ClientApi`]) speaks through `reconcile`; tests put a
//! small in-memory one in its place. Every call is one request; the caller owns retries.

use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::{
    api::{
        coordination::v1::Lease,
        core::v1::{ConfigMap, Event, Node, Pod, Secret, Service},
    },
    jiff::Timestamp,
};
use serde_json::Value;
use thiserror::Error;
use tokio::sync::mpsc;

/// What happened to the pods bound to this node.
#[derive(Clone, Debug)]
pub enum PodEvent {
    /// A pod as it stands now; equal events may repeat.
    Present(Arc<Pod>),
    /// The object is gone from the API.
    Gone { uid: String },
    /// Everything that existed when the watch began has been delivered: only now may orphans be looked for.
    Synced,
}

/// A bound service account token and when it ends.
#[derive(Clone, Debug)]
pub struct BoundToken {
    pub token: String,
    pub expires: Timestamp,
}

/// What a token is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TokenAsk {
    pub namespace: String,
    pub service_account: String,
    /// Empty = the API server's own audience.
    pub audience: String,
    pub expiration_s: i64,
    pub pod_name: String,
    pub pod_uid: String,
}

#[derive(Debug, Error)]
pub enum ApiError {
    #[error("{what} not found")]
    NotFound { what: String },
    /// The object changed or is another one by now (uid or resourceVersion precondition).
    #[error("{what} conflicts: {reason}")]
    Conflict { what: String, reason: String },
    /// The API server understood and refused: trying again does not help until something changes.
    #[error("{what} refused: {reason}")]
    Refused { what: String, reason: String },
    /// Worth trying again.
    #[error("{what}: {reason}")]
    Transient { what: String, reason: String },
}

impl ApiError {
    /// The object, or the object of that uid, does not exist any more.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::Conflict { .. })
    }
}

/// Requests of one node. Implementations are cheap to share.
#[async_trait]
pub trait NodeApi: Send + Sync + 'static {
    /// Pods with `spec.nodeName == node`, from the first list on, for as long as the receiver lives. Reconnects by itself.
    fn pods(&self, node: &str) -> mpsc::Receiver<PodEvent>;
    /// Services of one namespace, from a cache if there is one.
    async fn services(&self, namespace: &str) -> Result<Vec<Arc<Service>>, ApiError>;
    async fn config_map(&self, namespace: &str, name: &str) -> Result<ConfigMap, ApiError>;
    async fn secret(&self, namespace: &str, name: &str) -> Result<Secret, ApiError>;
    async fn token(&self, ask: &TokenAsk) -> Result<BoundToken, ApiError>;

    async fn pod(&self, namespace: &str, name: &str) -> Result<Pod, ApiError>;
    /// Strategic merge patch of the status subresource. `patch` carries `metadata.uid`, so that a later pod of the same
    /// name is never written to.
    async fn patch_pod_status(&self, namespace: &str, name: &str, patch: Value) -> Result<Pod, ApiError>;
    /// The last delete: grace 0 with the uid as precondition.
    async fn delete_pod(&self, namespace: &str, name: &str, uid: &str) -> Result<(), ApiError>;

    async fn create_event(&self, event: &Event) -> Result<(), ApiError>;
    async fn patch_event(&self, namespace: &str, name: &str, patch: Value) -> Result<(), ApiError>;

    async fn node(&self, name: &str) -> Result<Node, ApiError>;
    async fn create_node(&self, node: &Node) -> Result<Node, ApiError>;
    async fn update_node(&self, node: &Node) -> Result<Node, ApiError>;
    async fn patch_node_status(&self, name: &str, patch: Value) -> Result<Node, ApiError>;
    async fn delete_node(&self, name: &str, uid: &str) -> Result<(), ApiError>;

    async fn lease(&self, name: &str) -> Result<Lease, ApiError>;
    async fn create_lease(&self, lease: &Lease) -> Result<Lease, ApiError>;
    async fn update_lease(&self, lease: &Lease) -> Result<Lease, ApiError>;
}

//! What this crate asks of whoever hosts control planes.

use std::net::IpAddr;

use async_trait::async_trait;
use ipnet::IpNet;
use reconcile::{Client, Informers};
use thiserror::Error;

/// One hosted control plane, as it shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlPlaneSpec {
    /// Key in the API server: the home object name of the managed cluster.
    pub name: String,
    /// Name for people: the managed cluster's.
    pub display_name: String,
    /// `1.36.4`.
    pub kubernetes_version: String,
    /// Address of the public pool that it answers at, port 443. The allocator gave it to this cluster alone.
    pub address: IpAddr,
    /// Further names for its certificate.
    pub sans: Vec<String>,
    pub service_cidr: IpNet,
    pub dns_service_ip: IpAddr,
    pub cluster_domain: String,
}

/// Where a control plane answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `https://198.19.0.4:443`: for nodes and kubeconfigs.
    pub url: String,
    pub ca_pem: String,
}

/// Whom a node's certificates are for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeIdentity {
    pub node_name: String,
    /// Addresses that the API server reaches the kubelet at.
    pub addresses: Vec<IpAddr>,
}

/// A client certificate and its key, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCert {
    pub cert_pem: String,
    pub key_pem: String,
}

/// A node's certificates, PEM: client (`system:node:<name>`, group `system:nodes`) and serving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeCerts {
    pub ca_pem: String,
    pub client: ClientCert,
    pub serving: ClientCert,
}

/// A control plane could not be made, found or deleted.
#[derive(Debug, Error)]
#[error("control plane {name}: {message}")]
pub struct ControlPlaneError {
    pub name: String,
    /// Plain words; ends up in the cluster's ARM error.
    pub message: String,
}

/// Hosts control planes. All calls are idempotent and may come again after a restart.
#[async_trait]
pub trait ControlPlanes: Send + Sync + 'static {
    /// Makes the control plane and its controllers run, or finds them running; returns once it answers.
    async fn ensure(&self, spec: &ControlPlaneSpec) -> Result<Endpoint, ControlPlaneError>;

    /// Stops it and keeps its data: [`ControlPlanes::ensure`] brings it back. Fine if it does not run.
    async fn pause(&self, name: &str) -> Result<(), ControlPlaneError>;

    /// Stops it and deletes its data; fine if there is none.
    async fn delete(&self, name: &str) -> Result<(), ControlPlaneError>;

    /// Client and informers with every right inside the cluster; `None` if it does not run.
    fn client(&self, name: &str) -> Option<(Client, Informers)>;

    /// New certificates for a node.
    async fn node_certs(&self, name: &str, node: &NodeIdentity) -> Result<NodeCerts, ControlPlaneError>;

    /// A new client certificate.
    async fn client_cert(&self, name: &str, user: &str, groups: &[&str]) -> Result<ClientCert, ControlPlaneError>;
}

//! Lets the certificate controller of a cluster use the cluster's CA, whose key stays in the API server.

use std::sync::Arc;
use std::time::Duration;

use apiserver::Cluster;
use controllers::certificates::{Asked, Signer};

/// The CA of one cluster.
pub struct ClusterSigner(pub Arc<Cluster>);

impl Signer for ClusterSigner {
    fn read(&self, pem: &[u8]) -> Result<Asked, String> {
        let request = Cluster::read_certificate_request(pem).map_err(|e| stdx::chain(&e).to_string())?;
        Ok(Asked {
            hosts: request.dns_names.len() + request.ip_addresses.len(),
            others: request.emails.len() + request.uris.len(),
            common_name: request.common_name,
            organizations: request.organizations,
        })
    }

    fn sign(&self, pem: &[u8], usages: &[String], ttl: Duration) -> Result<String, String> {
        self.0
            .sign_certificate_request(pem, usages, ttl)
            .map_err(|e| stdx::chain(&e).to_string())
    }
}

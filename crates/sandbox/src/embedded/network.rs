//! A network of nothing but loopback.

use std::{net::IpAddr, path::Path};

use async_trait::async_trait;

use crate::api::{Error, Network, PodIdentity, SandboxConfig};

/// Every sandbox has its own namespace with `lo` up and no other link.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoNetwork;

#[async_trait]
impl Network for NoNetwork {
    async fn attach(&self, _: &str, _: &SandboxConfig, _: &Path) -> Result<Vec<IpAddr>, Error> {
        Ok(Vec::new())
    }

    async fn detach(&self, _: &str, _: &PodIdentity, _: Option<&Path>) -> Result<(), Error> {
        Ok(())
    }

    async fn gc(&self, _: &[String]) -> Result<(), Error> {
        Ok(())
    }
}

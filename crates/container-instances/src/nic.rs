//! The group's NIC: the engine asks for a network, the host agent answers with a NIC of the delegated subnet.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use sandbox::{Error, Network, PodIdentity, SandboxConfig};
use thiserror::Error;

/// Annotations of a group's sandbox, set by [`crate::Groups`].
pub const VIRTUAL_NETWORK: &str = "oaks.internal/virtual-network";
pub const SUBNET: &str = "oaks.internal/subnet";
pub const CLUSTER: &str = "oaks.internal/cluster";

/// One NIC wanted for one sandbox.
#[derive(Clone, Debug, PartialEq)]
pub struct NicRequest {
    pub sandbox_id: String,
    pub pod: PodIdentity,
    /// Home object name of the VirtualNetwork, and the subnet's name in it.
    pub virtual_network: String,
    pub subnet: String,
    /// Hosted cluster whose Services are translated at the NIC's port.
    pub cluster: String,
    /// Bind-mounted network namespace of the sandbox.
    pub netns: PathBuf,
}

#[derive(Clone, Debug, Error, PartialEq)]
pub enum NicError {
    /// The subnet is full or not there.
    #[error("subnet {subnet}: {reason}")]
    Subnet { subnet: String, reason: String },
    #[error("{doing}: {reason}")]
    Failed { doing: String, reason: String },
}

/// NICs for groups; the host agent implements it over the fabric and home's NetworkInterface objects.
#[async_trait]
pub trait NicProvider: Send + Sync + 'static {
    /// Allocates, plugs in and configures a NIC; addresses, primary first. Idempotent per sandbox.
    async fn attach(&self, request: &NicRequest) -> Result<Vec<IpAddr>, NicError>;
    /// Unplugs and releases. Idempotent; `netns` is gone when the sandbox has crashed.
    async fn detach(&self, sandbox_id: &str, pod: &PodIdentity, netns: Option<&Path>) -> Result<(), NicError>;
    /// Releases everything that belongs to none of these sandboxes; called once when the engine opens.
    async fn gc(&self, live_sandboxes: &[String]) -> Result<(), NicError>;
}

/// The engine's network for groups.
pub struct NicNetwork {
    provider: Arc<dyn NicProvider>,
}

impl NicNetwork {
    pub fn new(provider: Arc<dyn NicProvider>) -> Self {
        Self { provider }
    }
}

fn error(sandbox: &str) -> impl FnOnce(NicError) -> Error {
    let sandbox = sandbox.to_owned();
    move |e| match e {
        NicError::Subnet { .. } => Error::Capacity { reason: e.to_string() },
        NicError::Failed { .. } => Error::Network {
            sandbox,
            reason: e.to_string(),
        },
    }
}

#[async_trait]
impl Network for NicNetwork {
    async fn attach(&self, sandbox_id: &str, config: &SandboxConfig, netns: &Path) -> Result<Vec<IpAddr>, Error> {
        let get = |key: &str| {
            config.annotations.get(key).cloned().ok_or_else(|| Error::Invalid {
                field: format!("annotations[{key}]"),
                reason: "missing: this network serves container groups only".into(),
            })
        };
        let request = NicRequest {
            sandbox_id: sandbox_id.to_owned(),
            pod: config.pod.clone(),
            virtual_network: get(VIRTUAL_NETWORK)?,
            subnet: get(SUBNET)?,
            cluster: config.annotations.get(CLUSTER).cloned().unwrap_or_default(),
            netns: netns.to_owned(),
        };
        self.provider.attach(&request).await.map_err(error(sandbox_id))
    }

    async fn detach(&self, sandbox_id: &str, pod: &PodIdentity, netns: Option<&Path>) -> Result<(), Error> {
        self.provider
            .detach(sandbox_id, pod, netns)
            .await
            .map_err(error(sandbox_id))
    }

    async fn gc(&self, live: &[String]) -> Result<(), Error> {
        self.provider.gc(live).await.map_err(error("(all)"))
    }
}

//! The host agent: keeps this host's VNets, edge and machines equal to the objects in home.
//!
//! One task reconciles the network (all objects -> one [`vnet_model::fabric::FabricSpec`] -> one apply); a controller with a
//! keyed queue reconciles machines, several at a time. Both act from state: a restart, a lost event and a first start are
//! the same code. Killing the agent stops nothing that runs.

mod application_groups;
mod endpoints;
pub mod hosts;
mod instances;
mod machine;
mod network;
pub mod plan;
mod public;
mod sites;
mod zones;

use std::{path::PathBuf, sync::Arc};

use reconcile::{Client, Informers};
use stdx::Shutdown;
use thiserror::Error;
use vnet_model::fabric::EdgeSpec;

pub use hosts::Here;
pub use machine::{FINALIZER, MachineStart};
pub use network::{Network, wanted};
pub use plan::cluster_marks;

/// What the agent is told at its start.
#[derive(Clone)]
pub struct AgentConfig {
    pub instance: String,
    /// This host; its name stands in `Machine.status.host`.
    pub here: Here,
    pub home: Client,
    pub informers: Informers,
    pub fabric: Arc<vnet::Fabric>,
    /// Pool, transit range, uplink and resolvers; its endpoints are filled from the objects.
    pub edge: EdgeSpec,
    pub start: Arc<MachineStart>,
}

#[derive(Debug, Error)]
pub enum AgentError {
    #[error("calling home")]
    Home {
        #[from]
        source: reconcile::Error,
    },
    #[error("network interface {nic} has no addresses yet")]
    NoAddresses { nic: String },
    #[error("secret {name} in home's kube-system: {reason}")]
    Bootstrap { name: String, reason: String },
    #[error("the network of this host")]
    Fabric {
        #[source]
        source: vnet::Error,
    },
    #[error("network namespace of {name}")]
    Netns {
        name: String,
        #[source]
        source: linux::netns::Error,
    },
    #[error(transparent)]
    Machine(#[from] crate::namespace::MachineError),
    #[error(transparent)]
    Tree(#[from] crate::tree::TreeError),
    #[error("cgroup of {name}")]
    Cgroup {
        name: String,
        #[source]
        source: linux::cgroup::CgroupError,
    },
    #[error("network interface {nic} was not in the data plane within {seconds} s; the host agent's log says why")]
    NotApplied { nic: String, seconds: u64 },
    #[error("{doing} was interrupted")]
    Interrupted { doing: &'static str },
}

/// Paths that the machines of this host share.
#[derive(Clone, Debug)]
pub struct HostPaths {
    pub run: PathBuf,
    pub tree: PathBuf,
    pub images: PathBuf,
    pub machines_data: PathBuf,
}

/// Runs until `shutdown`; errors of single objects are written to their status and retried, never fatal.
pub async fn run(config: AgentConfig, network: Network, shutdown: Shutdown) -> Result<(), AgentError> {
    machine::run(config, network, shutdown).await
}

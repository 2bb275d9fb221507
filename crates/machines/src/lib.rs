//! Machines: nodes of a cluster that live in namespaces of their own, the host agent that keeps them and the VNet data
//! plane equal to the objects in home, and the way inward to nodes and pods.
//!
//! Data flow: home objects -> [`agent`] (plan: [`agent::plan`], pure) -> `vnet::Fabric` and [`namespace`] machines -> status.

pub mod agent;
pub mod dial;
pub mod hosts;
pub mod namespace;
pub mod node_config;
mod sys;
pub mod tree;

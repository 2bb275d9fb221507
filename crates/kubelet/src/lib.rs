//! The node core and the kubelet HTTP API.
//!
//! One task per pod UID ([`pod::worker`]) looks at the pod, at what the runtime says and at the clock, asks a pure function
//! what to do next ([`pod::plan`]), does it, and writes what is true to the pod's status. [`Kubelet`] feeds these tasks
//! from the watch of pods bound to the node and from the runtime's events, registers the node, keeps its lease, and
//! serves logs, exec and stats. The lower edge is `sandbox`'s traits, the upper edge [`api::NodeApi`]: the same core is a
//! machine's agent and a virtual node's.

pub mod api;
pub mod client;
pub mod clock;
pub mod config;
mod env;
pub mod events;
#[cfg(feature = "fakes")]
pub mod fake;
mod fields;
mod http;
mod images;
pub mod kubelet;
mod node;
pub mod pod;
mod probes;
pub mod server;
#[cfg(test)]
mod testing;
mod volumes;

pub use client::ClientApi;
pub use config::*;
pub use kubelet::{Kubelet, KubeletError};

//! Typed views of ARM bodies: the fields that the platform acts on, parsed where they are needed.
//! Parsing is tolerant of unknown fields (they stay in the body) and strict about the ones named here.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// One translated frontend of a load balancer, in `LoadBalancer.spec.body.oaks.frontends[]`.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LbFrontend {
    /// Address of the public pool (or of a subnet, for internal ones).
    pub address: IpAddr,
    /// `tcp` or `udp`.
    pub protocol: String,
    pub port: u16,
    /// Home object name of the VirtualNetwork whose namespace translates.
    pub virtual_network: String,
    /// Ready pods, in no particular order; empty = connections are refused.
    pub backends: Vec<LbBackend>,
}

#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq, PartialOrd, Ord)]
pub struct LbBackend {
    pub address: IpAddr,
    pub port: u16,
}

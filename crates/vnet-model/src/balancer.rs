//! How a virtual network is reached from outside and leaves to the outside besides its default way: how load balancers
//! spread, probe and end flows, NAT gateways, public addresses of single instances, and outbound rules.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::fabric::Protocol;

/// What of a flow decides its backend; equal values, equal backend while the backends stay the same.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Distribution {
    /// Both addresses, both ports and the protocol: `Default` at ARM.
    #[default]
    FiveTuple,
    /// Both addresses: `SourceIP` at ARM.
    SourceIp,
    /// Both addresses and the protocol: `SourceIPProtocol` at ARM.
    SourceIpProtocol,
}

/// How a backend shows that it serves. Asked from 168.63.129.16 inside the virtual network.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProbeSpec {
    pub kind: ProbeKind,
    pub port: u16,
    /// From one question to the next.
    pub interval_ms: u32,
    /// Equal answers in a row that take a backend out or in; at least 1.
    pub threshold: u32,
}

#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ProbeKind {
    /// The port takes a connection.
    Tcp,
    /// A GET of the path is answered with 200.
    Http { path: String },
    /// The same over TLS; the certificate is not looked at.
    Https { path: String },
}

/// A NAT gateway: the subnets that name it leave by its addresses, whatever else they have.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NatGatewaySpec {
    pub key: String,
    /// Of the public pool. None: its subnets do not leave at all.
    pub addresses: Vec<Ipv4Addr>,
    /// Idle time after which a flow is forgotten; 0 is the kernel's own.
    #[serde(default)]
    pub idle_timeout_s: u32,
}

/// A public address of one private address, in both directions and for every protocol.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceAddressSpec {
    /// Of a NIC of the virtual network.
    pub private: Ipv4Addr,
    /// Of the public pool.
    pub public: Ipv4Addr,
    #[serde(default)]
    pub idle_timeout_s: u32,
}

/// SNAT ports of one private address at a load balancer's frontend; new flows beyond them are dropped.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OutboundSpec {
    /// Of a NIC of the virtual network.
    pub private: Ipv4Addr,
    pub protocol: Protocol,
    /// Of the public pool.
    pub public: Ipv4Addr,
    pub first_port: u16,
    pub last_port: u16,
    #[serde(default)]
    pub idle_timeout_s: u32,
}

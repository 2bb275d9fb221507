//! On-premises sites: objects of the platform, since ARM's gateway types promise IPsec and BGP, which are not offered.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A site of a virtual network, and the way to it: exactly one of `wireGuard` and `interface`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct SiteSpec {
    /// ARM id of the virtual network; it needs a subnet named `GatewaySubnet`.
    #[serde(default)]
    pub virtual_network: String,
    /// What is there, `192.168.0.0/24`.
    #[serde(default)]
    pub prefixes: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wire_guard: Option<WireGuardSpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<InterfaceSpec>,
    /// Anything else is refused by name.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// A site-to-site tunnel. This end's key is made by the host and kept in home's Secret `kube-system/site-<name>`
/// (`privateKey`); a `presharedKey` there (32 bytes) is used too.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct WireGuardSpec {
    /// UDP port of the host where this end listens.
    #[serde(default)]
    pub listen_port: u16,
    /// `203.0.113.2:51820`: the other end; without one it calls first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The other end's, base64.
    #[serde(default)]
    pub peer_public_key: String,
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// An interface of the host that the virtual network takes over, with static routes.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceSpec {
    #[serde(default)]
    pub name: String,
    /// Our address there, `192.0.2.1/30`.
    #[serde(default)]
    pub address: String,
    /// The router on the other side.
    #[serde(default)]
    pub gateway: String,
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct SiteStatus {
    /// Ready (the way is laid; whether the other end answers is not looked at) or Failed.
    #[serde(default)]
    pub phase: String,
    #[serde(default)]
    pub message: String,
    /// This end's public key, base64: for the other end's configuration.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub public_key: String,
}

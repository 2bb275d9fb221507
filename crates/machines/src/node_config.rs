//! What `oaks node` is told by the host agent: written into the machine before its first instant, mode 0600.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Where the file is in a machine.
pub const PATH: &str = "/etc/oaks/node.json";
/// The supervisor's socket and state in a machine.
pub const INIT_SOCKET: &str = "/run/oaks/init.sock";
pub const INIT_STATE: &str = "/run/oaks/init";
/// The host's image store in a machine (read-only), and the socket that asks the host to pull.
pub const IMAGES: &str = "/var/lib/images";
pub const PULL_SOCKET: &str = "/run/host/pull.sock";

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeConfig {
    pub node_name: String,
    /// Name of the hosted cluster, for logs.
    pub cluster: String,
    pub api_server: String,
    pub ca_pem: String,
    pub cert_pem: String,
    pub key_pem: String,
    pub serving_cert_pem: String,
    pub serving_key_pem: String,
    /// The NIC's primary address.
    pub address: Option<IpAddr>,
    pub vm_size: String,
    pub cpu_milli: i64,
    pub memory_bytes: i64,
    pub max_pods: i64,
    pub labels: BTreeMap<String, String>,
    pub taints: Vec<String>,
    pub service_cidr: String,
    pub dns_service_ip: Option<IpAddr>,
    pub cluster_domain: String,
    pub data_dir: PathBuf,
}

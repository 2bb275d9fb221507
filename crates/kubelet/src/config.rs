//! Everything a node is told at its start. Nothing here is read from the host.

use std::{collections::BTreeMap, io, net::IpAddr, net::SocketAddr, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Pod;
use sandbox::{Images, PodIdentity, Runtime};
use stdx::SharedClock;
use thiserror::Error;
use tokio::net::TcpStream;

use crate::api::NodeApi;

/// Kubernetes version that the node reports.
pub const KUBELET_VERSION: &str = "v1.36.4";

#[derive(Clone)]
pub struct KubeletConfig {
    /// Name of the Node object, also the `kubernetes.io/hostname` label.
    pub node_name: String,
    pub api: Arc<dyn NodeApi>,
    pub runtime: Arc<dyn Runtime>,
    pub images: Arc<dyn Images>,
    /// Volumes and per-pod files, `<root_dir>/pods/<uid>/...`; must survive a restart of the agent.
    pub root_dir: PathBuf,
    /// `<log_dir>/<namespace>_<name>_<uid>/<container>/<attempt>.log`; `/var/log/pods` by custom.
    pub log_dir: PathBuf,
    pub capacity: Capacity,
    /// How many pods the node takes, where that changes while it runs (addresses come and go); `None`: what `capacity` says.
    pub pods_limit: Option<tokio::sync::watch::Receiver<i64>>,
    /// Labels beside the ones every node has; these win over the defaults.
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// `key=value:Effect` or `key:Effect`.
    pub taints: Vec<String>,
    /// InternalIP addresses, primary first.
    pub addresses: Vec<IpAddr>,
    /// `node.kubernetes.io/instance-type`; empty = no label.
    pub instance_type: String,
    pub provider_id: Option<String>,
    /// Name of the image of the system, for `nodeInfo.osImage`.
    pub os_image: String,
    /// For `nodeInfo.containerRuntimeVersion`: `<name>://<version>`. The name is also the scheme of container ids.
    pub runtime_version: String,
    pub cluster_dns: Vec<IpAddr>,
    /// `cluster.local`.
    pub cluster_domain: String,
    /// `KUBERNETES_SERVICE_HOST/PORT` when the Service `default/kubernetes` cannot be read.
    pub kubernetes_service: Option<SocketAddr>,
    /// Port of the kubelet API that the Node object advertises; 0 = none.
    pub port: u16,
    /// Certificates for [`crate::Kubelet::serve`]; `None` = serving is refused.
    pub serving: Option<Serving>,
    pub features: Features,
    pub hooks: Arc<dyn Hooks>,
    /// How probes and `httpGet` hooks reach a pod address.
    pub dialer: Arc<dyn PodDialer>,
    pub clock: SharedClock,
    pub tuning: Tuning,
}

/// What the node advertises. Allocatable equals capacity: what the system itself uses is outside the machine's cgroup.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Capacity {
    pub cpu_milli: i64,
    pub memory_bytes: i64,
    pub pods: i64,
    pub ephemeral_storage_bytes: i64,
    /// Further resources by name, whole numbers.
    pub extended: BTreeMap<String, i64>,
}

impl KubeletConfig {
    /// Capacity as it is now.
    pub fn capacity_now(&self) -> Capacity {
        let mut now = self.capacity.clone();
        if let Some(limit) = &self.pods_limit {
            now.pods = *limit.borrow();
        }
        now
    }
}

/// PEM texts of the kubelet API's endpoint.
#[derive(Clone, Debug)]
pub struct Serving {
    pub cert_pem: String,
    pub key_pem: String,
    /// Callers must present a certificate signed by this CA.
    pub client_ca_pem: String,
}

/// What pods may ask of this node. What is off is refused with the field's path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Features {
    pub host_path: bool,
    pub host_network: bool,
    pub privileged: bool,
    /// The network honours `SandboxConfig::port_mappings`.
    pub host_port: bool,
}

impl Features {
    /// A machine: everything but hostPort, which needs a network that maps ports.
    pub const MACHINE: Self = Self {
        host_path: true,
        host_network: true,
        privileged: true,
        host_port: false,
    };
    /// A virtual node: no host is there to reach.
    pub const VIRTUAL: Self = Self {
        host_path: false,
        host_network: false,
        privileged: false,
        host_port: false,
    };
}

/// Intervals. The defaults are upstream's where upstream has one.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    pub lease_renew_s: u64,
    pub lease_duration_s: i32,
    pub node_status_s: u64,
    /// The safety net under runtime events.
    pub relist_s: u64,
    /// How old the content of a ConfigMap or Secret volume may be (upstream: up to 90 s).
    pub volume_refresh_s: u64,
    /// Status writes that change neither phase, readiness nor address wait this long for company.
    pub status_coalesce_ms: u64,
    /// Sandboxes and containers being started at one time.
    pub starts_max: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            lease_renew_s: 10,
            lease_duration_s: 40,
            node_status_s: 300,
            relist_s: 10,
            volume_refresh_s: 20,
            status_coalesce_ms: 100,
            starts_max: 8,
        }
    }
}

/// Why a pod does not run here.
#[derive(Clone, Debug, Error, PartialEq)]
#[error("{field}: {message}")]
pub struct Refusal {
    /// Condition and waiting reason: `Unsupported`, `OutOfcpu`, `QuotaExceeded`, ...
    pub reason: String,
    /// JSON path of the field, `spec.volumes[1].nfs`.
    pub field: String,
    pub message: String,
    /// True = the pod fails for good (upstream's admission failures); false = it waits, and its owner sees why.
    pub terminal: bool,
}

impl Refusal {
    /// A field that this node does not support: the pod waits with the path in plain sight.
    pub fn unsupported(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            reason: "Unsupported".into(),
            field: field.into(),
            message: message.into(),
            terminal: false,
        }
    }
}

/// Where whoever embeds the core takes part: admission by quota, and the two moments a meter needs.
#[async_trait]
pub trait Hooks: Send + Sync + 'static {
    /// Called before anything is made for the pod, and again every few seconds while it is refused without `terminal`.
    async fn admit(&self, _pod: &Pod) -> Result<(), Refusal> {
        Ok(())
    }
    /// The pod ran before this agent did and goes on: it is not asked whether it may. May repeat.
    async fn adopted(&self, _pod: &Pod) {}
    /// The first image of the pod is about to be pulled.
    async fn pulling(&self, _pod: &PodIdentity) {}
    /// Nothing of the pod runs any more and nothing will (it ended, was deleted or was lost). May repeat.
    async fn stopped(&self, _pod: &PodIdentity) {}
    /// Condition and message if the backend is in trouble: shown as `BackendReachable=False`; the lease goes on.
    async fn backend_trouble(&self) -> Option<String> {
        None
    }
}

/// Hooks of a plain machine.
pub struct NoHooks;

impl Hooks for NoHooks {}

/// A TCP connection to a pod's address from where the node's probes come from.
#[async_trait]
pub trait PodDialer: Send + Sync + 'static {
    async fn dial(&self, sandbox_id: &str, address: SocketAddr) -> io::Result<TcpStream>;
}

/// The agent lives in the network that its pods are reachable from.
pub struct DirectDialer;

#[async_trait]
impl PodDialer for DirectDialer {
    async fn dial(&self, _sandbox_id: &str, address: SocketAddr) -> io::Result<TcpStream> {
        TcpStream::connect(address).await
    }
}

/// Dials inside the sandbox, for agents that have no route to pods.
pub struct SandboxDialer(pub Arc<dyn Runtime>);

#[async_trait]
impl PodDialer for SandboxDialer {
    async fn dial(&self, sandbox_id: &str, address: SocketAddr) -> io::Result<TcpStream> {
        self.0.dial(sandbox_id, address.port()).await.map_err(io::Error::other)
    }
}

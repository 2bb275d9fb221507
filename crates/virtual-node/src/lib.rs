//! The virtual kubelet: the kubelet core over container instances.
//!
//! Labels and the taint are the ones that manifests written for AKS virtual nodes select and tolerate, of both
//! generations. The node stays a target of load balancers, since its pods have addresses of the virtual network. It works
//! with or without a home.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::Arc,
};

use container_instances::Groups;
use kubelet::{
    Capacity, Features, Kubelet, KubeletConfig, KubeletError, PodDialer, SandboxDialer, Serving, Tuning, api::NodeApi,
};
use stdx::{SharedClock, Shutdown};

/// What AKS manifests tolerate: `virtual-kubelet.io/provider` (operator Exists, or value `azure`). A further toleration of
/// `azure.com/aci`, which the documented samples carry beside it, does no harm and is not needed.
pub const TAINT: &str = "virtual-kubelet.io/provider=azure:NoSchedule";

/// What AKS manifests select: `kubernetes.io/role: agent`, `type: virtual-kubelet` and `kubernetes.io/os: linux` (which
/// every node has) for the first generation, `virtualization: virtualnode2` for the second.
pub const LABELS: &[(&str, &str)] = &[
    ("type", "virtual-kubelet"),
    ("kubernetes.io/role", "agent"),
    ("virtualization", "virtualnode2"),
    ("kubernetes.azure.com/managed", "false"),
];

#[derive(Clone)]
pub struct VirtualNodeConfig {
    /// For example `virtual-node-aci-linux`.
    pub node_name: String,
    pub api: Arc<dyn NodeApi>,
    pub groups: Arc<Groups>,
    /// Volumes and per-pod files; must survive a restart.
    pub root_dir: PathBuf,
    pub log_dir: PathBuf,
    /// What the node advertises; never more than the quota of its groups allows.
    pub cpu_milli: i64,
    pub memory_bytes: i64,
    pub pods: i64,
    /// Where the API server reaches the kubelet API, primary first.
    pub addresses: Vec<IpAddr>,
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    /// Address of the Service `default/kubernetes`, for pods that start before it can be read.
    pub kubernetes_service: Option<SocketAddr>,
    /// Port of the kubelet API; 0 = not served.
    pub port: u16,
    pub serving: Option<Serving>,
    /// How probes reach pod addresses; `None` = from inside each group's own network namespace.
    pub dialer: Option<Arc<dyn PodDialer>>,
    /// Labels beside [`LABELS`].
    pub labels: BTreeMap<String, String>,
    pub clock: SharedClock,
    pub tuning: Tuning,
}

/// One virtual node. Cheap to clone.
#[derive(Clone)]
pub struct VirtualNode {
    kubelet: Kubelet,
    groups: Arc<Groups>,
}

impl VirtualNode {
    /// Nothing runs before [`VirtualNode::run`].
    ///
    /// # Errors
    /// The directories cannot be made.
    pub fn new(config: VirtualNodeConfig) -> Result<Self, KubeletError> {
        let groups = config.groups.clone();
        Ok(Self {
            kubelet: Kubelet::new(kubelet_config(config))?,
            groups,
        })
    }

    /// Registers the node and runs its pods until shutdown; groups go on running and are adopted by the next agent.
    pub async fn run(&self, shutdown: Shutdown) {
        tokio::join!(Box::pin(self.kubelet.run(shutdown.clone())), self.groups.run(shutdown));
    }

    /// Serves logs, exec and stats on a listener that the caller made inside the virtual network's namespace.
    ///
    /// # Errors
    /// No or unusable certificates, or an unusable listener.
    pub async fn serve(&self, listener: TcpListener, shutdown: Shutdown) -> Result<(), KubeletError> {
        self.kubelet.serve(listener, shutdown).await
    }

    /// Resolves once the node is registered.
    pub async fn registered(&self) {
        self.kubelet.registered().await;
    }

    /// Deletes the Node object, after its pods were drained: no ghost stays behind.
    ///
    /// # Errors
    /// What the API says.
    pub async fn deregister(&self) -> Result<(), KubeletError> {
        self.kubelet.deregister().await
    }
}

/// The core's configuration for a virtual node.
pub fn kubelet_config(c: VirtualNodeConfig) -> KubeletConfig {
    let quota = *c.groups.quota();
    let mut labels: BTreeMap<String, String> = LABELS.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    labels.extend(c.labels);
    let groups = i64::try_from(quota.groups).unwrap_or(i64::MAX);
    let runtime: Arc<dyn sandbox::Runtime> = c.groups.clone();
    KubeletConfig {
        pods_limit: None,
        node_name: c.node_name,
        api: c.api,
        images: c.groups.clone(),
        root_dir: c.root_dir,
        log_dir: c.log_dir,
        capacity: Capacity {
            cpu_milli: c.cpu_milli.min(quota.cpu_milli),
            memory_bytes: c.memory_bytes.min(quota.memory_bytes),
            pods: c.pods.min(groups),
            ephemeral_storage_bytes: 50_000_000_000 * c.pods.min(groups),
            extended: BTreeMap::new(),
        },
        labels,
        annotations: BTreeMap::new(),
        taints: vec![TAINT.into()],
        addresses: c.addresses,
        instance_type: String::new(),
        provider_id: None,
        os_image: "Oaks container groups".into(),
        runtime_version: concat!("oaks://", env!("CARGO_PKG_VERSION")).into(),
        cluster_dns: c.cluster_dns,
        cluster_domain: c.cluster_domain,
        kubernetes_service: c.kubernetes_service,
        port: c.port,
        serving: c.serving,
        features: Features::VIRTUAL,
        hooks: c.groups,
        dialer: c.dialer.unwrap_or_else(|| Arc::new(SandboxDialer(runtime.clone()))),
        runtime,
        clock: c.clock,
        tuning: c.tuning,
    }
}

//! AKS itself: managed clusters and agent pools as objects of the home cluster, reconciled from state.
//!
//! One queue key per cluster. A pass (`reconcile_cluster`) reads the cluster's body with its defaults, makes what is missing in
//! order (node resource group, VNet, API address, control plane, pools, virtual node), and writes one status; it returns
//! instead of waiting, and comes back when something it depends on changes: its own objects, or the nodes of the hosted
//! cluster. Deletion (`teardown`) is the same in the other direction. LoadBalancer Services have their own loop
//! (`services`), since endpoints change often and clusters do not.
//!
//! What a control plane is, this crate does not know: [`ControlPlanes`] makes them. Machines are run by host agents that watch
//! [`resources::Machine`].

mod context;
mod control_plane;
mod credentials;
mod drain;
pub mod names;
mod pool;
mod power;
mod reconcile_cluster;
mod service_request;
mod services;
mod status;
mod teardown;
mod virtual_node;

use std::sync::Arc;

use reconcile::{Change, Client, Informers, Queue, run_controller};
use resources::{
    AgentPool, LoadBalancer, Machine, ManagedCluster, NetworkInterface, PublicIPAddress, ResourceGroup, VirtualNetwork,
    VirtualNode,
};
use stdx::{SharedClock, Shutdown};

pub use control_plane::{
    ClientCert, ControlPlaneError, ControlPlaneSpec, ControlPlanes, Endpoint, NodeCerts, NodeIdentity,
};
pub use credentials::{CredentialError, kubeconfig};

use context::{Context, Watched};

/// Clusters worked on at once.
const WORKERS: usize = 8;

/// What [`run`] needs.
pub struct Config {
    /// The home cluster.
    pub home: Client,
    pub informers: Informers,
    pub control_planes: Arc<dyn ControlPlanes>,
    /// Tenant id, for identities that bodies show.
    pub tenant: String,
    pub clock: SharedClock,
    pub shutdown: Shutdown,
}

/// Runs until `shutdown`.
pub async fn run(config: Config) {
    let queue: Queue<String> = Queue::new();
    let service_queue: Queue<String> = Queue::new();
    let informers = &config.informers;
    for q in [&queue, &service_queue] {
        let q = q.clone();
        informers
            .get::<ManagedCluster>()
            .on_change(move |c| q.add(c.key().name.clone()));
    }
    belongs::<PublicIPAddress>(informers, &queue);
    belongs::<PublicIPAddress>(informers, &service_queue);
    belongs::<LoadBalancer>(informers, &service_queue);
    belongs::<LoadBalancer>(informers, &queue);
    belongs::<ResourceGroup>(informers, &queue);
    belongs::<VirtualNetwork>(informers, &queue);
    belongs::<NetworkInterface>(informers, &queue);
    belongs::<AgentPool>(informers, &queue);
    belongs::<Machine>(informers, &queue);
    belongs::<VirtualNode>(informers, &queue);
    let shutdown = config.shutdown.clone();
    let context = Arc::new(Context::new(
        config,
        Watched {
            clusters: queue.clone(),
            services: service_queue.clone(),
        },
    ));
    context.wait_synced().await;
    let (a, b) = (context.clone(), context);
    let clusters = run_controller(
        "managed-cluster",
        queue,
        WORKERS,
        move |name: String| {
            let context = a.clone();
            async move { reconcile_cluster::reconcile(&context, &name).await }
        },
        shutdown.clone(),
    );
    let services = run_controller(
        "load-balancer",
        service_queue,
        WORKERS,
        move |name: String| {
            let context = b.clone();
            async move { services::reconcile(&context, &name).await }
        },
        shutdown,
    );
    tokio::join!(clusters, services);
}

/// Queues the cluster that a changed object belongs to.
fn belongs<K: reconcile::Kind>(informers: &Informers, queue: &Queue<String>) {
    let queue = queue.clone();
    informers.get::<K>().on_change(move |change: &Change| {
        if let Some(cluster) = change.latest().header.labels.get(names::CLUSTER_LABEL) {
            queue.add(cluster.clone());
        }
    });
}

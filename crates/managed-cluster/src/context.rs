//! What every pass uses: the home client and caches, the control planes, and which hosted clusters are being watched.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use reconcile::{Client, DeleteParams, Error, Informer, Informers, Kind, Queue, Recorder, store::Store};
use resources::{
    AgentPool, LoadBalancer, Machine, ManagedCluster, NetworkInterface, PublicIPAddress, ResourceGroup, VirtualNetwork,
    VirtualNode, labels_of,
};
use stdx::{SharedClock, Shutdown};

use crate::{Config, ControlPlanes, names};

/// Queues that changes inside a hosted cluster go to.
pub(crate) struct Watched {
    pub clusters: Queue<String>,
    pub services: Queue<String>,
}

/// Hosted clusters whose changes are being heard, with the store of their nodes (a recreated cluster has another one).
type Heard = BTreeMap<String, (Arc<Store>, Arc<Recorder>)>;

/// Component that events about Services name, as upstream's controller does.
const SERVICE_CONTROLLER: &str = "service-controller";

pub(crate) struct Context {
    pub home: Client,
    pub control_planes: Arc<dyn ControlPlanes>,
    pub tenant: String,
    pub clock: SharedClock,
    pub clusters: Informer<ManagedCluster>,
    pub groups: Informer<ResourceGroup>,
    pub vnets: Informer<VirtualNetwork>,
    pub nics: Informer<NetworkInterface>,
    pub public_ips: Informer<PublicIPAddress>,
    pub load_balancers: Informer<LoadBalancer>,
    pub pools: Informer<AgentPool>,
    pub machines: Informer<Machine>,
    pub virtual_nodes: Informer<VirtualNode>,
    shutdown: Shutdown,
    queues: Watched,
    heard: Mutex<Heard>,
}

impl Context {
    pub fn new(config: Config, queues: Watched) -> Self {
        let i = &config.informers;
        Self {
            clusters: i.get(),
            groups: i.get(),
            vnets: i.get(),
            nics: i.get(),
            public_ips: i.get(),
            load_balancers: i.get(),
            pools: i.get(),
            machines: i.get(),
            virtual_nodes: i.get(),
            home: config.home,
            control_planes: config.control_planes,
            tenant: config.tenant,
            clock: config.clock,
            shutdown: config.shutdown,
            queues,
            heard: Mutex::default(),
        }
    }

    /// Acting on a half-filled cache would make machines twice.
    pub async fn wait_synced(&self) {
        self.clusters.wait_synced().await;
        self.groups.wait_synced().await;
        self.vnets.wait_synced().await;
        self.nics.wait_synced().await;
        self.public_ips.wait_synced().await;
        self.load_balancers.wait_synced().await;
        self.pools.wait_synced().await;
        self.machines.wait_synced().await;
        self.virtual_nodes.wait_synced().await;
    }

    /// Client and informers of a hosted cluster; the first call for a cluster starts listening to its nodes, Services and
    /// endpoints.
    pub fn hosted(&self, name: &str) -> Option<(Client, Informers)> {
        let (client, informers) = self.control_planes.client(name)?;
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let store = informers.get::<Node>().store().clone();
        if !heard.get(name).is_some_and(|h| Arc::ptr_eq(&h.0, &store)) {
            let (clock, shutdown) = (self.clock.clone(), self.shutdown.clone());
            let recorder = Recorder::new(client.clone(), SERVICE_CONTROLLER, "", clock, shutdown);
            heard.insert(name.to_owned(), (store, Arc::new(recorder)));
            drop(heard);
            tell::<Node>(&informers, &self.queues.clusters, name);
            tell::<Service>(&informers, &self.queues.services, name);
            tell::<EndpointSlice>(&informers, &self.queues.services, name);
        }
        Some((client, informers))
    }

    /// Writes events into a hosted cluster; there once [`Context::hosted`] was called for it.
    pub fn recorder(&self, name: &str) -> Option<Arc<Recorder>> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.get(name).map(|h| h.1.clone())
    }

    /// Stops remembering a cluster that is gone.
    pub fn forget(&self, name: &str) {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// Creates an object of home; an existing one of that name is fine.
    pub async fn create<K: Kind>(&self, namespace: Option<&str>, object: &K) -> Result<(), Error> {
        match self.home.create(namespace, object).await {
            Err(e) if !e.is_already_exists() => Err(e),
            _ => Ok(()),
        }
    }

    /// Asks for deletion; fine if it is gone.
    pub async fn delete<K: Kind>(&self, namespace: Option<&str>, name: &str) -> Result<(), Error> {
        match self.home.delete::<K>(namespace, name, &DeleteParams::default()).await {
            Err(e) if !e.is_not_found() => Err(e),
            _ => Ok(()),
        }
    }
}

fn tell<K: Kind>(informers: &Informers, queue: &Queue<String>, name: &str) {
    let (queue, name) = (queue.clone(), name.to_owned());
    informers.get::<K>().on_change(move |_| queue.add(name.clone()));
}

/// Marks an object as part of a cluster: labels for finding it, an owner for those who ask whose it is.
pub(crate) fn own(metadata: &mut ObjectMeta, cluster: &ManagedCluster, arm_id: &str) {
    let labels = metadata.labels.get_or_insert_default();
    labels.extend(labels_of(arm_id));
    labels.insert(names::CLUSTER_LABEL.to_owned(), cluster.name().to_owned());
    metadata.owner_references = Some(vec![OwnerReference {
        api_version: cluster.api_version.clone(),
        kind: "ManagedCluster".to_owned(),
        name: cluster.name().to_owned(),
        uid: cluster.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(false),
    }]);
}

/// True if an object belongs to the cluster.
pub(crate) fn is_of(metadata: &ObjectMeta, cluster: &str) -> bool {
    metadata
        .labels
        .as_ref()
        .and_then(|l| l.get(names::CLUSTER_LABEL))
        .is_some_and(|c| c == cluster)
}

/// True if an object belongs to the pool of the cluster.
pub(crate) fn is_of_pool(metadata: &ObjectMeta, cluster: &str, pool: &str) -> bool {
    is_of(metadata, cluster)
        && metadata
            .labels
            .as_ref()
            .and_then(|l| l.get(names::POOL_LABEL))
            .is_some_and(|p| p == pool)
}

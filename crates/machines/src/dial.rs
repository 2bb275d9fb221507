//! The way inward: a connection to a node or pod is a socket made inside the namespace of its virtual network, so nothing
//! depends on routes of the host, and two networks with equal ranges do not meet.

use std::{io, net::SocketAddr, sync::Arc};

use reconcile::{Informer, Informers};
use resources::{
    Machine, NetworkInterface, VirtualNode,
    views::{NicAddresses, subnet_ref},
};

/// Finds the virtual network of a cluster's node and connects there.
#[derive(Clone)]
pub struct InwardDialer {
    fabric: Arc<vnet::Fabric>,
    machines: Informer<Machine>,
    nics: Informer<NetworkInterface>,
    virtual_nodes: Informer<VirtualNode>,
}

impl InwardDialer {
    pub fn new(home: &Informers, fabric: Arc<vnet::Fabric>) -> Self {
        Self {
            fabric,
            machines: home.get(),
            nics: home.get(),
            virtual_nodes: home.get(),
        }
    }

    /// Home object name of the virtual network that `node` of `cluster` stands in; any node's of the cluster if `node` is
    /// empty (pods and Services: every node of a cluster is in one network).
    pub fn network_of(&self, cluster: &str, node: &str) -> Option<String> {
        let is_it = |c: &str, n: &str| c == cluster && (node.is_empty() || n == node);
        if let Some(v) = self
            .virtual_nodes
            .list()
            .iter()
            .find(|v| is_it(&v.spec.bootstrap.cluster, &v.spec.node_name))
        {
            return Some(v.spec.virtual_network.clone());
        }
        let machines = self.machines.list();
        let machine = machines
            .iter()
            .find(|m| is_it(&m.spec.bootstrap.cluster, &m.spec.node_name))?;
        let nic = self.nics.get("", &machine.spec.nic)?;
        let addresses = NicAddresses::parse(&nic.status.as_ref()?.properties)?;
        Some(subnet_ref(&addresses.primary()?.subnet)?.0)
    }

    /// Connects to `address` in the network of `node`.
    ///
    /// # Errors
    /// `NotFound` if the platform knows no such node; else what the kernel says.
    pub async fn dial(&self, cluster: &str, node: &str, address: SocketAddr) -> io::Result<tokio::net::TcpStream> {
        let Some(network) = self.network_of(cluster, node) else {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("cluster {cluster} has no node {node:?} on this platform"),
            ));
        };
        let stream = self
            .fabric
            .dial_async(&network, address)
            .await
            .map_err(|e| io::Error::other(stdx::chain(&e).to_string()))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

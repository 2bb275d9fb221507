//! Names and ids that follow from a cluster's id. Pure and stable: nothing that is named here is ever stored to be found again.

use resources::{ArmId, group_id, object_name};

/// Label with the object name of the managed cluster, on everything that belongs to one.
pub const CLUSTER_LABEL: &str = "oaks.internal/cluster";
/// Label with the pool's name, on machines, interfaces and secrets of a pool.
pub const POOL_LABEL: &str = "oaks.internal/pool";
/// Label with the uid of the Service that a public address belongs to.
pub const SERVICE_LABEL: &str = "oaks.internal/service";
/// Finalizer of managed clusters.
pub const FINALIZER: &str = "oaks.internal/managed-cluster";
/// Name of the Kubernetes node that the virtual-node add-on makes.
pub const VIRTUAL_NODE: &str = "virtual-node-aci-linux";

/// FNV-1a over the folded text: stable, and good enough to spread names.
fn hash(text: &str) -> u64 {
    text.bytes()
        .map(|b| b.to_ascii_lowercase())
        .fold(0xcbf2_9ce4_8422_2325, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        })
}

/// The 8 digits that all node names of a cluster share.
pub fn digits(cluster_id: &str) -> String {
    format!("{:08}", hash(cluster_id) % 100_000_000)
}

/// `aks-<pool>-<8 digits>-vmss<6 base-36 digits>`.
pub fn node(pool: &str, cluster_id: &str, index: u32) -> String {
    format!("aks-{pool}-{}-vmss{}", digits(cluster_id), base36(index))
}

fn base36(mut n: u32) -> String {
    let mut out = [b'0'; 6];
    for slot in out.iter_mut().rev() {
        *slot = b"0123456789abcdefghijklmnopqrstuvwxyz"[(n % 36) as usize];
        n /= 36;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The index in a node's name; `None` if it is not one.
pub fn index(node: &str) -> Option<u32> {
    let (_, tail) = node.rsplit_once("-vmss")?;
    u32::from_str_radix(tail.get(..6)?, 36).ok()
}

/// Home object name of a node's machine: the node's name and the end of the cluster's, since node names repeat across homes.
pub fn machine(node: &str, cluster_object: &str) -> String {
    let tail = cluster_object.rsplit('-').next().unwrap_or_default();
    format!("{node}-{tail}")
}

/// Name of the Secret with a node's certificates.
pub fn secret(machine: &str) -> String {
    format!("bootstrap-{machine}")
}

/// Ids of what a cluster has in its node resource group.
#[derive(Clone, Debug)]
pub struct Ids {
    /// ARM id of the cluster, in its first casing.
    pub cluster: String,
    /// Home object name of the cluster, also its name in the API server.
    pub object: String,
    pub node_group: String,
    network: String,
}

impl Ids {
    pub fn new(id: &ArmId, node_resource_group: &str) -> Self {
        let cluster = id.to_string();
        let node_group = group_id(&id.subscription, node_resource_group);
        let network = format!("{node_group}/providers/Microsoft.Network");
        Self {
            object: object_name(&cluster),
            cluster,
            node_group,
            network,
        }
    }

    pub fn api_address(&self) -> String {
        format!("{}/publicIPAddresses/api-{}", self.network, digits(&self.cluster))
    }

    pub fn service_address(&self, service_uid: &str) -> String {
        format!(
            "{}/publicIPAddresses/kubernetes-{}",
            self.network,
            service_uid.replace('-', "")
        )
    }

    pub fn load_balancer(&self) -> String {
        format!("{}/loadBalancers/kubernetes", self.network)
    }

    pub fn internal_load_balancer(&self) -> String {
        format!("{}/loadBalancers/kubernetes-internal", self.network)
    }

    pub fn interface(&self, node: &str) -> String {
        format!("{}/networkInterfaces/{node}-nic", self.network)
    }

    pub fn pool(&self, pool: &str) -> String {
        format!("{}/agentPools/{pool}", self.cluster)
    }

    /// A user-assigned identity that the platform keeps for the cluster: `agentpool`, `aciconnectorlinux`.
    pub fn identity(&self, what: &str) -> String {
        let name = self.cluster.rsplit('/').next().unwrap_or_default();
        format!(
            "{}/providers/Microsoft.ManagedIdentity/userAssignedIdentities/{name}-{what}",
            self.node_group
        )
    }
}

/// A GUID that depends only on `seed` (version 8 of RFC 9562).
pub fn guid(seed: &str) -> String {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&hash(seed).to_be_bytes());
    bytes[8..].copy_from_slice(&hash(&format!("{seed}/")).to_be_bytes());
    uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names_count_in_base_36_and_parse_back() {
        let n = node("nodepool1", "/subscriptions/s/c", 36 * 36 + 35);
        assert!(n.starts_with("aks-nodepool1-") && n.ends_with("-vmss00010z"), "{n}");
        assert_eq!(index(&n), Some(36 * 36 + 35));
        assert_eq!(digits("/A"), digits("/a"));
        assert_eq!(index("virtual-node-aci-linux"), None);
    }
}

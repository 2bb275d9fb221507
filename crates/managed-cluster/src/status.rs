//! What ARM shows of a cluster and its pools beyond what was sent. Pure.

use k8s_openapi::api::core::v1::Node;
use resources::{
    ArmError, ArmStatus, ManagedCluster,
    aks::{self, ClusterView, PoolView},
};
use serde_json::{Value, json};

use crate::names::{Ids, guid};

/// Steps that a status remembers.
const STEPS_MAX: usize = 16;
/// Names the tree that machines run, as AKS names its images.
const NODE_IMAGE: &str = "AKSOaks-minimal-1";

/// Where the work on a pool or cluster is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Progress {
    Done,
    /// Plain words for what is being waited for.
    Working(String),
    Failed(ArmError),
}

impl Progress {
    pub fn failed(code: &str, message: impl Into<String>) -> Self {
        Self::Failed(ArmError {
            code: code.to_owned(),
            message: message.into(),
        })
    }
}

/// The status after a pass. A cluster that was done stays done until its spec changes: a node that drops out later is the
/// business of Kubernetes, not of provisioning.
pub(crate) fn next(old: Option<&ArmStatus>, generation: i64, progress: &Progress, properties: Value) -> ArmStatus {
    let empty = ArmStatus::default();
    let old = old.unwrap_or(&empty);
    let settled = old.observed_generation == generation && old.provisioning_state == "Succeeded";
    let mut steps = if old.observed_generation == generation {
        old.steps.clone()
    } else {
        Vec::new()
    };
    let (state, error) = match progress {
        Progress::Done => ("Succeeded", None),
        Progress::Working(_) if settled => ("Succeeded", None),
        Progress::Working(_) if old.observed_generation == 0 || old.provisioning_state == "Creating" => {
            ("Creating", None)
        }
        Progress::Working(_) => ("Updating", None),
        Progress::Failed(e) => ("Failed", Some(e.clone())),
    };
    let step = match progress {
        Progress::Done => "done".to_owned(),
        Progress::Working(what) => what.clone(),
        Progress::Failed(e) => e.message.clone(),
    };
    if steps.last() != Some(&step) {
        steps.push(step);
    }
    if steps.len() > STEPS_MAX {
        steps.drain(..steps.len() - STEPS_MAX);
    }
    ArmStatus {
        provisioning_state: state.to_owned(),
        observed_generation: generation,
        properties,
        error,
        steps,
    }
}

/// Read-only properties of one pool, in the flat form.
pub(crate) fn pool(view: &ClusterView, pool: &PoolView) -> Value {
    json!({
        "vmSize": pool.size.name,
        "maxPods": pool.max_pods,
        "orchestratorVersion": view.kubernetes_version,
        "currentOrchestratorVersion": view.kubernetes_version,
        "nodeImageVersion": NODE_IMAGE,
        "powerState": {"code": "Running"},
        "osType": "Linux",
        "osSKU": "Oaks",
        "type": "VirtualMachineScaleSets",
        "mode": if pool.system { "System" } else { "User" },
        "enableAutoScaling": false,
    })
}

/// Says of a cluster and its pools that they are stopped.
pub(crate) fn stopped(properties: &mut Value) {
    let off = json!({"code": "Stopped"});
    for pool in properties["agentPoolProfiles"].as_array_mut().into_iter().flatten() {
        pool["powerState"] = off.clone();
    }
    properties["powerState"] = off;
}

/// Read-only properties of a cluster. `pools` are the states of its pools by name.
pub(crate) fn cluster(
    cluster: &ManagedCluster,
    view: &ClusterView,
    ids: &Ids,
    tenant: &str,
    pools: &[(String, String)],
) -> Value {
    let state = |name: &str| {
        pools
            .iter()
            .find(|p| p.0 == name)
            .map_or("Creating", |p| p.1.as_str())
            .to_owned()
    };
    let profiles: Vec<Value> = view
        .pools
        .iter()
        .map(|p| {
            let mut v = pool(view, p);
            v["name"] = json!(p.name);
            v["provisioningState"] = json!(state(&p.name));
            v
        })
        .collect();
    let identity = |what: &str| {
        let id = ids.identity(what);
        json!({"resourceId": id, "clientId": guid(&format!("client {id}")), "objectId": guid(&format!("object {id}"))})
    };
    let mut out = json!({
        "kubernetesVersion": view.kubernetes_version,
        "currentKubernetesVersion": view.kubernetes_version,
        "powerState": {"code": "Running"},
        "maxAgentPools": aks::POOLS_MAX,
        "dnsPrefix": view.dns_prefix,
        "fqdn": fqdn(view, ids),
        "nodeResourceGroup": view.node_resource_group,
        "enableRBAC": true,
        "supportPlan": "KubernetesOfficial",
        "resourceUID": cluster.metadata.uid,
        "agentPoolProfiles": profiles,
        "servicePrincipalProfile": {"clientId": "msi"},
        "identityProfile": {"kubeletidentity": identity("agentpool")},
        "networkProfile": {
            "networkPlugin": "azure",
            "loadBalancerSku": "standard",
            "outboundType": "loadBalancer",
            "serviceCidr": view.service_cidr.to_string(),
            "serviceCidrs": [view.service_cidr.to_string()],
            "dnsServiceIP": view.dns_service_ip.to_string(),
            "ipFamilies": ["IPv4"],
        },
        "oaksIdentity": {
            "principalId": guid(&format!("principal {}", ids.cluster)),
            "tenantId": tenant,
        },
    });
    if view.virtual_node_subnet.is_some() {
        out["addonProfiles"] = json!({"aciConnectorLinux": {"identity": identity("aciconnectorlinux")}});
    }
    out
}

/// A name for people and certificates; it follows from the id, so it is there before the address is.
pub(crate) fn fqdn(view: &ClusterView, ids: &Ids) -> String {
    let short: String = guid(&ids.cluster).chars().take(8).collect();
    let location = view.location.to_lowercase().replace(' ', "");
    format!(
        "{}-{short}.hcp.{location}.oaks.internal",
        view.dns_prefix.to_lowercase()
    )
}

/// True if the kubelet says Ready.
pub(crate) fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_follow_the_generation() {
        let working = Progress::Working("w".into());
        let creating = next(None, 1, &working, json!({}));
        assert_eq!(
            (creating.provisioning_state.as_str(), creating.observed_generation),
            ("Creating", 1)
        );
        let done = next(Some(&creating), 1, &Progress::Done, json!({}));
        assert_eq!(done.provisioning_state, "Succeeded");
        assert_eq!(done.steps, ["w", "done"]);
        assert_eq!(
            next(Some(&done), 1, &working, json!({})).provisioning_state,
            "Succeeded",
            "a node that drops out"
        );
        assert_eq!(next(Some(&done), 2, &working, json!({})).provisioning_state, "Updating");
        let failed = next(Some(&creating), 1, &Progress::failed("X", "why"), json!({}));
        assert_eq!(failed.error.as_ref().unwrap().code, "X");
        assert_eq!(next(Some(&failed), 1, &Progress::Done, json!({})).error, None);
    }
}

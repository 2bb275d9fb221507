//! What the platform acts on in a managed cluster's body, with every default filled in. An empty string means "default",
//! since that is what `az aks create` sends. What is not served is refused here by its path, never dropped.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use serde_json::Value;

use crate::{
    ArmId,
    views::ViewError,
    vm_size::{self, VmSize},
};

/// Versions that clusters can have, newest first; the first is the default.
pub const KUBERNETES_VERSIONS: &[&str] = &["1.36.4"];
/// Where a cluster without a subnet of its own is put: a VNet of this prefix in the node resource group, with this subnet.
pub const OWN_VNET_PREFIX: &str = "10.224.0.0/12";
pub const OWN_SUBNET_PREFIX: &str = "10.224.0.0/16";
pub const OWN_SUBNET: &str = "aks-subnet";
pub const SERVICE_CIDR: &str = "10.0.0.0/16";
pub const DNS_SERVICE_IP: &str = "10.0.0.10";
pub const CLUSTER_DOMAIN: &str = "cluster.local";
/// Nodes of one pool, and pools of one cluster.
pub const POOL_COUNT_MAX: i64 = 100;
pub const POOLS_MAX: usize = 100;

/// A managed cluster with its defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterView {
    pub location: String,
    pub kubernetes_version: String,
    pub dns_prefix: String,
    /// Name of the node resource group.
    pub node_resource_group: String,
    pub service_cidr: IpNet,
    pub dns_service_ip: IpAddr,
    pub pools: Vec<PoolView>,
    /// Name of the delegated subnet, if the virtual-node add-on is on.
    pub virtual_node_subnet: Option<String>,
}

/// One agent pool with its defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolView {
    pub name: String,
    pub system: bool,
    pub count: i64,
    pub size: &'static VmSize,
    pub max_pods: i64,
    /// ARM id; absent = the cluster's own VNet.
    pub subnet: Option<String>,
    pub labels: BTreeMap<String, String>,
    /// `key=value:Effect`.
    pub taints: Vec<String>,
}

impl PoolView {
    /// Addresses that the pool's nodes hold: one per node and one per pod that it may run.
    pub fn addresses(&self) -> u64 {
        u64::try_from(self.count.saturating_mul(self.max_pods + 1)).unwrap_or(0)
    }
}

fn bad<T>(path: impl Into<String>, problem: impl Into<String>) -> Result<T, ViewError> {
    Err(ViewError {
        path: path.into(),
        problem: problem.into(),
    })
}

/// The string at a pointer; empty if absent or null.
fn text<'a>(v: &'a Value, pointer: &str) -> &'a str {
    v.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// JSON pointer to the path form that clients know.
fn dotted(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

/// `(pointer, values that are served)`: strings compared without regard to case, empty always served.
const SERVED: &[(&str, &[&str])] = &[
    ("/properties/networkProfile/networkPlugin", &["azure"]),
    ("/properties/networkProfile/networkPluginMode", &[]),
    ("/properties/networkProfile/networkPolicy", &["none"]),
    ("/properties/networkProfile/networkDataplane", &["azure"]),
    ("/properties/networkProfile/networkMode", &["transparent"]),
    ("/properties/networkProfile/outboundType", &["loadBalancer"]),
    ("/properties/networkProfile/loadBalancerSku", &["standard"]),
    ("/identity/type", &["SystemAssigned", "None"]),
    ("/sku/name", &["Base", "Basic"]),
];

/// Pointers whose value must be absent, null, false or empty.
const NOT_SERVED: &[&str] = &[
    "/properties/windowsProfile",
    "/properties/apiServerAccessProfile/enablePrivateCluster",
    "/properties/apiServerAccessProfile/authorizedIPRanges",
    "/properties/apiServerAccessProfile/enableVnetIntegration",
    "/properties/aadProfile",
    "/properties/diskEncryptionSetID",
    "/properties/httpProxyConfig",
    "/properties/serviceMeshProfile",
    "/properties/ingressProfile/webAppRouting/enabled",
    "/properties/workloadAutoScalerProfile/keda/enabled",
    "/properties/workloadAutoScalerProfile/verticalPodAutoscaler/enabled",
    "/properties/disableLocalAccounts",
    "/properties/fqdnSubdomain",
    "/extendedLocation",
];

/// The same for a pool.
const POOL_NOT_SERVED: &[&str] = &[
    "/enableAutoScaling",
    "/enableNodePublicIP",
    "/podSubnetID",
    "/enableFIPS",
    "/enableEncryptionAtHost",
    "/proximityPlacementGroupID",
    "/creationData/sourceResourceId",
    "/kubeletConfig",
    "/linuxOSConfig",
    "/gpuInstanceProfile",
    "/capacityReservationGroupID",
    "/hostGroupID",
];

fn is_unset(v: &Value) -> bool {
    match v {
        Value::Null | Value::Bool(false) => true,
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.values().all(is_unset),
        _ => false,
    }
}

impl ClusterView {
    /// Reads `spec.body` of the cluster with this id.
    /// # Errors: a field that is malformed, out of range, or asks for something that is not served; names its path.
    pub fn parse(id: &ArmId, body: &Value) -> Result<Self, ViewError> {
        for (pointer, served) in SERVED {
            let value = text(body, pointer);
            if !value.is_empty() && !served.iter().any(|s| s.eq_ignore_ascii_case(value)) {
                let instead = if served.is_empty() {
                    "leave it out".to_owned()
                } else {
                    format!("use {}", served.join(" or "))
                };
                return bad(dotted(pointer), format!("'{value}' is not served; {instead}"));
            }
        }
        for pointer in NOT_SERVED {
            if body.pointer(pointer).is_some_and(|v| !is_unset(v)) {
                return bad(dotted(pointer), "this feature is not served yet; leave it out");
            }
        }
        let location = text(body, "/location").to_owned();
        let asked = text(body, "/properties/kubernetesVersion");
        let Some(kubernetes_version) = version(asked) else {
            let served = KUBERNETES_VERSIONS.join(", ");
            return bad(
                "properties.kubernetesVersion",
                format!("'{asked}' is not served; served are: {served}"),
            );
        };
        let cidr_text = or(text(body, "/properties/networkProfile/serviceCidr"), SERVICE_CIDR);
        let Ok(service_cidr) = cidr_text.parse::<IpNet>() else {
            return bad(
                "properties.networkProfile.serviceCidr",
                format!("'{cidr_text}' is not a prefix such as {SERVICE_CIDR}"),
            );
        };
        if !(12..=28).contains(&service_cidr.prefix_len()) || service_cidr.network().is_ipv6() {
            return bad(
                "properties.networkProfile.serviceCidr",
                "must be an IPv4 prefix from /12 to /28",
            );
        }
        let service_cidr = service_cidr.trunc();
        // Without a wish the DNS address is the tenth of the range.
        let dns_text = text(body, "/properties/networkProfile/dnsServiceIP");
        let dns_service_ip = match dns_text {
            "" => service_cidr.hosts().nth(9).unwrap_or(service_cidr.addr()),
            given => match given.parse() {
                Ok(a) => a,
                Err(_) => {
                    return bad(
                        "properties.networkProfile.dnsServiceIP",
                        format!("'{given}' is not an IP address"),
                    );
                }
            },
        };
        // The first address is the API server's Service.
        if !service_cidr.contains(&dns_service_ip) || service_cidr.hosts().next() == Some(dns_service_ip) {
            let problem =
                format!("{dns_service_ip} must be inside the service range {service_cidr} and not its first address");
            return bad("properties.networkProfile.dnsServiceIP", problem);
        }
        let mut pools = Vec::new();
        let empty = Vec::new();
        let profiles = body
            .pointer("/properties/agentPoolProfiles")
            .and_then(Value::as_array)
            .unwrap_or(&empty);
        for (i, v) in profiles.iter().enumerate() {
            let at = format!("properties.agentPoolProfiles[{i}]");
            let pool = PoolView::parse(text(v, "/name"), v, &at)?;
            if pools.iter().any(|p: &PoolView| p.name == pool.name) {
                return bad(
                    format!("{at}.name"),
                    format!("there are two pools named '{}'", pool.name),
                );
            }
            pools.push(pool);
        }
        if !pools.iter().any(|p| p.system) {
            return bad(
                "properties.agentPoolProfiles",
                "a cluster needs at least one pool of mode System",
            );
        }
        if pools.len() > POOLS_MAX {
            return bad(
                "properties.agentPoolProfiles",
                format!("a cluster has at most {POOLS_MAX} pools"),
            );
        }
        let group = id.resource_group.as_deref().unwrap_or_default();
        let default_group = node_resource_group(group, id.name(), &location);
        let prefix = or(text(body, "/properties/dnsPrefix"), id.name()).to_owned();
        Ok(Self {
            kubernetes_version: kubernetes_version.to_owned(),
            dns_prefix: prefix,
            node_resource_group: or(text(body, "/properties/nodeResourceGroup"), &default_group).to_owned(),
            location,
            service_cidr,
            dns_service_ip,
            pools,
            virtual_node_subnet: virtual_node(body)?,
        })
    }

    /// ARM id of the subnet that a pool's nodes are in.
    pub fn subnet_of(&self, subscription: &str, pool: &PoolView) -> String {
        match &pool.subnet {
            Some(s) => s.clone(),
            None => format!("{}/subnets/{OWN_SUBNET}", self.own_vnet_id(subscription)),
        }
    }

    /// ARM id of the VNet that is made for a cluster without a subnet of its own.
    pub fn own_vnet_id(&self, subscription: &str) -> String {
        let group = &self.node_resource_group;
        format!(
            "/subscriptions/{subscription}/resourceGroups/{group}/providers/Microsoft.Network/virtualNetworks/aks-vnet"
        )
    }
}

impl PoolView {
    /// Reads the fields of a pool, in the flat form of `agentPoolProfiles[]`; `at` starts an error's path.
    pub fn parse(name: &str, v: &Value, at: &str) -> Result<Self, ViewError> {
        let mut chars = name.chars();
        let name_ok = chars.next().is_some_and(|c| c.is_ascii_lowercase())
            && chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
            && name.len() <= 12;
        if !name_ok {
            let problem = format!("'{name}' must be 1 to 12 lower-case letters and digits and start with a letter");
            return bad(format!("{at}.name"), problem);
        }
        for pointer in POOL_NOT_SERVED {
            if v.pointer(pointer).is_some_and(|v| !is_unset(v)) {
                return bad(
                    format!("{at}.{}", dotted(pointer)),
                    "this feature is not served yet; leave it out",
                );
            }
        }
        for (field, served) in [
            ("/osType", "Linux"),
            ("/type", "VirtualMachineScaleSets"),
            ("/scaleSetPriority", "Regular"),
            ("/workloadRuntime", "OCIContainer"),
        ] {
            let value = text(v, field);
            if !value.is_empty() && !value.eq_ignore_ascii_case(served) {
                return bad(
                    format!("{at}.{}", dotted(field)),
                    format!("'{value}' is not served; use {served}"),
                );
            }
        }
        let system = match text(v, "/mode") {
            m if m.is_empty() || m.eq_ignore_ascii_case("System") => true,
            m if m.eq_ignore_ascii_case("User") => false,
            m => return bad(format!("{at}.mode"), format!("'{m}' is not served; use System or User")),
        };
        let count = integer(v, "count", at)?.unwrap_or(1);
        let low = i64::from(system);
        if !(low..=POOL_COUNT_MAX).contains(&count) {
            let mode = if system { "System" } else { "User" };
            return bad(
                format!("{at}.count"),
                format!("{count} is outside {low} to {POOL_COUNT_MAX}, the range of a {mode} pool"),
            );
        }
        let asked = text(v, "/vmSize");
        let Some(size) = vm_size::find(asked) else {
            let known: Vec<&str> = vm_size::SIZES.iter().map(|s| s.name).collect();
            return bad(
                format!("{at}.vmSize"),
                format!(
                    "'{asked}' is not in the table of sizes; known are: {}",
                    known.join(", ")
                ),
            );
        };
        let max_pods = integer(v, "maxPods", at)?.filter(|n| *n != 0).unwrap_or(size.max_pods);
        if !vm_size::MAX_PODS_RANGE.contains(&max_pods) {
            let (lo, hi) = (vm_size::MAX_PODS_RANGE.start(), vm_size::MAX_PODS_RANGE.end());
            return bad(format!("{at}.maxPods"), format!("{max_pods} is outside {lo} to {hi}"));
        }
        let wanted = text(v, "/orchestratorVersion");
        if version(wanted).is_none() {
            let served = KUBERNETES_VERSIONS.join(", ");
            return bad(
                format!("{at}.orchestratorVersion"),
                format!("'{wanted}' is not served; served are: {served}"),
            );
        }
        let mut labels = BTreeMap::new();
        for (k, l) in v["nodeLabels"].as_object().into_iter().flatten() {
            match l.as_str() {
                Some(l) => drop(labels.insert(k.clone(), l.to_owned())),
                None => return bad(format!("{at}.nodeLabels.{k}"), "a label's value is a string"),
            }
        }
        let mut taints = Vec::new();
        for (i, t) in v["nodeTaints"].as_array().into_iter().flatten().enumerate() {
            let t = t.as_str().unwrap_or_default();
            let effect = t.rsplit_once(':').map_or("", |(_, e)| e);
            if !matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
                return bad(
                    format!("{at}.nodeTaints[{i}]"),
                    format!("'{t}' is not of the form key=value:NoSchedule"),
                );
            }
            taints.push(t.to_owned());
        }
        let subnet = Some(text(v, "/vnetSubnetID"))
            .filter(|s| !s.is_empty())
            .map(str::to_owned);
        Ok(Self {
            name: name.to_owned(),
            system,
            count,
            size,
            max_pods,
            subnet,
            labels,
            taints,
        })
    }
}

fn virtual_node(body: &Value) -> Result<Option<String>, ViewError> {
    let mut subnet = None;
    for (key, addon) in body
        .pointer("/properties/addonProfiles")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        if addon["enabled"].as_bool() != Some(true) {
            continue;
        }
        if !key.eq_ignore_ascii_case("aciConnectorLinux") {
            let path = format!("properties.addonProfiles.{key}");
            return bad(
                path,
                "this add-on is not served; served is aciConnectorLinux (virtual-node)",
            );
        }
        let config = addon["config"].as_object().into_iter().flatten();
        let name = config
            .filter(|(k, _)| k.eq_ignore_ascii_case("SubnetName"))
            .find_map(|(_, v)| v.as_str());
        match name.filter(|n| !n.is_empty()) {
            Some(n) => subnet = Some(n.to_owned()),
            None => {
                let path = format!("properties.addonProfiles.{key}.config.SubnetName");
                return bad(
                    path,
                    "the virtual-node add-on needs the name of a subnet delegated to container groups",
                );
            }
        }
    }
    Ok(subnet)
}

fn integer(v: &Value, field: &str, at: &str) -> Result<Option<i64>, ViewError> {
    match &v[field] {
        Value::Null => Ok(None),
        n => match n.as_i64() {
            Some(n) => Ok(Some(n)),
            None => bad(format!("{at}.{field}"), "must be a whole number"),
        },
    }
}

fn or<'a>(value: &'a str, default: &'a str) -> &'a str {
    if value.is_empty() { default } else { value }
}

/// The served version that a wish means: empty, `1.36` or `1.36.4`.
pub fn version(wish: &str) -> Option<&'static str> {
    let matches =
        |v: &&&str| wish.is_empty() || **v == wish || v.rsplit_once('.').is_some_and(|(minor, _)| minor == wish);
    KUBERNETES_VERSIONS.iter().find(matches).copied()
}

/// `MC_<group>_<cluster>_<location>`, at most 80 characters.
pub fn node_resource_group(group: &str, cluster: &str, location: &str) -> String {
    let location: String = location.to_lowercase().replace(' ', "");
    format!("MC_{group}_{cluster}_{location}").chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn id() -> ArmId {
        ArmId::parse("/subscriptions/s/resourceGroups/rg/providers/Microsoft.ContainerService/managedClusters/c1")
            .unwrap()
    }

    fn az_body() -> Value {
        json!({"location": "westeurope", "identity": {"type": "SystemAssigned"}, "sku": {"name": "Base", "tier": "Free"},
            "properties": {"kubernetesVersion": "", "dnsPrefix": "c1-rg-222222", "enableRBAC": true, "disableLocalAccounts": false,
            "agentPoolProfiles": [{"name": "nodepool1", "count": 1, "mode": "System", "type": "VirtualMachineScaleSets",
                "osType": "Linux", "orchestratorVersion": "", "vmSize": "", "upgradeSettings": {}, "enableAutoScaling": false}],
            "networkProfile": {"networkPlugin": "azure", "loadBalancerSku": "standard", "outboundType": "loadBalancer"},
            "addonProfiles": {}, "storageProfile": {}}})
    }

    #[test]
    fn empty_strings_are_defaults() {
        let v = ClusterView::parse(&id(), &az_body()).unwrap();
        assert_eq!(v.kubernetes_version, "1.36.4");
        assert_eq!(v.node_resource_group, "MC_rg_c1_westeurope");
        assert_eq!(v.dns_service_ip.to_string(), DNS_SERVICE_IP);
        assert_eq!(
            (v.pools[0].size.name, v.pools[0].max_pods, v.pools[0].addresses()),
            (vm_size::DEFAULT, 30, 31)
        );
        assert!(
            v.subnet_of("s", &v.pools[0]).ends_with(
                "MC_rg_c1_westeurope/providers/Microsoft.Network/virtualNetworks/aks-vnet/subnets/aks-subnet"
            )
        );
    }

    #[test]
    fn refusals_name_the_path() {
        for (pointer, value, path) in [
            (
                "/properties/kubernetesVersion",
                json!("1.20.1"),
                "properties.kubernetesVersion",
            ),
            (
                "/properties/networkProfile/networkPlugin",
                json!("kubenet"),
                "properties.networkProfile.networkPlugin",
            ),
            (
                "/properties/networkProfile",
                json!({"serviceCidr": "10.0.0.0/8"}),
                "properties.networkProfile.serviceCidr",
            ),
            (
                "/properties/networkProfile",
                json!({"dnsServiceIP": "10.1.0.10"}),
                "properties.networkProfile.dnsServiceIP",
            ),
            (
                "/properties/agentPoolProfiles/0/name",
                json!("Bad-Name"),
                "properties.agentPoolProfiles[0].name",
            ),
            (
                "/properties/agentPoolProfiles/0/count",
                json!(0),
                "properties.agentPoolProfiles[0].count",
            ),
            (
                "/properties/agentPoolProfiles/0/count",
                json!("2"),
                "properties.agentPoolProfiles[0].count",
            ),
            (
                "/properties/agentPoolProfiles/0/vmSize",
                json!("Standard_Nope"),
                "properties.agentPoolProfiles[0].vmSize",
            ),
            (
                "/properties/agentPoolProfiles/0/enableAutoScaling",
                json!(true),
                "properties.agentPoolProfiles[0].enableAutoScaling",
            ),
            (
                "/properties/agentPoolProfiles/0/mode",
                json!("User"),
                "properties.agentPoolProfiles",
            ),
            (
                "/properties/disableLocalAccounts",
                json!(true),
                "properties.disableLocalAccounts",
            ),
            (
                "/properties/addonProfiles",
                json!({"omsagent": {"enabled": true}}),
                "properties.addonProfiles.omsagent",
            ),
            (
                "/properties/addonProfiles",
                json!({"aciConnectorLinux": {"enabled": true}}),
                "properties.addonProfiles.aciConnectorLinux.config.SubnetName",
            ),
        ] {
            let mut body = az_body();
            *body.pointer_mut(pointer).unwrap() = value;
            assert_eq!(ClusterView::parse(&id(), &body).unwrap_err().path, path, "{pointer}");
        }
    }

    #[test]
    fn minor_versions_resolve() {
        assert_eq!(version("1.36"), Some("1.36.4"));
        assert_eq!(version("1.3"), None);
    }
}

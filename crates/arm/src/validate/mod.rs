//! Checks before anything changes: the body against itself, and the body against everything else that exists.
//!
//! Pure functions over a [`World`]. Each refusal names the field, the numbers and what would work.

pub mod aks;
pub mod application_groups;
pub mod balancer;
pub mod endpoints;
pub mod network;
pub mod peering;
pub mod private_dns;
pub mod public;
pub mod routes;
pub mod security;

use resources::{
    ArmId,
    aks::ClusterView,
    views::{NicView, SubnetView, VnetView},
};
use serde_json::Value;

use crate::{
    error::{Answer, Fault},
    home::{ArmObject, same_id},
    table::ResourceType,
};

/// What a check may look at.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub vnets: Vec<ArmObject>,
    pub nics: Vec<ArmObject>,
    pub clusters: Vec<ArmObject>,
    pub security_groups: Vec<ArmObject>,
    pub route_tables: Vec<ArmObject>,
    pub public_ips: Vec<ArmObject>,
    pub public_ip_prefixes: Vec<ArmObject>,
    pub load_balancers: Vec<ArmObject>,
    pub nat_gateways: Vec<ArmObject>,
    pub application_groups: Vec<ArmObject>,
    pub private_zones: Vec<ArmObject>,
    /// What service tags stand for.
    pub service_tags: vnet_model::service_tags::ServiceTags,
    /// Public addresses: no virtual network may have them inside.
    pub public_pool: Option<ipnet::IpNet>,
}

/// Kinds that a [`World`] is made of.
pub const WORLD_PLURALS: [&str; 11] = [
    "virtualnetworks",
    "networkinterfaces",
    "managedclusters",
    "networksecuritygroups",
    "routetables",
    "publicipaddresses",
    "publicipprefixes",
    "loadbalancers",
    "natgateways",
    "applicationsecuritygroups",
    "privatednszones",
];

impl World {
    /// A VNet by id.
    pub fn vnet(&self, id: &str) -> Option<&ArmObject> {
        self.vnets.iter().find(|v| same_id(&v.spec.id, id) && !v.is_deleting())
    }

    /// The VNet and subnet that a subnet's id names.
    /// # Errors: not a subnet id, or it does not exist.
    pub fn subnet(&self, id: &str, field: &str) -> Answer<(VnetView, SubnetView, String)> {
        let parsed = ArmId::parse(id)
            .ok()
            .filter(|_| resources::views::subnet_ref(id).is_some());
        let Some((subnet, vnet)) = parsed.and_then(|p| Some((p.name().to_owned(), p.parent()?.to_string()))) else {
            let problem =
                format!("'{id}' is not the id of a subnet (/subscriptions/.../virtualNetworks/<name>/subnets/<name>)");
            return Err(Fault::field("LinkedInvalidPropertyId", field, problem));
        };
        let missing = || {
            Fault::field(
                "InvalidResourceReference",
                field,
                format!("the subnet '{id}' does not exist"),
            )
        };
        let object = self.vnet(&vnet).ok_or_else(missing)?;
        let view = VnetView::parse(&object.spec.body)?;
        let found = view.subnet(&subnet).cloned().ok_or_else(missing)?;
        Ok((view, found, object.spec.id.clone()))
    }

    /// Who uses a subnet: `(user, addresses)`, one line per network interface or agent pool. Pools count what they will
    /// need; interfaces of their nodes, which lie in the cluster's node resource group, are counted through the pool.
    pub fn users_of(&self, subnet_id: &str) -> Vec<(String, u64)> {
        let mut users = Vec::new();
        let mut node_groups = Vec::new();
        for cluster in &self.clusters {
            let Ok(id) = ArmId::parse(&cluster.spec.id) else {
                continue;
            };
            let Ok(view) = ClusterView::parse(&id, &cluster.spec.body) else {
                continue;
            };
            node_groups.push(resources::group_id(&id.subscription, &view.node_resource_group));
            for pool in &view.pools {
                if same_id(&view.subnet_of(&id.subscription, pool), subnet_id) {
                    users.push((
                        format!("agent pool '{}' of cluster '{}'", pool.name, id.name()),
                        pool.addresses(),
                    ));
                }
            }
            if let Some(name) = &view.virtual_node_subnet
                && let Some(first) = view.pools.first()
                && let Some((vnet, _)) = view.subnet_of(&id.subscription, first).rsplit_once('/')
                && same_id(&format!("{vnet}/{name}"), subnet_id)
            {
                users.push((format!("the virtual node of cluster '{}'", id.name()), 0));
            }
        }
        for nic in &self.nics {
            if node_groups.iter().any(|g| crate::home::is_within(&nic.spec.id, g)) && is_node_nic(nic) {
                continue;
            }
            let Ok(view) = NicView::parse(&nic.spec.body) else {
                continue;
            };
            let n = view.ip_configs.iter().filter(|c| same_id(&c.subnet, subnet_id)).count() as u64;
            if n > 0 {
                users.push((
                    format!(
                        "network interface '{}'",
                        nic.spec.id.rsplit('/').next().unwrap_or_default()
                    ),
                    n,
                ));
            }
        }
        for lb in &self.load_balancers {
            let n = balancer::subnet_users(lb, subnet_id);
            if n > 0 {
                let name = lb.spec.id.rsplit('/').next().unwrap_or_default();
                users.push((format!("load balancer '{name}'"), n));
            }
        }
        users
    }
}

/// Node interfaces are tagged by the cluster controller, so that their addresses are not counted twice.
fn is_node_nic(nic: &ArmObject) -> bool {
    !nic.spec.body["tags"]["aks-managed-poolName"].is_null()
}

/// Checks the new body of a top-level resource. `old` is the object it replaces.
pub fn resource(kind: &ResourceType, id: &ArmId, body: &Value, old: Option<&ArmObject>, world: &World) -> Answer<()> {
    if body["location"].as_str().is_none_or(str::is_empty) {
        let message = "The location property is required for this definition.";
        let mut f = Fault::bad_request("LocationRequired", message);
        f.target = Some("location".into());
        return Err(f);
    }
    if let Some(old) = old
        && fold_location(&old.spec.body["location"]) != fold_location(&body["location"])
    {
        let (was, now) = (&old.spec.body["location"], &body["location"]);
        let message =
            format!("The resource already exists in location {was} and cannot be created in {now}. Use another name.");
        return Err(Fault::conflict("InvalidResourceLocation", message));
    }
    tags(body)?;
    name(kind, id)?;
    match kind.path {
        ["privateDnsZones"] => private_dns::zone(id, body, world),
        ["virtualNetworks"] => {
            public::subnets(id, body, world)?;
            network::vnet(id, body, old, world)
        }
        ["routeTables"] => routes::table(body),
        ["networkSecurityGroups"] => security::group(body, world),
        ["networkInterfaces"] => {
            network::nic(id, body, old, world)?;
            public::interface(id, body, world)
        }
        ["publicIPAddresses"] => public::address(id, body, old, world),
        ["publicIPPrefixes"] => public::prefix(body, old),
        ["natGateways"] => public::gateway(id, body, world),
        ["loadBalancers"] => balancer::balancer(id, body, old, world),
        ["managedClusters"] => aks::cluster(id, body, old, world),
        _ => Ok(()),
    }
}

fn fold_location(v: &Value) -> String {
    v.as_str().unwrap_or_default().to_lowercase().replace(' ', "")
}

/// At most 50 tags, string values.
pub fn tags(body: &Value) -> Answer<()> {
    match &body["tags"] {
        Value::Null => Ok(()),
        Value::Object(t) if t.len() > 50 => Err(Fault::field(
            "InvalidTags",
            "tags",
            format!("{} tags, at most 50 are allowed", t.len()),
        )),
        Value::Object(t) => match t.iter().find(|(_, v)| !v.is_string()) {
            Some((k, _)) => Err(Fault::field(
                "InvalidTags",
                format!("tags.{k}"),
                "a tag's value is a string",
            )),
            None => Ok(()),
        },
        _ => Err(Fault::field("InvalidTags", "tags", "must be an object of strings")),
    }
}

fn name(kind: &ResourceType, id: &ArmId) -> Answer<()> {
    let name = id.name();
    let max = match kind.path {
        ["managedClusters"] => 63,
        ["privateDnsZones"] => 253,
        _ => 80,
    };
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    let last = name
        .chars()
        .last()
        .is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    let middle = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_' || (max >= 80 && c == '.'));
    if first && last && middle && name.len() <= max {
        return Ok(());
    }
    let message = format!(
        "The name '{name}' of a {} must be 1 to {max} letters, digits, hyphens and underscores, start with a letter or digit and not end with a hyphen.",
        kind.full()
    );
    Err(Fault::bad_request("InvalidResourceName", message))
}

//! Managed clusters and agent pools against the networks and the cluster that is there already.

use ipnet::IpNet;
use resources::{
    ArmId,
    aks::ClusterView,
    views::{self, VnetView},
};
use serde_json::Value;

use super::{World, network};
use crate::{
    error::{Answer, Fault},
    home::{ArmObject, same_id},
};

/// A cluster's whole body, pools included.
pub fn cluster(id: &ArmId, body: &Value, old: Option<&ArmObject>, world: &World) -> Answer<()> {
    let view = ClusterView::parse(id, body).map_err(|e| Fault::field("InvalidParameter", e.path, e.problem))?;
    let before = old.and_then(|o| ClusterView::parse(id, &o.spec.body).ok());
    if let Some(b) = &before {
        immutable(b, &view)?;
    }
    let own: IpNet = resources::aks::OWN_VNET_PREFIX
        .parse()
        .map_err(|_| Fault::internal("the request"))?;
    let mut vnet_id: Option<String> = None;
    let mut vnet_view: Option<VnetView> = None;
    for (i, pool) in view.pools.iter().enumerate() {
        let path = format!("properties.agentPoolProfiles[{i}].vnetSubnetID");
        let subnet_id = view.subnet_of(&id.subscription, pool);
        let (vnet, subnet, subnet_name) = match &pool.subnet {
            None => (
                format!("{}/", view.own_vnet_id(&id.subscription)),
                own_subnet()?,
                resources::aks::OWN_SUBNET.to_owned(),
            ),
            Some(given) => {
                let (v, s, vid) = world.subnet(given, &path)?;
                if !s.delegations.is_empty() {
                    let to = s.delegations.join(", ");
                    let problem = format!(
                        "subnet '{}' is delegated to {to}; nodes need a subnet without delegation",
                        s.name
                    );
                    return Err(Fault::field("SubnetIsDelegated", path, problem));
                }
                vnet_view = Some(v);
                (vid, s.prefix, s.name)
            }
        };
        match &vnet_id {
            Some(first) if !same_id(first, &vnet) => {
                let problem = match &pool.subnet {
                    None => "a pool of a cluster in a virtual network of yours needs a subnet there (--vnet-subnet-id)",
                    Some(_) => "all pools of a cluster must be in the same virtual network",
                };
                return Err(Fault::field("InvalidParameter", path, problem));
            }
            _ => vnet_id = Some(vnet),
        }
        room(id, &view, before.as_ref(), world, &subnet_id, &subnet_name, &subnet)?;
    }
    let prefixes = vnet_view.as_ref().map_or_else(|| vec![own], |v| v.prefixes.clone());
    if let Some(p) = prefixes
        .iter()
        .find(|p| p.contains(&view.service_cidr) || view.service_cidr.contains(*p))
    {
        let problem = format!(
            "the service range {} overlaps the virtual network's {p}; give --service-cidr and --dns-service-ip outside it",
            view.service_cidr
        );
        let path = "properties.networkProfile.serviceCidr";
        return Err(Fault::field("ServiceCidrOverlapExistingSubnetsCidr", path, problem));
    }
    virtual_node(&view, vnet_view.as_ref())
}

fn own_subnet() -> Answer<IpNet> {
    resources::aks::OWN_SUBNET_PREFIX
        .parse()
        .map_err(|_| Fault::internal("the request"))
}

/// The nodes of all pools in one subnet must fit beside everyone else there.
fn room(
    id: &ArmId,
    view: &ClusterView,
    before: Option<&ClusterView>,
    world: &World,
    subnet_id: &str,
    subnet: &str,
    prefix: &IpNet,
) -> Answer<()> {
    let inside = |v: &ClusterView| -> u64 {
        let pools = v
            .pools
            .iter()
            .filter(|p| same_id(&v.subnet_of(&id.subscription, p), subnet_id));
        pools.map(resources::aks::PoolView::addresses).sum()
    };
    let mine_before = before.map_or(0, inside);
    let used = world
        .users_of(subnet_id)
        .iter()
        .map(|u| u.1)
        .sum::<u64>()
        .saturating_sub(mine_before);
    let nodes: i64 = view.pools.iter().map(|p| p.count).sum();
    let what = format!(
        "cluster '{}' with {nodes} nodes (one address per node and one per pod it may run)",
        id.name()
    );
    network::room(subnet, prefix, used, inside(view), &what)
}

/// What a cluster and its pools keep for life.
fn immutable(old: &ClusterView, new: &ClusterView) -> Answer<()> {
    let changed = |path: String, was: String, now: String| {
        let problem = format!("cannot change from '{was}' to '{now}' after creation");
        Err(Fault::field("PropertyChangeNotAllowed", path, problem))
    };
    for (field, was, now) in [
        (
            "properties.networkProfile.serviceCidr",
            old.service_cidr.to_string(),
            new.service_cidr.to_string(),
        ),
        (
            "properties.networkProfile.dnsServiceIP",
            old.dns_service_ip.to_string(),
            new.dns_service_ip.to_string(),
        ),
        ("properties.dnsPrefix", old.dns_prefix.clone(), new.dns_prefix.clone()),
        (
            "properties.nodeResourceGroup",
            old.node_resource_group.clone(),
            new.node_resource_group.clone(),
        ),
    ] {
        if !was.eq_ignore_ascii_case(&now) {
            return changed(field.to_owned(), was, now);
        }
    }
    for (i, pool) in new.pools.iter().enumerate() {
        let Some(was) = old.pools.iter().find(|p| p.name == pool.name) else {
            continue;
        };
        let at = |f: &str| format!("properties.agentPoolProfiles[{i}].{f}");
        if was.size.name != pool.size.name {
            return changed(at("vmSize"), was.size.name.to_owned(), pool.size.name.to_owned());
        }
        if was.max_pods != pool.max_pods {
            return changed(at("maxPods"), was.max_pods.to_string(), pool.max_pods.to_string());
        }
        let (a, b) = (
            was.subnet.clone().unwrap_or_default(),
            pool.subnet.clone().unwrap_or_default(),
        );
        if !same_id(&a, &b) {
            return changed(at("vnetSubnetID"), a, b);
        }
    }
    Ok(())
}

fn virtual_node(view: &ClusterView, vnet: Option<&VnetView>) -> Answer<()> {
    let Some(name) = &view.virtual_node_subnet else {
        return Ok(());
    };
    let path = "properties.addonProfiles.aciConnectorLinux.config.SubnetName";
    let Some(vnet) = vnet else {
        let problem = "the virtual-node add-on needs a cluster in a virtual network of yours (--vnet-subnet-id)";
        return Err(Fault::field("InvalidParameter", path, problem));
    };
    let Some(subnet) = vnet.subnet(name) else {
        let problem = format!("the cluster's virtual network has no subnet named '{name}'");
        return Err(Fault::field("SubnetNotFound", path, problem));
    };
    if !subnet.is_delegated_to(views::CONTAINER_GROUPS) {
        let problem = format!("subnet '{name}' must be delegated to {}", views::CONTAINER_GROUPS);
        return Err(Fault::field("SubnetNotDelegated", path, problem));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use resources::ArmSpec;
    use serde_json::json;

    use super::*;

    const G: &str = "/subscriptions/s/resourceGroups/g/providers";

    fn id(name: &str) -> ArmId {
        ArmId::parse(&format!("{G}/Microsoft.ContainerService/managedClusters/{name}")).unwrap()
    }

    fn subnet(name: &str) -> String {
        format!("{G}/Microsoft.Network/virtualNetworks/v/subnets/{name}")
    }

    fn body(count: i64, subnet_name: &str) -> Value {
        json!({"location": "x", "properties": {"agentPoolProfiles": [
            {"name": "p1", "count": count, "vnetSubnetID": subnet(subnet_name)}], "addonProfiles": {}, "networkProfile": {}}})
    }

    fn world() -> World {
        let vnet = json!({"location": "x", "properties": {"addressSpace": {"addressPrefixes": ["10.240.0.0/16"]}, "subnets": [
            {"name": "nodes", "properties": {"addressPrefix": "10.240.0.0/25"}},
            {"name": "groups", "properties": {"addressPrefix": "10.240.1.0/24", "delegations": [
                {"properties": {"serviceName": "Microsoft.ContainerInstance/containerGroups"}}]}}]}});
        let spec = ArmSpec {
            id: format!("{G}/Microsoft.Network/virtualNetworks/v"),
            body: vnet,
        };
        World {
            vnets: vec![ArmObject::new("virtualnetworks", spec)],
            ..Default::default()
        }
    }

    #[test]
    fn nodes_must_fit() {
        let mut w = world();
        // 123 usable addresses, 31 per node.
        assert_eq!(cluster(&id("c"), &body(3, "nodes"), None, &w), Ok(()));
        let f = cluster(&id("c"), &body(4, "nodes"), None, &w).unwrap_err();
        assert!(
            f.code == "SubnetIsFull" && f.message.contains("needs 124 addresses, 123 of 123"),
            "{f}"
        );
        let first = ArmObject::new(
            "managedclusters",
            ArmSpec {
                id: id("first").to_string(),
                body: body(2, "NODES"),
            },
        );
        w.clusters.push(first.clone());
        let f = cluster(&id("c"), &body(2, "nodes"), None, &w).unwrap_err();
        assert!(f.message.contains("61 of 123"), "{f}");
        // Growing the first one counts its own addresses once.
        assert_eq!(cluster(&id("first"), &body(3, "nodes"), Some(&first), &w), Ok(()));
    }

    #[test]
    fn networks_are_checked() {
        let w = world();
        let code = |b: &Value| cluster(&id("c"), b, None, &w).err().map(|f| f.code);
        assert_eq!(code(&body(1, "none")).as_deref(), Some("InvalidResourceReference"));
        assert_eq!(code(&body(1, "groups")).as_deref(), Some("SubnetIsDelegated"));
        let mut b = body(1, "nodes");
        b["properties"]["networkProfile"] = json!({"serviceCidr": "10.240.128.0/20"});
        assert_eq!(code(&b).as_deref(), Some("ServiceCidrOverlapExistingSubnetsCidr"));
        let mut b = body(1, "nodes");
        for (name, want) in [
            ("groups", None),
            ("nodes", Some("SubnetNotDelegated")),
            ("zzz", Some("SubnetNotFound")),
        ] {
            b["properties"]["addonProfiles"] =
                json!({"aciConnectorLinux": {"enabled": true, "config": {"SubnetName": name}}});
            assert_eq!(code(&b).as_deref(), want);
        }
    }

    #[test]
    fn what_stays_for_life() {
        let w = world();
        let old = ArmObject::new(
            "managedclusters",
            ArmSpec {
                id: id("c").to_string(),
                body: body(1, "nodes"),
            },
        );
        let mut b = body(1, "nodes");
        b["properties"]["agentPoolProfiles"][0]["vmSize"] = json!("Standard_D2s_v3");
        assert_eq!(
            cluster(&id("c"), &b, Some(&old), &w).unwrap_err().code,
            "PropertyChangeNotAllowed"
        );
        // Writing the default that GET showed is no change.
        b["properties"]["agentPoolProfiles"][0]["vmSize"] = json!("Standard_DS2_v2");
        assert_eq!(cluster(&id("c"), &b, Some(&old), &w), Ok(()));
    }
}

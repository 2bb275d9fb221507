//! Load balancers: the body against itself (`vnet_model::arm::balancer`), against addresses and subnets, and against the
//! interfaces that are in its pools.

use std::net::{IpAddr, Ipv4Addr};

use resources::{
    ArmId,
    views::{NicAddresses, subnet_ref},
};
use serde_json::Value;
use vnet_model::arm::balancer::{Balancer, BalancerError, Place};

use super::{World, public};
use crate::{
    error::{Answer, Fault},
    home::{ArmObject, same_id},
};

impl From<BalancerError> for Fault {
    fn from(e: BalancerError) -> Self {
        Self::field(e.code, e.path, e.problem)
    }
}

fn list(v: &Value) -> &[Value] {
    v.as_array().map_or(&[], Vec::as_slice)
}

/// A load balancer's whole body.
pub fn balancer(id: &ArmId, body: &Value, old: Option<&ArmObject>, world: &World) -> Answer<()> {
    let own = id.to_string();
    if let Some(owner) = old.and_then(|o| o.metadata.owner_references.iter().flatten().next()) {
        let message = format!(
            "The load balancer belongs to the {} '{}', which keeps it equal to its Services; change those instead.",
            owner.kind, owner.name
        );
        return Err(Fault::conflict("OperationNotAllowed", message));
    }
    let view = Balancer::parse(&own, body)?;
    if let Some(old) = old
        && public::is_standard(&old.spec.body) != view.standard
    {
        let problem = "the sku of a load balancer that exists cannot be changed";
        return Err(Fault::field("PropertyChangeNotAllowed", "sku.name", problem));
    }
    let mut network: Option<String> = None;
    let mut publics: Vec<&str> = Vec::new();
    for (n, frontend) in view.frontends.iter().enumerate() {
        let at = format!("properties.frontendIPConfigurations[{n}].properties");
        match &frontend.place {
            Place::Public { address } => {
                let path = format!("{at}.publicIPAddress.id");
                let found = public::assignable(address, &path, &own, world)?;
                if publics.iter().any(|p| same_id(p, address)) {
                    let problem = format!("two frontends name public IP address {address}");
                    return Err(Fault::field("PublicIPAddressInUse", path, problem));
                }
                publics.push(address);
                if public::is_standard(&found.spec.body) != view.standard {
                    let sku = |standard| if standard { "Standard" } else { "Basic" };
                    let problem = format!(
                        "{} sku load balancer {own} cannot reference {} sku publicIP {address}",
                        sku(view.standard),
                        sku(!view.standard)
                    );
                    return Err(Fault::field("PublicIPAndLBSkuDoNotMatch", path, problem));
                }
            }
            Place::Internal { subnet, address } => {
                internal(subnet, *address, &at, &own, old, world)?;
                let here = subnet_ref(subnet).map(|s| s.0);
                if network.is_some() && network != here {
                    let problem = "all frontends of a load balancer must be in one virtual network";
                    return Err(Fault::field(
                        "InvalidResourceReference",
                        format!("{at}.subnet.id"),
                        problem,
                    ));
                }
                network = here;
            }
        }
    }
    // Members by NIC first: they are where they are.
    let members = world.nics.iter().filter_map(|n| network_of_member(n, &own));
    for here in members.chain(
        view.pools
            .iter()
            .flat_map(|p| &p.addresses)
            .filter_map(|a| network_name(&a.network)),
    ) {
        if network.as_ref().is_some_and(|n| *n != here) {
            let problem =
                "all members of a load balancer's pools must be in one virtual network, and that of its frontends";
            return Err(Fault::field(
                "BackendPoolMembersInDifferentVirtualNetworks",
                "properties.backendAddressPools",
                problem,
            ));
        }
        network = Some(here);
    }
    for (n, pool) in view.pools.iter().enumerate() {
        for address in &pool.addresses {
            let path = format!("properties.backendAddressPools[{n}].properties.loadBalancerBackendAddresses");
            let vnet = network_name(&address.network);
            if !world
                .vnets
                .iter()
                .any(|v| Some(v.name()) == vnet.as_deref() && !v.is_deleting())
            {
                let problem = format!("the virtual network '{}' does not exist", address.network);
                return Err(Fault::field("InvalidResourceReference", path, problem));
            }
        }
    }
    in_use(&own, &view, world)
}

/// Home name of the virtual network that an id of one, or of a subnet, names.
fn network_name(id: &str) -> Option<String> {
    if let Some((vnet, _)) = subnet_ref(id) {
        return Some(vnet);
    }
    ArmId::parse(id).ok().map(|id| resources::object_name(&id.to_string()))
}

fn internal(
    subnet_id: &str,
    address: Option<Ipv4Addr>,
    at: &str,
    own: &str,
    old: Option<&ArmObject>,
    world: &World,
) -> Answer<()> {
    let (_, subnet, _) = world.subnet(subnet_id, &format!("{at}.subnet.id"))?;
    let path = format!("{at}.privateIPAddress");
    let Some(address) = address else {
        let used: u64 = world.users_of(subnet_id).iter().map(|u| u.1).sum();
        let held = old.map_or(0, |o| subnet_users(o, subnet_id));
        return super::network::room(
            &subnet.name,
            &subnet.prefix,
            used.saturating_sub(held),
            1,
            "this load balancer",
        );
    };
    let usable = match subnet.prefix {
        ipnet::IpNet::V4(p) => p.contains(&address) && !vnet_model::rules::is_reserved(p, address),
        ipnet::IpNet::V6(_) => false,
    };
    if !usable {
        let problem = format!(
            "{address} is not one of the usable addresses of subnet '{}' ({})",
            subnet.name, subnet.prefix
        );
        return Err(Fault::field("PrivateIPAddressNotInSubnet", path, problem));
    }
    let nic = world.nics.iter().find(|n| {
        let live = n.status.as_ref().and_then(|s| NicAddresses::parse(&s.properties));
        let taken = |l: &NicAddresses| {
            l.ip_configs
                .iter()
                .any(|c| c.address == IpAddr::V4(address) && same_id(&c.subnet, subnet_id))
        };
        live.as_ref().is_some_and(taken)
    });
    let balancer = world.load_balancers.iter().find(|lb| {
        !same_id(&lb.spec.id, own)
            && frontend_addresses(lb).any(|f| f.address == address && same_id(f.subnet, subnet_id))
    });
    match nic.or(balancer) {
        None => Ok(()),
        Some(user) => {
            let problem = format!("{address} is already allocated to resource {}", user.spec.id);
            Err(Fault::field("PrivateIPAddressInUse", path, problem))
        }
    }
}

/// A private address that a frontend has now.
pub struct FrontendAddress<'a> {
    pub frontend: &'a str,
    pub address: Ipv4Addr,
    /// ARM id.
    pub subnet: &'a str,
}

/// Private addresses that a load balancer's frontends have now.
pub fn frontend_addresses(balancer: &ArmObject) -> impl Iterator<Item = FrontendAddress<'_>> {
    let shown = balancer
        .status
        .as_ref()
        .map(|s| &s.properties["frontendIPConfigurations"]);
    list(shown.unwrap_or(&Value::Null)).iter().filter_map(|f| {
        let p = &f["properties"];
        Some(FrontendAddress {
            frontend: f["name"].as_str()?,
            address: p["privateIPAddress"].as_str()?.parse().ok()?,
            subnet: p["subnet"]["id"].as_str()?,
        })
    })
}

/// How many frontends a load balancer has in a subnet.
pub fn subnet_users(balancer: &ArmObject, subnet: &str) -> u64 {
    let frontends = list(&balancer.spec.body["properties"]["frontendIPConfigurations"]);
    let here = |f: &&Value| {
        f["properties"]["subnet"]["id"]
            .as_str()
            .is_some_and(|s| same_id(s, subnet))
    };
    frontends.iter().filter(here).count() as u64
}

/// What an interface names of load balancers: `(field, id)` of pools and inbound NAT rules.
fn memberships(nic: &ArmObject) -> impl Iterator<Item = (&'static str, &str)> {
    let configs = list(&nic.spec.body["properties"]["ipConfigurations"]);
    configs.iter().flat_map(|c| {
        let of = |field: &'static str| {
            let ids = list(&c["properties"][field]).iter();
            ids.filter_map(move |r| Some((field, r["id"].as_str()?)))
        };
        of("loadBalancerBackendAddressPools").chain(of("loadBalancerInboundNatRules"))
    })
}

fn network_of_member(nic: &ArmObject, balancer: &str) -> Option<String> {
    memberships(nic).find(|(_, id)| crate::home::is_within(id, balancer))?;
    let configs = list(&nic.spec.body["properties"]["ipConfigurations"]);
    configs
        .iter()
        .find_map(|c| subnet_ref(c["properties"]["subnet"]["id"].as_str()?).map(|s| s.0))
}

/// Refuses a body without a pool or NAT rule that an interface names.
fn in_use(own: &str, view: &Balancer, world: &World) -> Answer<()> {
    let pools = view
        .pools
        .iter()
        .map(|p| format!("{own}/backendAddressPools/{}", p.name));
    let rules = view
        .nat_rules
        .iter()
        .map(|r| format!("{own}/inboundNatRules/{}", r.name));
    let parts: Vec<String> = pools.chain(rules).collect();
    for nic in world.nics.iter().filter(|n| !n.is_deleting()) {
        for (_, id) in memberships(nic).filter(|(_, id)| crate::home::is_within(id, own)) {
            if !parts.iter().any(|p| same_id(p, id)) {
                let message = format!(
                    "{id} cannot be deleted because it is in use by {}. Take it off there first.",
                    nic.spec.id
                );
                return Err(Fault::bad_request("InUseLoadBalancerPartCannotBeDeleted", message));
            }
        }
    }
    Ok(())
}

/// Refuses to delete a load balancer that an interface names.
pub fn delete_balancer(object: &ArmObject, world: &World) -> Answer<()> {
    let own = &object.spec.id;
    let names = |n: &&ArmObject| !n.is_deleting() && memberships(n).any(|(_, id)| crate::home::is_within(id, own));
    match world.nics.iter().find(names) {
        None => Ok(()),
        Some(nic) => Err(Fault::bad_request(
            "InUseLoadBalancerCannotBeDeleted",
            format!(
                "Load balancer {own} cannot be deleted because {} is in one of its pools. Take it out first.",
                nic.spec.id
            ),
        )),
    }
}

/// Checks that interface `nic`, which is in `network`, may name the pool or NAT rule `reference`.
pub fn member(reference: &str, parts: &str, path: &str, nic: &str, network: Option<&str>, world: &World) -> Answer<()> {
    let missing = || {
        let problem = format!("'{reference}' does not exist");
        Fault::field("InvalidResourceReference", path, problem)
    };
    let lb = world
        .load_balancers
        .iter()
        .find(|lb| !lb.is_deleting() && crate::home::is_within(reference, &lb.spec.id))
        .ok_or_else(missing)?;
    if lb.metadata.owner_references.iter().flatten().next().is_some() {
        let problem = "the load balancer belongs to a cluster, which fills its pools itself";
        return Err(Fault::field("OperationNotAllowed", path, problem));
    }
    let own = &lb.spec.id;
    let named = |e: &&Value| {
        same_id(
            &format!("{own}/{parts}/{}", e["name"].as_str().unwrap_or_default()),
            reference,
        )
    };
    let part = list(&lb.spec.body["properties"][parts])
        .iter()
        .find(named)
        .ok_or_else(missing)?;
    if parts == "inboundNatRules" {
        if !part["properties"]["backendAddressPool"].is_null() {
            let problem = "the rule belongs to a pool; put the interface into that";
            return Err(Fault::field("InvalidResourceReference", path, problem));
        }
        let other = |n: &&ArmObject| !same_id(&n.spec.id, nic) && memberships(n).any(|(_, id)| same_id(id, reference));
        if let Some(other) = world.nics.iter().find(other) {
            let problem = format!("the inbound NAT rule leads to {} already", other.spec.id);
            return Err(Fault::field("InboundNatRuleInUse", path, problem));
        }
    }
    let view = Balancer::parse(own, &lb.spec.body)?;
    let frontends = view.frontends.iter().filter_map(|f| match &f.place {
        Place::Internal { subnet, .. } => network_name(subnet),
        Place::Public { .. } => None,
    });
    let addresses = view
        .pools
        .iter()
        .flat_map(|p| &p.addresses)
        .filter_map(|a| network_name(&a.network));
    let others = world
        .nics
        .iter()
        .filter(|n| !same_id(&n.spec.id, nic))
        .filter_map(|n| network_of_member(n, own));
    let elsewhere = frontends
        .chain(addresses)
        .chain(others)
        .any(|v| Some(v.as_str()) != network);
    if elsewhere {
        let problem =
            "all members of a load balancer's pools must be in one virtual network, and that of its frontends";
        return Err(Fault::field(
            "BackendPoolMembersInDifferentVirtualNetworks",
            path,
            problem,
        ));
    }
    Ok(())
}

/// Refuses a fixed address of an interface that a load balancer's frontend has.
pub fn free_of_frontends(config: &Value, at: &str, world: &World) -> Answer<()> {
    let is_static = config["privateIPAllocationMethod"]
        .as_str()
        .is_some_and(|m| m.eq_ignore_ascii_case("static"));
    let address: Option<Ipv4Addr> = config["privateIPAddress"].as_str().and_then(|a| a.parse().ok());
    let (true, Some(address), Some(subnet)) = (is_static, address, config["subnet"]["id"].as_str()) else {
        return Ok(());
    };
    let has = |lb: &&ArmObject| frontend_addresses(lb).any(|f| f.address == address && same_id(f.subnet, subnet));
    match world.load_balancers.iter().find(has) {
        None => Ok(()),
        Some(lb) => {
            let problem = format!("{address} is already allocated to resource {}", lb.spec.id);
            Err(Fault::field(
                "PrivateIPAddressInUse",
                format!("{at}.privateIPAddress"),
                problem,
            ))
        }
    }
}

//! Public addresses, prefixes and NAT gateways: what they are given, and who uses them.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use resources::ArmError;
use serde_json::{Value, json};
use vnet_model::ipam::Pool;

use super::plan::{Inputs, Write, push};
use crate::{
    home::{ArmObject, same_id},
    token::guid,
    validate::public::{address_users, fqdn, gateway_users, is_static},
};

/// Minutes until an idle flow is forgotten, unless said.
const IDLE_MINUTES: u64 = 4;

fn given<T: std::str::FromStr>(o: &ArmObject, field: &str) -> Option<T> {
    o.status.as_ref()?.properties[field].as_str()?.parse().ok()
}

fn exhausted(message: String) -> ArmError {
    ArmError {
        code: "PublicIPPoolExhausted".into(),
        message,
    }
}

fn idle(o: &ArmObject) -> Value {
    let sent = &o.spec.body["properties"]["idleTimeoutInMinutes"];
    if sent.is_null() {
        json!(IDLE_MINUTES)
    } else {
        sent.clone()
    }
}

/// ARM id of the prefix that an address is to come from.
fn prefix_of(o: &ArmObject) -> Option<&str> {
    o.spec.body["properties"]["publicIPPrefix"]["id"].as_str()
}

/// Whether the object holds an address: a dynamic one only while somebody uses it.
fn holds(o: &ArmObject, inputs: &Inputs) -> bool {
    let users = || address_users(&o.spec.id, &inputs.nics, &inputs.load_balancers, &inputs.nat_gateways);
    // The platform's own addresses say nothing about users, and are static.
    is_static(&o.spec.body) || !users().is_empty()
}

/// Statuses of all three kinds.
pub fn public(inputs: &Inputs, out: &mut Vec<Write>) {
    let mut pool = match inputs.pool {
        // The first addresses are the edge's own, as a subnet's are its router's.
        Some(IpNet::V4(prefix)) => Some(Pool::subnet("public", prefix)),
        _ => None,
    };
    if let Some(pool) = &mut pool {
        for o in &inputs.public_ip_prefixes {
            for address in given::<Ipv4Net>(o, "ipPrefix").into_iter().flat_map(all) {
                claim(pool, o, address);
            }
        }
        for o in inputs.public_ips.iter().filter(|o| prefix_of(o).is_none()) {
            if let Some(address) = given::<Ipv4Addr>(o, "ipAddress").filter(|_| holds(o, inputs)) {
                claim(pool, o, address);
            }
        }
    }
    let mut blocks: Vec<(&ArmObject, Option<Ipv4Net>)> = Vec::new();
    for o in inputs.public_ip_prefixes.iter().filter(|o| !o.is_deleting()) {
        let block = match (given::<Ipv4Net>(o, "ipPrefix"), &mut pool) {
            (Some(block), _) => Ok(block),
            (None, None) => Err(exhausted(
                "this platform has no pool of public IPv4 addresses".to_owned(),
            )),
            (None, Some(pool)) => allocate_block(pool, o),
        };
        blocks.push((o, block.as_ref().ok().copied()));
        let members = inputs
            .public_ips
            .iter()
            .filter(|a| prefix_of(a).is_some_and(|p| same_id(p, &o.spec.id)));
        let members: Vec<Value> = members.map(|a| json!({"id": a.spec.id})).collect();
        let shown =
            block.map(|b| json!({"ipPrefix": b, "publicIPAddresses": members, "resourceGuid": guid(&o.spec.id)}));
        push(out, "publicipprefixes", o, shown);
    }
    let mut taken: Vec<Ipv4Addr> = inputs.public_ips.iter().filter_map(|o| given(o, "ipAddress")).collect();
    for o in inputs.public_ips.iter().filter(|o| !o.is_deleting()) {
        let address = match (given::<IpAddr>(o, "ipAddress"), prefix_of(o), &mut pool) {
            _ if !holds(o, inputs) => Ok(None),
            (Some(address), ..) => Ok(Some(address)),
            (None, Some(prefix), _) => {
                let block = blocks
                    .iter()
                    .find(|(p, _)| same_id(&p.spec.id, prefix))
                    .and_then(|(_, b)| *b);
                let free = block.into_iter().flat_map(all).find(|a| !taken.contains(a));
                taken.extend(free);
                let used_up = || exhausted(format!("the public IP prefix {prefix} is used up"));
                free.map(|a| Some(IpAddr::V4(a))).ok_or_else(used_up)
            }
            (None, None, None) => Err(exhausted(
                "this platform has no pool of public IPv4 addresses".to_owned(),
            )),
            (None, None, Some(pool)) => match pool.allocate(o.name()) {
                Ok(a) => Ok(Some(IpAddr::V4(a))),
                Err(_) => Err(exhausted(format!(
                    "the pool of public addresses {} is used up",
                    pool.prefix()
                ))),
            },
        };
        push(
            out,
            "publicipaddresses",
            o,
            address.map(|a| shown_address(o, a, inputs)),
        );
    }
    for o in inputs.nat_gateways.iter().filter(|o| !o.is_deleting()) {
        let users = gateway_users(&o.spec.id, &inputs.vnets);
        let subnets: Vec<Value> = users.iter().map(|id| json!({"id": id})).collect();
        let shown = json!({"subnets": subnets, "resourceGuid": guid(&o.spec.id), "idleTimeoutInMinutes": idle(o)});
        push(out, "natgateways", o, Ok(shown));
    }
}

fn claim(pool: &mut Pool, o: &ArmObject, address: Ipv4Addr) {
    if let Err(e) = pool.claim(o.name(), address) {
        tracing::error!(%address, error = %e, "a public address that was given cannot be held");
    }
}

/// Every address of a block: nothing in it is a router's.
fn all(block: Ipv4Net) -> impl Iterator<Item = Ipv4Addr> {
    let first = u32::from(block.network());
    (first..=u32::from(block.broadcast())).map(Ipv4Addr::from)
}

/// The first aligned block of the wanted length of which nobody holds anything.
fn allocate_block(pool: &mut Pool, o: &ArmObject) -> Result<Ipv4Net, ArmError> {
    let length = o.spec.body["properties"]["prefixLength"].as_u64().unwrap_or(28);
    let length = u8::try_from(length).unwrap_or(32);
    let range = pool.prefix();
    let free =
        |block: &Ipv4Net| all(*block).all(|a| pool.holder(a).is_none() && !vnet_model::rules::is_reserved(range, a));
    let block = range.subnets(length).ok().and_then(|mut blocks| blocks.find(free));
    let used_up = || {
        exhausted(format!(
            "the pool of public addresses {range} has no block of /{length} left"
        ))
    };
    let block = block.ok_or_else(used_up)?;
    all(block).for_each(|a| claim(pool, o, a));
    Ok(block)
}

fn shown_address(o: &ArmObject, address: Option<IpAddr>, inputs: &Inputs) -> Value {
    let id = &o.spec.id;
    let method = if is_static(&o.spec.body) { "Static" } else { "Dynamic" };
    let mut shown = json!({"ipAddress": address, "publicIPAddressVersion": "IPv4", "resourceGuid": guid(id),
        "publicIPAllocationMethod": method, "idleTimeoutInMinutes": idle(o)});
    let user = address_users(id, &inputs.nics, &inputs.load_balancers, &inputs.nat_gateways)
        .into_iter()
        .next();
    if let Some(user) = user {
        let field = if user.contains("/natGateways/") {
            "natGateway"
        } else {
            "ipConfiguration"
        };
        shown[field] = json!({"id": user});
    }
    if let Some(name) = fqdn(&o.spec.body) {
        shown["dnsSettings"] = json!({"fqdn": name});
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::plan::plan;
    use crate::validate::public::tests::{id, nic, object, pip, vnet};

    fn apply(inputs: &mut Inputs) {
        for w in plan(inputs) {
            let list = match w.plural {
                "publicipaddresses" => &mut inputs.public_ips,
                "publicipprefixes" => &mut inputs.public_ip_prefixes,
                "natgateways" => &mut inputs.nat_gateways,
                "loadbalancers" => &mut inputs.load_balancers,
                "networkinterfaces" => &mut inputs.nics,
                "virtualnetworks" => &mut inputs.vnets,
                other => panic!("{other}"),
            };
            *list.iter_mut().find(|o| o.name() == w.object.name()).unwrap() = w.object.clone();
        }
        assert_eq!(plan(inputs), [], "planning again gives nothing");
    }

    fn shown(o: &ArmObject) -> &Value {
        &o.status.as_ref().unwrap().properties
    }

    #[test]
    fn a_prefix_is_a_block_and_its_addresses_come_from_it() {
        let mut inputs = Inputs {
            pool: Some("198.19.0.0/24".parse().unwrap()),
            public_ips: vec![pip("a", "Standard")],
            ..Inputs::default()
        };
        apply(&mut inputs);
        assert_eq!(shown(&inputs.public_ips[0])["ipAddress"], "198.19.0.4");
        let prefix = json!({"sku": {"name": "Standard"}, "properties": {"prefixLength": 31}});
        inputs.public_ip_prefixes.push(object("publicIPPrefixes", "p", prefix));
        for name in ["b", "c", "d"] {
            let mut of = pip(name, "Standard");
            of.spec.body["properties"]["publicIPPrefix"] = json!({"id": id("publicIPPrefixes", "P")});
            inputs.public_ips.push(of);
        }
        inputs.public_ips.push(pip("e", "Standard"));
        apply(&mut inputs);
        assert_eq!(shown(&inputs.public_ip_prefixes[0])["ipPrefix"], "198.19.0.6/31");
        assert_eq!(
            shown(&inputs.public_ip_prefixes[0])["publicIPAddresses"]
                .as_array()
                .unwrap()
                .len(),
            3
        );
        let addresses: Vec<&Value> = inputs.public_ips.iter().map(|o| &shown(o)["ipAddress"]).collect();
        assert_eq!(addresses[1..3], ["198.19.0.6", "198.19.0.7"]);
        assert_eq!(addresses[4], "198.19.0.5");
        let full = inputs.public_ips[3].status.as_ref().unwrap();
        assert!(full.error.as_ref().unwrap().message.contains("is used up"));
    }

    #[test]
    fn a_dynamic_address_is_held_while_it_is_used_and_names_its_user() {
        let mut dynamic = pip("a", "Basic");
        dynamic.spec.body["properties"]["publicIPAllocationMethod"] = json!("Dynamic");
        dynamic.spec.body["properties"]["dnsSettings"] = json!({"domainNameLabel": "web"});
        let mut inputs = Inputs {
            pool: Some("198.19.0.0/24".parse().unwrap()),
            vnets: vec![vnet("v", "10.0.0.0/24", None)],
            public_ips: vec![dynamic],
            ..Inputs::default()
        };
        apply(&mut inputs);
        assert_eq!(shown(&inputs.public_ips[0])["ipAddress"], Value::Null);
        let named = json!({"publicIPAddress": {"id": id("publicIPAddresses", "A")}});
        inputs.nics.push(nic("n", "v", named));
        apply(&mut inputs);
        let now = shown(&inputs.public_ips[0]);
        assert_eq!(now["ipAddress"], "198.19.0.4");
        assert_eq!(
            now["ipConfiguration"]["id"],
            id("networkInterfaces", "n/ipConfigurations/c")
        );
        assert_eq!(now["dnsSettings"]["fqdn"], "web.x.cloudapp.oaks.internal");
        inputs.nics.clear();
        apply(&mut inputs);
        assert_eq!(shown(&inputs.public_ips[0])["ipAddress"], Value::Null);
    }

    #[test]
    fn an_internal_frontend_gets_an_address_that_no_interface_has() {
        let subnet = id("virtualNetworks", "v/subnets/a");
        let own = id("loadBalancers", "lb");
        let lb = json!({"sku": {"name": "Standard"}, "properties": {
            "frontendIPConfigurations": [{"name": "dynamic", "properties": {"subnet": {"id": subnet}}},
                {"name": "fixed", "properties": {"subnet": {"id": subnet}, "privateIPAllocationMethod": "Static", "privateIPAddress": "10.0.0.5"}}],
            "backendAddressPools": [{"name": "be"}],
            "loadBalancingRules": [{"name": "web", "properties": {"frontendIPConfiguration": {"id": format!("{own}/frontendIPConfigurations/fixed")},
                "backendAddressPool": {"id": format!("{own}/backendAddressPools/be")}, "protocol": "Tcp", "frontendPort": 80, "backendPort": 80}}]}});
        let pooled = json!({"loadBalancerBackendAddressPools": [{"id": format!("{own}/backendAddressPools/BE")}]});
        let mut inputs = Inputs {
            vnets: vec![vnet("v", "10.0.0.0/24", None)],
            nics: vec![nic("n", "v", pooled)],
            load_balancers: vec![object("loadBalancers", "lb", lb)],
            ..Inputs::default()
        };
        apply(&mut inputs);
        inputs.nics.push(nic("m", "v", json!({})));
        apply(&mut inputs);
        let frontends = &shown(&inputs.load_balancers[0])["frontendIPConfigurations"];
        // The interface came first, then what is fixed, then what is free.
        let address = |n: usize| frontends[n]["properties"]["privateIPAddress"].clone();
        let of_nic = |n: usize| shown(&inputs.nics[n])["ipConfigurations"][0]["properties"]["privateIPAddress"].clone();
        let all = [of_nic(0), address(0), address(1), of_nic(1)];
        assert_eq!(address(1), "10.0.0.5");
        let distinct: std::collections::BTreeSet<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(distinct.len(), 4, "{all:?}");
        assert_eq!(
            frontends[1]["properties"]["loadBalancingRules"][0]["id"],
            format!("{own}/loadBalancingRules/web")
        );
        let pool = &shown(&inputs.load_balancers[0])["backendAddressPools"][0]["properties"];
        assert_eq!(
            pool["backendIPConfigurations"][0]["id"],
            id("networkInterfaces", "n/ipConfigurations/c")
        );
    }
}

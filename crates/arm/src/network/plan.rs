//! What the network's objects should say: addresses for interfaces, public addresses, states. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use resources::{
    ArmError, ArmStatus,
    views::{NicAddresses, NicView, VnetView, subnet_ref},
};
use serde_json::{Value, json};

use vnet_model::{address::Mac, ipam::Pool};

use crate::{home::ArmObject, token::guid};

/// Everything that the plan looks at.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    pub groups: Vec<ArmObject>,
    pub vnets: Vec<ArmObject>,
    pub nics: Vec<ArmObject>,
    pub public_ips: Vec<ArmObject>,
    pub load_balancers: Vec<ArmObject>,
    pub security_groups: Vec<ArmObject>,
    pub route_tables: Vec<ArmObject>,
    pub nat_gateways: Vec<ArmObject>,
    pub public_ip_prefixes: Vec<ArmObject>,
    pub application_groups: Vec<ArmObject>,
    pub private_zones: Vec<ArmObject>,
    /// Machines, whose names private zones register.
    pub machines: Vec<resources::Machine>,
    /// Pool of public addresses.
    pub pool: Option<IpNet>,
}

/// One status to write.
#[derive(Clone, Debug, PartialEq)]
pub struct Write {
    pub plural: &'static str,
    /// The object as it was read, with the new status.
    pub object: ArmObject,
}

/// Statuses that differ from what is there. Applying them and planning again gives nothing.
pub fn plan(inputs: &Inputs) -> Vec<Write> {
    let mut out = Vec::new();
    let plain: [(&'static str, &[ArmObject]); 3] = [
        ("resourcegroups", &inputs.groups),
        ("virtualnetworks", &inputs.vnets),
        ("applicationsecuritygroups", &inputs.application_groups),
    ];
    for (plural, objects) in plain {
        for o in objects.iter().filter(|o| !o.is_deleting()) {
            let properties = if plural == "resourcegroups" {
                json!({})
            } else if plural == "virtualnetworks" {
                let mut properties = json!({"resourceGuid": guid(&o.spec.id)});
                if let Some(peerings) = peerings(o, inputs) {
                    properties["virtualNetworkPeerings"] = peerings;
                }
                properties
            } else {
                json!({"resourceGuid": guid(&o.spec.id)})
            };
            push(&mut out, plural, o, Ok(properties));
        }
    }
    for group in inputs.security_groups.iter().filter(|o| !o.is_deleting()) {
        push(
            &mut out,
            "networksecuritygroups",
            group,
            Ok(group_properties(group, inputs)),
        );
    }
    for zone in inputs.private_zones.iter().filter(|o| !o.is_deleting()) {
        push(
            &mut out,
            "privatednszones",
            zone,
            Ok(super::private_dns::properties(zone, inputs)),
        );
    }
    for table in inputs.route_tables.iter().filter(|o| !o.is_deleting()) {
        let users = crate::validate::routes::users(&table.spec.id, &inputs.vnets);
        let subnets: Vec<Value> = users.iter().map(|id| json!({"id": id})).collect();
        let properties = json!({"resourceGuid": guid(&table.spec.id), "subnets": subnets});
        push(&mut out, "routetables", table, Ok(properties));
    }
    nics(inputs, &mut out);
    super::public::public(inputs, &mut out);
    out
}

/// Adds a write if the status would change.
pub(super) fn push(out: &mut Vec<Write>, plural: &'static str, o: &ArmObject, result: Result<Value, ArmError>) {
    let generation = o.metadata.generation.unwrap_or(0);
    let old = o.status.clone().unwrap_or_default();
    let mut status = ArmStatus {
        observed_generation: generation,
        steps: old.steps.clone(),
        ..Default::default()
    };
    match result {
        Ok(properties) => {
            status.provisioning_state = "Succeeded".into();
            status.properties = properties;
        }
        Err(error) => {
            status.provisioning_state = "Failed".into();
            // Addresses that were handed out stay handed out.
            status.properties = old.properties.clone();
            status.error = Some(error);
        }
    }
    if o.status.as_ref() != Some(&status) {
        let mut object = o.clone();
        object.status = Some(status);
        out.push(Write { plural, object });
    }
}

/// The state of each half: Connected if the other one is there, Disconnected if it was, Initiated if it never was.
fn peerings(vnet: &ArmObject, inputs: &Inputs) -> Option<Value> {
    let halves = resources::views::peerings(&vnet.spec.body)
        .ok()
        .filter(|h| !h.is_empty())?;
    let before = vnet.status.as_ref().map(|s| &s.properties["virtualNetworkPeerings"]);
    let shown = halves.iter().map(|half| {
        let remote = inputs
            .vnets
            .iter()
            .find(|v| crate::home::same_id(&v.spec.id, &half.remote) && !v.is_deleting());
        let was = before
            .and_then(Value::as_array)
            .and_then(|list| list.iter().find(|p| p["name"] == half.name.as_str()))
            .and_then(|p| p["properties"]["peeringState"].as_str());
        let state = match remote {
            Some(r) if crate::validate::peering::names(r, &vnet.spec.id) => "Connected",
            _ if matches!(was, Some("Connected" | "Disconnected")) => "Disconnected",
            _ => "Initiated",
        };
        let mut properties =
            json!({"peeringState": state, "peeringSyncLevel": "FullyInSync", "provisioningState": "Succeeded"});
        if let Some(remote) = remote {
            let space = &remote.spec.body["properties"]["addressSpace"];
            properties["remoteAddressSpace"] = space.clone();
            properties["remoteVirtualNetworkAddressSpace"] = space.clone();
        }
        json!({"name": half.name, "properties": properties})
    });
    Some(shown.collect())
}

/// Default rules, and who names the group.
fn group_properties(group: &ArmObject, inputs: &Inputs) -> Value {
    let id = &group.spec.id;
    let defaults = vnet_model::nsg::default_rules();
    let defaults: Vec<Value> = defaults
        .iter()
        .map(|r| vnet_model::arm::show_default_rule(r, id))
        .collect();
    let users = crate::validate::security::users(id, &inputs.vnets, &inputs.nics);
    let (subnets, nics): (Vec<_>, Vec<_>) = users.iter().partition(|u| u.contains("/subnets/"));
    let references = |ids: Vec<&String>| ids.into_iter().map(|id| json!({"id": id})).collect::<Vec<Value>>();
    json!({"resourceGuid": guid(id), "defaultSecurityRules": defaults,
        "subnets": references(subnets), "networkInterfaces": references(nics)})
}

fn known(o: &ArmObject) -> Option<NicAddresses> {
    NicAddresses::parse(&o.status.as_ref()?.properties)
}

fn nics(inputs: &Inputs, out: &mut Vec<Write>) {
    let vnets: BTreeMap<&str, VnetView> = inputs
        .vnets
        .iter()
        .filter_map(|v| Some((v.name(), VnetView::parse(&v.spec.body).ok()?)))
        .collect();
    let mut pools: Pools = BTreeMap::new();
    for (vnet, view) in &vnets {
        for s in &view.subnets {
            if let IpNet::V4(prefix) = s.prefix {
                pools.insert(
                    ((*vnet).to_owned(), s.name.to_lowercase()),
                    Pool::subnet(s.name.clone(), prefix),
                );
            }
        }
    }
    let mut macs = BTreeSet::new();
    for nic in &inputs.nics {
        let Some(k) = known(nic) else { continue };
        macs.insert(k.mac.clone());
        for c in &k.ip_configs {
            if let (Some((vnet, subnet)), IpAddr::V4(a)) = (subnet_ref(&c.subnet), c.address)
                && let Some(Err(e)) = pools
                    .get_mut(&(vnet, subnet.to_lowercase()))
                    .map(|p| p.claim(nic.name(), a))
            {
                tracing::error!(nic = nic.name(), error = %e, "an address that was given cannot be held");
            }
        }
    }
    super::balancer::claim(inputs, &mut pools);
    for nic in inputs.nics.iter().filter(|n| !n.is_deleting()) {
        let result = nic_properties(nic, &mut pools, &mut macs);
        push(out, "networkinterfaces", nic, result);
    }
    super::balancer::balancers(inputs, &mut pools, out);
}

/// Home name of the VNet and folded name of the subnet, to who holds what there.
pub(super) type Pools = BTreeMap<(String, String), Pool>;

fn nic_properties(nic: &ArmObject, pools: &mut Pools, macs: &mut BTreeSet<String>) -> Result<Value, ArmError> {
    let fail = |code: &str, message: String| ArmError {
        code: code.to_owned(),
        message,
    };
    let view = NicView::parse(&nic.spec.body).map_err(|e| fail("InvalidRequestContent", e.to_string()))?;
    let before = known(nic).unwrap_or_default();
    let mut addresses: Vec<Option<IpAddr>> = Vec::with_capacity(view.ip_configs.len());
    // Configurations per subnet that still need an address.
    let mut missing: BTreeMap<(String, String), Vec<usize>> = BTreeMap::new();
    for (i, c) in view.ip_configs.iter().enumerate() {
        let Some((vnet, subnet)) = subnet_ref(&c.subnet) else {
            return Err(fail(
                "LinkedInvalidPropertyId",
                format!("'{}' is not the id of a subnet", c.subnet),
            ));
        };
        let key = (vnet, subnet.to_lowercase());
        let Some(pool) = pools.get_mut(&key) else {
            return Err(fail(
                "InvalidResourceReference",
                format!("the subnet '{subnet}' does not exist"),
            ));
        };
        let kept = before
            .ip_configs
            .iter()
            .find(|b| b.name == c.name && b.subnet.eq_ignore_ascii_case(&c.subnet));
        match (c.address, kept) {
            (Some(IpAddr::V4(fixed)), _) => {
                pool.claim(nic.name(), fixed)
                    .map_err(|e| fail(e.code(), e.to_string()))?;
                addresses.push(Some(fixed.into()));
            }
            (Some(other), _) => {
                return Err(fail(
                    "PrivateIPAddressNotInSubnet",
                    format!("{other} is not an IPv4 address"),
                ));
            }
            (None, Some(k)) => addresses.push(Some(k.address)),
            (None, None) => {
                missing.entry(key).or_default().push(i);
                addresses.push(None);
            }
        }
    }
    for (key, wanted) in missing {
        let Some(pool) = pools.get_mut(&key) else { continue };
        let got = pool.allocate_many(nic.name(), wanted.len()).map_err(|e| {
            let free = pool.free();
            fail(e.code(), format!("{e} {free} of {} are free.", pool.capacity()))
        })?;
        wanted.iter().zip(got).for_each(|(i, a)| addresses[*i] = Some(a.into()));
    }
    let mac = if before.mac.is_empty() {
        let fresh = (0..64)
            .map(|n| Mac::derived(&format!("{} {n}", nic.name())).dashed())
            .find(|m| macs.insert(m.clone()));
        fresh.ok_or_else(|| fail("InternalServerError", "no free MAC address was found".into()))?
    } else {
        before.mac
    };
    let id = &nic.spec.id;
    let configs: Vec<Value> = view
        .ip_configs
        .iter()
        .zip(&addresses)
        .map(|(c, a)| {
            let method = if c.address.is_some() { "Static" } else { "Dynamic" };
            json!({"name": c.name, "id": format!("{id}/ipConfigurations/{}", c.name),
                "type": "Microsoft.Network/networkInterfaces/ipConfigurations",
                "properties": {"privateIPAddress": a, "privateIPAllocationMethod": method, "privateIPAddressVersion": "IPv4",
                    "primary": c.primary, "subnet": {"id": c.subnet}, "provisioningState": "Succeeded"}})
        })
        .collect();
    Ok(json!({"macAddress": mac, "ipConfigurations": configs, "resourceGuid": guid(id)}))
}

#[cfg(test)]
mod tests {
    use resources::ArmSpec;

    use super::*;

    const VNET: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/v";

    fn nic(name: &str, configs: usize) -> ArmObject {
        let configs: Vec<Value> = (0..configs)
            .map(|i| json!({"name": format!("c{i}"), "properties": {"subnet": {"id": format!("{VNET}/subnets/a")}, "primary": i == 0}}))
            .collect();
        let id = format!("/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/networkInterfaces/{name}");
        ArmObject::new(
            "networkinterfaces",
            ArmSpec {
                id,
                body: json!({"properties": {"ipConfigurations": configs}}),
            },
        )
    }

    fn inputs() -> Inputs {
        let body = json!({"properties": {"addressSpace": {"addressPrefixes": ["10.0.0.0/16"]},
            "subnets": [{"name": "a", "properties": {"addressPrefix": "10.0.0.0/28"}}]}});
        let pip = |n: &str| {
            ArmObject::new(
                "publicipaddresses",
                ArmSpec {
                    id: format!("/subscriptions/s/{n}/x"),
                    body: json!({"properties": {"publicIPAllocationMethod": "Static"}}),
                },
            )
        };
        Inputs {
            vnets: vec![ArmObject::new("virtualnetworks", ArmSpec { id: VNET.into(), body })],
            nics: vec![nic("n1", 5), nic("n2", 5)],
            public_ips: vec![pip("a"), pip("b")],
            pool: Some("198.19.0.0/16".parse().unwrap()),
            ..Default::default()
        }
    }

    fn apply(inputs: &mut Inputs) -> Vec<Write> {
        let writes = plan(inputs);
        for w in &writes {
            let list = match w.plural {
                "networkinterfaces" => &mut inputs.nics,
                "virtualnetworks" => &mut inputs.vnets,
                "publicipaddresses" => &mut inputs.public_ips,
                other => panic!("{other}"),
            };
            *list.iter_mut().find(|o| o.name() == w.object.name()).unwrap() = w.object.clone();
        }
        writes
    }

    #[test]
    fn peerings_are_connected_while_both_halves_are_there() {
        let id = |n: &str| format!("/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/{n}");
        let vnet = |n: &str, remote: &str, prefix: &str| {
            let half = json!({"name": "p", "properties": {"remoteVirtualNetwork": {"id": id(remote)}}});
            let body = json!({"properties": {"addressSpace": {"addressPrefixes": [prefix]}, "virtualNetworkPeerings": [half]}});
            ArmObject::new("virtualnetworks", resources::ArmSpec { id: id(n), body })
        };
        let mut inputs = Inputs {
            vnets: vec![vnet("a", "b", "10.1.0.0/16")],
            ..Inputs::default()
        };
        let state = |inputs: &mut Inputs| {
            for w in plan(inputs) {
                let at = inputs.vnets.iter().position(|v| v.name() == w.object.name()).unwrap();
                inputs.vnets[at] = w.object;
            }
            assert_eq!(plan(inputs), []);
            let shown = &inputs.vnets[0].status.as_ref().unwrap().properties["virtualNetworkPeerings"][0];
            shown["properties"]["peeringState"].as_str().unwrap().to_owned()
        };
        assert_eq!(state(&mut inputs), "Initiated");
        inputs.vnets.push(vnet("b", "a", "10.2.0.0/16"));
        assert_eq!(state(&mut inputs), "Connected");
        inputs.vnets.pop();
        assert_eq!(state(&mut inputs), "Disconnected");
    }

    #[test]
    fn planning_again_after_applying_gives_nothing() {
        let mut i = inputs();
        assert_eq!(apply(&mut i).len(), 5);
        assert_eq!(plan(&i), []);
        let all: Vec<NicAddresses> = i.nics.iter().map(|n| known(n).unwrap()).collect();
        assert_eq!(all[0].primary().unwrap().address.to_string(), "10.0.0.4");
        assert_eq!(all[1].primary().unwrap().address.to_string(), "10.0.0.9");
        assert_ne!(all[0].mac, all[1].mac);
        let pips: Vec<&str> = i
            .public_ips
            .iter()
            .map(|p| p.status.as_ref().unwrap().properties["ipAddress"].as_str().unwrap())
            .collect();
        assert_eq!(pips, ["198.19.0.4", "198.19.0.5"]);
    }

    #[test]
    fn growing_keeps_addresses_and_a_full_subnet_fails_alone() {
        let mut i = inputs();
        apply(&mut i);
        let before = known(&i.nics[0]).unwrap();
        // 11 usable, 10 used: one more configuration fits, a third interface with two does not.
        i.nics[0].spec.body = nic("n1", 6).spec.body;
        i.nics.push(nic("n3", 2));
        apply(&mut i);
        let after = known(&i.nics[0]).unwrap();
        assert_eq!(before.ip_configs, after.ip_configs[..5]);
        assert_eq!(after.mac, before.mac);
        let failed = i.nics[2].status.clone().unwrap();
        assert_eq!(failed.provisioning_state, "Failed");
        assert!(
            failed
                .error
                .unwrap()
                .message
                .contains("for 2 IP addresses. 0 of 11 are free")
        );
        assert_eq!(plan(&i), []);
        // Room again: the failed one is served.
        i.nics.remove(1);
        apply(&mut i);
        assert_eq!(i.nics[1].status.as_ref().unwrap().provisioning_state, "Succeeded");
    }
}

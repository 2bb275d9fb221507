//! Home objects to ARM bodies and back: what was sent plus what the platform knows, and on the way in the reverse.
//!
//! Clients read, change a field and write the whole body back, so everything a GET adds comes back in the next PUT. Read-only
//! fields are dropped there, not refused.

use resources::ArmStatus;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::{
    home::ArmObject,
    table::{self, ResourceType, Storage},
};

/// Top-level fields that a server sets.
const READ_ONLY_TOP: &[&str] = &[
    "id",
    "name",
    "type",
    "etag",
    "eTag",
    "systemData",
    "resourceGroup",
    "oaks",
];
/// Fields of `properties` that a server sets, whatever the type.
const READ_ONLY_PROPERTIES: &[&str] = &["provisioningState", "resourceGuid"];
/// Further ones of a managed cluster, and of a pool (in its flat and its own form).
const READ_ONLY_AKS: &[&str] = &[
    "currentKubernetesVersion",
    "fqdn",
    "privateFQDN",
    "azurePortalFQDN",
    "resourceUID",
    "maxAgentPools",
    "currentOrchestratorVersion",
    "nodeImageVersion",
    "status",
];

/// What is stored of a body that a client sent for a resource of `kind`.
pub fn clean(kind: &ResourceType, mut body: Map<String, Value>) -> Map<String, Value> {
    for f in READ_ONLY_TOP {
        body.remove(*f);
    }
    if let Some(p) = body.get_mut("properties").and_then(Value::as_object_mut) {
        clean_properties(kind, p);
    }
    body
}

fn clean_properties(kind: &ResourceType, p: &mut Map<String, Value>) {
    for f in READ_ONLY_PROPERTIES {
        p.remove(*f);
    }
    if kind.provider == "Microsoft.ContainerService" {
        for f in READ_ONLY_AKS {
            p.remove(*f);
        }
    }
    crate::private_dns::clean(kind, p);
    if kind.path == ["routeTables"] {
        p.remove("subnets");
    }
    if kind.path == ["networkSecurityGroups"] {
        for f in ["defaultSecurityRules", "subnets", "networkInterfaces"] {
            p.remove(f);
        }
    }
    if kind.path == ["virtualNetworks", "virtualNetworkPeerings"] {
        for f in [
            "peeringState",
            "peeringSyncLevel",
            "remoteAddressSpace",
            "remoteVirtualNetworkAddressSpace",
        ] {
            p.remove(f);
        }
    }
    for f in read_only_public(kind.path) {
        p.remove(*f);
    }
    for (child, array, flat) in children(kind) {
        for e in p
            .get_mut(array)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
            .filter_map(Value::as_object_mut)
        {
            clean_element(child, flat, e);
        }
    }
}

/// What others' references show at public addresses, NAT gateways, and parts of load balancers.
fn read_only_public(path: &[&str]) -> &'static [&'static str] {
    match path {
        ["publicIPAddresses"] => &["ipConfiguration", "natGateway", "ipAddress"],
        ["publicIPPrefixes"] => &["ipPrefix", "publicIPAddresses", "loadBalancerFrontendIpConfiguration"],
        ["natGateways"] => &["subnets"],
        ["loadBalancers", "frontendIPConfigurations"] => &["loadBalancingRules", "inboundNatRules", "outboundRules"],
        ["loadBalancers", "backendAddressPools"] => &[
            "backendIPConfigurations",
            "loadBalancingRules",
            "outboundRules",
            "outboundRule",
            "inboundNatRules",
        ],
        ["loadBalancers", "probes"] => &["loadBalancingRules"],
        ["loadBalancers", "inboundNatRules"] => &["backendIPConfiguration"],
        _ => &[],
    }
}

/// Drops the read-only fields of one embedded child.
pub fn clean_element(child: &ResourceType, flat: bool, e: &mut Map<String, Value>) {
    for f in ["id", "type", "etag", "eTag"] {
        // In a flat element `type` is a field of its own (a pool's VirtualMachineScaleSets).
        if !(flat && f == "type") {
            e.remove(f);
        }
    }
    if flat {
        clean_properties(child, e);
    } else if let Some(p) = e.get_mut("properties").and_then(Value::as_object_mut) {
        clean_properties(child, p);
    }
}

fn children(kind: &ResourceType) -> impl Iterator<Item = (&'static ResourceType, &'static str, bool)> {
    let parent = *kind;
    table::TYPES.iter().filter_map(move |t| match t.storage {
        Storage::Embedded { array, flat, .. }
            if t.provider == parent.provider && t.path.split_last().is_some_and(|(_, up)| up == parent.path) =>
        {
            Some((t, array, flat))
        }
        _ => None,
    })
}

/// The ARM body of an object.
pub fn resource(kind: &ResourceType, object: &ArmObject) -> Value {
    let mut out = object.spec.body.as_object().cloned().unwrap_or_default();
    out.remove("oaks");
    let id = object.spec.id.trim_end_matches('/');
    let mut properties = out
        .remove("properties")
        .filter(Value::is_object)
        .unwrap_or_else(|| json!({}));
    let empty = ArmStatus::default();
    let status = object.status.as_ref().unwrap_or(&empty);
    overlay(&mut properties, &status.properties);
    crate::private_dns::complete(kind, &mut properties);
    properties["provisioningState"] = json!(object.state());
    for (child, array, flat) in children(kind) {
        for e in properties
            .get_mut(array)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if !flat {
                let name = e["name"].as_str().unwrap_or_default().to_owned();
                let segment = child.path.last().copied().unwrap_or_default();
                e["id"] = json!(format!("{id}/{segment}/{name}"));
                e["type"] = json!(child.full());
                if !e["properties"].is_object() {
                    e["properties"] = json!({});
                }
                if e["properties"].get("provisioningState").is_none() {
                    e["properties"]["provisioningState"] = json!(object.state());
                }
            }
        }
    }
    // `properties.identity` of the platform: principal ids for what the client asked to have.
    if let (Some(identity), Some(known)) = (out.get_mut("identity"), status.properties.get("oaksIdentity")) {
        overlay(identity, known);
    }
    if let Some(p) = properties.as_object_mut() {
        p.remove("oaksIdentity");
    }
    out.insert("id".into(), json!(id));
    out.insert("name".into(), json!(id.rsplit('/').next()));
    out.insert("type".into(), json!(kind.full()));
    out.insert("properties".into(), properties);
    tag(kind, out)
}

/// The ARM body of an embedded child: `element` as it stands in the rendered parent.
pub fn child(kind: &ResourceType, parent: &Value, element: &Value) -> Value {
    let parent_id = parent["id"].as_str().unwrap_or_default();
    let name = element["name"].as_str().unwrap_or_default();
    let segment = kind.path.last().copied().unwrap_or_default();
    let flat = matches!(kind.storage, Storage::Embedded { flat: true, .. });
    let shaped = crate::private_dns::child(kind, parent, element.clone());
    let mut out = shaped.as_object().cloned().unwrap_or_default();
    if flat {
        out.remove("name");
        let mut properties = Value::Object(std::mem::take(&mut out));
        if properties.get("provisioningState").is_none() {
            properties["provisioningState"] = parent["properties"]["provisioningState"].clone();
        }
        out.insert("properties".into(), properties);
    }
    out.insert("id".into(), json!(format!("{parent_id}/{segment}/{name}")));
    out.insert("name".into(), json!(name));
    out.insert("type".into(), json!(kind.full()));
    tag(kind, out)
}

/// Adds the entity tag: a hash of everything else that the client sees.
fn tag(kind: &ResourceType, mut out: Map<String, Value>) -> Value {
    out.remove("etag");
    out.remove("eTag");
    let hash = Sha256::digest(Value::Object(out.clone()).to_string().as_bytes());
    let hex: String = hash[..8].iter().map(|b| format!("{b:02x}")).collect();
    out.insert(kind.etag.to_owned(), json!(format!("W/\"{hex}\"")));
    Value::Object(out)
}

/// Lays what the platform knows over what was sent. Objects merge; arrays of named elements merge by name, elements that only
/// the platform knows are left out if the client sent a list, and other values are replaced.
pub fn overlay(base: &mut Value, known: &Value) {
    match (base, known) {
        (_, Value::Null) => {}
        (Value::Object(b), Value::Object(k)) => {
            for (name, v) in k.iter().filter(|(_, v)| !v.is_null()) {
                match b.get_mut(name) {
                    Some(slot) => overlay(slot, v),
                    None => drop(b.insert(name.clone(), v.clone())),
                }
            }
        }
        (Value::Array(b), Value::Array(k)) if b.iter().chain(k).all(|e| e["name"].is_string()) && !b.is_empty() => {
            for e in b {
                let same = |o: &&Value| fold(&o["name"]) == fold(&e["name"]);
                if let Some(o) = k.iter().find(same) {
                    let name = e["name"].clone();
                    overlay(e, o);
                    e["name"] = name;
                }
            }
        }
        (slot, v) => *slot = v.clone(),
    }
}

fn fold(v: &Value) -> String {
    v.as_str().unwrap_or_default().to_lowercase()
}

#[cfg(test)]
mod tests {
    use resources::ArmSpec;

    use super::*;

    const VNET: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/v";

    #[test]
    fn what_get_adds_is_dropped_when_it_comes_back() {
        let kind = table::find("Microsoft.Network", &["virtualNetworks"]).unwrap();
        let sent = json!({"location": "x", "tags": {"etag": "mine"}, "unknown": [1],
            "properties": {"addressSpace": {"addressPrefixes": ["10.0.0.0/16"]}, "subnets": [
                {"name": "a", "properties": {"addressPrefix": "10.0.0.0/24", "odd": true}}]}});
        let mut object = ArmObject::new(
            "virtualnetworks",
            ArmSpec {
                id: VNET.into(),
                body: sent.clone(),
            },
        );
        object.status = Some(ArmStatus {
            provisioning_state: "Succeeded".into(),
            properties: json!({"resourceGuid": "1"}),
            ..Default::default()
        });
        let got = resource(kind, &object);
        assert_eq!(got["properties"]["subnets"][0]["id"], format!("{VNET}/subnets/a"));
        assert_eq!(got["properties"]["provisioningState"], "Succeeded");
        assert_eq!(got["unknown"], json!([1]));
        assert!(got["etag"].as_str().unwrap().starts_with("W/\""));
        assert_eq!(Value::Object(clean(kind, got.as_object().unwrap().clone())), sent);
    }

    #[test]
    fn pools_are_flat_in_the_cluster_and_nested_alone() {
        let kind = table::find("Microsoft.ContainerService", &["managedClusters", "agentPools"]).unwrap();
        let parent = json!({"id": "/c", "properties": {"provisioningState": "Creating"}});
        let element = json!({"name": "p1", "count": 2, "type": "VirtualMachineScaleSets"});
        let got = child(kind, &parent, &element);
        assert_eq!(got["id"], "/c/agentPools/p1");
        assert_eq!(got["properties"]["type"], "VirtualMachineScaleSets");
        assert_eq!(got["properties"]["provisioningState"], "Creating");
        assert_eq!(got["type"], "Microsoft.ContainerService/managedClusters/agentPools");
    }

    #[test]
    fn overlay_merges_named_elements() {
        let mut base = json!({"p": [{"name": "A", "count": 1}, {"name": "b"}], "v": ""});
        overlay(
            &mut base,
            &json!({"p": [{"name": "a", "state": "ok"}, {"name": "gone", "state": "x"}], "v": "1", "n": null}),
        );
        assert_eq!(
            base,
            json!({"p": [{"name": "A", "count": 1, "state": "ok"}, {"name": "b"}], "v": "1"})
        );
    }
}

//! What a private zone's status says: its numbers, and the names that machines of linked networks registered.

use resources::{
    ArmId,
    views::{NicAddresses, subnet_ref},
};
use serde_json::{Value, json};
use vnet_model::private_dns::{REGISTERED_TTL_S, zone};

use super::plan::Inputs;
use crate::{
    home::ArmObject,
    private_dns::{REGISTERED, counts},
    token::guid,
};

/// Read-only properties of the zone.
pub fn properties(object: &ArmObject, inputs: &Inputs) -> Value {
    let name = ArmId::parse(&object.spec.id)
        .map(|i| i.name().to_owned())
        .unwrap_or_default();
    let view = zone(&name, &object.spec.body).unwrap_or_default();
    let mut registered = Vec::new();
    for link in view.links.iter().filter(|l| l.registration) {
        let vnet = resources::object_name(&link.virtual_network);
        for machine in &inputs.machines {
            let nic = inputs.nics.iter().find(|n| n.name() == machine.spec.nic);
            let status = nic.and_then(|n| n.status.as_ref());
            let Some(addresses) = status.and_then(|s| NicAddresses::parse(&s.properties)) else {
                continue;
            };
            let Some(primary) = addresses.primary() else { continue };
            if subnet_ref(&primary.subnet).is_none_or(|(v, _)| v != vnet) {
                continue;
            }
            registered.push(
                json!({"name": machine.spec.node_name.to_lowercase(), "properties": {"ttl": REGISTERED_TTL_S,
                "isAutoRegistered": true, "aRecords": [{"ipv4Address": primary.address}]}}),
            );
        }
    }
    registered.sort_by_key(|r| r["name"].as_str().unwrap_or_default().to_owned());
    let own_soa = object.spec.body["properties"]["SOA"]
        .as_array()
        .is_some_and(|a| !a.is_empty());
    let sets = view.records.len() + registered.len() + usize::from(!own_soa);
    let registering = view.links.iter().filter(|l| l.registration).count();
    let mut out = counts(sets, view.links.len(), registering);
    out["internalId"] = json!(guid(&object.spec.id));
    out[REGISTERED] = json!(registered);
    out
}

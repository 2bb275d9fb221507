//! What the metadata service says of each machine: from its Machine, its NIC and its cluster.

use std::collections::BTreeMap;

use resources::{ArmId, Machine, ManagedCluster, NetworkInterface};
use vnet_model::{
    fabric::VnetSpec,
    instance::{IdentitySpec, InstanceSpec},
};

/// Fills in the machines behind the networks' NICs.
pub fn add(
    vnets: &mut BTreeMap<String, VnetSpec>,
    machines: &[Machine],
    nics: &[NetworkInterface],
    clusters: &[ManagedCluster],
) {
    let of_nic: BTreeMap<&str, &Machine> = machines.iter().map(|m| (m.spec.nic.as_str(), m)).collect();
    for nic in vnets.values_mut().flat_map(|v| &mut v.nics) {
        let object = nics.iter().find(|n| n.name() == nic.key);
        if let (Some(machine), Some(object)) = (of_nic.get(nic.key.as_str()), object) {
            nic.instance = Some(instance(machine, object, clusters));
        }
    }
}

fn instance(machine: &Machine, nic: &NetworkInterface, clusters: &[ManagedCluster]) -> InstanceSpec {
    let owner = machine
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|o| o.kind == "ManagedCluster");
    let cluster = owner.and_then(|o| clusters.iter().find(|c| c.name() == o.name));
    let profile = cluster
        .and_then(|c| c.status.as_ref())
        .map(|s| &s.properties["identityProfile"]["kubeletidentity"]);
    let identity = profile.filter(|p| p.is_object()).map(|p| {
        let text = |field: &str| p[field].as_str().unwrap_or_default().to_owned();
        IdentitySpec {
            client_id: text("clientId"),
            object_id: text("objectId"),
            resource_id: text("resourceId"),
        }
    });
    let id = ArmId::parse(&nic.spec.id).ok();
    let subscription = id.as_ref().map(|i| i.subscription.clone()).unwrap_or_default();
    let resource_group = id.and_then(|i| i.resource_group).unwrap_or_default();
    let name = machine.spec.node_name.clone();
    // A node is called by its scale set's name and six base-36 digits.
    let (scale_set, number) = name
        .split_at_checked(name.len().saturating_sub(6))
        .unwrap_or((&name, ""));
    let scale_set = scale_set.to_owned();
    let number = u32::from_str_radix(number, 36).unwrap_or(0);
    let tags = nic.spec.body["tags"].as_object().into_iter().flatten();
    InstanceSpec {
        vm_id: machine.metadata.uid.clone().unwrap_or_default(),
        resource_id: format!(
            "/subscriptions/{subscription}/resourceGroups/{resource_group}/providers/Microsoft.Compute/virtualMachineScaleSets/{scale_set}/virtualMachines/{number}"
        ),
        location: nic.spec.body["location"].as_str().unwrap_or_default().to_owned(),
        vm_size: machine.spec.vm_size.clone(),
        tags: tags
            .map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned()))
            .collect(),
        identities: identity.into_iter().collect(),
        scale_set,
        name,
        subscription,
        resource_group,
    }
}

//! Private zones: each linked virtual network gets the zone's records and the names that machines registered in it.

use std::{collections::BTreeMap, net::Ipv4Addr};

use resources::{ArmId, PrivateDnsZone, object_name};
use vnet_model::{
    fabric::VnetSpec,
    private_dns::{PrivateZone, REGISTERED_TTL_S, zone},
    zone::{RecordData, ZoneRecord, ZoneSpec},
};

/// Adds the zones to the networks that they are linked to; a zone that cannot be read is left out with a note.
pub fn add(vnets: &mut BTreeMap<String, VnetSpec>, zones: &[PrivateDnsZone], notes: &mut Vec<String>) {
    for object in zones.iter().filter(|z| z.metadata.deletion_timestamp.is_none()) {
        let name = ArmId::parse(&object.spec.id)
            .map(|i| i.name().to_lowercase())
            .unwrap_or_default();
        let read = match zone(&name, &object.spec.body) {
            Ok(read) => read,
            Err(e) => {
                notes.push(format!("PrivateDnsZone {}: {e}", object.name()));
                continue;
            }
        };
        let mut records = read.records.clone();
        records.extend(registered(&read, vnets));
        for link in &read.links {
            if let Some(vnet) = vnets.get_mut(&object_name(&link.virtual_network)) {
                vnet.private_zones.push(ZoneSpec {
                    name: name.clone(),
                    records: records.clone(),
                    fallback: link.fallback,
                    registration: link.registration,
                });
            }
        }
    }
}

/// Names of the machines of networks that register here, unless somebody wrote records of that name.
fn registered(zone: &PrivateZone, vnets: &BTreeMap<String, VnetSpec>) -> Vec<ZoneRecord> {
    let mut names: BTreeMap<String, Vec<Ipv4Addr>> = BTreeMap::new();
    for link in zone.links.iter().filter(|l| l.registration) {
        let Some(vnet) = vnets.get(&object_name(&link.virtual_network)) else {
            continue;
        };
        for nic in &vnet.nics {
            if let (Some(host), Some(address)) = (&nic.host_name, nic.primary()) {
                names.entry(host.to_lowercase()).or_default().push(address);
            }
        }
    }
    let written = |name: &str| {
        zone.records
            .iter()
            .any(|r| r.name == name && matches!(r.data, RecordData::A(_) | RecordData::Cname(_)))
    };
    let fresh = names.into_iter().filter(|(name, _)| !written(name));
    fresh
        .map(|(name, addresses)| ZoneRecord {
            name,
            ttl_s: REGISTERED_TTL_S,
            data: RecordData::A(addresses),
        })
        .collect()
}

//! Application security groups: which addresses of a virtual network are in them.

use std::{collections::BTreeMap, net::Ipv4Addr};

use resources::{NetworkInterface, object_name, views::NicView};
use vnet_model::fabric::{ApplicationGroupSpec, VnetSpec};

/// Adds the groups that configurations of the network's NICs say they are in, with those configurations' addresses.
pub fn add(vnet: &mut VnetSpec, nics: &[NetworkInterface]) {
    let mut members: BTreeMap<String, Vec<Ipv4Addr>> = BTreeMap::new();
    for nic in &vnet.nics {
        let object = nics.iter().find(|n| n.name() == nic.key);
        let Some(view) = object.and_then(|o| NicView::parse(&o.spec.body).ok()) else {
            continue;
        };
        for config in &view.ip_configs {
            let Some(held) = nic.ip_configs.iter().find(|c| c.name == config.name) else {
                continue;
            };
            for id in &config.application_groups {
                members.entry(object_name(id)).or_default().push(held.address);
            }
        }
    }
    let groups = members
        .into_iter()
        .map(|(key, members)| ApplicationGroupSpec { key, members });
    vnet.application_groups = groups.collect();
}

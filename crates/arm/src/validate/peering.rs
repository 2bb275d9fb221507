//! Peerings: both halves are elements of their virtual networks' bodies.

use resources::{
    ArmId,
    views::{VnetView, peerings as halves},
};
use serde_json::Value;

use super::World;
use crate::{
    error::{Answer, Fault},
    home::{ArmObject, same_id},
};

/// Checks a virtual network's halves against the other networks: they exist, each is named once, and no address space that
/// comes together overlaps.
pub fn peerings(id: &ArmId, body: &Value, view: &VnetView, world: &World) -> Answer<()> {
    let own = id.to_string();
    let mut joined: Vec<(String, VnetView)> = vec![(own.clone(), view.clone())];
    let list = halves(body)?;
    for (i, half) in list.iter().enumerate() {
        let path = format!("properties.virtualNetworkPeerings[{i}].properties.remoteVirtualNetwork.id");
        if list[..i].iter().any(|h| h.name.eq_ignore_ascii_case(&half.name)) {
            let problem = format!("there are two peerings named '{}'", half.name);
            let path = format!("properties.virtualNetworkPeerings[{i}].name");
            return Err(Fault::field("DuplicateResourceName", path, problem));
        }
        if same_id(&half.remote, &own) {
            let problem = "a virtual network cannot be peered with itself";
            return Err(Fault::field("VnetCannotBePeeredWithItself", path, problem));
        }
        if list[..i].iter().any(|h| same_id(&h.remote, &half.remote)) {
            let problem = format!("another peering already names '{}'", half.remote);
            return Err(Fault::field("AnotherPeeringAlreadyReferencesRemoteVnet", path, problem));
        }
        // A half may outlive the other network, so that deleting works in any order.
        let known = world.vnet(&own).is_some_and(|o| names(o, &half.remote));
        let remote = match world.vnet(&half.remote) {
            Some(o) => VnetView::parse(&o.spec.body)?,
            None if known => continue,
            None => {
                let problem = format!("the virtual network '{}' does not exist", half.remote);
                return Err(Fault::field("InvalidResourceReference", path, problem));
            }
        };
        add(&mut joined, &half.remote, remote)?;
    }
    // A new prefix must not meet those who named this network first.
    for other in world.vnets.iter().filter(|o| names(o, &own) && !o.is_deleting()) {
        if !joined.iter().any(|(id, _)| same_id(id, &other.spec.id)) {
            let remote = VnetView::parse(&other.spec.body)?;
            add(&mut joined[..1].to_vec(), &other.spec.id, remote)?;
        }
    }
    Ok(())
}

/// Whether the network has a half that names `remote`.
pub fn names(vnet: &ArmObject, remote: &str) -> bool {
    halves(&vnet.spec.body).is_ok_and(|list| list.iter().any(|h| same_id(&h.remote, remote)))
}

fn add(joined: &mut Vec<(String, VnetView)>, id: &str, remote: VnetView) -> Answer<()> {
    for (n, (other, view)) in joined.iter().enumerate() {
        let pairs = view
            .prefixes
            .iter()
            .flat_map(|a| remote.prefixes.iter().map(move |b| (a, b)));
        let mut overlapping = pairs.filter(|(a, b)| a.contains(*b) || b.contains(*a));
        if let Some((a, b)) = overlapping.next() {
            let code = if n == 0 {
                "VnetAddressSpacesOverlap"
            } else {
                "VnetAddressSpaceOverlapsWithAlreadyPeeredVnet"
            };
            let message = format!(
                "Cannot create or update the peering because the address space {b} of {id} overlaps {a} of {other}."
            );
            return Err(Fault::bad_request(code, message));
        }
    }
    joined.push((id.to_owned(), remote));
    Ok(())
}

#[cfg(test)]
mod tests {
    use resources::ArmSpec;
    use serde_json::json;

    use super::*;
    use crate::validate::network;

    fn id(name: &str) -> String {
        format!("/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/{name}")
    }

    fn body(prefix: &str, remotes: &[&str]) -> Value {
        let half = |r: &&str| json!({"name": format!("to-{r}"), "properties": {"remoteVirtualNetwork": {"id": id(r)}}});
        let halves: Vec<Value> = remotes.iter().map(half).collect();
        json!({"location": "x", "properties": {"addressSpace": {"addressPrefixes": [prefix]}, "virtualNetworkPeerings": halves}})
    }

    fn world(vnets: &[(&str, &str, &[&str])]) -> World {
        let object = |(name, prefix, remotes): &(&str, &str, &[&str])| {
            let spec = ArmSpec {
                id: id(name),
                body: body(prefix, remotes),
            };
            ArmObject::new("virtualnetworks", spec)
        };
        World {
            vnets: vnets.iter().map(object).collect(),
            ..World::default()
        }
    }

    #[test]
    fn each_mistake_has_its_code() {
        let w = world(&[
            ("b", "10.2.0.0/16", &[]),
            ("c", "10.2.128.0/17", &[]),
            ("d", "10.4.0.0/16", &["a"]),
        ]);
        let check = |body: Value| {
            let id = ArmId::parse(&id("a")).unwrap();
            network::vnet(&id, &body, None, &w).err().map(|f| f.code)
        };
        assert_eq!(check(body("10.1.0.0/16", &["b"])), None);
        for (prefix, remotes, code) in [
            ("10.1.0.0/16", &["gone"][..], "InvalidResourceReference"),
            ("10.1.0.0/16", &["a"], "VnetCannotBePeeredWithItself"),
            ("10.2.0.0/17", &["b"], "VnetAddressSpacesOverlap"),
            (
                "10.1.0.0/16",
                &["b", "c"],
                "VnetAddressSpaceOverlapsWithAlreadyPeeredVnet",
            ),
            ("10.4.1.0/24", &[], "VnetAddressSpacesOverlap"),
            ("10.1.0.0/16", &["b", "b"], "DuplicateResourceName"),
        ] {
            assert_eq!(
                check(body(prefix, remotes)).as_deref(),
                Some(code),
                "{prefix} {remotes:?}"
            );
        }
        let mut gateway = body("10.1.0.0/16", &["b"]);
        gateway["properties"]["virtualNetworkPeerings"][0]["properties"]["useRemoteGateways"] = json!(true);
        assert!(check(gateway).is_some());
    }
}

//! Network security groups.

use serde_json::Value;

use super::{World, application_groups};
use crate::{
    error::{Answer, Fault},
    home::{ArmObject, same_id},
};

/// A group's whole body, rules included.
pub fn group(body: &Value, world: &World) -> Answer<()> {
    let list = body["properties"]["securityRules"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    let rules =
        vnet_model::arm::security_rules(body, &world.service_tags, &str::to_lowercase).map_err(|(place, e)| {
            let path = "properties.securityRules";
            let path = place.map_or_else(|| path.to_owned(), |n| format!("{path}[{n}]"));
            Fault::field(e.code(), path, e)
        })?;
    for (n, rule) in rules.iter().enumerate() {
        let path = || format!("properties.securityRules[{n}].name");
        if rule.name.is_empty() || rule.name.len() > 80 {
            let problem = "a security rule needs a name of at most 80 characters";
            return Err(Fault::field("InvalidResourceName", path(), problem));
        }
        if rules[..n].iter().any(|o| o.name.eq_ignore_ascii_case(&rule.name)) {
            let problem = format!("there are two security rules named '{}'", rule.name);
            return Err(Fault::field("DuplicateResourceName", path(), problem));
        }
    }
    debug_assert_eq!(list.len(), rules.len());
    application_groups::in_rules(body, world)
}

/// A reference to a group: it must exist.
pub fn reference(id: Option<&String>, path: impl Into<String>, world: &World) -> Answer<()> {
    match id {
        None => Ok(()),
        Some(id)
            if world
                .security_groups
                .iter()
                .any(|g| same_id(&g.spec.id, id) && !g.is_deleting()) =>
        {
            Ok(())
        }
        Some(id) => {
            let problem = format!("the network security group '{id}' does not exist");
            Err(Fault::field("InvalidResourceReference", path, problem))
        }
    }
}

/// Refuses to delete a group that a subnet or interface names.
pub fn delete_group(object: &ArmObject, world: &World) -> Answer<()> {
    let users = users(&object.spec.id, &world.vnets, &world.nics);
    let Some(user) = users.first() else { return Ok(()) };
    let message = format!(
        "Network security group {} cannot be deleted because it is in use by {user} ({} in all). Take it off there first.",
        object.spec.id,
        users.len()
    );
    Err(Fault::bad_request("InUseNetworkSecurityGroupCannotBeDeleted", message))
}

/// ARM ids of the subnets and interfaces that name the group.
pub fn users(group: &str, vnets: &[ArmObject], nics: &[ArmObject]) -> Vec<String> {
    let names = |v: &Value| {
        v["networkSecurityGroup"]["id"]
            .as_str()
            .is_some_and(|id| same_id(id, group))
    };
    let mut out = Vec::new();
    for vnet in vnets {
        let subnets = vnet.spec.body["properties"]["subnets"].as_array();
        let named = subnets.into_iter().flatten().filter(|s| names(&s["properties"]));
        out.extend(named.map(|s| format!("{}/subnets/{}", vnet.spec.id, s["name"].as_str().unwrap_or_default())));
    }
    out.extend(
        nics.iter()
            .filter(|n| names(&n.spec.body["properties"]))
            .map(|n| n.spec.id.clone()),
    );
    out
}

#[cfg(test)]
mod tests {
    use resources::{ArmId, ArmSpec};
    use serde_json::json;

    use super::*;
    use crate::validate::network;

    const GROUP: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/networkSecurityGroups/n";
    const VNET: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/v";

    fn object(plural: &str, id: &str, body: Value) -> ArmObject {
        ArmObject::new(plural, ArmSpec { id: id.into(), body })
    }

    fn vnet(group: &str) -> Value {
        json!({"location": "x", "properties": {"addressSpace": {"addressPrefixes": ["10.0.0.0/16"]}, "subnets": [
            {"name": "a", "properties": {"addressPrefix": "10.0.0.0/24", "networkSecurityGroup": {"id": group}}}]}})
    }

    #[test]
    fn a_group_in_use_stays_and_a_missing_one_is_refused() {
        let mut world = World {
            security_groups: vec![object("networksecuritygroups", GROUP, json!({}))],
            ..World::default()
        };
        let id = ArmId::parse(VNET).unwrap();
        let code = |group: &str, world: &World| network::vnet(&id, &vnet(group), None, world).err().map(|f| f.code);
        assert_eq!(code(&GROUP.to_uppercase(), &world), None);
        assert_eq!(code("/other", &world).as_deref(), Some("InvalidResourceReference"));
        delete_group(&world.security_groups[0], &world).unwrap();
        world.vnets = vec![object("virtualnetworks", VNET, vnet(GROUP))];
        let refused = delete_group(&world.security_groups[0], &world).unwrap_err();
        assert_eq!(refused.code, "InUseNetworkSecurityGroupCannotBeDeleted");
        assert!(refused.message.contains("virtualNetworks/v/subnets/a"), "{refused}");
    }

    #[test]
    fn the_broken_rule_is_named() {
        let rule = |name: &str, priority: u32| {
            json!({"name": name, "properties": {"priority": priority, "direction": "Inbound", "access": "Deny", "protocol": "*",
                "sourceAddressPrefix": "*", "sourcePortRange": "*", "destinationAddressPrefix": "*", "destinationPortRange": "*"}})
        };
        let check = |rules: &[Value]| group(&json!({"properties": {"securityRules": rules}}), &World::default()).err();
        assert_eq!(check(&[rule("a", 100), rule("b", 101)]), None);
        assert_eq!(
            check(&[rule("a", 100), rule("A", 101)]).unwrap().code,
            "DuplicateResourceName"
        );
        assert_eq!(
            check(&[rule("a", 100), rule("b", 100)]).unwrap().code,
            "SecurityRuleConflict"
        );
        let mut bad = rule("b", 200);
        bad["properties"]["destinationPortRange"] = json!("many");
        let fault = check(&[rule("a", 100), bad]).unwrap();
        assert_eq!(fault.target.as_deref(), Some("properties.securityRules[1]"));
    }
}

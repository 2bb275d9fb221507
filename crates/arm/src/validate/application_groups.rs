//! Application security groups: members are in one virtual network, and so are both sides of a rule.
//!
//! # Source
//! Azure Virtual Network, "Application security groups": all interfaces of a group are in the virtual network of its first
//! one; groups that are source and destination of one rule have their interfaces in the same virtual network.

use resources::{
    ArmId,
    views::{NicView, subnet_ref},
};
use serde_json::Value;

use super::World;
use crate::{
    error::{Answer, Fault},
    home::{ArmObject, same_id},
};

const SIDES: [&str; 2] = [
    "sourceApplicationSecurityGroups",
    "destinationApplicationSecurityGroups",
];

impl World {
    fn application_group(&self, id: &str, path: &str) -> Answer<()> {
        let found = self
            .application_groups
            .iter()
            .any(|g| same_id(&g.spec.id, id) && !g.is_deleting());
        if found {
            return Ok(());
        }
        let problem = format!("the application security group '{id}' does not exist");
        Err(Fault::field("InvalidResourceReference", path, problem))
    }
}

/// Interfaces that have a configuration in the group: ARM id and the home name of the virtual network. `except` is left out.
fn members<'a>(group: &str, world: &'a World, except: &str) -> Vec<(&'a str, String)> {
    let mut out = Vec::new();
    for nic in world.nics.iter().filter(|n| !same_id(&n.spec.id, except)) {
        let Ok(view) = NicView::parse(&nic.spec.body) else {
            continue;
        };
        let inside = |c: &&resources::views::NicIpConfigView| c.application_groups.iter().any(|g| same_id(g, group));
        if let Some((vnet, _)) = view.ip_configs.iter().find(inside).and_then(|c| subnet_ref(&c.subnet)) {
            out.push((nic.spec.id.as_str(), vnet));
        }
    }
    out
}

/// Addresses of the group's members.
pub fn addresses(group: &str, world: &World) -> Vec<std::net::IpAddr> {
    let mut out = Vec::new();
    for nic in &world.nics {
        let Ok(view) = NicView::parse(&nic.spec.body) else {
            continue;
        };
        let live = nic
            .status
            .as_ref()
            .and_then(|s| resources::views::NicAddresses::parse(&s.properties));
        let inside = |name: &str| {
            let config = view.ip_configs.iter().find(|c| c.name == name);
            config.is_some_and(|c| c.application_groups.iter().any(|g| same_id(g, group)))
        };
        out.extend(
            live.into_iter()
                .flat_map(|l| l.ip_configs)
                .filter(|c| inside(&c.name))
                .map(|c| c.address),
        );
    }
    out
}

/// An interface's memberships: the groups exist, and nobody of them is in another virtual network, nor of a group that
/// stands on the other side of a rule.
pub fn of_interface(id: &ArmId, view: &NicView, world: &World) -> Answer<()> {
    let own = id.to_string();
    let vnet = view
        .ip_configs
        .first()
        .and_then(|c| subnet_ref(&c.subnet))
        .map(|(v, _)| v);
    for (i, config) in view.ip_configs.iter().enumerate() {
        for (n, group) in config.application_groups.iter().enumerate() {
            let path = format!("properties.ipConfigurations[{i}].properties.applicationSecurityGroups[{n}].id");
            world.application_group(group, &path)?;
            let stranger = |m: &(&str, String)| Some(&m.1) != vnet.as_ref();
            if let Some((other, _)) = members(group, world, &own).into_iter().find(stranger) {
                let problem = format!(
                    "all interfaces of an application security group must be in one virtual network; '{other}' is in another"
                );
                return Err(Fault::field(
                    "ApplicationSecurityGroupMembersNotInSameVnet",
                    path,
                    problem,
                ));
            }
            for counterpart in counterparts(group, world) {
                if let Some((other, _)) = members(&counterpart, world, &own).into_iter().find(stranger) {
                    let problem = format!(
                        "a security rule is about this group and '{counterpart}', whose interface '{other}' is in another virtual network"
                    );
                    return Err(Fault::field("ApplicationSecurityGroupsNotInSameVnet", path, problem));
                }
            }
        }
    }
    Ok(())
}

fn ids<'a>(rule: &'a Value, side: &str) -> impl Iterator<Item = &'a str> {
    let list = rule["properties"][side].as_array();
    list.into_iter().flatten().filter_map(|g| g["id"].as_str())
}

fn rules(group: &Value) -> impl Iterator<Item = &Value> {
    group["properties"]["securityRules"].as_array().into_iter().flatten()
}

/// Groups on the other side of rules that name `group`.
fn counterparts(group: &str, world: &World) -> Vec<String> {
    let all = world.security_groups.iter().flat_map(|g| rules(&g.spec.body));
    let [from, to] = SIDES;
    let mut out = Vec::new();
    for rule in all {
        for (here, there) in [(from, to), (to, from)] {
            if ids(rule, here).any(|g| same_id(g, group)) {
                out.extend(ids(rule, there).map(str::to_owned));
            }
        }
    }
    out
}

/// The rules of a network security group: every application security group exists, and those of one rule have their
/// members in one virtual network.
pub fn in_rules(body: &Value, world: &World) -> Answer<()> {
    for (n, rule) in rules(body).enumerate() {
        let mut seen: Option<(String, String)> = None;
        for side in SIDES {
            for (i, group) in ids(rule, side).enumerate() {
                let path = format!("properties.securityRules[{n}].properties.{side}[{i}].id");
                world.application_group(group, &path)?;
                let Some((_, vnet)) = members(group, world, "").into_iter().next() else {
                    continue;
                };
                match &seen {
                    Some((first, v)) if *v != vnet => {
                        let problem =
                            format!("the interfaces of this group and of '{first}' are in different virtual networks");
                        return Err(Fault::field("ApplicationSecurityGroupsNotInSameVnet", path, problem));
                    }
                    _ => seen = Some((group.to_owned(), vnet)),
                }
            }
        }
    }
    Ok(())
}

/// Refuses to delete a group that an interface is in or a rule names.
pub fn delete_group(object: &ArmObject, world: &World) -> Answer<()> {
    let group = &object.spec.id;
    let nics = members(group, world, "").into_iter().map(|(id, _)| id.to_owned());
    let naming = |g: &&ArmObject| {
        let mut all = rules(&g.spec.body).flat_map(|r| SIDES.into_iter().flat_map(move |s| ids(r, s)));
        all.any(|id| same_id(id, group))
    };
    let groups = world.security_groups.iter().filter(naming).map(|g| g.spec.id.clone());
    let users: Vec<String> = nics.chain(groups).collect();
    let Some(user) = users.first() else { return Ok(()) };
    let message = format!(
        "Application security group {group} cannot be deleted because it is in use by {user} ({} in all). Take it out there first.",
        users.len()
    );
    Err(Fault::bad_request(
        "InUseApplicationSecurityGroupCannotBeDeleted",
        message,
    ))
}

#[cfg(test)]
mod tests {
    use resources::ArmSpec;
    use serde_json::json;

    use super::*;
    use crate::validate::{network, security};

    const BASE: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network";

    fn object(plural: &str, name: &str, body: Value) -> ArmObject {
        let id = format!("{BASE}/{name}");
        ArmObject::new(plural, ArmSpec { id, body })
    }

    fn nic(vnet: &str, groups: &[&str]) -> Value {
        let groups: Vec<Value> = groups
            .iter()
            .map(|g| json!({"id": format!("{BASE}/applicationSecurityGroups/{g}")}))
            .collect();
        json!({"location": "x", "properties": {"ipConfigurations": [{"name": "a", "properties":
            {"subnet": {"id": format!("{BASE}/virtualNetworks/{vnet}/subnets/a")}, "applicationSecurityGroups": groups}}]}})
    }

    fn nsg(from: &str, to: &str) -> Value {
        let of = |g: &str| json!([{"id": format!("{BASE}/applicationSecurityGroups/{g}")}]);
        json!({"properties": {"securityRules": [{"name": "r", "properties": {"priority": 100, "direction": "Inbound",
            "access": "Deny", "protocol": "*", "sourcePortRange": "*", "destinationPortRange": "*",
            "sourceApplicationSecurityGroups": of(from), "destinationApplicationSecurityGroups": of(to)}}]}})
    }

    fn world() -> World {
        let vnet = |name: &str, prefix: &str| {
            object(
                "virtualnetworks",
                &format!("virtualNetworks/{name}"),
                json!({"location": "x", "properties": {"addressSpace": {"addressPrefixes": [prefix]},
                    "subnets": [{"name": "a", "properties": {"addressPrefix": prefix}}]}}),
            )
        };
        let asg = |n: &str| {
            object(
                "applicationsecuritygroups",
                &format!("applicationSecurityGroups/{n}"),
                json!({}),
            )
        };
        World {
            vnets: vec![vnet("v", "10.0.0.0/24"), vnet("w", "10.1.0.0/24")],
            application_groups: vec![asg("web"), asg("db"), asg("free")],
            nics: vec![object("networkinterfaces", "networkInterfaces/n1", nic("v", &["web"]))],
            security_groups: vec![object(
                "networksecuritygroups",
                "networkSecurityGroups/g",
                nsg("web", "db"),
            )],
            ..World::default()
        }
    }

    #[test]
    fn members_of_a_group_and_of_a_rule_share_a_network() {
        let w = world();
        let id = ArmId::parse(&format!("{BASE}/networkInterfaces/n2")).unwrap();
        let check = |vnet: &str, groups: &[&str]| network::nic(&id, &nic(vnet, groups), None, &w).err().map(|f| f.code);
        assert_eq!(check("v", &["web", "db"]), None);
        assert_eq!(check("w", &["free"]), None);
        for (groups, code) in [
            (&["gone"][..], "InvalidResourceReference"),
            (&["web"], "ApplicationSecurityGroupMembersNotInSameVnet"),
            (&["db"], "ApplicationSecurityGroupsNotInSameVnet"),
        ] {
            assert_eq!(check("w", groups).as_deref(), Some(code), "{groups:?}");
        }
    }

    #[test]
    fn rules_name_groups_that_are_there_and_groups_in_use_stay() {
        let mut w = world();
        let check = |body: &Value, w: &World| security::group(body, w).err().map(|f| f.code);
        assert_eq!(check(&nsg("web", "free"), &w), None);
        assert_eq!(
            check(&nsg("web", "gone"), &w).as_deref(),
            Some("InvalidResourceReference")
        );
        let mut both = nsg("web", "free");
        both["properties"]["securityRules"][0]["properties"]["sourceAddressPrefix"] = json!("*");
        assert_eq!(
            check(&both, &w).as_deref(),
            Some("SecurityRuleParameterContainsUnsupportedValue")
        );
        w.nics
            .push(object("networkinterfaces", "networkInterfaces/n3", nic("w", &["free"])));
        assert_eq!(
            check(&nsg("web", "free"), &w).as_deref(),
            Some("ApplicationSecurityGroupsNotInSameVnet")
        );
        for group in 0..3 {
            let f = delete_group(&w.application_groups[group], &w).unwrap_err();
            assert_eq!(f.code, "InUseApplicationSecurityGroupCannotBeDeleted");
        }
        w.security_groups.clear();
        delete_group(&w.application_groups[1], &w).unwrap();
    }
}

//! VNets, subnets, network interfaces and public addresses.

use std::net::IpAddr;

use ipnet::IpNet;
use resources::{
    ArmId,
    views::{NicView, SubnetView, VnetView},
};
use serde_json::Value;

use super::{World, application_groups, endpoints, peering, routes, security};
use crate::{
    error::{Answer, Fault},
    home::{ArmObject, same_id},
};

/// Longest prefix of a subnet: eight addresses, of which three can be used.
const SUBNET_PREFIX_MAX: u8 = 29;
/// Ranges that mean something else inside every VNet.
const RESERVED: &[(&str, &str)] = &[
    ("224.0.0.0/4", "multicast"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local addresses"),
    ("168.63.129.16/32", "the platform's own address"),
];

fn overlaps(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// A VNet's whole body, subnets included.
pub fn vnet(id: &ArmId, body: &Value, old: Option<&ArmObject>, world: &World) -> Answer<()> {
    let view = VnetView::parse(body)?;
    for (i, p) in view.prefixes.iter().enumerate() {
        let path = format!("properties.addressSpace.addressPrefixes[{i}]");
        if p.addr().is_ipv6() {
            return Err(Fault::field(
                "InvalidAddressPrefixFormat",
                path,
                format!("{p} is IPv6, which is not served"),
            ));
        }
        if !(8..=29).contains(&p.prefix_len()) {
            return Err(Fault::field(
                "InvalidAddressPrefixFormat",
                path,
                format!("{p} must be from /8 to /29"),
            ));
        }
        for (range, meaning) in RESERVED {
            if range.parse::<IpNet>().is_ok_and(|r| overlaps(&r, p)) {
                return Err(Fault::field(
                    "AddressPrefixNotAllowed",
                    path,
                    format!("{p} overlaps {range} ({meaning})"),
                ));
            }
        }
        if let Some(pool) = world.public_pool.filter(|pool| overlaps(pool, p)) {
            let problem = format!("{p} overlaps {pool}, this platform's public addresses");
            return Err(Fault::field("AddressPrefixNotAllowed", path, problem));
        }
        if let Some(q) = view.prefixes[..i].iter().find(|q| overlaps(q, p)) {
            let problem = format!("{p} overlaps {q} of the same virtual network");
            return Err(Fault::field("NetcfgVirtualNetworkAddressSpaceOverlap", path, problem));
        }
    }
    for (i, s) in view.subnets.iter().enumerate() {
        let path = format!("properties.subnets[{i}].properties.addressPrefix");
        if s.prefix.prefix_len() > SUBNET_PREFIX_MAX {
            let problem = format!(
                "{} is too small for subnet '{}': /{SUBNET_PREFIX_MAX} is the smallest",
                s.prefix, s.name
            );
            return Err(Fault::field("NetcfgInvalidSubnet", path, problem));
        }
        if !view.prefixes.iter().any(|p| p.contains(&s.prefix)) {
            let space: Vec<String> = view.prefixes.iter().map(ToString::to_string).collect();
            let problem = format!(
                "subnet '{}' ({}) is outside the virtual network's {}",
                s.name,
                s.prefix,
                space.join(", ")
            );
            return Err(Fault::field("NetcfgInvalidSubnet", path, problem));
        }
        for t in &view.subnets[..i] {
            if t.name.eq_ignore_ascii_case(&s.name) {
                let path = format!("properties.subnets[{i}].name");
                return Err(Fault::field(
                    "DuplicateResourceName",
                    path,
                    format!("there are two subnets named '{}'", s.name),
                ));
            }
            if overlaps(&t.prefix, &s.prefix) {
                let problem = format!(
                    "subnet '{}' ({}) overlaps subnet '{}' ({})",
                    s.name, s.prefix, t.name, t.prefix
                );
                return Err(Fault::field("NetcfgSubnetRangesOverlap", path, problem));
            }
        }
        let at = format!("properties.subnets[{i}].properties");
        endpoints::subnet(s, &at, &world.service_tags)?;
        security::reference(
            s.network_security_group.as_ref(),
            format!("{at}.networkSecurityGroup.id"),
            world,
        )?;
        routes::reference(s.route_table.as_ref(), format!("{at}.routeTable.id"), world)?;
    }
    peering::peerings(id, body, &view, world)?;
    if let Some(old) = old.and_then(|o| VnetView::parse(&o.spec.body).ok()) {
        in_use(id, &old, &view, world)?;
    }
    Ok(())
}

/// Refuses a change that takes a subnet away from someone who is in it.
fn in_use(id: &ArmId, old: &VnetView, new: &VnetView, world: &World) -> Answer<()> {
    for was in &old.subnets {
        let now = new.subnet(&was.name);
        let delegated = |n: &SubnetView| {
            was.delegations.iter().all(|d| n.is_delegated_to(d)) && n.delegations.len() == was.delegations.len()
        };
        if now.is_some_and(|n| n.prefix == was.prefix && delegated(n)) {
            continue;
        }
        let users = world.users_of(&format!("{id}/subnets/{}", was.name));
        if let Some((user, _)) = users.first() {
            let (code, what) = match now {
                None => ("InUseSubnetCannotBeDeleted", "deleted"),
                Some(now) if now.prefix != was.prefix => ("InUsePrefixCannotBeDeleted", "resized or moved"),
                Some(_) => ("InUseSubnetDelegationCannotBeChanged", "delegated otherwise"),
            };
            let message = format!(
                "Subnet '{}' cannot be {what} because it is in use by {user} ({} in all). Delete the user first.",
                was.name,
                users.len()
            );
            return Err(Fault::bad_request(code, message));
        }
    }
    Ok(())
}

/// Refuses to delete a VNet that is in use.
pub fn delete_vnet(object: &ArmObject, world: &World) -> Answer<()> {
    let view = VnetView::parse(&object.spec.body)?;
    for s in &view.subnets {
        let users = world.users_of(&format!("{}/subnets/{}", object.spec.id, s.name));
        if let Some((user, _)) = users.first() {
            let message = format!(
                "The virtual network cannot be deleted because its subnet '{}' is in use by {user} ({} in all). Delete the user first.",
                s.name,
                users.len()
            );
            return Err(Fault::bad_request("InUseSubnetCannotBeDeleted", message));
        }
    }
    Ok(())
}

/// A network interface: its subnets exist, fixed addresses are inside them and free, and there is room.
pub fn nic(id: &ArmId, body: &Value, old: Option<&ArmObject>, world: &World) -> Answer<()> {
    let view = NicView::parse(body)?;
    security::reference(
        view.network_security_group.as_ref(),
        "properties.networkSecurityGroup.id",
        world,
    )?;
    configurations(&view, old)?;
    let mut vnet_seen: Option<String> = None;
    let mut wanted: Vec<(String, u64)> = Vec::new();
    for (i, c) in view.ip_configs.iter().enumerate() {
        let at = format!("properties.ipConfigurations[{i}].properties");
        let (_, subnet, vnet) = world.subnet(&c.subnet, &format!("{at}.subnet.id"))?;
        let was_there = old.is_some_and(|o| {
            NicView::parse(&o.spec.body).is_ok_and(|v| v.ip_configs.iter().any(|x| same_id(&x.subnet, &c.subnet)))
        });
        if let (Some(to), false) = (subnet.delegations.first(), was_there) {
            let problem = format!(
                "subnet '{}' is delegated to {to}; interfaces of others cannot be in it",
                subnet.name
            );
            return Err(Fault::field("SubnetIsDelegated", format!("{at}.subnet.id"), problem));
        }
        match &vnet_seen {
            Some(v) if !same_id(v, &vnet) => {
                let problem = "all configurations of an interface must be in one virtual network";
                return Err(Fault::field(
                    "InvalidResourceReference",
                    format!("{at}.subnet.id"),
                    problem,
                ));
            }
            _ => vnet_seen = Some(vnet),
        }
        if let Some(a) = c.address {
            let path = format!("{at}.privateIPAddress");
            let usable = match (subnet.prefix, a) {
                (IpNet::V4(p), IpAddr::V4(a)) => p.contains(&a) && !vnet_model::rules::is_reserved(p, a),
                _ => false,
            };
            if !usable {
                let problem = format!(
                    "{a} is not one of the usable addresses of subnet '{}' ({})",
                    subnet.name, subnet.prefix
                );
                return Err(Fault::field("PrivateIPAddressNotInSubnet", path, problem));
            }
            let taken = world
                .nics
                .iter()
                .filter(|n| old.is_none_or(|o| o.name() != n.name()))
                .find(|n| {
                    let status = n.status.as_ref().map(|s| &s.properties).unwrap_or(&Value::Null);
                    let live = resources::views::NicAddresses::parse(status);
                    live.is_some_and(|l| {
                        l.ip_configs
                            .iter()
                            .any(|x| x.address == a && same_id(&x.subnet, &c.subnet))
                    })
                });
            if let Some(n) = taken {
                let problem = format!("{a} is already used by network interface '{}'", n.name());
                return Err(Fault::field("PrivateIPAddressInUse", path, problem));
            }
        }
        match wanted.iter_mut().find(|(s, _)| same_id(s, &c.subnet)) {
            Some((_, n)) => *n += 1,
            None => wanted.push((c.subnet.clone(), 1)),
        }
    }
    application_groups::of_interface(id, &view, world)?;
    for (id, n) in wanted {
        let held = old.map_or(0, |o| {
            let v = NicView::parse(&o.spec.body).unwrap_or_default();
            v.ip_configs.iter().filter(|c| same_id(&c.subnet, &id)).count() as u64
        });
        let (_, subnet, _) = world.subnet(&id, "properties.ipConfigurations")?;
        let used: u64 = world
            .users_of(&id)
            .iter()
            .map(|u| u.1)
            .sum::<u64>()
            .saturating_sub(held);
        room(&subnet.name, &subnet.prefix, used, n, "this network interface")?;
    }
    Ok(())
}

/// Configurations of one interface at most.
///
/// # Source
/// Azure networking limits: private addresses per network interface.
const CONFIGURATIONS_MAX: usize = 256;

/// At most so many configurations, each name once, and the primary one stays.
fn configurations(view: &NicView, old: Option<&ArmObject>) -> Answer<()> {
    let path = |i: usize| format!("properties.ipConfigurations[{i}].name");
    if view.ip_configs.len() > CONFIGURATIONS_MAX {
        let problem = format!(
            "{} configurations, at most {CONFIGURATIONS_MAX} are allowed",
            view.ip_configs.len()
        );
        return Err(Fault::field(
            "IpConfigurationsLimitExceeded",
            "properties.ipConfigurations",
            problem,
        ));
    }
    for (i, c) in view.ip_configs.iter().enumerate() {
        if view.ip_configs[..i]
            .iter()
            .any(|o| o.name.eq_ignore_ascii_case(&c.name))
        {
            let problem = format!("there are two configurations named '{}'", c.name);
            return Err(Fault::field("DuplicateResourceName", path(i), problem));
        }
    }
    let was = old.and_then(|o| NicView::parse(&o.spec.body).ok());
    let primary = |v: &NicView| v.ip_configs.iter().find(|c| c.primary).map(|c| c.name.clone());
    match was.as_ref().and_then(primary) {
        Some(was) if primary(view).as_ref() != Some(&was) => {
            let message = format!(
                "The primary configuration '{was}' of a network interface cannot be deleted or replaced by another one."
            );
            Err(Fault::bad_request("PrimaryIpConfigurationCannotBeDeleted", message))
        }
        _ => Ok(()),
    }
}

/// Refuses with the numbers if `wanted` more addresses do not fit into a subnet of which `used` are taken.
pub fn room(subnet: &str, prefix: &IpNet, used: u64, wanted: u64, what: &str) -> Answer<()> {
    let usable = resources::views::usable(prefix);
    let free = usable.saturating_sub(used);
    if wanted <= free {
        return Ok(());
    }
    let message = format!(
        "Subnet '{subnet}' ({prefix}) is full: {what} needs {wanted} addresses, {free} of {usable} usable ones are free ({used} taken or promised). Use a larger subnet, fewer nodes, or a smaller maxPods."
    );
    Err(Fault::bad_request("SubnetIsFull", message))
}

#[cfg(test)]
mod tests {
    use resources::ArmSpec;
    use serde_json::json;

    use super::*;

    const VNET: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/v";

    fn body(prefixes: &[&str], subnets: &[(&str, &str)]) -> Value {
        let subnets: Vec<Value> = subnets
            .iter()
            .map(|(n, p)| json!({"name": n, "properties": {"addressPrefix": p}}))
            .collect();
        json!({"location": "x", "properties": {"addressSpace": {"addressPrefixes": prefixes}, "subnets": subnets}})
    }

    fn check(prefixes: &[&str], subnets: &[(&str, &str)]) -> Option<String> {
        let id = ArmId::parse(VNET).unwrap();
        vnet(&id, &body(prefixes, subnets), None, &World::default())
            .err()
            .map(|f| f.code)
    }

    #[test]
    fn prefixes_and_subnets() {
        let one = ["10.0.0.0/16"];
        assert_eq!(check(&one, &[("a", "10.0.0.0/24"), ("b", "10.0.1.0/24")]), None);
        for (prefixes, subnets, code) in [
            (
                &["10.0.0.0/16", "10.0.128.0/17"][..],
                &[][..],
                "NetcfgVirtualNetworkAddressSpaceOverlap",
            ),
            (&one[..], &[("a", "10.1.0.0/24")][..], "NetcfgInvalidSubnet"),
            (&one[..], &[("a", "10.0.0.0/30")][..], "NetcfgInvalidSubnet"),
            (
                &one[..],
                &[("a", "10.0.0.0/23"), ("b", "10.0.1.0/24")][..],
                "NetcfgSubnetRangesOverlap",
            ),
            (
                &one[..],
                &[("a", "10.0.0.0/24"), ("A", "10.0.1.0/24")][..],
                "DuplicateResourceName",
            ),
            (&["168.63.0.0/16"][..], &[][..], "AddressPrefixNotAllowed"),
            (&["fd00::/64"][..], &[][..], "InvalidAddressPrefixFormat"),
            (&["10.0.0.1/16"][..], &[][..], "InvalidRequestContent"),
        ] {
            assert_eq!(
                check(prefixes, subnets).as_deref(),
                Some(code),
                "{prefixes:?} {subnets:?}"
            );
        }
    }

    #[test]
    fn the_public_pool_is_taken() {
        let id = ArmId::parse(VNET).unwrap();
        let w = World {
            public_pool: Some("198.19.0.0/16".parse().unwrap()),
            ..Default::default()
        };
        let f = vnet(&id, &body(&["198.18.0.0/15"], &[]), None, &w).unwrap_err();
        assert!(
            f.code == "AddressPrefixNotAllowed" && f.message.contains("public addresses"),
            "{f}"
        );
    }

    fn nic_id() -> ArmId {
        ArmId::parse("/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/networkInterfaces/new").unwrap()
    }

    fn world() -> World {
        let nic = json!({"location": "x", "properties": {"ipConfigurations": [
            {"name": "a", "properties": {"subnet": {"id": format!("{VNET}/subnets/A")}}}]}});
        World {
            vnets: vec![ArmObject::new(
                "virtualnetworks",
                ArmSpec {
                    id: VNET.into(),
                    body: body(&["10.0.0.0/16"], &[("a", "10.0.0.0/29"), ("b", "10.0.1.0/24")]),
                },
            )],
            nics: vec![ArmObject::new(
                "networkinterfaces",
                ArmSpec {
                    id: "/subscriptions/s/n1".into(),
                    body: nic,
                },
            )],
            ..Default::default()
        }
    }

    #[test]
    fn subnets_in_use_stay() {
        let w = world();
        let id = ArmId::parse(VNET).unwrap();
        let change = |subnets: &[(&str, &str)]| {
            vnet(&id, &body(&["10.0.0.0/16"], subnets), w.vnets.first(), &w)
                .err()
                .map(|f| f.code)
        };
        assert_eq!(change(&[("a", "10.0.0.0/29")]), None, "b is free");
        assert_eq!(
            change(&[("b", "10.0.1.0/24")]).as_deref(),
            Some("InUseSubnetCannotBeDeleted")
        );
        assert_eq!(
            change(&[("a", "10.0.2.0/29")]).as_deref(),
            Some("InUsePrefixCannotBeDeleted")
        );
        assert_eq!(
            delete_vnet(&w.vnets[0], &w).unwrap_err().code,
            "InUseSubnetCannotBeDeleted"
        );
    }

    #[test]
    fn delegations_and_endpoints_are_known_and_delegated_subnets_are_not_for_everyone() {
        let mut w = world();
        let id = ArmId::parse(VNET).unwrap();
        let with = |subnet: &str, field: &str, value: Value| {
            let mut body = w.vnets[0].spec.body.clone();
            let n = usize::from(subnet == "b");
            body["properties"]["subnets"][n]["properties"][field] = value;
            body
        };
        let check = |body: &Value, w: &World| vnet(&id, body, w.vnets.first(), w).err().map(|f| f.code);
        let groups = |service: &str| json!([{"name": "d", "properties": {"serviceName": service}}]);
        let delegated = with(
            "b",
            "delegations",
            groups("Microsoft.ContainerInstance/containerGroups"),
        );
        let storage = json!([{"service": "Microsoft.Storage"}]);
        for (body, code) in [
            (&delegated, None),
            (
                &with("b", "delegations", groups("Microsoft.Web/serverFarms")),
                Some("InvalidServiceNameOnDelegation"),
            ),
            (
                &with(
                    "a",
                    "delegations",
                    groups("Microsoft.ContainerInstance/containerGroups"),
                ),
                Some("InUseSubnetDelegationCannotBeChanged"),
            ),
            (
                &with("b", "serviceEndpoints", storage.clone()),
                Some("SubnetServiceEndpointInvalidService"),
            ),
            (
                &with("b", "serviceEndpoints", json!([{"service": "Microsoft.Nothing"}])),
                Some("SubnetServiceEndpointInvalidService"),
            ),
        ] {
            assert_eq!(check(body, &w).as_deref(), code, "{body}");
        }
        let storage = with("b", "serviceEndpoints", storage);
        w.service_tags = vnet_model::service_tags::ServiceTags::parse(["Storage=10.9.0.0/24"]).unwrap();
        assert_eq!(check(&storage, &w), None);
        w.vnets[0].spec.body = delegated;
        let c = json!([{"properties": {"subnet": {"id": format!("{VNET}/subnets/b")}}}]);
        let refused = nic(&nic_id(), &json!({"properties": {"ipConfigurations": c}}), None, &w).unwrap_err();
        assert_eq!(refused.code, "SubnetIsDelegated");
    }

    #[test]
    fn configurations_are_few_named_once_and_the_primary_stays() {
        let w = world();
        let body = |names: &[&str]| {
            let c: Vec<Value> = names
                .iter()
                .map(|n| json!({"name": n, "properties": {"subnet": {"id": format!("{VNET}/subnets/b")}}}))
                .collect();
            json!({"location": "x", "properties": {"ipConfigurations": c}})
        };
        let old = ArmObject::new(
            "networkinterfaces",
            ArmSpec {
                id: nic_id().to_string(),
                body: body(&["first", "second"]),
            },
        );
        let check = |names: &[&str]| nic(&nic_id(), &body(names), Some(&old), &w).err().map(|f| f.code);
        assert_eq!(check(&["first", "second", "third"]), None);
        assert_eq!(check(&["first"]), None);
        assert_eq!(
            check(&["second"]).as_deref(),
            Some("PrimaryIpConfigurationCannotBeDeleted")
        );
        assert_eq!(check(&["first", "First"]).as_deref(), Some("DuplicateResourceName"));
        let many: Vec<String> = (0..257).map(|n| format!("c{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(check(&many).as_deref(), Some("IpConfigurationsLimitExceeded"));
    }

    #[test]
    fn a_full_subnet_says_the_numbers() {
        let w = world();
        let configs: Vec<Value> = (0..3)
            .map(|_| json!({"properties": {"subnet": {"id": format!("{VNET}/subnets/a")}}}))
            .collect();
        let f = nic(
            &nic_id(),
            &json!({"properties": {"ipConfigurations": configs}}),
            None,
            &w,
        )
        .unwrap_err();
        assert_eq!(f.code, "SubnetIsFull");
        assert!(f.message.contains("needs 3 addresses, 2 of 3"), "{f}");
    }

    #[test]
    fn fixed_addresses() {
        let w = world();
        let with = |a: &str| {
            let c = json!([{"properties": {"subnet": {"id": format!("{VNET}/subnets/b")},
                "privateIPAllocationMethod": "Static", "privateIPAddress": a}}]);
            nic(&nic_id(), &json!({"properties": {"ipConfigurations": c}}), None, &w)
                .err()
                .map(|f| f.code)
        };
        assert_eq!(with("10.0.1.77"), None);
        assert_eq!(with("10.0.1.3").as_deref(), Some("PrivateIPAddressNotInSubnet"));
        assert_eq!(with("10.0.0.4").as_deref(), Some("PrivateIPAddressNotInSubnet"));
    }
}

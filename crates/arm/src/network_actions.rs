//! Questions about the network that are no resources: free addresses and use of a virtual network's subnets, and what
//! routes and rules a network interface meets. Computed from the objects that the data plane is planned from.

use http::Method;
use resources::{
    ArmId,
    views::{NicAddresses, NicView, VnetView, peerings, usable},
};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use crate::{
    app::App,
    error::{Answer, Fault},
    home::{ArmObject, same_id},
    http::{Reply, Request},
    table::ResourceType,
    validate::World,
};

/// Free addresses that are told beside one that is taken.
const SUGGESTIONS: usize = 5;

/// Answers the action if it is one of these; `None` otherwise.
pub(crate) async fn serve(
    app: &App,
    request: &Request,
    id: &ArmId,
    kind: &'static ResourceType,
    action: &str,
) -> Option<Answer<Reply>> {
    let folded = action.to_ascii_lowercase();
    let answer: fn(&Request, &ArmObject, &World) -> Answer<Value> = match (&request.method, kind.path, folded.as_str())
    {
        (&Method::GET, ["virtualNetworks"], "checkipaddressavailability") => check_address,
        (&Method::GET, ["virtualNetworks"], "usages") => usages,
        (&Method::POST, ["networkInterfaces"], "effectiveroutetable") => effective_routes,
        (&Method::POST, ["networkInterfaces"], "effectivenetworksecuritygroups") => effective_groups,
        _ => return None,
    };
    Some(with_object(app, request, id, kind, answer).await)
}

async fn with_object(
    app: &App,
    request: &Request,
    id: &ArmId,
    kind: &'static ResourceType,
    answer: fn(&Request, &ArmObject, &World) -> Answer<Value>,
) -> Answer<Reply> {
    let object = app.home.object(kind.storage.plural(), &id.to_string()).await?;
    let Some(object) = object else {
        app.group_of(id, false).await?;
        let group = id.resource_group.as_deref().unwrap_or_default();
        return Err(Fault::resource_not_found(
            &format!("{}/{}", kind.full(), id.name()),
            group,
        ));
    };
    Ok(Reply::ok(answer(request, &object, &app.world().await?)?))
}

/// Addresses that interfaces have in the subnet.
fn held(subnet_id: &str, world: &World) -> BTreeSet<IpAddr> {
    let live = |n: &ArmObject| NicAddresses::parse(&n.status.as_ref()?.properties);
    let configs = world.nics.iter().filter_map(live).flat_map(|l| l.ip_configs);
    configs
        .filter(|c| same_id(&c.subnet, subnet_id))
        .map(|c| c.address)
        .collect()
}

fn check_address(request: &Request, vnet: &ArmObject, world: &World) -> Answer<Value> {
    let text = request.param("ipaddress").unwrap_or_default();
    let Ok(address) = text.parse::<Ipv4Addr>() else {
        return Err(Fault::field(
            "InvalidParameter",
            "ipAddress",
            format!("{text:?} is not an IPv4 address"),
        ));
    };
    let view = VnetView::parse(&vnet.spec.body)?;
    let Some(subnet) = view.subnets.iter().find(|s| s.prefix.contains(&IpAddr::V4(address))) else {
        let message = format!("The address {address} is in no subnet of the virtual network.");
        return Err(Fault::bad_request("PrivateIPAddressNotInAnySubnet", message));
    };
    let ipnet::IpNet::V4(prefix) = subnet.prefix else {
        return Err(Fault::internal("the request"));
    };
    let held = held(&format!("{}/subnets/{}", vnet.spec.id, subnet.name), world);
    let free = |a: &Ipv4Addr| !vnet_model::rules::is_reserved(prefix, *a) && !held.contains(&IpAddr::V4(*a));
    let reserved = vnet_model::rules::is_reserved(prefix, address);
    let available = free(&address);
    let others: Vec<Ipv4Addr> = if available {
        vec![]
    } else {
        prefix.hosts().filter(free).take(SUGGESTIONS).collect()
    };
    Ok(json!({"available": available, "isPlatformReserved": reserved, "availableIPAddresses": others}))
}

fn usages(_: &Request, vnet: &ArmObject, world: &World) -> Answer<Value> {
    let view = VnetView::parse(&vnet.spec.body)?;
    let row = |s: &resources::views::SubnetView| {
        let id = format!("{}/subnets/{}", vnet.spec.id, s.name);
        json!({"id": id, "currentValue": held(&id, world).len(), "limit": usable(&s.prefix), "unit": "Count",
            "name": {"value": "SubnetSpace", "localizedValue": "Subnet size and usage"}})
    };
    Ok(json!({"value": view.subnets.iter().map(row).collect::<Vec<Value>>()}))
}

/// The subnet and network of an interface's primary configuration.
fn place(nic: &ArmObject, world: &World) -> Answer<(NicView, VnetView, resources::views::SubnetView, String)> {
    let view = NicView::parse(&nic.spec.body)?;
    let primary = view.ip_configs.iter().find(|c| c.primary).or(view.ip_configs.first());
    let subnet = primary.map(|c| c.subnet.clone()).unwrap_or_default();
    let (vnet, subnet, id) = world.subnet(&subnet, "properties.ipConfigurations")?;
    Ok((view, vnet, subnet, id))
}

fn effective_routes(_: &Request, nic: &ArmObject, world: &World) -> Answer<Value> {
    let (_, vnet, subnet, vnet_id) = place(nic, world)?;
    let route = |source: &str, name: Option<&str>, prefix: String, hop: &str, address: Option<Ipv4Addr>| {
        json!({"name": name, "source": source, "state": "Active", "addressPrefix": [prefix], "nextHopType": hop,
            "nextHopIpAddress": address.into_iter().collect::<Vec<_>>(), "disableBgpRoutePropagation": false})
    };
    let mut out: Vec<Value> = vnet
        .prefixes
        .iter()
        .map(|p| route("Default", None, p.to_string(), "VnetLocal", None))
        .collect();
    for half in world
        .vnet(&vnet_id)
        .map(|v| peerings(&v.spec.body))
        .transpose()?
        .into_iter()
        .flatten()
    {
        let remote = world
            .vnet(&half.remote)
            .filter(|r| crate::validate::peering::names(r, &vnet_id));
        let Some(remote) = remote else { continue };
        let prefixes = VnetView::parse(&remote.spec.body)?.prefixes;
        out.extend(
            prefixes
                .iter()
                .map(|p| route("Default", None, p.to_string(), "VNetPeering", None)),
        );
    }
    for endpoint in super::validate::endpoints::prefixes(&subnet, &world.service_tags) {
        out.push(route(
            "Default",
            None,
            endpoint.to_string(),
            "VirtualNetworkServiceEndpoint",
            None,
        ));
    }
    out.push(route("Default", None, "0.0.0.0/0".into(), "Internet", None));
    let table = subnet.route_table.as_ref();
    let table = table.and_then(|id| world.route_tables.iter().find(|t| same_id(&t.spec.id, id)));
    let routes = table
        .and_then(|t| t.spec.body["properties"]["routes"].as_array())
        .into_iter()
        .flatten();
    for user in routes {
        let p = &user["properties"];
        let prefix = p["addressPrefix"].as_str().unwrap_or_default();
        // At equal length the table wins over the system.
        for system in out
            .iter_mut()
            .filter(|r| r["source"] == "Default" && r["addressPrefix"][0] == prefix)
        {
            system["state"] = json!("Invalid");
        }
        let address = p["nextHopIpAddress"].as_str().and_then(|a| a.parse().ok());
        out.push(route(
            "User",
            user["name"].as_str(),
            prefix.to_owned(),
            p["nextHopType"].as_str().unwrap_or_default(),
            address,
        ));
    }
    Ok(json!({"value": out}))
}

fn effective_groups(_: &Request, nic: &ArmObject, world: &World) -> Answer<Value> {
    let (view, _, subnet, vnet_id) = place(nic, world)?;
    let subnet_id = format!("{vnet_id}/subnets/{}", subnet.name);
    let named = [
        (subnet.network_security_group, json!({"subnet": {"id": subnet_id}})),
        (
            view.network_security_group,
            json!({"networkInterface": {"id": nic.spec.id}}),
        ),
    ];
    let mut out = Vec::new();
    for (group, association) in named {
        let Some(group) = group else { continue };
        let object = world.security_groups.iter().find(|g| same_id(&g.spec.id, &group));
        let own = object.and_then(|o| o.spec.body["properties"]["securityRules"].as_array());
        let mut rules: Vec<Value> = own
            .into_iter()
            .flatten()
            .map(|r| effective_rule(r, "securityRules", world))
            .collect();
        let defaults = vnet_model::nsg::default_rules();
        rules.extend(defaults.iter().map(|r| {
            effective_rule(
                &vnet_model::arm::show_default_rule(r, &group),
                "defaultSecurityRules",
                world,
            )
        }));
        out.push(
            json!({"networkSecurityGroup": {"id": group}, "association": association, "effectiveSecurityRules": rules}),
        );
    }
    Ok(json!({"value": out}))
}

/// A rule with what its names stand for: members of application security groups, prefixes of service tags.
fn effective_rule(rule: &Value, of: &str, world: &World) -> Value {
    let p = &rule["properties"];
    let list = |one: &str, many: &str| -> Vec<String> {
        let single = p[one].as_str().filter(|t| !t.is_empty()).map(str::to_owned);
        let listed = p[many]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|v| v.as_str().map(str::to_owned));
        single.into_iter().chain(listed).collect()
    };
    let side = |one: &str, many: &str, groups: &str| {
        let texts = list(one, many);
        let tags = texts
            .iter()
            .filter_map(|t| world.service_tags.get(t))
            .flatten()
            .map(ToString::to_string);
        let ids: Vec<&str> = p[groups]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|g| g["id"].as_str())
            .collect();
        let members = ids
            .iter()
            .flat_map(|id| crate::validate::application_groups::addresses(id, world));
        let expanded: Vec<String> = tags.chain(members.map(|a| format!("{a}/32"))).collect();
        (texts, expanded)
    };
    let source = side(
        "sourceAddressPrefix",
        "sourceAddressPrefixes",
        "sourceApplicationSecurityGroups",
    );
    let destination = side(
        "destinationAddressPrefix",
        "destinationAddressPrefixes",
        "destinationApplicationSecurityGroups",
    );
    json!({
        "name": format!("{of}/{}", rule["name"].as_str().unwrap_or_default()),
        "protocol": match p["protocol"].as_str() { Some("*") | None => "All", Some(other) => other },
        "sourcePortRanges": list("sourcePortRange", "sourcePortRanges"),
        "destinationPortRanges": list("destinationPortRange", "destinationPortRanges"),
        "sourceAddressPrefixes": source.0,
        "expandedSourceAddressPrefix": source.1,
        "destinationAddressPrefixes": destination.0,
        "expandedDestinationAddressPrefix": destination.1,
        "access": p["access"],
        "priority": p["priority"],
        "direction": p["direction"],
    })
}

#[cfg(test)]
mod tests {
    use resources::{ArmSpec, ArmStatus};

    use super::*;

    const BASE: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network";

    fn object(plural: &str, path: &str, properties: Value) -> ArmObject {
        let id = format!("{BASE}/{path}");
        ArmObject::new(
            plural,
            ArmSpec {
                id,
                body: json!({"location": "x", "properties": properties}),
            },
        )
    }

    fn world() -> World {
        let id = |path: &str| json!({"id": format!("{BASE}/{path}")});
        let mut nic = object(
            "networkinterfaces",
            "networkInterfaces/n",
            json!({"networkSecurityGroup": id("networkSecurityGroups/g"),
            "ipConfigurations": [{"name": "a", "properties": {"subnet": id("virtualNetworks/v/subnets/a"),
                "applicationSecurityGroups": [id("applicationSecurityGroups/web")]}}]}),
        );
        nic.status = Some(ArmStatus {
            properties: json!({"macAddress": "00-0D-3A-00-00-01", "ipConfigurations": [{"name": "a", "properties":
                {"privateIPAddress": "10.0.0.4", "primary": true, "subnet": id("virtualNetworks/v/subnets/a")}}]}),
            ..ArmStatus::default()
        });
        let rule = json!({"name": "r", "properties": {"priority": 100, "direction": "Inbound", "access": "Allow", "protocol": "Tcp",
            "sourceAddressPrefix": "Storage", "sourcePortRange": "*", "destinationPortRange": "80",
            "destinationApplicationSecurityGroups": [id("applicationSecurityGroups/web")]}});
        World {
            vnets: vec![object(
                "virtualnetworks",
                "virtualNetworks/v",
                json!({"addressSpace": {"addressPrefixes": ["10.0.0.0/16"]},
                "subnets": [{"name": "a", "properties": {"addressPrefix": "10.0.0.0/29", "routeTable": id("routeTables/t"),
                    "serviceEndpoints": [{"service": "Microsoft.Storage"}]}}]}),
            )],
            nics: vec![nic],
            security_groups: vec![object(
                "networksecuritygroups",
                "networkSecurityGroups/g",
                json!({"securityRules": [rule]}),
            )],
            route_tables: vec![object(
                "routetables",
                "routeTables/t",
                json!({"routes": [{"name": "all", "properties":
                {"addressPrefix": "0.0.0.0/0", "nextHopType": "None"}}]}),
            )],
            service_tags: vnet_model::service_tags::ServiceTags::parse(["Storage=10.9.0.0/24"]).unwrap(),
            ..World::default()
        }
    }

    fn request(address: &str) -> Request {
        Request {
            method: Method::GET,
            path: String::new(),
            query: [("ipaddress".to_owned(), address.to_owned())].into_iter().collect(),
            if_match: None,
            if_none_match: None,
            authorization: None,
            body: Default::default(),
        }
    }

    #[test]
    fn free_addresses_are_told() {
        let w = world();
        let ask = |a: &str| check_address(&request(a), &w.vnets[0], &w);
        assert_eq!(ask("10.0.0.5").unwrap()["available"], true);
        let taken = ask("10.0.0.4").unwrap();
        assert_eq!(taken["availableIPAddresses"], json!(["10.0.0.5", "10.0.0.6"]));
        let reserved = ask("10.0.0.3").unwrap();
        assert!(reserved["available"] == false && reserved["isPlatformReserved"] == true);
        assert_eq!(ask("10.0.9.4").unwrap_err().code, "PrivateIPAddressNotInAnySubnet");
        assert_eq!(ask("x").unwrap_err().code, "InvalidParameter");
        let used = usages(&request(""), &w.vnets[0], &w).unwrap();
        assert_eq!(
            (&used["value"][0]["currentValue"], &used["value"][0]["limit"]),
            (&json!(1), &json!(3))
        );
    }

    #[test]
    fn effective_routes_and_rules_are_those_of_the_plan() {
        let w = world();
        let routes = effective_routes(&request(""), &w.nics[0], &w).unwrap();
        let said: Vec<String> = routes["value"]
            .as_array()
            .unwrap()
            .iter()
            .map(|r| {
                format!(
                    "{} {} {}",
                    r["addressPrefix"][0].as_str().unwrap(),
                    r["nextHopType"].as_str().unwrap(),
                    r["state"].as_str().unwrap()
                )
            })
            .collect();
        assert_eq!(
            said,
            [
                "10.0.0.0/16 VnetLocal Active",
                "10.9.0.0/24 VirtualNetworkServiceEndpoint Active",
                "0.0.0.0/0 Internet Invalid",
                "0.0.0.0/0 None Active"
            ]
        );
        let groups = effective_groups(&request(""), &w.nics[0], &w).unwrap();
        let rules = groups["value"][0]["effectiveSecurityRules"].as_array().unwrap();
        assert_eq!(rules.len(), 7);
        assert_eq!(rules[0]["expandedSourceAddressPrefix"], json!(["10.9.0.0/24"]));
        assert_eq!(rules[0]["expandedDestinationAddressPrefix"], json!(["10.0.0.4/32"]));
    }
}

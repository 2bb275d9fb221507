//! Public addresses, prefixes of them, NAT gateways, and who uses which.

use resources::{ArmId, views::subnet_ref};
use serde_json::Value;

use super::World;
use crate::{
    error::{Answer, Fault},
    home::{ArmObject, same_id},
};

/// Minutes that a flow by an instance's address, and by a NAT gateway, may be idle.
const ADDRESS_IDLE: std::ops::RangeInclusive<u64> = 4..=30;
const GATEWAY_IDLE: std::ops::RangeInclusive<u64> = 4..=120;
/// Lengths of a prefix of public addresses.
const PREFIX_LENGTHS: std::ops::RangeInclusive<u64> = 28..=31;
/// Below a location: names of public addresses.
const NAME_SUFFIX: &str = "cloudapp.oaks.internal";

fn list(v: &Value) -> &[Value] {
    v.as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(v: &'a Value, field: &str) -> &'a str {
    v[field].as_str().unwrap_or_default()
}

pub(crate) fn is_standard(body: &Value) -> bool {
    text(&body["sku"], "name").eq_ignore_ascii_case("standard")
}

/// True if the address is held from its creation on.
pub(crate) fn is_static(body: &Value) -> bool {
    text(&body["properties"], "publicIPAllocationMethod").eq_ignore_ascii_case("static")
}

fn idle(body: &Value, range: std::ops::RangeInclusive<u64>) -> Answer<()> {
    let minutes = &body["properties"]["idleTimeoutInMinutes"];
    if minutes.is_null() || minutes.as_u64().is_some_and(|m| range.contains(&m)) {
        return Ok(());
    }
    let problem = format!(
        "{minutes} is not a number of minutes from {} to {}",
        range.start(),
        range.end()
    );
    Err(Fault::field(
        "InvalidIdleTimeout",
        "properties.idleTimeoutInMinutes",
        problem,
    ))
}

fn only_v4(body: &Value) -> Answer<()> {
    let path = "properties.publicIPAddressVersion";
    match text(&body["properties"], "publicIPAddressVersion").eq_ignore_ascii_case("IPv6") {
        true => Err(Fault::field(
            "UnsupportedProperty",
            path,
            "IPv6 is not served; use IPv4",
        )),
        false => Ok(()),
    }
}

/// The name of a public address by its label: `<label>.<location>.<suffix>`.
pub(crate) fn fqdn(body: &Value) -> Option<String> {
    let label = text(&body["properties"]["dnsSettings"], "domainNameLabel");
    let location = text(body, "location").to_lowercase().replace(' ', "");
    (!label.is_empty()).then(|| format!("{}.{location}.{NAME_SUFFIX}", label.to_lowercase()))
}

/// A public address: one IPv4 address from the pool or a prefix of it.
pub fn address(id: &ArmId, body: &Value, old: Option<&ArmObject>, world: &World) -> Answer<()> {
    only_v4(body)?;
    idle(body, ADDRESS_IDLE)?;
    let p = &body["properties"];
    let method = text(p, "publicIPAllocationMethod").to_lowercase();
    if !matches!(method.as_str(), "" | "static" | "dynamic") {
        let problem = format!("{method:?} is not Static or Dynamic");
        return Err(Fault::field(
            "InvalidRequestContent",
            "properties.publicIPAllocationMethod",
            problem,
        ));
    }
    if is_standard(body) && method != "static" {
        let problem = "a public address of sku Standard must be Static";
        return Err(Fault::field(
            "InvalidRequestContent",
            "properties.publicIPAllocationMethod",
            problem,
        ));
    }
    if !p["ddosSettings"]["ddosProtectionPlan"].is_null() {
        let path = "properties.ddosSettings.ddosProtectionPlan";
        return Err(Fault::field(
            "UnsupportedProperty",
            path,
            "protection plans are not served; leave it out",
        ));
    }
    label(id, body, world)?;
    let prefix = text(&p["publicIPPrefix"], "id");
    if !prefix.is_empty() {
        let found = world
            .public_ip_prefixes
            .iter()
            .find(|o| same_id(&o.spec.id, prefix) && !o.is_deleting());
        if found.is_none() {
            let problem = format!("the public IP prefix '{prefix}' does not exist");
            return Err(Fault::field(
                "InvalidResourceReference",
                "properties.publicIPPrefix.id",
                problem,
            ));
        }
        if !is_standard(body) {
            return Err(Fault::field(
                "InvalidRequestContent",
                "sku.name",
                "an address of a prefix must be of sku Standard",
            ));
        }
    }
    let Some(old) = old else { return Ok(()) };
    let was = text(&old.spec.body["properties"]["publicIPPrefix"], "id");
    if !same_id(was, prefix) {
        let problem = "the prefix of an address that exists cannot be changed; make another address";
        return Err(Fault::field(
            "PropertyChangeNotAllowed",
            "properties.publicIPPrefix.id",
            problem,
        ));
    }
    if is_standard(&old.spec.body) && !is_standard(body) {
        let problem = "the sku of an address that exists cannot be lowered";
        return Err(Fault::field("PropertyChangeNotAllowed", "sku.name", problem));
    }
    Ok(())
}

/// A label is a DNS label, and no other address of the location has it.
fn label(id: &ArmId, body: &Value, world: &World) -> Answer<()> {
    let path = "properties.dnsSettings.domainNameLabel";
    let settings = &body["properties"]["dnsSettings"];
    for field in ["reverseFqdn", "domainNameLabelScope"] {
        if !settings[field].is_null() {
            let path = format!("properties.dnsSettings.{field}");
            return Err(Fault::field("UnsupportedProperty", path, "is not served; leave it out"));
        }
    }
    let Some(name) = fqdn(body) else { return Ok(()) };
    let label = text(settings, "domainNameLabel");
    let first = label.starts_with(|c: char| c.is_ascii_lowercase());
    let last = label.ends_with(|c: char| c.is_ascii_alphanumeric());
    let middle = label
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if !(first && last && middle && (3..=63).contains(&label.len())) {
        let problem = format!("{label:?} must be 3 to 63 of a-z, 0-9 and -, start with a letter and not end with -");
        return Err(Fault::field("InvalidDomainNameLabel", path, problem));
    }
    let own = id.to_string();
    let taken = world.public_ips.iter().find(|o| {
        !same_id(&o.spec.id, &own) && !o.is_deleting() && fqdn(&o.spec.body).is_some_and(|other| other == name)
    });
    match taken {
        None => Ok(()),
        Some(_) => Err(Fault::field(
            "DnsRecordInUse",
            path,
            format!("DNS record {name} is already used by another public IP"),
        )),
    }
}

/// A block of the pool.
pub fn prefix(body: &Value, old: Option<&ArmObject>) -> Answer<()> {
    only_v4(body)?;
    let length = |body: &Value| body["properties"]["prefixLength"].as_u64();
    let path = "properties.prefixLength";
    if !is_standard(body) {
        return Err(Fault::field(
            "InvalidRequestContent",
            "sku.name",
            "a public IP prefix must be of sku Standard",
        ));
    }
    match length(body) {
        Some(n) if PREFIX_LENGTHS.contains(&n) => {}
        other => {
            let problem = format!(
                "{other:?} is not a length from {} to {}",
                PREFIX_LENGTHS.start(),
                PREFIX_LENGTHS.end()
            );
            return Err(Fault::field("InvalidPublicIPPrefixLength", path, problem));
        }
    }
    if old.is_some_and(|o| length(&o.spec.body) != length(body)) {
        let problem = "the length of a prefix that exists cannot be changed";
        return Err(Fault::field("PropertyChangeNotAllowed", path, problem));
    }
    for field in ["customIPPrefix"] {
        if !body["properties"][field].is_null() {
            let path = format!("properties.{field}");
            return Err(Fault::field("UnsupportedProperty", path, "is not served; leave it out"));
        }
    }
    Ok(())
}

/// A NAT gateway: its addresses exist, are Standard, and nobody else's.
pub fn gateway(id: &ArmId, body: &Value, world: &World) -> Answer<()> {
    idle(body, GATEWAY_IDLE)?;
    let sku = text(&body["sku"], "name");
    if !sku.eq_ignore_ascii_case("standard") {
        return Err(Fault::field(
            "InvalidRequestContent",
            "sku.name",
            format!("{sku:?} is not served; use Standard"),
        ));
    }
    let p = &body["properties"];
    for (n, reference) in list(&p["publicIpAddresses"]).iter().enumerate() {
        let path = format!("properties.publicIpAddresses[{n}].id");
        let address = assignable(text(reference, "id"), &path, &id.to_string(), world)?;
        if !is_standard(&address.spec.body) {
            return Err(Fault::field(
                "InvalidRequestContent",
                path,
                "a NAT gateway's public addresses must be of sku Standard",
            ));
        }
    }
    for (n, reference) in list(&p["publicIpPrefixes"]).iter().enumerate() {
        let path = format!("properties.publicIpPrefixes[{n}].id");
        let wanted = text(reference, "id");
        if !world
            .public_ip_prefixes
            .iter()
            .any(|o| same_id(&o.spec.id, wanted) && !o.is_deleting())
        {
            let problem = format!("the public IP prefix '{wanted}' does not exist");
            return Err(Fault::field("InvalidResourceReference", path, problem));
        }
        let own = id.to_string();
        let other = world
            .nat_gateways
            .iter()
            .find(|g| !same_id(&g.spec.id, &own) && names_prefix(g, wanted));
        if let Some(other) = other {
            let problem = format!("the prefix is already allocated to resource {}", other.spec.id);
            return Err(Fault::field("PublicIPPrefixInUse", path, problem));
        }
    }
    Ok(())
}

fn names_prefix(gateway: &ArmObject, prefix: &str) -> bool {
    let all = list(&gateway.spec.body["properties"]["publicIpPrefixes"]);
    all.iter().any(|r| same_id(text(r, "id"), prefix))
}

/// The public address that `reference` names, if resource `own` may use it.
pub fn assignable<'a>(reference: &str, path: &str, own: &str, world: &'a World) -> Answer<&'a ArmObject> {
    let found = world
        .public_ips
        .iter()
        .find(|o| same_id(&o.spec.id, reference) && !o.is_deleting());
    let Some(found) = found else {
        let problem = format!("the public IP address '{reference}' does not exist");
        return Err(Fault::field("InvalidResourceReference", path, problem));
    };
    let users = address_users(reference, &world.nics, &world.load_balancers, &world.nat_gateways);
    let other = users
        .into_iter()
        .find(|u| !same_id(u, own) && !crate::home::is_within(u, own));
    let platform = (found.spec.body["oaks"]["endpoint"] == true).then(|| "an API server".to_owned());
    match other.or(platform) {
        None => Ok(found),
        Some(user) => {
            let problem = format!(
                "Resource {own} is referencing public IP address {reference} that is already allocated to resource {user}"
            );
            Err(Fault::field("PublicIPAddressInUse", path, problem))
        }
    }
}

/// ARM ids of what names a public address: configurations of interfaces, frontends, NAT gateways.
pub fn address_users(
    address: &str,
    nics: &[ArmObject],
    balancers: &[ArmObject],
    gateways: &[ArmObject],
) -> Vec<String> {
    let mut out = Vec::new();
    for (objects, parts) in [(nics, "ipConfigurations"), (balancers, "frontendIPConfigurations")] {
        for object in objects {
            for part in list(&object.spec.body["properties"][parts]) {
                if same_id(text(&part["properties"]["publicIPAddress"], "id"), address) {
                    out.push(format!("{}/{parts}/{}", object.spec.id, text(part, "name")));
                }
            }
        }
    }
    for gateway in gateways {
        let own = list(&gateway.spec.body["properties"]["publicIpAddresses"]);
        if own.iter().any(|r| same_id(text(r, "id"), address)) {
            out.push(gateway.spec.id.clone());
        }
    }
    out
}

/// ARM ids of the subnets that name the gateway.
pub fn gateway_users(gateway: &str, vnets: &[ArmObject]) -> Vec<String> {
    let mut out = Vec::new();
    for vnet in vnets {
        for subnet in list(&vnet.spec.body["properties"]["subnets"]) {
            if same_id(text(&subnet["properties"]["natGateway"], "id"), gateway) {
                out.push(format!("{}/subnets/{}", vnet.spec.id, text(subnet, "name")));
            }
        }
    }
    out
}

/// NAT gateways that a virtual network's subnets name: they exist, and serve no other network.
pub fn subnets(id: &ArmId, body: &Value, world: &World) -> Answer<()> {
    for (n, subnet) in list(&body["properties"]["subnets"]).iter().enumerate() {
        let wanted = text(&subnet["properties"]["natGateway"], "id");
        if wanted.is_empty() {
            continue;
        }
        let path = format!("properties.subnets[{n}].properties.natGateway.id");
        if !world
            .nat_gateways
            .iter()
            .any(|g| same_id(&g.spec.id, wanted) && !g.is_deleting())
        {
            let problem = format!("the NAT gateway '{wanted}' does not exist");
            return Err(Fault::field("InvalidResourceReference", path, problem));
        }
        let own = id.to_string();
        let elsewhere = gateway_users(wanted, &world.vnets);
        if let Some(user) = elsewhere.iter().find(|u| !crate::home::is_within(u, &own)) {
            let problem = format!("the NAT gateway serves another virtual network already, by {user}");
            return Err(Fault::field(
                "NatGatewayCannotBeUsedBySubnetsBelongingToDifferentVirtualNetworks",
                path,
                problem,
            ));
        }
    }
    Ok(())
}

/// Public addresses, pools and NAT rules that an interface's configurations name.
pub fn interface(id: &ArmId, body: &Value, world: &World) -> Answer<()> {
    let own = id.to_string();
    let mut seen: Vec<&str> = Vec::new();
    for (n, config) in list(&body["properties"]["ipConfigurations"]).iter().enumerate() {
        let at = format!("properties.ipConfigurations[{n}].properties");
        let p = &config["properties"];
        let public = text(&p["publicIPAddress"], "id");
        if !public.is_empty() {
            let path = format!("{at}.publicIPAddress.id");
            assignable(public, &path, &own, world)?;
            if seen.iter().any(|s| same_id(s, public)) {
                let problem = format!("two configurations name public IP address {public}");
                return Err(Fault::field("PublicIPAddressInUse", path, problem));
            }
            seen.push(public);
        }
        let network = subnet_ref(text(&p["subnet"], "id")).map(|s| s.0);
        for (field, parts) in [
            ("loadBalancerBackendAddressPools", "backendAddressPools"),
            ("loadBalancerInboundNatRules", "inboundNatRules"),
        ] {
            for (m, reference) in list(&p[field]).iter().enumerate() {
                let path = format!("{at}.{field}[{m}].id");
                super::balancer::member(text(reference, "id"), parts, &path, &own, network.as_deref(), world)?;
            }
        }
        super::balancer::free_of_frontends(p, &at, world)?;
    }
    Ok(())
}

/// Refuses to delete an address that is in use.
pub fn delete_address(object: &ArmObject, world: &World) -> Answer<()> {
    let id = &object.spec.id;
    let users = address_users(id, &world.nics, &world.load_balancers, &world.nat_gateways);
    match users.first() {
        None => Ok(()),
        Some(user) => Err(Fault::bad_request(
            "PublicIPAddressCannotBeDeleted",
            format!(
                "Public IP address {id} can not be deleted since it is still allocated to resource {user}. Take it off there first."
            ),
        )),
    }
}

/// Refuses to delete a prefix whose addresses are held.
pub fn delete_prefix(object: &ArmObject, world: &World) -> Answer<()> {
    let id = &object.spec.id;
    let held = |o: &&ArmObject| same_id(text(&o.spec.body["properties"]["publicIPPrefix"], "id"), id);
    let by_gateway = world.nat_gateways.iter().find(|g| names_prefix(g, id));
    match world.public_ips.iter().find(held).or(by_gateway) {
        None => Ok(()),
        Some(user) => Err(Fault::bad_request(
            "InUsePublicIpPrefixCannotBeDeleted",
            format!(
                "Public IP prefix {id} cannot be deleted because it is in use by {}. Delete that first.",
                user.spec.id
            ),
        )),
    }
}

/// Refuses to delete a gateway that a subnet names.
pub fn delete_gateway(object: &ArmObject, world: &World) -> Answer<()> {
    let id = &object.spec.id;
    match gateway_users(id, &world.vnets).first() {
        None => Ok(()),
        Some(user) => Err(Fault::bad_request(
            "InUseNatGatewayCannotBeDeleted",
            format!("NAT gateway {id} cannot be deleted because it is in use by {user}. Take it off there first."),
        )),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use resources::ArmSpec;
    use serde_json::json;

    use super::*;
    use crate::validate::balancer::{balancer, delete_balancer};

    const NETWORK: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network";

    pub(crate) fn id(kind: &str, name: &str) -> String {
        format!("{NETWORK}/{kind}/{name}")
    }

    pub(crate) fn object(kind: &str, name: &str, body: Value) -> ArmObject {
        let id = id(kind, name);
        ArmObject::new(&kind.to_lowercase(), ArmSpec { id, body })
    }

    pub(crate) fn pip(name: &str, sku: &str) -> ArmObject {
        let body = json!({"location": "x", "sku": {"name": sku}, "properties": {"publicIPAllocationMethod": "Static"}});
        object("publicIPAddresses", name, body)
    }

    pub(crate) fn vnet(name: &str, prefix: &str, gateway: Option<&str>) -> ArmObject {
        let mut subnet = json!({"name": "a", "properties": {"addressPrefix": prefix}});
        if let Some(gateway) = gateway {
            subnet["properties"]["natGateway"] = json!({"id": gateway});
        }
        let body = json!({"properties": {"addressSpace": {"addressPrefixes": [prefix]}, "subnets": [subnet]}});
        object("virtualNetworks", name, body)
    }

    /// A NIC in subnet `a` of a network, whose one configuration has these fields too.
    pub(crate) fn nic(name: &str, vnet: &str, more: Value) -> ArmObject {
        let mut config = json!({"subnet": {"id": id("virtualNetworks", &format!("{vnet}/subnets/a"))}});
        config
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let body = json!({"properties": {"ipConfigurations": [{"name": "c", "properties": config}]}});
        object("networkInterfaces", name, body)
    }

    fn reference(kind: &str, name: &str) -> Value {
        json!({"id": id(kind, name).to_uppercase()})
    }

    fn lb(frontend: Value) -> Value {
        json!({"sku": {"name": "Standard"}, "properties": {
            "frontendIPConfigurations": [{"name": "fe", "properties": frontend}],
            "backendAddressPools": [{"name": "be"}],
            "inboundNatRules": [{"name": "ssh", "properties": {"protocol": "Tcp", "frontendPort": 5000, "backendPort": 22,
                "frontendIPConfiguration": reference("loadBalancers", "lb/frontendIPConfigurations/fe")}}]}})
    }

    fn parsed(kind: &str, name: &str) -> ArmId {
        ArmId::parse(&id(kind, name)).unwrap()
    }

    #[test]
    fn a_public_address_has_one_user_and_stays_while_it_has() {
        let mut world = World {
            public_ips: vec![pip("p", "Standard"), pip("basic", "Basic")],
            vnets: vec![vnet("v", "10.0.0.0/24", None)],
            ..World::default()
        };
        let public = |name: &str| lb(json!({"publicIPAddress": reference("publicIPAddresses", name)}));
        let check = |world: &World, body: &Value| {
            balancer(&parsed("loadBalancers", "lb"), body, None, world)
                .err()
                .map(|f| f.code)
        };
        assert_eq!(check(&world, &public("p")), None);
        assert_eq!(
            check(&world, &public("gone")).as_deref(),
            Some("InvalidResourceReference")
        );
        assert_eq!(
            check(&world, &public("basic")).as_deref(),
            Some("PublicIPAndLBSkuDoNotMatch")
        );
        delete_address(&world.public_ips[0], &world).unwrap();
        let named = json!({"publicIPAddress": reference("publicIPAddresses", "p")});
        let user = nic("n", "v", named);
        interface(&parsed("networkInterfaces", "n"), &user.spec.body, &world).unwrap();
        world.nics.push(user.clone());
        interface(&parsed("networkInterfaces", "n"), &user.spec.body, &world).unwrap();
        assert_eq!(check(&world, &public("p")).as_deref(), Some("PublicIPAddressInUse"));
        let refused = delete_address(&world.public_ips[0], &world).unwrap_err();
        assert_eq!(refused.code, "PublicIPAddressCannotBeDeleted");
        assert!(
            refused.message.contains("networkInterfaces/n/ipConfigurations/c"),
            "{refused}"
        );
        let body = json!({"sku": {"name": "Standard"}, "properties": {"publicIpAddresses": [reference("publicIPAddresses", "p")]}});
        let refused = gateway(&parsed("natGateways", "g"), &body, &world).unwrap_err();
        assert_eq!(refused.code, "PublicIPAddressInUse");
    }

    #[test]
    fn each_mistake_of_an_address_has_its_code() {
        let own = parsed("publicIPAddresses", "p");
        let mut taken = pip("other", "Standard");
        taken.spec.body["properties"]["dnsSettings"] = json!({"domainNameLabel": "web"});
        let world = World {
            public_ips: vec![taken],
            ..World::default()
        };
        for (at, value, code) in [
            (
                "/properties/publicIPAllocationMethod",
                json!("Dynamic"),
                "InvalidRequestContent",
            ),
            (
                "/properties/publicIPAllocationMethod",
                json!("Sometimes"),
                "InvalidRequestContent",
            ),
            (
                "/properties/publicIPAddressVersion",
                json!("IPv6"),
                "UnsupportedProperty",
            ),
            ("/properties/idleTimeoutInMinutes", json!(31), "InvalidIdleTimeout"),
            (
                "/properties/dnsSettings",
                json!({"domainNameLabel": "Web"}),
                "InvalidDomainNameLabel",
            ),
            (
                "/properties/dnsSettings",
                json!({"domainNameLabel": "web"}),
                "DnsRecordInUse",
            ),
            (
                "/properties/dnsSettings",
                json!({"reverseFqdn": "x.test"}),
                "UnsupportedProperty",
            ),
            (
                "/properties/publicIPPrefix",
                reference("publicIPPrefixes", "gone"),
                "InvalidResourceReference",
            ),
        ] {
            let mut body = pip("p", "Standard").spec.body;
            let (parent, field) = at.rsplit_once('/').unwrap();
            body.pointer_mut(parent).unwrap()[field] = value;
            let refused = address(&own, &body, None, &world).unwrap_err();
            assert_eq!(refused.code, code, "{at}: {refused}");
        }
        let mut body = pip("p", "Standard").spec.body;
        body["properties"]["dnsSettings"] = json!({"domainNameLabel": "web-2"});
        address(&own, &body, None, &world).unwrap();
        assert_eq!(fqdn(&body).as_deref(), Some("web-2.x.cloudapp.oaks.internal"));
        let sized = |n: u64| json!({"sku": {"name": "Standard"}, "properties": {"prefixLength": n}});
        prefix(&sized(30), None).unwrap();
        assert_eq!(
            prefix(&sized(24), None).unwrap_err().code,
            "InvalidPublicIPPrefixLength"
        );
        let old = object("publicIPPrefixes", "p", sized(30));
        assert_eq!(
            prefix(&sized(31), Some(&old)).unwrap_err().code,
            "PropertyChangeNotAllowed"
        );
    }

    #[test]
    fn a_gateway_serves_one_network_and_stays_while_it_does() {
        let gateway = id("natGateways", "g");
        let mut world = World::default();
        let first = vnet("v", "10.0.0.0/24", Some(&gateway));
        let check = |world: &World, vnet: &ArmObject| {
            let id = ArmId::parse(&vnet.spec.id).unwrap();
            subnets(&id, &vnet.spec.body, world).err().map(|f| f.code)
        };
        assert_eq!(check(&world, &first).as_deref(), Some("InvalidResourceReference"));
        world.nat_gateways.push(object("natGateways", "g", json!({})));
        assert_eq!(check(&world, &first), None);
        delete_gateway(&world.nat_gateways[0], &world).unwrap();
        world.vnets.push(first.clone());
        assert_eq!(check(&world, &first), None);
        let second = vnet("w", "10.1.0.0/24", Some(&gateway));
        let code = "NatGatewayCannotBeUsedBySubnetsBelongingToDifferentVirtualNetworks";
        assert_eq!(check(&world, &second).as_deref(), Some(code));
        let refused = delete_gateway(&world.nat_gateways[0], &world).unwrap_err();
        assert_eq!(refused.code, "InUseNatGatewayCannotBeDeleted");
    }

    #[test]
    fn pools_and_nat_rules_in_use_stay_and_members_share_a_network() {
        let own = parsed("loadBalancers", "lb");
        let pool = |name: &str| json!({"loadBalancerBackendAddressPools": [reference("loadBalancers", &format!("lb/backendAddressPools/{name}"))]});
        let nat = json!({"loadBalancerInboundNatRules": [reference("loadBalancers", "lb/inboundNatRules/ssh")]});
        let subnet = id("virtualNetworks", "v/subnets/a");
        let body = lb(json!({"subnet": {"id": subnet}}));
        let mut world = World {
            vnets: vec![vnet("v", "10.0.0.0/24", None), vnet("w", "10.1.0.0/24", None)],
            load_balancers: vec![object("loadBalancers", "lb", body.clone())],
            ..World::default()
        };
        let join = |world: &World, name: &str, vnet: &str, more: &Value| {
            interface(
                &parsed("networkInterfaces", name),
                &nic(name, vnet, more.clone()).spec.body,
                world,
            )
            .err()
            .map(|f| f.code)
        };
        assert_eq!(join(&world, "n", "v", &pool("be")), None);
        assert_eq!(
            join(&world, "n", "v", &pool("gone")).as_deref(),
            Some("InvalidResourceReference")
        );
        assert_eq!(
            join(&world, "n", "w", &pool("be")).as_deref(),
            Some("BackendPoolMembersInDifferentVirtualNetworks")
        );
        world.nics.push(nic("n", "v", nat.clone()));
        assert_eq!(join(&world, "n", "v", &nat), None);
        assert_eq!(join(&world, "m", "v", &nat).as_deref(), Some("InboundNatRuleInUse"));
        let mut less = body.clone();
        less["properties"]["inboundNatRules"] = json!([]);
        let refused = balancer(&own, &less, None, &world).unwrap_err();
        assert_eq!(refused.code, "InUseLoadBalancerPartCannotBeDeleted");
        let refused = delete_balancer(&world.load_balancers[0], &world).unwrap_err();
        assert_eq!(refused.code, "InUseLoadBalancerCannotBeDeleted");
        // An internal frontend is a user of its subnet, and its fixed address is taken for others.
        assert_eq!(world.users_of(&subnet).len(), 2);
        let fixed =
            |a: &str| json!({"subnet": {"id": subnet}, "privateIPAllocationMethod": "Static", "privateIPAddress": a});
        let code = |frontend: Value| balancer(&own, &lb(frontend), None, &world).err().map(|f| f.code);
        assert_eq!(code(fixed("10.0.0.9")), None);
        assert_eq!(code(fixed("10.0.0.3")).as_deref(), Some("PrivateIPAddressNotInSubnet"));
        let mut owned = world.load_balancers[0].clone();
        owned.metadata.owner_references = Some(vec![world.vnets[0].owner_reference()]);
        let refused = balancer(&own, &body, Some(&owned), &world).unwrap_err();
        assert_eq!(refused.code, "OperationNotAllowed");
    }
}

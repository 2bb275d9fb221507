//! ARM's bodies of network objects into the model's types, and back. The checks on the way in and the host's plan read the
//! same.

pub mod balancer;

use serde_json::{Value, json};
use thiserror::Error;

use crate::fabric::{NextHop, RouteSpec};
use crate::nsg::{
    Access, Direction, NsgError, Peers, PlatformService, RuleProtocol, SecurityRule, parse_peers_with, parse_ports,
};
use crate::service_tags::ServiceTags;

/// Rules of one group at most.
pub const RULES_MAX: usize = 1000;

/// Application security groups of one side of a rule at most.
const APPLICATION_GROUPS_MAX: usize = 10;

/// How rules name application security groups: from the group's ARM id to its key.
pub type GroupKey<'a> = &'a dyn Fn(&str) -> String;

/// Reads one element of `properties.securityRules` (`{name, properties}`).
pub fn security_rule(rule: &Value, tags: &ServiceTags, group_key: GroupKey<'_>) -> Result<SecurityRule, NsgError> {
    let name = rule["name"].as_str().unwrap_or_default().to_owned();
    let p = &rule["properties"];
    let fail = |field: &str, problem: String| NsgError::Field {
        name: name.clone(),
        field: field.to_owned(),
        problem,
    };
    // One of the words, whatever the case.
    let word = |field: &str, words: &[&'static str]| {
        let sent = p[field].as_str().unwrap_or_default();
        let found = words.iter().copied().find(|w| w.eq_ignore_ascii_case(sent));
        found.ok_or_else(|| fail(field, format!("{sent:?} is not one of {}", words.join(", "))))
    };
    // Either the one or the many.
    let texts = |one: &str, many: &str| {
        let single = p[one].as_str().filter(|t| !t.is_empty());
        let list = p[many].as_array().map_or(&[][..], Vec::as_slice);
        let list: Option<Vec<String>> = list.iter().map(|v| v.as_str().map(str::to_owned)).collect();
        match (single, list) {
            (_, None) => Err(fail(many, "must be a list of strings".into())),
            (Some(one), Some(list)) if list.is_empty() => Ok(vec![one.to_owned()]),
            (None, Some(list)) if !list.is_empty() => Ok(list),
            (None, Some(_)) => Err(fail(one, "is missing".into())),
            (Some(_), Some(_)) => Err(fail(many, format!("cannot be given together with {one}"))),
        }
    };
    let peers = |one: &str, many: &str, groups: &str| {
        let Some(ids) = p[groups].as_array().filter(|ids| !ids.is_empty()) else {
            let texts = texts(one, many)?;
            return parse_peers_with(&texts.iter().map(String::as_str).collect::<Vec<_>>(), tags);
        };
        let has_one = p[one].as_str().is_some_and(|t| !t.is_empty());
        if has_one || p[many].as_array().is_some_and(|l| !l.is_empty()) {
            return Err(fail(groups, format!("cannot be given together with {one} or {many}")));
        }
        if ids.len() > APPLICATION_GROUPS_MAX {
            return Err(fail(
                groups,
                format!(
                    "has {} elements, at most {APPLICATION_GROUPS_MAX} are allowed",
                    ids.len()
                ),
            ));
        }
        let key = |v: &Value| v["id"].as_str().map(group_key);
        let keys: Option<Vec<String>> = ids.iter().map(key).collect();
        keys.map(Peers::ApplicationGroups)
            .ok_or_else(|| fail(groups, "must be a list of {id}".into()))
    };
    let ports = |one: &str, many: &str| {
        let texts = texts(one, many)?;
        parse_ports(&texts.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let priority = p["priority"].as_u64().and_then(|n| u32::try_from(n).ok());
    let rule = SecurityRule {
        priority: priority.ok_or_else(|| fail("priority", format!("{} is not a number", p["priority"])))?,
        direction: match word("direction", &["Inbound", "Outbound"])? {
            "Inbound" => Direction::Inbound,
            _ => Direction::Outbound,
        },
        access: match word("access", &["Allow", "Deny"])? {
            "Allow" => Access::Allow,
            _ => Access::Deny,
        },
        protocol: match word("protocol", &["*", "Tcp", "Udp", "Icmp", "Esp", "Ah"])? {
            "*" => RuleProtocol::Any,
            "Tcp" => RuleProtocol::Tcp,
            "Udp" => RuleProtocol::Udp,
            "Icmp" => RuleProtocol::Icmp,
            "Esp" => RuleProtocol::Esp,
            _ => RuleProtocol::Ah,
        },
        source: peers(
            "sourceAddressPrefix",
            "sourceAddressPrefixes",
            "sourceApplicationSecurityGroups",
        )?,
        source_ports: ports("sourcePortRange", "sourcePortRanges")?,
        destination: peers(
            "destinationAddressPrefix",
            "destinationAddressPrefixes",
            "destinationApplicationSecurityGroups",
        )?,
        destination_ports: ports("destinationPortRange", "destinationPortRanges")?,
        name: name.clone(),
    };
    let of_platform = |peers: &Peers| peers.alternatives().iter().any(|p| matches!(p, Peers::Platform(_)));
    if of_platform(&rule.source) || rule.direction == Direction::Inbound && of_platform(&rule.destination) {
        let problem = "AzurePlatformDNS and AzurePlatformIMDS can only be the destination of an outbound rule";
        return Err(fail("sourceAddressPrefix or destinationAddressPrefix", problem.into()));
    }
    Ok(rule)
}

/// Reads and checks `properties.securityRules` of a group's body. The error comes with the place of its rule, if it is of
/// one.
pub fn security_rules(
    body: &Value,
    tags: &ServiceTags,
    group_key: GroupKey<'_>,
) -> Result<Vec<SecurityRule>, (Option<usize>, NsgError)> {
    let list = body["properties"]["securityRules"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    if list.len() > RULES_MAX {
        return Err((None, NsgError::TooMany { count: list.len() }));
    }
    let one = |(n, rule): (usize, &Value)| security_rule(rule, tags, group_key).map_err(|e| (Some(n), e));
    let rules: Vec<SecurityRule> = list.iter().enumerate().map(one).collect::<Result<_, _>>()?;
    crate::nsg::check(&rules).map_err(|e| (None, e))?;
    Ok(rules)
}

/// A route that is not valid.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum RouteError {
    #[error("route {route}: {text:?} is not an IPv4 address prefix")]
    Prefix { route: String, text: String },
    #[error("route {route}: next hop type {text:?} is not one of VnetLocal, Internet, None, VirtualAppliance")]
    HopType { route: String, text: String },
    #[error("route {route}: a VirtualAppliance needs nextHopIpAddress, and nothing else may have one; it is {text:?}")]
    HopAddress { route: String, text: String },
    #[error("routes {a} and {b} have the same address prefix")]
    Conflict { a: String, b: String },
}

impl RouteError {
    /// ARM's error code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Prefix { .. } => "InvalidAddressPrefixFormat",
            Self::HopType { .. } => "InvalidNextHopType",
            Self::HopAddress { .. } => "InvalidNextHopIpAddress",
            Self::Conflict { .. } => "RouteConflict",
        }
    }
}

/// Reads and checks `properties.routes` of a route table's body; the error comes with the place of its route.
pub fn routes(body: &Value) -> Result<Vec<RouteSpec>, (usize, RouteError)> {
    let list = body["properties"]["routes"].as_array().map_or(&[][..], Vec::as_slice);
    let mut out: Vec<(String, RouteSpec)> = Vec::new();
    for (n, element) in list.iter().enumerate() {
        let spec = route(element).map_err(|e| (n, e))?;
        let b = element["name"].as_str().unwrap_or_default().to_owned();
        if let Some((a, _)) = out.iter().find(|(_, o)| o.prefix == spec.prefix) {
            return Err((n, RouteError::Conflict { a: a.clone(), b }));
        }
        out.push((b, spec));
    }
    Ok(out.into_iter().map(|(_, spec)| spec).collect())
}

fn route(element: &Value) -> Result<RouteSpec, RouteError> {
    let p = &element["properties"];
    let route = element["name"].as_str().unwrap_or_default().to_owned();
    let text = |field: &str| p[field].as_str().unwrap_or_default().to_owned();
    let prefix = crate::rules::parse_prefix(&text("addressPrefix")).map_err(|_| RouteError::Prefix {
        route: route.clone(),
        text: text("addressPrefix"),
    })?;
    let address = text("nextHopIpAddress");
    let kind = text("nextHopType");
    let next_hop = match kind.to_ascii_lowercase().as_str() {
        "vnetlocal" => NextHop::VnetLocal,
        "internet" => NextHop::Internet,
        "none" => NextHop::None,
        "virtualappliance" => match address.parse() {
            Ok(address) => NextHop::VirtualAppliance(address),
            Err(_) => return Err(RouteError::HopAddress { route, text: address }),
        },
        _ => return Err(RouteError::HopType { route, text: kind }),
    };
    if !address.is_empty() && !matches!(next_hop, NextHop::VirtualAppliance(_)) {
        return Err(RouteError::HopAddress { route, text: address });
    }
    Ok(RouteSpec { prefix, next_hop })
}

/// A default rule as ARM shows it below the group with this id.
pub fn show_default_rule(rule: &SecurityRule, group_id: &str) -> Value {
    let peers = |p: &Peers| match p {
        Peers::VirtualNetwork => "VirtualNetwork",
        Peers::AzureLoadBalancer => "AzureLoadBalancer",
        Peers::Internet => "Internet",
        Peers::Platform(PlatformService::Dns) => "AzurePlatformDNS",
        Peers::Platform(PlatformService::Imds) => "AzurePlatformIMDS",
        Peers::Any | Peers::Prefixes(_) | Peers::ApplicationGroups(_) | Peers::AnyOf(_) => "*",
    };
    json!({
        "name": rule.name,
        "id": format!("{group_id}/defaultSecurityRules/{}", rule.name),
        "type": "Microsoft.Network/networkSecurityGroups/defaultSecurityRules",
        "properties": {
            "priority": rule.priority,
            "direction": rule.direction,
            "access": rule.access,
            "protocol": "*",
            "sourceAddressPrefix": peers(&rule.source),
            "sourcePortRange": "*",
            "destinationAddressPrefix": peers(&rule.destination),
            "destinationPortRange": "*",
            "provisioningState": "Succeeded",
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rule: &Value) -> Result<SecurityRule, NsgError> {
        security_rule(rule, &ServiceTags::default(), &str::to_lowercase)
    }

    fn all(body: &Value) -> Result<Vec<SecurityRule>, (Option<usize>, NsgError)> {
        security_rules(body, &ServiceTags::default(), &str::to_lowercase)
    }

    fn rule(change: &[(&str, Value)]) -> Value {
        let mut p = json!({"priority": 100, "direction": "inbound", "access": "Allow", "protocol": "TCP",
            "sourceAddressPrefix": "Internet", "sourceAddressPrefixes": [], "sourcePortRange": "*",
            "destinationAddressPrefixes": ["10.0.0.4", "10.0.1.0/24"], "destinationPortRanges": ["80", "8000-8100"]});
        for (field, value) in change {
            p[*field] = value.clone();
        }
        json!({"name": "web", "properties": p})
    }

    #[test]
    fn a_rule_is_read_as_clients_send_it() {
        let r = read(&rule(&[])).unwrap();
        assert_eq!(
            (r.name.as_str(), r.direction, r.protocol),
            ("web", Direction::Inbound, RuleProtocol::Tcp)
        );
        assert_eq!(r.source, Peers::Internet);
        assert_eq!(r.destination_ports, [(80, 80), (8000, 8100)]);
        assert!(r.source_ports.is_empty());
    }

    #[test]
    fn routes_are_read_and_their_mistakes_have_codes() {
        let body = |list: &[(&str, &str, &str)]| {
            let one = |(n, (prefix, kind, ip)): (usize, &(&str, &str, &str))| {
                json!({"name": format!("r{n}"), "properties":
                    {"addressPrefix": prefix, "nextHopType": kind, "nextHopIpAddress": ip}})
            };
            json!({"properties": {"routes": list.iter().enumerate().map(one).collect::<Vec<Value>>()}})
        };
        let read = routes(&body(&[
            ("0.0.0.0/0", "virtualAppliance", "10.0.0.4"),
            ("10.1.0.0/16", "None", ""),
        ]));
        let read = read.unwrap();
        assert_eq!(read[0].next_hop, NextHop::VirtualAppliance([10, 0, 0, 4].into()));
        assert_eq!(read[1].next_hop, NextHop::None);
        for (list, code) in [
            (&[("Storage", "None", "")][..], "InvalidAddressPrefixFormat"),
            (&[("10.0.0.1/8", "None", "")], "InvalidAddressPrefixFormat"),
            (&[("10.0.0.0/8", "VirtualNetworkGateway", "")], "InvalidNextHopType"),
            (&[("10.0.0.0/8", "VirtualAppliance", "")], "InvalidNextHopIpAddress"),
            (&[("10.0.0.0/8", "Internet", "10.0.0.4")], "InvalidNextHopIpAddress"),
            (
                &[("10.0.0.0/8", "None", ""), ("10.0.0.0/8", "Internet", "")],
                "RouteConflict",
            ),
        ] {
            assert_eq!(routes(&body(list)).unwrap_err().1.code(), code, "{list:?}");
        }
    }

    #[test]
    fn each_mistake_has_its_code() {
        for (field, value, code) in [
            ("priority", json!(99), "SecurityRuleInvalidPriority"),
            ("priority", json!("x"), "SecurityRuleParameterContainsUnsupportedValue"),
            (
                "access",
                json!("Maybe"),
                "SecurityRuleParameterContainsUnsupportedValue",
            ),
            (
                "direction",
                json!(null),
                "SecurityRuleParameterContainsUnsupportedValue",
            ),
            (
                "protocol",
                json!("Gre"),
                "SecurityRuleParameterContainsUnsupportedValue",
            ),
            (
                "sourceAddressPrefix",
                json!("Storage"),
                "SecurityRuleInvalidAddressPrefix",
            ),
            (
                "sourceAddressPrefix",
                json!("10.0.0.0/33"),
                "SecurityRuleInvalidAddressPrefix",
            ),
            (
                "sourceAddressPrefix",
                json!("fd00::/64"),
                "SecurityRuleInvalidAddressPrefix",
            ),
            (
                "sourceAddressPrefixes",
                json!(["10.0.0.4"]),
                "SecurityRuleParameterContainsUnsupportedValue",
            ),
            (
                "destinationAddressPrefixes",
                json!(["Internet", "Nowhere"]),
                "SecurityRuleInvalidAddressPrefix",
            ),
            (
                "destinationPortRanges",
                json!(["70000"]),
                "SecurityRuleInvalidPortRange",
            ),
            ("destinationPortRanges", json!(["9-3"]), "SecurityRuleInvalidPortRange"),
            (
                "sourcePortRange",
                json!(null),
                "SecurityRuleParameterContainsUnsupportedValue",
            ),
            (
                "sourceApplicationSecurityGroups",
                json!([{"id": "/x"}]),
                "SecurityRuleParameterContainsUnsupportedValue",
            ),
        ] {
            let body = json!({"properties": {"securityRules": [rule(&[(field, value.clone())])]}});
            let (_, error) = all(&body).unwrap_err();
            assert_eq!(error.code(), code, "{field} {value}: {error}");
        }
        let twice = json!({"properties": {"securityRules": [rule(&[]), rule(&[])]}});
        assert_eq!(all(&twice).unwrap_err().1.code(), "SecurityRuleConflict");
        let other = rule(&[("direction", json!("Outbound"))]);
        all(&json!({"properties": {"securityRules": [rule(&[]), other]}})).unwrap();
        all(&json!({})).unwrap();
    }
}

//! Network security rules and their evaluation: priorities ascending, the first match decides, defaults last.
//!
//! # Source
//! Azure network security groups: priorities 100-4096, default rules 65000, 65001 and 65500 in each direction; inbound
//! traffic meets the subnet's group and then the NIC's, outbound the other way round, and both must allow.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::address::WIRE_SERVER;

#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum Direction {
    Inbound,
    Outbound,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Access {
    Allow,
    Deny,
}

/// `Any` is written `*`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum RuleProtocol {
    #[serde(rename = "*")]
    Any,
    Tcp,
    Udp,
    Icmp,
    Esp,
    Ah,
}

impl RuleProtocol {
    /// IP protocol number; `None` is any.
    pub fn number(self) -> Option<u8> {
        match self {
            Self::Any => None,
            Self::Tcp => Some(6),
            Self::Udp => Some(17),
            Self::Icmp => Some(1),
            Self::Esp => Some(50),
            Self::Ah => Some(51),
        }
    }
}

/// One end of a rule: prefixes, or one of the tags that are supported.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Peers {
    Any,
    VirtualNetwork,
    AzureLoadBalancer,
    Internet,
    Prefixes(Vec<Ipv4Net>),
}

/// A rule as evaluated.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SecurityRule {
    pub name: String,
    pub priority: u32,
    pub direction: Direction,
    pub access: Access,
    pub protocol: RuleProtocol,
    pub source: Peers,
    /// Inclusive ranges; empty is any.
    pub source_ports: Vec<(u16, u16)>,
    pub destination: Peers,
    pub destination_ports: Vec<(u16, u16)>,
}

/// The first packet of a flow; ports are zero for protocols without.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    pub protocol: u8,
    pub source: Ipv4Addr,
    pub source_port: u16,
    pub destination: Ipv4Addr,
    pub destination_port: u16,
}

#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum NsgError {
    #[error("Security rule {name} has invalid priority {priority}. Value provided must be in the range 100 to 4096.")]
    Priority { name: String, priority: u32 },
    #[error("Security rules {a} and {b} conflict: rules cannot have the same priority and direction.")]
    Conflict { a: String, b: String },
    #[error(
        "Security rule has invalid address prefix {text:?}; supported are prefixes, *, VirtualNetwork, AzureLoadBalancer and Internet."
    )]
    Peers { text: String },
    #[error("Security rule has invalid port range {text:?}.")]
    Ports { text: String },
    #[error("Security rule {name} is not valid: {field} {problem}.")]
    Field {
        name: String,
        field: String,
        problem: String,
    },
    #[error("{count} security rules; a group has at most 1000.")]
    TooMany { count: usize },
}

impl NsgError {
    /// ARM's error code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Priority { .. } => "SecurityRuleInvalidPriority",
            Self::Conflict { .. } => "SecurityRuleConflict",
            Self::Field { .. } => "SecurityRuleParameterContainsUnsupportedValue",
            Self::TooMany { .. } => "SecurityRuleLimitExceeded",
            Self::Peers { .. } => "SecurityRuleInvalidAddressPrefix",
            Self::Ports { .. } => "SecurityRuleInvalidPortRange",
        }
    }
}

/// Parses a rule's prefixes: one tag, or any number of prefixes and addresses.
pub fn parse_peers(texts: &[&str]) -> Result<Peers, NsgError> {
    if let [one] = texts {
        match *one {
            "*" | "0.0.0.0/0" => return Ok(Peers::Any),
            t if t.eq_ignore_ascii_case("VirtualNetwork") => return Ok(Peers::VirtualNetwork),
            t if t.eq_ignore_ascii_case("AzureLoadBalancer") => return Ok(Peers::AzureLoadBalancer),
            t if t.eq_ignore_ascii_case("Internet") => return Ok(Peers::Internet),
            _ => {}
        }
    }
    let prefix = |t: &&str| {
        t.parse::<Ipv4Net>()
            .map(|n| n.trunc())
            .or_else(|_| t.parse::<Ipv4Addr>().map(Ipv4Net::from))
            .map_err(|_| NsgError::Peers { text: (*t).to_owned() })
    };
    texts
        .iter()
        .map(prefix)
        .collect::<Result<Vec<_>, _>>()
        .map(Peers::Prefixes)
}

/// Parses `80`, `1000-2000` or `*`.
pub fn parse_ports(texts: &[&str]) -> Result<Vec<(u16, u16)>, NsgError> {
    if texts.iter().any(|t| ["*", "0-65535"].contains(t)) {
        return Ok(Vec::new());
    }
    let range = |t: &&str| {
        let (a, b) = t.split_once('-').unwrap_or((t, t));
        match (a.trim().parse::<u16>(), b.trim().parse::<u16>()) {
            (Ok(a), Ok(b)) if a <= b => Ok((a, b)),
            _ => Err(NsgError::Ports { text: (*t).to_owned() }),
        }
    };
    texts.iter().map(range).collect()
}

/// Checks priorities, and that they are unique per direction.
pub fn check(rules: &[SecurityRule]) -> Result<(), NsgError> {
    for (n, rule) in rules.iter().enumerate() {
        if !(100..=4096).contains(&rule.priority) {
            return Err(NsgError::Priority {
                name: rule.name.clone(),
                priority: rule.priority,
            });
        }
        let same = |o: &&SecurityRule| o.priority == rule.priority && o.direction == rule.direction;
        if let Some(other) = rules[..n].iter().find(same) {
            return Err(NsgError::Conflict {
                a: other.name.clone(),
                b: rule.name.clone(),
            });
        }
    }
    Ok(())
}

/// Decides a new flow in one group. `vnet` are the ranges that the tag VirtualNetwork stands for.
/// Returns the access and the name of the deciding rule.
pub fn evaluate<'a>(
    rules: &'a [SecurityRule],
    vnet: &[Ipv4Net],
    direction: Direction,
    flow: &Flow,
) -> (Access, &'a str) {
    let mut own: Vec<&SecurityRule> = rules.iter().filter(|r| r.direction == direction).collect();
    own.sort_by_key(|r| r.priority);
    if let Some(rule) = own.into_iter().find(|r| matches(r, vnet, flow)) {
        return (rule.access, &rule.name);
    }
    let inside = |a| Peers::VirtualNetwork.contains(vnet, a);
    match direction {
        _ if inside(flow.source) && inside(flow.destination) => match direction {
            Direction::Inbound => (Access::Allow, "AllowVnetInBound"),
            Direction::Outbound => (Access::Allow, "AllowVnetOutBound"),
        },
        Direction::Inbound if flow.source == WIRE_SERVER => (Access::Allow, "AllowAzureLoadBalancerInBound"),
        Direction::Inbound => (Access::Deny, "DenyAllInBound"),
        Direction::Outbound if Peers::Internet.contains(vnet, flow.destination) => {
            (Access::Allow, "AllowInternetOutBound")
        }
        Direction::Outbound => (Access::Deny, "DenyAllOutBound"),
    }
}

/// Decides a new flow on its whole way: `groups` are those it meets, in order; none is allowed by none being there.
/// Returns the first group (by place) that denies it, with the deciding rule's name.
pub fn denied_by<'a>(
    groups: &[(Direction, &'a [SecurityRule])],
    vnet: &[Ipv4Net],
    flow: &Flow,
) -> Option<(usize, &'a str)> {
    groups.iter().enumerate().find_map(|(n, (direction, rules))| {
        let (access, name) = evaluate(rules, vnet, *direction, flow);
        (access == Access::Deny).then_some((n, name))
    })
}

/// Rules of a group that stands for one that cannot be known: nothing passes.
pub fn deny_all() -> Vec<SecurityRule> {
    let only = |name: &str, direction| SecurityRule {
        name: name.to_owned(),
        priority: 100,
        direction,
        access: Access::Deny,
        protocol: RuleProtocol::Any,
        source: Peers::Any,
        source_ports: Vec::new(),
        destination: Peers::Any,
        destination_ports: Vec::new(),
    };
    vec![
        only("DenyUnknownInBound", Direction::Inbound),
        only("DenyUnknownOutBound", Direction::Outbound),
    ]
}

/// The rules that every group has behind its own, both directions, by priority.
pub fn default_rules() -> Vec<SecurityRule> {
    use Access::{Allow, Deny};
    use Direction::{Inbound, Outbound};
    let rule = |name: &str, priority, direction, access, source: Peers, destination: Peers| SecurityRule {
        name: name.to_owned(),
        priority,
        direction,
        access,
        protocol: RuleProtocol::Any,
        source,
        source_ports: Vec::new(),
        destination,
        destination_ports: Vec::new(),
    };
    let (vnet, any) = (Peers::VirtualNetwork, Peers::Any);
    vec![
        rule("AllowVnetInBound", 65000, Inbound, Allow, vnet.clone(), vnet.clone()),
        rule(
            "AllowAzureLoadBalancerInBound",
            65001,
            Inbound,
            Allow,
            Peers::AzureLoadBalancer,
            any.clone(),
        ),
        rule("DenyAllInBound", 65500, Inbound, Deny, any.clone(), any.clone()),
        rule("AllowVnetOutBound", 65000, Outbound, Allow, vnet.clone(), vnet),
        rule(
            "AllowInternetOutBound",
            65001,
            Outbound,
            Allow,
            any.clone(),
            Peers::Internet,
        ),
        rule("DenyAllOutBound", 65500, Outbound, Deny, any.clone(), any),
    ]
}

fn matches(rule: &SecurityRule, vnet: &[Ipv4Net], flow: &Flow) -> bool {
    let protocol = rule.protocol.number().is_none_or(|n| n == flow.protocol);
    // A rule that names ports says nothing about protocols without.
    let has_ports = [6, 17].contains(&flow.protocol);
    let port = |ranges: &[(u16, u16)], port| {
        ranges.is_empty() || has_ports && ranges.iter().any(|(a, b)| (*a..=*b).contains(&port))
    };
    protocol
        && rule.source.contains(vnet, flow.source)
        && port(&rule.source_ports, flow.source_port)
        && rule.destination.contains(vnet, flow.destination)
        && port(&rule.destination_ports, flow.destination_port)
}

impl Peers {
    fn contains(&self, vnet: &[Ipv4Net], address: Ipv4Addr) -> bool {
        let in_vnet = || address == WIRE_SERVER || vnet.iter().any(|p| p.contains(&address));
        match self {
            Self::Any => true,
            Self::VirtualNetwork => in_vnet(),
            Self::AzureLoadBalancer => address == WIRE_SERVER,
            Self::Internet => !in_vnet(),
            Self::Prefixes(prefixes) => prefixes.iter().any(|p| p.contains(&address)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(source: &str, destination: &str, port: u16) -> Flow {
        let ip = |t: &str| t.parse().unwrap();
        Flow {
            protocol: 6,
            source: ip(source),
            source_port: 40000,
            destination: ip(destination),
            destination_port: port,
        }
    }

    #[test]
    fn the_lowest_priority_decides_and_defaults_come_last() {
        let vnet = ["10.1.0.0/16".parse().unwrap()];
        let rule = |name: &str, priority, access, ports: &str| SecurityRule {
            name: name.into(),
            priority,
            direction: Direction::Inbound,
            access,
            protocol: RuleProtocol::Tcp,
            source: parse_peers(&["*"]).unwrap(),
            source_ports: vec![],
            destination: parse_peers(&["*"]).unwrap(),
            destination_ports: parse_ports(&[ports]).unwrap(),
        };
        let rules = [
            rule("deny", 200, Access::Deny, "80-90"),
            rule("web", 100, Access::Allow, "80"),
        ];
        check(&rules).unwrap();
        let decide = |f: &Flow| evaluate(&rules, &vnet, Direction::Inbound, f);
        assert_eq!(decide(&flow("8.8.8.8", "10.1.0.4", 80)), (Access::Allow, "web"));
        assert_eq!(decide(&flow("10.1.0.5", "10.1.0.4", 81)), (Access::Deny, "deny"));
        assert_eq!(
            decide(&flow("10.1.0.5", "10.1.0.4", 22)),
            (Access::Allow, "AllowVnetInBound")
        );
        assert_eq!(
            decide(&flow("8.8.8.8", "10.1.0.4", 22)),
            (Access::Deny, "DenyAllInBound")
        );
        assert_eq!(decide(&flow("168.63.129.16", "10.1.0.4", 22)).0, Access::Allow);
        let out = evaluate(&rules, &vnet, Direction::Outbound, &flow("10.1.0.4", "8.8.8.8", 53));
        assert_eq!(out, (Access::Allow, "AllowInternetOutBound"));
    }

    #[test]
    fn mistakes_have_codes() {
        assert_eq!(
            parse_ports(&["9-3"]).unwrap_err().code(),
            "SecurityRuleInvalidPortRange"
        );
        assert_eq!(
            parse_peers(&["Storage"]).unwrap_err().code(),
            "SecurityRuleInvalidAddressPrefix"
        );
    }
}

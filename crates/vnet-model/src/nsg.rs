//! Network security rules and their evaluation: priorities ascending, the first match decides, defaults last.
//!
//! # Source
//! Azure network security groups: priorities 100-4096, default rules 65000, 65001 and 65500 in each direction; inbound
//! traffic meets the subnet's group and then the NIC's, outbound the other way round, and both must allow.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::address::WIRE_SERVER;
use crate::instance::METADATA_SERVICE;
use crate::service_tags::ServiceTags;

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

/// One end of a rule. Service tags with fixed prefixes are prefixes by the time a rule is here.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Peers {
    Any,
    VirtualNetwork,
    AzureLoadBalancer,
    Internet,
    Prefixes(Vec<Ipv4Net>),
    /// Members of any of these application security groups, by key.
    ApplicationGroups(Vec<String>),
    /// A service of the platform itself, which no rule is about unless it says so.
    Platform(PlatformService),
    /// Any of several, none of them of this form.
    AnyOf(Vec<Peers>),
}

/// What every virtual network has at its well-known addresses.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum PlatformService {
    /// `AzurePlatformDNS`: port 53 of 168.63.129.16.
    Dns,
    /// `AzurePlatformIMDS`: 169.254.169.254.
    Imds,
}

impl PlatformService {
    pub fn address(self) -> Ipv4Addr {
        match self {
            Self::Dns => WIRE_SERVER,
            Self::Imds => METADATA_SERVICE,
        }
    }

    /// The one port that the tag is about, if it is one.
    pub fn port(self) -> Option<u16> {
        match self {
            Self::Dns => Some(53),
            Self::Imds => None,
        }
    }
}

/// What names in rules stand for in one virtual network.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Scope {
    /// Ranges of the tag `VirtualNetwork`.
    pub vnet: Vec<Ipv4Net>,
    /// Members of the application security groups, by key.
    pub application_groups: BTreeMap<String, Vec<Ipv4Addr>>,
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
        "Security rule has invalid address prefix {text:?}: it is neither an IPv4 prefix, *, nor a service tag of this platform."
    )]
    Peers { text: String },
    #[error(
        "Security rule names service tag {tag:?}, which stands for no address on this platform. An operator can give it some: oaks up --service-tag {tag}=PREFIX."
    )]
    Tag { tag: String },
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
            Self::Peers { .. } | Self::Tag { .. } => "SecurityRuleInvalidAddressPrefix",
            Self::Ports { .. } => "SecurityRuleInvalidPortRange",
        }
    }
}

/// [`parse_peers_with`] on a platform without service tags of its own.
pub fn parse_peers(texts: &[&str]) -> Result<Peers, NsgError> {
    parse_peers_with(texts, &ServiceTags::default())
}

/// Parses a rule's prefixes: any number of prefixes, addresses and service tags.
pub fn parse_peers_with(texts: &[&str], tags: &ServiceTags) -> Result<Peers, NsgError> {
    let mut prefixes = Vec::new();
    let mut out = Vec::new();
    for text in texts {
        match parse_peer(text, tags)? {
            Peers::Any => return Ok(Peers::Any),
            Peers::Prefixes(some) => prefixes.extend(some),
            other if out.contains(&other) => {}
            other => out.push(other),
        }
    }
    if !prefixes.is_empty() || out.is_empty() {
        out.push(Peers::Prefixes(prefixes));
    }
    Ok(match out.len() {
        1 => out.swap_remove(0),
        _ => Peers::AnyOf(out),
    })
}

fn parse_peer(text: &str, tags: &ServiceTags) -> Result<Peers, NsgError> {
    let named = [
        ("*", Peers::Any),
        ("0.0.0.0/0", Peers::Any),
        ("VirtualNetwork", Peers::VirtualNetwork),
        ("AzureLoadBalancer", Peers::AzureLoadBalancer),
        ("Internet", Peers::Internet),
        ("AzurePlatformDNS", Peers::Platform(PlatformService::Dns)),
        ("AzurePlatformIMDS", Peers::Platform(PlatformService::Imds)),
    ];
    if let Some((_, peers)) = named.into_iter().find(|(n, _)| n.eq_ignore_ascii_case(text)) {
        return Ok(peers);
    }
    if let Some(prefixes) = tags.get(text) {
        return Ok(Peers::Prefixes(prefixes.to_vec()));
    }
    let prefix = text.parse::<Ipv4Net>().map(|n| n.trunc());
    match prefix.or_else(|_| text.parse::<Ipv4Addr>().map(Ipv4Net::from)) {
        Ok(prefix) => Ok(Peers::Prefixes(vec![prefix])),
        Err(_) if ServiceTags::is_published(text) => Err(NsgError::Tag { tag: text.to_owned() }),
        Err(_) => Err(NsgError::Peers { text: text.to_owned() }),
    }
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

/// Decides a new flow in one group; `scope` says what names in rules stand for.
/// Returns the access and the name of the deciding rule.
pub fn evaluate<'a>(rules: &'a [SecurityRule], scope: &Scope, direction: Direction, flow: &Flow) -> (Access, &'a str) {
    let mut own: Vec<&SecurityRule> = rules.iter().filter(|r| r.direction == direction).collect();
    own.sort_by_key(|r| r.priority);
    if let Some(rule) = own.into_iter().find(|r| matches(r, scope, flow)) {
        return (rule.access, &rule.name);
    }
    let inside = |a| Peers::VirtualNetwork.contains(scope, a);
    match direction {
        _ if inside(flow.source) && inside(flow.destination) => match direction {
            Direction::Inbound => (Access::Allow, "AllowVnetInBound"),
            Direction::Outbound => (Access::Allow, "AllowVnetOutBound"),
        },
        Direction::Inbound if flow.source == WIRE_SERVER => (Access::Allow, "AllowAzureLoadBalancerInBound"),
        Direction::Inbound => (Access::Deny, "DenyAllInBound"),
        Direction::Outbound if Peers::Internet.contains(scope, flow.destination) => {
            (Access::Allow, "AllowInternetOutBound")
        }
        Direction::Outbound => (Access::Deny, "DenyAllOutBound"),
    }
}

/// Decides a new flow on its whole way: `groups` are those it meets, in order; none is allowed by none being there.
/// Returns the first group (by place) that denies it, with the deciding rule's name.
pub fn denied_by<'a>(
    groups: &[(Direction, &'a [SecurityRule])],
    scope: &Scope,
    flow: &Flow,
) -> Option<(usize, &'a str)> {
    groups.iter().enumerate().find_map(|(n, (direction, rules))| {
        let (access, name) = evaluate(rules, scope, *direction, flow);
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

fn matches(rule: &SecurityRule, scope: &Scope, flow: &Flow) -> bool {
    let protocol = rule.protocol.number().is_none_or(|n| n == flow.protocol);
    // A rule that names ports says nothing about protocols without.
    let has_ports = [6, 17].contains(&flow.protocol);
    let port = |ranges: &[(u16, u16)], port| {
        ranges.is_empty() || has_ports && ranges.iter().any(|(a, b)| (*a..=*b).contains(&port))
    };
    protocol
        && rule.source.contains(scope, flow.source)
        && port(&rule.source_ports, flow.source_port)
        && rule.destination.contains(scope, flow.destination)
        && port(&rule.destination_ports, flow.destination_port)
}

impl Peers {
    /// The forms that this is any of; itself alone if it is one.
    pub fn alternatives(&self) -> &[Peers] {
        match self {
            Self::AnyOf(many) => many,
            one => std::slice::from_ref(one),
        }
    }

    fn contains(&self, scope: &Scope, address: Ipv4Addr) -> bool {
        let in_vnet = || address == WIRE_SERVER || scope.vnet.iter().any(|p| p.contains(&address));
        let member = |key| scope.application_groups.get(key).is_some_and(|m| m.contains(&address));
        match self {
            Self::Any => true,
            Self::VirtualNetwork => in_vnet(),
            Self::AzureLoadBalancer => address == WIRE_SERVER,
            Self::Internet => !in_vnet(),
            Self::Prefixes(prefixes) => prefixes.iter().any(|p| p.contains(&address)),
            Self::ApplicationGroups(keys) => keys.iter().any(member),
            Self::Platform(service) => address == service.address(),
            Self::AnyOf(many) => many.iter().any(|p| p.contains(scope, address)),
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
        let vnet = Scope {
            vnet: vec!["10.1.0.0/16".parse().unwrap()],
            ..Scope::default()
        };
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
        assert!(matches!(parse_peers(&["Storage"]), Err(NsgError::Tag { .. })));
        assert!(matches!(
            parse_peers(&["10.0.0.0/8", "Nowhere"]),
            Err(NsgError::Peers { .. })
        ));
    }

    #[test]
    fn tags_and_prefixes_mix_and_groups_are_their_members() {
        let tags = ServiceTags::parse(["Storage=10.9.0.0/24"]).unwrap();
        let mixed = parse_peers_with(&["storage", "VirtualNetwork", "8.8.8.8"], &tags).unwrap();
        let scope = Scope {
            vnet: vec!["10.1.0.0/16".parse().unwrap()],
            application_groups: [("web".to_owned(), vec![Ipv4Addr::new(10, 1, 0, 4)])].into(),
        };
        let all = Peers::AnyOf(vec![mixed.clone(), Peers::Internet]);
        let of = |peers: &Peers, a: &str| peers.contains(&scope, a.parse().unwrap());
        for (address, inside) in [
            ("10.9.0.7", true),
            ("10.1.2.3", true),
            ("8.8.8.8", true),
            ("8.8.4.4", false),
        ] {
            assert_eq!(of(&mixed, address), inside, "{address}");
            assert!(of(&all, address));
        }
        assert_eq!(mixed.alternatives().len(), 2);
        assert_eq!(parse_peers(&["10.0.0.0/8", "*"]).unwrap(), Peers::Any);
        let web = Peers::ApplicationGroups(vec!["none".into(), "web".into()]);
        assert!(of(&web, "10.1.0.4") && !of(&web, "10.1.0.5"));
    }
}

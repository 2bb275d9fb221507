//! Network security groups at the NICs' ports, in a table of their own: changing a rule replaces this table alone.
//!
//! ```text
//!  forward:  established: accept
//!            port the packet came from -> chain of the NIC's groups, outbound: the NIC's, then its subnet's
//!            port it goes to           -> chain of the NIC's groups, inbound: the subnet's, then the NIC's
//! ```
//! Both are one lookup in a map, whatever the number of NICs. In a group's chain an allowing rule returns, a denying one
//! ends in `deny`; the default rules come last. Established connections are accepted first: a changed rule meets new
//! flows only.
//!
//! Outbound rules see what the machine asked for, inbound rules what arrives: a flow to a load balancer's frontend is
//! judged outbound before it is translated, inbound after. The platform's own connections (from 168.63.129.16, and to it
//! and to the metadata service) meet only the outbound rules that name a platform tag.
//!
//! An application security group is one set of addresses: a NIC that joins or leaves changes elements, no rule.

use std::collections::BTreeSet;

use ipnet::Ipv4Net;
use linux::nft::{
    Chain, ChainKind, Datum, Element, Family, Field, HookPoint, Reject, Rule, Set, Statement, TCP, Table, UDP, Verdict,
};
use vnet_model::WIRE_SERVER;
use vnet_model::fabric::{NicSpec, SecurityGroupSpec, VnetSpec};
use vnet_model::instance::METADATA_SERVICE;
use vnet_model::nsg::{Access, Direction, Peers, PlatformService, SecurityRule, default_rules};

use crate::names::{SECURITY_TABLE, VXLAN_LINK, nic_link};

/// Comment of the counting rule for flows that a security group denies.
pub const DENIED: &str = "denied by a security group";

const DENY: &str = "deny";
const VNET_TAG: &str = "virtual-network";
const FRONTENDS: &str = "frontends";

/// The table of `vnet`; without chains if none of its subnets and NICs has a group.
pub fn security(vnet: &VnetSpec) -> Table {
    let mut table = Table::new(Family::Ip, SECURITY_TABLE);
    let ways: Vec<(&NicSpec, Vec<&str>)> = vnet
        .nics_here()
        .map(|n| (n, groups_of(vnet, n)))
        .filter(|(_, groups)| !groups.is_empty())
        .collect();
    if ways.is_empty() {
        return table;
    }
    let net = |n: &Ipv4Net| Element::key([Datum::Net(*n)]);
    let instances = vnet.instance_addresses.iter().map(|i| i.public);
    let frontends: BTreeSet<_> = vnet.frontends.iter().map(|f| f.address).chain(instances).collect();
    table.sets = vec![
        Set::new(VNET_TAG, [Field::IpSaddr])
            .intervals()
            .with(vnet.tagged_ranges().iter().map(net)),
        Set::new(FRONTENDS, [Field::IpDaddr]).with(frontends.iter().map(|a| Element::key([Datum::Ip(*a)]))),
    ];
    table.chains.push(Chain::regular(
        DENY,
        [Rule::new().counter().reject(Reject::AdminProhibited).comment(DENIED)],
    ));
    let used: BTreeSet<&str> = ways.iter().flat_map(|(_, groups)| groups.iter().copied()).collect();
    let groups: Vec<&SecurityGroupSpec> = vnet
        .security_groups
        .iter()
        .filter(|g| used.contains(g.key.as_str()))
        .collect();
    for key in named_application_groups(&groups) {
        let members = vnet.application_groups.iter().find(|g| g.key == key);
        let members: BTreeSet<_> = members.into_iter().flat_map(|g| g.members.iter().copied()).collect();
        let set = Set::new(application_set(key), [Field::IpSaddr]);
        table
            .sets
            .push(set.with(members.into_iter().map(|a| Element::key([Datum::Ip(a)]))));
    }
    for group in &groups {
        for direction in [Direction::Inbound, Direction::Outbound] {
            add_group(&mut table, group, direction);
        }
    }
    for (direction, field) in [
        (Direction::Outbound, Field::Iifname),
        (Direction::Inbound, Field::Oifname),
    ] {
        let mut elements = Vec::new();
        let mut pairs = BTreeSet::new();
        for (nic, groups) in &ways {
            let name = match groups.as_slice() {
                [one] => chain(direction, one),
                both => {
                    let name = chain(direction, &both.join("+"));
                    if pairs.insert(name.clone()) {
                        let mut steps: Vec<Rule> = both.iter().map(|g| Rule::new().jump(chain(direction, g))).collect();
                        if direction == Direction::Outbound {
                            steps.reverse();
                        }
                        table.chains.push(Chain::regular(name.clone(), steps));
                    }
                    name
                }
            };
            elements.push(Element::verdict(
                [Datum::IfName(nic_link(&nic.key))],
                Verdict::jump(name),
            ));
        }
        table
            .sets
            .push(Set::verdict_map(word(direction), [field]).with(elements));
    }
    let to_services = platform_chains(&mut table, &groups, &ways);
    let outbound = |rule: Rule| rule.vmap([Field::Iifname], word(Direction::Outbound));
    let base = |name: &str, point, priority, rules: Vec<Rule>| {
        let established = [Rule::new().established().accept()];
        let rules: Vec<Rule> = established.into_iter().chain(rules).collect();
        Chain::base(name, ChainKind::Filter, point, priority, rules)
    };
    // Chains that every packet would meet are there only if they can decide something.
    if !frontends.is_empty() {
        table.chains.push(base(
            "to-frontends",
            HookPoint::Prerouting,
            -140,
            vec![outbound(Rule::new().in_set([Field::IpDaddr], FRONTENDS))],
        ));
    }
    table.chains.push(base(
        "between",
        HookPoint::Forward,
        10,
        vec![
            // The platform on another host.
            Rule::new()
                .iifname(VXLAN_LINK)
                .saddr(super::hosts::platform_range())
                .accept(),
            outbound(Rule::new().not_in_set([Field::CtOriginalIpDaddr], FRONTENDS)),
            Rule::new().vmap([Field::Oifname], word(Direction::Inbound)),
        ],
    ));
    table.chains.push(base(
        "to-platform",
        HookPoint::Input,
        -10,
        to_services
            .into_iter()
            .chain([outbound(
                Rule::new()
                    .is_not(Field::IpDaddr, Datum::Ip(WIRE_SERVER))
                    .is_not(Field::IpDaddr, Datum::Ip(METADATA_SERVICE)),
            )])
            .collect(),
    ));
    table
}

/// Keys of the application security groups that the groups' rules name, each once.
fn named_application_groups<'a>(groups: &[&'a SecurityGroupSpec]) -> BTreeSet<&'a str> {
    let rules = groups.iter().flat_map(|g| &g.rules);
    let sides = rules.flat_map(|r| r.source.alternatives().iter().chain(r.destination.alternatives()));
    sides
        .flat_map(|p| match p {
            Peers::ApplicationGroups(keys) => keys.as_slice(),
            _ => &[],
        })
        .map(String::as_str)
        .collect()
}

fn application_set(key: &str) -> String {
    format!("asg:{key}")
}

/// Chains of the groups whose outbound rules name a platform service, a map from port to chain, and the rules that lead
/// there. Nothing if no group names one: everyone then reaches the services.
fn platform_chains(table: &mut Table, groups: &[&SecurityGroupSpec], ways: &[(&NicSpec, Vec<&str>)]) -> Vec<Rule> {
    let mut named = BTreeSet::new();
    for group in groups {
        let mut own: Vec<&SecurityRule> = group
            .rules
            .iter()
            .filter(|r| r.direction == Direction::Outbound)
            .filter(|r| {
                r.destination
                    .alternatives()
                    .iter()
                    .any(|p| matches!(p, Peers::Platform(_)))
            })
            .collect();
        if own.is_empty() {
            continue;
        }
        own.sort_by_key(|r| r.priority);
        let name = format!("services:{}", group.key);
        let mut rules = Vec::new();
        for rule in own {
            rules.extend(compile(table, &format!("{name}:{}", rule.priority), rule, true));
        }
        table.chains.push(Chain::regular(name, rules));
        named.insert(group.key.as_str());
    }
    if named.is_empty() {
        return Vec::new();
    }
    let mut elements = Vec::new();
    for (nic, of_nic) in ways {
        let own: Vec<&str> = of_nic.iter().rev().copied().filter(|g| named.contains(g)).collect();
        let name = format!("services:{}", own.join("+"));
        if own.is_empty() {
            continue;
        }
        if own.len() > 1 && !table.chains.iter().any(|c| c.name == name) {
            let steps = own.iter().map(|g| Rule::new().jump(format!("services:{g}")));
            let steps: Vec<Rule> = steps.collect();
            table.chains.push(Chain::regular(name.clone(), steps));
        }
        elements.push(Element::verdict(
            [Datum::IfName(nic_link(&nic.key))],
            Verdict::jump(name),
        ));
    }
    table
        .sets
        .push(Set::verdict_map("services", [Field::Iifname]).with(elements));
    [WIRE_SERVER, METADATA_SERVICE]
        .map(|a| {
            Rule::new()
                .then(is(Field::IpDaddr, Datum::Ip(a)))
                .vmap([Field::Iifname], "services")
        })
        .into()
}

/// The groups that inbound packets of the NIC meet, in their order: its subnet's, its own.
fn groups_of<'a>(vnet: &'a VnetSpec, nic: &'a NicSpec) -> Vec<&'a str> {
    let subnet = vnet.subnet(&nic.subnet).and_then(|s| s.security_group.as_deref());
    subnet.into_iter().chain(nic.security_group.as_deref()).collect()
}

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "in",
        Direction::Outbound => "out",
    }
}

fn chain(direction: Direction, group: &str) -> String {
    format!("{}:{group}", word(direction))
}

fn add_group(table: &mut Table, group: &SecurityGroupSpec, direction: Direction) {
    let name = chain(direction, &group.key);
    let mut own: Vec<&SecurityRule> = group.rules.iter().collect();
    own.sort_by_key(|r| r.priority);
    let defaults = default_rules();
    let all = own.into_iter().chain(&defaults).filter(|r| r.direction == direction);
    let mut rules = Vec::new();
    for rule in all {
        rules.extend(compile(table, &format!("{name}:{}", rule.priority), rule, false));
    }
    table.chains.push(Chain::regular(name, rules));
}

/// The nft rules of one rule: one per protocol with ports and per combination of alternatives of its two sides. What does
/// not fit into a comparison becomes a set named after `name`. With `services` only alternatives that name a service of
/// the platform are compiled, without it only the others.
fn compile(table: &mut Table, name: &str, rule: &SecurityRule, services: bool) -> Vec<Rule> {
    let ports = !rule.source_ports.is_empty() || !rule.destination_ports.is_empty();
    let protocols = match rule.protocol.number() {
        Some(number) => vec![Some(number)],
        None if ports => vec![Some(TCP), Some(UDP)],
        None => vec![None],
    };
    // Only these have ports; a rule that names some matches nothing of another protocol.
    if ports && !protocols.iter().flatten().all(|p| [TCP, UDP].contains(p)) {
        return Vec::new();
    }
    let sources = peers(table, &format!("{name}:from"), Field::IpSaddr, &rule.source);
    let destinations = match services {
        true => platform_services(&rule.destination),
        false => peers(table, &format!("{name}:to"), Field::IpDaddr, &rule.destination),
    };
    let source_ports = port_match(table, &format!("{name}:from-ports"), Field::Sport, &rule.source_ports);
    let destination_ports = port_match(
        table,
        &format!("{name}:to-ports"),
        Field::Dport,
        &rule.destination_ports,
    );
    let verdict = match rule.access {
        Access::Allow => Verdict::Return,
        Access::Deny => Verdict::goto(DENY),
    };
    let mut out = Vec::new();
    for (destination, service_port) in &destinations {
        let protocols: Vec<Option<u8>> = match (service_port, protocols.as_slice()) {
            (None, all) => all.to_vec(),
            (Some(_), [None]) => vec![Some(TCP), Some(UDP)],
            (Some(_), all) => all
                .iter()
                .copied()
                .filter(|p| [Some(TCP), Some(UDP)].contains(p))
                .collect(),
        };
        for (protocol, (source, _)) in protocols.iter().flat_map(|p| sources.iter().map(move |s| (p, s))) {
            let start = protocol.map_or_else(Rule::new, |p| Rule::new().proto(p));
            let service_port = service_port.map(|p| is(Field::Dport, Datum::Port(p)));
            let matches = [&destination_ports, &service_port, source, destination, &source_ports];
            let filled = matches.into_iter().flatten().cloned().fold(start, Rule::then);
            out.push(filled.then(Statement::Verdict(verdict.clone())));
        }
    }
    out
}

fn in_set(field: Field, set: &str, negate: bool) -> Statement {
    Statement::InSet {
        fields: vec![field],
        set: set.to_owned(),
        negate,
    }
}

fn is(field: Field, value: Datum) -> Statement {
    Statement::Is {
        field,
        value,
        negate: false,
    }
}

/// What matches one side: the comparison (none for anything) and the port it is bound to, per alternative; empty if the
/// side is nothing that rules are about.
type Matches = Vec<(Option<Statement>, Option<u16>)>;

fn peers(table: &mut Table, name: &str, field: Field, peers: &Peers) -> Matches {
    let mut out = Vec::new();
    for one in peers.alternatives() {
        match one {
            Peers::Any => out.push(None),
            Peers::VirtualNetwork => out.push(Some(in_set(field, VNET_TAG, false))),
            Peers::Internet => out.push(Some(in_set(field, VNET_TAG, true))),
            Peers::AzureLoadBalancer => out.push(Some(is(field, Datum::Ip(WIRE_SERVER)))),
            Peers::Prefixes(prefixes) => match Ipv4Net::aggregate(prefixes).as_slice() {
                [one] => out.push(Some(is(field, Datum::Net(*one)))),
                many => {
                    let elements = many.iter().map(|n| Element::key([Datum::Net(*n)]));
                    table.sets.push(Set::new(name, [field]).intervals().with(elements));
                    out.push(Some(in_set(field, name, false)));
                }
            },
            Peers::ApplicationGroups(keys) => {
                out.extend(keys.iter().map(|k| Some(in_set(field, &application_set(k), false))));
            }
            // The other chains' business; an `AnyOf` is never inside another.
            Peers::Platform(_) | Peers::AnyOf(_) => {}
        }
    }
    out.into_iter().map(|s| (s, None)).collect()
}

fn platform_services(destination: &Peers) -> Matches {
    let of = |p: &Peers| match p {
        Peers::Platform(s @ (PlatformService::Dns | PlatformService::Imds)) => {
            Some((Some(is(Field::IpDaddr, Datum::Ip(s.address()))), s.port()))
        }
        _ => None,
    };
    destination.alternatives().iter().filter_map(of).collect()
}

fn port_match(table: &mut Table, name: &str, field: Field, ports: &[(u16, u16)]) -> Option<Statement> {
    match merged(ports).as_slice() {
        [] => None,
        [(a, b)] if a == b => Some(is(field, Datum::Port(*a))),
        ranges => {
            let elements = ranges.iter().map(|(a, b)| Element::key([Datum::PortRange(*a, *b)]));
            table.sets.push(Set::new(name, [field]).intervals().with(elements));
            Some(in_set(field, name, false))
        }
    }
}

/// The same ports as disjoint ranges that do not touch, ascending.
fn merged(ports: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let mut sorted = ports.to_vec();
    sorted.sort_unstable();
    let mut out: Vec<(u16, u16)> = Vec::new();
    for (a, b) in sorted {
        match out.last_mut() {
            Some((_, end)) if u32::from(a) <= u32::from(*end) + 1 => *end = b.max(*end),
            _ => out.push((a, b)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges_merge() {
        assert_eq!(
            merged(&[(80, 80), (1, 5), (6, 9), (3, 4), (65535, 65535)]),
            [(1, 9), (80, 80), (65535, 65535)]
        );
    }
}

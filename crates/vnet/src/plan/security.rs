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
//! judged outbound before it is translated, inbound after. The platform's own connections (from 168.63.129.16, and to it)
//! do not pass here.

use std::collections::BTreeSet;

use ipnet::Ipv4Net;
use linux::nft::{
    Chain, ChainKind, Datum, Element, Family, Field, HookPoint, Reject, Rule, Set, Statement, TCP, Table, UDP, Verdict,
};
use vnet_model::WIRE_SERVER;
use vnet_model::fabric::{NicSpec, SecurityGroupSpec, VnetSpec};
use vnet_model::nsg::{Access, Direction, Peers, SecurityRule, default_rules};

use crate::names::{SECURITY_TABLE, nic_link};

/// Comment of the counting rule for flows that a security group denies.
pub const DENIED: &str = "denied by a security group";

const DENY: &str = "deny";
const VNET_TAG: &str = "virtual-network";
const FRONTENDS: &str = "frontends";

/// The table of `vnet`; without chains if none of its subnets and NICs has a group.
pub fn security(vnet: &VnetSpec) -> Table {
    let mut table = Table::new(Family::Ip, SECURITY_TABLE);
    let ways: Vec<(&NicSpec, Vec<&str>)> = vnet
        .nics
        .iter()
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
    for group in vnet.security_groups.iter().filter(|g| used.contains(g.key.as_str())) {
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
    let outbound = |rule: Rule| rule.vmap([Field::Iifname], word(Direction::Outbound));
    let base = |name: &str, point, priority, rules: Vec<Rule>| {
        let established = [Rule::new().established().accept()];
        let rules: Vec<Rule> = established.into_iter().chain(rules).collect();
        Chain::base(name, ChainKind::Filter, point, priority, rules)
    };
    table.chains.push(base(
        "to-frontends",
        HookPoint::Prerouting,
        -140,
        vec![outbound(Rule::new().in_set([Field::IpDaddr], FRONTENDS))],
    ));
    table.chains.push(base(
        "between",
        HookPoint::Forward,
        10,
        vec![
            outbound(Rule::new().not_in_set([Field::CtOriginalIpDaddr], FRONTENDS)),
            Rule::new().vmap([Field::Oifname], word(Direction::Inbound)),
        ],
    ));
    table.chains.push(base(
        "to-platform",
        HookPoint::Input,
        -10,
        vec![outbound(Rule::new().is_not(Field::IpDaddr, Datum::Ip(WIRE_SERVER)))],
    ));
    table
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
        rules.extend(compile(table, &format!("{name}:{}", rule.priority), rule));
    }
    table.chains.push(Chain::regular(name, rules));
}

/// One or two nft rules; what does not fit into a comparison becomes a set named after `name`.
fn compile(table: &mut Table, name: &str, rule: &SecurityRule) -> Vec<Rule> {
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
    let source = peers(table, &format!("{name}:from"), Field::IpSaddr, &rule.source);
    let destination = peers(table, &format!("{name}:to"), Field::IpDaddr, &rule.destination);
    let source_ports = port_match(table, &format!("{name}:from-ports"), Field::Sport, &rule.source_ports);
    let destination_ports = port_match(
        table,
        &format!("{name}:to-ports"),
        Field::Dport,
        &rule.destination_ports,
    );
    let matches: Vec<Statement> = [destination_ports, source, destination, source_ports]
        .into_iter()
        .flatten()
        .collect();
    let verdict = match rule.access {
        Access::Allow => Verdict::Return,
        Access::Deny => Verdict::goto(DENY),
    };
    protocols
        .into_iter()
        .map(|protocol| {
            let start = protocol.map_or_else(Rule::new, |p| Rule::new().proto(p));
            let filled = matches.iter().cloned().fold(start, Rule::then);
            filled.then(Statement::Verdict(verdict.clone()))
        })
        .collect()
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

fn peers(table: &mut Table, name: &str, field: Field, peers: &Peers) -> Option<Statement> {
    match peers {
        Peers::Any => None,
        Peers::VirtualNetwork => Some(in_set(field, VNET_TAG, false)),
        Peers::Internet => Some(in_set(field, VNET_TAG, true)),
        Peers::AzureLoadBalancer => Some(is(field, Datum::Ip(WIRE_SERVER))),
        Peers::Prefixes(prefixes) => match Ipv4Net::aggregate(prefixes).as_slice() {
            [one] => Some(is(field, Datum::Net(*one))),
            many => {
                let elements = many.iter().map(|n| Element::key([Datum::Net(*n)]));
                table.sets.push(Set::new(name, [field]).intervals().with(elements));
                Some(in_set(field, name, false))
            }
        },
    }
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

//! A second evaluator of security rules, from the documented text alone: rules as strings, addresses as numbers, nothing
//! shared with the product. And random rules in that form, which the product must read the same way.

use std::net::Ipv4Addr;

use stdx::Rng;
use vnet_model::nsg::{
    Access, Direction, Flow, Peers, RuleProtocol, Scope, SecurityRule, denied_by, parse_peers, parse_ports,
};

use crate::common::ip;

/// A rule as a user writes it.
#[derive(Clone, Debug)]
pub struct Written {
    pub priority: u32,
    pub inbound: bool,
    pub allow: bool,
    pub protocol: &'static str,
    pub from: Vec<&'static str>,
    pub from_ports: Vec<&'static str>,
    pub to: Vec<&'static str>,
    pub to_ports: Vec<&'static str>,
}

fn number(dotted: &str) -> u32 {
    dotted
        .split('.')
        .fold(0, |n, part| n << 8 | part.parse::<u32>().unwrap())
}

fn within(address: u32, range: &str) -> bool {
    let (base, length) = range.split_once('/').unwrap_or((range, "32"));
    let shift = 32 - length.parse::<u32>().unwrap();
    shift == 32 || address >> shift == number(base) >> shift
}

/// Whether a flow may pass one group in one direction. `inside` is what the tag VirtualNetwork stands for, `members` the
/// application security groups'.
pub fn passes(rules: &[Written], inbound: bool, inside: &[&str], members: &[(&str, &[Ipv4Addr])], flow: &Flow) -> bool {
    const PLATFORM: &str = "168.63.129.16";
    let (from, to) = (u32::from(flow.source), u32::from(flow.destination));
    let local = |a: u32| within(a, PLATFORM) || inside.iter().any(|r| within(a, r));
    let side = |texts: &[&str], address: u32| {
        texts.iter().any(|text| match *text {
            "*" => true,
            "VirtualNetwork" => local(address),
            "Internet" => !local(address),
            "AzureLoadBalancer" => within(address, PLATFORM),
            named if named.starts_with("asg:") => {
                let group = members.iter().find(|(key, _)| *key == &named[4..]).unwrap();
                group.1.contains(&address.into())
            }
            range => within(address, range),
        })
    };
    let has_ports = flow.protocol == 6 || flow.protocol == 17;
    let port = |texts: &[&str], port: u16| {
        texts.contains(&"*")
            || has_ports
                && texts.iter().any(|text| {
                    let (low, high) = text.split_once('-').unwrap_or((text, text));
                    (low.parse::<u16>().unwrap()..=high.parse().unwrap()).contains(&port)
                })
    };
    let protocol = |text: &str| match text {
        "*" => true,
        "Tcp" => flow.protocol == 6,
        "Udp" => flow.protocol == 17,
        "Icmp" => flow.protocol == 1,
        other => panic!("protocol {other}"),
    };
    let hit = |r: &&Written| {
        r.inbound == inbound
            && protocol(r.protocol)
            && side(&r.from, from)
            && side(&r.to, to)
            && port(&r.from_ports, flow.source_port)
            && port(&r.to_ports, flow.destination_port)
    };
    match rules.iter().filter(hit).min_by_key(|r| r.priority) {
        Some(rule) => rule.allow,
        None if local(from) && local(to) => true,
        None if inbound => within(from, PLATFORM),
        None => !local(to),
    }
}

fn one_of<T: Copy>(rng: &mut Rng, choices: &[T]) -> T {
    choices[rng.below(choices.len() as u64) as usize]
}

fn side(rng: &mut Rng) -> Vec<&'static str> {
    let ranges = [
        "10.1.0.4",
        "10.1.0.5",
        "10.1.0.4/31",
        "10.1.0.0/24",
        "10.1.1.0/24",
        "10.1.0.0/16",
        "0.0.0.0/1",
        "8.8.8.8",
    ];
    let tags = ["VirtualNetwork", "Internet", "AzureLoadBalancer"];
    match rng.below(7) {
        0 => vec!["*"],
        1 => vec![one_of(rng, &tags)],
        2 => vec![one_of(rng, &tags), one_of(rng, &ranges), one_of(rng, &tags)],
        3 => (0..=rng.below(2)).map(|_| one_of(rng, &["asg:x", "asg:y"])).collect(),
        _ => (0..=rng.below(3)).map(|_| one_of(rng, &ranges)).collect(),
    }
}

fn ports(rng: &mut Rng) -> Vec<&'static str> {
    let texts = [
        "53",
        "80",
        "443",
        "70-90",
        "80-1000",
        "1000-3000",
        "0-52",
        "2000",
        "5000-65535",
    ];
    match rng.below(2) {
        0 => vec!["*"],
        _ => (0..=rng.below(3)).map(|_| one_of(rng, &texts)).collect(),
    }
}

/// Up to twelve rules, priorities unique.
pub fn random_rules(rng: &mut Rng) -> Vec<Written> {
    let mut priorities: Vec<u32> = (0..rng.below(13)).map(|n| 100 + n as u32 * 7).collect();
    rng.shuffle(&mut priorities);
    priorities
        .into_iter()
        .map(|priority| Written {
            priority,
            inbound: rng.below(2) == 0,
            allow: rng.below(2) == 0,
            protocol: one_of(rng, &["*", "*", "Udp", "Udp", "Tcp", "Icmp"]),
            from: side(rng),
            from_ports: ports(rng),
            to: side(rng),
            to_ports: ports(rng),
        })
        .collect()
}

/// Application security groups are fields of their own in a rule.
fn read(texts: &[&str]) -> Peers {
    let groups: Vec<String> = texts
        .iter()
        .filter_map(|t| t.strip_prefix("asg:"))
        .map(str::to_owned)
        .collect();
    match groups.is_empty() {
        true => parse_peers(texts).unwrap(),
        false => Peers::ApplicationGroups(groups),
    }
}

/// The same rules as the product reads them.
pub fn parsed(rules: &[Written]) -> Vec<SecurityRule> {
    rules
        .iter()
        .map(|r| SecurityRule {
            name: format!("r{}", r.priority),
            priority: r.priority,
            direction: if r.inbound {
                Direction::Inbound
            } else {
                Direction::Outbound
            },
            access: if r.allow { Access::Allow } else { Access::Deny },
            protocol: match r.protocol {
                "*" => RuleProtocol::Any,
                "Tcp" => RuleProtocol::Tcp,
                "Udp" => RuleProtocol::Udp,
                _ => RuleProtocol::Icmp,
            },
            source: read(&r.from),
            source_ports: parse_ports(&r.from_ports).unwrap(),
            destination: read(&r.to),
            destination_ports: parse_ports(&r.to_ports).unwrap(),
        })
        .collect()
}

#[test]
fn both_evaluators_agree_on_random_rules_and_packets() {
    let inside = ["10.1.0.0/16", "10.9.0.0/16"];
    let addresses = [
        "10.1.0.4",
        "10.1.0.5",
        "10.1.1.4",
        "10.9.7.7",
        "8.8.8.8",
        "168.63.129.16",
        "200.1.1.1",
    ];
    let (x, y) = ([ip("10.1.0.4"), ip("8.8.8.8")], [ip("10.1.1.4"), ip("10.1.0.4")]);
    let members = [("x", &x[..]), ("y", &y[..])];
    let scope = Scope {
        vnet: [&inside[..], &["168.63.129.16/32"]]
            .concat()
            .iter()
            .map(|r| r.parse().unwrap())
            .collect(),
        application_groups: members.iter().map(|(k, m)| ((*k).to_owned(), m.to_vec())).collect(),
    };
    let (mut allowed, mut denied) = (0, 0);
    for seed in 0..300 {
        let rng = &mut Rng::seeded(seed);
        let written = [random_rules(rng), random_rules(rng)];
        let rules = [parsed(&written[0]), parsed(&written[1])];
        for _ in 0..100 {
            let protocol = one_of(rng, &[1, 6, 17, 50]);
            let mut port = || match protocol {
                6 | 17 => one_of(rng, &[0, 53, 80, 81, 443, 1000, 2000, 3001, 65535]),
                _ => 0,
            };
            let (source_port, destination_port) = (port(), port());
            let flow = Flow {
                protocol,
                source: one_of(rng, &addresses).parse().unwrap(),
                source_port,
                destination: one_of(rng, &addresses).parse().unwrap(),
                destination_port,
            };
            let inbound = rng.below(2) == 0;
            let direction = if inbound {
                Direction::Inbound
            } else {
                Direction::Outbound
            };
            let ours = denied_by(&[(direction, &rules[0][..]), (direction, &rules[1][..])], &scope, &flow).is_none();
            let theirs = written.iter().all(|w| passes(w, inbound, &inside, &members, &flow));
            assert_eq!(ours, theirs, "seed {seed}, {direction:?}, {flow:?}: {written:#?}");
            *(if ours { &mut allowed } else { &mut denied }) += 1;
        }
    }
    assert!(allowed > 5_000 && denied > 5_000, "{allowed} allowed, {denied} denied");
}

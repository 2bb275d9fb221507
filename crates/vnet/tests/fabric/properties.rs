//! What holds for every specification: a plan that was applied is there wholly and is not applied again; a change touches
//! what differs and nothing else; whatever a crash left behind is brought to the plan.
//!
//! Specifications are random, by seed: several networks with subnets, NICs with many addresses, groups, route tables,
//! peerings, frontends and public addresses. What of one is not valid is left out by the product's own check.

use std::collections::{BTreeMap, BTreeSet};

use stdx::Rng;
use vnet::{Fabric, NetnsRef, plan};
use vnet_model::Mac;
use vnet_model::fabric::{
    ApplicationGroupSpec, BackendSpec, ClusterServicesSpec, FabricSpec, FrontendSpec, InstanceAddressSpec,
    IpConfigSpec, NatGatewaySpec, NextHop, NicKind, NicSpec, PeerSpec, Protocol, RouteSpec, RouteTableSpec,
    SecurityGroupSpec, SubnetSpec, VnetSpec,
};

use crate::common::*;
use crate::nsg_model::{parsed, random_rules};

const SEEDS: u64 = 4;
const STEPS: usize = 5;

fn one_of<T: Clone>(rng: &mut Rng, choices: &[T]) -> T {
    choices[rng.below(choices.len() as u64) as usize].clone()
}

fn maybe<T: Clone>(rng: &mut Rng, choices: &[T]) -> Option<T> {
    (!choices.is_empty() && rng.below(2) == 0).then(|| one_of(rng, choices))
}

fn prefix(n: usize, subnet: usize, length: u8) -> ipnet::Ipv4Net {
    format!("10.{}.{subnet}.0/{length}", n + 1).parse().unwrap()
}

fn random_vnet(rng: &mut Rng, n: usize) -> VnetSpec {
    let keys = |what: &str, rng: &mut Rng| -> Vec<String> { (0..rng.below(3)).map(|i| format!("{what}{i}")).collect() };
    let (groups, tables, gateways) = (keys("g", rng), keys("t", rng), keys("w", rng));
    let subnets: Vec<SubnetSpec> = (0..1 + rng.below(3) as usize)
        .map(|s| SubnetSpec {
            name: format!("s{s}"),
            prefix: prefix(n, s, 24),
            security_group: maybe(rng, &groups),
            route_table: maybe(rng, &tables),
            nat_gateway: maybe(rng, &gateways),
        })
        .collect();
    let mut v = VnetSpec {
        key: format!("v{n}"),
        prefixes: vec![prefix(n, 0, 16)],
        clusters: vec![ClusterServicesSpec {
            cluster: "c".into(),
            mark: 7,
            dns_service_ip: ip("10.0.0.10"),
            dns_port: 5300,
        }],
        subnets,
        ..VnetSpec::default()
    };
    v.application_groups = ["x", "y"]
        .map(|key| ApplicationGroupSpec {
            key: key.into(),
            members: (10..70)
                .filter(|_| rng.below(9) == 0)
                .map(|a| [10, n as u8 + 1, 0, a].into())
                .collect(),
        })
        .into();
    for i in 0..rng.below(6) {
        let nic = random_nic(rng, n, i as usize, &v, &groups);
        v.nics.push(nic);
    }
    v.security_groups = groups
        .iter()
        .map(|key| SecurityGroupSpec {
            key: key.clone(),
            rules: parsed(&random_rules(rng)),
        })
        .collect();
    v.route_tables = tables
        .iter()
        .map(|key| RouteTableSpec {
            key: key.clone(),
            routes: random_routes(rng, n),
        })
        .collect();
    v.nat_gateways = gateways
        .iter()
        .enumerate()
        .map(|(i, key)| NatGatewaySpec {
            key: key.clone(),
            addresses: vec![format!("198.19.{}.{}", 10 + n, 1 + i).parse().unwrap()],
            idle_timeout_s: 0,
        })
        .collect();
    let addresses: Vec<_> = v.nics.iter().flat_map(|n| n.addresses()).collect();
    if let Some(private) = maybe(rng, &addresses) {
        v.instance_addresses = vec![InstanceAddressSpec {
            public: format!("198.19.{}.99", 10 + n).parse().unwrap(),
            private,
            idle_timeout_s: 240,
        }];
    }
    for port in 0..rng.below(4) as u16 {
        let backends = (0..rng.below(3)).filter_map(|_| maybe(rng, &addresses));
        let backends = backends.map(|address| BackendSpec { address, port: 8080 }).collect();
        let address = one_of(rng, &[format!("198.19.{n}.7"), format!("10.{}.0.200", n + 1)]);
        let protocol = one_of(rng, &[Protocol::Tcp, Protocol::Udp]);
        let mut frontend = FrontendSpec::new(address.parse().unwrap(), protocol, 80 + port, backends);
        frontend.idle_timeout_s = one_of(rng, &[0, 240]);
        frontend.sources = maybe(rng, &["10.0.0.0/8".parse().unwrap()]).into_iter().collect();
        v.frontends.push(frontend);
    }
    v
}

fn random_nic(rng: &mut Rng, n: usize, i: usize, v: &VnetSpec, groups: &[String]) -> NicSpec {
    let key = format!("n{n}-{i}");
    let subnet = one_of(rng, &v.subnets);
    let third = subnet.prefix.network().octets()[2];
    let configs = 1 + rng.below(6) as u8;
    NicSpec {
        mac: Mac::derived(&key),
        subnet: subnet.name,
        ip_configs: (0..configs)
            .map(|c| IpConfigSpec {
                name: format!("c{c}"),
                address: [10, n as u8 + 1, third, 10 + i as u8 * 10 + c].into(),
                primary: c == 0,
            })
            .collect(),
        kind: one_of(
            rng,
            &[
                NicKind::Machine,
                NicKind::Group {
                    cluster: Some("c".into()),
                },
            ],
        ),
        security_group: maybe(rng, groups),
        ip_forwarding: rng.below(4) == 0,
        key,
        ..NicSpec::default()
    }
}

fn random_routes(rng: &mut Rng, n: usize) -> Vec<RouteSpec> {
    let hops = [
        NextHop::VnetLocal,
        NextHop::Internet,
        NextHop::None,
        NextHop::VirtualAppliance([10, n as u8 + 1, 0, 10].into()),
    ];
    let prefixes = [
        "0.0.0.0/0".parse().unwrap(),
        "192.0.2.0/24".parse().unwrap(),
        prefix(n, 1, 24),
        prefix(n, 2, 24),
    ];
    prefixes
        .into_iter()
        .filter(|_| rng.below(2) == 0)
        .collect::<Vec<_>>()
        .into_iter()
        .map(|prefix| RouteSpec {
            prefix,
            next_hop: one_of(rng, &hops),
        })
        .collect()
}

fn random_peers(rng: &mut Rng, spec: &mut FabricSpec) {
    for n in 0..spec.vnets.len() {
        spec.vnets[n].peers.clear();
        for other in 0..spec.vnets.len() {
            if n != other && rng.below(3) > 0 {
                let peer = PeerSpec {
                    vnet: spec.vnets[other].key.clone(),
                    prefixes: spec.vnets[other].prefixes.clone(),
                    access: rng.below(4) > 0,
                    forwarded: rng.below(2) == 0,
                };
                spec.vnets[n].peers.push(peer);
            }
        }
    }
}

fn random_spec(rng: &mut Rng) -> FabricSpec {
    let mut spec = FabricSpec {
        instance: "t".into(),
        vnets: (0..1 + rng.below(3) as usize).map(|n| random_vnet(rng, n)).collect(),
        ..FabricSpec::default()
    };
    random_peers(rng, &mut spec);
    spec.without_mistakes().0
}

/// The spec with one network, NIC, address, rule, backend or peering changed.
fn changed(rng: &mut Rng, spec: &FabricSpec) -> FabricSpec {
    let mut next = spec.clone();
    if next.vnets.is_empty() {
        return random_spec(rng);
    }
    let n = rng.below(next.vnets.len() as u64) as usize;
    let number: usize = next.vnets[n].key[1..].parse().unwrap();
    let v = &mut next.vnets[n];
    match rng.below(8) {
        0 => *v = random_vnet(rng, number),
        1 => drop(v.nics.pop()),
        2 => {
            let groups: Vec<String> = v.security_groups.iter().map(|g| g.key.clone()).collect();
            let nic = random_nic(rng, number, v.nics.len() + 6, &v.clone(), &groups);
            v.nics.push(nic);
        }
        3 => {
            if let Some(nic) = v.nics.first_mut().filter(|n| n.ip_configs.len() > 1) {
                nic.ip_configs.pop();
            }
        }
        4 => {
            if let Some(group) = v.security_groups.first_mut() {
                group.rules = parsed(&random_rules(rng));
            }
        }
        5 => {
            if let Some(frontend) = v.frontends.first_mut() {
                frontend.backends.pop();
            }
        }
        6 => v
            .route_tables
            .iter_mut()
            .for_each(|t| t.routes = random_routes(rng, number)),
        _ => random_peers(rng, &mut next),
    }
    next.without_mistakes().0
}

/// Plugs in NICs that are not, each into a namespace of its own.
fn boot_some(rng: &mut Rng, fabric: &Fabric, spec: &FabricSpec) {
    for nic in spec.vnets.iter().flat_map(|v| &v.nics) {
        let pin = std::path::PathBuf::from(format!("/run/machines/{}", nic.key));
        let there = pin.exists();
        if there || rng.below(3) > 0 {
            linux::netns::create_named(&pin).unwrap();
            fabric.attach(&nic.key, &NetnsRef::Path(pin), "eth0").unwrap();
        }
    }
}

/// What the kernel holds, by namespace: routes, neighbours, rules and rule sets, without what counts by itself.
fn held(fabric: &Fabric, spec: &FabricSpec) -> BTreeMap<String, Vec<String>> {
    let look = || {
        let mut out: Vec<String> = [
            &["-o", "route", "show", "table", "all"][..],
            &["-o", "addr", "show"],
            &["-o", "neigh", "show", "nud", "permanent"],
            &["rule"],
        ]
        .iter()
        .flat_map(|arguments| {
            let text = tool("ip", arguments);
            let mut lines: Vec<String> = text
                .lines()
                .filter(|l| !l.contains("inet6") && !l.contains("fe80") && !l.contains("ff00"))
                // Numbers and lifetimes of links change when they are made again.
                .map(|l| l.split_once(": ").map_or(l, |(_, rest)| rest).to_owned())
                .collect();
            lines.sort();
            lines
        })
        .collect();
        let rules = tool("nft", &["-s", "list", "ruleset"]);
        out.extend(rules.lines().map(str::to_owned));
        out
    };
    let mut out = BTreeMap::from([("host".to_owned(), look())]);
    out.insert("edge".into(), linux::netns::run_in(&fabric.edge_netns(), look).unwrap());
    for v in &spec.vnets {
        let held = linux::netns::run_in(&fabric.vnet_netns(&v.key), look).unwrap();
        out.insert(v.key.clone(), held);
    }
    out
}

/// Compares line by line and says only what differs.
fn assert_same(before: &BTreeMap<String, Vec<String>>, after: &BTreeMap<String, Vec<String>>, place: &str) {
    let lines = |held: &BTreeMap<String, Vec<String>>| -> BTreeSet<String> {
        let all = held
            .iter()
            .flat_map(|(ns, l)| l.iter().map(move |l| format!("{ns}: {l}")));
        all.collect()
    };
    let (a, b) = (lines(before), lines(after));
    let (gone, come): (Vec<_>, Vec<_>) = (a.difference(&b).collect(), b.difference(&a).collect());
    let sorted = |held: &BTreeMap<String, Vec<String>>| -> Vec<Vec<String>> {
        let sort = |lines: &Vec<String>| {
            let mut lines = lines.clone();
            lines.sort();
            lines
        };
        held.values().map(sort).collect()
    };
    // Tables that were made again stand behind the others.
    assert!(
        sorted(before) == sorted(after),
        "{place}: missing {gone:#?}, in the way {come:#?}"
    );
}

#[test]
fn a_plan_that_was_applied_is_not_applied_again_whatever_it_is() {
    on_a_host(|| {
        for seed in 0..SEEDS {
            let rng = &mut Rng::seeded(seed);
            let mut fabric = Fabric::open("t", RUN).unwrap();
            let mut spec = random_spec(rng);
            for step in 0..STEPS {
                let place = || format!("seed {seed}, step {step}: {spec:?}");
                fabric.apply(&spec).unwrap_or_else(|e| panic!("{}: {e:?}", place()));
                boot_some(rng, &fabric, &spec);
                assert_eq!(fabric.apply(&spec).unwrap().changes, 0, "again, {}", place());
                let wrong = vnet::diff("t", RUN.as_ref(), &spec).unwrap();
                assert!(wrong.is_empty(), "{wrong:#?}, {}", place());
                fabric.distrust();
                let compared = fabric.apply(&spec).unwrap().changes;
                assert_eq!(compared, 0, "compared with the kernel, {}", place());
                // By differences or afresh: the kernel holds the same.
                let by_steps = held(&fabric, &spec);
                if rng.below(3) == 0 {
                    fabric = Fabric::open("t", RUN).unwrap();
                    assert_eq!(fabric.apply(&spec).unwrap().changes, 0, "after a restart, {}", place());
                    assert_same(&by_steps, &held(&fabric, &spec), &place());
                }
                spec = changed(rng, &spec);
            }
            vnet::teardown("t", RUN.as_ref()).unwrap();
            let _ = std::fs::remove_dir_all("/run/machines");
        }
    });
}

/// Handles of the tables in a namespace: a table that was made again has a new one.
fn handles(netns: &std::path::Path) -> BTreeMap<String, String> {
    let text = linux::netns::run_in(netns, || tool("nft", &["-a", "list", "tables"])).unwrap();
    text.lines()
        .filter_map(|l| l.split_once(" # handle "))
        .map(|(name, handle)| (name.trim_start_matches("table ").to_owned(), handle.to_owned()))
        .collect()
}

#[test]
fn a_change_touches_only_what_differs() {
    on_a_host(|| {
        let mut by_elements = 0;
        for seed in 100..100 + SEEDS {
            let rng = &mut Rng::seeded(seed);
            let fabric = Fabric::open("t", RUN).unwrap();
            let mut spec = random_spec(rng);
            fabric.apply(&spec).unwrap();
            for _ in 0..STEPS {
                boot_some(rng, &fabric, &spec);
                let next = changed(rng, &spec);
                // Networks and links that come or go are another matter than what they hold.
                let links = |s: &FabricSpec| -> Vec<String> {
                    let keys = s.vnets.iter().map(|v| v.key.clone());
                    let nics = s.vnets.iter().flat_map(|v| v.nics.iter().map(|n| n.key.clone()));
                    let peers = s.peered().iter().map(|(a, b)| format!("{a}={b}")).collect::<Vec<_>>();
                    keys.chain(nics).chain(peers).collect()
                };
                if links(&next) != links(&spec) {
                    fabric.apply(&next).unwrap();
                    spec = next;
                    continue;
                }
                let before: Vec<_> = spec.vnets.iter().map(|v| handles(&fabric.vnet_netns(&v.key))).collect();
                let mut expected = 0;
                for (n, (a, b)) in spec.vnets.iter().zip(&next.vnets).enumerate() {
                    // The slot only shifts an address that does not change here.
                    let (a, b) = (plan::plan_vnet(a, &spec, n as u32), plan::plan_vnet(b, &next, n as u32));
                    expected += operations(&a, &b, &fabric.vnet_netns(&spec.vnets[n].key));
                }
                let slots = spec.vnets.iter().zip(0..).map(|(v, n)| (v.key.clone(), n)).collect();
                let (a, b) = (
                    plan::plan_edge(&spec, &slots, false),
                    plan::plan_edge(&next, &slots, false),
                );
                expected += operations(&a, &b, &fabric.edge_netns());
                let changes = fabric.apply(&next).unwrap().changes;
                assert_eq!(changes, expected, "seed {seed}: {spec:?} to {next:?}");
                for ((n, v), before) in next.vnets.iter().enumerate().zip(before) {
                    let after = handles(&fabric.vnet_netns(&v.key));
                    let (a, b) = (plan::plan_vnet(&spec.vnets[n], &spec, 0), plan::plan_vnet(v, &next, 0));
                    for (a, b) in a.tables.iter().zip(&b.tables) {
                        let name = |h: &BTreeMap<String, String>| {
                            let mut found = h.iter().filter(|(k, _)| k.ends_with(&a.name));
                            let family = |k: &str| match a.family {
                                linux::nft::Family::Ip6 => k.starts_with("ip6 "),
                                linux::nft::Family::Arp => k.starts_with("arp "),
                                _ => k.starts_with("ip "),
                            };
                            found.find(|(k, _)| family(k)).map(|(_, h)| h.clone())
                        };
                        let elements_only = a.chains == b.chains
                            && a.timeouts == b.timeouts
                            && a.sets.len() == b.sets.len()
                            && a.sets.iter().zip(&b.sets).all(|(x, y)| x.name == y.name);
                        if elements_only {
                            assert_eq!(name(&before), name(&after), "{} of {} was made again", a.name, v.key);
                            by_elements += usize::from(a != b);
                        }
                    }
                }
                spec = next;
            }
            vnet::teardown("t", RUN.as_ref()).unwrap();
            let _ = std::fs::remove_dir_all("/run/machines");
        }
        assert!(by_elements > 0, "no seed changed elements alone");
    });
}

/// Requests and tables that lead from one plan to the next: entries on links that are there, each once; a route that only
/// goes elsewhere is one change.
fn operations(a: &plan::NamespacePlan, b: &plan::NamespacePlan, netns: &std::path::Path) -> usize {
    let links = linux::netns::run_in(netns, || tool("ip", &["-o", "link"])).unwrap();
    let names = links.lines().filter_map(|l| l.split(": ").nth(1)?.split('@').next());
    let names: BTreeSet<&str> = names.collect();
    let there = |link: &str| names.contains(link);
    let route = |r: &&plan::PlannedRoute| r.link.as_deref().is_none_or(there);
    let place = |r: &plan::PlannedRoute| (r.table, r.destination);
    let wanted: Vec<_> = b.routes.iter().filter(route).map(place).collect();
    let gone = a.routes.difference(&b.routes).filter(route);
    let gone = gone.filter(|r| !wanted.contains(&place(r))).count();
    let addresses = a
        .addresses
        .symmetric_difference(&b.addresses)
        .filter(|x| there(&x.link));
    let neighbours = a
        .neighbours
        .symmetric_difference(&b.neighbours)
        .filter(|x| there(&x.link));
    gone + b.routes.difference(&a.routes).filter(route).count()
        + a.forwardings.symmetric_difference(&b.forwardings).count()
        + addresses.count()
        + neighbours.count()
        + a.rules.symmetric_difference(&b.rules).count()
        + a.tables.iter().zip(&b.tables).filter(|(x, y)| x != y).count()
}

#[test]
fn whatever_a_crash_left_is_brought_to_the_plan() {
    on_a_host(|| {
        for seed in 200..200 + SEEDS {
            let rng = &mut Rng::seeded(seed);
            let mut spec = random_spec(rng);
            let fabric = Fabric::open("t", RUN).unwrap();
            fabric.apply(&spec).unwrap();
            boot_some(rng, &fabric, &spec);
            fabric.apply(&spec).unwrap();
            let mut lost = 0;
            for _ in 0..STEPS {
                let before = held(&fabric, &spec);
                let plugged = fabric.attached().unwrap();
                // A process that died between its batches left some of them undone, or others' leftovers stand.
                for v in &spec.vnets {
                    lost += linux::netns::run_in(&fabric.vnet_netns(&v.key), || damage(rng)).unwrap();
                }
                lost += linux::netns::run_in(&fabric.edge_netns(), || damage(rng)).unwrap();
                let next = Fabric::open("t", RUN).unwrap();
                next.apply(&spec).unwrap();
                // Ports that went are plugged in again by whoever owns the machine.
                for nic in &plugged {
                    let pin = std::path::PathBuf::from(format!("/run/machines/{nic}"));
                    next.attach(nic, &NetnsRef::Path(pin), "eth0").unwrap();
                }
                assert_eq!(next.apply(&spec).unwrap().changes, 0, "seed {seed}");
                assert_same(&before, &held(&next, &spec), &format!("seed {seed}"));
                spec = changed(rng, &spec);
                fabric.distrust();
                fabric.apply(&spec).unwrap();
                fabric.apply(&spec).unwrap();
            }
            assert!(lost > 0, "seed {seed} damaged nothing");
            vnet::teardown("t", RUN.as_ref()).unwrap();
            let _ = std::fs::remove_dir_all("/run/machines");
        }
    });
}

/// Takes routes, neighbours, rules, tables and links away at random and leaves some of its own; returns how many.
fn damage(rng: &mut Rng) -> usize {
    let mut done = 0;
    let mut try_tool = |program: &str, arguments: &[&str]| {
        let out = std::process::Command::new(program).args(arguments).output().unwrap();
        done += usize::from(out.status.success());
    };
    for line in tool("ip", &["-4", "route", "show", "table", "main"]).lines() {
        if rng.below(6) == 0 && !line.contains("proto kernel") {
            let words: Vec<&str> = line.split_whitespace().filter(|w| *w != "onlink").collect();
            try_tool("ip", &[&["route", "del"], &words[..]].concat());
        }
    }
    for line in tool("ip", &["-4", "neigh", "show", "nud", "permanent"]).lines() {
        if rng.below(6) == 0 {
            let words: Vec<&str> = line.split_whitespace().collect();
            try_tool("ip", &["neigh", "del", words[0], "dev", words[2]]);
        }
    }
    for line in tool("nft", &["list", "tables"]).lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match rng.below(6) {
            0 => try_tool("nft", &["delete", "table", words[1], words[2]]),
            // Of the same name, from somebody else.
            1 => {
                try_tool("nft", &["delete", "table", words[1], words[2]]);
                try_tool("nft", &["add", "table", words[1], words[2]]);
            }
            _ => {}
        }
    }
    for line in tool("ip", &["-o", "link"]).lines() {
        let name = line
            .split(": ")
            .nth(1)
            .unwrap_or_default()
            .split('@')
            .next()
            .unwrap_or_default();
        match rng.below(12) {
            0 if name != "lo" => try_tool("ip", &["link", "del", name]),
            1 if name != "lo" => try_tool("ip", &["link", "set", name, "down"]),
            _ => {}
        }
    }
    if rng.below(2) == 0 {
        try_tool("ip", &["route", "replace", "unreachable", "10.77.0.0/16"]);
        try_tool(
            "ip",
            &[
                "rule",
                "add",
                "priority",
                "10000",
                "fwmark",
                "0x990000/0xffff0000",
                "lookup",
                "1009",
            ],
        );
        try_tool("ip", &["addr", "add", "10.66.0.1/32", "dev", "lo"]);
        try_tool("sysctl", &["-qw", "net.ipv4.ip_forward=0"]);
    }
    done
}

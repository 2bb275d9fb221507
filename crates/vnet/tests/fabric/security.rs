//! Network security groups as machines notice them.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Mutex;

use crate::common::*;
use crate::nsg_model::{Written, parsed, passes, random_rules};
use stdx::Rng;
use vnet::{DENIED, Fabric};
use vnet_model::fabric::{ApplicationGroupSpec, FabricSpec, SecurityGroupSpec};
use vnet_model::nsg::{
    Access, Direction, Flow, Peers, RuleProtocol, SecurityRule, denied_by, parse_peers, parse_ports,
};

fn rule(priority: u32, direction: Direction, access: Access, from: &str, to: &str, ports: &str) -> SecurityRule {
    SecurityRule {
        name: format!("r{priority}"),
        priority,
        direction,
        access,
        protocol: RuleProtocol::Any,
        source: parse_peers(&[from]).unwrap(),
        source_ports: vec![],
        destination: parse_peers(&[to]).unwrap(),
        destination_ports: parse_ports(&[ports]).unwrap(),
    }
}

fn group(key: &str, rules: &[SecurityRule]) -> SecurityGroupSpec {
    SecurityGroupSpec {
        key: key.to_owned(),
        rules: rules.to_vec(),
    }
}

fn denied(answer: Result<String, String>) -> bool {
    match answer {
        Ok(_) => false,
        Err(e) => {
            assert!(e.contains("No route to host"), "{e}");
            true
        }
    }
}

fn start(spec: &FabricSpec) -> Fabric {
    let fabric = Fabric::open("t", RUN).unwrap();
    fabric.apply(spec).unwrap();
    fabric
}

#[test]
fn both_groups_of_a_way_must_allow_and_rules_meet_new_flows_only() {
    use Access::{Allow, Deny};
    use Direction::{Inbound, Outbound};
    on_a_host(|| {
        let mut spec = fabric_spec(&[vnet(
            "v1",
            &[nic("a", "10.1.0.4"), nic("b", "10.1.0.5"), nic("c", "10.1.0.6")],
        )]);
        let fabric = start(&spec);
        let [a, b, c] = ["a", "b", "c"].map(|n| Machine::boot(&fabric, n));
        for m in [&a, &b, &c] {
            m.echo_callers(80);
            m.echo_callers(81);
        }
        let held = b.run(|| std::net::TcpListener::bind("10.1.0.5:90").unwrap());
        let old = a.run(|| std::net::TcpStream::connect("10.1.0.5:90").unwrap());
        let (accepted, _) = held.accept().unwrap();

        // The subnet's group holds inside the subnet too; the NIC's holds for its NIC.
        let v = &mut spec.vnets[0];
        v.security_groups = vec![
            group("subnet", &[rule(100, Inbound, Deny, "*", "*", "80")]),
            group(
                "b",
                &[
                    rule(100, Inbound, Deny, "10.1.0.4", "*", "0-65535"),
                    rule(200, Outbound, Deny, "*", "10.1.0.6", "*"),
                ],
            ),
        ];
        v.nics[1].security_group = Some("b".into());
        fabric.apply(&spec).unwrap();
        assert!(denied(a.ask("10.1.0.5:80")) && denied(a.ask("10.1.0.5:81")));
        assert!(denied(b.ask("10.1.0.6:80")), "outbound");
        assert_eq!(c.ask("10.1.0.5:80").unwrap(), "10.1.0.6");
        assert_eq!(
            b.ask("10.1.0.4:80").unwrap(),
            "10.1.0.5",
            "answers of an allowed flow pass"
        );
        spec.vnets[0].subnets[0].security_group = Some("subnet".into());
        fabric.apply(&spec).unwrap();
        assert!(denied(c.ask("10.1.0.5:80")) && denied(b.ask("10.1.0.4:80")));
        assert_eq!(c.ask("10.1.0.5:81").unwrap(), "10.1.0.6");
        assert_eq!(b.ask("10.1.0.4:81").unwrap(), "10.1.0.5");
        assert!(dropped(&fabric, DENIED) >= 2);

        // The old connection lives on; the platform's own are not judged.
        use std::io::{Read, Write};
        (&old).write_all(b"x").unwrap();
        (&accepted).read_exact(&mut [0]).unwrap();
        let wait = std::time::Duration::from_secs(3);
        fabric.dial("v1", "10.1.0.5:80".parse().unwrap(), wait).unwrap();

        // In place again after a restart of the platform, and gone with the association.
        fabric.distrust();
        assert_eq!(fabric.apply(&spec).unwrap().changes, 0);
        let v = &mut spec.vnets[0];
        v.security_groups.clear();
        (v.subnets[0].security_group, v.nics[1].security_group) = (None, None);
        fabric.apply(&spec).unwrap();
        assert_eq!(a.ask("10.1.0.5:80").unwrap(), "10.1.0.4");
        // Allow as a rule beats a deny behind it.
        spec.vnets[0].security_groups = vec![group(
            "b",
            &[
                rule(4096, Inbound, Deny, "*", "*", "*"),
                rule(100, Inbound, Allow, "10.1.0.6", "10.1.0.5", "80"),
            ],
        )];
        spec.vnets[0].nics[1].security_group = Some("b".into());
        fabric.apply(&spec).unwrap();
        assert!(denied(a.ask("10.1.0.5:80")) && denied(c.ask("10.1.0.5:81")));
        assert_eq!(c.ask("10.1.0.5:80").unwrap(), "10.1.0.6");
    });
}

#[test]
fn a_load_balancers_flows_are_judged_before_and_after_translation() {
    use Access::{Allow, Deny};
    use Direction::{Inbound, Outbound};
    on_a_host(|| {
        let mut v = vnet("v1", &[nic("a", "10.1.0.4"), nic("b", "10.1.0.5")]);
        v.frontends = vec![frontend("198.19.0.10", 80, &[("10.1.0.5", 8080)])];
        v.security_groups = vec![group("b", &[])];
        v.nics[1].security_group = Some("b".into());
        let mut spec = fabric_spec(&[v]);
        let fabric = start(&spec);
        let [a, b] = ["a", "b"].map(|n| Machine::boot(&fabric, n));
        b.echo_callers(8080);
        assert_eq!(a.ask("198.19.0.10:80").unwrap(), "10.1.0.4", "inside the network");
        assert!(
            denied(ask("198.19.0.10:80")),
            "from outside nothing is allowed by default"
        );
        spec.vnets[0].security_groups[0]
            .rules
            .push(rule(100, Inbound, Allow, "Internet", "10.1.0.5", "8080"));
        fabric.apply(&spec).unwrap();
        assert_eq!(ask("198.19.0.10:80").unwrap(), "100.127.192.1");
        // Outbound sees the frontend, not the backend.
        spec.vnets[0]
            .security_groups
            .push(group("a", &[rule(100, Outbound, Deny, "*", "198.19.0.10", "80")]));
        spec.vnets[0].nics[0].security_group = Some("a".into());
        fabric.apply(&spec).unwrap();
        assert!(denied(a.ask("198.19.0.10:80")));
        assert_eq!(a.ask("10.1.0.5:8080").unwrap(), "10.1.0.4");
        spec.vnets[0].security_groups[1].rules = vec![rule(100, Outbound, Deny, "*", "10.1.0.5", "*")];
        fabric.apply(&spec).unwrap();
        assert_eq!(a.ask("198.19.0.10:80").unwrap(), "10.1.0.4");
        assert!(denied(a.ask("10.1.0.5:8080")));
    });
}

const PORTS: [u16; 5] = [53, 80, 443, 1000, 2000];

#[test]
fn the_kernel_agrees_with_both_evaluators_on_random_rules_and_packets() {
    on_a_host(|| {
        let keys = ["a", "b", "c", "d"];
        let addresses = ["10.1.0.4", "10.1.0.5", "10.1.1.4", "10.1.1.5"].map(ip);
        let mut v = vnet("v1", &[]);
        v.subnets.push(vnet_model::fabric::SubnetSpec {
            name: "more".into(),
            prefix: "10.1.1.0/24".parse().unwrap(),
            ..Default::default()
        });
        for (key, address) in keys.iter().zip(addresses) {
            let mut nic = nic(key, &address.to_string());
            nic.subnet = if address.octets()[2] == 0 { "nodes" } else { "more" }.into();
            v.nics.push(nic);
        }
        let mut spec = fabric_spec(&[v]);
        let fabric = start(&spec);
        let machines = keys.map(|n| Machine::boot(&fabric, n));
        let listeners: Vec<Vec<UdpSocket>> = machines
            .iter()
            .map(|m| {
                let open = |p: &u16| {
                    let socket = UdpSocket::bind(("0.0.0.0", *p)).unwrap();
                    socket.set_nonblocking(true).unwrap();
                    socket
                };
                m.run(|| PORTS.iter().map(open).collect())
            })
            .collect();
        let arrived = Mutex::new(std::collections::BTreeSet::new());
        let collect = || {
            for socket in listeners.iter().flatten() {
                let mut buffer = [0; 4];
                while let Ok(4) = socket.recv(&mut buffer) {
                    arrived.lock().unwrap().insert(u32::from_be_bytes(buffer));
                }
            }
            arrived.lock().unwrap().len()
        };
        for seed in 0..12 {
            let rng = &mut Rng::seeded(seed);
            let written: Vec<Vec<Written>> = (0..4).map(|_| random_rules(rng)).collect();
            let v = &mut spec.vnets[0];
            let groups = written.iter().enumerate();
            v.security_groups = groups.map(|(n, w)| group(&format!("g{n}"), &parsed(w))).collect();
            let members = |rng: &mut Rng| addresses.into_iter().filter(|_| rng.below(2) == 0).collect();
            v.application_groups = ["x", "y"]
                .map(|key| ApplicationGroupSpec {
                    key: key.into(),
                    members: members(rng),
                })
                .into();
            let pick = |rng: &mut Rng| match rng.below(5) {
                4 => None,
                n => Some(format!("g{n}")),
            };
            v.subnets.iter_mut().for_each(|s| s.security_group = pick(rng));
            v.nics.iter_mut().for_each(|n| n.security_group = pick(rng));
            fabric.apply(&spec).unwrap();
            // Flows that were let through must not count as old ones.
            let ns = linux::netns::open(&fabric.vnet_netns("v1")).unwrap();
            linux::conntrack::Conntrack::open_in(&ns)
                .unwrap()
                .forget(&addresses.into())
                .unwrap();
            arrived.lock().unwrap().clear();
            let before = dropped(&fabric, DENIED);
            let v = &spec.vnets[0];
            let rules = |key: &str| v.security_group(key).unwrap().rules.as_slice();
            let mut wanted = std::collections::BTreeSet::new();
            let mut total = 0;
            for (from, machine) in machines.iter().enumerate() {
                let sends: Vec<(usize, u16, u16)> = (0..24)
                    .map(|_| {
                        (
                            rng.below(4) as usize,
                            PORTS[rng.below(5) as usize],
                            5000 + total as u16 + rng.below(9000) as u16,
                        )
                    })
                    .filter(|(to, ..)| *to != from)
                    .collect();
                let mut seen = std::collections::BTreeSet::new();
                let sends: Vec<_> = sends.into_iter().filter(|s| seen.insert(*s)).collect();
                for (to, port, source_port) in sends {
                    let flow = Flow {
                        protocol: 17,
                        source: addresses[from],
                        source_port,
                        destination: addresses[to],
                        destination_port: port,
                    };
                    let of = |n: usize, direction| {
                        let nic = &v.nics[n];
                        let subnet = v.subnet(&nic.subnet).unwrap().security_group.as_deref();
                        subnet
                            .into_iter()
                            .chain(nic.security_group.as_deref())
                            .map(|key| (direction, rules(key)))
                            .collect::<Vec<_>>()
                    };
                    let way = [of(from, Direction::Outbound), of(to, Direction::Inbound)].concat();
                    let id: u32 = total;
                    total += 1;
                    let ours = denied_by(&way, &v.scope(), &flow).is_none();
                    let named = v
                        .application_groups
                        .iter()
                        .map(|g| (g.key.as_str(), g.members.as_slice()));
                    let theirs = [(from, false), (to, true)].iter().all(|(n, inbound)| {
                        let nic = &v.nics[*n];
                        let subnet = v.subnet(&nic.subnet).unwrap().security_group.as_deref();
                        subnet.into_iter().chain(nic.security_group.as_deref()).all(|key| {
                            let rules = &written[key[1..].parse::<usize>().unwrap()];
                            passes(
                                rules,
                                *inbound,
                                &["10.1.0.0/16"],
                                &named.clone().collect::<Vec<_>>(),
                                &flow,
                            )
                        })
                    });
                    assert_eq!(ours, theirs, "seed {seed}, {flow:?}");
                    if ours {
                        wanted.insert(id);
                    }
                    machine.run(|| {
                        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, source_port)).unwrap();
                        socket.send_to(&id.to_be_bytes(), (addresses[to], port)).unwrap();
                    });
                }
            }
            wait_for("every packet to arrive or to be denied", || {
                (dropped(&fabric, DENIED) - before) as usize + collect() >= total as usize
            });
            assert_eq!(*arrived.lock().unwrap(), wanted, "seed {seed}: {:#?}", spec.vnets[0]);
            assert!(!wanted.is_empty() || seed > 0);
        }
    });
}

#[test]
fn members_of_an_application_group_come_and_go() {
    use Access::{Allow, Deny};
    use Direction::Inbound;
    on_a_host(|| {
        let mut v = vnet(
            "v1",
            &[nic("a", "10.1.0.4"), nic("b", "10.1.0.5"), nic("c", "10.1.0.6")],
        );
        let mut allow = rule(100, Inbound, Allow, "*", "*", "80");
        allow.source = Peers::ApplicationGroups(vec!["web".into()]);
        allow.destination = Peers::ApplicationGroups(vec!["db".into()]);
        v.security_groups = vec![group(
            "g",
            &[allow, rule(200, Inbound, Deny, "VirtualNetwork", "*", "*")],
        )];
        v.subnets[0].security_group = Some("g".into());
        let members = |key: &str, members: &[&str]| ApplicationGroupSpec {
            key: key.into(),
            members: members.iter().map(|m| ip(m)).collect(),
        };
        v.application_groups = vec![members("web", &["10.1.0.4"]), members("db", &["10.1.0.6"])];
        let mut spec = fabric_spec(&[v]);
        let fabric = start(&spec);
        let [a, b, c] = ["a", "b", "c"].map(|n| Machine::boot(&fabric, n));
        b.echo_callers(80);
        c.echo_callers(80);
        assert_eq!(a.ask("10.1.0.6:80").unwrap(), "10.1.0.4");
        assert!(denied(b.ask("10.1.0.6:80")) && denied(a.ask("10.1.0.5:80")));
        spec.vnets[0].application_groups = vec![members("web", &["10.1.0.5"]), members("db", &["10.1.0.6"])];
        fabric.apply(&spec).unwrap();
        assert_eq!(b.ask("10.1.0.6:80").unwrap(), "10.1.0.5");
        assert!(denied(a.ask("10.1.0.6:80")), "no member any more");
        spec.vnets[0].application_groups.clear();
        fabric.apply(&spec).unwrap();
        assert!(denied(b.ask("10.1.0.6:80")), "a group without members is nobody");
    });
}

#[test]
fn platform_services_are_denied_only_by_their_tags() {
    use Access::{Allow, Deny};
    use Direction::Outbound;
    on_a_host(|| {
        let mut v = vnet("v1", &[nic("a", "10.1.0.4"), nic("b", "10.1.0.5")]);
        v.security_groups = vec![group("g", &[rule(100, Outbound, Deny, "*", "*", "*")])];
        v.nics[0].security_group = Some("g".into());
        let mut spec = fabric_spec(&[v]);
        let fabric = start(&spec);
        let runtime = runtime();
        fabric.serve(runtime.handle());
        fabric.apply(&spec).unwrap();
        let [a, b] = ["a", "b"].map(|n| Machine::boot(&fabric, n));
        assert_eq!(
            a.run(|| resolve("b")),
            (0, vec![ip("10.1.0.5").into()]),
            "rules about all are not about the platform"
        );
        let named = |access, tag| rule(300, Outbound, access, "*", tag, "*");
        spec.vnets[0].security_groups[0]
            .rules
            .push(named(Deny, "AzurePlatformDNS"));
        fabric.apply(&spec).unwrap();
        let mute = a.run(|| std::net::TcpStream::connect("168.63.129.16:53").unwrap_err());
        assert!(mute.to_string().contains("No route to host"), "{mute}");
        assert!(
            a.run(|| std::net::TcpStream::connect("168.63.129.16:80").is_ok()),
            "the wire server is no DNS"
        );
        assert_eq!(b.run(|| resolve("a")).0, 0, "the other machine has no group");
        let mut first = named(Allow, "AzurePlatformDNS");
        first.priority = 200;
        spec.vnets[0].security_groups[0].rules.push(first);
        fabric.apply(&spec).unwrap();
        assert_eq!(a.run(|| resolve("b")).0, 0);
    });
}

#[test]
fn a_group_that_is_not_there_or_not_valid_is_refused_and_leaves_nothing_open() {
    on_a_host(|| {
        let mut v = vnet("v1", &[nic("a", "10.1.0.4"), nic("b", "10.1.0.5")]);
        v.nics[1].security_group = Some("absent".into());
        let fabric = Fabric::open("t", RUN).unwrap();
        let refused = fabric.apply(&fabric_spec(&[v.clone()])).unwrap_err();
        assert!(matches!(&refused, vnet::Error::Spec(e) if e.code() == "InvalidResourceReference"));
        // Without the others' mistakes the NIC is left out, not left open.
        let (good, errors) = fabric_spec(&[v.clone()]).without_mistakes();
        assert_eq!((good.vnets[0].nics.len(), errors.len()), (1, 1));
        v.nics[1].security_group = None;
        let twice = rule(100, Direction::Inbound, Access::Deny, "*", "*", "*");
        v.security_groups = vec![group("g", &[twice.clone(), twice])];
        let refused = fabric.apply(&fabric_spec(&[v])).unwrap_err();
        assert!(
            matches!(&refused, vnet::Error::Spec(e) if e.code() == "SecurityRuleConflict"),
            "{refused:?}"
        );
    });
}

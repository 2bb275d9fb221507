//! Real traffic between fake machines on a host of their own.

mod balancing;
mod common;
mod hosts;
mod matrix;
mod names;
mod nsg_model;
mod peering;
mod properties;
mod public;
mod routing;
mod security;
mod sites;
mod spoofing;

use std::time::Duration;

use common::*;
use vnet::{Error, Fabric, NetnsRef, teardown};
use vnet_model::fabric::{
    ClusterServicesSpec, DnsRecord, FabricSpec, IpConfigSpec, NicKind, SubnetSpec, Uplink, VnetSpec,
};

fn open() -> Fabric {
    Fabric::open("t", RUN).unwrap()
}

fn two_machines() -> (Fabric, FabricSpec, Machine, Machine) {
    let fabric = open();
    let spec = fabric_spec(&[vnet("v1", &[nic("a", "10.1.0.4"), nic("b", "10.1.0.5")])]);
    fabric.apply(&spec).unwrap();
    let (a, b) = (Machine::boot(&fabric, "a"), Machine::boot(&fabric, "b"));
    (fabric, spec, a, b)
}

#[test]
fn machines_of_one_network_reach_each_other_and_nothing_needs_arp() {
    on_a_host(|| {
        let (fabric, _, a, b) = two_machines();
        b.echo_callers(80);
        assert_eq!(a.ask("10.1.0.5:80").unwrap(), "10.1.0.4");
        assert!(a.ip(&["addr", "show", "eth0"]).contains("10.1.0.4/24"));
        assert!(a.ip(&["route"]).contains("default via 10.1.0.1 dev eth0"));
        let neighbours = a.ip(&["neigh"]);
        assert_eq!(
            neighbours.trim(),
            "10.1.0.1 dev eth0 lladdr 12:34:56:78:9a:bc PERMANENT"
        );
        let refused = a.ask("10.1.7.7:80").unwrap_err();
        assert!(refused.contains("No route to host"), "{refused}");
        let mut attached = fabric.attached().unwrap();
        attached.sort();
        assert_eq!(attached, ["a", "b"]);
        fabric.detach("b").unwrap();
        fabric.detach("b").unwrap();
        assert!(!b.ip(&["link"]).contains("eth0"));
    });
}

#[test]
fn a_pods_address_behind_a_machine_is_routed_to_it() {
    on_a_host(|| {
        let fabric = open();
        let mut b = nic("b", "10.1.0.5");
        b.ip_configs.push(IpConfigSpec {
            name: "pod".into(),
            address: ip("10.1.0.9"),
            primary: false,
        });
        fabric
            .apply(&fabric_spec(&[vnet("v1", &[nic("a", "10.1.0.4"), b])]))
            .unwrap();
        let (a, b) = (Machine::boot(&fabric, "a"), Machine::boot(&fabric, "b"));
        b.ip(&["addr", "add", "10.1.0.9/32", "dev", "lo"]);
        b.echo_callers(80);
        assert_eq!(a.ask("10.1.0.9:80").unwrap(), "10.1.0.4");
        let out = b.run(|| {
            let socket = std::net::UdpSocket::bind("10.1.0.9:0").unwrap();
            socket.send_to(b"x", "10.1.0.4:9").unwrap()
        });
        assert_eq!((out, dropped(&fabric, vnet::SPOOFED)), (1, 0));
    });
}

#[test]
fn a_forged_source_is_dropped_and_counted() {
    on_a_host(|| {
        let (fabric, _, a, _b) = two_machines();
        a.ip(&["addr", "add", "10.1.0.77/32", "dev", "lo"]);
        a.run(|| {
            let forged = std::net::UdpSocket::bind("10.1.0.77:0").unwrap();
            forged.send_to(b"x", "10.1.0.5:9").unwrap();
            forged.send_to(b"x", "168.63.129.16:53").unwrap();
        });
        wait_for("two drops", || dropped(&fabric, vnet::SPOOFED) == 2);
    });
}

#[test]
fn networks_with_equal_ranges_do_not_notice_each_other() {
    on_a_host(|| {
        let fabric = open();
        let spec = fabric_spec(&[
            vnet("v1", &[nic("a1", "10.1.0.4"), nic("b1", "10.1.0.5")]),
            vnet("v2", &[nic("a2", "10.1.0.4"), nic("c2", "10.1.0.6")]),
        ]);
        fabric.apply(&spec).unwrap();
        let [a1, b1, a2, c2] = ["a1", "b1", "a2", "c2"].map(|n| Machine::boot(&fabric, n));
        b1.echo_callers(80);
        c2.echo_callers(80);
        assert_eq!(a1.ask("10.1.0.5:80").unwrap(), "10.1.0.4");
        assert_eq!(a2.ask("10.1.0.6:80").unwrap(), "10.1.0.4");
        assert!(a2.ask("10.1.0.5:80").is_err());
        assert!(a1.ask("10.1.0.6:80").is_err());
        // Nor by the other's transit address or the edge's and host's.
        for last in 1..=5 {
            assert!(a1.ask(&format!("100.127.192.{last}:80")).is_err());
        }
    });
}

#[test]
fn a_frontend_leads_to_ready_backends_and_keeps_the_client() {
    on_a_host(|| {
        let fabric = open();
        let mut spec = fabric_spec(&[
            vnet(
                "v1",
                &[nic("a", "10.1.0.4"), nic("b", "10.1.0.5"), nic("c", "10.1.0.6")],
            ),
            vnet("v2", &[nic("z", "10.1.0.4")]),
        ]);
        spec.vnets[0].frontends = vec![
            frontend("198.19.0.10", 80, &[("10.1.0.4", 8080), ("10.1.0.5", 8080)]),
            frontend("198.19.0.10", 81, &[]),
        ];
        fabric.apply(&spec).unwrap();
        let [a, b, c, z] = ["a", "b", "c", "z"].map(|n| Machine::boot(&fabric, n));
        a.echo_callers(8080);
        b.echo_callers(8080);
        // From the host, from inside the network, and from another one (as its outward address).
        assert_eq!(ask("198.19.0.10:80").unwrap(), "100.127.192.1");
        assert_eq!(c.ask("198.19.0.10:80").unwrap(), "10.1.0.6");
        assert_eq!(z.ask("198.19.0.10:80").unwrap(), "100.127.192.5");
        let refused = ask("198.19.0.10:81").unwrap_err();
        assert!(refused.contains("refused"), "{refused}");
        let nowhere = ask("198.19.0.10:82").unwrap_err();
        assert!(nowhere.contains("No route"), "{nowhere}");
        assert!(ask("198.19.0.99:80").unwrap_err().contains("No route"));
        // A backend that is taken out gets no connection any more.
        fabric.detach("a").unwrap();
        spec.vnets[0].frontends[0].backends.remove(0);
        assert!(fabric.apply(&spec).unwrap().changes > 0);
        for _ in 0..20 {
            assert_eq!(ask("198.19.0.10:80").unwrap(), "100.127.192.1");
        }
    });
}

#[test]
fn an_endpoint_of_the_pool_is_reached_from_the_host_and_from_every_network() {
    on_a_host(|| {
        let fabric = open();
        let mut spec = fabric_spec(&[vnet("v1", &[nic("a", "10.1.0.4")])]);
        spec.edge.endpoints = vec![ip("198.19.0.1")];
        fabric.apply(&spec).unwrap();
        let a = Machine::boot(&fabric, "a");
        let listener = fabric
            .listen_in(&fabric.edge_netns(), "198.19.0.1:443".parse().unwrap())
            .unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let peer = stream.peer_addr().unwrap().ip().to_string();
                let _ = std::io::Write::write_all(&mut stream, peer.as_bytes());
            }
        });
        assert_eq!(ask("198.19.0.1:443").unwrap(), "100.127.192.1");
        assert_eq!(a.ask("198.19.0.1:443").unwrap(), "100.127.192.4");
        assert!(a.ask("198.19.0.1:444").unwrap_err().contains("refused"));
    });
}

#[test]
fn the_wire_server_and_dns_know_their_caller() {
    on_a_host(|| {
        let runtime = runtime();
        let (fabric, mut spec, a, b) = two_machines();
        fabric.serve(runtime.handle());
        spec.vnets[0].dns.suffix = "internal.test".into();
        spec.vnets[0].dns.records = vec![DnsRecord {
            name: "api.example".into(),
            addresses: vec![ip("198.19.0.1")],
        }];
        let mut other = vnet("v2", &[nic("elsewhere", "10.1.0.7")]);
        other.dns.suffix = "internal.test".into();
        spec.vnets.push(other);
        fabric.apply(&spec).unwrap();
        let path = vnet_model::interfaces::PATH_AND_QUERY;
        for (machine, address) in [(&a, "10.1.0.4"), (&b, "10.1.0.5")] {
            let answer = machine.run(|| get("168.63.129.16:80", path));
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            let xml = answer.split("\r\n\r\n").nth(1).unwrap();
            let parsed = vnet_model::interfaces::Interfaces::parse(xml).unwrap();
            let subnet = &parsed.interfaces[0].subnets[0];
            assert_eq!(subnet.addresses[0].address, ip(address));
            assert_eq!(subnet.prefix.to_string(), "10.1.0.0/24");
        }
        assert!(a.run(|| get("168.63.129.16:80", "/")).starts_with("HTTP/1.1 404"));
        for name in ["b", "B.Internal.Test", "b.internal.test"] {
            assert_eq!(
                a.run(|| resolve(name)),
                (0, vec!["10.1.0.5".parse().unwrap()]),
                "{name}"
            );
        }
        assert_eq!(a.run(|| resolve_by_stream("b")), (0, vec!["10.1.0.5".parse().unwrap()]));
        assert_eq!(
            a.run(|| resolve("api.example")).1,
            ["198.19.0.1".parse::<std::net::IpAddr>().unwrap()]
        );
        for name in ["elsewhere.internal.test", "elsewhere", "example.org"] {
            assert_eq!(a.run(|| resolve(name)), (3, vec![]), "{name}");
        }
    });
}

#[test]
fn the_platform_dials_into_a_network_from_the_fabrics_address() {
    on_a_host(|| {
        let (fabric, _, a, _b) = two_machines();
        a.echo_callers(10250);
        let mut stream = fabric
            .dial("v1", "10.1.0.4:10250".parse().unwrap(), Duration::from_secs(3))
            .unwrap();
        let mut text = String::new();
        std::io::Read::read_to_string(&mut stream, &mut text).unwrap();
        assert_eq!(text, "168.63.129.16");
        let refused = fabric.dial("v1", "10.1.0.4:1".parse().unwrap(), Duration::from_secs(3));
        assert!(matches!(refused, Err(Error::Dial { .. })));
        assert!(matches!(
            fabric.dial("v9", "10.1.0.4:1".parse().unwrap(), Duration::from_secs(3)),
            Err(Error::UnknownVnet { .. })
        ));
        runtime().block_on(async {
            let stream = fabric
                .dial_async("v1", "10.1.0.4:10250".parse().unwrap())
                .await
                .unwrap();
            assert_eq!(stream.local_addr().unwrap().ip().to_string(), "168.63.129.16");
            assert!(fabric.dial_async("v1", "10.1.0.4:1".parse().unwrap()).await.is_err());
        });
    });
}

#[test]
fn a_second_apply_changes_nothing_in_this_process_and_in_the_next() {
    on_a_host(|| {
        let (fabric, mut spec, a, b) = two_machines();
        spec.vnets.push(vnet("v2", &[nic("z", "10.1.0.4")]));
        spec.vnets[0].frontends = vec![frontend("198.19.0.10", 80, &[("10.1.0.5", 8080)])];
        assert!(fabric.apply(&spec).unwrap().changes > 0);
        assert_eq!(fabric.apply(&spec).unwrap().changes, 0);
        fabric.distrust();
        assert_eq!(fabric.apply(&spec).unwrap().changes, 0);
        drop(fabric);
        let next = open();
        let report = next.apply(&spec).unwrap();
        assert_eq!(
            (report.changes, report.vnets, next.attached().unwrap().len()),
            (0, 2, 2)
        );
        b.echo_callers(8080);
        assert_eq!(a.ask("198.19.0.10:80").unwrap(), "10.1.0.4");
        // A network keeps its outward address when an earlier one goes; a machine's NIC goes with its spec.
        spec.vnets[0].nics.remove(0);
        next.apply(&spec).unwrap();
        assert!(!a.ip(&["link"]).contains("eth0"));
        spec.vnets.remove(0);
        next.apply(&spec).unwrap();
        assert!(tool("nft", &["list", "ruleset"]).contains("oaks-t"));
        let links = linux::netns::run_in(&next.vnet_netns("v2"), || tool("ip", &["addr"])).unwrap();
        assert!(links.contains("100.127.192.5/32"), "{links}");
        assert!(!next.vnet_netns("v1").exists());
    });
}

#[test]
fn attaching_twice_is_fine_and_a_nic_can_move() {
    on_a_host(|| {
        let (fabric, _, a, b) = two_machines();
        fabric.attach("a", &NetnsRef::Path(a.pin.clone()), "eth0").unwrap();
        assert!(matches!(
            fabric.attach("b", &NetnsRef::Path(a.pin.clone()), "eth0"),
            Err(Error::LinkTaken { .. })
        ));
        assert!(matches!(
            fabric.attach("a", &NetnsRef::Path(a.pin.clone()), "name-far-too-long"),
            Err(Error::LinkName { .. })
        ));
        assert!(matches!(
            fabric.attach("x", &NetnsRef::Path(a.pin.clone()), "eth1"),
            Err(Error::UnknownNic { .. })
        ));
        b.ip(&["link", "del", "eth0"]);
        fabric.attach("a", &NetnsRef::Path(b.pin.clone()), "eth0").unwrap();
        assert!(!a.ip(&["link"]).contains("eth0"));
        fabric.attach("b", &NetnsRef::Path(a.pin.clone()), "eth0").unwrap();
        b.echo_callers(80);
        assert_eq!(a.ask("10.1.0.4:80").unwrap(), "10.1.0.5");
    });
}

#[test]
fn teardown_leaves_the_host_as_it_was() {
    on_a_host(|| {
        tool("ip", &["link", "add", "up0", "type", "veth", "peer", "name", "up1"]);
        tool("ip", &["addr", "add", "192.0.2.1/24", "dev", "up0"]);
        tool("ip", &["link", "set", "up0", "up"]);
        tool("ip", &["link", "set", "up1", "up"]);
        tool("nft", &["add", "table", "ip", "somebody-elses"]);
        tool(
            "ip",
            &[
                "neigh",
                "replace",
                "192.0.2.2",
                "lladdr",
                "02:00:00:00:00:02",
                "dev",
                "up0",
                "nud",
                "permanent",
            ],
        );
        let forwarding = || std::fs::read_to_string("/proc/sys/net/ipv4/conf/up0/forwarding").unwrap();
        let before = stable_world();
        let (fabric, mut spec, a, _b) = two_machines();
        spec.edge.uplink = Uplink::Link("up0".into());
        fabric.apply(&spec).unwrap();
        assert_eq!(forwarding(), "1\n");
        assert_eq!(fabric.apply(&spec).unwrap().changes, 0);
        assert_ne!(stable_world(), before);
        let runtime = runtime();
        fabric.serve(runtime.handle());
        // As after kill -9: the fabric is still there, its sockets are open.
        teardown("t", RUN.as_ref()).unwrap();
        assert_eq!(stable_world(), before);
        assert_eq!(forwarding(), "0\n");
        assert!(!a.ip(&["link"]).contains("eth0"));
        assert!(!std::path::Path::new(RUN).join("netns").exists());
        teardown("t", RUN.as_ref()).unwrap();
    });
}

/// The world without what ages by itself: link-local addresses being checked for duplicates.
fn stable_world() -> Vec<String> {
    let mut last = world();
    wait_for("the world to be still", || {
        let now = world();
        let still = now == last && !now.iter().any(|t| t.contains("tentative"));
        last = now;
        still
    });
    last
}

#[test]
fn outward_traffic_is_translated_to_the_uplink_and_only_with_one() {
    on_a_host(|| {
        let outside = linux::netns::create_named("/run/outside".as_ref()).unwrap();
        tool("ip", &["link", "add", "up0", "type", "veth", "peer", "name", "world"]);
        tool("ip", &["link", "set", "world", "netns", "/run/outside"]);
        tool("ip", &["addr", "add", "192.0.2.1/24", "dev", "up0"]);
        tool("ip", &["link", "set", "up0", "up"]);
        tool("ip", &["route", "add", "default", "via", "192.0.2.9"]);
        outside
            .run(|| {
                tool("ip", &["addr", "add", "192.0.2.9/24", "dev", "world"]);
                tool("ip", &["link", "set", "world", "up"]);
            })
            .unwrap();
        let server = Machine {
            pin: "/run/outside".into(),
        };
        server.echo_callers(80);
        let (fabric, mut spec, a, _b) = two_machines();
        assert!(a.ask("192.0.2.9:80").is_err());
        spec.edge.uplink = Uplink::Auto;
        fabric.apply(&spec).unwrap();
        assert_eq!(a.ask("192.0.2.9:80").unwrap(), "192.0.2.1");
        // The host itself is not for virtual networks, and the outside does not get in through the host.
        let listener = std::net::TcpListener::bind("0.0.0.0:8080").unwrap();
        assert!(a.ask("192.0.2.1:8080").is_err());
        drop(listener);
        server.ip(&["route", "add", "100.127.192.0/18", "via", "192.0.2.1"]);
        assert!(server.ask("100.127.192.4:80").is_err());
        spec.edge.uplink = Uplink::None;
        fabric.apply(&spec).unwrap();
        assert!(a.ask("192.0.2.9:80").is_err());
        assert_eq!(
            std::fs::read_to_string("/proc/sys/net/ipv4/conf/up0/forwarding").unwrap(),
            "0\n"
        );
    });
}

#[test]
fn group_ports_carry_their_clusters_mark_and_find_its_dns() {
    on_a_host(|| {
        let fabric = open();
        let cluster = |name: &str, mark, dns_port| ClusterServicesSpec {
            cluster: name.into(),
            mark,
            dns_service_ip: ip("10.0.0.10"),
            dns_port,
        };
        let group = |key: &str, address: &str, cluster: &str| {
            let mut nic = nic(key, address);
            nic.kind = NicKind::Group {
                cluster: Some(cluster.into()),
            };
            nic
        };
        let mut v = vnet(
            "v1",
            &[
                group("g1", "10.1.0.4", "one"),
                group("g2", "10.1.0.5", "two"),
                nic("m", "10.1.0.6"),
            ],
        );
        v.clusters = vec![cluster("one", 1, 5301), cluster("two", 2, 5302)];
        fabric.apply(&fabric_spec(&[v])).unwrap();
        let [g1, g2, m] = ["g1", "g2", "m"].map(|n| Machine::boot(&fabric, n));
        for (port, name) in [(5301, "one"), (5302, "two")] {
            let at = format!("168.63.129.16:{port}").parse().unwrap();
            let listener = fabric.listen_in(&fabric.vnet_netns("v1"), at).unwrap();
            std::thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    let _ = std::io::Write::write_all(&mut stream, name.as_bytes());
                }
            });
        }
        assert_eq!(g1.ask("10.0.0.10:53").unwrap(), "one");
        assert_eq!(g2.ask("10.0.0.10:53").unwrap(), "two");
        assert!(m.ask("10.0.0.10:53").is_err());
    });
}

#[test]
fn bad_ranges_are_refused_before_anything_is_made() {
    on_a_host(|| {
        let fabric = open();
        let code = |change: &dyn Fn(&mut VnetSpec)| {
            let mut spec = fabric_spec(&[vnet("v1", &[])]);
            change(&mut spec.vnets[0]);
            match fabric.apply(&spec) {
                Err(Error::Spec(e)) => e.code(),
                other => panic!("{other:?}"),
            }
        };
        let subnet = |name: &str, prefix: &str| SubnetSpec {
            name: name.into(),
            prefix: prefix.parse().unwrap(),
            ..SubnetSpec::default()
        };
        assert_eq!(
            code(&|v| v.subnets.push(subnet("x", "10.1.0.128/25"))),
            "NetcfgSubnetRangesOverlap"
        );
        assert_eq!(
            code(&|v| v.subnets.push(subnet("x", "10.1.9.0/30"))),
            "NetcfgInvalidSubnet"
        );
        assert_eq!(
            code(&|v| v.prefixes[0] = "198.19.0.0/24".parse().unwrap()),
            "AddressPrefixStringCannotBeReserved"
        );
        tool("ip", &["route", "add", "unreachable", "198.19.4.0/24"]);
        let taken = fabric.apply(&fabric_spec(&[vnet("v1", &[])]));
        assert!(matches!(taken, Err(Error::RouteTaken { .. })), "{taken:?}");
        assert!(!std::path::Path::new(RUN).exists());
    });
}

#[test]
fn a_local_address_is_reached_by_the_networks_machines_and_by_the_platform() {
    on_a_host(|| {
        let fabric = open();
        let mut v1 = vnet("v1", &[nic("a", "10.1.0.4")]);
        v1.local = vec![ip("10.1.0.20")];
        let spec = fabric_spec(&[v1, vnet("v2", &[nic("z", "10.1.0.4")])]);
        fabric.apply(&spec).unwrap();
        let (a, z) = (Machine::boot(&fabric, "a"), Machine::boot(&fabric, "z"));
        let here = Machine {
            pin: fabric.vnet_netns("v1"),
        };
        here.echo_callers(10250);
        assert_eq!(a.ask("10.1.0.20:10250").unwrap(), "10.1.0.4");
        assert!(z.ask("10.1.0.20:10250").is_err());
        let mut text = String::new();
        let mut stream = fabric
            .dial("v1", "10.1.0.20:10250".parse().unwrap(), Duration::from_secs(3))
            .unwrap();
        std::io::Read::read_to_string(&mut stream, &mut text).unwrap();
        assert_eq!(text, "168.63.129.16");
        // The namespace's other addresses stay closed to machines.
        assert!(a.ask("168.63.129.16:10250").is_err());
    });
}

#[test]
fn an_offline_host_has_no_uplink_and_that_is_fine() {
    on_a_host(|| {
        let fabric = open();
        let mut spec = fabric_spec(&[vnet("v1", &[])]);
        spec.edge.uplink = Uplink::Auto;
        assert_eq!(fabric.apply(&spec).unwrap().uplink, None);
        spec.edge.uplink = Uplink::Link("absent".into());
        assert!(matches!(fabric.apply(&spec), Err(Error::NoUplink { .. })));
    });
}

#[test]
fn other_names_are_asked_from_the_hosts_resolver() {
    on_a_host(|| {
        let runtime = runtime();
        let (fabric, mut spec, a, _b) = two_machines();
        fabric.serve(runtime.handle());
        // A resolver of the host that knows one address for every name.
        let resolver = std::net::UdpSocket::bind("127.0.0.1:53").unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((length, peer)) = resolver.recv_from(&mut buffer) {
                let mut reply = buffer[..length].to_vec();
                (reply[2], reply[3], reply[7]) = (0x81, 0x80, 1);
                reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 80]);
                resolver.send_to(&reply, peer).unwrap();
            }
        });
        spec.edge.resolvers = vec!["127.0.0.1".parse().unwrap()];
        fabric.apply(&spec).unwrap();
        assert_eq!(
            a.run(|| resolve("example.org")),
            (0, vec!["192.0.2.80".parse().unwrap()])
        );
        assert_eq!(a.run(|| resolve("b")), (0, vec!["10.1.0.5".parse().unwrap()]));
        // One that does not listen: the failure comes at once.
        spec.edge.resolvers = vec!["127.0.0.2".parse().unwrap()];
        fabric.apply(&spec).unwrap();
        assert_eq!(a.run(|| resolve("example.org")).0, 2);
    });
}

#[test]
fn connections_of_a_nic_end_with_it() {
    on_a_host(|| {
        let (fabric, mut spec, a, b) = two_machines();
        let listener = b.run(|| std::net::UdpSocket::bind("10.1.0.5:9").unwrap());
        let talk = || {
            a.run(|| {
                std::net::UdpSocket::bind("10.1.0.4:9")
                    .unwrap()
                    .send_to(b"x", "10.1.0.5:9")
                    .unwrap()
            });
            listener.recv_from(&mut [0; 8]).unwrap();
        };
        let forget = |address: &str| {
            let ns = linux::netns::open(&fabric.vnet_netns("v1")).unwrap();
            let mut conntrack = linux::conntrack::Conntrack::open_in(&ns).unwrap();
            conntrack
                .forget(&std::collections::BTreeSet::from([ip(address)]))
                .unwrap()
        };
        talk();
        assert_eq!(forget("10.1.0.5"), 1);
        talk();
        spec.vnets[0].nics.remove(1);
        fabric.apply(&spec).unwrap();
        assert_eq!((forget("10.1.0.5"), forget("10.1.0.4")), (0, 0));
    });
}

#[test]
fn a_machine_reaches_itself_through_a_frontend_public_or_internal() {
    on_a_host(|| {
        let mut v = vnet("v1", &[nic("a", "10.1.0.4"), nic("b", "10.1.0.5")]);
        v.nics[0].ip_configs.push(IpConfigSpec {
            name: "pod".into(),
            address: ip("10.1.0.9"),
            primary: false,
        });
        v.frontends = vec![
            frontend("198.19.0.10", 80, &[("10.1.0.4", 8080)]),
            frontend("198.19.0.10", 81, &[("10.1.0.9", 8080)]),
            frontend("10.1.0.100", 80, &[("10.1.0.4", 8080)]),
        ];
        let spec = fabric_spec(&[v]);
        let fabric = open();
        fabric.apply(&spec).unwrap();
        let [a, b] = ["a", "b"].map(|n| Machine::boot(&fabric, n));
        a.ip(&["addr", "add", "10.1.0.9/32", "dev", "lo"]);
        a.echo_callers(8080);
        // Itself, a pod beside it, and by the internal frontend: the caller is the frontend. Others stay who they are.
        assert_eq!(a.ask("198.19.0.10:80").unwrap(), "198.19.0.10");
        assert_eq!(a.ask("198.19.0.10:81").unwrap(), "198.19.0.10");
        assert_eq!(a.ask("10.1.0.100:80").unwrap(), "10.1.0.100");
        assert_eq!(b.ask("10.1.0.100:80").unwrap(), "10.1.0.5");
        assert_eq!(b.ask("198.19.0.10:81").unwrap(), "10.1.0.5");
        fabric.distrust();
        assert_eq!(fabric.apply(&spec).unwrap().changes, 0);
    });
}

#[test]
fn datagrams_move_at_once_when_their_backend_goes() {
    on_a_host(|| {
        let (fabric, mut spec, a, b) = two_machines();
        spec.vnets[0].nics.push(nic("c", "10.1.0.6"));
        let mut front = frontend("198.19.0.10", 53, &[("10.1.0.5", 5353)]);
        front.protocol = vnet_model::fabric::Protocol::Udp;
        spec.vnets[0].frontends = vec![front];
        fabric.apply(&spec).unwrap();
        let c = Machine::boot(&fabric, "c");
        let listen = |m: &Machine| {
            let socket = m.run(|| std::net::UdpSocket::bind("0.0.0.0:5353").unwrap());
            socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            socket
        };
        let (at_b, at_c) = (listen(&b), listen(&c));
        let client = a.run(|| std::net::UdpSocket::bind("10.1.0.4:7000").unwrap());
        let send = || client.send_to(b"x", "198.19.0.10:53").unwrap();
        send();
        at_b.recv(&mut [0; 8]).unwrap();
        spec.vnets[0].frontends[0].backends[0].address = ip("10.1.0.6");
        fabric.apply(&spec).unwrap();
        send();
        at_c.recv(&mut [0; 8]).unwrap();
    });
}

//! Peered virtual networks.

use std::time::Duration;

use vnet::{DENIED, Error, Fabric};
use vnet_model::fabric::{FabricSpec, PeerSpec, SecurityGroupSpec, VnetSpec};

use crate::common::*;

/// A virtual network 10.<n>.0.0/16 with a machine 10.<n>.0.4 named after it.
fn network(n: u8) -> VnetSpec {
    let mut v = vnet(&format!("v{n}"), &[nic(&format!("m{n}"), &format!("10.{n}.0.4"))]);
    v.prefixes = vec![format!("10.{n}.0.0/16").parse().unwrap()];
    v.subnets[0].prefix = format!("10.{n}.0.0/24").parse().unwrap();
    v
}

fn half(n: u8) -> PeerSpec {
    PeerSpec {
        vnet: format!("v{n}"),
        prefixes: vec![format!("10.{n}.0.0/16").parse().unwrap()],
        access: true,
        forwarded: false,
    }
}

fn start(spec: &FabricSpec) -> Fabric {
    let fabric = Fabric::open("t", RUN).unwrap();
    fabric.apply(spec).unwrap();
    fabric
}

#[test]
fn peers_reach_each_other_while_both_halves_are_there_and_nobody_through_them() {
    on_a_host(|| {
        let mut spec = fabric_spec(&[network(1), network(2), network(3)]);
        spec.vnets[0].peers = vec![half(2)];
        let fabric = start(&spec);
        let [m1, m2, m3] = ["m1", "m2", "m3"].map(|n| Machine::boot(&fabric, n));
        for m in [&m1, &m2, &m3] {
            m.echo_callers(80);
        }
        assert!(m1.ask("10.2.0.4:80").is_err(), "one half is not enough");
        assert!(m2.ask("10.1.0.4:80").is_err());
        spec.vnets[1].peers = vec![half(1), half(3)];
        spec.vnets[2].peers = vec![half(2)];
        fabric.apply(&spec).unwrap();
        assert_eq!(m1.ask("10.2.0.4:80").unwrap(), "10.1.0.4");
        assert_eq!(m2.ask("10.1.0.4:80").unwrap(), "10.2.0.4");
        assert_eq!(m2.ask("10.3.0.4:80").unwrap(), "10.2.0.4");
        // Not transitive, not even for one who sends such packets by force.
        assert!(m1.ask("10.3.0.4:80").is_err());
        let inside = fabric.vnet_netns("v1");
        let link = linux::netns::run_in(&inside, || tool("ip", &["-o", "route", "get", "10.2.0.4"])).unwrap();
        let link = link.split("dev ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        linux::netns::run_in(&inside, || {
            tool(
                "ip",
                &[
                    "route",
                    "add",
                    "10.3.0.0/16",
                    "via",
                    "169.254.1.1",
                    "dev",
                    &link,
                    "onlink",
                ],
            )
        })
        .unwrap();
        assert!(m1.ask("10.3.0.4:80").is_err());
        assert_eq!(dropped(&fabric, "through a peering"), 1);
        linux::netns::run_in(&inside, || tool("ip", &["route", "del", "10.3.0.0/16"])).unwrap();

        // All of it stays in the next process, and a second apply changes nothing.
        assert_eq!(fabric.apply(&spec).unwrap().changes, 0);
        fabric.distrust();
        assert_eq!(fabric.apply(&spec).unwrap().changes, 0);
        drop(fabric);
        let fabric = start(&spec);
        assert_eq!(m1.ask("10.2.0.4:80").unwrap(), "10.1.0.4");

        // The end of one half ends the traffic at once, that of open connections too.
        let held = m2.run(|| std::net::TcpListener::bind("10.2.0.4:90").unwrap());
        let open = m1.run(|| std::net::TcpStream::connect("10.2.0.4:90").unwrap());
        let (accepted, _) = held.accept().unwrap();
        spec.vnets[1].peers.remove(0);
        fabric.apply(&spec).unwrap();
        use std::io::{Read, Write};
        let _ = (&open).write_all(b"x");
        accepted.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert!(!matches!((&accepted).read(&mut [0]), Ok(1)));
        assert!(m1.ask("10.2.0.4:80").is_err() && m2.ask("10.1.0.4:80").is_err());
        assert_eq!(m2.ask("10.3.0.4:80").unwrap(), "10.2.0.4");
    });
}

#[test]
fn each_direction_has_its_flag_and_security_groups_count_peers_as_inside() {
    on_a_host(|| {
        let mut spec = fabric_spec(&[network(1), network(2)]);
        spec.vnets[0].peers = vec![half(2)];
        spec.vnets[1].peers = vec![PeerSpec {
            access: false,
            ..half(1)
        }];
        spec.vnets[0].security_groups = vec![SecurityGroupSpec {
            key: "default".into(),
            rules: vec![],
        }];
        spec.vnets[0].subnets[0].security_group = Some("default".into());
        let fabric = start(&spec);
        let [m1, m2] = ["m1", "m2"].map(|n| Machine::boot(&fabric, n));
        for m in [&m1, &m2] {
            m.echo_callers(80);
        }
        assert_eq!(m2.ask("10.1.0.4:80").unwrap(), "10.2.0.4");
        let refused = m1.ask("10.2.0.4:80").unwrap_err();
        assert!(refused.contains("No route"), "{refused}");
        assert_eq!(dropped(&fabric, DENIED), 0);
        // A foreign source comes through only where forwarded traffic may.
        let knock = || {
            m2.run(|| {
                let socket = std::net::UdpSocket::bind("192.0.2.7:0").unwrap();
                socket.send_to(b"x", "10.1.0.4:9").unwrap();
            });
        };
        m2.ip(&["addr", "add", "192.0.2.7/32", "dev", "lo"]);
        knock();
        wait_for("the forged source to be dropped", || {
            dropped(&fabric, vnet::SPOOFED) == 1
        });
    });
}

#[test]
fn what_belongs_to_a_network_is_not_reached_from_its_peer() {
    on_a_host(|| {
        let runtime = runtime();
        let mut spec = fabric_spec(&[network(1), network(2)]);
        spec.vnets[0].peers = vec![half(2)];
        spec.vnets[1].peers = vec![half(1)];
        let fabric = start(&spec);
        fabric.serve(runtime.handle());
        let m1 = Machine::boot(&fabric, "m1");
        assert_eq!(m1.run(|| resolve("m1")).1.len(), 1);
        assert_eq!(m1.run(|| resolve("m2")), (3, vec![]), "names do not cross");
        let answer = m1.run(|| get("168.63.129.16:80", vnet_model::interfaces::PATH_AND_QUERY));
        assert!(answer.contains("10.1.0.4") && !answer.contains("10.2.0"), "{answer}");
        // By force: the peer's namespace refuses what is addressed to its own wire server.
        let inside = fabric.vnet_netns("v1");
        linux::netns::run_in(&inside, || {
            tool("ip", &["addr", "del", "168.63.129.16/32", "dev", "lo"]);
            let link = tool("ip", &["-o", "route", "get", "10.2.0.4"]);
            let link = link.split("dev ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
            tool(
                "ip",
                &[
                    "route",
                    "add",
                    "168.63.129.16/32",
                    "via",
                    "169.254.1.1",
                    "dev",
                    &link,
                    "onlink",
                ],
            );
        })
        .unwrap();
        assert!(m1.ask("168.63.129.16:80").is_err());
        assert!(dropped(&fabric, "no such socket") >= 1);
    });
}

#[test]
fn overlapping_peers_are_refused() {
    on_a_host(|| {
        let fabric = Fabric::open("t", RUN).unwrap();
        let refused = |peers: &[PeerSpec]| {
            let mut spec = fabric_spec(&[network(1), network(2)]);
            spec.vnets[0].peers = peers.to_vec();
            match fabric.apply(&spec) {
                Err(Error::Spec(e)) => format!("{e}"),
                other => panic!("{other:?}"),
            }
        };
        let with = |prefix: &str| PeerSpec {
            prefixes: vec![prefix.parse().unwrap()],
            ..half(2)
        };
        assert!(refused(&[with("10.1.128.0/17")]).contains("overlaps 10.1.0.0/16 of v1"));
        assert!(refused(&[with("10.0.0.0/8")]).contains("overlaps"));
        assert!(refused(&[with("198.19.3.0/24")]).contains("overlaps"));
        assert!(refused(&[half(1)]).contains("itself"));
        assert!(refused(&[half(2), half(2)]).contains("twice"));
        let clash = PeerSpec {
            vnet: "v3".into(),
            ..half(2)
        };
        assert!(refused(&[half(2), clash]).contains("of v2"));
        assert!(!std::path::Path::new(RUN).exists());
    });
}

//! Route tables of subnets.

use vnet::{Error, Fabric};
use vnet_model::fabric::{FabricSpec, NextHop, RouteSpec, RouteTableSpec, SubnetSpec};

use crate::common::*;

/// Subnets `nodes` (a), `servers` (s) and `firewall` (f), the first with a route table.
fn three_subnets(routes: &[(&str, NextHop)]) -> FabricSpec {
    let mut v = vnet(
        "v1",
        &[nic("a", "10.1.0.4"), nic("s", "10.1.1.4"), nic("f", "10.1.2.4")],
    );
    for (name, prefix) in [("servers", "10.1.1.0/24"), ("firewall", "10.1.2.0/24")] {
        v.subnets.push(SubnetSpec {
            name: name.into(),
            prefix: prefix.parse().unwrap(),
            ..SubnetSpec::default()
        });
    }
    v.nics[1].subnet = "servers".into();
    v.nics[2].subnet = "firewall".into();
    v.nics[2].ip_forwarding = true;
    v.subnets[0].route_table = Some("t".into());
    v.route_tables = vec![RouteTableSpec {
        key: "t".into(),
        routes: routes
            .iter()
            .map(|(prefix, next_hop)| RouteSpec {
                prefix: prefix.parse().unwrap(),
                next_hop: *next_hop,
            })
            .collect(),
    }];
    fabric_spec(&[v])
}

/// Packets that the firewall forwarded.
fn forwarded(f: &Machine) -> u64 {
    let text = f.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
    let mut lines = text.lines().filter(|l| l.starts_with("Ip:"));
    let names: Vec<&str> = lines.next().unwrap().split(' ').collect();
    let values: Vec<&str> = lines.next().unwrap().split(' ').collect();
    values[names.iter().position(|n| *n == "ForwDatagrams").unwrap()]
        .parse()
        .unwrap()
}

#[test]
fn the_longest_prefix_wins_and_a_users_route_over_the_systems() {
    on_a_host(|| {
        let appliance = NextHop::VirtualAppliance(ip("10.1.2.4"));
        let mut spec = three_subnets(&[("10.0.0.0/8", NextHop::None)]);
        spec.edge.endpoints = vec![ip("198.19.0.1")];
        let fabric = Fabric::open("t", RUN).unwrap();
        fabric.apply(&spec).unwrap();
        let [a, s, f] = ["a", "s", "f"].map(|n| Machine::boot(&fabric, n));
        for m in [&a, &s] {
            m.echo_callers(80);
        }
        let edge = Machine {
            pin: fabric.edge_netns(),
        };
        edge.echo_callers(443);
        f.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap());
        let mut with = |routes: &[(&str, NextHop)], forwarding: bool| {
            spec.vnets[0].route_tables = three_subnets(routes).vnets[0].route_tables.clone();
            spec.vnets[0].nics[2].ip_forwarding = forwarding;
            fabric.apply(&spec).unwrap();
            fabric.distrust();
            assert_eq!(fabric.apply(&spec).unwrap().changes, 0);
        };
        // The network's own /16 is longer than a /8 to nowhere, and shorter than a /24.
        assert_eq!(a.ask("10.1.1.4:80").unwrap(), "10.1.0.4");
        with(&[("10.1.1.0/24", NextHop::None)], true);
        assert!(a.ask("10.1.1.4:80").is_err());
        let refused = s.ask("10.1.0.4:80");
        assert!(
            refused.is_err(),
            "answers are routed by the table of the subnet they come from"
        );
        with(
            &[("10.1.0.0/16", NextHop::None), ("10.1.1.4/32", NextHop::VnetLocal)],
            true,
        );
        assert_eq!(a.ask("10.1.1.4:80").unwrap(), "10.1.0.4");
        assert!(a.ask("10.1.2.4:80").unwrap_err().contains("No route"));

        // By the firewall, which forwards; nobody else may, and without it the way is closed.
        with(&[("10.1.1.0/24", appliance)], true);
        let before = forwarded(&f);
        assert_eq!(a.ask("10.1.1.4:80").unwrap(), "10.1.0.4");
        assert!(forwarded(&f) > before);
        with(&[("10.1.1.0/24", appliance)], false);
        assert!(a.ask("10.1.1.4:80").is_err());

        // Outward: closed by a default route to nowhere, but for what has a longer one.
        assert_eq!(a.ask("198.19.0.1:443").unwrap(), "100.127.192.4");
        with(&[("0.0.0.0/0", NextHop::None)], true);
        assert!(a.ask("198.19.0.1:443").is_err());
        assert_eq!(s.ask("198.19.0.1:443").unwrap(), "100.127.192.4");
        with(
            &[("0.0.0.0/0", NextHop::None), ("198.19.0.0/24", NextHop::Internet)],
            true,
        );
        assert_eq!(a.ask("198.19.0.1:443").unwrap(), "100.127.192.4");
        spec.vnets[0].subnets[0].route_table = None;
        fabric.apply(&spec).unwrap();
        assert_eq!(a.ask("10.1.1.4:80").unwrap(), "10.1.0.4");
    });
}

#[test]
fn tables_that_are_not_there_or_name_a_prefix_twice_are_refused() {
    on_a_host(|| {
        let fabric = Fabric::open("t", RUN).unwrap();
        let mut spec = three_subnets(&[("10.9.0.0/16", NextHop::None), ("10.9.0.0/16", NextHop::Internet)]);
        let text = |r: Result<_, Error>| match r {
            Err(Error::Spec(e)) => e.to_string(),
            other => panic!("{other:?}"),
        };
        assert!(text(fabric.apply(&spec)).contains("twice"));
        spec.vnets[0].route_tables.clear();
        assert!(text(fabric.apply(&spec)).contains("route table t"));
    });
}

//! Who reaches whom, cell by cell, before and after every change; see [`testkit::matrix`] for how to read the tables.

use std::path::PathBuf;

use testkit::matrix::{Matrix, PORT, Probe, Target};
use vnet::Fabric;
use vnet_model::fabric::{
    FabricSpec, IpConfigSpec, NextHop, NicSpec, PeerSpec, Protocol, RouteSpec, RouteTableSpec, SecurityGroupSpec,
    SubnetSpec, Uplink, VnetSpec,
};
use vnet_model::nsg::{Access, Direction, RuleProtocol, SecurityRule, parse_peers, parse_ports};

use crate::common::*;

fn start(spec: &FabricSpec) -> Fabric {
    let fabric = Fabric::open("t", RUN).unwrap();
    fabric.apply(spec).unwrap();
    fabric
}

fn boot(fabric: &Fabric, names: &[&str]) -> Vec<(String, PathBuf)> {
    names
        .iter()
        .map(|n| ((*n).to_owned(), Machine::boot(fabric, n).pin))
        .collect()
}

fn matrix(endpoints: &[(String, PathBuf)]) -> Matrix {
    let endpoints: Vec<_> = endpoints.iter().map(|(n, p)| (n.as_str(), p.as_path())).collect();
    Matrix::new(&endpoints).unwrap()
}

/// The test's own namespace, from any thread.
fn host() -> (String, PathBuf) {
    let thread = rustix::thread::gettid().as_raw_nonzero();
    ("host".to_owned(), PathBuf::from(format!("/proc/{thread}/ns/net")))
}

fn rule(
    priority: u32,
    direction: Direction,
    access: Access,
    protocol: RuleProtocol,
    from: &str,
    to: &str,
) -> SecurityRule {
    SecurityRule {
        name: format!("r{priority}"),
        priority,
        direction,
        access,
        protocol,
        source: parse_peers(&[from]).unwrap(),
        source_ports: vec![],
        destination: parse_peers(&[to]).unwrap(),
        destination_ports: vec![],
    }
}

fn group(key: &str, rules: &[SecurityRule]) -> SecurityGroupSpec {
    SecurityGroupSpec {
        key: key.to_owned(),
        rules: rules.to_vec(),
    }
}

fn subnet(name: &str, prefix: &str) -> SubnetSpec {
    SubnetSpec {
        name: name.into(),
        prefix: prefix.parse().unwrap(),
        ..SubnetSpec::default()
    }
}

fn nic_in(subnet: &str, key: &str, address: &str) -> NicSpec {
    NicSpec {
        subnet: subnet.into(),
        ..nic(key, address)
    }
}

#[test]
fn security_groups() {
    use Access::{Allow, Deny};
    use Direction::{Inbound, Outbound};
    use RuleProtocol::{Any, Icmp, Tcp, Udp};
    on_a_host(|| {
        let nics = [
            nic("a", "10.1.0.4"),
            nic("b", "10.1.0.5"),
            nic_in("data", "c", "10.1.1.4"),
            nic_in("data", "d", "10.1.1.5"),
        ];
        let mut v = vnet("v1", &nics);
        v.subnets.push(subnet("data", "10.1.1.0/24"));
        let mut spec = fabric_spec(&[v]);
        let fabric = start(&spec);
        let machines = boot(&fabric, &["a", "b", "c", "d"]);
        let m = matrix(&machines).with_endpoints(&[
            ("a", "10.1.0.4"),
            ("b", "10.1.0.5"),
            ("c", "10.1.1.4"),
            ("d", "10.1.1.5"),
        ]);
        let all = "  a   b   c   d
                 a  TUI TUI TUI TUI
                 b  TUI TUI TUI TUI
                 c  TUI TUI TUI TUI
                 d  TUI TUI TUI TUI";
        m.check("without groups", all);

        // The subnet's group: from the front only TCP, inside the subnet no datagrams; nothing by echo from b.
        let data = [
            rule(100, Inbound, Deny, Icmp, "10.1.0.5", "*"),
            rule(200, Inbound, Allow, Tcp, "10.1.0.0/24", "*"),
            rule(300, Inbound, Deny, Udp, "VirtualNetwork", "*"),
        ];
        spec.vnets[0].security_groups = vec![group("data", &data)];
        spec.vnets[0].subnets[1].security_group = Some("data".into());
        fabric.apply(&spec).unwrap();
        let guarded = "a   b   c   d
                 a  TUI TUI TI  TI
                 b  TUI TUI T   T
                 c  TUI TUI TUI TI
                 d  TUI TUI TI  TUI";
        m.check("a subnet's group, also inside the subnet", guarded);

        // d's own group on top: nothing out to a, only echoes in.
        let own = [
            rule(100, Outbound, Deny, Any, "*", "10.1.0.4"),
            rule(100, Inbound, Allow, Icmp, "*", "*"),
            rule(101, Inbound, Deny, Any, "*", "*"),
        ];
        spec.vnets[0].security_groups.push(group("own", &own));
        spec.vnets[0].nics[3].security_group = Some("own".into());
        fabric.apply(&spec).unwrap();
        m.check(
            "a NIC's group on top",
            "a   b   c   d
         a  TUI TUI TI  I
         b  TUI TUI T   -
         c  TUI TUI TUI I
         d  -   TUI TI  TUI",
        );
        // A refusal is an answer. Only streams may be asked twice for it: one that comes while `connect` is still at work
        // counts as passing trouble until the first repetition.
        let measured = m.measure("a b c d\n d - - - -").unwrap();
        assert!(measured.silent.iter().all(|s| s.ends_with("Tcp")), "{measured:?}");

        spec.vnets[0].nics[3].security_group = None;
        fabric.apply(&spec).unwrap();
        m.check("the NIC's group taken off", guarded);
        spec.vnets[0].subnets[1].security_group = None;
        fabric.apply(&spec).unwrap();
        m.check("both taken off", all);
        // Ports: only the port that is asked, both ways of saying it.
        for (ports, cell) in [("7007", "-"), ("7000-7010", "-"), ("7006", "TU"), ("7008-65535", "TU")] {
            let mut closed = rule(100, Inbound, Deny, Any, "*", "*");
            closed.destination_ports = parse_ports(&[ports]).unwrap();
            spec.vnets[0].security_groups = vec![group("data", &[closed])];
            spec.vnets[0].subnets[1].security_group = Some("data".into());
            fabric.apply(&spec).unwrap();
            // Echoes have no ports, so the rule does not speak of them.
            let cell = if cell == "-" {
                "I".to_owned()
            } else {
                format!("{cell}I")
            };
            m.check(ports, &format!("a b c d\n a TUI TUI {cell} {cell}"));
        }
    });
}

#[test]
fn routes_and_peerings() {
    on_a_host(|| {
        let mut fw = nic_in("hub", "fw", "10.1.2.4");
        fw.ip_forwarding = true;
        let mut v1 = vnet("v1", &[nic("a", "10.1.0.4"), nic_in("data", "b", "10.1.1.4"), fw]);
        v1.subnets
            .extend([subnet("data", "10.1.1.0/24"), subnet("hub", "10.1.2.0/24")]);
        let other = |key: &str, net: &str, nic_key: &str| {
            let mut v = vnet(key, &[nic(nic_key, &format!("{net}.0.4"))]);
            v.prefixes = vec![format!("{net}.0.0/16").parse().unwrap()];
            v.subnets = vec![subnet("nodes", &format!("{net}.0.0/24"))];
            v
        };
        let mut spec = fabric_spec(&[v1, other("v2", "10.2", "c"), other("v3", "10.3", "d")]);
        let fabric = start(&spec);
        let machines = boot(&fabric, &["a", "b", "fw", "c", "d"]);
        Machine {
            pin: machines[2].1.clone(),
        }
        .run(|| {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            // Answers of the appliance itself, not redirects.
            std::fs::write("/proc/sys/net/ipv4/conf/all/send_redirects", "0").unwrap();
        });
        let m = matrix(&machines).with_endpoints(&[
            ("a", "10.1.0.4"),
            ("b", "10.1.1.4"),
            ("fw", "10.1.2.4"),
            ("c", "10.2.0.4"),
            ("d", "10.3.0.4"),
        ]);
        let apart = " a   b   fw  c   d
                 a   TUI TUI TUI -   -
                 b   TUI TUI TUI -   -
                 fw  TUI TUI TUI -   -
                 c   -   -   -   TUI -
                 d   -   -   -   -   TUI";
        m.check("three networks", apart);

        let half = |to: &str, net: &str| PeerSpec {
            vnet: to.into(),
            prefixes: vec![format!("{net}.0.0/16").parse().unwrap()],
            access: true,
            forwarded: false,
        };
        spec.vnets[0].peers = vec![half("v2", "10.2")];
        fabric.apply(&spec).unwrap();
        m.check("one half of a peering", apart);
        spec.vnets[1].peers = vec![half("v1", "10.1"), half("v3", "10.3")];
        spec.vnets[2].peers = vec![half("v2", "10.2")];
        fabric.apply(&spec).unwrap();
        m.check(
            "v1 = v2 = v3, which is not v1 = v3",
            " a   b   fw  c   d
         a   TUI TUI TUI TUI -
         b   TUI TUI TUI TUI -
         fw  TUI TUI TUI TUI -
         c   TUI TUI TUI TUI TUI
         d   -   -   -   TUI TUI",
        );
        // What v1's half does not let in, its own machines still open.
        spec.vnets[0].peers[0].access = false;
        fabric.apply(&spec).unwrap();
        m.check(
            "v2 may not open connections to v1",
            " a   b   fw  c   d
         a   TUI TUI TUI TUI -
         c   -   -   -   TUI TUI
         d   -   -   -   TUI TUI",
        );
        spec.vnets[0].peers[0].access = true;

        // a's subnet: to data by the appliance, to the peer nowhere.
        let table = |routes: &[(&str, NextHop)]| RouteTableSpec {
            key: "rt".into(),
            routes: routes
                .iter()
                .map(|(p, h)| RouteSpec {
                    prefix: p.parse().unwrap(),
                    next_hop: *h,
                })
                .collect(),
        };
        let by = NextHop::VirtualAppliance(ip("10.1.2.4"));
        spec.vnets[0].route_tables = vec![table(&[("10.1.1.0/24", by), ("10.2.0.0/16", NextHop::None)])];
        spec.vnets[0].subnets[0].route_table = Some("rt".into());
        fabric.apply(&spec).unwrap();
        m.check(
            "routes of a's subnet",
            " a   b   fw  c   d
         a   TUI TUI TUI -   -
         b   TUI TUI TUI TUI -
         fw  TUI TUI TUI TUI -
         c   -   TUI TUI TUI TUI",
        );
        // The appliance is really on the way: when it stops forwarding, the way is silent.
        let fw = Machine {
            pin: machines[2].1.clone(),
        };
        fw.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap());
        m.check("an appliance that does not forward", "a b fw c d\n a TUI - TUI - -");
        fw.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap());
        // A more precise route back to the system wins over the appliance.
        spec.vnets[0].route_tables = vec![table(&[("10.1.1.0/24", by), ("10.1.1.4/32", NextHop::None)])];
        fabric.apply(&spec).unwrap();
        m.check("the longest prefix", "a b fw c d\n a TUI - TUI TUI -");
        spec.vnets[0].subnets[0].route_table = None;
        spec.vnets[0].peers.clear();
        fabric.apply(&spec).unwrap();
        m.check(
            "as at the beginning, on v1's side",
            " a   b   fw  c   d
         a   TUI TUI TUI -   -
         b   TUI TUI TUI -   -
         fw  TUI TUI TUI -   -
         c   -   -   -   TUI TUI
         d   -   -   -   TUI TUI",
        );
    });
}

#[test]
fn load_balancers_outward_translation_and_names() {
    on_a_host(|| {
        let runtime = runtime();
        // A world behind the uplink.
        let world = PathBuf::from("/run/world");
        linux::netns::create_named(&world).unwrap();
        tool(
            "ip",
            &[
                "link",
                "add",
                "up0",
                "type",
                "veth",
                "peer",
                "name",
                "w0",
                "netns",
                "/run/world",
            ],
        );
        tool("ip", &["addr", "add", "192.0.2.1/24", "dev", "up0"]);
        tool("ip", &["link", "set", "up0", "up"]);
        tool("ip", &["route", "add", "default", "via", "192.0.2.9"]);
        let outside = Machine { pin: world.clone() };
        outside.ip(&["addr", "add", "192.0.2.9/24", "dev", "w0"]);
        outside.ip(&["link", "set", "w0", "up"]);
        outside.ip(&["route", "add", "default", "via", "192.0.2.1"]);

        let mut b = nic("b", "10.1.0.5");
        b.ip_configs.push(IpConfigSpec {
            name: "pod".into(),
            address: ip("10.1.0.9"),
            primary: false,
        });
        let mut v1: VnetSpec = vnet("v1", &[nic("a", "10.1.0.4"), b]);
        let mut udp = frontend("198.19.0.10", 53, &[("10.1.0.5", PORT)]);
        udp.protocol = Protocol::Udp;
        v1.frontends = vec![
            frontend("198.19.0.10", 80, &[("10.1.0.4", PORT), ("10.1.0.9", PORT)]),
            udp,
            frontend("198.19.0.10", 81, &[]),
            frontend("10.1.0.100", 80, &[("10.1.0.5", PORT)]),
        ];
        v1.dns.suffix = "one.test".into();
        let mut v2 = vnet("v2", &[nic("z", "10.1.0.4")]);
        v2.dns.suffix = "two.test".into();
        let mut spec = fabric_spec(&[v1, v2]);
        spec.edge.uplink = Uplink::Link("up0".into());
        let fabric = start(&spec);
        fabric.serve(runtime.handle());
        let mut machines = boot(&fabric, &["a", "b", "z"]);
        machines.extend([host(), ("world".to_owned(), world)]);
        Machine {
            pin: machines[1].1.clone(),
        }
        .ip(&["addr", "add", "10.1.0.9/32", "dev", "lo"]);
        use Probe::{Icmp, Tcp, Udp};
        let m = matrix(&machines)
            .with(Target::service(
                "web",
                "198.19.0.10",
                80,
                &[Tcp, Udp, Icmp],
                &["a", "b"],
            ))
            .with(Target::service("udp", "198.19.0.10", 53, &[Tcp, Udp], &["b"]))
            .with(Target::service("empty", "198.19.0.10", 81, &[Tcp, Udp], &[]))
            .with(Target::service("inner", "10.1.0.100", 80, &[Tcp, Udp], &["b"]))
            .with(Target::service(
                "world",
                "192.0.2.9",
                PORT,
                &[Tcp, Udp, Icmp],
                &["world"],
            ))
            .with(Target::resolved("b.one.test", "10.1.0.5"))
            .with(Target::resolved("z.two.test", "10.1.0.4"));
        // Outward everybody is the uplink's address; the neighbour network's machines never see the inner frontend.
        m.check(
            "frontends, outward, names",
            " web              udp             empty inner       world            b.one.test z.two.test
         a      T                U@10.1.0.4      -     T@10.1.0.4  TUI@192.0.2.1    D          -
         b      T                U@198.19.0.10   -     T           TUI@192.0.2.1    D          -
         z      T@100.127.192.5  U@100.127.192.5 -     -           TUI@192.0.2.1    -          D
         host   T@100.127.192.1  U@100.127.192.1 -     -           TUI@192.0.2.1    -          -
         world  -                -               -     -           TUI              -          -",
        );
        spec.vnets[0].frontends[0].backends.remove(0);
        spec.vnets[0].frontends[3].backends.clear();
        spec.vnets[0].nics[1].host_name = None;
        fabric.apply(&spec).unwrap();
        m.check(
            "a backend less, a frontend without any, a name less",
            " web              udp             empty inner world            b.one.test z.two.test
         a      T@10.1.0.4       U@10.1.0.4      -     -     TUI@192.0.2.1    -          -
         z      T@100.127.192.5  U@100.127.192.5 -     -     TUI@192.0.2.1    -          D
         host   T@100.127.192.1  U@100.127.192.1 -     -     TUI@192.0.2.1    -          -",
        );
        spec.edge.uplink = Uplink::None;
        spec.vnets[0].frontends.clear();
        fabric.apply(&spec).unwrap();
        m.check(
            "no uplink, no frontends",
            " web udp empty inner world b.one.test z.two.test
         a      -   -   -     -     -     -          -
         z      -   -   -     -     -     -          D
         host   -   -   -     -     TUI   -          -
         world  -   -   -     -     TUI   -          -",
        );
    });
}

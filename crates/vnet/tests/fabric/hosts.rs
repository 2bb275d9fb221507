//! Virtual networks over several hosts: each host is a network namespace, joined to the others by a bridge.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use linux::netns;
use vnet::{DENIED, Fabric, SPOOFED, UNKNOWN_PEER};
use vnet_model::fabric::{FabricSpec, NicSpec, PeerSpec, SecurityGroupSpec, Uplink, VnetSpec};
use vnet_model::nsg::deny_all;
use vnet_model::underlay::{RemoteHostSpec, RemoteLocalSpec, UnderlaySpec, VXLAN_PORT, vxlan_mac};

use crate::common::*;

/// Joins hosts `a`, `b`, ... with underlay addresses 192.0.2.1, .2, ...; the switch is the test's own namespace.
fn hosts(names: &[&str]) -> Vec<Node> {
    tool("ip", &["link", "add", "switch", "up", "type", "bridge"]);
    let join = |(n, name): (usize, &&str)| {
        let pin = PathBuf::from(format!("/run/hosts/{name}"));
        netns::create_named(&pin).unwrap();
        let (near, address) = (format!("to-{name}"), format!("192.0.2.{}/24", n + 1));
        let at = pin.to_str().unwrap();
        let peer = ["peer", "name", "eth0"];
        tool(
            "ip",
            &[
                &["link", "add", &near, "master", "switch", "up", "type", "veth"][..],
                &peer,
            ]
            .concat(),
        );
        tool("ip", &["link", "set", "eth0", "netns", at]);
        netns::run_in(&pin, || {
            tool("ip", &["link", "set", "eth0", "up"]);
            tool("ip", &["addr", "add", &address, "dev", "eth0"]);
        })
        .unwrap();
        Node {
            name: (*name).to_owned(),
            number: n as u8 + 1,
            pin,
        }
    };
    names.iter().enumerate().map(join).collect()
}

struct Node {
    name: String,
    number: u8,
    pin: PathBuf,
}

impl Node {
    fn address(&self) -> std::net::Ipv4Addr {
        std::net::Ipv4Addr::new(192, 0, 2, self.number)
    }

    /// A host agent.
    fn start(&self, spec: &FabricSpec) -> Fabric {
        let run = format!("/run/t-{}", self.name);
        let fabric = netns::run_in(&self.pin, || Fabric::open("t", run).unwrap()).unwrap();
        fabric.apply(&self.view(spec)).unwrap();
        fabric
    }

    /// What the platform tells this host: its own NICs are here, the others behind their hosts. In `spec` every NIC names
    /// its host and every host is listed.
    fn view(&self, spec: &FabricSpec) -> FabricSpec {
        let mut out = spec.clone();
        let underlay = out.underlay.as_mut().unwrap();
        underlay.hosts.retain(|h| h.key != self.name);
        underlay.address = self.address();
        underlay.number = self.number.into();
        let own = spec.underlay.as_ref().unwrap().host(&self.name);
        out.edge.endpoints = own.map(|h| h.endpoints.clone()).unwrap_or_default();
        for vnet in &mut out.vnets {
            for nic in &mut vnet.nics {
                nic.host = nic.host.take().filter(|h| *h != self.name);
            }
            vnet.local = vnet
                .remote_local
                .iter()
                .filter(|r| r.host == self.name)
                .map(|r| r.address)
                .collect();
            vnet.remote_local.retain(|r| r.host != self.name);
        }
        out
    }

    fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        netns::run_in(&self.pin, f).unwrap()
    }
}

fn whole(nodes: &[Node], vnets: &[VnetSpec]) -> FabricSpec {
    let mut spec = fabric_spec(vnets);
    for (n, vnet) in spec.vnets.iter_mut().enumerate() {
        vnet.vni = Some(100 + n as u32);
    }
    let mut underlay = UnderlaySpec::new(std::net::Ipv4Addr::UNSPECIFIED, 0);
    underlay.hosts = nodes
        .iter()
        .map(|n| RemoteHostSpec {
            key: n.name.clone(),
            address: n.address(),
            number: n.number.into(),
            endpoints: vec![],
        })
        .collect();
    spec.underlay = Some(underlay);
    spec
}

fn on(host: &str, nic: NicSpec) -> NicSpec {
    NicSpec {
        host: Some(host.to_owned()),
        ..nic
    }
}

/// A stream that echoes until the test ends.
fn echo(machine: &Machine, port: u16) {
    let listener = machine.run(|| TcpListener::bind(("0.0.0.0", port)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..n]).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

fn ping_pong(stream: &mut TcpStream, text: &[u8]) -> std::io::Result<()> {
    stream.write_all(text)?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back)?;
    assert_eq!(back, text);
    Ok(())
}

#[test]
fn machines_of_two_hosts_talk_and_keep_their_addresses() {
    on_a_host(|| {
        let nodes = hosts(&["a", "b"]);
        let mut pods = on("b", nic("m2", "10.1.0.5"));
        pods.ip_configs.push(vnet_model::fabric::IpConfigSpec {
            name: "pod".into(),
            address: ip("10.1.0.6"),
            primary: false,
        });
        let v = vnet(
            "v",
            &[on("a", nic("m1", "10.1.0.4")), pods, on("a", nic("m3", "10.1.0.7"))],
        );
        let spec = whole(&nodes, &[v]);
        let [a, b] = [&nodes[0], &nodes[1]].map(|n| n.start(&spec));
        assert!(
            a.attach("m2", &vnet::NetnsRef::Path(nodes[0].pin.clone()), "eth9")
                .is_err()
        );
        let (m1, m2, m3) = (
            Machine::boot(&a, "m1"),
            Machine::boot(&b, "m2"),
            Machine::boot(&a, "m3"),
        );
        m2.ip(&["addr", "add", "10.1.0.6/32", "dev", "lo"]);
        for m in [&m1, &m2, &m3] {
            m.echo_callers(80);
        }
        assert_eq!(m1.ask("10.1.0.5:80").unwrap(), "10.1.0.4");
        assert_eq!(m1.ask("10.1.0.6:80").unwrap(), "10.1.0.4");
        assert_eq!(m2.ask("10.1.0.4:80").unwrap(), "10.1.0.5");
        assert_eq!(m3.ask("10.1.0.4:80").unwrap(), "10.1.0.7", "the same host as ever");
        assert!(m1.ask("10.1.0.99:80").is_err(), "an address that nobody has");
        // Packets of full size pass, and the machine knows the size.
        assert!(m1.ip(&["link", "show", "eth0"]).contains("mtu 1450"));
        m1.run(|| tool("ping", &["-c1", "-W2", "-M", "do", "-s", "1422", "10.1.0.5"]));
        assert!(!m1.run(|| {
            let ping = ["-c1", "-W1", "-M", "do", "-s", "1423", "10.1.0.5"];
            std::process::Command::new("ping")
                .args(ping)
                .output()
                .unwrap()
                .status
                .success()
        }));
        // Names of machines elsewhere, and each host's own wire server.
        let runtime = runtime();
        a.serve(runtime.handle());
        b.serve(runtime.handle());
        assert_eq!(m1.run(|| resolve("m2")), (0, vec![ip("10.1.0.5").into()]));
        let answer = m2.run(|| get("168.63.129.16:80", vnet_model::interfaces::PATH_AND_QUERY));
        assert!(answer.contains("10.1.0.6") && !answer.contains("10.1.0.4"), "{answer}");
        // A second apply changes nothing, neither here nor in the next process.
        for (node, fabric) in [(&nodes[0], &a), (&nodes[1], &b)] {
            assert_eq!(fabric.apply(&node.view(&spec)).unwrap().changes, 0);
            fabric.distrust();
            assert_eq!(fabric.apply(&node.view(&spec)).unwrap().changes, 0);
        }
        // Nothing of the underlay is in reach of a machine, and nothing floods.
        assert!(m1.ask("192.0.2.2:4789").is_err());
        let inside = a.vnet_netns("v");
        let fdb = netns::run_in(&inside, || tool("bridge", &["fdb", "show", "dev", "vxlan"])).unwrap();
        assert_eq!(fdb.lines().count(), 1, "{fdb}");
    });
}

#[test]
fn the_host_agent_may_be_killed_while_traffic_goes_on() {
    on_a_host(|| {
        let nodes = hosts(&["a", "b"]);
        let v = vnet("v", &[on("a", nic("m1", "10.1.0.4")), on("b", nic("m2", "10.1.0.5"))]);
        let spec = whole(&nodes, &[v]);
        let [a, b] = [&nodes[0], &nodes[1]].map(|n| n.start(&spec));
        let (m1, m2) = (Machine::boot(&a, "m1"), Machine::boot(&b, "m2"));
        echo(&m2, 80);
        let mut stream = m1.run(|| TcpStream::connect("10.1.0.5:80").unwrap());
        stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        ping_pong(&mut stream, b"before").unwrap();
        drop((a, b));
        ping_pong(&mut stream, b"without agents").unwrap();
        m1.run(|| TcpStream::connect("10.1.0.5:80").unwrap());
        let again = [&nodes[0], &nodes[1]].map(|n| n.start(&spec));
        ping_pong(&mut stream, &[7; 100_000]).unwrap();
        for (node, fabric) in nodes.iter().zip(&again) {
            assert_eq!(fabric.apply(&node.view(&spec)).unwrap().changes, 0);
        }
    });
}

#[test]
fn equal_ranges_do_not_meet_across_hosts() {
    on_a_host(|| {
        let nodes = hosts(&["a", "b"]);
        let network = |key: &str| {
            let near = on("a", nic(&format!("{key}1"), "10.1.0.4"));
            vnet(key, &[near, on("b", nic(&format!("{key}2"), "10.1.0.5"))])
        };
        let spec = whole(&nodes, &[network("v"), network("w")]);
        let [a, b] = [&nodes[0], &nodes[1]].map(|n| n.start(&spec));
        let [v1, w1] = ["v1", "w1"].map(|n| Machine::boot(&a, n));
        let [v2, w2] = ["v2", "w2"].map(|n| Machine::boot(&b, n));
        for (m, text) in [(&v2, "v"), (&w2, "w")] {
            let listener = m.run(|| TcpListener::bind("0.0.0.0:80").unwrap());
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    stream.unwrap().write_all(text.as_bytes()).unwrap();
                }
            });
        }
        assert_eq!(v1.ask("10.1.0.5:80").unwrap(), "v");
        assert_eq!(w1.ask("10.1.0.5:80").unwrap(), "w");
        // One network gone, the other does not notice.
        drop(v2);
        let mut less = spec.clone();
        less.vnets.remove(0);
        a.apply(&nodes[0].view(&less)).unwrap();
        b.apply(&nodes[1].view(&less)).unwrap();
        assert!(v1.ask("10.1.0.5:80").is_err());
        assert_eq!(w1.ask("10.1.0.5:80").unwrap(), "w");
    });
}

#[test]
fn a_lost_hosts_routes_vanish_and_the_flows_of_others_stay() {
    on_a_host(|| {
        let nodes = hosts(&["a", "b", "c"]);
        let nics = [
            on("a", nic("m1", "10.1.0.4")),
            on("b", nic("m2", "10.1.0.5")),
            on("c", nic("m3", "10.1.0.6")),
        ];
        let mut spec = whole(&nodes, &[vnet("v", &nics)]);
        let [a, b, c] = [0, 1, 2].map(|n| nodes[n].start(&spec));
        let (m1, m2, m3) = (
            Machine::boot(&a, "m1"),
            Machine::boot(&b, "m2"),
            Machine::boot(&c, "m3"),
        );
        for m in [&m2, &m3] {
            echo(m, 80);
        }
        let mut stays = m1.run(|| TcpStream::connect("10.1.0.6:80").unwrap());
        m1.run(|| TcpStream::connect("10.1.0.5:80").unwrap());
        // Host b is lost: its link goes, and the platform takes it off the list.
        tool("ip", &["link", "set", "to-b", "down"]);
        spec.underlay.as_mut().unwrap().hosts.remove(1);
        for (node, fabric) in [(&nodes[0], &a), (&nodes[2], &c)] {
            fabric.apply(&node.view(&spec)).unwrap();
        }
        stays.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        ping_pong(&mut stays, b"still here").unwrap();
        let refused = m1.ask("10.1.0.5:80").unwrap_err();
        assert!(
            refused.contains("route") || refused.contains("refused"),
            "at once: {refused}"
        );
        let routes = netns::run_in(&a.vnet_netns("v"), || tool("ip", &["route"])).unwrap();
        assert!(!routes.contains("10.1.0.5") && routes.contains("10.1.0.6"), "{routes}");
        // What it still sends is dropped, until it is listed again.
        tool("ip", &["link", "set", "to-b", "up"]);
        wait_for("what it sends to be dropped", || {
            let knock = || TcpStream::connect_timeout(&"10.1.0.4:80".parse().unwrap(), Duration::from_millis(100));
            assert!(m2.run(knock).is_err());
            dropped(&a, UNKNOWN_PEER) > 0
        });
        spec.underlay = whole(&nodes, &[]).underlay;
        for (node, fabric) in [(&nodes[0], &a), (&nodes[2], &c)] {
            fabric.apply(&node.view(&spec)).unwrap();
        }
        m2.echo_callers(81);
        assert_eq!(m1.ask("10.1.0.5:81").unwrap(), "10.1.0.4");
    });
}

/// A VXLAN datagram of network `vni` to a host's device: a TCP SYN or a UDP datagram inside.
fn datagram(vni: u32, to: std::net::Ipv4Addr, from: &str, target: &str) -> Vec<u8> {
    let mut out = vec![8, 0, 0, 0];
    out.extend(&vni.to_be_bytes()[1..]);
    out.push(0);
    out.extend(vxlan_mac(vni, to).0);
    out.extend([2, 0, 0, 0, 0, 99, 8, 0]);
    let mut header = vec![0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0];
    header.extend(ip(from).octets());
    header.extend(ip(target).octets());
    let sum: u32 = header
        .chunks(2)
        .map(|c| u32::from(u16::from_be_bytes([c[0], c[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    out.extend(header);
    // Ports 9 to 9, length 9, no checksum, one byte.
    out.extend([0, 9, 0, 9, 0, 9, 0, 0, b'!']);
    out
}

#[test]
fn strangers_on_the_underlay_are_dropped_and_counted() {
    on_a_host(|| {
        let nodes = hosts(&["a", "b", "stranger"]);
        let v = vnet("v", &[on("a", nic("m1", "10.1.0.4")), on("b", nic("m2", "10.1.0.5"))]);
        let mut spec = whole(&nodes, &[v]);
        spec.underlay.as_mut().unwrap().hosts.pop();
        let [a, _b] = [0, 1].map(|n| nodes[n].start(&spec));
        let m1 = Machine::boot(&a, "m1");
        let inbox = m1.run(|| UdpSocket::bind("0.0.0.0:9").unwrap());
        inbox.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let send = |node: &Node| {
            let packet = datagram(100, nodes[0].address(), "10.1.0.5", "10.1.0.4");
            let socket = node.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
            socket.send_to(&packet, (nodes[0].address(), VXLAN_PORT)).unwrap();
        };
        send(&nodes[2]);
        wait_for("the stranger's datagram to be dropped", || {
            dropped(&a, UNKNOWN_PEER) == 1
        });
        // From a host of ours the same bytes arrive: it was not their form that was refused.
        send(&nodes[1]);
        let mut byte = [0; 8];
        assert_eq!(inbox.recv(&mut byte).unwrap(), 1);
        assert_eq!(dropped(&a, UNKNOWN_PEER), 1);
        // A machine's forged source is dropped by its own host, and never gets to the other one.
        m1.ip(&["addr", "add", "10.1.0.77/32", "dev", "lo"]);
        m1.run(|| {
            UdpSocket::bind("10.1.0.77:0")
                .unwrap()
                .send_to(b"x", "10.1.0.5:9")
                .unwrap()
        });
        wait_for("the forged source to be dropped", || dropped(&a, SPOOFED) == 1);
    });
}

#[test]
fn security_groups_are_enforced_once_at_the_nics_own_host() {
    on_a_host(|| {
        let nodes = hosts(&["a", "b"]);
        let mut v = vnet("v", &[on("a", nic("m1", "10.1.0.4")), on("b", nic("m2", "10.1.0.5"))]);
        v.security_groups = vec![SecurityGroupSpec {
            key: "closed".into(),
            rules: deny_all(),
        }];
        let spec = whole(&nodes, &[v.clone()]);
        let [a, b] = [0, 1].map(|n| nodes[n].start(&spec));
        let (m1, m2) = (Machine::boot(&a, "m1"), Machine::boot(&b, "m2"));
        echo(&m2, 80);
        m1.echo_callers(80);
        let mut open = m1.run(|| TcpStream::connect("10.1.0.5:80").unwrap());
        open.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        v.nics[1].security_group = Some("closed".into());
        let spec = whole(&nodes, &[v.clone()]);
        for (node, fabric) in [(&nodes[0], &a), (&nodes[1], &b)] {
            fabric.apply(&node.view(&spec)).unwrap();
        }
        assert!(m1.ask("10.1.0.5:80").is_err());
        assert_eq!(
            (dropped(&a, DENIED), dropped(&b, DENIED)),
            (0, 1),
            "inbound, at m2's host"
        );
        ping_pong(&mut open, b"flows that were open stay").unwrap();
        assert!(m2.ask("10.1.0.4:80").is_err());
        assert_eq!(
            (dropped(&a, DENIED), dropped(&b, DENIED)),
            (0, 2),
            "outbound, at m2's host"
        );
    });
}

#[test]
fn the_platform_reaches_machines_of_other_hosts_as_its_own() {
    on_a_host(|| {
        let nodes = hosts(&["a", "b"]);
        let mut forwarder = on("a", nic("m1", "10.1.0.4"));
        forwarder.ip_forwarding = true;
        let mut v = vnet("v", &[forwarder, on("b", nic("m2", "10.1.0.5"))]);
        v.security_groups = vec![SecurityGroupSpec {
            key: "closed".into(),
            rules: deny_all(),
        }];
        v.subnets[0].security_group = Some("closed".into());
        let spec = whole(&nodes, &[v]);
        let [a, b] = [0, 1].map(|n| nodes[n].start(&spec));
        let (m1, m2) = (Machine::boot(&a, "m1"), Machine::boot(&b, "m2"));
        m2.echo_callers(80);
        for fabric in [&a, &b] {
            let to = "10.1.0.5:80".parse().unwrap();
            let mut answer = String::new();
            let mut stream = fabric.dial("v", to, Duration::from_secs(3)).unwrap();
            stream.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "168.63.129.16");
        }
        // Nobody else passes for it: not even one who may forward for others.
        m1.ip(&["addr", "add", "169.254.224.1/32", "dev", "lo"]);
        m1.run(|| {
            UdpSocket::bind("169.254.224.1:0")
                .unwrap()
                .send_to(b"x", "10.1.0.5:9")
                .unwrap()
        });
        wait_for("the false platform to be dropped", || dropped(&a, SPOOFED) == 1);
    });
}

#[test]
fn peers_meet_across_hosts_in_both_directions() {
    on_a_host(|| {
        let nodes = hosts(&["a", "b"]);
        let network = |n: u8| {
            let near = on("a", nic(&format!("a{n}"), &format!("10.{n}.0.4")));
            let mut v = vnet(
                &format!("v{n}"),
                &[near, on("b", nic(&format!("b{n}"), &format!("10.{n}.0.5")))],
            );
            v.prefixes = vec![format!("10.{n}.0.0/16").parse().unwrap()];
            v.subnets[0].prefix = format!("10.{n}.0.0/24").parse().unwrap();
            v
        };
        let half = |n: u8| PeerSpec {
            vnet: format!("v{n}"),
            prefixes: vec![format!("10.{n}.0.0/16").parse().unwrap()],
            access: true,
            forwarded: false,
        };
        let (mut v1, mut v2) = (network(1), network(2));
        v1.peers = vec![half(2)];
        v2.peers = vec![half(1)];
        let mut spec = whole(&nodes, &[v1, v2]);
        let [a, b] = [0, 1].map(|n| nodes[n].start(&spec));
        let machines = [("a1", &a), ("a2", &a), ("b1", &b), ("b2", &b)].map(|(n, f)| Machine::boot(f, n));
        let addresses = ["10.1.0.4", "10.2.0.4", "10.1.0.5", "10.2.0.5"];
        for m in &machines {
            m.echo_callers(80);
        }
        for (m, own) in machines.iter().zip(addresses) {
            for other in addresses.iter().filter(|o| **o != own) {
                assert_eq!(m.ask(&format!("{other}:80")).as_deref(), Ok(own), "{own} to {other}");
            }
        }
        // Who may open connections is a matter of each side's flag, whatever the host.
        spec.vnets[0].peers[0].access = false;
        for (node, fabric) in [(&nodes[0], &a), (&nodes[1], &b)] {
            fabric.apply(&node.view(&spec)).unwrap();
        }
        for (m, own) in machines.iter().zip(addresses) {
            for other in addresses.iter().filter(|o| **o != own) {
                let allowed = !(own.starts_with("10.2.") && other.starts_with("10.1."));
                assert_eq!(m.ask(&format!("{other}:80")).is_ok(), allowed, "{own} to {other}");
            }
        }
    });
}

#[test]
fn a_frontend_leads_to_backends_of_other_hosts_and_keeps_the_clients_address() {
    on_a_host(|| {
        let nodes = hosts(&["a", "b"]);
        let mut v = vnet("v", &[on("a", nic("m1", "10.1.0.4")), on("b", nic("m2", "10.1.0.5"))]);
        v.frontends = vec![
            frontend("198.19.0.9", 80, &[("10.1.0.5", 8080)]),
            frontend("198.19.0.9", 81, &[("10.1.0.5", 8081)]),
            frontend("10.1.0.200", 80, &[("10.1.0.5", 8080)]),
        ];
        let mut spec = whole(&nodes, &[v]);
        // Answers find their way to the outside.
        spec.edge.uplink = Uplink::Link("eth0".into());
        let [a, b] = [0, 1].map(|n| nodes[n].start(&spec));
        let (m1, m2) = (Machine::boot(&a, "m1"), Machine::boot(&b, "m2"));
        m2.echo_callers(8080);
        // A close with a request unread would be a reset.
        let listener = m2.run(|| TcpListener::bind("0.0.0.0:8081").unwrap());
        std::thread::spawn(move || {
            let (mut stream, peer) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            stream.write_all(peer.ip().to_string().as_bytes()).unwrap();
        });
        // From outside, which keeps its address, from the hosts themselves and from inside.
        nodes[0].run(|| tool("ip", &["addr", "add", "203.0.113.7/32", "dev", "lo"]));
        let url = "http://198.19.0.9:81";
        let outside = nodes[0].run(|| tool("curl", &["--interface", "203.0.113.7", "-s", "--http0.9", "-m3", url]));
        assert_eq!(outside, "203.0.113.7");
        assert_eq!(nodes[0].run(|| ask("198.19.0.9:80")).unwrap(), "169.254.240.1");
        assert_eq!(m1.ask("198.19.0.9:80").unwrap(), "10.1.0.4");
        assert_eq!(m1.ask("10.1.0.200:80").unwrap(), "10.1.0.4");
        assert_eq!(nodes[1].run(|| ask("198.19.0.9:80")).unwrap(), "100.127.192.1");
        assert_eq!(
            m2.ask("10.1.0.200:80").unwrap(),
            "10.1.0.200",
            "itself, by its own frontend"
        );
        // A machine of another network beside the frontend: its transit address may be anybody's on the backend's host.
        let w = VnetSpec {
            vni: Some(200),
            ..vnet("a-first", &[on("a", nic("w1", "10.1.0.4"))])
        };
        let mut more = whole(&nodes, &[]);
        more.vnets = vec![w, spec.vnets[0].clone()];
        more.edge = spec.edge.clone();
        a.apply(&nodes[0].view(&more)).unwrap();
        let w1 = Machine::boot(&a, "w1");
        assert_eq!(w1.ask("198.19.0.9:80").unwrap(), "169.254.240.1");
    });
}

#[test]
fn endpoints_of_one_edge_and_local_addresses_are_reached_from_every_host() {
    on_a_host(|| {
        let nodes = hosts(&["a", "b"]);
        let mut v = vnet("v", &[on("a", nic("m1", "10.1.0.4")), on("b", nic("m2", "10.1.0.5"))]);
        v.remote_local = vec![RemoteLocalSpec {
            address: ip("10.1.0.100"),
            host: "a".into(),
        }];
        let mut spec = whole(&nodes, &[v]);
        spec.underlay.as_mut().unwrap().hosts[0].endpoints = vec![ip("198.19.0.4")];
        let [a, b] = [0, 1].map(|n| nodes[n].start(&spec));
        let (m1, m2) = (Machine::boot(&a, "m1"), Machine::boot(&b, "m2"));
        let places = [
            (a.edge_netns(), "198.19.0.4:443"),
            (a.vnet_netns("v"), "10.1.0.100:10250"),
        ];
        for (place, address) in places {
            let listener = a.listen_in(&place, address.parse().unwrap()).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let peer = stream.peer_addr().unwrap().ip().to_string();
                    stream.write_all(peer.as_bytes()).unwrap();
                }
            });
        }
        assert!(m1.ask("198.19.0.4:443").is_ok());
        assert_eq!(
            m2.ask("198.19.0.4:443").unwrap(),
            "169.254.240.2",
            "host b's edge speaks for it"
        );
        assert!(nodes[1].run(|| ask("198.19.0.4:443")).is_ok(), "host b itself");
        assert_eq!(m2.ask("10.1.0.100:10250").unwrap(), "10.1.0.5");
        drop(b);
    });
}

#[test]
fn teardown_leaves_the_host_as_it_was() {
    on_a_host(|| {
        let nodes = hosts(&["a", "b"]);
        let before = nodes[0].run(world);
        let v = vnet("v", &[on("a", nic("m1", "10.1.0.4")), on("b", nic("m2", "10.1.0.5"))]);
        let spec = whole(&nodes, &[v]);
        let a = nodes[0].start(&spec);
        drop(a);
        nodes[0].run(|| vnet::teardown("t", "/run/t-a".as_ref()).unwrap());
        assert_eq!(nodes[0].run(world), before);
    });
}

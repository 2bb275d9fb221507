//! On-premises sites: a tunnel whose other end is this program's own, and an interface that was handed over.

use std::collections::BTreeMap;
use std::path::PathBuf;

use linux::netns::{self, NetNs};
use vnet::{DENIED, Fabric, NOT_OF_SITE, Tunnel, TunnelConfig, TunnelKeys};
use vnet_model::fabric::{FabricSpec, PeerSpec, SecurityGroupSpec, SubnetSpec, VnetSpec};
use vnet_model::gateway::{GATEWAY_SUBNET, HandedLinkSpec, SiteSpec, SiteWay, TunnelSpec};

use crate::common::*;

/// A network with machine m1 10.1.0.4, and a site 192.168.0.0/24.
fn spec(way: SiteWay) -> FabricSpec {
    let mut v = vnet("v1", &[nic("m1", "10.1.0.4")]);
    v.subnets.push(SubnetSpec {
        name: GATEWAY_SUBNET.into(),
        prefix: "10.1.255.0/27".parse().unwrap(),
        ..SubnetSpec::default()
    });
    v.sites = vec![SiteSpec {
        key: "office".into(),
        prefixes: vec!["192.168.0.0/24".parse().unwrap()],
        way,
        host: None,
    }];
    fabric_spec(&[v])
}

fn start(spec: &FabricSpec) -> Fabric {
    let fabric = Fabric::open("t", RUN).unwrap();
    fabric.apply(spec).unwrap();
    fabric
}

/// A namespace beside the host, joined to it by `wan0` (host 203.0.113.1) and `wan0` (203.0.113.2).
fn beside() -> NetNs {
    let pin = PathBuf::from("/run/office");
    let ns = netns::create_named(&pin).unwrap();
    tool("ip", &["link", "add", "wan0", "type", "veth", "peer", "name", "far0"]);
    tool("ip", &["link", "set", "far0", "netns", "/run/office"]);
    ns.run(|| {
        tool("ip", &["link", "set", "far0", "name", "wan0", "up"]);
        tool("ip", &["addr", "add", "203.0.113.2/24", "dev", "wan0"]);
    })
    .unwrap();
    ns
}

fn echo_in(ns: &NetNs, address: &'static str) {
    let listener = ns.run(|| std::net::TcpListener::bind(address).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip().to_string();
            let _ = std::io::Write::write_all(&mut stream, peer.as_bytes());
        }
    });
}

fn keys(own: u8, peer: u8, preshared: u8) -> TunnelKeys {
    TunnelKeys {
        private: [own; 32],
        peer_public: TunnelKeys::public_of([peer; 32]),
        preshared: Some([preshared; 32]),
    }
}

/// The office's end: its device `tun0` with 192.168.0.1, and a way to 10.1.0.0/16.
fn office(ns: &NetNs, keys: TunnelKeys, runtime: &tokio::runtime::Runtime) -> Tunnel {
    let config = TunnelConfig {
        keys,
        listen: "203.0.113.2:51820".parse().unwrap(),
        endpoint: Some("203.0.113.1:51820".parse().unwrap()),
        allowed: vec!["10.1.0.0/16".parse().unwrap()],
    };
    let tunnel = Tunnel::start(ns, "tun0", ns, config, runtime.handle()).unwrap();
    ns.run(|| {
        tool("ip", &["link", "set", "tun0", "up"]);
        tool("ip", &["addr", "add", "192.168.0.1/32", "dev", "tun0"]);
        tool(
            "ip",
            &["route", "add", "10.1.0.0/16", "dev", "tun0", "src", "192.168.0.1"],
        );
    })
    .unwrap();
    tunnel
}

fn tunnel_spec() -> FabricSpec {
    spec(SiteWay::Tunnel(TunnelSpec {
        listen_port: 51820,
        endpoint: None,
    }))
}

#[test]
fn a_tunnel_leads_both_ways_and_security_groups_judge_the_site() {
    on_a_host(|| {
        let runtime = runtime();
        let far = beside();
        tool("ip", &["addr", "add", "203.0.113.1/24", "dev", "wan0"]);
        tool("ip", &["link", "set", "wan0", "up"]);
        let mut spec = tunnel_spec();
        let fabric = start(&spec);
        fabric.serve(runtime.handle());
        fabric.set_tunnel_keys(BTreeMap::from([("office".to_owned(), keys(1, 2, 9))]));
        let tunnel = office(&far, keys(2, 1, 9), &runtime);
        let m1 = Machine::boot(&fabric, "m1");
        m1.echo_callers(80);
        echo_in(&far, "192.168.0.1:80");
        assert_eq!(far.run(|| ask("10.1.0.4:80")).unwrap().unwrap(), "192.168.0.1");
        assert_eq!(
            m1.ask("192.168.0.1:80").unwrap(),
            "10.1.0.4",
            "its own address, untranslated"
        );
        // Large packets pass in pieces that fit.
        m1.run(|| tool("ping", &["-c1", "-W2", "-s", "4000", "192.168.0.1"]));
        // The site counts as inside, unless a rule says otherwise.
        spec.vnets[0].security_groups = vec![SecurityGroupSpec {
            key: "g".into(),
            rules: vec![],
        }];
        spec.vnets[0].subnets[0].security_group = Some("g".into());
        fabric.apply(&spec).unwrap();
        assert!(far.run(|| ask("10.1.0.4:80")).unwrap().is_ok());
        spec.vnets[0].security_groups[0].rules = vnet_model::nsg::deny_all();
        fabric.apply(&spec).unwrap();
        assert!(far.run(|| ask("10.1.0.4:80")).unwrap().is_err());
        assert!(m1.ask("192.168.0.1:80").is_err());
        assert_eq!(dropped(&fabric, DENIED), 2);
        spec.vnets[0].subnets[0].security_group = None;
        fabric.apply(&spec).unwrap();

        // Neither the platform's sockets nor what is beyond the network is reached from there, and no other source comes in.
        far.run(|| tool("ip", &["route", "add", "168.63.129.16", "dev", "tun0"]))
            .unwrap();
        assert!(far.run(|| ask("168.63.129.16:80")).unwrap().is_err());
        far.run(|| {
            tool("ip", &["addr", "add", "192.168.9.9/32", "dev", "lo"]);
            let socket = std::net::UdpSocket::bind("192.168.9.9:0").unwrap();
            socket.send_to(b"x", "10.1.0.4:9").unwrap();
        })
        .unwrap();

        // A killed agent pauses it, its successor goes on with it.
        drop(fabric);
        if let SiteWay::Tunnel(tunnel) = &mut spec.vnets[0].sites[0].way {
            // It calls first: the other end would notice the loss of the session only after a while.
            tunnel.endpoint = Some("203.0.113.2:51820".parse().unwrap());
        }
        let fabric = start(&spec);
        fabric.serve(runtime.handle());
        assert!(m1.ask("192.168.0.1:80").is_err());
        fabric.set_tunnel_keys(BTreeMap::from([("office".to_owned(), keys(1, 2, 9))]));
        wait_for("the tunnel to come back", || m1.ask("192.168.0.1:80").is_ok());
        assert_eq!(fabric.apply(&spec).unwrap().changes, 0);

        // Another key at the other end, and nothing passes.
        drop(tunnel);
        let _wrong = wait_for_tunnel(&far, keys(3, 1, 9), &runtime);
        assert!(m1.ask("192.168.0.1:80").is_err());
        assert!(far.run(|| ask("10.1.0.4:80")).unwrap().is_err());
        // Without its site the device goes.
        spec.vnets[0].sites.clear();
        fabric.apply(&spec).unwrap();
        let links = netns::run_in(&fabric.vnet_netns("v1"), || tool("ip", &["-br", "link"])).unwrap();
        assert!(!links.lines().any(|l| l.starts_with('w')), "{links}");
    });
}

/// The last tunnel's socket closes a moment after it was dropped.
fn wait_for_tunnel(ns: &NetNs, keys: TunnelKeys, runtime: &tokio::runtime::Runtime) -> Tunnel {
    let mut started = None;
    wait_for("the other tunnel to start", || {
        let config = TunnelConfig {
            keys: keys.clone(),
            listen: "203.0.113.2:51820".parse().unwrap(),
            endpoint: Some("203.0.113.1:51820".parse().unwrap()),
            allowed: vec!["10.1.0.0/16".parse().unwrap()],
        };
        started = Tunnel::start(ns, "tun0", ns, config, runtime.handle()).ok();
        started.is_some()
    });
    started.unwrap()
}

#[test]
fn an_interface_is_handed_over_and_comes_back() {
    on_a_host(|| {
        let far = beside();
        far.run(|| {
            tool("ip", &["addr", "add", "192.168.0.1/32", "dev", "lo"]);
            tool("ip", &["route", "add", "10.1.0.0/16", "via", "203.0.113.1"]);
        })
        .unwrap();
        let way = SiteWay::Link(HandedLinkSpec {
            interface: "wan0".into(),
            address: "203.0.113.1/24".parse().unwrap(),
            gateway: ip("203.0.113.2"),
        });
        let mut spec = spec(way);
        // An interface that the host itself uses is left alone.
        tool("ip", &["addr", "add", "198.51.100.1/24", "dev", "wan0"]);
        let before = tool("ip", &["-br", "link"]);
        let fabric = start(&spec);
        assert!(tool("ip", &["-br", "link"]).contains("wan0"));
        tool("ip", &["addr", "del", "198.51.100.1/24", "dev", "wan0"]);
        fabric.apply(&spec).unwrap();
        assert!(!tool("ip", &["-br", "link"]).contains("wan0"));
        let m1 = Machine::boot(&fabric, "m1");
        m1.echo_callers(80);
        echo_in(&far, "192.168.0.1:80");
        assert_eq!(m1.ask("192.168.0.1:80").unwrap(), "10.1.0.4");
        let from_site = ["--interface", "192.168.0.1", "-c1", "-W2", "10.1.0.4"];
        far.run(|| tool("ping", &[&["-I"], &from_site[1..]].concat())).unwrap();
        // A source that is not the site's.
        assert!(far.run(|| ask("10.1.0.4:80")).unwrap().is_err());
        assert!(dropped(&fabric, NOT_OF_SITE) > 0);
        assert_eq!(fabric.apply(&spec).unwrap().changes, 0);
        fabric.distrust();
        assert_eq!(fabric.apply(&spec).unwrap().changes, 0);
        // Gone from the spec, it is the host's again; so it is after everything went.
        let site = spec.vnets[0].sites.pop().unwrap();
        fabric.apply(&spec).unwrap();
        assert!(tool("ip", &["-br", "link"]).contains("wan0"));
        spec.vnets[0].sites.push(site);
        fabric.apply(&spec).unwrap();
        assert_eq!(m1.ask("192.168.0.1:80").unwrap(), "10.1.0.4");
        drop(fabric);
        vnet::teardown("t", RUN.as_ref()).unwrap();
        let after = tool("ip", &["-br", "link"]);
        let lines = |text: &str| {
            text.lines()
                .filter(|l| l.starts_with("wan0"))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(lines(&after).len(), lines(&before).len(), "{after}");
    });
}

#[test]
fn a_site_is_not_reached_through_a_peer() {
    on_a_host(|| {
        let far = beside();
        far.run(|| {
            tool("ip", &["addr", "add", "192.168.0.1/32", "dev", "lo"]);
            tool("ip", &["route", "add", "10.0.0.0/8", "via", "203.0.113.1"]);
        })
        .unwrap();
        let mut spec = spec(SiteWay::Link(HandedLinkSpec {
            interface: "wan0".into(),
            address: "203.0.113.1/24".parse().unwrap(),
            gateway: ip("203.0.113.2"),
        }));
        let half = |n: u8| PeerSpec {
            vnet: format!("v{n}"),
            prefixes: vec![format!("10.{n}.0.0/16").parse().unwrap()],
            access: true,
            forwarded: true,
        };
        let mut other: VnetSpec = vnet("v2", &[nic("m2", "10.2.0.4")]);
        other.prefixes = vec!["10.2.0.0/16".parse().unwrap()];
        other.subnets[0].prefix = "10.2.0.0/24".parse().unwrap();
        other.peers = vec![half(1)];
        spec.vnets[0].peers = vec![half(2)];
        spec.vnets.push(other);
        let fabric = start(&spec);
        let (m1, m2) = (Machine::boot(&fabric, "m1"), Machine::boot(&fabric, "m2"));
        m2.echo_callers(80);
        echo_in(&far, "192.168.0.1:80");
        assert_eq!(m1.ask("10.2.0.4:80").unwrap(), "10.1.0.4");
        assert_eq!(m1.ask("192.168.0.1:80").unwrap(), "10.1.0.4");
        assert!(m2.ask("192.168.0.1:80").is_err());
        let ping = std::process::Command::new("ping");
        let mut ping = ping;
        let reached = far
            .run(|| {
                ping.args(["-I", "192.168.0.1", "-c1", "-W1", "10.2.0.4"])
                    .output()
                    .unwrap()
            })
            .unwrap();
        assert!(!reached.status.success());
    });
}

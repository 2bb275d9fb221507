//! Planned tables in a real kernel: connections to Service addresses, in namespaces of their own.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use linux::{
    netlink::{Address, Neighbour, Request, Route, RouteEntry, Veth, VethPeer},
    netns::{self, NetNs},
    nft::{Chain, ChainKind, Change, Family, HookPoint, Nft, Rule, Table},
    sysctl,
};
use serde_json::{Value, json};
use service_proxy::{
    executor::{Executor, own_address},
    plan::{PlanConfig, Scope, plan},
    world::World,
};

const WAIT: Duration = Duration::from_secs(3);

fn on_machine(test: impl FnOnce() + Send + 'static) {
    let body = move || {
        netns::become_private_host(&[Path::new("/run")]).unwrap();
        own_address(None, Ipv4Addr::new(10, 1, 0, 1)).unwrap();
        // A machine has a default route, or its own processes could not even begin to reach a Service address.
        let up = pod("up", "10.1.0.2");
        let mut route = Route::open().unwrap();
        let link = route.need_link(&up.link).unwrap().index;
        let any: ipnet::IpNet = "0.0.0.0/0".parse().unwrap();
        route
            .run(Request::add_route(&RouteEntry::via_gateway(any, link, up.address)))
            .unwrap();
        test();
    };
    std::thread::spawn(body).join().unwrap();
}

struct Pod {
    ns: NetNs,
    address: Ipv4Addr,
    link: String,
}

/// A routed pod of the router `host`: /32 on both sides, as transparent mode and a VNet's ports have it.
fn pod_at(host: &Path, name: &str, address: &str) -> Pod {
    let ns = netns::create_named(&PathBuf::from("/run/t").join(name)).unwrap();
    let host = netns::open(host).unwrap();
    let link = format!("v-{name}");
    let address: Ipv4Addr = address.parse().unwrap();
    let gateway: std::net::IpAddr = "169.254.1.1".parse().unwrap();
    let (outer, inner) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 1, address.octets()[3]]);
    let mut there = Route::open_in(&ns).unwrap();
    let mut here = Route::open_in(&host).unwrap();
    let peer = VethPeer {
        name: "eth0".into(),
        mac: Some(inner),
        mtu: None,
        netns: Some(ns.as_fd()),
    };
    here.run(Request::create_veth(&Veth {
        name: link.clone(),
        mac: Some(outer),
        mtu: None,
        up: true,
        peer,
    }))
    .unwrap();
    let (o, i) = (
        here.need_link(&link).unwrap().index,
        there.need_link("eth0").unwrap().index,
    );
    let net = ipnet::IpNet::from(std::net::IpAddr::V4(address));
    let known = |link, address, mac| Neighbour {
        link,
        address,
        mac: Some(mac),
        proxy: false,
        permanent: true,
    };
    there
        .run_all(&[
            Request::set_up(i, true),
            Request::add_address(&Address {
                link: i,
                address: net,
                no_prefix_route: false,
            }),
            Request::add_neighbour(&known(i, gateway, outer)),
            Request::add_route(&RouteEntry::via_gateway(
                "0.0.0.0/0".parse::<ipnet::IpNet>().unwrap(),
                i,
                gateway,
            )),
        ])
        .unwrap();
    here.run_all(&[
        Request::add_neighbour(&known(o, address.into(), inner)),
        Request::add_route(&RouteEntry::via_link(net, o)),
    ])
    .unwrap();
    host.run(|| sysctl::set(&format!("net/ipv4/conf/{link}/forwarding"), "1").unwrap())
        .unwrap();
    Pod { ns, address, link }
}

const HERE: &str = "/proc/thread-self/ns/net";

fn pod(name: &str, address: &str) -> Pod {
    pod_at(Path::new(HERE), name, address)
}

impl Pod {
    /// Answers every connection on `port` with `name` and the client's address.
    fn serve(&self, port: u16, name: &'static str) {
        let address = self.address;
        let (tcp, udp) = self
            .ns
            .run(|| {
                (
                    TcpListener::bind((address, port)).unwrap(),
                    UdpSocket::bind((address, port)).unwrap(),
                )
            })
            .unwrap();
        std::thread::spawn(move || {
            for stream in tcp.incoming() {
                let Ok(mut stream) = stream else { return };
                let peer = stream.peer_addr().map(|p| p.ip().to_string()).unwrap_or_default();
                let _ = stream.write_all(format!("{name} {peer}").as_bytes());
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(name.as_bytes(), from);
            }
        });
    }

    fn ask(&self, to: &str) -> std::io::Result<String> {
        self.ns.run(|| ask(to)).unwrap()
    }

    fn ask_udp(&self, to: &str) -> std::io::Result<String> {
        self.ns
            .run(|| {
                let s = UdpSocket::bind("0.0.0.0:0")?;
                s.set_read_timeout(Some(WAIT))?;
                s.connect(to)?;
                s.send(b"?")?;
                let mut buffer = [0; 64];
                let n = s.recv(&mut buffer)?;
                Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
            })
            .unwrap()
    }
}

fn ask(to: &str) -> std::io::Result<String> {
    let to: SocketAddr = to.parse().unwrap();
    let mut stream = TcpStream::connect_timeout(&to, WAIT)?;
    stream.set_read_timeout(Some(WAIT))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn service(name: &str, spec: Value) -> Arc<Service> {
    Arc::new(serde_json::from_value(json!({"metadata": {"namespace": "d", "name": name}, "spec": spec})).unwrap())
}

fn slice(of: &str, addresses: &[&str]) -> Arc<EndpointSlice> {
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|a| json!({"addresses": [a], "nodeName": "n1"}))
        .collect();
    Arc::new(
        serde_json::from_value(json!({
            "metadata": {"namespace": "d", "name": of, "labels": {"kubernetes.io/service-name": of}},
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "t", "port": 8080, "protocol": "TCP"}, {"name": "u", "port": 8080, "protocol": "UDP"}],
        }))
        .unwrap(),
    )
}

fn two_ports(ip: &str, node_port: u16) -> Value {
    json!({"type": "NodePort", "clusterIP": ip,
           "ports": [{"name": "t", "port": 80, "nodePort": node_port}, {"name": "u", "port": 80, "protocol": "UDP"}]})
}

fn config(scope: Scope) -> PlanConfig {
    PlanConfig {
        table: "t-services".into(),
        scope,
        dns_ip: None,
    }
}

fn names(answers: impl Iterator<Item = std::io::Result<String>>) -> BTreeSet<String> {
    answers
        .map(|a| a.unwrap().split(' ').next().unwrap().to_owned())
        .collect()
}

#[test]
fn connections_land_on_every_endpoint_and_follow_changes() {
    on_machine(|| {
        let (a, b, c) = (pod("a", "10.1.0.11"), pod("b", "10.1.0.12"), pod("c", "10.1.0.13"));
        a.serve(8080, "a");
        b.serve(8080, "b");
        let s = [
            service("web", two_ports("10.0.0.1", 30080)),
            service("none", two_ports("10.0.0.2", 30081)),
        ];
        let mut executor = Executor::open(None).unwrap();
        let mut apply = |ends: &[&str]| {
            let world = World::new(&s, &[slice("web", ends)], "n1");
            executor.apply(plan(&world, &config(Scope::Machine))).unwrap()
        };
        assert_eq!(apply(&["10.1.0.11", "10.1.0.12"]), Change::Changed);
        assert_eq!(
            apply(&["10.1.0.12", "10.1.0.11"]),
            Change::None,
            "the same endpoints in another order"
        );

        let both = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        assert_eq!(names((0..32).map(|_| c.ask("10.0.0.1:80"))), both, "from a pod");
        assert_eq!(
            names((0..32).map(|_| ask("10.0.0.1:80"))),
            both,
            "from the machine itself"
        );
        assert_eq!(names((0..32).map(|_| c.ask_udp("10.0.0.1:80"))), both, "over UDP");
        assert_eq!(
            names((0..32).map(|_| a.ask("10.0.0.1:80"))),
            both,
            "from an endpoint, itself included"
        );
        assert_eq!(
            c.ask("10.0.0.1:80").unwrap().split(' ').nth(1).unwrap(),
            "10.1.0.13",
            "the client stays visible"
        );
        assert_eq!(names((0..32).map(|_| c.ask("10.1.0.1:30080"))), both, "by node port");
        assert_eq!(
            names((0..32).map(|_| ask("10.1.0.1:30080"))),
            both,
            "by node port from the machine"
        );

        // No endpoints, and a port that the Service does not have: an answer at once, not a timeout.
        for to in ["10.0.0.2:80", "10.0.0.1:81", "10.1.0.1:30081"] {
            for error in [c.ask(to).unwrap_err(), ask(to).unwrap_err()] {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{to}");
            }
        }
        assert_eq!(
            c.ask_udp("10.0.0.2:80").unwrap_err().kind(),
            std::io::ErrorKind::ConnectionRefused
        );

        // A connection outlives the change that removes its endpoint from the Service.
        let listener = a.ns.run(|| TcpListener::bind("10.1.0.11:8081").unwrap()).unwrap();
        let held = service(
            "held",
            json!({"clusterIP": "10.0.0.3", "ports": [{"name": "h", "port": 80}]}),
        );
        let held_slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"namespace": "d", "name": "held", "labels": {"kubernetes.io/service-name": "held"}},
            "addressType": "IPv4", "endpoints": [{"addresses": ["10.1.0.11"]}], "ports": [{"name": "h", "port": 8081}],
        }))
        .unwrap();
        let all = [s[0].clone(), s[1].clone(), held];
        let world = World::new(&all, &[Arc::new(held_slice)], "n1");
        executor.apply(plan(&world, &config(Scope::Machine))).unwrap();
        let mut client =
            c.ns.run(|| TcpStream::connect_timeout(&"10.0.0.3:80".parse().unwrap(), WAIT).unwrap())
                .unwrap();
        let (mut server, _) = listener.accept().unwrap();
        executor
            .apply(plan(
                &World::new(&all, &[slice("web", &["10.1.0.12"])], "n1"),
                &config(Scope::Machine),
            ))
            .unwrap();
        server.write_all(b"x").unwrap();
        client.write_all(b"y").unwrap();
        client.set_read_timeout(Some(WAIT)).unwrap();
        server.set_read_timeout(Some(WAIT)).unwrap();
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        server.read_exact(&mut byte).unwrap();
        assert_eq!(
            names((0..16).map(|_| c.ask("10.0.0.1:80"))),
            BTreeSet::from(["b".to_owned()])
        );

        executor.remove("t-services").unwrap();
        executor.remove("t-services").unwrap();
        assert!(Nft::open().unwrap().tables().unwrap().is_empty());
    });
}

#[test]
fn two_clusters_in_one_router_have_equal_service_addresses() {
    on_machine(|| {
        let router = PathBuf::from("/run/t/router");
        netns::create_named(&router).unwrap();
        own_address(Some(&router), Ipv4Addr::new(168, 63, 129, 16)).unwrap();
        let pod = |name: &str, address: &str| pod_at(&router, name, address);
        let (one, two) = (pod("one", "10.2.0.11"), pod("two", "10.2.0.12"));
        let (c1, c2, other) = (
            pod("c1", "10.2.0.21"),
            pod("c2", "10.2.0.22"),
            pod("other", "10.2.0.31"),
        );
        one.serve(8080, "one");
        two.serve(8080, "two");
        // The VNet's part: packets of a cluster's ports carry its mark.
        let mut marks = Table::new(Family::Ip, "t-marks");
        let marked = [(&c1, 1), (&one, 1), (&c2, 2), (&two, 2)];
        let rules: Vec<Rule> = marked
            .iter()
            .map(|(p, m)| Rule::new().iifname(&p.link).set_mark(*m, 0xffff))
            .collect();
        marks.chains = vec![Chain::base(
            "mark",
            ChainKind::Filter,
            HookPoint::Prerouting,
            -150,
            rules,
        )];
        Nft::open_in(&netns::open(&router).unwrap())
            .unwrap()
            .ensure(&marks)
            .unwrap();

        let s = [service("web", two_ports("10.0.0.1", 30080))];
        let mut executors = Vec::new();
        for (name, end, mark) in [("one", "10.2.0.11", 1), ("two", "10.2.0.12", 2)] {
            let config = PlanConfig {
                table: format!("t-{name}"),
                scope: Scope::Mark(mark),
                dns_ip: None,
            };
            let mut executor = Executor::open(Some(&router)).unwrap();
            executor
                .apply(plan(&World::new(&s, &[slice("web", &[end])], "n"), &config))
                .unwrap();
            executors.push(executor);
        }
        for (pod, name) in [(&c1, "one"), (&c2, "two"), (&one, "one"), (&two, "two")] {
            assert!(pod.ask("10.0.0.1:80").unwrap().starts_with(name));
            assert_eq!(
                pod.ask("10.0.0.1:81").unwrap_err().kind(),
                std::io::ErrorKind::ConnectionRefused
            );
        }
        assert!(other.ask("10.0.0.1:80").is_err(), "a link of no cluster");
        assert!(other.ask("10.2.0.11:8080").unwrap().starts_with("one"));
        assert_eq!(executors[0].verify().unwrap(), Change::None);
        executors[1].remove("t-one").unwrap();
        assert_eq!(
            executors[0].verify().unwrap(),
            Change::Changed,
            "a table that was taken away comes back"
        );
        assert!(c1.ask("10.0.0.1:80").unwrap().starts_with("one"));
    });
}

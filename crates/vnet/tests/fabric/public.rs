//! Public addresses: which one a flow leaves by, and what comes in by an instance's.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use vnet::Fabric;
use vnet_model::fabric::{
    FabricSpec, InstanceAddressSpec, NatGatewaySpec, OutboundSpec, Protocol, RouteSpec, RouteTableSpec, Uplink,
};

use crate::common::*;

const OUTSIDE: &str = "198.19.0.1:443";

/// Machine `a` and an endpoint of the platform in the edge that answers with the caller's address and port.
fn setup() -> (Fabric, FabricSpec, Machine) {
    let fabric = Fabric::open("t", RUN).unwrap();
    let mut spec = fabric_spec(&[vnet("v1", &[nic("a", "10.1.0.4"), nic("b", "10.1.0.5")])]);
    spec.edge.endpoints = vec![ip("198.19.0.1")];
    fabric.apply(&spec).unwrap();
    let listener = fabric
        .listen_in(&fabric.edge_netns(), OUTSIDE.parse().unwrap())
        .unwrap();
    std::thread::spawn(move || {
        // Kept open: a port that is in use shall stay in use.
        let mut open = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().unwrap().to_string();
            let _ = stream.write_all(peer.as_bytes());
            let _ = stream.shutdown(std::net::Shutdown::Write);
            open.push(stream);
        }
    });
    let a = Machine::boot(&fabric, "a");
    (fabric, spec, a)
}

fn seen_as(machine: &Machine) -> SocketAddr {
    machine.ask(OUTSIDE).unwrap().parse().unwrap()
}

fn gateway(addresses: &[&str]) -> NatGatewaySpec {
    NatGatewaySpec {
        key: "g".into(),
        addresses: addresses.iter().map(|a| ip(a)).collect(),
        idle_timeout_s: 240,
    }
}

fn instance(public: &str) -> InstanceAddressSpec {
    InstanceAddressSpec {
        private: ip("10.1.0.4"),
        public: ip(public),
        idle_timeout_s: 240,
    }
}

fn outbound(first_port: u16, last_port: u16) -> OutboundSpec {
    OutboundSpec {
        private: ip("10.1.0.4"),
        protocol: Protocol::All,
        public: ip("198.19.0.7"),
        first_port,
        last_port,
        idle_timeout_s: 240,
    }
}

#[test]
fn a_nat_gateway_wins_over_an_instance_address_and_that_over_an_outbound_rule() {
    on_a_host(|| {
        let (fabric, mut spec, a) = setup();
        assert_eq!(seen_as(&a).ip(), ip("100.127.192.4"));
        spec.vnets[0].outbound = vec![outbound(2048, 2055)];
        fabric.apply(&spec).unwrap();
        let seen = seen_as(&a);
        assert_eq!(seen.ip(), ip("198.19.0.7"));
        assert!((2048..=2055).contains(&seen.port()), "{seen}");
        spec.vnets[0].instance_addresses = vec![instance("198.19.0.6")];
        fabric.apply(&spec).unwrap();
        assert_eq!(seen_as(&a).ip(), ip("198.19.0.6"));
        spec.vnets[0].nat_gateways = vec![gateway(&["198.19.0.4", "198.19.0.5"])];
        spec.vnets[0].subnets[0].nat_gateway = Some("g".into());
        fabric.apply(&spec).unwrap();
        let seen: BTreeSet<_> = (0..64).map(|_| seen_as(&a).ip().to_string()).collect();
        assert_eq!(Vec::from_iter(seen), ["198.19.0.4", "198.19.0.5"]);
        // What comes in by the instance's address is still answered by it.
        a.echo_callers(80);
        assert_eq!(ask("198.19.0.6:80").unwrap(), "100.127.192.1");
        // Nobody gets in by a gateway's address.
        assert!(ask("198.19.0.4:80").unwrap_err().contains("No route"));
        fabric.distrust();
        assert_eq!(fabric.apply(&spec).unwrap().changes, 0);
        // A gateway without addresses leads nowhere.
        spec.vnets[0].nat_gateways = vec![gateway(&[])];
        fabric.apply(&spec).unwrap();
        let closed = a.run(|| TcpStream::connect_timeout(&OUTSIDE.parse().unwrap(), Duration::from_millis(200)));
        assert!(closed.is_err());
        assert!(dropped(&fabric, vnet::NO_ADDRESS) > 0);
    });
}

#[test]
fn an_instance_address_leads_in_for_every_protocol_and_to_the_machine_itself() {
    on_a_host(|| {
        let (fabric, mut spec, a) = setup();
        let b = Machine::boot(&fabric, "b");
        spec.vnets[0].instance_addresses = vec![instance("198.19.0.6")];
        spec.vnets.push(vnet("v2", &[nic("z", "10.1.0.4")]));
        fabric.apply(&spec).unwrap();
        let z = Machine::boot(&fabric, "z");
        a.echo_callers(80);
        a.echo_callers(8080);
        assert_eq!(ask("198.19.0.6:80").unwrap(), "100.127.192.1");
        assert_eq!(ask("198.19.0.6:8080").unwrap(), "100.127.192.1");
        assert_eq!(z.ask("198.19.0.6:80").unwrap(), "100.127.192.5");
        assert_eq!(b.ask("198.19.0.6:80").unwrap(), "10.1.0.5");
        assert_eq!(a.ask("198.19.0.6:80").unwrap(), "198.19.0.6");
        assert!(ask("198.19.0.6:81").unwrap_err().contains("refused"));
        tool("ping", &["-c", "1", "-W", "3", "198.19.0.6"]);
        let socket = a.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        client.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        client.connect("198.19.0.6:53").unwrap();
        client.send(b"x").unwrap();
        let (_, from) = socket.recv_from(&mut [0; 8]).unwrap();
        socket.send_to(b"y", from).unwrap();
        assert_eq!(client.recv(&mut [0; 8]).unwrap(), 1);
        // Taken away: its flows end with it.
        spec.vnets[0].instance_addresses.clear();
        fabric.apply(&spec).unwrap();
        assert!(ask("198.19.0.6:80").unwrap_err().contains("No route"));
        assert_eq!(seen_as(&a).ip(), ip("100.127.192.4"));
        socket.set_nonblocking(true).unwrap();
        client.send(b"x").unwrap();
        assert!(ask("198.19.0.6:80").unwrap_err().contains("No route"));
        assert!(socket.recv_from(&mut [0; 8]).is_err());
    });
}

#[test]
fn snat_ports_are_as_many_as_were_given_and_serve_every_destination() {
    on_a_host(|| {
        let (fabric, mut spec, a) = setup();
        spec.vnets[0].outbound = vec![outbound(2048, 2051)];
        spec.edge.endpoints.push(ip("198.19.0.2"));
        fabric.apply(&spec).unwrap();
        let other = fabric
            .listen_in(&fabric.edge_netns(), "198.19.0.2:443".parse().unwrap())
            .unwrap();
        let connect = |to: &str| {
            let to = to.parse().unwrap();
            a.run(move || TcpStream::connect_timeout(&to, Duration::from_millis(500)))
        };
        let open: Vec<TcpStream> = (0..4).map(|_| connect(OUTSIDE).unwrap()).collect();
        assert!(connect(OUTSIDE).is_err(), "a fifth flow has no port left");
        let mut ports = BTreeSet::new();
        for _ in 0..4 {
            let _ = connect("198.19.0.2:443").unwrap();
            ports.insert(other.accept().unwrap().1.port());
        }
        assert!(ports.iter().all(|p| (2048..=2051).contains(p)), "{ports:?}");
        drop(open);
    });
}

#[test]
fn public_sources_leave_the_host_by_its_uplink() {
    on_a_host(|| {
        let outside = linux::netns::create_named("/run/outside".as_ref()).unwrap();
        tool("ip", &["link", "add", "up0", "type", "veth", "peer", "name", "world"]);
        tool("ip", &["link", "set", "world", "netns", "/run/outside"]);
        tool("ip", &["addr", "add", "192.0.2.1/24", "dev", "up0"]);
        tool("ip", &["link", "set", "up0", "up"]);
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
        let (fabric, mut spec, a) = setup();
        spec.edge.uplink = Uplink::Link("up0".into());
        spec.vnets[0].nat_gateways = vec![gateway(&["198.19.0.4"])];
        spec.vnets[0].subnets[0].nat_gateway = Some("g".into());
        fabric.apply(&spec).unwrap();
        assert_eq!(a.ask("192.0.2.9:80").unwrap(), "192.0.2.1");
        // A route table's way to the Internet is the gateway's, too.
        spec.vnets[0].route_tables = vec![RouteTableSpec {
            key: "t".into(),
            routes: vec![RouteSpec {
                prefix: "0.0.0.0/0".parse().unwrap(),
                next_hop: vnet_model::fabric::NextHop::Internet,
            }],
        }];
        spec.vnets[0].subnets[0].route_table = Some("t".into());
        fabric.apply(&spec).unwrap();
        assert_eq!(seen_as(&a).ip(), ip("198.19.0.4"));
    });
}

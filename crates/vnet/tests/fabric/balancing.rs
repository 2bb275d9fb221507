//! How load balancers spread, probe, refuse and forget.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use linux::conntrack::Conntrack;
use vnet::Fabric;
use vnet_model::fabric::{Distribution, FabricSpec, FrontendSpec, ProbeKind, ProbeSpec, Protocol};

use crate::common::*;

/// Backends `a` and `b` that answer with their own name on 8080 and 8081, and a client `c`.
fn setup(frontends: Vec<FrontendSpec>) -> (Fabric, FabricSpec, [Machine; 3]) {
    let fabric = Fabric::open("t", RUN).unwrap();
    let nics = [nic("a", "10.1.0.4"), nic("b", "10.1.0.5"), nic("c", "10.1.0.6")];
    let mut spec = fabric_spec(&[vnet("v1", &nics)]);
    spec.vnets[0].frontends = frontends;
    fabric.apply(&spec).unwrap();
    let machines = ["a", "b", "c"].map(|n| Machine::boot(&fabric, n));
    (fabric, spec, machines)
}

fn named(machine: &Machine, port: u16, name: &'static str) {
    let listener = machine.run(|| TcpListener::bind(("0.0.0.0", port)).unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(name.as_bytes());
        }
    });
}

fn both(port: u16, backend: u16) -> FrontendSpec {
    frontend("198.19.0.10", port, &[("10.1.0.4", backend), ("10.1.0.5", backend)])
}

#[test]
fn each_distribution_hashes_its_own_tuple() {
    on_a_host(|| {
        let with = |port, backend, distribution| FrontendSpec {
            distribution,
            ..both(port, backend)
        };
        let (_fabric, _, [a, b, c]) = setup(vec![
            both(80, 8080),
            with(81, 8080, Distribution::SourceIp),
            with(82, 8081, Distribution::SourceIp),
            with(83, 8081, Distribution::SourceIpProtocol),
        ]);
        for port in [8080, 8081] {
            named(&a, port, "a");
            named(&b, port, "b");
        }
        let seen = |port: u16| -> BTreeSet<String> {
            let to = format!("198.19.0.10:{port}");
            (0..64).map(|_| c.ask(&to).unwrap()).collect()
        };
        assert_eq!(seen(80).len(), 2, "every connection has a port of its own");
        let by_source = seen(81);
        assert_eq!(by_source.len(), 1);
        assert_eq!(
            seen(82),
            by_source,
            "two ports of one frontend, one backend for a client"
        );
        assert_eq!(seen(83).len(), 1);
    });
}

#[test]
fn strangers_to_a_frontend_are_refused_and_counted() {
    on_a_host(|| {
        let restricted = FrontendSpec {
            sources: vec!["10.1.0.6/32".parse().unwrap(), "10.1.0.6/31".parse().unwrap()],
            ..both(80, 8080)
        };
        let (fabric, _, [a, b, c]) = setup(vec![restricted]);
        named(&a, 8080, "a");
        named(&b, 8080, "b");
        c.ask("198.19.0.10:80").unwrap();
        let refused = ask("198.19.0.10:80").unwrap_err();
        assert!(refused.contains("No route"), "{refused}");
        assert!(a.ask("198.19.0.10:80").is_err());
        assert_eq!(dropped(&fabric, vnet::NOT_A_SOURCE), 2);
    });
}

#[test]
fn every_port_of_an_internal_frontend_and_one_that_is_its_own() {
    on_a_host(|| {
        let address = ip("10.1.0.100");
        let backend = |at: &str, port| vnet_model::fabric::BackendSpec { address: ip(at), port };
        let whole = FrontendSpec::new(address, Protocol::All, 0, vec![backend("10.1.0.4", 0)]);
        let single = FrontendSpec::new(address, Protocol::Tcp, 80, vec![backend("10.1.0.5", 8080)]);
        let (fabric, mut spec, [a, b, c]) = setup(vec![whole, single]);
        named(&a, 8080, "a");
        named(&a, 22, "a");
        named(&b, 8080, "b");
        assert_eq!(c.ask("10.1.0.100:22").unwrap(), "a");
        assert_eq!(c.ask("10.1.0.100:8080").unwrap(), "a");
        assert_eq!(c.ask("10.1.0.100:80").unwrap(), "b");
        let socket = a.run(|| std::net::UdpSocket::bind("0.0.0.0:5353").unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let client = c.run(|| std::net::UdpSocket::bind("0.0.0.0:0").unwrap());
        client.send_to(b"x", "10.1.0.100:5353").unwrap();
        assert_eq!(socket.recv_from(&mut [0; 8]).unwrap().1.ip(), ip("10.1.0.6"));
        // Its datagrams move with its backend; a port without any is refused.
        spec.vnets[0].frontends[0].backends[0].address = ip("10.1.0.5");
        fabric.apply(&spec).unwrap();
        let moved = b.run(|| std::net::UdpSocket::bind("0.0.0.0:5353").unwrap());
        moved.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        client.send_to(b"x", "10.1.0.100:5353").unwrap();
        moved.recv(&mut [0; 8]).unwrap();
        spec.vnets[0].frontends[0].backends.clear();
        fabric.apply(&spec).unwrap();
        assert!(c.ask("10.1.0.100:22").unwrap_err().contains("refused"));
        assert_eq!(c.ask("10.1.0.100:80").unwrap(), "b");
    });
}

/// A stream through the frontend's port that stands, and its far end.
fn stream(backend: &Machine, client: &Machine, to: &str) -> (TcpStream, TcpStream) {
    let listener = backend.run(|| TcpListener::bind("0.0.0.0:9000").unwrap());
    let near = client.run(|| TcpStream::connect(to).unwrap());
    let far = listener.accept().unwrap().0;
    for end in [&near, &far] {
        end.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    }
    (near, far)
}

#[test]
fn an_idle_stream_is_forgotten_and_its_next_segment_reset_or_dropped() {
    on_a_host(|| {
        let idle = |port, tcp_reset| FrontendSpec {
            idle_timeout_s: 1,
            tcp_reset,
            ..frontend("198.19.0.10", port, &[("10.1.0.4", 9000)])
        };
        let (fabric, _, [a, _b, c]) = setup(vec![idle(80, true), idle(81, false)]);
        let ns = linux::netns::open(&fabric.vnet_netns("v1")).unwrap();
        let mut conntrack = Conntrack::open_in(&ns).unwrap();
        let mut forgotten = |port: u16| {
            wait_for("the stream to be forgotten", || {
                let all = conntrack.translations().unwrap();
                !all.iter().any(|t| t.asked == (ip("198.19.0.10"), port))
            });
        };
        let (mut near, _far) = stream(&a, &c, "198.19.0.10:80");
        forgotten(80);
        near.write_all(b"x").unwrap();
        let error = near.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        drop((near, _far));
        let (mut near, _far) = stream(&a, &c, "198.19.0.10:81");
        forgotten(81);
        let before = dropped(&fabric, vnet::FORGOTTEN);
        near.write_all(b"x").unwrap();
        wait_for("a dropped segment", || dropped(&fabric, vnet::FORGOTTEN) > before);
        near.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let error = near.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "nobody says a word");
    });
}

fn probe(kind: ProbeKind, port: u16) -> Option<ProbeSpec> {
    Some(ProbeSpec {
        kind,
        port,
        interval_ms: 10,
        threshold: 2,
    })
}

/// Applies what the probes found until the frontend leads to exactly these.
fn leads_to(fabric: &Fabric, spec: &FabricSpec, client: &Machine, wanted: &[&str]) {
    let wanted: BTreeSet<&str> = wanted.iter().copied().collect();
    wait_for(&format!("backends {wanted:?}"), || {
        fabric.apply(spec).unwrap();
        let answers: Vec<String> = (0..16).filter_map(|_| client.ask("198.19.0.10:80").ok()).collect();
        answers.iter().map(String::as_str).collect::<BTreeSet<_>>() == wanted
    });
}

#[test]
fn a_backend_that_fails_its_probe_gets_no_new_flows_and_keeps_its_streams() {
    on_a_host(|| {
        let runtime = runtime();
        let front = FrontendSpec {
            probe: probe(ProbeKind::Tcp, 7000),
            ..both(80, 8080)
        };
        let second = FrontendSpec {
            probe: probe(ProbeKind::Tcp, 7000),
            ..frontend("198.19.0.10", 90, &[("10.1.0.4", 9000)])
        };
        let (fabric, mut spec, [a, b, c]) = setup(vec![front, second]);
        named(&a, 8080, "a");
        named(&b, 8080, "b");
        let alive = |m: &Machine| m.run(|| TcpListener::bind("0.0.0.0:7000").unwrap());
        let (at_a, at_b) = (alive(&a), alive(&b));
        fabric.serve(runtime.handle());
        leads_to(&fabric, &spec, &c, &["a", "b"]);
        assert_eq!(at_a.accept().unwrap().1.ip(), ip("168.63.129.16"));
        let (mut near, mut far) = stream(&a, &c, "198.19.0.10:90");
        drop(at_a);
        leads_to(&fabric, &spec, &c, &["b"]);
        assert!(
            fabric
                .health()
                .iter()
                .any(|h| h.target.backend == ip("10.1.0.4") && !h.up)
        );
        runtime.block_on(fabric.health_changed());
        // Nobody is left behind port 90: new flows are refused, the stream goes on.
        assert!(c.ask("198.19.0.10:90").unwrap_err().contains("refused"));
        near.write_all(b"still here").unwrap();
        let mut text = [0; 10];
        far.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"still here");
        drop(at_b);
        leads_to(&fabric, &spec, &c, &[]);
        let _back = alive(&a);
        leads_to(&fabric, &spec, &c, &["a"]);
        // What comes later is out until it answers.
        spec.vnets[0].frontends[0]
            .backends
            .push(vnet_model::fabric::BackendSpec {
                address: ip("10.1.0.6"),
                port: 8080,
            });
        named(&c, 8080, "c");
        leads_to(&fabric, &spec, &b, &["a"]);
        let _there = alive(&c);
        leads_to(&fabric, &spec, &b, &["a", "c"]);
    });
}

/// Answers every request with the status, over whatever `wrap` makes of the connection.
fn serve_status<S: Read + Write>(
    machine: &Machine,
    port: u16,
    status: Arc<AtomicU16>,
    mut wrap: impl FnMut(TcpStream) -> S + Send + 'static,
) {
    let listener = machine.run(|| TcpListener::bind(("0.0.0.0", port)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = wrap(stream);
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n > 0) {
                request.push(byte[0]);
            }
            let status = match request.starts_with(b"GET /healthz?x=1 HTTP/1.1\r\n") {
                true => status.load(Ordering::Relaxed),
                false => 404,
            };
            let _ = stream.write_all(format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n").as_bytes());
            let _ = stream.flush();
        }
    });
}

fn tls_server() -> Arc<rustls::ServerConfig> {
    let certified = rcgen::generate_simple_self_signed(["nobody.test".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.into())
        .unwrap();
    Arc::new(config)
}

#[test]
fn a_probe_over_http_and_https_takes_200_and_nothing_else() {
    on_a_host(|| {
        let runtime = runtime();
        for (tls, path) in [(false, "/healthz?x=1"), (true, "/healthz?x=1")] {
            let path = path.to_owned();
            let (kind, port) = match tls {
                false => (ProbeKind::Http { path }, 7080),
                true => (ProbeKind::Https { path }, 7443),
            };
            let front = FrontendSpec {
                probe: probe(kind, port),
                ..frontend("198.19.0.10", 80, &[("10.1.0.4", 8080)])
            };
            let (fabric, spec, [a, _b, c]) = setup(vec![front]);
            named(&a, 8080, "a");
            let status = Arc::new(AtomicU16::new(200));
            if tls {
                let config = tls_server();
                serve_status(&a, port, status.clone(), move |stream| {
                    let connection = rustls::ServerConnection::new(config.clone()).unwrap();
                    rustls::StreamOwned::new(connection, stream)
                });
            } else {
                serve_status(&a, port, status.clone(), |stream| stream);
            }
            fabric.serve(runtime.handle());
            leads_to(&fabric, &spec, &c, &["a"]);
            for bad in [500, 204, 301] {
                status.store(bad, Ordering::Relaxed);
                leads_to(&fabric, &spec, &c, &[]);
                status.store(200, Ordering::Relaxed);
                leads_to(&fabric, &spec, &c, &["a"]);
            }
            drop(fabric);
            vnet::teardown("t", RUN.as_ref()).unwrap();
            for name in ["a", "b", "c"] {
                linux::netns::delete(format!("/run/machines/{name}").as_ref()).unwrap();
            }
        }
    });
}

//! Two virtual networks with equal ranges on a host of their own, with times. Needs root; touches nothing outside.
//!
//! Run it with `cargo run -p vnet --example two_networks`.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use linux::netns;
use vnet::{Fabric, NetnsRef, teardown};
use vnet_model::Mac;
use vnet_model::fabric::{
    BackendSpec, EdgeSpec, FabricSpec, FrontendSpec, IpConfigSpec, NicKind, NicSpec, Protocol, SubnetSpec, VnetSpec,
};

const MACHINES: u8 = 20;
/// One for the machine, the rest for its pods.
const ADDRESSES: u8 = 12;

fn main() {
    let host = || {
        if let Err(e) = netns::become_private_host(&[Path::new("/run")]) {
            eprintln!("this needs root: {e}");
            return;
        }
        show();
    };
    std::thread::spawn(host).join().expect("the example's thread");
}

fn timed<T>(what: &str, f: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let out = f();
    println!("{:>9.3} ms  {what}", start.elapsed().as_secs_f64() * 1e3);
    out
}

fn show() {
    let network = |key: &str| {
        let nic = |n: u8| NicSpec {
            key: format!("{key}-{n}"),
            mac: Mac::derived(&format!("{key}-{n}")),
            subnet: "nodes".to_owned(),
            ip_configs: (0..ADDRESSES)
                .map(|a| IpConfigSpec {
                    name: format!("c{a}"),
                    address: Ipv4Addr::new(10, 1, n, 4 + a),
                    primary: a == 0,
                })
                .collect(),
            kind: NicKind::Machine,
            host_name: Some(format!("m{n}")),
            ..NicSpec::default()
        };
        VnetSpec {
            key: key.to_owned(),
            prefixes: vec!["10.1.0.0/16".parse().expect("a prefix")],
            subnets: vec![SubnetSpec {
                name: "nodes".to_owned(),
                prefix: "10.1.0.0/16".parse().expect("a prefix"),
                ..SubnetSpec::default()
            }],
            nics: (1..=MACHINES).map(nic).collect(),
            ..VnetSpec::default()
        }
    };
    let mut spec = FabricSpec {
        instance: "show".to_owned(),
        vnets: vec![network("blue"), network("green")],
        edge: EdgeSpec::default(),
        underlay: None,
    };
    let backends = [1, 2]
        .map(|n| BackendSpec {
            address: Ipv4Addr::new(10, 1, n, 4),
            port: 8080,
        })
        .to_vec();
    let frontend = Ipv4Addr::new(198, 19, 0, 10);
    spec.vnets[0].frontends = vec![FrontendSpec::new(frontend, Protocol::Tcp, 80, backends)];

    let fabric = Fabric::open("show", "/run/show").expect("open");
    let report = timed("apply two networks", || fabric.apply(&spec).expect("apply"));
    println!("              {report:?}");
    let pins: Vec<(String, PathBuf)> = spec
        .vnets
        .iter()
        .flat_map(|v| {
            v.nics
                .iter()
                .map(|n| (n.key.clone(), PathBuf::from(format!("/run/machines/{}", n.key))))
        })
        .collect();
    timed("make the machines' namespaces", || {
        for (_, pin) in &pins {
            netns::create_named(pin).expect("namespace");
        }
    });
    timed("attach all NICs", || {
        for (nic, pin) in &pins {
            fabric
                .attach(nic, &NetnsRef::Path(pin.clone()), "eth0")
                .expect("attach");
        }
    });
    let again = timed("apply again", || fabric.apply(&spec).expect("apply"));
    println!("              {again:?}");
    spec.vnets[0].nics.truncate(usize::from(MACHINES) - 1);
    timed("apply with one NIC less", || fabric.apply(&spec).expect("apply"));
    fabric.distrust();
    timed("compare everything with the kernel", || {
        fabric.apply(&spec).expect("apply")
    });

    for (nic, pin) in pins.iter().filter(|(n, _)| n == "blue-1" || n == "blue-2") {
        let listener = netns::run_in(pin, || TcpListener::bind("0.0.0.0:8080"))
            .expect("enter")
            .expect("listen");
        let nic = nic.clone();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let peer = stream.peer_addr().map(|p| p.ip().to_string()).unwrap_or_default();
                let _ = write!(stream, "{nic} sees {peer}");
            }
        });
    }
    let ask = |to: SocketAddr| -> String {
        let answer = TcpStream::connect_timeout(&to, Duration::from_millis(500)).and_then(|mut s| {
            let mut text = String::new();
            s.read_to_string(&mut text).map(|_| text)
        });
        answer.unwrap_or_else(|e| e.to_string())
    };
    let blue = SocketAddr::from(([10, 1, 2, 4], 8080));
    for (from, pin) in pins.iter().filter(|(n, _)| n == "blue-1" || n == "green-1") {
        let answer = timed("connect", || netns::run_in(pin, || ask(blue)).expect("enter"));
        println!("              {from} -> {blue}: {answer}");
    }
    for _ in 0..3 {
        let answer = timed("connect", || ask(SocketAddr::from((frontend, 80))));
        println!("              host -> frontend {frontend}:80: {answer}");
    }
    timed("dial from 168.63.129.16", || {
        fabric.dial("blue", blue, Duration::from_secs(1)).expect("dial")
    });
    timed("tear everything down", || {
        teardown("show", Path::new("/run/show")).expect("teardown")
    });
}

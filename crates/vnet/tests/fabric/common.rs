//! A host of its own for every test: a thread in fresh network and mount namespaces, with `/run` empty, on which a fabric
//! is built and fake machines (namespaces with a NIC) are plugged in. Nothing outside is touched, nothing is left.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use linux::netns;
use vnet::{Fabric, NetnsRef};
use vnet_model::Mac;
use vnet_model::fabric::{
    BackendSpec, EdgeSpec, FabricSpec, FrontendSpec, IpConfigSpec, NicKind, NicSpec, Protocol, SubnetSpec, VnetSpec,
};

pub const RUN: &str = "/run/t";

/// Runs `test` on a host of its own.
pub fn on_a_host(test: impl FnOnce() + Send + 'static) {
    let host = move || {
        netns::become_private_host(&[Path::new("/run")]).unwrap();
        test();
    };
    if let Err(panic) = std::thread::spawn(host).join() {
        std::panic::resume_unwind(panic);
    }
}

pub fn ip(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

pub fn nic(key: &str, address: &str) -> NicSpec {
    NicSpec {
        key: key.to_owned(),
        mac: Mac::derived(key),
        subnet: "nodes".to_owned(),
        ip_configs: vec![IpConfigSpec {
            name: "primary".to_owned(),
            address: ip(address),
            primary: true,
        }],
        kind: NicKind::Machine,
        host_name: Some(key.to_owned()),
        ..NicSpec::default()
    }
}

/// A virtual network 10.1.0.0/16 with subnet `nodes` 10.1.0.0/24.
pub fn vnet(key: &str, nics: &[NicSpec]) -> VnetSpec {
    VnetSpec {
        key: key.to_owned(),
        prefixes: vec!["10.1.0.0/16".parse().unwrap()],
        subnets: vec![SubnetSpec {
            name: "nodes".to_owned(),
            prefix: "10.1.0.0/24".parse().unwrap(),
            ..SubnetSpec::default()
        }],
        nics: nics.to_vec(),
        ..VnetSpec::default()
    }
}

pub fn fabric_spec(vnets: &[VnetSpec]) -> FabricSpec {
    FabricSpec {
        instance: "t".to_owned(),
        vnets: vnets.to_vec(),
        edge: EdgeSpec::default(),
        underlay: None,
    }
}

pub fn frontend(address: &str, port: u16, backends: &[(&str, u16)]) -> FrontendSpec {
    let backend = |(a, p): &(&str, u16)| BackendSpec {
        address: ip(a),
        port: *p,
    };
    FrontendSpec::new(ip(address), Protocol::Tcp, port, backends.iter().map(backend).collect())
}

/// A machine: a namespace with a NIC of the fabric.
pub struct Machine {
    pub pin: PathBuf,
}

impl Machine {
    pub fn boot(fabric: &Fabric, nic: &str) -> Self {
        let pin = PathBuf::from(format!("/run/machines/{nic}"));
        netns::create_named(&pin).unwrap();
        fabric.attach(nic, &NetnsRef::Path(pin.clone()), "eth0").unwrap();
        Self { pin }
    }

    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        netns::run_in(&self.pin, f).unwrap()
    }

    /// Answers every connection with the caller's address, until the test ends.
    pub fn echo_callers(&self, port: u16) {
        let listener = self.run(|| std::net::TcpListener::bind(("0.0.0.0", port)).unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let peer = stream.peer_addr().unwrap().ip().to_string();
                let _ = stream.write_all(peer.as_bytes());
            }
        });
    }

    pub fn ask(&self, to: &str) -> Result<String, String> {
        self.run(|| ask(to))
    }

    pub fn ip(&self, arguments: &[&str]) -> String {
        self.run(|| tool("ip", arguments))
    }
}

/// Connects and reads everything.
pub fn ask(to: &str) -> Result<String, String> {
    let to: SocketAddr = to.parse().unwrap();
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(3)).map_err(|e| e.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|e| e.to_string())?;
    Ok(answer)
}

/// A GET over HTTP/1.0; the whole response.
pub fn get(to: &str, path: &str) -> String {
    let mut stream = TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_secs(3)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A question for an address.
pub fn question(name: &str) -> Vec<u8> {
    let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(label.len() as u8);
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    question
}

/// Response code and addresses of an answer to `question`.
fn answer(question: &[u8], answer: &[u8]) -> (u8, Vec<IpAddr>) {
    let mut at = question.len();
    let mut addresses = Vec::new();
    for _ in 0..u16::from_be_bytes([answer[6], answer[7]]) {
        // A compressed name, type, class, time, length, address.
        at += 12;
        addresses.push(IpAddr::from([
            answer[at],
            answer[at + 1],
            answer[at + 2],
            answer[at + 3],
        ]));
        at += 4;
    }
    (answer[3] & 15, addresses)
}

/// Asks the virtual network's DNS by datagram: response code and addresses.
pub fn resolve(name: &str) -> (u8, Vec<IpAddr>) {
    let question = question(name);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    socket.send_to(&question, "168.63.129.16:53").unwrap();
    let mut buffer = [0; 512];
    let length = socket.recv(&mut buffer).unwrap();
    answer(&question, &buffer[..length])
}

/// The same by stream.
pub fn resolve_by_stream(name: &str) -> (u8, Vec<IpAddr>) {
    let question = question(name);
    let mut stream = TcpStream::connect("168.63.129.16:53").unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    stream.write_all(&(question.len() as u16).to_be_bytes()).unwrap();
    stream.write_all(&question).unwrap();
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut buffer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut buffer).unwrap();
    answer(&question, &buffer)
}

pub fn tool(program: &str, arguments: &[&str]) -> String {
    let out = Command::new(program).args(arguments).output().unwrap();
    assert!(
        out.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

/// What people would look at on the host.
pub fn world() -> Vec<String> {
    let mut out: Vec<String> = [
        &["-j", "link"][..],
        &["-j", "addr"],
        &["-j", "route", "show", "table", "all"],
        &["-j", "neigh"],
    ]
    .iter()
    .map(|a| tool("ip", a))
    .collect();
    out.push(tool("nft", &["list", "ruleset"]));
    for entry in ["all", "default"] {
        out.push(std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{entry}/forwarding")).unwrap());
    }
    out
}

/// Waits until the predicate holds, at most three seconds.
pub fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < Duration::from_secs(3),
            "timed out waiting for: {what}"
        );
        std::thread::yield_now();
    }
}

/// A runtime for the servers; its threads belong to the test's host.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// Packets dropped so far by rules with this comment.
pub fn dropped(fabric: &Fabric, comment: &str) -> u64 {
    fabric
        .drops()
        .unwrap()
        .iter()
        .filter(|(_, c)| c.comment == comment)
        .map(|(_, c)| c.packets)
        .sum()
}

//! A machine in a namespace of its own: a NIC, pods, and a wire server that can misbehave.

use std::{
    io::{Read, Write},
    net::{TcpListener, UdpSocket},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use linux::{
    netlink::{Address, Request, Route, RouteEntry, Veth, VethPeer},
    netns::{self, NetNs},
};
use serde_json::{Value, json};

pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
pub const NIC_MAC: [u8; 6] = [0x00, 0x0d, 0x3a, 0, 0, 1];

/// What the wire server does next.
#[derive(Clone)]
pub enum Wire {
    Answer(String),
    /// Accepts and never answers.
    Silent,
}

pub struct Machine {
    pub dir: tempfile::TempDir,
    pub wire: Arc<Mutex<Wire>>,
    pub asked: Arc<AtomicUsize>,
    pub url: String,
}

/// One invocation's outcome.
#[derive(Debug)]
pub struct Out {
    pub ok: bool,
    pub doc: Option<Value>,
    pub stderr: String,
}

impl Out {
    pub fn code(&self) -> u64 {
        assert!(!self.ok, "{self:?}");
        self.doc.as_ref().expect("an error document")["code"].as_u64().unwrap()
    }

    pub fn address(&self) -> String {
        assert!(self.ok, "{self:?}");
        self.doc.as_ref().unwrap()["ips"][0]["address"]
            .as_str()
            .unwrap()
            .to_owned()
    }
}

pub fn interfaces(pods: impl Iterator<Item = u8>) -> String {
    let pods: String = pods
        .map(|i| format!("<IPAddress Address=\"10.240.0.{i}\" IsPrimary=\"false\"/>"))
        .collect();
    format!(
        "<Interfaces><Interface MacAddress=\"000D3A000001\" IsPrimary=\"true\"><IPSubnet Prefix=\"10.240.0.0/24\">\
         <IPAddress Address=\"10.240.0.4\" IsPrimary=\"true\"/>{pods}</IPSubnet></Interface></Interfaces>"
    )
}

/// Runs `test` as a machine: own namespaces, a NIC `nic0` at 10.240.0.4 and fd00:1::4 whose other end is a fabric with
/// 10.240.0.1 and fd00:1::1.
pub fn on_machine(pods: std::ops::Range<u8>, test: impl FnOnce(&Machine) + Send + 'static) {
    let body = move || {
        netns::become_private_host(&[Path::new("/run")]).unwrap();
        let fabric = netns::create_named(Path::new("/run/t/fabric")).unwrap();
        // A NIC that is up for a second has done this long ago.
        let settled = || linux::sysctl::set("net/ipv6/conf/default/dad_transmits", "0").unwrap();
        settled();
        fabric.run(settled).unwrap();
        let mut host = Route::open().unwrap();
        let mut there = Route::open_in(&fabric).unwrap();
        let peer = VethPeer {
            name: "port".into(),
            mac: None,
            mtu: Some(1400),
            netns: Some(fabric.as_fd()),
        };
        host.run(Request::create_veth(&Veth {
            name: "nic0".into(),
            mac: Some(NIC_MAC),
            mtu: Some(1400),
            up: true,
            peer,
        }))
        .unwrap();
        let nic = host.need_link("nic0").unwrap().index;
        let port = there.need_link("port").unwrap().index;
        let address = |link, a: &str| Address {
            link,
            address: a.parse().unwrap(),
            no_prefix_route: false,
        };
        there
            .run_all(&[
                Request::set_up(port, true),
                Request::add_address(&address(port, "10.240.0.1/32")),
                // As the fabric does it: every address of the NIC is routed to it.
                Request::add_route(&RouteEntry::via_link(
                    "10.240.0.4/32".parse::<ipnet::IpNet>().unwrap(),
                    port,
                )),
                Request::add_route(&RouteEntry::via_gateway(
                    "10.240.0.0/24".parse::<ipnet::IpNet>().unwrap(),
                    port,
                    "10.240.0.4".parse::<std::net::IpAddr>().unwrap(),
                )),
                Request::add_address(&address(port, "fd00:1::1/128")),
                Request::add_route(&RouteEntry::via_link(
                    "fd00:1::4/128".parse::<ipnet::IpNet>().unwrap(),
                    port,
                )),
                Request::add_route(&RouteEntry::via_gateway(
                    "fd00:1::/64".parse::<ipnet::IpNet>().unwrap(),
                    port,
                    "fd00:1::4".parse::<std::net::IpAddr>().unwrap(),
                )),
            ])
            .unwrap();
        host.run_all(&[
            Request::set_up(nic, true),
            Request::add_address(&address(nic, "10.240.0.4/24")),
            Request::add_route(&RouteEntry::via_gateway(
                "0.0.0.0/0".parse::<ipnet::IpNet>().unwrap(),
                nic,
                "10.240.0.1".parse::<std::net::IpAddr>().unwrap(),
            )),
            Request::add_address(&address(nic, "fd00:1::4/64")),
            Request::add_route(&RouteEntry::via_gateway(
                "::/0".parse::<ipnet::IpNet>().unwrap(),
                nic,
                "fd00:1::1".parse::<std::net::IpAddr>().unwrap(),
            )),
        ])
        .unwrap();
        assert!(host.settle("nic0").unwrap() && there.settle("port").unwrap());

        let wire = Arc::new(Mutex::new(Wire::Answer(interfaces(pods.into_iter()))));
        let asked = Arc::new(AtomicUsize::new(0));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (state, count) = (wire.clone(), asked.clone());
        // Ends with the test's process; its socket lives in this machine's namespace.
        std::thread::spawn(move || {
            let mut held = Vec::new();
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                count.fetch_add(1, Ordering::SeqCst);
                match state.lock().unwrap().clone() {
                    Wire::Silent => held.push(stream),
                    Wire::Answer(body) => {
                        let mut request = [0u8; 1024];
                        let n = stream.read(&mut request).unwrap_or(0);
                        let path = "GET /machine/plugins?comp=nmagent&type=getinterfaceinfov1 HTTP/1.1\r\n";
                        let status = if request[..n].starts_with(path.as_bytes()) {
                            "200 OK"
                        } else {
                            "404 Not Found"
                        };
                        let _ = write!(
                            stream,
                            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}",
                            body.len()
                        );
                    }
                }
            }
        });
        test(&Machine {
            dir: tempfile::tempdir_in("/run").unwrap(),
            wire,
            asked,
            url,
        });
    };
    std::thread::spawn(body).join().unwrap();
}

impl Machine {
    pub fn conf(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "azure", "type": "azure-vnet", "mode": "transparent",
            "stateDir": self.dir.path().join("state"),
            "ipam": {"type": "azure-vnet-ipam", "wireServerUrl": self.url, "coolDownMs": 0, "queryInterval": "60",
                     "timeoutMs": 2000},
        })
    }

    /// Links, routes and neighbour tables of the machine, and its policy rules, without what comes and goes by itself.
    pub fn kernel(&self) -> Vec<String> {
        let mut host = Route::open().unwrap();
        let links = host.links().unwrap();
        let mut all: Vec<String> = links.iter().map(|l| format!("link {}", l.name)).collect();
        let routes = host.routes().unwrap();
        all.extend(
            routes
                .iter()
                // What comes with a link of IPv6 goes with it; a route to one address of the main table is a pod's.
                .filter(|r| r.destination.addr().is_ipv4() || (r.table == 254 && r.destination.prefix_len() == 128))
                .map(|r| format!("route {} dev {:?} table {}", r.destination, r.link, r.table)),
        );
        let neighbours = host.neighbours().unwrap();
        all.extend(
            neighbours
                .iter()
                .filter(|n| n.permanent || n.proxy)
                .map(|n| format!("neighbour {} dev {}", n.address, n.link)),
        );
        all.extend(host.rules().unwrap().iter().map(|r| format!("rule {r:?}")));
        let tables = linux::nft::Nft::open().unwrap().tables().unwrap();
        all.extend(tables.iter().map(|t| format!("table {t:?}")));
        all
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state/ipam.json")
    }

    pub fn set_wire(&self, wire: Wire) {
        *self.wire.lock().unwrap() = wire;
    }

    pub fn pod(&self, name: &str) -> NetNs {
        netns::create_named(&self.pod_path(name)).unwrap()
    }

    pub fn pod_path(&self, name: &str) -> PathBuf {
        Path::new("/run/t/pods").join(name)
    }

    pub fn call(&self, command: &str, id: &str, conf: &Value) -> Out {
        let netns = self.pod_path(id);
        let env = [
            ("CNI_CONTAINERID", id),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", netns.to_str().unwrap()),
        ];
        exec(
            env!("CARGO_BIN_EXE_azure-vnet"),
            command,
            &env,
            conf.to_string().as_bytes(),
        )
    }

    pub fn add(&self, id: &str, version: &str) -> Out {
        self.pod(id);
        self.call("ADD", id, &self.conf(version))
    }

    pub fn reservations(&self) -> usize {
        let doc: Value = serde_json::from_slice(&std::fs::read(self.state()).unwrap()).unwrap();
        doc["state"]["reservations"].as_object().unwrap().len()
    }

    pub fn pod_links(&self) -> Vec<String> {
        let links = Route::open().unwrap().links().unwrap();
        links
            .into_iter()
            .map(|l| l.name)
            .filter(|n| n.starts_with("azv"))
            .collect()
    }

    pub fn with_previous(&self, version: &str, result: &Value) -> Value {
        let mut conf = self.conf(version);
        conf["prevResult"] = result.clone();
        conf
    }

    pub fn gc(&self, valid: &[&str]) -> Out {
        let mut conf = self.conf("1.1.0");
        conf["cni.dev/valid-attachments"] = valid
            .iter()
            .map(|id| json!({"containerID": id, "ifname": "eth0"}))
            .collect();
        exec(env!("CARGO_BIN_EXE_azure-vnet"), "GC", &[], conf.to_string().as_bytes())
    }
}

pub fn exec(binary: &str, command: &str, env: &[(&str, &str)], stdin: &[u8]) -> Out {
    let mut child = Command::new(binary)
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_PATH", "/nowhere")
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _ = child.stdin.take().unwrap().write_all(stdin);
    let out = child.wait_with_output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let mut documents = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
    let doc = documents.next().map(|d| d.unwrap());
    assert!(documents.next().is_none(), "more than one document: {text}");
    Out {
        ok: out.status.success(),
        doc,
        stderr: String::from_utf8(out.stderr).unwrap(),
    }
}

/// A datagram from `from` reaches `to` at `address`, and its answer comes back.
pub fn reaches(from: &NetNs, to: &NetNs, address: &str) -> bool {
    source_seen(from, to, address).is_some()
}

/// As whom `to` sees `from` when that sends a datagram to `address` and gets its answer.
pub fn source_seen(from: &NetNs, to: &NetNs, address: &str) -> Option<String> {
    let any = if address.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
    // At the address itself: an answer from another one would be a stranger's. A pod that is gone has none.
    let server = to.run(|| UdpSocket::bind((address, 0))).unwrap().ok()?;
    let client = from.run(|| UdpSocket::bind(any).unwrap()).unwrap();
    for s in [&server, &client] {
        s.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    }
    let port = server.local_addr().unwrap().port();
    let mut buffer = [0u8; 16];
    client.send_to(b"ping", (address, port)).ok()?;
    let (_, back) = server.recv_from(&mut buffer).ok()?;
    server.send_to(b"pong", back).ok()?;
    client.recv_from(&mut buffer).ok()?;
    Some(back.ip().to_string())
}

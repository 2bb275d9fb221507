//! The real binaries in namespaces of their own: a machine with a NIC, pods, and a wire server that can misbehave.

use std::{
    collections::BTreeSet,
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

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const NIC_MAC: [u8; 6] = [0x00, 0x0d, 0x3a, 0, 0, 1];

/// What the wire server does next.
#[derive(Clone)]
enum Wire {
    Answer(String),
    /// Accepts and never answers.
    Silent,
}

struct Machine {
    dir: tempfile::TempDir,
    wire: Arc<Mutex<Wire>>,
    asked: Arc<AtomicUsize>,
    url: String,
}

/// One invocation's outcome.
#[derive(Debug)]
struct Out {
    ok: bool,
    doc: Option<Value>,
    stderr: String,
}

impl Out {
    fn code(&self) -> u64 {
        assert!(!self.ok, "{self:?}");
        self.doc.as_ref().expect("an error document")["code"].as_u64().unwrap()
    }

    fn address(&self) -> String {
        assert!(self.ok, "{self:?}");
        self.doc.as_ref().unwrap()["ips"][0]["address"]
            .as_str()
            .unwrap()
            .to_owned()
    }
}

fn interfaces(pods: impl Iterator<Item = u8>) -> String {
    let pods: String = pods
        .map(|i| format!("<IPAddress Address=\"10.240.0.{i}\" IsPrimary=\"false\"/>"))
        .collect();
    format!(
        "<Interfaces><Interface MacAddress=\"000D3A000001\" IsPrimary=\"true\"><IPSubnet Prefix=\"10.240.0.0/24\">\
         <IPAddress Address=\"10.240.0.4\" IsPrimary=\"true\"/>{pods}</IPSubnet></Interface></Interfaces>"
    )
}

/// Runs `test` as a machine: own namespaces, a NIC `nic0` at 10.240.0.4 whose other end is a fabric with 10.240.0.1.
fn on_machine(pods: std::ops::Range<u8>, test: impl FnOnce(&Machine) + Send + 'static) {
    let body = move || {
        netns::become_private_host(&[Path::new("/run")]).unwrap();
        let fabric = netns::create_named(Path::new("/run/t/fabric")).unwrap();
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
        ])
        .unwrap();

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
    fn conf(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "azure", "type": "azure-vnet", "mode": "transparent",
            "stateDir": self.dir.path().join("state"),
            "ipam": {"type": "azure-vnet-ipam", "wireServerUrl": self.url, "coolDownMs": 0, "queryInterval": "60",
                     "timeoutMs": 2000},
        })
    }

    /// Links, IPv4 and neighbour tables of the machine, and its policy rules, without what comes and goes by itself.
    fn kernel(&self) -> Vec<String> {
        let mut host = Route::open().unwrap();
        let links = host.links().unwrap();
        let mut all: Vec<String> = links.iter().map(|l| format!("link {}", l.name)).collect();
        let routes = host.routes().unwrap();
        all.extend(
            routes
                .iter()
                .filter(|r| r.destination.addr().is_ipv4())
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

    fn state(&self) -> PathBuf {
        self.dir.path().join("state/ipam.json")
    }

    fn set_wire(&self, wire: Wire) {
        *self.wire.lock().unwrap() = wire;
    }

    fn pod(&self, name: &str) -> NetNs {
        netns::create_named(&self.pod_path(name)).unwrap()
    }

    fn pod_path(&self, name: &str) -> PathBuf {
        Path::new("/run/t/pods").join(name)
    }

    fn call(&self, command: &str, id: &str, conf: &Value) -> Out {
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

    fn add(&self, id: &str, version: &str) -> Out {
        self.pod(id);
        self.call("ADD", id, &self.conf(version))
    }

    fn reservations(&self) -> usize {
        let doc: Value = serde_json::from_slice(&std::fs::read(self.state()).unwrap()).unwrap();
        doc["state"]["reservations"].as_object().unwrap().len()
    }

    fn pod_links(&self) -> Vec<String> {
        let links = Route::open().unwrap().links().unwrap();
        links
            .into_iter()
            .map(|l| l.name)
            .filter(|n| n.starts_with("azv"))
            .collect()
    }

    fn with_previous(&self, version: &str, result: &Value) -> Value {
        let mut conf = self.conf(version);
        conf["prevResult"] = result.clone();
        conf
    }

    fn gc(&self, valid: &[&str]) -> Out {
        let mut conf = self.conf("1.1.0");
        conf["cni.dev/valid-attachments"] = valid
            .iter()
            .map(|id| json!({"containerID": id, "ifname": "eth0"}))
            .collect();
        exec(env!("CARGO_BIN_EXE_azure-vnet"), "GC", &[], conf.to_string().as_bytes())
    }
}

fn exec(binary: &str, command: &str, env: &[(&str, &str)], stdin: &[u8]) -> Out {
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

/// A datagram from `from` reaches `port` of `address`, and its answer comes back; seen from both ends.
fn reaches(from: &NetNs, to: &NetNs, address: &str) -> bool {
    let server = to.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    let client = from.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    for s in [&server, &client] {
        s.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    }
    let port = server.local_addr().unwrap().port();
    let mut buffer = [0u8; 16];
    if client.send_to(b"ping", (address, port)).is_err() {
        return false;
    }
    let Ok((_, back)) = server.recv_from(&mut buffer) else {
        return false;
    };
    server.send_to(b"pong", back).unwrap();
    client.recv_from(&mut buffer).is_ok()
}

#[test]
fn verbs_of_every_version() {
    on_machine(10..30, |m| {
        for v in VERSIONS {
            let id = format!("pod-{v}");
            let added = m.add(&id, v);
            assert!(added.ok, "{v}: {added:?}");
            let result = added.doc.clone().unwrap();
            assert_eq!(result["cniVersion"], v);
            assert_eq!(result["interfaces"][1]["name"], "eth0");
            assert_eq!(result["interfaces"][1]["sandbox"], m.pod_path(&id).to_str().unwrap());
            assert_eq!(result["ips"][0]["interface"], 1);
            assert_eq!(result["routes"][0], json!({"dst": "0.0.0.0/0", "gw": "169.254.1.1"}));
            assert_eq!(result["dns"]["nameservers"][0], "168.63.129.16");
            assert_eq!(m.pod_links(), [result["interfaces"][0]["name"].as_str().unwrap()]);

            let again = m.call("ADD", &id, &m.conf(v));
            assert_eq!(again.code(), 100, "an interface that exists is refused");
            assert_eq!(m.reservations(), 1, "and its address is not given back");

            let check = m.call("CHECK", &id, &m.with_previous(v, &result));
            if v < "0.4.0" {
                assert_eq!(check.code(), 1);
            } else {
                assert!(check.ok && check.doc.is_none(), "{check:?}");
                assert_eq!(m.call("CHECK", &id, &m.conf(v)).code(), 7, "CHECK needs prevResult");
            }
            for command in ["STATUS", "GC"] {
                let mut conf = m.conf(v);
                conf["cni.dev/valid-attachments"] = json!([{"containerID": id, "ifname": "eth0"}]);
                let out = m.call(command, &id, &conf);
                if v < "1.1.0" {
                    assert_eq!(out.code(), 1, "{command} {v}");
                } else {
                    assert!(out.ok && out.doc.is_none(), "{command} {v}: {out:?}");
                }
            }
            assert_eq!(
                (m.reservations(), m.pod_links().len()),
                (1, 1),
                "a valid attachment survives GC"
            );

            for _ in 0..2 {
                let del = m.call("DEL", &id, &m.with_previous(v, &result));
                assert!(del.ok && del.doc.is_none(), "{del:?}");
            }
            assert_eq!((m.reservations(), m.pod_links().len()), (0, 0));
            if v >= "0.4.0" {
                assert_eq!(m.call("CHECK", &id, &m.with_previous(v, &result)).code(), 101);
            }
        }
        let version = exec(env!("CARGO_BIN_EXE_azure-vnet"), "VERSION", &[], b"");
        assert_eq!(version.doc.unwrap()["supportedVersions"], json!(VERSIONS));
    });
}

#[test]
fn traffic_flows_between_pods_node_and_fabric() {
    on_machine(10..30, |m| {
        let (a, b) = (m.add("a", "1.1.0").address(), m.add("b", "1.1.0").address());
        let (a, b) = (a.trim_end_matches("/32"), b.trim_end_matches("/32"));
        let (pod_a, pod_b) = (m.pod("a"), m.pod("b"));
        let (node, fabric) = (
            NetNs::current().unwrap(),
            netns::open(Path::new("/run/t/fabric")).unwrap(),
        );
        assert!(reaches(&pod_a, &pod_b, b) && reaches(&pod_b, &pod_a, a));
        assert!(reaches(&node, &pod_a, a) && reaches(&pod_a, &node, "10.240.0.4"));
        assert!(reaches(&pod_a, &fabric, "10.240.0.1") && reaches(&fabric, &pod_b, b));
        let result = m.call("DEL", "b", &m.conf("1.1.0"));
        assert!(result.ok && !reaches(&pod_a, &pod_b, b));
        let mtu = Route::open_in(&pod_a).unwrap().need_link("eth0").unwrap().mtu;
        assert_eq!(mtu, 1400, "the NIC's");
    });
}

#[test]
fn bridge_and_tunnel_make_a_bridge_beside_the_nic_and_leave_nothing() {
    on_machine(10..30, |m| {
        let (node, fabric) = (
            NetNs::current().unwrap(),
            netns::open(Path::new("/run/t/fabric")).unwrap(),
        );
        let before = m.kernel();
        for mode in ["bridge", "tunnel", ""] {
            let mut conf = m.conf("1.1.0");
            conf["mode"] = json!(mode);
            if mode.is_empty() {
                conf.as_object_mut().unwrap().remove("mode");
            } else {
                conf["bridge"] = json!("azure0");
            }
            let nic = Route::open().unwrap().need_link("nic0").unwrap().index;
            let name = if mode.is_empty() {
                format!("azure{nic}")
            } else {
                "azure0".to_owned()
            };
            let add = |id: &str| {
                m.pod(id);
                let out = m.call("ADD", id, &conf);
                let address = out.address();
                let result = out.doc.unwrap();
                assert_eq!(result["interfaces"][0]["name"], name);
                assert_eq!(result["ips"][0]["interface"], 2);
                assert_eq!(result["ips"][0]["gateway"], "10.240.0.1");
                let mut check = conf.clone();
                check["prevResult"] = result;
                let checked = m.call("CHECK", id, &check);
                assert!(checked.ok, "{checked:?}");
                (address.trim_end_matches("/24").to_owned(), check)
            };
            let ((a, check), (b, _)) = (add("a"), add("b"));
            let (pod_a, pod_b) = (m.pod("a"), m.pod("b"));
            assert!(reaches(&node, &pod_a, &a) && reaches(&pod_a, &node, "10.240.0.4"));
            assert!(reaches(&pod_a, &fabric, "10.240.0.1") && reaches(&fabric, &pod_b, &b));
            if mode == "tunnel" {
                // Nothing between pods of one node, until the fabric sends it back.
                assert!(!reaches(&pod_a, &pod_b, &b));
                fabric
                    .run(|| linux::sysctl::set("net/ipv4/conf/port/forwarding", "1").unwrap())
                    .unwrap();
            }
            assert!(reaches(&pod_a, &pod_b, &b) && reaches(&pod_b, &pod_a, &a));
            let mut host = Route::open().unwrap();
            let bridge = host.need_link(&name).unwrap();
            let ports: Vec<_> = host
                .links()
                .unwrap()
                .into_iter()
                .filter(|l| l.master.is_some())
                .collect();
            assert_eq!(ports.len(), 2, "the NIC is no port");
            assert!(ports.iter().all(|p| p.port.unwrap().hairpin), "{mode}");
            let by_bridge = host.rules().unwrap().into_iter().filter(|r| r.iif.is_some());
            assert_eq!(by_bridge.count(), usize::from(mode == "tunnel"));
            assert_eq!(host.need_link("nic0").unwrap().mac, Some(NIC_MAC));

            let neighbour = *host
                .neighbours()
                .unwrap()
                .iter()
                .find(|n| n.link == bridge.index && n.address.to_string() == a)
                .unwrap();
            host.run(Request::delete_neighbour(&neighbour)).unwrap();
            assert_eq!(m.call("CHECK", "a", &check).code(), 101);
            host.run(Request::add_neighbour(&neighbour)).unwrap();
            assert!(m.call("CHECK", "a", &check).ok);

            // A lost state file, a lost pod, a bridge that somebody deleted.
            std::fs::remove_file(m.state()).unwrap();
            assert!(m.call("DEL", "a", &conf).ok);
            assert_eq!((m.reservations(), m.pod_links().len()), (1, 1), "{mode}");
            // cnitool sends no list: a pod that is still attached stays.
            conf.as_object_mut().unwrap().remove("cni.dev/valid-attachments");
            assert!(m.call("GC", "-", &conf).ok, "{mode}");
            assert_eq!((m.reservations(), m.pod_links().len()), (1, 1), "{mode}");
            netns::delete(&m.pod_path("b")).unwrap();
            drop(pod_b);
            // A runtime without pods sends a list that is empty, or null.
            conf["cni.dev/valid-attachments"] = if mode == "bridge" { Value::Null } else { json!([]) };
            let gc = m.call("GC", "-", &conf);
            assert!(gc.ok, "{gc:?}");
            assert_eq!(m.kernel(), before, "{mode}");
            assert_eq!(m.reservations(), 0);
        }
        let mut conf = m.conf("1.1.0");
        conf["mode"] = json!("bridge");
        conf["bridge"] = json!("nic0");
        m.pod("c");
        let out = m.call("ADD", "c", &conf);
        assert_eq!(out.code(), 100);
        assert!(out.doc.unwrap().to_string().contains("not made by azure-vnet"));
        conf["bridge"] = json!("azure0");
        assert!(m.call("STATUS", "c", &conf).ok);
        linux::sysctl::set("net/bridge/bridge-nf-call-iptables", "0").unwrap();
        let out = m.call("STATUS", "c", &conf);
        assert_eq!(out.code(), 50);
        assert!(out.doc.unwrap().to_string().contains("br_netfilter"));
        conf["mode"] = json!("tunnel");
        assert!(m.call("STATUS", "c", &conf).ok, "tunnel mode bridges nothing");
        assert_eq!(m.kernel(), before);
    });
}

/// Every step of every verb, in every mode: the process dies there, and afterwards GC, or DEL and GC, leave nothing.
#[test]
fn a_crash_at_any_step_leaves_nothing() {
    let mut killed = BTreeSet::new();
    let (tell, told) = std::sync::mpsc::channel();
    let in_mode = |mode: &'static str| {
        let tell = tell.clone();
        on_machine(10..20, move |m| {
            let before = m.kernel();
            let mut conf = m.conf("1.1.0");
            conf["mode"] = json!(mode);
            conf["ipam"]["queryInterval"] = json!("0");
            let mut gc = conf.clone();
            gc["cni.dev/valid-attachments"] = json!([]);
            let dies = |verb: &str, conf: &Value, step: &str| {
                let netns = m.pod_path("p");
                let env = [
                    ("CNI_CONTAINERID", "p"),
                    ("CNI_IFNAME", "eth0"),
                    ("CNI_NETNS", netns.to_str().unwrap()),
                    (cni::steps::VARIABLE, step),
                ];
                let out = exec(
                    env!("CARGO_BIN_EXE_azure-vnet"),
                    verb,
                    &env,
                    conf.to_string().as_bytes(),
                );
                if !out.ok {
                    assert!(out.doc.is_none(), "killed, so silent: {step} {out:?}");
                    tell.send(step.to_owned()).unwrap();
                }
                out
            };
            for step in cni::steps::ALL {
                for (verb, repair) in [
                    ("ADD", "GC"),
                    ("ADD", "DEL"),
                    ("DEL", "DEL"),
                    ("DEL", "GC"),
                    ("GC", "GC"),
                ] {
                    let about = format!("{mode} {verb} {step} {repair}");
                    netns::delete(&m.pod_path("p")).unwrap();
                    let _pod = m.pod("p");
                    if verb != "ADD" {
                        m.call("ADD", "p", &conf).address();
                    }
                    let out = dies(verb, if verb == "GC" { &gc } else { &conf }, step);
                    if out.ok && verb == "DEL" {
                        continue; // Which does not pass this step.
                    }
                    let repaired = m.call(repair, "p", if repair == "GC" { &gc } else { &conf });
                    assert!(repaired.ok, "{about}: {repaired:?}");
                    assert_eq!((m.reservations(), m.pod_links().len()), (0, 0), "{about}");
                    if repair == "DEL" {
                        let pods: Vec<String> = m.kernel().into_iter().filter(|l| l.contains("10.240.0.1")).collect();
                        let pods: Vec<&String> = pods
                            .iter()
                            .filter(|l| !l.contains("10.240.0.1/") && !l.contains("10.240.0.1 "))
                            .collect();
                        assert!(pods.is_empty(), "{about}: {pods:?}");
                        assert!(m.call("GC", "p", &gc).ok, "{about}");
                    }
                    assert_eq!(m.kernel(), before, "{about}");
                }
            }
            // The pod that comes next finds everything in order.
            netns::delete(&m.pod_path("p")).unwrap();
            m.pod("p");
            m.call("ADD", "p", &conf).address();
            assert!(m.call("GC", "p", &gc).ok);
        });
    };
    std::thread::scope(|scope| {
        for mode in ["transparent", "bridge", "tunnel"] {
            scope.spawn(|| in_mode(mode));
        }
    });
    drop(tell);
    killed.extend(told);
    assert_eq!(
        killed,
        cni::steps::ALL.iter().map(|s| (*s).to_owned()).collect(),
        "steps passed by no verb"
    );
}

#[test]
fn a_panic_prints_one_document_and_what_it_left_is_collected() {
    on_machine(10..20, |m| {
        m.pod("p");
        for step in ["reserved", "veth-made"] {
            let netns = m.pod_path("p");
            let at = format!("panic:{step}");
            let env = [
                ("CNI_CONTAINERID", "p"),
                ("CNI_IFNAME", "eth0"),
                ("CNI_NETNS", netns.to_str().unwrap()),
                (cni::steps::VARIABLE, at.as_str()),
            ];
            let conf = m.conf("0.4.0");
            let out = exec(
                env!("CARGO_BIN_EXE_azure-vnet"),
                "ADD",
                &env,
                conf.to_string().as_bytes(),
            );
            assert_eq!(out.code(), 999);
            assert_eq!(out.doc.unwrap()["cniVersion"], "0.4.0");
            assert!(m.gc(&[]).ok);
            assert_eq!((m.reservations(), m.pod_links().len()), (0, 0));
        }
    });
}

#[test]
fn check_sees_what_was_changed_behind_its_back() {
    on_machine(10..30, |m| {
        let result = m.add("a", "1.1.0").doc.unwrap();
        let conf = m.with_previous("1.1.0", &result);
        let pod = m.pod("a");
        let mut inside = Route::open_in(&pod).unwrap();
        let eth0 = inside.need_link("eth0").unwrap().index;
        let message = |out: Out| {
            assert_eq!(out.code(), 101);
            out.doc.unwrap()["msg"].as_str().unwrap().to_owned()
        };
        let default = *inside
            .routes()
            .unwrap()
            .iter()
            .find(|r| r.destination.prefix_len() == 0 && r.table == 254)
            .unwrap();
        inside.run(Request::delete_route(&default)).unwrap();
        assert!(message(m.call("CHECK", "a", &conf)).contains("route in the pod"));
        inside.run(Request::add_route(&default)).unwrap();
        assert!(m.call("CHECK", "a", &conf).ok);
        inside.run(Request::set_up(eth0, false)).unwrap();
        assert!(message(m.call("CHECK", "a", &conf)).contains("state of eth0"));
        let mut host = Route::open().unwrap();
        host.run(Request::delete_link_named(&m.pod_links()[0])).unwrap();
        assert!(message(m.call("CHECK", "a", &conf)).contains("host link"));
        assert!(m.call("DEL", "a", &conf).ok, "DEL after the link vanished");
        assert_eq!(m.reservations(), 0);
    });
}

#[test]
fn deletion_succeeds_whatever_is_lost() {
    on_machine(10..13, |m| {
        assert!(
            m.call("DEL", "never", &m.conf("1.0.0")).ok,
            "unknown attachment, no namespace"
        );
        m.add("a", "1.0.0").address();
        std::fs::remove_file(m.state()).unwrap();
        netns::delete(&m.pod_path("a")).unwrap();
        assert!(m.call("DEL", "a", &m.conf("1.0.0")).ok, "namespace and state gone");
        assert!(m.pod_links().is_empty());
        assert_eq!(m.reservations(), 0);

        // Lost or damaged state is rebuilt from the links: nothing alive is handed out again.
        let mut seen = BTreeSet::from([m.add("b", "1.0.0").address(), m.add("c", "1.0.0").address()]);
        std::fs::write(m.state(), b"\0\0\0\0").unwrap();
        let third = m.add("d", "1.0.0");
        assert!(third.stderr.contains("unusable"), "{}", third.stderr);
        assert!(seen.insert(third.address()));
        assert_eq!(m.add("e", "1.0.0").code(), 11, "three addresses, three pods");
        assert!(m.dir.path().join("state/ipam.json.broken").exists());
        std::fs::remove_dir_all(m.dir.path().join("state")).unwrap();
        let b = m.call("DEL", "b", &m.conf("1.0.0"));
        assert!(b.ok, "{b:?}");
        assert_eq!(m.reservations(), 2);
    });
}

#[test]
fn nothing_leaks_when_add_dies_between_steps() {
    on_machine(10..20, |m| {
        m.add("alive", "1.1.0").address();
        // After the reservation.
        let conf = m.conf("1.1.0");
        let env = [
            ("CNI_CONTAINERID", "dead1"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/t/pods/dead1"),
        ];
        assert!(
            exec(
                env!("CARGO_BIN_EXE_azure-vnet-ipam"),
                "ADD",
                &env,
                conf.to_string().as_bytes()
            )
            .ok
        );
        // After the link was made and before it was named.
        m.add("dead2", "1.1.0").address();
        let mut host = Route::open().unwrap();
        let alive = host
            .links()
            .unwrap()
            .into_iter()
            .find(|l| l.alias.as_deref().is_some_and(|a| a.contains(" alive ")));
        let dead = host
            .links()
            .unwrap()
            .into_iter()
            .find(|l| l.alias.as_deref().is_some_and(|a| a.contains(" dead2 ")))
            .unwrap();
        host.run(Request::set_alias(dead.index, "")).unwrap();
        // Another network's pod is nobody's business here.
        let mut other = m.conf("1.1.0");
        other["name"] = json!("other");
        m.pod("o");
        assert!(m.call("ADD", "o", &other).ok);
        assert_eq!((m.reservations(), m.pod_links().len()), (4, 3));

        // A missing list is not an empty one: what is attached stays.
        assert!(m.call("GC", "-", &m.conf("1.1.0")).ok);
        assert_eq!((m.reservations(), m.pod_links().len()), (2, 2));
        assert!(m.gc(&["alive"]).ok);
        assert_eq!((m.reservations(), m.pod_links().len()), (2, 2));
        assert!(m.pod_links().contains(&alive.unwrap().name));

        // A failing ADD undoes itself: the address is reserved before the master turns out to be missing.
        let mut conf = m.conf("1.1.0");
        conf["master"] = json!("nope0");
        m.pod("fails");
        assert_eq!(m.call("ADD", "fails", &conf).code(), 100);
        assert_eq!((m.reservations(), m.pod_links().len()), (2, 2));
    });
}

#[test]
fn fifty_parallel_adds_get_fifty_addresses() {
    on_machine(10..70, |m| {
        let ids: Vec<String> = (0..50).map(|i| format!("p{i}")).collect();
        ids.iter().for_each(|id| drop(m.pod(id)));
        // The threads are started here, so they are in the machine's namespace.
        let outs: Vec<Out> = std::thread::scope(|scope| {
            let calls: Vec<_> = ids
                .iter()
                .map(|id| scope.spawn(move || m.call("ADD", id, &m.conf("1.0.0"))))
                .collect();
            calls.into_iter().map(|c| c.join().unwrap()).collect()
        });
        let unique: BTreeSet<String> = outs.iter().map(Out::address).collect();
        assert_eq!(unique.len(), 50);
        assert_eq!((m.reservations(), m.pod_links().len()), (50, 50));
        assert!(m.gc(&[]).ok);
        assert_eq!((m.reservations(), m.pod_links().len()), (0, 0));
    });
}

#[test]
fn the_wire_server_may_be_gone_slow_or_talk_nonsense() {
    on_machine(10..12, |m| {
        let good = m.wire.lock().unwrap().clone();
        let fast = |timeout: u64, interval: &str| {
            let mut conf = m.conf("1.1.0");
            conf["ipam"]["timeoutMs"] = json!(timeout);
            conf["ipam"]["queryInterval"] = json!(interval);
            conf
        };
        m.pod("a");
        for (wire, word) in [
            (Wire::Silent, "did not answer"),
            (Wire::Answer("<html>".into()), "not understood"),
            (
                Wire::Answer(interfaces(10..12).replace("000D3A000001", "0102030405FF")),
                "01:02:03:04:05:ff",
            ),
        ] {
            m.set_wire(wire);
            let out = m.call("ADD", "a", &fast(100, "60"));
            assert_eq!(out.code(), 11, "{out:?}");
            assert!(out.doc.unwrap().to_string().contains(word), "{word}");
            assert_eq!(m.call("STATUS", "a", &fast(100, "60")).code(), 50);
        }
        let mut gone = fast(100, "60");
        gone["ipam"]["wireServerUrl"] = json!("http://127.0.0.1:1");
        assert_eq!(m.call("ADD", "a", &gone).code(), 11);
        assert!(m.pod_links().is_empty());

        m.set_wire(good);
        m.asked.store(0, Ordering::SeqCst);
        m.call("ADD", "a", &fast(2000, "60")).address();
        m.set_wire(Wire::Silent);
        m.pod("b");
        let b = m.call("ADD", "b", &fast(100, "0"));
        assert!(
            b.ok && b.stderr.contains("known before"),
            "a remembered pool goes on serving: {b:?}"
        );
        assert_eq!(m.asked.load(Ordering::SeqCst), 2);

        // Used up, until one more address is given to the NIC.
        m.set_wire(Wire::Answer(interfaces(10..12)));
        m.pod("c");
        let out = m.call("ADD", "c", &fast(2000, "60"));
        assert_eq!(out.code(), 11);
        let doc = out.doc.unwrap().to_string();
        assert!(
            doc.contains("No available addresses") && doc.contains("2 of 2"),
            "{doc}"
        );
        assert_eq!(m.call("STATUS", "c", &fast(2000, "60")).code(), 50);
        m.set_wire(Wire::Answer(interfaces(10..13)));
        assert_eq!(m.call("ADD", "c", &fast(2000, "60")).address(), "10.240.0.12/32");
    });
}

#[test]
fn the_separate_ipam_serves_other_plugins() {
    on_machine(10..20, |m| {
        let mut conf = m.conf("0.4.0");
        conf["type"] = json!("bridge");
        conf["ipMasq"] = json!(true);
        let ipam = |command: &str, id: &str, conf: &Value| {
            let env = [
                ("CNI_CONTAINERID", id),
                ("CNI_IFNAME", "eth0"),
                ("CNI_NETNS", "/proc/1/ns/net"),
            ];
            exec(
                env!("CARGO_BIN_EXE_azure-vnet-ipam"),
                command,
                &env,
                conf.to_string().as_bytes(),
            )
        };
        let out = ipam("ADD", "a", &conf);
        assert_eq!(out.address(), "10.240.0.10/24");
        let result = out.doc.unwrap();
        assert_eq!(result["ips"][0]["gateway"], "10.240.0.1");
        assert!(result.get("interfaces").is_none());
        assert_eq!(
            ipam("ADD", "a", &conf).address(),
            "10.240.0.10/24",
            "the same key, the same address"
        );
        let mut by_name = conf.clone();
        by_name["ipam"]["ipAddress"] = json!("10.240.0.15");
        assert_eq!(ipam("ADD", "b", &by_name).address(), "10.240.0.15/24");
        let mut check = conf.clone();
        check["prevResult"] = result;
        assert!(ipam("CHECK", "a", &check).ok);
        assert_eq!(ipam("CHECK", "b", &check).code(), 101);
        assert!(ipam("DEL", "a", &conf).ok && ipam("DEL", "a", &conf).ok);
        assert_eq!(ipam("CHECK", "a", &check).code(), 101);
        assert_eq!(m.reservations(), 1);
        // Least recently released comes last: the next is one never used.
        assert_eq!(ipam("ADD", "c", &conf).address(), "10.240.0.11/24");
    });
}

#[test]
fn the_pool_may_be_a_file_or_stand_in_the_configuration() {
    on_machine(10..12, |m| {
        m.set_wire(Wire::Silent);
        let file = m.dir.path().join("interfaces.json");
        let write = |first: &[&str], second: &[&str]| {
            let list = |a: &[&str]| a.iter().map(|a| json!({"Address": a})).collect::<Value>();
            let told = json!({"Interfaces": [{"MacAddress": "000D3A000001", "IsPrimary": true, "IPSubnets": [
                {"Prefix": "10.240.0.0/24", "IPAddresses": list(first)},
                {"Prefix": "10.241.0.0/24", "IPAddresses": list(second)}]}]});
            std::fs::write(&file, told.to_string()).unwrap();
        };
        let mut from_file = m.conf("1.1.0");
        from_file["ipam"] = json!({"type": "azure-vnet-ipam", "environment": "fileIpam", "interfacesFile": file,
            "coolDownMs": 0});
        let add = |id: &str, conf: &Value| {
            m.pod(id);
            m.call("ADD", id, conf)
        };
        write(&["10.240.0.50"], &["10.241.0.50"]);
        assert_eq!(add("a", &from_file).address(), "10.240.0.50/32");
        let mut second = from_file.clone();
        second["ipam"]["subnet"] = json!("10.241.0.0/24");
        assert_eq!(add("b", &second).address(), "10.241.0.50/32", "the second subnet's");
        assert_eq!(add("c", &from_file).code(), 11);
        // One address is withdrawn while in use, another one comes.
        write(&["10.240.0.51"], &["10.241.0.50"]);
        assert_eq!(
            add("c", &from_file).address(),
            "10.240.0.51/32",
            "a file is read every time"
        );
        assert!(m.call("DEL", "a", &from_file).ok);
        let full = add("d", &from_file);
        assert_eq!(full.code(), 11, "a withdrawn address does not come back");
        std::fs::write(&file, "{").unwrap();
        let out = add("d", &from_file);
        assert!(
            out.stderr.contains("going on with the addresses known before"),
            "{out:?}"
        );
        assert!(m.gc(&[]).ok);

        let mut listed = m.conf("1.1.0");
        listed["ipam"] = json!({"type": "azure-vnet-ipam", "coolDownMs": 0, "pools": [
            {"subnet": "10.240.0.0/24", "addresses": ["10.240.0.60-10.240.0.61"]},
            {"subnet": "10.241.0.0/24", "addresses": ["10.241.0.60"]}]});
        let mut by_name = listed.clone();
        by_name["ipam"]["ipAddress"] = json!("10.241.0.60");
        assert_eq!(add("e", &by_name).address(), "10.241.0.60/32");
        assert_eq!(add("f", &by_name).code(), 11, "it is held");
        assert_eq!(add("f", &listed).address(), "10.240.0.60/32");
        assert!(m.call("STATUS", "f", &listed).ok);
        for (key, value, word) in [
            ("ipAddress", json!("fd00::1"), "IPv6"),
            ("environment", json!("null"), "environment"),
            ("pools", json!([{"subnet": "fd00::/64", "addresses": []}]), "IPv6"),
        ] {
            let mut bad = listed.clone();
            bad["ipam"][key] = value;
            let out = add("g", &bad);
            assert_eq!(out.code(), 7);
            assert!(out.doc.unwrap()["msg"].as_str().unwrap().contains(word), "{key}");
        }
        let mut gc = listed.clone();
        gc["cni.dev/valid-attachments"] = json!([]);
        assert!(m.call("GC", "-", &gc).ok);
        assert_eq!((m.reservations(), m.pod_links().len()), (0, 0));
    });
}

#[test]
fn hostile_input_gets_one_precise_error() {
    on_machine(10..12, |m| {
        let bin = env!("CARGO_BIN_EXE_azure-vnet");
        m.pod("a");
        let env = [
            ("CNI_CONTAINERID", "a"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/t/pods/a"),
        ];
        let deep = "[".repeat(500_000);
        let huge = vec![b' '; 2 << 20];
        for (stdin, code) in [
            (b"".as_slice(), 6),
            (b"\xff\xfe", 6),
            (b"null", 6),
            (b"{}", 1),
            (deep.as_bytes(), 6),
            (&huge, 6),
            (b"{\"cniVersion\":\"9.9.9\",\"name\":\"x\"}", 1),
        ] {
            let out = exec(bin, "ADD", &env, stdin);
            assert_eq!(
                out.code(),
                code,
                "{:?}",
                String::from_utf8_lossy(&stdin[..stdin.len().min(40)])
            );
        }
        for (k, v, code) in [
            ("mode", json!("warp"), 7),
            ("name", json!("../../etc"), 7),
            ("prevResult", json!({"cniVersion": "1.1.0", "ips": []}), 7),
        ] {
            let mut conf = m.conf("1.1.0");
            conf[k] = v;
            let out = m.call("ADD", "a", &conf);
            assert_eq!(out.code(), code, "{k}");
            assert!(out.doc.unwrap()["msg"].as_str().unwrap().contains(k));
        }
        for (netns, word) in [
            ("/run/t/none", "open"),
            ("/etc/hostname", "not a network"),
            ("/proc/self/ns/net", "own"),
        ] {
            let env = [("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", netns)];
            let out = exec(bin, "ADD", &env, m.conf("1.1.0").to_string().as_bytes());
            assert_eq!(out.code(), 8);
            let msg = out.doc.unwrap()["msg"].as_str().unwrap().to_owned();
            assert!(msg.contains(word), "{msg}");
        }
        assert_eq!(exec(bin, "NOPE", &env, b"{}").code(), 4);
        assert_eq!(exec(bin, "ADD", &[], b"{}").code(), 4);
        let mut warned = m.conf("1.1.0");
        warned["logLevel"] = json!("debug");
        assert!(
            m.call("ADD", "a", &warned)
                .stderr
                .contains("keys without effect here: logLevel")
        );
    });
}

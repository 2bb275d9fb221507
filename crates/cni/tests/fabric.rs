//! Pods of two machines on a real virtual network: the pool comes from its wire server, pods talk by VNet address and by
//! Service address, and container groups at VNet ports see the same Services.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use linux::netns;
use parking_lot::RwLock;
use serde_json::{Value, json};
use service_proxy::{
    dns::{Server, ServerConfig, Zone, server::Sockets},
    executor::Executor,
    plan::{PlanConfig, Scope, plan},
    world::World,
};
use stdx::Shutdown;
use vnet::{Fabric, NetnsRef};
use vnet_model::{
    Mac,
    fabric::{
        ClusterServicesSpec, DnsSpec, EdgeSpec, FabricSpec, IpConfigSpec, NicKind, NicSpec, SubnetSpec, VnetSpec,
    },
};

const WAIT: Duration = Duration::from_secs(3);
const MARK: u32 = 7;

fn nic(key: &str, addresses: &[&str], kind: NicKind) -> NicSpec {
    let ip_configs = addresses
        .iter()
        .enumerate()
        .map(|(i, a)| IpConfigSpec {
            name: format!("ip{i}"),
            address: a.parse().unwrap(),
            primary: i == 0,
        })
        .collect();
    NicSpec {
        key: key.into(),
        mac: Mac::derived(key),
        subnet: "nodes".into(),
        ip_configs,
        kind,
        host_name: Some(key.into()),
        ..NicSpec::default()
    }
}

/// Two machines with two pod addresses each, and a group of cluster `c`.
fn spec() -> FabricSpec {
    let group = |cluster: &str| NicKind::Group {
        cluster: Some(cluster.into()),
    };
    FabricSpec {
        instance: "t".into(),
        vnets: vec![VnetSpec {
            key: "v".into(),
            prefixes: vec!["10.1.0.0/16".parse().unwrap()],
            subnets: vec![SubnetSpec {
                name: "nodes".into(),
                prefix: "10.1.0.0/24".parse().unwrap(),
                ..SubnetSpec::default()
            }],
            nics: vec![
                nic("a", &["10.1.0.4", "10.1.0.20", "10.1.0.21"], NicKind::Machine),
                nic("b", &["10.1.0.5", "10.1.0.30", "10.1.0.31"], NicKind::Machine),
                nic("g", &["10.1.0.40"], group("c")),
            ],
            clusters: vec![ClusterServicesSpec {
                cluster: "c".into(),
                mark: MARK,
                dns_service_ip: Ipv4Addr::new(10, 0, 0, 10),
                dns_port: 5300,
            }],
            dns: DnsSpec {
                suffix: "internal".into(),
                records: vec![],
            },
            ..VnetSpec::default()
        }],
        edge: EdgeSpec::default(),
        ..FabricSpec::default()
    }
}

struct Machine {
    name: &'static str,
    mode: &'static str,
    pin: PathBuf,
}

struct Pod {
    pin: PathBuf,
    address: Ipv4Addr,
}

impl Machine {
    fn boot(fabric: &Fabric, name: &'static str, mode: &'static str) -> Self {
        let pin = PathBuf::from(format!("/run/machines/{name}"));
        netns::create_named(&pin).unwrap();
        fabric.attach(name, &NetnsRef::Path(pin.clone()), "eth0").unwrap();
        Self { name, mode, pin }
    }

    /// Runs the plug-in in this machine's namespace; its document, and whether it succeeded.
    fn cni(&self, command: &str, pod: &str, more: &[(&str, Value)]) -> (bool, Value) {
        let mut conf = json!({"cniVersion": "1.1.0", "name": "azure", "type": "azure-vnet", "mode": self.mode,
            "stateDir": format!("/run/state/{}", self.name), "ipam": {"type": "azure-vnet-ipam"}});
        more.iter().for_each(|(k, v)| conf[*k] = v.clone());
        let run = || {
            let mut child = Command::new(env!("CARGO_BIN_EXE_azure-vnet"))
                .env_clear()
                .envs([
                    ("CNI_COMMAND", command),
                    ("CNI_PATH", "/opt/cni/bin"),
                    ("CNI_IFNAME", "eth0"),
                ])
                .envs([("CNI_CONTAINERID", pod), ("CNI_NETNS", &format!("/run/pods/{pod}"))])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            child
                .stdin
                .take()
                .unwrap()
                .write_all(conf.to_string().as_bytes())
                .unwrap();
            child.wait_with_output().unwrap()
        };
        let out = netns::run_in(&self.pin, run).unwrap();
        (
            out.status.success(),
            serde_json::from_slice(&out.stdout).unwrap_or_default(),
        )
    }

    fn pod(&self, name: &str) -> Pod {
        let pin = PathBuf::from(format!("/run/pods/{name}"));
        netns::create_named(&pin).unwrap();
        let (ok, result) = self.cni("ADD", name, &[]);
        assert!(ok, "{result}");
        let address = result["ips"][0]["address"]
            .as_str()
            .unwrap()
            .split('/')
            .next()
            .unwrap()
            .parse()
            .unwrap();
        assert!(self.cni("CHECK", name, &[("prevResult", result)]).0);
        Pod { pin, address }
    }
}

/// Answers every connection with `name` and the caller's address.
fn serve(netns: &Path, port: u16, name: &'static str) {
    let listener = netns::run_in(netns, || TcpListener::bind(("0.0.0.0", port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let peer = stream.peer_addr().map(|p| p.ip().to_string()).unwrap_or_default();
            let _ = stream.write_all(format!("{name} {peer}").as_bytes());
        }
    });
}

fn ask(netns: &Path, to: &str) -> std::io::Result<String> {
    let to: SocketAddr = to.parse().unwrap();
    netns::run_in(netns, || {
        let mut stream = TcpStream::connect_timeout(&to, WAIT)?;
        stream.set_read_timeout(Some(WAIT))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
    .unwrap()
}

/// Response code and number of answers.
fn resolve(netns: &Path, name: &str) -> (u8, u8) {
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let ask = || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        socket.connect("10.0.0.10:53").unwrap();
        socket.send(&query).unwrap();
        let mut buffer = [0; 512];
        socket.recv(&mut buffer).unwrap();
        (buffer[3] & 15, buffer[7])
    };
    netns::run_in(netns, ask).unwrap()
}

#[test]
fn transparent_pods_of_two_machines_and_groups_reach_each_other_and_services() {
    everyone_reaches_everyone("transparent");
}

#[test]
fn bridged_pods_of_two_machines_and_groups_reach_each_other_and_services() {
    everyone_reaches_everyone("bridge");
}

#[test]
fn tunnelled_pods_of_two_machines_and_groups_reach_each_other_and_services() {
    everyone_reaches_everyone("tunnel");
}

fn everyone_reaches_everyone(mode: &'static str) {
    let body = move || {
        netns::become_private_host(&[Path::new("/run")]).unwrap();
        let servers = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let fabric = Fabric::open("t", "/run/t").unwrap();
        fabric.apply(&spec()).unwrap();
        fabric.serve(servers.handle());
        let (a, b) = (Machine::boot(&fabric, "a", mode), Machine::boot(&fabric, "b", mode));
        let g = PathBuf::from("/run/pods/g");
        netns::create_named(&g).unwrap();
        fabric.attach("g", &NetnsRef::Path(g.clone()), "eth0").unwrap();

        assert!(a.cni("STATUS", "-", &[]).0);
        let (p, q, r) = (a.pod("p"), a.pod("q"), b.pod("r"));
        assert_eq!([p.address, q.address, r.address].map(|a| a.octets()[3]), [20, 21, 30]);
        let (ok, full) = a.cni("STATUS", "-", &[]);
        assert!(
            !ok && full["code"] == 50 && full.to_string().contains("2 of 2"),
            "{full}"
        );

        for (pod, name) in [(&p, "p"), (&q, "q"), (&r, "r")] {
            serve(&pod.pin, 8080, name);
        }
        serve(&g, 8080, "g");
        // Each to each by VNet address, with the caller's own address: same machine, other machine, group.
        let all = [
            (&p.pin, p.address, "p"),
            (&q.pin, q.address, "q"),
            (&r.pin, r.address, "r"),
            (&g, Ipv4Addr::new(10, 1, 0, 40), "g"),
        ];
        for (from, source, _) in &all {
            for (_, to, name) in &all {
                let answer = ask(from, &format!("{to}:8080")).unwrap();
                // A pod that calls itself is its own caller.
                assert_eq!(answer, format!("{name} {source}"));
            }
        }

        // One Service over pods of both machines and the group, from everywhere.
        let service = serde_json::from_value(json!({"metadata": {"namespace": "d", "name": "web"},
            "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]}}))
        .unwrap();
        let slice = serde_json::from_value(json!({
            "metadata": {"namespace": "d", "name": "web", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"port": 8080}],
            "endpoints": [{"addresses": [q.address.to_string()]}, {"addresses": [r.address.to_string()]}, {"addresses": ["10.1.0.40"]}]}))
        .unwrap();
        let world = World::new(&[Arc::new(service)], &[Arc::new(slice)], "a");
        let v = fabric.vnet_netns("v");
        for (netns, scope) in [
            (&a.pin, Scope::Machine),
            (&b.pin, Scope::Machine),
            (&v, Scope::Mark(MARK)),
        ] {
            let config = PlanConfig {
                table: "t-services".into(),
                scope,
                dns_ip: None,
            };
            Executor::open(Some(netns))
                .unwrap()
                .apply(plan(&world, &config))
                .unwrap();
        }
        let everyone = BTreeSet::from(["q", "r", "g"].map(str::to_owned));
        for from in [&p.pin, &q.pin, &r.pin, &g, &a.pin] {
            let seen: BTreeSet<String> = (0..48)
                .map(|_| ask(from, "10.0.0.1:80").unwrap_or_else(|e| panic!("{mode} {}: {e}", from.display())))
                .map(|answer| answer.split(' ').next().unwrap().to_owned())
                .collect();
            assert_eq!(seen, everyone, "{}", from.display());
        }
        assert_eq!(
            ask(&g, "10.0.0.1:81").unwrap_err().kind(),
            std::io::ErrorKind::ConnectionRefused
        );
        // The group's queries to the cluster's DNS address are led to the server inside the VNet's namespace.
        let _inside = servers.enter();
        let sockets = Sockets { netns: Some(v.clone()) };
        let listen: SocketAddr = "168.63.129.16:5300".parse().unwrap();
        let config = ServerConfig {
            udp: sockets.udp(listen).unwrap(),
            tcp: sockets.tcp(listen).unwrap(),
            sockets,
            upstream: Some("168.63.129.16:53".parse().unwrap()),
            upstream_wait: Duration::from_secs(1),
        };
        let zone = Arc::new(RwLock::new(Arc::new(Zone::new("cluster.local", &world))));
        let stop = Shutdown::new();
        servers.spawn(Server::new(config, zone).run(stop.clone()));
        assert_eq!(resolve(&g, "web.d.svc.cluster.local"), (0, 1));
        assert_eq!(resolve(&g, "nope.d.svc.cluster.local"), (3, 0));
        assert_eq!(
            resolve(&g, "a.internal"),
            (0, 1),
            "the VNet's own names come from its resolver"
        );
        stop.trigger();

        let spoofed: u64 = fabric
            .drops()
            .unwrap()
            .iter()
            .filter(|(_, c)| c.comment == vnet::SPOOFED)
            .map(|(_, c)| c.packets)
            .sum();
        assert_eq!(spoofed, 0);

        // What a node agent does at its start: keep the living, release the rest.
        let keep = json!([{"containerID": "p", "ifname": "eth0"}]);
        assert!(a.cni("GC", "-", &[("cni.dev/valid-attachments", keep)]).0);
        assert!(ask(&p.pin, &format!("{}:8080", r.address)).is_ok());
        assert!(ask(&p.pin, &format!("{}:8080", q.address)).is_err());
        for (command, pod) in [("DEL", "q"), ("DEL", "p"), ("STATUS", "-")] {
            assert!(a.cni(command, pod, &[]).0, "{command}");
        }
        vnet::teardown("t", Path::new("/run/t")).unwrap();
    };
    if let Err(panic) = std::thread::spawn(body).join() {
        std::panic::resume_unwind(panic);
    }
}

/// The documented configuration file, as it stands there.
const CONFLIST: &str = r#"{
       "cniVersion":"0.3.0",
       "name":"azure",
       "plugins":[
          {
             "type":"azure-vnet",
             "mode":"bridge",
             "bridge":"azure0",
             "ipam":{
                "type":"azure-vnet-ipam"
             }
          },
          {
             "type":"portmap",
             "capabilities":{
                "portMappings":true
             },
             "snat":true
          }
       ]
}"#;

/// Runs the list's plug-ins one after the other, as a runtime does; the last result.
fn run_list(
    machine: &Machine,
    command: &str,
    pod: &str,
    port_mappings: &Value,
    bin: &[PathBuf],
    env: &[(&str, &Path)],
) -> Value {
    let list: Value = serde_json::from_str(CONFLIST).unwrap();
    let mut plugins = list["plugins"].as_array().unwrap().clone();
    if command == "DEL" {
        plugins.reverse();
    }
    let mut result = Value::Null;
    for mut conf in plugins {
        conf["name"] = list["name"].clone();
        conf["cniVersion"] = list["cniVersion"].clone();
        if result != Value::Null {
            conf["prevResult"] = result.clone();
        }
        if conf["capabilities"]["portMappings"] == true {
            conf["runtimeConfig"] = json!({ "portMappings": port_mappings });
        }
        let kind = conf["type"].as_str().unwrap().to_owned();
        let program = bin.iter().map(|d| d.join(&kind)).find(|p| p.is_file()).unwrap();
        let path = std::env::join_paths(bin).unwrap();
        let run = || {
            let mut child = Command::new(&program)
                .env_clear()
                .envs([
                    ("CNI_COMMAND", command),
                    ("CNI_IFNAME", "eth0"),
                    ("CNI_CONTAINERID", pod),
                ])
                .env("CNI_NETNS", format!("/run/pods/{pod}"))
                .env("CNI_PATH", &path)
                .env("PATH", &path)
                .envs(env.iter().copied())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            child
                .stdin
                .take()
                .unwrap()
                .write_all(conf.to_string().as_bytes())
                .unwrap();
            child.wait_with_output().unwrap()
        };
        let out = netns::run_in(&machine.pin, run).unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{command} {kind}: {text}");
        if command == "ADD" {
            result = serde_json::from_str(&text).unwrap();
        }
    }
    result
}

#[test]
fn the_documented_list_works_as_it_stands_with_the_distributions_portmap() {
    // Downloads belong to the world outside.
    let plugins = testkit::debian::unpack(&["containernetworking-plugins"]).join("usr/lib/cni");
    let iptables = testkit::debian::iptables();
    let body = move || {
        netns::become_private_host(&[Path::new("/run")]).unwrap();
        let servers = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let fabric = Fabric::open("t", "/run/t").unwrap();
        fabric.apply(&spec()).unwrap();
        fabric.serve(servers.handle());
        let (a, b) = (
            Machine::boot(&fabric, "a", "bridge"),
            Machine::boot(&fabric, "b", "bridge"),
        );
        let own = PathBuf::from(env!("CARGO_BIN_EXE_azure-vnet"));
        let bin = [own.parent().unwrap().to_owned(), plugins, iptables.bin];
        let env = [
            ("LD_LIBRARY_PATH", &*iptables.lib),
            ("XTABLES_LIBDIR", &*iptables.extensions),
        ];
        let mappings = json!([{"hostPort": 8088, "containerPort": 8080, "protocol": "tcp"}]);
        let pod = |machine: &Machine, name: &str, mappings: &Value| {
            let pin = PathBuf::from(format!("/run/pods/{name}"));
            netns::create_named(&pin).unwrap();
            let result = run_list(machine, "ADD", name, mappings, &bin, &env);
            serve(&pin, 8080, if name == "p" { "p" } else { "other" });
            assert_eq!(result["interfaces"][0]["name"], "azure0");
            (pin, result["ips"][0]["address"].as_str().unwrap().to_owned())
        };
        let (p, address) = pod(&a, "p", &mappings);
        assert_eq!(address, "10.1.0.20/24");
        let (q, _) = pod(&a, "q", &json!([]));
        let (r, _) = pod(&b, "r", &json!([]));
        // From the pod itself, its neighbour, its node, another machine and a pod there.
        for from in [&p, &q, &a.pin, &b.pin, &r] {
            let answer = ask(from, "10.1.0.4:8088").unwrap_or_else(|e| panic!("{}: {e}", from.display()));
            assert!(answer.starts_with("p "), "{}: {answer}", from.display());
        }
        for (machine, pod) in [(&a, "p"), (&a, "q"), (&b, "r")] {
            run_list(machine, "DEL", pod, &mappings, &bin, &env);
        }
        assert!(ask(&b.pin, "10.1.0.4:8088").is_err());
        vnet::teardown("t", Path::new("/run/t")).unwrap();
    };
    if let Err(panic) = std::thread::spawn(body).join() {
        std::panic::resume_unwind(panic);
    }
}

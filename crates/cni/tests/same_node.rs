//! Who reaches whom among pods of one machine and of two, in each mode, while a security group closes datagrams inside the
//! subnet: what a mode promises about pods of the same node, cell by cell (see `testkit::matrix` for the tables).

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use linux::netns;
use serde_json::json;
use testkit::matrix::Matrix;
use vnet::{Fabric, NetnsRef};
use vnet_model::{
    Mac,
    fabric::{FabricSpec, IpConfigSpec, NicSpec, SecurityGroupSpec, SubnetSpec, VnetSpec},
    nsg::{Access, Direction, RuleProtocol, SecurityRule, parse_peers},
};

fn nic(key: &str, addresses: &[&str]) -> NicSpec {
    let config = |(i, a): (usize, &&str)| IpConfigSpec {
        name: format!("ip{i}"),
        address: a.parse().unwrap(),
        primary: i == 0,
    };
    NicSpec {
        key: key.into(),
        mac: Mac::derived(key),
        subnet: "nodes".into(),
        ip_configs: addresses.iter().enumerate().map(config).collect(),
        ..NicSpec::default()
    }
}

/// Machines a and b with two and one pod addresses.
fn spec(closed: &[RuleProtocol]) -> FabricSpec {
    let rules = closed.iter().zip(100..).map(|(protocol, priority)| SecurityRule {
        name: format!("r{priority}"),
        priority,
        direction: Direction::Inbound,
        access: Access::Deny,
        protocol: *protocol,
        source: parse_peers(&["VirtualNetwork"]).unwrap(),
        source_ports: vec![],
        destination: parse_peers(&["10.1.0.16/28"]).unwrap(),
        destination_ports: vec![],
    });
    FabricSpec {
        instance: "t".into(),
        vnets: vec![VnetSpec {
            key: "v".into(),
            prefixes: vec!["10.1.0.0/16".parse().unwrap()],
            subnets: vec![SubnetSpec {
                name: "nodes".into(),
                prefix: "10.1.0.0/24".parse().unwrap(),
                security_group: Some("g".into()),
                ..SubnetSpec::default()
            }],
            nics: vec![
                nic("a", &["10.1.0.4", "10.1.0.20", "10.1.0.21"]),
                nic("b", &["10.1.0.5", "10.1.0.22"]),
            ],
            security_groups: vec![SecurityGroupSpec {
                key: "g".into(),
                rules: rules.collect(),
            }],
            ..VnetSpec::default()
        }],
        ..FabricSpec::default()
    }
}

fn machine(fabric: &Fabric, name: &str) -> PathBuf {
    let pin = PathBuf::from(format!("/run/machines/{name}"));
    netns::create_named(&pin).unwrap();
    fabric.attach(name, &NetnsRef::Path(pin.clone()), "eth0").unwrap();
    pin
}

/// Adds a pod with the plug-in in its machine's namespace.
fn pod(machine: &Path, mode: &str, name: &str, address: &str) -> PathBuf {
    let pin = PathBuf::from(format!("/run/pods/{name}"));
    netns::create_named(&pin).unwrap();
    let state = format!("/run/state/{}", machine.file_name().unwrap().to_string_lossy());
    let conf = json!({"cniVersion": "1.1.0", "name": "azure", "type": "azure-vnet", "mode": mode,
        "stateDir": state, "ipam": {"type": "azure-vnet-ipam"}});
    let run = || {
        let mut child = Command::new(env!("CARGO_BIN_EXE_azure-vnet"))
            .env_clear()
            .envs([
                ("CNI_COMMAND", "ADD"),
                ("CNI_PATH", "/opt/cni/bin"),
                ("CNI_IFNAME", "eth0"),
            ])
            .envs([("CNI_CONTAINERID", name), ("CNI_NETNS", &*pin.to_string_lossy())])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(conf.to_string().as_bytes()).unwrap();
        drop(input);
        child.wait_with_output().unwrap()
    };
    let out = netns::run_in(machine, run).unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && text.contains(&format!("{address}/")), "{text}");
    pin
}

/// Pods p and q of machine a, r of machine b. `same` is the cell of p and q once datagrams and echoes are closed.
fn cells(mode: &'static str, same: &'static str) {
    let body = move || {
        netns::become_private_host(&[Path::new("/run")]).unwrap();
        let servers = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let fabric = Fabric::open("t", "/run/t").unwrap();
        fabric.apply(&spec(&[])).unwrap();
        fabric.serve(servers.handle());
        let (a, b) = (machine(&fabric, "a"), machine(&fabric, "b"));
        let pods = [(&a, "p", "10.1.0.20"), (&a, "q", "10.1.0.21"), (&b, "r", "10.1.0.22")];
        let [p, q, r] = pods.map(|(machine, name, address)| pod(machine, mode, name, address));
        let m = Matrix::new(&[("a", &a), ("b", &b), ("p", &p), ("q", &q), ("r", &r)])
            .unwrap()
            .with_endpoints(&[
                ("a", "10.1.0.4"),
                ("b", "10.1.0.5"),
                ("p", "10.1.0.20"),
                ("q", "10.1.0.21"),
                ("r", "10.1.0.22"),
            ]);
        // Right after the plug-in, first packets included, everybody sees the pod by its own address.
        let open = "
            a    b             p              q              r
        a   TUI  TUI@10.1.0.4  TUI            TUI            TUI
        b   TUI  TUI           TUI@10.1.0.5   TUI@10.1.0.5   TUI
        p   TUI  TUI@10.1.0.20 TUI            TUI@10.1.0.20  TUI@10.1.0.20
        q   TUI  TUI@10.1.0.21 TUI@10.1.0.21  TUI            TUI@10.1.0.21
        r   TUI  TUI@10.1.0.22 TUI@10.1.0.22  TUI@10.1.0.22  TUI";
        m.check(mode, open);
        // To pods no datagrams and echoes: machine to machine always, pod to pod next door as the mode has it, a machine
        // and its own pods never, since they do not leave the machine.
        fabric.apply(&spec(&[RuleProtocol::Udp, RuleProtocol::Icmp])).unwrap();
        m.check(
            &format!("{mode}, closed for datagrams"),
            &format!(
                "    a    b    p       q       r
                 a   TUI  TUI  TUI     TUI     T
                 b   TUI  TUI  T       T       TUI
                 p   TUI  TUI  TUI     {same}  T
                 q   TUI  TUI  {same}  TUI     T
                 r   TUI  TUI  T       T       TUI"
            ),
        );
        fabric.apply(&spec(&[])).unwrap();
        m.check(&format!("{mode}, open again"), open);
        vnet::teardown("t", Path::new("/run/t")).unwrap();
    };
    if let Err(panic) = std::thread::spawn(body).join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn bridge_mode_does_not_filter_pods_of_one_node() {
    cells("bridge", "TUI");
}

#[test]
fn transparent_mode_does_not_filter_pods_of_one_node() {
    cells("transparent", "TUI");
}

#[test]
fn tunnel_mode_filters_pods_of_one_node_at_the_fabric() {
    cells("tunnel", "T");
}

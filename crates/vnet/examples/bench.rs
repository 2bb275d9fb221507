//! `cargo xtask bench vnet`: a virtual network beside the same namespaces with plain routes, in one run on a host of its
//! own (namespaces; nothing outside is touched). Needs root and iperf3. Arguments: `--json` for one object per line,
//! `--many` for the part with 16,000 addresses alone.
//!
//! ```text
//!  bare     a ======== b
//!  nic      a == router == b                    a machine's NIC to another's
//!  pod      pa == a == router == b == pb        a pod's link to another machine's pod
//! ```
//! The router is a virtual network of ours, or a namespace with the same links, MACs, routes and permanent neighbours and
//! no rule at all. Rounds take turns. A rate is per second; a ratio compares what a unit costs in processor time, both ends
//! together with what the kernel does for them, since a loaded machine spoils the first and not the second. It is the median
//! of the rounds' ratios.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use linux::netns;
use vnet::{Fabric, NetnsRef, teardown};
use vnet_model::Mac;
use vnet_model::fabric::{
    BackendSpec, FabricSpec, FrontendSpec, IpConfigSpec, NicSpec, Protocol, SecurityGroupSpec, SubnetSpec, VnetSpec,
};
use vnet_model::nsg::{Access, Direction, RuleProtocol, SecurityRule, parse_peers, parse_ports};
use vnet_model::underlay::{RemoteHostSpec, UnderlaySpec};

const ROUNDS: usize = 5;
const STREAM_S: &str = "2";
const TRANSACTIONS: usize = 15_000;
const CONNECTIONS: usize = 3_000;
/// Addresses of the large network.
const MANY: usize = 16_000;
const PER_NIC: usize = 250;

fn main() {
    let json = std::env::args().any(|a| a == "--json");
    let host = move || {
        if let Err(e) = netns::become_private_host(&[Path::new("/run")]) {
            eprintln!("this needs root: {e}");
            std::process::exit(1);
        }
        let mut table = Table {
            json,
            lines: Vec::new(),
        };
        if !std::env::args().any(|a| a == "--many") {
            traffic(&mut table);
        }
        many(&mut table);
        table.print();
    };
    std::thread::spawn(host).join().expect("the benchmark's thread");
}

/// The results, one object per line or aligned for people.
struct Table {
    json: bool,
    lines: Vec<[String; 7]>,
}

impl Table {
    fn add(&mut self, case: &str, unit: &str, ours: f64, peer: Option<(&str, f64)>, times: Option<f64>, note: &str) {
        let number = |v: f64| {
            if v.abs() < 100.0 {
                format!("{v:.2}")
            } else {
                format!("{v:.0}")
            }
        };
        let null = || "null".to_owned();
        let row = [
            case.to_owned(),
            unit.to_owned(),
            number(ours),
            peer.map_or_else(null, |p| number(p.1)),
            peer.map_or_else(String::new, |p| p.0.to_owned()),
            times.map_or_else(null, |t| format!("{t:.3}")),
            note.to_owned(),
        ];
        if self.json {
            let [case, unit, ours, peer, name, times, note] = &row;
            println!(
                r#"{{"bench":"vnet","case":"{case}","unit":"{unit}","ours":{ours},"peer":{peer},"peer_name":"{name}","times_better":{times},"note":"{note}"}}"#
            );
        }
        self.lines.push(row);
    }

    fn print(&self) {
        if self.json {
            return;
        }
        println!(
            "{:<44} {:>10} {:>10} {:>7}  unit; against; note",
            "case", "ours", "peer", "times"
        );
        for [case, unit, ours, peer, name, times, note] in &self.lines {
            println!("{case:<44} {ours:>10} {peer:>10} {times:>7}  {unit}; {name}; {note}");
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// One pair of ends that talk.
struct Way {
    name: &'static str,
    from: PathBuf,
    to: PathBuf,
    /// Where the far end answers.
    address: Ipv4Addr,
    /// Where it is asked at, if a load balancer stands between.
    asked: SocketAddr,
}

fn pin(name: &str) -> PathBuf {
    PathBuf::from(format!("/run/ends/{name}"))
}

fn sh(netns: &Path, script: &str) {
    let run = || Command::new("sh").args(["-ec", script]).output();
    let out = netns::run_in(netns, run).expect("enter").expect("a shell");
    assert!(
        out.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

fn ip(text: &str) -> Ipv4Addr {
    text.parse().expect("an address")
}

const NIC_A: &str = "10.1.0.4";
const NIC_B: &str = "10.1.0.5";
const POD_A: &str = "10.1.0.20";
const POD_B: &str = "10.1.0.30";
const FRONTEND: &str = "10.1.0.100";

/// A pod's namespace behind a machine's, as the plug-in's transparent mode makes it.
fn pod(machine: &str, address: &str) {
    let name = format!("p{machine}");
    netns::create_named(&pin(&name)).expect("namespace");
    sh(
        &pin(machine),
        &format!(
            "ip link add azv0 address aa:aa:aa:aa:aa:aa type veth peer name eth0 netns {}; ip link set azv0 up
             sysctl -qw net.ipv4.ip_forward=1; ip route add {address}/32 dev azv0",
            pin(&name).display()
        ),
    );
    sh(
        &pin(&name),
        &format!(
            "ip addr add {address}/32 dev eth0; ip link set eth0 up
             ip neigh add 169.254.1.1 lladdr aa:aa:aa:aa:aa:aa nud permanent dev eth0
             ip route add default via 169.254.1.1 dev eth0 onlink src {address}"
        ),
    );
    let out = netns::run_in(&pin(&name), || {
        Command::new("ip").args(["-br", "link", "show", "eth0"]).output()
    });
    let text = String::from_utf8(out.expect("enter").expect("ip").stdout).expect("text");
    let mac = text
        .split_whitespace()
        .find(|w| w.matches(':').count() == 5)
        .expect("a MAC");
    sh(
        &pin(machine),
        &format!("ip neigh add {address} lladdr {mac} nud permanent dev azv0"),
    );
}

/// The same links and routes with a namespace that has no rules; `dnat` gives it a plain translation.
fn plain(suffix: &str, dnat: bool) {
    let router = format!("r{suffix}");
    netns::create_named(&pin(&router)).expect("namespace");
    sh(
        &pin(&router),
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0",
    );
    for (end, address, pod_address) in [("a", NIC_A, POD_A), ("b", NIC_B, POD_B)] {
        let name = format!("{end}{suffix}");
        netns::create_named(&pin(&name)).expect("namespace");
        let mac = Mac::derived(&name);
        sh(
            &pin(&router),
            &format!(
                "ip link add port-{end} address 12:34:56:78:9a:bc type veth peer name eth0 address {mac} netns {}
                 ip link set port-{end} up
                 for x in {address} {pod_address}; do ip route add $x/32 dev port-{end}; ip neigh add $x lladdr {mac} nud permanent dev port-{end}; done",
                pin(&name).display()
            ),
        );
        sh(
            &pin(&name),
            &format!(
                "ip addr add {address}/24 dev eth0 noprefixroute; ip link set eth0 up
                 ip neigh add 10.1.0.1 lladdr 12:34:56:78:9a:bc nud permanent dev eth0
                 ip route add default via 10.1.0.1 dev eth0 onlink src {address}"
            ),
        );
        pod(&name, pod_address);
    }
    if dnat {
        let rule = format!("add rule ip nat pre ip daddr {FRONTEND} tcp dport 80 dnat to {NIC_B}:8080");
        sh(
            &pin(&router),
            &format!(
                "nft 'add table ip nat; add chain ip nat pre {{ type nat hook prerouting priority -100; }}; {rule}'"
            ),
        );
    }
}

fn nic(key: &str, addresses: &[Ipv4Addr]) -> NicSpec {
    NicSpec {
        key: key.to_owned(),
        mac: Mac::derived(key),
        subnet: "nodes".to_owned(),
        ip_configs: addresses
            .iter()
            .enumerate()
            .map(|(n, a)| IpConfigSpec {
                name: format!("c{n}"),
                address: *a,
                primary: n == 0,
            })
            .collect(),
        ..NicSpec::default()
    }
}

/// `count` rules that the traffic does not fit: half by prefix, half by port, both directions.
fn rules(count: usize) -> Vec<SecurityRule> {
    (0..count)
        .map(|n| SecurityRule {
            name: format!("r{n}"),
            priority: 100 + (n / 2) as u32,
            direction: [Direction::Inbound, Direction::Outbound][n % 2],
            access: Access::Deny,
            protocol: RuleProtocol::Tcp,
            source: parse_peers(&[&*format!("10.1.{}.0/24", 1 + n % 200)]).expect("a prefix"),
            source_ports: vec![],
            destination: parse_peers(&["*"]).expect("everything"),
            destination_ports: parse_ports(&[&*format!("{}", 10_000 + n)]).expect("a port"),
        })
        .collect()
}

/// A virtual network with so many rules in its subnet's group.
fn ours(suffix: &str, count: usize) -> VnetSpec {
    let key = format!("v{suffix}");
    VnetSpec {
        prefixes: vec!["10.1.0.0/16".parse().expect("a prefix")],
        subnets: vec![SubnetSpec {
            name: "nodes".to_owned(),
            prefix: "10.1.0.0/24".parse().expect("a prefix"),
            security_group: (count > 0).then(|| "g".to_owned()),
            ..SubnetSpec::default()
        }],
        nics: vec![
            nic(&format!("a{suffix}"), &[ip(NIC_A), ip(POD_A)]),
            nic(&format!("b{suffix}"), &[ip(NIC_B), ip(POD_B)]),
        ],
        security_groups: vec![SecurityGroupSpec {
            key: "g".to_owned(),
            rules: rules(count),
        }],
        frontends: vec![FrontendSpec::new(
            ip(FRONTEND),
            Protocol::Tcp,
            80,
            vec![BackendSpec {
                address: ip(NIC_B),
                port: 8080,
            }],
        )],
        key,
        ..VnetSpec::default()
    }
}

fn traffic(table: &mut Table) {
    let counts = [("-0", 0), ("-100", 100), ("-1000", 1000)];
    let spec = FabricSpec {
        instance: "bench".to_owned(),
        vnets: counts.iter().map(|(s, n)| ours(s, *n)).collect(),
        ..FabricSpec::default()
    };
    let fabric = Fabric::open("bench", "/run/bench").expect("open");
    fabric.apply(&spec).expect("apply");
    for (suffix, _) in counts {
        for (end, pod_address) in [("a", POD_A), ("b", POD_B)] {
            let name = format!("{end}{suffix}");
            netns::create_named(&pin(&name)).expect("namespace");
            fabric
                .attach(&name, &NetnsRef::Path(pin(&name)), "eth0")
                .expect("attach");
            pod(&name, pod_address);
        }
    }
    plain("-plain", false);
    plain("-dnat", true);
    for name in ["bare-a", "bare-b"] {
        netns::create_named(&pin(name)).expect("namespace");
    }
    sh(
        &pin("bare-a"),
        &format!(
            "ip link add eth0 type veth peer name eth0 netns {}; ip addr add {NIC_A}/24 dev eth0; ip link set eth0 up",
            pin("bare-b").display()
        ),
    );
    sh(
        &pin("bare-b"),
        &format!("ip addr add {NIC_B}/24 dev eth0; ip link set eth0 up"),
    );

    let way = |name, from: &str, to: &str, address: &str| Way {
        name,
        from: pin(from),
        to: pin(to),
        address: ip(address),
        asked: SocketAddr::from((ip(address), 8080)),
    };
    let ways = [
        way("bare", "bare-a", "bare-b", NIC_B),
        way("nic plain", "a-plain", "b-plain", NIC_B),
        way("nic 0", "a-0", "b-0", NIC_B),
        way("nic 100", "a-100", "b-100", NIC_B),
        way("nic 1000", "a-1000", "b-1000", NIC_B),
        way("pod plain", "pa-plain", "pb-plain", POD_B),
        way("pod 0", "pa-0", "pb-0", POD_B),
        way("pod 100", "pa-100", "pb-100", POD_B),
        way("pod 1000", "pa-1000", "pb-1000", POD_B),
    ];
    let balanced = |name, suffix: &str| Way {
        asked: SocketAddr::from((ip(FRONTEND), 80)),
        ..way(name, &format!("a{suffix}"), &format!("b{suffix}"), NIC_B)
    };
    let through = [
        balanced("lb plain", "-dnat"),
        balanced("lb 0", "-0"),
        balanced("lb 1000", "-1000"),
    ];

    let mut streams: BTreeMap<&str, Vec<Rate>> = BTreeMap::new();
    let mut turns: BTreeMap<&str, Vec<Rate>> = BTreeMap::new();
    let mut opened: BTreeMap<&str, Vec<Rate>> = BTreeMap::new();
    for round in 0..ROUNDS {
        eprintln!("round {} of {ROUNDS}", round + 1);
        for way in &ways {
            streams.entry(way.name).or_default().push(stream(way));
            turns.entry(way.name).or_default().push(transactions(way));
            opened.entry(way.name).or_default().push(connections(way));
        }
        for way in &through {
            opened.entry(way.name).or_default().push(connections(way));
        }
    }
    let ratio = |all: &BTreeMap<&str, Vec<Rate>>, a: &str, b: &str| -> (f64, f64, f64) {
        let pairs: Vec<f64> = all[a]
            .iter()
            .zip(&all[b])
            .map(|(x, y)| x.per_cpu_s / y.per_cpu_s)
            .collect();
        let rate = |name: &str| median(&all[name].iter().map(|r| r.per_s).collect::<Vec<_>>());
        (rate(a), rate(b), median(&pairs))
    };
    for (what, unit, all) in [
        ("stream", "Gbit/s", &streams),
        ("request-response", "1/s", &turns),
        ("connections", "1/s", &opened),
    ] {
        for place in ["nic", "pod"] {
            let plain = format!("{place} plain");
            for count in ["0", "100", "1000"] {
                let name = format!("{place} {count}");
                let (a, b, times) = ratio(all, &name, &plain);
                let bare = ratio(all, &name, "bare").2;
                let note = format!("{bare:.2} of a bare veth pair");
                let case = format!("{what}, {place} to {place}, {count} rules");
                table.add(
                    &case,
                    unit,
                    a,
                    Some(("same chain, plain routes", b)),
                    Some(times),
                    &note,
                );
            }
            let (a, b, times) = ratio(all, &plain, "bare");
            let hops = if place == "nic" { 1 } else { 3 };
            let note = format!("what {hops} plain hops cost");
            let case = format!("{what}, {place} to {place}, plain routes alone");
            table.add(&case, unit, a, Some(("bare veth pair", b)), Some(times), &note);
        }
    }
    for (name, note) in [("lb 0", "no rules"), ("lb 1000", "1,000 rules at both ports")] {
        let (a, b, times) = ratio(&opened, name, "lb plain");
        let case = format!("connections through a load balancer, {note}");
        table.add(&case, "1/s", a, Some(("one nft dnat rule", b)), Some(times), "");
    }
    teardown("bench", Path::new("/run/bench")).expect("teardown");
}

/// Units per second, and per second of processor time.
#[derive(Clone, Copy)]
struct Rate {
    per_s: f64,
    per_cpu_s: f64,
}

/// Seconds that the calling thread has run, softirqs on its account included.
fn own_cpu_s() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("a kernel with schedstat");
    let ns = text.split_whitespace().next().and_then(|n| n.parse::<f64>().ok());
    ns.expect("nanoseconds") / 1e9
}

/// Gbit/s of one stream, as received.
fn stream(way: &Way) -> Rate {
    let server = netns::run_in(&way.to, || {
        Command::new("iperf3")
            .args(["-s", "-1", "-p", "5201"])
            .stdout(std::process::Stdio::null())
            .spawn()
    });
    let mut server = server.expect("enter").expect("iperf3: apt-get install iperf3");
    let address = way.address.to_string();
    let client = || {
        let arguments = ["-c", &address, "-p", "5201", "-t", STREAM_S, "-O", "1", "-J"];
        let start = Instant::now();
        loop {
            let out = Command::new("iperf3").args(arguments).output().expect("iperf3");
            let refused = String::from_utf8_lossy(&out.stdout).contains("onnection refused");
            // The server needs a moment to listen.
            if !refused || start.elapsed() > Duration::from_secs(30) {
                return out;
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
    };
    let out = netns::run_in(&way.from, client).expect("enter");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let _ = server.kill();
    let _ = server.wait();
    let number = |part: &str, key: &str| {
        let value = text.split(part).nth(1)?.split(key).nth(1)?;
        let value = value.trim_start_matches([':', ' ', '\t']);
        value.split([',', '\n', '}']).next()?.trim().parse::<f64>().ok()
    };
    let parts = (
        number("\"sum_received\"", "\"bits_per_second\""),
        number("\"cpu_utilization_percent\"", "\"host_total\""),
        number("\"cpu_utilization_percent\"", "\"remote_total\""),
    );
    let (Some(bits), Some(here), Some(there)) = parts else {
        panic!("{}: iperf3 said {text}", way.name)
    };
    Rate {
        per_s: bits / 1e9,
        per_cpu_s: bits / 1e9 / ((here + there) / 100.0),
    }
}

fn listen(way: &Way, port: u16) -> TcpListener {
    let listener = netns::run_in(&way.to, || TcpListener::bind((way.address, port)));
    listener.expect("enter").expect("a listener")
}

/// One byte there and back, so often a second.
fn transactions(way: &Way) -> Rate {
    let listener = listen(way, 8081);
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        stream.set_nodelay(true).expect("no delay");
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() {
            stream.write_all(&byte).expect("an answer");
        }
        own_cpu_s()
    });
    let to = SocketAddr::from((way.address, 8081));
    let ask = || {
        let mut stream = TcpStream::connect(to).expect("a connection");
        stream.set_nodelay(true).expect("no delay");
        let mut byte = [7];
        let start = Instant::now();
        for _ in 0..TRANSACTIONS {
            stream.write_all(&byte).expect("a question");
            stream.read_exact(&mut byte).expect("an answer");
        }
        (start.elapsed().as_secs_f64(), own_cpu_s())
    };
    let client = netns::run_in(&way.from, ask).expect("enter");
    rate(TRANSACTIONS, client, server.join().expect("the server"))
}

fn rate(count: usize, (took_s, client_cpu_s): (f64, f64), server_cpu_s: f64) -> Rate {
    Rate {
        per_s: count as f64 / took_s,
        per_cpu_s: count as f64 / (client_cpu_s + server_cpu_s),
    }
}

/// Connections opened, answered and reset, one after the other, so many a second.
fn connections(way: &Way) -> Rate {
    let listener = listen(way, 8080);
    let server = std::thread::spawn(move || {
        for _ in 0..CONNECTIONS {
            let (mut stream, _) = listener.accept().expect("a client");
            let _ = stream.write_all(b"x");
        }
        own_cpu_s()
    });
    let ask = || {
        let start = Instant::now();
        for _ in 0..CONNECTIONS {
            let mut stream = TcpStream::connect(way.asked).expect("a connection");
            stream.read_exact(&mut [0]).expect("an answer");
            // No port waits for late packets: the next round needs it.
            let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
        }
        (start.elapsed().as_secs_f64(), own_cpu_s())
    };
    let client = netns::run_in(&way.from, ask).expect("enter");
    rate(CONNECTIONS, client, server.join().expect("the server"))
}

fn memory_mb(what: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("proc");
    let line = text.lines().find(|l| l.starts_with(what)).expect("a line");
    line.split_whitespace()
        .nth(1)
        .and_then(|n| n.parse::<f64>().ok())
        .expect("kB")
        / 1024.0
}

/// A network of 16,000 addresses: one machine with 250 of them here, the others behind other hosts. Times are processor
/// time, the kernel's work included.
fn many(table: &mut Table) {
    let address = |n: usize| Ipv4Addr::from(0x0a01_0004 + n as u32);
    let nics = (0..MANY / PER_NIC).map(|n| {
        let addresses: Vec<Ipv4Addr> = (0..PER_NIC).map(|a| address(n * PER_NIC + a)).collect();
        NicSpec {
            host: (n > 0).then(|| format!("h{}", n % 4)),
            ..nic(&format!("n{n}"), &addresses)
        }
    });
    let mut underlay = UnderlaySpec::new(ip("192.0.2.1"), 1);
    underlay.hosts = (0..4)
        .map(|n| RemoteHostSpec {
            key: format!("h{n}"),
            address: Ipv4Addr::new(192, 0, 2, 2 + n),
            number: 2 + u16::from(n),
            endpoints: vec![],
        })
        .collect();
    let mut spec = FabricSpec {
        instance: "many".to_owned(),
        vnets: vec![VnetSpec {
            key: "v".to_owned(),
            vni: Some(77),
            prefixes: vec!["10.1.0.0/16".parse().expect("a prefix")],
            subnets: vec![SubnetSpec {
                name: "nodes".to_owned(),
                prefix: "10.1.0.0/16".parse().expect("a prefix"),
                security_group: Some("g".to_owned()),
                ..SubnetSpec::default()
            }],
            nics: nics.collect(),
            security_groups: vec![SecurityGroupSpec {
                key: "g".to_owned(),
                rules: rules(100),
            }],
            ..VnetSpec::default()
        }],
        underlay: Some(underlay),
        ..FabricSpec::default()
    };
    sh(
        Path::new("/proc/thread-self/ns/net"),
        "ip link add under0 type veth peer name under1; ip addr add 192.0.2.1/24 dev under0; ip link set under0 up; ip link set under1 up",
    );
    netns::create_named(&pin("many")).expect("namespace");
    let before = memory_mb("VmRSS");
    let fabric = Fabric::open("many", "/run/many").expect("open");
    let timed = |spec: &FabricSpec| {
        let start = own_cpu_s();
        let report = fabric.apply(spec).expect("apply");
        (own_cpu_s() - start, report.changes)
    };
    let (first, changes) = timed(&spec);
    let start = Instant::now();
    fabric
        .attach("n0", &NetnsRef::Path(pin("many")), "eth0")
        .expect("attach");
    let attach = start.elapsed().as_secs_f64();
    let mut more = [Vec::new(), Vec::new()];
    for n in 0..11 {
        for (place, nic) in [(0, 0), (1, 9)] {
            spec.vnets[0].nics[nic].ip_configs.push(IpConfigSpec {
                name: format!("more{n}"),
                address: address(MANY + 2 * n + place),
                primary: false,
            });
            let (took, changes) = timed(&spec);
            assert!(changes > 0, "one more address changes something");
            more[place].push(took * 1e3);
        }
    }
    let nothing: Vec<f64> = (0..5).map(|_| timed(&spec).0 * 1e3).collect();
    fabric.distrust();
    let (compared, none) = timed(&spec);
    assert_eq!(none, 0, "the kernel holds what was planned");
    let peak = memory_mb("VmHWM");
    let note = format!("{changes} changes; 250 behind a port here, the others on four other hosts");
    table.add("16,000 addresses, first apply", "s", first, None, None, &note);
    table.add(
        "16,000 addresses, one more on a NIC here",
        "ms",
        median(&more[0]),
        None,
        None,
        "median of 11",
    );
    table.add(
        "16,000 addresses, one more on another host",
        "ms",
        median(&more[1]),
        None,
        None,
        "median of 11",
    );
    table.add(
        "16,000 addresses, nothing changed",
        "ms",
        median(&nothing),
        None,
        None,
        "median of 5",
    );
    table.add(
        "16,000 addresses, all compared with the kernel",
        "ms",
        compared * 1e3,
        None,
        None,
        "every minute",
    );
    table.add(
        "16,000 addresses, a NIC with 250 plugged in",
        "ms",
        attach * 1e3,
        None,
        None,
        "",
    );
    let note = format!("peak of this process; {before:.0} MB before");
    table.add("16,000 addresses, memory", "MB", peak, None, None, &note);
    teardown("many", Path::new("/run/many")).expect("teardown");
}

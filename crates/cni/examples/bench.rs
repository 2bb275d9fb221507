//! `cargo xtask bench cni`: the plug-in against the same netlink calls alone and against the distribution's plug-ins, all as
//! spawned processes in one run, in a network namespace of its own. Arguments: folder of the plug-in, path of `bare`.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use linux::{
    netlink::{Address, Request, Route, RouteEntry, Veth, VethPeer},
    netns,
};
use serde_json::{Value, json};

const PODS: usize = 250;
/// Rounds of the sequential comparison, and attachments per round.
const ROUNDS: usize = 5;
const PER_ROUND: usize = 20;
const THREADS: usize = 8;

/// One way to attach a pod.
struct Way {
    name: &'static str,
    program: PathBuf,
    /// `None` for `bare`, which has arguments instead.
    conf: Option<Value>,
    mode: &'static str,
}

struct Bench {
    path: std::ffi::OsString,
    iptables: testkit::debian::Iptables,
}

impl Bench {
    /// Milliseconds of one call.
    fn call(&self, way: &Way, verb: &str, pod: usize) -> f64 {
        let netns = format!("/run/pods/{pod}");
        let mut command = Command::new(&way.program);
        command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped());
        let input = match &way.conf {
            Some(conf) => {
                command
                    .env("CNI_COMMAND", verb)
                    .env("CNI_CONTAINERID", format!("pod{pod}"))
                    .env("CNI_NETNS", &netns)
                    .envs([("CNI_IFNAME", "eth0")])
                    .envs([("CNI_PATH", &self.path), ("PATH", &self.path)])
                    .env("LD_LIBRARY_PATH", &self.iptables.lib)
                    .env("XTABLES_LIBDIR", &self.iptables.extensions);
                conf.to_string()
            }
            None => {
                let address = Ipv4Addr::from(0x0a4d_0100 + pod as u32).to_string();
                let (link, number) = (format!("only{pod}"), pod.to_string());
                match verb {
                    "ADD" => command.args(["add", way.mode, &netns, &link, &address, &number]),
                    _ => command.args(["del", way.mode, &link, &address, &number]),
                };
                String::new()
            }
        };
        let start = Instant::now();
        let mut child = command.spawn().expect("the program starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        // A program that does not read has ended already.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let out = child.wait_with_output().expect("the program ends");
        let took = start.elapsed().as_secs_f64() * 1000.0;
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{} {verb} {pod}: {said}", way.name);
        took
    }

    /// Every pod once, by so many threads; seconds.
    fn all(&self, way: &Way, verb: &str, pods: usize, threads: usize) -> f64 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for t in 0..threads {
                scope.spawn(move || {
                    (t..pods).step_by(threads).for_each(|pod| {
                        self.call(way, verb, pod);
                    })
                });
            }
        });
        start.elapsed().as_secs_f64()
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A machine with a NIC and a wire server that tells of 300 addresses; its URL.
fn machine() -> String {
    netns::become_private_host(&[Path::new("/run")]).unwrap();
    let fabric = netns::create_named(Path::new("/run/fabric")).unwrap();
    let mut host = Route::open().unwrap();
    let mac = [0x00, 0x0d, 0x3a, 0, 0, 1];
    host.run(Request::create_veth(&Veth {
        name: "nic0".into(),
        mac: Some(mac),
        mtu: Some(1500),
        up: true,
        peer: VethPeer {
            name: "port".into(),
            mac: None,
            mtu: None,
            netns: Some(fabric.as_fd()),
        },
    }))
    .unwrap();
    let mut there = Route::open_in(&fabric).unwrap();
    let port = there.need_link("port").unwrap().index;
    there.run(Request::set_up(port, true)).unwrap();
    let nic = host.need_link("nic0").unwrap().index;
    host.run_all(&[
        Request::set_up(nic, true),
        Request::add_address(&Address {
            link: nic,
            address: "10.240.0.4/16".parse().unwrap(),
            no_prefix_route: true,
        }),
        Request::add_route(&RouteEntry::via_gateway(
            ipnet::Ipv4Net::default(),
            nic,
            Ipv4Addr::new(10, 240, 0, 1),
        )),
        Request::create_bridge("bare0", [2, 0, 0, 0, 0, 1], None),
    ])
    .unwrap();
    for pod in 0..PODS {
        netns::create_named(Path::new(&format!("/run/pods/{pod}"))).unwrap();
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let pods: String = (256..556)
        .map(|i: u32| format!("<IPAddress Address=\"{}\"/>", Ipv4Addr::from(0x0af0_0000 + i)))
        .collect();
    let body = format!(
        "<Interfaces><Interface MacAddress=\"000D3A000001\" IsPrimary=\"true\"><IPSubnet Prefix=\"10.240.0.0/16\">{pods}\
         </IPSubnet></Interface></Interfaces>"
    );
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.read(&mut [0; 1024]);
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
        }
    });
    url
}

fn run(own: &Path, bare: &Path, json_lines: bool, plugins: &Path, iptables: testkit::debian::Iptables) {
    let url = machine();
    let path = std::env::join_paths([plugins, &iptables.bin]).unwrap();
    let bench = Bench { path, iptables };
    let ours = |name, mode| Way {
        name,
        program: own.join("azure-vnet"),
        conf: Some(
            json!({"cniVersion": "1.0.0", "name": "azure", "type": "azure-vnet", "mode": mode,
            "ipam": {"type": "azure-vnet-ipam", "wireServerUrl": url, "coolDownMs": 0}}),
        ),
        mode,
    };
    let alone = |mode| Way {
        name: "the same netlink calls alone",
        program: bare.to_owned(),
        conf: None,
        mode,
    };
    let debian = |name, masq: bool| Way {
        name,
        program: plugins.join("bridge"),
        conf: Some(
            json!({"cniVersion": "1.0.0", "name": if masq { "masq" } else { "peer" }, "type": "bridge", "bridge": if masq { "masq0" } else { "peer0" },
            "isGateway": true, "ipMasq": masq, "ipam": {"type": "host-local", "dataDir": "/run/peer",
            "ranges": [[{"subnet": if masq { "10.89.0.0/16" } else { "10.88.0.0/16" }}]], "routes": [{"dst": "0.0.0.0/0"}]}}),
        ),
        mode: "",
    };
    let ways = [
        ours("ours, transparent", "transparent"),
        ours("ours, bridge", "bridge"),
        ours("ours, tunnel", "tunnel"),
        alone("transparent"),
        alone("bridge"),
        debian("bridge+host-local", false),
        debian("bridge+host-local+ipMasq", true),
    ];
    let [transparent, bridge, tunnel, bare_routed, bare_bridge, plain, masq] = &ways;
    let mut add: Vec<Vec<f64>> = vec![Vec::new(); ways.len()];
    let mut del = add.clone();
    for way in &ways {
        // Bridges, pools and caches are there from now on.
        bench.call(way, "ADD", 0);
        bench.call(way, "DEL", 0);
    }
    for _ in 0..ROUNDS {
        for (at, way) in ways.iter().enumerate() {
            add[at].extend((0..PER_ROUND).map(|pod| bench.call(way, "ADD", pod)));
            del[at].extend((0..PER_ROUND).map(|pod| bench.call(way, "DEL", pod)));
        }
    }
    let of = |list: &[Vec<f64>], way: &Way| {
        let at = ways.iter().position(|w| std::ptr::eq(w, way)).unwrap_or(0);
        median(list[at].clone())
    };
    // Case, unit, ours, peer, name of the peer; less is better.
    let mut lines: Vec<(String, &str, f64, f64, &str)> = Vec::new();
    let pairs = [
        (transparent, bare_routed),
        (bridge, bare_bridge),
        (transparent, plain),
        (bridge, plain),
        (tunnel, plain),
        (transparent, masq),
        (bridge, masq),
    ];
    for (verb, list) in [("ADD", &add), ("DEL", &del)] {
        for (mine, peer) in pairs {
            lines.push((
                format!("{verb} {}", mine.mode),
                "ms",
                of(list, mine),
                of(list, peer),
                peer.name,
            ));
        }
    }
    let mut rate = Vec::new();
    for way in [bridge, plain] {
        let one = bench.all(way, "ADD", PODS, 1);
        let del_one = bench.all(way, "DEL", PODS, 1);
        let many = bench.all(way, "ADD", PODS, THREADS);
        let del_many = bench.all(way, "DEL", PODS, THREADS);
        rate.push([one, del_one, many, del_many]);
    }
    let [mine, peer] = [rate[0], rate[1]];
    for (at, case) in [
        "250 ADD one by one",
        "250 DEL one by one",
        "250 ADD by eight at a time",
        "250 DEL by eight at a time",
    ]
    .iter()
    .enumerate()
    {
        lines.push(((*case).to_owned(), "s", mine[at], peer[at], plain.name));
    }
    lines.push((
        "250 ADD, eight at a time to one by one".into(),
        "s",
        mine[2],
        mine[0],
        "ours, one by one",
    ));
    for (case, unit, ours, peer, name) in lines {
        let better = peer / ours;
        if json_lines {
            let line = json!({"bench": "cni", "case": case, "unit": unit, "ours": ours, "peer": peer, "peer_name": name,
                "times_better": better});
            println!("{line}");
        } else {
            println!("{case:<40} {ours:>8.2} {peer:>8.2} {unit:<3} {better:>6.2}x  {name}");
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [own, bare, rest @ ..] = &args[..] else {
        panic!("the folder of the plug-in and the path of bare are needed");
    };
    // Downloads belong to the world outside.
    let plugins = testkit::debian::unpack(&["containernetworking-plugins"]).join("usr/lib/cni");
    let iptables = testkit::debian::iptables();
    let (own, bare) = (PathBuf::from(own), PathBuf::from(bare));
    let json_lines = rest.iter().any(|a| a == "--json");
    // Namespaces belong to a thread; this one never becomes anybody else's.
    let thread = std::thread::spawn(move || run(&own, &bare, json_lines, &plugins, iptables));
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

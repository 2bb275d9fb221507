//! `cargo xtask bench cni`: the plug-in against the same netlink calls alone and against the distribution's plug-ins, all as
//! spawned processes in one run, in a network namespace of its own. Arguments: folder of the plug-in and of `bare`, folder of
//! the distribution's plug-ins, folders of its iptables' programs, libraries and extensions; `--json`.

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
    iptables: Iptables,
}

/// The distribution's, unpacked.
struct Iptables {
    bin: PathBuf,
    lib: PathBuf,
    extensions: PathBuf,
}

impl Bench {
    /// Milliseconds of one call.
    fn call(&self, way: &Way, verb: &str, pod: usize) -> f64 {
        self.run(Command::new(&way.program), way, verb, pod).0
    }

    /// kB of memory that one call needs at most.
    fn memory(&self, bare: &Path, way: &Way, verb: &str, pod: usize) -> f64 {
        let mut command = Command::new(bare);
        command.arg("memory").arg(&way.program);
        let said = self.run(command, way, verb, pod).1;
        said.trim().parse().expect("a number of kB")
    }

    /// Milliseconds of one call, and what it said.
    fn run(&self, mut command: Command, way: &Way, verb: &str, pod: usize) -> (f64, String) {
        let netns = format!("/run/pods/{pod}");
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
        (took, said.into_owned())
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

fn run(own: &Path, json_lines: bool, plugins: &Path, iptables: Iptables) {
    let bare = &own.join("bare");
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
    // Less is better everywhere.
    let mut lines: Vec<Line> = Vec::new();
    let mut line = |case: String, unit, ours, peer, peer_name, note| {
        lines.push(Line {
            case,
            unit,
            ours,
            peer,
            peer_name,
            note,
        });
    };
    let alike = "wanted: ADD at most 2.0 times, DEL at most 1.2 times the peer's";
    let faster = "wanted: ADD at least 6 times better";
    let pairs = [
        (transparent, bare_routed, alike),
        (bridge, bare_bridge, alike),
        (transparent, plain, faster),
        (bridge, plain, faster),
        (tunnel, plain, faster),
        (transparent, masq, faster),
        (bridge, masq, faster),
    ];
    for (verb, list) in [("ADD", &add), ("DEL", &del)] {
        for (mine, peer, note) in pairs {
            let case = format!("{verb} {}", mine.mode);
            // What a DEL waits for is the kernel's, whoever asks.
            let note = if verb == "DEL" && note == faster { "" } else { note };
            line(case, "ms", of(list, mine), of(list, peer), peer.name, note);
        }
    }
    let mut whole = Vec::new();
    for way in [bridge, plain] {
        let one = bench.all(way, "ADD", PODS, 1);
        let del_one = bench.all(way, "DEL", PODS, 1);
        let many = bench.all(way, "ADD", PODS, THREADS);
        let del_many = bench.all(way, "DEL", PODS, THREADS);
        whole.push([one, del_one, many, del_many]);
    }
    let [mine, peer] = [whole[0], whole[1]];
    for (at, case) in [
        "ADD one by one",
        "DEL one by one",
        "ADD eight at a time",
        "DEL eight at a time",
    ]
    .into_iter()
    .enumerate()
    {
        line(format!("{PODS} {case}"), "s", mine[at], peer[at], plain.name, "");
    }
    let bound =
        "bounded by the processors: an ADD waits for nothing, so it is at most as many times faster as there are";
    let waits = "wanted: 3 times better; a DEL mostly waits for the kernel";
    let one = "ours, one by one";
    line("ADD eight at a time".into(), "s", mine[2], mine[0], one, bound);
    line("DEL eight at a time".into(), "s", mine[3], mine[1], one, waits);
    let (together, alone) = (mine[2] + mine[3], mine[0] + mine[1]);
    line("ADD and DEL eight at a time".into(), "s", together, alone, one, waits);

    let size = |program: &Path| std::fs::metadata(program).map_or(f64::NAN, |m| m.len() as f64 / 1024.0);
    for program in ["azure-vnet", "azure-vnet-ipam"] {
        let case = format!("size of {program}");
        line(case, "kB", size(&own.join(program)), 2048.0, "what is allowed", "");
    }
    for verb in ["ADD", "DEL"] {
        let kb = bench.memory(bare, bridge, verb, 0);
        line(format!("memory of {verb}"), "kB", kb, 4096.0, "what is allowed", "");
    }
    for l in lines {
        let better = l.peer / l.ours;
        if json_lines {
            let line = json!({"bench": "cni", "case": l.case, "unit": l.unit, "ours": l.ours, "peer": l.peer,
                "peer_name": l.peer_name, "times_better": better, "note": l.note});
            println!("{line}");
        } else {
            println!(
                "{:<30} {:>9.3} {:>9.3} {:<3} {better:>6.2}x  {:<30} {}",
                l.case, l.ours, l.peer, l.unit, l.peer_name, l.note
            );
        }
    }
}

/// One comparison.
struct Line {
    case: String,
    unit: &'static str,
    ours: f64,
    peer: f64,
    peer_name: &'static str,
    note: &'static str,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [own, plugins, bin, lib, extensions, rest @ ..] = &args[..] else {
        panic!("the folder of the plug-in and those of the distribution's programs are needed");
    };
    let iptables = Iptables {
        bin: bin.into(),
        lib: lib.into(),
        extensions: extensions.into(),
    };
    let (own, plugins) = (PathBuf::from(own), PathBuf::from(plugins));
    let json_lines = rest.iter().any(|a| a == "--json");
    // Namespaces belong to a thread; this one never becomes anybody else's.
    let thread = std::thread::spawn(move || run(&own, json_lines, &plugins, iptables));
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

//! What an attachment costs at least: a process that sends the plug-in's netlink requests and does nothing else.
//! For `cargo xtask bench cni`; everything it needs stands in its arguments, nothing is checked or remembered.
//!
//!     bare add transparent|bridge NETNS LINK ADDRESS NUMBER | bare del transparent|bridge LINK ADDRESS NUMBER
//!
//! `bare memory PROGRAM` runs a program and prints the kB it needed: a process starts with its parent's, so only a small
//! parent can tell.

use std::{
    net::IpAddr,
    os::fd::AsFd,
    path::Path,
    process::{Command, Stdio},
};

use ipnet::{IpNet, Ipv4Net};
use linux::{
    netlink::{Address, BridgePort, Ipv4Conf, Mac, Neighbour, Request, Route, RouteEntry, Veth, VethPeer},
    netns::{self, NetNs},
};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const BRIDGE: &str = "bare0";
const BRIDGE_MAC: Mac = [2, 0, 0, 0, 0, 1];

fn main() -> Outcome {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["add", mode, netns, link, address, number] => add(mode, netns, link, address.parse()?, number.parse()?),
        ["del", mode, link, address, number] => del(mode, link, address.parse()?, number.parse()?),
        ["memory", program] => memory(program),
        _ => Err("unknown arguments".into()),
    }
}

fn memory(program: &str) -> Outcome {
    let status = Command::new(program).stdout(Stdio::null()).status()?;
    println!("{}", cni::children_kb_max());
    if status.success() {
        Ok(())
    } else {
        Err("it failed".into())
    }
}

fn pod_mac(number: u16) -> Mac {
    let [a, b] = number.to_be_bytes();
    [2, 0, 0, 1, a, b]
}

fn neighbour(link: u32, address: IpAddr, mac: Mac) -> Neighbour {
    Neighbour {
        link,
        address,
        mac: Some(mac),
        proxy: false,
        permanent: true,
    }
}

fn add(mode: &str, path: &str, link: &str, address: IpAddr, number: u16) -> Outcome {
    let (ns, home) = (netns::open(Path::new(path))?, NetNs::current()?);
    let mut host = Route::open()?;
    let mut pod = Route::visit(&ns, &home)?;
    let bridge = if mode == "bridge" {
        Some(host.need_link(BRIDGE)?.index)
    } else {
        None
    };
    let veth = Veth {
        name: link.to_owned(),
        mac: Some([0xaa; 6]),
        mtu: Some(1500),
        up: true,
        peer: VethPeer {
            name: "eth0".into(),
            mac: Some(pod_mac(number)),
            mtu: Some(1500),
            netns: Some(ns.as_fd()),
        },
    };
    let create = Request::create_veth(&veth);
    let made = host.create(match bridge {
        Some(bridge) => create.on_bridge(bridge),
        None => create,
    })?;
    let (outer, inner) = match made.and_then(|l| Some((l.index, l.peer_index?))) {
        Some(both) => both,
        None => (host.need_link(link)?.index, pod.need_link("eth0")?.index),
    };
    let (gateway, mac, prefix): (IpAddr, Mac, u8) = match bridge {
        Some(_) => ("10.77.0.1".parse()?, BRIDGE_MAC, 16),
        None => ("169.254.1.1".parse()?, [0xaa; 6], 32),
    };
    let own = Address {
        link: inner,
        address: IpNet::new(address, prefix)?,
        no_prefix_route: false,
    };
    pod.run_all(&[
        Request::set_up(inner, true),
        Request::add_address(&own),
        Request::add_neighbour(&neighbour(inner, gateway, mac)),
        Request::add_route(&RouteEntry::via_gateway(Ipv4Net::default(), inner, gateway)),
    ])?;
    let change = Request::change_link(outer).alias("bare");
    let mut outside = vec![match bridge {
        Some(_) => change.bridge_port(BridgePort {
            hairpin: true,
            isolated: false,
        }),
        None => change.ipv4_conf(Ipv4Conf {
            forwarding: Some(true),
            proxy_arp: Some(true),
        }),
    }];
    let at = bridge.unwrap_or(outer);
    outside.push(Request::add_neighbour(&neighbour(at, address, pod_mac(number))));
    outside.push(Request::add_route(&RouteEntry::via_link(IpNet::from(address), at)));
    host.run_all(&outside)?;
    pod.settle_all(&[inner])?;
    let outer: Vec<u32> = [outer].into_iter().chain(bridge).collect();
    host.settle_all(&outer)?;
    Ok(())
}

fn del(mode: &str, link: &str, address: IpAddr, number: u16) -> Outcome {
    let mut host = Route::open()?;
    host.run(Request::delete_link_named(link))?;
    if mode == "bridge" {
        let bridge = host.need_link(BRIDGE)?.index;
        host.run_all(&[
            Request::delete_route(&RouteEntry::via_link(IpNet::from(address), bridge)),
            Request::delete_neighbour(&neighbour(bridge, address, pod_mac(number))),
        ])?;
    }
    Ok(())
}

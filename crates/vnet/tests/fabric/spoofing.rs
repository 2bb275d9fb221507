//! What hostile machines say, by hand-made frames: nobody gets it, and every attempt is counted.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;

use testkit::frame::{self, Mac};
use vnet::{Fabric, ROGUE_DHCP, SPOOFED, SPOOFED_ARP, SPOOFED_ND, SPOOFED_RA};
use vnet_model::fabric::FabricSpec;
use vnet_model::{Mac as NicMac, ROUTER_MAC};

use crate::common::*;

fn mac(nic: &str) -> Mac {
    NicMac::derived(nic).0
}

fn three() -> (Fabric, FabricSpec, [Machine; 3]) {
    let fabric = Fabric::open("t", RUN).unwrap();
    let nics = [nic("a", "10.1.0.4"), nic("b", "10.1.0.5"), nic("c", "10.1.0.6")];
    let spec = fabric_spec(&[vnet("v1", &nics)]);
    fabric.apply(&spec).unwrap();
    let machines = ["a", "b", "c"].map(|n| Machine::boot(&fabric, n));
    (fabric, spec, machines)
}

/// A datagram as a frame to the router.
fn datagram(from: Mac, source: Ipv4Addr, to: Ipv4Addr, ports: (u16, u16), data: &[u8]) -> Vec<u8> {
    let packet = frame::ipv4(source, to, 17, &frame::udp(ports.0, ports.1, data));
    frame::ethernet(from, ROUTER_MAC.0, 0x0800, &packet)
}

/// Sees every frame that reaches the machine.
fn watch(machine: &Machine) -> OwnedFd {
    machine.run(|| frame::receive_all("eth0").unwrap())
}

fn seen(socket: &OwnedFd, needle: &[u8]) -> bool {
    let mut buffer = [0; 2048];
    let mut found = false;
    while let Ok((_, length)) = rustix::net::recv(socket, &mut buffer[..], rustix::net::RecvFlags::empty()) {
        found |= buffer[..length].windows(needle.len()).any(|w| w == needle);
    }
    found
}

#[test]
fn nobody_joins_anothers_connection_with_its_address() {
    on_a_host(|| {
        let (fabric, _, [a, b, c]) = three();
        let bind = |m: &Machine, at: &str| m.run(|| UdpSocket::bind(at).unwrap());
        let (at_a, at_b) = (bind(&a, "10.1.0.4:500"), bind(&b, "10.1.0.5:500"));
        for (from, to, socket) in [(&at_a, "10.1.0.5:500", &at_b), (&at_b, "10.1.0.4:500", &at_a)] {
            from.send_to(b"mine", to).unwrap();
            socket.recv(&mut [0; 8]).unwrap();
        }
        let watched = watch(&b);
        let say = |from: Mac, source: &str, data: &[u8]| {
            let frame = datagram(from, ip(source), ip("10.1.0.5"), (500, 500), data);
            c.run(|| frame::send("eth0", &frame).unwrap());
        };
        // The connection of a and b is established; c has the ports right, and then a's MAC too.
        say(mac("c"), "10.1.0.4", b"forged-1");
        say(mac("a"), "10.1.0.4", b"forged-2");
        // A MAC that is not the NIC's, with the NIC's own address.
        say([2, 0, 0, 0, 0, 9], "10.1.0.6", b"forged-3");
        wait_for("three drops", || dropped(&fabric, SPOOFED) == 3);
        // What comes after in order has arrived, and nothing forged before it.
        say(mac("c"), "10.1.0.6", b"honest");
        at_b.recv(&mut [0; 8]).unwrap();
        at_a.send_to(b"still mine", "10.1.0.5:500").unwrap();
        at_b.recv(&mut [0; 16]).unwrap();
        assert!(!seen(&watched, b"forged"));
        assert_eq!(dropped(&fabric, SPOOFED), 3);
    });
}

#[test]
fn a_forwarder_may_send_for_others_but_not_with_anothers_mac() {
    on_a_host(|| {
        let (fabric, mut spec, [_, b, c]) = three();
        spec.vnets[0].nics[2].ip_forwarding = true;
        fabric.apply(&spec).unwrap();
        let at_b = b.run(|| UdpSocket::bind("10.1.0.5:500").unwrap());
        let say = |from: Mac| {
            let frame = datagram(from, ip("192.0.2.7"), ip("10.1.0.5"), (500, 500), b"x");
            c.run(|| frame::send("eth0", &frame).unwrap());
        };
        say(mac("a"));
        wait_for("a drop", || dropped(&fabric, SPOOFED) == 1);
        say(mac("c"));
        assert_eq!(at_b.recv_from(&mut [0; 8]).unwrap().1.to_string(), "192.0.2.7:500");
        assert_eq!(dropped(&fabric, SPOOFED), 1);
    });
}

#[test]
fn arp_that_speaks_for_others_is_counted_and_changes_nothing() {
    on_a_host(|| {
        let (fabric, _, [a, b, c]) = three();
        let neighbours = || linux::netns::run_in(&fabric.vnet_netns("v1"), || tool("ip", &["neigh"])).unwrap();
        let before = neighbours();
        let say = |frame: Vec<u8>| c.run(|| frame::send("eth0", &frame).unwrap());
        // For another address, for the gateway, with another MAC for one's own; then as asked and as told.
        say(frame::arp(2, mac("c"), ip("10.1.0.4"), ip("10.1.0.4")));
        say(frame::arp(2, mac("c"), ip("10.1.0.1"), ip("10.1.0.5")));
        say(frame::arp(1, [2, 0, 0, 0, 0, 9], ip("10.1.0.6"), ip("10.1.0.5")));
        wait_for("three drops", || dropped(&fabric, SPOOFED_ARP) == 3);
        // One's own address, and a probe before one has any, are nobody's harm.
        say(frame::arp(1, mac("c"), ip("10.1.0.6"), ip("10.1.0.1")));
        say(frame::arp(1, mac("c"), ip("0.0.0.0"), ip("10.1.0.6")));
        b.echo_callers(80);
        assert_eq!(a.ask("10.1.0.5:80").unwrap(), "10.1.0.4");
        assert_eq!((neighbours(), dropped(&fabric, SPOOFED_ARP)), (before, 3));
    });
}

#[test]
fn router_and_neighbour_advertisements_and_dhcp_answers_reach_nobody() {
    on_a_host(|| {
        let (fabric, _, [_, b, c]) = three();
        let watched = watch(&b);
        let say = |to: Mac, kind: u8| {
            let (source, all) = ("fe80::6".parse().unwrap(), "ff02::1".parse().unwrap());
            let frame = frame::ethernet(mac("c"), to, 0x86dd, &frame::icmp6(source, all, kind));
            c.run(|| frame::send("eth0", &frame).unwrap());
        };
        let before = [SPOOFED_RA, SPOOFED_ND].map(|comment| dropped(&fabric, comment));
        assert_eq!(before, [0, 0]);
        for to in [[0x33, 0x33, 0, 0, 0, 1], ROUTER_MAC.0] {
            say(to, 134);
            say(to, 136);
        }
        wait_for("advertisements", || {
            [SPOOFED_RA, SPOOFED_ND].map(|c| dropped(&fabric, c)) == [2, 2]
        });
        // An answer of a DHCP server, to one machine and to all.
        let dhcp = |to: &str| {
            let frame = datagram(mac("c"), ip("10.1.0.6"), ip(to), (67, 68), b"rogue-answer");
            c.run(|| frame::send("eth0", &frame).unwrap());
        };
        dhcp("10.1.0.5");
        dhcp("255.255.255.255");
        wait_for("DHCP answers", || dropped(&fabric, ROGUE_DHCP) == 2);
        assert!(!seen(&watched, b"rogue-answer"));
        let addresses = b.ip(&["-6", "route"]);
        assert!(!addresses.contains("default"), "{addresses}");
    });
}

#[test]
fn the_networks_namespace_has_no_ip6_address() {
    on_a_host(|| {
        let (fabric, _, [_a, _b, _c]) = three();
        let addresses = linux::netns::run_in(&fabric.vnet_netns("v1"), || tool("ip", &["-6", "addr"])).unwrap();
        let others: Vec<&str> = addresses
            .lines()
            .filter(|l| l.contains("inet6") && !l.contains("::1/128"))
            .collect();
        assert!(others.is_empty(), "{others:?}");
    });
}

//! Frames made by hand and sent as they are: what a hostile machine would say.

use std::net::{Ipv4Addr, Ipv6Addr};

mod sys;

pub use sys::{receive_all, send};

pub type Mac = [u8; 6];
pub const BROADCAST: Mac = [0xff; 6];

/// An Ethernet frame.
pub fn ethernet(from: Mac, to: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// An ARP packet (1 asks, 2 answers) that says `address` is at `mac`.
pub fn arp(operation: u16, mac: Mac, address: Ipv4Addr, asked: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4];
    let payload = [
        &head[..],
        &operation.to_be_bytes(),
        &mac,
        &address.octets(),
        &[0; 6],
        &asked.octets(),
    ];
    ethernet(mac, BROADCAST, 0x0806, &payload.concat())
}

/// An IPv4 packet with a protocol's payload.
pub fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = (20 + payload.len()) as u16;
    let [a, b] = length.to_be_bytes();
    let mut head = vec![0x45, 0, a, b, 0, 0, 0x40, 0, 64, protocol, 0, 0];
    head.extend(from.octets());
    head.extend(to.octets());
    let sum = checksum(&head).to_be_bytes();
    head[10..12].copy_from_slice(&sum);
    head.extend(payload);
    head
}

/// A datagram without a checksum, as IPv4 allows.
pub fn udp(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let length = (8 + data.len()) as u16;
    [
        &from.to_be_bytes()[..],
        &to.to_be_bytes(),
        &length.to_be_bytes(),
        &[0; 2],
        data,
    ]
    .concat()
}

/// An IPv6 packet with an ICMPv6 message of this type and an otherwise empty body.
pub fn icmp6(from: Ipv6Addr, to: Ipv6Addr, kind: u8) -> Vec<u8> {
    let mut message = vec![0; 24];
    message[0] = kind;
    let length = message.len() as u16;
    let (ends, next) = ([from.octets(), to.octets()].concat(), 58);
    let pseudo = [&ends[..], &[0, 0], &length.to_be_bytes(), &[0, 0, 0, next], &message].concat();
    let sum = checksum(&pseudo).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    let [a, b] = length.to_be_bytes();
    [&[0x60, 0, 0, 0, a, b, next, 255][..], &ends, &message].concat()
}

/// The Internet checksum.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let word = |c: &[u8]| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !sum as u16
}

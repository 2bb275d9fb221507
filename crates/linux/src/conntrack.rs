//! Forgetting connections: when an address gets a new owner, nothing of its last one may live on in the kernel's
//! connection table, where translations and "established" are remembered.
//!
//! # Source
//! `linux/netfilter/nfnetlink_conntrack.h`.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;

use crate::netlink::{Attributes, Error, Frame, Socket, attributes, error_of};
use crate::netns::NetNs;
use crate::nft::frame;

const NETLINK_NETFILTER: isize = 12;
const SUBSYSTEM: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const AF_INET: u8 = 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const TUPLE_IP: u16 = 1;
/// Requests per datagram: their acknowledgements must fit the receive buffer.
const BATCH: usize = 64;

/// A blocking connection tracking socket of one network namespace.
pub struct Conntrack {
    socket: Socket,
}

/// How a connection's destination was translated.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Translation {
    /// 6 or 17.
    pub protocol: u8,
    /// What the client asked for.
    pub asked: (Ipv4Addr, u16),
    /// What it got.
    pub given: (Ipv4Addr, u16),
}

/// What names one connection to the kernel.
struct Connection {
    original: Vec<u8>,
    id: Vec<u8>,
}

impl Conntrack {
    /// Opens a socket in the calling thread's namespace.
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            socket: Socket::open(NETLINK_NETFILTER)?,
        })
    }

    /// Opens a socket in `ns`; it stays there.
    pub fn open_in(ns: &NetNs) -> Result<Self, Error> {
        ns.run(Self::open).map_err(|e| Error::Open {
            source: io::Error::other(e),
        })?
    }

    /// How the destinations of the present connections are translated, also of those that are not (both ends are the same
    /// then).
    pub fn translations(&mut self) -> Result<Vec<Translation>, Error> {
        const LIST: &str = "list connections";
        let found = self.socket.dump(list_request, LIST, |frame| {
            Ok(frame.payload.get(4..).and_then(|body| {
                let part = |kind| attributes(body).find(|(k, _)| *k == kind).map(|(_, value)| value);
                way(part(TUPLE_ORIGINAL)?, part(TUPLE_REPLY)?)
            }))
        })?;
        Ok(found)
    }

    /// Deletes every connection that has one of the addresses at any of its four places; returns how many those were.
    pub fn forget(&mut self, addresses: &BTreeSet<Ipv4Addr>) -> Result<usize, Error> {
        if addresses.is_empty() {
            return Ok(0);
        }
        self.forget_if(|original, reply| touches(original, addresses) || touches(reply, addresses))
    }

    /// Deletes the connections that were translated in one of these ways; returns how many those were.
    pub fn forget_translated(&mut self, ways: &BTreeSet<Translation>) -> Result<usize, Error> {
        if ways.is_empty() {
            return Ok(0);
        }
        let ended = |w: Translation| {
            let any_port = Translation {
                asked: (w.asked.0, 0),
                given: (w.given.0, 0),
                ..w
            };
            ways.contains(&w) || ways.contains(&any_port)
        };
        self.forget_if(|original, reply| way(original, reply).is_some_and(ended))
    }

    fn forget_if(&mut self, hit: impl Fn(&[u8], &[u8]) -> bool) -> Result<usize, Error> {
        const LIST: &str = "list connections";
        let found = self
            .socket
            .dump(list_request, LIST, |frame| Ok(matching(frame, &hit)))?;
        let mut deleted = 0;
        for chunk in found.chunks(BATCH) {
            deleted += self.delete(chunk)?;
        }
        Ok(deleted)
    }

    fn delete(&mut self, connections: &[Connection]) -> Result<usize, Error> {
        const WHAT: &str = "delete connections";
        let first = self.socket.take_sequences(connections.len() as u32);
        let mut bytes = Vec::new();
        for (connection, sequence) in connections.iter().zip(first..) {
            let mut body = Attributes::default();
            body.nest(TUPLE_ORIGINAL, |a| a.0.extend(&connection.original))
                .bytes(ID, &connection.id);
            let flags = NLM_F_REQUEST | NLM_F_ACK;
            frame(
                &mut bytes,
                SUBSYSTEM << 8 | DELETE,
                flags,
                sequence,
                AF_INET,
                0,
                &body.0,
            );
        }
        self.socket.send(&bytes, WHAT)?;
        let (mut missing, mut deleted, mut failed) = (connections.len(), 0, None);
        while missing > 0 {
            self.socket.receive(true, WHAT, |frame| {
                if frame.kind == NLMSG_ERROR && frame.sequence.wrapping_sub(first) < connections.len() as u32 {
                    missing -= 1;
                    match error_of(&frame, WHAT) {
                        None => deleted += 1,
                        // It ended by itself meanwhile.
                        Some(e) if e.errno() == Some(libc::ENOENT) => {}
                        Some(e) => failed = failed.take().or(Some(e)),
                    }
                }
                Ok(())
            })?;
        }
        failed.map_or(Ok(deleted), Err)
    }
}

fn list_request(sequence: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame(
        &mut bytes,
        SUBSYSTEM << 8 | GET,
        NLM_F_REQUEST | NLM_F_DUMP,
        sequence,
        AF_INET,
        0,
        &[],
    );
    bytes
}

fn matching(frame: &Frame<'_>, hit: &impl Fn(&[u8], &[u8]) -> bool) -> Option<Connection> {
    let body = frame.payload.get(4..)?;
    let part = |kind| attributes(body).find(|(k, _)| *k == kind).map(|(_, value)| value);
    let (original, reply) = (part(TUPLE_ORIGINAL)?, part(TUPLE_REPLY)?);
    hit(original, reply).then(|| {
        Some(Connection {
            original: original.to_vec(),
            id: part(ID)?.to_vec(),
        })
    })?
}

fn touches(tuple: &[u8], addresses: &BTreeSet<Ipv4Addr>) -> bool {
    let ends = attributes(tuple)
        .filter(|(k, _)| *k == TUPLE_IP)
        .flat_map(|(_, ip)| attributes(ip));
    let mut addresses_of = ends.filter_map(|(_, v)| Some(Ipv4Addr::from(<[u8; 4]>::try_from(v).ok()?)));
    addresses_of.any(|a| addresses.contains(&a))
}

/// The translation of a connection's destination, also of one that has none (both ends are the same then).
fn way(original: &[u8], reply: &[u8]) -> Option<Translation> {
    const TUPLE_PROTOCOL: u16 = 2;
    const SOURCE: u16 = 1;
    const DESTINATION: u16 = 2;
    const PROTOCOL_NUMBER: u16 = 1;
    const SOURCE_PORT: u16 = 2;
    const DESTINATION_PORT: u16 = 3;
    let get = |tuple, nest, kind| {
        let nested = attributes(tuple).find(|(k, _)| *k == nest).map(|(_, v)| v)?;
        attributes(nested).find(|(k, _)| *k == kind).map(|(_, v)| v)
    };
    let address = |tuple, kind| Some(Ipv4Addr::from(<[u8; 4]>::try_from(get(tuple, TUPLE_IP, kind)?).ok()?));
    let port = |tuple, kind| Some(u16::from_be_bytes(get(tuple, TUPLE_PROTOCOL, kind)?.try_into().ok()?));
    Some(Translation {
        protocol: *get(original, TUPLE_PROTOCOL, PROTOCOL_NUMBER)?.first()?,
        asked: (address(original, DESTINATION)?, port(original, DESTINATION_PORT)?),
        given: (address(reply, SOURCE)?, port(reply, SOURCE_PORT)?),
    })
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::nft::{Chain, ChainKind, Family, HookPoint, Nft, Rule, Table};

    #[test]
    fn connections_of_an_address_are_forgotten() {
        std::thread::spawn(|| {
            crate::netns::become_private_host(&[]).unwrap();
            let mut table = Table::new(Family::Ip, "t");
            let track = [Rule::new().established().accept()];
            table.chains = vec![Chain::base("in", ChainKind::Filter, HookPoint::Input, 0, track)];
            Nft::open().unwrap().ensure(&table).unwrap();
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            for last in 2..90 {
                socket.send_to(b"x", (Ipv4Addr::new(127, 0, 0, last), 9)).unwrap();
            }
            let mut conntrack = Conntrack::open().unwrap();
            let some = BTreeSet::from([Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3)]);
            assert_eq!(conntrack.forget(&some).unwrap(), 2);
            assert_eq!(conntrack.forget(&some).unwrap(), 0);
            assert_eq!(conntrack.forget(&BTreeSet::from([Ipv4Addr::LOCALHOST])).unwrap(), 86);
        })
        .join()
        .unwrap();
    }
}

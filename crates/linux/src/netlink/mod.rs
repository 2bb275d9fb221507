//! A blocking netlink socket that checks sequence numbers and reads the kernel's own error texts, and on it the typed
//! routing requests ([`Request`]) and listings ([`Route`]). Firewall batches use the same socket.

use std::io;

use netlink_sys::SocketAddr;
use thiserror::Error;

mod request;
mod route;
mod types;
mod wire;

pub use request::Request;
pub use route::{CARRIER_WAIT, Route};
pub use types::{
    Address, BridgePort, Forwarding, Ipv4Conf, Link, Mac, Neighbour, RouteEntry, RouteKind, RoutingRule, Veth,
    VethPeer, Vxlan, format_mac,
};
use wire::{NLMSG_DONE, NLMSG_ERROR};

const HEADER_LEN: usize = 16;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// One datagram of a dump is at most 32 KiB unless the reader offers more.
const RECEIVE_BYTES: usize = 64 * 1024;

#[derive(Debug, Error)]
pub enum Error {
    #[error("cannot open a netlink socket")]
    Open { source: io::Error },
    #[error("cannot send a netlink request ({what})")]
    Send { what: String, source: io::Error },
    #[error("cannot receive a netlink answer ({what})")]
    Receive { what: String, source: io::Error },
    /// The kernel refused; `detail` is its extended error text, empty if it gave none.
    #[error("the kernel refused: {what}{}{detail}", if detail.is_empty() { "" } else { ": " })]
    Refused {
        what: String,
        detail: String,
        source: io::Error,
    },
    #[error("a netlink answer is malformed ({what})")]
    Malformed { what: String },
    #[error("no netlink answer came ({what})")]
    NoAnswer { what: String },
    /// The table changed during a listing, many times in a row.
    #[error("the kernel's table kept changing while it was listed ({what})")]
    Unstable { what: String },
    #[error("there is no link {name}")]
    NoLink { name: String },
}

impl Error {
    /// The kernel's error number, if the kernel refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// Builds attributes, nested ones too, into one buffer.
#[derive(Default)]
pub(crate) struct Attributes(pub Vec<u8>);

impl Attributes {
    pub fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let size = (4 + value.len()) as u16;
        self.0.extend(size.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub fn u8(&mut self, kind: u16, value: u8) -> &mut Self {
        self.bytes(kind, &[value])
    }

    /// In the machine's byte order, as the routing family has its numbers.
    pub fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// In network byte order, as the packet filter's families have theirs.
    pub fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// In network byte order.
    pub fn u64(&mut self, kind: u16, value: u64) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut with_end = value.as_bytes().to_vec();
        with_end.push(0);
        self.bytes(kind, &with_end)
    }

    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        const NESTED: u16 = 0x8000;
        let start = self.0.len();
        self.0.extend([0; 4]);
        fill(self);
        let size = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&size.to_ne_bytes());
        self.0[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
        self
    }
}

/// One message as received: type, flags, sequence and payload.
pub(crate) struct Frame<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

pub(crate) struct Socket {
    pub(crate) inner: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    pub(crate) fn open(protocol: isize) -> Result<Self, Error> {
        let open = || -> io::Result<netlink_sys::Socket> {
            let s = netlink_sys::Socket::new(protocol)?;
            // Only the kernel may answer. This also gives the socket an address of its own.
            s.connect(&SocketAddr::new(0, 0))?;
            s.set_ext_ack(true)?;
            s.set_cap_ack(true)?;
            Ok(s)
        };
        let inner = open().map_err(|source| Error::Open { source })?;
        Ok(Self {
            inner,
            sequence: 1,
            buffer: Vec::new(),
        })
    }

    pub(crate) fn strict(self) -> Result<Self, Error> {
        self.inner
            .set_netlink_get_strict_chk(true)
            .map_err(|source| Error::Open { source })?;
        Ok(self)
    }

    /// Reserves `count` consecutive sequence numbers and returns the first.
    pub(crate) fn take_sequences(&mut self, count: u32) -> u32 {
        let first = self.sequence;
        self.sequence = self.sequence.wrapping_add(count).max(1);
        first
    }

    pub(crate) fn send(&mut self, bytes: &[u8], what: &str) -> Result<(), Error> {
        let fail = |source| Error::Send {
            what: what.to_owned(),
            source,
        };
        let sent = self.inner.send(bytes, 0).map_err(fail)?;
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(fail(io::ErrorKind::WriteZero.into()))
        }
    }

    /// A large batch needs a send buffer of its own size; needs CAP_NET_ADMIN, as every batch does.
    pub(crate) fn reserve_send(&self, bytes: usize) -> Result<(), Error> {
        rustix::net::sockopt::set_socket_send_buffer_size_force(&self.inner, bytes)
            .map_err(|e| Error::Open { source: e.into() })
    }

    /// Receives one datagram and gives its messages to `each`; `false` if nothing is queued and `wait` is off.
    pub(crate) fn receive(
        &mut self,
        wait: bool,
        what: &str,
        mut each: impl FnMut(Frame<'_>) -> Result<(), Error>,
    ) -> Result<bool, Error> {
        self.buffer.clear();
        self.buffer.reserve(RECEIVE_BYTES);
        let flags = libc::MSG_TRUNC | if wait { 0 } else { libc::MSG_DONTWAIT };
        let length = loop {
            match self.inner.recv(&mut self.buffer, flags) {
                Ok(n) => break n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && !wait => return Ok(false),
                Err(source) => {
                    return Err(Error::Receive {
                        what: what.to_owned(),
                        source,
                    });
                }
            }
        };
        let malformed = || Error::Malformed { what: what.to_owned() };
        if length > self.buffer.len() {
            return Err(malformed());
        }
        let mut rest = &self.buffer[..];
        while rest.len() >= HEADER_LEN {
            let size = u32_at(rest, 0) as usize;
            if size < HEADER_LEN || size > rest.len() {
                return Err(malformed());
            }
            each(Frame {
                kind: u16_at(rest, 4),
                flags: u16_at(rest, 6),
                sequence: u32_at(rest, 8),
                payload: &rest[HEADER_LEN..size],
            })?;
            rest = &rest[size.next_multiple_of(4).min(rest.len())..];
        }
        Ok(true)
    }

    /// Sends one dump request and collects what `each` makes of its answers; repeats if the table changed meanwhile.
    pub(crate) fn dump<T>(
        &mut self,
        request: impl Fn(u32) -> Vec<u8>,
        what: &str,
        mut each: impl FnMut(&Frame<'_>) -> Result<Option<T>, Error>,
    ) -> Result<Vec<T>, Error> {
        const ATTEMPTS: usize = 16;
        for _ in 0..ATTEMPTS {
            let sequence = self.take_sequences(1);
            self.send(&request(sequence), what)?;
            let (mut out, mut done, mut torn, mut failed) = (Vec::new(), false, false, None);
            while !done {
                self.receive(true, what, |frame| {
                    if frame.sequence != sequence {
                        return Ok(());
                    }
                    torn |= frame.flags & NLM_F_DUMP_INTR != 0;
                    match frame.kind {
                        NLMSG_DONE => done = true,
                        NLMSG_ERROR => {
                            done = true;
                            failed = error_of(&frame, what);
                        }
                        _ => out.extend(each(&frame)?),
                    }
                    Ok(())
                })?;
            }
            match failed {
                Some(e) => return Err(e),
                None if !torn => return Ok(out),
                None => {}
            }
        }
        Err(Error::Unstable { what: what.to_owned() })
    }
}

/// The refusal that an NLMSG_ERROR frame carries, `None` if it is an acknowledgement.
pub(crate) fn error_of(frame: &Frame<'_>, what: &str) -> Option<Error> {
    if frame.payload.len() < 4 + HEADER_LEN {
        return Some(Error::Malformed { what: what.to_owned() });
    }
    let code = u32_at(frame.payload, 0) as i32;
    if code == 0 {
        return None;
    }
    let echoed = if frame.flags & NLM_F_CAPPED != 0 {
        HEADER_LEN
    } else {
        u32_at(frame.payload, 4) as usize
    };
    let mut detail = String::new();
    if frame.flags & NLM_F_ACK_TLVS != 0 {
        let start = (4 + echoed.next_multiple_of(4)).min(frame.payload.len());
        for (kind, value) in attributes(&frame.payload[start..]) {
            if kind == NLMSGERR_ATTR_MSG {
                detail = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned();
            }
        }
    }
    let source = io::Error::from_raw_os_error(-code);
    Some(Error::Refused {
        what: what.to_owned(),
        detail,
        source,
    })
}

/// Attributes of a message part: type without its flag bits, and value. Ends quietly at a malformed one.
pub(crate) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        if rest.len() < 4 {
            return None;
        }
        let size = u16_at(rest, 0) as usize;
        if size < 4 || size > rest.len() {
            return None;
        }
        let item = (u16_at(rest, 2) & 0x3fff, &rest[4..size]);
        rest = &rest[size.next_multiple_of(4).min(rest.len())..];
        Some(item)
    })
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

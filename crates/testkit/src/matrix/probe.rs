//! All probes of one namespace at once: a socket per TCP target, one for datagrams, one raw for echoes and refusals.

use std::{
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, sendto, socket_with},
};

use super::{Outcome, Probe, Target};
use crate::frame::checksum;

const DNS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(168, 63, 129, 16), 53);
/// Identifier of the next echoes: every measurement is a flow of its own, as its ports are.
static NEXT_ECHO: AtomicU16 = AtomicU16::new(0x6f6d);

/// How our packets are known again.
#[derive(Clone, Copy)]
struct Own {
    port: u16,
    echo: [u8; 2],
}

struct Open<'a> {
    target: usize,
    to: &'a Target,
    probe: Probe,
    stream: Option<TcpStream>,
    text: Vec<u8>,
    outcome: Option<Outcome>,
}

/// Must run inside the asking namespace. `wanted` are the probes that shall succeed.
pub fn ask(
    targets: &[Target],
    wanted: impl Fn(usize, Probe) -> bool,
    patience: Duration,
    quiet: Duration,
) -> Result<Vec<(usize, Probe, Outcome)>> {
    let udp = UdpSocket::bind("0.0.0.0:0").context("a socket for datagrams")?;
    udp.set_nonblocking(true)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let raw = socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::ICMP)).context("a raw socket")?;
    let here = Own {
        port: udp.local_addr()?.port(),
        echo: NEXT_ECHO.fetch_add(1, Ordering::Relaxed).to_be_bytes(),
    };

    let mut open: Vec<Open<'_>> = Vec::new();
    for (target, to) in targets.iter().enumerate() {
        for probe in &to.probes {
            let mut one = Open {
                target,
                to,
                probe: *probe,
                stream: None,
                text: Vec::new(),
                outcome: None,
            };
            if let Err(e) = one.start(open.len() as u16, here, &udp, &raw) {
                one.outcome = Some(Outcome::Refused(e.to_string()));
            }
            open.push(one);
        }
    }

    let mut end = Instant::now() + patience;
    let mut settled = false;
    loop {
        let waiting = |o: &&Open<'_>| o.outcome.is_none();
        if !settled && !open.iter().filter(waiting).any(|o| wanted(o.target, o.probe)) {
            (settled, end) = (true, Instant::now() + quiet);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || !open.iter().any(|o| o.outcome.is_none()) {
            break;
        }
        let mut fds = vec![PollFd::new(&udp, PollFlags::IN), PollFd::new(&raw, PollFlags::IN)];
        let streams: Vec<usize> = (0..open.len())
            .filter(|n| open[*n].outcome.is_none() && open[*n].stream.is_some())
            .collect();
        fds.extend(
            streams
                .iter()
                .filter_map(|n| open[*n].stream.as_ref())
                .map(|s| PollFd::new(s, PollFlags::IN)),
        );
        let limit = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e).context("waiting for answers"),
        }
        let ready: Vec<usize> = streams
            .iter()
            .zip(&fds[2..])
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(n, _)| *n)
            .collect();
        drop(fds);
        ready.into_iter().for_each(|n| open[n].read());
        datagrams(&udp, &mut open);
        messages(&raw, here, &mut open);
    }
    Ok(open
        .into_iter()
        .map(|o| (o.target, o.probe, o.outcome.unwrap_or(Outcome::Silent)))
        .collect())
}

impl Open<'_> {
    fn start(&mut self, number: u16, own: Own, udp: &UdpSocket, raw: &OwnedFd) -> io::Result<()> {
        let at = SocketAddrV4::new(self.to.address, self.to.port);
        match self.probe {
            Probe::Tcp => {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
                match connect(&socket, &at) {
                    Ok(()) | Err(Errno::INPROGRESS) => self.stream = Some(TcpStream::from(socket)),
                    Err(e) => return Err(e.into()),
                }
            }
            Probe::Udp => drop(udp.send_to(&[b'o', b'm', (number >> 8) as u8, number as u8], at)?),
            Probe::Dns => drop(udp.send_to(&question(number, &self.to.name), DNS)?),
            Probe::Icmp => {
                let [high, low] = number.to_be_bytes();
                let mut echo = [8, 0, 0, 0, own.echo[0], own.echo[1], high, low];
                let sum = checksum(&echo).to_be_bytes();
                echo[2..4].copy_from_slice(&sum);
                let at = SocketAddrV4::new(self.to.address, 0);
                sendto(raw, &echo, SendFlags::empty(), &at)?;
            }
        }
        Ok(())
    }

    /// Reads what a stream has; its end decides.
    fn read(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        let mut buffer = [0; 128];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => {
                    let text = std::mem::take(&mut self.text);
                    self.outcome = Some(self.answered(&text));
                    return;
                }
                Ok(n) => self.text.extend(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    self.outcome = Some(Outcome::Refused(e.to_string()));
                    return;
                }
            }
        }
    }

    fn answered(&self, text: &[u8]) -> Outcome {
        let text = String::from_utf8_lossy(text);
        match text.split_once(' ') {
            Some((by, seen)) if self.to.by.contains(by) => Outcome::Open {
                by: by.to_owned(),
                seen: seen.parse().ok(),
            },
            _ => Outcome::Stray(text.into_owned()),
        }
    }
}

fn datagrams(udp: &UdpSocket, open: &mut [Open<'_>]) {
    let mut buffer = [0; 512];
    while let Ok((length, peer)) = udp.recv_from(&mut buffer) {
        let reply = &buffer[..length];
        let number = match reply {
            [b'o', b'm', high, low, ..] if peer != SocketAddr::V4(DNS) => u16::from_be_bytes([*high, *low]),
            [high, low, ..] if peer == SocketAddr::V4(DNS) => u16::from_be_bytes([*high, *low]),
            _ => continue,
        };
        let Some(one) = open.get_mut(usize::from(number)) else {
            continue;
        };
        one.outcome = Some(match one.probe {
            Probe::Dns => resolved(reply, one.to),
            // Whoever answers must answer from where it was asked.
            _ if peer.ip() != one.to.address => Outcome::Stray(format!("{peer}")),
            _ => one.answered(&reply[4..]),
        });
    }
}

/// Echo replies, and refusals of datagrams and echoes; those of streams come by the stream.
fn messages(raw: &OwnedFd, own: Own, open: &mut [Open<'_>]) {
    let mut buffer = [0; 1500];
    loop {
        let Ok((_, length)) = recv(raw, &mut buffer[..], RecvFlags::empty()) else {
            return;
        };
        let Some((source, _, icmp)) = ipv4(&buffer[..length]) else {
            continue;
        };
        match icmp {
            [0, _, _, _, a, b, high, low, ..] if [*a, *b] == own.echo => {
                let number = usize::from(u16::from_be_bytes([*high, *low]));
                if let Some(one) = open.get_mut(number).filter(|o| o.probe == Probe::Icmp) {
                    let by = one.to.name.clone();
                    one.outcome = Some(match source == one.to.address {
                        true => Outcome::Open { by, seen: None },
                        false => Outcome::Stray(source.to_string()),
                    });
                }
            }
            [kind @ (3 | 11), code, _, _, _, _, _, _, about @ ..] => {
                let said = Outcome::Refused(format!("ICMP {kind}/{code} from {source}"));
                let Some(one) = refused(about, own, open) else {
                    continue;
                };
                one.outcome.get_or_insert(said);
            }
            _ => {}
        }
    }
}

/// The probe that the head of a returned packet belongs to.
fn refused<'a, 'b>(about: &[u8], own: Own, open: &'a mut [Open<'b>]) -> Option<&'a mut Open<'b>> {
    let (_, destination, rest) = ipv4(about)?;
    let protocol = about[9];
    let head: [u8; 8] = rest.get(..8)?.try_into().ok()?;
    let number = |a: usize| u16::from_be_bytes([head[a], head[a + 1]]);
    match protocol {
        1 if head[4..6] == own.echo => open.get_mut(usize::from(number(6))).filter(|o| o.probe == Probe::Icmp),
        17 if number(0) == own.port => open.iter_mut().find(|o| match o.probe {
            Probe::Udp => (o.to.address, o.to.port) == (destination, number(2)) && o.outcome.is_none(),
            Probe::Dns => (*DNS.ip(), DNS.port()) == (destination, number(2)) && o.outcome.is_none(),
            _ => false,
        }),
        _ => None,
    }
}

/// Source, destination and payload.
fn ipv4(packet: &[u8]) -> Option<(Ipv4Addr, Ipv4Addr, &[u8])> {
    let first = *packet.first()?;
    let head = usize::from(first & 15) * 4;
    let at = |n: usize| -> Option<Ipv4Addr> { Some(<[u8; 4]>::try_from(packet.get(n..n + 4)?).ok()?.into()) };
    (first >> 4 == 4).then_some(())?;
    Some((at(12)?, at(16)?, packet.get(head..)?))
}

fn question(number: u16, name: &str) -> Vec<u8> {
    let mut out = number.to_be_bytes().to_vec();
    out.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        out.push(label.len() as u8);
        out.extend(label.as_bytes());
    }
    out.extend([0, 0, 1, 0, 1]);
    out
}

/// Whether a DNS answer has the target's address, by the shape that every resolver's answer to one question has: the
/// records stand behind the question, addresses at their ends.
fn resolved(reply: &[u8], target: &Target) -> Outcome {
    let (code, answers) = match reply {
        [_, _, _, code, _, _, high, low, ..] => (code & 15, u16::from_be_bytes([*high, *low])),
        _ => return Outcome::Stray("half an answer".to_owned()),
    };
    let behind = question(0, &target.name).len();
    let record = [&[0, 4][..], &target.address.octets()].concat();
    if code != 0 || answers == 0 {
        return Outcome::Refused(format!("DNS code {code}, {answers} answers"));
    }
    match reply.get(behind..).unwrap_or_default().windows(6).any(|w| w == record) {
        true => Outcome::Open {
            by: target.name.clone(),
            seen: None,
        },
        false => Outcome::Stray("another address".to_owned()),
    }
}

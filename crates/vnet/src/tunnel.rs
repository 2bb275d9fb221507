//! WireGuard tunnels: packets of a TUN device in one namespace, datagrams of a socket in another.
//!
//! The protocol (handshakes, keys, replay windows) is `boringtun`'s, which does no IO; this is the loop around it. The other
//! end is known by its key alone: answers go to wherever its last good datagram came from.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use ipnet::Ipv4Net;
use linux::netns::NetNs;
use tokio::io::unix::AsyncFd;
use tokio::net::UdpSocket;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::dial;

/// Both ends' keys. `Debug` prints none of them.
#[derive(Clone, Eq, PartialEq)]
pub struct TunnelKeys {
    pub private: [u8; 32],
    pub peer_public: [u8; 32],
    /// Mixed into every handshake, against whoever records today and computes later.
    pub preshared: Option<[u8; 32]>,
}

impl std::fmt::Debug for TunnelKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TunnelKeys")
    }
}

impl TunnelKeys {
    /// The public key of a private one.
    pub fn public_of(private: [u8; 32]) -> [u8; 32] {
        PublicKey::from(&StaticSecret::from(private)).to_bytes()
    }
}

/// What a tunnel needs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TunnelConfig {
    pub keys: TunnelKeys,
    /// Where this end listens, in the namespace of the outer side.
    pub listen: SocketAddr,
    /// The other end; absent if it calls first.
    pub endpoint: Option<SocketAddr>,
    /// Sources that the other end may send from.
    pub allowed: Vec<Ipv4Net>,
}

/// A running tunnel; it ends with this value. The device stays.
#[derive(Debug)]
pub struct Tunnel {
    task: JoinHandle<()>,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Keeps state in firewalls between the ends alive; WireGuard's own tools recommend it.
const KEEPALIVE_S: u16 = 25;
/// The protocol's timers are looked at this often.
const TICK: Duration = Duration::from_millis(250);
/// Larger than any packet of the device and what the protocol adds.
const BUFFER: usize = 65_536 + 256;

impl Tunnel {
    /// Serves the TUN device `name` in `inner`; datagrams leave from `outer`.
    pub fn start(inner: &NetNs, name: &str, outer: &NetNs, config: TunnelConfig, runtime: &Handle) -> io::Result<Self> {
        let device = linux::tun::open(inner, name)?;
        let socket = dial::datagrams(outer, config.listen)?;
        socket.set_nonblocking(true)?;
        let _entered = runtime.enter();
        #[expect(
            deprecated,
            reason = "what replaces it is unsafe to call; an owned descriptor is what both want"
        )]
        let device = AsyncFd::new(device)?;
        let socket = UdpSocket::from_std(socket)?;
        let task = runtime.spawn(Loop::new(device, socket, config).run());
        Ok(Self { task })
    }
}

impl Tunnel {
    /// Whether its loop is over: the device was deleted.
    pub fn ended(&self) -> bool {
        self.task.is_finished()
    }
}

struct Loop {
    device: AsyncFd<OwnedFd>,
    socket: UdpSocket,
    protocol: Tunn,
    endpoint: Option<SocketAddr>,
    allowed: Vec<Ipv4Net>,
}

/// Where a result of the protocol goes.
enum Way {
    Nowhere,
    Network(usize),
    Device(usize, Ipv4Addr),
}

fn way(result: &TunnResult<'_>) -> Way {
    match result {
        TunnResult::WriteToNetwork(bytes) => Way::Network(bytes.len()),
        TunnResult::WriteToTunnelV4(bytes, from) => Way::Device(bytes.len(), *from),
        // Virtual networks are IPv4.
        TunnResult::WriteToTunnelV6(..) | TunnResult::Done => Way::Nowhere,
        TunnResult::Err(error) => {
            tracing::debug!(?error, "a datagram of a tunnel was refused");
            Way::Nowhere
        }
    }
}

impl Loop {
    fn new(device: AsyncFd<OwnedFd>, socket: UdpSocket, config: TunnelConfig) -> Self {
        let TunnelKeys {
            private,
            peer_public,
            preshared,
        } = config.keys;
        let keepalive = config.endpoint.map(|_| KEEPALIVE_S);
        let (own, peer) = (StaticSecret::from(private), PublicKey::from(peer_public));
        Self {
            device,
            socket,
            protocol: Tunn::new(own, peer, preshared, keepalive, 0, None),
            endpoint: config.endpoint,
            allowed: config.allowed,
        }
    }

    async fn run(mut self) {
        let (mut packet, mut out) = (vec![0; BUFFER], vec![0; BUFFER]);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // Each branch waits for readiness or time only: nothing is taken before it is chosen.
            tokio::select! {
                ready = self.device.readable() => {
                    let Ok(mut ready) = ready else { return };
                    match ready.try_io(|d| Ok(rustix::io::read(d, &mut packet)?)) {
                        Ok(Ok(length)) => {
                            let result = self.protocol.encapsulate(&packet[..length], &mut out);
                            if let Way::Network(length) = way(&result) {
                                self.send(&out[..length]);
                            }
                        }
                        Ok(Err(error)) => {
                            tracing::error!(%error, "a tunnel's device is gone");
                            return;
                        }
                        Err(_) => {}
                    }
                }
                received = self.socket.recv_from(&mut packet) => {
                    if let Ok((length, from)) = received {
                        self.received(&packet[..length], from, &mut out);
                    }
                }
                _ = tick.tick() => {
                    let result = self.protocol.update_timers(&mut out);
                    if let Way::Network(length) = way(&result) {
                        self.send(&out[..length]);
                    }
                }
            }
        }
    }

    fn received(&mut self, datagram: &[u8], from: SocketAddr, out: &mut [u8]) {
        let mut next: &[u8] = datagram;
        loop {
            let result = self.protocol.decapsulate(Some(from.ip()), next, out);
            let known = !matches!(result, TunnResult::Err(_));
            match way(&result) {
                Way::Network(length) => {
                    // A cookie or a handshake's answer goes to who asked; only a proven sender becomes the other end.
                    let _ = self.socket.try_send_to(&out[..length], from);
                    if self.proven() {
                        self.endpoint = Some(from);
                    }
                    // What waited for the handshake follows.
                    next = &[];
                    continue;
                }
                Way::Device(length, source) => {
                    self.endpoint = Some(from);
                    if self.allowed.iter().any(|a| a.contains(&source)) {
                        let _ = rustix::io::write(self.device.get_ref(), &out[..length]);
                    } else {
                        tracing::debug!(%source, "a packet of a tunnel has a source that is not of its site");
                    }
                }
                Way::Nowhere if known && self.proven() => self.endpoint = Some(from),
                Way::Nowhere => {}
            }
            return;
        }
    }

    /// Whether a handshake with the other end's key stands.
    fn proven(&self) -> bool {
        self.protocol.stats().0.is_some()
    }

    /// A full socket buffer is the network's loss, as anywhere.
    fn send(&self, datagram: &[u8]) {
        if let Some(endpoint) = self.endpoint {
            let _ = self.socket.try_send_to(datagram, endpoint);
        }
    }
}

/// Any address of the host, at `port`.
pub fn any(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)
}

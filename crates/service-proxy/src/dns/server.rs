//! Sockets of the cluster's DNS: UDP and TCP on the service address, and questions to the upstream.
//!
//! The sockets are made by the caller, or by [`Sockets`] inside a network namespace; they stay there wherever the tasks
//! run. Everything is bounded: queries in flight, connections, sizes and times. What does not fit is dropped and counted.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::RwLock;
use stdx::Shutdown;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};

use super::{
    message::{self, Action},
    zone::Zone,
};

const IN_FLIGHT_MAX: usize = 512;
const CONNECTIONS_MAX: usize = 128;
const TCP_IDLE: Duration = Duration::from_secs(10);
/// Two tries of this length stay within the 5 s that a stub resolver waits.
const UPSTREAM_TRIES: u32 = 2;
pub const UPSTREAM_WAIT: Duration = Duration::from_secs(2);
const DATAGRAM_BYTES_MAX: usize = 4096;

/// Makes sockets in one network namespace; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Sockets {
    /// Path of a pinned namespace; `None` = the process's own.
    pub netns: Option<PathBuf>,
}

impl Sockets {
    /// A socket bound inside.
    pub fn udp(&self, address: SocketAddr) -> io::Result<UdpSocket> {
        let make = || {
            let socket = std::net::UdpSocket::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        UdpSocket::from_std(self.run(make)?)
    }

    /// A listener bound inside.
    pub fn tcp(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let make = || {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        TcpListener::from_std(self.run(make)?)
    }

    fn run<T: Send>(&self, make: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        match &self.netns {
            None => make(),
            Some(path) => linux::netns::run_in(path, make).map_err(io::Error::other)?,
        }
    }
}

pub struct ServerConfig {
    pub udp: UdpSocket,
    pub tcp: TcpListener,
    /// Where questions to the upstream are asked from.
    pub sockets: Sockets,
    /// Who answers foreign names; `None`: they fail.
    pub upstream: Option<SocketAddr>,
    /// For one try; two are made.
    pub upstream_wait: Duration,
}

/// Counts since the start.
#[derive(Debug, Default)]
pub struct Counters {
    pub queries: AtomicU64,
    pub forwarded: AtomicU64,
    pub upstream_failures: AtomicU64,
    /// Queries or connections beyond the bounds.
    pub dropped: AtomicU64,
}

/// Answers from the zone that is current when a query comes.
pub struct Server {
    shared: Arc<Shared>,
    tcp: TcpListener,
}

struct Shared {
    zone: Arc<RwLock<Arc<Zone>>>,
    udp: UdpSocket,
    sockets: Sockets,
    upstream: Option<SocketAddr>,
    upstream_wait: Duration,
    in_flight: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    turn: AtomicUsize,
    counters: Counters,
}

impl Server {
    /// `zone` is replaced by its owner; readers take the pointer for one query.
    pub fn new(config: ServerConfig, zone: Arc<RwLock<Arc<Zone>>>) -> Self {
        let shared = Arc::new(Shared {
            zone,
            udp: config.udp,
            sockets: config.sockets,
            upstream: config.upstream,
            upstream_wait: config.upstream_wait,
            in_flight: Arc::new(Semaphore::new(IN_FLIGHT_MAX)),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            turn: AtomicUsize::new(0),
            counters: Counters::default(),
        });
        Self {
            shared,
            tcp: config.tcp,
        }
    }

    /// Serves until `shutdown`; queries in flight end with the runtime.
    pub async fn run(self, shutdown: Shutdown) {
        let Self { shared, tcp } = self;
        shutdown
            .or_stop(async { tokio::join!(shared.clone().serve_udp(), shared.serve_tcp(tcp)) })
            .await;
    }
}

impl Shared {
    async fn serve_udp(self: Arc<Self>) {
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        loop {
            let (size, from) = match self.udp.recv_from(&mut buffer).await {
                Ok(got) => got,
                Err(error) => {
                    // ICMP errors of earlier answers arrive here; anything lasting must not spin.
                    tracing::debug!(%error, "receiving a DNS query failed");
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    continue;
                }
            };
            let Ok(permit) = self.in_flight.clone().try_acquire_owned() else {
                self.counters.dropped.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let raw = buffer[..size].to_vec();
            let this = self.clone();
            tokio::spawn(async move {
                let _permit = permit;
                if let Some(answer) = this.answer(&raw, true).await
                    && let Err(error) = this.udp.send_to(&answer, from).await
                {
                    tracing::debug!(%error, %from, "sending a DNS answer failed");
                }
            });
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "accepting a DNS connection failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(permit) = self.connections.clone().try_acquire_owned() else {
                self.counters.dropped.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let this = self.clone();
            tokio::spawn(async move {
                let _permit = permit;
                let _ = this.connection(stream).await;
            });
        }
    }

    /// One query after the other until the client closes or is idle.
    async fn connection(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let raw = match timeout(TCP_IDLE, read_frame(&mut stream)).await {
                Ok(Ok(Some(raw))) => raw,
                _ => return Ok(()),
            };
            let Some(answer) = self.answer(&raw, false).await else {
                return Ok(());
            };
            timeout(TCP_IDLE, write_frame(&mut stream, &answer)).await??;
        }
    }

    async fn answer(&self, raw: &[u8], udp: bool) -> Option<Vec<u8>> {
        self.counters.queries.fetch_add(1, Ordering::Relaxed);
        let zone = self.zone.read().clone();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        match message::handle(&zone, raw, udp, turn) {
            Action::Ignore => None,
            Action::Reply(bytes) => Some(bytes),
            Action::Forward { fallback } => match self.ask_upstream(raw, udp).await {
                Ok(answer) => Some(answer),
                Err(error) => {
                    self.counters.upstream_failures.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%error, "the upstream resolver did not answer");
                    Some(fallback)
                }
            },
            Action::Chase { partial, target, kind } => {
                let query = message::query(fresh_id(), &target, kind)?;
                let answer = self.ask_upstream(&query, udp).await.ok();
                message::complete(*partial, answer.as_deref(), udp)
            }
        }
    }

    /// Asks the upstream the same question under another id and from a port of its own, so that nobody can guess both.
    async fn ask_upstream(&self, raw: &[u8], udp: bool) -> io::Result<Vec<u8>> {
        let upstream = self
            .upstream
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?;
        self.counters.forwarded.fetch_add(1, Ordering::Relaxed);
        let id = fresh_id();
        let mut question = raw.to_vec();
        question.splice(..2, id.to_be_bytes());
        let mut last = io::Error::from(io::ErrorKind::TimedOut);
        for _ in 0..UPSTREAM_TRIES {
            let attempt = async {
                if udp {
                    self.over_udp(&question, upstream).await
                } else {
                    self.over_tcp(&question, upstream).await
                }
            };
            match timeout(self.upstream_wait, attempt).await {
                Ok(Ok(mut answer)) => {
                    answer.splice(..2, raw[..2].iter().copied());
                    return Ok(answer);
                }
                Ok(Err(e)) => last = e,
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(last)
    }

    async fn over_udp(&self, question: &[u8], upstream: SocketAddr) -> io::Result<Vec<u8>> {
        let any: SocketAddr = if upstream.is_ipv4() {
            ([0; 4], 0).into()
        } else {
            ([0u16; 8], 0).into()
        };
        let socket = self.sockets.udp(any)?;
        socket.connect(upstream).await?;
        socket.send(question).await?;
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        loop {
            let size = socket.recv(&mut buffer).await?;
            if is_answer_to(&buffer[..size], question) {
                buffer.truncate(size);
                return Ok(buffer);
            }
        }
    }

    async fn over_tcp(&self, question: &[u8], upstream: SocketAddr) -> io::Result<Vec<u8>> {
        let make = || {
            if upstream.is_ipv4() {
                TcpSocket::new_v4()
            } else {
                TcpSocket::new_v6()
            }
        };
        let socket = self.sockets.run(make)?;
        let mut stream = socket.connect(upstream).await?;
        write_frame(&mut stream, question).await?;
        match read_frame(&mut stream).await? {
            Some(answer) if is_answer_to(&answer, question) => Ok(answer),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Unpredictable to others: made from the standard library's secret hasher keys.
fn fresh_id() -> u16 {
    stdx::Rng::from_entropy().next_u64() as u16
}

/// An answer with the question's id that repeats the question.
fn is_answer_to(answer: &[u8], question: &[u8]) -> bool {
    use hickory_proto::op::{Message, MessageType};
    if answer.len() < 12 || answer[..2] != question[..2] {
        return false;
    }
    match (Message::from_vec(answer), Message::from_vec(question)) {
        (Ok(a), Ok(q)) => a.metadata.message_type == MessageType::Response && a.queries == q.queries,
        _ => false,
    }
}

async fn read_frame(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    match stream.read_exact(&mut length).await {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    };
    let mut raw = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut raw).await?;
    Ok(Some(raw))
}

async fn write_frame(stream: &mut TcpStream, raw: &[u8]) -> io::Result<()> {
    let length = u16::try_from(raw.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(raw);
    stream.write_all(&frame).await
}

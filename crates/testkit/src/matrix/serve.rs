//! Answers in one namespace: `<name> <caller's address>`, over TCP to every connection and over UDP behind the datagram.

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

/// Ends when dropped.
pub struct Server {
    stop: Arc<AtomicBool>,
    wake: std::os::fd::OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(name: &str, netns: &Path, port: u16) -> Result<Self> {
        let at = SocketAddr::from(([0, 0, 0, 0], port));
        let sockets = || -> std::io::Result<_> { Ok((TcpListener::bind(at)?, UdpSocket::bind(at)?)) };
        let (tcp, udp) = linux::netns::run_in(netns, sockets)?.with_context(|| format!("port {port} at {name}"))?;
        tcp.set_nonblocking(true)?;
        udp.set_nonblocking(true)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, woken, name) = (stop.clone(), wake.try_clone()?, name.to_owned());
        let serve = move || {
            while !stopped.load(Ordering::Acquire) {
                let mut fds = [
                    PollFd::new(&tcp, PollFlags::IN),
                    PollFd::new(&udp, PollFlags::IN),
                    PollFd::new(&woken, PollFlags::IN),
                ];
                let _ = poll(&mut fds, None);
                answer(&name, &tcp, &udp);
            }
        };
        let thread = std::thread::Builder::new()
            .name("answering".to_owned())
            .spawn(serve)
            .context("a thread")?;
        Ok(Self {
            stop,
            wake,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer(name: &str, tcp: &TcpListener, udp: &UdpSocket) {
    let text = |peer: IpAddr| format!("{name} {peer}");
    while let Ok((mut stream, peer)) = tcp.accept() {
        // A few bytes fit the socket's buffer at once; a caller that went is no concern.
        let _ = stream.write_all(text(peer.ip()).as_bytes());
    }
    let mut buffer = [0; 64];
    while let Ok((length, peer)) = udp.recv_from(&mut buffer) {
        let reply = [&buffer[..length.min(4)], text(peer.ip()).as_bytes()].concat();
        let _ = udp.send_to(&reply, peer);
    }
}

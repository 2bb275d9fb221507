//! Sockets inside namespaces: made there by a scratch thread, used anywhere.

use std::io;
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use linux::netns::NetNs;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with, sockopt};
use vnet_model::WIRE_SERVER;

/// Starts a connection from 168.63.129.16 inside `ns`; the stream is not blocking and may still be connecting.
pub fn start(ns: &NetNs, to: SocketAddr) -> io::Result<TcpStream> {
    ns.run(|| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        bind(&socket, &SocketAddrV4::new(WIRE_SERVER, 0))?;
        match connect(&socket, &to) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
            Err(e) => Err(e.into()),
        }
    })
    .map_err(io::Error::other)?
}

/// Waits until a started connection stands, or fails.
pub fn finish(stream: &TcpStream, timeout: Duration) -> io::Result<()> {
    let limit = Timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    let mut fds = [PollFd::new(stream, PollFlags::OUT)];
    if poll(&mut fds, Some(&limit))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    match sockopt::socket_error(stream)? {
        Ok(()) => stream.set_nonblocking(false),
        Err(e) => Err(e.into()),
    }
}

pub fn listen(ns: &NetNs, address: SocketAddr) -> io::Result<TcpListener> {
    ns.run(|| TcpListener::bind(address)).map_err(io::Error::other)?
}

pub fn datagrams(ns: &NetNs, address: SocketAddr) -> io::Result<UdpSocket> {
    ns.run(|| UdpSocket::bind(address)).map_err(io::Error::other)?
}

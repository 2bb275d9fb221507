//! Packet sockets: the standard library and rustix have no addresses of their family, hence libc.

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

/// Sends a whole frame out of `link` of the calling thread's network namespace.
///
/// # Errors
/// If there is no such link, or it is down.
pub fn send(link: &str, frame: &[u8]) -> io::Result<()> {
    let socket = open(link, 0)?;
    // JUSTIFICATION: see the module, here and below.
    // SAFETY: the pointer and length are those of a live slice; the socket is bound, so no address is needed.
    let sent = unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    if sent == frame.len() as isize {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A socket that gets every frame of `link`, both ways; it does not block.
///
/// # Errors
/// As [`send`].
pub fn receive_all(link: &str) -> io::Result<OwnedFd> {
    open(link, libc::ETH_P_ALL as u16)
}

fn open(link: &str, protocol: u16) -> io::Result<OwnedFd> {
    let index = index_of(link)?;
    let protocol = protocol.to_be();
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers; the result is checked before it is owned.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(protocol)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    at.sll_family = libc::AF_PACKET as u16;
    at.sll_protocol = protocol;
    at.sll_ifindex = index as i32;
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the address is a live structure of the length given.
    let bound = unsafe { libc::bind(fd, (&raw const at).cast(), length) };
    if bound == 0 {
        Ok(socket)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn index_of(link: &str) -> io::Result<u32> {
    let name = std::ffi::CString::new(link)?;
    // SAFETY: the name is a live string that ends with zero.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

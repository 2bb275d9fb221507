//! The one system call without a safe wrapper.

use std::{io, mem, os::fd::AsRawFd};

use rustix::net::{AddressFamily, SocketType};

/// Number of the calling thread's network namespace: never used twice within a boot.
pub fn netns_cookie() -> io::Result<u64> {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    let mut cookie = 0u64;
    let mut len = mem::size_of::<u64>() as libc::socklen_t;
    // JUSTIFICATION: no safe crate in the tree offers SO_NETNS_COOKIE.
    // SAFETY: both pointers are to live locals, and `len` is the size of what the first points to.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if rc == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

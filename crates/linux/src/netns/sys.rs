//! Calls that the safe interface of rustix marks as unsafe or lacks.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{Errno, Result};
use rustix::thread::UnshareFlags;

/// Gives the calling thread a fresh network namespace.
pub fn unshare_network() -> Result<()> {
    // JUSTIFICATION: rustix offers `unshare` only as an unsafe function because of CLONE_FILES.
    // SAFETY: CLONE_NEWNET shares no file table and touches no memory of this process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
}

/// Gives the calling thread fresh network and mount namespaces.
pub fn unshare_network_and_mounts() -> Result<()> {
    // JUSTIFICATION: as above.
    // SAFETY: CLONE_NEWNS implies CLONE_FS, which only separates this thread's working directory from the others'.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }
}

/// Opens the network namespace of a socket; needs CAP_NET_ADMIN there.
pub fn of_socket(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    /// `SIOCGSKNS` of `linux/sockios.h`.
    const GET_NETNS: u32 = 0x894c;
    // JUSTIFICATION: rustix has no such request.
    // SAFETY: the request takes no argument and returns a descriptor of its own or an error.
    unsafe {
        match libc::ioctl(socket.as_raw_fd(), GET_NETNS as _) {
            -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

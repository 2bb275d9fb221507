//! Taking over the inherited report channel.

use std::os::{
    fd::{FromRawFd, OwnedFd},
    unix::net::UnixStream,
};

use crate::supervisor::protocol::HELPER_FD;

/// The supervisor's channel, if this program was started as a helper. Call once.
pub(super) fn report_channel() -> Option<UnixStream> {
    // SAFETY: asks about the descriptor only.
    let flags = unsafe { libc::fcntl(HELPER_FD, libc::F_GETFD) };
    // A descriptor that closes at exec was opened by this process, not inherited.
    if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return None;
    }
    // SAFETY: the descriptor is open, was inherited, and nobody else in this program knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(HELPER_FD) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).ok()?;
    let is_socket = rustix::fs::fstat(&fd)
        .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Socket);
    is_socket.then(|| UnixStream::from(fd))
}

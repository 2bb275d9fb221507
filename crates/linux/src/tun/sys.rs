//! The two requests that make a TUN device, `linux/if_tun.h`.

use std::{io, mem::MaybeUninit, os::fd::RawFd};

/// Ties an open `/dev/net/tun` to the device `name` of the calling thread's namespace and lets the device stay.
pub fn attach(file: RawFd, name: &str) -> io::Result<()> {
    // SAFETY: an all-zero `ifreq` is valid.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} is too long for a link"),
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open and `request` is the structure that this request reads and writes.
    let attached = unsafe { libc::ioctl(file, libc::TUNSETIFF as _, &raw mut request) };
    if attached != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: this request takes a number, not a pointer.
    let kept = unsafe { libc::ioctl(file, libc::TUNSETPERSIST as _, 1) };
    if kept == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

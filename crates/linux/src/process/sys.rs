//! System calls without a safe form: forking, unsharing, an interface flag, installing a filter.

use std::{io, mem::MaybeUninit, os::fd::AsRawFd};

use rustix::{process::Pid, thread::UnshareFlags};

/// `fork` with namespace flags. The child never returns from here.
pub(super) fn clone_process(flags: u32, child: impl FnOnce() -> u8) -> io::Result<Pid> {
    // SAFETY: an all-zero `clone_args` is valid: no stack, no TLS, no pointers.
    let mut args: libc::clone_args = unsafe { MaybeUninit::zeroed().assume_init() };
    args.flags = u64::from(flags);
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: without CLONE_VM this is a fork: the child has a copy of everything and runs on its own copy of the stack.
    // The caller promises a program of one thread, so no lock can be left taken.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101);
            // SAFETY: leaves the child at once, without running the parent's exit handlers.
            unsafe { libc::_exit(i32::from(status)) }
        }
        pid => Pid::from_raw(pid as i32).ok_or_else(|| io::Error::other("clone3 returned no process id")),
    }
}

pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: of the flags only FILES can break code elsewhere (descriptors that other threads close or open); no caller
    // in this crate passes it.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

pub(super) fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind(("0.0.0.0", 0))?;
    // SAFETY: an all-zero `ifreq` is valid.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the descriptor is open and `request` is the structure that this request reads.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

pub(super) fn install_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::Error::other("the filter is too long"))?;
    let fprog = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: `fprog` points to `len` instructions that outlive the call; the kernel copies them and writes nothing.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const fprog) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

//! Calls without a safe form: the signal descriptor, and what a child does between fork and exec.

use std::{
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use crate::supervisor::protocol::HELPER_FD;

/// Blocks the signals and returns a non-blocking descriptor that reads them.
pub fn signal_fd(signals: &[i32]) -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` initialises the set before the others use it; the signal numbers are valid, and the descriptor
    // is new and ours.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }
}

/// Reads the pending signal numbers.
pub fn read_signals(fd: &OwnedFd) -> Vec<i32> {
    const SIZE: usize = size_of::<libc::signalfd_siginfo>();
    let mut found = Vec::new();
    let mut buffer = [0u8; SIZE * 8];
    while let Ok(len) = rustix::io::read(fd, &mut buffer) {
        // `ssi_signo` is the first field, a native-endian u32.
        found.extend(
            buffer[..len]
                .chunks_exact(SIZE)
                .map(|info| i32::from_ne_bytes([info[0], info[1], info[2], info[3]])),
        );
        if len < buffer.len() {
            break;
        }
    }
    found
}

/// Lets the command start with no signal blocked, in a session of its own, and with `helper` as descriptor 3.
pub fn prepare(command: &mut Command, helper: Option<BorrowedFd<'_>>) {
    let helper = helper.map(|fd| fd.as_raw_fd());
    // SAFETY: runs after fork in a program of one thread; only system calls are made, and `helper` stays open in the parent
    // until the command was spawned.
    unsafe {
        command.pre_exec(move || {
            let mut none = MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
            libc::setsid();
            match helper {
                // `dup2` onto itself would keep close-on-exec.
                Some(HELPER_FD) if libc::fcntl(HELPER_FD, libc::F_SETFD, 0) < 0 => {
                    return Err(io::Error::last_os_error());
                }
                Some(HELPER_FD) | None => {}
                Some(fd) if libc::dup2(fd, HELPER_FD) < 0 => return Err(io::Error::last_os_error()),
                Some(_) => {}
            }
            Ok(())
        });
    }
}

/// Sends a signal to everything in the pid namespace but the caller. For PID 1 only.
pub fn kill_everything(signal: i32) {
    // SAFETY: plain system call.
    unsafe { libc::kill(-1, signal) };
}

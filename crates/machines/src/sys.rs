//! The system calls that have no safe wrapper, and nothing else.

use std::{
    fs::File,
    io,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::Path,
    process::Command,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags, Signal, WaitOptions},
    thread::{LinkNameSpaceType, UnshareFlags},
};

/// Moves the calling thread into a network namespace.
pub fn join_netns(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(())
}

/// Mount, uts, ipc and cgroup namespaces for the calling process.
pub fn unshare_for_machine() -> io::Result<()> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWUTS | UnshareFlags::NEWIPC | UnshareFlags::NEWCGROUP;
    // SAFETY: the boot process is single-threaded and shares no file table with another process.
    unsafe { rustix::thread::unshare_unsafe(flags) }?;
    Ok(())
}

/// The next child becomes PID 1 of a new pid namespace.
pub fn unshare_pid() -> io::Result<()> {
    // SAFETY: as above; NEWPID changes only what later children see.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?;
    Ok(())
}

/// `/proc` must show the new pid namespace, so its first process mounts it.
pub fn mount_proc_before_exec(command: &mut Command) {
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            use rustix::mount::MountFlags;
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            rustix::mount::mount(c"proc", c"/proc", c"proc", flags, None)?;
            Ok(())
        });
    }
}

pub fn kill(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // A process that is already gone is what the caller wants.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Waits at most `timeout` for a process (child or not) to end; returns at once if it is gone.
pub fn wait_exit(pid: i32, timeout: Duration) {
    let Some(pid) = Pid::from_raw(pid) else { return };
    let Ok(fd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
        return;
    };
    let ts = Timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    let _ = rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&ts));
}

/// Returns when the process (child or not) has ended; at once if it is gone.
pub async fn exited(pid: i32) {
    let Some(raw) = Pid::from_raw(pid) else { return };
    let Ok(fd) = rustix::process::pidfd_open(raw, PidfdFlags::empty()) else {
        return;
    };
    // A pidfd becomes readable when its process ends.
    // SAFETY: the AsyncFd owns the pidfd, which therefore stays open for as long as it is registered.
    match unsafe { tokio::io::unix::AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) } {
        Ok(fd) => drop(fd.readable().await),
        Err(_) => wait_exit(pid, Duration::from_secs(1)),
    }
}

/// True if the process has ended and only waits to be reaped.
pub fn is_zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|s| s.rsplit_once(") ").map(|(_, rest)| rest.starts_with('Z')))
        .unwrap_or(false)
}

/// Reaps `pid` if it is a child of this process.
pub fn reap(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

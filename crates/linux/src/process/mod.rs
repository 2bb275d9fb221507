//! Processes and their namespaces: forking into new namespaces, pidfds, the subreaper, joining, system call filters.

pub mod seccomp;
mod sys;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    process::{Pid, PidfdFlags, Signal},
    thread::{LinkNameSpaceType, UnshareFlags},
};
use thiserror::Error;

pub use rustix::thread::UnshareFlags as Namespaces;

#[derive(Debug, Error)]
pub enum ProcessError {
    #[error("{doing}")]
    Call {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{doing} {path}")]
    Path {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the scratch thread panicked")]
    Panicked,
}

fn call<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> ProcessError {
    move |source| ProcessError::Call {
        doing,
        source: source.into(),
    }
}

/// A process we started: its id, and a descriptor that names it even after the id is used again.
#[derive(Debug)]
pub struct Child {
    pub pid: Pid,
    pub pidfd: OwnedFd,
}

/// Forks into new `namespaces` and runs `child`; its return value is the exit status.
///
/// # Assumptions
/// The calling program has one thread. With more, a lock held by another thread stays locked in the child for ever:
/// such programs start a helper program instead.
pub fn fork_into(namespaces: Namespaces, child: impl FnOnce() -> u8) -> Result<Child, ProcessError> {
    let pid = sys::clone_process(namespaces.bits(), child).map_err(call("clone a process"))?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(call("open a pidfd"))?;
    Ok(Child { pid, pidfd })
}

/// Makes orphans of our descendants our children instead of PID 1's.
pub fn become_subreaper() -> Result<(), ProcessError> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(call("become a subreaper"))
}

/// The caller gets SIGKILL when the thread that started it ends.
pub fn die_with_parent() -> Result<(), ProcessError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(call("ask for the parent's death signal"))
}

pub fn open_pidfd(pid: u32) -> Result<OwnedFd, ProcessError> {
    let pid = Pid::from_raw(pid as i32)
        .ok_or(rustix::io::Errno::SRCH)
        .map_err(call("open a pidfd"))?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(call("open a pidfd"))
}

/// Start time of a process in clock ticks since boot: with the pid it identifies a process for good. `None` if it is gone.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name (field 2) may hold spaces and parentheses: count from its end. The start time is field 22.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Joins the namespace at `path` (`/proc/PID/ns/..` or a bind mount of it) with the calling thread.
pub fn join(path: &Path, kind: LinkNameSpaceType) -> Result<(), ProcessError> {
    let failed = |doing, source: io::Error| ProcessError::Path {
        doing,
        path: path.to_owned(),
        source,
    };
    let file = std::fs::File::open(path).map_err(|source| failed("open namespace", source))?;
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(kind))
        .map_err(|error| failed("join namespace", error.into()))
}

/// Gives the calling thread a mount namespace of its own, a copy of the present one. For scratch threads.
pub fn unshare_mounts() -> Result<(), ProcessError> {
    // The working directory and root are shared between threads until FS is unshared, and the kernel insists on it.
    sys::unshare(UnshareFlags::FS | UnshareFlags::NEWNS).map_err(call("unshare mounts"))
}

/// Gives the calling thread new `namespaces`. For scratch threads, which must end afterwards.
pub fn unshare(namespaces: Namespaces) -> Result<(), ProcessError> {
    sys::unshare(namespaces).map_err(call("unshare namespaces"))
}

/// Runs `work` on a thread that ends with it, so that what it does to its namespaces touches no other thread.
pub fn on_scratch_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ProcessError> {
    let thread = std::thread::Builder::new()
        .name("scratch".to_owned())
        .spawn(work)
        .map_err(call("start a thread"))?;
    thread.join().map_err(|_| ProcessError::Panicked)
}

/// Bind-mounts a namespace of the calling thread (`net`, `ipc`, `uts`, `mnt`, `cgroup`) on the file `target`, which keeps
/// it alive without a process.
pub fn pin_own_namespace(name: &str, target: &Path) -> Result<(), ProcessError> {
    let failed = |doing, source: io::Error| ProcessError::Path {
        doing,
        path: target.to_owned(),
        source,
    };
    std::fs::File::create(target).map_err(|source| failed("create namespace file", source))?;
    let own = format!("/proc/thread-self/ns/{name}");
    rustix::mount::mount_bind(own.as_str(), target).map_err(|error| failed("pin namespace at", error.into()))
}

/// Brings `lo` up in the calling thread's network namespace.
pub fn loopback_up() -> Result<(), ProcessError> {
    sys::loopback_up().map_err(call("bring lo up"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_times_tell_processes_apart() {
        assert!(start_time(std::process::id()).is_some_and(|ticks| ticks > 0));
        assert_eq!(start_time(u32::MAX), None);
    }

    #[test]
    fn a_scratch_thread_has_its_own_network_and_host_name() {
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        let (net, name) = on_scratch_thread(|| {
            unshare(Namespaces::NEWNET | Namespaces::NEWUTS).unwrap();
            rustix::system::sethostname(b"scratch").unwrap();
            loopback_up().unwrap();
            std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
            (std::fs::read_link("/proc/thread-self/ns/net").unwrap(), name)
        })
        .unwrap();
        assert_ne!(own, net);
        assert_eq!(name.trim(), "scratch");
        assert_eq!(std::fs::read_link("/proc/self/ns/net").unwrap(), own);
    }
}

//! Network namespaces: pinned at a path by a bind mount, opened, entered on a scratch thread, deleted.
//!
//! A thread that entered a foreign namespace is never returned to a pool: [`run_in`] starts one, runs the closure and lets
//! it end, so no other code can meet it. Sockets opened inside keep their namespace wherever they are used later.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::LinkNameSpaceType;
use thiserror::Error;

use crate::netlink;

mod sys;

/// `NSFS_MAGIC` of `linux/magic.h`: the file system that namespace files live on.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// An open network namespace; alive as long as this handle, a pin or a process in it lives.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    /// Where it was opened or pinned; for messages only.
    path: PathBuf,
}

#[derive(Debug, Error)]
pub enum Error {
    #[error("cannot open network namespace {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("{path} is not a network namespace")]
    NotANamespace { path: PathBuf },
    #[error("cannot create a network namespace at {path} ({step})")]
    Create {
        path: PathBuf,
        step: &'static str,
        source: io::Error,
    },
    #[error("cannot bring the loopback device up in the network namespace {path}")]
    Loopback { path: PathBuf, source: netlink::Error },
    #[error("cannot enter network namespace {path}")]
    Enter { path: PathBuf, source: io::Error },
    #[error("cannot start a thread for network namespace {path}")]
    Thread { path: PathBuf, source: io::Error },
    #[error("code running in network namespace {path} panicked")]
    Panicked { path: PathBuf },
    #[error("cannot delete network namespace {path}")]
    Delete { path: PathBuf, source: io::Error },
}

impl NetNs {
    /// The calling thread's own namespace.
    pub fn current() -> Result<Self, Error> {
        open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The namespace a socket lives in, without a walk through `/proc`.
    pub fn of_socket(socket: impl AsFd) -> Result<Self, Error> {
        let path = PathBuf::from("(a socket's)");
        match sys::of_socket(socket.as_fd()) {
            Ok(fd) => Ok(Self { file: fd.into(), path }),
            Err(e) => Err(Error::Open { path, source: e.into() }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `f` inside on a scratch thread and returns what it returned.
    pub fn run<T: Send, F: FnOnce() -> T + Send>(&self, f: F) -> Result<T, Error> {
        let path = || self.path.clone();
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, || {
                    enter(self.file.as_fd()).map_err(|source| Error::Enter { path: path(), source })?;
                    Ok(f())
                })
                .map_err(|source| Error::Thread { path: path(), source })?
                .join()
                .map_err(|_| Error::Panicked { path: path() })?
        })
    }

    /// Runs `f` inside on the calling thread, which is in `home` and is back there afterwards, also if `f` panics. Meant for
    /// programs of one thread, where it saves starting another; elsewhere use [`NetNs::run`].
    ///
    /// # Panics
    /// If there is no way back, since nothing that this thread does afterwards would be where it belongs.
    pub fn visit<T>(&self, home: &NetNs, f: impl FnOnce() -> T) -> Result<T, Error> {
        struct Back<'a>(&'a NetNs);
        impl Drop for Back<'_> {
            fn drop(&mut self) {
                enter(self.0.as_fd()).expect("a thread returns to the namespace that it came from");
            }
        }
        enter(self.as_fd()).map_err(|source| Error::Enter {
            path: self.path.clone(),
            source,
        })?;
        let _back = Back(home);
        Ok(f())
    }

    /// Whether both are the same namespace.
    pub fn is_same(&self, other: &NetNs) -> bool {
        match (rustix::fs::fstat(&self.file), rustix::fs::fstat(&other.file)) {
            (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
            _ => false,
        }
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Opens a namespace file (a pin, or `/proc/PID/ns/net`).
pub fn open(path: &Path) -> Result<NetNs, Error> {
    let file = File::open(path).map_err(|source| Error::Open {
        path: path.to_owned(),
        source,
    })?;
    let fs = rustix::fs::fstatfs(&file).map_err(|e| Error::Open {
        path: path.to_owned(),
        source: e.into(),
    })?;
    // f_type's width differs between architectures.
    if fs.f_type as i64 != NSFS_MAGIC {
        return Err(Error::NotANamespace { path: path.to_owned() });
    }
    Ok(NetNs {
        file,
        path: path.to_owned(),
    })
}

/// Creates a namespace pinned at `path`, its loopback device up; opens it if it is there already.
///
/// The loopback device is brought up at once because a namespace that never had an address has no local routing table,
/// and forwarding then fails without a word.
///
/// # Assumptions
/// One creator per path at a time.
pub fn create_named(path: &Path) -> Result<NetNs, Error> {
    match open(path) {
        Ok(ns) => {
            loopback_up(&ns)?;
            return Ok(ns);
        }
        Err(Error::NotANamespace { .. }) => {} // A file left by a creator that died before the bind mount.
        Err(Error::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let fail = |step| {
        move |source: io::Error| Error::Create {
            path: path.to_owned(),
            step,
            source,
        }
    };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(fail("make its directory"))?;
    }
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .map_err(fail("make the file to mount on"))?;
    let made = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, || {
                sys::unshare_network().map_err(|e| fail("unshare")(e.into()))?;
                rustix::mount::mount_bind("/proc/thread-self/ns/net", path).map_err(|e| fail("pin it")(e.into()))?;
                open(path)
            });
        match thread
            .map_err(|source| Error::Thread {
                path: path.to_owned(),
                source,
            })?
            .join()
        {
            Ok(result) => result,
            Err(_) => Err(Error::Panicked { path: path.to_owned() }),
        }
    });
    match made {
        Ok(ns) => {
            loopback_up(&ns)?;
            Ok(ns)
        }
        Err(e) => {
            let _ = std::fs::remove_file(path);
            Err(e)
        }
    }
}

fn loopback_up(ns: &NetNs) -> Result<(), Error> {
    let path = || ns.path.clone();
    ns.run(|| {
        let mut route = netlink::Route::open()?;
        let lo = route
            .link("lo")?
            .ok_or(netlink::Error::NoLink { name: "lo".to_owned() })?;
        if lo.up {
            Ok(())
        } else {
            route.run(netlink::Request::set_up(lo.index, true))
        }
    })?
    .map_err(|source| Error::Loopback { path: path(), source })
}

/// Runs `f` inside the namespace pinned at `path`, on a scratch thread.
pub fn run_in<T: Send, F: FnOnce() -> T + Send>(path: &Path, f: F) -> Result<T, Error> {
    open(path)?.run(f)
}

/// Removes a pin; success if there is none. The namespace itself ends with its last user.
pub fn delete(path: &Path) -> Result<(), Error> {
    let fail = |source: io::Error| Error::Delete {
        path: path.to_owned(),
        source,
    };
    // More than one bind mount can be stacked if two creators raced.
    loop {
        match rustix::mount::unmount(path, UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(rustix::io::Errno::INVAL) => break,
            Err(e) => return Err(fail(e.into())),
        }
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(fail(e)),
        _ => Ok(()),
    }
}

/// Gives the **calling thread**, and threads it starts later, fresh network and mount namespaces; mounts do not
/// propagate out, loopback is up, and each directory of `private_dirs` becomes an empty tmpfs.
///
/// For tests and for a process's first thread: it makes the thread a host of its own.
pub fn become_private_host(private_dirs: &[&Path]) -> Result<(), Error> {
    let here = PathBuf::from("/proc/thread-self/ns/net");
    let fail = |step| {
        let path = here.clone();
        move |e: rustix::io::Errno| Error::Create {
            path,
            step,
            source: e.into(),
        }
    };
    sys::unshare_network_and_mounts().map_err(fail("unshare"))?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(fail("make mounts private"))?;
    for dir in private_dirs {
        rustix::mount::mount("tmpfs", *dir, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, None)
            .map_err(fail("mount a private tmpfs"))?;
    }
    // A fresh sysfs shows the links of this namespace; without it tools read the old one's.
    let _ = rustix::mount::mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None);
    loopback_up(&NetNs::current()?)
}

fn enter(fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(
        fd,
        Some(LinkNameSpaceType::Network),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links() -> Vec<String> {
        netlink::Route::open()
            .unwrap()
            .links()
            .unwrap()
            .into_iter()
            .map(|l| l.name)
            .collect()
    }

    #[test]
    fn a_pinned_namespace_is_entered_and_deleted() {
        std::thread::spawn(|| {
            become_private_host(&[Path::new("/run")]).unwrap();
            let path = Path::new("/run/t/netns/a");
            let ns = create_named(path).unwrap();
            let again = create_named(path).unwrap();
            assert!(ns.is_same(&again) && !ns.is_same(&NetNs::current().unwrap()));
            assert_eq!(run_in(path, links).unwrap(), ["lo"]);
            assert!(matches!(
                ns.run(|| panic!("inside")),
                Err::<(), _>(Error::Panicked { .. })
            ));
            delete(path).unwrap();
            assert!(!path.exists());
            delete(path).unwrap();
            std::fs::write("/run/file", "").unwrap();
            assert!(matches!(open(Path::new("/run/file")), Err(Error::NotANamespace { .. })));
        })
        .join()
        .unwrap();
    }
}

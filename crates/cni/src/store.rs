//! The state file: JSON on tmpfs, replaced atomically under a lock that the kernel releases when a process dies.
//!
//! The lock is held for one read-modify-write in memory speed, never across HTTP, links or other programs. The file
//! names the boot and the network namespace it belongs to: one of a former life is dropped, a broken one is kept aside as
//! `ipam.json.broken`, and in both cases the reservations are rebuilt from what the kernel has.

use std::{
    fs::File,
    io,
    ops::{Deref, DerefMut},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{pool::State, steps, sys};

const FILE: &str = "ipam.json";
const FORMAT: u32 = 1;
/// 256 addresses of a NIC need about 60 KB.
const FILE_BYTES_MAX: u64 = 16 << 20;
const LOCK_WAIT_MS_MAX: u64 = 10_000;

#[derive(Debug, Error)]
pub enum StoreError {
    #[error("{doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the lock {path} was not free within {LOCK_WAIT_MS_MAX} ms")]
    Locked { path: PathBuf },
    #[error("encoding the state")]
    Encode {
        #[source]
        source: serde_json::Error,
    },
    #[error("rebuilding reservations from the kernel")]
    Recover {
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What ties a state to one life of one network namespace.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct Life {
    pub boot_id: String,
    /// `SO_NETNS_COOKIE`: unique within a boot; 0 where the kernel has none.
    pub netns_cookie: u64,
}

impl Life {
    pub fn current() -> Self {
        let mut boot_id = [0; 64];
        let length = File::open("/proc/sys/kernel/random/boot_id")
            .and_then(|mut f| io::Read::read(&mut f, &mut boot_id))
            .unwrap_or(0);
        Self {
            boot_id: String::from_utf8_lossy(&boot_id[..length]).trim().to_owned(),
            netns_cookie: sys::netns_cookie().unwrap_or(0),
        }
    }
}

#[derive(Deserialize, Serialize)]
struct Document {
    format: u32,
    life: Life,
    state: State,
}

/// Milliseconds since boot, suspend included.
pub fn boot_clock_ms() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    (t.tv_sec as u64).saturating_mul(1000) + (t.tv_nsec as u64) / 1_000_000
}

/// The state, and whether somebody wanted to change it.
pub struct Tracked {
    state: State,
    dirty: bool,
}

impl Deref for Tracked {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Tracked {
    fn deref_mut(&mut self) -> &mut State {
        self.dirty = true;
        &mut self.state
    }
}

/// Access to one state directory.
pub struct Store<'a> {
    dir: &'a Path,
    life: Life,
    /// Asked when there is no usable state: what the kernel still knows.
    recover: &'a dyn Fn() -> Result<State, Box<dyn std::error::Error + Send + Sync>>,
    warn: &'a dyn Fn(&str),
}

impl<'a> Store<'a> {
    pub fn open(
        dir: &'a Path,
        recover: &'a dyn Fn() -> Result<State, Box<dyn std::error::Error + Send + Sync>>,
        warn: &'a dyn Fn(&str),
    ) -> Self {
        Self {
            dir,
            life: Life::current(),
            recover,
            warn,
        }
    }

    /// Runs `f` on the state under the lock; writes it back if `f` borrowed it for changing.
    pub fn with<T>(&self, f: impl FnOnce(&mut Tracked) -> T) -> Result<T, StoreError> {
        let _lock = self.lock()?;
        let (state, dirty) = self.load()?;
        let mut tracked = Tracked { state, dirty };
        let out = f(&mut tracked);
        if tracked.dirty {
            self.save(tracked.state)?;
        }
        Ok(out)
    }

    fn fail(&self, doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
        let path = path.to_owned();
        move |source| StoreError::Io { doing, path, source }
    }

    /// The lock is the open file's: it ends with the process, however that dies.
    fn lock(&self) -> Result<File, StoreError> {
        let path = self.dir.join("lock");
        let open = || File::options().create(true).append(true).open(&path);
        let file = match open() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                std::fs::create_dir_all(self.dir).map_err(self.fail("making directory", self.dir))?;
                open()
            }
            other => other,
        }
        .map_err(self.fail("opening lock", &path))?;
        let end = Instant::now() + Duration::from_millis(LOCK_WAIT_MS_MAX);
        let mut pause = Duration::from_micros(20);
        loop {
            match rustix::fs::flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
                Err(e) => return Err(self.fail("locking", &path)(e.into())),
            }
            if Instant::now() >= end {
                return Err(StoreError::Locked { path });
            }
            // The lock is held for a fraction of a millisecond.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
    }

    /// The state, and whether it must be written even if nothing changes.
    fn load(&self) -> Result<(State, bool), StoreError> {
        let path = self.dir.join(FILE);
        let raw = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return self.rebuilt(),
            Err(e) => return Err(self.fail("opening state", &path)(e)),
            Ok(file) => {
                let size = file.metadata().map_or(0, |m| m.len()).min(FILE_BYTES_MAX);
                // One byte more, so that the end is seen without growing.
                let mut raw = Vec::with_capacity(size as usize + 1);
                io::Read::read_to_end(&mut io::Read::take(file, FILE_BYTES_MAX), &mut raw)
                    .map_err(self.fail("reading state", &path))?;
                raw
            }
        };
        match serde_json::from_slice::<Document>(&raw) {
            Ok(doc) if doc.format == FORMAT && doc.life == self.life => Ok((doc.state, false)),
            // Every reservation of a former life is free: its pods are gone with it.
            Ok(doc) if doc.format == FORMAT => self.rebuilt(),
            bad => {
                let aside = self.dir.join(format!("{FILE}.broken"));
                let why = bad
                    .err()
                    .map_or_else(|| "its format is unknown".to_owned(), |e| e.to_string());
                (self.warn)(&format!(
                    "state {} is unusable ({why}); kept as {}",
                    path.display(),
                    aside.display()
                ));
                std::fs::rename(&path, &aside).map_err(self.fail("putting aside state", &path))?;
                self.rebuilt()
            }
        }
    }

    fn rebuilt(&self) -> Result<(State, bool), StoreError> {
        let state = (self.recover)().map_err(|source| StoreError::Recover { source })?;
        Ok((state, true))
    }

    fn save(&self, state: State) -> Result<(), StoreError> {
        let doc = Document {
            format: FORMAT,
            life: self.life.clone(),
            state,
        };
        let raw = serde_json::to_vec(&doc).map_err(|source| StoreError::Encode { source })?;
        // One name is enough: whoever writes holds the lock, and a leftover of a dead writer is overwritten.
        let temporary = self.dir.join(format!("{FILE}.new"));
        std::fs::write(&temporary, raw).map_err(self.fail("writing state", &temporary))?;
        steps::reached("state-written");
        let path = self.dir.join(FILE);
        std::fs::rename(&temporary, &path).map_err(self.fail("replacing state", &path))
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, net::IpAddr};

    use super::*;
    use crate::pool::Pool;

    #[test]
    fn state_survives_and_broken_state_is_put_aside_and_rebuilt() {
        let dir = tempfile::tempdir().unwrap();
        let said = RefCell::new(Vec::new());
        let recovered: IpAddr = "10.0.0.9".parse().unwrap();
        let recover = || {
            let mut s = State::default();
            s.released_ms.insert(recovered, 1);
            Ok(s)
        };
        let warn = |m: &str| said.borrow_mut().push(m.to_owned());
        let store = Store::open(dir.path(), &recover, &warn);
        store
            .with(|s| {
                s.pool = Some(Pool {
                    source: "x".into(),
                    ..Default::default()
                })
            })
            .unwrap();
        assert_eq!(store.with(|s| s.pool.clone().unwrap().source).unwrap(), "x");

        let path = dir.path().join(FILE);
        for garbage in [
            b"".as_slice(),
            b"\0\0\0\0",
            b"{\"format\":1",
            b"{\"format\":9,\"life\":1}",
        ] {
            std::fs::write(&path, garbage).unwrap();
            let s = store.with(|s| s.clone()).unwrap();
            assert!(s.pool.is_none() && s.released_ms.contains_key(&recovered));
            assert_eq!(std::fs::read(dir.path().join("ipam.json.broken")).unwrap(), garbage);
        }
        assert_eq!(said.borrow().len(), 4);

        let mut other = Store::open(dir.path(), &recover, &warn);
        other.life.boot_id = "another".into();
        store.with(|s| s.pool = Some(Pool::default())).unwrap();
        assert!(
            other.with(|s| s.pool.clone()).unwrap().is_none(),
            "a former life's state is dropped"
        );
        assert_eq!(said.borrow().len(), 4, "and that is no reason to warn");
    }

    #[test]
    fn writers_exclude_each_other() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let store = Store::open(dir.path(), &|| Ok(State::default()), &|_| {});
                    for _ in 0..20 {
                        store
                            .with(|s| *s.released_ms.entry("10.0.0.1".parse().unwrap()).or_default() += 1)
                            .unwrap();
                    }
                });
            }
        });
        let store = Store::open(dir.path(), &|| Ok(State::default()), &|_| {});
        assert_eq!(store.with(|s| s.released_ms.values().sum::<u64>()).unwrap(), 160);
    }
}

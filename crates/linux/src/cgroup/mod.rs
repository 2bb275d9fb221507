//! Control groups of version 1 and 2 behind one type, created below the caller's own groups.
//!
//! [`Hierarchy::detect`] reads which controllers exist where; [`Group`] is a relative path in it. On a hybrid host whose
//! unified hierarchy lacks `cpu`, `memory` or `pids`, version 1 is used. Nothing outside the caller's own groups is touched.

mod detect;
mod v1;
mod v2;

use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

pub use detect::Hierarchy;

/// Which interface a [`Hierarchy`] speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V1,
    V2,
}

/// Limits of one group. `None` leaves the kernel's default (no limit).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// CFS quota in thousandths of a core.
    pub cpu_milli: Option<u64>,
    /// Relative weight, from a request in thousandths of a core (1000 = 1024 version 1 shares).
    pub cpu_weight_milli: Option<u64>,
    pub memory_bytes: Option<u64>,
    pub pids: Option<u64>,
}

/// A reading of one group, its descendants included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu_ns: u64,
    pub memory_bytes: u64,
    /// Usage without inactive page cache: what eviction looks at.
    pub memory_working_set_bytes: u64,
    pub pids: u64,
}

#[derive(Debug, Error)]
pub enum CgroupError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("write {value:?} to {path}")]
    Write {
        path: PathBuf,
        value: String,
        #[source]
        source: io::Error,
    },
    #[error("create control group {path}")]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("remove control group {path}")]
    Remove {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("no control group hierarchy with cpu, memory and pids is mounted")]
    NoHierarchy,
    #[error("control group path {path:?} is not a plain relative path")]
    BadPath { path: PathBuf },
}

/// One group: a path relative to the caller's own groups, the same in every version 1 hierarchy.
#[derive(Clone, Debug)]
pub struct Group {
    hierarchy: Hierarchy,
    path: PathBuf,
}

impl Group {
    pub(crate) fn new(hierarchy: Hierarchy, path: &Path) -> Result<Self, CgroupError> {
        let plain = path
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_)));
        if !plain || path.as_os_str().is_empty() {
            return Err(CgroupError::BadPath { path: path.to_owned() });
        }
        Ok(Self {
            hierarchy,
            path: path.to_owned(),
        })
    }

    /// Path below the caller's own groups.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A group below this one; it is not created.
    pub fn child(&self, name: &str) -> Result<Group, CgroupError> {
        Group::new(self.hierarchy.clone(), &self.path.join(name))
    }

    /// Names of the groups directly below, in no order; empty if the group is gone.
    pub fn children(&self) -> Vec<String> {
        let Some(dir) = self.hierarchy.kill_directory(&self.path) else {
            return Vec::new();
        };
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        dirs.map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }

    /// All directories of this group: one for version 2, one per controller for version 1.
    pub fn directories(&self) -> Vec<PathBuf> {
        self.hierarchy.directories(&self.path)
    }

    /// Makes the group and its parents; `cpuset.cpus` and `cpuset.mems` are filled from the parent on version 1. Idempotent.
    pub fn create(&self) -> Result<(), CgroupError> {
        match self.hierarchy.version() {
            Version::V1 => v1::create(&self.hierarchy, &self.path),
            Version::V2 => v2::create(&self.hierarchy, &self.path),
        }
    }

    pub fn exists(&self) -> bool {
        self.directories().first().is_some_and(|dir| dir.exists())
    }

    pub fn set_limits(&self, limits: &Limits) -> Result<(), CgroupError> {
        match self.hierarchy.version() {
            Version::V1 => v1::set_limits(&self.hierarchy, &self.path, limits),
            Version::V2 => v2::set_limits(&self.hierarchy, &self.path, limits),
        }
    }

    /// Denies every device, then allows those of `rules` (version 1 syntax, `c 1:3 rwm`). Returns whether the kernel
    /// enforces it: version 2 has no such file, and there nothing is done.
    pub fn allow_devices(&self, rules: &[&str]) -> Result<bool, CgroupError> {
        match self.hierarchy.version() {
            Version::V1 => v1::allow_devices(&self.hierarchy, &self.path, rules),
            Version::V2 => Ok(false),
        }
    }

    /// Moves a process (0 = the caller) into the group.
    pub fn add(&self, pid: u32) -> Result<(), CgroupError> {
        for dir in self.directories() {
            write(&dir.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// Processes in the group and below, in no order; empty if the group is gone.
    pub fn processes(&self) -> Result<Vec<u32>, CgroupError> {
        let Some(dir) = self.hierarchy.kill_directory(&self.path) else {
            return Ok(Vec::new());
        };
        let mut found = Vec::new();
        collect_processes(&dir, &mut found)?;
        Ok(found)
    }

    /// Sends SIGKILL to everything in the group and below until nothing is left, at most for `patience`.
    /// Returns whether it is empty; zombies that nobody reaps count as gone.
    pub fn kill_all(&self, patience: std::time::Duration) -> Result<bool, CgroupError> {
        let end = std::time::Instant::now() + patience;
        let mut pause_us = 200;
        loop {
            let pids = self.processes()?;
            if pids.is_empty() {
                return Ok(true);
            }
            if !(self.hierarchy.version() == Version::V2 && v2::kill(&self.hierarchy, &self.path)) {
                for pid in pids {
                    if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
                        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    }
                }
            }
            if std::time::Instant::now() >= end {
                return Ok(self.processes()?.is_empty());
            }
            std::thread::sleep(std::time::Duration::from_micros(pause_us));
            pause_us = (pause_us * 2).min(20_000);
        }
    }

    /// Removes the group and everything below it; succeeds if it is gone. Processes must have been killed.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let mut first = None;
        for dir in self.directories() {
            if let Err(source) = remove_tree(&dir) {
                first.get_or_insert(CgroupError::Remove { path: dir, source });
            }
        }
        first.map_or(Ok(()), Err)
    }

    pub fn usage(&self) -> Result<Usage, CgroupError> {
        match self.hierarchy.version() {
            Version::V1 => v1::usage(&self.hierarchy, &self.path),
            Version::V2 => v2::usage(&self.hierarchy, &self.path),
        }
    }

    /// How many processes of the group the kernel's out-of-memory killer ended so far.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        match self.hierarchy.version() {
            Version::V1 => v1::oom_kills(&self.hierarchy, &self.path),
            Version::V2 => v2::oom_kills(&self.hierarchy, &self.path),
        }
    }
}

/// `cpu.shares` of version 1 for a request in thousandths of a core; the kernel's bounds are 2 and 262144.
pub fn shares(milli: u64) -> u64 {
    (milli * 1024 / 1000).clamp(2, 262_144)
}

/// `cpu.weight` of version 2 (1 to 10000) that orders groups as [`shares`] would.
pub fn weight(milli: u64) -> u64 {
    let shares = shares(milli);
    1 + (shares - 2) * 9999 / 262_142
}

fn read(path: &Path) -> Result<String, CgroupError> {
    std::fs::read_to_string(path).map_err(|source| CgroupError::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_number(path: &Path) -> Result<u64, CgroupError> {
    let text = read(path)?;
    text.trim().parse().map_err(|error| CgroupError::Read {
        path: path.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    })
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    let result = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
    result.map_err(|source| CgroupError::Write {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// The number after `key` in a flat keyed file such as `memory.stat`; 0 if absent.
fn keyed(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
        .unwrap_or(0)
}

fn collect_processes(dir: &Path, found: &mut Vec<u32>) -> Result<(), CgroupError> {
    let text = match std::fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => text,
        Err(error) if gone(&error) => return Ok(()),
        Err(source) => {
            return Err(CgroupError::Read {
                path: dir.join("cgroup.procs"),
                source,
            });
        }
    };
    found.extend(
        text.lines()
            .filter_map(|line| line.parse::<u32>().ok())
            .filter(|pid| *pid != 0),
    );
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_processes(&entry.path(), found)?;
        }
    }
    Ok(())
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    // Most groups have no children: try the cheap call first.
    match std::fs::remove_dir(dir) {
        Ok(()) => return Ok(()),
        Err(error) if gone(&error) => return Ok(()),
        Err(_) => {}
    }
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    // The kernel empties a group slightly after its last process was reaped.
    let mut result = std::fs::remove_dir(dir);
    for _ in 0..50 {
        match &result {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_millis(2));
                result = std::fs::remove_dir(dir);
            }
            _ => break,
        }
    }
    match result {
        Err(error) if gone(&error) => Ok(()),
        other => other,
    }
}

fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

#[cfg(test)]
mod tests;

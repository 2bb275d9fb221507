//! Version 2: one directory, controllers handed down by `cgroup.subtree_control`.

use std::path::{Path, PathBuf};

use super::{CgroupError, Hierarchy, Limits, Usage, detect::LEAF, gone, keyed, read, read_number, weight, write};

const CPU_PERIOD_US: u64 = 100_000;
const WANTED: [&str; 4] = ["cpu", "memory", "pids", "cpuset"];

pub(super) fn create(hierarchy: &Hierarchy, path: &Path) -> Result<(), CgroupError> {
    let Some(own) = hierarchy.own("") else {
        return Err(CgroupError::NoHierarchy);
    };
    let mut dir: PathBuf = own.to_owned();
    let parts: Vec<_> = path.components().collect();
    for (depth, part) in parts.iter().enumerate() {
        hand_down(&dir, depth == 0)?;
        dir.push(part);
        match std::fs::create_dir(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(CgroupError::Create { path: dir, source }),
        }
    }
    Ok(())
}

/// Gives the children of `dir` the wanted controllers. The caller's own group may hold processes, which then move to a leaf.
fn hand_down(dir: &Path, own: bool) -> Result<(), CgroupError> {
    let control = dir.join("cgroup.subtree_control");
    let have = read(&control)?;
    let available = read(&dir.join("cgroup.controllers"))?;
    let missing: Vec<String> = WANTED
        .iter()
        .filter(|want| available.split_whitespace().any(|name| name == **want))
        .filter(|want| !have.split_whitespace().any(|name| name == **want))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let value = missing.join(" ");
    match write(&control, &value) {
        Err(CgroupError::Write { source, .. }) if own && source.raw_os_error() == Some(libc::EBUSY) => {
            let leaf = dir.join(LEAF);
            if let Err(source) = std::fs::create_dir(&leaf)
                && source.kind() != std::io::ErrorKind::AlreadyExists
            {
                return Err(CgroupError::Create { path: leaf, source });
            }
            // New processes may appear while we move them: a few rounds are enough in practice, then the write decides.
            for _ in 0..10 {
                let pids = read(&dir.join("cgroup.procs"))?;
                if pids.trim().is_empty() {
                    break;
                }
                for pid in pids.lines() {
                    // A process that ended meanwhile is no reason to fail.
                    let _ = write(&leaf.join("cgroup.procs"), pid);
                }
            }
            write(&control, &value)
        }
        other => other,
    }
}

pub(super) fn set_limits(hierarchy: &Hierarchy, path: &Path, limits: &Limits) -> Result<(), CgroupError> {
    let Some(dir) = hierarchy.directory("", path) else {
        return Ok(());
    };
    if let Some(milli) = limits.cpu_weight_milli {
        write(&dir.join("cpu.weight"), &weight(milli).to_string())?;
    }
    if let Some(milli) = limits.cpu_milli {
        let quota = (milli * CPU_PERIOD_US / 1000).max(1000);
        write(&dir.join("cpu.max"), &format!("{quota} {CPU_PERIOD_US}"))?;
    }
    if let Some(bytes) = limits.memory_bytes {
        write(&dir.join("memory.max"), &bytes.to_string())?;
    }
    if let Some(pids) = limits.pids {
        write(&dir.join("pids.max"), &pids.to_string())?;
    }
    Ok(())
}

/// Kernels since 5.14 kill a whole subtree with one write; `false` if this one does not.
pub(super) fn kill(hierarchy: &Hierarchy, path: &Path) -> bool {
    hierarchy
        .directory("", path)
        .is_some_and(|dir| write(&dir.join("cgroup.kill"), "1").is_ok())
}

pub(super) fn usage(hierarchy: &Hierarchy, path: &Path) -> Result<Usage, CgroupError> {
    let Some(dir) = hierarchy.directory("", path) else {
        return Ok(Usage::default());
    };
    let memory_bytes = read_number(&dir.join("memory.current"))?;
    let inactive = keyed(&read(&dir.join("memory.stat"))?, "inactive_file");
    Ok(Usage {
        cpu_ns: keyed(&read(&dir.join("cpu.stat"))?, "usage_usec") * 1000,
        memory_bytes,
        memory_working_set_bytes: memory_bytes.saturating_sub(inactive),
        pids: read_number(&dir.join("pids.current"))?,
    })
}

pub(super) fn oom_kills(hierarchy: &Hierarchy, path: &Path) -> Result<u64, CgroupError> {
    let Some(dir) = hierarchy.directory("", path) else {
        return Ok(0);
    };
    match read(&dir.join("memory.events")) {
        Ok(text) => Ok(keyed(&text, "oom_kill")),
        Err(CgroupError::Read { source, .. }) if gone(&source) => Ok(0),
        Err(error) => Err(error),
    }
}

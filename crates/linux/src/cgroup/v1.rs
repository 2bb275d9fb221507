//! Version 1: one directory per controller.

use std::{io, path::Path};

use super::{CgroupError, Hierarchy, Limits, Usage, gone, keyed, read, read_number, shares, write};

const CPU_PERIOD_US: u64 = 100_000;

pub(super) fn create(hierarchy: &Hierarchy, path: &Path) -> Result<(), CgroupError> {
    for dir in hierarchy.directories(path) {
        make(&dir)?;
    }
    if let Some(own) = hierarchy.own("cpuset") {
        fill_cpuset(own, path)?;
    }
    Ok(())
}

fn make(dir: &Path) -> Result<(), CgroupError> {
    match std::fs::create_dir(dir) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(dir).map_err(|source| CgroupError::Create {
                path: dir.to_owned(),
                source,
            })
        }
        Err(source) => Err(CgroupError::Create {
            path: dir.to_owned(),
            source,
        }),
    }
}

/// A new version 1 cpuset is empty and refuses processes: copy the parent's, from the top down.
fn fill_cpuset(own: &Path, path: &Path) -> Result<(), CgroupError> {
    let mut parent = own.to_owned();
    for part in path.components() {
        let dir = parent.join(part);
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if read(&dir.join(file))?.trim().is_empty() {
                write(&dir.join(file), read(&parent.join(file))?.trim())?;
            }
        }
        parent = dir;
    }
    Ok(())
}

pub(super) fn set_limits(hierarchy: &Hierarchy, path: &Path, limits: &Limits) -> Result<(), CgroupError> {
    if let Some(dir) = hierarchy.directory("cpu", path) {
        if let Some(milli) = limits.cpu_weight_milli {
            write(&dir.join("cpu.shares"), &shares(milli).to_string())?;
        }
        if let Some(milli) = limits.cpu_milli {
            write(&dir.join("cpu.cfs_period_us"), &CPU_PERIOD_US.to_string())?;
            // The kernel's smallest quota is one millisecond.
            let quota = (milli * CPU_PERIOD_US / 1000).max(1000);
            write(&dir.join("cpu.cfs_quota_us"), &quota.to_string())?;
        }
    }
    if let (Some(dir), Some(bytes)) = (hierarchy.directory("memory", path), limits.memory_bytes) {
        write(&dir.join("memory.limit_in_bytes"), &bytes.to_string())?;
    }
    if let (Some(dir), Some(pids)) = (hierarchy.directory("pids", path), limits.pids) {
        write(&dir.join("pids.max"), &pids.to_string())?;
    }
    Ok(())
}

pub(super) fn allow_devices(hierarchy: &Hierarchy, path: &Path, rules: &[&str]) -> Result<bool, CgroupError> {
    let Some(dir) = hierarchy.directory("devices", path) else {
        return Ok(false);
    };
    write(&dir.join("devices.deny"), "a")?;
    for rule in rules {
        write(&dir.join("devices.allow"), rule)?;
    }
    Ok(true)
}

pub(super) fn usage(hierarchy: &Hierarchy, path: &Path) -> Result<Usage, CgroupError> {
    let mut usage = Usage::default();
    if let Some(dir) = hierarchy.directory("cpuacct", path) {
        usage.cpu_ns = read_number(&dir.join("cpuacct.usage"))?;
    }
    if let Some(dir) = hierarchy.directory("memory", path) {
        usage.memory_bytes = read_number(&dir.join("memory.usage_in_bytes"))?;
        let inactive = keyed(&read(&dir.join("memory.stat"))?, "total_inactive_file");
        usage.memory_working_set_bytes = usage.memory_bytes.saturating_sub(inactive);
    }
    if let Some(dir) = hierarchy.directory("pids", path) {
        usage.pids = read_number(&dir.join("pids.current"))?;
    }
    Ok(usage)
}

pub(super) fn oom_kills(hierarchy: &Hierarchy, path: &Path) -> Result<u64, CgroupError> {
    let Some(dir) = hierarchy.directory("memory", path) else {
        return Ok(0);
    };
    match read(&dir.join("memory.oom_control")) {
        Ok(text) => Ok(keyed(&text, "oom_kill")),
        Err(CgroupError::Read { source, .. }) if gone(&source) => Ok(0),
        Err(error) => Err(error),
    }
}

//! `oaks down`: works with no server, no data and after kill -9, because everything carries the instance's name.
//! It goes on after an error and reports all of them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, bail};
use machines::namespace::{NamespaceMachines, POWER_OFF_S};

use crate::{paths::Paths, process, up::Steps};

pub fn run(paths: &Paths, purge: bool) -> Result<()> {
    let steps = Steps::default();
    let mut errors: Vec<String> = Vec::new();
    let mut note = |what: &str, result: Result<(), String>| {
        if let Err(e) = result {
            errors.push(format!("{what}: {e}"));
        }
    };

    crate::keeper::forbid(paths);
    for name in [crate::keeper::KEEPER, "server", "host", crate::engine::SUPERVISOR] {
        match process::stop(paths, name, Duration::from_secs(10)) {
            Ok(true) => steps.say(&format!("{name} stopped")),
            Ok(false) => {}
            Err(e) => note(name, Err(format!("{e:#}"))),
        }
    }
    let provider = NamespaceMachines {
        boot_program: PathBuf::new(),
        run_dir: paths.machines_run(),
    };
    let known = provider.known();
    let count = known.len();
    std::thread::scope(|scope| {
        let stops: Vec<_> = known
            .iter()
            .map(|name| {
                (
                    name,
                    scope.spawn(|| provider.stop(name, Duration::from_secs(POWER_OFF_S))),
                )
            })
            .collect();
        for (name, stop) in stops {
            match stop.join() {
                Ok(Ok(())) => {}
                Ok(Err(e)) => note(name, Err(stdx::chain(&e).to_string())),
                Err(_) => note(name, Err("stopping it panicked".to_owned())),
            }
        }
    });
    if count > 0 {
        steps.say(&format!("{count} machines powered off"));
    }
    note("container groups", stop_cgroups(&paths.instance));
    note(
        "network",
        vnet::teardown(&paths.instance, &paths.run).map_err(|all| {
            all.iter()
                .map(|e| stdx::chain(e).to_string())
                .collect::<Vec<_>>()
                .join("; ")
        }),
    );
    note("mounts", unmount_below(&paths.run));
    note("mounts", unmount_below(&paths.data));
    note("run folder", remove(&paths.run));
    if purge {
        note("data folder", remove(&paths.data));
    }
    if errors.is_empty() {
        steps.say(if purge {
            "nothing of the instance is left"
        } else {
            "down; data is kept (oaks down --purge removes it)"
        });
        return Ok(());
    }
    bail!(
        "not everything could be removed:\n  {}\nTry the same command again; if it stays, look at the processes and mounts named above",
        errors.join("\n  ")
    )
}

/// Name of the instance's cgroup below the caller's own.
pub fn cgroup_name(instance: &str) -> String {
    format!("oaks-{instance}")
}

/// Kills whatever is left in cgroups of the instance, wherever below the mounted hierarchies they are, and removes them.
fn stop_cgroups(instance: &str) -> Result<(), String> {
    let mut found = Vec::new();
    find_dirs(Path::new("/sys/fs/cgroup"), &cgroup_name(instance), 8, &mut found);
    let mut left = Vec::new();
    for dir in &found {
        kill_tree(dir);
    }
    for dir in found {
        if !remove_tree(&dir) {
            left.push(dir.display().to_string());
        }
    }
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!("cgroups are still busy: {}", left.join(" ")))
    }
}

fn find_dirs(at: &Path, name: &str, depth: u32, out: &mut Vec<PathBuf>) {
    if depth == 0 {
        return;
    }
    let Ok(entries) = fs::read_dir(at) else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        if entry.file_name() == name {
            out.push(entry.path());
        } else {
            find_dirs(&entry.path(), name, depth - 1, out);
        }
    }
}

fn kill_tree(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        kill_tree(&entry.path());
    }
    let Ok(procs) = fs::read_to_string(dir.join("cgroup.procs")) else {
        return;
    };
    for pid in procs.lines().filter_map(|l| l.parse::<i32>().ok()) {
        process::signal(pid, rustix::process::Signal::KILL);
    }
    for pid in procs.lines().filter_map(|l| l.parse::<i32>().ok()) {
        process::wait_gone(pid, Duration::from_secs(5));
    }
}

fn remove_tree(dir: &Path) -> bool {
    if let Ok(entries) = fs::read_dir(dir) {
        for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
            remove_tree(&entry.path());
        }
    }
    // A killed process leaves its cgroup a moment after its end.
    for _ in 0..100 {
        match fs::remove_dir(dir) {
            Ok(()) => return true,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return true,
            Err(_) => std::thread::park_timeout(Duration::from_millis(10)),
        }
    }
    false
}

/// Unmounts everything at or below `dir`, innermost first.
fn unmount_below(dir: &Path) -> Result<(), String> {
    let table = fs::read_to_string("/proc/self/mountinfo").map_err(|e| e.to_string())?;
    let mut points: Vec<PathBuf> = table
        .lines()
        .filter_map(|l| l.split(' ').nth(4))
        .map(|p| PathBuf::from(p.replace("\\040", " ")))
        .filter(|p| p.starts_with(dir) && p != dir)
        .collect();
    points.reverse();
    let failed: Vec<String> = points
        .iter()
        .filter_map(|p| {
            rustix::mount::unmount(p, rustix::mount::UnmountFlags::DETACH)
                .err()
                .map(|e| format!("{}: {e}", p.display()))
        })
        .collect();
    if failed.is_empty() {
        Ok(())
    } else {
        Err(failed.join(", "))
    }
}

fn remove(dir: &Path) -> Result<(), String> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(format!("{}: {e}", dir.display())),
        _ => Ok(()),
    }
}

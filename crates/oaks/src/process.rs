//! The long-running processes of an instance: started detached, found again by pid and start time, each killable alone.

use std::{
    fs, io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use machines::namespace::start_time;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::paths::Paths;

/// A process of this instance that runs now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Survivor {
    pub pid: i32,
}

/// Finds the process written down in its pid file, unless the pid belongs to another process by now.
pub fn find(paths: &Paths, name: &str) -> Option<Survivor> {
    let text = fs::read_to_string(paths.pid_file(name)).ok()?;
    let (pid, started) = text.trim().split_once(' ')?;
    let pid: i32 = pid.parse().ok()?;
    if start_time(pid)? != started.parse::<u64>().ok()? {
        return None;
    }
    if is_zombie(pid) {
        // Its first thread has ended; until the last one has, its ports and locks are taken.
        wait_gone(pid, LAST_THREADS);
        return None;
    }
    Some(Survivor { pid })
}

/// How long a killed process may take to end wholly.
const LAST_THREADS: Duration = Duration::from_secs(5);

/// A killed process that nobody has reaped yet does not run.
fn is_zombie(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The command name may hold spaces and parentheses: the state follows the last one.
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
}

/// Starts `oaks <args>` in a session of its own, output appended to its log.
pub fn start(paths: &Paths, name: &str, args: &[String]) -> Result<Survivor> {
    let program = std::env::current_exe().context("finding this program")?;
    start_program(paths, name, &program, args)
}

/// As [`start`], for another program of ours.
pub fn start_program(paths: &Paths, name: &str, program: &Path, args: &[String]) -> Result<Survivor> {
    let log = paths.log(name);
    fs::create_dir_all(log.parent().unwrap_or(Path::new("/")))?;
    fs::create_dir_all(&paths.run).with_context(|| format!("creating {}", paths.run.display()))?;
    let out = fs::File::options()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("opening {}", log.display()))?;
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out);
    // A group of its own: the terminal's interrupt is for the foreground command only.
    command.process_group(0);
    let child = command.spawn().with_context(|| format!("starting oaks {name}"))?;
    let pid = child.id() as i32;
    let started = start_time(pid).with_context(|| format!("oaks {name} ended at once; see {}", log.display()))?;
    fs::write(paths.pid_file(name), format!("{pid} {started}\n"))?;
    Ok(Survivor { pid })
}

/// The last lines of a process's log, for error messages.
pub fn log_tail(paths: &Paths, name: &str, lines: usize) -> String {
    let text = fs::read_to_string(paths.log(name)).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// SIGTERM, then SIGKILL after `grace`; forgets the pid file. Succeeds if nothing runs.
pub fn stop(paths: &Paths, name: &str, grace: Duration) -> Result<bool> {
    let found = find(paths, name);
    if let Some(survivor) = found {
        signal(survivor.pid, Signal::TERM);
        if !wait_gone(survivor.pid, grace) {
            signal(survivor.pid, Signal::KILL);
            if !wait_gone(survivor.pid, Duration::from_secs(10)) {
                bail!("oaks {name} (pid {}) survived SIGKILL for 10 s", survivor.pid);
            }
        }
    }
    match fs::remove_file(paths.pid_file(name)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).context("removing the pid file"),
        _ => Ok(found.is_some()),
    }
}

pub fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Waits until one of the processes has ended, at most `timeout`; those of ours are reaped.
pub fn wait_any_gone(pids: &[i32], timeout: Duration) {
    let raw: Vec<Pid> = pids.iter().filter_map(|p| Pid::from_raw(*p)).collect();
    let open: Vec<_> = raw
        .iter()
        .filter_map(|p| rustix::process::pidfd_open(*p, PidfdFlags::empty()).ok())
        .collect();
    if open.len() == pids.len() {
        let mut fds: Vec<_> = open
            .iter()
            .map(|fd| rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN))
            .collect();
        let ts = rustix::event::Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        let _ = rustix::event::poll(&mut fds, Some(&ts));
    }
    for pid in raw {
        let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
    }
}

/// Waits until the process has ended (a zombie of ours counts as ended and is reaped).
pub fn wait_gone(pid: i32, timeout: Duration) -> bool {
    let Some(raw) = Pid::from_raw(pid) else { return true };
    let end = Instant::now() + timeout;
    loop {
        let _ = rustix::process::waitpid(Some(raw), rustix::process::WaitOptions::NOHANG);
        let Ok(fd) = rustix::process::pidfd_open(raw, PidfdFlags::empty()) else {
            return true;
        };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let ts = rustix::event::Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        if matches!(rustix::event::poll(&mut fds, Some(&ts)), Ok(n) if n > 0) {
            let _ = rustix::process::waitpid(Some(raw), rustix::process::WaitOptions::NOHANG);
            return true;
        }
    }
}

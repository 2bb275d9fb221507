//! `oaks keeper`: starts `oaks server` and `oaks host` again when they end without being asked to.
//!
//! It is one thread and no runtime: it sleeps on the pidfds of both. The host agent starts it again when it dies itself
//! ([`watch`]), so only killing both at once needs `oaks up`. Whoever starts a process holds the lock in the run folder, so
//! that `up` and the keeper never start the same one twice; `down` leaves a mark there first, so that nobody starts anything
//! while it stops them.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::fs::FlockOperation;
use stdx::Shutdown;

use crate::{cli::Settings, hosts::processes, paths::Paths, process, up};

/// Its name among the instance's processes.
pub const KEEPER: &str = "keeper";

/// Wait before the next start of a process that ended soon after the last one; doubled up to the maximum.
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A process that ran this long did not end soon.
const SOON: Duration = Duration::from_secs(30);
/// How often files are looked at besides waiting for ends.
const LOOK: Duration = Duration::from_secs(1);

fn mark(paths: &Paths) -> PathBuf {
    paths.run.join("stopping")
}

/// From now on nobody starts what ends, until [`allow`].
pub fn forbid(paths: &Paths) {
    // Without a run folder nothing runs that could start anything.
    let _ = fs::write(mark(paths), "");
}

pub fn allow(paths: &Paths) {
    let _ = fs::remove_file(mark(paths));
}

/// The right to start processes of the instance, until it is dropped.
pub struct StartLock(#[expect(dead_code, reason = "the lock lives as long as the file is open")] fs::File);

impl StartLock {
    /// Waits for whoever has it.
    pub fn take(paths: &Paths) -> Result<Self> {
        let path = paths.run.join("start.lock");
        let file = fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("waiting for {}", path.display()))?;
        Ok(Self(file))
    }
}

/// Keeps until it is killed.
pub fn run(settings: &Settings) -> Result<()> {
    let paths = &settings.paths;
    // In the order of starting: the host agent needs the server to start.
    let kept = processes(paths);
    let mut patience: Vec<Patience> = kept.iter().map(|_| Patience::default()).collect();
    loop {
        let alive: Vec<i32> = kept.iter().filter_map(|n| Some(process::find(paths, n)?.pid)).collect();
        if alive.len() == kept.len() {
            process::wait_any_gone(&alive, Duration::from_secs(60));
            continue;
        }
        if mark(paths).exists() {
            std::thread::park_timeout(LOOK);
            continue;
        }
        let mut wait = LOOK;
        for (name, patience) in kept.iter().zip(&mut patience) {
            match patience.left() {
                Some(left) => wait = wait.min(left),
                None => start_again(settings, name, patience),
            }
            if process::find(paths, name).is_none() {
                // What comes later needs this one.
                break;
            }
        }
        if kept.iter().any(|n| process::find(paths, n).is_none()) {
            std::thread::park_timeout(wait);
        }
    }
}

/// How long one process is not to be started.
#[derive(Default)]
struct Patience {
    wait: Duration,
    last: Option<Instant>,
}

impl Patience {
    fn left(&self) -> Option<Duration> {
        let since = self.last?.elapsed();
        self.wait.checked_sub(since).filter(|l| !l.is_zero())
    }

    fn started(&mut self) {
        let soon = self.last.is_some_and(|l| l.elapsed() < SOON + self.wait);
        self.wait = if soon {
            (self.wait * 2).min(BACKOFF_MAX)
        } else {
            BACKOFF_FIRST
        };
        self.last = Some(Instant::now());
    }
}

fn start_again(settings: &Settings, name: &str, patience: &mut Patience) {
    let paths = &settings.paths;
    let started = StartLock::take(paths).and_then(|_lock| {
        if process::find(paths, name).is_some() || mark(paths).exists() {
            return Ok(false);
        }
        patience.started();
        eprintln!(
            "oaks {name} has ended; starting it again (its log: {})",
            paths.log(name).display()
        );
        up::launch(settings, name).map(|()| true)
    });
    match started {
        Ok(true) => eprintln!("oaks {name} is ready again"),
        Ok(false) => {}
        Err(e) => eprintln!(
            "oaks {name} does not start: {e:#}; next try in {} s",
            patience.wait.as_secs_f32()
        ),
    }
}

/// Starts the keeper, or one with these settings instead of another one's. The caller holds the lock.
pub fn start(settings: &Settings) -> Result<()> {
    process::stop(&settings.paths, KEEPER, Duration::from_secs(5))?;
    process::start(&settings.paths, KEEPER, &settings.as_args(KEEPER)).map(drop)
}

/// Starts the keeper again when it has died, on a thread of its own until `shutdown`. An instance without one (a host agent
/// run by hand) gets none.
pub fn watch(settings: Settings, shutdown: Shutdown) {
    let watch = move || {
        let paths = &settings.paths;
        while !shutdown.is_triggered() {
            match process::find(paths, KEEPER) {
                Some(alive) => {
                    process::wait_gone(alive.pid, LOOK);
                }
                None if paths.pid_file(KEEPER).exists() && !mark(paths).exists() => {
                    let started = StartLock::take(paths).and_then(|_lock| {
                        if process::find(paths, KEEPER).is_some() || mark(paths).exists() || shutdown.is_triggered() {
                            return Ok(());
                        }
                        tracing::warn!("the keeper has ended; starting it again");
                        start(&settings)
                    });
                    if let Err(e) = started {
                        tracing::error!(reason = %format!("{e:#}"), "the keeper does not start");
                    }
                    std::thread::park_timeout(LOOK);
                }
                None => std::thread::park_timeout(LOOK),
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name(KEEPER.to_owned()).spawn(watch) {
        tracing::error!(%error, "nobody watches the keeper");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ends_at_once_is_started_ever_more_seldom() {
        let mut p = Patience::default();
        assert_eq!(p.left(), None);
        p.started();
        assert!(p.left().is_some_and(|l| l <= BACKOFF_FIRST));
        for _ in 0..20 {
            p.started();
        }
        assert_eq!(p.wait, BACKOFF_MAX);
    }
}

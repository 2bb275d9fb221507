//! Waiting for a predicate, bounded. A last resort: prefer an event.

use std::time::{Duration, Instant};

/// Polls every 20 ms until `f` gives a value; fails after `timeout_s` with `what` and the last reason.
pub fn eventually<T, E: std::fmt::Display>(
    what: &str,
    timeout_s: u64,
    f: impl FnMut() -> Result<T, E>,
) -> anyhow::Result<T> {
    eventually_every(what, timeout_s, Duration::from_millis(20), f)
}

/// As [`eventually`], with another interval (for predicates that start programs).
pub fn eventually_every<T, E: std::fmt::Display>(
    what: &str,
    timeout_s: u64,
    every: Duration,
    mut f: impl FnMut() -> Result<T, E>,
) -> anyhow::Result<T> {
    let end = Instant::now() + Duration::from_secs(timeout_s);
    loop {
        match f() {
            Ok(value) => return Ok(value),
            Err(reason) if Instant::now() > end => anyhow::bail!("{what}: not within {timeout_s} s: {reason}"),
            Err(_) => std::thread::park_timeout(every),
        }
    }
}

//! Wall and monotonic time behind a trait.
//!
//! Only *reading* time goes through [`Clock`]; waiting is `tokio::time`, which tests pause. [`RuntimeClock`] joins the
//! two: its wall time advances with the runtime's clock, so a paused test sees consistent timestamps.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

/// A clock shared by many owners.
pub type SharedClock = Arc<dyn Clock>;

/// Reads wall-clock and monotonic time.
pub trait Clock: Send + Sync + Debug {
    /// Wall-clock time. May jump.
    fn now(&self) -> SystemTime;
    /// Time since an arbitrary origin fixed at the clock's creation; never goes back.
    fn monotonic(&self) -> Duration;
}

/// The machine's clock.
#[derive(Debug, Clone)]
pub struct RealClock {
    origin: Instant,
}

impl RealClock {
    /// A clock whose monotonic origin is now.
    pub fn new() -> Self {
        Self { origin: Instant::now() }
    }

    /// The same, shared.
    pub fn shared() -> SharedClock {
        Arc::new(Self::new())
    }
}

impl Default for RealClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for RealClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn monotonic(&self) -> Duration {
        self.origin.elapsed()
    }
}

/// A clock that moves only when told to.
#[derive(Debug)]
pub struct ManualClock {
    state: Mutex<(SystemTime, Duration)>,
}

impl ManualClock {
    /// Starts at `now`.
    pub fn new(now: SystemTime) -> Self {
        Self {
            state: Mutex::new((now, Duration::ZERO)),
        }
    }

    /// Starts at `seconds` after the Unix epoch.
    pub fn at_unix(seconds: u64) -> Self {
        Self::new(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
    }

    /// Moves wall and monotonic time forward.
    pub fn advance(&self, by: Duration) {
        let mut state = self.state.lock();
        state.0 += by;
        state.1 += by;
    }

    /// Sets the wall clock only, as an administrator or NTP would.
    pub fn set_wall(&self, now: SystemTime) {
        self.state.lock().0 = now;
    }
}

impl Clock for ManualClock {
    fn now(&self) -> SystemTime {
        self.state.lock().0
    }

    fn monotonic(&self) -> Duration {
        self.state.lock().1
    }
}

/// Wall time that advances with the tokio runtime's clock, paused or not. Create it inside the runtime.
#[derive(Debug, Clone)]
pub struct RuntimeClock {
    origin: tokio::time::Instant,
    wall: SystemTime,
}

impl RuntimeClock {
    /// Starts at `wall`.
    pub fn new(wall: SystemTime) -> Self {
        Self {
            origin: tokio::time::Instant::now(),
            wall,
        }
    }
}

impl Clock for RuntimeClock {
    fn now(&self) -> SystemTime {
        self.wall + self.monotonic()
    }

    fn monotonic(&self) -> Duration {
        tokio::time::Instant::now().duration_since(self.origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manual_clock_moves_only_when_told() {
        let clock = ManualClock::at_unix(100);
        assert_eq!(clock.now(), SystemTime::UNIX_EPOCH + Duration::from_secs(100));
        clock.advance(Duration::from_secs(5));
        clock.set_wall(SystemTime::UNIX_EPOCH);
        assert_eq!(clock.monotonic(), Duration::from_secs(5));
        assert_eq!(clock.now(), SystemTime::UNIX_EPOCH);
    }

    #[tokio::test(start_paused = true)]
    async fn runtime_clock_follows_paused_time() {
        let clock = RuntimeClock::new(SystemTime::UNIX_EPOCH);
        tokio::time::advance(Duration::from_secs(40)).await;
        assert_eq!(clock.now(), SystemTime::UNIX_EPOCH + Duration::from_secs(40));
    }
}

//! Capped exponential backoff with jitter.

use std::time::Duration;

use crate::Rng;

/// How delays grow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BackoffPolicy {
    /// First delay.
    pub initial: Duration,
    /// Longest delay before jitter.
    pub max: Duration,
    /// Growth per step, at least 1.
    pub factor: f64,
    /// Share of the delay that is random, 0 to 1: the delay is scaled by `1 - jitter ..= 1`.
    pub jitter: f64,
}

impl BackoffPolicy {
    /// Doubles from `initial` up to `max`, with a fifth of jitter.
    pub const fn doubling(initial: Duration, max: Duration) -> Self {
        Self {
            initial,
            max,
            factor: 2.0,
            jitter: 0.2,
        }
    }

    /// The delay before attempt `failures` (0 = first retry), jittered.
    pub fn delay(&self, failures: u32, rng: &mut Rng) -> Duration {
        let raw = self.initial.as_secs_f64() * self.factor.max(1.0).powi(failures.min(64) as i32);
        let capped = raw.min(self.max.as_secs_f64());
        Duration::from_secs_f64(capped * (1.0 - self.jitter.clamp(0.0, 1.0) * rng.fraction()))
    }
}

/// One sequence of growing delays.
#[derive(Debug, Clone)]
pub struct Backoff {
    policy: BackoffPolicy,
    failures: u32,
}

impl Backoff {
    /// A sequence at its beginning.
    pub fn new(policy: BackoffPolicy) -> Self {
        Self { policy, failures: 0 }
    }

    /// The next delay; each call counts as one more failure.
    pub fn next(&mut self, rng: &mut Rng) -> Duration {
        let delay = self.policy.delay(self.failures, rng);
        self.failures = self.failures.saturating_add(1);
        delay
    }

    /// Starts over after a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures since the last reset.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_the_cap_and_starts_over() {
        let policy = BackoffPolicy {
            jitter: 0.0,
            ..BackoffPolicy::doubling(Duration::from_millis(5), Duration::from_secs(1))
        };
        let mut backoff = Backoff::new(policy);
        let mut rng = Rng::seeded(1);
        let delays: Vec<u128> = (0..10).map(|_| backoff.next(&mut rng).as_millis()).collect();
        assert_eq!(delays, [5, 10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.next(&mut rng), Duration::from_millis(5));
    }

    #[test]
    fn jitter_only_shortens() {
        let policy = BackoffPolicy::doubling(Duration::from_secs(1), Duration::from_secs(1));
        let mut rng = Rng::seeded(3);
        for n in 0..100 {
            let delay = policy.delay(n, &mut rng);
            assert!(delay <= Duration::from_secs(1) && delay >= Duration::from_millis(800));
        }
    }
}

//! The clock behind timestamps: the system's, or one that follows tokio's (which tests pause and advance).

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use tokio::time::Instant;

#[derive(Clone, Copy, Debug, Default)]
pub enum Clock {
    #[default]
    System,
    /// `base` plus what tokio's clock has moved since `at`.
    Tokio { base: Timestamp, at: Instant },
}

impl Clock {
    /// A clock that starts now and follows tokio's.
    pub fn tokio() -> Self {
        Self::Tokio {
            base: Timestamp::now(),
            at: Instant::now(),
        }
    }

    pub fn now(&self) -> Timestamp {
        match self {
            Self::System => Timestamp::now(),
            Self::Tokio { base, at } => {
                let moved = i64::try_from(at.elapsed().as_nanos()).unwrap_or(i64::MAX);
                Timestamp::from_nanosecond(base.as_nanosecond() + i128::from(moved)).unwrap_or(*base)
            }
        }
    }

    pub fn time(&self) -> Time {
        Time(self.now())
    }
}

/// `at` plus `s` seconds, saturating.
pub fn after_s(at: Timestamp, s: i64) -> Timestamp {
    after_ms(at, s.saturating_mul(1000))
}

/// `at` plus `ms` milliseconds, saturating.
pub fn after_ms(at: Timestamp, ms: i64) -> Timestamp {
    at.as_millisecond()
        .checked_add(ms)
        .and_then(|v| Timestamp::from_millisecond(v).ok())
        .unwrap_or(Timestamp::MAX)
}

/// Milliseconds from `a` to `b`; negative if `b` is earlier.
pub fn ms_between(a: Timestamp, b: Timestamp) -> i64 {
    b.as_millisecond() - a.as_millisecond()
}

/// A system time as the wire's time.
pub fn from_system(at: std::time::SystemTime) -> Timestamp {
    Timestamp::try_from(at).unwrap_or(Timestamp::UNIX_EPOCH)
}

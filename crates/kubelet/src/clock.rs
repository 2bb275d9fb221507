//! Arithmetic on the wire's timestamps; the clock itself is `stdx`'s.

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use stdx::SharedClock;

/// The clock's now as the wire's timestamp.
pub fn now(clock: &SharedClock) -> Timestamp {
    from_system(clock.now())
}

/// A timestamp cut to whole seconds, as the wire carries them.
pub fn time(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
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

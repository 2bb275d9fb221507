//! The two timestamp texts of the API: whole seconds (`metav1.Time`) and microseconds (`metav1.MicroTime`), both UTC.

use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use stdx::Clock;

/// Text that is no RFC 3339 timestamp.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("parsing time {text:?}: not an RFC 3339 timestamp")]
pub struct TimeError {
    text: String,
}

/// Converts, clamping to what a timestamp can hold.
pub fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::try_from(time).unwrap_or(if time < SystemTime::UNIX_EPOCH {
        Timestamp::MIN
    } else {
        Timestamp::MAX
    })
}

/// Now, as a timestamp.
pub fn now(clock: &dyn Clock) -> Timestamp {
    timestamp(clock.now())
}

/// Now, in whole seconds: `2026-01-02T03:04:05Z`.
pub fn now_rfc3339(clock: &dyn Clock) -> String {
    rfc3339(now(clock))
}

/// Now, in microseconds: `2026-01-02T03:04:05.000000Z`.
pub fn now_micro(clock: &dyn Clock) -> String {
    micro(now(clock))
}

/// Prints whole seconds.
pub fn rfc3339(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Prints microseconds.
pub fn micro(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

/// Parses RFC 3339 with any offset and fraction.
pub fn parse(text: &str) -> Result<Timestamp, TimeError> {
    let bytes = text.as_bytes();
    // jiff also takes ISO forms that the API does not: a space, basic format, a bracketed zone.
    let shaped = bytes.len() >= 20 && bytes[4] == b'-' && bytes[10] == b'T' && bytes[13] == b':' && !text.contains('[');
    shaped
        .then(|| text.parse().ok())
        .flatten()
        .ok_or_else(|| TimeError { text: text.to_owned() })
}

/// Time from `earlier` to `later`; zero if they are out of order.
pub fn since(later: Timestamp, earlier: Timestamp) -> Duration {
    Duration::try_from(later.duration_since(earlier)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use stdx::ManualClock;

    use super::*;

    #[test]
    fn prints_and_parses() {
        let clock = ManualClock::at_unix(1_767_323_045);
        clock.advance(Duration::from_micros(1_500));
        assert_eq!(now_rfc3339(&clock), "2026-01-02T03:04:05Z");
        assert_eq!(now_micro(&clock), "2026-01-02T03:04:05.001500Z");
        assert_eq!(parse("2026-01-02T04:04:05.0015+01:00"), Ok(now(&clock)));
        for bad in ["", "2026-01-02", "2026-01-02 03:04:05Z", "20260102T030405Z", "x"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let start = parse("2026-01-02T03:04:05Z").unwrap();
        assert_eq!(since(now(&clock), start), Duration::from_micros(1_500));
        assert_eq!(since(start, now(&clock)), Duration::ZERO);
    }
}

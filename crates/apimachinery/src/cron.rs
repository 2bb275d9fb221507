//! Cron schedules as CronJobs have them: five fields, lists, ranges, steps, names, and the `@` words. Pure.
//!
//! # Source
//! `robfig/cron` v3's standard parser, which upstream uses: when both day fields are restricted, either may match.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

/// Furthest look into the future for a next time: a schedule such as `0 0 30 2 *` has none.
const YEARS_MAX: i16 = 5;

/// When something happens: sets of allowed values as bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    minute: u64,
    hour: u64,
    day: u64,
    month: u64,
    weekday: u64,
    /// `@every`: fixed seconds between times instead.
    every_s: Option<i64>,
}

/// Why text is no schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CronError {
    #[error("expected exactly 5 fields, found {found}: {fields:?}")]
    Fields { found: usize, fields: Vec<String> },
    #[error("unrecognized descriptor: {0}")]
    Word(String),
    #[error("failed to parse int from {0:?}")]
    Number(String),
    #[error("{what} ({value}) {side} ({bound}): {text}")]
    Bound {
        what: &'static str,
        value: u32,
        side: &'static str,
        bound: u32,
        text: String,
    },
}

const MONTHS: [&str; 12] = [
    "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
];
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
/// Set in a day field that was `*` or `?`, so that it does not restrict.
const STAR: u64 = 1 << 63;

impl Schedule {
    /// Parses `*/5 2-4 1,15 jan-mar mon`, or `@daily` and its like.
    pub fn parse(text: &str) -> Result<Self, CronError> {
        let text = text.trim();
        if let Some(word) = text.strip_prefix('@') {
            return Self::word(word);
        }
        let fields: Vec<&str> = text.split_whitespace().collect();
        let [minute, hour, day, month, weekday] = fields.as_slice() else {
            return Err(CronError::Fields {
                found: fields.len(),
                fields: fields.iter().map(|f| (*f).to_owned()).collect(),
            });
        };
        let weekdays = field(weekday, 0, 7, &DAYS)?;
        Ok(Schedule {
            minute: field(minute, 0, 59, &[])?,
            hour: field(hour, 0, 23, &[])?,
            day: field(day, 1, 31, &[])?,
            month: field(month, 1, 12, &MONTHS)?,
            // Sunday is 0 and 7.
            weekday: weekdays | (weekdays >> 7 & 1),
            every_s: None,
        })
    }

    fn word(word: &str) -> Result<Self, CronError> {
        if let Some(duration) = word.strip_prefix("every ") {
            let seconds = go_duration(duration.trim()).ok_or_else(|| CronError::Word(format!("@{word}")))?;
            let mut schedule = Self::parse("* * * * *")?;
            schedule.every_s = Some(seconds.max(1));
            return Ok(schedule);
        }
        Self::parse(match word {
            "yearly" | "annually" => "0 0 1 1 *",
            "monthly" => "0 0 1 * *",
            "weekly" => "0 0 * * 0",
            "daily" | "midnight" => "0 0 * * *",
            "hourly" => "0 * * * *",
            _ => return Err(CronError::Word(format!("@{word}"))),
        })
    }

    /// The first time after `after` in the zone; `None` if there is none within five years.
    pub fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        if let Some(seconds) = self.every_s {
            return Timestamp::from_second(after.as_second() + seconds).ok();
        }
        let start = zone.to_datetime(after);
        let mut at: DateTime = start
            .checked_add(1.minute())
            .ok()?
            .with()
            .second(0)
            .subsec_nanosecond(0)
            .build()
            .ok()?;
        let last_year = start.year() + YEARS_MAX;
        while at.year() <= last_year {
            if !has(self.month, at.month()) {
                let month = at.with().day(1).hour(0).minute(0).build().ok()?;
                at = month.checked_add(1.month()).ok()?;
                continue;
            }
            if !self.is_day(at) {
                at = at.with().hour(0).minute(0).build().ok()?.checked_add(1.day()).ok()?;
                continue;
            }
            if !has(self.hour, at.hour()) {
                at = at.with().minute(0).build().ok()?.checked_add(1.hour()).ok()?;
                continue;
            }
            if !has(self.minute, at.minute()) {
                at = at.checked_add(1.minute()).ok()?;
                continue;
            }
            // A time that a clock change skips happens when the clock has moved on; one that happens twice, the first time.
            let found = zone.to_ambiguous_zoned(at).compatible().ok()?.timestamp();
            if found > after {
                return Some(found);
            }
            at = at.checked_add(1.minute()).ok()?;
        }
        None
    }

    fn is_day(&self, at: DateTime) -> bool {
        let day = has(self.day, at.day());
        let weekday = has(self.weekday, at.weekday().to_sunday_zero_offset());
        if self.day & STAR != 0 || self.weekday & STAR != 0 {
            return day && weekday;
        }
        day || weekday
    }
}

fn has(set: u64, value: i8) -> bool {
    set >> value & 1 == 1
}

fn field(text: &str, min: u32, max: u32, names: &[&str]) -> Result<u64, CronError> {
    let mut set = 0;
    for part in text.split(',') {
        set |= range(part, min, max, names)?;
    }
    Ok(set)
}

fn range(text: &str, min: u32, max: u32, names: &[&str]) -> Result<u64, CronError> {
    let (span, step) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
    let mut star = 0;
    let (first, last) = match span.split_once('-') {
        _ if matches!(span, "*" | "?") => {
            star = STAR;
            (min, max.min(if names.len() == DAYS.len() { 6 } else { max }))
        }
        Some((a, b)) => (number(a, names, min)?, number(b, names, min)?),
        None => {
            let one = number(span, names, min)?;
            (one, if step.is_some() { max } else { one })
        }
    };
    let step = match step {
        None => 1,
        Some(step) => {
            star = 0;
            number(step, &[], 0)?
        }
    };
    let bound = |what, value, side, bound| CronError::Bound {
        what,
        value,
        side,
        bound,
        text: text.to_owned(),
    };
    if first < min {
        return Err(bound("beginning of range", first, "below minimum", min));
    }
    if last > max {
        return Err(bound("end of range", last, "above maximum", max));
    }
    if first > last {
        return Err(bound("beginning of range", first, "beyond end of range", last));
    }
    if step == 0 {
        return Err(bound("step of range", step, "should be a positive number, not", 0));
    }
    let mut set = star;
    for value in (first..=last).step_by(step as usize) {
        set |= 1 << value;
    }
    Ok(set)
}

fn number(text: &str, names: &[&str], min: u32) -> Result<u32, CronError> {
    if let Some(at) = names.iter().position(|n| text.eq_ignore_ascii_case(n)) {
        return Ok(at as u32 + min);
    }
    text.parse().map_err(|_| CronError::Number(text.to_owned()))
}

/// `1h30m10s` in seconds.
fn go_duration(text: &str) -> Option<i64> {
    let (mut total, mut digits) = (0_i64, String::new());
    for c in text.chars() {
        match c {
            '0'..='9' => digits.push(c),
            'h' | 'm' | 's' => {
                let n: i64 = std::mem::take(&mut digits).parse().ok()?;
                total = total.checked_add(n.checked_mul(match c {
                    'h' => 3600,
                    'm' => 60,
                    _ => 1,
                })?)?;
            }
            _ => return None,
        }
    }
    (digits.is_empty() && total > 0).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(schedule: &str, zone: &str, after: &str) -> String {
        let zone = TimeZone::posix(zone).unwrap();
        let found = Schedule::parse(schedule)
            .unwrap()
            .next(crate::time::parse(after).unwrap(), &zone);
        found.map_or("never".to_owned(), crate::time::rfc3339)
    }

    #[test]
    fn next_times() {
        let check =
            |schedule: &str, after: &str, want: &str| assert_eq!(next(schedule, "UTC0", after), want, "{schedule}");
        let now = "2026-01-02T03:04:05Z"; // a Friday
        check("* * * * *", now, "2026-01-02T03:05:00Z");
        check("*/15 * * * *", now, "2026-01-02T03:15:00Z");
        check("5 3 * * *", now, "2026-01-02T03:05:00Z");
        check("4 3 * * *", now, "2026-01-03T03:04:00Z");
        check("0 0 29 2 *", now, "2028-02-29T00:00:00Z");
        check("0 0 30 2 *", now, "never");
        check("0 12 * * mon-wed", now, "2026-01-05T12:00:00Z");
        check("0 12 * * 7", now, "2026-01-04T12:00:00Z");
        check("30 4 1,15 * fri", now, "2026-01-02T04:30:00Z");
        check("0 0 1 jan-mar *", now, "2026-02-01T00:00:00Z");
        check("@monthly", now, "2026-02-01T00:00:00Z");
        check("@every 90s", now, "2026-01-02T03:05:35Z");
        check("10/20 * * * *", now, "2026-01-02T03:10:00Z");
    }

    #[test]
    fn clocks_that_change() {
        // New York skips 02:30 on 8 March 2026 and has 01:30 twice on 1 November.
        assert_eq!(
            next("30 2 * * *", "EST5EDT,M3.2.0,M11.1.0", "2026-03-08T05:00:00Z"),
            "2026-03-08T07:30:00Z"
        );
        assert_eq!(
            next("30 1 * * *", "EST5EDT,M3.2.0,M11.1.0", "2026-11-01T04:00:00Z"),
            "2026-11-01T05:30:00Z"
        );
        assert_eq!(
            next("0 9 * * *", "CET-1CEST,M3.5.0,M10.5.0/3", "2026-07-01T08:00:00Z"),
            "2026-07-02T07:00:00Z"
        );
    }

    #[test]
    fn what_is_no_schedule() {
        for (text, says) in [
            ("* * * *", "expected exactly 5 fields, found 4"),
            ("60 * * * *", "end of range (60) above maximum (59): 60"),
            ("* * 0 * *", "beginning of range (0) below minimum (1): 0"),
            ("5-1 * * * *", "beyond end of range"),
            ("*/0 * * * *", "positive number"),
            ("x * * * *", "failed to parse int from \"x\""),
            ("@sometimes", "unrecognized descriptor: @sometimes"),
            ("@every x", "unrecognized descriptor"),
        ] {
            let error = Schedule::parse(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}

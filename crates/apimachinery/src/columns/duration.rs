//! Ages as people read them.

use jiff::SignedDuration;

/// Two units at most, one where the second would not matter: `45s`, `3m12s`, `2h`, `5d3h`, `2y10d`.
pub fn human_duration(d: SignedDuration) -> String {
    let seconds = d.as_secs();
    let pair = |big: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 {
            format!("{big}{unit}")
        } else {
            format!("{big}{unit}{small}{small_unit}")
        }
    };
    if seconds < -1 {
        return "<invalid>".into();
    }
    if seconds < 120 {
        return format!("{}s", seconds.max(0));
    }
    let minutes = seconds / 60;
    if minutes < 10 {
        return pair(minutes, "m", seconds % 60, "s");
    }
    if minutes < 180 {
        return format!("{minutes}m");
    }
    let hours = minutes / 60;
    match hours {
        0..8 => pair(hours, "h", minutes % 60, "m"),
        8..48 => format!("{hours}h"),
        48..192 => pair(hours / 24, "d", hours % 24, "h"),
        192..17_520 => format!("{}d", hours / 24),
        17_520..70_080 => pair(hours / 24 / 365, "y", hours / 24 % 365, "d"),
        _ => format!("{}y", hours / 24 / 365),
    }
}

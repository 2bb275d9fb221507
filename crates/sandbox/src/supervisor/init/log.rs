//! Log files: container output in the CRI's line format, and the raw output of our own services. Bounded by rotation.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Longest piece of a line in one record; longer lines are cut into records marked `P` (partial).
const LINE_BYTES_MAX: usize = 16 << 10;

/// A file that is renamed to `<path>.1` (replacing it) when it reaches its bound, so at most two bounds are on disk.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: Option<File>,
    size: u64,
    bytes_max: u64,
    /// Bytes that could not be written (disk full, directory gone).
    pub lost_bytes: u64,
}

impl LogFile {
    /// Opens for appending; parent directories are made.
    pub fn open(path: &Path, bytes_max: u64) -> io::Result<Self> {
        let mut log = Self {
            path: path.to_owned(),
            file: None,
            size: 0,
            bytes_max: bytes_max.max(4096),
            lost_bytes: 0,
        };
        log.reopen()?;
        Ok(log)
    }

    pub fn reopen(&mut self) -> io::Result<()> {
        let open = || OpenOptions::new().append(true).create(true).open(&self.path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(parent) = self.path.parent() {
                    std::fs::create_dir_all(parent)?;
                }
                open()?
            }
            other => other?,
        };
        self.size = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }

    /// Writes whole records. Never fails: what cannot be written is counted, because the writer must go on reading.
    pub fn write(&mut self, records: &[u8]) {
        if self.size > 0 && self.size + records.len() as u64 > self.bytes_max {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            if std::fs::rename(&self.path, old).is_ok() {
                self.file = None;
            }
        }
        if self.file.is_none() && self.reopen().is_err() {
            self.lost_bytes += records.len() as u64;
            return;
        }
        match self.file.as_mut().map(|file| file.write_all(records)) {
            Some(Ok(())) => self.size += records.len() as u64,
            _ => self.lost_bytes += records.len() as u64,
        }
    }
}

/// Cuts one stream of bytes into CRI records.
#[derive(Debug)]
pub struct Lines {
    stream: &'static str,
    /// Start of a line whose end has not come yet, shorter than [`LINE_BYTES_MAX`].
    pending: Vec<u8>,
}

impl Lines {
    pub fn new(stream: &'static str) -> Self {
        Self {
            stream,
            pending: Vec::new(),
        }
    }

    /// Appends the records that `data` completes.
    pub fn push(&mut self, data: &[u8], now: SystemTime, out: &mut Vec<u8>) {
        let stamp = rfc3339_nanos(now);
        let mut rest = data;
        while !rest.is_empty() {
            let room = LINE_BYTES_MAX - self.pending.len();
            match rest.iter().take(room).position(|byte| *byte == b'\n') {
                Some(end) => {
                    self.record(&stamp, 'F', &rest[..end], out);
                    rest = &rest[end + 1..];
                }
                None if rest.len() >= room => {
                    self.record(&stamp, 'P', &rest[..room], out);
                    rest = &rest[room..];
                }
                None => {
                    self.pending.extend_from_slice(rest);
                    rest = &[];
                }
            }
        }
    }

    /// The stream has ended: what is left becomes a record of its own.
    pub fn finish(&mut self, now: SystemTime, out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            self.record(&rfc3339_nanos(now), 'F', &[], out);
        }
    }

    fn record(&mut self, stamp: &str, tag: char, tail: &[u8], out: &mut Vec<u8>) {
        // Writing to a vector cannot fail.
        let _ = write!(out, "{stamp} {} {tag} ", self.stream);
        out.append(&mut self.pending);
        out.extend_from_slice(tail);
        out.push(b'\n');
    }
}

/// `2026-01-02T03:04:05.000000006Z`. Times before the epoch are shown as the epoch.
pub fn rfc3339_nanos(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Civil date from a day count, in 400-year eras that start on 1 March of the year 0.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z",
        since.subsec_nanos()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64, nanos: u32) -> SystemTime {
        UNIX_EPOCH + Duration::new(secs, nanos)
    }

    #[test]
    fn times_are_printed_as_rfc_3339() {
        for (secs, want) in [
            (0, "1970-01-01T00:00:00.000000006Z"),
            (951_782_400, "2000-02-29T00:00:00.000000006Z"),
            (1_767_323_045, "2026-01-02T03:04:05.000000006Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000000006Z"),
        ] {
            assert_eq!(rfc3339_nanos(at(secs, 6)), want);
        }
    }

    #[test]
    fn lines_are_joined_over_reads_and_long_ones_cut() {
        let (mut lines, mut out) = (Lines::new("stdout"), Vec::new());
        lines.push(b"a\nb", at(0, 0), &mut out);
        lines.push(b"c\n\nd", at(1, 0), &mut out);
        lines.finish(at(2, 0), &mut out);
        let text = String::from_utf8(out).unwrap();
        let want = "1970-01-01T00:00:00.000000000Z stdout F a\n1970-01-01T00:00:01.000000000Z stdout F bc\n\
            1970-01-01T00:00:01.000000000Z stdout F \n1970-01-01T00:00:02.000000000Z stdout F d\n";
        assert_eq!(text, want);

        let (mut lines, mut out) = (Lines::new("stderr"), Vec::new());
        lines.push(&vec![b'x'; LINE_BYTES_MAX + 5], at(0, 0), &mut out);
        lines.push(b"\n", at(0, 0), &mut out);
        let text = String::from_utf8(out).unwrap();
        let tags: Vec<&str> = text.lines().map(|line| line.split(' ').nth(2).unwrap()).collect();
        assert_eq!(tags, ["P", "F"]);
        assert_eq!(text.matches('x').count(), LINE_BYTES_MAX + 5);
    }

    #[test]
    fn a_full_log_is_rotated_once_and_bounded() {
        let dir = std::env::temp_dir().join(format!("oaks-log-{}", std::process::id()));
        let path = dir.join("pod/0.log");
        let mut log = LogFile::open(&path, 4096).unwrap();
        for _ in 0..100 {
            log.write(&[b'x'; 1000]);
        }
        let sizes = [path.clone(), dir.join("pod/0.log.1")].map(|path| std::fs::metadata(path).unwrap().len());
        assert!(sizes.iter().all(|size| (1..=4096).contains(size)), "{sizes:?}");
        assert_eq!(log.lost_bytes, 0);
        std::fs::remove_dir_all(dir).unwrap();
    }
}

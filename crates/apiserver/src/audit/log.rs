//! The log file: one JSON object per line, written by a thread of its own behind a bounded queue.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prometheus_client::metrics::counter::Counter;
use serde_json::Value;
use tokio::sync::mpsc;

/// Events that wait to be written. At 2 KB each this is 20 MB.
const QUEUE_MAX: usize = 10_000;

/// Where the log goes, and what of it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// `<dir>/audit.log`, and older ones beside it.
    pub path: PathBuf,
    /// A file longer than this is set aside.
    pub size_bytes_max: u64,
    /// Files set aside that are kept, besides the one being written.
    pub backups_max: usize,
    /// When the queue is full: wait for room (and hold up the request), or drop the event and count it.
    pub blocking: bool,
}

impl LogConfig {
    /// 100 MB per file, ten files, nothing waits.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        LogConfig {
            path: path.into(),
            size_bytes_max: 100 << 20,
            backups_max: 10,
            blocking: false,
        }
    }
}

/// What happened to events.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Written, or handed over to be.
    pub events: Counter,
    /// Dropped because the queue was full.
    pub dropped: Counter,
    /// Requests that waited for room in the queue.
    pub blocked: Counter,
    /// Events lost because the file could not be written.
    pub errors: Counter,
}

/// The writing end. Dropping the last one ends the thread after what is queued is written.
#[derive(Clone)]
pub struct Log {
    queue: mpsc::Sender<Value>,
    blocking: bool,
    counters: Arc<Counters>,
}

impl Log {
    /// Opens the file and starts the thread. Blocks on disk.
    pub fn open(config: LogConfig, counters: Arc<Counters>) -> io::Result<Self> {
        let (queue, events) = mpsc::channel(QUEUE_MAX);
        let blocking = config.blocking;
        let mut file = Rotated::open(config)?;
        let counted = counters.clone();
        std::thread::Builder::new()
            .name("audit-log".into())
            .spawn(move || run(&mut file, events, &counted))?;
        Ok(Log {
            queue,
            blocking,
            counters,
        })
    }

    /// Hands an event over; waits for room if the log is blocking.
    pub async fn write(&self, event: Value) {
        if !self.blocking {
            return self.write_now(event);
        }
        self.counters.events.inc();
        let event = match self.queue.try_send(event) {
            Ok(()) => return,
            Err(mpsc::error::TrySendError::Full(event) | mpsc::error::TrySendError::Closed(event)) => event,
        };
        self.counters.blocked.inc();
        if self.queue.send(event).await.is_err() {
            self.counters.errors.inc();
        }
    }

    /// Hands an event over, or drops it if there is no room.
    pub fn write_now(&self, event: Value) {
        match self.queue.try_send(event) {
            Ok(()) => {
                self.counters.events.inc();
            }
            Err(_) => {
                self.counters.dropped.inc();
            }
        }
    }
}

fn run(file: &mut Rotated, mut events: mpsc::Receiver<Value>, counters: &Counters) {
    let mut line = Vec::new();
    let mut failing = false;
    while let Some(event) = events.blocking_recv() {
        line.clear();
        // A tree of JSON values always serializes.
        let _ = serde_json::to_writer(&mut line, &event);
        line.push(b'\n');
        let mut written = file.write(&line);
        if events.is_empty() {
            written = written.and_then(|()| file.flush());
        }
        match written {
            Ok(()) => failing = false,
            Err(error) => {
                counters.errors.inc();
                if !failing {
                    tracing::error!(path = %file.config.path.display(), %error, "writing the audit log failed; is the disk full?");
                }
                failing = true;
                file.reopen();
            }
        }
    }
}

/// A file that is set aside when it is long.
struct Rotated {
    config: LogConfig,
    file: Option<BufWriter<File>>,
    size: u64,
}

impl Rotated {
    fn open(config: LogConfig) -> io::Result<Self> {
        if let Some(dir) = config.path.parent() {
            fs::create_dir_all(dir)?;
        }
        let (file, size) = append(&config.path)?;
        Ok(Rotated {
            config,
            file: Some(file),
            size,
        })
    }

    /// After a failure: what is buffered is given up, and the next write opens the file anew.
    fn reopen(&mut self) {
        if let Some(file) = self.file.take() {
            let _ = file.into_parts();
        }
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.size > 0 && self.size + line.len() as u64 > self.config.size_bytes_max {
            self.rotate()?;
        }
        if self.file.is_none() {
            let (file, size) = append(&self.config.path)?;
            (self.file, self.size) = (Some(file), size);
        }
        if let Some(file) = &mut self.file {
            file.write_all(line)?;
        }
        self.size += line.len() as u64;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), Write::flush)
    }

    /// `audit.log` becomes `audit.log.1`, that `.2`, and so on; the last one goes.
    fn rotate(&mut self) -> io::Result<()> {
        self.flush()?;
        self.file = None;
        self.size = 0;
        let aside = |n: usize| -> PathBuf {
            let mut name = self.config.path.clone().into_os_string();
            name.push(format!(".{n}"));
            name.into()
        };
        if self.config.backups_max == 0 {
            return fs::remove_file(&self.config.path);
        }
        for n in (1..self.config.backups_max).rev() {
            match fs::rename(aside(n), aside(n + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(&self.config.path, aside(1))
    }
}

fn append(path: &Path) -> io::Result<(BufWriter<File>, u64)> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    let size = file.metadata()?.len();
    Ok((BufWriter::new(file), size))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn long_files_are_set_aside_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let config = LogConfig {
            size_bytes_max: 64,
            backups_max: 2,
            ..LogConfig::new(dir.path().join("a/audit.log"))
        };
        let mut file = Rotated::open(config).unwrap();
        for n in 0..12 {
            file.write(format!("{n:030}\n").as_bytes()).unwrap();
        }
        file.flush().unwrap();
        let mut names: Vec<String> = fs::read_dir(dir.path().join("a"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["audit.log", "audit.log.1", "audit.log.2"]);
        let newest = fs::read_to_string(dir.path().join("a/audit.log")).unwrap();
        assert_eq!(newest.lines().count(), 2, "{newest}");
        assert!(newest.ends_with("11\n"), "{newest}");
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let (queue, _events) = mpsc::channel(1);
        let counters = Arc::new(Counters::default());
        let log = Log {
            queue,
            blocking: false,
            counters: counters.clone(),
        };
        log.write_now(json!(1));
        log.write_now(json!(2));
        assert_eq!((counters.events.get(), counters.dropped.get()), (1, 1));
    }
}

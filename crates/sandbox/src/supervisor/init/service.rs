//! The one command the supervisor keeps running (`oaks node` in a machine): restarted with growing pauses.

use std::{
    ffi::OsString,
    fs::File,
    io,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use super::{log::LogFile, process::Source, sys};

const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// A run this long counts as healthy: the next pause starts small again.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
const LOG_BYTES_MAX: u64 = 10 << 20;

pub struct Service {
    argv: Vec<OsString>,
    log: LogFile,
    pub pid: Option<u32>,
    pub output: Option<Source>,
    started: Instant,
    pause: Duration,
    /// When to start it again; `None` while it runs or once it may not.
    pub due: Option<Instant>,
}

impl Service {
    pub fn new(argv: Vec<OsString>, log: PathBuf, now: Instant) -> io::Result<Self> {
        let log = LogFile::open(&log, LOG_BYTES_MAX)?;
        Ok(Self {
            argv,
            log,
            pid: None,
            output: None,
            started: now,
            pause: PAUSE_MIN,
            due: Some(now),
        })
    }

    pub fn start(&mut self, now: Instant) {
        self.started = now;
        self.due = None;
        match self.spawn() {
            Ok((pid, output)) => {
                self.pid = Some(pid);
                self.output = Some(output);
            }
            Err(error) => {
                self.note(&format!("cannot start {}: {error}", self.argv[0].to_string_lossy()));
                self.ended(now);
            }
        }
    }

    fn spawn(&self) -> io::Result<(u32, Source)> {
        let (reader, writer) = std::io::pipe()?;
        let mut command = Command::new(&self.argv[0]);
        command
            .args(&self.argv[1..])
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        sys::prepare(&mut command, None);
        let child = command.spawn()?;
        Ok((
            child.id(),
            Source::new(File::from(std::os::fd::OwnedFd::from(reader)), "service")?,
        ))
    }

    /// It has ended: plans the next start.
    pub fn ended(&mut self, now: Instant) {
        self.pid = None;
        if now.duration_since(self.started) >= HEALTHY_AFTER {
            self.pause = PAUSE_MIN;
        }
        self.due = Some(now + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    /// Copies output to the log. `false` at its end.
    pub fn read(&mut self) -> bool {
        let mut buffer = [0; 16 << 10];
        let Some(source) = &mut self.output else { return false };
        match io::Read::read(&mut source.file, &mut buffer) {
            Ok(len) if len > 0 => self.log.write(&buffer[..len]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            _ => {
                self.output = None;
                return false;
            }
        }
        true
    }

    pub fn note(&mut self, message: &str) {
        self.log.write(
            format!(
                "{} oaks-init: {message}\n",
                super::log::rfc3339_nanos(std::time::SystemTime::now())
            )
            .as_bytes(),
        );
    }
}

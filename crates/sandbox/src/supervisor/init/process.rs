//! One supervised process: how it is started, its streams, its end.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::{Command, Stdio as CommandStdio},
    time::SystemTime,
};

use super::{
    log::{Lines, LogFile},
    sys,
};
use crate::supervisor::protocol::{Exit, Reason, Spawn, Stdio};

/// Input that a process has not read yet; a client that sends more is read no further until it has.
pub const STDIN_BYTES_MAX: usize = 1 << 20;
const READ_BYTES: usize = 32 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    Stdout,
    Stderr,
    Terminal,
}

/// A stream of the process that we read.
#[derive(Debug)]
pub struct Source {
    pub file: File,
    pub lines: Lines,
}

#[derive(Debug)]
pub struct Supervised {
    pub id: String,
    /// The helper, while it works.
    pub helper: Option<u32>,
    /// A helper that has not reported by then is killed.
    pub helper_deadline: Option<std::time::Instant>,
    /// 0 until the helper has reported it.
    pub pid: u32,
    pub exit: Option<Exit>,
    pub ephemeral: bool,
    pub log: Option<LogFile>,
    pub stdout: Option<Source>,
    pub stderr: Option<Source>,
    /// The terminal's master; its output is read here.
    pub terminal: Option<Source>,
    pub stdin: Option<File>,
    pub stdin_once: bool,
    pub stdin_queue: VecDeque<u8>,
    /// Close stdin once the queue is empty.
    pub stdin_closing: bool,
    /// Our end of the helper's report channel.
    pub report: Option<UnixStream>,
    /// Connection that waits for the answer to `Spawn`.
    pub spawner: Option<u64>,
    /// Connections that wait for the exit.
    pub waiters: Vec<u64>,
    /// Connections that see the output.
    pub attached: Vec<u64>,
}

/// Why a spawn failed, for the client.
pub struct SpawnError(pub Reason, pub String);

pub fn valid_id(id: &str) -> bool {
    (1..=128).contains(&id.len())
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

impl Supervised {
    /// A process of an earlier supervisor whose exit nobody has fetched.
    pub fn ended(exit: Exit) -> Self {
        Self {
            pid: exit.pid,
            id: exit.id.clone(),
            exit: Some(exit),
            ..Self::empty()
        }
    }

    fn empty() -> Self {
        Self {
            id: String::new(),
            helper: None,
            helper_deadline: None,
            pid: 0,
            exit: None,
            ephemeral: false,
            log: None,
            stdout: None,
            stderr: None,
            terminal: None,
            stdin: None,
            stdin_once: false,
            stdin_queue: VecDeque::new(),
            stdin_closing: false,
            report: None,
            spawner: None,
            waiters: Vec::new(),
            attached: Vec::new(),
        }
    }

    /// Forks and executes; `passed` are the descriptors that came with the message.
    pub fn start(spawn: Spawn, passed: Vec<OwnedFd>) -> Result<Self, SpawnError> {
        let start = |what: &str, error: io::Error| SpawnError(Reason::Start, format!("{what}: {error}"));
        let Some((program, args)) = spawn.argv.split_first() else {
            return Err(SpawnError(Reason::Invalid, "argv is empty".to_owned()));
        };
        let mut new = Self {
            id: spawn.id,
            ephemeral: spawn.ephemeral,
            ..Self::empty()
        };
        let mut command = Command::new(program);
        command.args(args).env_clear().envs(spawn.env).current_dir("/");
        command
            .stdin(CommandStdio::null())
            .stdout(CommandStdio::null())
            .stderr(CommandStdio::null());
        match spawn.stdio {
            Stdio::Null => {}
            Stdio::Passed => {
                let mut passed = passed.into_iter();
                let (Some(stdin), Some(stdout), Some(stderr)) = (passed.next(), passed.next(), passed.next()) else {
                    return Err(SpawnError(
                        Reason::Invalid,
                        "passed stdio takes three descriptors".to_owned(),
                    ));
                };
                command.stdin(stdin).stdout(stdout).stderr(stderr);
            }
            Stdio::Log {
                path,
                bytes_max,
                stdin,
                stdin_once,
            } => {
                new.log = Some(LogFile::open(&path, bytes_max).map_err(|error| start("open the log", error))?);
                new.stdin_once = stdin_once;
                if !spawn.tty {
                    let pipe = || std::io::pipe().map_err(|error| start("make a pipe", error));
                    let ((out, out_end), (err, err_end)) = (pipe()?, pipe()?);
                    command.stdout(out_end).stderr(err_end);
                    new.stdout = Some(
                        Source::new(File::from(OwnedFd::from(out)), "stdout")
                            .map_err(|error| start("make a pipe", error))?,
                    );
                    new.stderr = Some(
                        Source::new(File::from(OwnedFd::from(err)), "stderr")
                            .map_err(|error| start("make a pipe", error))?,
                    );
                    if stdin {
                        let (end, input) = pipe()?;
                        command.stdin(end);
                        new.stdin = Some(
                            non_blocking(File::from(OwnedFd::from(input)))
                                .map_err(|error| start("make a pipe", error))?,
                        );
                    }
                }
            }
        }
        let mut theirs = None;
        if spawn.helper {
            let (ours, end) = UnixStream::pair().map_err(|error| start("make a socket", error))?;
            ours.set_nonblocking(true)
                .map_err(|error| start("make a socket", error))?;
            new.report = Some(ours);
            theirs = Some(end);
        }
        sys::prepare(&mut command, theirs.as_ref().map(|end| end.as_fd()));
        let child = command
            .spawn()
            .map_err(|error| start(&format!("start {program}"), error))?;
        if spawn.helper {
            new.helper = Some(child.id());
        } else {
            new.pid = child.id();
        }
        Ok(new)
    }

    pub fn running(&self) -> bool {
        self.exit.is_none()
    }

    pub fn source(&mut self, output: Output) -> &mut Option<Source> {
        match output {
            Output::Stdout => &mut self.stdout,
            Output::Stderr => &mut self.stderr,
            Output::Terminal => &mut self.terminal,
        }
    }

    /// Reads what is there, at most one buffer, and logs it. `None` at the stream's end; empty if nothing is there.
    pub fn read(&mut self, output: Output) -> Option<Vec<u8>> {
        let Some(source) = self.source(output) else { return None };
        let mut buffer = vec![0; READ_BYTES];
        let mut records = Vec::new();
        let result = match source.file.read(&mut buffer) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Some(Vec::new())
            }
            // A terminal whose last process has gone answers EIO: that is its end.
            Ok(0) | Err(_) => {
                source.lines.finish(SystemTime::now(), &mut records);
                None
            }
            Ok(len) => {
                buffer.truncate(len);
                source.lines.push(&buffer, SystemTime::now(), &mut records);
                Some(buffer)
            }
        };
        if result.is_none() {
            *self.source(output) = None;
        }
        if let Some(log) = self.log.as_mut().filter(|_| !records.is_empty()) {
            log.write(&records);
        }
        result
    }

    /// Where input goes: the pipe, or the terminal.
    pub fn input(&mut self) -> Option<&mut File> {
        match &mut self.terminal {
            Some(terminal) => Some(&mut terminal.file),
            None => self.stdin.as_mut(),
        }
    }

    /// Writes queued input. Returns whether some is left because the process does not read.
    pub fn flush_input(&mut self) -> bool {
        while !self.stdin_queue.is_empty() {
            let queue = std::mem::take(&mut self.stdin_queue);
            let (front, _) = queue.as_slices();
            let result = match self.input() {
                Some(file) => file.write(front),
                None => return false,
            };
            self.stdin_queue = queue;
            match result {
                Ok(len) => drop(self.stdin_queue.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody reads any more.
                Err(_) => self.stdin_queue.clear(),
            }
        }
        if self.stdin_closing {
            self.stdin = None;
            // The terminal's end-of-file character: closing the master would hang up the session.
            if let Some(terminal) = &mut self.terminal {
                let _ = terminal.file.write(&[4]);
            }
            self.stdin_closing = false;
        }
        false
    }

    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let Some(terminal) = &self.terminal else { return Ok(()) };
        let size = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(rustix::termios::tcsetwinsize(&terminal.file, size)?)
    }
}

impl Source {
    pub fn new(file: File, stream: &'static str) -> io::Result<Self> {
        Ok(Self {
            file: non_blocking(file)?,
            lines: Lines::new(stream),
        })
    }
}

fn non_blocking(file: File) -> io::Result<File> {
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags | rustix::fs::OFlags::NONBLOCK)?;
    Ok(file)
}

/// Exits that nobody has fetched, one small file each, so that a new supervisor still knows them.
pub struct ExitFiles<'a>(pub &'a Path);

impl ExitFiles<'_> {
    pub fn save(&self, exit: &Exit) -> io::Result<()> {
        let path = self.0.join(&exit.id);
        let fresh = self.0.join(format!(".{}", exit.id));
        std::fs::write(&fresh, serde_json::to_vec(exit)?)?;
        std::fs::rename(fresh, path)
    }

    pub fn remove(&self, id: &str) {
        let _ = std::fs::remove_file(self.0.join(id));
    }

    /// Files that do not parse are removed: they were cut short by a crash.
    pub fn load(&self) -> io::Result<Vec<Exit>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(self.0)? {
            let path = entry?.path();
            let parsed = std::fs::read(&path)
                .ok()
                .and_then(|bytes| serde_json::from_slice::<Exit>(&bytes).ok());
            match parsed.filter(|exit| valid_id(&exit.id) && path.ends_with(&exit.id)) {
                Some(exit) => found.push(exit),
                None => drop(std::fs::remove_file(&path)),
            }
        }
        Ok(found)
    }
}

//! The supervisor's event loop: one thread, one epoll, everything non-blocking but small file writes.
//!
//! * `process`: a supervised process and its streams. * `connection`: a client. * `service`: the command kept running.
//! * `log`: log files. * `sys`: signals and what happens between fork and exec.
//!
//! Order at an exit: drain the output, save the exit file, then tell watchers, waiters and attached clients. So whoever
//! hears of an exit finds the log complete.

mod connection;
pub mod log;
mod process;
mod service;
mod sys;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::{
    event::{Timespec, epoll},
    process::{Pid, Signal, WaitOptions, WaitStatus},
};

use self::{
    connection::{Connection, Role},
    process::{ExitFiles, Output, STDIN_BYTES_MAX, Source, SpawnError, Supervised, valid_id},
    service::Service,
};
use super::protocol::{self, Exit, Frame, HelperReport, Process, Reason, Request, Response};

/// Start of the names of libcontainer's intermediate and first processes before exec.
const HELPER_STAGE: &str = "youki:[";
const HELPER_PATIENCE: Duration = Duration::from_secs(30);
/// Exits of commands inside containers that nobody fetched; the oldest go first.
const EPHEMERAL_MAX: usize = 256;
const CONNECTIONS_MAX: usize = 4096;
/// At the end: how long killed processes may take to go.
const LAST_PATIENCE: Duration = Duration::from_secs(2);

pub struct Config {
    pub socket: PathBuf,
    /// Exit files and the service's log.
    pub state_dir: PathBuf,
    /// Command to keep running; empty = none.
    pub service: Vec<OsString>,
    /// How long processes may take to end after SIGTERM when the supervisor is asked to stop.
    pub stop_grace: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Target {
    Listener,
    Signals,
    Connection,
    Report(String),
    Output(String, Output),
    Input(String),
    Service,
}

struct Stopping {
    kill_at: Instant,
    killed: bool,
    end_at: Instant,
}

struct Supervisor {
    config: Config,
    epoll: OwnedFd,
    listener: UnixListener,
    signals: OwnedFd,
    targets: HashMap<u64, Target>,
    connections: HashMap<u64, Connection>,
    /// Duplicates of inputs that wait until the process reads.
    inputs: HashMap<u64, OwnedFd>,
    processes: BTreeMap<String, Supervised>,
    /// Reaped processes that a helper may yet report.
    orphans: VecDeque<(u32, i32, Option<i32>)>,
    service: Option<Service>,
    next_token: u64,
    stopping: Option<Stopping>,
}

/// Runs until told to stop by SIGTERM, SIGINT or a client.
///
/// # Errors
/// Only while starting: the socket, the state directory or the kernel's help is missing.
pub fn run(config: Config) -> io::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let mut supervisor = Supervisor::new(config)?;
    let result = supervisor.serve();
    let _ = std::fs::remove_file(&supervisor.config.socket);
    result
}

impl Supervisor {
    fn new(config: Config) -> io::Result<Self> {
        let signals = sys::signal_fd(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT])?;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(config.state_dir.join("exits"))?;
        if let Some(parent) = config.socket.parent() {
            std::fs::create_dir_all(parent)?;
        }
        if std::os::unix::net::UnixStream::connect(&config.socket).is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another supervisor answers on this socket",
            ));
        }
        match std::fs::remove_file(&config.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&config.socket)?;
        std::fs::set_permissions(&config.socket, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let service = match config.service.is_empty() {
            true => None,
            false => Some(Service::new(
                config.service.clone(),
                config.state_dir.join("service.log"),
                Instant::now(),
            )?),
        };
        let mut new = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            listener,
            signals,
            targets: HashMap::new(),
            connections: HashMap::new(),
            inputs: HashMap::new(),
            processes: BTreeMap::new(),
            orphans: VecDeque::new(),
            service,
            next_token: 0,
            stopping: None,
            config,
        };
        for exit in ExitFiles(&new.config.state_dir.join("exits")).load()? {
            new.processes.insert(exit.id.clone(), Supervised::ended(exit));
        }
        let token = new.token(Target::Listener);
        epoll::add(
            &new.epoll,
            &new.listener,
            epoll::EventData::new_u64(token),
            epoll::EventFlags::IN,
        )?;
        let token = new.token(Target::Signals);
        epoll::add(
            &new.epoll,
            &new.signals,
            epoll::EventData::new_u64(token),
            epoll::EventFlags::IN,
        )?;
        Ok(new)
    }

    fn token(&mut self, target: Target) -> u64 {
        self.next_token += 1;
        self.targets.insert(self.next_token, target);
        self.next_token
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let now = Instant::now();
            self.run_timers(now);
            if self.finished(now) {
                return Ok(());
            }
            let timeout = self.next_deadline().map(|due| {
                let rest = due.saturating_duration_since(now) + Duration::from_millis(1);
                Timespec {
                    tv_sec: rest.as_secs() as _,
                    tv_nsec: rest.subsec_nanos() as _,
                }
            });
            let mut events = Vec::with_capacity(64);
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            ) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            for event in events {
                let (token, flags) = (event.data.u64(), event.flags);
                let Some(target) = self.targets.get(&token).cloned() else {
                    continue;
                };
                match target {
                    Target::Listener => self.accept(),
                    Target::Signals => self.take_signals(),
                    Target::Connection => self.serve_connection(token, flags),
                    Target::Report(id) => self.take_report(&id),
                    Target::Output(id, output) => self.copy_output(&id, output, token),
                    Target::Input(id) => {
                        self.targets.remove(&token);
                        if let Some(copy) = self.inputs.remove(&token) {
                            // The original stays open, so closing the copy alone would leave it registered.
                            let _ = epoll::delete(&self.epoll, &copy);
                        }
                        self.push_input(&id);
                    }
                    Target::Service => {
                        if !self.service.as_mut().is_some_and(Service::read) {
                            self.targets.remove(&token);
                        }
                    }
                }
            }
        }
    }

    // --- time ---

    fn next_deadline(&self) -> Option<Instant> {
        let service = self
            .service
            .as_ref()
            .and_then(|service| service.due)
            .filter(|_| self.stopping.is_none());
        let helpers = self
            .processes
            .values()
            .filter_map(|process| process.helper_deadline)
            .min();
        let stop = self
            .stopping
            .as_ref()
            .map(|stop| if stop.killed { stop.end_at } else { stop.kill_at });
        [service, helpers, stop].into_iter().flatten().min()
    }

    fn run_timers(&mut self, now: Instant) {
        if self.stopping.is_none()
            && let Some(service) = &mut self.service
            && service.due.is_some_and(|due| due <= now)
        {
            service.start(now);
            self.watch_service();
        }
        for process in self.processes.values_mut() {
            if process.helper_deadline.is_some_and(|due| due <= now) {
                process.helper_deadline = None;
                signal(process.helper.unwrap_or(0), libc::SIGKILL, false);
            }
        }
        if let Some(stop) = &mut self.stopping
            && !stop.killed
            && stop.kill_at <= now
        {
            stop.killed = true;
            stop.end_at = now + LAST_PATIENCE;
            self.kill_all();
        }
    }

    fn finished(&self, now: Instant) -> bool {
        let Some(stop) = &self.stopping else { return false };
        let quiet = self.processes.values().all(|process| !process.running())
            && self.service.as_ref().is_none_or(|service| service.pid.is_none());
        if !quiet && !(stop.killed && stop.end_at <= now) {
            return false;
        }
        if own_namespace() {
            // Others may be left (hooks, commands in containers). They end with us, but get their SIGKILL first.
            sys::kill_everything(libc::SIGKILL);
        }
        true
    }

    fn stop(&mut self, grace: Duration) {
        let now = Instant::now();
        if self.stopping.is_some() {
            return;
        }
        self.stopping = Some(Stopping {
            kill_at: now + grace,
            killed: false,
            end_at: now + grace + LAST_PATIENCE,
        });
        if let Some(pid) = self.service.as_ref().and_then(|service| service.pid) {
            signal(pid, libc::SIGTERM, false);
        }
        for process in self.processes.values().filter(|process| process.running()) {
            signal(process.pid, libc::SIGTERM, false);
        }
    }

    fn kill_all(&mut self) {
        if let Some(pid) = self.service.as_ref().and_then(|service| service.pid) {
            signal(pid, libc::SIGKILL, true);
        }
        for process in self.processes.values().filter(|process| process.running()) {
            signal(process.pid, libc::SIGKILL, false);
            signal(process.helper.unwrap_or(0), libc::SIGKILL, true);
        }
        if own_namespace() {
            sys::kill_everything(libc::SIGKILL);
        }
    }

    // --- signals and exits ---

    fn take_signals(&mut self) {
        for number in sys::read_signals(&self.signals) {
            match number {
                libc::SIGCHLD => self.reap(),
                _ => self.stop(self.config.stop_grace),
            }
        }
    }

    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get() as u32;
            let (code, by) = exit_code(status);
            if let Some(service) = self.service.as_mut().filter(|service| service.pid == Some(pid)) {
                service.read();
                service.note(&format!("the service ended with status {code}"));
                service.ended(Instant::now());
                continue;
            }
            let found = self
                .processes
                .values()
                .find(|process| process.helper == Some(pid) || (process.pid == pid && process.running()));
            match found.map(|process| (process.id.clone(), process.helper == Some(pid))) {
                Some((id, true)) => self.helper_ended(&id, code),
                Some((id, false)) => self.process_ended(&id, code, by),
                None => self.orphans.push_back((pid, code, by)),
            }
        }
        // Only a helper at work can still claim an orphan.
        if self.processes.values().all(|process| process.helper.is_none()) {
            self.orphans.clear();
        }
        while self.orphans.len() > 1024 {
            self.orphans.pop_front();
        }
    }

    fn helper_ended(&mut self, id: &str, code: i32) {
        self.take_report(id);
        let Some(process) = self.processes.get_mut(id) else {
            return;
        };
        process.helper = None;
        process.helper_deadline = None;
        if process.pid == 0 {
            let message = format!("the helper ended with status {code} and no report");
            self.spawn_failed(id, &message);
        }
    }

    fn spawn_failed(&mut self, id: &str, message: &str) {
        let Some(process) = self.processes.remove(id) else {
            return;
        };
        self.targets.retain(|_, target| !belongs_to(target, id));
        self.kill_strays();
        if let Some(token) = process.spawner {
            self.respond(token, &failed(Reason::Start, message), None);
        }
        for token in process.waiters {
            self.respond(token, &failed(Reason::NotFound, message), None);
        }
    }

    /// A helper that died may have left a process that waits for its signal to go on: nobody knows it and it is in no group.
    /// It is told by its name, which it has until exec, and by being our child.
    fn kill_strays(&self) {
        let children = std::fs::read_to_string(format!("/proc/self/task/{}/children", std::process::id()));
        for pid in children
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|pid| pid.parse::<u32>().ok())
        {
            let known = self
                .processes
                .values()
                .any(|process| process.pid == pid || process.helper == Some(pid));
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if !known && name.starts_with(HELPER_STAGE) {
                signal(pid, libc::SIGKILL, false);
            }
        }
    }

    fn process_ended(&mut self, id: &str, code: i32, by: Option<i32>) {
        for output in [Output::Stdout, Output::Stderr, Output::Terminal] {
            // Descendants may hold the pipe and go on writing: take what is there now, at most a few pipes full.
            for _ in 0..64 {
                match self.read_output(id, output) {
                    Some(len) if len > 0 => {}
                    _ => break,
                }
            }
        }
        let Some(process) = self.processes.get_mut(id) else {
            return;
        };
        let exit = Exit {
            id: id.to_owned(),
            pid: process.pid,
            code,
            signal: by,
            finished_at_ns: unix_ns(),
        };
        process.exit = Some(exit.clone());
        process.stdin = None;
        process.stdin_queue.clear();
        let (waiters, attached) = (
            std::mem::take(&mut process.waiters),
            std::mem::take(&mut process.attached),
        );
        if !process.ephemeral
            && let Err(error) = ExitFiles(&self.config.state_dir.join("exits")).save(&exit)
        {
            eprintln!("oaks-init: cannot save the exit of {id}: {error}");
        }
        let told = Response::Exited(exit);
        let watchers: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, conn)| conn.role == Role::Watch)
            .map(|(token, _)| *token)
            .collect();
        for token in waiters.into_iter().chain(watchers) {
            self.respond(token, &told, None);
        }
        for token in attached {
            self.with_connection(token, |conn| {
                conn.frame(&Frame::Exit(code));
                conn.closing = true;
            });
        }
        self.prune();
    }

    fn prune(&mut self) {
        let mut old: Vec<(u64, String)> = self
            .processes
            .values()
            .filter(|process| process.ephemeral)
            .filter_map(|process| Some((process.exit.as_ref()?.finished_at_ns, process.id.clone())))
            .collect();
        if old.len() > EPHEMERAL_MAX {
            old.sort();
            for (_, id) in old.drain(..EPHEMERAL_MAX / 2) {
                self.drop_process(&id);
            }
        }
    }

    fn drop_process(&mut self, id: &str) {
        self.processes.remove(id);
        self.targets.retain(|_, target| !belongs_to(target, id));
        self.drop_stale_inputs();
    }

    fn drop_stale_inputs(&mut self) {
        let Self {
            inputs, targets, epoll, ..
        } = self;
        inputs.retain(|token, copy| {
            let keep = targets.contains_key(token);
            if !keep {
                let _ = epoll::delete(&*epoll, copy);
            }
            keep
        });
    }

    // --- helpers' reports ---

    fn take_report(&mut self, id: &str) {
        let Some(process) = self.processes.get_mut(id) else {
            return;
        };
        let Some(mut report) = process.report.take() else {
            return;
        };
        self.targets
            .retain(|_, target| *target != Target::Report(id.to_owned()));
        // A report is one small write, so it is there as a whole; the end without one is a helper that died.
        let _ = report.set_nonblocking(false);
        let _ = report.set_read_timeout(Some(Duration::from_millis(50)));
        let (pid, fd) = match protocol::receive::<HelperReport>(&mut report) {
            Ok((HelperReport::Started { pid }, mut fds)) => (pid, fds.pop()),
            Ok((HelperReport::Failed { message }, _)) => return self.spawn_failed(id, &message),
            Err(_) => return,
        };
        process.pid = pid;
        process.helper_deadline = None;
        let spawner = process.spawner.take();
        let mut passed = None;
        let mut reads_terminal = false;
        match fd {
            Some(fd) if process.log.is_some() => match Source::new(File::from(fd), "stdout") {
                Ok(source) => {
                    process.terminal = Some(source);
                    reads_terminal = true;
                }
                Err(error) => eprintln!("oaks-init: terminal of {id}: {error}"),
            },
            other => passed = other,
        }
        if reads_terminal {
            self.watch_output(id, Output::Terminal);
        }
        if let Some(token) = spawner {
            self.respond(token, &Response::Spawned { pid }, passed);
        }
        if let Some(at) = self.orphans.iter().position(|(orphan, ..)| *orphan == pid) {
            if let Some((_, code, by)) = self.orphans.remove(at) {
                self.process_ended(id, code, by);
            }
        }
    }

    // --- streams ---

    fn watch_output(&mut self, id: &str, output: Output) {
        let token = self.token(Target::Output(id.to_owned(), output));
        let source = self
            .processes
            .get_mut(id)
            .and_then(|process| process.source(output).as_ref());
        if let Some(source) = source {
            let _ = epoll::add(
                &self.epoll,
                &source.file,
                epoll::EventData::new_u64(token),
                epoll::EventFlags::IN,
            );
        }
    }

    fn watch_service(&mut self) {
        self.targets.retain(|_, target| *target != Target::Service);
        let token = self.token(Target::Service);
        if let Some(source) = self.service.as_ref().and_then(|service| service.output.as_ref()) {
            let _ = epoll::add(
                &self.epoll,
                &source.file,
                epoll::EventData::new_u64(token),
                epoll::EventFlags::IN,
            );
        }
    }

    fn copy_output(&mut self, id: &str, output: Output, token: u64) {
        if self.read_output(id, output).is_none() {
            self.targets.remove(&token);
        }
    }

    /// Reads once and passes it on; `None` at the stream's end.
    fn read_output(&mut self, id: &str, output: Output) -> Option<usize> {
        let process = self.processes.get_mut(id)?;
        let data = process.read(output)?;
        let len = data.len();
        if len > 0 && !process.attached.is_empty() {
            let attached = process.attached.clone();
            let frame = if output == Output::Stderr {
                Frame::Stderr(data)
            } else {
                Frame::Stdout(data)
            };
            for token in attached {
                self.with_connection(token, |conn| conn.frame(&frame));
            }
        }
        Some(len)
    }

    /// Writes queued input; if the process does not take it all, waits until it can and stops reading its clients.
    fn push_input(&mut self, id: &str) {
        let Some(process) = self.processes.get_mut(id) else {
            return;
        };
        let blocked = process.flush_input();
        let full = process.stdin_queue.len() >= STDIN_BYTES_MAX;
        let attached = process.attached.clone();
        let waits = self
            .targets
            .values()
            .any(|target| matches!(target, Target::Input(of) if of == id));
        if blocked
            && !waits
            && let Some(Ok(copy)) = process.input().map(|file| rustix::io::fcntl_dupfd_cloexec(&*file, 3))
        {
            let token = self.token(Target::Input(id.to_owned()));
            let flags = epoll::EventFlags::OUT | epoll::EventFlags::ONESHOT;
            if epoll::add(&self.epoll, &copy, epoll::EventData::new_u64(token), flags).is_ok() {
                self.inputs.insert(token, copy);
            }
        }
        for token in attached {
            let resumed = self
                .connections
                .get_mut(&token)
                .is_some_and(|conn| std::mem::replace(&mut conn.paused, full) && !full);
            if resumed {
                self.take_frames(token);
            }
            self.arm(token);
        }
    }

    // --- clients ---

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.connections.len() >= CONNECTIONS_MAX || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let token = self.token(Target::Connection);
            if epoll::add(
                &self.epoll,
                &stream,
                epoll::EventData::new_u64(token),
                epoll::EventFlags::IN,
            )
            .is_ok()
            {
                self.connections.insert(token, Connection::new(stream));
            }
        }
    }

    fn serve_connection(&mut self, token: u64, flags: epoll::EventFlags) {
        let Some(conn) = self.connections.get_mut(&token) else {
            return;
        };
        if flags.contains(epoll::EventFlags::OUT) {
            conn.flush();
        }
        if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            if !conn.fill() {
                return self.close(token);
            }
            match conn.role {
                Role::Requests => self.take_requests(token),
                Role::Attached { .. } => self.take_frames(token),
                // A watcher has nothing to say.
                Role::Watch => conn.input.clear(),
            }
        }
        self.arm(token);
    }

    fn take_requests(&mut self, token: u64) {
        while let Some(conn) = self.connections.get_mut(&token) {
            if conn.busy || conn.closing || conn.role != Role::Requests {
                break;
            }
            match protocol::decode::<Request>(&mut conn.input) {
                Ok(Some(request)) => {
                    conn.busy = true;
                    let fds = std::mem::take(&mut conn.fds);
                    self.handle(token, request, fds);
                }
                Ok(None) => break,
                Err(error) => {
                    conn.answer(&failed(Reason::Invalid, &error.to_string()), None);
                    conn.closing = true;
                }
            }
        }
    }

    fn take_frames(&mut self, token: u64) {
        let Some(conn) = self.connections.get_mut(&token) else {
            return;
        };
        let Role::Attached { id, stdin } = &conn.role else {
            return;
        };
        let (id, writes) = (id.clone(), *stdin);
        let mut wrote = false;
        loop {
            let Some(conn) = self.connections.get_mut(&token) else {
                return;
            };
            let frame = match Frame::decode(&mut conn.input) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(_) => return self.close(token),
            };
            let Some(process) = self.processes.get_mut(&id) else {
                return;
            };
            match frame {
                Frame::Stdin(data) if writes => {
                    process.stdin_queue.extend(data);
                    wrote = true;
                }
                Frame::CloseStdin if writes && process.stdin_once => {
                    process.stdin_closing = true;
                    wrote = true;
                }
                Frame::Resize { columns, rows } => drop(process.resize(columns, rows)),
                _ => {}
            }
        }
        if wrote {
            self.push_input(&id);
        }
    }

    fn handle(&mut self, token: u64, request: Request, fds: Vec<OwnedFd>) {
        let response = match request {
            Request::Hello => Response::Hello {
                version: protocol::VERSION,
                pid: std::process::id(),
            },
            Request::Spawn(spawn) => match self.spawn(token, spawn, fds) {
                Ok(Some(pid)) => Response::Spawned { pid },
                // The helper's report answers.
                Ok(None) => return,
                Err(SpawnError(reason, message)) => failed(reason, &message),
            },
            Request::List => Response::Processes(
                self.processes
                    .values()
                    .map(|process| Process {
                        id: process.id.clone(),
                        pid: process.pid,
                        exit: process.exit.clone(),
                    })
                    .collect(),
            ),
            Request::Watch => {
                self.with_connection(token, |conn| {
                    conn.role = Role::Watch;
                    conn.answer(&Response::Done, None);
                });
                return;
            }
            Request::Shutdown { grace_ms } => {
                self.stop(Duration::from_millis(grace_ms));
                Response::Done
            }
            Request::Signal {
                id,
                signal: number,
                group,
            } => match self.processes.get(&id) {
                None => unknown(&id),
                Some(process) => {
                    if process.running() {
                        signal(process.pid, number, group);
                    }
                    Response::Done
                }
            },
            Request::Wait { id } => match self.processes.get_mut(&id) {
                None => unknown(&id),
                Some(process) => match &process.exit {
                    Some(exit) => Response::Exited(exit.clone()),
                    None => {
                        process.waiters.push(token);
                        return;
                    }
                },
            },
            Request::Attach { id, stdin } => match self.processes.get_mut(&id) {
                None => unknown(&id),
                Some(process) if !process.running() => failed(Reason::Invalid, &format!("process {id} has ended")),
                Some(process) => {
                    process.attached.push(token);
                    self.with_connection(token, |conn| {
                        conn.role = Role::Attached { id, stdin };
                        conn.answer(&Response::Done, None);
                    });
                    return self.take_frames(token);
                }
            },
            Request::Resize { id, columns, rows } => match self.processes.get(&id) {
                None => unknown(&id),
                Some(process) => match process.resize(columns, rows) {
                    Ok(()) => Response::Done,
                    Err(error) => failed(Reason::Invalid, &error.to_string()),
                },
            },
            Request::Reopen { id } => match self.processes.get_mut(&id) {
                None => unknown(&id),
                Some(process) => match process.log.as_mut().map_or(Ok(()), log::LogFile::reopen) {
                    Ok(()) => Response::Done,
                    Err(error) => failed(Reason::Invalid, &error.to_string()),
                },
            },
            Request::Forget { id } => match self.processes.get(&id) {
                None => unknown(&id),
                Some(process) if process.running() => failed(Reason::Running, &format!("process {id} is running")),
                Some(_) => {
                    ExitFiles(&self.config.state_dir.join("exits")).remove(&id);
                    self.drop_process(&id);
                    Response::Done
                }
            },
        };
        self.respond(token, &response, None);
    }

    fn spawn(&mut self, token: u64, spawn: protocol::Spawn, fds: Vec<OwnedFd>) -> Result<Option<u32>, SpawnError> {
        if self.stopping.is_some() {
            return Err(SpawnError(Reason::Start, "the supervisor is stopping".to_owned()));
        }
        if !valid_id(&spawn.id) {
            return Err(SpawnError(Reason::Invalid, format!("{:?} is no valid id", spawn.id)));
        }
        if self.processes.contains_key(&spawn.id) {
            return Err(SpawnError(
                Reason::AlreadyExists,
                format!("process {} exists", spawn.id),
            ));
        }
        let id = spawn.id.clone();
        let mut process = Supervised::start(spawn, fds)?;
        let waits = process.helper.is_some();
        if waits {
            process.spawner = Some(token);
            process.helper_deadline = Some(Instant::now() + HELPER_PATIENCE);
        }
        let pid = process.pid;
        self.processes.insert(id.clone(), process);
        self.watch_output(&id, Output::Stdout);
        self.watch_output(&id, Output::Stderr);
        if waits {
            let token = self.token(Target::Report(id.clone()));
            if let Some(report) = self.processes.get(&id).and_then(|process| process.report.as_ref()) {
                let _ = epoll::add(
                    &self.epoll,
                    report,
                    epoll::EventData::new_u64(token),
                    epoll::EventFlags::IN,
                );
            }
            return Ok(None);
        }
        Ok(Some(pid))
    }

    fn respond(&mut self, token: u64, response: &Response, fd: Option<OwnedFd>) {
        self.with_connection(token, |conn| conn.answer(response, fd));
        // The next request may have arrived while this one was worked on.
        if self
            .connections
            .get(&token)
            .is_some_and(|conn| !conn.input.is_empty() && conn.role == Role::Requests)
        {
            self.take_requests(token);
        }
    }

    fn with_connection(&mut self, token: u64, work: impl FnOnce(&mut Connection)) {
        if let Some(conn) = self.connections.get_mut(&token) {
            work(conn);
            self.arm(token);
        }
    }

    /// Sets what to wait for on a connection; closes one that is done.
    fn arm(&mut self, token: u64) {
        let Some(conn) = self.connections.get(&token) else {
            return;
        };
        if conn.closing && !conn.wants_to_write() {
            return self.close(token);
        }
        let mut flags = epoll::EventFlags::empty();
        if !conn.paused && !conn.closing {
            flags |= epoll::EventFlags::IN;
        }
        if conn.wants_to_write() {
            flags |= epoll::EventFlags::OUT;
        }
        let _ = epoll::modify(
            &self.epoll,
            conn.stream.as_fd(),
            epoll::EventData::new_u64(token),
            flags,
        );
    }

    fn close(&mut self, token: u64) {
        self.targets.remove(&token);
        let Some(conn) = self.connections.remove(&token) else {
            return;
        };
        for process in self.processes.values_mut() {
            process.waiters.retain(|waiter| *waiter != token);
            process.attached.retain(|attached| *attached != token);
        }
        if let Role::Attached { id, stdin: true } = conn.role
            && let Some(process) = self.processes.get_mut(&id)
            && process.stdin_once
        {
            process.stdin_closing = true;
            self.push_input(&id);
        }
    }
}

fn belongs_to(target: &Target, id: &str) -> bool {
    matches!(target, Target::Report(of) | Target::Output(of, _) | Target::Input(of) if of == id)
}

fn failed(reason: Reason, message: &str) -> Response {
    Response::Failed {
        reason,
        message: message.to_owned(),
    }
}

fn unknown(id: &str) -> Response {
    failed(Reason::NotFound, &format!("process {id} is unknown"))
}

fn own_namespace() -> bool {
    std::process::id() == 1
}

fn unix_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

fn exit_code(status: WaitStatus) -> (i32, Option<i32>) {
    match status.terminating_signal() {
        Some(signal) => (128 + signal, Some(signal)),
        None => (status.exit_status().unwrap_or(255), None),
    }
}

/// Ignores processes that are gone; 0 is nobody.
fn signal(pid: u32, number: i32, group: bool) {
    let (Some(pid), Some(number)) = (Pid::from_raw(pid as i32), Signal::from_named_raw(number)) else {
        return;
    };
    let _ = if group {
        rustix::process::kill_process_group(pid, number)
    } else {
        rustix::process::kill_process(pid, number)
    };
}

/// PID 1 of a shared pid namespace: reaps until it is told to end.
pub fn pause() -> io::Result<()> {
    let signals = sys::signal_fd(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT])?;
    loop {
        let mut ready = [rustix::event::PollFd::new(&signals, rustix::event::PollFlags::IN)];
        match rustix::event::poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if sys::read_signals(&signals)
            .iter()
            .any(|number| *number != libc::SIGCHLD)
        {
            return Ok(());
        }
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
    }
}

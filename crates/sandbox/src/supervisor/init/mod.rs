//! The supervisor's event loop: one thread, one epoll, everything non-blocking but small file writes.
//!
//! * `exits`: ends of processes. * `clients`: their requests and streams. * `process`: a supervised process.
//! * `connection`: a client's buffers. * `service`: the command kept running. * `log`: log files.
//! * `sys`: signals and what happens between fork and exec.
//!
//! Order at an exit: drain the output, save the exit file, then tell watchers, waiters and attached clients. So whoever
//! hears of an exit finds the log complete.

mod clients;
mod connection;
mod exits;
pub mod log;
mod process;
mod service;
mod sys;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ffi::OsString,
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::PathBuf,
    time::{Duration, Instant},
};

use rustix::{
    event::{Timespec, epoll},
    process::{Pid, Signal, WaitOptions},
};

use self::{
    connection::Connection,
    process::{ExitFiles, Output, Supervised},
    service::Service,
};
use super::protocol::{Reason, Response};

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
        let out_of_patience = stop.killed && stop.end_at <= now;
        if !quiet && !out_of_patience {
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

fn own_namespace() -> bool {
    std::process::id() == 1
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

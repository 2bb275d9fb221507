//! Streams of processes and requests of clients.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::event::epoll;

use super::{
    Supervisor, Target,
    connection::{Connection, Role},
    failed, log,
    process::{ExitFiles, Output, STDIN_BYTES_MAX, SpawnError, Supervised, valid_id},
    signal,
};
use crate::supervisor::protocol::{self, Frame, Process, Reason, Request, Response};

const HELPER_PATIENCE: Duration = Duration::from_secs(30);
const CONNECTIONS_MAX: usize = 4096;

impl Supervisor {
    pub(super) fn watch_output(&mut self, id: &str, output: Output) {
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

    pub(super) fn watch_service(&mut self) {
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

    pub(super) fn copy_output(&mut self, id: &str, output: Output, token: u64) {
        if self.read_output(id, output).is_none() {
            self.targets.remove(&token);
        }
    }

    /// Reads once and passes it on; `None` at the stream's end.
    pub(super) fn read_output(&mut self, id: &str, output: Output) -> Option<usize> {
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
    pub(super) fn push_input(&mut self, id: &str) {
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

    pub(super) fn accept(&mut self) {
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

    pub(super) fn serve_connection(&mut self, token: u64, flags: epoll::EventFlags) {
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

    pub(super) fn take_requests(&mut self, token: u64) {
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

    pub(super) fn take_frames(&mut self, token: u64) {
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

    pub(super) fn handle(&mut self, token: u64, request: Request, fds: Vec<OwnedFd>) {
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

    pub(super) fn spawn(
        &mut self,
        token: u64,
        spawn: protocol::Spawn,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<u32>, SpawnError> {
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

    pub(super) fn respond(&mut self, token: u64, response: &Response, fd: Option<OwnedFd>) {
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

    pub(super) fn with_connection(&mut self, token: u64, work: impl FnOnce(&mut Connection)) {
        if let Some(conn) = self.connections.get_mut(&token) {
            work(conn);
            self.arm(token);
        }
    }

    /// Sets what to wait for on a connection; closes one that is done.
    pub(super) fn arm(&mut self, token: u64) {
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

    pub(super) fn close(&mut self, token: u64) {
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

fn unknown(id: &str) -> Response {
    failed(Reason::NotFound, &format!("process {id} is unknown"))
}

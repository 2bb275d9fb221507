//! Signals, the ends of processes, and helpers' reports about new ones.

use std::{
    fs::File,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::{
    event::epoll,
    process::{WaitOptions, WaitStatus},
};

use super::{
    Supervisor, Target, belongs_to,
    connection::Role,
    failed,
    process::{ExitFiles, Output, Source},
    signal, sys,
};
use crate::supervisor::protocol::{self, Exit, Frame, HelperReport, Reason, Response};

/// Start of the names of libcontainer's intermediate and first processes before exec.
const HELPER_STAGE: &str = "youki:[";
/// Exits of commands inside containers that nobody fetched; the oldest go first.
const EPHEMERAL_MAX: usize = 256;

impl Supervisor {
    pub(super) fn take_signals(&mut self) {
        for number in sys::read_signals(&self.signals) {
            match number {
                libc::SIGCHLD => self.reap(),
                _ => self.stop(self.config.stop_grace),
            }
        }
    }

    pub(super) fn reap(&mut self) {
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

    pub(super) fn helper_ended(&mut self, id: &str, code: i32) {
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

    pub(super) fn spawn_failed(&mut self, id: &str, message: &str) {
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
    pub(super) fn kill_strays(&self) {
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

    pub(super) fn process_ended(&mut self, id: &str, code: i32, by: Option<i32>) {
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

    pub(super) fn prune(&mut self) {
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

    pub(super) fn drop_process(&mut self, id: &str) {
        self.processes.remove(id);
        self.targets.retain(|_, target| !belongs_to(target, id));
        self.drop_stale_inputs();
    }

    pub(super) fn drop_stale_inputs(&mut self) {
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

    pub(super) fn take_report(&mut self, id: &str) {
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
        let claimed = self.orphans.iter().position(|(orphan, ..)| *orphan == pid);
        if let Some((_, code, by)) = claimed.and_then(|at| self.orphans.remove(at)) {
            self.process_ended(id, code, by);
        }
    }
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

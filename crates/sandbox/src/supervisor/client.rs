//! A blocking client of the supervisor: one short connection per call, streams for watching and attaching.

use std::{
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;

use super::protocol::{self, Exit, Process, Reason, Request, Response, Spawn};

/// No call but `Wait`, `Watch` and `Attach` takes longer: a helper is killed well before.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Error)]
pub enum ClientError {
    #[error("talk to the supervisor at {socket}")]
    Io {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{message}")]
    Failed { reason: Reason, message: String },
    #[error("the supervisor speaks version {theirs} of the protocol, this program {ours}")]
    Version { theirs: u32, ours: u32 },
    #[error("the supervisor answered out of turn")]
    OutOfTurn,
}

impl ClientError {
    pub fn reason(&self) -> Option<Reason> {
        match self {
            ClientError::Failed { reason, .. } => Some(*reason),
            _ => None,
        }
    }
}

/// Where the supervisor listens.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Checks that the supervisor is there and speaks our version; returns its pid.
    pub fn hello(&self) -> Result<u32, ClientError> {
        match self.call(&Request::Hello, &[])?.0 {
            Response::Hello {
                version: protocol::VERSION,
                pid,
            } => Ok(pid),
            Response::Hello { version, .. } => Err(ClientError::Version {
                theirs: version,
                ours: protocol::VERSION,
            }),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// Starts a process; its pid, and its terminal if one was asked for and stdio is not a log.
    pub fn spawn(&self, spawn: Spawn, stdio: &[BorrowedFd<'_>]) -> Result<(u32, Option<OwnedFd>), ClientError> {
        match self.call(&Request::Spawn(spawn), stdio)? {
            (Response::Spawned { pid }, mut fds) => Ok((pid, fds.pop())),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// Succeeds too if the process has ended.
    pub fn signal(&self, id: &str, signal: i32, group: bool) -> Result<(), ClientError> {
        self.done(&Request::Signal {
            id: id.to_owned(),
            signal,
            group,
        })
    }

    pub fn resize(&self, id: &str, columns: u16, rows: u16) -> Result<(), ClientError> {
        self.done(&Request::Resize {
            id: id.to_owned(),
            columns,
            rows,
        })
    }

    pub fn reopen(&self, id: &str) -> Result<(), ClientError> {
        self.done(&Request::Reopen { id: id.to_owned() })
    }

    /// Succeeds if it is unknown.
    pub fn forget(&self, id: &str) -> Result<(), ClientError> {
        match self.done(&Request::Forget { id: id.to_owned() }) {
            Err(ClientError::Failed {
                reason: Reason::NotFound,
                ..
            }) => Ok(()),
            other => other,
        }
    }

    pub fn shutdown(&self, grace: Duration) -> Result<(), ClientError> {
        self.done(&Request::Shutdown {
            grace_ms: grace.as_millis() as u64,
        })
    }

    pub fn list(&self) -> Result<Vec<Process>, ClientError> {
        match self.call(&Request::List, &[])?.0 {
            Response::Processes(list) => Ok(list),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// Blocks until the process has ended, for ever if `timeout` is `None`.
    pub fn wait(&self, id: &str, timeout: Option<Duration>) -> Result<Exit, ClientError> {
        let mut stream = self.connect(timeout)?;
        match self.exchange(&mut stream, &Request::Wait { id: id.to_owned() }, &[])?.0 {
            Response::Exited(exit) => Ok(exit),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// A stream of exits from now on: call [`Client::next_exit`] on it.
    pub fn watch(&self) -> Result<UnixStream, ClientError> {
        let mut stream = self.connect(None)?;
        match self.exchange(&mut stream, &Request::Watch, &[])?.0 {
            Response::Done => Ok(stream),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    pub fn next_exit(&self, watch: &mut UnixStream) -> Result<Exit, ClientError> {
        match protocol::receive(watch).map_err(|source| self.io(source))?.0 {
            Response::Exited(exit) => Ok(exit),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// A stream of [`protocol::Frame`]s.
    pub fn attach(&self, id: &str, stdin: bool) -> Result<UnixStream, ClientError> {
        let mut stream = self.connect(Some(CALL_TIMEOUT))?;
        match self
            .exchange(
                &mut stream,
                &Request::Attach {
                    id: id.to_owned(),
                    stdin,
                },
                &[],
            )?
            .0
        {
            Response::Done => Ok(stream),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    fn done(&self, request: &Request) -> Result<(), ClientError> {
        match self.call(request, &[])?.0 {
            Response::Done => Ok(()),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    fn call(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(Response, Vec<OwnedFd>), ClientError> {
        let mut stream = self.connect(Some(CALL_TIMEOUT))?;
        self.exchange(&mut stream, request, fds)
    }

    fn connect(&self, timeout: Option<Duration>) -> Result<UnixStream, ClientError> {
        let stream = UnixStream::connect(&self.socket).map_err(|source| self.io(source))?;
        stream.set_read_timeout(timeout).map_err(|source| self.io(source))?;
        Ok(stream)
    }

    fn exchange(
        &self,
        stream: &mut UnixStream,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Response, Vec<OwnedFd>), ClientError> {
        protocol::send(stream, request, fds).map_err(|source| self.io(source))?;
        match protocol::receive(stream).map_err(|source| self.io(source))? {
            (Response::Failed { reason, message }, _) => Err(ClientError::Failed { reason, message }),
            answer => Ok(answer),
        }
    }

    fn io(&self, source: io::Error) -> ClientError {
        ClientError::Io {
            socket: self.socket.clone(),
            source,
        }
    }
}

//! One client connection: bounded buffers in both directions, descriptors, and what it is doing.

use std::{
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use crate::supervisor::protocol::{self, Frame, Response};

/// A client that lets this much pile up is cut off: it can come back and list.
const OUT_BYTES_MAX: usize = 4 << 20;
const READ_BYTES: usize = 64 << 10;

#[derive(Debug, PartialEq, Eq)]
pub enum Role {
    /// Sends requests.
    Requests,
    /// Gets every exit.
    Watch,
    /// Exchanges frames with a process; `stdin`: may write to it.
    Attached { id: String, stdin: bool },
}

#[derive(Debug)]
pub struct Connection {
    pub stream: UnixStream,
    pub role: Role,
    pub input: Vec<u8>,
    pub fds: Vec<OwnedFd>,
    /// A request is being worked on: the next one waits.
    pub busy: bool,
    /// Read no further: the process does not take its input.
    pub paused: bool,
    output: Vec<u8>,
    /// Goes with the first byte of `output`.
    output_fd: Option<OwnedFd>,
    /// Close once everything is written.
    pub closing: bool,
}

impl Connection {
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            role: Role::Requests,
            input: Vec::new(),
            fds: Vec::new(),
            busy: false,
            paused: false,
            output: Vec::new(),
            output_fd: None,
            closing: false,
        }
    }

    /// Reads what is there. `false` at the end or on an error.
    pub fn fill(&mut self) -> bool {
        let mut buffer = [0; READ_BYTES];
        match protocol::receive_with_fds(self.stream.as_fd(), &mut buffer, &mut self.fds) {
            Ok(0) => false,
            Ok(len) => {
                self.input.extend_from_slice(&buffer[..len]);
                self.input.len() <= protocol::MESSAGE_BYTES_MAX + READ_BYTES
            }
            Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }

    pub fn answer(&mut self, response: &Response, fd: Option<OwnedFd>) {
        self.busy = false;
        match protocol::encode(response) {
            Ok(bytes) => {
                self.flush();
                self.output.extend_from_slice(&bytes);
                self.output_fd = fd;
            }
            Err(_) => self.closing = true,
        }
        self.flush();
    }

    pub fn frame(&mut self, frame: &Frame) {
        frame.encode(&mut self.output);
        self.flush();
    }

    pub fn wants_to_write(&self) -> bool {
        !self.output.is_empty()
    }

    /// Writes what the socket takes. A client that is too slow is marked for closing.
    pub fn flush(&mut self) {
        while !self.output.is_empty() {
            let result = match &self.output_fd {
                Some(fd) => protocol::send_with_fds(self.stream.as_fd(), &self.output, &[fd.as_fd()]),
                None => self.stream.write(&self.output),
            };
            match result {
                Ok(len) => {
                    self.output_fd = None;
                    self.output.drain(..len);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.output.clear();
                    self.closing = true;
                }
            }
        }
        if self.output.len() > OUT_BYTES_MAX {
            self.output.clear();
            self.closing = true;
        }
    }
}

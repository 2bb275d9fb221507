//! The wire between the supervisor and its clients.
//!
//! A message is a big-endian `u32` length and that many bytes of JSON; descriptors travel with the length's first byte.
//! A connection carries requests one at a time, each answered in order. `Watch` and `Attach` turn it into a stream:
//! `Watch` answers `Done`, then one `Exited` per process; `Attach` answers `Done`, then both sides send [`Frame`]s.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Raised when a message changes its meaning; both sides come from one build, so a difference is an error, not a dialect.
pub const VERSION: u32 = 1;
/// Longest message. The largest one sent is a `List` of a full machine: 250 pods with a few containers, some 100 kB.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Largest payload of one [`Frame`].
pub const FRAME_BYTES_MAX: usize = 64 << 10;
/// Descriptor on which a helper program reports the process it made ([`HelperReport`]).
pub const HELPER_FD: i32 = 3;
const FDS_MAX: usize = 4;

#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    Hello,
    Spawn(Spawn),
    /// To the process, or to its whole process group.
    Signal {
        id: String,
        signal: i32,
        group: bool,
    },
    List,
    /// Answered with `Exited` when it ends (at once if it has).
    Wait {
        id: String,
    },
    Watch,
    /// Output from now on; input if the process was spawned with it and `stdin` is set.
    Attach {
        id: String,
        stdin: bool,
    },
    Resize {
        id: String,
        columns: u16,
        rows: u16,
    },
    /// Opens the log file anew, after someone has moved it away.
    Reopen {
        id: String,
    },
    /// The caller has recorded the exit: drops the record, its file and open descriptors. Refused while it runs.
    Forget {
        id: String,
    },
    /// Ends everything, then the supervisor itself.
    Shutdown {
        grace_ms: u64,
    },
}

/// What to start. `id` is the caller's: 1 to 128 of `[A-Za-z0-9._-]`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct Spawn {
    pub id: String,
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// `argv` is a helper that makes the process, reports it on [`HELPER_FD`] and ends.
    pub helper: bool,
    pub stdio: Stdio,
    /// The helper also reports a terminal. With `Log` it is kept and logged, otherwise it is passed to the caller.
    pub tty: bool,
    /// Keep no file about its exit: for commands run inside containers.
    pub ephemeral: bool,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Stdio {
    #[default]
    Null,
    /// Pipes that end in a log file in the CRI's format.
    Log {
        path: PathBuf,
        bytes_max: u64,
        stdin: bool,
        stdin_once: bool,
    },
    /// Standard input, output and error are the three descriptors sent with the message.
    Passed,
}

#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    Done,
    Hello {
        version: u32,
        pid: u32,
    },
    /// With the terminal as descriptor, if one was asked for and stdio is not a log.
    Spawned {
        pid: u32,
    },
    Processes(Vec<Process>),
    Exited(Exit),
    Failed {
        reason: Reason,
        message: String,
    },
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    NotFound,
    AlreadyExists,
    /// Nothing was started.
    Start,
    Invalid,
    Running,
}

#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct Process {
    pub id: String,
    /// 0 while its helper works.
    pub pid: u32,
    pub exit: Option<Exit>,
}

#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct Exit {
    pub id: String,
    pub pid: u32,
    /// Exit status, or 128 + signal.
    pub code: i32,
    pub signal: Option<i32>,
    /// Since the epoch.
    pub finished_at_ns: u64,
}

/// What a helper writes to [`HELPER_FD`], once; a terminal travels as descriptor with it.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum HelperReport {
    Started { pid: u32 },
    Failed { message: String },
}

/// One piece of an attached stream: kind, big-endian `u32` length, bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    Stdin(Vec<u8>),
    CloseStdin,
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Resize {
        columns: u16,
        rows: u16,
    },
    /// Last frame: the process ended.
    Exit(i32),
}

impl Frame {
    pub fn encode(&self, into: &mut Vec<u8>) {
        let (kind, data): (u8, &[u8]) = match self {
            Frame::Stdin(data) => (0, data),
            Frame::Stdout(data) => (1, data),
            Frame::Stderr(data) => (2, data),
            Frame::CloseStdin => (3, &[]),
            Frame::Resize { columns, rows } => {
                into.extend_from_slice(&[4, 0, 0, 0, 4]);
                into.extend_from_slice(&columns.to_be_bytes());
                into.extend_from_slice(&rows.to_be_bytes());
                return;
            }
            Frame::Exit(code) => {
                into.extend_from_slice(&[5, 0, 0, 0, 4]);
                into.extend_from_slice(&code.to_be_bytes());
                return;
            }
        };
        into.push(kind);
        into.extend_from_slice(&(data.len() as u32).to_be_bytes());
        into.extend_from_slice(data);
    }

    /// Takes one whole frame from the front of `buffer`; `None` if more bytes are needed.
    pub fn decode(buffer: &mut Vec<u8>) -> io::Result<Option<Frame>> {
        let Some((header, rest)) = buffer.split_at_checked(5) else {
            return Ok(None);
        };
        let len = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if len > FRAME_BYTES_MAX {
            return Err(invalid("frame too long"));
        }
        let Some(data) = rest.get(..len) else { return Ok(None) };
        let frame = match (header[0], data) {
            (0, data) => Frame::Stdin(data.to_vec()),
            (1, data) => Frame::Stdout(data.to_vec()),
            (2, data) => Frame::Stderr(data.to_vec()),
            (3, []) => Frame::CloseStdin,
            (4, &[a, b, c, d]) => Frame::Resize {
                columns: u16::from_be_bytes([a, b]),
                rows: u16::from_be_bytes([c, d]),
            },
            (5, &[a, b, c, d]) => Frame::Exit(i32::from_be_bytes([a, b, c, d])),
            _ => return Err(invalid("unknown frame")),
        };
        buffer.drain(..5 + len);
        Ok(Some(frame))
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A message as bytes, header included.
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let len = bytes.len() - 4;
    if len > MESSAGE_BYTES_MAX {
        return Err(invalid("message too long"));
    }
    bytes[..4].copy_from_slice(&(len as u32).to_be_bytes());
    Ok(bytes)
}

/// Takes one whole message from the front of `buffer`; `None` if more bytes are needed.
pub fn decode<T: DeserializeOwned>(buffer: &mut Vec<u8>) -> io::Result<Option<T>> {
    let Some((header, rest)) = buffer.split_at_checked(4) else {
        return Ok(None);
    };
    let len = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
    if len > MESSAGE_BYTES_MAX {
        return Err(invalid("message too long"));
    }
    let Some(body) = rest.get(..len) else { return Ok(None) };
    let message = serde_json::from_slice(body)?;
    buffer.drain(..4 + len);
    Ok(Some(message))
}

/// Sends a message, blocking, with descriptors.
pub fn send<T: Serialize>(stream: &mut UnixStream, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = encode(message)?;
    let sent = if fds.is_empty() {
        0
    } else {
        send_with_fds(stream.as_fd(), &bytes, fds)?
    };
    stream.write_all(&bytes[sent..])
}

/// One `sendmsg` with descriptors; returns how many bytes went with them.
pub fn send_with_fds(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
    }
    Ok(rustix::net::sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}

/// One `recvmsg`; descriptors are appended to `fds`, close-on-exec. Returns the number of bytes, 0 at the end.
pub fn receive_with_fds(socket: BorrowedFd<'_>, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok(got.bytes)
}

/// Receives a message, blocking, with its descriptors.
pub fn receive<T: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut fds = Vec::new();
    let mut header = [0; 4];
    let mut have = receive_with_fds(stream.as_fd(), &mut header, &mut fds)?;
    if have == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    while have < 4 {
        let more = stream.read(&mut header[have..])?;
        if more == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        have += more;
    }
    let len = u32::from_be_bytes(header) as usize;
    if len > MESSAGE_BYTES_MAX {
        return Err(invalid("message too long"));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok((serde_json::from_slice(&body)?, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_messages_survive_any_split() {
        let frames = [
            Frame::Stdin(b"in".to_vec()),
            Frame::CloseStdin,
            Frame::Stdout(vec![7; 1000]),
            Frame::Resize { columns: 80, rows: 24 },
            Frame::Exit(-1),
        ];
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        let (mut buffer, mut got) = (Vec::new(), Vec::new());
        for byte in bytes {
            buffer.push(byte);
            got.extend(Frame::decode(&mut buffer).unwrap());
        }
        assert_eq!(got, frames);
        let request = Request::Signal {
            id: "a".into(),
            signal: 15,
            group: true,
        };
        let mut buffer = encode(&request).unwrap();
        let last = buffer.pop().unwrap();
        assert_eq!(decode::<Request>(&mut buffer).unwrap(), None);
        buffer.push(last);
        assert_eq!(decode::<Request>(&mut buffer).unwrap(), Some(request));
        assert!(buffer.is_empty());
    }

    #[test]
    fn hostile_lengths_are_refused() {
        assert!(decode::<Request>(&mut vec![0xff; 8]).is_err());
        assert!(Frame::decode(&mut vec![0, 0xff, 0, 0, 0]).is_err());
        assert!(Frame::decode(&mut vec![9, 0, 0, 0, 0]).is_err());
    }

    #[test]
    fn descriptors_travel_with_a_message() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let (reader, mut writer) = std::io::pipe().unwrap();
        send(&mut a, &Request::Hello, &[reader.as_fd()]).unwrap();
        drop(reader);
        let (request, mut fds) = receive::<Request>(&mut b).unwrap();
        assert_eq!((request, fds.len()), (Request::Hello, 1));
        writer.write_all(b"x").unwrap();
        drop(writer);
        let mut text = String::new();
        std::fs::File::from(fds.remove(0)).read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }
}

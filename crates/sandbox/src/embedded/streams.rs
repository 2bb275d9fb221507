//! Commands in containers and the streams to them, attaching, and connections into a sandbox.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, unix::AsyncFd},
    net::{TcpSocket, TcpStream, UnixStream, unix::pipe},
    sync::{mpsc, oneshot},
};

use super::{Inner, blocking, container::Container, io as io_failed, records::ContainerPhase, runtime, supervisor};
use crate::{
    api::{Error, ExecRequest, ExecSession},
    supervisor::{
        client::Client,
        protocol::{self, Exit, FRAME_BYTES_MAX, Frame, Request, Response, Spawn, Stdio},
    },
};

/// `exec_sync` keeps this much of each output.
const OUTPUT_BYTES_MAX: usize = 16 << 10;
/// A command has ended, but a child of it keeps the pipe open: how long to wait for more.
const LAST_OUTPUT: Duration = Duration::from_millis(200);
const RESIZES_MAX: usize = 4;
const DUPLEX_BYTES: usize = 64 << 10;

type Reader = Pin<Box<dyn AsyncRead + Send>>;
type Writer = Pin<Box<dyn AsyncWrite + Send>>;

impl Inner {
    fn running_container(&self, id: &str) -> Result<Arc<Container>, Error> {
        let container = self.container(id)?;
        match container.record().phase {
            ContainerPhase::Running => Ok(container),
            _ => Err(Error::Invalid {
                field: "container".to_owned(),
                reason: format!("{id} is not running"),
            }),
        }
    }

    pub async fn exec(self: &Arc<Self>, id: &str, request: ExecRequest) -> Result<ExecSession, Error> {
        let container = self.running_container(id)?;
        let inner = self.clone();
        let started = blocking(move || inner.start_command(&container, &request)).await?;
        self.session(started)
    }

    fn start_command(&self, container: &Container, request: &ExecRequest) -> Result<Started, Error> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if request.argv.is_empty() {
            return Err(Error::Invalid {
                field: "command".to_owned(),
                reason: "it is empty".to_owned(),
            });
        }
        // Unique over engines that share one supervisor, and over their restarts.
        let nanos = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos());
        let exec_id = format!("exec-{}-{nanos}-{}", container.id, NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = self.container_dir(&container.id);
        let process_file = dir.join(format!("{exec_id}.json"));
        let process = self.process_for(container, &request.argv, request.tty)?;
        std::fs::write(&process_file, process.to_string()).map_err(io_failed("write the command"))?;

        let text = |path: &std::path::Path| path.display().to_string();
        let argv = vec![
            text(&self.config.runc),
            "exec".into(),
            text(&self.runc_root()),
            container.id.clone(),
            text(&dir),
            text(&process_file),
        ];
        let mut spawn = Spawn {
            id: exec_id.clone(),
            argv,
            helper: true,
            tty: request.tty,
            ephemeral: true,
            ..Spawn::default()
        };
        let mut started = Started {
            exec_id,
            ..Started::default()
        };
        let result = if request.tty {
            self.supervisor.spawn(spawn, &[])
        } else {
            let (stdin, ours) = pair(request.stdin, End::Reads)?;
            started.stdin = ours;
            let (stdout, ours) = pair(request.stdout, End::Writes)?;
            started.stdout = ours;
            let (stderr, ours) = pair(request.stderr, End::Writes)?;
            started.stderr = ours;
            spawn.stdio = Stdio::Passed;
            self.supervisor
                .spawn(spawn, &[stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])
        };
        let _ = std::fs::remove_file(&process_file);
        let (_, terminal) = result.map_err(supervisor("run a command in the container"))?;
        if request.tty && terminal.is_none() {
            return Err(Error::Runtime {
                doing: "run a command in the container".to_owned(),
                reason: "no terminal came".to_owned(),
            });
        }
        started.terminal = terminal;
        Ok(started)
    }

    /// Wraps descriptors as async streams and waits for the exit in the background.
    fn session(&self, started: Started) -> Result<ExecSession, Error> {
        let failed = |error: io::Error| io_failed("open the command's streams")(error);
        let (sender, exit) = oneshot::channel();
        let (client, exec_id) = (self.supervisor.clone(), started.exec_id);
        tokio::spawn(async move {
            let result = wait(&client, &exec_id).await.map(|exit| exit.code);
            let _ = blocking(move || client.forget(&exec_id).map_err(supervisor("forget a command"))).await;
            // Nobody may be interested any more.
            let _ = sender.send(result);
        });
        if let Some(terminal) = started.terminal {
            let terminal = Arc::new(Terminal::new(terminal).map_err(failed)?);
            let (resize, mut sizes) = mpsc::channel::<(u16, u16)>(RESIZES_MAX);
            let sized = terminal.clone();
            tokio::spawn(async move {
                while let Some((columns, rows)) = sizes.recv().await {
                    let _ = sized.resize(columns, rows);
                }
            });
            return Ok(ExecSession {
                stdin: Some(Box::pin(TerminalStream(terminal.clone()))),
                stdout: Some(Box::pin(TerminalStream(terminal))),
                stderr: None,
                resize: Some(resize),
                exit,
            });
        }
        let reader = |fd: Option<OwnedFd>| -> Result<Option<Reader>, Error> {
            fd.map(|fd| {
                pipe::Receiver::from_owned_fd(fd)
                    .map(|pipe| Box::pin(pipe) as Reader)
                    .map_err(failed)
            })
            .transpose()
        };
        let stdin = started.stdin.map(|fd| {
            pipe::Sender::from_owned_fd(fd)
                .map(|pipe| Box::pin(pipe) as Writer)
                .map_err(failed)
        });
        Ok(ExecSession {
            stdin: stdin.transpose()?,
            stdout: reader(started.stdout)?,
            stderr: reader(started.stderr)?,
            resize: None,
            exit,
        })
    }

    pub async fn exec_sync(
        self: &Arc<Self>,
        id: &str,
        argv: Vec<String>,
        timeout_ms: u64,
    ) -> Result<(i32, Bytes, Bytes), Error> {
        let container = self.running_container(id)?;
        let inner = self.clone();
        let request = ExecRequest {
            argv,
            stdout: true,
            stderr: true,
            ..ExecRequest::default()
        };
        let started = blocking(move || inner.start_command(&container, &request)).await?;
        let exec_id = started.exec_id.clone();
        let session = self.session(started)?;
        let mut outputs = tokio::spawn(async move {
            let (mut out, mut err) = (session.stdout, session.stderr);
            tokio::join!(collect(&mut out), collect(&mut err))
        });
        // 0 = no limit, as in the CRI.
        let limit = if timeout_ms == 0 {
            Duration::from_secs(u32::MAX.into())
        } else {
            Duration::from_millis(timeout_ms)
        };
        let code = match tokio::time::timeout(limit, session.exit).await {
            Ok(Ok(code)) => code?,
            Ok(Err(_)) => {
                return Err(Error::Runtime {
                    doing: "wait for a command".to_owned(),
                    reason: "it was lost".to_owned(),
                });
            }
            Err(_) => {
                outputs.abort();
                let client = self.supervisor.clone();
                blocking(move || {
                    client
                        .signal(&exec_id, libc::SIGKILL, true)
                        .map_err(supervisor("kill a command"))
                })
                .await?;
                return Err(Error::Timeout {
                    doing: "a command in the container".to_owned(),
                    ms: timeout_ms,
                });
            }
        };
        let (out, err) = match tokio::time::timeout(LAST_OUTPUT, &mut outputs).await {
            Ok(Ok(outputs)) => outputs,
            // A daemon holds the pipe: what came so far is lost with the task, which is rare and no error.
            _ => {
                outputs.abort();
                (Bytes::new(), Bytes::new())
            }
        };
        Ok((code, out, err))
    }

    pub async fn attach(self: &Arc<Self>, id: &str, stdin: bool) -> Result<ExecSession, Error> {
        let container = self.running_container(id)?;
        let config = container.record().config;
        let stdin = stdin && config.stdin;
        let (client, id) = (self.supervisor.clone(), id.to_owned());
        let stream = blocking(move || {
            let stream = client
                .attach(&id, stdin)
                .map_err(supervisor("attach to the container"))?;
            stream
                .set_nonblocking(true)
                .map_err(io_failed("attach to the container"))?;
            Ok(stream)
        })
        .await?;
        attached(stream, stdin, config.tty)
    }

    pub async fn dial(&self, sandbox_id: &str, port: u16) -> Result<TcpStream, Error> {
        let sandbox = self.sandbox(sandbox_id)?;
        let netns = (!sandbox.record().config.host_network).then(|| self.pins(sandbox_id).join("net"));
        let doing = format!("connect to port {port} of sandbox {sandbox_id}");
        let sockets = {
            let doing = doing.clone();
            blocking(move || {
                // A socket belongs to the namespace it was made in; only that needs the thread.
                let made = linux::process::on_scratch_thread(move || {
                    if let Some(path) = netns {
                        linux::process::join(&path, rustix::thread::LinkNameSpaceType::Network)
                            .map_err(io::Error::other)?;
                    }
                    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
                    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                    let make = |family| socket_with(family, SocketType::STREAM, flags, None);
                    Ok::<_, io::Error>((make(AddressFamily::INET)?, make(AddressFamily::INET6).ok()))
                });
                made.map_err(|error| runtime(&doing, &error))?.map_err(io_failed(doing))
            })
            .await?
        };
        let connect = async |fd: OwnedFd, host: &str| -> io::Result<TcpStream> {
            let address = format!("{host}:{port}").parse().map_err(io::Error::other)?;
            TcpSocket::from_std_stream(std::net::TcpStream::from(fd))
                .connect(address)
                .await
        };
        match (connect(sockets.0, "127.0.0.1").await, sockets.1) {
            (Ok(stream), _) => Ok(stream),
            (Err(first), Some(socket)) => connect(socket, "[::1]").await.map_err(|_| io_failed(doing)(first)),
            (Err(error), None) => Err(io_failed(doing)(error)),
        }
    }
}

#[derive(Default)]
struct Started {
    exec_id: String,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Reads,
    Writes,
}

/// The process's end (which `end` says) and, if wanted, ours; otherwise the process gets /dev/null.
fn pair(wanted: bool, end: End) -> Result<(OwnedFd, Option<OwnedFd>), Error> {
    let failed = "make a pipe";
    if !wanted {
        let null = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(io_failed(failed))?;
        return Ok((null.into(), None));
    }
    let (reader, writer) = std::io::pipe().map_err(io_failed(failed))?;
    Ok(match end {
        End::Reads => (reader.into(), Some(writer.into())),
        End::Writes => (writer.into(), Some(reader.into())),
    })
}

/// Reads to the end, keeping the first part.
async fn collect(stream: &mut Option<Reader>) -> Bytes {
    let mut kept = BytesMut::new();
    let mut buffer = vec![0; 8 << 10];
    if let Some(stream) = stream {
        while let Ok(len @ 1..) = stream.read(&mut buffer).await {
            let room = OUTPUT_BYTES_MAX - kept.len();
            kept.extend_from_slice(&buffer[..len.min(room)]);
        }
    }
    kept.freeze()
}

/// Waits for a process's end without holding a thread.
async fn wait(client: &Client, id: &str) -> Result<Exit, Error> {
    let failed = "wait for a process";
    let mut stream = UnixStream::connect(client.socket()).await.map_err(io_failed(failed))?;
    let request = protocol::encode(&Request::Wait { id: id.to_owned() }).map_err(io_failed(failed))?;
    stream.write_all(&request).await.map_err(io_failed(failed))?;
    let mut buffer = Vec::new();
    loop {
        match protocol::decode::<Response>(&mut buffer).map_err(io_failed(failed))? {
            Some(Response::Exited(exit)) => return Ok(exit),
            Some(Response::Failed { message, .. }) => {
                return Err(Error::Runtime {
                    doing: failed.to_owned(),
                    reason: message,
                });
            }
            Some(_) => {
                return Err(Error::Runtime {
                    doing: failed.to_owned(),
                    reason: "an answer out of turn".to_owned(),
                });
            }
            None => {}
        }
        if stream.read_buf(&mut buffer).await.map_err(io_failed(failed))? == 0 {
            return Err(io_failed(failed)(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// Splits the supervisor's frames into streams.
fn attached(stream: StdUnixStream, stdin: bool, tty: bool) -> Result<ExecSession, Error> {
    let stream = UnixStream::from_std(stream).map_err(io_failed("attach to the container"))?;
    let (mut from, mut to) = stream.into_split();
    let (stdout, mut stdout_in) = tokio::io::duplex(DUPLEX_BYTES);
    let (stderr, mut stderr_in) = tokio::io::duplex(DUPLEX_BYTES);
    let (mut stdin_out, stdin_in) = tokio::io::duplex(DUPLEX_BYTES);
    let (mut exit_sender, exit) = oneshot::channel();
    let (resize, mut sizes) = mpsc::channel::<(u16, u16)>(RESIZES_MAX);

    tokio::spawn(async move {
        let mut result = Err(Error::Runtime {
            doing: "attach".to_owned(),
            reason: "the supervisor closed the stream".to_owned(),
        });
        let mut buffer = Vec::new();
        'read: loop {
            tokio::select! {
                // Cancel safe, as its documentation says.
                got = from.read_buf(&mut buffer) => if !matches!(got, Ok(1..)) { break },
                // The session was dropped.
                () = exit_sender.closed() => return,
            }
            loop {
                match Frame::decode(&mut buffer) {
                    // A reader that went away does not end the other stream.
                    Ok(Some(Frame::Stdout(data))) => drop(stdout_in.write_all(&data).await),
                    Ok(Some(Frame::Stderr(data))) => drop(stderr_in.write_all(&data).await),
                    Ok(Some(Frame::Exit(code))) => {
                        result = Ok(code);
                        break 'read;
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => break 'read,
                }
            }
        }
        let _ = exit_sender.send(result);
    });
    tokio::spawn(async move {
        let mut buffer = vec![0; FRAME_BYTES_MAX / 4];
        let (mut reads, mut resizes) = (stdin, true);
        while reads || resizes {
            let mut bytes = Vec::new();
            tokio::select! {
                // Cancel safe: a read either takes bytes or nothing.
                len = stdin_out.read(&mut buffer), if reads => match len {
                    Ok(len @ 1..) => Frame::Stdin(buffer[..len].to_vec()).encode(&mut bytes),
                    _ => {
                        reads = false;
                        Frame::CloseStdin.encode(&mut bytes);
                    }
                },
                // Cancel safe, as the channel's documentation says.
                size = sizes.recv(), if resizes => match size {
                    Some((columns, rows)) => Frame::Resize { columns, rows }.encode(&mut bytes),
                    None => resizes = false,
                },
            }
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
        // The write half stays until the other task has seen the end: dropping it would close only our direction.
        to.forget();
    });
    Ok(ExecSession {
        stdin: stdin.then(|| Box::pin(stdin_in) as Writer),
        stdout: Some(Box::pin(stdout)),
        stderr: (!tty).then(|| Box::pin(stderr) as Reader),
        resize: tty.then_some(resize),
        exit,
    })
}

/// The master of a terminal.
struct Terminal {
    fd: AsyncFd<OwnedFd>,
}

impl Terminal {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        #[expect(
            deprecated,
            reason = "its replacement is unsafe; an OwnedFd that is never given out is what it asks for"
        )]
        let fd = AsyncFd::new(fd)?;
        Ok(Self { fd })
    }

    fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let size = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(rustix::termios::tcsetwinsize(self.fd.get_ref(), size)?)
    }
}

struct TerminalStream(Arc<Terminal>);

impl AsyncRead for TerminalStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.fd.poll_read_ready(cx))?;
            let result = guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), buffer.initialize_unfilled())?));
            match result {
                Ok(Ok(len)) => {
                    buffer.advance(len);
                    return Poll::Ready(Ok(()));
                }
                // The last process has closed its side: the end of the stream.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for TerminalStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.fd.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), data)?)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Ends the input, not the session: the reading half may still get output.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write(cx, &[4]))?;
        Poll::Ready(Ok(()))
    }
}

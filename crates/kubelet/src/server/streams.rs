//! Exec and attach over WebSocket, `v5.channel.k8s.io` and `v4.channel.k8s.io`: the first byte of each binary message
//! names the channel. SPDY is refused by name.
//!
//! # Source
//! `k8s.io/apimachinery/pkg/util/remotecommand` and `k8s.io/streaming/pkg/httpstream/wsstream`, 1.36.

use std::sync::Arc;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use sandbox::{ContainerState, ExecRequest, ExecSession};
use serde::Deserialize;
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        handshake::derive_accept_key,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use super::{Body, Query, Refused, find};
use crate::kubelet::Core;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// v5: the next byte names the channel that the client has closed.
const CLOSE: u8 = 255;

/// Bytes of one message, and messages that may wait for the client.
const CHUNK: usize = 32 * 1024;
const AHEAD: usize = 16;
/// The largest message a client may send.
const MESSAGE_MAX: usize = 1024 * 1024;

#[derive(Clone, Copy, PartialEq)]
enum Protocol {
    V5,
    V4,
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Self::V5 => "v5.channel.k8s.io",
            Self::V4 => "v4.channel.k8s.io",
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "the parts of one route")]
pub(super) async fn serve(
    core: Arc<Core>,
    mut request: Request<Incoming>,
    exec: bool,
    ns: &str,
    pod: &str,
    uid: Option<&str>,
    container: &str,
    query: &Query,
) -> Result<Response<Body>, Refused> {
    let (protocol, accept) = negotiate(&request)?;
    let on = |a: &str, b: &str| query.flag(a) || query.flag(b);
    let wants = ExecRequest {
        argv: query.all("command"),
        stdin: on("stdin", "input"),
        stdout: on("stdout", "output"),
        stderr: on("stderr", "error"),
        tty: query.flag("tty"),
    };
    if !(wants.stdin || wants.stdout || wants.stderr) {
        return Err(Refused::bad("you must specify at least 1 of stdin, stdout, stderr"));
    }
    if wants.tty && wants.stderr {
        return Err(Refused::bad("tty and stderr cannot both be true"));
    }
    if exec && wants.argv.is_empty() {
        return Err(Refused::bad("you must specify at least one command for the container"));
    }
    let shown = find(&core, ns, pod, uid)?;
    let status = shown
        .runtime
        .latest(container)
        .filter(|c| c.state == ContainerState::Running)
        .ok_or_else(|| Refused::not_found(format!("container \"{container}\" of pod \"{pod}\" is not running")))?;
    let id = status.id.clone();
    let session = if exec {
        core.config.runtime.exec(&id, wants.clone()).await
    } else {
        core.config.runtime.attach(&id, wants.stdin).await
    };
    let session = session.map_err(|e| Refused(StatusCode::INTERNAL_SERVER_ERROR, stdx::chain(&e).to_string()))?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(io) => talk(io, session, protocol).await,
            Err(e) => tracing::debug!(error = %stdx::chain(&e), "connection was not upgraded"),
        }
    });
    let mut response = Response::new(Body::new(Empty::<Bytes>::new().map_err(|never| match never {})));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, header::HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("Upgrade"));
    headers.insert(
        header::SEC_WEBSOCKET_PROTOCOL,
        header::HeaderValue::from_static(protocol.name()),
    );
    if let Ok(accept) = header::HeaderValue::from_str(&accept) {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    Ok(response)
}

fn negotiate(request: &Request<Incoming>) -> Result<(Protocol, String), Refused> {
    let value = |name| {
        request
            .headers()
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
    };
    let upgrade = value(header::UPGRADE);
    if upgrade.to_ascii_lowercase().starts_with("spdy/") {
        return Err(Refused::bad(
            "SPDY streams are not supported; use WebSocket (v5.channel.k8s.io)",
        ));
    }
    if !upgrade.eq_ignore_ascii_case("websocket") {
        return Err(Refused::bad("Upgrade request required"));
    }
    let key = value(header::SEC_WEBSOCKET_KEY);
    if key.is_empty() || value(header::SEC_WEBSOCKET_VERSION) != "13" {
        return Err(Refused::bad("not a WebSocket handshake of version 13"));
    }
    let offered: Vec<&str> = request
        .headers()
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(str::trim)
        .collect();
    let protocol = [Protocol::V5, Protocol::V4].into_iter().find(|p| offered.contains(&p.name())).ok_or_else(|| {
        Refused::bad(format!("unable to negotiate protocol: client supports {offered:?}, server accepts [v5.channel.k8s.io v4.channel.k8s.io]"))
    })?;
    Ok((protocol, derive_accept_key(key.as_bytes())))
}

#[derive(Deserialize)]
struct Size {
    #[serde(rename = "Width")]
    width: u16,
    #[serde(rename = "Height")]
    height: u16,
}

/// Carries the streams both ways until the process has ended and its output is sent, or the client has left.
async fn talk(io: Upgraded, session: ExecSession, protocol: Protocol) {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MESSAGE_MAX))
        .max_frame_size(Some(MESSAGE_MAX));
    let socket = WebSocketStream::from_raw_socket(TokioIo::new(io), Role::Server, Some(config)).await;
    let (mut sink, mut source) = socket.split();
    let ExecSession {
        stdin,
        stdout,
        stderr,
        resize,
        exit,
    } = session;
    let (tx, mut rx) = mpsc::channel::<Message>(AHEAD);

    let input = {
        let tx = tx.clone();
        async move {
            let mut stdin = stdin;
            while let Some(Ok(message)) = source.next().await {
                let data = match message {
                    Message::Binary(data) => data,
                    Message::Ping(data) => {
                        let _ = tx.send(Message::Pong(data)).await;
                        continue;
                    }
                    Message::Close(_) => return,
                    Message::Text(_) | Message::Pong(_) | Message::Frame(_) => continue,
                };
                match data.split_first() {
                    Some((&STDIN, bytes)) => {
                        if let Some(pipe) = &mut stdin
                            && (pipe.write_all(bytes).await.is_err() || pipe.flush().await.is_err())
                        {
                            // The process has closed its input; what comes is dropped, as a closed pipe does.
                            stdin = None;
                        }
                    }
                    Some((&RESIZE, bytes)) => {
                        if let (Some(resize), Ok(s)) = (&resize, serde_json::from_slice::<Size>(bytes)) {
                            let _ = resize.send((s.width, s.height)).await;
                        }
                    }
                    Some((&CLOSE, [STDIN])) if protocol == Protocol::V5 => {
                        if let Some(mut pipe) = stdin.take() {
                            let _ = pipe.shutdown().await;
                        }
                    }
                    _ => {}
                }
            }
        }
    };
    let output = async move {
        let out = pump(stdout, STDOUT, tx.clone());
        let err = pump(stderr, STDERR, tx.clone());
        let ((), (), exit) = tokio::join!(out, err, exit);
        let status = match exit {
            Ok(Ok(0)) => json!({"metadata": {}, "status": "Success"}),
            Ok(Ok(code)) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("command terminated with non-zero exit code: exit status {code}"),
                "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Ok(Err(e)) => failure(&stdx::chain(&e).to_string()),
            Err(_) => failure("the process was lost"),
        };
        let mut message = vec![ERROR];
        message.extend_from_slice(status.to_string().as_bytes());
        let _ = tx.send(Message::Binary(message.into())).await;
        // Clients (gorilla's WebSocket) take an end without the normal code for a broken stream.
        let normal = CloseFrame {
            code: CloseCode::Normal,
            reason: "".into(),
        };
        let _ = tx.send(Message::Close(Some(normal))).await;
    };
    let send = async move {
        while let Some(message) = rx.recv().await {
            let last = message.is_close();
            if sink.send(message).await.is_err() || last {
                let _ = sink.close().await;
                return;
            }
        }
    };
    tokio::select! {
        // Dropping the other arm drops the session's pipes: the process sees its streams closed.
        _ = async { tokio::join!(output, send) } => {}
        // Only a close frame or a broken connection ends the input, and then nobody reads any more.
        () = input => {}
    }
}

fn failure(message: &str) -> serde_json::Value {
    json!({"metadata": {}, "status": "Failure", "message": message, "reason": "InternalError", "code": 500})
}

async fn pump(stream: Option<std::pin::Pin<Box<dyn AsyncRead + Send>>>, channel: u8, tx: mpsc::Sender<Message>) {
    let Some(mut stream) = stream else { return };
    let mut buffer = vec![0; CHUNK + 1];
    buffer[0] = channel;
    loop {
        match stream.read(&mut buffer[1..]).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                if tx
                    .send(Message::Binary(Bytes::copy_from_slice(&buffer[..=n])))
                    .await
                    .is_err()
                {
                    return;
                }
            }
        }
    }
}

//! Logs and commands of containers: `pods/log` as a stream, `pods/exec` over a WebSocket of its own.
//!
//! The WebSocket speaks `v5.channel.k8s.io`: the first byte of each message names the channel (0 stdin, 1 stdout,
//! 2 stderr, 3 the final Status, 255 end of a channel). It needs a connection to take over, so it works with
//! [`Client::https`](crate::Client::https) only.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::header;
use k8s_openapi::api::core::v1::Pod;
use rustls_pki_types::ServerName;
use serde::Deserialize;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use crate::client::Client;
use crate::https::Dial;
use crate::resource::query;
use crate::{ApiStatus, Body, BoxError, Error, ErrorKind, ResourceId};

const PROTOCOL: &str = "v5.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const CLOSE: u8 = 255;
/// Output kept; a command that prints more fails.
const OUTPUT_BYTES_MAX: usize = 64 << 20;
const MESSAGE_BYTES_MAX: usize = 8 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How to open connections that are not pooled.
#[derive(Clone)]
pub(crate) struct Upgrades {
    pub dial: Arc<dyn Dial>,
    pub tls: Arc<rustls::ClientConfig>,
    pub host: String,
    pub port: u16,
}

/// What a command printed and how it ended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Output {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code; 0 is success.
    pub exit_code: i32,
}

/// Which lines of a log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogParams {
    /// The container; empty if the pod has one.
    pub container: String,
    /// Go on as new lines come.
    pub follow: bool,
    /// The container's run before the present one.
    pub previous: bool,
    /// Only the last lines; `None` for all.
    pub tail_lines: Option<u32>,
}

#[derive(Deserialize)]
struct Ending {
    #[serde(default)]
    status: String,
    #[serde(flatten)]
    rest: ApiStatus,
}

impl Client {
    /// The log of a container as a stream of bytes.
    pub async fn logs(&self, namespace: &str, pod: &str, params: &LogParams) -> Result<Body, Error> {
        let tail = params.tail_lines.map(|n| n.to_string()).unwrap_or_default();
        let flag = |on: bool| if on { "true" } else { "" };
        let path = ResourceId::of::<Pod>().path(Some(namespace), Some(pod), Some("log"))
            + &query([
                ("container", params.container.as_str()),
                ("follow", flag(params.follow)),
                ("previous", flag(params.previous)),
                ("tailLines", &tail),
            ]);
        self.stream(&path).await
    }

    /// Runs a command in a container to its end, with `stdin` as its whole input. `container` may be empty if the pod
    /// has one. A command that exits with another code than 0 is no error.
    /// # Errors
    /// `Status` if the server refuses or the command cannot be started, `Config` on a local client.
    /// # Cancel safety
    /// Dropping the future closes the connection; the command may live on until it writes.
    pub async fn exec(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        command: &[&str],
        stdin: Option<Bytes>,
    ) -> Result<Output, Error> {
        let flag = |on: bool| if on { "true" } else { "" };
        let mut pairs = vec![
            ("container", container),
            ("stdin", flag(stdin.is_some())),
            ("stdout", "true"),
            ("stderr", "true"),
        ];
        pairs.extend(command.iter().map(|word| ("command", *word)));
        let path = ResourceId::of::<Pod>().path(Some(namespace), Some(pod), Some("exec")) + &query(pairs);
        let operation = format!("EXEC {path}");
        let transport = |e: BoxError| Error::new(operation.as_str(), ErrorKind::Transport(e));
        let Some(upgrades) = self.upgrades() else {
            let (what, source) = ("exec needs an https client", "the client is in process".into());
            return Err(Error::new(operation, ErrorKind::Config { what, source }));
        };
        let connect = async {
            let stream = upgrades
                .dial
                .dial(&upgrades.host, upgrades.port)
                .await
                .map_err(|e| transport(e.into()))?;
            let name = ServerName::try_from(upgrades.host.clone()).map_err(|e| transport(e.into()))?;
            let tls = tokio_rustls::TlsConnector::from(upgrades.tls.clone());
            let stream = tls.connect(name, stream).await.map_err(|e| transport(e.into()))?;
            let mut request = self
                .absolute(&path)
                .into_client_request()
                .map_err(|e| transport(e.into()))?;
            let headers = request.headers_mut();
            headers.insert(
                header::SEC_WEBSOCKET_PROTOCOL,
                header::HeaderValue::from_static(PROTOCOL),
            );
            if let Some(value) = self.authorization() {
                headers.insert(header::AUTHORIZATION, value.clone());
            }
            let limits = WebSocketConfig::default().max_message_size(Some(MESSAGE_BYTES_MAX));
            match tokio_tungstenite::client_async_with_config(request, stream, Some(limits)).await {
                Ok((socket, _)) => Ok(socket),
                Err(WsError::Http(response)) => {
                    let (parts, body) = response.into_parts();
                    Err(crate::client::failure(
                        parts.status,
                        &body.unwrap_or_default(),
                        operation.clone(),
                    ))
                }
                Err(error) => Err(transport(error.into())),
            }
        };
        let mut socket = match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
            Ok(socket) => socket?,
            Err(_) => return Err(Error::new(operation.as_str(), ErrorKind::Timeout(CONNECT_TIMEOUT))),
        };
        if let Some(input) = stdin {
            for chunk in input.chunks(32 << 10) {
                let message = [&[STDIN], chunk].concat();
                socket
                    .send(Message::Binary(message.into()))
                    .await
                    .map_err(|e| transport(e.into()))?;
            }
            let end = Bytes::from_static(&[CLOSE, STDIN]);
            socket
                .send(Message::Binary(end))
                .await
                .map_err(|e| transport(e.into()))?;
        }
        let mut output = Output::default();
        while let Some(message) = socket.next().await {
            let data = match message.map_err(|e| transport(e.into()))? {
                Message::Binary(data) => data,
                Message::Close(_) => break,
                Message::Text(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            };
            let Some((channel, rest)) = data.split_first() else {
                continue;
            };
            match *channel {
                STDOUT => output.stdout.extend_from_slice(rest),
                STDERR => output.stderr.extend_from_slice(rest),
                STATUS => {
                    output.exit_code = ending(rest, &operation)?;
                    let _ = socket.close(None).await;
                    return Ok(output);
                }
                _ => {}
            }
            if output.stdout.len() + output.stderr.len() > OUTPUT_BYTES_MAX {
                return Err(Error::new(
                    operation.as_str(),
                    ErrorKind::TooLarge {
                        limit: OUTPUT_BYTES_MAX,
                    },
                ));
            }
        }
        Err(transport(
            "the stream ended without saying how the command ended".into(),
        ))
    }
}

/// The exit code in the final Status.
fn ending(json: &[u8], operation: &str) -> Result<i32, Error> {
    let ending: Ending = serde_json::from_slice(json).map_err(|e| Error::new(operation, ErrorKind::Decode(e)))?;
    if ending.status == "Success" {
        return Ok(0);
    }
    let causes = ending.rest.details.iter().flat_map(|d| &d.causes);
    let code = causes
        .filter(|c| c.reason == "ExitCode")
        .find_map(|c| c.message.parse().ok());
    code.ok_or_else(|| Error::new(operation, ErrorKind::Status(Box::new(ending.rest))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_final_status_gives_the_exit_code_or_the_failure() {
        assert_eq!(ending(br#"{"metadata":{},"status":"Success"}"#, "x").unwrap(), 0);
        let failed = br#"{"metadata":{},"status":"Failure","reason":"NonZeroExitCode","message":"exit code 3",
            "details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#;
        assert_eq!(ending(failed, "x").unwrap(), 3);
        let broken = br#"{"metadata":{},"status":"Failure","message":"no such file","code":500}"#;
        assert_eq!(
            stdx::chain(&ending(broken, "EXEC x").unwrap_err()).to_string(),
            "EXEC x: no such file"
        );
    }
}

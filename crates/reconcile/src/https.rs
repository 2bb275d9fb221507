//! The HTTPS side of the client: one pool, HTTP/2 where the server speaks it, client certificate or token.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use http::{HeaderValue, Uri};
use http_body_util::BodyExt;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tower::Service;

use crate::exec::Upgrades;
use crate::{Body, BoxError, Error, ErrorKind, LocalService};

/// A connection slower than this is given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an idle connection is asked whether it lives, so that a watch notices a dead peer.
const PING_INTERVAL: Duration = Duration::from_secs(15);
/// Each watch keeps at most this much unread.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;

/// A byte stream.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Opens byte streams to the server, for callers that are not on its network.
#[async_trait]
pub trait Dial: Send + Sync {
    /// Connects to `host` (no brackets around IPv6) and `port`.
    async fn dial(&self, host: &str, port: u16) -> io::Result<Box<dyn Io>>;
}

/// Plain TCP through the process's own network.
#[derive(Debug, Clone, Copy, Default)]
pub struct TcpDial;

#[async_trait]
impl Dial for TcpDial {
    async fn dial(&self, host: &str, port: u16) -> io::Result<Box<dyn Io>> {
        let stream = tokio::net::TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }
}

/// Always connects to one address, whatever the URL says.
#[derive(Debug, Clone, Copy)]
pub struct FixedDial(pub SocketAddr);

#[async_trait]
impl Dial for FixedDial {
    async fn dial(&self, _host: &str, _port: u16) -> io::Result<Box<dyn Io>> {
        let stream = tokio::net::TcpStream::connect(self.0).await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }
}

/// Who the client is.
#[derive(Clone)]
pub enum Identity {
    /// A client certificate chain and its key, PEM.
    ClientCert {
        /// Certificate chain, leaf first.
        cert_pem: String,
        /// Private key.
        key_pem: String,
    },
    /// A bearer token.
    Token(String),
    /// Nobody.
    Anonymous,
}

/// Where the server is and how to trust it.
#[derive(Clone)]
pub struct HttpsConfig {
    /// `https://host[:port]`.
    pub server: String,
    /// The CAs that may have signed the server's certificate, PEM.
    pub ca_pem: String,
    /// Who the client is.
    pub identity: Identity,
    /// How to reach the server; `None` for plain TCP.
    pub connector: Option<Arc<dyn Dial>>,
}

pub(crate) struct Built {
    pub service: LocalService,
    pub base: String,
    pub authorization: Option<HeaderValue>,
    pub upgrades: Upgrades,
}

pub(crate) fn build(config: HttpsConfig) -> Result<Built, Error> {
    let operation = format!("configure the client for {}", config.server);
    let bad = |what, source: BoxError| Error::new(operation.clone(), ErrorKind::Config { what, source });
    let uri: Uri = config
        .server
        .trim_end_matches('/')
        .parse()
        .map_err(|e| bad("server is no URL", Box::new(e)))?;
    if uri.scheme_str() != Some("https") || uri.host().is_none() {
        return Err(bad("server must be https://host[:port]", config.server.clone().into()));
    }
    let authorization = match &config.identity {
        Identity::Token(token) => {
            let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim()))
                .map_err(|e| bad("token cannot be sent in a header", Box::new(e)))?;
            value.set_sensitive(true);
            Some(value)
        }
        Identity::ClientCert { .. } | Identity::Anonymous => None,
    };
    let mut tls = tls_config(&config).map_err(|(what, source)| bad(what, source))?;
    let dial = config.connector.unwrap_or_else(|| Arc::new(TcpDial));
    let upgrades = Upgrades {
        dial: dial.clone(),
        // Without ALPN: an upgrade is HTTP/1.1.
        tls: Arc::new(tls.clone()),
        host: uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned(),
        port: uri.port_u16().unwrap_or(443),
    };
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let connector = Connector {
        dial,
        tls: tokio_rustls::TlsConnector::from(Arc::new(tls)),
    };
    let pool = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .http2_initial_stream_window_size(STREAM_WINDOW_BYTES)
        .http2_initial_connection_window_size(STREAM_WINDOW_BYTES * 16)
        .http2_keep_alive_interval(PING_INTERVAL)
        .http2_keep_alive_timeout(PING_INTERVAL)
        .build::<_, Body>(connector);
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let pool = pool.clone();
        async move {
            let response = pool.request(request).await?;
            Ok::<_, BoxError>(response.map(|body| Body::new(body.map_err(|e| Box::new(e) as BoxError))))
        }
    });
    let base = format!("https://{}", uri.authority().map_or("", |a| a.as_str()));
    Ok(Built {
        service: LocalService::new(service),
        base,
        authorization,
        upgrades,
    })
}

/// A TLS client configuration that trusts only the CAs given.
pub(crate) fn tls_config(config: &HttpsConfig) -> Result<rustls::ClientConfig, (&'static str, BoxError)> {
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(config.ca_pem.as_bytes()) {
        let cert = cert.map_err(|e| ("CA bundle is no PEM", e.into()))?;
        roots
            .add(cert)
            .map_err(|e| ("CA certificate cannot be used", e.into()))?;
    }
    if roots.is_empty() {
        return Err(("CA bundle holds no certificate", "nothing would be trusted".into()));
    }
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| ("TLS versions", e.into()))?
        .with_root_certificates(roots);
    match &config.identity {
        Identity::ClientCert { cert_pem, key_pem } => {
            let chain = CertificateDer::pem_slice_iter(cert_pem.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| ("client certificate is no PEM", e.into()))?;
            let key =
                PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|e| ("client key is no PEM", e.into()))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|e| ("client certificate cannot be used", e.into()))
        }
        Identity::Token(_) | Identity::Anonymous => Ok(builder.with_no_client_auth()),
    }
}

#[derive(Clone)]
struct Connector {
    dial: Arc<dyn Dial>,
    tls: tokio_rustls::TlsConnector,
}

impl Service<Uri> for Connector {
    type Response = TlsStream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<TlsStream, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let host = uri
                .host()
                .ok_or("URL without host")?
                .trim_matches(['[', ']'])
                .to_owned();
            let port = uri.port_u16().unwrap_or(443);
            let name = ServerName::try_from(host.clone())?;
            let connect = async {
                let stream = this.dial.dial(&host, port).await?;
                this.tls.connect(name, stream).await
            };
            let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect)
                .await
                .map_err(|_| format!("no connection to {host}:{port} within {} s", CONNECT_TIMEOUT.as_secs()))??;
            Ok(TlsStream(TokioIo::new(stream)))
        })
    }
}

/// The encrypted stream, as hyper wants to see it.
struct TlsStream(TokioIo<tokio_rustls::client::TlsStream<Box<dyn Io>>>);

impl Connection for TlsStream {
    fn connected(&self) -> Connected {
        let (_, session) = self.0.inner().get_ref();
        let connected = Connected::new();
        if session.alpn_protocol() == Some(b"h2") {
            connected.negotiated_h2()
        } else {
            connected
        }
    }
}

impl hyper::rt::Read for TlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for TlsStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

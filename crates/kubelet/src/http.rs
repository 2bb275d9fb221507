//! One HTTP GET to a pod, for probes and hooks: no redirects, certificates unchecked (as upstream's), bounded body.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::{
    api::core::v1::{Container, HTTPGetAction},
    apimachinery::pkg::util::intstr::IntOrString,
};
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::config::PodDialer;

/// How much of an answer is kept for a message.
const BODY_MAX: usize = 10 * 1024;

#[derive(Debug, Error)]
pub enum GetError {
    #[error("port {port} is not a port of container {container}")]
    Port { port: String, container: String },
    #[error("{0} is not an address")]
    Host(String),
    #[error("Get \"{url}\"")]
    Connect {
        url: String,
        #[source]
        source: io::Error,
    },
    #[error("Get \"{url}\"")]
    Tls {
        url: String,
        #[source]
        source: io::Error,
    },
    #[error("Get \"{url}\"")]
    Http {
        url: String,
        #[source]
        source: hyper::Error,
    },
    #[error("{what} is not valid")]
    Request {
        what: String,
        #[source]
        source: http::Error,
    },
}

/// A port by number, or by the container's name for it.
///
/// # Errors
/// `Port` if there is none.
pub fn port(p: &IntOrString, c: &Container) -> Result<u16, GetError> {
    let number = match p {
        IntOrString::Int(n) => u16::try_from(*n).ok(),
        IntOrString::String(s) => s.parse().ok().or_else(|| {
            let named = c.ports.iter().flatten().find(|p| p.name.as_deref() == Some(s))?;
            u16::try_from(named.container_port).ok()
        }),
    };
    number.filter(|p| *p > 0).ok_or_else(|| {
        let port = match p {
            IntOrString::Int(n) => n.to_string(),
            IntOrString::String(s) => s.clone(),
        };
        GetError::Port {
            port,
            container: c.name.clone(),
        }
    })
}

/// Where requests of one pod go.
pub struct Target<'a> {
    pub dialer: &'a dyn PodDialer,
    pub sandbox_id: &'a str,
    pub pod_ip: IpAddr,
}

/// Status code and the beginning of the body. The caller bounds the time.
///
/// # Errors
/// Anything but an answer.
pub async fn get(t: &Target<'_>, a: &HTTPGetAction, c: &Container, agent: &str) -> Result<(u16, String), GetError> {
    let port = port(&a.port, c)?;
    let tls = a.scheme.as_deref() == Some("HTTPS");
    let path = a.path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/");
    let path = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    };
    let host = a.host.as_deref().filter(|h| !h.is_empty());
    let ip = match host {
        Some(h) => h.parse::<IpAddr>().map_err(|_| GetError::Host(h.to_owned()))?,
        None => t.pod_ip,
    };
    let at = SocketAddr::new(ip, port);
    let url = format!("{}://{at}{path}", if tls { "https" } else { "http" });
    let mut request = http::Request::get(&path)
        .header(http::header::HOST, at.to_string())
        .header(http::header::USER_AGENT, agent)
        .header(http::header::ACCEPT, "*/*")
        .header(http::header::CONNECTION, "close");
    for h in a.http_headers.iter().flatten() {
        if h.name.eq_ignore_ascii_case("host")
            && let Some(map) = request.headers_mut()
        {
            map.remove(http::header::HOST);
        }
        request = request.header(&h.name, &h.value);
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|source| GetError::Request {
            what: url.clone(),
            source,
        })?;
    let connect = |source| GetError::Connect {
        url: url.clone(),
        source,
    };
    let stream = match host {
        Some(_) => tokio::net::TcpStream::connect(at).await.map_err(connect)?,
        None => t.dialer.dial(t.sandbox_id, at).await.map_err(connect)?,
    };
    if tls {
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|e| GetError::Tls {
                url: url.clone(),
                source: io::Error::other(e),
            })?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone))
            .with_no_client_auth();
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(ServerName::IpAddress(ip.into()), stream)
            .await
            .map_err(|source| GetError::Tls {
                url: url.clone(),
                source,
            })?;
        exchange(stream, request, &url).await
    } else {
        exchange(stream, request, &url).await
    }
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    request: http::Request<Empty<Bytes>>,
    url: &str,
) -> Result<(u16, String), GetError> {
    let http = |source| GetError::Http {
        url: url.to_owned(),
        source,
    };
    let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(http)?;
    let exchange = async {
        let answer = send.send_request(request).await.map_err(http)?;
        let code = answer.status().as_u16();
        let body = Limited::new(answer.into_body(), BODY_MAX)
            .collect()
            .await
            .map(|b| b.to_bytes())
            .unwrap_or_default();
        Ok((code, String::from_utf8_lossy(&body).into_owned()))
    };
    tokio::pin!(exchange);
    tokio::select! {
        // Both arms may be dropped at any point: the connection is closed after one exchange.
        done = &mut exchange => done,
        ended = connection => match ended {
            Ok(()) => exchange.await,
            Err(e) => Err(http(e)),
        },
    }
}

/// Accepts every certificate: a probe asks whether something answers, not who it is.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

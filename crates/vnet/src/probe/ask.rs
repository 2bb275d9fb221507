//! One question of a probe.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::dial;

/// A connection from 168.63.129.16 inside the namespace pinned at `netns`.
pub async fn connect(netns: &Path, to: SocketAddr) -> io::Result<TcpStream> {
    let ns = linux::netns::open(netns).map_err(io::Error::other)?;
    let stream = TcpStream::from_std(dial::start(&ns, to)?)?;
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

/// Whether a GET of `path` is answered with 200.
pub async fn http(netns: &Path, to: SocketAddr, path: &str) -> io::Result<bool> {
    get(connect(netns, to).await?, to, path).await
}

/// The same over TLS, whoever the server says it is.
pub async fn https(netns: &Path, to: SocketAddr, path: &str) -> io::Result<bool> {
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_no_client_auth();
    let tcp = connect(netns, to).await?;
    let tls = TlsConnector::from(Arc::new(config))
        .connect(ServerName::from(to.ip()), tcp)
        .await?;
    get(tls, to, path).await
}

async fn get(stream: impl AsyncRead + AsyncWrite + Unpin, to: SocketAddr, path: &str) -> io::Result<bool> {
    let request = Request::get(path)
        .header(header::HOST, to.to_string())
        .header(header::USER_AGENT, "Load Balancer Agent")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(io::Error::other)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    let mut response = pin!(sender.send_request(request));
    // The connection lives as long as the question: nobody reads the body. If it ends first, what it brought is there.
    let response = tokio::select! {
        response = &mut response => response,
        _ = connection => response.await,
    };
    Ok(response.map_err(io::Error::other)?.status() == StatusCode::OK)
}

/// Takes every certificate: a probe asks an address, and what it learns is whether that answers.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

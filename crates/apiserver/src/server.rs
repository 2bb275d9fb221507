//! The listener of one cluster: TLS, HTTP/1.1 and HTTP/2, users from client certificates.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::audit::Peer;
use crate::auth::UserInfo;
use crate::cluster::Cluster;
use crate::{BoxError, router};

/// Connections of one cluster at a time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 16_384;
/// Time until the next request's headers on an HTTP/1 connection, idle time included.
const HEADERS: Duration = Duration::from_secs(180);
/// Time for a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Streams of one HTTP/2 connection at a time: watches of a busy controller.
const STREAMS_MAX: u32 = 1000;
/// Pause after `accept` fails (out of file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts until the cluster stops.
pub async fn serve(cluster: Arc<Cluster>, listener: TcpListener) {
    let acceptor = TlsAcceptor::from(cluster.pki.server.clone());
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // Cancel safety: a permit that is not used is given back, and `accept` takes nothing when cancelled.
        let accepted = tokio::select! {
            () = cluster.shutdown.wait() => return,
            accepted = async {
                let permit = slots.clone().acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
        };
        match accepted {
            (Ok(permit), Ok((stream, peer))) => {
                let (cluster, acceptor) = (cluster.clone(), acceptor.clone());
                tokio::spawn(async move {
                    let shutdown = cluster.shutdown.clone();
                    // Cancel safety: the connection is dropped as a whole.
                    tokio::select! {
                        () = shutdown.wait() => {}
                        () = connection(cluster, acceptor, stream, peer.ip()) => {}
                    }
                    drop(permit);
                });
            }
            (_, Err(error)) => {
                tracing::warn!(cluster = cluster.name(), %error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            (Err(_), _) => return,
        }
    }
}

async fn connection(cluster: Arc<Cluster>, acceptor: TlsAcceptor, stream: TcpStream, peer: IpAddr) {
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(cluster = cluster.name(), %error, "a TLS handshake failed");
            return;
        }
        Err(_) => return,
    };
    let user = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .and_then(|c| certificate_user(c));
    let service = hyper::service::service_fn(move |request: http::Request<Incoming>| {
        let (cluster, user) = (cluster.clone(), user.clone());
        async move {
            let mut request = request.map(|body| body.map_err(|e| Box::new(e) as BoxError).boxed_unsync());
            request.extensions_mut().insert(Peer(peer));
            Ok::<_, std::convert::Infallible>(router::handle(cluster, user, request).await)
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(Duration::from_secs(30));
    if let Err(error) = builder
        .serve_connection_with_upgrades(TokioIo::new(stream), service)
        .await
    {
        tracing::debug!(error, "a connection ended with an error");
    }
}

/// The user of a client certificate that TLS has already verified: CN and O of its subject.
fn certificate_user(certificate: &[u8]) -> Option<UserInfo> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let subject = parsed.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject
        .iter_organization()
        .filter_map(|o| o.as_str().ok().map(str::to_owned));
    Some(UserInfo::new(name, groups.collect::<Vec<_>>()))
}

//! Sockets: TLS, HTTP 1 and 2, body limits, ARM's headers on every reply.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use ipnet::IpNet;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use reconcile::{Client, Informers};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use stdx::{SharedClock, Shutdown};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinHandle};
use tokio_rustls::TlsAcceptor;

use crate::{
    app::{Actions, App, Identity, StartError, token_key},
    dispatch,
    error::Fault,
    groups,
    home::Home,
    http::{Reply, Request, pairs},
    network, operations,
};

/// Largest body that is read. ARM's own limit.
pub const BODY_BYTES_MAX: usize = 4 << 20;
/// Connections at once; more wait in the listener's queue.
const CONNECTIONS_MAX: usize = 512;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Of a body that is too large, so much is read before the connection is given up.
const DRAINED_BYTES_MAX: usize = 64 << 20;
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Certificates of the front door live a year; a start makes a new one.
const COLLECT_EVERY: Duration = Duration::from_secs(600);

/// Where the server's certificate comes from.
#[derive(Clone, Debug)]
pub enum TlsSource {
    /// A chain and its key, PEM.
    Given { cert_pem: String, key_pem: String },
    /// A CA, PEM: a certificate for these names and addresses is issued at the start.
    Ca {
        cert_pem: String,
        key_pem: String,
        names: Vec<String>,
    },
}

/// What [`serve`] needs.
pub struct ArmConfig {
    /// The home cluster, as a user that may do everything there.
    pub home: Client,
    pub informers: Informers,
    pub listener: TcpListener,
    pub tls: TlsSource,
    pub identity: Identity,
    /// Pool of public addresses; `None` refuses public addresses.
    pub public_pool: Option<IpNet>,
    /// Service tags that rules may name.
    pub service_tags: vnet_model::service_tags::ServiceTags,
    pub actions: Arc<dyn Actions>,
    pub clock: SharedClock,
    pub shutdown: Shutdown,
}

/// A running front door.
#[derive(Debug)]
pub struct Server {
    pub local_addr: SocketAddr,
    /// Ends after `shutdown`, with every task of the server.
    pub task: JoinHandle<()>,
}

/// Starts the front door and its controllers (addresses, resource groups, old operations).
/// # Errors: the certificate cannot be used, or home does not give the token key.
pub async fn serve(config: ArmConfig) -> Result<Server, StartError> {
    let local_addr = config.listener.local_addr().map_err(StartError::Listener)?;
    let base_url = config.identity.base_url.clone();
    let tls = tls_config(&config.tls).map_err(|problem| StartError::Certificate { base_url, problem })?;
    let key = token_key(&config.home).await?;
    let home = Home::new(config.home);
    let app = Arc::new(App {
        home: home.clone(),
        identity: config.identity,
        key,
        actions: config.actions,
        clock: config.clock,
        public_pool: config.public_pool,
        service_tags: config.service_tags,
    });
    let shutdown = config.shutdown;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(network::run(
        home.clone(),
        config.informers.clone(),
        config.public_pool,
        shutdown.clone(),
    ));
    tasks.spawn(groups::run(home, config.informers, shutdown.clone()));
    tasks.spawn(collect(app.clone(), shutdown.clone()));
    tasks.spawn(accept(config.listener, TlsAcceptor::from(Arc::new(tls)), app, shutdown));
    let task = tokio::spawn(async move { while tasks.join_next().await.is_some() {} });
    Ok(Server { local_addr, task })
}

fn tls_config(source: &TlsSource) -> Result<ServerConfig, String> {
    let text = |what: &str, e: &dyn std::fmt::Display| format!("{what}: {e}");
    let (cert_pem, key_pem) = match source {
        TlsSource::Given { cert_pem, key_pem } => (cert_pem.clone(), key_pem.clone()),
        TlsSource::Ca {
            cert_pem,
            key_pem,
            names,
        } => {
            let ca_key = KeyPair::from_pem(key_pem).map_err(|e| text("CA key", &e))?;
            let issuer = Issuer::from_ca_cert_pem(cert_pem, ca_key).map_err(|e| text("CA certificate", &e))?;
            let mut params = CertificateParams::new(names.clone()).map_err(|e| text("names", &e))?;
            params.distinguished_name.push(DnType::CommonName, "oaks arm");
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            params.use_authority_key_identifier_extension = true;
            let key = KeyPair::generate().map_err(|e| text("key", &e))?;
            let cert = params.signed_by(&key, &issuer).map_err(|e| text("certificate", &e))?;
            (format!("{}{cert_pem}", cert.pem()), key.serialize_pem())
        }
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(cert_pem.as_bytes()).collect();
    let chain = chain.map_err(|e| text("certificate", &e))?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|e| text("key", &e))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| text("protocols", &e))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|e| text("certificate", &e))?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tls)
}

async fn collect(app: Arc<App>, shutdown: Shutdown) {
    while shutdown.or_stop(tokio::time::sleep(COLLECT_EVERY)).await.is_some() {
        let hour_ago = app
            .clock
            .now()
            .checked_sub(Duration::from_secs(3600))
            .unwrap_or(std::time::UNIX_EPOCH);
        let hour_ago = apimachinery::time::rfc3339(apimachinery::time::timestamp(hour_ago));
        if let Err(e) = operations::collect(&app, &hour_ago).await {
            tracing::warn!(error = %stdx::chain(&e), "old operations were not collected");
        }
    }
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, app: Arc<App>, shutdown: Shutdown) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        // Cancel safe: accept loses no connection, a permit that is not used is given back.
        let (permit, stream) = tokio::select! {
            () = shutdown.wait() => break,
            next = async {
                let permit = room.clone().acquire_owned().await;
                (permit, listener.accept().await)
            } => match next {
                (Ok(permit), Ok((stream, _))) => (permit, stream),
                (Err(_), _) => break,
                (_, Err(e)) => {
                    tracing::warn!(error = %e, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            Some(_) = tasks.join_next() => continue,
        };
        let (tls, app, shutdown) = (tls.clone(), app.clone(), shutdown.clone());
        tasks.spawn(async move {
            let _permit = permit;
            let _ = stream.set_nodelay(true);
            let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await else {
                return;
            };
            let service = service_fn(move |request| {
                let app = app.clone();
                async move { Ok::<_, std::convert::Infallible>(respond(&app, request).await) }
            });
            let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            tokio::pin!(connection);
            // Cancel safe: the connection lives on in the second arm until its current request is answered.
            tokio::select! {
                _ = connection.as_mut() => {}
                () = shutdown.wait() => {
                    connection.as_mut().graceful_shutdown();
                    let _ = tokio::time::timeout(Duration::from_secs(5), connection).await;
                }
            }
        });
    }
    while tasks.join_next().await.is_some() {}
}

async fn respond(app: &App, request: http::Request<Incoming>) -> http::Response<Full<Bytes>> {
    let (parts, body) = request.into_parts();
    let started = std::time::Instant::now();
    let reply = match read(&parts, body).await {
        Ok(request) => dispatch::handle(app, &request).await,
        Err(fault) => fault.into(),
    };
    tracing::debug!(method = %parts.method, path = parts.uri.path(), status = reply.status.as_u16(),
        elapsed_ms = started.elapsed().as_millis() as u64, "request");
    finish(reply, &parts.headers)
}

async fn read(parts: &http::request::Parts, body: Incoming) -> Result<Request, Fault> {
    let too_large = || {
        let message = format!("The request content is larger than {BODY_BYTES_MAX} bytes.");
        Fault::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestContentTooLarge", message)
    };
    let body = match tokio::time::timeout(BODY_TIMEOUT, collect_body(body)).await {
        Ok(Ok(Some(body))) => body,
        Ok(Ok(None)) => return Err(too_large()),
        Ok(Err(_)) => {
            return Err(Fault::bad_request(
                "InvalidRequestContent",
                "The request content ended early.",
            ));
        }
        Err(_) => {
            let message = "The request content did not arrive in time.";
            return Err(Fault::new(StatusCode::REQUEST_TIMEOUT, "RequestTimeout", message));
        }
    };
    let text = |name: HeaderName| parts.headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let query = pairs(parts.uri.query().unwrap_or_default())
        .into_iter()
        .map(|(k, v)| (k.to_ascii_lowercase(), v))
        .collect();
    Ok(Request {
        method: parts.method.clone(),
        path: parts.uri.path().to_owned(),
        query,
        if_match: text(header::IF_MATCH),
        if_none_match: text(header::IF_NONE_MATCH),
        authorization: text(header::AUTHORIZATION),
        body,
    })
}

/// The whole body; `None` if it is larger than [`BODY_BYTES_MAX`]. The rest of such a body is read and thrown away up to a
/// bound: a client that is still sending when the answer comes sees a broken connection instead of the answer.
async fn collect_body(mut body: Incoming) -> Result<Option<Bytes>, hyper::Error> {
    let (mut kept, mut total) = (Vec::new(), 0_usize);
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            total = total.saturating_add(data.len());
            if total <= BODY_BYTES_MAX {
                kept.extend_from_slice(&data);
            } else if total > DRAINED_BYTES_MAX {
                break;
            }
        }
    }
    Ok((total <= BODY_BYTES_MAX).then(|| kept.into()))
}

/// Adds the headers that ARM's clients log and correlate by.
fn finish(reply: Reply, asked: &HeaderMap) -> http::Response<Full<Bytes>> {
    let body = reply
        .body
        .as_ref()
        .map(|b| Bytes::from(b.to_string()))
        .unwrap_or_default();
    let mut response = http::Response::new(Full::new(body));
    *response.status_mut() = reply.status;
    let headers = response.headers_mut();
    if reply.body.is_some() {
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json; charset=utf-8"),
        );
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    let id = uuid::Uuid::new_v4().to_string();
    let correlation = asked.get("x-ms-correlation-request-id").cloned();
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert("x-ms-request-id", id.clone());
        headers.insert("x-ms-routing-request-id", id.clone());
        headers.insert("x-ms-correlation-request-id", correlation.unwrap_or(id));
    }
    if asked
        .get("x-ms-return-client-request-id")
        .is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"true"))
        && let Some(client) = asked.get("x-ms-client-request-id")
    {
        headers.insert("x-ms-client-request-id", client.clone());
    }
    for (name, value) in reply.headers {
        if let (Ok(name), Ok(value)) = (
            name.to_ascii_lowercase().parse::<HeaderName>(),
            HeaderValue::from_str(&value),
        ) {
            headers.insert(name, value);
        }
    }
    response
}

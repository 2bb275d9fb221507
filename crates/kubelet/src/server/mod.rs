//! The kubelet API: TLS on a listener that the caller made, clients by certificate only.
//!
//! Everyone who presents a certificate of the cluster's CA gets through the handshake; only the API server's identity
//! (`kube-apiserver-kubelet-client`) and `system:masters` get an answer. Bearer tokens are not looked at. Logs, exec,
//! attach, pods and stats are served; port-forward is refused by name.

pub mod logs;
mod stats;
mod streams;

use std::{convert::Infallible, net::TcpListener, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::json;
use stdx::Shutdown;
use tokio::{sync::Semaphore, task::JoinSet, time::timeout};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    config::Serving,
    kubelet::{Core, KubeletError, PodShown},
};

/// Connections at one time; logs being followed and exec sessions hold one each.
const CONNECTIONS_MAX: usize = 1024;
/// A handshake or a request's head may take so long.
const HEAD_MAX: Duration = Duration::from_secs(15);

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Body = UnsyncBoxBody<Bytes, BoxError>;

/// A refusal with the text that `kubectl` shows.
pub(crate) struct Refused(StatusCode, String);

impl Refused {
    fn not_found(text: impl Into<String>) -> Self {
        Self(StatusCode::NOT_FOUND, text.into())
    }

    fn bad(text: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, text.into())
    }
}

/// Accepts until shutdown; open connections end with it.
pub async fn serve(core: Arc<Core>, listener: TcpListener, shutdown: Shutdown) -> Result<(), KubeletError> {
    let serving = core.config.serving.as_ref().ok_or(KubeletError::NoServing)?;
    let acceptor = TlsAcceptor::from(Arc::new(tls(serving)?));
    listener.set_nonblocking(true).map_err(KubeletError::Listen)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(KubeletError::Listen)?;
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let permit = tokio::select! {
            // Cancel safe: a permit or a connection not taken stays where it is.
            permit = room.clone().acquire_owned() => permit,
            () = shutdown.wait() => return Ok(()),
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.wait() => return Ok(()),
        };
        while connections.try_join_next().is_some() {}
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, most likely: waiting is all that helps.
                tracing::warn!(error = %e, "connection not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (core, acceptor) = (core.clone(), acceptor.clone());
        connections.spawn(async move {
            let _permit = permit;
            let _ = stream.set_nodelay(true);
            let Ok(Ok(tls)) = timeout(HEAD_MAX, acceptor.accept(stream)).await else {
                return;
            };
            let allowed = tls
                .get_ref()
                .1
                .peer_certificates()
                .and_then(|c| c.first())
                .is_some_and(|c| may(c));
            let service = service_fn(move |request| {
                let core = core.clone();
                async move { Ok::<_, Infallible>(answer(core, request, allowed).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_MAX)
                .serve_connection(TokioIo::new(tls), service)
                .with_upgrades();
            if let Err(e) = connection.await {
                tracing::debug!(error = %stdx::chain(&e), "connection ended");
            }
        });
    }
}

fn tls(s: &Serving) -> Result<ServerConfig, KubeletError> {
    let bad = |what: &str| {
        let what = what.to_owned();
        move |e: &dyn std::fmt::Display| KubeletError::Serving {
            reason: format!("{what}: {e}"),
        }
    };
    let mut roots = RootCertStore::empty();
    for ca in CertificateDer::pem_slice_iter(s.client_ca_pem.as_bytes()) {
        roots
            .add(ca.map_err(|e| bad("client CA")(&e))?)
            .map_err(|e| bad("client CA")(&e))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|e| bad("client CA")(&e))?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(s.cert_pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| bad("certificate")(&e))?;
    let key = PrivateKeyDer::from_pem_slice(s.key_pem.as_bytes()).map_err(|e| bad("key")(&e))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| bad("TLS")(&e))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| bad("certificate")(&e))?;
    // Upgrades (exec, attach) are an HTTP/1.1 matter.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Whether the bearer of this (verified) certificate may use the API.
fn may(cert: &CertificateDer<'_>) -> bool {
    let Ok((_, cert)) = X509Certificate::from_der(cert) else {
        return false;
    };
    let subject = cert.subject();
    let master = subject.iter_organization().any(|o| o.as_str() == Ok("system:masters"));
    master
        || subject
            .iter_common_name()
            .any(|c| c.as_str() == Ok("kube-apiserver-kubelet-client"))
}

pub(crate) fn text(code: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    with_type(code, "text/plain; charset=utf-8", body)
}

pub(crate) fn with_type(code: StatusCode, media: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let body = Body::new(Full::new(body.into()).map_err(|never| match never {}));
    let mut response = Response::new(body);
    *response.status_mut() = code;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(media));
    response
}

async fn answer(core: Arc<Core>, request: Request<Incoming>, allowed: bool) -> Response<Body> {
    if !allowed {
        return text(
            StatusCode::FORBIDDEN,
            "Forbidden: the certificate is not the API server's\n",
        );
    }
    match route(core, request).await {
        Ok(response) => response,
        Err(Refused(code, why)) => text(code, why + "\n"),
    }
}

async fn route(core: Arc<Core>, request: Request<Incoming>) -> Result<Response<Body>, Refused> {
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let get = request.method() == Method::GET || request.method() == Method::HEAD;
    match (get, parts.as_slice()) {
        (true, ["healthz"]) => Ok(text(StatusCode::OK, "ok")),
        (true, ["pods"]) => Ok(pods(&core, |_| true)),
        (true, ["runningpods"]) => Ok(pods(&core, |p| p.runtime.sandbox_ready().is_some())),
        (true, ["containerLogs", ns, pod, container]) => logs::serve(core, ns, pod, container, &query).await,
        (true, ["stats", "summary"]) => Ok(stats::summary(&core).await),
        (true, ["metrics", "resource"]) => Ok(stats::resource(&core).await),
        (_, ["exec" | "attach", ns, pod, container]) => {
            let (ns, pod, container) = (ns.to_string(), pod.to_string(), container.to_string());
            streams::serve(core, request, parts[0] == "exec", &ns, &pod, None, &container, &query).await
        }
        (_, ["exec" | "attach", ns, pod, uid, container]) => {
            let (ns, pod, uid, container) = (ns.to_string(), pod.to_string(), uid.to_string(), container.to_string());
            streams::serve(
                core,
                request,
                parts[0] == "exec",
                &ns,
                &pod,
                Some(&uid),
                &container,
                &query,
            )
            .await
        }
        (_, ["portForward", ..]) => Err(Refused(
            StatusCode::NOT_IMPLEMENTED,
            "portForward is not supported by this kubelet".into(),
        )),
        (_, ["run" | "checkpoint" | "configz" | "logs", ..]) => Err(Refused(
            StatusCode::NOT_IMPLEMENTED,
            format!("{} is not supported by this kubelet", parts[0]),
        )),
        _ => Err(Refused::not_found(format!("{} {path} is not served", request.method()))),
    }
}

fn pods(core: &Core, which: impl Fn(&PodShown) -> bool) -> Response<Body> {
    let items: Vec<_> = core
        .shown()
        .into_iter()
        .filter(which)
        .map(|p| {
            let mut pod = (*p.pod).clone();
            pod.status = Some(p.status);
            pod
        })
        .collect();
    let list = json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items});
    with_type(StatusCode::OK, "application/json", list.to_string())
}

fn find(core: &Core, ns: &str, pod: &str, uid: Option<&str>) -> Result<PodShown, Refused> {
    core.find(ns, pod, uid)
        .ok_or_else(|| Refused::not_found(format!("pod \"{pod}\" is not on this node")))
}

/// Decoded query parameters in their order.
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    fn parse(text: &str) -> Self {
        let decode = |s: &str| {
            let mut out = Vec::with_capacity(s.len());
            let bytes = s.as_bytes();
            let mut i = 0;
            while i < bytes.len() {
                let hex = bytes
                    .get(i + 1..i + 3)
                    .and_then(|h| u8::from_str_radix(std::str::from_utf8(h).ok()?, 16).ok());
                match (bytes[i], hex) {
                    (b'+', _) => out.push(b' '),
                    (b'%', Some(b)) => {
                        out.push(b);
                        i += 2;
                    }
                    (b, _) => out.push(b),
                }
                i += 1;
            }
            String::from_utf8_lossy(&out).into_owned()
        };
        let pairs = text.split('&').filter(|p| !p.is_empty());
        Self(
            pairs
                .map(|p| p.split_once('=').unwrap_or((p, "")))
                .map(|(k, v)| (decode(k), decode(v)))
                .collect(),
        )
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    fn all(&self, name: &str) -> Vec<String> {
        self.0
            .iter()
            .filter(|(k, _)| k == name)
            .map(|(_, v)| v.clone())
            .collect()
    }

    fn flag(&self, name: &str) -> bool {
        matches!(self.get(name), Some("1" | "true"))
    }

    /// `None` if absent or empty.
    fn number(&self, name: &str) -> Result<Option<u64>, Refused> {
        match self.get(name).filter(|v| !v.is_empty()) {
            None => Ok(None),
            Some(v) => v
                .parse()
                .map(Some)
                .map_err(|_| Refused::bad(format!("{name}: {v:?} is not a whole number"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_queries() {
        let q = Query::parse("command=sh&command=-c&command=echo+a%20b%2526&stdin=true&tailLines=x");
        assert_eq!(q.all("command"), ["sh", "-c", "echo a b%26"]);
        assert!(q.flag("stdin"));
        assert!(q.number("tailLines").is_err());
        assert!(matches!(q.number("limitBytes"), Ok(None)));
    }
}

//! A real listener: certificates, tokens, HTTP/2, restarts, and connections through to a node.

mod common;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use apiserver::{ApiServer, ApiServerConfig, Body, Cluster, ClusterConfig, DialTarget, Dialer, Stream};
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use store::LocalEngine;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Sends every connection to one port of this host, whatever node it is for.
struct ToPort(u16);

#[async_trait::async_trait]
impl Dialer for ToPort {
    async fn dial(&self, _cluster: &str, _target: DialTarget) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(TcpStream::connect(("127.0.0.1", self.0)).await?))
    }
}

async fn server(dir: &std::path::Path, kubelet: u16) -> Arc<ApiServer> {
    let mut tries = 0;
    let engine = loop {
        // A dropped engine closes on its own thread.
        match LocalEngine::open(&dir.join("store")) {
            Ok(engine) => break engine,
            Err(error) if tries == 2000 => panic!("{error:?}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
        tries += 1;
    };
    ApiServer::new(ApiServerConfig {
        engine,
        dialer: Arc::new(ToPort(kubelet)),
        data_dir: dir.join("clusters"),
        clock: stdx::RealClock::shared(),
    })
}

async fn cluster(api: &ApiServer, name: &str) -> (Arc<Cluster>, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let cluster = api
        .create_cluster(ClusterConfig::new(name, format!("https://127.0.0.1:{port}")))
        .await
        .unwrap();
    cluster.serve(listener);
    (cluster, port)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(ca_pem: &str) -> rustls::RootCertStore {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(ca_pem.as_bytes()).unwrap())
        .unwrap();
    roots
}

fn identity(pair: &(String, String)) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    (
        vec![CertificateDer::from_pem_slice(pair.0.as_bytes()).unwrap()],
        PrivateKeyDer::from_pem_slice(pair.1.as_bytes()).unwrap(),
    )
}

/// Connects with TLS; `cert` is the client's, `ca` the one trusted.
async fn connect(
    port: u16,
    ca: &str,
    cert: Option<&(String, String)>,
    alpn: &str,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let builder = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots(ca));
    let mut config = match cert {
        Some(pair) => {
            let (chain, key) = identity(pair);
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    TlsConnector::from(Arc::new(config))
        .connect(ServerName::try_from("127.0.0.1").unwrap(), stream)
        .await
}

fn get(path: &str, token: Option<&str>) -> Request<Body> {
    let mut request = Request::builder().uri(path).header("host", "127.0.0.1");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    request.body(common::body("")).unwrap()
}

async fn ask(port: u16, ca: &str, cert: Option<&(String, String)>, request: Request<Body>) -> io::Result<(u16, Value)> {
    let stream = connect(port, ca, cert, "http/1.1").await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    let driving = tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    let code = response.status().as_u16();
    let bytes = response
        .into_body()
        .collect()
        .await
        .map_err(io::Error::other)?
        .to_bytes();
    drop(sender);
    let _ = driving.await;
    Ok((
        code,
        serde_json::from_slice(&bytes).unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into()),
    ))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identities_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let api = server(dir.path(), 1).await;
    let (cluster_a, port) = cluster(&api, "a").await;
    let (cluster_b, _) = cluster(&api, "b").await;
    let ca = cluster_a.ca_pem();
    let hour = Duration::from_secs(3600);
    let pods = "/api/v1/pods";

    let admin = cluster_a.issue_client_cert("admin", &["system:masters"], hour).unwrap();
    assert_eq!(ask(port, ca, Some(&admin), get(pods, None)).await.unwrap().0, 200);
    let stranger = cluster_a.issue_client_cert("bob", &[], hour).unwrap();
    let (code, refused) = ask(port, ca, Some(&stranger), get(pods, None)).await.unwrap();
    assert_eq!(code, 403);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("User \"bob\" cannot list"),
        "{refused}"
    );
    let (code, refused) = ask(port, ca, None, get(pods, None)).await.unwrap();
    assert_eq!((code, refused["message"].as_str()), (401, Some("Unauthorized")));
    assert_eq!(ask(port, ca, None, get("/readyz", None)).await.unwrap().0, 200);
    // Relying parties outside may read the token keys once somebody allows it.
    let keys = || get("/openid/v1/jwks", None);
    assert_eq!(ask(port, ca, None, keys()).await.unwrap().0, 401);
    let rbac = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
    let binding = json!({"metadata": {"name": "oidc"}, "subjects": [{"kind": "Group", "name": "system:unauthenticated"}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
            "name": "system:service-account-issuer-discovery"}});
    let local = cluster_a.local_service(apiserver::UserInfo::admin("a"));
    assert_eq!(
        common::call(&local, "POST", rbac, "application/json", binding.to_string())
            .await
            .0,
        201
    );
    let (code, jwks) = ask(port, ca, None, keys()).await.unwrap();
    assert_eq!((code, jwks["keys"][0]["alg"].as_str()), (200, Some("ES256")), "{jwks}");
    let (_, discovery) = ask(port, ca, None, get("/.well-known/openid-configuration", None))
        .await
        .unwrap();
    assert!(
        discovery["jwks_uri"]
            .as_str()
            .is_some_and(|u| u.ends_with("/openid/v1/jwks")),
        "{discovery}"
    );
    assert_eq!(
        ask(port, ca, None, get("/version", None)).await.unwrap().1["gitVersion"],
        "v1.36.4+oaks"
    );
    for bad in ["nonsense", "a.b.c", "e30.e30.e30"] {
        assert_eq!(ask(port, ca, None, get(pods, Some(bad))).await.unwrap().0, 401, "{bad}");
    }
    // Another cluster's administrator is nobody here, and its CA is not ours.
    let other = cluster_b.issue_client_cert("admin", &["system:masters"], hour).unwrap();
    assert!(ask(port, ca, Some(&other), get(pods, None)).await.is_err());
    assert!(connect(port, cluster_b.ca_pem(), None, "h2").await.is_err());

    let stream = connect(port, ca, Some(&admin), "h2").await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = Request::builder()
        .uri(format!("https://127.0.0.1:{port}/readyz?verbose"))
        .body(common::body(""))
        .unwrap();
    let response: Response<Incoming> = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);

    // Tokens work over the wire, for their own cluster only.
    let local = cluster_a.local_service(apiserver::UserInfo::admin("t"));
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    common::call(
        &local,
        "POST",
        accounts,
        "application/json",
        json!({"metadata": {"name": "s"}}).to_string(),
    )
    .await;
    let (code, issued) = common::call(&local, "POST", &format!("{accounts}/s/token"), "application/json", "{}").await;
    assert_eq!(code, 201, "{issued}");
    let token = issued["status"]["token"].as_str().unwrap();
    let (code, refused) = ask(port, ca, None, get(pods, Some(token))).await.unwrap();
    assert_eq!(code, 403);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("system:serviceaccount:default:s"),
        "{refused}"
    );
    let (_, port_b) = (
        cluster_b.clone(),
        ClusterConfig::clone(cluster_b.config()).server_host().1,
    );
    assert_eq!(
        ask(port_b, cluster_b.ca_pem(), None, get(pods, Some(token)))
            .await
            .unwrap()
            .0,
        401
    );
    let keys = ask(port, ca, Some(&admin), get("/openid/v1/jwks", None))
        .await
        .unwrap()
        .1;
    assert_eq!(keys["keys"][0]["alg"], "ES256");

    // Garbage on the port does not hurt anybody.
    let mut raw = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    raw.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _ = raw.read(&mut [0; 64]).await;
    assert_eq!(ask(port, ca, Some(&admin), get(pods, None)).await.unwrap().0, 200);

    api.delete_cluster("b").await.unwrap();
    assert!(api.cluster("b").is_none() && !dir.path().join("clusters/b").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_keys_objects_and_revisions() {
    let dir = tempfile::tempdir().unwrap();
    let maps = "/api/v1/namespaces/default/configmaps";
    let (ca, before, revision, certificate) = {
        let api = server(dir.path(), 1).await;
        let (cluster, _) = cluster(&api, "a").await;
        let local = cluster.local_service(apiserver::UserInfo::admin("t"));
        let object = json!({"metadata": {"name": "m", "labels": {"a": "b"}}, "data": {"k": "v"}}).to_string();
        let (code, made) = common::call(&local, "POST", maps, "application/json", object).await;
        assert_eq!(code, 201, "{made}");
        let secret = json!({"metadata": {"name": "s"}, "stringData": {"k": "very-secret-words"}}).to_string();
        let secrets = "/api/v1/namespaces/default/secrets";
        let (code, made_secret) = common::call(&local, "POST", secrets, "application/json", secret).await;
        assert_eq!(code, 201, "{made_secret}");
        let certificate = cluster
            .issue_client_cert("x", &["system:masters"], Duration::from_secs(60))
            .unwrap();
        cluster.stop();
        (cluster.ca_pem().to_owned(), made, cluster.revision(), certificate)
    };
    let api = server(dir.path(), 1).await;
    let (cluster, port) = cluster(&api, "a").await;
    assert_eq!(cluster.ca_pem(), ca);
    assert!(cluster.revision() >= revision);
    let local = cluster.local_service(apiserver::UserInfo::admin("t"));
    let (_, after) = common::call(&local, "GET", &format!("{maps}/m"), "", "").await;
    assert_eq!(after, before);
    let (_, secret) = common::call(&local, "GET", "/api/v1/namespaces/default/secrets/s", "", "").await;
    assert_eq!(secret["data"]["k"], "dmVyeS1zZWNyZXQtd29yZHM=", "{secret}");
    let mut files = vec![dir.path().join("store")];
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path()));
            continue;
        }
        let content = std::fs::read(&path).unwrap();
        for clear in [&b"very-secret-words"[..], b"dmVyeS1zZWNyZXQtd29yZHM="] {
            assert!(
                !content.windows(clear.len()).any(|w| w == clear),
                "{path:?} holds a secret in the clear"
            );
        }
    }
    let (_, listed) = common::call(&local, "GET", &format!("{maps}?labelSelector=a%3Db"), "", "").await;
    assert_eq!(listed["items"].as_array().unwrap().len(), 1);
    assert_eq!(
        ask(port, &ca, Some(&certificate), get(maps, None)).await.unwrap().0,
        200
    );
    // Watches of the time before have no history to resume from.
    let old = before["metadata"]["resourceVersion"].as_str().unwrap();
    let (code, _) = common::call(&local, "GET", "/api/v1/namespaces?watch=1&resourceVersion=1", "", "").await;
    assert_eq!(code, 410, "{old}");
}

/// A kubelet of sorts: serves log lines, and echoes what comes over an upgraded exec connection.
async fn kubelet(listener: TcpListener, cluster: Arc<Cluster>) {
    let pair = cluster
        .issue_serving_cert(
            "node",
            &["n".to_owned(), "10.0.0.5".to_owned()],
            Duration::from_secs(60),
        )
        .unwrap();
    let (chain, key) = identity(&pair);
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots(cluster.ca_pem())), provider())
            .build()
            .unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else {
                return;
            };
            let service = hyper::service::service_fn(|mut request: Request<Incoming>| async move {
                let path = request.uri().to_string();
                if path.starts_with("/containerLogs/") {
                    return Ok::<_, io::Error>(Response::new(format!("log of {path}\n")));
                }
                if !path.starts_with("/exec/default/p/c?") {
                    return Ok(Response::builder()
                        .status(404)
                        .body("container not found".to_owned())
                        .unwrap());
                }
                let upgrade = hyper::upgrade::on(&mut request);
                tokio::spawn(async move {
                    let mut io = TokioIo::new(upgrade.await.unwrap());
                    io.write_all(path.as_bytes()).await.unwrap();
                    let mut buffer = [0; 64];
                    while let Ok(n) = io.read(&mut buffer).await
                        && n > 0
                    {
                        io.write_all(&buffer[..n]).await.unwrap();
                    }
                });
                Ok(Response::builder()
                    .status(101)
                    .header("connection", "Upgrade")
                    .header("upgrade", "websocket")
                    .header("sec-websocket-protocol", "v5.channel.k8s.io")
                    .body(String::new())
                    .unwrap())
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades()
                .await;
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_and_exec_go_through_to_the_node() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let api = server(dir.path(), listener.local_addr().unwrap().port()).await;
    let (cluster, port) = cluster(&api, "a").await;
    tokio::spawn(kubelet(listener, cluster.clone()));
    let local = cluster.local_service(apiserver::UserInfo::admin("t"));
    let post = async |path: &str, value: Value| {
        let (code, answer) = common::call(&local, "POST", path, "application/json", value.to_string()).await;
        assert_eq!(code, 201, "{answer}");
    };
    post("/api/v1/nodes", json!({"metadata": {"name": "n"}})).await;
    let addresses = json!({"status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.5"}]}}).to_string();
    common::call(
        &local,
        "PATCH",
        "/api/v1/nodes/n/status",
        "application/merge-patch+json",
        addresses,
    )
    .await;
    post(
        "/api/v1/namespaces/default/serviceaccounts",
        json!({"metadata": {"name": "default"}}),
    )
    .await;
    let pods = "/api/v1/namespaces/default/pods";
    post(
        pods,
        json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "x"}]}}),
    )
    .await;

    let (code, text) = common::call(&local, "GET", &format!("{pods}/p/log?tailLines=5&follow=true"), "", "").await;
    assert_eq!(
        (code, text.as_str()),
        (200, Some("log of /containerLogs/default/p/c?follow=true&tailLines=5\n"))
    );
    assert_eq!(
        common::call(&local, "GET", &format!("{pods}/nope/log"), "", "").await.0,
        404
    );

    let admin = cluster
        .issue_client_cert("admin", &["system:masters"], Duration::from_secs(60))
        .unwrap();
    let mut stream = connect(port, cluster.ca_pem(), Some(&admin), "http/1.1").await.unwrap();
    let head = format!(
        "GET {pods}/p/exec?command=sh&command=-c&stdin=true&stdout=true&tty=false HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGVzdA==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut seen = String::new();
    let wait = Duration::from_secs(10);
    while !seen.contains("command=-c") {
        let mut buffer = [0; 512];
        let n = tokio::time::timeout(wait, stream.read(&mut buffer))
            .await
            .unwrap()
            .unwrap();
        assert!(n > 0, "closed after {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    assert!(
        seen.starts_with("HTTP/1.1 101")
            && seen
                .to_lowercase()
                .contains("sec-websocket-protocol: v5.channel.k8s.io"),
        "{seen}"
    );
    assert!(
        seen.ends_with("/exec/default/p/c?input=1&output=1&command=sh&command=-c"),
        "{seen}"
    );
    stream.write_all(b"ping").await.unwrap();
    let mut echo = [0; 4];
    tokio::time::timeout(wait, stream.read_exact(&mut echo))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&echo, b"ping");

    let spdy = Request::builder()
        .method("POST")
        .uri(format!("{pods}/p/exec?command=ls&stdout=true"))
        .header("host", "x")
        .header("connection", "Upgrade")
        .header("upgrade", "SPDY/3.1")
        .body(common::body(""))
        .unwrap();
    let (code, refused) = ask(port, cluster.ca_pem(), Some(&admin), spdy).await.unwrap();
    assert_eq!(code, 400);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("use kubectl 1.31 or newer"),
        "{refused}"
    );
}

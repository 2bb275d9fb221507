//! The client over real TLS: against the API server, and its WebSocket against a peer that plays a node.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use apiserver::{ApiServer, ApiServerConfig, Cluster, ClusterConfig, NoDialer};
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ServiceAccount};
use reconcile::https::FixedDial;
use reconcile::{Client, Error, ErrorKind, HttpsConfig, Identity, Informers, ListParams};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use stdx::RealClock;
use store::ModelEngine;
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};

const HOUR: Duration = Duration::from_secs(3600);

struct Api {
    cluster: Arc<Cluster>,
    address: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Api {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = ApiServer::new(ApiServerConfig {
            engine: ModelEngine::new(),
            dialer: Arc::new(NoDialer),
            data_dir: dir.path().to_owned(),
            clock: RealClock::shared(),
        });
        let cluster = server
            .create_cluster(ClusterConfig::new("c", "https://api.example:443"))
            .await
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        cluster.serve(listener);
        Self {
            cluster,
            address,
            _dir: dir,
        }
    }

    /// A client of a name that resolves nowhere: only the custom dial reaches it.
    fn client(&self, address: SocketAddr, identity: Identity) -> Client {
        Client::https(HttpsConfig {
            server: "https://api.example".to_owned(),
            ca_pem: self.cluster.ca_pem().to_owned(),
            identity,
            connector: Some(Arc::new(FixedDial(address))),
        })
        .unwrap()
    }

    fn admin(&self) -> Identity {
        let (cert_pem, key_pem) = self
            .cluster
            .issue_client_cert("admin", &["system:masters"], HOUR)
            .unwrap();
        Identity::ClientCert { cert_pem, key_pem }
    }
}

fn object<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).unwrap()
}

#[tokio::test]
async fn calls_and_watches_share_a_connection() {
    let api = Api::start().await;
    let client = api.client(api.address, api.admin());
    let informers = Informers::new(client.clone());
    let maps = informers.get::<ConfigMap>();
    maps.wait_synced().await;
    let mut keys = maps.subscribe();
    for i in 0..20 {
        let map: ConfigMap = object(json!({"metadata": {"name": format!("m{i:02}")}}));
        client.create(Some("default"), &map).await.unwrap();
    }
    let mut names = Vec::new();
    while names.len() < 20 {
        let key = tokio::time::timeout(Duration::from_secs(20), keys.recv())
            .await
            .unwrap()
            .unwrap();
        if key.name.starts_with('m') {
            names.push(key.name);
        }
    }
    assert!(names.is_sorted(), "{names:?}");
    informers.stop().await;
}

#[tokio::test]
async fn identities_and_trust_are_checked() {
    let api = Api::start().await;
    let list = async |client: Client| {
        client
            .list::<Namespace>(None, &ListParams::default())
            .await
            .map(|l| l.items.len())
    };
    assert!(list(api.client(api.address, api.admin())).await.unwrap() > 0);
    let code = |result: Result<usize, Error>| result.unwrap_err().code();
    assert_eq!(
        code(list(api.client(api.address, Identity::Token("wrong".into()))).await),
        Some(401)
    );
    assert!(matches!(
        code(list(api.client(api.address, Identity::Anonymous)).await),
        Some(401 | 403)
    ));
    let other = Api::start().await;
    let error = list(other.client(api.address, Identity::Anonymous)).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Transport(_)), "{}", stdx::chain(&error));
    let bad = |server: &str, ca: &str| {
        let (server, ca_pem) = (server.to_owned(), ca.to_owned());
        Client::https(HttpsConfig {
            server,
            ca_pem,
            identity: Identity::Anonymous,
            connector: None,
        })
        .unwrap_err()
    };
    let ca = api.cluster.ca_pem();
    for (error, text) in [
        (bad("http://x", ca), "server must be https"),
        (bad("https://x", ""), "CA bundle holds no certificate"),
        (
            bad("https://x", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"),
            "CA bundle is no PEM",
        ),
    ] {
        assert!(
            stdx::chain(&error).to_string().contains(text),
            "{}",
            stdx::chain(&error)
        );
    }
}

#[tokio::test]
async fn exec_is_refused_with_the_servers_words() {
    let api = Api::start().await;
    let client = api.client(api.address, api.admin());
    let error = client.exec("default", "nobody", "", &["true"], None).await.unwrap_err();
    assert!(error.is_not_found(), "{}", stdx::chain(&error));
    let account: ServiceAccount = object(json!({"metadata": {"name": "default"}}));
    client.create(Some("default"), &account).await.unwrap();
    let pod: Pod = object(json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "x"}]}}));
    client.create(Some("default"), &pod).await.unwrap();
    let error = client.exec("default", "p", "", &["true"], None).await.unwrap_err();
    assert!(error.status().is_some(), "{}", stdx::chain(&error));
}

/// A server that runs `cat`, says how the command was asked for on stderr, and ends with code 3.
async fn cat_server(api: &Api) -> SocketAddr {
    let (cert, key) = api
        .cluster
        .issue_serving_cert("node", &["api.example".to_owned()], HOUR)
        .unwrap();
    let chain = CertificateDer::pem_slice_iter(cert.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let stream = acceptor.accept(stream).await.unwrap();
        let mut asked = String::new();
        #[expect(clippy::result_large_err, reason = "the signature is the WebSocket library's")]
        let look = |request: &Request, mut response: Response| {
            asked = request.uri().to_string();
            let protocol = request.headers()["sec-websocket-protocol"].clone();
            response.headers_mut().insert("sec-websocket-protocol", protocol);
            Ok(response)
        };
        let mut socket = tokio_tungstenite::accept_hdr_async(stream, look).await.unwrap();
        let mut send = async |channel: u8, bytes: &[u8]| {
            socket
                .send(Message::Binary([&[channel], bytes].concat().into()))
                .await
                .unwrap();
            socket.next().await
        };
        let mut next = send(2, asked.as_bytes()).await;
        while let Some(Ok(Message::Binary(data))) = next {
            match data.as_ref() {
                [255, 0] => break,
                [0, input @ ..] => next = send(1, input).await,
                other => panic!("{other:?}"),
            }
        }
        let status = json!({"status": "Failure", "reason": "NonZeroExitCode", "message": "exit code 3",
            "details": {"causes": [{"reason": "ExitCode", "message": "3"}]}});
        send(3, status.to_string().as_bytes()).await;
    });
    address
}

#[tokio::test]
async fn exec_carries_input_output_and_exit_code() {
    let api = Api::start().await;
    let client = api.client(cat_server(&api).await, api.admin());
    let input = Bytes::from(vec![b'x'; 100_000]);
    let output = client
        .exec("d", "p", "c", &["sh", "-c", "cat; exit 3"], Some(input.clone()))
        .await
        .unwrap();
    assert_eq!(output.exit_code, 3);
    assert_eq!(output.stdout, input);
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "/api/v1/namespaces/d/pods/p/exec?container=c&stdin=true&stdout=true&stderr=true&command=sh&command=-c&\
         command=cat%3B%20exit%203"
    );
}

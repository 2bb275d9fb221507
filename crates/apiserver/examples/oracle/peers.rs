//! The two servers and one client for each.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use apiserver::{ApiServer, ApiServerConfig, ClusterConfig, NoDialer};
use http::{Method, Request};
use http_body_util::BodyExt;
use reconcile::{Client, HttpsConfig, Identity};
use serde_json::Value;
use store::LocalEngine;

/// On loopback, but no loopback address: kube-apiserver refuses to advertise one.
const ADDRESS: &str = "10.255.0.1";
const TOKEN: &str = "the-oracles-token";

pub struct Peers {
    pub ours: Client,
    pub theirs: Client,
    _children: Vec<Ends>,
}

/// A process that ends with the value.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Debian's etcd, unpacked.
pub fn etcd() -> PathBuf {
    testkit::debian::unpack(&["etcd-server"]).join("usr/bin/etcd")
}

pub async fn start(kube_apiserver: &Path, scratch: &Path) -> Result<Peers> {
    run("ip", &["address", "add", &format!("{ADDRESS}/32"), "dev", "lo"])?;
    let children = upstream(kube_apiserver, scratch)?;
    let ours = ours(scratch).await?;
    let mut last = String::new();
    for _ in 0..600 {
        let certificate = scratch.join("certs/apiserver.crt");
        match fs::read_to_string(&certificate) {
            Ok(ca_pem) => {
                let theirs = Client::https(HttpsConfig {
                    server: format!("https://{ADDRESS}:6443"),
                    ca_pem,
                    identity: Identity::Token(TOKEN.to_owned()),
                    connector: None,
                })?;
                match send(&theirs, &Call::get("/readyz")).await {
                    Ok(answer) if answer.code == 200 => {
                        return Ok(Peers {
                            ours,
                            theirs,
                            _children: children,
                        });
                    }
                    Ok(answer) => last = answer.body.to_string(),
                    Err(e) => last = format!("{e:#}"),
                }
            }
            Err(e) => last = format!("{}: {e}", certificate.display()),
        }
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let log = fs::read_to_string(scratch.join("kube-apiserver.log")).unwrap_or_default();
    let tail: Vec<&str> = log.lines().rev().take(10).collect();
    bail!(
        "kube-apiserver is not ready after two minutes: {last}\n{}",
        tail.join("\n")
    )
}

fn upstream(kube_apiserver: &Path, scratch: &Path) -> Result<Vec<Ends>> {
    let file = |name: &str| scratch.join(name).to_string_lossy().into_owned();
    run("openssl", &["genrsa", "-out", &file("sa.key"), "2048"])?;
    fs::write(file("tokens.csv"), format!("{TOKEN},admin,admin,\"system:masters\"\n"))?;
    let start = |program: &Path, log: &str, args: &[String]| -> Result<Ends> {
        let log = File::create(file(log))?;
        let child = Command::new(program)
            .args(args)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn();
        Ok(Ends(child.with_context(|| format!("starting {}", program.display()))?))
    };
    let (client, peer) = ("http://127.0.0.1:2379", "http://127.0.0.1:2380");
    let etcd = start(
        &etcd(),
        "etcd.log",
        &[
            format!("--data-dir={}", file("etcd")),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
        ],
    )?;
    let server = start(
        kube_apiserver,
        "kube-apiserver.log",
        &[
            format!("--etcd-servers={client}"),
            format!("--cert-dir={}", file("certs")),
            format!("--advertise-address={ADDRESS}"),
            "--bind-address=0.0.0.0".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            format!("--service-account-key-file={}", file("sa.key")),
            "--authorization-mode=Node,RBAC".to_owned(),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--service-cluster-ip-range=10.0.0.0/16".to_owned(),
        ],
    )?;
    Ok(vec![server, etcd])
}

/// This API server, with nothing else of Oaks: no controller changes its objects, as on the other side.
async fn ours(scratch: &Path) -> Result<Client> {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
    let url = format!("https://{}", listener.local_addr()?);
    let api = ApiServer::new(ApiServerConfig {
        engine: LocalEngine::open(&scratch.join("store"))?,
        dialer: Arc::new(NoDialer),
        data_dir: scratch.join("clusters"),
        clock: stdx::RealClock::shared(),
    });
    let cluster = api.create_cluster(ClusterConfig::new("oracle", &url)).await?;
    let kubeconfig = cluster.kubeconfig("oracle", "admin", &["system:masters"])?;
    tokio::spawn(cluster.serve(listener));
    let config: Value = serde_saphyr::from_str(&kubeconfig)?;
    let pem = |value: &Value| -> Result<String> {
        use base64::Engine as _;
        let text = value.as_str().context("the kubeconfig lacks a certificate")?;
        Ok(String::from_utf8(
            base64::engine::general_purpose::STANDARD.decode(text)?,
        )?)
    };
    let user = &config["users"][0]["user"];
    Ok(Client::https(HttpsConfig {
        server: url,
        ca_pem: pem(&config["clusters"][0]["cluster"]["certificate-authority-data"])?,
        identity: Identity::ClientCert {
            cert_pem: pem(&user["client-certificate-data"])?,
            key_pem: pem(&user["client-key-data"])?,
        },
        connector: None,
    })?)
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let out = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("starting {program}"))?;
    if !out.status.success() {
        bail!("{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}

/// One request.
#[derive(Clone)]
pub struct Call {
    pub method: Method,
    /// With its query.
    pub path: String,
    pub content_type: &'static str,
    pub accept: &'static str,
    pub body: Option<Value>,
}

pub const JSON: &str = "application/json";

impl Call {
    pub fn new(method: Method, path: &str, content_type: &'static str, body: Option<Value>) -> Self {
        Self {
            method,
            path: path.to_owned(),
            content_type,
            accept: JSON,
            body,
        }
    }

    pub fn get(path: &str) -> Self {
        Self::new(Method::GET, path, JSON, None)
    }

    pub fn post(path: &str, body: Value) -> Self {
        Self::new(Method::POST, path, JSON, Some(body))
    }

    pub fn accept(mut self, accept: &'static str) -> Self {
        self.accept = accept;
        self
    }
}

pub struct Answer {
    pub code: u16,
    pub warnings: Vec<String>,
    /// A text where it is no JSON.
    pub body: Value,
}

pub async fn send(client: &Client, call: &Call) -> Result<Answer> {
    let bytes = call.body.as_ref().map(Value::to_string).unwrap_or_default();
    let request = Request::builder()
        .method(call.method.clone())
        .uri(&call.path)
        .header("content-type", call.content_type)
        .header("accept", call.accept)
        .header("user-agent", "oracle/1.0")
        .body(reconcile::full_body(bytes))?;
    let reply = client.raw(request).await?;
    let code = reply.status().as_u16();
    let warnings = reply
        .headers()
        .get_all("warning")
        .iter()
        .filter_map(|h| h.to_str().ok().map(str::to_owned))
        .collect();
    let bytes = reply
        .into_body()
        .collect()
        .await
        .map_err(|e| anyhow::anyhow!("{e}"))?
        .to_bytes();
    let body =
        serde_json::from_slice(&bytes).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
    Ok(Answer { code, warnings, body })
}

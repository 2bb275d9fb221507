//! kube-apiserver with Debian's etcd-server.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command},
};

use anyhow::{Context, Result, bail};
use reconcile::{Client, HttpsConfig, Identity};

use crate::call::{Call, send};

/// On loopback, but no loopback address: kube-apiserver refuses to advertise one.
const ADDRESS: &str = "10.255.0.1";
const TOKEN: &str = "the-oracles-token";

/// Ends with the value.
pub struct Upstream {
    pub client: Client,
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

pub async fn start(kube_apiserver: &Path, scratch: &Path) -> Result<Upstream> {
    run("ip", &["address", "add", &format!("{ADDRESS}/32"), "dev", "lo"])?;
    let children = upstream(kube_apiserver, scratch)?;
    let mut last = String::new();
    for _ in 0..600 {
        let certificate = scratch.join("certs/apiserver.crt");
        match fs::read_to_string(&certificate) {
            Ok(ca_pem) => {
                let client = Client::https(HttpsConfig {
                    server: format!("https://{ADDRESS}:6443"),
                    ca_pem,
                    identity: Identity::Token(TOKEN.to_owned()),
                    connector: None,
                })?;
                match send(&client, &Call::get("/readyz")).await {
                    Ok(answer) if answer.code == 200 => {
                        return Ok(Upstream {
                            client,
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

//! Three servers of one cluster on one etcd: one of them runs the controllers, and another one does when it dies.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use apiserver::{ApiServer, ApiServerConfig, ClusterConfig, NoDialer, UserInfo};
use controllers::ControllerConfig;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use reconcile::leader::{Election, lead};
use reconcile::{Client, Informers, ListParams};
use serde_json::json;
use stdx::{RealClock, Shutdown};
use store::{EtcdConfig, EtcdEngine};

struct Etcd(Child);

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

fn etcd(dir: &std::path::Path) -> (Etcd, String) {
    let root = testkit::debian::unpack(&["etcd-server", "etcd-client"]);
    let url = format!("http://127.0.0.1:{}", free_port());
    let peer = format!("http://127.0.0.1:{}", free_port());
    let child = Command::new(root.join("usr/bin/etcd"))
        .arg("--data-dir")
        .arg(dir.join("etcd"))
        .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    (Etcd(child), url)
}

/// A server on a runtime of its own, so that it can end as a killed process does.
struct Server {
    runtime: tokio::runtime::Runtime,
    client: Client,
    identity: String,
}

fn server(dir: &std::path::Path, url: &str, number: u64) -> Server {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let config = EtcdConfig {
        endpoints: vec![url.to_owned()],
        prefix: "/oaks/".to_owned(),
        tls: None,
    };
    let engine = EtcdEngine::open(&config, number).unwrap();
    let data_dir = dir.to_owned();
    let identity = format!("server-{number}");
    let name = identity.clone();
    let client = runtime.block_on(async move {
        let api = ApiServer::new(ApiServerConfig {
            engine,
            dialer: Arc::new(NoDialer),
            data_dir,
            clock: RealClock::shared(),
        });
        let cluster = api
            .create_cluster(ClusterConfig::new("c", "https://127.0.0.1:6443"))
            .await
            .unwrap();
        let client = Client::local(cluster.local_service(UserInfo::admin("test")));
        let election = Election {
            duration: Duration::from_secs(2),
            ..Election::new("kube-system", "oaks-controllers", name)
        };
        let (own, ca) = (client.clone(), cluster.ca_pem().to_owned());
        tokio::spawn(lead(
            client.clone(),
            election,
            RealClock::shared(),
            Shutdown::new(),
            move |term| {
                let config = ControllerConfig {
                    cluster_ca_pem: ca.clone(),
                    ..ControllerConfig::default()
                };
                tokio::spawn(controllers::run_all(
                    own.clone(),
                    Informers::new(own.clone()),
                    config,
                    term,
                ));
            },
        ));
        // The API lives as long as the runtime.
        tokio::spawn(async move {
            let _api = api;
            std::future::pending::<()>().await;
        });
        client
    });
    Server {
        runtime,
        client,
        identity,
    }
}

async fn holder(client: &Client) -> Option<String> {
    let lease = client
        .get_opt::<Lease>(Some("kube-system"), "oaks-controllers")
        .await
        .ok()??;
    lease.spec?.holder_identity
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(40);
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within 40 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn deploys(client: &Client, name: &str) {
    let deployment: Deployment = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": name}}, "template": {
            "metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}
    }))
    .unwrap();
    client.create(Some("default"), &deployment).await.unwrap();
    let labels = ListParams::labels(format!("app={name}"));
    until("a controller makes the replica set", async || {
        let sets = client.list::<ReplicaSet>(Some("default"), &labels).await.ok()?;
        (sets.items.len() == 1).then_some(())
    })
    .await;
}

#[test]
fn controllers_go_on_when_the_server_that_ran_them_dies() {
    let dir = tempfile::tempdir().unwrap();
    let (_etcd, url) = etcd(dir.path());
    let mut servers: Vec<Server> = (1..=3).map(|n| server(dir.path(), &url, n)).collect();
    let test = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    for round in 0..2 {
        let client = servers[0].client.clone();
        let leader = test.block_on(async {
            let leader = until("a leader", async || holder(&client).await.filter(|h| !h.is_empty())).await;
            deploys(&client, &format!("before-{round}")).await;
            leader
        });
        let at = servers
            .iter()
            .position(|s| s.identity == leader)
            .expect("the leader is one of those alive");
        servers.remove(at).runtime.shutdown_background();
        let client = servers[0].client.clone();
        test.block_on(async {
            deploys(&client, &format!("after-{round}")).await;
            let next = holder(&client).await;
            assert!(
                next.as_ref().is_some_and(|n| *n != leader),
                "{next:?} leads after {leader}"
            );
        });
    }
}

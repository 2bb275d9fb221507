//! Three API servers of one cluster on one etcd: what one has answered, every other one shows.

mod common;

use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use apiserver::{ApiServer, ApiServerConfig, ClusterConfig, LocalService, NoDialer, UserInfo};
use common::call;
use serde_json::{Value, json};
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

/// A server as a process of its own would run it; keys are shared by folder.
struct Server {
    service: LocalService,
    _api: Arc<ApiServer>,
}

async fn server(dir: &std::path::Path, url: &str, writer: u64) -> Server {
    let config = EtcdConfig {
        endpoints: vec![url.to_owned()],
        prefix: "/oaks/".to_owned(),
        tls: None,
    };
    let engine = tokio::task::spawn_blocking(move || EtcdEngine::open(&config, writer));
    let api = ApiServer::new(ApiServerConfig {
        engine: engine.await.unwrap().unwrap(),
        dialer: Arc::new(NoDialer),
        data_dir: dir.to_owned(),
        clock: stdx::RealClock::shared(),
    });
    let config = ClusterConfig::new("c", "https://127.0.0.1:6443");
    let cluster = api.create_cluster(config).await.unwrap();
    Server {
        service: cluster.local_service(UserInfo::admin("test")),
        _api: api,
    }
}

impl Server {
    async fn call(&self, method: &str, path: &str, value: Value) -> (u16, Value) {
        let body = if value.is_null() {
            String::new()
        } else {
            value.to_string()
        };
        call(&self.service, method, path, "application/json", body).await
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.call("GET", path, Value::Null).await
    }
}

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const SECRETS: &str = "/api/v1/namespaces/default/secrets";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_servers_serve_one_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let (_etcd, url) = etcd(dir.path());
    // The first makes the keys; all of them write the first objects at once.
    let first = server(dir.path(), &url, 1).await;
    let (second, third) = tokio::join!(server(dir.path(), &url, 2), server(dir.path(), &url, 3));
    let servers = [first, second, third];

    // Read your writes anywhere, deletions included.
    for round in 0..12_usize {
        let (writer, reader) = (&servers[round % 3], &servers[(round + 1) % 3]);
        let name = format!("m{round}");
        let (code, made) = writer.call("POST", MAPS, json!({"metadata": {"name": name}})).await;
        assert_eq!(code, 201, "{made}");
        let (code, read) = reader.get(&format!("{MAPS}/{name}")).await;
        assert_eq!(
            (code, &read["metadata"]["resourceVersion"]),
            (200, &made["metadata"]["resourceVersion"])
        );
        let (code, _) = reader.call("DELETE", &format!("{MAPS}/{name}"), Value::Null).await;
        assert_eq!(code, 200);
        assert_eq!(writer.get(&format!("{MAPS}/{name}")).await.0, 404);
    }

    // What is sealed for one is open to all.
    let secret = json!({"metadata": {"name": "s"}, "stringData": {"password": "hunter2"}});
    assert_eq!(servers[0].call("POST", SECRETS, secret).await.0, 201);
    let (code, read) = servers[2].get(&format!("{SECRETS}/s")).await;
    assert_eq!((code, read["data"]["password"].as_str()), (200, Some("aHVudGVyMg==")));

    // Updates of one object by all of them: every one counts once.
    let made = json!({"metadata": {"name": "count"}, "data": {"n": "0"}});
    assert_eq!(servers[0].call("POST", MAPS, made).await.0, 201);
    let path = format!("{MAPS}/count");
    let writers = servers.iter().map(|server| async {
        let mut done = 0;
        while done < 10 {
            let (_, mut object) = server.get(&path).await;
            let n: u64 = object["data"]["n"].as_str().unwrap().parse().unwrap();
            object["data"]["n"] = (n + 1).to_string().into();
            match server.call("PUT", &path, object).await {
                (200, _) => done += 1,
                (409, _) => {}
                other => panic!("{other:?}"),
            }
        }
    });
    futures::future::join_all(writers).await;
    for server in &servers {
        assert_eq!(server.get(&path).await.1["data"]["n"], "30");
    }

    // Service addresses are given once.
    let mut given = Vec::new();
    for (i, server) in servers.iter().cycle().take(9).enumerate() {
        let service = json!({"metadata": {"name": format!("s{i}")}, "spec": {"ports": [{"port": 80}]}});
        let (code, made) = server
            .call("POST", "/api/v1/namespaces/default/services", service)
            .await;
        assert_eq!(code, 201, "{made}");
        given.push(made["spec"]["clusterIP"].as_str().unwrap().to_owned());
    }
    given.sort();
    given.dedup();
    assert_eq!(given.len(), 9);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_shows_what_other_servers_write() {
    let dir = tempfile::tempdir().unwrap();
    let (_etcd, url) = etcd(dir.path());
    let (one, two) = (server(dir.path(), &url, 1).await, server(dir.path(), &url, 2).await);
    let (_, list) = one.get(MAPS).await;
    let rv = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let mut watch = common::watch(&one.service, &format!("{MAPS}?watch=1&resourceVersion={rv}")).await;
    for name in ["a", "b"] {
        assert_eq!(two.call("POST", MAPS, json!({"metadata": {"name": name}})).await.0, 201);
    }
    assert_eq!(two.call("DELETE", &format!("{MAPS}/a"), Value::Null).await.0, 200);
    for expected in ["ADDED a", "ADDED b", "DELETED a"] {
        assert_eq!(watch.brief().await, expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_does_not_answer_is_said_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (gone, url) = etcd(dir.path());
    let one = server(dir.path(), &url, 1).await;
    drop(gone);
    // Reads that may be old are still answered.
    assert_eq!(one.get(&format!("{MAPS}?resourceVersion=0")).await.0, 200);
    let (code, status) = one.call("POST", MAPS, json!({"metadata": {"name": "m"}})).await;
    assert_eq!(
        (code, status["reason"].as_str()),
        (503, Some("ServiceUnavailable")),
        "{status}"
    );
}

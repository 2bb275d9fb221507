//! The distribution's etcd, and what only an engine that several processes share promises.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use store::{Batch, Check, Engine, Error, EtcdConfig, EtcdEngine, Keyspace, Observer, Op};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

use crate::{entries, put};

/// A member that listens on loopback and ends with the value.
pub struct Etcd {
    child: Child,
    dir: tempfile::TempDir,
    port: u16,
    peer: u16,
}

fn program(name: &str) -> Command {
    let root = testkit::debian::unpack(&["etcd-server", "etcd-client"]);
    Command::new(root.join("usr/bin").join(name))
}

fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

impl Etcd {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (port, peer) = (free_port(), free_port());
        let child = spawn(dir.path(), port, peer);
        Self { child, dir, port, peer }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// An engine as a process of its own would open it.
    pub fn engine(&self, writer: u64) -> Arc<EtcdEngine> {
        engine_at(self.url(), writer)
    }

    /// `kill -9` and a start on the same data.
    fn crash(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(self.dir.path(), self.port, self.peer);
    }

    fn compact(&self, revision: u64) {
        let out = program("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.url(), "compact", &revision.to_string()])
            .output()
            .unwrap();
        assert!(out.status.success(), "{out:?}");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(dir: &std::path::Path, port: u16, peer: u16) -> Child {
    let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer}"));
    program("etcd")
        .arg("--data-dir")
        .arg(dir.join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn engine_at(url: String, writer: u64) -> Arc<EtcdEngine> {
    let config = EtcdConfig {
        endpoints: vec![url],
        prefix: "/oaks/".to_owned(),
        tls: None,
    };
    EtcdEngine::open(&config, writer).unwrap()
}

/// Forwards to an etcd, and can be cut.
struct Wire {
    port: u16,
    cut: tokio::sync::watch::Sender<bool>,
}

impl Wire {
    async fn to(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (cut, state) = tokio::sync::watch::channel(false);
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut state = state.clone();
                if *state.borrow() {
                    continue;
                }
                tokio::spawn(async move {
                    let mut far = TcpStream::connect(("127.0.0.1", target)).await?;
                    tokio::select! {
                        done = copy_bidirectional(&mut near, &mut far) => done.map(drop),
                        _ = state.wait_for(|cut| *cut) => Ok(()),
                    }
                });
            }
        });
        Self { port, cut }
    }
}

/// What an observer saw, as `(revision, key, value or deletion)`.
#[derive(Default)]
struct Log(Mutex<Vec<(u64, String, Option<String>)>>);

impl Observer for Log {
    fn committed(&self, batch: &Batch) {
        let text = |bytes: &bytes::Bytes| String::from_utf8_lossy(bytes).into_owned();
        for op in batch.ops.iter() {
            let (key, value) = match op {
                Op::Put { key, value, .. } => (key, Some(text(value))),
                Op::Delete { key, .. } => (key, None),
            };
            self.0.lock().push((batch.revision, text(key), value));
        }
    }
}

/// The state that `log` leads to.
fn replay(log: &Log) -> Vec<(String, String, u64)> {
    let mut map = std::collections::BTreeMap::new();
    for (revision, key, value) in log.0.lock().iter() {
        match value {
            Some(value) => map.insert(key.clone(), (value.clone(), *revision)),
            None => map.remove(key),
        };
    }
    map.into_iter()
        .map(|(key, (value, revision))| (key, value, revision))
        .collect()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_on_one_etcd_see_one_history() {
    let etcd = Etcd::start();
    let (one, two) = (etcd.engine(1), etcd.engine(2));
    let (a, b) = (one.keyspace("c").unwrap(), two.keyspace("c").unwrap());
    let (log_a, log_b) = (Arc::new(Log::default()), Arc::new(Log::default()));
    a.observe(log_a.clone());
    b.observe(log_b.clone());
    let writers = [(a.clone(), "a"), (b.clone(), "b")].map(|(ks, who)| {
        tokio::spawn(async move {
            for i in 0..60 {
                let key = |i: usize| format!("{who}/{}", i % 7);
                if i % 5 == 4 {
                    ks.txn(vec![], vec![Op::delete(key(i - 1))]).await.unwrap();
                } else {
                    put(&*ks, &key(i), &i.to_string()).await;
                }
            }
        })
    });
    for writer in writers {
        writer.await.unwrap();
    }
    a.sync().await.unwrap();
    b.sync().await.unwrap();
    assert_eq!(
        *log_a.0.lock(),
        *log_b.0.lock(),
        "both saw the same steps in the same order"
    );
    assert!(log_a.0.lock().windows(2).all(|w| w[0].0 < w[1].0));
    assert_eq!(replay(&log_a), entries(&*a, ""));
    assert_eq!(a.revision(), b.revision());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_two_writers_of_a_revision_loses() {
    let etcd = Etcd::start();
    let (one, two) = (etcd.engine(1), etcd.engine(2));
    let (a, b) = (one.keyspace("c").unwrap(), two.keyspace("c").unwrap());
    let first = put(&*a, "k", "0").await;
    let race =
        |ks: Arc<dyn Keyspace>| async move { ks.txn(vec![Check::at("k", first)], vec![Op::put("k", "x")]).await };
    let (x, y) = tokio::join!(race(a.clone()), race(b.clone()));
    assert_eq!(usize::from(x.is_ok()) + usize::from(y.is_ok()), 1, "{x:?} {y:?}");
    assert!(x.is_err_and(|e| e.is_conflict()) || y.is_err_and(|e| e.is_conflict()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keyspace_that_another_process_dropped_is_gone_here_too() {
    let etcd = Etcd::start();
    let (one, two) = (etcd.engine(1), etcd.engine(2));
    let (a, b) = (one.keyspace("c").unwrap(), two.keyspace("c").unwrap());
    put(&*a, "k", "old").await;
    b.sync().await.unwrap();
    two.drop_keyspace("c").await.unwrap();
    let late = a.txn(vec![], vec![Op::put("k", "late")]).await;
    assert!(matches!(late, Err(Error::Dropped(_))), "{late:?}");
    let again = two.keyspace("c").unwrap();
    assert!(entries(&*again, "").is_empty());
    put(&*again, "k", "new").await;
    // The old handle does not write into the new keyspace of the same name.
    assert!(a.txn(vec![], vec![Op::put("k", "late")]).await.is_err());
    assert_eq!(entries(&*one.keyspace("c").unwrap(), "k")[0].1, "new");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_a_killed_etcd_and_come_once() {
    let mut etcd = Etcd::start();
    let (one, two) = (etcd.engine(1), etcd.engine(2));
    let (a, b) = (one.keyspace("c").unwrap(), two.keyspace("c").unwrap());
    let seen = Arc::new(Log::default());
    b.observe(seen.clone());
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = {
        let (acknowledged, stop) = (acknowledged.clone(), stop.clone());
        tokio::spawn(async move {
            let mut i = 0_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                i += 1;
                match a.txn(vec![], vec![Op::put(format!("k{i}"), "v")]).await {
                    Ok(revision) => acknowledged.lock().push((revision, format!("k{i}"))),
                    Err(Error::Indeterminate { .. } | Error::Io { .. }) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
        })
    };
    for round in 0..3_usize {
        until("writes go on", || acknowledged.lock().len() > round * 40 + 20).await;
        etcd.crash();
        let before = acknowledged.lock().len();
        until("writes go on after the crash", || {
            acknowledged.lock().len() > before + 5
        })
        .await;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.await.unwrap();
    b.sync().await.unwrap();
    let seen = seen.0.lock();
    assert!(seen.windows(2).all(|w| w[0].0 < w[1].0), "ordered, none twice");
    for (revision, key) in acknowledged.lock().iter() {
        assert!(
            seen.iter().any(|(r, k, _)| r == revision && k == key),
            "{key} at {revision} was lost"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_cut_off_past_a_compaction_ends_in_the_same_state() {
    let etcd = Etcd::start();
    let wire = Wire::to(etcd.port).await;
    let (one, two) = (etcd.engine(1), engine_at(format!("http://127.0.0.1:{}", wire.port), 2));
    let (a, b) = (one.keyspace("c").unwrap(), two.keyspace("c").unwrap());
    let log = Arc::new(Log::default());
    b.observe(log.clone());
    for key in ["kept", "changed", "gone"] {
        put(&*a, key, "1").await;
    }
    until("the other process follows", || log.0.lock().len() == 3).await;
    wire.cut.send_replace(true);
    put(&*a, "changed", "2").await;
    put(&*a, "new", "1").await;
    let last = a.txn(vec![], vec![Op::delete("gone")]).await.unwrap();
    etcd.compact(last);
    wire.cut.send_replace(false);
    b.sync().await.unwrap();
    assert_eq!(replay(&log), entries(&*a, ""));
    assert!(
        log.0.lock().windows(2).all(|w| w[0].0 < w[1].0),
        "{log:?}",
        log = log.0.lock()
    );
    // It can write with the revisions that it was told.
    let revision = replay(&log)[0].2;
    b.txn(vec![Check::at("changed", revision)], vec![Op::put("changed", "3")])
        .await
        .unwrap();
}

#[tokio::test]
async fn an_etcd_that_is_not_there_is_named() {
    let config = EtcdConfig {
        endpoints: vec!["https://127.0.0.1:1".to_owned()],
        ..EtcdConfig::default()
    };
    let Err(error) = EtcdEngine::open(&config, 1) else {
        panic!("opened")
    };
    assert!(
        stdx::chain(&error).to_string().contains("CA certificate"),
        "{}",
        stdx::chain(&error)
    );
    assert!(EtcdEngine::open(&EtcdConfig::default(), 1).is_err());
}

//! The kubelet with the embedded engine and the real API server: real processes, real mounts, real files. Needs root;
//! every test runs in mount, pid, net, ipc and uts namespaces of its own.

use std::{
    net::IpAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::Arc,
    time::Duration,
};

use apiserver::{ApiServer, ApiServerConfig, ClusterConfig, NoDialer, UserInfo};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Pod, PodStatus, ServiceAccount};
use kubelet::{
    ClientApi, Kubelet, SandboxDialer,
    fake::{FakeApi, FakeRuntime, config},
};
use reconcile::{Client, DeleteParams, Informers, ListParams};
use sandbox::{
    Error, Network, PodIdentity, Runtime, SandboxConfig,
    embedded::{Engine, EngineConfig},
    images::{BuildSpec, ImageConfig, LayerSource, Store},
    supervisor::client::Client as Supervisor,
};
use serde_json::{Value, json};
use stdx::Shutdown;
use store::ModelEngine;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

const INSIDE: &str = "OAKS_TEST_DIR";

/// Runs `body` in namespaces of its own; `name` is the test's own.
fn isolated<F: Future<Output = ()>>(name: &str, body: impl FnOnce(World) -> F) {
    if let Some(dir) = std::env::var_os(INSIDE) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let all = async { body(World::start(PathBuf::from(dir)).await).await };
            timeout(Duration::from_secs(90), all).await.expect("the test hangs");
        });
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new("unshare")
        .args([
            "--mount",
            "--pid",
            "--net",
            "--ipc",
            "--uts",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .args(["--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads", "1"])
        .env(INSIDE, dir.path())
        .output()
        .unwrap();
    let group = linux::cgroup::Hierarchy::detect()
        .unwrap()
        .group(cgroup_name(dir.path()))
        .unwrap();
    group.kill_all(Duration::from_secs(5)).unwrap();
    group.remove().unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
    for line in out.lines().filter(|l| l.contains("p50")) {
        println!("{line}");
    }
}

fn cgroup_name(dir: &Path) -> String {
    format!(
        "oaks-test-{}",
        dir.file_name().unwrap().to_string_lossy().trim_start_matches('.')
    )
}

/// Every sandbox says it has this address; who dials it is led inside.
struct Inside;

#[async_trait]
impl Network for Inside {
    async fn attach(&self, _: &str, _: &SandboxConfig, _: &Path) -> Result<Vec<IpAddr>, Error> {
        Ok(vec!["10.9.0.2".parse().unwrap()])
    }

    async fn detach(&self, _: &str, _: &PodIdentity, _: Option<&Path>) -> Result<(), Error> {
        Ok(())
    }

    async fn gc(&self, _: &[String]) -> Result<(), Error> {
        Ok(())
    }
}

/// The host's static busybox with a link per applet.
fn busybox(dir: &Path) -> BuildSpec {
    let root = dir.join("busybox");
    for name in ["bin", "etc", "tmp"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    let program = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|p| Path::new(p).exists());
    std::fs::copy(program.expect("busybox is not installed"), root.join("bin/busybox")).unwrap();
    let list = Command::new(root.join("bin/busybox")).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout)
        .unwrap()
        .lines()
        .filter(|name| *name != "busybox")
    {
        let _ = symlink("busybox", root.join("bin").join(applet));
    }
    std::fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/:/bin/sh\napp:x:1000:1000::/tmp:/bin/sh\n",
    )
    .unwrap();
    let config = ImageConfig {
        cmd: vec!["sh".into()],
        ..Default::default()
    };
    BuildSpec {
        reference: "busybox".into(),
        layers: vec![LayerSource::Directory(root)],
        config,
    }
}

struct World {
    dir: PathBuf,
    init: Child,
    admin: Client,
    node: Client,
    engine: Engine,
    agent: Option<(Shutdown, JoinHandle<()>)>,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.init.kill();
        let _ = self.init.wait();
    }
}

async fn until(what: &str, check: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !check().await {
        assert!(Instant::now() < deadline, "not {what}");
        sleep(Duration::from_millis(1)).await;
    }
}

impl World {
    async fn start(dir: PathBuf) -> Self {
        let init = Command::new(testkit::bin("oaks-init"))
            .arg("--socket")
            .arg(dir.join("init.sock"))
            .arg("--state")
            .arg(dir.join("init"))
            .spawn()
            .unwrap();
        let supervisor = Supervisor::new(dir.join("init.sock"));
        until("supervised", async || supervisor.hello().is_ok()).await;
        Store::open(dir.join("images")).unwrap().build(&busybox(&dir)).unwrap();
        let server = ApiServer::new(ApiServerConfig {
            engine: ModelEngine::new(),
            dialer: Arc::new(NoDialer),
            data_dir: dir.join("api"),
            clock: stdx::RealClock::shared(),
        });
        let cluster = server
            .create_cluster(ClusterConfig::new("c", "https://127.0.0.1:6443"))
            .await
            .unwrap();
        let admin = Client::local(cluster.local_service(UserInfo::admin("test")));
        until("a namespace", async || {
            admin.get_opt::<Namespace>(None, "default").await.unwrap().is_some()
        })
        .await;
        let mut account = ServiceAccount::default();
        account.metadata.name = Some("default".into());
        admin.create(Some("default"), &account).await.unwrap();
        let w = Self {
            node: Client::local(cluster.local_service(UserInfo::new("system:node:n1", ["system:nodes"]))),
            engine: open(&dir).await,
            agent: None,
            admin,
            init,
            dir,
        };
        w.map("kube-root-ca.crt", json!({"ca.crt": cluster.ca_pem()})).await;
        w
    }

    /// A new engine and a new kubelet on the same directories, as after a restart of the node agent.
    async fn agent(&mut self) {
        if let Some((stop, task)) = self.agent.take() {
            stop.trigger();
            task.await.unwrap();
            self.engine = open(&self.dir).await;
        }
        let mut c = config(
            &Arc::new(FakeApi::default()),
            &Arc::new(FakeRuntime::default()),
            &self.dir,
        );
        let runtime: Arc<dyn Runtime> = Arc::new(self.engine.clone());
        c.api = ClientApi::new(self.node.clone(), Informers::new(self.node.clone()));
        c.dialer = Arc::new(SandboxDialer(runtime.clone()));
        c.runtime = runtime;
        c.images = Arc::new(self.engine.clone());
        c.clock = stdx::RealClock::shared();
        c.tuning.volume_refresh_s = 1;
        let (k, stop) = (Kubelet::new(c).unwrap(), Shutdown::new());
        let task = tokio::spawn({
            let (k, stop) = (k.clone(), stop.clone());
            async move { k.run(stop).await }
        });
        k.registered().await;
        self.agent = Some((stop, task));
    }

    async fn map(&self, name: &str, data: Value) {
        let map: ConfigMap = serde_json::from_value(json!({"metadata": {"name": name}, "data": data})).unwrap();
        match self.admin.get_opt::<ConfigMap>(Some("default"), name).await.unwrap() {
            None => drop(self.admin.create(Some("default"), &map).await.unwrap()),
            Some(_) => drop(self.admin.update(Some("default"), &map).await.unwrap()),
        }
    }

    async fn create(&self, name: &str, mut spec: Value) {
        spec["nodeName"] = json!("n1");
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap();
        self.admin.create(Some("default"), &pod).await.unwrap();
    }

    async fn until(&self, name: &str, what: &str, check: impl Fn(&PodStatus) -> bool) -> PodStatus {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let pod: Pod = self.admin.get(Some("default"), name).await.unwrap();
            let status = pod.status.unwrap_or_default();
            if check(&status) {
                return status;
            }
            if Instant::now() > deadline {
                let events = self.admin.list::<Event>(None, &ListParams::default()).await.unwrap();
                let said: Vec<_> = events.items.into_iter().map(|e| (e.reason, e.message)).collect();
                panic!("{name} is not {what}: {status:#?}\n{said:#?}");
            }
            sleep(Duration::from_millis(1)).await;
        }
    }

    async fn delete(&self, name: &str) {
        self.admin
            .delete::<Pod>(Some("default"), name, &DeleteParams::default())
            .await
            .unwrap();
    }

    async fn gone(&self, name: &str) {
        until("deleted", async || {
            self.admin
                .get_opt::<Pod>(Some("default"), name)
                .await
                .unwrap()
                .is_none()
        })
        .await;
    }

    /// Output of a shell script in the running container of this name.
    async fn sh(&self, container: &str, script: &str) -> String {
        let all = self.engine.list_containers().await.unwrap();
        let c = all
            .into_iter()
            .filter(|c| c.name == container)
            .max_by_key(|c| c.attempt)
            .unwrap();
        let argv = ["sh", "-c", script].map(String::from).to_vec();
        let (_, out, err) = self.engine.exec_sync(&c.id, argv, 10_000).await.unwrap();
        String::from_utf8_lossy(&out).into_owned() + &String::from_utf8_lossy(&err)
    }
}

async fn open(dir: &Path) -> Engine {
    let config = EngineConfig {
        root: dir.join("root"),
        run_dir: dir.join("run"),
        supervisor_socket: dir.join("init.sock"),
        cgroup_parent: cgroup_name(dir),
        runc: testkit::bin("oaks-runc"),
        init: testkit::bin("oaks-init"),
        network: Arc::new(Inside),
        images: Store::open(dir.join("images")).unwrap(),
        shared_images: None,
    };
    Engine::open(config).await.unwrap()
}

fn ready(s: &PodStatus) -> bool {
    s.conditions
        .iter()
        .flatten()
        .any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Runs until it is asked to end, and ends at once then, unless it is asked before it listens.
fn sleeper(name: &str) -> Value {
    let script = "trap 'exit 0' TERM; sleep 1000 & wait";
    let container = json!({"name": name, "image": "busybox", "command": ["sh", "-c", script]});
    json!({"containers": [container], "terminationGracePeriodSeconds": 1})
}

#[test]
fn a_pod_with_everything() {
    isolated("a_pod_with_everything", async |mut w| {
        w.agent().await;
        w.map("m", json!({"greeting": "hello"})).await;
        let mount = |name: &str, path: &str| json!({"name": name, "mountPath": path});
        w.create(
            "p",
            json!({
                "terminationGracePeriodSeconds": 2,
                "hostAliases": [{"ip": "10.1.2.3", "hostnames": ["db", "db.local"]}],
                "securityContext": {"fsGroup": 2000},
                "initContainers": [{"name": "first", "image": "busybox", "command": ["sh", "-c", "echo done > /data/init"],
                    "volumeMounts": [mount("data", "/data")]}],
                "containers": [
                    {"name": "web", "image": "busybox",
                        "command": ["sh", "-c", "trap 'echo bye > /dev/termination-log; exit 5' TERM; sleep 0.2; httpd -p 8080 -h /m; echo up; while :; do sleep 0.05; done"],
                        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                            {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}}],
                        "resources": {"limits": {"memory": "64Mi"}},
                        "readinessProbe": {"httpGet": {"path": "/greeting", "port": 8080}},
                        "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", "echo stopping > /data/stop"]}}},
                        "volumeMounts": [mount("m", "/m"), mount("data", "/data")]},
                    {"name": "side", "image": "busybox", "command": ["sleep", "1000"],
                        "securityContext": {"runAsUser": 1000},
                        "volumeMounts": [mount("data", "/shared"), mount("ram", "/ram")]},
                ],
                "volumes": [
                    {"name": "m", "configMap": {"name": "m"}},
                    {"name": "data", "emptyDir": {}},
                    {"name": "ram", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                ],
            }),
        )
        .await;
        let s = w.until("p", "ready", ready).await;
        assert_eq!(s.pod_ip.as_deref(), Some("10.9.0.2"));
        assert_eq!(
            w.sh("web", "cat /m/greeting /data/init; echo $POD_IP $MEM; hostname")
                .await,
            "hellodone\n10.9.0.2 64\np\n"
        );
        assert_eq!(
            w.sh(
                "side",
                "id -u; id -G; cat /shared/init; stat -c %g /shared; echo x > /shared/own && echo wrote"
            )
            .await,
            "1000\n1000 2000\ndone\n2000\nwrote\n"
        );
        assert!(w.sh("side", "cat /etc/hosts").await.contains("10.1.2.3\tdb\tdb.local"));
        assert!(
            w.sh("side", "dd if=/dev/zero of=/ram/big bs=1M count=3 2>&1")
                .await
                .contains("No space left")
        );
        assert_eq!(w.sh("web", "cut -d. -f1 /var/run/secrets/kubernetes.io/serviceaccount/token | base64 -d 2>/dev/null | grep -c ES256").await, "1\n");
        w.map("m", json!({"greeting": "changed"})).await;
        until("the new text is there", async || {
            w.sh("web", "cat /m/greeting").await == "changed"
        })
        .await;
        // Requests are metered by the cgroup.
        let web = w
            .engine
            .list_containers()
            .await
            .unwrap()
            .into_iter()
            .find(|c| c.name == "web")
            .unwrap();
        assert!(w.engine.container_stats(&web.id).await.unwrap().cpu_usage_core_ns > 0);
        let log = std::fs::read_to_string(&web.log_path).unwrap();
        assert!(log.ends_with("stdout F up\n"), "{log}");

        // An exit is seen, its message read, and the container restarted.
        w.sh("web", "kill 1").await;
        let s = w
            .until("p", "restarted", |s| {
                ready(s) && s.container_statuses.iter().flatten().any(|c| c.restart_count == 1)
            })
            .await;
        let web = s
            .container_statuses
            .unwrap()
            .into_iter()
            .find(|c| c.name == "web")
            .unwrap();
        let last = web.last_state.unwrap().terminated.unwrap();
        assert_eq!((last.exit_code, last.message.as_deref()), (5, Some("bye\n")));

        let pod: Pod = w.admin.get(Some("default"), "p").await.unwrap();
        let data = w.dir.join("kubelet/pods").join(pod.metadata.uid.unwrap());
        let stop = data.join("volumes/data/stop");
        w.delete("p").await;
        until("preStop ran", async || stop.exists() || !data.exists()).await;
        w.gone("p").await;
        assert!(!data.exists());
        assert!(w.engine.list_sandboxes().await.unwrap().is_empty());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(data.to_str().unwrap()), "{mounts}");
    });
}

#[test]
fn pods_outlive_their_agent() {
    isolated("pods_outlive_their_agent", async |mut w| {
        w.agent().await;
        w.create("stays", sleeper("stays")).await;
        w.create("goes", sleeper("goes")).await;
        let before = w.until("stays", "ready", ready).await;
        w.until("goes", "ready", ready).await;
        let pid = w.sh("stays", "cat /proc/1/stat | cut -d' ' -f22").await;
        w.admin
            .delete::<Pod>(
                Some("default"),
                "goes",
                &DeleteParams {
                    grace_period_s: Some(0),
                    ..Default::default()
                },
            )
            .await
            .unwrap();
        w.agent().await;
        until("one left", async || w.engine.list_sandboxes().await.unwrap().len() == 1).await;
        let after = w.until("stays", "ready", ready).await;
        assert_eq!(after.container_statuses, before.container_statuses);
        assert_eq!(w.sh("stays", "cat /proc/1/stat | cut -d' ' -f22").await, pid);
        w.delete("stays").await;
        w.gone("stays").await;
    });
}

#[test]
fn from_create_to_running() {
    isolated("from_create_to_running", async |mut w| {
        w.agent().await;
        w.create("warm", sleeper("warm")).await;
        w.until("warm", "ready", ready).await;
        let (mut up, mut down) = (Vec::new(), Vec::new());
        for i in 0..10 {
            let name = format!("p{i}");
            let begun = Instant::now();
            w.create(&name, sleeper("c")).await;
            w.until(&name, "ready", ready).await;
            up.push(begun.elapsed());
            let begun = Instant::now();
            w.delete(&name).await;
            w.gone(&name).await;
            down.push(begun.elapsed());
        }
        up.sort();
        down.sort();
        println!(
            "create to Ready: p50 {:?}, max {:?}; delete to gone: p50 {:?}",
            up[5], up[9], down[5]
        );
        assert!(up[5] < Duration::from_secs(1), "{up:?}");
    });
}

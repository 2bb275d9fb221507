//! A supervisor, a store with busybox and an engine, each test in namespaces of its own.
//!
//! [`isolated`] runs the test a second time below `unshare`: new mount, pid, net, ipc and uts namespaces, so that nothing it
//! mounts or starts outlives it. Its control group is removed from outside afterwards.

#![allow(dead_code, reason = "each test program uses a part")]

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::Arc,
    time::{Duration, Instant},
};

use sandbox::{
    ContainerConfig, ContainerState, ContainerStatus, Network, PodIdentity, Runtime, SandboxConfig,
    embedded::{Engine, EngineConfig, NoNetwork},
    images::{BuildSpec, ImageConfig, LayerSource, Store},
    supervisor::client::Client,
};

const INSIDE: &str = "OAKS_TEST_DIR";
const VICTIM: &str = "OAKS_TEST_VICTIM";

/// Runs `body` in its own namespaces; `name` is the test's own.
pub fn isolated<F: Future<Output = ()>>(name: &str, body: impl FnOnce(World) -> F) {
    if let Some(dir) = std::env::var_os(INSIDE) {
        if std::env::var_os(VICTIM).is_some() {
            return start_pods_for_ever(Path::new(&dir));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let all = async { body(World::start(PathBuf::from(dir)).await).await };
            tokio::time::timeout(Duration::from_secs(90), all)
                .await
                .expect("the test hangs");
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
            "--propagation",
            "private",
        ])
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
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("1 passed"),
        "the test did not run inside"
    );
}

/// A second process of this test with an engine of its own that starts pods until it is killed.
pub fn victim(name: &str) -> Child {
    let args = [name, "--exact", "--nocapture", "--test-threads", "1"];
    Command::new(std::env::current_exe().unwrap())
        .args(args)
        .env(VICTIM, "1")
        .spawn()
        .unwrap()
}

fn start_pods_for_ever(dir: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let engine = open_engine(dir, Arc::new(NoNetwork)).await;
        for number in 0.. {
            let name = format!("victim-{}-{number}", std::process::id());
            let sandbox = engine.run_sandbox(pod(dir, &name)).await.unwrap();
            let id = engine
                .create_container(&sandbox, sh("main", "exec sleep 1000"))
                .await
                .unwrap();
            engine.start_container(&id).await.unwrap();
        }
    });
}

fn pod(dir: &Path, name: &str) -> SandboxConfig {
    SandboxConfig {
        pod: PodIdentity {
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            name: name.into(),
            attempt: 0,
        },
        hostname: name.into(),
        log_directory: dir.join("logs").join(name),
        ..SandboxConfig::default()
    }
}

fn cgroup_name(dir: &Path) -> String {
    format!(
        "oaks-test-{}",
        dir.file_name().unwrap().to_string_lossy().trim_start_matches('.')
    )
}

pub struct World {
    pub dir: PathBuf,
    pub init: Child,
    pub engine: Engine,
    pub store: Store,
}

impl World {
    async fn start(dir: PathBuf) -> Self {
        let init = Command::new(env!("CARGO_BIN_EXE_oaks-init"))
            .arg("--socket")
            .arg(dir.join("init.sock"))
            .arg("--state")
            .arg(dir.join("init"))
            .spawn()
            .unwrap();
        let client = Client::new(dir.join("init.sock"));
        until("the supervisor answers", async || client.hello().is_ok()).await;
        let store = Store::open(dir.join("images")).unwrap();
        store.build(&busybox(&dir)).unwrap();
        let engine = open_engine(&dir, Arc::new(NoNetwork)).await;
        Self {
            dir,
            init,
            engine,
            store,
        }
    }

    /// A new engine on the same directories, as after a restart of the node agent.
    pub async fn reopen(&mut self) {
        self.engine = open_engine(&self.dir, Arc::new(NoNetwork)).await;
    }

    pub fn pod(&self, name: &str) -> SandboxConfig {
        pod(&self.dir, name)
    }

    /// Nothing of any pod is left: no directory, mount, process or exit record.
    pub fn assert_empty(&self) {
        for dir in [
            "root/containers",
            "root/sandboxes",
            "run/c",
            "run/s",
            "run/runc",
            "init/exits",
        ] {
            let entries = self.dir.join(dir).read_dir().into_iter().flatten();
            let left: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.dir.join("run").to_str().unwrap()), "{mounts}");
        let group = linux::cgroup::Hierarchy::detect()
            .unwrap()
            .group(cgroup_name(&self.dir))
            .unwrap();
        assert!(
            group.children().is_empty() && group.processes().unwrap().is_empty(),
            "{:?}",
            group.children()
        );
        let known = Client::new(self.dir.join("init.sock")).list().unwrap();
        assert!(known.is_empty(), "{known:?}");
    }

    pub async fn sandbox(&self, name: &str) -> String {
        self.engine.run_sandbox(self.pod(name)).await.unwrap()
    }

    /// Creates and starts a container that runs a shell script.
    pub async fn run(&self, sandbox: &str, name: &str, script: &str) -> String {
        self.start_container(sandbox, sh(name, script)).await
    }

    pub async fn start_container(&self, sandbox: &str, config: ContainerConfig) -> String {
        let id = self.engine.create_container(sandbox, config).await.unwrap();
        self.engine.start_container(&id).await.unwrap();
        id
    }

    pub async fn exited(&self, id: &str) -> ContainerStatus {
        until("the container exits", async || {
            self.status(id).await.state == ContainerState::Exited
        })
        .await;
        self.status(id).await
    }

    pub async fn status(&self, id: &str) -> ContainerStatus {
        self.engine.container_status(id).await.unwrap()
    }

    /// Output of one stream, without the log's time stamps.
    pub async fn log(&self, id: &str, stream: &str) -> String {
        let text = std::fs::read_to_string(self.status(id).await.log_path).unwrap_or_default();
        let lines = text
            .lines()
            .filter_map(|line| line.split_once(' ')?.1.strip_prefix(stream)?.strip_prefix(" F "));
        lines.map(|line| line.to_owned() + "\n").collect()
    }

    /// Exit code and standard output of a shell script in the container.
    pub async fn sh(&self, id: &str, script: &str) -> (i32, String) {
        let argv = ["sh", "-c", script].map(String::from).to_vec();
        let (code, out, err) = self.engine.exec_sync(id, argv, 20_000).await.unwrap();
        (
            code,
            String::from_utf8_lossy(&out).into_owned() + &String::from_utf8_lossy(&err),
        )
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.init.kill();
        let _ = self.init.wait();
    }
}

pub fn config(dir: &Path, network: Arc<dyn Network>) -> EngineConfig {
    EngineConfig {
        root: dir.join("root"),
        run_dir: dir.join("run"),
        supervisor_socket: dir.join("init.sock"),
        cgroup_parent: cgroup_name(dir),
        runc: env!("CARGO_BIN_EXE_oaks-runc").into(),
        init: env!("CARGO_BIN_EXE_oaks-init").into(),
        network,
        images: Store::open(dir.join("images")).unwrap(),
        shared_images: None,
    }
}

async fn open_engine(dir: &Path, network: Arc<dyn Network>) -> Engine {
    Engine::open(config(dir, network)).await.unwrap()
}

pub fn sh(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        name: name.into(),
        image: "busybox".into(),
        command: ["sh", "-c", script].map(String::from).to_vec(),
        log_path: format!("{name}/0.log").into(),
        ..ContainerConfig::default()
    }
}

/// The host's static busybox with a link per applet, and a user.
fn busybox(dir: &Path) -> BuildSpec {
    let root = dir.join("busybox");
    for name in ["bin", "etc", "tmp", "root"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    let program = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists());
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
        "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/tmp:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(root.join("etc/group"), "root:x:0:\napp:x:1001:\nextra:x:1002:app\n").unwrap();
    BuildSpec {
        reference: "busybox".into(),
        layers: vec![LayerSource::Directory(root)],
        config: ImageConfig {
            cmd: vec!["sh".into()],
            env: vec!["FROM_IMAGE=1".into()],
            ..ImageConfig::default()
        },
    }
}

pub async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !holds().await {
        assert!(Instant::now() < end, "timed out: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

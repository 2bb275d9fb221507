//! A runtime in memory. A container runs until it is told to end; the image `exit:<n>` ends at once with code `n`;
//! images with `missing` in their name cannot be pulled.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use sandbox::*;
use stdx::{Clock as _, clock::RuntimeClock};
use tokio::sync::broadcast;

#[derive(Default)]
struct State {
    sandboxes: BTreeMap<String, SandboxStatus>,
    containers: BTreeMap<String, (ContainerStatus, ContainerConfig)>,
    /// Answers of `exec_sync` by the first word of argv; a word not here answers 0.
    execs: HashMap<String, i32>,
    /// Verbs in order, `create a`, `start a`, `stop a 30`.
    calls: Vec<String>,
    /// Sandboxes fail while this is set.
    sandbox_fails: Option<String>,
    /// Containers do not stop before their grace is over.
    stubborn: bool,
}

pub struct FakeRuntime {
    state: Mutex<State>,
    next: AtomicU64,
    events: broadcast::Sender<RuntimeEvent>,
    clock: RuntimeClock,
}

impl Default for FakeRuntime {
    /// Must be made inside a tokio runtime, whose clock it follows.
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            next: AtomicU64::new(1),
            events: broadcast::channel(256).0,
            clock: RuntimeClock::new(SystemTime::now()),
        }
    }
}

fn absent(what: &'static str, id: &str) -> Error {
    Error::NotFound {
        what,
        id: id.to_owned(),
    }
}

impl FakeRuntime {
    fn id(&self, prefix: &str) -> String {
        format!("{prefix}{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Ends the running container of this name with `code`.
    pub fn finish(&self, name: &str, code: i32) {
        let id = {
            let s = self.state.lock();
            s.containers
                .values()
                .find(|(c, _)| c.name == name && c.state == ContainerState::Running)
                .map(|(c, _)| c.id.clone())
        };
        if let Some(id) = id {
            self.end(&id, code);
        }
    }

    fn end(&self, id: &str, code: i32) {
        let mut s = self.state.lock();
        let Some((c, _)) = s.containers.get_mut(id) else { return };
        if c.state == ContainerState::Exited {
            return;
        }
        c.state = ContainerState::Exited;
        c.exit_code = code;
        c.finished_at = Some(self.clock.now());
        c.reason = if code == 0 { "Completed" } else { "Error" }.into();
        let pod_uid = c.labels.get("io.kubernetes.pod.uid").cloned().unwrap_or_default();
        let _ = self.events.send(RuntimeEvent::ContainerStopped {
            pod_uid,
            container_id: id.to_owned(),
        });
    }

    pub fn exec_answers(&self, argv0: &str, code: i32) {
        self.state.lock().execs.insert(argv0.into(), code);
    }

    pub fn sandboxes_fail(&self, why: Option<&str>) {
        self.state.lock().sandbox_fails = why.map(Into::into);
    }

    pub fn stubborn(&self, yes: bool) {
        self.state.lock().stubborn = yes;
    }

    pub fn calls(&self) -> Vec<String> {
        self.state.lock().calls.clone()
    }

    pub fn sandboxes(&self) -> usize {
        self.state.lock().sandboxes.len()
    }

    pub fn containers(&self) -> usize {
        self.state.lock().containers.len()
    }

    /// What the newest container of this name was made from.
    pub fn made(&self, name: &str) -> Option<ContainerConfig> {
        let s = self.state.lock();
        s.containers
            .values()
            .filter(|(c, _)| c.name == name)
            .max_by_key(|(c, _)| c.attempt)
            .map(|(_, m)| m.clone())
    }

    /// A sandbox that no pod of this test has asked for.
    pub fn leave_orphan(&self, uid: &str) {
        let id = self.id("orphan");
        let pod = PodIdentity {
            uid: uid.into(),
            namespace: "default".into(),
            name: uid.into(),
            attempt: 0,
        };
        self.state
            .lock()
            .sandboxes
            .insert(id.clone(), sandbox(id, pod, SandboxConfig::default()));
    }

    fn say(&self, call: String) {
        self.state.lock().calls.push(call);
    }
}

fn sandbox(id: String, pod: PodIdentity, config: SandboxConfig) -> SandboxStatus {
    let ips: Vec<IpAddr> = if config.host_network {
        vec![]
    } else {
        vec!["127.0.0.1".parse().expect("an address")]
    };
    SandboxStatus {
        id,
        pod,
        state: SandboxState::Ready,
        created_at: SystemTime::now(),
        ips,
        labels: config.labels,
        annotations: config.annotations,
    }
}

#[async_trait]
impl Runtime for FakeRuntime {
    async fn run_sandbox(&self, config: SandboxConfig) -> Result<String, Error> {
        if let Some(reason) = self.state.lock().sandbox_fails.clone() {
            return Err(Error::Network {
                sandbox: config.pod.name,
                reason,
            });
        }
        let id = self.id("s");
        self.say(format!("sandbox {}", config.pod.name));
        let status = sandbox(id.clone(), config.pod.clone(), config);
        self.state.lock().sandboxes.insert(id.clone(), status);
        Ok(id)
    }

    async fn stop_sandbox(&self, id: &str) -> Result<(), Error> {
        let inside: Vec<String> = {
            let mut s = self.state.lock();
            if let Some(sb) = s.sandboxes.get_mut(id) {
                sb.state = SandboxState::NotReady;
            }
            s.containers
                .values()
                .filter(|(c, _)| c.sandbox_id == id)
                .map(|(c, _)| c.id.clone())
                .collect()
        };
        for c in inside {
            self.end(&c, 137);
        }
        Ok(())
    }

    async fn remove_sandbox(&self, id: &str) -> Result<(), Error> {
        let mut s = self.state.lock();
        s.sandboxes.remove(id);
        s.containers.retain(|_, (c, _)| c.sandbox_id != id);
        Ok(())
    }

    async fn sandbox_status(&self, id: &str) -> Result<SandboxStatus, Error> {
        self.state
            .lock()
            .sandboxes
            .get(id)
            .cloned()
            .ok_or_else(|| absent("sandbox", id))
    }

    async fn list_sandboxes(&self) -> Result<Vec<SandboxStatus>, Error> {
        Ok(self.state.lock().sandboxes.values().cloned().collect())
    }

    async fn create_container(&self, sandbox_id: &str, config: ContainerConfig) -> Result<String, Error> {
        let id = self.id("c");
        self.say(format!("create {}", config.name));
        let status = ContainerStatus {
            id: id.clone(),
            sandbox_id: sandbox_id.into(),
            name: config.name.clone(),
            attempt: config.attempt,
            state: ContainerState::Created,
            created_at: self.clock.now(),
            started_at: None,
            finished_at: None,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            image: config
                .annotations
                .get("oaks.internal/image")
                .cloned()
                .unwrap_or_default(),
            image_ref: config.image.clone(),
            log_path: config.log_path.clone(),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        };
        self.state.lock().containers.insert(id.clone(), (status, config));
        Ok(id)
    }

    async fn start_container(&self, id: &str) -> Result<(), Error> {
        let code = {
            let mut s = self.state.lock();
            let (c, _) = s.containers.get_mut(id).ok_or_else(|| absent("container", id))?;
            c.state = ContainerState::Running;
            c.started_at = Some(self.clock.now());
            let call = format!("start {}", c.name);
            let code = c.image.strip_prefix("exit:").and_then(|n| n.parse().ok());
            s.calls.push(call);
            code
        };
        if let Some(code) = code {
            self.end(id, code);
        }
        Ok(())
    }

    async fn stop_container(&self, id: &str, grace_s: u64) -> Result<(), Error> {
        let stubborn = {
            let mut s = self.state.lock();
            let (c, _) = s.containers.get(id).ok_or_else(|| absent("container", id))?;
            let call = format!("stop {} {grace_s}", c.name);
            s.calls.push(call);
            s.stubborn
        };
        if stubborn {
            tokio::time::sleep(std::time::Duration::from_secs(grace_s)).await;
        }
        self.end(id, if stubborn { 137 } else { 143 });
        Ok(())
    }

    async fn remove_container(&self, id: &str) -> Result<(), Error> {
        self.state.lock().containers.remove(id);
        Ok(())
    }

    async fn container_status(&self, id: &str) -> Result<ContainerStatus, Error> {
        self.state
            .lock()
            .containers
            .get(id)
            .map(|(c, _)| c.clone())
            .ok_or_else(|| absent("container", id))
    }

    async fn list_containers(&self) -> Result<Vec<ContainerStatus>, Error> {
        Ok(self.state.lock().containers.values().map(|(c, _)| c.clone()).collect())
    }

    async fn container_stats(&self, id: &str) -> Result<Stats, Error> {
        self.container_status(id).await?;
        Ok(Stats {
            cpu_usage_core_ns: 2_000_000_000,
            memory_working_set_bytes: 1024,
            memory_usage_bytes: 2048,
            pids: 1,
        })
    }

    /// Echoes its standard input, then its arguments, and ends with the answer set for `argv[0]`.
    async fn exec(&self, container_id: &str, request: ExecRequest) -> Result<ExecSession, Error> {
        self.container_status(container_id).await?;
        let argv0 = request.argv.first().cloned().unwrap_or_default();
        let code = self.state.lock().execs.get(&argv0).copied().unwrap_or(0);
        let (near, far) = tokio::io::duplex(4096);
        let (stdin, mut input) = tokio::io::duplex(4096);
        let (exit_tx, exit) = tokio::sync::oneshot::channel();
        let wants_stdin = request.stdin;
        tokio::spawn(async move {
            use tokio::io::AsyncWriteExt;
            let mut far = far;
            let _ = far.write_all(request.argv.join("|").as_bytes()).await;
            if wants_stdin {
                let _ = tokio::io::copy(&mut input, &mut far).await;
            }
            drop(far);
            let _ = exit_tx.send(Ok(code));
        });
        Ok(ExecSession {
            stdin: wants_stdin.then(|| Box::pin(stdin) as _),
            stdout: Some(Box::pin(near)),
            stderr: None,
            resize: None,
            exit,
        })
    }

    async fn exec_sync(&self, container_id: &str, argv: Vec<String>, _ms: u64) -> Result<(i32, Bytes, Bytes), Error> {
        let name = self.container_status(container_id).await?.name;
        self.say(format!("exec {name} {}", argv.join(" ")));
        let code = argv
            .first()
            .and_then(|w| self.state.lock().execs.get(w).copied())
            .unwrap_or(0);
        Ok((code, Bytes::new(), Bytes::new()))
    }

    async fn attach(&self, container_id: &str, stdin: bool) -> Result<ExecSession, Error> {
        let request = ExecRequest {
            argv: vec!["attached".into()],
            stdin,
            stdout: true,
            stderr: true,
            tty: false,
        };
        self.exec(container_id, request).await
    }

    async fn dial(&self, _sandbox_id: &str, port: u16) -> Result<tokio::net::TcpStream, Error> {
        tokio::net::TcpStream::connect(("127.0.0.1", port))
            .await
            .map_err(|source| Error::Io {
                doing: format!("dialing {port}"),
                source,
            })
    }

    fn events(&self) -> Pin<Box<dyn Stream<Item = RuntimeEvent> + Send>> {
        let rx = self.events.subscribe();
        stream::unfold(rx, |mut rx| async {
            match rx.recv().await {
                Ok(e) => Some((e, rx)),
                Err(broadcast::error::RecvError::Lagged(_)) => Some((RuntimeEvent::Lagged, rx)),
                Err(broadcast::error::RecvError::Closed) => None,
            }
        })
        .boxed()
    }
}

#[async_trait]
impl Images for FakeRuntime {
    async fn image_status(&self, reference: &str) -> Result<Option<ImageStatus>, Error> {
        Ok((!reference.contains("missing")).then(|| image(reference)))
    }

    async fn pull_image(&self, reference: &str, _auth: Option<RegistryAuth>) -> Result<ImageStatus, Error> {
        self.say(format!("pull {reference}"));
        if reference.contains("missing") {
            return Err(Error::ImagePull {
                image: reference.into(),
                reason: "not found".into(),
            });
        }
        Ok(image(reference))
    }

    async fn list_images(&self) -> Result<Vec<ImageStatus>, Error> {
        Ok(vec![])
    }

    async fn remove_image(&self, _reference: &str) -> Result<(), Error> {
        Ok(())
    }
}

fn image(reference: &str) -> ImageStatus {
    ImageStatus {
        id: format!("sha256:{reference}"),
        tags: vec![reference.into()],
        digests: vec![],
        size_bytes: 1,
        uid: Some(0),
        username: String::new(),
    }
}

//! The embedded engine: pods from namespaces, overlay and control groups, with no daemon and no process per pod.
//!
//! * `sandbox`: a pod's pinned namespaces, group and files. * `container`: root file system, bundle, life and death.
//! * `streams`: exec and attach. * `spec`, `user`: pure decisions. * `rootfs`: safe looks into images. * `records`: what is
//!   on disk. * `exits`: news from the supervisor. * `cni`, `network`: ways to give a pod its network.
//!
//! Container processes are children of the supervisor, namespaces are pinned by mounts, records are files: so an engine may
//! die at any time, and the next one finds every pod as it was ([`Engine::open`]).

mod cni;
mod container;
mod exits;
mod network;
mod records;
mod rootfs;
mod sandbox;
mod spec;
mod streams;
mod user;

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use linux::cgroup::{Group, Hierarchy};
use parking_lot::Mutex;
use tokio::sync::broadcast;

pub use self::{cni::CniNetwork, network::NoNetwork};
use self::{
    container::Container,
    records::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord},
    sandbox::Sandbox,
};
use crate::{
    api::*,
    images::{Image, ImageError, Store},
    supervisor::client::{Client, ClientError},
};

/// Longer than the supervisor lets a helper work.
const START_PATIENCE: std::time::Duration = std::time::Duration::from_secs(35);
/// Events a reader may be behind before it is told to list again.
const EVENTS_MAX: usize = 1024;

#[derive(Clone)]
pub struct EngineConfig {
    /// Records, writable layers, bundles. Must not lie on an overlay.
    pub root: PathBuf,
    /// Namespaces and mounts of running pods; best on tmpfs, empty after a reboot.
    pub run_dir: PathBuf,
    /// Socket of `oaks-init`.
    pub supervisor_socket: PathBuf,
    /// Control group of all pods, relative to this process's own groups: `pods`.
    pub cgroup_parent: String,
    /// The programs `oaks-runc` and `oaks-init`.
    pub runc: PathBuf,
    pub init: PathBuf,
    pub network: Arc<dyn Network>,
    /// This engine's own store: what it pulls.
    pub images: Store,
    /// The host's store, asked first; read-only in a machine.
    pub shared_images: Option<Store>,
}

/// The engine. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    config: EngineConfig,
    supervisor: Client,
    pods: Group,
    fences_devices: bool,
    available_capabilities: BTreeSet<String>,
    sandboxes: Mutex<HashMap<String, Arc<Sandbox>>>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    events: broadcast::Sender<RuntimeEvent>,
    watch: Mutex<Option<std::os::unix::net::UnixStream>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Ends the watching thread.
        if let Some(stream) = self.watch.get_mut().take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Engine {
    /// Opens the engine on its directories and takes over whatever a former process left: running pods go on, half-made ones
    /// are removed, ended ones are recorded. Calls [`Network::gc`] with the sandboxes that live.
    ///
    /// # Errors
    /// `Runtime` if the supervisor does not answer or no usable control groups are mounted; `Io` for the directories.
    pub async fn open(config: EngineConfig) -> Result<Self, Error> {
        let inner = tokio::task::spawn_blocking(move || Inner::open(config))
            .await
            .map_err(|error| joined(&error))??;
        let inner = Arc::new(inner);
        let live = inner.adopt().await?;
        inner.config.network.gc(&live).await?;
        exits::watch(&inner)?;
        Ok(Self { inner })
    }

    /// Directories of layers that containers use: not to be collected ([`Store::gc`]).
    pub fn layers_in_use(&self) -> BTreeSet<PathBuf> {
        let containers = self.inner.containers.lock();
        containers
            .values()
            .flat_map(|container| container.record().layers)
            .collect()
    }

    /// Path of the sandbox's pinned network namespace; `None` for a host-network pod.
    pub fn sandbox_netns(&self, id: &str) -> Result<Option<PathBuf>, Error> {
        let sandbox = self.inner.sandbox(id)?;
        Ok((!sandbox.record().config.host_network).then(|| self.inner.pins(id).join("net")))
    }

    /// Runs `work` to its end even if the caller goes away: half a verb would leave half a pod.
    async fn whole<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        tokio::spawn(work).await.map_err(|error| joined(&error))?
    }
}

fn joined(error: &tokio::task::JoinError) -> Error {
    Error::Runtime {
        doing: "run a task of the engine".to_owned(),
        reason: error.to_string(),
    }
}

/// Runs blocking work off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| joined(&error))?
}

/// An error with its whole chain as the reason.
fn runtime(doing: impl Into<String>, error: &dyn std::error::Error) -> Error {
    let mut reason = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        reason.push_str(": ");
        reason.push_str(&source.to_string());
        next = source.source();
    }
    Error::Runtime {
        doing: doing.into(),
        reason,
    }
}

fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let doing = doing.into();
    move |source| Error::Io { doing, source }
}

fn supervisor(doing: &str) -> impl FnOnce(ClientError) -> Error {
    let doing = doing.to_owned();
    move |error| runtime(doing, &error)
}

/// 128 random bits as hex.
fn new_id() -> Result<String, Error> {
    let mut bytes = [0u8; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut bytes))
        .map_err(io("draw an id"))?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

impl Inner {
    fn open(config: EngineConfig) -> Result<Self, Error> {
        for dir in [
            config.root.join("sandboxes"),
            config.root.join("containers"),
            config.run_dir.join("s"),
            config.run_dir.join("c"),
        ] {
            std::fs::create_dir_all(&dir).map_err(io(format!("create {}", dir.display())))?;
        }
        let client = Client::new(&config.supervisor_socket);
        client.hello().map_err(supervisor("reach the supervisor"))?;
        let hierarchy = Hierarchy::detect().map_err(|error| runtime("find control groups", &error))?;
        let pods = hierarchy
            .group(&config.cgroup_parent)
            .map_err(|error| runtime("name the pods' control group", &error))?;
        pods.create()
            .map_err(|error| runtime("create the pods' control group", &error))?;
        let available = spec::ALL_CAPABILITIES
            .iter()
            .filter(|name| rustix::thread::capability_is_in_bounding_set(crate::runc::set_of(name)).unwrap_or(false))
            .map(|name| (*name).to_owned())
            .collect();
        Ok(Self {
            supervisor: client,
            pods,
            fences_devices: hierarchy.version() == linux::cgroup::Version::V1,
            available_capabilities: available,
            sandboxes: Mutex::default(),
            containers: Mutex::default(),
            events: broadcast::channel(EVENTS_MAX).0,
            watch: Mutex::default(),
            config,
        })
    }

    /// Loads the records and makes them agree with what exists; the ids of sandboxes that live.
    async fn adopt(self: &Arc<Self>) -> Result<Vec<String>, Error> {
        let inner = self.clone();
        let broken = blocking(move || inner.load()).await?;
        for id in broken {
            // Half-made: no one knows it but us.
            self.discard_sandbox(&id).await;
        }
        let sandboxes: Vec<_> = self.sandboxes.lock().values().cloned().collect();
        for sandbox in sandboxes {
            let pinned = linux::mount::is_mount_point(&self.pins(&sandbox.id).join("ipc")).unwrap_or(false);
            if sandbox.is_ready() && !pinned {
                self.note_reboot(&sandbox).await?;
            }
        }
        let half_made: Vec<_> = {
            let containers = self.containers.lock();
            containers
                .values()
                .filter(|container| container.record().phase == ContainerPhase::Creating)
                .cloned()
                .collect()
        };
        for container in half_made {
            let (inner, id) = (self.clone(), container.id.clone());
            blocking(move || inner.erase_container(&id)).await?;
        }
        // A start that our predecessor did not see through is still under way at the supervisor, which bounds it.
        let end = std::time::Instant::now() + START_PATIENCE;
        loop {
            let inner = self.clone();
            blocking(move || inner.reconcile_exits()).await?;
            let starting = self
                .containers
                .lock()
                .values()
                .any(|container| container.record().phase == ContainerPhase::Starting);
            if !starting || std::time::Instant::now() > end {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let sandboxes = self.sandboxes.lock();
        Ok(sandboxes
            .values()
            .filter(|sandbox| sandbox.record().phase == SandboxPhase::Ready)
            .map(|sandbox| sandbox.id.clone())
            .collect())
    }

    /// Fills the maps from disk; the ids of sandboxes that were never finished.
    fn load(&self) -> Result<Vec<String>, Error> {
        let failed = "load records";
        let (records, mut broken) =
            records::load::<SandboxRecord>(&self.config.root.join("sandboxes"), "record.json").map_err(io(failed))?;
        for record in records {
            if record.phase == SandboxPhase::Creating {
                broken.push(record.id);
                continue;
            }
            self.sandboxes
                .lock()
                .insert(record.id.clone(), Arc::new(Sandbox::new(record)));
        }
        let (records, orphans) = records::load::<ContainerRecord>(&self.config.root.join("containers"), "record.json")
            .map_err(io(failed))?;
        for record in records {
            self.containers
                .lock()
                .insert(record.id.clone(), Arc::new(Container::new(record)));
        }
        for id in orphans {
            self.erase_container(&id)?;
        }
        // Groups of pods nobody knows.
        let known: BTreeSet<String> = self
            .sandboxes
            .lock()
            .values()
            .map(|sandbox| sandbox.group_name())
            .collect();
        for name in self.pods.children() {
            if !known.contains(&name) {
                let group = self
                    .pods
                    .child(&name)
                    .map_err(|error| runtime("name a control group", &error))?;
                let _ = group.kill_all(std::time::Duration::from_secs(2));
                let _ = group.remove();
            }
        }
        Ok(broken)
    }

    fn emit(&self, event: RuntimeEvent) {
        // No reader is fine.
        let _ = self.events.send(event);
    }

    fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, Error> {
        self.sandboxes.lock().get(id).cloned().ok_or_else(|| Error::NotFound {
            what: "sandbox",
            id: id.to_owned(),
        })
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.containers.lock().get(id).cloned().ok_or_else(|| Error::NotFound {
            what: "container",
            id: id.to_owned(),
        })
    }

    fn containers_of(&self, sandbox_id: &str) -> Vec<Arc<Container>> {
        let containers = self.containers.lock();
        containers
            .values()
            .filter(|container| container.sandbox_id == sandbox_id)
            .cloned()
            .collect()
    }

    /// The host's store first, then our own.
    fn find_image(&self, reference: &str) -> Result<Option<Image>, Error> {
        for store in self.config.shared_images.iter().chain([&self.config.images]) {
            if let Some(image) = store
                .resolve(reference)
                .map_err(|error| image_error(reference, error))?
            {
                return Ok(Some(image));
            }
        }
        Ok(None)
    }
}

fn image_error(reference: &str, error: ImageError) -> Error {
    let Error::Runtime { reason, .. } = runtime("", &error) else {
        unreachable!("runtime makes one kind")
    };
    match error {
        ImageError::Reference(_) => Error::Invalid {
            field: "image".to_owned(),
            reason,
        },
        ImageError::NotFound { .. } => Error::ImageNotPresent {
            image: reference.to_owned(),
            reason,
        },
        ImageError::Unsupported { feature } => Error::Unsupported { feature },
        _ => Error::ImagePull {
            image: reference.to_owned(),
            reason,
        },
    }
}

fn image_status(image: Image) -> ImageStatus {
    let name = image.config.user.split(':').next().unwrap_or_default().to_owned();
    let uid = if name.is_empty() { Some(0) } else { name.parse().ok() };
    ImageStatus {
        id: image.id,
        tags: image.tags,
        digests: image.digests,
        size_bytes: image.size_bytes,
        username: if uid.is_some() { String::new() } else { name },
        uid,
    }
}

#[async_trait]
impl Runtime for Engine {
    async fn run_sandbox(&self, config: SandboxConfig) -> Result<String, Error> {
        let inner = self.inner.clone();
        self.whole(async move { inner.run_sandbox(config).await }).await
    }

    async fn stop_sandbox(&self, id: &str) -> Result<(), Error> {
        let (inner, id) = (self.inner.clone(), id.to_owned());
        self.whole(async move { inner.stop_sandbox(&id).await }).await
    }

    async fn remove_sandbox(&self, id: &str) -> Result<(), Error> {
        let (inner, id) = (self.inner.clone(), id.to_owned());
        self.whole(async move { inner.remove_sandbox(&id).await }).await
    }

    async fn sandbox_status(&self, id: &str) -> Result<SandboxStatus, Error> {
        Ok(self.inner.sandbox(id)?.record().status())
    }

    async fn list_sandboxes(&self) -> Result<Vec<SandboxStatus>, Error> {
        let sandboxes = self.inner.sandboxes.lock();
        let ready = sandboxes
            .values()
            .map(|sandbox| sandbox.record())
            .filter(|record| record.phase != SandboxPhase::Creating);
        Ok(ready.map(|record| record.status()).collect())
    }

    async fn create_container(&self, sandbox_id: &str, config: ContainerConfig) -> Result<String, Error> {
        let (inner, sandbox_id) = (self.inner.clone(), sandbox_id.to_owned());
        self.whole(async move { inner.create_container(&sandbox_id, config).await })
            .await
    }

    async fn start_container(&self, id: &str) -> Result<(), Error> {
        let (inner, id) = (self.inner.clone(), id.to_owned());
        self.whole(async move { inner.start_container(&id).await }).await
    }

    async fn stop_container(&self, id: &str, grace_s: u64) -> Result<(), Error> {
        let (inner, id) = (self.inner.clone(), id.to_owned());
        self.whole(async move { inner.stop_container(&id, std::time::Duration::from_secs(grace_s)).await })
            .await
    }

    async fn remove_container(&self, id: &str) -> Result<(), Error> {
        let (inner, id) = (self.inner.clone(), id.to_owned());
        self.whole(async move { inner.remove_container(&id).await }).await
    }

    async fn container_status(&self, id: &str) -> Result<ContainerStatus, Error> {
        Ok(self.inner.container(id)?.record().status())
    }

    async fn list_containers(&self) -> Result<Vec<ContainerStatus>, Error> {
        let containers = self.inner.containers.lock();
        let made = containers
            .values()
            .map(|container| container.record())
            .filter(|record| record.phase != ContainerPhase::Creating);
        Ok(made.map(|record| record.status()).collect())
    }

    async fn container_stats(&self, id: &str) -> Result<Stats, Error> {
        let container = self.inner.container(id)?;
        let group = self.inner.container_group(&container)?;
        blocking(move || {
            let usage = group.usage().map_err(|error| runtime("read a control group", &error))?;
            Ok(Stats {
                cpu_usage_core_ns: usage.cpu_ns,
                memory_working_set_bytes: usage.memory_working_set_bytes,
                memory_usage_bytes: usage.memory_bytes,
                pids: usage.pids,
            })
        })
        .await
    }

    async fn exec(&self, container_id: &str, request: ExecRequest) -> Result<ExecSession, Error> {
        self.inner.exec(container_id, request).await
    }

    async fn exec_sync(
        &self,
        container_id: &str,
        argv: Vec<String>,
        timeout_ms: u64,
    ) -> Result<(i32, Bytes, Bytes), Error> {
        self.inner.exec_sync(container_id, argv, timeout_ms).await
    }

    async fn attach(&self, container_id: &str, stdin: bool) -> Result<ExecSession, Error> {
        self.inner.attach(container_id, stdin).await
    }

    async fn dial(&self, sandbox_id: &str, port: u16) -> Result<tokio::net::TcpStream, Error> {
        self.inner.dial(sandbox_id, port).await
    }

    fn events(&self) -> Pin<Box<dyn Stream<Item = RuntimeEvent> + Send>> {
        let receiver = self.inner.events.subscribe();
        Box::pin(futures::stream::unfold(receiver, |mut receiver| async move {
            match receiver.recv().await {
                Ok(event) => Some((event, receiver)),
                Err(broadcast::error::RecvError::Lagged(_)) => Some((RuntimeEvent::Lagged, receiver)),
                Err(broadcast::error::RecvError::Closed) => None,
            }
        }))
    }
}

#[async_trait]
impl Images for Engine {
    async fn image_status(&self, reference: &str) -> Result<Option<ImageStatus>, Error> {
        let (inner, reference) = (self.inner.clone(), reference.to_owned());
        blocking(move || Ok(inner.find_image(&reference)?.map(image_status))).await
    }

    async fn pull_image(&self, reference: &str, auth: Option<RegistryAuth>) -> Result<ImageStatus, Error> {
        if let Some(status) = self.image_status(reference).await? {
            return Ok(status);
        }
        let store = self.inner.config.images.clone();
        // Boxed: the client's state is large.
        let image = Box::pin(store.pull(reference, auth))
            .await
            .map_err(|error| image_error(reference, error))?;
        Ok(image_status(image))
    }

    async fn list_images(&self) -> Result<Vec<ImageStatus>, Error> {
        let inner = self.inner.clone();
        blocking(move || {
            let mut found: Vec<ImageStatus> = Vec::new();
            for store in inner.config.shared_images.iter().chain([&inner.config.images]) {
                for image in store.list().map_err(|error| image_error("", error))? {
                    if !found.iter().any(|known| known.id == image.id) {
                        found.push(image_status(image));
                    }
                }
            }
            Ok(found)
        })
        .await
    }

    /// Removes from this engine's own store; images of the host's store stay, and asking for it is refused.
    async fn remove_image(&self, reference: &str) -> Result<(), Error> {
        let (engine, reference) = (self.clone(), reference.to_owned());
        blocking(move || {
            let store = &engine.inner.config.images;
            let failed = |error| image_error(&reference, error);
            if store.resolve(&reference).map_err(failed)?.is_some() {
                store.remove(&reference).map_err(failed)?;
                store.gc(&engine.layers_in_use()).map_err(failed)?;
                return Ok(());
            }
            match engine.inner.find_image(&reference)? {
                None => Ok(()),
                Some(_) => Err(Error::Unsupported {
                    feature: format!("removing {reference} of the host's image store"),
                }),
            }
        })
        .await
    }
}

//! The agent: one worker per pod, fed from the watch; runtime events and a periodic list poke them; what nobody owns is
//! removed.

use std::{
    collections::{HashMap, HashSet},
    net::TcpListener,
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use k8s_openapi::{
    api::core::v1::{Pod, PodStatus},
    jiff::Timestamp,
};
use parking_lot::Mutex;
use sandbox::{ContainerState, ContainerStatus, PodIdentity, RuntimeEvent, SandboxStatus};
use stdx::Shutdown;
use thiserror::Error;
use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    api::{ApiError, PodEvent},
    clock,
    config::{KubeletConfig, Refusal},
    env,
    events::Events,
    node,
    pod::{
        ops,
        plan::PodRuntime,
        start::POD_UID,
        view::PodView,
        worker::{Seen, Worker},
    },
    server,
    volumes::{Volumes, content::Sources},
};

#[derive(Debug, Error)]
pub enum KubeletError {
    #[error("no serving certificate is configured")]
    NoServing,
    #[error("serving certificate or client CA: {reason}")]
    Serving { reason: String },
    #[error("the kubelet's listener")]
    Listen(#[source] std::io::Error),
    #[error("making {path}")]
    Root {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// The newest version of a pod.
#[derive(Clone)]
pub struct Desired {
    pub pod: Arc<Pod>,
    /// The object is gone; `pod` is its last version.
    pub gone: bool,
}

/// What all tasks of one kubelet share.
pub struct Core {
    pub config: KubeletConfig,
    pub events: Events,
    pub volumes: Volumes,
    /// Starts of sandboxes and containers; stops take none, so that a storm of starts cannot hold them up.
    pub starts: Semaphore,
    pub registered: watch::Sender<bool>,
    pub node_uid: Mutex<Option<String>>,
    pods: Mutex<HashMap<String, Handle>>,
}

#[derive(Clone)]
struct Handle {
    desired: watch::Sender<Desired>,
    poke: Arc<Notify>,
    seen: Arc<Mutex<Seen>>,
}

/// A pod as the server shows it.
pub struct PodShown {
    pub pod: Arc<Pod>,
    pub status: PodStatus,
    pub runtime: PodRuntime,
}

impl Core {
    pub fn now(&self) -> Timestamp {
        clock::now(&self.config.clock)
    }

    /// `oaks` of `oaks://1.0`.
    pub fn runtime_name(&self) -> &str {
        self.config.runtime_version.split("://").next().unwrap_or("oaks")
    }

    /// Service variables for a pod of `view`'s namespace.
    pub async fn service_env(&self, view: &PodView) -> Vec<(String, String)> {
        let links = view.spec().enable_service_links != Some(false);
        let list = async |namespace: &str| match self.config.api.services(namespace).await {
            Ok(list) => list,
            Err(e) => {
                tracing::warn!(error = %stdx::chain(&e), "services not read");
                vec![]
            }
        };
        let own = if links { list(&view.namespace).await } else { vec![] };
        let api = list("default").await;
        let master = api.iter().find(|s| s.metadata.name.as_deref() == Some("kubernetes"));
        env::services(&own, master.map(AsRef::as_ref), self.config.kubernetes_service)
    }

    /// Room for one more pod, beside the ones that hold theirs. Upstream's reasons.
    pub fn fits(&self, view: &PodView) -> Result<(), Refusal> {
        let own = (view.request_milli("cpu"), view.request_milli("memory") / 1000);
        let (mut pods, mut cpu, mut memory) = (1, own.0, own.1);
        for (uid, h) in self.pods.lock().iter() {
            // A pod holds room once it has a sandbox; two that are admitted at one instant may both see room, as the
            // scheduler, which counts all bound pods, has made sure there is.
            let seen = h.seen.lock();
            if *uid == view.uid || seen.runtime.sandbox_ready().is_none() {
                continue;
            }
            pods += 1;
            cpu += seen.request.0;
            memory += seen.request.1;
        }
        let c = &self.config.capacity_now();
        let over = |what: &str, want: i64, have: i64| Refusal {
            reason: format!("OutOf{what}"),
            field: "spec".into(),
            message: format!(
                "Node didn't have enough resource: {what}, requested with all others: {want}, capacity: {have}"
            ),
            terminal: true,
        };
        if pods > c.pods {
            return Err(over("pods", pods, c.pods));
        }
        if own.0 > 0 && cpu > c.cpu_milli {
            return Err(over("cpu", cpu, c.cpu_milli));
        }
        if own.1 > 0 && memory > c.memory_bytes {
            return Err(over("memory", memory, c.memory_bytes));
        }
        Ok(())
    }

    /// Every pod, in no particular order.
    pub fn shown(&self) -> Vec<PodShown> {
        let pods = self.pods.lock();
        pods.values()
            .map(|h| {
                let seen = h.seen.lock();
                PodShown {
                    pod: h.desired.borrow().pod.clone(),
                    status: seen.status.clone(),
                    runtime: seen.runtime.clone(),
                }
            })
            .collect()
    }

    /// The pod of this name; the newest, if an older one is still being stopped.
    pub fn find(&self, namespace: &str, name: &str, uid: Option<&str>) -> Option<PodShown> {
        let fits = |p: &PodShown| {
            let meta = &p.pod.metadata;
            meta.namespace.as_deref() == Some(namespace)
                && meta.name.as_deref() == Some(name)
                && uid.is_none_or(|u| meta.uid.as_deref() == Some(u))
        };
        self.shown().into_iter().filter(fits).max_by(|a, b| {
            a.pod
                .metadata
                .creation_timestamp
                .cmp(&b.pod.metadata.creation_timestamp)
        })
    }
}

/// One node's agent. Cheap to clone.
#[derive(Clone)]
pub struct Kubelet {
    core: Arc<Core>,
    events: Arc<Mutex<Option<futures::future::BoxFuture<'static, ()>>>>,
}

impl Kubelet {
    /// Nothing runs before [`Kubelet::run`].
    ///
    /// # Errors
    /// The root or log directory cannot be made.
    pub fn new(config: KubeletConfig) -> Result<Self, KubeletError> {
        for dir in [&config.root_dir, &config.log_dir] {
            std::fs::create_dir_all(dir).map_err(|source| KubeletError::Root {
                path: dir.display().to_string(),
                source,
            })?;
        }
        let (events, send) = Events::new(config.api.clone(), config.node_name.clone(), config.clock.clone());
        // A read is shared for a little less than the interval of refreshes.
        let age = Duration::from_secs(config.tuning.volume_refresh_s).mul_f32(0.9);
        let sources = Arc::new(Sources::new(config.api.clone(), age));
        let core = Arc::new(Core {
            volumes: Volumes::new(config.root_dir.clone(), sources),
            starts: Semaphore::new(config.tuning.starts_max.max(1)),
            registered: watch::Sender::new(false),
            node_uid: Mutex::default(),
            pods: Mutex::default(),
            events,
            config,
        });
        Ok(Self {
            core,
            events: Arc::new(Mutex::new(Some(Box::pin(send)))),
        })
    }

    /// Registers the node and runs its pods until shutdown. Pods go on running afterwards: the next agent over the same
    /// runtime and root directory adopts them.
    pub async fn run(&self, shutdown: Shutdown) {
        let mut tasks = JoinSet::new();
        if let Some(events) = self.events.lock().take() {
            let shutdown = shutdown.clone();
            tasks.spawn(async move { shutdown.or_stop(events).await.unwrap_or(()) });
        }
        tasks.spawn(node::run(self.core.clone(), shutdown.clone()));
        tasks.spawn(node::lease(self.core.clone(), shutdown.clone()));
        let mut manager = Manager::new(self.core.clone());
        shutdown.or_stop(manager.run()).await;
        manager.workers.abort_all();
        while tasks.join_next().await.is_some() {}
        self.core.pods.lock().clear();
    }

    /// Resolves once the node is registered.
    pub async fn registered(&self) {
        let _ = self.core.registered.subscribe().wait_for(|r| *r).await;
    }

    /// Serves the kubelet API on `listener` (TLS, client certificates) until shutdown. The listener may have been made
    /// in another network namespace.
    ///
    /// # Errors
    /// Certificates that do not parse, or a listener that cannot be used; never a bad client.
    pub async fn serve(&self, listener: TcpListener, shutdown: Shutdown) -> Result<(), KubeletError> {
        server::serve(self.core.clone(), listener, shutdown).await
    }

    /// Deletes the Node object: for a node that is not coming back.
    ///
    /// # Errors
    /// What the API says, unless the node is gone already.
    pub async fn deregister(&self) -> Result<(), KubeletError> {
        Ok(node::deregister(&self.core).await?)
    }
}

struct Manager {
    core: Arc<Core>,
    workers: JoinSet<(String, bool)>,
    /// Pods that are done here while the API still shows them, for finalizers or a moment: not started again.
    done: HashSet<String>,
    synced: bool,
    /// What the runtime had of pods when the agent started, until their worker takes it.
    found: HashMap<String, PodRuntime>,
    /// Uids without a pod, seen once. Seen twice they are removed: a watch that lags kills nothing.
    suspects: HashSet<String>,
    reaping: HashSet<String>,
    reaped: (mpsc::Sender<String>, mpsc::Receiver<String>),
}

impl Manager {
    fn new(core: Arc<Core>) -> Self {
        Self {
            core,
            workers: JoinSet::new(),
            done: HashSet::new(),
            synced: false,
            found: HashMap::new(),
            suspects: HashSet::new(),
            reaping: HashSet::new(),
            reaped: mpsc::channel(64),
        }
    }

    async fn run(&mut self) {
        let mut events = self.core.config.runtime.events();
        let mut retry = Duration::from_millis(100);
        // Pods wait until it is known what runs already: a pod without its sandbox would be started twice.
        loop {
            match self.list().await {
                Ok(found) => {
                    self.found = found;
                    break;
                }
                Err(e) => tracing::warn!(error = %stdx::chain(&e), "runtime not listed"),
            }
            tokio::time::sleep(retry).await;
            retry = (retry * 2).min(Duration::from_secs(5));
        }
        let mut pods = self.core.config.api.pods(&self.core.config.node_name);
        let every = Duration::from_secs(self.core.config.tuning.relist_s.max(1));
        let mut relist = Instant::now() + every;
        loop {
            tokio::select! {
                // Every arm is cancel safe: channels, streams and join sets keep what is not taken.
                event = pods.recv() => match event {
                    Some(event) => self.pod(event).await,
                    None => return,
                },
                Some(event) = events.next() => match event {
                    RuntimeEvent::ContainerStarted { pod_uid, .. }
                    | RuntimeEvent::ContainerStopped { pod_uid, .. }
                    | RuntimeEvent::SandboxStopped { pod_uid, .. } => self.poke(&pod_uid),
                    RuntimeEvent::Lagged => relist = Instant::now(),
                },
                Some(ended) = self.workers.join_next() => if let Ok((uid, gone)) = ended {
                    let handle = self.core.pods.lock().remove(&uid);
                    self.suspects.remove(&uid);
                    if !gone && !handle.is_some_and(|h| h.desired.borrow().gone) {
                        self.done.insert(uid);
                    }
                },
                Some(uid) = self.reaped.1.recv() => drop(self.reaping.remove(&uid)),
                () = sleep_until(relist) => {
                    relist = Instant::now() + every;
                    self.relist().await;
                }
            }
        }
    }

    fn poke(&self, uid: &str) {
        if let Some(h) = self.core.pods.lock().get(uid) {
            h.poke.notify_one();
        }
    }

    async fn pod(&mut self, event: PodEvent) {
        match event {
            PodEvent::Present(pod) => {
                let uid = pod.metadata.uid.clone().unwrap_or_default();
                let known = self.core.pods.lock().get(&uid).cloned();
                match known {
                    Some(h) => {
                        h.desired.send_modify(|d| d.pod = pod);
                    }
                    None if self.done.contains(&uid) => {}
                    None => self.start(uid, Desired { pod, gone: false }),
                }
            }
            PodEvent::Gone { uid } => {
                self.done.remove(&uid);
                if let Some(h) = self.core.pods.lock().get(&uid) {
                    h.desired.send_modify(|d| d.gone = true);
                }
            }
            PodEvent::Synced => {
                self.synced = true;
                // Whatever ran before this agent and has no pod now was deleted meanwhile.
                self.suspects = self.found.keys().cloned().collect();
                self.relist().await;
                self.found.clear();
                self.stray_directories();
            }
        }
    }

    fn start(&mut self, uid: String, desired: Desired) {
        let runtime = self.found.remove(&uid).unwrap_or_default();
        let (tx, rx) = watch::channel(desired);
        let handle = Handle {
            desired: tx,
            poke: Arc::default(),
            seen: Arc::default(),
        };
        let worker = Worker::new(self.core.clone(), rx, handle.poke.clone(), handle.seen.clone(), runtime);
        self.core.pods.lock().insert(uid.clone(), handle);
        self.workers.spawn(async move {
            let gone = worker.run().await;
            (uid, gone)
        });
    }

    async fn list(&self) -> Result<HashMap<String, PodRuntime>, sandbox::Error> {
        let runtime = &self.core.config.runtime;
        let (sandboxes, containers) = (runtime.list_sandboxes().await?, runtime.list_containers().await?);
        Ok(group(sandboxes, containers))
    }

    /// The safety net: workers whose state differs look again, what has no pod is removed.
    async fn relist(&mut self) {
        let listed = match self.list().await {
            Ok(listed) => listed,
            Err(e) => {
                tracing::warn!(error = %stdx::chain(&e), "runtime not listed");
                return;
            }
        };
        let mut orphans = HashMap::new();
        {
            let pods = self.core.pods.lock();
            for (uid, runtime) in listed {
                match pods.get(&uid) {
                    Some(h) => {
                        let mut seen = h.seen.lock();
                        if !alike(&seen.runtime, &runtime) {
                            tracing::debug!(pod = %uid, "relist found a change");
                            seen.relisted = Some(runtime);
                            h.poke.notify_one();
                        }
                    }
                    None => drop(orphans.insert(uid, runtime)),
                }
            }
        }
        if !self.synced {
            return;
        }
        let before = std::mem::take(&mut self.suspects);
        for (uid, runtime) in orphans {
            if self.reaping.contains(&uid) {
                continue;
            }
            if before.contains(&uid) {
                self.reap(uid, runtime);
            } else {
                self.suspects.insert(uid);
            }
        }
    }

    fn reap(&mut self, uid: String, runtime: PodRuntime) {
        tracing::info!(pod = %uid, "removing what a deleted pod left");
        self.reaping.insert(uid.clone());
        let (core, tx) = (self.core.clone(), self.reaped.0.clone());
        tokio::spawn(async move {
            let mut identity = PodIdentity {
                uid: uid.clone(),
                ..Default::default()
            };
            let mut logs = None;
            if let Some(s) = &runtime.sandbox {
                identity = s.pod.clone();
                logs = Some(
                    core.config
                        .log_dir
                        .join(format!("{}_{}_{}", s.pod.namespace, s.pod.name, s.pod.uid)),
                );
            }
            let containers: Vec<String> = runtime.containers.iter().map(|c| c.id.clone()).collect();
            for c in runtime.containers.iter().filter(|c| c.state == ContainerState::Running) {
                let _ = core.config.runtime.stop_container(&c.id, 1).await;
            }
            // One try; the next relist finds what is left.
            ops::clean(
                &core,
                &uid,
                &identity,
                runtime.sandbox.as_ref().map(|s| s.id.as_str()),
                &containers,
                logs,
            )
            .await;
            let _ = tx.send(uid).await;
        });
    }

    /// Directories of pods that neither the API nor the runtime knows.
    fn stray_directories(&self) {
        for uid in self.core.volumes.known() {
            if self.core.pods.lock().contains_key(&uid) || self.reaping.contains(&uid) || self.suspects.contains(&uid) {
                continue;
            }
            if let Err(e) = self.core.volumes.clean(&uid) {
                tracing::warn!(pod = %uid, error = %e, "stray directory not removed");
            }
        }
    }
}

fn group(sandboxes: Vec<SandboxStatus>, containers: Vec<ContainerStatus>) -> HashMap<String, PodRuntime> {
    let mut out: HashMap<String, PodRuntime> = HashMap::new();
    let mut of_sandbox = HashMap::new();
    for s in sandboxes {
        of_sandbox.insert(s.id.clone(), s.pod.uid.clone());
        let slot = &mut out.entry(s.pod.uid.clone()).or_default().sandbox;
        if slot.as_ref().is_none_or(|old| old.pod.attempt <= s.pod.attempt) {
            *slot = Some(s);
        }
    }
    for c in containers {
        let uid = c.labels.get(POD_UID).or_else(|| of_sandbox.get(&c.sandbox_id)).cloned();
        if let Some(uid) = uid {
            out.entry(uid).or_default().containers.push(c);
        }
    }
    out
}

/// Same sandbox and the same containers in the same states, as far as the worker knows them.
fn alike(known: &PodRuntime, listed: &PodRuntime) -> bool {
    let of = |r: &PodRuntime| r.sandbox.as_ref().map(|s| (s.id.clone(), s.state));
    of(known) == of(listed)
        && listed
            .containers
            .iter()
            .all(|c| known.containers.iter().any(|k| k.id == c.id && k.state == c.state))
}

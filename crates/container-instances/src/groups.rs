//! The engine side: `sandbox`'s traits over the host's engine, with quota, meter and records around them.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use k8s_openapi::api::core::v1::Pod;
use kubelet::{Hooks, Refusal, pod::view::PodView};
use parking_lot::Mutex;
use sandbox::{
    ContainerConfig, ContainerStatus, Error, ExecRequest, ExecSession, ImageStatus, Images, PodIdentity, RegistryAuth,
    Runtime, RuntimeEvent, SandboxConfig, SandboxState, SandboxStatus, Stats,
};
use stdx::{SharedClock, Shutdown};
use thiserror::Error as ThisError;

use crate::{
    home::Records,
    meter::{Meter, MeterError, Subject, Usage},
    nic,
    quota::{Ledger, Quota, Share},
};

/// Annotations that let a later process know what a group holds.
const CPU_MILLI: &str = "oaks.internal/cpu-milli";
const MEMORY_BYTES: &str = "oaks.internal/memory-bytes";
/// The node that a sandbox belongs to: one engine may serve several virtual nodes.
pub const NODE: &str = "oaks.internal/node";

#[derive(Clone)]
pub struct GroupsConfig {
    /// The host's engine, opened with a [`crate::NicNetwork`].
    pub runtime: Arc<dyn Runtime>,
    pub images: Arc<dyn Images>,
    /// Name of the virtual node these groups belong to.
    pub node_name: String,
    /// Name of the hosted cluster.
    pub cluster: String,
    /// Home object name of the VirtualNetwork and the delegated subnet's name.
    pub virtual_network: String,
    pub subnet: String,
    /// ARM id of the resource group that the groups are recorded under.
    pub group_scope: String,
    pub quota: Quota,
    /// Directory of the usage journal; one per virtual node.
    pub meter_dir: PathBuf,
    /// Shows the groups as ContainerGroup objects; `None` = no home.
    pub home: Option<reconcile::Client>,
    pub clock: SharedClock,
}

#[derive(Debug, ThisError)]
pub enum GroupsError {
    #[error(transparent)]
    Meter(#[from] MeterError),
    #[error("listing the groups of the engine")]
    Engine(#[source] Error),
}

/// Container groups of one virtual node. Implements [`Runtime`], [`Images`] and the kubelet's [`Hooks`].
pub struct Groups {
    config: GroupsConfig,
    meter: Meter,
    ledger: Mutex<Ledger>,
    /// Subjects of admitted pods, for the meter and the records.
    subjects: Mutex<HashMap<String, Subject>>,
    records: Records,
}

impl Groups {
    /// Takes over what the engine runs for this node and settles the meter with it.
    ///
    /// # Errors
    /// A journal that cannot be used, or an engine that does not answer.
    pub async fn open(config: GroupsConfig) -> Result<Arc<Self>, GroupsError> {
        let meter = Meter::open(&config.meter_dir, config.clock.clone())?;
        let all = config.runtime.list_sandboxes().await.map_err(GroupsError::Engine)?;
        let (mut ledger, mut live) = (Ledger::default(), Vec::new());
        for s in all
            .iter()
            .filter(|s| s.annotations.get(NODE) == Some(&config.node_name))
        {
            if s.state != SandboxState::Ready {
                continue;
            }
            let number = |key: &str| s.annotations.get(key).and_then(|v| v.parse().ok()).unwrap_or(0);
            ledger.adopt(
                &s.pod.uid,
                Share {
                    cpu_milli: number(CPU_MILLI),
                    memory_bytes: number(MEMORY_BYTES),
                },
            );
            live.push(s.pod.uid.clone());
        }
        let lost = meter.settle(&live)?;
        if lost > 0 {
            tracing::warn!(lost, "groups ended while no agent looked");
        }
        let records = Records::new(
            config.home.clone(),
            config.group_scope.clone(),
            config.node_name.clone(),
        );
        let subjects = live
            .iter()
            .filter_map(|uid| Some((uid.clone(), meter.subject(uid)?)))
            .collect();
        for uid in &live {
            if let Some(s) = meter.subject(uid) {
                let sandbox = all.iter().find(|b| b.pod.uid == *uid);
                records.show(
                    &s,
                    "Running",
                    sandbox.map(|b| b.ips.clone()).unwrap_or_default(),
                    meter.usage_of(uid),
                );
            }
        }
        Ok(Arc::new(Self {
            meter,
            ledger: Mutex::new(ledger),
            subjects: Mutex::new(subjects),
            records,
            config,
        }))
    }

    /// Keeps the proof of life and the records in home, until shutdown.
    pub async fn run(self: &Arc<Self>, shutdown: Shutdown) {
        let this = self.clone();
        let beat = async move {
            let mut every = tokio::time::interval(Duration::from_secs(1));
            loop {
                every.tick().await;
                this.meter.prove_alive();
            }
        };
        let records = self.records.run();
        let _ = shutdown.or_stop(Box::pin(async { tokio::join!(beat, records) })).await;
    }

    /// Usage records: open segments and the newest closed ones.
    pub fn usage(&self) -> Vec<Usage> {
        self.meter.usage()
    }

    /// Groups that hold a share of the quota.
    pub fn count(&self) -> usize {
        self.ledger.lock().held()
    }

    pub fn quota(&self) -> &Quota {
        &self.config.quota
    }

    fn begin(&self, uid: &str, cause: &str) -> Result<(), Error> {
        let failed = |reason: String| Error::Runtime {
            doing: "opening the usage record".into(),
            reason,
        };
        let subject = self.subjects.lock().get(uid).cloned();
        let subject = subject.ok_or_else(|| failed(format!("group {uid} was not admitted")))?;
        self.meter
            .begin(&subject, cause)
            .map(drop)
            .map_err(|e| failed(stdx::chain(&e).to_string()))
    }

    fn end(&self, uid: &str) {
        if let Err(e) = self.meter.end(uid) {
            // Stays open: the next stop, or the next start of the agent, closes it.
            tracing::error!(pod = %uid, error = %stdx::chain(&e), "usage record not closed");
        }
    }

    fn show(&self, uid: &str, state: &str, ips: Vec<std::net::IpAddr>) {
        if let Some(s) = self.subjects.lock().get(uid).cloned() {
            self.records.show(&s, state, ips, self.meter.usage_of(uid));
        }
    }

    async fn uid_of(&self, sandbox: &str) -> Option<String> {
        self.config
            .runtime
            .sandbox_status(sandbox)
            .await
            .ok()
            .map(|s| s.pod.uid)
    }

    fn mine(&self, s: &SandboxStatus) -> bool {
        s.annotations.get(NODE) == Some(&self.config.node_name)
    }
}

fn subject(config: &GroupsConfig, view: &PodView) -> Subject {
    let owner = view
        .pod
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|o| o.controller == Some(true));
    let share = Share::of(view);
    Subject {
        uid: view.uid.clone(),
        cluster: config.cluster.clone(),
        node: config.node_name.clone(),
        namespace: view.namespace.clone(),
        name: view.name.clone(),
        owner_kind: owner.map(|o| o.kind.clone()).unwrap_or_default(),
        owner_name: owner.map(|o| o.name.clone()).unwrap_or_default(),
        labels: view.pod.metadata.labels.clone().unwrap_or_default(),
        sku: "standard".into(),
        cpu_milli: share.cpu_milli,
        memory_bytes: share.memory_bytes,
    }
}

#[async_trait]
impl Hooks for Groups {
    async fn admit(&self, pod: &Pod) -> Result<(), Refusal> {
        let pod = Arc::new(pod.clone());
        self.ledger
            .lock()
            .admit(&self.config.quota, &pod, self.config.clock.now())?;
        let view = PodView::new(pod);
        self.subjects
            .lock()
            .insert(view.uid.clone(), subject(&self.config, &view));
        Ok(())
    }

    async fn adopted(&self, pod: &Pod) {
        let view = PodView::new(Arc::new(pod.clone()));
        let phase = view.pod.status.as_ref().and_then(|s| s.phase.as_deref());
        if !matches!(phase, Some("Succeeded" | "Failed")) {
            self.ledger.lock().adopt(&view.uid, Share::of(&view));
        }
        self.subjects
            .lock()
            .insert(view.uid.clone(), subject(&self.config, &view));
    }

    async fn pulling(&self, pod: &PodIdentity) {
        if let Err(e) = self.begin(&pod.uid, "pull-start") {
            // The start of the container asks again and fails there, where it shows.
            tracing::error!(pod = %pod.uid, error = %stdx::chain(&e), "usage record not opened");
        }
    }

    async fn stopped(&self, pod: &PodIdentity) {
        self.end(&pod.uid);
        self.ledger.lock().release(&pod.uid);
        match self.config.runtime.list_sandboxes().await {
            Ok(all) if !all.iter().any(|s| s.pod.uid == pod.uid) => {
                self.subjects.lock().remove(&pod.uid);
                self.records.remove(&pod.uid);
            }
            _ => self.show(&pod.uid, "Stopped", vec![]),
        }
    }

    async fn backend_trouble(&self) -> Option<String> {
        self.config
            .runtime
            .list_sandboxes()
            .await
            .err()
            .map(|e| stdx::chain(&e).to_string())
    }
}

#[async_trait]
impl Runtime for Groups {
    async fn run_sandbox(&self, mut config: SandboxConfig) -> Result<String, Error> {
        if config.host_network {
            let reason = "a container group has no host network".into();
            return Err(Error::Invalid {
                field: "spec.hostNetwork".into(),
                reason,
            });
        }
        let share = self
            .subjects
            .lock()
            .get(&config.pod.uid)
            .map(|s| (s.cpu_milli, s.memory_bytes))
            .unwrap_or_default();
        config.annotations.extend(
            [
                (NODE, self.config.node_name.clone()),
                (nic::CLUSTER, self.config.cluster.clone()),
                (nic::VIRTUAL_NETWORK, self.config.virtual_network.clone()),
                (nic::SUBNET, self.config.subnet.clone()),
                (CPU_MILLI, share.0.to_string()),
                (MEMORY_BYTES, share.1.to_string()),
            ]
            .map(|(k, v)| (k.to_owned(), v)),
        );
        let uid = config.pod.uid.clone();
        self.show(&uid, "Pending", vec![]);
        self.config.runtime.run_sandbox(config).await
    }

    async fn stop_sandbox(&self, id: &str) -> Result<(), Error> {
        let uid = self.uid_of(id).await;
        self.config.runtime.stop_sandbox(id).await?;
        if let Some(uid) = uid {
            self.end(&uid);
        }
        Ok(())
    }

    async fn remove_sandbox(&self, id: &str) -> Result<(), Error> {
        let uid = self.uid_of(id).await;
        self.config.runtime.remove_sandbox(id).await?;
        if let Some(uid) = uid {
            self.end(&uid);
            let left = self.config.runtime.list_sandboxes().await.unwrap_or_default();
            // A pod that is still admitted gets another sandbox: its former one did not survive a reboot.
            if !left.iter().any(|s| s.pod.uid == uid) && !self.ledger.lock().holds(&uid) {
                self.subjects.lock().remove(&uid);
                self.records.remove(&uid);
            }
        }
        Ok(())
    }

    async fn sandbox_status(&self, id: &str) -> Result<SandboxStatus, Error> {
        self.config.runtime.sandbox_status(id).await
    }

    async fn list_sandboxes(&self) -> Result<Vec<SandboxStatus>, Error> {
        let all = self.config.runtime.list_sandboxes().await?;
        Ok(all.into_iter().filter(|s| self.mine(s)).collect())
    }

    async fn create_container(&self, sandbox_id: &str, config: ContainerConfig) -> Result<String, Error> {
        self.config.runtime.create_container(sandbox_id, config).await
    }

    async fn start_container(&self, id: &str) -> Result<(), Error> {
        let status = self.config.runtime.container_status(id).await?;
        let sandbox = self.config.runtime.sandbox_status(&status.sandbox_id).await?;
        // Metered before it runs: a group that cannot be metered does not run.
        self.begin(&sandbox.pod.uid, "run")?;
        self.config.runtime.start_container(id).await?;
        self.show(&sandbox.pod.uid, "Running", sandbox.ips);
        Ok(())
    }

    async fn stop_container(&self, id: &str, grace_s: u64) -> Result<(), Error> {
        self.config.runtime.stop_container(id, grace_s).await
    }

    async fn remove_container(&self, id: &str) -> Result<(), Error> {
        self.config.runtime.remove_container(id).await
    }

    async fn container_status(&self, id: &str) -> Result<ContainerStatus, Error> {
        self.config.runtime.container_status(id).await
    }

    async fn list_containers(&self) -> Result<Vec<ContainerStatus>, Error> {
        let mine: HashSet<String> = self.list_sandboxes().await?.into_iter().map(|s| s.id).collect();
        let all = self.config.runtime.list_containers().await?;
        Ok(all.into_iter().filter(|c| mine.contains(&c.sandbox_id)).collect())
    }

    async fn container_stats(&self, id: &str) -> Result<Stats, Error> {
        self.config.runtime.container_stats(id).await
    }

    async fn exec(&self, container_id: &str, request: ExecRequest) -> Result<ExecSession, Error> {
        self.config.runtime.exec(container_id, request).await
    }

    async fn exec_sync(&self, container_id: &str, argv: Vec<String>, ms: u64) -> Result<(i32, Bytes, Bytes), Error> {
        self.config.runtime.exec_sync(container_id, argv, ms).await
    }

    async fn attach(&self, container_id: &str, stdin: bool) -> Result<ExecSession, Error> {
        self.config.runtime.attach(container_id, stdin).await
    }

    async fn dial(&self, sandbox_id: &str, port: u16) -> Result<tokio::net::TcpStream, Error> {
        self.config.runtime.dial(sandbox_id, port).await
    }

    fn events(&self) -> Pin<Box<dyn Stream<Item = RuntimeEvent> + Send>> {
        self.config.runtime.events()
    }
}

#[async_trait]
impl Images for Groups {
    async fn image_status(&self, reference: &str) -> Result<Option<ImageStatus>, Error> {
        self.config.images.image_status(reference).await
    }

    async fn pull_image(&self, reference: &str, auth: Option<RegistryAuth>) -> Result<ImageStatus, Error> {
        self.config.images.pull_image(reference, auth).await
    }

    async fn list_images(&self) -> Result<Vec<ImageStatus>, Error> {
        self.config.images.list_images().await
    }

    async fn remove_image(&self, reference: &str) -> Result<(), Error> {
        self.config.images.remove_image(reference).await
    }
}

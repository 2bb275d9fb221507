//! The traits and their data. Plain data, no behaviour; every name is the CRI's unless a comment says otherwise.
//!
//! # Source
//! `k8s.io/cri-api/pkg/apis/runtime/v1/api.proto`, 1.36.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, pin::Pin, time::SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};

/// Identity of a pod: the UID decides, the names are for people, cgroup paths and logs.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq, Hash)]
pub struct PodIdentity {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    /// Raised by one whenever the sandbox of the same pod is made anew.
    pub attempt: u32,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct SandboxConfig {
    pub pod: PodIdentity,
    pub hostname: String,
    /// Directory for container logs (`<dir>/<container name>/<attempt>.log`).
    pub log_directory: PathBuf,
    /// Written to the pod's resolv.conf; `None` keeps the node's.
    pub dns: Option<DnsConfig>,
    pub host_network: bool,
    /// All containers see one pid namespace.
    pub share_process_namespace: bool,
    pub sysctls: BTreeMap<String, String>,
    /// Sum of the pod's limits; 0 or `None` = unlimited.
    pub resources: Resources,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// For `portmap`-like plug-ins and hostPort.
    pub port_mappings: Vec<PortMapping>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct DnsConfig {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct PortMapping {
    /// `tcp` or `udp`.
    pub protocol: String,
    pub container_port: u16,
    pub host_port: u16,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct Resources {
    /// CFS quota as milli-CPU (1000 = one core); 0 = no limit.
    pub cpu_limit_milli: i64,
    /// Relative weight source; 0 = minimum weight.
    pub cpu_request_milli: i64,
    /// Bytes; 0 = no limit.
    pub memory_limit_bytes: i64,
    /// 0 = no limit.
    pub pids_limit: i64,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub enum SandboxState {
    Ready,
    NotReady,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct SandboxStatus {
    pub id: String,
    pub pod: PodIdentity,
    pub state: SandboxState,
    pub created_at: SystemTime,
    /// Primary address first; empty for host-network pods (the node's addresses apply).
    pub ips: Vec<IpAddr>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct ContainerConfig {
    pub name: String,
    pub attempt: u32,
    /// Image id as answered by [`Images::image_status`] or [`Images::pull_image`].
    pub image: String,
    /// Replaces the image's entrypoint; empty = the image's.
    pub command: Vec<String>,
    /// Replaces the image's cmd; empty = the image's unless `command` is set.
    pub args: Vec<String>,
    pub working_dir: Option<String>,
    pub env: Vec<(String, String)>,
    pub mounts: Vec<Mount>,
    /// Relative to the sandbox's `log_directory`.
    pub log_path: PathBuf,
    pub stdin: bool,
    pub stdin_once: bool,
    pub tty: bool,
    pub resources: Resources,
    pub security: Security,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct Mount {
    pub host_path: PathBuf,
    pub container_path: PathBuf,
    pub readonly: bool,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct Security {
    pub run_as_user: Option<i64>,
    pub run_as_group: Option<i64>,
    pub supplemental_groups: Vec<i64>,
    pub run_as_non_root: bool,
    pub readonly_rootfs: bool,
    pub privileged: bool,
    pub no_new_privs: bool,
    /// Capability names without the `CAP_` prefix; `ALL` is understood.
    pub add_capabilities: Vec<String>,
    pub drop_capabilities: Vec<String>,
    pub seccomp: Seccomp,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub enum Seccomp {
    #[default]
    RuntimeDefault,
    Unconfined,
    /// Path of a profile on the node.
    Localhost(String),
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub enum ContainerState {
    Created,
    Running,
    Exited,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ContainerStatus {
    pub id: String,
    pub sandbox_id: String,
    pub name: String,
    pub attempt: u32,
    pub state: ContainerState,
    pub created_at: SystemTime,
    pub started_at: Option<SystemTime>,
    pub finished_at: Option<SystemTime>,
    /// Meaningful when `Exited`; 128 + signal for a signalled process.
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, or `ContainerStatusUnknown` after a lost record.
    pub reason: String,
    pub message: String,
    /// As the pod asked for it (`nginx`, `docker.io/library/nginx:1.27`).
    pub image: String,
    /// Digest reference.
    pub image_ref: String,
    pub log_path: PathBuf,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Stats {
    pub cpu_usage_core_ns: u64,
    pub memory_working_set_bytes: u64,
    pub memory_usage_bytes: u64,
    pub pids: u64,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ImageStatus {
    /// `sha256:...` of the config.
    pub id: String,
    pub tags: Vec<String>,
    pub digests: Vec<String>,
    pub size_bytes: u64,
    /// Numeric user of the image config, if it is numeric.
    pub uid: Option<i64>,
    pub username: String,
}

#[derive(Clone, Debug, Default)]
pub struct RegistryAuth {
    pub username: String,
    pub password: String,
}

/// What happened to a container; a hint to look, never the only source of truth.
#[derive(Clone, Debug)]
pub enum RuntimeEvent {
    ContainerStarted {
        pod_uid: String,
        container_id: String,
    },
    ContainerStopped {
        pod_uid: String,
        container_id: String,
    },
    SandboxStopped {
        pod_uid: String,
        sandbox_id: String,
    },
    /// Events were dropped: list again.
    Lagged,
}

/// A running process with its streams. Dropping it closes the streams; the process gets SIGHUP if it had a terminal.
pub struct ExecSession {
    pub stdin: Option<Pin<Box<dyn AsyncWrite + Send>>>,
    pub stdout: Option<Pin<Box<dyn AsyncRead + Send>>>,
    pub stderr: Option<Pin<Box<dyn AsyncRead + Send>>>,
    /// Sends terminal sizes (columns, rows).
    pub resize: Option<tokio::sync::mpsc::Sender<(u16, u16)>>,
    /// Exit code, once.
    pub exit: tokio::sync::oneshot::Receiver<Result<i32, Error>>,
}

#[derive(Clone, Debug, Default)]
pub struct ExecRequest {
    pub argv: Vec<String>,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

#[derive(Debug, Error)]
pub enum Error {
    #[error("{what} {id} not found")]
    NotFound { what: &'static str, id: String },
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    #[error("image {image}: {reason}")]
    ImagePull { image: String, reason: String },
    /// The image is not in the host's store and nothing may be (or could be) pulled.
    #[error("image {image} is not present: {reason}")]
    ImageNotPresent { image: String, reason: String },
    #[error("no capacity: {reason}")]
    Capacity { reason: String },
    #[error("network of sandbox {sandbox}: {reason}")]
    Network { sandbox: String, reason: String },
    #[error("{doing}: {reason}")]
    Runtime { doing: String, reason: String },
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{doing} did not finish within {ms} ms")]
    Timeout { doing: String, ms: u64 },
    #[error("{feature} is not supported by this runtime")]
    Unsupported { feature: String },
}

/// Sandbox and container verbs. Every verb is idempotent: stopping what is stopped and removing what is gone succeed.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Creates the sandbox (namespaces, cgroup, network) and returns its id. On error nothing is left behind.
    async fn run_sandbox(&self, config: SandboxConfig) -> Result<String, Error>;
    /// Kills all containers in it and detaches the network; the record stays until removed.
    async fn stop_sandbox(&self, id: &str) -> Result<(), Error>;
    async fn remove_sandbox(&self, id: &str) -> Result<(), Error>;
    async fn sandbox_status(&self, id: &str) -> Result<SandboxStatus, Error>;
    /// All sandboxes this runtime knows, including ones of a former process.
    async fn list_sandboxes(&self) -> Result<Vec<SandboxStatus>, Error>;

    async fn create_container(&self, sandbox_id: &str, config: ContainerConfig) -> Result<String, Error>;
    async fn start_container(&self, id: &str) -> Result<(), Error>;
    /// SIGTERM (or the image's stop signal), then SIGKILL after `grace_s` seconds; returns when it has exited.
    async fn stop_container(&self, id: &str, grace_s: u64) -> Result<(), Error>;
    async fn remove_container(&self, id: &str) -> Result<(), Error>;
    async fn container_status(&self, id: &str) -> Result<ContainerStatus, Error>;
    async fn list_containers(&self) -> Result<Vec<ContainerStatus>, Error>;
    async fn container_stats(&self, id: &str) -> Result<Stats, Error>;

    async fn exec(&self, container_id: &str, request: ExecRequest) -> Result<ExecSession, Error>;
    /// Runs `argv` to its end: `(exit code, stdout, stderr)`, each output cut at 16 KiB. Killed at `timeout_ms`.
    async fn exec_sync(
        &self,
        container_id: &str,
        argv: Vec<String>,
        timeout_ms: u64,
    ) -> Result<(i32, Bytes, Bytes), Error>;
    async fn attach(&self, container_id: &str, stdin: bool) -> Result<ExecSession, Error>;
    /// A connection to `port` inside the sandbox's network namespace (port-forward, probes against 127.0.0.1).
    async fn dial(&self, sandbox_id: &str, port: u16) -> Result<tokio::net::TcpStream, Error>;

    /// Live events from now on. Bounded; a slow reader gets [`RuntimeEvent::Lagged`].
    fn events(&self) -> Pin<Box<dyn Stream<Item = RuntimeEvent> + Send>>;
}

#[async_trait]
pub trait Images: Send + Sync + 'static {
    /// `None` if the reference does not resolve in the local store.
    async fn image_status(&self, reference: &str) -> Result<Option<ImageStatus>, Error>;
    /// Fetches by reference from its registry, unless the host's store has it; returns the image.
    async fn pull_image(&self, reference: &str, auth: Option<RegistryAuth>) -> Result<ImageStatus, Error>;
    async fn list_images(&self) -> Result<Vec<ImageStatus>, Error>;
    async fn remove_image(&self, reference: &str) -> Result<(), Error>;
}

/// How the embedded engine gives a sandbox its network: the CNI plug-in in a machine, a VNet NIC for a container group.
#[async_trait]
pub trait Network: Send + Sync + 'static {
    /// Attaches the namespace at `netns` (a bind-mounted path); addresses, primary first.
    async fn attach(
        &self,
        sandbox_id: &str,
        config: &SandboxConfig,
        netns: &std::path::Path,
    ) -> Result<Vec<IpAddr>, Error>;
    /// Idempotent; must succeed if the namespace or the state is gone.
    async fn detach(&self, sandbox_id: &str, pod: &PodIdentity, netns: Option<&std::path::Path>) -> Result<(), Error>;
    /// Releases everything not in `live` (sandbox ids); run once when a node starts.
    async fn gc(&self, live: &[String]) -> Result<(), Error>;
}

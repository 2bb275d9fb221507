//! A pod's sandbox: namespaces pinned by mounts, a control group, shared memory, files for /etc; no process of its own
//! unless the pod shares one pid namespace.

use std::{
    collections::BTreeMap,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use linux::{
    cgroup::{Group, Limits},
    mount,
    process::{self, Namespaces},
};
use parking_lot::Mutex;

use super::{
    Inner, blocking, io, new_id,
    records::{self, SandboxPhase, SandboxRecord},
    runtime, supervisor,
};
use crate::{
    api::{Error, Resources, RuntimeEvent, SandboxConfig},
    supervisor::protocol::{Spawn, Stdio},
};

const SHM_BYTES: u64 = 64 << 20;
/// How long killed processes may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// System controls of a network namespace that let a pod bind low ports and ping without capabilities, as other engines do.
const NET_DEFAULTS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];
/// System controls that belong to an ipc namespace.
const IPC_SYSCTLS: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

pub struct Sandbox {
    pub id: String,
    record: Mutex<SandboxRecord>,
    /// Held by verbs that change it, so that two do not interleave. Taken before any of its containers' locks.
    pub verb: tokio::sync::Mutex<()>,
    /// Nothing is started in it any more.
    stopping: AtomicBool,
}

impl Sandbox {
    pub fn new(record: SandboxRecord) -> Self {
        Self {
            id: record.id.clone(),
            record: Mutex::new(record),
            verb: tokio::sync::Mutex::default(),
            stopping: AtomicBool::new(false),
        }
    }

    pub fn record(&self) -> SandboxRecord {
        self.record.lock().clone()
    }

    pub fn is_ready(&self) -> bool {
        self.record.lock().phase == SandboxPhase::Ready && !self.stopping.load(Ordering::SeqCst)
    }

    /// Name of the pod's control group.
    pub fn group_name(&self) -> String {
        group_name(&self.record.lock())
    }
}

fn group_name(record: &SandboxRecord) -> String {
    format!("pod-{}", record.id)
}

/// Limits of a control group; the pod's group gets sums, a container its own.
pub fn limits(resources: &Resources) -> Limits {
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    Limits {
        cpu_milli: positive(resources.cpu_limit_milli),
        cpu_weight_milli: Some(resources.cpu_request_milli.max(0) as u64),
        memory_bytes: positive(resources.memory_limit_bytes),
        pids: positive(resources.pids_limit),
    }
}

impl Inner {
    /// Directory of the sandbox's pinned namespaces (`net`, `ipc`, `uts`, `pid`) and its `shm`.
    pub fn pins(&self, id: &str) -> PathBuf {
        self.config.run_dir.join("s").join(id)
    }

    fn sandbox_dir(&self, id: &str) -> PathBuf {
        self.config.root.join("sandboxes").join(id)
    }

    pub fn pod_group(&self, sandbox: &Sandbox) -> Result<Group, Error> {
        self.pods
            .child(&sandbox.group_name())
            .map_err(|error| runtime("name a control group", &error))
    }

    pub fn save_sandbox(&self, sandbox: &Sandbox) -> Result<(), Error> {
        records::save(
            &self.sandbox_dir(&sandbox.id).join("record.json"),
            &*sandbox.record.lock(),
        )
        .map_err(io("save a sandbox's record"))
    }

    /// Files that appear under /etc in the pod's containers.
    pub fn etc_files(&self, id: &str) -> Vec<(&'static str, PathBuf)> {
        let dir = self.sandbox_dir(id);
        [
            ("/etc/resolv.conf", "resolv.conf"),
            ("/etc/hostname", "hostname"),
            ("/etc/hosts", "hosts"),
        ]
        .map(|(at, name)| (at, dir.join(name)))
        .to_vec()
    }

    pub async fn run_sandbox(self: &Arc<Self>, config: SandboxConfig) -> Result<String, Error> {
        check(&config)?;
        let id = new_id()?;
        let record = SandboxRecord {
            id: id.clone(),
            config,
            phase: SandboxPhase::Creating,
            created_at: SystemTime::now(),
            ips: Vec::new(),
        };
        let sandbox = Arc::new(Sandbox::new(record));
        {
            let mut all = self.sandboxes.lock();
            let pod = &sandbox.record().config.pod;
            if all.values().any(|other| other.record.lock().config.pod == *pod) {
                let reason = format!(
                    "a sandbox of {}/{} with attempt {} exists",
                    pod.namespace, pod.name, pod.attempt
                );
                return Err(Error::Invalid {
                    field: "pod".to_owned(),
                    reason,
                });
            }
            all.insert(id.clone(), sandbox.clone());
        }
        let _verb = sandbox.verb.lock().await;
        match self.make_sandbox(&sandbox).await {
            Ok(()) => Ok(id),
            Err(error) => {
                self.discard_sandbox(&id).await;
                Err(error)
            }
        }
    }

    async fn make_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
        let (inner, made) = (self.clone(), sandbox.clone());
        blocking(move || inner.prepare_sandbox(&made)).await?;
        let config = sandbox.record().config;
        if !config.host_network {
            let netns = self.pins(&sandbox.id).join("net");
            sandbox.record.lock().ips = self.config.network.attach(&sandbox.id, &config, &netns).await?;
        }
        let (inner, made) = (self.clone(), sandbox.clone());
        blocking(move || {
            let hosts = inner.sandbox_dir(&made.id).join("hosts");
            write_readable(&hosts, &hosts_file(&made.record()))?;
            made.record.lock().phase = SandboxPhase::Ready;
            inner.save_sandbox(&made)
        })
        .await
    }

    fn prepare_sandbox(&self, sandbox: &Sandbox) -> Result<(), Error> {
        let record = sandbox.record();
        let (dir, pins) = (self.sandbox_dir(&record.id), self.pins(&record.id));
        for dir in [&dir, &pins] {
            std::fs::create_dir(dir).map_err(io(format!("create {}", dir.display())))?;
        }
        self.save_sandbox(sandbox)?;

        let resolv_conf = match &record.config.dns {
            Some(dns) => resolv_conf(dns),
            None => std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
        };
        write_readable(&dir.join("resolv.conf"), &resolv_conf)?;
        write_readable(&dir.join("hostname"), &format!("{}\n", record.config.hostname))?;

        let group = self.pod_group(sandbox)?;
        group
            .create()
            .map_err(|error| runtime("create the pod's control group", &error))?;
        group
            .set_limits(&limits(&record.config.resources))
            .map_err(|error| runtime("limit the pod", &error))?;

        // One file system holds pins and shared memory, so that one unmount ends all of it.
        let flags = mount::Flags::NOSUID | mount::Flags::NODEV | mount::Flags::NOEXEC;
        mount::tmpfs(&pins, SHM_BYTES, 0o755, flags).map_err(|error| runtime("mount shared memory", &error))?;
        let shm = pins.join("shm");
        std::fs::create_dir(&shm)
            .and_then(|()| std::fs::set_permissions(&shm, std::fs::Permissions::from_mode(0o1777)))
            .map_err(io("create shared memory"))?;

        let config = record.config.clone();
        process::on_scratch_thread(move || make_namespaces(&config, &pins))
            .map_err(|error| runtime("make namespaces", &error))??;
        if record.config.share_process_namespace {
            self.start_pause(&record, &group)?;
        }
        Ok(())
    }

    /// A shared pid namespace needs a PID 1 that reaps and outlives any container.
    fn start_pause(&self, record: &SandboxRecord, group: &Group) -> Result<(), Error> {
        let pause = group
            .child("pause")
            .map_err(|error| runtime("name a control group", &error))?;
        pause
            .create()
            .map_err(|error| runtime("create a control group", &error))?;
        let mut argv = vec![
            self.config.runc.display().to_string(),
            "pause".to_owned(),
            self.config.init.display().to_string(),
        ];
        argv.extend(pause.directories().iter().map(|dir| dir.display().to_string()));
        let spawn = Spawn {
            id: pause_id(&record.id),
            argv,
            helper: true,
            stdio: Stdio::Null,
            ephemeral: true,
            ..Spawn::default()
        };
        let (pid, _) = self
            .supervisor
            .spawn(spawn, &[])
            .map_err(supervisor("start the pod's first process"))?;
        let target = self.pins(&record.id).join("pid");
        std::fs::File::create(&target).map_err(io("create a namespace file"))?;
        mount::bind(Path::new(&format!("/proc/{pid}/ns/pid")), &target)
            .map_err(|error| runtime("pin a namespace", &error))
    }

    pub async fn stop_sandbox(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let sandbox = match self.sandbox(id) {
            Err(Error::NotFound { .. }) => return Ok(()),
            other => other?,
        };
        let _verb = sandbox.verb.lock().await;
        self.stop_sandbox_locked(&sandbox).await
    }

    async fn stop_sandbox_locked(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
        if sandbox.record().phase == SandboxPhase::Stopped {
            return Ok(());
        }
        let id = sandbox.id.clone();
        sandbox.stopping.store(true, Ordering::SeqCst);
        for container in self.containers_of(&id) {
            // A container joins its group at the end of its start: wait for one that is under way.
            drop(container.verb.lock().await);
        }
        let (inner, stopped) = (self.clone(), sandbox.clone());
        blocking(move || inner.kill_pod(&stopped)).await?;
        for container in self.containers_of(&id) {
            self.wait_exited(&container, KILL_PATIENCE).await;
        }
        let record = sandbox.record();
        if !record.config.host_network {
            let netns = self.pins(&id).join("net");
            let there = mount::is_mount_point(&netns).unwrap_or(false);
            self.config
                .network
                .detach(&id, &record.config.pod, there.then_some(netns.as_path()))
                .await?;
        }
        let (inner, stopped) = (self.clone(), sandbox.clone());
        blocking(move || {
            inner.unpin(&stopped.id);
            stopped.record.lock().phase = SandboxPhase::Stopped;
            inner.save_sandbox(&stopped)
        })
        .await?;
        self.emit(RuntimeEvent::SandboxStopped {
            pod_uid: record.config.pod.uid,
            sandbox_id: id,
        });
        Ok(())
    }

    fn kill_pod(&self, sandbox: &Sandbox) -> Result<(), Error> {
        let group = self.pod_group(sandbox)?;
        let gone = group
            .kill_all(KILL_PATIENCE)
            .map_err(|error| runtime("kill a pod", &error))?;
        if !gone {
            return Err(Error::Timeout {
                doing: "killing a pod".to_owned(),
                ms: KILL_PATIENCE.as_millis() as u64,
            });
        }
        let _ = self.supervisor.forget(&pause_id(&sandbox.id));
        Ok(())
    }

    pub async fn remove_sandbox(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let sandbox = match self.sandbox(id) {
            Err(Error::NotFound { .. }) => return Ok(()),
            other => other?,
        };
        let _verb = sandbox.verb.lock().await;
        self.stop_sandbox_locked(&sandbox).await?;
        for container in self.containers_of(id) {
            self.remove_container(&container.id).await?;
        }
        let (inner, removed) = (self.clone(), sandbox.clone());
        blocking(move || inner.erase_sandbox(&removed.id)).await
    }

    /// The namespaces of this sandbox went with a reboot: its network is given back. Errors are left to [`crate::Network::gc`].
    pub async fn note_reboot(&self, sandbox: &Sandbox) -> Result<(), Error> {
        let record = sandbox.record();
        if !record.config.host_network
            && let Err(error) = self.config.network.detach(&sandbox.id, &record.config.pod, None).await
        {
            tracing::warn!(sandbox = sandbox.id, %error, "network of a sandbox from before the reboot is left");
        }
        sandbox.record.lock().phase = SandboxPhase::Stopped;
        self.save_sandbox(sandbox)
    }

    /// Undoes a sandbox of which anything may exist. Errors are left: the next engine's start tries again.
    pub async fn discard_sandbox(self: &Arc<Self>, id: &str) {
        let record: Option<SandboxRecord> = match self.sandbox(id) {
            Ok(sandbox) => Some(sandbox.record()),
            Err(_) => std::fs::read(self.sandbox_dir(id).join("record.json"))
                .ok()
                .and_then(|bytes| serde_json::from_slice(&bytes).ok()),
        };
        if let Some(record) = record.filter(|record| !record.config.host_network) {
            let netns = self.pins(id).join("net");
            let there = mount::is_mount_point(&netns).unwrap_or(false);
            let detached = self
                .config
                .network
                .detach(id, &record.config.pod, there.then_some(netns.as_path()))
                .await;
            if let Err(error) = detached {
                tracing::warn!(sandbox = id, %error, "network of a discarded sandbox is left");
            }
        }
        let (inner, id) = (self.clone(), id.to_owned());
        let erased = blocking(move || inner.erase_sandbox(&id)).await;
        if let Err(error) = erased {
            tracing::warn!(%error, "a discarded sandbox is left");
        }
    }

    fn erase_sandbox(&self, id: &str) -> Result<(), Error> {
        let group = self
            .pods
            .child(&format!("pod-{id}"))
            .map_err(|error| runtime("name a control group", &error))?;
        group
            .kill_all(KILL_PATIENCE)
            .map_err(|error| runtime("kill a pod", &error))?;
        let _ = self.supervisor.forget(&pause_id(id));
        self.unpin(id);
        let pins = self.pins(id);
        remove_dir(&pins)?;
        group
            .remove()
            .map_err(|error| runtime("remove a pod's control group", &error))?;
        // The record goes last: until then a restart finds what to clean up.
        remove_dir(&self.sandbox_dir(id))?;
        self.sandboxes.lock().remove(id);
        Ok(())
    }

    fn unpin(&self, id: &str) {
        let _ = mount::detach(&self.pins(id));
    }
}

fn pause_id(sandbox_id: &str) -> String {
    format!("pause-{sandbox_id}")
}

/// For every user of the pod, whatever our umask is.
fn write_readable(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text)
        .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)))
        .map_err(io(format!("write {}", path.display())))
}

/// Removes a tree that holds no mounts; succeeds if it is gone.
pub fn remove_dir(dir: &Path) -> Result<(), Error> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io(format!("remove {}", dir.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Runs on a scratch thread, whose namespaces they are until pinned.
fn make_namespaces(config: &SandboxConfig, pins: &Path) -> Result<(), Error> {
    let failed = |doing: &'static str| move |error: process::ProcessError| runtime(doing, &error);
    let mut kinds = Namespaces::NEWIPC | Namespaces::NEWUTS;
    if !config.host_network {
        kinds |= Namespaces::NEWNET;
    }
    process::unshare(kinds).map_err(failed("make namespaces"))?;
    rustix::system::sethostname(config.hostname.as_bytes()).map_err(|error| io("set the host name")(error.into()))?;
    let defaults = NET_DEFAULTS
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    let mut sysctls: BTreeMap<String, String> = if config.host_network {
        BTreeMap::new()
    } else {
        defaults.collect()
    };
    sysctls.extend(config.sysctls.clone());
    if !config.host_network {
        process::loopback_up().map_err(failed("bring lo up"))?;
        process::pin_own_namespace("net", &pins.join("net")).map_err(failed("pin the network namespace"))?;
    }
    for (key, value) in sysctls {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        let written = std::fs::write(&path, &value);
        // Defaults are a convenience, also where /proc/sys is read-only; what the pod asks for is not.
        if config.sysctls.contains_key(&key) {
            written.map_err(io(format!("set {key}")))?;
        }
    }
    process::pin_own_namespace("ipc", &pins.join("ipc")).map_err(failed("pin the ipc namespace"))?;
    process::pin_own_namespace("uts", &pins.join("uts")).map_err(failed("pin the uts namespace"))
}

fn check(config: &SandboxConfig) -> Result<(), Error> {
    let invalid = |field: String, reason: &str| {
        Err(Error::Invalid {
            field,
            reason: reason.to_owned(),
        })
    };
    if config.hostname.is_empty() || config.hostname.len() > 64 {
        return invalid("hostname".to_owned(), "it has 1 to 64 characters");
    }
    if !config.log_directory.is_absolute() {
        return invalid("logDirectory".to_owned(), "it is an absolute path");
    }
    for key in config.sysctls.keys() {
        let plain = key
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
            && !key.contains("..");
        let own_net = key.starts_with("net.") && !config.host_network;
        let own_ipc = IPC_SYSCTLS.contains(&key.as_str()) || key.starts_with("fs.mqueue.");
        if !plain || !(own_net || own_ipc) {
            return invalid(format!("sysctls[{key}]"), "it would change the host, not the pod");
        }
    }
    Ok(())
}

fn resolv_conf(dns: &crate::api::DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

/// For pods whose agent mounts no hosts file of its own.
fn hosts_file(record: &SandboxRecord) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for ip in &record.ips {
        text.push_str(&format!("{ip}\t{}\n", record.config.hostname));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_controls_of_the_host_are_refused() {
        let with = |key: &str, host_network| {
            check(&SandboxConfig {
                hostname: "h".into(),
                log_directory: "/log".into(),
                host_network,
                sysctls: BTreeMap::from([(key.to_owned(), "1".to_owned())]),
                ..SandboxConfig::default()
            })
            .is_ok()
        };
        assert!(with("net.core.somaxconn", false) && with("kernel.shmmax", false) && with("fs.mqueue.msg_max", true));
        for key in [
            "vm.swappiness",
            "kernel.hostname",
            "net/../../x",
            "net...x",
            "fs.file-max",
        ] {
            assert!(!with(key, false), "{key}");
        }
        assert!(!with("net.core.somaxconn", true));
    }
}

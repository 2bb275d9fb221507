//! The machine controller: one key per Machine object, reconciled from the object and from what runs here.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::Secret;
use parking_lot::Mutex;
use reconcile::{Informer, Patch, Queue, Requeue, run_controller};
use resources::{Machine, MachineStatus, NetworkInterface, views::NicAddresses};
use serde_json::json;
use stdx::Shutdown;

use super::{AgentConfig, AgentError, HostPaths, Network};
use crate::{
    namespace::{BootSpec, NamespaceMachines, POWER_OFF_S, SeedFile},
    node_config::{self, NodeConfig},
    tree::{self, Binaries},
};

/// A machine disappears only after its host has taken it down.
pub const FINALIZER: &str = "oaks.internal/machine";

/// Machines being started or stopped at one time.
const WORKERS: usize = 8;

/// After a failure: when to try again.
const RETRY: Duration = Duration::from_secs(1);
/// Failures in a row after which a machine is called Failed; it is still tried.
const FAILURES_BEFORE_FAILED: u32 = 10;

/// How the agent starts machines on this host.
#[derive(Clone, Debug)]
pub struct MachineStart {
    pub provider: NamespaceMachines,
    pub binaries: Binaries,
    pub paths: HostPaths,
    /// Parent of all machines' cgroups.
    pub cgroup: linux::cgroup::Group,
    /// Socket on the host that answers image pulls; bound into each machine.
    pub pull_socket: PathBuf,
}

struct Controller {
    config: AgentConfig,
    network: Network,
    nics: Informer<NetworkInterface>,
    machines: Informer<Machine>,
    /// Failures in a row, by machine.
    failures: Mutex<BTreeMap<String, u32>>,
}

pub(super) async fn run(config: AgentConfig, network: Network, shutdown: Shutdown) -> Result<(), AgentError> {
    let (machines, nics) = (
        config.informers.get::<Machine>(),
        config.informers.get::<NetworkInterface>(),
    );
    machines.wait_synced().await;
    nics.wait_synced().await;
    let start = config.start.clone();
    tokio::task::spawn_blocking(move || tree::build(&start.paths.tree, &start.binaries))
        .await
        .map_err(|_| AgentError::Interrupted {
            doing: "building the machines' root",
        })??;

    let queue: Queue<reconcile::Key> = Queue::new();
    let enqueue = queue.clone();
    machines.on_change(move |change| enqueue.add(change.key().clone()));
    // A machine waits for its NIC's addresses: a NIC's change wakes the machines on it.
    let (by_nic, enqueue) = (machines.clone(), queue.clone());
    nics.on_change(move |change| {
        for m in by_nic.list().iter().filter(|m| m.spec.nic == change.key().name) {
            enqueue.add(reconcile::Key::new("", m.name()));
        }
    });
    // Machines of a former life whose objects are gone.
    for name in config.start.provider.known() {
        queue.add(reconcile::Key::new("", name));
    }
    let controller = Arc::new(Controller {
        config,
        network,
        nics,
        machines,
        failures: Mutex::default(),
    });
    let reconcile = move |key: reconcile::Key| {
        let controller = controller.clone();
        async move { Ok(controller.reconcile(&key.name).await) }
    };
    run_controller("machines", queue, WORKERS, reconcile, shutdown).await;
    Ok(())
}

impl Controller {
    async fn reconcile(&self, name: &str) -> Requeue {
        let machine = self.machines.get("", name);
        let outcome = match &machine {
            None => self.take_down(name, None, true).await,
            Some(m) if !self.config.here.runs(&m.spec.host) => match m.spec.host.is_empty() {
                // It waits for a host to be chosen.
                true => Ok(()),
                false => self.leave_to_others(name).await,
            },
            Some(m) if m.metadata.deletion_timestamp.is_some() => self.release(m).await,
            Some(m) if !m.spec.running => match self.take_down(name, Some(&m.spec.nic), false).await {
                Ok(()) => self.set_status(m, "Stopped", "", 0).await,
                Err(e) => Err(e),
            },
            Some(m) => self.bring_up(m).await,
        };
        match outcome {
            Ok(()) => {
                self.failures.lock().remove(name);
                Requeue::Done
            }
            Err(AgentError::NoAddresses { .. }) => Requeue::After(Duration::from_secs(5)),
            Err(e) => {
                let text = stdx::chain(&e).to_string();
                tracing::warn!(
                    controller = "machines",
                    name,
                    reason = text,
                    "machine not as wanted yet"
                );
                if let Some(m) = &machine {
                    let failures = {
                        let mut all = self.failures.lock();
                        let n = all.entry(name.to_owned()).or_default();
                        *n += 1;
                        *n
                    };
                    let phase = match m.metadata.deletion_timestamp {
                        Some(_) => "Stopping",
                        None if failures < FAILURES_BEFORE_FAILED => "Starting",
                        None => "Failed",
                    };
                    // The next try writes it again: a lost message is no loss.
                    let _ = self.set_status(m, phase, &text, 0).await;
                }
                Requeue::After(RETRY)
            }
        }
    }

    async fn bring_up(&self, m: &Machine) -> Result<(), AgentError> {
        let name = m.name();
        let start = &self.config.start;
        if !m.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER) {
            let mut finalizers = m.metadata.finalizers.clone().unwrap_or_default();
            finalizers.push(FINALIZER.to_owned());
            let patch = json!({"metadata": {"finalizers": finalizers, "resourceVersion": m.metadata.resource_version}});
            self.config
                .home
                .patch::<Machine>(None, name, &Patch::Merge(patch), None)
                .await?;
        }
        let nic = self.nics.get("", &m.spec.nic);
        let addresses = nic
            .as_ref()
            .and_then(|n| n.status.as_ref())
            .and_then(|s| NicAddresses::parse(&s.properties))
            .ok_or_else(|| AgentError::NoAddresses {
                nic: m.spec.nic.clone(),
            })?;
        if let Some(running) = start.provider.running(name) {
            return self.set_status(m, "Running", "", running.pid).await;
        }
        // What a crashed machine left must go before it starts anew.
        self.take_down(name, Some(&m.spec.nic), false).await?;
        let secret: Secret = self
            .config
            .home
            .get(Some("kube-system"), &m.spec.bootstrap.secret)
            .await?;
        let node = node_config(m, &secret, &addresses)?;
        self.network.ready_for(&m.spec.nic).await?;

        let netns = self.netns_path(name);
        let (fabric, nic, at) = (self.config.fabric.clone(), m.spec.nic.clone(), netns.clone());
        let machine_name = name.to_owned();
        blocking("attaching the NIC", move || {
            linux::netns::create_named(&at).map_err(|source| AgentError::Netns {
                name: machine_name,
                source,
            })?;
            fabric
                .attach(&nic, &vnet::NetnsRef::Path(at), "eth0")
                .map_err(|source| AgentError::Fabric { source })
        })
        .await?;

        let spec = self.boot_spec(m, &node, netns)?;
        let provider = start.provider.clone();
        let running = blocking("booting", move || Ok(provider.start(&spec)?)).await?;
        tracing::info!(
            controller = "machines",
            name,
            pid = running.pid,
            node = m.spec.node_name,
            "machine runs"
        );
        self.watch_exit(name.to_owned(), running.pid);
        self.set_status(m, "Running", "", running.pid).await
    }

    /// When PID 1 ends by itself the object is looked at again: a status change wakes this controller.
    fn watch_exit(&self, name: String, pid: i32) {
        let (informer, home) = (self.machines.clone(), self.config.home.clone());
        tokio::spawn(async move {
            crate::sys::exited(pid).await;
            crate::sys::reap(pid);
            let wanted = informer
                .get("", &name)
                .is_some_and(|m| m.metadata.deletion_timestamp.is_none() && m.spec.running);
            if wanted {
                let patch = Patch::Merge(
                    json!({"status": {"phase": "Starting", "message": format!("PID 1 ({pid}) ended"), "pid": 0}}),
                );
                if let Err(e) = home.patch::<Machine>(None, &name, &patch, Some("status")).await {
                    tracing::warn!(controller = "machines", name, reason = %stdx::chain(&e), "the end of a machine was not recorded");
                }
            }
        });
    }

    fn netns_path(&self, name: &str) -> PathBuf {
        self.config.start.paths.run.join("netns").join(format!("m-{name}"))
    }

    fn boot_spec(&self, m: &Machine, node: &NodeConfig, netns: PathBuf) -> Result<BootSpec, AgentError> {
        let start = &self.config.start;
        let name = m.name();
        let data = start.paths.machines_data.join(name);
        let cgroup_err = |source| AgentError::Cgroup {
            name: name.to_owned(),
            source,
        };
        let group = start.cgroup.child(name).map_err(cgroup_err)?;
        group.create().map_err(cgroup_err)?;
        let limits = linux::cgroup::Limits {
            cpu_milli: u64::try_from(m.spec.cpu_milli).ok().filter(|v| *v > 0),
            cpu_weight_milli: None,
            memory_bytes: u64::try_from(m.spec.memory_bytes).ok().filter(|v| *v > 0),
            pids: Some(32_768),
        };
        group.set_limits(&limits).map_err(cgroup_err)?;
        let directories = group.directories();
        let log = data.join("log/init.log");
        // The init's state and the node's log, readable from the host while the machine runs.
        let init = start.paths.run.join("machines").join(name).join("init");
        let io = |source| {
            AgentError::Machine(crate::namespace::MachineError::Io {
                name: name.to_owned(),
                doing: "creating",
                path: init.clone(),
                source,
            })
        };
        fs::create_dir_all(&init).map_err(io)?;
        let content = serde_json::to_string(node).unwrap_or_default();
        let argv = [
            "/usr/sbin/oaks-init",
            "--socket",
            node_config::INIT_SOCKET,
            "--state",
            node_config::INIT_STATE,
            "--",
            "/usr/bin/oaks",
            "node",
            "--config",
            node_config::PATH,
        ];
        Ok(BootSpec {
            name: name.to_owned(),
            hostname: m.spec.node_name.clone(),
            netns,
            cgroup_procs: directories.iter().map(|d| d.join("cgroup.procs")).collect(),
            cgroup_v1: v1_controllers(
                &fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(),
                &directories,
            ),
            tree: start.paths.tree.clone(),
            root: start.paths.run.join("machines").join(name).join("root"),
            data: data.join("data"),
            binds: vec![
                (start.paths.images.clone(), node_config::IMAGES.into(), true),
                (init.clone(), node_config::INIT_STATE.into(), false),
                (start.pull_socket.clone(), node_config::PULL_SOCKET.into(), false),
            ],
            files: vec![
                SeedFile {
                    path: node_config::PATH.into(),
                    mode: 0o600,
                    content,
                },
                SeedFile {
                    path: "/etc/resolv.conf".into(),
                    mode: 0o644,
                    content: "nameserver 168.63.129.16\n".to_owned(),
                },
            ],
            init_argv: argv.map(str::to_owned).to_vec(),
            log,
        })
    }

    /// Stops the machine, detaches its NIC and removes its namespace and cgroup; with `purge` its data too.
    async fn take_down(&self, name: &str, nic: Option<&str>, purge: bool) -> Result<(), AgentError> {
        let (start, fabric, netns) = (
            self.config.start.clone(),
            self.config.fabric.clone(),
            self.netns_path(name),
        );
        let (name, nic) = (name.to_owned(), nic.map(str::to_owned));
        blocking("stopping", move || {
            let mut first_error = start
                .provider
                .stop(&name, Duration::from_secs(POWER_OFF_S))
                .map_err(AgentError::from)
                .err();
            if netns.exists() {
                // Without its object the NIC's link goes with the namespace.
                if let Some(Err(source)) = nic.map(|nic| fabric.detach(&nic)) {
                    first_error = first_error.or(Some(AgentError::Fabric { source }));
                }
                if let Err(source) = linux::netns::delete(&netns) {
                    first_error = first_error.or(Some(AgentError::Netns {
                        name: name.clone(),
                        source,
                    }));
                }
            }
            let cgroup = |source| AgentError::Cgroup {
                name: name.clone(),
                source,
            };
            match start.cgroup.child(&name) {
                Ok(group) if group.exists() => {
                    let removed = group.kill_all(Duration::from_secs(5)).and_then(|_| group.remove());
                    first_error = first_error.or(removed.err().map(cgroup));
                }
                Ok(_) => {}
                Err(e) => first_error = first_error.or(Some(cgroup(e))),
            }
            if purge && first_error.is_none() {
                remove_data(&start.paths.machines_data.join(&name));
            }
            first_error.map_or(Ok(()), Err)
        })
        .await
    }

    /// The machine is another host's: nothing of it may be here.
    async fn leave_to_others(&self, name: &str) -> Result<(), AgentError> {
        if self.config.start.provider.known().iter().any(|k| k == name) {
            self.take_down(name, None, true).await?;
        }
        Ok(())
    }

    /// The object is being deleted: take the machine down with its data, then let the object go.
    async fn release(&self, m: &Machine) -> Result<(), AgentError> {
        if !m.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER) {
            return Ok(());
        }
        self.take_down(m.name(), Some(&m.spec.nic), true).await?;
        let rest: Vec<&String> = m
            .metadata
            .finalizers
            .iter()
            .flatten()
            .filter(|f| *f != FINALIZER)
            .collect();
        let patch = json!({"metadata": {"finalizers": rest, "uid": m.metadata.uid}});
        match self
            .config
            .home
            .patch::<Machine>(None, m.name(), &Patch::Merge(patch), None)
            .await
        {
            Err(e) if !e.is_not_found() => Err(e.into()),
            _ => Ok(()),
        }
    }

    async fn set_status(&self, m: &Machine, phase: &str, message: &str, pid: i32) -> Result<(), AgentError> {
        let status = MachineStatus {
            phase: phase.to_owned(),
            message: message.to_owned(),
            host: self.config.here.name.clone(),
            pid: i64::from(pid),
            observed_generation: m.metadata.generation.unwrap_or_default(),
        };
        if m.status.as_ref() == Some(&status) {
            return Ok(());
        }
        let patch = Patch::Merge(json!({"status": status}));
        self.config
            .home
            .patch::<Machine>(None, m.name(), &patch, Some("status"))
            .await?;
        Ok(())
    }
}

/// Everything the node needs, from the object, its bootstrap Secret and its NIC.
fn node_config(m: &Machine, secret: &Secret, addresses: &NicAddresses) -> Result<NodeConfig, AgentError> {
    let empty = BTreeMap::new();
    let data = secret.data.as_ref().unwrap_or(&empty);
    let pem = |key: &str| {
        data.get(key)
            .and_then(|b| String::from_utf8(b.0.clone()).ok())
            .ok_or_else(|| AgentError::Bootstrap {
                name: m.spec.bootstrap.secret.clone(),
                reason: format!("key {key} is missing or no text"),
            })
    };
    let b = &m.spec.bootstrap;
    Ok(NodeConfig {
        node_name: m.spec.node_name.clone(),
        cluster: b.cluster.clone(),
        api_server: b.api_server.clone(),
        ca_pem: pem("ca.crt")?,
        cert_pem: pem("tls.crt")?,
        key_pem: pem("tls.key")?,
        serving_cert_pem: pem("serving.crt")?,
        serving_key_pem: pem("serving.key")?,
        address: addresses.primary().map(|a| a.address),
        vm_size: m.spec.vm_size.clone(),
        cpu_milli: m.spec.cpu_milli,
        memory_bytes: m.spec.memory_bytes,
        max_pods: m.spec.max_pods,
        labels: m.spec.labels.clone(),
        taints: m.spec.taints.clone(),
        service_cidr: b.service_cidr.clone(),
        dns_service_ip: b.dns_service_ip.parse().ok(),
        cluster_domain: if b.cluster_domain.is_empty() {
            "cluster.local".to_owned()
        } else {
            b.cluster_domain.clone()
        },
        data_dir: "/var/lib/oaks".into(),
    })
}

/// Names of the v1 hierarchies (as their mount directory is called) that `directories` lie in; empty on a unified host.
fn v1_controllers(mountinfo: &str, directories: &[PathBuf]) -> Vec<String> {
    let mut out: Vec<String> = mountinfo
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            if right.split(' ').next()? != "cgroup" {
                return None;
            }
            let point = Path::new(left.split(' ').nth(4)?);
            directories
                .iter()
                .any(|d| d.starts_with(point))
                .then(|| point.file_name()?.to_str().map(str::to_owned))
                .flatten()
        })
        .collect();
    out.sort();
    out.dedup();
    out
}

fn remove_data(dir: &Path) {
    if let Err(e) = fs::remove_dir_all(dir) {
        if e.kind() != std::io::ErrorKind::NotFound {
            tracing::warn!(path = %dir.display(), error = %e, "machine data not removed");
        }
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    doing: &'static str,
    f: impl FnOnce() -> Result<T, AgentError> + Send + 'static,
) -> Result<T, AgentError> {
    tokio::task::spawn_blocking(f)
        .await
        .unwrap_or(Err(AgentError::Interrupted { doing }))
}

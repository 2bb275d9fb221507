//! The virtual nodes of this host: one task per VirtualNode object, its own NIC, the kubelet core over container groups, and
//! the cluster's Services and DNS at the groups' ports.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use container_instances::{Groups, GroupsConfig, Quota};
use k8s_openapi::api::core::v1::Secret;
use kubelet::ClientApi;
use machines::agent::{AgentConfig, cluster_marks};
use reconcile::{Client, HttpsConfig, Identity, Informer, Informers, Patch, Queue, Requeue, run_controller};
use resources::{MachineStatus, VirtualNode};
use sandbox::embedded::Engine;
use serde_json::json;
use stdx::{RealClock, Shutdown};
use tokio::{sync::Mutex, task::JoinHandle};
use vnet_model::address::WIRE_SERVER;

use crate::{
    access::chained,
    cli::Settings,
    group_nics::{GroupNics, node_netns},
    node::KUBELET_PORT,
};

/// A virtual node disappears only after its host has stopped its groups.
const FINALIZER: &str = "oaks.internal/virtual-node";
/// After a failure: when to try again.
const RETRY: Duration = Duration::from_secs(1);
/// Failures in a row after which a virtual node is called Failed; it is still tried.
const FAILURES_BEFORE_FAILED: u32 = 10;
/// Names that a cluster's DNS does not know are asked here, in the virtual network.
const UPSTREAM_DNS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(WIRE_SERVER), 53);

struct Running {
    shutdown: Shutdown,
    task: JoinHandle<()>,
    node: virtual_node::VirtualNode,
    informers: Informers,
}

struct Manager {
    settings: Settings,
    config: AgentConfig,
    engine: Arc<Engine>,
    nics: GroupNics,
    nodes: Informer<VirtualNode>,
    running: Mutex<std::collections::HashMap<String, Running>>,
    /// Failures in a row, by virtual node.
    failures: parking_lot::Mutex<std::collections::HashMap<String, u32>>,
}

/// Runs until `shutdown`; groups go on and are adopted by the next agent.
pub async fn run(settings: Settings, config: AgentConfig, engine: Arc<Engine>, nics: GroupNics, shutdown: Shutdown) {
    let nodes = config.informers.get::<VirtualNode>();
    nodes.wait_synced().await;
    let queue: Queue<reconcile::Key> = Queue::new();
    let enqueue = queue.clone();
    nodes.on_change(move |change| enqueue.add(change.key().clone()));
    let manager = Arc::new(Manager {
        settings,
        config,
        engine,
        nics,
        nodes,
        running: Mutex::default(),
        failures: Default::default(),
    });
    let work = manager.clone();
    let reconcile = move |key: reconcile::Key| {
        let manager = work.clone();
        async move { Ok(manager.reconcile(&key.name).await) }
    };
    run_controller("virtual-nodes", queue, 4, reconcile, shutdown).await;
    let all: Vec<Running> = manager.running.lock().await.drain().map(|(_, r)| r).collect();
    for running in all {
        running.end().await;
    }
}

impl Running {
    async fn end(self) {
        self.shutdown.trigger();
        let _ = self.task.await;
        self.informers.stop().await;
    }
}

impl Manager {
    async fn reconcile(&self, name: &str) -> Requeue {
        let Some(object) = self.nodes.get("", name) else {
            if let Some(running) = self.running.lock().await.remove(name) {
                running.end().await;
            }
            return Requeue::Done;
        };
        let outcome = if object.metadata.deletion_timestamp.is_some() {
            self.release(&object).await
        } else {
            self.bring_up(&object).await
        };
        match outcome {
            Ok(()) => {
                self.failures.lock().remove(name);
                Requeue::Done
            }
            Err(e) => {
                let text = format!("{e:#}");
                tracing::warn!(
                    controller = "virtual-nodes",
                    name,
                    reason = text,
                    "virtual node not as wanted yet"
                );
                let failures = {
                    let mut all = self.failures.lock();
                    let n = all.entry(name.to_owned()).or_default();
                    *n += 1;
                    *n
                };
                let phase = match object.metadata.deletion_timestamp {
                    Some(_) => "Stopping",
                    None if failures < FAILURES_BEFORE_FAILED => "Starting",
                    None => "Failed",
                };
                let _ = self.set_status(&object, phase, &text).await;
                Requeue::After(RETRY)
            }
        }
    }

    async fn bring_up(&self, object: &VirtualNode) -> Result<()> {
        let name = object.name();
        if self
            .running
            .lock()
            .await
            .get(name)
            .is_some_and(|r| !r.task.is_finished())
        {
            return self.set_status(object, "Running", "").await;
        }
        if !object.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER) {
            let mut finalizers = object.metadata.finalizers.clone().unwrap_or_default();
            finalizers.push(FINALIZER.to_owned());
            let patch =
                json!({"metadata": {"finalizers": finalizers, "resourceVersion": object.metadata.resource_version}});
            self.config
                .home
                .patch::<VirtualNode>(None, name, &Patch::Merge(patch), None)
                .await
                .map_err(chained)?;
        }
        let running = self.start(object).await?;
        self.running.lock().await.insert(name.to_owned(), running);
        tracing::info!(
            controller = "virtual-nodes",
            name,
            node = object.spec.node_name,
            "virtual node runs"
        );
        self.set_status(object, "Running", "").await
    }

    async fn start(&self, object: &VirtualNode) -> Result<Running> {
        let (name, spec) = (object.name(), &object.spec);
        let secret: Secret = self
            .config
            .home
            .get(Some("kube-system"), &spec.bootstrap.secret)
            .await
            .map_err(chained)
            .with_context(|| format!("reading secret {}", spec.bootstrap.secret))?;
        let pem = |key: &str| -> Result<String> {
            let bytes = secret
                .data
                .as_ref()
                .and_then(|d| d.get(key))
                .with_context(|| format!("secret {} lacks {key}", spec.bootstrap.secret))?;
            Ok(String::from_utf8(bytes.0.clone())?)
        };
        let client = Client::https(HttpsConfig {
            server: spec.bootstrap.api_server.clone(),
            ca_pem: pem("ca.crt")?,
            identity: Identity::ClientCert {
                cert_pem: pem("tls.crt")?,
                key_pem: pem("tls.key")?,
            },
            connector: None,
        })
        .map_err(chained)?;
        let informers = Informers::new(client.clone());
        let shutdown = Shutdown::new();

        // The node's own address: a namespace of its own on the virtual network, with only the kubelet's socket inside.
        let netns = node_netns(&self.settings.paths.run, name);
        linux::netns::create_named(&netns).map_err(chained)?;
        let addresses = self
            .nics
            .for_node(&spec.nic, &spec.virtual_network, &spec.subnet, &netns)
            .await
            .map_err(chained)?;
        let listen = SocketAddr::new(
            *addresses.first().context("the virtual node's NIC has no address")?,
            KUBELET_PORT,
        );
        let at = netns.clone();
        let listener =
            tokio::task::spawn_blocking(move || linux::netns::run_in(&at, || std::net::TcpListener::bind(listen)))
                .await?
                .map_err(chained)?
                .with_context(|| format!("listening at {listen}"))?;

        let groups = Groups::open(GroupsConfig {
            runtime: self.engine.clone(),
            images: self.engine.clone(),
            node_name: spec.node_name.clone(),
            cluster: spec.bootstrap.cluster.clone(),
            virtual_network: spec.virtual_network.clone(),
            subnet: spec.subnet.clone(),
            group_scope: spec.group_scope.clone(),
            quota: Quota::default(),
            meter_dir: self.settings.paths.usage().join(name),
            home: Some(self.config.home.clone()),
            clock: RealClock::shared(),
        })
        .await
        .map_err(chained)?;
        self.services(object, &informers, &shutdown);
        let dir = self.settings.paths.groups().join(name);
        let dns: Option<std::net::IpAddr> = spec.bootstrap.dns_service_ip.parse().ok();
        let node = virtual_node::VirtualNode::new(virtual_node::VirtualNodeConfig {
            node_name: spec.node_name.clone(),
            api: ClientApi::new(client, informers.clone()),
            groups,
            root_dir: dir.join("kubelet"),
            log_dir: dir.join("log"),
            cpu_milli: spec.cpu_milli,
            memory_bytes: spec.memory_bytes,
            pods: spec.max_pods,
            addresses,
            cluster_dns: dns.into_iter().collect(),
            cluster_domain: if spec.bootstrap.cluster_domain.is_empty() {
                "cluster.local".to_owned()
            } else {
                spec.bootstrap.cluster_domain.clone()
            },
            kubernetes_service: None,
            port: KUBELET_PORT,
            serving: Some(kubelet::Serving {
                cert_pem: pem("serving.crt")?,
                key_pem: pem("serving.key")?,
                client_ca_pem: pem("ca.crt")?,
            }),
            dialer: None,
            labels: Default::default(),
            clock: RealClock::shared(),
            tuning: kubelet::Tuning::default(),
        })
        .map_err(chained)?;
        let (run, serve, stop, served) = (node.clone(), node.clone(), shutdown.clone(), shutdown.clone());
        let task = tokio::spawn(async move {
            let serving = async {
                if let Err(e) = serve.serve(listener, served).await {
                    tracing::error!(reason = %stdx::chain(&e), "the virtual node's kubelet API does not serve");
                }
            };
            tokio::join!(run.run(stop), serving);
        });
        Ok(Running {
            shutdown,
            task,
            node,
            informers,
        })
    }

    /// Services and DNS at the ports of this cluster's groups, inside the virtual network's namespace.
    fn services(&self, object: &VirtualNode, informers: &Informers, shutdown: &Shutdown) {
        let spec = &object.spec;
        let nodes = self.nodes.list();
        let clusters = nodes
            .iter()
            .filter(|n| n.spec.virtual_network == spec.virtual_network)
            .map(|n| n.spec.bootstrap.cluster.as_str());
        let marks = cluster_marks(clusters);
        let Some((mark, dns_port)) = marks.get(spec.bootstrap.cluster.as_str()).copied() else {
            return;
        };
        let proxy = service_proxy::ProxyConfig {
            informers: informers.clone(),
            netns: Some(self.config.fabric.vnet_netns(&spec.virtual_network)),
            node_name: spec.node_name.clone(),
            dns_ip: spec.bootstrap.dns_service_ip.parse().ok(),
            domain: if spec.bootstrap.cluster_domain.is_empty() {
                "cluster.local".to_owned()
            } else {
                spec.bootstrap.cluster_domain.clone()
            },
            mode: service_proxy::Mode::Group {
                mark,
                dns_listen: std::net::SocketAddrV4::new(WIRE_SERVER, dns_port),
            },
            upstream_dns: Some(UPSTREAM_DNS),
            shutdown: shutdown.clone(),
        };
        let node = spec.node_name.clone();
        tokio::spawn(async move {
            if let Err(e) = service_proxy::run(proxy).await {
                tracing::error!(node, reason = %stdx::chain(&e), "Services of container groups are not translated");
            }
        });
    }

    /// The object is being deleted: stop the node and its groups, release its NIC, let the object go.
    async fn release(&self, object: &VirtualNode) -> Result<()> {
        if !object.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER) {
            return Ok(());
        }
        let name = object.name();
        let running = self.running.lock().await.remove(name);
        if let Some(running) = running {
            // The cluster may be gone already; then so is its Node object.
            if let Err(e) = running.node.deregister().await {
                tracing::debug!(name, reason = %stdx::chain(&e), "Node object not deleted");
            }
            running.end().await;
        }
        self.stop_groups(&object.spec.node_name).await?;
        self.nics.release_node(&object.spec.nic).await.map_err(chained)?;
        let netns = node_netns(&self.settings.paths.run, name);
        if netns.exists() {
            linux::netns::delete(&netns).map_err(chained)?;
        }
        remove_dir(self.settings.paths.groups().join(name));
        let rest: Vec<&String> = object
            .metadata
            .finalizers
            .iter()
            .flatten()
            .filter(|f| *f != FINALIZER)
            .collect();
        let patch = Patch::Merge(json!({"metadata": {"finalizers": rest, "uid": object.metadata.uid}}));
        match self.config.home.patch::<VirtualNode>(None, name, &patch, None).await {
            Err(e) if !e.is_not_found() => Err(chained(e)),
            _ => Ok(()),
        }
    }

    /// Stops and removes whatever the engine still runs for the node.
    async fn stop_groups(&self, node_name: &str) -> Result<()> {
        use sandbox::Runtime as _;
        for sandbox in self.engine.list_sandboxes().await.map_err(chained)? {
            if sandbox
                .annotations
                .get(container_instances::groups::NODE)
                .is_some_and(|n| n == node_name)
            {
                self.engine.stop_sandbox(&sandbox.id).await.map_err(chained)?;
                self.engine.remove_sandbox(&sandbox.id).await.map_err(chained)?;
            }
        }
        Ok(())
    }

    async fn set_status(&self, object: &VirtualNode, phase: &str, message: &str) -> Result<()> {
        let status = MachineStatus {
            phase: phase.to_owned(),
            message: message.to_owned(),
            host: self.config.here.name.clone(),
            pid: 0,
            observed_generation: object.metadata.generation.unwrap_or_default(),
        };
        if object.status.as_ref() == Some(&status) {
            return Ok(());
        }
        let patch = Patch::Merge(json!({"status": status}));
        self.config
            .home
            .patch::<VirtualNode>(None, object.name(), &patch, Some("status"))
            .await
            .map_err(chained)?;
        Ok(())
    }
}

fn remove_dir(dir: PathBuf) {
    if let Err(e) = std::fs::remove_dir_all(&dir) {
        if e.kind() != std::io::ErrorKind::NotFound {
            tracing::warn!(path = %dir.display(), reason = %e, "a virtual node's folder was not removed");
        }
    }
}

//! A control plane in one process with nodes that are only statuses, shared by the test binaries.
#![expect(dead_code, reason = "each test binary uses its own part")]

pub mod faults;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use apiserver::{ApiServer, ApiServerConfig, Cluster, ClusterConfig, NoDialer, UserInfo};
use controllers::ControllerConfig;
use controllers::certificates::{Asked, Signer};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Event, Node, Pod};
use reconcile::{Client, DeleteParams, Informers, Kind, ListParams, Patch};
use serde_json::{Value, json};
use stdx::{RealClock, Shutdown, TaskGroup};
use store::ModelEngine;

const PATIENCE: Duration = Duration::from_secs(60);

pub struct World {
    pub cluster: Arc<Cluster>,
    pub client: Client,
    /// Controllers and scheduler.
    plane: Option<Plane>,
    /// The nodes' side.
    nodes: TaskGroup,
    config: ControllerConfig,
    /// Seed of the faults between the control plane and its API; none without.
    faults: Option<u64>,
    _dir: tempfile::TempDir,
}

pub struct Plane {
    informers: Informers,
    tasks: TaskGroup,
}

impl World {
    pub async fn new() -> Self {
        Self::with(Duration::from_secs(600)).await
    }

    pub async fn with(node_grace: Duration) -> Self {
        Self::build(node_grace, None).await
    }

    /// Controllers and scheduler lose calls, answers and watches as the seed says.
    pub async fn with_faults(seed: u64) -> Self {
        Self::build(Duration::from_secs(600), Some(seed)).await
    }

    async fn build(node_grace: Duration, faults: Option<u64>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = ApiServer::new(ApiServerConfig {
            engine: ModelEngine::new(),
            dialer: Arc::new(NoDialer),
            data_dir: dir.path().to_owned(),
            clock: RealClock::shared(),
        });
        let cluster = server
            .create_cluster(ClusterConfig::new("c", "https://127.0.0.1:6443"))
            .await
            .unwrap();
        let config = ControllerConfig {
            cluster_ca_pem: cluster.ca_pem().to_owned(),
            signer: Some(Arc::new(ClusterSigner(cluster.clone()))),
            node_grace,
            node_gone_grace: Duration::from_millis(200),
            ..ControllerConfig::default()
        };
        let mut world = Self {
            client: Client::local(cluster.local_service(UserInfo::admin("test"))),
            cluster,
            plane: None,
            nodes: TaskGroup::new(&Shutdown::new()),
            config,
            faults,
            _dir: dir,
        };
        world.start();
        world
    }

    pub fn start(&mut self) {
        let service = self.cluster.local_service(UserInfo::admin("control-plane"));
        let client = Client::local(match self.faults {
            Some(seed) => faults::inject(service, seed),
            None => service,
        });
        let informers = Informers::new(client.clone());
        let tasks = TaskGroup::new(&Shutdown::new());
        let stop = tasks.shutdown().clone();
        tasks.spawn(
            "controllers",
            controllers::run_all(client.clone(), informers.clone(), self.config.clone(), stop),
        );
        tasks.spawn(
            "scheduler",
            scheduler::run(client, informers.clone(), tasks.shutdown().clone()),
        );
        self.plane = Some(Plane { informers, tasks });
    }

    /// Ends controllers and scheduler as a process exit would, and checks that they end.
    pub async fn stop(&mut self) {
        if let Some(plane) = self.plane.take() {
            assert_eq!(plane.tasks.stop(Duration::from_secs(10)).await, Vec::<String>::new());
            plane.informers.stop().await;
        }
    }

    pub async fn node(&self, name: &str) {
        let node = json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": "z1"}},
            "status": {
                "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "250"},
                "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-02T03:04:05Z"}],
            },
        });
        let made: Node = self.client.create(None, &typed::<Node>(&node)).await.unwrap();
        // The status of a create is kept for nodes, but say it again in the way a kubelet does.
        let status = json!({"metadata": {"uid": made.metadata.uid}, "status": node["status"]});
        let _: Node = self
            .client
            .patch(None, name, &Patch::Merge(status), Some("status"))
            .await
            .unwrap();
        self.kubelet(name);
    }

    /// Runs the pods of a node in the way a kubelet reports it: running and ready with an address, or gone.
    pub fn kubelet(&self, node: &str) {
        let client = self.client.clone();
        let (node, stop) = (node.to_owned(), self.nodes.shutdown().clone());
        let informers = Informers::new(client.clone());
        let pods = informers.get_selected::<Pod>(&format!("spec.nodeName={node}"));
        self.nodes.spawn(format!("kubelet {node}"), async move {
            let mut keys = pods.subscribe();
            let mut last = 0u32;
            while let Some(Some(key)) = stop.or_stop(keys.recv()).await {
                let Some(pod) = pods.by_key(&key) else { continue };
                let running = pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running");
                if pod.metadata.deletion_timestamp.is_some() {
                    let uid = pod.metadata.uid.clone();
                    let now = DeleteParams {
                        grace_period_s: Some(0),
                        uid,
                        ..DeleteParams::default()
                    };
                    let _ = client.delete::<Pod>(Some(&key.ns), &key.name, &now).await;
                } else if !running {
                    last += 1;
                    let octet = node.bytes().last().unwrap_or_default();
                    let ip = format!("10.{octet}.{}.{}", last / 250, last % 250 + 1);
                    let at = "2026-01-02T03:04:05Z";
                    let status = json!({"metadata": {"uid": pod.metadata.uid}, "status": {
                        "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": at}],
                    }});
                    let _ = client
                        .patch::<Pod>(Some(&key.ns), &key.name, &Patch::Strategic(status), Some("status"))
                        .await;
                }
            }
            informers.stop().await;
        });
    }

    /// Renews the node's lease until the returned token stops it.
    pub fn renew(&self, node: &str) -> Shutdown {
        let stop = self.nodes.shutdown().child();
        let (client, node, token) = (self.client.clone(), node.to_owned(), stop.clone());
        self.nodes.spawn(format!("lease {node}"), async move {
            loop {
                let now = apimachinery::time::now_micro(&*RealClock::shared());
                let spec = json!({"holderIdentity": node, "leaseDurationSeconds": 40, "renewTime": now});
                let ns = Some("kube-node-lease");
                let patch = Patch::Merge(json!({"spec": spec}));
                if client.patch::<Lease>(ns, &node, &patch, None).await.is_err() {
                    let lease = json!({"metadata": {"name": node, "namespace": "kube-node-lease"}, "spec": spec});
                    let _ = client.create(ns, &typed::<Lease>(&lease)).await;
                }
                if token
                    .or_stop(tokio::time::sleep(Duration::from_millis(100)))
                    .await
                    .is_none()
                {
                    return;
                }
            }
        });
        stop
    }

    pub async fn apply_deployment(&self, name: &str, replicas: i32, image: &str) {
        let d = json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {
                "replicas": replicas, "selector": {"matchLabels": {"app": name}},
                "template": {"metadata": {"labels": {"app": name}}, "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "containers": [{"name": "c", "image": image, "ports": [{"name": "http", "containerPort": 8080}],
                        "resources": {"requests": {"cpu": "10m", "memory": "8Mi"}}}],
                }},
            },
        });
        self.client
            .create(Some("default"), &typed::<Deployment>(&d))
            .await
            .unwrap();
    }

    pub async fn merge<K: Kind>(&self, name: &str, patch: Value) {
        let _: K = self
            .client
            .patch(Some("default"), name, &Patch::Merge(patch), None)
            .await
            .unwrap();
    }

    pub async fn set_image(&self, name: &str, image: &str) {
        let containers = json!([{"name": "c", "image": image}]);
        let patch = Patch::Strategic(json!({"spec": {"template": {"spec": {"containers": containers}}}}));
        let _: Deployment = self.client.patch(Some("default"), name, &patch, None).await.unwrap();
    }

    pub async fn list<K: Kind>(&self) -> Vec<K> {
        self.client.list::<K>(None, &ListParams::default()).await.unwrap().items
    }

    pub async fn pods(&self, app: &str) -> Vec<Pod> {
        self.client
            .list::<Pod>(None, &ListParams::labels(format!("app={app}")))
            .await
            .unwrap()
            .items
    }

    pub async fn deployment(&self, name: &str) -> Deployment {
        self.client.get(Some("default"), name).await.unwrap()
    }

    /// Whether the Deployment has come to rest at its current spec.
    pub async fn at_rest(&self, name: &str) -> bool {
        let d = self.deployment(name).await;
        let Some(s) = d.status else { return false };
        let wanted = d.spec.and_then(|s| s.replicas);
        s.observed_generation >= d.metadata.generation
            && s.updated_replicas == wanted
            && s.replicas == wanted
            && s.available_replicas == wanted
    }

    pub async fn messages(&self, reason: &str) -> Vec<String> {
        let events = self.list::<Event>().await;
        events
            .into_iter()
            .filter(|e| e.reason.as_deref() == Some(reason))
            .filter_map(|e| e.message)
            .collect()
    }

    /// Waits until `done`; fails with what the cluster looks like after a minute.
    pub async fn until<F: Future<Output = bool>>(&self, what: &str, mut done: impl FnMut() -> F) {
        let start = Instant::now();
        while !done().await {
            if start.elapsed() > PATIENCE {
                let mut dump = String::new();
                for d in self.list::<Deployment>().await {
                    dump += &format!("deployment {:?} {:#?}\n", d.metadata.name, d.status);
                }
                for rs in self.list::<ReplicaSet>().await {
                    let wanted = rs.spec.and_then(|s| s.replicas);
                    dump += &format!("replicaset {:?} wants {wanted:?} {:?}\n", rs.metadata.name, rs.status);
                }
                for p in self.list::<Pod>().await {
                    let status = p.status.unwrap_or_default();
                    dump += &format!("pod {:?} {:?} {:?}\n", p.metadata.name, status.phase, status.conditions);
                }
                panic!("never: {what}\n{dump}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// The CA of the cluster, as the platform gives it to the controllers.
struct ClusterSigner(Arc<Cluster>);

impl Signer for ClusterSigner {
    fn read(&self, pem: &[u8]) -> Result<Asked, String> {
        let request = Cluster::read_certificate_request(pem).map_err(|e| stdx::chain(&e).to_string())?;
        Ok(Asked {
            hosts: request.dns_names.len() + request.ip_addresses.len(),
            others: request.emails.len() + request.uris.len(),
            common_name: request.common_name,
            organizations: request.organizations,
        })
    }

    fn sign(&self, pem: &[u8], usages: &[String], ttl: Duration) -> Result<String, String> {
        let signed = self.0.sign_certificate_request(pem, usages, ttl);
        signed.map_err(|e| stdx::chain(&e).to_string())
    }
}

pub fn typed<K: Kind>(value: &Value) -> K {
    serde_json::from_value(value.clone()).unwrap()
}

pub fn nodes_of(pods: &[Pod]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for pod in pods {
        let node = pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default();
        *counts.entry(node).or_default() += 1;
    }
    counts
}

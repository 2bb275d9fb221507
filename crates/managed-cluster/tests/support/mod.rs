//! The management plane around one API server with a store in memory: home, ARM's front door, the cluster controllers, and a
//! host agent that pretends to run machines. Hosted clusters are clusters of the same API server, without listeners. Used by
//! the tests and by the example `serve`.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use apiserver::{ApiServer, ApiServerConfig, ClusterConfig, NoDialer, UserInfo};
use arm::{ActionError, Actions, ArmConfig, Identity, ServicePrincipal, TlsSource};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::Node;
use managed_cluster::{
    ClientCert, ControlPlaneError, ControlPlaneSpec, ControlPlanes, Endpoint, NodeCerts, NodeIdentity,
};
use reconcile::{Client, DeleteParams, Informers, Patch};
use resources::{Machine, MachineStatus, VirtualNode};
use serde_json::json;
use stdx::{RealClock, Shutdown};
use store::ModelEngine;

pub const TENANT: &str = "11111111-1111-4111-8111-111111111111";
pub const SUBSCRIPTION: &str = "22222222-2222-4222-8222-222222222222";
pub const CLIENT: &str = "33333333-3333-4333-8333-333333333333";
pub const SECRET: &str = "a-secret-for-tests";

/// Hosts clusters in one API server; they answer in this process only.
pub struct LocalControlPlanes {
    api: Arc<ApiServer>,
    running: Mutex<BTreeMap<String, (Client, Informers)>>,
}

impl LocalControlPlanes {
    /// Hosted clusters that run.
    pub fn count(&self) -> usize {
        self.running.lock().unwrap().len()
    }

    fn cluster(&self, name: &str) -> Result<Arc<apiserver::Cluster>, ControlPlaneError> {
        self.api.cluster(name).ok_or_else(|| failed(name, "does not run"))
    }
}

fn failed(name: &str, message: impl ToString) -> ControlPlaneError {
    ControlPlaneError {
        name: name.to_owned(),
        message: message.to_string(),
    }
}

const TTL: Duration = Duration::from_secs(3600);

#[async_trait]
impl ControlPlanes for LocalControlPlanes {
    async fn ensure(&self, spec: &ControlPlaneSpec) -> Result<Endpoint, ControlPlaneError> {
        let url = format!("https://{}:443", spec.address);
        let mut config = ClusterConfig::new(spec.name.clone(), url.clone());
        config.service_cidr = spec.service_cidr.to_string();
        config.cert_sans = spec.sans.clone();
        let cluster = self
            .api
            .create_cluster(config)
            .await
            .map_err(|e| failed(&spec.name, e))?;
        let mut running = self.running.lock().unwrap();
        running.entry(spec.name.clone()).or_insert_with(|| {
            let client = Client::local(cluster.local_service(UserInfo::admin("managed-cluster")));
            (client.clone(), Informers::new(client))
        });
        Ok(Endpoint {
            url,
            ca_pem: cluster.ca_pem().to_owned(),
        })
    }

    async fn pause(&self, name: &str) -> Result<(), ControlPlaneError> {
        self.running.lock().unwrap().remove(name);
        self.api.close_cluster(name).await;
        Ok(())
    }

    async fn delete(&self, name: &str) -> Result<(), ControlPlaneError> {
        self.running.lock().unwrap().remove(name);
        self.api.delete_cluster(name).await.map_err(|e| failed(name, e))
    }

    fn client(&self, name: &str) -> Option<(Client, Informers)> {
        self.running.lock().unwrap().get(name).cloned()
    }

    async fn node_certs(&self, name: &str, node: &NodeIdentity) -> Result<NodeCerts, ControlPlaneError> {
        let cluster = self.cluster(name)?;
        let user = format!("system:node:{}", node.node_name);
        let sans: Vec<String> = node
            .addresses
            .iter()
            .map(ToString::to_string)
            .chain([node.node_name.clone()])
            .collect();
        let client = cluster
            .issue_client_cert(&user, &["system:nodes"], TTL)
            .map_err(|e| failed(name, e))?;
        let serving = cluster
            .issue_serving_cert(&user, &sans, TTL)
            .map_err(|e| failed(name, e))?;
        let pair = |(cert_pem, key_pem)| ClientCert { cert_pem, key_pem };
        Ok(NodeCerts {
            ca_pem: cluster.ca_pem().to_owned(),
            client: pair(client),
            serving: pair(serving),
        })
    }

    async fn client_cert(&self, name: &str, user: &str, groups: &[&str]) -> Result<ClientCert, ControlPlaneError> {
        let issued = self.cluster(name)?.issue_client_cert(user, groups, TTL);
        let (cert_pem, key_pem) = issued.map_err(|e| failed(name, e))?;
        Ok(ClientCert { cert_pem, key_pem })
    }
}

struct LocalActions {
    home: Client,
    control_planes: Arc<LocalControlPlanes>,
}

#[async_trait]
impl Actions for LocalActions {
    async fn cluster_credentials(&self, id: &str, admin: bool) -> Result<String, ActionError> {
        let result = managed_cluster::kubeconfig(&self.home, &*self.control_planes, id, admin).await;
        result.map_err(|e| ActionError {
            code: "OperationNotAllowed".into(),
            message: e.to_string(),
        })
    }
}

/// Everything, running.
pub struct Platform {
    pub base_url: String,
    pub ca_pem: String,
    pub home: Client,
    pub control_planes: Arc<LocalControlPlanes>,
    pub shutdown: Shutdown,
    tasks: tokio::task::JoinSet<()>,
    _dir: tempfile::TempDir,
}

impl Platform {
    /// Starts on `address` (port 0 for any). Machines become Running, and their nodes Ready, after `boot`.
    pub async fn start(address: SocketAddr, boot: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let api = ApiServer::new(ApiServerConfig {
            engine: ModelEngine::new(),
            dialer: Arc::new(NoDialer),
            data_dir: dir.path().to_owned(),
            clock: RealClock::shared(),
        });
        let mut config = ClusterConfig::new("oaks-home", "https://127.0.0.1:6443");
        config.extra_kinds = resources::kind_defs();
        let cluster = api.create_cluster(config).await.unwrap();
        let home = Client::local(cluster.local_service(UserInfo::admin("platform")));
        let informers = Informers::new(home.clone());
        let control_planes = Arc::new(LocalControlPlanes {
            api,
            running: Mutex::default(),
        });
        let shutdown = Shutdown::new();
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let base_url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let (ca_pem, ca_key) = ca();
        let server = arm::serve(ArmConfig {
            service_tags: Default::default(),
            home: home.clone(),
            informers: informers.clone(),
            listener,
            tls: TlsSource::Ca {
                cert_pem: ca_pem.clone(),
                key_pem: ca_key,
                names: vec!["localhost".into(), "127.0.0.1".into()],
            },
            identity: Identity {
                base_url: base_url.clone(),
                subscription: SUBSCRIPTION.into(),
                subscription_name: "Oaks".into(),
                service_principal: ServicePrincipal {
                    client_id: CLIENT.into(),
                    client_secret: SECRET.into(),
                    tenant: TENANT.into(),
                },
            },
            public_pool: Some("198.19.0.0/16".parse().unwrap()),
            actions: Arc::new(LocalActions {
                home: home.clone(),
                control_planes: control_planes.clone(),
            }),
            clock: RealClock::shared(),
            shutdown: shutdown.clone(),
        })
        .await
        .unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move { server.task.await.unwrap() });
        tasks.spawn(managed_cluster::run(managed_cluster::Config {
            home: home.clone(),
            informers: informers.clone(),
            control_planes: control_planes.clone(),
            tenant: TENANT.into(),
            clock: RealClock::shared(),
            shutdown: shutdown.clone(),
        }));
        tasks.spawn(machines(
            home.clone(),
            informers,
            control_planes.clone(),
            boot,
            shutdown.clone(),
        ));
        Self {
            base_url,
            ca_pem,
            home,
            control_planes,
            shutdown,
            tasks,
            _dir: dir,
        }
    }

    pub async fn stop(mut self) {
        self.shutdown.trigger();
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
    }
}

fn ca() -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "oaks test CA");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

const HELD: &str = "test/host-agent";

/// A host agent: holds machines by a finalizer, reports them Running, and puts a Ready node into their cluster.
async fn machines(
    home: Client,
    informers: Informers,
    planes: Arc<LocalControlPlanes>,
    boot: Duration,
    shutdown: Shutdown,
) {
    let machines = informers.get::<Machine>();
    let nodes = informers.get::<VirtualNode>();
    let (mut a, mut b) = (machines.subscribe(), nodes.subscribe());
    loop {
        tokio::select! {
            () = shutdown.wait() => return,
            Some(key) = a.recv() => {
                let Ok(Some(m)) = home.get_opt::<Machine>(None, &key.name).await else { continue };
                let held = m.metadata.finalizers.iter().flatten().any(|f| f == HELD);
                if m.metadata.deletion_timestamp.is_some() {
                    if held {
                        let none = Patch::Merge(json!({"metadata": {"finalizers": []}}));
                        let _ = home.patch::<Machine>(None, &key.name, &none, None).await;
                    }
                } else if !held {
                    let hold = Patch::Merge(json!({"metadata": {"finalizers": [HELD]}}));
                    let _ = home.patch::<Machine>(None, &key.name, &hold, None).await;
                } else if !m.spec.running {
                    if m.status.as_ref().is_none_or(|s| s.phase != "Stopped") {
                        let mut m = m;
                        m.metadata.resource_version = None;
                        m.status = Some(MachineStatus { phase: "Stopped".into(), ..Default::default() });
                        let _ = home.update_status(None, &m).await;
                    }
                } else if m.status.as_ref().is_none_or(|s| s.phase == "Stopped") {
                    let (home, planes) = (home.clone(), planes.clone());
                    tokio::spawn(async move {
                        tokio::time::sleep(boot).await;
                        register(&planes, &m.spec.bootstrap.cluster, &m.spec.node_name).await;
                        let mut m = m;
                        m.metadata.resource_version = None;
                        m.status = Some(MachineStatus { phase: "Running".into(), ..Default::default() });
                        let _ = home.update_status(None, &m).await;
                    });
                }
            }
            Some(key) = b.recv() => {
                if let Ok(Some(v)) = home.get_opt::<VirtualNode>(None, &key.name).await {
                    register(&planes, &v.spec.bootstrap.cluster, &v.spec.node_name).await;
                }
            }
        }
    }
}

async fn register(planes: &LocalControlPlanes, cluster: &str, name: &str) {
    let Some((client, _)) = planes.client(cluster) else {
        return;
    };
    let node: Node = serde_json::from_value(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]}}))
    .unwrap();
    let _ = client.delete::<Node>(None, name, &DeleteParams::default()).await;
    client.create(None, &node).await.unwrap();
    client.update_status(None, &node).await.unwrap();
}

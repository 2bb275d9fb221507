//! Hosted control planes: for each managed cluster an API server in this process, its controllers and its scheduler, and a
//! listener at the cluster's own address in the edge.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use apiserver::{ApiServer, Cluster, ClusterConfig, UserInfo};
use arm::{ActionError, Actions};
use async_trait::async_trait;
use managed_cluster::{
    ClientCert, ControlPlaneError, ControlPlaneSpec, ControlPlanes, Endpoint, NodeCerts, NodeIdentity,
};
use parking_lot::Mutex;
use reconcile::{Client, Informers};
use stdx::Shutdown;
use tokio::task::JoinHandle;

use crate::cli::Settings;
use crate::server::start_controllers;

/// Port of every hosted API server at its own address.
const API_PORT: u16 = 443;
/// Certificates of nodes and users last this long; they are issued anew whenever a node boots or credentials are asked for.
const CERT_TTL: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long the edge may take to hold a new cluster's address.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(15);
const LISTEN_RETRY: Duration = Duration::from_millis(10);
const PLATFORM_USER: &str = "oaks:platform";

struct Plane {
    cluster: Arc<Cluster>,
    client: Client,
    informers: Informers,
    shutdown: Shutdown,
    listening: Option<JoinHandle<()>>,
}

/// See the module.
pub struct HostedControlPlanes {
    api: Arc<ApiServer>,
    home: Client,
    fabric: Arc<vnet::Fabric>,
    settings: Settings,
    shutdown: Shutdown,
    planes: Mutex<HashMap<String, Plane>>,
    /// One cluster is opened or deleted at a time: opening is quick, and a name must not be opened twice.
    changing: tokio::sync::Mutex<()>,
}

fn failed(name: &str, doing: &str, e: &(dyn std::error::Error + 'static)) -> ControlPlaneError {
    ControlPlaneError {
        name: name.to_owned(),
        message: format!("{doing}: {}", stdx::chain(e)),
    }
}

impl HostedControlPlanes {
    pub fn new(
        api: Arc<ApiServer>,
        home: Client,
        fabric: Arc<vnet::Fabric>,
        settings: Settings,
        shutdown: Shutdown,
    ) -> Self {
        Self {
            api,
            home,
            fabric,
            settings,
            shutdown,
            planes: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        }
    }

    /// Stops all of them; their data stays.
    pub async fn stop(&self) {
        let planes: Vec<Plane> = self.planes.lock().drain().map(|(_, plane)| plane).collect();
        for plane in planes {
            plane.end().await;
        }
    }

    fn cluster(&self, name: &str) -> Result<Arc<Cluster>, ControlPlaneError> {
        self.planes
            .lock()
            .get(name)
            .map(|p| p.cluster.clone())
            .ok_or_else(|| ControlPlaneError {
                name: name.to_owned(),
                message: "it does not run yet".to_owned(),
            })
    }

    async fn open(&self, spec: &ControlPlaneSpec) -> Result<(), ControlPlaneError> {
        let mut config = ClusterConfig::new(&spec.name, url(spec.address));
        config.service_cidr = spec.service_cidr.to_string();
        config.dns_service_ip = match spec.dns_service_ip {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(ip) => {
                return Err(ControlPlaneError {
                    name: spec.name.clone(),
                    message: format!("dnsServiceIP {ip}: IPv6 is not served yet"),
                });
            }
        };
        config.cert_sans = spec.sans.clone();
        config.audit = crate::server::audit_of(&self.settings, &spec.name);
        let cluster = self
            .api
            .create_cluster(config)
            .await
            .map_err(|e| failed(&spec.name, "opening it", &e))?;
        let client = Client::local(cluster.local_service(UserInfo::new(PLATFORM_USER, ["system:masters"])));
        let informers = Informers::new(client.clone());
        let shutdown = self.shutdown.child();
        start_controllers(&cluster, &client, &informers, shutdown.clone());
        let binder = client.clone().with_user_agent("kube-scheduler");
        tokio::spawn(scheduler::run(binder, informers.clone(), shutdown.clone()));
        let plane = Plane {
            cluster,
            client,
            informers,
            shutdown,
            listening: None,
        };
        self.planes.lock().insert(spec.name.clone(), plane);
        Ok(())
    }

    /// Opens the listener in the edge's namespace; the host agent puts the address there when it sees the object.
    async fn listen(&self, name: &str, address: IpAddr) -> Result<(), ControlPlaneError> {
        let end = tokio::time::Instant::now() + LISTEN_TIMEOUT;
        let at = SocketAddr::new(address, API_PORT);
        let listener = loop {
            let fabric = self.fabric.clone();
            let tried = tokio::task::spawn_blocking(move || fabric.listen_in(&fabric.edge_netns(), at)).await;
            match tried {
                Ok(Ok(listener)) => break listener,
                Ok(Err(e)) if tokio::time::Instant::now() > end => {
                    return Err(failed(
                        name,
                        &format!("listening at {at} (does the host agent run?)"),
                        &e,
                    ));
                }
                Ok(Err(_)) => tokio::time::sleep(LISTEN_RETRY).await,
                Err(e) => return Err(failed(name, "listening", &e)),
            }
        };
        listener
            .set_nonblocking(true)
            .map_err(|e| failed(name, "listening", &e))?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(|e| failed(name, "listening", &e))?;
        let mut planes = self.planes.lock();
        if let Some(plane) = planes.get_mut(name) {
            plane.listening = Some(plane.cluster.serve(listener));
        }
        Ok(())
    }
}

fn url(address: IpAddr) -> String {
    format!("https://{}", SocketAddr::new(address, API_PORT))
}

impl Plane {
    async fn end(self) {
        self.shutdown.trigger();
        self.cluster.stop();
        if let Some(task) = self.listening {
            task.abort();
        }
        self.informers.stop().await;
    }
}

#[async_trait]
impl ControlPlanes for HostedControlPlanes {
    async fn ensure(&self, spec: &ControlPlaneSpec) -> Result<Endpoint, ControlPlaneError> {
        let _one = self.changing.lock().await;
        let known = self.planes.lock().contains_key(&spec.name);
        if !known {
            self.open(spec).await?;
        }
        let listening = self
            .planes
            .lock()
            .get(&spec.name)
            .is_some_and(|p| p.listening.as_ref().is_some_and(|t| !t.is_finished()));
        if !listening {
            self.listen(&spec.name, spec.address).await?;
        }
        Ok(Endpoint {
            url: url(spec.address),
            ca_pem: self.cluster(&spec.name)?.ca_pem().to_owned(),
        })
    }

    async fn pause(&self, name: &str) -> Result<(), ControlPlaneError> {
        let _one = self.changing.lock().await;
        let plane = self.planes.lock().remove(name);
        if let Some(plane) = plane {
            plane.end().await;
        }
        self.api.close_cluster(name).await;
        Ok(())
    }

    async fn delete(&self, name: &str) -> Result<(), ControlPlaneError> {
        let _one = self.changing.lock().await;
        let plane = self.planes.lock().remove(name);
        if let Some(plane) = plane {
            plane.end().await;
        }
        self.api
            .delete_cluster(name)
            .await
            .map_err(|e| failed(name, "deleting it", &e))
    }

    fn client(&self, name: &str) -> Option<(Client, Informers)> {
        self.planes.lock().get(name).map(|p| {
            (
                p.client.clone().with_user_agent("cloud-controller-manager"),
                p.informers.clone(),
            )
        })
    }

    async fn node_certs(&self, name: &str, node: &NodeIdentity) -> Result<NodeCerts, ControlPlaneError> {
        let cluster = self.cluster(name)?;
        let user = format!("system:node:{}", node.node_name);
        let client = issue(cluster.issue_client_cert(&user, &["system:nodes"], CERT_TTL), name)?;
        let mut sans = vec![node.node_name.clone()];
        sans.extend(node.addresses.iter().map(ToString::to_string));
        let serving = issue(cluster.issue_serving_cert(&user, &sans, CERT_TTL), name)?;
        Ok(NodeCerts {
            ca_pem: cluster.ca_pem().to_owned(),
            client,
            serving,
        })
    }

    async fn client_cert(&self, name: &str, user: &str, groups: &[&str]) -> Result<ClientCert, ControlPlaneError> {
        issue(self.cluster(name)?.issue_client_cert(user, groups, CERT_TTL), name)
    }
}

fn issue(issued: Result<(String, String), apiserver::Error>, name: &str) -> Result<ClientCert, ControlPlaneError> {
    issued
        .map(|(cert_pem, key_pem)| ClientCert { cert_pem, key_pem })
        .map_err(|e| failed(name, "issuing a certificate", &e))
}

/// ARM's actions on clusters.
pub struct Credentials(pub Arc<HostedControlPlanes>);

#[async_trait]
impl Actions for Credentials {
    async fn cluster_credentials(&self, id: &str, admin: bool) -> Result<String, ActionError> {
        let refused = |message: String| ActionError {
            code: "OperationNotAllowed".to_owned(),
            message,
        };
        managed_cluster::kubeconfig(&self.0.home, &*self.0, id, admin)
            .await
            .map_err(|e| refused(stdx::chain(&e).to_string()))
    }
}

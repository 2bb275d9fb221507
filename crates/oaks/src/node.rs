//! `oaks node`: the agent inside a machine: kubelet core over the embedded engine, the azure-vnet plug-in, the service proxy
//! and the cluster's DNS. Its init restarts it; what it started goes on meanwhile.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use kubelet::{Capacity, ClientApi, Kubelet, KubeletConfig};
use machines::node_config::{self, NodeConfig};
use reconcile::{Client, HttpsConfig, Identity, Informers};
use stdx::{RealClock, Shutdown};

use crate::{access::chained, engine, pod_addresses, pull::HostImages, server::stop_on_signal};

/// The kubelet API's port.
pub const KUBELET_PORT: u16 = 10250;
/// Room for container layers and emptyDir that a node advertises; the host's disk is the real bound.
const EPHEMERAL_BYTES: i64 = 30 << 30;
/// The wire server forwards names that the cluster does not know.
const UPSTREAM_DNS: &str = "168.63.129.16:53";

pub async fn run(path: &Path) -> Result<()> {
    let text = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let config: NodeConfig =
        serde_json::from_slice(&text).with_context(|| format!("{} is no node configuration", path.display()))?;
    let shutdown = Shutdown::new();
    stop_on_signal(shutdown.clone())?;

    let client = client(&config)?;
    let informers = Informers::new(client.clone());
    let engine = Arc::new(
        engine::open_in_machine(&config.data_dir)
            .await
            .context("opening the container engine")?,
    );
    let images = Arc::new(HostImages {
        local: engine.clone(),
        socket: node_config::PULL_SOCKET.into(),
    });

    let proxy = service_proxy(&config, &informers, shutdown.clone())?;
    let mut settings = kubelet_config(&config, &client, &informers, engine, images);
    settings.pods_limit = Some(pod_addresses::follow(config.max_pods, shutdown.clone()));
    let kubelet = Kubelet::new(settings).map_err(chained)?;
    let listener = std::net::TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], KUBELET_PORT)))
        .context("listening at the kubelet's port")?;
    let serving = tokio::spawn({
        let (kubelet, shutdown) = (kubelet.clone(), shutdown.clone());
        async move {
            if let Err(e) = kubelet.serve(listener, shutdown).await {
                tracing::error!(reason = %stdx::chain(&e), "the kubelet API does not serve");
            }
        }
    });
    tracing::info!(node = config.node_name, cluster = config.cluster, "node agent runs");
    kubelet.run(shutdown.clone()).await;
    let _ = tokio::join!(serving, proxy);
    informers.stop().await;
    Ok(())
}

fn client(config: &NodeConfig) -> Result<Client> {
    Client::https(HttpsConfig {
        server: config.api_server.clone(),
        ca_pem: config.ca_pem.clone(),
        identity: Identity::ClientCert {
            cert_pem: config.cert_pem.clone(),
            key_pem: config.key_pem.clone(),
        },
        connector: None,
    })
    .map_err(chained)
}

fn kubelet_config(
    config: &NodeConfig,
    client: &Client,
    informers: &Informers,
    runtime: Arc<sandbox::embedded::Engine>,
    images: Arc<HostImages>,
) -> KubeletConfig {
    KubeletConfig {
        node_name: config.node_name.clone(),
        api: ClientApi::new(client.clone(), informers.clone()),
        runtime,
        images,
        root_dir: config.data_dir.join("kubelet"),
        log_dir: "/var/log/pods".into(),
        pods_limit: None,
        capacity: Capacity {
            cpu_milli: config.cpu_milli,
            memory_bytes: config.memory_bytes,
            pods: config.max_pods,
            ephemeral_storage_bytes: EPHEMERAL_BYTES,
            extended: BTreeMap::new(),
        },
        labels: config.labels.clone(),
        annotations: BTreeMap::new(),
        taints: config.taints.clone(),
        addresses: config.address.into_iter().collect(),
        instance_type: config.vm_size.clone(),
        provider_id: Some(format!("oaks://{}/{}", config.cluster, config.node_name)),
        os_image: "Oaks machine".to_owned(),
        runtime_version: format!("oaks://{}", env!("CARGO_PKG_VERSION")),
        cluster_dns: config.dns_service_ip.into_iter().collect(),
        cluster_domain: config.cluster_domain.clone(),
        kubernetes_service: None,
        port: KUBELET_PORT,
        serving: Some(kubelet::Serving {
            cert_pem: config.serving_cert_pem.clone(),
            key_pem: config.serving_key_pem.clone(),
            client_ca_pem: config.ca_pem.clone(),
        }),
        features: kubelet::Features::MACHINE,
        hooks: Arc::new(kubelet::NoHooks),
        dialer: Arc::new(kubelet::DirectDialer),
        clock: RealClock::shared(),
        tuning: kubelet::Tuning::default(),
    }
}

/// ClusterIPs and DNS in the machine's own namespace.
fn service_proxy(
    config: &NodeConfig,
    informers: &Informers,
    shutdown: Shutdown,
) -> Result<tokio::task::JoinHandle<()>> {
    let proxy = service_proxy::ProxyConfig {
        informers: informers.clone(),
        netns: None,
        node_name: config.node_name.clone(),
        dns_ip: config.dns_service_ip.and_then(|a| match a {
            std::net::IpAddr::V4(v4) => Some(v4),
            std::net::IpAddr::V6(_) => None,
        }),
        domain: config.cluster_domain.clone(),
        mode: service_proxy::Mode::Machine,
        upstream_dns: Some(UPSTREAM_DNS.parse()?),
        shutdown,
    };
    Ok(tokio::spawn(async move {
        if let Err(e) = service_proxy::run(proxy).await {
            tracing::error!(reason = %stdx::chain(&e), "the service proxy ended");
        }
    }))
}

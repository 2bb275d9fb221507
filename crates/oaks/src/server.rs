//! `oaks server`: the API server of home and of every hosted cluster, their controllers and schedulers, ARM, and AKS.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use apiserver::audit::{AuditConfig, LogConfig};
use apiserver::{ApiServer, ApiServerConfig, Cluster, ClusterConfig, UserInfo};
use machines::dial::InwardDialer;
use reconcile::{
    Client, Informers,
    leader::{Election, lead},
};
use serde_json::json;
use stdx::{RealClock, Shutdown};
use tokio::net::TcpListener;

use crate::{
    access::{ArmAccess, chained, write_private},
    cli::Settings,
    control_planes::{Credentials, HostedControlPlanes},
    dialer::PlatformDialer,
    hosts, up,
};

/// The platform's own cluster.
pub const HOME: &str = "oaks-home";
/// The platform's identity at home.
const PLATFORM_USER: &str = "oaks:platform";
/// Range of home's Services: only `kubernetes` lives there.
const HOME_SERVICE_CIDR: &str = "10.0.0.0/24";

pub async fn run(settings: &Settings) -> Result<()> {
    let paths = &settings.paths;
    let shutdown = Shutdown::new();
    stop_on_signal(shutdown.clone())?;
    let engine = open_store(settings)?;
    let fabric = Arc::new(vnet::Fabric::open(&paths.instance, &paths.run).map_err(chained)?);
    let dialer = Arc::new(PlatformDialer::default());
    let config = ApiServerConfig {
        engine,
        dialer: dialer.clone(),
        data_dir: paths.server().join("clusters"),
        clock: RealClock::shared(),
    };
    let api = match &settings.keys_dir {
        Some(keys) => ApiServer::with_keys(config, keys.clone()),
        None => ApiServer::new(config),
    };

    let home = api
        .create_cluster(home_config(settings))
        .await
        .map_err(chained)
        .context("opening the home cluster")?;
    let listener = TcpListener::bind(settings.api_listen)
        .await
        .with_context(|| format!("listening at {}", settings.api_listen))?;
    let _serving = home.serve(listener);
    write_private(
        &paths.home_kubeconfig(),
        home.kubeconfig(HOME, "oaks-admin", &["system:masters"])
            .map_err(chained)?
            .as_bytes(),
    )?;
    write_private(
        &paths.host_kubeconfig(),
        home.kubeconfig(HOME, "oaks:host", &["system:masters"])
            .map_err(chained)?
            .as_bytes(),
    )?;

    let client = Client::local(home.local_service(UserInfo::new(PLATFORM_USER, ["system:masters"])));
    let informers = Informers::new(client.clone());
    dialer.set(InwardDialer::new(&informers, fabric.clone()));
    let planes = Arc::new(HostedControlPlanes::new(
        api.clone(),
        client.clone(),
        fabric,
        settings.clone(),
        shutdown.clone(),
    ));
    let access = serve_arm(settings, &home, &client, &informers, planes.clone(), shutdown.clone()).await?;
    let platform = {
        let (home, client, informers) = (home.clone(), client.clone(), informers.clone());
        let (planes, tenant) = (planes.clone(), access.tenant.clone());
        move |term: Shutdown| {
            start_controllers(&home, &client, &informers, term.clone());
            tokio::spawn(machines::hosts::run(client.clone(), informers.clone(), term.clone()));
            tokio::spawn(hosts::approve(client.clone(), informers.clone(), term.clone()));
            tokio::spawn(managed_cluster::run(managed_cluster::Config {
                home: client.clone(),
                informers: informers.clone(),
                control_planes: planes.clone(),
                tenant: tenant.clone(),
                clock: RealClock::shared(),
                shutdown: term.clone(),
            }));
            let planes = planes.clone();
            tokio::spawn(async move {
                // The next leader opens the hosted clusters' listeners.
                term.wait().await;
                planes.stop().await;
            });
        }
    };
    match &settings.etcd {
        // Other servers may use the same store: one of them runs the controllers.
        Some(_) => {
            let identity = format!("{}-{}", hostname(), uuid::Uuid::new_v4());
            let election = Election::new("kube-system", "oaks-server", identity);
            tokio::spawn(lead(
                client.clone(),
                election,
                RealClock::shared(),
                shutdown.clone(),
                platform,
            ));
        }
        None => platform(shutdown.clone()),
    }
    up::mark_ready(
        &paths.run,
        "server",
        &json!({"api": format!("https://{}", settings.api_listen), "arm": access.base_url}),
    )?;
    tracing::info!(api = %settings.api_listen, arm = %settings.arm_listen, "server ready");
    shutdown.wait().await;
    informers.stop().await;
    planes.stop().await;
    Ok(())
}

/// The store that the settings name: an etcd, or the data folder.
fn open_store(settings: &Settings) -> Result<Arc<dyn store::Engine>> {
    let paths = &settings.paths;
    let Some(etcd) = &settings.etcd else {
        std::fs::create_dir_all(paths.store()).with_context(|| format!("creating {}", paths.store().display()))?;
        let engine = store::LocalEngine::open(&paths.store())
            .map_err(chained)
            .context("opening the store")?;
        return Ok(engine);
    };
    let read = |path: &std::path::PathBuf| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    let identity = etcd
        .identity
        .as_ref()
        .map(|(c, k)| Ok::<_, anyhow::Error>((read(c)?, read(k)?)));
    let tls = match &etcd.cacert {
        Some(ca) => Some(store::EtcdTls {
            ca_pem: read(ca)?,
            identity_pem: identity.transpose()?,
        }),
        None => None,
    };
    let config = store::EtcdConfig {
        endpoints: etcd.endpoints.clone(),
        prefix: etcd.prefix.clone(),
        tls,
    };
    let writer = uuid::Uuid::new_v4().as_u64_pair().0;
    let engine = store::EtcdEngine::open(&config, writer)
        .map_err(chained)
        .with_context(|| {
            format!(
                "opening the store in etcd at {} (does it run?)",
                etcd.endpoints.join(", ")
            )
        })?;
    Ok(engine)
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Name under which loopback is reached; an unspecified listen address is reached there too.
fn reachable(listen: SocketAddr) -> String {
    if listen.ip().is_unspecified() {
        format!("127.0.0.1:{}", listen.port())
    } else {
        listen.to_string()
    }
}

fn home_config(settings: &Settings) -> ClusterConfig {
    let mut config = ClusterConfig::new(HOME, format!("https://{}", reachable(settings.api_listen)));
    config.service_cidr = HOME_SERVICE_CIDR.to_owned();
    config.dns_service_ip = None;
    config.extra_kinds = resources::kind_defs();
    config.cert_sans = vec!["localhost".to_owned(), settings.api_listen.ip().to_string()];
    config.audit = audit_of(settings, HOME);
    config
}

/// How a cluster is audited, if it is.
pub fn audit_of(settings: &Settings, cluster: &str) -> Option<AuditConfig> {
    let (_, policy) = settings.audit_policy.as_ref()?;
    Some(AuditConfig {
        policy: policy.clone(),
        log: LogConfig::new(settings.paths.audit_log(cluster)),
    })
}

/// The built-in controllers of one cluster.
pub fn start_controllers(cluster: &Arc<Cluster>, client: &Client, informers: &Informers, shutdown: Shutdown) {
    let config = controllers::ControllerConfig {
        cluster_ca_pem: cluster.ca_pem().to_owned(),
        signer: Some(Arc::new(crate::signer::ClusterSigner(cluster.clone()))),
        ..Default::default()
    };
    tokio::spawn(controllers::run_all(
        client.clone().with_user_agent("kube-controller-manager"),
        informers.clone(),
        config,
        shutdown,
    ));
}

async fn serve_arm(
    settings: &Settings,
    home: &Cluster,
    client: &Client,
    informers: &Informers,
    planes: Arc<HostedControlPlanes>,
    shutdown: Shutdown,
) -> Result<ArmAccess> {
    let paths = &settings.paths;
    let base_url = format!("https://{}", reachable(settings.arm_listen));
    // Ids and the secret outlive restarts: az profiles and kubeconfigs name them.
    let access = match ArmAccess::read(paths) {
        Ok(old) => ArmAccess {
            base_url: base_url.clone(),
            ca_pem: home.ca_pem().to_owned(),
            ..old
        },
        Err(_) => ArmAccess {
            base_url: base_url.clone(),
            ca_pem: home.ca_pem().to_owned(),
            tenant: uuid::Uuid::new_v4().to_string(),
            subscription: uuid::Uuid::new_v4().to_string(),
            client_id: uuid::Uuid::new_v4().to_string(),
            client_secret: secret()?,
        },
    };
    let sans = vec![
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
        settings.arm_listen.ip().to_string(),
    ];
    let (cert_pem, key_pem) = home
        .issue_serving_cert("oaks arm", &sans, Duration::from_secs(365 * 24 * 3600))
        .map_err(chained)?;
    let listener = TcpListener::bind(settings.arm_listen)
        .await
        .with_context(|| format!("listening at {}", settings.arm_listen))?;
    arm::serve(arm::ArmConfig {
        home: client.clone(),
        informers: informers.clone(),
        listener,
        tls: arm::TlsSource::Given { cert_pem, key_pem },
        identity: arm::Identity {
            base_url,
            subscription: access.subscription.clone(),
            subscription_name: "Oaks".to_owned(),
            service_principal: arm::ServicePrincipal {
                tenant: access.tenant.clone(),
                client_id: access.client_id.clone(),
                client_secret: access.client_secret.clone(),
            },
        },
        public_pool: Some(settings.public_pool.into()),
        service_tags: settings.service_tags.clone().with_cloud([settings.public_pool]),
        actions: Arc::new(Credentials(planes)),
        clock: RealClock::shared(),
        shutdown,
    })
    .await
    .map_err(chained)
    .context("starting ARM")?;
    access.write(&paths.arm_access())?;
    Ok(access)
}

/// 32 random bytes as text.
fn secret() -> Result<String> {
    use base64::Engine as _;
    use ring::rand::SecureRandom as _;
    let mut bytes = [0_u8; 32];
    ring::rand::SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| anyhow::anyhow!("the system gives no random bytes"))?;
    Ok(base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes))
}

/// SIGTERM and SIGINT ask for an orderly end.
pub fn stop_on_signal(shutdown: Shutdown) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        // recv() is cancel safe: a signal that is not received stays pending.
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        shutdown.trigger();
    });
    Ok(())
}

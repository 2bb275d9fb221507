//! The loop: informers to plan to kernel, and to the DNS zone.
//!
//! Any change marks the world as dirty; after a short quiet time everything is planned anew and applied as one
//! transaction, which is empty if nothing that matters changed. Rules stay when the loop ends, so traffic goes on while
//! the process is replaced; [`remove`] takes them away.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use parking_lot::RwLock;
use reconcile::{Informer, Informers};
use stdx::{Shutdown, TaskGroup};
use thiserror::Error;
use tokio::sync::Notify;

use crate::{
    dns::{
        Server, ServerConfig, Zone,
        server::{Sockets, UPSTREAM_WAIT},
    },
    executor::{Executor, ExecutorError, own_address},
    plan::{PlanConfig, Scope, plan},
    world::World,
};

/// Changes come in bursts (a rollout touches a slice several times); this is how long one is waited for.
const QUIET: Duration = Duration::from_millis(20);
/// How often the kernel's table is compared with the plan although nothing changed.
const VERIFY_EVERY: Duration = Duration::from_secs(30);
/// For tasks to end after the shutdown.
const STOP_PATIENCE: Duration = Duration::from_secs(1);
/// After a failed application.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Where the proxy stands.
#[derive(Clone, Debug)]
pub enum Mode {
    /// In a machine: all traffic, ClusterIP, NodePort; DNS is bound to the service address itself, which is put on `lo`.
    Machine,
    /// In a VNet's namespace, for the container groups of one cluster: packets with `mark` only. The VNet leads the
    /// groups' DNS queries to `dns_listen`, an address of that namespace.
    Group { mark: u32, dns_listen: SocketAddrV4 },
}

#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// Of the cluster whose Services these are.
    pub informers: Informers,
    /// Path of a pinned namespace; `None` = the process's own.
    pub netns: Option<PathBuf>,
    /// Decides which endpoints are local.
    pub node_name: String,
    /// The cluster's DNS address; `None`: no DNS is served.
    pub dns_ip: Option<Ipv4Addr>,
    /// `cluster.local`.
    pub domain: String,
    pub mode: Mode,
    /// Resolver for all other names; in a VNet 168.63.129.16:53. `None`: they fail.
    pub upstream_dns: Option<SocketAddr>,
    /// Ends the loop.
    pub shutdown: Shutdown,
}

impl Mode {
    /// Name of the nftables table, unique within a namespace.
    pub fn table(&self) -> String {
        match self {
            Self::Machine => "oaks-services".to_owned(),
            Self::Group { mark, .. } => format!("oaks-services-{mark}"),
        }
    }
}

#[derive(Debug, Error)]
pub enum RunError {
    #[error("preparing the Service rules")]
    Executor {
        #[source]
        source: ExecutorError,
    },
    #[error("binding the cluster DNS to {address}")]
    Bind {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
}

/// Serves until the configuration's `shutdown`. Fails only before it serves: bad namespace, occupied DNS address, no permission.
pub async fn run(config: ProxyConfig) -> Result<(), RunError> {
    let shutdown = config.shutdown.clone();
    let table_name = config.mode.table();
    let mut executor = Executor::open(config.netns.as_ref()).map_err(|source| RunError::Executor { source })?;
    let zone = Arc::new(RwLock::new(Arc::new(Zone::unknown(&config.domain))));
    let tasks = TaskGroup::new(&shutdown);

    let services: Informer<Service> = config.informers.get();
    let slices: Informer<EndpointSlice> = config.informers.get();
    let dirty = Arc::new(Notify::new());
    let wake = |dirty: &Arc<Notify>| {
        let dirty = dirty.clone();
        move |_: &reconcile::Change| dirty.notify_one()
    };
    services.on_change(wake(&dirty));
    slices.on_change(wake(&dirty));

    // Foreign names are answered from now on; the cluster's own when they are known.
    if let Some(ip) = config.dns_ip {
        let server = bind(&config, ip, zone.clone())?;
        tasks.spawn("cluster DNS", server.run(tasks.shutdown().clone()));
    }
    // Rules of a former process stand until the world is known again: an empty plan would cut off everything.
    if shutdown
        .or_stop(async { tokio::join!(services.wait_synced(), slices.wait_synced()) })
        .await
        .is_none()
    {
        tasks.stop(STOP_PATIENCE).await;
        return Ok(());
    }

    let plan_config = PlanConfig {
        table: table_name.clone(),
        scope: match config.mode {
            Mode::Machine => Scope::Machine,
            Mode::Group { mark, .. } => Scope::Mark(mark),
        },
        dns_ip: config.dns_ip,
    };
    let mut wait = VERIFY_EVERY;
    loop {
        let world = fill(&config, &services, &slices, &zone);
        let table = plan(&world, &plan_config);
        // Netlink blocks for milliseconds.
        let outcome = tokio::task::spawn_blocking(move || {
            let outcome = executor
                .apply(table)
                .and_then(|change| Ok((change, executor.verify()?)));
            (executor, outcome)
        })
        .await;
        match outcome {
            Ok((back, outcome)) => {
                executor = back;
                wait = match outcome {
                    Ok((change, restored)) => {
                        tracing::debug!(table = table_name, ?change, ?restored, "Service rules are in place");
                        VERIFY_EVERY
                    }
                    Err(error) => {
                        tracing::error!(table = table_name, reason = %stdx::chain(&error), "applying Service rules failed");
                        RETRY_AFTER
                    }
                };
            }
            // The blocking task ends only with a bug or with the runtime.
            Err(error) => {
                tracing::error!(table = table_name, %error, "applying Service rules was cut short");
                executor = Executor::open(config.netns.as_ref()).map_err(|source| RunError::Executor { source })?;
                wait = RETRY_AFTER.min(wait);
            }
        }
        let changed = async {
            // Cancel safe: an unfinished wait loses no notification.
            if tokio::time::timeout(wait, dirty.notified()).await.is_ok() {
                tokio::time::sleep(QUIET).await;
            }
        };
        if shutdown.or_stop(changed).await.is_none() {
            break;
        }
    }
    tasks.stop(STOP_PATIENCE).await;
    Ok(())
}

/// Takes the rules away; success if there are none. For the end of a cluster's use of a namespace.
pub fn remove(netns: Option<&PathBuf>, mode: &Mode) -> Result<(), ExecutorError> {
    Executor::open(netns)?.remove(&mode.table())
}

fn fill(
    config: &ProxyConfig,
    services: &Informer<Service>,
    slices: &Informer<EndpointSlice>,
    zone: &RwLock<Arc<Zone>>,
) -> World {
    let world = World::new(&services.list(), &slices.list(), &config.node_name);
    *zone.write() = Arc::new(Zone::new(&config.domain, &world));
    world
}

fn bind(config: &ProxyConfig, ip: Ipv4Addr, zone: Arc<RwLock<Arc<Zone>>>) -> Result<Server, RunError> {
    let address = match config.mode {
        Mode::Machine => {
            own_address(config.netns.as_ref(), ip).map_err(|source| RunError::Executor { source })?;
            SocketAddr::from((ip, 53))
        }
        Mode::Group { dns_listen, .. } => SocketAddr::V4(dns_listen),
    };
    let sockets = Sockets {
        netns: config.netns.clone(),
    };
    let fail = |source| RunError::Bind { address, source };
    let udp = sockets.udp(address).map_err(fail)?;
    let tcp = sockets.tcp(address).map_err(fail)?;
    Ok(Server::new(
        ServerConfig {
            udp,
            tcp,
            sockets,
            upstream: config.upstream_dns,
            upstream_wait: UPSTREAM_WAIT,
        },
        zone,
    ))
}

//! The network task: whenever an object that decides the network changes, plan everything and apply what differs.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use reconcile::{Informer, Informers, Kind};
use resources::{
    Host, LoadBalancer, Machine, ManagedCluster, NatGateway, NetworkInterface, NetworkSecurityGroup, PrivateDnsZone,
    PublicIPAddress, PublicIPPrefix, RouteTable, Site, VirtualNetwork, VirtualNode,
};
use stdx::Shutdown;
use tokio::sync::{Notify, watch};
use vnet_model::fabric::{EdgeSpec, FabricSpec, SpecError};

use super::{
    AgentConfig, AgentError, Here, hosts,
    machine::blocking,
    plan::{self, World},
    sites,
};

/// After a failed apply: when to try again without a change.
const RETRY: Duration = Duration::from_secs(1);
/// Even without a change the kernel is compared with the plan this often.
const RESYNC: Duration = Duration::from_secs(60);
/// How long a NIC may take from its object to the data plane.
const NIC_TIMEOUT: Duration = Duration::from_secs(20);

/// Keys of the NICs that the data plane holds.
type Applied = Arc<BTreeSet<String>>;

/// Handle to the running task.
#[derive(Clone)]
pub struct Network {
    applied: watch::Receiver<Option<Applied>>,
}

struct Watched {
    vnets: Informer<VirtualNetwork>,
    nics: Informer<NetworkInterface>,
    public_ips: Informer<PublicIPAddress>,
    load_balancers: Informer<LoadBalancer>,
    security_groups: Informer<NetworkSecurityGroup>,
    route_tables: Informer<RouteTable>,
    nat_gateways: Informer<NatGateway>,
    public_ip_prefixes: Informer<PublicIPPrefix>,
    machines: Informer<Machine>,
    hosts: Informer<Host>,
    sites: Informer<Site>,
    virtual_nodes: Informer<VirtualNode>,
    private_zones: Informer<PrivateDnsZone>,
    clusters: Informer<ManagedCluster>,
}

impl Network {
    /// Starts the task; returns after the first successful apply.
    pub async fn start(config: AgentConfig, shutdown: Shutdown) -> Result<Self, AgentError> {
        let changed = Arc::new(Notify::new());
        let watched = Watched::open(&config.informers, &changed).await;
        let (sender, mut applied) = watch::channel(None);
        let (notes, left_out) = watch::channel(Vec::new());
        let first = apply(&config, &watched, &notes).await?;
        if config.here.primary {
            tokio::spawn(sites::run(config.clone(), left_out, shutdown.clone()));
        }
        sender.send_replace(Some(first));
        applied.mark_unchanged();
        tokio::spawn(run(config, watched, changed, (sender, notes), shutdown));
        Ok(Self { applied })
    }

    /// Returns once the data plane holds the NIC.
    pub async fn ready_for(&self, nic: &str) -> Result<(), AgentError> {
        let mut applied = self.applied.clone();
        let wait = applied.wait_for(|a| a.as_ref().is_some_and(|keys| keys.contains(nic)));
        match tokio::time::timeout(NIC_TIMEOUT, wait).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(AgentError::NotApplied {
                nic: nic.to_owned(),
                seconds: NIC_TIMEOUT.as_secs(),
            }),
        }
    }
}

impl Watched {
    /// Opens the informers and waits until each has listed its objects; `changed` is told of every change.
    async fn open(informers: &Informers, changed: &Arc<Notify>) -> Self {
        Self {
            vnets: open(informers, changed).await,
            nics: open(informers, changed).await,
            public_ips: open(informers, changed).await,
            load_balancers: open(informers, changed).await,
            security_groups: open(informers, changed).await,
            route_tables: open(informers, changed).await,
            nat_gateways: open(informers, changed).await,
            public_ip_prefixes: open(informers, changed).await,
            machines: open(informers, changed).await,
            hosts: open(informers, changed).await,
            sites: open(informers, changed).await,
            virtual_nodes: open(informers, changed).await,
            private_zones: open(informers, changed).await,
            clusters: open(informers, changed).await,
        }
    }

    fn world(&self) -> World {
        World {
            vnets: owned(&self.vnets),
            nics: owned(&self.nics),
            public_ips: owned(&self.public_ips),
            load_balancers: owned(&self.load_balancers),
            security_groups: owned(&self.security_groups),
            route_tables: owned(&self.route_tables),
            nat_gateways: owned(&self.nat_gateways),
            public_ip_prefixes: owned(&self.public_ip_prefixes),
            machines: owned(&self.machines),
            hosts: owned(&self.hosts),
            sites: owned(&self.sites),
            virtual_nodes: owned(&self.virtual_nodes),
            private_zones: owned(&self.private_zones),
            clusters: owned(&self.clusters),
        }
    }
}

/// What the objects in home want of this host now, as the agent would apply it. Waits until home answers.
pub async fn wanted(informers: &Informers, instance: &str, edge: &EdgeSpec, here: &Here) -> FabricSpec {
    let watched = Watched::open(informers, &Arc::new(Notify::new())).await;
    spec_of(&watched.world(), instance, edge, here).0
}

/// The specification, and what had to be left out of it.
fn spec_of(world: &World, instance: &str, edge: &EdgeSpec, here: &Here) -> (FabricSpec, Vec<String>) {
    let mut plan = plan::plan(world, instance, edge);
    sites::add(&world.sites, &mut plan.spec.vnets, &mut plan.notes);
    hosts::split(&mut plan.spec, world, here);
    for note in &plan.notes {
        tracing::debug!(controller = "network", note, "left out of the plan");
    }
    // One object's mistake must not stop the others' network.
    let (spec, mistakes) = plan.spec.without_mistakes();
    for mistake in &mistakes {
        tracing::warn!(controller = "network", reason = %stdx::chain(mistake), "left out of the network");
    }
    // Whoever tells people why something is not there listens.
    let left_out = plan
        .notes
        .into_iter()
        .chain(mistakes.iter().filter_map(about_site))
        .collect();
    (spec, left_out)
}

async fn open<K: Kind>(informers: &Informers, changed: &Arc<Notify>) -> Informer<K> {
    let informer = informers.get::<K>();
    informer.wait_synced().await;
    let changed = changed.clone();
    informer.on_change(move |_| changed.notify_one());
    informer
}

async fn run(
    config: AgentConfig,
    watched: Watched,
    changed: Arc<Notify>,
    (applied, notes): (watch::Sender<Option<Applied>>, watch::Sender<Vec<String>>),
    shutdown: Shutdown,
) {
    let mut wait = RESYNC;
    loop {
        // Both branches only wake the loop, which looks at everything: nothing is lost by cancelling either.
        tokio::select! {
            () = changed.notified() => {}
            () = config.fabric.health_changed() => {}
            // What others changed in the kernel meanwhile is found only by comparing everything.
            () = tokio::time::sleep(wait) => config.fabric.distrust(),
            () = shutdown.wait() => return,
        }
        wait = match apply(&config, &watched, &notes).await {
            Ok(keys) => {
                applied.send_replace(Some(keys));
                RESYNC
            }
            Err(e) => {
                tracing::warn!(controller = "network", reason = %stdx::chain(&e), "the network is not as wanted yet");
                RETRY
            }
        };
    }
}

async fn apply(
    config: &AgentConfig,
    watched: &Watched,
    notes: &watch::Sender<Vec<String>>,
) -> Result<Applied, AgentError> {
    let (spec, left_out) = spec_of(&watched.world(), &config.instance, &config.edge, &config.here);
    notes.send_if_modified(|now| {
        let changed = *now != left_out;
        *now = left_out;
        changed
    });
    let keys: BTreeSet<String> = spec
        .vnets
        .iter()
        .flat_map(|v| v.nics_here().map(|n| n.key.clone()))
        .collect();
    let fabric = config.fabric.clone();
    blocking("applying the network", move || {
        fabric.apply(&spec).map_err(|source| AgentError::Fabric { source })
    })
    .await?;
    Ok(Arc::new(keys))
}

/// A mistake of a site as a note.
fn about_site(mistake: &SpecError) -> Option<String> {
    match mistake {
        SpecError::Site { site, reason, .. } => Some(format!("Site {site}: {reason}")),
        _ => None,
    }
}

fn owned<K: Kind + Clone>(informer: &Informer<K>) -> Vec<K> {
    informer.list().iter().map(|k| (**k).clone()).collect()
}

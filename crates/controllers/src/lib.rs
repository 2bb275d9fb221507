//! The built-in controllers of a cluster, one folder each: `mod.rs` watches and acts, `plan.rs` decides and is pure.
//!
//! Every controller works from state: it reads the informers, computes what is missing, and writes with uid or
//! resourceVersion preconditions. A restart, a lost event and a second run are the same code path. One process runs one
//! set of controllers per cluster, so there are no leader leases.

pub mod certificates;
pub mod clusterroles;
pub mod common;
pub mod cronjob;
pub mod daemonset;
pub mod deployment;
pub mod disruption;
pub mod endpoints;
pub mod gc;
pub mod history;
pub mod ipaddress;
pub mod job;
pub mod mirroring;
pub mod namespace;
pub mod nodelifecycle;
pub mod podgc;
pub mod quota;
pub mod replicaset;
pub mod serviceaccount;
pub mod servicecidr;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use reconcile::discovery::Served;
use reconcile::{Client, Informers, Recorder, ResourceId};
use stdx::{BackoffPolicy, RealClock, Rng, SharedClock, Shutdown};
use tokio::sync::watch;

/// Delay between attempts to learn what the server serves.
const DISCOVERY_RETRY: BackoffPolicy = BackoffPolicy::doubling(Duration::from_millis(50), Duration::from_secs(5));

/// What the controllers need to know about their cluster.
#[derive(Clone)]
pub struct ControllerConfig {
    /// The CA that signed the API server's certificate, PEM; published as `kube-root-ca.crt` in every namespace. Empty:
    /// nothing is published.
    pub cluster_ca_pem: String,
    /// Signs certificate requests. Absent: they are left alone.
    pub signer: Option<Arc<dyn certificates::Signer>>,
    /// A node whose lease was not renewed for this long is unreachable.
    pub node_grace: Duration,
    /// Pods of a node that is gone for this long are deleted.
    pub node_gone_grace: Duration,
    /// The clock for conditions, events and deadlines.
    pub clock: SharedClock,
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            cluster_ca_pem: String::new(),
            signer: None,
            node_grace: Duration::from_secs(40),
            node_gone_grace: Duration::from_secs(40),
            clock: RealClock::shared(),
        }
    }
}

/// What every controller gets.
#[derive(Clone)]
pub(crate) struct Context {
    pub client: Client,
    pub informers: Informers,
    pub config: Arc<ControllerConfig>,
    /// The event writer; each controller records under its own name.
    pub recorder: Recorder,
    /// What the server serves, with verbs; changes with the CustomResourceDefinitions.
    pub discovery: watch::Receiver<Arc<Vec<Served>>>,
    pub shutdown: Shutdown,
}

impl Context {
    /// What the server serves now.
    fn served(&self) -> Arc<Vec<Served>> {
        self.discovery.borrow().clone()
    }

    fn now(&self) -> k8s_openapi::jiff::Timestamp {
        apimachinery::time::now(&*self.config.clock)
    }
}

/// Runs all controllers whose kinds the server serves, until `shutdown`; returns when all have ended.
pub async fn run_all(client: Client, informers: Informers, config: ControllerConfig, shutdown: Shutdown) {
    let Some(served) = discover(&client, &shutdown).await else {
        return;
    };
    let recorder = Recorder::new(
        client.clone(),
        "controllers",
        "",
        config.clock.clone(),
        shutdown.clone(),
    );
    let plurals: HashSet<&str> = served.iter().map(|s| s.resource.plural.as_str()).collect();
    let has = |all: &[&str]| all.iter().all(|plural| plurals.contains(plural));
    let mut tasks = tokio::task::JoinSet::new();
    let (sender, discovery) = watch::channel(Arc::new(served.clone()));
    let context = Context {
        client,
        informers,
        config: Arc::new(config),
        recorder,
        discovery,
        shutdown: shutdown.clone(),
    };
    if has(&["customresourcedefinitions"]) {
        tasks.spawn(follow_discovery(context.clone(), sender));
    }
    if has(&["replicasets", "pods"]) {
        tasks.spawn(replicaset::run(context.clone()));
        if has(&["deployments"]) {
            tasks.spawn(deployment::run(context.clone()));
        }
    }
    if has(&["daemonsets", "controllerrevisions", "pods", "nodes"]) {
        tasks.spawn(daemonset::run(context.clone()));
    }
    if has(&["poddisruptionbudgets", "pods", "replicasets", "deployments"]) {
        tasks.spawn(disruption::run(context.clone()));
    }
    if has(&["cronjobs", "jobs"]) {
        tasks.spawn(cronjob::run(context.clone()));
    }
    if has(&["jobs", "pods"]) {
        tasks.spawn(job::run(context.clone()));
    }
    if has(&["services", "pods", "nodes"]) {
        if has(&["endpointslices"]) {
            tasks.spawn(endpoints::run_slices(context.clone()));
        }
        if has(&["endpoints"]) {
            tasks.spawn(endpoints::run_endpoints(context.clone()));
        }
    }
    if has(&["namespaces"]) {
        tasks.spawn(namespace::run(context.clone()));
        if has(&["serviceaccounts", "configmaps"]) {
            tasks.spawn(serviceaccount::run(context.clone()));
        }
    }
    if has(&["nodes", "pods"]) {
        if has(&["leases"]) {
            tasks.spawn(nodelifecycle::run(context.clone()));
        }
        tasks.spawn(podgc::run(context.clone()));
    }
    if has(&["endpoints", "endpointslices", "services"]) {
        tasks.spawn(mirroring::run(context.clone()));
    }
    if has(&["ipaddresses", "services"]) {
        tasks.spawn(ipaddress::run(context.clone()));
        if has(&["servicecidrs"]) {
            tasks.spawn(servicecidr::run(context.clone()));
        }
    }
    if let Some(signer) = context
        .config
        .signer
        .clone()
        .filter(|_| has(&["certificatesigningrequests"]))
    {
        tasks.spawn(certificates::run(context.clone(), signer));
    }
    if has(&["clusterroles"]) {
        tasks.spawn(clusterroles::run(context.clone()));
    }
    if has(&["resourcequotas"]) {
        tasks.spawn(quota::run(context.clone()));
    }
    tasks.spawn(gc::run(context.clone()));
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a controller ended by panic");
        }
    }
}

/// Asks anew what is served whenever a definition changed.
async fn follow_discovery(context: Context, served: watch::Sender<Arc<Vec<Served>>>) {
    let definitions = context.informers.get_dynamic(ResourceId {
        group: "apiextensions.k8s.io".into(),
        version: "v1".into(),
        plural: "customresourcedefinitions".into(),
        kind: "CustomResourceDefinition".into(),
        namespaced: false,
    });
    let changed = Arc::new(tokio::sync::Notify::new());
    let notify = changed.clone();
    definitions.on_change(move |_| notify.notify_one());
    // Many changes at once are asked about once; a definition is served before its change is seen here.
    while context.shutdown.or_stop(changed.notified()).await.is_some() {
        let Some(now) = discover(&context.client, &context.shutdown).await else {
            return;
        };
        served.send_if_modified(|before| {
            let new = **before != now;
            if new {
                *before = Arc::new(now);
            }
            new
        });
    }
}

async fn discover(client: &Client, shutdown: &Shutdown) -> Option<Vec<Served>> {
    let mut rng = Rng::from_entropy();
    let mut backoff = stdx::Backoff::new(DISCOVERY_RETRY);
    loop {
        match shutdown.or_stop(client.discover()).await? {
            Ok(served) => return Some(served),
            Err(error) => {
                tracing::warn!(error = %stdx::chain(&error), "cannot learn what the server serves yet");
                shutdown.or_stop(tokio::time::sleep(backoff.next(&mut rng))).await?;
            }
        }
    }
}

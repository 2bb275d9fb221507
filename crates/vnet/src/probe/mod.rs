//! Health probes of load balancers: one task per backend and probe asks from 168.63.129.16 inside the virtual network; a
//! backend that fails gets no new flows until it answers again.
//!
//! The state is of this process. Backends that are there when it starts count as healthy until their probe says
//! otherwise, so that a restart of the host agent stops no traffic; those that come later are out until they answer.
//! While nobody runs the probes every backend counts as healthy.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use vnet_model::fabric::{FabricSpec, ProbeKind, ProbeSpec};

mod ask;

/// The first question waits for the apply that asked for it, which may have to make the network first.
const FIRST_AFTER: Duration = Duration::from_millis(100);
/// How long an answer over HTTP may take; a connection alone has until the next question.
const HTTP_TIMEOUT: Duration = Duration::from_secs(30);

/// One backend as one probe sees it.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Target {
    /// Key of the virtual network.
    pub vnet: String,
    pub backend: Ipv4Addr,
    pub probe: ProbeSpec,
}

/// What a probe found last.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Health {
    pub target: Target,
    pub up: bool,
}

/// Every running probe.
#[derive(Default)]
pub struct Probes {
    runtime: Option<Handle>,
    /// Whether targets were started already in this process.
    started: bool,
    running: BTreeMap<Target, Running>,
    changed: Arc<Notify>,
}

struct Running {
    up: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Probes {
    pub fn run_on(&mut self, runtime: Handle) {
        self.runtime = Some(runtime);
    }

    /// Woken once after one or more backends changed sides.
    pub fn changed(&self) -> Arc<Notify> {
        self.changed.clone()
    }

    pub fn health(&self) -> Vec<Health> {
        let one = |(target, running): (&Target, &Running)| Health {
            target: target.clone(),
            up: running.up.load(Ordering::Relaxed),
        };
        self.running.iter().map(one).collect()
    }

    /// Starts what `spec` asks for and stops the rest; `pin` tells a virtual network's namespace.
    pub fn follow(&mut self, spec: &FabricSpec, pin: impl Fn(&str) -> PathBuf) {
        let Some(runtime) = &self.runtime else { return };
        let wanted = targets(spec);
        self.running.retain(|target, _| wanted.contains(target));
        for target in wanted {
            if self.running.contains_key(&target) {
                continue;
            }
            let up = Arc::new(AtomicBool::new(!self.started));
            let task = watch(pin(&target.vnet), target.clone(), up.clone(), self.changed.clone());
            let task = runtime.spawn(task);
            self.running.insert(target, Running { up, task });
        }
        self.started = true;
    }

    /// The spec without the backends that are down.
    pub fn healthy<'a>(&self, spec: &'a FabricSpec) -> Cow<'a, FabricSpec> {
        let down: BTreeSet<&Target> = self
            .running
            .iter()
            .filter(|(_, r)| !r.up.load(Ordering::Relaxed))
            .map(|(t, _)| t)
            .collect();
        if down.is_empty() {
            return Cow::Borrowed(spec);
        }
        let mut spec = spec.clone();
        for vnet in &mut spec.vnets {
            for frontend in &mut vnet.frontends {
                let Some(probe) = &frontend.probe else { continue };
                let is_down = |backend| {
                    let (vnet, probe) = (vnet.key.clone(), probe.clone());
                    down.contains(&Target { vnet, backend, probe })
                };
                frontend.backends.retain(|b| !is_down(b.address));
            }
        }
        Cow::Owned(spec)
    }
}

fn targets(spec: &FabricSpec) -> BTreeSet<Target> {
    let mut out = BTreeSet::new();
    for vnet in &spec.vnets {
        for frontend in &vnet.frontends {
            let Some(probe) = &frontend.probe else { continue };
            out.extend(frontend.backends.iter().map(|b| Target {
                vnet: vnet.key.clone(),
                backend: b.address,
                probe: probe.clone(),
            }));
        }
    }
    out
}

/// Asks for ever; `up` changes sides after as many equal answers in a row as the probe's threshold says.
async fn watch(netns: PathBuf, target: Target, up: Arc<AtomicBool>, changed: Arc<Notify>) {
    let every = Duration::from_millis(target.probe.interval_ms.into());
    let mut ticks = interval_at(Instant::now() + every.min(FIRST_AFTER), every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut streak = 0;
    loop {
        ticks.tick().await;
        let answered = answers(&netns, &target, every).await;
        if answered == up.load(Ordering::Relaxed) {
            streak = 0;
            continue;
        }
        streak += 1;
        if streak < target.probe.threshold {
            continue;
        }
        streak = 0;
        up.store(answered, Ordering::Relaxed);
        let Target { vnet, backend, probe } = &target;
        tracing::info!(vnet, %backend, port = probe.port, up = answered, "a load balancer's backend changed sides");
        changed.notify_one();
    }
}

async fn answers(netns: &Path, target: &Target, every: Duration) -> bool {
    let to = SocketAddr::from((target.backend, target.probe.port));
    let asked = async {
        match &target.probe.kind {
            ProbeKind::Tcp => ask::connect(netns, to).await.map(|_| true),
            ProbeKind::Http { path } => ask::http(netns, to, path).await,
            ProbeKind::Https { path } => ask::https(netns, to, path).await,
        }
    };
    let limit = match target.probe.kind {
        ProbeKind::Tcp => every,
        ProbeKind::Http { .. } | ProbeKind::Https { .. } => HTTP_TIMEOUT,
    };
    matches!(timeout(limit, asked).await, Ok(Ok(true)))
}

//! Liveness, readiness and startup probes of one running container: one task, verdicts as they change.
//!
//! Upstream's schedule, with one addition: until a readiness or startup probe (httpGet or tcpSocket) has succeeded once,
//! it is also tried in between, soon at first and then rarer, up to its period. Such early tries can only find success;
//! their failures are not counted and raise no event. So an application is ready when it answers, not at the next period.

use std::{net::IpAddr, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Probe;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    events::Level,
    http::{self, Target},
    kubelet::Core,
    pod::{
        plan::Probed,
        view::{Member, PodView},
    },
};

/// First early try; each further one waits twice as long.
const EARLY_MS: u64 = 15;

/// One container under probes.
pub struct Probing {
    pub core: Arc<Core>,
    pub view: Arc<PodView>,
    pub member: Member,
    pub container_id: String,
    pub sandbox_id: String,
    pub pod_ip: Option<IpAddr>,
    /// Verdict so far (an adopted container starts with what its status says).
    pub first: Probed,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Startup,
    Liveness,
    Readiness,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

impl Probing {
    /// Whether there is anything to probe.
    pub fn needed(m: &Member) -> bool {
        m.container.startup_probe.is_some()
            || m.container.liveness_probe.is_some()
            || m.container.readiness_probe.is_some()
    }

    /// Sends `(container id, verdict)` for every change until the container is to be killed or the task is dropped.
    pub async fn run(self, verdicts: mpsc::Sender<(String, Probed)>) {
        let mut now = self.first.clone();
        let born = Instant::now();
        if !now.started
            && let Some(p) = &self.member.container.startup_probe
        {
            match self.until_first(What::Startup, p, born).await {
                Ok(()) => {
                    now.started = true;
                    now.ready = self.member.container.readiness_probe.is_none();
                    let _ = verdicts.send((self.container_id.clone(), now.clone())).await;
                }
                Err(why) => {
                    now.kill = Some((why, grace(p)));
                    let _ = verdicts.send((self.container_id.clone(), now)).await;
                    return;
                }
            }
        }
        let (change_tx, mut change_rx) = mpsc::channel(4);
        let was_ready = now.ready;
        let live = async {
            match &self.member.container.liveness_probe {
                Some(p) => {
                    let why = self.liveness(p, born).await;
                    let _ = change_tx.send(Change::Kill(why, grace(p))).await;
                    std::future::pending::<()>().await
                }
                None => std::future::pending().await,
            }
        };
        let ready = async {
            match &self.member.container.readiness_probe {
                Some(p) => self.readiness(p, born, was_ready, &change_tx).await,
                None => std::future::pending().await,
            }
        };
        let fold = async {
            while let Some(change) = change_rx.recv().await {
                match change {
                    Change::Ready(r) => now.ready = r,
                    Change::Kill(why, grace) => now.kill = Some((why, grace)),
                }
                if verdicts.send((self.container_id.clone(), now.clone())).await.is_err() || now.kill.is_some() {
                    return;
                }
            }
        };
        tokio::select! {
            // Probes hold nothing that must be finished.
            () = live => {}
            () = ready => {}
            () = fold => {}
        }
    }

    /// Tries until the first success; the reason after too many failures.
    async fn until_first(&self, what: What, p: &Probe, born: Instant) -> Result<(), String> {
        let mut failures = 0;
        let mut regular = born + secs(p.initial_delay_seconds, 0);
        loop {
            if self.early(p, regular).await {
                return Ok(());
            }
            sleep_until(regular).await;
            regular = Instant::now() + secs(p.period_seconds, 10);
            match self.once(p).await {
                Ok(()) => return Ok(()),
                Err(why) => {
                    failures += 1;
                    self.unhealthy(what, &why);
                    if failures >= p.failure_threshold.unwrap_or(3).max(1) {
                        return Err(format!("failed {} probe", what.name().to_lowercase()));
                    }
                }
            }
        }
    }

    async fn liveness(&self, p: &Probe, born: Instant) -> String {
        let mut failures = 0;
        sleep_until(born + secs(p.initial_delay_seconds, 0)).await;
        loop {
            match self.once(p).await {
                Ok(()) => failures = 0,
                Err(why) => {
                    failures += 1;
                    self.unhealthy(What::Liveness, &why);
                    if failures >= p.failure_threshold.unwrap_or(3).max(1) {
                        return "failed liveness probe".into();
                    }
                }
            }
            sleep(secs(p.period_seconds, 10)).await;
        }
    }

    async fn readiness(&self, p: &Probe, born: Instant, mut ready: bool, change: &mpsc::Sender<Change>) {
        let (mut failures, mut successes) = (0, 0);
        let mut regular = born + secs(p.initial_delay_seconds, 0);
        let threshold = p.success_threshold.unwrap_or(1).max(1);
        loop {
            let early = !ready && threshold == 1 && self.early(p, regular).await;
            let answer = if early {
                Ok(())
            } else {
                sleep_until(regular).await;
                self.once(p).await
            };
            regular = Instant::now() + secs(p.period_seconds, 10);
            let before = ready;
            match answer {
                Ok(()) => {
                    successes += 1;
                    failures = 0;
                    ready |= successes >= threshold;
                }
                Err(why) => {
                    failures += 1;
                    successes = 0;
                    self.unhealthy(What::Readiness, &why);
                    ready &= failures < p.failure_threshold.unwrap_or(3).max(1);
                }
            }
            if ready != before && change.send(Change::Ready(ready)).await.is_err() {
                return;
            }
        }
    }

    /// Early tries before the regular one; true on success. Nothing before the initial delay, nothing for exec probes.
    async fn early(&self, p: &Probe, regular: Instant) -> bool {
        if p.exec.is_some() || p.initial_delay_seconds.unwrap_or(0) > 0 {
            return false;
        }
        let mut wait = Duration::from_millis(EARLY_MS);
        while Instant::now() + wait < regular {
            sleep(wait).await;
            wait *= 2;
            if self.once(p).await.is_ok() {
                return true;
            }
        }
        false
    }

    fn unhealthy(&self, what: What, why: &str) {
        let message = format!("{} probe failed: {why}", what.name());
        self.core.events.pod(
            &self.view,
            Some(self.member.name()),
            Level::Warning,
            "Unhealthy",
            message,
        );
    }

    async fn once(&self, p: &Probe) -> Result<(), String> {
        let limit = secs(p.timeout_seconds, 1);
        let work = async {
            if let Some(e) = &p.exec {
                let argv = e.command.clone().unwrap_or_default();
                let ms = u64::try_from(limit.as_millis()).unwrap_or(1000);
                return match self.core.config.runtime.exec_sync(&self.container_id, argv, ms).await {
                    Ok((0, ..)) => Ok(()),
                    Ok((_, out, err)) => Err(format!(
                        "{}{}",
                        String::from_utf8_lossy(&out),
                        String::from_utf8_lossy(&err)
                    )),
                    Err(e) => Err(stdx::chain(&e).to_string()),
                };
            }
            let pod_ip = self.pod_ip.ok_or_else(|| "the pod has no address".to_owned())?;
            let dialer = self.core.config.dialer.as_ref();
            let target = Target {
                dialer,
                sandbox_id: &self.sandbox_id,
                pod_ip,
            };
            if let Some(g) = &p.http_get {
                return match http::get(&target, g, &self.member.container, "kube-probe/1.36").await {
                    Ok((200..=399, _)) => Ok(()),
                    Ok((code, _)) => Err(format!("HTTP probe failed with statuscode: {code}")),
                    Err(e) => Err(stdx::chain(&e).to_string()),
                };
            }
            if let Some(t) = &p.tcp_socket {
                let port = http::port(&t.port, &self.member.container).map_err(|e| e.to_string())?;
                let dialled = match t.host.as_deref().filter(|h| !h.is_empty()) {
                    Some(host) => tokio::net::TcpStream::connect((host, port)).await,
                    None => dialer.dial(&self.sandbox_id, (pod_ip, port).into()).await,
                };
                return dialled.map(drop).map_err(|e| format!("dial tcp {pod_ip}:{port}: {e}"));
            }
            Err("the probe has no handler".into())
        };
        // An exec is bounded by the runtime; the margin lets its own answer win.
        let limit = if p.exec.is_some() {
            limit + Duration::from_secs(1)
        } else {
            limit
        };
        match timeout(limit, work).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("context deadline exceeded after {}s", limit.as_secs())),
        }
    }
}

enum Change {
    Ready(bool),
    Kill(String, Option<u64>),
}

fn grace(p: &Probe) -> Option<u64> {
    p.termination_grace_period_seconds.and_then(|s| u64::try_from(s).ok())
}

fn secs(v: Option<i32>, default: u64) -> Duration {
    // 0 stands for the default where the API server has not set it; an initial delay of 0 is 0.
    let v = v
        .and_then(|v| u64::try_from(v).ok())
        .filter(|v| *v > 0)
        .unwrap_or(default);
    Duration::from_secs(v)
}

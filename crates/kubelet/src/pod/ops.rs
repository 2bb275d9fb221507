//! The other actions: making the sandbox, stopping containers, cleaning up, deleting the object.

use std::{fs, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use sandbox::{DnsConfig, Error, PortMapping, SandboxConfig, SandboxStatus};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    api::ApiError,
    clock,
    events::Level,
    fields::FieldContext,
    kubelet::Core,
    pod::{
        hooks,
        plan::{Waiting, Why},
        start::{POD_NAME, POD_NAMESPACE, POD_UID},
        view::PodView,
    },
};

/// Pause after a failed stop or clean-up before the plan sees the same state again.
const RETRY: Duration = Duration::from_millis(500);
/// What a preStop hook that used up the grace leaves to the process, upstream's value.
const GRACE_MIN_S: u64 = 2;

/// Volumes and sandbox side by side; both or nothing.
///
/// # Errors
/// Why the pod waits.
pub async fn sandbox(
    core: &Core,
    view: &PodView,
    attempt: u32,
    old: Option<String>,
    cancel: &CancellationToken,
) -> Result<Option<SandboxStatus>, Waiting> {
    let runtime = &core.config.runtime;
    if let Some(old) = old {
        let gone = match runtime.stop_sandbox(&old).await {
            Ok(()) => runtime.remove_sandbox(&old).await,
            Err(e) => Err(e),
        };
        if let Err(e) = gone
            && !matches!(e, Error::NotFound { .. })
        {
            return Err(Waiting {
                reason: "ContainerCreating".into(),
                message: stdx::chain(&e).to_string(),
            });
        }
        core.events.pod(
            view,
            None,
            Level::Normal,
            "SandboxChanged",
            "Pod sandbox changed, it will be killed and re-created.",
        );
    }
    let _permit = core.starts.acquire().await;
    if cancel.is_cancelled() {
        return Ok(None);
    }
    let none: [IpAddr; 0] = [];
    let ctx = FieldContext {
        view,
        node: &core.config.capacity,
        host_ips: &core.config.addresses,
        pod_ips: &none,
    };
    let config = sandbox_config(core, view, attempt);
    let _ = fs::create_dir_all(&config.log_directory);
    let now = clock::now(&core.config.clock);
    let (volumes, made) = tokio::join!(core.volumes.set_up(&ctx, true, now), runtime.run_sandbox(config));
    let failed = |reason: &str, message: String| {
        core.events.pod(view, None, Level::Warning, reason, &message);
        Waiting {
            reason: "ContainerCreating".into(),
            message,
        }
    };
    let id = match made {
        Ok(id) => id,
        Err(e) => {
            return Err(failed(
                "FailedCreatePodSandBox",
                format!("Failed to create pod sandbox: {}", stdx::chain(&e)),
            ));
        }
    };
    let finish = async {
        volumes.map_err(|e| failed("FailedMount", stdx::chain(&e).to_string()))?;
        let status = runtime
            .sandbox_status(&id)
            .await
            .map_err(|e| failed("FailedCreatePodSandBox", stdx::chain(&e).to_string()))?;
        hosts_file(core, view, &status.ips).map_err(|e| failed("FailedMount", format!("writing etc-hosts: {e}")))?;
        Ok(status)
    };
    match finish.await {
        Ok(status) => Ok(Some(status)),
        Err(w) => {
            let gone = match runtime.stop_sandbox(&id).await {
                Ok(()) => runtime.remove_sandbox(&id).await,
                Err(e) => Err(e),
            };
            if let Err(e) = gone {
                // The relist finds it by its uid and takes it for this pod's.
                tracing::warn!(sandbox = %id, error = %stdx::chain(&e), "half-made sandbox not removed");
            }
            Err(w)
        }
    }
}

fn sandbox_config(core: &Core, view: &PodView, attempt: u32) -> SandboxConfig {
    let spec = view.spec();
    let label = |k: &str, v: &str| (k.to_owned(), v.to_owned());
    let mut labels = view.pod.metadata.labels.clone().unwrap_or_default();
    labels.extend([
        label(POD_UID, &view.uid),
        label(POD_NAME, &view.name),
        label(POD_NAMESPACE, &view.namespace),
    ]);
    let sysctls = spec.security_context.iter().flat_map(|s| s.sysctls.iter().flatten());
    let ports = view.members().flat_map(|m| m.container.ports.iter().flatten());
    let port_mappings = ports
        .filter_map(|p| {
            Some(PortMapping {
                protocol: p.protocol.as_deref().unwrap_or("TCP").to_lowercase(),
                container_port: u16::try_from(p.container_port).ok()?,
                host_port: p.host_port.and_then(|h| u16::try_from(h).ok()).filter(|h| *h > 0)?,
            })
        })
        .collect();
    SandboxConfig {
        pod: view.identity(attempt),
        hostname: if view.host_network() {
            core.config.node_name.clone()
        } else {
            hostname(core, view)
        },
        log_directory: log_dir(core, view),
        dns: dns(core, view),
        host_network: view.host_network(),
        share_process_namespace: spec.share_process_namespace == Some(true),
        sysctls: sysctls.map(|s| (s.name.clone(), s.value.clone())).collect(),
        resources: view.cgroup(),
        labels,
        annotations: view.pod.metadata.annotations.clone().unwrap_or_default(),
        port_mappings: if view.host_network() { vec![] } else { port_mappings },
    }
}

pub fn log_dir(core: &Core, view: &PodView) -> PathBuf {
    core.config
        .log_dir
        .join(format!("{}_{}_{}", view.namespace, view.name, view.uid))
}

fn short_hostname(view: &PodView) -> String {
    let name = view
        .spec()
        .hostname
        .clone()
        .filter(|h| !h.is_empty())
        .unwrap_or_else(|| view.name.clone());
    let cut: String = name.chars().take(63).collect();
    cut.trim_end_matches(['-', '.']).to_owned()
}

fn fqdn(core: &Core, view: &PodView) -> Option<String> {
    let subdomain = view.spec().subdomain.as_deref().filter(|s| !s.is_empty())?;
    Some(format!(
        "{}.{subdomain}.{}.svc.{}",
        short_hostname(view),
        view.namespace,
        core.config.cluster_domain
    ))
}

fn hostname(core: &Core, view: &PodView) -> String {
    match fqdn(core, view) {
        Some(name) if view.spec().set_hostname_as_fqdn == Some(true) => name,
        _ => short_hostname(view),
    }
}

/// The pod's resolver settings. `None` = the node's own.
fn dns(core: &Core, view: &PodView) -> Option<DnsConfig> {
    let spec = view.spec();
    let policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
    let cluster = || {
        let domain = &core.config.cluster_domain;
        DnsConfig {
            servers: core.config.cluster_dns.iter().map(ToString::to_string).collect(),
            searches: vec![
                format!("{}.svc.{domain}", view.namespace),
                format!("svc.{domain}"),
                domain.clone(),
            ],
            options: vec!["ndots:5".into()],
        }
    };
    let base = match policy {
        "None" => Some(DnsConfig::default()),
        "ClusterFirst" if view.host_network() => None,
        "ClusterFirst" | "ClusterFirstWithHostNet" if !core.config.cluster_dns.is_empty() => Some(cluster()),
        _ => None,
    };
    let Some(extra) = &spec.dns_config else { return base };
    let mut out = base.unwrap_or_else(|| node_dns(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default()));
    out.servers.extend(extra.nameservers.iter().flatten().cloned());
    out.searches.extend(extra.searches.iter().flatten().cloned());
    for o in extra.options.iter().flatten() {
        let Some(name) = &o.name else { continue };
        let text = o.value.as_ref().map_or_else(|| name.clone(), |v| format!("{name}:{v}"));
        out.options.retain(|old| old.split(':').next() != Some(name));
        out.options.push(text);
    }
    Some(out)
}

fn node_dns(text: &str) -> DnsConfig {
    let mut out = DnsConfig::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let rest = |words: std::str::SplitWhitespace<'_>| words.map(str::to_owned).collect::<Vec<_>>();
        match words.next() {
            Some("nameserver") => out.servers.extend(words.next().map(str::to_owned)),
            Some("search") => out.searches = rest(words),
            Some("options") => out.options = rest(words),
            _ => {}
        }
    }
    out
}

fn hosts_file(core: &Core, view: &PodView, ips: &[IpAddr]) -> std::io::Result<()> {
    let mut text = String::new();
    if view.host_network() {
        text.push_str("# Kubernetes-managed hosts file (host network).\n");
        text.push_str(&fs::read_to_string("/etc/hosts").unwrap_or_default());
    } else {
        text.push_str(
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
        );
        text.push_str(
            "fe00::\tip6-localnet\nfe00::\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
        );
        for ip in ips {
            match fqdn(core, view) {
                Some(name) => text.push_str(&format!("{ip}\t{name}\t{}\n", short_hostname(view))),
                None => text.push_str(&format!("{ip}\t{}\n", short_hostname(view))),
            }
        }
    }
    let aliases = view.spec().host_aliases.as_deref().unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for a in aliases {
            text.push_str(&format!(
                "{}\t{}\n",
                a.ip,
                a.hostnames.clone().unwrap_or_default().join("\t")
            ));
        }
    }
    let dir = core.volumes.pod_dir(&view.uid);
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("etc-hosts"), text)
}

/// What a kill needs to know.
pub struct Kill {
    pub core: Arc<Core>,
    pub view: Arc<PodView>,
    pub id: String,
    pub name: String,
    pub grace_s: u64,
    pub why: Why,
    pub sandbox: Option<SandboxStatus>,
}

impl Kill {
    /// preStop, SIGTERM, grace, SIGKILL. Returns when the container is dead or the attempt failed.
    pub async fn run(self) {
        let (core, view) = (&self.core, &self.view);
        let message = match &self.why {
            Why::Deleted | Why::Over => format!("Stopping container {}", self.name),
            Why::Unhealthy(why) => format!("Container {} {why}, will be restarted", self.name),
            Why::Changed => format!("Container {} definition changed, will be restarted", self.name),
        };
        core.events
            .pod(view, Some(&self.name), Level::Normal, "Killing", message);
        let mut left = self.grace_s;
        let member = view.member(&self.name);
        if let Some(m) = member
            && let Some(hook) = m.container.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref())
            && left > 0
        {
            let begun = Instant::now();
            let sandbox_id = self.sandbox.as_ref().map_or("", |s| s.id.as_str());
            let own = self.sandbox.as_ref().and_then(|s| s.ips.first().copied());
            let ip = own.or_else(|| core.config.addresses.first().copied());
            let hook = hooks::run(core, hook, &m.container, &self.id, sandbox_id, ip);
            let failed = match timeout(Duration::from_secs(left), hook).await {
                Ok(Ok(())) => None,
                Ok(Err(why)) => Some(why),
                Err(_) => Some(format!("not finished within the grace period of {left}s")),
            };
            if let Some(why) = failed {
                core.events.pod(
                    view,
                    Some(&self.name),
                    Level::Warning,
                    "FailedPreStopHook",
                    format!("PreStopHook failed: {why}"),
                );
            }
            left = left.saturating_sub(begun.elapsed().as_secs()).max(GRACE_MIN_S);
        }
        if let Err(e) = core.config.runtime.stop_container(&self.id, left).await
            && !matches!(e, Error::NotFound { .. })
        {
            let message = format!("error killing container: {}", stdx::chain(&e));
            core.events
                .pod(view, Some(&self.name), Level::Warning, "FailedKillPod", message);
            sleep(RETRY).await;
        }
    }
}

/// Stops the sandbox of a pod that is over. True if done.
pub async fn stop_sandbox(core: &Core, view: &PodView, id: &str) -> bool {
    match core.config.runtime.stop_sandbox(id).await {
        Ok(()) | Err(Error::NotFound { .. }) => {
            core.config.hooks.stopped(&view.identity(0)).await;
            true
        }
        Err(e) => {
            tracing::warn!(sandbox = %id, error = %stdx::chain(&e), "sandbox not stopped");
            sleep(RETRY).await;
            false
        }
    }
}

/// Removes sandbox, containers, volumes and logs of a pod. Goes on after an error; true if nothing is left.
pub async fn clean(
    core: &Core,
    uid: &str,
    identity: &sandbox::PodIdentity,
    sandbox: Option<&str>,
    containers: &[String],
    logs: Option<PathBuf>,
) -> bool {
    let runtime = &core.config.runtime;
    let mut clean = true;
    let mut check = |doing: &'static str, done: Result<(), Error>| {
        if let Err(e) = done
            && !matches!(e, Error::NotFound { .. })
        {
            tracing::warn!(pod = %uid, error = %stdx::chain(&e), "{doing}");
            clean = false;
        }
    };
    if let Some(id) = sandbox {
        check("sandbox not stopped", runtime.stop_sandbox(id).await);
    }
    for id in containers {
        check("container not removed", runtime.remove_container(id).await);
    }
    if let Some(id) = sandbox {
        check("sandbox not removed", runtime.remove_sandbox(id).await);
    }
    if !clean {
        sleep(RETRY).await;
        return false;
    }
    core.config.hooks.stopped(identity).await;
    if let Err(e) = core.volumes.clean(uid) {
        tracing::warn!(pod = %uid, error = %e, "volumes not removed");
        sleep(RETRY).await;
        return false;
    }
    if let Some(dir) = logs {
        let _ = fs::remove_dir_all(dir);
    }
    true
}

/// The last delete of the object. True if it is gone, by whomever.
pub async fn delete_object(core: &Core, view: &PodView) -> bool {
    match core.config.api.delete_pod(&view.namespace, &view.name, &view.uid).await {
        Ok(()) => true,
        Err(e) if e.is_gone() => true,
        Err(e) => {
            let wait = if matches!(e, ApiError::Refused { .. }) {
                RETRY * 10
            } else {
                RETRY
            };
            tracing::warn!(pod = %view.name, error = %stdx::chain(&e), "pod object not deleted");
            sleep(wait).await;
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_nodes_resolver() {
        let c = node_dns("# x\nnameserver 1.1.1.1\nsearch a b\noptions ndots:2 edns0\n");
        assert_eq!(
            (c.servers, c.searches, c.options),
            (
                vec!["1.1.1.1".into()],
                vec!["a".into(), "b".into()],
                vec!["ndots:2".into(), "edns0".into()]
            )
        );
    }
}

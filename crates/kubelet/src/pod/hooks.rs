//! Lifecycle hooks: exec, httpGet, sleep. The caller bounds the time.

use std::{net::IpAddr, time::Duration};

use k8s_openapi::api::core::v1::{Container, LifecycleHandler};

use crate::{
    http::{self, Target},
    kubelet::Core,
};

/// An exec hook may not run longer than this whatever the grace.
const EXEC_MAX_MS: u64 = 3_600_000;

/// Runs one hook to its end.
///
/// # Errors
/// What went wrong, for the event.
pub async fn run(
    core: &Core,
    hook: &LifecycleHandler,
    container: &Container,
    container_id: &str,
    sandbox_id: &str,
    pod_ip: Option<IpAddr>,
) -> Result<(), String> {
    if let Some(e) = &hook.exec {
        let argv = e.command.clone().unwrap_or_default();
        let shown = argv.join(" ");
        return match core.config.runtime.exec_sync(container_id, argv, EXEC_MAX_MS).await {
            Ok((0, ..)) => Ok(()),
            Ok((code, out, err)) => Err(format!(
                "command '{shown}' exited with {code}: {}{}",
                String::from_utf8_lossy(&out),
                String::from_utf8_lossy(&err)
            )),
            Err(e) => Err(format!("command '{shown}': {}", stdx::chain(&e))),
        };
    }
    if let Some(g) = &hook.http_get {
        let pod_ip = pod_ip.ok_or("the pod has no address")?;
        let target = Target {
            dialer: core.config.dialer.as_ref(),
            sandbox_id,
            pod_ip,
        };
        return match http::get(&target, g, container, "kube-lifecycle/1.36").await {
            Ok((200..=399, _)) => Ok(()),
            Ok((code, _)) => Err(format!("HTTP status {code}")),
            Err(e) => Err(stdx::chain(&e).to_string()),
        };
    }
    if let Some(s) = &hook.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(s.seconds).unwrap_or(0))).await;
        return Ok(());
    }
    Err("the hook has no handler".into())
}

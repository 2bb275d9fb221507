//! Emptying a node before its machine goes: cordon, evict, and wait no longer than a bound.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use reconcile::{Client, DeleteParams, Error, ListParams, Patch};
use resources::Machine;
use serde_json::{Value, json};

use crate::{context::Context, reconcile_cluster::cordon};

/// Pods that are still there after this long go with the machine. AKS waits 30 minutes; a pod's own grace period fits in here.
const PATIENCE: Duration = Duration::from_secs(60);
/// When the drain of a machine began, RFC 3339.
const SINCE: &str = "oaks.internal/drain-since";

/// Where the drain of a machine's node is.
pub(crate) enum Drained {
    Yes,
    /// So many pods are still there.
    Waiting(usize),
}

/// One step: cordons at the first, evicts whatever is not yet going, and looks.
pub(crate) async fn step(context: &Context, hosted: &Client, machine: &Machine) -> Result<Drained, Error> {
    let node = &machine.spec.node_name;
    let now = apimachinery::time::now(&*context.clock);
    let since = machine
        .metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get(SINCE))
        .and_then(|t| apimachinery::time::parse(t).ok());
    let Some(since) = since else {
        cordon(hosted, node).await?;
        let patch = Patch::Merge(json!({"metadata": {"annotations": {SINCE: apimachinery::time::rfc3339(now)}}}));
        context
            .home
            .patch::<Machine>(None, machine.name(), &patch, None)
            .await?;
        return evict(hosted, node).await;
    };
    if apimachinery::time::since(now, since) > PATIENCE {
        tracing::warn!(node, "drain took too long; the remaining pods go with the machine");
        return Ok(Drained::Yes);
    }
    evict(hosted, node).await
}

async fn evict(hosted: &Client, node: &str) -> Result<Drained, Error> {
    let pods = hosted
        .list::<Pod>(None, &ListParams::fields(format!("spec.nodeName={node}")))
        .await?;
    let mut left = 0;
    for pod in pods.items.iter().filter(|p| moves(p)) {
        left += 1;
        if pod.metadata.deletion_timestamp.is_some() {
            continue;
        }
        let (ns, name) = (
            pod.metadata.namespace.as_deref(),
            pod.metadata.name.as_deref().unwrap_or_default(),
        );
        let body = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": ns}});
        match hosted
            .create_subresource::<Pod, Value, Value>(ns, name, "eviction", &body)
            .await
        {
            // A disruption budget says not now: the next step asks again.
            Err(e) if e.code() == Some(429) => {}
            // An API server without evictions, or a pod that is gone: a plain delete says which.
            Err(_) => match hosted.delete::<Pod>(ns, name, &DeleteParams::default()).await {
                Err(e) if !e.is_not_found() => return Err(e),
                _ => {}
            },
            Ok(_) => {}
        }
    }
    Ok(if left == 0 {
        Drained::Yes
    } else {
        Drained::Waiting(left)
    })
}

/// Pods of daemon sets and finished pods stay.
fn moves(pod: &Pod) -> bool {
    let daemon = pod
        .metadata
        .owner_references
        .iter()
        .flatten()
        .any(|o| o.kind == "DaemonSet");
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default();
    !daemon && !matches!(phase, "Succeeded" | "Failed")
}

//! Stopping a cluster (`az aks stop`): machines off, control plane unloaded, everything that is stored kept. Starting it is
//! the ordinary pass, which switches machines on again.
//!
//! Pods of the virtual node end with it: container groups have nothing that outlives them.

use reconcile::{Error, Patch};
use resources::{Machine, ManagedCluster, VirtualNode};
use serde_json::json;

use crate::{
    context::Context,
    names::{CLUSTER_LABEL, Ids},
    status::Progress,
    teardown::sweep,
};

/// Whether the cluster is to be stopped.
pub(crate) fn is_stopped(cluster: &ManagedCluster) -> bool {
    cluster.spec.body["properties"]["powerState"]["code"]
        .as_str()
        .is_some_and(|code| code.eq_ignore_ascii_case("Stopped"))
}

/// One pass over a cluster that is to be stopped.
pub(crate) async fn stop(context: &Context, cluster: &ManagedCluster, ids: &Ids) -> Result<Progress, Error> {
    let name = cluster.name();
    let virtual_nodes = sweep::<VirtualNode>(context, None, name).await?;
    let mut running = 0;
    for machine in context.machines.list() {
        let labels = machine.metadata.labels.as_ref();
        if labels.and_then(|l| l.get(CLUSTER_LABEL)).map(String::as_str) != Some(name) {
            continue;
        }
        if machine.spec.running {
            switch(context, &machine, false).await?;
        }
        let phase = machine.status.as_ref().map_or("", |s| s.phase.as_str());
        if machine.spec.running || phase != "Stopped" {
            running += 1;
        }
    }
    if virtual_nodes > 0 {
        return Ok(Progress::Working("stopping the virtual node".into()));
    }
    if running > 0 {
        return Ok(Progress::Working(format!("stopping machines ({running} left)")));
    }
    if let Err(e) = context.control_planes.pause(&ids.object).await {
        return Ok(Progress::failed("ControlPlaneFailed", e.to_string()));
    }
    context.forget(&ids.object);
    Ok(Progress::Done)
}

/// Switches a machine on or off.
pub(crate) async fn switch(context: &Context, machine: &Machine, on: bool) -> Result<(), Error> {
    let patch = Patch::Merge(json!({"metadata": {"uid": machine.metadata.uid}, "spec": {"running": on}}));
    let name = machine.metadata.name.as_deref().unwrap_or_default();
    match context.home.patch::<Machine>(None, name, &patch, None).await {
        Err(e) if !e.is_not_found() && !e.is_conflict() => Err(e),
        _ => Ok(()),
    }
}

//! Deletion of a managed cluster, in dependency order; each stage begins when the one before it is gone.
//!
//! Load balancer (traffic stops), virtual node and its groups, machines, interfaces and certificates, pools, control plane and
//! its address, VNet and node resource group; then the finalizer.

use k8s_openapi::api::core::v1::Secret;
use reconcile::{Error, Kind, ListParams, Requeue};
use resources::{
    AgentPool, ArmId, ContainerGroup, LoadBalancer, Machine, ManagedCluster, NetworkInterface, PublicIPAddress,
    ResourceGroup, VirtualNetwork, VirtualNode, aks::ClusterView,
};

use crate::{
    context::Context,
    names::{CLUSTER_LABEL, FINALIZER, Ids},
    reconcile_cluster::LOOK_AGAIN,
    status::{self, Progress},
};

pub(crate) async fn reconcile(context: &Context, cluster: ManagedCluster) -> Result<Requeue, Error> {
    if !cluster.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER) {
        return Ok(Requeue::Done);
    }
    let Some(step) = stage(context, &cluster).await? else {
        let mut cluster = cluster;
        let kept = cluster.metadata.finalizers.take().unwrap_or_default();
        cluster.metadata.finalizers = Some(kept.into_iter().filter(|f| f != FINALIZER).collect());
        match context.home.update(None, &cluster).await {
            Err(e) if !e.is_not_found() => return Err(e),
            _ => {}
        }
        context.forget(cluster.name());
        tracing::info!(cluster = cluster.name(), "managed cluster deleted");
        return Ok(Requeue::Done);
    };
    let old = cluster.status.clone().unwrap_or_default();
    let progress = Progress::Working(step);
    let mut next = status::next(
        cluster.status.as_ref(),
        old.observed_generation,
        &progress,
        old.properties.clone(),
    );
    next.provisioning_state = "Deleting".to_owned();
    if cluster.status.as_ref() != Some(&next) {
        let mut object = cluster;
        object.status = Some(next);
        match context.home.update_status(None, &object).await {
            Err(e) if !e.is_not_found() => return Err(e),
            _ => {}
        }
    }
    Ok(Requeue::After(LOOK_AGAIN))
}

/// Does what can be done now; `None` when nothing is left.
async fn stage(context: &Context, cluster: &ManagedCluster) -> Result<Option<String>, Error> {
    let name = cluster.name();
    if sweep::<LoadBalancer>(context, None, name).await? > 0 {
        return Ok(Some("removing the load balancer".into()));
    }
    let id = ArmId::parse(&cluster.spec.id).ok();
    let ids = id.as_ref().and_then(|id| {
        let view = ClusterView::parse(id, &cluster.spec.body).ok()?;
        Some(Ids::new(id, &view.node_resource_group))
    });
    // The node's end takes its groups with it; records that are left over then have nobody behind them.
    if sweep::<VirtualNode>(context, None, name).await? > 0 {
        return Ok(Some("stopping the virtual node".into()));
    }
    if let Some(ids) = &ids {
        let left = container_groups(context, &ids.node_group).await?;
        if left > 0 {
            return Ok(Some(format!("removing container groups ({left} left)")));
        }
    }
    let machines = sweep::<Machine>(context, None, name).await?;
    if machines > 0 {
        return Ok(Some(format!("stopping machines ({machines} left)")));
    }
    let interfaces = sweep::<NetworkInterface>(context, None, name).await?;
    sweep::<Secret>(context, Some("kube-system"), name).await?;
    if interfaces > 0 {
        return Ok(Some(format!("removing network interfaces ({interfaces} left)")));
    }
    if sweep::<AgentPool>(context, None, name).await? > 0 {
        return Ok(Some("removing agent pools".into()));
    }
    if let Err(e) = context.control_planes.delete(name).await {
        return Ok(Some(format!("stopping the control plane: {}", e.message)));
    }
    context.forget(name);
    if sweep::<PublicIPAddress>(context, None, name).await? > 0 {
        return Ok(Some("releasing public addresses".into()));
    }
    if sweep::<VirtualNetwork>(context, None, name).await? > 0 {
        return Ok(Some("removing the virtual network".into()));
    }
    if sweep::<ResourceGroup>(context, None, name).await? > 0 {
        return Ok(Some("removing the node resource group".into()));
    }
    Ok(None)
}

/// Asks for the deletion of every object of a kind that belongs to the cluster; returns how many are still there.
pub(crate) async fn sweep<K: Kind>(context: &Context, namespace: Option<&str>, cluster: &str) -> Result<usize, Error> {
    let all = context
        .home
        .list::<K>(namespace, &ListParams::labels(format!("{CLUSTER_LABEL}={cluster}")))
        .await?;
    let mut left = 0;
    for object in &all.items {
        let metadata = object.metadata();
        let name = metadata.name.as_deref().unwrap_or_default();
        if metadata.deletion_timestamp.is_none() {
            context.delete::<K>(namespace, name).await?;
            // One without finalizers is gone already: no need to come back for it.
            if metadata.finalizers.iter().flatten().next().is_none() {
                continue;
            }
        }
        left += 1;
    }
    Ok(left)
}

/// Container groups of the virtual node: recorded under the node resource group, with or without labels.
async fn container_groups(context: &Context, node_group: &str) -> Result<usize, Error> {
    let all = context
        .home
        .list::<ContainerGroup>(None, &ListParams::default())
        .await?;
    let prefix = format!("{}/", node_group.to_lowercase());
    let mut left = 0;
    for group in all
        .items
        .iter()
        .filter(|g| g.spec.id.to_lowercase().starts_with(&prefix))
    {
        if group.metadata.deletion_timestamp.is_none() {
            context.delete::<ContainerGroup>(None, group.name()).await?;
            if group.metadata.finalizers.iter().flatten().next().is_none() {
                continue;
            }
        }
        left += 1;
    }
    Ok(left)
}

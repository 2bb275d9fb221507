//! One pass over a managed cluster: what is missing is made, in order, and one status is written.

use std::net::IpAddr;

use k8s_openapi::{
    ByteString,
    api::core::v1::{Node, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use reconcile::{Client, Error, Informers, Patch, Requeue};
use resources::{
    ArmId, ArmSpec, ArmStatus, GROUP_FINALIZER, ManagedCluster, NodeBootstrap, PublicIPAddress, ResourceGroup,
    VirtualNetwork, aks, aks::ClusterView, object_name,
};
use serde_json::json;

use crate::{
    Endpoint, NodeIdentity,
    context::{Context, own},
    credentials,
    names::{self, FINALIZER, Ids},
    pool, power,
    status::{self, Progress},
    teardown, virtual_node,
};

/// A look without a change, while something is under way; events bring most passes sooner.
pub(crate) const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_secs(1);
/// Everything that a pass over a healthy cluster knows.
pub(crate) struct Pass<'a> {
    pub context: &'a Context,
    pub cluster: &'a ManagedCluster,
    pub view: &'a ClusterView,
    pub ids: &'a Ids,
    pub endpoint: &'a Endpoint,
    pub hosted: &'a (Client, Informers),
}

impl Pass<'_> {
    pub fn bootstrap(&self, secret: String) -> NodeBootstrap {
        NodeBootstrap {
            cluster: self.ids.object.clone(),
            api_server: self.endpoint.url.clone(),
            secret,
            service_cidr: self.view.service_cidr.to_string(),
            dns_service_ip: self.view.dns_service_ip.to_string(),
            cluster_domain: aks::CLUSTER_DOMAIN.to_owned(),
        }
    }

    /// Makes the Secret with a node's certificates, unless it is there.
    /// # Errors: `Err(Ok(progress))` if the control plane does not issue them.
    pub async fn ensure_secret(&self, name: &str, pool: &str, node: NodeIdentity) -> Result<Option<Progress>, Error> {
        if self
            .context
            .home
            .get_opt::<Secret>(Some("kube-system"), name)
            .await?
            .is_some()
        {
            return Ok(None);
        }
        let certs = match self.context.control_planes.node_certs(&self.ids.object, &node).await {
            Ok(certs) => certs,
            Err(e) => return Ok(Some(Progress::failed("NodeCertificateFailed", e.to_string()))),
        };
        let data = [
            ("ca.crt", certs.ca_pem),
            ("tls.crt", certs.client.cert_pem),
            ("tls.key", certs.client.key_pem),
            ("serving.crt", certs.serving.cert_pem),
            ("serving.key", certs.serving.key_pem),
        ];
        let mut secret = Secret {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some("kube-system".to_owned()),
                ..Default::default()
            },
            data: Some(
                data.into_iter()
                    .map(|(k, v)| (k.to_owned(), ByteString(v.into_bytes())))
                    .collect(),
            ),
            type_: Some("Opaque".to_owned()),
            ..Default::default()
        };
        own(&mut secret.metadata, self.cluster, &self.ids.cluster);
        secret
            .metadata
            .labels
            .get_or_insert_default()
            .insert(names::POOL_LABEL.to_owned(), pool.to_owned());
        self.context.create(Some("kube-system"), &secret).await?;
        Ok(None)
    }
}

/// One pass. Never waits for anything but calls.
pub(crate) async fn reconcile(context: &Context, name: &str) -> Result<Requeue, Error> {
    // Read from home, not from the cache: a stale generation would mark an old spec as done.
    let Some(cluster) = context.home.get_opt::<ManagedCluster>(None, name).await? else {
        context.forget(name);
        return Ok(Requeue::Done);
    };
    if cluster.metadata.deletion_timestamp.is_some() {
        return teardown::reconcile(context, cluster).await;
    }
    if !cluster.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER) {
        let mut cluster = cluster;
        cluster
            .metadata
            .finalizers
            .get_or_insert_default()
            .push(FINALIZER.to_owned());
        context.home.update(None, &cluster).await?;
        // The change brings the next pass.
        return Ok(Requeue::Done);
    }
    let parsed = ArmId::parse(&cluster.spec.id).map_err(|e| e.to_string());
    let view = parsed
        .as_ref()
        .map_err(Clone::clone)
        .and_then(|id| ClusterView::parse(id, &cluster.spec.body).map_err(|e| e.to_string()));
    let (id, view) = match (parsed, view) {
        (Ok(id), Ok(view)) => (id, view),
        (Err(e), _) | (_, Err(e)) => {
            return write(context, &cluster, Progress::failed("InvalidParameter", e), json!({})).await;
        }
    };
    let ids = Ids::new(&id, &view.node_resource_group);
    let (progress, pools) = if power::is_stopped(&cluster) {
        let pools = view.pools.iter().map(|p| (p.name.clone(), "Succeeded".to_owned()));
        (power::stop(context, &cluster, &ids).await?, pools.collect())
    } else {
        steps(context, &cluster, &id, &view, &ids).await?
    };
    let mut properties = status::cluster(&cluster, &view, &ids, &context.tenant, &pools);
    if power::is_stopped(&cluster) {
        status::stopped(&mut properties);
    }
    write(context, &cluster, progress, properties).await
}

async fn write(
    context: &Context,
    cluster: &ManagedCluster,
    progress: Progress,
    properties: serde_json::Value,
) -> Result<Requeue, Error> {
    let generation = cluster.metadata.generation.unwrap_or(0);
    let next = status::next(cluster.status.as_ref(), generation, &progress, properties);
    if cluster.status.as_ref() != Some(&next) {
        if cluster.status.as_ref().map(|s| &s.steps) != Some(&next.steps) {
            let step = next.steps.last().map(String::as_str).unwrap_or_default();
            tracing::info!(
                cluster = cluster.name(),
                state = next.provisioning_state,
                step,
                "managed cluster"
            );
        }
        let mut object = cluster.clone();
        object.status = Some(next);
        context.home.update_status(None, &object).await?;
    }
    Ok(match progress {
        Progress::Done => Requeue::Done,
        Progress::Working(_) | Progress::Failed(_) => Requeue::After(LOOK_AGAIN),
    })
}

/// The work in order. Returns where it stands and the state of every pool.
async fn steps(
    context: &Context,
    cluster: &ManagedCluster,
    id: &ArmId,
    view: &ClusterView,
    ids: &Ids,
) -> Result<(Progress, Vec<(String, String)>), Error> {
    let waiting = |what: &str| Ok((Progress::Working(what.to_owned()), Vec::new()));
    ensure_group(context, cluster, view, ids).await?;
    if view.pools.iter().any(|p| p.subnet.is_none()) && !ensure_vnet(context, cluster, id, view).await? {
        return waiting("making the virtual network");
    }
    let address = match ensure_address(context, cluster, view, ids).await? {
        Ok(Some(address)) => address,
        Ok(None) => return waiting("waiting for the API server's address"),
        Err(progress) => return Ok((progress, Vec::new())),
    };
    let spec = credentials::spec(id, view, ids, address);
    let endpoint = match context.control_planes.ensure(&spec).await {
        Ok(endpoint) => endpoint,
        Err(e) => return Ok((Progress::failed("ControlPlaneFailed", e.to_string()), Vec::new())),
    };
    let Some(hosted) = context.hosted(&ids.object) else {
        return waiting("starting the control plane");
    };
    let pass = Pass {
        context,
        cluster,
        view,
        ids,
        endpoint: &endpoint,
        hosted: &hosted,
    };
    let mut worst = Progress::Done;
    let mut states = Vec::new();
    for (name, progress) in pool::reconcile_all(&pass).await? {
        states.push((name, progress.1));
        worst = worse(worst, progress.0);
    }
    worst = worse(worst, virtual_node::reconcile(&pass, id).await?);
    Ok((worst, states))
}

/// A failure is told before a wait, and the first of each before later ones.
pub(crate) fn worse(a: Progress, b: Progress) -> Progress {
    match (&a, &b) {
        (Progress::Failed(_), _) => a,
        (_, Progress::Failed(_)) => b,
        (Progress::Working(_), _) => a,
        _ => b,
    }
}

async fn ensure_group(context: &Context, cluster: &ManagedCluster, view: &ClusterView, ids: &Ids) -> Result<(), Error> {
    let name = object_name(&ids.node_group);
    if context.groups.get("", &name).is_some() {
        return Ok(());
    }
    let body = json!({"location": view.location, "managedBy": ids.cluster});
    let mut group = ResourceGroup::new(
        name,
        ArmSpec {
            id: ids.node_group.clone(),
            body,
        },
    );
    own(&mut group.metadata, cluster, &ids.node_group);
    group.metadata.finalizers = Some(vec![GROUP_FINALIZER.to_owned()]);
    context.create(None, &group).await
}

/// The VNet of a cluster without a subnet of its own; true once it is there.
async fn ensure_vnet(
    context: &Context,
    cluster: &ManagedCluster,
    id: &ArmId,
    view: &ClusterView,
) -> Result<bool, Error> {
    let vnet_id = view.own_vnet_id(&id.subscription);
    let name = object_name(&vnet_id);
    if let Some(vnet) = context.vnets.get("", &name) {
        return Ok(vnet
            .status
            .as_ref()
            .is_some_and(|s| s.provisioning_state == "Succeeded"));
    }
    let body = json!({"location": view.location, "properties": {
        "addressSpace": {"addressPrefixes": [aks::OWN_VNET_PREFIX]},
        "subnets": [{"name": aks::OWN_SUBNET, "properties": {"addressPrefix": aks::OWN_SUBNET_PREFIX}}]}});
    let mut vnet = VirtualNetwork::new(
        name,
        ArmSpec {
            id: vnet_id.clone(),
            body,
        },
    );
    own(&mut vnet.metadata, cluster, &vnet_id);
    context.create(None, &vnet).await?;
    Ok(false)
}

/// The API server's address of the public pool.
async fn ensure_address(
    context: &Context,
    cluster: &ManagedCluster,
    view: &ClusterView,
    ids: &Ids,
) -> Result<Result<Option<IpAddr>, Progress>, Error> {
    let id = ids.api_address();
    let name = object_name(&id);
    let Some(existing) = context.public_ips.get("", &name) else {
        let body = json!({"location": view.location, "sku": {"name": "Standard"}, "tags": {"aks-managed-cluster-name": ids.object},
            "properties": {"publicIPAllocationMethod": "Static", "publicIPAddressVersion": "IPv4"},
            // The host agent keeps such an address in the edge, where the control plane listens.
            "oaks": {"endpoint": true}});
        let mut address = PublicIPAddress::new(name, ArmSpec { id: id.clone(), body });
        own(&mut address.metadata, cluster, &id);
        context.create(None, &address).await?;
        return Ok(Ok(None));
    };
    Ok(address_of(existing.status.as_ref()))
}

/// The address in a public IP's status; a failed allocation is passed on.
pub(crate) fn address_of(status: Option<&ArmStatus>) -> Result<Option<IpAddr>, Progress> {
    let Some(status) = status else { return Ok(None) };
    match (
        &status.error,
        status.properties["ipAddress"].as_str().and_then(|a| a.parse().ok()),
    ) {
        (_, Some(address)) => Ok(Some(address)),
        (Some(e), None) => Err(Progress::Failed(e.clone())),
        (None, None) => Ok(None),
    }
}

/// Removes a Node object from a hosted cluster; fine if it is gone.
pub(crate) async fn delete_node(client: &Client, name: &str) -> Result<(), Error> {
    match client
        .delete::<Node>(None, name, &reconcile::DeleteParams::default())
        .await
    {
        Err(e) if !e.is_not_found() => Err(e),
        _ => Ok(()),
    }
}

/// Marks a node as not to be scheduled on; fine if it is gone.
pub(crate) async fn cordon(client: &Client, name: &str) -> Result<(), Error> {
    let patch = Patch::Merge(json!({"spec": {"unschedulable": true}}));
    match client.patch::<Node>(None, name, &patch, None).await {
        Err(e) if !e.is_not_found() => Err(e),
        _ => Ok(()),
    }
}

//! The virtual-node add-on: an interface in the delegated subnet, certificates for its address, and a VirtualNode object for
//! the host agent that runs it; or their removal.

use k8s_openapi::api::core::v1::{Node, Secret};
use reconcile::Error;
use resources::{
    ArmId, ArmSpec, NetworkInterface, VirtualNode, VirtualNodeSpec, object_name,
    views::{NicAddresses, VnetView},
};
use serde_json::json;

use crate::{
    NodeIdentity,
    context::own,
    names,
    reconcile_cluster::{Pass, delete_node},
    status::{self, Progress},
};

/// What one virtual node may hold. Azure's connector advertises the same.
const CPU_MILLI: i64 = 10_000_000;
const MEMORY_BYTES: i64 = 4 << 40;
const PODS: i64 = 5000;

/// One pass.
pub(crate) async fn reconcile(pass: &Pass<'_>, id: &ArmId) -> Result<Progress, Error> {
    let (context, view) = (pass.context, pass.view);
    let name = names::machine(names::VIRTUAL_NODE, &pass.ids.object);
    let existing = context.virtual_nodes.get("", &name);
    let Some(subnet) = &view.virtual_node_subnet else {
        return remove(pass, &name).await;
    };
    let Some(pool) = view.pools.first() else {
        return Ok(Progress::Done);
    };
    let nodes_subnet = view.subnet_of(&id.subscription, pool);
    let (Some((vnet, _)), Some((subnets, _))) = (
        resources::views::subnet_ref(&nodes_subnet),
        nodes_subnet.rsplit_once('/'),
    ) else {
        return Ok(Progress::failed("InvalidParameter", "the pool's subnet id is not one"));
    };
    let body = context
        .vnets
        .get("", &vnet)
        .map(|v| v.spec.body.clone())
        .unwrap_or_default();
    if VnetView::parse(&body).ok().is_none_or(|v| v.subnet(subnet).is_none()) {
        return Ok(Progress::failed(
            "SubnetNotFound",
            format!("the virtual node's subnet '{subnet}' does not exist"),
        ));
    }
    let (nic, addresses) = match interface(pass, &format!("{subnets}/{subnet}")).await? {
        Ok(found) => found,
        Err(progress) => return Ok(progress),
    };
    let secret = names::secret(&name);
    let primary = addresses.primary().map(|a| a.address);
    let identity = NodeIdentity {
        node_name: names::VIRTUAL_NODE.to_owned(),
        addresses: primary.into_iter().collect(),
    };
    if let Some(progress) = pass.ensure_secret(&secret, "", identity).await? {
        return Ok(progress);
    }
    if existing.is_none() {
        let spec = VirtualNodeSpec {
            node_name: names::VIRTUAL_NODE.to_owned(),
            managed_cluster: pass.cluster.name().to_owned(),
            virtual_network: vnet,
            subnet: subnet.clone(),
            nic,
            group_scope: pass.ids.node_group.clone(),
            cpu_milli: CPU_MILLI,
            memory_bytes: MEMORY_BYTES,
            max_pods: PODS,
            bootstrap: pass.bootstrap(secret),
        };
        let mut object = VirtualNode::new(name, spec);
        own(&mut object.metadata, pass.cluster, &pass.ids.cluster);
        context.create(None, &object).await?;
    }
    let node = pass.hosted.1.get::<Node>().get("", names::VIRTUAL_NODE);
    let failed = existing
        .as_ref()
        .and_then(|v| v.status.as_ref())
        .filter(|s| s.phase == "Failed");
    Ok(match (node, failed) {
        (Some(n), _) if status::is_ready(&n) => Progress::Done,
        (_, Some(s)) => Progress::failed(
            "VirtualNodeFailed",
            format!("the virtual node does not start: {}", s.message),
        ),
        _ => Progress::Working("waiting for the virtual node to be Ready".into()),
    })
}

/// The node's own interface: object name and addresses, or what is being waited for.
async fn interface(pass: &Pass<'_>, subnet: &str) -> Result<Result<(String, NicAddresses), Progress>, Error> {
    let id = pass.ids.interface(names::VIRTUAL_NODE);
    let name = object_name(&id);
    let Some(nic) = pass.context.nics.get("", &name) else {
        let body = json!({"location": pass.view.location, "properties": {"ipConfigurations": [{"name": "ipconfig1", "properties": {
            "primary": true, "privateIPAllocationMethod": "Dynamic", "subnet": {"id": subnet}}}]}});
        let mut nic = NetworkInterface::new(&name, ArmSpec { id: id.clone(), body });
        own(&mut nic.metadata, pass.cluster, &id);
        pass.context.create(None, &nic).await?;
        return Ok(Err(Progress::Working(
            "making the virtual node's network interface".into(),
        )));
    };
    let status = nic.status.as_ref();
    Ok(
        match (
            status.and_then(|s| NicAddresses::parse(&s.properties)),
            status.and_then(|s| s.error.clone()),
        ) {
            (Some(addresses), _) => Ok((name, addresses)),
            (None, Some(e)) => Err(Progress::Failed(e)),
            (None, None) => Err(Progress::Working("waiting for the virtual node's address".into())),
        },
    )
}

/// The node first (its host agent stops the groups), then what it stood on. The Secret goes last: as long as it is there,
/// there is something to do. Everything is asked of home itself, since the cache may show what is gone.
async fn remove(pass: &Pass<'_>, name: &str) -> Result<Progress, Error> {
    let (home, context) = (&pass.context.home, pass.context);
    let (namespace, secret) = (Some("kube-system"), names::secret(name));
    if home.get_opt::<Secret>(namespace, &secret).await?.is_none() {
        return Ok(Progress::Done);
    }
    let working = Progress::Working("removing the virtual node".into());
    if let Some(object) = home.get_opt::<VirtualNode>(None, name).await? {
        if object.metadata.deletion_timestamp.is_none() {
            context.delete::<VirtualNode>(None, name).await?;
        }
        return Ok(working);
    }
    context
        .delete::<NetworkInterface>(None, &object_name(&pass.ids.interface(names::VIRTUAL_NODE)))
        .await?;
    delete_node(&pass.hosted.0, names::VIRTUAL_NODE).await?;
    context.delete::<Secret>(namespace, &secret).await?;
    Ok(Progress::Done)
}

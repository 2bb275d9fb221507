//! Agent pools: interfaces, certificates and machines for as many nodes as a pool shall have.
//!
//! Nodes are numbered from 0; a pool of three has 0, 1 and 2, so scaling down takes the highest first and scaling up brings the
//! same names back. Each machine is made when its interface has addresses.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::api::core::v1::{Node, Secret};
use reconcile::Error;
use resources::{
    AgentPool, ArmSpec, ArmStatus, Machine, MachineSpec, NetworkInterface, aks::PoolView, object_name,
    views::NicAddresses,
};
use serde_json::{Value, json};

use crate::{
    NodeIdentity,
    context::{is_of_pool, own},
    drain::{self, Drained},
    names, power,
    reconcile_cluster::{Pass, delete_node, worse},
    status::{self, Progress},
};

/// A machine that is not Ready after this long fails its pool's operation (and is still waited for).
const READY_PATIENCE: Duration = Duration::from_secs(600);

/// Every pool that is wanted or still there: name, where it stands, and its state for the cluster's body.
pub(crate) async fn reconcile_all(pass: &Pass<'_>) -> Result<Vec<(String, (Progress, String))>, Error> {
    let mut out = Vec::new();
    for view in &pass.view.pools {
        let state = reconcile(pass, view).await?;
        out.push((view.name.clone(), state));
    }
    for pool in pass.context.pools.list() {
        let Some(name) = pool.metadata.labels.as_ref().and_then(|l| l.get(names::POOL_LABEL)) else {
            continue;
        };
        let wanted = pass.view.pools.iter().any(|p| &p.name == name);
        if wanted || !is_of_pool(&pool.metadata, pass.cluster.name(), name) {
            continue;
        }
        let progress = shrink(pass, name, 0, true).await?;
        if progress == Progress::Done {
            pass.context.delete::<AgentPool>(None, pool.name()).await?;
        } else {
            out.push((name.clone(), (progress, "Deleting".to_owned())));
        }
    }
    Ok(out)
}

async fn reconcile(pass: &Pass<'_>, view: &PoolView) -> Result<(Progress, String), Error> {
    let id = pass.ids.pool(&view.name);
    let object = ensure_object(pass, view, &id).await?;
    let count = u32::try_from(view.count).unwrap_or(0);
    let mut progress = shrink(pass, &view.name, count, false).await?;
    let mut ready = 0;
    for index in 0..count {
        let node = ensure_node(pass, view, &id, index).await?;
        if node == Progress::Done {
            ready += 1;
        }
        progress = worse(progress, node);
    }
    if let Progress::Working(what) = &mut progress
        && ready < count
    {
        *what = format!("pool {}: {ready} of {count} nodes are Ready", view.name);
    }
    let generation = object.metadata.generation.unwrap_or(0);
    let next = status::next(
        object.status.as_ref(),
        generation,
        &progress,
        status::pool(pass.view, view),
    );
    let state = next.provisioning_state.clone();
    if object.status.as_ref() != Some(&next) {
        let mut object = object;
        object.status = Some(ArmStatus { ..next });
        pass.context.home.update_status(None, &object).await?;
    }
    // A pool that was done stays done for the cluster too.
    Ok((if state == "Succeeded" { Progress::Done } else { progress }, state))
}

/// The AgentPool object: the pool's part of the cluster's body, for everyone who watches pools.
async fn ensure_object(pass: &Pass<'_>, view: &PoolView, id: &str) -> Result<AgentPool, Error> {
    let profiles = pass.cluster.spec.body["properties"]["agentPoolProfiles"].as_array();
    let mut properties = profiles
        .into_iter()
        .flatten()
        .find(|p| p["name"] == view.name.as_str())
        .cloned()
        .unwrap_or_default();
    if let Some(p) = properties.as_object_mut() {
        p.remove("name");
    }
    let body = json!({"properties": properties});
    let name = object_name(id);
    match pass.context.home.get_opt::<AgentPool>(None, &name).await? {
        Some(mut existing) if existing.spec.body != body => {
            existing.spec.body = body;
            pass.context.home.update(None, &existing).await
        }
        Some(existing) => Ok(existing),
        None => {
            let mut pool = AgentPool::new(
                name,
                ArmSpec {
                    id: id.to_owned(),
                    body,
                },
            );
            own(&mut pool.metadata, pass.cluster, id);
            pool.metadata
                .labels
                .get_or_insert_default()
                .insert(names::POOL_LABEL.to_owned(), view.name.clone());
            pass.context.home.create(None, &pool).await
        }
    }
}

/// One node: interface, then certificates, then machine, then Ready.
async fn ensure_node(pass: &Pass<'_>, view: &PoolView, pool_id: &str, index: u32) -> Result<Progress, Error> {
    let node = names::node(&view.name, &pass.ids.cluster, index);
    let machine = names::machine(&node, &pass.ids.object);
    let nic_id = pass.ids.interface(&node);
    let nic_name = object_name(&nic_id);
    let Some(nic) = pass.context.nics.get("", &nic_name) else {
        let subscription = resources::ArmId::parse(&pass.ids.cluster)
            .map(|i| i.subscription)
            .unwrap_or_default();
        let mut nic = interface(
            pass,
            view,
            &nic_id,
            &nic_name,
            &pass.view.subnet_of(&subscription, view),
        );
        nic.metadata
            .labels
            .get_or_insert_default()
            .insert(names::POOL_LABEL.to_owned(), view.name.clone());
        pass.context.create(None, &nic).await?;
        return Ok(Progress::Working(format!("node {node}: making its network interface")));
    };
    let nic_status = nic.status.as_ref();
    let Some(addresses) = nic_status.and_then(|s| NicAddresses::parse(&s.properties)) else {
        return Ok(match nic_status.and_then(|s| s.error.clone()) {
            Some(e) => Progress::Failed(e),
            None => Progress::Working(format!("node {node}: waiting for its addresses")),
        });
    };
    let Some(existing) = pass.context.machines.get("", &machine) else {
        let primary = addresses.primary().map(|a| a.address);
        let identity = NodeIdentity {
            node_name: node.clone(),
            addresses: primary.into_iter().collect(),
        };
        let secret = names::secret(&machine);
        if let Some(progress) = pass.ensure_secret(&secret, &view.name, identity).await? {
            return Ok(progress);
        }
        let mut object = Machine::new(machine, machine_spec(pass, view, pool_id, &node, nic_name, secret));
        own(&mut object.metadata, pass.cluster, &pass.ids.cluster);
        object
            .metadata
            .labels
            .get_or_insert_default()
            .insert(names::POOL_LABEL.to_owned(), view.name.clone());
        pass.context.create(None, &object).await?;
        return Ok(Progress::Working(format!("node {node}: starting its machine")));
    };
    if !existing.spec.running {
        power::switch(pass.context, &existing, true).await?;
        return Ok(Progress::Working(format!("node {node}: switching its machine on")));
    }
    if matches!(
        existing.status.as_ref().map(|s| s.phase.as_str()),
        Some("Stopped" | "Stopping")
    ) {
        // The node object still says Ready from before.
        return Ok(Progress::Working(format!("node {node}: its machine starts")));
    }
    if pass
        .hosted
        .1
        .get::<Node>()
        .get("", &node)
        .is_some_and(|n| status::is_ready(&n))
    {
        return Ok(Progress::Done);
    }
    let machine_status = existing.status.clone().unwrap_or_default();
    if machine_status.phase == "Failed" {
        return Ok(Progress::failed(
            "NodeCreationFailed",
            format!("node {node}: {}", machine_status.message),
        ));
    }
    let created = existing.metadata.creation_timestamp.as_ref().map(|t| t.0);
    let age = created
        .map(|t| apimachinery::time::since(apimachinery::time::now(&*pass.context.clock), t))
        .unwrap_or_default();
    if age > READY_PATIENCE {
        let message = format!(
            "node {node} is not Ready after {} s; its machine is {}",
            age.as_secs(),
            or_pending(&machine_status.phase)
        );
        return Ok(Progress::failed("NodesNotReady", message));
    }
    Ok(Progress::Working(format!(
        "node {node}: waiting for it to be Ready (machine {})",
        or_pending(&machine_status.phase)
    )))
}

fn or_pending(phase: &str) -> &str {
    if phase.is_empty() { "Pending" } else { phase }
}

/// One address for the node and one for every pod that it may run.
fn interface(pass: &Pass<'_>, view: &PoolView, id: &str, name: &str, subnet: &str) -> NetworkInterface {
    let configs: Vec<Value> = (0..=view.max_pods)
        .map(|i| {
            json!({"name": format!("ipconfig{}", i + 1), "properties": {"primary": i == 0, "subnet": {"id": subnet},
                "privateIPAllocationMethod": "Dynamic"}})
        })
        .collect();
    let body = json!({"location": pass.view.location, "tags": {"aks-managed-poolName": view.name},
        "properties": {"ipConfigurations": configs, "enableIPForwarding": true}});
    let mut nic = NetworkInterface::new(
        name,
        ArmSpec {
            id: id.to_owned(),
            body,
        },
    );
    own(&mut nic.metadata, pass.cluster, id);
    nic
}

fn machine_spec(
    pass: &Pass<'_>,
    view: &PoolView,
    pool_id: &str,
    node: &str,
    nic: String,
    secret: String,
) -> MachineSpec {
    MachineSpec {
        node_name: node.to_owned(),
        pool: object_name(pool_id),
        nic,
        vm_size: view.size.name.to_owned(),
        cpu_milli: view.size.cpu_milli,
        memory_bytes: view.size.memory_bytes,
        max_pods: view.max_pods,
        labels: labels(pass, view),
        taints: view.taints.clone(),
        bootstrap: pass.bootstrap(secret),
        running: true,
        host: String::new(),
    }
}

/// AKS's labels, then the pool's own (which win, except for the platform's).
fn labels(pass: &Pass<'_>, view: &PoolView) -> BTreeMap<String, String> {
    let mode = if view.system { "system" } else { "user" };
    let location = pass.view.location.to_lowercase().replace(' ', "");
    let mut out = view.labels.clone();
    for (k, v) in [
        ("agentpool", view.name.as_str()),
        ("kubernetes.azure.com/agentpool", &view.name),
        (
            "kubernetes.azure.com/cluster",
            &label_value(&pass.view.node_resource_group),
        ),
        ("kubernetes.azure.com/mode", mode),
        ("kubernetes.azure.com/role", "agent"),
        ("node.kubernetes.io/instance-type", view.size.name),
        ("topology.kubernetes.io/region", &location),
        ("topology.kubernetes.io/zone", "0"),
    ] {
        out.insert(k.to_owned(), v.to_owned());
    }
    out
}

/// A label's value from a resource group's name: at most 63 characters, and none that labels do not have.
fn label_value(text: &str) -> String {
    let clean: String = text
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '-'
            }
        })
        .take(63)
        .collect();
    clean.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

/// Takes away what is beyond `count`, the highest first: drain, machine, then interface, certificates and Node.
async fn shrink(pass: &Pass<'_>, pool: &str, count: u32, pool_goes: bool) -> Result<Progress, Error> {
    let context = pass.context;
    let cluster = pass.cluster.name();
    let mut progress = Progress::Done;
    let machines = context.machines.list();
    let mut extra: Vec<_> = machines
        .iter()
        .filter(|m| is_of_pool(&m.metadata, cluster, pool))
        .filter(|m| names::index(&m.spec.node_name).is_none_or(|i| i >= count))
        .collect();
    extra.sort_by_key(|m| std::cmp::Reverse(names::index(&m.spec.node_name)));
    for machine in extra {
        let node = &machine.spec.node_name;
        progress = worse(progress, Progress::Working(format!("node {node}: removing it")));
        if machine.metadata.deletion_timestamp.is_some() {
            continue;
        }
        // The last pods of a pool have nowhere else to be only if the pool is the cluster's last, which ARM refuses.
        match drain::step(context, &pass.hosted.0, machine).await? {
            Drained::Yes => context.delete::<Machine>(None, machine.name()).await?,
            Drained::Waiting(pods) => {
                let what = format!("node {node}: moving {pods} pods away");
                progress = Progress::Working(what);
            }
        }
    }
    for nic in context.nics.list() {
        let node = nic
            .spec
            .id
            .rsplit('/')
            .next()
            .and_then(|n| n.strip_suffix("-nic"))
            .unwrap_or_default();
        let beyond = names::index(node).is_none_or(|i| i >= count);
        if !is_of_pool(&nic.metadata, cluster, pool) || !beyond {
            continue;
        }
        let machine = names::machine(node, &pass.ids.object);
        // Asked of home itself: a machine that the cache does not show yet still uses its interface.
        if context.home.get_opt::<Machine>(None, &machine).await?.is_some() {
            continue;
        }
        progress = worse(
            progress,
            Progress::Working(format!("node {node}: removing its network interface")),
        );
        delete_node(&pass.hosted.0, node).await?;
        context
            .delete::<Secret>(Some("kube-system"), &names::secret(&machine))
            .await?;
        context.delete::<NetworkInterface>(None, nic.name()).await?;
    }
    if pool_goes && progress == Progress::Done {
        tracing::info!(cluster, pool, "agent pool removed");
    }
    Ok(progress)
}

//! The Node object and its lease. The lease has a task of its own: nothing that is slow delays it, and trouble of the
//! backend changes a condition and never the lease.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::{
            DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus,
            NodeSystemInfo, Taint,
        },
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{MicroTime, OwnerReference},
    },
    jiff::Timestamp,
};
use serde_json::json;
use stdx::Shutdown;
use tokio::time::sleep;

use crate::{
    api::ApiError,
    client::LEASE_NAMESPACE,
    clock::time,
    config::{Capacity, KUBELET_VERSION, KubeletConfig},
    events::Level,
    kubelet::Core,
};

const RETRY: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Registers the node, then keeps its status, until shutdown.
pub async fn run(core: Arc<Core>, shutdown: Shutdown) {
    if shutdown.or_stop(Box::pin(register(&core))).await.is_none() {
        return;
    }
    core.events
        .node(&core.config.node_name, Level::Normal, "Starting", "Starting kubelet.");
    core.registered.send_replace(true);
    let mut last: Option<NodeStatus> = None;
    let mut room = core.config.pods_limit.clone();
    let mut written = tokio::time::Instant::now();
    loop {
        let next = status(&core, last.as_ref()).await;
        let due = written.elapsed() >= Duration::from_secs(core.config.tuning.node_status_s);
        if due || last.as_ref().is_none_or(|l| differs(l, &next)) {
            match shutdown
                .or_stop(
                    core.config
                        .api
                        .patch_node_status(&core.config.node_name, json!({"status": next})),
                )
                .await
            {
                None => return,
                Some(Ok(_)) => {
                    last = Some(next);
                    written = tokio::time::Instant::now();
                }
                Some(Err(ApiError::NotFound { .. })) => {
                    // Somebody deleted the node under the agent: it is still here, so it says so again.
                    if shutdown.or_stop(Box::pin(register(&core))).await.is_none() {
                        return;
                    }
                    last = None;
                    continue;
                }
                Some(Err(e)) => tracing::warn!(error = %stdx::chain(&e), "node status not written"),
            }
        }
        // Trouble of the backend should show within a lease's renewal.
        let pause = Duration::from_secs(core.config.tuning.lease_renew_s.max(1));
        let sleeping = async {
            match &mut room {
                // Room for one more pod is for the scheduler to know at once. Cancel safe: a change that is not seen stays.
                Some(room) => {
                    let changed = async {
                        if room.changed().await.is_err() {
                            std::future::pending::<()>().await;
                        }
                    };
                    drop(tokio::time::timeout(pause, changed).await);
                }
                None => sleep(pause).await,
            }
        };
        if shutdown.or_stop(sleeping).await.is_none() {
            return;
        }
    }
}

/// Creates the Node, or brings labels and annotations of an existing one up to date. Tries until it works.
async fn register(core: &Core) {
    let mut wait = RETRY;
    loop {
        let wanted = node(&core.config);
        let done = match core.config.api.node(&core.config.node_name).await {
            Ok(found) => {
                let merged = merge(found.clone(), &wanted);
                if merged.metadata == found.metadata && merged.spec == found.spec {
                    Ok(found)
                } else {
                    core.config.api.update_node(&merged).await
                }
            }
            Err(ApiError::NotFound { .. }) => {
                let mut wanted = wanted;
                wanted.status = Some(status(core, None).await);
                core.config.api.create_node(&wanted).await
            }
            Err(e) => Err(e),
        };
        match done {
            Ok(node) => {
                *core.node_uid.lock() = node.metadata.uid;
                return;
            }
            Err(e) => tracing::warn!(node = %core.config.node_name, error = %stdx::chain(&e), "node not registered"),
        }
        sleep(wait).await;
        wait = (wait * 2).min(RETRY_MAX);
    }
}

/// Taints are for a node that is new: on one that exists they are other people's business, and the API refuses them.
fn merge(mut found: Node, wanted: &Node) -> Node {
    found
        .metadata
        .labels
        .get_or_insert_default()
        .extend(wanted.metadata.labels.clone().unwrap_or_default());
    let annotations = wanted.metadata.annotations.clone().unwrap_or_default();
    if !annotations.is_empty() {
        found.metadata.annotations.get_or_insert_default().extend(annotations);
    }
    let spec = found.spec.get_or_insert_default();
    let wanted = wanted.spec.clone().unwrap_or_default();
    if spec.provider_id.is_none() {
        spec.provider_id = wanted.provider_id;
    }
    found
}

/// `x86_64` is `amd64` to Kubernetes.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The Node as this configuration wants it, without status.
pub fn node(config: &KubeletConfig) -> Node {
    let mut labels: BTreeMap<String, String> = [
        ("kubernetes.io/hostname", config.node_name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture()),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", architecture()),
    ]
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .into();
    if !config.instance_type.is_empty() {
        labels.insert("node.kubernetes.io/instance-type".into(), config.instance_type.clone());
    }
    labels.extend(config.labels.clone());
    let taints: Vec<Taint> = config.taints.iter().filter_map(|t| taint(t)).collect();
    let mut node = Node {
        spec: Some(NodeSpec {
            provider_id: config.provider_id.clone(),
            taints: (!taints.is_empty()).then_some(taints),
            ..Default::default()
        }),
        ..Default::default()
    };
    node.metadata.name = Some(config.node_name.clone());
    node.metadata.labels = Some(labels);
    node.metadata.annotations = (!config.annotations.is_empty()).then(|| config.annotations.clone());
    node
}

/// `key=value:Effect` or `key:Effect`.
fn taint(text: &str) -> Option<Taint> {
    let (rest, effect) = text.rsplit_once(':')?;
    let (key, value) = match rest.split_once('=') {
        Some((k, v)) => (k, Some(v.to_owned()).filter(|v| !v.is_empty())),
        None => (rest, None),
    };
    Some(Taint {
        key: key.to_owned(),
        value,
        effect: effect.to_owned(),
        time_added: None,
    })
}

/// Capacity as the wire's quantities.
pub fn quantities(c: &Capacity) -> BTreeMap<String, Quantity> {
    let cpu = if c.cpu_milli % 1000 == 0 {
        (c.cpu_milli / 1000).to_string()
    } else {
        format!("{}m", c.cpu_milli)
    };
    let mut out: BTreeMap<String, Quantity> = [
        ("cpu", cpu),
        ("memory", format!("{}Ki", c.memory_bytes / 1024)),
        ("pods", c.pods.to_string()),
        ("ephemeral-storage", format!("{}Ki", c.ephemeral_storage_bytes / 1024)),
    ]
    .map(|(k, v)| (k.to_owned(), Quantity(v)))
    .into();
    out.extend(c.extended.iter().map(|(k, v)| (k.clone(), Quantity(v.to_string()))));
    out
}

async fn status(core: &Core, last: Option<&NodeStatus>) -> NodeStatus {
    let config = &core.config;
    let now = core.now();
    let mut conditions = vec![
        condition(
            "MemoryPressure",
            false,
            "KubeletHasSufficientMemory",
            "kubelet has sufficient memory available",
        ),
        condition(
            "DiskPressure",
            false,
            "KubeletHasNoDiskPressure",
            "kubelet has no disk pressure",
        ),
        condition(
            "PIDPressure",
            false,
            "KubeletHasSufficientPID",
            "kubelet has sufficient PID available",
        ),
        condition("Ready", true, "KubeletReady", "kubelet is posting ready status"),
    ];
    match config.hooks.backend_trouble().await {
        Some(why) => conditions.push(condition("BackendReachable", false, "BackendTrouble", &why)),
        None if last.is_some_and(|l| l.conditions.iter().flatten().any(|c| c.type_ == "BackendReachable")) => {
            conditions.push(condition(
                "BackendReachable",
                true,
                "BackendReachable",
                "the backend answers",
            ));
        }
        None => {}
    }
    for c in &mut conditions {
        let old = last
            .iter()
            .flat_map(|l| l.conditions.iter().flatten())
            .find(|o| o.type_ == c.type_ && o.status == c.status);
        c.last_heartbeat_time = Some(time(now));
        c.last_transition_time = old
            .and_then(|o| o.last_transition_time.clone())
            .or_else(|| Some(time(now)));
    }
    let mut addresses: Vec<NodeAddress> = config
        .addresses
        .iter()
        .map(|ip| NodeAddress {
            address: ip.to_string(),
            type_: "InternalIP".into(),
        })
        .collect();
    addresses.push(NodeAddress {
        address: config.node_name.clone(),
        type_: "Hostname".into(),
    });
    let capacity = config.capacity_now();
    NodeStatus {
        addresses: Some(addresses),
        capacity: Some(quantities(&capacity)),
        allocatable: Some(quantities(&capacity)),
        conditions: Some(conditions),
        daemon_endpoints: (config.port != 0).then(|| NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint {
                port: i32::from(config.port),
            }),
        }),
        node_info: Some(info(core)),
        ..Default::default()
    }
}

fn condition(type_: &str, value: bool, reason: &str, message: &str) -> NodeCondition {
    NodeCondition {
        type_: type_.into(),
        status: if value { "True" } else { "False" }.into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        ..Default::default()
    }
}

fn info(core: &Core) -> NodeSystemInfo {
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .map(|s| s.trim().to_owned())
            .unwrap_or_default()
    };
    NodeSystemInfo {
        architecture: architecture().into(),
        boot_id: read("/proc/sys/kernel/random/boot_id"),
        container_runtime_version: core.config.runtime_version.clone(),
        kernel_version: read("/proc/sys/kernel/osrelease"),
        kubelet_version: KUBELET_VERSION.into(),
        machine_id: read("/etc/machine-id"),
        operating_system: "linux".into(),
        os_image: core.config.os_image.clone(),
        ..Default::default()
    }
}

/// Differs in more than heartbeats.
fn differs(a: &NodeStatus, b: &NodeStatus) -> bool {
    let still = |s: &NodeStatus| {
        let mut s = s.clone();
        for c in s.conditions.iter_mut().flatten() {
            c.last_heartbeat_time = None;
        }
        s
    };
    still(a) != still(b)
}

/// Keeps the lease, from the moment the node is registered. A lost lease is made anew.
pub async fn lease(core: Arc<Core>, shutdown: Shutdown) {
    let mut registered = core.registered.subscribe();
    if shutdown.or_stop(registered.wait_for(|r| *r)).await.is_none() {
        return;
    }
    let mut held: Option<Lease> = None;
    loop {
        let renewed = match shutdown.or_stop(renew(&core, held.take())).await {
            None => return,
            Some(r) => r,
        };
        let ok = renewed.is_ok();
        match renewed {
            Ok(lease) => held = Some(lease),
            Err(e) => tracing::warn!(error = %stdx::chain(&e), "lease not renewed"),
        }
        let pause = if ok {
            Duration::from_secs(core.config.tuning.lease_renew_s)
        } else {
            RETRY * 5
        };
        if shutdown.or_stop(sleep(pause)).await.is_none() {
            return;
        }
    }
}

async fn renew(core: &Core, held: Option<Lease>) -> Result<Lease, ApiError> {
    let api = &core.config.api;
    let name = &core.config.node_name;
    if let Some(held) = held {
        match api.update_lease(&stamped(core, held)).await {
            Err(ApiError::Conflict { .. } | ApiError::NotFound { .. }) => {}
            other => return other,
        }
    }
    match api.lease(name).await {
        Ok(found) => api.update_lease(&stamped(core, found)).await,
        Err(ApiError::NotFound { .. }) => {
            let mut lease = Lease::default();
            lease.metadata.name = Some(name.clone());
            lease.metadata.namespace = Some(LEASE_NAMESPACE.into());
            lease.metadata.owner_references = core.node_uid.lock().clone().map(|uid| {
                vec![OwnerReference {
                    api_version: "v1".into(),
                    kind: "Node".into(),
                    name: name.clone(),
                    uid,
                    ..Default::default()
                }]
            });
            api.create_lease(&stamped(core, lease)).await
        }
        Err(e) => Err(e),
    }
}

fn stamped(core: &Core, mut lease: Lease) -> Lease {
    let now: Timestamp = core.now();
    let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
    spec.holder_identity = Some(core.config.node_name.clone());
    spec.lease_duration_seconds = Some(core.config.tuning.lease_duration_s);
    spec.renew_time = Some(MicroTime(now));
    lease
}

/// Deletes the Node object (and with it, by ownership, the lease): the node will not come back.
///
/// # Errors
/// The API's answer, unless the node is gone already.
pub async fn deregister(core: &Core) -> Result<(), ApiError> {
    let node = match core.config.api.node(&core.config.node_name).await {
        Ok(node) => node,
        Err(ApiError::NotFound { .. }) => return Ok(()),
        Err(e) => return Err(e),
    };
    match core
        .config
        .api
        .delete_node(&core.config.node_name, node.metadata.uid.as_deref().unwrap_or_default())
        .await
    {
        Err(ApiError::NotFound { .. }) => Ok(()),
        other => other,
    }
}

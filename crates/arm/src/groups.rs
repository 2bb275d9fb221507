//! Deletion of resource groups: everything inside goes first, in dependency order, the group last.
//!
//! Deleting a group sets its deletion time; this controller then asks for the deletion of the earliest stage that still has
//! objects, and looks again when one of them changes. An object that stays (its own finalizer is at work) holds the group.

use std::time::Duration;

use reconcile::{Change, Error, Informers, Queue, Requeue, run_controller};
use resources::{
    AgentPool, ContainerGroup, GROUP_FINALIZER, GROUP_LABEL, LoadBalancer, ManagedCluster, NetworkInterface,
    PublicIPAddress, ResourceGroup, VirtualNetwork,
};
use stdx::Shutdown;

use crate::home::{ArmObject, Home};

/// What is deleted together; a stage begins when the ones before it are empty.
const STAGES: &[&[&str]] = &[
    &["managedclusters"],
    // Pools go with their cluster; one that is left over has lost it.
    &["agentpools", "containergroups"],
    &["loadbalancers"],
    &["publicipaddresses", "networkinterfaces"],
    &["virtualnetworks"],
    // What networks name, once they are gone.
    &[
        "networksecuritygroups",
        "routetables",
        "applicationsecuritygroups",
        "privatednszones",
        "roleassignments",
    ],
];

/// Runs until `shutdown`.
pub async fn run(home: Home, informers: Informers, shutdown: Shutdown) {
    let queue: Queue<String> = Queue::new();
    let q = queue.clone();
    informers
        .get::<ResourceGroup>()
        .on_change(move |c| q.add(c.key().name.clone()));
    watch::<ManagedCluster>(&informers, &queue);
    watch::<AgentPool>(&informers, &queue);
    watch::<ContainerGroup>(&informers, &queue);
    watch::<LoadBalancer>(&informers, &queue);
    watch::<PublicIPAddress>(&informers, &queue);
    watch::<NetworkInterface>(&informers, &queue);
    watch::<VirtualNetwork>(&informers, &queue);
    let work = move |name: String| {
        let home = home.clone();
        async move { reconcile(&home, &name).await }
    };
    run_controller("arm-groups", queue, 2, work, shutdown).await;
}

fn watch<K: reconcile::Kind>(informers: &Informers, queue: &Queue<String>) {
    let queue = queue.clone();
    informers.get::<K>().on_change(move |change: &Change| {
        if let Some(group) = change.latest().header.labels.get(GROUP_LABEL) {
            queue.add(group.clone());
        }
    });
}

async fn reconcile(home: &Home, name: &str) -> Result<Requeue, Error> {
    let Some(group) = home.get::<ArmObject>("resourcegroups", name).await? else {
        return Ok(Requeue::Done);
    };
    let held = group.metadata.finalizers.iter().flatten().any(|f| f == GROUP_FINALIZER);
    if !group.is_deleting() || !held {
        return Ok(Requeue::Done);
    }
    for stage in STAGES {
        let mut left = 0;
        for plural in *stage {
            for object in home.objects(plural, Some(&group.spec.id)).await? {
                left += 1;
                if !object.is_deleting() {
                    home.delete(plural, object.name()).await?;
                }
            }
        }
        if left > 0 {
            return Ok(Requeue::After(Duration::from_secs(1)));
        }
    }
    let mut group = group;
    group.metadata.finalizers = group
        .metadata
        .finalizers
        .map(|f| f.into_iter().filter(|f| f != GROUP_FINALIZER).collect());
    match home.update("resourcegroups", name, &group).await {
        Err(e) if !e.is_not_found() => Err(e),
        _ => Ok(Requeue::Done),
    }
}

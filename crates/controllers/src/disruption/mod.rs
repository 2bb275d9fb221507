//! Keeps the status of PodDisruptionBudgets: how many pods are healthy, how many are needed, how many may be evicted.
//!
//! Evictions are checked by the API server against that status, which it lowers with each one it allows. How many pods there
//! should be is asked of the controllers of the selected pods: ReplicaSets (and their Deployments).

pub mod plan;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use reconcile::{Error, Informer, Key, Queue, Requeue, run_controller};

use crate::Context;
use crate::common::{name_of, selector};
use plan::plan;

const NAME: &str = "disruption-controller";
const WORKERS: usize = 2;

struct Controller {
    context: Context,
    budgets: Informer<PodDisruptionBudget>,
    pods: Informer<Pod>,
    sets: Informer<ReplicaSet>,
    deployments: Informer<Deployment>,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        budgets: context.informers.get(),
        pods: context.informers.get(),
        sets: context.informers.get(),
        deployments: context.informers.get(),
        context,
    });
    let sink = queue.clone();
    this.budgets.on_change(move |change| sink.add(change.key().clone()));
    let (sink, budgets) = (queue.clone(), this.budgets.clone());
    this.pods.on_change(move |change| {
        for budget in budgets.list_in(&change.key().ns) {
            let selector = selector(budget.spec.as_ref().and_then(|s| s.selector.as_ref()));
            let selects = [&change.old, &change.new]
                .into_iter()
                .flatten()
                .any(|e| selector.matches(&e.header.labels));
            if selects {
                sink.add(Key::new(change.key().ns.clone(), name_of(&*budget)));
            }
        }
    });
    // How many there should be changes with the owners.
    let (sink, budgets) = (queue.clone(), this.budgets.clone());
    this.sets.on_change(move |change| {
        for budget in budgets.list_in(&change.key().ns) {
            sink.add(Key::new(change.key().ns.clone(), name_of(&*budget)));
        }
    });
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.budgets.wait_synced().await;
        this.pods.wait_synced().await;
        this.sets.wait_synced().await;
        this.deployments.wait_synced().await;
    };
    if shutdown.or_stop(synced).await.is_none() {
        return;
    }
    let work = move |key| {
        let this = this.clone();
        async move { this.reconcile(key).await }
    };
    run_controller(NAME, queue, WORKERS, work, shutdown).await;
}

impl Controller {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let Some(budget) = self.budgets.by_key(&key) else {
            return Ok(Requeue::Done);
        };
        let wire = budget.spec.as_ref().and_then(|s| s.selector.as_ref());
        let selector = selector(wire);
        let pods: Vec<Arc<Pod>> = self
            .pods
            .store()
            .list_in(&key.ns)
            .iter()
            .filter(|e| selector.matches(&e.header.labels))
            .filter_map(|e| self.pods.typed(e))
            .collect();
        let (status, requeue) = plan(&budget, &pods, self.expected(&key.ns, &pods), self.context.now());
        if budget.status.as_ref() != Some(&status) {
            let mut update = (*budget).clone();
            update.status = Some(status);
            // At the version that was read: an eviction that came between must not be forgotten.
            match self.context.client.update_status(Some(&key.ns), &update).await {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
        }
        Ok(requeue.map_or(Requeue::Done, Requeue::After))
    }

    /// How many pods the controllers of these pods want together.
    fn expected(&self, namespace: &str, pods: &[Arc<Pod>]) -> Result<i32, String> {
        let mut wanted: BTreeMap<String, i32> = BTreeMap::new();
        for pod in pods {
            let owners = pod.metadata.owner_references.iter().flatten();
            let Some(owner) = owners.into_iter().find(|o| o.controller == Some(true)) else {
                return Err(format!("found no controller ref for pod {:?}", name_of(&**pod)));
            };
            let set = match owner.kind.as_str() {
                "ReplicaSet" => self.sets.get(namespace, &owner.name),
                other => return Err(format!("{other} does not implement the scale subresource")),
            };
            // An owner that is gone wants nothing.
            let Some(set) = set else { continue };
            let deployment = set
                .metadata
                .owner_references
                .iter()
                .flatten()
                .find(|o| o.controller == Some(true) && o.kind == "Deployment")
                .and_then(|o| self.deployments.get(namespace, &o.name));
            match deployment {
                Some(d) => {
                    let uid = d.metadata.uid.clone().unwrap_or_default();
                    wanted.insert(uid, d.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1));
                }
                None => {
                    wanted.insert(
                        owner.uid.clone(),
                        set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1),
                    );
                }
            }
        }
        Ok(wanted.values().sum())
    }
}

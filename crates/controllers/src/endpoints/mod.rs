//! Publishes the pods behind each Service: EndpointSlices, and Endpoints for older clients.
//!
//! Watches Services, Pods and what it writes. A pod's change wakes the Services that select its old or new labels.
//! Services without selector are left to whoever made their endpoints.

pub mod plan;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use apimachinery::selector::LabelSelector;
use k8s_openapi::api::core::v1::{Endpoints, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use reconcile::{Change, DeleteParams, Error, Informer, Key, Queue, Requeue, run_controller};

use crate::Context;
use crate::common::{STALE_RECHECK, Unseen, is_deleting, name_of, uid_of};
use plan::{Backend, backends, has_backends, is_slice_of};

const WORKERS: usize = 4;
const ZONE: &str = "topology.kubernetes.io/zone";

/// What both controllers read.
struct World {
    context: Context,
    services: Informer<Service>,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
}

impl World {
    /// Opens the informers and lets Services and Pods wake their Services.
    fn open(context: Context, queue: &Queue<Key>) -> Self {
        let this = Self {
            services: context.informers.get(),
            pods: context.informers.get(),
            nodes: context.informers.get(),
            context,
        };
        let sink = queue.clone();
        this.services.on_change(move |change| sink.add(change.key().clone()));
        let (sink, services) = (queue.clone(), this.services.clone());
        this.pods.on_change(move |change| wake(change, &services, &sink));
        this
    }

    async fn synced(&self) {
        self.services.wait_synced().await;
        self.pods.wait_synced().await;
        self.nodes.wait_synced().await;
    }

    fn backends(&self, service: &Service) -> Vec<Backend> {
        let selector = selector(service);
        let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
        let entries = self.pods.store().list_in(namespace);
        let selected = entries.iter().filter(|e| selector.matches(&e.header.labels));
        let pods: Vec<Arc<Pod>> = selected.filter_map(|e| self.pods.typed(e)).collect();
        let zone = |node: &str| {
            let entry = self.nodes.store().get(&Key::new("", node))?;
            entry.header.labels.get(ZONE).cloned()
        };
        backends(service, &pods, zone)
    }
}

fn selector(service: &Service) -> LabelSelector {
    LabelSelector::from_map(
        service
            .spec
            .as_ref()
            .and_then(|s| s.selector.clone())
            .unwrap_or_default(),
    )
}

/// Queues the Services that select the pod before or after its change.
fn wake(change: &Change, services: &Informer<Service>, sink: &Queue<Key>) {
    let key = change.key();
    for service in services.list_in(&key.ns) {
        if !has_backends(&service) {
            continue;
        }
        let selector = selector(&service);
        let selects = [&change.old, &change.new]
            .into_iter()
            .flatten()
            .any(|e| selector.matches(&e.header.labels));
        if selects {
            sink.add(Key::new(key.ns.clone(), name_of(&*service)));
        }
    }
}

/// Runs the EndpointSlice controller.
pub(crate) async fn run_slices(context: Context) {
    let queue = Queue::new();
    let shutdown = context.shutdown.clone();
    let world = World::open(context, &queue);
    let slices: Informer<EndpointSlice> = world.context.informers.get();
    let sink = queue.clone();
    slices.on_change(move |change| {
        for entry in [&change.old, &change.new].into_iter().flatten() {
            if let Some(service) = entry.header.labels.get(plan::SERVICE_NAME) {
                sink.add(Key::new(entry.header.key.ns.clone(), service.clone()));
            }
        }
    });
    let synced = async {
        world.synced().await;
        slices.wait_synced().await;
    };
    if shutdown.or_stop(synced).await.is_none() {
        return;
    }
    let controller = Arc::new(Slices {
        world,
        slices,
        unseen: Unseen::default(),
    });
    let work = move |key| {
        let controller = controller.clone();
        async move { controller.reconcile(key).await }
    };
    run_controller("endpointslice-controller", queue, WORKERS, work, shutdown).await;
}

struct Slices {
    world: World,
    slices: Informer<EndpointSlice>,
    unseen: Unseen,
}

impl Slices {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let Some(service) = self.world.services.by_key(&key) else {
            // The slices go by their owner reference.
            self.unseen.forget(&key);
            return Ok(Requeue::Done);
        };
        if !has_backends(&service) || is_deleting(&*service) {
            return Ok(Requeue::Done);
        }
        if !self.unseen.caught_up(&key, &self.slices) {
            return Ok(Requeue::After(STALE_RECHECK));
        }
        let entries = self.slices.store().list_in(&key.ns);
        let labelled = entries
            .iter()
            .filter(|e| e.header.labels.get(plan::SERVICE_NAME) == Some(&key.name) && !e.header.deleting);
        let existing: Vec<Arc<EndpointSlice>> = labelled
            .filter_map(|e| self.slices.typed(e))
            .filter(|s| is_slice_of(s, &service))
            .collect();
        let plan = plan::slices(&service, &self.world.backends(&service), &existing);
        let client = &self.world.context.client;
        // New and changed slices first: an endpoint that moves is for a moment in two slices rather than in none.
        for slice in &plan.create {
            match client.create(Some(&key.ns), slice).await {
                Ok(slice) => self.unseen.wrote(&key, &slice),
                Err(error) if error.is_namespace_terminating() => return Ok(Requeue::Done),
                Err(error) => return Err(error),
            }
        }
        for slice in &plan.update {
            let written: EndpointSlice = client.update(Some(&key.ns), slice).await?;
            self.unseen.wrote(&key, &written);
        }
        for name in &plan.delete {
            let uid = existing
                .iter()
                .find(|s| name_of(&***s) == name)
                .map(|s| uid_of(&**s).to_owned());
            match client
                .delete::<EndpointSlice>(
                    Some(&key.ns),
                    name,
                    &DeleteParams {
                        uid,
                        ..Default::default()
                    },
                )
                .await
            {
                Err(error) if error.is_not_found() => {}
                other => other?,
            }
        }
        Ok(Requeue::Done)
    }
}

/// Runs the Endpoints controller.
pub(crate) async fn run_endpoints(context: Context) {
    let queue = Queue::new();
    let shutdown = context.shutdown.clone();
    let world = World::open(context, &queue);
    let endpoints: Informer<Endpoints> = world.context.informers.get();
    let sink = queue.clone();
    endpoints.on_change(move |change| sink.add(change.key().clone()));
    let synced = async {
        world.synced().await;
        endpoints.wait_synced().await;
    };
    if shutdown.or_stop(synced).await.is_none() {
        return;
    }
    let controller = Arc::new(Mirror {
        world,
        endpoints,
        unseen: Unseen::default(),
    });
    let work = move |key| {
        let controller = controller.clone();
        async move { controller.reconcile(key).await }
    };
    run_controller("endpoints-controller", queue, WORKERS, work, shutdown).await;
}

struct Mirror {
    world: World,
    endpoints: Informer<Endpoints>,
    unseen: Unseen,
}

impl Mirror {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let client = &self.world.context.client;
        if !self.unseen.caught_up(&key, &self.endpoints) {
            return Ok(Requeue::After(STALE_RECHECK));
        }
        let old = self.endpoints.by_key(&key);
        let Some(service) = self.world.services.by_key(&key) else {
            self.unseen.forget(&key);
            if let Some(old) = old.filter(|e| plan::is_ours(e)) {
                let params = DeleteParams::uid(uid_of(&*old));
                match client.delete::<Endpoints>(Some(&key.ns), &key.name, &params).await {
                    Err(error) if error.is_not_found() || error.is_conflict() => {}
                    other => other?,
                }
            }
            return Ok(Requeue::Done);
        };
        if !has_backends(&service) || is_deleting(&*service) {
            return Ok(Requeue::Done);
        }
        let wanted = plan::endpoints(&service, &self.world.backends(&service), old.as_deref());
        let written: Endpoints = match &old {
            Some(old) if **old == wanted => return Ok(Requeue::Done),
            Some(_) => client.update(Some(&key.ns), &wanted).await?,
            None => match client.create(Some(&key.ns), &wanted).await {
                Err(error) if error.is_namespace_terminating() => return Ok(Requeue::Done),
                other => other?,
            },
        };
        self.unseen.wrote(&key, &written);
        Ok(Requeue::Done)
    }
}

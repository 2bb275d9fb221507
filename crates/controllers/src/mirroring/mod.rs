//! Mirrors Endpoints that somebody made by hand into EndpointSlices, which is what proxies and DNS read.
//!
//! Watches Endpoints, Services and the slices it made. Endpoints of Services with a selector are the endpoint
//! controllers' business.

pub mod plan;

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Endpoints, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use reconcile::{DeleteParams, Error, Informer, Key, Queue, Requeue, run_controller};

use crate::Context;
use crate::common::{STALE_RECHECK, Unseen, is_deleting, name_of, uid_of};
use crate::endpoints::plan::{MANAGED_BY, SERVICE_NAME, SlicePlan};
use plan::{MANAGER, is_mirrored, plan};

const NAME: &str = "endpointslicemirroring-controller";
const WORKERS: usize = 2;

struct Controller {
    context: Context,
    endpoints: Informer<Endpoints>,
    services: Informer<Service>,
    slices: Informer<EndpointSlice>,
    unseen: Unseen,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        endpoints: context.informers.get(),
        services: context.informers.get(),
        slices: context.informers.get(),
        unseen: Unseen::default(),
        context,
    });
    let sink = queue.clone();
    this.endpoints.on_change(move |change| sink.add(change.key().clone()));
    let sink = queue.clone();
    this.services.on_change(move |change| sink.add(change.key().clone()));
    let sink = queue.clone();
    this.slices.on_change(move |change| {
        for entry in [&change.old, &change.new].into_iter().flatten() {
            let labels = &entry.header.labels;
            if labels.get(MANAGED_BY).map(String::as_str) == Some(MANAGER)
                && let Some(service) = labels.get(SERVICE_NAME)
            {
                sink.add(Key::new(entry.header.key.ns.clone(), service.clone()));
            }
        }
    });
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.endpoints.wait_synced().await;
        this.services.wait_synced().await;
        this.slices.wait_synced().await;
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
        if !self.unseen.caught_up(&key, &self.slices) {
            return Ok(Requeue::After(STALE_RECHECK));
        }
        let endpoints = self.endpoints.by_key(&key);
        let service = self.services.by_key(&key);
        let existing: Vec<Arc<EndpointSlice>> = self
            .slices
            .store()
            .list_in(&key.ns)
            .iter()
            .filter(|e| {
                let labels = &e.header.labels;
                labels.get(SERVICE_NAME) == Some(&key.name)
                    && labels.get(MANAGED_BY).map(String::as_str) == Some(MANAGER)
                    && !e.header.deleting
            })
            .filter_map(|e| self.slices.typed(e))
            .collect();
        let mirrored = endpoints.filter(|e| !is_deleting(&**e) && is_mirrored(e, service.as_deref()));
        let plan = match mirrored {
            Some(endpoints) => {
                let (plan, skipped) = plan(&endpoints, &existing);
                if skipped > 0 {
                    tracing::warn!(ns = key.ns, name = key.name, skipped, "addresses that are not mirrored");
                }
                plan
            }
            None => {
                self.unseen.forget(&key);
                SlicePlan {
                    delete: existing.iter().map(|s| name_of(&**s).to_owned()).collect(),
                    ..SlicePlan::default()
                }
            }
        };
        let client = &self.context.client;
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
            let params = DeleteParams {
                uid,
                ..DeleteParams::default()
            };
            match client.delete::<EndpointSlice>(Some(&key.ns), name, &params).await {
                Err(error) if error.is_not_found() || error.is_conflict() => {}
                other => other?,
            }
        }
        Ok(Requeue::Done)
    }
}

//! Repairs the IPAddress objects of Services: makes those that are missing, removes those whose Service is gone.
//!
//! The API server writes both in one transaction, so there is work only after somebody edited by hand, or for Services
//! older than their address objects. What is to go is first asked of the server.

pub mod plan;

use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::IPAddress;
use reconcile::{DeleteParams, Error, EventType, Informer, Key, Queue, Recorder, Requeue, run_controller};

use crate::Context;
use crate::common::uid_of;
use plan::{Repair, address_of, object, plan};

const NAME: &str = "ipallocator-repair-controller";

struct Controller {
    context: Context,
    recorder: Recorder,
    services: Informer<Service>,
    addresses: Informer<IPAddress>,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        recorder: context.recorder.for_component(NAME),
        services: context.informers.get(),
        addresses: context.informers.get(),
        context,
    });
    let sink = queue.clone();
    this.addresses.on_change(move |change| sink.add(change.key().clone()));
    let (sink, services) = (queue.clone(), this.services.clone());
    this.services.on_change(move |change| {
        for entry in [&change.old, &change.new].into_iter().flatten() {
            if let Some(service) = services.typed(entry)
                && let Some(address) = address_of(&service)
            {
                sink.add(Key::new("", address));
            }
        }
    });
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.services.wait_synced().await;
        this.addresses.wait_synced().await;
    };
    if shutdown.or_stop(synced).await.is_none() {
        return;
    }
    let work = move |key| {
        let this = this.clone();
        async move { this.reconcile(key).await }
    };
    run_controller(NAME, queue, 2, work, shutdown).await;
}

impl Controller {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let address = self.addresses.by_key(&key);
        let services: Vec<Arc<Service>> = self
            .services
            .list()
            .into_iter()
            .filter(|s| address_of(s) == Some(key.name.as_str()))
            .collect();
        let client = &self.context.client;
        match plan(address.as_deref(), &services) {
            Repair::Nothing => {}
            Repair::Make(service) => {
                let made = client.create(None, &object(&key.name, &service)).await;
                match made {
                    Err(error) if error.is_already_exists() => {}
                    Err(error) => return Err(error),
                    Ok(_) => {
                        let text = format!("Cluster IP {} has no IPAddress; repairing", key.name);
                        self.recorder
                            .event(&*service, EventType::Warning, "ClusterIPNotAllocated", text);
                    }
                }
            }
            Repair::Remove => {
                let Some(address) = address else {
                    return Ok(Requeue::Done);
                };
                // Our view of services may be behind: the service that holds the address may just have been made.
                let parent = address.spec.parent_ref.clone();
                let (namespace, name) = (parent.namespace.unwrap_or_default(), parent.name);
                let live: Option<Service> = client.get_opt(Some(&namespace), &name).await?;
                if live.is_some_and(|s| address_of(&s) == Some(key.name.as_str())) {
                    return Ok(Requeue::Done);
                }
                let params = DeleteParams {
                    resource_version: address.metadata.resource_version.clone(),
                    ..DeleteParams::uid(uid_of(&*address))
                };
                match client.delete::<IPAddress>(None, &key.name, &params).await {
                    Err(error) if error.is_not_found() => {}
                    other => other?,
                }
            }
        }
        Ok(Requeue::Done)
    }
}

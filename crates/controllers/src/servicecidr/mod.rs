//! Says which ServiceCIDRs addresses are given out from, and keeps one alive while its addresses are in use.
//!
//! Watches ServiceCIDRs and IPAddresses. A range carries a finalizer; it goes when every address in it lies in another
//! range too.

pub mod plan;

use std::sync::Arc;

use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use reconcile::{Error, Informer, Key, Patch, Queue, Requeue, run_controller};
use serde_json::json;

use crate::Context;
use crate::common::{name_of, uid_of};
use plan::{FINALIZER, Step, plan};

const NAME: &str = "service-cidr-controller";

struct Controller {
    context: Context,
    ranges: Informer<ServiceCIDR>,
    addresses: Informer<IPAddress>,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        ranges: context.informers.get(),
        addresses: context.informers.get(),
        context,
    });
    // One range's end changes whether another covers, so every range is looked at; there are few.
    let (sink, ranges) = (queue.clone(), this.ranges.clone());
    this.ranges.on_change(move |change| {
        sink.add(change.key().clone());
        for other in ranges.store().list().iter().filter(|e| e.header.deleting) {
            sink.add(other.header.key.clone());
        }
    });
    let (sink, ranges) = (queue.clone(), this.ranges.clone());
    this.addresses.on_change(move |change| {
        if change.new.is_none() {
            for other in ranges.store().list().iter().filter(|e| e.header.deleting) {
                sink.add(other.header.key.clone());
            }
        }
    });
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.ranges.wait_synced().await;
        this.addresses.wait_synced().await;
    };
    if shutdown.or_stop(synced).await.is_none() {
        return;
    }
    let work = move |key| {
        let this = this.clone();
        async move { this.reconcile(key).await }
    };
    run_controller(NAME, queue, 1, work, shutdown).await;
}

impl Controller {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let Some(range) = self.ranges.by_key(&key) else {
            return Ok(Requeue::Done);
        };
        let others: Vec<Arc<ServiceCIDR>> = self
            .ranges
            .list()
            .into_iter()
            .filter(|r| name_of(&**r) != key.name)
            .collect();
        let addresses: Vec<Arc<IPAddress>> = self.addresses.list();
        let client = &self.context.client;
        let name = key.name.as_str();
        let version = (uid_of(&*range), range.metadata.resource_version.clone());
        let finalizers = range.metadata.finalizers.clone().unwrap_or_default();
        let meta = |finalizers: Vec<String>| {
            Patch::Merge(
                json!({"metadata": {"uid": version.0, "resourceVersion": version.1, "finalizers": finalizers}}),
            )
        };
        let written = match plan(&range, &others, &addresses, self.context.now()) {
            Step::Nothing => return Ok(Requeue::Done),
            Step::Hold => {
                let mut finalizers = finalizers;
                finalizers.push(FINALIZER.to_owned());
                client.patch::<ServiceCIDR>(None, name, &meta(finalizers), None).await
            }
            Step::Release => {
                let mut finalizers = finalizers;
                finalizers.retain(|f| f != FINALIZER);
                client.patch::<ServiceCIDR>(None, name, &meta(finalizers), None).await
            }
            Step::Say(condition) => {
                let patch = Patch::Merge(json!({
                    "metadata": {"uid": version.0, "resourceVersion": version.1},
                    "status": {"conditions": [condition]},
                }));
                client.patch::<ServiceCIDR>(None, name, &patch, Some("status")).await
            }
        };
        match written {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(Requeue::Done),
        }
    }
}

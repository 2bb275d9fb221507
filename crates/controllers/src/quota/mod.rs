//! Keeps the usage in each ResourceQuota's status true: what deletions and ended pods give back.
//!
//! What is made is counted by admission in the same transaction. This controller counts from the objects themselves, read
//! from the server after the quota was read, and writes at the revision of that quota. So an object that admission counted
//! is either in the lists, or its counting has moved the quota and the write is refused and done again: the status is
//! never below what exists.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::usage;
use futures::future::try_join_all;
use http::Method;
use k8s_openapi::api::core::v1::{Pod, ResourceQuota};
use reconcile::{Change, Error, Informer, Key, Queue, Requeue, ResourceId, run_controller};
use serde_json::{Value, json};

use crate::Context;
use crate::common::is_terminal;

const NAME: &str = "resourcequota-controller";
const WORKERS: usize = 4;
/// Deletions come in bursts; one count serves a whole burst.
const SETTLE: Duration = Duration::from_millis(50);

struct Controller {
    context: Context,
    quotas: Informer<ResourceQuota>,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let quotas: Informer<ResourceQuota> = context.informers.get();
    let (sink, typed) = (queue.clone(), quotas.clone());
    quotas.on_change(move |change| {
        let Some(new) = &change.new else { return };
        let counted = typed.typed(new).is_some_and(|q| {
            let hard = q.spec.as_ref().and_then(|s| s.hard.as_ref());
            hard == q.status.as_ref().and_then(|s| s.hard.as_ref())
        });
        // At start every quota is counted once: what happened meanwhile is in no event.
        if change.old.is_none() || !counted {
            sink.add(change.key().clone());
        }
    });
    for served in context.served().iter() {
        let watchable = served.resource.namespaced && served.can("list") && served.can("watch");
        if !watchable || served.resource.plural == "events" {
            continue;
        }
        let (sink, quotas) = (queue.clone(), quotas.clone());
        let pods: Option<Informer<Pod>> = is(&served.resource, "pods").then(|| context.informers.get());
        let asks_again = is(&served.resource, "services") || is(&served.resource, "persistentvolumeclaims");
        let objects = context.informers.get_dynamic(served.resource.clone());
        objects.on_change(move |change| {
            let less = change.new.is_none()
                || (asks_again && change.old.is_some())
                || pods.as_ref().is_some_and(|pods| has_ended(change, pods));
            if less {
                for quota in quotas.store().list_in(&change.key().ns) {
                    sink.add_after(quota.header.key.clone(), SETTLE);
                }
            }
        });
    }
    let this = Arc::new(Controller { context, quotas });
    let shutdown = this.context.shutdown.clone();
    if shutdown.or_stop(this.quotas.wait_synced()).await.is_none() {
        return;
    }
    let work = move |key| {
        let this = this.clone();
        async move { this.reconcile(key).await }
    };
    run_controller(NAME, queue, WORKERS, work, shutdown).await;
}

fn is(resource: &ResourceId, plural: &str) -> bool {
    resource.group.is_empty() && resource.plural == plural
}

/// The pod ended with this change, and so uses nothing any more.
fn has_ended(change: &Change, pods: &Informer<Pod>) -> bool {
    let ended = |entry: &Arc<reconcile::Entry>| pods.typed(entry).is_some_and(|p| is_terminal(&p));
    change.new.as_ref().is_some_and(ended) && !change.old.as_ref().is_some_and(ended)
}

impl Controller {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let client = &self.context.client;
        // The live quota: the lists that follow must not be older than what admission wrote into it.
        let Some(quota) = client.get_opt::<ResourceQuota>(Some(&key.ns), &key.name).await? else {
            return Ok(Requeue::Done);
        };
        let quota = serde_json::to_value(&quota).unwrap_or_default();
        let mut kinds: Vec<(String, String)> = usage::amounts(&quota["spec"]["hard"])
            .keys()
            .map(|name| usage::counted(name))
            .map(|(group, plural)| (group.to_owned(), plural.to_owned()))
            .collect();
        kinds.sort_unstable();
        kinds.dedup();
        let lists = kinds.iter().map(|(group, plural)| self.objects(&key.ns, group, plural));
        let lists = try_join_all(lists).await?;
        let used = usage::of_quota(&quota, |group, plural| {
            let at = kinds.iter().position(|(g, p)| g == group && p == plural);
            at.map(|i| lists[i].clone()).unwrap_or_default()
        });
        let status = json!({"hard": quota["spec"]["hard"], "used": usage::to_value(&used)});
        if quota["status"] == status {
            return Ok(Requeue::Done);
        }
        let mut update = quota;
        update["status"] = status;
        let path = ResourceId::of::<ResourceQuota>().path(Some(&key.ns), Some(&key.name), Some("status"));
        match client
            .request::<serde::de::IgnoredAny, _>(Method::PUT, &path, Some(&update))
            .await
        {
            Err(error) if error.is_not_found() => Ok(Requeue::Done),
            Err(error) => Err(error),
            Ok(_) => Ok(Requeue::Done),
        }
    }

    /// The objects of a kind in the namespace; where only their number matters, that many nulls.
    async fn objects(&self, namespace: &str, group: &str, plural: &str) -> Result<Vec<Value>, Error> {
        let all = self.context.served();
        let served = all.iter().find(|s| {
            s.resource.group == group && s.resource.plural == plural && s.resource.namespaced && s.can("list")
        });
        let Some(served) = served else {
            // A kind that is not served has no objects.
            return Ok(Vec::new());
        };
        let path = served.resource.path(Some(namespace), None, None);
        let looked_into = group.is_empty() && matches!(plural, "pods" | "services" | "persistentvolumeclaims");
        let query = if looked_into { "" } else { "?limit=1" };
        let mut list: Value = self
            .context
            .client
            .request::<_, ()>(Method::GET, &format!("{path}{query}"), None)
            .await?;
        let items = match list["items"].take() {
            Value::Array(items) => items,
            _ => Vec::new(),
        };
        if looked_into {
            return Ok(items);
        }
        let rest = list["metadata"]["remainingItemCount"].as_u64().unwrap_or_default();
        Ok(vec![Value::Null; items.len() + rest as usize])
    }
}

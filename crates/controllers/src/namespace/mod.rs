//! Empties namespaces that are being deleted, then lets them go.
//!
//! A namespace with a deletion timestamp holds the finalizer `kubernetes` in its spec. This controller deletes every
//! object in it, kind by kind, waits while finalizers and grace periods hold objects, says in the status what it waits
//! for, and then removes the finalizer through the `finalize` subresource.

pub mod plan;

use std::sync::Arc;

use http::Method;
use k8s_openapi::api::core::v1::{Namespace, NamespaceStatus};
use reconcile::{DeleteParams, Error, Informer, Key, List, Queue, Requeue, ResourceId, run_controller};
use serde::Deserialize;

use crate::Context;
use crate::common::is_deleting;
use plan::{Leftover, conditions, patience};

const NAME: &str = "namespace-controller";
const WORKERS: usize = 4;
const FINALIZER: &str = "kubernetes";

struct Controller {
    context: Context,
    namespaces: Informer<Namespace>,
}

/// The part of an object that matters here.
#[derive(Deserialize)]
struct Item {
    metadata: ItemMeta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ItemMeta {
    name: String,
    #[serde(default)]
    uid: Option<String>,
    #[serde(default)]
    finalizers: Option<Vec<String>>,
    #[serde(default)]
    deletion_timestamp: Option<String>,
    #[serde(default)]
    deletion_grace_period_seconds: Option<i64>,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        namespaces: context.informers.get(),
        context,
    });
    let sink = queue.clone();
    this.namespaces.on_change(move |change| {
        if change.new.as_ref().is_some_and(|entry| entry.header.deleting) {
            sink.add(change.key().clone());
        }
    });
    let shutdown = this.context.shutdown.clone();
    if shutdown.or_stop(this.namespaces.wait_synced()).await.is_none() {
        return;
    }
    let work = move |key| {
        let this = this.clone();
        async move { this.reconcile(key).await }
    };
    run_controller(NAME, queue, WORKERS, work, shutdown).await;
}

impl Controller {
    /// Namespaced resources that can be listed and deleted, and whether by collection; pods last, so that their controllers
    /// are gone by then.
    fn content(&self) -> Vec<(ResourceId, bool)> {
        let mut content: Vec<(ResourceId, bool)> = self
            .context
            .served()
            .iter()
            .filter(|s| s.resource.namespaced && s.can("list") && s.can("delete"))
            .map(|s| (s.resource.clone(), s.can("deletecollection")))
            .collect();
        content.sort_by_key(|(resource, _)| (resource.plural == "pods", resource.plural == "events"));
        content
    }

    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        // The live object: acting on a namespace that was just made again under its old name would be fatal.
        let Some(namespace) = self.context.client.get_opt::<Namespace>(None, &key.name).await? else {
            return Ok(Requeue::Done);
        };
        if !is_deleting(&namespace) {
            return Ok(Requeue::Done);
        }
        let finalizers = namespace
            .spec
            .as_ref()
            .and_then(|s| s.finalizers.clone())
            .unwrap_or_default();
        if !finalizers.iter().any(|f| f == FINALIZER) {
            return Ok(Requeue::Done);
        }
        let mut leftovers = Vec::new();
        let mut failure = None;
        for (resource, by_collection) in &self.content() {
            match self.empty(resource, *by_collection, &key.name).await {
                Ok(left) if left.count > 0 => leftovers.push(left),
                Ok(_) => {}
                // A kind whose definition went meanwhile took its objects with it.
                Err(error) if error.is_not_found() => {}
                // One kind that cannot be emptied must not keep the others.
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        let now = self.context.now();
        if leftovers.is_empty() && failure.is_none() {
            return self.finalize(namespace, finalizers).await;
        }
        let text = failure.as_ref().map(|e| stdx::chain(e).to_string());
        let conditions = conditions(namespace.status.as_ref(), &leftovers, text.as_deref(), now);
        let status = NamespaceStatus {
            conditions: Some(conditions),
            phase: Some("Terminating".to_owned()),
        };
        let mut update = namespace.clone();
        if namespace.status.as_ref() != Some(&status) {
            update.status = Some(status);
            self.context.client.update_status(None, &update).await?;
        }
        match failure {
            Some(error) => Err(error),
            None => {
                let began = namespace.metadata.deletion_timestamp.as_ref().map_or(now, |t| t.0);
                Ok(Requeue::After(patience(&leftovers, began, now)))
            }
        }
    }

    /// Deletes all objects of a kind and says what is left of them.
    async fn empty(&self, resource: &ResourceId, by_collection: bool, namespace: &str) -> Result<Leftover, Error> {
        let client = &self.context.client;
        let path = resource.path(Some(namespace), None, None);
        let list = || client.request::<List<Item>, ()>(Method::GET, &path, None);
        let items = list().await?;
        if items.items.is_empty() {
            return Ok(Leftover::none(resource));
        }
        let background = DeleteParams {
            propagation: Some("Background"),
            ..DeleteParams::default()
        };
        if by_collection {
            client.delete_path(&path, &background).await?;
        } else {
            for item in items.items.iter().filter(|i| i.metadata.deletion_timestamp.is_none()) {
                let params = DeleteParams {
                    uid: item.metadata.uid.clone(),
                    ..background.clone()
                };
                let path = resource.path(Some(namespace), Some(&item.metadata.name), None);
                match client.delete_path(&path, &params).await {
                    Err(error) if error.is_not_found() || error.is_conflict() => {}
                    other => other?,
                }
            }
        }
        let mut left = Leftover::none(resource);
        for item in list().await? {
            left.count += 1;
            left.grace_s = left
                .grace_s
                .max(item.metadata.deletion_grace_period_seconds.unwrap_or_default());
            left.finalizers.extend(item.metadata.finalizers.unwrap_or_default());
        }
        Ok(left)
    }

    async fn finalize(&self, mut namespace: Namespace, mut finalizers: Vec<String>) -> Result<Requeue, Error> {
        finalizers.retain(|f| f != FINALIZER);
        namespace.spec.get_or_insert_default().finalizers = Some(finalizers);
        let name = namespace.metadata.name.clone().unwrap_or_default();
        let path = ResourceId::of::<Namespace>().path(None, Some(&name), Some("finalize"));
        let written = self
            .context
            .client
            .request::<serde::de::IgnoredAny, _>(Method::PUT, &path, Some(&namespace))
            .await;
        match written {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(Requeue::Done),
        }
    }
}

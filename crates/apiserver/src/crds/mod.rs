//! CustomResourceDefinitions: naming, establishing, serving, and cleaning up after them.
//!
//! One task per cluster watches the definitions. For each it writes the conditions that follow from its names and
//! schema ([`conditions`]), then puts an [`Api`] in place that serves the established ones ([`serving`]), and deletes the
//! instances of those that are being deleted. Everything is computed from the stored state, so a restart is the same
//! code path; many definitions at once are one pass.
//!
//! A write of a definition is answered when it is served, so that its instances can be made right after.

mod conditions;
mod definition;
mod serving;

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use apimachinery::meta;
use apimachinery::status::Status;
use http::HeaderMap;
use serde_json::{Value, json};

use crate::auth::UserInfo;
use crate::cluster::Cluster;
use crate::handlers::{Context, delete, update};
use crate::object::Object;
use crate::request::{Query, RequestInfo, Target};
use crate::served::Served;
use crate::strategy::Part;
use definition::Known;

pub const GROUP: &str = "apiextensions.k8s.io";
pub const PLURAL: &str = "customresourcedefinitions";
/// Keeps a definition until its instances are gone.
pub const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";
/// Longest wait of a write for what it changed to be served. Only a stuck store reaches it.
const SETTLE_MAX: Duration = Duration::from_secs(1);
/// Pause after a failed pass.
const RETRY: Duration = Duration::from_millis(200);

/// Serves what is established and starts to follow the definitions.
pub async fn begin(cluster: &Arc<Cluster>) {
    let mut task = Task {
        cluster: Arc::downgrade(cluster),
        known: BTreeMap::new(),
    };
    let _ = task.pass(cluster).await;
    let (weak, shutdown) = (task.cluster.clone(), cluster.shutdown.clone());
    tokio::spawn(async move {
        // Cancel safety: a pass that is cut off is made anew from the stored state.
        tokio::select! {
            () = shutdown.wait() => {}
            () = follow(task, weak) => {}
        }
    });
}

/// Waits until a definition that was just written is served as written. Does nothing for other objects.
pub async fn settle(cx: &Context, object: &Object) {
    if !cx.served.is(GROUP, PLURAL) {
        return;
    }
    let mut settled = cx.cluster.settled.subscribe();
    let rv = object.rv;
    // A timeout leaves the client where upstream always leaves it: it has to wait for the conditions.
    let _ = tokio::time::timeout(SETTLE_MAX, settled.wait_for(|seen| *seen >= rv)).await;
}

/// The refusal of a verb while the definition is being deleted.
pub fn refused(served: &Served, verb: &str) -> Status {
    let mut status = Status::method_not_allowed(&served.info.group_resource(), verb);
    status.message = format!("{verb} not allowed while custom resource definition is terminating");
    status
}

/// Completes a definition that is to be deleted: the task removes the finalizer when the instances are gone.
pub fn mark_deleted(definition: &mut Value, now: &str) {
    let Some(metadata) = meta::metadata_mut(definition) else {
        return;
    };
    let finalizers = metadata.entry("finalizers").or_insert_with(|| json!([]));
    if let Some(list) = finalizers.as_array_mut()
        && !list.iter().any(|f| f == CLEANUP)
    {
        list.push(CLEANUP.into());
    }
    conditions::set(
        definition,
        now,
        "Terminating",
        "True",
        "InstanceDeletionPending",
        "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon",
    );
}

async fn follow(mut task: Task, cluster: Weak<Cluster>) {
    loop {
        let Some(strong) = cluster.upgrade() else { return };
        let definitions = strong.builtin.resource(GROUP, "v1", PLURAL).cloned();
        let Some(definitions) = definitions else { return };
        let mut changed = definitions.resource.subscribe();
        changed.borrow_and_update();
        let waiting = match task.pass(&strong).await {
            Ok(waiting) => waiting,
            Err(error) => {
                tracing::warn!(
                    cluster = strong.name(),
                    error = error.message,
                    "following the definitions failed"
                );
                drop(strong);
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        drop(strong);
        if task.settled(&cluster) {
            // Nothing was written by this pass: wait for a change of the definitions, or of instances that must go.
            let instances = async {
                let mut all: Vec<_> = waiting.iter().map(|r| r.subscribe()).collect();
                let gone: Vec<_> = all.iter_mut().map(|r| Box::pin(r.changed())).collect();
                match gone.is_empty() {
                    true => std::future::pending().await,
                    false => drop(futures::future::select_all(gone).await),
                }
            };
            // Instances may have gone before the subscription.
            if waiting.iter().any(|r| r.count() == 0) {
                continue;
            }
            // Cancel safety: both only wait.
            tokio::select! {
                result = changed.changed() => if result.is_err() { return },
                () = instances => {}
            }
        }
    }
}

struct Task {
    cluster: Weak<Cluster>,
    /// What is known of each definition, by name.
    known: BTreeMap<String, Known>,
}

impl Task {
    /// Whether everything stored is known: the newest revision of the definitions was seen.
    fn settled(&self, cluster: &Weak<Cluster>) -> bool {
        let Some(cluster) = cluster.upgrade() else { return true };
        let Some(served) = cluster.builtin.resource(GROUP, "v1", PLURAL) else {
            return true;
        };
        *cluster.settled.borrow() >= served.resource.newest()
    }

    /// Brings conditions, what is served, and instances up to date. Returns the resources whose instances must go first.
    async fn pass(&mut self, cluster: &Arc<Cluster>) -> Result<Vec<Arc<crate::registry::Resource>>, Status> {
        let Some(served) = cluster.builtin.resource(GROUP, "v1", PLURAL).cloned() else {
            return Ok(Vec::new());
        };
        let newest = served.resource.newest();
        let snapshot = served.resource.snapshot();
        self.known.retain(|name, _| snapshot.contains_key(name.as_str()));
        let mut changed = Vec::new();
        for (name, object) in &snapshot {
            if self.known.get(&**name).is_none_or(|k| k.rv != object.rv) {
                let before = self.known.remove(&**name);
                let value = object.value();
                changed.push((name.to_string(), conditions::needs(&value)));
                self.known.insert(
                    name.to_string(),
                    Known::read(&value, object.rv, before, &cluster.builtin.table),
                );
            }
        }
        // Names that became free, or taken, concern the others too; conditions follow in name order, so that two
        // definitions never both get a name.
        let names: Vec<String> = self.known.keys().cloned().collect();
        for name in names {
            let fresh = changed.iter().find(|(n, _)| *n == name).map(|(_, needs)| needs.clone());
            let Some(update) = conditions::plan(&self.known, &name, &cluster.builtin.table, fresh) else {
                continue;
            };
            let now = crate::handlers::write::now(cluster);
            let cx = internal(cluster, &served, "", &name);
            let written = update::modify(&cx, Part::Internal, None, false, |current| {
                let mut value = current.clone();
                update.apply(&mut value, &now);
                Ok(value)
            })
            .await;
            match written {
                Ok(object) => {
                    let value = object.value();
                    let before = self.known.remove(&name);
                    self.known
                        .insert(name, Known::read(&value, object.rv, before, &cluster.builtin.table));
                }
                Err(status) if status.code() == 404 => drop(self.known.remove(&name)),
                Err(status) => return Err(status),
            }
        }
        serving::publish(cluster, &self.known)?;
        let seen = self.known.values().map(|k| k.rv).max().unwrap_or_default().max(newest);
        let waiting = self.clean_up(cluster, &served).await?;
        cluster.settled.send_replace(seen);
        Ok(waiting)
    }

    /// Deletes the instances of definitions that are being deleted, and lets those go whose instances are gone.
    async fn clean_up(
        &self,
        cluster: &Arc<Cluster>,
        served: &Arc<Served>,
    ) -> Result<Vec<Arc<crate::registry::Resource>>, Status> {
        let mut waiting = Vec::new();
        for (name, known) in self.known.iter().filter(|(_, k)| k.deleting && k.cleanup) {
            // From here on no instance is made; those being made were waited for.
            *known.gate.write().await = true;
            let instances = cluster.registry.resource(&known.group, &known.names.plural);
            if known.established {
                self.delete_instances(cluster, known, &instances).await?;
            }
            if known.established && instances.count() > 0 {
                waiting.push(instances);
                continue;
            }
            let now = crate::handlers::write::now(cluster);
            let (reason, message) = match known.established {
                true => ("InstanceDeletionCompleted", "removed all instances"),
                false => ("NeverEstablished", "resource was never established"),
            };
            let cx = internal(cluster, served, "", name);
            let done = update::modify(&cx, Part::Internal, None, false, |current| {
                let mut value = current.clone();
                conditions::set(&mut value, &now, "Terminating", "False", reason, message);
                if let Some(list) = value["metadata"].get_mut("finalizers").and_then(Value::as_array_mut) {
                    list.retain(|f| f != CLEANUP);
                }
                Ok(value)
            });
            match done.await {
                Err(status) if status.code() != 404 => return Err(status),
                _ => {}
            }
        }
        Ok(waiting)
    }

    async fn delete_instances(
        &self,
        cluster: &Arc<Cluster>,
        known: &Known,
        instances: &Arc<crate::registry::Resource>,
    ) -> Result<(), Status> {
        let Some(version) = known.versions.first() else {
            return Ok(());
        };
        let instance = known.serve(version, instances);
        for object in instances.snapshot().values() {
            let header = object.header();
            if header.deleting {
                continue;
            }
            let cx = internal(cluster, &instance, &header.namespace, &header.name);
            match delete::remove(&cx, &header.name, &delete::Options::default()).await {
                Err(status) if !matches!(status.code(), 404 | 409) => return Err(status),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A request of the server itself.
fn internal(cluster: &Arc<Cluster>, served: &Arc<Served>, namespace: &str, name: &str) -> Context {
    let target = Target {
        group: served.info.group.clone(),
        version: served.info.version.clone(),
        namespace: namespace.to_owned(),
        resource: served.info.plural.clone(),
        name: name.to_owned(),
        ..Target::default()
    };
    Context {
        cluster: cluster.clone(),
        served: served.clone(),
        user: UserInfo::admin("system:apiserver"),
        info: RequestInfo {
            verb: "update",
            target: Some(target.clone()),
            ..RequestInfo::default()
        },
        target,
        query: Query::default(),
        headers: HeaderMap::new(),
    }
}

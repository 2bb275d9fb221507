//! Deletes objects whose owners are gone, and carries out foreground and orphaning deletions.
//!
//! The graph is not kept apart: every informer's store already finds objects by uid and by owner, so the graph is the
//! union of the stores of all served kinds, shared with whoever else watches them. Nothing is deleted on the word of a
//! store alone: that an owner is absent is asked of the server first.

pub mod plan;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use k8s_openapi::jiff::Timestamp;
use parking_lot::{Mutex, RwLock};
use reconcile::error::Optional;
use reconcile::{
    Change, DeleteParams, Entry, Error, Header, Informer, Key, Owner, Patch, Queue, Requeue, ResourceId, run_controller,
};
use serde::Deserialize;
use serde_json::json;

use crate::Context;
use plan::{FOREGROUND, Fate, ORPHAN, OwnerState, fate};

const NAME: &str = "garbage-collector";
const WORKERS: usize = 8;
/// Kinds that come and go by the thousand and own nothing.
const IGNORED: [&str; 1] = ["events"];
/// Uids known to be absent; asked anew when forgotten.
const ABSENT_MAX: usize = 4096;

/// One object: which kind, and its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct KindIndex(usize);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Item {
    kind: KindIndex,
    key: Key,
}

impl std::fmt::Display for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "kind {} {}", self.kind.0, self.key)
    }
}

struct Watched {
    resource: ResourceId,
    objects: Informer<serde_json::Value>,
    /// Not served any more: its objects went with it.
    gone: AtomicBool,
}

struct Controller {
    context: Context,
    /// All kinds that were ever served, so that an index keeps its meaning.
    kinds: RwLock<Arc<Vec<Arc<Watched>>>>,
    queue: Queue<Item>,
    /// Owners the server said do not exist, with the time of asking.
    absent: Mutex<HashMap<String, Timestamp>>,
}

/// Just enough of an object to know it is the one meant.
#[derive(Deserialize)]
struct Live {
    metadata: LiveMeta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LiveMeta {
    uid: String,
    #[serde(default)]
    deletion_timestamp: Option<String>,
    #[serde(default)]
    finalizers: Option<Vec<String>>,
}

pub(crate) async fn run(context: Context) {
    let shutdown = context.shutdown.clone();
    let mut discovery = context.discovery.clone();
    let this = Arc::new(Controller {
        context,
        kinds: RwLock::default(),
        queue: Queue::new(),
        absent: Mutex::default(),
    });
    discovery.mark_unchanged();
    this.follow();
    let kinds = this.kinds();
    let synced = async {
        for kind in kinds.iter() {
            kind.objects.wait_synced().await;
        }
    };
    if shutdown.or_stop(synced).await.is_none() {
        return;
    }
    // Handlers come after the first sync: before it, every owner of a kind not yet listed would look absent.
    for index in 0..kinds.len() {
        this.handle(KindIndex(index));
    }
    let changes = {
        let (this, shutdown) = (this.clone(), shutdown.clone());
        async move {
            while let Some(Ok(())) = shutdown.or_stop(discovery.changed()).await {
                for index in this.follow() {
                    // A kind that is not listed yet is asked about live, so its handlers may come when it is.
                    let this = this.clone();
                    let task = async move {
                        this.kinds()[index.0].objects.wait_synced().await;
                        this.handle(index);
                    };
                    tokio::spawn(shutdown.or_stop(task));
                }
            }
        }
    };
    let queue = this.queue.clone();
    let work = move |item| {
        let this = this.clone();
        async move { this.reconcile(item).await }
    };
    tokio::join!(changes, run_controller(NAME, queue, WORKERS, work, shutdown));
}

fn watchable(context: &Context) -> Vec<ResourceId> {
    let usable = |s: &&reconcile::discovery::Served| {
        ["list", "watch", "delete"].iter().all(|verb| s.can(verb)) && !IGNORED.contains(&s.resource.plural.as_str())
    };
    let served = context.served();
    served.iter().filter(usable).map(|s| s.resource.clone()).collect()
}

fn has_finalizer(header: &Header, name: &str) -> bool {
    header.finalizers.iter().any(|f| f == name)
}

/// The object waits for its dependents to be deleted.
fn is_waiting(header: &Header) -> bool {
    header.deleting && has_finalizer(header, FOREGROUND)
}

impl Controller {
    fn kinds(&self) -> Arc<Vec<Arc<Watched>>> {
        self.kinds.read().clone()
    }

    /// Opens what is new and closes what is gone. Returns the new kinds, which have no handlers yet.
    fn follow(&self) -> Vec<KindIndex> {
        let served = watchable(&self.context);
        let mut all = Vec::clone(&self.kinds());
        for kind in all.iter().filter(|k| !served.contains(&k.resource)) {
            if !kind.gone.swap(true, Ordering::Relaxed) {
                self.context.informers.close(&kind.resource);
            }
        }
        let mut new = Vec::new();
        for resource in served {
            let known = all.iter().position(|k| k.resource == resource);
            if known.is_some_and(|i| !all[i].gone.load(Ordering::Relaxed)) {
                continue;
            }
            let watched = Arc::new(Watched {
                objects: self.context.informers.get_dynamic(resource.clone()),
                resource,
                gone: AtomicBool::new(false),
            });
            match known {
                // Back again: the index stays.
                Some(index) => {
                    all[index] = watched;
                    new.push(KindIndex(index));
                }
                None => {
                    all.push(watched);
                    new.push(KindIndex(all.len() - 1));
                }
            }
        }
        *self.kinds.write() = Arc::new(all);
        new
    }

    /// Follows the objects of a kind.
    fn handle(self: &Arc<Self>, kind: KindIndex) {
        let weak = Arc::downgrade(self);
        self.kinds()[kind.0].objects.on_change(move |change| {
            if let Some(this) = weak.upgrade() {
                this.changed(kind, change);
            }
        });
    }

    /// Queues what a change may have made due. Runs on an informer's task: looks up, queues, returns.
    fn changed(&self, kind: KindIndex, change: &Change) {
        match &change.new {
            Some(new) => {
                let header = &new.header;
                let due = (header.deleting && (has_finalizer(header, FOREGROUND) || has_finalizer(header, ORPHAN)))
                    || header
                        .owners
                        .iter()
                        .any(|o| self.owner_in_store(o).is_none_or(|(_, e)| is_waiting(&e.header)));
                if due {
                    self.queue.add(Item {
                        kind,
                        key: header.key.clone(),
                    });
                }
                // An owner that began to wait concerns its dependents, and once more when it stops blocking them.
                if is_waiting(header) && change.old.as_ref().is_none_or(|old| !is_waiting(&old.header)) {
                    self.queue_dependents(&header.uid);
                }
                // A dependent that no longer names an owner, or no longer blocks it, may have been its last.
                if let Some(old) = &change.old
                    && old.header.owners != header.owners
                {
                    self.queue_waiting_owners(&old.header);
                }
            }
            None => {
                if let Some(old) = &change.old {
                    self.queue_dependents(&old.header.uid);
                    self.queue_waiting_owners(&old.header);
                }
            }
        }
    }

    fn queue_dependents(&self, uid: &str) {
        for (kind, entry) in self.dependents(uid) {
            self.queue.add(Item {
                kind,
                key: entry.header.key.clone(),
            });
        }
    }

    fn queue_waiting_owners(&self, header: &Header) {
        for owner in &header.owners {
            if let Some((kind, entry)) = self.owner_in_store(owner).filter(|(_, e)| is_waiting(&e.header)) {
                self.queue.add(Item {
                    kind,
                    key: entry.header.key.clone(),
                });
            }
        }
    }

    fn dependents(&self, uid: &str) -> Vec<(KindIndex, Arc<Entry>)> {
        let of_kind = |(i, k): (usize, &Arc<Watched>)| {
            k.objects
                .store()
                .by_owner(uid)
                .into_iter()
                .map(move |e| (KindIndex(i), e))
                .collect::<Vec<_>>()
        };
        self.kinds().iter().enumerate().flat_map(of_kind).collect()
    }

    fn kind_of(&self, owner: &Owner) -> Option<KindIndex> {
        let (group, _) = apimachinery::meta::split_api_version(&owner.api_version);
        // Any version of the kind will do: the uid decides.
        self.kinds()
            .iter()
            .position(|k| k.resource.kind == owner.kind && k.resource.group == group && !k.gone.load(Ordering::Relaxed))
            .map(KindIndex)
    }

    fn owner_in_store(&self, owner: &Owner) -> Option<(KindIndex, Arc<Entry>)> {
        let kind = self.kind_of(owner)?;
        Some((kind, self.kinds()[kind.0].objects.store().by_uid(&owner.uid)?))
    }

    async fn reconcile(&self, item: Item) -> Result<Requeue, Error> {
        let watched = &*self.kinds()[item.kind.0].clone();
        let Some(entry) = watched.objects.store().get(&item.key) else {
            return Ok(Requeue::Done);
        };
        let header = &entry.header;
        if header.deleting {
            if has_finalizer(header, ORPHAN) {
                return self.orphan(watched, header).await;
            }
            if has_finalizer(header, FOREGROUND) {
                return self.finish_foreground(watched, header).await;
            }
            return Ok(Requeue::Done);
        }
        self.judge(watched, header).await
    }

    /// Decides over a living object with owners.
    async fn judge(&self, watched: &Watched, header: &Header) -> Result<Requeue, Error> {
        let mut owners = Vec::new();
        for owner in &header.owners {
            owners.push((owner.clone(), self.owner_state(owner, &header.key.ns).await?));
        }
        let dependents = self.dependents(&header.uid);
        let path = watched
            .resource
            .path(header.key.namespace(), Some(&header.key.name), None);
        match fate(&owners, !dependents.is_empty()) {
            Fate::Keep => {}
            Fate::Unref(uids) => self.unref(watched, header, &uids).await?,
            decided => {
                // From the server, because owners may have been changed since: a new owner saves the object.
                let foreground = decided == Fate::DeleteForeground;
                let params = DeleteParams {
                    uid: Some(header.uid.clone()),
                    resource_version: Some(header.resource_version.clone()),
                    propagation: Some(if foreground { "Foreground" } else { "Background" }),
                    ..DeleteParams::default()
                };
                match self.context.client.delete_path(&path, &params).await {
                    Err(error) if error.is_not_found() => {}
                    // Changed meanwhile: the event of that change may not bring it back here, so look again.
                    Err(error) => return Err(error),
                    Ok(()) => {
                        tracing::debug!(resource = %watched.resource, key = %header.key, foreground, "deleted a dependent")
                    }
                }
            }
        }
        Ok(Requeue::Done)
    }

    async fn owner_state(&self, owner: &Owner, namespace: &str) -> Result<OwnerState, Error> {
        let state = |deleting: bool, foreground: bool| {
            if deleting && foreground {
                OwnerState::Waiting
            } else {
                OwnerState::Solid
            }
        };
        if let Some((_, entry)) = self.owner_in_store(owner) {
            return Ok(state(entry.header.deleting, has_finalizer(&entry.header, FOREGROUND)));
        }
        if self.absent.lock().contains_key(&owner.uid) {
            return Ok(OwnerState::Absent);
        }
        let (group, version) = apimachinery::meta::split_api_version(&owner.api_version);
        let named = |r: &ResourceId| r.kind == owner.kind && r.group == group;
        let served = self.context.served().iter().map(|s| s.resource.clone()).find(named);
        // A kind that was served once went with all its objects: the server says so.
        let known = || self.kinds().iter().map(|k| k.resource.clone()).find(named);
        let Some(resource) = served.or_else(known) else {
            // A kind this server does not know: nobody can say it is gone, so its dependents stay.
            tracing::debug!(kind = owner.kind, group, version, "owner of a kind that is not served");
            return Ok(OwnerState::Solid);
        };
        if resource.namespaced && namespace.is_empty() {
            // A cluster-scoped object cannot have an owner in a namespace: the reference is wrong, not the owner gone.
            tracing::warn!(
                kind = owner.kind,
                owner = owner.name,
                "reference to an owner in no namespace is ignored"
            );
            return Ok(OwnerState::Solid);
        }
        let path = resource.path(Some(namespace), Some(&owner.name), None);
        let live: Option<Live> = self
            .context
            .client
            .request::<_, ()>(http::Method::GET, &path, None)
            .await
            .optional()?;
        match live.filter(|l| l.metadata.uid == owner.uid) {
            Some(l) => {
                let foreground = l.metadata.finalizers.iter().flatten().any(|f| f == FOREGROUND);
                Ok(state(l.metadata.deletion_timestamp.is_some(), foreground))
            }
            None => {
                let mut absent = self.absent.lock();
                if absent.len() >= ABSENT_MAX {
                    absent.clear();
                }
                absent.insert(owner.uid.clone(), self.context.now());
                Ok(OwnerState::Absent)
            }
        }
    }

    /// Removes references to `uids`, if nobody changed the object meanwhile.
    async fn unref(&self, watched: &Watched, header: &Header, uids: &[String]) -> Result<(), Error> {
        let Some(object) = watched.objects.by_key(&header.key) else {
            return Ok(());
        };
        let kept: Vec<&serde_json::Value> = object["metadata"]["ownerReferences"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|r| !uids.iter().any(|uid| r["uid"] == uid.as_str()))
            .collect();
        self.patch_meta(
            watched,
            header,
            json!({"ownerReferences": if kept.is_empty() { json!(null) } else { json!(kept) }}),
        )
        .await
    }

    /// An owner that waits goes once no dependent blocks it; until then its dependents are made to go.
    async fn finish_foreground(&self, watched: &Watched, header: &Header) -> Result<Requeue, Error> {
        let dependents = self.dependents(&header.uid);
        let blocks = |e: &Entry| {
            e.header
                .owners
                .iter()
                .any(|o| o.uid == header.uid && o.block_owner_deletion)
        };
        if dependents.iter().any(|(_, e)| blocks(e)) {
            for (kind, entry) in dependents {
                if !entry.header.deleting {
                    self.queue.add(Item {
                        kind,
                        key: entry.header.key.clone(),
                    });
                }
            }
            return Ok(Requeue::Done);
        }
        self.drop_finalizer(watched, header, FOREGROUND).await
    }

    /// Takes the object's name off all its dependents, then lets it go.
    async fn orphan(&self, watched: &Watched, header: &Header) -> Result<Requeue, Error> {
        for (kind, entry) in self.dependents(&header.uid) {
            let uids = [header.uid.clone()];
            match self.unref(&self.kinds()[kind.0], &entry.header, &uids).await {
                Err(error) if error.is_not_found() => {}
                other => other?,
            }
        }
        self.drop_finalizer(watched, header, ORPHAN).await
    }

    async fn drop_finalizer(&self, watched: &Watched, header: &Header, name: &str) -> Result<Requeue, Error> {
        let kept: Vec<&String> = header.finalizers.iter().filter(|f| *f != name).collect();
        match self.patch_meta(watched, header, json!({"finalizers": kept})).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(Requeue::Done),
        }
    }

    async fn patch_meta(&self, watched: &Watched, header: &Header, mut meta: serde_json::Value) -> Result<(), Error> {
        meta["uid"] = header.uid.as_str().into();
        meta["resourceVersion"] = header.resource_version.as_str().into();
        let path = watched
            .resource
            .path(header.key.namespace(), Some(&header.key.name), None);
        let patch = Patch::Merge(json!({"metadata": meta}));
        self.context
            .client
            .patch_path::<serde::de::IgnoredAny>(&path, &patch)
            .await?;
        Ok(())
    }
}

//! Shared, lazily started caches of resources: one per resource and selection, whoever asks.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use stdx::{Shutdown, TaskGroup};
use tokio::sync::{broadcast, watch};

use crate::reflector::Reflector;
pub use crate::reflector::Selection;
use crate::store::{Change, Entry, Key, Store};
use crate::{Client, Kind, ResourceId};

/// Keys a subscriber may lag behind before it must look at everything again.
const SUBSCRIPTION_LAG_MAX: usize = 1024;

/// The informers of one cluster. Clones share them. They run until [`Informers::stop`] or until the last clone and the
/// last [`Informer`] are gone.
#[derive(Clone)]
pub struct Informers {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    tasks: TaskGroup,
    caches: Mutex<HashMap<(ResourceId, Selection), Arc<Cache>>>,
}

struct Cache {
    store: Arc<Store>,
    synced: watch::Receiver<u64>,
    /// Ends the reflector.
    shutdown: Shutdown,
    /// Made at the first subscription: most informers are only asked by handlers.
    keys: OnceLock<broadcast::Sender<Key>>,
}

impl fmt::Debug for Informers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Informers")
            .field("caches", &self.inner.caches.lock().len())
            .finish_non_exhaustive()
    }
}

impl Informers {
    /// No informer runs yet.
    pub fn new(client: Client) -> Self {
        let tasks = TaskGroup::new(&Shutdown::new());
        Self {
            inner: Arc::new(Inner {
                client,
                tasks,
                caches: Mutex::default(),
            }),
        }
    }

    /// The client the informers read through.
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    /// All objects of a kind. Started at first use; must be called inside a tokio runtime.
    pub fn get<K: Kind>(&self) -> Informer<K> {
        self.open(ResourceId::of::<K>(), Selection::default())
    }

    /// Objects of a kind that match a field selector, in all namespaces.
    pub fn get_selected<K: Kind>(&self, fields: &str) -> Informer<K> {
        self.open(
            ResourceId::of::<K>(),
            Selection {
                fields: fields.to_owned(),
                ..Selection::default()
            },
        )
    }

    /// A part of a kind.
    pub fn get_selection<K: Kind>(&self, selection: Selection) -> Informer<K> {
        self.open(ResourceId::of::<K>(), selection)
    }

    /// Any resource, by path; shares its store with the typed informer of the same resource.
    pub fn get_dynamic(&self, resource: ResourceId) -> Informer<serde_json::Value> {
        self.open(resource, Selection::default())
    }

    fn open<K>(&self, resource: ResourceId, selection: Selection) -> Informer<K> {
        let mut caches = self.inner.caches.lock();
        let cache = caches
            .entry((resource, selection))
            .or_insert_with_key(|(resource, selection)| self.start(resource.clone(), selection.clone()))
            .clone();
        Informer {
            cache,
            inner: self.inner.clone(),
            kind: PhantomData,
        }
    }

    /// Ends the informer of a whole resource that is not served any more, whoever uses it. Its handlers are told that every
    /// object left is gone; its store is empty from then on. The next use of the resource begins anew.
    pub fn close(&self, resource: &ResourceId) {
        let key = (resource.clone(), Selection::default());
        let Some(cache) = self.inner.caches.lock().remove(&key) else {
            return;
        };
        // The reflector drops its handlers when it notices, so they are told before.
        cache.store.replace(Vec::new());
        cache.shutdown.trigger();
    }

    fn start(&self, resource: ResourceId, selection: Selection) -> Arc<Cache> {
        let store = Arc::new(Store::default());
        let (synced, synced_rx) = watch::channel(0);
        let name = format!("informer {resource}");
        let reflector = Reflector {
            client: self.inner.client.clone(),
            resource,
            selection,
            store: store.clone(),
            synced,
        };
        let shutdown = self.inner.tasks.shutdown().child();
        self.inner.tasks.spawn(name, reflector.run(shutdown.clone()));
        Arc::new(Cache {
            store,
            shutdown,
            synced: synced_rx,
            keys: OnceLock::new(),
        })
    }

    /// Stops all informers and drops their handlers. The stores keep their last content.
    pub async fn stop(&self) {
        self.inner.tasks.stop(std::time::Duration::from_secs(5)).await;
    }
}

/// A view of one resource. Clones share it.
pub struct Informer<K> {
    cache: Arc<Cache>,
    /// Keeps the reflectors running.
    inner: Arc<Inner>,
    kind: PhantomData<fn() -> K>,
}

impl<K> Clone for Informer<K> {
    fn clone(&self) -> Self {
        Self {
            cache: self.cache.clone(),
            inner: self.inner.clone(),
            kind: PhantomData,
        }
    }
}

impl<K> fmt::Debug for Informer<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Informer")
            .field("store", &self.cache.store)
            .finish_non_exhaustive()
    }
}

impl<K: DeserializeOwned + Send + Sync + 'static> Informer<K> {
    /// The object, as of the last event seen. `namespace` is empty for cluster-scoped objects.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.by_key(&Key::new(namespace, name))
    }

    /// The object of this key.
    pub fn by_key(&self, key: &Key) -> Option<Arc<K>> {
        self.cache.store.get(key).and_then(|entry| self.typed(&entry))
    }

    /// The object with this uid.
    pub fn by_uid(&self, uid: &str) -> Option<Arc<K>> {
        self.cache.store.by_uid(uid).and_then(|entry| self.typed(&entry))
    }

    /// All objects, ascending by namespace and name.
    pub fn list(&self) -> Vec<Arc<K>> {
        self.typed_all(&self.cache.store.list())
    }

    /// Objects of one namespace, ascending by name.
    pub fn list_in(&self, namespace: &str) -> Vec<Arc<K>> {
        self.typed_all(&self.cache.store.list_in(namespace))
    }

    /// Objects that name this uid as an owner.
    pub fn by_owner(&self, uid: &str) -> Vec<Arc<K>> {
        self.typed_all(&self.cache.store.by_owner(uid))
    }

    /// The typed form of an entry of this informer; `None` if it does not decode (logged and counted).
    pub fn typed(&self, entry: &Entry) -> Option<Arc<K>> {
        self.cache.store.typed(entry)
    }

    fn typed_all(&self, entries: &[Arc<Entry>]) -> Vec<Arc<K>> {
        entries.iter().filter_map(|entry| self.typed(entry)).collect()
    }

    /// The untyped store: headers and bytes.
    pub fn store(&self) -> &Arc<Store> {
        &self.cache.store
    }

    /// Returns once the store has been complete at least once. Never returns after [`Informers::stop`] came first.
    pub async fn wait_synced(&self) {
        let mut synced = self.cache.synced.clone();
        if synced.wait_for(|lists| *lists > 0).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// The store has been complete at least once.
    pub fn is_synced(&self) -> bool {
        *self.cache.synced.borrow() > 0
    }

    /// Completed lists: 1 after the start, more after every expired watch.
    pub fn lists(&self) -> u64 {
        *self.cache.synced.borrow()
    }

    /// Calls `handler` for every object now here and every later change, in order, none left out. It runs on the
    /// informer's task and must only map to keys and queue them. Do not call `on_change` from inside a handler.
    pub fn on_change(&self, handler: impl Fn(&Change) + Send + Sync + 'static) {
        self.cache.store.on_change(Box::new(handler));
    }

    /// The keys of changed objects, deleted ones included, beginning with all that are here now.
    pub fn subscribe(&self) -> Subscription {
        let keys = self.cache.keys.get_or_init(|| {
            let (keys, _) = broadcast::channel(SUBSCRIPTION_LAG_MAX);
            let sender = keys.clone();
            self.on_change(move |change| {
                // Nobody listening is fine.
                let _ = sender.send(change.key().clone());
            });
            keys
        });
        let receiver = keys.subscribe();
        let mut subscription = Subscription {
            store: self.cache.store.clone(),
            receiver,
            pending: VecDeque::new(),
            resyncs: 0,
        };
        subscription.fill();
        subscription
    }
}

/// A bounded stream of changed keys. A subscriber that lags gets every present key again; keys of objects deleted
/// meanwhile are then lost, so compare with the store.
#[derive(Debug)]
pub struct Subscription {
    store: Arc<Store>,
    receiver: broadcast::Receiver<Key>,
    pending: VecDeque<Key>,
    resyncs: u64,
}

impl Subscription {
    fn fill(&mut self) {
        self.pending = self.store.list().into_iter().map(|e| e.header.key.clone()).collect();
    }

    /// The next key; `None` once the informers have stopped. Cancel safe.
    pub async fn recv(&mut self) -> Option<Key> {
        loop {
            if let Some(key) = self.pending.pop_front() {
                return Some(key);
            }
            match self.receiver.recv().await {
                Ok(key) => return Some(key),
                Err(broadcast::error::RecvError::Closed) => return None,
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    self.resyncs += 1;
                    self.fill();
                }
            }
        }
    }

    /// How often this subscriber lagged too far behind.
    pub fn resyncs(&self) -> u64 {
        self.resyncs
    }
}

//! The objects of one resource as bytes plus a small parsed header, with the indexes controllers ask for.
//!
//! One writer (the reflector), many readers. Typed values are decoded on demand and shared while anyone holds them; the
//! most recently decoded ones are kept so that hot objects are decoded once per change.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Decoded objects kept alive per resource. A typed pod is about 40 KB, so this is at most some 10 MB.
const DECODED_MAX: usize = 256;

/// Namespace (empty for cluster-scoped objects) and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Key {
    /// Namespace, empty for cluster-scoped objects.
    pub ns: String,
    /// Name.
    pub name: String,
}

impl Key {
    /// A key of these parts.
    pub fn new(ns: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            ns: ns.into(),
            name: name.into(),
        }
    }

    /// The namespace, if the object has one.
    pub fn namespace(&self) -> Option<&str> {
        Some(self.ns.as_str()).filter(|ns| !ns.is_empty())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ns.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.ns, self.name)
        }
    }
}

/// One owner of an object.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    /// Group and version of the owner.
    pub api_version: String,
    /// Kind of the owner.
    pub kind: String,
    /// Name of the owner.
    pub name: String,
    /// Uid of the owner.
    pub uid: String,
    /// Whether it manages the object.
    #[serde(default)]
    pub controller: bool,
    /// Whether its foreground deletion waits for the object.
    #[serde(default)]
    pub block_owner_deletion: bool,
}

/// The parsed part of an object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Header {
    /// Namespace and name.
    pub key: Key,
    /// Uid.
    pub uid: String,
    /// Resource version as the server wrote it.
    pub resource_version: String,
    /// Generation of the spec; 0 where the kind has none.
    pub generation: i64,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Owners.
    pub owners: Vec<Owner>,
    /// Finalizers.
    pub finalizers: Vec<String>,
    /// Deletion was asked for.
    pub deleting: bool,
}

impl Header {
    /// The owner that manages the object.
    pub fn controller(&self) -> Option<&Owner> {
        self.owners.iter().find(|o| o.controller)
    }
}

/// The wire shape of [`Header`].
#[derive(Deserialize)]
struct Wire {
    metadata: WireMeta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireMeta {
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    generation: i64,
    labels: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<Owner>>,
    finalizers: Option<Vec<String>>,
    deletion_timestamp: Option<String>,
}

/// One object: header, bytes, and its typed value while in use.
pub struct Entry {
    /// The parsed part.
    pub header: Header,
    bytes: Bytes,
    decoded: Mutex<Option<Weak<dyn Any + Send + Sync>>>,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("header", &self.header)
            .field("bytes", &self.bytes.len())
            .finish()
    }
}

impl Entry {
    /// Parses the header; the rest stays bytes.
    pub fn parse(bytes: Bytes) -> Result<Self, serde_json::Error> {
        let Wire { metadata: m } = serde_json::from_slice(&bytes)?;
        let header = Header {
            key: Key {
                ns: m.namespace,
                name: m.name,
            },
            uid: m.uid,
            resource_version: m.resource_version,
            generation: m.generation,
            labels: m.labels.unwrap_or_default(),
            owners: m.owner_references.unwrap_or_default(),
            finalizers: m.finalizers.unwrap_or_default(),
            deleting: m.deletion_timestamp.is_some(),
        };
        Ok(Self {
            header,
            bytes,
            decoded: Mutex::new(None),
        })
    }

    /// The object as JSON.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The typed object. Decoded anew unless somebody still holds the last result.
    pub fn decode<K: DeserializeOwned + Send + Sync + 'static>(&self) -> Result<Arc<K>, serde_json::Error> {
        Ok(self.decode_tracked()?.0)
    }

    /// As [`Self::decode`]; the flag says whether work was done.
    fn decode_tracked<K: DeserializeOwned + Send + Sync + 'static>(&self) -> Result<(Arc<K>, bool), serde_json::Error> {
        if let Some(live) = self.decoded.lock().as_ref().and_then(Weak::upgrade)
            && let Ok(typed) = live.downcast::<K>()
        {
            return Ok((typed, false));
        }
        let typed: Arc<K> = Arc::new(serde_json::from_slice(&self.bytes)?);
        let erased: Arc<dyn Any + Send + Sync> = typed.clone();
        *self.decoded.lock() = Some(Arc::downgrade(&erased));
        Ok((typed, true))
    }
}

/// What happened to one object: `old` is absent for new objects, `new` for deleted ones.
#[derive(Debug, Clone)]
pub struct Change {
    /// The object before.
    pub old: Option<Arc<Entry>>,
    /// The object now.
    pub new: Option<Arc<Entry>>,
}

impl Change {
    /// The newest known state: `new`, else the last state of a deleted object.
    pub fn latest(&self) -> &Arc<Entry> {
        match (&self.new, &self.old) {
            (Some(entry), _) | (None, Some(entry)) => entry,
            (None, None) => unreachable!("a change has a side"),
        }
    }

    /// The object's key.
    pub fn key(&self) -> &Key {
        &self.latest().header.key
    }

    /// The object is gone.
    pub fn is_deletion(&self) -> bool {
        self.new.is_none()
    }
}

#[derive(Default)]
struct State {
    objects: BTreeMap<Key, Arc<Entry>>,
    by_owner: HashMap<String, BTreeSet<Key>>,
    by_uid: HashMap<String, Key>,
}

impl State {
    fn insert(&mut self, entry: Arc<Entry>) -> Option<Arc<Entry>> {
        let old = self.remove(&entry.header.key);
        for owner in &entry.header.owners {
            self.by_owner
                .entry(owner.uid.clone())
                .or_default()
                .insert(entry.header.key.clone());
        }
        self.by_uid.insert(entry.header.uid.clone(), entry.header.key.clone());
        self.objects.insert(entry.header.key.clone(), entry);
        old
    }

    fn remove(&mut self, key: &Key) -> Option<Arc<Entry>> {
        let old = self.objects.remove(key)?;
        for owner in &old.header.owners {
            if let Some(keys) = self.by_owner.get_mut(&owner.uid) {
                keys.remove(key);
                if keys.is_empty() {
                    self.by_owner.remove(&owner.uid);
                }
            }
        }
        self.by_uid.remove(&old.header.uid);
        Some(old)
    }
}

/// A handler of changes. Runs inline on the reflector's task: it maps to queue keys and returns.
pub type Handler = Box<dyn Fn(&Change) + Send + Sync>;

/// The store of one resource (or a selection of it).
#[derive(Default)]
pub struct Store {
    state: RwLock<State>,
    /// Held while applying and telling, so that every handler sees every change once and in order.
    handlers: Mutex<Vec<Handler>>,
    recent: Mutex<VecDeque<Arc<dyn Any + Send + Sync>>>,
    undecodable: AtomicU64,
    version: AtomicU64,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("objects", &self.state.read().objects.len())
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Adds a handler after telling it about every object already here, as an addition.
    pub fn on_change(&self, handler: Handler) {
        let mut handlers = self.handlers.lock();
        let all: Vec<_> = self.state.read().objects.values().cloned().collect();
        for entry in all {
            handler(&Change {
                old: None,
                new: Some(entry),
            });
        }
        handlers.push(handler);
    }

    /// Drops all handlers, and with them whatever they hold.
    pub(crate) fn clear_handlers(&self) {
        self.handlers.lock().clear();
    }

    /// Applies one addition or modification. An object of equal version changes nothing.
    pub(crate) fn apply(&self, entry: Entry) {
        let handlers = self.handlers.lock();
        self.apply_locked(&handlers, Arc::new(entry));
    }

    fn apply_locked(&self, handlers: &[Handler], entry: Arc<Entry>) {
        let old = {
            let mut state = self.state.write();
            match state.objects.get(&entry.header.key) {
                Some(old)
                    if old.header.uid == entry.header.uid
                        && old.header.resource_version == entry.header.resource_version =>
                {
                    return;
                }
                _ => state.insert(entry.clone()),
            }
        };
        // A new uid under an old name is a deletion and an addition; owners of the old object must hear of it.
        match old {
            Some(old) if old.header.uid != entry.header.uid => {
                tell(
                    handlers,
                    &Change {
                        old: Some(old),
                        new: None,
                    },
                );
                tell(
                    handlers,
                    &Change {
                        old: None,
                        new: Some(entry),
                    },
                );
            }
            old => tell(handlers, &Change { old, new: Some(entry) }),
        }
    }

    /// Applies one deletion.
    pub(crate) fn delete(&self, key: &Key) {
        let handlers = self.handlers.lock();
        let old = self.state.write().remove(key);
        if let Some(old) = old {
            tell(
                &handlers,
                &Change {
                    old: Some(old),
                    new: None,
                },
            );
        }
    }

    /// Makes the store equal to a fresh list; handlers hear only of differences.
    pub(crate) fn replace(&self, entries: Vec<Entry>) {
        let handlers = self.handlers.lock();
        let listed: BTreeSet<&Key> = entries.iter().map(|e| &e.header.key).collect();
        let gone: Vec<Key> = self
            .state
            .read()
            .objects
            .keys()
            .filter(|k| !listed.contains(k))
            .cloned()
            .collect();
        for key in gone {
            let old = self.state.write().remove(&key);
            tell(&handlers, &Change { old, new: None });
        }
        for entry in entries {
            self.apply_locked(&handlers, Arc::new(entry));
        }
    }

    /// The object of this key.
    pub fn get(&self, key: &Key) -> Option<Arc<Entry>> {
        self.state.read().objects.get(key).cloned()
    }

    /// The object with this uid.
    pub fn by_uid(&self, uid: &str) -> Option<Arc<Entry>> {
        let state = self.state.read();
        state.by_uid.get(uid).and_then(|key| state.objects.get(key)).cloned()
    }

    /// All objects, ascending by namespace and name.
    pub fn list(&self) -> Vec<Arc<Entry>> {
        self.state.read().objects.values().cloned().collect()
    }

    /// Objects of one namespace, ascending by name.
    pub fn list_in(&self, namespace: &str) -> Vec<Arc<Entry>> {
        let state = self.state.read();
        let from = Key::new(namespace, "");
        state
            .objects
            .range((Bound::Included(from), Bound::Unbounded))
            .take_while(|(key, _)| key.ns == namespace)
            .map(|(_, entry)| entry.clone())
            .collect()
    }

    /// Objects that name this uid as an owner, ascending by namespace and name.
    pub fn by_owner(&self, uid: &str) -> Vec<Arc<Entry>> {
        let state = self.state.read();
        let keys = state.by_owner.get(uid);
        keys.into_iter()
            .flatten()
            .filter_map(|key| state.objects.get(key))
            .cloned()
            .collect()
    }

    /// Says that everything up to this resource version has been applied.
    pub(crate) fn reached(&self, version: &str) {
        if let Ok(version) = version.parse() {
            self.version.fetch_max(version, Ordering::AcqRel);
        }
    }

    /// Whether the store knows of a write that returned this uid and version, even if the object is gone since.
    /// Resource versions are compared as numbers, which the API promises since 1.35.
    pub fn has_seen(&self, uid: &str, version: &str) -> bool {
        let reached = version
            .parse::<u64>()
            .is_ok_and(|version| self.version.load(Ordering::Acquire) >= version);
        reached || (version.is_empty() && self.by_uid(uid).is_some())
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.state.read().objects.len()
    }

    /// No objects.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Objects that could not be decoded as the type asked for, since the start.
    pub fn undecodable(&self) -> u64 {
        self.undecodable.load(Ordering::Relaxed)
    }

    /// The typed object, kept warm. An object that does not decode is logged, counted and treated as absent.
    pub(crate) fn typed<K: DeserializeOwned + Send + Sync + 'static>(&self, entry: &Entry) -> Option<Arc<K>> {
        match entry.decode_tracked::<K>() {
            Ok((typed, fresh)) => {
                if fresh {
                    let mut recent = self.recent.lock();
                    if recent.len() >= DECODED_MAX {
                        recent.pop_front();
                    }
                    recent.push_back(typed.clone());
                }
                Some(typed)
            }
            Err(error) => {
                self.undecodable.fetch_add(1, Ordering::Relaxed);
                tracing::error!(key = %entry.header.key, rv = entry.header.resource_version, %error, "object does not decode");
                None
            }
        }
    }
}

fn tell(handlers: &[Handler], change: &Change) {
    for handler in handlers {
        handler(change);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn entry(ns: &str, name: &str, uid: &str, rv: &str, owner: Option<&str>) -> Entry {
        let mut object = json!({"metadata": {"namespace": ns, "name": name, "uid": uid, "resourceVersion": rv}});
        if let Some(owner) = owner {
            object["metadata"]["ownerReferences"] =
                json!([{"apiVersion": "v1", "kind": "O", "name": "o", "uid": owner, "controller": true}]);
        }
        Entry::parse(Bytes::from(object.to_string())).unwrap()
    }

    fn record(store: &Store) -> Arc<Mutex<Vec<String>>> {
        let log = Arc::new(Mutex::new(Vec::new()));
        let sink = log.clone();
        store.on_change(Box::new(move |change| {
            let verb = match (&change.old, &change.new) {
                (None, _) => "add",
                (_, None) => "delete",
                _ => "modify",
            };
            sink.lock().push(format!("{verb} {}", change.key()));
        }));
        log
    }

    #[test]
    fn indexes_follow_changes() {
        let store = Store::default();
        store.apply(entry("a", "x", "1", "1", Some("own")));
        store.apply(entry("a", "y", "2", "2", None));
        store.apply(entry("b", "z", "3", "3", Some("own")));
        let names = |list: Vec<Arc<Entry>>| list.iter().map(|e| e.header.key.to_string()).collect::<Vec<_>>();
        assert_eq!(names(store.by_owner("own")), ["a/x", "b/z"]);
        assert_eq!(names(store.list_in("a")), ["a/x", "a/y"]);
        store.apply(entry("a", "x", "1", "4", None));
        assert_eq!(names(store.by_owner("own")), ["b/z"]);
        store.delete(&Key::new("b", "z"));
        assert!(store.by_owner("own").is_empty() && store.by_uid("3").is_none());
        assert_eq!(store.by_uid("2").unwrap().header.key.name, "y");
    }

    #[test]
    fn handlers_hear_each_difference_once() {
        let store = Store::default();
        store.apply(entry("a", "x", "1", "1", None));
        let log = record(&store);
        store.apply(entry("a", "x", "1", "1", None));
        store.apply(entry("a", "x", "1", "2", None));
        store.replace(vec![entry("a", "x", "1", "2", None), entry("a", "y", "2", "3", None)]);
        store.apply(entry("a", "y", "9", "4", None));
        store.replace(vec![entry("a", "y", "9", "4", None)]);
        assert_eq!(
            *log.lock(),
            [
                "add a/x",
                "modify a/x",
                "add a/y",
                "delete a/y",
                "add a/y",
                "delete a/x"
            ]
        );
    }

    #[test]
    fn decoded_values_are_shared_while_held() {
        let store = Store::default();
        store.apply(entry("a", "x", "1", "1", None));
        let e = store.get(&Key::new("a", "x")).unwrap();
        let (one, two) = (store.typed::<Value>(&e).unwrap(), store.typed::<Value>(&e).unwrap());
        assert!(Arc::ptr_eq(&one, &two));
        assert!(store.typed::<Vec<u8>>(&e).is_none());
        assert_eq!(store.undecodable(), 1);
    }
}

//! The objects of one cluster in memory, per resource an ordered map and a ring of events.
//!
//! The registry observes the store: a batch is applied here before its writer is answered, so reads never miss an
//! acknowledged write. Maps are persistent, so a list works on a snapshot without holding a lock. A watcher is a cursor
//! on the ring; who falls behind the ring's start is told so (410).

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use imbl::OrdMap;
use parking_lot::RwLock;
use stdx::SharedClock;
use store::{Batch, Keyspace, Observer, Op};
use tokio::sync::watch;

use crate::fields;
use crate::object::{Encoded, Object};
use crate::seal::Sealer;

/// Events kept per resource for watches that resume.
const RING_EVENTS_MAX: usize = 4096;
/// Bytes of event objects kept per resource.
const RING_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Snapshots kept per resource for lists that continue.
const SNAPSHOTS_MAX: usize = 32;
/// How long such a snapshot stays; upstream's etcd compacts every five minutes too.
const SNAPSHOT_TTL: Duration = Duration::from_secs(300);

/// `namespace/name`, or `name` for cluster-scoped objects.
pub type ObjectMap = OrdMap<Arc<str>, Arc<Object>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    Added,
    Modified,
    Deleted,
}

/// One change of one object.
#[derive(Debug)]
pub struct Event {
    pub kind: EventKind,
    pub rv: u64,
    /// The new content; for a deletion the last content at the deletion's revision.
    pub object: Arc<Object>,
    /// The content before, absent for `Added`.
    pub previous: Option<Arc<Object>>,
}

struct State {
    objects: ObjectMap,
    events: VecDeque<Arc<Event>>,
    bytes: usize,
    /// Absolute number of `events[0]`.
    base: u64,
    /// Revision of the newest event that left the ring (or of the start).
    floor: u64,
    /// Revision of the newest change here.
    newest: u64,
    snapshots: VecDeque<(u64, Duration, ObjectMap)>,
}

/// All objects of one group and plural, whatever version they are served at.
pub struct Resource {
    pub group: Box<str>,
    pub plural: Box<str>,
    pub fields: &'static [&'static str],
    prefix: Box<str>,
    state: RwLock<State>,
    changed: watch::Sender<u64>,
}

/// A consistent view of a resource.
pub struct View {
    pub revision: u64,
    pub objects: ObjectMap,
}

/// Where a watch starts.
pub enum Start {
    /// Absolute number of the first event to deliver.
    At(u64),
    /// The revision asked for is older than the ring.
    TooOld { floor: u64 },
}

/// What a cursor finds.
pub enum Next {
    Events(Vec<Arc<Event>>),
    Nothing,
    FellOut { floor: u64 },
}

impl Resource {
    fn new(group: &str, plural: &str, revision: u64) -> Self {
        Resource {
            group: group.into(),
            plural: plural.into(),
            fields: fields::selectable(group, plural),
            prefix: format!("o/{group}/{plural}/").into(),
            state: RwLock::new(State {
                objects: OrdMap::new(),
                events: VecDeque::new(),
                bytes: 0,
                base: 0,
                floor: revision,
                newest: revision,
                snapshots: VecDeque::new(),
            }),
            changed: watch::Sender::new(0),
        }
    }

    /// The object's key in the store.
    pub fn store_key(&self, namespace: &str, name: &str) -> Bytes {
        format!("{}{}", self.prefix, key(namespace, name)).into()
    }

    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<Object>> {
        self.state.read().objects.get(&*key(namespace, name)).cloned()
    }

    /// Number of objects.
    pub fn count(&self) -> usize {
        self.state.read().objects.len()
    }

    /// Revision of the newest change.
    pub fn newest(&self) -> u64 {
        self.state.read().newest
    }

    /// The objects as they are now, without a revision.
    pub fn snapshot(&self) -> ObjectMap {
        self.state.read().objects.clone()
    }

    /// Wakes when an event was added.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// First event after revision `rv`.
    pub fn start_after(&self, rv: u64) -> Start {
        let state = self.state.read();
        if rv < state.floor {
            return Start::TooOld { floor: state.floor };
        }
        Start::At(state.base + state.events.partition_point(|e| e.rv <= rv) as u64)
    }

    /// Events from absolute number `from`, at most `max`.
    pub fn events_from(&self, from: u64, max: usize) -> Next {
        let state = self.state.read();
        let Some(skip) = from.checked_sub(state.base) else {
            return Next::FellOut { floor: state.floor };
        };
        let found: Vec<_> = state.events.iter().skip(skip as usize).take(max).cloned().collect();
        if found.is_empty() {
            Next::Nothing
        } else {
            Next::Events(found)
        }
    }

    fn apply(&self, name: &str, rv: u64, new: Option<Arc<Object>>) {
        let mut state = self.state.write();
        let previous = match &new {
            Some(object) => state.objects.insert(name.into(), object.clone()),
            None => state.objects.remove(name),
        };
        let (kind, object) = match (new, &previous) {
            (Some(object), None) => (EventKind::Added, object),
            (Some(object), Some(_)) => (EventKind::Modified, object),
            (None, Some(last)) => (EventKind::Deleted, last.at(rv)),
            (None, None) => return,
        };
        state.newest = rv;
        state.bytes += object.encoded.bytes.len();
        state.events.push_back(Arc::new(Event {
            kind,
            rv,
            object,
            previous,
        }));
        while state.events.len() > RING_EVENTS_MAX || (state.bytes > RING_BYTES_MAX && state.events.len() > 1) {
            let Some(old) = state.events.pop_front() else { break };
            state.bytes -= old.object.encoded.bytes.len();
            state.base += 1;
            state.floor = old.rv;
        }
        drop(state);
        self.changed.send_replace(rv);
    }
}

/// Key of an object within its resource.
pub fn key(namespace: &str, name: &str) -> String {
    if namespace.is_empty() {
        name.to_owned()
    } else {
        format!("{namespace}/{name}")
    }
}

/// All objects of one cluster. Written by the store's committer only.
pub struct Registry {
    /// Keys below `a/`: what objects hold besides themselves (addresses, ports).
    claims: RwLock<HashSet<Bytes>>,
    resources: RwLock<HashMap<(Box<str>, Box<str>), Arc<Resource>>>,
    revision: AtomicU64,
    /// Opens what other servers sealed.
    sealer: Arc<Sealer>,
    clock: SharedClock,
}

impl Registry {
    /// Reads every object of the keyspace and follows it from there on.
    ///
    /// # Assumptions
    /// This process writes nothing to the keyspace before this returns. Others may: what they commit after the state that
    /// is read comes to the observer.
    pub fn open(keyspace: &dyn Keyspace, sealer: Arc<Sealer>, clock: SharedClock) -> Result<Arc<Self>, store::Error> {
        let mut claims = HashSet::new();
        keyspace.range(b"a/", &mut |entry| {
            claims.insert(entry.key);
        })?;
        let registry = Arc::new(Registry {
            claims: RwLock::new(claims),
            resources: RwLock::default(),
            revision: AtomicU64::new(keyspace.revision()),
            sealer,
            clock,
        });
        let mut corrupt = None;
        keyspace.range(b"o/", &mut |entry| {
            let Some((group, plural, name)) = split_key(&entry.key) else {
                return;
            };
            let resource = registry.resource(group, plural);
            let opened = registry.sealer.open(&entry.key, entry.value).ok();
            match opened.and_then(|value| Encoded::recover(value, resource.fields)) {
                Some(encoded) => {
                    let object = Object::new(encoded, entry.mod_rev);
                    resource.state.write().objects.insert(name.into(), object);
                }
                None => {
                    corrupt = Some(store::Error::Corrupt {
                        key: entry.key.clone(),
                        reason: "no object encoding, or sealed with another key",
                    });
                }
            }
        })?;
        if let Some(error) = corrupt {
            return Err(error);
        }
        keyspace.observe(registry.clone());
        Ok(registry)
    }

    /// Newest revision whose changes are all visible.
    pub fn revision(&self) -> u64 {
        self.revision.load(Ordering::Acquire)
    }

    /// The resource's objects, made empty at first use.
    pub fn resource(&self, group: &str, plural: &str) -> Arc<Resource> {
        let id = (Box::from(group), Box::from(plural));
        if let Some(found) = self.resources.read().get(&id) {
            return found.clone();
        }
        let revision = self.revision();
        self.resources
            .write()
            .entry(id)
            .or_insert_with(|| Arc::new(Resource::new(group, plural, revision)))
            .clone()
    }

    /// All resources that have been used, in no order.
    pub fn resources(&self) -> Vec<Arc<Resource>> {
        self.resources.read().values().cloned().collect()
    }

    /// The resource as it is now. Everything at or below the returned revision is in it, and nothing above.
    pub fn view(&self, resource: &Resource) -> View {
        let visible = self.revision();
        let state = resource.state.read();
        View {
            revision: visible.max(state.newest),
            objects: state.objects.clone(),
        }
    }

    /// Whether an object holds the key (see [`crate::admission`]).
    pub fn is_claimed(&self, key: &str) -> bool {
        self.claims.read().contains(key.as_bytes())
    }

    /// Keeps the view so that a list can be continued, for up to five minutes.
    pub fn pin(&self, resource: &Resource, view: &View) {
        let now = self.clock.monotonic();
        let mut state = resource.state.write();
        state
            .snapshots
            .retain(|(_, at, _)| now.saturating_sub(*at) < SNAPSHOT_TTL);
        if state.snapshots.iter().any(|(rv, ..)| *rv == view.revision) {
            return;
        }
        if state.snapshots.len() >= SNAPSHOTS_MAX {
            state.snapshots.pop_front();
        }
        state.snapshots.push_back((view.revision, now, view.objects.clone()));
    }

    /// The view at exactly `revision`: the present one, or one that was kept. `None` when it is gone.
    pub fn view_at(&self, resource: &Resource, revision: u64) -> Option<View> {
        let now = self.clock.monotonic();
        let current = self.view(resource);
        let state = resource.state.read();
        if revision == current.revision || (revision >= state.newest && revision <= current.revision) {
            return Some(View {
                revision,
                objects: current.objects,
            });
        }
        state
            .snapshots
            .iter()
            .find(|(rv, at, _)| *rv == revision && now.saturating_sub(*at) < SNAPSHOT_TTL)
            .map(|(_, _, objects)| View {
                revision,
                objects: objects.clone(),
            })
    }
}

fn split_key(key: &[u8]) -> Option<(&str, &str, &str)> {
    let key = std::str::from_utf8(key).ok()?.strip_prefix("o/")?;
    let (group, rest) = key.split_once('/')?;
    let (plural, name) = rest.split_once('/')?;
    Some((group, plural, name))
}

impl Observer for Registry {
    fn committed(&self, batch: &Batch) {
        for op in batch.ops.iter() {
            let Some((group, plural, name)) = split_key(op.key()) else {
                match op {
                    Op::Put { key, .. } if key.starts_with(b"a/") => {
                        self.claims.write().insert(key.clone());
                    }
                    Op::Delete { key, .. } => {
                        self.claims.write().remove(key);
                    }
                    Op::Put { .. } => {}
                }
                continue;
            };
            let resource = self.resource(group, plural);
            let new = match op {
                Op::Delete { .. } => None,
                Op::Put { value, attachment, .. } => {
                    let encoded = attachment
                        .as_ref()
                        .and_then(|a| a.downcast_ref::<Encoded>().cloned())
                        .or_else(|| {
                            // Another server wrote it.
                            let opened = self.sealer.open(op.key(), value.clone()).ok()?;
                            Encoded::recover(opened, resource.fields)
                        });
                    let Some(encoded) = encoded else {
                        tracing::error!(key = ?op.key(), "an object that was written cannot be read: damaged, or sealed with another key");
                        continue;
                    };
                    Some(Object::new(encoded, batch.revision))
                }
            };
            resource.apply(name, batch.revision, new);
        }
        self.revision.store(batch.revision, Ordering::Release);
    }
}

/// The objects of one namespace, or all of them if it is empty, starting after key `after`.
pub fn scan<'a>(
    objects: &'a ObjectMap,
    namespace: &str,
    after: Option<&str>,
) -> impl Iterator<Item = (&'a Arc<str>, &'a Arc<Object>)> {
    let prefix = if namespace.is_empty() {
        String::new()
    } else {
        format!("{namespace}/")
    };
    let from: Bound<Arc<str>> = match after {
        Some(key) => Bound::Excluded(Arc::from(key)),
        None => Bound::Included(Arc::from(prefix.as_str())),
    };
    objects
        .range((from, Bound::Unbounded))
        .take_while(move |(key, _)| key.starts_with(&prefix))
}

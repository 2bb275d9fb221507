//! What a cluster serves: the built-in resources, and those of CustomResourceDefinitions as they come and go.
//!
//! A request works on one [`Api`], which never changes. When definitions do, [`crate::crds`] puts a new one in its place;
//! resources that stay as they are stay the same [`Served`], the others end their watches.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use apimachinery::openapi::Documents;
use apimachinery::structural::Structural;
use apimachinery::table::{ResourceInfo, TypeTable};
use serde_json::Value;
use stdx::Shutdown;
use tokio::sync::RwLock;

use crate::events;
use crate::object::{Encoded, Object};
use crate::registry::{Registry, Resource};

/// Resources by group, version and plural.
pub type ServedMap = HashMap<(String, String, String), Arc<Served>>;

/// Everything served at a moment.
pub struct Api {
    pub table: Arc<TypeTable>,
    pub served: ServedMap,
    pub documents: Arc<Documents>,
}

impl Api {
    /// The resources of `table` that no definition brought.
    pub fn new(table: Arc<TypeTable>, registry: &Registry, documents: Arc<Documents>) -> Api {
        let mut served = HashMap::new();
        for info in table.resources() {
            let group = if info.group == "events.k8s.io" { "" } else { &info.group };
            let resource = registry.resource(group, &info.plural);
            let structural = table.kind_of(&info.gvk).and_then(|k| k.def.structural.clone());
            let key = (info.group.clone(), info.version.clone(), info.plural.clone());
            served.insert(key, Arc::new(Served::new(info.clone(), resource, structural, None)));
        }
        Api {
            table,
            served,
            documents,
        }
    }

    pub fn resource(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Served>> {
        self.served
            .get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
    }
}

/// One version's schema.
#[derive(Clone)]
pub struct VersionSchema {
    /// Unique in this process: objects that were written under it need no second look.
    pub id: u64,
    pub structural: Arc<Structural>,
}

impl VersionSchema {
    pub fn new(structural: Arc<Structural>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        VersionSchema {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            structural,
        }
    }
}

/// What a definition adds to a resource.
pub struct Custom {
    /// `group/version` that objects are stored at.
    pub storage: String,
    /// All versions of the definition by `group/version`, served or not.
    pub schemas: Arc<BTreeMap<String, VersionSchema>>,
    /// Whether the definition is being deleted.
    pub terminating: bool,
    /// Closed (true) when instances must not be made any more. Creations hold it open while they write.
    pub gate: Arc<RwLock<bool>>,
    /// The built-in types and this version's, in full.
    pub table: Arc<TypeTable>,
}

/// A resource as served at one group and version.
pub struct Served {
    pub info: ResourceInfo,
    pub resource: Arc<Resource>,
    /// The schema of a kind that is not built in.
    pub structural: Option<Arc<Structural>>,
    /// Of a kind that a definition brought.
    pub custom: Option<Custom>,
    /// Triggered when this is no longer what is served: watches end, and clients begin anew.
    pub retired: Shutdown,
}

impl Served {
    pub fn new(
        info: ResourceInfo,
        resource: Arc<Resource>,
        structural: Option<Arc<Structural>>,
        custom: Option<Custom>,
    ) -> Self {
        Served {
            info,
            resource,
            structural,
            custom,
            retired: Shutdown::new(),
        }
    }

    pub fn is(&self, group: &str, plural: &str) -> bool {
        self.info.group == group && self.info.plural == plural
    }

    /// Whether the bytes of [`Served::shown`] objects are served as they are.
    pub fn shares_storage_version(&self) -> bool {
        !self.is("events.k8s.io", "events")
    }

    /// The object as this version of a custom kind shows it: with today's defaults, without fields that today's schema
    /// does not know, under this version's name. Nearly always the object itself; a form that differs is kept with it.
    pub fn shown(&self, object: &Arc<Object>) -> Arc<Object> {
        let Some(custom) = &self.custom else {
            return object.clone();
        };
        let own = self.info.api_version();
        let Some(schema) = custom.schemas.get(&own) else {
            return object.clone();
        };
        object.view(schema.id, || {
            let mut value = object.value();
            let stored = value["apiVersion"].as_str().and_then(|v| custom.schemas.get(v));
            if let Some(stored) = stored.filter(|s| s.id != schema.id) {
                stored.structural.prune(&mut value);
                stored.structural.default(&mut value);
            }
            schema.structural.prune(&mut value);
            if stored.is_none_or(|s| s.id == schema.id) {
                schema.structural.default(&mut value);
            }
            value["apiVersion"] = own.into();
            let mut encoded = Encoded::new(&value, self.resource.fields);
            encoded.schema = schema.id;
            encoded
        })
    }

    /// The object as this group and version shows it.
    pub fn value(&self, object: &Arc<Object>) -> Value {
        let mut value = self.shown(object).value();
        if !self.shares_storage_version() {
            events::from_core(&mut value);
        }
        value
    }

    /// The object as it is stored.
    pub fn to_storage<'v>(&self, value: &'v Value) -> Cow<'v, Value> {
        if let Some(custom) = &self.custom {
            if value["apiVersion"] == custom.storage.as_str() {
                return Cow::Borrowed(value);
            }
            let mut value = value.clone();
            value["apiVersion"] = custom.storage.clone().into();
            if let Some(schema) = custom.schemas.get(&custom.storage) {
                schema.structural.prune(&mut value);
            }
            return Cow::Owned(value);
        }
        if self.shares_storage_version() {
            return Cow::Borrowed(value);
        }
        let mut value = value.clone();
        events::to_core(&mut value);
        Cow::Owned(value)
    }

    /// Encodes an object as it is stored.
    pub fn encode(&self, value: &Value) -> Encoded {
        let mut encoded = Encoded::new(&self.to_storage(value), self.resource.fields);
        // What comes from another version was never given the storage version's defaults.
        let custom = self.custom.as_ref();
        if let Some(custom) = custom.filter(|c| value["apiVersion"] == c.storage.as_str()) {
            encoded.schema = custom.schemas.get(&custom.storage).map_or(0, |s| s.id);
        }
        encoded
    }

    /// Sets the defaults of an object.
    pub fn default(&self, value: &mut Value) {
        match &self.structural {
            Some(structural) => structural.default(value),
            None => apimachinery::defaults::apply(&self.info.gvk, value),
        }
    }
}

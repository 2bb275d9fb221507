//! The reference engine: a `BTreeMap` in memory. Deterministic, never blocks, loses everything when dropped.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use crate::core::Core;
use crate::{Check, Engine, Entry, Error, Keyspace, Observer, Op, Revision, Watch, WatchError, check_name, check_size};

/// In-memory engine for tests and simulation.
#[derive(Default)]
pub struct ModelEngine {
    keyspaces: Mutex<BTreeMap<String, Arc<ModelKeyspace>>>,
}

impl ModelEngine {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }
}

#[async_trait]
impl Engine for ModelEngine {
    fn keyspace(&self, name: &str) -> Result<Arc<dyn Keyspace>, Error> {
        check_name(name)?;
        let mut all = self.keyspaces.lock();
        let keyspace = all.entry(name.to_owned()).or_insert_with(|| {
            Arc::new(ModelKeyspace {
                core: Core::new(name, HashMap::new(), 0),
                map: Mutex::default(),
            })
        });
        Ok(keyspace.clone())
    }

    async fn drop_keyspace(&self, name: &str) -> Result<(), Error> {
        if let Some(keyspace) = self.keyspaces.lock().remove(name) {
            let mut map = keyspace.map.lock();
            keyspace.core.mark_dropped();
            map.clear();
        }
        Ok(())
    }

    fn list_keyspaces(&self) -> Vec<String> {
        self.keyspaces.lock().keys().cloned().collect()
    }
}

struct ModelKeyspace {
    core: Core,
    /// Held across accept and publish, which makes transactions serial.
    map: Mutex<BTreeMap<Bytes, (Revision, Bytes)>>,
}

#[async_trait]
impl Keyspace for ModelKeyspace {
    fn name(&self) -> &str {
        &self.core.name
    }

    fn revision(&self) -> Revision {
        self.core.revision()
    }

    fn range(&self, prefix: &[u8], each: &mut dyn FnMut(Entry)) -> Result<(), Error> {
        let map = self.map.lock().clone();
        for (key, (mod_rev, value)) in map.range(Bytes::copy_from_slice(prefix)..) {
            if !key.starts_with(prefix) {
                break;
            }
            each(Entry {
                key: key.clone(),
                value: value.clone(),
                mod_rev: *mod_rev,
            });
        }
        Ok(())
    }

    async fn txn(&self, checks: Vec<Check>, ops: Vec<Op>) -> Result<Revision, Error> {
        check_size(&checks, &ops)?;
        let mut map = self.map.lock();
        let batch = self.core.accept(&checks, ops)?;
        for op in batch.ops.iter() {
            match op {
                Op::Put { key, value, .. } => {
                    map.insert(key.clone(), (batch.revision, value.clone()));
                }
                Op::Delete { key, .. } => {
                    map.remove(key);
                }
            }
        }
        let revision = batch.revision;
        self.core.publish(batch);
        Ok(revision)
    }

    fn watch(&self, after: Revision) -> Result<Watch, WatchError> {
        self.core.watch(after)
    }

    fn observe(&self, observer: Arc<dyn Observer>) {
        self.core.observe(observer);
    }
}

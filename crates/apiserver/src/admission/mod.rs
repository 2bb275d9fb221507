//! Admission: what the server adds to objects and what it refuses, before anything is stored.
//!
//! Plugins are functions over trees, in upstream's order: namespace lifecycle, limit ranges, service account, priority,
//! tolerations, services' addresses; quotas come last. What must be unique in the cluster (a service address, a node port) is a *claim*: a key that is
//! written in the same transaction as the object, so two objects never get the same one.

pub mod addresses;
mod certificates;
mod class;
mod limit_range;
mod namespace;
mod pod;
pub mod quota;
mod rbac;
mod service;

use std::sync::Arc;

use apimachinery::status::Status;
use bytes::Bytes;
use serde_json::Value;
use store::{Check, Op};

use crate::auth::node;
use crate::handlers::Context;
use crate::object::{Encoded, Object};
use crate::strategy::Part;

pub use service::{ServiceRange, allocation_keys};

/// What is being done to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Create,
    Update(Part),
    Delete,
}

/// Another object that is written, or removed, in the same transaction.
#[derive(Clone, Debug)]
pub struct Beside {
    /// Its key in the store.
    pub key: Bytes,
    /// The revision it must have; 0 if it must not exist.
    pub rv: u64,
    /// Its new content; absent: it goes.
    pub object: Option<Encoded>,
}

/// What is taken and given back beside an object.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    pub acquire: Vec<String>,
    pub release: Vec<String>,
    /// Who holds what is acquired; the keys' value.
    pub holder: String,
    pub beside: Vec<Beside>,
}

impl Claims {
    pub fn is_empty(&self) -> bool {
        self.acquire.is_empty() && self.release.is_empty() && self.beside.is_empty()
    }

    /// Adds the claims to the object's transaction.
    pub fn add_to(&self, checks: &mut Vec<Check>, ops: &mut Vec<Op>) {
        for key in &self.release {
            ops.push(Op::delete(key.clone()));
        }
        for key in &self.acquire {
            checks.push(Check::absent(key.clone()));
            ops.push(Op::put(key.clone(), Bytes::from(self.holder.clone())));
        }
        for beside in &self.beside {
            checks.push(Check::at(beside.key.clone(), beside.rv));
            ops.push(match &beside.object {
                Some(encoded) => Op::put(beside.key.clone(), encoded.bytes.clone()).with(Arc::new(encoded.clone())),
                None => Op::delete(beside.key.clone()),
            });
        }
    }
}

/// Completes an object, or refuses what cannot be completed.
pub fn mutate(cx: &Context, operation: Operation, old: Option<&Value>, new: &mut Value) -> Result<(), Status> {
    namespace::check_creation(cx, operation, new)?;
    if certificates::is(cx) {
        certificates::complete(cx, operation, old, new);
    }
    match (operation, cx.served.info.group.as_str(), cx.served.info.plural.as_str()) {
        (Operation::Create, "", "pods") => {
            limit_range::fill(cx, new);
            pod::create(cx, new)
        }
        (Operation::Create, "networking.k8s.io", "ingresses") => {
            class::default_ingress_class(cx, new);
            Ok(())
        }
        (Operation::Create | Operation::Update(Part::Main), "", "services") => service::complete(cx, old, new),
        _ => Ok(()),
    }
}

/// Refuses what must not happen.
pub fn validate(cx: &Context, operation: Operation, old: Option<&Value>, new: &Value) -> Result<(), Status> {
    namespace::check_deletion(cx, operation)?;
    limit_range::check(cx, operation, new)?;
    rbac::check(cx, operation, old, new)?;
    class::check(cx, operation, new)?;
    certificates::check(cx, operation, old, new)?;
    node::restrict(cx, operation, old, new)
}

/// What the change from `old` to `new` takes and gives back.
pub fn claims(cx: &Context, old: Option<&Value>, new: Option<&Value>) -> Claims {
    if !cx.served.is("", "services") {
        return Claims::default();
    }
    let before = old.map(allocation_keys).unwrap_or_default();
    let after = new.map(allocation_keys).unwrap_or_default();
    let holder = new.map(|v| format!("{}/{}", apimachinery::meta::namespace(v), apimachinery::meta::name(v)));
    Claims {
        acquire: after.iter().filter(|k| !before.contains(k)).cloned().collect(),
        release: before.iter().filter(|k| !after.contains(k)).cloned().collect(),
        holder: holder.unwrap_or_default(),
        beside: addresses::beside(&cx.cluster, old, new),
    }
}

/// The refusal of an object whose claim another object holds.
pub fn claim_refused(cx: &Context, object: &Arc<Object>, key: &str) -> Status {
    if let Some(quota) = key
        .strip_prefix("o//resourcequotas/")
        .and_then(|k| k.rsplit('/').next())
    {
        return Status::modified("resourcequotas", quota);
    }
    if let Some(address) = key.strip_prefix("o/networking.k8s.io/ipaddresses/") {
        return service::refused(cx, &object.header().name, &service::address_key(address));
    }
    service::refused(cx, &object.header().name, key)
}

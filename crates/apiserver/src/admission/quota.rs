//! ResourceQuota: what a write uses more is added to the quotas of its namespace in the same transaction.
//!
//! The usage in a quota's status is therefore exact upwards: two writes at once cannot both take the last place, because
//! both would write the quota at the same revision. What deletions and ended pods give back is counted by the controller.
//! Within this process a lock per namespace lets such writes queue instead of losing the race over and over.
//!
//! # Source
//! `staging/src/k8s.io/apiserver/pkg/admission/plugin/resourcequota` of Kubernetes 1.36. There a new quota limits nothing
//! until the controller has counted once; here its usage is counted by the first write that it concerns.

use std::collections::HashMap;
use std::sync::Arc;

use apimachinery::meta;
use apimachinery::quantity::Quantity;
use apimachinery::status::Status;
use apimachinery::usage::{self, Amounts};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::OwnedMutexGuard;

use super::Beside;
use crate::cluster::Cluster;
use crate::handlers::Context;
use crate::object::Encoded;
use crate::registry;

/// Namespaces with quotas where something was written; a lock each.
#[derive(Default)]
pub struct Locks(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

/// Locks kept while nobody holds them; beyond, unused ones go.
const LOCKS_MAX: usize = 256;

impl Locks {
    async fn lock(&self, namespace: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock();
            if locks.len() >= LOCKS_MAX {
                locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            }
            locks.entry(namespace.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }
}

/// What quotas say to a write.
#[derive(Default)]
pub struct Reservation {
    /// The quotas' new content, for the write's transaction.
    pub beside: Vec<Beside>,
    /// Held until the transaction is done.
    _turn: Option<OwnedMutexGuard<()>>,
}

/// Kinds that count for nothing.
fn is_ignored(cx: &Context) -> bool {
    let info = &cx.served.info;
    !info.namespaced
        || matches!(info.plural.as_str(), "events" | "bindings")
        || info.group.ends_with("authorization.k8s.io")
}

/// Kinds whose updates can use more.
fn grows(cx: &Context) -> bool {
    cx.served.is("", "services") || cx.served.is("", "persistentvolumeclaims")
}

/// Reserves what `new` uses more than `old`.
///
/// # Errors
/// 403 with upstream's words when a quota would be exceeded, or does not say what it needs to be counted.
pub async fn reserve(cx: &Context, old: Option<&Value>, new: &Value) -> Result<Reservation, Status> {
    if is_ignored(cx) || (old.is_some() && !grows(cx)) {
        return Ok(Reservation::default());
    }
    let Some(quotas) = cx.cluster.resource("", "v1", "resourcequotas") else {
        return Ok(Reservation::default());
    };
    let namespace = cx.namespace();
    if registry::scan(&quotas.resource.snapshot(), namespace, None)
        .next()
        .is_none()
    {
        return Ok(Reservation::default());
    }
    let turn = cx.cluster.quota_locks.lock(namespace).await;
    let mut reservation = Reservation {
        beside: Vec::new(),
        _turn: Some(turn),
    };
    let (group, plural) = (cx.served.info.group.as_str(), cx.served.info.plural.as_str());
    let mut delta = usage::of_object(group, plural, new);
    if let Some(old) = old {
        for (name, amount) in usage::of_object(group, plural, old) {
            let entry = delta.entry(name).or_default();
            *entry = *entry - amount;
        }
        delta.retain(|_, amount| *amount > Quantity::ZERO);
    }
    for (_, object) in registry::scan(&quotas.resource.snapshot(), namespace, None) {
        let mut quota = object.value();
        if !usage::applies(&quota, group, plural, new) {
            continue;
        }
        let hard = usage::amounts(&quota["spec"]["hard"]);
        if plural == "pods" && group.is_empty() && old.is_none() {
            let missing = usage::constraints(&hard, new);
            if !missing.is_empty() {
                let why = format!("failed quota: {}: must specify {missing}", meta::name(&quota));
                return Err(Status::forbidden(&cx.target.group_resource(), meta::name(new), &why));
            }
        }
        let more = usage::masked(&delta, &hard);
        if more.is_empty() {
            continue;
        }
        let mut used = match quota["status"]["hard"] == quota["spec"]["hard"] {
            true => usage::amounts(&quota["status"]["used"]),
            false => counted(&cx.cluster, namespace, &quota),
        };
        check(cx, &quota, &hard, &used, &more, meta::name(new))?;
        usage::add(&mut used, &more);
        quota["status"] = serde_json::json!({"hard": quota["spec"]["hard"], "used": usage::to_value(&used)});
        reservation.beside.push(Beside {
            key: quotas.resource.store_key(namespace, meta::name(&quota)),
            rv: object.rv,
            object: Some(Encoded::new(&quota, quotas.resource.fields)),
        });
    }
    Ok(reservation)
}

/// The quota's usage from the objects themselves.
fn counted(cluster: &Cluster, namespace: &str, quota: &Value) -> Amounts {
    usage::of_quota(quota, |group, plural| {
        let objects = cluster.registry.resource(group, plural).snapshot();
        registry::scan(&objects, namespace, None)
            .map(|(_, o)| o.value())
            .collect()
    })
}

fn check(
    cx: &Context,
    quota: &Value,
    hard: &Amounts,
    used: &Amounts,
    more: &Amounts,
    name: &str,
) -> Result<(), Status> {
    let used_of = |resource: &String| used.get(resource).copied().unwrap_or_default();
    let over: Amounts = more
        .iter()
        .filter(|(resource, amount)| used_of(resource) + **amount > hard.get(*resource).copied().unwrap_or_default())
        .map(|(resource, amount)| (resource.clone(), *amount))
        .collect();
    if over.is_empty() {
        return Ok(());
    }
    let used: Amounts = over.keys().map(|r| (r.clone(), used_of(r))).collect();
    let why = format!(
        "exceeded quota: {}, requested: {}, used: {}, limited: {}",
        meta::name(quota),
        usage::shown(&over),
        usage::shown(&used),
        usage::shown(&usage::masked(hard, &over)),
    );
    Err(Status::forbidden(&cx.target.group_resource(), name, &why))
}

//! Classes that other objects name: what a pod's priority class amounts to, and the default ingress class.

use apimachinery::meta;
use apimachinery::status::Status;
use apimachinery::validate::SYSTEM_PRIORITIES;
use serde_json::Value;

use super::Operation;
use crate::cluster::Cluster;
use crate::handlers::Context;

const SCHEDULING: &str = "scheduling.k8s.io";
const NETWORKING: &str = "networking.k8s.io";
const DEFAULT_INGRESS_CLASS: &str = "ingressclass.kubernetes.io/is-default-class";
const INGRESS_CLASS: &str = "kubernetes.io/ingress.class";

/// Every object of a cluster-scoped kind. Classes are few.
fn all(cluster: &Cluster, group: &str, plural: &str) -> Vec<Value> {
    let Some(served) = cluster.resource(group, "v1", plural) else {
        return Vec::new();
    };
    served.resource.snapshot().values().map(|o| o.value()).collect()
}

/// The class pods without one get: of those marked the one with the lowest value.
fn default_priority(cluster: &Cluster) -> Option<Value> {
    all(cluster, SCHEDULING, "priorityclasses")
        .into_iter()
        .filter(|c| c["globalDefault"] == true)
        .min_by_key(|c| c["value"].as_i64().unwrap_or_default())
}

/// Name, value and preemption policy for a pod that names `class` (empty: none). `None` if there is no such class.
pub fn priority(cluster: &Cluster, class: &str) -> Option<(String, i64, Option<String>)> {
    let of = |c: &Value| {
        let policy = c["preemptionPolicy"].as_str().map(str::to_owned);
        (
            meta::name(c).to_owned(),
            c["value"].as_i64().unwrap_or_default(),
            policy,
        )
    };
    if class.is_empty() {
        return Some(default_priority(cluster).map_or((String::new(), 0, None), |c| of(&c)));
    }
    let served = cluster.resource(SCHEDULING, "v1", "priorityclasses")?;
    served.resource.get("", class).map(|c| of(&c.value()))
}

/// Gives an ingress that names no class the newest class that is marked as default.
pub fn default_ingress_class(cx: &Context, ingress: &mut Value) {
    let named = ingress["spec"].get("ingressClassName").is_some_and(|c| !c.is_null());
    if named || meta::annotation(ingress, INGRESS_CLASS).is_some() {
        return;
    }
    let mut classes = all(&cx.cluster, NETWORKING, "ingressclasses");
    classes.retain(|c| meta::annotation(c, DEFAULT_INGRESS_CLASS) == Some("true"));
    classes.sort_by(|a, b| {
        let newest = meta::creation_timestamp(b).cmp(meta::creation_timestamp(a));
        newest.then_with(|| meta::name(a).cmp(meta::name(b)))
    });
    if let (Some(class), Some(spec)) = (classes.first(), ingress.get_mut("spec").and_then(Value::as_object_mut)) {
        spec.insert("ingressClassName".into(), meta::name(class).into());
    }
}

/// Priority classes: one default at most, and the system's own stay.
pub fn check(cx: &Context, operation: Operation, new: &Value) -> Result<(), Status> {
    if !cx.served.is(SCHEDULING, "priorityclasses") {
        return Ok(());
    }
    let name = cx.target.name.as_str();
    let refuse = |name: &str, why: &str| Err(Status::forbidden("priorityclasses.scheduling.k8s.io", name, why));
    if operation == Operation::Delete {
        return match SYSTEM_PRIORITIES.iter().any(|(system, ..)| *system == name) {
            true => refuse(name, "this is a system priority class and cannot be deleted"),
            false => Ok(()),
        };
    }
    if new["globalDefault"] != true {
        return Ok(());
    }
    match default_priority(&cx.cluster) {
        Some(other) if operation == Operation::Create || meta::name(&other) != meta::name(new) => {
            let why = format!(
                "PriorityClass {} is already marked as default. Only one default can exist",
                meta::name(&other)
            );
            refuse(meta::name(new), &why)
        }
        _ => Ok(()),
    }
}

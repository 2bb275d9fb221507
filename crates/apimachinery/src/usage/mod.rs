//! What objects use of a ResourceQuota: amounts per object, the scopes of a quota, and sums. Pure.
//!
//! # Source
//! `pkg/quota/v1` and `staging/src/k8s.io/apiserver/pkg/quota/v1` of Kubernetes 1.36.

mod pod;
mod scope;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::quantity::{Format, Quantity};

pub use pod::{Totals, constraints, totals};
pub use scope::applies;

/// Amounts by the name a quota gives them (`pods`, `requests.cpu`, `count/secrets`).
pub type Amounts = BTreeMap<String, Quantity>;

/// Reads a map of quantities; what is no quantity is left out.
pub fn amounts(value: &Value) -> Amounts {
    value
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(name, v)| Some((name.clone(), quantity(v)?)))
        .collect()
}

/// A quantity in either of its JSON forms.
pub fn quantity(value: &Value) -> Option<Quantity> {
    match value {
        Value::String(text) => Quantity::parse(text).ok(),
        Value::Number(number) => Quantity::parse(&number.to_string()).ok(),
        _ => None,
    }
}

/// The amounts as a JSON map.
pub fn to_value(amounts: &Amounts) -> Value {
    let map: Map<String, Value> = amounts
        .iter()
        .map(|(name, amount)| (name.clone(), amount.to_string().into()))
        .collect();
    Value::Object(map)
}

/// `a=1,b=2`, as messages show amounts.
pub fn shown(amounts: &Amounts) -> String {
    let all: Vec<String> = amounts
        .iter()
        .map(|(name, amount)| format!("{name}={amount}"))
        .collect();
    all.join(",")
}

/// Adds `more` to `sum`.
pub fn add(sum: &mut Amounts, more: &Amounts) {
    for (name, amount) in more {
        let entry = sum.entry(name.clone()).or_default();
        // The first amount decides how the sum prints.
        *entry = if entry.is_zero() { *amount } else { *entry + *amount };
    }
}

fn whole(count: usize) -> Quantity {
    Quantity::from_units(i64::try_from(count).unwrap_or(i64::MAX), Format::DecimalSi)
}

/// `count/deployments.apps`, the name under which every kind can be counted.
pub fn count_name(group: &str, plural: &str) -> String {
    if group.is_empty() {
        format!("count/{plural}")
    } else {
        format!("count/{plural}.{group}")
    }
}

/// What one object of a resource uses. Every namespaced object counts under its `count/` name; core kinds under their old
/// names too; pods, services and claims by what they ask for.
pub fn of_object(group: &str, plural: &str, object: &Value) -> Amounts {
    let mut used = Amounts::from([(count_name(group, plural), whole(1))]);
    if !group.is_empty() {
        return used;
    }
    match plural {
        "pods" => pod::add_usage(&mut used, object),
        "services" => service(&mut used, object),
        "persistentvolumeclaims" => claim(&mut used, object),
        "configmaps" | "secrets" | "replicationcontrollers" | "resourcequotas" => {
            used.insert(plural.to_owned(), whole(1));
        }
        _ => {}
    }
    used
}

fn service(used: &mut Amounts, object: &Value) {
    let spec = &object["spec"];
    let ports = spec["ports"].as_array().map_or(&[][..], Vec::as_slice);
    let balanced = spec["type"] == "LoadBalancer";
    let node_ports = match spec["type"].as_str() {
        Some("NodePort") => ports.len(),
        // Without automatic node ports only those that were chosen count.
        Some("LoadBalancer") if spec["allocateLoadBalancerNodePorts"] == false => ports
            .iter()
            .filter(|p| p["nodePort"].as_i64().unwrap_or_default() != 0)
            .count(),
        Some("LoadBalancer") => ports.len(),
        _ => 0,
    };
    used.insert("services".into(), whole(1));
    used.insert("services.nodeports".into(), whole(node_ports));
    used.insert("services.loadbalancers".into(), whole(usize::from(balanced)));
}

fn claim(used: &mut Amounts, object: &Value) {
    used.insert("persistentvolumeclaims".into(), whole(1));
    let storage = quantity(&object["spec"]["resources"]["requests"]["storage"]);
    let class = object["spec"]["storageClassName"].as_str().unwrap_or_default();
    if !class.is_empty() {
        used.insert(
            format!("{class}.storageclass.storage.k8s.io/persistentvolumeclaims"),
            whole(1),
        );
    }
    let Some(storage) = storage else { return };
    used.insert("requests.storage".into(), storage);
    if !class.is_empty() {
        used.insert(format!("{class}.storageclass.storage.k8s.io/requests.storage"), storage);
    }
}

/// The resource whose objects a name of a quota counts: `(group, plural)`. Compute names are the pods'.
pub fn counted(name: &str) -> (&str, &str) {
    if let Some(rest) = name.strip_prefix("count/") {
        return rest
            .split_once('.')
            .map_or(("", rest), |(plural, group)| (group, plural));
    }
    match name {
        "services" | "services.nodeports" | "services.loadbalancers" => ("", "services"),
        "configmaps" | "secrets" | "replicationcontrollers" | "resourcequotas" => ("", name),
        "persistentvolumeclaims" | "requests.storage" => ("", "persistentvolumeclaims"),
        _ if name.contains(".storageclass.storage.k8s.io/") => ("", "persistentvolumeclaims"),
        _ => ("", "pods"),
    }
}

/// The part of `used` that a quota with `hard` limits looks at.
pub fn masked(used: &Amounts, hard: &Amounts) -> Amounts {
    used.iter()
        .filter(|(name, _)| hard.contains_key(*name))
        .map(|(name, amount)| (name.clone(), *amount))
        .collect()
}

/// What all objects together use of the quota: an entry for every name in `spec.hard`, zero included.
/// `objects(group, plural)` gives the objects of the quota's namespace.
pub fn of_quota(quota: &Value, mut objects: impl FnMut(&str, &str) -> Vec<Value>) -> Amounts {
    let hard = amounts(&quota["spec"]["hard"]);
    let mut used: Amounts = hard.keys().map(|name| (name.clone(), Quantity::ZERO)).collect();
    let mut seen: Vec<(&str, &str)> = hard.keys().map(|name| counted(name)).collect();
    seen.sort_unstable();
    seen.dedup();
    for (group, plural) in seen {
        for object in objects(group, plural) {
            if applies(quota, group, plural, &object) {
                add(&mut used, &masked(&of_object(group, plural, &object), &hard));
            }
        }
    }
    used
}

//! What a pod asks for.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Amounts, add, amounts, whole};
use crate::quantity::Quantity;

/// Requests and limits of a whole pod.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Totals {
    pub requests: Amounts,
    pub limits: Amounts,
}

fn list<'v>(spec: &'v Value, key: &str) -> &'v [Value] {
    spec[key].as_array().map_or(&[], Vec::as_slice)
}

fn raise(to: &mut Amounts, by: &Amounts) {
    for (name, amount) in by {
        match to.get_mut(name) {
            Some(old) if *old >= *amount => {}
            _ => {
                to.insert(name.clone(), *amount);
            }
        }
    }
}

/// Sums over the containers; init containers run before them one by one, and those that restart always run beside them.
/// Pod-level resources, where given, stand in for the sum. Overhead comes on top.
pub fn totals(pod: &Value) -> Totals {
    let spec = &pod["spec"];
    let of = |which: &str| {
        let mut sum = Amounts::new();
        for container in list(spec, "containers") {
            add(&mut sum, &amounts(&container["resources"][which]));
        }
        let (mut beside, mut highest) = (Amounts::new(), Amounts::new());
        for container in list(spec, "initContainers") {
            let own = amounts(&container["resources"][which]);
            if container["restartPolicy"] == "Always" {
                add(&mut sum, &own);
                add(&mut beside, &own);
                raise(&mut highest, &beside);
            } else {
                let mut at_once = own;
                add(&mut at_once, &beside);
                raise(&mut highest, &at_once);
            }
        }
        raise(&mut sum, &highest);
        for (name, amount) in amounts(&spec["resources"][which]) {
            sum.insert(name, amount);
        }
        for (name, amount) in amounts(&spec["overhead"]) {
            // A limit that nobody set stays unset.
            if which == "requests" || sum.contains_key(&name) {
                add(&mut sum, &Amounts::from([(name, amount)]));
            }
        }
        sum
    };
    Totals {
        requests: of("requests"),
        limits: of("limits"),
    }
}

/// Whether the pod uses anything besides its place in the store: it has not ended.
fn runs(pod: &Value) -> bool {
    !matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))
}

pub(super) fn add_usage(used: &mut Amounts, pod: &Value) {
    if !runs(pod) {
        return;
    }
    used.insert("pods".into(), whole(1));
    let totals = totals(pod);
    for (name, amount) in totals.requests {
        let native = matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage");
        if native || name.starts_with("hugepages-") {
            used.insert(name.clone(), amount);
        }
        used.insert(format!("requests.{name}"), amount);
    }
    for (name, amount) in totals.limits {
        used.insert(format!("limits.{name}"), amount);
    }
}

/// The compute resources that a quota with `hard` limits makes every container name, and that containers of the pod do
/// not: `limits.cpu for: a,b; requests.memory for: b`. Empty if none is missing.
pub fn constraints(hard: &Amounts, pod: &Value) -> String {
    const COMPUTE: [&str; 4] = ["cpu", "memory", "requests.cpu", "requests.memory"];
    const LIMITS: [&str; 2] = ["limits.cpu", "limits.memory"];
    let asked: BTreeSet<&str> = hard
        .keys()
        .map(String::as_str)
        .filter(|name| COMPUTE.contains(name) || LIMITS.contains(name))
        .collect();
    let spec = &pod["spec"];
    let whole_pod = totals(&serde_json::json!({"spec": {"resources": spec["resources"]}}));
    let mut missing = Vec::new();
    for name in asked {
        let (which, plain) = match name.split_once('.') {
            Some(("limits", plain)) => ("limits", plain),
            Some((_, plain)) => ("requests", plain),
            None => ("requests", name),
        };
        let of_pod = if which == "limits" {
            &whole_pod.limits
        } else {
            &whole_pod.requests
        };
        if of_pod.contains_key(plain) {
            continue;
        }
        let lacking: BTreeSet<&str> = ["containers", "initContainers"]
            .iter()
            .flat_map(|key| list(spec, key))
            .filter(|c| super::quantity(&c["resources"][which][plain]).is_none_or(|q: Quantity| q.is_zero()))
            .filter_map(|c| c["name"].as_str())
            .collect();
        if !lacking.is_empty() {
            missing.push(format!(
                "{name} for: {}",
                lacking.into_iter().collect::<Vec<_>>().join(",")
            ));
        }
    }
    missing.join("; ")
}

//! How many pods a budget lets go. Pure.
//!
//! # Source
//! `pkg/controller/disruption` of Kubernetes 1.36.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;

use crate::common::{is_deleting, is_ready, is_terminal, name_of};

/// An eviction that has not led to a deletion by then did not happen.
const EVICTED: Duration = Duration::from_secs(120);

/// What the status shall be, and when to look again. `expected` is how many pods the controllers of the selected pods want
/// together, or why that cannot be said.
pub fn plan(
    budget: &PodDisruptionBudget,
    pods: &[Arc<Pod>],
    expected: Result<i32, String>,
    now: Timestamp,
) -> (PodDisruptionBudgetStatus, Option<Duration>) {
    let old = budget.status.clone().unwrap_or_default();
    let mut requeue: Option<Duration> = None;
    let mut disrupted = BTreeMap::new();
    for (name, at) in old.disrupted_pods.iter().flatten() {
        let passed = apimachinery::time::since(now, at.0);
        let there = pods.iter().any(|p| name_of(&**p) == name && !is_deleting(&**p));
        if there && passed < EVICTED {
            let left = EVICTED - passed;
            requeue = Some(requeue.map_or(left, |r| r.min(left)));
            disrupted.insert(name.clone(), at.clone());
        }
    }
    let counted: Vec<&Arc<Pod>> = pods.iter().filter(|p| !is_terminal(p)).collect();
    let healthy = counted
        .iter()
        .filter(|p| is_ready(p) && !is_deleting(&****p) && !disrupted.contains_key(name_of(&****p)))
        .count() as i32;
    let spec = budget.spec.clone().unwrap_or_default();
    let (expected, desired, failure) = match (spec.max_unavailable, spec.min_available, expected) {
        (Some(most), _, Ok(expected)) => (expected, (expected - scaled(&most, expected)).max(0), None),
        (None, Some(IntOrString::Int(least)), _) => (counted.len() as i32, least, None),
        (None, Some(least), Ok(expected)) => (expected, scaled(&least, expected), None),
        (None, None, _) => (counted.len() as i32, counted.len() as i32, None),
        (_, _, Err(why)) => (0, 0, Some(why)),
    };
    let allowed = match failure {
        None if expected > 0 => (healthy - desired).max(0),
        _ => 0,
    };
    let (status, reason, message) = match (&failure, allowed) {
        (Some(why), _) => ("False", "SyncFailed", why.clone()),
        (None, 0) => ("False", "InsufficientPods", String::new()),
        _ => ("True", "SufficientPods", String::new()),
    };
    let mut conditions = old.conditions.clone().unwrap_or_default();
    let same = conditions
        .iter()
        .any(|c| c.type_ == "DisruptionAllowed" && c.status == status);
    let since = conditions
        .iter()
        .find(|c| c.type_ == "DisruptionAllowed" && same)
        .map(|c| c.last_transition_time.clone());
    conditions.retain(|c| c.type_ != "DisruptionAllowed");
    conditions.push(Condition {
        type_: "DisruptionAllowed".to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        observed_generation: budget.metadata.generation,
        last_transition_time: since.unwrap_or(Time(now)),
    });
    let status = PodDisruptionBudgetStatus {
        conditions: Some(conditions),
        current_healthy: Some(healthy),
        desired_healthy: Some(desired),
        disrupted_pods: (!disrupted.is_empty()).then_some(disrupted),
        disruptions_allowed: Some(allowed),
        expected_pods: Some(expected),
        observed_generation: budget.metadata.generation,
    };
    (status, requeue)
}

/// An amount, or a percentage of `of`, rounded up.
fn scaled(amount: &IntOrString, of: i32) -> i32 {
    match amount {
        IntOrString::Int(n) => *n,
        IntOrString::String(text) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or_default();
            ((i64::from(of) * percent + 99) / 100) as i32
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pods(ready: usize, not: usize) -> Vec<Arc<Pod>> {
        (0..ready + not)
            .map(|i| {
                let status = if i < ready { "True" } else { "False" };
                let pod = json!({"metadata": {"name": format!("p{i}")},
                    "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": status}]}});
                Arc::new(serde_json::from_value(pod).unwrap())
            })
            .collect()
    }

    fn check(spec: Value, pods: &[Arc<Pod>], expected: Result<i32, String>, want: &str) {
        let budget: PodDisruptionBudget = serde_json::from_value(
            json!({"metadata": {"generation": 2}, "spec": spec, "status": {"disruptedPods": {
                "p0": "2026-01-02T03:03:50Z", "gone": "2026-01-02T03:03:50Z", "p1": "2026-01-02T03:00:00Z"}}}),
        )
        .unwrap();
        let now = apimachinery::time::parse("2026-01-02T03:04:00Z").unwrap();
        let (s, again) = plan(&budget, pods, expected, now);
        let n = |v: Option<i32>| v.unwrap();
        let got = format!(
            "{} healthy of {}, {} needed, {} may go",
            n(s.current_healthy),
            n(s.expected_pods),
            n(s.desired_healthy),
            n(s.disruptions_allowed)
        );
        assert_eq!(got, want, "{spec}");
        let kept: Vec<String> = s.disrupted_pods.unwrap_or_default().into_keys().collect();
        assert_eq!((kept, again), (vec!["p0".to_owned()], Some(Duration::from_secs(110))));
    }

    #[test]
    fn budgets_count_what_is_healthy() {
        check(
            json!({"minAvailable": 2}),
            &pods(4, 0),
            Ok(4),
            "3 healthy of 4, 2 needed, 1 may go",
        );
        check(
            json!({"minAvailable": "50%"}),
            &pods(4, 1),
            Ok(5),
            "3 healthy of 5, 3 needed, 0 may go",
        );
        check(
            json!({"maxUnavailable": 1}),
            &pods(4, 0),
            Ok(4),
            "3 healthy of 4, 3 needed, 0 may go",
        );
        check(
            json!({"maxUnavailable": "30%"}),
            &pods(9, 0),
            Ok(9),
            "8 healthy of 9, 6 needed, 2 may go",
        );
        check(
            json!({"maxUnavailable": 1}),
            &pods(4, 0),
            Err("no".into()),
            "3 healthy of 0, 0 needed, 0 may go",
        );
        check(
            json!({"minAvailable": 5}),
            &pods(4, 0),
            Ok(4),
            "3 healthy of 4, 5 needed, 0 may go",
        );
    }
}

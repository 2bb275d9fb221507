//! Disruption budgets in evictions: each one allowed lowers the budget's status before the pod goes.
//!
//! # Source
//! `pkg/registry/core/pod/storage/eviction.go` of Kubernetes 1.36.

use apimachinery::meta;
use apimachinery::selector::LabelSelector;
use apimachinery::status::{Cause, Status};
use apimachinery::time;
use serde_json::{Value, json};

use super::Context;
use super::write::{self, ATTEMPTS_MAX};
use crate::admission::Claims;
use crate::registry;

/// Evictions of one budget that may wait for their deletion to be seen.
const DISRUPTED_MAX: usize = 2000;

fn ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions
        .into_iter()
        .flatten()
        .any(|c| c["type"] == "Ready" && c["status"] == "True")
}

/// Takes the eviction of the request's pod from its budget.
///
/// # Errors
/// 429 while the budget does not allow it, 500 if the pod has several.
pub async fn take(cx: &Context) -> Result<(), Status> {
    let pod = cx.find()?.value();
    // Budgets are about pods that serve.
    let ended = matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed" | "Pending")
    );
    if ended || meta::deletion_timestamp(&pod).is_some() {
        return Ok(());
    }
    let Some(served) = cx.cluster.resource("policy", "v1", "poddisruptionbudgets") else {
        return Ok(());
    };
    let labels: std::collections::BTreeMap<String, String> =
        meta::labels(&pod).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    for _ in 0..ATTEMPTS_MAX {
        let objects = served.resource.snapshot();
        let mut found = registry::scan(&objects, &cx.target.namespace, None).filter_map(|(_, object)| {
            let budget = object.value();
            let selector = LabelSelector::from_object(&budget["spec"]["selector"]).ok()?;
            selector.matches(&labels).then_some((object, budget))
        });
        let Some((object, mut budget)) = found.next() else {
            return Ok(());
        };
        if found.next().is_some() {
            return Err(Status::internal(
                "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
            ));
        }
        if !needs_budget(&pod, &budget) {
            return Ok(());
        }
        lower(&mut budget, meta::name(&pod), &time::now_rfc3339(&*cx.cluster.clock))?;
        if cx.dry_run()? {
            return Ok(());
        }
        if write::put(&cx.cluster, &served, Some(object), &budget, Claims::default(), true)
            .await?
            .is_ok()
        {
            return Ok(());
        }
    }
    Err(Status::too_many_requests(
        "the disruption budget is being changed by many; try again",
        1,
    ))
}

/// A pod that does not serve may go if the budget's policy says so.
fn needs_budget(pod: &Value, budget: &Value) -> bool {
    if ready(pod) {
        return true;
    }
    let number = |key: &str| budget["status"][key].as_i64().unwrap_or_default();
    let healthy = number("currentHealthy") >= number("desiredHealthy") && number("desiredHealthy") > 0;
    budget["spec"]["unhealthyPodEvictionPolicy"] != "AlwaysAllow" && !healthy
}

fn lower(budget: &mut Value, pod: &str, now: &str) -> Result<(), Status> {
    const REFUSED: &str = "Cannot evict pod as it would violate the pod's disruption budget.";
    let refuse = |retry_s: i32, message: String| {
        let mut status = Status::too_many_requests(REFUSED, retry_s);
        status.details.get_or_insert_default().causes.push(Cause {
            reason: "DisruptionBudget".into(),
            message,
            field: String::new(),
        });
        Err(status)
    };
    let name = meta::name(budget).to_owned();
    let number = |budget: &Value, key: &str| budget["status"][key].as_i64().unwrap_or_default();
    if number(budget, "observedGeneration") < meta::generation(budget) {
        return refuse(
            10,
            format!("The disruption budget {name} is still being processed by the server."),
        );
    }
    let disrupted = budget["status"]["disruptedPods"]
        .as_object()
        .map_or(0, serde_json::Map::len);
    if disrupted > DISRUPTED_MAX {
        let why = "DisruptedPods map too big - too many evictions not confirmed by PDB controller";
        return Err(Status::forbidden("poddisruptionbudgets.policy", &name, why));
    }
    let allowed = number(budget, "disruptionsAllowed");
    if allowed < 1 {
        let (needed, healthy) = (number(budget, "desiredHealthy"), number(budget, "currentHealthy"));
        return refuse(
            0,
            format!("The disruption budget {name} needs {needed} healthy pods and has {healthy} currently"),
        );
    }
    budget["status"]["disruptionsAllowed"] = json!(allowed - 1);
    budget["status"]["disruptedPods"][pod] = now.into();
    Ok(())
}

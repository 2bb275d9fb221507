//! Writes into every aggregated ClusterRole the rules of the roles it selects, for those who read or bind it. (Authorization
//! itself follows aggregation rules without waiting for this.)

use std::sync::Arc;

use apimachinery::selector::LabelSelector;
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use reconcile::{Error, Informer, Key, Patch, Queue, Requeue, run_controller};
use serde_json::json;

use crate::Context;
use crate::common::{key_of, name_of, uid_of};

const NAME: &str = "clusterrole-aggregation-controller";

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let roles: Informer<ClusterRole> = context.informers.get();
    let (sink, all) = (queue.clone(), roles.clone());
    roles.on_change(move |_| {
        // Whatever changed, an aggregated role may select it; there are few of them.
        for role in all.list().iter().filter(|r| r.aggregation_rule.is_some()) {
            sink.add(key_of(&**role));
        }
    });
    let shutdown = context.shutdown.clone();
    if shutdown.or_stop(roles.wait_synced()).await.is_none() {
        return;
    }
    let work = move |key: Key| {
        let (context, roles) = (context.clone(), roles.clone());
        async move { reconcile(&context, &roles, &key).await }
    };
    run_controller(NAME, queue, 1, work, shutdown).await;
}

async fn reconcile(context: &Context, roles: &Informer<ClusterRole>, key: &Key) -> Result<Requeue, Error> {
    let Some(role) = roles.by_key(key) else {
        return Ok(Requeue::Done);
    };
    let Some(wanted) = aggregated(&role, &roles.list()) else {
        return Ok(Requeue::Done);
    };
    let patch = Patch::Merge(json!({
        "metadata": {"uid": uid_of(&*role), "resourceVersion": role.metadata.resource_version}, "rules": wanted,
    }));
    match context.client.patch::<ClusterRole>(None, &key.name, &patch, None).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(Requeue::Done),
    }
}

/// The rules that `role` should have, if it has others: those of the selected roles, by the roles' names, each once.
fn aggregated(role: &ClusterRole, all: &[Arc<ClusterRole>]) -> Option<Vec<PolicyRule>> {
    let selectors = role.aggregation_rule.as_ref()?.cluster_role_selectors.as_ref();
    let mut rules: Vec<PolicyRule> = Vec::new();
    let mut sorted: Vec<&Arc<ClusterRole>> = all.iter().filter(|r| name_of(&***r) != name_of(role)).collect();
    sorted.sort_by_key(|r| name_of(&***r));
    for wire in selectors.into_iter().flatten() {
        let value = serde_json::to_value(wire).unwrap_or_default();
        let Ok(selector) = LabelSelector::from_object(&value) else {
            continue;
        };
        for other in sorted.iter().filter(|r| selector.matches(&r.metadata.labels)) {
            for rule in other.rules.iter().flatten() {
                if !rules.contains(rule) {
                    rules.push(rule.clone());
                }
            }
        }
    }
    (role.rules.as_deref().unwrap_or_default() != rules).then_some(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(name: &str, rest: serde_json::Value) -> Arc<ClusterRole> {
        let mut value = json!({"metadata": {"name": name}});
        for (key, part) in rest.as_object().unwrap() {
            value[key] = part.clone();
        }
        value["metadata"]["name"] = name.into();
        Arc::new(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn rules_are_collected_once_and_in_order() {
        let rule = |verb: &str| json!({"verbs": [verb], "apiGroups": [""], "resources": ["pods"]});
        let labelled = |rules: serde_json::Value| json!({"metadata": {"labels": {"to": "x"}}, "rules": rules});
        let mut whole = role(
            "whole",
            json!({"aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"to": "x"}}]}}),
        );
        let all = [
            role("b", labelled(json!([rule("list"), rule("get")]))),
            role("a", labelled(json!([rule("get")]))),
            role("other", json!({"rules": [rule("delete")]})),
            whole.clone(),
        ];
        let rules = aggregated(&whole, &all).unwrap();
        let verbs: Vec<&str> = rules.iter().map(|r| r.verbs[0].as_str()).collect();
        assert_eq!(verbs, ["get", "list"]);
        Arc::make_mut(&mut whole).rules = Some(rules);
        assert_eq!(aggregated(&whole, &all), None, "nothing to do twice");
        assert_eq!(aggregated(&all[0], &all), None, "only aggregated roles are written");
    }
}

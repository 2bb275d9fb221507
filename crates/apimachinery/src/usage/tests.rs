use serde_json::{Value, json};

use super::*;

fn pod(spec: Value) -> Value {
    json!({"metadata": {"name": "p"}, "spec": spec})
}

fn container(name: &str, resources: Value) -> Value {
    json!({"name": name, "resources": resources})
}

#[test]
fn init_containers_run_one_by_one_and_sidecars_stay() {
    let object = pod(json!({
        "containers": [container("a", json!({"requests": {"cpu": "100m"}})), container("b", json!({"requests": {"cpu": "200m"}}))],
        "initContainers": [
            container("once", json!({"requests": {"cpu": "1"}})),
            {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "50m"}}},
            container("later", json!({"requests": {"cpu": "900m", "memory": "1Gi"}})),
        ],
        "overhead": {"cpu": "10m"},
    }));
    // The largest moment: 'once' alone (1), 'later' beside the sidecar (950m), the containers beside it (350m).
    assert_eq!(shown(&totals(&object).requests), "cpu=1010m,memory=1Gi");
}

#[test]
fn every_kind_counts_and_some_by_what_they_ask_for() {
    let of = |group, plural, object: Value| shown(&of_object(group, plural, &object));
    assert_eq!(of("apps", "deployments", json!({})), "count/deployments.apps=1");
    assert_eq!(of("", "secrets", json!({})), "count/secrets=1,secrets=1");
    let ports = json!([{"port": 1}, {"port": 2, "nodePort": 30001}]);
    let service = |kind: &str, rest: Value| {
        let mut spec = json!({"type": kind, "ports": ports});
        for (k, v) in rest.as_object().unwrap() {
            spec[k] = v.clone();
        }
        of("", "services", json!({"spec": spec}))
    };
    let want = |lb, np| format!("count/services=1,services=1,services.loadbalancers={lb},services.nodeports={np}");
    assert_eq!(service("ClusterIP", json!({})), want(0, 0));
    assert_eq!(service("NodePort", json!({})), want(0, 2));
    assert_eq!(service("LoadBalancer", json!({})), want(1, 2));
    assert_eq!(
        service("LoadBalancer", json!({"allocateLoadBalancerNodePorts": false})),
        want(1, 1)
    );
    let requests = json!({"requests": {"cpu": "1", "nvidia.com/gpu": "2"}, "limits": {"cpu": "2"}});
    let mut object = pod(json!({"containers": [container("c", requests)]}));
    assert_eq!(
        of("", "pods", object.clone()),
        "count/pods=1,cpu=1,limits.cpu=2,pods=1,requests.cpu=1,requests.nvidia.com/gpu=2"
    );
    object["status"] = json!({"phase": "Succeeded"});
    assert_eq!(of("", "pods", object), "count/pods=1");
}

#[test]
fn a_quota_sums_what_its_scopes_select() {
    let pods = [
        pod(json!({"containers": [container("c", json!({}))]})),
        pod(json!({"containers": [container("c", json!({"requests": {"cpu": "250m"}}))], "priorityClassName": "high"})),
        pod(json!({"containers": [container("c", json!({"requests": {"cpu": "1"}}))], "activeDeadlineSeconds": 9})),
    ];
    let check = |spec: Value, want: &str| {
        let used = of_quota(&json!({"spec": spec}), |group, plural| match (group, plural) {
            ("", "pods") => pods.to_vec(),
            _ => Vec::new(),
        });
        assert_eq!(shown(&used), want, "{spec}");
    };
    let hard = json!({"pods": "9", "requests.cpu": "9"});
    let expression = |scope: &str, operator: &str, values: Value| {
        json!({"hard": {"pods": "9"}, "scopeSelector": {"matchExpressions": [
            {"scopeName": scope, "operator": operator, "values": values}]}})
    };
    check(json!({"hard": hard}), "pods=3,requests.cpu=1250m");
    check(json!({"hard": {"count/jobs.batch": "1"}}), "count/jobs.batch=0");
    check(
        json!({"hard": hard, "scopes": ["Terminating"]}),
        "pods=1,requests.cpu=1",
    );
    check(json!({"hard": {"pods": "1"}, "scopes": ["BestEffort"]}), "pods=1");
    check(
        json!({"hard": hard, "scopes": ["NotBestEffort", "NotTerminating"]}),
        "pods=1,requests.cpu=250m",
    );
    check(
        json!({"hard": {"services": "1"}, "scopes": ["BestEffort"]}),
        "services=0",
    );
    check(expression("PriorityClass", "In", json!(["high", "low"])), "pods=1");
    check(expression("PriorityClass", "NotIn", json!(["high"])), "pods=2");
    check(expression("PriorityClass", "Exists", Value::Null), "pods=1");
    check(expression("PriorityClass", "DoesNotExist", Value::Null), "pods=2");
}

#[test]
fn containers_must_name_what_is_limited() {
    let object = pod(json!({"containers": [
        container("b", json!({"requests": {"cpu": "1"}})), container("a", json!({"limits": {"memory": "1Gi"}}))]}));
    let hard = amounts(&json!({"requests.cpu": "1", "limits.memory": "1Gi", "pods": "3", "memory": "1Gi"}));
    assert_eq!(
        constraints(&hard, &object),
        "limits.memory for: b; memory for: a,b; requests.cpu for: a"
    );
    assert_eq!(constraints(&amounts(&json!({"pods": "3"})), &object), "");
}

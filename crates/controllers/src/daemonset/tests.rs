use std::sync::Arc;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::plan::*;

fn now() -> Timestamp {
    apimachinery::time::parse("2026-01-02T03:10:00Z").unwrap()
}

fn node(name: &str, rest: Value) -> Arc<Node> {
    Arc::new(
        serde_json::from_value(json!({"metadata": {"name": name, "labels": {"pool": name}}, "spec": rest})).unwrap(),
    )
}

fn set(pod_spec: Value, strategy: Value) -> DaemonSet {
    let mut spec = pod_spec;
    spec["containers"] = json!([]);
    serde_json::from_value(json!({"metadata": {"name": "d", "uid": "u", "generation": 3},
        "spec": {"selector": {}, "template": {"spec": spec}, "updateStrategy": strategy}}))
    .unwrap()
}

fn pod(name: &str, node: &str, hash: &str, ready: bool) -> Arc<Pod> {
    let status = if ready { "True" } else { "False" };
    Arc::new(
        serde_json::from_value(
            json!({"metadata": {"name": name, "labels": {"controller-revision-hash": hash}},
            "spec": {"nodeName": node, "containers": []},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": status}]}}),
        )
        .unwrap(),
    )
}

fn brief(plan: &Plan) -> String {
    let s = &plan.status;
    format!(
        "create {} delete {} | {} of {} ready {} updated {} wrong {}",
        plan.create.join(","),
        plan.delete.join(","),
        s.current_number_scheduled,
        s.desired_number_scheduled,
        s.number_ready,
        s.updated_number_scheduled.unwrap_or_default(),
        s.number_misscheduled,
    )
}

#[test]
fn one_pod_on_every_node_that_fits() {
    let taint = |effect: &str| json!({"taints": [{"key": "k", "value": "v", "effect": effect}]});
    let pressed =
        json!({"unschedulable": true, "taints": [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]});
    let nodes = [
        node("a", json!({})),
        node("b", taint("NoSchedule")),
        node("c", pressed),
        node("e", taint("NoExecute")),
    ];
    let plain = set(json!({}), json!({}));
    let p = plan(
        &plain,
        "h",
        &[
            pod("x", "a", "h", true),
            pod("y", "b", "h", true),
            pod("z", "e", "h", true),
        ],
        &nodes,
        now(),
    );
    assert_eq!(brief(&p), "create c delete z | 1 of 2 ready 1 updated 1 wrong 2");
    let picky = set(json!({"nodeSelector": {"pool": "a"}}), json!({}));
    assert_eq!(
        brief(&plan(&picky, "h", &[], &nodes, now())),
        "create a delete  | 0 of 1 ready 0 updated 0 wrong 0"
    );
    let affinity = json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "pool", "operator": "NotIn", "values": ["a"]}]}]}}}, "tolerations": [{"operator": "Exists"}]});
    assert_eq!(
        brief(&plan(&set(affinity, json!({})), "h", &[], &nodes, now())),
        "create b,c,e delete  | 0 of 3 ready 0 updated 0 wrong 0"
    );
}

#[test]
fn a_second_pod_and_a_failed_one_go() {
    let nodes = [node("a", json!({}))];
    let plain = set(json!({}), json!({}));
    let p = plan(
        &plain,
        "h",
        &[pod("x", "a", "h", false), pod("y", "a", "h", true)],
        &nodes,
        now(),
    );
    assert_eq!(brief(&p), "create  delete x | 1 of 1 ready 1 updated 1 wrong 0");
    let mut failed = (*pod("x", "a", "h", false)).clone();
    failed.status.as_mut().unwrap().phase = Some("Failed".into());
    let p = plan(&plain, "h", &[Arc::new(failed)], &nodes, now());
    assert_eq!(
        (p.delete.as_slice(), p.failed.as_slice(), p.create.len()),
        (&["x".to_owned()][..], &["x".to_owned()][..], 0)
    );
}

#[test]
fn old_pods_are_replaced_one_by_one_or_when_somebody_deletes_them() {
    let nodes = ["a", "b", "c"].map(|n| node(n, json!({})));
    let pods = [
        pod("pa", "a", "old", true),
        pod("pb", "b", "old", true),
        pod("pc", "c", "new", true),
    ];
    let rolling = |most: Value| {
        set(
            json!({}),
            json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": most}}),
        )
    };
    assert_eq!(plan(&rolling(json!(1)), "new", &pods, &nodes, now()).delete, ["pa"]);
    assert_eq!(
        plan(&rolling(json!("60%")), "new", &pods, &nodes, now()).delete,
        ["pa", "pb"]
    );
    // One is missing already: nobody else may go.
    assert_eq!(
        plan(&rolling(json!(1)), "new", &pods[..2], &nodes, now()).delete,
        Vec::<String>::new()
    );
    // What is not available costs nothing.
    let broken = [
        pod("pa", "a", "old", false),
        pod("pb", "b", "old", true),
        pods[2].clone(),
    ];
    assert_eq!(plan(&rolling(json!(1)), "new", &broken, &nodes, now()).delete, ["pa"]);
    let manual = set(json!({}), json!({"type": "OnDelete"}));
    assert_eq!(plan(&manual, "new", &pods, &nodes, now()).delete, Vec::<String>::new());
}

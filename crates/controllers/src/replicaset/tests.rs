use std::collections::HashMap;
use std::sync::Arc;

use expect_test::{Expect, expect};
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::plan::plan;

fn rs(replicas: i32) -> ReplicaSet {
    serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "d", "uid": "rs", "generation": 2},
        "spec": {"replicas": replicas, "minReadySeconds": 10, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web", "v": "1"}}}},
    }))
    .unwrap()
}

/// `name owner state`: owner is `own`, `other`, `none`; state any of node=N ready=T deleting failed unlabeled cost=C.
fn pod(line: &str) -> Arc<Pod> {
    let mut words = line.split(' ');
    let (name, owner) = (words.next().unwrap(), words.next().unwrap());
    let mut pod = json!({
        "metadata": {"name": name, "namespace": "d", "uid": name, "labels": {"app": "web", "v": "1"},
            "creationTimestamp": "2026-01-02T03:00:00Z"},
        "spec": {"containers": []}, "status": {"phase": "Pending"},
    });
    let uid = match owner {
        "own" => Some("rs"),
        "other" => Some("other"),
        _ => None,
    };
    if let Some(uid) = uid {
        pod["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "x", "uid": uid, "controller": true}]);
    }
    for word in words {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        match key {
            "node" => pod["spec"]["nodeName"] = value.into(),
            "ready" => {
                pod["status"] = json!({"phase": "Running", "conditions":
                    [{"type": "Ready", "status": "True", "lastTransitionTime": format!("2026-01-02T03:04:{value}Z")}]});
            }
            "deleting" => pod["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:00Z".into(),
            "failed" => pod["status"]["phase"] = "Failed".into(),
            "unlabeled" => pod["metadata"]["labels"] = Value::Null,
            "cost" => pod["metadata"]["annotations"] = json!({"controller.kubernetes.io/pod-deletion-cost": value}),
            other => panic!("{other}"),
        }
    }
    Arc::new(serde_json::from_value(pod).unwrap())
}

fn check(replicas: i32, pods: &[&str], expected: Expect) {
    let pods: Vec<_> = pods.iter().map(|p| pod(p)).collect();
    let related = HashMap::from([("crowded".to_owned(), 3)]);
    let now = "2026-01-02T03:04:30Z".parse().unwrap();
    let p = plan(&rs(replicas), &pods, &related, now);
    let s = &p.status;
    let n = |v: Option<i32>| v.unwrap_or_default();
    expected.assert_eq(&format!(
        "create {} delete {:?} adopt {:?} release {:?}\nreplicas {} ready {} available {} terminating {} requeue {:?}\n",
        p.create,
        p.delete,
        p.adopt,
        p.release,
        s.replicas,
        n(s.ready_replicas),
        n(s.available_replicas),
        n(s.terminating_replicas),
        p.requeue,
    ));
}

#[test]
fn makes_what_is_missing_and_ignores_ended_and_foreign_pods() {
    check(
        3,
        &[
            "a own node=n ready=10",
            "b own failed",
            "c own deleting",
            "d other",
            "e own node=n ready=25",
        ],
        expect![[r#"
            create 1 delete [] adopt [] release []
            replicas 2 ready 2 available 1 terminating 1 requeue Some(5s)
        "#]],
    );
}

#[test]
fn adopts_before_it_makes_and_releases_what_it_no_longer_selects() {
    check(
        3,
        &["a none", "b none deleting", "c none unlabeled", "d own unlabeled"],
        expect![[r#"
            create 0 delete [] adopt ["a"] release ["d"]
            replicas 0 ready 0 available 0 terminating 0 requeue None
        "#]],
    );
}

#[test]
fn deletes_the_most_expendable_first() {
    check(
        0,
        &[
            "old own node=n ready=10",
            "young own node=n ready=29",
            "crowded own node=crowded ready=10",
            "cheap own node=n ready=10 cost=-5",
            "unready own node=n",
            "unbound own",
        ],
        expect![[r#"
            create 0 delete ["unbound", "unready", "cheap", "crowded", "young", "old"] adopt [] release []
            replicas 6 ready 4 available 3 terminating 0 requeue Some(9s)
        "#]],
    );
}

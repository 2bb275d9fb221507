use jiff::SignedDuration;
use serde_json::json;

use super::*;
use crate::table::TypeTable;

fn cells(group: &str, plural: &str, object: Value) -> Vec<String> {
    let table = TypeTable::builtin();
    let resource = table.resource(group, "v1", plural).unwrap();
    let now = crate::time::parse("2024-01-01T01:00:00Z").unwrap();
    let row = row(resource, &object, now);
    assert_eq!(row.len(), definitions(resource).len());
    row.into_iter()
        .map(|c| c.as_str().map_or(c.to_string(), str::to_owned))
        .collect()
}

fn pod(status: Value, deleted: bool) -> Vec<String> {
    let mut pod = json!({
        "metadata": {"name": "p", "creationTimestamp": "2024-01-01T00:50:30Z"},
        "spec": {"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]},
        "status": status
    });
    if deleted {
        pod["metadata"]["deletionTimestamp"] = "2024-01-01T00:59:00Z".into();
    }
    cells("", "pods", pod)
}

#[test]
fn every_served_resource_has_a_row_for_an_empty_object() {
    let table = TypeTable::builtin();
    for resource in table.resources() {
        let row = row(resource, &json!({}), Timestamp::UNIX_EPOCH);
        assert_eq!(row.len(), definitions(resource).len(), "{}", resource.plural);
    }
}

#[test]
fn pods_show_one_word_for_their_state() {
    let running = json!({"running": {}});
    let row = pod(
        json!({"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}], "containerStatuses": [
            {"ready": true, "restartCount": 2, "state": running,
                "lastState": {"terminated": {"finishedAt": "2024-01-01T00:58:00Z"}}},
            {"ready": false, "restartCount": 0, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}),
        false,
    );
    let want = [
        "p",
        "1/2",
        "CrashLoopBackOff",
        "2 (2m ago)",
        "9m30s",
        "10.0.0.1",
        "<none>",
        "<none>",
        "<none>",
    ];
    assert_eq!(row, want);
    let state = |status: Value, deleted: bool| pod(status, deleted)[2].clone();
    assert_eq!(state(json!({"phase": "Pending"}), false), "Pending");
    let init = |state: Value| json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": state}]});
    assert_eq!(state(init(json!({"running": {}})), false), "Init:0/1");
    assert_eq!(
        state(init(json!({"waiting": {"reason": "ErrImagePull"}})), false),
        "Init:ErrImagePull"
    );
    assert_eq!(
        state(init(json!({"terminated": {"exitCode": 3}})), false),
        "Init:ExitCode:3"
    );
    assert_eq!(state(json!({"phase": "Running"}), true), "Terminating");
    assert_eq!(
        state(json!({"phase": "Running", "reason": "NodeLost"}), true),
        "Unknown"
    );
    let done = json!({"terminated": {"exitCode": 0, "reason": "Completed"}});
    let done = json!({"phase": "Succeeded", "containerStatuses": [{"state": done}]});
    assert_eq!(state(done, false), "Completed");
}

#[test]
fn other_kinds_show_their_usual_columns() {
    let node = json!({"metadata": {"name": "n", "labels": {"node-role.kubernetes.io/agent": ""}},
        "spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "InternalIP", "address": "10.1.0.4"}],
            "nodeInfo": {"kubeletVersion": "v1.36.4", "kernelVersion": "6.1", "architecture": "amd64"}}});
    assert_eq!(
        cells("", "nodes", node),
        [
            "n",
            "Ready,SchedulingDisabled",
            "agent",
            "<unknown>",
            "v1.36.4",
            "10.1.0.4",
            "<none>",
            "<unknown>",
            "6.1 (amd64)",
            "<unknown>"
        ]
    );
    let service = json!({"metadata": {"name": "s"}, "spec": {"type": "LoadBalancer", "clusterIPs": ["10.0.0.9"],
        "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}], "selector": {"app": "web"}}});
    assert_eq!(
        cells("", "services", service),
        [
            "s",
            "LoadBalancer",
            "10.0.0.9",
            "<pending>",
            "80:30080/TCP",
            "<unknown>",
            "app=web"
        ]
    );
    let deployment = json!({"metadata": {"name": "d"}, "status": {"readyReplicas": 1, "updatedReplicas": 2},
        "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}},
            "template": {"spec": {"containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "y"}]}}}});
    assert_eq!(
        cells("apps", "deployments", deployment),
        ["d", "1/3", "2", "0", "<unknown>", "a,b", "x,y", "app=web"]
    );
    let slice = json!({"metadata": {"name": "e"}, "addressType": "IPv4", "ports": [{"port": 80}],
        "endpoints": [{"addresses": ["1"]}, {"addresses": ["2"]}, {"addresses": ["3"]}, {"addresses": ["4"]}]});
    assert_eq!(
        cells("discovery.k8s.io", "endpointslices", slice),
        ["e", "IPv4", "80", "1,2,3 + 1 more...", "<unknown>"]
    );
}

#[test]
fn ages_have_two_units_at_most() {
    for (seconds, want) in [
        (0, "0s"),
        (119, "119s"),
        (125, "2m5s"),
        (600, "10m"),
        (3 * 3600 + 60, "3h1m"),
        (9 * 3600, "9h"),
        (50 * 3600, "2d2h"),
        (10 * 86400, "10d"),
        (800 * 86400, "2y70d"),
        (-5, "<invalid>"),
    ] {
        assert_eq!(human_duration(SignedDuration::from_secs(seconds)), want);
    }
}

#[test]
fn classes_and_ingresses_show_what_matters() {
    let at = "2024-01-01T00:00:00Z";
    let default = json!({"ingressclass.kubernetes.io/is-default-class": "true"});
    let class = json!({"metadata": {"name": "web", "creationTimestamp": at, "annotations": default},
        "spec": {"controller": "x.io/i", "parameters": {"apiGroup": "x.io", "kind": "P", "name": "p"}}});
    assert_eq!(
        cells("networking.k8s.io", "ingressclasses", class),
        ["web (default)", "x.io/i", "P.x.io/p", "60m"]
    );
    let rules: Vec<Value> = (0..5).map(|i| json!({"host": format!("h{i}")})).collect();
    let ingress = json!({"metadata": {"name": "i", "creationTimestamp": at}, "spec": {"rules": rules, "tls": [{}]},
        "status": {"loadBalancer": {"ingress": [{"hostname": "a-long-name.example"}]}}});
    assert_eq!(
        cells("networking.k8s.io", "ingresses", ingress),
        [
            "i",
            "<none>",
            "h0,h1,h2 + 2 more...",
            "a-long-name.e...",
            "80, 443",
            "60m"
        ]
    );
    let owner = json!([{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "d", "uid": "u", "controller": true}]);
    let revision = json!({"metadata": {"name": "r", "creationTimestamp": at, "ownerReferences": owner}, "revision": 3});
    assert_eq!(
        cells("apps", "controllerrevisions", revision),
        ["r", "daemonset.apps/d", "3", "60m"]
    );
    let storage = json!({"metadata": {"name": "s", "creationTimestamp": at}, "provisioner": "x.io/d"});
    assert_eq!(
        cells("storage.k8s.io", "storageclasses", storage),
        ["s", "x.io/d", "Delete", "Immediate", "false", "60m"]
    );
}

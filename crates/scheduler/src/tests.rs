//! Placement, by example. A world is a list of nodes (`name cpu memory [pods] {labels} taints`) and pods.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use serde_json::{Value, json};

use crate::model::{NodeInfo, PodInfo};
use crate::{Cache, Decision, plan};

fn node(name: &str, patch: Value) -> NodeInfo {
    let mut node = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {},
        "status": {"allocatable": {"cpu": "2", "memory": "4Gi", "pods": "10", "ephemeral-storage": "10Gi"},
            "conditions": [{"type": "Ready", "status": "True"}]},
    });
    merge(&mut node, patch);
    NodeInfo::parse(&serde_json::from_value::<Node>(node).unwrap())
}

fn pod(name: &str, patch: Value) -> PodInfo {
    let mut pod = json!({
        "metadata": {"name": name, "namespace": "d", "uid": name, "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "500m", "memory": "256Mi"}}}]},
    });
    merge(&mut pod, patch);
    PodInfo::parse(&serde_json::from_value::<Pod>(pod).unwrap())
}

fn merge(into: &mut Value, patch: Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, patch) => *into = patch,
    }
}

fn owned(name: &str) -> PodInfo {
    pod(
        name,
        json!({"metadata": {"ownerReferences":
        [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": "rs", "controller": true}]}}),
    )
}

fn world(nodes: Vec<NodeInfo>) -> Cache {
    let mut cache = Cache::default();
    for node in nodes {
        cache.set_node(node);
    }
    cache
}

/// Places the pod and counts it.
fn place(cache: &mut Cache, pod: PodInfo) -> Result<String, String> {
    match plan(cache, &pod) {
        Decision::Bind { node, looked_at } => {
            cache.advance(looked_at);
            cache.place(Arc::new(pod), &node);
            Ok(node)
        }
        Decision::Unschedulable { message } => Err(message),
    }
}

fn refusal(cache: &Cache, pod: PodInfo) -> String {
    match plan(cache, &pod) {
        Decision::Unschedulable { message } => message,
        Decision::Bind { node, .. } => panic!("bound to {node}"),
    }
}

#[test]
fn without_nodes_it_says_so() {
    assert_eq!(
        refusal(&world(vec![]), pod("p", json!({}))),
        "no nodes available to schedule pods"
    );
}

#[test]
fn refusals_name_every_reason_and_count() {
    let big =
        json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "3", "memory": "8Gi"}}}]}});
    let cache = world(vec![
        node("a", json!({})),
        node(
            "b",
            json!({"spec": {"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]}}),
        ),
        node("c", json!({"spec": {"unschedulable": true}})),
        node(
            "d",
            json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}),
        ),
        node(
            "e",
            json!({"status": {"allocatable": {"cpu": "4", "memory": "16Gi", "pods": "0"}}}),
        ),
    ]);
    assert_eq!(
        refusal(&cache, pod("p", big)),
        "0/5 nodes are available: 1 Insufficient cpu, 1 Insufficient memory, 1 Too many pods, 1 node(s) had untolerated \
         taint {gpu: yes}, 1 node(s) were not ready, 1 node(s) were unschedulable."
    );
    let wants = json!({"spec": {"nodeSelector": {"disk": "ssd"}}});
    assert!(
        refusal(&world(vec![node("a", json!({}))]), pod("p", wants))
            .contains("1 node(s) didn't match Pod's node affinity/selector")
    );
}

#[test]
fn pods_of_one_controller_spread_over_hosts_and_zones() {
    let zoned = |name, zone| {
        node(
            name,
            json!({"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}}),
        )
    };
    let mut cache = world(vec![zoned("a1", "1"), zoned("a2", "1"), zoned("b1", "2")]);
    let mut places: Vec<String> = (0..3)
        .map(|i| place(&mut cache, owned(&format!("p{i}"))).unwrap())
        .collect();
    assert!(places[..2].contains(&"b1".to_owned()), "both zones first: {places:?}");
    places.sort();
    assert_eq!(places, ["a1", "a2", "b1"]);
    // Even when one host is emptier by resources.
    let mut cache = world(vec![
        node("small", json!({})),
        node(
            "large",
            json!({"status": {"allocatable": {"cpu": "64", "memory": "256Gi", "pods": "250"}}}),
        ),
    ]);
    let mut places: Vec<String> = (0..2)
        .map(|i| place(&mut cache, owned(&format!("p{i}"))).unwrap())
        .collect();
    places.sort();
    assert_eq!(places, ["large", "small"]);
}

#[test]
fn machines_come_before_virtual_nodes_until_they_are_full() {
    let burst = node(
        "virtual",
        json!({
            "metadata": {"labels": {"type": "virtual-kubelet"}},
            "spec": {"taints": [{"key": "virtual-kubelet.io/provider", "value": "azure", "effect": "NoSchedule"}]},
            "status": {"allocatable": {"cpu": "1000", "memory": "4Ti", "pods": "1000"}},
        }),
    );
    let mut cache = world(vec![burst, node("machine", json!({}))]);
    let tolerant = |name: &str| {
        pod(
            name,
            json!({"spec": {"tolerations": [{"key": "virtual-kubelet.io/provider", "operator": "Exists"}]}}),
        )
    };
    let places: Vec<String> = (0..6)
        .map(|i| place(&mut cache, tolerant(&format!("p{i}"))).unwrap())
        .collect();
    assert_eq!(
        places,
        ["machine", "machine", "machine", "machine", "virtual", "virtual"]
    );
    assert_eq!(
        refusal(&cache, pod("plain", json!({}))),
        "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint {virtual-kubelet.io/provider: azure}."
    );
}

#[test]
fn host_ports_and_gone_pods() {
    let mut cache = world(vec![node("a", json!({}))]);
    let with_port = |name| {
        pod(
            name,
            json!({"spec": {"containers": [{"name": "c", "ports": [{"containerPort": 80, "hostPort": 80}]}]}}),
        )
    };
    place(&mut cache, with_port("one")).unwrap();
    assert!(refusal(&cache, with_port("two")).contains("1 node(s) didn't have free ports for the requested pod ports"));
    let before = cache.generation();
    assert!(cache.remove_pod("one") && cache.generation() > before);
    assert_eq!(place(&mut cache, with_port("two")), Ok("a".to_owned()));
}

#[test]
fn anti_affinity_holds_in_both_directions() {
    let mut cache = world(vec![node("a", json!({})), node("b", json!({}))]);
    let alone = |name| {
        pod(
            name,
            json!({"spec": {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
            [{"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "web"}}}]}}}}),
        )
    };
    let first = place(&mut cache, alone("p1")).unwrap();
    let second = place(&mut cache, alone("p2")).unwrap();
    assert_ne!(first, second);
    assert_eq!(
        refusal(&cache, alone("p3")),
        "0/2 nodes are available: 2 node(s) didn't match pod anti-affinity rules."
    );
    assert_eq!(
        refusal(&cache, pod("plain", json!({}))),
        "0/2 nodes are available: 2 node(s) didn't satisfy existing pods anti-affinity rules."
    );
    place(&mut cache, pod("other", json!({"metadata": {"labels": {"app": "db"}}}))).unwrap();
}

#[test]
fn affinity_lets_the_first_of_a_group_in_and_keeps_the_rest_together() {
    let mut cache = world(vec![node("a", json!({})), node("b", json!({}))]);
    let together = |name| {
        pod(
            name,
            json!({"spec": {"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
            [{"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "web"}}}]}}}}),
        )
    };
    let first = place(&mut cache, together("p1")).unwrap();
    for name in ["p2", "p3"] {
        assert_eq!(place(&mut cache, together(name)), Ok(first.clone()));
    }
}

#[test]
fn hard_spread_constraints() {
    let mut cache = world(vec![
        node("a", json!({})),
        node("b", json!({"status": {"allocatable": {"pods": "1"}}})),
    ]);
    let spread = |name| {
        pod(
            name,
            json!({"spec": {"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {"matchLabels": {"app": "web"}}}]}}),
        )
    };
    for name in ["p1", "p2", "p3"] {
        place(&mut cache, spread(name)).unwrap();
    }
    assert_eq!(
        refusal(&cache, spread("p4")),
        "0/2 nodes are available: 1 Too many pods, 1 node(s) didn't match pod topology spread constraints."
    );
}

#[test]
fn node_affinity_required_and_preferred() {
    let ssd = |name| node(name, json!({"metadata": {"labels": {"disk": "ssd", "n": "7"}}}));
    let mut cache = world(vec![node("a", json!({})), ssd("b")]);
    let term = json!({"matchExpressions": [{"key": "n", "operator": "Gt", "values": ["5"]}],
        "matchFields": [{"key": "metadata.name", "operator": "In", "values": ["b"]}]});
    let required = json!({"spec": {"affinity": {"nodeAffinity":
        {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{}, term]}}}}});
    assert_eq!(place(&mut cache, pod("r", required)), Ok("b".to_owned()));
    let preferred = json!({"spec": {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution":
        [{"weight": 10, "preference": {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]}}]}}}});
    assert_eq!(place(&mut cache, pod("p", preferred)), Ok("b".to_owned()));
}

#[test]
fn init_containers_and_sidecars_count_at_their_peak() {
    let cpu = |amount: &str| json!({"requests": {"cpu": amount}});
    let info = pod(
        "p",
        json!({"spec": {
        "initContainers": [
            {"name": "side", "restartPolicy": "Always", "resources": cpu("100m")},
            {"name": "init", "resources": cpu("900m")}],
        "containers": [{"name": "c", "resources": cpu("500m")}],
        "overhead": {"cpu": "50m"}}}),
    );
    assert_eq!(info.requests.cpu_milli, 1050);
}

#[test]
fn placing_is_quick_on_many_nodes() {
    let mut cache = world((0..500).map(|i| node(&format!("n{i}"), json!({}))).collect());
    let mut used = std::collections::HashSet::new();
    for i in 0..300 {
        used.insert(place(&mut cache, owned(&format!("p{i}"))).unwrap());
    }
    assert_eq!(used.len(), 300, "each on a node of its own");
}

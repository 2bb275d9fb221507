use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

use super::plan::{backends, endpoints, slices};

fn service(spec: Value) -> Service {
    let mut service = json!({
        "metadata": {"name": "web", "namespace": "d", "uid": "svc", "labels": {"team": "a"}},
        "spec": {"clusterIP": "10.0.0.1", "ipFamilies": ["IPv4"], "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 80, "targetPort": "web"}]},
    });
    for (key, value) in spec.as_object().cloned().unwrap_or_default() {
        service["spec"][key] = value;
    }
    serde_json::from_value(service).unwrap()
}

fn pod(n: usize, port: i32, ready: bool, patch: Value) -> Arc<Pod> {
    let mut pod = json!({
        "metadata": {"name": format!("p{n}"), "namespace": "d", "uid": format!("uid{n}"), "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "hostname": "h", "subdomain": "web",
            "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": port}]}]},
        "status": {"phase": "Running", "podIP": format!("10.1.{}.{}", n / 250, n % 250 + 1),
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
    });
    for (key, value) in patch.as_object().cloned().unwrap_or_default() {
        for (field, value) in value.as_object().cloned().unwrap_or_default() {
            pod[&key][field] = value;
        }
    }
    Arc::new(serde_json::from_value(pod).unwrap())
}

fn zone(node: &str) -> Option<String> {
    (node == "n1").then(|| "z1".to_owned())
}

/// As the server would store them.
fn stored(created: Vec<EndpointSlice>) -> Vec<Arc<EndpointSlice>> {
    let name = |(i, mut s): (usize, EndpointSlice)| {
        s.metadata.name = Some(format!("web-{i}"));
        Arc::new(s)
    };
    created.into_iter().enumerate().map(name).collect()
}

#[test]
fn conditions_names_and_zones() {
    let pods = [
        pod(1, 8080, true, json!({})),
        pod(2, 8080, false, json!({})),
        pod(
            3,
            8080,
            true,
            json!({"metadata": {"deletionTimestamp": "2026-01-02T03:04:05Z"}}),
        ),
        pod(4, 8080, true, json!({"status": {"phase": "Failed"}})),
        pod(5, 8080, true, json!({"status": {"podIP": null}})),
    ];
    let svc = service(json!({}));
    let b = backends(&svc, &pods, zone);
    let plan = slices(&svc, &b, &[]);
    assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (1, 0, 0));
    let slice = serde_json::to_value(&plan.create[0]).unwrap();
    assert_eq!(
        slice["metadata"]["labels"],
        json!({"team": "a", "kubernetes.io/service-name": "web",
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"})
    );
    assert_eq!(
        slice["ports"],
        json!([{"name": "http", "port": 8080, "protocol": "TCP"}])
    );
    assert_eq!(
        slice["endpoints"][0],
        json!({"addresses": ["10.1.0.2"], "conditions": {"ready": true, "serving": true, "terminating": false},
            "hostname": "h", "nodeName": "n1", "zone": "z1",
            "targetRef": {"kind": "Pod", "namespace": "d", "name": "p1", "uid": "uid1"}})
    );
    let conditions: Vec<String> = slice["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["conditions"].to_string())
        .collect();
    assert_eq!(
        conditions[1..],
        [
            r#"{"ready":false,"serving":false,"terminating":false}"#,
            r#"{"ready":false,"serving":true,"terminating":true}"#
        ]
    );
    let early = service(json!({"publishNotReadyAddresses": true}));
    assert!(backends(&early, &pods, zone).iter().all(|b| b.ready));
    let e = endpoints(&svc, &b, None);
    assert_eq!(
        serde_json::to_value(e.subsets).unwrap(),
        json!([{"addresses": [{"ip": "10.1.0.2", "hostname": "h", "nodeName": "n1",
                "targetRef": {"kind": "Pod", "namespace": "d", "name": "p1", "uid": "uid1"}}],
            "notReadyAddresses": [{"ip": "10.1.0.3", "hostname": "h", "nodeName": "n1",
                "targetRef": {"kind": "Pod", "namespace": "d", "name": "p2", "uid": "uid2"}}],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]}])
    );
}

#[test]
fn a_settled_service_needs_nothing_and_small_changes_touch_one_slice() {
    let svc = service(json!({}));
    let pods: Vec<_> = (0..250).map(|n| pod(n, 8080, true, json!({}))).collect();
    let b = backends(&svc, &pods, zone);
    let first = slices(&svc, &b, &[]);
    assert_eq!(
        first
            .create
            .iter()
            .map(|s| s.endpoints.iter().flatten().count())
            .collect::<Vec<_>>(),
        [100, 100, 50]
    );
    let existing = stored(first.create);
    let again = slices(&svc, &b, &existing);
    assert_eq!(again, Default::default());
    let mut changed = pods.clone();
    changed.remove(7);
    changed.push(pod(300, 8080, true, json!({})));
    let plan = slices(&svc, &backends(&svc, &changed, zone), &existing);
    assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (0, 1, 0));
    let e = endpoints(&svc, &b, None);
    assert_eq!(endpoints(&svc, &b, Some(&e)), e);
}

#[test]
fn ports_that_differ_by_pod_make_slices_of_their_own_and_no_pods_leave_an_empty_one() {
    let svc = service(json!({}));
    let b = backends(
        &svc,
        &[pod(1, 8080, true, json!({})), pod(2, 9090, true, json!({}))],
        zone,
    );
    let existing = stored(slices(&svc, &b, &[]).create);
    assert_eq!(existing.len(), 2);
    let empty = slices(&svc, &[], &existing);
    assert_eq!((empty.create.len(), empty.delete.len()), (1, 2));
    let kept = stored(empty.create);
    assert_eq!(slices(&svc, &[], &kept), Default::default());
}

#[test]
fn headless_services_are_marked() {
    let svc = service(json!({"clusterIP": "None", "ports": null}));
    let plan = slices(&svc, &backends(&svc, &[pod(1, 1, true, json!({}))], zone), &[]);
    assert!(
        plan.create[0]
            .metadata
            .labels
            .as_ref()
            .unwrap()
            .contains_key("service.kubernetes.io/headless")
    );
    assert_eq!(plan.create[0].endpoints.iter().flatten().count(), 1);
}

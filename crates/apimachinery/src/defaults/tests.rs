use serde_json::json;

use super::*;

fn defaulted(group: &str, kind: &str, object: Value) -> Value {
    let gvk = Gvk::new(group, "v1", kind);
    let mut once = object;
    apply(&gvk, &mut once);
    let mut twice = once.clone();
    apply(&gvk, &mut twice);
    assert_eq!(once, twice, "defaults are idempotent");
    once
}

#[test]
fn pods_get_what_upstream_sets() {
    let pod = json!({"spec": {
        "serviceAccountName": "robot",
        "volumes": [{"name": "a"}, {"name": "b", "secret": {"secretName": "s"}}, {"name": "c", "hostPath": {"path": "/x"}}],
        "containers": [{"name": "c", "image": "reg:5000/app", "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": "1"}, "requests": {"memory": "1Mi"}},
            "livenessProbe": {"httpGet": {"port": 80}}}]
    }});
    let spec = defaulted("", "Pod", pod)["spec"].take();
    assert_eq!(
        spec,
        json!({
            "dnsPolicy": "ClusterFirst", "restartPolicy": "Always", "securityContext": {},
            "terminationGracePeriodSeconds": 30, "schedulerName": "default-scheduler", "enableServiceLinks": true,
            "serviceAccountName": "robot", "serviceAccount": "robot",
            "volumes": [{"name": "a", "emptyDir": {}}, {"name": "b", "secret": {"secretName": "s", "defaultMode": 420}},
                {"name": "c", "hostPath": {"path": "/x", "type": ""}}],
            "containers": [{"name": "c", "image": "reg:5000/app", "imagePullPolicy": "Always",
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                "ports": [{"containerPort": 80, "protocol": "TCP"}],
                "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1", "memory": "1Mi"}},
                "livenessProbe": {"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1,
                    "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}}],
        })
    );
}

#[test]
fn pull_policy_follows_the_tag() {
    for (image, policy) in [
        ("nginx", "Always"),
        ("nginx:1", "IfNotPresent"),
        ("r:5/x:latest", "Always"),
        ("x@sha256:ab", "IfNotPresent"),
    ] {
        let pod = defaulted("", "Pod", json!({"spec": {"containers": [{"image": image}]}}));
        assert_eq!(pod["spec"]["containers"][0]["imagePullPolicy"], policy, "{image}");
    }
}

#[test]
fn services_and_deployments() {
    let service = json!({"spec": {"type": "LoadBalancer", "ports": [{"port": 80}, {"port": 53, "targetPort": "dns"}]}});
    assert_eq!(
        defaulted("", "Service", service)["spec"],
        json!({"type": "LoadBalancer", "sessionAffinity": "None", "externalTrafficPolicy": "Cluster",
            "internalTrafficPolicy": "Cluster", "allocateLoadBalancerNodePorts": true,
            "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}, {"port": 53, "protocol": "TCP", "targetPort": "dns"}]})
    );
    let external = defaulted(
        "",
        "Service",
        json!({"spec": {"type": "ExternalName", "externalName": "x.test"}}),
    );
    assert!(external["spec"].get("internalTrafficPolicy").is_none());
    let deployment = defaulted(
        "apps",
        "Deployment",
        json!({"spec": {"replicas": 0, "template": {"spec": {}}}}),
    );
    assert_eq!(deployment["spec"]["replicas"], 0);
    assert_eq!(
        deployment["spec"]["strategy"]["rollingUpdate"],
        json!({"maxSurge": "25%", "maxUnavailable": "25%"})
    );
    assert!(
        deployment["spec"]["template"]["spec"]
            .get("enableServiceLinks")
            .is_none(),
        "templates leave it to the pod"
    );
    let recreate = defaulted(
        "apps",
        "Deployment",
        json!({"spec": {"strategy": {"type": "Recreate"}}}),
    );
    assert_eq!(recreate["spec"]["strategy"], json!({"type": "Recreate"}));
}

#[test]
fn string_data_becomes_data() {
    let secret = json!({"stringData": {"a": "x"}, "data": {"a": "b2xk", "b": "eQ=="}});
    assert_eq!(
        defaulted("", "Secret", secret),
        json!({"type": "Opaque", "data": {"a": "eA==", "b": "eQ=="}})
    );
}

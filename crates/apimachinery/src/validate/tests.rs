use serde_json::json;

use super::*;

fn gvk(kind: &str) -> Gvk {
    let group = match kind {
        "Deployment" | "ReplicaSet" => "apps",
        "RoleBinding" | "Role" | "ClusterRole" => "rbac.authorization.k8s.io",
        _ => "",
    };
    Gvk::new(group, "v1", kind)
}

/// Texts of the errors of a defaulted object.
fn errors(kind: &str, mut object: Value) -> Vec<String> {
    crate::defaults::apply(&gvk(kind), &mut object);
    create(&gvk(kind), &object).iter().map(ToString::to_string).collect()
}

fn update_errors(kind: &str, mut new: Value, mut old: Value) -> Vec<String> {
    crate::defaults::apply(&gvk(kind), &mut new);
    crate::defaults::apply(&gvk(kind), &mut old);
    update(&gvk(kind), &new, &old).iter().map(ToString::to_string).collect()
}

fn pod(containers: Value) -> Value {
    json!({"metadata": {"name": "p", "namespace": "d"}, "spec": {"containers": containers}})
}

fn deployment(labels: Value) -> Value {
    json!({"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}})
}

#[test]
fn valid_objects_pass() {
    assert_eq!(errors("Pod", pod(json!([{"name": "c", "image": "i"}]))), [""; 0]);
    assert_eq!(errors("Deployment", deployment(json!({"app": "web"}))), [""; 0]);
    let service = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80, "targetPort": "http"}]}});
    assert_eq!(errors("Service", service), [""; 0]);
}

#[test]
fn names_are_checked_by_kind() {
    let want = "metadata.name: Invalid value: \"Bad_Name\": a lowercase RFC 1123 subdomain must consist of lower case \
                alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. \
                'example.com', regex used for validation is \
                '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
    assert_eq!(errors("ConfigMap", json!({"metadata": {"name": "Bad_Name"}})), [want]);
    assert_eq!(errors("Namespace", json!({"metadata": {"name": "a.b"}})).len(), 1);
    assert_eq!(
        errors("Role", json!({"metadata": {"name": "system:x"}, "rules": []})),
        [""; 0]
    );
    assert_eq!(
        errors("ConfigMap", json!({})),
        ["metadata.name: Required value: name or generateName is required"]
    );
}

#[test]
fn pods_tell_each_fault_at_its_path() {
    let containers = json!([
        {"name": "c", "image": "", "ports": [{"containerPort": 70000, "name": "BAD"}]},
        {"name": "c", "image": "i", "volumeMounts": [{"name": "none", "mountPath": "/x"}],
            "resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}, "livenessProbe": {}}
    ]);
    assert_eq!(
        errors("Pod", pod(containers)),
        [
            "spec.containers[0].image: Required value",
            "spec.containers[0].ports[0].name: Invalid value: \"BAD\": must contain only alpha-numeric characters \
             (a-z, 0-9), and hyphens (-)",
            "spec.containers[0].ports[0].name: Invalid value: \"BAD\": must contain at least one letter (a-z)",
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
            "spec.containers[1].volumeMounts[0].name: Not found: \"none\"",
            "spec.containers[1].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
            "spec.containers[1].name: Duplicate value: \"c\"",
            "spec.containers[1].livenessProbe: Required value: must specify a handler type",
        ]
    );
    assert_eq!(errors("Pod", pod(json!([]))), ["spec.containers: Required value"]);
    let mut odd = pod(json!([{"name": "c", "image": "i"}]));
    odd["spec"]["restartPolicy"] = "Sometimes".into();
    let want =
        "spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"OnFailure\", \"Never\"";
    assert_eq!(errors("Pod", odd), [want]);
}

#[test]
fn selectors_must_match_and_stay() {
    let want =
        "spec.template.metadata.labels: Invalid value: {\"app\":\"x\"}: `selector` does not match template `labels`";
    assert_eq!(errors("Deployment", deployment(json!({"app": "x"}))), [want]);
    let old = deployment(json!({"app": "web", "v": "1"}));
    let mut new = old.clone();
    new["spec"]["selector"] = json!({"matchLabels": {"v": "1"}});
    let want = "spec.selector: Invalid value: {\"matchLabels\":{\"v\":\"1\"}}: field is immutable";
    assert_eq!(update_errors("Deployment", new, old), [want]);
}

#[test]
fn pod_specs_hardly_change() {
    let old = pod(json!([{"name": "c", "image": "i"}]));
    assert_eq!(
        update_errors("Pod", pod(json!([{"name": "c", "image": "j"}])), old.clone()),
        [""; 0]
    );
    let found = update_errors(
        "Pod",
        pod(json!([{"name": "c", "image": "i", "command": ["x"]}])),
        old.clone(),
    );
    assert!(found.len() == 1 && found[0].starts_with("spec: Forbidden: pod updates may not change fields other than"));
    let two = pod(json!([{"name": "c", "image": "i"}, {"name": "d", "image": "i"}]));
    assert_eq!(
        update_errors("Pod", two, old),
        ["spec.containers: Forbidden: pod updates may not add or remove containers"]
    );
}

#[test]
fn services_secrets_and_bindings_keep_what_is_fixed() {
    let service = |ip: &str| json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}], "clusterIP": ip, "clusterIPs": [ip]}});
    assert_eq!(
        update_errors("Service", service("10.0.0.2"), service("10.0.0.1")),
        ["spec.clusterIPs[0]: Invalid value: [\"10.0.0.2\"]: may not change once set"]
    );
    let secret = |ty: &str| json!({"metadata": {"name": "s"}, "type": ty});
    assert_eq!(
        update_errors("Secret", secret("b"), secret("a")),
        ["type: Invalid value: \"b\": field is immutable"]
    );
    let tls = json!({"metadata": {"name": "s"}, "type": "kubernetes.io/tls", "data": {"tls.crt": "YQ=="}});
    assert_eq!(errors("Secret", tls), ["data[tls.key]: Required value"]);
    let binding = |role: &str| json!({"metadata": {"name": "b"}, "roleRef": {"kind": "Role", "name": role}});
    assert_eq!(errors("RoleBinding", binding("r")), [""; 0]);
    assert_eq!(update_errors("RoleBinding", binding("x"), binding("r")).len(), 1);
    let two = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}, {"port": 80}]}});
    assert_eq!(
        errors("Service", two),
        [
            "spec.ports[0].name: Required value",
            "spec.ports[1].name: Required value",
            "spec.ports[1]: Duplicate value: {\"port\":80,\"protocol\":\"TCP\"}",
        ]
    );
}

//! The default roles and bindings of every cluster.
//!
//! # Source
//! Default RBAC policy of Kubernetes 1.36, for the kinds that are served.

use serde_json::{Value, json};

pub const RBAC: &str = "rbac.authorization.k8s.io";
const CERTIFICATES: &str = "certificates.k8s.io";
const READ: [&str; 3] = ["get", "list", "watch"];
const WRITE: [&str; 5] = ["create", "delete", "deletecollection", "patch", "update"];

pub fn defaults_label() -> Value {
    json!({"kubernetes.io/bootstrapping": "rbac-defaults"})
}

pub fn autoupdate() -> Value {
    json!({"rbac.authorization.kubernetes.io/autoupdate": "true"})
}

fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": groups, "resources": resources, "verbs": verbs})
}

fn urls(paths: &[&str], verbs: &[&str]) -> Value {
    json!({"nonResourceURLs": paths, "verbs": verbs})
}

fn all_verbs() -> Vec<&'static str> {
    WRITE.iter().chain(&READ).copied().collect()
}

/// `(name, labels, rules, aggregation rule)` of every default cluster role.
pub fn cluster_roles() -> Vec<(String, Value, Value, Value)> {
    let mut roles = Vec::new();
    let mut add =
        |name: &str, rules: Vec<Value>| roles.push((name.to_owned(), defaults_label(), json!(rules), Value::Null));

    add(
        "cluster-admin",
        vec![rule(&["*"], &["*"], &["*"]), urls(&["*"], &["*"])],
    );
    add(
        "system:discovery",
        vec![urls(
            &[
                "/api",
                "/api/*",
                "/apis",
                "/apis/*",
                "/healthz",
                "/livez",
                "/openapi",
                "/openapi/*",
                "/readyz",
                "/version",
                "/version/",
            ],
            &["get"],
        )],
    );
    add(
        "system:public-info-viewer",
        vec![urls(
            &["/healthz", "/livez", "/readyz", "/version", "/version/"],
            &["get"],
        )],
    );
    add(
        "system:basic-user",
        vec![
            rule(
                &["authorization.k8s.io"],
                &["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
                &["create"],
            ),
            rule(&["authentication.k8s.io"], &["selfsubjectreviews"], &["create"]),
        ],
    );
    add(
        "system:service-account-issuer-discovery",
        vec![urls(
            &["/.well-known/openid-configuration", "/openid/v1/jwks"],
            &["get"],
        )],
    );
    add(
        "system:monitoring",
        vec![urls(
            &[
                "/metrics",
                "/metrics/slis",
                "/livez",
                "/readyz",
                "/healthz",
                "/livez/*",
                "/readyz/*",
                "/healthz/*",
            ],
            &["get"],
        )],
    );
    add(
        "system:auth-delegator",
        vec![
            rule(&["authentication.k8s.io"], &["tokenreviews"], &["create"]),
            rule(&["authorization.k8s.io"], &["subjectaccessreviews"], &["create"]),
        ],
    );
    add(
        "system:kubelet-api-admin",
        vec![
            rule(&[""], &["nodes"], &["get", "list", "watch", "proxy"]),
            rule(
                &[""],
                &["nodes/log", "nodes/metrics", "nodes/proxy", "nodes/stats"],
                &["*"],
            ),
        ],
    );
    for (name, subresource) in [("nodeclient", "nodeclient"), ("selfnodeclient", "selfnodeclient")] {
        add(
            &format!("system:certificates.k8s.io:certificatesigningrequests:{name}"),
            vec![rule(
                &[CERTIFICATES],
                &[&format!("certificatesigningrequests/{subresource}")],
                &["create"],
            )],
        );
    }
    for (name, signer) in [
        ("kube-apiserver-client-approver", "kubernetes.io/kube-apiserver-client"),
        (
            "kube-apiserver-client-kubelet-approver",
            "kubernetes.io/kube-apiserver-client-kubelet",
        ),
        ("kubelet-serving-approver", "kubernetes.io/kubelet-serving"),
        ("legacy-unknown-approver", "kubernetes.io/legacy-unknown"),
    ] {
        let mut approve = rule(&[CERTIFICATES], &["signers"], &["approve"]);
        approve["resourceNames"] = json!([signer]);
        add(&format!("system:certificates.k8s.io:{name}"), vec![approve]);
    }
    add(
        "system:node-bootstrapper",
        vec![rule(
            &[CERTIFICATES],
            &["certificatesigningrequests"],
            &["create", "get", "list", "watch"],
        )],
    );
    // Rights of nodes come from the node authorizer; the role exists because charts refer to it.
    add("system:node", vec![]);
    add(
        "system:node-proxier",
        vec![
            rule(&[""], &["endpoints", "services", "nodes"], &READ),
            rule(&["discovery.k8s.io"], &["endpointslices"], &READ),
            rule(&["", "events.k8s.io"], &["events"], &["create", "patch", "update"]),
        ],
    );
    add(
        "system:kube-dns",
        vec![rule(&[""], &["endpoints", "services"], &["list", "watch"])],
    );
    add(
        "system:kube-scheduler",
        vec![
            rule(&["", "events.k8s.io"], &["events"], &["create", "patch", "update"]),
            rule(
                &["coordination.k8s.io"],
                &["leases"],
                &["create", "get", "list", "update", "watch"],
            ),
            rule(
                &[""],
                &[
                    "nodes",
                    "namespaces",
                    "services",
                    "replicationcontrollers",
                    "persistentvolumes",
                    "persistentvolumeclaims",
                ],
                &READ,
            ),
            rule(&[""], &["pods"], &["delete", "get", "list", "watch"]),
            rule(&[""], &["bindings", "pods/binding"], &["create"]),
            rule(&[""], &["pods/status"], &["patch", "update"]),
            rule(&["apps"], &["replicasets", "statefulsets"], &READ),
            rule(&["authentication.k8s.io"], &["tokenreviews"], &["create"]),
            rule(&["authorization.k8s.io"], &["subjectaccessreviews"], &["create"]),
        ],
    );
    add(
        "system:kube-controller-manager",
        vec![
            rule(&["", "events.k8s.io"], &["events"], &["create", "patch", "update"]),
            rule(&["coordination.k8s.io"], &["leases"], &["create", "get", "update"]),
            rule(
                &[""],
                &["secrets", "serviceaccounts"],
                &["create", "delete", "get", "update"],
            ),
            rule(&[""], &["serviceaccounts/token"], &["create"]),
            rule(&["*"], &["*"], &["list", "watch"]),
            rule(&["authentication.k8s.io"], &["tokenreviews"], &["create"]),
            rule(&["authorization.k8s.io"], &["subjectaccessreviews"], &["create"]),
        ],
    );
    for (name, rules) in controllers() {
        add(&format!("system:controller:{name}"), rules);
    }

    let aggregate = |to: &str| json!({"clusterRoleSelectors": [{"matchLabels": {format!("rbac.authorization.k8s.io/aggregate-to-{to}"): "true"}}]});
    for name in ["admin", "edit", "view"] {
        let mut labels = defaults_label();
        let up = match name {
            "edit" => Some("admin"),
            "view" => Some("edit"),
            _ => None,
        };
        if let Some(up) = up {
            labels[format!("rbac.authorization.k8s.io/aggregate-to-{up}")] = "true".into();
        }
        // The rules are those of the aggregated roles; the evaluator follows aggregation rules itself, and two levels
        // are spelled out here.
        let mut rules = Vec::new();
        if name == "admin" {
            rules.extend(admin_rules());
        }
        if name != "view" {
            rules.extend(edit_rules());
        }
        rules.extend(view_rules());
        roles.push((name.to_owned(), labels, json!(rules), aggregate(name)));
    }
    for (name, rules) in [("admin", admin_rules()), ("edit", edit_rules()), ("view", view_rules())] {
        let mut labels = defaults_label();
        labels[format!("rbac.authorization.k8s.io/aggregate-to-{name}")] = "true".into();
        roles.push((format!("system:aggregate-to-{name}"), labels, json!(rules), Value::Null));
    }
    roles
}

fn admin_rules() -> Vec<Value> {
    vec![
        rule(&["authorization.k8s.io"], &["localsubjectaccessreviews"], &["create"]),
        rule(&[RBAC], &["rolebindings", "roles"], &all_verbs()),
    ]
}

fn edit_rules() -> Vec<Value> {
    vec![
        rule(
            &[""],
            &[
                "pods/attach",
                "pods/exec",
                "pods/portforward",
                "pods/proxy",
                "secrets",
                "services/proxy",
            ],
            &READ,
        ),
        rule(&[""], &["serviceaccounts"], &["impersonate"]),
        rule(
            &[""],
            &["pods", "pods/attach", "pods/exec", "pods/portforward", "pods/proxy"],
            &WRITE,
        ),
        rule(&[""], &["pods/eviction"], &["create"]),
        rule(
            &[""],
            &[
                "configmaps",
                "events",
                "persistentvolumeclaims",
                "replicationcontrollers",
                "replicationcontrollers/scale",
                "secrets",
                "serviceaccounts",
                "services",
                "services/proxy",
            ],
            &WRITE,
        ),
        rule(&[""], &["serviceaccounts/token"], &["create"]),
        rule(
            &["apps"],
            &[
                "daemonsets",
                "deployments",
                "deployments/rollback",
                "deployments/scale",
                "replicasets",
                "replicasets/scale",
                "statefulsets",
                "statefulsets/scale",
            ],
            &WRITE,
        ),
        rule(&["batch"], &["cronjobs", "jobs"], &WRITE),
        rule(&["autoscaling"], &["horizontalpodautoscalers"], &WRITE),
        rule(&["policy"], &["poddisruptionbudgets"], &WRITE),
        rule(&["networking.k8s.io"], &["ingresses", "networkpolicies"], &WRITE),
        rule(&["coordination.k8s.io"], &["leases"], &all_verbs()),
    ]
}

fn view_rules() -> Vec<Value> {
    vec![
        rule(
            &[""],
            &[
                "configmaps",
                "endpoints",
                "persistentvolumeclaims",
                "persistentvolumeclaims/status",
                "pods",
                "replicationcontrollers",
                "replicationcontrollers/scale",
                "serviceaccounts",
                "services",
                "services/status",
                "bindings",
                "events",
                "limitranges",
                "namespaces/status",
                "pods/log",
                "pods/status",
                "replicationcontrollers/status",
                "resourcequotas",
                "resourcequotas/status",
                "namespaces",
            ],
            &READ,
        ),
        rule(&["discovery.k8s.io"], &["endpointslices"], &READ),
        rule(
            &["apps"],
            &[
                "controllerrevisions",
                "daemonsets",
                "daemonsets/status",
                "deployments",
                "deployments/scale",
                "deployments/status",
                "replicasets",
                "replicasets/scale",
                "replicasets/status",
                "statefulsets",
                "statefulsets/scale",
                "statefulsets/status",
            ],
            &READ,
        ),
        rule(
            &["batch"],
            &["cronjobs", "cronjobs/status", "jobs", "jobs/status"],
            &READ,
        ),
        rule(
            &["autoscaling"],
            &["horizontalpodautoscalers", "horizontalpodautoscalers/status"],
            &READ,
        ),
        rule(
            &["policy"],
            &["poddisruptionbudgets", "poddisruptionbudgets/status"],
            &READ,
        ),
        rule(
            &["networking.k8s.io"],
            &["ingresses", "ingresses/status", "networkpolicies"],
            &READ,
        ),
    ]
}

/// Roles of the controllers that run here.
fn controllers() -> Vec<(&'static str, Vec<Value>)> {
    let events = || rule(&["", "events.k8s.io"], &["events"], &["create", "patch", "update"]);
    vec![
        (
            "deployment-controller",
            vec![
                rule(&["apps"], &["deployments"], &["get", "list", "update", "watch"]),
                rule(
                    &["apps"],
                    &["deployments/status", "deployments/finalizers"],
                    &["update"],
                ),
                rule(
                    &["apps"],
                    &["replicasets"],
                    &["create", "delete", "get", "list", "patch", "update", "watch"],
                ),
                rule(&[""], &["pods"], &["get", "list", "update", "watch"]),
                events(),
            ],
        ),
        (
            "replicaset-controller",
            vec![
                rule(&["apps"], &["replicasets"], &["get", "list", "update", "watch"]),
                rule(
                    &["apps"],
                    &["replicasets/status", "replicasets/finalizers"],
                    &["update"],
                ),
                rule(&[""], &["pods"], &["create", "delete", "list", "patch", "watch"]),
                events(),
            ],
        ),
        (
            "endpointslice-controller",
            vec![
                rule(&[""], &["nodes", "pods", "services"], &["get", "list", "watch"]),
                rule(&[""], &["services/finalizers"], &["update"]),
                rule(
                    &["discovery.k8s.io"],
                    &["endpointslices"],
                    &["create", "delete", "get", "list", "update", "watch"],
                ),
                events(),
            ],
        ),
        (
            "endpoint-controller",
            vec![
                rule(&[""], &["pods", "services"], &["get", "list", "watch"]),
                rule(
                    &[""],
                    &["endpoints"],
                    &["create", "delete", "get", "list", "update", "watch"],
                ),
                events(),
            ],
        ),
        (
            "namespace-controller",
            vec![
                rule(&[""], &["namespaces"], &["delete", "get", "list", "watch"]),
                rule(&[""], &["namespaces/finalize", "namespaces/status"], &["update"]),
                rule(&["*"], &["*"], &["delete", "deletecollection", "get", "list"]),
            ],
        ),
        (
            "service-account-controller",
            vec![
                rule(&[""], &["serviceaccounts"], &["create", "get", "list", "watch"]),
                rule(&[""], &["namespaces"], &["list", "watch"]),
                events(),
            ],
        ),
        (
            "root-ca-cert-publisher",
            vec![
                rule(&[""], &["configmaps"], &["create", "get", "list", "update", "watch"]),
                rule(&[""], &["namespaces"], &["list", "watch"]),
                events(),
            ],
        ),
        (
            "node-controller",
            vec![
                rule(
                    &[""],
                    &["nodes"],
                    &["delete", "get", "list", "patch", "update", "watch"],
                ),
                rule(&[""], &["nodes/status", "pods/status"], &["patch", "update"]),
                rule(&[""], &["pods"], &["delete", "get", "list", "watch"]),
                rule(&["coordination.k8s.io"], &["leases"], &["get", "list", "watch"]),
                events(),
            ],
        ),
        (
            "generic-garbage-collector",
            vec![
                rule(&["*"], &["*"], &["delete", "get", "list", "patch", "update", "watch"]),
                events(),
            ],
        ),
    ]
}

/// `(name, role, subject)` of every default binding.
pub fn cluster_bindings() -> Vec<(String, String, Value)> {
    let group = |name: &str| json!({"apiGroup": RBAC, "kind": "Group", "name": name});
    let user = |name: &str| json!({"apiGroup": RBAC, "kind": "User", "name": name});
    let mut bindings = vec![
        (
            "cluster-admin".to_owned(),
            "cluster-admin".to_owned(),
            group("system:masters"),
        ),
        (
            "system:discovery".into(),
            "system:discovery".into(),
            group("system:authenticated"),
        ),
        (
            "system:basic-user".into(),
            "system:basic-user".into(),
            group("system:authenticated"),
        ),
        (
            "system:public-info-viewer".into(),
            "system:public-info-viewer".into(),
            group("system:authenticated"),
        ),
        (
            "system:public-info-viewer".into(),
            "system:public-info-viewer".into(),
            group("system:unauthenticated"),
        ),
        (
            "system:monitoring".into(),
            "system:monitoring".into(),
            group("system:monitoring"),
        ),
        (
            "system:service-account-issuer-discovery".into(),
            "system:service-account-issuer-discovery".into(),
            group("system:serviceaccounts"),
        ),
        (
            "system:kube-scheduler".into(),
            "system:kube-scheduler".into(),
            user("system:kube-scheduler"),
        ),
        (
            "system:kube-controller-manager".into(),
            "system:kube-controller-manager".into(),
            user("system:kube-controller-manager"),
        ),
        (
            "system:node-proxier".into(),
            "system:node-proxier".into(),
            user("system:kube-proxy"),
        ),
        (
            "system:kube-dns".into(),
            "system:kube-dns".into(),
            json!({"kind": "ServiceAccount", "name": "kube-dns", "namespace": "kube-system"}),
        ),
    ];
    for (name, _) in controllers() {
        let full = format!("system:controller:{name}");
        let subject = json!({"kind": "ServiceAccount", "name": name, "namespace": "kube-system"});
        bindings.push((full.clone(), full, subject));
    }
    bindings
}

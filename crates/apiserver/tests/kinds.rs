//! What single kinds get from the server: namespaces, pods, services, nodes, roles, tokens.

mod common;

use apiserver::UserInfo;
use common::{Api, api, call};
use serde_json::{Value, json};

fn pod(name: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "x"}]}})
}

const PODS: &str = "/api/v1/namespaces/default/pods";

async fn with_account() -> Api {
    let api = api().await;
    let (code, made) = api
        .post(
            "/api/v1/namespaces/default/serviceaccounts",
            json!({"metadata": {"name": "default"}}),
        )
        .await;
    assert_eq!(code, 201, "{made}");
    api
}

async fn node(api: &Api, name: &str) {
    let (code, made) = api.post("/api/v1/nodes", json!({"metadata": {"name": name}})).await;
    assert_eq!(code, 201, "{made}");
}

async fn bind(api: &Api, pod: &str, node: &str) -> (u16, Value) {
    let binding = json!({"metadata": {"name": pod}, "target": {"kind": "Node", "name": node}});
    api.post(&format!("{PODS}/{pod}/binding"), binding).await
}

fn node_user(name: &str) -> UserInfo {
    UserInfo::new(format!("system:node:{name}"), ["system:nodes"])
}

#[tokio::test]
async fn pods_are_completed_bound_once_and_ended_gracefully() {
    let api = with_account().await;
    let (code, made) = api.post(PODS, pod("a")).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(made["status"]["phase"], "Pending");
    assert_eq!(made["spec"]["serviceAccountName"], "default");
    let mount = &made["spec"]["containers"][0]["volumeMounts"][0];
    assert_eq!(mount["mountPath"], "/var/run/secrets/kubernetes.io/serviceaccount");
    assert_eq!(made["spec"]["volumes"][0]["name"], mount["name"]);
    assert_eq!(made["spec"]["tolerations"].as_array().unwrap().len(), 2);

    node(&api, "n1").await;
    assert_eq!(bind(&api, "a", "n1").await.0, 201);
    let (code, twice) = bind(&api, "a", "n2").await;
    assert_eq!(code, 409, "{twice}");
    let (_, on_node) = api.get("/api/v1/pods?fieldSelector=spec.nodeName%3Dn1").await;
    assert_eq!(on_node["items"][0]["metadata"]["name"], "a");
    assert_eq!(on_node["items"][0]["status"]["conditions"][0]["type"], "PodScheduled");

    let status = json!({"status": {"phase": "Running", "podIP": "10.1.2.3"}});
    let (code, running) = api.merge(&format!("{PODS}/a/status"), status).await;
    assert_eq!(
        (code, &running["status"]["podIP"]),
        (200, &json!("10.1.2.3")),
        "{running}"
    );
    assert_eq!(running["status"]["qosClass"], "BestEffort");
    // Status does not change through the main resource.
    let (_, kept) = api
        .merge(&format!("{PODS}/a"), json!({"status": {"phase": "Failed"}}))
        .await;
    assert_eq!(kept["status"]["phase"], "Running");

    let (code, ending) = api.delete(&format!("{PODS}/a")).await;
    assert_eq!(
        (code, &ending["metadata"]["deletionGracePeriodSeconds"]),
        (200, &json!(30))
    );
    let (_, still) = api.get(&format!("{PODS}/a")).await;
    assert!(still["metadata"]["deletionTimestamp"].is_string());
    let (code, _) = api.delete(&format!("{PODS}/a?gracePeriodSeconds=0")).await;
    assert_eq!(code, 200);
    assert_eq!(api.get(&format!("{PODS}/a")).await.0, 404);
    // A pod without a node goes at once.
    api.post(PODS, pod("b")).await;
    api.delete(&format!("{PODS}/b")).await;
    assert_eq!(api.get(&format!("{PODS}/b")).await.0, 404);
    let generated = json!({"metadata": {"generateName": "web-"}, "spec": pod("")["spec"]});
    let (_, named) = api.post(PODS, generated).await;
    assert!(
        named["metadata"]["name"].as_str().unwrap().starts_with("web-"),
        "{named}"
    );
}

#[tokio::test]
async fn a_pod_needs_its_service_account() {
    let api = api().await;
    let (code, refused) = api.post(PODS, pod("a")).await;
    assert_eq!(code, 403);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("serviceaccount \"default\" not found"),
        "{refused}"
    );
}

#[tokio::test]
async fn finalizers_hold_and_let_go() {
    let api = api().await;
    let maps = "/api/v1/namespaces/default/configmaps";
    api.post(maps, json!({"metadata": {"name": "a", "finalizers": ["x.io/y"]}}))
        .await;
    let (code, held) = api.delete(&format!("{maps}/a")).await;
    assert_eq!(code, 200);
    assert!(held["metadata"]["deletionTimestamp"].is_string(), "{held}");
    let (code, _) = api
        .merge(&format!("{maps}/a"), json!({"metadata": {"finalizers": null}}))
        .await;
    assert_eq!(code, 200);
    assert_eq!(api.get(&format!("{maps}/a")).await.0, 404);
    api.post(maps, json!({"metadata": {"name": "b"}})).await;
    let (_, orphaning) = api.delete(&format!("{maps}/b?propagationPolicy=Orphan")).await;
    assert_eq!(orphaning["metadata"]["finalizers"], json!(["orphan"]));
    let (code, _) = api.delete(&format!("{maps}/b?propagationPolicy=Sideways")).await;
    assert_eq!(code, 422);
}

#[tokio::test]
async fn namespaces_end_by_finalize() {
    let api = api().await;
    let (_, made) = api.post("/api/v1/namespaces", json!({"metadata": {"name": "x"}})).await;
    assert_eq!(made["spec"]["finalizers"], json!(["kubernetes"]));
    assert_eq!(made["metadata"]["labels"]["kubernetes.io/metadata.name"], "x");
    let (code, missing) = api
        .post("/api/v1/namespaces/nope/configmaps", json!({"metadata": {"name": "a"}}))
        .await;
    assert_eq!(
        (code, missing["message"].as_str()),
        (404, Some("namespaces \"nope\" not found"))
    );
    let (_, ending) = api.delete("/api/v1/namespaces/x").await;
    assert_eq!(ending["status"]["phase"], "Terminating");
    let (code, refused) = api
        .post("/api/v1/namespaces/x/configmaps", json!({"metadata": {"name": "a"}}))
        .await;
    assert_eq!(
        (code, &refused["details"]["causes"][0]["reason"]),
        (403, &json!("NamespaceTerminating"))
    );
    let (_, mut current) = api.get("/api/v1/namespaces/x").await;
    current["spec"]["finalizers"] = json!([]);
    assert_eq!(api.put("/api/v1/namespaces/x/finalize", current).await.0, 200);
    assert_eq!(api.get("/api/v1/namespaces/x").await.0, 404);
    assert_eq!(api.delete("/api/v1/namespaces/default").await.0, 403);
}

#[tokio::test]
async fn services_get_unique_addresses_and_ports() {
    let api = api().await;
    let services = "/api/v1/namespaces/default/services";
    let service = |name: &str, extra: Value| {
        let mut spec = json!({"ports": [{"port": 80}]});
        spec.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!({"metadata": {"name": name}, "spec": spec})
    };
    let (code, first) = api.post(services, service("a", json!({"type": "LoadBalancer"}))).await;
    assert_eq!(code, 201, "{first}");
    let ip = first["spec"]["clusterIP"].as_str().unwrap().to_owned();
    let port = first["spec"]["ports"][0]["nodePort"].as_u64().unwrap();
    assert!(ip.starts_with("10.0.") && (30000..=32767).contains(&port));
    let (code, taken) = api.post(services, service("b", json!({"clusterIP": ip}))).await;
    assert_eq!(code, 422);
    assert!(
        taken["message"]
            .as_str()
            .unwrap()
            .contains("provided IP is already allocated"),
        "{taken}"
    );
    let (code, outside) = api
        .post(services, service("b", json!({"clusterIP": "192.168.0.1"})))
        .await;
    assert_eq!(code, 422);
    assert!(
        outside["message"].as_str().unwrap().contains("not in the valid range"),
        "{outside}"
    );
    let (_, none) = api.post(services, service("h", json!({"clusterIP": "None"}))).await;
    assert_eq!(none["spec"]["clusterIP"], "None");
    // Back to ClusterIP: the port is free again, the address stays.
    let (code, plain) = api
        .merge(&format!("{services}/a"), json!({"spec": {"type": "ClusterIP"}}))
        .await;
    assert_eq!(
        (code, plain["spec"]["clusterIP"].as_str()),
        (200, Some(ip.as_str())),
        "{plain}"
    );
    assert!(plain["spec"]["ports"][0]["nodePort"].is_null(), "{plain}");
    let again = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]});
    assert_eq!(api.post(services, service("c", again)).await.0, 201);
    api.delete(&format!("{services}/a")).await;
    assert_eq!(
        api.post(services, service("b", json!({"clusterIP": ip}))).await.0,
        201,
        "a freed address is free"
    );

    let many = (0..40).map(|i| {
        let (local, body) = (
            &api.service,
            service(&format!("s{i}"), json!({"type": "NodePort"})).to_string(),
        );
        async move { call(local, "POST", services, "application/json", body).await }
    });
    let mut seen = std::collections::HashSet::new();
    for (code, made) in futures::future::join_all(many).await {
        assert_eq!(code, 201, "{made}");
        assert!(seen.insert(made["spec"]["clusterIP"].to_string()));
        assert!(seen.insert(made["spec"]["ports"][0]["nodePort"].to_string()));
    }
}

#[tokio::test]
async fn nodes_see_and_change_their_own_only() {
    let api = with_account().await;
    node(&api, "n1").await;
    node(&api, "n2").await;
    let secrets = "/api/v1/namespaces/default/secrets";
    for name in ["used", "other"] {
        api.post(secrets, json!({"metadata": {"name": name}})).await;
    }
    let mut with_secret = pod("a");
    with_secret["spec"]["volumes"] = json!([{"name": "v", "secret": {"secretName": "used"}}]);
    let (code, made) = api.post(PODS, with_secret).await;
    assert_eq!(code, 201, "{made}");
    bind(&api, "a", "n1").await;

    let (mine, other) = (
        api.cluster.local_service(node_user("n1")),
        api.cluster.local_service(node_user("n2")),
    );
    let get = async |who: &apiserver::LocalService, path: &str| call(who, "GET", path, "", "").await.0;
    assert_eq!(get(&mine, &format!("{secrets}/used")).await, 200);
    assert_eq!(get(&mine, &format!("{secrets}/other")).await, 403);
    assert_eq!(get(&other, &format!("{secrets}/used")).await, 403);
    assert_eq!(get(&mine, secrets).await, 403);
    assert_eq!(get(&mine, "/api/v1/pods?fieldSelector=spec.nodeName%3Dn1").await, 200);
    assert_eq!(get(&mine, "/api/v1/pods?fieldSelector=spec.nodeName%3Dn2").await, 403);
    assert_eq!(get(&mine, "/api/v1/pods").await, 403);
    assert_eq!(get(&mine, "/api/v1/services").await, 200);
    let merge = "application/merge-patch+json";
    let status = async |who: &apiserver::LocalService, path: &str| {
        call(who, "PATCH", path, merge, r#"{"status": {"phase": "Running"}}"#)
            .await
            .0
    };
    assert_eq!(status(&mine, &format!("{PODS}/a/status")).await, 200);
    assert_eq!(status(&other, &format!("{PODS}/a/status")).await, 403);
    assert_eq!(
        call(&other, "PATCH", "/api/v1/nodes/n1/status", merge, "{}").await.0,
        403
    );
    assert_eq!(
        call(&mine, "PATCH", "/api/v1/nodes/n1/status", merge, "{}").await.0,
        200
    );
    let impostor = json!({"metadata": {"name": "n9"}}).to_string();
    assert_eq!(
        call(&mine, "POST", "/api/v1/nodes", "application/json", impostor)
            .await
            .0,
        403
    );
    let lease = |name: &str| json!({"metadata": {"name": name}, "spec": {"holderIdentity": name}}).to_string();
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    assert_eq!(
        call(&mine, "POST", leases, "application/json", lease("n1")).await.0,
        201
    );
    assert_eq!(
        call(&mine, "POST", leases, "application/json", lease("n2")).await.0,
        403
    );

    let uid = made["metadata"]["uid"].as_str().unwrap();
    let token = |uid: &str| {
        json!({"spec": {"boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "a", "uid": uid}}}).to_string()
    };
    let path = "/api/v1/namespaces/default/serviceaccounts/default/token";
    let (code, issued) = call(&mine, "POST", path, "application/json", token(uid)).await;
    assert_eq!(code, 201, "{issued}");
    assert_eq!(call(&other, "POST", path, "application/json", token(uid)).await.0, 403);
    assert_eq!(
        call(&mine, "POST", path, "application/json", token("wrong")).await.0,
        403
    );

    let review = json!({"spec": {"token": issued["status"]["token"]}});
    let reviews = "/apis/authentication.k8s.io/v1/tokenreviews";
    let (_, answer) = api.post(reviews, review.clone()).await;
    assert_eq!(answer["status"]["authenticated"], true, "{answer}");
    assert_eq!(
        answer["status"]["user"]["username"],
        "system:serviceaccount:default:default"
    );
    assert_eq!(
        answer["status"]["user"]["extra"]["authentication.kubernetes.io/pod-name"],
        json!(["a"])
    );
    api.delete(&format!("{PODS}/a?gracePeriodSeconds=0")).await;
    let (_, answer) = api.post(reviews, review).await;
    assert_eq!(
        answer["status"]["authenticated"], false,
        "a token dies with its pod: {answer}"
    );
}

#[tokio::test]
async fn rights_are_given_by_bindings_and_never_beyond_ones_own() {
    let api = api().await;
    let bob = api.cluster.local_service(UserInfo::new("bob", Vec::<String>::new()));
    let maps = "/api/v1/namespaces/default/configmaps";
    let (code, refused) = call(&bob, "GET", maps, "", "").await;
    assert_eq!(code, 403);
    assert_eq!(
        refused["message"],
        "configmaps is forbidden: User \"bob\" cannot list resource \"configmaps\" in API group \"\" in the namespace \"default\""
    );
    let bindings = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings";
    let binding = |name: &str, role: &str, user: &str| {
        json!({"metadata": {"name": name}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": user}]})
    };
    assert_eq!(api.post(bindings, binding("bob", "admin", "bob")).await.0, 201);
    assert_eq!(call(&bob, "GET", maps, "", "").await.0, 200);
    assert_eq!(
        call(&bob, "GET", "/api/v1/namespaces/kube-system/configmaps", "", "")
            .await
            .0,
        403
    );
    let json = "application/json";
    assert_eq!(
        call(&bob, "POST", bindings, json, binding("eve", "view", "eve").to_string())
            .await
            .0,
        201
    );
    let (code, refused) = call(
        &bob,
        "POST",
        bindings,
        json,
        binding("up", "cluster-admin", "bob").to_string(),
    )
    .await;
    assert_eq!(code, 403);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("permissions not currently held"),
        "{refused}"
    );
    let roles = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles";
    let role = |verbs: Value| {
        json!({"metadata": {"name": "r"}, "rules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": verbs}]})
            .to_string()
    };
    assert_eq!(call(&bob, "POST", roles, json, role(json!(["get"]))).await.0, 403);

    let review = json!({"spec": {"user": "bob", "resourceAttributes": {"verb": "get", "resource": "pods", "namespace": "default"}}});
    let (_, answer) = api
        .post("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
        .await;
    assert_eq!(answer["status"]["allowed"], true, "{answer}");
}

#[tokio::test]
async fn events_are_one_thing_in_two_groups() {
    let api = api().await;
    let event = json!({"metadata": {"name": "e", "namespace": "default"}, "involvedObject": {"kind": "Pod", "name": "p"},
        "reason": "R", "message": "hello", "type": "Normal"});
    let (code, made) = api.post("/api/v1/namespaces/default/events", event).await;
    assert_eq!(code, 201, "{made}");
    let (code, new) = api.get("/apis/events.k8s.io/v1/namespaces/default/events/e").await;
    assert_eq!(
        (code, &new["note"], &new["apiVersion"]),
        (200, &json!("hello"), &json!("events.k8s.io/v1"))
    );
    let (_, list) = api.get("/apis/events.k8s.io/v1/events").await;
    assert_eq!(list["items"][0]["regarding"]["name"], "p");
    let (_, selected) = api.get("/api/v1/events?fieldSelector=involvedObject.name%3Dp").await;
    assert_eq!(selected["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn dry_run_and_scale() {
    let api = api().await;
    let deployments = "/apis/apps/v1/namespaces/default/deployments";
    let deployment = json!({"metadata": {"name": "d"}, "spec": {"replicas": 2, "selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "x"}]}}}});
    let (code, dry) = api.post(&format!("{deployments}?dryRun=All"), deployment.clone()).await;
    assert_eq!(
        (code, &dry["spec"]["strategy"]["type"]),
        (201, &json!("RollingUpdate")),
        "{dry}"
    );
    assert_eq!(api.get(&format!("{deployments}/d")).await.0, 404);
    let (code, made) = api.post(deployments, deployment).await;
    assert_eq!((code, &made["metadata"]["generation"]), (201, &json!(1)), "{made}");
    let (_, scale) = api.get(&format!("{deployments}/d/scale")).await;
    assert_eq!(
        (&scale["kind"], &scale["spec"]["replicas"], &scale["status"]["selector"]),
        (&json!("Scale"), &json!(2), &json!("a=b"))
    );
    let (code, scaled) = api
        .merge(&format!("{deployments}/d/scale"), json!({"spec": {"replicas": 5}}))
        .await;
    assert_eq!((code, &scaled["spec"]["replicas"]), (200, &json!(5)), "{scaled}");
    let (_, now) = api.get(&format!("{deployments}/d")).await;
    assert_eq!(
        (&now["spec"]["replicas"], &now["metadata"]["generation"]),
        (&json!(5), &json!(2))
    );
    let (_, labelled) = api
        .merge(&format!("{deployments}/d"), json!({"metadata": {"labels": {"x": "y"}}}))
        .await;
    assert_eq!(labelled["metadata"]["generation"], 2, "metadata is no new generation");
}

#[tokio::test]
async fn collections_are_deleted_by_selector() {
    let api = api().await;
    let maps = "/api/v1/namespaces/default/configmaps";
    for (name, label) in [("a", "1"), ("b", "2"), ("c", "1")] {
        api.post(maps, json!({"metadata": {"name": name, "labels": {"l": label}}}))
            .await;
    }
    let (code, _) = api.delete(&format!("{maps}?labelSelector=l%3D1")).await;
    assert_eq!(code, 200);
    let (_, left) = api.get(maps).await;
    assert_eq!(left["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn priority_classes_decide_pod_priorities() {
    let api = api().await;
    api.post(
        "/api/v1/namespaces/default/serviceaccounts",
        json!({"metadata": {"name": "default"}}),
    )
    .await;
    const CLASSES: &str = "/apis/scheduling.k8s.io/v1/priorityclasses";
    let (_, system) = api.get(&format!("{CLASSES}/system-node-critical")).await;
    assert_eq!(system["value"], 2_000_001_000);
    assert_eq!(api.delete(&format!("{CLASSES}/system-node-critical")).await.0, 403);
    let class = |name: &str, value: i64, default: bool| json!({"metadata": {"name": name}, "value": value, "globalDefault": default});
    let (code, made) = api.post(CLASSES, class("high", 1000, false)).await;
    assert_eq!(
        (code, &made["preemptionPolicy"]),
        (201, &json!("PreemptLowerPriority")),
        "{made}"
    );
    assert_eq!(api.post(CLASSES, class("too-high", 1_000_000_001, false)).await.0, 422);
    assert_eq!(api.post(CLASSES, class("system-x", 1, false)).await.0, 422);
    assert_eq!(api.merge(&format!("{CLASSES}/high"), json!({"value": 7})).await.0, 422);
    let with = |name: &str, class: &str| {
        let mut pod = pod(name);
        pod["spec"]["priorityClassName"] = class.into();
        pod
    };
    let (code, made) = api.post(PODS, with("a", "high")).await;
    assert_eq!((code, &made["spec"]["priority"]), (201, &json!(1000)), "{made}");
    let (code, refused) = api.post(PODS, with("b", "none")).await;
    assert_eq!(code, 403);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("no PriorityClass with name none was found"),
        "{refused}"
    );
    assert_eq!(api.post(CLASSES, class("usual", 5, true)).await.0, 201);
    let (code, second) = api.post(CLASSES, class("usual2", 6, true)).await;
    assert_eq!(code, 403, "{second}");
    let (_, made) = api.post(PODS, pod("c")).await;
    assert_eq!(
        (&made["spec"]["priority"], &made["spec"]["priorityClassName"]),
        (&json!(5), &json!("usual"))
    );
}

#[tokio::test]
async fn kinds_that_are_only_kept() {
    let api = api().await;
    let class = json!({"metadata": {"name": "web", "annotations": {"ingressclass.kubernetes.io/is-default-class": "true"}},
        "spec": {"controller": "x.io/ingress"}});
    let (code, made) = api.post("/apis/networking.k8s.io/v1/ingressclasses", class).await;
    assert_eq!(code, 201, "{made}");
    let ingresses = "/apis/networking.k8s.io/v1/namespaces/default/ingresses";
    let ingress = |path: &str| {
        json!({"metadata": {"name": "i"}, "spec": {"rules": [{"host": "a.example", "http": {"paths": [
            {"path": path, "pathType": "Prefix", "backend": {"service": {"name": "s", "port": {"number": 80}}}}]}}]}})
    };
    let (code, refused) = api.post(ingresses, ingress("x//y")).await;
    assert_eq!(code, 422);
    assert_eq!(
        refused["message"],
        "Ingress.networking.k8s.io \"i\" is invalid: [spec.rules[0].http.paths[0].path: Invalid value: \"x//y\": must be \
         an absolute path, spec.rules[0].http.paths[0].path: Invalid value: \"x//y\": must not contain '//']"
    );
    let (code, made) = api.post(ingresses, ingress("/")).await;
    assert_eq!(
        (code, &made["spec"]["ingressClassName"]),
        (201, &json!("web")),
        "{made}"
    );
    assert_eq!(made["status"], json!({"loadBalancer": {}}));
    let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": "1.2.3.4"}]}}});
    assert_eq!(api.merge(&format!("{ingresses}/i/status"), status).await.0, 200);
    let storage = json!({"metadata": {"name": "fast"}, "provisioner": "x.io/disk"});
    let (code, made) = api.post("/apis/storage.k8s.io/v1/storageclasses", storage).await;
    assert_eq!(
        (code, &made["reclaimPolicy"], &made["volumeBindingMode"]),
        (201, &json!("Delete"), &json!("Immediate"))
    );
    assert_eq!(made["metadata"].get("generation"), None);
    let template =
        json!({"metadata": {"name": "t"}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": pod("")["spec"]}});
    let (code, made) = api.post("/api/v1/namespaces/default/podtemplates", template).await;
    assert_eq!(
        (code, &made["template"]["spec"]["dnsPolicy"]),
        (201, &json!("ClusterFirst")),
        "{made}"
    );
    let revisions = "/apis/apps/v1/namespaces/default/controllerrevisions";
    let revision = json!({"metadata": {"name": "r"}, "revision": 1, "data": {"spec": {"x": 1}}});
    let (code, made) = api.post(revisions, revision).await;
    assert_eq!(
        (code, made.get("status"), &made["data"]["spec"]["x"]),
        (201, None, &json!(1)),
        "{made}"
    );
    assert_eq!(
        api.merge(&format!("{revisions}/r"), json!({"data": {"spec": {"x": 2}}}))
            .await
            .0,
        422
    );
    assert_eq!(
        api.post(revisions, json!({"metadata": {"name": "s"}, "revision": 1}))
            .await
            .0,
        422
    );
    for absent in [
        "apps/v1/namespaces/default/statefulsets",
        "networking.k8s.io/v1/namespaces/default/networkpolicies",
    ] {
        assert_eq!(api.get(&format!("/apis/{absent}")).await.0, 404, "{absent}");
    }
}

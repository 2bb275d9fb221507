//! ResourceQuota and LimitRange at admission.

mod common;

use common::{Api, api};
use serde_json::{Value, json};

const NS: &str = "/api/v1/namespaces/default";

async fn with_account() -> Api {
    let api = api().await;
    let account = json!({"metadata": {"name": "default"}});
    assert_eq!(api.post(&format!("{NS}/serviceaccounts"), account).await.0, 201);
    api
}

async fn make(api: &Api, plural: &str, value: Value) {
    let (code, made) = api.post(&format!("{NS}/{plural}"), value).await;
    assert_eq!(code, 201, "{made}");
}

fn pod(name: &str, resources: Value) -> Value {
    json!({"metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "x", "resources": resources}]}})
}

fn message(status: &Value) -> &str {
    status["message"].as_str().unwrap_or_default()
}

async fn quota(api: &Api, spec: Value) {
    make(api, "resourcequotas", json!({"metadata": {"name": "q"}, "spec": spec})).await;
}

#[tokio::test]
async fn many_creates_at_once_never_pass_the_limit() {
    let api = with_account().await;
    quota(&api, json!({"hard": {"configmaps": "7"}})).await;
    let path = format!("{NS}/configmaps");
    let tries = (0..40).map(|i| api.post(&path, json!({"metadata": {"name": format!("m{i}")}})));
    let answers = futures::future::join_all(tries).await;
    let made = answers.iter().filter(|(code, _)| *code == 201).count();
    let refused = answers.iter().find(|(code, _)| *code == 403).unwrap();
    assert_eq!(made, 7);
    assert_eq!(answers.iter().filter(|(code, _)| *code == 403).count(), 33);
    assert!(
        message(&refused.1).ends_with(
            "is forbidden: exceeded quota: q, requested: configmaps=1, used: configmaps=7, limited: configmaps=7"
        ),
        "{}",
        refused.1
    );
    let (_, q) = api.get(&format!("{NS}/resourcequotas/q")).await;
    assert_eq!(
        q["status"],
        json!({"hard": {"configmaps": "7"}, "used": {"configmaps": "7"}})
    );
    // A dry run is judged the same way and changes nothing.
    let dry = format!("{NS}/secrets?dryRun=All");
    assert_eq!(api.post(&dry, json!({"metadata": {"name": "s"}})).await.0, 201);
    let dry = format!("{path}?dryRun=All");
    assert_eq!(api.post(&dry, json!({"metadata": {"name": "x"}})).await.0, 403);
}

#[tokio::test]
async fn pods_are_counted_by_what_they_ask_for_and_must_say_it() {
    let api = with_account().await;
    quota(
        &api,
        json!({"hard": {"pods": "3", "requests.cpu": "1", "limits.memory": "1Gi"}}),
    )
    .await;
    let pods = format!("{NS}/pods");
    let (code, status) = api.post(&pods, pod("a", json!({"requests": {"cpu": "1"}}))).await;
    assert_eq!(code, 403);
    assert_eq!(
        message(&status),
        "pods \"a\" is forbidden: failed quota: q: must specify limits.memory for: c"
    );
    let resources = |cpu: &str| json!({"requests": {"cpu": cpu}, "limits": {"memory": "256Mi"}});
    make(&api, "pods", pod("a", resources("700m"))).await;
    let (code, status) = api.post(&pods, pod("b", resources("400m"))).await;
    assert_eq!(code, 403);
    assert_eq!(
        message(&status),
        "pods \"b\" is forbidden: exceeded quota: q, requested: requests.cpu=400m, used: requests.cpu=700m, limited: requests.cpu=1"
    );
    make(&api, "pods", pod("b", resources("300m"))).await;
    let (_, q) = api.get(&format!("{NS}/resourcequotas/q")).await;
    assert_eq!(
        q["status"]["used"],
        json!({"pods": "2", "requests.cpu": "1", "limits.memory": "512Mi"})
    );
}

#[tokio::test]
async fn services_count_when_they_change_and_scopes_choose_pods() {
    let api = with_account().await;
    make(
        &api,
        "services",
        json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}}),
    )
    .await;
    // With `kubernetes` that makes two.
    quota(
        &api,
        json!({"hard": {"services": "3", "services.nodeports": "0", "services.loadbalancers": "1"}}),
    )
    .await;
    let (code, status) = api
        .merge(&format!("{NS}/services/s"), json!({"spec": {"type": "NodePort"}}))
        .await;
    assert_eq!(code, 403, "{status}");
    assert!(
        message(&status).contains("requested: services.nodeports=1, used: services.nodeports=0"),
        "{status}"
    );
    let spec = json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]});
    make(&api, "services", json!({"metadata": {"name": "lb"}, "spec": spec})).await;
    let (code, status) = api
        .post(
            &format!("{NS}/services"),
            json!({"metadata": {"name": "third"}, "spec": {"ports": [{"port": 80}]}}),
        )
        .await;
    assert_eq!(code, 403, "{status}");

    let best_effort = json!({"metadata": {"name": "be"}, "spec": {"hard": {"pods": "0"}, "scopes": ["BestEffort"]}});
    make(&api, "resourcequotas", best_effort).await;
    assert_eq!(api.post(&format!("{NS}/pods"), pod("be", json!({}))).await.0, 403);
    make(&api, "pods", pod("burst", json!({"requests": {"cpu": "1m"}}))).await;
}

#[tokio::test]
async fn quotas_that_cannot_be_are_refused() {
    let api = api().await;
    let check = async |spec: Value, says: &str| {
        let quota = json!({"metadata": {"name": "bad"}, "spec": spec});
        let (code, status) = api.post(&format!("{NS}/resourcequotas"), quota).await;
        assert_eq!(code, 422, "{status}");
        assert!(
            message(&status).contains(says),
            "{} does not say {says:?}",
            message(&status)
        );
    };
    check(
        json!({"hard": {"foo": "1"}}),
        "spec.hard[foo]: Invalid value: \"foo\": must be a standard resource for quota",
    )
    .await;
    check(json!({"hard": {"pods": "-1"}}), "must be greater than or equal to 0").await;
    check(json!({"hard": {"pods": "0.5"}}), "must be an integer").await;
    check(
        json!({"hard": {"cpu": "1"}, "scopes": ["BestEffort"]}),
        "unsupported scope applied to resource",
    )
    .await;
    check(
        json!({"hard": {"pods": "1"}, "scopes": ["BestEffort", "NotBestEffort"]}),
        "conflicting scopes",
    )
    .await;
    quota(&api, json!({"hard": {"pods": "1"}, "scopes": ["BestEffort"]})).await;
    let (code, status) = api
        .merge(
            &format!("{NS}/resourcequotas/q"),
            json!({"spec": {"scopes": ["Terminating"]}}),
        )
        .await;
    assert_eq!(code, 422);
    assert!(message(&status).contains("field is immutable"), "{status}");
}

#[tokio::test]
async fn a_limit_range_fills_in_and_refuses() {
    let api = with_account().await;
    let limits = json!([{"type": "Container", "max": {"cpu": "1", "memory": "1Gi"}, "min": {"cpu": "100m"},
        "default": {"cpu": "500m"}, "defaultRequest": {"cpu": "200m"}, "maxLimitRequestRatio": {"cpu": "4"}},
        {"type": "Pod", "max": {"memory": "1536Mi"}}]);
    make(
        &api,
        "limitranges",
        json!({"metadata": {"name": "l"}, "spec": {"limits": limits}}),
    )
    .await;
    let (_, range) = api.get(&format!("{NS}/limitranges/l")).await;
    assert_eq!(
        range["spec"]["limits"][0]["default"],
        json!({"cpu": "500m", "memory": "1Gi"})
    );
    assert_eq!(
        range["spec"]["limits"][0]["defaultRequest"],
        json!({"cpu": "200m", "memory": "1Gi"})
    );
    let pods = format!("{NS}/pods");
    let (code, made) = api.post(&pods, pod("a", json!({"limits": {"cpu": "800m"}}))).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(
        made["spec"]["containers"][0]["resources"],
        json!({"limits": {"cpu": "800m", "memory": "1Gi"}, "requests": {"cpu": "800m", "memory": "1Gi"}}),
        "a given limit is the request's default before the range's"
    );
    assert_eq!(
        made["metadata"]["annotations"]["kubernetes.io/limit-ranger"],
        "LimitRanger plugin set: memory request for container c; memory limit for container c"
    );
    let check = async |resources: Value, says: &str| {
        let (code, status) = api.post(&pods, pod("b", resources)).await;
        assert_eq!(code, 403, "{status}");
        assert_eq!(message(&status), format!("pods \"b\" is forbidden: {says}"));
    };
    check(
        json!({"requests": {"cpu": "50m"}, "limits": {"cpu": "100m"}}),
        "minimum cpu usage per Container is 100m, but request is 50m",
    )
    .await;
    check(
        json!({"requests": {"cpu": "500m"}, "limits": {"cpu": "2"}}),
        "maximum cpu usage per Container is 1, but limit is 2",
    )
    .await;
    check(
        json!({"requests": {"cpu": "100m"}, "limits": {"cpu": "900m"}}),
        "cpu max limit to request ratio per Container is 4, but provided ratio is 9.000000",
    )
    .await;
    let two = json!({"metadata": {"name": "two"}, "spec": {"containers": [
        {"name": "c", "image": "x"}, {"name": "d", "image": "x"}]}});
    let (code, status) = api.post(&pods, two).await;
    assert_eq!(code, 403);
    assert!(
        message(&status).ends_with("maximum memory usage per Pod is 1536Mi, but limit is 2Gi"),
        "{status}"
    );
    let bad = json!({"metadata": {"name": "bad"}, "spec": {"limits": [
        {"type": "Pod", "default": {"cpu": "1"}}, {"type": "Container", "min": {"cpu": "2"}, "max": {"cpu": "1"}}]}});
    let (code, status) = api.post(&format!("{NS}/limitranges"), bad).await;
    assert_eq!(code, 422);
    for says in [
        "spec.limits[0].default: Forbidden: may not be specified when `type` is 'Pod'",
        "spec.limits[1].min[cpu]: Invalid value: \"2\": min value 2 is greater than max value 1",
    ] {
        assert!(message(&status).contains(says), "{status}");
    }
}

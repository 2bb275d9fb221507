//! The virtual node over fakes of the engine and the API, with paused time.

use std::{path::Path, sync::Arc, time::Duration};

use container_instances::{Groups, GroupsConfig, Quota};
use kubelet::fake::{FakeApi, FakeRuntime};
use serde_json::json;
use stdx::{Shutdown, clock::RuntimeClock};
use tokio::time::{Instant, advance, sleep};
use virtual_node::{VirtualNode, VirtualNodeConfig};

async fn groups(runtime: &Arc<FakeRuntime>, dir: &Path, quota: Quota) -> Arc<Groups> {
    let config = GroupsConfig {
        runtime: runtime.clone(),
        images: runtime.clone(),
        node_name: "n1".into(),
        cluster: "demo".into(),
        virtual_network: "vnet-1".into(),
        subnet: "aci".into(),
        group_scope: "/subscriptions/s/resourceGroups/rg".into(),
        quota,
        meter_dir: dir.join("meter"),
        home: None,
        clock: Arc::new(RuntimeClock::new(std::time::SystemTime::now())),
    };
    Groups::open(config).await.unwrap()
}

fn node(api: &Arc<FakeApi>, groups: &Arc<Groups>, dir: &Path) -> VirtualNode {
    VirtualNode::new(VirtualNodeConfig {
        node_name: "n1".into(),
        api: api.clone(),
        groups: groups.clone(),
        root_dir: dir.join("kubelet"),
        log_dir: dir.join("logs"),
        cpu_milli: 1_000_000,
        memory_bytes: 64 << 30,
        pods: 5000,
        addresses: vec!["10.240.0.4".parse().unwrap()],
        cluster_dns: vec!["10.0.0.10".parse().unwrap()],
        cluster_domain: "cluster.local".into(),
        kubernetes_service: None,
        port: 0,
        serving: None,
        dialer: None,
        labels: Default::default(),
        clock: Arc::new(RuntimeClock::new(std::time::SystemTime::now())),
        tuning: Default::default(),
    })
    .unwrap()
}

async fn until(what: &str, check: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !check() {
        assert!(Instant::now() < deadline, "not {what}");
        sleep(Duration::from_millis(2)).await;
    }
}

fn phase(s: &k8s_openapi::api::core::v1::PodStatus) -> &str {
    s.phase.as_deref().unwrap_or_default()
}

#[tokio::test(start_paused = true)]
async fn a_group_is_metered_from_its_pull_to_its_stop_and_across_agents() {
    let dir = tempfile::tempdir().unwrap();
    let (api, runtime): (Arc<FakeApi>, Arc<FakeRuntime>) = Default::default();
    let g = groups(&runtime, dir.path(), Quota::default()).await;
    let (n, stop) = (node(&api, &g, dir.path()), Shutdown::new());
    let task = tokio::spawn({
        let (n, stop) = (n.clone(), stop.clone());
        async move { n.run(stop).await }
    });
    let spec = json!({"containers": [{"name": "c", "image": "nginx", "resources": {"requests": {"cpu": "250m", "memory": "256Mi"}}}]});
    api.create_pod("p", spec, json!({}));
    api.until("p", "running", |s| phase(s) == "Running").await;
    let labels = api.node_now().unwrap().metadata.labels.unwrap();
    for (k, v) in [
        ("type", "virtual-kubelet"),
        ("kubernetes.io/role", "agent"),
        ("kubernetes.io/os", "linux"),
    ] {
        assert_eq!(labels[k], v);
    }
    assert!(!labels.keys().any(|k| k.contains("exclude")));
    let spec = api.node_now().unwrap().spec.unwrap();
    assert_eq!(spec.taints.unwrap()[0].key, "virtual-kubelet.io/provider");
    // Capacity is the quota's, not what was asked for.
    let capacity = api.node_now().unwrap().status.unwrap().capacity.unwrap();
    assert_eq!(
        (capacity["cpu"].0.as_str(), capacity["pods"].0.as_str()),
        ("100", "100")
    );
    let u = g.usage();
    assert_eq!(
        (u.len(), u[0].opened_by.as_str(), u[0].subject.cpu_milli),
        (1, "pull-start", 250)
    );

    // The agent goes away without a word; another one takes over, and the segment goes on.
    stop.trigger();
    task.await.unwrap();
    drop((n, g));
    advance(Duration::from_secs(30)).await;
    let g = groups(&runtime, dir.path(), Quota::default()).await;
    assert_eq!((g.usage().len(), g.count()), (1, 1));
    assert!(g.usage()[0].end_ns.is_none());
    let (n, stop) = (node(&api, &g, dir.path()), Shutdown::new());
    let task = tokio::spawn({
        let stop = stop.clone();
        async move { n.run(stop).await }
    });
    sleep(Duration::from_millis(50)).await;
    api.remove_pod("p", 30);
    until("deleted", || !api.exists("p")).await;
    let u = g.usage();
    assert_eq!((u.len(), u[0].closed_by.as_deref(), g.count()), (1, Some("stop"), 0));
    assert_eq!(runtime.sandboxes(), 0);
    stop.trigger();
    task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn quota_and_hosts_are_refused_with_reasons() {
    let dir = tempfile::tempdir().unwrap();
    let (api, runtime): (Arc<FakeApi>, Arc<FakeRuntime>) = Default::default();
    let g = groups(
        &runtime,
        dir.path(),
        Quota {
            cpu_milli: 1000,
            ..Default::default()
        },
    )
    .await;
    let (n, stop) = (node(&api, &g, dir.path()), Shutdown::new());
    let task = tokio::spawn({
        let stop = stop.clone();
        async move { n.run(stop).await }
    });
    let spec =
        |cpu: &str| json!({"containers": [{"name": "c", "image": "nginx", "resources": {"requests": {"cpu": cpu}}}]});
    let reason = |s: &k8s_openapi::api::core::v1::PodStatus| {
        let c = s
            .container_statuses
            .as_ref()
            .and_then(|c| c[0].state.as_ref()?.waiting.as_ref()?.reason.clone());
        c.unwrap_or_default()
    };
    api.create_pod("a", spec("700m"), json!({}));
    api.until("a", "running", |s| phase(s) == "Running").await;
    let mut host = spec("1m");
    host["hostNetwork"] = json!(true);
    api.create_pod("h", host, json!({}));
    api.until("h", "refused", |s| reason(s) == "Unsupported").await;
    // Waits for room, and takes it when there is some.
    api.create_pod("late", spec("300m"), json!({}));
    api.until("late", "running", |s| phase(s) == "Running").await;
    api.remove_pod("a", 1);
    until("deleted", || !api.exists("a")).await;
    assert_eq!(g.count(), 1);
    stop.trigger();
    task.await.unwrap();
}

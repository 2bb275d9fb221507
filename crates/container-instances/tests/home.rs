//! Groups as records in a real home, over a fake engine.

use std::{sync::Arc, time::Duration};

use apiserver::{ApiServer, ApiServerConfig, ClusterConfig, NoDialer, UserInfo};
use container_instances::{Groups, GroupsConfig, NicError, NicNetwork, NicProvider, NicRequest, Quota};
use k8s_openapi::api::core::v1::Pod;
use kubelet::{Hooks, fake::FakeRuntime};
use reconcile::{Client, ListParams};
use resources::ContainerGroup;
use sandbox::{ContainerConfig, Error, Network, PodIdentity, Runtime, SandboxConfig};
use serde_json::json;
use stdx::Shutdown;
use store::ModelEngine;
use tokio::time::{Instant, sleep};

async fn home(dir: &std::path::Path) -> Client {
    let server = ApiServer::new(ApiServerConfig {
        engine: ModelEngine::new(),
        dialer: Arc::new(NoDialer),
        data_dir: dir.join("api"),
        clock: stdx::RealClock::shared(),
    });
    let mut config = ClusterConfig::new("oaks-home", "https://127.0.0.1:6443");
    config.extra_kinds = resources::kind_defs();
    let cluster = server.create_cluster(config).await.unwrap();
    Client::local(cluster.local_service(UserInfo::admin("host")))
}

async fn records(home: &Client) -> Vec<ContainerGroup> {
    home.list::<ContainerGroup>(None, &ListParams::default())
        .await
        .unwrap()
        .items
}

async fn until(what: &str, check: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !check().await {
        assert!(Instant::now() < deadline, "not {what}");
        sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn home_shows_what_runs_and_what_it_used() {
    let dir = tempfile::tempdir().unwrap();
    let home = home(dir.path()).await;
    let runtime = Arc::new(FakeRuntime::default());
    // Left by an agent that is gone.
    let mut stale = ContainerGroup::new("stale-000000000000", Default::default());
    stale.metadata.labels = Some([("oaks.internal/virtual-node".to_owned(), "vn".to_owned())].into());
    home.create(None, &stale).await.unwrap();
    let groups = Groups::open(GroupsConfig {
        runtime: runtime.clone(),
        images: runtime.clone(),
        node_name: "vn".into(),
        cluster: "demo".into(),
        virtual_network: "vnet".into(),
        subnet: "aci".into(),
        group_scope: "/subscriptions/s/resourceGroups/MC_demo".into(),
        quota: Quota::default(),
        meter_dir: dir.path().join("meter"),
        home: Some(home.clone()),
        clock: stdx::RealClock::shared(),
    })
    .await
    .unwrap();
    let stop = Shutdown::new();
    tokio::spawn({
        let (groups, stop) = (groups.clone(), stop.clone());
        async move { groups.run(stop).await }
    });

    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "0f5e-77", "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c", "image": "nginx", "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}}}]},
    }))
    .unwrap();
    groups.admit(&pod).await.unwrap();
    let identity = PodIdentity {
        uid: "0f5e-77".into(),
        namespace: "shop".into(),
        name: "web".into(),
        attempt: 0,
    };
    let sandbox = groups
        .run_sandbox(SandboxConfig {
            pod: identity.clone(),
            ..Default::default()
        })
        .await
        .unwrap();
    let config = ContainerConfig {
        name: "c".into(),
        labels: [("io.kubernetes.pod.uid".to_owned(), identity.uid.clone())].into(),
        ..Default::default()
    };
    let container = groups.create_container(&sandbox, config).await.unwrap();
    assert!(groups.usage().is_empty());
    groups.start_container(&container).await.unwrap();
    assert_eq!(groups.usage()[0].opened_by, "run");
    until("running in home", async || {
        let all = records(&home).await;
        all.len() == 1
            && all[0]
                .status
                .as_ref()
                .is_some_and(|s| s.properties["instanceView"]["state"] == "Running")
    })
    .await;
    let record = &records(&home).await[0];
    assert_eq!(
        record.spec.id,
        "/subscriptions/s/resourceGroups/MC_demo/providers/Microsoft.ContainerInstance/containerGroups/shop-web-0f5e77"
    );
    assert_eq!(
        record.spec.body["properties"]["resources"],
        json!({"cpuMilli": 500, "memoryBytes": 1 << 30})
    );
    assert_eq!(
        record.status.as_ref().unwrap().properties["ipAddress"]["ip"],
        "127.0.0.1"
    );

    groups.stop_sandbox(&sandbox).await.unwrap();
    groups.stopped(&identity).await;
    until("stopped in home", async || {
        let all = records(&home).await;
        let s = all[0].status.as_ref().unwrap();
        s.properties["instanceView"]["state"] == "Stopped" && s.properties["usage"][0]["closedBy"] == "stop"
    })
    .await;
    groups.remove_sandbox(&sandbox).await.unwrap();
    until("gone from home", async || records(&home).await.is_empty()).await;
    assert_eq!((groups.usage().len(), groups.count()), (1, 0));
    stop.trigger();
}

/// Answers every request with the same refusal, and keeps it.
#[derive(Default)]
struct Full(parking_lot::Mutex<Vec<NicRequest>>);

#[async_trait::async_trait]
impl NicProvider for Full {
    async fn attach(&self, request: &NicRequest) -> Result<Vec<std::net::IpAddr>, NicError> {
        self.0.lock().push(request.clone());
        Err(NicError::Subnet {
            subnet: request.subnet.clone(),
            reason: "no address left in 10.241.0.0/28".into(),
        })
    }

    async fn detach(&self, _: &str, _: &PodIdentity, _: Option<&std::path::Path>) -> Result<(), NicError> {
        Ok(())
    }

    async fn gc(&self, _: &[String]) -> Result<(), NicError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_full_subnet_is_a_lack_of_capacity() {
    let provider = Arc::new(Full::default());
    let network = NicNetwork::new(provider.clone());
    let mut config = SandboxConfig::default();
    let refused = network
        .attach("s1", &config, std::path::Path::new("/x"))
        .await
        .unwrap_err();
    assert!(matches!(refused, Error::Invalid { .. }), "{refused}");
    config.annotations = [
        ("oaks.internal/virtual-network", "v"),
        ("oaks.internal/subnet", "aci"),
        ("oaks.internal/cluster", "demo"),
    ]
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .into();
    let refused = network
        .attach("s1", &config, std::path::Path::new("/x"))
        .await
        .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "no capacity: subnet aci: no address left in 10.241.0.0/28"
    );
    let asked = provider.0.lock();
    assert_eq!(
        (asked[0].virtual_network.as_str(), asked[0].cluster.as_str()),
        ("v", "demo")
    );
}

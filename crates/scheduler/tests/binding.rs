//! The binding loop against the API server in process: refusals in plain words, one try per change, and speed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use apiserver::{ApiServer, ApiServerConfig, ClusterConfig, NoDialer, UserInfo};
use k8s_openapi::api::core::v1::{Event, Node, Pod, ServiceAccount};
use reconcile::{Client, DeleteParams, Informers, ListParams};
use serde_json::{Value, json};
use stdx::{RealClock, Shutdown, TaskGroup};
use store::ModelEngine;

struct World {
    client: Client,
    tasks: TaskGroup,
    informers: Informers,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = ApiServer::new(ApiServerConfig {
            engine: ModelEngine::new(),
            dialer: Arc::new(NoDialer),
            data_dir: dir.path().to_owned(),
            clock: RealClock::shared(),
        });
        let cluster = server
            .create_cluster(ClusterConfig::new("c", "https://127.0.0.1:6443"))
            .await
            .unwrap();
        let client = Client::local(cluster.local_service(UserInfo::admin("test")));
        let account = object::<ServiceAccount>(json!({"metadata": {"name": "default"}}));
        client.create(Some("default"), &account).await.unwrap();
        let informers = Informers::new(client.clone());
        let tasks = TaskGroup::new(&Shutdown::new());
        tasks.spawn(
            "scheduler",
            scheduler::run(client.clone(), informers.clone(), tasks.shutdown().clone()),
        );
        Self {
            client,
            tasks,
            informers,
            _dir: dir,
        }
    }

    async fn node(&self, name: &str, cpu: &str) {
        let status = json!({"allocatable": {"cpu": cpu, "memory": "64Gi", "pods": "1000"},
            "conditions": [{"type": "Ready", "status": "True"}]});
        let node = json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}, "status": status});
        self.client.create(None, &object::<Node>(node.clone())).await.unwrap();
        self.client.update_status(None, &object::<Node>(node)).await.unwrap();
    }

    async fn pod(&self, name: &str, cpu: &str) {
        let pod = json!({"metadata": {"name": name, "labels": {"app": "web"}}, "spec": {"containers": [
            {"name": "c", "image": "x", "resources": {"requests": {"cpu": cpu}}}]}});
        self.client.create(Some("default"), &object::<Pod>(pod)).await.unwrap();
    }

    async fn pods(&self) -> Vec<Pod> {
        self.client
            .list::<Pod>(None, &ListParams::default())
            .await
            .unwrap()
            .items
    }

    /// Pods per node; pods without one under the empty name.
    async fn places(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for pod in self.pods().await {
            *counts
                .entry(pod.spec.and_then(|s| s.node_name).unwrap_or_default())
                .or_default() += 1;
        }
        counts
    }

    async fn reason(&self, name: &str) -> String {
        let pod: Pod = self.client.get(Some("default"), name).await.unwrap();
        let condition = pod
            .status
            .and_then(|s| s.conditions)
            .into_iter()
            .flatten()
            .find(|c| c.type_ == "PodScheduled");
        condition
            .filter(|c| c.status == "False")
            .and_then(|c| c.message)
            .unwrap_or_default()
    }

    async fn until(&self, what: &str, mut done: impl AsyncFnMut() -> bool) {
        let start = Instant::now();
        while !done().await {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "never: {what}; {:?}",
                self.places().await
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn stop(self) {
        assert_eq!(self.tasks.stop(Duration::from_secs(10)).await, Vec::<String>::new());
        self.informers.stop().await;
    }
}

fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

#[tokio::test]
async fn a_pod_says_why_it_waits_and_goes_as_soon_as_something_makes_room() {
    let w = World::new().await;
    w.pod("big", "3").await;
    w.until("no nodes", async || {
        w.reason("big").await == "no nodes available to schedule pods"
    })
    .await;
    w.node("small", "2").await;
    w.until("too small", async || {
        w.reason("big").await == "0/1 nodes are available: 1 Insufficient cpu."
    })
    .await;
    w.node("full", "4").await;
    w.until("bound", async || {
        w.places().await == BTreeMap::from([("full".into(), 1)])
    })
    .await;
    assert_eq!(w.reason("big").await, "", "the condition is True once it is bound");
    // The next one waits for the first to go.
    w.pod("next", "3").await;
    w.until("both too small", async || {
        w.reason("next").await == "0/2 nodes are available: 2 Insufficient cpu."
    })
    .await;
    let now = DeleteParams {
        grace_period_s: Some(0),
        ..DeleteParams::default()
    };
    w.client.delete::<Pod>(Some("default"), "big", &now).await.unwrap();
    w.until("its turn", async || {
        w.places().await == BTreeMap::from([("full".into(), 1)])
    })
    .await;
    // Cordoned nodes take nothing, until they are freed.
    let cordon = |on: bool| reconcile::Patch::Merge(json!({"spec": {"unschedulable": on}}));
    for node in ["small", "full"] {
        let _: Node = w.client.patch(None, node, &cordon(true), None).await.unwrap();
    }
    w.pod("late", "1").await;
    w.until("cordoned", async || {
        w.reason("late").await == "0/2 nodes are available: 2 node(s) were unschedulable."
    })
    .await;
    let _: Node = w.client.patch(None, "small", &cordon(false), None).await.unwrap();
    w.until("freed", async || w.places().await.get("small") == Some(&1))
        .await;
    w.until("events", async || {
        let events = w
            .client
            .list::<Event>(None, &ListParams::default())
            .await
            .unwrap()
            .items;
        let has = |reason: &str, text: &str| {
            events
                .iter()
                .any(|e| e.reason.as_deref() == Some(reason) && e.message.as_deref() == Some(text))
        };
        has("Scheduled", "Successfully assigned default/big to full")
            && has("FailedScheduling", "0/1 nodes are available: 1 Insufficient cpu.")
    })
    .await;
    w.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_waiting_pods_are_bound_in_seconds_and_never_too_many_to_a_node() {
    let w = World::new().await;
    for i in 0..1000 {
        w.pod(&format!("p{i}"), "100m").await;
    }
    w.until("all are refused", async || {
        let waiting = w.pods().await;
        let says = |p: &Pod| {
            p.status
                .as_ref()
                .and_then(|s| s.conditions.as_ref())
                .is_some_and(|c| c.iter().any(|c| c.type_ == "PodScheduled"))
        };
        waiting.iter().all(says)
    })
    .await;
    let start = Instant::now();
    for i in 0..5 {
        // Room for 150 on each of five: 250 stay.
        w.node(&format!("n{i}"), "15").await;
    }
    w.until("750 bound", async || w.places().await.get("") == Some(&250))
        .await;
    let took = start.elapsed();
    println!(
        "750 pods bound in {took:?}: {:.0} per second",
        750.0 / took.as_secs_f64()
    );
    let places = w.places().await;
    assert!((0..5).all(|i| places.get(&format!("n{i}")) == Some(&150)), "{places:?}");
    w.until("the rest says why", async || {
        let waiting = w
            .pods()
            .await
            .into_iter()
            .filter(|p| p.spec.as_ref().is_some_and(|s| s.node_name.is_none()));
        let text = |p: Pod| {
            p.status
                .and_then(|s| s.conditions)
                .into_iter()
                .flatten()
                .find_map(|c| c.message)
        };
        waiting
            .map(text)
            .all(|t| t.as_deref() == Some("0/5 nodes are available: 5 Insufficient cpu."))
    })
    .await;
    w.stop().await;
}

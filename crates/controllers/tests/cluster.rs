//! A whole control plane in one process: API server over the model store, controllers, scheduler, and nodes that are
//! only statuses. No sockets, no TLS, no kernel.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use apiserver::{ApiServer, ApiServerConfig, Cluster, ClusterConfig, NoDialer, UserInfo};
use controllers::ControllerConfig;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Event, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use reconcile::{Client, DeleteParams, Informers, Kind, ListParams, Patch};
use serde_json::{Value, json};
use stdx::{RealClock, Shutdown, TaskGroup};
use store::ModelEngine;

const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    cluster: Arc<Cluster>,
    client: Client,
    /// Controllers and scheduler.
    plane: Option<Plane>,
    /// The nodes' side.
    nodes: TaskGroup,
    config: ControllerConfig,
    _dir: tempfile::TempDir,
}

struct Plane {
    informers: Informers,
    tasks: TaskGroup,
}

impl World {
    async fn new() -> Self {
        Self::with(Duration::from_secs(600)).await
    }

    async fn with(node_grace: Duration) -> Self {
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
        let config = ControllerConfig {
            cluster_ca_pem: cluster.ca_pem().to_owned(),
            node_grace,
            node_gone_grace: Duration::from_millis(200),
            ..ControllerConfig::default()
        };
        let mut world = Self {
            client: Client::local(cluster.local_service(UserInfo::admin("test"))),
            cluster,
            plane: None,
            nodes: TaskGroup::new(&Shutdown::new()),
            config,
            _dir: dir,
        };
        world.start();
        world
    }

    fn start(&mut self) {
        let client = Client::local(self.cluster.local_service(UserInfo::admin("control-plane")));
        let informers = Informers::new(client.clone());
        let tasks = TaskGroup::new(&Shutdown::new());
        let stop = tasks.shutdown().clone();
        tasks.spawn(
            "controllers",
            controllers::run_all(client.clone(), informers.clone(), self.config.clone(), stop),
        );
        tasks.spawn(
            "scheduler",
            scheduler::run(client, informers.clone(), tasks.shutdown().clone()),
        );
        self.plane = Some(Plane { informers, tasks });
    }

    /// Ends controllers and scheduler as a process exit would, and checks that they end.
    async fn stop(&mut self) {
        if let Some(plane) = self.plane.take() {
            assert_eq!(plane.tasks.stop(Duration::from_secs(10)).await, Vec::<String>::new());
            plane.informers.stop().await;
        }
    }

    async fn node(&self, name: &str) {
        let node = json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": "z1"}},
            "status": {
                "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "250"},
                "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-02T03:04:05Z"}],
            },
        });
        let made: Node = self.client.create(None, &typed::<Node>(&node)).await.unwrap();
        // The status of a create is kept for nodes, but say it again in the way a kubelet does.
        let status = json!({"metadata": {"uid": made.metadata.uid}, "status": node["status"]});
        let _: Node = self
            .client
            .patch(None, name, &Patch::Merge(status), Some("status"))
            .await
            .unwrap();
        self.kubelet(name);
    }

    /// Runs the pods of a node in the way a kubelet reports it: running and ready with an address, or gone.
    fn kubelet(&self, node: &str) {
        let client = self.client.clone();
        let (node, stop) = (node.to_owned(), self.nodes.shutdown().clone());
        let informers = Informers::new(client.clone());
        let pods = informers.get_selected::<Pod>(&format!("spec.nodeName={node}"));
        self.nodes.spawn(format!("kubelet {node}"), async move {
            let mut keys = pods.subscribe();
            let mut last = 0u32;
            while let Some(Some(key)) = stop.or_stop(keys.recv()).await {
                let Some(pod) = pods.by_key(&key) else { continue };
                let running = pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running");
                if pod.metadata.deletion_timestamp.is_some() {
                    let uid = pod.metadata.uid.clone();
                    let now = DeleteParams {
                        grace_period_s: Some(0),
                        uid,
                        ..DeleteParams::default()
                    };
                    let _ = client.delete::<Pod>(Some(&key.ns), &key.name, &now).await;
                } else if !running {
                    last += 1;
                    let octet = node.bytes().last().unwrap_or_default();
                    let ip = format!("10.{octet}.{}.{}", last / 250, last % 250 + 1);
                    let at = "2026-01-02T03:04:05Z";
                    let status = json!({"metadata": {"uid": pod.metadata.uid}, "status": {
                        "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": at}],
                    }});
                    let _ = client
                        .patch::<Pod>(Some(&key.ns), &key.name, &Patch::Strategic(status), Some("status"))
                        .await;
                }
            }
            informers.stop().await;
        });
    }

    /// Renews the node's lease until the returned token stops it.
    fn renew(&self, node: &str) -> Shutdown {
        let stop = self.nodes.shutdown().child();
        let (client, node, token) = (self.client.clone(), node.to_owned(), stop.clone());
        self.nodes.spawn(format!("lease {node}"), async move {
            loop {
                let now = apimachinery::time::now_micro(&*RealClock::shared());
                let spec = json!({"holderIdentity": node, "leaseDurationSeconds": 40, "renewTime": now});
                let ns = Some("kube-node-lease");
                let patch = Patch::Merge(json!({"spec": spec}));
                if client.patch::<Lease>(ns, &node, &patch, None).await.is_err() {
                    let lease = json!({"metadata": {"name": node, "namespace": "kube-node-lease"}, "spec": spec});
                    let _ = client.create(ns, &typed::<Lease>(&lease)).await;
                }
                if token
                    .or_stop(tokio::time::sleep(Duration::from_millis(100)))
                    .await
                    .is_none()
                {
                    return;
                }
            }
        });
        stop
    }

    async fn apply_deployment(&self, name: &str, replicas: i32, image: &str) {
        let d = json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {
                "replicas": replicas, "selector": {"matchLabels": {"app": name}},
                "template": {"metadata": {"labels": {"app": name}}, "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "containers": [{"name": "c", "image": image, "ports": [{"name": "http", "containerPort": 8080}],
                        "resources": {"requests": {"cpu": "10m", "memory": "8Mi"}}}],
                }},
            },
        });
        self.client
            .create(Some("default"), &typed::<Deployment>(&d))
            .await
            .unwrap();
    }

    async fn merge<K: Kind>(&self, name: &str, patch: Value) {
        let _: K = self
            .client
            .patch(Some("default"), name, &Patch::Merge(patch), None)
            .await
            .unwrap();
    }

    async fn set_image(&self, name: &str, image: &str) {
        let containers = json!([{"name": "c", "image": image}]);
        let patch = Patch::Strategic(json!({"spec": {"template": {"spec": {"containers": containers}}}}));
        let _: Deployment = self.client.patch(Some("default"), name, &patch, None).await.unwrap();
    }

    async fn list<K: Kind>(&self) -> Vec<K> {
        self.client.list::<K>(None, &ListParams::default()).await.unwrap().items
    }

    async fn pods(&self, app: &str) -> Vec<Pod> {
        self.client
            .list::<Pod>(None, &ListParams::labels(format!("app={app}")))
            .await
            .unwrap()
            .items
    }

    async fn deployment(&self, name: &str) -> Deployment {
        self.client.get(Some("default"), name).await.unwrap()
    }

    /// Whether the Deployment has come to rest at its current spec.
    async fn at_rest(&self, name: &str) -> bool {
        let d = self.deployment(name).await;
        let Some(s) = d.status else { return false };
        let wanted = d.spec.and_then(|s| s.replicas);
        s.observed_generation >= d.metadata.generation
            && s.updated_replicas == wanted
            && s.replicas == wanted
            && s.available_replicas == wanted
    }

    async fn messages(&self, reason: &str) -> Vec<String> {
        let events = self.list::<Event>().await;
        events
            .into_iter()
            .filter(|e| e.reason.as_deref() == Some(reason))
            .filter_map(|e| e.message)
            .collect()
    }

    /// Waits until `done`; fails with what the cluster looks like after a minute.
    async fn until<F: Future<Output = bool>>(&self, what: &str, mut done: impl FnMut() -> F) {
        let start = Instant::now();
        while !done().await {
            if start.elapsed() > PATIENCE {
                let mut dump = String::new();
                for d in self.list::<Deployment>().await {
                    dump += &format!("deployment {:?} {:#?}\n", d.metadata.name, d.status);
                }
                for rs in self.list::<ReplicaSet>().await {
                    let wanted = rs.spec.and_then(|s| s.replicas);
                    dump += &format!("replicaset {:?} wants {wanted:?} {:?}\n", rs.metadata.name, rs.status);
                }
                for p in self.list::<Pod>().await {
                    let status = p.status.unwrap_or_default();
                    dump += &format!("pod {:?} {:?} {:?}\n", p.metadata.name, status.phase, status.conditions);
                }
                panic!("never: {what}\n{dump}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn typed<K: Kind>(value: &Value) -> K {
    serde_json::from_value(value.clone()).unwrap()
}

fn nodes_of(pods: &[Pod]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for pod in pods {
        let node = pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default();
        *counts.entry(node).or_default() += 1;
    }
    counts
}

#[tokio::test]
async fn pods_wait_in_plain_words_then_run_spread_over_two_nodes_and_answer_by_service() {
    let w = World::new().await;
    w.apply_deployment("web", 4, "v1").await;
    let service = json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"},
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}});
    w.client
        .create(Some("default"), &typed::<Service>(&service))
        .await
        .unwrap();
    w.until("four pods say why they wait", async || {
        let pods = w.pods("web").await;
        let says = |p: &Pod| {
            let condition = controllers::common::pod_condition(p, "PodScheduled").cloned();
            condition.is_some_and(|c| {
                c.reason.as_deref() == Some("Unschedulable")
                    && c.message.as_deref() == Some("no nodes available to schedule pods")
            })
        };
        pods.len() == 4 && pods.iter().all(says)
    })
    .await;
    w.until("the event", async || {
        w.messages("FailedScheduling")
            .await
            .iter()
            .any(|m| m == "no nodes available to schedule pods")
    })
    .await;
    w.node("n1").await;
    w.node("n2").await;
    w.until("the deployment is at rest", async || w.at_rest("web").await)
        .await;
    let pods = w.pods("web").await;
    assert!(
        nodes_of(&pods).keys().all(|n| ["n1", "n2"].contains(&n.as_str())),
        "{:?}",
        nodes_of(&pods)
    );
    let d = w.deployment("web").await;
    let conditions: Vec<String> = d
        .status
        .unwrap()
        .conditions
        .unwrap()
        .iter()
        .map(|c| format!("{}={} {}", c.type_, c.status, c.reason.as_deref().unwrap_or_default()))
        .collect();
    assert_eq!(
        conditions,
        [
            "Available=True MinimumReplicasAvailable",
            "Progressing=True NewReplicaSetAvailable"
        ]
    );
    w.until("four endpoints", async || {
        let params = ListParams::labels("kubernetes.io/service-name=web");
        let slices = w
            .client
            .list::<EndpointSlice>(Some("default"), &params)
            .await
            .unwrap()
            .items;
        let ready =
            |e: &k8s_openapi::api::discovery::v1::Endpoint| e.conditions.as_ref().and_then(|c| c.ready) == Some(true);
        slices.len() == 1
            && slices[0]
                .endpoints
                .iter()
                .flatten()
                .filter(|e| ready(e) && e.zone.is_some())
                .count()
                == 4
    })
    .await;
    w.until("the Endpoints object", async || {
        let e = w.client.get_opt::<Endpoints>(Some("default"), "web").await.unwrap();
        let addresses = e
            .and_then(|e| e.subsets)
            .and_then(|s| s.first().and_then(|s| s.addresses.clone()));
        addresses.is_some_and(|a| a.len() == 4)
    })
    .await;
    w.until("events of every step", async || {
        let scaled = w.messages("ScalingReplicaSet").await;
        scaled.len() == 1
            && scaled[0].ends_with(" from 0 to 4")
            && w.messages("SuccessfulCreate").await.len() == 4
            && w.messages("Scheduled").await.len() == 4
    })
    .await;
}

#[tokio::test]
async fn pods_made_with_nodes_present_spread_evenly() {
    let w = World::new().await;
    w.node("n1").await;
    w.node("n2").await;
    w.until("nodes are known", async || w.list::<Node>().await.len() == 2)
        .await;
    w.apply_deployment("web", 6, "v1").await;
    w.until("at rest", async || w.at_rest("web").await).await;
    assert_eq!(
        nodes_of(&w.pods("web").await),
        BTreeMap::from([("n1".into(), 3), ("n2".into(), 3)])
    );
    // Scale down and up again.
    w.merge::<Deployment>("web", json!({"spec": {"replicas": 2}})).await;
    w.until("two", async || w.at_rest("web").await && w.pods("web").await.len() == 2)
        .await;
    assert_eq!(
        nodes_of(&w.pods("web").await),
        BTreeMap::from([("n1".into(), 1), ("n2".into(), 1)])
    );
    // A pod that is killed comes back.
    let victim = w.pods("web").await[0].metadata.name.clone().unwrap();
    w.client
        .delete::<Pod>(Some("default"), &victim, &DeleteParams::default())
        .await
        .unwrap();
    w.until("replaced", async || {
        let pods = w.pods("web").await;
        w.at_rest("web").await && pods.len() == 2 && pods.iter().all(|p| p.metadata.name.as_ref() != Some(&victim))
    })
    .await;
}

#[tokio::test]
async fn a_rollout_goes_to_the_new_template_and_back_under_new_revisions() {
    let w = World::new().await;
    w.node("n1").await;
    w.apply_deployment("web", 4, "v1").await;
    w.until("v1 at rest", async || w.at_rest("web").await).await;
    w.set_image("web", "v2").await;
    w.until("v2 at rest", async || w.at_rest("web").await).await;
    let images = async || -> Vec<String> {
        let pods = w.pods("web").await;
        pods.iter()
            .filter_map(|p| p.spec.as_ref()?.containers[0].image.clone())
            .collect()
    };
    w.until("only v2 pods", async || images().await == ["v2"; 4]).await;
    w.set_image("web", "v1").await;
    w.until("v1 again", async || {
        w.at_rest("web").await && images().await == ["v1"; 4]
    })
    .await;
    let mut revisions: Vec<(String, String, i32)> = w
        .list::<ReplicaSet>()
        .await
        .into_iter()
        .map(|rs| {
            let image = rs
                .spec
                .as_ref()
                .unwrap()
                .template
                .as_ref()
                .unwrap()
                .spec
                .as_ref()
                .unwrap()
                .containers[0]
                .image
                .clone();
            let revision = rs.metadata.annotations.unwrap()["deployment.kubernetes.io/revision"].clone();
            (image.unwrap(), revision, rs.spec.unwrap().replicas.unwrap())
        })
        .collect();
    revisions.sort();
    assert_eq!(revisions, [("v1".into(), "3".into(), 4), ("v2".into(), "2".into(), 0)]);
    let d = w.deployment("web").await;
    assert_eq!(
        d.metadata.annotations.unwrap()["deployment.kubernetes.io/revision"],
        "3"
    );
}

#[tokio::test]
async fn recreate_never_runs_two_templates_at_once() {
    let w = World::new().await;
    w.node("n1").await;
    w.apply_deployment("web", 3, "v1").await;
    w.merge::<Deployment>(
        "web",
        json!({"spec": {"strategy": {"type": "Recreate", "rollingUpdate": null}}}),
    )
    .await;
    w.until("v1 at rest", async || w.at_rest("web").await).await;
    w.merge::<Deployment>(
        "web",
        json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "v2"}]}}}}),
    )
    .await;
    w.until("v2 at rest", async || {
        let images: std::collections::BTreeSet<_> = w
            .pods("web")
            .await
            .iter()
            .filter_map(|p| p.spec.as_ref()?.containers[0].image.clone())
            .collect();
        assert!(images.len() <= 1, "{images:?} at once");
        w.at_rest("web").await && images.contains("v2")
    })
    .await;
}

#[tokio::test]
async fn deletion_cascades_in_each_of_its_three_ways() {
    let w = World::new().await;
    w.node("n1").await;
    for name in ["back", "fore", "orph"] {
        w.apply_deployment(name, 2, "v1").await;
    }
    for name in ["back", "fore", "orph"] {
        w.until("at rest", async || w.at_rest(name).await).await;
    }
    for (name, propagation) in [("back", "Background"), ("fore", "Foreground"), ("orph", "Orphan")] {
        let params = DeleteParams {
            propagation: Some(propagation),
            ..DeleteParams::default()
        };
        w.client
            .delete::<Deployment>(Some("default"), name, &params)
            .await
            .unwrap();
    }
    w.until("deployments are gone", async || w.list::<Deployment>().await.is_empty())
        .await;
    // Foreground: gone means its dependents went first.
    assert!(w.pods("fore").await.is_empty());
    w.until("dependents are gone", async || {
        w.pods("back").await.is_empty() && w.list::<ReplicaSet>().await.len() == 1
    })
    .await;
    let orphan = w.list::<ReplicaSet>().await.remove(0);
    assert!(orphan.metadata.owner_references.unwrap_or_default().is_empty());
    assert_eq!(w.pods("orph").await.len(), 2);
    // A Deployment of the same selector and template adopts it.
    w.apply_deployment("orph", 2, "v1").await;
    w.until("adopted", async || {
        let sets = w.list::<ReplicaSet>().await;
        w.at_rest("orph").await
            && sets.len() == 1
            && sets[0].metadata.uid == orphan.metadata.uid
            && sets[0].metadata.owner_references.as_ref().is_some_and(|o| o.len() == 1)
    })
    .await;
}

#[tokio::test]
async fn a_restart_in_the_middle_ends_in_the_same_state() {
    let mut w = World::new().await;
    w.node("n1").await;
    w.apply_deployment("web", 10, "v1").await;
    w.until("some pods", async || w.pods("web").await.len() >= 3).await;
    w.stop().await;
    w.start();
    w.until("v1 at rest", async || w.at_rest("web").await).await;
    w.merge::<Deployment>(
        "web",
        json!({"spec": {"replicas": 5, "template": {"spec": {"containers": [{"name": "c", "image": "v2"}]}}}}),
    )
    .await;
    w.until("v2 has begun", async || w.list::<ReplicaSet>().await.len() == 2)
        .await;
    w.stop().await;
    w.start();
    w.until("v2 at rest", async || {
        w.at_rest("web").await && w.pods("web").await.len() == 5
    })
    .await;
    assert_eq!(w.list::<ReplicaSet>().await.len(), 2);
}

#[tokio::test]
async fn namespaces_get_their_defaults_and_go_with_all_their_content() {
    let w = World::new().await;
    w.node("n1").await;
    w.client
        .create(None, &typed::<Namespace>(&json!({"metadata": {"name": "shop"}})))
        .await
        .unwrap();
    w.until("defaults", async || {
        let account = w
            .client
            .get_opt::<ServiceAccount>(Some("shop"), "default")
            .await
            .unwrap();
        let map = w
            .client
            .get_opt::<ConfigMap>(Some("shop"), "kube-root-ca.crt")
            .await
            .unwrap();
        account.is_some()
            && map
                .and_then(|m| m.data)
                .is_some_and(|d| d["ca.crt"].contains("BEGIN CERTIFICATE"))
    })
    .await;
    // What is deleted by mistake comes back.
    w.client
        .delete::<ConfigMap>(Some("shop"), "kube-root-ca.crt", &DeleteParams::default())
        .await
        .unwrap();
    w.until("the map is back", async || {
        w.client
            .get_opt::<ConfigMap>(Some("shop"), "kube-root-ca.crt")
            .await
            .unwrap()
            .is_some()
    })
    .await;
    let held = json!({"metadata": {"name": "held", "finalizers": ["example.com/hold"]}});
    w.client.create(Some("shop"), &typed::<ConfigMap>(&held)).await.unwrap();
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "x"}]}});
    w.client.create(Some("shop"), &typed::<Pod>(&pod)).await.unwrap();
    w.client
        .delete::<Namespace>(None, "shop", &DeleteParams::default())
        .await
        .unwrap();
    w.until("it says what holds it", async || {
        let ns: Option<Namespace> = w.client.get_opt(None, "shop").await.unwrap();
        let conditions = ns.and_then(|n| n.status).and_then(|s| s.conditions).unwrap_or_default();
        conditions.iter().any(|c| {
            c.type_ == "NamespaceFinalizersRemaining"
                && c.message
                    .as_deref()
                    .is_some_and(|m| m.contains("example.com/hold in 1 resource instances"))
        })
    })
    .await;
    let free = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    let _: ConfigMap = w.client.patch(Some("shop"), "held", &free, None).await.unwrap();
    w.until("it is gone", async || {
        w.client.get_opt::<Namespace>(None, "shop").await.unwrap().is_none()
    })
    .await;
    assert!(
        w.client
            .list::<Pod>(Some("shop"), &ListParams::default())
            .await
            .unwrap()
            .items
            .is_empty()
    );
}

#[tokio::test]
async fn a_silent_node_loses_its_pods_to_another() {
    let w = World::with(Duration::from_secs(2)).await;
    let quiet = w.renew("n1");
    w.renew("n2");
    w.node("n1").await;
    w.node("n2").await;
    w.apply_deployment("web", 4, "v1").await;
    // Leave soon after the node falls silent.
    let tolerations = json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
        "tolerationSeconds": 1}]);
    w.merge::<Deployment>(
        "web",
        json!({"spec": {"template": {"spec": {"tolerations": tolerations}}}}),
    )
    .await;
    w.until("at rest", async || w.at_rest("web").await).await;
    quiet.trigger();
    w.until("unreachable", async || {
        let node: Node = w.client.get(None, "n1").await.unwrap();
        let ready = node
            .status
            .and_then(|s| s.conditions)
            .into_iter()
            .flatten()
            .find(|c| c.type_ == "Ready");
        let taints = node.spec.and_then(|s| s.taints).unwrap_or_default();
        ready.is_some_and(|c| c.status == "Unknown")
            && taints
                .iter()
                .filter(|t| t.key == "node.kubernetes.io/unreachable")
                .count()
                == 2
    })
    .await;
    w.until("all on the other node", async || {
        w.at_rest("web").await && nodes_of(&w.pods("web").await) == BTreeMap::from([("n2".into(), 4)])
    })
    .await;
    assert!(!w.messages("TaintManagerEviction").await.is_empty());
    // The node comes back: it is posted Ready again and loses its taints.
    w.renew("n1");
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-02T04:04:05Z"}]}});
    let _: Node = w
        .client
        .patch(None, "n1", &Patch::Strategic(ready), Some("status"))
        .await
        .unwrap();
    w.until("no taints", async || {
        let node: Node = w.client.get(None, "n1").await.unwrap();
        node.spec.and_then(|s| s.taints).unwrap_or_default().is_empty()
    })
    .await;
}

#[tokio::test]
async fn pods_of_a_deleted_node_are_collected_and_made_anew() {
    let w = World::new().await;
    w.node("n1").await;
    w.apply_deployment("web", 2, "v1").await;
    w.until("at rest", async || w.at_rest("web").await).await;
    let before: Vec<_> = w.pods("web").await.into_iter().map(|p| p.metadata.uid).collect();
    w.client
        .delete::<Node>(None, "n1", &DeleteParams::default())
        .await
        .unwrap();
    w.node("n2").await;
    w.until("anew on the other", async || {
        let pods = w.pods("web").await;
        w.at_rest("web").await && pods.iter().all(|p| !before.contains(&p.metadata.uid))
    })
    .await;
    assert_eq!(nodes_of(&w.pods("web").await), BTreeMap::from([("n2".into(), 2)]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_pods_are_bound_quickly() {
    let w = World::new().await;
    for i in 0..4 {
        w.node(&format!("n{i}")).await;
    }
    let start = Instant::now();
    w.apply_deployment("web", 400, "v1").await;
    w.until("all bound", async || {
        let bound = w.messages("Scheduled").await.len();
        bound >= 400 || {
            let pods = w.pods("web").await;
            pods.len() == 400 && !nodes_of(&pods).contains_key("")
        }
    })
    .await;
    let took = start.elapsed();
    println!("400 pods made and bound in {took:?}");
    assert!(took < Duration::from_secs(30), "took {took:?}");
    let counts = nodes_of(&w.pods("web").await);
    assert!(counts.values().all(|n| (90..=110).contains(n)), "{counts:?}");
}

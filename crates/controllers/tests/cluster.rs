//! A whole control plane in one process: API server over the model store, controllers, scheduler, and nodes that are
//! only statuses. No sockets, no TLS, no kernel.

mod world;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use reconcile::{DeleteParams, ListParams, Patch};
use serde_json::json;
use world::{World, nodes_of, typed};

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
    let counts = nodes_of(&w.pods("web").await);
    assert!(counts.values().all(|n| (90..=110).contains(n)), "{counts:?}");
}

async fn eventually(w: &World, path: &str, what: &str, done: impl Fn(&serde_json::Value) -> bool) {
    w.until(what, async || {
        let got = w
            .client
            .request::<serde_json::Value, ()>(http::Method::GET, path, None)
            .await;
        got.is_ok_and(|value| done(&value))
    })
    .await;
}

async fn post(w: &World, path: &str, value: serde_json::Value) -> Result<serde_json::Value, reconcile::Error> {
    w.client.request(http::Method::POST, path, Some(&value)).await
}

#[tokio::test]
async fn a_quota_gives_back_what_is_deleted_and_what_has_ended() {
    let w = World::new().await;
    let ns = "/api/v1/namespaces/default";
    let quota =
        json!({"metadata": {"name": "q"}, "spec": {"hard": {"configmaps": "3", "count/secrets": "1", "pods": "1"}}});
    post(&w, &format!("{ns}/resourcequotas"), quota).await.unwrap();
    let path = format!("{ns}/resourcequotas/q");
    // kube-root-ca.crt is there by itself.
    eventually(&w, &path, "what exists is counted", |q| {
        q["status"]["used"] == json!({"configmaps": "1", "count/secrets": "0", "pods": "0"})
    })
    .await;
    for name in ["a", "b"] {
        post(&w, &format!("{ns}/configmaps"), json!({"metadata": {"name": name}}))
            .await
            .unwrap();
    }
    let full = post(&w, &format!("{ns}/configmaps"), json!({"metadata": {"name": "c"}})).await;
    assert!(full.unwrap_err().is_forbidden());
    w.client
        .delete::<ConfigMap>(Some("default"), "a", &DeleteParams::default())
        .await
        .unwrap();
    w.until("a place is free again", async || {
        post(&w, &format!("{ns}/configmaps"), json!({"metadata": {"name": "c"}}))
            .await
            .is_ok()
    })
    .await;
    w.until("the account", async || {
        w.client
            .get_opt::<ServiceAccount>(Some("default"), "default")
            .await
            .unwrap()
            .is_some()
    })
    .await;
    let pod = |name: &str| json!({"metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "x"}]}});
    post(&w, &format!("{ns}/pods"), pod("one")).await.unwrap();
    assert!(
        post(&w, &format!("{ns}/pods"), pod("two"))
            .await
            .unwrap_err()
            .is_forbidden()
    );
    let ended = Patch::Merge(json!({"status": {"phase": "Succeeded"}}));
    let _: Pod = w
        .client
        .patch(Some("default"), "one", &ended, Some("status"))
        .await
        .unwrap();
    w.until("a pod that ended makes room", async || {
        post(&w, &format!("{ns}/pods"), pod("two")).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn hand_made_endpoints_are_mirrored_until_they_go() {
    let w = World::new().await;
    let ns = "/api/v1/namespaces/default";
    let service = json!({"metadata": {"name": "m"}, "spec": {"ports": [{"port": 80}]}});
    post(&w, &format!("{ns}/services"), service).await.unwrap();
    let endpoints = json!({"metadata": {"name": "m"}, "subsets": [
        {"addresses": [{"ip": "10.9.8.7"}], "ports": [{"port": 8080}]}]});
    post(&w, &format!("{ns}/endpoints"), endpoints).await.unwrap();
    let slices =
        "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices?labelSelector=kubernetes.io/service-name%3Dm";
    eventually(&w, slices, "a slice", |list| {
        list["items"].as_array().is_some_and(|i| i.len() == 1)
            && list["items"][0]["endpoints"][0]["addresses"] == json!(["10.9.8.7"])
            && list["items"][0]["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"]
                == "endpointslicemirroring-controller.k8s.io"
    })
    .await;
    w.merge::<Endpoints>(
        "m",
        json!({"subsets": [
        {"addresses": [{"ip": "10.9.8.6"}], "notReadyAddresses": [{"ip": "10.9.8.5"}], "ports": [{"port": 8080}]}]}),
    )
    .await;
    eventually(&w, slices, "the change", |list| {
        let first = &list["items"][0]["endpoints"];
        first[0]["addresses"] == json!(["10.9.8.6"]) && first[1]["conditions"]["ready"] == false
    })
    .await;
    w.client
        .delete::<Endpoints>(Some("default"), "m", &DeleteParams::default())
        .await
        .unwrap();
    eventually(&w, slices, "no slice", |list| list["items"] == json!([])).await;
}

#[tokio::test]
async fn services_take_addresses_that_everybody_sees() {
    let w = World::new().await;
    let (services, net) = ("/api/v1/namespaces/default/services", "/apis/networking.k8s.io/v1");
    eventually(
        &w,
        &format!("{net}/servicecidrs/kubernetes"),
        "the default range",
        |cidr| cidr["spec"]["cidrs"] == json!(["10.0.0.0/16"]) && cidr["status"]["conditions"][0]["status"] == "True",
    )
    .await;
    let made = post(
        &w,
        services,
        json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}}),
    )
    .await
    .unwrap();
    let ip = made["spec"]["clusterIP"].as_str().unwrap().to_owned();
    let address = format!("{net}/ipaddresses/{ip}");
    let seen: serde_json::Value = w
        .client
        .request::<_, ()>(http::Method::GET, &address, None)
        .await
        .unwrap();
    assert_eq!(
        seen["spec"]["parentRef"],
        json!({"resource": "services", "namespace": "default", "name": "s"})
    );
    // Deleting the object does not free the address, and it comes back.
    w.client.delete_path(&address, &DeleteParams::default()).await.unwrap();
    let second = json!({"metadata": {"name": "t"}, "spec": {"clusterIP": ip, "ports": [{"port": 80}]}});
    assert!(post(&w, services, second).await.unwrap_err().is_invalid());
    eventually(&w, &address, "repaired", |_| true).await;
    // An address that somebody keeps is not given out.
    let kept = json!({"metadata": {"name": "10.0.7.7"}, "spec": {"parentRef": {"resource": "gateways", "group": "x.io", "name": "g"}}});
    post(&w, &format!("{net}/ipaddresses"), kept).await.unwrap();
    let third = json!({"metadata": {"name": "t"}, "spec": {"clusterIP": "10.0.7.7", "ports": [{"port": 80}]}});
    assert!(post(&w, services, third).await.unwrap_err().is_invalid());

    // A further range, used, then in the way of its own deletion.
    let outside = || json!({"metadata": {"name": "u"}, "spec": {"clusterIP": "172.20.0.5", "ports": [{"port": 80}]}});
    assert!(post(&w, services, outside()).await.unwrap_err().is_invalid());
    post(
        &w,
        &format!("{net}/servicecidrs"),
        json!({"metadata": {"name": "more"}, "spec": {"cidrs": ["172.20.0.0/28"]}}),
    )
    .await
    .unwrap();
    w.until("the range is ready", async || {
        post(&w, services, outside()).await.is_ok()
    })
    .await;
    let more = format!("{net}/servicecidrs/more");
    w.client.delete_path(&more, &DeleteParams::default()).await.unwrap();
    eventually(&w, &more, "held by its address", |cidr| {
        let ready = &cidr["status"]["conditions"][0];
        (&ready["status"], &ready["reason"]) == (&json!("False"), &json!("Terminating"))
    })
    .await;
    w.client
        .delete::<Service>(Some("default"), "u", &DeleteParams::default())
        .await
        .unwrap();
    w.until("the range is gone", async || {
        let got = w
            .client
            .request::<serde_json::Value, ()>(http::Method::GET, &more, None)
            .await;
        got.is_err_and(|e| e.is_not_found())
    })
    .await;
}

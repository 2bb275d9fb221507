//! Jobs, CronJobs, DaemonSets and disruption budgets in a whole control plane.

mod world;

use std::collections::BTreeSet;

use http::Method;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::Pod;
use reconcile::{DeleteParams, Patch};
use serde_json::{Value, json};
use world::World;

const NS: &str = "/api/v1/namespaces/default";
const BATCH: &str = "/apis/batch/v1/namespaces/default";
const APPS: &str = "/apis/apps/v1/namespaces/default";

async fn post(w: &World, path: &str, value: Value) -> Result<Value, reconcile::Error> {
    w.client.request(Method::POST, path, Some(&value)).await
}

async fn with_account() -> World {
    let w = World::new().await;
    let path = format!("{NS}/serviceaccounts/default");
    w.until("the account", async || {
        w.client.request::<Value, ()>(Method::GET, &path, None).await.is_ok()
    })
    .await;
    w
}

fn template(restart: &str) -> Value {
    json!({"metadata": {"labels": {"app": "x"}}, "spec": {"restartPolicy": restart, "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c", "image": "i"}]}})
}

async fn owned(w: &World, kind: &str) -> Vec<Pod> {
    let owner = |p: &Pod| p.metadata.owner_references.iter().flatten().any(|o| o.kind == kind);
    w.list::<Pod>().await.into_iter().filter(owner).collect()
}

/// What a kubelet reports of a pod that ended.
async fn end(w: &World, pod: &Pod, phase: &str) {
    let patch = Patch::Merge(json!({"status": {"phase": phase}}));
    let name = pod.metadata.name.clone().unwrap();
    let _: Pod = w
        .client
        .patch(Some("default"), &name, &patch, Some("status"))
        .await
        .unwrap();
}

async fn job(w: &World, name: &str) -> Job {
    w.client.get(Some("default"), name).await.unwrap()
}

#[tokio::test]
async fn a_job_runs_until_enough_have_succeeded_and_leaves_nothing_held() {
    let w = with_account().await;
    let spec = json!({"completions": 3, "parallelism": 2, "template": template("Never")});
    let made = post(
        &w,
        &format!("{BATCH}/jobs"),
        json!({"metadata": {"name": "j"}, "spec": spec}),
    )
    .await
    .unwrap();
    let uid = made["metadata"]["uid"].clone();
    assert_eq!(
        made["spec"]["selector"]["matchLabels"],
        json!({"batch.kubernetes.io/controller-uid": uid})
    );
    assert_eq!(
        made["spec"]["template"]["metadata"]["labels"]["batch.kubernetes.io/job-name"],
        "j"
    );
    w.until("two at once", async || owned(&w, "Job").await.len() == 2).await;
    let first = owned(&w, "Job").await;
    end(&w, &first[0], "Succeeded").await;
    // Deleting what is counted changes no number, whatever comes first.
    let name = first[0].metadata.name.clone().unwrap();
    w.client
        .delete::<Pod>(Some("default"), &name, &DeleteParams::default())
        .await
        .unwrap();
    w.until("a third", async || {
        let active = owned(&w, "Job").await;
        job(&w, "j").await.status.unwrap_or_default().succeeded == Some(1) && active.len() == 2
    })
    .await;
    for pod in owned(&w, "Job").await {
        end(&w, &pod, "Succeeded").await;
    }
    w.until("complete", async || {
        let status = job(&w, "j").await.status.unwrap_or_default();
        let mut conditions = status.conditions.iter().flatten();
        let complete = conditions.any(|c| c.type_ == "Complete" && c.status == "True");
        complete && status.succeeded == Some(3) && status.completion_time.is_some()
    })
    .await;
    let background = DeleteParams {
        propagation: Some("Background"),
        ..Default::default()
    };
    w.client.delete::<Job>(Some("default"), "j", &background).await.unwrap();
    w.until("its pods are gone", async || owned(&w, "Job").await.is_empty())
        .await;
}

#[tokio::test]
async fn a_job_that_fails_says_why_and_a_wrong_one_is_refused() {
    let w = with_account().await;
    let jobs = format!("{BATCH}/jobs");
    let spec = json!({"backoffLimit": 0, "template": template("Never")});
    post(&w, &jobs, json!({"metadata": {"name": "f"}, "spec": spec}))
        .await
        .unwrap();
    w.until("a pod", async || owned(&w, "Job").await.len() == 1).await;
    end(&w, &owned(&w, "Job").await[0], "Failed").await;
    w.until("failed", async || {
        let status = job(&w, "f").await.status.unwrap_or_default();
        let mut conditions = status.conditions.iter().flatten();
        let why = conditions.find(|c| c.type_ == "Failed").and_then(|c| c.reason.clone());
        why.as_deref() == Some("BackoffLimitExceeded") && status.failed == Some(1)
    })
    .await;
    let check = async |spec: Value, says: &str| {
        let bad = json!({"metadata": {"name": "bad"}, "spec": spec});
        let error = post(&w, &jobs, bad).await.unwrap_err();
        let text = error.status().map(|s| s.message.clone()).unwrap_or_default();
        assert!(text.contains(says), "{text}");
    };
    check(
        json!({"template": template("Always")}),
        "supported values: \"OnFailure\", \"Never\"",
    )
    .await;
    let indexed = json!({"completionMode": "Indexed", "parallelism": 2, "template": template("Never")});
    check(indexed, "when completion mode is Indexed").await;
    let unserved = json!({"backoffLimitPerIndex": 1, "template": template("Never")});
    check(unserved, "spec.backoffLimitPerIndex: Forbidden: is not served yet").await;
    let change = Patch::Merge(json!({"spec": {"template": {"spec": {"restartPolicy": "OnFailure"}}}}));
    let error = w
        .client
        .patch::<Job>(Some("default"), "f", &change, None)
        .await
        .unwrap_err();
    assert!(error.status().unwrap().message.contains("field is immutable"));
}

#[tokio::test]
async fn indexed_pods_know_their_index() {
    let w = with_account().await;
    let spec = json!({"completions": 2, "parallelism": 2, "completionMode": "Indexed", "template": template("Never")});
    post(
        &w,
        &format!("{BATCH}/jobs"),
        json!({"metadata": {"name": "i"}, "spec": spec}),
    )
    .await
    .unwrap();
    w.until("two", async || owned(&w, "Job").await.len() == 2).await;
    let pods = owned(&w, "Job").await;
    let names: BTreeSet<String> = pods.iter().filter_map(|p| p.spec.as_ref()?.hostname.clone()).collect();
    assert_eq!(names, BTreeSet::from(["i-0".to_owned(), "i-1".to_owned()]));
    let env = pods[0].spec.as_ref().unwrap().containers[0].env.clone().unwrap();
    assert_eq!(env[0].name, "JOB_COMPLETION_INDEX");
    for pod in &pods {
        end(&w, pod, "Succeeded").await;
    }
    w.until("both indexes", async || {
        let status = job(&w, "i").await.status.unwrap_or_default();
        status.completed_indexes.as_deref() == Some("0,1") && status.completion_time.is_some()
    })
    .await;
}

#[tokio::test]
async fn a_cron_job_makes_jobs_and_follows_its_policy() {
    let w = with_account().await;
    let crons = format!("{BATCH}/cronjobs");
    let job_template = json!({"spec": {"template": template("Never")}});
    let spec = json!({"schedule": "@every 1s", "concurrencyPolicy": "Forbid", "jobTemplate": job_template});
    post(&w, &crons, json!({"metadata": {"name": "c"}, "spec": spec}))
        .await
        .unwrap();
    w.until("a job", async || {
        let cron: CronJob = w.client.get(Some("default"), "c").await.unwrap();
        let status = cron.status.unwrap_or_default();
        let active = status.active.is_some_and(|a| a.len() == 1);
        w.list::<Job>().await.len() == 1 && active && status.last_schedule_time.is_some()
    })
    .await;
    let made = w.list::<Job>().await.remove(0);
    let annotations = made.metadata.annotations.unwrap();
    assert!(annotations.contains_key("batch.kubernetes.io/cronjob-scheduled-timestamp"));
    w.until("the next one waits", async || {
        !w.messages("JobAlreadyActive").await.is_empty()
    })
    .await;
    assert_eq!(w.list::<Job>().await.len(), 1);
    let spec = json!({"schedule": "x", "timeZone": "Nowhere/At", "jobTemplate": job_template});
    let error = post(&w, &crons, json!({"metadata": {"name": "bad"}, "spec": spec}))
        .await
        .unwrap_err();
    let text = error.status().unwrap().message.clone();
    assert!(
        text.contains("expected exactly 5 fields") && text.contains("only UTC is served"),
        "{text}"
    );
}

#[tokio::test]
async fn a_daemon_set_covers_every_node_and_rolls() {
    let w = with_account().await;
    for node in ["n1", "n2"] {
        w.node(node).await;
    }
    let spec = json!({"selector": {"matchLabels": {"app": "x"}}, "template": template("Always")});
    let sets = format!("{APPS}/daemonsets");
    post(&w, &sets, json!({"metadata": {"name": "d"}, "spec": spec}))
        .await
        .unwrap();
    let covered = async || -> BTreeSet<String> {
        let pods = owned(&w, "DaemonSet").await;
        pods.iter().filter_map(|p| p.spec.as_ref()?.node_name.clone()).collect()
    };
    let status = async || {
        let set: DaemonSet = w.client.get(Some("default"), "d").await.unwrap();
        set.status.unwrap_or_default()
    };
    w.until("on both nodes", async || {
        let s = status().await;
        covered().await.len() == 2 && s.number_available == Some(2) && s.desired_number_scheduled == 2
    })
    .await;
    w.node("n3").await;
    w.until("on the new node too", async || {
        covered().await.len() == 3 && status().await.number_ready == 3
    })
    .await;
    // A pod that is deleted comes back on its node.
    let victim = owned(&w, "DaemonSet").await.remove(0);
    let name = victim.metadata.name.clone().unwrap();
    w.client
        .delete::<Pod>(Some("default"), &name, &DeleteParams::default())
        .await
        .unwrap();
    w.until("replaced", async || {
        let pods = owned(&w, "DaemonSet").await;
        let gone = pods.iter().all(|p| p.metadata.name.as_ref() != Some(&name));
        pods.len() == 3 && gone && status().await.number_ready == 3
    })
    .await;
    let image = json!([{"name": "c", "image": "other"}]);
    w.merge::<DaemonSet>("d", json!({"spec": {"template": {"spec": {"containers": image}}}}))
        .await;
    w.until("all of the new template", async || {
        let pods = owned(&w, "DaemonSet").await;
        let new = |p: &Pod| {
            p.spec
                .as_ref()
                .is_some_and(|s| s.containers[0].image.as_deref() == Some("other"))
        };
        pods.len() == 3 && pods.iter().all(new) && status().await.updated_number_scheduled == Some(3)
    })
    .await;
    let revisions = w.list::<ControllerRevision>().await;
    let numbers: BTreeSet<i64> = revisions.iter().map(|r| r.revision).collect();
    assert_eq!(numbers, BTreeSet::from([1, 2]));
}

#[tokio::test]
async fn evictions_respect_budgets() {
    let w = with_account().await;
    w.node("n1").await;
    w.apply_deployment("web", 3, "v1").await;
    w.until("at rest", async || w.at_rest("web").await).await;
    let selector = json!({"matchLabels": {"app": "web"}});
    let budget = json!({"metadata": {"name": "b"}, "spec": {"maxUnavailable": 1, "selector": selector}});
    let path = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    post(&w, path, budget).await.unwrap();
    let status = async || -> Value {
        let path = format!("{path}/b");
        let shown: Value = w.client.request::<_, ()>(Method::GET, &path, None).await.unwrap();
        shown["status"].clone()
    };
    w.until("one may go", async || {
        let s = status().await;
        (&s["disruptionsAllowed"], &s["desiredHealthy"], &s["expectedPods"]) == (&json!(1), &json!(2), &json!(3))
    })
    .await;
    let evict = async |pod: &Pod| {
        let name = pod.metadata.name.clone().unwrap();
        let body = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}});
        post(&w, &format!("{NS}/pods/{name}/eviction"), body).await
    };
    let ready = |value: &str| Patch::Strategic(json!({"status": {"conditions": [{"type": "Ready", "status": value}]}}));
    let mut pods = w.pods("web").await;
    let (first, second) = (pods.remove(0), pods.remove(0));
    let name = second.metadata.name.clone().unwrap();
    let ns = Some("default");
    let _: Pod = w
        .client
        .patch(ns, &name, &ready("False"), Some("status"))
        .await
        .unwrap();
    w.until("none may go", async || status().await["disruptionsAllowed"] == 0)
        .await;
    let error = evict(&first).await.unwrap_err();
    assert_eq!(error.code(), Some(429));
    assert_eq!(
        error.status().unwrap().message,
        "Cannot evict pod as it would violate the pod's disruption budget."
    );
    let _: Pod = w.client.patch(ns, &name, &ready("True"), Some("status")).await.unwrap();
    w.until("one may go again", async || status().await["disruptionsAllowed"] == 1)
        .await;
    evict(&first).await.unwrap();
    w.until("replaced", async || {
        w.at_rest("web").await && w.pods("web").await.len() == 3
    })
    .await;
    let both = json!({"metadata": {"name": "bad"}, "spec": {"minAvailable": 1, "maxUnavailable": 1, "selector": {}}});
    assert!(post(&w, path, both).await.unwrap_err().is_invalid());
}

use std::sync::Arc;

use expect_test::{Expect, expect};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use serde_json::{Value, json};

use super::plan::{Action, Plan, plan, template_hash};

const NOW: &str = "2026-01-02T03:04:30Z";

fn template(image: &str) -> Value {
    json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": image}]}})
}

fn deployment(image: &str, replicas: i32, spec: Value) -> Deployment {
    let mut d = json!({
        "metadata": {"name": "web", "namespace": "d", "uid": "dep", "generation": 3,
            "annotations": {"deployment.kubernetes.io/revision": "1", "note": "kept"}},
        "spec": {"replicas": replicas, "progressDeadlineSeconds": 600, "revisionHistoryLimit": 1,
            "selector": {"matchLabels": {"app": "web"}}, "template": template(image)},
    });
    for (key, value) in spec.as_object().cloned().unwrap_or_default() {
        d["spec"][key] = value;
    }
    serde_json::from_value(d).unwrap()
}

/// A ReplicaSet of `image` at `revision`, with wanted, current and available replicas.
fn set(image: &str, revision: u32, wanted: i32, current: i32, available: i32, of: i32) -> Arc<ReplicaSet> {
    let mut template = template(image);
    template["metadata"]["labels"]["pod-template-hash"] = image.into();
    Arc::new(
        serde_json::from_value(json!({
            "metadata": {"name": format!("web-{image}"), "namespace": "d", "uid": image, "generation": 1,
                "creationTimestamp": format!("2026-01-02T03:00:{revision:02}Z"),
                "annotations": {"deployment.kubernetes.io/revision": revision.to_string(), "note": "kept",
                    "deployment.kubernetes.io/desired-replicas": of.to_string(),
                    "deployment.kubernetes.io/max-replicas": (of + 1).to_string()}},
            "spec": {"replicas": wanted, "selector": {"matchLabels": {"app": "web"}}, "template": template},
            "status": {"replicas": current, "readyReplicas": available, "availableReplicas": available,
                "observedGeneration": 1},
        }))
        .unwrap(),
    )
}

fn show(plan: &Plan) -> String {
    let mut out = String::new();
    for action in &plan.actions {
        out += &match action {
            Action::Create(rs) => {
                let labels = rs.metadata.labels.clone().unwrap_or_default();
                let replicas = rs.spec.as_ref().and_then(|s| s.replicas).unwrap_or_default();
                format!(
                    "create {replicas} labels {:?} {:?}\n",
                    labels.keys(),
                    rs.metadata.annotations
                )
            }
            Action::Scale {
                name,
                from,
                to,
                annotations,
                ..
            } => format!("scale {name} {from}->{to} {annotations:?}\n"),
            Action::Revision(revision) => format!("revision {revision}\n"),
            Action::Delete(name) => format!("delete {name}\n"),
        };
    }
    for c in plan.status.conditions.iter().flatten() {
        out += &format!("{}={} {}\n", c.type_, c.status, c.reason.as_deref().unwrap_or_default());
    }
    out
}

fn check(d: &Deployment, sets: &[Arc<ReplicaSet>], expected: Expect) {
    expected.assert_eq(&show(&plan(d, sets, false, NOW.parse().unwrap())));
}

#[test]
fn the_first_set_gets_all_replicas() {
    check(
        &deployment("v1", 3, json!({})),
        &[],
        expect![[r#"
        create 3 labels ["app", "pod-template-hash"] Some({"deployment.kubernetes.io/desired-replicas": "3", "deployment.kubernetes.io/max-replicas": "4", "deployment.kubernetes.io/revision": "1", "note": "kept"})
        Available=False MinimumReplicasUnavailable
        Progressing=True NewReplicaSetCreated
    "#]],
    );
}

#[test]
fn a_new_template_surges_and_then_the_old_shrinks() {
    let d = deployment("v2", 3, json!({}));
    check(
        &d,
        &[set("v1", 1, 3, 3, 3, 3)],
        expect![[r#"
            create 1 labels ["app", "pod-template-hash"] Some({"deployment.kubernetes.io/desired-replicas": "3", "deployment.kubernetes.io/max-replicas": "4", "deployment.kubernetes.io/revision": "2", "note": "kept"})
            revision 2
            Available=True MinimumReplicasAvailable
            Progressing=True ReplicaSetUpdated
        "#]],
    );
    check(
        &d,
        &[set("v1", 1, 3, 3, 3, 3), set("v2", 2, 1, 1, 0, 3)],
        expect![[r#"
        revision 2
        Available=True MinimumReplicasAvailable
        Progressing=True ReplicaSetUpdated
    "#]],
    );
    check(
        &d,
        &[set("v1", 1, 3, 3, 3, 3), set("v2", 2, 1, 1, 1, 3)],
        expect![[r#"
            revision 2
            scale web-v1 3->2 {}
            Available=True MinimumReplicasAvailable
            Progressing=True ReplicaSetUpdated
        "#]],
    );
}

#[test]
fn a_rollback_reuses_the_old_set_under_a_new_revision() {
    let d = deployment("v1", 3, json!({}));
    check(
        &d,
        &[set("v1", 1, 0, 0, 0, 3), set("v2", 2, 3, 3, 3, 3)],
        expect![[r#"
            scale web-v1 0->0 {"deployment.kubernetes.io/revision": "3", "deployment.kubernetes.io/revision-history": "1"}
            revision 3
            scale web-v1 0->1 {}
            Available=True MinimumReplicasAvailable
            Progressing=True ReplicaSetUpdated
        "#]],
    );
}

#[test]
fn recreate_waits_for_the_last_old_pod() {
    let d = deployment("v2", 3, json!({"strategy": {"type": "Recreate"}}));
    check(
        &d,
        &[set("v1", 1, 3, 3, 3, 3)],
        expect![[r#"
            scale web-v1 3->0 {"deployment.kubernetes.io/max-replicas": "3"}
            Available=True MinimumReplicasAvailable
            Progressing=True ReplicaSetUpdated
        "#]],
    );
    let sets = [set("v1", 1, 0, 0, 0, 3)];
    assert!(plan(&d, &sets, true, NOW.parse().unwrap()).actions.is_empty());
    let next = plan(&d, &sets, false, NOW.parse().unwrap());
    assert!(matches!(&next.actions[0], Action::Create(rs) if rs.spec.as_ref().unwrap().replicas == Some(3)));
}

#[test]
fn scaling_follows_at_once_even_when_paused() {
    check(
        &deployment("v2", 5, json!({"paused": true})),
        &[set("v1", 1, 3, 3, 3, 3)],
        expect![[r#"
        scale web-v1 3->5 {"deployment.kubernetes.io/desired-replicas": "5", "deployment.kubernetes.io/max-replicas": "7"}
        Available=False MinimumReplicasUnavailable
        Progressing=Unknown DeploymentPaused
    "#]],
    );
}

#[test]
fn a_complete_rollout_says_so_and_trims_the_history() {
    let mut d = deployment("v3", 2, json!({}));
    d.metadata
        .annotations
        .as_mut()
        .unwrap()
        .insert("deployment.kubernetes.io/revision".into(), "3".into());
    let sets = [
        set("v1", 1, 0, 0, 0, 2),
        set("v2", 2, 0, 0, 0, 2),
        set("v3", 3, 2, 2, 2, 2),
    ];
    check(
        &d,
        &sets,
        expect![[r#"
        delete web-v1
        Available=True MinimumReplicasAvailable
        Progressing=True NewReplicaSetAvailable
    "#]],
    );
}

#[test]
fn a_rollout_that_does_not_move_times_out() {
    let mut d = deployment("v1", 1, json!({}));
    let sets = [set("v1", 1, 1, 1, 0, 1)];
    let first = plan(&d, &sets, false, "2026-01-02T03:00:00Z".parse().unwrap());
    d.status = Some(first.status);
    let waiting = plan(&d, &sets, false, "2026-01-02T03:05:00Z".parse().unwrap());
    assert_eq!(waiting.requeue.unwrap().as_secs(), 301);
    check_at(
        &d,
        &sets,
        "2026-01-02T03:10:01Z",
        expect![[r#"
        Available=False MinimumReplicasUnavailable
        Progressing=False ProgressDeadlineExceeded
    "#]],
    );
}

fn check_at(d: &Deployment, sets: &[Arc<ReplicaSet>], now: &str, expected: Expect) {
    expected.assert_eq(&show(&plan(d, sets, false, now.parse().unwrap())));
}

#[test]
fn hashes_differ_by_template_and_collision() {
    let of = |image: &str, n| template_hash(&serde_json::from_value(template(image)).unwrap(), n);
    assert_eq!(of("v1", 0), of("v1", 0));
    assert_ne!(of("v1", 0), of("v2", 0));
    assert_ne!(of("v1", 0), of("v1", 1));
}

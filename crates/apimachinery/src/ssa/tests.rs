use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::table::{KindDef, KindMore};

const T0: &str = "2026-01-01T00:00:00Z";
const T1: &str = "2026-01-01T00:00:01Z";

fn writer<'a>(manager: &'a str, now: &'a str) -> Writer<'a> {
    Writer {
        manager,
        subresource: "",
        now,
        ignored: &[],
    }
}

struct World {
    table: Arc<TypeTable>,
    gvk: Gvk,
    object: Option<Value>,
}

fn world(group: &str, kind: &str) -> World {
    World {
        table: TypeTable::builtin(),
        gvk: Gvk::new(group, "v1", kind),
        object: None,
    }
}

impl World {
    fn apply(&mut self, manager: &str, config: Value, force: bool) -> Result<(), String> {
        self.apply_at(manager, config, force, T0)
    }

    fn apply_at(&mut self, manager: &str, config: Value, force: bool, now: &str) -> Result<(), String> {
        let done = apply(
            &self.table,
            &self.gvk,
            self.object.as_ref(),
            &config,
            &writer(manager, now),
            force,
        );
        self.object = Some(done.map_err(|e| e.to_string())?);
        Ok(())
    }

    fn update(&mut self, manager: &str, change: impl FnOnce(&mut Value)) {
        let mut new = self.object.clone().unwrap_or_else(|| json!({}));
        change(&mut new);
        let sent = new["metadata"].get("managedFields").cloned();
        track(
            &self.table,
            &self.gvk,
            self.object.as_ref(),
            &mut new,
            sent,
            &writer(manager, T0),
        );
        self.object = Some(new);
    }

    fn object(&self) -> &Value {
        self.object.as_ref().unwrap()
    }

    /// The fields of one manager, `null` if it has none.
    fn owned(&self, manager: &str) -> Value {
        let entries = self.object()["metadata"]["managedFields"].as_array();
        entries
            .into_iter()
            .flatten()
            .find(|e| e["manager"] == manager)
            .map_or(Value::Null, |e| e["fieldsV1"].clone())
    }
}

fn map(data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m", "namespace": "d"}, "data": data})
}

#[test]
fn an_applier_owns_what_it_names_and_loses_what_it_drops() {
    let mut w = world("", "ConfigMap");
    w.apply("a", map(json!({"x": "1", "y": "2"})), false).unwrap();
    assert_eq!(w.owned("a"), json!({"f:data": {"f:x": {}, "f:y": {}}}));
    w.apply("a", map(json!({"x": "1"})), false).unwrap();
    assert_eq!(w.object()["data"], json!({"x": "1"}));
    // Co-owners keep a value alive.
    w.apply("b", map(json!({"x": "1"})), false).unwrap();
    w.apply("a", map(json!({})), false).unwrap();
    assert_eq!(
        (&w.object()["data"], w.owned("b")),
        (&json!({"x": "1"}), json!({"f:data": {"f:x": {}}}))
    );
    w.apply("b", map(json!({})), false).unwrap();
    assert_eq!(w.object()["data"].as_object().map_or(0, |d| d.len()), 0);
}

#[test]
fn a_field_of_someone_else_is_a_conflict_unless_forced() {
    let mut w = world("", "ConfigMap");
    w.update("editor", |o| *o = map(json!({"x": "1", "y": "1"})));
    assert_eq!(w.owned("editor"), json!({"f:data": {".": {}, "f:x": {}, "f:y": {}}}));
    let refused = w.apply("a", map(json!({"x": "2"})), false).unwrap_err();
    assert_eq!(
        refused,
        "Apply failed with 1 conflict: conflict with \"editor\" using v1: .data.x"
    );
    let refused = w.apply("a", map(json!({"x": "2", "y": "2"})), false).unwrap_err();
    assert_eq!(
        refused,
        "Apply failed with 2 conflicts: conflicts with \"editor\" using v1:\n- .data.x\n- .data.y"
    );
    w.apply("a", map(json!({"x": "1"})), false)
        .expect("the same value is shared");
    w.apply("a", map(json!({"x": "2"})), true).unwrap();
    assert_eq!(w.owned("editor"), json!({"f:data": {".": {}, "f:y": {}}}));
    assert_eq!(w.object()["data"], json!({"x": "2", "y": "1"}));
    // A write takes ownership back without asking.
    w.update("editor", |o| o["data"]["x"] = "3".into());
    assert_eq!(
        (w.owned("a"), w.owned("editor")),
        (Value::Null, json!({"f:data": {".": {}, "f:x": {}, "f:y": {}}}),)
    );
}

#[test]
fn conflicts_answer_as_upstream() {
    let mut w = world("", "ConfigMap");
    w.update("editor", |o| *o = map(json!({"x": "1"})));
    let error = apply(
        &w.table,
        &w.gvk,
        w.object.as_ref(),
        &map(json!({"x": "2"})),
        &writer("a", T0),
        false,
    );
    assert_eq!(
        error.unwrap_err().to_status().to_value(),
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 409,
            "reason": "Conflict",
            "message": "Apply failed with 1 conflict: conflict with \"editor\" using v1: .data.x",
            "details": {"causes": [{"reason": "FieldManagerConflict", "field": ".data.x",
                "message": "conflict with \"editor\" using v1"}]}})
    );
}

fn deployment(containers: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "w", "namespace": "d"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": containers}}}})
}

#[test]
fn lists_by_key_merge_by_item_with_default_keys() {
    let mut w = world("apps", "Deployment");
    let first = json!([{"name": "a", "image": "i:1", "ports": [{"containerPort": 80}]}]);
    w.apply("a", deployment(first), false).unwrap();
    assert_eq!(
        w.owned("a")["f:spec"],
        json!({"f:selector": {}, "f:template": {"f:metadata": {"f:labels": {"f:a": {}}}, "f:spec": {"f:containers": {
            "k:{\"name\":\"a\"}": {".": {}, "f:image": {}, "f:name": {}, "f:ports": {
                "k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}}}}}})
    );
    w.object.as_mut().unwrap()["spec"]["template"]["spec"]["containers"][0]["ports"][0]["protocol"] = "TCP".into();
    let second = json!([{"name": "b", "image": "i:2"}, {"name": "a", "ports": [
        {"containerPort": 80, "protocol": "UDP"}]}]);
    w.apply("b", deployment(second), false).unwrap();
    let containers = &w.object()["spec"]["template"]["spec"]["containers"];
    assert_eq!(containers[0]["name"], "b");
    assert_eq!(containers[1]["image"], "i:1");
    assert_eq!(containers[1]["ports"].as_array().unwrap().len(), 2);
    w.apply("b", deployment(json!([{"name": "a"}])), false).unwrap();
    let containers = w.object()["spec"]["template"]["spec"]["containers"].as_array().unwrap();
    assert_eq!(containers.len(), 1);
    assert_eq!(
        containers[0]["ports"],
        json!([{"containerPort": 80, "protocol": "TCP"}])
    );
    let twice = json!([{"name": "a"}, {"name": "a"}]);
    assert_eq!(
        w.apply("b", deployment(twice), false).unwrap_err(),
        "failed to create typed patch object (d/w; apps/v1, Kind=Deployment): \
         .spec.template.spec.containers: duplicate entries for key [name=\"a\"]"
    );
}

#[test]
fn defaults_and_unowned_items_survive_a_prune() {
    let mut w = world("apps", "Deployment");
    w.apply(
        "a",
        deployment(json!([{"name": "a", "image": "i"}, {"name": "z", "image": "i"}])),
        false,
    )
    .unwrap();
    let object = w.object.as_mut().unwrap();
    object["spec"]["replicas"] = 1.into();
    object["spec"]["template"]["spec"]["dnsPolicy"] = "ClusterFirst".into();
    w.update("scaler", |o| o["spec"]["replicas"] = 3.into());
    assert_eq!(w.owned("scaler"), json!({"f:spec": {"f:replicas": {}}}));
    w.apply("a", deployment(json!([{"name": "a", "image": "i"}])), false)
        .unwrap();
    let spec = &w.object()["spec"];
    assert_eq!(
        (&spec["replicas"], &spec["template"]["spec"]["dnsPolicy"]),
        (&json!(3), &json!("ClusterFirst"))
    );
    assert_eq!(spec["template"]["spec"]["containers"].as_array().unwrap().len(), 1);
    let mut scaled = deployment(json!([{"name": "a", "image": "i"}]));
    scaled["spec"]["replicas"] = 5.into();
    assert_eq!(
        w.apply("a", scaled, false).unwrap_err(),
        "Apply failed with 1 conflict: conflict with \"scaler\" using apps/v1: .spec.replicas"
    );
}

#[test]
fn atomic_sets_and_empties() {
    let mut w = world("", "Service");
    let service = |selector: Value, finalizers: Value| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "d",
            "finalizers": finalizers}, "spec": {"selector": selector, "externalIPs": ["1.1.1.1"]}})
    };
    w.apply("a", service(json!({"x": "1", "y": "1"}), json!(["f/a"])), false)
        .unwrap();
    assert_eq!(
        w.owned("a"),
        json!({"f:metadata": {"f:finalizers": {"v:\"f/a\"": {}}}, "f:spec": {"f:externalIPs": {}, "f:selector": {}}})
    );
    w.apply("b", service(json!({"x": "1", "y": "1"}), json!(["f/b"])), false)
        .unwrap();
    assert_eq!(w.object()["metadata"]["finalizers"], json!(["f/a", "f/b"]));
    let refused = w
        .apply("b", service(json!({"x": "1"}), json!(["f/b"])), false)
        .unwrap_err();
    assert_eq!(
        refused,
        "Apply failed with 1 conflict: conflict with \"a\": .spec.selector"
    );
    w.apply("b", service(json!({"x": "1"}), json!([])), true).unwrap();
    assert_eq!(
        w.object()["spec"]["selector"],
        json!({"x": "1"}),
        "an atomic map is replaced"
    );
    assert_eq!(w.object()["metadata"]["finalizers"], json!(["f/a"]));

    let mut w = world("", "Pod");
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [
        {"name": "a", "resources": {}}], "volumes": [{"name": "v", "emptyDir": {}}]}});
    w.apply("a", pod, false).unwrap();
    assert_eq!(
        w.owned("a")["f:spec"],
        json!({"f:containers": {"k:{\"name\":\"a\"}": {".": {}, "f:name": {}, "f:resources": {}}},
            "f:volumes": {"k:{\"name\":\"v\"}": {".": {}, "f:emptyDir": {}, "f:name": {}}}})
    );
}

#[test]
fn a_no_op_changes_nothing_and_tracking_can_end() {
    let mut w = world("", "ConfigMap");
    w.apply("a", map(json!({"x": "1"})), false).unwrap();
    let before = w.object().clone();
    w.apply_at("a", map(json!({"x": "1"})), false, T1).unwrap();
    assert_eq!(*w.object(), before, "times stay too");
    w.update("a", |_| {});
    assert_eq!(*w.object(), before);
    w.update("a", |o| o["metadata"]["managedFields"] = json!([{}]));
    assert_eq!(w.object()["metadata"].get("managedFields"), None);
    w.update("a", |o| o["data"]["y"] = "2".into());
    assert_eq!(
        w.object()["metadata"].get("managedFields"),
        None,
        "untracked stays untracked"
    );
    w.apply("b", map(json!({"z": "1"})), false).unwrap();
    assert_eq!(
        w.owned("before-first-apply"),
        json!({"f:data": {".": {}, "f:x": {}, "f:y": {}}})
    );
    assert_eq!(w.owned("b"), json!({"f:data": {"f:z": {}}}));
}

#[test]
fn clients_may_rewrite_ownership() {
    let mut w = world("", "ConfigMap");
    w.update("kubectl-client-side-apply", |o| *o = map(json!({"x": "1"})));
    w.update("kubectl", |o| {
        let entry = &mut o["metadata"]["managedFields"][0];
        entry["manager"] = "kubectl".into();
        entry["operation"] = "Apply".into();
    });
    assert_eq!(w.owned("kubectl"), json!({"f:data": {".": {}, "f:x": {}}}));
    w.update("x", |o| {
        o["metadata"]["managedFields"] = json!([{"operation": "Nonsense"}])
    });
    assert_eq!(
        w.owned("kubectl"),
        json!({"f:data": {".": {}, "f:x": {}}}),
        "malformed entries change nothing"
    );
}

#[test]
fn kubectl_takes_over_what_its_client_side_apply_set() {
    let mut w = world("", "ConfigMap");
    let last = map(json!({"x": "1"})).to_string();
    w.update("kubectl-client-side-apply", |o| {
        *o = map(json!({"x": "1", "y": "1"}));
        o["metadata"]["annotations"] = json!({"kubectl.kubernetes.io/last-applied-configuration": last});
    });
    assert!(w.apply("other", map(json!({"x": "2"})), false).is_err());
    let refused = w.apply("kubectl", map(json!({"x": "2", "y": "2"})), false).unwrap_err();
    assert_eq!(
        refused,
        "Apply failed with 1 conflict: conflict with \"kubectl-client-side-apply\" using v1: .data.y"
    );
    w.apply("kubectl", map(json!({"x": "2"})), false).unwrap();
    let text = meta::annotation(w.object(), LAST_APPLIED).unwrap();
    assert_eq!(serde_json::from_str::<Value>(text).unwrap()["data"], json!({"x": "2"}));
}

#[test]
fn ordinary_managers_are_bounded() {
    let mut w = world("", "ConfigMap");
    for i in 0..25 {
        w.update(&format!("m{i:02}"), |o| {
            if o.get("data").is_none() {
                *o = map(json!({}));
            }
            o["data"][format!("k{i}")] = "v".into();
        });
    }
    let entries = w.object()["metadata"]["managedFields"].as_array().unwrap();
    assert_eq!(entries.len(), 10);
    assert_eq!(
        w.owned("ancient-changes")["f:data"].as_object().unwrap().len(),
        17,
        "sixteen keys and the map"
    );
}

#[test]
fn kinds_without_schema_are_granular() {
    let def = KindDef {
        group: "x.io".into(),
        version: "v1".into(),
        kind: "Thing".into(),
        plural: "things".into(),
        singular: "thing".into(),
        namespaced: true,
        short_names: Vec::new(),
        categories: Vec::new(),
        columns: Vec::new(),
        schema: Value::Null.into(),
        status_subresource: false,
        more: KindMore::default(),
    };
    let mut w = World {
        table: TypeTable::builtin().with_kinds(vec![def]).unwrap(),
        gvk: Gvk::new("x.io", "v1", "Thing"),
        object: None,
    };
    let thing =
        |spec: Value| json!({"apiVersion": "x.io/v1", "kind": "Thing", "metadata": {"name": "t"}, "spec": spec});
    w.apply("a", thing(json!({"p": {"q": 1}, "list": [1, 2]})), false)
        .unwrap();
    w.apply("b", thing(json!({"p": {"r": 1}})), false).unwrap();
    assert_eq!(w.object()["spec"], json!({"p": {"q": 1, "r": 1}, "list": [1, 2]}));
    assert_eq!(w.owned("b"), json!({"f:spec": {".": {}, "f:p": {".": {}, "f:r": {}}}}));
    w.apply("b", thing(json!({"list": [3]})), true).unwrap();
    assert_eq!(w.object()["spec"], json!({"p": {"q": 1}, "list": [3]}));
}

use serde_json::json;

use super::*;

#[test]
fn builtin_resources_have_their_published_facts() {
    let table = TypeTable::builtin();
    let pods = table.resource("", "v1", "pods").unwrap();
    assert_eq!(
        (pods.kind.as_str(), pods.singular.as_str(), pods.namespaced),
        ("Pod", "pod", true)
    );
    assert_eq!(pods.short_names, ["po"]);
    assert!(pods.has_verb("deletecollection"));
    assert_eq!(
        pods.subresource("eviction").unwrap().kind,
        Gvk::new("policy", "v1", "Eviction")
    );
    let deployments = table.resource("apps", "v1", "deployments").unwrap();
    assert_eq!(deployments.group_resource(), "deployments.apps");
    assert_eq!(
        deployments.subresource("scale").unwrap().kind,
        Gvk::new("autoscaling", "v1", "Scale")
    );
    assert!(
        table.resource("networking.k8s.io", "v1", "networkpolicies").is_none(),
        "known but not served"
    );
    assert!(table.kind("apps", "v1", "DaemonSet").is_some());
    assert!(table.kind("apps", "v1", "DeleteOptions").is_some());
}

#[test]
fn fields_carry_merge_rules_and_wire_numbers() {
    let table = TypeTable::builtin();
    let spec = table.ty(table.ty_named("io.k8s.api.core.v1.PodSpec").unwrap());
    let volumes = spec.field("volumes").unwrap();
    assert_eq!(volumes.patch_strategy(), Some("merge,retainKeys"));
    assert_eq!(volumes.merge_key.as_deref(), Some("name"));
    let port = table.ty(table.ty_named("io.k8s.api.core.v1.ContainerPort").unwrap());
    assert_eq!(port.field("protocol").unwrap().default, Some(json!("TCP")));
    let probe = table.ty(table.ty_named("io.k8s.api.core.v1.Probe").unwrap());
    assert_eq!(probe.field("httpGet").unwrap().embedded_in, Some(1));
}

#[test]
fn overlay_kinds_are_served_beside_the_builtin_ones() {
    let schema = json!({"type": "object", "properties": {
        "spec": {"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]},
        "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}
    }});
    let table = TypeTable::builtin()
        .with_kinds(vec![KindDef {
            group: "example.test".into(),
            version: "v1".into(),
            kind: "Widget".into(),
            plural: "widgets".into(),
            singular: "widget".into(),
            namespaced: true,
            short_names: vec![],
            categories: vec![],
            columns: vec![],
            schema: schema.into(),
            status_subresource: true,
            more: KindMore::default(),
        }])
        .unwrap();
    let widgets = table.resource("example.test", "v1", "widgets").unwrap();
    assert!(widgets.custom && widgets.subresource("status").is_some());
    assert!(table.kind("example.test", "v1", "WidgetList").is_some());
    assert!(table.resource("", "v1", "pods").is_some());
    assert!(TypeTable::builtin().resource("example.test", "v1", "widgets").is_none());
}

use super::*;
use crate::table::{KindDef, KindMore};

fn parse(bytes: &Bytes) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

fn references<'v>(value: &'v Value, out: &mut Vec<&'v str>) {
    match value {
        Value::Object(map) => {
            out.extend(map.get("$ref").and_then(Value::as_str));
            map.values().for_each(|v| references(v, out));
        }
        Value::Array(list) => list.iter().for_each(|v| references(v, out)),
        _ => {}
    }
}

fn widget() -> Arc<TypeTable> {
    TypeTable::builtin()
        .with_kinds(vec![KindDef {
            group: "example.test".into(),
            version: "v1".into(),
            kind: "Widget".into(),
            plural: "widgets".into(),
            singular: "widget".into(),
            namespaced: false,
            short_names: vec![],
            categories: vec![],
            columns: vec![],
            schema: json!({"type": "object", "properties": {"spec": {"type": "object",
            "properties": {"size": {"type": "integer", "nullable": true}}}}})
            .into(),
            status_subresource: true,
            more: KindMore::default(),
        }])
        .unwrap()
}

#[test]
fn v2_is_closed_and_carries_what_apply_reads() {
    let doc = parse(&v2_json(&widget()));
    let definitions = doc["definitions"].as_object().unwrap();
    let mut all = Vec::new();
    references(&doc, &mut all);
    for r in all {
        assert!(
            definitions.contains_key(r.strip_prefix("#/definitions/").unwrap()),
            "{r}"
        );
    }
    let pod = &definitions["io.k8s.api.core.v1.Pod"];
    assert_eq!(
        pod["x-kubernetes-group-version-kind"],
        json!([{"group": "", "kind": "Pod", "version": "v1"}])
    );
    let volumes = &definitions["io.k8s.api.core.v1.PodSpec"]["properties"]["volumes"];
    assert_eq!(volumes["x-kubernetes-patch-strategy"], "merge,retainKeys");
    assert_eq!(volumes["x-kubernetes-patch-merge-key"], "name");
    let patch = &doc["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
    assert_eq!(patch["operationId"], "patchAppsV1NamespacedDeployment");
    assert_eq!(patch["x-kubernetes-group-version-kind"]["kind"], "Deployment");
    assert!(
        patch["parameters"]
            .as_array()
            .unwrap()
            .iter()
            .any(|p| p["name"] == "dryRun")
    );
    let widget = &definitions["test.example.v1.Widget"];
    assert_eq!(widget["properties"]["spec"]["properties"]["size"], json!({}));
    assert_eq!(widget["x-kubernetes-group-version-kind"][0]["group"], "example.test");
}

#[test]
fn v3_patch_paths_have_field_validation() {
    let documents = Documents::new(widget());
    let index = parse(&documents.v3_index());
    for path in ["api/v1", "apis/apps/v1", "apis/example.test/v1"] {
        let url = index["paths"][path]["serverRelativeURL"].as_str().unwrap();
        assert!(url.starts_with(&format!("/openapi/v3/{path}?hash=")), "{url}");
        let doc = parse(&documents.v3(path).unwrap());
        let mut all = Vec::new();
        references(&doc, &mut all);
        let schemas = doc["components"]["schemas"].as_object().unwrap();
        for r in all {
            assert!(
                schemas.contains_key(r.strip_prefix("#/components/schemas/").unwrap()),
                "{path} {r}"
            );
        }
        for (name, item) in doc["paths"].as_object().unwrap() {
            if let Some(patch) = item.get("patch").filter(|p| p["x-kubernetes-action"] == "patch") {
                let names: Vec<_> = patch["parameters"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|p| &p["name"])
                    .collect();
                assert!(names.contains(&&json!("fieldValidation")), "{name}");
            }
        }
    }
    let core = parse(&documents.v3("api/v1").unwrap());
    let metadata = &core["components"]["schemas"]["io.k8s.api.core.v1.Pod"]["properties"]["metadata"];
    assert_eq!(
        metadata["allOf"][0]["$ref"],
        "#/components/schemas/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
    );
    assert!(documents.v3("apis/none/v1").is_none());
}

#[test]
fn gnostic_bytes_hold_the_document() {
    let bytes = v2_proto(&TypeTable::builtin());
    let find = |needle: &str| bytes.windows(needle.len()).any(|w| w == needle.as_bytes());
    assert!(find("io.k8s.api.core.v1.PodSpec") && find("x-kubernetes-patch-merge-key") && find("/api/v1/namespaces"));
}

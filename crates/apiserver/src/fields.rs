//! Which fields of a kind can be selected, and their values.

use std::borrow::Cow;

use serde_json::Value;

/// Fields besides `metadata.name` and `metadata.namespace`, by group and plural.
/// # Source
/// The field label conversion functions of Kubernetes 1.36.
pub fn selectable(group: &str, plural: &str) -> &'static [&'static str] {
    match (group, plural) {
        ("", "pods") => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        ("", "nodes") => &["spec.unschedulable"],
        ("", "namespaces") => &["status.phase"],
        ("", "secrets") => &["type"],
        ("", "services") => &["spec.clusterIP", "spec.type"],
        ("", "replicationcontrollers") | ("apps", "replicasets") => &["status.replicas"],
        ("batch", "jobs") => &["status.successful"],
        ("certificates.k8s.io", "certificatesigningrequests") => &["spec.signerName"],
        ("", "events") => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        _ => &[],
    }
}

/// The field's text; absent fields and fields that are no scalar are the empty string, absent flags `false`.
pub fn value<'a>(object: &'a Value, field: &str) -> Cow<'a, str> {
    let path = match field {
        "source" => "source.component",
        "status.successful" => "status.succeeded",
        other => other,
    };
    let find = |path: &str| path.split('.').try_fold(object, |at, key| at.get(key));
    let found = match find(path) {
        // Events of the newer API have no source; their reporter stands for it.
        None if field == "source" => find("reportingComponent"),
        Some(Value::String(text)) if field == "source" && text.is_empty() => find("reportingComponent"),
        found => found,
    };
    match found {
        Some(Value::String(text)) => Cow::Borrowed(text),
        Some(other @ (Value::Bool(_) | Value::Number(_))) => Cow::Owned(other.to_string()),
        _ if matches!(field, "spec.unschedulable" | "spec.hostNetwork") => Cow::Borrowed("false"),
        _ if matches!(field, "status.replicas" | "status.successful") => Cow::Borrowed("0"),
        _ => Cow::Borrowed(""),
    }
}

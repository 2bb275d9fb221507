//! What writes may change: system metadata, generation, the border between spec and status, and when an object ends.
//! Pure functions over trees.

use apimachinery::meta;
use apimachinery::table::ResourceInfo;
use serde_json::{Map, Value, json};

use crate::served::Served;

/// Which part of an object a write covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Everything but status, where status is a subresource.
    Main,
    Status,
    /// The decision on a certificate signing request: its conditions.
    Approval,
    /// `spec.finalizers` of a namespace.
    Finalize,
    /// A change by the server itself on behalf of a subresource (binding, scale, deletion): as given.
    Internal,
}

/// Kinds whose metadata counts generations.
pub fn has_generation(info: &ResourceInfo) -> bool {
    // Revisions and addresses are records and never change.
    let record = matches!(
        (info.group.as_str(), info.plural.as_str()),
        ("apps", "controllerrevisions") | ("networking.k8s.io", "ipaddresses" | "servicecidrs")
    );
    info.custom
        || !record
            && matches!(
                (info.group.as_str(), info.plural.as_str()),
                ("", "pods" | "podtemplates" | "replicationcontrollers")
                    | ("scheduling.k8s.io", "priorityclasses")
                    | ("apiextensions.k8s.io", "customresourcedefinitions")
                    | (
                        "apps" | "batch" | "policy" | "networking.k8s.io" | "discovery.k8s.io",
                        _
                    )
            )
}

/// Whether status changes through a subresource only.
pub fn has_status(served: &Served) -> bool {
    served.info.subresource("status").is_some()
}

/// Drops what clients cannot set at creation and sets what the server decides.
pub fn prepare_create(served: &Served, value: &mut Value) {
    let info = &served.info;
    let Some(root) = value.as_object_mut() else { return };
    if has_status(served) {
        root.remove("status");
    }
    match (info.group.as_str(), info.plural.as_str()) {
        ("", "pods") => {
            root.insert("status".into(), json!({"phase": "Pending"}));
        }
        ("", "namespaces") => {
            let name = root
                .get("metadata")
                .and_then(|m| m.get("name"))
                .cloned()
                .unwrap_or_default();
            let spec = object_in(root, "spec");
            let finalizers = spec.entry("finalizers").or_insert_with(|| json!([]));
            if let Some(list) = finalizers.as_array_mut()
                && !list.iter().any(|f| f == "kubernetes")
            {
                list.push("kubernetes".into());
            }
            root.insert("status".into(), json!({"phase": "Active"}));
            let labels = object_in(object_in(root, "metadata"), "labels");
            labels.insert("kubernetes.io/metadata.name".into(), name);
        }
        ("", "services") => {
            root.insert("status".into(), json!({"loadBalancer": {}}));
        }
        ("apiextensions.k8s.io", "customresourcedefinitions") => {
            let status = json!({"conditions": [], "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": []});
            root.insert("status".into(), status);
        }
        ("networking.k8s.io", "ingresses") => {
            root.insert("status".into(), json!({"loadBalancer": {}}));
        }
        ("batch", "jobs") => {
            root.insert("status".into(), json!({}));
            job_selector(root);
        }
        ("policy", "poddisruptionbudgets") => {
            root.insert(
                "status".into(),
                json!({"currentHealthy": 0, "desiredHealthy": 0, "disruptionsAllowed": 0, "expectedPods": 0}),
            );
        }
        ("apps", "daemonsets") => {
            root.insert(
                "status".into(),
                json!({"currentNumberScheduled": 0, "desiredNumberScheduled": 0, "numberMisscheduled": 0, "numberReady": 0}),
            );
        }
        ("batch", "cronjobs") | ("", "resourcequotas") | ("apps", "deployments" | "replicasets") => {
            root.insert("status".into(), json!({}));
        }
        _ => {}
    }
}

/// Gives a Job's pods labels that no other Job's have, and the Job the selector for them. With `manualSelector` both are the
/// user's.
fn job_selector(root: &mut Map<String, Value>) {
    let text = |root: &Map<String, Value>, key: &str| root.get("metadata").and_then(|m| m.get(key)).cloned();
    let (Some(uid), Some(name)) = (text(root, "uid"), text(root, "name")) else {
        return;
    };
    let spec = object_in(root, "spec");
    if spec.get("manualSelector").is_some_and(|m| *m == true) {
        return;
    }
    // The old names stay beside the new ones for those who select by them.
    let labels = object_in(object_in(object_in(spec, "template"), "metadata"), "labels");
    for (key, value) in [
        ("controller-uid", &uid),
        ("job-name", &name),
        ("batch.kubernetes.io/controller-uid", &uid),
        ("batch.kubernetes.io/job-name", &name),
    ] {
        labels.entry(key).or_insert_with(|| value.clone());
    }
    if spec.get("selector").is_none_or(Value::is_null) {
        let selector = json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}});
        spec.insert("selector".into(), selector);
    }
}

fn object_in<'a>(map: &'a mut Map<String, Value>, key: &str) -> &'a mut Map<String, Value> {
    let slot = map.entry(key).or_insert_with(|| json!({}));
    if !slot.is_object() {
        *slot = json!({});
    }
    match slot {
        Value::Object(map) => map,
        _ => unreachable!("just made an object"),
    }
}

/// Sets what depends on the whole, defaulted object.
pub fn finish_create(served: &Served, value: &mut Value) {
    if served.is("", "pods") {
        let qos = qos_class(value);
        if let Some(status) = value.get_mut("status").and_then(Value::as_object_mut) {
            status.insert("qosClass".into(), qos.into());
        }
    }
}

/// Quality of service by requests and limits of cpu and memory.
/// # Source
/// `pkg/apis/core/v1/helper/qos` of Kubernetes 1.36.
pub fn qos_class(pod: &Value) -> &'static str {
    let (mut any, mut all) = (false, true);
    let empty = Vec::new();
    for list in ["initContainers", "containers"] {
        for container in pod["spec"][list].as_array().unwrap_or(&empty) {
            let resources = &container["resources"];
            for resource in ["cpu", "memory"] {
                let limit = &resources["limits"][resource];
                let request = &resources["requests"][resource];
                let set = |v: &Value| v.as_str().is_some_and(|s| s != "0") || v.as_f64().is_some_and(|n| n != 0.0);
                any |= set(limit) || set(request);
                all &= set(limit) && (request.is_null() || request == limit);
            }
        }
    }
    match (any, all) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// Carries over what this write may not change.
///
/// # Errors
/// The reason of a conflict: a uid that is another object's.
pub fn prepare_update(served: &Served, part: Part, old: &Value, new: &mut Value) -> Result<(), String> {
    let uid = meta::uid(new);
    if !uid.is_empty() && uid != meta::uid(old) {
        return Err(format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            meta::uid(old)
        ));
    }
    if part != Part::Internal {
        keep_metadata(old, new);
    }
    match part {
        Part::Main if has_status(served) => copy(old, new, "status"),
        Part::Main | Part::Internal => {}
        Part::Status => {
            let status = new.get("status").cloned();
            let mut metadata = old["metadata"].clone();
            let keep: &[&str] = if served.custom.is_some() {
                &[]
            } else if served.is("", "pods") || served.is("", "nodes") || served.info.custom {
                &["labels", "annotations", "finalizers"]
            } else {
                &["annotations"]
            };
            for key in keep {
                match new["metadata"].get(*key).cloned() {
                    Some(value) => metadata[*key] = value,
                    None => {
                        metadata.as_object_mut().map(|m| m.remove(*key));
                    }
                }
            }
            *new = old.clone();
            new["metadata"] = metadata;
            set(new, "status", status);
            if served.is("", "pods") {
                keep_qos(old, new);
            }
            if served.is("certificates.k8s.io", "certificatesigningrequests") {
                // The decision is made through `approval` only.
                keep_decision(old, new);
            }
        }
        Part::Approval => {
            let conditions = new["status"].get("conditions").cloned();
            *new = old.clone();
            if let Some(conditions) = conditions {
                new["status"]["conditions"] = conditions;
            }
        }
        Part::Finalize => {
            let finalizers = new["spec"].get("finalizers").cloned().unwrap_or_else(|| json!([]));
            *new = old.clone();
            new["spec"]["finalizers"] = finalizers;
        }
    }
    if part == Part::Main && served.is("apiextensions.k8s.io", "customresourcedefinitions") {
        note_storage_version(new);
    }
    let fixed = served.is("certificates.k8s.io", "certificatesigningrequests");
    if part == Part::Main && (fixed || served.is("", "namespaces")) {
        // Spec finalizers of a namespace change through `finalize` only; what was asked to be signed never changes.
        copy(old, new, "spec");
    }
    Ok(())
}

fn keep_decision(old: &Value, new: &mut Value) {
    let decisions = |o: &Value| -> Vec<Value> {
        let all = o["status"]["conditions"].as_array().into_iter().flatten();
        all.filter(|c| c["type"] == "Approved" || c["type"] == "Denied")
            .cloned()
            .collect()
    };
    let kept = decisions(old);
    if decisions(new) == kept {
        return;
    }
    let mut conditions = new["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.retain(|c| c["type"] != "Approved" && c["type"] != "Denied");
    conditions.splice(0..0, kept);
    if new["status"].is_object() {
        new["status"]["conditions"] = conditions.into();
    }
}

/// A version that becomes the storage version has objects stored at it from now on.
fn note_storage_version(definition: &mut Value) {
    let versions = definition["spec"]["versions"].as_array().into_iter().flatten();
    let storage: Vec<Value> = versions
        .filter(|v| v["storage"] == true)
        .map(|v| v["name"].clone())
        .collect();
    if let Some(stored) = definition["status"]
        .get_mut("storedVersions")
        .and_then(Value::as_array_mut)
    {
        for name in storage {
            if !stored.contains(&name) {
                stored.push(name);
            }
        }
    }
}

fn keep_qos(old: &Value, new: &mut Value) {
    if let Some(qos) = old["status"].get("qosClass").cloned()
        && let Some(status) = new.get_mut("status").and_then(Value::as_object_mut)
    {
        status.entry("qosClass").or_insert(qos);
    }
}

fn copy(old: &Value, new: &mut Value, key: &str) {
    set(new, key, old.get(key).cloned());
}

fn set(object: &mut Value, key: &str, value: Option<Value>) {
    if let Some(map) = object.as_object_mut() {
        match value {
            Some(value) => map.insert(key.into(), value),
            None => map.remove(key),
        };
    }
}

fn keep_metadata(old: &Value, new: &mut Value) {
    let Some(metadata) = meta::metadata_mut(new) else {
        return;
    };
    for key in [
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "generateName",
    ] {
        match old["metadata"].get(key) {
            Some(value) => metadata.insert(key.into(), value.clone()),
            None => metadata.remove(key),
        };
    }
    metadata.remove("selfLink");
}

/// Counts a generation if anything but metadata and status changed; some kinds count parts of their metadata too.
pub fn bump_generation(served: &Served, old: &Value, new: &mut Value) {
    if !has_generation(&served.info) {
        return;
    }
    let outside = |key: &String| key != "metadata" && !(key == "status" && has_status(served));
    let same = match (old.as_object(), new.as_object()) {
        (Some(a), Some(b)) => a
            .iter()
            .filter(|(k, _)| outside(k))
            .eq(b.iter().filter(|(k, _)| outside(k))),
        _ => true,
    };
    let metadata = match (served.info.group.as_str(), served.info.plural.as_str()) {
        ("apps", "deployments") => &["annotations"][..],
        ("discovery.k8s.io", "endpointslices") => &["labels"],
        ("scheduling.k8s.io", "priorityclasses") => &["labels", "annotations"],
        _ => &[],
    };
    let same = same
        && metadata
            .iter()
            .all(|key| old["metadata"][*key] == new["metadata"][*key]);
    if !same {
        let next = meta::generation(old).max(0) + 1;
        if let Some(metadata) = meta::metadata_mut(new) {
            metadata.insert("generation".into(), next.into());
        }
    }
}

/// Whether the object is being deleted and nothing holds it any more.
pub fn is_finished(served: &Served, value: &Value) -> bool {
    let metadata = &value["metadata"];
    if meta::deletion_timestamp(value).is_none() || meta::finalizers(value).next().is_some() {
        return false;
    }
    if served.is("", "namespaces") {
        return value["spec"]["finalizers"].as_array().is_none_or(Vec::is_empty);
    }
    metadata["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qos_follows_requests_and_limits() {
        let pod = |r: Value| json!({"spec": {"containers": [{"resources": r}]}});
        assert_eq!(qos_class(&pod(json!({}))), "BestEffort");
        assert_eq!(qos_class(&pod(json!({"requests": {"cpu": "1"}}))), "Burstable");
        let both = json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1", "memory": "1Gi"}});
        assert_eq!(qos_class(&pod(both)), "Guaranteed");
    }
}

//! Defaults of version 1 of the served kinds, set in place. Idempotent.
//!
//! Values that a server allocates (cluster addresses, node ports, finalizers of a namespace) are not defaults.

mod batch;
mod limits;
mod pod;
mod sets;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::gvk::Gvk;

type Object = Map<String, Value>;

/// Sets the defaults of `object`, decoded before, of kind `gvk`. Kinds without defaults stay as they are.
pub fn apply(gvk: &Gvk, object: &mut Value) {
    let Value::Object(object) = object else { return };
    match (&*gvk.group, &*gvk.version, &*gvk.kind) {
        ("", "v1", "Pod") => {
            let spec = child(object, "spec");
            pod::spec(spec);
            pod::own(spec);
        }
        ("", "v1", "PodTemplate") => template(object),
        ("", "v1", "Service") => service(object),
        ("", "v1", "Endpoints") => {
            each(object.get_mut("subsets"), |subset| {
                each(subset.get_mut("ports"), |port| text(port, "protocol", "TCP"));
            });
        }
        ("", "v1", "Namespace") => namespace(object),
        ("", "v1", "Node") => node(object),
        ("", "v1", "Secret") => secret(object),
        ("", "v1", "LimitRange") => each(child(object, "spec").get_mut("limits"), limits::limit_range_item),
        ("apps", "v1", "DaemonSet") => sets::daemon_set(child(object, "spec")),
        ("batch", "v1", "Job") => batch::job(object),
        ("batch", "v1", "CronJob") => batch::cron_job(object),
        ("apps", "v1", "Deployment") => deployment(child(object, "spec")),
        ("apps", "v1", "ReplicaSet") => {
            let spec = child(object, "spec");
            absent(spec, "replicas", 1);
            template(spec);
        }
        ("rbac.authorization.k8s.io", "v1", "RoleBinding" | "ClusterRoleBinding") => {
            text(child(object, "roleRef"), "apiGroup", "rbac.authorization.k8s.io");
            each(object.get_mut("subjects"), |subject| {
                if matches!(subject.get("kind").and_then(Value::as_str), Some("User" | "Group")) {
                    text(subject, "apiGroup", "rbac.authorization.k8s.io");
                }
            });
        }
        ("discovery.k8s.io", "v1", "EndpointSlice") => each(object.get_mut("ports"), |port| {
            absent(port, "name", "");
            absent(port, "protocol", "TCP");
        }),
        ("apiextensions.k8s.io", "v1", "CustomResourceDefinition") => definition(object),
        ("scheduling.k8s.io", "v1", "PriorityClass") => text(object, "preemptionPolicy", "PreemptLowerPriority"),
        ("storage.k8s.io", "v1", "StorageClass") => {
            text(object, "reclaimPolicy", "Delete");
            text(object, "volumeBindingMode", "Immediate");
        }
        // Upstream always writes these empty parts.
        ("certificates.k8s.io", "v1", "CertificateSigningRequest") => drop(child(object, "status")),
        ("authentication.k8s.io", "v1", "TokenRequest") => absent(child(object, "spec"), "expirationSeconds", 3600),
        _ => {}
    }
}

fn definition(object: &mut Object) {
    let spec = child(object, "spec");
    let names = child(spec, "names");
    let kind = names.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
    text(names, "singular", &kind.to_lowercase());
    if !kind.is_empty() {
        text(names, "listKind", &format!("{kind}List"));
    }
    if !spec.contains_key("conversion") {
        spec.insert("conversion".into(), json!({"strategy": "None"}));
    }
    let versions = spec.get("versions").and_then(Value::as_array).into_iter().flatten();
    let storage = versions
        .filter(|v| v["storage"] == true)
        .find_map(|v| v["name"].as_str().map(str::to_owned));
    let status = child(object, "status");
    let none = status
        .get("storedVersions")
        .and_then(Value::as_array)
        .is_none_or(Vec::is_empty);
    if let (true, Some(storage)) = (none, storage) {
        status.insert("storedVersions".into(), json!([storage]));
    }
}

fn deployment(spec: &mut Object) {
    absent(spec, "replicas", 1);
    absent(spec, "revisionHistoryLimit", 10);
    absent(spec, "progressDeadlineSeconds", 600);
    let strategy = child(spec, "strategy");
    text(strategy, "type", "RollingUpdate");
    if strategy.get("type").is_some_and(|t| t == "RollingUpdate") {
        let rolling = child(strategy, "rollingUpdate");
        absent(rolling, "maxUnavailable", "25%");
        absent(rolling, "maxSurge", "25%");
    }
    template(spec);
}

/// The pod template in a workload's spec.
fn template(spec: &mut Object) {
    pod::spec(child(child(spec, "template"), "spec"));
}

fn namespace(object: &mut Object) {
    let name = object
        .get("metadata")
        .and_then(|m| m.get("name"))
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    if !name.is_empty() {
        child(child(object, "metadata"), "labels").insert("kubernetes.io/metadata.name".into(), name.into());
    }
    text(child(object, "status"), "phase", "Active");
}

/// `stringData` is only for writing: it becomes data.
fn secret(object: &mut Object) {
    text(object, "type", "Opaque");
    if let Some(Value::Object(plain)) = object.remove("stringData") {
        let data = child(object, "data");
        for (key, value) in plain {
            let encoded = STANDARD.encode(value.as_str().unwrap_or_default());
            data.insert(key, encoded.into());
        }
    }
}

fn node(object: &mut Object) {
    let status = child(object, "status");
    if let Some(capacity) = status.get("capacity").cloned() {
        status.entry("allocatable").or_insert(capacity);
    }
}

fn service(object: &mut Object) {
    let spec = child(object, "spec");
    text(spec, "sessionAffinity", "None");
    if spec.get("sessionAffinity").is_some_and(|a| a == "None") {
        spec.remove("sessionAffinityConfig");
    } else if spec.get("sessionAffinity").is_some_and(|a| a == "ClientIP") {
        absent(
            child(child(spec, "sessionAffinityConfig"), "clientIP"),
            "timeoutSeconds",
            10800,
        );
    }
    text(spec, "type", "ClusterIP");
    each(spec.get_mut("ports"), |port| {
        text(port, "protocol", "TCP");
        let unset = port.get("targetPort").is_none_or(|t| *t == json!(0) || *t == json!(""));
        if unset && let Some(number) = port.get("port").cloned() {
            port.insert("targetPort".into(), number);
        }
    });
    let kind = spec.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let filled = |key: &str| spec.get(key).and_then(Value::as_array).is_some_and(|a| !a.is_empty());
    let external =
        matches!(kind.as_str(), "NodePort" | "LoadBalancer") || (kind == "ClusterIP" && filled("externalIPs"));
    if external {
        text(spec, "externalTrafficPolicy", "Cluster");
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer" | "ClusterIP") {
        absent(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        absent(spec, "allocateLoadBalancerNodePorts", true);
        let ingress = object
            .get_mut("status")
            .and_then(|s| s.get_mut("loadBalancer"))
            .and_then(|l| l.get_mut("ingress"));
        each(ingress, |entry| {
            if entry.get("ip").and_then(Value::as_str).is_some_and(|ip| !ip.is_empty()) {
                absent(entry, "ipMode", "VIP");
            }
        });
    }
}

/// The object at `key`, made if it is not there.
fn child<'o>(object: &'o mut Object, key: &str) -> &'o mut Object {
    let slot = object.entry(key).or_insert(Value::Null);
    if !slot.is_object() {
        *slot = Value::Object(Object::new());
    }
    slot.as_object_mut().expect("set to an object above")
}

/// Every object of a list.
fn each(list: Option<&mut Value>, mut f: impl FnMut(&mut Object)) {
    for item in list.and_then(Value::as_array_mut).into_iter().flatten() {
        if let Value::Object(item) = item {
            f(item);
        }
    }
}

/// Sets `key` where it is absent.
fn absent(object: &mut Object, key: &str, value: impl Into<Value>) {
    object.entry(key).or_insert_with(|| value.into());
}

/// Sets `key` where it is absent or empty.
fn text(object: &mut Object, key: &str, value: &str) {
    if object.get(key).and_then(Value::as_str).is_none_or(str::is_empty) {
        object.insert(key.into(), value.into());
    }
}

/// Sets `key` where it is absent or zero.
fn number(object: &mut Object, key: &str, value: i64) {
    if object.get(key).and_then(Value::as_i64).is_none_or(|n| n == 0) {
        object.insert(key.into(), value.into());
    }
}

#[cfg(test)]
mod tests;

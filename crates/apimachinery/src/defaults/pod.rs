//! Defaults of pods and pod templates.

use serde_json::Value;

use super::{Object, absent, child, each, number, text};

/// Fields of a volume that are not its source.
const NOT_A_SOURCE: [&str; 1] = ["name"];

/// What pods and templates share.
pub(super) fn spec(spec: &mut Object) {
    text(spec, "dnsPolicy", "ClusterFirst");
    text(spec, "restartPolicy", "Always");
    child(spec, "securityContext");
    absent(spec, "terminationGracePeriodSeconds", 30);
    text(spec, "schedulerName", "default-scheduler");
    // The two names of one field.
    match (
        spec.get("serviceAccountName").cloned(),
        spec.get("serviceAccount").cloned(),
    ) {
        (Some(name), _) if name != "" => drop(spec.insert("serviceAccount".into(), name)),
        (_, Some(name)) if name != "" => drop(spec.insert("serviceAccountName".into(), name)),
        _ => {}
    }
    each(spec.get_mut("volumes"), volume);
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        each(spec.get_mut(list), container);
    }
}

/// What only pods have, not templates.
pub(super) fn own(spec: &mut Object) {
    let host_network = spec.get("hostNetwork").is_some_and(|v| v == true);
    for list in ["containers", "initContainers"] {
        each(spec.get_mut(list), |c| {
            requests_from_limits(c);
            if host_network {
                each(c.get_mut("ports"), |port| {
                    if let Some(n) = port.get("containerPort").and_then(Value::as_i64) {
                        number(port, "hostPort", n);
                    }
                });
            }
        });
    }
    absent(spec, "enableServiceLinks", true);
}

fn requests_from_limits(container: &mut Object) {
    let Some(Value::Object(resources)) = container.get_mut("resources") else {
        return;
    };
    if let Some(Value::Object(limits)) = resources.get("limits").cloned() {
        let requests = child(resources, "requests");
        for (name, limit) in limits {
            requests.entry(name).or_insert(limit);
        }
    }
}

fn volume(volume: &mut Object) {
    if volume.keys().all(|k| NOT_A_SOURCE.contains(&k.as_str())) {
        child(volume, "emptyDir");
    }
    for (source, mode) in [
        ("secret", 0o644),
        ("configMap", 0o644),
        ("downwardAPI", 0o644),
        ("projected", 0o644),
    ] {
        if let Some(Value::Object(source)) = volume.get_mut(source) {
            absent(source, "defaultMode", mode);
        }
    }
    if let Some(Value::Object(path)) = volume.get_mut("hostPath") {
        absent(path, "type", "");
    }
    each(
        volume.get_mut("downwardAPI").and_then(|d| d.get_mut("items")),
        field_ref,
    );
    each(
        volume.get_mut("projected").and_then(|p| p.get_mut("sources")),
        |source| {
            if let Some(Value::Object(token)) = source.get_mut("serviceAccountToken") {
                absent(token, "expirationSeconds", 3600);
            }
            each(
                source.get_mut("downwardAPI").and_then(|d| d.get_mut("items")),
                field_ref,
            );
        },
    );
    if let Some(Value::Object(image)) = volume.get_mut("image") {
        let policy = pull_policy(image.get("reference").and_then(Value::as_str).unwrap_or_default());
        text(image, "pullPolicy", policy);
    }
}

fn field_ref(holder: &mut Object) {
    if let Some(Value::Object(reference)) = holder.get_mut("fieldRef") {
        text(reference, "apiVersion", "v1");
    }
}

fn container(container: &mut Object) {
    let policy = pull_policy(container.get("image").and_then(Value::as_str).unwrap_or_default());
    text(container, "imagePullPolicy", policy);
    text(container, "terminationMessagePath", "/dev/termination-log");
    text(container, "terminationMessagePolicy", "File");
    child(container, "resources");
    each(container.get_mut("ports"), |port| text(port, "protocol", "TCP"));
    each(container.get_mut("env"), |env| {
        if let Some(Value::Object(from)) = env.get_mut("valueFrom") {
            field_ref(from);
            if let Some(Value::Object(key)) = from.get_mut("fileKeyRef") {
                absent(key, "optional", false);
            }
        }
    });
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(Value::Object(probe)) = container.get_mut(probe) {
            number(probe, "timeoutSeconds", 1);
            number(probe, "periodSeconds", 10);
            number(probe, "successThreshold", 1);
            number(probe, "failureThreshold", 3);
            handler(probe);
            if let Some(Value::Object(grpc)) = probe.get_mut("grpc") {
                absent(grpc, "service", "");
            }
        }
    }
    if let Some(Value::Object(lifecycle)) = container.get_mut("lifecycle") {
        for hook in ["postStart", "preStop"] {
            if let Some(Value::Object(hook)) = lifecycle.get_mut(hook) {
                handler(hook);
            }
        }
    }
}

fn handler(holder: &mut Object) {
    if let Some(Value::Object(get)) = holder.get_mut("httpGet") {
        text(get, "path", "/");
        text(get, "scheme", "HTTP");
    }
}

/// `Always` for the tag `latest`, given or implied; else `IfNotPresent`.
fn pull_policy(image: &str) -> &'static str {
    let (name, digest) = image.split_once('@').map_or((image, None), |(n, d)| (n, Some(d)));
    let last = name.rsplit('/').next().unwrap_or(name);
    match last.split_once(':') {
        Some((_, "latest")) => "Always",
        Some(_) => "IfNotPresent",
        None if digest.is_some() => "IfNotPresent",
        None => "Always",
    }
}

//! Pod specifications, of pods and of templates.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Errors, list, names, probe, text, volume};
use crate::field::FieldError;
use crate::quantity::Quantity;

const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];

/// Checks the spec at `path`. A template may not hold ephemeral containers.
pub(super) fn spec(errors: &mut Errors, path: &str, spec: &Value, template: bool) {
    let at = |field: &str| format!("{path}.{field}");
    let volumes = volume::volumes(errors, &at("volumes"), &spec["volumes"]);

    let containers = list(&spec["containers"]);
    let mut taken = BTreeSet::new();
    if containers.is_empty() {
        errors.required(at("containers"), "");
    }
    for (i, c) in containers.iter().enumerate() {
        let path = format!("{path}.containers[{i}]");
        container(errors, &path, c, &volumes);
        unique(errors, &path, c, &mut taken);
        probe::all(errors, &path, c);
        if c["restartPolicy"].is_string() && !c["restartPolicyRules"].is_array() {
            errors.one_of(
                &format!("{path}.restartPolicy"),
                &c["restartPolicy"],
                &["Always", "Never", "OnFailure"],
            );
        }
    }
    host_ports(errors, &at("containers"), containers);
    for (i, c) in list(&spec["initContainers"]).iter().enumerate() {
        let path = format!("{path}.initContainers[{i}]");
        container(errors, &path, c, &volumes);
        unique(errors, &path, c, &mut taken);
        if c["restartPolicy"] == "Always" {
            probe::all(errors, &path, c);
            continue;
        }
        for field in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
            if !c[field].is_null() {
                let detail = "may not be set for init containers without restartPolicy=Always";
                errors.forbidden(format!("{path}.{field}"), detail);
            }
        }
    }
    if template && !list(&spec["ephemeralContainers"]).is_empty() {
        errors.forbidden(
            at("ephemeralContainers"),
            "ephemeral containers not allowed in pod template",
        );
    }
    for (i, c) in list(&spec["ephemeralContainers"]).iter().enumerate() {
        let path = format!("{path}.ephemeralContainers[{i}]");
        container(errors, &path, c, &volumes);
        unique(errors, &path, c, &mut taken);
    }

    if spec["hostNetwork"] == true {
        for (i, c) in containers.iter().enumerate() {
            for (j, port) in list(&c["ports"]).iter().enumerate() {
                let given = port["hostPort"].as_i64().filter(|p| *p != 0);
                if given.is_some_and(|p| Some(p) != port["containerPort"].as_i64()) {
                    let path = format!("{path}.containers[{i}].ports[{j}].hostPort");
                    errors.invalid(
                        path,
                        port["hostPort"].clone(),
                        "must match `containerPort` when `hostNetwork` is true",
                    );
                }
            }
        }
    }
    errors.one_of(
        &at("restartPolicy"),
        &spec["restartPolicy"],
        &["Always", "OnFailure", "Never"],
    );
    let policies = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    errors.one_of(&at("dnsPolicy"), &spec["dnsPolicy"], &policies);
    if spec["dnsPolicy"] == "None" && list(&spec["dnsConfig"]["nameservers"]).is_empty() {
        errors.required(
            at("dnsConfig.nameservers"),
            "must provide at least one DNS nameserver when `dnsPolicy` is None",
        );
    }
    errors.labels(&at("nodeSelector"), &spec["nodeSelector"]);
    for (field, rule) in [
        ("serviceAccountName", names::dns_subdomain as fn(&str) -> Vec<String>),
        ("nodeName", names::dns_subdomain),
        ("priorityClassName", names::dns_subdomain),
        ("runtimeClassName", names::dns_subdomain),
        ("hostname", names::dns_label),
        ("subdomain", names::dns_label),
    ] {
        let value = text(spec, field);
        if !value.is_empty() {
            errors.messages(&at(field), value, rule(value));
        }
    }
    if let Some(seconds) = spec["activeDeadlineSeconds"].as_i64()
        && !(1..=i64::from(i32::MAX)).contains(&seconds)
    {
        errors.invalid(
            at("activeDeadlineSeconds"),
            seconds,
            "must be between 1 and 2147483647, inclusive",
        );
    }
    errors.non_negative(
        &at("terminationGracePeriodSeconds"),
        &spec["terminationGracePeriodSeconds"],
    );
    tolerations(errors, &at("tolerations"), &spec["tolerations"]);
    for (i, secret) in list(&spec["imagePullSecrets"]).iter().enumerate() {
        if text(secret, "name").is_empty() {
            errors.required(format!("{path}.imagePullSecrets[{i}].name"), "");
        }
    }
    for (i, alias) in list(&spec["hostAliases"]).iter().enumerate() {
        let path = format!("{path}.hostAliases[{i}].ip");
        errors.messages(&path, text(alias, "ip"), names::ip(text(alias, "ip")));
    }
    for (i, gate) in list(&spec["schedulingGates"]).iter().enumerate() {
        let path = format!("{path}.schedulingGates[{i}].name");
        errors.messages(&path, text(gate, "name"), names::qualified(text(gate, "name")));
    }
}

fn unique<'v>(errors: &mut Errors, path: &str, container: &'v Value, taken: &mut BTreeSet<&'v str>) {
    let name = text(container, "name");
    if !taken.insert(name) {
        errors.push(FieldError::duplicate(format!("{path}.name"), name));
    }
}

fn container(errors: &mut Errors, path: &str, c: &Value, volumes: &BTreeSet<&str>) {
    match text(c, "name") {
        "" => errors.required(format!("{path}.name"), ""),
        name => errors.messages(&format!("{path}.name"), name, names::dns_label(name)),
    }
    let image = text(c, "image");
    if image.is_empty() {
        errors.required(format!("{path}.image"), "");
    } else if image.trim() != image {
        errors.invalid(
            format!("{path}.image"),
            image,
            "must not have leading or trailing whitespace",
        );
    }
    let policies = ["File", "FallbackToLogsOnError"];
    errors.one_of(
        &format!("{path}.terminationMessagePolicy"),
        &c["terminationMessagePolicy"],
        &policies,
    );
    ports(errors, &format!("{path}.ports"), &c["ports"]);
    environment(errors, path, c);
    volume::mounts(errors, path, c, volumes);
    errors.one_of(
        &format!("{path}.imagePullPolicy"),
        &c["imagePullPolicy"],
        &["Always", "IfNotPresent", "Never"],
    );
    resources(errors, &format!("{path}.resources"), &c["resources"]);
}

fn ports(errors: &mut Errors, path: &str, ports: &Value) {
    let mut taken = BTreeSet::new();
    for (i, port) in list(ports).iter().enumerate() {
        let at = |field: &str| format!("{path}[{i}].{field}");
        let name = text(port, "name");
        if !name.is_empty() {
            let wrong = names::port_name(name);
            if !wrong.is_empty() {
                errors.messages(&at("name"), name, wrong);
            } else if !taken.insert(name) {
                errors.push(FieldError::duplicate(at("name"), name));
            }
        }
        match port["containerPort"].as_i64() {
            None | Some(0) => errors.required(at("containerPort"), ""),
            Some(_) => errors.port_number(&at("containerPort"), &port["containerPort"]),
        }
        if port["hostPort"].as_i64().is_some_and(|p| p != 0) {
            errors.port_number(&at("hostPort"), &port["hostPort"]);
        }
        errors.one_of(&at("protocol"), &port["protocol"], &PROTOCOLS);
    }
}

fn host_ports(errors: &mut Errors, path: &str, containers: &[Value]) {
    let mut taken = BTreeSet::new();
    for (i, c) in containers.iter().enumerate() {
        for (j, port) in list(&c["ports"]).iter().enumerate() {
            let Some(number) = port["hostPort"].as_i64().filter(|p| *p != 0) else {
                continue;
            };
            let key = format!("{}/{}/{number}", text(port, "protocol"), text(port, "hostIP"));
            if !taken.insert(key.clone()) {
                errors.push(FieldError::duplicate(format!("{path}[{i}].ports[{j}].hostPort"), key));
            }
        }
    }
}

fn environment(errors: &mut Errors, path: &str, c: &Value) {
    const SOURCES: [&str; 5] = [
        "fieldRef",
        "resourceFieldRef",
        "configMapKeyRef",
        "secretKeyRef",
        "fileKeyRef",
    ];
    for (i, env) in list(&c["env"]).iter().enumerate() {
        let path = format!("{path}.env[{i}]");
        match text(env, "name") {
            "" => errors.required(format!("{path}.name"), ""),
            name => errors.messages(&format!("{path}.name"), name, names::env_name(name)),
        }
        let from = &env["valueFrom"];
        if from.is_null() {
            continue;
        }
        let path = format!("{path}.valueFrom");
        let sources = SOURCES.iter().filter(|s| !from[**s].is_null()).count();
        if sources == 0 {
            let detail = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`";
            errors.invalid(&path, "", detail);
        } else if !text(env, "value").is_empty() {
            errors.invalid(&path, "", "may not be specified when `value` is not empty");
        } else if sources > 1 {
            errors.invalid(&path, "", "may not have more than one field specified at a time");
        }
        for source in ["configMapKeyRef", "secretKeyRef"] {
            if let Some(reference) = from.get(source) {
                match text(reference, "key") {
                    "" => errors.required(format!("{path}.{source}.key"), ""),
                    key => errors.messages(&format!("{path}.{source}.key"), key, names::config_key(key)),
                }
            }
        }
        if let Some(reference) = from.get("fieldRef") {
            field_path(errors, &format!("{path}.fieldRef"), text(reference, "fieldPath"));
        }
        if from["resourceFieldRef"].is_object() && text(&from["resourceFieldRef"], "resource").is_empty() {
            errors.required(format!("{path}.resourceFieldRef.resource"), "");
        }
    }
    for (i, from) in list(&c["envFrom"]).iter().enumerate() {
        let path = format!("{path}.envFrom");
        let prefix = text(from, "prefix");
        if !prefix.is_empty() {
            errors.messages(&format!("{path}[{i}].prefix"), prefix, names::env_name(prefix));
        }
        match [&from["configMapRef"], &from["secretRef"]]
            .iter()
            .filter(|s| s.is_object())
            .count()
        {
            0 => errors.invalid(path, "", "must specify one of: `configMapRef` or `secretRef`"),
            1 => {}
            _ => errors.invalid(path, "", "may not have more than one field specified at a time"),
        }
    }
}

/// A field of the pod that an environment variable may show.
fn field_path(errors: &mut Errors, path: &str, field: &str) {
    const KNOWN: [&str; 9] = [
        "metadata.name",
        "metadata.namespace",
        "metadata.uid",
        "spec.hostIPs",
        "spec.nodeName",
        "spec.serviceAccountName",
        "status.hostIP",
        "status.hostIPs",
        "status.podIP",
    ];
    let subscript = ["metadata.labels['", "metadata.annotations['"]
        .iter()
        .any(|p| field.starts_with(p))
        && field.ends_with("']");
    match field {
        "" => errors.required(format!("{path}.fieldPath"), ""),
        _ if subscript || KNOWN.contains(&field) || field == "status.podIPs" => {}
        _ => errors.push(FieldError::not_supported(
            format!("{path}.fieldPath"),
            field,
            &[
                "metadata.name",
                "metadata.namespace",
                "metadata.uid",
                "spec.nodeName",
                "spec.serviceAccountName",
                "status.hostIP",
                "status.hostIPs",
                "status.podIP",
                "status.podIPs",
            ],
        )),
    }
}

/// Requests and limits.
pub(super) fn resources(errors: &mut Errors, path: &str, resources: &Value) {
    let parse = |v: &Value| v.as_str().and_then(|s| Quantity::parse(s).ok());
    for list in ["limits", "requests"] {
        for (name, value) in resources[list].as_object().into_iter().flatten() {
            let at = format!("{path}.{list}[{name}]");
            resource_name(errors, &at, name);
            let Some(quantity) = parse(value) else { continue };
            if quantity.is_negative() {
                errors.invalid(&at, value.clone(), "must be greater than or equal to 0");
            }
            if name.contains('/') && quantity.milli() % 1000 != 0 {
                errors.invalid(&at, value.clone(), "must be an integer");
            }
        }
    }
    for (name, value) in resources["requests"].as_object().into_iter().flatten() {
        let at = format!("{path}.requests");
        let overcommit = !name.contains('/') && !name.starts_with("hugepages-");
        match (parse(value), parse(&resources["limits"][name])) {
            (Some(request), Some(limit)) if request != limit && !overcommit => {
                let detail = format!("must be equal to {name} limit of {limit}");
                errors.invalid(at, request.to_string(), &detail);
            }
            (Some(request), Some(limit)) if request > limit => {
                let detail = format!("must be less than or equal to {name} limit of {limit}");
                errors.invalid(at, request.to_string(), &detail);
            }
            (Some(_), None) if !overcommit => {
                errors.required(
                    format!("{path}.limits"),
                    "Limit must be set for non overcommitable resources",
                );
            }
            _ => {}
        }
    }
}

fn resource_name(errors: &mut Errors, path: &str, name: &str) {
    let wrong = names::qualified(name);
    if !wrong.is_empty() {
        errors.messages(path, name, wrong);
        return;
    }
    let standard = matches!(name, "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-");
    if !name.contains('/') && !standard {
        errors.invalid(path, name, "must be a standard resource type or fully qualified");
        errors.invalid(path, name, "must be a standard resource for containers");
    }
}

pub(super) fn tolerations(errors: &mut Errors, path: &str, tolerations: &Value) {
    for (i, t) in list(tolerations).iter().enumerate() {
        let at = |field: &str| format!("{path}[{i}].{field}");
        let (key, operator, value, effect) = (text(t, "key"), text(t, "operator"), text(t, "value"), text(t, "effect"));
        if !key.is_empty() {
            errors.messages(&at("key"), key, names::qualified(key));
        } else if operator != "Exists" {
            let detail = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
            errors.invalid(at("operator"), operator, detail);
        }
        if !t["tolerationSeconds"].is_null() && effect != "NoExecute" {
            errors.invalid(
                at("effect"),
                effect,
                "effect must be 'NoExecute' when `tolerationSeconds` is set",
            );
        }
        match operator {
            "" | "Equal" => {
                let wrong = names::label_value(value);
                if !wrong.is_empty() {
                    errors.invalid(at("operator"), value, &wrong.join(";"));
                }
            }
            "Exists" if value.is_empty() => {}
            "Exists" => errors.invalid(at("operator"), value, "value must be empty when `operator` is 'Exists'"),
            other => errors.push(FieldError::not_supported(at("operator"), other, &["Equal", "Exists"])),
        }
        taint_effect(errors, &at("effect"), effect, true);
    }
}

pub(super) fn taint_effect(errors: &mut Errors, path: &str, effect: &str, may_be_empty: bool) {
    const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
    match effect {
        "" if may_be_empty => {}
        "" => errors.required(path, ""),
        e if EFFECTS.contains(&e) => {}
        e => errors.push(FieldError::not_supported(path, e, &EFFECTS)),
    }
}

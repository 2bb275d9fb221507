//! Columns and cells of the other built-in kinds.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use super::{Column, age, int, list, since, text};
use crate::meta;

const NAME: Column = ("Name", "string", 0);
const AGE: Column = ("Age", "string", 0);

const fn shown(name: &'static str) -> Column {
    (name, "string", 0)
}

const fn wide(name: &'static str) -> Column {
    (name, "string", 1)
}

const fn number(name: &'static str) -> Column {
    (name, "integer", 0)
}

/// Most addresses or ports in one cell.
const LISTED_MAX: usize = 3;

pub(super) fn columns(group: &str, plural: &str) -> &'static [Column] {
    const BINDING: &[Column] = &[
        NAME,
        shown("Role"),
        AGE,
        wide("Users"),
        wide("Groups"),
        wide("ServiceAccounts"),
    ];
    match (group, plural) {
        ("", "pods") => {
            const {
                &[
                    NAME,
                    shown("Ready"),
                    shown("Status"),
                    shown("Restarts"),
                    AGE,
                    wide("IP"),
                    wide("Node"),
                    wide("Nominated Node"),
                    wide("Readiness Gates"),
                ]
            }
        }
        ("", "nodes") => {
            const {
                &[
                    NAME,
                    shown("Status"),
                    shown("Roles"),
                    AGE,
                    shown("Version"),
                    wide("Internal-IP"),
                    wide("External-IP"),
                    wide("OS-Image"),
                    wide("Kernel-Version"),
                    wide("Container-Runtime"),
                ]
            }
        }
        ("", "services") => {
            const {
                &[
                    NAME,
                    shown("Type"),
                    shown("Cluster-IP"),
                    shown("External-IP"),
                    shown("Port(s)"),
                    AGE,
                    wide("Selector"),
                ]
            }
        }
        ("", "endpoints") => const { &[NAME, shown("Endpoints"), AGE] },
        ("", "namespaces") => const { &[NAME, shown("Status"), AGE] },
        ("", "secrets") => const { &[NAME, shown("Type"), shown("Data"), AGE] },
        ("", "configmaps") => const { &[NAME, shown("Data"), AGE] },
        ("", "serviceaccounts") => const { &[NAME, AGE] },
        ("" | "events.k8s.io", "events") => {
            const {
                &[
                    shown("Last Seen"),
                    shown("Type"),
                    shown("Reason"),
                    shown("Object"),
                    wide("Subobject"),
                    wide("Source"),
                    shown("Message"),
                    wide("First Seen"),
                    wide("Count"),
                    wide("Name"),
                ]
            }
        }
        ("apps", "deployments") => {
            const {
                &[
                    NAME,
                    shown("Ready"),
                    shown("Up-to-date"),
                    shown("Available"),
                    AGE,
                    wide("Containers"),
                    wide("Images"),
                    wide("Selector"),
                ]
            }
        }
        ("apps", "replicasets") => {
            const {
                &[
                    NAME,
                    number("Desired"),
                    number("Current"),
                    number("Ready"),
                    AGE,
                    wide("Containers"),
                    wide("Images"),
                    wide("Selector"),
                ]
            }
        }
        ("coordination.k8s.io", "leases") => const { &[NAME, shown("Holder"), AGE] },
        ("discovery.k8s.io", "endpointslices") => {
            const { &[NAME, shown("AddressType"), shown("Ports"), shown("Endpoints"), AGE] }
        }
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => BINDING,
        _ => super::classes::columns(group, plural).unwrap_or(const { &[NAME, ("Created At", "date", 0)] }),
    }
}

pub(super) fn cells(group: &str, plural: &str, o: &Value, now: Timestamp) -> Vec<Value> {
    let name = || Value::from(meta::name(o));
    let age = || age(o, now);
    match (group, plural) {
        ("", "pods") => super::pod::cells(o, now),
        ("", "nodes") => node(o, now),
        ("", "services") => vec![
            name(),
            text(o, &["spec", "type"]).into(),
            list(o, &["spec", "clusterIPs"])
                .first()
                .and_then(Value::as_str)
                .unwrap_or("<none>")
                .into(),
            external_ip(o).into(),
            service_ports(o).into(),
            age(),
            map_text(&o["spec"]["selector"]).into(),
        ],
        ("", "endpoints") => vec![name(), endpoints(o).into(), age()],
        ("", "namespaces") => vec![name(), text(o, &["status", "phase"]).into(), age()],
        ("", "secrets") => vec![name(), text(o, &["type"]).into(), size(&o["data"]).into(), age()],
        ("", "configmaps") => vec![name(), (size(&o["data"]) + size(&o["binaryData"])).into(), age()],
        ("", "serviceaccounts") => vec![name(), age()],
        ("" | "events.k8s.io", "events") => event(o, now),
        ("apps", "deployments") => {
            let (containers, images) = containers(o);
            vec![
                name(),
                format!(
                    "{}/{}",
                    int(o, &["status", "readyReplicas"]),
                    int(o, &["spec", "replicas"])
                )
                .into(),
                int(o, &["status", "updatedReplicas"]).into(),
                int(o, &["status", "availableReplicas"]).into(),
                age(),
                containers.into(),
                images.into(),
                selector(o).into(),
            ]
        }
        ("apps", "replicasets") => {
            let (containers, images) = containers(o);
            vec![
                name(),
                int(o, &["spec", "replicas"]).into(),
                int(o, &["status", "replicas"]).into(),
                int(o, &["status", "readyReplicas"]).into(),
                age(),
                containers.into(),
                images.into(),
                selector(o).into(),
            ]
        }
        ("coordination.k8s.io", "leases") => vec![name(), text(o, &["spec", "holderIdentity"]).into(), age()],
        ("discovery.k8s.io", "endpointslices") => {
            let port = |p: &Value| match p["port"].as_i64() {
                Some(n) => n.to_string(),
                None => p["name"].as_str().unwrap_or("*").to_owned(),
            };
            let addresses = list(o, &["endpoints"]).iter().flat_map(|e| list(e, &["addresses"]));
            vec![
                name(),
                text(o, &["addressType"]).into(),
                some_of(list(o, &["ports"]).iter().map(port), "<unset>").into(),
                some_of(addresses.filter_map(|a| a.as_str().map(str::to_owned)), "<unset>").into(),
                age(),
            ]
        }
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => binding(o, now),
        _ => super::classes::cells(group, plural, o, now)
            .unwrap_or_else(|| vec![name(), meta::creation_timestamp(o).into()]),
    }
}

fn node(o: &Value, now: Timestamp) -> Vec<Value> {
    let ready = list(o, &["status", "conditions"]).iter().find(|c| c["type"] == "Ready");
    let mut status = match ready {
        Some(c) if c["status"] == "True" => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if o["spec"]["unschedulable"] == true {
        status.push_str(",SchedulingDisabled");
    }
    let mut roles = BTreeSet::new();
    for (key, value) in meta::labels(o) {
        if let Some(role) = key.strip_prefix("node-role.kubernetes.io/").filter(|r| !r.is_empty()) {
            roles.insert(role);
        } else if key == "kubernetes.io/role" && !value.is_empty() {
            roles.insert(value);
        }
    }
    let roles = roles.into_iter().collect::<Vec<_>>().join(",");
    let address = |ty: &str| {
        let found = list(o, &["status", "addresses"]).iter().find(|a| a["type"] == ty);
        found.map_or("<none>", |a| text(a, &["address"])).to_owned()
    };
    let info = |key: &str| match text(o, &["status", "nodeInfo", key]) {
        "" => "<unknown>".to_owned(),
        t => t.to_owned(),
    };
    let kernel = match text(o, &["status", "nodeInfo", "architecture"]) {
        "" => info("kernelVersion"),
        arch => format!("{} ({arch})", info("kernelVersion")),
    };
    vec![
        meta::name(o).into(),
        status.into(),
        if roles.is_empty() {
            "<none>".into()
        } else {
            roles.into()
        },
        age(o, now),
        text(o, &["status", "nodeInfo", "kubeletVersion"]).into(),
        address("InternalIP").into(),
        address("ExternalIP").into(),
        info("osImage").into(),
        kernel.into(),
        info("containerRuntimeVersion").into(),
    ]
}

fn external_ip(o: &Value) -> String {
    let given: Vec<&str> = list(o, &["spec", "externalIPs"])
        .iter()
        .filter_map(Value::as_str)
        .collect();
    match text(o, &["spec", "type"]) {
        "ClusterIP" | "NodePort" if given.is_empty() => "<none>".into(),
        "ClusterIP" | "NodePort" => given.join(","),
        "LoadBalancer" => {
            let frontends: BTreeSet<&str> = list(o, &["status", "loadBalancer", "ingress"])
                .iter()
                .map(|i| {
                    if text(i, &["ip"]).is_empty() {
                        text(i, &["hostname"])
                    } else {
                        text(i, &["ip"])
                    }
                })
                .filter(|a| !a.is_empty())
                .collect();
            let all: Vec<&str> = frontends.into_iter().chain(given).collect();
            if all.is_empty() {
                "<pending>".into()
            } else {
                all.join(",")
            }
        }
        "ExternalName" => text(o, &["spec", "externalName"]).into(),
        _ => "<unknown>".into(),
    }
}

fn service_ports(o: &Value) -> String {
    let one = |p: &Value| {
        let protocol = text(p, &["protocol"]);
        match (int(p, &["port"]), int(p, &["nodePort"])) {
            (port, 0) => format!("{port}/{protocol}"),
            (port, node) => format!("{port}:{node}/{protocol}"),
        }
    };
    let all: Vec<String> = list(o, &["spec", "ports"]).iter().map(one).collect();
    if all.is_empty() { "<none>".into() } else { all.join(",") }
}

fn endpoints(o: &Value) -> String {
    let subsets = list(o, &["subsets"]);
    let mut all = Vec::new();
    for subset in subsets {
        let ips: Vec<&str> = list(subset, &["addresses"]).iter().map(|a| text(a, &["ip"])).collect();
        let ports = list(subset, &["ports"]);
        if ports.is_empty() {
            all.extend(ips.iter().map(|ip| (*ip).to_owned()));
        }
        for port in ports {
            let number = int(port, &["port"]);
            let joined = |ip: &&str| {
                if ip.contains(':') {
                    format!("[{ip}]:{number}")
                } else {
                    format!("{ip}:{number}")
                }
            };
            all.extend(ips.iter().map(joined));
        }
    }
    if subsets.is_empty() {
        "<none>".into()
    } else {
        some_of(all.into_iter(), "")
    }
}

/// The first few, and how many more.
fn some_of(all: impl Iterator<Item = String>, none: &str) -> String {
    let all: Vec<String> = all.collect();
    if all.is_empty() {
        return none.into();
    }
    let first = all[..all.len().min(LISTED_MAX)].join(",");
    match all.len().saturating_sub(LISTED_MAX) {
        0 => first,
        more => format!("{first} + {more} more..."),
    }
}

fn event(o: &Value, now: Timestamp) -> Vec<Value> {
    let either = |old: &[&'static str], new: &[&'static str]| {
        let first = text(o, old);
        if first.is_empty() {
            text(o, new).to_owned()
        } else {
            first.to_owned()
        }
    };
    let present = |t: String| Some(t).filter(|t| !t.is_empty());
    let first_at = present(either(&["firstTimestamp"], &["deprecatedFirstTimestamp"]));
    let first = since(first_at.or(present(text(o, &["eventTime"]).into())).as_deref(), now);
    let last_at = present(either(&["lastTimestamp"], &["deprecatedLastTimestamp"]));
    let mut last = last_at.map_or(first.clone(), |t| since(Some(&t), now));
    let mut count = int(o, &["count"]).max(int(o, &["deprecatedCount"])).max(1);
    if o["series"].is_object() {
        last = since(Some(text(o, &["series", "lastObservedTime"])), now);
        count = int(o, &["series", "count"]);
    }
    let about = if o["involvedObject"].is_object() {
        &o["involvedObject"]
    } else {
        &o["regarding"]
    };
    let kind = text(about, &["kind"]).to_lowercase();
    let target = match text(about, &["name"]) {
        "" => kind,
        name => format!("{kind}/{name}"),
    };
    let component = [["source", "component"], ["deprecatedSource", "component"]].map(|p| text(o, &p));
    let host = [["source", "host"], ["deprecatedSource", "host"]].map(|p| text(o, &p));
    let reporter = [text(o, &["reportingComponent"]), text(o, &["reportingController"])];
    let first_of = |all: &[&str]| all.iter().find(|t| !t.is_empty()).unwrap_or(&"").to_string();
    let component = first_of(&[component, reporter].concat());
    let host = first_of(&[&host[..], &[text(o, &["reportingInstance"])]].concat());
    let source = if host.is_empty() {
        component
    } else {
        format!("{component}, {host}")
    };
    let message = either(&["message"], &["note"]);
    vec![
        last.into(),
        text(o, &["type"]).into(),
        text(o, &["reason"]).into(),
        target.into(),
        text(about, &["fieldPath"]).into(),
        source.into(),
        message.trim().into(),
        first.into(),
        count.into(),
        meta::name(o).into(),
    ]
}

fn binding(o: &Value, now: Timestamp) -> Vec<Value> {
    let subjects = |kind: &str| {
        let of = list(o, &["subjects"]).iter().filter(|s| s["kind"] == kind);
        let shown = of.map(|s| match (kind, text(s, &["namespace"])) {
            ("ServiceAccount", ns) if !ns.is_empty() => format!("{ns}/{}", text(s, &["name"])),
            _ => text(s, &["name"]).to_owned(),
        });
        shown.collect::<Vec<_>>().join(", ")
    };
    let role = format!("{}/{}", text(o, &["roleRef", "kind"]), text(o, &["roleRef", "name"]));
    vec![
        meta::name(o).into(),
        role.into(),
        age(o, now),
        subjects("User").into(),
        subjects("Group").into(),
        subjects("ServiceAccount").into(),
    ]
}

pub(super) fn containers(o: &Value) -> (String, String) {
    let all = list(o, &["spec", "template", "spec", "containers"]);
    let join = |key: &str| all.iter().map(|c| text(c, &[key])).collect::<Vec<_>>().join(",");
    (join("name"), join("image"))
}

pub(super) fn selector(o: &Value) -> String {
    match crate::selector::LabelSelector::from_object(&o["spec"]["selector"]) {
        Ok(s) if s.is_everything() => "<none>".into(),
        Ok(s) => s.to_string(),
        Err(_) => "<invalid>".into(),
    }
}

pub(super) fn map_text(map: &Value) -> String {
    let pairs: Vec<String> = map
        .as_object()
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
        .collect();
    if pairs.is_empty() {
        "<none>".into()
    } else {
        pairs.join(",")
    }
}

fn size(map: &Value) -> usize {
    map.as_object().map_or(0, |m| m.len())
}

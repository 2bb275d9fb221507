//! What every cluster has from its first moment: namespaces, roles, bindings, the `kubernetes` service.
//!
//! Written in as few transactions as the store allows, one on the local engine; on reopening only what is missing is
//! added, rules and subjects of default roles included, so an administrator's changes stay, and a server that stopped
//! half-way is finished by the next.

use std::sync::Arc;

use apimachinery::validate::SYSTEM_PRIORITIES;
use apimachinery::{defaults, meta};
use serde_json::{Value, json};
use store::{Check, Op};

use super::roles::{RBAC, autoupdate, cluster_bindings, cluster_roles, defaults_label};
use super::rules_of;
use crate::admission::{addresses, allocation_keys};
use crate::cluster::Cluster;
use crate::handlers::write;
use crate::object::Encoded;
use crate::strategy;

const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// Operations of one object with its claims, at most.
const OBJECT_OPS_MAX: usize = 8;
/// Attempts while other servers of the same cluster write the same.
const ATTEMPTS_MAX: usize = 16;

/// Writes what is missing.
pub async fn ensure(cluster: &Arc<Cluster>) -> Result<(), store::Error> {
    let mut attempt = 1;
    loop {
        match write_missing(cluster).await {
            Err(error) if error.is_conflict() && attempt < ATTEMPTS_MAX => {
                cluster.keyspace.sync().await?;
                attempt += 1;
            }
            done => return done,
        }
    }
}

async fn write_missing(cluster: &Arc<Cluster>) -> Result<(), store::Error> {
    let mut objects: Vec<(&str, &str, &str, Value)> = Vec::new();
    for name in NAMESPACES {
        objects.push(("", "v1", "namespaces", json!({"metadata": {"name": name}})));
    }
    for (name, value, description) in SYSTEM_PRIORITIES {
        let class = json!({"metadata": {"name": name}, "value": value, "description": description});
        objects.push(("scheduling.k8s.io", "v1", "priorityclasses", class));
    }
    for (name, labels, rules, aggregation) in cluster_roles() {
        let mut role =
            json!({"metadata": {"name": name, "labels": labels, "annotations": autoupdate()}, "rules": rules});
        if !aggregation.is_null() {
            role["aggregationRule"] = aggregation;
        }
        objects.push((RBAC, "v1", "clusterroles", role));
    }
    // Several subjects of one binding come one after the other.
    let mut bindings: Vec<(String, String, Vec<Value>)> = Vec::new();
    for (name, role, subject) in cluster_bindings() {
        match bindings.iter_mut().find(|(n, ..)| *n == name) {
            Some((.., subjects)) => subjects.push(subject),
            None => bindings.push((name, role, vec![subject])),
        }
    }
    for (name, role, subjects) in bindings {
        objects.push((
            RBAC,
            "v1",
            "clusterrolebindings",
            json!({
            "metadata": {"name": name, "labels": defaults_label(), "annotations": autoupdate()},
            "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": role}, "subjects": subjects}),
        ));
    }
    let range = cluster.service_range.to_string();
    objects.push((
        "networking.k8s.io",
        "v1",
        "servicecidrs",
        json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": [range]}}),
    ));
    let range_first = cluster.service_range.nth(1).map(|ip| ip.to_string());
    if let (Some(ip), Some(endpoint)) = (range_first, cluster.config.endpoint()) {
        objects.push(("", "v1", "services", json!({
            "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"component": "apiserver", "provider": "kubernetes"}},
            "spec": {"type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster", "sessionAffinity": "None",
                "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": endpoint.port()}]}})));
        let service = json!({"metadata": {"name": "kubernetes", "namespace": "default"}});
        objects.push((
            "networking.k8s.io",
            "v1",
            "ipaddresses",
            addresses::object(&ip, &service),
        ));
        objects.push((
            "",
            "v1",
            "endpoints",
            json!({
            "metadata": {"name": "kubernetes", "namespace": "default",
                "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
            "subsets": [{"addresses": [{"ip": endpoint.ip()}],
                "ports": [{"name": "https", "port": endpoint.port(), "protocol": "TCP"}]}]}),
        ));
        objects.push(("discovery.k8s.io", "v1", "endpointslices", json!({
            "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": if endpoint.is_ipv4() { "IPv4" } else { "IPv6" },
            "endpoints": [{"addresses": [endpoint.ip()], "conditions": {"ready": true}}],
            "ports": [{"name": "https", "port": endpoint.port(), "protocol": "TCP"}]})));
    }

    let (mut checks, mut ops) = (Vec::new(), Vec::new());
    for (group, version, plural, mut value) in objects {
        let Some(served) = cluster.resource(group, version, plural) else {
            continue;
        };
        let (namespace, name) = (meta::namespace(&value).to_owned(), meta::name(&value).to_owned());
        let present = served.resource.get(&namespace, &name);
        if let Some(present) = &present {
            // The API's own endpoint follows the server; default roles and bindings gain what they lack; everything else
            // stays as it is.
            let old = present.value();
            match plural {
                "endpoints" | "endpointslices" if !same_content(&old, &value) => {}
                "clusterroles" | "clusterrolebindings" => match reconciled(&old, &value) {
                    Some(new) => value = new,
                    None => continue,
                },
                _ => continue,
            }
        }
        value["apiVersion"] = served.info.api_version().into();
        value["kind"] = served.info.kind.clone().into();
        let created = present.as_ref().map(|p| p.value());
        let (uid, since) = match &created {
            Some(old) => (meta::uid(old).to_owned(), meta::creation_timestamp(old).to_owned()),
            None => (cluster.new_uid(), write::now(cluster)),
        };
        value["metadata"]["uid"] = uid.into();
        value["metadata"]["creationTimestamp"] = since.into();
        if strategy::has_generation(&served.info) {
            value["metadata"]["generation"] = (created.as_ref().map_or(0, meta::generation) + 1).into();
        }
        strategy::prepare_create(&served, &mut value);
        defaults::apply(&served.info.gvk, &mut value);
        if plural == "services" {
            for key in allocation_keys(&value) {
                ops.push(Op::put(key, "default/kubernetes"));
            }
        }
        let encoded = Encoded::new(&value, served.resource.fields);
        let key = served.resource.store_key(&namespace, &name);
        checks.push(Check::at(key.clone(), present.map_or(0, |p| p.rv)));
        ops.push(Op::put(key, encoded.bytes.clone()).with(Arc::new(encoded)));
        if ops.len() + OBJECT_OPS_MAX > cluster.keyspace.txn_ops_max() {
            let full = (std::mem::take(&mut checks), std::mem::take(&mut ops));
            cluster.keyspace.txn(full.0, full.1).await?;
        }
    }
    if ops.is_empty() {
        return Ok(());
    }
    cluster.keyspace.txn(checks, ops).await.map(|_| ())
}

/// A default role or binding with the rules and subjects that it lacks; `None` if it lacks none, or an administrator said
/// hands off (`autoupdate: "false"`). Nothing is taken away.
/// # Source
/// `pkg/registry/rbac/reconciliation` of Kubernetes 1.36.
fn reconciled(old: &Value, wanted: &Value) -> Option<Value> {
    if meta::annotation(old, "rbac.authorization.kubernetes.io/autoupdate") != Some("true") {
        return None;
    }
    let mut new = old.clone();
    // The rules of an aggregated role are those it selects.
    let held = rules_of(old);
    if old["aggregationRule"].is_null() && wanted["aggregationRule"].is_null() {
        for (rule, value) in rules_of(wanted).iter().zip(wanted["rules"].as_array()?) {
            if !rule.atoms().iter().all(|atom| held.iter().any(|h| h.covers(atom))) {
                push(&mut new, "rules", value);
            }
        }
    }
    for subject in wanted["subjects"].as_array().into_iter().flatten() {
        let same = |s: &Value| ["kind", "name", "namespace"].iter().all(|k| s[*k] == subject[*k]);
        if !old["subjects"].as_array().is_some_and(|all| all.iter().any(same)) {
            push(&mut new, "subjects", subject);
        }
    }
    (new != *old).then_some(new)
}

fn push(object: &mut Value, list: &str, item: &Value) {
    if !object[list].is_array() {
        object[list] = json!([]);
    }
    if let Some(list) = object[list].as_array_mut() {
        list.push(item.clone());
    }
}

fn same_content(old: &Value, new: &Value) -> bool {
    ["subsets", "endpoints", "ports"]
        .iter()
        .all(|key| old.get(*key) == new.get(*key))
}

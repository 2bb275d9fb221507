//! Discovery documents: what a server serves, in the aggregated (v2) and the legacy form, derived from the table.

use base64::Engine as _;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::gvk::{Gvk, api_version};
use crate::table::{ResourceInfo, TypeTable};

/// `apiVersion` of the aggregated documents.
pub const AGGREGATED_API_VERSION: &str = "apidiscovery.k8s.io/v2";

/// Aggregated discovery of `/api`: the core group.
pub fn aggregated_api(table: &TypeTable) -> Value {
    aggregated(table, |group| group.is_empty())
}

/// Aggregated discovery of `/apis`: every other group.
pub fn aggregated_apis(table: &TypeTable) -> Value {
    aggregated(table, |group| !group.is_empty())
}

/// Legacy `/api`. `server_address` is `host:port` as clients reach this server.
pub fn api_versions(server_address: &str) -> Value {
    json!({
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{ "clientCIDR": "0.0.0.0/0", "serverAddress": server_address }],
    })
}

/// Legacy `/apis`.
pub fn api_group_list(table: &TypeTable) -> Value {
    let groups: Vec<Value> = groups(table)
        .iter()
        .filter(|(g, _)| !g.is_empty())
        .map(|(g, v)| group(g, v))
        .collect();
    json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups })
}

/// Legacy `/apis/<group>`; `None` if no such group is served.
pub fn api_group(table: &TypeTable, name: &str) -> Option<Value> {
    let (_, versions) = groups(table).into_iter().find(|(g, _)| !g.is_empty() && *g == name)?;
    let mut out = group(name, &versions);
    out["kind"] = "APIGroup".into();
    out["apiVersion"] = "v1".into();
    Some(out)
}

/// Legacy `/api/v1` and `/apis/<group>/<version>`; `None` if not served.
pub fn resource_list(table: &TypeTable, group: &str, version: &str) -> Option<Value> {
    let mut resources = Vec::new();
    for r in table.resources().filter(|r| r.group == group && r.version == version) {
        let mut main = json!({
            "name": r.plural, "singularName": r.singular, "namespaced": r.namespaced, "kind": r.kind, "verbs": r.verbs,
        });
        optional_names(&mut main, r);
        if r.has_verb("get") {
            main["storageVersionHash"] = storage_hash(r).into();
        }
        resources.push(main);
        for s in &r.subresources {
            let mut sub = json!({
                "name": format!("{}/{}", r.plural, s.name), "singularName": "", "namespaced": r.namespaced,
                "kind": &*s.kind.kind, "verbs": s.verbs,
            });
            if (&*s.kind.group, &*s.kind.version) != (group, version) {
                sub["group"] = (&*s.kind.group).into();
                sub["version"] = (&*s.kind.version).into();
            }
            resources.push(sub);
        }
    }
    if resources.is_empty() {
        return None;
    }
    let mut out = json!({
        "kind": "APIResourceList", "groupVersion": api_version(group, version), "resources": resources,
    });
    if !group.is_empty() {
        out["apiVersion"] = "v1".into();
    }
    Some(out)
}

/// Order of a group's versions, best first: stable before beta before alpha, later before earlier, and then all names
/// that are not of that form, by text.
pub fn compare_versions(a: &str, b: &str) -> std::cmp::Ordering {
    /// Stability (stable is greatest), number, number of the beta or alpha.
    fn parse(version: &str) -> Option<(u8, u64, u64)> {
        let rest = version.strip_prefix('v')?;
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let major = rest[..end].parse().ok()?;
        let (stability, minor) = match &rest[end..] {
            "" => return Some((2, major, 0)),
            tail => match (tail.strip_prefix("beta"), tail.strip_prefix("alpha")) {
                (Some(minor), _) => (1, minor),
                (_, Some(minor)) => (0, minor),
                _ => return None,
            },
        };
        Some((stability, major, minor.parse().ok()?))
    }
    match (parse(a), parse(b)) {
        (Some(x), Some(y)) => y.cmp(&x),
        (Some(_), None) => std::cmp::Ordering::Less,
        (None, Some(_)) => std::cmp::Ordering::Greater,
        (None, None) => a.cmp(b),
    }
}

/// Served groups with their versions, in the table's order; the first version is the preferred one.
pub fn groups(table: &TypeTable) -> Vec<(&str, Vec<&str>)> {
    let mut out: Vec<(&str, Vec<&str>)> = Vec::new();
    for r in table.resources() {
        match out.iter_mut().find(|(g, _)| *g == r.group) {
            Some((_, versions)) if versions.contains(&r.version.as_str()) => {}
            Some((_, versions)) => versions.push(&r.version),
            None => out.push((&r.group, vec![&r.version])),
        }
    }
    out
}

fn group(name: &str, versions: &[&str]) -> Value {
    let entry = |v: &&str| json!({ "groupVersion": api_version(name, v), "version": v });
    let all: Vec<Value> = versions.iter().map(entry).collect();
    json!({ "name": name, "versions": all, "preferredVersion": versions.first().map(entry) })
}

fn aggregated(table: &TypeTable, wanted: impl Fn(&str) -> bool) -> Value {
    let mut items = Vec::new();
    for (group, versions) in groups(table).into_iter().filter(|(g, _)| wanted(g)) {
        let versions: Vec<Value> = versions
            .into_iter()
            .map(|version| {
                let of = |r: &&ResourceInfo| r.group == group && r.version == version;
                let resources: Vec<Value> = table.resources().filter(of).map(aggregated_resource).collect();
                json!({ "version": version, "resources": resources, "freshness": "Current" })
            })
            .collect();
        let metadata = if group.is_empty() {
            json!({})
        } else {
            json!({ "name": group })
        };
        items.push(json!({ "metadata": metadata, "versions": versions }));
    }
    json!({ "kind": "APIGroupDiscoveryList", "apiVersion": AGGREGATED_API_VERSION, "metadata": {}, "items": items })
}

fn aggregated_resource(r: &ResourceInfo) -> Value {
    // Group and version stay empty where they are the resource's own, but for those that a definition brought.
    let kind = |k: &Gvk| {
        let own = !r.custom && (&*k.group, &*k.version) == (r.group.as_str(), r.version.as_str());
        let (group, version) = if own { ("", "") } else { (&*k.group, &*k.version) };
        json!({ "group": group, "version": version, "kind": &*k.kind })
    };
    let mut out = json!({
        "resource": r.plural,
        "responseKind": kind(&r.gvk),
        "scope": if r.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": r.singular,
        "verbs": r.verbs,
    });
    optional_names(&mut out, r);
    if !r.subresources.is_empty() {
        let subs: Vec<Value> = r
            .subresources
            .iter()
            .map(|s| json!({ "subresource": s.name, "responseKind": kind(&s.kind), "verbs": s.verbs }))
            .collect();
        out["subresources"] = subs.into();
    }
    out
}

fn optional_names(out: &mut Value, r: &ResourceInfo) {
    let out: &mut Map<String, Value> = out.as_object_mut().expect("made as an object by the callers");
    if !r.short_names.is_empty() {
        out.insert("shortNames".into(), r.short_names.clone().into());
    }
    if !r.categories.is_empty() {
        out.insert("categories".into(), r.categories.clone().into());
    }
}

/// Identifies the stored form: equal for equal group, version and kind.
fn storage_hash(r: &ResourceInfo) -> String {
    let version = r.storage_version.as_ref().unwrap_or(&r.version);
    let digest = Sha256::digest(format!("{}/{version}/{}", r.group, r.kind));
    base64::engine::general_purpose::STANDARD.encode(&digest[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_stability_and_age() {
        let mut all = [
            "foo10",
            "v1",
            "v12alpha1",
            "v3beta1",
            "v11beta2",
            "v10beta3",
            "v2",
            "v10",
            "foo1",
            "v11alpha2",
        ];
        all.sort_by(|a, b| compare_versions(a, b));
        let want = [
            "v10",
            "v2",
            "v1",
            "v11beta2",
            "v10beta3",
            "v3beta1",
            "v12alpha1",
            "v11alpha2",
            "foo1",
            "foo10",
        ];
        assert_eq!(all, want);
    }

    #[test]
    fn both_forms_tell_the_same_resources() {
        let table = TypeTable::builtin();
        let core = aggregated_api(&table);
        let pods = core["items"][0]["versions"][0]["resources"].as_array().unwrap();
        let pods = pods.iter().find(|r| r["resource"] == "pods").unwrap();
        assert_eq!(pods["shortNames"], json!(["po"]));
        let eviction = pods["subresources"]
            .as_array()
            .unwrap()
            .iter()
            .find(|s| s["subresource"] == "eviction");
        assert_eq!(
            eviction.unwrap()["responseKind"],
            json!({"group": "policy", "version": "v1", "kind": "Eviction"})
        );
        let apps = resource_list(&table, "apps", "v1").unwrap();
        let names: Vec<&str> = apps["resources"]
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r["name"].as_str().unwrap())
            .collect();
        assert_eq!(
            names,
            [
                "controllerrevisions",
                "daemonsets",
                "daemonsets/status",
                "deployments",
                "deployments/scale",
                "deployments/status",
                "replicasets",
                "replicasets/scale",
                "replicasets/status"
            ]
        );
        assert_eq!(
            apps["resources"][3]["storageVersionHash"], "8aSe+NMegvE=",
            "upstream's hash of apps/v1 Deployment"
        );
        assert!(resource_list(&table, "apps", "v2").is_none());
        let listed = api_group_list(&table)["groups"].as_array().unwrap().len();
        assert_eq!(listed, aggregated_apis(&table)["items"].as_array().unwrap().len());
        assert_eq!(api_group(&table, "apps").unwrap()["preferredVersion"]["version"], "v1");
    }
}

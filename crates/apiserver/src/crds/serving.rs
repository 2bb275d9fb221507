//! From definitions to what is served.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::discovery::compare_versions;
use apimachinery::openapi::Documents;
use apimachinery::status::Status;
use apimachinery::table::KindDef;

use super::definition::Known;
use crate::cluster::Cluster;
use crate::served::{Api, ServedMap};

/// Serves exactly the established definitions beside what is built in. Resources that changed or went are retired.
pub fn publish(cluster: &Arc<Cluster>, known: &BTreeMap<String, Known>) -> Result<(), Status> {
    let builtin = &cluster.builtin;
    let mut served: ServedMap = builtin.served.clone();
    let mut kinds: Vec<KindDef> = Vec::new();
    for known in known.values().filter(|k| k.established) {
        let instances = cluster.registry.resource(&known.group, &known.accepted.plural);
        for version in known.versions.iter().filter(|v| v.served) {
            let kind = &version.kind;
            let key = (kind.group.clone(), kind.version.clone(), kind.plural.clone());
            // A built-in resource of that name comes first, as upstream's aggregator has it.
            if builtin.served.contains_key(&key) {
                continue;
            }
            served.insert(key, known.serve(version, &instances));
            kinds.push(kind.clone());
        }
    }
    let before = cluster.api();
    let same = before.served.len() == served.len()
        && served
            .iter()
            .all(|(key, new)| before.served.get(key).is_some_and(|old| Arc::ptr_eq(old, new)));
    if same {
        return Ok(());
    }
    kinds.sort_by(|a, b| {
        a.group
            .cmp(&b.group)
            .then_with(|| compare_versions(&a.version, &b.version))
            .then_with(|| a.plural.cmp(&b.plural))
    });
    let table = builtin
        .table
        .with_shallow(kinds)
        .map_err(|(kind, error)| Status::internal(&format!("the schema of {kind} cannot be used: {error}")))?;
    let documents = Arc::new(Documents::beside(
        table.clone(),
        builtin.documents.clone(),
        &before.documents,
    ));
    let api = Arc::new(Api {
        table,
        served,
        documents,
    });
    let old = cluster.serve_api(api.clone());
    for (key, served) in &old.served {
        if api.served.get(key).is_none_or(|new| !Arc::ptr_eq(new, served)) {
            served.retired.trigger();
        }
    }
    Ok(())
}

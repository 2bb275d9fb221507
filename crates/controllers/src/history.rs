//! ControllerRevisions: what the template of a set was, version by version, so that its pods can say which one they are of.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use reconcile::{Client, DeleteParams, Error, Key, Kind};
use serde_json::{Value, json};

use crate::common::{controller_reference, name_of, uid_of};
use crate::deployment::plan::template_hash;

/// Label of pods and revisions: the hash of the template.
pub const HASH: &str = "controller-revision-hash";

/// The data of a revision: a patch that puts the template in place.
fn data(template: &PodTemplateSpec) -> Value {
    let mut template = serde_json::to_value(template).unwrap_or_default();
    template["$patch"] = "replace".into();
    json!({"spec": {"template": template}})
}

fn same(revision: &ControllerRevision, data: &Value) -> bool {
    revision.data.as_ref().is_some_and(|d| d.0 == *data)
}

/// What to do about the history of a set. Pure.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// The newest revision is the template's: its hash.
    Current(String),
    /// An older revision is: it becomes the newest, with this number.
    Renumber(Arc<ControllerRevision>, i64),
    /// None is.
    Create(Box<ControllerRevision>),
}

/// Plans for `owner` over its revisions.
pub fn plan<K: Kind>(owner: &K, template: &PodTemplateSpec, revisions: &[Arc<ControllerRevision>]) -> Step {
    let data = data(template);
    let newest = revisions.iter().map(|r| r.revision).max().unwrap_or_default();
    let equal = revisions.iter().filter(|r| same(r, &data)).max_by_key(|r| r.revision);
    if let Some(equal) = equal {
        if equal.revision == newest {
            return Step::Current(hash_of(equal).to_owned());
        }
        return Step::Renumber(equal.clone(), newest + 1);
    }
    // Another template with the same hash is rare and only needs another salt.
    let hash = (0..)
        .map(|salt| template_hash(template, salt))
        .find(|hash| !revisions.iter().any(|r| hash_of(r) == hash))
        .unwrap_or_default();
    let meta = owner.metadata();
    let mut labels = template
        .metadata
        .as_ref()
        .and_then(|m| m.labels.clone())
        .unwrap_or_default();
    labels.insert(HASH.to_owned(), hash.clone());
    Step::Create(Box::new(ControllerRevision {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", name_of(owner))),
            namespace: meta.namespace.clone(),
            labels: Some(labels),
            owner_references: Some(vec![controller_reference(owner)]),
            ..ObjectMeta::default()
        },
        data: Some(RawExtension(data)),
        revision: newest + 1,
    }))
}

/// The hash a revision is of.
pub fn hash_of(revision: &ControllerRevision) -> &str {
    let labels = revision.metadata.labels.as_ref();
    labels.and_then(|l| l.get(HASH)).map_or("", String::as_str)
}

/// Revisions beyond `limit` that no pod is of, oldest first.
pub fn expendable(
    revisions: &[Arc<ControllerRevision>],
    in_use: impl Fn(&str) -> bool,
    limit: usize,
) -> Vec<Arc<ControllerRevision>> {
    let mut unused: Vec<_> = revisions.iter().filter(|r| !in_use(hash_of(r))).cloned().collect();
    unused.sort_by_key(|r| r.revision);
    unused.truncate(unused.len().saturating_sub(limit));
    unused
}

/// Carries out a step. `None`: something was written, and its event brings the next look.
pub async fn carry_out(client: &Client, key: &Key, step: Step) -> Result<Option<String>, Error> {
    match step {
        Step::Current(hash) => Ok(Some(hash)),
        Step::Renumber(revision, number) => {
            let mut update = (*revision).clone();
            update.revision = number;
            let _: ControllerRevision = client.update(Some(&key.ns), &update).await?;
            Ok(None)
        }
        Step::Create(revision) => match client.create(Some(&key.ns), &*revision).await {
            Err(error) if error.is_namespace_terminating() || error.is_already_exists() => Ok(None),
            other => other.map(|_| None),
        },
    }
}

/// Deletes revisions that nothing needs.
pub async fn truncate(client: &Client, key: &Key, revisions: Vec<Arc<ControllerRevision>>) -> Result<(), Error> {
    for revision in revisions {
        let params = DeleteParams::uid(uid_of(&*revision));
        match client
            .delete::<ControllerRevision>(Some(&key.ns), name_of(&*revision), &params)
            .await
        {
            Err(error) if error.is_not_found() || error.is_conflict() => {}
            other => other?,
        }
    }
    Ok(())
}

//! What a Deployment needs next: which ReplicaSet to make, which to scale, what to say. Pure.
//!
//! One plan is one small step; its writes wake the controller again. ReplicaSets are found by template, so a rollback is
//! nothing special: the old one becomes the newest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use super::rollout::{Bounds, Size, new_size, scale_in_proportion, shrink_old};
use super::status::{PROGRESSING, condition, counts, is_complete, progress, set_condition, time_left};
use crate::common::{controller_reference, is_deleting, name_of};

pub const HASH_LABEL: &str = "pod-template-hash";
pub const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAX: &str = "deployment.kubernetes.io/max-replicas";
/// Annotations of a Deployment that its ReplicaSets do not inherit.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED,
    MAX,
    "deprecated.deployment.rollback.to",
];

/// One write.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make the ReplicaSet of the current template.
    Create(Box<ReplicaSet>),
    /// Change a ReplicaSet's size and annotations.
    Scale {
        /// Its name.
        name: String,
        /// Size before.
        from: i32,
        /// Size after; equal to `from` if only annotations change.
        to: i32,
        /// Annotations to set.
        annotations: BTreeMap<String, String>,
        /// `minReadySeconds` to set, where it differs.
        min_ready_s: Option<i32>,
    },
    /// Set the Deployment's revision annotation.
    Revision(String),
    /// Delete a ReplicaSet beyond the history limit.
    Delete(String),
}

/// The next step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// Writes, in order.
    pub actions: Vec<Action>,
    /// What the status should say.
    pub status: DeploymentStatus,
    /// When to look again without an event.
    pub requeue: Option<Duration>,
}

/// Plans for `d` over all ReplicaSets it controls. `old_pods_run` says whether any pod of another template still runs
/// (only Recreate asks).
pub fn plan(d: &Deployment, sets: &[Arc<ReplicaSet>], old_pods_run: bool, now: Timestamp) -> Plan {
    let view = View::new(d, sets);
    let mut plan = Plan::default();
    let mut found = None;
    if !is_deleting(d) {
        if view.paused || view.is_scaling() {
            view.scale(&mut plan.actions);
        } else if view.recreate {
            found = view.recreate(old_pods_run, &mut plan.actions);
        } else {
            found = view.roll(&mut plan.actions);
        }
    }
    let all: Vec<&ReplicaSet> = view.new.into_iter().chain(view.old.iter().copied()).collect();
    plan.status = counts(d, view.new, &all, view.bounds.unavailable, now);
    if !is_deleting(d) {
        view.pausing(&mut plan.status, now);
        match found {
            Some(Found::Created(name)) => {
                let text = format!("Created new replica set \"{name}\"");
                set_condition(&mut plan.status, PROGRESSING, true, "NewReplicaSetCreated", text, now);
            }
            Some(Found::Existing(name)) if condition(Some(&plan.status), PROGRESSING).is_none() => {
                let text = format!("Found new replica set \"{name}\"");
                set_condition(&mut plan.status, PROGRESSING, true, "FoundNewReplicaSet", text, now);
            }
            Some(Found::Existing(_)) | None => {}
        }
        if !view.paused {
            progress(d, &mut plan.status, view.new, &all, now);
            plan.requeue = time_left(d, &plan.status, now);
        }
        if is_complete(d, &plan.status) {
            view.clean(&mut plan.actions);
        }
    }
    plan
}

/// The name suffix and label of a template: FNV-1a of its JSON, in characters that spell nothing.
pub fn template_hash(template: &PodTemplateSpec, collisions: i32) -> String {
    let mut hash: u32 = 0x811c_9dc5;
    // Struct field order is fixed and maps are sorted, so the text is canonical.
    let text = serde_json::to_string(template).unwrap_or_default();
    let salt = if collisions == 0 {
        String::new()
    } else {
        collisions.to_string()
    };
    for byte in text.bytes().chain(salt.bytes()) {
        hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    }
    let alphabet = b"bcdfghjklmnpqrstvwxz2456789";
    hash.to_string()
        .bytes()
        .map(|digit| alphabet[usize::from(digit) % alphabet.len()] as char)
        .collect()
}

/// Whether a ReplicaSet is of this template; the hash label does not count.
fn same_template(rs: &ReplicaSet, template: &PodTemplateSpec) -> bool {
    let Some(mut theirs) = rs.spec.as_ref().and_then(|s| s.template.clone()) else {
        return false;
    };
    let mut ours = template.clone();
    for template in [&mut theirs, &mut ours] {
        if let Some(meta) = &mut template.metadata {
            if let Some(labels) = &mut meta.labels {
                labels.remove(HASH_LABEL);
            }
            // The server may have written either.
            meta.creation_timestamp = None;
            meta.labels = meta.labels.take().filter(|l| !l.is_empty());
            meta.annotations = meta.annotations.take().filter(|a| !a.is_empty());
        }
        template.metadata = template.metadata.take().filter(|m| *m != ObjectMeta::default());
    }
    theirs == ours
}

enum Found {
    Created(String),
    Existing(String),
}

struct View<'a> {
    d: &'a Deployment,
    bounds: Bounds,
    paused: bool,
    recreate: bool,
    /// The ReplicaSet of the current template.
    new: Option<&'a ReplicaSet>,
    /// All others, oldest first.
    old: Vec<&'a ReplicaSet>,
}

fn wanted(rs: &ReplicaSet) -> i32 {
    rs.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
}

fn annotation<'a>(rs: &'a ReplicaSet, key: &str) -> Option<&'a str> {
    rs.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

fn revision(rs: &ReplicaSet) -> i64 {
    annotation(rs, REVISION)
        .and_then(|r| r.parse().ok())
        .unwrap_or_default()
}

fn size(rs: &ReplicaSet) -> Size {
    let status = rs.status.as_ref();
    Size {
        wanted: wanted(rs),
        available: status.and_then(|s| s.available_replicas).unwrap_or_default(),
        current: status.map_or(0, |s| s.replicas),
        annotated_max: annotation(rs, MAX).and_then(|m| m.parse().ok()),
    }
}

impl<'a> View<'a> {
    fn new(d: &'a Deployment, sets: &'a [Arc<ReplicaSet>]) -> Self {
        let spec = d.spec.as_ref();
        let strategy = spec.and_then(|s| s.strategy.as_ref());
        let recreate = strategy.and_then(|s| s.type_.as_deref()) == Some("Recreate");
        let rolling = strategy.and_then(|s| s.rolling_update.as_ref());
        let replicas = spec.and_then(|s| s.replicas).unwrap_or(1).max(0);
        let bounds = if recreate {
            Bounds {
                replicas,
                surge: 0,
                unavailable: 0,
            }
        } else {
            Bounds::new(
                replicas,
                rolling.and_then(|r| r.max_surge.as_ref()),
                rolling.and_then(|r| r.max_unavailable.as_ref()),
            )
        };
        let mut ordered: Vec<&ReplicaSet> = sets.iter().map(|rs| &**rs).collect();
        ordered.sort_by_key(|rs| {
            (
                rs.metadata.creation_timestamp.clone(),
                revision(rs),
                rs.metadata.name.clone(),
            )
        });
        // Should two match, the oldest stays, so that two controllers agree.
        let new = spec.and_then(|s| ordered.iter().copied().find(|rs| same_template(rs, &s.template)));
        let old = ordered
            .into_iter()
            .filter(|rs| new.is_none_or(|n| !std::ptr::eq(*rs, n)))
            .collect();
        Self {
            d,
            bounds,
            paused: spec.and_then(|s| s.paused).unwrap_or_default(),
            recreate,
            new,
            old,
        }
    }

    fn max(&self) -> i32 {
        self.bounds.replicas + self.bounds.surge
    }

    /// The Deployment's own size has changed since some ReplicaSet was last scaled.
    fn is_scaling(&self) -> bool {
        self.new
            .into_iter()
            .chain(self.old.iter().copied())
            .filter(|rs| wanted(rs) > 0)
            .any(|rs| {
                annotation(rs, DESIRED)
                    .and_then(|n| n.parse::<i32>().ok())
                    .is_some_and(|n| n != self.bounds.replicas)
            })
    }

    fn scale_to(&self, rs: &ReplicaSet, to: i32, actions: &mut Vec<Action>) {
        let mut annotations = BTreeMap::new();
        for (key, value) in [(DESIRED, self.bounds.replicas), (MAX, self.max())] {
            let value = value.to_string();
            if annotation(rs, key) != Some(value.as_str()) {
                annotations.insert(key.to_owned(), value);
            }
        }
        let from = wanted(rs);
        if from != to || !annotations.is_empty() {
            actions.push(Action::Scale {
                name: name_of(rs).to_owned(),
                from,
                to,
                annotations,
                min_ready_s: None,
            });
        }
    }

    /// Follows a change of size without moving the rollout.
    fn scale(&self, actions: &mut Vec<Action>) {
        let newest_first: Vec<&ReplicaSet> = self.new.into_iter().chain(self.old.iter().rev().copied()).collect();
        let active: Vec<&ReplicaSet> = newest_first.iter().copied().filter(|rs| wanted(rs) > 0).collect();
        let only = match active.as_slice() {
            [] => self.new.or(newest_first.first().copied()),
            [one] => Some(*one),
            _ => None,
        };
        if let Some(rs) = only {
            return self.scale_to(rs, self.bounds.replicas, actions);
        }
        let saturated = self
            .new
            .is_some_and(|rs| wanted(rs) == self.bounds.replicas && size(rs).available == self.bounds.replicas);
        if saturated {
            for rs in active
                .iter()
                .filter(|rs| self.new.is_none_or(|n| !std::ptr::eq(**rs, n)))
            {
                self.scale_to(rs, 0, actions);
            }
        } else if !self.recreate {
            let mut sizes: Vec<Size> = active.iter().map(|rs| size(rs)).collect();
            let before = self.d.status.as_ref().and_then(|s| s.replicas).unwrap_or_default();
            scale_in_proportion(self.bounds, &mut sizes, before);
            for (rs, size) in active.iter().zip(&sizes) {
                self.scale_to(rs, size.wanted, actions);
            }
        }
    }

    /// Makes or refreshes the new ReplicaSet; `size` is what a fresh one gets.
    fn ensure_new(&self, fresh: i32, actions: &mut Vec<Action>) -> Option<Found> {
        let newest_old = self.old.iter().map(|rs| revision(rs)).max().unwrap_or_default();
        let template = &self.d.spec.as_ref()?.template;
        match self.new {
            Some(rs) => {
                let mut annotations = self.inherited();
                annotations.retain(|key, value| annotation(rs, key) != Some(value.as_str()));
                let mine = revision(rs);
                let current = if mine > newest_old { mine } else { newest_old + 1 };
                if mine != current {
                    annotations.insert(REVISION.to_owned(), current.to_string());
                    if mine > 0 {
                        // The revisions it had before, for people who look at the history.
                        let mut history: Vec<&str> = annotation(rs, REVISION_HISTORY)
                            .unwrap_or_default()
                            .split(',')
                            .filter(|r| !r.is_empty())
                            .collect();
                        let mine = mine.to_string();
                        history.push(&mine);
                        annotations.insert(REVISION_HISTORY.to_owned(), history.join(","));
                    }
                }
                let spec = self.d.spec.as_ref()?;
                let min_ready = spec.min_ready_seconds.unwrap_or_default();
                let theirs = rs.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or_default();
                let min_ready_s = (min_ready != theirs).then_some(min_ready);
                if !annotations.is_empty() || min_ready_s.is_some() {
                    let (name, from) = (name_of(rs).to_owned(), wanted(rs));
                    actions.push(Action::Scale {
                        name,
                        from,
                        to: from,
                        annotations,
                        min_ready_s,
                    });
                }
                self.own_revision(current, actions);
                Some(Found::Existing(name_of(rs).to_owned()))
            }
            None => {
                let collisions = self
                    .d
                    .status
                    .as_ref()
                    .and_then(|s| s.collision_count)
                    .unwrap_or_default();
                let hash = template_hash(template, collisions);
                let rs = self.build(template, &hash, fresh, newest_old + 1);
                let name = name_of(&rs).to_owned();
                actions.push(Action::Create(Box::new(rs)));
                self.own_revision(newest_old + 1, actions);
                Some(Found::Created(name))
            }
        }
    }

    fn own_revision(&self, current: i64, actions: &mut Vec<Action>) {
        let mine = self.d.metadata.annotations.as_ref().and_then(|a| a.get(REVISION));
        if mine.is_none_or(|m| *m != current.to_string()) {
            actions.push(Action::Revision(current.to_string()));
        }
    }

    fn inherited(&self) -> BTreeMap<String, String> {
        let mut annotations = self.d.metadata.annotations.clone().unwrap_or_default();
        annotations.retain(|key, _| !NOT_COPIED.contains(&key.as_str()));
        annotations
    }

    fn build(&self, template: &PodTemplateSpec, hash: &str, replicas: i32, revision: i64) -> ReplicaSet {
        let with_hash = |labels: Option<BTreeMap<String, String>>| {
            let mut labels = labels.unwrap_or_default();
            labels.insert(HASH_LABEL.to_owned(), hash.to_owned());
            Some(labels)
        };
        let mut template = template.clone();
        let meta = template.metadata.get_or_insert_default();
        meta.labels = with_hash(meta.labels.take());
        let labels = meta.labels.clone();
        let spec = self.d.spec.as_ref();
        let mut selector = spec.map(|s| s.selector.clone()).unwrap_or_default();
        selector.match_labels = with_hash(selector.match_labels.take());
        let mut annotations = self.inherited();
        annotations.insert(REVISION.to_owned(), revision.to_string());
        annotations.insert(DESIRED.to_owned(), self.bounds.replicas.to_string());
        annotations.insert(MAX.to_owned(), self.max().to_string());
        ReplicaSet {
            metadata: ObjectMeta {
                name: Some(format!("{}-{hash}", name_of(self.d))),
                namespace: self.d.metadata.namespace.clone(),
                labels,
                annotations: Some(annotations),
                owner_references: Some(vec![controller_reference(self.d)]),
                ..ObjectMeta::default()
            },
            spec: Some(ReplicaSetSpec {
                replicas: Some(replicas),
                min_ready_seconds: spec.and_then(|s| s.min_ready_seconds),
                selector,
                template: Some(template),
            }),
            status: None,
        }
    }

    fn recreate(&self, old_pods_run: bool, actions: &mut Vec<Action>) -> Option<Found> {
        let running: Vec<_> = self.old.iter().copied().filter(|rs| wanted(rs) > 0).collect();
        if !running.is_empty() {
            for rs in running {
                self.scale_to(rs, 0, actions);
            }
            return None;
        }
        if old_pods_run {
            return None;
        }
        let found = self.ensure_new(self.bounds.replicas, actions);
        if let Some(rs) = self.new {
            self.scale_to(rs, self.bounds.replicas, actions);
        }
        found
    }

    fn roll(&self, actions: &mut Vec<Action>) -> Option<Found> {
        let others: i32 = self.old.iter().map(|rs| wanted(rs)).sum();
        let target = new_size(self.bounds, self.new.map_or(0, wanted), others);
        let found = self.ensure_new(target, actions);
        let Some(new) = self.new else { return found };
        if target != wanted(new) {
            // Growing first; what may shrink is decided when that is seen.
            self.scale_to(new, target, actions);
            return found;
        }
        let active: Vec<&ReplicaSet> = self.old.iter().copied().filter(|rs| wanted(rs) > 0).collect();
        let mut sizes: Vec<Size> = active.iter().map(|rs| size(rs)).collect();
        shrink_old(self.bounds, &size(new), &mut sizes);
        for (rs, size) in active.iter().zip(&sizes) {
            if size.wanted != wanted(rs) {
                self.scale_to(rs, size.wanted, actions);
            }
        }
        found
    }

    /// Notes in the Progressing condition that a pause began or ended, so that the deadline does not run meanwhile.
    fn pausing(&self, status: &mut DeploymentStatus, now: Timestamp) {
        let has_deadline = self
            .d
            .spec
            .as_ref()
            .and_then(|s| s.progress_deadline_seconds)
            .is_some_and(|s| s != i32::MAX);
        let current = condition(Some(status), PROGRESSING)
            .and_then(|c| c.reason.clone())
            .unwrap_or_default();
        if !has_deadline || current == "ProgressDeadlineExceeded" {
            return;
        }
        let mut unknown = |reason: &str, text: &str| {
            set_condition(status, PROGRESSING, true, reason, text.to_owned(), now);
            if let Some(c) = status.conditions.iter_mut().flatten().find(|c| c.type_ == PROGRESSING) {
                c.status = "Unknown".to_owned();
            }
        };
        if self.paused && current != "DeploymentPaused" {
            unknown("DeploymentPaused", "Deployment is paused");
        } else if !self.paused && current == "DeploymentPaused" {
            unknown("DeploymentResumed", "Deployment is resumed");
        }
    }

    /// Deletes empty ReplicaSets beyond the history limit, oldest revision first.
    fn clean(&self, actions: &mut Vec<Action>) {
        let limit = self
            .d
            .spec
            .as_ref()
            .and_then(|s| s.revision_history_limit)
            .unwrap_or(10);
        let mut empty: Vec<&ReplicaSet> = self.old.iter().copied().filter(|rs| !is_deleting(*rs)).collect();
        let surplus = empty.len().saturating_sub(limit.max(0) as usize);
        empty.sort_by_key(|rs| revision(rs));
        for rs in empty.into_iter().take(surplus) {
            let status = rs.status.as_ref();
            let unused = wanted(rs) == 0
                && status.is_none_or(|s| s.replicas == 0)
                && status.and_then(|s| s.observed_generation) >= rs.metadata.generation;
            if unused {
                actions.push(Action::Delete(name_of(rs).to_owned()));
            }
        }
    }
}

/// The ReplicaSet of the Deployment's current template, if there is one.
pub fn current_set<'a>(d: &'a Deployment, sets: &'a [Arc<ReplicaSet>]) -> Option<&'a ReplicaSet> {
    View::new(d, sets).new
}

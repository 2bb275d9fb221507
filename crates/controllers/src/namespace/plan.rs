//! What a namespace that cannot go yet says about why, and when to look again. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{NamespaceCondition, NamespaceStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use reconcile::ResourceId;

/// What is left of one kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leftover {
    /// `pods.`, `deployments.apps`: as upstream prints it.
    pub resource: String,
    /// Objects still there.
    pub count: usize,
    /// Longest grace period among them, in seconds.
    pub grace_s: i64,
    /// Finalizers that hold them, one entry per object and finalizer.
    pub finalizers: Vec<String>,
}

impl Leftover {
    /// Nothing left.
    pub fn none(resource: &ResourceId) -> Self {
        Self {
            resource: format!("{}.{}", resource.plural, resource.group),
            ..Self::default()
        }
    }
}

/// When to look again: soon at first, at most every five seconds later, not before half of a grace period.
pub fn patience(leftovers: &[Leftover], began: Timestamp, now: Timestamp) -> Duration {
    let age = apimachinery::time::since(now, began);
    let by_age = (age / 4).clamp(Duration::from_millis(100), Duration::from_secs(5));
    let grace = leftovers
        .iter()
        .map(|l| l.grace_s.max(0) as u64)
        .max()
        .unwrap_or_default();
    if grace == 0 {
        by_age
    } else {
        by_age.max(Duration::from_millis(500).min(Duration::from_secs(grace) / 2))
    }
}

/// The five conditions upstream writes while a namespace is terminating.
pub fn conditions(
    old: Option<&NamespaceStatus>,
    leftovers: &[Leftover],
    failure: Option<&str>,
    now: Timestamp,
) -> Vec<NamespaceCondition> {
    let mut finalizers: BTreeMap<&str, usize> = BTreeMap::new();
    for name in leftovers.iter().flat_map(|l| &l.finalizers) {
        *finalizers.entry(name).or_default() += 1;
    }
    let content: Vec<String> = leftovers
        .iter()
        .map(|l| format!("{} has {} resource instances", l.resource, l.count))
        .collect();
    let holding: Vec<String> = finalizers
        .iter()
        .map(|(name, count)| format!("{name} in {count} resource instances"))
        .collect();
    let make = |kind: &str, bad: bool, reason: &str, message: String| {
        let status = if bad { "True" } else { "False" };
        let before = old
            .and_then(|s| s.conditions.as_ref())
            .and_then(|list| list.iter().find(|c| c.type_ == kind && c.status == status))
            .and_then(|c| c.last_transition_time.clone());
        NamespaceCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message),
            last_transition_time: Some(before.unwrap_or(Time(now))),
        }
    };
    let or = |bad: bool, text: String, fine: &str| if bad { text } else { fine.to_owned() };
    vec![
        make(
            "NamespaceDeletionDiscoveryFailure",
            false,
            "ResourcesDiscovered",
            "All resources successfully discovered".to_owned(),
        ),
        make(
            "NamespaceDeletionGroupVersionParsingFailure",
            false,
            "ParsedGroupVersions",
            "All legacy kube types successfully parsed".to_owned(),
        ),
        make(
            "NamespaceDeletionContentFailure",
            failure.is_some(),
            if failure.is_some() {
                "ContentDeletionFailed"
            } else {
                "ContentDeleted"
            },
            or(
                failure.is_some(),
                format!(
                    "Failed to delete all resource types, 1 remaining: {}",
                    failure.unwrap_or_default()
                ),
                "All content successfully deleted, may be waiting on finalization",
            ),
        ),
        make(
            "NamespaceContentRemaining",
            !content.is_empty(),
            if content.is_empty() {
                "ContentRemoved"
            } else {
                "SomeResourcesRemain"
            },
            or(
                !content.is_empty(),
                format!("Some resources are remaining: {}", content.join(", ")),
                "All content successfully removed",
            ),
        ),
        make(
            "NamespaceFinalizersRemaining",
            !holding.is_empty(),
            if holding.is_empty() {
                "ContentHasNoFinalizers"
            } else {
                "SomeFinalizersRemain"
            },
            or(
                !holding.is_empty(),
                format!(
                    "Some content in the namespace has finalizers remaining: {}",
                    holding.join(", ")
                ),
                "All content-preserving finalizers finished",
            ),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_remains_and_why() {
        let now = "2026-01-02T03:04:05Z".parse().unwrap();
        let pods = Leftover {
            resource: "pods.".into(),
            count: 2,
            grace_s: 30,
            finalizers: vec!["a/x".into(), "a/x".into()],
        };
        let list = conditions(None, std::slice::from_ref(&pods), None, now);
        let text: Vec<String> = list
            .iter()
            .map(|c| format!("{}={}: {}", c.type_, c.status, c.message.as_deref().unwrap_or_default()))
            .collect();
        assert_eq!(
            text[2..],
            [
                "NamespaceDeletionContentFailure=False: All content successfully deleted, may be waiting on finalization",
                "NamespaceContentRemaining=True: Some resources are remaining: pods. has 2 resource instances",
                "NamespaceFinalizersRemaining=True: Some content in the namespace has finalizers remaining: a/x in 2 resource instances",
            ]
        );
        assert_eq!(patience(&[pods], now, now), Duration::from_millis(500));
        assert_eq!(
            patience(&[], now, "2026-01-02T04:04:05Z".parse().unwrap()),
            Duration::from_secs(5)
        );
    }
}

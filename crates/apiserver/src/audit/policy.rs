//! Which requests are written down, and how much of them.
//!
//! # Source
//! `audit.k8s.io/v1` Policy and `staging/src/k8s.io/apiserver/pkg/audit/policy` of Kubernetes 1.36.

use apimachinery::codec::{self, Media};
use serde::{Deserialize, Serialize};

use crate::auth::{Attributes, UserInfo};

const API_VERSION: &str = "audit.k8s.io/v1";

/// How much of a request is written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
pub enum Level {
    #[default]
    None,
    /// Who, what, when, and how it ended.
    Metadata,
    /// And what was sent.
    Request,
    /// And what was answered.
    RequestResponse,
}

/// When a request is written down. Nothing is written at `Panic`: a handler's panic ends its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Stage {
    RequestReceived,
    /// Of long-running requests only (watches, streams).
    ResponseStarted,
    ResponseComplete,
    Panic,
}

/// Rules in order; the first that matches decides. What no rule matches is not written down.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Policy {
    api_version: String,
    kind: String,
    #[serde(default)]
    pub rules: Vec<Rule>,
    #[serde(default)]
    pub omit_stages: Vec<Stage>,
    #[serde(default)]
    pub omit_managed_fields: bool,
}

/// One rule. An empty list matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Rule {
    pub level: Level,
    pub users: Vec<String>,
    pub user_groups: Vec<String>,
    pub verbs: Vec<String>,
    pub resources: Vec<GroupResources>,
    /// The empty name stands for what is in no namespace.
    pub namespaces: Vec<String>,
    #[serde(rename = "nonResourceURLs")]
    pub non_resource_urls: Vec<String>,
    pub omit_stages: Vec<Stage>,
    pub omit_managed_fields: Option<bool>,
}

/// Resources of one group: `pods`, `pods/log`, `pods/*`, `*/status`, `*`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GroupResources {
    pub group: String,
    pub resources: Vec<String>,
    pub resource_names: Vec<String>,
}

/// What a policy says of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub level: Level,
    pub omit_stages: Vec<Stage>,
    pub omit_managed_fields: bool,
}

/// Why a policy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("the audit policy cannot be read: {0}")]
    Syntax(String),
    #[error("the audit policy has {field} {given:?}: it must be {wanted:?}")]
    Kind {
        field: &'static str,
        given: String,
        wanted: &'static str,
    },
    #[error("rules[{index}] of the audit policy: {reason}")]
    Rule { index: usize, reason: &'static str },
}

/// The policy of those who have none: metadata only of whatever holds or hands out secrets, the bodies of changes, metadata of
/// reads, and nothing of what components ask all the time.
pub const DEFAULT_POLICY: &str = r#"
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  nonResourceURLs: ["/healthz*", "/livez*", "/readyz*", "/version", "/openapi/*", "/metrics"]
- level: None
  resources: [{group: coordination.k8s.io, resources: [leases]}, {group: "", resources: [events]}, {group: events.k8s.io, resources: [events]}]
- level: Metadata
  resources:
  - {group: "", resources: [secrets, configmaps, serviceaccounts/token]}
  - {group: authentication.k8s.io}
  - {group: certificates.k8s.io}
- level: None
  userGroups: ["system:nodes"]
  verbs: [get, list, watch]
- level: Metadata
  verbs: [get, list, watch]
- level: Request
"#;

impl Policy {
    /// Reads a policy in YAML or JSON. Unknown fields are errors.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let value =
            codec::parse_untyped(Media::Yaml, text.as_bytes()).map_err(|e| PolicyError::Syntax(e.to_string()))?;
        let policy: Policy = serde_json::from_value(value).map_err(|e| PolicyError::Syntax(e.to_string()))?;
        for (field, given, wanted) in [
            ("apiVersion", &policy.api_version, API_VERSION),
            ("kind", &policy.kind, "Policy"),
        ] {
            if given != wanted {
                let given = given.clone();
                return Err(PolicyError::Kind { field, given, wanted });
            }
        }
        for (index, rule) in policy.rules.iter().enumerate() {
            let resources = !rule.resources.is_empty() || !rule.namespaces.is_empty();
            if resources && !rule.non_resource_urls.is_empty() {
                let reason = "rules cannot apply to both regular resources and non-resource URLs";
                return Err(PolicyError::Rule { index, reason });
            }
            if rule
                .resources
                .iter()
                .any(|r| r.resources.is_empty() && !r.resource_names.is_empty())
            {
                let reason = "using resourceNames requires at least one resource";
                return Err(PolicyError::Rule { index, reason });
            }
        }
        Ok(policy)
    }

    /// What is written down of a request.
    pub fn verdict(&self, user: &UserInfo, attributes: &Attributes) -> Verdict {
        let Some(rule) = self.rules.iter().find(|r| r.matches(user, attributes)) else {
            return Verdict::default();
        };
        let mut omit_stages = self.omit_stages.clone();
        omit_stages.extend(&rule.omit_stages);
        Verdict {
            level: rule.level,
            omit_stages,
            omit_managed_fields: rule.omit_managed_fields.unwrap_or(self.omit_managed_fields),
        }
    }
}

impl Rule {
    fn matches(&self, user: &UserInfo, a: &Attributes) -> bool {
        let listed = |list: &[String], item: &str| list.is_empty() || list.iter().any(|x| x == item);
        if !listed(&self.users, &user.name)
            || !listed(&self.verbs, &a.verb)
            || !(self.user_groups.is_empty() || self.user_groups.iter().any(|g| user.in_group(g)))
        {
            return false;
        }
        if !self.resources.is_empty() || !self.namespaces.is_empty() {
            return !a.resource.is_empty()
                && listed(&self.namespaces, &a.namespace)
                && (self.resources.is_empty() || self.resources.iter().any(|r| r.matches(a)));
        }
        if self.non_resource_urls.is_empty() {
            return true;
        }
        let path = |spec: &String| match spec.strip_suffix('*') {
            Some(prefix) => a.path.starts_with(prefix),
            None => *spec == a.path,
        };
        a.resource.is_empty() && self.non_resource_urls.iter().any(path)
    }
}

impl GroupResources {
    fn matches(&self, a: &Attributes) -> bool {
        if self.group != a.group {
            return false;
        }
        if self.resources.is_empty() {
            return true;
        }
        if !self.resource_names.is_empty() && !self.resource_names.contains(&a.name) {
            return false;
        }
        let full = a.full_resource();
        self.resources.iter().any(|r| {
            r == "*"
                || *r == full
                || (!a.subresource.is_empty() && r.strip_prefix("*/") == Some(&a.subresource))
                || r.strip_suffix("/*") == Some(&a.resource)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(verb: &str, group: &str, resource: &str, subresource: &str) -> Attributes {
        Attributes {
            verb: verb.into(),
            group: group.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            namespace: "default".into(),
            ..Attributes::default()
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let policy = Policy::parse(
            r#"{"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": [
                {"level": "None", "users": ["quiet"]},
                {"level": "RequestResponse", "resources": [{"group": "", "resources": ["pods/*"]}], "verbs": ["create"]},
                {"level": "Request", "namespaces": ["default"], "resources": [{"group": "apps"}], "omitStages": ["ResponseStarted"]},
                {"level": "Metadata", "nonResourceURLs": ["/api*"]}]}"#,
        )
        .unwrap();
        let level = |user: &str, a: &Attributes| policy.verdict(&UserInfo::new(user, ["g"]), a).level;
        assert_eq!(level("quiet", &ask("create", "", "pods", "")), Level::None);
        assert_eq!(level("u", &ask("create", "", "pods", "exec")), Level::RequestResponse);
        assert_eq!(level("u", &ask("create", "", "pods", "")), Level::RequestResponse);
        assert_eq!(level("u", &ask("get", "", "pods", "log")), Level::None);
        assert_eq!(level("u", &ask("get", "apps", "deployments", "scale")), Level::Request);
        let path = Attributes {
            path: "/apis/apps".into(),
            verb: "get".into(),
            ..Attributes::default()
        };
        assert_eq!(level("u", &path), Level::Metadata);
        let verdict = policy.verdict(&UserInfo::new("u", ["g"]), &ask("get", "apps", "deployments", ""));
        assert_eq!(verdict.omit_stages, [Stage::RequestReceived, Stage::ResponseStarted]);
    }

    #[test]
    fn the_default_never_shows_secrets_and_wrong_policies_are_named() {
        let policy = Policy::parse(DEFAULT_POLICY).unwrap();
        let user = UserInfo::admin("a");
        for verb in ["create", "update", "patch", "get"] {
            assert_eq!(
                policy.verdict(&user, &ask(verb, "", "secrets", "")).level,
                Level::Metadata
            );
        }
        let token = ask("create", "", "serviceaccounts", "token");
        assert_eq!(policy.verdict(&user, &token).level, Level::Metadata);
        assert_eq!(
            policy.verdict(&user, &ask("create", "apps", "deployments", "")).level,
            Level::Request
        );
        for (text, says) in [
            ("kind: Policy\napiVersion: v1\nrules: []", "apiVersion"),
            ("a: [", "cannot be read"),
            (
                "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: All}]",
                "All",
            ),
            (
                "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: None, nonResourceURLs: [/x], namespaces: [a]}]",
                "both",
            ),
            ("apiVersion: audit.k8s.io/v1\nkind: Policy\nrule: []", "rule"),
        ] {
            let error = Policy::parse(text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}

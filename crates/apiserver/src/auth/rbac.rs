//! RBAC: roles and bindings compiled to a map from subject to rules, rebuilt when one of them changes.

use std::collections::HashMap;
use std::sync::Arc;

use apimachinery::meta;
use parking_lot::RwLock;
use serde::Serialize;
use serde_json::Value;

use super::{Attributes, Decision, UserInfo};
use crate::registry::{Registry, Resource};

const GROUP: &str = "rbac.authorization.k8s.io";

/// One rule of a role.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    pub verbs: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub api_groups: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resources: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resource_names: Vec<String>,
    #[serde(rename = "nonResourceURLs", skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
}

impl Rule {
    fn of(value: &Value) -> Self {
        let list = |key: &str| -> Vec<String> {
            value[key]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|v| v.as_str().map(str::to_owned))
                .collect()
        };
        Rule {
            verbs: list("verbs"),
            api_groups: list("apiGroups"),
            resources: list("resources"),
            resource_names: list("resourceNames"),
            urls: list("nonResourceURLs"),
        }
    }

    /// The rule that permits everything on resources and paths.
    pub fn everything() -> Self {
        let all = || vec!["*".to_owned()];
        Rule {
            verbs: all(),
            api_groups: all(),
            resources: all(),
            resource_names: Vec::new(),
            urls: all(),
        }
    }

    /// The rule cut into rules of one verb on one resource or path.
    pub fn atoms(&self) -> Vec<Rule> {
        let one = |s: &str| vec![s.to_owned()];
        let mut atoms = Vec::new();
        for verb in &self.verbs {
            for url in &self.urls {
                atoms.push(Rule {
                    verbs: one(verb),
                    urls: one(url),
                    ..Rule::default()
                });
            }
            for group in &self.api_groups {
                for resource in &self.resources {
                    let rule = Rule {
                        verbs: one(verb),
                        api_groups: one(group),
                        resources: one(resource),
                        ..Rule::default()
                    };
                    match self.resource_names.as_slice() {
                        [] => atoms.push(rule),
                        names => {
                            atoms.extend(names.iter().map(|n| Rule {
                                resource_names: one(n),
                                ..rule.clone()
                            }));
                        }
                    }
                }
            }
        }
        atoms
    }

    /// Whether this rule gives all that an atom of another gives.
    pub fn covers(&self, atom: &Rule) -> bool {
        let has = |mine: &[String], theirs: &[String]| theirs.iter().all(|t| mine.iter().any(|m| m == "*" || m == t));
        let resource = atom.resources.iter().all(|t| {
            self.resources.iter().any(|m| {
                m == "*"
                    || m == t
                    || t.split_once('/')
                        .is_some_and(|(_, sub)| m.strip_prefix("*/") == Some(sub))
            })
        });
        let url = atom.urls.iter().all(|t| {
            self.urls
                .iter()
                .any(|m| m == t || m.strip_suffix('*').is_some_and(|prefix| t.starts_with(prefix)))
        });
        let names = self.resource_names.is_empty()
            || (!atom.resource_names.is_empty() && has(&self.resource_names, &atom.resource_names));
        has(&self.verbs, &atom.verbs) && has(&self.api_groups, &atom.api_groups) && resource && url && names
    }

    /// Whether the rule permits the request.
    pub fn permits(&self, a: &Attributes) -> bool {
        let has = |list: &[String], item: &str| list.iter().any(|x| x == "*" || x == item);
        if !has(&self.verbs, &a.verb) {
            return false;
        }
        if a.resource.is_empty() {
            return self.urls.iter().any(|url| match url.strip_suffix('*') {
                Some(prefix) => a.path.starts_with(prefix),
                None => *url == a.path,
            });
        }
        let full = a.full_resource();
        let resource = self.resources.iter().any(|r| {
            r == "*" || *r == full || (!a.subresource.is_empty() && r.strip_prefix("*/") == Some(&a.subresource))
        });
        resource
            && has(&self.api_groups, &a.group)
            && (self.resource_names.is_empty() || self.resource_names.contains(&a.name))
    }
}

/// Rules given to a subject by one binding.
struct Grant {
    /// Absent: everywhere.
    namespace: Option<String>,
    /// For the reason of a decision.
    binding: String,
    rules: Arc<Vec<Rule>>,
}

#[derive(Default)]
struct Index {
    built_for: [u64; 4],
    grants: HashMap<String, Vec<Grant>>,
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.urls.is_empty() {
            write!(f, "{{APIGroups:{:?}, Resources:{:?}", self.api_groups, self.resources)?;
            if !self.resource_names.is_empty() {
                write!(f, ", ResourceNames:{:?}", self.resource_names)?;
            }
        } else {
            write!(f, "{{NonResourceURLs:{:?}", self.urls)?;
        }
        write!(f, ", Verbs:{:?}}}", self.verbs)
    }
}

/// The evaluator of one cluster.
pub struct Rbac {
    cluster_roles: Arc<Resource>,
    roles: Arc<Resource>,
    cluster_bindings: Arc<Resource>,
    bindings: Arc<Resource>,
    index: RwLock<Option<Arc<Index>>>,
}

impl Rbac {
    pub fn new(registry: &Registry) -> Self {
        Rbac {
            cluster_roles: registry.resource(GROUP, "clusterroles"),
            roles: registry.resource(GROUP, "roles"),
            cluster_bindings: registry.resource(GROUP, "clusterrolebindings"),
            bindings: registry.resource(GROUP, "rolebindings"),
            index: RwLock::new(None),
        }
    }

    fn index(&self) -> Arc<Index> {
        let now = [
            self.cluster_roles.newest(),
            self.roles.newest(),
            self.cluster_bindings.newest(),
            self.bindings.newest(),
        ];
        if let Some(index) = &*self.index.read()
            && index.built_for == now
        {
            return index.clone();
        }
        // Revisions are read before the objects, so an index is never newer-labelled than its content.
        let index = Arc::new(self.build(now));
        *self.index.write() = Some(index.clone());
        index
    }

    fn build(&self, built_for: [u64; 4]) -> Index {
        let mut rules: HashMap<String, Arc<Vec<Rule>>> = HashMap::new();
        for (kind, resource) in [("ClusterRole", &self.cluster_roles), ("Role", &self.roles)] {
            for (key, object) in &resource.snapshot() {
                rules.insert(format!("{kind}/{key}"), Arc::new(rules_of(&object.value())));
            }
        }
        self.aggregate(&mut rules);
        let mut grants: HashMap<String, Vec<Grant>> = HashMap::new();
        for resource in [&self.cluster_bindings, &self.bindings] {
            for (_, object) in &resource.snapshot() {
                let binding = object.value();
                let namespace = meta::namespace(&binding);
                let role_ref = &binding["roleRef"];
                let (kind, role) = (
                    role_ref["kind"].as_str().unwrap_or_default(),
                    role_ref["name"].as_str().unwrap_or_default(),
                );
                let key = if kind == "Role" {
                    format!("Role/{namespace}/{role}")
                } else {
                    format!("ClusterRole/{role}")
                };
                let Some(rules) = rules.get(&key) else { continue };
                for subject in binding["subjects"].as_array().into_iter().flatten() {
                    let name = subject["name"].as_str().unwrap_or_default();
                    let subject_key = match subject["kind"].as_str() {
                        Some("User") => format!("u:{name}"),
                        Some("Group") => format!("g:{name}"),
                        Some("ServiceAccount") => {
                            let ns = subject["namespace"]
                                .as_str()
                                .filter(|n| !n.is_empty())
                                .unwrap_or(namespace);
                            format!("u:system:serviceaccount:{ns}:{name}")
                        }
                        _ => continue,
                    };
                    grants.entry(subject_key).or_default().push(Grant {
                        namespace: (!namespace.is_empty()).then(|| namespace.to_owned()),
                        binding: meta::name(&binding).to_owned(),
                        rules: rules.clone(),
                    });
                }
            }
        }
        Index { built_for, grants }
    }

    /// Gives roles with an `aggregationRule` the rules of the roles it selects.
    fn aggregate(&self, rules: &mut HashMap<String, Arc<Vec<Rule>>>) {
        let roles: Vec<_> = self.cluster_roles.snapshot().into_iter().map(|(_, o)| o).collect();
        for object in &roles {
            if !contains(&object.encoded.bytes, b"aggregationRule") {
                continue;
            }
            let role = object.value();
            let mut all = rules_of(&role);
            for selector in role["aggregationRule"]["clusterRoleSelectors"]
                .as_array()
                .into_iter()
                .flatten()
            {
                let Ok(selector) = apimachinery::selector::LabelSelector::from_object(selector) else {
                    continue;
                };
                for other in roles.iter().filter(|o| selector.matches(&*o.header().labels)) {
                    for rule in rules_of(&other.value()) {
                        if !all.contains(&rule) {
                            all.push(rule);
                        }
                    }
                }
            }
            rules.insert(format!("ClusterRole/{}", meta::name(&role)), Arc::new(all));
        }
    }

    pub fn authorize(&self, user: &UserInfo, attributes: &Attributes) -> Decision {
        let index = self.index();
        for grant in grants_of(&index, user) {
            let in_scope = grant
                .namespace
                .as_ref()
                .is_none_or(|ns| !attributes.resource.is_empty() && *ns == attributes.namespace);
            if in_scope && grant.rules.iter().any(|r| r.permits(attributes)) {
                return Decision::Allow(format!("RBAC: allowed by binding {:?}", grant.binding));
            }
        }
        Decision::Deny(String::new())
    }

    /// The rules a user has in a namespace, for SelfSubjectRulesReview and for the check against escalation.
    pub fn rules(&self, user: &UserInfo, namespace: &str) -> Vec<Rule> {
        let index = self.index();
        grants_of(&index, user)
            .filter(|g| g.namespace.as_ref().is_none_or(|ns| ns == namespace))
            .flat_map(|g| g.rules.iter().cloned())
            .collect()
    }

    /// The rules of a role by kind, namespace and name.
    pub fn rules_of_role(&self, kind: &str, namespace: &str, name: &str) -> Option<Vec<Rule>> {
        if kind == "Role" {
            return self.roles.get(namespace, name).map(|o| rules_of(&o.value()));
        }
        self.cluster_roles.get("", name).map(|o| rules_of(&o.value()))
    }
}

/// The rules of a role object.
pub fn rules_of(role: &Value) -> Vec<Rule> {
    role["rules"].as_array().into_iter().flatten().map(Rule::of).collect()
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

fn grants_of<'i>(index: &'i Index, user: &UserInfo) -> impl Iterator<Item = &'i Grant> {
    let keys: Vec<String> = std::iter::once(format!("u:{}", user.name))
        .chain(user.groups.iter().map(|g| format!("g:{g}")))
        .collect();
    keys.into_iter().filter_map(|k| index.grants.get(&k)).flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ask(verb: &str, resource: &str, subresource: &str, name: &str) -> Attributes {
        Attributes {
            verb: verb.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            name: name.into(),
            ..Attributes::default()
        }
    }

    #[test]
    fn rules_match_exactly() {
        let rule = Rule::of(
            &json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods", "*/scale"], "resourceNames": ["a"]}),
        );
        assert!(rule.permits(&ask("get", "pods", "", "a")));
        assert!(rule.permits(&ask("get", "deployments", "scale", "a")));
        for no in [
            ask("get", "pods", "log", "a"),
            ask("get", "pods", "", "b"),
            ask("list", "pods", "", "a"),
        ] {
            assert!(!rule.permits(&no), "{no:?}");
        }
        let url = Rule::of(&json!({"verbs": ["get"], "nonResourceURLs": ["/openapi/*", "/version"]}));
        let path = |p: &str| Attributes {
            verb: "get".into(),
            path: p.into(),
            ..Attributes::default()
        };
        assert!(
            url.permits(&path("/openapi/v2")) && url.permits(&path("/version")) && !url.permits(&path("/versions"))
        );
    }
}

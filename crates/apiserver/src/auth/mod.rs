//! Who asks, and may they.
//!
//! Authentication: client certificates of the cluster's CA (CN = user, O = groups) and service account tokens. Without
//! either a request is `system:anonymous`: health paths answer, and what RBAC grants `system:unauthenticated` (such as the
//! discovery of token keys); the rest is 401. Authorization: `system:masters`, then the node authorizer for nodes, then RBAC.

pub mod bootstrap;
pub mod graph;
pub mod jwt;
pub mod node;
mod rbac;
mod roles;
pub mod tokens;

use std::collections::BTreeMap;

use apimachinery::status::Status;

use crate::cluster::Cluster;
use crate::request::{Query, RequestInfo};

pub use rbac::{Rbac, Rule, rules_of};

pub const MASTERS: &str = "system:masters";
pub const AUTHENTICATED: &str = "system:authenticated";
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
pub const ANONYMOUS: &str = "system:anonymous";
pub const NODES: &str = "system:nodes";
pub const NODE_PREFIX: &str = "system:node:";

/// A user as authentication found it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserInfo {
    pub name: String,
    pub groups: Vec<String>,
    pub uid: String,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl UserInfo {
    /// A user in `groups`; `system:authenticated` is added.
    pub fn new<G: Into<String>>(name: impl Into<String>, groups: impl IntoIterator<Item = G>) -> Self {
        let mut groups: Vec<String> = groups.into_iter().map(Into::into).collect();
        if !groups.iter().any(|g| g == AUTHENTICATED) {
            groups.push(AUTHENTICATED.into());
        }
        UserInfo {
            name: name.into(),
            groups,
            ..UserInfo::default()
        }
    }

    /// The cluster's own administrator, for components of this process that need everything.
    pub fn admin(name: impl Into<String>) -> Self {
        UserInfo::new(name, [MASTERS])
    }

    pub fn anonymous() -> Self {
        UserInfo {
            name: ANONYMOUS.into(),
            groups: vec![UNAUTHENTICATED.into()],
            ..UserInfo::default()
        }
    }

    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// The node this user is, if it is one.
    pub fn node(&self) -> Option<&str> {
        self.name
            .strip_prefix(NODE_PREFIX)
            .filter(|n| !n.is_empty() && self.in_group(NODES))
    }
}

/// What is to be authorized.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub verb: String,
    pub group: String,
    pub resource: String,
    pub subresource: String,
    pub namespace: String,
    pub name: String,
    /// Set instead of a resource for other paths.
    pub path: String,
    /// The selector of a list or watch, for decisions that depend on it.
    pub field_selector: String,
}

impl Attributes {
    pub fn of(info: &RequestInfo, query: &Query) -> Self {
        match &info.target {
            None => Attributes {
                verb: info.verb.into(),
                path: info.path.clone(),
                ..Attributes::default()
            },
            Some(t) => Attributes {
                verb: info.verb.into(),
                group: t.group.clone(),
                resource: t.resource.clone(),
                subresource: t.subresource.clone(),
                namespace: t.namespace.clone(),
                name: t.name.clone(),
                path: String::new(),
                field_selector: query.get("fieldSelector").to_owned(),
            },
        }
    }

    /// `pods/status` style name.
    pub fn full_resource(&self) -> String {
        if self.subresource.is_empty() {
            self.resource.clone()
        } else {
            format!("{}/{}", self.resource, self.subresource)
        }
    }
}

/// An authorizer's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Allow(String),
    /// Why not, empty if there is nothing to say.
    Deny(String),
}

impl Decision {
    pub fn allowed(&self) -> bool {
        matches!(self, Decision::Allow(_))
    }
}

/// Decides one request.
pub fn authorize(cluster: &Cluster, user: &UserInfo, attributes: &Attributes) -> Decision {
    if user.in_group(MASTERS) {
        return Decision::Allow(String::new());
    }
    let mut reason = String::new();
    if user.in_group(NODES) {
        match node::authorize(cluster, user, attributes) {
            Decision::Deny(why) => reason = why,
            allow => return allow,
        }
    }
    match cluster.rbac.authorize(user, attributes) {
        Decision::Deny(_) => Decision::Deny(reason),
        allow => allow,
    }
}

/// The 403 with upstream's words.
pub fn forbidden(user: &UserInfo, attributes: &Attributes, reason: &str) -> Status {
    let who = format!("User {:?} cannot", user.name);
    let tail = if reason.is_empty() {
        String::new()
    } else {
        format!(": {reason}")
    };
    if attributes.resource.is_empty() {
        let mut status = Status::forbidden("", "", "");
        status.message = format!("forbidden: {who} {} path {:?}{tail}", attributes.verb, attributes.path);
        return status;
    }
    let scope = if attributes.namespace.is_empty() || attributes.resource == "namespaces" {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace {:?}", attributes.namespace)
    };
    let why = format!(
        "{who} {} resource {:?} in API group {:?} {scope}{tail}",
        attributes.verb,
        attributes.full_resource(),
        attributes.group
    );
    let resource = if attributes.group.is_empty() {
        attributes.resource.clone()
    } else {
        format!("{}.{}", attributes.resource, attributes.group)
    };
    Status::forbidden(&resource, &attributes.name, &why)
}

//! The node authorizer and NodeRestriction: a node reads what its own pods need and writes about itself only.
//!
//! "Its own" is what the pods bound to the node name at the moment of the request: see [`super::graph`].

use apimachinery::meta;
use apimachinery::selector::FieldSelector;
use apimachinery::status::Status;
use serde_json::Value;

use super::graph::{Named, node_of};
use super::{Attributes, Decision, UserInfo};
use crate::admission::Operation;
use crate::cluster::Cluster;
use crate::handlers::Context;

/// Namespace of node leases.
const LEASES: &str = "kube-node-lease";
/// Label prefixes a node may not set on itself, but for the well-known ones.
const RESTRICTED_LABELS: &str = "node-restriction.kubernetes.io/";

/// Decides a request of a user in `system:nodes`.
pub fn authorize(cluster: &Cluster, user: &UserInfo, a: &Attributes) -> Decision {
    let Some(node) = user.node() else {
        return Decision::Deny(format!("unknown node for user {:?}", user.name));
    };
    let allow = || Decision::Allow(String::new());
    let deny = |why: &str| Decision::Deny(why.to_owned());
    let reads = matches!(a.verb.as_str(), "get" | "list" | "watch");
    let writes = matches!(a.verb.as_str(), "create" | "update" | "patch" | "delete");
    let selected = |field: &str| {
        FieldSelector::parse(&a.field_selector)
            .ok()
            .and_then(|s| s.exact(field).map(str::to_owned))
    };

    match (a.group.as_str(), a.resource.as_str(), a.subresource.as_str()) {
        ("", "services" | "namespaces" | "nodes", "") | ("discovery.k8s.io", "endpointslices", "") if reads => allow(),
        ("", "endpoints" | "serviceaccounts", "") if reads => allow(),
        ("", "nodes", "" | "status") if writes => {
            // The name of a creation is checked by admission.
            if a.name.is_empty() && a.verb == "create" || a.name == node {
                allow()
            } else {
                deny("a node may only change itself")
            }
        }
        ("", "pods", "") if reads => {
            let own = selected("spec.nodeName").as_deref() == Some(node);
            let name = if a.name.is_empty() {
                selected("metadata.name").unwrap_or_default()
            } else {
                a.name.clone()
            };
            let bound = !name.is_empty()
                && cluster
                    .pods
                    .get(&a.namespace, &name)
                    .is_none_or(|p| node_of(&p) == node);
            if own || bound {
                allow()
            } else {
                deny("can only read pods with field selector spec.nodeName=<this node>")
            }
        }
        ("", "pods", "" | "status") if matches!(a.verb.as_str(), "update" | "patch" | "delete") => {
            let bound = cluster
                .pods
                .get(&a.namespace, &a.name)
                .is_none_or(|p| node_of(&p) == node);
            let part = a.subresource == "status" || a.verb == "delete";
            if bound && part {
                allow()
            } else {
                deny("a node may only change the status of its own pods and delete them")
            }
        }
        ("", "pods", "eviction") if a.verb == "create" => match cluster.pods.get(&a.namespace, &a.name) {
            Some(pod) if node_of(&pod) == node => allow(),
            _ => deny("a node may only evict its own pods"),
        },
        ("", "secrets" | "configmaps" | "persistentvolumeclaims", "") if reads => {
            let named = match a.resource.as_str() {
                "secrets" => Named::Secret,
                "configmaps" => Named::ConfigMap,
                _ => Named::Claim,
            };
            let name = if a.name.is_empty() {
                selected("metadata.name").unwrap_or_default()
            } else {
                a.name.clone()
            };
            if name.is_empty() {
                return deny("can only read an individual object of this type");
            }
            related(cluster, node, named, &a.namespace, &name)
        }
        ("", "serviceaccounts", "token") if a.verb == "create" => {
            related(cluster, node, Named::ServiceAccount, &a.namespace, &a.name)
        }
        ("coordination.k8s.io", "leases", "") => {
            let own = a.namespace == LEASES && (a.name == node || (a.verb == "create" && a.name.is_empty()));
            if own {
                allow()
            } else {
                deny("can only access the node lease with the same name as the node")
            }
        }
        ("" | "events.k8s.io", "events", "") if matches!(a.verb.as_str(), "create" | "update" | "patch") => allow(),
        ("certificates.k8s.io", "certificatesigningrequests", "")
            if matches!(a.verb.as_str(), "create" | "get" | "list" | "watch") =>
        {
            allow()
        }
        ("authentication.k8s.io", "tokenreviews", "") | ("authorization.k8s.io", "subjectaccessreviews", "")
            if a.verb == "create" =>
        {
            allow()
        }
        _ => deny(""),
    }
}

fn related(cluster: &Cluster, node: &str, named: Named, namespace: &str, name: &str) -> Decision {
    if cluster.graph.reaches(&cluster.registry, node, named, namespace, name) {
        Decision::Allow(String::new())
    } else {
        Decision::Deny(format!("no relationship found between node '{node}' and this object"))
    }
}

/// NodeRestriction: what authorization cannot see because it stands in the object.
pub fn restrict(cx: &Context, operation: Operation, old: Option<&Value>, new: &Value) -> Result<(), Status> {
    let Some(node) = cx.user.node() else { return Ok(()) };
    let refuse = |why: String| Err(Status::forbidden(&cx.target.group_resource(), &cx.target.name, &why));
    match (cx.served.info.group.as_str(), cx.served.info.plural.as_str(), operation) {
        ("", "nodes", Operation::Create | Operation::Update(_)) => {
            if meta::name(new) != node {
                return refuse(format!(
                    "node {node:?} is not allowed to modify node {:?}",
                    meta::name(new)
                ));
            }
            let before = |key: &str| {
                old.and_then(|o| o["metadata"]["labels"].get(key))
                    .and_then(Value::as_str)
            };
            for (key, value) in meta::labels(new) {
                if key.starts_with(RESTRICTED_LABELS) && before(key) != Some(value) {
                    return refuse(format!("node {node:?} is not allowed to set label {key}"));
                }
            }
            // Taints keep pods of others away; only registration sets them.
            if let Some(old) = old
                && old["spec"]["taints"] != new["spec"]["taints"]
            {
                return refuse(format!("node {node:?} is not allowed to modify taints"));
            }
            Ok(())
        }
        ("coordination.k8s.io", "leases", Operation::Create) if meta::name(new) != node => {
            refuse("can only access the node lease with the same name as the node".into())
        }
        ("", "pods", Operation::Create) => refuse("nodes may not create pods here".into()),
        _ => Ok(()),
    }
}

/// The pod that a token is asked for must run on the node.
pub fn restrict_token(
    cluster: &Cluster,
    user: &UserInfo,
    namespace: &str,
    account: &str,
    request: &Value,
) -> Result<(), Status> {
    let Some(node) = user.node() else { return Ok(()) };
    let reference = &request["spec"]["boundObjectRef"];
    let refuse = |why: &str| Err(Status::forbidden("serviceaccounts", account, why));
    if reference["kind"] != "Pod" {
        return refuse("node requested token not bound to a pod");
    }
    let name = reference["name"].as_str().unwrap_or_default();
    let uid = reference["uid"].as_str().unwrap_or_default();
    match cluster.pods.get(namespace, name) {
        Some(pod) if node_of(&pod) != node => {
            refuse("node requested token bound to a pod scheduled on a different node")
        }
        Some(pod) if *pod.header().uid != *uid => refuse("node requested token with a pod UID that is not the pod's"),
        Some(_) => Ok(()),
        None => refuse("node requested token bound to a pod that does not exist"),
    }
}

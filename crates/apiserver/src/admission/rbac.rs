//! No one grants rights they do not have: a role's rules, and the rules of a role that is bound, must be the user's own,
//! or the user may `escalate` (roles) or `bind` (bindings).

use apimachinery::meta;
use apimachinery::status::Status;
use serde_json::Value;

use super::Operation;
use crate::auth::{self, Attributes, MASTERS, Rule, rules_of};
use crate::handlers::Context;

const GROUP: &str = "rbac.authorization.k8s.io";

pub fn check(cx: &Context, operation: Operation, old: Option<&Value>, new: &Value) -> Result<(), Status> {
    if cx.served.info.group != GROUP || operation == Operation::Delete || cx.user.in_group(MASTERS) {
        return Ok(());
    }
    let namespace = if cx.served.info.namespaced {
        cx.target.namespace.as_str()
    } else {
        ""
    };
    match cx.served.info.plural.as_str() {
        "roles" | "clusterroles" => {
            if old.is_some_and(|o| o["rules"] == new["rules"] && o["aggregationRule"] == new["aggregationRule"])
                || may(cx, "escalate", &cx.served.info.plural, namespace, meta::name(new))
            {
                return Ok(());
            }
            let mut rules = rules_of(new);
            if new["aggregationRule"].is_object() {
                // Whatever the selectors find, now or later: only who may do everything may say so.
                rules.push(Rule::everything());
            }
            covered(cx, namespace, new, &rules)
        }
        _ => {
            if old.is_some_and(|o| o["roleRef"] == new["roleRef"] && o["subjects"] == new["subjects"]) {
                return Ok(());
            }
            let kind = new["roleRef"]["kind"].as_str().unwrap_or_default();
            let role = new["roleRef"]["name"].as_str().unwrap_or_default();
            let plural = if kind == "Role" { "roles" } else { "clusterroles" };
            if may(cx, "bind", plural, namespace, role) {
                return Ok(());
            }
            match cx.cluster.rbac.rules_of_role(kind, namespace, role) {
                Some(rules) => covered(cx, namespace, new, &rules),
                None => Err(Status::not_found(&format!("{plural}.{GROUP}"), role)),
            }
        }
    }
}

fn may(cx: &Context, verb: &str, plural: &str, namespace: &str, name: &str) -> bool {
    let attributes = Attributes {
        verb: verb.into(),
        group: GROUP.into(),
        resource: plural.into(),
        namespace: namespace.into(),
        name: name.into(),
        ..Attributes::default()
    };
    auth::authorize(&cx.cluster, &cx.user, &attributes).allowed()
}

fn covered(cx: &Context, namespace: &str, object: &Value, rules: &[Rule]) -> Result<(), Status> {
    let held = cx.cluster.rbac.rules(&cx.user, namespace);
    let missing: Vec<String> = rules
        .iter()
        .flat_map(Rule::atoms)
        .filter(|atom| !held.iter().any(|h| h.covers(atom)))
        .map(|a| a.to_string())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let why = format!(
        "user {:?} (groups={:?}) is attempting to grant RBAC permissions not currently held:\n{}",
        cx.user.name,
        cx.user.groups,
        missing.join("\n")
    );
    Err(Status::forbidden(&cx.target.group_resource(), meta::name(object), &why))
}

//! What an update may not change.

use serde_json::{Value, json};

use super::{Errors, list, same, service, text};

pub(super) fn pod(errors: &mut Errors, new: &Value, old: &Value) {
    for field in ["containers", "initContainers"] {
        if list(&new[field]).len() != list(&old[field]).len() {
            errors.forbidden(format!("spec.{field}"), "pod updates may not add or remove containers");
            return;
        }
    }
    let (deadline, before) = (
        new["activeDeadlineSeconds"].as_i64(),
        old["activeDeadlineSeconds"].as_i64(),
    );
    match (deadline, before) {
        (Some(n), Some(o)) if n > o => {
            errors.invalid(
                "spec.activeDeadlineSeconds",
                n,
                "must be less than or equal to previous value",
            );
            return;
        }
        (None, Some(_)) => {
            let detail = "must not update from a positive integer to nil value";
            errors.invalid("spec.activeDeadlineSeconds", Value::Null, detail);
        }
        _ => {}
    }
    tolerations(errors, new, old);
    for (i, gate) in list(&new["schedulingGates"]).iter().enumerate() {
        if !list(&old["schedulingGates"]).contains(gate) {
            let detail = format!(
                "only deletion is allowed, but found new scheduling gate '{}'",
                text(gate, "name")
            );
            errors.forbidden(format!("spec.schedulingGates[{i}].name"), &detail);
        }
    }
    // What may change is taken from the old object; then the rest must be equal.
    let mut rest = new.clone();
    for field in ["containers", "initContainers"] {
        for (i, was) in list(&old[field]).iter().enumerate() {
            rest[field][i]["image"] = was["image"].clone();
        }
    }
    for field in ["activeDeadlineSeconds", "schedulingGates", "tolerations"] {
        copy(&mut rest, old, field);
    }
    let grace = "terminationGracePeriodSeconds";
    if old[grace].as_i64().is_some_and(|g| g < 0) && rest[grace] == 1 {
        copy(&mut rest, old, grace);
    }
    if !list(&old["schedulingGates"]).is_empty() {
        // A gated pod may still be narrowed.
        copy(&mut rest, old, "nodeSelector");
        copy(&mut rest, old, "affinity");
    }
    if !same(&rest, old) {
        let detail = "pod updates may not change fields other than `spec.containers[*].image`,\
                      `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
                      `spec.tolerations` (only additions to existing tolerations),\
                      `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";
        errors.forbidden("spec", detail);
    }
}

fn copy(to: &mut Value, from: &Value, field: &str) {
    if let Some(to) = to.as_object_mut() {
        match from.get(field) {
            Some(value) => drop(to.insert(field.into(), value.clone())),
            None => drop(to.remove(field)),
        }
    }
}

fn tolerations(errors: &mut Errors, new: &Value, old: &Value) {
    let without = |t: &Value| {
        let mut t = t.clone();
        t["tolerationSeconds"] = Value::Null;
        t
    };
    let kept: Vec<Value> = list(&new["tolerations"]).iter().map(without).collect();
    if list(&old["tolerations"]).iter().any(|t| !kept.contains(&without(t))) {
        let detail = "existing toleration can not be modified except its tolerationSeconds";
        errors.forbidden("spec.tolerations", detail);
    }
}

pub(super) fn service(errors: &mut Errors, new: &Value, old: &Value) {
    let (n, o) = (&new["spec"], &old["spec"]);
    if n["type"] == "ExternalName" || o["type"] == "ExternalName" {
        return;
    }
    if service::headless(new) && service::headless(old) {
        return;
    }
    let (now, before) = (list(&n["clusterIPs"]), list(&o["clusterIPs"]));
    if let Some(first) = before.first() {
        match now.first() {
            None => errors.invalid("spec.clusterIPs[0]", json!(now), "primary clusterIP can not be unset"),
            Some(ip) if ip != first => errors.invalid("spec.clusterIPs[0]", json!(now), "may not change once set"),
            Some(_) => {}
        }
    }
    let class = &o["loadBalancerClass"];
    if o["type"] == "LoadBalancer" && n["type"] == "LoadBalancer" && *class != n["loadBalancerClass"] {
        errors.invalid(
            "spec.loadBalancerClass",
            n["loadBalancerClass"].clone(),
            "may not change once set",
        );
    }
}

pub(super) fn secret(errors: &mut Errors, new: &Value, old: &Value) {
    errors.immutable("type", &new["type"], &old["type"]);
    frozen(errors, new, old, &["data"]);
}

pub(super) fn config_map(errors: &mut Errors, new: &Value, old: &Value) {
    frozen(errors, new, old, &["data", "binaryData"]);
}

/// Fields that `immutable: true` freezes.
fn frozen(errors: &mut Errors, new: &Value, old: &Value, fields: &[&str]) {
    if old["immutable"] != true {
        return;
    }
    let detail = "field is immutable when `immutable` is set";
    if new["immutable"] != true {
        errors.forbidden("immutable", detail);
    }
    for field in fields {
        if new[*field] != old[*field] {
            errors.forbidden(*field, detail);
        }
    }
}

pub(super) fn node(errors: &mut Errors, new: &Value, old: &Value) {
    let (new, old) = (&new["spec"], &old["spec"]);
    if !list(&old["podCIDRs"]).is_empty() && old["podCIDRs"] != new["podCIDRs"] {
        errors.forbidden(
            "spec.podCIDRs",
            "node updates may not change podCIDR except from \"\" to valid",
        );
    }
    if !text(old, "providerID").is_empty() && old["providerID"] != new["providerID"] {
        errors.forbidden(
            "spec.providerID",
            "node updates may not change providerID except from \"\" to valid",
        );
    }
}

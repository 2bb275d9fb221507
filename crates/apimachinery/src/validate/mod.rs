//! Validation of the served kinds, with upstream's paths and texts. Objects come decoded and defaulted.
//!
//! The API server adds what only it knows: whether a namespace may be set, allocations, preconditions.

mod addresses;
mod batch;
mod classes;
mod config;
mod definition;
mod ingress;
mod limits;
mod meta;
pub mod names;
mod pod;
mod probe;
mod rbac;
mod schema;
mod service;
mod sets;
mod update;
mod volume;
mod workload;

use serde_json::Value;

pub use crate::field::{FieldError, FieldErrorKind};
use crate::gvk::Gvk;
pub use classes::SYSTEM_PRIORITIES;
pub use definition::{approval_problem, is_established, selectable_path, structural_errors};
pub use schema::custom;
pub(crate) use schema::embedded as embedded_metadata;

/// Field errors of an object that is to be created; empty if it is valid.
pub fn create(gvk: &Gvk, object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    if let Some(rule) = meta::name_rule(gvk) {
        meta::create(&mut errors, object, rule);
        if &*gvk.group != "apiextensions.k8s.io" {
            meta::known_finalizers(&mut errors, object);
        }
    }
    content(&mut errors, gvk, object);
    match (&*gvk.group, &*gvk.version, &*gvk.kind) {
        ("apps", "v1", "ControllerRevision") => classes::controller_revision(&mut errors, object, true),
        ("apiextensions.k8s.io", "v1", "CustomResourceDefinition") => {
            definition::name(&mut errors, object);
            definition::content(&mut errors, object, None);
        }
        ("networking.k8s.io", "v1", "Ingress") => ingress::created(&mut errors, object),
        _ => {}
    }
    errors.0
}

/// Field errors of `new`, which is to replace `old`; empty if it may.
pub fn update(gvk: &Gvk, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    if meta::name_rule(gvk).is_some() {
        meta::update(&mut errors, new, old);
    }
    content(&mut errors, gvk, new);
    match (&*gvk.group, &*gvk.version, &*gvk.kind) {
        ("", "v1", "Pod") => update::pod(&mut errors, &new["spec"], &old["spec"]),
        ("", "v1", "Service") => update::service(&mut errors, new, old),
        ("", "v1", "Secret") => update::secret(&mut errors, new, old),
        ("", "v1", "ConfigMap") => update::config_map(&mut errors, new, old),
        ("", "v1", "ResourceQuota") => {
            errors.immutable("spec.scopes", &new["spec"]["scopes"], &old["spec"]["scopes"]);
        }
        ("", "v1", "Node") => update::node(&mut errors, new, old),
        ("batch", "v1", "Job") => batch::job_update(&mut errors, new, old),
        ("apps", "v1", "Deployment" | "ReplicaSet" | "DaemonSet") => {
            errors.immutable("spec.selector", &new["spec"]["selector"], &old["spec"]["selector"]);
        }
        ("rbac.authorization.k8s.io", "v1", "RoleBinding" | "ClusterRoleBinding")
            if new["roleRef"] != old["roleRef"] =>
        {
            errors.invalid("roleRef", new["roleRef"].clone(), "cannot change roleRef");
        }
        ("apps", "v1", "ControllerRevision") => {
            classes::controller_revision(&mut errors, new, false);
            errors.immutable("data", &new["data"], &old["data"]);
        }
        ("networking.k8s.io", "v1", "IPAddress") => {
            errors.immutable("spec.parentRef", &new["spec"]["parentRef"], &old["spec"]["parentRef"]);
        }
        ("networking.k8s.io", "v1", "ServiceCIDR") => {
            errors.immutable("spec.cidrs", &new["spec"]["cidrs"], &old["spec"]["cidrs"]);
        }
        ("networking.k8s.io", "v1", "IngressClass") => {
            let controller = |o: &Value| o["spec"]["controller"].clone();
            errors.immutable("spec.controller", &controller(new), &controller(old));
        }
        ("scheduling.k8s.io", "v1", "PriorityClass") => classes::priority_class_update(&mut errors, new, old),
        ("apiextensions.k8s.io", "v1", "CustomResourceDefinition") => definition::content(&mut errors, new, Some(old)),
        ("storage.k8s.io", "v1", "StorageClass") => classes::storage_class_update(&mut errors, new, old),
        ("discovery.k8s.io", "v1", "EndpointSlice") => {
            errors.immutable("addressType", &new["addressType"], &old["addressType"]);
        }
        _ => {}
    }
    errors.0
}

fn content(errors: &mut Errors, gvk: &Gvk, object: &Value) {
    match (&*gvk.group, &*gvk.version, &*gvk.kind) {
        ("", "v1", "Pod") => pod::spec(errors, "spec", &object["spec"], false),
        ("", "v1", "Service") => service::service(errors, object),
        ("", "v1", "Secret") => config::secret(errors, object),
        ("", "v1", "ConfigMap") => config::config_map(errors, object),
        ("", "v1", "Node") => config::node(errors, object),
        ("", "v1", "LimitRange") => limits::limit_range(errors, object),
        ("", "v1", "ResourceQuota") => limits::resource_quota(errors, object),
        ("", "v1", "Endpoints") => service::endpoints(errors, object),
        ("", "v1", "Binding") => config::binding(errors, object),
        ("", "v1", "PodTemplate") => pod::spec(errors, "template.spec", &object["template"]["spec"], true),
        ("networking.k8s.io", "v1", "IPAddress") => addresses::ip_address(errors, object),
        ("networking.k8s.io", "v1", "ServiceCIDR") => addresses::service_cidr(errors, object),
        ("networking.k8s.io", "v1", "Ingress") => ingress::ingress(errors, object),
        ("networking.k8s.io", "v1", "IngressClass") => classes::ingress_class(errors, object),
        ("scheduling.k8s.io", "v1", "PriorityClass") => classes::priority_class(errors, object),
        ("storage.k8s.io", "v1", "StorageClass") => classes::storage_class(errors, object),
        ("apps", "v1", "DaemonSet") => sets::daemon_set(errors, object),
        ("batch", "v1", "Job") => batch::job(errors, object),
        ("batch", "v1", "CronJob") => batch::cron_job(errors, object),
        ("policy", "v1", "PodDisruptionBudget") => sets::disruption_budget(errors, object),
        ("apps", "v1", "Deployment") => {
            workload::deployment(errors, object);
            let parts = ["updatedReplicas", "readyReplicas", "availableReplicas"];
            workload::status(errors, object, &parts);
        }
        ("apps", "v1", "ReplicaSet") => {
            workload::replica_set(errors, object);
            let parts = ["fullyLabeledReplicas", "readyReplicas", "availableReplicas"];
            workload::status(errors, object, &parts);
        }
        ("autoscaling", "v1", "Scale") => errors.non_negative("spec.replicas", &object["spec"]["replicas"]),
        ("coordination.k8s.io", "v1", "Lease") => config::lease(errors, object),
        ("discovery.k8s.io", "v1", "EndpointSlice") => service::endpoint_slice(errors, object),
        ("rbac.authorization.k8s.io", "v1", "Role") => rbac::rules(errors, object, true),
        ("rbac.authorization.k8s.io", "v1", "ClusterRole") => rbac::rules(errors, object, false),
        ("rbac.authorization.k8s.io", "v1", "RoleBinding") => rbac::binding(errors, object, true),
        ("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding") => rbac::binding(errors, object, false),
        ("authentication.k8s.io", "v1", "TokenRequest") => config::token_request(errors, object),
        _ => {}
    }
}

/// Collects errors in the order of the checks.
#[derive(Default)]
struct Errors(Vec<FieldError>);

impl Errors {
    fn push(&mut self, error: FieldError) {
        self.0.push(error);
    }

    fn required(&mut self, path: impl Into<String>, detail: &str) {
        self.push(FieldError::required(path, detail));
    }

    fn invalid(&mut self, path: impl Into<String>, value: impl Into<Value>, detail: &str) {
        self.push(FieldError::invalid(path, value, detail));
    }

    fn forbidden(&mut self, path: impl Into<String>, detail: &str) {
        self.push(FieldError::forbidden(path, detail));
    }

    /// One error per message.
    fn messages(&mut self, path: &str, value: &str, messages: Vec<String>) {
        for message in messages {
            self.invalid(path, value, &message);
        }
    }

    /// A required choice.
    fn one_of(&mut self, path: &str, value: &Value, supported: &[&str]) {
        match value.as_str().unwrap_or_default() {
            "" => self.required(path, ""),
            v if supported.contains(&v) => {}
            v => self.push(FieldError::not_supported(path, v, supported)),
        }
    }

    fn non_negative(&mut self, path: &str, value: &Value) {
        if let Some(n) = value.as_i64().filter(|n| *n < 0) {
            self.invalid(path, n, "must be greater than or equal to 0");
        }
    }

    fn port_number(&mut self, path: &str, value: &Value) {
        let n = value.as_i64().unwrap_or_default();
        if !(1..=65535).contains(&n) {
            self.invalid(path, n, "must be between 1 and 65535, inclusive");
        }
    }

    fn port_number_or_name(&mut self, path: &str, value: &Value) {
        match value.as_str() {
            Some(name) => self.messages(path, name, names::port_name(name)),
            None => self.port_number(path, value),
        }
    }

    fn labels(&mut self, path: &str, labels: &Value) {
        for (key, value) in labels.as_object().into_iter().flatten() {
            self.messages(path, key, names::qualified(key));
            let value = value.as_str().unwrap_or_default();
            self.messages(path, value, names::label_value(value));
        }
    }

    fn immutable(&mut self, path: &str, new: &Value, old: &Value) {
        if !same(new, old) {
            self.invalid(path, new.clone(), "field is immutable");
        }
    }
}

/// Equality that does not tell an empty list, or null, from an absent field.
fn same(a: &Value, b: &Value) -> bool {
    let empty = |v: &Value| v.is_null() || v.as_array().is_some_and(Vec::is_empty);
    match (a, b) {
        _ if empty(a) || empty(b) => empty(a) && empty(b),
        (Value::Object(x), Value::Object(y)) => {
            let null = Value::Null;
            x.iter().all(|(k, v)| same(v, y.get(k).unwrap_or(&null)))
                && y.iter().all(|(k, v)| x.contains_key(k) || empty(v))
        }
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(a, b)| same(a, b)),
        _ => a == b,
    }
}

/// Elements of a list; none if it is no list.
fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Text of a field; empty if it is absent.
fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests;

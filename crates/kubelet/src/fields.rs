//! Downward API: field and resource references of a pod. Pure.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{ObjectFieldSelector, ResourceFieldSelector};
use thiserror::Error;

use crate::{
    config::Capacity,
    pod::view::{PodView, limit, milli, request},
};

#[derive(Debug, Error, PartialEq)]
pub enum FieldError {
    #[error("fieldPath {path} is not supported")]
    Path { path: String },
    #[error("resource {resource} is not supported")]
    Resource { resource: String },
    #[error("container {name} is not in the pod")]
    Container { name: String },
    #[error("divisor {divisor} is not a positive quantity")]
    Divisor { divisor: String },
}

/// What references are resolved against.
pub struct FieldContext<'a> {
    pub view: &'a PodView,
    /// The node's allocatable: what a missing limit stands for.
    pub node: &'a Capacity,
    pub host_ips: &'a [IpAddr],
    /// Empty before the sandbox has an address.
    pub pod_ips: &'a [IpAddr],
}

impl FieldContext<'_> {
    /// # Errors
    /// `Path` if upstream knows no such field either.
    pub fn field(&self, r: &ObjectFieldSelector) -> Result<String, FieldError> {
        let meta = &self.view.pod.metadata;
        let join = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let first = |ips: &[IpAddr]| ips.first().map(ToString::to_string).unwrap_or_default();
        let path = r.field_path.as_str();
        if let Some((map, key)) = subscript(path) {
            let map = match map {
                "metadata.labels" => meta.labels.as_ref(),
                "metadata.annotations" => meta.annotations.as_ref(),
                _ => return Err(FieldError::Path { path: path.to_owned() }),
            };
            return Ok(map.and_then(|m| m.get(key)).cloned().unwrap_or_default());
        }
        Ok(match path {
            "metadata.name" => self.view.name.clone(),
            "metadata.namespace" => self.view.namespace.clone(),
            "metadata.uid" => self.view.uid.clone(),
            "metadata.labels" => lines(meta.labels.iter().flatten()),
            "metadata.annotations" => lines(meta.annotations.iter().flatten()),
            "spec.nodeName" => self.view.spec().node_name.clone().unwrap_or_default(),
            "spec.serviceAccountName" => self.view.spec().service_account_name.clone().unwrap_or_default(),
            "status.hostIP" => first(self.host_ips),
            "status.hostIPs" => join(self.host_ips),
            "status.podIP" => first(self.pod_ips),
            "status.podIPs" => join(self.pod_ips),
            _ => return Err(FieldError::Path { path: path.to_owned() }),
        })
    }

    /// The value divided by the divisor and rounded up, as a whole number. `own` is the container that asks.
    ///
    /// # Errors
    /// A resource, container or divisor that does not exist.
    pub fn resource(&self, r: &ResourceFieldSelector, own: &str) -> Result<String, FieldError> {
        let name = r.container_name.as_deref().filter(|n| !n.is_empty()).unwrap_or(own);
        let member = self
            .view
            .member(name)
            .ok_or_else(|| FieldError::Container { name: name.to_owned() })?;
        let res = &member.container.resources;
        let unknown = || FieldError::Resource {
            resource: r.resource.clone(),
        };
        let (side, what) = r.resource.split_once('.').ok_or_else(unknown)?;
        let whole = match what {
            "cpu" => self.node.cpu_milli,
            "memory" => self.node.memory_bytes.saturating_mul(1000),
            "ephemeral-storage" => self.node.ephemeral_storage_bytes.saturating_mul(1000),
            other if other.starts_with("hugepages-") => 0,
            _ => return Err(unknown()),
        };
        let value = match side {
            "limits" => limit(res, what).filter(|v| *v > 0).unwrap_or(whole),
            "requests" => request(res, what).or_else(|| limit(res, what)).unwrap_or(0),
            _ => return Err(unknown()),
        };
        let divisor = match &r.divisor {
            Some(d) if !d.0.is_empty() && d.0 != "0" => milli(d),
            _ => 1000,
        };
        if divisor <= 0 {
            let divisor = r.divisor.as_ref().map(|d| d.0.clone()).unwrap_or_default();
            return Err(FieldError::Divisor { divisor });
        }
        Ok((i128::from(value) + i128::from(divisor) - 1)
            .div_euclid(i128::from(divisor))
            .to_string())
    }
}

/// `metadata.labels['key']` in its two parts.
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, rest) = path.split_once('[')?;
    let key = rest.strip_suffix(']')?;
    let key = key
        .strip_prefix('\'')
        .and_then(|k| k.strip_suffix('\''))
        .or_else(|| key.strip_prefix('"').and_then(|k| k.strip_suffix('"')))?;
    Some((map, key))
}

/// `key="value"` per line, in key order, values quoted as Go's `%q` does.
fn lines<'a>(entries: impl Iterator<Item = (&'a String, &'a String)>) -> String {
    entries
        .map(|(k, v)| format!("{k}={}", quote(v)))
        .collect::<Vec<_>>()
        .join("\n")
}

fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::pod_with;

    fn with<T>(check: impl FnOnce(&FieldContext<'_>) -> T) -> T {
        let view = PodView::new(pod_with(
            json!({"labels": {"b": "2", "a": "x\"y"}}),
            json!({"nodeName": "n1", "containers": [
                {"name": "c", "image": "i", "resources": {"limits": {"memory": "64Mi"}, "requests": {"cpu": "250m"}}}]}),
        ));
        let node = Capacity {
            cpu_milli: 4000,
            memory_bytes: 1 << 30,
            ..Default::default()
        };
        let pod_ips = ["10.0.0.4".parse().unwrap()];
        check(&FieldContext {
            view: &view,
            node: &node,
            host_ips: &[],
            pod_ips: &pod_ips,
        })
    }

    #[test]
    fn fields() {
        let get = |path: &str| {
            with(|c| {
                c.field(&ObjectFieldSelector {
                    api_version: None,
                    field_path: path.into(),
                })
            })
        };
        assert_eq!(get("metadata.labels['b']").unwrap(), "2");
        assert_eq!(get("metadata.labels").unwrap(), "a=\"x\\\"y\"\nb=\"2\"");
        assert_eq!(get("status.podIP").unwrap(), "10.0.0.4");
        assert_eq!(get("spec.nodeName").unwrap(), "n1");
        assert!(get("spec.containers").is_err());
    }

    #[test]
    fn resources_round_up_and_fall_back_to_the_node() {
        let get = |resource: &str, divisor: &str| {
            with(|c| {
                let divisor = Some(k8s_openapi::apimachinery::pkg::api::resource::Quantity(divisor.into()));
                c.resource(
                    &ResourceFieldSelector {
                        container_name: None,
                        divisor,
                        resource: resource.into(),
                    },
                    "c",
                )
            })
        };
        assert_eq!(get("limits.memory", "1Mi").unwrap(), "64");
        assert_eq!(get("requests.cpu", "0").unwrap(), "1");
        assert_eq!(get("requests.cpu", "1m").unwrap(), "250");
        assert_eq!(get("limits.cpu", "1").unwrap(), "4");
        assert!(get("limits.gold", "1").is_err());
        assert!(get("limits.cpu", "-1").is_err());
    }
}

//! Which IPAddress objects are missing or left over. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::{IPAddress, IPAddressSpec, ParentReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

const MANAGED_BY: (&str, &str) = ("ipaddress.kubernetes.io/managed-by", "ipallocator.k8s.io");
const FAMILY: (&str, &str) = ("ipaddress.kubernetes.io/ip-family", "IPv4");

/// What is wrong with one address.
#[derive(Debug, Clone, PartialEq)]
pub enum Repair {
    Nothing,
    /// A service has the address and there is no object.
    Make(Arc<Service>),
    /// The object is a service's, and no service has the address.
    Remove,
}

/// The ClusterIP of a service, if it has one.
pub fn address_of(service: &Service) -> Option<&str> {
    let ip = service.spec.as_ref()?.cluster_ip.as_deref()?;
    (!matches!(ip, "" | "None")).then_some(ip)
}

/// The object for the address of `service`.
pub fn object(address: &str, service: &Service) -> IPAddress {
    let label = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
    IPAddress {
        metadata: ObjectMeta {
            name: Some(address.to_owned()),
            labels: Some(BTreeMap::from([label(MANAGED_BY), label(FAMILY)])),
            ..ObjectMeta::default()
        },
        spec: IPAddressSpec {
            parent_ref: ParentReference {
                resource: "services".to_owned(),
                namespace: service.metadata.namespace.clone(),
                name: service.metadata.name.clone().unwrap_or_default(),
                ..ParentReference::default()
            },
        },
    }
}

/// Plans for one address: its object, and the services that have it.
pub fn plan(address: Option<&IPAddress>, services: &[Arc<Service>]) -> Repair {
    let Some(address) = address else {
        return services.first().cloned().map_or(Repair::Nothing, Repair::Make);
    };
    let ours = address
        .metadata
        .labels
        .as_ref()
        .and_then(|l| l.get(MANAGED_BY.0))
        .map(String::as_str)
        == Some(MANAGED_BY.1);
    // What others made stays: it keeps the address from services.
    if ours && services.is_empty() {
        Repair::Remove
    } else {
        Repair::Nothing
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn objects_follow_services() {
        let service: Arc<Service> = Arc::new(
            serde_json::from_value(
                json!({"metadata": {"name": "s", "namespace": "n"}, "spec": {"clusterIP": "10.0.0.9"}}),
            )
            .unwrap(),
        );
        assert_eq!(address_of(&service), Some("10.0.0.9"));
        let made = object("10.0.0.9", &service);
        assert_eq!(
            plan(None, std::slice::from_ref(&service)),
            Repair::Make(service.clone())
        );
        assert_eq!(plan(Some(&made), &[service]), Repair::Nothing);
        assert_eq!(plan(Some(&made), &[]), Repair::Remove);
        assert_eq!(plan(Some(&IPAddress::default()), &[]), Repair::Nothing);
        assert_eq!(plan(None, &[]), Repair::Nothing);
    }
}

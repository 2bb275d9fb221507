//! EndpointSlices that say what a hand-made Endpoints object says. Pure.
//!
//! # Source
//! `pkg/controller/endpointslicemirroring` of Kubernetes 1.36.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{EndpointAddress, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::common::{controller_reference, name_of};
use crate::endpoints::plan::{MANAGED_BY, SERVICE_NAME, SlicePlan};

/// Who manages mirrored slices.
pub const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
const ENDPOINTS_MANAGER: &str = "endpoints.kubernetes.io/managed-by";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
const LAST_CHANGE: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Addresses mirrored of one subset, as upstream.
pub const SUBSET_MAX: usize = 1000;

/// Whether the object is mirrored: it belongs to a Service that selects no pods, and nobody says otherwise.
pub fn is_mirrored(endpoints: &Endpoints, service: Option<&Service>) -> bool {
    let label = |key: &str| {
        endpoints
            .metadata
            .labels
            .as_ref()
            .and_then(|l| l.get(key))
            .map(String::as_str)
    };
    let leader = endpoints
        .metadata
        .annotations
        .as_ref()
        .is_some_and(|a| a.contains_key(LEADER));
    let selects = |s: &Service| {
        s.spec
            .as_ref()
            .and_then(|s| s.selector.as_ref())
            .is_some_and(|s| !s.is_empty())
    };
    label(SKIP) != Some("true") && label(ENDPOINTS_MANAGER).is_none() && !leader && service.is_some_and(|s| !selects(s))
}

/// Family and ports that make a slice.
type Group = (&'static str, Vec<(String, String, i32, Option<String>)>);

/// Changes that make `existing` (the mirrored slices of this object) say what `endpoints` says. One slice per address
/// family and set of ports. The second value counts addresses that did not fit or are none.
pub fn plan(endpoints: &Endpoints, existing: &[Arc<EndpointSlice>]) -> (SlicePlan, usize) {
    let mut groups: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
    let mut skipped = 0;
    for subset in endpoints.subsets.iter().flatten() {
        let ports: Vec<_> = subset
            .ports
            .iter()
            .flatten()
            .map(|p| {
                let protocol = p.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
                (
                    p.name.clone().unwrap_or_default(),
                    protocol,
                    p.port,
                    p.app_protocol.clone(),
                )
            })
            .collect();
        let ready = subset.addresses.iter().flatten().map(|a| (a, true));
        let waiting = subset.not_ready_addresses.iter().flatten().map(|a| (a, false));
        for (i, (address, ready)) in ready.chain(waiting).enumerate() {
            let family = match address.ip.parse::<IpAddr>() {
                Ok(IpAddr::V4(_)) => "IPv4",
                Ok(IpAddr::V6(_)) => "IPv6",
                Err(_) => {
                    skipped += 1;
                    continue;
                }
            };
            if i >= SUBSET_MAX {
                skipped += 1;
                continue;
            }
            groups
                .entry((family, ports.clone()))
                .or_default()
                .push(endpoint(address, ready));
        }
    }
    let mut plan = SlicePlan::default();
    let mut kept = BTreeSet::new();
    for ((family, ports), list) in groups {
        let ports: Vec<EndpointPort> = ports.into_iter().map(port).collect();
        let old = existing.iter().find(|s| {
            s.address_type == family
                && s.ports.as_deref().unwrap_or_default() == ports
                && !kept.contains(name_of(&***s))
        });
        let fresh = slice(endpoints, family, ports, list, old.map(|s| &**s));
        match old {
            Some(old) => {
                kept.insert(name_of(&**old).to_owned());
                if fresh != **old {
                    plan.update.push(fresh);
                }
            }
            None => plan.create.push(fresh),
        }
    }
    plan.delete = existing
        .iter()
        .map(|s| name_of(&**s).to_owned())
        .filter(|name| !kept.contains(name))
        .collect();
    (plan, skipped)
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            ..EndpointConditions::default()
        }),
        hostname: address.hostname.clone().filter(|h| !h.is_empty()),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

fn port((name, protocol, port, app_protocol): (String, String, i32, Option<String>)) -> EndpointPort {
    EndpointPort {
        name: Some(name),
        protocol: Some(protocol),
        port: Some(port),
        app_protocol,
    }
}

fn slice(
    of: &Endpoints,
    family: &str,
    ports: Vec<EndpointPort>,
    endpoints: Vec<Endpoint>,
    old: Option<&EndpointSlice>,
) -> EndpointSlice {
    let mut labels = of.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.to_owned(), name_of(of).to_owned());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    let mut annotations = of.metadata.annotations.clone().unwrap_or_default();
    annotations.retain(|key, _| key != LAST_APPLIED && key != LAST_CHANGE);
    let mut metadata = match old {
        Some(old) => old.metadata.clone(),
        None => ObjectMeta {
            generate_name: Some(format!("{}-", name_of(of))),
            namespace: of.metadata.namespace.clone(),
            ..ObjectMeta::default()
        },
    };
    metadata.owner_references = Some(vec![controller_reference(of)]);
    metadata.labels = Some(labels);
    metadata.annotations = (!annotations.is_empty()).then_some(annotations);
    EndpointSlice {
        metadata,
        address_type: family.to_owned(),
        endpoints: Some(endpoints),
        ports: Some(ports),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn endpoints() -> Endpoints {
        serde_json::from_value(json!({
            "metadata": {"name": "e", "namespace": "n", "uid": "u", "labels": {"a": "b"},
                "annotations": {LAST_APPLIED: "{}", "keep": "1"}},
            "subsets": [
                {"addresses": [{"ip": "10.1.1.1", "nodeName": "x"}, {"ip": "fd00::1"}], "notReadyAddresses": [{"ip": "10.1.1.2"}],
                    "ports": [{"name": "http", "port": 80}]},
                {"addresses": [{"ip": "10.1.1.3"}, {"ip": "none"}], "ports": [{"port": 81, "protocol": "UDP"}]},
            ]}))
        .unwrap()
    }

    #[test]
    fn one_slice_per_family_and_ports_and_nothing_to_do_twice() {
        let (plan_, skipped) = plan(&endpoints(), &[]);
        assert_eq!((plan_.create.len(), skipped), (3, 1));
        let brief = |s: &EndpointSlice| {
            let list: Vec<String> = s
                .endpoints
                .iter()
                .flatten()
                .map(|e| format!("{}:{}", e.addresses[0], e.conditions.as_ref().unwrap().ready.unwrap()))
                .collect();
            format!("{} {}", s.address_type, list.join(","))
        };
        let all: Vec<String> = plan_.create.iter().map(brief).collect();
        assert_eq!(
            all,
            [
                "IPv4 10.1.1.3:true",
                "IPv4 10.1.1.1:true,10.1.1.2:false",
                "IPv6 fd00::1:true"
            ]
        );
        let meta = &plan_.create[0].metadata;
        assert_eq!(meta.annotations.as_ref().unwrap().keys().collect::<Vec<_>>(), ["keep"]);
        assert_eq!(meta.labels.as_ref().unwrap()[SERVICE_NAME], "e");
        let made: Vec<Arc<EndpointSlice>> = plan_
            .create
            .into_iter()
            .enumerate()
            .map(|(i, mut s)| {
                s.metadata.name = Some(format!("e-{i}"));
                Arc::new(s)
            })
            .collect();
        assert_eq!(plan(&endpoints(), &made).0, SlicePlan::default());
        let mut fewer = endpoints();
        fewer.subsets.as_mut().unwrap().remove(1);
        assert_eq!(plan(&fewer, &made).0.delete, ["e-0"]);
    }

    #[test]
    fn who_is_mirrored() {
        let plain: Service = serde_json::from_value(json!({"spec": {}})).unwrap();
        let selecting: Service = serde_json::from_value(json!({"spec": {"selector": {"a": "b"}}})).unwrap();
        assert!(is_mirrored(&endpoints(), Some(&plain)));
        assert!(!is_mirrored(&endpoints(), Some(&selecting)));
        assert!(!is_mirrored(&endpoints(), None));
        let mut skip = endpoints();
        skip.metadata
            .labels
            .as_mut()
            .unwrap()
            .insert(SKIP.into(), "true".into());
        assert!(!is_mirrored(&skip, Some(&plain)));
    }
}

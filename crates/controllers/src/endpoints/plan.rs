//! Which endpoints a Service has, and how they are laid out in EndpointSlices and Endpoints. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort as CorePort, EndpointSubset, Endpoints, ObjectReference, Pod, Service, ServicePort,
};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::common::{controller_reference, is_deleting, is_ready, is_terminal, name_of, uid_of};

/// Endpoints per slice, as upstream.
const SLICE_MAX: usize = 100;
/// Addresses in one Endpoints object, as upstream.
const ENDPOINTS_MAX: usize = 1000;
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
pub const SLICE_MANAGER: &str = "endpointslice-controller.k8s.io";
const ENDPOINTS_MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const ENDPOINTS_MANAGER: &str = "endpoint-controller";
const HEADLESS: &str = "service.kubernetes.io/headless";
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";

/// A port as both object kinds have it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    /// The Service port's name; empty if it has none.
    pub name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// The number in the pod.
    pub port: i32,
    /// `appProtocol`.
    pub app_protocol: Option<String>,
}

/// One pod behind a Service.
#[derive(Debug, Clone, PartialEq)]
pub struct Backend {
    /// The pod's addresses, first the primary one.
    pub addresses: Vec<IpAddr>,
    /// The Service's ports as this pod serves them.
    pub ports: Vec<Port>,
    /// Node and zone.
    pub node: Option<String>,
    /// Zone of the node.
    pub zone: Option<String>,
    /// Name for `<hostname>.<service>`.
    pub hostname: Option<String>,
    /// Takes new connections: ready, or wanted before it is.
    pub ready: bool,
    /// Its Ready condition is True.
    pub serving: bool,
    /// Being deleted.
    pub terminating: bool,
    /// The pod.
    pub target: ObjectReference,
}

/// Whether pods are looked up for this Service at all.
pub fn has_backends(service: &Service) -> bool {
    let spec = service.spec.as_ref();
    spec.and_then(|s| s.selector.as_ref()).is_some_and(|s| !s.is_empty())
        && spec.and_then(|s| s.type_.as_deref()) != Some("ExternalName")
}

/// The backends among pods the selector matches. `zone` gives the zone of a node. Pods that have ended or have no
/// address are none; pods that are being deleted count, as not ready.
pub fn backends(service: &Service, pods: &[Arc<Pod>], zone: impl Fn(&str) -> Option<String>) -> Vec<Backend> {
    let spec = service.spec.as_ref();
    let early = spec.and_then(|s| s.publish_not_ready_addresses).unwrap_or_default();
    let mut out = Vec::new();
    for pod in pods.iter().filter(|p| !is_terminal(p)) {
        let Some(status) = &pod.status else { continue };
        let texts = status
            .pod_ips
            .iter()
            .flatten()
            .map(|ip| ip.ip.as_str())
            .chain(status.pod_ip.as_deref());
        let mut addresses: Vec<IpAddr> = Vec::new();
        for address in texts.filter_map(|t| t.parse().ok()) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            continue;
        }
        let pod_spec = pod.spec.as_ref();
        let node = pod_spec.and_then(|s| s.node_name.clone()).filter(|n| !n.is_empty());
        let subdomain = pod_spec.and_then(|s| s.subdomain.as_deref());
        let hostname = pod_spec.and_then(|s| s.hostname.clone()).filter(|h| !h.is_empty());
        let (serving, terminating) = (is_ready(pod), is_deleting(&**pod));
        out.push(Backend {
            ports: spec
                .and_then(|s| s.ports.as_ref())
                .into_iter()
                .flatten()
                .filter_map(|p| resolve(p, pod))
                .collect(),
            zone: node.as_deref().and_then(&zone),
            hostname: hostname.filter(|_| subdomain == Some(name_of(service))),
            ready: early || (serving && !terminating),
            serving,
            terminating,
            addresses,
            node,
            target: ObjectReference {
                kind: Some("Pod".to_owned()),
                namespace: pod.metadata.namespace.clone(),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
                ..ObjectReference::default()
            },
        });
    }
    out.sort_by(|a, b| a.target.name.cmp(&b.target.name));
    out
}

/// The pod's number for a Service port; a name is looked up among its containers' ports.
fn resolve(port: &ServicePort, pod: &Pod) -> Option<Port> {
    let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
    let number = match &port.target_port {
        None => port.port,
        Some(IntOrString::Int(0)) => port.port,
        Some(IntOrString::Int(n)) => *n,
        Some(IntOrString::String(name)) => {
            let spec = pod.spec.as_ref()?;
            let sidecars = spec
                .init_containers
                .iter()
                .flatten()
                .filter(|c| c.restart_policy.as_deref() == Some("Always"));
            let same = |p: &&k8s_openapi::api::core::v1::ContainerPort| {
                p.name.as_deref() == Some(name) && p.protocol.as_deref().unwrap_or("TCP") == protocol
            };
            spec.containers
                .iter()
                .chain(sidecars)
                .flat_map(|c| c.ports.iter().flatten())
                .find(same)?
                .container_port
        }
    };
    let name = port.name.clone().unwrap_or_default();
    Some(Port {
        name,
        protocol,
        port: number,
        app_protocol: port.app_protocol.clone(),
    })
}

fn is_headless(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref()) == Some("None")
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    if is_headless(service) {
        labels.insert(HEADLESS.to_owned(), String::new());
    } else {
        labels.remove(HEADLESS);
    }
    labels
}

/// Changes that make the slices of a Service right.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SlicePlan {
    /// New slices; their names are generated.
    pub create: Vec<EndpointSlice>,
    /// Slices with new content, versions kept.
    pub update: Vec<EndpointSlice>,
    /// Names of slices no longer needed.
    pub delete: Vec<String>,
}

/// Lays the backends out in slices, changing as few of `existing` as possible: endpoints stay in their slice, new ones
/// fill room, new slices come last. A Service without endpoints keeps one empty slice per family.
pub fn slices(service: &Service, backends: &[Backend], existing: &[Arc<EndpointSlice>]) -> SlicePlan {
    let mut plan = SlicePlan::default();
    let mut kept: BTreeSet<&str> = BTreeSet::new();
    for (family, is_family) in families(service) {
        let mut groups: BTreeMap<Vec<Port>, Vec<Endpoint>> = BTreeMap::new();
        for backend in backends {
            let Some(address) = backend.addresses.iter().find(|a| is_family(a)) else {
                continue;
            };
            groups
                .entry(backend.ports.clone())
                .or_default()
                .push(endpoint(backend, *address));
        }
        let of_family: Vec<&Arc<EndpointSlice>> = existing.iter().filter(|s| s.address_type == family).collect();
        if groups.is_empty() {
            groups.insert(Vec::new(), Vec::new());
        }
        for (ports, endpoints) in groups {
            let wire_ports: Vec<EndpointPort> = ports.iter().map(wire_port).collect();
            let same: Vec<&EndpointSlice> = of_family
                .iter()
                .map(|s| &***s)
                .filter(|s| s.ports.as_deref().unwrap_or_default() == wire_ports)
                .collect();
            let chunks = lay_out(endpoints, &same);
            for (i, chunk) in chunks.into_iter().enumerate() {
                match same.get(i) {
                    Some(old) if chunk.is_empty() && kept_any(&same, i, &kept) => {
                        plan.delete.push(name_of(*old).to_owned());
                    }
                    Some(old) => {
                        kept.insert(name_of(*old));
                        let fresh = slice(service, family, wire_ports.clone(), chunk, Some(old));
                        if fresh != **old {
                            plan.update.push(fresh);
                        }
                    }
                    None => plan
                        .create
                        .push(slice(service, family, wire_ports.clone(), chunk, None)),
                }
            }
        }
    }
    for old in existing {
        let name = name_of(&**old);
        if !kept.contains(name) && !plan.delete.iter().any(|d| d == name) {
            plan.delete.push(name.to_owned());
        }
    }
    plan
}

/// Whether an earlier slice of the group is kept, so that an empty one is not needed.
fn kept_any(same: &[&EndpointSlice], before: usize, kept: &BTreeSet<&str>) -> bool {
    same[..before].iter().any(|s| kept.contains(name_of(*s)))
}

/// One list per existing slice (perhaps empty), then lists for new slices.
fn lay_out(endpoints: Vec<Endpoint>, same: &[&EndpointSlice]) -> Vec<Vec<Endpoint>> {
    let uid = |e: &Endpoint| e.target_ref.as_ref().and_then(|t| t.uid.clone());
    let mut home: BTreeMap<Option<String>, usize> = BTreeMap::new();
    for (i, slice) in same.iter().enumerate() {
        for endpoint in slice.endpoints.iter().flatten() {
            home.entry(uid(endpoint)).or_insert(i);
        }
    }
    let mut chunks: Vec<Vec<Endpoint>> = vec![Vec::new(); same.len()];
    let mut homeless = Vec::new();
    for endpoint in endpoints {
        match home.get(&uid(&endpoint)).filter(|_| endpoint.target_ref.is_some()) {
            Some(i) if chunks[*i].len() < SLICE_MAX => chunks[*i].push(endpoint),
            _ => homeless.push(endpoint),
        }
    }
    let mut at = 0;
    for endpoint in homeless {
        while chunks.get(at).is_some_and(|c| c.len() >= SLICE_MAX) {
            at += 1;
        }
        if at == chunks.len() {
            chunks.push(Vec::new());
        }
        chunks[at].push(endpoint);
    }
    if chunks.is_empty() {
        chunks.push(Vec::new());
    }
    // Slices with endpoints first, so that an empty one is only kept if there is no other. The stable order of `same`
    // is kept otherwise.
    chunks
}

/// An address type and the addresses that are of it.
type Family = (&'static str, fn(&IpAddr) -> bool);

fn families(service: &Service) -> Vec<Family> {
    let listed = service
        .spec
        .as_ref()
        .and_then(|s| s.ip_families.clone())
        .unwrap_or_default();
    let mut out: Vec<Family> = Vec::new();
    if listed.is_empty() || listed.iter().any(|f| f == "IPv4") {
        out.push(("IPv4", IpAddr::is_ipv4));
    }
    if listed.iter().any(|f| f == "IPv6") {
        out.push(("IPv6", IpAddr::is_ipv6));
    }
    out
}

fn wire_port(port: &Port) -> EndpointPort {
    EndpointPort {
        name: Some(port.name.clone()),
        protocol: Some(port.protocol.clone()),
        port: Some(port.port),
        app_protocol: port.app_protocol.clone(),
    }
}

fn endpoint(backend: &Backend, address: IpAddr) -> Endpoint {
    Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(backend.ready),
            serving: Some(backend.serving),
            terminating: Some(backend.terminating),
        }),
        hostname: backend.hostname.clone(),
        node_name: backend.node.clone(),
        zone: backend.zone.clone(),
        target_ref: Some(backend.target.clone()),
        ..Endpoint::default()
    }
}

fn slice(
    service: &Service,
    family: &str,
    ports: Vec<EndpointPort>,
    endpoints: Vec<Endpoint>,
    old: Option<&EndpointSlice>,
) -> EndpointSlice {
    let mut labels = labels(service);
    labels.insert(SERVICE_NAME.to_owned(), name_of(service).to_owned());
    labels.insert(MANAGED_BY.to_owned(), SLICE_MANAGER.to_owned());
    let metadata = match old {
        Some(old) => ObjectMeta {
            labels: Some(labels),
            ..old.metadata.clone()
        },
        None => ObjectMeta {
            generate_name: Some(format!("{}-", name_of(service))),
            namespace: service.metadata.namespace.clone(),
            labels: Some(labels),
            owner_references: Some(vec![controller_reference(service)]),
            ..ObjectMeta::default()
        },
    };
    // Empty lists are compared as the server returns them: absent.
    let some = |present: bool| present.then_some(());
    EndpointSlice {
        metadata,
        address_type: family.to_owned(),
        endpoints: match old.and_then(|o| o.endpoints.as_ref()) {
            None if endpoints.is_empty() && old.is_some() => None,
            _ => Some(endpoints),
        },
        ports: match old.and_then(|o| o.ports.as_ref()) {
            None if some(ports.is_empty()).is_some() && old.is_some() => None,
            _ => Some(ports),
        },
    }
}

/// The Endpoints object of a Service: one subset per set of ports.
pub fn endpoints(service: &Service, backends: &[Backend], old: Option<&Endpoints>) -> Endpoints {
    let truncated = backends.len() > ENDPOINTS_MAX;
    let mut groups: BTreeMap<Vec<Port>, (Vec<EndpointAddress>, Vec<EndpointAddress>)> = BTreeMap::new();
    // Ready ones first: if some do not fit, they are the others.
    let mut ordered: Vec<&Backend> = backends.iter().filter(|b| !b.terminating || b.ready).collect();
    ordered.sort_by_key(|b| !b.ready);
    for backend in ordered.into_iter().take(ENDPOINTS_MAX) {
        if backend.ports.is_empty() && !is_headless(service) {
            continue;
        }
        let group = groups.entry(backend.ports.clone()).or_default();
        let address = EndpointAddress {
            ip: backend.addresses[0].to_string(),
            hostname: backend.hostname.clone(),
            node_name: backend.node.clone(),
            target_ref: Some(backend.target.clone()),
        };
        if backend.ready {
            group.0.push(address)
        } else {
            group.1.push(address)
        }
    }
    let some = |mut list: Vec<EndpointAddress>| {
        list.sort_by(|a, b| a.ip.cmp(&b.ip));
        Some(list).filter(|l| !l.is_empty())
    };
    let subsets: Vec<EndpointSubset> = groups
        .into_iter()
        .map(|(ports, (ready, not_ready))| EndpointSubset {
            addresses: some(ready),
            not_ready_addresses: some(not_ready),
            ports: Some(ports.iter().map(core_port).collect::<Vec<_>>()).filter(|p| !p.is_empty()),
        })
        .collect();
    let mut labels = labels(service);
    labels.insert(ENDPOINTS_MANAGED_BY.to_owned(), ENDPOINTS_MANAGER.to_owned());
    let mut metadata = old.map(|o| o.metadata.clone()).unwrap_or_else(|| ObjectMeta {
        name: service.metadata.name.clone(),
        namespace: service.metadata.namespace.clone(),
        ..ObjectMeta::default()
    });
    metadata.labels = Some(labels);
    let mut annotations = metadata.annotations.take().unwrap_or_default();
    if truncated {
        annotations.insert(OVER_CAPACITY.to_owned(), "truncated".to_owned());
    } else {
        annotations.remove(OVER_CAPACITY);
    }
    metadata.annotations = Some(annotations).filter(|a| !a.is_empty());
    Endpoints {
        metadata,
        subsets: Some(subsets).filter(|s| !s.is_empty()),
    }
}

fn core_port(port: &Port) -> CorePort {
    CorePort {
        name: Some(port.name.clone()).filter(|n| !n.is_empty()),
        protocol: Some(port.protocol.clone()),
        port: port.port,
        app_protocol: port.app_protocol.clone(),
    }
}

/// Whether an Endpoints object belongs to this controller and to the Service of its name.
pub fn is_ours(endpoints: &Endpoints) -> bool {
    let label = endpoints
        .metadata
        .labels
        .as_ref()
        .and_then(|l| l.get(ENDPOINTS_MANAGED_BY));
    label.is_some_and(|l| l == ENDPOINTS_MANAGER)
}

/// The uid of the Service a slice was made for.
pub fn slice_owner(slice: &EndpointSlice) -> Option<&str> {
    slice
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|o| o.controller == Some(true))
        .map(|o| o.uid.as_str())
}

/// Whether the slice is of this Service and this controller.
pub fn is_slice_of(slice: &EndpointSlice, service: &Service) -> bool {
    let labels = slice.metadata.labels.as_ref();
    let is = |key, value: &str| labels.and_then(|l| l.get(key)).is_some_and(|v| v == value);
    is(SERVICE_NAME, name_of(service))
        && is(MANAGED_BY, SLICE_MANAGER)
        && slice_owner(slice).is_none_or(|uid| uid == uid_of(service))
}

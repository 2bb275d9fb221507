//! Services and their endpoints, joined and reduced to what traffic and names need. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};

/// Ties a slice to its Service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// All Services, ascending by namespace and name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    pub services: Vec<ServiceEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    pub namespace: String,
    pub name: String,
    pub kind: ServiceKind,
    /// `externalIPs` and the load balancer's addresses that this node may answer for; IPv4.
    pub external_ips: Vec<Ipv4Addr>,
    pub ports: Vec<PortEntry>,
    /// The same client goes to the same endpoint (`sessionAffinity: ClientIP`).
    pub sticky: bool,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// Ready endpoints, for names; ascending by address.
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceKind {
    /// At least one address; the first is the primary one.
    ClusterIp(Vec<IpAddr>),
    Headless,
    ExternalName(String),
    /// No address was given yet.
    Pending,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    fn parse(text: Option<&str>) -> Self {
        match text {
            Some("UDP") => Self::Udp,
            Some("SCTP") => Self::Sctp,
            _ => Self::Tcp,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortEntry {
    /// Empty if the Service has one unnamed port.
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
    /// Where connections go: the ready endpoints, or the serving ones that are ending if none is ready. Ascending.
    pub targets: Vec<Target>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    pub address: Ipv4Addr,
    pub port: u16,
    /// On this node.
    pub local: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    pub address: IpAddr,
    pub hostname: Option<String>,
    pub ports: Vec<(String, Protocol, u16)>,
}

impl World {
    /// Joins Services with their slices; `node` decides which endpoints are local. Objects that name no address, or
    /// nonsense, are left out.
    pub fn new(services: &[Arc<Service>], slices: &[Arc<EndpointSlice>], node: &str) -> Self {
        let mut by_service: BTreeMap<(&str, &str), Vec<&EndpointSlice>> = BTreeMap::new();
        for slice in slices {
            let meta = &slice.metadata;
            let service = meta.labels.as_ref().and_then(|l| l.get(SERVICE_NAME_LABEL));
            if let (Some(namespace), Some(service)) = (&meta.namespace, service)
                && meta.deletion_timestamp.is_none()
            {
                by_service.entry((namespace, service)).or_default().push(slice);
            }
        }
        let mut out: Vec<ServiceEntry> = services
            .iter()
            .filter_map(|s| {
                let namespace = s.metadata.namespace.as_deref()?;
                let name = s.metadata.name.as_deref()?;
                let slices = by_service.get(&(namespace, name)).map_or(&[][..], Vec::as_slice);
                entry(namespace, name, s, slices, node)
            })
            .collect();
        out.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        Self { services: out }
    }
}

fn entry(
    namespace: &str,
    name: &str,
    service: &Service,
    slices: &[&EndpointSlice],
    node: &str,
) -> Option<ServiceEntry> {
    let spec = service.spec.as_ref()?;
    let none = String::new();
    let kind = match (spec.type_.as_deref(), spec.cluster_ip.as_deref()) {
        (Some("ExternalName"), _) => {
            let target = spec.external_name.as_ref().unwrap_or(&none);
            ServiceKind::ExternalName(target.trim_end_matches('.').to_ascii_lowercase())
        }
        (_, Some("None")) => ServiceKind::Headless,
        (_, first) => {
            let mut ips: Vec<IpAddr> = spec
                .cluster_ips
                .iter()
                .flatten()
                .map(String::as_str)
                .chain(first)
                .filter_map(|t| t.parse().ok())
                .collect();
            let mut seen = BTreeSet::new();
            ips.retain(|ip| seen.insert(*ip));
            if ips.is_empty() {
                ServiceKind::Pending
            } else {
                ServiceKind::ClusterIp(ips)
            }
        }
    };
    let balancer = service
        .status
        .iter()
        .filter_map(|s| s.load_balancer.as_ref())
        .flat_map(|l| l.ingress.iter().flatten());
    let external: BTreeSet<Ipv4Addr> = balancer
        // "Proxy" means that the balancer wants to see the traffic itself.
        .filter(|i| i.ip_mode.as_deref() != Some("Proxy"))
        .filter_map(|i| i.ip.as_deref())
        .chain(spec.external_ips.iter().flatten().map(String::as_str))
        .filter_map(|t| t.parse().ok())
        .collect();
    let ports = spec
        .ports
        .iter()
        .flatten()
        .filter_map(|p| {
            let port = PortEntry {
                name: p.name.clone().unwrap_or_default(),
                protocol: Protocol::parse(p.protocol.as_deref()),
                port: u16::try_from(p.port).ok().filter(|p| *p > 0)?,
                node_port: p.node_port.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0),
                targets: Vec::new(),
            };
            Some(PortEntry {
                targets: targets(&port, slices, node),
                ..port
            })
        })
        .collect();
    Some(ServiceEntry {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        kind,
        external_ips: external.into_iter().collect(),
        ports,
        sticky: spec.session_affinity.as_deref() == Some("ClientIP"),
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
        endpoints: endpoints(slices),
    })
}

/// Slices carry a Service port by its name, with the number already resolved.
fn targets(port: &PortEntry, slices: &[&EndpointSlice], node: &str) -> Vec<Target> {
    let (mut ready, mut ending) = (BTreeSet::new(), BTreeSet::new());
    for slice in slices.iter().filter(|s| s.address_type == "IPv4") {
        let number = slice.ports.iter().flatten().find_map(|p| {
            let same = p.name.as_deref().unwrap_or_default() == port.name
                && Protocol::parse(p.protocol.as_deref()) == port.protocol;
            if same {
                u16::try_from(p.port?).ok().filter(|n| *n > 0)
            } else {
                None
            }
        });
        let Some(number) = number else { continue };
        for endpoint in slice.endpoints.iter().flatten() {
            // Further addresses of an endpoint have no meaning.
            let Some(address) = endpoint.addresses.first().and_then(|a| a.parse::<Ipv4Addr>().ok()) else {
                continue;
            };
            let target = Target {
                address,
                port: number,
                local: endpoint.node_name.as_deref() == Some(node),
            };
            let conditions = endpoint.conditions.as_ref();
            let is_ready = conditions.and_then(|c| c.ready).unwrap_or(true);
            let serving = conditions.and_then(|c| c.serving).unwrap_or(is_ready);
            if is_ready {
                ready.insert(target);
            } else if serving && conditions.and_then(|c| c.terminating) == Some(true) {
                ending.insert(target);
            }
        }
    }
    if ready.is_empty() { ending } else { ready }.into_iter().collect()
}

fn endpoints(slices: &[&EndpointSlice]) -> Vec<Endpoint> {
    let mut out: BTreeMap<IpAddr, Endpoint> = BTreeMap::new();
    for slice in slices {
        let ports: Vec<(String, Protocol, u16)> = slice
            .ports
            .iter()
            .flatten()
            .filter_map(|p| {
                let port = u16::try_from(p.port?).ok()?;
                Some((
                    p.name.clone().unwrap_or_default(),
                    Protocol::parse(p.protocol.as_deref()),
                    port,
                ))
            })
            .collect();
        for endpoint in slice.endpoints.iter().flatten() {
            if !endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true) {
                continue;
            }
            let Some(address) = endpoint.addresses.first().and_then(|a| a.parse::<IpAddr>().ok()) else {
                continue;
            };
            let at = out.entry(address).or_insert_with(|| Endpoint {
                address,
                hostname: None,
                ports: Vec::new(),
            });
            at.hostname = at.hostname.take().or_else(|| endpoint.hostname.clone());
            // The same pod stands in several slices if named target ports differ between pods.
            at.ports.extend(
                ports
                    .iter()
                    .filter(|p| !at.ports.contains(p))
                    .cloned()
                    .collect::<Vec<_>>(),
            );
        }
    }
    out.into_values().collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;

    pub(crate) fn service(namespace: &str, name: &str, spec: Value) -> Arc<Service> {
        Arc::new(
            serde_json::from_value(json!({"metadata": {"namespace": namespace, "name": name}, "spec": spec})).unwrap(),
        )
    }

    /// Endpoints as `(address, node, ready)`.
    pub(crate) fn slice(
        namespace: &str,
        of: &str,
        ports: Value,
        endpoints: &[(&str, &str, bool)],
    ) -> Arc<EndpointSlice> {
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|(a, node, ready)| json!({"addresses": [a], "nodeName": node, "conditions": {"ready": ready}}))
            .collect();
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"namespace": namespace, "name": format!("{of}-x"), "labels": {SERVICE_NAME_LABEL: of}},
                "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
            }))
            .unwrap(),
        )
    }

    #[test]
    fn ending_endpoints_serve_only_when_none_is_ready() {
        let s = service(
            "d",
            "web",
            json!({"clusterIP": "10.0.0.5", "ports": [{"name": "h", "port": 80}]}),
        );
        let ports = json!([{"name": "h", "port": 8080}]);
        let mut ending: EndpointSlice = (*slice("d", "web", ports.clone(), &[("10.1.0.9", "n1", false)])).clone();
        let conditions = ending.endpoints.as_mut().unwrap()[0].conditions.as_mut().unwrap();
        (conditions.serving, conditions.terminating) = (Some(true), Some(true));
        let ending = Arc::new(ending);
        let ready = slice(
            "d",
            "web",
            ports,
            &[("10.1.0.8", "n2", true), ("10.1.0.7", "n1", false)],
        );
        let of = |slices: &[Arc<EndpointSlice>]| {
            World::new(std::slice::from_ref(&s), slices, "n1").services[0].ports[0]
                .targets
                .clone()
        };
        let target = |a: &str, local| Target {
            address: a.parse().unwrap(),
            port: 8080,
            local,
        };
        assert_eq!(of(std::slice::from_ref(&ending)), [target("10.1.0.9", true)]);
        assert_eq!(of(&[ending, ready]), [target("10.1.0.8", false)]);
    }
}

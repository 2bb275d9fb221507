//! Services' cluster addresses and node ports.

use std::net::Ipv4Addr;

use apimachinery::field::FieldError;
use apimachinery::meta;
use apimachinery::status::Status;
use serde_json::{Map, Value, json};

use super::addresses;
use crate::handlers::Context;

/// Node ports that are given out.
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30000..=32767;
/// The first ones stay for those who choose: of 2768 ports a 32nd, at least 16, at most 128.
/// # Source
/// KEP-3668 (reserved NodePort ranges), `pkg/registry/core/service/portallocator` of Kubernetes 1.36.
const CHOSEN_PORTS: u64 = 86;

/// Addresses of services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceRange {
    base: u32,
    bits: u8,
}

impl ServiceRange {
    /// Parses `10.0.0.0/16`; prefixes from /12 to /28.
    pub fn parse(cidr: &str) -> Option<Self> {
        Self::parse_within(cidr, 12..=28)
    }

    /// Parses the range of a further ServiceCIDR; prefixes from /12 to /30.
    pub fn parse_further(cidr: &str) -> Option<Self> {
        Self::parse_within(cidr, 12..=30)
    }

    fn parse_within(cidr: &str, prefixes: std::ops::RangeInclusive<u8>) -> Option<Self> {
        let (address, bits) = cidr.split_once('/')?;
        let bits: u8 = bits.parse().ok().filter(|b| prefixes.contains(b))?;
        let base = u32::from(address.parse::<Ipv4Addr>().ok()?);
        (base.trailing_zeros() >= 32 - u32::from(bits)).then_some(ServiceRange { base, bits })
    }

    fn size(self) -> u32 {
        1 << (32 - self.bits)
    }

    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address).wrapping_sub(self.base) < self.size()
    }

    /// The address at `offset`, if it can be a service's: neither the network nor the broadcast address.
    pub fn nth(self, offset: u32) -> Option<Ipv4Addr> {
        (offset > 0 && offset < self.size() - 1).then(|| Ipv4Addr::from(self.base + offset))
    }
}

impl std::fmt::Display for ServiceRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.bits)
    }
}

pub(super) fn address_key(address: &str) -> String {
    format!("a/ip/{address}")
}

fn port_key(protocol: &str, port: u64) -> String {
    format!("a/port/{protocol}/{port}")
}

/// Keys of everything the service holds.
pub fn allocation_keys(service: &Value) -> Vec<String> {
    let spec = &service["spec"];
    let mut keys = Vec::new();
    match spec["clusterIP"].as_str() {
        None | Some("" | "None") => {}
        Some(address) => keys.push(address_key(address)),
    }
    for port in spec["ports"].as_array().into_iter().flatten() {
        if let Some(number) = port["nodePort"].as_u64().filter(|n| *n != 0) {
            let key = port_key(port["protocol"].as_str().unwrap_or("TCP"), number);
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
    }
    if let Some(number) = spec["healthCheckNodePort"].as_u64().filter(|n| *n != 0) {
        keys.push(port_key("TCP", number));
    }
    keys
}

/// Fills in addresses and ports, keeping those of `old`.
pub fn complete(cx: &Context, old: Option<&Value>, service: &mut Value) -> Result<(), Status> {
    let name = meta::name(service).to_owned();
    let invalid = |error: FieldError| Status::invalid(&cx.served.info.gvk, &name, &[error]);
    let Some(spec) = service.get_mut("spec").and_then(Value::as_object_mut) else {
        return Ok(());
    };
    let kind = text(spec, "type").unwrap_or("ClusterIP").to_owned();
    let old_spec = old.and_then(|o| o["spec"].as_object());
    if let Some(old) = old_spec {
        drop_stale(&kind, old, spec);
    }
    if kind == "ExternalName" {
        for key in [
            "clusterIP",
            "clusterIPs",
            "ipFamilies",
            "ipFamilyPolicy",
            "healthCheckNodePort",
            "internalTrafficPolicy",
        ] {
            spec.remove(key);
        }
        drop_node_ports(spec);
        return Ok(());
    }
    cluster_ip(cx, old_spec, spec).map_err(&invalid)?;
    let wants_ports = match kind.as_str() {
        "NodePort" => true,
        "LoadBalancer" => spec
            .get("allocateLoadBalancerNodePorts")
            .and_then(Value::as_bool)
            .unwrap_or(true),
        _ => false,
    };
    if wants_ports {
        node_ports(cx, old_spec, spec).map_err(&invalid)?;
    }
    let local = text(spec, "externalTrafficPolicy") == Some("Local");
    if kind == "LoadBalancer" && local {
        if number(spec.get("healthCheckNodePort")).is_none() {
            let kept = old_spec.and_then(|o| number(o.get("healthCheckNodePort")));
            let taken: Vec<u64> = ports_of(spec);
            let port = match kept {
                Some(port) => port,
                None => free_port(cx, "TCP", &taken).ok_or_else(|| invalid(exhausted("spec.healthCheckNodePort")))?,
            };
            spec.insert("healthCheckNodePort".into(), port.into());
        }
    } else {
        spec.remove("healthCheckNodePort");
    }
    Ok(())
}

/// Drops what belongs to the old type and was merely sent back unchanged.
fn drop_stale(kind: &str, old: &Map<String, Value>, spec: &mut Map<String, Value>) {
    let external = matches!(kind, "NodePort" | "LoadBalancer");
    let mut fields = Vec::new();
    if !external {
        fields.push("externalTrafficPolicy");
    }
    if kind != "LoadBalancer" {
        fields.extend([
            "allocateLoadBalancerNodePorts",
            "loadBalancerClass",
            "healthCheckNodePort",
        ]);
    }
    for field in fields {
        if spec.get(field) == old.get(field) {
            spec.remove(field);
        }
    }
    if !external && ports_of(spec).iter().all(|p| ports_of(old).contains(p)) {
        drop_node_ports(spec);
    }
}

fn text<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    map.get(key).and_then(Value::as_str).filter(|s| !s.is_empty())
}

fn number(value: Option<&Value>) -> Option<u64> {
    value.and_then(Value::as_u64).filter(|n| *n != 0)
}

fn ports_of(spec: &Map<String, Value>) -> Vec<u64> {
    spec.get("ports")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|p| number(p.get("nodePort")))
        .collect()
}

fn drop_node_ports(spec: &mut Map<String, Value>) {
    for port in spec
        .get_mut("ports")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if let Some(port) = port.as_object_mut() {
            port.remove("nodePort");
        }
    }
}

fn exhausted(path: &str) -> FieldError {
    FieldError::new(
        apimachinery::field::FieldErrorKind::Internal,
        path,
        Value::Null,
        "failed to allocate: the range is full",
    )
}

fn cluster_ip(cx: &Context, old: Option<&Map<String, Value>>, spec: &mut Map<String, Value>) -> Result<(), FieldError> {
    let first_of_list = || {
        spec.get("clusterIPs")
            .and_then(Value::as_array)
            .and_then(|a| a.first())
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let given = text(spec, "clusterIP")
        .map(str::to_owned)
        .or_else(first_of_list)
        .filter(|a| !a.is_empty());
    let before = old.and_then(|o| text(o, "clusterIP"));
    let address = match (given, before) {
        (None, Some(before)) => before.to_owned(),
        (Some(given), Some(before)) if given != before => {
            return Err(FieldError::invalid(
                "spec.clusterIPs[0]",
                given,
                "may not change once set",
            ));
        }
        (Some(given), _) => given,
        (None, None) => free_address(cx).ok_or_else(|| exhausted("spec.clusterIPs"))?,
    };
    if address != "None" {
        let parsed: Ipv4Addr = address.parse().map_err(|_| {
            FieldError::invalid(
                "spec.clusterIPs[0]",
                address.clone(),
                "must be a valid IPv4 address, \"None\" or empty",
            )
        })?;
        if before != Some(&address) && !addresses::in_range(&cx.cluster, parsed) {
            let ranges: Vec<String> = addresses::ranges(&cx.cluster).iter().map(ToString::to_string).collect();
            let detail = format!(
                "failed to allocate IP {address}: the provided IP ({address}) is not in the valid range. The range of valid IPs is {}",
                ranges.join(", ")
            );
            return Err(FieldError::invalid("spec.clusterIPs", json!([address]), &detail));
        }
    }
    spec.insert("clusterIP".into(), address.clone().into());
    spec.insert("clusterIPs".into(), json!([address]));
    spec.entry("ipFamilies").or_insert_with(|| json!(["IPv4"]));
    spec.entry("ipFamilyPolicy").or_insert_with(|| "SingleStack".into());
    spec.entry("internalTrafficPolicy").or_insert_with(|| "Cluster".into());
    Ok(())
}

/// A free address of the first range that has one.
fn free_address(cx: &Context) -> Option<String> {
    addresses::ranges(&cx.cluster)
        .into_iter()
        .find_map(|range| free_address_of(cx, range))
}

/// A free address, from a random place in the upper part of the range on; the first ones stay for those who choose.
fn free_address_of(cx: &Context, range: ServiceRange) -> Option<String> {
    let size = range.size();
    let low = (size / 16).clamp(16, 256).min(size / 2);
    // Of the cluster's own range the first address is the API's.
    let first = if range == cx.cluster.service_range { 2 } else { 1 };
    let start = low + cx.cluster.random_below(u64::from(size - low)) as u32;
    let upper = (start..size).chain(low..start);
    let reserved = cx.cluster.dns_service_ip;
    upper.chain(first..low).find_map(|offset| {
        let address = range.nth(offset)?;
        let free = Some(address) != reserved && !addresses::is_taken(&cx.cluster, &address.to_string());
        free.then(|| address.to_string())
    })
}

fn free_port(cx: &Context, protocol: &str, taken: &[u64]) -> Option<u64> {
    let (low, high) = (u64::from(*NODE_PORTS.start()), u64::from(*NODE_PORTS.end()));
    let dynamic = low + CHOSEN_PORTS;
    let start = dynamic + cx.cluster.random_below(high - dynamic + 1);
    (start..=high)
        .chain(dynamic..start)
        .chain(low..dynamic)
        .find(|port| !taken.contains(port) && !cx.cluster.registry.is_claimed(&port_key(protocol, *port)))
}

fn node_ports(cx: &Context, old: Option<&Map<String, Value>>, spec: &mut Map<String, Value>) -> Result<(), FieldError> {
    let mut taken = ports_of(spec);
    let old_ports = old.and_then(|o| o.get("ports")).and_then(Value::as_array);
    for (i, port) in spec
        .get_mut("ports")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
        .enumerate()
    {
        let protocol = port["protocol"].as_str().unwrap_or("TCP").to_owned();
        if let Some(given) = number(port.get("nodePort")) {
            if !NODE_PORTS.contains(&(given as u16)) || given > 65535 {
                let detail = format!(
                    "provided port is not in the valid range. The range of valid ports is {}-{}",
                    NODE_PORTS.start(),
                    NODE_PORTS.end()
                );
                return Err(FieldError::invalid(format!("spec.ports[{i}].nodePort"), given, &detail));
            }
            continue;
        }
        let same = |p: &&Value| p["port"] == port["port"] && p["protocol"].as_str().unwrap_or("TCP") == protocol;
        let kept = old_ports
            .and_then(|ports| ports.iter().find(same))
            .and_then(|p| number(p.get("nodePort")));
        let chosen = match kept.filter(|p| !taken.contains(p)) {
            Some(port) => port,
            None => free_port(cx, &protocol, &taken).ok_or_else(|| exhausted(&format!("spec.ports[{i}].nodePort")))?,
        };
        taken.push(chosen);
        port["nodePort"] = chosen.into();
    }
    Ok(())
}

/// The refusal of a service that asks for what another one holds.
pub fn refused(cx: &Context, name: &str, key: &str) -> Status {
    let error = match key.rsplit('/').next() {
        Some(address) if key.starts_with("a/ip/") => {
            let detail = format!("failed to allocate IP {address}: provided IP is already allocated");
            FieldError::invalid("spec.clusterIPs", json!([address]), &detail)
        }
        port => FieldError::invalid(
            "spec.ports[0].nodePort",
            port.unwrap_or_default(),
            "provided port is already allocated",
        ),
    };
    Status::invalid(&cx.served.info.gvk, name, &[error])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_keys() {
        let range = ServiceRange::parse("10.0.0.0/24").unwrap();
        assert_eq!(range.to_string(), "10.0.0.0/24");
        assert!(range.contains(Ipv4Addr::new(10, 0, 0, 9)) && !range.contains(Ipv4Addr::new(10, 0, 1, 0)));
        assert_eq!((range.nth(0), range.nth(1)), (None, Some(Ipv4Addr::new(10, 0, 0, 1))));
        assert_eq!(range.nth(255), None);
        for bad in ["10.0.0.1/24", "10.0.0.0/33", "10.0.0.0", "::/12"] {
            assert_eq!(ServiceRange::parse(bad), None, "{bad}");
        }
        let service =
            json!({"spec": {"clusterIP": "10.0.0.7", "ports": [{"nodePort": 30001}, {"nodePort": 30001}, {}]}});
        assert_eq!(allocation_keys(&service), ["a/ip/10.0.0.7", "a/port/TCP/30001"]);
        assert!(allocation_keys(&json!({"spec": {"clusterIP": "None"}})).is_empty());
    }
}

//! Typed views of ARM bodies: the fields that the platform acts on, parsed where they are needed.
//! Parsing is tolerant of unknown fields (they stay in the body) and strict about the ones named here.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

/// One translated frontend of a load balancer, in `LoadBalancer.spec.body.oaks.frontends[]`.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LbFrontend {
    /// Address of the public pool (or of a subnet, for internal ones).
    pub address: IpAddr,
    /// `tcp` or `udp`.
    pub protocol: String,
    pub port: u16,
    /// Home object name of the VirtualNetwork whose namespace translates.
    pub virtual_network: String,
    /// Ready pods, in no particular order; empty = connections are refused.
    pub backends: Vec<LbBackend>,
    /// Who may connect; empty = everyone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<IpNet>,
    /// The same client gets the same backend.
    #[serde(default)]
    pub client_affinity: bool,
    /// Idle time after which a flow is forgotten; 0 = the kernel's own.
    #[serde(default)]
    pub idle_timeout_s: u32,
    /// Who sends on a forgotten flow gets a reset.
    #[serde(default)]
    pub tcp_reset: bool,
}

#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq, PartialOrd, Ord)]
pub struct LbBackend {
    pub address: IpAddr,
    pub port: u16,
}

/// A body that the platform cannot act on: the JSON path and what is wrong there.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{path}: {problem}")]
pub struct ViewError {
    /// `properties.subnets[1].properties.addressPrefix`.
    pub path: String,
    pub problem: String,
}

fn bad<T>(path: impl Into<String>, problem: impl Into<String>) -> Result<T, ViewError> {
    Err(ViewError {
        path: path.into(),
        problem: problem.into(),
    })
}

/// `Microsoft.Network/virtualNetworks`: the prefixes and subnets of a body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VnetView {
    pub prefixes: Vec<IpNet>,
    pub subnets: Vec<SubnetView>,
    /// `properties.dhcpOptions.dnsServers`; empty = the platform's.
    pub dns_servers: Vec<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetView {
    pub name: String,
    pub prefix: IpNet,
    /// `serviceName` of each delegation, for example `Microsoft.ContainerInstance/containerGroups`.
    pub delegations: Vec<String>,
    /// `service` of each service endpoint, for example `Microsoft.Storage`.
    pub service_endpoints: Vec<String>,
    /// ARM ids, absent if not set.
    pub network_security_group: Option<String>,
    pub route_table: Option<String>,
}

impl VnetView {
    /// Reads `spec.body`. A subnet may give `addressPrefix` or a one-element `addressPrefixes`.
    /// # Errors: a prefix that is missing, malformed, or has bits set behind its length; overlaps are not checked here.
    pub fn parse(body: &Value) -> Result<Self, ViewError> {
        let p = &body["properties"];
        let mut out = Self::default();
        let prefixes = "properties.addressSpace.addressPrefixes";
        for (i, v) in array(&p["addressSpace"]["addressPrefixes"]).iter().enumerate() {
            out.prefixes.push(net(v, || format!("{prefixes}[{i}]"))?);
        }
        if out.prefixes.is_empty() {
            return bad(prefixes, "a virtual network needs at least one address prefix");
        }
        for (i, v) in array(&p["subnets"]).iter().enumerate() {
            out.subnets
                .push(SubnetView::parse(v, &format!("properties.subnets[{i}]"))?);
        }
        for (i, v) in array(&p["dhcpOptions"]["dnsServers"]).iter().enumerate() {
            let parsed = v.as_str().and_then(|s| s.parse().ok());
            match parsed {
                Some(a) => out.dns_servers.push(a),
                None => return bad(format!("properties.dhcpOptions.dnsServers[{i}]"), "not an IP address"),
            }
        }
        Ok(out)
    }

    /// The subnet of that name, compared without regard to case.
    pub fn subnet(&self, name: &str) -> Option<&SubnetView> {
        self.subnets.iter().find(|s| s.name.eq_ignore_ascii_case(name))
    }
}

impl SubnetView {
    /// Reads one element of `properties.subnets[]` (or the body of a subnet resource); `at` starts the error's path.
    pub fn parse(v: &Value, at: &str) -> Result<Self, ViewError> {
        let Some(name) = v["name"].as_str().filter(|n| !n.is_empty()) else {
            return bad(format!("{at}.name"), "a subnet needs a name");
        };
        let p = &v["properties"];
        let single = &p["addressPrefix"];
        let many = array(&p["addressPrefixes"]);
        let prefix = match (single.is_string(), many) {
            (true, _) => net(single, || format!("{at}.properties.addressPrefix"))?,
            (false, [one]) => net(one, || format!("{at}.properties.addressPrefixes[0]"))?,
            (false, []) => {
                return bad(
                    format!("{at}.properties.addressPrefix"),
                    "a subnet needs an address prefix",
                );
            }
            (false, _) => {
                return bad(
                    format!("{at}.properties.addressPrefixes"),
                    "one prefix per subnet is served",
                );
            }
        };
        let delegations = array(&p["delegations"])
            .iter()
            .filter_map(|d| d["properties"]["serviceName"].as_str().map(str::to_owned))
            .collect();
        if !array(&p["serviceEndpointPolicies"]).is_empty() {
            return bad(
                format!("{at}.properties.serviceEndpointPolicies"),
                "service endpoint policies are not served",
            );
        }
        let endpoints = array(&p["serviceEndpoints"])
            .iter()
            .filter_map(|e| e["service"].as_str().map(str::to_owned))
            .collect();
        let reference = |field: &str| p[field]["id"].as_str().map(str::to_owned);
        Ok(Self {
            name: name.to_owned(),
            prefix,
            delegations,
            service_endpoints: endpoints,
            network_security_group: reference("networkSecurityGroup"),
            route_table: reference("routeTable"),
        })
    }

    /// Addresses that NICs may take: all but the first four and the last.
    pub fn usable(&self) -> u64 {
        usable(&self.prefix)
    }

    /// Whether a NIC or frontend may have `address`: it is in the subnet and none of the five that are reserved.
    pub fn is_usable(&self, address: IpAddr) -> bool {
        let (IpNet::V4(prefix), IpAddr::V4(address)) = (self.prefix, address) else {
            return false;
        };
        let offset = u32::from(address).wrapping_sub(u32::from(prefix.network()));
        prefix.contains(&address) && offset > 3 && address != prefix.broadcast()
    }

    pub fn is_delegated_to(&self, service: &str) -> bool {
        self.delegations.iter().any(|d| d.eq_ignore_ascii_case(service))
    }
}

/// One half of a peering: an element of `properties.virtualNetworkPeerings[]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeeringView {
    pub name: String,
    /// ARM id of the other virtual network.
    pub remote: String,
    /// This network's machines may open connections to the other one.
    pub access: bool,
    /// So may what this network forwards for others.
    pub forwarded: bool,
}

/// The peerings in a virtual network's body. `allowVirtualNetworkAccess` is true unless said otherwise, the other flags false.
/// # Errors: no name, no remote network, a flag that is no boolean, or gateway transit, which is not served.
pub fn peerings(body: &Value) -> Result<Vec<PeeringView>, ViewError> {
    let mut out = Vec::new();
    for (i, v) in array(&body["properties"]["virtualNetworkPeerings"]).iter().enumerate() {
        let at = format!("properties.virtualNetworkPeerings[{i}]");
        let p = &v["properties"];
        let Some(name) = v["name"].as_str().filter(|n| !n.is_empty()) else {
            return bad(format!("{at}.name"), "a peering needs a name");
        };
        let Some(remote) = p["remoteVirtualNetwork"]["id"].as_str().filter(|s| !s.is_empty()) else {
            return bad(
                format!("{at}.properties.remoteVirtualNetwork.id"),
                "a peering needs the id of the other virtual network",
            );
        };
        let flag = |field: &str, default: bool| match &p[field] {
            Value::Null => Ok(default),
            Value::Bool(b) => Ok(*b),
            _ => bad(format!("{at}.properties.{field}"), "must be true or false"),
        };
        for field in ["allowGatewayTransit", "useRemoteGateways"] {
            if flag(field, false)? {
                return bad(
                    format!("{at}.properties.{field}"),
                    "gateways are not served; leave it false",
                );
            }
        }
        out.push(PeeringView {
            name: name.to_owned(),
            remote: remote.to_owned(),
            access: flag("allowVirtualNetworkAccess", true)?,
            forwarded: flag("allowForwardedTraffic", false)?,
        });
    }
    Ok(out)
}

/// Service name of a subnet that container groups and virtual nodes may use.
pub const CONTAINER_GROUPS: &str = "Microsoft.ContainerInstance/containerGroups";

/// Addresses of a prefix that NICs may take. The first four and the last address of every subnet are reserved.
pub fn usable(prefix: &IpNet) -> u64 {
    let host_bits = u32::from(prefix.max_prefix_len() - prefix.prefix_len());
    1u64.checked_shl(host_bits).unwrap_or(u64::MAX).saturating_sub(5)
}

/// `Microsoft.Network/networkInterfaces`: what was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NicView {
    pub ip_configs: Vec<NicIpConfigView>,
    pub network_security_group: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicIpConfigView {
    pub name: String,
    /// ARM id of the subnet.
    pub subnet: String,
    /// Set for static allocation.
    pub address: Option<IpAddr>,
    pub primary: bool,
    /// ARM ids of the application security groups that the configuration is in.
    pub application_groups: Vec<String>,
}

impl NicView {
    /// Reads `spec.body`. Exactly one configuration is primary: the marked one, or the first if none is marked.
    /// # Errors: no configuration, one without a subnet, an address that does not parse, two primaries.
    pub fn parse(body: &Value) -> Result<Self, ViewError> {
        let p = &body["properties"];
        let mut out = Self::default();
        for (i, v) in array(&p["ipConfigurations"]).iter().enumerate() {
            let at = format!("properties.ipConfigurations[{i}]");
            let q = &v["properties"];
            let Some(subnet) = q["subnet"]["id"].as_str().filter(|s| !s.is_empty()) else {
                return bad(
                    format!("{at}.properties.subnet.id"),
                    "an IP configuration needs a subnet",
                );
            };
            let is_static = q["privateIPAllocationMethod"]
                .as_str()
                .is_some_and(|m| m.eq_ignore_ascii_case("static"));
            let address = match q["privateIPAddress"].as_str().filter(|s| is_static && !s.is_empty()) {
                None => None,
                Some(s) => match s.parse() {
                    Ok(a) => Some(a),
                    Err(_) => return bad(format!("{at}.properties.privateIPAddress"), "not an IP address"),
                },
            };
            let groups = array(&q["applicationSecurityGroups"]).iter().enumerate();
            let group = |(n, v): (usize, &Value)| match v["id"].as_str() {
                Some(id) => Ok(id.to_owned()),
                None => bad(
                    format!("{at}.properties.applicationSecurityGroups[{n}].id"),
                    "an application security group is named by its id",
                ),
            };
            out.ip_configs.push(NicIpConfigView {
                application_groups: groups.map(group).collect::<Result<_, _>>()?,
                name: v["name"]
                    .as_str()
                    .map_or_else(|| format!("ipconfig{}", i + 1), str::to_owned),
                subnet: subnet.to_owned(),
                address,
                primary: q["primary"].as_bool().unwrap_or(false),
            });
        }
        match out.ip_configs.iter().filter(|c| c.primary).count() {
            0 => match out.ip_configs.first_mut() {
                Some(first) => first.primary = true,
                None => {
                    return bad(
                        "properties.ipConfigurations",
                        "a network interface needs an IP configuration",
                    );
                }
            },
            1 => {}
            _ => {
                return bad(
                    "properties.ipConfigurations",
                    "only one IP configuration can be primary",
                );
            }
        }
        out.network_security_group = p["networkSecurityGroup"]["id"].as_str().map(str::to_owned);
        Ok(out)
    }
}

/// What the allocator wrote to a NIC's `status.properties`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NicAddresses {
    /// `00-0D-3A-..` as ARM prints it; [`NicAddresses::mac_bytes`] parses it. Empty until allocated.
    pub mac: String,
    /// In the order of the request; the primary one is marked.
    pub ip_configs: Vec<NicAddress>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicAddress {
    pub name: String,
    /// ARM id of the subnet.
    pub subnet: String,
    pub address: IpAddr,
    pub primary: bool,
}

impl NicAddresses {
    /// Reads `status.properties`; `None` until the allocator has written every address.
    pub fn parse(status_properties: &Value) -> Option<Self> {
        let mac = status_properties["macAddress"].as_str()?.to_owned();
        let mut ip_configs = Vec::new();
        for v in array(&status_properties["ipConfigurations"]) {
            ip_configs.push(NicAddress {
                name: v["name"].as_str()?.to_owned(),
                subnet: v["properties"]["subnet"]["id"].as_str()?.to_owned(),
                address: v["properties"]["privateIPAddress"].as_str()?.parse().ok()?,
                primary: v["properties"]["primary"].as_bool().unwrap_or(false),
            });
        }
        (!ip_configs.is_empty()).then_some(Self { mac, ip_configs })
    }

    pub fn primary(&self) -> Option<&NicAddress> {
        self.ip_configs.iter().find(|c| c.primary)
    }

    /// The six bytes of the MAC address; `None` if it is not one.
    pub fn mac_bytes(&self) -> Option<[u8; 6]> {
        let mut out = [0; 6];
        let mut parts = self.mac.split(['-', ':']);
        for byte in &mut out {
            *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
        }
        parts.next().is_none().then_some(out)
    }
}

/// Frontends of a LoadBalancer: `spec.body.oaks.frontends[]`; empty if there are none.
/// # Errors: an element that is not an [`LbFrontend`].
pub fn lb_frontends(body: &Value) -> Result<Vec<LbFrontend>, ViewError> {
    let mut out = Vec::new();
    for (i, v) in array(&body["oaks"]["frontends"]).iter().enumerate() {
        match LbFrontend::deserialize(v) {
            Ok(f) => out.push(f),
            Err(e) => return bad(format!("oaks.frontends[{i}]"), e.to_string()),
        }
    }
    Ok(out)
}

/// Splits a subnet's ARM id into the home object name of its VNet and the subnet's name; `None` if it is no subnet id.
pub fn subnet_ref(id: &str) -> Option<(String, String)> {
    let parsed = crate::ArmId::parse(id).ok()?;
    let is_subnet = parsed.provider.eq_ignore_ascii_case("Microsoft.Network")
        && matches!(parsed.segments.as_slice(), [(v, _), (s, _)]
            if v.eq_ignore_ascii_case("virtualNetworks") && s.eq_ignore_ascii_case("subnets"));
    let vnet = parsed.parent()?;
    is_subnet.then(|| (crate::object_name(&vnet.to_string()), parsed.name().to_owned()))
}

fn array(v: &Value) -> &[Value] {
    v.as_array().map_or(&[], Vec::as_slice)
}

fn net(v: &Value, path: impl FnOnce() -> String) -> Result<IpNet, ViewError> {
    let Some(text) = v.as_str() else {
        return bad(path(), "an address prefix is a string such as 10.0.0.0/16");
    };
    match text.parse::<IpNet>() {
        Ok(n) if n.network() == n.addr() => Ok(n),
        Ok(n) => bad(
            path(),
            format!("{text} has bits set behind its length; did you mean {}?", n.trunc()),
        ),
        Err(_) => bad(path(), format!("{text:?} is not an address prefix such as 10.0.0.0/16")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn vnet_body_parses_and_names_the_broken_path() {
        let mut body = json!({"properties": {"addressSpace": {"addressPrefixes": ["10.240.0.0/16"]}, "subnets": [
            {"name": "nodes", "properties": {"addressPrefix": "10.240.0.0/22"}},
            {"name": "groups", "properties": {"addressPrefixes": ["10.240.4.0/24"],
              "delegations": [{"name": "0", "properties": {"serviceName": "microsoft.containerinstance/containergroups"}}]}}]}});
        let v = VnetView::parse(&body).unwrap();
        assert_eq!(v.subnet("NODES").unwrap().usable(), 1019);
        let usable = |a: &str| v.subnet("nodes").unwrap().is_usable(a.parse().unwrap());
        assert!(usable("10.240.0.4") && usable("10.240.3.254"));
        assert!(!usable("10.240.0.3") && !usable("10.240.3.255") && !usable("10.240.4.4") && !usable("fd00::4"));
        assert!(v.subnet("groups").unwrap().is_delegated_to(CONTAINER_GROUPS));
        body["properties"]["subnets"][1]["properties"]["addressPrefixes"][0] = json!("10.240.4.1/24");
        let e = VnetView::parse(&body).unwrap_err().to_string();
        assert!(
            e.starts_with("properties.subnets[1].properties.addressPrefixes[0]: ") && e.contains("10.240.4.0/24"),
            "{e}"
        );
    }

    #[test]
    fn nic_has_exactly_one_primary() {
        let mut body = json!({"properties": {"ipConfigurations": [
            {"name": "a", "properties": {"subnet": {"id": "/s"}}}, {"properties": {"subnet": {"id": "/s"}}}]}});
        let v = NicView::parse(&body).unwrap();
        assert!(v.ip_configs[0].primary && !v.ip_configs[1].primary);
        assert_eq!(v.ip_configs[1].name, "ipconfig2");
        for i in 0..2 {
            body["properties"]["ipConfigurations"][i]["properties"]["primary"] = json!(true);
        }
        assert!(NicView::parse(&body).is_err());
    }

    #[test]
    fn allocated_addresses_and_mac() {
        let status = json!({"macAddress": "00-0D-3A-01-02-FF", "ipConfigurations": [
            {"name": "a", "properties": {"privateIPAddress": "10.0.0.4", "primary": true, "subnet": {"id": "/s"}}}]});
        let n = NicAddresses::parse(&status).unwrap();
        assert_eq!(n.mac_bytes(), Some([0, 0x0d, 0x3a, 1, 2, 0xff]));
        assert_eq!(n.primary().unwrap().address.to_string(), "10.0.0.4");
        assert_eq!(NicAddresses::parse(&json!({})), None);
    }

    #[test]
    fn subnet_ids_split() {
        let id = "/subscriptions/S/resourceGroups/G/providers/Microsoft.Network/virtualNetworks/V/subnets/N";
        let (vnet, name) = subnet_ref(id).unwrap();
        assert!(vnet.starts_with("v-"));
        assert_eq!(name, "N");
        assert_eq!(subnet_ref("/subscriptions/S/resourceGroups/G"), None);
    }
}

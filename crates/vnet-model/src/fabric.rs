//! What one host's data plane shall be. Written by the controllers from home objects, planned and applied by `vnet`.
//!
//! Keys are the home object names; they are stable and unique, and link names are computed from them.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::address::{Mac, WIRE_SERVER};
pub use crate::balancer::{Distribution, InstanceAddressSpec, NatGatewaySpec, OutboundSpec, ProbeKind, ProbeSpec};
pub use crate::check::{SpecError, check_instance};
use crate::gateway::SiteSpec;
use crate::instance::InstanceSpec;
use crate::interfaces::{Interface, InterfaceAddress, InterfaceSubnet, Interfaces};
use crate::nsg::{Scope, SecurityRule};
use crate::service_tags::ServiceTags;
use crate::underlay::{RemoteLocalSpec, UnderlaySpec};
use crate::zone::ZoneSpec;

/// Everything of one instance on one host.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FabricSpec {
    pub instance: String,
    #[serde(default)]
    pub vnets: Vec<VnetSpec>,
    #[serde(default)]
    pub edge: EdgeSpec,
    /// Other hosts; without it this one stands alone.
    #[serde(default)]
    pub underlay: Option<UnderlaySpec>,
}

/// The border between the host and every virtual network.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EdgeSpec {
    /// Public addresses: frontends and hosted API endpoints; routed on the host to the edge.
    pub pool: Ipv4Net,
    /// Small private range for the links between host, edge and virtual networks; it must not be routed on the host.
    pub transit: Ipv4Net,
    pub uplink: Uplink,
    /// Addresses of the pool that stand in the edge itself: the platform listens there.
    pub endpoints: Vec<Ipv4Addr>,
    /// Where VNet DNS asks for names it does not know; none: such names are refused at once.
    pub resolvers: Vec<IpAddr>,
    /// What service tags in rules and routes stand for.
    pub service_tags: ServiceTags,
}

/// The public pool unless configured otherwise: half of the range kept for benchmarks of interconnected networks.
pub const DEFAULT_POOL: &str = "198.19.0.0/16";
/// The transit range unless configured otherwise.
pub const DEFAULT_TRANSIT: &str = "100.127.192.0/18";

impl Default for EdgeSpec {
    fn default() -> Self {
        let net = |text: &str| text.parse().unwrap_or_default();
        Self {
            pool: net(DEFAULT_POOL),
            transit: net(DEFAULT_TRANSIT),
            uplink: Uplink::None,
            endpoints: Vec::new(),
            resolvers: Vec::new(),
            service_tags: ServiceTags::default(),
        }
    }
}

/// Where outward traffic leaves the host.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Uplink {
    /// Nowhere: virtual networks reach the host's pool and each other's public addresses only.
    #[default]
    None,
    /// By whichever link has the host's default route.
    Auto,
    Link(String),
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VnetSpec {
    pub key: String,
    pub prefixes: Vec<Ipv4Net>,
    pub subnets: Vec<SubnetSpec>,
    #[serde(default)]
    pub nics: Vec<NicSpec>,
    #[serde(default)]
    pub frontends: Vec<FrontendSpec>,
    /// Addresses that stand in the virtual network's own namespace, where the platform listens: virtual nodes, private
    /// API endpoints. Reached by the network's NICs only.
    #[serde(default)]
    pub local: Vec<Ipv4Addr>,
    #[serde(default)]
    pub dns: DnsSpec,
    #[serde(default)]
    pub clusters: Vec<ClusterServicesSpec>,
    /// Network security groups that subnets and NICs name.
    #[serde(default)]
    pub security_groups: Vec<SecurityGroupSpec>,
    /// Application security groups that rules name.
    #[serde(default)]
    pub application_groups: Vec<ApplicationGroupSpec>,
    /// Private zones that are linked to this network.
    #[serde(default)]
    pub private_zones: Vec<ZoneSpec>,
    /// Virtual networks that this one is peered with. Traffic needs both to name each other.
    #[serde(default)]
    pub peers: Vec<PeerSpec>,
    /// Route tables that subnets name.
    #[serde(default)]
    pub route_tables: Vec<RouteTableSpec>,
    /// NAT gateways that subnets name.
    #[serde(default)]
    pub nat_gateways: Vec<NatGatewaySpec>,
    /// Public addresses of single NIC addresses.
    #[serde(default)]
    pub instance_addresses: Vec<InstanceAddressSpec>,
    /// SNAT ports at load balancers' frontends.
    #[serde(default)]
    pub outbound: Vec<OutboundSpec>,
    /// Its number between hosts, unique in the fabric; without one it stays on this host.
    #[serde(default)]
    pub vni: Option<u32>,
    /// Addresses of the network's own namespaces on other hosts.
    #[serde(default)]
    pub remote_local: Vec<RemoteLocalSpec>,
    /// On-premises sites.
    #[serde(default)]
    pub sites: Vec<SiteSpec>,
}

/// Routes that a subnet's NICs have besides the system's; the longest prefix wins, and at equal length these.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteTableSpec {
    pub key: String,
    /// Each prefix once.
    #[serde(default)]
    pub routes: Vec<RouteSpec>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteSpec {
    pub prefix: Ipv4Net,
    pub next_hop: NextHop,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum NextHop {
    /// As the system routes inside the virtual network and to its peers; what is outside of both is refused.
    VnetLocal,
    /// Outward by the edge.
    Internet,
    /// Refused.
    None,
    /// To the NIC that holds the address, which must forward; refused while there is none.
    VirtualAppliance(Ipv4Addr),
}

/// One half of a peering: what this virtual network knows of the other one and takes from it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerSpec {
    /// Key of the other virtual network.
    pub vnet: String,
    /// Its address space.
    pub prefixes: Vec<Ipv4Net>,
    /// Its addresses may open connections here.
    pub access: bool,
    /// Addresses outside its space may too: traffic that it forwards. Only with `access`.
    #[serde(default)]
    pub forwarded: bool,
}

#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SubnetSpec {
    pub name: String,
    pub prefix: Ipv4Net,
    /// Key of a security group of the virtual network.
    #[serde(default)]
    pub security_group: Option<String>,
    /// Key of a route table of the virtual network.
    #[serde(default)]
    pub route_table: Option<String>,
    /// Key of a NAT gateway of the virtual network.
    #[serde(default)]
    pub nat_gateway: Option<String>,
}

/// A network security group: its own rules; the default ones are understood.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SecurityGroupSpec {
    pub key: String,
    #[serde(default)]
    pub rules: Vec<SecurityRule>,
}

/// An application security group: the addresses of this network that are in it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ApplicationGroupSpec {
    pub key: String,
    #[serde(default)]
    pub members: Vec<Ipv4Addr>,
}

/// A NIC. It exists here before anything is attached to it and stays when its machine goes.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NicSpec {
    pub key: String,
    pub mac: Mac,
    /// Name of the subnet.
    pub subnet: String,
    /// Exactly one is primary.
    pub ip_configs: Vec<IpConfigSpec>,
    #[serde(default)]
    pub kind: NicKind,
    /// VNet DNS answers this name with the primary address.
    #[serde(default)]
    pub host_name: Option<String>,
    /// Key of a security group of the virtual network.
    #[serde(default)]
    pub security_group: Option<String>,
    /// It may send with any source, and gets what routes lead to it.
    #[serde(default)]
    pub ip_forwarding: bool,
    /// The machine, as the metadata service tells it about itself.
    #[serde(default)]
    pub instance: Option<InstanceSpec>,
    /// Key of the host whose port it is, if that is another one.
    #[serde(default)]
    pub host: Option<String>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IpConfigSpec {
    pub name: String,
    pub address: Ipv4Addr,
    #[serde(default)]
    pub primary: bool,
}

/// What stands behind a NIC.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum NicKind {
    /// A machine, which translates Services itself.
    #[default]
    Machine,
    /// A container group; with a cluster, that cluster's Services are translated at its port.
    Group { cluster: Option<String> },
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    /// Every protocol and port: frontends with port 0 (high-availability ports) and outbound rules.
    All,
}

/// A load balancer's frontend: an address of the public pool, or one inside the virtual network.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendSpec {
    pub address: Ipv4Addr,
    pub protocol: Protocol,
    /// 0 with [`Protocol::All`]: whatever no other frontend of the address has.
    pub port: u16,
    /// None that is ready: connections are refused.
    pub backends: Vec<BackendSpec>,
    #[serde(default)]
    pub distribution: Distribution,
    /// Idle time after which a flow is forgotten; 0 is the kernel's own.
    #[serde(default)]
    pub idle_timeout_s: u32,
    /// Who sends on a flow that was forgotten gets a reset; otherwise it is dropped without a word.
    #[serde(default)]
    pub tcp_reset: bool,
    /// Who may connect; empty: everyone.
    #[serde(default)]
    pub sources: Vec<Ipv4Net>,
    /// Backends that fail it get no new flows.
    #[serde(default)]
    pub probe: Option<ProbeSpec>,
}

impl FrontendSpec {
    /// A frontend that spreads by five-tuple and leaves everything else to its defaults.
    pub fn new(address: Ipv4Addr, protocol: Protocol, port: u16, backends: Vec<BackendSpec>) -> Self {
        Self {
            address,
            protocol,
            port,
            backends,
            distribution: Distribution::default(),
            idle_timeout_s: 0,
            tcp_reset: false,
            sources: Vec::new(),
            probe: None,
        }
    }
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendSpec {
    pub address: Ipv4Addr,
    pub port: u16,
}

/// Names that VNet DNS answers besides those of NICs.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DnsSpec {
    /// NIC names are also answered below it.
    pub suffix: String,
    pub records: Vec<DnsRecord>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DnsRecord {
    pub name: String,
    pub addresses: Vec<Ipv4Addr>,
}

/// A cluster whose Services are translated for its container groups inside the virtual network. `vnet` marks packets of
/// the cluster's group ports with `mark` and leads DNS to the local socket; the Services' own table is the service
/// proxy's, keyed by the mark.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterServicesSpec {
    pub cluster: String,
    /// Unique in the virtual network, 1..=0xffff; set in the packet mark under [`CLUSTER_MARK_MASK`].
    pub mark: u32,
    pub dns_service_ip: Ipv4Addr,
    /// Port at 168.63.129.16 inside the namespace where the cluster's DNS server listens.
    pub dns_port: u16,
}

/// Bits of the packet mark that tell the cluster.
pub const CLUSTER_MARK_MASK: u32 = 0xffff;

impl FabricSpec {
    /// Pairs of virtual networks that name each other as peers, each pair once.
    pub fn peered(&self) -> Vec<(&str, &str)> {
        let named = |a: &VnetSpec, b: &str| self.vnets.iter().any(|v| v.key == b && v.names_peer(&a.key));
        let halves = self
            .vnets
            .iter()
            .flat_map(|v| v.peers.iter().map(move |p| (v, p.vnet.as_str())));
        halves
            .filter(|(v, other)| v.key.as_str() < *other && named(v, other))
            .map(|(v, other)| (v.key.as_str(), other))
            .collect()
    }
}

impl NicSpec {
    /// The primary address; `None` only in a spec that was not checked.
    pub fn primary(&self) -> Option<Ipv4Addr> {
        self.ip_configs.iter().find(|c| c.primary).map(|c| c.address)
    }

    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.ip_configs.iter().map(|c| c.address)
    }
}

impl VnetSpec {
    pub fn subnet(&self, name: &str) -> Option<&SubnetSpec> {
        self.subnets.iter().find(|s| s.name.eq_ignore_ascii_case(name))
    }

    /// The NIC that holds `address`.
    pub fn nic_of(&self, address: Ipv4Addr) -> Option<&NicSpec> {
        self.nics.iter().find(|n| n.addresses().any(|a| a == address))
    }

    /// Whether the half of a peering with `other` is here.
    pub fn names_peer(&self, other: &str) -> bool {
        self.peers.iter().any(|p| p.vnet == other)
    }

    pub fn security_group(&self, key: &str) -> Option<&SecurityGroupSpec> {
        self.security_groups.iter().find(|g| g.key == key)
    }

    /// NICs whose port is on this host.
    pub fn nics_here(&self) -> impl Iterator<Item = &NicSpec> {
        self.nics.iter().filter(|n| n.host.is_none())
    }

    /// What the tag `VirtualNetwork` stands for here: disjoint ranges, ascending.
    pub fn tagged_ranges(&self) -> Vec<Ipv4Net> {
        let own = self.prefixes.iter().copied();
        let peers = self.peers.iter().flat_map(|p| p.prefixes.iter().copied());
        let sites = self.sites.iter().flat_map(|s| s.prefixes.iter().copied());
        let all: Vec<Ipv4Net> = own
            .chain(peers)
            .chain(sites)
            .chain([Ipv4Net::from(WIRE_SERVER)])
            .collect();
        let mut out = Ipv4Net::aggregate(&all);
        out.sort();
        out
    }

    /// What names in security rules stand for here.
    pub fn scope(&self) -> Scope {
        let groups = self.application_groups.iter();
        Scope {
            vnet: self.tagged_ranges(),
            application_groups: groups.map(|g| (g.key.clone(), g.members.clone())).collect(),
        }
    }

    /// What the wire server tells the machine behind `nic`.
    pub fn interfaces_of(&self, nic: &NicSpec) -> Interfaces {
        let addresses = nic
            .ip_configs
            .iter()
            .map(|c| InterfaceAddress {
                address: c.address.into(),
                primary: c.primary,
            })
            .collect();
        let subnets = self.subnet(&nic.subnet).map(|s| InterfaceSubnet {
            prefix: s.prefix.into(),
            addresses,
        });
        Interfaces {
            interfaces: vec![Interface {
                mac: Some(nic.mac),
                primary: true,
                subnets: subnets.into_iter().collect(),
            }],
        }
    }
}

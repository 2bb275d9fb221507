//! What one host's data plane shall be. Written by the controllers from home objects, planned and applied by `vnet`.
//!
//! Keys are the home object names; they are stable and unique, and link names are computed from them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::address::{Mac, WIRE_SERVER};
use crate::interfaces::{Interface, InterfaceAddress, InterfaceSubnet, Interfaces};
use crate::rules::{self, RuleError};

/// Everything of one instance on one host.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FabricSpec {
    pub instance: String,
    #[serde(default)]
    pub vnets: Vec<VnetSpec>,
    #[serde(default)]
    pub edge: EdgeSpec,
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
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SubnetSpec {
    pub name: String,
    pub prefix: Ipv4Net,
}

/// A NIC. It exists here before anything is attached to it and stays when its machine goes.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
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
}

/// A load balancer's frontend: an address of the public pool, or one inside the virtual network.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendSpec {
    pub address: Ipv4Addr,
    pub protocol: Protocol,
    pub port: u16,
    /// Ready ones only; none: connections are refused.
    pub backends: Vec<BackendSpec>,
    /// The same client gets the same backend.
    #[serde(default)]
    pub client_affinity: bool,
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

#[derive(Clone, Debug, Error, PartialEq)]
pub enum SpecError {
    #[error("instance {instance:?} must be 1 to 20 of a-z, 0-9 and -")]
    Instance { instance: String },
    #[error("vnet {vnet}: an address rule is broken")]
    Rule { vnet: String, source: RuleError },
    #[error("vnet {vnet}: {what} {key:?} is there twice")]
    Twice {
        vnet: String,
        what: &'static str,
        key: String,
    },
    #[error("vnet {vnet}: nic {nic}: {reason}")]
    Nic { vnet: String, nic: String, reason: String },
    #[error("vnet {vnet}: frontend {address}:{port}: {reason}")]
    Frontend {
        vnet: String,
        address: Ipv4Addr,
        port: u16,
        reason: &'static str,
    },
    #[error("vnet {vnet}: local address {address}: {reason}")]
    Local {
        vnet: String,
        address: Ipv4Addr,
        reason: &'static str,
    },
    #[error("vnet {vnet}: cluster {cluster}: {reason}")]
    Cluster {
        vnet: String,
        cluster: String,
        reason: &'static str,
    },
    #[error("edge: {reason}")]
    Edge { reason: String },
}

impl SpecError {
    /// The broken address rule's ARM code, if it is one.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Rule { source, .. } => source.code(),
            _ => "InvalidResource",
        }
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

    /// What the wire server tells the machine behind `nic`.
    pub fn interfaces_of(&self, nic: &NicSpec) -> Interfaces {
        let addresses = nic
            .ip_configs
            .iter()
            .map(|c| InterfaceAddress {
                address: c.address,
                primary: c.primary,
            })
            .collect();
        let subnets = self.subnet(&nic.subnet).map(|s| InterfaceSubnet {
            prefix: s.prefix,
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

/// What was admitted so far, of all virtual networks and of the present one.
#[derive(Default)]
struct Seen {
    vnets: BTreeSet<String>,
    nics: BTreeSet<String>,
    /// Public address to its virtual network.
    public: BTreeMap<Ipv4Addr, String>,
    macs: BTreeSet<Mac>,
    addresses: BTreeSet<Ipv4Addr>,
    frontends: BTreeSet<(Ipv4Addr, Protocol, u16)>,
    marks: BTreeSet<u32>,
    clusters: BTreeSet<String>,
}

/// Admits the parts of one virtual network one by one; what is refused leaves no trace.
struct Door<'a> {
    edge: &'a EdgeSpec,
    vnet: &'a VnetSpec,
    seen: &'a mut Seen,
}

impl Door<'_> {
    fn twice(&self, what: &'static str, key: &str) -> SpecError {
        SpecError::Twice {
            vnet: self.vnet.key.clone(),
            what,
            key: key.to_owned(),
        }
    }

    /// The network without its parts.
    fn network(&mut self) -> Result<(), SpecError> {
        let (vnet, edge) = (self.vnet, self.edge);
        let rule = |source| SpecError::Rule {
            vnet: vnet.key.clone(),
            source,
        };
        rules::check_prefixes(&vnet.prefixes).map_err(rule)?;
        for forbidden in [edge.pool, edge.transit] {
            if let Some(prefix) = vnet.prefixes.iter().find(|p| rules::overlap(**p, forbidden)) {
                return Err(rule(RuleError::Forbidden {
                    prefix: *prefix,
                    forbidden,
                }));
            }
        }
        let subnets: Vec<(&str, Ipv4Net)> = vnet.subnets.iter().map(|s| (s.name.as_str(), s.prefix)).collect();
        rules::check_subnets(&vnet.prefixes, &subnets).map_err(rule)?;
        if !self.seen.vnets.insert(vnet.key.clone()) {
            return Err(self.twice("vnet", &vnet.key));
        }
        // Keys and public addresses are of the whole fabric, the rest of one network.
        let Seen {
            vnets, nics, public, ..
        } = std::mem::take(self.seen);
        *self.seen = Seen {
            vnets,
            nics,
            public,
            ..Seen::default()
        };
        Ok(())
    }

    fn cluster(&mut self, c: &ClusterServicesSpec) -> Result<(), SpecError> {
        let fail = |reason| SpecError::Cluster {
            vnet: self.vnet.key.clone(),
            cluster: c.cluster.clone(),
            reason,
        };
        if c.mark == 0 || c.mark > CLUSTER_MARK_MASK || self.seen.marks.contains(&c.mark) {
            return Err(fail("its mark must be unique and from 1 to 65535"));
        }
        if [0, 53, 80].contains(&c.dns_port) {
            return Err(fail("its DNS port is taken by the wire server or zero"));
        }
        if !self.seen.clusters.insert(c.cluster.clone()) {
            return Err(self.twice("cluster", &c.cluster));
        }
        self.seen.marks.insert(c.mark);
        Ok(())
    }

    fn local(&mut self, address: Ipv4Addr) -> Result<(), SpecError> {
        let fail = |reason| SpecError::Local {
            vnet: self.vnet.key.clone(),
            address,
            reason,
        };
        let subnet = self.vnet.subnets.iter().find(|s| s.prefix.contains(&address));
        if subnet.is_none_or(|s| rules::is_reserved(s.prefix, address)) {
            return Err(fail("it is not a usable address of one of the subnets"));
        }
        if self.seen.addresses.insert(address) {
            Ok(())
        } else {
            Err(fail("it is in use"))
        }
    }

    fn nic(&mut self, nic: &NicSpec) -> Result<(), SpecError> {
        let vnet = self.vnet;
        let fail = |reason: String| SpecError::Nic {
            vnet: vnet.key.clone(),
            nic: nic.key.clone(),
            reason,
        };
        let subnet = vnet
            .subnet(&nic.subnet)
            .ok_or_else(|| fail(format!("there is no subnet {:?}", nic.subnet)))?;
        if nic.ip_configs.iter().filter(|c| c.primary).count() != 1 {
            return Err(fail("exactly one ip configuration must be primary".to_owned()));
        }
        let mut own = BTreeSet::new();
        for address in nic.addresses() {
            if !subnet.prefix.contains(&address) || rules::is_reserved(subnet.prefix, address) {
                return Err(fail(format!("{address} is not a usable address of {}", subnet.prefix)));
            }
            if self.seen.addresses.contains(&address) || !own.insert(address) {
                return Err(fail(format!("{address} is in use")));
            }
        }
        if let NicKind::Group { cluster: Some(cluster) } = &nic.kind
            && !self.seen.clusters.contains(cluster)
        {
            return Err(fail(format!("there is no cluster {cluster:?} in this virtual network")));
        }
        if self.seen.macs.contains(&nic.mac) {
            return Err(fail(format!("{} is in use", nic.mac)));
        }
        if !self.seen.nics.insert(nic.key.clone()) {
            return Err(self.twice("nic", &nic.key));
        }
        self.seen.macs.insert(nic.mac);
        self.seen.addresses.extend(own);
        Ok(())
    }

    fn frontend(&mut self, f: &FrontendSpec) -> Result<(), SpecError> {
        let vnet = self.vnet;
        let (address, port) = (f.address, f.port);
        let fail = |reason| SpecError::Frontend {
            vnet: vnet.key.clone(),
            address,
            port,
            reason,
        };
        let public = self.edge.pool.contains(&address);
        if !public && !vnet.prefixes.iter().any(|p| p.contains(&address)) {
            return Err(fail(
                "the address is neither of the public pool nor of this virtual network",
            ));
        }
        if self.seen.addresses.contains(&address) || self.edge.endpoints.contains(&address) {
            return Err(fail("the address is in use"));
        }
        if public && self.seen.public.get(&address).is_some_and(|v| *v != vnet.key) {
            return Err(fail("the address belongs to another virtual network"));
        }
        if !self.seen.frontends.insert((address, f.protocol, port)) {
            return Err(fail("the same address, protocol and port is there twice"));
        }
        if public {
            self.seen.public.insert(address, vnet.key.clone());
        }
        Ok(())
    }
}

impl FabricSpec {
    /// Checks everything that can be checked without looking at the host.
    pub fn check(&self) -> Result<(), SpecError> {
        self.check_edge()?;
        let mut seen = Seen::default();
        for vnet in &self.vnets {
            let mut door = Door {
                edge: &self.edge,
                vnet,
                seen: &mut seen,
            };
            door.network()?;
            vnet.clusters.iter().try_for_each(|c| door.cluster(c))?;
            vnet.local.iter().try_for_each(|a| door.local(*a))?;
            vnet.nics.iter().try_for_each(|n| door.nic(n))?;
            vnet.frontends.iter().try_for_each(|f| door.frontend(f))?;
        }
        Ok(())
    }

    /// The spec without the parts that are wrong, and what was wrong with them; earlier parts win. Only a mistake of the
    /// instance or the edge remains. One object's mistake then does not stop the others' network.
    pub fn without_mistakes(self) -> (Self, Vec<SpecError>) {
        let Self { instance, vnets, edge } = self;
        let (mut seen, mut errors, mut good) = (Seen::default(), Vec::new(), Vec::new());
        for mut vnet in vnets {
            let parts = (
                std::mem::take(&mut vnet.clusters),
                std::mem::take(&mut vnet.local),
                std::mem::take(&mut vnet.nics),
                std::mem::take(&mut vnet.frontends),
            );
            let (mut clusters, mut local, mut nics, mut frontends) = parts;
            let mut keep = |result: Result<(), SpecError>| result.map_err(|e| errors.push(e)).is_ok();
            let mut door = Door {
                edge: &edge,
                vnet: &vnet,
                seen: &mut seen,
            };
            if !keep(door.network()) {
                continue;
            }
            clusters.retain(|c| keep(door.cluster(c)));
            local.retain(|a| keep(door.local(*a)));
            nics.retain(|n| keep(door.nic(n)));
            frontends.retain(|f| keep(door.frontend(f)));
            good.push(VnetSpec {
                clusters,
                local,
                nics,
                frontends,
                ..vnet
            });
        }
        (
            Self {
                instance,
                vnets: good,
                edge,
            },
            errors,
        )
    }

    fn check_edge(&self) -> Result<(), SpecError> {
        check_instance(&self.instance)?;
        let edge = &self.edge;
        let fail = |reason: String| Err(SpecError::Edge { reason });
        if rules::overlap(edge.pool, edge.transit) {
            return fail(format!(
                "the pool {} and the transit range {} overlap",
                edge.pool, edge.transit
            ));
        }
        if edge.transit.prefix_len() > 28 || edge.pool.prefix_len() > 30 {
            return fail("the pool needs at least /30 and the transit range at least /28".to_owned());
        }
        if edge.pool.contains(&WIRE_SERVER) || edge.transit.contains(&WIRE_SERVER) {
            return fail(format!("{WIRE_SERVER} must be outside the pool and the transit range"));
        }
        match edge.endpoints.iter().find(|e| !edge.pool.contains(*e)) {
            Some(e) => fail(format!("the endpoint {e} is not in the pool {}", edge.pool)),
            None => Ok(()),
        }
    }
}

/// An instance's name is part of link and table names.
pub fn check_instance(instance: &str) -> Result<(), SpecError> {
    let fine = (1..=20).contains(&instance.len())
        && instance
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if fine {
        Ok(())
    } else {
        Err(SpecError::Instance {
            instance: instance.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> FabricSpec {
        let nic = |key: &str, last| NicSpec {
            key: key.to_owned(),
            mac: Mac::derived(key),
            subnet: "nodes".to_owned(),
            ip_configs: vec![IpConfigSpec {
                name: "p".into(),
                address: Ipv4Addr::new(10, 1, 0, last),
                primary: true,
            }],
            kind: NicKind::Machine,
            host_name: None,
        };
        let vnet = VnetSpec {
            key: "v".to_owned(),
            prefixes: vec!["10.1.0.0/16".parse().unwrap()],
            subnets: vec![SubnetSpec {
                name: "nodes".into(),
                prefix: "10.1.0.0/24".parse().unwrap(),
            }],
            nics: vec![nic("a", 4), nic("b", 5)],
            ..VnetSpec::default()
        };
        FabricSpec {
            instance: "t".into(),
            vnets: vec![vnet],
            edge: EdgeSpec::default(),
        }
    }

    #[test]
    fn a_good_spec_passes_and_survives_json() {
        let spec = spec();
        spec.check().unwrap();
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<FabricSpec>(&text).unwrap(), spec);
    }

    #[test]
    fn each_mistake_is_named() {
        let check = |change: &dyn Fn(&mut FabricSpec), wanted: &str| {
            let mut s = spec();
            change(&mut s);
            let error = s.check().unwrap_err();
            let text = format!("{error} {:?}", error.code());
            assert!(text.contains(wanted), "{text} should contain {wanted}");
        };
        check(
            &|s| s.vnets[0].subnets[0].prefix = "10.1.0.0/30".parse().unwrap(),
            "NetcfgInvalidSubnet",
        );
        check(
            &|s| s.vnets[0].prefixes[0] = "198.19.0.0/17".parse().unwrap(),
            "AddressPrefixStringCannotBeReserved",
        );
        check(
            &|s| s.vnets[0].nics[1].ip_configs[0].address = Ipv4Addr::new(10, 1, 0, 4),
            "10.1.0.4 is in use",
        );
        check(
            &|s| s.vnets[0].nics[1].ip_configs[0].address = Ipv4Addr::new(10, 1, 0, 1),
            "not a usable address",
        );
        check(&|s| s.vnets[0].nics[1].key = "a".into(), "nic \"a\" is there twice");
        check(
            &|s| {
                s.vnets[0].nics[1].kind = NicKind::Group {
                    cluster: Some("c".into()),
                }
            },
            "no cluster \"c\"",
        );
        check(&|s| s.instance = "Bad Name".into(), "instance");
        check(
            &|s| s.edge.endpoints = vec![Ipv4Addr::new(10, 0, 0, 1)],
            "not in the pool",
        );
    }

    #[test]
    fn one_mistake_does_not_stop_the_rest() {
        let mut s = spec();
        let mut twin = s.vnets[0].nics[0].clone();
        twin.key = "twin".into();
        s.vnets[0].nics.push(twin);
        s.vnets.push(VnetSpec {
            key: "bad".into(),
            ..VnetSpec::default()
        });
        let (good, errors) = s.without_mistakes();
        assert_eq!(good, spec());
        assert_eq!(errors.len(), 2, "{errors:?}");
        good.check().unwrap();
    }
}

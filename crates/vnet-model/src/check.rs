//! What a fabric's spec must satisfy, checked part by part: whole ([`FabricSpec::check`]), or leaving out what is wrong
//! ([`FabricSpec::without_mistakes`]).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use thiserror::Error;

use crate::address::{Mac, WIRE_SERVER};
use crate::fabric::{
    CLUSTER_MARK_MASK, ClusterServicesSpec, EdgeSpec, FabricSpec, FrontendSpec, NicKind, NicSpec, PeerSpec, Protocol,
    VnetSpec,
};
use crate::gateway::{self, SiteSpec};
use crate::nsg::NsgError;
use crate::rules::{self, RuleError};
use crate::underlay;

mod public;

pub(crate) use public::FIRST_SNAT_PORT;

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
    #[error("vnet {vnet}: security group {group} is not valid")]
    Group {
        vnet: String,
        group: String,
        source: NsgError,
    },
    #[error("vnet {vnet}: {of} names security group {group}, which is not there")]
    NoGroup { vnet: String, of: String, group: String },
    #[error("vnet {vnet}: {of} names route table {table}, which is not there")]
    NoTable { vnet: String, of: String, table: String },
    #[error("vnet {vnet}: {of} names NAT gateway {gateway}, which is not there")]
    NoGateway { vnet: String, of: String, gateway: String },
    #[error("vnet {vnet}: {what} {key}: {reason}")]
    Public {
        vnet: String,
        what: &'static str,
        key: String,
        reason: String,
    },
    #[error("vnet {vnet}: peer {peer}: {reason}")]
    Peer { vnet: String, peer: String, reason: String },
    #[error("vnet {vnet}: site {site}: {reason}")]
    Site { vnet: String, site: String, reason: String },
    #[error("edge: {reason}")]
    Edge { reason: String },
    #[error("underlay: {reason}")]
    Underlay { reason: String },
}

impl SpecError {
    /// The broken address rule's ARM code, if it is one.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Rule { source, .. } => source.code(),
            Self::Group { source, .. } => source.code(),
            Self::Peer { .. } => "VnetAddressSpacesOverlap",
            Self::NoGroup { .. } | Self::NoTable { .. } | Self::NoGateway { .. } => "InvalidResourceReference",
            _ => "InvalidResource",
        }
    }
}

/// What was admitted so far, of all virtual networks and of the present one.
#[derive(Default)]
struct Seen {
    vnets: BTreeSet<String>,
    vnis: BTreeSet<u32>,
    nics: BTreeSet<String>,
    /// Public address to its virtual network.
    public: BTreeMap<Ipv4Addr, String>,
    /// Public addresses that cannot be anything else, too.
    exclusive: BTreeSet<Ipv4Addr>,
    macs: BTreeSet<Mac>,
    /// Thousands, asked for at every apply.
    addresses: HashSet<Ipv4Addr>,
    frontends: BTreeSet<(Ipv4Addr, Protocol, u16)>,
    /// Private addresses with a public one, and with SNAT ports.
    instances: BTreeSet<Ipv4Addr>,
    outbound: BTreeSet<(Ipv4Addr, Protocol)>,
    marks: BTreeSet<u32>,
    clusters: BTreeSet<String>,
    /// Ranges of the virtual network and of the peers that were admitted, with their owner.
    ranges: Vec<(String, Ipv4Net)>,
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
        self.groups()?;
        underlay::check_vni(vnet, &mut self.seen.vnis)?;
        if !self.seen.vnets.insert(vnet.key.clone()) {
            return Err(self.twice("vnet", &vnet.key));
        }
        // Keys and public addresses are of the whole fabric, the rest of one network.
        let Seen {
            vnets,
            vnis,
            nics,
            public,
            exclusive,
            ..
        } = std::mem::take(self.seen);
        *self.seen = Seen {
            vnets,
            vnis,
            nics,
            public,
            exclusive,
            ..Seen::default()
        };
        Ok(())
    }

    /// Security groups, and that the subnets' are there. A subnet without its group would be open, so this fails whole.
    fn groups(&self) -> Result<(), SpecError> {
        let vnet = self.vnet;
        let mut keys = BTreeSet::new();
        for group in &vnet.security_groups {
            if !keys.insert(group.key.as_str()) {
                return Err(self.twice("security group", &group.key));
            }
            crate::nsg::check(&group.rules).map_err(|source| SpecError::Group {
                vnet: vnet.key.clone(),
                group: group.key.clone(),
                source,
            })?;
        }
        let mut tables = BTreeSet::new();
        for table in &vnet.route_tables {
            if !tables.insert(table.key.as_str()) {
                return Err(self.twice("route table", &table.key));
            }
            let mut prefixes = BTreeSet::new();
            if let Some(route) = table.routes.iter().find(|r| !prefixes.insert(r.prefix)) {
                return Err(self.twice("route", &route.prefix.to_string()));
            }
        }
        let lost = |s: &&crate::fabric::SubnetSpec| s.route_table.as_deref().is_some_and(|t| !tables.contains(t));
        if let Some(subnet) = vnet.subnets.iter().find(lost) {
            return Err(SpecError::NoTable {
                vnet: vnet.key.clone(),
                of: subnet.name.clone(),
                table: subnet.route_table.clone().unwrap_or_default(),
            });
        }
        let gateways: BTreeSet<&str> = vnet.nat_gateways.iter().map(|g| g.key.as_str()).collect();
        if gateways.len() < vnet.nat_gateways.len() {
            return Err(self.twice("NAT gateway", "of one key"));
        }
        let closed = |s: &&crate::fabric::SubnetSpec| s.nat_gateway.as_deref().is_some_and(|g| !gateways.contains(g));
        if let Some(subnet) = vnet.subnets.iter().find(closed) {
            return Err(SpecError::NoGateway {
                vnet: vnet.key.clone(),
                of: subnet.name.clone(),
                gateway: subnet.nat_gateway.clone().unwrap_or_default(),
            });
        }
        let missing = |s: &&crate::fabric::SubnetSpec| s.security_group.as_deref().is_some_and(|g| !keys.contains(g));
        match vnet.subnets.iter().find(missing) {
            None => Ok(()),
            Some(subnet) => Err(SpecError::NoGroup {
                vnet: vnet.key.clone(),
                of: subnet.name.clone(),
                group: subnet.security_group.clone().unwrap_or_default(),
            }),
        }
    }

    fn peer(&mut self, peer: &PeerSpec) -> Result<(), SpecError> {
        let vnet = self.vnet;
        let fail = |reason: String| SpecError::Peer {
            vnet: vnet.key.clone(),
            peer: peer.vnet.clone(),
            reason,
        };
        if peer.vnet == vnet.key {
            return Err(fail("a virtual network is no peer of itself".to_owned()));
        }
        if self.seen.ranges.iter().any(|(of, _)| *of == peer.vnet) {
            return Err(self.twice("peer", &peer.vnet));
        }
        rules::check_prefixes(&peer.prefixes).map_err(|e| fail(e.to_string()))?;
        let own = vnet.prefixes.iter().map(|p| (&vnet.key, *p));
        let edge = [self.edge.pool, self.edge.transit].map(|p| (&vnet.key, p));
        let others = self.seen.ranges.iter().map(|(of, p)| (of, *p));
        for (of, range) in own.chain(edge).chain(others) {
            if let Some(prefix) = peer.prefixes.iter().find(|p| rules::overlap(**p, range)) {
                return Err(fail(format!("its {prefix} overlaps {range} of {of}")));
            }
        }
        let ranges = peer.prefixes.iter().map(|p| (peer.vnet.clone(), *p));
        self.seen.ranges.extend(ranges);
        Ok(())
    }

    fn site(&mut self, site: &SiteSpec) -> Result<(), SpecError> {
        if self.seen.ranges.iter().any(|(of, _)| *of == site.key) {
            return Err(self.twice("site", &site.key));
        }
        let ranges = gateway::check(self.vnet, self.edge, site, &self.seen.ranges)?;
        self.seen.ranges.extend(ranges);
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
        let mut own = HashSet::with_capacity(nic.ip_configs.len());
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
        if let Some(group) = &nic.security_group
            && vnet.security_group(group).is_none()
        {
            return Err(SpecError::NoGroup {
                vnet: vnet.key.clone(),
                of: nic.key.clone(),
                group: group.clone(),
            });
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
        if let Some(reason) = self.frontend_fields(f) {
            return Err(fail(reason));
        }
        if public && self.seen.exclusive.contains(&address) {
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
        underlay::check(self)?;
        let mut seen = Seen::default();
        for vnet in &self.vnets {
            let mut door = Door {
                edge: &self.edge,
                vnet,
                seen: &mut seen,
            };
            door.network()?;
            vnet.peers.iter().try_for_each(|p| door.peer(p))?;
            vnet.sites.iter().try_for_each(|s| door.site(s))?;
            vnet.clusters.iter().try_for_each(|c| door.cluster(c))?;
            vnet.local.iter().try_for_each(|a| door.local(*a))?;
            vnet.nics.iter().try_for_each(|n| door.nic(n))?;
            vnet.frontends.iter().try_for_each(|f| door.frontend(f))?;
            vnet.nat_gateways.iter().try_for_each(|g| door.gateway(g))?;
            vnet.instance_addresses.iter().try_for_each(|i| door.instance(i))?;
            vnet.outbound.iter().try_for_each(|o| door.outbound(o))?;
        }
        Ok(())
    }

    /// The spec without the parts that are wrong, and what was wrong with them; earlier parts win. Only a mistake of the
    /// instance, the edge or the underlay remains. One object's mistake then does not stop the others' network.
    pub fn without_mistakes(self) -> (Self, Vec<SpecError>) {
        let Self {
            instance,
            vnets,
            edge,
            underlay,
        } = self;
        let (mut seen, mut errors, mut good) = (Seen::default(), Vec::new(), Vec::new());
        for mut vnet in vnets {
            let parts = (
                std::mem::take(&mut vnet.clusters),
                std::mem::take(&mut vnet.local),
                std::mem::take(&mut vnet.nics),
                std::mem::take(&mut vnet.frontends),
                std::mem::take(&mut vnet.peers),
                std::mem::take(&mut vnet.sites),
            );
            let (mut clusters, mut local, mut nics, mut frontends, mut peers, mut sites) = parts;
            let (mut instance_addresses, mut outbound) = (
                std::mem::take(&mut vnet.instance_addresses),
                std::mem::take(&mut vnet.outbound),
            );
            let mut keep = |result: Result<(), SpecError>| result.map_err(|e| errors.push(e)).is_ok();
            let mut door = Door {
                edge: &edge,
                vnet: &vnet,
                seen: &mut seen,
            };
            if !keep(door.network()) {
                continue;
            }
            peers.retain(|p| keep(door.peer(p)));
            sites.retain(|s| keep(door.site(s)));
            clusters.retain(|c| keep(door.cluster(c)));
            local.retain(|a| keep(door.local(*a)));
            nics.retain(|n| keep(door.nic(n)));
            frontends.retain(|f| keep(door.frontend(f)));
            let mut nat_gateways = vnet.nat_gateways.clone();
            for gateway in &mut nat_gateways {
                // Its subnets stay closed then: whoever asked for this way out shall not leave by another one.
                if !keep(door.gateway(gateway)) {
                    gateway.addresses.clear();
                }
            }
            instance_addresses.retain(|i| keep(door.instance(i)));
            outbound.retain(|o| keep(door.outbound(o)));
            good.push(VnetSpec {
                nat_gateways,
                instance_addresses,
                outbound,
                clusters,
                local,
                nics,
                frontends,
                peers,
                sites,
                ..vnet
            });
        }
        (
            Self {
                instance,
                vnets: good,
                edge,
                underlay,
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
pub(crate) mod tests {
    use super::*;
    use crate::fabric::{IpConfigSpec, SubnetSpec};

    pub(crate) fn spec() -> FabricSpec {
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
            ..NicSpec::default()
        };
        let vnet = VnetSpec {
            key: "v".to_owned(),
            prefixes: vec!["10.1.0.0/16".parse().unwrap()],
            subnets: vec![SubnetSpec {
                name: "nodes".into(),
                prefix: "10.1.0.0/24".parse().unwrap(),
                ..SubnetSpec::default()
            }],
            nics: vec![nic("a", 4), nic("b", 5)],
            ..VnetSpec::default()
        };
        FabricSpec {
            instance: "t".into(),
            vnets: vec![vnet],
            edge: EdgeSpec::default(),
            underlay: None,
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
        check(
            &|s| s.vnets[0].nics[0].security_group = Some("g".into()),
            "InvalidResourceReference",
        );
        check(
            &|s| s.vnets[0].subnets[0].security_group = Some("g".into()),
            "nodes names security group g",
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

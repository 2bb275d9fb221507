//! Several hosts under one fabric: where the others are, and what stands behind them.
//!
//! Each virtual network has a number (VNI). A host that has the network holds a VXLAN device in the network's namespace
//! whose datagrams travel between the hosts' underlay addresses. What stands on another host is reached by a route through
//! that host: it has no port here and is filtered by its own host alone.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::address::Mac;
use crate::check::SpecError;
use crate::fabric::{FabricSpec, VnetSpec};

/// UDP port of VXLAN (RFC 7348).
pub const VXLAN_PORT: u16 = 4789;
/// What VXLAN over IPv4 adds to a packet: outer Ethernet 14, IPv4 20, UDP 8, VXLAN 8.
pub const VXLAN_OVERHEAD: u32 = 50;
/// Numbers of virtual networks: 24 bits, 0 is not used (RFC 7348), 1 joins the hosts' edges.
pub const VNI_MAX: u32 = 0xff_ffff;
pub const EDGE_VNI: u32 = 1;
/// Numbers of hosts fit beside a flag into the upper half of a mark.
pub const HOST_NUMBER_MAX: u16 = 0x0fff;

/// This host's place among the others.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UnderlaySpec {
    /// Address of this host that the others send to.
    pub address: Ipv4Addr,
    /// This host's number, unique among all hosts, 1..=[`HOST_NUMBER_MAX`].
    pub number: u16,
    #[serde(default = "default_port")]
    pub port: u16,
    /// Largest packet of the underlay; NICs get [`VXLAN_OVERHEAD`] less.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
    /// The other hosts that are alive: what stands behind one that is not listed is not reached.
    #[serde(default)]
    pub hosts: Vec<RemoteHostSpec>,
}

fn default_port() -> u16 {
    VXLAN_PORT
}

fn default_mtu() -> u32 {
    1500
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RemoteHostSpec {
    pub key: String,
    /// Its underlay address.
    pub address: Ipv4Addr,
    pub number: u16,
    /// Public addresses that stand in that host's edge.
    #[serde(default)]
    pub endpoints: Vec<Ipv4Addr>,
}

/// An address of a virtual network's own namespace on another host: a virtual node, a private API endpoint.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RemoteLocalSpec {
    pub address: Ipv4Addr,
    /// Key of the host.
    pub host: String,
}

impl UnderlaySpec {
    pub fn new(address: Ipv4Addr, number: u16) -> Self {
        Self {
            address,
            number,
            port: VXLAN_PORT,
            mtu: default_mtu(),
            hosts: Vec::new(),
        }
    }

    pub fn host(&self, key: &str) -> Option<&RemoteHostSpec> {
        self.hosts.iter().find(|h| h.key == key)
    }

    /// Largest packet of a NIC.
    pub fn inner_mtu(&self) -> u32 {
        self.mtu.saturating_sub(VXLAN_OVERHEAD)
    }
}

/// MAC of the VXLAN device of network `vni` on the host with this underlay address: every host computes the others'.
pub fn vxlan_mac(vni: u32, address: Ipv4Addr) -> Mac {
    Mac::derived(&format!("{vni}/{address}/vxlan"))
}

/// Checks the underlay and what names it.
pub(crate) fn check(spec: &FabricSpec) -> Result<(), SpecError> {
    let fail = |reason: String| Err(SpecError::Underlay { reason });
    let Some(underlay) = &spec.underlay else {
        return Ok(());
    };
    let usable = |a: Ipv4Addr| !a.is_unspecified() && !a.is_multicast() && !a.is_broadcast() && !a.is_loopback();
    // 576: what every IPv4 host must take (RFC 791), so that NICs keep something of use.
    if underlay.mtu < 576 + VXLAN_OVERHEAD || underlay.mtu > 65_535 {
        return fail(format!(
            "an MTU of {} leaves too little or does not exist",
            underlay.mtu
        ));
    }
    if underlay.port == 0 {
        return fail("the port must not be 0".to_owned());
    }
    let mut seen = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let own = ("this host", underlay.address, underlay.number);
    let others = underlay.hosts.iter().map(|h| (h.key.as_str(), h.address, h.number));
    for (key, address, number) in std::iter::once(own).chain(others) {
        if !usable(address) {
            return fail(format!("{address} of {key} is no address of a host"));
        }
        if number == 0 || number > HOST_NUMBER_MAX {
            return fail(format!("number {number} of {key} is not in 1..={HOST_NUMBER_MAX}"));
        }
        if !seen.0.insert(key) || !seen.1.insert(address) || !seen.2.insert(number) {
            return fail(format!("{key} ({address}, number {number}) is there twice"));
        }
    }
    let edge = &spec.edge;
    for host in &underlay.hosts {
        let wrong = |e: &&Ipv4Addr| !edge.pool.contains(*e) || edge.endpoints.contains(e);
        if let Some(e) = host.endpoints.iter().find(wrong) {
            return fail(format!(
                "the endpoint {e} of {} is not in the pool {} or stands here too",
                host.key, edge.pool
            ));
        }
    }
    Ok(())
}

/// Checks a virtual network's number; `seen` has the numbers before it.
pub(crate) fn check_vni(vnet: &VnetSpec, seen: &mut BTreeSet<u32>) -> Result<(), SpecError> {
    let Some(vni) = vnet.vni else { return Ok(()) };
    if vni <= EDGE_VNI || vni > VNI_MAX || !seen.insert(vni) {
        return Err(SpecError::Underlay {
            reason: format!("number {vni} of virtual network {} is taken or out of range", vnet.key),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> FabricSpec {
        let host = |key: &str, last, number| RemoteHostSpec {
            key: key.into(),
            address: Ipv4Addr::new(192, 0, 2, last),
            number,
            endpoints: vec![],
        };
        let mut underlay = UnderlaySpec::new(Ipv4Addr::new(192, 0, 2, 1), 1);
        underlay.hosts = vec![host("b", 2, 2), host("c", 3, 3)];
        FabricSpec {
            instance: "t".into(),
            underlay: Some(underlay),
            ..FabricSpec::default()
        }
    }

    #[test]
    fn mistakes_of_the_underlay_are_named() {
        spec().check().unwrap();
        let refused = |change: &dyn Fn(&mut UnderlaySpec)| {
            let mut s = spec();
            change(s.underlay.as_mut().unwrap());
            s.check().unwrap_err().to_string()
        };
        assert!(refused(&|u| u.hosts[1].number = 2).contains("twice"));
        assert!(refused(&|u| u.hosts[1].address = u.address).contains("twice"));
        assert!(refused(&|u| u.hosts[0].number = 0).contains("number 0 of b"));
        assert!(refused(&|u| u.hosts[0].address = Ipv4Addr::BROADCAST).contains("no address"));
        assert!(refused(&|u| u.mtu = 600).contains("MTU"));
        assert!(refused(&|u| u.hosts[0].endpoints = vec![Ipv4Addr::new(10, 0, 0, 1)]).contains("endpoint"));
    }

    #[test]
    fn numbers_of_networks_are_unique() {
        let vnet = |key: &str, vni| VnetSpec {
            key: key.into(),
            prefixes: vec!["10.0.0.0/16".parse().unwrap()],
            vni: Some(vni),
            ..VnetSpec::default()
        };
        let mut s = spec();
        s.vnets = vec![vnet("v", 7), vnet("w", 8)];
        s.check().unwrap();
        s.vnets[1].vni = Some(7);
        assert!(s.check().unwrap_err().to_string().contains("number 7"));
        s.vnets[1].vni = Some(EDGE_VNI);
        let (good, errors) = s.without_mistakes();
        assert_eq!((good.vnets.len(), errors.len()), (1, 1));
    }

    #[test]
    fn each_device_has_a_mac_of_its_own() {
        let at = |vni, last| vxlan_mac(vni, Ipv4Addr::new(192, 0, 2, last));
        assert_eq!(at(5, 1), at(5, 1));
        assert!(at(5, 1) != at(6, 1) && at(5, 1) != at(5, 2));
    }
}

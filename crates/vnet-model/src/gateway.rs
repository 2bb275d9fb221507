//! On-premises sites of a virtual network: what is there, and the way to it.
//!
//! A site is reached by a WireGuard tunnel (a site-to-site connection of a virtual network gateway), or by an interface of
//! the host that was handed over to the network (an ExpressRoute connection). Its prefixes are routes of every subnet.

use std::net::{Ipv4Addr, SocketAddr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::check::SpecError;
use crate::fabric::{EdgeSpec, VnetSpec};
use crate::rules;

/// Name of the subnet that a gateway stands in.
pub const GATEWAY_SUBNET: &str = "GatewaySubnet";
/// Packets in a tunnel: 60 bytes of WireGuard over IPv4 and 20 to spare for IPv6 outside, as its own tools choose.
pub const TUNNEL_MTU: u32 = 1420;

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SiteSpec {
    /// Unique in the fabric: the connection's object name.
    pub key: String,
    /// What is there; disjoint from the network, its peers and the other sites.
    pub prefixes: Vec<Ipv4Net>,
    pub way: SiteWay,
    /// Key of the host whose way it is, if that is another one.
    #[serde(default)]
    pub host: Option<String>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum SiteWay {
    Tunnel(TunnelSpec),
    Link(HandedLinkSpec),
}

/// One WireGuard peer. Keys are not here: they are read from the connection's secret by whoever runs the tunnel.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelSpec {
    /// UDP port on the host where this end listens.
    pub listen_port: u16,
    /// The other end; absent if it comes to us.
    #[serde(default)]
    pub endpoint: Option<SocketAddr>,
}

/// An interface of the host that belongs to the virtual network from now on.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HandedLinkSpec {
    /// Its name on the host.
    pub interface: String,
    /// Our address on it.
    pub address: Ipv4Net,
    /// The router on its other side, inside `address`.
    pub gateway: Ipv4Addr,
}

/// Checks one site of a network. `taken` has the ranges of its peers and of the sites before it, with their owner.
/// Returns the ranges that are taken from now on.
pub(crate) fn check(
    vnet: &VnetSpec,
    edge: &EdgeSpec,
    site: &SiteSpec,
    taken: &[(String, Ipv4Net)],
) -> Result<Vec<(String, Ipv4Net)>, SpecError> {
    let fail = |reason: String| SpecError::Site {
        vnet: vnet.key.clone(),
        site: site.key.clone(),
        reason,
    };
    let own = vnet.prefixes.iter().map(|p| (vnet.key.as_str(), *p));
    let border = [edge.pool, edge.transit].map(|p| ("the edge", p));
    let others = taken.iter().map(|(of, p)| (of.as_str(), *p));
    let ranges: Vec<(&str, Ipv4Net)> = own.chain(border).chain(others).collect();
    let mut new = site.prefixes.clone();
    if new.is_empty() {
        return Err(fail("it has no prefixes".to_owned()));
    }
    if let SiteWay::Link(link) = &site.way {
        if !link.address.contains(&link.gateway) || link.gateway == link.address.addr() {
            return Err(fail(format!(
                "its gateway {} is not beside {}",
                link.gateway, link.address
            )));
        }
        let name = &link.interface;
        if name.is_empty() || name.len() > 15 || name.contains(['/', ' ', ':']) {
            return Err(fail(format!("{name:?} is no interface's name")));
        }
        new.push(link.address.trunc());
    }
    for (n, prefix) in new.iter().enumerate() {
        let before = new[..n].iter().map(|p| (site.key.as_str(), *p));
        if let Some((of, other)) = ranges
            .iter()
            .copied()
            .chain(before)
            .find(|(_, r)| rules::overlap(*r, *prefix))
        {
            return Err(fail(format!("its {prefix} overlaps {other} of {of}")));
        }
    }
    Ok(new.into_iter().map(|p| (site.key.clone(), p)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_is_beside_everything_else() {
        let site = |key: &str, prefix: &str| SiteSpec {
            key: key.into(),
            prefixes: vec![prefix.parse().unwrap()],
            way: SiteWay::Link(HandedLinkSpec {
                interface: "eth1".into(),
                address: "192.0.2.1/30".parse().unwrap(),
                gateway: Ipv4Addr::new(192, 0, 2, 2),
            }),
            host: None,
        };
        let with = |sites: Vec<SiteSpec>| {
            let vnet = VnetSpec {
                key: "v".into(),
                prefixes: vec!["10.0.0.0/16".parse().unwrap()],
                sites,
                ..VnetSpec::default()
            };
            let spec = crate::fabric::FabricSpec {
                instance: "t".into(),
                vnets: vec![vnet],
                ..Default::default()
            };
            spec.check().map_err(|e| e.to_string())
        };
        with(vec![site("a", "192.168.0.0/24")]).unwrap();
        assert!(
            with(vec![site("a", "10.0.1.0/24")])
                .unwrap_err()
                .contains("overlaps 10.0.0.0/16 of v")
        );
        assert!(
            with(vec![site("a", "172.16.0.0/24"), site("b", "172.16.0.0/25")])
                .unwrap_err()
                .contains("of a")
        );
        assert!(with(vec![site("a", "192.0.2.0/24")]).unwrap_err().contains("overlaps"));
        let mut far = site("a", "172.16.0.0/24");
        if let SiteWay::Link(l) = &mut far.way {
            l.gateway = Ipv4Addr::new(192, 0, 2, 9);
        }
        assert!(with(vec![far]).unwrap_err().contains("not beside"));
    }
}

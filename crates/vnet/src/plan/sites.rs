//! On-premises sites: routes to their prefixes, and what may come from there.
//!
//! A site's link is one more port of the network: only the site's prefixes come in by it, security groups of NICs judge them,
//! and it leads to this network's own addresses alone: neither to a peer nor outward, nor to the platform's sockets.

use linux::nft::{Chain, ChainKind, Datum, Element, Family, Field, HookPoint, Reject, Rule, Set, Table};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use vnet_model::address::gateway;
use vnet_model::fabric::VnetSpec;
use vnet_model::gateway::{GATEWAY_SUBNET, SiteSpec, SiteWay};

use super::NamespacePlan;
use crate::names::{SITES_TABLE, site_link};

/// Comment of the counting rule for packets by a site's link from elsewhere.
pub const NOT_OF_SITE: &str = "source is not of this site";

/// Sites whose link is on this host.
pub fn here(vnet: &VnetSpec) -> impl Iterator<Item = &SiteSpec> {
    vnet.sites.iter().filter(|s| s.host.is_none())
}

/// Names of their links.
pub fn links(vnet: &VnetSpec) -> impl Iterator<Item = Element> {
    here(vnet).map(|s| Element::key([Datum::IfName(site_link(&s.key))]))
}

/// Adds the routes, and returns the table. Refusals go to a tunnel's other end with the gateway subnet's first address, which
/// that end takes for one of the network's; `outward` without such a subnet.
pub fn sites(vnet: &VnetSpec, plan: &mut NamespacePlan, outward: Ipv4Addr) -> Table {
    let mut table = Table::new(Family::Ip, SITES_TABLE);
    let mut sources = Vec::new();
    let gateway = vnet.subnet(GATEWAY_SUBNET).map(|s| gateway(s.prefix));
    for site in here(vnet) {
        let link = site_link(&site.key);
        if let SiteWay::Link(handed) = &site.way {
            plan.address(&link, handed.address);
        }
        for prefix in &site.prefixes {
            match &site.way {
                SiteWay::Tunnel(_) => {
                    plan.route_from(*prefix, &link, gateway.unwrap_or(outward));
                    if let Some(gateway) = gateway {
                        plan.address(&link, Ipv4Net::from(gateway));
                    }
                }
                SiteWay::Link(handed) => {
                    plan.route_via(*prefix, &link, handed.gateway, Some(handed.address.addr()));
                }
            }
            sources.push(Element::key([Datum::IfName(link.clone()), Datum::Net(*prefix)]));
        }
    }
    if sources.is_empty() {
        return table;
    }
    let net = |p: &Ipv4Net| Element::key([Datum::Net(*p)]);
    table.sets = vec![
        Set::new("sites", [Field::Iifname]).with(links(vnet)),
        Set::new("sources", [Field::Iifname, Field::IpSaddr])
            .intervals()
            .with(sources),
        Set::new("inside", [Field::IpDaddr])
            .intervals()
            .with(vnet.prefixes.iter().map(net)),
    ];
    let from = || Rule::new().in_set([Field::Iifname], "sites");
    table.chains = vec![
        Chain::base(
            "from",
            ChainKind::Filter,
            HookPoint::Prerouting,
            -150,
            [from()
                .not_in_set([Field::Iifname, Field::IpSaddr], "sources")
                .counter()
                .drop()
                .comment(NOT_OF_SITE)],
        ),
        Chain::base(
            "through",
            ChainKind::Filter,
            HookPoint::Forward,
            0,
            [
                Rule::new().established().accept(),
                from()
                    .not_in_set([Field::IpDaddr], "inside")
                    .counter()
                    .reject(Reject::AdminProhibited)
                    .comment("through a gateway"),
            ],
        ),
    ];
    table
}

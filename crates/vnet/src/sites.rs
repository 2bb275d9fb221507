//! Links of on-premises sites in a virtual network's namespace: TUN devices of tunnels, and interfaces of the host that were
//! handed over. What was handed over comes back when its site goes.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use linux::netlink::{Link, Request, Route};
use linux::netns::NetNs;
use tokio::runtime::Handle;
use vnet_model::fabric::VnetSpec;
use vnet_model::gateway::{HandedLinkSpec, SiteSpec, SiteWay, TUNNEL_MTU};

use crate::Error;
use crate::converge::Handles;
use crate::names::{LINK_GROUP, is_site_link, site_link};
use crate::plan::sites_here;
use crate::tunnel::{Tunnel, TunnelConfig, TunnelKeys, any};

/// What the alias of a handed-over interface begins with; its state and its name on the host follow.
const HANDED: &str = "handed-over";

fn note(name: &str, up: bool) -> String {
    format!("{HANDED} {} {name}", if up { "up" } else { "down" })
}

/// Name on the host, and whether it was up there.
fn noted(link: &Link) -> Option<(&str, bool)> {
    let (state, name) = link
        .alias
        .as_deref()?
        .strip_prefix(HANDED)?
        .trim_start()
        .split_once(' ')?;
    Some((name, state == "up"))
}

/// Makes the links of the network's sites what they shall be. An interface that the host does not have, or still uses, is
/// waited for. Returns the number of changes.
pub fn join_sites(host: &mut Route, host_ns: &NetNs, space: &mut Handles, vnet: &VnetSpec) -> Result<usize, Error> {
    let wanted: BTreeMap<String, &SiteSpec> = sites_here(vnet).map(|s| (site_link(&s.key), s)).collect();
    let there: Vec<Link> = space
        .route
        .links()?
        .into_iter()
        .filter(|l| is_site_link(&l.name))
        .collect();
    let fits = |link: &Link, site: &SiteSpec| match &site.way {
        SiteWay::Tunnel(_) => noted(link).is_none(),
        SiteWay::Link(handed) => noted(link).is_some_and(|(name, _)| name == handed.interface),
    };
    let mut changes = 0;
    for link in &there {
        if wanted.get(&link.name).is_none_or(|site| !fits(link, site)) {
            remove(&mut space.route, link, host_ns)?;
            changes += 1;
        }
    }
    for (name, site) in &wanted {
        if there.iter().any(|l| l.name == *name && fits(l, site)) {
            continue;
        }
        changes += match &site.way {
            SiteWay::Tunnel(_) => make_tun(space, name, site)?,
            SiteWay::Link(handed) => take(host, space, name, site, handed)?,
        };
    }
    Ok(changes)
}

fn make_tun(space: &mut Handles, name: &str, site: &SiteSpec) -> Result<usize, Error> {
    let fail = |source| Error::Site {
        site: site.key.clone(),
        source,
    };
    drop(linux::tun::open(&space.ns, name).map_err(fail)?);
    let index = space.route.need_link(name)?.index;
    space.route.run_all(&[
        Request::set_group(index, LINK_GROUP),
        Request::set_mtu(index, TUNNEL_MTU),
        Request::set_up(index, true),
    ])?;
    Ok(1)
}

fn take(
    host: &mut Route,
    space: &mut Handles,
    name: &str,
    site: &SiteSpec,
    handed: &HandedLinkSpec,
) -> Result<usize, Error> {
    let waits = |reason: &str| {
        tracing::warn!(
            site = site.key,
            interface = handed.interface,
            reason,
            "a site's interface is not handed over"
        );
        Ok(0)
    };
    let Some(link) = host.link(&handed.interface)? else {
        return waits("the host has none of this name");
    };
    let used = host
        .addresses()?
        .iter()
        .any(|a| a.link == link.index && a.address.addr().is_ipv4());
    if used {
        return waits("it still has an IPv4 address on the host; remove it there first");
    }
    host.run_all(&[
        Request::set_alias(link.index, &note(&handed.interface, link.up)),
        Request::set_up(link.index, false),
        Request::move_to(link.index, space.ns.as_fd()),
    ])?;
    let index = space.route.need_link(&handed.interface)?.index;
    space
        .route
        .run_all(&[Request::rename(index, name), Request::set_up(index, true)])?;
    Ok(1)
}

/// Deletes the link, or gives it back to the host under its own name.
fn remove(route: &mut Route, link: &Link, host: &NetNs) -> Result<(), Error> {
    let Some((name, up)) = noted(link) else {
        return Ok(route.run(Request::delete_link(link.index))?);
    };
    route.run_all(&[
        Request::set_up(link.index, false),
        Request::rename(link.index, name),
        Request::set_alias(link.index, ""),
        Request::move_to(link.index, host.as_fd()),
    ])?;
    let mut outside = Route::open_in(host)?;
    let index = outside.need_link(name)?.index;
    Ok(outside.run(Request::set_up(index, up))?)
}

/// Gives back every handed-over interface of a namespace that is about to go.
pub fn give_back(route: &mut Route, host: &NetNs) -> Result<(), Error> {
    let links = route.links()?;
    let handed = links.iter().filter(|l| is_site_link(&l.name) && noted(l).is_some());
    handed.map(|l| remove(route, l, host)).fold(Ok(()), Result::and)
}

/// The tunnels that run.
#[derive(Default)]
pub struct Tunnels {
    keys: BTreeMap<String, TunnelKeys>,
    running: BTreeMap<String, (TunnelConfig, Tunnel)>,
}

impl Tunnels {
    /// From now on these keys count, by site.
    pub fn set_keys(&mut self, keys: BTreeMap<String, TunnelKeys>) {
        self.keys = keys;
    }

    /// Ends tunnels of sites that are not `wanted`.
    pub fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        self.running.retain(|site, _| wanted(site));
    }

    /// Starts the network's tunnels whose keys are known, and those anew whose settings changed. Failures are logged and tried
    /// again at the next apply.
    pub fn serve(&mut self, vnet: &VnetSpec, inner: &NetNs, outer: &NetNs, runtime: &Handle) {
        for site in sites_here(vnet) {
            let SiteWay::Tunnel(tunnel) = &site.way else { continue };
            let Some(keys) = self.keys.get(&site.key) else {
                self.running.remove(&site.key);
                continue;
            };
            let config = TunnelConfig {
                keys: keys.clone(),
                listen: any(tunnel.listen_port),
                endpoint: tunnel.endpoint,
                allowed: site.prefixes.clone(),
            };
            if self
                .running
                .get(&site.key)
                .is_some_and(|(now, t)| *now == config && !t.ended())
            {
                continue;
            }
            // The old one holds port and device.
            self.running.remove(&site.key);
            match Tunnel::start(inner, &site_link(&site.key), outer, config.clone(), runtime) {
                Ok(started) => {
                    self.running.insert(site.key.clone(), (config, started));
                }
                Err(error) => tracing::error!(site = site.key, %error, "a tunnel does not start"),
            }
        }
    }
}

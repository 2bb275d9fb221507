//! What was dropped and refused on this host, read from the rules' counters by whoever may look into the namespaces.

use std::path::Path;

use linux::netns::{self, NetNs};
use linux::nft::{Counter, Family, Nft};

use crate::Error;
use crate::converge::has_ip6;
use crate::names::{
    BALANCER_TABLE, EDGE_TABLE, HOSTS_TABLE, NEIGHBOUR_TABLE, OUTBOUND_TABLE, SECURITY_TABLE, SITES_TABLE, VNET_TABLE,
    edge_pin, host_table, pins, vnet_of_pin,
};

/// Counters of a virtual network's rules that drop or refuse.
pub fn of_vnet(nft: &mut Nft) -> Result<Vec<Counter>, Error> {
    let tables = [
        (Family::Ip, VNET_TABLE),
        (Family::Ip, SECURITY_TABLE),
        (Family::Ip, BALANCER_TABLE),
        (Family::Ip, OUTBOUND_TABLE),
        (Family::Ip, HOSTS_TABLE),
        (Family::Ip, SITES_TABLE),
        (Family::Arp, NEIGHBOUR_TABLE),
    ];
    let ip6 = has_ip6().then_some((Family::Ip6, NEIGHBOUR_TABLE));
    let mut out = Vec::new();
    for (family, table) in tables.into_iter().chain(ip6) {
        out.extend(nft.counters(family, table)?);
    }
    Ok(out)
}

/// The edge's.
pub fn of_edge(nft: &mut Nft) -> Result<Vec<Counter>, Error> {
    Ok(nft.counters(Family::Ip, EDGE_TABLE)?)
}

/// The host's.
pub fn of_host(nft: &mut Nft, instance: &str) -> Result<Vec<Counter>, Error> {
    Ok(nft.counters(Family::Ip, &host_table(instance))?)
}

/// Counters of everything that an instance drops or refuses on the host whose network namespace the calling thread is in,
/// by virtual network (`edge` is the edge's, `host` the host's), whether the host agent runs or not; empty if nothing of the
/// instance is there. A table that is made again counts from zero.
pub fn drops(instance: &str, run_dir: &Path) -> Result<Vec<(String, Counter)>, Error> {
    let mut out = Vec::new();
    let named = |name: &str, counters: Vec<Counter>| -> Vec<(String, Counter)> {
        counters.into_iter().map(|c| (name.to_owned(), c)).collect()
    };
    for pin in std::fs::read_dir(pins(run_dir)).into_iter().flatten().flatten() {
        let file = pin.file_name().to_string_lossy().into_owned();
        if let (Some(key), Ok(ns)) = (vnet_of_pin(&file), netns::open(&pin.path())) {
            out.extend(named(key, of_vnet(&mut Nft::open_in(&ns)?)?));
        }
    }
    if let Ok(ns) = netns::open(&edge_pin(run_dir)) {
        out.extend(named("edge", of_edge(&mut Nft::open_in(&ns)?)?));
        let here = NetNs::current()?;
        out.extend(named("host", of_host(&mut Nft::open_in(&here)?, instance)?));
    }
    out.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(out)
}

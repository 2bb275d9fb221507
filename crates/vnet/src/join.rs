//! Links between the namespaces, ports that nobody wants any more, and the uplink's forwarding.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;

use linux::netlink::{Link, Request, Route, Veth, VethPeer, Vxlan};
use linux::netns::NetNs;
use linux::sysctl;
use vnet_model::Mac;
use vnet_model::fabric::{FabricSpec, VnetSpec};

use crate::Error;
use crate::converge::Handles;
use crate::names::{
    EDGE_LINK, HOST_LINK, LINK_GROUP, VXLAN_LINK, host_link, is_nic_link, is_peer_link, is_vnet_link, nic_link,
    peer_link, vnet_link,
};
use crate::plan::{VxlanPlan, edge_side_mac, host_link_macs, peer_mac, vnet_side_mac};
use crate::teardown::{restore_note, restore_of};

/// Whether the two links are the ends of one veth, both up.
pub fn joined(near: &mut Route, near_name: &str, far: &mut Route, far_name: &str) -> Result<bool, Error> {
    let (a, b) = (near.link(near_name)?, far.link(far_name)?);
    Ok(match (a, b) {
        (Some(a), Some(b)) => a.peer_index == Some(b.index) && a.up && b.up,
        _ => false,
    })
}

/// A veth between two namespaces of ours, made whole again if one end is missing; returns the number of changes.
fn join(
    near: &mut Route,
    near_end: (&str, Mac),
    far_ns: &NetNs,
    far: &mut Route,
    far_end: (&str, Mac),
) -> Result<usize, Error> {
    if joined(near, near_end.0, far, far_end.0)? {
        return Ok(0);
    }
    let mut changes = 2;
    if let Some(stale) = near.link(near_end.0)? {
        near.run(Request::delete_link(stale.index))?;
        changes += 1;
    }
    // Deleting one end took the other with it, unless it belonged to another pair.
    far.run(Request::delete_link_named(far_end.0))?;
    let veth = Veth {
        name: near_end.0.to_owned(),
        mac: Some(near_end.1.0),
        mtu: None,
        up: true,
        peer: VethPeer {
            name: far_end.0.to_owned(),
            mac: Some(far_end.1.0),
            mtu: None,
            netns: Some(far_ns.as_fd()),
        },
    };
    near.run(Request::create_veth(&veth).in_group(LINK_GROUP))?;
    let index = far.need_link(far_end.0)?.index;
    far.run(Request::set_up(index, true))?;
    near.settle(near_end.0)?;
    Ok(changes)
}

pub fn join_host(host: &mut Route, edge: &NetNs, instance: &str) -> Result<usize, Error> {
    let (host_mac, edge_mac) = host_link_macs(instance);
    let mut far = Route::open_in(edge)?;
    join(
        host,
        (&host_link(instance), host_mac),
        edge,
        &mut far,
        (HOST_LINK, edge_mac),
    )
}

pub fn join_vnet(edge: &mut Route, vnet: &mut Handles, key: &str) -> Result<usize, Error> {
    let near = (vnet_link(key), edge_side_mac(key));
    join(
        edge,
        (&near.0, near.1),
        &vnet.ns,
        &mut vnet.route,
        (EDGE_LINK, vnet_side_mac(key)),
    )
}

/// The link between two peers.
pub fn join_peers(near: &mut Handles, near_key: &str, far: &mut Handles, far_key: &str) -> Result<usize, Error> {
    join(
        &mut near.route,
        (&peer_link(far_key), peer_mac(near_key, far_key)),
        &far.ns,
        &mut far.route,
        (&peer_link(near_key), peer_mac(far_key, near_key)),
    )
}

/// Makes the namespace's device to other hosts what it shall be: it is born there and keeps its underlay in the host's
/// namespace. Returns the number of changes.
pub fn join_hosts(host: &mut Route, space: &mut Handles, wanted: Option<&VxlanPlan>) -> Result<usize, Error> {
    let there = space.route.link(VXLAN_LINK)?;
    if let (Some(link), Some(wanted)) = (&there, wanted)
        && is_device(link, wanted)
    {
        if link.mtu == wanted.mtu {
            return Ok(0);
        }
        space.route.run(Request::set_mtu(link.index, wanted.mtu))?;
        return Ok(1);
    }
    let mut changes = 0;
    if let Some(stale) = there {
        space.route.run(Request::delete_link(stale.index))?;
        changes += 1;
    }
    let Some(wanted) = wanted else { return Ok(changes) };
    let vxlan = Vxlan {
        name: VXLAN_LINK.to_owned(),
        mac: Some(wanted.mac.0),
        mtu: Some(wanted.mtu),
        vni: wanted.vni,
        local: wanted.local,
        port: wanted.port,
        netns: Some(space.ns.as_fd()),
    };
    host.run(Request::create_vxlan(&vxlan).in_group(LINK_GROUP))?;
    let index = space.route.need_link(VXLAN_LINK)?.index;
    space.route.run_all(&[
        Request::set_alias(index, &port_note(wanted)),
        Request::set_up(index, true),
    ])?;
    Ok(changes + 3)
}

/// Whether the link is the device wanted, but for its MTU. Number, local address and port decide the MAC; the kernel
/// changes none of them later.
pub fn is_device(link: &Link, wanted: &VxlanPlan) -> bool {
    link.mac == Some(wanted.mac.0) && link.alias.as_deref() == Some(&*port_note(wanted)) && link.up
}

/// Text for the device's alias: listings do not tell the port.
fn port_note(vxlan: &VxlanPlan) -> String {
    format!("vni {} port {}", vxlan.vni, vxlan.port)
}

/// Removes links to virtual networks that are no peers any more.
pub fn part_peers(handles: &mut Handles, peers: &BTreeSet<&str>) -> Result<usize, Error> {
    let wanted: BTreeSet<String> = peers.iter().copied().map(peer_link).collect();
    delete_links(handles, |name| is_peer_link(name) && !wanted.contains(name))
}

/// Removes ports of NICs that the spec no longer has. `last` is the network as this process applied it before; without
/// it every port that is there is looked at.
pub fn unplug_strangers(handles: &mut Handles, last: Option<&VnetSpec>, vnet: &VnetSpec) -> Result<usize, Error> {
    let known: BTreeSet<&str> = vnet.nics_here().map(|n| n.key.as_str()).collect();
    let Some(last) = last else {
        let ports: BTreeSet<String> = known.into_iter().map(nic_link).collect();
        return delete_links(handles, |name| is_nic_link(name) && !ports.contains(name));
    };
    let gone: Vec<String> = last
        .nics_here()
        .filter(|n| !known.contains(n.key.as_str()))
        .map(|n| nic_link(&n.key))
        .collect();
    let addresses = |v: &VnetSpec| -> BTreeSet<Ipv4Addr> { v.nics_here().flat_map(|n| n.addresses()).collect() };
    let changes = handles.delete_links(&gone)?;
    handles.forget(&addresses(last).difference(&addresses(vnet)).copied().collect())?;
    Ok(changes)
}

/// Removes the edge's links to virtual networks that the spec no longer has.
pub fn part_strangers(edge: &mut Handles, spec: &FabricSpec) -> Result<usize, Error> {
    let known: BTreeSet<String> = spec.vnets.iter().map(|v| vnet_link(&v.key)).collect();
    delete_links(edge, |name| is_vnet_link(name) && !known.contains(name))
}

fn delete_links(handles: &mut Handles, stale: impl Fn(&str) -> bool) -> Result<usize, Error> {
    let names: Vec<String> = handles
        .route
        .links()?
        .into_iter()
        .map(|l| l.name)
        .filter(|n| stale(n))
        .collect();
    handles.delete_links(&names)
}

/// Switches forwarding on for the uplink alone and notes its former value in the host link's alias; puts it back when
/// the uplink goes.
pub fn remember_uplink(host: &mut Handles, instance: &str, uplink: Option<&str>) -> Result<usize, Error> {
    let link = host.route.need_link(&host_link(instance))?;
    let noted = restore_of(link.alias.as_deref());
    let wanted = uplink.map(|u| format!("net/ipv4/conf/{u}/forwarding"));
    let mut changes = 0;
    for (key, value) in noted.iter().filter(|(key, _)| Some(key) != wanted.as_ref()) {
        match host.ns.run(|| sysctl::set(key, value))? {
            Ok(_) | Err(sysctl::Error::Read { .. }) => changes += 1,
            Err(e) => return Err(e.into()),
        }
    }
    let Some(key) = wanted else {
        if !noted.is_empty() {
            host.route.run(Request::set_alias(link.index, ""))?;
        }
        return Ok(changes);
    };
    if !noted.iter().any(|(k, _)| *k == key) {
        let before = host.ns.run(|| sysctl::get(&key))??;
        // The note comes first: a crash in between restores what is still there.
        host.route
            .run(Request::set_alias(link.index, &restore_note(&[(key.clone(), before)])))?;
        changes += 1;
    }
    let before = host.ns.run(|| sysctl::set(&key, "1"))??;
    Ok(changes + usize::from(before != "1"))
}

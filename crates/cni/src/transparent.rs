//! Transparent mode: a routed veth per pod. Plans are data; [`attach`] touches the kernel.
//!
//! On the host: the link `azv<11 hex>`, a /32 route to the pod and a permanent neighbour for it. In the pod: the link as
//! the runtime names it, its address as /32, and a default route through 169.254.1.1, whose permanent neighbour is the
//! host's end. Routes and neighbours end with the link, so a crash at any step leaves at most one link that DEL or GC
//! finds by name.

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd,
};

use ipnet::{IpNet, Ipv4Net};
use linux::netlink::{self, Address, Ipv4Conf, Mac, Request, RouteEntry, Veth, VethPeer};

use crate::{
    links::{
        Attached, Ends, KernelError, Owner, Plan, Prepared, default_route, differs, doing, forward_from, permanent,
    },
    steps,
};

/// What pods see as their gateway. No machine has this address; only its neighbour entry matters.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The host's end of every pod has the same address, as the original's: it is only ever one hop away from one pod.
pub const HOST_MAC: Mac = [0xaa; 6];

/// Makes the attachment. A host link left by a dead ADD of the same attachment is replaced.
///
/// # Errors
/// The caller rolls back with [`crate::links::detach`]; nothing else is left.
pub fn attach(ends: &mut Ends, prepared: Prepared, plan: &Plan) -> Result<Attached, KernelError> {
    let name = plan.owner.key.link_name();
    let pod_mac = plan.owner.key.mac();
    let create = Request::create_veth(&Veth {
        name: name.clone(),
        mac: Some(HOST_MAC),
        mtu: Some(plan.mtu),
        up: true,
        peer: VethPeer {
            name: plan.ifname.clone(),
            mac: Some(pod_mac),
            mtu: Some(plan.mtu),
            netns: Some(ends.ns.as_fd()),
        },
    });
    let (outer, inner) = ends.make(&create, &name, plan)?;
    steps::reached("veth-made");

    let mut inside = prepared.requests();
    inside.push(Request::set_up(inner, true));
    inside.extend(plan.addresses.iter().map(|a| {
        Request::add_address(&Address {
            link: inner,
            address: IpNet::from(IpAddr::V4(a.addr())),
            no_prefix_route: false,
        })
    }));
    inside.push(Request::add_neighbour(&permanent(inner, GATEWAY.into(), HOST_MAC)));
    inside.push(Request::add_route(&RouteEntry::via_gateway(
        default_route(),
        inner,
        GATEWAY,
    )));
    inside.push(Request::settle(inner));
    ends.pod
        .run_all(&inside)
        .map_err(doing(format!("configuring {} in the pod", plan.ifname)))?;
    steps::reached("pod-configured");

    forward_from(&plan.master)?;
    // The route comes last: traffic reaches the pod only when the pod can answer.
    let conf = Ipv4Conf {
        forwarding: Some(true),
        // Answers a pod that lost the neighbour entry of its gateway.
        proxy_arp: Some(true),
    };
    let mut outside = vec![Request::change_link(outer).alias(&plan.owner.alias()).ipv4_conf(conf)];
    for address in &plan.addresses {
        let address = IpAddr::V4(address.addr());
        outside.push(Request::add_neighbour(&permanent(outer, address, pod_mac)));
        outside.push(Request::add_route(&RouteEntry::via_link(IpNet::from(address), outer)));
    }
    ends.host
        .run_all(&outside)
        .map_err(doing(format!("configuring {name} on the host")))?;
    steps::reached("routed");

    Ok(Attached {
        bridge: None,
        host_link: name,
        host_mac: netlink::format_mac(HOST_MAC),
        pod_mac: netlink::format_mac(pod_mac),
        addresses: plan.addresses.iter().map(|a| Ipv4Net::from(a.addr())).collect(),
        gateway: GATEWAY,
    })
}

/// Compares the kernel with what the plan would make; the first difference is the error.
pub fn check(ends: &mut Ends, owner: &Owner, ifname: &str, addresses: &[Ipv4Addr]) -> Result<(), KernelError> {
    let name = owner.key.link_name();
    let Ends { host, pod, .. } = ends;
    let reading = || "reading the kernel's tables".to_owned();

    let outer = host.link(&name).map_err(doing(reading()))?;
    let outer = outer.ok_or_else(|| differs(format!("host link {name}"), "a veth", "nothing"))?;
    let inner = pod.link(ifname).map_err(doing(reading()))?;
    let inner = inner.ok_or_else(|| differs(format!("pod link {ifname}"), "a veth", "nothing"))?;
    for (link, mac) in [(&outer, HOST_MAC), (&inner, owner.key.mac())] {
        if !link.up {
            return Err(differs(format!("state of {}", link.name), "up", "down"));
        }
        if link.mac != Some(mac) {
            let found = link.mac.map(netlink::format_mac).unwrap_or_default();
            return Err(differs(
                format!("MAC of {}", link.name),
                netlink::format_mac(mac),
                found,
            ));
        }
    }
    if inner.peer_index != Some(outer.index) {
        return Err(differs(format!("other end of {ifname}"), &name, "another link"));
    }
    let found_alias = outer.alias.clone().unwrap_or_default();
    if Owner::parse(&found_alias).is_none_or(|o| o.key != owner.key) {
        return Err(differs(format!("owner of {name}"), owner.alias(), found_alias));
    }

    let host_routes = host.routes().map_err(doing(reading()))?;
    let pod_addresses = pod.addresses().map_err(doing(reading()))?;
    for address in addresses {
        let net = IpNet::from(IpAddr::V4(*address));
        if !pod_addresses
            .iter()
            .any(|a| a.link == inner.index && a.address.addr() == net.addr())
        {
            return Err(differs(format!("address of {ifname}"), net, "none such"));
        }
        if !host_routes
            .iter()
            .any(|r| r.destination == net && r.link == Some(outer.index))
        {
            return Err(differs("route on the host", format!("{net} dev {name}"), "none such"));
        }
    }
    let default = default_route();
    let pod_routes = pod.routes().map_err(doing(reading()))?;
    if !pod_routes
        .iter()
        .any(|r| r.destination == default && r.gateway == Some(GATEWAY.into()) && r.link == Some(inner.index))
    {
        return Err(differs(
            "route in the pod",
            format!("default via {GATEWAY} dev {ifname}"),
            "none such",
        ));
    }
    let neighbours = pod.neighbours().map_err(doing(reading()))?;
    if !neighbours
        .iter()
        .any(|n| n.link == inner.index && n.address == GATEWAY && n.mac == Some(HOST_MAC))
    {
        return Err(differs(
            "neighbour in the pod",
            format!("{GATEWAY} at {}", netlink::format_mac(HOST_MAC)),
            "none such",
        ));
    }
    Ok(())
}

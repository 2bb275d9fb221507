//! Transparent mode: a routed veth per pod. Plans are data; [`attach`] touches the kernel.
//!
//! On the host: the link `azv<11 hex>`, a /32 (/128) route to the pod and a permanent neighbour for it. In the pod: the link
//! as the runtime names it, its address as /32 (/128), and a default route through 169.254.1.1 (fe80::1234:5678:9abc), whose
//! permanent neighbour is the host's end. Routes and neighbours end with the link, so a crash at any step leaves at most one link that DEL or GC
//! finds by name.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
};

use ipnet::IpNet;
use linux::netlink::{self, Address, Ipv4Conf, Mac, Request, RouteEntry, Veth, VethPeer};

use crate::{
    links::{
        Attached, Ends, KernelError, Owner, Plan, Prepared, default_route, differs, doing, forward_from,
        forward_v6_from, permanent, prepare_v6,
    },
    steps,
};

/// What pods see as their gateway. No machine has this address; only its neighbour entry matters.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same for IPv6, as the original's.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0x1234, 0x5678, 0x9abc);

fn gateway(of: IpAddr) -> IpAddr {
    match of {
        IpAddr::V4(_) => GATEWAY.into(),
        IpAddr::V6(_) => GATEWAY6.into(),
    }
}

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

    prepare_v6(ends, plan)?;
    let mut inside = prepared.requests();
    inside.push(Request::set_up(inner, true));
    for address in plan.ips() {
        inside.push(Request::add_address(&Address {
            link: inner,
            address: IpNet::from(address),
            no_prefix_route: false,
        }));
        let gateway = gateway(address);
        inside.push(Request::add_neighbour(&permanent(inner, gateway, HOST_MAC)));
        inside.push(Request::add_route(&RouteEntry::via_gateway(
            default_route(address.is_ipv4()),
            inner,
            gateway,
        )));
    }
    ends.pod
        .run_all(&inside)
        .map_err(doing(format!("configuring {} in the pod", plan.ifname)))?;
    steps::reached("pod-configured");

    forward_from(&plan.master)?;
    if plan.has_v6() {
        forward_v6_from(&plan.master.name, &name)?;
    }
    // The route comes last: traffic reaches the pod only when the pod can answer.
    let conf = Ipv4Conf {
        forwarding: Some(true),
        // Answers a pod that lost the neighbour entry of its gateway.
        proxy_arp: Some(true),
    };
    let mut outside = vec![Request::change_link(outer).alias(&plan.owner.alias()).ipv4_conf(conf)];
    for address in plan.ips() {
        outside.push(Request::add_neighbour(&permanent(outer, address, pod_mac)));
        outside.push(Request::add_route(&RouteEntry::via_link(IpNet::from(address), outer)));
    }
    ends.host
        .run_all(&outside)
        .map_err(doing(format!("configuring {name} on the host")))?;
    steps::reached("routed");
    ends.settle(plan, inner, &[outer])?;

    Ok(Attached {
        bridge: None,
        host_link: name,
        host_mac: netlink::format_mac(HOST_MAC),
        pod_mac: netlink::format_mac(pod_mac),
        addresses: plan.ips().map(|a| (IpNet::from(a), gateway(a))).collect(),
    })
}

/// Compares the kernel with what the plan would make; the first difference is the error.
pub fn check(ends: &mut Ends, owner: &Owner, ifname: &str, addresses: &[IpAddr]) -> Result<(), KernelError> {
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
    let pod_routes = pod.routes().map_err(doing(reading()))?;
    let neighbours = pod.neighbours().map_err(doing(reading()))?;
    for address in addresses {
        let net = IpNet::from(*address);
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
        let gateway = gateway(*address);
        let default = default_route(address.is_ipv4());
        if !pod_routes
            .iter()
            .any(|r| r.destination == default && r.gateway == Some(gateway) && r.link == Some(inner.index))
        {
            let expected = format!("default via {gateway} dev {ifname}");
            return Err(differs("route in the pod", expected, "none such"));
        }
        if !neighbours
            .iter()
            .any(|n| n.link == inner.index && n.address == gateway && n.mac == Some(HOST_MAC))
        {
            let expected = format!("{gateway} at {}", netlink::format_mac(HOST_MAC));
            return Err(differs("neighbour in the pod", expected, "none such"));
        }
    }
    Ok(())
}

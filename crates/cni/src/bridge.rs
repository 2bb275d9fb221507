//! Modes bridge and tunnel: pods as ports of a bridge that this machine routes for.
//!
//! The NIC stays as it is. The bridge is a device of its own beside it, with a MAC derived from its name, no address, and
//! an answer to every ARP query of a pod for something that lies beyond (proxy ARP), so a pod sees one Ethernet with its
//! subnet, its gateway and every neighbour. Towards the fabric all frames carry the NIC's MAC, since they are routed;
//! nothing has to be rewritten, and a node never loses its own address, whatever dies when.
//!
//! - bridge: pods of one node talk frame to frame. Replies of a Service's endpoint on the same node pass the translation
//!   only with `br_netfilter`; hairpin is on, so a pod reaches itself through such a translation.
//! - tunnel: frames do not pass from port to port, and a policy rule sends whatever comes from the bridge to the NIC's
//!   default gateway. The fabric sends it back, after its security rules, also for the pod next door. Connections that this
//!   machine translated (Services, host ports) go straight to their endpoint, as with the original: their answers must
//!   find the translation again, and the fabric would take them for forged.
//!
//! Per pod: the port `azv<11 hex>` with the owner as its alias, and on the bridge a permanent neighbour and a /32 route. The
//! neighbour's MAC is a hash of the owner, so DEL and GC find what a crash left. Bridge and rule stay for the next pod
//! and go with GC once no pod is left.

use std::{collections::BTreeSet, net::IpAddr, os::fd::AsFd};

use ipnet::IpNet;
use linux::{
    netlink::{
        self, Address, BridgePort, Link, Mac, Neighbour, Request, Route, RouteEntry, RoutingRule, Veth, VethPeer,
    },
    nft::{CT_STATUS_DNAT, Chain, ChainKind, Datum, Family, Field, HookPoint, Nft, Rule, Statement, Table},
    sysctl,
};

use crate::{
    links::{
        Attached, Ends, KernelError, Leased, Owner, Plan, Prepared, alone, default_route, differs, doing, filter,
        forget, forward_from, forward_v6_from, permanent, prepare_v6, set, set6,
    },
    steps,
    transparent::HOST_MAC,
};

const MAIN_TABLE: u32 = 254;
/// Tables of tunnel mode: this and the 65,535 after it.
const TABLE_FIRST: u32 = 0x617a_0000;
const TABLE_LAST: u32 = 0x617a_ffff;
/// After the table of local addresses (0), before the main table (32766).
const RULE_PRIORITY: u32 = 512;
/// Packets with this bit of their mark do not go to the fabric but where the main table says.
const STRAIGHT_MARK: u32 = 0x0100_0000;
/// Whether bridged frames pass connection tracking, for this network namespace.
const BRIDGE_NETFILTER: &str = "net/bridge/bridge-nf-call-iptables";

/// Which bridge, and how pods on it meet.
#[derive(Clone, Debug)]
pub struct Bridge {
    pub name: String,
    /// Tunnel mode.
    pub tunnel: bool,
}

impl Bridge {
    /// `configured`, or `azure` and the NIC's index, as the original names it.
    pub fn of(configured: Option<&str>, master: &Link, tunnel: bool) -> Self {
        Self {
            name: configured.map_or_else(|| format!("azure{}", master.index), str::to_owned),
            tunnel,
        }
    }

    fn rule(&self) -> RoutingRule {
        let [a, b] = hash(&self.name);
        RoutingRule {
            v6: false,
            priority: RULE_PRIORITY,
            iif: Some(self.name.clone()),
            mark: Some((0, STRAIGHT_MARK)),
            table: TABLE_FIRST | u32::from(a) << 8 | u32::from(b),
        }
    }
}

/// Of pods only: a translated packet may have to leave by the port it came in by.
const PORT: BridgePort = BridgePort {
    hairpin: true,
    isolated: false,
};

fn hash<const N: usize>(name: &str) -> [u8; N] {
    let digest = hmac_sha256::Hash::hash(format!("azure-vnet bridge {name}").as_bytes());
    std::array::from_fn(|i| digest[i])
}

/// The MAC of a bridge made here; another MAC means that somebody else made the bridge.
pub fn mac(name: &str) -> Mac {
    let [a, b, c, d] = hash(name);
    [0x0a, 0x58, a, b, c, d]
}

/// What a bridge must be for pods to be put on it.
fn is_ours(link: &Link) -> bool {
    link.kind.as_deref() == Some("bridge") && link.mac == Some(mac(&link.name))
}

/// Alias of a bridge of which everything is set that is not a pod's; the second one for IPv6 as well.
const READY: &str = "azure-vnet bridge";
const READY_V6: &str = "azure-vnet bridge, IPv6 too";

/// Makes the bridge unless it is there, and everything of it that is not a pod's.
fn ensure(host: &mut Route, bridge: &Bridge, plan: &Plan) -> Result<u32, KernelError> {
    let name = &bridge.name;
    let looking = || format!("looking for {name}");
    let link = match host.link(name).map_err(doing(looking()))? {
        Some(link) => link,
        None => {
            match host.run(Request::create_bridge(name, mac(name), Some(plan.mtu))) {
                // Another ADD was faster.
                Err(e) if e.errno() == Some(libc::EEXIST) => {}
                other => other.map_err(doing(format!("making bridge {name}")))?,
            }
            host.need_link(name).map_err(doing(looking()))?
        }
    };
    steps::reached("bridge-made");
    if !is_ours(&link) {
        return Err(KernelError::ForeignBridge {
            link: name.clone(),
            kind: link.kind.unwrap_or_else(|| "plain".into()),
            mac: link.mac.map(netlink::format_mac).unwrap_or_default(),
        });
    }
    if !link.up {
        host.run(Request::set_up(link.index, true))
            .map_err(doing(format!("bringing up {name}")))?;
    }
    forward_from(&plan.master)?;
    let ready = |with: &str| link.alias.as_deref() == Some(with) || link.alias.as_deref() == Some(READY_V6);
    let wanted = if plan.has_v6() { READY_V6 } else { READY };
    if !ready(wanted) {
        settings(name, &plan.master.name, plan.has_v6())?;
        host.run(Request::set_alias(link.index, wanted))
            .map_err(doing(format!("naming {name}")))?;
    }
    steps::reached("bridge-set");
    if bridge.tunnel {
        tunnel(host, bridge, plan)?;
    }
    Ok(link.index)
}

fn settings(name: &str, nic: &str, with_v6: bool) -> Result<(), KernelError> {
    for (key, value) in [("forwarding", "1"), ("proxy_arp", "1"), ("send_redirects", "0")] {
        set(name, key, value)?;
    }
    let plain = |key: String, value: &str| {
        sysctl::set(&key, value)
            .map(drop)
            .map_err(|source| KernelError::Sysctl {
                doing: format!("setting {key}"),
                source,
            })
    };
    // The kernel would let every answer wait for up to 0.8 s.
    plain(format!("net/ipv4/neigh/{name}/proxy_delay"), "0")?;
    // The node must not listen to router advertisements of a pod.
    if with_v6 {
        set6(name, "accept_ra", "0")?;
        return forward_v6_from(nic, name);
    }
    let v6 = format!("net/ipv6/conf/{name}/disable_ipv6");
    if sysctl::get(&v6).is_ok() {
        plain(v6, "1")?;
    }
    Ok(())
}

/// Sends everything that comes from the bridge to the fabric's router.
fn tunnel(host: &mut Route, bridge: &Bridge, plan: &Plan) -> Result<(), KernelError> {
    let nic = &plan.master.name;
    // What leaves by the bridge and comes back by the NIC would fail a strict check of the return path.
    let strict = |link: &str| sysctl::get(&format!("net/ipv4/conf/{link}/rp_filter")).is_ok_and(|v| v == "1");
    if strict("all") || strict(nic) {
        set(nic, "rp_filter", "2")?;
    }
    let routes = host.routes().map_err(doing("listing routes"))?;
    let default = routes
        .iter()
        .filter(|r| r.destination == default_route(true) && r.table == MAIN_TABLE)
        .filter(|r| r.link == Some(plan.master.index) && r.gateway.is_some())
        .min_by_key(|r| r.metric)
        .ok_or_else(|| KernelError::NoMaster {
            reason: format!("tunnel mode sends all traffic to the default gateway of {nic}, which has none"),
        })?;
    let rule = bridge.rule();
    let wanted = RouteEntry {
        table: rule.table,
        // The source a node would use is not a pod's.
        source: None,
        metric: 0,
        protocol: RouteEntry::via_link(default_route(true), plan.master.index).protocol,
        ..*default
    };
    if !routes.contains(&wanted) {
        host.run(Request::add_route(&wanted))
            .map_err(doing("making the tunnel's route"))?;
    }
    steps::reached("tunnel-route");
    let mut nft = Nft::open().map_err(filter("opening the packet filter"))?;
    for table in tunnel_tables(bridge) {
        nft.ensure(&table).map_err(filter(
            "making the tunnel's rules for frames and translated connections",
        ))?;
    }
    steps::reached("tunnel-exception");
    host.run(Request::add_rule(&rule))
        .map_err(doing("making the tunnel's rule"))?;
    steps::reached("tunnel-rule");
    Ok(())
}

const TABLE_PREFIX: &str = "azure-vnet-";

/// Translated connections get [`STRAIGHT_MARK`] once the translation is done (destinations have priority -100); no other
/// frame passes from port to port, so that queries for the pod next door are answered by the bridge too.
///
/// A bridge's isolated ports would do for the frames, but with `br_netfilter` a translated packet is bridged, not routed,
/// where its endpoint is on the same bridge, and would be lost between two isolated ports.
fn tunnel_tables(bridge: &Bridge) -> [Table; 2] {
    let name = format!("{TABLE_PREFIX}{}", bridge.name);
    let translated = Statement::CtStatus {
        mask: CT_STATUS_DNAT,
        negate: false,
    };
    let mut packets = Table::new(Family::Ip, &name);
    packets.chains = vec![Chain::base(
        "straight",
        ChainKind::Filter,
        HookPoint::Prerouting,
        -90,
        [Rule::new()
            .iifname(&bridge.name)
            .then(translated)
            .set_mark(STRAIGHT_MARK, STRAIGHT_MARK)],
    )];
    let unmarked = Statement::MarkBits {
        mask: STRAIGHT_MARK,
        negate: true,
    };
    let mut frames = Table::new(Family::Bridge, &name);
    frames.chains = vec![Chain::base(
        "apart",
        ChainKind::Filter,
        HookPoint::Forward,
        0,
        [Rule::new()
            .is(Field::Iifgroup, Datum::Integer(bridge.rule().table))
            .then(unmarked)
            .drop()],
    )];
    [packets, frames]
}

/// An address as the pod gets it, and its gateway: what IPAM says, else the first address of its subnet. An IPv6 address
/// stands alone: nothing answers neighbour discovery for a whole subnet as proxy ARP does, so pods send everything to the
/// gateway, each other's packets too.
fn placed(leased: &Leased) -> Result<(IpNet, IpAddr), KernelError> {
    let net = leased.net;
    let first = || net.hosts().find(|h| *h != net.network());
    let gateway = leased
        .gateway
        .filter(|g| g.is_ipv4() == net.addr().is_ipv4())
        .or_else(first)
        .ok_or(KernelError::NoGateway { address: net })?;
    Ok((if net.addr().is_ipv4() { net } else { alone(net) }, gateway))
}

/// Makes the attachment. A host link left by a dead ADD of the same attachment is replaced.
///
/// # Errors
/// The caller rolls back with [`crate::links::detach`]; the bridge stays.
pub fn attach(ends: &mut Ends, prepared: Prepared, plan: &Plan, bridge: &Bridge) -> Result<Attached, KernelError> {
    let name = plan.owner.key.link_name();
    let addresses: Vec<(IpNet, IpAddr)> = plan.addresses.iter().map(placed).collect::<Result<_, _>>()?;
    if let Some(address) = plan.ips().find(|a| a.is_ipv6() && bridge.tunnel) {
        return Err(KernelError::NoIpv6InTunnel { address });
    }
    let at = ensure(&mut ends.host, bridge, plan)?;

    let pod_mac = plan.owner.key.mac();
    let bridge_mac = mac(&bridge.name);
    let mut create = Request::create_veth(&Veth {
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
    })
    .on_bridge(at);
    if bridge.tunnel {
        // By this the rule for frames knows its ports.
        create = create.in_group(bridge.rule().table);
    }
    let (port, inner) = ends.make(&create, &name, plan)?;
    steps::reached("veth-made");

    prepare_v6(ends, plan)?;
    let mut inside = prepared.requests();
    inside.push(Request::set_up(inner, true));
    for (address, gateway) in &addresses {
        inside.push(Request::add_address(&Address {
            link: inner,
            address: *address,
            no_prefix_route: false,
        }));
        inside.push(Request::add_neighbour(&permanent(inner, *gateway, bridge_mac)));
        inside.push(Request::add_route(&RouteEntry::via_gateway(
            default_route(address.addr().is_ipv4()),
            inner,
            *gateway,
        )));
    }
    ends.pod
        .run_all(&inside)
        .map_err(doing(format!("configuring {} in the pod", plan.ifname)))?;
    steps::reached("pod-configured");

    let mut outside = vec![Request::change_link(port).alias(&plan.owner.alias()).bridge_port(PORT)];
    outside.extend(plan.ips().map(|a| Request::add_neighbour(&permanent(at, a, pod_mac))));
    ends.host
        .run_all(&outside)
        .map_err(doing(format!("telling {} of the pod", bridge.name)))?;
    steps::reached("neighbour-set");
    // Only after the neighbours: what is to be removed is found by them.
    let routes: Vec<Request> = plan
        .ips()
        .map(|a| Request::add_route(&RouteEntry::via_link(IpNet::from(a), at)))
        .collect();
    ends.host.run_all(&routes).map_err(doing("making the pod's route"))?;
    steps::reached("routed");
    // The bridge itself comes up with its first port.
    ends.settle(plan, inner, &[port, at])?;

    Ok(Attached {
        bridge: Some((bridge.name.clone(), netlink::format_mac(bridge_mac))),
        host_link: name,
        host_mac: netlink::format_mac(HOST_MAC),
        pod_mac: netlink::format_mac(pod_mac),
        addresses,
    })
}

/// Why Services with endpoints on the same node would not work in bridge mode; `None` if they do.
pub fn netfilter_missing() -> Option<String> {
    match sysctl::get(BRIDGE_NETFILTER) {
        Ok(v) if v == "1" => None,
        Ok(v) => Some(format!("{} is {v}", BRIDGE_NETFILTER.replace('/', "."))),
        Err(_) => Some("the kernel has no br_netfilter loaded".to_owned()),
    }
}

/// Removes what bridges made here still know of pods that are gone; `alive` holds the MACs of those that are not. A bridge
/// without ports goes too, and with it its rule and table.
pub fn sweep(alive: &BTreeSet<Mac>) -> Result<(), KernelError> {
    let mut host = Route::open().map_err(doing("opening the host's namespace"))?;
    let links = host.links().map_err(doing("listing links"))?;
    let bridges: Vec<&Link> = links.iter().filter(|l| is_ours(l)).collect();
    let on_bridge = |index: u32| bridges.iter().any(|b| b.index == index);
    let neighbours = host.neighbours().map_err(doing("listing neighbours"))?;
    let (kept, stale): (Vec<Neighbour>, Vec<Neighbour>) = neighbours
        .into_iter()
        .filter(|n| n.permanent && !n.proxy && on_bridge(n.link))
        .partition(|n| n.mac.is_some_and(|m| alive.contains(&m)));
    forget(&mut host, &stale)?;

    let routes = host.routes().map_err(doing("listing routes"))?;
    let rules = host.rules().map_err(doing("listing policy rules"))?;
    let ours = |table: u32| (TABLE_FIRST..=TABLE_LAST).contains(&table);
    let (in_use, empty): (Vec<&Link>, Vec<&Link>) = bridges
        .iter()
        .partition(|b| links.iter().any(|l| l.master == Some(b.index)));
    let wanted: Vec<RoutingRule> = in_use
        .iter()
        .map(|b| Bridge {
            name: b.name.clone(),
            tunnel: true,
        })
        .map(|b| b.rule())
        .collect();
    // Only after a tunnel: asking the packet filter would load it on machines that never use it.
    if rules.iter().any(|r| ours(r.table)) || routes.iter().any(|r| ours(r.table)) {
        let mut nft = Nft::open().map_err(filter("opening the packet filter"))?;
        for (family, name) in nft.tables().map_err(filter("listing tables"))? {
            let bridge = name.strip_prefix(TABLE_PREFIX);
            if bridge.is_some_and(|b| in_use.iter().all(|l| l.name != b)) {
                let family = if family == Family::Bridge as u8 {
                    Family::Bridge
                } else {
                    Family::Ip
                };
                nft.delete_table(family, &name)
                    .map_err(filter(format!("deleting table {name}")))?;
            }
        }
    }
    steps::reached("exception-gone");
    let mut requests: Vec<Request> = rules
        .iter()
        .filter(|r| ours(r.table) && !wanted.contains(r))
        .map(Request::delete_rule)
        .collect();
    requests.extend(
        routes
            .iter()
            .filter(|r| {
                let orphaned_table = ours(r.table) && wanted.iter().all(|w| w.table != r.table);
                let host_route = r.destination == alone(r.destination);
                let to_pod = r.table == MAIN_TABLE && host_route && r.link.is_some_and(on_bridge);
                orphaned_table || (to_pod && kept.iter().all(|n| IpNet::from(n.address) != r.destination))
            })
            .map(Request::delete_route),
    );
    host.run_all(&requests)
        .map_err(doing("deleting rules and routes without pods"))?;
    steps::reached("tunnel-gone");
    let requests: Vec<Request> = empty.iter().map(|b| Request::delete_link(b.index)).collect();
    host.run_all(&requests)
        .map_err(doing("deleting bridges without pods"))?;
    steps::reached("bridge-deleted");
    Ok(())
}

/// Compares the kernel with what [`attach`] would make; the first difference is the error.
pub fn check(
    ends: &mut Ends,
    owner: &Owner,
    ifname: &str,
    addresses: &[IpAddr],
    bridge: &Bridge,
) -> Result<(), KernelError> {
    let name = owner.key.link_name();
    let reading = || "reading the kernel's tables".to_owned();
    let Ends { host, pod, .. } = ends;
    let found = |route: &mut Route, what: &str, link: &str| {
        let link = route.link(link).map_err(doing(reading()))?;
        let link = link.ok_or_else(|| differs(what, "a link", "nothing"))?;
        if link.up {
            Ok(link)
        } else {
            Err(differs(format!("state of {}", link.name), "up", "down"))
        }
    };
    let device = found(host, &format!("bridge {}", bridge.name), &bridge.name)?;
    let outer = found(host, &format!("host link {name}"), &name)?;
    let inner = found(pod, &format!("pod link {ifname}"), ifname)?;
    for (link, mac) in [
        (&device, mac(&bridge.name)),
        (&outer, HOST_MAC),
        (&inner, owner.key.mac()),
    ] {
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
    if outer.master != Some(device.index) || outer.port != Some(PORT) {
        let found = format!("port {:?} of link {:?}", outer.port, outer.master);
        return Err(differs(format!("bridge of {name}"), &bridge.name, found));
    }
    let alias = outer.alias.clone().unwrap_or_default();
    if Owner::parse(&alias).is_none_or(|o| o.key != owner.key) {
        return Err(differs(format!("owner of {name}"), owner.alias(), alias));
    }
    let host_routes = host.routes().map_err(doing(reading()))?;
    let host_neighbours = host.neighbours().map_err(doing(reading()))?;
    let pod_addresses = pod.addresses().map_err(doing(reading()))?;
    for address in addresses.iter().copied() {
        if !pod_addresses
            .iter()
            .any(|a| a.link == inner.index && a.address.addr() == address)
        {
            return Err(differs(format!("address of {ifname}"), address, "none such"));
        }
        let net = IpNet::from(address);
        if !host_routes
            .iter()
            .any(|r| r.destination == net && r.link == Some(device.index) && r.table == MAIN_TABLE)
        {
            let expected = format!("{net} dev {}", bridge.name);
            return Err(differs("route on the host", expected, "none such"));
        }
        if !host_neighbours.contains(&permanent(device.index, address, owner.key.mac())) {
            return Err(differs("neighbour on the host", address, "none such"));
        }
    }
    if bridge.tunnel {
        let rule = bridge.rule();
        if !host.rules().map_err(doing(reading()))?.contains(&rule) {
            return Err(differs("policy rule", &rule, "none such"));
        }
        if !host_routes.iter().any(|r| r.table == rule.table) {
            return Err(differs("route to the fabric", format!("table {}", rule.table), "none"));
        }
    }
    let pod_routes = pod.routes().map_err(doing(reading()))?;
    for v4 in addresses.iter().map(IpAddr::is_ipv4) {
        if !pod_routes
            .iter()
            .any(|r| r.destination == default_route(v4) && r.gateway.is_some() && r.link == Some(inner.index))
        {
            let expected = format!("a default route by {ifname} to {}", default_route(v4));
            return Err(differs("route in the pod", expected, "none such"));
        }
    }
    Ok(())
}

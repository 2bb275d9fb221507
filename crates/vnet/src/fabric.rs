//! The data plane of one instance on this host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use linux::netlink::{Request, Route, RouteKind, Veth, VethPeer};
use linux::netns::{self, NetNs};
use linux::nft::{Counter, Family};
use linux::sysctl;
use parking_lot::Mutex;
use vnet_model::Mac;
use vnet_model::fabric::{FabricSpec, Uplink, VnetSpec, check_instance};
use vnet_model::rules::overlap;

use crate::attach::{self, NetnsRef, Port};
use crate::converge::{Handles, Scope, converge};
use crate::names::{
    EDGE_LINK, EDGE_TABLE, HOST_LINK, LINK_GROUP, VNET_TABLE, edge_pin, host_link, is_nic_link, is_vnet_link, nic_link,
    pins, vnet_link, vnet_of_pin, vnet_pin,
};
use crate::plan::{
    NamespacePlan, Transit, assign_slots, edge_side_mac, host_link_macs, plan_edge, plan_host, plan_vnet, vnet_side_mac,
};
use crate::serve::Servers;
use crate::teardown::{restore_note, restore_of};
use crate::{Error, dial, teardown};

/// One instance's data plane. Calls block for about a millisecond per change; they may come from any thread.
pub struct Fabric {
    instance: String,
    run_dir: PathBuf,
    state: Mutex<State>,
}

struct State {
    host: Handles,
    host_plan: Option<NamespacePlan>,
    edge: Option<Space>,
    vnets: BTreeMap<String, Space>,
    /// As applied last; attach and dial look here.
    spec: FabricSpec,
    servers: Servers,
}

/// A namespace of ours, and what it was brought to.
struct Space {
    handles: Handles,
    plan: Option<NamespacePlan>,
}

/// What an apply did.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Report {
    /// Requests sent and tables changed; 0 if everything was as planned.
    pub changes: usize,
    pub vnets: usize,
    /// NICs that are plugged in.
    pub attached: usize,
    /// Link by which outward traffic leaves; absent also if the spec leaves the choice to a host without a default route.
    pub uplink: Option<String>,
}

impl Fabric {
    /// Opens the data plane of `instance` in the calling thread's network namespace, which is the host from now on.
    /// Pins live in `<run_dir>/netns`. Nothing is changed yet; what an earlier process made is found again at the first
    /// apply.
    pub fn open(instance: &str, run_dir: impl Into<PathBuf>) -> Result<Self, Error> {
        check_instance(instance).map_err(Error::Spec)?;
        let state = State {
            host: Handles::open(NetNs::current()?)?,
            host_plan: None,
            edge: None,
            vnets: BTreeMap::new(),
            spec: FabricSpec::default(),
            servers: Servers::default(),
        };
        Ok(Self {
            instance: instance.to_owned(),
            run_dir: run_dir.into(),
            state: Mutex::new(state),
        })
    }

    /// Makes the host's data plane what `spec` says and touches only what changed. A second call changes nothing.
    ///
    /// # Errors
    /// A spec that breaks a rule, or whose ranges the host already routes, is refused before anything is changed.
    pub fn apply(&self, spec: &FabricSpec) -> Result<Report, Error> {
        spec.check().map_err(Error::Spec)?;
        let mut state = self.state.lock();
        let state = &mut *state;
        let uplink = state.check_host(&self.instance, spec)?;
        let transit = Transit::of(&spec.edge);
        let mut report = Report {
            vnets: spec.vnets.len(),
            uplink: uplink.clone(),
            ..Report::default()
        };

        state.drop_missing(spec, &self.run_dir)?;
        for vnet in &spec.vnets {
            if !state.vnets.contains_key(&vnet.key) {
                let ns = netns::create_named(&vnet_pin(&self.run_dir, &vnet.key))?;
                state.vnets.insert(
                    vnet.key.clone(),
                    Space {
                        handles: Handles::open(ns)?,
                        plan: None,
                    },
                );
            }
        }
        if state.edge.is_none() {
            let ns = netns::create_named(&edge_pin(&self.run_dir))?;
            state.edge = Some(Space {
                handles: Handles::open(ns)?,
                plan: None,
            });
        }
        let slots = state.slots(spec, transit)?;
        let State {
            host,
            host_plan,
            edge,
            vnets,
            spec: last,
            ..
        } = state;
        let last: BTreeMap<&str, &VnetSpec> = last.vnets.iter().map(|v| (v.key.as_str(), v)).collect();
        let Some(edge) = edge else {
            return Err(Error::UnknownVnet { key: "edge".to_owned() });
        };

        let joined = join_host(&mut host.route, &edge.handles.ns, &self.instance)?;
        if joined > 0 {
            // What hung on the old link is gone, whatever was applied before.
            (*host_plan, edge.plan) = (None, None);
        }
        report.changes += joined;
        report.changes += remember_uplink(host, &self.instance, uplink.as_deref())?;
        for vnet in &spec.vnets {
            let (Some(space), Some(slot)) = (vnets.get_mut(&vnet.key), slots.get(&vnet.key)) else {
                continue;
            };
            let joined = join_vnet(&mut edge.handles.route, &mut space.handles, &vnet.key)?;
            if joined > 0 {
                (space.plan, edge.plan) = (None, None);
            }
            report.changes += joined;
            report.changes += unplug_strangers(&mut space.handles, last.get(vnet.key.as_str()).copied(), vnet)?;
            report.changes += space.bring_to(plan_vnet(vnet, &spec.edge, *slot), Scope::All)?;
        }
        report.changes += part_strangers(&mut edge.handles, spec)?;
        report.changes += edge.bring_to(plan_edge(spec, &slots, uplink.is_some()), Scope::All)?;
        let plan = plan_host(spec, uplink.as_deref());
        if host_plan.as_ref() != Some(&plan) {
            let link = host_link(&self.instance);
            let known = host_plan.as_ref().map(|p| p.tables.as_slice());
            report.changes += converge(host, &plan, Scope::Link(&link), known)?;
            *host_plan = Some(plan);
        }
        state.spec = spec.clone();
        state.serve_all();
        report.attached = state.attached()?.len();
        Ok(report)
    }

    /// Forgets what was applied, so that the next apply compares everything with the kernel.
    pub fn distrust(&self) {
        let mut state = self.state.lock();
        state.host_plan = None;
        let State { edge, vnets, .. } = &mut *state;
        edge.iter_mut().chain(vnets.values_mut()).for_each(|s| s.plan = None);
    }

    /// Plugs an applied NIC into a namespace as `ifname`, with its primary address and a default route. Plugging it
    /// again into the same place changes nothing; into another place moves it.
    pub fn attach(&self, nic: &str, target: &NetnsRef, ifname: &str) -> Result<(), Error> {
        let target = target.open()?;
        let mut state = self.state.lock();
        let State { vnets, spec, .. } = &mut *state;
        let unknown = || Error::UnknownNic { key: nic.to_owned() };
        let (vnet, nic) = find_nic(spec, nic).ok_or_else(unknown)?;
        let subnet = vnet.subnet(&nic.subnet).ok_or_else(unknown)?.prefix;
        let space = vnets.get_mut(&vnet.key).ok_or_else(unknown)?;
        attach::plug(&mut space.handles.route, &Port { nic, subnet }, &target, ifname)?;
        let link = nic_link(&nic.key);
        space.route_nic(&link)
    }

    /// Unplugs a NIC; success if it is not plugged or not known.
    pub fn detach(&self, nic: &str) -> Result<(), Error> {
        let mut state = self.state.lock();
        let State { vnets, spec, .. } = &mut *state;
        let Some((vnet, nic)) = find_nic(spec, nic) else {
            return Ok(());
        };
        let Some(space) = vnets.get_mut(&vnet.key) else {
            return Ok(());
        };
        let port = nic_link(&nic.key);
        space
            .handles
            .delete_ports(|name| name == port, &nic.addresses().collect())
            .map(drop)
    }

    /// Keys of the NICs that are plugged in.
    pub fn attached(&self) -> Result<Vec<String>, Error> {
        self.state.lock().attached()
    }

    /// Pin of a virtual network's namespace; it is there once the network was applied.
    pub fn vnet_netns(&self, vnet: &str) -> PathBuf {
        vnet_pin(&self.run_dir, vnet)
    }

    /// Pin of the edge's namespace; endpoints of the public pool are listened on there.
    pub fn edge_netns(&self) -> PathBuf {
        edge_pin(&self.run_dir)
    }

    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Connects from 168.63.129.16 inside a virtual network, waiting at most `timeout`. The stream blocks.
    pub fn dial(&self, vnet: &str, to: SocketAddr, timeout: Duration) -> Result<TcpStream, Error> {
        let fail = |source| Error::Dial {
            vnet: vnet.to_owned(),
            address: to,
            source,
        };
        let stream = dial::start(&self.open_vnet(vnet)?, to).map_err(fail)?;
        dial::finish(&stream, timeout).map_err(fail)?;
        Ok(stream)
    }

    /// Connects from 168.63.129.16 inside a virtual network. Must run in a tokio runtime.
    ///
    /// # Cancel safety
    /// Dropping the future closes the socket.
    pub async fn dial_async(&self, vnet: &str, to: SocketAddr) -> Result<tokio::net::TcpStream, Error> {
        let fail = |source| Error::Dial {
            vnet: vnet.to_owned(),
            address: to,
            source,
        };
        let stream = dial::start(&self.open_vnet(vnet)?, to).map_err(fail)?;
        let stream = tokio::net::TcpStream::from_std(stream).map_err(fail)?;
        stream.writable().await.map_err(fail)?;
        match stream.take_error().map_err(fail)? {
            Some(e) => Err(fail(e)),
            None => Ok(stream),
        }
    }

    /// Listens inside a namespace; the socket is used from anywhere.
    pub fn listen_in(&self, netns: &Path, address: SocketAddr) -> Result<TcpListener, Error> {
        let fail = |source| Error::Listen {
            netns: netns.to_owned(),
            address,
            source,
        };
        dial::listen(&netns::open(netns)?, address).map_err(fail)
    }

    /// Opens the wire server and DNS in every virtual network, now and whenever one is added; tasks run on `runtime`.
    pub fn serve(&self, runtime: &tokio::runtime::Handle) {
        let mut state = self.state.lock();
        state.servers.run_on(runtime.clone());
        state.serve_all();
    }

    /// Counters of the rules that drop, by virtual network (`edge` is the edge's).
    pub fn drops(&self) -> Result<Vec<(String, Counter)>, Error> {
        let mut state = self.state.lock();
        let mut out = Vec::new();
        for (key, space) in &mut state.vnets {
            let counters = space.handles.nft.counters(Family::Ip, VNET_TABLE)?;
            out.extend(counters.into_iter().map(|c| (key.clone(), c)));
        }
        if let Some(edge) = &mut state.edge {
            let counters = edge.handles.nft.counters(Family::Ip, EDGE_TABLE)?;
            out.extend(counters.into_iter().map(|c| ("edge".to_owned(), c)));
        }
        Ok(out)
    }

    fn open_vnet(&self, vnet: &str) -> Result<NetNs, Error> {
        let pin = vnet_pin(&self.run_dir, vnet);
        if !pin.exists() {
            return Err(Error::UnknownVnet { key: vnet.to_owned() });
        }
        Ok(netns::open(&pin)?)
    }
}

impl State {
    /// Refuses ranges that the host routes elsewhere; returns the uplink's name.
    fn check_host(&mut self, instance: &str, spec: &FabricSpec) -> Result<Option<String>, Error> {
        let links = self.host.route.links()?;
        let name = |index: Option<u32>| {
            let link = links.iter().find(|l| Some(l.index) == index);
            link.map_or_else(|| "none".to_owned(), |l| l.name.clone())
        };
        let routes = self.host.route.routes()?;
        let own = host_link(instance);
        for route in &routes {
            let IpNet::V4(destination) = route.destination else {
                continue;
            };
            if destination.prefix_len() == 0 || name(route.link) == own {
                continue;
            }
            if let Some(wanted) = [spec.edge.pool, spec.edge.transit]
                .into_iter()
                .find(|w| overlap(*w, destination))
            {
                let link = name(route.link);
                return Err(Error::RouteTaken {
                    wanted: wanted.into(),
                    route: route.destination,
                    link,
                });
            }
        }
        match &spec.edge.uplink {
            Uplink::None => Ok(None),
            Uplink::Link(link) if links.iter().any(|l| l.name == *link) => Ok(Some(link.clone())),
            Uplink::Link(link) => Err(Error::NoUplink { name: link.clone() }),
            Uplink::Auto => {
                let default = |r: &&linux::netlink::RouteEntry| {
                    r.destination == IpNet::V4(Ipv4Net::default()) && r.kind == RouteKind::Unicast && r.link.is_some()
                };
                // Offline is no error: everything here works without the outside.
                let best = routes.iter().filter(default).min_by_key(|r| r.metric);
                Ok(best.map(|r| name(r.link)))
            }
        }
    }

    /// Removes virtual networks that the spec no longer has, those of an earlier process too.
    fn drop_missing(&mut self, spec: &FabricSpec, run_dir: &Path) -> Result<(), Error> {
        let wanted = |key: &str| spec.vnets.iter().any(|v| v.key == key);
        self.vnets.retain(|key, _| wanted(key));
        self.servers.retain(wanted);
        let Ok(entries) = std::fs::read_dir(pins(run_dir)) else {
            return Ok(());
        };
        for pin in entries.flatten() {
            let name = pin.file_name().to_string_lossy().into_owned();
            if vnet_of_pin(&name).is_some_and(|key| !wanted(key)) {
                teardown::namespace(&pin.path())?;
            }
        }
        Ok(())
    }

    /// Transit slots; a virtual network of an earlier process keeps the one its link has.
    fn slots(&mut self, spec: &FabricSpec, transit: Transit) -> Result<BTreeMap<String, u32>, Error> {
        let mut held = BTreeMap::new();
        for (key, space) in &mut self.vnets {
            if let Some(slot) = space.slot(transit)? {
                held.insert(key.clone(), slot);
            }
        }
        assign_slots(spec.vnets.iter().map(|v| v.key.as_str()), &held, transit.slots()).ok_or(Error::TooManyVnets {
            count: spec.vnets.len(),
        })
    }

    fn attached(&mut self) -> Result<Vec<String>, Error> {
        let mut out = Vec::new();
        for vnet in &self.spec.vnets {
            let Some(space) = self.vnets.get_mut(&vnet.key) else {
                continue;
            };
            let links: Vec<String> = space.handles.route.links()?.into_iter().map(|l| l.name).collect();
            out.extend(
                vnet.nics
                    .iter()
                    .filter(|n| links.contains(&nic_link(&n.key)))
                    .map(|n| n.key.clone()),
            );
        }
        Ok(out)
    }

    fn serve_all(&mut self) {
        let resolvers: Arc<[IpAddr]> = self.spec.edge.resolvers.clone().into();
        for vnet in &self.spec.vnets {
            if let Some(space) = self.vnets.get(&vnet.key) {
                self.servers.serve(vnet, &space.handles.ns, &resolvers);
            }
        }
    }
}

impl Space {
    fn bring_to(&mut self, plan: NamespacePlan, scope: Scope<'_>) -> Result<usize, Error> {
        if self.plan.as_ref() == Some(&plan) {
            return Ok(0);
        }
        let known = self.plan.take();
        let changes = converge(
            &mut self.handles,
            &plan,
            scope,
            known.as_ref().map(|p| p.tables.as_slice()),
        )?;
        self.plan = Some(plan);
        Ok(changes)
    }

    /// Sets routes and neighbours of a port that was just plugged in.
    fn route_nic(&mut self, link: &str) -> Result<(), Error> {
        let Some(plan) = &self.plan else { return Ok(()) };
        let index = self.handles.route.need_link(link)?.index;
        let routes = plan.routes.iter().filter(|r| r.link.as_deref() == Some(link));
        let neighbours = plan.neighbours.iter().filter(|n| n.link == link);
        let requests: Vec<Request> = routes
            .map(|r| Request::add_route(&linux::netlink::RouteEntry::via_link(r.destination, index)))
            .chain(neighbours.map(|n| {
                let (address, mac) = (n.address, Some(n.mac.0));
                let neighbour = linux::netlink::Neighbour {
                    link: index,
                    address,
                    mac,
                    proxy: false,
                    permanent: true,
                };
                Request::add_neighbour(&neighbour)
            }))
            .collect();
        Ok(self.handles.route.run_all(&requests)?)
    }

    fn slot(&mut self, transit: Transit) -> Result<Option<u32>, Error> {
        let planned = self.plan.as_ref().and_then(|p| {
            p.addresses
                .iter()
                .filter(|a| a.link == EDGE_LINK)
                .find_map(|a| slot_of(transit, a.address))
        });
        if planned.is_some() {
            return Ok(planned);
        }
        let Some(link) = self.handles.route.link(EDGE_LINK)? else {
            return Ok(None);
        };
        let addresses = self.handles.route.addresses()?;
        Ok(addresses
            .into_iter()
            .filter(|a| a.link == link.index)
            .find_map(|a| slot_of(transit, a.address)))
    }
}

fn slot_of(transit: Transit, address: IpNet) -> Option<u32> {
    match address.addr() {
        IpAddr::V4(a) => transit.slot_of(a),
        IpAddr::V6(_) => None,
    }
}

fn find_nic<'a>(spec: &'a FabricSpec, key: &str) -> Option<(&'a VnetSpec, &'a vnet_model::fabric::NicSpec)> {
    spec.vnets
        .iter()
        .find_map(|v| Some((v, v.nics.iter().find(|n| n.key == key)?)))
}

/// A veth between two namespaces of ours, made whole again if one end is missing; returns the number of changes.
fn join(
    near: &mut Route,
    near_end: (&str, Mac),
    far_ns: &NetNs,
    far: &mut Route,
    far_end: (&str, Mac),
) -> Result<usize, Error> {
    let (a, b) = (near.link(near_end.0)?, far.link(far_end.0)?);
    if let (Some(a), Some(b)) = (&a, &b)
        && a.peer_index == Some(b.index)
        && a.up
        && b.up
    {
        return Ok(0);
    }
    let mut changes = 2;
    if let Some(stale) = a {
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
    Ok(changes)
}

fn join_host(host: &mut Route, edge: &NetNs, instance: &str) -> Result<usize, Error> {
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

fn join_vnet(edge: &mut Route, vnet: &mut Handles, key: &str) -> Result<usize, Error> {
    let near = (vnet_link(key), edge_side_mac(key));
    join(
        edge,
        (&near.0, near.1),
        &vnet.ns,
        &mut vnet.route,
        (EDGE_LINK, vnet_side_mac(key)),
    )
}

/// Removes ports of NICs that the spec no longer has; `last` is the network as applied before.
fn unplug_strangers(handles: &mut Handles, last: Option<&VnetSpec>, vnet: &VnetSpec) -> Result<usize, Error> {
    let known: BTreeSet<String> = vnet.nics.iter().map(|n| nic_link(&n.key)).collect();
    let held: BTreeSet<Ipv4Addr> = last
        .into_iter()
        .flat_map(|v| &v.nics)
        .flat_map(|n| n.addresses())
        .collect();
    let kept: BTreeSet<Ipv4Addr> = vnet.nics.iter().flat_map(|n| n.addresses()).collect();
    let released = held.difference(&kept).copied().collect();
    handles.delete_ports(|name| is_nic_link(name) && !known.contains(name), &released)
}

/// Removes the edge's links to virtual networks that the spec no longer has.
fn part_strangers(edge: &mut Handles, spec: &FabricSpec) -> Result<usize, Error> {
    let known: BTreeSet<String> = spec.vnets.iter().map(|v| vnet_link(&v.key)).collect();
    edge.delete_ports(|name| is_vnet_link(name) && !known.contains(name), &BTreeSet::new())
}

/// Switches forwarding on for the uplink alone and notes its former value in the host link's alias; puts it back when
/// the uplink goes.
fn remember_uplink(host: &mut Handles, instance: &str, uplink: Option<&str>) -> Result<usize, Error> {
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

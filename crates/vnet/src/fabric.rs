//! The data plane of one instance on this host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use linux::netlink::{RouteEntry, RouteKind};
use linux::netns::{self, NetNs};
use linux::nft::Counter;
use parking_lot::Mutex;
use vnet_model::fabric::{FabricSpec, NicSpec, Uplink, VnetSpec, check_instance};
use vnet_model::rules::overlap;

use crate::attach::{self, MTU, NetnsRef, Port};
use crate::converge::{Handles, Scope, converge, on_link, set_sysctls};
use crate::join::{
    join_host, join_hosts, join_peers, join_vnet, part_peers, part_strangers, remember_uplink, unplug_strangers,
};
use crate::names::{EDGE_LINK, edge_pin, host_link, nic_link, pins, vnet_of_pin, vnet_pin};
use crate::plan::{
    NamespacePlan, Transit, assign_slots, ended_addresses, ended_ways, plan_edge, plan_host, plan_vnet, sites_here,
    vnet_sysctls, vxlans,
};
use crate::probe::{Health, Probes};
use crate::serve::Servers;
use crate::sites::{Tunnels, join_sites};
use crate::tunnel::TunnelKeys;
use crate::{Error, dial, drops, teardown};

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
    tunnels: Tunnels,
    probes: Probes,
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
            tunnels: Tunnels::default(),
            probes: Probes::default(),
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
    /// A spec that breaks a rule, or whose ranges the host already routes, is refused before anything is changed. If one
    /// virtual network fails later, the others are brought to their plans all the same.
    pub fn apply(&self, spec: &FabricSpec) -> Result<Report, Error> {
        spec.check().map_err(Error::Spec)?;
        let mut state = self.state.lock();
        let state = &mut *state;
        state.probes.follow(spec, |key| vnet_pin(&self.run_dir, key));
        let spec = &*state.probes.healthy(spec);
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
                let handles = Handles::open(ns)?;
                // Links take what is set when they come.
                set_sysctls(&handles, &vnet_sysctls())?;
                state.vnets.insert(vnet.key.clone(), Space { handles, plan: None });
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
        let devices = join_hosts(&mut host.route, &mut edge.handles, vxlans(spec, None).as_ref())?;
        if devices > 0 {
            edge.plan = None;
        }
        report.changes += devices;
        report.changes += remember_uplink(host, &self.instance, uplink.as_deref())?;
        report.changes += join_all_peers(vnets, &last, spec)?;
        let mut failed = None;
        for vnet in &spec.vnets {
            let (Some(space), Some(slot)) = (vnets.get_mut(&vnet.key), slots.get(&vnet.key)) else {
                continue;
            };
            let plan = plan_vnet(vnet, spec, *slot);
            let last = last.get(vnet.key.as_str()).copied();
            let device = vxlans(spec, Some(vnet));
            let devices = join_hosts(&mut host.route, &mut space.handles, device.as_ref());
            let sites = join_sites(&mut host.route, &host.ns, &mut space.handles, vnet);
            let devices = devices.and_then(|d| Ok(d + sites?));
            let applied = devices.and_then(|devices| {
                if devices > 0 {
                    space.plan = None;
                }
                Ok(devices + space.apply(vnet, last, plan, edge)?)
            });
            match applied {
                Ok(changes) => report.changes += changes,
                // The others shall not suffer from it.
                Err(source) => {
                    failed = failed.or(Some(Error::Vnet {
                        key: vnet.key.clone(),
                        source: Box::new(source),
                    }));
                }
            }
        }
        report.changes += part_strangers(&mut edge.handles, spec)?;
        report.changes += edge.bring_to(plan_edge(spec, &slots, uplink.is_some()))?;
        let plan = plan_host(spec, uplink.as_deref());
        if host_plan.as_ref() != Some(&plan) {
            let link = host_link(&self.instance);
            let known = host_plan.take();
            report.changes += converge(host, &plan, Scope::Link(&link), known.as_ref())?;
            *host_plan = Some(plan);
        }
        state.spec = spec.clone();
        state.serve_all();
        failed.map_or(Ok(report), Err)
    }

    /// Checks what [`Fabric::apply`] would refuse, and changes nothing. Returns the uplink's name.
    pub fn check(&self, spec: &FabricSpec) -> Result<Option<String>, Error> {
        spec.check().map_err(Error::Spec)?;
        self.state.lock().check_host(&self.instance, spec)
    }

    /// A transit range for this instance: the one that its link to the edge has already, else `preferred` or one near it that
    /// nothing else on the host uses, so that instances stand side by side.
    pub fn free_transit(&self, preferred: Ipv4Net) -> Result<Ipv4Net, Error> {
        self.state.lock().free_transit(&self.instance, preferred)
    }

    /// Forgets what was applied, so that the next apply compares everything with the kernel: call it now and then, since
    /// others may change rules and routes too.
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
        let mtu = match (&spec.underlay, vnet.vni) {
            (Some(underlay), Some(_)) => underlay.inner_mtu().min(MTU),
            _ => MTU,
        };
        let port = Port { nic, subnet, mtu };
        attach::plug(&mut space.handles.route, &port, &target, ifname)?;
        space.route_nic(nic)
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
        space.handles.delete_links(&[port])?;
        space.handles.forget(&nic.addresses().collect())
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

    /// Lets the metadata service give out tokens; call it before [`Fabric::serve`].
    pub fn issue_tokens(&self, source: Arc<dyn crate::TokenSource>) {
        self.state.lock().servers.issue_tokens(source);
    }

    /// Keys of the tunnels to sites, by site; tunnels run once [`Fabric::serve`] was called. Replaces all that were given before.
    pub fn set_tunnel_keys(&self, keys: BTreeMap<String, TunnelKeys>) {
        let mut state = self.state.lock();
        state.tunnels.set_keys(keys);
        state.serve_all();
    }

    /// Opens the wire server and DNS in every virtual network, now and whenever one is added, and probes load balancers'
    /// backends from the next apply on; tasks run on `runtime`.
    pub fn serve(&self, runtime: &tokio::runtime::Handle) {
        let mut state = self.state.lock();
        state.servers.run_on(runtime.clone());
        state.probes.run_on(runtime.clone());
        state.serve_all();
    }

    /// Returns after a load balancer's backend went down or came back: apply the spec again then.
    ///
    /// # Cancel safety
    /// A change that nobody waited for is told to the next caller.
    pub async fn health_changed(&self) {
        let changed = self.state.lock().probes.changed();
        changed.notified().await;
    }

    /// What the probes of load balancers found last; empty while they do not run.
    pub fn health(&self) -> Vec<Health> {
        self.state.lock().probes.health()
    }

    /// Counters of the rules that drop, by virtual network (`edge` is the edge's, `host` the host's).
    pub fn drops(&self) -> Result<Vec<(String, Counter)>, Error> {
        let mut state = self.state.lock();
        let mut out = Vec::new();
        let mut add = |name: &str, counters: Vec<Counter>| {
            out.extend(counters.into_iter().map(|c| (name.to_owned(), c)));
        };
        for (key, space) in &mut state.vnets {
            add(key, drops::of_vnet(&mut space.handles.nft)?);
        }
        if state.host_plan.is_some() {
            add("host", drops::of_host(&mut state.host.nft, &self.instance)?);
        }
        if let Some(edge) = &mut state.edge {
            add("edge", drops::of_edge(&mut edge.handles.nft)?);
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
    /// See [`Fabric::free_transit`].
    fn free_transit(&mut self, instance: &str, preferred: Ipv4Net) -> Result<Ipv4Net, Error> {
        let links = self.host.route.links()?;
        let own = links.iter().find(|l| l.name == host_link(instance)).map(|l| l.index);
        let routes = self.host.route.routes()?;
        let (mut ours, mut others) = (Vec::new(), Vec::new());
        for route in &routes {
            match route.destination {
                IpNet::V4(d) if d.prefix_len() > 0 && own.is_some() && route.link == own => ours.push(d),
                IpNet::V4(d) if d.prefix_len() > 0 => others.push(d),
                _ => {}
            }
        }
        Ok(choose_transit(preferred, &ours, &others))
    }

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
                let default = |r: &&RouteEntry| {
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
                teardown::namespace(&pin.path(), &self.host.ns)?;
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
                vnet.nics_here()
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
        let here = |site: &str| {
            let mut all = self.spec.vnets.iter().flat_map(sites_here);
            all.any(|s| s.key == site)
        };
        self.tunnels.retain(here);
        if let Some(runtime) = self.servers.runtime() {
            for vnet in &self.spec.vnets {
                if let Some(space) = self.vnets.get(&vnet.key) {
                    self.tunnels.serve(vnet, &space.handles.ns, &self.host.ns, &runtime);
                }
            }
        }
    }
}

impl Space {
    fn bring_to(&mut self, plan: NamespacePlan) -> Result<usize, Error> {
        if self.plan.as_ref() == Some(&plan) {
            return Ok(0);
        }
        let known = self.plan.take();
        let changes = converge(&mut self.handles, &plan, Scope::All, known.as_ref())?;
        self.plan = Some(plan);
        Ok(changes)
    }

    /// Routes what the network has behind a port that was just plugged in: its addresses, and route tables' hops by it.
    fn route_nic(&mut self, nic: &NicSpec) -> Result<(), Error> {
        // Without a plan the next apply compares everything; until then the addresses are enough.
        let addresses = || {
            let mut plan = NamespacePlan::default();
            plan.port(nic);
            plan
        };
        let link = nic_link(&nic.key);
        let requests = match &self.plan {
            Some(plan) => on_link(&mut self.handles.route, plan, &link)?,
            None => on_link(&mut self.handles.route, &addresses(), &link)?,
        };
        Ok(self.handles.route.run_all(&requests)?)
    }

    /// Brings one virtual network to its plan: its link to the edge, its ports, its namespace.
    fn apply(
        &mut self,
        vnet: &VnetSpec,
        last: Option<&VnetSpec>,
        plan: NamespacePlan,
        edge: &mut Space,
    ) -> Result<usize, Error> {
        let joined = join_vnet(&mut edge.handles.route, &mut self.handles, &vnet.key)?;
        if joined > 0 {
            // What hung on the old link is gone, whatever was applied before.
            (self.plan, edge.plan) = (None, None);
        }
        let unplugged = unplug_strangers(&mut self.handles, last, vnet)?;
        let changes = joined + unplugged + self.bring_to(plan)?;
        // After the rules, so that none of them is made again meanwhile.
        if let Some(last) = last {
            self.handles.forget_translated(&ended_ways(last, vnet))?;
            self.handles.forget(&ended_addresses(last, vnet))?;
        }
        Ok(changes)
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
        slot_in(&mut self.handles, transit)
    }
}

/// The transit slot that a virtual network's namespace has, by its address.
pub fn slot_in(handles: &mut Handles, transit: Transit) -> Result<Option<u32>, Error> {
    let Some(link) = handles.route.link(EDGE_LINK)? else {
        return Ok(None);
    };
    let addresses = handles.route.addresses()?;
    Ok(addresses
        .into_iter()
        .filter(|a| a.link == link.index)
        .find_map(|a| slot_of(transit, a.address)))
}

/// Parts those that are no peers any more, then links those that are. A network whose last spec in this process named the
/// same peers is not looked at for strangers.
fn join_all_peers(
    vnets: &mut BTreeMap<String, Space>,
    last: &BTreeMap<&str, &VnetSpec>,
    spec: &FabricSpec,
) -> Result<usize, Error> {
    let fail = |key: &str| {
        let key = key.to_owned();
        |source| Error::Vnet {
            key,
            source: Box::new(source),
        }
    };
    let pairs = spec.peered();
    let mut changes = 0;
    for vnet in &spec.vnets {
        let Some(space) = vnets.get_mut(&vnet.key) else {
            continue;
        };
        let key = vnet.key.as_str();
        let peers: BTreeSet<&str> = pairs
            .iter()
            .filter(|(a, b)| *a == key || *b == key)
            .map(|(a, b)| if *a == key { *b } else { *a })
            .collect();
        let before = last
            .get(key)
            .map(|v| v.peers.iter().map(|p| p.vnet.as_str()).collect::<BTreeSet<_>>());
        if before.is_none_or(|b| !b.is_subset(&peers)) {
            changes += part_peers(&mut space.handles, &peers).map_err(fail(key))?;
        }
    }
    for (a, b) in pairs {
        // Both ends are changed, so one is taken out meanwhile.
        let Some(mut far) = vnets.remove(b) else { continue };
        let joined = match vnets.get_mut(a) {
            Some(near) => join_peers(&mut near.handles, a, &mut far.handles, b).inspect(|changes| {
                if *changes > 0 {
                    (near.plan, far.plan) = (None, None);
                }
            }),
            None => Ok(0),
        };
        vnets.insert(b.to_owned(), far);
        changes += joined.map_err(fail(a))?;
    }
    Ok(changes)
}

/// How many ranges [`choose_transit`] looks at.
const TRANSIT_CANDIDATES: u32 = 32;

/// The range that holds one of `ours`, else the first of `preferred` and the equally large ones below it that none of
/// `others` touches, else `preferred`.
fn choose_transit(preferred: Ipv4Net, ours: &[Ipv4Net], others: &[Ipv4Net]) -> Ipv4Net {
    let size = 1_u32.checked_shl(32 - u32::from(preferred.prefix_len())).unwrap_or(0);
    let candidates: Vec<Ipv4Net> = (0..TRANSIT_CANDIDATES)
        .filter_map(|n| u32::from(preferred.network()).checked_sub(n.saturating_mul(size)))
        .filter_map(|start| Ipv4Net::new(start.into(), preferred.prefix_len()).ok())
        .collect();
    let held = candidates.iter().find(|c| ours.iter().any(|o| c.contains(o)));
    let free = || candidates.iter().find(|c| !others.iter().any(|o| overlap(**c, *o)));
    held.or_else(free).copied().unwrap_or(preferred)
}

fn slot_of(transit: Transit, address: IpNet) -> Option<u32> {
    match address.addr() {
        IpAddr::V4(a) => transit.slot_of(a),
        IpAddr::V6(_) => None,
    }
}

fn find_nic<'a>(spec: &'a FabricSpec, key: &str) -> Option<(&'a VnetSpec, &'a NicSpec)> {
    spec.vnets
        .iter()
        .find_map(|v| Some((v, v.nics_here().find(|n| n.key == key)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_take_transit_ranges_side_by_side() {
        let net = |text: &str| text.parse::<Ipv4Net>().unwrap();
        let preferred = net("100.127.192.0/18");
        let other = [net("100.127.192.1/32"), net("10.0.0.0/8")];
        assert_eq!(choose_transit(preferred, &[], &other[1..]), preferred);
        assert_eq!(choose_transit(preferred, &[], &other), net("100.127.128.0/18"));
        // What an instance has it keeps, whatever else came meanwhile.
        assert_eq!(
            choose_transit(preferred, &[net("100.127.64.1/32")], &[]),
            net("100.127.64.0/18")
        );
        assert_eq!(choose_transit(preferred, &[], &[net("100.0.0.0/8")]), preferred);
    }
}

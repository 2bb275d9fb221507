//! Pure: home objects in, this host's [`FabricSpec`] out, with notes on what was left out and why.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use ipnet::{IpNet, Ipv4Net};
use resources::{
    Host, LoadBalancer, Machine, ManagedCluster, NatGateway, NetworkInterface, NetworkSecurityGroup, PrivateDnsZone,
    PublicIPAddress, PublicIPPrefix, RouteTable, Site, VirtualNetwork, VirtualNode, object_name,
    views::{NicAddresses, PeeringView, VnetView, lb_frontends, peerings, subnet_ref},
};
use vnet_model::{
    address::Mac,
    arm::{routes, security_rules},
    fabric::{
        BackendSpec, CLUSTER_MARK_MASK, ClusterServicesSpec, Distribution, DnsSpec, EdgeSpec, FabricSpec, FrontendSpec,
        IpConfigSpec, NextHop, NicKind, NicSpec, PeerSpec, Protocol, RouteSpec, RouteTableSpec, SecurityGroupSpec,
        SubnetSpec, VnetSpec,
    },
    nsg::deny_all,
    service_tags::ServiceTags,
};

/// A snapshot of the objects that decide the network.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub vnets: Vec<VirtualNetwork>,
    pub nics: Vec<NetworkInterface>,
    pub public_ips: Vec<PublicIPAddress>,
    pub load_balancers: Vec<LoadBalancer>,
    pub security_groups: Vec<NetworkSecurityGroup>,
    pub route_tables: Vec<RouteTable>,
    pub nat_gateways: Vec<NatGateway>,
    pub public_ip_prefixes: Vec<PublicIPPrefix>,
    pub machines: Vec<Machine>,
    pub hosts: Vec<Host>,
    pub sites: Vec<Site>,
    pub virtual_nodes: Vec<VirtualNode>,
    pub private_zones: Vec<PrivateDnsZone>,
    pub clusters: Vec<ManagedCluster>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub spec: FabricSpec,
    /// Why an object is not (wholly) in the spec, one sentence each, `kind name: reason`.
    pub notes: Vec<String>,
}

/// Marks and DNS ports of the clusters whose container groups stand in one virtual network, by cluster name. Stable as long
/// as no two names collide: both come from the name.
pub fn cluster_marks<'a>(clusters: impl IntoIterator<Item = &'a str>) -> BTreeMap<&'a str, (u32, u16)> {
    let names: BTreeSet<&str> = clusters.into_iter().collect();
    let mut taken = BTreeSet::new();
    names
        .into_iter()
        .map(|name| {
            // FNV-1a, folded to 14 bits: the DNS port below must fit beside it.
            let hash = name
                .bytes()
                .fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
            let mut mark = (hash ^ (hash >> 14)) & 0x3fff;
            while mark == 0 || !taken.insert(mark) {
                mark = (mark + 1) & 0x3fff;
            }
            debug_assert!(mark <= CLUSTER_MARK_MASK);
            (name, (mark, 30_000 + mark as u16))
        })
        .collect()
}

/// See the module.
pub fn plan(world: &World, instance: &str, edge: &EdgeSpec) -> Plan {
    let mut notes = Vec::new();
    let mut vnets: BTreeMap<String, VnetSpec> = BTreeMap::new();
    for vnet in &world.vnets {
        match vnet_spec(vnet) {
            Ok(spec) => {
                vnets.insert(spec.key.clone(), spec);
            }
            Err(reason) => notes.push(format!("VirtualNetwork {}: {reason}", vnet.name())),
        }
    }
    for (key, spec) in &mut vnets {
        let here: Vec<&VirtualNode> = world
            .virtual_nodes
            .iter()
            .filter(|v| v.spec.virtual_network == *key)
            .collect();
        let marks = cluster_marks(here.iter().map(|v| v.spec.bootstrap.cluster.as_str()));
        for (cluster, (mark, dns_port)) in marks {
            let dns = here
                .iter()
                .find(|v| v.spec.bootstrap.cluster == cluster)
                .and_then(|v| v.spec.bootstrap.dns_service_ip.parse().ok());
            match dns {
                Some(dns_service_ip) => {
                    spec.clusters.push(ClusterServicesSpec {
                        cluster: cluster.to_owned(),
                        mark,
                        dns_service_ip,
                        dns_port,
                    });
                }
                None => notes.push(format!("VirtualNode of {cluster}: its dnsServiceIP is no IPv4 address")),
            }
        }
    }
    let names: BTreeMap<&str, &str> = world
        .machines
        .iter()
        .map(|m| (m.spec.nic.as_str(), m.spec.node_name.as_str()))
        .collect();
    for nic in &world.nics {
        if let Err(reason) = add_nic(nic, names.get(nic.name()).copied(), &mut vnets) {
            notes.push(format!("NetworkInterface {}: {reason}", nic.name()));
        }
    }
    super::instances::add(&mut vnets, &world.machines, &world.nics, &world.clusters);
    super::zones::add(&mut vnets, &world.private_zones, &mut notes);
    add_peers(&world.vnets, &mut vnets, &mut notes);
    for vnet in vnets.values_mut() {
        super::application_groups::add(vnet, &world.nics);
        add_groups(vnet, &world.security_groups, &edge.service_tags, &mut notes);
        add_routes(vnet, &world.route_tables, &mut notes);
        if let Some(object) = world.vnets.iter().find(|v| v.name() == vnet.key) {
            super::endpoints::add(vnet, object, &edge.service_tags);
        }
    }
    for lb in &world.load_balancers {
        if lb.metadata.deletion_timestamp.is_some() {
            continue;
        }
        if let Err(reason) = add_frontends(lb, &mut vnets) {
            notes.push(format!("LoadBalancer {}: {reason}", lb.name()));
        }
    }
    super::public::add(world, &mut vnets, &mut notes);
    let mut edge = edge.clone();
    edge.endpoints = world
        .public_ips
        .iter()
        .filter(|p| p.spec.body["oaks"]["endpoint"] == true && p.metadata.deletion_timestamp.is_none())
        .filter_map(|p| p.status.as_ref()?.properties["ipAddress"].as_str()?.parse().ok())
        .collect();
    edge.endpoints.sort();
    Plan {
        spec: FabricSpec {
            instance: instance.to_owned(),
            vnets: vnets.into_values().collect(),
            edge,
            underlay: None,
        },
        notes,
    }
}

fn v4(net: &IpNet) -> Result<Ipv4Net, String> {
    match net {
        IpNet::V4(n) => Ok(*n),
        IpNet::V6(n) => Err(format!("{n} is IPv6, which is not served yet")),
    }
}

fn vnet_spec(vnet: &VirtualNetwork) -> Result<VnetSpec, String> {
    let view = VnetView::parse(&vnet.spec.body).map_err(|e| e.to_string())?;
    let subnets = view
        .subnets
        .iter()
        .map(|s| {
            Ok(SubnetSpec {
                name: s.name.clone(),
                prefix: v4(&s.prefix)?,
                route_table: s.route_table.as_deref().map(object_name),
                security_group: s.network_security_group.as_deref().map(object_name),
                ..SubnetSpec::default()
            })
        })
        .collect::<Result<_, String>>()?;
    Ok(VnetSpec {
        key: vnet.name().to_owned(),
        prefixes: view.prefixes.iter().map(v4).collect::<Result<_, _>>()?,
        subnets,
        dns: DnsSpec {
            suffix: "internal.cloudapp.net".to_owned(),
            records: vec![],
        },
        ..VnetSpec::default()
    })
}

fn add_nic(
    nic: &NetworkInterface,
    host_name: Option<&str>,
    vnets: &mut BTreeMap<String, VnetSpec>,
) -> Result<(), String> {
    let status = nic.status.as_ref().map(|s| &s.properties);
    let Some(addresses) = status.and_then(NicAddresses::parse) else {
        return Err("no addresses yet".to_owned());
    };
    let mac = addresses
        .mac_bytes()
        .ok_or_else(|| format!("{:?} is no MAC address", addresses.mac))?;
    let primary = addresses.primary().ok_or("no primary ip configuration")?;
    let (vnet_key, subnet) =
        subnet_ref(&primary.subnet).ok_or_else(|| format!("{} is no subnet id", primary.subnet))?;
    let vnet = vnets
        .get_mut(&vnet_key)
        .ok_or_else(|| format!("its virtual network {vnet_key} is not here"))?;
    let ip_configs = addresses
        .ip_configs
        .iter()
        .map(|c| match c.address {
            IpAddr::V4(address) => Ok(IpConfigSpec {
                name: c.name.clone(),
                address,
                primary: c.primary,
            }),
            IpAddr::V6(a) => Err(format!("{a} is IPv6, which is not served yet")),
        })
        .collect::<Result<_, _>>()?;
    let group = &nic.spec.body["oaks"]["group"];
    let kind = if group.is_object() {
        let cluster = group["cluster"].as_str().map(str::to_owned);
        // A group may outlive its virtual node's object for a moment: it then has no Services.
        NicKind::Group {
            cluster: cluster.filter(|c| vnet.clusters.iter().any(|k| k.cluster == *c)),
        }
    } else {
        NicKind::Machine
    };
    vnet.nics.push(NicSpec {
        key: nic.name().to_owned(),
        mac: Mac(mac),
        subnet,
        ip_configs,
        kind,
        host_name: host_name.map(str::to_owned),
        ip_forwarding: nic.spec.body["properties"]["enableIPForwarding"] == true,
        security_group: nic.spec.body["properties"]["networkSecurityGroup"]["id"]
            .as_str()
            .map(object_name),
        ..NicSpec::default()
    });
    Ok(())
}

/// Peers whose halves are both there. The flags of the half over there say what may come in here.
fn add_peers(objects: &[VirtualNetwork], vnets: &mut BTreeMap<String, VnetSpec>, notes: &mut Vec<String>) {
    let mut halves: BTreeMap<(&str, String), PeeringView> = BTreeMap::new();
    for vnet in objects.iter().filter(|v| v.metadata.deletion_timestamp.is_none()) {
        match peerings(&vnet.spec.body) {
            Ok(list) => halves.extend(list.into_iter().map(|h| ((vnet.name(), object_name(&h.remote)), h))),
            Err(e) => notes.push(format!("VirtualNetwork {}: {e}", vnet.name())),
        }
    }
    for (here, there) in halves.keys() {
        let Some(other) = halves.get(&(there.as_str(), (*here).to_owned())) else {
            notes.push(format!("VirtualNetwork {here}: its peer {there} does not name it"));
            continue;
        };
        let Some(prefixes) = vnets.get(there).map(|v| v.prefixes.clone()) else {
            continue;
        };
        if let Some(vnet) = vnets.get_mut(*here) {
            vnet.peers.push(PeerSpec {
                vnet: there.clone(),
                prefixes,
                access: other.access,
                forwarded: other.forwarded,
            });
        }
    }
}

/// The route tables that the network's subnets name. One that is missing or cannot be read leads nowhere: traffic that was
/// meant to be inspected shall not go past.
fn add_routes(vnet: &mut VnetSpec, tables: &[RouteTable], notes: &mut Vec<String>) {
    let wanted: BTreeSet<String> = vnet.subnets.iter().filter_map(|s| s.route_table.clone()).collect();
    for key in wanted {
        let found = tables.iter().find(|t| t.name() == key).ok_or("is not here".to_owned());
        let routes = found.and_then(|t| routes(&t.spec.body).map_err(|(_, e)| e.to_string()));
        let routes = routes.unwrap_or_else(|reason| {
            notes.push(format!("RouteTable {key}: {reason}; it leads nowhere"));
            let prefixes = [Ipv4Net::default()].into_iter().chain(vnet.prefixes.iter().copied());
            let nowhere = |prefix| RouteSpec {
                prefix,
                next_hop: NextHop::None,
            };
            prefixes.map(nowhere).collect()
        });
        vnet.route_tables.push(RouteTableSpec { key, routes });
    }
}

/// The security groups that the network's subnets and NICs name. One that is missing or cannot be read denies everything:
/// whoever asked for a filter shall not be open by mistake.
fn add_groups(vnet: &mut VnetSpec, groups: &[NetworkSecurityGroup], tags: &ServiceTags, notes: &mut Vec<String>) {
    let subnets = vnet.subnets.iter().filter_map(|s| s.security_group.clone());
    let nics = vnet.nics.iter().filter_map(|n| n.security_group.clone());
    let wanted: BTreeSet<String> = subnets.chain(nics).collect();
    for key in wanted {
        let found = groups.iter().find(|g| g.name() == key).ok_or("is not here".to_owned());
        let rules =
            found.and_then(|g| security_rules(&g.spec.body, tags, &object_name).map_err(|(_, e)| e.to_string()));
        let rules = rules.unwrap_or_else(|reason| {
            notes.push(format!("NetworkSecurityGroup {key}: {reason}; it denies everything"));
            deny_all()
        });
        vnet.security_groups.push(SecurityGroupSpec { key, rules });
    }
}

fn add_frontends(lb: &LoadBalancer, vnets: &mut BTreeMap<String, VnetSpec>) -> Result<(), String> {
    let v4 = |a: IpAddr| -> Result<Ipv4Addr, String> {
        match a {
            IpAddr::V4(a) => Ok(a),
            IpAddr::V6(a) => Err(format!("{a} is IPv6, which is not served yet")),
        }
    };
    for f in lb_frontends(&lb.spec.body).map_err(|e| e.to_string())? {
        let vnet = vnets
            .get_mut(&f.virtual_network)
            .ok_or_else(|| format!("virtual network {} is not here", f.virtual_network))?;
        let protocol = match f.protocol.as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            other => return Err(format!("protocol {other:?} is not tcp or udp")),
        };
        let backends = f
            .backends
            .iter()
            .map(|b| {
                Ok(BackendSpec {
                    address: v4(b.address)?,
                    port: b.port,
                })
            })
            .collect::<Result<_, String>>()?;
        let sources = f.sources.iter().map(self::v4).collect::<Result<_, String>>()?;
        vnet.frontends.push(FrontendSpec {
            distribution: if f.client_affinity {
                Distribution::SourceIp
            } else {
                Distribution::FiveTuple
            },
            idle_timeout_s: f.idle_timeout_s,
            tcp_reset: f.tcp_reset,
            sources,
            ..FrontendSpec::new(v4(f.address)?, protocol, f.port, backends)
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use resources::{ArmSpec, ArmStatus};
    use serde_json::json;

    use super::*;

    const VNET: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/v";

    fn world() -> World {
        let body = json!({"properties": {"addressSpace": {"addressPrefixes": ["10.240.0.0/16"]},
            "subnets": [{"name": "nodes", "properties": {"addressPrefix": "10.240.0.0/24"}}, {"name": "groups", "properties": {"addressPrefix": "10.240.1.0/24"}}]}});
        let vnet = VirtualNetwork::new(resources::object_name(VNET), ArmSpec { id: VNET.into(), body });
        let mut nic = NetworkInterface::new(
            "nic-a",
            ArmSpec {
                id: "/subscriptions/s/x".into(),
                body: json!({}),
            },
        );
        nic.status = Some(ArmStatus {
            properties: json!({"macAddress": "00-0D-3A-00-00-01", "ipConfigurations": [
                {"name": "p", "properties": {"privateIPAddress": "10.240.0.4", "primary": true, "subnet": {"id": format!("{VNET}/subnets/nodes")}}}]}),
            ..Default::default()
        });
        World {
            vnets: vec![vnet],
            nics: vec![nic],
            ..World::default()
        }
    }

    #[test]
    fn objects_become_a_valid_spec() {
        let mut w = world();
        let mut pip = PublicIPAddress::new(
            "api",
            ArmSpec {
                id: String::new(),
                body: json!({"oaks": {"endpoint": true}}),
            },
        );
        pip.status = Some(ArmStatus {
            properties: json!({"ipAddress": "198.19.0.4"}),
            ..Default::default()
        });
        w.public_ips.push(pip);
        let frontends = json!({"oaks": {"frontends": [{"address": "198.19.0.9", "protocol": "tcp", "port": 80,
            "virtualNetwork": resources::object_name(VNET), "backends": [{"address": "10.240.0.5", "port": 8080}]}]}});
        w.load_balancers.push(LoadBalancer::new(
            "lb",
            ArmSpec {
                id: String::new(),
                body: frontends,
            },
        ));
        let plan = plan(&w, "t", &EdgeSpec::default());
        assert_eq!(plan.notes, Vec::<String>::new());
        plan.spec.check().unwrap();
        assert_eq!(plan.spec.vnets[0].nics[0].primary(), Some(Ipv4Addr::new(10, 240, 0, 4)));
        assert_eq!(plan.spec.vnets[0].frontends[0].backends.len(), 1);
        assert_eq!(plan.spec.edge.endpoints, [Ipv4Addr::new(198, 19, 0, 4)]);
    }

    #[test]
    fn two_halves_make_a_peering_and_the_far_flags_hold() {
        let mut w = world();
        let far = VNET
            .replace("networks/v", "networks/w")
            .replace("Networks/v", "Networks/w");
        let half = |remote: &str, access: bool| json!([{"name": "p", "properties": {"remoteVirtualNetwork": {"id": remote}, "allowVirtualNetworkAccess": access}}]);
        let body = json!({"properties": {"addressSpace": {"addressPrefixes": ["10.9.0.0/16"]}}});
        w.vnets.push(VirtualNetwork::new(
            object_name(&far),
            ArmSpec { id: far.clone(), body },
        ));
        w.vnets[0].spec.body["properties"]["virtualNetworkPeerings"] = half(&far, true);
        let one = plan(&w, "t", &EdgeSpec::default());
        assert!(one.spec.peered().is_empty() && one.notes.len() == 1, "{:?}", one.notes);
        w.vnets[1].spec.body["properties"]["virtualNetworkPeerings"] = half(VNET, false);
        let both = plan(&w, "t", &EdgeSpec::default());
        both.spec.check().unwrap();
        assert_eq!(both.spec.peered().len(), 1);
        let here = both.spec.vnets.iter().find(|v| v.key == object_name(VNET)).unwrap();
        assert_eq!((here.peers[0].access, here.peers[0].prefixes.len()), (false, 1));
        let there = both.spec.vnets.iter().find(|v| v.key == object_name(&far)).unwrap();
        assert!(there.peers[0].access);
    }

    #[test]
    fn named_groups_come_along_and_a_missing_one_denies() {
        let mut w = world();
        let id = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/networkSecurityGroups/n";
        let rule = json!({"name": "web", "properties": {"priority": 100, "direction": "Inbound", "access": "Allow", "protocol": "Tcp",
            "sourceAddressPrefix": "Internet", "sourcePortRange": "*", "destinationAddressPrefix": "*", "destinationPortRange": "80"}});
        w.security_groups.push(NetworkSecurityGroup::new(
            object_name(id),
            ArmSpec {
                id: id.into(),
                body: json!({"properties": {"securityRules": [rule]}}),
            },
        ));
        w.vnets[0].spec.body["properties"]["subnets"][0]["properties"]["networkSecurityGroup"] =
            json!({"id": id.to_uppercase()});
        w.nics[0].spec.body["properties"]["networkSecurityGroup"] = json!({"id": format!("{id}2")});
        let plan = plan(&w, "t", &EdgeSpec::default());
        plan.spec.check().unwrap();
        let v = &plan.spec.vnets[0];
        let group = |key: &Option<String>| v.security_group(key.as_deref().unwrap()).unwrap();
        assert_eq!(group(&v.subnets[0].security_group).rules[0].name, "web");
        assert_eq!(group(&v.nics[0].security_group).rules, deny_all());
        assert_eq!(plan.notes.len(), 1, "{:?}", plan.notes);
    }

    #[test]
    fn linked_networks_get_a_zone_with_the_names_that_machines_registered() {
        let mut w = world();
        w.machines.push(Machine::new(
            "m",
            resources::MachineSpec {
                node_name: "Node-0".into(),
                nic: "nic-a".into(),
                ..Default::default()
            },
        ));
        let far = VNET.replace("Networks/v", "Networks/w");
        let body = json!({"properties": {"addressSpace": {"addressPrefixes": ["10.9.0.0/16"]}}});
        w.vnets.push(VirtualNetwork::new(
            object_name(&far),
            ArmSpec { id: far.clone(), body },
        ));
        let link = |name: &str, vnet: &str, registration: bool| json!({"name": name, "properties": {"virtualNetwork": {"id": vnet}, "registrationEnabled": registration}});
        let zone = |body: serde_json::Value| {
            let id =
                "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/privateDnsZones/Example.org".to_owned();
            PrivateDnsZone::new(
                "z",
                ArmSpec {
                    id,
                    body: json!({"properties": body}),
                },
            )
        };
        w.private_zones = vec![zone(
            json!({"virtualNetworkLinks": [link("a", VNET, true), link("b", &far, false)]}),
        )];
        let made = plan(&w, "t", &EdgeSpec::default());
        assert_eq!(made.spec.vnets.len(), 2);
        for vnet in &made.spec.vnets {
            let zone = &vnet.private_zones[0];
            assert_eq!(
                (zone.name.as_str(), zone.records[0].name.as_str()),
                ("example.org", "node-0")
            );
            assert_eq!(zone.registration, vnet.key == object_name(VNET));
        }
        let instance = made
            .spec
            .vnets
            .iter()
            .flat_map(|v| &v.nics)
            .next()
            .unwrap()
            .instance
            .clone()
            .unwrap();
        assert_eq!(instance.name, "Node-0");
        // A written record of that name wins, and a zone that cannot be read is said.
        w.private_zones = vec![zone(json!({"virtualNetworkLinks": [link("a", VNET, true)],
            "CNAME": [{"name": "NODE-0", "properties": {"cnameRecord": {"cname": "x.org"}}}]}))];
        assert_eq!(
            plan(&w, "t", &EdgeSpec::default())
                .spec
                .vnets
                .iter()
                .flat_map(|v| &v.private_zones)
                .next()
                .unwrap()
                .records
                .len(),
            1
        );
        w.private_zones = vec![zone(json!({"A": [{"name": "..", "properties": {}}]}))];
        let made = plan(&w, "t", &EdgeSpec::default());
        assert!(
            made.notes[0].starts_with("PrivateDnsZone z: properties.A[0].name"),
            "{:?}",
            made.notes
        );
    }

    #[test]
    fn what_is_left_out_is_said() {
        let mut w = world();
        w.nics[0].status = None;
        w.load_balancers.push(LoadBalancer::new(
            "lb",
            ArmSpec {
                id: String::new(),
                body: json!({"oaks": {"frontends": [{"address": "198.19.0.9", "protocol": "tcp",
            "port": 80, "virtualNetwork": "gone", "backends": []}]}}),
            },
        ));
        let plan = plan(&w, "t", &EdgeSpec::default());
        assert_eq!(
            plan.notes,
            [
                "NetworkInterface nic-a: no addresses yet",
                "LoadBalancer lb: virtual network gone is not here"
            ]
        );
    }

    #[test]
    fn marks_are_unique_and_stable() {
        let names: Vec<String> = (0..500).map(|i| format!("cluster-{i}")).collect();
        let all = cluster_marks(names.iter().map(String::as_str));
        let distinct: BTreeSet<u32> = all.values().map(|(m, _)| *m).collect();
        assert_eq!(distinct.len(), 500);
        assert!(distinct.iter().all(|m| (1..=CLUSTER_MARK_MASK).contains(m)));
        assert_eq!(
            cluster_marks(["cluster-7"])["cluster-7"],
            cluster_marks(["cluster-7"])["cluster-7"]
        );
    }
}

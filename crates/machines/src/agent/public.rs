//! Load balancers, NAT gateways and public addresses of instances: ARM's objects into the fabric's spec. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use resources::{
    ArmId, ArmStatus, LoadBalancer, NetworkInterface, VirtualNetwork, object_name,
    views::{NicAddresses, subnet_ref},
};
use serde_json::Value;
use vnet_model::arm::balancer::{Balancer, NatPorts, Place, default_ports, snat_block};
use vnet_model::fabric::{
    BackendSpec, DnsRecord, FrontendSpec, InstanceAddressSpec, NatGatewaySpec, OutboundSpec, ProbeSpec, Protocol,
    VnetSpec,
};

use super::plan::World;

/// One configuration of a NIC: its virtual network's key and its private address.
type Member = (String, Ipv4Addr);

/// What NICs say of load balancers and public addresses; ids are folded.
#[derive(Default)]
struct Nics {
    pools: BTreeMap<String, BTreeSet<Member>>,
    nat_rules: BTreeMap<String, Member>,
    /// Public address to who has it.
    instances: BTreeMap<String, Member>,
}

/// Adds everything to the virtual networks; what is left out is said in `notes`. NICs and subnets are there already.
pub fn add(world: &World, vnets: &mut BTreeMap<String, VnetSpec>, notes: &mut Vec<String>) {
    let publics = Publics::of(world);
    let nics = Nics::of(&world.nics);
    for (id, (vnet, private)) in &nics.instances {
        let Some(spec) = vnets.get_mut(vnet) else { continue };
        match publics.get(id) {
            Some((public, idle_timeout_s)) => spec.instance_addresses.push(InstanceAddressSpec {
                private: *private,
                public,
                idle_timeout_s,
            }),
            None => notes.push(format!(
                "NetworkInterface with {private}: its public address {id} has no address yet"
            )),
        }
    }
    for vnet in &world.vnets {
        if let Some(spec) = vnets.get_mut(vnet.name()) {
            gateways(vnet, spec, world, &publics, notes);
        }
    }
    for lb in world
        .load_balancers
        .iter()
        .filter(|lb| lb.metadata.deletion_timestamp.is_none())
    {
        // Those of clusters say their frontends outright.
        if lb.spec.body["oaks"].is_object() {
            continue;
        }
        if let Err(reason) = balancer(lb, &nics, &publics, vnets) {
            notes.push(format!("LoadBalancer {}: {reason}", lb.name()));
        }
    }
    let records: Vec<DnsRecord> = publics.records().collect();
    for spec in vnets.values_mut() {
        spec.dns.records.extend(records.iter().cloned());
    }
}

fn fold(id: &str) -> String {
    id.trim_end_matches('/').to_lowercase()
}

fn list(v: &Value) -> &[Value] {
    v.as_array().map_or(&[], Vec::as_slice)
}

fn shown(status: Option<&ArmStatus>) -> &Value {
    status.map_or(&Value::Null, |s| &s.properties)
}

/// Public addresses that were given, by folded id.
struct Publics<'a> {
    addresses: BTreeMap<String, (Ipv4Addr, &'a Value)>,
}

impl<'a> Publics<'a> {
    fn of(world: &'a World) -> Self {
        let given = world.public_ips.iter().filter_map(|o| {
            let properties = shown(o.status.as_ref());
            let address = properties["ipAddress"].as_str()?.parse().ok()?;
            let alive = o.metadata.deletion_timestamp.is_none();
            alive.then(|| (fold(&o.spec.id), (address, properties)))
        });
        Self {
            addresses: given.collect(),
        }
    }

    /// The address, and the seconds that its flows may be idle.
    fn get(&self, id: &str) -> Option<(Ipv4Addr, u32)> {
        let (address, properties) = self.addresses.get(&fold(id))?;
        Some((*address, idle_seconds(properties)))
    }

    fn records(&self) -> impl Iterator<Item = DnsRecord> {
        self.addresses.values().filter_map(|(address, properties)| {
            Some(DnsRecord {
                name: properties["dnsSettings"]["fqdn"].as_str()?.to_owned(),
                addresses: vec![*address],
            })
        })
    }
}

fn idle_seconds(properties: &Value) -> u32 {
    let minutes = properties["idleTimeoutInMinutes"].as_u64().unwrap_or(4);
    u32::try_from(minutes).unwrap_or(4).saturating_mul(60)
}

impl Nics {
    fn of(nics: &[NetworkInterface]) -> Self {
        let mut out = Self::default();
        for nic in nics.iter().filter(|n| n.metadata.deletion_timestamp.is_none()) {
            let Some(addresses) = NicAddresses::parse(shown(nic.status.as_ref())) else {
                continue;
            };
            for (n, config) in list(&nic.spec.body["properties"]["ipConfigurations"])
                .iter()
                .enumerate()
            {
                let name = config["name"]
                    .as_str()
                    .map_or_else(|| format!("ipconfig{}", n + 1), str::to_owned);
                let given = addresses.ip_configs.iter().find(|c| c.name == name);
                let Some((IpAddr::V4(address), Some((vnet, _)))) = given.map(|c| (c.address, subnet_ref(&c.subnet)))
                else {
                    continue;
                };
                let member = (vnet, address);
                let p = &config["properties"];
                for id in list(&p["loadBalancerBackendAddressPools"])
                    .iter()
                    .filter_map(|r| r["id"].as_str())
                {
                    out.pools.entry(fold(id)).or_default().insert(member.clone());
                }
                for id in list(&p["loadBalancerInboundNatRules"])
                    .iter()
                    .filter_map(|r| r["id"].as_str())
                {
                    out.nat_rules.insert(fold(id), member.clone());
                }
                if let Some(id) = p["publicIPAddress"]["id"].as_str() {
                    out.instances.insert(fold(id), member);
                }
            }
        }
        out
    }
}

/// The gateways that the network's subnets name. One that is not here closes its subnets: who asked for its addresses shall
/// not leave with others.
fn gateways(vnet: &VirtualNetwork, spec: &mut VnetSpec, world: &World, publics: &Publics<'_>, notes: &mut Vec<String>) {
    let mut named: BTreeMap<String, String> = BTreeMap::new();
    for subnet in list(&vnet.spec.body["properties"]["subnets"]) {
        let (Some(name), Some(id)) = (
            subnet["name"].as_str(),
            subnet["properties"]["natGateway"]["id"].as_str(),
        ) else {
            continue;
        };
        let key = object_name(id);
        if let Some(s) = spec.subnets.iter_mut().find(|s| s.name.eq_ignore_ascii_case(name)) {
            s.nat_gateway = Some(key.clone());
            named.insert(key, fold(id));
        }
    }
    for key in named.into_keys() {
        let object = world
            .nat_gateways
            .iter()
            .find(|g| g.name() == key && g.metadata.deletion_timestamp.is_none());
        let Some(object) = object else {
            notes.push(format!("NatGateway {key}: is not here; its subnets do not leave"));
            spec.nat_gateways.push(NatGatewaySpec {
                key,
                ..NatGatewaySpec::default()
            });
            continue;
        };
        let p = &object.spec.body["properties"];
        let ids = |field: &str| list(&p[field]).iter().filter_map(|r| r["id"].as_str());
        let mut addresses: BTreeSet<Ipv4Addr> = ids("publicIpAddresses")
            .filter_map(|id| Some(publics.get(id)?.0))
            .collect();
        let held: BTreeSet<Ipv4Addr> = publics.addresses.values().map(|(a, _)| *a).collect();
        for id in ids("publicIpPrefixes") {
            let prefix = world.public_ip_prefixes.iter().find(|o| fold(&o.spec.id) == fold(id));
            let block = prefix.and_then(|o| {
                shown(o.status.as_ref())["ipPrefix"]
                    .as_str()?
                    .parse::<ipnet::Ipv4Net>()
                    .ok()
            });
            let block = block
                .into_iter()
                .flat_map(|b| u32::from(b.network())..=u32::from(b.broadcast()));
            addresses.extend(block.map(Ipv4Addr::from).filter(|a| !held.contains(a)));
        }
        spec.nat_gateways.push(NatGatewaySpec {
            key,
            addresses: addresses.into_iter().collect(),
            idle_timeout_s: idle_seconds(p),
        });
    }
}

/// One load balancer's frontends and outbound ports, added to the virtual network that its members are in.
fn balancer(
    lb: &LoadBalancer,
    nics: &Nics,
    publics: &Publics<'_>,
    vnets: &mut BTreeMap<String, VnetSpec>,
) -> Result<(), String> {
    let id = &lb.spec.id;
    let view = Balancer::parse(id, &lb.spec.body).map_err(|e| e.to_string())?;
    let members: BTreeMap<String, BTreeSet<Member>> = view
        .pools
        .iter()
        .map(|pool| {
            let by_nic = nics
                .pools
                .get(&fold(&format!("{id}/backendAddressPools/{}", pool.name)));
            let by_address = pool.addresses.iter().filter_map(|a| {
                let vnet = match subnet_ref(&a.network) {
                    Some((vnet, _)) => vnet,
                    None => object_name(&ArmId::parse(&a.network).ok()?.to_string()),
                };
                Some((vnet, a.address))
            });
            (
                fold(&pool.name),
                by_nic.into_iter().flatten().cloned().chain(by_address).collect(),
            )
        })
        .collect();
    let nat_members: Vec<Option<&Member>> = view
        .nat_rules
        .iter()
        .map(|r| nics.nat_rules.get(&fold(&format!("{id}/inboundNatRules/{}", r.name))))
        .collect();
    let internal = view.frontends.iter().find_map(|f| match &f.place {
        Place::Internal { subnet, .. } => Some(subnet_ref(subnet)?.0),
        Place::Public { .. } => None,
    });
    let of_members = members.values().flatten().chain(nat_members.iter().copied().flatten());
    let Some(key) = internal.or_else(|| of_members.map(|m| m.0.clone()).next()) else {
        return Err("nobody is in its pools, so it stands in no virtual network".to_owned());
    };
    let vnet = vnets
        .get_mut(&key)
        .ok_or_else(|| format!("virtual network {key} is not here"))?;
    let addresses = |pool: &str| -> BTreeSet<Ipv4Addr> {
        let all = members.get(&fold(pool)).into_iter().flatten();
        all.filter(|m| m.0 == key).map(|m| m.1).collect()
    };
    let given = list(&shown(lb.status.as_ref())["frontendIPConfigurations"]);
    let frontend_address = |name: &str| -> Option<Ipv4Addr> {
        match &view.frontend(name)?.place {
            Place::Public { address } => Some(publics.get(address)?.0),
            Place::Internal { .. } => {
                let same = |f: &&Value| f["name"].as_str().is_some_and(|n| n.eq_ignore_ascii_case(name));
                given.iter().find(same)?["properties"]["privateIPAddress"]
                    .as_str()?
                    .parse()
                    .ok()
            }
        }
    };
    let to = |port: u16| move |address: Ipv4Addr| BackendSpec { address, port };
    let mut waiting = Vec::new();
    for rule in &view.rules {
        let Some(address) = frontend_address(&rule.frontend) else {
            waiting.push(rule.frontend.as_str());
            continue;
        };
        let backends: BTreeSet<Ipv4Addr> = rule.pools.iter().flat_map(|p| addresses(p)).collect();
        let probe = rule.probe.as_deref().and_then(|p| view.probe(p)).map(|p| ProbeSpec {
            kind: p.kind.clone(),
            port: p.port,
            interval_ms: p.interval_s.saturating_mul(1000),
            threshold: p.threshold,
        });
        let backends = backends.into_iter().map(to(rule.backend_port)).collect();
        vnet.frontends.push(FrontendSpec {
            distribution: rule.distribution,
            idle_timeout_s: rule.idle_timeout_s,
            tcp_reset: rule.tcp_reset,
            probe,
            ..FrontendSpec::new(address, rule.protocol, rule.frontend_port, backends)
        });
    }
    for (rule, member) in view.nat_rules.iter().zip(nat_members) {
        let Some(address) = frontend_address(&rule.frontend) else {
            waiting.push(rule.frontend.as_str());
            continue;
        };
        let pairs: Vec<(u16, Ipv4Addr)> = match &rule.ports {
            NatPorts::One(port) => member
                .filter(|m| m.0 == key)
                .map(|m| (*port, m.1))
                .into_iter()
                .collect(),
            NatPorts::Range { first, last, pool } => (*first..=*last).zip(addresses(pool)).collect(),
        };
        vnet.frontends
            .extend(pairs.into_iter().map(|(port, member)| FrontendSpec {
                idle_timeout_s: rule.idle_timeout_s,
                tcp_reset: rule.tcp_reset,
                ..FrontendSpec::new(address, rule.protocol, port, vec![to(rule.backend_port)(member)])
            }));
    }
    outbound(&view, &addresses, &frontend_address, vnet);
    match waiting.first() {
        None => Ok(()),
        Some(name) => Err(format!("frontend {name} has no address yet")),
    }
}

/// SNAT ports: by outbound rules, else by rules that do not switch it off. Members that find no room have none.
fn outbound(
    view: &Balancer,
    members: &impl Fn(&str) -> BTreeSet<Ipv4Addr>,
    frontend_address: &impl Fn(&str) -> Option<Ipv4Addr>,
    vnet: &mut VnetSpec,
) {
    let nic_addresses: BTreeSet<Ipv4Addr> = vnet.nics.iter().flat_map(|n| n.addresses()).collect();
    let mut taken: BTreeSet<(Ipv4Addr, u8)> = vnet
        .outbound
        .iter()
        .flat_map(|o| slots(o.private, o.protocol))
        .collect();
    let mut deal = |pool: &str, frontends: &[String], protocol, ports: u32, idle_timeout_s| {
        let publics: BTreeSet<Ipv4Addr> = frontends.iter().filter_map(|f| frontend_address(f)).collect();
        let publics: Vec<Ipv4Addr> = publics.into_iter().collect();
        let members: Vec<Ipv4Addr> = members(pool)
            .into_iter()
            .filter(|a| nic_addresses.contains(a))
            .collect();
        let ports = if ports == 0 {
            default_ports(members.len())
        } else {
            ports
        };
        for (n, private) in members.into_iter().enumerate() {
            let Some((at, first_port, last_port)) = snat_block(n, ports, publics.len()) else {
                continue;
            };
            let wanted = slots(private, protocol);
            if wanted.iter().any(|s| taken.contains(s)) {
                continue;
            }
            taken.extend(wanted);
            vnet.outbound.push(OutboundSpec {
                private,
                protocol,
                public: publics[at],
                first_port,
                last_port,
                idle_timeout_s,
            });
        }
    };
    for rule in &view.outbound_rules {
        deal(
            &rule.pool,
            &rule.frontends,
            rule.protocol,
            rule.ports,
            rule.idle_timeout_s,
        );
    }
    // Implicit: every public frontend by whose rules the pool may leave.
    let mut implicit: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let is_public = |name: &str| {
        view.frontend(name)
            .is_some_and(|f| matches!(f.place, Place::Public { .. }))
    };
    for rule in view.rules.iter().filter(|r| r.outbound_snat && is_public(&r.frontend)) {
        for pool in &rule.pools {
            implicit.entry(pool).or_default().push(rule.frontend.clone());
        }
    }
    for (pool, frontends) in implicit {
        deal(pool, &frontends, Protocol::All, 0, 240);
    }
}

/// What an outbound rule takes: an address and each protocol, by number.
fn slots(private: Ipv4Addr, protocol: Protocol) -> Vec<(Ipv4Addr, u8)> {
    match protocol {
        Protocol::Tcp => vec![(private, 6)],
        Protocol::Udp => vec![(private, 17)],
        Protocol::All => vec![(private, 6), (private, 17)],
    }
}

#[cfg(test)]
mod tests {
    use resources::{ArmSpec, NatGateway, PublicIPAddress, PublicIPPrefix};
    use serde_json::json;
    use vnet_model::fabric::{EdgeSpec, ProbeKind};

    use super::*;
    use crate::agent::plan::plan;

    const NETWORK: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network";

    fn id(kind: &str, name: &str) -> String {
        format!("{NETWORK}/{kind}/{name}")
    }

    fn reference(id: String) -> Value {
        json!({"id": id.to_uppercase()})
    }

    fn status(properties: Value) -> Option<ArmStatus> {
        Some(ArmStatus {
            properties,
            ..ArmStatus::default()
        })
    }

    fn public(name: &str, address: &str, more: Value) -> PublicIPAddress {
        let id = id("publicIPAddresses", name);
        let mut o = PublicIPAddress::new(object_name(&id), ArmSpec { id, body: json!({}) });
        let mut properties = more;
        properties["ipAddress"] = json!(address);
        o.status = status(properties);
        o
    }

    fn nic(name: &str, address: &str, config: Value) -> NetworkInterface {
        let id = id("networkInterfaces", name);
        let subnet = self::id("virtualNetworks", "v/subnets/nodes");
        let body = json!({"properties": {"ipConfigurations": [{"name": "c", "properties": config}]}});
        let mut o = NetworkInterface::new(object_name(&id), ArmSpec { id, body });
        o.status = status(
            json!({"macAddress": format!("00-0D-3A-00-00-{:0>2}", address.rsplit('.').next().unwrap()),
            "ipConfigurations": [{"name": "c", "properties": {"privateIPAddress": address, "primary": true, "subnet": {"id": subnet}}}]}),
        );
        o
    }

    fn world() -> World {
        let lb_id = id("loadBalancers", "lb");
        let part = |kind: &str, name: &str| reference(format!("{lb_id}/{kind}/{name}"));
        let vnet_id = id("virtualNetworks", "v");
        let vnet = json!({"properties": {"addressSpace": {"addressPrefixes": ["10.0.0.0/16"]}, "subnets": [
            {"name": "nodes", "properties": {"addressPrefix": "10.0.0.0/24"}}]}});
        let pooled = json!({"loadBalancerBackendAddressPools": [part("backendAddressPools", "be")],
            "loadBalancerInboundNatRules": [part("inboundNatRules", "ssh")]});
        let rule = |name: &str, port: u16, more: Value| {
            let mut p = json!({"frontendIPConfiguration": part("frontendIPConfigurations", "fe"), "protocol": "Tcp",
                "backendAddressPool": part("backendAddressPools", "be"), "frontendPort": port, "backendPort": port + 8000});
            p.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({"name": name, "properties": p})
        };
        let probed = json!({"probe": part("probes", "p"), "loadDistribution": "SourceIP", "enableTcpReset": true});
        let body = json!({"sku": {"name": "Standard"}, "properties": {
            "frontendIPConfigurations": [{"name": "fe", "properties": {"publicIPAddress": reference(id("publicIPAddresses", "a"))}}],
            "backendAddressPools": [{"name": "be", "properties": {"loadBalancerBackendAddresses": [
                {"name": "x", "properties": {"ipAddress": "10.0.0.9", "virtualNetwork": {"id": vnet_id}}}]}}],
            "probes": [{"name": "p", "properties": {"protocol": "Tcp", "port": 7, "intervalInSeconds": 5}}],
            "loadBalancingRules": [rule("web", 80, probed)],
            "inboundNatRules": [{"name": "ssh", "properties": {"frontendIPConfiguration": part("frontendIPConfigurations", "fe"),
                "protocol": "Tcp", "frontendPort": 5000, "backendPort": 22}},
                {"name": "many", "properties": {"frontendIPConfiguration": part("frontendIPConfigurations", "fe"),
                "protocol": "Tcp", "frontendPortRangeStart": 6000, "frontendPortRangeEnd": 6100, "backendPort": 22,
                "backendAddressPool": part("backendAddressPools", "be")}}]}});
        World {
            vnets: vec![VirtualNetwork::new(
                object_name(&vnet_id),
                ArmSpec {
                    id: vnet_id,
                    body: vnet,
                },
            )],
            nics: vec![
                nic("n1", "10.0.0.4", pooled),
                nic(
                    "n2",
                    "10.0.0.5",
                    json!({"publicIPAddress": reference(id("publicIPAddresses", "b"))}),
                ),
            ],
            public_ips: vec![
                public(
                    "a",
                    "198.19.0.4",
                    json!({"dnsSettings": {"fqdn": "web.x.cloudapp.oaks.internal"}}),
                ),
                public("b", "198.19.0.5", json!({"idleTimeoutInMinutes": 30})),
            ],
            load_balancers: vec![LoadBalancer::new(object_name(&lb_id), ArmSpec { id: lb_id, body })],
            ..World::default()
        }
    }

    fn spec_of(world: &World) -> (VnetSpec, Vec<String>) {
        let plan = plan(world, "t", &EdgeSpec::default());
        plan.spec.check().unwrap();
        (plan.spec.vnets[0].clone(), plan.notes)
    }

    #[test]
    fn rules_become_frontends_and_members_get_snat_ports() {
        let (v, notes) = spec_of(&world());
        assert_eq!(notes, Vec::<String>::new());
        let brief: Vec<(u16, Vec<String>)> = v
            .frontends
            .iter()
            .map(|f| {
                (
                    f.port,
                    f.backends.iter().map(|b| format!("{}:{}", b.address, b.port)).collect(),
                )
            })
            .collect();
        assert_eq!(
            brief[0],
            (80, vec!["10.0.0.4:8080".to_owned(), "10.0.0.9:8080".to_owned()])
        );
        assert_eq!(brief[1], (5000, vec!["10.0.0.4:22".to_owned()]));
        assert_eq!(brief[2], (6000, vec!["10.0.0.4:22".to_owned()]));
        assert_eq!(brief[3], (6001, vec!["10.0.0.9:22".to_owned()]));
        let web = &v.frontends[0];
        let probe = web.probe.clone().unwrap();
        assert_eq!(
            (probe.kind, probe.interval_ms, probe.threshold),
            (ProbeKind::Tcp, 5000, 1)
        );
        assert!(web.tcp_reset && web.idle_timeout_s == 240);
        // An address without a NIC leaves by nothing of ours.
        assert_eq!(v.outbound.len(), 1);
        let ports = (
            v.outbound[0].first_port,
            v.outbound[0].last_port,
            v.outbound[0].public.to_string(),
        );
        assert_eq!(ports, (1024, 2047, "198.19.0.4".to_owned()));
        assert_eq!(v.instance_addresses[0].public.to_string(), "198.19.0.5");
        assert_eq!(v.instance_addresses[0].idle_timeout_s, 1800);
        assert_eq!(v.dns.records[0].name, "web.x.cloudapp.oaks.internal");
    }

    #[test]
    fn an_outbound_rule_takes_the_place_of_implicit_ports() {
        let mut w = world();
        let p = &mut w.load_balancers[0].spec.body["properties"];
        p["loadBalancingRules"][0]["properties"]["disableOutboundSnat"] = json!(true);
        p["outboundRules"] = json!([{"name": "o", "properties": {"protocol": "Tcp", "allocatedOutboundPorts": 32000,
            "frontendIPConfigurations": [p["inboundNatRules"][0]["properties"]["frontendIPConfiguration"]],
            "backendAddressPool": p["loadBalancingRules"][0]["properties"]["backendAddressPool"]}}]);
        let (v, _) = spec_of(&w);
        assert_eq!(v.outbound.len(), 1);
        assert_eq!(
            (v.outbound[0].protocol, v.outbound[0].last_port),
            (Protocol::Tcp, 33023)
        );
    }

    #[test]
    fn an_internal_frontend_waits_for_its_address() {
        let mut w = world();
        let lb = &mut w.load_balancers[0];
        let subnet = id("virtualNetworks", "v/subnets/nodes");
        lb.spec.body["properties"]["frontendIPConfigurations"][0]["properties"] = json!({"subnet": {"id": subnet}});
        let (v, notes) = spec_of(&w);
        assert!(
            v.frontends.is_empty() && notes[0].contains("fe has no address yet"),
            "{notes:?}"
        );
        w.load_balancers[0].status = status(json!({"frontendIPConfigurations": [
            {"name": "fe", "properties": {"privateIPAddress": "10.0.0.50"}}]}));
        let (v, notes) = spec_of(&w);
        assert_eq!(notes, Vec::<String>::new());
        assert!(v.frontends.iter().all(|f| f.address.to_string() == "10.0.0.50"));
        assert!(v.outbound.is_empty(), "nobody leaves by an internal frontend");
    }

    #[test]
    fn a_gateways_addresses_come_from_prefixes_too_and_a_missing_one_closes_its_subnets() {
        let mut w = world();
        let gateway = id("natGateways", "g");
        w.vnets[0].spec.body["properties"]["subnets"][0]["properties"]["natGateway"] = reference(gateway.clone());
        let (v, notes) = spec_of(&w);
        assert!(v.nat_gateways[0].addresses.is_empty() && notes.len() == 1, "{notes:?}");
        assert_eq!(
            v.subnets[0].nat_gateway.as_deref(),
            Some(v.nat_gateways[0].key.as_str())
        );
        w.public_ips.push(public("c", "198.19.0.6", json!({})));
        w.public_ips.push(public("d", "198.19.0.17", json!({})));
        let prefix = id("publicIPPrefixes", "p");
        let mut block = PublicIPPrefix::new(
            object_name(&prefix),
            ArmSpec {
                id: prefix.clone(),
                body: json!({}),
            },
        );
        block.status = status(json!({"ipPrefix": "198.19.0.16/30"}));
        w.public_ip_prefixes.push(block);
        let body = json!({"properties": {"idleTimeoutInMinutes": 10, "publicIpAddresses": [reference(id("publicIPAddresses", "c"))],
            "publicIpPrefixes": [reference(prefix)]}});
        w.nat_gateways
            .push(NatGateway::new(object_name(&gateway), ArmSpec { id: gateway, body }));
        let (v, notes) = spec_of(&w);
        assert_eq!(notes, Vec::<String>::new());
        let addresses: Vec<String> = v.nat_gateways[0].addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["198.19.0.6", "198.19.0.16", "198.19.0.18", "198.19.0.19"]);
        assert_eq!(v.nat_gateways[0].idle_timeout_s, 600);
    }
}

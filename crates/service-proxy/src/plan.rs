//! From the joined Services to one nftables table. Pure; equal inputs give equal tables.
//!
//! # How a connection is led
//! * `services`: `address . protocol . port -> goto` the port's chain, which picks one endpoint per connection.
//! * `refused`: new connections to a port that has no endpoint, or that the Service does not have, are answered with a
//!   reset (TCP) or "port unreachable" at once instead of running into a timeout.
//! * `hairpin`: an endpoint that reached itself through a Service is masqueraded, so that its answer comes back here.
//! * NodePort (machines only): any address of this machine but loopback; the client is masqueraded unless the Service's
//!   `externalTrafficPolicy` is `Local`.
//!
//! # Where it stands
//! All chains are of one table, so it is replaced in one transaction and deleted by name. Translation runs at priority
//! [`PRIORITY_NAT`], before a VNet's own (-100): the address of a load balancer, seen from inside the cluster, is led to
//! the endpoints directly. In a VNet's namespace every entry rule asks for the cluster's mark first, so that clusters with
//! equal Service ranges do not see each other; whoever sets the mark does it before priority [`PRIORITY_REFUSE`].
//!
//! # Not offered
//! SCTP; IPv6; NodePort on 127.0.0.1; `externalIPs` for clients that are not in the cluster; affinity timeouts (the same
//! client keeps its endpoint while the set of endpoints stays); topology hints.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use linux::nft::{
    Balance, CT_NEW, CT_STATUS_DNAT, Chain, ChainKind, Datum, Element, Family, Field, HookPoint, NatTarget, Reject,
    Rule, Set, Statement, TCP, Table, UDP, Verdict,
};

use crate::world::{PortEntry, Protocol, ServiceEntry, ServiceKind, Target, World};

pub const PRIORITY_REFUSE: i32 = -110;
pub const PRIORITY_NAT: i32 = -105;
pub const PRIORITY_MASQUERADE: i32 = 90;
/// Packet mark of connections that must be masqueraded; used in machines only.
pub const MASQUERADE_MARK: u32 = 0x4000;

/// A kernel chain name has at most 127 bytes.
const CHAIN_NAME_MAX: usize = 120;

const KEY: [Field; 3] = [Field::IpDaddr, Field::L4Proto, Field::Dport];

/// For whom the table works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All traffic of this namespace, local processes included.
    Machine,
    /// Only packets that carry this mark: the VNet marks what enters through the ports of a cluster's container groups.
    Mark(u32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanConfig {
    /// Name of the table.
    pub table: String,
    pub scope: Scope,
    /// The cluster's DNS address: answered by the cluster's own server, so never led to endpoints or refused here.
    pub dns_ip: Option<Ipv4Addr>,
}

/// The table for `world`.
pub fn plan(world: &World, config: &PlanConfig) -> Table {
    let mut tables = Contents::default();
    for service in &world.services {
        for port in &service.ports {
            tables.add_port(service, port, config);
        }
    }
    tables.into_table(config)
}

#[derive(Default)]
struct Contents {
    /// Port chains and NodePort chains, by name.
    chains: BTreeMap<String, Vec<Rule>>,
    services: BTreeMap<(Ipv4Addr, u8, u16), String>,
    refused: BTreeSet<(Ipv4Addr, u8, u16)>,
    cluster_ips: BTreeSet<Ipv4Addr>,
    node_ports: BTreeMap<(u8, u16), String>,
    refused_node_ports: BTreeSet<(u8, u16)>,
    hairpin: BTreeSet<Ipv4Addr>,
}

impl Contents {
    fn add_port(&mut self, service: &ServiceEntry, port: &PortEntry, config: &PlanConfig) {
        let protocol = match port.protocol {
            Protocol::Tcp => TCP,
            Protocol::Udp => UDP,
            Protocol::Sctp => return,
        };
        let ServiceKind::ClusterIp(cluster_ips) = &service.kind else {
            return;
        };
        let about = format!("{}/{}:{}", service.namespace, service.name, port_name(port));
        let balance = || {
            if service.sticky {
                Balance::Hash(vec![Field::IpSaddr])
            } else {
                Balance::Random
            }
        };

        let all = &port.targets;
        let local: Vec<Target> = all.iter().filter(|t| t.local).cloned().collect();
        let inner = if service.internal_local { &local } else { all };
        self.hairpin.extend(all.iter().map(|t| t.address));
        let name = |kind: &str| chain_name(kind, service, port);

        for ip in cluster_ips {
            let std::net::IpAddr::V4(ip) = ip else { continue };
            if Some(*ip) == config.dns_ip {
                continue;
            }
            self.cluster_ips.insert(*ip);
            self.lead(
                *ip,
                protocol,
                port.port,
                inner,
                name(if service.internal_local { "own" } else { "svc" }),
            );
        }
        for ip in service.external_ips.iter().filter(|ip| Some(**ip) != config.dns_ip) {
            self.lead(*ip, protocol, port.port, all, name("svc"));
        }
        if !all.is_empty() {
            self.chains
                .entry(name("svc"))
                .or_insert_with(|| vec![balanced(protocol, balance(), all, &about)]);
        }
        if service.internal_local && !local.is_empty() {
            self.chains
                .entry(name("own"))
                .or_insert_with(|| vec![balanced(protocol, balance(), &local, &about)]);
        }
        if let (Some(node_port), Scope::Machine) = (port.node_port, &config.scope) {
            let targets = if service.external_local { &local } else { all };
            if targets.is_empty() {
                self.refused_node_ports.insert((protocol, node_port));
                return;
            }
            let rules = if service.external_local {
                vec![balanced(protocol, balance(), &local, &about)]
            } else {
                let mark = Rule::new().set_mark(MASQUERADE_MARK, MASQUERADE_MARK);
                vec![mark, balanced(protocol, balance(), all, &about)]
            };
            self.chains.insert(name("node"), rules);
            self.node_ports.insert((protocol, node_port), name("node"));
        }
    }

    fn lead(&mut self, ip: Ipv4Addr, protocol: u8, port: u16, targets: &[Target], chain: String) {
        if targets.is_empty() {
            self.refused.insert((ip, protocol, port));
        } else {
            // The first Service that claims an external address and port keeps it.
            self.services.entry((ip, protocol, port)).or_insert(chain);
        }
    }

    fn into_table(self, config: &PlanConfig) -> Table {
        let key =
            |(ip, protocol, port): &(Ipv4Addr, u8, u16)| [Datum::Ip(*ip), Datum::Proto(*protocol), Datum::Port(*port)];
        let node_key = |(protocol, port): &(u8, u16)| [Datum::Proto(*protocol), Datum::Port(*port)];
        let machine = config.scope == Scope::Machine;
        // What every way into the table begins with.
        let enter = || match config.scope {
            Scope::Machine => Rule::new(),
            Scope::Mark(mark) => Rule::new().is(Field::Mark, Datum::Mark(mark)),
        };

        let mut table = Table::new(Family::Ip, config.table.clone());
        table.sets = vec![
            Set::verdict_map("services", KEY).with(
                self.services
                    .iter()
                    .map(|(k, chain)| Element::verdict(key(k), Verdict::goto(chain))),
            ),
            Set::new("served", KEY).with(self.services.keys().map(|k| Element::key(key(k)))),
            Set::new("refused", KEY).with(
                self.refused
                    .iter()
                    .filter(|k| !self.services.contains_key(k))
                    .map(|k| Element::key(key(k))),
            ),
            Set::new("cluster-ips", [Field::IpDaddr])
                .with(self.cluster_ips.iter().map(|ip| Element::key([Datum::Ip(*ip)]))),
            Set::new("hairpin", [Field::IpSaddr, Field::IpDaddr]).with(
                self.hairpin
                    .iter()
                    .map(|ip| Element::key([Datum::Ip(*ip), Datum::Ip(*ip)])),
            ),
        ];

        let new = || {
            enter().then(Statement::CtState {
                mask: CT_NEW,
                negate: false,
            })
        };
        let mut refuse = vec![
            new()
                .in_set([Field::IpDaddr], "cluster-ips")
                .not_in_set(KEY, "served")
                .goto("refuse"),
            new().in_set(KEY, "refused").goto("refuse"),
        ];
        let mut lead = vec![enter().vmap(KEY, "services")];
        if machine {
            let node_fields = [Field::L4Proto, Field::Dport];
            table.sets.push(
                Set::verdict_map("node-ports", node_fields).with(
                    self.node_ports
                        .iter()
                        .map(|(k, chain)| Element::verdict(node_key(k), Verdict::goto(chain))),
                ),
            );
            table.sets.push(
                Set::new("refused-node-ports", node_fields).with(
                    self.refused_node_ports
                        .iter()
                        .filter(|k| !self.node_ports.contains_key(k))
                        .map(|k| Element::key(node_key(k))),
                ),
            );
            let here = || {
                let loopback = ipnet::Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8);
                Rule::new()
                    .then(Statement::FibLocal { negate: false })
                    .is_not(Field::IpDaddr, Datum::Net(loopback))
            };
            lead.push(here().vmap(node_fields, "node-ports"));
            refuse.push(
                here()
                    .then(Statement::CtState {
                        mask: CT_NEW,
                        negate: false,
                    })
                    .in_set(node_fields, "refused-node-ports")
                    .goto("refuse"),
            );
        }

        let base = |name: &str, kind, point, priority, rules: &Vec<Rule>| {
            Chain::base(name, kind, point, priority, rules.clone())
        };
        table.chains = self
            .chains
            .into_iter()
            .map(|(name, rules)| Chain::regular(name, rules))
            .collect();
        table.chains.push(Chain::regular(
            "refuse",
            [
                Rule::new().proto(TCP).reject(Reject::TcpReset),
                Rule::new().reject(Reject::PortUnreachable),
            ],
        ));
        table.chains.push(base(
            "refuse-in",
            ChainKind::Filter,
            HookPoint::Prerouting,
            PRIORITY_REFUSE,
            &refuse,
        ));
        table.chains.push(base(
            "lead-in",
            ChainKind::Nat,
            HookPoint::Prerouting,
            PRIORITY_NAT,
            &lead,
        ));
        if machine {
            table.chains.push(base(
                "refuse-out",
                ChainKind::Filter,
                HookPoint::Output,
                PRIORITY_REFUSE,
                &refuse,
            ));
            table
                .chains
                .push(base("lead-out", ChainKind::Nat, HookPoint::Output, PRIORITY_NAT, &lead));
        }
        let translated = || {
            Rule::new().then(Statement::CtStatus {
                mask: CT_STATUS_DNAT,
                negate: false,
            })
        };
        let mut after = vec![
            translated()
                .in_set([Field::IpSaddr, Field::IpDaddr], "hairpin")
                .masquerade(),
        ];
        if machine {
            after.push(translated().is(Field::Mark, Datum::Mark(MASQUERADE_MARK)).masquerade());
        }
        table.chains.push(base(
            "masquerade",
            ChainKind::Nat,
            HookPoint::Postrouting,
            PRIORITY_MASQUERADE,
            &after,
        ));
        table
    }
}

fn port_name(port: &PortEntry) -> String {
    if port.name.is_empty() {
        port.port.to_string()
    } else {
        port.name.clone()
    }
}

/// Picks one target per connection. The protocol is asked for again because a translation with a port needs it.
fn balanced(protocol: u8, by: Balance, targets: &[Target], about: &str) -> Rule {
    let rule = Rule::new().proto(protocol);
    let rule = match targets {
        [one] => rule.dnat(NatTarget::to(one.address, one.port)),
        many => rule.dnat(NatTarget::OneOf {
            by,
            targets: many.iter().map(|t| (t.address, t.port)).collect(),
        }),
    };
    rule.comment(about)
}

/// `/` cannot stand in any part, so names are unambiguous.
fn chain_name(kind: &str, service: &ServiceEntry, port: &PortEntry) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let protocol = port.protocol.as_str();
    let full = format!("{kind}/{}/{}/{protocol}/{}", service.namespace, service.name, port.port);
    if full.len() <= CHAIN_NAME_MAX {
        return full;
    }
    let mut hasher = DefaultHasher::new();
    full.hash(&mut hasher);
    format!("{}/{:016x}", &full[..CHAIN_NAME_MAX - 17], hasher.finish())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use expect_test::{Expect, expect};
    use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
    use serde_json::json;

    use super::*;
    use crate::world::tests::{service, slice};

    fn machine() -> PlanConfig {
        PlanConfig {
            table: "oaks-services".into(),
            scope: Scope::Machine,
            dns_ip: Some(Ipv4Addr::new(10, 0, 0, 10)),
        }
    }

    /// Sets with elements, then the regular chains.
    fn show(table: &Table) -> String {
        let mut out = String::new();
        for set in table.sets.iter().filter(|s| !s.elements.is_empty()) {
            out += &format!("{}:\n", set.name);
            for e in &set.elements {
                out += &format!("  {}", e.key.iter().map(datum).collect::<Vec<_>>().join(" "));
                if let Some(linux::nft::Value::Verdict(Verdict::Goto(to))) = &e.value {
                    out += &format!(" -> {to}");
                }
                out += "\n";
            }
        }
        for chain in table.chains.iter().filter(|c| c.hook.is_none() && c.name != "refuse") {
            out += &format!("{}:\n", chain.name);
            for statement in chain.rules.iter().flat_map(|r| &r.statements) {
                match statement {
                    Statement::Dnat(NatTarget::To { address, port }) => {
                        out += &format!("  to {address}:{}\n", port.unwrap())
                    }
                    Statement::Dnat(NatTarget::OneOf { by, targets }) => out += &format!("  {by:?} {targets:?}\n"),
                    Statement::SetMark { value, .. } => out += &format!("  mark {value:#x}\n"),
                    _ => {}
                }
            }
        }
        out
    }

    fn datum(d: &Datum) -> String {
        match d {
            Datum::Ip(ip) => ip.to_string(),
            Datum::Proto(TCP) => "tcp".into(),
            Datum::Proto(UDP) => "udp".into(),
            Datum::Port(p) => p.to_string(),
            Datum::IfName(n) => n.clone(),
            other => format!("{other:?}"),
        }
    }

    fn check(services: &[Arc<Service>], slices: &[Arc<EndpointSlice>], config: &PlanConfig, want: Expect) {
        let world = World::new(services, slices, "n1");
        let table = plan(&world, config);
        want.assert_eq(&show(&table));
        assert_eq!(table, plan(&world, config), "equal inputs give equal tables");
    }

    #[test]
    fn cluster_ips_with_several_ports_and_no_endpoints() {
        let web = service(
            "shop",
            "web",
            json!({"clusterIP": "10.0.1.1", "clusterIPs": ["10.0.1.1", "fd00::1"],
            "ports": [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]}),
        );
        let empty = service(
            "shop",
            "empty",
            json!({"clusterIP": "10.0.1.2", "ports": [{"port": 80}]}),
        );
        let dns = service(
            "kube-system",
            "kube-dns",
            json!({"clusterIP": "10.0.0.10", "ports": [{"port": 53, "protocol": "UDP"}]}),
        );
        let headless = service("shop", "h", json!({"clusterIP": "None", "ports": [{"port": 80}]}));
        let ends = slice(
            "shop",
            "web",
            json!([{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 5353, "protocol": "UDP"}]),
            &[
                ("10.1.0.5", "n1", true),
                ("10.1.0.4", "n2", true),
                ("10.1.0.6", "n2", false),
            ],
        );
        check(
            &[web, empty, dns, headless],
            &[ends],
            &machine(),
            expect![[r#"
                services:
                  10.0.1.1 tcp 80 -> svc/shop/web/tcp/80
                  10.0.1.1 udp 53 -> svc/shop/web/udp/53
                served:
                  10.0.1.1 tcp 80
                  10.0.1.1 udp 53
                refused:
                  10.0.1.2 tcp 80
                cluster-ips:
                  10.0.1.1
                  10.0.1.2
                hairpin:
                  10.1.0.4 10.1.0.4
                  10.1.0.5 10.1.0.5
                svc/shop/web/tcp/80:
                  Random [(10.1.0.4, 8080), (10.1.0.5, 8080)]
                svc/shop/web/udp/53:
                  Random [(10.1.0.4, 5353), (10.1.0.5, 5353)]
            "#]],
        );
    }

    #[test]
    fn load_balancers_node_ports_and_local_policies() {
        let mut front: Service = (*service(
            "shop",
            "front",
            json!({"type": "LoadBalancer", "clusterIP": "10.0.1.1",
            "sessionAffinity": "ClientIP", "externalIPs": ["203.0.113.9"], "ports": [{"port": 80, "nodePort": 30080}]}),
        ))
        .clone();
        front.status = serde_json::from_value(
            json!({"loadBalancer": {"ingress": [{"ip": "198.19.0.7"}, {"ip": "198.19.0.8", "ipMode": "Proxy"}]}}),
        )
        .unwrap();
        let near = service(
            "shop",
            "near",
            json!({"type": "NodePort", "clusterIP": "10.0.1.2", "internalTrafficPolicy": "Local",
            "externalTrafficPolicy": "Local", "ports": [{"port": 80, "nodePort": 30081}]}),
        );
        let far = service(
            "shop",
            "far",
            json!({"type": "NodePort", "clusterIP": "10.0.1.3", "internalTrafficPolicy": "Local",
            "externalTrafficPolicy": "Local", "ports": [{"port": 80, "nodePort": 30082}]}),
        );
        let ports = json!([{"port": 8080}]);
        let ends = [
            slice(
                "shop",
                "front",
                ports.clone(),
                &[("10.1.0.4", "n1", true), ("10.1.0.5", "n2", true)],
            ),
            slice(
                "shop",
                "near",
                ports.clone(),
                &[("10.1.0.4", "n1", true), ("10.1.0.5", "n2", true)],
            ),
            slice("shop", "far", ports, &[("10.1.0.5", "n2", true)]),
        ];
        check(
            &[Arc::new(front), near, far],
            &ends,
            &machine(),
            expect![[r#"
                services:
                  10.0.1.1 tcp 80 -> svc/shop/front/tcp/80
                  10.0.1.2 tcp 80 -> own/shop/near/tcp/80
                  198.19.0.7 tcp 80 -> svc/shop/front/tcp/80
                  203.0.113.9 tcp 80 -> svc/shop/front/tcp/80
                served:
                  10.0.1.1 tcp 80
                  10.0.1.2 tcp 80
                  198.19.0.7 tcp 80
                  203.0.113.9 tcp 80
                refused:
                  10.0.1.3 tcp 80
                cluster-ips:
                  10.0.1.1
                  10.0.1.2
                  10.0.1.3
                hairpin:
                  10.1.0.4 10.1.0.4
                  10.1.0.5 10.1.0.5
                node-ports:
                  tcp 30080 -> node/shop/front/tcp/80
                  tcp 30081 -> node/shop/near/tcp/80
                refused-node-ports:
                  tcp 30082
                node/shop/front/tcp/80:
                  mark 0x4000
                  Hash([IpSaddr]) [(10.1.0.4, 8080), (10.1.0.5, 8080)]
                node/shop/near/tcp/80:
                  to 10.1.0.4:8080
                own/shop/near/tcp/80:
                  to 10.1.0.4:8080
                svc/shop/far/tcp/80:
                  to 10.1.0.5:8080
                svc/shop/front/tcp/80:
                  Hash([IpSaddr]) [(10.1.0.4, 8080), (10.1.0.5, 8080)]
                svc/shop/near/tcp/80:
                  Random [(10.1.0.4, 8080), (10.1.0.5, 8080)]
            "#]],
        );
    }

    #[test]
    fn every_way_in_asks_for_the_mark_in_a_vnet() {
        let config = PlanConfig {
            scope: Scope::Mark(7),
            ..machine()
        };
        let table = plan(&World::default(), &config);
        let asks = Statement::Is {
            field: Field::Mark,
            value: Datum::Mark(7),
            negate: false,
        };
        for chain in table
            .chains
            .iter()
            .filter(|c| c.hook.is_some() && c.name != "masquerade")
        {
            for rule in &chain.rules {
                assert_eq!(rule.statements[0], asks, "{}", chain.name);
            }
        }
        assert!(
            table
                .chains
                .iter()
                .all(|c| c.hook.is_none_or(|h| h.point != HookPoint::Output))
        );
    }

    #[test]
    fn long_names_stay_within_the_kernels_limit() {
        let (ns, name) = ("n".repeat(63), "s".repeat(63));
        let s = service(
            &ns,
            &name,
            json!({"clusterIP": "10.0.1.1", "ports": [{"port": 65535}, {"port": 65534}]}),
        );
        let ends = slice(&ns, &name, json!([{"port": 1}]), &[("10.1.0.4", "n1", true)]);
        let table = plan(&World::new(&[s], &[ends], "n1"), &machine());
        let names: BTreeSet<&str> = table.chains.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names.len(), table.chains.len());
        assert!(names.iter().all(|n| n.len() <= 127));
    }
}

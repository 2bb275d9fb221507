//! Names of a cluster and what they resolve to. Pure; built anew from each [`World`].
//!
//! # Source
//! Kubernetes "DNS-Based Service Discovery" 1.1.0, and its additions for hostnames and pod addresses.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::world::{Endpoint, ServiceEntry, ServiceKind, World};

/// Version of the schema that `dns-version.<domain>` answers.
const SCHEMA_VERSION: &str = "1.1.0";

/// What is asked for; names are lower case, without the final dot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    A,
    Aaaa,
    Srv,
    Ptr,
    Cname,
    Txt,
    Soa,
    Any,
    /// A type that no name here has.
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Owner, lower case, without the final dot.
    pub name: String,
    pub data: Data,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Srv { weight: u16, port: u16, target: String },
    Ptr(String),
    Cname(String),
    Txt(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Ask somebody else.
    NotOurs,
    /// The name is ours, and the cluster's objects are not known yet.
    NotYet,
    /// The name is ours and does not exist.
    NoSuchName,
    /// The name exists; `answers` may be empty. An alias to a foreign name is answered as the alias alone.
    Found {
        answers: Vec<Record>,
        additionals: Vec<Record>,
    },
}

#[derive(Clone, Debug, Default)]
pub struct Zone {
    domain: String,
    /// Nothing is known of the cluster: no name may be denied.
    unknown: bool,
    services: HashMap<(String, String), Names>,
    namespaces: HashSet<String>,
    reverse: HashMap<IpAddr, Vec<String>>,
}

#[derive(Clone, Debug)]
struct Names {
    kind: ServiceKind,
    /// Port name, protocol, number.
    ports: Vec<(String, &'static str, u16)>,
    endpoints: Vec<Endpoint>,
}

/// First label of an endpoint of a headless Service.
fn label(endpoint: &Endpoint) -> String {
    endpoint
        .hostname
        .as_ref()
        .map_or_else(|| dashed(endpoint.address), |h| h.to_ascii_lowercase())
}

fn dashed(address: IpAddr) -> String {
    address.to_string().replace(['.', ':'], "-")
}

fn undashed(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
    v4.or_else(|_| label.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6))
        .ok()
}

fn address_record(name: &str, address: IpAddr) -> Record {
    let data = match address {
        IpAddr::V4(a) => Data::A(a),
        IpAddr::V6(a) => Data::Aaaa(a),
    };
    Record {
        name: name.to_owned(),
        data,
    }
}

impl Data {
    fn is(&self, kind: Kind) -> bool {
        match self {
            Self::A(_) => matches!(kind, Kind::A | Kind::Any),
            Self::Aaaa(_) => matches!(kind, Kind::Aaaa | Kind::Any),
            Self::Srv { .. } => matches!(kind, Kind::Srv | Kind::Any),
            Self::Ptr(_) => matches!(kind, Kind::Ptr | Kind::Any),
            Self::Txt(_) => matches!(kind, Kind::Txt | Kind::Any),
            // An alias answers for every type.
            Self::Cname(_) => true,
        }
    }
}

impl Zone {
    /// `domain` such as `cluster.local`.
    pub fn new(domain: &str, world: &World) -> Self {
        let domain = domain.trim_end_matches('.').to_ascii_lowercase();
        let mut zone = Self {
            domain,
            ..Self::default()
        };
        for service in &world.services {
            zone.add(service);
        }
        zone
    }

    /// A zone before the first look at the cluster.
    pub fn unknown(domain: &str) -> Self {
        Self {
            unknown: true,
            ..Self::new(domain, &World::default())
        }
    }

    pub fn domain(&self) -> &str {
        &self.domain
    }

    fn add(&mut self, service: &ServiceEntry) {
        let base = format!("{}.{}.svc.{}", service.name, service.namespace, self.domain);
        match &service.kind {
            ServiceKind::ClusterIp(ips) => {
                for ip in ips {
                    self.reverse.entry(*ip).or_default().push(base.clone());
                }
            }
            ServiceKind::Headless => {
                for endpoint in &service.endpoints {
                    self.reverse
                        .entry(endpoint.address)
                        .or_default()
                        .push(format!("{}.{base}", label(endpoint)));
                }
            }
            ServiceKind::ExternalName(_) | ServiceKind::Pending => {}
        }
        self.namespaces.insert(service.namespace.clone());
        self.services.insert(
            (service.namespace.clone(), service.name.clone()),
            Names {
                kind: service.kind.clone(),
                ports: service
                    .ports
                    .iter()
                    .map(|p| (p.name.clone(), p.protocol.as_str(), p.port))
                    .collect(),
                endpoints: service.endpoints.clone(),
            },
        );
    }

    /// Resolves `name` (lower case, no final dot).
    pub fn lookup(&self, name: &str, kind: Kind) -> Lookup {
        if let Some(address) = reverse_address(name) {
            return match self.reverse.get(&address) {
                None => Lookup::NotOurs,
                Some(names) => {
                    let records = names
                        .iter()
                        .map(|n| Record {
                            name: name.to_owned(),
                            data: Data::Ptr(n.clone()),
                        })
                        .collect();
                    self.found(records, kind)
                }
            };
        }
        if name == self.domain {
            return self.found(Vec::new(), kind);
        }
        let Some(rest) = name.strip_suffix(&self.domain).and_then(|r| r.strip_suffix('.')) else {
            return Lookup::NotOurs;
        };
        if self.unknown {
            return Lookup::NotYet;
        }
        let labels: Vec<&str> = rest.rsplit('.').collect();
        match labels[..] {
            ["dns-version"] => {
                let version = Data::Txt(SCHEMA_VERSION.to_owned());
                self.found(
                    vec![Record {
                        name: name.to_owned(),
                        data: version,
                    }],
                    kind,
                )
            }
            ["svc"] | ["pod"] => self.found(Vec::new(), kind),
            ["svc", ns] if self.namespaces.contains(ns) => self.found(Vec::new(), kind),
            // Any namespace may have pods; none of them is known here.
            ["pod", ns] if self.namespaces.contains(ns) => self.found(Vec::new(), kind),
            ["pod", ns, address] if self.namespaces.contains(ns) => match undashed(address) {
                Some(address) => self.found(vec![address_record(name, address)], kind),
                None => Lookup::NoSuchName,
            },
            ["svc", ns, service, ref more @ ..] => {
                let Some(names) = self.services.get(&(ns.to_owned(), service.to_owned())) else {
                    return Lookup::NoSuchName;
                };
                match *more {
                    [] => self.found(self.service_records(name, names), kind),
                    [endpoint] if !endpoint.starts_with('_') => self.endpoint(name, names, endpoint, kind),
                    [protocol] if names.ports.iter().any(|p| p.1 == protocol.trim_start_matches('_')) => {
                        self.found(Vec::new(), kind)
                    }
                    [protocol, port] => self.srv(
                        name,
                        &format!("{service}.{ns}.svc.{}", self.domain),
                        names,
                        protocol,
                        port,
                        kind,
                    ),
                    _ => Lookup::NoSuchName,
                }
            }
            _ => Lookup::NoSuchName,
        }
    }

    fn found(&self, mut answers: Vec<Record>, kind: Kind) -> Lookup {
        answers.retain(|r| r.data.is(kind));
        Lookup::Found {
            answers,
            additionals: Vec::new(),
        }
    }

    fn service_records(&self, name: &str, names: &Names) -> Vec<Record> {
        match &names.kind {
            ServiceKind::ClusterIp(ips) => ips.iter().map(|ip| address_record(name, *ip)).collect(),
            ServiceKind::Headless => names
                .endpoints
                .iter()
                .map(|e| address_record(name, e.address))
                .collect(),
            ServiceKind::ExternalName(target) if !target.is_empty() => {
                vec![Record {
                    name: name.to_owned(),
                    data: Data::Cname(target.clone()),
                }]
            }
            ServiceKind::ExternalName(_) | ServiceKind::Pending => Vec::new(),
        }
    }

    fn endpoint(&self, name: &str, names: &Names, wanted: &str, kind: Kind) -> Lookup {
        if names.kind != ServiceKind::Headless {
            return Lookup::NoSuchName;
        }
        let records: Vec<Record> = names
            .endpoints
            .iter()
            .filter(|e| label(e) == wanted)
            .map(|e| address_record(name, e.address))
            .collect();
        if records.is_empty() {
            Lookup::NoSuchName
        } else {
            self.found(records, kind)
        }
    }

    fn srv(&self, name: &str, base: &str, names: &Names, protocol: &str, port: &str, kind: Kind) -> Lookup {
        let (Some(protocol), Some(port)) = (protocol.strip_prefix('_'), port.strip_prefix('_')) else {
            return Lookup::NoSuchName;
        };
        let mut targets: Vec<(String, u16, Vec<IpAddr>)> = Vec::new();
        match &names.kind {
            ServiceKind::ClusterIp(ips) => {
                for (_, _, number) in names.ports.iter().filter(|p| p.0 == port && p.1 == protocol) {
                    targets.push((base.to_owned(), *number, ips.clone()));
                }
            }
            ServiceKind::Headless => {
                for endpoint in &names.endpoints {
                    for (_, _, number) in endpoint
                        .ports
                        .iter()
                        .filter(|p| p.0 == port && p.1.as_str() == protocol)
                    {
                        targets.push((format!("{}.{base}", label(endpoint)), *number, vec![endpoint.address]));
                    }
                }
            }
            ServiceKind::ExternalName(_) | ServiceKind::Pending => {}
        }
        if targets.is_empty() {
            return Lookup::NoSuchName;
        }
        if !matches!(kind, Kind::Srv | Kind::Any) {
            return self.found(Vec::new(), kind);
        }
        let weight = u16::try_from(100 / targets.len()).unwrap_or(1).max(1);
        let (mut answers, mut additionals) = (Vec::new(), Vec::new());
        for (target, port, addresses) in targets {
            additionals.extend(addresses.into_iter().map(|a| address_record(&target, a)));
            answers.push(Record {
                name: name.to_owned(),
                data: Data::Srv { weight, port, target },
            });
        }
        Lookup::Found { answers, additionals }
    }
}

/// The address of a name below `in-addr.arpa` or `ip6.arpa`.
fn reverse_address(name: &str) -> Option<IpAddr> {
    if let Some(rest) = name.strip_suffix(".in-addr.arpa") {
        let mut octets: Vec<&str> = rest.split('.').collect();
        octets.reverse();
        return octets.join(".").parse::<Ipv4Addr>().ok().map(IpAddr::V4);
    }
    let digits: String = name.strip_suffix(".ip6.arpa")?.split('.').rev().collect();
    if digits.len() != 32 {
        return None;
    }
    u128::from_str_radix(&digits, 16).ok().map(|n| IpAddr::V6(n.into()))
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use serde_json::json;

    use super::*;
    use crate::world::tests::{service, slice};

    pub(crate) fn zone() -> Zone {
        let web = service(
            "shop",
            "web",
            json!({"clusterIP": "10.0.0.5", "ports": [{"name": "http", "port": 80}]}),
        );
        let db = service(
            "shop",
            "db",
            json!({"clusterIP": "None", "ports": [{"name": "sql", "port": 5432}]}),
        );
        let idle = service("shop", "idle", json!({"clusterIP": "None", "ports": []}));
        let out = service(
            "shop",
            "out",
            json!({"type": "ExternalName", "externalName": "Example.org."}),
        );
        let ports = json!([{"name": "sql", "port": 5433, "protocol": "TCP"}]);
        let mut ends = (*slice(
            "shop",
            "db",
            ports,
            &[
                ("10.1.0.4", "n", true),
                ("10.1.0.5", "n", true),
                ("10.1.0.6", "n", false),
            ],
        ))
        .clone();
        ends.endpoints.as_mut().unwrap()[0].hostname = Some("db-0".into());
        let world = World::new(&[web, db, idle, out], &[std::sync::Arc::new(ends)], "n");
        Zone::new("Cluster.Local.", &world)
    }

    fn check(name: &str, kind: Kind, want: Expect) {
        let data = |r: &Record| match &r.data {
            Data::A(a) => format!("A {a}"),
            Data::Aaaa(a) => format!("AAAA {a}"),
            Data::Srv { weight, port, target } => format!("SRV {weight} {port} {target}"),
            Data::Ptr(n) => format!("PTR {n}"),
            Data::Cname(n) => format!("CNAME {n}"),
            Data::Txt(t) => format!("TXT {t}"),
        };
        want.assert_eq(&match zone().lookup(name, kind) {
            Lookup::NotOurs => "not ours".to_owned(),
            Lookup::NotYet => "not yet".to_owned(),
            Lookup::NoSuchName => "no such name".to_owned(),
            Lookup::Found { answers, additionals } => {
                let answers = answers.iter().map(data).collect::<Vec<_>>().join(", ");
                let more: Vec<String> = additionals.iter().map(|r| format!("{} {}", r.name, data(r))).collect();
                if more.is_empty() {
                    format!("[{answers}]")
                } else {
                    format!("[{answers}] + [{}]", more.join(", "))
                }
            }
        });
    }

    #[test]
    fn services_and_endpoints() {
        check("web.shop.svc.cluster.local", Kind::A, expect!["[A 10.0.0.5]"]);
        check("web.shop.svc.cluster.local", Kind::Aaaa, expect!["[]"]);
        check("web.shop.svc.cluster.local", Kind::Other, expect!["[]"]);
        check(
            "db.shop.svc.cluster.local",
            Kind::A,
            expect!["[A 10.1.0.4, A 10.1.0.5]"],
        );
        check("db-0.db.shop.svc.cluster.local", Kind::A, expect!["[A 10.1.0.4]"]);
        check("10-1-0-5.db.shop.svc.cluster.local", Kind::A, expect!["[A 10.1.0.5]"]);
        check("10-1-0-6.db.shop.svc.cluster.local", Kind::A, expect!["no such name"]);
        check("db-0.web.shop.svc.cluster.local", Kind::A, expect!["no such name"]);
        check("idle.shop.svc.cluster.local", Kind::A, expect!["[]"]);
        check("out.shop.svc.cluster.local", Kind::A, expect!["[CNAME example.org]"]);
        check("10-1-0-9.shop.pod.cluster.local", Kind::A, expect!["[A 10.1.0.9]"]);
        check("10-1-0-900.shop.pod.cluster.local", Kind::A, expect!["no such name"]);
        check("dns-version.cluster.local", Kind::Txt, expect!["[TXT 1.1.0]"]);
    }

    #[test]
    fn ports_and_reverse_names() {
        check(
            "_http._tcp.web.shop.svc.cluster.local",
            Kind::Srv,
            expect!["[SRV 100 80 web.shop.svc.cluster.local] + [web.shop.svc.cluster.local A 10.0.0.5]"],
        );
        check(
            "_sql._tcp.db.shop.svc.cluster.local",
            Kind::Srv,
            expect![
                "[SRV 50 5433 db-0.db.shop.svc.cluster.local, SRV 50 5433 10-1-0-5.db.shop.svc.cluster.local] + [db-0.db.shop.svc.cluster.local A 10.1.0.4, 10-1-0-5.db.shop.svc.cluster.local A 10.1.0.5]"
            ],
        );
        check(
            "_sql._udp.db.shop.svc.cluster.local",
            Kind::Srv,
            expect!["no such name"],
        );
        check("_http._tcp.web.shop.svc.cluster.local", Kind::A, expect!["[]"]);
        check(
            "5.0.0.10.in-addr.arpa",
            Kind::Ptr,
            expect!["[PTR web.shop.svc.cluster.local]"],
        );
        check(
            "4.0.1.10.in-addr.arpa",
            Kind::Ptr,
            expect!["[PTR db-0.db.shop.svc.cluster.local]"],
        );
        check("9.9.9.9.in-addr.arpa", Kind::Ptr, expect!["not ours"]);
    }

    #[test]
    fn names_on_the_way_exist_and_others_do_not() {
        for name in [
            "cluster.local",
            "svc.cluster.local",
            "shop.svc.cluster.local",
            "shop.pod.cluster.local",
        ] {
            check(name, Kind::A, expect!["[]"]);
        }
        // What a resolver's search list produces on the way to a name outside.
        for name in [
            "example.org.shop.svc.cluster.local",
            "example.org.svc.cluster.local",
            "example.org.cluster.local",
            "web.other.svc.cluster.local",
            "web.shop.cluster.local",
            "a..b.cluster.local",
            ".cluster.local",
        ] {
            check(name, Kind::A, expect!["no such name"]);
        }
        check("example.org", Kind::A, expect!["not ours"]);
        check("notcluster.local", Kind::A, expect!["not ours"]);
        check("xcluster.local", Kind::A, expect!["not ours"]);
        let unknown = Zone::unknown("cluster.local");
        assert_eq!(unknown.lookup("web.shop.svc.cluster.local", Kind::A), Lookup::NotYet);
        assert_eq!(unknown.lookup("example.org", Kind::A), Lookup::NotOurs);
    }
}

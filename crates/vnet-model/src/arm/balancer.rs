//! Load balancers' bodies: frontends, pools, probes and rules, read and checked against each other.

use std::net::Ipv4Addr;

use serde_json::Value;
use thiserror::Error;

use crate::balancer::{Distribution, ProbeKind};
use crate::check::FIRST_SNAT_PORT;
use crate::fabric::Protocol;

/// Minutes that a flow may be idle: by rules, and by outbound rules.
const IDLE_MINUTES: std::ops::RangeInclusive<u64> = 4..=100;
const IDLE_DEFAULT: u64 = 4;
/// SNAT ports of one frontend address.
pub const SNAT_PORTS: u32 = 64_000;

/// What is wrong with a body, and where.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
#[error("{path}: {problem}")]
pub struct BalancerError {
    /// JSON path.
    pub path: String,
    /// ARM's error code.
    pub code: &'static str,
    pub problem: String,
}

type Result<T> = std::result::Result<T, BalancerError>;

fn fail<T>(path: impl Into<String>, code: &'static str, problem: impl Into<String>) -> Result<T> {
    Err(BalancerError {
        path: path.into(),
        code,
        problem: problem.into(),
    })
}

/// A load balancer as its body says it. Names of its own parts are as they were sent there and compared without regard to
/// case.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Balancer {
    pub standard: bool,
    pub frontends: Vec<Frontend>,
    pub pools: Vec<Pool>,
    pub probes: Vec<Probe>,
    pub rules: Vec<BalancingRule>,
    pub nat_rules: Vec<NatRule>,
    pub outbound_rules: Vec<OutboundRule>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Frontend {
    pub name: String,
    pub place: Place,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Place {
    /// ARM id of a public address.
    Public { address: String },
    /// ARM id of a subnet; an address if it is static.
    Internal { subnet: String, address: Option<Ipv4Addr> },
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pool {
    pub name: String,
    /// Members by address; others name the pool at their NICs.
    pub addresses: Vec<PoolAddress>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PoolAddress {
    pub address: Ipv4Addr,
    /// ARM id of the virtual network, or of a subnet in it.
    pub network: String,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Probe {
    pub name: String,
    pub kind: ProbeKind,
    pub port: u16,
    pub interval_s: u32,
    pub threshold: u32,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BalancingRule {
    pub name: String,
    pub frontend: String,
    pub pools: Vec<String>,
    pub probe: Option<String>,
    pub protocol: Protocol,
    /// 0 with [`Protocol::All`]: every port.
    pub frontend_port: u16,
    pub backend_port: u16,
    pub distribution: Distribution,
    pub idle_timeout_s: u32,
    pub tcp_reset: bool,
    /// The pool's members leave by the rule's frontend.
    pub outbound_snat: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NatRule {
    pub name: String,
    pub frontend: String,
    pub protocol: Protocol,
    pub ports: NatPorts,
    pub backend_port: u16,
    pub idle_timeout_s: u32,
    pub tcp_reset: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NatPorts {
    /// To the one NIC that names the rule.
    One(u16),
    /// One port per member of the pool, in the order of their addresses.
    Range { first: u16, last: u16, pool: String },
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OutboundRule {
    pub name: String,
    pub frontends: Vec<String>,
    pub pool: String,
    pub protocol: Protocol,
    /// 0: by the size of the pool.
    pub ports: u32,
    pub idle_timeout_s: u32,
}

impl Balancer {
    /// Reads and checks `body` of the load balancer with this ARM id.
    /// # Errors
    /// The first field that is missing, malformed, not served, or at odds with another one.
    pub fn parse(id: &str, body: &Value) -> Result<Self> {
        let sku = text(&body["sku"], "name");
        let standard = match sku.to_ascii_lowercase().as_str() {
            "standard" => true,
            "" | "basic" => false,
            _ => {
                return fail(
                    "sku.name",
                    "InvalidRequestContent",
                    format!("{sku:?} is not Basic or Standard; it is not served"),
                );
            }
        };
        let tier = text(&body["sku"], "tier");
        if tier.eq_ignore_ascii_case("global") {
            return fail(
                "sku.tier",
                "UnsupportedProperty",
                "load balancers across regions are not served; use Regional",
            );
        }
        let p = &body["properties"];
        let list = |name: &str| named(p, name);
        for name in ["inboundNatPools"] {
            if p[name].as_array().is_some_and(|a| !a.is_empty()) {
                let problem = "pools of inbound NAT ports are not served; use inboundNatRules with a range of ports";
                return fail(format!("properties.{name}"), "UnsupportedProperty", problem);
            }
        }
        let mut out = Self {
            standard,
            ..Self::default()
        };
        for part in list("frontendIPConfigurations")? {
            out.frontends.push(frontend(&part)?);
        }
        if out.frontends.windows(2).any(|w| is_public(&w[0]) != is_public(&w[1])) {
            let problem = "public and internal frontends cannot be mixed in one load balancer";
            return fail(
                "properties.frontendIPConfigurations",
                "LoadBalancerFrontendIPConfigurationsMixed",
                problem,
            );
        }
        for part in list("backendAddressPools")? {
            out.pools.push(pool(&part)?);
        }
        for part in list("probes")? {
            out.probes.push(probe(&part)?);
        }
        for part in list("loadBalancingRules")? {
            let rule = out.rule(id, &part)?;
            out.rules.push(rule);
        }
        for part in list("inboundNatRules")? {
            let rule = out.nat_rule(id, &part)?;
            out.nat_rules.push(rule);
        }
        for part in list("outboundRules")? {
            let rule = out.outbound_rule(id, &part)?;
            out.outbound_rules.push(rule);
        }
        out.conflicts()?;
        Ok(out)
    }

    pub fn frontend(&self, name: &str) -> Option<&Frontend> {
        self.frontends.iter().find(|f| f.name.eq_ignore_ascii_case(name))
    }

    pub fn pool(&self, name: &str) -> Option<&Pool> {
        self.pools.iter().find(|f| f.name.eq_ignore_ascii_case(name))
    }

    pub fn probe(&self, name: &str) -> Option<&Probe> {
        self.probes.iter().find(|f| f.name.eq_ignore_ascii_case(name))
    }

    /// Name of one of this load balancer's own parts that `reference` names by ARM id.
    fn part(&self, id: &str, reference: &Value, kind: &str, path: String) -> Result<String> {
        let Some(wanted) = reference["id"].as_str() else {
            return fail(path, "InvalidRequestContent", "is missing");
        };
        let names: Vec<&str> = match kind {
            "frontendIPConfigurations" => self.frontends.iter().map(|f| f.name.as_str()).collect(),
            "backendAddressPools" => self.pools.iter().map(|f| f.name.as_str()).collect(),
            _ => self.probes.iter().map(|f| f.name.as_str()).collect(),
        };
        let found = names
            .into_iter()
            .find(|n| wanted.eq_ignore_ascii_case(&format!("{id}/{kind}/{n}")));
        match found {
            Some(name) => Ok(name.to_owned()),
            None => fail(
                path,
                "InvalidResourceReference",
                format!("{wanted} is not a part of this load balancer"),
            ),
        }
    }

    fn rule(&self, id: &str, part: &Part<'_>) -> Result<BalancingRule> {
        let p = part.properties;
        not_floating(part)?;
        let frontend = self.part(
            id,
            &p["frontendIPConfiguration"],
            "frontendIPConfigurations",
            part.at("frontendIPConfiguration"),
        )?;
        let mut pools = Vec::new();
        if !p["backendAddressPool"].is_null() {
            pools.push(self.part(
                id,
                &p["backendAddressPool"],
                "backendAddressPools",
                part.at("backendAddressPool"),
            )?);
        }
        for reference in array(&p["backendAddressPools"]) {
            let name = self.part(id, reference, "backendAddressPools", part.at("backendAddressPools"))?;
            if !pools.contains(&name) {
                pools.push(name);
            }
        }
        let probe = match &p["probe"] {
            Value::Null => None,
            reference => Some(self.part(id, reference, "probes", part.at("probe"))?),
        };
        let protocol = protocol(part)?;
        let lowest = if protocol == Protocol::All { 0 } else { 1 };
        let frontend_port = port(part, "frontendPort", lowest)?;
        let backend_port = port(part, "backendPort", lowest)?;
        if protocol == Protocol::All {
            let internal = self.frontend(&frontend).is_some_and(|f| !is_public(f));
            if frontend_port != 0 || backend_port != 0 || !internal || !self.standard {
                let problem =
                    "protocol All is for every port at once: both ports 0, an internal frontend, sku Standard";
                return fail(part.at("protocol"), "LoadBalancingRuleInvalidHaPorts", problem);
            }
        }
        let distribution = match text(p, "loadDistribution").to_ascii_lowercase().as_str() {
            "" | "default" => Distribution::FiveTuple,
            "sourceip" => Distribution::SourceIp,
            "sourceipprotocol" => Distribution::SourceIpProtocol,
            other => {
                let problem = format!("{other:?} is not Default, SourceIP or SourceIPProtocol");
                return fail(part.at("loadDistribution"), "InvalidRequestContent", problem);
            }
        };
        Ok(BalancingRule {
            name: part.name.clone(),
            frontend,
            pools,
            probe,
            protocol,
            frontend_port,
            backend_port,
            distribution,
            idle_timeout_s: idle(part)?,
            tcp_reset: flag(part, "enableTcpReset")?,
            outbound_snat: !flag(part, "disableOutboundSnat")?,
        })
    }

    fn nat_rule(&self, id: &str, part: &Part<'_>) -> Result<NatRule> {
        let p = part.properties;
        not_floating(part)?;
        let frontend = self.part(
            id,
            &p["frontendIPConfiguration"],
            "frontendIPConfigurations",
            part.at("frontendIPConfiguration"),
        )?;
        let ports = if p["backendAddressPool"].is_null() {
            NatPorts::One(port(part, "frontendPort", 1)?)
        } else {
            let first = port(part, "frontendPortRangeStart", 1)?;
            let last = port(part, "frontendPortRangeEnd", 1)?;
            if last < first {
                return fail(
                    part.at("frontendPortRangeEnd"),
                    "InvalidRequestContent",
                    "is below frontendPortRangeStart",
                );
            }
            let pool = self.part(
                id,
                &p["backendAddressPool"],
                "backendAddressPools",
                part.at("backendAddressPool"),
            )?;
            NatPorts::Range { first, last, pool }
        };
        let protocol = protocol(part)?;
        if protocol == Protocol::All {
            return fail(
                part.at("protocol"),
                "UnsupportedProperty",
                "an inbound NAT rule for all protocols is not served; use Tcp or Udp",
            );
        }
        Ok(NatRule {
            name: part.name.clone(),
            frontend,
            protocol,
            ports,
            backend_port: port(part, "backendPort", 1)?,
            idle_timeout_s: idle(part)?,
            tcp_reset: flag(part, "enableTcpReset")?,
        })
    }

    fn outbound_rule(&self, id: &str, part: &Part<'_>) -> Result<OutboundRule> {
        let p = part.properties;
        if !self.standard {
            return fail(
                part.at("frontendIPConfigurations"),
                "UnsupportedProperty",
                "outbound rules need sku Standard",
            );
        }
        let mut frontends = Vec::new();
        for reference in array(&p["frontendIPConfigurations"]) {
            let path = part.at("frontendIPConfigurations");
            let name = self.part(id, reference, "frontendIPConfigurations", path.clone())?;
            if self.frontend(&name).is_some_and(|f| !is_public(f)) {
                return fail(
                    path,
                    "OutboundRuleCannotUseInternalFrontendIPConfiguration",
                    format!("{name} is internal"),
                );
            }
            frontends.push(name);
        }
        if frontends.is_empty() {
            return fail(
                part.at("frontendIPConfigurations"),
                "InvalidRequestContent",
                "an outbound rule needs a frontend",
            );
        }
        let pool = self.part(
            id,
            &p["backendAddressPool"],
            "backendAddressPools",
            part.at("backendAddressPool"),
        )?;
        let ports = p["allocatedOutboundPorts"].as_u64().unwrap_or(0);
        let most = u64::from(SNAT_PORTS);
        if !ports.is_multiple_of(8) || ports > most {
            let problem = format!("{ports} is not a multiple of 8 from 0 to {most}");
            return fail(
                part.at("allocatedOutboundPorts"),
                "OutboundRuleInvalidAllocatedOutboundPorts",
                problem,
            );
        }
        Ok(OutboundRule {
            name: part.name.clone(),
            frontends,
            pool,
            protocol: protocol(part)?,
            ports: ports as u32,
            idle_timeout_s: idle(part)?,
        })
    }

    /// Rules that cannot stand beside each other.
    fn conflicts(&self) -> Result<()> {
        // What each rule takes of its frontend: name, frontend, protocol, first and last port.
        let rules = self
            .rules
            .iter()
            .map(|r| (&r.name, &r.frontend, r.protocol, r.frontend_port, r.frontend_port));
        let nat = self.nat_rules.iter().map(|r| {
            let (first, last) = match r.ports {
                NatPorts::One(port) => (port, port),
                NatPorts::Range { first, last, .. } => (first, last),
            };
            (&r.name, &r.frontend, r.protocol, first, last)
        });
        let taken: Vec<_> = rules.chain(nat).collect();
        for (n, a) in taken.iter().enumerate() {
            let same = |b: &&(&String, &String, Protocol, u16, u16)| {
                a.1.eq_ignore_ascii_case(b.1) && a.2 == b.2 && a.3 <= b.4 && b.3 <= a.4
            };
            if let Some(b) = taken[..n].iter().find(same) {
                let problem = format!("rules {} and {} use the same frontend, protocol and port", b.0, a.0);
                return fail(
                    "properties.loadBalancingRules",
                    "RulesUseSameFrontendPortProtocolAndIPConfig",
                    problem,
                );
            }
        }
        for (n, a) in self.rules.iter().enumerate() {
            let same = |b: &&BalancingRule| {
                a.protocol == b.protocol
                    && a.backend_port == b.backend_port
                    && a.pools
                        .iter()
                        .any(|p| b.pools.iter().any(|q| p.eq_ignore_ascii_case(q)))
            };
            if let Some(b) = self.rules[..n].iter().find(same) {
                let problem = format!(
                    "rules {} and {} with floating IP disabled use the same protocol and backend port {}, and must not be used with the same backend address pool",
                    b.name, a.name, a.backend_port
                );
                let path = format!("properties.loadBalancingRules[{n}].properties.backendPort");
                return fail(path, "RulesUseSameBackendPortProtocolAndPool", problem);
            }
        }
        for (n, a) in self.outbound_rules.iter().enumerate() {
            let path = format!("properties.outboundRules[{n}]");
            let both = |b: &&OutboundRule| {
                let overlap = a.protocol == b.protocol || a.protocol == Protocol::All || b.protocol == Protocol::All;
                let frontend = a
                    .frontends
                    .iter()
                    .any(|f| b.frontends.iter().any(|g| f.eq_ignore_ascii_case(g)));
                overlap && (frontend || a.pool.eq_ignore_ascii_case(&b.pool))
            };
            if let Some(b) = self.outbound_rules[..n].iter().find(both) {
                let code = "MoreThanOneOutboundRuleUsingSameFrontendIPConfigurationAndProtocolIsNotSupported";
                let problem = format!(
                    "{} and {} have a frontend or a pool in common for one protocol",
                    b.name, a.name
                );
                return fail(path, code, problem);
            }
            let implicit =
                |r: &&BalancingRule| r.outbound_snat && a.frontends.iter().any(|f| f.eq_ignore_ascii_case(&r.frontend));
            if let Some(rule) = self.rules.iter().find(implicit) {
                let code = "LoadBalancingRuleMustDisableSNATSinceSameFrontendIPConfigurationIsReferencedByOutboundRule";
                let problem = format!(
                    "rule {} must set disableOutboundSnat: outbound rule {} uses its frontend",
                    rule.name, a.name
                );
                return fail(path, code, problem);
            }
        }
        Ok(())
    }
}

/// SNAT ports per member of a pool of `members` unless a number is given.
pub fn default_ports(members: usize) -> u32 {
    match members {
        0..=50 => 1024,
        51..=100 => 512,
        101..=200 => 256,
        201..=400 => 128,
        401..=800 => 64,
        _ => 32,
    }
}

/// The ports of member `index` of a pool whose members have `ports` each at `frontends` addresses: which address, first and
/// last port. `None`: there is no room for it.
pub fn snat_block(index: usize, ports: u32, frontends: usize) -> Option<(usize, u16, u16)> {
    let per_address = (SNAT_PORTS.checked_div(ports)?) as usize;
    let address = index.checked_div(per_address)?;
    let first = u32::from(FIRST_SNAT_PORT) + (index % per_address) as u32 * ports;
    let last = u16::try_from(first + ports - 1).ok()?;
    (address < frontends).then_some((address, u16::try_from(first).ok()?, last))
}

/// One named element of a list.
struct Part<'a> {
    name: String,
    path: String,
    properties: &'a Value,
}

impl Part<'_> {
    fn at(&self, field: &str) -> String {
        format!("{}.properties.{field}", self.path)
    }
}

fn named<'a>(p: &'a Value, list: &str) -> Result<Vec<Part<'a>>> {
    let mut out: Vec<Part<'a>> = Vec::new();
    for (n, v) in array(&p[list]).iter().enumerate() {
        let path = format!("properties.{list}[{n}]");
        let name = text(v, "name");
        if name.is_empty() || name.len() > 80 {
            return fail(
                format!("{path}.name"),
                "InvalidResourceName",
                "it needs a name of at most 80 characters",
            );
        }
        if out.iter().any(|o| o.name.eq_ignore_ascii_case(name)) {
            let problem = format!("there are two named '{name}'");
            return fail(format!("{path}.name"), "DuplicateResourceName", problem);
        }
        out.push(Part {
            name: name.to_owned(),
            path,
            properties: &v["properties"],
        });
    }
    Ok(out)
}

fn frontend(part: &Part<'_>) -> Result<Frontend> {
    let p = part.properties;
    for field in ["publicIPPrefix", "gatewayLoadBalancer"] {
        if !p[field].is_null() {
            return fail(part.at(field), "UnsupportedProperty", "is not served; leave it out");
        }
    }
    if text(p, "privateIPAddressVersion").eq_ignore_ascii_case("IPv6") {
        return fail(
            part.at("privateIPAddressVersion"),
            "UnsupportedProperty",
            "IPv6 is not served; use IPv4",
        );
    }
    let (public, subnet) = (text(&p["publicIPAddress"], "id"), text(&p["subnet"], "id"));
    let place = match (public.is_empty(), subnet.is_empty()) {
        (false, true) => Place::Public {
            address: public.to_owned(),
        },
        (true, false) => Place::Internal {
            subnet: subnet.to_owned(),
            address: static_address(part)?,
        },
        _ => {
            let problem = "a frontend has either publicIPAddress.id or subnet.id";
            return fail(part.path.clone(), "InvalidRequestContent", problem);
        }
    };
    Ok(Frontend {
        name: part.name.clone(),
        place,
    })
}

fn is_public(f: &Frontend) -> bool {
    matches!(f.place, Place::Public { .. })
}

fn static_address(part: &Part<'_>) -> Result<Option<Ipv4Addr>> {
    let p = part.properties;
    if !text(p, "privateIPAllocationMethod").eq_ignore_ascii_case("static") {
        return Ok(None);
    }
    let address = text(p, "privateIPAddress");
    match address.parse() {
        Ok(address) => Ok(Some(address)),
        Err(_) => {
            let problem = format!("static allocation needs an IPv4 address; it is {address:?}");
            fail(part.at("privateIPAddress"), "InvalidRequestContent", problem)
        }
    }
}

fn pool(part: &Part<'_>) -> Result<Pool> {
    let p = part.properties;
    let mut addresses = Vec::new();
    for (n, v) in array(&p["loadBalancerBackendAddresses"]).iter().enumerate() {
        let q = &v["properties"];
        // Members by NIC are shown in this list, too.
        if q["networkInterfaceIPConfiguration"]["id"].is_string() {
            continue;
        }
        let path = format!("{}[{n}].properties", part.at("loadBalancerBackendAddresses"));
        let Ok(address) = text(q, "ipAddress").parse() else {
            return fail(
                format!("{path}.ipAddress"),
                "InvalidRequestContent",
                "a backend address needs an IPv4 address",
            );
        };
        let network = [&q["subnet"], &q["virtualNetwork"], &p["virtualNetwork"]];
        let Some(network) = network.iter().find_map(|v| v["id"].as_str()) else {
            let problem = "a backend address needs the id of its virtual network or subnet";
            return fail(format!("{path}.virtualNetwork.id"), "InvalidRequestContent", problem);
        };
        addresses.push(PoolAddress {
            address,
            network: network.to_owned(),
        });
    }
    Ok(Pool {
        name: part.name.clone(),
        addresses,
    })
}

fn probe(part: &Part<'_>) -> Result<Probe> {
    let p = part.properties;
    let path = text(p, "requestPath").to_owned();
    let kind = match text(p, "protocol").to_ascii_lowercase().as_str() {
        "tcp" if path.is_empty() => ProbeKind::Tcp,
        "tcp" => {
            return fail(
                part.at("requestPath"),
                "InvalidRequestContent",
                "a Tcp probe has no path",
            );
        }
        "http" | "https" if !path.starts_with('/') || path.contains(char::is_whitespace) => {
            let problem = format!("a probe over HTTP needs a path that starts with /; it is {path:?}");
            return fail(part.at("requestPath"), "InvalidRequestContent", problem);
        }
        "http" => ProbeKind::Http { path },
        "https" => ProbeKind::Https { path },
        other => {
            let problem = format!("{other:?} is not Tcp, Http or Https");
            return fail(part.at("protocol"), "InvalidRequestContent", problem);
        }
    };
    let number = |field: &str, default: u64, least: u64, most: u64| match &p[field] {
        Value::Null => Ok(default),
        v => match v.as_u64().filter(|n| (least..=most).contains(n)) {
            Some(n) => Ok(n),
            None => fail(
                part.at(field),
                "InvalidRequestContent",
                format!("{v} is not a number from {least} to {most}"),
            ),
        },
    };
    // The newer field wins; without either one answer decides.
    let count = number("numberOfProbes", 1, 1, 100)?;
    Ok(Probe {
        name: part.name.clone(),
        kind,
        port: port(part, "port", 1)?,
        interval_s: number("intervalInSeconds", 15, 5, 86_400)? as u32,
        threshold: number("probeThreshold", count, 1, 100)? as u32,
    })
}

fn not_floating(part: &Part<'_>) -> Result<()> {
    if flag(part, "enableFloatingIP")? {
        let problem = "the backend would have to take the frontend's own address, which is not served; leave it false";
        return fail(part.at("enableFloatingIP"), "UnsupportedProperty", problem);
    }
    Ok(())
}

fn protocol(part: &Part<'_>) -> Result<Protocol> {
    let sent = text(part.properties, "protocol");
    match sent.to_ascii_lowercase().as_str() {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        "all" => Ok(Protocol::All),
        _ => fail(
            part.at("protocol"),
            "InvalidRequestContent",
            format!("{sent:?} is not Tcp, Udp or All"),
        ),
    }
}

fn port(part: &Part<'_>, field: &str, least: u16) -> Result<u16> {
    let v = &part.properties[field];
    let number = v.as_u64().and_then(|n| u16::try_from(n).ok()).filter(|n| *n >= least);
    match number {
        Some(n) => Ok(n),
        None => fail(
            part.at(field),
            "InvalidRequestContent",
            format!("{v} is not a port from {least} to 65535"),
        ),
    }
}

fn idle(part: &Part<'_>) -> Result<u32> {
    let v = &part.properties["idleTimeoutInMinutes"];
    let minutes = if v.is_null() { Some(IDLE_DEFAULT) } else { v.as_u64() };
    match minutes.filter(|m| IDLE_MINUTES.contains(m)) {
        Some(m) => Ok(m as u32 * 60),
        None => {
            let problem = format!(
                "{v} is not a number of minutes from {} to {}",
                IDLE_MINUTES.start(),
                IDLE_MINUTES.end()
            );
            fail(part.at("idleTimeoutInMinutes"), "InvalidIdleTimeout", problem)
        }
    }
}

fn flag(part: &Part<'_>, field: &str) -> Result<bool> {
    match &part.properties[field] {
        Value::Null => Ok(false),
        Value::Bool(b) => Ok(*b),
        _ => fail(part.at(field), "InvalidRequestContent", "must be true or false"),
    }
}

fn text<'a>(v: &'a Value, field: &str) -> &'a str {
    v[field].as_str().unwrap_or_default()
}

fn array(v: &Value) -> &[Value] {
    v.as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ID: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/loadBalancers/lb";

    fn reference(kind: &str, name: &str) -> Value {
        json!({"id": format!("{ID}/{kind}/{name}").to_uppercase()})
    }

    fn rule(name: &str, port: u16, backend: u16) -> Value {
        json!({"name": name, "properties": {"frontendIPConfiguration": reference("frontendIPConfigurations", "fe"),
            "backendAddressPool": reference("backendAddressPools", "be"), "probe": reference("probes", "p"),
            "protocol": "TCP", "frontendPort": port, "backendPort": backend, "enableFloatingIP": false,
            "disableOutboundSnat": true}})
    }

    fn body() -> Value {
        json!({"sku": {"name": "Standard"}, "properties": {
            "frontendIPConfigurations": [{"name": "fe", "properties": {"publicIPAddress": {"id": "/pip"}}}],
            "backendAddressPools": [{"name": "be", "properties": {"loadBalancerBackendAddresses": [
                {"name": "a", "properties": {"ipAddress": "10.0.0.9", "virtualNetwork": {"id": "/v"}}}]}}],
            "probes": [{"name": "p", "properties": {"protocol": "Http", "port": 80, "requestPath": "/x", "probeThreshold": 3}}],
            "loadBalancingRules": [rule("web", 80, 8080)],
            "inboundNatRules": [{"name": "ssh", "properties": {"frontendIPConfiguration": reference("frontendIPConfigurations", "fe"),
                "protocol": "Tcp", "frontendPort": 5000, "backendPort": 22, "idleTimeoutInMinutes": 30}}],
            "outboundRules": [{"name": "out", "properties": {"frontendIPConfigurations": [reference("frontendIPConfigurations", "fe")],
                "backendAddressPool": reference("backendAddressPools", "be"), "protocol": "All", "allocatedOutboundPorts": 1000}}]}})
    }

    #[test]
    fn a_body_is_read_as_clients_send_it() {
        let b = Balancer::parse(ID, &body()).unwrap();
        assert_eq!(b.rules[0].idle_timeout_s, 240);
        assert_eq!(
            (b.rules[0].pools.as_slice(), b.rules[0].probe.as_deref()),
            (&["be".to_owned()][..], Some("p"))
        );
        assert!(!b.rules[0].outbound_snat);
        assert_eq!(b.nat_rules[0].ports, NatPorts::One(5000));
        assert_eq!(b.nat_rules[0].idle_timeout_s, 1800);
        assert_eq!(b.outbound_rules[0].ports, 1000);
        assert_eq!((b.probes[0].interval_s, b.probes[0].threshold), (15, 3));
        assert_eq!(b.pools[0].addresses[0].network, "/v");
        assert_eq!(Balancer::parse(ID, &json!({})).unwrap(), Balancer::default());
    }

    #[test]
    fn each_mistake_has_its_place_and_code() {
        let lb = "/properties/loadBalancingRules/0/properties";
        let second = json!([rule("a", 80, 8080), rule("b", 80, 8081)]);
        let backend = json!([rule("a", 80, 8080), rule("b", 81, 8080)]);
        let internal = json!({"subnet": {"id": "/s"}, "privateIPAllocationMethod": "Static"});
        for (at, value, code) in [
            (format!("{lb}/enableFloatingIP"), json!(true), "UnsupportedProperty"),
            (format!("{lb}/frontendPort"), json!(0), "InvalidRequestContent"),
            (format!("{lb}/frontendPort"), json!(70000), "InvalidRequestContent"),
            (format!("{lb}/protocol"), json!("Icmp"), "InvalidRequestContent"),
            (
                format!("{lb}/protocol"),
                json!("All"),
                "LoadBalancingRuleInvalidHaPorts",
            ),
            (
                format!("{lb}/probe"),
                reference("probes", "gone"),
                "InvalidResourceReference",
            ),
            (
                format!("{lb}/backendAddressPool"),
                json!({"id": "/other/lb/backendAddressPools/be"}),
                "InvalidResourceReference",
            ),
            (format!("{lb}/idleTimeoutInMinutes"), json!(3), "InvalidIdleTimeout"),
            (
                format!("{lb}/loadDistribution"),
                json!("Random"),
                "InvalidRequestContent",
            ),
            (
                format!("{lb}/disableOutboundSnat"),
                json!(false),
                "LoadBalancingRuleMustDisableSNATSinceSameFrontendIPConfigurationIsReferencedByOutboundRule",
            ),
            (
                "/properties/loadBalancingRules".into(),
                second,
                "RulesUseSameFrontendPortProtocolAndIPConfig",
            ),
            (
                "/properties/loadBalancingRules".into(),
                backend,
                "RulesUseSameBackendPortProtocolAndPool",
            ),
            (
                "/properties/inboundNatRules/0/properties/frontendPort".into(),
                json!(80),
                "RulesUseSameFrontendPortProtocolAndIPConfig",
            ),
            (
                "/properties/outboundRules/0/properties/allocatedOutboundPorts".into(),
                json!(7),
                "OutboundRuleInvalidAllocatedOutboundPorts",
            ),
            (
                "/properties/probes/0/properties/requestPath".into(),
                json!("x"),
                "InvalidRequestContent",
            ),
            (
                "/properties/probes/0/properties/intervalInSeconds".into(),
                json!(1),
                "InvalidRequestContent",
            ),
            ("/properties/probes/0/name".into(), json!(""), "InvalidResourceName"),
            (
                "/properties/frontendIPConfigurations/0/properties".into(),
                json!({}),
                "InvalidRequestContent",
            ),
            (
                "/properties/frontendIPConfigurations/0/properties".into(),
                internal,
                "InvalidRequestContent",
            ),
            ("/sku/name".into(), json!("Gateway"), "InvalidRequestContent"),
        ] {
            let mut body = body();
            match body.pointer_mut(&at) {
                Some(slot) => *slot = value.clone(),
                None => {
                    let (parent, field) = at.rsplit_once('/').unwrap();
                    body.pointer_mut(parent).unwrap()[field] = value.clone();
                }
            }
            let error = Balancer::parse(ID, &body).unwrap_err();
            assert_eq!(error.code, code, "{at} {value}: {error}");
        }
    }

    #[test]
    fn snat_ports_are_dealt_out_address_by_address() {
        assert_eq!(snat_block(0, 1024, 1), Some((0, 1024, 2047)));
        assert_eq!(snat_block(61, 1024, 1), Some((0, 63488, 64511)));
        assert_eq!(snat_block(62, 1024, 1), None, "64,000 ports are 62 blocks of 1,024");
        assert_eq!(snat_block(62, 1024, 2), Some((1, 1024, 2047)));
        assert_eq!(snat_block(0, 0, 1), None);
        assert_eq!(
            (default_ports(50), default_ports(51), default_ports(2000)),
            (1024, 512, 32)
        );
    }
}

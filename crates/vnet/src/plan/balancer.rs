//! Load balancer frontends: which backend a flow gets, and which flows end when backends or frontends go.
//!
//! ```text
//!  prerouting -101  new flows to a frontend whose backends are all gone or down: refused
//!  prerouting -100  address, protocol, port -> the frontend's chain; else address -> the chain for all its ports
//!                   a frontend's chain: strangers are refused, segments of forgotten flows reset or dropped,
//!                   the idle timeout set, a backend chosen by hash
//!  postrouting  95  a machine that reaches itself is seen with the frontend's address
//! ```
//! Only a flow's first packet meets these chains, so a changed set of backends moves no stream.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use linux::conntrack::Translation;
use linux::nft::{
    Balance, CT_STATUS_DNAT, Chain, ChainKind, CtTimeout, Datum, Element, Family, Field, HookPoint, NatTarget, Reject,
    Rule, Set, Statement, TCP, Table, UDP, Verdict,
};
use vnet_model::WIRE_SERVER;
use vnet_model::fabric::{Distribution, FrontendSpec, Protocol, VnetSpec};

use super::vnet::name;
use crate::names::{BALANCER_TABLE, nic_link};

/// Comment of the counting rule for clients outside a frontend's source ranges.
pub const NOT_A_SOURCE: &str = "not a source of this frontend";
/// Comment of the counting rules for segments of flows that were idle for too long.
pub const FORGOTTEN: &str = "segment of a forgotten flow";

const PLACE: [Field; 3] = [Field::IpDaddr, Field::L4Proto, Field::Dport];
const NO_BACKEND: &str = "no-backend";

/// The table of `vnet`'s frontends and of its clusters' DNS.
pub fn balancer(vnet: &VnetSpec) -> Table {
    use Field::{Dport, IpDaddr, L4Proto, Mark};
    let key = |f: &FrontendSpec, protocol| [Datum::Ip(f.address), Datum::Proto(protocol), Datum::Port(f.port)];
    let (whole, ports): (Vec<_>, Vec<_>) = vnet.frontends.iter().partition(|f| is_whole(f));
    let (ready, empty): (Vec<&FrontendSpec>, Vec<_>) = ports.into_iter().partition(|f| !f.backends.is_empty());
    let dns = vnet.clusters.iter().flat_map(|c| {
        [TCP, UDP].map(|proto| {
            Element::data(
                [
                    Datum::Mark(c.mark),
                    Datum::Ip(c.dns_service_ip),
                    Datum::Proto(proto),
                    Datum::Port(53),
                ],
                [Datum::Ip(WIRE_SERVER), Datum::Port(c.dns_port)],
            )
        })
    });
    let mut table = Table::new(Family::Ip, BALANCER_TABLE);
    table.timeouts = timeouts(vnet.frontends.iter().map(|f| (f.protocol, f.idle_timeout_s)));
    table.sets = vec![
        Set::verdict_map("frontends", PLACE).with(ready.iter().flat_map(|f| {
            let verdict = Verdict::goto(chain(f));
            numbers(f.protocol)
                .iter()
                .map(move |p| Element::verdict(key(f, *p), verdict.clone()))
        })),
        Set::new("empty", PLACE).with(
            empty
                .iter()
                .flat_map(|f| numbers(f.protocol).iter().map(|p| Element::key(key(f, *p)))),
        ),
        Set::map("dns", [Mark, IpDaddr, L4Proto, Dport], [IpDaddr, Dport]).with(dns),
    ];
    let whole_chain = |f: &FrontendSpec| match f.backends.is_empty() {
        true => NO_BACKEND.to_owned(),
        false => chain(f),
    };
    if !whole.is_empty() {
        table.sets.push(
            Set::verdict_map("all-ports", [IpDaddr]).with(
                whole
                    .iter()
                    .map(|f| Element::verdict([Datum::Ip(f.address)], Verdict::goto(whole_chain(f)))),
            ),
        );
    }
    hairpin(vnet, &mut table);
    let mut balance = vec![Rule::new().vmap(PLACE, "frontends")];
    if !whole.is_empty() {
        balance.push(Rule::new().vmap([IpDaddr], "all-ports"));
    }
    balance.push(Rule::new().dnat(NatTarget::map([Mark, IpDaddr, L4Proto, Dport], "dns")));
    if !empty.is_empty() {
        table.chains.push(refuse());
    }
    table.chains.extend([
        Chain::regular(
            NO_BACKEND,
            [
                Rule::new().proto(TCP).reject(Reject::TcpReset),
                Rule::new().reject(Reject::PortUnreachable),
            ],
        ),
        Chain::base("balance", ChainKind::Nat, HookPoint::Prerouting, -100, balance),
    ]);
    for f in vnet.frontends.iter().filter(|f| !f.backends.is_empty()) {
        let rules = lead(f, &mut table);
        table.chains.push(Chain::regular(chain(f), rules));
    }
    table
}

/// Refuses what asks for a frontend without backends. Every packet meets it, so it is there only if there is such a frontend.
fn refuse() -> Chain {
    let refused = |rule: Rule| rule.in_set(PLACE, "empty");
    Chain::base(
        "refuse",
        ChainKind::Filter,
        HookPoint::Prerouting,
        -101,
        [
            // Streams to the last backend end by themselves, too.
            Rule::new().established().accept(),
            refused(Rule::new()).proto(TCP).reject(Reject::TcpReset),
            refused(Rule::new()).reject(Reject::PortUnreachable),
        ],
    )
}

/// Back to where it came from: without the frontend as its source the answer would not come back here. The public address
/// of an instance is such a frontend, too.
fn hairpin(vnet: &VnetSpec, table: &mut Table) {
    let instances = vnet.instance_addresses.iter().map(|i| i.public);
    let fronts: BTreeSet<Ipv4Addr> = vnet.frontends.iter().map(|f| f.address).chain(instances).collect();
    if fronts.is_empty() {
        return;
    }
    let ports = vnet.nics_here().map(|n| name(&nic_link(&n.key)));
    let itself = fronts
        .into_iter()
        .map(|a| Element::data([Datum::Ip(a)], [Datum::Ip(a)]));
    table.sets.extend([
        Set::new("same-port", [Field::Iifname, Field::Oifname]).with(ports.map(|p| Element::key([p.clone(), p]))),
        Set::map("itself", [Field::CtOriginalIpDaddr], [Field::IpDaddr]).with(itself),
    ]);
    let hairpin = Rule::new()
        .then(Statement::CtStatus {
            mask: CT_STATUS_DNAT,
            negate: false,
        })
        .in_set([Field::Iifname, Field::Oifname], "same-port")
        .snat(NatTarget::Map {
            fields: vec![Field::CtOriginalIpDaddr],
            map: "itself".to_owned(),
            port: false,
        });
    table.chains.push(Chain::base(
        "hairpin",
        ChainKind::Nat,
        HookPoint::Postrouting,
        95,
        [hairpin],
    ));
}

/// What a frontend does with a flow's first packet. The frontend has backends.
fn lead(f: &FrontendSpec, table: &mut Table) -> Vec<Rule> {
    let mut rules = Vec::new();
    if !f.sources.is_empty() {
        let set = format!("sources-{}", chain(f));
        let nets = Element::key;
        let sources = ipnet::Ipv4Net::aggregate(&f.sources);
        table.sets.push(
            Set::new(set.clone(), [Field::IpSaddr])
                .intervals()
                .with(sources.into_iter().map(|n| nets([Datum::Net(n)]))),
        );
        let stranger = Rule::new().not_in_set([Field::IpSaddr], set).counter();
        rules.push(stranger.reject(Reject::AdminProhibited).comment(NOT_A_SOURCE));
    }
    if numbers(f.protocol).contains(&TCP) {
        // A stream that is not known any more was idle for too long, or its backend is gone: another backend cannot go on
        // with it.
        let forgotten = Rule::new().tcp_not_syn().counter();
        let forgotten = match f.tcp_reset {
            true => forgotten.reject(Reject::TcpReset),
            false => forgotten.drop(),
        };
        rules.push(forgotten.comment(FORGOTTEN));
    }
    rules.extend(set_timeouts(f.protocol, f.idle_timeout_s));
    let fields = match f.distribution {
        Distribution::FiveTuple => vec![
            Field::IpSaddr,
            Field::IpDaddr,
            Field::L4Proto,
            Field::Sport,
            Field::Dport,
        ],
        Distribution::SourceIp => vec![Field::IpSaddr, Field::IpDaddr],
        Distribution::SourceIpProtocol => vec![Field::IpSaddr, Field::IpDaddr, Field::L4Proto],
    };
    let by = Balance::Hash(fields);
    let mut targets: Vec<(Ipv4Addr, u16)> = f.backends.iter().map(|b| (b.address, b.port)).collect();
    targets.sort_unstable();
    if is_whole(f) {
        let addresses = targets.into_iter().map(|t| t.0).collect();
        rules.push(Rule::new().dnat(NatTarget::OneAddressOf { by, addresses }));
    } else {
        let target = |protocol: &u8| {
            let (by, targets) = (by.clone(), targets.clone());
            Rule::new().proto(*protocol).dnat(NatTarget::OneOf { by, targets })
        };
        rules.extend(numbers(f.protocol).iter().map(target));
    }
    rules
}

/// Whether the frontend takes what no other of its address does.
fn is_whole(f: &FrontendSpec) -> bool {
    f.protocol == Protocol::All && f.port == 0
}

fn chain(f: &FrontendSpec) -> String {
    let protocol = match f.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::All => "all",
    };
    format!("{}-{protocol}-{}", f.address, f.port)
}

/// The timeouts that flows of these protocols are given; those of zero seconds are the kernel's own.
pub(super) fn timeouts(wanted: impl Iterator<Item = (Protocol, u32)>) -> Vec<CtTimeout> {
    let all: BTreeSet<(u8, u32)> = wanted
        .filter(|(_, idle_s)| *idle_s > 0)
        .flat_map(|(protocol, idle_s)| numbers(protocol).iter().map(move |p| (*p, idle_s)))
        .collect();
    all.into_iter()
        .map(|(protocol, idle_s)| CtTimeout {
            name: timeout_name(protocol, idle_s),
            protocol,
            idle_s,
        })
        .collect()
}

/// The rules that give a flow its timeout.
pub(super) fn set_timeouts(protocol: Protocol, idle_s: u32) -> impl Iterator<Item = Rule> {
    let some = numbers(protocol).iter().filter(move |_| idle_s > 0);
    some.map(move |p| Rule::new().proto(*p).set_ct_timeout(timeout_name(*p, idle_s)))
}

fn timeout_name(protocol: u8, idle_s: u32) -> String {
    let protocol = if protocol == TCP { "tcp" } else { "udp" };
    format!("{protocol}-idle-{idle_s}s")
}

/// The ways of load balancers' connections that must not go on from `last` to `next`: datagrams to backends that are gone,
/// which nobody would ever end, and everything of frontends that are gone. Streams to a backend that is only taken out
/// end by themselves, so that it can finish them.
pub fn ended_ways(last: &VnetSpec, next: &VnetSpec) -> BTreeSet<Translation> {
    let mut out = BTreeSet::new();
    for old in &last.frontends {
        let same = |f: &&FrontendSpec| (f.address, f.protocol, f.port) == (old.address, old.protocol, old.port);
        let now = next.frontends.iter().find(same);
        for protocol in numbers(old.protocol) {
            let gone = old.backends.iter().filter(|b| match now {
                None => true,
                Some(now) => *protocol == UDP && !now.backends.contains(b),
            });
            out.extend(gone.map(|b| Translation {
                protocol: *protocol,
                asked: (old.address, old.port),
                given: (b.address, b.port),
            }));
        }
    }
    out
}

/// Public addresses of instances, gateways and outbound rules that `next` no longer uses as `last` did: their connections
/// end.
pub fn ended_addresses(last: &VnetSpec, next: &VnetSpec) -> BTreeSet<Ipv4Addr> {
    let pairs = |v: &VnetSpec| -> BTreeSet<(Ipv4Addr, Option<Ipv4Addr>)> {
        let instances = v.instance_addresses.iter().map(|i| (i.public, Some(i.private)));
        let gateways = v.nat_gateways.iter().flat_map(|g| &g.addresses).map(|a| (*a, None));
        instances.chain(gateways).collect()
    };
    pairs(last)
        .difference(&pairs(next))
        .map(|(public, _)| *public)
        .collect()
}

/// The protocols that have ports among those that are meant.
pub(super) fn numbers(protocol: Protocol) -> &'static [u8] {
    match protocol {
        Protocol::Tcp => &[TCP],
        Protocol::Udp => &[UDP],
        Protocol::All => &[TCP, UDP],
    }
}

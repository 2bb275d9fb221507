//! What a NIC must not say: others' addresses, in IPv4 and in ARP; router and neighbour advertisements; a DHCP server's
//! answers. Every rule drops and counts.
//!
//! IPv4 packets are looked at before connection tracking is asked, since whoever knows another's connection could join it
//! with a forged packet otherwise. Nothing here believes ARP or IPv6 at all (neighbours are permanent, IPv6 is not routed);
//! the rules are there so that an attempt is seen.

use linux::nft::{Chain, ChainKind, Datum, Element, Family, Field, HookPoint, ICMP6, Rule, Set, Table, UDP};
use vnet_model::fabric::VnetSpec;

use crate::names::{EDGE_LINK, NEIGHBOUR_TABLE, nic_link};

/// Comments of the counting rules: a frame from a MAC or an IPv4 address that is none of its NIC's,
pub const SPOOFED: &str = "spoofed source";
/// an ARP packet that speaks for another,
pub const SPOOFED_ARP: &str = "spoofed ARP";
/// a router advertisement or redirect,
pub const SPOOFED_RA: &str = "spoofed router advertisement";
/// a neighbour advertisement,
pub const SPOOFED_ND: &str = "spoofed neighbour advertisement";
/// a DHCP server's answer.
pub const ROGUE_DHCP: &str = "answer of a DHCP server that is none";

const SENDERS: &str = "ports";
const FORWARDERS: &str = "forwarders";

/// Who may send: port, MAC and address of every NIC; port and MAC of those that forward for others.
pub fn senders(vnet: &VnetSpec) -> [Set; 2] {
    let forwarders = vnet.nics_here().filter(|n| n.ip_forwarding);
    [
        Set::new(SENDERS, [Field::Iifname, Field::EtherSaddr, Field::IpSaddr]).with(owners(vnet)),
        Set::new(FORWARDERS, [Field::Iifname, Field::EtherSaddr])
            .with(forwarders.map(|n| Element::key([Datum::IfName(nic_link(&n.key)), Datum::Mac(n.mac.0)]))),
    ]
}

fn owners(vnet: &VnetSpec) -> impl Iterator<Item = Element> {
    vnet.nics_here().flat_map(|nic| {
        let link = nic_link(&nic.key);
        nic.addresses()
            .map(move |a| Element::key([Datum::IfName(link.clone()), Datum::Mac(nic.mac.0), Datum::Ip(a)]))
    })
}

/// Drops what comes from NICs with others' addresses. `but_not` leaves out the links that are none; peers' are left out here,
/// since their packets were looked at where they came from. The common case is decided by the one look-up that comes first.
pub fn forged(but_not: impl FnOnce(Rule) -> Rule) -> Rule {
    but_not(Rule::new().not_in_set([Field::Iifname, Field::EtherSaddr, Field::IpSaddr], SENDERS))
        .not_in_set([Field::Iifname, Field::EtherSaddr], FORWARDERS)
        .not_in_set([Field::Iifname], "peers")
        .counter()
        .drop()
        .comment(SPOOFED)
}

/// Nobody here gets its address by DHCP, least of all from a neighbour.
pub fn rogue_dhcp() -> Rule {
    Rule::new()
        .is_not(Field::Iifname, Datum::IfName(EDGE_LINK.to_owned()))
        .proto(UDP)
        .is(Field::Sport, Datum::Port(67))
        .is(Field::Dport, Datum::Port(68))
        .counter()
        .drop()
        .comment(ROGUE_DHCP)
}

/// ARP at the NICs' ports. A probe speaks for nobody yet (sender 0.0.0.0) and passes.
pub fn arp(vnet: &VnetSpec) -> Table {
    let key = [Field::Iifname, Field::ArpEtherSaddr, Field::ArpIpSaddr];
    let mut table = Table::new(Family::Arp, NEIGHBOUR_TABLE);
    table.sets = vec![
        Set::new(SENDERS, key).with(owners(vnet)),
        Set::new("sites", [Field::Iifname]).with(super::sites::links(vnet)),
    ];
    let probe = Datum::Ip(std::net::Ipv4Addr::UNSPECIFIED);
    let rules = [
        Rule::new().is(Field::ArpIpSaddr, probe).accept(),
        // The router of a handed-over interface is found by ARP.
        Rule::new().in_set([Field::Iifname], "sites").accept(),
        Rule::new()
            .not_in_set(key, SENDERS)
            .counter()
            .drop()
            .comment(SPOOFED_ARP),
    ];
    table.chains = vec![Chain::base("arp", ChainKind::Filter, HookPoint::Input, 0, rules)];
    table
}

/// IPv6: nothing passes; what speaks for routers and neighbours is counted by itself, since machines ask and probe without
/// any harm meant.
pub fn ip6() -> Table {
    const ROUTER_ADVERTISEMENT: u8 = 134;
    const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    const REDIRECT: u8 = 137;
    let mut table = Table::new(Family::Ip6, NEIGHBOUR_TABLE);
    let of_type = |number: u8, comment: &str| {
        Rule::new()
            .proto(ICMP6)
            .is(Field::Icmp6Type, Datum::Proto(number))
            .counter()
            .drop()
            .comment(comment)
    };
    let rules = [
        Rule::new().iifname("lo").accept(),
        of_type(ROUTER_ADVERTISEMENT, SPOOFED_RA),
        of_type(REDIRECT, SPOOFED_RA),
        of_type(NEIGHBOUR_ADVERTISEMENT, SPOOFED_ND),
        Rule::new().counter().drop().comment("IPv6 is not routed"),
    ];
    table.chains = vec![Chain::base(
        "ip6",
        ChainKind::Filter,
        HookPoint::Prerouting,
        -150,
        rules,
    )];
    table
}

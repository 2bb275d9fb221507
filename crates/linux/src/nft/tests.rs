//! What the kernel made of a table, as the `nft` program lists it; every test in a network namespace of its own.

use std::net::Ipv4Addr;
use std::process::Command;

use super::*;
use crate::netns;

fn in_private_host(test: impl FnOnce() + Send + 'static) {
    let host = move || {
        netns::become_private_host(&[]).unwrap();
        test();
    };
    std::thread::spawn(host).join().unwrap();
}

fn ruleset() -> String {
    let out = Command::new("nft").args(["-n", "list", "ruleset"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn ip(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

fn everything() -> Table {
    use Field::*;
    let service = [IpDaddr, L4Proto, Dport];
    let mut table = Table::new(Family::Ip, "oaks-t");
    table.sets = vec![
        Set::new("nets", [IpSaddr]).intervals().with([
            Element::key([Datum::Net("10.0.0.0/8".parse().unwrap())]),
            Element::key([Datum::Net("240.0.0.0/4".parse().unwrap())]),
        ]),
        Set::new("ports", [Iifname, IpSaddr])
            .with([Element::key([Datum::IfName("nic0".into()), Datum::Ip(ip("10.1.0.4"))])]),
        Set::new("ranges", [IpDaddr, L4Proto, Dport]).intervals().with([
            Element::key([
                Datum::Net("10.2.0.0/16".parse().unwrap()),
                Datum::Proto(TCP),
                Datum::PortRange(1000, 2000),
            ]),
            Element::key([Datum::Ip(ip("10.3.0.1")), Datum::Any, Datum::Any]),
        ]),
        Set::verdict_map("services", service).with([Element::verdict(
            [Datum::Ip(ip("10.96.0.1")), Datum::Proto(TCP), Datum::Port(443)],
            Verdict::goto("svc"),
        )]),
        Set::map("fixed", service, [IpDaddr, Dport]).with([Element::data(
            [Datum::Ip(ip("10.96.0.2")), Datum::Proto(UDP), Datum::Port(53)],
            [Datum::Ip(ip("10.1.0.9")), Datum::Port(5353)],
        )]),
        Set::new("affinity", [IpSaddr]).dynamic(10_800_000),
        Set::verdict_map("marked", [Mark, IpDaddr]).with([Element::verdict(
            [Datum::Mark(7), Datum::Ip(ip("10.96.0.1"))],
            Verdict::jump("svc"),
        )]),
    ];
    table.chains = vec![
        Chain::base(
            "prerouting",
            ChainKind::Nat,
            HookPoint::Prerouting,
            -100,
            [
                Rule::new().vmap(service, "services"),
                Rule::new().vmap([Mark, IpDaddr], "marked"),
                Rule::new().dnat(NatTarget::map(service, "fixed")),
            ],
        ),
        Chain::base(
            "postrouting",
            ChainKind::Nat,
            HookPoint::Postrouting,
            100,
            [
                Rule::new()
                    .then(Statement::CtStatus {
                        mask: CT_STATUS_DNAT,
                        negate: false,
                    })
                    .is(CtOriginalIpDaddr, Datum::Ip(ip("10.96.0.1")))
                    .masquerade(),
                Rule::new().oifname("edge").snat(NatTarget::to(ip("100.64.0.2"), None)),
            ],
        ),
        Chain {
            name: "forward".into(),
            hook: Some(Hook {
                kind: ChainKind::Filter,
                point: HookPoint::Forward,
                priority: 0,
                drop: true,
            }),
            rules: vec![
                Rule::new().established().accept(),
                Rule::new()
                    .iifname("nic0")
                    .not_in_set([Iifname, IpSaddr], "ports")
                    .counter()
                    .drop()
                    .comment("spoofed nic0"),
                Rule::new().in_set([IpSaddr], "nets").set_mark(0x10, 0xf0),
                Rule::new().in_set(service, "ranges").accept(),
                Rule::new().then(Statement::FibLocal { negate: false }).accept(),
                Rule::new()
                    .is(EtherSaddr, Datum::Mac([2, 0, 0, 0, 0, 1]))
                    .then(Statement::CtMarkBits {
                        value: 0x8001_0000,
                        mask: 0xffff_0000,
                    })
                    .accept(),
                Rule::new()
                    .saddr("10.0.0.0/9".parse::<ipnet::Ipv4Net>().unwrap())
                    .tcp_dport(80)
                    .reject(Reject::TcpReset),
                Rule::new().proto(UDP).reject(Reject::PortUnreachable),
            ],
        },
        Chain::regular(
            "svc",
            [
                Rule::new().in_set([IpSaddr], "affinity").goto("one"),
                Rule::new().then(Statement::Choose {
                    by: Balance::Random,
                    verdicts: vec![Verdict::goto("one"), Verdict::goto("two")],
                }),
            ],
        ),
        Chain::regular(
            "one",
            [
                Rule::new().then(Statement::Update {
                    set: "affinity".into(),
                    key: vec![IpSaddr],
                    value: vec![],
                    timeout_ms: None,
                }),
                Rule::new().proto(TCP).dnat(NatTarget::OneOf {
                    by: Balance::Hash(vec![IpSaddr, Sport]),
                    targets: vec![(ip("10.1.0.4"), 8080), (ip("10.1.0.5"), 8080), (ip("10.1.0.6"), 8081)],
                }),
            ],
        ),
        Chain::regular(
            "two",
            [Rule::new().proto(TCP).dnat(NatTarget::to(ip("10.1.0.7"), 8080))],
        ),
    ];
    table
}

#[test]
fn every_kind_of_statement_is_understood_by_the_kernel_and_listed_by_the_tool() {
    in_private_host(|| {
        let mut nft = Nft::open().unwrap();
        let table = everything();
        assert_eq!(nft.ensure(&table).unwrap(), Change::Changed);
        assert_eq!(nft.ensure(&table).unwrap(), Change::None);
        let text = ruleset();
        for part in [
            "type filter hook forward priority 0; policy drop;",
            "ct state 0x2,0x4 accept",
            "iifname \"nic0\" iifname . ip saddr != @ports counter packets 0 bytes 0 drop comment \"spoofed nic0\"",
            "ip daddr . meta l4proto . th dport vmap @services",
            "10.96.0.1 . 6 . 443 : goto svc",
            "10.96.0.2 . 17 . 53 : 10.1.0.9 . 5353",
            "elements = { 10.0.0.0/8, 240.0.0.0/4 }",
            "10.2.0.0/16 . 6 . 1000-2000",
            "numgen random mod 2 vmap { 0 : goto one, 1 : goto two }",
            "jhash ip saddr . tcp sport mod 3 seed 0x6f616b73 map { 0 : 10.1.0.4 . 8080, 1 : 10.1.0.5 . 8080, 2 : 10.1.0.6 . 8081 }",
            "fib daddr type 2 accept",
            "@ll,48,48 0x20000000001 ct mark 0x80010000/16 accept",
            "update @affinity { ip saddr }",
            "ct status 0x20 ct original ip daddr 10.96.0.1 masquerade",
            "snat to 100.64.0.2",
            "ip saddr 10.0.0.0/9 tcp dport 80 reject with tcp reset",
            "dnat to 10.1.0.7:8080",
        ] {
            assert!(text.contains(part), "missing: {part}\n{text}");
        }
        assert!(
            nft.counters(Family::Ip, "oaks-t")
                .unwrap()
                .iter()
                .any(|c| c.comment == "spoofed nic0" && c.packets == 0)
        );
        nft.delete_table(Family::Ip, "oaks-t").unwrap();
        nft.delete_table(Family::Ip, "oaks-t").unwrap();
        assert_eq!(ruleset(), "");
    });
}

#[test]
fn an_update_of_elements_touches_nothing_else() {
    in_private_host(|| {
        let mut nft = Nft::open().unwrap();
        let old = everything();
        nft.ensure(&old).unwrap();
        let mut new = old.clone();
        new.sets[1].elements = vec![Element::key([Datum::IfName("nic1".into()), Datum::Ip(ip("10.1.0.8"))])];
        new.sets[0].elements[0] = Element::key([Datum::Net("10.0.0.0/9".parse().unwrap())]);
        let mut batch = Batch::new();
        batch.update_table(&old, &new).unwrap();
        assert!(
            batch
                .messages
                .iter()
                .all(|m| m.what.contains(" elements of ") || m.what.contains("mark") || m.what.contains("plan-"))
        );
        nft.apply(&batch).unwrap();
        assert!(ruleset().contains("10.0.0.0/9, 240.0.0.0/4"), "{}", ruleset());
        assert!(ruleset().contains("\"nic1\" . 10.1.0.8"));
        assert_eq!(nft.ensure(&new).unwrap(), Change::None);
        assert_eq!(nft.ensure(&old).unwrap(), Change::Changed);
    });
}

#[test]
fn a_refused_batch_changes_nothing_and_names_its_change() {
    in_private_host(|| {
        let mut nft = Nft::open().unwrap();
        let mut table = Table::new(Family::Inet, "bad");
        table.chains = vec![Chain::regular(
            "a",
            [Rule::new().in_set([Field::IpSaddr], "nowhere").accept().comment("why")],
        )];
        let error = nft.ensure(&table).unwrap_err().to_string();
        assert!(error.contains("add a rule (why) to chain a of bad"), "{error}");
        assert_eq!(ruleset(), "");
        table.chains[0].rules = vec![Rule::new().iifname("much-too-long-name")];
        assert!(matches!(nft.ensure(&table), Err(Error::LinkName { .. })));
    });
}

#[test]
fn large_sets_fit() {
    in_private_host(|| {
        let mut nft = Nft::open().unwrap();
        let mut table = Table::new(Family::Inet, "big");
        let key = |i: u32| Element::key([Datum::Ip(Ipv4Addr::from(0x0a00_0000 + i)), Datum::Port(80)]);
        table.sets = vec![Set::new("all", [Field::IpSaddr, Field::Dport]).with((0..20_000).map(key))];
        table.chains = vec![Chain::regular(
            "a",
            [Rule::new().in_set([Field::IpSaddr, Field::Dport], "all").accept()],
        )];
        nft.ensure(&table).unwrap();
        assert_eq!(ruleset().matches(" . 80").count(), 20_000);
    });
}

#[test]
fn frames_arp_and_ip6_are_matched() {
    in_private_host(|| {
        let mac = Datum::Mac([2, 0, 0, 0, 0, 1]);
        let mut nft = Nft::open().unwrap();
        let mut arp = Table::new(Family::Arp, "t");
        let key = [Field::Iifname, Field::ArpEtherSaddr, Field::ArpIpSaddr];
        let element = [Datum::IfName("n0".into()), mac.clone(), Datum::Ip(ip("10.1.0.4"))];
        arp.sets = vec![Set::new("s", key).with([Element::key(element)])];
        let rule = Rule::new().not_in_set(key, "s").drop();
        arp.chains = vec![Chain::base("c", ChainKind::Filter, HookPoint::Input, 0, [rule])];
        let mut ip4 = Table::new(Family::Ip, "t");
        let rule = Rule::new().is(Field::EtherSaddr, mac).drop();
        ip4.chains = vec![Chain::base("c", ChainKind::Filter, HookPoint::Prerouting, 0, [rule])];
        let mut ip6 = Table::new(Family::Ip6, "t");
        let rule = Rule::new().proto(ICMP6).is(Field::Icmp6Type, Datum::Proto(134)).drop();
        ip6.chains = vec![Chain::base("c", ChainKind::Filter, HookPoint::Prerouting, 0, [rule])];
        for table in [&arp, &ip4, &ip6] {
            assert_eq!(nft.ensure(table).unwrap(), Change::Changed);
            assert_eq!(nft.ensure(table).unwrap(), Change::None);
        }
        let listed = ruleset();
        for part in [
            "type ifname . ether_addr . ipv4_addr",
            "\"n0\" . 02:00:00:00:00:01 . 10.1.0.4",
            "type filter hook input priority 0",
            "iifname . arp saddr ether . arp saddr ip != @s drop",
            // The tool says it in words only behind a check of the link's kind.
            "@ll,48,48 0x20000000001 drop",
            "134 drop",
        ] {
            assert!(listed.contains(part), "{part}:\n{listed}");
        }
    });
}

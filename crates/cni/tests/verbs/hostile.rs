//! Bad input, bad neighbours and many callers at once.

use std::{collections::BTreeSet, sync::atomic::Ordering};

use serde_json::{Value, json};

use crate::machine::*;

#[test]
fn hostile_input_gets_one_precise_error() {
    on_machine(10..12, |m| {
        let bin = env!("CARGO_BIN_EXE_azure-vnet");
        m.pod("a");
        let env = [
            ("CNI_CONTAINERID", "a"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/t/pods/a"),
        ];
        let deep = "[".repeat(500_000);
        let huge = vec![b' '; 2 << 20];
        for (stdin, code) in [
            (b"".as_slice(), 6),
            (b"\xff\xfe", 6),
            (b"null", 6),
            (b"{}", 1),
            (deep.as_bytes(), 6),
            (&huge, 6),
            (b"{\"cniVersion\":\"9.9.9\",\"name\":\"x\"}", 1),
        ] {
            let out = exec(bin, "ADD", &env, stdin);
            assert_eq!(
                out.code(),
                code,
                "{:?}",
                String::from_utf8_lossy(&stdin[..stdin.len().min(40)])
            );
        }
        for (k, v, code) in [
            ("mode", json!("warp"), 7),
            ("name", json!("../../etc"), 7),
            ("prevResult", json!({"cniVersion": "1.1.0", "ips": []}), 7),
        ] {
            let mut conf = m.conf("1.1.0");
            conf[k] = v;
            let out = m.call("ADD", "a", &conf);
            assert_eq!(out.code(), code, "{k}");
            assert!(out.doc.unwrap()["msg"].as_str().unwrap().contains(k));
        }
        for (netns, word) in [
            ("/run/t/none", "open"),
            ("/etc/hostname", "not a network"),
            ("/proc/self/ns/net", "own"),
        ] {
            let env = [("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", netns)];
            let out = exec(bin, "ADD", &env, m.conf("1.1.0").to_string().as_bytes());
            assert_eq!(out.code(), 8);
            let msg = out.doc.unwrap()["msg"].as_str().unwrap().to_owned();
            assert!(msg.contains(word), "{msg}");
        }
        assert_eq!(exec(bin, "NOPE", &env, b"{}").code(), 4);
        assert_eq!(exec(bin, "ADD", &[], b"{}").code(), 4);
        let mut warned = m.conf("1.1.0");
        warned["logLevel"] = json!("debug");
        assert!(
            m.call("ADD", "a", &warned)
                .stderr
                .contains("keys without effect here: logLevel")
        );
    });
}

#[test]
fn a_hundred_and_fifty_parallel_adds_get_as_many_addresses() {
    on_machine(10..170, |m| {
        let ids: Vec<String> = (0..150).map(|i| format!("p{i}")).collect();
        ids.iter().for_each(|id| drop(m.pod(id)));
        // The threads are started here, so they are in the machine's namespace.
        let outs: Vec<Out> = std::thread::scope(|scope| {
            let calls: Vec<_> = ids
                .iter()
                .map(|id| scope.spawn(move || m.call("ADD", id, &m.conf("1.0.0"))))
                .collect();
            calls.into_iter().map(|c| c.join().unwrap()).collect()
        });
        let unique: BTreeSet<String> = outs.iter().map(Out::address).collect();
        assert_eq!(unique.len(), 150);
        assert_eq!((m.reservations(), m.pod_links().len()), (150, 150));
        assert!(m.gc(&[]).ok);
        assert_eq!((m.reservations(), m.pod_links().len()), (0, 0));
    });
}

#[test]
fn the_wire_server_may_be_gone_slow_or_talk_nonsense() {
    on_machine(10..12, |m| {
        let good = m.wire.lock().unwrap().clone();
        let fast = |timeout: u64, interval: &str| {
            let mut conf = m.conf("1.1.0");
            conf["ipam"]["timeoutMs"] = json!(timeout);
            conf["ipam"]["queryInterval"] = json!(interval);
            conf
        };
        m.pod("a");
        for (wire, word) in [
            (Wire::Silent, "did not answer"),
            (Wire::Answer("<html>".into()), "not understood"),
            (
                Wire::Answer(interfaces(10..12).replace("000D3A000001", "0102030405FF")),
                "01:02:03:04:05:ff",
            ),
        ] {
            m.set_wire(wire);
            let out = m.call("ADD", "a", &fast(100, "60"));
            assert_eq!(out.code(), 11, "{out:?}");
            assert!(out.doc.unwrap().to_string().contains(word), "{word}");
            assert_eq!(m.call("STATUS", "a", &fast(100, "60")).code(), 50);
        }
        let mut gone = fast(100, "60");
        gone["ipam"]["wireServerUrl"] = json!("http://127.0.0.1:1");
        assert_eq!(m.call("ADD", "a", &gone).code(), 11);
        assert!(m.pod_links().is_empty());

        m.set_wire(good);
        m.asked.store(0, Ordering::SeqCst);
        m.call("ADD", "a", &fast(2000, "60")).address();
        m.set_wire(Wire::Silent);
        m.pod("b");
        let b = m.call("ADD", "b", &fast(100, "0"));
        assert!(
            b.ok && b.stderr.contains("known before"),
            "a remembered pool goes on serving: {b:?}"
        );
        assert_eq!(m.asked.load(Ordering::SeqCst), 2);

        // Used up, until one more address is given to the NIC.
        m.set_wire(Wire::Answer(interfaces(10..12)));
        m.pod("c");
        let out = m.call("ADD", "c", &fast(2000, "60"));
        assert_eq!(out.code(), 11);
        let doc = out.doc.unwrap().to_string();
        assert!(
            doc.contains("No available addresses") && doc.contains("2 of 2"),
            "{doc}"
        );
        assert_eq!(m.call("STATUS", "c", &fast(2000, "60")).code(), 50);
        m.set_wire(Wire::Answer(interfaces(10..13)));
        assert_eq!(m.call("ADD", "c", &fast(2000, "60")).address(), "10.240.0.12/32");
    });
}

#[test]
fn hostile_configurations_are_refused_by_name_and_leave_nothing() {
    on_machine(10..12, |m| {
        let before = m.kernel();
        m.pod("a");
        let deep = (0..200).fold(json!(1), |v, _| json!([v]));
        let at = |path: &str, value: Value| {
            let mut conf = m.conf("1.1.0");
            let (parent, key) = path.rsplit_once('/').unwrap();
            conf.pointer_mut(parent).unwrap()[key.replace("~1", "/")] = value;
            conf
        };
        for (path, value) in [
            ("/name", json!(1)),
            ("/name", json!("a\u{0}b")),
            ("/name", json!("\u{202e}evil")),
            ("/name", json!("")),
            ("/type", json!("")),
            ("/cniVersion", json!([])),
            ("/mode", json!({"transparent": true})),
            ("/bridge", json!("a/../../b")),
            ("/master", json!("nic0 --help")),
            ("/master", json!("none0")),
            ("/mtu", json!(-1)),
            ("/mtu", json!(1e300)),
            ("/mtu", json!(70000)),
            ("/ipMasq", json!("sometimes")),
            ("/dns", json!("8.8.8.8")),
            ("/dns", json!({"nameservers": ["example.com"]})),
            ("/stateDir", json!("state")),
            ("/stateDir", json!("/proc/nowhere")),
            ("/stateDir", json!("/dev/null")),
            ("/stateDir", json!("/run/a\u{0}b")),
            ("/prevResult", json!({"ips": [{"address": "999.0.0.1/99"}]})),
            ("/prevResult", json!({"ips": [], "interfaces": "x"})),
            ("/cni.dev~1valid-attachments", json!([{"containerID": 1}])),
            ("/unknown", deep),
            ("/ipam", json!([])),
            ("/ipam/type", json!("../../../bin/sh")),
            ("/ipam/type", json!("not-installed")),
            ("/ipam/subnet", json!("10.240.0.0/99")),
            ("/ipam/subnet", json!("10.99.0.0/24")),
            ("/ipam/ipAddress", json!("10.240.0.999")),
            ("/ipam/ipAddress", json!("8.8.8.8")),
            ("/ipam/queryInterval", json!("99999999999999999999")),
            ("/ipam/coolDownMs", json!(u64::MAX)),
            ("/ipam/timeoutMs", json!(0)),
            ("/ipam/wireServerUrl", json!("http://127.0.0.1:99999")),
            ("/ipam/wireServerUrl", json!("http://host.invalid/")),
            ("/ipam/wireServerUrl", json!("http://127.0.0.1:1/\r\nX: y")),
            (
                "/ipam/pools",
                json!([{"subnet": "0.0.0.0/0", "addresses": ["0.0.0.0-255.255.255.255"]}]),
            ),
            ("/ipam/pools", json!([{"subnet": "::/0", "addresses": ["::-ffff::"]}])),
            ("/ipam/environment", json!("cns")),
        ] {
            let out = m.call("ADD", "a", &at(path, value.clone()));
            assert!(!out.ok, "{path} {value}: {out:?}");
            let doc = out.doc.clone().unwrap_or_else(|| panic!("{path} {value}: {out:?}"));
            let code = doc["code"].as_u64().unwrap();
            assert!([1, 5, 6, 7, 11, 100].contains(&code), "{path} {value}: {doc}");
            assert!(!doc["msg"].as_str().unwrap().is_empty(), "{path} {value}");
            assert!(m.pod_links().is_empty(), "{path} {value}");
        }
        // The same key twice, and bytes that are no text.
        let text = m.conf("1.1.0").to_string();
        let twice = text.replacen('{', "{\"name\":\"other\",", 1);
        let netns = m.pod_path("a");
        let env = [
            ("CNI_CONTAINERID", "a"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", netns.to_str().unwrap()),
        ];
        let bin = env!("CARGO_BIN_EXE_azure-vnet");
        assert_eq!(exec(bin, "ADD", &env, twice.as_bytes()).code(), 6);
        let mut cut = text.into_bytes();
        cut.truncate(cut.len() - 3);
        assert_eq!(exec(bin, "ADD", &env, &cut).code(), 6);
        cut.extend([0xff; 3]);
        assert_eq!(exec(bin, "ADD", &env, &cut).code(), 6);
        assert_eq!(m.kernel(), before);
        assert!(m.add("a", "1.1.0").ok, "and nothing stands in the way afterwards");
    });
}

#[test]
fn container_ids_of_any_length_are_told_apart_by_their_last_letter() {
    on_machine(10..40, |m| {
        let ids: Vec<String> = [1, 8, 9, 64, 200]
            .iter()
            .flat_map(|n| ["a", "b"].map(|end| format!("{}{end}", "x".repeat(n - 1))))
            .collect();
        let addresses: BTreeSet<String> = ids.iter().map(|id| m.add(id, "1.1.0").address()).collect();
        assert_eq!((addresses.len(), m.pod_links().len()), (ids.len(), ids.len()));
        for (n, id) in ids.iter().enumerate() {
            assert!(m.call("DEL", id, &m.conf("1.1.0")).ok);
            let left = ids.len() - n - 1;
            assert_eq!((m.reservations(), m.pod_links().len()), (left, left), "{id}");
        }
    });
}

#[test]
fn a_clock_of_another_life_makes_nobody_wait() {
    on_machine(10..11, |m| {
        let mut conf = m.conf("1.1.0");
        conf["ipam"]["coolDownMs"] = json!(600_000);
        m.pod("a");
        m.call("ADD", "a", &conf).address();
        assert!(m.call("DEL", "a", &conf).ok);
        let resting = m.call("ADD", "a", &conf);
        assert_eq!(resting.code(), 11, "it rests");
        let mut state: Value = serde_json::from_slice(&std::fs::read(m.state()).unwrap()).unwrap();
        state["state"]["released_ms"]["10.240.0.10"] = json!(u64::MAX);
        state["state"]["pool"]["fetched_ms"] = json!(u64::MAX);
        std::fs::write(m.state(), state.to_string()).unwrap();
        m.asked.store(0, Ordering::SeqCst);
        assert_eq!(m.call("ADD", "a", &conf).address(), "10.240.0.10/32");
        assert_eq!(m.asked.load(Ordering::SeqCst), 1, "and the pool is asked for again");
        // Nothing of the wall clock is remembered.
        let state: Value = serde_json::from_slice(&std::fs::read(m.state()).unwrap()).unwrap();
        assert!(state["state"]["pool"]["fetched_ms"].as_u64().unwrap() < 1 << 40);
    });
}

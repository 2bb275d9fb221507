//! Every verb, and what is left after it, whatever dies when.

use std::{collections::BTreeSet, path::Path};

use linux::{
    netlink::{Request, Route},
    netns::{self, NetNs},
};
use serde_json::{Value, json};

use crate::machine::*;

#[test]
fn verbs_of_every_version() {
    on_machine(10..30, |m| {
        for v in VERSIONS {
            let id = format!("pod-{v}");
            let added = m.add(&id, v);
            assert!(added.ok, "{v}: {added:?}");
            let result = added.doc.clone().unwrap();
            assert_eq!(result["cniVersion"], v);
            assert_eq!(result["interfaces"][1]["name"], "eth0");
            assert_eq!(result["interfaces"][1]["sandbox"], m.pod_path(&id).to_str().unwrap());
            assert_eq!(result["ips"][0]["interface"], 1);
            assert_eq!(result["routes"][0], json!({"dst": "0.0.0.0/0", "gw": "169.254.1.1"}));
            assert_eq!(result["dns"]["nameservers"][0], "168.63.129.16");
            assert_eq!(m.pod_links(), [result["interfaces"][0]["name"].as_str().unwrap()]);

            let again = m.call("ADD", &id, &m.conf(v));
            assert_eq!(again.code(), 100, "an interface that exists is refused");
            assert_eq!(m.reservations(), 1, "and its address is not given back");

            let check = m.call("CHECK", &id, &m.with_previous(v, &result));
            if v < "0.4.0" {
                assert_eq!(check.code(), 1);
            } else {
                assert!(check.ok && check.doc.is_none(), "{check:?}");
                assert_eq!(m.call("CHECK", &id, &m.conf(v)).code(), 7, "CHECK needs prevResult");
            }
            for command in ["STATUS", "GC"] {
                let mut conf = m.conf(v);
                conf["cni.dev/valid-attachments"] = json!([{"containerID": id, "ifname": "eth0"}]);
                let out = m.call(command, &id, &conf);
                if v < "1.1.0" {
                    assert_eq!(out.code(), 1, "{command} {v}");
                } else {
                    assert!(out.ok && out.doc.is_none(), "{command} {v}: {out:?}");
                }
            }
            assert_eq!(
                (m.reservations(), m.pod_links().len()),
                (1, 1),
                "a valid attachment survives GC"
            );

            for _ in 0..2 {
                let del = m.call("DEL", &id, &m.with_previous(v, &result));
                assert!(del.ok && del.doc.is_none(), "{del:?}");
            }
            assert_eq!((m.reservations(), m.pod_links().len()), (0, 0));
            if v >= "0.4.0" {
                assert_eq!(m.call("CHECK", &id, &m.with_previous(v, &result)).code(), 101);
            }
        }
        let version = exec(env!("CARGO_BIN_EXE_azure-vnet"), "VERSION", &[], b"");
        assert_eq!(version.doc.unwrap()["supportedVersions"], json!(VERSIONS));
    });
}

#[test]
fn traffic_flows_between_pods_node_and_fabric() {
    on_machine(10..30, |m| {
        let (a, b) = (m.add("a", "1.1.0").address(), m.add("b", "1.1.0").address());
        let (a, b) = (a.trim_end_matches("/32"), b.trim_end_matches("/32"));
        let (pod_a, pod_b) = (m.pod("a"), m.pod("b"));
        let (node, fabric) = (
            NetNs::current().unwrap(),
            netns::open(Path::new("/run/t/fabric")).unwrap(),
        );
        assert!(reaches(&pod_a, &pod_b, b) && reaches(&pod_b, &pod_a, a));
        assert!(reaches(&node, &pod_a, a) && reaches(&pod_a, &node, "10.240.0.4"));
        assert!(reaches(&pod_a, &fabric, "10.240.0.1") && reaches(&fabric, &pod_b, b));
        let result = m.call("DEL", "b", &m.conf("1.1.0"));
        assert!(result.ok && !reaches(&pod_a, &pod_b, b));
        let mtu = Route::open_in(&pod_a).unwrap().need_link("eth0").unwrap().mtu;
        assert_eq!(mtu, 1400, "the NIC's");
    });
}

#[test]
fn bridge_and_tunnel_make_a_bridge_beside_the_nic_and_leave_nothing() {
    on_machine(10..30, |m| {
        let (node, fabric) = (
            NetNs::current().unwrap(),
            netns::open(Path::new("/run/t/fabric")).unwrap(),
        );
        let before = m.kernel();
        for mode in ["bridge", "tunnel", ""] {
            let mut conf = m.conf("1.1.0");
            conf["mode"] = json!(mode);
            if mode.is_empty() {
                conf.as_object_mut().unwrap().remove("mode");
            } else {
                conf["bridge"] = json!("azure0");
            }
            let nic = Route::open().unwrap().need_link("nic0").unwrap().index;
            let name = if mode.is_empty() {
                format!("azure{nic}")
            } else {
                "azure0".to_owned()
            };
            let add = |id: &str| {
                m.pod(id);
                let out = m.call("ADD", id, &conf);
                let address = out.address();
                let result = out.doc.unwrap();
                assert_eq!(result["interfaces"][0]["name"], name);
                assert_eq!(result["ips"][0]["interface"], 2);
                assert_eq!(result["ips"][0]["gateway"], "10.240.0.1");
                let mut check = conf.clone();
                check["prevResult"] = result;
                let checked = m.call("CHECK", id, &check);
                assert!(checked.ok, "{checked:?}");
                (address.trim_end_matches("/24").to_owned(), check)
            };
            let ((a, check), (b, _)) = (add("a"), add("b"));
            let (pod_a, pod_b) = (m.pod("a"), m.pod("b"));
            assert!(reaches(&node, &pod_a, &a) && reaches(&pod_a, &node, "10.240.0.4"));
            assert!(reaches(&pod_a, &fabric, "10.240.0.1") && reaches(&fabric, &pod_b, &b));
            if mode == "tunnel" {
                // Nothing between pods of one node, until the fabric sends it back.
                assert!(!reaches(&pod_a, &pod_b, &b));
                fabric
                    .run(|| linux::sysctl::set("net/ipv4/conf/port/forwarding", "1").unwrap())
                    .unwrap();
            }
            assert!(reaches(&pod_a, &pod_b, &b) && reaches(&pod_b, &pod_a, &a));
            let mut host = Route::open().unwrap();
            let bridge = host.need_link(&name).unwrap();
            let ports: Vec<_> = host
                .links()
                .unwrap()
                .into_iter()
                .filter(|l| l.master.is_some())
                .collect();
            assert_eq!(ports.len(), 2, "the NIC is no port");
            assert!(ports.iter().all(|p| p.port.unwrap().hairpin), "{mode}");
            let by_bridge = host.rules().unwrap().into_iter().filter(|r| r.iif.is_some());
            assert_eq!(by_bridge.count(), usize::from(mode == "tunnel"));
            assert_eq!(host.need_link("nic0").unwrap().mac, Some(NIC_MAC));

            let neighbour = *host
                .neighbours()
                .unwrap()
                .iter()
                .find(|n| n.link == bridge.index && n.address.to_string() == a)
                .unwrap();
            host.run(Request::delete_neighbour(&neighbour)).unwrap();
            assert_eq!(m.call("CHECK", "a", &check).code(), 101);
            host.run(Request::add_neighbour(&neighbour)).unwrap();
            assert!(m.call("CHECK", "a", &check).ok);

            // A lost state file, a lost pod, a bridge that somebody deleted.
            std::fs::remove_file(m.state()).unwrap();
            assert!(m.call("DEL", "a", &conf).ok);
            assert_eq!((m.reservations(), m.pod_links().len()), (1, 1), "{mode}");
            // cnitool sends no list: a pod that is still attached stays.
            conf.as_object_mut().unwrap().remove("cni.dev/valid-attachments");
            assert!(m.call("GC", "-", &conf).ok, "{mode}");
            assert_eq!((m.reservations(), m.pod_links().len()), (1, 1), "{mode}");
            netns::delete(&m.pod_path("b")).unwrap();
            drop(pod_b);
            // A runtime without pods sends a list that is empty, or null.
            conf["cni.dev/valid-attachments"] = if mode == "bridge" { Value::Null } else { json!([]) };
            let gc = m.call("GC", "-", &conf);
            assert!(gc.ok, "{gc:?}");
            assert_eq!(m.kernel(), before, "{mode}");
            assert_eq!(m.reservations(), 0);
        }
        let mut conf = m.conf("1.1.0");
        conf["mode"] = json!("bridge");
        conf["bridge"] = json!("nic0");
        m.pod("c");
        let out = m.call("ADD", "c", &conf);
        assert_eq!(out.code(), 100);
        assert!(out.doc.unwrap().to_string().contains("not made by azure-vnet"));
        conf["bridge"] = json!("azure0");
        assert!(m.call("STATUS", "c", &conf).ok);
        linux::sysctl::set("net/bridge/bridge-nf-call-iptables", "0").unwrap();
        let out = m.call("STATUS", "c", &conf);
        assert_eq!(out.code(), 50);
        assert!(out.doc.unwrap().to_string().contains("br_netfilter"));
        conf["mode"] = json!("tunnel");
        assert!(m.call("STATUS", "c", &conf).ok, "tunnel mode bridges nothing");
        assert_eq!(m.kernel(), before);
    });
}

/// Every step of every verb, in every mode: the process dies there, and afterwards GC, or DEL and GC, leave nothing.
#[test]
fn a_crash_at_any_step_leaves_nothing() {
    let mut killed = BTreeSet::new();
    let (tell, told) = std::sync::mpsc::channel();
    let in_mode = |mode: &'static str| {
        let tell = tell.clone();
        on_machine(10..20, move |m| {
            let before = m.kernel();
            let mut conf = m.conf("1.1.0");
            conf["mode"] = json!(mode);
            conf["ipam"]["queryInterval"] = json!("0");
            conf["ipMasq"] = json!(true);
            let mut gc = conf.clone();
            gc["cni.dev/valid-attachments"] = json!([]);
            let dies = |verb: &str, conf: &Value, step: &str| {
                let netns = m.pod_path("p");
                let env = [
                    ("CNI_CONTAINERID", "p"),
                    ("CNI_IFNAME", "eth0"),
                    ("CNI_NETNS", netns.to_str().unwrap()),
                    (cni::steps::VARIABLE, step),
                ];
                let out = exec(
                    env!("CARGO_BIN_EXE_azure-vnet"),
                    verb,
                    &env,
                    conf.to_string().as_bytes(),
                );
                if !out.ok {
                    assert!(out.doc.is_none(), "killed, so silent: {step} {out:?}");
                    tell.send(step.to_owned()).unwrap();
                }
                out
            };
            for step in cni::steps::ALL {
                for (verb, repair) in [
                    ("ADD", "GC"),
                    ("ADD", "DEL"),
                    ("DEL", "DEL"),
                    ("DEL", "GC"),
                    ("GC", "GC"),
                ] {
                    let about = format!("{mode} {verb} {step} {repair}");
                    netns::delete(&m.pod_path("p")).unwrap();
                    let _pod = m.pod("p");
                    if verb != "ADD" {
                        m.call("ADD", "p", &conf).address();
                    }
                    let out = dies(verb, if verb == "GC" { &gc } else { &conf }, step);
                    if out.ok && verb == "DEL" {
                        continue; // Which does not pass this step.
                    }
                    let repaired = m.call(repair, "p", if repair == "GC" { &gc } else { &conf });
                    assert!(repaired.ok, "{about}: {repaired:?}");
                    assert_eq!((m.reservations(), m.pod_links().len()), (0, 0), "{about}");
                    if repair == "DEL" {
                        let pods: Vec<String> = m.kernel().into_iter().filter(|l| l.contains("10.240.0.1")).collect();
                        let pods: Vec<&String> = pods
                            .iter()
                            .filter(|l| !l.contains("10.240.0.1/") && !l.contains("10.240.0.1 "))
                            .collect();
                        assert!(pods.is_empty(), "{about}: {pods:?}");
                        assert!(m.call("GC", "p", &gc).ok, "{about}");
                    }
                    assert_eq!(m.kernel(), before, "{about}");
                }
            }
            // The pod that comes next finds everything in order.
            netns::delete(&m.pod_path("p")).unwrap();
            m.pod("p");
            m.call("ADD", "p", &conf).address();
            assert!(m.call("GC", "p", &gc).ok);
        });
    };
    std::thread::scope(|scope| {
        for mode in ["transparent", "bridge", "tunnel"] {
            scope.spawn(|| in_mode(mode));
        }
    });
    drop(tell);
    killed.extend(told);
    assert_eq!(
        killed,
        cni::steps::ALL.iter().map(|s| (*s).to_owned()).collect(),
        "steps passed by no verb"
    );
}

#[test]
fn a_panic_prints_one_document_and_what_it_left_is_collected() {
    on_machine(10..20, |m| {
        m.pod("p");
        for step in ["reserved", "veth-made"] {
            let netns = m.pod_path("p");
            let at = format!("panic:{step}");
            let env = [
                ("CNI_CONTAINERID", "p"),
                ("CNI_IFNAME", "eth0"),
                ("CNI_NETNS", netns.to_str().unwrap()),
                (cni::steps::VARIABLE, at.as_str()),
            ];
            let conf = m.conf("0.4.0");
            let out = exec(
                env!("CARGO_BIN_EXE_azure-vnet"),
                "ADD",
                &env,
                conf.to_string().as_bytes(),
            );
            assert_eq!(out.code(), 999);
            assert_eq!(out.doc.unwrap()["cniVersion"], "0.4.0");
            assert!(m.gc(&[]).ok);
            assert_eq!((m.reservations(), m.pod_links().len()), (0, 0));
        }
    });
}

#[test]
fn check_sees_what_was_changed_behind_its_back() {
    on_machine(10..30, |m| {
        let result = m.add("a", "1.1.0").doc.unwrap();
        let conf = m.with_previous("1.1.0", &result);
        let pod = m.pod("a");
        let mut inside = Route::open_in(&pod).unwrap();
        let eth0 = inside.need_link("eth0").unwrap().index;
        let message = |out: Out| {
            assert_eq!(out.code(), 101);
            out.doc.unwrap()["msg"].as_str().unwrap().to_owned()
        };
        let default = *inside
            .routes()
            .unwrap()
            .iter()
            .find(|r| r.destination.prefix_len() == 0 && r.table == 254)
            .unwrap();
        inside.run(Request::delete_route(&default)).unwrap();
        assert!(message(m.call("CHECK", "a", &conf)).contains("route in the pod"));
        inside.run(Request::add_route(&default)).unwrap();
        assert!(m.call("CHECK", "a", &conf).ok);
        inside.run(Request::set_up(eth0, false)).unwrap();
        assert!(message(m.call("CHECK", "a", &conf)).contains("state of eth0"));
        let mut host = Route::open().unwrap();
        host.run(Request::delete_link_named(&m.pod_links()[0])).unwrap();
        assert!(message(m.call("CHECK", "a", &conf)).contains("host link"));
        assert!(m.call("DEL", "a", &conf).ok, "DEL after the link vanished");
        assert_eq!(m.reservations(), 0);
    });
}

#[test]
fn deletion_succeeds_whatever_is_lost() {
    on_machine(10..13, |m| {
        assert!(
            m.call("DEL", "never", &m.conf("1.0.0")).ok,
            "unknown attachment, no namespace"
        );
        m.add("a", "1.0.0").address();
        std::fs::remove_file(m.state()).unwrap();
        netns::delete(&m.pod_path("a")).unwrap();
        assert!(m.call("DEL", "a", &m.conf("1.0.0")).ok, "namespace and state gone");
        assert!(m.pod_links().is_empty());
        assert_eq!(m.reservations(), 0);

        // Lost or damaged state is rebuilt from the links: nothing alive is handed out again.
        let mut seen = BTreeSet::from([m.add("b", "1.0.0").address(), m.add("c", "1.0.0").address()]);
        std::fs::write(m.state(), b"\0\0\0\0").unwrap();
        let third = m.add("d", "1.0.0");
        assert!(third.stderr.contains("unusable"), "{}", third.stderr);
        assert!(seen.insert(third.address()));
        assert_eq!(m.add("e", "1.0.0").code(), 11, "three addresses, three pods");
        assert!(m.dir.path().join("state/ipam.json.broken").exists());
        std::fs::remove_dir_all(m.dir.path().join("state")).unwrap();
        let b = m.call("DEL", "b", &m.conf("1.0.0"));
        assert!(b.ok, "{b:?}");
        assert_eq!(m.reservations(), 2);
    });
}

#[test]
fn nothing_leaks_when_add_dies_between_steps() {
    on_machine(10..20, |m| {
        m.add("alive", "1.1.0").address();
        // After the reservation.
        let conf = m.conf("1.1.0");
        let env = [
            ("CNI_CONTAINERID", "dead1"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/t/pods/dead1"),
        ];
        assert!(
            exec(
                env!("CARGO_BIN_EXE_azure-vnet-ipam"),
                "ADD",
                &env,
                conf.to_string().as_bytes()
            )
            .ok
        );
        // After the link was made and before it was named.
        m.add("dead2", "1.1.0").address();
        let mut host = Route::open().unwrap();
        let alive = host
            .links()
            .unwrap()
            .into_iter()
            .find(|l| l.alias.as_deref().is_some_and(|a| a.contains(" alive ")));
        let dead = host
            .links()
            .unwrap()
            .into_iter()
            .find(|l| l.alias.as_deref().is_some_and(|a| a.contains(" dead2 ")))
            .unwrap();
        host.run(Request::set_alias(dead.index, "")).unwrap();
        // Another network's pod is nobody's business here.
        let mut other = m.conf("1.1.0");
        other["name"] = json!("other");
        m.pod("o");
        assert!(m.call("ADD", "o", &other).ok);
        assert_eq!((m.reservations(), m.pod_links().len()), (4, 3));

        // A missing list is not an empty one: what is attached stays.
        assert!(m.call("GC", "-", &m.conf("1.1.0")).ok);
        assert_eq!((m.reservations(), m.pod_links().len()), (2, 2));
        assert!(m.gc(&["alive"]).ok);
        assert_eq!((m.reservations(), m.pod_links().len()), (2, 2));
        assert!(m.pod_links().contains(&alive.unwrap().name));

        // A failing ADD undoes itself: the address is reserved before the master turns out to be missing.
        let mut conf = m.conf("1.1.0");
        conf["master"] = json!("nope0");
        m.pod("fails");
        assert_eq!(m.call("ADD", "fails", &conf).code(), 100);
        assert_eq!((m.reservations(), m.pod_links().len()), (2, 2));
    });
}

#[test]
fn the_separate_ipam_serves_other_plugins() {
    on_machine(10..20, |m| {
        let mut conf = m.conf("0.4.0");
        conf["type"] = json!("bridge");
        conf["ipMasq"] = json!(true);
        let ipam = |command: &str, id: &str, conf: &Value| {
            let env = [
                ("CNI_CONTAINERID", id),
                ("CNI_IFNAME", "eth0"),
                ("CNI_NETNS", "/proc/1/ns/net"),
            ];
            exec(
                env!("CARGO_BIN_EXE_azure-vnet-ipam"),
                command,
                &env,
                conf.to_string().as_bytes(),
            )
        };
        let out = ipam("ADD", "a", &conf);
        assert_eq!(out.address(), "10.240.0.10/24");
        let result = out.doc.unwrap();
        assert_eq!(result["ips"][0]["gateway"], "10.240.0.1");
        assert!(result.get("interfaces").is_none());
        assert_eq!(
            ipam("ADD", "a", &conf).address(),
            "10.240.0.10/24",
            "the same key, the same address"
        );
        let mut by_name = conf.clone();
        by_name["ipam"]["ipAddress"] = json!("10.240.0.15");
        assert_eq!(ipam("ADD", "b", &by_name).address(), "10.240.0.15/24");
        let mut check = conf.clone();
        check["prevResult"] = result;
        assert!(ipam("CHECK", "a", &check).ok);
        assert_eq!(ipam("CHECK", "b", &check).code(), 101);
        assert!(ipam("DEL", "a", &conf).ok && ipam("DEL", "a", &conf).ok);
        assert_eq!(ipam("CHECK", "a", &check).code(), 101);
        assert_eq!(m.reservations(), 1);
        // Least recently released comes last: the next is one never used.
        assert_eq!(ipam("ADD", "c", &conf).address(), "10.240.0.11/24");
    });
}

#[test]
fn the_pool_may_be_a_file_or_stand_in_the_configuration() {
    on_machine(10..12, |m| {
        m.set_wire(Wire::Silent);
        let file = m.dir.path().join("interfaces.json");
        let write = |first: &[&str], second: &[&str]| {
            let list = |a: &[&str]| a.iter().map(|a| json!({"Address": a})).collect::<Value>();
            let told = json!({"Interfaces": [{"MacAddress": "000D3A000001", "IsPrimary": true, "IPSubnets": [
                {"Prefix": "10.240.0.0/24", "IPAddresses": list(first)},
                {"Prefix": "10.241.0.0/24", "IPAddresses": list(second)}]}]});
            std::fs::write(&file, told.to_string()).unwrap();
        };
        let mut from_file = m.conf("1.1.0");
        from_file["ipam"] = json!({"type": "azure-vnet-ipam", "environment": "fileIpam", "interfacesFile": file,
            "coolDownMs": 0});
        let add = |id: &str, conf: &Value| {
            m.pod(id);
            m.call("ADD", id, conf)
        };
        write(&["10.240.0.50"], &["10.241.0.50"]);
        assert_eq!(add("a", &from_file).address(), "10.240.0.50/32");
        let mut second = from_file.clone();
        second["ipam"]["subnet"] = json!("10.241.0.0/24");
        assert_eq!(add("b", &second).address(), "10.241.0.50/32", "the second subnet's");
        assert_eq!(add("c", &from_file).code(), 11);
        // One address is withdrawn while in use, another one comes.
        write(&["10.240.0.51"], &["10.241.0.50"]);
        assert_eq!(
            add("c", &from_file).address(),
            "10.240.0.51/32",
            "a file is read every time"
        );
        assert!(m.call("DEL", "a", &from_file).ok);
        let full = add("d", &from_file);
        assert_eq!(full.code(), 11, "a withdrawn address does not come back");
        std::fs::write(&file, "{").unwrap();
        let out = add("d", &from_file);
        assert!(
            out.stderr.contains("going on with the addresses known before"),
            "{out:?}"
        );
        assert!(m.gc(&[]).ok);

        let mut listed = m.conf("1.1.0");
        listed["ipam"] = json!({"type": "azure-vnet-ipam", "coolDownMs": 0, "pools": [
            {"subnet": "10.240.0.0/24", "addresses": ["10.240.0.60-10.240.0.61"]},
            {"subnet": "10.241.0.0/24", "addresses": ["10.241.0.60"]}]});
        let mut by_name = listed.clone();
        by_name["ipam"]["ipAddress"] = json!("10.241.0.60");
        assert_eq!(add("e", &by_name).address(), "10.241.0.60/32");
        assert_eq!(add("f", &by_name).code(), 11, "it is held");
        assert_eq!(add("f", &listed).address(), "10.240.0.60/32");
        assert!(m.call("STATUS", "f", &listed).ok);
        for (key, value, word) in [
            ("ipAddress", json!("fd00::1"), "fd00::1 is not in this machine's pool"),
            ("environment", json!("null"), "environment"),
            (
                "pools",
                json!([{"subnet": "fd00::/64", "addresses": ["10.0.0.1"]}]),
                "not in fd00::/64",
            ),
        ] {
            let mut bad = listed.clone();
            bad["ipam"][key] = value;
            let out = add("g", &bad);
            assert_eq!(out.code(), 7);
            assert!(out.doc.unwrap().to_string().contains(word), "{key}");
        }
        let mut gc = listed.clone();
        gc["cni.dev/valid-attachments"] = json!([]);
        assert!(m.call("GC", "-", &gc).ok);
        assert_eq!((m.reservations(), m.pod_links().len()), (0, 0));
    });
}

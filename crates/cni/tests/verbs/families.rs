//! IPv6, alone and beside IPv4.

use std::path::Path;

use linux::{
    netlink::{Request, Route, RouteEntry},
    netns::{self, NetNs},
};
use serde_json::{Value, json};

use crate::machine::*;

fn conf(m: &Machine, mode: &str, pools: Value) -> Value {
    let mut conf = m.conf("1.1.0");
    conf["mode"] = json!(mode);
    conf["ipam"] = json!({"type": "azure-vnet-ipam", "coolDownMs": 0, "pools": pools});
    conf
}

const V4: &str = "10.240.0.40-10.240.0.45";
const V6: &str = "fd00:1::40-fd00:1::45";

fn both() -> Value {
    json!([{"subnet": "10.240.0.0/24", "addresses": [V4]}, {"subnet": "fd00:1::/64", "addresses": [V6]}])
}

/// Adds a pod; its namespace, addresses and result.
fn add(m: &Machine, id: &str, conf: &Value) -> (NetNs, Vec<String>, Value) {
    let pod = m.pod(id);
    let out = m.call("ADD", id, conf);
    assert!(out.ok, "{out:?}");
    let result = out.doc.unwrap();
    let ips = result["ips"].as_array().unwrap().iter();
    let addresses = ips.map(|i| i["address"].as_str().unwrap().split('/').next().unwrap().to_owned());
    (pod, addresses.collect(), result)
}

#[test]
fn a_pod_has_an_address_of_each_family_and_both_carry_traffic() {
    on_machine(10..12, |m| {
        let (node, fabric) = (
            NetNs::current().unwrap(),
            netns::open(Path::new("/run/t/fabric")).unwrap(),
        );
        let before = m.kernel();
        for mode in ["transparent", "bridge"] {
            let conf = conf(m, mode, both());
            let ((a, at_a, result), (b, at_b, _)) = (add(m, "a", &conf), add(m, "b", &conf));
            assert!(
                at_a[0].starts_with("10.240.0.4") && at_a[1].starts_with("fd00:1::4"),
                "{at_a:?}"
            );
            assert_eq!(result["ips"][1]["address"], format!("{}/128", at_a[1]));
            let routes: Vec<&Value> = result["routes"].as_array().unwrap().iter().map(|r| &r["dst"]).collect();
            assert_eq!(routes, ["0.0.0.0/0", "::/0"]);
            for family in 0..2 {
                let (a_ip, b_ip) = (&at_a[family], &at_b[family]);
                let (node_ip, fabric_ip) = [("10.240.0.4", "10.240.0.1"), ("fd00:1::4", "fd00:1::1")][family];
                for (from, to, address) in [
                    (&a, &b, b_ip.as_str()),
                    (&b, &a, a_ip),
                    (&node, &a, a_ip),
                    (&a, &node, node_ip),
                    (&a, &fabric, fabric_ip),
                    (&fabric, &b, b_ip),
                ] {
                    assert!(reaches(from, to, address), "{mode}: {address}");
                }
                assert_eq!(source_seen(&a, &fabric, fabric_ip).as_ref(), Some(a_ip), "{mode}");
            }

            let mut check = conf.clone();
            check["prevResult"] = result;
            let checked = m.call("CHECK", "a", &check);
            assert!(checked.ok, "{mode}: {checked:?}");
            let mut host = Route::open().unwrap();
            let route = |host: &mut Route| {
                let routes = host.routes().unwrap();
                *routes
                    .iter()
                    .find(|r| r.destination.addr().to_string() == at_a[1] && r.table == 254)
                    .unwrap()
            };
            let there = route(&mut host);
            host.run(Request::delete_route(&there)).unwrap();
            assert_eq!(m.call("CHECK", "a", &check).code(), 101, "{mode}");
            let back = RouteEntry::via_link(there.destination, there.link.unwrap());
            host.run(Request::add_route(&back)).unwrap();
            assert!(m.call("CHECK", "a", &check).ok, "{mode}");

            // Both addresses of both pods are found again in the kernel.
            std::fs::remove_file(m.state()).unwrap();
            let (_c, at_c, _) = add(m, "c", &conf);
            assert!(at_a.iter().chain(&at_b).all(|a| !at_c.contains(a)), "{mode}: {at_c:?}");
            assert_eq!(m.reservations(), 6);
            assert!(m.call("DEL", "a", &conf).ok);
            assert_eq!(m.reservations(), 4);
            assert!(!reaches(&b, &a, &at_a[1]));
            let mut gc = conf.clone();
            gc["cni.dev/valid-attachments"] = json!([]);
            assert!(m.call("GC", "-", &gc).ok);
            assert_eq!(m.kernel(), before, "{mode}");
            assert_eq!(m.reservations(), 0);
        }
    });
}

#[test]
fn ipv6_alone_works_also_where_the_runtime_switched_it_off() {
    on_machine(10..12, |m| {
        let fabric = netns::open(Path::new("/run/t/fabric")).unwrap();
        let only = json!([{"subnet": "fd00:1::/64", "addresses": [V6], "mac": "000D3A000001"}]);
        for mode in ["transparent", "bridge"] {
            let conf = conf(m, mode, only.clone());
            let pod = m.pod("a");
            pod.run(|| {
                for key in ["all", "default"] {
                    linux::sysctl::set(&format!("net/ipv6/conf/{key}/disable_ipv6"), "1").unwrap();
                }
            })
            .unwrap();
            let (pod, at, result) = add(m, "a", &conf);
            assert_eq!((at.len(), result["routes"].as_array().unwrap().len()), (1, 1));
            assert!(reaches(&pod, &fabric, "fd00:1::1"), "{mode}");
            assert!(reaches(&fabric, &pod, &at[0]), "{mode}");
            let status = m.call("STATUS", "a", &conf);
            assert!(status.ok || mode == "bridge", "{status:?}");
            assert!(m.call("DEL", "a", &conf).ok);
            netns::delete(&m.pod_path("a")).unwrap();
        }
        assert_eq!(m.reservations(), 0);
    });
}

#[test]
fn a_family_that_is_used_up_or_that_the_mode_does_not_carry_is_named() {
    on_machine(10..12, |m| {
        let short = json!([{"subnet": "10.240.0.0/24", "addresses": [V4]},
            {"subnet": "fd00:1::/64", "addresses": ["fd00:1::40"]}]);
        let conf_short = conf(m, "transparent", short);
        add(m, "a", &conf_short);
        m.pod("b");
        let out = m.call("ADD", "b", &conf_short);
        assert_eq!(out.code(), 11);
        assert!(out.doc.unwrap().to_string().contains("1 of 1"));
        assert_eq!(m.reservations(), 2, "no IPv4 address is left with nobody");
        let status = m.call("STATUS", "b", &conf_short);
        assert_eq!(status.code(), 50);

        let tunnel = m.call("ADD", "b", &conf(m, "tunnel", both()));
        assert_eq!(tunnel.code(), 100);
        let said = tunnel.doc.unwrap()["msg"].as_str().unwrap().to_owned();
        assert!(
            said.contains("tunnel carries no IPv6") && said.contains("fd00:1::4"),
            "{said}"
        );
        assert_eq!(m.reservations(), 2, "and what was reserved is given back");

        // The wire server and the file tell both families, too; `ipam.subnet` picks one.
        let told = interfaces(10..12).replace(
            "</Interface>",
            "<IPSubnet Prefix=\"fd00:1::/64\"><IPAddress Address=\"fd00:1::50\"/></IPSubnet></Interface>",
        );
        m.set_wire(Wire::Answer(told));
        let wire = m.conf("1.1.0");
        let (_c, at, _) = add(m, "c", &wire);
        assert_eq!(at, ["10.240.0.10", "fd00:1::50"]);
        let file = m.dir.path().join("interfaces.json");
        let list = json!({"Interfaces": [{"MacAddress": "000D3A000001", "IsPrimary": true, "IPSubnets": [
            {"Prefix": "10.240.0.0/24", "IPAddresses": [{"Address": "10.240.0.60"}]},
            {"Prefix": "fd00:1::/64", "IPAddresses": [{"Address": "fd00:1::60"}]}]}]});
        std::fs::write(&file, list.to_string()).unwrap();
        let mut from_file = m.conf("1.1.0");
        from_file["ipam"] = json!({"type": "azure-vnet-ipam", "environment": "fileIpam", "interfacesFile": file,
            "subnet": "fd00:1::/64"});
        let (_d, at, _) = add(m, "d", &from_file);
        assert_eq!(at, ["fd00:1::60"]);
    });
}

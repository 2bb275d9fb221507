//! `ipMasq`, seen from the world beyond the virtual network.

use std::path::Path;

use linux::{
    netlink::{Address, Request, Route},
    netns,
    nft::{Family, Nft},
};
use serde_json::json;

use crate::machine::*;

#[test]
fn pods_leave_with_the_nodes_address_except_to_the_exempt_and_to_the_platform() {
    on_machine(10..30, |m| {
        let before = m.kernel();
        let fabric = netns::open(Path::new("/run/t/fabric")).unwrap();
        let mut there = Route::open_in(&fabric).unwrap();
        let port = there.need_link("port").unwrap().index;
        for world in ["20.0.0.1/32", "172.16.0.1/32", "168.63.129.16/32"] {
            let address = Address {
                link: port,
                address: world.parse().unwrap(),
                no_prefix_route: false,
            };
            there.run(Request::add_address(&address)).unwrap();
        }
        let tables = || {
            let mut nft = Nft::open().unwrap();
            let names = nft.tables().unwrap().into_iter().map(|(_, name)| name);
            names.filter(|n| n.starts_with("azure-ipmasq-")).collect::<Vec<_>>()
        };
        for mode in ["transparent", "bridge", "tunnel"] {
            let mut conf = m.conf("1.1.0");
            conf["mode"] = json!(mode);
            let add = |id: &str, conf: &serde_json::Value| {
                let pod = m.pod(id);
                let out = m.call("ADD", id, conf);
                let address = out.address();
                (pod, address.split('/').next().unwrap().to_owned())
            };
            let (plain, address) = add("plain", &conf);
            assert_eq!(source_seen(&plain, &fabric, "20.0.0.1"), Some(address));
            assert_eq!(tables(), [""; 0], "{mode}: nobody asked");

            conf["ipMasq"] = json!(true);
            conf["nonMasqueradeCIDRs"] = json!(["10.0.0.0/8", "10.240.0.0/16"]);
            let (pod, own) = add("a", &conf);
            let seen = |world: &str| source_seen(&pod, &fabric, world).unwrap_or_else(|| panic!("{mode}: {world}"));
            assert_eq!(seen("20.0.0.1"), "10.240.0.4", "{mode}");
            assert_eq!(seen("172.16.0.1"), "10.240.0.4", "{mode}");
            assert_eq!(seen("10.240.0.1"), own, "{mode}: exempt");
            assert_eq!(seen("168.63.129.16"), own, "{mode}: the platform sees the pod");
            let counters = Nft::open().unwrap().counters(Family::Ip, &tables()[0]).unwrap();
            assert_eq!(counters[0].packets, 2, "{mode}");

            // The same again changes nothing; other ranges replace the old ones.
            let (_again, _) = add("b", &conf);
            assert_eq!(tables().len(), 1);
            conf.as_object_mut().unwrap().remove("nonMasqueradeCIDRs");
            let (other, own) = add("c", &conf);
            assert_eq!(
                source_seen(&other, &fabric, "172.16.0.1"),
                Some(own),
                "{mode}: private by default"
            );
            assert_eq!(
                source_seen(&other, &fabric, "20.0.0.1").as_deref(),
                Some("10.240.0.4"),
                "{mode}"
            );

            // It goes with the last pod, or when it is switched off.
            let gc = |conf: &serde_json::Value, valid: &[&str]| {
                let mut conf = conf.clone();
                let valid = valid.iter().map(|id| json!({"containerID": id, "ifname": "eth0"}));
                conf["cni.dev/valid-attachments"] = valid.collect();
                let out = m.call("GC", "-", &conf);
                assert!(out.ok, "{mode}: {out:?}");
            };
            gc(&conf, &["c"]);
            assert_eq!(tables().len(), 1, "{mode}");
            if mode == "bridge" {
                conf["ipMasq"] = json!(false);
                gc(&conf, &["c"]);
                assert_eq!(tables(), [""; 0], "{mode}");
            }
            gc(&conf, &[]);
            assert_eq!(m.kernel(), before, "{mode}");
            assert_eq!(m.reservations(), 0);
        }
    });
}

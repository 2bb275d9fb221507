//! The IPAddress objects behind ClusterIPs, and the ranges of ServiceCIDRs.
//!
//! An address is given out in the transaction that writes its Service: the claim `a/ip/<address>` decides who has it, and
//! the IPAddress object is made beside it for everybody to see. So an object that somebody deleted by hand does not free
//! its address (a controller makes it anew), and one that somebody made keeps the address from Services.

use std::net::Ipv4Addr;

use apimachinery::meta;
use serde_json::{Value, json};

use super::{Beside, ServiceRange};
use crate::cluster::Cluster;
use crate::handlers::write;
use crate::object::Encoded;

const GROUP: &str = "networking.k8s.io";
/// Who made an address object.
const MANAGED_BY: (&str, &str) = ("ipaddress.kubernetes.io/managed-by", "ipallocator.k8s.io");
const FAMILY: (&str, &str) = ("ipaddress.kubernetes.io/ip-family", "IPv4");

/// The ClusterIP of a service, if it has one.
pub fn of(service: &Value) -> Option<&str> {
    service["spec"]["clusterIP"]
        .as_str()
        .filter(|a| !matches!(*a, "" | "None"))
}

/// The IPAddress object of a service's address, without uid and time.
pub fn object(address: &str, service: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "IPAddress",
        "metadata": {"name": address, "labels": {MANAGED_BY.0: MANAGED_BY.1, FAMILY.0: FAMILY.1}},
        "spec": {"parentRef": {
            "resource": "services", "namespace": meta::namespace(service), "name": meta::name(service)}},
    })
}

/// What the change of a service does to its IPAddress objects.
pub fn beside(cluster: &Cluster, old: Option<&Value>, new: Option<&Value>) -> Vec<Beside> {
    let Some(served) = cluster.resource(GROUP, "v1", "ipaddresses") else {
        return Vec::new();
    };
    let (before, after) = (old.and_then(of), new.and_then(of));
    let mut out = Vec::new();
    if before == after {
        return out;
    }
    if let (Some(address), Some(service)) = (after, new) {
        let mut object = object(address, service);
        object["metadata"]["uid"] = cluster.new_uid().into();
        object["metadata"]["creationTimestamp"] = write::now(cluster).into();
        out.push(Beside {
            key: served.resource.store_key("", address),
            rv: 0,
            object: Some(Encoded::new(&object, served.resource.fields)),
        });
    }
    if let (Some(address), Some(service)) = (before, old)
        && let Some(present) = served.resource.get("", address)
        && is_of(&present.value(), service)
    {
        out.push(Beside {
            key: served.resource.store_key("", address),
            rv: present.rv,
            object: None,
        });
    }
    out
}

fn is_of(address: &Value, service: &Value) -> bool {
    let parent = &address["spec"]["parentRef"];
    parent["resource"] == "services"
        && parent["namespace"] == meta::namespace(service)
        && parent["name"] == meta::name(service)
}

/// Whether an address is spoken for, by a service or by an IPAddress object of somebody else.
pub fn is_taken(cluster: &Cluster, address: &str) -> bool {
    let object = || {
        let served = cluster.resource(GROUP, "v1", "ipaddresses");
        served.is_some_and(|s| s.resource.get("", address).is_some())
    };
    cluster.registry.is_claimed(&super::service::address_key(address)) || object()
}

/// Ranges that addresses are given out from: the cluster's own, then those of further ServiceCIDRs that are ready.
pub fn ranges(cluster: &Cluster) -> Vec<ServiceRange> {
    let mut ranges = vec![cluster.service_range];
    let Some(served) = cluster.resource(GROUP, "v1", "servicecidrs") else {
        return ranges;
    };
    for object in served.resource.snapshot().values().filter(|o| !o.header().deleting) {
        let cidr = object.value();
        let ready = cidr["status"]["conditions"]
            .as_array()
            .is_some_and(|c| c.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"));
        let parsed = cidr["spec"]["cidrs"].as_array().into_iter().flatten();
        for range in parsed.filter_map(|c| ServiceRange::parse_further(c.as_str()?)) {
            if ready && !ranges.contains(&range) {
                ranges.push(range);
            }
        }
    }
    ranges
}

/// Whether any range holds the address.
pub fn in_range(cluster: &Cluster, address: Ipv4Addr) -> bool {
    ranges(cluster).iter().any(|r| r.contains(address))
}

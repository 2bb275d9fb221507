//! Services, Endpoints and EndpointSlices.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Errors, list, names, text};
use crate::field::FieldError;

const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];
/// Most endpoints, ports and addresses of a slice.
const ENDPOINTS_MAX: usize = 1000;
const PORTS_MAX: usize = 20_000;
const ADDRESSES_MAX: usize = 100;

pub(super) fn headless(object: &Value) -> bool {
    list(&object["spec"]["clusterIPs"])
        .first()
        .map_or(object["spec"]["clusterIP"] == "None", |ip| ip == "None")
}

pub(super) fn service(errors: &mut Errors, object: &Value) {
    let spec = &object["spec"];
    let kind = text(spec, "type");
    let ports = list(&spec["ports"]);
    if ports.is_empty() && !headless(object) && kind != "ExternalName" {
        errors.required("spec.ports", "");
    }
    match kind {
        "LoadBalancer" | "NodePort" if headless(object) => {
            errors.invalid(
                "spec.clusterIPs[0]",
                "None",
                &format!("may not be set to 'None' for {kind} services"),
            );
        }
        "ExternalName" => {
            for (field, filled) in [
                ("clusterIPs", !list(&spec["clusterIPs"]).is_empty()),
                ("ipFamilies", !list(&spec["ipFamilies"]).is_empty()),
                ("ipFamilyPolicy", !spec["ipFamilyPolicy"].is_null()),
            ] {
                if filled {
                    errors.forbidden(format!("spec.{field}"), "may not be set for ExternalName services");
                }
            }
            match text(spec, "externalName").trim_end_matches('.') {
                "" => errors.required("spec.externalName", ""),
                name => errors.messages("spec.externalName", name, names::dns_subdomain(name)),
            }
        }
        _ => {}
    }
    service_ports(errors, ports, kind);
    errors.labels("spec.selector", &spec["selector"]);
    errors.one_of("spec.sessionAffinity", &spec["sessionAffinity"], &["ClientIP", "None"]);
    if spec["sessionAffinity"] == "ClientIP" {
        let seconds = &spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"];
        if seconds.as_i64().is_some_and(|s| s <= 0 || s > 86_400) {
            let path = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
            errors.invalid(path, seconds.clone(), "must be greater than 0 and less than 86400");
        }
    }
    let addresses = list(&spec["clusterIPs"]);
    if spec["clusterIP"].is_string() && addresses.first().is_some_and(|first| *first != spec["clusterIP"]) {
        let detail = "first value must match `clusterIP`";
        errors.invalid("spec.clusterIPs", spec["clusterIPs"].clone(), detail);
    }
    for (i, ip) in addresses.iter().enumerate() {
        let ip = ip.as_str().unwrap_or_default();
        if !matches!(ip, "" | "None") {
            errors.messages(&format!("spec.clusterIPs[{i}]"), ip, names::ip(ip));
        }
    }
    for (i, ip) in list(&spec["externalIPs"]).iter().enumerate() {
        let ip = ip.as_str().unwrap_or_default();
        errors.messages(&format!("spec.externalIPs[{i}]"), ip, names::ip(ip));
    }
    errors.one_of(
        "spec.type",
        &spec["type"],
        &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"],
    );
    if !list(&spec["loadBalancerSourceRanges"]).is_empty() && kind != "LoadBalancer" {
        errors.forbidden(
            "spec.LoadBalancerSourceRanges",
            "may only be used when `type` is 'LoadBalancer'",
        );
    }
    for (field, name) in [
        ("allocateLoadBalancerNodePorts", "LoadBalancer"),
        ("loadBalancerClass", "LoadBalancer"),
    ] {
        if !spec[field].is_null() && kind != name {
            errors.forbidden(
                format!("spec.{field}"),
                "may only be used when `type` is 'LoadBalancer'",
            );
        }
    }
    if spec["externalTrafficPolicy"].is_string() {
        let external = matches!(kind, "NodePort" | "LoadBalancer")
            || (kind == "ClusterIP" && !list(&spec["externalIPs"]).is_empty());
        if external {
            errors.one_of(
                "spec.externalTrafficPolicy",
                &spec["externalTrafficPolicy"],
                &["Cluster", "Local"],
            );
        } else {
            let detail = "may only be set for externally-accessible services";
            errors.invalid(
                "spec.externalTrafficPolicy",
                spec["externalTrafficPolicy"].clone(),
                detail,
            );
        }
    }
    if spec["internalTrafficPolicy"].is_string() {
        errors.one_of(
            "spec.internalTrafficPolicy",
            &spec["internalTrafficPolicy"],
            &["Cluster", "Local"],
        );
    }
}

fn service_ports(errors: &mut Errors, ports: &[Value], kind: &str) {
    let mut taken_names = BTreeSet::new();
    let mut taken_ports = BTreeSet::new();
    let mut taken_node_ports = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let path = format!("spec.ports[{i}]");
        let at = |field: &str| format!("{path}.{field}");
        let name = text(port, "name");
        if !name.is_empty() {
            errors.messages(&at("name"), name, names::dns_label(name));
            if !taken_names.insert(name) {
                errors.push(FieldError::duplicate(at("name"), name));
            }
        } else if ports.len() > 1 {
            errors.required(at("name"), "");
        }
        errors.port_number(&at("port"), &port["port"]);
        errors.one_of(&at("protocol"), &port["protocol"], &PROTOCOLS);
        errors.port_number_or_name(&at("targetPort"), &port["targetPort"]);
        let protocol = text(port, "protocol");
        if let Some(node_port) = port["nodePort"].as_i64().filter(|p| *p != 0) {
            if kind == "ClusterIP" {
                errors.forbidden(at("nodePort"), "may not be used when `type` is 'ClusterIP'");
            }
            if !taken_node_ports.insert((protocol, node_port)) {
                errors.push(FieldError::duplicate(at("nodePort"), node_port));
            }
        }
        if !taken_ports.insert((protocol, port["port"].as_i64())) {
            let shown = serde_json::json!({ "protocol": protocol, "port": port["port"] });
            errors.push(FieldError::duplicate(path.clone(), shown));
        }
    }
}

pub(super) fn endpoints(errors: &mut Errors, object: &Value) {
    for (i, subset) in list(&object["subsets"]).iter().enumerate() {
        let path = format!("subsets[{i}]");
        let groups = [
            ("addresses", &subset["addresses"]),
            ("notReadyAddresses", &subset["notReadyAddresses"]),
        ];
        if groups.iter().all(|(_, a)| list(a).is_empty()) {
            errors.required(&path, "must specify `addresses` or `notReadyAddresses`");
        }
        for (name, addresses) in groups {
            for (j, a) in list(addresses).iter().enumerate() {
                errors.messages(
                    &format!("{path}.{name}[{j}].ip"),
                    text(a, "ip"),
                    names::ip(text(a, "ip")),
                );
            }
        }
        let ports = list(&subset["ports"]);
        for (j, port) in ports.iter().enumerate() {
            let at = |field: &str| format!("{path}.ports[{j}].{field}");
            match text(port, "name") {
                "" if ports.len() > 1 => errors.required(at("name"), ""),
                "" => {}
                name => errors.messages(&at("name"), name, names::dns_label(name)),
            }
            errors.port_number(&at("port"), &port["port"]);
            errors.one_of(&at("protocol"), &port["protocol"], &PROTOCOLS);
        }
    }
}

pub(super) fn endpoint_slice(errors: &mut Errors, object: &Value) {
    let family = text(object, "addressType");
    errors.one_of("addressType", &object["addressType"], &["FQDN", "IPv4", "IPv6"]);
    let ports = list(&object["ports"]);
    if ports.len() > PORTS_MAX {
        errors.push(FieldError::too_many("ports", ports.len(), PORTS_MAX));
    }
    let mut taken = BTreeSet::new();
    for (i, port) in ports.iter().take(PORTS_MAX).enumerate() {
        let at = |field: &str| format!("ports[{i}].{field}");
        let name = text(port, "name");
        if !name.is_empty() {
            errors.messages(&at("name"), name, names::dns_label(name));
        }
        if !taken.insert(name) {
            errors.push(FieldError::duplicate(at("name"), name));
        }
        errors.one_of(&at("protocol"), &port["protocol"], &PROTOCOLS);
    }
    let endpoints = list(&object["endpoints"]);
    if endpoints.len() > ENDPOINTS_MAX {
        errors.push(FieldError::too_many("endpoints", endpoints.len(), ENDPOINTS_MAX));
        return;
    }
    for (i, endpoint) in endpoints.iter().enumerate() {
        let path = format!("endpoints[{i}].addresses");
        let addresses = list(&endpoint["addresses"]);
        match addresses.len() {
            0 => errors.required(&path, "must contain at least 1 address"),
            n if n > ADDRESSES_MAX => errors.push(FieldError::too_many(&path, n, ADDRESSES_MAX)),
            _ => {}
        }
        for (j, address) in addresses.iter().enumerate() {
            let address = address.as_str().unwrap_or_default();
            let at = format!("{path}[{j}]");
            match (family, address.parse::<std::net::IpAddr>()) {
                ("IPv4", Ok(ip)) if !ip.is_ipv4() => errors.invalid(&path, address, "must be an IPv4 address"),
                ("IPv6", Ok(ip)) if !ip.is_ipv6() => errors.invalid(&path, address, "must be an IPv6 address"),
                ("IPv4" | "IPv6", Err(_)) => errors.messages(&at, address, names::ip(address)),
                ("FQDN", _) => errors.messages(&at, address, names::dns_subdomain(address.trim_end_matches('.'))),
                _ => {}
            }
        }
        let node = text(endpoint, "nodeName");
        if !node.is_empty() {
            errors.messages(&format!("endpoints[{i}].nodeName"), node, names::dns_subdomain(node));
        }
        let host = text(endpoint, "hostname");
        if !host.is_empty() {
            errors.messages(&format!("endpoints[{i}].hostname"), host, names::dns_label(host));
        }
    }
}

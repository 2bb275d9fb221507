//! IPAddresses and ServiceCIDRs.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::Value;

use super::{Errors, list, names, text};
use crate::meta;

/// Longest and shortest prefix of a range that addresses are given out from: a smaller range holds no service, a larger
/// one would be searched for too long when it is full.
const PREFIXES: std::ops::RangeInclusive<u8> = 12..=30;

pub(super) fn ip_address(errors: &mut Errors, object: &Value) {
    let name = meta::name(object);
    if let Ok(ip) = name.parse::<IpAddr>()
        && ip.to_string() != name
    {
        errors.invalid(
            "metadata.name",
            name,
            &format!("must be in canonical form ({:?})", ip.to_string()),
        );
    }
    let path = "spec.parentRef";
    let parent = &object["spec"]["parentRef"];
    if parent.is_null() {
        errors.required(path, "");
        return;
    }
    let group = text(parent, "group");
    if !group.is_empty() {
        errors.messages(&format!("{path}.group"), group, names::dns_subdomain(group));
    }
    for field in ["resource", "name"] {
        let at = format!("{path}.{field}");
        match text(parent, field) {
            "" => errors.required(at, ""),
            value => errors.messages(&at, value, names::path_segment(value)),
        }
    }
    let namespace = text(parent, "namespace");
    if !namespace.is_empty() {
        errors.messages(&format!("{path}.namespace"), namespace, names::path_segment(namespace));
    }
}

pub(super) fn service_cidr(errors: &mut Errors, object: &Value) {
    let cidrs = list(&object["spec"]["cidrs"]);
    match cidrs.len() {
        0 => errors.required("spec.cidrs", "at least one CIDR required"),
        1 => {}
        2 => {
            let families: Vec<bool> = cidrs
                .iter()
                .map(|c| c.as_str().is_some_and(|c| c.contains(':')))
                .collect();
            if families[0] == families[1] {
                let detail = "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64";
                errors.invalid("spec.cidrs", object["spec"]["cidrs"].clone(), detail);
            }
        }
        _ => errors.invalid(
            "spec.cidrs",
            object["spec"]["cidrs"].clone(),
            "may only hold up to 2 values",
        ),
    }
    for (i, cidr) in cidrs.iter().enumerate() {
        let cidr = cidr.as_str().unwrap_or_default();
        if let Some(detail) = wrong(cidr) {
            errors.invalid(format!("spec.cidrs[{i}]"), cidr, &detail);
        }
    }
}

fn wrong(cidr: &str) -> Option<String> {
    const FORM: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
    let parsed = cidr
        .split_once('/')
        .and_then(|(ip, bits)| Some((ip.parse::<IpAddr>().ok()?, bits.parse::<u8>().ok()?)));
    let (ip, bits) = match parsed {
        Some((IpAddr::V4(ip), bits)) if bits <= 32 => (ip, bits),
        Some((IpAddr::V6(_), bits)) if bits <= 128 => {
            return Some("IPv6 ranges are not served: services have IPv4 addresses only".into());
        }
        _ => return Some(FORM.into()),
    };
    if !PREFIXES.contains(&bits) {
        return Some(format!(
            "prefixes from /{} to /{} are served",
            PREFIXES.start(),
            PREFIXES.end()
        ));
    }
    let network = Ipv4Addr::from(u32::from(ip) & (u32::MAX << (32 - bits)));
    if network != ip || format!("{ip}/{bits}") != cidr {
        return Some(format!("must be in canonical form (\"{network}/{bits}\")"));
    }
    None
}

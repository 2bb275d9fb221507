//! What a Service of type LoadBalancer asks for: its fields and annotations, read once. Pure.
//!
//! # Source
//! Annotations of cloud-provider-azure 1.31 (`pkg/consts/consts.go`).

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1::Service;

const PREFIX: &str = "service.beta.kubernetes.io/";
/// Annotations that narrow who may reach the Service, or need what is not there: leaving them out quietly would open more
/// than was asked for, or promise something.
const REFUSED: &[&str] = &[
    "azure-allowed-service-tags",
    "azure-pls-create",
    "azure-pip-prefix-id",
    "azure-load-balancer-ipv6",
    "azure-load-balancer-configurations",
];
const IDLE_MINUTES: std::ops::RangeInclusive<u32> = 4..=100;
const IDLE_DEFAULT: u32 = 4;

/// A Service's wishes, checked as far as they can be by themselves.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Request {
    pub place: Place,
    /// A certain address: of the public pool, or of the subnet.
    pub address: Option<Ipv4Addr>,
    /// Who may connect; empty: everyone.
    pub sources: Vec<Ipv4Net>,
    pub client_affinity: bool,
    pub idle_timeout_s: u32,
    pub tcp_reset: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    Public {
        /// Name of a public address that somebody made, and the resource group it lies in if not the nodes'.
        name: Option<String>,
        group: Option<String>,
        /// DNS label of the address made for the Service.
        label: Option<String>,
    },
    /// Name of a subnet of the cluster's virtual network, if not the nodes'.
    Internal { subnet: Option<String> },
}

/// Reads `service`. `None` if it is no LoadBalancer of ours, or on its way out.
/// # Errors: what cannot be served, in words for the Service's owner.
pub(crate) fn request(service: &Service) -> Result<Option<Request>, String> {
    let Some(spec) = &service.spec else { return Ok(None) };
    let ours = spec.type_.as_deref() == Some("LoadBalancer") && spec.load_balancer_class.is_none();
    if !ours || service.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let annotation = |name: &str| -> Option<&str> {
        let all = service.metadata.annotations.as_ref()?;
        all.get(&format!("{PREFIX}{name}"))
            .map(|v| v.trim())
            .filter(|v| !v.is_empty())
    };
    let is_true = |name: &str| annotation(name).is_some_and(|v| v.eq_ignore_ascii_case("true"));
    if let Some(name) = REFUSED
        .iter()
        .find(|n| annotation(n).is_some_and(|v| !v.eq_ignore_ascii_case("false")))
    {
        return Err(format!("annotation {PREFIX}{name} is not served; remove it"));
    }
    let wanted = annotation("azure-load-balancer-ipv4").or(spec.load_balancer_ip.as_deref().filter(|a| !a.is_empty()));
    let address = match wanted.map(|a| (a, a.parse())) {
        None => None,
        Some((_, Ok(address))) => Some(address),
        Some((text, Err(_))) => return Err(format!("{text:?} is not an IPv4 address")),
    };
    let owned = |name: &str| annotation(name).map(str::to_owned);
    let place = match is_true("azure-load-balancer-internal") {
        true => Place::Internal {
            subnet: owned("azure-load-balancer-internal-subnet"),
        },
        false => Place::Public {
            name: owned("azure-pip-name"),
            group: owned("azure-load-balancer-resource-group"),
            label: owned("azure-dns-label-name"),
        },
    };
    if let Place::Public { label: Some(label), .. } = &place
        && !is_label(label)
    {
        return Err(format!(
            "{label:?} is no DNS label: 3 to 63 of a-z, 0-9 and -, a letter first"
        ));
    }
    let mut sources = Vec::new();
    let fields = spec.load_balancer_source_ranges.iter().flatten().map(String::as_str);
    let lists = [
        annotation("load-balancer-source-ranges"),
        annotation("azure-allowed-ip-ranges"),
    ];
    for text in fields
        .chain(lists.into_iter().flatten().flat_map(|l| l.split(',')))
        .map(str::trim)
    {
        match text.parse::<Ipv4Net>() {
            Ok(net) => sources.push(net.trunc()),
            Err(_) => return Err(format!("{text:?} is not an IPv4 range that may connect")),
        }
    }
    sources.sort_unstable();
    sources.dedup();
    let minutes = match annotation("azure-load-balancer-tcp-idle-timeout") {
        None => IDLE_DEFAULT,
        Some(text) => match text.parse().ok().filter(|m| IDLE_MINUTES.contains(m)) {
            Some(minutes) => minutes,
            None => {
                return Err(format!(
                    "idle timeout value must be a whole number representing minutes between {} and {}, actual value: {text}",
                    IDLE_MINUTES.start(),
                    IDLE_MINUTES.end()
                ));
            }
        },
    };
    Ok(Some(Request {
        place,
        address,
        sources,
        client_affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
        idle_timeout_s: minutes * 60,
        tcp_reset: !is_true("azure-load-balancer-disable-tcp-reset"),
    }))
}

fn is_label(label: &str) -> bool {
    let middle = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (3..=63).contains(&label.len())
        && label.starts_with(|c: char| c.is_ascii_lowercase())
        && !label.ends_with('-')
        && label.bytes().all(middle)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(annotations: &[(&str, &str)], spec: Value) -> Result<Option<Request>, String> {
        let annotations: serde_json::Map<String, Value> = annotations
            .iter()
            .map(|(k, v)| (format!("{PREFIX}{k}"), json!(v)))
            .collect();
        let mut all = json!({"type": "LoadBalancer"});
        all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        let service = json!({"metadata": {"name": "front", "annotations": annotations}, "spec": all});
        request(&serde_json::from_value(service).unwrap())
    }

    #[test]
    fn fields_and_annotations_are_read() {
        let plain = read(&[], json!({})).unwrap().unwrap();
        assert_eq!(
            (plain.idle_timeout_s, plain.tcp_reset, plain.client_affinity),
            (240, true, false)
        );
        assert!(matches!(
            plain.place,
            Place::Public {
                name: None,
                group: None,
                label: None
            }
        ));
        let full = read(
            &[
                ("azure-load-balancer-internal", "TRUE"),
                ("azure-load-balancer-internal-subnet", "apps"),
                ("azure-load-balancer-ipv4", "10.0.0.9"),
                ("azure-allowed-ip-ranges", "10.0.0.1/24, 192.0.2.0/24"),
                ("azure-load-balancer-tcp-idle-timeout", "30"),
                ("azure-load-balancer-disable-tcp-reset", "true"),
            ],
            json!({"sessionAffinity": "ClientIP", "loadBalancerIP": "10.0.0.8", "loadBalancerSourceRanges": ["10.0.0.0/24"]}),
        );
        let full = full.unwrap().unwrap();
        assert_eq!(
            full.place,
            Place::Internal {
                subnet: Some("apps".into())
            }
        );
        assert_eq!(full.address, Some(Ipv4Addr::new(10, 0, 0, 9)));
        let sources: Vec<String> = full.sources.iter().map(ToString::to_string).collect();
        assert_eq!(sources, ["10.0.0.0/24", "192.0.2.0/24"]);
        assert_eq!(
            (full.idle_timeout_s, full.tcp_reset, full.client_affinity),
            (1800, false, true)
        );
        assert_eq!(read(&[], json!({"loadBalancerClass": "somebody/else"})), Ok(None));
        assert_eq!(read(&[], json!({"type": "NodePort"})), Ok(None));
    }

    #[test]
    fn what_is_not_served_is_named() {
        for (annotations, spec, wanted) in [
            (
                &[("azure-pls-create", "true")][..],
                json!({}),
                "azure-pls-create is not served",
            ),
            (
                &[("azure-allowed-service-tags", "Storage")],
                json!({}),
                "azure-allowed-service-tags is not served",
            ),
            (
                &[("azure-load-balancer-tcp-idle-timeout", "3")],
                json!({}),
                "between 4 and 100",
            ),
            (&[("azure-dns-label-name", "Web")], json!({}), "no DNS label"),
            (
                &[("azure-load-balancer-ipv4", "nowhere")],
                json!({}),
                "not an IPv4 address",
            ),
            (
                &[],
                json!({"loadBalancerSourceRanges": ["10.0.0.0"]}),
                "not an IPv4 range",
            ),
        ] {
            let error = read(annotations, spec).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
        assert!(read(&[("azure-pls-create", "false")], json!({})).unwrap().is_some());
    }
}

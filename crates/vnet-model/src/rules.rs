//! What a virtual network and its subnets must satisfy; each error has the code that ARM answers with.
//!
//! # Source
//! Azure Virtual Network FAQ and limits: prefixes outside 224/4, 127/8, 169.254/16, 255.255.255.255 and 168.63.129.16;
//! IPv4 subnets from /2 to /29, inside the network's prefixes and disjoint; five addresses of each are reserved.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use thiserror::Error;

use crate::address::WIRE_SERVER;

/// Longest prefix of a subnet.
pub const SUBNET_PREFIX_LEN_MAX: u8 = 29;
/// Shortest prefix of a subnet or a network.
pub const PREFIX_LEN_MIN: u8 = 2;
/// Network, gateway, two for DNS, and the last.
pub const RESERVED_PER_SUBNET: u32 = 5;

#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum RuleError {
    #[error("The address prefix '{text}' is not a valid IPv4 CIDR notation.")]
    NotCidr { text: String },
    #[error("The address prefix '{prefix}' has bits set behind its length; did you mean '{meant}'?")]
    HostBits { prefix: Ipv4Net, meant: Ipv4Net },
    #[error("The virtual network has no address prefix.")]
    NoPrefix,
    #[error("The address prefix '{prefix}' must not overlap '{forbidden}'.")]
    Forbidden { prefix: Ipv4Net, forbidden: Ipv4Net },
    #[error("The address prefixes '{a}' and '{b}' of the virtual network overlap.")]
    PrefixesOverlap { a: Ipv4Net, b: Ipv4Net },
    #[error("Subnet '{subnet}' is not valid: '{prefix}' must have a prefix length from /2 to /29.")]
    SubnetSize { subnet: String, prefix: Ipv4Net },
    #[error("Subnet '{subnet}' is not valid: '{prefix}' is not inside the virtual network's address prefixes.")]
    SubnetOutside { subnet: String, prefix: Ipv4Net },
    #[error(
        "Subnet '{subnet}' is not valid because its IP address range overlaps with that of the existing subnet '{other}'."
    )]
    SubnetsOverlap { subnet: String, other: String },
    #[error("The subnet name '{subnet}' is used twice.")]
    SubnetTwice { subnet: String },
}

impl RuleError {
    /// ARM's error code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotCidr { .. } | Self::HostBits { .. } => "InvalidCIDRNotation",
            Self::NoPrefix => "InvalidRequestFormat",
            Self::Forbidden { .. } => "AddressPrefixStringCannotBeReserved",
            Self::PrefixesOverlap { .. } => "NetcfgVirtualNetworkAddressPrefixesOverlap",
            Self::SubnetSize { .. } | Self::SubnetOutside { .. } => "NetcfgInvalidSubnet",
            Self::SubnetsOverlap { .. } => "NetcfgSubnetRangesOverlap",
            Self::SubnetTwice { .. } => "SubnetNamesNotUnique",
        }
    }
}

/// Ranges that no virtual network may contain.
fn forbidden() -> [Ipv4Net; 6] {
    let net = |a, b, len| Ipv4Net::new(Ipv4Addr::new(a, b, 0, 0), len).unwrap_or_default();
    [
        net(224, 0, 4),
        net(127, 0, 8),
        net(169, 254, 16),
        Ipv4Net::from(Ipv4Addr::BROADCAST),
        Ipv4Net::from(WIRE_SERVER),
        net(0, 0, 8),
    ]
}

/// Whether the ranges share an address.
pub fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

/// `range` without its first prefix of length `len`, as disjoint prefixes, smallest first; empty if it is no longer.
pub fn without_first(range: Ipv4Net, len: u8) -> Vec<Ipv4Net> {
    let second_half = |l: u8| {
        let start = u32::from(range.network()) + (1_u32 << (32 - u32::from(l)));
        Ipv4Net::new(start.into(), l).ok()
    };
    (range.prefix_len() + 1..=len).rev().filter_map(second_half).collect()
}

/// Parses a prefix strictly: no bits behind its length.
pub fn parse_prefix(text: &str) -> Result<Ipv4Net, RuleError> {
    let prefix: Ipv4Net = text.parse().map_err(|_| RuleError::NotCidr { text: text.to_owned() })?;
    let meant = prefix.trunc();
    if prefix == meant {
        Ok(prefix)
    } else {
        Err(RuleError::HostBits { prefix, meant })
    }
}

/// Checks the address space of a virtual network.
pub fn check_prefixes(prefixes: &[Ipv4Net]) -> Result<(), RuleError> {
    if prefixes.is_empty() {
        return Err(RuleError::NoPrefix);
    }
    for (n, prefix) in prefixes.iter().enumerate() {
        if prefix.trunc() != *prefix {
            return Err(RuleError::HostBits {
                prefix: *prefix,
                meant: prefix.trunc(),
            });
        }
        if let Some(f) = forbidden().into_iter().find(|f| overlap(*f, *prefix)) {
            return Err(RuleError::Forbidden {
                prefix: *prefix,
                forbidden: f,
            });
        }
        if let Some(other) = prefixes[..n].iter().find(|o| overlap(**o, *prefix)) {
            return Err(RuleError::PrefixesOverlap { a: *other, b: *prefix });
        }
    }
    Ok(())
}

/// Checks the subnets (name, prefix) of a virtual network with these prefixes; names are compared without regard to case.
pub fn check_subnets(prefixes: &[Ipv4Net], subnets: &[(&str, Ipv4Net)]) -> Result<(), RuleError> {
    for (n, (name, prefix)) in subnets.iter().enumerate() {
        let subnet = || (*name).to_owned();
        if prefix.trunc() != *prefix {
            return Err(RuleError::HostBits {
                prefix: *prefix,
                meant: prefix.trunc(),
            });
        }
        if !(PREFIX_LEN_MIN..=SUBNET_PREFIX_LEN_MAX).contains(&prefix.prefix_len()) {
            return Err(RuleError::SubnetSize {
                subnet: subnet(),
                prefix: *prefix,
            });
        }
        if !prefixes.iter().any(|p| p.contains(prefix)) {
            return Err(RuleError::SubnetOutside {
                subnet: subnet(),
                prefix: *prefix,
            });
        }
        for (other, range) in &subnets[..n] {
            if other.eq_ignore_ascii_case(name) {
                return Err(RuleError::SubnetTwice { subnet: subnet() });
            }
            if overlap(*range, *prefix) {
                return Err(RuleError::SubnetsOverlap {
                    subnet: subnet(),
                    other: (*other).to_owned(),
                });
            }
        }
    }
    Ok(())
}

/// Whether `address` is one of the five that the fabric keeps in `subnet`.
pub fn is_reserved(subnet: Ipv4Net, address: Ipv4Addr) -> bool {
    let offset = u32::from(address).wrapping_sub(u32::from(subnet.network()));
    offset < 4 || address == subnet.broadcast()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn code(prefixes: &[&str], subnets: &[(&str, &str)]) -> &'static str {
        let prefixes: Vec<Ipv4Net> = prefixes.iter().map(|p| net(p)).collect();
        let subnets: Vec<(&str, Ipv4Net)> = subnets.iter().map(|(n, p)| (*n, net(p))).collect();
        match check_prefixes(&prefixes).and_then(|()| check_subnets(&prefixes, &subnets)) {
            Ok(()) => "ok",
            Err(e) => e.code(),
        }
    }

    #[test]
    fn networks_and_subnets_are_checked() {
        assert_eq!(
            code(&["10.240.0.0/16"], &[("a", "10.240.0.0/24"), ("b", "10.240.1.0/29")]),
            "ok"
        );
        assert_eq!(code(&[], &[]), "InvalidRequestFormat");
        assert_eq!(code(&["169.254.1.0/24"], &[]), "AddressPrefixStringCannotBeReserved");
        assert_eq!(code(&["168.63.0.0/16"], &[]), "AddressPrefixStringCannotBeReserved");
        assert_eq!(
            code(&["10.0.0.0/8", "10.1.0.0/16"], &[]),
            "NetcfgVirtualNetworkAddressPrefixesOverlap"
        );
        assert_eq!(code(&["10.0.0.0/16"], &[("a", "10.0.0.0/30")]), "NetcfgInvalidSubnet");
        assert_eq!(code(&["10.0.0.0/16"], &[("a", "10.1.0.0/24")]), "NetcfgInvalidSubnet");
        assert_eq!(
            code(&["10.0.0.0/16"], &[("a", "10.0.0.0/24"), ("b", "10.0.0.128/25")]),
            "NetcfgSubnetRangesOverlap"
        );
        assert_eq!(
            code(&["10.0.0.0/16"], &[("a", "10.0.0.0/24"), ("A", "10.0.1.0/24")]),
            "SubnetNamesNotUnique"
        );
        assert_eq!(parse_prefix("10.0.0.1/24").unwrap_err().code(), "InvalidCIDRNotation");
        assert_eq!(parse_prefix("10.0.0.0/33").unwrap_err().code(), "InvalidCIDRNotation");
        assert!(parse_prefix("10.0.0.0/24").is_ok());
    }

    #[test]
    fn a_range_without_its_first_prefix() {
        let rest = without_first(net("10.0.0.0/28"), 30);
        assert_eq!(rest, [net("10.0.0.4/30"), net("10.0.0.8/29")]);
        assert!(without_first(net("10.0.0.0/30"), 30).is_empty());
    }

    #[test]
    fn five_addresses_are_reserved() {
        let subnet = net("10.0.0.8/29");
        let kept: Vec<bool> = (8..16)
            .map(|n| is_reserved(subnet, Ipv4Addr::new(10, 0, 0, n)))
            .collect();
        assert_eq!(kept, [true, true, true, true, false, false, false, true]);
    }
}

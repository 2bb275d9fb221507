//! MAC addresses, and the addresses that every virtual network knows.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Wire server, DNS and health probes of every virtual network; inward connections of the platform come from here.
pub const WIRE_SERVER: Ipv4Addr = Ipv4Addr::new(168, 63, 129, 16);

/// The fabric's router as every NIC sees it.
pub const ROUTER_MAC: Mac = Mac([0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc]);

/// An Ethernet address. Text forms: `12:34:56:78:9a:bc` (also with `-`, or none, between octets); it prints with colons.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Mac(pub [u8; 6]);

#[derive(Debug, Error, Eq, PartialEq)]
#[error("{text:?} is not a MAC address of twelve hex digits")]
pub struct MacError {
    pub text: String,
}

impl Mac {
    /// A locally administered unicast address computed from `name`: the same name, the same address.
    pub fn derived(name: &str) -> Self {
        // FNV-1a, 64 bits: any even spread will do, and it stays the same in every build.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        let [_, _, _, b, c, d, e, f] = hash.to_be_bytes();
        Self([0x02, b, c, d, e, f])
    }

    /// Twelve upper-case hex digits, the wire server's form.
    pub fn bare(self) -> String {
        self.0.iter().map(|b| format!("{b:02X}")).collect()
    }

    /// `12-34-56-78-9A-BC`, ARM's form.
    pub fn dashed(self) -> String {
        self.0.map(|b| format!("{b:02X}")).join("-")
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.map(|b| format!("{b:02x}")).join(":"))
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let fail = || MacError { text: text.to_owned() };
        let digits: String = text.chars().filter(|c| !matches!(c, ':' | '-')).collect();
        if digits.len() != 12 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(fail());
        }
        let number = u64::from_str_radix(&digits, 16).map_err(|_| fail())?;
        let [_, _, a, b, c, d, e, f] = number.to_be_bytes();
        Ok(Self([a, b, c, d, e, f]))
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The subnet's gateway: its first address after the network's.
pub fn gateway(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()).saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_print_and_parse_in_every_form() {
        for text in ["12:34:56:78:9a:bc", "12-34-56-78-9A-BC", "123456789ABC"] {
            assert_eq!(text.parse::<Mac>().unwrap(), ROUTER_MAC);
        }
        assert_eq!(ROUTER_MAC.to_string(), "12:34:56:78:9a:bc");
        assert_eq!(ROUTER_MAC.bare(), "123456789ABC");
        assert_eq!(ROUTER_MAC.dashed(), "12-34-56-78-9A-BC");
        for bad in ["", "12:34", "12:34:56:78:9a:bg", "+2345678901a"] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
        assert_eq!(Mac::derived("a"), Mac::derived("a"));
        assert_ne!(Mac::derived("a"), Mac::derived("b"));
    }
}

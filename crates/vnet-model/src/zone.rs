//! Private DNS zones as VNet DNS answers them.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// A zone that is linked to a virtual network. Names are in lower case without a last dot.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ZoneSpec {
    pub name: String,
    /// One per name and type; the name is relative to the zone: `@` is the zone itself, `*` every name that has nothing
    /// of its own.
    #[serde(default)]
    pub records: Vec<ZoneRecord>,
    /// Names that the zone does not have are asked for outside.
    #[serde(default)]
    pub fallback: bool,
    /// The network's own machines are registered here, so that their addresses lead back to these names too.
    #[serde(default)]
    pub registration: bool,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ZoneRecord {
    pub name: String,
    pub ttl_s: u32,
    pub data: RecordData,
}

/// The records of one name and type.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum RecordData {
    A(Vec<Ipv4Addr>),
    Aaaa(Vec<Ipv6Addr>),
    Cname(String),
    /// Preference and exchange.
    Mx(Vec<(u16, String)>),
    Ptr(Vec<String>),
    Soa(Soa),
    /// Priority, weight, port and target.
    Srv(Vec<(u16, u16, u16, String)>),
    /// Each record's strings, at most 255 bytes each.
    Txt(Vec<Vec<String>>),
}

/// Start of authority; times in seconds.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Soa {
    pub host: String,
    pub email: String,
    pub serial: u32,
    pub refresh_s: u32,
    pub retry_s: u32,
    pub expire_s: u32,
    /// How long an absence may be remembered.
    pub minimum_s: u32,
}

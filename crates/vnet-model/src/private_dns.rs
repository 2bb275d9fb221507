//! ARM's bodies of private DNS zones into the model's types: record sets and links, with every mistake's place and code.
//!
//! A zone's body carries its record sets in one array per type (`properties.A`, `properties.CNAME`, ...), elements
//! `{name, properties}`, and its links in `properties.virtualNetworkLinks`.
//!
//! # Source
//! Azure Private DNS REST API 2024-06-01, and Azure DNS limits: 20 records in a set, 1,000 links, 100 of them registering.

use serde_json::Value;
use thiserror::Error;

use crate::zone::{RecordData, Soa, ZoneRecord};

/// Types of record sets, as ARM writes them.
pub const RECORD_TYPES: [&str; 8] = ["A", "AAAA", "CNAME", "MX", "PTR", "SOA", "SRV", "TXT"];
/// Record sets of one zone at most; Azure has 25,000, here a zone is one object.
pub const RECORD_SETS_MAX: usize = 5000;
/// Links of one zone at most, and those of them that register names.
pub const LINKS_MAX: usize = 1000;
pub const REGISTRATIONS_MAX: usize = 100;
const RECORDS_MAX: usize = 20;
const TTL_S_MAX: u64 = 0x7fff_ffff;

/// What a zone's body says.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PrivateZone {
    /// One per name and type; names in lower case.
    pub records: Vec<ZoneRecord>,
    pub links: Vec<ZoneLink>,
}

/// A virtual network that sees the zone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ZoneLink {
    pub name: String,
    /// ARM id.
    pub virtual_network: String,
    /// Its machines' names become records.
    pub registration: bool,
    /// What the zone does not have is asked for outside.
    pub fallback: bool,
}

#[derive(Clone, Debug, Error, Eq, PartialEq)]
#[error("{path}: {problem}")]
pub struct ZoneError {
    pub path: String,
    /// ARM's error code.
    pub code: &'static str,
    pub problem: String,
}

fn bad<T>(path: impl Into<String>, problem: impl Into<String>) -> Result<T, ZoneError> {
    Err(ZoneError {
        path: path.into(),
        code: "BadRequest",
        problem: problem.into(),
    })
}

fn array(v: &Value) -> &[Value] {
    v.as_array().map_or(&[], Vec::as_slice)
}

/// A domain name: labels of letters, digits, `-` and `_`, 63 bytes each and 253 in all.
fn is_domain(text: &str) -> bool {
    let text = text.trim_end_matches('.');
    let label = |l: &str| {
        (1..=63).contains(&l.len()) && l.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    text.len() <= 253 && text.split('.').all(label)
}

/// Checks a zone's own name: at least two labels.
pub fn check_name(name: &str) -> Result<(), ZoneError> {
    if name.ends_with('.') || !name.contains('.') || !is_domain(name) {
        let problem = "a private zone's name has 2 to 34 labels of letters, digits and hyphens, and no dot at its end";
        return bad("name", problem);
    }
    if name.split('.').count() > 34 {
        return bad("name", "more than 34 labels");
    }
    Ok(())
}

/// Reads and checks the whole body of the zone called `name`.
/// # Errors: the first mistake.
pub fn zone(name: &str, body: &Value) -> Result<PrivateZone, ZoneError> {
    check_name(name)?;
    let p = &body["properties"];
    let mut out = PrivateZone::default();
    for kind in RECORD_TYPES {
        for (i, set) in array(&p[kind]).iter().enumerate() {
            let at = format!("properties.{kind}[{i}]");
            let record = record_set(kind, set, name, &at)?;
            let same = |r: &&ZoneRecord| r.name == record.name;
            let clash =
                |r: &&ZoneRecord| matches!(r.data, RecordData::Cname(_)) || matches!(record.data, RecordData::Cname(_));
            if out.records.iter().filter(same).any(|r| clash(&r)) {
                return Err(ZoneError {
                    path: at,
                    code: "Conflict",
                    problem: format!("'{}' cannot have a CNAME beside other record sets", record.name),
                });
            }
            out.records.push(record);
        }
    }
    if out.records.len() > RECORD_SETS_MAX {
        let problem = format!(
            "{} record sets, at most {RECORD_SETS_MAX} are served",
            out.records.len()
        );
        return bad("properties", problem);
    }
    for (i, link) in array(&p["virtualNetworkLinks"]).iter().enumerate() {
        let at = format!("properties.virtualNetworkLinks[{i}]");
        let link = read_link(link, &at)?;
        let same = |l: &ZoneLink| l.virtual_network.eq_ignore_ascii_case(&link.virtual_network);
        if let Some(other) = out.links.iter().find(|l| same(l)) {
            return Err(ZoneError {
                path: format!("{at}.properties.virtualNetwork.id"),
                code: "Conflict",
                problem: format!(
                    "the zone is linked to this virtual network already, by '{}'",
                    other.name
                ),
            });
        }
        out.links.push(link);
    }
    let registering = out.links.iter().filter(|l| l.registration).count();
    if out.links.len() > LINKS_MAX || registering > REGISTRATIONS_MAX {
        let problem = format!("at most {LINKS_MAX} links, {REGISTRATIONS_MAX} of them with registration");
        return bad("properties.virtualNetworkLinks", problem);
    }
    Ok(out)
}

fn read_link(link: &Value, at: &str) -> Result<ZoneLink, ZoneError> {
    let p = &link["properties"];
    let Some(virtual_network) = p["virtualNetwork"]["id"].as_str().filter(|s| !s.is_empty()) else {
        return bad(
            format!("{at}.properties.virtualNetwork.id"),
            "a link needs the id of a virtual network",
        );
    };
    let registration = match &p["registrationEnabled"] {
        Value::Null => false,
        Value::Bool(b) => *b,
        _ => return bad(format!("{at}.properties.registrationEnabled"), "must be true or false"),
    };
    let fallback = match p["resolutionPolicy"]
        .as_str()
        .unwrap_or("Default")
        .to_ascii_lowercase()
        .as_str()
    {
        "default" | "" => false,
        "nxdomainredirect" => true,
        _ => {
            return bad(
                format!("{at}.properties.resolutionPolicy"),
                "must be Default or NxDomainRedirect",
            );
        }
    };
    Ok(ZoneLink {
        name: link["name"].as_str().unwrap_or_default().to_owned(),
        virtual_network: virtual_network.to_owned(),
        registration,
        fallback,
    })
}

/// Reads one record set of this type; `zone` is the name it is relative to.
fn record_set(kind: &str, set: &Value, zone: &str, at: &str) -> Result<ZoneRecord, ZoneError> {
    let name = set["name"].as_str().unwrap_or_default().to_ascii_lowercase();
    let below_wildcard = name.strip_prefix("*.").unwrap_or(&name);
    let apex = name == "@";
    let named = apex || name == "*" || is_domain(below_wildcard) && !name.ends_with('.');
    if !named || !apex && name.len() + zone.len() + 1 > 253 {
        return bad(
            format!("{at}.name"),
            format!("'{name}' is not a record set's name: @, *, or labels relative to the zone"),
        );
    }
    let p = &set["properties"];
    let ttl = if p["ttl"].is_null() { &p["TTL"] } else { &p["ttl"] };
    let ttl_s = match ttl.as_u64().filter(|t| (1..=TTL_S_MAX).contains(t)) {
        Some(ttl) => ttl as u32,
        None if ttl.is_null() => 3600,
        None => {
            return bad(
                format!("{at}.properties.ttl"),
                format!("{ttl} is not from 1 to {TTL_S_MAX} seconds"),
            );
        }
    };
    if kind == "SOA" && !apex {
        return bad(format!("{at}.name"), "a zone has one SOA record set, called '@'");
    }
    if kind == "CNAME" && apex {
        return bad(format!("{at}.name"), "the zone itself cannot have a CNAME");
    }
    let data = record_data(kind, p, &format!("{at}.properties"))?;
    Ok(ZoneRecord { name, ttl_s, data })
}

fn record_data(kind: &str, p: &Value, at: &str) -> Result<RecordData, ZoneError> {
    let field = match kind {
        "A" => "aRecords",
        "AAAA" => "aaaaRecords",
        "CNAME" => "cnameRecord",
        "MX" => "mxRecords",
        "PTR" => "ptrRecords",
        "SOA" => "soaRecord",
        "SRV" => "srvRecords",
        _ => "txtRecords",
    };
    let records = array(&p[field]);
    let at = format!("{at}.{field}");
    if records.len() > RECORDS_MAX {
        return bad(
            at,
            format!("{} records, at most {RECORDS_MAX} are allowed in a set", records.len()),
        );
    }
    Ok(match kind {
        "A" => RecordData::A(each(records, &at, |r, at| parsed(r, "ipv4Address", at))?),
        "AAAA" => RecordData::Aaaa(each(records, &at, |r, at| parsed(r, "ipv6Address", at))?),
        "CNAME" if p[field].is_null() => RecordData::Cname(String::new()),
        "CNAME" => RecordData::Cname(domain(&p[field], "cname", &at)?),
        "MX" => RecordData::Mx(each(records, &at, |r, at| {
            Ok((number(r, "preference", at)?, domain(r, "exchange", at)?))
        })?),
        "PTR" => RecordData::Ptr(each(records, &at, |r, at| domain(r, "ptrdname", at))?),
        "SOA" => RecordData::Soa(soa(&p[field], &at)?),
        "SRV" => RecordData::Srv(each(records, &at, |r, at| {
            let port = number(r, "port", at)?;
            Ok((
                number(r, "priority", at)?,
                number(r, "weight", at)?,
                port,
                domain(r, "target", at)?,
            ))
        })?),
        _ => RecordData::Txt(each(records, &at, |r, at| {
            let texts = array(&r["value"]);
            let text = |v: &Value| v.as_str().filter(|t| t.len() <= 255).map(str::to_owned);
            let texts: Option<Vec<String>> = texts.iter().map(text).collect();
            match texts.filter(|t| !t.is_empty() && t.iter().map(String::len).sum::<usize>() <= 1024) {
                Some(texts) => Ok(texts),
                None => bad(
                    format!("{at}.value"),
                    "a list of strings of at most 255 bytes, 1024 in all",
                ),
            }
        })?),
    })
}

fn each<T>(
    records: &[Value],
    at: &str,
    read: impl Fn(&Value, &str) -> Result<T, ZoneError>,
) -> Result<Vec<T>, ZoneError> {
    let one = |(i, r): (usize, &Value)| read(r, &format!("{at}[{i}]"));
    records.iter().enumerate().map(one).collect()
}

fn parsed<T: std::str::FromStr>(record: &Value, field: &str, at: &str) -> Result<T, ZoneError> {
    let text = record[field].as_str().unwrap_or_default();
    text.parse()
        .or_else(|_| bad(format!("{at}.{field}"), format!("{text:?} is not such an address")))
}

fn domain(record: &Value, field: &str, at: &str) -> Result<String, ZoneError> {
    let text = record[field].as_str().unwrap_or_default();
    if is_domain(text) {
        Ok(text.trim_end_matches('.').to_ascii_lowercase())
    } else {
        bad(format!("{at}.{field}"), format!("{text:?} is not a domain name"))
    }
}

fn number<T: TryFrom<u64>>(record: &Value, field: &str, at: &str) -> Result<T, ZoneError> {
    let value = record[field].as_u64().and_then(|n| T::try_from(n).ok());
    value.map_or_else(
        || {
            bad(
                format!("{at}.{field}"),
                format!("{} is not a number in its range", record[field]),
            )
        },
        Ok,
    )
}

fn soa(record: &Value, at: &str) -> Result<Soa, ZoneError> {
    let default = default_soa();
    let or = |field: &str, default: u32| match &record[field] {
        Value::Null => Ok(default),
        _ => number(record, field, at),
    };
    let name = |field: &str, default: &str| match &record[field] {
        Value::Null => Ok(default.to_owned()),
        _ => domain(record, field, at),
    };
    Ok(Soa {
        host: name("host", &default.host)?,
        email: name("email", &default.email)?,
        serial: or("serialNumber", default.serial)?,
        refresh_s: or("refreshTime", default.refresh_s)?,
        retry_s: or("retryTime", default.retry_s)?,
        expire_s: or("expireTime", default.expire_s)?,
        minimum_s: or("minimumTtl", default.minimum_s)?,
    })
}

/// The SOA record of a zone that was given none.
pub fn default_soa() -> Soa {
    Soa {
        host: "azureprivatedns.net".to_owned(),
        email: "azureprivatedns-host.microsoft.com".to_owned(),
        serial: 1,
        refresh_s: 3600,
        retry_s: 300,
        expire_s: 2_419_200,
        minimum_s: 10,
    }
}

/// Seconds that a registered name may be remembered.
pub const REGISTERED_TTL_S: u32 = 10;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(name: &str, properties: Value) -> Value {
        json!({"name": name, "properties": properties})
    }

    #[test]
    fn every_type_is_read() {
        let body = json!({"properties": {
            "A": [set("WWW", json!({"ttl": 300, "aRecords": [{"ipv4Address": "10.0.0.4"}]})), set("empty", json!({}))],
            "AAAA": [set("www", json!({"ttl": 300, "aaaaRecords": [{"ipv6Address": "fd00::1"}]}))],
            "CNAME": [set("alias", json!({"TTL": 60, "cnameRecord": {"cname": "Www.Example.org."}}))],
            "MX": [set("@", json!({"mxRecords": [{"preference": 10, "exchange": "mail.example.org"}]}))],
            "PTR": [set("4", json!({"ptrRecords": [{"ptrdname": "www.example.org"}]}))],
            "SOA": [set("@", json!({"soaRecord": {"minimumTtl": 20}}))],
            "SRV": [set("_sip._tcp", json!({"srvRecords": [{"priority": 1, "weight": 2, "port": 5060, "target": "sip.example.org"}]}))],
            "TXT": [set("*", json!({"txtRecords": [{"value": ["a", "b"]}]}))],
            "virtualNetworkLinks": [set("l", json!({"virtualNetwork": {"id": "/v"}, "registrationEnabled": true}))]}});
        let read = zone("example.org", &body).unwrap();
        assert_eq!(read.records.len(), 9);
        assert_eq!(read.records[0].name, "www");
        assert!(
            read.records
                .iter()
                .any(|r| r.data == RecordData::Cname("www.example.org".into()) && r.ttl_s == 60)
        );
        assert!(matches!(&read.records[6].data, RecordData::Soa(s) if s.minimum_s == 20 && s.retry_s == 300));
        assert!(read.links[0].registration && !read.links[0].fallback);
    }

    #[test]
    fn mistakes_are_refused_with_their_place() {
        let a = |name: &str, address: &str| set(name, json!({"ttl": 1, "aRecords": [{"ipv4Address": address}]}));
        let cname = |name: &str| set(name, json!({"cnameRecord": {"cname": "x.org"}}));
        let link = |n: &str| set(n, json!({"virtualNetwork": {"id": "/v"}}));
        let many: Vec<Value> = (0..21).map(|n| json!({"ipv4Address": format!("10.0.0.{n}")})).collect();
        for (field, sets, code, path) in [
            (
                "A",
                json!([a("w", "10.0.0")]),
                "BadRequest",
                "A[0].properties.aRecords[0].ipv4Address",
            ),
            ("A", json!([a("w..w", "10.0.0.1")]), "BadRequest", "A[0].name"),
            (
                "A",
                json!([set("w", json!({"ttl": 0}))]),
                "BadRequest",
                "A[0].properties.ttl",
            ),
            (
                "A",
                json!([set("w", json!({"aRecords": many}))]),
                "BadRequest",
                "A[0].properties.aRecords",
            ),
            ("CNAME", json!([cname("@")]), "BadRequest", "CNAME[0].name"),
            ("CNAME", json!([cname("taken")]), "Conflict", "MX[0]"),
            ("SOA", json!([set("w", json!({}))]), "BadRequest", "SOA[0].name"),
            (
                "TXT",
                json!([set("w", json!({"txtRecords": [{"value": []}]}))]),
                "BadRequest",
                "TXT[0]",
            ),
            (
                "virtualNetworkLinks",
                json!([set("l", json!({}))]),
                "BadRequest",
                "virtualNetworkLinks[0]",
            ),
            (
                "virtualNetworkLinks",
                json!([link("l"), link("m")]),
                "Conflict",
                "virtualNetworkLinks[1]",
            ),
        ] {
            let mut body = json!({"properties": {"MX": [set("taken", json!({}))]}});
            body["properties"][field] = sets;
            let error = zone("example.org", &body).unwrap_err();
            assert!(error.code == code && error.path.contains(path), "{field}: {error:?}");
        }
        for name in ["org", "example.org.", "exa mple.org", ""] {
            assert!(zone(name, &json!({})).is_err(), "{name}");
        }
    }
}

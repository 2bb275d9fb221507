//! The pool as the wire server tells it: interfaces, their subnets, and the addresses given to this machine.
//!
//! # Source
//! `GET /machine/plugins?comp=nmagent&type=getinterfaceinfov1`: `Interfaces` > `Interface` (`MacAddress`: 12 hex digits
//! without separators, or `*`; `IsPrimary`) > `IPSubnet` (`Prefix`) > `IPAddress` (`Address`, `IsPrimary`).

use std::net::IpAddr;

use ipnet::IpNet;
use quick_xml::{
    Reader,
    events::{BytesStart, Event},
};
use thiserror::Error;

use crate::{
    http::{self, HttpError},
    pool::{Pool, PoolSubnet},
    store::boot_clock_ms,
    transparent::{self, KernelError},
};

pub const PATH: &str = "/machine/plugins?comp=nmagent&type=getinterfaceinfov1";

/// A VM has at most 256 private addresses; this leaves room and keeps a hostile answer small.
const ADDRESSES_MAX: usize = 4096;

#[derive(Debug, Error)]
pub enum WireError {
    #[error("asking the wire server at {base}")]
    Http {
        base: String,
        #[source]
        source: HttpError,
    },
    #[error("the wire server's answer is not understood: {reason}")]
    Answer { reason: String },
    #[error("the wire server tells of {told}, but this machine has {local}")]
    NoNic { told: String, local: String },
    #[error("reading this machine's links")]
    Kernel {
        #[source]
        source: KernelError,
    },
}

/// Asks the wire server at `base`; the subnets of the NICs that this machine has, without the machine's own addresses.
pub fn fetch(base: &str, timeout_ms: u64) -> Result<Pool, WireError> {
    let fetched_ms = boot_clock_ms();
    let url = format!("{}{PATH}", base.trim_end_matches('/'));
    let body = http::get(&url, timeout_ms).map_err(|source| WireError::Http {
        base: base.to_owned(),
        source,
    })?;
    let text = std::str::from_utf8(&body).map_err(|_| WireError::Answer {
        reason: "it is no text".into(),
    })?;
    let told = parse(text)?;
    let local = transparent::local_macs().map_err(|source| WireError::Kernel { source })?;
    let told_macs = told.iter().map(|s| s.mac.clone()).collect::<Vec<_>>();
    let subnets: Vec<PoolSubnet> = told
        .into_iter()
        .filter(|s| s.mac == "*" || local.contains(&s.mac))
        .collect();
    if subnets.is_empty() {
        return Err(WireError::NoNic {
            told: listing(&told_macs),
            local: listing(&local),
        });
    }
    Ok(Pool {
        fetched_ms,
        source: base.to_owned(),
        subnets,
    })
}

fn listing(macs: &[String]) -> String {
    if macs.is_empty() {
        "no interface".to_owned()
    } else {
        macs.join(", ")
    }
}

/// Subnets in the order told.
pub fn parse(text: &str) -> Result<Vec<PoolSubnet>, WireError> {
    let bad = |reason: String| WireError::Answer { reason };
    let mut reader = Reader::from_str(text.trim_start_matches('\u{feff}'));
    let (mut rooted, mut open, mut count) = (false, 0usize, 0);
    let mut nic: Option<(String, bool)> = None;
    let mut out: Vec<PoolSubnet> = Vec::new();
    loop {
        let event = reader.read_event().map_err(|e| bad(e.to_string()))?;
        let element = match &event {
            Event::Start(e) => {
                open += 1;
                e
            }
            Event::Empty(e) => e,
            Event::End(_) => {
                open = open.saturating_sub(1);
                continue;
            }
            Event::Eof if rooted && open == 0 => return Ok(out),
            Event::Eof => return Err(bad("it ends too early".into())),
            _ => continue,
        };
        match element.local_name().as_ref() {
            "Interfaces" => rooted = true,
            "Interface" if rooted => {
                let mac =
                    attribute(element, "MacAddress")?.ok_or_else(|| bad("an Interface without MacAddress".into()))?;
                let mac = canonical_mac(&mac).ok_or_else(|| bad(format!("MAC address {mac:?}")))?;
                nic = Some((mac, is_true(attribute(element, "IsPrimary")?)));
            }
            "IPSubnet" => {
                let (mac, primary_nic) = nic
                    .clone()
                    .ok_or_else(|| bad("an IPSubnet outside of an Interface".into()))?;
                let prefix = attribute(element, "Prefix")?.unwrap_or_default();
                if prefix.parse::<IpNet>().is_err() {
                    return Err(bad(format!("prefix {prefix:?}")));
                }
                out.push(PoolSubnet {
                    mac,
                    primary_nic,
                    prefix,
                    addresses: Vec::new(),
                });
            }
            "IPAddress" => {
                let subnet = out
                    .last_mut()
                    .ok_or_else(|| bad("an IPAddress outside of an IPSubnet".into()))?;
                let text = attribute(element, "Address")?.unwrap_or_default();
                let address: IpAddr = text.parse().map_err(|_| bad(format!("address {text:?}")))?;
                count += 1;
                if count > ADDRESSES_MAX {
                    return Err(bad(format!("it holds more than {ADDRESSES_MAX} addresses")));
                }
                // The primary address is the machine's own. A repeated one must not be handed out twice.
                if !is_true(attribute(element, "IsPrimary")?) && !subnet.addresses.contains(&address) {
                    subnet.addresses.push(address);
                }
            }
            _ if !rooted => return Err(bad("its root is not Interfaces".into())),
            _ => {}
        }
    }
}

fn is_true(value: Option<String>) -> bool {
    value.is_some_and(|v| v.eq_ignore_ascii_case("true"))
}

fn attribute(element: &BytesStart<'_>, name: &str) -> Result<Option<String>, WireError> {
    let bad = |reason: String| WireError::Answer { reason };
    let found = element.try_get_attribute(name).map_err(|e| bad(e.to_string()))?;
    // None of the values can hold an entity, so the raw text is the value.
    Ok(found.map(|a| a.value.into_owned()))
}

/// Lower case with colons; `*` stays.
fn canonical_mac(text: &str) -> Option<String> {
    if text == "*" {
        return Some(text.to_owned());
    }
    let digits: Vec<char> = text.chars().filter(|c| !matches!(c, ':' | '-')).collect();
    if digits.len() != 12 || !digits.iter().all(char::is_ascii_hexdigit) {
        return None;
    }
    let pairs: Vec<String> = digits
        .chunks(2)
        .map(|c| c.iter().collect::<String>().to_ascii_lowercase())
        .collect();
    Some(pairs.join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_documented_answer() {
        let text = r#"<?xml version="1.0" encoding="utf-8"?>
            <Interfaces><Interface MacAddress="000D3A6E1825" IsPrimary="true">
              <IPSubnet Prefix="10.240.0.0/16"><IPAddress Address="10.240.0.4" IsPrimary="true"/>
                <IPAddress Address="10.240.0.5" IsPrimary="false"/><IPAddress Address="10.240.0.5" IsPrimary="false"/>
                <IPAddress Address="10.240.0.6"></IPAddress></IPSubnet>
            </Interface><Interface MacAddress="*"><IPSubnet Prefix="10.1.0.0/24"></IPSubnet></Interface></Interfaces>"#;
        let got = parse(text).unwrap();
        assert_eq!(got.len(), 2);
        assert_eq!(got[0].mac, "00:0d:3a:6e:18:25");
        assert!(got[0].primary_nic && !got[1].primary_nic);
        let want: Vec<IpAddr> = vec!["10.240.0.5".parse().unwrap(), "10.240.0.6".parse().unwrap()];
        assert_eq!(got[0].addresses, want);
    }

    #[test]
    fn nonsense_is_refused_with_what_is_wrong() {
        for (text, word) in [
            ("", "early"),
            ("hello", "early"),
            ("<html></html>", "root"),
            ("<Interfaces><Interface MacAddress=\"000D3A6E1825\">", "early"),
            ("<Interfaces><Interface/></Interfaces>", "MacAddress"),
            ("<Interfaces><Interface MacAddress=\"xyz\"/></Interfaces>", "xyz"),
            ("<Interfaces><IPSubnet Prefix=\"10.0.0.0/8\"/></Interfaces>", "outside"),
            (
                "<Interfaces><Interface MacAddress=\"*\"><IPSubnet Prefix=\"x\"/></Interface></Interfaces>",
                "prefix",
            ),
            (
                "<Interfaces><Interface MacAddress=\"*\"><IPSubnet Prefix=\"10.0.0.0/8\"><IPAddress Address=\"x\"/></IPSubnet></Interface></Interfaces>",
                "address",
            ),
        ] {
            let e = parse(text).unwrap_err().to_string();
            assert!(e.contains(word), "{text}: {e}");
        }
        let many: String = (0..5000)
            .map(|i| format!("<IPAddress Address=\"10.0.{}.{}\"/>", i / 250, i % 250))
            .collect();
        let text = format!(
            "<Interfaces><Interface MacAddress=\"*\"><IPSubnet Prefix=\"10.0.0.0/8\">{many}</IPSubnet></Interface></Interfaces>"
        );
        assert!(parse(&text).unwrap_err().to_string().contains("more than"));
    }
}

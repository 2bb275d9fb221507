//! The pool as the wire server tells it: interfaces, their subnets, and the addresses given to this machine.
//!
//! # Source
//! `GET /machine/plugins?comp=nmagent&type=getinterfaceinfov1`: `Interfaces` > `Interface` (`MacAddress`: 12 hex digits
//! without separators, or `*`; `IsPrimary`) > `IPSubnet` (`Prefix`) > `IPAddress` (`Address`, `IsPrimary`).

use std::collections::BTreeSet;

use linux::netlink;
use thiserror::Error;
use vnet_model::interfaces::{Interfaces, PATH_AND_QUERY, ParseError};

use crate::{
    http::{self, HttpError},
    pool::PoolSubnet,
};

#[derive(Debug, Error)]
pub enum WireError {
    #[error("asking the wire server at {base}")]
    Http {
        base: String,
        #[source]
        source: HttpError,
    },
    #[error("the wire server's answer is not understood")]
    Answer {
        #[source]
        source: ParseError,
    },
    #[error("the wire server's answer is no text")]
    NoText,
}

/// Asks the wire server at `base`; every subnet that it tells.
pub fn ask(base: &str, timeout_ms: u64) -> Result<Vec<PoolSubnet>, WireError> {
    let url = format!("{}{PATH_AND_QUERY}", base.trim_end_matches('/'));
    let body = http::get(&url, timeout_ms).map_err(|source| WireError::Http {
        base: base.to_owned(),
        source,
    })?;
    parse(std::str::from_utf8(&body).map_err(|_| WireError::NoText)?)
}

/// Subnets in the order told, with the addresses that are for pods. A repeated address is taken once.
pub fn parse(text: &str) -> Result<Vec<PoolSubnet>, WireError> {
    let told = Interfaces::parse(text.trim_start_matches('\u{feff}')).map_err(|source| WireError::Answer { source })?;
    let mut seen = BTreeSet::new();
    let mut out = Vec::new();
    for interface in told.interfaces {
        let mac = interface
            .mac
            .map_or_else(|| "*".to_owned(), |m| netlink::format_mac(m.0));
        for subnet in interface.subnets {
            let pods = subnet.addresses.iter().filter(|a| !a.primary).map(|a| a.address);
            out.push(PoolSubnet {
                mac: mac.clone(),
                nic: None,
                primary_nic: interface.primary,
                prefix: subnet.prefix.to_string(),
                addresses: pods.filter(|a| seen.insert(*a)).collect(),
            });
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn reads_the_documented_answer() {
        let text = r#"<?xml version="1.0" encoding="utf-8"?>
            <Interfaces><Interface MacAddress="000D3A6E1825" IsPrimary="true">
              <IPSubnet Prefix="10.240.0.0/16"><IPAddress Address="10.240.0.4" IsPrimary="true"/>
                <IPAddress Address="10.240.0.5" IsPrimary="false"/><IPAddress Address="10.240.0.5" IsPrimary="false"/>
                <IPAddress Address="10.240.0.6"></IPAddress></IPSubnet>
            </Interface><Interface MacAddress="*"><IPSubnet Prefix="fd00::/64"><IPAddress Address="fd00::5"/></IPSubnet></Interface>
            </Interfaces>"#;
        let got = parse(text).unwrap();
        assert_eq!(got.len(), 2);
        assert_eq!(got[0].mac, "00:0d:3a:6e:18:25");
        assert!(got[0].primary_nic && !got[1].primary_nic);
        assert_eq!(got[1].addresses, ["fd00::5".parse::<IpAddr>().unwrap()]);
        let want: Vec<IpAddr> = vec!["10.240.0.5".parse().unwrap(), "10.240.0.6".parse().unwrap()];
        assert_eq!(got[0].addresses, want);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "hello", "<html></html>", "<Interfaces><Interface/></Interfaces>"] {
            assert!(matches!(parse(text), Err(WireError::Answer { .. })), "{text}");
        }
    }
}

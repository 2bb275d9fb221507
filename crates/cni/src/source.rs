//! Where the pool comes from: the wire server, a file of the original's `interfaces.json` form, or the configuration.

use std::{
    collections::BTreeSet,
    io::{self, Read},
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use linux::netlink;
use serde::Deserialize;
use thiserror::Error;
use vnet_model::Mac;

use crate::{
    links::{self, KernelError},
    pool::{Pool, PoolSubnet},
    store::boot_clock_ms,
    wire::{self, WireError},
};

/// A VM has at most 256 private addresses; this leaves room and keeps a hostile source small.
pub const ADDRESSES_MAX: usize = 4096;
const FILE_BYTES_MAX: u64 = 1 << 20;
/// The original's place.
pub const INTERFACES_FILE: &str = "/etc/kubernetes/interfaces.json";

#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Base URL of the wire server.
    Wire(String),
    File(PathBuf),
    List(Vec<PoolSubnet>),
}

#[derive(Debug, Error)]
pub enum SourceError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("reading {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is larger than {FILE_BYTES_MAX} bytes")]
    TooLarge { path: PathBuf },
    #[error("{path} does not have the form of interfaces.json")]
    Form {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{path}: {what}")]
    Content { path: PathBuf, what: String },
    #[error("{place} tells of {count} addresses, more than {ADDRESSES_MAX}")]
    TooMany { place: String, count: usize },
    #[error("{place} tells of {told}, but this machine has {local}")]
    NoNic { place: String, told: String, local: String },
    #[error("reading this machine's links")]
    Kernel {
        #[source]
        source: KernelError,
    },
}

impl Source {
    /// Names the source in the remembered pool: a pool of another source is none.
    pub fn name(&self) -> String {
        match self {
            Self::Wire(base) => base.clone(),
            Self::File(path) => format!("file {}", path.display()),
            Self::List(_) => "the configuration".to_owned(),
        }
    }

    /// Asking costs a connection, so an answer is used for some time.
    pub fn is_remembered(&self) -> bool {
        matches!(self, Self::Wire(_))
    }

    /// The subnets of the NICs that this machine has, without the machine's own addresses.
    pub fn fetch(&self, timeout_ms: u64) -> Result<Pool, SourceError> {
        let fetched_ms = boot_clock_ms();
        let told = match self {
            Self::Wire(base) => wire::ask(base, timeout_ms)?,
            Self::File(path) => read(path)?,
            Self::List(subnets) => subnets.clone(),
        };
        let place = || match self {
            Self::Wire(_) => "the wire server".to_owned(),
            other => other.name(),
        };
        let count = told.iter().map(|s| s.addresses.len()).sum();
        if count > ADDRESSES_MAX {
            return Err(SourceError::TooMany { place: place(), count });
        }
        let local = links::local_nics().map_err(|source| SourceError::Kernel { source })?;
        let told_macs: Vec<String> = told.iter().map(|s| s.mac.clone()).collect();
        let subnets: Vec<PoolSubnet> = told
            .into_iter()
            .filter(|s| s.mac == "*" || local.contains_key(&s.mac))
            .map(|s| PoolSubnet {
                nic: local.get(&s.mac).cloned(),
                ..s
            })
            .collect();
        if subnets.is_empty() {
            return Err(SourceError::NoNic {
                place: place(),
                told: listing(&told_macs),
                local: listing(&local.into_keys().collect::<Vec<_>>()),
            });
        }
        Ok(Pool {
            fetched_ms,
            source: self.name(),
            subnets,
        })
    }
}

fn listing(macs: &[String]) -> String {
    if macs.is_empty() {
        "no interface".to_owned()
    } else {
        macs.join(", ")
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    interfaces: Vec<Interface>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Interface {
    mac_address: String,
    #[serde(default)]
    is_primary: bool,
    #[serde(rename = "IPSubnets")]
    subnets: Vec<Subnet>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Subnet {
    prefix: String,
    #[serde(rename = "IPAddresses")]
    addresses: Vec<Address>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Address {
    address: String,
    #[serde(default)]
    is_primary: bool,
}

fn read(path: &Path) -> Result<Vec<PoolSubnet>, SourceError> {
    let fail = |source| SourceError::Read {
        path: path.to_owned(),
        source,
    };
    let mut raw = Vec::new();
    let file = std::fs::File::open(path).map_err(fail)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut raw).map_err(fail)?;
    if raw.len() as u64 > FILE_BYTES_MAX {
        return Err(SourceError::TooLarge { path: path.to_owned() });
    }
    let told: File = serde_json::from_slice(&raw).map_err(|source| SourceError::Form {
        path: path.to_owned(),
        source,
    })?;
    let content = |what| SourceError::Content {
        path: path.to_owned(),
        what,
    };
    let mut seen = BTreeSet::new();
    let mut out = Vec::new();
    for interface in told.interfaces {
        let mac = mac(&interface.mac_address).map_err(content)?;
        for subnet in interface.subnets {
            let prefix = prefix(&subnet.prefix).map_err(content)?;
            let mut addresses = Vec::new();
            for a in subnet.addresses.iter().filter(|a| !a.is_primary) {
                let parsed = address(&a.address, prefix).map_err(content)?;
                if seen.insert(parsed) {
                    addresses.push(parsed);
                }
            }
            out.push(PoolSubnet {
                mac: mac.clone(),
                nic: None,
                primary_nic: interface.is_primary,
                prefix: prefix.to_string(),
                addresses,
            });
        }
    }
    Ok(out)
}

/// One entry of `ipam.pools`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    subnet: String,
    /// Single addresses, or `first-last`.
    addresses: Vec<String>,
    /// Of the NIC; any if absent.
    mac: Option<String>,
}

/// `ipam.pools`; the error says what is wrong with which value.
pub fn parse_list(value: serde_json::Value) -> Result<Source, String> {
    let told: Vec<Listed> = serde_json::from_value(value).map_err(|e| e.to_string())?;
    let mut seen = BTreeSet::new();
    let mut out = Vec::new();
    for pool in told {
        let prefix = prefix(&pool.subnet)?;
        let mut addresses = Vec::new();
        for text in &pool.addresses {
            let (first, last) = match text.split_once('-') {
                None => (address(text, prefix)?, address(text, prefix)?),
                Some((first, last)) => (address(first.trim(), prefix)?, address(last.trim(), prefix)?),
            };
            let (mut number, end) = (as_number(first), as_number(last));
            if number > end {
                return Err(format!("{text:?} ends before it begins"));
            }
            if end - number >= (ADDRESSES_MAX - seen.len()) as u128 {
                return Err(format!("more than {ADDRESSES_MAX} addresses"));
            }
            while number <= end {
                let address = match first {
                    IpAddr::V4(_) => IpAddr::from((number as u32).to_be_bytes()),
                    IpAddr::V6(_) => IpAddr::from(number.to_be_bytes()),
                };
                if !seen.insert(address) {
                    return Err(format!("{address} stands there twice"));
                }
                addresses.push(address);
                match number.checked_add(1) {
                    Some(next) => number = next,
                    None => break,
                }
            }
        }
        out.push(PoolSubnet {
            mac: mac(pool.mac.as_deref().unwrap_or("*"))?,
            nic: None,
            primary_nic: true,
            prefix: prefix.to_string(),
            addresses,
        });
    }
    Ok(Source::List(out))
}

/// Twelve hex digits, with or without separators, or `*`; lower case with colons.
fn mac(text: &str) -> Result<String, String> {
    if text == "*" {
        return Ok(text.to_owned());
    }
    let mac: Mac = text.parse().map_err(|_| format!("{text:?} is no MAC address"))?;
    Ok(netlink::format_mac(mac.0))
}

fn prefix(text: &str) -> Result<IpNet, String> {
    match text.parse::<IpNet>() {
        Ok(net) => Ok(net.trunc()),
        Err(_) => Err(format!("{text:?} is no prefix")),
    }
}

fn address(text: &str, within: IpNet) -> Result<IpAddr, String> {
    match text.parse::<IpAddr>() {
        Ok(a) if within.contains(&a) => Ok(a),
        Ok(a) => Err(format!("{a} is not in {within}")),
        Err(_) => Err(format!("{text:?} is no address")),
    }
}

fn as_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u32::from(a).into(),
        IpAddr::V6(a) => a.into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_holds_addresses_and_ranges_of_its_subnets() {
        let Source::List(pools) = parse_list(json!([
            {"subnet": "10.1.0.0/24", "addresses": ["10.1.0.9", "10.1.0.20-10.1.0.22"]},
            {"subnet": "10.2.0.0/24", "addresses": [], "mac": "000D3A000001"},
            {"subnet": "fd00::/64", "addresses": ["fd00::fffe-fd00::1:1"]},
            {"subnet": "::/0", "addresses": ["ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"]}]))
        .unwrap() else {
            panic!("a list")
        };
        let last: Vec<String> = pools[0].addresses.iter().map(ToString::to_string).collect();
        assert_eq!(last, ["10.1.0.9", "10.1.0.20", "10.1.0.21", "10.1.0.22"]);
        let last: Vec<String> = pools[2].addresses.iter().map(ToString::to_string).collect();
        assert_eq!(last, ["fd00::fffe", "fd00::ffff", "fd00::1:0", "fd00::1:1"]);
        assert_eq!(
            (pools[0].mac.as_str(), pools[1].mac.as_str()),
            ("*", "00:0d:3a:00:00:01")
        );
        for (pool, word) in [
            (
                json!({"subnet": "fd00::/64", "addresses": ["10.1.0.1"]}),
                "not in fd00::/64",
            ),
            (
                json!({"subnet": "10.1.0.0/24", "addresses": ["fd00::1"]}),
                "not in 10.1.0.0/24",
            ),
            (
                json!({"subnet": "fd00::/64", "addresses": ["fd00::1-fd00::ffff:ffff:ffff:ffff"]}),
                "more than",
            ),
            (
                json!({"subnet": "::/0", "addresses": ["::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"]}),
                "more than",
            ),
            (
                json!({"subnet": "10.1.0.0/24", "addresses": ["10.2.0.1"]}),
                "not in 10.1.0.0/24",
            ),
            (
                json!({"subnet": "10.1.0.0/24", "addresses": ["10.1.0.9-10.1.0.8"]}),
                "before",
            ),
            (
                json!({"subnet": "10.1.0.0/24", "addresses": ["10.1.0.9", "10.1.0.9"]}),
                "twice",
            ),
            (
                json!({"subnet": "0.0.0.0/0", "addresses": ["0.0.0.0-255.255.255.255"]}),
                "more than",
            ),
            (json!({"subnet": "10.1.0.0/24", "addresses": [], "mac": "zz"}), "MAC"),
            (json!({"subnet": "10.1.0.0/24"}), "addresses"),
        ] {
            let said = parse_list(json!([pool])).unwrap_err();
            assert!(said.contains(word), "{said}");
        }
    }

    #[test]
    fn a_file_of_the_original_form_is_read_without_the_machines_own_addresses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("interfaces.json");
        let text = json!({"Interfaces": [
            {"MacAddress": "000D3A6E1825", "IsPrimary": true, "IPSubnets": [
                {"Prefix": "10.1.0.0/24", "IPAddresses": [
                    {"Address": "10.1.0.4", "IsPrimary": true}, {"Address": "10.1.0.5", "IsPrimary": false}]},
                {"Prefix": "10.2.0.0/24", "IPAddresses": [{"Address": "10.2.0.5"}]}]}]});
        std::fs::write(&path, text.to_string()).unwrap();
        let got = read(&path).unwrap();
        assert_eq!(got.len(), 2);
        assert_eq!(got[0].mac, "00:0d:3a:6e:18:25");
        assert_eq!(got[0].addresses, ["10.1.0.5".parse::<IpAddr>().unwrap()]);
        std::fs::write(&path, "[]").unwrap();
        assert!(matches!(read(&path), Err(SourceError::Form { .. })));
        std::fs::write(&path, text.to_string().replace("10.2.0.5", "fd00::5")).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("not in 10.2.0.0/24"));
        let both = text
            .to_string()
            .replace("10.2.0.5", "fd00::5")
            .replace("10.2.0.0/24", "fd00::/64");
        std::fs::write(&path, both).unwrap();
        assert_eq!(
            read(&path).unwrap()[1].addresses,
            ["fd00::5".parse::<IpAddr>().unwrap()]
        );
        assert!(matches!(read(&dir.path().join("none")), Err(SourceError::Read { .. })));
    }
}

//! Results: one internal shape, printed in the form of each version, and read back from `prevResult` and delegates.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::spec::Version;

/// What an ADD produced. Also what IPAM returns, then with no interfaces.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct CniResult {
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    #[serde(default)]
    pub ips: Vec<IpConfig>,
    #[serde(default)]
    pub routes: Vec<Route>,
    #[serde(default)]
    pub dns: Dns,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct Interface {
    pub name: String,
    #[serde(default)]
    pub mac: String,
    /// Bytes; printed from version 1.1.0 on.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// Path of the network namespace; empty for a link on the host.
    #[serde(default)]
    pub sandbox: String,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct IpConfig {
    pub address: IpNet,
    #[serde(default)]
    pub gateway: Option<IpAddr>,
    /// Index into `interfaces`.
    #[serde(default)]
    pub interface: Option<usize>,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Route {
    pub dst: IpNet,
    #[serde(default)]
    pub gw: Option<IpAddr>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct Dns {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl CniResult {
    /// The document in `version`'s form. `ips[].version` ("4" or "6") is required before 1.0.0 and gone since;
    /// `interfaces[].mtu` exists since 1.1.0.
    pub fn document(&self, version: Version) -> Value {
        let mut doc = json!({ "cniVersion": version.as_str() });
        if !self.interfaces.is_empty() {
            doc["interfaces"] = self
                .interfaces
                .iter()
                .map(|i| {
                    let mut out = json!({ "name": i.name });
                    if !i.mac.is_empty() {
                        out["mac"] = Value::from(i.mac.clone());
                    }
                    if let (Some(mtu), true) = (i.mtu, version >= Version::V1_1_0) {
                        out["mtu"] = Value::from(mtu);
                    }
                    if !i.sandbox.is_empty() {
                        out["sandbox"] = Value::from(i.sandbox.clone());
                    }
                    out
                })
                .collect();
        }
        doc["ips"] = self
            .ips
            .iter()
            .map(|ip| {
                let mut out = json!({ "address": ip.address.to_string() });
                if version < Version::V1_0_0 {
                    out["version"] = Value::from(if ip.address.addr().is_ipv4() { "4" } else { "6" });
                }
                if let Some(gw) = ip.gateway {
                    out["gateway"] = Value::from(gw.to_string());
                }
                if let Some(at) = ip.interface {
                    out["interface"] = Value::from(at);
                }
                out
            })
            .collect();
        doc["routes"] = self
            .routes
            .iter()
            .map(|r| {
                let mut out = json!({ "dst": r.dst.to_string() });
                if let Some(gw) = r.gw {
                    out["gw"] = Value::from(gw.to_string());
                }
                out
            })
            .collect();
        doc["dns"] = json!(self.dns);
        doc
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> CniResult {
        CniResult {
            interfaces: vec![
                Interface {
                    name: "azv01".into(),
                    mac: "aa:aa:aa:aa:aa:aa".into(),
                    mtu: Some(1500),
                    ..Default::default()
                },
                Interface {
                    name: "eth0".into(),
                    mac: "02:00:00:00:00:01".into(),
                    mtu: Some(1500),
                    sandbox: "/run/netns/p".into(),
                },
            ],
            ips: vec![IpConfig {
                address: "10.240.0.5/32".parse().unwrap(),
                gateway: Some("169.254.1.1".parse().unwrap()),
                interface: Some(1),
            }],
            routes: vec![Route {
                dst: "0.0.0.0/0".parse().unwrap(),
                gw: Some("169.254.1.1".parse().unwrap()),
            }],
            dns: Dns {
                nameservers: vec!["168.63.129.16".into()],
                ..Default::default()
            },
        }
    }

    #[test]
    fn each_version_prints_its_form_and_is_read_back() {
        for v in Version::ALL {
            let doc = sample().document(v);
            assert_eq!(doc["cniVersion"], v.as_str());
            assert_eq!(doc["ips"][0].get("version").is_some(), v < Version::V1_0_0, "{v:?}");
            assert_eq!(doc["interfaces"][1].get("mtu").is_some(), v >= Version::V1_1_0, "{v:?}");
            let mut back: CniResult = serde_json::from_value(doc).unwrap();
            back.interfaces.iter_mut().for_each(|i| i.mtu = Some(1500));
            assert_eq!(back, sample());
        }
    }
}

//! The network configuration on standard input: keys of the original plug-in, checked before anything is touched.
//!
//! Keys that have no effect here are warned about by name; keys that would change who can reach whom are refused.
//! Beyond the original's keys there are `stateDir`, `mtu`, and below `ipam`: `wireServerUrl`, `interfacesFile`, `pools`,
//! `timeoutMs`, `coolDownMs`.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use ipnet::{IpNet, Ipv4Net};
use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use crate::{
    masquerade,
    result::{CniResult, Dns},
    source::{self, INTERFACES_FILE, Source},
    spec::{Attachment, Version, code, is_identifier, is_ifname},
};

/// Largest accepted configuration. Lists of valid attachments grow with the pods of a node: 250 of them are 30 KB.
pub const STDIN_BYTES_MAX: usize = 1 << 20;

/// Where state lives unless `stateDir` says otherwise; a tmpfs, as the original's.
pub const STATE_DIR: &str = "/run/azure-vnet";

/// Azure's wire server. `ipam.wireServerUrl` or the variable `AZURE_VNET_WIRE_SERVER` name another base URL.
pub const WIRE_SERVER: &str = "http://168.63.129.16";

#[derive(Debug, Error)]
pub enum ConfError {
    #[error("the network configuration is larger than {STDIN_BYTES_MAX} bytes")]
    TooLarge,
    #[error("the network configuration is no valid JSON object of the expected form")]
    Decode {
        #[source]
        source: serde_json::Error,
    },
    #[error("cniVersion {version:?} is not supported; supported: 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0")]
    Version { version: String },
    #[error("{key}: {reason}")]
    Key { key: String, reason: String },
}

impl ConfError {
    pub fn code(&self) -> u32 {
        match self {
            Self::TooLarge | Self::Decode { .. } => code::DECODE,
            Self::Version { .. } => code::INCOMPATIBLE_VERSION,
            Self::Key { .. } => code::CONFIG,
        }
    }
}

fn key(key: impl Into<String>, reason: impl Into<String>) -> ConfError {
    ConfError::Key {
        key: key.into(),
        reason: reason.into(),
    }
}

/// How pods are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Routed: one /32 route per pod over its own veth; the NIC is not touched.
    Transparent,
    /// Pods are ports of a bridge beside the NIC. The meaning of an omitted `mode`.
    Bridge,
    /// As bridge, and all traffic goes to the fabric, also between pods of one node.
    Tunnel,
}

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct NetConf {
    pub version: Version,
    /// Network name; reservations and links carry it.
    pub name: String,
    pub mode: Mode,
    /// NIC of the node; `None` = the NIC that owns the allocated address, else the default route's.
    pub master: Option<String>,
    /// Name of the bridge; `None` = `azure` and the NIC's index.
    pub bridge: Option<String>,
    /// Bytes; `None` = the NIC's.
    pub mtu: Option<u32>,
    /// `ipMasq`: ranges to which pods keep their own addresses; `None` = everywhere.
    pub masquerade: Option<Vec<Ipv4Net>>,
    pub ipam: Ipam,
    /// Overrides IPAM's when it names servers.
    pub dns: Dns,
    pub state_dir: PathBuf,
    pub prev_result: Option<CniResult>,
    /// `cni.dev/valid-attachments`; `None` if the key is absent.
    pub valid_attachments: Option<Vec<Attachment>>,
    /// Names of keys that have no effect, for a warning.
    pub ignored: Vec<String>,
    /// The document itself, for delegates.
    pub raw: Vec<u8>,
}

#[derive(Clone, Debug)]
pub struct Ipam {
    pub kind: String,
    /// Only this subnet's addresses.
    pub subnet: Option<IpNet>,
    /// Exactly this address.
    pub address: Option<IpAddr>,
    /// Age in ms up to which a remembered pool is used without asking again.
    pub query_interval_ms: u64,
    /// Rest of a released address before its next use, ms.
    pub cool_down_ms: u64,
    pub source: Source,
    /// For connecting and for the whole answer, ms.
    pub timeout_ms: u64,
}

/// `ipam.type` that is linked into `azure-vnet`.
pub const OWN_IPAM: &str = "azure-vnet-ipam";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawConf {
    cni_version: Option<String>,
    name: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    mode: Option<String>,
    bridge: Option<String>,
    master: Option<String>,
    mtu: Option<u32>,
    ip_masq: Option<Value>,
    #[serde(rename = "nonMasqueradeCIDRs")]
    non_masquerade: Option<Vec<String>>,
    ipam: Option<RawIpam>,
    #[serde(default)]
    dns: Dns,
    state_dir: Option<PathBuf>,
    prev_result: Option<Value>,
    /// `null` is a runtime's empty list (a nil slice in Go), not an absent one.
    #[serde(rename = "cni.dev/valid-attachments", default, deserialize_with = "null_as_empty")]
    valid_attachments: Option<Vec<RawAttachment>>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawIpam {
    #[serde(rename = "type")]
    kind: Option<String>,
    environment: Option<String>,
    mode: Option<String>,
    subnet: Option<String>,
    ip_address: Option<String>,
    query_interval: Option<Value>,
    cool_down_ms: Option<u64>,
    wire_server_url: Option<String>,
    interfaces_file: Option<PathBuf>,
    pools: Option<Value>,
    timeout_ms: Option<u64>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

fn null_as_empty<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<Vec<RawAttachment>>, D::Error> {
    Option::deserialize(d).map(|list: Option<Vec<RawAttachment>>| Some(list.unwrap_or_default()))
}

#[derive(Deserialize)]
struct RawAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

/// Keys that a runtime adds, or that mean the same here as their absence.
const SILENT: [&str; 8] = [
    "capabilities",
    "args",
    "runtimeConfig",
    "plugins",
    "disableCheck",
    "disableGC",
    "cniVersions",
    "cni.dev/attachments",
];

/// Boolean keys of the original that change isolation or translation and are not built.
const REFUSED_WHEN_TRUE: [&str; 2] = ["multiTenancy", "enableSnatOnHost"];

/// The `cniVersion` of a document that may be unusable otherwise, for the error document. "1.1.0" if unreadable.
pub fn version_hint(raw: &[u8]) -> String {
    serde_json::from_slice::<Value>(raw)
        .ok()
        .and_then(|v| v.get("cniVersion")?.as_str().map(str::to_owned))
        .unwrap_or_else(|| Version::V1_1_0.as_str().to_owned())
}

impl NetConf {
    /// Parses and checks the configuration of `azure-vnet`. `wire_server_env` is the value of `AZURE_VNET_WIRE_SERVER`;
    /// the key wins.
    pub fn parse(raw: &[u8], wire_server_env: Option<String>) -> Result<Self, ConfError> {
        Self::read(raw, wire_server_env, true)
    }

    /// Parses another plug-in's configuration, of which only the `ipam` part is ours to judge.
    pub fn parse_for_ipam(raw: &[u8], wire_server_env: Option<String>) -> Result<Self, ConfError> {
        Self::read(raw, wire_server_env, false)
    }

    fn read(raw: &[u8], wire_server_env: Option<String>, ours: bool) -> Result<Self, ConfError> {
        if raw.len() > STDIN_BYTES_MAX {
            return Err(ConfError::TooLarge);
        }
        let conf: RawConf = serde_json::from_slice(raw).map_err(|source| ConfError::Decode { source })?;
        // An omitted version means one older than all we speak.
        let version = conf.cni_version.unwrap_or_default();
        let version = Version::parse(&version).ok_or(ConfError::Version { version })?;
        let name = conf.name.unwrap_or_default();
        if !is_identifier(&name) {
            return Err(key(
                "name",
                format!("{name:?} must start with a letter or digit and hold only letters, digits, '_', '.' and '-'"),
            ));
        }
        if conf.kind.as_deref().unwrap_or_default().is_empty() {
            return Err(key("type", "missing"));
        }
        let mode = match conf.mode.as_deref() {
            None | Some("" | "bridge") => Mode::Bridge,
            Some("transparent") => Mode::Transparent,
            Some("tunnel") => Mode::Tunnel,
            Some(_) if !ours => Mode::Bridge,
            Some(other) => return Err(key("mode", format!("{other:?} is none of bridge, transparent, tunnel"))),
        };
        for (what, value) in [("master", &conf.master), ("bridge", &conf.bridge)] {
            if let Some(v) = value.as_deref().filter(|v| ours && !v.is_empty() && !is_ifname(v)) {
                return Err(key(what, format!("{v:?} is no interface name")));
            }
        }
        if let Some(mtu) = conf.mtu.filter(|m| ours && *m != 0 && !(68..=65535).contains(m)) {
            return Err(key("mtu", format!("{mtu} is not within 68..=65535")));
        }
        let mut ignored = Vec::new();
        let masquerade = match &conf.ip_masq {
            _ if !ours => None,
            Some(Value::Bool(true)) => Some(exempt(conf.non_masquerade.as_deref())?),
            None | Some(Value::Bool(false) | Value::Null) => {
                ignored.extend(
                    conf.non_masquerade
                        .map(|_| "nonMasqueradeCIDRs (without ipMasq)".to_owned()),
                );
                None
            }
            Some(other) => return Err(key("ipMasq", format!("{other} is neither true nor false"))),
        };
        if mode == Mode::Transparent && conf.bridge.as_deref().is_some_and(|b| !b.is_empty()) {
            ignored.push("bridge".to_owned());
        }
        for (k, v) in conf.rest.iter().filter(|_| ours) {
            if REFUSED_WHEN_TRUE.contains(&k.as_str()) && truthy(v) {
                return Err(key(
                    k,
                    "is not supported; it would change how pods are isolated or translated",
                ));
            }
            if k == "executionMode" && !matches!(v.as_str(), Some("" | "default")) {
                return Err(key(k, format!("{v} is not supported; only \"default\" is")));
            }
            if !SILENT.contains(&k.as_str()) {
                ignored.push(k.clone());
            }
        }
        let ipam = Ipam::parse(conf.ipam, wire_server_env, &mut ignored)?;
        if let Some(bad) = conf.dns.nameservers.iter().find(|s| s.parse::<IpAddr>().is_err()) {
            return Err(key("dns.nameservers", format!("{bad:?} is no IP address")));
        }
        let state_dir = conf.state_dir.unwrap_or_else(|| STATE_DIR.into());
        if !state_dir.is_absolute() {
            return Err(key("stateDir", format!("{} is not absolute", state_dir.display())));
        }
        let prev_result = match conf.prev_result {
            None | Some(Value::Null) => None,
            Some(v) => Some(serde_json::from_value(v).map_err(|e| key("prevResult", e.to_string()))?),
        };
        let valid_attachments = conf.valid_attachments.map(|list| {
            list.into_iter()
                .map(|a| Attachment {
                    container_id: a.container_id,
                    ifname: a.ifname,
                })
                .collect()
        });
        Ok(Self {
            version,
            name,
            mode,
            master: conf.master.filter(|m| !m.is_empty()),
            bridge: conf.bridge.filter(|b| !b.is_empty()),
            mtu: conf.mtu.filter(|m| *m != 0),
            masquerade,
            ipam,
            dns: conf.dns,
            state_dir,
            prev_result,
            valid_attachments,
            ignored,
            raw: raw.to_vec(),
        })
    }
}

impl Ipam {
    fn parse(raw: Option<RawIpam>, env: Option<String>, ignored: &mut Vec<String>) -> Result<Self, ConfError> {
        let raw = raw.ok_or_else(|| key("ipam", "missing"))?;
        let kind = raw.kind.unwrap_or_default();
        if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
            return Err(key("ipam.type", format!("{kind:?} is no plug-in name")));
        }
        let own = kind == OWN_IPAM;
        if own {
            if let Some(other) = raw.mode.as_deref().filter(|m| !m.is_empty()) {
                return Err(key("ipam.mode", format!("{other:?} is not supported; leave it out")));
            }
            ignored.extend(raw.rest.keys().map(|k| format!("ipam.{k}")));
        }
        // A delegate's own keys are its business.
        let subnet = match raw.subnet.as_deref().filter(|s| own && !s.is_empty()) {
            Some(s) => Some(
                s.parse()
                    .map_err(|_| key("ipam.subnet", format!("{s:?} is no prefix")))?,
            ),
            None => None,
        };
        let address = match raw.ip_address.as_deref().filter(|s| own && !s.is_empty()) {
            Some(s) => Some(
                s.parse()
                    .map_err(|_| key("ipam.ipAddress", format!("{s:?} is no IP address")))?,
            ),
            None => None,
        };
        let query_interval_ms = match raw.query_interval.filter(|_| own) {
            None => 10_000,
            // The original wants a string of seconds; a number is understood as well.
            Some(v) => v
                .as_u64()
                .or_else(|| v.as_str()?.parse().ok())
                .and_then(|s: u64| s.checked_mul(1000))
                .ok_or_else(|| key("ipam.queryInterval", format!("{v} is no number of seconds")))?,
        };
        let wire_server = raw.wire_server_url.or(env).unwrap_or_else(|| WIRE_SERVER.to_owned());
        if own && !wire_server.starts_with("http://") {
            return Err(key(
                "ipam.wireServerUrl",
                format!("{wire_server:?} must start with http://"),
            ));
        }
        let source = match (raw.environment.as_deref().unwrap_or_default(), raw.pools) {
            _ if !own => Source::Wire(wire_server),
            ("", Some(list)) => source::parse_list(list).map_err(|reason| key("ipam.pools", reason))?,
            ("" | "azure", None) => Source::Wire(wire_server),
            ("fileIpam" | "mas", None) => {
                let path = raw.interfaces_file.unwrap_or_else(|| INTERFACES_FILE.into());
                if !path.is_absolute() {
                    return Err(key(
                        "ipam.interfacesFile",
                        format!("{} is not absolute", path.display()),
                    ));
                }
                Source::File(path)
            }
            (environment, Some(_)) => {
                return Err(key(
                    "ipam.pools",
                    format!("given together with the environment {environment:?}"),
                ));
            }
            (other, None) => {
                return Err(key(
                    "ipam.environment",
                    format!("{other:?} is not supported; azure, fileIpam and mas are"),
                ));
            }
        };
        let timeout_ms = raw.timeout_ms.unwrap_or(10_000);
        if own && !(1..=60_000).contains(&timeout_ms) {
            return Err(key("ipam.timeoutMs", format!("{timeout_ms} is not within 1..=60000")));
        }
        let cool_down_ms = raw.cool_down_ms.unwrap_or(2_000);
        if own && cool_down_ms > 600_000 {
            return Err(key("ipam.coolDownMs", format!("{cool_down_ms} is more than 600000")));
        }
        Ok(Self {
            kind,
            subnet,
            address,
            query_interval_ms,
            cool_down_ms,
            source,
            timeout_ms,
        })
    }
}

/// `nonMasqueradeCIDRs`.
fn exempt(given: Option<&[String]>) -> Result<Vec<Ipv4Net>, ConfError> {
    /// More are a mistake, and a table that large a burden.
    const RANGES_MAX: usize = 1000;
    let of = |text: &str| match text.parse() {
        Ok(IpNet::V4(net)) => Ok(net.trunc()),
        Ok(IpNet::V6(_)) => Err(key(
            "nonMasqueradeCIDRs",
            format!("{text} is IPv6, which is never masqueraded"),
        )),
        Err(_) => Err(key("nonMasqueradeCIDRs", format!("{text:?} is no prefix"))),
    };
    match given {
        None => masquerade::EXEMPT.iter().map(|text| of(text)).collect(),
        Some(list) if list.len() > RANGES_MAX => {
            Err(key("nonMasqueradeCIDRs", format!("more than {RANGES_MAX} prefixes")))
        }
        Some(list) => list.iter().map(|text| of(text)).collect(),
    }
}

fn truthy(v: &Value) -> bool {
    v.as_bool() == Some(true) || v.as_str() == Some("true")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(v: Value) -> Result<NetConf, ConfError> {
        NetConf::parse(&serde_json::to_vec(&v).unwrap(), None)
    }

    fn base() -> Value {
        json!({"cniVersion": "0.3.0", "name": "azure", "type": "azure-vnet", "mode": "transparent",
               "ipam": {"type": "azure-vnet-ipam"}})
    }

    fn with(k: &str, v: Value) -> Value {
        let mut b = base();
        b[k] = v;
        b
    }

    #[test]
    fn reads_the_shipped_configuration() {
        let c = parse(
            json!({"cniVersion": "0.3.0", "name": "azure", "type": "azure-vnet", "mode": "bridge",
            "bridge": "azure0", "ipam": {"type": "azure-vnet-ipam"}}),
        )
        .unwrap();
        assert_eq!(
            (c.mode, c.version, c.ipam.kind.as_str()),
            (Mode::Bridge, Version::V0_3_0, OWN_IPAM)
        );
        assert!(c.ignored.is_empty(), "{:?}", c.ignored);
        assert_eq!(c.ipam.source, Source::Wire(WIRE_SERVER.into()));
        assert_eq!(c.state_dir, PathBuf::from(STATE_DIR));
        let mut omitted = base();
        omitted.as_object_mut().unwrap().remove("mode");
        assert_eq!(parse(omitted).unwrap().mode, Mode::Bridge);
    }

    #[test]
    fn warns_by_name_and_refuses_what_changes_isolation() {
        let c = parse(with("logLevel", json!("debug"))).unwrap();
        assert_eq!(c.ignored, ["logLevel"]);
        assert_eq!(parse(with("bridge", json!("azure0"))).unwrap().ignored, ["bridge"]);
        for (k, v) in [
            ("multiTenancy", json!(true)),
            ("enableSnatOnHost", json!(true)),
            ("ipMasq", json!("yes")),
            ("executionMode", json!("baremetal")),
            ("mode", json!("transparent-vlan")),
            ("master", json!("a/b")),
            ("stateDir", json!("relative")),
            ("mtu", json!(10)),
            ("ipam", json!({"type": "../sh"})),
            (
                "ipam",
                json!({"type": "azure-vnet-ipam", "environment": "ipv6NodeIpam"}),
            ),
            ("ipam", json!({"type": "azure-vnet-ipam", "subnet": "10.0.0.0/33"})),
            ("ipam", json!({"type": "azure-vnet-ipam", "queryInterval": "soon"})),
            (
                "ipam",
                json!({"type": "azure-vnet-ipam", "wireServerUrl": "file:///etc/passwd"}),
            ),
            ("ipam", Value::Null),
            ("dns", json!({"nameservers": ["x"]})),
            ("name", json!("../x")),
            ("prevResult", json!({"ips": [{"address": "bad"}]})),
        ] {
            let e = parse(with(k, v.clone())).map(|_| ()).unwrap_err();
            assert_eq!(e.code(), code::CONFIG, "{k} {v}: {e}");
        }
        assert!(parse(with("multiTenancy", json!(false))).unwrap().ignored == ["multiTenancy"]);
    }

    #[test]
    fn masquerading_knows_its_ranges() {
        let ranges = |c: NetConf| {
            c.masquerade
                .map(|r| r.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(ranges(parse(base()).unwrap()), None);
        let mut conf = with("ipMasq", json!(true));
        assert_eq!(ranges(parse(conf.clone()).unwrap()).unwrap(), masquerade::EXEMPT);
        conf["nonMasqueradeCIDRs"] = json!(["10.1.2.3/8"]);
        assert_eq!(ranges(parse(conf.clone()).unwrap()).unwrap(), ["10.0.0.0/8"]);
        for bad in [json!(["fd00::/8"]), json!(["x"]), json!(vec!["10.0.0.0/8"; 2000])] {
            conf["nonMasqueradeCIDRs"] = bad;
            let e = parse(conf.clone()).map(drop).unwrap_err();
            assert_eq!(e.code(), code::CONFIG, "{e}");
        }
        conf["ipMasq"] = json!(false);
        conf["nonMasqueradeCIDRs"] = json!(["10.0.0.0/8"]);
        assert_eq!(parse(conf).unwrap().ignored, ["nonMasqueradeCIDRs (without ipMasq)"]);
    }

    #[test]
    fn keys_of_other_plugins_are_not_judged_by_the_ipam() {
        let mut other = with("ipMasq", json!(true));
        other["type"] = json!("macvlan");
        other["mode"] = json!("passthru");
        let c =
            NetConf::parse_for_ipam(&serde_json::to_vec(&other).unwrap(), Some("http://127.0.0.1:1".into())).unwrap();
        assert!(c.ignored.is_empty());
        assert_eq!(c.ipam.source, Source::Wire("http://127.0.0.1:1".into()));
    }

    #[test]
    fn bad_documents_have_their_codes() {
        let code_of = |raw: &[u8]| NetConf::parse(raw, None).map(|_| ()).unwrap_err().code();
        assert_eq!(code_of(b""), code::DECODE);
        assert_eq!(code_of(b"[]"), code::DECODE);
        assert_eq!(code_of(b"{\"name\":1}"), code::DECODE);
        assert_eq!(code_of("[".repeat(100_000).as_bytes()), code::DECODE);
        assert_eq!(code_of(&vec![b' '; STDIN_BYTES_MAX + 1]), code::DECODE);
        assert_eq!(code_of(b"{\"cniVersion\":\"0.2.0\"}"), code::INCOMPATIBLE_VERSION);
        assert_eq!(code_of(b"{}"), code::INCOMPATIBLE_VERSION);
        assert_eq!(code_of(br#"{"cniVersion":"1.0.0","cniVersion":"1.0.0"}"#), code::DECODE);
        assert_eq!(version_hint(b"{\"cniVersion\":\"0.2.0\"}"), "0.2.0");
        assert_eq!(version_hint(b"\xff"), "1.1.0");
    }
}

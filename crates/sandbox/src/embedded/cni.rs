//! A sandbox's network from CNI plug-ins: runs the chain of the first configuration list, as kubelets do.
//!
//! # Source
//! CNI specification 1.1.0, sections 2 to 5.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use async_trait::async_trait;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::{io::AsyncWriteExt, process::Command};

use super::{io, runtime};
use crate::api::{Error, Network, PodIdentity, SandboxConfig};

/// A plug-in that answers later than that is killed.
const PATIENCE: Duration = Duration::from_secs(60);
const IFNAME: &str = "eth0";
const RESULT_BYTES_MAX: usize = 1 << 20;

/// Plug-ins from `bin_dirs`, configured by the first `*.conflist` (or `*.conf`) of `conf_dir`, read anew for each sandbox.
#[derive(Clone, Debug)]
pub struct CniNetwork {
    conf_dir: PathBuf,
    bin_dirs: Vec<PathBuf>,
    /// Results of successful ADDs, needed again for DEL and GC: `<id>.json`.
    cache_dir: PathBuf,
}

#[derive(Clone, Debug)]
struct ConfList {
    name: String,
    version: String,
    plugins: Vec<Map<String, Value>>,
}

/// The part of a result that we use.
#[derive(Debug, Default, Deserialize)]
struct AddResult {
    #[serde(default)]
    ips: Vec<ResultIp>,
}

#[derive(Debug, Deserialize)]
struct ResultIp {
    address: String,
}

#[derive(Debug, Deserialize)]
struct PluginError {
    #[serde(default)]
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

/// One call of a plug-in.
struct Call<'a> {
    command: &'static str,
    sandbox: &'a str,
    netns: Option<&'a Path>,
    args: String,
}

impl CniNetwork {
    /// Usually `/etc/cni/net.d`, `[/opt/cni/bin]` and a directory below the engine's root.
    pub fn new(conf_dir: impl Into<PathBuf>, bin_dirs: Vec<PathBuf>, cache_dir: impl Into<PathBuf>) -> Self {
        Self {
            conf_dir: conf_dir.into(),
            bin_dirs,
            cache_dir: cache_dir.into(),
        }
    }

    fn load(&self) -> Result<ConfList, Error> {
        let failed = |reason: String| Error::Runtime {
            doing: "read the network configuration".to_owned(),
            reason,
        };
        let mut files: Vec<PathBuf> = std::fs::read_dir(&self.conf_dir)
            .map_err(io(format!("list {}", self.conf_dir.display())))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "conflist" || extension == "conf" || extension == "json")
            })
            .collect();
        files.sort();
        let path = files
            .first()
            .ok_or_else(|| failed(format!("{} has no configuration list", self.conf_dir.display())))?;
        let bytes = std::fs::read(path).map_err(io(format!("read {}", path.display())))?;
        parse(&bytes).map_err(|reason| failed(format!("{}: {reason}", path.display())))
    }

    fn cached(&self, sandbox: &str) -> PathBuf {
        self.cache_dir.join(format!("{sandbox}.json"))
    }

    async fn run(&self, config: &Map<String, Value>, call: &Call<'_>) -> Result<Option<Value>, Error> {
        let kind = config.get("type").and_then(Value::as_str).unwrap_or_default();
        let failed = |reason: String| Error::Network {
            sandbox: call.sandbox.to_owned(),
            reason: format!("{kind} {}: {reason}", call.command),
        };
        if kind.is_empty() || kind.contains('/') {
            return Err(failed("the plug-in has no plain type".to_owned()));
        }
        let program = self
            .bin_dirs
            .iter()
            .map(|dir| dir.join(kind))
            .find(|path| path.is_file());
        let program = program.ok_or_else(|| failed(format!("not found in {:?}", self.bin_dirs)))?;
        let path = std::env::join_paths(&self.bin_dirs).map_err(|error| failed(error.to_string()))?;
        let mut command = Command::new(program);
        command
            .env("CNI_COMMAND", call.command)
            .env("CNI_PATH", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if !call.sandbox.is_empty() {
            let netns = call.netns.map(|path| path.as_os_str()).unwrap_or_default();
            command
                .env("CNI_CONTAINERID", call.sandbox)
                .env("CNI_IFNAME", IFNAME)
                .env("CNI_NETNS", netns)
                .env("CNI_ARGS", &call.args);
        }
        let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
        let input = Value::Object(config.clone()).to_string();
        let mut stdin = child.stdin.take();
        let talk = async {
            if let Some(mut stdin) = stdin.take() {
                // A plug-in may answer without reading everything.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(PATIENCE, talk)
            .await
            .map_err(|_| failed(format!("no answer within {} s", PATIENCE.as_secs())))?
            .map_err(|error| failed(error.to_string()))?;
        if output.stdout.len() > RESULT_BYTES_MAX {
            return Err(failed("its answer is too long".to_owned()));
        }
        if !output.status.success() {
            let reason = match serde_json::from_slice::<PluginError>(&output.stdout) {
                Ok(error) => format!("{} (code {}) {}", error.msg, error.code, error.details)
                    .trim_end()
                    .to_owned(),
                Err(_) => format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()),
            };
            return Err(failed(reason));
        }
        if output.stdout.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        serde_json::from_slice(&output.stdout)
            .map(Some)
            .map_err(|error| failed(error.to_string()))
    }
}

/// A list, or a single plug-in's configuration as a list of one.
fn parse(bytes: &[u8]) -> Result<ConfList, String> {
    let value: Map<String, Value> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let name = text("name").ok_or("it has no name")?;
    let version = text("cniVersion").unwrap_or_else(|| "0.1.0".to_owned());
    let plugins = match value.get("plugins") {
        None => vec![value.clone()],
        Some(Value::Array(list)) if !list.is_empty() => {
            let plugins = list.iter().map(|plugin| plugin.as_object().cloned());
            plugins
                .collect::<Option<Vec<_>>>()
                .ok_or("a plug-in is not an object")?
        }
        Some(_) => return Err("plugins is not a list with entries".to_owned()),
    };
    Ok(ConfList { name, version, plugins })
}

/// What one plug-in reads: its own object, the list's name and version, capabilities as `runtimeConfig`, the previous result.
fn request(
    list: &ConfList,
    plugin: &Map<String, Value>,
    capabilities: &Value,
    previous: Option<&Value>,
) -> Map<String, Value> {
    let mut config = plugin.clone();
    let wanted = config.remove("capabilities");
    config.insert("name".to_owned(), json!(list.name));
    config.insert("cniVersion".to_owned(), json!(list.version));
    let offered = |key: &str| {
        wanted
            .as_ref()
            .and_then(|wanted| wanted.get(key))
            .and_then(Value::as_bool)
            .unwrap_or(false)
    };
    let given: Map<String, Value> = capabilities
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, _)| offered(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if !given.is_empty() {
        config.insert("runtimeConfig".to_owned(), Value::Object(given));
    }
    if let Some(previous) = previous {
        config.insert("prevResult".to_owned(), previous.clone());
    }
    config
}

fn args(sandbox: &str, pod: &PodIdentity) -> String {
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={sandbox};K8S_POD_UID={}",
        pod.namespace, pod.name, pod.uid
    )
}

fn capabilities(config: &SandboxConfig) -> Value {
    let ports: Vec<Value> = config
        .port_mappings
        .iter()
        .map(|port| json!({ "hostPort": port.host_port, "containerPort": port.container_port, "protocol": port.protocol }))
        .collect();
    let mut given = json!({ "io.kubernetes.cri.pod-annotations": config.annotations });
    if !ports.is_empty() {
        given["portMappings"] = json!(ports);
    }
    if let Some(dns) = &config.dns {
        given["dns"] = json!({ "servers": dns.servers, "searches": dns.searches, "options": dns.options });
    }
    given
}

#[async_trait]
impl Network for CniNetwork {
    async fn attach(&self, sandbox_id: &str, config: &SandboxConfig, netns: &Path) -> Result<Vec<IpAddr>, Error> {
        let list = self.load()?;
        let (args, capabilities) = (args(sandbox_id, &config.pod), capabilities(config));
        let mut previous = None;
        for plugin in &list.plugins {
            let input = request(&list, plugin, &capabilities, previous.as_ref());
            let call = Call {
                command: "ADD",
                sandbox: sandbox_id,
                netns: Some(netns),
                args: args.clone(),
            };
            // The caller detaches after an error, which undoes the plug-ins before this one.
            if let Some(result) = self.run(&input, &call).await? {
                previous = Some(result);
            }
        }
        let result = previous.unwrap_or_else(|| json!({}));
        std::fs::create_dir_all(&self.cache_dir).map_err(io("create the network cache"))?;
        std::fs::write(self.cached(sandbox_id), result.to_string()).map_err(io("save the network result"))?;
        let parsed: AddResult =
            serde_json::from_value(result).map_err(|error| runtime("read the network result", &error))?;
        let addresses = parsed
            .ips
            .iter()
            .filter_map(|ip| ip.address.split('/').next()?.parse().ok());
        let addresses: Vec<IpAddr> = addresses.collect();
        if addresses.is_empty() {
            return Err(Error::Network {
                sandbox: sandbox_id.to_owned(),
                reason: "the plug-ins gave no address".to_owned(),
            });
        }
        Ok(addresses)
    }

    async fn detach(&self, sandbox_id: &str, pod: &PodIdentity, netns: Option<&Path>) -> Result<(), Error> {
        let list = self.load()?;
        let cached = std::fs::read(self.cached(sandbox_id)).ok();
        let previous: Option<Value> = cached.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        for plugin in list.plugins.iter().rev() {
            let input = request(&list, plugin, &Value::Null, previous.as_ref());
            let call = Call {
                command: "DEL",
                sandbox: sandbox_id,
                netns,
                args: args(sandbox_id, pod),
            };
            self.run(&input, &call).await?;
        }
        let _ = std::fs::remove_file(self.cached(sandbox_id));
        Ok(())
    }

    /// Plug-ins before version 1.1 know no GC; they are not asked.
    async fn gc(&self, live: &[String]) -> Result<(), Error> {
        let list = match self.load() {
            Ok(list) => list,
            // A node without a configuration yet has nothing to collect.
            Err(error) => {
                tracing::warn!(%error, "no network garbage is collected");
                return Ok(());
            }
        };
        let newer = list
            .version
            .split('.')
            .filter_map(|part| part.parse::<u32>().ok())
            .collect::<Vec<_>>()
            >= vec![1, 1];
        if !newer {
            return Ok(());
        }
        let attachments: Vec<Value> = live
            .iter()
            .map(|id| json!({ "containerID": id, "ifname": IFNAME }))
            .collect();
        for plugin in &list.plugins {
            let mut input = request(&list, plugin, &Value::Null, None);
            input.insert("cni.dev/valid-attachments".to_owned(), json!(attachments));
            let call = Call {
                command: "GC",
                sandbox: "",
                netns: None,
                args: String::new(),
            };
            self.run(&input, &call).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Plug-ins as shell scripts that note how they were called.
    fn network(dir: &Path, script: &str, list: &str) -> CniNetwork {
        let (conf, bin) = (dir.join("net.d"), dir.join("bin"));
        std::fs::create_dir_all(&conf).unwrap();
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::write(conf.join("10-a.conflist"), list).unwrap();
        std::fs::write(conf.join("20-b.conflist"), "not read").unwrap();
        for name in ["first", "second"] {
            let log = dir.join("log");
            let text = format!(
                "#!/bin/sh\nin=$(cat)\necho \"{name} $CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_ARGS $in\" >> {}\n{script}\n",
                log.display()
            );
            std::fs::write(bin.join(name), text).unwrap();
            std::fs::set_permissions(bin.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        CniNetwork::new(conf, vec![bin], dir.join("cache"))
    }

    const LIST: &str = r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"first","x":1},
        {"type":"second","capabilities":{"portMappings":true}}]}"#;
    const ANSWER: &str = r#"[ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.1.0","ips":[{"address":"10.1.2.3/24"},{"address":"fd00::3/64"}]}'; exit 0"#;

    fn pod() -> SandboxConfig {
        SandboxConfig {
            pod: PodIdentity {
                uid: "u1".into(),
                namespace: "ns".into(),
                name: "web".into(),
                attempt: 0,
            },
            port_mappings: vec![crate::api::PortMapping {
                protocol: "tcp".into(),
                container_port: 80,
                host_port: 8080,
            }],
            ..SandboxConfig::default()
        }
    }

    #[tokio::test]
    async fn the_chain_is_added_in_order_and_deleted_in_reverse() {
        let dir = tempfile::tempdir().unwrap();
        let network = network(dir.path(), ANSWER, LIST);
        let ips = network.attach("box", &pod(), Path::new("/n")).await.unwrap();
        assert_eq!(ips, ["10.1.2.3".parse::<IpAddr>().unwrap(), "fd00::3".parse().unwrap()]);
        network.detach("box", &pod().pod, None).await.unwrap();
        network.gc(&["live".to_owned()]).await.unwrap();
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        let lines: Vec<&str> = log.lines().collect();
        let starts: Vec<String> = lines
            .iter()
            .map(|line| line.splitn(4, ' ').take(3).collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(
            starts,
            [
                "first ADD box",
                "second ADD box",
                "second DEL box",
                "first DEL box",
                "first GC ",
                "second GC "
            ]
        );
        assert!(lines[0].contains("K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web;") && !lines[0].contains("prevResult"));
        assert!(
            lines[1].contains("prevResult") && lines[1].contains("\"hostPort\":8080") && !lines[0].contains("hostPort")
        );
        assert!(
            lines[2].contains("prevResult") && lines[4].contains("valid-attachments") && lines[4].contains("\"live\"")
        );
        assert!(!dir.path().join("cache/box.json").exists());
    }

    #[tokio::test]
    async fn a_plug_ins_words_reach_the_caller() {
        let dir = tempfile::tempdir().unwrap();
        let failing = network(
            dir.path(),
            r#"echo '{"code":11,"msg":"no address left","details":"pool"}'; exit 1"#,
            LIST,
        );
        let error = failing
            .attach("box", &pod(), Path::new("/n"))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("first ADD: no address left (code 11) pool"), "{error}");
        let silent = network(dir.path(), "echo oops >&2; exit 3", LIST);
        let error = silent
            .attach("box", &pod(), Path::new("/n"))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("oops"), "{error}");
        let unknown = network(dir.path(), ANSWER, r#"{"name":"n","plugins":[{"type":"third"}]}"#);
        assert!(
            unknown
                .attach("box", &pod(), Path::new("/n"))
                .await
                .unwrap_err()
                .to_string()
                .contains("not found")
        );
    }
}

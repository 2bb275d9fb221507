//! The other side of the protocol: runs the plug-ins of a network list, as a node does for its pods. Blocking.
//!
//! Results are kept in a cache directory, because DEL and CHECK hand the result of ADD back to the plug-ins.
//!
//! # Source
//! CNI SPEC.md 1.1.0, section 3, "Execution of Network Configurations".

use std::{
    fs, io,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command as Process, Stdio},
};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::{
    pool::Key,
    result::CniResult,
    spec::{Attachment, Command, Version, is_identifier},
};

const OUTPUT_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, Error)]
pub enum RuntimeError {
    #[error("{doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("there is no network list in {dir}")]
    NoList { dir: PathBuf },
    #[error("network list {path} is not understood: {reason}")]
    List { path: PathBuf, reason: String },
    #[error("plug-in {name} is not in any of the plug-in directories")]
    NoPlugin { name: String },
    #[error("plug-in {name}, {command}: {msg} (code {code}){}", if details.is_empty() { String::new() } else { format!(": {details}") })]
    Refused {
        name: String,
        command: &'static str,
        code: u32,
        msg: String,
        details: String,
    },
    #[error("plug-in {name} printed something that is no result")]
    Output {
        name: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("network list {network} of version {version} does not know {command}")]
    TooOld {
        network: String,
        version: &'static str,
        command: &'static str,
    },
}

/// A network list: plug-ins that run one after the other.
#[derive(Clone, Debug)]
pub struct NetworkList {
    pub name: String,
    pub version: Version,
    pub plugins: Vec<Map<String, Value>>,
    disable_check: bool,
    disable_gc: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawList {
    cni_version: String,
    name: String,
    plugins: Vec<Map<String, Value>>,
    #[serde(default)]
    disable_check: bool,
    #[serde(default, rename = "disableGC")]
    disable_gc: bool,
}

impl NetworkList {
    /// The first `*.conflist` of `dir` by name, as kubelet's runtimes choose.
    pub fn load_dir(dir: &Path) -> Result<Self, RuntimeError> {
        let fail = |source| RuntimeError::Io {
            doing: "listing",
            path: dir.to_owned(),
            source,
        };
        let mut found: Vec<PathBuf> = fs::read_dir(dir)
            .map_err(fail)?
            .filter_map(|e| Some(e.ok()?.path()))
            .filter(|p| p.extension().is_some_and(|e| e == "conflist"))
            .collect();
        found.sort();
        Self::load(
            found
                .first()
                .ok_or_else(|| RuntimeError::NoList { dir: dir.to_owned() })?,
        )
    }

    /// One file.
    pub fn load(path: &Path) -> Result<Self, RuntimeError> {
        let raw = fs::read(path).map_err(|source| RuntimeError::Io {
            doing: "reading",
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&raw).map_err(|reason| RuntimeError::List {
            path: path.to_owned(),
            reason,
        })
    }

    /// # Errors
    /// The reason, in words.
    pub fn parse(raw: &[u8]) -> Result<Self, String> {
        let list: RawList = serde_json::from_slice(raw).map_err(|e| e.to_string())?;
        let version = Version::parse(&list.cni_version).ok_or_else(|| format!("cniVersion {:?}", list.cni_version))?;
        if !is_identifier(&list.name) {
            return Err(format!("name {:?}", list.name));
        }
        if list.plugins.is_empty() {
            return Err("no plug-ins".to_owned());
        }
        for plugin in &list.plugins {
            let kind = plugin.get("type").and_then(Value::as_str).unwrap_or_default();
            if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
                return Err(format!("plug-in type {kind:?}"));
            }
        }
        Ok(Self {
            name: list.name,
            version,
            plugins: list.plugins,
            disable_check: list.disable_check,
            disable_gc: list.disable_gc,
        })
    }
}

/// What one pod's attachment needs.
#[derive(Clone, Debug, Default)]
pub struct Request {
    pub container_id: String,
    /// Name in the pod, `eth0`.
    pub ifname: String,
    /// Optional for [`Runtime::del`].
    pub netns: Option<PathBuf>,
    /// `CNI_ARGS`, such as `K8S_POD_NAMESPACE`.
    pub args: Vec<(String, String)>,
    /// Runtime configuration by capability (`portMappings`); given to plug-ins that declare it.
    pub capabilities: Map<String, Value>,
}

/// Runs a list's plug-ins.
#[derive(Clone, Debug)]
pub struct Runtime {
    pub list: NetworkList,
    /// Searched in order; also `CNI_PATH`.
    pub plugin_dirs: Vec<PathBuf>,
    /// Results of living attachments; on the same kind of storage as the plug-ins' state.
    pub cache_dir: PathBuf,
}

impl Runtime {
    /// Attaches a pod. On failure everything is detached again and the first error is returned.
    pub fn add(&self, request: &Request) -> Result<CniResult, RuntimeError> {
        let mut previous: Option<Value> = None;
        for plugin in &self.list.plugins {
            let outcome = self
                .exec(plugin, Command::Add, Some(request), previous.as_ref(), None)
                .and_then(|out| {
                    let (name, out) = (kind(plugin).to_owned(), out.unwrap_or_default());
                    serde_json::from_value::<CniResult>(out.clone())
                        .map_err(|source| RuntimeError::Output { name, source })?;
                    Ok(out)
                });
            match outcome {
                Ok(result) => previous = Some(result),
                Err(error) => {
                    // What this says is second to why it is done.
                    let _ = self.del(request);
                    return Err(error);
                }
            }
        }
        let result = previous.unwrap_or_default();
        self.remember(request, &result)?;
        let name = self.list.name.clone();
        serde_json::from_value(result).map_err(|source| RuntimeError::Output { name, source })
    }

    /// Detaches a pod; success if it is not attached. Every plug-in is run; the first error is returned.
    pub fn del(&self, request: &Request) -> Result<(), RuntimeError> {
        let cached = self.cached(request);
        let mut first = None;
        for plugin in self.list.plugins.iter().rev() {
            let outcome = self.exec(plugin, Command::Del, Some(request), cached.as_ref(), None);
            first = first.or(outcome.err());
        }
        if let Some(error) = first {
            return Err(error);
        }
        let path = self.cache_path(request);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(RuntimeError::Io {
                doing: "removing",
                path,
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Compares a pod's attachment with the kernel.
    pub fn check(&self, request: &Request) -> Result<(), RuntimeError> {
        self.need(Command::Check)?;
        if self.list.disable_check {
            return Ok(());
        }
        let cached = self.cached(request);
        for plugin in &self.list.plugins {
            self.exec(plugin, Command::Check, Some(request), cached.as_ref(), None)?;
        }
        Ok(())
    }

    /// Releases everything of this network that is not in `valid`. Never run it while an attachment is being made.
    pub fn gc(&self, valid: &[Attachment]) -> Result<(), RuntimeError> {
        self.need(Command::Gc)?;
        if self.list.disable_gc {
            return Ok(());
        }
        let mut first = None;
        for plugin in &self.list.plugins {
            first = first.or(self.exec(plugin, Command::Gc, None, None, Some(valid)).err());
        }
        let keep: Vec<PathBuf> = valid.iter().map(|a| self.path_of(&Key::of(a))).collect();
        for entry in fs::read_dir(&self.cache_dir).into_iter().flatten().flatten() {
            let stale = entry
                .file_name()
                .to_string_lossy()
                .starts_with(&format!("{}-", self.list.name));
            if stale && !keep.contains(&entry.path()) {
                let _ = fs::remove_file(entry.path());
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// Whether pods can be attached now.
    pub fn status(&self) -> Result<(), RuntimeError> {
        self.need(Command::Status)?;
        self.list
            .plugins
            .iter()
            .try_for_each(|p| self.exec(p, Command::Status, None, None, None).map(drop))
    }

    fn need(&self, command: Command) -> Result<(), RuntimeError> {
        if self.list.version >= command.since() {
            return Ok(());
        }
        let (network, version) = (self.list.name.clone(), self.list.version.as_str());
        Err(RuntimeError::TooOld {
            network,
            version,
            command: command.as_str(),
        })
    }

    fn cache_path(&self, request: &Request) -> PathBuf {
        self.path_of(&Key::of(&Attachment {
            container_id: request.container_id.clone(),
            ifname: request.ifname.clone(),
        }))
    }

    fn path_of(&self, key: &Key) -> PathBuf {
        self.cache_dir.join(format!("{}-{}", self.list.name, key.0))
    }

    fn cached(&self, request: &Request) -> Option<Value> {
        serde_json::from_slice(&fs::read(self.cache_path(request)).ok()?).ok()
    }

    fn remember(&self, request: &Request, result: &Value) -> Result<(), RuntimeError> {
        let path = self.cache_path(request);
        let fail = |doing| {
            let path = path.clone();
            move |source| RuntimeError::Io { doing, path, source }
        };
        fs::create_dir_all(&self.cache_dir).map_err(fail("making the directory of"))?;
        let temporary = path.with_extension("new");
        fs::write(&temporary, result.to_string()).map_err(fail("writing"))?;
        fs::rename(&temporary, &path).map_err(fail("replacing"))
    }

    /// Runs one plug-in; its document, if it printed one.
    fn exec(
        &self,
        plugin: &Map<String, Value>,
        command: Command,
        request: Option<&Request>,
        previous: Option<&Value>,
        valid: Option<&[Attachment]>,
    ) -> Result<Option<Value>, RuntimeError> {
        let name = kind(plugin).to_owned();
        let path = self
            .plugin_dirs
            .iter()
            .map(|d| d.join(&name))
            .find(|p| p.is_file())
            .ok_or_else(|| RuntimeError::NoPlugin { name: name.clone() })?;
        let stdin = self.configuration(plugin, request, previous, valid).to_string();
        let cni_path = std::env::join_paths(&self.plugin_dirs).unwrap_or_default();
        let mut process = Process::new(&path);
        process
            .env("CNI_COMMAND", command.as_str())
            .env("CNI_PATH", cni_path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        if let Some(request) = request {
            let args: Vec<String> = request.args.iter().map(|(k, v)| format!("{k}={v}")).collect();
            process
                .env("CNI_CONTAINERID", &request.container_id)
                .env("CNI_IFNAME", &request.ifname)
                .env("CNI_NETNS", request.netns.as_deref().unwrap_or(Path::new("")))
                .env("CNI_ARGS", args.join(";"));
        }
        let fail = |source| RuntimeError::Io {
            doing: "running",
            path: path.clone(),
            source,
        };
        let mut child = process.spawn().map_err(fail)?;
        if let Some(mut pipe) = child.stdin.take() {
            // A plug-in that does not read is judged by its answer.
            let _ = pipe.write_all(stdin.as_bytes());
        }
        let mut out = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(OUTPUT_BYTES_MAX).read_to_end(&mut out).map_err(fail)?;
        }
        let status = child.wait().map_err(fail)?;
        if !status.success() {
            let doc: Value = serde_json::from_slice(&out).unwrap_or_default();
            let text = |key: &str| doc.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let msg = if text("msg").is_empty() {
                format!("ended with {status}")
            } else {
                text("msg")
            };
            let code = doc
                .get("code")
                .and_then(Value::as_u64)
                .and_then(|c| u32::try_from(c).ok())
                .unwrap_or(999);
            return Err(RuntimeError::Refused {
                name,
                command: command.as_str(),
                code,
                msg,
                details: text("details"),
            });
        }
        if out.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        serde_json::from_slice(&out)
            .map(Some)
            .map_err(|source| RuntimeError::Output { name, source })
    }

    fn configuration(
        &self,
        plugin: &Map<String, Value>,
        request: Option<&Request>,
        previous: Option<&Value>,
        valid: Option<&[Attachment]>,
    ) -> Value {
        let mut conf = plugin.clone();
        let declared = conf.remove("capabilities");
        conf.insert("cniVersion".into(), json!(self.list.version.as_str()));
        conf.insert("name".into(), json!(self.list.name));
        if let Some(request) = request {
            let wanted =
                |name: &String| declared.as_ref().and_then(|d| d.get(name)).and_then(Value::as_bool) == Some(true);
            let given: Map<String, Value> = request
                .capabilities
                .iter()
                .filter(|(k, _)| wanted(k))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect();
            if !given.is_empty() {
                conf.insert("runtimeConfig".into(), Value::Object(given));
            }
        }
        if let Some(previous) = previous {
            conf.insert("prevResult".into(), previous.clone());
        }
        if let Some(valid) = valid {
            let list: Vec<Value> = valid
                .iter()
                .map(|a| json!({ "containerID": a.container_id, "ifname": a.ifname }))
                .collect();
            conf.insert("cni.dev/valid-attachments".into(), Value::Array(list));
        }
        Value::Object(conf)
    }
}

fn kind(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A plug-in that logs its command and stdin, and prints `answer` or fails.
    fn plugin(dir: &Path, name: &str, script: &str) {
        let path = dir.join(name);
        let log = dir.join("log");
        fs::write(
            &path,
            format!(
                "#!/bin/sh\nin=$(cat)\necho \"{name} $CNI_COMMAND $CNI_CONTAINERID $CNI_ARGS $in\" >> {}\n{script}\n",
                log.display()
            ),
        )
        .unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn a_list_runs_in_order_and_backwards() {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        plugin(
            d,
            "one",
            r#"[ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.4/32"}]}'; exit 0"#,
        );
        plugin(
            d,
            "two",
            r#"[ $CNI_COMMAND = ADD ] || exit 0
            case "$CNI_CONTAINERID" in bad) echo '{"code":11,"msg":"later"}'; exit 1;; esac
            echo '{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.5/32"}]}'"#,
        );
        let list = NetworkList::parse(
            br#"{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"one"},{"type":"two","capabilities":{"portMappings":true}}]}"#,
        )
        .unwrap();
        let runtime = Runtime {
            list,
            plugin_dirs: vec![d.to_owned()],
            cache_dir: d.join("cache"),
        };
        let mut request = Request {
            container_id: "c".into(),
            ifname: "eth0".into(),
            netns: Some("/n".into()),
            args: vec![("K8S_POD_NAME".into(), "p".into())],
            capabilities: [
                ("portMappings".to_owned(), json!([{"hostPort": 80}])),
                ("dns".to_owned(), json!({})),
            ]
            .into_iter()
            .collect(),
        };
        let take = || {
            let log = fs::read_to_string(d.join("log")).unwrap_or_default();
            let _ = fs::remove_file(d.join("log"));
            log.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(runtime.add(&request).unwrap().ips[0].address.to_string(), "10.0.0.5/32");
        let log = take();
        assert!(
            log[0].starts_with("one ADD c K8S_POD_NAME=p")
                && !log[0].contains("prevResult")
                && !log[0].contains("hostPort")
        );
        assert!(log[1].starts_with("two ADD c") && log[1].contains("10.0.0.4/32") && log[1].contains("hostPort"));
        assert!(!log[1].contains("capabilities") && !log[1].contains("\"dns\""));
        runtime.check(&request).unwrap();
        assert!(take()[0].contains("10.0.0.5/32"), "the last result is handed back");
        runtime.del(&request).unwrap();
        let log = take();
        assert!(log[0].starts_with("two DEL") && log[1].starts_with("one DEL") && log[1].contains("10.0.0.5/32"));
        runtime.del(&request).unwrap();
        assert!(!take()[0].contains("prevResult"));

        request.container_id = "bad".into();
        let error = runtime.add(&request).unwrap_err();
        assert!(
            matches!(&error, RuntimeError::Refused { code: 11, name, .. } if name == "two"),
            "{error}"
        );
        let verbs: Vec<String> = take()
            .iter()
            .map(|l| l.split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(verbs, ["one ADD", "two ADD", "two DEL", "one DEL"]);

        request.container_id = "c".into();
        runtime.add(&request).unwrap();
        take();
        runtime.gc(&[]).unwrap();
        assert!(take()[0].contains("\"cni.dev/valid-attachments\":[]"));
        assert_eq!(fs::read_dir(d.join("cache")).unwrap().count(), 0);
    }

    #[test]
    fn bad_lists_are_refused_with_the_reason() {
        for (raw, word) in [
            (r#"{}"#, "cniVersion"),
            (r#"{"cniVersion":"0.1.0","name":"n","plugins":[]}"#, "cniVersion"),
            (r#"{"cniVersion":"1.0.0","name":"../n","plugins":[]}"#, "name"),
            (r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#, "no plug-ins"),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"../sh"}]}"#,
                "type",
            ),
        ] {
            let e = NetworkList::parse(raw.as_bytes()).unwrap_err();
            assert!(e.contains(word), "{raw}: {e}");
        }
    }
}

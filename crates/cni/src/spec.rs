//! The protocol between a container runtime and a plug-in: versions, commands, environment, error documents.
//!
//! # Source
//! CNI SPEC.md 1.1.0, sections "Parameters" and "Error"; codes above 8 that the text does not list are those of the
//! reference library.

use std::{error::Error as StdError, ffi::OsString, fmt, path::PathBuf};

use serde_json::{Value, json};
use thiserror::Error;

/// The versions this plug-in speaks, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub const ALL: [Self; 5] = [Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// `None` for a version that is not served; an omitted version means 0.1.0 in the specification and is not served.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.as_str() == text)
    }
}

/// What the runtime asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Command {
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "ADD" => Self::Add,
            "DEL" => Self::Del,
            "CHECK" => Self::Check,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            "VERSION" => Self::Version,
            _ => return None,
        })
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    /// The first version that knows the command.
    pub fn since(self) -> Version {
        match self {
            Self::Add | Self::Del | Self::Version => Version::V0_3_0,
            Self::Check => Version::V0_4_0,
            Self::Gc | Self::Status => Version::V1_1_0,
        }
    }
}

/// Error codes of the specification, and ours from 100.
pub mod code {
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    pub const ENVIRONMENT: u32 = 4;
    pub const IO: u32 = 5;
    pub const DECODE: u32 = 6;
    pub const CONFIG: u32 = 7;
    pub const NETNS: u32 = 8;
    pub const TRY_AGAIN: u32 = 11;
    pub const UNAVAILABLE: u32 = 50;
    /// The kernel refused a step of an attachment.
    pub const KERNEL: u32 = 100;
    /// CHECK found the kernel different from the result.
    pub const CHECK_FAILED: u32 = 101;
    /// Several steps of a teardown failed; `details` holds each.
    pub const TEARDOWN: u32 = 102;
    /// A bug in the plug-in.
    pub const INTERNAL: u32 = 999;
}

/// The one error document a failed invocation prints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub code: u32,
    pub msg: String,
    /// Further causes, outermost first; may be empty.
    pub details: String,
}

impl Failure {
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: String::new(),
        }
    }

    /// Message from the error, details from its chain of sources.
    pub fn from_error(code: u32, error: &(dyn StdError + 'static)) -> Self {
        let mut details = Vec::new();
        let mut next = error.source();
        while let Some(e) = next {
            details.push(e.to_string());
            next = e.source();
        }
        Self {
            code,
            msg: error.to_string(),
            details: details.join(": "),
        }
    }

    /// The document; `version` is what the configuration asked for, if it could be read.
    pub fn document(&self, version: &str) -> Value {
        let mut doc = json!({ "cniVersion": version, "code": self.code, "msg": self.msg });
        if !self.details.is_empty() {
            doc["details"] = Value::from(self.details.clone());
        }
        doc
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.msg, self.code)?;
        if self.details.is_empty() {
            Ok(())
        } else {
            write!(f, ": {}", self.details)
        }
    }
}

impl StdError for Failure {}

/// What is wrong with the environment; always code 4.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum EnvError {
    #[error("required environment variables missing: {names}")]
    Missing { names: String },
    #[error("CNI_COMMAND {value:?} is none of ADD, DEL, CHECK, GC, STATUS, VERSION")]
    Command { value: String },
    #[error("{name} is not valid UTF-8")]
    Encoding { name: &'static str },
    #[error(
        "CNI_CONTAINERID {value:?} must start with a letter or digit and hold only letters, digits, '_', '.' and '-'"
    )]
    ContainerId { value: String },
    #[error(
        "CNI_IFNAME {value:?} is no interface name: 1 to 15 bytes, not '.' or '..', without '/', ':' and white space"
    )]
    IfName { value: String },
}

/// An attachment: everything the plug-in keeps is found by it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attachment {
    pub container_id: String,
    pub ifname: String,
}

/// The parsed environment of one invocation.
#[derive(Clone, Debug)]
pub struct Invocation {
    pub command: Command,
    /// Absent for GC, STATUS and VERSION.
    pub attachment: Option<Attachment>,
    /// Always present for ADD and CHECK; optional for DEL.
    pub netns: Option<PathBuf>,
    /// Directories to look for delegated plug-ins in.
    pub path: Vec<PathBuf>,
    /// `CNI_ARGS` as given, for delegates.
    pub args: String,
}

impl Invocation {
    /// Reads and checks the variables through `var` (a process passes `std::env::var_os`).
    pub fn from_env(var: impl Fn(&str) -> Option<OsString>) -> Result<Self, EnvError> {
        let text = |name: &'static str| -> Result<String, EnvError> {
            match var(name) {
                None => Ok(String::new()),
                Some(v) => v.into_string().map_err(|_| EnvError::Encoding { name }),
            }
        };
        let command = text("CNI_COMMAND")?;
        if command.is_empty() {
            return Err(EnvError::Missing {
                names: "CNI_COMMAND".into(),
            });
        }
        let command = Command::parse(&command).ok_or(EnvError::Command { value: command })?;
        let id = text("CNI_CONTAINERID")?;
        let ifname = text("CNI_IFNAME")?;
        let netns = var("CNI_NETNS").filter(|v| !v.is_empty()).map(PathBuf::from);
        let path = var("CNI_PATH").filter(|v| !v.is_empty());
        let needs_attachment = matches!(command, Command::Add | Command::Del | Command::Check);
        let needs_netns = matches!(command, Command::Add | Command::Check);
        let mut missing = Vec::new();
        if needs_attachment && id.is_empty() {
            missing.push("CNI_CONTAINERID");
        }
        if needs_attachment && ifname.is_empty() {
            missing.push("CNI_IFNAME");
        }
        if needs_netns && netns.is_none() {
            missing.push("CNI_NETNS");
        }
        if command != Command::Version && path.is_none() {
            missing.push("CNI_PATH");
        }
        if !missing.is_empty() {
            return Err(EnvError::Missing {
                names: missing.join(", "),
            });
        }
        let attachment = if needs_attachment {
            if !is_identifier(&id) {
                return Err(EnvError::ContainerId { value: id });
            }
            if !is_ifname(&ifname) {
                return Err(EnvError::IfName { value: ifname });
            }
            Some(Attachment {
                container_id: id,
                ifname,
            })
        } else {
            None
        };
        let path = path.map(|p| std::env::split_paths(&p).collect()).unwrap_or_default();
        Ok(Self {
            command,
            attachment,
            netns,
            path,
            args: text("CNI_ARGS")?,
        })
    }
}

/// Whether `text` is legal as a network name or container id.
pub fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// Whether the kernel takes `text` as a link name.
pub fn is_ifname(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && text != "."
        && text != ".."
        && !text
            .bytes()
            .any(|b| b == b'/' || b == b':' || b.is_ascii_whitespace() || b.is_ascii_control())
}

/// The answer to VERSION.
pub fn version_document() -> Value {
    let all: Vec<&str> = Version::ALL.iter().map(|v| v.as_str()).collect();
    json!({ "cniVersion": Version::V1_1_0.as_str(), "supportedVersions": all })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Result<Invocation, EnvError> {
        Invocation::from_env(|name| pairs.iter().find(|(k, _)| *k == name).map(|(_, v)| OsString::from(v)))
    }

    #[test]
    fn names_every_missing_variable() {
        let e = env(&[("CNI_COMMAND", "ADD")]).unwrap_err();
        assert_eq!(
            e.to_string(),
            "required environment variables missing: CNI_CONTAINERID, CNI_IFNAME, CNI_NETNS, CNI_PATH"
        );
        let e = env(&[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0")]).unwrap_err();
        assert_eq!(e.to_string(), "required environment variables missing: CNI_PATH");
        assert!(env(&[("CNI_COMMAND", "VERSION")]).is_ok());
        assert_eq!(
            env(&[]).unwrap_err().to_string(),
            "required environment variables missing: CNI_COMMAND"
        );
    }

    #[test]
    fn refuses_hostile_names() {
        let with = |id: &str, ifname: &str| {
            env(&[
                ("CNI_COMMAND", "DEL"),
                ("CNI_CONTAINERID", id),
                ("CNI_IFNAME", ifname),
                ("CNI_PATH", "/x"),
            ])
        };
        for id in ["../etc", "a b", "-a", "a\n"] {
            assert!(matches!(with(id, "eth0"), Err(EnvError::ContainerId { .. })), "{id}");
        }
        for name in ["..", "a/b", "sixteen-bytes-xx", "a b", "a:b"] {
            assert!(matches!(with("a", name), Err(EnvError::IfName { .. })), "{name}");
        }
        assert!(with(&"a".repeat(500), "eth0").is_ok());
        assert!(matches!(env(&[("CNI_COMMAND", "GET")]), Err(EnvError::Command { .. })));
    }
}

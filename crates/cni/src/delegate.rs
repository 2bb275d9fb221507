//! Other IPAM plug-ins (`host-local`, `static`, ...): run as the specification says, found in `CNI_PATH`.

use std::{
    io::{self, Read, Write},
    path::PathBuf,
    process::{Command as Process, Stdio},
};

use serde::Deserialize;
use thiserror::Error;

use crate::{
    conf::NetConf,
    result::CniResult,
    spec::{Command, Failure, Invocation, code},
};

const OUTPUT_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, Error)]
pub enum DelegateError {
    #[error("IPAM plug-in {name} is not in any directory of CNI_PATH")]
    NotFound { name: String },
    #[error("running IPAM plug-in {path}")]
    Run {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("IPAM plug-in {name} printed something that is no result")]
    Output {
        name: String,
        #[source]
        source: serde_json::Error,
    },
    /// The plug-in's own error, passed on with its code.
    #[error("IPAM plug-in {name}: {msg}")]
    Refused {
        name: String,
        code: u32,
        msg: String,
        details: String,
    },
}

impl DelegateError {
    pub fn failure(&self) -> Failure {
        match self {
            Self::NotFound { .. } => Failure::from_error(code::CONFIG, self),
            Self::Run { .. } | Self::Output { .. } => Failure::from_error(code::IO, self),
            Self::Refused { code, details, .. } => Failure {
                code: *code,
                msg: self.to_string(),
                details: details.clone(),
            },
        }
    }
}

/// Runs the configured IPAM plug-in with the same configuration and environment; its result for ADD, nothing otherwise.
pub fn run(conf: &NetConf, invocation: &Invocation) -> Result<Option<CniResult>, DelegateError> {
    let name = conf.ipam.kind.clone();
    let path = invocation
        .path
        .iter()
        .map(|dir| dir.join(&name))
        .find(|p| p.is_file())
        .ok_or_else(|| DelegateError::NotFound { name: name.clone() })?;
    let fail = |source| DelegateError::Run {
        path: path.clone(),
        source,
    };
    let mut child = Process::new(&path)
        .env("CNI_COMMAND", invocation.command.as_str())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(fail)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A plug-in that ends without reading is judged by its answer, not by this pipe.
        match stdin.write_all(&conf.raw) {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(fail(e));
            }
            _ => {}
        }
    }
    let mut out = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(OUTPUT_BYTES_MAX).read_to_end(&mut out).map_err(fail)?;
    }
    let status = child.wait().map_err(fail)?;
    if !status.success() {
        #[derive(Deserialize)]
        struct Document {
            code: u32,
            msg: String,
            #[serde(default)]
            details: String,
        }
        let doc = serde_json::from_slice(&out).unwrap_or_else(|_| Document {
            code: code::INTERNAL,
            msg: format!("ended with {status} and no error document"),
            details: String::new(),
        });
        return Err(DelegateError::Refused {
            name,
            code: doc.code,
            msg: doc.msg,
            details: doc.details,
        });
    }
    if invocation.command != Command::Add {
        return Ok(None);
    }
    serde_json::from_slice(&out)
        .map(Some)
        .map_err(|source| DelegateError::Output { name, source })
}

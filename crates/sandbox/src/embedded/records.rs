//! What the engine remembers: one JSON file per sandbox and container, replaced atomically.
//!
//! Not synced to disk: after a power failure nothing it describes runs any more.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::api::{ContainerConfig, ContainerState, ContainerStatus, SandboxConfig, SandboxState, SandboxStatus};

#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub enum SandboxPhase {
    /// Being made: what exists of it is removed if the engine dies now.
    Creating,
    Ready,
    Stopped,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct SandboxRecord {
    pub id: String,
    pub config: SandboxConfig,
    pub phase: SandboxPhase,
    pub created_at: SystemTime,
    pub ips: Vec<IpAddr>,
}

impl SandboxRecord {
    pub fn status(&self) -> SandboxStatus {
        SandboxStatus {
            id: self.id.clone(),
            pod: self.config.pod.clone(),
            state: if self.phase == SandboxPhase::Ready {
                SandboxState::Ready
            } else {
                SandboxState::NotReady
            },
            created_at: self.created_at,
            ips: self.ips.clone(),
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
        }
    }
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub enum ContainerPhase {
    Creating,
    Created,
    /// The helper is at work: the supervisor knows whether it came to something.
    Starting,
    Running,
    Exited,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ContainerRecord {
    pub id: String,
    pub sandbox_id: String,
    pub pod_uid: String,
    pub config: ContainerConfig,
    pub phase: ContainerPhase,
    /// Digest reference, or the id of an image that has none.
    pub image_ref: String,
    /// Directories of the image's layers: not to be collected while this container exists.
    pub layers: Vec<PathBuf>,
    pub stop_signal: i32,
    pub log_path: PathBuf,
    pub created_at: SystemTime,
    pub started_at: Option<SystemTime>,
    pub finished_at: Option<SystemTime>,
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
}

impl ContainerRecord {
    pub fn status(&self) -> ContainerStatus {
        ContainerStatus {
            id: self.id.clone(),
            sandbox_id: self.sandbox_id.clone(),
            name: self.config.name.clone(),
            attempt: self.config.attempt,
            state: match self.phase {
                ContainerPhase::Creating | ContainerPhase::Created | ContainerPhase::Starting => {
                    ContainerState::Created
                }
                ContainerPhase::Running => ContainerState::Running,
                ContainerPhase::Exited => ContainerState::Exited,
            },
            created_at: self.created_at,
            started_at: self.started_at,
            finished_at: self.finished_at,
            exit_code: self.exit_code,
            reason: self.reason.clone(),
            message: self.message.clone(),
            image: self.config.image.clone(),
            image_ref: self.image_ref.clone(),
            log_path: self.log_path.clone(),
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
        }
    }
}

pub fn save<T: Serialize>(path: &Path, record: &T) -> io::Result<()> {
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, serde_json::to_vec(record)?)?;
    std::fs::rename(fresh, path)
}

/// The records `<dir>/<id>/<name>`; directories without a readable one are returned apart, to be cleaned up.
pub fn load<T: DeserializeOwned>(dir: &Path, name: &str) -> io::Result<(Vec<T>, Vec<String>)> {
    let (mut found, mut broken) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let parsed = std::fs::read(entry.path().join(name))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        match parsed {
            Some(record) => found.push(record),
            None => broken.push(entry.file_name().to_string_lossy().into_owned()),
        }
    }
    Ok((found, broken))
}

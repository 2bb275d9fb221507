//! Volumes on the node's disk: `<root>/pods/<uid>/volumes/<name>`. Set-up is idempotent, so a restarted agent and the
//! periodic refresh run the same code; it changes content only where it differs.

pub mod atomic;
pub mod content;

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use apimachinery::quantity::Quantity;
use k8s_openapi::{
    api::core::v1::{EmptyDirVolumeSource, HostPathVolumeSource, Volume, VolumeMount},
    jiff::Timestamp,
};
use rustix::{
    fs::{Gid, chown},
    mount::{MountFlags, UnmountFlags, mount, unmount},
};
use thiserror::Error;

use self::content::{ContentError, Sources};
use crate::{fields::FieldContext, pod::view::PodView};

#[derive(Debug, Error)]
pub enum VolumeError {
    #[error("MountVolume.SetUp failed for volume \"{volume}\"")]
    Content {
        volume: String,
        #[source]
        source: ContentError,
    },
    #[error("MountVolume.SetUp failed for volume \"{volume}\": {doing}")]
    Io {
        volume: String,
        doing: String,
        #[source]
        source: io::Error,
    },
    #[error("hostPath type check failed: {path} is not a {wanted}")]
    HostPath { path: String, wanted: String },
    #[error("volume {name} is not in the pod")]
    Unknown { name: String },
    #[error("subPath {path} leaves its volume")]
    SubPath { path: String },
}

/// The volumes of all pods of one node.
pub struct Volumes {
    root: PathBuf,
    sources: Arc<Sources>,
}

impl Volumes {
    pub fn new(root: PathBuf, sources: Arc<Sources>) -> Self {
        Self { root, sources }
    }

    pub fn pod_dir(&self, uid: &str) -> PathBuf {
        self.root.join("pods").join(uid)
    }

    fn dir(&self, uid: &str, volume: &str) -> PathBuf {
        self.pod_dir(uid).join("volumes").join(volume)
    }

    /// Uids of pods that have a directory.
    pub fn known(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.join("pods")).into_iter().flatten().flatten();
        entries.filter_map(|e| e.file_name().into_string().ok()).collect()
    }

    /// Makes every volume of the pod, or brings its content up to date. `first` = the pod starts: objects are read anew.
    ///
    /// # Errors
    /// The first volume that cannot be made; earlier ones stay.
    pub async fn set_up(&self, ctx: &FieldContext<'_>, first: bool, now: Timestamp) -> Result<(), VolumeError> {
        let group = ctx
            .view
            .spec()
            .security_context
            .as_ref()
            .and_then(|s| s.fs_group)
            .and_then(|g| u32::try_from(g).ok());
        for volume in ctx.view.spec().volumes.iter().flatten() {
            let dir = self.dir(&ctx.view.uid, &volume.name);
            let io = |doing: &str| {
                let (volume, doing) = (volume.name.clone(), doing.to_owned());
                move |source| VolumeError::Io { volume, doing, source }
            };
            if let Some(h) = &volume.host_path {
                if first {
                    host_path(volume, h)?;
                }
                continue;
            }
            let content = content::payload(&self.sources, ctx, volume, first, now)
                .await
                .map_err(|source| VolumeError::Content {
                    volume: volume.name.clone(),
                    source,
                })?;
            match content {
                // A few small files: cheaper here than on another thread.
                Some(payload) => drop(atomic::write(&dir, &payload, group).map_err(io("writing its files"))?),
                None if first => {
                    let source = volume.empty_dir.clone().unwrap_or_default();
                    empty_dir(&dir, &source, group).map_err(io("making the directory"))?;
                }
                None => {}
            }
        }
        Ok(())
    }

    /// The node's path for a mount of a container; makes what an empty subPath needs.
    ///
    /// # Errors
    /// An unknown volume, or a subPath that leads out of it.
    pub fn mount_source(
        &self,
        view: &PodView,
        m: &VolumeMount,
        sub_path: Option<&str>,
    ) -> Result<PathBuf, VolumeError> {
        let unknown = || VolumeError::Unknown { name: m.name.clone() };
        let volume = view
            .spec()
            .volumes
            .iter()
            .flatten()
            .find(|v| v.name == m.name)
            .ok_or_else(unknown)?;
        let base = match &volume.host_path {
            Some(h) => PathBuf::from(&h.path),
            None => self.dir(&view.uid, &m.name),
        };
        let Some(sub) = sub_path.filter(|s| !s.is_empty()) else {
            return Ok(base);
        };
        let leaves = || VolumeError::SubPath { path: sub.to_owned() };
        let io = |source| VolumeError::Io {
            volume: m.name.clone(),
            doing: format!("resolving subPath {sub}"),
            source,
        };
        if Path::new(sub)
            .components()
            .any(|c| !matches!(c, Component::Normal(_) | Component::CurDir))
        {
            return Err(leaves());
        }
        let base = fs::canonicalize(&base).map_err(io)?;
        let target = base.join(sub);
        if fs::symlink_metadata(&target).is_err() {
            // Symlinks on the way are resolved before anything is made below them.
            let mut at = base.clone();
            for part in Path::new(sub).components() {
                at = at.join(part);
                match fs::canonicalize(&at) {
                    Ok(real) if real.starts_with(&base) => at = real,
                    Ok(_) => return Err(leaves()),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {
                        fs::create_dir(&at).map_err(io)?;
                        fs::set_permissions(&at, fs::Permissions::from_mode(0o777)).map_err(io)?;
                    }
                    Err(e) => return Err(io(e)),
                }
            }
        }
        let real = fs::canonicalize(&target).map_err(io)?;
        if real.starts_with(&base) {
            Ok(real)
        } else {
            Err(leaves())
        }
    }

    /// Removes everything of a pod from the disk. Idempotent.
    ///
    /// # Errors
    /// What could not be unmounted or removed.
    pub fn clean(&self, uid: &str) -> io::Result<()> {
        self.sources.forget(uid);
        let pod = self.pod_dir(uid);
        for entry in fs::read_dir(pod.join("volumes")).into_iter().flatten().flatten() {
            // Only tmpfs volumes are mount points; the others answer EINVAL.
            while unmount(entry.path(), UnmountFlags::DETACH).is_ok() {}
        }
        match fs::remove_dir_all(&pod) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

fn empty_dir(dir: &Path, source: &EmptyDirVolumeSource, group: Option<u32>) -> io::Result<()> {
    if dir.exists() {
        return Ok(());
    }
    fs::create_dir_all(dir)?;
    if source.medium.as_deref() == Some("Memory") {
        let size = source
            .size_limit
            .as_ref()
            .and_then(|q| Quantity::parse(&q.0).ok())
            .map(|q| q.bytes())
            .filter(|b| *b > 0);
        let data = size.map_or_else(|| "mode=0777".to_owned(), |b| format!("mode=0777,size={b}"));
        let data = std::ffi::CString::new(data).map_err(io::Error::other)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        if let Err(e) = mount("tmpfs", dir, "tmpfs", flags, Some(data.as_c_str())) {
            let _ = fs::remove_dir(dir);
            return Err(e.into());
        }
    }
    let mode = match group {
        Some(gid) => {
            chown(dir, None, Some(Gid::from_raw(gid)))?;
            0o2777
        }
        None => 0o777,
    };
    fs::set_permissions(dir, fs::Permissions::from_mode(mode))
}

fn host_path(volume: &Volume, h: &HostPathVolumeSource) -> Result<(), VolumeError> {
    let path = Path::new(&h.path);
    let io = |source| VolumeError::Io {
        volume: volume.name.clone(),
        doing: format!("host path {}", h.path),
        source,
    };
    let kind = h.type_.as_deref().unwrap_or_default();
    match kind {
        "DirectoryOrCreate" if !path.exists() => return fs::create_dir_all(path).map_err(io),
        "FileOrCreate" if !path.exists() => return fs::File::create(path).map(drop).map_err(io),
        _ => {}
    }
    let wrong = || {
        Err(VolumeError::HostPath {
            path: h.path.clone(),
            wanted: kind.to_owned(),
        })
    };
    if kind.is_empty() {
        // No check is asked for, but a bind mount needs something: upstream's runtimes make a directory.
        return if path.exists() {
            Ok(())
        } else {
            fs::create_dir_all(path).map_err(io)
        };
    }
    let Ok(meta) = fs::metadata(path) else { return wrong() };
    let t = meta.file_type();
    let fits = match kind {
        "Directory" | "DirectoryOrCreate" => t.is_dir(),
        "File" | "FileOrCreate" => t.is_file(),
        "Socket" => t.is_socket(),
        "CharDevice" => t.is_char_device(),
        "BlockDevice" => t.is_block_device(),
        _ => false,
    };
    if fits { Ok(()) } else { wrong() }
}

//! Mounts: overlay, bind, tmpfs, propagation, detached trees and changing the root. Blocking, in the caller's namespace.

mod sys;

use std::{
    ffi::CString,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use thiserror::Error;

pub use rustix::mount::MountFlags as Flags;

#[derive(Debug, Error)]
pub enum MountError {
    #[error("{doing} {path}")]
    Mount {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("overlay of {count} layers at {path} does not fit into the options of this kernel")]
    TooManyLayers { path: PathBuf, count: usize },
}

fn failed<E: Into<io::Error>>(doing: &'static str, path: &Path) -> impl FnOnce(E) -> MountError {
    let path = path.to_owned();
    move |source| MountError::Mount {
        doing,
        path,
        source: source.into(),
    }
}

/// An overlay: `layers` from the uppermost to the lowest, read-only and shared; all changes go to `upper`.
#[derive(Clone, Debug)]
pub struct Overlay<'a> {
    pub layers: &'a [PathBuf],
    /// Must not lie on an overlay itself. `upper` and `work` on one file system; `None` makes a read-only mount.
    pub upper: Option<(&'a Path, &'a Path)>,
}

impl Overlay<'_> {
    /// Mounts at `target`, an existing directory.
    ///
    /// # Errors
    /// `TooManyLayers` on kernels older than 6.5 if the paths exceed one page.
    pub fn mount(&self, target: &Path) -> Result<(), MountError> {
        self.mount_with(target, false)
    }

    /// Like [`Overlay::mount`], for an `upper` that nobody needs after a crash and that is never mounted again: nothing is
    /// synced to its disk, neither by programs nor at the unmount (which otherwise waits for the whole disk).
    pub fn mount_volatile(&self, target: &Path) -> Result<(), MountError> {
        match self.mount_with(target, true) {
            // Kernels before 5.10 do not know it.
            Err(MountError::Mount { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => self.mount(target),
            other => other,
        }
    }

    fn mount_with(&self, target: &Path, volatile: bool) -> Result<(), MountError> {
        let tree = match self.detached(volatile) {
            Ok(tree) => tree,
            // Kernels before 6.5 do not know `lowerdir+`.
            Err(rustix::io::Errno::INVAL) => return self.mount_by_options(target, volatile),
            Err(error) => return Err(failed("mount overlay at", target)(error)),
        };
        move_here(&tree, target)
    }

    fn detached(&self, volatile: bool) -> rustix::io::Result<OwnedFd> {
        let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        if volatile {
            rustix::mount::fsconfig_set_flag(&fs, "volatile")?;
        }
        for layer in self.layers {
            rustix::mount::fsconfig_set_string(&fs, "lowerdir+", layer.as_path())?;
        }
        if let Some((upper, work)) = self.upper {
            rustix::mount::fsconfig_set_string(&fs, "upperdir", upper)?;
            rustix::mount::fsconfig_set_string(&fs, "workdir", work)?;
        }
        rustix::mount::fsconfig_create(&fs)?;
        rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    }

    fn mount_by_options(&self, target: &Path, volatile: bool) -> Result<(), MountError> {
        let mut options = b"lowerdir=".to_vec();
        for (index, layer) in self.layers.iter().enumerate() {
            if index > 0 {
                options.push(b':');
            }
            escape(layer, &mut options);
        }
        if let Some((upper, work)) = self.upper {
            options.extend_from_slice(b",upperdir=");
            escape(upper, &mut options);
            options.extend_from_slice(b",workdir=");
            escape(work, &mut options);
        }
        if volatile {
            options.extend_from_slice(b",volatile");
        }
        if options.len() >= 4095 {
            return Err(MountError::TooManyLayers {
                path: target.to_owned(),
                count: self.layers.len(),
            });
        }
        let data = CString::new(options).map_err(|error| MountError::Mount {
            doing: "mount overlay at",
            path: target.to_owned(),
            source: io::Error::new(io::ErrorKind::InvalidInput, error),
        })?;
        rustix::mount::mount("overlay", target, "overlay", MountFlags::empty(), data.as_c_str())
            .map_err(failed("mount overlay at", target))
    }
}

fn escape(path: &Path, into: &mut Vec<u8>) {
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b':' | b',' | b'\\') {
            into.push(b'\\');
        }
        into.push(*byte);
    }
}

/// Mounts a tmpfs of at most `size_bytes` (0 = the kernel's half of memory) with octal `mode`.
pub fn tmpfs(target: &Path, size_bytes: u64, mode: u32, flags: MountFlags) -> Result<(), MountError> {
    let size = if size_bytes == 0 {
        String::new()
    } else {
        format!(",size={size_bytes}")
    };
    let data = CString::new(format!("mode={mode:o}{size}")).unwrap_or_default();
    rustix::mount::mount("tmpfs", target, "tmpfs", flags, data.as_c_str()).map_err(failed("mount tmpfs at", target))
}

/// Mounts a file system of `kind` (`proc`, `sysfs`, `devpts`, `mqueue`, `cgroup`, ..) with its option string.
pub fn filesystem(kind: &str, target: &Path, flags: MountFlags, options: &str) -> Result<(), MountError> {
    let data = CString::new(options).map_err(|error| MountError::Mount {
        doing: "mount file system at",
        path: target.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidInput, error),
    })?;
    rustix::mount::mount(kind, target, kind, flags, data.as_c_str()).map_err(failed("mount file system at", target))
}

/// Changes the flags of what is mounted at `target`.
pub fn remount(target: &Path, flags: MountFlags) -> Result<(), MountError> {
    rustix::mount::mount_remount(target, flags, "").map_err(failed("remount", target))
}

/// Bind-mounts `source` (file or directory) at `target`, which must exist and be of the same sort.
pub fn bind(source: &Path, target: &Path) -> Result<(), MountError> {
    rustix::mount::mount_bind(source, target).map_err(failed("bind at", target))
}

/// Bind-mounts a directory with everything mounted below it, all of it read-only.
pub fn bind_recursive_readonly(source: &Path, target: &Path) -> Result<(), MountError> {
    rustix::mount::mount_bind_recursive(source, target).map_err(failed("bind at", target))?;
    sys::set_readonly_recursive(target).map_err(failed("make read-only", target))
}

/// Bind-mounts a directory with everything mounted below it.
pub fn bind_recursive(source: &Path, target: &Path) -> Result<(), MountError> {
    rustix::mount::mount_bind_recursive(source, target).map_err(failed("bind at", target))
}

/// How mount events travel between a mount and its copies in other namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    Private,
    /// Events come in, none go out.
    Slave,
    Shared,
}

/// Sets the propagation of `target` and everything below it.
pub fn set_propagation(target: &Path, propagation: Propagation) -> Result<(), MountError> {
    let kind = match propagation {
        Propagation::Private => MountPropagationFlags::PRIVATE,
        Propagation::Slave => MountPropagationFlags::DOWNSTREAM,
        Propagation::Shared => MountPropagationFlags::SHARED,
    };
    rustix::mount::mount_change(target, kind | MountPropagationFlags::REC)
        .map_err(failed("change propagation of", target))
}

/// A copy of the mount at `path` that is attached nowhere: pass it to another namespace, then [`move_here`].
pub fn detached_copy(path: &Path, recursive: bool) -> Result<OwnedFd, MountError> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(rustix::fs::CWD, path, flags).map_err(failed("copy the mount of", path))
}

/// Attaches a detached mount at `target` in the caller's namespace.
pub fn move_here(tree: &OwnedFd, target: &Path) -> Result<(), MountError> {
    rustix::mount::move_mount(
        tree,
        "",
        rustix::fs::CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(failed("attach mount at", target))
}

/// Unmounts `target` with everything below it, now for new look-ups, later for open files. Succeeds if nothing is mounted there.
pub fn detach(target: &Path) -> Result<(), MountError> {
    match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(failed("unmount", target)(error)),
    }
}

/// Makes `new_root` (a mount point) the root of the caller's mount namespace and drops the old one.
/// For programs of one thread: the root and working directory of other threads stay where they were.
pub fn change_root(new_root: &Path) -> Result<(), MountError> {
    rustix::process::chdir(new_root).map_err(failed("enter", new_root))?;
    // Both arguments equal: the old root is stacked over the new one and can be dropped without a directory for it.
    rustix::process::pivot_root(".", ".").map_err(failed("change root to", new_root))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("drop the old root over", new_root))?;
    rustix::process::chdir("/").map_err(failed("enter", Path::new("/")))
}

/// Whether something is mounted exactly at `path` in the caller's namespace.
pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    use rustix::fs::{AtFlags, StatxAttributes, StatxFlags};
    match rustix::fs::statx(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
        Ok(found) => Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    /// Runs in a mount namespace of a scratch thread, so that nothing reaches the host.
    fn in_own_namespace(test: impl FnOnce(&Path) + Send + 'static) {
        process::on_scratch_thread(move || {
            process::unshare_mounts().unwrap();
            set_propagation(Path::new("/"), Propagation::Slave).unwrap();
            let base = std::env::temp_dir().join(format!(
                "oaks-mount-{}-{:?}",
                std::process::id(),
                std::thread::current().id()
            ));
            std::fs::create_dir_all(&base).unwrap();
            tmpfs(&base, 1 << 20, 0o755, MountFlags::empty()).unwrap();
            test(&base);
            detach(&base).unwrap();
            std::fs::remove_dir(&base).unwrap();
        })
        .unwrap();
    }

    #[test]
    fn overlay_shows_the_uppermost_layer_and_keeps_the_lower_ones_clean() {
        in_own_namespace(|base| {
            let dir = |name: &str| {
                let path = base.join(name);
                std::fs::create_dir(&path).unwrap();
                path
            };
            let (top, low, upper, work, merged) =
                (dir("top"), dir("low:1,2"), dir("upper"), dir("work"), dir("merged"));
            std::fs::write(top.join("file"), "top").unwrap();
            std::fs::write(low.join("file"), "low").unwrap();
            std::fs::write(low.join("only"), "low").unwrap();
            let layers = [top.clone(), low.clone()];
            let overlay = Overlay {
                layers: &layers,
                upper: Some((&upper, &work)),
            };
            for way in 0..3 {
                match way {
                    0 => overlay.mount(&merged).unwrap(),
                    1 => overlay.mount_by_options(&merged, false).unwrap(),
                    _ => overlay.mount_volatile(&merged).unwrap(),
                }
                assert!(is_mount_point(&merged).unwrap());
                assert_eq!(std::fs::read_to_string(merged.join("file")).unwrap(), "top");
                assert_eq!(std::fs::read_to_string(merged.join("only")).unwrap(), "low");
                std::fs::write(merged.join("new"), "x").unwrap();
                assert!(upper.join("new").exists() && !top.join("new").exists());
                detach(&merged).unwrap();
                detach(&merged).unwrap();
                assert!(!is_mount_point(&merged).unwrap());
            }
        });
    }

    #[test]
    fn recursive_read_only_binds_cover_what_is_mounted_below() {
        in_own_namespace(|base| {
            std::fs::create_dir_all(base.join("src/below")).unwrap();
            std::fs::create_dir(base.join("dst")).unwrap();
            tmpfs(&base.join("src/below"), 4096, 0o755, MountFlags::empty()).unwrap();
            bind_recursive_readonly(&base.join("src"), &base.join("dst")).unwrap();
            for place in ["dst/a", "dst/below/a"] {
                let error = std::fs::write(base.join(place), "x").unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{place}");
            }
            std::fs::write(base.join("src/below/a"), "x").unwrap();
            let copy = detached_copy(&base.join("src"), true).unwrap();
            std::fs::create_dir(base.join("copy")).unwrap();
            move_here(&copy, &base.join("copy")).unwrap();
            assert!(base.join("copy/below/a").exists());
        });
    }
}

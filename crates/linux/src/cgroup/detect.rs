//! Finding the mounted hierarchies and the caller's own place in them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{CgroupError, Group, Version, read};

/// Controllers of version 1 a group is made in, if mounted. The last is no controller but is where service managers look.
const V1_CONTROLLERS: [&str; 7] = ["cpu", "cpuacct", "cpuset", "memory", "pids", "devices", "freezer"];
/// Without these a hierarchy is of no use for containers.
const REQUIRED: [&str; 3] = ["cpu", "memory", "pids"];
/// Processes that stand in the caller's own version 2 group move here, because a group with both processes and
/// controllers for its children is refused by the kernel.
pub(super) const LEAF: &str = "oaks-self";

/// The hierarchies of this host as the calling process sees them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    version: Version,
    /// Version 1: controller to the caller's own directory. Version 2: one entry, key `""`.
    own: BTreeMap<String, PathBuf>,
}

impl Hierarchy {
    /// Reads `/proc/self/mountinfo` and `/proc/self/cgroup`.
    ///
    /// # Errors
    /// `NoHierarchy` if neither version offers cpu, memory and pids.
    pub fn detect() -> Result<Self, CgroupError> {
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        let own = read(Path::new("/proc/self/cgroup"))?;
        let found = Self::from_tables(&mounts, &own, &|dir| {
            std::fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default()
        })?;
        Ok(found)
    }

    /// The pure part of [`Hierarchy::detect`].
    pub(super) fn from_tables(
        mounts: &str,
        own: &str,
        v2_controllers: &dyn Fn(&Path) -> String,
    ) -> Result<Self, CgroupError> {
        let memberships: Vec<(Vec<&str>, &str)> = own
            .lines()
            .filter_map(|line| {
                let mut parts = line.splitn(3, ':');
                let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
                Some((controllers.split(',').collect(), path))
            })
            .collect();
        let path_of = |controller: &str| {
            memberships
                .iter()
                .find(|(names, _)| names.contains(&controller))
                .map(|(_, path)| *path)
        };
        let mut v1 = BTreeMap::new();
        let mut v2 = None;
        for line in mounts.lines() {
            let Some(mount) = parse_mount(line) else { continue };
            if mount.kind == "cgroup2" {
                if let Some(path) = path_of("") {
                    v2.get_or_insert_with(|| join(&mount, path));
                }
            } else if mount.kind == "cgroup" {
                for controller in mount.options.split(',').filter(|name| V1_CONTROLLERS.contains(name)) {
                    if let Some(path) = path_of(controller) {
                        v1.entry(controller.to_owned()).or_insert_with(|| join(&mount, path));
                    }
                }
            }
        }
        if let Some(mut dir) = v2 {
            if dir.file_name().is_some_and(|name| name == LEAF) {
                dir.pop();
            }
            let controllers = v2_controllers(&dir);
            if REQUIRED
                .iter()
                .all(|want| controllers.split_whitespace().any(|have| have == *want))
            {
                let own = BTreeMap::from([(String::new(), dir)]);
                return Ok(Self {
                    inner: Arc::new(Inner {
                        version: Version::V2,
                        own,
                    }),
                });
            }
        }
        if REQUIRED.iter().all(|want| v1.contains_key(*want)) {
            return Ok(Self {
                inner: Arc::new(Inner {
                    version: Version::V1,
                    own: v1,
                }),
            });
        }
        Err(CgroupError::NoHierarchy)
    }

    pub fn version(&self) -> Version {
        self.inner.version
    }

    /// A group at `path`, relative to the caller's own groups. It is not created.
    pub fn group(&self, path: impl AsRef<Path>) -> Result<Group, CgroupError> {
        Group::new(self.clone(), path.as_ref())
    }

    /// The caller's own directory for a controller; version 2 ignores the name.
    pub(super) fn own(&self, controller: &str) -> Option<&Path> {
        let key = if self.inner.version == Version::V2 {
            ""
        } else {
            controller
        };
        self.inner.own.get(key).map(PathBuf::as_path)
    }

    pub(super) fn directory(&self, controller: &str, path: &Path) -> Option<PathBuf> {
        self.own(controller).map(|own| own.join(path))
    }

    pub(super) fn directories(&self, path: &Path) -> Vec<PathBuf> {
        self.inner.own.values().map(|own| own.join(path)).collect()
    }

    /// The directory whose process list is read for killing.
    pub(super) fn kill_directory(&self, path: &Path) -> Option<PathBuf> {
        self.directory("pids", path)
    }
}

struct MountLine<'a> {
    root: &'a str,
    point: String,
    kind: &'a str,
    options: &'a str,
}

/// `36 35 98:0 /root /point opts... - type source superopts` (proc_pid_mountinfo(5)).
fn parse_mount(line: &str) -> Option<MountLine<'_>> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (root, point) = (left.next()?, left.next()?);
    let mut right = right.split(' ');
    let (kind, _, options) = (right.next()?, right.next()?, right.next()?);
    Some(MountLine {
        root,
        point: point.replace("\\040", " "),
        kind,
        options,
    })
}

fn join(mount: &MountLine<'_>, path: &str) -> PathBuf {
    let rest = match mount.root {
        "/" => path,
        root => path.strip_prefix(root).unwrap_or("/"),
    };
    let rest = rest.trim_start_matches('/');
    // A group outside the visible root (`/../..`) cannot be reached: stay at the mount.
    if rest.is_empty() || rest.starts_with("..") {
        PathBuf::from(&mount.point)
    } else {
        Path::new(&mount.point).join(rest)
    }
}

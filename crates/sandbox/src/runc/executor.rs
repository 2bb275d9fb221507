//! The last steps inside the container: its control groups, the system call filter, the final capabilities, exec.
//!
//! A filter needs CAP_SYS_ADMIN or no-new-privileges. A container with neither still gets one: the specification grants
//! [`SETUP`] in addition, and this executor takes it away again after the filter is in place.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::File,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use libcontainer::{
    oci_spec::runtime::{Process, Spec},
    workload::{Executor, ExecutorError, ExecutorValidationError},
};
use linux::mount::Flags;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::CgroupView;

/// Capabilities that setting up needs; see `embedded::spec`, which adds them.
pub const SETUP: [&str; 2] = ["SYS_ADMIN", "SETPCAP"];

#[derive(Clone)]
pub(super) struct Filtered {
    /// Open `cgroup.procs` files.
    pub groups: Arc<Vec<File>>,
    pub view: Option<CgroupView>,
    /// The container's first process, which makes what later commands find.
    pub first: bool,
    pub seccomp: bool,
    pub capabilities: BTreeSet<String>,
}

impl Executor for Filtered {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let args = process.args().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let (program, rest) = args.split_first().ok_or(ExecutorError::InvalidArg)?;
        let program = find(process, program).map_err(|error| ExecutorError::Other(error.to_string()))?;
        let failed = |doing: &str, error: &dyn std::fmt::Display| ExecutorError::Other(format!("{doing}: {error}"));
        super::join_cgroups(&self.groups).map_err(|error| failed("join control groups", &error))?;
        self.show_groups(process)
            .map_err(|error| failed("show control groups", &error))?;
        if self.seccomp {
            linux::process::seccomp::install_default(&self.capabilities)
                .map_err(|error| failed("install the filter", &error))?;
        }
        self.drop_setup_capabilities()
            .map_err(|error| failed("drop capabilities", &error))?;
        // The environment was set by `setup_envs`; argv[0] stays as the user wrote it.
        let error = std::process::Command::new(&program).arg0(&args[0]).args(rest).exec();
        // Nobody waits for a report any more: say it where the container's user looks.
        eprintln!("exec {}: {error}", program.display());
        std::process::exit(if error.kind() == std::io::ErrorKind::NotFound {
            127
        } else {
            126
        });
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let bad = ExecutorValidationError::ArgValidationError;
        let process = spec
            .process()
            .as_ref()
            .ok_or_else(|| bad("the specification has no process".to_owned()))?;
        let program = process
            .args()
            .as_ref()
            .and_then(|args| args.first())
            .ok_or_else(|| bad("no command".to_owned()))?;
        find(process, program).map(drop).map_err(bad)
    }
}

/// Controllers of version 1 that programs look at to find their limits.
const V1_SHOWN: [&str; 5] = ["cpu", "cpuacct", "cpuset", "memory", "pids"];

impl Filtered {
    /// A control group namespace whose root is the container's own group, and a read-only view of it.
    fn show_groups(&self, process: &Process) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let Some(view) = self.view else { return Ok(()) };
        linux::process::unshare(linux::process::Namespaces::NEWCGROUP)?;
        let at = Path::new("/sys/fs/cgroup");
        // A later command is in the same groups, so its namespace has the same roots.
        if !self.first || !at.is_dir() {
            // An image without /sys, or a pod that mounts something else there.
            return Ok(());
        }
        let flags = Flags::NOSUID | Flags::NODEV | Flags::NOEXEC;
        match view {
            CgroupView::V2 => linux::mount::filesystem("cgroup2", at, flags | Flags::RDONLY, "")?,
            CgroupView::V1 => {
                // We are the container's user already: the directory must be ours to fill.
                let user = process.user();
                let options = format!("mode=755,size=64k,uid={},gid={}", user.uid(), user.gid());
                linux::mount::filesystem("tmpfs", at, flags, &options)?;
                for name in V1_SHOWN {
                    let dir = at.join(name);
                    std::fs::create_dir(&dir)?;
                    // A controller that shares its hierarchy with another cannot be mounted alone: not shown.
                    if linux::mount::filesystem("cgroup", &dir, flags | Flags::RDONLY, name).is_err() {
                        std::fs::remove_dir(&dir)?;
                    }
                }
                linux::mount::remount(at, flags | Flags::RDONLY)?;
            }
        }
        Ok(())
    }

    fn drop_setup_capabilities(&self) -> rustix::io::Result<()> {
        for name in SETUP.iter().filter(|name| !self.capabilities.contains(**name)) {
            rustix::thread::remove_capability_from_bounding_set(set_of(name))?;
        }
        let keep = self
            .capabilities
            .iter()
            .fold(CapabilitySet::empty(), |set, name| set | set_of(name));
        let sets = CapabilitySets {
            effective: keep,
            permitted: keep,
            inheritable: CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, sets)
    }
}

/// A capability by its name without `CAP_`; unknown names were refused by the engine.
pub fn set_of(name: &str) -> CapabilitySet {
    CapabilitySet::from_name(name).unwrap_or(CapabilitySet::empty())
}

/// The program's path: looked up in the container's PATH unless it holds a slash.
fn find(process: &Process, program: &str) -> Result<PathBuf, String> {
    let usable = |path: &Path| {
        path.metadata()
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    if program.contains('/') {
        // Relative to the working directory, which libcontainer has entered.
        return match Path::new(program) {
            path if usable(path) => Ok(path.to_owned()),
            path if path.exists() => Err(format!("exec: {program:?}: permission denied")),
            _ => Err(format!("exec: {program:?}: no such file or directory")),
        };
    }
    let env = process.env().as_deref().unwrap_or_default();
    let path = env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or(crate::runc::DEFAULT_PATH);
    std::env::split_paths(OsStr::new(path))
        .map(|dir| dir.join(program))
        .find(|path| usable(path))
        .ok_or_else(|| format!("exec: {program:?}: executable file not found in $PATH"))
}

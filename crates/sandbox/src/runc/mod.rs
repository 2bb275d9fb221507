//! `oaks-runc`: the one-shot helper that makes a container, or a process in one, with libcontainer, and ends.
//!
//! Started by the supervisor, to which it reports the new process (descriptor 3) and leaves it. What libcontainer does not
//! do here, and why:
//! * **Control groups.** The engine makes them; every cgroup mount is hidden from libcontainer (in a mount namespace of the
//!   helper's own), because its clean-up after a failure kills whatever is in the groups it computes from the caller's, and
//!   these may be the host's root groups. The new process joins right before exec, so setting up costs the container
//!   neither processor time of its quota nor memory of its limit.
//! * **System call filter.** Without the C library libcontainer has none; `executor` installs ours right before exec.

mod executor;
mod sys;

pub use executor::{SETUP, set_of};

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use libcontainer::{
    container::builder::ContainerBuilder,
    oci_spec::runtime::{Process, Spec},
    syscall::syscall::SyscallType,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::supervisor::protocol::{self, HelperReport};

/// File beside a bundle's `config.json`: what the runtime specification has no place for.
pub const EXTRAS_FILE: &str = "oaks.json";
/// Search path of a container whose image sets none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// No such group is ever made: cgroup mounts are hidden when libcontainer looks for it.
pub const CGROUPS_PATH: &str = "/oaks-hidden";

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Extras {
    /// Directories whose `cgroup.procs` the container joins.
    pub cgroups: Vec<PathBuf>,
    /// Show the container its own groups under /sys/fs/cgroup.
    pub cgroup_view: Option<CgroupView>,
    /// Install the default system call filter.
    pub seccomp: bool,
    /// What the container keeps, without `CAP_`. The specification's sets hold more while it is set up.
    pub capabilities: BTreeSet<String>,
}

/// How a container sees its control groups.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub enum CgroupView {
    V1,
    V2,
}

#[derive(Debug, Error)]
enum RuncError {
    #[error("usage: oaks-runc run STATE_ROOT ID BUNDLE | exec STATE_ROOT ID BUNDLE PROCESS_JSON | pause INIT CGROUP..")]
    Usage,
    #[error("{doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is damaged")]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("join control groups")]
    Join(#[source] io::Error),
    #[error("hide control groups from the container library")]
    Hide(#[source] io::Error),
    #[error(transparent)]
    Process(#[from] linux::process::ProcessError),
    #[error(transparent)]
    Mount(#[from] linux::mount::MountError),
    #[error(transparent)]
    Library(#[from] libcontainer::error::LibcontainerError),
    #[error("receive the terminal")]
    Terminal(#[source] io::Error),
}

/// Runs the helper; the result is also reported on descriptor 3. The exit status is 0 if a process was made.
pub fn main(args: impl Iterator<Item = OsString>) -> std::process::ExitCode {
    let mut report = sys::report_channel();
    let (message, fd) = match run(&args.collect::<Vec<_>>()) {
        Ok((pid, terminal)) => (HelperReport::Started { pid }, terminal),
        Err(error) => (HelperReport::Failed { message: chain(&error) }, None),
    };
    let failed = matches!(message, HelperReport::Failed { .. });
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    let sent = match &mut report {
        Some(stream) => protocol::send(stream, &message, &fds).is_ok(),
        None => false,
    };
    if !sent {
        eprintln!("oaks-runc: {message:?}");
    }
    if failed {
        std::process::ExitCode::FAILURE
    } else {
        std::process::ExitCode::SUCCESS
    }
}

fn run(args: &[OsString]) -> Result<(u32, Option<OwnedFd>), RuncError> {
    let text: Vec<&str> = args.iter().filter_map(|arg| arg.to_str()).collect();
    match text.as_slice() {
        ["run", root, id, bundle] => run_container(Path::new(root), id, Path::new(bundle)),
        ["exec", root, id, bundle, process] => exec(Path::new(root), id, Path::new(bundle), Path::new(process)),
        ["pause", init, cgroups @ ..] => pause(init, cgroups),
        _ => Err(RuncError::Usage),
    }
}

fn run_container(root: &Path, id: &str, bundle: &Path) -> Result<(u32, Option<OwnedFd>), RuncError> {
    let spec: Spec = read_json(&bundle.join("config.json"))?;
    let (extras, groups) = prepare(bundle, spec.process().as_ref())?;
    let console = Console::new(bundle, spec.process().as_ref())?;
    std::fs::create_dir_all(root).map_err(|source| RuncError::Io {
        doing: "create",
        path: root.to_owned(),
        source,
    })?;
    let mut container = builder(root, id, &extras, groups, true, &console)?
        .as_init(bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()?;
    let pid = container.pid().map_or(0, |pid| pid.as_raw() as u32);
    let terminal = console.map(Console::receive).transpose()?;
    container.start()?;
    Ok((pid, terminal))
}

fn exec(root: &Path, id: &str, bundle: &Path, process_file: &Path) -> Result<(u32, Option<OwnedFd>), RuncError> {
    let process: Process = read_json(process_file)?;
    let (extras, groups) = prepare(bundle, Some(&process))?;
    let console = Console::new(process_file.parent().unwrap_or(bundle), Some(&process))?;
    let pid = builder(root, id, &extras, groups, false, &console)?
        .as_tenant()
        .with_process(Some(process_file))
        .with_detach(true)
        .build()?;
    let terminal = console.map(Console::receive).transpose()?;
    Ok((pid.as_raw() as u32, terminal))
}

fn builder(
    root: &Path,
    id: &str,
    extras: &Extras,
    groups: Vec<File>,
    first: bool,
    console: &Option<Console>,
) -> Result<ContainerBuilder, RuncError> {
    let executor = executor::Filtered {
        groups: Arc::new(groups),
        view: extras.cgroup_view,
        // Later commands share the first one's mounts.
        first,
        seccomp: extras.seccomp,
        capabilities: extras.capabilities.clone(),
    };
    let builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(root)?
        .with_console_socket(console.as_ref().map(|console| console.path.clone()))
        .with_executor(executor)
        .validate_id()?;
    Ok(builder)
}

/// Makes PID 1 of a shared pid namespace: `INIT pause`.
fn pause(init: &str, cgroups: &[&str]) -> Result<(u32, Option<OwnedFd>), RuncError> {
    let groups = open_cgroups(cgroups.iter().map(Path::new))?;
    join_cgroups(&groups).map_err(RuncError::Join)?;
    let program = init.to_owned();
    // This program has one thread.
    let child = linux::process::fork_into(linux::process::Namespaces::NEWPID, move || {
        use std::os::unix::process::CommandExt;
        let error = std::process::Command::new(program).arg("pause").env_clear().exec();
        eprintln!("oaks-runc: {error}");
        127
    })?;
    Ok((child.pid.as_raw_nonzero().get() as u32, None))
}

/// Opens the groups, hides them, and gives the standard streams to the container's user.
fn prepare(bundle: &Path, process: Option<&Process>) -> Result<(Extras, Vec<File>), RuncError> {
    let extras: Extras = read_json(&bundle.join(EXTRAS_FILE))?;
    let groups = open_cgroups(extras.cgroups.iter().map(PathBuf::as_path))?;
    hide_cgroups()?;
    if let Some(user) = process.map(Process::user) {
        let (uid, gid) = (user.uid(), user.gid());
        for fd in [io::stdin().as_fd(), io::stdout().as_fd(), io::stderr().as_fd()] {
            // So that a program can open /dev/stdout again. Anything but a pipe (a device, a file) keeps its owner.
            let is_pipe = rustix::fs::fstat(fd)
                .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Fifo);
            if is_pipe {
                let _ = rustix::fs::fchown(
                    fd,
                    Some(rustix::fs::Uid::from_raw(uid)),
                    Some(rustix::fs::Gid::from_raw(gid)),
                );
            }
        }
    }
    Ok((extras, groups))
}

fn open_cgroups<'a>(dirs: impl Iterator<Item = &'a Path>) -> Result<Vec<File>, RuncError> {
    dirs.map(|dir| {
        let path = dir.join("cgroup.procs");
        let file = File::options().write(true).open(&path);
        file.map_err(|source| RuncError::Io {
            doing: "open control group",
            path,
            source,
        })
    })
    .collect()
}

/// Moves the calling process into the groups. The kernel asks for the rights of whoever opened the files.
fn join_cgroups(groups: &[File]) -> io::Result<()> {
    groups
        .iter()
        .try_for_each(|mut file| io::Write::write_all(&mut file, b"0"))
}

/// Detaches every cgroup mount in a mount namespace of our own. The container's namespace is made from it.
///
/// The order matters for the host: nothing is unmounted before events stop travelling out.
fn hide_cgroups() -> Result<(), RuncError> {
    linux::process::unshare(linux::process::Namespaces::NEWNS)?;
    linux::mount::set_propagation(Path::new("/"), linux::mount::Propagation::Slave)?;
    let mounts = || -> io::Result<Vec<String>> {
        let table = std::fs::read_to_string("/proc/self/mountinfo")?;
        let found = table.lines().filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            right
                .starts_with("cgroup")
                .then(|| left.split(' ').nth(4).unwrap_or_default().replace("\\040", " "))
        });
        Ok(found.collect())
    };
    let root = Path::new("/sys/fs/cgroup");
    linux::mount::detach(root)?;
    for point in mounts().map_err(RuncError::Hide)?.iter().rev() {
        linux::mount::detach(Path::new(point))?;
    }
    if !mounts().map_err(RuncError::Hide)?.is_empty() {
        return Err(RuncError::Hide(io::Error::other("control groups are still mounted")));
    }
    // The library insists on a known file system there.
    linux::mount::tmpfs(root, 4096, 0o755, linux::mount::Flags::RDONLY)?;
    Ok(())
}

/// Where the container's side sends the master of its terminal.
struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    /// `None` unless the process wants a terminal.
    fn new(dir: &Path, process: Option<&Process>) -> Result<Option<Self>, RuncError> {
        if !process.is_some_and(|process| process.terminal().unwrap_or(false)) {
            return Ok(None);
        }
        let failed = |source| RuncError::Io {
            doing: "make a console socket in",
            path: dir.to_owned(),
            source,
        };
        // Socket addresses are short and our paths are not: name it through the directory's descriptor.
        let handle = File::open(dir).map_err(failed)?;
        let name = format!("console-{}", std::process::id());
        let short = format!("/proc/self/fd/{}/{name}", std::os::fd::AsRawFd::as_raw_fd(&handle));
        let listener = UnixListener::bind(short).map_err(failed)?;
        Ok(Some(Self {
            listener,
            path: dir.join(name),
        }))
    }

    fn receive(self) -> Result<OwnedFd, RuncError> {
        let result = self.listener.accept().and_then(|(stream, _): (UnixStream, _)| {
            let mut fds = Vec::new();
            protocol::receive_with_fds(stream.as_fd(), &mut [0; 64], &mut fds)?;
            fds.pop().ok_or_else(|| io::Error::other("no descriptor came"))
        });
        let _ = std::fs::remove_file(&self.path);
        result.map_err(RuncError::Terminal)
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, RuncError> {
    let bytes = std::fs::read(path).map_err(|source| RuncError::Io {
        doing: "read",
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&bytes).map_err(|source| RuncError::Json {
        path: path.to_owned(),
        source,
    })
}

/// The whole chain in one line, each part once: libcontainer repeats its sources in its own text.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let part = source.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        next = source.source();
    }
    text
}

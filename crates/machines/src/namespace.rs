//! The namespace provider: a machine is a process tree in its own mount, pid, net, uts, ipc and cgroup namespaces.
//!
//! [`NamespaceMachines`] runs on the host side: it makes directories and cgroups, starts the boot process, and adopts
//! survivors by pid and start time. [`boot`] is what the boot process runs (`oaks machine-boot`, single-threaded, exec'd):
//! it builds the root, pivots and starts PID 1, prints its pid and exits; PID 1 stays.
//!
//! A namespace machine shares the host's kernel. It is no tenant boundary.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::sys;

/// How long PID 1 gets to stop its containers before it is killed.
pub const POWER_OFF_S: u64 = 5;

#[derive(Debug, Error)]
pub enum MachineError {
    #[error("machine {name}: {doing} {path}")]
    Io {
        name: String,
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("machine {name} did not boot: {message}; see {log}")]
    Boot {
        name: String,
        message: String,
        log: PathBuf,
    },
    #[error("machine {name} (pid {pid}) survived SIGKILL for {ms} ms")]
    Unkillable { name: String, pid: i32, ms: u64 },
}

/// One file that exists in the machine from its first instant.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct SeedFile {
    /// Absolute path in the machine.
    pub path: PathBuf,
    pub mode: u32,
    pub content: String,
}

/// Everything the boot process needs; passed as JSON on its standard input.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct BootSpec {
    pub name: String,
    pub hostname: String,
    /// Pinned network namespace, NIC already inside.
    pub netns: PathBuf,
    /// `cgroup.procs` files to join before the cgroup namespace is made.
    pub cgroup_procs: Vec<PathBuf>,
    /// v1 controllers to mount, for example `memory`, `cpu,cpuacct`; empty on a unified host.
    pub cgroup_v1: Vec<String>,
    /// Minimal tree (`crate::tree`), mounted read-only.
    pub tree: PathBuf,
    /// Mount point of the machine's root, in the boot process's own mount namespace only.
    pub root: PathBuf,
    /// Host folder that becomes `/var/lib/oaks`.
    pub data: PathBuf,
    /// `(host path, path in the machine, read only)`.
    pub binds: Vec<(PathBuf, PathBuf, bool)>,
    pub files: Vec<SeedFile>,
    pub init_argv: Vec<String>,
    /// PID 1's own messages.
    pub log: PathBuf,
}

/// A running machine as remembered in the run directory.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct Running {
    pub name: String,
    /// PID 1 of the machine, in the host's pid namespace.
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: with it a pid cannot be mistaken for a later process.
    pub start_time: u64,
}

/// Builds the root and starts PID 1. Runs in a process of its own, before any thread exists.
pub fn boot(spec: &BootSpec) -> Result<i32, MachineError> {
    let io_err = |doing: &'static str, path: &Path| {
        let (name, path) = (spec.name.clone(), path.to_path_buf());
        move |source: io::Error| MachineError::Io {
            name,
            doing,
            path,
            source,
        }
    };
    for procs in &spec.cgroup_procs {
        fs::write(procs, "0").map_err(io_err("joining", procs))?;
    }
    sys::join_netns(&spec.netns).map_err(io_err("entering", &spec.netns))?;
    sys::unshare_for_machine().map_err(io_err("unsharing namespaces for", &spec.root))?;
    // Nothing of what follows may propagate to the host; what the host unmounts later must disappear here too.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(|e| io_err("changing propagation of", Path::new("/"))(e.into()))?;
    build_root(spec)?;
    std::env::set_current_dir(&spec.root).map_err(io_err("entering", &spec.root))?;
    rustix::process::pivot_root(".", ".").map_err(|e| io_err("pivoting to", &spec.root)(e.into()))?;
    unmount(".", UnmountFlags::DETACH).map_err(|e| io_err("dropping the old root of", &spec.root)(e.into()))?;
    std::env::set_current_dir("/").map_err(io_err("entering", Path::new("/")))?;
    rustix::system::sethostname(spec.hostname.as_bytes()).map_err(|e| io_err("naming", &spec.root)(e.into()))?;
    sys::unshare_pid().map_err(io_err("unsharing pids for", &spec.root))?;

    let log = fs::File::options()
        .create(true)
        .append(true)
        .open("/var/log/init.log")
        .map_err(io_err("opening", Path::new("/var/log/init.log")))?;
    let mut command = Command::new(&spec.init_argv[0]);
    command
        .args(&spec.init_argv[1..])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/opt/cni/bin")
        .env("HOME", "/")
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(io_err("duplicating", &spec.log))?)
        .stderr(log)
        .process_group(0);
    sys::mount_proc_before_exec(&mut command);
    let child = command
        .spawn()
        .map_err(io_err("starting", Path::new(&spec.init_argv[0])))?;
    Ok(child.id() as i32)
}

fn build_root(spec: &BootSpec) -> Result<(), MachineError> {
    let root = &spec.root;
    let fail = |doing: &'static str, path: &Path, source: io::Error| MachineError::Io {
        name: spec.name.clone(),
        doing,
        path: path.to_path_buf(),
        source,
    };
    let mkdir = |p: &Path| fs::create_dir_all(p).map_err(|e| fail("creating", p, e));
    let tmpfs = |p: &Path, opts: &str| {
        let data = std::ffi::CString::new(opts).unwrap_or_default();
        mount("tmpfs", p, "tmpfs", MountFlags::NOSUID, data.as_c_str())
            .map_err(|e| fail("mounting tmpfs on", p, e.into()))
    };
    let bind = |from: &Path, to: &Path, read_only: bool| -> Result<(), MachineError> {
        if from.is_dir() {
            mkdir(to)?;
        } else {
            if let Some(parent) = to.parent() {
                mkdir(parent)?;
            }
            fs::File::create(to).map_err(|e| fail("creating", to, e))?;
        }
        mount_bind_recursive(from, to).map_err(|e| fail("binding", from, e.into()))?;
        if read_only {
            mount_remount(to, MountFlags::BIND | MountFlags::RDONLY, c"")
                .map_err(|e| fail("making read-only", to, e.into()))?;
        }
        Ok(())
    };

    mkdir(root)?;
    tmpfs(root, "mode=0755,size=64m")?;
    for dir in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "etc/cni/net.d",
        "etc/oaks",
        "var/lib",
        "var/log",
        "var/tmp",
        "root",
    ] {
        mkdir(&root.join(dir))?;
    }
    for dir in crate::tree::READ_ONLY_DIRS {
        bind(&spec.tree.join(dir), &root.join(dir), true)?;
    }
    for (link, target) in [("bin", "usr/bin"), ("sbin", "usr/sbin")] {
        let path = root.join(link);
        std::os::unix::fs::symlink(target, &path).map_err(|e| fail("linking", &path, e))?;
    }
    tmpfs(&root.join("tmp"), "mode=1777,size=64m")?;
    tmpfs(&root.join("run"), "mode=0755,size=64m")?;
    mkdir(&spec.data)?;
    bind(&spec.data, &root.join("var/lib/oaks"), false)?;
    let logs = spec
        .log
        .parent()
        .map(Path::to_path_buf)
        .unwrap_or_else(|| spec.data.clone());
    mkdir(&logs)?;
    bind(&logs, &root.join("var/log"), false)?;
    mkdir(&root.join("run/lock"))?;
    for (from, to, read_only) in &spec.binds {
        bind(from, &root.join(to.strip_prefix("/").unwrap_or(to)), *read_only)?;
    }

    // Devices: only those every container runtime expects, from the host by bind.
    let dev = root.join("dev");
    tmpfs(&dev, "mode=0755,size=1m")?;
    for node in ["null", "zero", "full", "random", "urandom", "tty"] {
        let to = dev.join(node);
        fs::File::create(&to).map_err(|e| fail("creating", &to, e))?;
        mount_bind(Path::new("/dev").join(node), &to).map_err(|e| fail("binding device", &to, e.into()))?;
    }
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        let path = dev.join(link);
        std::os::unix::fs::symlink(target, &path).map_err(|e| fail("linking", &path, e))?;
    }
    mkdir(&dev.join("pts"))?;
    mount(
        "devpts",
        dev.join("pts"),
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        c"newinstance,ptmxmode=0666,mode=0620",
    )
    .map_err(|e| fail("mounting devpts on", &dev.join("pts"), e.into()))?;
    mkdir(&dev.join("shm"))?;
    tmpfs(&dev.join("shm"), "mode=1777,size=64m")?;

    let sysfs = root.join("sys");
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    mount("sysfs", &sysfs, "sysfs", quiet, c"").map_err(|e| fail("mounting sysfs on", &sysfs, e.into()))?;
    let cgroup = sysfs.join("fs/cgroup");
    if spec.cgroup_v1.is_empty() {
        mount("cgroup2", &cgroup, "cgroup2", quiet, c"").map_err(|e| fail("mounting cgroup2 on", &cgroup, e.into()))?;
    } else {
        tmpfs(&cgroup, "mode=0755,size=1m")?;
        for controllers in &spec.cgroup_v1 {
            let at = cgroup.join(controllers);
            mkdir(&at)?;
            let data = std::ffi::CString::new(if controllers == "systemd" {
                "none,name=systemd"
            } else {
                controllers.as_str()
            })
            .unwrap_or_default();
            mount("cgroup", &at, "cgroup", quiet, data.as_c_str())
                .map_err(|e| fail("mounting cgroup on", &at, e.into()))?;
        }
    }

    let hosts = format!("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {}\n", spec.hostname);
    let fixed = [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n".to_owned(),
        ),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n".to_owned()),
        ("etc/hostname", format!("{}\n", spec.hostname)),
        ("etc/hosts", hosts),
        ("etc/cni/net.d/10-azure.conflist", crate::tree::CONFLIST.to_owned()),
    ];
    for (path, content) in fixed {
        let path = root.join(path);
        fs::write(&path, content).map_err(|e| fail("writing", &path, e))?;
    }
    for file in &spec.files {
        let path = root.join(file.path.strip_prefix("/").unwrap_or(&file.path));
        if let Some(parent) = path.parent() {
            mkdir(parent)?;
        }
        fs::write(&path, &file.content).map_err(|e| fail("writing", &path, e))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))
            .map_err(|e| fail("setting the mode of", &path, e))?;
    }
    Ok(())
}

/// The host side of the provider.
#[derive(Clone, Debug)]
pub struct NamespaceMachines {
    /// `oaks` itself: run as `oaks machine-boot` with a [`BootSpec`] on standard input.
    pub boot_program: PathBuf,
    /// `<run dir>/machines`: state files and mount points.
    pub run_dir: PathBuf,
}

impl NamespaceMachines {
    fn dir(&self, name: &str) -> PathBuf {
        self.run_dir.join(name)
    }

    /// The machine's record if its PID 1 still runs.
    pub fn running(&self, name: &str) -> Option<Running> {
        let text = fs::read_to_string(self.dir(name).join("state.json")).ok()?;
        let running: Running = serde_json::from_str(&text).ok()?;
        let lives = start_time(running.pid) == Some(running.start_time) && !sys::is_zombie(running.pid);
        lives.then_some(running)
    }

    /// Names with a record, running or not.
    pub fn known(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.run_dir) else {
            return vec![];
        };
        entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .collect()
    }

    /// Starts a machine; returns when PID 1 exists. Blocking: call it from a blocking thread.
    ///
    /// # Errors
    /// `Boot` carries the boot process's own words. Nothing is left running.
    pub fn start(&self, spec: &BootSpec) -> Result<Running, MachineError> {
        let dir = self.dir(&spec.name);
        let io_err = |doing: &'static str, path: &Path| {
            let (name, path) = (spec.name.clone(), path.to_path_buf());
            move |source: io::Error| MachineError::Io {
                name,
                doing,
                path,
                source,
            }
        };
        fs::create_dir_all(&dir).map_err(io_err("creating", &dir))?;
        let mut child = Command::new(&self.boot_program)
            .arg("machine-boot")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(io_err("starting", &self.boot_program))?;
        let text = serde_json::to_vec(spec).map_err(|e| io_err("encoding", &dir)(e.into()))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&text).map_err(io_err("feeding", &self.boot_program))?;
        }
        let out = child
            .wait_with_output()
            .map_err(io_err("waiting for", &self.boot_program))?;
        let said = String::from_utf8_lossy(&out.stdout);
        let pid = said.trim().parse::<i32>().ok().filter(|_| out.status.success());
        let Some((pid, start_time)) = pid.and_then(|p| Some((p, start_time(p)?))) else {
            let message = String::from_utf8_lossy(&out.stderr).trim().to_owned();
            let message = if message.is_empty() {
                format!("boot ended with {}", describe(out.status))
            } else {
                message
            };
            return Err(MachineError::Boot {
                name: spec.name.clone(),
                message,
                log: spec.log.clone(),
            });
        };
        let running = Running {
            name: spec.name.clone(),
            pid,
            start_time,
        };
        let (tmp, path) = (dir.join("state.json.new"), dir.join("state.json"));
        fs::write(&tmp, serde_json::to_vec(&running).unwrap_or_default()).map_err(io_err("writing", &tmp))?;
        fs::rename(&tmp, &path).map_err(io_err("writing", &path))?;
        Ok(running)
    }

    /// Powers a machine off: SIGTERM, [`POWER_OFF_S`] seconds, SIGKILL. Succeeds if it is not running. Blocking.
    pub fn stop(&self, name: &str, grace: Duration) -> Result<(), MachineError> {
        if let Some(running) = self.running(name) {
            let gone = |deadline: Instant| {
                while start_time(running.pid) == Some(running.start_time) && !sys::is_zombie(running.pid) {
                    if Instant::now() > deadline {
                        return false;
                    }
                    sys::wait_exit(running.pid, Duration::from_millis(50));
                }
                true
            };
            sys::kill(running.pid, rustix::process::Signal::TERM);
            if !gone(Instant::now() + grace) {
                sys::kill(running.pid, rustix::process::Signal::KILL);
                let ms = 10_000;
                if !gone(Instant::now() + Duration::from_millis(ms)) {
                    return Err(MachineError::Unkillable {
                        name: name.to_owned(),
                        pid: running.pid,
                        ms,
                    });
                }
            }
            sys::reap(running.pid);
        }
        let dir = self.dir(name);
        let _ = fs::remove_dir(dir.join("root"));
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(MachineError::Io {
                name: name.to_owned(),
                doing: "removing",
                path: dir,
                source: e,
            }),
            _ => Ok(()),
        }
    }
}

/// Start time of a process in clock ticks since boot, `None` if there is no such process.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold spaces and parentheses: count from the last one.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

fn describe(status: std::process::ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown status".to_owned(),
    }
}

//! A host of one's own: net, mount, pid, uts and ipc namespaces, private /run and /tmp-like folders, cgroups of its own.
//! The real host's links, rules and uplink are never touched; everything dies with the value.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, bail};

/// See the module.
pub struct Host {
    child: Child,
    /// PID 1 of the host's pid namespace, as seen from here.
    pid: u32,
    name: String,
    dir: tempfile::TempDir,
    cgroups: Vec<PathBuf>,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Host {
    /// Starts a host. Needs root.
    ///
    /// # Errors
    /// If a namespace or a cgroup cannot be made; the message says which.
    pub fn new() -> Result<Self> {
        let name = format!("t{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new()
            .prefix("oaks-host-")
            .tempdir()
            .context("a folder for the host")?;
        let cgroups = own_cgroups(&name);
        let join: String = cgroups
            .iter()
            .map(|c| format!("echo 0 > {}/cgroup.procs || exit 9; ", c.display()))
            .collect();
        // PID 1 must reap: a shell that waits does.
        let inside = "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/lock && ip link set lo up && hostname oaks-host && echo up && while :; do wait; sleep 1000 & wait $!; done";
        let script = format!(
            "{join}exec unshare --net --mount --pid --uts --ipc --fork --kill-child --mount-proc sh -c '{inside}'"
        );
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("starting the host's shell")?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("the shell's output")?;
        BufReader::new(stdout).read_line(&mut line)?;
        if line.trim() != "up" {
            let _ = child.kill();
            let _ = child.wait();
            bail!("the test host did not start (root and namespaces are needed)");
        }
        let pid = first_child(child.id()).context("the host's first process")?;
        Ok(Self {
            child,
            pid,
            name,
            dir,
            cgroups,
        })
    }

    /// Unique per host; fit for `--instance` (at most 15 characters is the caller's business).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A folder on a real file system (overlay uppers work there), removed with the host.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `program` inside the host, environment kept.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut c = Command::new("nsenter");
        c.args(["-t", &self.pid.to_string(), "-n", "-m", "-p", "-u", "-i", "--"])
            .arg(program)
            .stdin(Stdio::null());
        c
    }

    /// Runs to the end; an error carries what the program said.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let out = self.output(program, args)?;
        if !out.status.success() {
            bail!(
                "{program} {} ended with {}\n{}{}",
                args.join(" "),
                out.status,
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    pub fn output(&self, program: &str, args: &[&str]) -> Result<Output> {
        self.command(program)
            .args(args)
            .output()
            .with_context(|| format!("starting {program}"))
    }

    /// A wire to another host: a link `name` in both, with these addresses (with prefix length). Nothing of it is outside.
    pub fn wire(&self, name: &str, address: &str, other: &Self, other_address: &str) -> Result<()> {
        // In this host's network but the caller's pid namespace, so that the other's pid means what it means here.
        let pid = other.pid.to_string();
        let out = Command::new("nsenter")
            .args([
                "-t",
                &self.pid.to_string(),
                "-n",
                "--",
                "ip",
                "link",
                "add",
                name,
                "type",
                "veth",
                "peer",
                "name",
                name,
            ])
            .args(["netns", &pid])
            .output()
            .context("starting nsenter")?;
        if !out.status.success() {
            bail!("a wire {name}: {}", String::from_utf8_lossy(&out.stderr));
        }
        for (host, address) in [(self, address), (other, other_address)] {
            // IPv6 puts an address and a route on a link a moment after it came up, and snapshots would differ by them.
            let off = format!("echo 1 > /proc/sys/net/ipv6/conf/{name}/disable_ipv6");
            host.run("sh", &["-c", &off])?;
            host.run("ip", &["addr", "add", address, "dev", name])?;
            host.run("ip", &["link", "set", name, "up"])?;
        }
        Ok(())
    }

    /// What a clean host must look like again after `oaks down`: links, addresses, routes, rules, nftables, forwarding,
    /// mounts below /run, processes.
    pub fn snapshot(&self) -> Result<HostDiff> {
        let script = "ip -o link | sed 's/^[0-9]*: //; s/@.*//; s/:.*//' | sort; ip -o addr | awk '{print $2,$4}' | sort; \
            ip route show table all | grep -v '^local\\|^broadcast' | sort; ip rule; nft list ruleset; \
            cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding; \
            awk '{print $5}' /proc/self/mountinfo | sort | uniq -c; ps -eo comm= | grep -v '^\\(ps\\|sh\\|sleep\\|nsenter\\|awk\\|grep\\|sort\\|uniq\\)$' | sort";
        Ok(HostDiff(self.run("sh", &["-c", script])?))
    }
}

/// A host's visible state as text, for comparing before and after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDiff(pub String);

impl Drop for Host {
    fn drop(&mut self) {
        // The end of PID 1 ends the whole pid namespace; unshare waits for it and then ends itself.
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
        for cgroup in &self.cgroups {
            remove_cgroup(cgroup);
        }
    }
}

fn first_child(pid: u32) -> Result<u32> {
    // `exec unshare --fork`: the shell became unshare, its only child is PID 1 inside.
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    text.split_whitespace()
        .next()
        .and_then(|p| p.parse().ok())
        .context("unshare has no child")
}

/// One cgroup per v1 controller (or one on a unified host) below the caller's own.
fn own_cgroups(name: &str) -> Vec<PathBuf> {
    let Ok(own) = fs::read_to_string("/proc/self/cgroup") else {
        return vec![];
    };
    let mut made = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let mount = if controllers.is_empty() {
            if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
                PathBuf::from("/sys/fs/cgroup")
            } else {
                continue;
            }
        } else {
            Path::new("/sys/fs/cgroup").join(controllers.trim_start_matches("name="))
        };
        let dir = mount
            .join(path.trim_start_matches('/'))
            .join(format!("oaks-test-{name}"));
        if fs::create_dir_all(&dir).is_err() {
            continue;
        }
        // v1 cpusets start empty and refuse tasks until filled.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let (Some(parent), true) = (dir.parent(), dir.join(file).exists()) {
                let _ = fs::read_to_string(parent.join(file)).and_then(|v| fs::write(dir.join(file), v));
            }
        }
        made.push(dir);
    }
    made
}

fn remove_cgroup(dir: &Path) {
    if let Ok(entries) = fs::read_dir(dir) {
        for entry in entries.flatten().filter(|e| e.path().is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    // Killed processes leave their cgroup a moment after they were reaped.
    let _ = crate::eventually("cgroup removal", 5, || {
        fs::remove_dir(dir).or_else(|e| if dir.exists() { Err(e) } else { Ok(()) })
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_its_own_links_and_leaves_nothing() {
        let (pid, cgroups) = {
            let host = Host::new().unwrap();
            host.run("ip", &["link", "add", "x0", "type", "veth", "peer", "name", "x1"])
                .unwrap();
            assert!(host.run("ip", &["-o", "link"]).unwrap().contains("x0"));
            assert_ne!(
                host.run("hostname", &[]).unwrap(),
                fs::read_to_string("/proc/sys/kernel/hostname").unwrap()
            );
            (host.pid, host.cgroups.clone())
        };
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert!(cgroups.iter().all(|c| !c.exists()), "{cgroups:?}");
    }
}

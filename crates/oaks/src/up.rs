//! `oaks up`: starts the instance's processes detached and ends when the system is ready.

use std::{
    fs,
    io::IsTerminal as _,
    net::{SocketAddr, TcpListener},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cli::Settings,
    hosts::Joined,
    keeper::{self, StartLock},
    process,
};

/// How long a process may take to become ready before `up` gives up.
const READY_S: u64 = 60;

/// Prints steps with their time: `[   0.31 s] API server answers at https://127.0.0.1:6443`.
pub struct Steps {
    start: Instant,
    bold: bool,
}

impl Default for Steps {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            bold: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
        }
    }
}

impl Steps {
    pub fn say(&self, text: &str) {
        println!("[{:7.2} s] {text}", self.start.elapsed().as_secs_f64());
    }

    pub fn next(&self, text: &str) {
        let (on, off) = if self.bold { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
        println!("            {on}{text}{off}");
    }

    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

pub fn run(settings: &Settings) -> Result<()> {
    let steps = Steps::default();
    let paths = &settings.paths;
    let lock = match paths.run.exists() {
        // Whoever starts something right now is waited for.
        true => Some(StartLock::take(paths)?),
        false => None,
    };
    let joined = Joined::read(paths)?;
    let (server, host) = (process::find(paths, "server"), process::find(paths, "host"));
    if joined.is_some()
        && let Some(host) = host
    {
        bail!(
            "instance {} is already up (host pid {}); nothing was changed",
            paths.instance,
            host.pid
        );
    }
    if let (Some(server), Some(host)) = (server, host) {
        bail!(
            "instance {} is already up (server pid {}, host pid {}); nothing was changed. Try `oaks status`, or `oaks down` first",
            paths.instance,
            server.pid,
            host.pid
        );
    }
    privileges()?;
    machines::tree::Binaries::beside(&std::env::current_exe()?, settings.libexec.as_deref())?;
    fs::create_dir_all(&paths.data).with_context(|| format!("creating {}", paths.data.display()))?;
    fs::create_dir_all(&paths.run).with_context(|| format!("creating {}", paths.run.display()))?;
    let _lock = lock.map_or_else(|| StartLock::take(paths), Ok)?;
    keeper::allow(paths);

    match server {
        None if joined.is_some() => {}
        Some(s) => steps.say(&format!("server adopted (pid {})", s.pid)),
        None => {
            port_free("--api-listen", settings.api_listen)?;
            port_free("--arm-listen", settings.arm_listen)?;
            launch(settings, "server")?;
            steps.say(&format!(
                "API server answers at https://{}, ARM at https://{}",
                settings.api_listen, settings.arm_listen
            ));
        }
    }
    match host {
        Some(h) => steps.say(&format!("host agent adopted (pid {})", h.pid)),
        None => {
            if let Err(e) = launch(settings, "host") {
                // Half an instance is worse than none: what this call started goes again.
                if server.is_none() && joined.is_none() {
                    let _ = process::stop(paths, "server", Duration::from_secs(5));
                }
                return Err(e);
            }
            steps.say(&format!(
                "host agent ready: public pool {}, uplink {}",
                settings.public_pool, settings.uplink
            ));
        }
    }
    keeper::start(settings)?;
    if joined.is_some() {
        println!("\nThis host is up; its platform is another one's. `oaks status` shows what runs here.");
        return Ok(());
    }
    println!("\nOaks is up. Next:");
    if let Some(dir) = off_path(&std::env::current_exe()?, std::env::var_os("PATH").as_deref()) {
        steps.next(&format!("export PATH={}:$PATH", dir.display()));
    }
    steps.next("oaks az                    # prints what the unmodified az CLI needs");
    steps.next("az group create -n rg -l local && az aks create -g rg -n c1 --node-count 1 --generate-ssh-keys");
    steps.next("oaks kubeconfig save c1    # then: kubectl get nodes");
    steps.next("oaks status                # what runs;  oaks down  # stop all of it");
    Ok(())
}

/// The program's folder if a shell would not find it there.
fn off_path(program: &Path, path: Option<&std::ffi::OsStr>) -> Option<std::path::PathBuf> {
    let dir = program.parent()?;
    let found = path.is_some_and(|p| std::env::split_paths(p).any(|d| d == dir));
    (!found).then(|| dir.to_path_buf())
}

/// Starts a process and waits for its ready file; an early end shows the tail of its log.
pub fn launch(settings: &Settings, name: &str) -> Result<()> {
    let paths = &settings.paths;
    let ready = paths.run.join(format!("{name}.ready"));
    let _ = fs::remove_file(&ready);
    let child = process::start(paths, name, &settings.as_args(name))?;
    let end = Instant::now() + Duration::from_secs(READY_S);
    while !ready.exists() {
        if process::wait_gone(child.pid, Duration::from_millis(5)) {
            bail!(
                "oaks {name} ended before it was ready:\n{}\nThe whole log: {}",
                process::log_tail(paths, name, 12),
                paths.log(name).display()
            );
        }
        if Instant::now() > end {
            let _ = process::stop(paths, name, Duration::from_secs(5));
            bail!(
                "oaks {name} was not ready within {READY_S} s; its log: {}\n{}",
                paths.log(name).display(),
                process::log_tail(paths, name, 12)
            );
        }
    }
    Ok(())
}

fn port_free(flag: &str, addr: SocketAddr) -> Result<()> {
    TcpListener::bind(addr).map(drop).with_context(|| {
        format!("{addr} is taken by another program; free it or choose another address with {flag} (who has it: ss -ltnp 'sport = :{}')", addr.port())
    })
}

/// Capabilities the host agent cannot do without.
pub const NEEDED: &[(&str, u32, &str)] = &[
    ("CAP_SYS_ADMIN", 21, "namespaces and mounts"),
    ("CAP_NET_ADMIN", 12, "links, routes and nftables"),
    ("CAP_SYS_CHROOT", 18, "container roots"),
    ("CAP_MKNOD", 27, "devices in containers"),
    ("CAP_CHOWN", 0, "file owners in image layers"),
];

pub fn privileges() -> Result<()> {
    let missing = missing_capabilities(&fs::read_to_string("/proc/self/status").unwrap_or_default());
    if let Some((name, what)) = missing.first() {
        bail!("this process lacks {name} ({what}); run as root: sudo oaks up. `oaks doctor` checks everything else");
    }
    Ok(())
}

/// Names and purposes of needed capabilities that `status` (text of `/proc/self/status`) does not show as effective.
pub fn missing_capabilities(status: &str) -> Vec<(&'static str, &'static str)> {
    let effective = status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or_default();
    NEEDED
        .iter()
        .filter(|(_, bit, _)| effective & (1 << bit) == 0)
        .map(|(name, _, what)| (*name, *what))
        .collect()
}

/// Marks this process as ready for `up`; `content` is for `status`.
pub fn mark_ready(run: &Path, name: &str, content: &serde_json::Value) -> Result<()> {
    let (tmp, path) = (run.join(format!("{name}.ready.new")), run.join(format!("{name}.ready")));
    fs::write(&tmp, serde_json::to_vec(content)?)?;
    Ok(fs::rename(&tmp, &path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_missing_capability() {
        let without_net_admin = format!("Name:\tx\nCapEff:\t{:016x}\n", u64::MAX & !(1 << 12));
        assert_eq!(
            missing_capabilities(&without_net_admin),
            [("CAP_NET_ADMIN", "links, routes and nftables")]
        );
        assert!(missing_capabilities("CapEff:\tffffffffffffffff\n").is_empty());
    }

    #[test]
    fn says_where_it_is_unless_the_shell_knows() {
        let program = Path::new("/opt/oaks/oaks");
        assert_eq!(off_path(program, Some("/bin:/opt/oaks".as_ref())), None);
        assert_eq!(off_path(program, Some("/bin".as_ref())), Some("/opt/oaks".into()));
    }

    #[test]
    fn a_used_port_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let err = format!(
            "{:#}",
            port_free("--api-listen", taken.local_addr().unwrap()).unwrap_err()
        );
        assert!(
            err.contains("--api-listen") && err.contains(&taken.local_addr().unwrap().port().to_string()),
            "{err}"
        );
    }
}

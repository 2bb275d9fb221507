//! What every area stands in: a host of its own with a virtual network, one machine whose NIC has secondary addresses for
//! pods (told by the wire server), and another machine to talk with.
//!
//! `/etc`, `/opt` and `/var/lib` are overlays or empty, so that callers use their default places and the real host's stay
//! as they are. The cgroup controllers are mounted anew in a cgroup namespace: runtimes see the host's own part as root.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use linux::netns;
use vnet::{Fabric, NetnsRef};
use vnet_model::{
    Mac,
    fabric::{DnsSpec, FabricSpec, IpConfigSpec, NicKind, NicSpec, SubnetSpec, VnetSpec},
};

use crate::tools::{Tools, iptables_wrappers, output};

pub const MACHINE: &str = "10.1.0.4";
pub const OTHER: &str = "10.1.0.5";
/// Port at which the other machine answers with the caller's address.
pub const WHO: u16 = 8000;
const WAIT: Duration = Duration::from_secs(5);

/// See the module.
pub struct World {
    machine: PathBuf,
    other: PathBuf,
    /// Programs that callers look for in `PATH`.
    path: String,
    /// On tmpfs, gone with the host.
    pub dir: PathBuf,
    _fabric: Fabric,
    _servers: tokio::runtime::Runtime,
}

impl World {
    /// Makes it; for a process inside a fresh [`testkit::Host`].
    pub fn enter(tools: &Tools) -> Result<Self> {
        let dir = PathBuf::from("/run/conformance");
        fs::create_dir_all(&dir)?;
        mounts(&dir).context("private folders and cgroups")?;

        let servers = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let fabric = Fabric::open("conf", "/run/conf")?;
        fabric.apply(&spec()?)?;
        fabric.serve(servers.handle());
        let boot = |name: &str| -> Result<PathBuf> {
            let pin = PathBuf::from(format!("/run/machines/{name}"));
            netns::create_named(&pin)?;
            fabric.attach(name, &NetnsRef::Path(pin.clone()), "eth0")?;
            Ok(pin)
        };
        let (machine, other) = (boot("a")?, boot("b")?);
        serve_who(&other)?;

        // As the installer leaves it.
        let (bin, conf) = (Path::new("/opt/cni/bin"), Path::new("/etc/cni/net.d"));
        fs::create_dir_all(bin)?;
        fs::create_dir_all(conf)?;
        for entry in fs::read_dir(tools.reference_plugins())?.flatten() {
            fs::copy(entry.path(), bin.join(entry.file_name()))?;
        }
        for plugin in ["azure-vnet", "azure-vnet-ipam"] {
            fs::copy(tools.plugins.join(plugin), bin.join(plugin)).with_context(|| format!("installing {plugin}"))?;
        }
        fs::copy(&tools.conflist, conf.join("10-azure.conflist"))?;
        let wrappers = dir.join("bin");
        fs::create_dir_all(&wrappers)?;
        iptables_wrappers(&wrappers)?;
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", wrappers.display());
        Ok(Self {
            machine,
            other,
            path,
            dir,
            _fabric: fabric,
            _servers: servers,
        })
    }

    /// `PATH` for callers.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A program of the machine.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.machine.display()))
            .arg("--")
            .arg(program)
            .env("PATH", &self.path);
        command
    }

    /// Runs `f` as a process of the other machine would.
    fn at_other<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        Ok(netns::run_in(&self.other, f)?)
    }

    /// A web server's answer to the other machine.
    pub fn get(&self, address: &str, path: &str) -> Result<String> {
        self.at_other(|| get(address, path))?
    }

    /// A web server's answer to the machine itself.
    pub fn get_local(&self, address: &str, path: &str) -> Result<String> {
        netns::run_in(&self.machine, || get(address, path))?
    }

    /// Links of the machine besides its NIC, loopback and bridges: what pods left behind.
    pub fn pod_links(&self) -> Result<Vec<String>> {
        let text = output(self.command("ip").args(["-o", "link", "show", "type", "veth"]))?;
        Ok(text
            .lines()
            .filter_map(|l| l.split(": ").nth(1))
            .map(|l| l.split('@').next().unwrap_or(l).to_owned())
            .filter(|l| l != "eth0")
            .collect())
    }

    /// How many addresses the plug-in has reserved on the machine.
    pub fn reserved(&self) -> Result<usize> {
        match fs::read("/run/azure-vnet/ipam.json") {
            Ok(text) => {
                let state: serde_json::Value = serde_json::from_slice(&text)?;
                let reservations = state["state"]["reservations"].as_object();
                Ok(reservations.context("the state has reservations")?.len())
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
            Err(e) => Err(e.into()),
        }
    }

    /// Nothing of a pod is left: no link, no translation.
    pub fn clean(&self) -> Result<()> {
        let links = self.pod_links()?;
        ensure!(links.is_empty(), "links are left: {links:?}");
        let rules = output(self.command("nft").args(["list", "ruleset"]))?;
        ensure!(!rules.contains("dnat to"), "translations are left:\n{rules}");
        Ok(())
    }
}

/// Status line and body must be those of success.
pub fn get(address: &str, path: &str) -> Result<String> {
    let to: SocketAddr = address.parse()?;
    let mut stream = TcpStream::connect_timeout(&to, WAIT).with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(WAIT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    if !text.starts_with("HTTP/1.0 200") && !text.starts_with("HTTP/1.1 200") {
        bail!("{address}{path} answers {text}");
    }
    Ok(text
        .split_once("\r\n\r\n")
        .map(|(_, body)| body.trim().to_owned())
        .unwrap_or_default())
}

/// Answers every connection with the caller's address.
fn serve_who(pin: &Path) -> Result<()> {
    let listener = netns::run_in(pin, || TcpListener::bind(("0.0.0.0", WHO)))??;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().map(|p| p.ip().to_string()).unwrap_or_default();
            let _ = stream.write_all(peer.as_bytes());
        }
    });
    Ok(())
}

fn mounts(dir: &Path) -> Result<()> {
    let script = format!(
        r#"set -e
for d in etc opt; do
    mkdir -p {dir}/$d/up {dir}/$d/work
    mount -t overlay overlay -o lowerdir=/$d,upperdir={dir}/$d/up,workdir={dir}/$d/work /$d
done
for d in /var/lib /var/log; do mount -t tmpfs tmpfs $d; done
mkdir -p /var/lib/cni /var/log/pods /var/log/containers"#,
        dir = dir.display()
    );
    output(Command::new("sh").args(["-c", &script]))?;
    own_cgroups()
}

/// Mounts the cgroup controllers again: this process's cgroup namespace shows its own part as root.
fn own_cgroups() -> Result<()> {
    let controllers: Vec<String> = fs::read_to_string("/proc/self/cgroup")?
        .lines()
        .filter_map(|l| l.split(':').nth(1))
        .filter(|c| !c.is_empty())
        .map(str::to_owned)
        .collect();
    let mut script = "set -e\numount -R /sys/fs/cgroup\n".to_owned();
    if controllers.is_empty() {
        script += "mount -t cgroup2 cgroup2 /sys/fs/cgroup\n";
    } else {
        script += "mount -t tmpfs tmpfs /sys/fs/cgroup\n";
        for controller in controllers {
            let (folder, none) = match controller.strip_prefix("name=") {
                Some(name) => (name, "none,"),
                None => (controller.as_str(), ""),
            };
            script += &format!(
                "mkdir /sys/fs/cgroup/{folder}\nmount -t cgroup -o {none}{controller} cgroup /sys/fs/cgroup/{folder}\n"
            );
        }
    }
    output(Command::new("sh").args(["-c", &script])).map(drop)
}

fn spec() -> Result<FabricSpec> {
    let pods = (20..60).map(|n| format!("10.1.0.{n}"));
    Ok(FabricSpec {
        instance: "conf".into(),
        vnets: vec![VnetSpec {
            key: "v".into(),
            prefixes: vec!["10.1.0.0/16".parse()?],
            subnets: vec![SubnetSpec {
                name: "nodes".into(),
                prefix: "10.1.0.0/24".parse()?,
                ..SubnetSpec::default()
            }],
            nics: vec![
                nic("a", std::iter::once(MACHINE.to_owned()).chain(pods))?,
                nic("b", [OTHER.to_owned()])?,
            ],
            dns: DnsSpec {
                suffix: "internal".into(),
                records: vec![],
            },
            ..VnetSpec::default()
        }],
        ..FabricSpec::default()
    })
}

fn nic(key: &str, addresses: impl IntoIterator<Item = String>) -> Result<NicSpec> {
    let mut ip_configs = vec![];
    for (i, address) in addresses.into_iter().enumerate() {
        ip_configs.push(IpConfigSpec {
            name: format!("ip{i}"),
            address: address.parse()?,
            primary: i == 0,
        });
    }
    Ok(NicSpec {
        key: key.into(),
        mac: Mac::derived(key),
        subnet: "nodes".into(),
        ip_configs,
        kind: NicKind::Machine,
        host_name: Some(key.into()),
        ..NicSpec::default()
    })
}

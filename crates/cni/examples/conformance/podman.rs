//! Debian's podman with its CNI back end and the documented list as its network.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    image,
    report::Report,
    tools::{Tools, libraries, output, wrapper},
    world::{MACHINE, OTHER, WHO, World},
};

struct Podman<'a> {
    world: &'a World,
    root: PathBuf,
    dir: PathBuf,
}

pub fn run(world: &World, tools: &Tools, report: &mut Report) -> Result<()> {
    let podman = Podman::new(world, tools)?;
    let [archive, _] = image::archives(&world.dir)?;
    let loaded = podman.call(&["load", "-i", &archive.to_string_lossy()])?;
    ensure!(loaded.contains(image::NAME), "podman loaded {loaded}");
    report.case("podman lists the documented network", || {
        let networks = podman.call(&["network", "ls", "--format", "{{.Name}} {{.Driver}}"])?;
        ensure!(networks.lines().any(|l| l.starts_with("azure ")), "it lists {networks}");
        Ok(())
    });
    report.case(
        "a container has a VNet address, reaches out and is reached by address and published port",
        || podman.container(),
    );
    report.case("two containers and their removal leave nothing", || podman.two());
    Ok(())
}

impl<'a> Podman<'a> {
    fn new(world: &'a World, tools: &Tools) -> Result<Self> {
        let root = tools.podman();
        let dir = world.dir.join("podman");
        fs::create_dir_all(&dir)?;
        // conmon starts it with an environment of its own.
        wrapper(
            &dir.join("crun"),
            &format!(
                "LD_LIBRARY_PATH={} exec {}/usr/bin/crun \"$@\"",
                libraries(&root).display(),
                root.display()
            ),
        )?;
        let conf = format!(
            r#"[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "/etc/cni/net.d"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
conmon_path = ["{root}/usr/bin/conmon"]
runtime = "crun"
[engine.runtimes]
crun = ["{dir}/crun"]
[containers]
# Some hosts lack the capability that raises limits.
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
"#,
            root = root.display(),
            dir = dir.display()
        );
        fs::write(dir.join("containers.conf"), conf)?;
        // Where podman looks, whatever its flags say; `/etc` is this host's own.
        fs::create_dir_all("/etc/containers")?;
        fs::write(
            "/etc/containers/policy.json",
            json!({"default": [{"type": "insecureAcceptAnything"}]}).to_string(),
        )?;
        fs::write("/etc/containers/registries.conf", "")?;
        Ok(Self { world, root, dir })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.world.command(self.root.join("usr/bin/podman"));
        command
            .args(["--root", &self.dir.join("root").to_string_lossy()])
            .args(["--runroot", &self.dir.join("run").to_string_lossy()])
            .args(["--storage-driver", "vfs"])
            .args(args)
            .env("CONTAINERS_CONF", self.dir.join("containers.conf"))
            .env("LD_LIBRARY_PATH", libraries(&self.root))
            .env("TMPDIR", "/run");
        command
    }

    fn call(&self, args: &[&str]) -> Result<String> {
        output(&mut self.command(args)).with_context(|| format!("podman {}", args[0]))
    }

    fn start(&self, name: &str, more: &[&str]) -> Result<String> {
        let mut args = vec!["run", "-d", "--name", name, "--network", "azure"];
        args.extend(more);
        args.push(image::NAME);
        self.call(&args)?;
        let inspected: Value = serde_json::from_str(&self.call(&["inspect", name])?)?;
        let address = &inspected[0]["NetworkSettings"]["Networks"]["azure"]["IPAddress"];
        Ok(address.as_str().context("the container has an address")?.to_owned())
    }

    fn container(&self) -> Result<()> {
        let address = self.start("one", &["-p", "18081:80"])?;
        ensure!(address.starts_with("10.1.0."), "its address is {address}");
        let (pod, published) = (format!("{address}:80"), format!("{MACHINE}:18081"));
        testkit::eventually("the container's server", 10, || self.world.get(&pod, "/hello"))?;
        let who = self.world.get(&pod, "/cgi-bin/who")?;
        ensure!(who.contains(OTHER), "the container sees {who} as its caller");
        ensure!(self.world.get(&published, "/hello")? == "hello", "the published port");
        let seen = self.call(&["exec", "one", "/bin/busybox", "nc", OTHER, &WHO.to_string()])?;
        ensure!(seen == address, "the other machine sees {seen}");
        self.call(&["rm", "-f", "-t", "0", "one"])?;
        ensure!(
            self.world.get(&published, "/hello").is_err(),
            "the published port is still there"
        );
        self.world.clean()
    }

    fn two(&self) -> Result<()> {
        let (a, b) = (self.start("a", &[])?, self.start("b", &[])?);
        ensure!(a != b, "both have {a}");
        let pod = format!("{b}:80");
        testkit::eventually("the container's server", 10, || self.world.get(&pod, "/hello"))?;
        let text = self.call(&[
            "exec",
            "a",
            "/bin/busybox",
            "wget",
            "-qO-",
            &format!("http://{b}/cgi-bin/who"),
        ])?;
        ensure!(text.trim().contains(&a), "{b} sees {text} as its caller");
        self.call(&["rm", "-f", "-t", "0", "a", "b"])?;
        ensure!(self.world.reserved()? == 0, "addresses are still reserved");
        self.world.clean()
    }
}

//! Debian's containerd: by the Container Runtime Interface as a kubelet calls it, and by `ctr --cni`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{
    image,
    report::Report,
    tools::{Tools, output},
    world::{MACHINE, OTHER, WHO, World},
};

/// A running containerd; ends with the value.
pub struct Containerd<'a> {
    world: &'a World,
    root: PathBuf,
    dir: PathBuf,
    process: Child,
}

pub fn run(world: &World, tools: &Tools, report: &mut Report) -> Result<()> {
    let containerd = Containerd::start(world, tools)?;
    report.case("CRI: the network is ready by STATUS of the documented list", || {
        let conditions = containerd.cri(tools, &["status"])?;
        let conditions: Value = serde_json::from_str(&conditions)?;
        let ready = conditions
            .as_array()
            .into_iter()
            .flatten()
            .find(|c| c["type"] == "NetworkReady");
        ensure!(ready.is_some_and(|c| c["status"] == true), "{conditions}");
        Ok(())
    });
    report.case(
        "CRI: a pod with a host port is reached by address and port, and leaves nothing",
        || pod(world, tools, &containerd),
    );
    report.case("CRI: ten pods one after the other return all addresses", || {
        for n in 0..10 {
            let pod = containerd.run_pod(tools, &format!("turn{n}"), "")?;
            containerd.cri(tools, &["remove", &pod.sandbox])?;
        }
        ensure!(world.reserved()? == 0, "addresses are still reserved");
        world.clean()
    });
    report.case("ctr run --cni: address, traffic and removal", || {
        ctr(world, &containerd)
    });
    Ok(())
}

/// What `crirun run` tells.
pub struct Pod {
    pub sandbox: String,
    pub ip: String,
}

impl<'a> Containerd<'a> {
    /// Starts it with its own folders and the image imported.
    pub fn start(world: &'a World, tools: &Tools) -> Result<Self> {
        let root = tools.containerd();
        let dir = world.dir.join("containerd");
        fs::create_dir_all(&dir)?;
        // The plug-ins' places are containerd's defaults; only what differs from them is said.
        let config = format!(
            r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
[grpc]
address = "{dir}/sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
# Some hosts lack the capability to lower it.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "{runc}"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
"#,
            dir = dir.display(),
            pause = image::PAUSE,
            runc = root.join("usr/sbin/runc").display()
        );
        let file = dir.join("config.toml");
        fs::write(&file, config)?;
        let log = File::create(dir.join("log"))?;
        let process = world
            .command(root.join("usr/bin/containerd"))
            .arg("-c")
            .arg(&file)
            .env("PATH", format!("{}:{}", root.join("usr/bin").display(), world.path()))
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting containerd")?;
        let mut containerd = Self {
            world,
            root,
            dir,
            process,
        };
        testkit::eventually("containerd answers", 30, || {
            if let Ok(Some(status)) = containerd.process.try_wait() {
                bail!("it ended with {status}: {}", tail(&containerd.dir.join("log")));
            }
            output(containerd.ctr().args(["version"])).map(drop)
        })?;
        for archive in image::archives(&world.dir)? {
            let mut import = containerd.ctr();
            import.args(["-n", "k8s.io", "images", "import", "--snapshotter", "native"]);
            output(import.arg(archive))?;
        }
        Ok(containerd)
    }

    pub fn endpoint(&self) -> String {
        format!("unix://{}/sock", self.dir.display())
    }

    pub fn ctr(&self) -> Command {
        let mut command = self.world.command(self.root.join("usr/bin/ctr"));
        command.arg("-a").arg(self.dir.join("sock"));
        command
    }

    fn cri(&self, tools: &Tools, args: &[&str]) -> Result<String> {
        output(self.world.command(tools.peer("crirun")).arg(self.endpoint()).args(args))
            .with_context(|| format!("containerd says:\n{}", tail(&self.dir.join("log"))))
    }

    fn run_pod(&self, tools: &Tools, name: &str, ports: &str) -> Result<Pod> {
        let text = self.cri(tools, &["run", name, image::NAME, ports])?;
        let value: Value = serde_json::from_str(&text)?;
        let part = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        Ok(Pod {
            sandbox: part("sandbox"),
            ip: part("ip"),
        })
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn pod(world: &World, tools: &Tools, containerd: &Containerd<'_>) -> Result<()> {
    let pod = containerd.run_pod(tools, "web", "18082:80")?;
    ensure!(pod.ip.starts_with("10.1.0."), "its address is {}", pod.ip);
    let (address, published) = (format!("{}:80", pod.ip), format!("{MACHINE}:18082"));
    let reached = (|| {
        testkit::eventually("the pod's server", 10, || world.get(&address, "/hello"))?;
        let who = world.get(&address, "/cgi-bin/who")?;
        ensure!(who.contains(OTHER), "the pod sees {who} as its caller");
        ensure!(world.get(&published, "/hello")? == "hello", "by the host port");
        ensure!(
            world.get_local(&published, "/hello")? == "hello",
            "by the host port from the machine itself"
        );
        Ok(())
    })();
    containerd.cri(tools, &["remove", &pod.sandbox])?;
    reached?;
    ensure!(world.get(&published, "/hello").is_err(), "the host port still answers");
    ensure!(world.reserved()? == 0, "the address is still reserved");
    world.clean()
}

fn ctr(world: &World, containerd: &Containerd<'_>) -> Result<()> {
    let common = ["--snapshotter", "native", "--cni"];
    let call = |args: &[&str]| output(containerd.ctr().args(["-n", "k8s.io"]).args(args));
    let runc = containerd.root.join("usr/sbin/runc");
    // In the foreground: a detached `ctr run` leaves the network to its caller.
    let mut run = containerd
        .ctr()
        .args(["-n", "k8s.io", "run", "--runc-binary"])
        .arg(runc)
        .args(common)
        .args([image::NAME, "by-ctr"])
        .args(image::SERVE)
        .spawn()?;
    let reached = by_ctr(world, &call);
    let _ = call(&["task", "kill", "--signal", "9", "by-ctr"]);
    let ended = run.wait()?;
    reached?;
    ensure!(world.reserved()? == 0, "the address is still reserved after {ended}");
    world.clean()
}

/// The running container's traffic.
fn by_ctr(world: &World, call: &dyn Fn(&[&str]) -> Result<String>) -> Result<()> {
    testkit::eventually("the task runs", 10, || {
        let tasks = call(&["task", "ls"])?;
        ensure!(tasks.contains("RUNNING"), "{tasks}");
        Ok(())
    })?;
    let port = WHO.to_string();
    let seen = call(&[
        "task",
        "exec",
        "--exec-id",
        "ask",
        "by-ctr",
        "/bin/busybox",
        "nc",
        OTHER,
        &port,
    ])?;
    ensure!(seen.starts_with("10.1.0."), "the other machine sees {seen}");
    let answer = world.get(&format!("{}:80", seen.trim()), "/hello")?;
    ensure!(answer == "hello", "it answers {answer}");
    Ok(())
}

/// The end of a log, for messages.
pub fn tail(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

//! One Oaks instance in a test host of its own.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use testkit::Host;

pub struct Instance {
    pub host: Arc<Host>,
    pub name: String,
}

/// Cgroups are found by the instance's name, and test hosts share the cgroup file system: no two instances share a name.
fn new_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("t{:x}x{n}", std::process::id() & 0xffff)
}

impl Instance {
    /// A host with nothing running yet.
    pub fn new() -> Result<Self> {
        Self::on(Arc::new(Host::new()?))
    }

    /// One more instance on a host; nothing runs yet.
    pub fn on(host: Arc<Host>) -> Result<Self> {
        let name = new_name();
        std::fs::create_dir_all(host.dir().join(format!("{name}-home")))?;
        Ok(Self { host, name })
    }

    pub fn data(&self) -> PathBuf {
        self.host.dir().join(&self.name)
    }

    /// The run folder, as seen inside the host.
    pub fn run_dir(&self) -> PathBuf {
        Path::new("/run").join(&self.name)
    }

    /// `oaks ARGS` inside the host, with a home folder of its own.
    pub fn oaks(&self, args: &[&str]) -> Command {
        let mut c = self.command(testkit::bin("oaks"));
        c.args(args);
        c
    }

    /// Any program inside the host with this instance's environment.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut c = self.host.command(program);
        c.env_remove("KUBECONFIG")
            .env_remove("SUDO_UID")
            .env_remove("SUDO_USER");
        c.env("HOME", self.host.dir().join(format!("{}-home", self.name)))
            .env("OAKS_INSTANCE", &self.name)
            .env("OAKS_DATA_DIR", self.data())
            .env("OAKS_RUN_DIR", self.run_dir())
            .env("OAKS_UPLINK", "none")
            .env("RUST_BACKTRACE", "0");
        c
    }

    /// Runs `oaks ARGS` to its end; an error carries both outputs and the logs' tails.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        let out = self.oaks(args).output().context("starting oaks")?;
        self.checked(&format!("oaks {}", args.join(" ")), out)
    }

    /// Runs and expects failure; standard error.
    pub fn fails(&self, args: &[&str]) -> Result<String> {
        let out = self.oaks(args).output().context("starting oaks")?;
        if out.status.success() {
            bail!(
                "oaks {} succeeded: {}",
                args.join(" "),
                String::from_utf8_lossy(&out.stdout)
            );
        }
        Ok(String::from_utf8_lossy(&out.stderr).into_owned())
    }

    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let out = self
            .command(tool("OAKS_TEST_KUBECTL", "kubectl")?)
            .args(args)
            .output()
            .context("starting kubectl")?;
        self.checked(&format!("kubectl {}", args.join(" ")), out)
    }

    pub fn checked(&self, what: &str, out: Output) -> Result<String> {
        if out.status.success() {
            return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
        }
        let mut text = format!(
            "{what} ended with {}\n--- stdout\n{}\n--- stderr\n{}",
            out.status,
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        for process in ["server", "host"] {
            text.push_str(&format!(
                "\n--- {process} log (tail)\n{}",
                tail(&self.data().join("log").join(format!("{process}.log")), 40)
            ));
        }
        if let Ok(machines) = std::fs::read_dir(self.data().join("host/machines")) {
            for m in machines.flatten() {
                for log in ["init.log", "node.log", "service.log"] {
                    let path = m.path().join("log").join(log);
                    if path.exists() {
                        text.push_str(&format!("\n--- {} (tail)\n{}", path.display(), tail(&path, 30)));
                    }
                }
            }
        }
        bail!(text)
    }

    /// An image `box:1` with busybox, `/www/index.html` and nothing else; no package is downloaded.
    pub fn build_box(&self) -> Result<()> {
        let dir = self.host.dir().join(format!("{}-box", self.name));
        std::fs::create_dir_all(&dir)?;
        std::fs::write(
            dir.join("image.yaml"),
            "name: box:1\nfiles:\n  - { from: busybox, to: /bin/busybox, mode: 493 }\n  - { from: index.html, to: /www/index.html }\n\
             entrypoint: [/bin/busybox]\ncmd: [httpd, -f, -p, \"80\", -h, /www]\n",
        )?;
        std::fs::write(dir.join("index.html"), "a page\n")?;
        std::fs::copy("/usr/bin/busybox", dir.join("busybox"))
            .context("busybox-static is missing: cargo xtask setup")?;
        self.run(&["image", "build", &dir.to_string_lossy()]).map(drop)
    }

    /// Writes a file that commands in the host can read; its path.
    pub fn file(&self, name: &str, content: &str) -> Result<String> {
        let path = self.host.dir().join(format!("{}-{name}", self.name));
        std::fs::write(&path, content)?;
        Ok(path.to_string_lossy().into_owned())
    }

    pub fn status(&self) -> Result<Value> {
        let out = self.oaks(&["status", "-o", "json"]).output()?;
        serde_json::from_slice(&out.stdout).context("oaks status -o json printed no JSON")
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // The host's end would kill everything too; this also unmounts and removes what lies outside its namespaces.
        let _ = self
            .oaks(&["down", "--purge"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

/// A tool that `cargo xtask setup` provides: from the environment, else from `target/tools`.
pub fn tool(variable: &str, fallback: &str) -> Result<PathBuf> {
    let path = match std::env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../target/tools")
            .join(fallback),
    };
    if path.is_file() {
        Ok(path)
    } else {
        bail!(
            "{} is missing: run `cargo xtask setup` once, or use `cargo xtask test`",
            path.display()
        )
    }
}

fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

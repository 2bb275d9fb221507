//! `cargo xtask conformance cni [--area NAME]... [--json]`: the plug-ins as the archive installs them, driven by cnitool, the
//! reference plug-ins' suite, podman, containerd and a kubelet.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::go::Module;
use crate::{dist, setup, sh};

pub fn run(args: &[String]) -> Result<()> {
    sh::step("system packages", setup::packages)?;
    let installed = sh::step("the installed plug-ins", install)?;
    let tools = sh::step("callers", || callers(args))?;
    drive(
        &installed.join("bin"),
        &installed.join("net.d/10-azure.conflist"),
        &tools,
        args,
    )
}

/// The part that `cargo xtask test` runs: cnitool alone, with the plug-ins of the test build.
pub fn light() -> Result<()> {
    let module = Module::new("cni")?;
    module.build("cnitool", CNITOOL)?;
    let root = sh::root();
    let conflist = root.join("crates/cni/10-azure.conflist");
    drive(
        &root.join("target/debug"),
        &conflist,
        module.out(),
        &["--area", "cnitool"].map(str::to_owned),
    )
}

fn drive(bin: &Path, conflist: &Path, tools: &Path, args: &[String]) -> Result<()> {
    let [bin, conflist, tools] = [bin, conflist, tools].map(|p| p.to_string_lossy().into_owned());
    let mut cargo = vec!["run", "-q", "-p", "cni", "--example", "conformance", "--locked", "--"];
    cargo.extend(["--plugins", &bin, "--conflist", &conflist, "--tools", &tools]);
    cargo.extend(args.iter().map(String::as_str));
    sh::run("cargo", &cargo)
}

const CNITOOL: &str = "github.com/containernetworking/cni/cnitool";

/// Makes the archive and installs it by its installer, below `target`.
fn install() -> Result<PathBuf> {
    let to = sh::root().join("target/conformance/cni");
    let _ = fs::remove_dir_all(&to);
    fs::create_dir_all(&to)?;
    let dist = sh::root().join("target/dist");
    let archive = dist::cni(&dist)?.to_string_lossy().into_owned();
    let installer = dist.join("install-cni-plugin.sh").to_string_lossy().into_owned();
    let dirs = ["bin", "net.d"].map(|d| to.join(d).to_string_lossy().into_owned());
    let version = dist::version()?;
    let args = [
        installer.as_str(),
        &version,
        "--from",
        &archive,
        "--bin-dir",
        &dirs[0],
        "--conf-dir",
        &dirs[1],
    ];
    sh::run("bash", &args)?;
    Ok(to)
}

/// Builds the Go programs that the asked areas need; the folder that holds them.
fn callers(args: &[String]) -> Result<PathBuf> {
    const PLUGINS: &str = "github.com/containernetworking/plugins";
    let module = Module::new("cni")?;
    module.build("cnitool", CNITOOL)?;
    module.build("crirun", "./crirun")?;
    for end in ["client", "server"] {
        module.build(&format!("echo-{end}"), &format!("{PLUGINS}/pkg/testutils/echo/{end}"))?;
    }
    module.build_tests("integration.test", &format!("{PLUGINS}/integration"))?;
    let testdata = module.out().join("integration-testdata");
    let _ = fs::remove_file(&testdata);
    symlink(module.sources(PLUGINS)?.join("integration/testdata"), testdata)?;
    if !args.iter().any(|a| a == "--area") || args.iter().any(|a| a == "kubelet") {
        let kubelet = Module::new("kubernetes")?.build("kubelet", "k8s.io/kubernetes/cmd/kubelet")?;
        let link = module.out().join("kubelet");
        let _ = fs::remove_file(&link);
        symlink(kubelet, link)?;
    }
    Ok(module.out().to_owned())
}

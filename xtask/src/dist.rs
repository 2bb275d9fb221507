//! `cargo xtask dist <part>`: archives for machines that Oaks does not manage.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::sh;

/// The documented list, as it stands there.
const CONFLIST: &str = include_str!("../../crates/cni/10-azure.conflist");

pub fn run(args: &[String]) -> Result<()> {
    match args {
        [part] if part == "cni" => {
            let archive = cni(&sh::root().join("target/dist"))?;
            println!("{}", archive.display());
            Ok(())
        }
        _ => bail!("cargo xtask dist cni"),
    }
}

/// The plug-ins run on whatever distribution a node has, and the C library's start-up is half of a short process: they
/// are linked statically, against musl if rustup has or gets that target, else against glibc.
const TARGET: &str = "x86_64-unknown-linux-musl";
const SECOND_TARGET: &str = "x86_64-unknown-linux-gnu";

fn static_target() -> &'static str {
    let there = || {
        let sysroot = sh::read("rustc", &["--print", "sysroot"])?;
        Ok::<bool, anyhow::Error>(
            Path::new(&sysroot)
                .join("lib/rustlib")
                .join(TARGET)
                .join("lib")
                .is_dir(),
        )
    };
    let got = there().unwrap_or(false)
        || (sh::have("rustup")
            && sh::retry("rustup target add", || sh::run("rustup", &["target", "add", TARGET])).is_ok());
    if got {
        return TARGET;
    }
    eprintln!(
        "no {TARGET} for this toolchain (`rustup target add {TARGET}`): linking against glibc, 0.5 ms slower a call"
    );
    SECOND_TARGET
}

/// Builds programs of the crate `cni` small and static; returns the folder that holds them.
pub fn small_cni(args: &[&str]) -> Result<PathBuf> {
    let target = static_target();
    let build = [
        "build",
        "-p",
        "cni",
        "--profile",
        "small",
        "--locked",
        "--target",
        target,
    ];
    sh::run_in(
        &sh::root(),
        "cargo",
        &[&build[..], &["--target-dir", "target/static"], args].concat(),
        &[("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static")],
    )?;
    Ok(sh::root().join("target/static").join(target).join("small"))
}

/// `v` and the workspace's version.
pub fn version() -> Result<String> {
    let manifest = fs::read_to_string(sh::root().join("Cargo.toml")).context("reading Cargo.toml")?;
    let line = manifest
        .lines()
        .skip_while(|l| l.trim() != "[workspace.package]")
        .find_map(|l| l.strip_prefix("version = \""));
    let version = line.and_then(|l| l.split('"').next());
    Ok(format!(
        "v{}",
        version.context("Cargo.toml has no workspace.package.version")?
    ))
}

/// Makes `azure-vnet-cni-linux-amd64-<version>.tgz`, its `.sha256` and the installer beside it; returns the archive.
pub fn cni(out: &Path) -> Result<PathBuf> {
    let built = small_cni(&["--bins"])?;
    let stage = out.join("stage");
    if stage.exists() {
        fs::remove_dir_all(&stage)?;
    }
    fs::create_dir_all(&stage)?;
    for program in ["azure-vnet", "azure-vnet-ipam"] {
        fs::copy(built.join(program), stage.join(program)).with_context(|| format!("copying {program}"))?;
    }
    fs::write(stage.join("10-azure.conflist"), CONFLIST)?;
    let files = ["azure-vnet", "azure-vnet-ipam", "10-azure.conflist"];
    fs::write(stage.join("SHA256SUMS"), sums(&stage, &files)?)?;

    let name = format!("azure-vnet-cni-linux-amd64-{}.tgz", version()?);
    let archive = out.join(&name);
    let (target, folder) = (archive.to_string_lossy(), stage.to_string_lossy());
    // Without time and name in gzip's header the same files give the same archive.
    let mut args = vec![
        "-I",
        "gzip -n -9",
        "-cf",
        &target,
        "-C",
        &folder,
        "--owner=0",
        "--group=0",
        "--numeric-owner",
    ];
    args.extend(["--sort=name", "--mtime=@0"]);
    args.extend(files);
    args.push("SHA256SUMS");
    sh::run("tar", &args)?;
    fs::write(out.join(format!("{name}.sha256")), sums(out, &[&name])?)?;
    fs::copy(
        sh::root().join("scripts/install-cni-plugin.sh"),
        out.join("install-cni-plugin.sh"),
    )?;
    fs::remove_dir_all(stage)?;
    Ok(archive)
}

/// Lines as `sha256sum` writes them.
fn sums(dir: &Path, files: &[&str]) -> Result<String> {
    let paths: Vec<String> = files
        .iter()
        .map(|f| dir.join(f).to_string_lossy().into_owned())
        .collect();
    let text = sh::read("sha256sum", &paths.iter().map(String::as_str).collect::<Vec<_>>())?;
    let prefix = format!("{}/", dir.display());
    Ok(format!("{}\n", text.replace(&prefix, "")))
}

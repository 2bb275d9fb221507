//! `cargo xtask bench <part> [--json]`: ours and its peers in one run.

use anyhow::{Result, bail};

use crate::{dist, sh};

const TARGET: &str = "x86_64-unknown-linux-gnu";

pub fn run(args: &[String]) -> Result<()> {
    match args.split_first() {
        Some((part, rest)) if part == "cni" => cni(rest),
        _ => bail!("cargo xtask bench cni|platform [--json]"),
    }
}

/// The plug-in as it is shipped, against a static program with the same netlink calls and the distribution's plug-ins.
fn cni(args: &[String]) -> Result<()> {
    let own = dist::small_cni()?;
    let build = [
        "build",
        "-p",
        "cni",
        "--bin",
        "bare",
        "--features",
        "bare",
        "--profile",
        "small",
        "--locked",
    ];
    sh::run_in(
        &sh::root(),
        "cargo",
        &[&build[..], &["--target", TARGET, "--target-dir", "target/static"]].concat(),
        &[("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static")],
    )?;
    let bare = sh::root().join("target/static").join(TARGET).join("small/bare");
    let (own, bare) = (own.to_string_lossy(), bare.to_string_lossy());
    let mut run = vec![
        "run",
        "-q",
        "-p",
        "cni",
        "--example",
        "bench",
        "--locked",
        "--",
        &own,
        &bare,
    ];
    run.extend(args.iter().map(String::as_str));
    sh::run("cargo", &run)
}

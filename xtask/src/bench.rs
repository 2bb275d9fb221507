//! `cargo xtask bench <part> [--json]`: ours and its peers in one run.

use anyhow::{Result, bail};

use crate::{dist, setup, sh};

pub fn run(args: &[String]) -> Result<()> {
    match args.split_first() {
        Some((part, rest)) if part == "cni" => cni(rest),
        Some((part, rest)) if part == "vnet" => vnet(rest),
        _ => bail!("cargo xtask bench cni|vnet|platform [--json]"),
    }
}

/// The plug-in as it is shipped, against a static program with the same netlink calls and the distribution's plug-ins.
fn cni(args: &[String]) -> Result<()> {
    let plugins = sh::step("containernetworking-plugins", || {
        setup::debian(&["containernetworking-plugins"])
    })?;
    let tables = sh::step("iptables", setup::iptables)?;
    let own = dist::small_cni(&["--bins", "--features", "bench"])?;
    let mut run: Vec<String> = [own.clone(), plugins.join("usr/lib/cni")]
        .iter()
        .chain(&tables)
        .map(|p| p.to_string_lossy().into_owned())
        .collect();
    run.extend(args.iter().cloned());
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    sh::run(&own.join("bench-cni").to_string_lossy(), &run)
}

/// Virtual networks against the same namespaces with plain routes, and a network of 16,000 addresses.
fn vnet(args: &[String]) -> Result<()> {
    setup::packages()?;
    setup::install(&[("iperf3", "iperf3")])?;
    let run = [
        "run",
        "-q",
        "--release",
        "-p",
        "vnet",
        "--example",
        "bench",
        "--locked",
        "--",
    ];
    let args = args.iter().map(String::as_str);
    sh::run("cargo", &run.into_iter().chain(args).collect::<Vec<_>>())
}

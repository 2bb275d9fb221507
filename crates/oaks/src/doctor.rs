//! `oaks doctor`: what this host lacks and what is in the way. Every check has an id, a finding and, if it failed, a fix.

use std::{fs, path::Path};

use anyhow::{Result, bail};
use serde::Serialize;

use crate::{
    cli::{Output, Settings},
    process, up,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    /// Works, with a limit worth knowing.
    Note,
    Failed,
}

#[derive(Clone, Debug, Serialize)]
pub struct Check {
    pub id: &'static str,
    pub level: Level,
    pub finding: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fix: String,
}

fn ok(id: &'static str, finding: impl Into<String>) -> Check {
    Check {
        id,
        level: Level::Ok,
        finding: finding.into(),
        fix: String::new(),
    }
}

fn note(id: &'static str, finding: impl Into<String>, fix: impl Into<String>) -> Check {
    Check {
        id,
        level: Level::Note,
        finding: finding.into(),
        fix: fix.into(),
    }
}

fn failed(id: &'static str, finding: impl Into<String>, fix: impl Into<String>) -> Check {
    Check {
        id,
        level: Level::Failed,
        finding: finding.into(),
        fix: fix.into(),
    }
}

/// Runs all checks and prints them; fails if one failed.
pub fn run(settings: &Settings, output: Output) -> Result<()> {
    let checks = checks(settings);
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&checks)?),
        Output::Table => {
            for c in &checks {
                let mark = match c.level {
                    Level::Ok => "ok    ",
                    Level::Note => "note  ",
                    Level::Failed => "FAILED",
                };
                println!("{mark} {:<14} {}", c.id, c.finding);
                if !c.fix.is_empty() {
                    println!("       {:<14} -> {}", "", c.fix);
                }
            }
        }
    }
    let bad = checks.iter().filter(|c| c.level == Level::Failed).count();
    if bad > 0 {
        bail!("{bad} checks failed");
    }
    Ok(())
}

pub fn checks(settings: &Settings) -> Vec<Check> {
    let mut out = vec![capabilities(), cgroups(), filesystems()];
    out.push(
        match machines::tree::Binaries::beside(
            &std::env::current_exe().unwrap_or_default(),
            settings.libexec.as_deref(),
        ) {
            Ok(b) => ok(
                "binaries",
                format!("helpers are in {}", b.init.parent().unwrap_or(Path::new("/")).display()),
            ),
            Err(e) => failed(
                "binaries",
                e.to_string(),
                "cargo build --workspace --bins, or --libexec DIR",
            ),
        },
    );
    out.push(pool(settings));
    let running = process::find(&settings.paths, "server").is_some();
    for (flag, addr) in [
        ("--api-listen", settings.api_listen),
        ("--arm-listen", settings.arm_listen),
    ] {
        out.push(if running {
            ok("ports", format!("{flag} {addr}: held by the running instance"))
        } else {
            match std::net::TcpListener::bind(addr) {
                Ok(_) => ok("ports", format!("{flag} {addr} is free")),
                Err(e) => failed(
                    "ports",
                    format!("{flag} {addr}: {e}"),
                    format!(
                        "free the port (ss -ltnp 'sport = :{}') or choose another with {flag}",
                        addr.port()
                    ),
                ),
            }
        });
    }
    out.push(note(
        "isolation",
        "namespace machines share this host's kernel: they are no boundary between tenants who do not trust each other",
        "give each such tenant a host (or a VM) of its own",
    ));
    out
}

fn capabilities() -> Check {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let missing = up::missing_capabilities(&status);
    if missing.is_empty() {
        return ok("capabilities", "all that is needed");
    }
    let names: Vec<String> = missing.iter().map(|(n, what)| format!("{n} ({what})")).collect();
    failed(
        "capabilities",
        format!("missing: {}", names.join(", ")),
        "run as root: sudo oaks doctor",
    )
}

fn cgroups() -> Check {
    match linux::cgroup::Hierarchy::detect() {
        Ok(h) if h.version() == linux::cgroup::Version::V2 => ok("cgroups", "version 2"),
        Ok(_) => ok("cgroups", "version 1 (the unified hierarchy has no controllers here)"),
        Err(e) => failed(
            "cgroups",
            stdx::chain(&e).to_string(),
            "mount cgroup2 at /sys/fs/cgroup, or the v1 controllers cpu, memory and pids below it",
        ),
    }
}

fn filesystems() -> Check {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = |name: &str| known.lines().any(|l| l.split_whitespace().next_back() == Some(name));
    if has("overlay") {
        ok("overlayfs", "present")
    } else {
        failed("overlayfs", "the kernel does not offer overlayfs", "modprobe overlay")
    }
}

/// The pool must not be routed already: the routes of the host would hide ours, or ours theirs.
fn pool(settings: &Settings) -> Check {
    let running = process::find(&settings.paths, "host").is_some();
    if running {
        return ok(
            "public-pool",
            format!("{} is routed to the edge of the running instance", settings.public_pool),
        );
    }
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    match overlapping_route(&routes, settings.public_pool) {
        None => ok("public-pool", format!("{} is free", settings.public_pool)),
        Some(route) => failed(
            "public-pool",
            format!("the host already routes {route}"),
            "choose another pool: oaks up --public-pool 198.18.0.0/16",
        ),
    }
}

/// First route of `/proc/net/route` (other than the default one) that overlaps `pool`.
fn overlapping_route(table: &str, pool: ipnet::Ipv4Net) -> Option<String> {
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace();
        let link = fields.next()?;
        let dest = u32::from_str_radix(fields.next()?, 16).ok()?.swap_bytes();
        let mask = u32::from_str_radix(fields.nth(5)?, 16).ok()?.swap_bytes();
        let net = ipnet::Ipv4Net::new(dest.into(), mask.leading_ones() as u8).ok()?;
        let overlaps = net.prefix_len() > 0 && (net.contains(&pool) || pool.contains(&net));
        overlaps.then(|| format!("{net} through {link}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_an_overlapping_route() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t010000C6\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            eth1\t000A13C6\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let found = overlapping_route(table, "198.19.0.0/16".parse().unwrap());
        assert_eq!(found.as_deref(), Some("198.19.10.0/24 through eth1"));
        assert_eq!(overlapping_route(table, "10.0.0.0/8".parse().unwrap()), None);
    }
}

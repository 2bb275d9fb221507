//! `cargo xtask conformance cni`: the installed plug-ins driven by real callers, each area in a host of its own on a real
//! virtual network. Prints one line per case and one per area; with `--json` only `{"area", "passed", "failed", "skipped"}`.
//!
//! The program starts itself once more per area, inside the area's host (see [`world`]).

mod cnitool;
mod containerd;
mod image;
mod kubelet;
mod podman;
mod report;
mod suite;
mod tools;
mod world;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use report::Report;
use tools::Tools;
use world::World;

/// In the order in which they run: cheap ones first.
const AREAS: &[(&str, Run)] = &[
    ("cnitool", cnitool::run),
    ("suite-reference", suite::reference),
    ("suite", suite::ours),
    ("podman", podman::run),
    ("containerd", containerd::run),
    ("kubelet", kubelet::run),
];

type Run = fn(&World, &Tools, &mut Report) -> Result<()>;

/// Joins the cgroups of the host's first process and makes them the root of a cgroup namespace: runtimes make theirs below
/// and they go with the host.
const JOIN: &str = r#"
while IFS=: read -r _ controllers path; do
    [ -n "$controllers" ] || [ -e /sys/fs/cgroup/cgroup.procs ] || continue
    echo 0 > "/sys/fs/cgroup/${controllers#name=}$path/cgroup.procs" || exit 9
done < /proc/1/cgroup
exec unshare --cgroup -- "$0" "$@""#;

const USAGE: &str = "conformance --plugins DIR --conflist FILE --tools DIR [--area NAME]... [--json]   (areas that need no tool run without)";

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (mut plugins, mut conflist, mut tools, mut areas, mut json, mut inside) =
        (None, None, None, vec![], false, None);
    while let Some(arg) = args.next() {
        if arg == "--json" {
            json = true;
            continue;
        }
        let value = args.next().with_context(|| format!("{arg} needs a value\n{USAGE}"))?;
        match arg.as_str() {
            "--plugins" => plugins = Some(PathBuf::from(value)),
            "--conflist" => conflist = Some(PathBuf::from(value)),
            "--tools" => tools = Some(PathBuf::from(value)),
            "--area" => areas.push(value),
            "--inside" => inside = Some(value),
            _ => bail!("unknown argument {arg}\n{USAGE}"),
        }
    }
    let tools = Tools {
        plugins: plugins.context(USAGE)?.canonicalize()?,
        conflist: conflist.context(USAGE)?.canonicalize()?,
        peers: tools.context(USAGE)?.canonicalize()?,
    };
    let known = |name: &str| AREAS.iter().find(|(n, _)| *n == name);
    if let Some(area) = inside {
        let (_, run) = known(&area).context("an area")?;
        let mut report = Report;
        let ended = World::enter(&tools).and_then(|world| run(&world, &tools, &mut report));
        report.end(ended);
        return Ok(());
    }
    if let Some(unknown) = areas.iter().find(|a| known(a).is_none()) {
        let names: Vec<&str> = AREAS.iter().map(|(name, _)| *name).collect();
        bail!("there is no area {unknown}; there are: {names:?}");
    }
    let mut failed = 0;
    for (area, _) in AREAS {
        if !areas.is_empty() && !areas.iter().any(|a| a == area) {
            continue;
        }
        tools.fetch(area);
        let host = testkit::Host::new()?;
        let mut command = host.command("sh");
        command.args(["-c", JOIN]).arg(std::env::current_exe()?);
        let outcome = report::read(command.args(tools.arguments(area)), area)?;
        failed += outcome.failed.len();
        outcome.print(json);
    }
    if failed > 0 {
        bail!("{failed} cases failed");
    }
    Ok(())
}

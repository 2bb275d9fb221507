//! The reference plug-ins' integration suite, unmodified: first with the reference plug-ins, so that a failure with ours is
//! ours, then with lists that name `azure-vnet` in their place.
//!
//! Its hosts are empty network namespaces. Ours needs a NIC, so the `cnitool` that the suite finds in `PATH` gives the
//! namespace one (as a cloud would have) and then becomes the real `cnitool`.
//!
//! The other suites of the reference plug-ins do not apply: those of bridge, ptp, macvlan, host-local and the like call the
//! plug-ins' own Go functions in process, and portmap's names `ptp` in compiled-in lists.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{
    report::Report,
    tools::{Tools, wrapper},
    world::World,
};

pub fn reference(world: &World, tools: &Tools, report: &mut Report) -> Result<()> {
    run(world, tools, report, false)
}

pub fn ours(world: &World, tools: &Tools, report: &mut Report) -> Result<()> {
    run(world, tools, report, true)
}

/// `(path below testdata, list)`: the suite's networks by name, address range and chained plug-in.
fn lists() -> Vec<(&'static str, Value)> {
    let ours = |mode: &str, bridge: &str, third: &str| {
        json!({"type": "azure-vnet", "mode": mode, "bridge": bridge, "master": "nic0", "mtu": 512,
            "stateDir": format!("/run/suite-{third}"), "ipam": {"type": "azure-vnet-ipam",
            "pools": [{"subnet": format!("{third}.0/24"), "addresses": [format!("{third}.20-{third}.29")]}]}})
    };
    let bandwidth = |rate: u64, burst: u64| {
        json!({"type": "bandwidth", "runtimeConfig": {"bandWidth": {"ingressRate": rate, "ingressBurst": burst,
            "egressRate": rate, "egressBurst": burst}}})
    };
    let list =
        |version: &str, name: &str, plugins: &[Value]| json!({"cniVersion": version, "name": name, "plugins": plugins});
    vec![
        (
            "basic-ptp.conflist",
            list("0.3.0", "basic-ptp", &[ours("transparent", "", "10.1.2")]),
        ),
        (
            "chained-ptp-bandwidth.conflist",
            list(
                "0.3.1",
                "chained-ptp-bandwidth",
                &[ours("transparent", "", "10.9.2"), bandwidth(800, 200)],
            ),
        ),
        (
            "basic-bridge/network-chain-test.conflist",
            list(
                "0.3.1",
                "network-chain-test",
                &[ours("bridge", "test-bridge-0", "10.11.2")],
            ),
        ),
        (
            "chained-bridge-bandwidth/network-chain-test.conflist",
            list(
                "0.3.1",
                "network-chain-test",
                &[ours("bridge", "test-bridge-1", "10.12.2"), bandwidth(8000, 16000)],
            ),
        ),
    ]
}

/// The NIC, with the first address of each range, then the real tool. The suite's own cleaning calls come here as well.
fn cnitool(real: &Path) -> String {
    format!(
        "if ! ip link show nic0 >/dev/null 2>&1; then
    ip link set lo up && ip link add nic0 type veth peer name wire0 && ip link set wire0 up && ip link set nic0 up || exit 1
    for range in 10.1.2 10.9.2 10.11.2 10.12.2; do ip addr add $range.4/24 dev nic0 || exit 1; done
    ip route add default via 10.1.2.1 || exit 1
fi
exec {} \"$@\"",
        real.display()
    )
}

fn run(world: &World, tools: &Tools, report: &mut Report, ours: bool) -> Result<()> {
    let dir = world.dir.join("suite");
    let (work, bin) = (dir.join("integration"), dir.join("path"));
    fs::create_dir_all(&work)?;
    fs::create_dir_all(&bin)?;
    std::os::unix::fs::symlink("/opt/cni/bin", dir.join("bin"))?;
    let real = tools.peer("cnitool");
    if ours {
        wrapper(&bin.join("cnitool"), &cnitool(&real))?;
        for (path, list) in lists() {
            let file = work.join("testdata").join(path);
            fs::create_dir_all(file.parent().context("a list lies in a folder")?)?;
            fs::write(file, list.to_string())?;
        }
    } else {
        std::os::unix::fs::symlink(&real, bin.join("cnitool"))?;
        std::os::unix::fs::symlink(tools.peer("integration-testdata"), work.join("testdata"))?;
    }
    // The suite builds its echo programs: these are built already.
    wrapper(
        &bin.join("go"),
        &format!(
            "while [ $# -gt 0 ]; do [ \"$1\" = -o ] && out=$2; last=$1; shift; done\nexec cp {}/echo-${{last##*/}} \"$out\"",
            tools.peers.display()
        ),
    )?;
    let results = dir.join("report.json");
    let out = Command::new(tools.peer("integration.test"))
        .arg(format!("--ginkgo.json-report={}", results.display()))
        .arg("--ginkgo.no-color")
        .current_dir(&work)
        .env("PATH", format!("{}:{}", bin.display(), world.path()))
        .output()
        .context("starting the suite")?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    let text = fs::read(&results).with_context(|| format!("the suite left no report:\n{said}"))?;
    let suites: Value = serde_json::from_slice(&text)?;
    let specs = suites[0]["SpecReports"]
        .as_array()
        .context("the suite's report has specs")?;
    let mut count = 0;
    for spec in specs.iter().filter(|s| s["LeafNodeType"] == "It") {
        let mut name: Vec<&str> = spec["ContainerHierarchyTexts"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        name.extend(spec["LeafNodeText"].as_str());
        let outcome = match spec["State"].as_str() {
            Some("passed") => Ok(()),
            Some(state @ ("skipped" | "pending")) => {
                report.skip(&name.join(" "), state);
                continue;
            }
            _ => Err(anyhow::anyhow!(
                "{} {}",
                spec["Failure"]["Message"],
                spec["CapturedGinkgoWriterOutput"]
            )),
        };
        report.done(&name.join(" "), outcome);
        count += 1;
    }
    anyhow::ensure!(count > 0, "the suite ran no spec:\n{said}");
    Ok(())
}

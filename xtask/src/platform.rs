//! `cargo xtask bench platform`: release build, then five rounds of up, bench and down, each in a host of its own
//! (namespaces; nothing of the real host is touched).

use std::{collections::BTreeMap, fs, process::Command};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{setup, sh};

const ROUNDS: usize = 5;

pub fn run(args: &[String]) -> Result<()> {
    platform(args.iter().any(|a| a == "--json"))
}

fn platform(json: bool) -> Result<()> {
    sh::step("system packages", setup::packages)?;
    sh::step("build", || {
        sh::run("cargo", &["build", "--workspace", "--bins", "--release", "--locked"])
    })?;
    // Packages are downloaded here: a round's host has no route anywhere.
    for image in ["front", "store"] {
        let data = scratch().join("data").to_string_lossy().into_owned();
        let recipe = sh::root().join("demo").join(image).to_string_lossy().into_owned();
        let oaks = sh::root().join("target/release/oaks").to_string_lossy().into_owned();
        sh::run(&oaks, &["image", "build", &recipe, "--data-dir", &data])?;
    }
    let mut samples: BTreeMap<String, (String, Vec<f64>)> = BTreeMap::new();
    let mut add = |case: &str, unit: &str, value: f64| {
        samples
            .entry(case.to_owned())
            .or_insert((unit.to_owned(), vec![]))
            .1
            .push(value)
    };
    for round in 0..ROUNDS {
        for line in sh::step(&format!("round {}", round + 1), one_round)?.lines() {
            if let Some(seconds) = line.strip_prefix("up ").and_then(|s| s.parse::<f64>().ok()) {
                add("oaks up: start to ready", "ms", seconds * 1e3);
            } else if let Some((at, what)) = line.strip_prefix('[').and_then(|l| l.split_once(" s] ")) {
                if what.starts_with("API server answers") {
                    add(
                        "oaks up: start to API answering",
                        "ms",
                        at.trim().parse::<f64>().unwrap_or_default() * 1e3,
                    );
                }
            } else if let Ok(v) = serde_json::from_str::<Value>(line) {
                match (v["case"].as_str(), v["step"].as_str()) {
                    (Some(case), _) => add(
                        case,
                        v["unit"].as_str().unwrap_or_default(),
                        v["ours"].as_f64().unwrap_or_default(),
                    ),
                    (_, Some(step)) => add(&format!("demo: {step}"), "ms", v["atMs"].as_f64().unwrap_or_default()),
                    _ => {}
                }
            }
        }
    }
    let _ = fs::remove_dir_all(scratch());
    for (case, (unit, mut values)) in samples {
        values.sort_by(f64::total_cmp);
        let median = values[values.len() / 2];
        if json {
            println!(
                "{}",
                serde_json::json!({"bench": "platform", "case": case, "unit": unit, "ours": median, "peer": null, "note": format!("median of {}", values.len())})
            );
        } else {
            println!(
                "{case:<56} {median:>10.1} {unit:<3} (min {:.1}, max {:.1}, {} rounds)",
                values[0],
                values[values.len() - 1],
                values.len()
            );
        }
    }
    Ok(())
}

fn scratch() -> std::path::PathBuf {
    std::env::temp_dir().join(format!("oaks-bench-{}", std::process::id()))
}

/// Output of one round: up, demo, bench, down.
fn one_round() -> Result<String> {
    let root = sh::root();
    let dir = scratch();
    fs::create_dir_all(&dir)?;
    let script = format!(
        "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/lock && ip link set lo up && \
         export HOME={dir} OAKS_INSTANCE=oaksb OAKS_DATA_DIR={dir}/data OAKS_UPLINK=none && \
         s=$(date +%s.%N) && {oaks} up && e=$(date +%s.%N) && echo up $(echo \"$e $s\" | awk '{{print $1-$2}}') && \
         {oaks} bench --json --image {root}/demo/store && {oaks} demo --dir {root}/demo --json && {oaks} down",
        dir = dir.display(),
        root = root.display(),
        oaks = root.join("target/release/oaks").display(),
    );
    let out = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            &script,
        ])
        .output()
        .context("starting unshare")?;
    // Packages are kept between rounds; state is not.
    for sub in [
        "data/server",
        "data/host/machines",
        "data/host/groups",
        "data/log",
        ".kube",
    ] {
        let _ = fs::remove_dir_all(dir.join(sub));
    }
    if !out.status.success() {
        bail!(
            "a round failed:\n{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

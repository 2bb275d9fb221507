//! `oaks status`: the processes of the instance, what they listen on, the machines, and what the network dropped or refused.

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    cli::{Output, Settings},
    paths::Paths,
    process,
};

/// Prints the status; fails if the instance is down or half up, so that scripts can ask.
pub fn run(settings: &Settings, output: Output) -> Result<()> {
    let paths = &settings.paths;
    let status = collect(paths);
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
        Output::Table => print_table(&status),
    }
    let up = status["processes"]
        .as_array()
        .is_some_and(|p| p.iter().all(|p| p["running"] == true));
    anyhow::ensure!(
        up,
        "instance {} is not (wholly) up; `oaks up` starts what is missing",
        paths.instance
    );
    Ok(())
}

fn collect(paths: &Paths) -> Value {
    let processes: Vec<Value> = crate::hosts::processes(paths)
        .iter()
        .chain([&crate::keeper::KEEPER])
        .map(|name| {
            let found = process::find(paths, name);
            let ready: Value = std::fs::read(paths.run.join(format!("{name}.ready")))
                .ok()
                .and_then(|b| serde_json::from_slice(&b).ok())
                .unwrap_or(Value::Null);
            json!({
                "name": name,
                "running": found.is_some(),
                "pid": found.map(|f| f.pid),
                "memoryBytes": found.and_then(|f| resident_bytes(f.pid)),
                "log": paths.log(name),
                "ready": if found.is_some() { ready } else { Value::Null },
            })
        })
        .collect();
    let provider = machines::namespace::NamespaceMachines {
        boot_program: Default::default(),
        run_dir: paths.machines_run(),
    };
    let machines: Vec<Value> = provider
        .known()
        .into_iter()
        .map(|name| {
            let running = provider.running(&name);
            json!({"name": name, "running": running.is_some(), "pid": running.map(|r| r.pid)})
        })
        .collect();
    let dropped: Vec<Value> = vnet::drops(&paths.instance, &paths.run)
        .unwrap_or_default()
        .into_iter()
        .filter(|(_, c)| c.packets > 0)
        .map(|(network, c)| json!({"network": network, "rule": c.comment, "packets": c.packets, "bytes": c.bytes}))
        .collect();
    json!({"dropped": dropped, "instance": paths.instance, "dataDir": paths.data, "runDir": paths.run, "processes": processes, "machines": machines})
}

/// Resident set of one process.
pub fn resident_bytes(pid: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kb: u64 = text
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:"))?
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .ok()?;
    Some(kb * 1024)
}

fn print_table(status: &Value) {
    println!(
        "instance {}  data {}",
        status["instance"].as_str().unwrap_or_default(),
        status["dataDir"].as_str().unwrap_or_default()
    );
    println!(
        "{:<10} {:<8} {:>8} {:>10}  DETAILS",
        "PROCESS", "STATE", "PID", "MEMORY"
    );
    for p in status["processes"].as_array().into_iter().flatten() {
        let memory = p["memoryBytes"]
            .as_u64()
            .map_or_else(String::new, |b| format!("{:.1} MB", b as f64 / 1e6));
        let state = if p["running"] == true { "running" } else { "stopped" };
        let details = match &p["ready"] {
            Value::Object(map) => map
                .iter()
                .map(|(k, v)| format!("{k}={}", v.as_str().map_or_else(|| v.to_string(), str::to_owned)))
                .collect::<Vec<_>>()
                .join(" "),
            _ => p["log"].as_str().unwrap_or_default().to_owned(),
        };
        println!(
            "{:<10} {:<8} {:>8} {:>10}  {details}",
            p["name"].as_str().unwrap_or_default(),
            state,
            p["pid"].to_string(),
            memory
        );
    }
    for d in status["dropped"].as_array().into_iter().flatten() {
        println!(
            "dropped    {:>8} packets   {} in {}",
            d["packets"].to_string(),
            d["rule"].as_str().unwrap_or_default(),
            d["network"].as_str().unwrap_or_default()
        );
    }
    for m in status["machines"].as_array().into_iter().flatten() {
        let state = if m["running"] == true { "running" } else { "stopped" };
        println!(
            "machine    {:<8} {:>8} {:>10}  {}",
            state,
            m["pid"].to_string(),
            "",
            m["name"].as_str().unwrap_or_default()
        );
    }
}

//! `oaks bench`: how fast this host is at the platform's main jobs, on a running instance, through the same APIs that clients
//! use. Makes a resource group of its own and deletes it. Medians; one JSON object per line with `--json`.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use reconcile::{Client, DeleteParams, Informers, ListParams};
use serde_json::{Value, json};

use crate::{
    access::{Arm, ArmAccess, chained, client_of},
    cli::Settings,
    demo::decode_kubeconfig,
    image,
};

const GROUP: &str = "oaks-bench";
const NETWORK_API: &str = "2024-07-01";
const AKS_API: &str = "2025-10-01";
/// Pods started one after the other on each kind of node.
const PODS: usize = 20;
/// Unit of process times in `/proc/<pid>/stat`: fixed by the kernel's ABI.
const USER_HZ: f64 = 100.0;
/// What the last deletion still does is not idleness.
const SETTLE: Duration = Duration::from_secs(3);
/// How long the idle platform is watched.
const IDLE: Duration = Duration::from_secs(10);

struct Report {
    json: bool,
}

impl Report {
    fn line(&self, case: &str, unit: &str, value: f64, note: &str) {
        if self.json {
            println!(
                "{}",
                json!({"bench": "platform", "case": case, "unit": unit, "ours": value, "peer": null, "note": note})
            );
        } else {
            println!("{case:<44} {value:>10.1} {unit:<4} {note}");
        }
    }
}

pub async fn run(settings: &Settings, image_dir: &Path, json: bool) -> Result<()> {
    let report = Report { json };
    image::build(settings, image_dir)
        .await
        .context("building the bench image")?;
    let arm = Arm::login(ArmAccess::read(&settings.paths)?).await?;
    let group = format!("/subscriptions/{}/resourceGroups/{GROUP}", arm.access.subscription);
    let result = measure(settings, &arm, &group, &report).await;
    arm.delete(&group, "2024-11-01")
        .await
        .context("deleting the bench's resource group")?;
    result
}

async fn measure(settings: &Settings, arm: &Arm, group: &str, report: &Report) -> Result<()> {
    arm.put(group, "2024-11-01", &json!({"location": "local"})).await?;
    let vnet = format!("{group}/providers/Microsoft.Network/virtualNetworks/v");
    let delegation =
        json!([{"name": "aci", "properties": {"serviceName": "Microsoft.ContainerInstance/containerGroups"}}]);
    let body = json!({"location": "local", "properties": {"addressSpace": {"addressPrefixes": ["10.241.0.0/16"]}, "subnets": [
        {"name": "nodes", "properties": {"addressPrefix": "10.241.0.0/22"}},
        {"name": "groups", "properties": {"addressPrefix": "10.241.4.0/22", "delegations": delegation}}]}});
    arm.put(&vnet, NETWORK_API, &body).await?;

    let cluster = |name: &str, addons: Value| {
        let id = format!("{group}/providers/Microsoft.ContainerService/managedClusters/{name}");
        let body = json!({"location": "local", "identity": {"type": "SystemAssigned"}, "properties": {
            "dnsPrefix": name, "kubernetesVersion": "", "addonProfiles": addons,
            "agentPoolProfiles": [{"name": "nodepool1", "count": 1, "mode": "System", "vmSize": "", "osType": "Linux",
                "type": "VirtualMachineScaleSets", "vnetSubnetID": format!("{vnet}/subnets/nodes")}],
            "networkProfile": {"networkPlugin": "azure", "serviceCidr": "10.0.0.0/16", "dnsServiceIP": "10.0.0.10"}}});
        (id, body)
    };
    let (first, body) = cluster(
        "bench",
        json!({"aciConnectorLinux": {"enabled": true, "config": {"SubnetName": "groups"}}}),
    );
    let start = Instant::now();
    arm.put(&first, AKS_API, &body).await?;
    report.line(
        "cluster: PUT to Succeeded (1 node + virtual node)",
        "ms",
        ms(start),
        "all nodes Ready",
    );

    let kubeconfig = decode_kubeconfig(
        &arm.post(&format!("{first}/listClusterAdminCredential"), AKS_API)
            .await?,
    )?;
    let client = client_of(&kubeconfig)?;
    let informers = Informers::new(client.clone());
    let nodes: Vec<Node> = client.list(None, &ListParams::default()).await.map_err(chained)?.items;
    for node in &nodes {
        let name = node.metadata.name.clone().unwrap_or_default();
        let kind = if name.contains("virtual-node") {
            "virtual node"
        } else {
            "machine"
        };
        let mut times = Vec::new();
        for n in 0..PODS {
            times.push(
                pod_start(&client, &informers, &name, n)
                    .await
                    .with_context(|| format!("pod {n} on {name}"))?,
            );
        }
        times.sort_by(f64::total_cmp);
        report.line(
            &format!("pod create to Running, {kind}: p50"),
            "ms",
            times[PODS / 2],
            "image cached, one after the other",
        );
        report.line(
            &format!("pod create to Running, {kind}: worst of 20"),
            "ms",
            times[PODS - 1],
            "",
        );
    }

    let (second, body) = cluster("again", json!({}));
    let start = Instant::now();
    arm.put(&second, AKS_API, &body).await?;
    report.line(
        "second cluster: PUT to Succeeded (1 node)",
        "ms",
        ms(start),
        "on the running platform",
    );
    let start = Instant::now();
    arm.delete(&second, AKS_API).await?;
    report.line("second cluster: DELETE to gone", "ms", ms(start), "");
    informers.stop().await;

    idle(settings, report).await
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// One pod from the create call to the watch event that says Running; milliseconds.
async fn pod_start(client: &Client, informers: &Informers, node: &str, n: usize) -> Result<f64> {
    let pods = informers.get::<Pod>();
    pods.wait_synced().await;
    let mut changes = pods.subscribe();
    let name = format!("bench-{n}");
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"}, "spec": {
        "nodeName": node, "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": false,
        "tolerations": [{"operator": "Exists"}],
        "containers": [{"name": "c", "image": "store:1", "command": ["/bin/busybox", "sleep", "3600"]}]}});
    let start = Instant::now();
    let _: Value = client
        .request(http::Method::POST, "/api/v1/namespaces/default/pods", Some(&pod))
        .await
        .map_err(chained)?;
    let phase = |name: &str| {
        pods.get("default", name)
            .and_then(|p| p.status.as_ref()?.phase.clone())
            .unwrap_or_default()
    };
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        while phase(&name) != "Running" {
            if changes.recv().await.is_none() {
                break;
            }
        }
    });
    waited
        .await
        .with_context(|| format!("pod {name} is {:?} after 20 s", phase(&name)))?;
    let took = ms(start);
    client
        .delete::<Pod>(
            Some("default"),
            &name,
            &DeleteParams {
                grace_period_s: Some(0),
                ..DeleteParams::default()
            },
        )
        .await
        .map_err(chained)?;
    tokio::time::timeout(Duration::from_secs(20), async {
        while pods.get("default", &name).is_some() {
            if changes.recv().await.is_none() {
                break;
            }
        }
    })
    .await
    .context("the pod did not go")?;
    Ok(took)
}

/// Memory and CPU of all processes of the instance while nothing is asked of it.
async fn idle(settings: &Settings, report: &Report) -> Result<()> {
    tokio::time::sleep(SETTLE).await;
    let pids = processes(&settings.paths.run)?;
    ensure!(!pids.is_empty(), "no process of the instance was found");
    let before: u64 = pids.iter().filter_map(|p| cpu_ticks(*p)).sum();
    tokio::time::sleep(IDLE).await;
    let after: u64 = pids.iter().filter_map(|p| cpu_ticks(*p)).sum();
    let pss: u64 = pids.iter().filter_map(|p| smaps_kb(*p, "Pss:")).sum();
    let rss: u64 = pids.iter().filter_map(|p| smaps_kb(*p, "Rss:")).sum();
    let note = format!("{} processes; cluster with 1 machine and 1 virtual node", pids.len());
    report.line(
        "idle memory, all processes: proportional set",
        "MB",
        pss as f64 / 1e3,
        &note,
    );
    report.line(
        "idle memory, all processes: sum of resident sets",
        "MB",
        rss as f64 / 1e3,
        "shared pages counted once per process",
    );
    let cpu = (after.saturating_sub(before)) as f64 / USER_HZ / IDLE.as_secs_f64() * 100.0;
    report.line("idle CPU", "%", cpu, "of one core, over 10 s");
    Ok(())
}

/// Our processes: every one whose program is an Oaks binary and that can be told to be this instance's by its run folder or by
/// standing in one of its machines.
fn processes(run: &Path) -> Result<Vec<i32>> {
    let ours = ["oaks", "oaks-init", "oaks-runc"];
    let mut out = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(comm) = fs::read_to_string(entry.path().join("comm")) else {
            continue;
        };
        if !ours.contains(&comm.trim()) || pid == std::process::id() as i32 {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let in_machine =
            line.contains(machines::node_config::PATH) || line.contains(machines::node_config::INIT_SOCKET);
        if in_machine || line.contains(&run.display().to_string()) {
            out.push(pid);
        }
    }
    Ok(out)
}

fn cpu_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

fn smaps_kb(pid: i32, field: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    text.lines()
        .find_map(|l| l.strip_prefix(field))?
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .ok()
}

//! Usage of what runs here: `/stats/summary` and `/metrics/resource`, read from the runtime at the moment of asking. One
//! container that cannot be read blanks nothing but itself. The node's own usage is not known here and not claimed.

use std::fmt::Write;

use http::{Response, StatusCode};
use k8s_openapi::jiff::Timestamp;
use sandbox::{ContainerState, Stats};
use serde_json::{Value, json};

use super::{Body, with_type};
use crate::{
    clock::from_system,
    kubelet::{Core, PodShown},
};

struct Row {
    name: String,
    started: Option<Timestamp>,
    stats: Stats,
}

async fn rows(core: &Core, pod: &PodShown) -> (Vec<Row>, bool) {
    let mut out = Vec::new();
    let mut all = true;
    for c in pod
        .runtime
        .containers
        .iter()
        .filter(|c| c.state == ContainerState::Running)
    {
        match core.config.runtime.container_stats(&c.id).await {
            Ok(stats) => out.push(Row {
                name: c.name.clone(),
                started: c.started_at.map(from_system),
                stats,
            }),
            Err(e) => {
                all = false;
                tracing::debug!(container = %c.id, error = %stdx::chain(&e), "container stats not read");
            }
        }
    }
    (out, all)
}

fn total(rows: &[Row]) -> Stats {
    rows.iter().fold(Stats::default(), |a, r| Stats {
        cpu_usage_core_ns: a.cpu_usage_core_ns + r.stats.cpu_usage_core_ns,
        memory_working_set_bytes: a.memory_working_set_bytes + r.stats.memory_working_set_bytes,
        memory_usage_bytes: a.memory_usage_bytes + r.stats.memory_usage_bytes,
        pids: a.pids + r.stats.pids,
    })
}

fn shape(now: Timestamp, s: &Stats) -> (Value, Value) {
    let time = now.to_string();
    (
        json!({"time": time, "usageCoreNanoSeconds": s.cpu_usage_core_ns}),
        json!({"time": time, "workingSetBytes": s.memory_working_set_bytes, "usageBytes": s.memory_usage_bytes}),
    )
}

pub(super) async fn summary(core: &Core) -> Response<Body> {
    let mut pods = Vec::new();
    for p in core.shown() {
        let (rows, _) = rows(core, &p).await;
        let now = core.now();
        let meta = &p.pod.metadata;
        let containers: Vec<Value> = rows
            .iter()
            .map(|r| {
                let (cpu, memory) = shape(now, &r.stats);
                json!({"name": r.name, "startTime": r.started.map(|t| t.to_string()), "cpu": cpu, "memory": memory})
            })
            .collect();
        let all = total(&rows);
        let (cpu, memory) = shape(now, &all);
        pods.push(json!({
            "podRef": {"name": meta.name, "namespace": meta.namespace, "uid": meta.uid},
            "startTime": p.status.start_time,
            "containers": containers,
            "cpu": cpu,
            "memory": memory,
            "process_stats": {"process_count": all.pids},
        }));
    }
    let body = json!({"node": {"nodeName": core.config.node_name}, "pods": pods});
    with_type(StatusCode::OK, "application/json", body.to_string())
}

pub(super) async fn resource(core: &Core) -> Response<Body> {
    let (mut cpu, mut memory, mut start) = (String::new(), String::new(), String::new());
    let (mut pod_cpu, mut pod_memory) = (String::new(), String::new());
    let mut error = 0;
    for p in core.shown() {
        let (rows, all) = rows(core, &p).await;
        error |= i32::from(!all);
        let at = core.now().as_millisecond();
        let name = p.pod.metadata.name.as_deref().unwrap_or_default();
        let ns = p.pod.metadata.namespace.as_deref().unwrap_or_default();
        let seconds = |ns: u64| ns as f64 / 1e9;
        for r in &rows {
            let labels = format!("{{container=\"{}\",namespace=\"{ns}\",pod=\"{name}\"}}", r.name);
            let _ = writeln!(
                cpu,
                "container_cpu_usage_seconds_total{labels} {} {at}",
                seconds(r.stats.cpu_usage_core_ns)
            );
            let _ = writeln!(
                memory,
                "container_memory_working_set_bytes{labels} {} {at}",
                r.stats.memory_working_set_bytes
            );
            if let Some(t) = r.started {
                let _ = writeln!(
                    start,
                    "container_start_time_seconds{labels} {}",
                    t.as_millisecond() as f64 / 1e3
                );
            }
        }
        if !rows.is_empty() {
            let all = total(&rows);
            let labels = format!("{{namespace=\"{ns}\",pod=\"{name}\"}}");
            let _ = writeln!(
                pod_cpu,
                "pod_cpu_usage_seconds_total{labels} {} {at}",
                seconds(all.cpu_usage_core_ns)
            );
            let _ = writeln!(
                pod_memory,
                "pod_memory_working_set_bytes{labels} {} {at}",
                all.memory_working_set_bytes
            );
        }
    }
    let mut out = String::new();
    for (name, kind, help, lines) in [
        (
            "container_cpu_usage_seconds_total",
            "counter",
            "Cumulative cpu time consumed by the container in core-seconds",
            cpu,
        ),
        (
            "container_memory_working_set_bytes",
            "gauge",
            "Current working set of the container in bytes",
            memory,
        ),
        (
            "container_start_time_seconds",
            "gauge",
            "Start time of the container since unix epoch in seconds",
            start,
        ),
        (
            "pod_cpu_usage_seconds_total",
            "counter",
            "Cumulative cpu time consumed by the pod in core-seconds",
            pod_cpu,
        ),
        (
            "pod_memory_working_set_bytes",
            "gauge",
            "Current working set of the pod in bytes",
            pod_memory,
        ),
    ] {
        let _ = write!(out, "# HELP {name} [STABLE] {help}\n# TYPE {name} {kind}\n{lines}");
    }
    let _ = write!(
        out,
        "# HELP resource_scrape_error [STABLE] 1 if there was an error while getting container metrics, 0 otherwise\n\
         # TYPE resource_scrape_error gauge\nresource_scrape_error {error}\n"
    );
    with_type(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", out)
}

//! The main job, as `cargo xtask up` does it, then faults, then a host as it was.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::instance::Instance;

fn demo_dir() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../demo")
        .to_string_lossy()
        .into_owned()
}

#[test]
fn from_nothing_to_the_application_and_back() -> Result<()> {
    let i = Instance::new()?;
    let demo = demo_dir();
    // Packages are downloaded outside: the host has no route anywhere.
    for image in ["front", "store"] {
        let out = std::process::Command::new(testkit::bin("oaks"))
            .args(["image", "build", &format!("{demo}/{image}"), "--data-dir"])
            .arg(i.data())
            .output()?;
        i.checked("oaks image build", out)?;
    }
    let before = i.host.snapshot()?;

    i.run(&["up"])?;
    let err = i.fails(&["up"])?;
    ensure!(
        err.contains("already up") && err.contains("oaks down"),
        "a second up says: {err}"
    );

    let said = i.run(&["demo", "--dir", &demo, "--json"])?;
    let steps: Vec<Value> = said
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .context("oaks demo --json")?;
    let ids: Vec<&str> = steps.iter().filter_map(|s| s["step"].as_str()).collect();
    ensure!(
        ids == [
            "images",
            "network",
            "cluster",
            "kubeconfig",
            "nodes",
            "applied",
            "answers",
            "counter",
            "burst",
            "reach"
        ],
        "steps: {ids:?}"
    );
    let nodes = i.kubectl(&["get", "nodes", "--no-headers"])?;
    ensure!(
        nodes.lines().filter(|l| l.contains(" Ready ")).count() == 3,
        "kubectl get nodes:\n{nodes}"
    );
    let pods = i.kubectl(&["-n", "shop", "get", "pods", "-o", "wide"])?;
    ensure!(pods.contains("virtual-node"), "no pod shows the virtual node:\n{pods}");
    let log = i.kubectl(&["-n", "shop", "logs", "deploy/store", "--tail=50"])?;
    ensure!(log.contains("Ready to accept connections"), "kubectl logs:\n{log}");
    let pod = i.kubectl(&[
        "-n",
        "shop",
        "get",
        "pods",
        "-l",
        "app=front",
        "-o",
        "jsonpath={.items[0].metadata.name}",
    ])?;
    let echoed = i.kubectl(&["-n", "shop", "exec", &pod, "--", "/bin/busybox", "echo", "a b", "c"])?;
    ensure!(echoed == "a b c\n", "kubectl exec printed {echoed:?}");

    killed_alone_traffic_goes_on(&i)?;

    i.run(&["down", "--purge"])?;
    ensure!(!i.data().exists(), "the data folder is still there");
    let after = i.host.snapshot()?;
    ensure!(
        before == after,
        "the host is not as it was:\n--- before\n{}\n--- after\n{}",
        before.0,
        after.0
    );
    Ok(())
}

/// Server and host agent can each be killed: the application answers, and what is missing comes back by itself.
fn killed_alone_traffic_goes_on(i: &Instance) -> Result<()> {
    let address = i.kubectl(&[
        "-n",
        "shop",
        "get",
        "svc",
        "front",
        "-o",
        "jsonpath={.status.loadBalancer.ingress[0].ip}",
    ])?;
    let visit = |when: &str| -> Result<i64> {
        let page = i
            .host
            .run("curl", &["-sS", "--max-time", "5", &format!("http://{address}/")])
            .with_context(|| format!("{when}: no answer"))?;
        let page: Value = serde_json::from_str(&page).with_context(|| format!("{when}: {page}"))?;
        page["visits"].as_i64().with_context(|| format!("{when}: {page}"))
    };
    let mut last = visit("before")?;
    for process in ["server", "host"] {
        let status = i.status()?;
        let pid = status["processes"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|p| p["name"] == process)
            .and_then(|p| p["pid"].as_i64())
            .context("a pid")?;
        i.host.run("kill", &["-9", &pid.to_string()])?;
        // Every pod goes on, those of the virtual node too: ten connections through the load balancer, all answered.
        for _ in 0..10 {
            let url = format!("http://{address}/healthz");
            let body = i.host.run("curl", &["-sS", "--max-time", "5", &url]);
            let body = body.with_context(|| format!("with the {process} process killed: no answer"))?;
            ensure!(body == "ok\n", "with the {process} process killed: {body:?}");
        }
        // The DNS of container groups lives in the host agent and pauses with it (ARCHITECTURE.md), so a page of a front on
        // the virtual node may have to wait for a name; one on a machine does not.
        let what = format!("with the {process} process killed");
        let now = testkit::eventually(&what, 40, || visit(&what))?;
        ensure!(now > last, "the counter went from {last} to {now}");
        last = now;
        testkit::eventually(&format!("the {process} process comes back"), 60, || i.run(&["status"]))?;
    }
    let nodes = i.kubectl(&["get", "nodes", "--no-headers"])?;
    ensure!(nodes.lines().count() == 3, "after restarts:\n{nodes}");
    testkit::eventually("after restarts", 20, || visit("after restarts"))?;
    Ok(())
}

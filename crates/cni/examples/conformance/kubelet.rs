//! Upstream's kubelet, standalone, with Debian's containerd: a static pod on the documented list alone.

use std::{
    fs::{self, File},
    process::Child,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{
    containerd::{Containerd, tail},
    image,
    report::Report,
    tools::Tools,
    world::{MACHINE, OTHER, World},
};

const READ_ONLY_PORT: u16 = 10255;

pub fn run(world: &World, tools: &Tools, report: &mut Report) -> Result<()> {
    let containerd = Containerd::start(world, tools)?;
    let dir = world.dir.join("kubelet");
    let manifests = dir.join("manifests");
    fs::create_dir_all(&manifests)?;
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "staticPodPath": manifests, "containerRuntimeEndpoint": containerd.endpoint(),
        "readOnlyPort": READ_ONLY_PORT, "enableServer": true,
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs", "failCgroupV1": false, "failSwapOn": false,
        // Not every host grants negative values.
        "oomScoreAdj": 0, "makeIPTablesUtilChains": false, "fileCheckFrequency": "1s", "syncFrequency": "1s",
        "podLogsDir": "/var/log/pods", "evictionHard": {"memory.available": "1Mi"},
    });
    fs::write(dir.join("config.yaml"), config.to_string())?;
    let log = File::create(dir.join("log"))?;
    let process = world
        .command(tools.peer("kubelet"))
        .arg(format!("--config={}", dir.join("config.yaml").display()))
        .arg(format!("--root-dir={}", dir.join("root").display()))
        .arg("--hostname-override=conformance")
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting the kubelet")?;
    let mut kubelet = Kubelet(process);
    report.case(
        "a static pod runs, is ready, and is reached by address and host port",
        || {
            fs::write(manifests.join("web.yaml"), manifest().to_string())?;
            let pod = testkit::eventually("the pod is ready", 90, || {
                if let Ok(Some(status)) = kubelet.0.try_wait() {
                    bail!("the kubelet ended with {status}: {}", tail(&dir.join("log")));
                }
                ready_pod(world).with_context(|| tail(&dir.join("log")))
            })?;
            ensure!(pod.starts_with("10.1.0."), "its address is {pod}");
            let address = format!("{pod}:80");
            let who = world.get(&address, "/cgi-bin/who")?;
            ensure!(who.contains(OTHER), "the pod sees {who} as its caller");
            ensure!(
                world.get(&format!("{MACHINE}:18083"), "/hello")? == "hello",
                "by the host port"
            );
            ensure!(world.reserved()? == 1, "one address is reserved");
            Ok(())
        },
    );
    report.case("with its manifest gone the pod ends and leaves nothing", || {
        fs::remove_file(manifests.join("web.yaml"))?;
        testkit::eventually("the pod is gone", 90, || {
            ensure!(world.reserved()? == 0, "the address is still reserved");
            world.clean()
        })
    });
    Ok(())
}

fn manifest() -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "default"},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "main", "image": image::NAME,
            "imagePullPolicy": "Never", "ports": [{"containerPort": 80, "hostPort": 18083}],
            "readinessProbe": {"httpGet": {"path": "/hello", "port": 80}, "periodSeconds": 1}}]}})
}

/// The pod's address once the kubelet says that it is ready.
fn ready_pod(world: &World) -> Result<String> {
    let text = world.get_local(&format!("127.0.0.1:{READ_ONLY_PORT}"), "/pods")?;
    let list: Value = serde_json::from_str(&text)?;
    let status = &list["items"][0]["status"];
    let ready = status["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|c| c["type"] == "Ready" && c["status"] == "True");
    ensure!(ready, "{status}");
    Ok(status["podIP"]
        .as_str()
        .context("a ready pod has an address")?
        .to_owned())
}

/// Ends with the value.
struct Kubelet(Child);

impl Drop for Kubelet {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

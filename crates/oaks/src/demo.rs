//! `oaks demo`: the main job on a real application, through the same API that az uses. Every step is proved by traffic;
//! the verb succeeds only if all of it held.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use reconcile::{Client, ListParams, Patch};
use serde_json::{Value, json};

use crate::{
    access::{Arm, ArmAccess, chained, client_of},
    cli::Settings,
    image,
    kubeconfig::{self, Target},
    up::Steps,
};

const GROUP: &str = "demo";
const CLUSTER: &str = "demo";
const NETWORK_API: &str = "2024-07-01";
const AKS_API: &str = "2025-10-01";

/// Replicas of `front` that two Standard_DS2_v2 nodes (2 cores each, 500m a pod, one core of the store's and probes' in use)
/// cannot all hold.
const BURST: u32 = 12;

struct Demo {
    steps: Steps,
    json: bool,
}

impl Demo {
    /// One proved step: text for people, one JSON object per line for programs.
    fn proved(&self, id: &str, text: &str) {
        if self.json {
            println!(
                "{}",
                json!({"step": id, "ok": true, "atMs": self.steps.elapsed().as_millis() as u64, "text": text})
            );
        } else {
            self.steps.say(text);
        }
    }
}

pub async fn run(settings: &Settings, dir: &Path, json: bool) -> Result<()> {
    let demo = Demo {
        steps: Steps::default(),
        json,
    };
    for name in ["store", "front"] {
        image::build(settings, &dir.join(name))
            .await
            .with_context(|| format!("building image {name}"))?;
    }
    demo.proved(
        "images",
        "images front:1 (nginx) and store:1 (redis) built from Debian packages, no registry",
    );

    let access = ArmAccess::read(&settings.paths)?;
    let arm = Arm::login(access).await?;
    let group = format!("/subscriptions/{}/resourceGroups/{GROUP}", arm.access.subscription);
    create_cluster(&demo, &arm, &group).await?;

    let id = cluster_id(&group);
    let reply = arm.post(&format!("{id}/listClusterAdminCredential"), AKS_API).await?;
    let kubeconfig = decode_kubeconfig(&reply)?;
    let target = Target::of_user(|k| std::env::var(k).ok()).map_err(chained)?;
    kubeconfig::save(&target, &kubeconfig, false).map_err(chained)?;
    demo.proved(
        "kubeconfig",
        &format!("context {CLUSTER} saved to {}", target.path.display()),
    );
    let client = client_of(&kubeconfig)?;

    let nodes: Vec<Node> = client.list(None, &ListParams::default()).await.map_err(chained)?.items;
    ensure!(
        nodes.len() == 3,
        "three nodes were asked for (two machines, one virtual), {} are there",
        nodes.len()
    );
    for node in &nodes {
        ensure!(
            is_ready(node),
            "node {} is not Ready; look at: kubectl describe node {}",
            name_of(node),
            name_of(node)
        );
    }
    demo.proved(
        "nodes",
        &format!(
            "nodes Ready: {}",
            nodes.iter().map(name_of).collect::<Vec<_>>().join(", ")
        ),
    );

    apply(&client, &dir.join("shop.yaml")).await?;
    demo.proved("applied", "namespace shop with front (LoadBalancer) and store applied");
    let address = load_balancer(&client).await?;
    let first = visit_until(&address, 60)
        .await
        .context("the front never answered on its LoadBalancer address; look at: kubectl -n shop get pods,svc")?;
    demo.proved("answers", &format!("http://{address} answers from the host: {first}"));

    counter_survives(&demo, &client, &address).await?;
    burst(&demo, &client).await?;
    if !demo.json {
        println!("\nEverything held. Next:");
        demo.steps.next(&format!("curl http://{address}/"));
        demo.steps.next("kubectl -n shop get pods -o wide");
        demo.steps
            .next("oaks az    # the same cluster through the unmodified az CLI: az aks show -g demo -n demo");
        demo.steps.next("oaks down --purge");
    }
    Ok(())
}

fn cluster_id(group: &str) -> String {
    format!("{group}/providers/Microsoft.ContainerService/managedClusters/{CLUSTER}")
}

/// The kubeconfig inside a `list*Credential` reply.
pub fn decode_kubeconfig(reply: &Value) -> Result<String> {
    use base64::Engine as _;
    let text = reply["kubeconfigs"][0]["value"]
        .as_str()
        .context("the reply holds no kubeconfig")?;
    Ok(String::from_utf8(
        base64::engine::general_purpose::STANDARD.decode(text)?,
    )?)
}

async fn create_cluster(demo: &Demo, arm: &Arm, group: &str) -> Result<()> {
    arm.put(group, "2024-11-01", &json!({"location": "local"})).await?;
    let vnet = format!("{group}/providers/Microsoft.Network/virtualNetworks/{GROUP}");
    let subnet = |name: &str, prefix: &str, delegations: Value| json!({"name": name, "properties": {"addressPrefix": prefix, "delegations": delegations}});
    let body = json!({"location": "local", "properties": {
        "addressSpace": {"addressPrefixes": ["10.240.0.0/16"]},
        "subnets": [
            subnet("nodes", "10.240.0.0/22", json!([])),
            subnet("groups", "10.240.4.0/22", json!([{"name": "aci", "properties": {"serviceName": "Microsoft.ContainerInstance/containerGroups"}}])),
        ],
    }});
    arm.put(&vnet, NETWORK_API, &body).await?;
    demo.proved(
        "network",
        "resource group demo and VNet 10.240.0.0/16 (subnets nodes, groups) exist",
    );
    let body = json!({"location": "local", "identity": {"type": "SystemAssigned"}, "properties": {
        "dnsPrefix": "demo", "kubernetesVersion": "",
        "agentPoolProfiles": [{
            "name": "nodepool1", "count": 2, "mode": "System", "vmSize": "Standard_DS2_v2", "osType": "Linux",
            "type": "VirtualMachineScaleSets", "vnetSubnetID": format!("{vnet}/subnets/nodes"),
        }],
        "networkProfile": {"networkPlugin": "azure", "serviceCidr": "10.0.0.0/16", "dnsServiceIP": "10.0.0.10", "loadBalancerSku": "standard"},
        "addonProfiles": {"aciConnectorLinux": {"enabled": true, "config": {"SubnetName": "groups"}}},
    }});
    let cluster = arm.put(&cluster_id(group), AKS_API, &body).await?;
    let state = cluster["properties"]["provisioningState"].as_str().unwrap_or("?");
    ensure!(
        state == "Succeeded",
        "cluster demo is {state}, not Succeeded; look at: oaks kubeconfig save oaks-home && kubectl get aks -o yaml"
    );
    demo.proved(
        "cluster",
        "cluster demo with two nodes and the virtual-node add-on is Succeeded",
    );
    Ok(())
}

/// Creates or updates every document of a manifest, as `kubectl apply` would for new objects.
async fn apply(client: &Client, path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    for document in text.split("\n---") {
        let object: Value =
            serde_saphyr::from_str(document).with_context(|| format!("{}: not YAML", path.display()))?;
        let (kind, name) = (
            object["kind"].as_str().unwrap_or_default(),
            object["metadata"]["name"].as_str().unwrap_or_default(),
        );
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
        let collection = match kind {
            "Namespace" => "/api/v1/namespaces".to_owned(),
            "Service" => format!("/api/v1/namespaces/{namespace}/services"),
            "Pod" => format!("/api/v1/namespaces/{namespace}/pods"),
            "Deployment" => format!("/apis/apps/v1/namespaces/{namespace}/deployments"),
            other => bail!("{}: the demo does not apply {other}; use kubectl", path.display()),
        };
        let created: Result<Value, _> = client.request(http::Method::POST, &collection, Some(&object)).await;
        match created {
            Ok(_) => {}
            Err(e) if e.is_already_exists() => {
                client
                    .patch_path::<Value>(&format!("{collection}/{name}"), &Patch::Merge(object.clone()))
                    .await
                    .map_err(chained)?;
            }
            Err(e) => return Err(chained(e)).with_context(|| format!("applying {kind} {name}")),
        }
    }
    Ok(())
}

async fn load_balancer(client: &Client) -> Result<String> {
    until("Service front has no LoadBalancer address", 60, || async {
        let service: Service = client.get(Some("shop"), "front").await.map_err(chained)?;
        let ingress = service
            .status
            .and_then(|s| s.load_balancer)
            .and_then(|l| l.ingress)
            .unwrap_or_default();
        ingress
            .first()
            .and_then(|i| i.ip.clone())
            .context("status.loadBalancer.ingress is empty")
    })
    .await
}

/// One page of the front: `{"pod", "client", "visits"}`.
async fn visit(address: &str) -> Result<Value> {
    let work = async {
        let stream = tokio::net::TcpStream::connect((address, 80)).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = http::Request::get("/")
            .header("host", address)
            .header("connection", "close")
            .body(String::new())?;
        let reply = sender.send_request(request).await?;
        let status = reply.status();
        let body = http_body_util::BodyExt::collect(reply.into_body()).await?.to_bytes();
        ensure!(
            status.is_success(),
            "{status}: {}",
            String::from_utf8_lossy(&body).trim()
        );
        Ok(serde_json::from_slice(&body)?)
    };
    tokio::time::timeout(Duration::from_secs(3), work)
        .await
        .context("no answer within 3 s")?
}

async fn visit_until(address: &str, timeout_s: u64) -> Result<Value> {
    until("the front does not answer", timeout_s, || visit(address)).await
}

async fn counter_survives(demo: &Demo, client: &Client, address: &str) -> Result<()> {
    let before = visit_until(address, 10).await?;
    let pod = before["pod"].as_str().context("the page names no pod")?.to_owned();
    client
        .delete::<Pod>(
            Some("shop"),
            &pod,
            &reconcile::DeleteParams {
                grace_period_s: Some(0),
                ..Default::default()
            },
        )
        .await
        .map_err(chained)?;
    let after = visit_until(address, 30).await?;
    let (a, b) = (
        before["visits"].as_i64().unwrap_or(0),
        after["visits"].as_i64().unwrap_or(0),
    );
    ensure!(b > a, "the counter went from {a} to {b}");
    demo.proved("counter", &format!("front pod {pod} killed; the counter in store went on: {a} -> {b} (the name store.shop.svc.cluster.local resolves)"));
    Ok(())
}

/// More front pods than two nodes hold: the surplus runs on the virtual node, and all reach each other.
async fn burst(demo: &Demo, client: &Client) -> Result<()> {
    let scale = Patch::Merge(json!({"spec": {"replicas": BURST}}));
    client
        .patch_path::<Value>("/apis/apps/v1/namespaces/shop/deployments/front", &scale)
        .await
        .map_err(chained)?;
    let pods = until("not all front pods became Ready", 90, || async {
        let pods: Vec<Pod> = client
            .list(Some("shop"), &ListParams::labels("app=front"))
            .await
            .map_err(chained)?
            .items;
        let ready = pods.iter().filter(|p| pod_ready(p)).count();
        ensure!(
            ready == BURST as usize && pods.len() == BURST as usize,
            "{ready} of {BURST} are Ready"
        );
        Ok(pods)
    })
    .await
    .context("look at: kubectl -n shop get pods -o wide; kubectl -n shop get events")?;
    let nodes: Vec<Node> = client.list(None, &ListParams::default()).await.map_err(chained)?.items;
    let mut chosen = Vec::new();
    for node in &nodes {
        let here = pods
            .iter()
            .find(|p| p.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(name_of(node)));
        let pod = here.with_context(|| format!("no front pod runs on node {}", name_of(node)))?;
        let address = pod
            .status
            .as_ref()
            .and_then(|s| s.pod_ip.clone())
            .context("a ready pod has no address")?;
        chosen.push((name_of(node).to_owned(), address));
    }
    let on_virtual = pods
        .iter()
        .filter(|p| {
            p.spec
                .as_ref()
                .and_then(|s| s.node_name.as_deref())
                .is_some_and(|n| n.contains("virtual"))
        })
        .count();
    demo.proved(
        "burst",
        &format!("front scaled to {BURST}: {on_virtual} run on the virtual node"),
    );

    let started = Instant::now();
    for (node, _) in &chosen {
        let said = probe(client, node, chosen.iter().map(|(_, a)| a.as_str()))
            .await
            .with_context(|| format!("a probe on node {node}"))?;
        let wanted = chosen.len() + 1;
        let reached = said.lines().filter(|l| l.starts_with("ok ")).count();
        ensure!(
            reached == wanted,
            "from node {node} only {reached} of {wanted} targets answered:\n{said}"
        );
    }
    demo.proved(
        "reach",
        &format!(
            "pods on {} nodes reach each other by address and by Service name (3 probes, {:.1} s)",
            chosen.len(),
            started.elapsed().as_secs_f64()
        ),
    );
    Ok(())
}

/// Runs a pod on `node` that fetches a page from every address and from the Service by name; its log.
async fn probe(client: &Client, node: &str, addresses: impl Iterator<Item = &str>) -> Result<String> {
    let name = format!(
        "probe-{}",
        node.chars()
            .rev()
            .take(12)
            .collect::<String>()
            .chars()
            .rev()
            .collect::<String>()
            .trim_start_matches('-')
    );
    let targets: Vec<String> = addresses.map(str::to_owned).chain(["front.shop".to_owned()]).collect();
    let script = format!(
        // Debian's busybox crashes on `wget -T`.
        "b=/bin/busybox; for t in {}; do out=$($b timeout 5 $b wget -q -O - http://$t/ 2>&1) && echo \"ok $t $out\" || echo \"fail $t $out\"; done",
        targets.join(" ")
    );
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "restartPolicy": "Never", "nodeName": node,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "probe", "image": "front:1", "command": ["/bin/sh", "-c", script]}],
        },
    });
    let path = "/api/v1/namespaces/shop/pods";
    let _ = client
        .delete::<Pod>(
            Some("shop"),
            &name,
            &reconcile::DeleteParams {
                grace_period_s: Some(0),
                ..Default::default()
            },
        )
        .await;
    until("the former probe is still there", 20, || async {
        match client
            .request::<Value, Value>(http::Method::POST, path, Some(&pod))
            .await
        {
            Ok(_) => Ok(()),
            Err(e) => Err(chained(e)),
        }
    })
    .await?;
    until("the probe did not end", 60, || async {
        let pod: Pod = client.get(Some("shop"), &name).await.map_err(chained)?;
        let phase = pod.status.and_then(|s| s.phase).unwrap_or_default();
        ensure!(matches!(phase.as_str(), "Succeeded" | "Failed"), "phase {phase}");
        Ok(())
    })
    .await?;
    let body = client.stream(&format!("{path}/{name}/log")).await.map_err(chained)?;
    let bytes = http_body_util::BodyExt::collect(body)
        .await
        .map_err(|e| anyhow::anyhow!(e))?
        .to_bytes();
    client
        .delete::<Pod>(
            Some("shop"),
            &name,
            &reconcile::DeleteParams {
                grace_period_s: Some(0),
                ..Default::default()
            },
        )
        .await
        .map_err(chained)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Polls every 50 ms; the error carries the last reason.
async fn until<T, F: Future<Output = Result<T>>>(what: &str, timeout_s: u64, mut f: impl FnMut() -> F) -> Result<T> {
    let end = tokio::time::Instant::now() + Duration::from_secs(timeout_s);
    loop {
        match f().await {
            Ok(value) => return Ok(value),
            Err(e) if tokio::time::Instant::now() > end => {
                return Err(e.context(format!("{what} (waited {timeout_s} s)")));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

fn name_of(node: &Node) -> &str {
    node.metadata.name.as_deref().unwrap_or_default()
}

fn is_ready(node: &Node) -> bool {
    node.status
        .as_ref()
        .and_then(|s| s.conditions.as_ref())
        .is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

fn pod_ready(pod: &Pod) -> bool {
    pod.status
        .as_ref()
        .and_then(|s| s.conditions.as_ref())
        .is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

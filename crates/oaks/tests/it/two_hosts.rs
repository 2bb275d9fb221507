//! One platform over two hosts: joined by a token, a cluster with a node on each, traffic across, one host lost.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{arm::Arm, instance::Instance};

/// A web pod on each node (two do not fit on one) and one on the virtual node, all behind one Service of type LoadBalancer.
const WORK: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: web }
spec:
  replicas: 2
  selector: { matchLabels: { app: web } }
  template:
    metadata: { labels: { app: web } }
    spec:
      terminationGracePeriodSeconds: 0
      nodeSelector: { kubernetes.azure.com/agentpool: np }
      containers:
        - name: box
          image: box:1
          resources: { requests: { cpu: 1200m } }
          command: [/bin/busybox, sh, -c, "mkdir -p /tmp/www; hostname > /tmp/www/index.html; exec /bin/busybox httpd -f -p 80 -h /tmp/www"]
          readinessProbe: { httpGet: { path: /, port: 80 }, periodSeconds: 1 }
---
apiVersion: v1
kind: Pod
metadata: { name: group, labels: { app: web } }
spec:
  terminationGracePeriodSeconds: 0
  nodeSelector: { type: virtual-kubelet }
  tolerations: [{ operator: Exists }]
  containers:
    - name: box
      image: box:1
      command: [/bin/busybox, sh, -c, "mkdir -p /tmp/www; hostname > /tmp/www/index.html; exec /bin/busybox httpd -f -p 80 -h /tmp/www"]
      readinessProbe: { httpGet: { path: /, port: 80 }, periodSeconds: 1 }
---
apiVersion: v1
kind: Service
metadata: { name: web }
spec: { type: LoadBalancer, selector: { app: web }, ports: [{ port: 80 }] }
"#;

struct Pod {
    name: String,
    node: String,
    address: String,
}

struct Land {
    a: Instance,
    b: Instance,
}

impl Land {
    fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.a.kubectl(&[&["--context", "c"], args].concat())
    }

    fn home(&self, args: &[&str]) -> Result<Value> {
        let all = [&["--context", "oaks-home"], args, &["-o", "json"]].concat();
        Ok(serde_json::from_str(&self.a.kubectl(&all)?)?)
    }

    fn pods(&self) -> Result<Vec<Pod>> {
        let all: Value = serde_json::from_str(&self.kubectl(&["get", "pods", "-l", "app=web", "-o", "json"])?)?;
        let pods = all["items"].as_array().context("a list of pods")?;
        pods.iter()
            .map(|p| {
                let ready = p["status"]["conditions"].as_array().into_iter().flatten();
                let ready = ready.into_iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
                ensure!(ready, "a pod is not Ready: {}", p["status"]);
                let text = |v: &Value| v.as_str().map(str::to_owned).context("a text");
                Ok(Pod {
                    name: text(&p["metadata"]["name"])?,
                    node: text(&p["spec"]["nodeName"])?,
                    address: text(&p["status"]["podIP"])?,
                })
            })
            .collect()
    }

    /// What a pod gets from `url`.
    fn fetch(&self, pod: &str, url: &str) -> Result<String> {
        // Debian's busybox crashes on `wget -T`.
        let busybox = "/bin/busybox";
        let wget = [
            "exec", pod, "--", busybox, "timeout", "5", busybox, "wget", "-q", "-O", "-", url,
        ];
        Ok(self.kubectl(&wget)?.trim().to_owned())
    }

    /// The Service by its cluster address.
    fn service(&self) -> Result<String> {
        let address = self.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
        Ok(format!("http://{address}/"))
    }

    /// Phase of a Host at home.
    fn phase(&self, host: &str) -> Result<String> {
        let host = self.home(&["get", "hosts", host])?;
        Ok(host["status"]["phase"].as_str().unwrap_or_default().to_owned())
    }
}

#[test]
fn a_cluster_over_two_hosts_and_one_of_them_lost() -> Result<()> {
    let land = Land {
        a: Instance::new()?,
        b: Instance::new()?,
    };
    let (a, b) = (&land.a, &land.b);
    a.host.wire("under0", "192.0.2.1/24", &b.host, "192.0.2.2/24")?;
    let before = b.host.snapshot()?;
    a.build_box()?;
    b.build_box()?;

    // Alone: nobody can join, and it says what to do.
    let alone = a.fails(&["host", "token", "b"])?;
    ensure!(alone.contains("oaks up"), "{alone}");
    a.run(&[
        "up",
        "--underlay=192.0.2.1",
        "--api-listen=192.0.2.1:6443",
        "--host-name=a",
    ])?;
    let line = a.run(&["host", "token", "b"])?;
    let token = line.split_whitespace().last().context("a token")?;
    let stranger = b.fails(&["host", "join", "--underlay=192.0.2.9", token])?;
    ensure!(stranger.contains("no such address"), "{stranger}");
    let forged = b.fails(&["host", "join", "--underlay=192.0.2.2", "oaks1.e30"])?;
    ensure!(forged.contains("damaged"), "{forged}");
    b.run(&["host", "join", "--underlay=192.0.2.2", token])?;
    a.run(&["kubeconfig", "save", "oaks-home"])?;
    testkit::eventually("both hosts are Ready", 30, || {
        ensure!(
            land.phase("a")? == "Ready" && land.phase("b")? == "Ready",
            "{}",
            land.home(&["get", "hosts"])?
        );
        Ok::<_, anyhow::Error>(())
    })?;
    least_rights(&land)?;

    Arm::login(a)?.cluster(2)?;
    let machines = land.home(&["get", "machines"])?;
    let places: BTreeMap<String, String> = machines["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|m| {
            Some((
                m["spec"]["nodeName"].as_str()?.to_owned(),
                m["status"]["host"].as_str()?.to_owned(),
            ))
        })
        .collect();
    let mut used: Vec<&str> = places.values().map(String::as_str).collect();
    used.sort_unstable();
    ensure!(used == ["a", "b"], "machines are not spread: {places:?}");

    land.kubectl(&["apply", "-f", &a.file("work.yaml", WORK)?])?;
    let pods = testkit::eventually_every("every pod is Ready", 60, Duration::from_millis(200), || {
        let pods = land.pods()?;
        ensure!(pods.len() == 3, "{} pods", pods.len());
        Ok::<_, anyhow::Error>(pods)
    })?;
    across(&land, &pods)?;
    let lost: Vec<&Pod> = pods
        .iter()
        .filter(|p| places.get(&p.node).is_some_and(|h| h == "b"))
        .collect();
    ensure!(lost.len() == 1, "pods on host b: {}", lost.len());
    host_lost(&land, &pods, lost[0])?;

    b.host.run("ip", &["link", "set", "under0", "up"])?;
    b.run(&["down", "--purge"])?;
    let after = b.host.snapshot()?;
    ensure!(
        before == after,
        "host b after down:\n--- before\n{}\n--- after\n{}",
        before.0,
        after.0
    );
    Ok(())
}

/// Pods, Services, names, logs and exec work whatever the host, and clients of both hosts reach the load balancer.
fn across(land: &Land, pods: &[Pod]) -> Result<()> {
    let service = land.service()?;
    for from in pods {
        for to in pods {
            let page = land.fetch(&from.name, &format!("http://{}/", to.address))?;
            ensure!(page == to.name, "{} asked {} and got {page:?}", from.name, to.name);
        }
        let seen = testkit::eventually("a Service leads to every pod", 30, || {
            let pages: std::collections::BTreeSet<String> = (0..20)
                .map(|_| land.fetch(&from.name, &service))
                .collect::<Result<_>>()?;
            ensure!(pages.len() == pods.len(), "{} saw {pages:?}", from.name);
            Ok::<_, anyhow::Error>(pages)
        })?;
        ensure!(pods.iter().all(|p| seen.contains(&p.name)), "{seen:?}");
        land.kubectl(&["logs", &from.name])?;
        let name = "web.default.svc.cluster.local";
        land.kubectl(&["exec", &from.name, "--", "/bin/busybox", "nslookup", name])?;
    }
    let ingress = "jsonpath={.status.loadBalancer.ingress[0].ip}";
    let address = land.kubectl(&["get", "service", "web", "-o", ingress])?;
    for host in [&land.a.host, &land.b.host] {
        for _ in 0..10 {
            let page = host.run("curl", &["-sS", "--max-time", "3", &format!("http://{address}/")])?;
            ensure!(pods.iter().any(|p| p.name == page.trim()), "{page:?}");
        }
    }
    Ok(())
}

/// Host b dies: its node and its Host are NotReady, its addresses are gone from a's network, everything else goes on.
fn host_lost(land: &Land, pods: &[Pod], lost: &Pod) -> Result<()> {
    let service = land.service()?;
    let kill = "for p in $(ps -eo pid=,args= | awk '$1 != 1 && /[o]aks/ {print $1}'); do kill -9 $p; done; ip link set under0 down";
    land.b.host.run("sh", &["-c", kill])?;
    let near: Vec<&Pod> = pods.iter().filter(|p| p.name != lost.name).collect();
    for (from, to) in [(near[0], near[1]), (near[1], near[0])] {
        let page = land.fetch(&from.name, &format!("http://{}/", to.address))?;
        ensure!(page == to.name, "with the other host lost: {page:?}");
    }
    testkit::eventually("Host b is NotReady", 40, || {
        ensure!(land.phase("b")? == "NotReady", "{}", land.phase("b")?);
        Ok::<_, anyhow::Error>(())
    })?;
    // At once, not by a timeout: there is no route any more.
    testkit::eventually("the lost pod's route is gone", 10, || {
        let routes = land.a.host.run(
            "sh",
            &[
                "-c",
                &format!(
                    "for n in {}/netns/v-*; do nsenter --net=$n ip route; done",
                    land.a.run_dir().display()
                ),
            ],
        )?;
        let gone = !routes
            .lines()
            .any(|l| l.starts_with(&format!("{} ", lost.address)) && l.contains("vxlan"));
        ensure!(gone, "{routes}");
        Ok::<_, anyhow::Error>(())
    })?;
    testkit::eventually_every("the lost node is NotReady", 90, Duration::from_millis(500), || {
        let nodes = land.kubectl(&["get", "nodes", "--no-headers"])?;
        let line = nodes.lines().find(|l| l.starts_with(&lost.node)).unwrap_or_default();
        ensure!(line.contains("NotReady"), "{nodes}");
        Ok::<_, anyhow::Error>(())
    })?;
    testkit::eventually_every(
        "the Service leads past the lost pod",
        30,
        Duration::from_millis(200),
        || {
            for _ in 0..10 {
                let page = land.fetch(&near[0].name, &service)?;
                ensure!(near.iter().any(|p| p.name == page), "{page:?}");
            }
            Ok::<_, anyhow::Error>(())
        },
    )
}

/// A joined host's identity does what its agent needs and nothing beyond.
fn least_rights(land: &Land) -> Result<()> {
    let config = land.b.data().join("host/home.kubeconfig");
    let may = |args: &[&str]| -> Result<bool> {
        let all = [
            &["--kubeconfig", config.to_str().context("a path")?, "auth", "can-i"],
            args,
        ]
        .concat();
        let kubectl = crate::instance::tool("OAKS_TEST_KUBECTL", "kubectl")?;
        let out = land.b.command(kubectl).args(all).output()?;
        let said = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        ensure!(
            ["yes", "no"].contains(&said.as_str()),
            "{args:?}: {said} {}",
            String::from_utf8_lossy(&out.stderr)
        );
        Ok(said == "yes")
    };
    for (args, wanted) in [
        (&["list", "virtualnetworks.oaks.internal"][..], true),
        (&["patch", "hosts.oaks.internal/b"], true),
        (&["patch", "hosts.oaks.internal/a"], false),
        (&["create", "virtualnetworks.oaks.internal"], false),
        (&["delete", "machines.oaks.internal"], false),
        (&["list", "secrets", "-n", "kube-system"], false),
        (&["create", "clusterrolebindings"], false),
        (&["create", "certificatesigningrequests"], false),
    ] {
        let is = may(args)?;
        ensure!(is == wanted, "may host b {args:?}: {is}");
    }
    Ok(())
}

//! Kills and crashes: what runs goes on, what died comes back, nothing is leaked, and `down` always cleans up.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{arm::Arm, instance::Instance};

/// Four web pods on two machines and one on the virtual node, each kind behind a public address.
const WORK: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: web }
spec:
  replicas: 4
  selector: { matchLabels: { app: web } }
  template:
    metadata: { labels: { app: web } }
    spec:
      terminationGracePeriodSeconds: 0
      nodeSelector: { kubernetes.azure.com/agentpool: np }
      containers:
        - name: box
          image: box:1
          command: [/bin/busybox, sh, -c, "echo begun; exec /bin/busybox httpd -f -p 80 -h /www"]
          resources: { requests: { cpu: 500m } }
          readinessProbe: { httpGet: { path: /, port: 80 }, periodSeconds: 1 }
---
apiVersion: v1
kind: Service
metadata: { name: web }
spec: { type: LoadBalancer, selector: { app: web }, ports: [{ port: 80 }] }
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: group }
spec:
  replicas: 1
  selector: { matchLabels: { app: group } }
  template:
    metadata: { labels: { app: group } }
    spec:
      terminationGracePeriodSeconds: 0
      nodeSelector: { type: virtual-kubelet }
      tolerations: [{ operator: Exists }]
      containers:
        - name: box
          image: box:1
          command: [/bin/busybox, sh, -c, "echo begun; exec /bin/busybox httpd -f -p 80 -h /www"]
          readinessProbe: { httpGet: { path: /, port: 80 }, periodSeconds: 1 }
---
apiVersion: v1
kind: Service
metadata: { name: group }
spec: { type: LoadBalancer, selector: { app: group }, ports: [{ port: 80 }] }
"#;

/// A cluster with work on it.
struct Town {
    i: Instance,
    up: Vec<&'static str>,
    machines: usize,
}

impl Town {
    /// Brings an instance up with `up` as its flags and waits until everything answers.
    fn on(i: Instance, up: &[&'static str], nodes: u32) -> Result<Self> {
        i.build_box()?;
        i.run(&[&["up"], up].concat())?;
        Arm::login(&i)?.cluster(nodes)?;
        i.run(&["kubeconfig", "save", "oaks-home"])?;
        let town = Self {
            up: up.to_vec(),
            machines: nodes as usize,
            i,
        };
        town.kubectl(&["apply", "-f", &town.i.file("work.yaml", WORK)?])?;
        town.settled("at first")?;
        Ok(town)
    }

    fn up(&self) -> Result<()> {
        self.i.run(&[&["up"], self.up.as_slice()].concat()).map(drop)
    }

    fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.i.kubectl(&[&["--context", "c"], args].concat())
    }

    fn pods(&self) -> Result<Vec<Value>> {
        let all: Value = serde_json::from_str(&self.kubectl(&["get", "pods", "-o", "json"])?)?;
        all["items"].as_array().cloned().context("a list of pods")
    }

    /// Both public addresses answer.
    fn answers(&self, when: &str) -> Result<()> {
        for service in ["web", "group"] {
            let path = "jsonpath={.status.loadBalancer.ingress[0].ip}";
            let address = self.kubectl(&["get", "service", service, "-o", path])?;
            let url = format!("http://{address}/");
            let page = self.i.host.run("curl", &["-sS", "--max-time", "3", &url]);
            let page = page.with_context(|| format!("{when}: Service {service}"))?;
            ensure!(page == "a page\n", "{when}: Service {service}: {page:?}");
        }
        Ok(())
    }

    /// Waits until every node and pod is Ready again, both addresses answer, and each pod can be entered and read.
    fn settled(&self, when: &str) -> Result<()> {
        let begun = std::time::Instant::now();
        let settle = || -> Result<()> {
            let nodes = self.kubectl(&["get", "nodes", "--no-headers"])?;
            let ready = nodes.lines().filter(|l| l.contains(" Ready ")).count();
            ensure!(ready == self.machines + 1, "nodes:\n{nodes}");
            let pods = self.pods()?;
            let ready = |p: &Value| {
                let conditions = p["status"]["conditions"].as_array();
                conditions
                    .into_iter()
                    .flatten()
                    .any(|c| c["type"] == "Ready" && c["status"] == "True")
            };
            ensure!(
                pods.len() == 5 && pods.iter().all(ready),
                "pods:\n{}",
                self.kubectl(&["get", "pods", "-o", "wide"])?
            );
            self.answers(when)?;
            for pod in &pods {
                let name = pod["metadata"]["name"].as_str().context("a name")?;
                let log = self.kubectl(&["logs", name])?;
                ensure!(log.contains("begun"), "log of {name}: {log:?}");
                let said = self.kubectl(&["exec", name, "--", "/bin/busybox", "echo", "here"])?;
                ensure!(said == "here\n", "exec in {name}: {said:?}");
            }
            Ok(())
        };
        let done = testkit::eventually_every(when, 30, Duration::from_millis(100), settle);
        if done.is_err() {
            println!(
                "{}",
                self.kubectl(&["describe", "pods", "-l", "app=group"])
                    .unwrap_or_default()
            );
            let log = std::fs::read_to_string(self.i.data().join("log/host.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            println!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
        println!("{when}: {:.1} s", begun.elapsed().as_secs_f32());
        done
    }

    /// `pid -> command line` of processes in the host that a predicate picks.
    fn processes(&self, pick: impl Fn(&str) -> bool) -> Result<BTreeMap<i32, String>> {
        let all = self.i.host.run("ps", &["-eo", "pid=,args="])?;
        let lines = all.lines().filter_map(|l| l.trim().split_once(' '));
        Ok(lines
            .filter(|(_, args)| pick(args.trim()))
            .filter_map(|(pid, args)| Some((pid.parse().ok()?, args.trim().to_owned())))
            .collect())
    }

    /// First processes of all containers; the server forks one more per request.
    fn containers(&self) -> Result<BTreeSet<i32>> {
        let all = self.i.host.run("ps", &["-eo", "pid=,ppid=,args="])?;
        let servers: BTreeMap<i32, i32> = all
            .lines()
            .filter(|l| l.contains(" /bin/busybox httpd"))
            .filter_map(|l| {
                let mut words = l.split_whitespace();
                Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
            })
            .collect();
        let first = servers.iter().filter(|(_, parent)| !servers.contains_key(parent));
        Ok(first.map(|(pid, _)| *pid).collect())
    }

    fn kill(&self, pids: impl IntoIterator<Item = i32>) -> Result<()> {
        let pids: Vec<String> = pids.into_iter().map(|p| p.to_string()).collect();
        ensure!(!pids.is_empty(), "nothing to kill");
        let mut args = vec!["-9"];
        args.extend(pids.iter().map(String::as_str));
        // Some of them may end before their turn.
        self.i.host.output("kill", &args)?;
        Ok(())
    }

    /// As [`Self::kill`], and waits until none of them runs.
    fn kill_and_wait(&self, pids: &[i32]) -> Result<()> {
        self.kill(pids.iter().copied())?;
        testkit::eventually("the end of killed processes", 5, || {
            let left = self.processes(|args| !args.contains("<defunct>"))?;
            ensure!(!pids.iter().any(|p| left.contains_key(p)), "{pids:?} still run");
            Ok::<_, anyhow::Error>(())
        })
    }

    /// SIGKILL to every process of every instance in the host, until none is left.
    fn kill_everything(&self) -> Result<()> {
        testkit::eventually("the end of everything", 20, || {
            let ours = self.processes(|args| args.contains("oaks") || args.starts_with("/bin/busybox"))?;
            let ours: BTreeMap<_, _> = ours
                .into_iter()
                .filter(|(pid, args)| *pid != 1 && !args.starts_with("unshare") && !args.contains("<defunct>"))
                .collect();
            if ours.is_empty() {
                return Ok(());
            }
            self.kill(ours.keys().copied())?;
            Err(anyhow::anyhow!("{ours:?}"))
        })
    }

    fn pid(&self, process: &str) -> Result<i32> {
        let file = self.i.run_dir().join(format!("{process}.pid"));
        let text = self.i.host.run("cat", &[&file.to_string_lossy()])?;
        let pid = text.split(' ').next().and_then(|p| p.parse().ok());
        pid.with_context(|| format!("{process}.pid: {text}"))
    }

    /// Interfaces at home and their addresses: how many, and no address twice.
    fn interfaces(&self) -> Result<usize> {
        let all = self
            .i
            .kubectl(&["--context", "oaks-home", "get", "nic", "-o", "json"])?;
        let all: Value = serde_json::from_str(&all)?;
        let nics = all["items"].as_array().context("a list")?;
        let mut seen = BTreeSet::new();
        for nic in nics {
            let configurations = nic["status"]["properties"]["ipConfigurations"].as_array();
            for c in configurations.into_iter().flatten() {
                let address = c["properties"]["privateIPAddress"].as_str().unwrap_or_default();
                ensure!(seen.insert(address.to_owned()), "{address} is given twice: {all}");
            }
        }
        Ok(nics.len())
    }
}

#[test]
fn kills_one_by_one_and_all_at_once() -> Result<()> {
    let i = Instance::new()?;
    let before = i.host.snapshot()?;
    let town = Town::on(i, &[], 2)?;
    let interfaces = town.interfaces()?;

    node_agent_killed(&town)?;
    machine_killed(&town)?;
    supervisor_killed(&town)?;
    host_killed(&town)?;
    keeper_killed(&town)?;
    both_killed(&town)?;
    all_agents_killed(&town)?;
    rebooted(&town)?;
    testkit::eventually("interfaces that nobody uses go", 20, || {
        let now = town.interfaces()?;
        ensure!(now == interfaces, "{interfaces} interfaces became {now}");
        Ok::<_, anyhow::Error>(())
    })?;

    town.kill_everything()?;
    town.i.host.run("rm", &["-rf", &town.i.data().to_string_lossy()])?;
    town.i.run(&["down"])?;
    let after = town.i.host.snapshot()?;
    ensure!(
        before == after,
        "after down without data:\n--- before\n{}\n--- after\n{}",
        before.0,
        after.0
    );
    Ok(())
}

/// The agent in a machine is started again; its containers never noticed.
fn node_agent_killed(town: &Town) -> Result<()> {
    let agents = |args: &str| args.starts_with("/usr/bin/oaks node");
    let (containers, old) = (town.containers()?, town.processes(agents)?);
    ensure!(old.len() == town.machines, "node agents: {old:?}");
    town.kill(old.keys().copied())?;
    town.answers("with the node agents killed")?;
    testkit::eventually("node agents come back", 10, || {
        let now = town.processes(agents)?;
        ensure!(
            now.len() == old.len() && now.keys().all(|p| !old.contains_key(p)),
            "{now:?}"
        );
        Ok::<_, anyhow::Error>(())
    })?;
    town.settled("after the node agents were killed")?;
    let now = town.containers()?;
    ensure!(now == containers, "containers changed: {containers:?} to {now:?}");
    Ok(())
}

/// A machine that crashed is booted anew, and its pods run there again.
fn machine_killed(town: &Town) -> Result<()> {
    let machine = |s: &Value| -> Option<(String, i64)> {
        let m = &s["machines"][0];
        Some((m["name"].as_str()?.to_owned(), m["pid"].as_i64()?))
    };
    let (name, pid) = machine(&town.i.status()?).context("a machine")?;
    town.kill([i32::try_from(pid)?])?;
    testkit::eventually("the machine comes back", 20, || {
        let now = machine(&town.i.status()?);
        let back = now.as_ref().is_some_and(|(n, p)| *n == name && *p != pid);
        ensure!(back, "{now:?}");
        Ok::<_, anyhow::Error>(())
    })?;
    town.settled("after a machine was killed")
}

/// The supervisor of container groups is started again and the group answers.
fn supervisor_killed(town: &Town) -> Result<()> {
    let pid = town.pid("supervisor")?;
    town.kill([pid])?;
    testkit::eventually("the supervisor comes back", 20, || {
        let now = town.pid("supervisor")?;
        ensure!(now != pid, "still {now}");
        Ok::<_, anyhow::Error>(())
    })?;
    town.settled("after the supervisor was killed")
}

/// The host agent is started again without anybody asking, and the names of container groups are answered again.
fn host_killed(town: &Town) -> Result<()> {
    let containers = town.containers()?;
    let name = || {
        let look = ["/bin/busybox", "nslookup", "web.default.svc.cluster.local"];
        town.kubectl(&[&["exec", "deploy/group", "--"], &look[..]].concat())
    };
    name().context("before")?;
    town.kill_and_wait(&[town.pid("host")?])?;
    testkit::eventually("names of container groups are answered again", 30, name)?;
    town.settled("after the host agent was killed")?;
    let now = town.containers()?;
    ensure!(now == containers, "containers changed: {containers:?} to {now:?}");
    Ok(())
}

/// Who starts the others again is started again itself.
fn keeper_killed(town: &Town) -> Result<()> {
    let pid = town.pid("keeper")?;
    town.kill_and_wait(&[pid])?;
    testkit::eventually("the keeper comes back", 20, || {
        let now = town.pid("keeper")?;
        ensure!(now != pid, "still {now}");
        town.i.run(&["status"])
    })?;
    let refused = town.i.fails(&["up"])?;
    ensure!(refused.contains("already up"), "{refused}");
    Ok(())
}

fn both_killed(town: &Town) -> Result<()> {
    let containers = town.containers()?;
    town.kill_and_wait(&[town.pid("server")?, town.pid("host")?])?;
    testkit::eventually("server and host agent come back", 60, || town.i.run(&["status"]))?;
    town.settled("after server and host agent were killed at once")?;
    let now = town.containers()?;
    ensure!(now == containers, "containers changed: {containers:?} to {now:?}");
    Ok(())
}

/// With the keeper killed along nobody starts anything, until `up`.
fn all_agents_killed(town: &Town) -> Result<()> {
    let containers = town.containers()?;
    town.kill_and_wait(&[town.pid("keeper")?, town.pid("server")?, town.pid("host")?])?;
    town.up()?;
    town.settled("after server, host agent and keeper were killed at once")?;
    let now = town.containers()?;
    ensure!(now == containers, "containers changed: {containers:?} to {now:?}");
    Ok(())
}

/// Nothing runs and the run folder is empty, as after a reboot of the host.
fn rebooted(town: &Town) -> Result<()> {
    town.kill_everything()?;
    let run = town.i.run_dir().display().to_string();
    let wipe = format!(
        "for m in $(awk '$5 ~ \"^{run}/\" {{print $5}}' /proc/self/mountinfo | sort -r); do umount -l $m; done; rm -rf {run}"
    );
    town.i.host.run("sh", &["-c", &wipe])?;
    town.up()?;
    town.settled("after a reboot")
}

#[test]
fn two_instances_on_one_host() -> Result<()> {
    let one = Instance::new()?;
    let two = Instance::on(one.host.clone())?;
    let before = one.host.snapshot()?;
    let one = Town::on(one, &[], 1)?;
    let flags = [
        "--public-pool=198.18.0.0/16",
        "--api-listen=127.0.0.1:6444",
        "--arm-listen=127.0.0.1:8444",
    ];
    let two = Town::on(two, &flags, 1)?;
    one.answers("beside another")?;
    one.i.run(&["down", "--purge"])?;
    two.answers("after the other went down")?;
    let status = two.i.status()?;
    ensure!(status["machines"][0]["running"] == true, "{status}");
    two.i.run(&["down", "--purge"])?;
    let after = two.i.host.snapshot()?;
    ensure!(
        before == after,
        "after both went down:\n--- before\n{}\n--- after\n{}",
        before.0,
        after.0
    );
    Ok(())
}

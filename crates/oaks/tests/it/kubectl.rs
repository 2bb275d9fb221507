//! The unmodified kubectl, the oldest and the newest that are supported, on one cluster of two machines.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    arm::Arm,
    instance::{Instance, tool},
};

/// Two pods, one per machine, and a Deployment that writes a line every second.
const WORK: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: ticker }
spec:
  replicas: 1
  selector: { matchLabels: { app: ticker } }
  template:
    metadata: { labels: { app: ticker } }
    spec:
      terminationGracePeriodSeconds: 0
      nodeSelector: { kubernetes.azure.com/agentpool: np }
      containers:
        - name: ticker
          image: box:1
          command: [/bin/busybox, sh, -c, 'i=0; while :; do i=$((i+1)); echo "tick $i"; /bin/busybox sleep 1; done']
---
apiVersion: v1
kind: Pod
metadata: { name: one }
spec:
  nodeName: NODE1
  terminationGracePeriodSeconds: 0
  containers: [{ name: box, image: "box:1" }]
---
apiVersion: v1
kind: Pod
metadata: { name: two }
spec:
  nodeName: NODE2
  terminationGracePeriodSeconds: 0
  containers: [{ name: box, image: "box:1" }]
"#;

const WRONG: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: wrong }
spec:
  replica: 1
  selector: { matchLabels: { app: wrong } }
  template:
    metadata: { labels: { app: wrong } }
    spec: { terminationGracePeriodSeconds: 0, containers: [{ name: box, image: "box:1" }] }
"#;

/// A request for a certificate of alice in group dev, PEM in base64; its key is of no use to anybody.
const REQUEST: &str = concat!(
    "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURSBSRVFVRVNULS0tLS0KTUlIWk1JR0FBZ0VBTUI0eEREQUtCZ05WQkFvTUEyUmxkakVPTUF3",
    "R0ExVUVBd3dGWVd4cFkyVXdXVEFUQmdjcQpoa2pPUFFJQkJnZ3Foa2pPUFFNQkJ3TkNBQVJyWDU2cXV2UXpmdGVFOWIweTByOTRI",
    "QisrU1NMTHV5ekRHeTNJCnloZzk1VUJmcHdxVWR4TENjbS8zblZJZi9RY1BlVVRIbkw5eDZBUjZEWXh3NXRxU29BQXdDZ1lJS29a",
    "SXpqMEUKQXdJRFNBQXdSUUlnTzhJaUhTNkpXcWtZKzFQYlVNQmhiVGFjY28yZ2lNOXhPbW94cHZDd3poSUNJUURidW9OLwpPODdu",
    "UC9RR3RmSGVXUTdqamRjM0xLL1BMb3pRZDdWVnQ0S0hDZz09Ci0tLS0tRU5EIENFUlRJRklDQVRFIFJFUVVFU1QtLS0tLQo=",
);

struct Kubectl<'a> {
    i: &'a Instance,
    program: PathBuf,
    version: &'static str,
}

impl Kubectl<'_> {
    fn run(&self, line: &str) -> Result<String> {
        self.args(&line.split(' ').collect::<Vec<_>>())
    }

    fn args(&self, args: &[&str]) -> Result<String> {
        let out = self.i.command(&self.program).args(args).output()?;
        self.i
            .checked(&format!("kubectl {} {}", self.version, args.join(" ")), out)
    }

    /// Standard error of a call that must fail.
    fn fails(&self, args: &[&str]) -> Result<String> {
        let out = self.i.command(&self.program).args(args).output()?;
        ensure!(
            !out.status.success(),
            "kubectl {} {} succeeded: {}",
            self.version,
            args.join(" "),
            String::from_utf8_lossy(&out.stdout)
        );
        Ok(String::from_utf8_lossy(&out.stderr).into_owned())
    }

    /// Every line of `apply`'s report ends as said.
    fn applies(&self, file: &str, end: &str) -> Result<()> {
        let said = self.args(&["apply", "-f", file])?;
        ensure!(
            said.lines().count() > 0 && said.lines().all(|l| l.ends_with(end)),
            "kubectl {} apply says:\n{said}instead of {end}",
            self.version
        );
        Ok(())
    }
}

#[test]
fn the_oldest_and_the_newest_kubectl() -> Result<()> {
    let i = Instance::new()?;
    let new = Kubectl {
        i: &i,
        program: tool("OAKS_TEST_KUBECTL", "kubectl")?,
        version: "1.36",
    };
    let old = Kubectl {
        i: &i,
        program: tool("OAKS_TEST_KUBECTL_120", "kubectl-1.20/usr/bin/kubectl")?,
        version: "1.20",
    };
    i.build_box()?;
    i.run(&["up"])?;
    Arm::login(&i)?.cluster(2)?;

    manifests(&i, &[&old, &new])?;
    work(&i, &old, &new)?;
    nowhere_to_run(&i, &old, &new)?;
    certificates(&i, &old, &new)?;
    for k in [&old, &new] {
        k.run("get pods,deployments,nodes -o wide")?;
    }
    old.run("delete deployment ticker")?;
    new.run("delete pod one two")?;
    let left = new.run("get pods -l app=ticker -o name")?;
    testkit::eventually("pods end with their Deployment", 30, || {
        let left = new.run("get pods -o name")?;
        ensure!(left.is_empty(), "{left}");
        Ok::<_, anyhow::Error>(())
    })
    .with_context(|| format!("at first:\n{left}"))?;
    Ok(())
}

/// Unmodified manifests are applied, applied again without a change, and deleted; a mistyped field is refused by both.
fn manifests(i: &Instance, both: &[&Kubectl<'_>]) -> Result<()> {
    let shop = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/shop.yaml");
    let shop = shop.to_string_lossy();
    let wrong = i.file("wrong.yaml", WRONG)?;
    for k in both {
        k.applies(&shop, " created")?;
        k.applies(&shop, " unchanged")?;
        // The namespace's end may take the others along before kubectl asks for them.
        k.args(&["delete", "-f", &shop, "--wait=true", "--ignore-not-found"])?;
        let said = k.fails(&["apply", "-f", &wrong])?;
        ensure!(
            said.contains("unknown field") && said.contains("replica"),
            "kubectl {} says of an unknown field: {said}",
            k.version
        );
        let none = k.fails(&["get", "deployment", "wrong"])?;
        ensure!(none.contains("NotFound"), "{none}");
    }
    Ok(())
}

fn work(i: &Instance, old: &Kubectl<'_>, new: &Kubectl<'_>) -> Result<()> {
    let nodes = new.run("get nodes -l kubernetes.azure.com/agentpool=np -o jsonpath={.items[*].metadata.name}")?;
    let (one, two) = nodes.split_once(' ').context("two nodes")?;
    let file = i.file("work.yaml", &WORK.replace("NODE1", one).replace("NODE2", two))?;
    old.applies(&file, " created")?;
    new.applies(&file, " unchanged")?;
    new.run("wait pod/one pod/two --for=condition=Ready --timeout=60s")?;
    for k in [old, new] {
        k.run("rollout status deployment/ticker --timeout=60s")?;
        follows(k)?;
    }

    let address = new.run("get pod two -o jsonpath={.status.podIP}")?;
    let ping = new.run(&format!("exec one -- /bin/busybox ping -c 1 -W 5 {address}"))?;
    ensure!(ping.contains(" 0% packet loss"), "ping from {one} to {two}: {ping}");
    let page = new.run(&format!("exec one -- /bin/busybox wget -q -O - http://{address}/"))?;
    ensure!(page == "a page\n", "a page from {two} as seen on {one}: {page:?}");
    let refused = old.fails(&["exec", "one", "--", "/bin/busybox", "true"])?;
    ensure!(refused.contains("SPDY"), "exec by kubectl 1.20: {refused}");

    for (k, n) in [(old, 3), (new, 2)] {
        k.run(&format!("scale deployment ticker --replicas={n}"))?;
        k.run("rollout status deployment/ticker --timeout=60s")?;
        let ready = k.run("get deployment ticker -o jsonpath={.status.readyReplicas}")?;
        ensure!(ready == n.to_string(), "{ready} of {n} are ready");
    }
    Ok(())
}

/// `logs -f` prints what is written after it started.
fn follows(k: &Kubectl<'_>) -> Result<()> {
    let mut child =
        k.i.command(&k.program)
            .args(["logs", "-f", "--tail=1", "deployment/ticker"])
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
    let lines: Vec<String> = BufReader::new(child.stdout.take().context("its output")?)
        .lines()
        .take(3)
        .collect::<Result<_, _>>()?;
    child.kill()?;
    child.wait()?;
    let numbers: Vec<u32> = lines
        .iter()
        .filter_map(|l| l.strip_prefix("tick ")?.parse().ok())
        .collect();
    ensure!(
        numbers.len() == 3 && numbers.windows(2).all(|w| w[1] == w[0] + 1),
        "kubectl {} logs -f printed {lines:?}",
        k.version
    );
    Ok(())
}

/// `kubectl certificate approve` leads to a certificate, `deny` to none.
fn certificates(i: &Instance, old: &Kubectl<'_>, new: &Kubectl<'_>) -> Result<()> {
    for name in ["yes", "no"] {
        let request = format!(
            "apiVersion: certificates.k8s.io/v1\nkind: CertificateSigningRequest\nmetadata: {{ name: \"{name}\" }}\nspec:\n  \
             request: {REQUEST}\n  signerName: kubernetes.io/kube-apiserver-client\n  usages: [client auth]\n"
        );
        new.applies(&i.file("request.yaml", &request)?, " created")?;
    }
    old.run("certificate approve yes")?;
    new.run("certificate deny no")?;
    testkit::eventually("the certificate", 20, || {
        let said = new.run("get csr yes no --no-headers")?;
        ensure!(said.contains("Approved,Issued") && said.contains("Denied"), "{said}");
        Ok::<_, anyhow::Error>(())
    })?;
    let issued = new.run("get csr yes -o jsonpath={.status.certificate}")?;
    ensure!(issued.len() > 400, "{issued:?} is no certificate");
    new.run("delete csr yes no")?;
    Ok(())
}

/// With no node to run on, a pod waits and says why.
fn nowhere_to_run(i: &Instance, old: &Kubectl<'_>, new: &Kubectl<'_>) -> Result<()> {
    let nodes = new.run("get nodes -o jsonpath={.items[*].metadata.name}")?;
    for (k, node) in nodes.split(' ').enumerate() {
        [old, new][k % 2].run(&format!("cordon {node}"))?;
    }
    let lonely = WRONG.replace("replica:", "replicas:").replace("wrong", "lonely");
    new.applies(&i.file("lonely.yaml", &lonely)?, " created")?;
    for k in [old, new] {
        let said = testkit::eventually("the reason of a waiting pod", 20, || {
            let said = k.run("describe pods -l app=lonely")?;
            ensure!(
                said.contains("FailedScheduling") && said.contains("unschedulable"),
                "kubectl {} describe:\n{said}",
                k.version
            );
            Ok::<_, anyhow::Error>(said)
        })?;
        ensure!(
            said.contains("0/3 nodes are available") && said.contains("Pending"),
            "kubectl {} describe:\n{said}",
            k.version
        );
    }
    for node in nodes.split(' ') {
        new.run(&format!("uncordon {node}"))?;
    }
    new.run("wait deployment/lonely --for=condition=Available --timeout=60s")?;
    old.run("delete deployment lonely")?;
    Ok(())
}

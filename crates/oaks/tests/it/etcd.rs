//! The platform with its objects in the distribution's etcd.

use std::process::{Child, Stdio};

use anyhow::{Result, ensure};

use crate::{arm::Arm, instance::Instance};

const URL: &str = "http://127.0.0.1:2379";

struct Etcd(Child);

impl Etcd {
    fn start(i: &Instance) -> Result<Self> {
        let root = testkit::debian::unpack(&["etcd-server", "etcd-client"]);
        let peer = "http://127.0.0.1:2380";
        let child = i
            .command(root.join("usr/bin/etcd"))
            .arg("--data-dir")
            .arg(i.host.dir().join("etcd"))
            .args(["--listen-client-urls", URL, "--advertise-client-urls", URL])
            .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn home_and_hosted_clusters_live_in_etcd() -> Result<()> {
    let i = Instance::new()?;
    let refused = i.fails(&["up", "--etcd", "127.0.0.1:2379"])?;
    ensure!(refused.contains("is not a URL"), "{refused}");

    let etcd = Etcd::start(&i)?;
    i.run(&["up", "--etcd", URL])?;
    Arm::login(&i)?.cluster(1)?;
    i.kubectl(&["create", "configmap", "kept", "--from-literal=a=1"])?;
    i.kubectl(&["create", "secret", "generic", "sealed", "--from-literal=b=2"])?;
    testkit::eventually("the node is Ready", 120, || {
        let nodes = i.kubectl(&["get", "nodes"])?;
        ensure!(nodes.contains(" Ready"), "{nodes}");
        Ok(())
    })?;
    ensure!(
        !i.data().join("server/store").exists(),
        "nothing is kept in the data folder"
    );

    // etcd dies and comes back: the servers go on where they were.
    drop(etcd);
    let _etcd = Etcd::start(&i)?;
    testkit::eventually("writes go on", 60, || i.kubectl(&["create", "configmap", "after"]))?;

    // The platform ends and starts: everything comes from etcd.
    i.run(&["down"])?;
    i.run(&["up", "--etcd", URL])?;
    testkit::eventually("the cluster answers again", 120, || {
        let maps = i.kubectl(&["get", "configmap", "kept", "after", "-o", "name"])?;
        ensure!(maps == "configmap/kept\nconfigmap/after\n", "{maps}");
        Ok(())
    })?;
    let secret = i.kubectl(&["get", "secret", "sealed", "-o", "jsonpath={.data.b}"])?;
    ensure!(secret == "Mg==", "{secret}");
    Ok(())
}

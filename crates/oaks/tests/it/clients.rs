//! Unmodified clients besides kubectl and az on one running cluster: helm, and the official Python and JavaScript clients.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::{
    arm::Arm,
    instance::{Instance, tool},
};

fn peers(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/peers")
        .join(path)
}

#[test]
fn helm_and_the_official_python_and_javascript_clients() -> Result<()> {
    let i = Instance::new()?;
    // Missing tools are told before anything is started.
    let helm = tool("OAKS_TEST_HELM", "helm")?;
    let python = tool("OAKS_TEST_PYTHON", "python-client/bin/python")?;
    let node = tool("OAKS_TEST_NODE", "node-client/node")?;
    i.build_box()?;
    i.run(&["up"])?;
    Arm::login(&i)?.cluster(1)?;
    let mut script = i.command(python);
    script.arg(peers("python/client.py"));
    done(&i, "the Python client", script)?;
    // Modules are found beside the script, so it runs where they are installed.
    let mut script = i.command(&node);
    script.arg(node.with_file_name("client.mjs"));
    done(&i, "the JavaScript client", script)?;
    Helm { i: &i, program: helm }.everything()
}

fn done(i: &Instance, what: &str, mut script: Command) -> Result<()> {
    let out = i.checked(what, script.output()?)?;
    ensure!(out.trim_end().ends_with("done"), "{what} ended early: {out}");
    Ok(())
}

struct Helm<'a> {
    i: &'a Instance,
    program: PathBuf,
}

impl Helm<'_> {
    fn run(&self, line: &str) -> Result<String> {
        let out = self.i.command(&self.program).args(line.split(' ')).output()?;
        self.i.checked(&format!("helm {line}"), out)
    }

    /// Field of an object, by kubectl's path.
    fn field(&self, object: &str, path: &str) -> Result<String> {
        self.i.kubectl(&["get", object, "-o", &format!("jsonpath={{{path}}}")])
    }

    /// The page that the release shows, in its ConfigMap and its custom object, and its ready replicas.
    fn shows(&self, page: &str, ready: &str) -> Result<()> {
        let found = [
            self.field("configmap/shop-page", ".data.page")?,
            self.field("sign/shop", ".spec.text")?,
            self.field("deployment/shop", ".status.readyReplicas")?,
        ];
        ensure!(
            found == [page, page, ready],
            "{found:?} instead of {page} with {ready} ready"
        );
        Ok(())
    }

    fn everything(&self) -> Result<()> {
        let chart = peers("helm/chart");
        let chart = chart.display();
        self.run(&format!("install shop {chart} --wait --timeout 120s"))?;
        self.shows("first", "1")?;
        ensure!(
            self.field("sign/shop", ".spec.color")? == "blue",
            "the default of a chart's own kind"
        );
        ensure!(
            self.field("pod/shop-pre-install", ".status.phase")? == "Succeeded",
            "helm waits for its hooks"
        );
        self.run(&format!(
            "upgrade shop {chart} --set page=second,replicas=2 --wait --timeout 120s"
        ))?;
        self.shows("second", "2")?;
        ensure!(
            self.field("pod/shop-post-upgrade", ".status.phase")? == "Succeeded",
            "the hook"
        );
        self.run("rollback shop 1 --wait --timeout 120s")?;
        self.shows("first", "1")?;

        // What the chart's own schema refuses, and pods that never come up, end an upgrade.
        let long = self.fails(&format!(
            "upgrade shop {chart} --set page=a-text-of-more-than-twenty-characters"
        ))?;
        ensure!(long.contains("may not be more than 20 bytes"), "{long}");
        self.fails(&format!("upgrade shop {chart} --set broken=true --wait --timeout 4s"))?;

        let history: Value = serde_json::from_str(&self.run("history shop -o json")?)?;
        let states: Vec<&str> = history
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|r| r["status"].as_str())
            .collect();
        ensure!(
            states == ["superseded", "superseded", "deployed", "failed", "failed"],
            "the history says {states:?}"
        );
        self.run("uninstall shop --wait --timeout 120s")?;
        let left = self.i.kubectl(&["get", "deployments,configmaps,signs", "-o", "name"])?;
        ensure!(!left.contains("shop"), "left behind: {left}");
        ensure!(
            self.i
                .kubectl(&["get", "crd", "-o", "name"])?
                .contains("signs.shop.example.com"),
            "helm leaves definitions"
        );
        Ok(())
    }

    /// Standard error of a call that must fail.
    fn fails(&self, line: &str) -> Result<String> {
        let out = self.i.command(&self.program).args(line.split(' ')).output()?;
        ensure!(!out.status.success(), "helm {line} succeeded");
        Ok(String::from_utf8_lossy(&out.stderr).into_owned())
    }
}

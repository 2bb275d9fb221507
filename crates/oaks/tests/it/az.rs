//! The unmodified az CLI in a host that has no route to anywhere else.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::instance::{Instance, tool};

pub struct Az {
    pub instance: Instance,
    env: BTreeMap<String, String>,
    program: std::path::PathBuf,
}

impl Az {
    /// Follows the recipe that `oaks az` prints.
    pub fn new() -> Result<Self> {
        let instance = Instance::new()?;
        instance.run(&["up"])?;
        let program = tool("OAKS_TEST_AZ", "az/bin/az")?;
        let path = format!(
            "{}:{}",
            program.parent().map(|p| p.display().to_string()).unwrap_or_default(),
            std::env::var("PATH").unwrap_or_default()
        );
        let out = instance.oaks(&["az"]).env("PATH", path).output()?;
        let exports = instance.checked("oaks az", out)?;
        let env = exports
            .lines()
            .filter_map(|l| l.strip_prefix("export ")?.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.trim_matches('\'').to_owned()))
            .collect();
        Ok(Self { instance, env, program })
    }

    pub fn run(&self, line: &str) -> Result<String> {
        let out = self
            .instance
            .command(&self.program)
            .args(line.split(' '))
            .envs(&self.env)
            .output()?;
        self.instance.checked(&format!("az {line}"), out)
    }

    pub fn json(&self, line: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.run(line)?)?)
    }

    /// Runs and expects failure; standard error.
    pub fn fails(&self, line: &str) -> Result<String> {
        let out = self
            .instance
            .command(&self.program)
            .args(line.split(' '))
            .envs(&self.env)
            .output()?;
        ensure!(!out.status.success(), "az {line} succeeded");
        Ok(String::from_utf8_lossy(&out.stderr).into_owned())
    }
}

#[test]
fn a_cluster_by_the_unmodified_az() -> Result<()> {
    let az = Az::new()?;
    let group = az.json("group create -n rg -l local")?;
    ensure!(
        group["properties"]["provisioningState"] == "Succeeded",
        "az group create: {group}"
    );
    let cluster = az.json("aks create -g rg -n c1 --node-count 1 --network-plugin azure --generate-ssh-keys")?;
    ensure!(cluster["provisioningState"] == "Succeeded", "az aks create: {cluster}");
    az.run("aks get-credentials -g rg -n c1")?;
    let nodes = az.instance.kubectl(&["get", "nodes", "--no-headers"])?;
    ensure!(
        nodes.lines().count() == 1 && nodes.contains(" Ready ") && nodes.starts_with("aks-nodepool1-"),
        "kubectl get nodes:\n{nodes}"
    );
    let shown = az.json("aks show -g rg -n c1")?;
    ensure!(
        shown["agentPoolProfiles"][0]["count"] == 1 && shown["currentKubernetesVersion"].is_string(),
        "az aks show: {shown}"
    );
    let table = az.run("aks list -o table")?;
    ensure!(
        table.contains("c1") && table.contains("Succeeded"),
        "az aks list -o table:\n{table}"
    );
    az.run("aks delete -g rg -n c1 --yes")?;
    let left = az.json("aks list")?;
    ensure!(left.as_array().is_some_and(Vec::is_empty), "after the deletion: {left}");
    az.run("group delete -n rg --yes")?;
    let groups = az.json("group list")?;
    ensure!(
        groups.as_array().is_some_and(Vec::is_empty),
        "resource groups left behind: {groups}"
    );
    Ok(())
}

#[test]
fn a_wrong_secret_is_refused() -> Result<()> {
    let az = Az::new()?;
    let out = az
        .instance
        .command(&az.program)
        .args([
            "login",
            "--service-principal",
            "-u",
            "nobody",
            "-p",
            "wrong",
            "--tenant",
            "adfs",
        ])
        .envs(&az.env)
        .output()?;
    ensure!(!out.status.success(), "a wrong secret was accepted");
    Ok(())
}

//! `cargo xtask test`: its own set-up and every test; the workspace is built once, in one profile.

use anyhow::Result;

use crate::{conformance, setup, sh, tidy};

pub fn run(args: &[String]) -> Result<()> {
    sh::step("tidy", || tidy::run(&[]))?;
    sh::step("system packages", setup::packages)?;
    let kubectl = sh::step("kubectl", setup::kubectl)?;
    let old_kubectl = sh::step("kubectl 1.20", setup::old_kubectl)?;
    let az = sh::step("az", setup::az)?;
    let helm = sh::step("helm", setup::helm)?;
    let python = sh::step("Python client", setup::python_client)?;
    let node = sh::step("JavaScript client", setup::node_client)?;
    sh::step("build", || {
        sh::run("cargo", &["build", "--workspace", "--all-targets", "--locked"])
    })?;
    let tools = [kubectl, old_kubectl, az, helm, python, node].map(|p| p.to_string_lossy().into_owned());
    let env = [
        ("OAKS_TEST_KUBECTL", tools[0].as_str()),
        ("OAKS_TEST_KUBECTL_120", tools[1].as_str()),
        ("OAKS_TEST_AZ", tools[2].as_str()),
        ("OAKS_TEST_HELM", tools[3].as_str()),
        ("OAKS_TEST_PYTHON", tools[4].as_str()),
        ("OAKS_TEST_NODE", tools[5].as_str()),
    ];
    let mut cargo = vec!["test", "--workspace", "--locked", "--no-fail-fast"];
    cargo.extend(args.iter().map(String::as_str));
    sh::step("cnitool", conformance::cni::light)?;
    sh::step("tests", || sh::run_in(&sh::root(), "cargo", &cargo, &env))
}

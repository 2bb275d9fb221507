//! `cargo xtask test`: its own set-up and every test; the workspace is built once, in one profile.

use anyhow::Result;

use crate::{setup, sh, tidy};

pub fn run(args: &[String]) -> Result<()> {
    sh::step("tidy", || tidy::run(&[]))?;
    sh::step("system packages", setup::packages)?;
    let kubectl = sh::step("kubectl", setup::kubectl)?;
    let az = sh::step("az", setup::az)?;
    sh::step("build", || {
        sh::run("cargo", &["build", "--workspace", "--all-targets", "--locked"])
    })?;
    let (kubectl, az) = (
        kubectl.to_string_lossy().into_owned(),
        az.to_string_lossy().into_owned(),
    );
    let env = [("OAKS_TEST_KUBECTL", kubectl.as_str()), ("OAKS_TEST_AZ", az.as_str())];
    let mut cargo = vec!["test", "--workspace", "--locked"];
    cargo.extend(args.iter().map(String::as_str));
    sh::step("tests", || sh::run_in(&sh::root(), "cargo", &cargo, &env))
}

//! `cargo xtask conformance oracle [--only KIND]... [--show-known] [--json]`: this API server's answers compared with
//! kube-apiserver's.

use anyhow::Result;

use super::go::Module;
use crate::{setup, sh};

pub fn run(args: &[String]) -> Result<()> {
    sh::step("system packages", setup::packages)?;
    let server = Module::new("kubernetes")?.build("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver")?;
    let (server, cases) = (
        server.to_string_lossy().into_owned(),
        sh::root().join("tests/peers/oracle").to_string_lossy().into_owned(),
    );
    let mut cargo = vec!["run", "-q", "-p", "apiserver", "--example", "oracle", "--locked", "--"];
    cargo.extend(["--kube-apiserver", &server, "--cases", &cases]);
    cargo.extend(args.iter().map(String::as_str));
    sh::run("cargo", &cargo)
}

//! `cargo xtask up`: from a bare machine to a real application on a virtual network.

use anyhow::Result;

use crate::{setup, sh};

pub fn run(args: &[String]) -> Result<()> {
    sh::step("system packages", setup::packages)?;
    sh::step("build", || {
        sh::run("cargo", &["build", "--workspace", "--bins", "--release", "--locked"])
    })?;
    let oaks = sh::root().join("target/release/oaks").to_string_lossy().into_owned();
    let mut up = vec!["up"];
    up.extend(args.iter().map(String::as_str));
    sh::run(&oaks, &up)?;
    let images = sh::root().join("demo").to_string_lossy().into_owned();
    let mut demo = vec!["demo", "--dir", &images];
    demo.extend(args.iter().map(String::as_str));
    sh::run(&oaks, &demo)
}

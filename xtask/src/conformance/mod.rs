//! `cargo xtask conformance <part>`: judged by others' programs. What passes, fails and is skipped stands in
//! `docs/conformance.md`.

pub mod cni;
mod go;

use anyhow::{Result, bail};

pub fn run(args: &[String]) -> Result<()> {
    match args.split_first() {
        Some((part, rest)) if part == "cni" => cni::run(rest),
        _ => bail!("cargo xtask conformance cni [--area NAME]... [--json]"),
    }
}

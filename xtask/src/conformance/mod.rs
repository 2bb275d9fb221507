//! `cargo xtask conformance <part>`: judged by others' programs. What passes, fails and is skipped stands in
//! `docs/conformance.md`.

pub mod cni;
mod go;
mod kubernetes;

use anyhow::Result;

pub fn run(args: &[String]) -> Result<()> {
    match args.split_first() {
        Some((part, rest)) if part == "cni" => cni::run(rest),
        _ => kubernetes::run(args),
    }
}

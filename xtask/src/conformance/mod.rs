//! `cargo xtask conformance <part>`: judged by others' programs. What passes, fails and is skipped stands in
//! `docs/conformance.md`.

pub mod cni;
mod go;
mod kubernetes;
mod oracle;

use anyhow::Result;

pub fn run(args: &[String]) -> Result<()> {
    match args.split_first() {
        Some((part, rest)) if part == "cni" => cni::run(rest),
        Some((part, rest)) if part == "oracle" => oracle::run(rest),
        _ => kubernetes::run(args),
    }
}

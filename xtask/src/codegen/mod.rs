//! Generators of committed data. Each reads pinned packages from an ordinary registry and keeps facts only.

mod golden;
mod gostruct;
mod proto;
mod sources;
mod types;

use anyhow::{Result, bail};

/// Runs `codegen <what>`.
pub fn run(args: &[String]) -> Result<()> {
    match args.first().map(String::as_str) {
        Some("types") => types::generate(),
        _ => bail!("usage: cargo xtask codegen types"),
    }
}

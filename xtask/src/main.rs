//! The one entry for people and CI: `cargo xtask <verb>`.
//!
//! Depends on nothing heavy, so that it builds in seconds and when the tree does not.

mod bench;
mod codegen;
mod conformance;
mod dist;
mod platform;
mod setup;
mod sh;
mod test;
mod tidy;
mod up;

use anyhow::{Result, bail};

const HELP: &str = "\
cargo xtask <verb>

  up       set up a bare machine, build, start Oaks, run the demo application on it
  test     set up, then every test (what CI runs)
  tidy     structure, formats, lints (fast)
  setup    only the set-up of `test` and `up`
  dist cni the plug-ins' archive, below target/dist
  bench platform [--json]   release build; five rounds of up, demo and `oaks bench` in a host of their own
  bench cni [--json]   the plug-in against its peers
  bench vnet [--json]  virtual networks against plain routes; 16,000 addresses (release build, iperf3)
  conformance [--focus RE] [--dry-run] [--json]   upstream's end-to-end suite against a fresh cluster (default: what needs no image)
  conformance oracle [--only KIND]... [--json]   this API server's answers compared with kube-apiserver's
  conformance cni [--area NAME]... [--json]   the installed plug-ins driven by others' programs
  codegen types   regenerate the committed Kubernetes type table (needs the go tool)
";

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let verb = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    match verb.as_str() {
        "up" => up::run(&rest),
        "test" => test::run(&rest),
        "tidy" => tidy::run(&rest),
        "bench" if rest.first().is_some_and(|part| part == "platform") => platform::run(&rest[1..]),
        "bench" => bench::run(&rest),
        "conformance" => conformance::run(&rest),
        "codegen" => codegen::run(&rest),
        "dist" => dist::run(&rest),
        "setup" => setup::run(&rest),
        "" | "help" | "--help" | "-h" => {
            print!("{HELP}");
            Ok(())
        }
        other => bail!("unknown verb {other:?}\n\n{HELP}"),
    }
}

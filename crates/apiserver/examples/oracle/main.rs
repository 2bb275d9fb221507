//! `cargo xtask conformance oracle`: the same requests to this API server and to kube-apiserver of the same minor (with
//! Debian's etcd-server), and every difference between their answers.
//!
//! Both run on loopback in a network namespace of their own (the program starts itself once more inside). Cases are data
//! (`tests/peers/oracle/*.yaml`, see [`cases`]); from each kind's objects follow the same requests: create, read in every
//! form, refuse, patch, apply, watch, delete. Known differences stand with their reason in `tests/peers/oracle/known.yaml`.

mod call;
mod cases;
mod compare;
mod known;
mod normal;
mod peers;
mod script;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::json;

const USAGE: &str = "oracle --kube-apiserver FILE --cases DIR [--only KIND]... [--show-known] [--json]";

fn main() -> Result<()> {
    let all: Vec<String> = std::env::args().skip(1).collect();
    let mut args = all.iter();
    let (mut server, mut dir, mut only, mut json, mut show_known, mut inside) =
        (None, None, vec![], false, false, None);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value\n{USAGE}"));
        match arg.as_str() {
            "--json" => json = true,
            "--show-known" => show_known = true,
            "--kube-apiserver" => server = Some(PathBuf::from(value()?)),
            "--cases" => dir = Some(PathBuf::from(value()?)),
            "--only" => only.push(value()?.clone()),
            "--inside" => inside = Some(PathBuf::from(value()?)),
            _ => bail!("unknown argument {arg}\n{USAGE}"),
        }
    }
    let (server, dir) = (server.context(USAGE)?, dir.context(USAGE)?);
    let Some(scratch) = inside else {
        // Downloaded here: the host inside has no way out.
        peers::etcd();
        let host = testkit::Host::new()?;
        let status = host
            .command(std::env::current_exe()?)
            .args(&all)
            .arg("--inside")
            .arg(host.dir())
            .status()?;
        if !status.success() {
            bail!("the comparison ended with {status}");
        }
        return Ok(());
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let (kinds, mut known) = (cases::read(&dir)?, known::Known::read(&dir.join("known.yaml"))?);
    let mut differing = 0;
    runtime.block_on(async {
        let (upstream, ours) = (peers::start(&server, &scratch).await?, call::ours(&scratch).await?);
        script::namespace(&upstream.client).await?;
        script::namespace(&ours).await?;
        for kind in kinds.iter().filter(|k| only.is_empty() || only.contains(&k.name)) {
            let outcome = script::run(&ours, &upstream.client, kind, &mut known).await?;
            differing += outcome.differing.len();
            for (case, differences) in &outcome.differing {
                eprintln!("DIFFERS {}: {case}", kind.name);
                for difference in differences {
                    eprintln!("    {difference}");
                }
            }
            if show_known {
                for line in &outcome.known {
                    eprintln!("known   {}: {line}", kind.name);
                }
            }
            if json {
                println!(
                    "{}",
                    json!({ "area": kind.name, "passed": outcome.equal, "failed": outcome.differing.len(),
                        "skipped": outcome.known.len() })
                );
            } else {
                println!(
                    "{:<28} equal {:>3}, different {:>3}, known {:>3}",
                    kind.name,
                    outcome.equal,
                    outcome.differing.len(),
                    outcome.known.len()
                );
            }
        }
        anyhow::Ok(())
    })?;
    if only.is_empty() {
        for unused in known.unused() {
            eprintln!("known.yaml: nothing differs any more at {unused}");
        }
    }
    if differing > 0 {
        bail!("{differing} requests are answered differently");
    }
    Ok(())
}

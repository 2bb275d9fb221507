//! `oaks vnet`: the data plane of this host as people look at it.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use machines::agent::{self, Here};
use reconcile::Informers;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vnet::{Action, Difference};
use vnet_model::fabric::EdgeSpec;

use crate::{
    access::{chained, client_of},
    cli::Output,
    paths::Paths,
};

/// What the host agent plans with besides the objects; it leaves it in the run folder.
#[derive(Debug, Deserialize, Serialize)]
pub struct Told {
    pub edge: EdgeSpec,
    pub here: Here,
}

/// Home answers a list of everything within this, or it is not up.
const HOME_TIMEOUT: Duration = Duration::from_secs(15);

/// Prints what the host agent would change if it compared everything with the kernel now. Reads only, and asks the objects
/// in home, not the agent: it may be dead.
///
/// The code is that of diff(1) and `kubectl diff`: 0 without differences, 1 with some, more than 1 for an error.
pub async fn diff(paths: &Paths, output: Output) -> ExitCode {
    match differences(paths).await {
        Ok(found) => {
            let print = || -> Result<()> {
                match output {
                    Output::Json => println!("{}", serde_json::to_string_pretty(&shown(&found))?),
                    Output::Table => print_lines(&found),
                }
                Ok(())
            };
            match print() {
                Ok(()) => ExitCode::from(u8::from(!found.is_empty())),
                Err(e) => failed(&e),
            }
        }
        Err(e) => failed(&e),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::from(2)
}

async fn differences(paths: &Paths) -> Result<Vec<Difference>> {
    let file = paths.host_kubeconfig();
    let kubeconfig = std::fs::read_to_string(&file).with_context(|| {
        format!(
            "reading {}: has `oaks up` run for instance {}?",
            file.display(),
            paths.instance
        )
    })?;
    let informers = Informers::new(client_of(&kubeconfig)?);
    let told = std::fs::read(paths.told()).with_context(|| {
        format!(
            "reading {}, which the host agent writes at its start: has `oaks up` run since the last `oaks down`?",
            paths.told().display()
        )
    })?;
    let told: Told = serde_json::from_slice(&told).with_context(|| format!("{} is damaged", paths.told().display()))?;
    let read = agent::wanted(&informers, &paths.instance, &told.edge, &told.here);
    let wanted = tokio::time::timeout(HOME_TIMEOUT, read).await;
    informers.stop().await;
    let spec = wanted.ok().with_context(|| {
        format!(
            "home did not answer within {} s; `oaks status` says whether the server runs",
            HOME_TIMEOUT.as_secs()
        )
    })?;
    // What a running agent found out about backends' health is its own; without it all count as healthy.
    vnet::diff(&paths.instance, &paths.run, &spec)
        .map_err(chained)
        .context("comparing the plan with the kernel")
}

fn shown(found: &[Difference]) -> Value {
    let one = |d: &Difference| {
        let action = match d.action {
            Action::Add => "add",
            Action::Remove => "remove",
            Action::Change => "change",
        };
        json!({"namespace": d.namespace, "action": action, "what": d.what})
    };
    json!({"differences": found.iter().map(one).collect::<Vec<_>>()})
}

fn print_lines(found: &[Difference]) {
    let mut last = "";
    for d in found {
        if d.namespace != last {
            println!("{}", d.namespace);
            last = &d.namespace;
        }
        let sign = match d.action {
            Action::Add => '+',
            Action::Remove => '-',
            Action::Change => '~',
        };
        println!("  {sign} {}", d.what);
    }
    match found.len() {
        0 => eprintln!("no differences: the kernel holds what the objects say"),
        n => eprintln!("{n} differences; the host agent removes them within a minute while it runs"),
    }
}

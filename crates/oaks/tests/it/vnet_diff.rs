//! `oaks vnet diff`: reads what differs between objects and kernel, whether the host agent lives or not.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    arm::{self, Arm, NETWORK_API},
    instance::Instance,
};

/// Exit code, and the differences.
fn diff(i: &Instance) -> Result<(Option<i32>, Vec<Value>)> {
    let out = i
        .oaks(&["vnet", "diff", "-o", "json"])
        .output()
        .context("starting oaks")?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let text = || format!("{said}{}", String::from_utf8_lossy(&out.stderr));
    let all: Value = serde_json::from_str(&said).with_context(text)?;
    let differences = all["differences"].as_array().with_context(text)?.clone();
    Ok((out.status.code(), differences))
}

#[test]
fn differences_are_told_and_nothing_is_changed() -> Result<()> {
    let i = Instance::new()?;
    let before_up = i.oaks(&["vnet", "diff"]).output()?;
    ensure!(before_up.status.code() == Some(2), "{before_up:?}");
    i.run(&["up"])?;
    let cloud = Arm::login(&i)?;
    let id = cloud.network_id("v");
    let body = arm::network("10.30.0.0/16", "10.30.0.0/24", "10.30.1.0/24");
    cloud.put(&id, NETWORK_API, &body)?;
    testkit::eventually("the network in the data plane", 20, || match diff(&i) {
        Ok((Some(0), none)) if none.is_empty() => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    let human = i.oaks(&["vnet", "diff"]).output()?;
    ensure!(human.status.success() && human.stdout.is_empty(), "{human:?}");

    // With the agent dead for good (both it and who would start it again), somebody meddles, and a network goes.
    let run = i.run_dir();
    let kill = format!(
        "kill -9 $(cut -d' ' -f1 {0}/keeper.pid) $(cut -d' ' -f1 {0}/host.pid)",
        run.display()
    );
    i.host.run("sh", &["-c", &kill])?;
    let edge = format!("--net={}/netns/edge", run.display());
    i.host
        .run("nsenter", &[&edge, "nft", "delete", "table", "ip", "oaks-edge"])?;
    let meddle = format!(
        "n=$(ls {0}/netns | grep ^v-); nsenter --net={0}/netns/$n ip route replace blackhole 203.0.113.0/24",
        run.display()
    );
    i.host.run("sh", &["-c", &meddle])?;
    let (code, found) = diff(&i)?;
    ensure!(code == Some(1), "{code:?} {found:?}");
    let has = |action: &str, namespace: &str, what: &str| {
        found.iter().any(|d| {
            d["action"] == action
                && d["namespace"].as_str().is_some_and(|n| n.contains(namespace))
                && d["what"].as_str().is_some_and(|w| w.contains(what))
        })
    };
    ensure!(has("add", "edge", "table ip oaks-edge"), "{found:?}");
    ensure!(has("remove", "v-", "route blackhole 203.0.113.0/24"), "{found:?}");
    ensure!(found.len() == 2, "{found:?}");
    // It only read: the same again, and in words.
    ensure!(diff(&i)?.1 == found);
    let human = i.oaks(&["vnet", "diff"]).output()?;
    let words = String::from_utf8_lossy(&human.stdout).into_owned();
    ensure!(
        human.status.code() == Some(1) && words.contains("+ table ip oaks-edge"),
        "{words}"
    );

    cloud.call("DELETE", &id, NETWORK_API, "")?;
    let network_goes = |found: &[Value]| {
        found
            .iter()
            .any(|d| d["action"] == "remove" && d["what"].as_str().is_some_and(|w| w.contains("namespace")))
    };
    testkit::eventually("the network's object to go", 20, || match diff(&i) {
        Ok((Some(1), found)) if network_goes(&found) => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    // The agent comes back and sets everything right.
    i.run(&["up"])?;
    testkit::eventually("no differences", 20, || match diff(&i) {
        Ok((Some(0), _)) => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    i.run(&["down", "--purge"])?;
    Ok(())
}

//! The network by the unmodified az CLI on a running platform, seen by traffic between machines: rules, application
//! security groups, peering, route tables, private zones, machines' metadata, and one more address for one more pod.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::az::Az;

/// A machine's network namespace, as a place to run programs in.
struct Inside<'a> {
    az: &'a Az,
    netns: PathBuf,
}

impl<'a> Inside<'a> {
    /// The machine of the node whose name starts with `prefix`.
    fn of(az: &'a Az, prefix: &str) -> Result<Self> {
        let all = az.instance.oaks_home(&["get", "machines.oaks.internal", "-o", "json"])?;
        let all: serde_json::Value = serde_json::from_str(&all)?;
        let machine = all["items"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|m| m["spec"]["nodeName"].as_str().is_some_and(|n| n.starts_with(prefix)))
            .with_context(|| format!("there is no machine of a node {prefix}*"))?;
        let name = machine["metadata"]["name"].as_str().unwrap_or_default();
        let netns = az.instance.run_dir().join("netns").join(name);
        Ok(Self { az, netns })
    }
}

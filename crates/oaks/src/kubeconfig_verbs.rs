//! `oaks kubeconfig save|show|remove NAME`: NAME is a cluster, or `oaks-home` for the platform's own.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    access::{Arm, ArmAccess, chained},
    cli::{KubeconfigVerb, Settings},
    demo::decode_kubeconfig,
    kubeconfig::{self, Target},
    server::HOME,
};

/// API version of `Microsoft.ContainerService` that these calls use.
const AKS_API: &str = "2025-10-01";

pub async fn run(settings: &Settings, verb: &KubeconfigVerb) -> Result<()> {
    let target = || Target::of_user(|k| std::env::var(k).ok()).map_err(chained);
    match verb {
        KubeconfigVerb::Save {
            name,
            resource_group,
            overwrite,
        } => {
            let text = fetch(settings, name, resource_group.as_deref()).await?;
            let target = target()?;
            kubeconfig::save(&target, &text, *overwrite).map_err(chained)?;
            println!("context {name} saved to {} and made current", target.path.display());
        }
        KubeconfigVerb::Show { name, resource_group } => {
            print!("{}", fetch(settings, name, resource_group.as_deref()).await?)
        }
        KubeconfigVerb::Remove { name } => {
            let target = target()?;
            if !kubeconfig::remove(&target, name).map_err(chained)? {
                bail!("{} has no context {name}", target.path.display());
            }
            println!("context {name} removed from {}", target.path.display());
        }
    }
    Ok(())
}

async fn fetch(settings: &Settings, name: &str, group: Option<&str>) -> Result<String> {
    if name == HOME {
        let path = settings.paths.home_kubeconfig();
        return std::fs::read_to_string(&path).with_context(|| format!("reading {}; run `oaks up`", path.display()));
    }
    let arm = Arm::login(ArmAccess::read(&settings.paths)?).await?;
    let list = format!(
        "/subscriptions/{}/providers/Microsoft.ContainerService/managedClusters",
        arm.access.subscription
    );
    let clusters = arm.get(&list, AKS_API).await?.unwrap_or(Value::Null);
    let ids: Vec<&str> = clusters["value"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|c| c["name"].as_str().is_some_and(|n| n.eq_ignore_ascii_case(name)))
        .filter_map(|c| c["id"].as_str())
        .filter(|id| {
            group.is_none_or(|g| {
                id.to_lowercase()
                    .contains(&format!("/resourcegroups/{}/", g.to_lowercase()))
            })
        })
        .collect();
    match ids.as_slice() {
        [id] => decode_kubeconfig(&arm.post(&format!("{id}/listClusterAdminCredential"), AKS_API).await?),
        [] => bail!("there is no cluster {name}; `az aks list -o table` shows what there is"),
        several => bail!("{} clusters are called {name}; add --resource-group", several.len()),
    }
}

//! `oaks az`: prepares the unmodified az CLI in a configuration folder of its own: cloud file, CA bundle, login.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use arm::az::AzRecipe;

use crate::{
    access::{ArmAccess, write_private},
    cli::Settings,
};

/// System bundles, tried in order; the roots compiled in are used where a host has none.
const SYSTEM_BUNDLES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
];

pub fn run(settings: &Settings, print_only: bool) -> Result<()> {
    let access = ArmAccess::read(&settings.paths)?;
    let recipe = AzRecipe {
        base_url: access.base_url.clone(),
        tenant: access.tenant.clone(),
        client_id: access.client_id.clone(),
        client_secret: access.client_secret.clone(),
    };
    let dir = config_dir(settings);
    let bundle = dir.join("ca-bundle.pem");
    let cloud = dir.join("cloud.json");
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    write_private(&bundle, arm::az::ca_bundle(&public_roots(), &access.ca_pem).as_bytes())?;
    write_private(&cloud, recipe.cloud_file().as_bytes())?;
    if !print_only {
        prepare(&recipe, &recipe.environment(&dir, &bundle), &cloud)?;
    }
    // Only these lines go to standard output, so that `eval "$(oaks az)"` works.
    print!("{}", recipe.exports(&dir, &bundle));
    if print_only {
        for words in recipe.commands(&cloud) {
            println!("# az {}", words.join(" "));
        }
    }
    eprintln!("Put these into your shell: eval \"$(oaks az)\". Then: az group create -n rg -l local");
    Ok(())
}

/// Registers the cloud and logs in, unless that is done already.
fn prepare(recipe: &AzRecipe, environment: &[(&'static str, String)], cloud: &Path) -> Result<()> {
    let az = |args: &[String]| -> Result<std::process::Output> {
        Command::new("az").args(args).envs(environment.iter().map(|(k, v)| (*k, v))).output().context(
            "starting az; install the Azure CLI (python3 -m venv ~/az && ~/az/bin/pip install azure-cli, then put ~/az/bin on PATH), or use `oaks az --print`",
        )
    };
    let words = |w: &[&str]| w.iter().map(|s| (*s).to_owned()).collect::<Vec<String>>();
    let registered = az(&words(&["cloud", "show", "-n", arm::az::CLOUD, "-o", "none"]))?
        .status
        .success();
    for mut step in recipe.commands(cloud) {
        if registered && step.get(1).is_some_and(|w| w == "register") {
            step[1] = "update".to_owned();
        }
        step.extend(words(&["-o", "none"]));
        let out = az(&step)?;
        if !out.status.success() {
            let shown: Vec<&str> = step
                .iter()
                .map(|a| if *a == recipe.client_secret { "***" } else { a })
                .collect();
            bail!(
                "az {} failed: {}",
                shown.join(" "),
                String::from_utf8_lossy(&out.stderr).trim()
            );
        }
    }
    Ok(())
}

/// One folder per platform: az's token cache tells hosts apart but not ports.
fn config_dir(settings: &Settings) -> PathBuf {
    settings.paths.data.join("az")
}

fn public_roots() -> String {
    for path in SYSTEM_BUNDLES {
        if let Ok(text) = fs::read_to_string(path) {
            if text.contains("BEGIN CERTIFICATE") {
                return text;
            }
        }
    }
    use base64::Engine as _;
    let mut out = String::new();
    for cert in webpki_root_certs::TLS_SERVER_ROOT_CERTS {
        out.push_str("-----BEGIN CERTIFICATE-----\n");
        let text = base64::engine::general_purpose::STANDARD.encode(cert);
        for line in text.as_bytes().chunks(64) {
            out.push_str(&String::from_utf8_lossy(line));
            out.push('\n');
        }
        out.push_str("-----END CERTIFICATE-----\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundle_holds_public_roots() {
        assert!(public_roots().matches("BEGIN CERTIFICATE").count() > 50);
    }
}

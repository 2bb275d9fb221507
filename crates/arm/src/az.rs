//! What the unmodified `az` needs to talk to this server: the cloud file, the environment, the log-in line. Pure text.
//!
//! The authority ends in `/adfs`: with that style the client does no instance discovery, so it works with every az since
//! 2.50, on any port, and contacts no other host.

use std::path::Path;

use serde_json::json;

/// Name under which the cloud is registered.
pub const CLOUD: &str = "oaks";

/// What the recipe is made from.
#[derive(Clone, Debug)]
pub struct AzRecipe {
    /// `https://host:port`, without a trailing slash.
    pub base_url: String,
    pub tenant: String,
    pub client_id: String,
    pub client_secret: String,
}

impl AzRecipe {
    /// The file for `az cloud register -n oaks --cloud-config @file`.
    pub fn cloud_file(&self) -> String {
        let b = &self.base_url;
        let file = json!({
            "endpoints": {
                "resourceManager": b,
                "management": format!("{b}/arm"),
                "activeDirectory": format!("{b}/adfs"),
                "activeDirectoryResourceId": format!("{b}/arm"),
                "activeDirectoryGraphResourceId": format!("{b}/graph"),
                "microsoftGraphResourceId": format!("{b}/msgraph/"),
                "gallery": b,
                "portal": b,
            },
            "suffixes": {
                "acrLoginServerEndpoint": ".azurecr.oaks.internal",
                "storageEndpoint": "storage.oaks.internal",
                "keyvaultDns": ".vault.oaks.internal",
                "sqlServerHostname": ".db.oaks.internal",
            },
        });
        format!("{file:#}\n")
    }

    /// Variables that az runs with, in order. `ca_bundle` must hold the public roots **and** this platform's CA, since it
    /// replaces the client's own; `config_dir` must be one directory per platform, because the client's token cache tells
    /// hosts apart but not ports.
    pub fn environment(&self, config_dir: &Path, ca_bundle: &Path) -> Vec<(&'static str, String)> {
        let bundle = ca_bundle.display().to_string();
        vec![
            ("AZURE_CONFIG_DIR", config_dir.display().to_string()),
            ("REQUESTS_CA_BUNDLE", bundle.clone()),
            // `az container exec` reads only this one, and ends silently without it.
            ("WEBSOCKET_CLIENT_CA_BUNDLE", bundle),
            ("AZURE_CORE_COLLECT_TELEMETRY", "false".to_owned()),
            // A mistyped command would otherwise ask a public host for an extension.
            ("AZURE_EXTENSION_USE_DYNAMIC_INSTALL", "no".to_owned()),
        ]
    }

    /// [`AzRecipe::environment`] as lines for a shell.
    pub fn exports(&self, config_dir: &Path, ca_bundle: &Path) -> String {
        let env = self.environment(config_dir, ca_bundle);
        env.iter().map(|(k, v)| format!("export {k}={}\n", quote(v))).collect()
    }

    /// Argument lists of `az` that register the cloud, select it and log in, in order. Registering fails if the cloud
    /// exists already; then `cloud update` with the same arguments does.
    pub fn commands(&self, cloud_file: &Path) -> Vec<Vec<String>> {
        let words = |w: &[&str]| w.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let file = format!("@{}", cloud_file.display());
        vec![
            words(&["cloud", "register", "-n", CLOUD, "--cloud-config", &file]),
            words(&["cloud", "set", "-n", CLOUD]),
            // Tokens of an earlier platform at the same address would be sent again, and refused.
            words(&["account", "clear"]),
            words(&[
                "login",
                "--service-principal",
                "-u",
                &self.client_id,
                "-p",
                &self.client_secret,
                "--tenant",
                &self.tenant,
            ]),
        ]
    }
}

/// Joins the public roots' PEM (empty if there is none on this machine) and the platform's CA into one bundle.
pub fn ca_bundle(public_roots_pem: &str, platform_ca_pem: &str) -> String {
    let roots = public_roots_pem.trim_end();
    let separator = if roots.is_empty() { "" } else { "\n" };
    format!("{roots}{separator}{}\n", platform_ca_pem.trim_end())
}

fn quote(s: &str) -> String {
    if s.chars().all(|c| c.is_ascii_alphanumeric() || "/._-:@=".contains(c)) {
        s.to_owned()
    } else {
        format!("'{}'", s.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipe() {
        let r = AzRecipe {
            base_url: "https://127.0.0.1:8443".into(),
            tenant: "t".into(),
            client_id: "c".into(),
            client_secret: "s".into(),
        };
        let file: serde_json::Value = serde_json::from_str(&r.cloud_file()).unwrap();
        assert_eq!(file["endpoints"]["activeDirectory"], "https://127.0.0.1:8443/adfs");
        let exports = r.exports(Path::new("/home/a b/az"), Path::new("/x/ca.pem"));
        assert!(
            exports.contains("export AZURE_CONFIG_DIR='/home/a b/az'\n"),
            "{exports}"
        );
        assert!(
            exports.contains("export WEBSOCKET_CLIENT_CA_BUNDLE=/x/ca.pem\n"),
            "{exports}"
        );
        assert_eq!(r.commands(Path::new("/x/cloud.json"))[0][5], "@/x/cloud.json");
        assert_eq!(ca_bundle("", "B\n"), "B\n");
        assert_eq!(ca_bundle("A\n\n", "B\n"), "A\nB\n");
    }
}

//! Fetching an image from its registry. Layers go to disk first, are verified, then unpacked on a blocking thread.

use std::{fs::File, path::PathBuf, time::Duration};

use oci_client::{
    Client, Reference,
    client::{ClientConfig, ClientProtocol},
    manifest::OciImageManifest,
    secrets::RegistryAuth as Auth,
};
use tokio::io::AsyncWriteExt;

use super::{Image, ImageError, Name, Store, io_error, parse_config, reference};
use crate::api::RegistryAuth;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Silence on an open connection.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

impl Store {
    /// Fetches `reference` from its registry and adds it, even if the store has an image of that name. Needs a writable store.
    ///
    /// # Errors
    /// `Registry` for whatever the registry or the network refuses, with its words.
    ///
    /// # Cancel safety
    /// Safe: an unfinished image is not visible, its files go with the next start of a writer.
    pub async fn pull(&self, reference: &str, auth: Option<RegistryAuth>) -> Result<Image, ImageError> {
        if !self.writable {
            return Err(ImageError::ReadOnly {
                path: self.dir().to_owned(),
            });
        }
        // oci-client's TLS needs a process-wide provider; a second call keeps the first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let name = Name::parse(reference)?;
        let parsed = reference::parse(reference)?;
        let failed = |what: &str, error: &dyn std::fmt::Display| ImageError::Registry {
            reference: parsed.whole(),
            what: what.to_owned(),
            reason: error.to_string(),
        };
        let plain_http = ["localhost", "127.0.0.1"].map(str::to_owned);
        let config = ClientConfig {
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            protocol: ClientProtocol::HttpsExcept(with_ports(&parsed, &plain_http)),
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(|error| failed("TLS settings", &error))?;
        let auth = auth.map_or(Auth::Anonymous, |auth| Auth::Basic(auth.username, auth.password));
        let (manifest, digest) = client
            .pull_image_manifest(&parsed, &auth)
            .await
            .map_err(|error| failed("manifest", &error))?;
        let mut config_bytes = Vec::new();
        client
            .pull_blob(&parsed, &manifest.config, &mut config_bytes)
            .await
            .map_err(|error| failed("configuration", &error))?;
        let diff_ids = parse_config(&config_bytes)?.rootfs.diff_ids;
        if diff_ids.len() != manifest.layers.len() {
            return Err(failed("manifest", &"its layers do not match the configuration"));
        }
        let files = self.fetch_layers(&client, &parsed, &manifest, &diff_ids).await?;
        let (store, key) = (self.clone(), name.key());
        let unpack = move || {
            let _lock = store.lock()?;
            let mut size = config_bytes.len() as u64;
            for (diff_id, file) in diff_ids.iter().zip(files) {
                size += match file {
                    Some((path, _work)) => {
                        store.add_layer(diff_id, File::open(&path).map_err(io_error("open", &path))?)?
                    }
                    None => store.add_layer(diff_id, std::io::empty())?,
                };
            }
            store.add_image(&config_bytes, Some(&digest), &[key], size)
        };
        tokio::task::spawn_blocking(unpack)
            .await
            .map_err(|error| failed("layers", &error))?
    }

    /// Downloads the layers that are missing, one after the other; `None` for those that are there.
    async fn fetch_layers(
        &self,
        client: &Client,
        reference: &Reference,
        manifest: &OciImageManifest,
        diff_ids: &[String],
    ) -> Result<Vec<Option<(PathBuf, super::WorkDir)>>, ImageError> {
        let mut files = Vec::new();
        for (layer, diff_id) in manifest.layers.iter().zip(diff_ids) {
            if self.has_layer(diff_id) {
                files.push(None);
                continue;
            }
            if layer.size < 0 || layer.size as u64 > self.limits.bytes_max {
                return Err(ImageError::TooLarge {
                    reason: format!("a layer of {} bytes", layer.size),
                });
            }
            let work = self.work_dir()?;
            let path = work.path().join("layer");
            let mut file = tokio::fs::File::create(&path)
                .await
                .map_err(io_error("create", &path))?;
            // The client verifies the digest while it reads.
            client
                .pull_blob(reference, layer, &mut file)
                .await
                .map_err(|error| ImageError::Registry {
                    reference: reference.whole(),
                    what: format!("layer {}", layer.digest),
                    reason: error.to_string(),
                })?;
            file.flush().await.map_err(io_error("write", &path))?;
            files.push(Some((path, work)));
        }
        Ok(files)
    }
}

/// Registries on the loopback speak plain HTTP; the client compares with the port.
fn with_ports(reference: &Reference, hosts: &[String]) -> Vec<String> {
    let registry = reference.resolve_registry();
    let host = registry.split(':').next().unwrap_or(registry);
    if hosts.iter().any(|plain| plain == host) {
        vec![registry.to_owned()]
    } else {
        Vec::new()
    }
}

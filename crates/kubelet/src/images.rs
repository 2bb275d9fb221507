//! Getting a container's image: pull policy, and credentials out of the pod's pull secrets.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::api::core::v1::Secret;
use sandbox::{Error, ImageStatus, RegistryAuth};
use serde::Deserialize;
use std::collections::BTreeMap;

use crate::{
    events::Level,
    kubelet::Core,
    pod::{
        plan::Waiting,
        view::{Member, PodView},
    },
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    Always,
    IfNotPresent,
    Never,
}

/// `Always` for `:latest` and untagged references, as the API server's defaults have it.
fn policy(m: &Member) -> Policy {
    match m.container.image_pull_policy.as_deref() {
        Some("Always") => Policy::Always,
        Some("Never") => Policy::Never,
        Some("IfNotPresent") => Policy::IfNotPresent,
        _ => {
            let image = m.image();
            let last = image.rsplit('/').next().unwrap_or(image);
            let latest = !image.contains('@') && (!last.contains(':') || last.ends_with(":latest"));
            if latest { Policy::Always } else { Policy::IfNotPresent }
        }
    }
}

/// The image of `m`, pulled if its policy says so.
///
/// # Errors
/// Why the container waits: `ErrImagePull`, `ErrImageNeverPull` or `InvalidImageName`.
pub async fn ensure(core: &Core, view: &PodView, m: &Member) -> Result<ImageStatus, Waiting> {
    let image = m.image();
    let fail = |reason: &str, message: String| {
        core.events
            .pod(view, Some(m.name()), Level::Warning, "Failed", &message);
        Err(Waiting {
            reason: reason.into(),
            message,
        })
    };
    let policy = policy(m);
    let present = match core.config.images.image_status(image).await {
        Ok(found) => found,
        Err(Error::Invalid { reason, .. }) => {
            return fail(
                "InvalidImageName",
                format!("Failed to apply default image tag {image:?}: {reason}"),
            );
        }
        Err(e) => return fail("ImageInspectError", format!("Failed to inspect image {image:?}: {e}")),
    };
    match (policy, present) {
        (Policy::IfNotPresent | Policy::Never, Some(found)) => {
            let message = format!("Container image {image:?} already present on machine");
            core.events.pod(view, Some(m.name()), Level::Normal, "Pulled", message);
            return Ok(found);
        }
        (Policy::Never, None) => {
            let message = format!("Container image {image:?} is not present with pull policy of Never");
            return fail("ErrImageNeverPull", message);
        }
        (Policy::Always, _) | (Policy::IfNotPresent, None) => {}
    }
    core.config.hooks.pulling(&view.identity(0)).await;
    core.events.pod(
        view,
        Some(m.name()),
        Level::Normal,
        "Pulling",
        format!("Pulling image {image:?}"),
    );
    let begun = tokio::time::Instant::now();
    let mut last = None;
    for auth in credentials(core, view, image).await.into_iter().map(Some).chain([None]) {
        match core.config.images.pull_image(image, auth).await {
            Ok(found) => {
                let message = format!(
                    "Successfully pulled image {image:?} in {}ms ({}ms including waiting). Image size: {} bytes.",
                    begun.elapsed().as_millis(),
                    begun.elapsed().as_millis(),
                    found.size_bytes
                );
                core.events.pod(view, Some(m.name()), Level::Normal, "Pulled", message);
                return Ok(found);
            }
            Err(e) => last = last.or(Some(e)),
        }
    }
    let why = last.map(|e| stdx::chain(&e).to_string()).unwrap_or_default();
    let _ = fail("ErrImagePull", format!("Failed to pull image {image:?}: {why}"));
    fail("ErrImagePull", "Error: ErrImagePull".into()).map_err(|w| Waiting { message: why, ..w })
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize, Default)]
struct DockerAuth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
}

async fn credentials(core: &Core, view: &PodView, image: &str) -> Vec<RegistryAuth> {
    let mut out = Vec::new();
    for r in view.spec().image_pull_secrets.iter().flatten() {
        match core.config.api.secret(&view.namespace, &r.name).await {
            Ok(secret) => out.extend(from_secret(&secret, image)),
            Err(e) => {
                let message = format!(
                    "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                    r.name
                );
                core.events
                    .pod(view, None, Level::Warning, "FailedToRetrieveImagePullSecret", message);
                tracing::debug!(secret = %r.name, error = %stdx::chain(&e), "image pull secret not read");
            }
        }
    }
    out
}

fn from_secret(secret: &Secret, image: &str) -> Vec<RegistryAuth> {
    let Some(data) = &secret.data else { return vec![] };
    let auths = if let Some(json) = data.get(".dockerconfigjson") {
        serde_json::from_slice::<DockerConfig>(&json.0)
            .map(|c| c.auths)
            .unwrap_or_default()
    } else if let Some(json) = data.get(".dockercfg") {
        serde_json::from_slice(&json.0).unwrap_or_default()
    } else {
        return vec![];
    };
    let mut found: Vec<(usize, RegistryAuth)> = auths
        .into_iter()
        .filter_map(|(key, a)| Some((matches(&key, image)?, decode(a)?)))
        .collect();
    // The longest key first: a repository's own credentials before its registry's.
    found.sort_by_key(|(len, _)| std::cmp::Reverse(*len));
    found.into_iter().map(|(_, a)| a).collect()
}

fn decode(a: DockerAuth) -> Option<RegistryAuth> {
    if !a.username.is_empty() {
        return Some(RegistryAuth {
            username: a.username,
            password: a.password,
        });
    }
    let text = String::from_utf8(STANDARD.decode(a.auth.trim()).ok()?).ok()?;
    let (username, password) = text.split_once(':')?;
    Some(RegistryAuth {
        username: username.to_owned(),
        password: password.to_owned(),
    })
}

/// Length of the match if `key` (a registry, or a path below it) covers `image`.
fn matches(key: &str, image: &str) -> Option<usize> {
    let key = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    let key = key.trim_end_matches('/');
    let key = key
        .strip_suffix("/v1")
        .or_else(|| key.strip_suffix("/v2"))
        .unwrap_or(key);
    let key = if matches!(key, "index.docker.io" | "registry-1.docker.io") {
        "docker.io"
    } else {
        key
    };
    let (first, rest) = image.split_once('/').unwrap_or(("", image));
    let full = if first.contains(['.', ':']) || first == "localhost" {
        image.to_owned()
    } else if first.is_empty() {
        format!("docker.io/library/{rest}")
    } else {
        format!("docker.io/{image}")
    };
    let covered = full
        .strip_prefix(key)
        .is_some_and(|r| r.is_empty() || r.starts_with(['/', ':', '@']));
    let host_only = !key.contains('/');
    // `registry:5000` must not match the key `registry`.
    let port = host_only && full.strip_prefix(key).is_some_and(|r| r.starts_with(':'));
    (covered && !port).then_some(key.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_cover_images() {
        assert!(matches("https://index.docker.io/v1/", "nginx").is_some());
        assert!(matches("docker.io", "user/app:1").is_some());
        assert!(matches("reg.example", "reg.example/app").is_some());
        assert!(matches("reg.example", "reg.example:5000/app").is_none());
        assert!(matches("reg.example:5000", "reg.example:5000/app").is_some());
        assert!(matches("reg.example/a", "reg.example/ab").is_none());
        assert!(matches("reg.example/a", "reg.example/a/b:1").is_some());
    }
}

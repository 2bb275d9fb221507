//! What stands in ConfigMap, Secret, downward API and projected volumes: references resolved to files.

use std::{collections::HashMap, sync::Arc, time::Duration};

use k8s_openapi::{
    api::core::v1::{DownwardAPIVolumeFile, KeyToPath, Volume},
    jiff::Timestamp,
};
use parking_lot::Mutex;
use thiserror::Error;
use tokio::time::Instant;

use crate::{
    api::{ApiError, BoundToken, NodeApi, TokenAsk},
    clock::ms_between,
    fields::{FieldContext, FieldError},
    volumes::atomic::{File, Payload},
};

#[derive(Debug, Error)]
pub enum ContentError {
    #[error("{kind} \"{name}\" not found")]
    Missing { kind: &'static str, name: String },
    #[error("{kind} \"{name}\" references non-existent key: {key}")]
    Key {
        kind: &'static str,
        name: String,
        key: String,
    },
    #[error("reading {kind} {name}")]
    Api {
        kind: &'static str,
        name: String,
        #[source]
        source: ApiError,
    },
    #[error("requesting a token for service account {account}")]
    Token {
        account: String,
        #[source]
        source: ApiError,
    },
    #[error("downward API file {path}")]
    Field {
        path: String,
        #[source]
        source: FieldError,
    },
}

type Data = Arc<Vec<(String, Vec<u8>)>>;

/// Kind, namespace, name.
type ObjectKey = (&'static str, String, String);

/// Objects and tokens that volumes were filled from. Refreshes of many pods share one read per object and interval; a
/// pod that starts always reads anew.
pub struct Sources {
    api: Arc<dyn NodeApi>,
    age_max: Duration,
    objects: Mutex<HashMap<ObjectKey, (Instant, Option<Data>)>>,
    tokens: Mutex<HashMap<TokenAsk, (Timestamp, BoundToken)>>,
}

impl Sources {
    pub fn new(api: Arc<dyn NodeApi>, age_max: Duration) -> Self {
        Self {
            api,
            age_max,
            objects: Mutex::default(),
            tokens: Mutex::default(),
        }
    }

    async fn object(
        &self,
        kind: &'static str,
        namespace: &str,
        name: &str,
        fresh: bool,
    ) -> Result<Option<Data>, ContentError> {
        let key = (kind, namespace.to_owned(), name.to_owned());
        if !fresh
            && let Some((at, data)) = self.objects.lock().get(&key)
            && at.elapsed() < self.age_max
        {
            return Ok(data.clone());
        }
        let read = if kind == "secret" {
            self.api
                .secret(namespace, name)
                .await
                .map(|s| s.data.into_iter().flatten().map(|(k, v)| (k, v.0)).collect())
        } else {
            self.api.config_map(namespace, name).await.map(|m| {
                let text = m.data.into_iter().flatten().map(|(k, v)| (k, v.into_bytes()));
                text.chain(m.binary_data.into_iter().flatten().map(|(k, v)| (k, v.0)))
                    .collect::<Vec<_>>()
            })
        };
        let data = match read {
            Ok(data) => Some(Arc::new(data)),
            Err(ApiError::NotFound { .. }) => None,
            Err(source) => {
                return Err(ContentError::Api {
                    kind,
                    name: name.to_owned(),
                    source,
                });
            }
        };
        let mut objects = self.objects.lock();
        objects.retain(|_, (at, _)| at.elapsed() < self.age_max * 2);
        objects.insert(key, (Instant::now(), data.clone()));
        Ok(data)
    }

    /// A token with at least a fifth of its life left.
    async fn token(&self, ask: TokenAsk, now: Timestamp) -> Result<String, ContentError> {
        if let Some((from, t)) = self.tokens.lock().get(&ask) {
            let life = ms_between(*from, t.expires);
            if ms_between(*from, now) < life / 10 * 8 {
                return Ok(t.token.clone());
            }
        }
        let token = self.api.token(&ask).await.map_err(|source| {
            let account = format!("{}/{}", ask.namespace, ask.service_account);
            ContentError::Token { account, source }
        })?;
        let text = token.token.clone();
        self.tokens.lock().insert(ask, (now, token));
        Ok(text)
    }

    /// Forgets the tokens of a pod.
    pub fn forget(&self, pod_uid: &str) {
        self.tokens.lock().retain(|ask, _| ask.pod_uid != pod_uid);
    }
}

/// Files of one volume; `None` if the volume has no such content (emptyDir, hostPath). `fresh` = read objects anew.
///
/// # Errors
/// A mandatory reference that does not resolve, or the API.
pub async fn payload(
    sources: &Sources,
    ctx: &FieldContext<'_>,
    volume: &Volume,
    fresh: bool,
    now: Timestamp,
) -> Result<Option<Payload>, ContentError> {
    let namespace = ctx.view.namespace.as_str();
    let mut out = Payload::new();
    if let Some(v) = &volume.config_map {
        let mode = mode(v.default_mode);
        let data = sources.object("configmap", namespace, &v.name, fresh).await?;
        keys(
            &mut out,
            "configmap",
            &v.name,
            data,
            v.items.as_deref(),
            v.optional,
            mode,
        )?;
    } else if let Some(v) = &volume.secret {
        let name = v.secret_name.as_deref().unwrap_or_default();
        let data = sources.object("secret", namespace, name, fresh).await?;
        keys(
            &mut out,
            "secret",
            name,
            data,
            v.items.as_deref(),
            v.optional,
            mode(v.default_mode),
        )?;
    } else if let Some(v) = &volume.downward_api {
        downward(
            &mut out,
            ctx,
            v.items.as_deref().unwrap_or_default(),
            mode(v.default_mode),
        )?;
    } else if let Some(v) = &volume.projected {
        let mode = mode(v.default_mode);
        for s in v.sources.iter().flatten() {
            if let Some(m) = &s.config_map {
                let data = sources.object("configmap", namespace, &m.name, fresh).await?;
                keys(
                    &mut out,
                    "configmap",
                    &m.name,
                    data,
                    m.items.as_deref(),
                    m.optional,
                    mode,
                )?;
            }
            if let Some(m) = &s.secret {
                let data = sources.object("secret", namespace, &m.name, fresh).await?;
                keys(&mut out, "secret", &m.name, data, m.items.as_deref(), m.optional, mode)?;
            }
            if let Some(d) = &s.downward_api {
                downward(&mut out, ctx, d.items.as_deref().unwrap_or_default(), mode)?;
            }
            if let Some(t) = &s.service_account_token {
                let ask = TokenAsk {
                    namespace: namespace.to_owned(),
                    service_account: ctx
                        .view
                        .spec()
                        .service_account_name
                        .clone()
                        .unwrap_or_else(|| "default".into()),
                    audience: t.audience.clone().unwrap_or_default(),
                    expiration_s: t.expiration_seconds.unwrap_or(3600),
                    pod_name: ctx.view.name.clone(),
                    pod_uid: ctx.view.uid.clone(),
                };
                let token = sources.token(ask, now).await?;
                // Upstream's rule: nobody but the owner reads a token, unless the pod's group or users differ.
                out.insert(
                    t.path.clone(),
                    File {
                        data: token.into_bytes(),
                        mode: token_mode(ctx, mode),
                    },
                );
            }
        }
    } else {
        return Ok(None);
    }
    Ok(Some(out))
}

fn mode(m: Option<i32>) -> u32 {
    m.and_then(|m| u32::try_from(m).ok()).unwrap_or(0o644)
}

/// 0600 with an fsGroup (which then gets to read), else the volume's mode, so that a non-root user can read it.
fn token_mode(ctx: &FieldContext<'_>, mode: u32) -> u32 {
    if ctx
        .view
        .spec()
        .security_context
        .as_ref()
        .is_some_and(|s| s.fs_group.is_some())
    {
        0o600
    } else {
        mode
    }
}

fn keys(
    out: &mut Payload,
    kind: &'static str,
    name: &str,
    data: Option<Data>,
    items: Option<&[KeyToPath]>,
    optional: Option<bool>,
    mode: u32,
) -> Result<(), ContentError> {
    let optional = optional == Some(true);
    let Some(data) = data else {
        return if optional {
            Ok(())
        } else {
            Err(ContentError::Missing {
                kind,
                name: name.to_owned(),
            })
        };
    };
    match items.filter(|i| !i.is_empty()) {
        None => out.extend(data.iter().map(|(k, v)| (k.clone(), File { data: v.clone(), mode }))),
        Some(items) => {
            for item in items {
                match data.iter().find(|(k, _)| *k == item.key) {
                    Some((_, v)) => {
                        let mode = item.mode.and_then(|m| u32::try_from(m).ok()).unwrap_or(mode);
                        out.insert(item.path.clone(), File { data: v.clone(), mode });
                    }
                    None if optional => {}
                    None => {
                        return Err(ContentError::Key {
                            kind,
                            name: name.to_owned(),
                            key: item.key.clone(),
                        });
                    }
                }
            }
        }
    }
    Ok(())
}

fn downward(
    out: &mut Payload,
    ctx: &FieldContext<'_>,
    items: &[DownwardAPIVolumeFile],
    default: u32,
) -> Result<(), ContentError> {
    for item in items {
        let text = if let Some(f) = &item.field_ref {
            ctx.field(f)
        } else if let Some(r) = &item.resource_field_ref {
            ctx.resource(r, r.container_name.as_deref().unwrap_or_default())
        } else {
            continue;
        };
        let text = text.map_err(|source| ContentError::Field {
            path: item.path.clone(),
            source,
        })?;
        let mode = item.mode.and_then(|m| u32::try_from(m).ok()).unwrap_or(default);
        out.insert(
            item.path.clone(),
            File {
                data: text.into_bytes(),
                mode,
            },
        );
    }
    Ok(())
}

//! The environment of a container: service links, `envFrom`, `env`, and `$(VAR)` expansion. Order is kept: what the pod
//! names comes in its order, service variables follow.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use k8s_openapi::api::core::v1::{Container, Service};
use thiserror::Error;

use crate::{
    api::{ApiError, NodeApi},
    fields::{FieldContext, FieldError},
};

/// Why a container cannot be configured.
#[derive(Debug, Error)]
pub enum EnvError {
    #[error("{kind} \"{name}\" not found")]
    Missing { kind: &'static str, name: String },
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    Key {
        kind: &'static str,
        namespace: String,
        name: String,
        key: String,
    },
    #[error("env {name}")]
    Field {
        name: String,
        #[source]
        source: FieldError,
    },
    #[error("env {name}: the value is not text")]
    Text { name: String },
    #[error("reading {kind} {name}")]
    Api {
        kind: &'static str,
        name: String,
        #[source]
        source: ApiError,
    },
}

/// The resolved environment and which keys of `envFrom` were skipped because they name no variable.
#[derive(Debug, Default)]
pub struct Env {
    pub vars: Vec<(String, String)>,
    pub skipped: Vec<String>,
}

impl Env {
    fn set(&mut self, name: &str, value: String) {
        match self.vars.iter_mut().find(|(n, _)| n == name) {
            Some(slot) => slot.1 = value,
            None => self.vars.push((name.to_owned(), value)),
        }
    }

    pub fn lookup(&self, name: &str) -> Option<&str> {
        self.vars.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// One read per referenced object and container start.
struct Refs<'a> {
    api: &'a dyn NodeApi,
    namespace: &'a str,
    maps: HashMap<String, Option<Data>>,
    secrets: HashMap<String, Option<Data>>,
}

type Data = Arc<Vec<(String, Vec<u8>)>>;

impl Refs<'_> {
    async fn map(&mut self, name: &str) -> Result<Option<Data>, EnvError> {
        if let Some(found) = self.maps.get(name) {
            return Ok(found.clone());
        }
        let found = match self.api.config_map(self.namespace, name).await {
            Ok(m) => Some(Arc::new(
                m.data
                    .into_iter()
                    .flatten()
                    .map(|(k, v)| (k, v.into_bytes()))
                    .collect::<Vec<_>>(),
            )),
            Err(ApiError::NotFound { .. }) => None,
            Err(source) => {
                return Err(EnvError::Api {
                    kind: "configmap",
                    name: name.to_owned(),
                    source,
                });
            }
        };
        self.maps.insert(name.to_owned(), found.clone());
        Ok(found)
    }

    async fn secret(&mut self, name: &str) -> Result<Option<Data>, EnvError> {
        if let Some(found) = self.secrets.get(name) {
            return Ok(found.clone());
        }
        let found = match self.api.secret(self.namespace, name).await {
            Ok(s) => Some(Arc::new(
                s.data.into_iter().flatten().map(|(k, v)| (k, v.0)).collect::<Vec<_>>(),
            )),
            Err(ApiError::NotFound { .. }) => None,
            Err(source) => {
                return Err(EnvError::Api {
                    kind: "secret",
                    name: name.to_owned(),
                    source,
                });
            }
        };
        self.secrets.insert(name.to_owned(), found.clone());
        Ok(found)
    }
}

/// Resolves the environment of `container`. `services` are those of the pod's namespace (empty without service links).
///
/// # Errors
/// What upstream calls CreateContainerConfigError: a mandatory reference that does not resolve.
pub async fn resolve(
    api: &dyn NodeApi,
    ctx: &FieldContext<'_>,
    container: &Container,
    services: Vec<(String, String)>,
) -> Result<Env, EnvError> {
    let namespace = ctx.view.namespace.as_str();
    let mut refs = Refs {
        api,
        namespace,
        maps: HashMap::new(),
        secrets: HashMap::new(),
    };
    let mut env = Env::default();
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let (kind, name, optional, data) = if let Some(r) = &from.config_map_ref {
            ("configmap", &r.name, r.optional, refs.map(&r.name).await?)
        } else if let Some(r) = &from.secret_ref {
            ("secret", &r.name, r.optional, refs.secret(&r.name).await?)
        } else {
            continue;
        };
        let Some(data) = data else {
            if optional == Some(true) {
                continue;
            }
            return Err(EnvError::Missing {
                kind,
                name: name.clone(),
            });
        };
        for (key, value) in data.iter() {
            let name = format!("{prefix}{key}");
            if !is_name(&name) {
                env.skipped.push(name);
                continue;
            }
            let value = String::from_utf8(value.clone()).map_err(|_| EnvError::Text { name: name.clone() })?;
            env.set(&name, value);
        }
    }
    for var in container.env.iter().flatten() {
        let value = if let Some(from) = &var.value_from {
            let field = |source| EnvError::Field {
                name: var.name.clone(),
                source,
            };
            if let Some(r) = &from.field_ref {
                Some(ctx.field(r).map_err(field)?)
            } else if let Some(r) = &from.resource_field_ref {
                Some(ctx.resource(r, &container.name).map_err(field)?)
            } else if let Some(r) = &from.config_map_key_ref {
                let data = refs.map(&r.name).await?;
                pick("configmap", namespace, &r.name, &r.key, r.optional, data, &var.name)?
            } else if let Some(r) = &from.secret_key_ref {
                let data = refs.secret(&r.name).await?;
                pick("secret", namespace, &r.name, &r.key, r.optional, data, &var.name)?
            } else {
                None
            }
        } else {
            let text = var.value.as_deref().unwrap_or_default();
            let of_service = |name: &str| services.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
            Some(expand(text, |name| {
                env.lookup(name).or_else(|| of_service(name)).map(str::to_owned)
            }))
        };
        if let Some(value) = value {
            env.set(&var.name, value);
        }
    }
    for (name, value) in services {
        if env.lookup(&name).is_none() {
            env.vars.push((name, value));
        }
    }
    Ok(env)
}

fn pick(
    kind: &'static str,
    namespace: &str,
    name: &str,
    key: &str,
    optional: Option<bool>,
    data: Option<Data>,
    var: &str,
) -> Result<Option<String>, EnvError> {
    let optional = optional == Some(true);
    let Some(data) = data else {
        return if optional {
            Ok(None)
        } else {
            Err(EnvError::Missing {
                kind,
                name: name.to_owned(),
            })
        };
    };
    let Some((_, value)) = data.iter().find(|(k, _)| k == key) else {
        return if optional {
            Ok(None)
        } else {
            let (namespace, name, key) = (namespace.to_owned(), name.to_owned(), key.to_owned());
            Err(EnvError::Key {
                kind,
                namespace,
                name,
                key,
            })
        };
    };
    String::from_utf8(value.clone())
        .map(Some)
        .map_err(|_| EnvError::Text { name: var.to_owned() })
}

/// Upstream's rule since 1.34: printable ASCII without `=`.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b'=')
}

/// `$(NAME)` becomes the variable's value, `$$(NAME)` becomes `$(NAME)`, unknown names stay as they are.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(inner) = rest.strip_prefix('(') {
            match inner.find(')') {
                Some(end) => {
                    let name = &inner[..end];
                    match lookup(name) {
                        Some(value) => out.push_str(&value),
                        None => {
                            out.push_str("$(");
                            out.push_str(name);
                            out.push(')');
                        }
                    }
                    rest = &inner[end + 1..];
                }
                None => {
                    out.push_str("$(");
                    rest = inner;
                }
            }
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

/// Docker-link variables of the services in the pod's namespace, and the API server's, which every pod gets.
/// `links` = `enableServiceLinks`; `api` stands in when the Service `default/kubernetes` is not among `master`.
pub fn services(links: &[Arc<Service>], master: Option<&Service>, api: Option<SocketAddr>) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut all: Vec<&Service> = links.iter().map(AsRef::as_ref).collect();
    all.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    if let Some(m) = master
        && !all
            .iter()
            .any(|s| s.metadata.uid.is_some() && s.metadata.uid == m.metadata.uid)
    {
        all.push(m);
    }
    for s in all {
        let (Some(name), Some(spec)) = (&s.metadata.name, &s.spec) else {
            continue;
        };
        let ip = spec.cluster_ip.as_deref().unwrap_or_default();
        if ip.is_empty() || ip == "None" {
            continue;
        }
        let ports: Vec<_> = spec
            .ports
            .iter()
            .flatten()
            .map(|p| (p.name.as_deref(), p.port, p.protocol.as_deref().unwrap_or("TCP")))
            .collect();
        link(&mut out, name, ip, &ports);
    }
    if let Some(at) = api
        && !out.iter().any(|(n, _)| n == "KUBERNETES_SERVICE_HOST")
    {
        link(
            &mut out,
            "kubernetes",
            &at.ip().to_string(),
            &[(Some("https"), i32::from(at.port()), "TCP")],
        );
    }
    out
}

fn link(out: &mut Vec<(String, String)>, service: &str, ip: &str, ports: &[(Option<&str>, i32, &str)]) {
    let upper = |s: &str| s.replace('-', "_").to_uppercase();
    let prefix = upper(service);
    let host = if ip.contains(':') {
        format!("[{ip}]")
    } else {
        ip.to_owned()
    };
    let mut put = |name: String, value: String| out.push((name, value));
    put(format!("{prefix}_SERVICE_HOST"), ip.to_owned());
    if let Some((_, port, _)) = ports.first() {
        put(format!("{prefix}_SERVICE_PORT"), port.to_string());
    }
    for (name, port, _) in ports {
        if let Some(name) = name.filter(|n| !n.is_empty()) {
            put(format!("{prefix}_SERVICE_PORT_{}", upper(name)), port.to_string());
        }
    }
    for (i, (_, port, protocol)) in ports.iter().enumerate() {
        let url = format!("{}://{host}:{port}", protocol.to_lowercase());
        if i == 0 {
            put(format!("{prefix}_PORT"), url.clone());
        }
        let key = format!("{prefix}_PORT_{port}_{}", protocol.to_uppercase());
        put(key.clone(), url);
        put(format!("{key}_PROTO"), protocol.to_lowercase());
        put(format!("{key}_PORT"), port.to_string());
        put(format!("{key}_ADDR"), ip.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expansion() {
        let look = |n: &str| (n == "A").then(|| "1".to_owned());
        for (text, want) in [
            ("$(A)", "1"),
            ("x$(A)y$(B)", "x1y$(B)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$A $", "$A $"),
            ("$(A", "$(A"),
            ("", ""),
        ] {
            assert_eq!(expand(text, look), want, "{text}");
        }
    }

    #[test]
    fn service_links() {
        let svc: Service = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "my-db", "uid": "s"},
            "spec": {"clusterIP": "10.0.0.9", "ports": [{"name": "pg", "port": 5432}]}
        }))
        .unwrap();
        let out = services(&[Arc::new(svc)], None, Some("10.0.0.1:443".parse().unwrap()));
        let get = |n: &str| out.iter().find(|(k, _)| k == n).map(|(_, v)| v.as_str());
        assert_eq!(get("MY_DB_SERVICE_HOST"), Some("10.0.0.9"));
        assert_eq!(get("MY_DB_SERVICE_PORT_PG"), Some("5432"));
        assert_eq!(get("MY_DB_PORT_5432_TCP"), Some("tcp://10.0.0.9:5432"));
        assert_eq!(get("KUBERNETES_SERVICE_HOST"), Some("10.0.0.1"));
        assert_eq!(get("KUBERNETES_SERVICE_PORT_HTTPS"), Some("443"));
    }
}

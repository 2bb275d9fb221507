//! How local tools reach the running instance: the ARM endpoint with its credentials, and kubeconfigs as clients.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use http::{Method, Request};
use http_body_util::BodyExt as _;
use reconcile::{Client, HttpsConfig, Identity};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::paths::Paths;

/// What `oaks server` writes (0600) for `oaks az`, `oaks demo` and `oaks kubeconfig`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ArmAccess {
    /// `https://localhost:8443`, no trailing slash.
    pub base_url: String,
    pub ca_pem: String,
    pub tenant: String,
    pub subscription: String,
    pub client_id: String,
    pub client_secret: String,
}

impl ArmAccess {
    pub fn read(paths: &Paths) -> Result<Self> {
        let path = paths.arm_access();
        let text = fs::read(&path).with_context(|| {
            format!(
                "instance {} has never been up here ({}); run `oaks up`",
                paths.instance,
                path.display()
            )
        })?;
        serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged; `oaks up` writes it anew", path.display()))
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        write_private(path, &serde_json::to_vec_pretty(self)?)
    }
}

/// Writes a file that only its owner may read, atomically.
pub fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let tmp = path.with_extension("new");
    let _ = fs::remove_file(&tmp);
    let mut file = fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&tmp)
        .with_context(|| format!("creating {}", tmp.display()))?;
    std::io::Write::write_all(&mut file, content)?;
    fs::rename(&tmp, path).with_context(|| format!("writing {}", path.display()))
}

/// A logged-in ARM client.
pub struct Arm {
    client: Client,
    pub access: ArmAccess,
}

/// Longest wait for one operation.
const OPERATION_S: u64 = 300;

impl Arm {
    /// Logs in with the platform's service principal.
    pub async fn login(access: ArmAccess) -> Result<Self> {
        let config = |identity| HttpsConfig {
            server: access.base_url.clone(),
            ca_pem: access.ca_pem.clone(),
            identity,
            connector: None,
        };
        let anonymous = Client::https(config(Identity::Anonymous))?;
        let form = format!(
            "grant_type=client_credentials&client_id={}&client_secret={}&scope={}%2Farm%2F.default",
            access.client_id, access.client_secret, access.base_url
        );
        let request = Request::post("/adfs/oauth2/token")
            .header("content-type", "application/x-www-form-urlencoded")
            .body(reconcile::full_body(form))?;
        let reply = anonymous
            .raw(request)
            .await
            .map_err(chained)
            .context("logging in to ARM")?;
        let status = reply.status();
        let body = reply
            .into_body()
            .collect()
            .await
            .map_err(|e| anyhow::anyhow!(e))?
            .to_bytes();
        let body: Value =
            serde_json::from_slice(&body).with_context(|| format!("the token endpoint answered {status}"))?;
        let Some(token) = body["access_token"].as_str() else {
            bail!("the token endpoint answered {status}: {body}")
        };
        let client = Client::https(config(Identity::Token(token.to_owned())))?;
        Ok(Self { client, access })
    }

    /// One call: status, `Azure-AsyncOperation` if any, body (`Null` if empty).
    async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<(u16, Option<String>, Value)> {
        let what = format!("{method} {path}");
        let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", "application/json")
            .body(reconcile::full_body(bytes))?;
        let reply = self
            .client
            .raw(request)
            .await
            .map_err(chained)
            .with_context(|| what.clone())?;
        let status = reply.status().as_u16();
        let poll = ["azure-asyncoperation", "location"]
            .iter()
            .find_map(|h| reply.headers().get(*h)?.to_str().ok().map(str::to_owned));
        let bytes = reply
            .into_body()
            .collect()
            .await
            .map_err(|e| anyhow::anyhow!(e))
            .with_context(|| what.clone())?
            .to_bytes();
        let body = if bytes.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&bytes).with_context(|| format!("{what}: the answer is no JSON"))?
        };
        if status >= 400 {
            bail!(
                "{what}: {status} {}: {}",
                body["error"]["code"].as_str().unwrap_or("?"),
                body["error"]["message"].as_str().unwrap_or("?")
            );
        }
        Ok((status, poll, body))
    }

    /// GET; `None` if it does not exist.
    pub async fn get(&self, id: &str, api_version: &str) -> Result<Option<Value>> {
        let path = format!("{id}?api-version={api_version}");
        let request = Request::get(&path).body(reconcile::full_body(""))?;
        let reply = self.client.raw(request).await.map_err(chained)?;
        if reply.status().as_u16() == 404 {
            return Ok(None);
        }
        Ok(Some(self.call(Method::GET, &path, None).await?.2))
    }

    pub async fn post(&self, id_and_action: &str, api_version: &str) -> Result<Value> {
        Ok(self
            .call(
                Method::POST,
                &format!("{id_and_action}?api-version={api_version}"),
                None,
            )
            .await?
            .2)
    }

    /// PUT and wait until the operation has ended; the resource as it then is.
    pub async fn put(&self, id: &str, api_version: &str, body: &Value) -> Result<Value> {
        let path = format!("{id}?api-version={api_version}");
        let (_, poll, first) = self.call(Method::PUT, &path, Some(body)).await?;
        self.finish(poll, &first).await.with_context(|| format!("PUT {id}"))?;
        Ok(self.call(Method::GET, &path, None).await?.2)
    }

    /// DELETE and wait until it is gone.
    pub async fn delete(&self, id: &str, api_version: &str) -> Result<()> {
        let (_, poll, first) = self
            .call(Method::DELETE, &format!("{id}?api-version={api_version}"), None)
            .await?;
        self.finish(poll, &first).await.with_context(|| format!("DELETE {id}"))
    }

    async fn finish(&self, poll: Option<String>, first: &Value) -> Result<()> {
        let state = first["properties"]["provisioningState"].as_str().unwrap_or("Succeeded");
        let Some(poll) = poll.filter(|_| first.is_null() || !matches!(state, "Succeeded")) else {
            return Ok(());
        };
        let path = poll
            .strip_prefix(&self.access.base_url)
            .map(str::to_owned)
            .unwrap_or(poll);
        let end = tokio::time::Instant::now() + Duration::from_secs(OPERATION_S);
        loop {
            let (code, _, operation) = self.call(Method::GET, &path, None).await?;
            match operation["status"].as_str() {
                Some("Succeeded") => return Ok(()),
                Some(state @ ("Failed" | "Canceled")) => {
                    bail!(
                        "{state}: {}: {}",
                        operation["error"]["code"].as_str().unwrap_or("?"),
                        operation["error"]["message"].as_str().unwrap_or("no message")
                    )
                }
                None if code == 200 || code == 204 => return Ok(()),
                _ => {}
            }
            if tokio::time::Instant::now() > end {
                bail!("still not done after {OPERATION_S} s");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// A client from a kubeconfig with inline data (as Oaks writes them).
pub fn client_of(kubeconfig: &str) -> Result<Client> {
    let v: Value = serde_saphyr::from_str(kubeconfig).context("reading the kubeconfig")?;
    let cluster = &v["clusters"][0]["cluster"];
    let user = &v["users"][0]["user"];
    let pem = |value: &Value, what: &str| -> Result<String> {
        use base64::Engine as _;
        let text = value.as_str().with_context(|| format!("the kubeconfig lacks {what}"))?;
        Ok(String::from_utf8(
            base64::engine::general_purpose::STANDARD
                .decode(text)
                .with_context(|| format!("{what} is no base64"))?,
        )?)
    };
    let identity = match user["token"].as_str() {
        Some(token) => Identity::Token(token.to_owned()),
        None => Identity::ClientCert {
            cert_pem: pem(&user["client-certificate-data"], "client-certificate-data")?,
            key_pem: pem(&user["client-key-data"], "client-key-data")?,
        },
    };
    let server = cluster["server"]
        .as_str()
        .context("the kubeconfig lacks a server")?
        .to_owned();
    let ca_pem = pem(&cluster["certificate-authority-data"], "certificate-authority-data")?;
    Client::https(HttpsConfig {
        server,
        ca_pem,
        identity,
        connector: None,
    })
    .map_err(chained)
}

/// The whole chain of a library error as one `anyhow` error.
pub fn chained(e: impl std::error::Error + Send + Sync + 'static) -> anyhow::Error {
    anyhow::anyhow!(stdx::chain(&e).to_string())
}

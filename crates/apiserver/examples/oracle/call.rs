//! Requests, answers, and this API server to send them to.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result};
use apiserver::{ApiServer, ApiServerConfig, ClusterConfig, NoDialer};
use http::{Method, Request};
use http_body_util::BodyExt;
use reconcile::{Client, HttpsConfig, Identity};
use serde_json::Value;
use store::LocalEngine;

/// One request.
#[derive(Clone)]
pub struct Call {
    pub method: Method,
    /// With its query.
    pub path: String,
    pub content_type: &'static str,
    pub accept: &'static str,
    pub body: Option<Value>,
}

pub const JSON: &str = "application/json";

impl Call {
    pub fn new(method: Method, path: &str, content_type: &'static str, body: Option<Value>) -> Self {
        Self {
            method,
            path: path.to_owned(),
            content_type,
            accept: JSON,
            body,
        }
    }

    pub fn get(path: &str) -> Self {
        Self::new(Method::GET, path, JSON, None)
    }

    pub fn post(path: &str, body: Value) -> Self {
        Self::new(Method::POST, path, JSON, Some(body))
    }

    pub fn accept(mut self, accept: &'static str) -> Self {
        self.accept = accept;
        self
    }
}

pub struct Answer {
    pub code: u16,
    pub warnings: Vec<String>,
    /// A text where it is no JSON.
    pub body: Value,
}

pub async fn send(client: &Client, call: &Call) -> Result<Answer> {
    let bytes = call.body.as_ref().map(Value::to_string).unwrap_or_default();
    let request = Request::builder()
        .method(call.method.clone())
        .uri(&call.path)
        .header("content-type", call.content_type)
        .header("accept", call.accept)
        .header("user-agent", "oracle/1.0")
        .body(reconcile::full_body(bytes))?;
    let reply = client.raw(request).await?;
    let code = reply.status().as_u16();
    let warnings = reply
        .headers()
        .get_all("warning")
        .iter()
        .filter_map(|h| h.to_str().ok().map(str::to_owned))
        .collect();
    let bytes = reply
        .into_body()
        .collect()
        .await
        .map_err(|e| anyhow::anyhow!("{e}"))?
        .to_bytes();
    let body =
        serde_json::from_slice(&bytes).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
    Ok(Answer { code, warnings, body })
}

/// This API server, with nothing else of Oaks: no controller changes its objects, as on the other side.
pub async fn ours(scratch: &Path) -> Result<Client> {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
    let url = format!("https://{}", listener.local_addr()?);
    let api = ApiServer::new(ApiServerConfig {
        engine: LocalEngine::open(&scratch.join("store"))?,
        dialer: Arc::new(NoDialer),
        data_dir: scratch.join("clusters"),
        clock: stdx::RealClock::shared(),
    });
    let cluster = api.create_cluster(ClusterConfig::new("oracle", &url)).await?;
    let kubeconfig = cluster.kubeconfig("oracle", "admin", &["system:masters"])?;
    tokio::spawn(cluster.serve(listener));
    let config: Value = serde_saphyr::from_str(&kubeconfig)?;
    let pem = |value: &Value| -> Result<String> {
        use base64::Engine as _;
        let text = value.as_str().context("the kubeconfig lacks a certificate")?;
        Ok(String::from_utf8(
            base64::engine::general_purpose::STANDARD.decode(text)?,
        )?)
    };
    let user = &config["users"][0]["user"];
    Ok(Client::https(HttpsConfig {
        server: url,
        ca_pem: pem(&config["clusters"][0]["cluster"]["certificate-authority-data"])?,
        identity: Identity::ClientCert {
            cert_pem: pem(&user["client-certificate-data"])?,
            key_pem: pem(&user["client-key-data"])?,
        },
        connector: None,
    })?)
}

//! A cluster in memory, and calls to it.

#![expect(dead_code, reason = "every test binary uses its part of this")]

use std::sync::Arc;

use apiserver::{ApiServer, ApiServerConfig, Body, Cluster, ClusterConfig, LocalService, NoDialer, UserInfo};
use http::{Method, Request};
use http_body_util::BodyExt;
use serde_json::Value;
use store::ModelEngine;
use tower::ServiceExt;

pub struct Api {
    pub cluster: Arc<Cluster>,
    pub service: LocalService,
    _dir: tempfile::TempDir,
}

pub async fn api() -> Api {
    let dir = tempfile::tempdir().unwrap();
    let server = ApiServer::new(ApiServerConfig {
        engine: ModelEngine::new(),
        dialer: Arc::new(NoDialer),
        data_dir: dir.path().to_owned(),
        clock: stdx::RealClock::shared(),
    });
    let cluster = server
        .create_cluster(ClusterConfig::new("c", "https://127.0.0.1:6443"))
        .await
        .unwrap();
    let service = cluster.local_service(UserInfo::admin("test"));
    Api {
        cluster,
        service,
        _dir: dir,
    }
}

pub fn body(bytes: impl Into<bytes::Bytes>) -> Body {
    http_body_util::Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

impl Api {
    pub async fn call(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        data: impl Into<bytes::Bytes>,
    ) -> (u16, Value) {
        call(&self.service, method, path, content_type, data).await
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.call("GET", path, "application/json", "").await
    }

    pub async fn post(&self, path: &str, value: Value) -> (u16, Value) {
        self.call("POST", path, "application/json", value.to_string()).await
    }

    pub async fn put(&self, path: &str, value: Value) -> (u16, Value) {
        self.call("PUT", path, "application/json", value.to_string()).await
    }

    pub async fn merge(&self, path: &str, value: Value) -> (u16, Value) {
        self.call("PATCH", path, "application/merge-patch+json", value.to_string())
            .await
    }

    pub async fn delete(&self, path: &str) -> (u16, Value) {
        self.call("DELETE", path, "application/json", "").await
    }

    /// Opens a watch and reads events as they are asked for.
    pub async fn watch(&self, path: &str) -> Watch {
        watch(&self.service, path).await
    }
}

pub async fn watch(service: &LocalService, path: &str) -> Watch {
    let request = Request::builder().uri(path).body(body("")).unwrap();
    let response = service.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), 200, "{path}");
    Watch {
        body: response.into_body(),
        buffer: Vec::new(),
    }
}

pub async fn call(
    service: &LocalService,
    method: &str,
    path: &str,
    content_type: &str,
    data: impl Into<bytes::Bytes>,
) -> (u16, Value) {
    let request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).unwrap())
        .uri(path)
        .header("content-type", content_type)
        .body(body(data))
        .unwrap();
    let response = service.clone().oneshot(request).await.unwrap();
    let code = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (
        code,
        serde_json::from_slice(&bytes).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into())),
    )
}

/// As [`call`], of a body that is asked for in one form only.
pub async fn call_accept(service: &LocalService, method: &str, path: &str, accept: &str) -> (u16, Value) {
    let request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).unwrap())
        .uri(path)
        .header("accept", accept)
        .body(body(""))
        .unwrap();
    let response = service.clone().oneshot(request).await.unwrap();
    let code = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (code, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

pub struct Watch {
    body: Body,
    buffer: Vec<u8>,
}

impl Watch {
    pub async fn next(&mut self) -> Value {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line).unwrap();
            }
            let wait = std::time::Duration::from_secs(10);
            let frame = tokio::time::timeout(wait, self.body.frame())
                .await
                .expect("an event in time");
            self.buffer
                .extend_from_slice(&frame.expect("the watch goes on").unwrap().into_data().unwrap());
        }
    }

    /// Reads on until the stream ends; whether it does so in time.
    pub async fn ended(&mut self) -> bool {
        let rest = async { while self.body.frame().await.is_some() {} };
        tokio::time::timeout(std::time::Duration::from_secs(10), rest)
            .await
            .is_ok()
    }

    pub async fn brief(&mut self) -> String {
        let event = self.next().await;
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        format!(
            "{} {}",
            text(&event["type"]),
            text(&event["object"]["metadata"]["name"])
        )
    }
}

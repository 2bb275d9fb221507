//! Typed calls over a service. Every call has a deadline; watches have none (the reflector watches them).

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tower::Service;

use crate::error::Optional;
use crate::resource::query;
use crate::{ApiStatus, Body, Error, ErrorKind, HttpsConfig, Kind, LocalService, ResourceId, full_body};

/// A call that takes longer has failed. The server's own limit for a request is 60 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// User agent of those who name none: the server then takes the user's name for the manager of fields.
const AGENT: http::HeaderValue = http::HeaderValue::from_static("oaks");
/// Largest answer read into memory: a list of 100,000 pods of 5 KB.
const ANSWER_BYTES_MAX: usize = 512 << 20;

/// Selects and pages a list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListParams {
    /// Label selector, query form; empty for all.
    pub label_selector: String,
    /// Field selector; empty for all.
    pub field_selector: String,
    /// At most this many items per page; 0 for no pages.
    pub limit: u32,
    /// Resource version to list at; empty for the newest.
    pub resource_version: String,
    /// Token of the next page.
    pub continue_token: String,
}

impl ListParams {
    /// Objects with these labels.
    pub fn labels(selector: impl Into<String>) -> Self {
        Self {
            label_selector: selector.into(),
            ..Self::default()
        }
    }

    /// Objects with these fields.
    pub fn fields(selector: impl Into<String>) -> Self {
        Self {
            field_selector: selector.into(),
            ..Self::default()
        }
    }

    fn query(&self) -> String {
        let limit = if self.limit == 0 {
            String::new()
        } else {
            self.limit.to_string()
        };
        query([
            ("labelSelector", self.label_selector.as_str()),
            ("fieldSelector", &self.field_selector),
            ("limit", &limit),
            ("resourceVersion", &self.resource_version),
            ("continue", &self.continue_token),
        ])
    }
}

/// Conditions and manner of a deletion.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DeleteParams {
    /// Delete only the object with this uid.
    pub uid: Option<String>,
    /// Delete only this version of the object.
    pub resource_version: Option<String>,
    /// Grace period in seconds; 0 deletes at once.
    pub grace_period_s: Option<i64>,
    /// `Background`, `Foreground` or `Orphan`.
    pub propagation: Option<&'static str>,
}

impl DeleteParams {
    /// Deletes only the object with this uid.
    pub fn uid(uid: impl Into<String>) -> Self {
        Self {
            uid: Some(uid.into()),
            ..Self::default()
        }
    }

    fn body(&self) -> Value {
        let mut body = serde_json::json!({"kind": "DeleteOptions", "apiVersion": "v1"});
        if let Some(seconds) = self.grace_period_s {
            body["gracePeriodSeconds"] = seconds.into();
        }
        if let Some(policy) = self.propagation {
            body["propagationPolicy"] = policy.into();
        }
        if let Some(uid) = &self.uid {
            body["preconditions"]["uid"] = uid.as_str().into();
        }
        if let Some(version) = &self.resource_version {
            body["preconditions"]["resourceVersion"] = version.as_str().into();
        }
        body
    }
}

/// A change to an object.
#[derive(Debug, Clone, PartialEq)]
pub enum Patch {
    /// RFC 7386.
    Merge(Value),
    /// Kubernetes' own, with per-field list merging.
    Strategic(Value),
    /// RFC 6902: an array of operations.
    Json(Value),
}

impl Patch {
    fn parts(&self) -> (&'static str, &Value) {
        match self {
            Self::Merge(value) => ("application/merge-patch+json", value),
            Self::Strategic(value) => ("application/strategic-merge-patch+json", value),
            Self::Json(value) => ("application/json-patch+json", value),
        }
    }
}

/// One page of a list.
#[derive(Debug, Clone, Deserialize)]
#[serde(bound(deserialize = "K: Deserialize<'de>"))]
pub struct List<K> {
    metadata: ListMeta,
    /// The objects, in the server's order (by namespace and name).
    #[serde(default = "Vec::new", deserialize_with = "null_as_empty")]
    pub items: Vec<K>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ListMeta {
    resource_version: String,
    r#continue: String,
}

impl<K> List<K> {
    /// The version the list was read at.
    pub fn resource_version(&self) -> &str {
        &self.metadata.resource_version
    }

    /// Token of the next page; empty at the last.
    pub fn continue_token(&self) -> &str {
        &self.metadata.r#continue
    }
}

impl<K> IntoIterator for List<K> {
    type Item = K;
    type IntoIter = std::vec::IntoIter<K>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.into_iter()
    }
}

fn null_as_empty<'de, D: serde::Deserializer<'de>, K: Deserialize<'de>>(d: D) -> Result<Vec<K>, D::Error> {
    Ok(Option::<Vec<K>>::deserialize(d)?.unwrap_or_default())
}

/// Talks to one cluster. Clones are cheap and share the connection.
#[derive(Clone)]
pub struct Client {
    service: LocalService,
    /// Scheme and authority in front of every path; empty for local services.
    base: Arc<str>,
    authorization: Option<Arc<http::HeaderValue>>,
    timeout: Duration,
    agent: http::HeaderValue,
    upgrades: Option<Arc<crate::exec::Upgrades>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Calls an API in the same process; who calls was fixed when the service was made.
    pub fn local(service: LocalService) -> Self {
        Self {
            service,
            base: "".into(),
            authorization: None,
            timeout: CALL_TIMEOUT,
            agent: AGENT,
            upgrades: None,
        }
    }

    /// Calls an API over TLS, reusing one HTTP/2 connection where the server speaks it. Connects at the first call.
    /// # Errors
    /// `Config` if the URL, the certificates or the token cannot be used.
    pub fn https(config: HttpsConfig) -> Result<Self, Error> {
        let built = crate::https::build(config)?;
        Ok(Self {
            service: built.service,
            base: built.base.into(),
            authorization: built.authorization.map(Arc::new),
            timeout: CALL_TIMEOUT,
            agent: AGENT,
            upgrades: Some(Arc::new(built.upgrades)),
        })
    }

    /// The same client under another user agent. Its first word is the manager of the fields this client sets.
    pub fn with_user_agent(mut self, agent: &'static str) -> Self {
        self.agent = http::HeaderValue::from_static(agent);
        self
    }

    /// The same client with another deadline per call.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    pub(crate) fn upgrades(&self) -> Option<Arc<crate::exec::Upgrades>> {
        self.upgrades.clone()
    }

    pub(crate) fn authorization(&self) -> Option<&http::HeaderValue> {
        self.authorization.as_deref()
    }

    /// The WebSocket URL of a path.
    pub(crate) fn absolute(&self, path: &str) -> String {
        format!("wss://{}{path}", self.base.trim_start_matches("https://"))
    }

    /// The object. Not found is an error.
    pub async fn get<K: Kind>(&self, namespace: Option<&str>, name: &str) -> Result<K, Error> {
        self.request(
            Method::GET,
            &ResourceId::of::<K>().path(namespace, Some(name), None),
            NONE,
        )
        .await
    }

    /// The object, if it exists.
    pub async fn get_opt<K: Kind>(&self, namespace: Option<&str>, name: &str) -> Result<Option<K>, Error> {
        self.get(namespace, name).await.optional()
    }

    /// Objects of one namespace, or of all.
    pub async fn list<K: Kind>(&self, namespace: Option<&str>, params: &ListParams) -> Result<List<K>, Error> {
        let path = ResourceId::of::<K>().path(namespace, None, None) + &params.query();
        self.request(Method::GET, &path, NONE).await
    }

    /// Creates the object in `namespace`, or in the namespace it names itself; returns it as stored.
    pub async fn create<K: Kind>(&self, namespace: Option<&str>, object: &K) -> Result<K, Error> {
        let namespace = namespace.or(object.metadata().namespace.as_deref());
        self.request(
            Method::POST,
            &ResourceId::of::<K>().path(namespace, None, None),
            Some(object),
        )
        .await
    }

    /// Replaces the object; its `resourceVersion`, if set, must be the newest.
    pub async fn update<K: Kind>(&self, namespace: Option<&str>, object: &K) -> Result<K, Error> {
        self.replace(namespace, object, None).await
    }

    /// Replaces the object's status and nothing else.
    pub async fn update_status<K: Kind>(&self, namespace: Option<&str>, object: &K) -> Result<K, Error> {
        self.replace(namespace, object, Some("status")).await
    }

    async fn replace<K: Kind>(&self, namespace: Option<&str>, object: &K, sub: Option<&str>) -> Result<K, Error> {
        let namespace = namespace.or(object.metadata().namespace.as_deref());
        let name = object.metadata().name.as_deref();
        let path = ResourceId::of::<K>().path(namespace, name, sub);
        if name.is_none_or(str::is_empty) {
            return Err(Error::new(
                format!("PUT {path}"),
                ErrorKind::Missing { field: "metadata.name" },
            ));
        }
        self.request(Method::PUT, &path, Some(object)).await
    }

    /// Changes the object or one subresource; returns it as stored.
    pub async fn patch<K: Kind>(
        &self,
        namespace: Option<&str>,
        name: &str,
        patch: &Patch,
        subresource: Option<&str>,
    ) -> Result<K, Error> {
        self.patch_path(&ResourceId::of::<K>().path(namespace, Some(name), subresource), patch)
            .await
    }

    /// Changes whatever lives at `path`.
    pub async fn patch_path<T: DeserializeOwned>(&self, path: &str, patch: &Patch) -> Result<T, Error> {
        let (media, body) = patch.parts();
        self.call(Method::PATCH, path, Some(media), Some(body)).await
    }

    /// Asks for deletion. The object may live on while finalizers or a grace period hold it.
    pub async fn delete<K: Kind>(
        &self,
        namespace: Option<&str>,
        name: &str,
        params: &DeleteParams,
    ) -> Result<(), Error> {
        self.delete_path(&ResourceId::of::<K>().path(namespace, Some(name), None), params)
            .await
    }

    /// Asks for deletion of whatever lives at `path`, a collection included.
    pub async fn delete_path(&self, path: &str, params: &DeleteParams) -> Result<(), Error> {
        let _: serde::de::IgnoredAny = self.request(Method::DELETE, path, Some(&params.body())).await?;
        Ok(())
    }

    /// Posts to a subresource (`pods/binding`, `pods/eviction`, `serviceaccounts/token`).
    pub async fn create_subresource<K: Kind, B: Serialize + ?Sized, R: DeserializeOwned>(
        &self,
        namespace: Option<&str>,
        name: &str,
        subresource: &str,
        body: &B,
    ) -> Result<R, Error> {
        let path = ResourceId::of::<K>().path(namespace, Some(name), Some(subresource));
        self.request(Method::POST, &path, Some(body)).await
    }

    /// Any call with JSON both ways; `path` may carry a query.
    pub async fn request<T: DeserializeOwned, B: Serialize + ?Sized>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, Error> {
        self.call(method, path, None, body).await
    }

    async fn call<T: DeserializeOwned, B: Serialize + ?Sized>(
        &self,
        method: Method,
        path: &str,
        media: Option<&'static str>,
        body: Option<&B>,
    ) -> Result<T, Error> {
        let operation = format!("{method} {path}");
        let bytes = self.call_bytes(method.clone(), path, media, body).await?;
        serde_json::from_slice(&bytes).map_err(|e| Error::new(operation.as_str(), ErrorKind::Decode(e)))
    }

    /// Any call; the answer's bytes as they came.
    pub(crate) async fn call_bytes<B: Serialize + ?Sized>(
        &self,
        method: Method,
        path: &str,
        media: Option<&'static str>,
        body: Option<&B>,
    ) -> Result<Bytes, Error> {
        let operation = format!("{method} {path}");
        let mut request = Request::builder().method(method.clone()).uri(path);
        let body = match body {
            None => full_body(Bytes::new()),
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, media.unwrap_or("application/json"));
                let bytes = serde_json::to_vec(body)
                    .map_err(|e| Error::new(operation.as_str(), ErrorKind::Request(Box::new(e))))?;
                full_body(bytes)
            }
        };
        let request = request
            .body(body)
            .map_err(|e| Error::new(operation.as_str(), ErrorKind::Request(Box::new(e))))?;
        let work = async {
            let response = self.send(request, &operation).await?;
            let (parts, body) = response.into_parts();
            let bytes = collect(body, &operation).await?;
            if parts.status.is_success() {
                Ok(bytes)
            } else {
                Err(failure(parts.status, &bytes, operation.clone()))
            }
        };
        match tokio::time::timeout(self.timeout, work).await {
            Ok(result) => result,
            Err(_) => Err(Error::new(operation.as_str(), ErrorKind::Timeout(self.timeout))),
        }
    }

    /// Sends a request whose URI is a path, and returns the answer with its body still streaming. No deadline; failure
    /// codes are answers here.
    pub async fn raw(&self, request: Request<Body>) -> Result<Response<Body>, Error> {
        let operation = format!("{} {}", request.method(), request.uri());
        self.send(request, &operation).await
    }

    /// Opens a stream (watch, log); failure codes are errors.
    pub async fn stream(&self, path: &str) -> Result<Body, Error> {
        let operation = format!("GET {path}");
        let request = Request::get(path)
            .body(full_body(Bytes::new()))
            .map_err(|e| Error::new(operation.as_str(), ErrorKind::Request(Box::new(e))))?;
        let response = match tokio::time::timeout(self.timeout, self.send(request, &operation)).await {
            Ok(response) => response?,
            Err(_) => return Err(Error::new(operation.as_str(), ErrorKind::Timeout(self.timeout))),
        };
        let (parts, body) = response.into_parts();
        if parts.status.is_success() {
            return Ok(body);
        }
        let bytes = collect(body, &operation).await?;
        Err(failure(parts.status, &bytes, operation.clone()))
    }

    /// Boxed: the service's own future type defeats the compiler's `Send` proof in callers' tasks.
    fn send(&self, request: Request<Body>, operation: &str) -> BoxFuture<'static, Result<Response<Body>, Error>> {
        let (mut parts, body) = request.into_parts();
        if !self.base.is_empty() {
            match format!("{}{}", self.base, parts.uri).parse() {
                Ok(uri) => parts.uri = uri,
                Err(error) => {
                    let error = Error::new(operation, ErrorKind::Request(Box::new(error)));
                    return Box::pin(std::future::ready(Err(error)));
                }
            }
        }
        parts
            .headers
            .entry(header::ACCEPT)
            .or_insert(http::HeaderValue::from_static("application/json"));
        parts
            .headers
            .entry(header::USER_AGENT)
            .or_insert_with(|| self.agent.clone());
        if let Some(value) = &self.authorization {
            parts.headers.insert(header::AUTHORIZATION, (**value).clone());
        }
        let request = Request::from_parts(parts, body);
        let operation = operation.to_owned();
        let mut service = self.service.clone();
        Box::pin(async move {
            let outcome = match std::future::poll_fn(|cx| service.poll_ready(cx)).await {
                Ok(()) => service.call(request).await,
                Err(error) => Err(error),
            };
            outcome.map_err(|e| Error::new(operation, ErrorKind::Transport(e)))
        })
    }
}

/// The absent body, typed.
pub(crate) const NONE: Option<&()> = None;

async fn collect(mut body: Body, operation: &str) -> Result<Bytes, Error> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Error::new(operation, ErrorKind::Transport(e)))?;
        let Ok(data) = frame.into_data() else { continue };
        if first.is_empty() && rest.is_empty() {
            // Most answers are one frame: no copy.
            first = data;
            continue;
        }
        if rest.is_empty() {
            rest.extend_from_slice(&first);
        }
        rest.extend_from_slice(&data);
        if rest.len() > ANSWER_BYTES_MAX {
            return Err(Error::new(
                operation,
                ErrorKind::TooLarge {
                    limit: ANSWER_BYTES_MAX,
                },
            ));
        }
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}

pub(crate) fn failure(code: StatusCode, bytes: &[u8], operation: String) -> Error {
    let mut status: ApiStatus = serde_json::from_slice(bytes).unwrap_or_default();
    status.code = code.as_u16();
    if status.message.is_empty() {
        let text: String = String::from_utf8_lossy(bytes).trim().chars().take(200).collect();
        status.message = if text.is_empty() {
            code.to_string()
        } else {
            format!("{code}: {text}")
        };
    }
    Error::new(operation, ErrorKind::Status(Box::new(status)))
}

//! Requests that end at a node's kubelet: logs, exec, attach, the node proxy.
//!
//! The connection comes from the [`crate::Dialer`]; over it goes TLS with the API server's kubelet client certificate
//! (never a bearer token) and HTTP/1.1. A WebSocket upgrade is handed through byte by byte. SPDY, which kubectl up to
//! 1.30 wants for exec and every kubectl for port-forward, is refused by name.

use std::time::Duration;

use apimachinery::meta;
use apimachinery::status::Status;
use http::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use rustls_pki_types::ServerName;
use serde_json::Value;
use tokio_rustls::TlsConnector;

use super::Context;
use crate::auth::{self, Attributes, Decision};
use crate::dialer::DialTarget;
use crate::{Body, BoxError, respond};

/// Where kubelets listen unless the node says otherwise.
const KUBELET_PORT: u16 = 10250;
/// Time to reach a kubelet.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Everything that may not stand in a query value or path segment.
const ESCAPED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'&')
    .add(b'+')
    .add(b'/')
    .add(b'<')
    .add(b'=')
    .add(b'>')
    .add(b'?')
    .add(b'[')
    .add(b']')
    .add(b'{')
    .add(b'}');

/// Whether answers of the subresource may take as long as they like.
pub fn is_stream(subresource: &str) -> bool {
    matches!(subresource, "log" | "exec" | "attach" | "portforward" | "proxy")
}

/// What the client wants to upgrade to, lower case; empty if nothing.
fn wanted_upgrade(headers: &HeaderMap) -> String {
    headers
        .get(UPGRADE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default()
        .to_ascii_lowercase()
}

/// Answers a request on a connecting subresource.
pub async fn connect(cx: &Context, parts: Parts, body: Body) -> Result<Response<Body>, Status> {
    match (cx.served.info.plural.as_str(), cx.target.subresource.as_str()) {
        ("nodes", "proxy") => node_proxy(cx, parts, body).await,
        ("pods", "log") => log(cx).await,
        ("pods", "exec" | "attach") => exec(cx, parts).await,
        ("pods", "portforward") => Err(Status::bad_request(
            "port-forward is not served yet: every kubectl tunnels SPDY/3.1 for it, which this server does not speak; use a Service, or exec",
        )),
        (resource, subresource) => {
            let mut status = Status::path_not_found();
            status.message = format!("{resource}/{subresource} is not served yet");
            Err(status)
        }
    }
}

/// The containers of a pod by name.
fn containers(pod: &Value) -> Vec<&str> {
    ["initContainers", "containers", "ephemeralContainers"]
        .iter()
        .flat_map(|list| pod["spec"][*list].as_array().into_iter().flatten())
        .filter_map(|c| c["name"].as_str())
        .collect()
}

fn choose_container(pod: &Value, asked: &str) -> Result<String, Status> {
    let name = meta::name(pod);
    let all = containers(pod);
    if !asked.is_empty() {
        return match all.contains(&asked) {
            true => Ok(asked.to_owned()),
            false => Err(Status::bad_request(&format!(
                "container {asked} is not valid for pod {name}"
            ))),
        };
    }
    let main: Vec<&str> = pod["spec"]["containers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|c| c["name"].as_str())
        .collect();
    if let Some(chosen) = meta::annotation(pod, "kubectl.kubernetes.io/default-container")
        && main.contains(&chosen)
    {
        return Ok(chosen.to_owned());
    }
    match main.as_slice() {
        [only] => Ok((*only).to_owned()),
        [] => Err(Status::bad_request(&format!("pod {name} has no containers"))),
        many => Err(Status::bad_request(&format!(
            "a container name must be specified for pod {name}, choose one of: [{}]",
            many.join(" ")
        ))),
    }
}

async fn log(cx: &Context) -> Result<Response<Body>, Status> {
    let pod = cx.find()?.value();
    let container = choose_container(&pod, cx.query.get("container"))?;
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
    if node.is_empty() {
        return Ok(respond::text(StatusCode::OK, ""));
    }
    let mut query = String::new();
    for key in [
        "follow",
        "limitBytes",
        "previous",
        "sinceSeconds",
        "sinceTime",
        "stream",
        "tailLines",
        "timestamps",
    ] {
        if cx.query.has(key) {
            push_query(&mut query, key, cx.query.get(key));
        }
    }
    let path = kubelet_path("containerLogs", &pod, &container, &query)?;
    let request = Request::builder()
        .method(Method::GET)
        .uri(path)
        .body(respond::full(bytes::Bytes::new()));
    let mut response = send(cx, node, request).await?;
    if !response.status().is_success() {
        return Err(backend_failure(response).await);
    }
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    Ok(response)
}

/// A kubelet's refusal as Status: its own if it sent one, else its text.
async fn backend_failure(response: Response<Body>) -> Status {
    let code = response.status().as_u16();
    let body = super::write::body(response.into_body()).await.unwrap_or_default();
    if let Some(status) = serde_json::from_slice(&body).ok().and_then(|v| Status::from_value(&v)) {
        return status;
    }
    let text = String::from_utf8_lossy(&body);
    let mut status = match code {
        404 => Status::path_not_found(),
        400 => Status::bad_request(""),
        _ => Status::internal(""),
    };
    status.message = if text.trim().is_empty() {
        format!("the node answered {code}")
    } else {
        text.trim().to_owned()
    };
    status
}

async fn exec(cx: &Context, parts: Parts) -> Result<Response<Body>, Status> {
    let pod = cx.find()?.value();
    let container = choose_container(&pod, cx.query.get("container"))?;
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
    if node.is_empty() {
        return Err(Status::bad_request(&format!(
            "pod {} does not have a host assigned",
            meta::name(&pod)
        )));
    }
    if matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")) {
        let phase = pod["status"]["phase"].as_str().unwrap_or_default();
        return Err(Status::bad_request(&format!(
            "cannot exec into a container in a completed pod; current phase is {phase}"
        )));
    }
    match wanted_upgrade(&parts.headers).as_str() {
        "websocket" => may_create(cx)?,
        upgrade if upgrade.starts_with("spdy/") => {
            return Err(Status::bad_request(
                "SPDY/3.1 is not served for exec and attach: use kubectl 1.31 or newer (WebSocket); if this is one, its WebSocket attempt failed before this",
            ));
        }
        _ => {
            return Err(Status::bad_request(
                "Upgrade request required: exec and attach need a WebSocket",
            ));
        }
    }
    let mut query = String::new();
    for (from, to) in [
        ("stdin", "input"),
        ("stdout", "output"),
        ("stderr", "error"),
        ("tty", "tty"),
    ] {
        if cx.query.flag(from) {
            push_query(&mut query, to, "1");
        }
    }
    for command in cx.query.all("command") {
        push_query(&mut query, "command", command);
    }
    let path = kubelet_path(&cx.target.subresource, &pod, &container, &query)?;
    let mut request = Request::builder().method(Method::GET).uri(path);
    for (name, value) in &parts.headers {
        let text = name.as_str();
        if text.starts_with("sec-websocket-") || matches!(text, "upgrade" | "connection" | "origin") {
            request = request.header(name, value);
        }
    }
    let mut response = send(cx, node, request.body(respond::full(bytes::Bytes::new()))).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(backend_failure(response).await);
    }
    let backend = hyper::upgrade::on(&mut response);
    let client = hyper::upgrade::on(&mut Request::from_parts(parts, ()));
    let shutdown = cx.cluster.shutdown.clone();
    tokio::spawn(async move {
        let (Ok(client), Ok(backend)) = tokio::join!(client, backend) else {
            return;
        };
        let (mut client, mut backend) = (TokioIo::new(client), TokioIo::new(backend));
        // Either side ends it; both streams are dropped here.
        let _ = shutdown
            .or_stop(tokio::io::copy_bidirectional(&mut client, &mut backend))
            .await;
    });
    let (head, _) = response.into_parts();
    let mut answer = Response::new(respond::full(bytes::Bytes::new()));
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    for (name, value) in &head.headers {
        if name.as_str().starts_with("sec-websocket-") || *name == UPGRADE || *name == CONNECTION {
            answer.headers_mut().append(name, value.clone());
        }
    }
    Ok(answer)
}

/// WebSockets come as GET; running something in a container needs the right to create all the same.
fn may_create(cx: &Context) -> Result<(), Status> {
    let mut attributes = Attributes::of(&cx.info, &cx.query);
    attributes.verb = "create".into();
    match auth::authorize(&cx.cluster, &cx.user, &attributes) {
        Decision::Allow(_) => Ok(()),
        Decision::Deny(reason) => Err(auth::forbidden(&cx.user, &attributes, &reason)),
    }
}

async fn node_proxy(cx: &Context, parts: Parts, body: Body) -> Result<Response<Body>, Status> {
    cx.find()?;
    if !wanted_upgrade(&parts.headers).is_empty() {
        return Err(Status::bad_request("upgrades through nodes/proxy are not served yet"));
    }
    let query = parts.uri.query().map(|q| format!("?{q}")).unwrap_or_default();
    let mut request = Request::builder()
        .method(parts.method.clone())
        .uri(format!("/{}{query}", cx.target.rest));
    for (name, value) in &parts.headers {
        // The caller's credentials are for this server only.
        let text = name.as_str();
        let own = matches!(
            text,
            "authorization" | "host" | "connection" | "content-length" | "transfer-encoding"
        );
        if !own && !text.starts_with("impersonate-") {
            request = request.header(name, value);
        }
    }
    send(cx, &cx.target.name, request.body(body)).await
}

fn push_query(query: &mut String, key: &str, value: &str) {
    query.push(if query.is_empty() { '?' } else { '&' });
    query.push_str(key);
    query.push('=');
    query.extend(utf8_percent_encode(value, ESCAPED));
}

fn kubelet_path(verb: &str, pod: &Value, container: &str, query: &str) -> Result<Uri, Status> {
    let segment = |text: &str| utf8_percent_encode(text, ESCAPED).to_string();
    let path = format!(
        "/{verb}/{}/{}/{}{query}",
        segment(meta::namespace(pod)),
        segment(meta::name(pod)),
        segment(container)
    );
    path.parse()
        .map_err(|_| Status::bad_request("the request does not make a path on the node"))
}

/// Sends a request to a node's kubelet over a connection of its own.
async fn send(cx: &Context, node: &str, request: http::Result<Request<Body>>) -> Result<Response<Body>, Status> {
    let mut request = request.map_err(|e| Status::bad_request(&format!("the request cannot be forwarded: {e}")))?;
    let object = cx
        .cluster
        .registry
        .resource("", "nodes")
        .get("", node)
        .ok_or_else(|| Status::not_found("nodes", node))?
        .value();
    let addresses = object["status"]["addresses"].as_array();
    let address = addresses
        .into_iter()
        .flatten()
        .find(|a| a["type"] == "InternalIP")
        .and_then(|a| a["address"].as_str())
        .ok_or_else(|| Status::service_unavailable(&format!("node {node:?} has no InternalIP yet")))?
        .to_owned();
    let port = object["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"]
        .as_u64()
        .and_then(|p| u16::try_from(p).ok())
        .filter(|p| *p != 0)
        .unwrap_or(KUBELET_PORT);
    let dialing = |why: &dyn std::fmt::Display| {
        Status::internal(&format!(
            "error dialing backend: node {node:?} at {address}:{port}: {why}"
        ))
    };
    let target = DialTarget::Node {
        name: node.to_owned(),
        address: address.clone(),
        port,
    };
    let connecting = async {
        let stream = cx
            .cluster
            .dialer
            .dial(cx.cluster.name(), target)
            .await
            .map_err(|e| dialing(&e))?;
        // The node proves its name, whatever address it has at the moment.
        let name = ServerName::try_from(node.to_owned()).map_err(|e| dialing(&e))?;
        let tls = TlsConnector::from(cx.cluster.pki.kubelet_client.clone());
        let stream = tls.connect(name, stream).await.map_err(|e| dialing(&e))?;
        hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| dialing(&e))
    };
    let (mut sender, connection) = match tokio::time::timeout(DIAL_TIMEOUT, connecting).await {
        Ok(connected) => connected?,
        Err(_) => return Err(dialing(&"no answer within 10 s")),
    };
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a connection to a node ended with an error");
        }
    });
    if let Ok(host) = HeaderValue::from_str(&format!("{address}:{port}")) {
        request.headers_mut().insert(HOST, host);
    }
    let response = sender.send_request(request).await.map_err(|e| dialing(&e))?;
    Ok(response.map(|body| body.map_err(|e| Box::new(e) as BoxError).boxed_unsync()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn containers_are_chosen_as_kubectl_expects() {
        let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}, {"name": "b"}],
            "initContainers": [{"name": "i"}]}});
        assert_eq!(choose_container(&pod, "i").unwrap(), "i");
        assert!(
            choose_container(&pod, "x")
                .unwrap_err()
                .message
                .contains("container x is not valid for pod p")
        );
        assert!(
            choose_container(&pod, "")
                .unwrap_err()
                .message
                .contains("choose one of: [a b]")
        );
        let mut query = String::new();
        push_query(&mut query, "command", "a b&c");
        assert_eq!(query, "?command=a%20b%26c");
    }
}

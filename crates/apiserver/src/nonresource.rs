//! Everything off the resource tree: health, version, discovery, OpenAPI, metrics, token keys.

use std::sync::{Arc, LazyLock};

use apimachinery::discovery;
use apimachinery::openapi::Documents;
use apimachinery::status::Status;
use apimachinery::table::{KUBERNETES_VERSION, TypeTable};
use bytes::Bytes;
use http::header::{ETAG, HeaderValue, IF_NONE_MATCH};
use http::{HeaderMap, Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::auth::tokens::ISSUER;
use crate::cluster::Cluster;
use crate::negotiate::accepted;
use crate::request::Query;
use crate::{Body, metrics, respond};

/// Paths that anybody may ask.
const OPEN: [&str; 4] = ["/healthz", "/livez", "/readyz", "/version"];

/// Whether the path answers without credentials: health and, as upstream's default roles have it, the version.
pub fn is_open(path: &str) -> bool {
    OPEN.iter()
        .any(|open| path == *open || path.strip_prefix(open).is_some_and(|rest| rest.starts_with('/')))
}

/// The documents of a table; those of the built-in one are shared by all clusters.
pub fn documents(table: &Arc<TypeTable>) -> Arc<Documents> {
    static BUILTIN: LazyLock<Arc<Documents>> = LazyLock::new(|| Arc::new(Documents::new(TypeTable::builtin())));
    if Arc::ptr_eq(table, &TypeTable::builtin()) {
        BUILTIN.clone()
    } else {
        Arc::new(Documents::new(table.clone()))
    }
}

/// Answers a path that names no resource.
pub fn handle(
    cluster: &Cluster,
    method: &Method,
    path: &str,
    query: &Query,
    headers: &HeaderMap,
) -> Result<Response<Body>, Status> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Err(Status::path_not_found());
    }
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match parts.as_slice() {
        [""] => Ok(respond::json(StatusCode::OK, &json!({"paths": paths(cluster)}))),
        [check @ ("healthz" | "livez" | "readyz"), rest @ ..] => health(check, rest, query),
        ["version"] => Ok(respond::json(StatusCode::OK, &version())),
        ["metrics"] => {
            for resource in cluster.registry.resources() {
                let name = if resource.group.is_empty() {
                    resource.plural.to_string()
                } else {
                    format!("{}.{}", resource.plural, resource.group)
                };
                let labels = metrics::ResourceLabels { resource: name };
                cluster
                    .metrics
                    .objects
                    .get_or_create(&labels)
                    .set(resource.count() as i64);
            }
            let text = cluster.metrics.text();
            Ok(respond::bytes(
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                text,
            ))
        }
        ["api"] => Ok(discover(
            headers,
            || discovery::aggregated_api(&cluster.table()),
            || discovery::api_versions(&server_address(cluster)),
        )),
        ["apis"] => Ok(discover(
            headers,
            || discovery::aggregated_apis(&cluster.table()),
            || discovery::api_group_list(&cluster.table()),
        )),
        ["api", version] => document(discovery::resource_list(&cluster.table(), "", version)),
        ["apis", group] => document(discovery::api_group(&cluster.table(), group)),
        ["apis", group, version] => document(discovery::resource_list(&cluster.table(), group, version)),
        ["openapi", "v2"] | ["swagger.json"] => openapi_v2(&cluster.api().documents, headers),
        ["openapi", "v3"] => Ok(respond::bytes(
            StatusCode::OK,
            "application/json",
            cluster.api().documents.v3_index(),
        )),
        ["openapi", "v3", rest @ ..] => openapi_v3(&cluster.api().documents, &rest.join("/"), headers),
        [".well-known", "openid-configuration"] => Ok(public(respond::json(
            StatusCode::OK,
            &json!({
                "issuer": ISSUER,
                "jwks_uri": format!("{}/openid/v1/jwks", cluster.config.server_url),
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
            }),
        ))),
        ["openid", "v1", "jwks"] => {
            let keys = json!({"keys": [cluster.pki.tokens.jwk()]});
            Ok(public(respond::bytes(
                StatusCode::OK,
                "application/jwk-set+json",
                respond::to_vec(&keys),
            )))
        }
        _ => Err(Status::path_not_found()),
    }
}

/// Keys change with the cluster only; relying parties may keep them for an hour, as upstream says.
fn public(mut response: Response<Body>) -> Response<Body> {
    let value = HeaderValue::from_static("public, max-age=3600");
    response.headers_mut().insert(http::header::CACHE_CONTROL, value);
    response
}

/// What `/version` says.
pub fn version() -> Value {
    let mut numbers = KUBERNETES_VERSION.trim_start_matches('v').split('.');
    json!({
        "major": numbers.next().unwrap_or_default(),
        "minor": numbers.next().unwrap_or_default(),
        "gitVersion": format!("{KUBERNETES_VERSION}+oaks"),
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "rustc",
        "platform": format!("linux/{}", if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }),
    })
}

fn server_address(cluster: &Cluster) -> String {
    let (host, port) = cluster.config.server_host();
    format!("{host}:{port}")
}

fn paths(cluster: &Cluster) -> Vec<String> {
    let mut paths: Vec<String> = ["/.well-known/openid-configuration", "/api", "/api/v1", "/apis"]
        .map(str::to_owned)
        .to_vec();
    for (group, versions) in discovery::groups(&cluster.table())
        .into_iter()
        .filter(|(g, _)| !g.is_empty())
    {
        paths.push(format!("/apis/{group}"));
        paths.extend(versions.iter().map(|v| format!("/apis/{group}/{v}")));
    }
    paths.extend(
        [
            "/healthz",
            "/livez",
            "/metrics",
            "/openapi/v2",
            "/openapi/v3",
            "/openid/v1/jwks",
            "/readyz",
            "/version",
        ]
        .map(str::to_owned),
    );
    paths
}

fn health(check: &str, rest: &[&str], query: &Query) -> Result<Response<Body>, Status> {
    // The process answers and its store accepted the cluster's first objects before it listened.
    const CHECKS: [&str; 3] = ["ping", "log", "etcd"];
    match rest {
        [] if query.has("verbose") => {
            let lines: String = CHECKS.iter().map(|c| format!("[+]{c} ok\n")).collect();
            Ok(respond::text(StatusCode::OK, format!("{lines}{check} check passed\n")))
        }
        [] => Ok(respond::text(StatusCode::OK, "ok")),
        [one] if CHECKS.contains(one) => Ok(respond::text(StatusCode::OK, "ok")),
        _ => Err(Status::path_not_found()),
    }
}

fn discover(headers: &HeaderMap, aggregated: impl FnOnce() -> Value, plain: impl FnOnce() -> Value) -> Response<Body> {
    let wants = accepted(headers).into_iter().find(|a| {
        matches!(a.media.as_str(), "application/json" | "*/*") && (a.param("as").is_empty() || a.param("v") == "v2")
    });
    match wants {
        Some(a) if a.param("g") == "apidiscovery.k8s.io" && a.param("as") == "APIGroupDiscoveryList" => {
            let content_type = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
            cached(content_type, respond::to_vec(&aggregated()).into(), headers)
        }
        _ => respond::json(StatusCode::OK, &plain()),
    }
}

fn document(value: Option<Value>) -> Result<Response<Body>, Status> {
    value
        .map(|v| respond::json(StatusCode::OK, &v))
        .ok_or_else(Status::path_not_found)
}

fn openapi_v2(documents: &Documents, headers: &HeaderMap) -> Result<Response<Body>, Status> {
    const PROTO: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";
    const PROTO_DOT: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
    let entries = accepted(headers);
    let wants_proto = entries
        .iter()
        .find(|a| {
            matches!(
                a.media.as_str(),
                "application/json" | "*/*" | "application/*" | PROTO | PROTO_DOT
            )
        })
        .is_some_and(|a| a.media == PROTO || a.media == PROTO_DOT);
    let (content_type, body) = if wants_proto {
        (PROTO_DOT, documents.v2_proto())
    } else {
        ("application/json", documents.v2_json())
    };
    Ok(cached(content_type, body, headers))
}

fn openapi_v3(documents: &Documents, path: &str, headers: &HeaderMap) -> Result<Response<Body>, Status> {
    let body = documents.v3(path).ok_or_else(Status::path_not_found)?;
    Ok(cached("application/json", body, headers))
}

/// A document with an ETag, compressed for those who take it.
fn cached(content_type: &str, body: Bytes, headers: &HeaderMap) -> Response<Body> {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(&body);
    let hex: String = digest.iter().take(16).map(|b| format!("{b:02x}")).collect();
    let etag = format!("\"{hex}\"");
    let same = headers.get(IF_NONE_MATCH).and_then(|v| v.to_str().ok()) == Some(&etag);
    let code = if same { StatusCode::NOT_MODIFIED } else { StatusCode::OK };
    let response = respond::bytes(code, content_type, Bytes::new());
    let mut response = if same {
        response
    } else {
        respond::compress(response, body, respond::accepts_gzip(headers))
    };
    if let Ok(value) = HeaderValue::from_str(&etag) {
        response.headers_mut().insert(ETAG, value);
    }
    response
}

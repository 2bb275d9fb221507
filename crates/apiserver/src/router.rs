//! From a request to its handler: identity, authorization, resource, verb, metrics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use apimachinery::status::Status;
use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};

use crate::audit::Trail;
use crate::auth::{self, Attributes, Decision, MASTERS, UserInfo, tokens};
use crate::cluster::Cluster;
use crate::handlers::{Context, connect, create, delete, list, reviews, subresources, update, warn, watch};
use crate::metrics::{DurationLabels, KindLabels, RequestLabels};
use crate::negotiate::{self, Offer, Output};
use crate::request::{self, Query, RequestInfo, Target};
use crate::served::Served;
use crate::strategy::Part;
use crate::{Body, crds, nonresource, respond};

/// Longest time for anything but watches and connections to nodes, as upstream's.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Answers one request. `user` is what the connection proves; without it a bearer token may tell.
pub async fn handle(cluster: Arc<Cluster>, user: Option<UserInfo>, request: Request<Body>) -> Response<Body> {
    let started = Instant::now();
    let (parts, body) = request.into_parts();
    let query = Query::parse(parts.uri.query().unwrap_or_default());
    let info = request::parse(&parts.method, parts.uri.path(), &query);
    let output = negotiate::choose(
        &parts.headers,
        Offer {
            protobuf: true,
            transform: true,
        },
    )
    .map_or(Output::JSON, |o| Output {
        shape: negotiate::As::Object,
        ..o
    });
    let kind = KindLabels {
        request_kind: if is_mutating(&parts.method) {
            "mutating"
        } else {
            "readOnly"
        },
    };
    let long = matches!(info.verb, "watch") || info.target.as_ref().is_some_and(|t| connect::is_stream(&t.subresource));
    let head = parts.method == Method::HEAD;
    let failed_upgrade_closes = parts.version == Version::HTTP_11 && parts.headers.contains_key(UPGRADE);
    let attributes = Attributes::of(&info, &query);
    let version = info.target.as_ref().map_or("", |t| t.version.as_str());
    let trail = Trail::begin(&cluster, &parts, &attributes, version);
    let ask = Ask {
        user,
        attributes,
        trail: trail.clone(),
    };
    let result = if long {
        serve(&cluster, ask, parts, body, &info, query).await
    } else {
        bounded(&cluster, &kind, serve(&cluster, ask, parts, body, &info, query)).await
    };
    let mut response = result.unwrap_or_else(|status| {
        if status.code() >= 500 {
            tracing::warn!(
                cluster = cluster.name(),
                verb = info.verb,
                path = info.path,
                code = status.code(),
                message = status.message,
                "request failed"
            );
        }
        respond::status(&cluster, &status, output)
    });
    if failed_upgrade_closes && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        // The client may already have sent bytes of the protocol that it did not get.
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if let Some(trail) = trail {
        response = trail.answered(response, long).await;
    }
    if head {
        *response.body_mut() = respond::full(bytes::Bytes::new());
    }
    record(&cluster, &info, response.status(), started, long);
    response
}

/// Runs a request that should be short: counted, at most so many at a time, and not for ever.
async fn bounded(
    cluster: &Cluster,
    kind: &KindLabels,
    request: impl Future<Output = Result<Response<Body>, Status>>,
) -> Result<Response<Body>, Status> {
    let Ok(_slot) = cluster.inflight.try_acquire() else {
        return Err(Status::too_many_requests(
            "too many requests, please try again later",
            1,
        ));
    };
    let gauge = cluster.metrics.inflight.get_or_create(kind).clone();
    gauge.inc();
    let result = tokio::time::timeout(REQUEST_TIMEOUT, request).await;
    gauge.dec();
    result.unwrap_or_else(|_| Err(Status::timeout("request did not complete within 60s", 0)))
}

fn is_mutating(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

fn record(cluster: &Cluster, info: &RequestInfo, code: StatusCode, started: Instant, long: bool) {
    let target = info.target.clone().unwrap_or_default();
    // Unknown resources would let clients make up label values without end.
    let known = cluster
        .resource(&target.group, &target.version, &target.resource)
        .is_some();
    let target = if known { target } else { Target::default() };
    let verb = info.verb.to_ascii_uppercase();
    let labels = RequestLabels {
        verb: verb.clone(),
        group: target.group.clone(),
        version: target.version,
        resource: target.resource.clone(),
        subresource: if known && target.subresource.len() < 32 {
            target.subresource
        } else {
            String::new()
        },
        code: code.as_u16().into(),
    };
    cluster.metrics.requests.get_or_create(&labels).inc();
    if !long {
        let labels = DurationLabels {
            verb,
            group: target.group,
            resource: target.resource,
        };
        cluster
            .metrics
            .durations
            .get_or_create(&labels)
            .observe(started.elapsed().as_secs_f64());
    }
}

/// Who asks (if the connection proves it), and for what.
struct Ask {
    user: Option<UserInfo>,
    attributes: Attributes,
    trail: Option<Arc<Trail>>,
}

impl Ask {
    /// Who shows nothing is `system:anonymous`, and RBAC says what that one may; a bad token is refused.
    fn authenticate(&mut self, cluster: &Cluster, headers: &HeaderMap) -> Result<UserInfo, Status> {
        let found = authenticate(cluster, self.user.take(), headers);
        if let (Err(_), Some(trail)) = (&found, &self.trail) {
            trail.refused();
        }
        Ok(found?.unwrap_or_else(UserInfo::anonymous))
    }
}

async fn serve(
    cluster: &Arc<Cluster>,
    mut ask: Ask,
    parts: Parts,
    mut body: Body,
    info: &RequestInfo,
    query: Query,
) -> Result<Response<Body>, Status> {
    let open = info.target.is_none() && nonresource::is_open(&info.path);
    let user = ask.authenticate(cluster, &parts.headers)?;
    let Ask { attributes, trail, .. } = ask;
    if let Some(trail) = &trail {
        trail.decide(&user, &attributes).await;
        body = trail.watch_request(body);
    }
    let name = user.name.clone();
    let user = impersonate(cluster, user, &parts.headers)?;
    if let Some(trail) = &trail
        && user.name != name
    {
        trail.impersonated(&user);
    }
    if !open {
        let decision = auth::authorize(cluster, &user, &attributes);
        if let Some(trail) = &trail {
            trail.authorized(&decision);
        }
        if let Decision::Deny(reason) = decision {
            // Who showed nothing is told to, rather than what nobody may.
            if user.in_group(auth::UNAUTHENTICATED) {
                return Err(Status::unauthorized());
            }
            return Err(auth::forbidden(&user, &attributes, &reason));
        }
    }
    if cluster.keyspace.is_shared() && info.target.is_some() && query.get("resourceVersion") != "0" {
        // Other servers write, too: what was answered there before this request came must be seen here.
        cluster.keyspace.sync().await.map_err(|e| unreachable(cluster, &e))?;
    }
    let Some(target) = info.target.clone() else {
        return nonresource::handle(cluster, &parts.method, &info.path, &query, &parts.headers);
    };
    let served = cluster
        .resource(&target.group, &target.version, &target.resource)
        .ok_or_else(Status::path_not_found)?;
    let cx = Context {
        cluster: cluster.clone(),
        served,
        user,
        info: info.clone(),
        target,
        query,
        headers: parts.headers.clone(),
    };
    if info.verb == "create" && cx.served.custom.as_ref().is_some_and(|c| c.terminating) {
        return Err(crds::refused(&cx.served, info.verb));
    }
    let deprecation = cx.served.info.deprecation.clone();
    let mut response = dispatch(cx, parts, body).await?;
    if let Some(warning) = deprecation {
        warn(&mut response, &[warning]);
    }
    Ok(response)
}

/// What a client is told while the store that several servers share does not answer.
pub fn unreachable(cluster: &Cluster, error: &store::Error) -> Status {
    tracing::warn!(cluster = cluster.name(), error = %stdx::chain(error), "the store does not answer");
    Status::service_unavailable(&format!("the store of this cluster does not answer: {error}"))
}

/// The user of a bearer token; an invalid token is refused even where none is needed.
fn authenticate(cluster: &Cluster, user: Option<UserInfo>, headers: &HeaderMap) -> Result<Option<UserInfo>, Status> {
    if user.is_some() {
        return Ok(user);
    }
    let Some(value) = headers.get(http::header::AUTHORIZATION) else {
        return Ok(None);
    };
    let token = value
        .to_str()
        .ok()
        .and_then(|v| v.split_once(' '))
        .filter(|(s, _)| s.eq_ignore_ascii_case("bearer"));
    let Some((_, token)) = token else {
        return Err(Status::unauthorized());
    };
    match tokens::authenticate(cluster, token.trim(), &[]) {
        Ok((user, _)) => Ok(Some(user)),
        Err(reason) => {
            tracing::debug!(cluster = cluster.name(), reason, "a bearer token was refused");
            Err(Status::unauthorized())
        }
    }
}

fn impersonate(cluster: &Cluster, user: UserInfo, headers: &HeaderMap) -> Result<UserInfo, Status> {
    let text = |v: &http::HeaderValue| v.to_str().unwrap_or_default().to_owned();
    let name = headers.get("impersonate-user").map(text);
    let groups: Vec<String> = headers.get_all("impersonate-group").iter().map(text).collect();
    let Some(name) = name.filter(|n| !n.is_empty()) else {
        return match groups.is_empty() {
            true => Ok(user),
            false => Err(Status::bad_request(
                "requested groups [..] without impersonating a user name",
            )),
        };
    };
    let mut asks = Vec::new();
    let attributes = |resource: &str, namespace: &str, name: &str| Attributes {
        verb: "impersonate".into(),
        resource: resource.into(),
        namespace: namespace.into(),
        name: name.into(),
        ..Attributes::default()
    };
    match name
        .strip_prefix("system:serviceaccount:")
        .and_then(|r| r.split_once(':'))
    {
        Some((namespace, account)) => asks.push(attributes("serviceaccounts", namespace, account)),
        None => asks.push(attributes("users", "", &name)),
    }
    asks.extend(groups.iter().map(|g| attributes("groups", "", g)));
    for ask in &asks {
        if let Decision::Deny(reason) = auth::authorize(cluster, &user, ask) {
            return Err(auth::forbidden(&user, ask, &reason));
        }
    }
    let mut groups = groups;
    if groups.is_empty()
        && let Some((namespace, _)) = name
            .strip_prefix("system:serviceaccount:")
            .and_then(|r| r.split_once(':'))
    {
        groups = vec![
            "system:serviceaccounts".into(),
            format!("system:serviceaccounts:{namespace}"),
        ];
    }
    if groups.iter().any(|g| g == MASTERS) && !user.in_group(MASTERS) {
        return Err(Status::forbidden(
            "groups",
            MASTERS,
            "only a member may impersonate this group",
        ));
    }
    Ok(UserInfo::new(name, groups))
}

async fn dispatch(cx: Context, parts: Parts, body: Body) -> Result<Response<Body>, Status> {
    let (subresource, verb) = (cx.target.subresource.clone(), cx.info.verb);
    if !subresource.is_empty() {
        return dispatch_subresource(cx, parts, body).await;
    }
    if let Some(answer) = reviews::dispatch(&cx, verb) {
        answer?;
        return reviews::handle(&cx, body).await;
    }
    if !cx.served.info.has_verb(verb) {
        return Err(not_allowed(&cx.served, verb));
    }
    if cx.served.info.namespaced && cx.target.namespace.is_empty() && !matches!(verb, "list" | "watch") {
        return Err(Status::path_not_found());
    }
    if !cx.served.info.namespaced && !cx.target.namespace.is_empty() && !cx.served.is("", "namespaces") {
        return Err(Status::path_not_found());
    }
    match verb {
        "get" => list::get(&cx),
        "list" => list::list(&cx),
        "watch" => watch::watch(&cx),
        "create" if !cx.target.name.is_empty() => Err(not_allowed(&cx.served, verb)),
        "create" if cx.served.is("", "bindings") => subresources::binding(&cx, body).await,
        "create" => create::create(&cx, body).await,
        "update" | "patch" if cx.target.name.is_empty() => Err(not_allowed(&cx.served, verb)),
        "update" => update::update(&cx, body, Part::Main).await,
        "patch" => update::patch(&cx, body, Part::Main).await,
        "delete" => delete::delete(&cx, body).await,
        "deletecollection" => delete::delete_collection(&cx, body).await,
        _ => Err(not_allowed(&cx.served, verb)),
    }
}

fn not_allowed(served: &Served, verb: &str) -> Status {
    Status::method_not_allowed(&served.info.group_resource(), verb)
}

async fn dispatch_subresource(cx: Context, parts: Parts, body: Body) -> Result<Response<Body>, Status> {
    let (subresource, verb) = (cx.target.subresource.clone(), cx.info.verb);
    let Some(served) = cx.served.info.subresource(&subresource) else {
        return Err(Status::path_not_found());
    };
    if !served.verbs.iter().any(|v| v == verb) {
        let name = format!("{}/{subresource}", cx.served.info.group_resource());
        return Err(Status::method_not_allowed(&name, verb));
    }
    match (subresource.as_str(), verb) {
        ("status", "get") => list::get(&cx),
        ("status", "update") => update::update(&cx, body, Part::Status).await,
        ("status", "patch") => update::patch(&cx, body, Part::Status).await,
        ("approval", "get") => list::get(&cx),
        ("approval", "update") => update::update(&cx, body, Part::Approval).await,
        ("approval", "patch") => update::patch(&cx, body, Part::Approval).await,
        ("finalize", "update") => update::update(&cx, body, Part::Finalize).await,
        ("scale", _) => subresources::scale(&cx, body).await,
        ("binding", _) => subresources::binding(&cx, body).await,
        ("eviction", _) => subresources::eviction(&cx, body).await,
        ("token", _) => reviews::token(&cx, body).await,
        ("log" | "exec" | "attach" | "portforward" | "proxy", _) => connect::connect(&cx, parts, body).await,
        _ => {
            let mut status = Status::path_not_found();
            status.message = format!(
                "subresource {subresource:?} of {} is not served yet",
                cx.served.info.group_resource()
            );
            Err(status)
        }
    }
}

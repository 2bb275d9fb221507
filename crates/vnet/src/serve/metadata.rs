//! The instance metadata service at 169.254.169.254: who a machine is, its network, and tokens of its identities.
//!
//! The caller is known by its source address, which anti-spoofing makes true: a pod asks with an address of its machine's
//! NIC and is answered as its machine. Requests that a proxy forwards, or that do not say `Metadata: true`, are refused, so
//! that a page that a pod fetches for somebody cannot be a token.
//!
//! # Source
//! Azure Instance Metadata Service, versions up to 2023-07-01; "How to use managed identities to acquire an access token".

use std::convert::Infallible;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use vnet_model::fabric::{NicSpec, VnetSpec};
use vnet_model::instance::{IdentitySpec, InstanceSpec};

use super::{SharedView, View};

/// A whole request must come within this time, and a token be there.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Versions of `/metadata/instance`, newest last.
const VERSIONS: [&str; 8] = [
    "2017-12-01",
    "2018-10-01",
    "2019-08-01",
    "2020-09-01",
    "2021-02-01",
    "2021-12-13",
    "2022-01-01",
    "2023-07-01",
];
const TOKEN_VERSIONS: [&str; 2] = ["2018-02-01", "2019-08-01"];
const EVENTS_VERSIONS: [&str; 3] = ["2017-11-01", "2019-08-01", "2020-07-01"];

/// A token and its life, seconds since 1970.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Token {
    pub access_token: String,
    pub not_before_s: u64,
    pub expires_on_s: u64,
}

/// A token, or why there is none in words for whoever asked.
pub type TokenFuture<'a> = Pin<Box<dyn Future<Output = Result<Token, String>> + Send + 'a>>;

/// Issues tokens of managed identities.
pub trait TokenSource: Send + Sync {
    /// A token of `identity` for the audience `resource`.
    fn token<'a>(&'a self, identity: &'a IdentitySpec, resource: &'a str) -> TokenFuture<'a>;
}

pub async fn serve(listener: TcpListener, view: SharedView) {
    super::accept_each(listener, |stream, peer| {
        let view = view.clone();
        async move {
            let service = service_fn(move |request| {
                let view = view.read().clone();
                async move { Ok::<_, Infallible>(respond(&view, peer, &request).await) }
            });
            let mut server = hyper::server::conn::http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIMEOUT);
            // A broken connection is its peer's affair.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        }
    })
    .await;
}

/// What is answered: JSON, or text where the client asked for it.
#[derive(Debug, PartialEq)]
struct Answer {
    status: StatusCode,
    body: Body,
}

#[derive(Debug, PartialEq)]
enum Body {
    Json(Value),
    Text(String),
}

fn refuse(status: StatusCode, error: &str, why: &str) -> Answer {
    let body = Body::Json(json!({"error": error, "error_description": why}));
    Answer { status, body }
}

fn bad(why: &str) -> Answer {
    refuse(StatusCode::BAD_REQUEST, "invalid_request", why)
}

fn ok(value: Value) -> Answer {
    let body = Body::Json(value);
    Answer {
        status: StatusCode::OK,
        body,
    }
}

async fn respond(view: &View, peer: SocketAddr, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let answer = answer(view, peer, request).await;
    let (kind, text) = match answer.body {
        Body::Json(value) => ("application/json; charset=utf-8", value.to_string()),
        Body::Text(text) => ("text/plain; charset=utf-8", text),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = answer.status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

async fn answer<B>(view: &View, peer: SocketAddr, request: &Request<B>) -> Answer {
    let headers = request.headers();
    if headers.contains_key("x-forwarded-for") {
        return bad("a request that was forwarded is not answered (X-Forwarded-For)");
    }
    if !headers
        .get("metadata")
        .is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"true"))
    {
        return bad("the header 'Metadata: true' is missing");
    }
    let nic = match peer.ip() {
        IpAddr::V4(address) => view.vnet.nic_of(address),
        IpAddr::V6(_) => None,
    };
    let Some((nic, instance)) = nic.and_then(|n| Some((n, n.instance.as_ref()?))) else {
        let why = "the source address belongs to no machine of this virtual network";
        return refuse(StatusCode::FORBIDDEN, "forbidden", why);
    };
    let query = Query::of(request.uri().query().unwrap_or_default());
    let path: Vec<&str> = request.uri().path().split('/').filter(|p| !p.is_empty()).collect();
    let folded: Vec<String> = path.iter().map(|p| p.to_ascii_lowercase()).collect();
    let folded: Vec<&str> = folded.iter().map(String::as_str).collect();
    let get_only = |answer: Answer| match *request.method() {
        Method::GET => answer,
        _ => refuse(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            "only GET is served here",
        ),
    };
    match folded.as_slice() {
        ["metadata", "versions"] => get_only(ok(json!({"apiVersions": VERSIONS}))),
        ["metadata", "instance", rest @ ..] => get_only(match query.version(&VERSIONS) {
            Ok(version) => leaf(&document(&view.vnet, nic, instance, version), &path[2..], rest, &query),
            Err(refused) => refused,
        }),
        ["metadata", "identity", "oauth2", "token"] => match (query.version(&TOKEN_VERSIONS), request.method()) {
            (Err(refused), _) => refused,
            (Ok(_), &Method::GET) => token(view, instance, &query).await,
            (Ok(_), _) => get_only(bad("")),
        },
        ["metadata", "scheduledevents"] => match (query.version(&EVENTS_VERSIONS), request.method()) {
            (Err(refused), _) => refused,
            // Nothing is ever done to a machine behind its owner's back.
            (Ok(_), &Method::GET) => ok(json!({"DocumentIncarnation": 1, "Events": []})),
            (Ok(_), _) => bad("there is no scheduled event that could be started"),
        },
        ["metadata", "attested", ..] => refuse(
            StatusCode::NOT_FOUND,
            "not_served",
            "attested documents carry a signature of Azure's, which this platform does not have",
        ),
        _ => refuse(
            StatusCode::NOT_FOUND,
            "not_found",
            "served are /metadata/versions, /metadata/instance, /metadata/identity/oauth2/token and /metadata/scheduledevents",
        ),
    }
}

async fn token(view: &View, instance: &InstanceSpec, query: &Query) -> Answer {
    let Some(resource) = query.get("resource").filter(|r| !r.is_empty()) else {
        return bad("the parameter 'resource' is missing");
    };
    let wanted = [
        (
            "client_id",
            (|i: &IdentitySpec| &i.client_id) as fn(&IdentitySpec) -> &String,
        ),
        ("object_id", |i| &i.object_id),
        ("msi_res_id", |i| &i.resource_id),
        ("mi_res_id", |i| &i.resource_id),
    ];
    let named: Vec<_> = wanted
        .into_iter()
        .filter_map(|(name, of)| Some((query.get(name)?, of)))
        .collect();
    if named.len() > 1 {
        return bad("at most one of client_id, object_id and msi_res_id can be given");
    }
    let fits = |i: &&IdentitySpec| named.iter().all(|(value, of)| of(i).eq_ignore_ascii_case(value));
    let Some(identity) = instance.identities.iter().find(fits) else {
        return bad("Identity not found: the machine has no such managed identity");
    };
    let Some(source) = &view.tokens else {
        return refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            "temporarily_unavailable",
            "no tokens are issued on this host yet",
        );
    };
    match tokio::time::timeout(REQUEST_TIMEOUT, source.token(identity, resource)).await {
        Ok(Ok(token)) => {
            let life = token.expires_on_s.saturating_sub(token.not_before_s);
            // Every number is a string here, as clients of this service expect.
            ok(json!({
                "access_token": token.access_token,
                "client_id": identity.client_id,
                "expires_in": life.to_string(),
                "expires_on": token.expires_on_s.to_string(),
                "ext_expires_in": life.to_string(),
                "not_before": token.not_before_s.to_string(),
                "resource": resource,
                "token_type": "Bearer",
            }))
        }
        Ok(Err(why)) => refuse(StatusCode::SERVICE_UNAVAILABLE, "temporarily_unavailable", &why),
        Err(_) => refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            "temporarily_unavailable",
            "the token did not come in time",
        ),
    }
}

/// The whole document of `/metadata/instance`.
fn document(vnet: &VnetSpec, nic: &NicSpec, instance: &InstanceSpec, version: &str) -> Value {
    let tags: Vec<String> = instance.tags.iter().map(|(k, v)| format!("{k}:{v}")).collect();
    let list: Vec<Value> = instance
        .tags
        .iter()
        .map(|(k, v)| json!({"name": k, "value": v}))
        .collect();
    let addresses = nic
        .addresses()
        .map(|a| json!({"privateIpAddress": a, "publicIpAddress": ""}));
    let addresses: Vec<Value> = addresses.collect();
    let subnet = vnet
        .subnet(&nic.subnet)
        .map(|s| json!({"address": s.prefix.network(), "prefix": s.prefix.prefix_len().to_string()}));
    let subnet: Vec<Value> = subnet.into_iter().collect();
    let mut compute = json!({
        "azEnvironment": "oaks",
        "location": instance.location,
        "name": instance.name,
        "offer": "",
        "osType": "Linux",
        "placementGroupId": "",
        "platformFaultDomain": "0",
        "platformUpdateDomain": "0",
        "provider": "Microsoft.Compute",
        "publisher": "",
        "resourceGroupName": instance.resource_group,
        "sku": "",
        "subscriptionId": instance.subscription,
        "tags": tags.join(";"),
        "version": "",
        "vmId": instance.vm_id,
        "vmScaleSetName": instance.scale_set,
        "vmSize": instance.vm_size,
        "zone": "",
    });
    if version >= "2019-08-01" {
        compute["resourceId"] = json!(instance.resource_id);
        compute["tagsList"] = json!(list);
    }
    if version >= "2021-02-01" {
        compute["osProfile"] =
            json!({"computerName": instance.name, "adminUsername": "", "disablePasswordAuthentication": "true"});
    }
    json!({"compute": compute, "network": {"interface": [{
        "ipv4": {"ipAddress": addresses, "subnet": subnet},
        "ipv6": {"ipAddress": []},
        "macAddress": nic.mac.bare(),
    }]}})
}

/// The part of `document` that `path` leads to; names are compared without regard to case (`folded`).
fn leaf(document: &Value, path: &[&str], folded: &[&str], query: &Query) -> Answer {
    let as_text = match query.get("format").unwrap_or("json") {
        f if f.eq_ignore_ascii_case("json") => false,
        f if f.eq_ignore_ascii_case("text") => true,
        _ => return bad("format must be json or text"),
    };
    let mut at = document;
    for (segment, folded) in path.iter().zip(folded) {
        let next = match at {
            Value::Object(map) => map.iter().find(|(k, _)| k.eq_ignore_ascii_case(folded)).map(|(_, v)| v),
            Value::Array(list) => segment.parse::<usize>().ok().and_then(|n| list.get(n)),
            _ => None,
        };
        match next {
            Some(next) => at = next,
            None => return refuse(StatusCode::NOT_FOUND, "not_found", "there is nothing at this path"),
        }
    }
    let below = |name: String, value: &Value| match value {
        Value::Object(_) | Value::Array(_) => format!("{name}/"),
        _ => name,
    };
    let names: Vec<String> = match at {
        Value::Object(map) if as_text => map.iter().map(|(k, v)| below(k.clone(), v)).collect(),
        Value::Array(list) if as_text => list.iter().enumerate().map(|(n, v)| below(n.to_string(), v)).collect(),
        Value::Object(_) | Value::Array(_) => return ok(at.clone()),
        _ if !as_text => return bad("a single value is given as text: add format=text"),
        value => vec![value.as_str().map_or_else(|| value.to_string(), str::to_owned)],
    };
    let body = Body::Text(names.join("\n"));
    Answer {
        status: StatusCode::OK,
        body,
    }
}

/// Decoded parameters; names in lower case.
struct Query(Vec<(String, String)>);

impl Query {
    fn of(text: &str) -> Self {
        let pairs = text.split('&').filter(|p| !p.is_empty()).map(|pair| {
            let (k, v) = pair.split_once('=').unwrap_or((pair, ""));
            (decoded(k).to_ascii_lowercase(), decoded(v))
        });
        Self(pairs.collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// The version that is asked for, if it is one of `served`.
    fn version(&self, served: &[&'static str]) -> Result<&'static str, Answer> {
        let asked = self.get("api-version").filter(|v| !v.is_empty());
        let found = asked.and_then(|a| served.iter().copied().find(|s| *s == a));
        found.ok_or_else(|| {
            let newest: Vec<&str> = served.iter().rev().take(3).copied().collect();
            let why = match asked {
                None => "the parameter 'api-version' is missing",
                Some(_) => "this api-version is not served",
            };
            let body = Body::Json(json!({"error": why, "newest-versions": newest}));
            Answer {
                status: StatusCode::BAD_REQUEST,
                body,
            }
        })
    }
}

/// `%41` and `+` decoded; what is no UTF-8 afterwards has replacement characters.
fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut n) = (Vec::with_capacity(bytes.len()), 0);
    while n < bytes.len() {
        let hex = bytes.get(n + 1..n + 3).and_then(|h| std::str::from_utf8(h).ok());
        match (bytes[n], hex.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                n += 2;
            }
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        n += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Whoever issues tokens, shared by every network.
pub type Tokens = Option<Arc<dyn TokenSource>>;

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use vnet_model::fabric::{IpConfigSpec, SubnetSpec};

    use super::*;

    struct Issuer;

    impl TokenSource for Issuer {
        fn token<'a>(&'a self, identity: &'a IdentitySpec, resource: &'a str) -> TokenFuture<'a> {
            let access_token = format!("{} for {resource}", identity.client_id);
            Box::pin(async move {
                Ok(Token {
                    access_token,
                    not_before_s: 100,
                    expires_on_s: 3700,
                })
            })
        }
    }

    fn view() -> View {
        let identity = |n: &str| IdentitySpec {
            client_id: format!("client-{n}"),
            object_id: format!("object-{n}"),
            resource_id: format!("/identity/{n}"),
        };
        let nic = NicSpec {
            key: "nic".into(),
            subnet: "nodes".into(),
            ip_configs: ["10.0.0.4", "10.0.0.5"]
                .map(|a| IpConfigSpec {
                    name: a.into(),
                    address: a.parse().unwrap(),
                    primary: a.ends_with('4'),
                })
                .into(),
            instance: Some(InstanceSpec {
                name: "node-0".into(),
                tags: [("env".to_owned(), "test".to_owned())].into(),
                identities: vec![identity("a"), identity("b")],
                ..InstanceSpec::default()
            }),
            ..NicSpec::default()
        };
        let group = NicSpec {
            key: "group".into(),
            ip_configs: vec![IpConfigSpec {
                name: "p".into(),
                address: Ipv4Addr::new(10, 0, 0, 9),
                primary: true,
            }],
            ..NicSpec::default()
        };
        let vnet = VnetSpec {
            key: "v".into(),
            subnets: vec![SubnetSpec {
                name: "nodes".into(),
                prefix: "10.0.0.0/24".parse().unwrap(),
                ..SubnetSpec::default()
            }],
            nics: vec![nic, group],
            ..VnetSpec::default()
        };
        View::new(&vnet, &Vec::new().into(), &Some(Arc::new(Issuer)))
    }

    fn ask_as(from: &str, path: &str, headers: &[(&str, &str)]) -> (u16, String) {
        let mut request = Request::builder().uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let peer = SocketAddr::new(from.parse().unwrap(), 1);
        let answer = runtime.block_on(answer(&view(), peer, &request));
        let text = match answer.body {
            Body::Json(v) => v.to_string(),
            Body::Text(t) => t,
        };
        (answer.status.as_u16(), text)
    }

    fn ask(path: &str) -> (u16, String) {
        ask_as("10.0.0.5", path, &[("Metadata", "true")])
    }

    #[test]
    fn a_machine_and_its_pods_learn_who_it_is() {
        let (status, text) = ask("/metadata/instance?api-version=2021-02-01");
        assert_eq!(status, 200);
        let document: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(document["compute"]["name"], "node-0");
        assert_eq!(document["compute"]["tagsList"][0]["value"], "test");
        assert_eq!(
            document["network"]["interface"][0]["ipv4"]["ipAddress"][1]["privateIpAddress"],
            "10.0.0.5"
        );
        let at = "/metadata/instance/network/interface/0/ipv4";
        for (path, wanted) in [
            (
                "/Metadata/Instance/Compute/Name?api-version=2018-10-01&format=text",
                "node-0",
            ),
            (
                &format!("{at}/subnet/0/prefix?api-version=2021-02-01&format=text"),
                "24",
            ),
            (
                &format!("{at}?api-version=2021-02-01&format=text"),
                "ipAddress/\nsubnet/",
            ),
        ] {
            assert_eq!(ask(path), (200, wanted.to_owned()), "{path}");
        }
        assert!(!ask("/metadata/instance?api-version=2017-12-01").1.contains("tagsList"));
        assert!(
            ask("/metadata/scheduledevents?api-version=2020-07-01")
                .1
                .contains("\"Events\":[]")
        );
    }

    #[test]
    fn tokens_are_of_the_machines_identities() {
        let token = |more: &str| ask(&format!("/metadata/identity/oauth2/token?api-version=2018-02-01{more}"));
        let (status, text) = token("&resource=https%3A%2F%2Fx.org%2F");
        assert_eq!(status, 200);
        let reply: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(reply["access_token"], "client-a for https://x.org/");
        assert_eq!(
            (&reply["expires_in"], &reply["expires_on"]),
            (&json!("3600"), &json!("3700"))
        );
        assert!(token("&resource=r&msi_res_id=/Identity/B").1.contains("client-b for r"));
        for bad in [
            "",
            "&resource=",
            "&resource=r&client_id=client-c",
            "&resource=r&client_id=client-a&object_id=object-a",
        ] {
            assert_eq!(token(bad).0, 400, "{bad}");
        }
    }

    #[test]
    fn who_is_refused_and_why() {
        let path = "/metadata/instance?api-version=2021-02-01";
        let metadata = ("Metadata", "true");
        assert_eq!(ask_as("10.0.0.4", path, &[metadata]).0, 200);
        for (from, path, headers, status, why) in [
            ("10.0.0.4", path, &[][..], 400, "Metadata: true"),
            (
                "10.0.0.4",
                path,
                &[metadata, ("X-Forwarded-For", "1.2.3.4")],
                400,
                "forwarded",
            ),
            ("10.0.0.7", path, &[metadata], 403, "no machine"),
            ("10.0.0.9", path, &[metadata], 403, "no machine"),
            ("10.0.0.4", "/metadata/instance", &[metadata], 400, "newest-versions"),
            (
                "10.0.0.4",
                "/metadata/instance?api-version=2000-01-01",
                &[metadata],
                400,
                "2023-07-01",
            ),
            (
                "10.0.0.4",
                "/metadata/instance/nothing?api-version=2021-02-01",
                &[metadata],
                404,
                "nothing",
            ),
            (
                "10.0.0.4",
                "/metadata/instance/compute/name?api-version=2021-02-01",
                &[metadata],
                400,
                "format=text",
            ),
            (
                "10.0.0.4",
                "/metadata/attested/document?api-version=2020-09-01",
                &[metadata],
                404,
                "signature",
            ),
            ("10.0.0.4", "/latest/meta-data", &[metadata], 404, "/metadata/instance"),
        ] {
            let (got, text) = ask_as(from, path, headers);
            assert!(
                got == status && text.contains(why),
                "{from} {path} {headers:?}: {got} {text}"
            );
        }
    }
}

//! What a request is about: verb, resource and query, read from method and path.

use std::collections::HashMap;

use http::Method;
use percent_encoding::percent_decode_str;

/// Verb and target of a request, as authorization sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestInfo {
    /// `get list watch create update patch delete deletecollection`, or the lower-case method off the resource tree.
    pub verb: &'static str,
    pub path: String,
    /// Absent for paths such as `/version`.
    pub target: Option<Target>,
}

/// The resource part of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    pub group: String,
    pub version: String,
    /// Empty for cluster-scoped requests and for requests across all namespaces.
    pub namespace: String,
    pub resource: String,
    /// Empty for collections.
    pub name: String,
    pub subresource: String,
    /// What follows the subresource (`proxy/a/b`).
    pub rest: String,
}

impl Target {
    /// `pods` or `deployments.apps`, as messages say it.
    pub fn group_resource(&self) -> String {
        if self.group.is_empty() {
            self.resource.clone()
        } else {
            format!("{}.{}", self.resource, self.group)
        }
    }
}

/// The query, first value wins; repeated keys keep all values.
#[derive(Clone, Debug, Default)]
pub struct Query(HashMap<String, Vec<String>>);

impl Query {
    pub fn parse(query: &str) -> Self {
        let mut map: HashMap<String, Vec<String>> = HashMap::new();
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            map.entry(decode(key)).or_default().push(decode(value));
        }
        Query(map)
    }

    /// The value, empty if absent.
    pub fn get(&self, key: &str) -> &str {
        self.0.get(key).and_then(|v| v.first()).map_or("", String::as_str)
    }

    /// Every value.
    pub fn all(&self, key: &str) -> &[String] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }

    /// Go's reading of a flag: `1 t true`, and present without a value.
    pub fn flag(&self, key: &str) -> bool {
        match self.0.get(key).and_then(|v| v.first()) {
            None => false,
            Some(value) => !matches!(value.as_str(), "0" | "f" | "F" | "false" | "FALSE" | "False"),
        }
    }

    pub fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }
}

fn decode(text: &str) -> String {
    percent_decode_str(&text.replace('+', " "))
        .decode_utf8_lossy()
        .into_owned()
}

/// Reads verb and target. Never fails: what is no resource path has no target.
pub fn parse(method: &Method, path: &str, query: &Query) -> RequestInfo {
    let target = target(path);
    let verb = match &target {
        None => match *method {
            Method::GET => "get",
            Method::HEAD => "head",
            Method::POST => "post",
            Method::PUT => "put",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            Method::OPTIONS => "options",
            _ => "unknown",
        },
        Some(t) => match *method {
            Method::GET | Method::HEAD if !t.name.is_empty() && t.subresource.is_empty() && query.flag("watch") => {
                "watch"
            }
            Method::GET | Method::HEAD if !t.name.is_empty() => "get",
            Method::GET | Method::HEAD if query.flag("watch") => "watch",
            Method::GET | Method::HEAD => "list",
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE if t.name.is_empty() => "deletecollection",
            Method::DELETE => "delete",
            _ => "unknown",
        },
    };
    RequestInfo {
        verb,
        path: path.to_owned(),
        target,
    }
}

fn target(path: &str) -> Option<Target> {
    let mut parts = path
        .trim_matches('/')
        .split('/')
        .map(|p| percent_decode_str(p).decode_utf8_lossy().into_owned());
    let (group, version) = match parts.next()?.as_str() {
        "api" => (String::new(), parts.next()?),
        "apis" => (parts.next()?, parts.next()?),
        _ => return None,
    };
    let mut rest: Vec<String> = parts.collect();
    if rest.is_empty() || rest.iter().any(String::is_empty) {
        return None;
    }
    let mut target = Target {
        group,
        version,
        ..Target::default()
    };
    // `namespaces/x/status` and `/finalize` are subresources of the namespace, not resources in it.
    let inside = rest[0] == "namespaces" && rest.len() > 2 && !matches!(rest[2].as_str(), "status" | "finalize");
    if inside {
        target.namespace = rest[1].clone();
        rest.drain(..2);
    }
    let mut rest = rest.into_iter();
    target.resource = rest.next()?;
    target.name = rest.next().unwrap_or_default();
    target.subresource = rest.next().unwrap_or_default();
    target.rest = rest.collect::<Vec<_>>().join("/");
    if target.resource == "namespaces" && target.group.is_empty() && target.namespace.is_empty() {
        // Upstream authorizes a namespace object within itself.
        target.namespace = target.name.clone();
    }
    Some(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn brief(method: Method, path: &str, query: &str) -> String {
        let info = parse(&method, path, &Query::parse(query));
        match info.target {
            None => info.verb.to_owned(),
            Some(t) => format!(
                "{} {}/{} ns={} {} {} {} {}",
                info.verb, t.group, t.version, t.namespace, t.resource, t.name, t.subresource, t.rest
            ),
        }
    }

    #[test]
    fn paths_are_understood() {
        let check = |m, p, q, want: &str| assert_eq!(brief(m, p, q).trim_end(), want, "{p}");
        check(Method::GET, "/api/v1/pods", "watch=1", "watch /v1 ns= pods");
        check(
            Method::GET,
            "/api/v1/namespaces/d/pods/x/log",
            "",
            "get /v1 ns=d pods x log",
        );
        check(Method::GET, "/api/v1/namespaces", "", "list /v1 ns= namespaces");
        check(
            Method::PUT,
            "/api/v1/namespaces/d/finalize",
            "",
            "update /v1 ns=d namespaces d finalize",
        );
        check(
            Method::DELETE,
            "/apis/apps/v1/namespaces/d/deployments",
            "",
            "deletecollection apps/v1 ns=d deployments",
        );
        check(
            Method::POST,
            "/api/v1/nodes/n/proxy/a/b",
            "",
            "create /v1 ns= nodes n proxy a/b",
        );
        check(Method::GET, "/apis/apps/v1", "", "get");
        check(Method::GET, "/healthz", "", "get");
        check(Method::GET, "/api/v1//pods", "", "get");
    }

    #[test]
    fn queries_are_decoded() {
        let q = Query::parse("a=1%2C2&b&command=x&command=y+z");
        assert_eq!((q.get("a"), q.flag("b"), q.flag("c")), ("1,2", true, false));
        assert_eq!(q.all("command"), ["x", "y z"]);
    }
}

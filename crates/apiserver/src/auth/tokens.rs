//! Bound service account tokens: issuing, checking, and what users they make.

use std::time::{Duration, SystemTime};

use apimachinery::status::Status;
use apimachinery::time;
use serde_json::{Value, json};

use super::UserInfo;
use crate::cluster::Cluster;

/// Issuer of all tokens; in-cluster clients find the keys at this address.
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// Shortest and longest life of a token, as upstream.
const SECONDS_MIN: i64 = 600;
const SECONDS_MAX: i64 = 1 << 32;
/// Clock difference that is forgiven for `nbf`.
const LEEWAY_S: i64 = 60;
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const NODE_UID: &str = "authentication.kubernetes.io/node-uid";
const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";

fn unix(at: SystemTime) -> i64 {
    at.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs() as i64)
}

/// Answers a TokenRequest for the service account, filling in its status.
///
/// # Errors
/// The account or the object the token is to be bound to is missing or another one.
pub fn issue(cluster: &Cluster, namespace: &str, name: &str, request: &mut Value) -> Result<(), Status> {
    let account = cluster
        .service_accounts
        .get(namespace, name)
        .ok_or_else(|| Status::not_found("serviceaccounts", name))?;
    let spec = &request["spec"];
    let mut audiences: Vec<String> = spec["audiences"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|a| a.as_str().map(str::to_owned))
        .collect();
    if audiences.is_empty() {
        audiences.push(ISSUER.to_owned());
    }
    let seconds = spec["expirationSeconds"].as_i64().unwrap_or(3600);
    if !(SECONDS_MIN..=SECONDS_MAX).contains(&seconds) {
        return Err(Status::invalid(
            &apimachinery::gvk::Gvk::new("authentication.k8s.io", "v1", "TokenRequest"),
            "",
            &[apimachinery::field::FieldError::invalid(
                "spec.expirationSeconds",
                seconds,
                "may not specify a duration less than 10 minutes or larger than 2^32 seconds",
            )],
        ));
    }
    let mut private = json!({
        "namespace": namespace,
        "serviceaccount": {"name": name, "uid": &*account.header().uid},
    });
    bind(cluster, namespace, &spec["boundObjectRef"], &mut private)?;
    let now = unix(cluster.clock.now());
    let claims = json!({
        "aud": audiences, "exp": now + seconds, "iat": now, "nbf": now, "iss": ISSUER,
        "jti": cluster.new_uid(), "kubernetes.io": private,
        "sub": format!("system:serviceaccount:{namespace}:{name}"),
    });
    let token = cluster
        .pki
        .tokens
        .sign(&claims)
        .map_err(|e| Status::internal(&format!("signing a token failed: {e}")))?;
    let expires = time::timestamp(SystemTime::UNIX_EPOCH + Duration::from_secs((now + seconds).max(0) as u64));
    request["spec"]["audiences"] = json!(audiences);
    request["spec"]["expirationSeconds"] = seconds.into();
    request["status"] = json!({"token": token, "expirationTimestamp": time::rfc3339(expires)});
    request["metadata"]["name"] = name.into();
    request["metadata"]["namespace"] = namespace.into();
    Ok(())
}

fn bind(cluster: &Cluster, namespace: &str, reference: &Value, private: &mut Value) -> Result<(), Status> {
    if reference.is_null() {
        return Ok(());
    }
    let kind = reference["kind"].as_str().unwrap_or_default();
    let name = reference["name"].as_str().unwrap_or_default();
    let (resource, plural, key) = match kind {
        "Pod" => (cluster.pods.clone(), "pods", "pod"),
        "Secret" => (cluster.registry.resource("", "secrets"), "secrets", "secret"),
        "Node" => (cluster.registry.resource("", "nodes"), "nodes", "node"),
        other => {
            return Err(Status::bad_request(&format!(
                "cannot bind token for object of type {other:?}: supported are Pod, Secret and Node"
            )));
        }
    };
    let scope = if kind == "Node" { "" } else { namespace };
    let object = resource
        .get(scope, name)
        .ok_or_else(|| Status::not_found(plural, name))?;
    let uid = reference["uid"].as_str().unwrap_or_default();
    if !uid.is_empty() && uid != &*object.header().uid {
        let why = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        );
        return Err(Status::conflict("serviceaccounts/token", name, &why));
    }
    private[key] = json!({"name": name, "uid": &*object.header().uid});
    if kind == "Pod" {
        let node = object.value()["spec"]["nodeName"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        if let Some(found) = cluster.registry.resource("", "nodes").get("", &node) {
            private["node"] = json!({"name": node, "uid": &*found.header().uid});
        }
    }
    Ok(())
}

/// The user of a token, and those of the wanted audiences that it is for (the API server's own if none are given).
///
/// # Errors
/// A sentence that says what is wrong; shown in TokenReviews and logs, never to the bearer.
pub fn authenticate(cluster: &Cluster, token: &str, audiences: &[String]) -> Result<(UserInfo, Vec<String>), String> {
    let claims = cluster.pki.tokens.verify(token).map_err(|e| e.to_string())?;
    if claims["iss"] != ISSUER {
        return Err("the token is of another issuer".into());
    }
    let now = unix(cluster.clock.now());
    if claims["exp"].as_i64().is_none_or(|exp| exp <= now) {
        return Err("the token has expired".into());
    }
    if claims["nbf"].as_i64().is_some_and(|nbf| nbf > now + LEEWAY_S) {
        return Err("the token is not valid yet".into());
    }
    let held: Vec<String> = match &claims["aud"] {
        Value::String(one) => vec![one.clone()],
        Value::Array(all) => all.iter().filter_map(|a| a.as_str().map(str::to_owned)).collect(),
        _ => Vec::new(),
    };
    let own = [ISSUER.to_owned()];
    let wanted = if audiences.is_empty() { &own[..] } else { audiences };
    let matched: Vec<String> = wanted.iter().filter(|a| held.contains(a)).cloned().collect();
    if matched.is_empty() {
        return Err(format!("the token is for {held:?}, not for {wanted:?}"));
    }
    let private = &claims["kubernetes.io"];
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let (namespace, name) = (text(&private["namespace"]), text(&private["serviceaccount"]["name"]));
    check_alive(cluster, &namespace, private)?;
    let mut user = UserInfo::new(
        format!("system:serviceaccount:{namespace}:{name}"),
        [
            "system:serviceaccounts".to_owned(),
            format!("system:serviceaccounts:{namespace}"),
        ],
    );
    user.uid = text(&private["serviceaccount"]["uid"]);
    let mut extra = |key: &str, value: String| {
        if !value.is_empty() {
            user.extra.insert(key.to_owned(), vec![value]);
        }
    };
    extra(POD_NAME, text(&private["pod"]["name"]));
    extra(POD_UID, text(&private["pod"]["uid"]));
    extra(NODE_NAME, text(&private["node"]["name"]));
    extra(NODE_UID, text(&private["node"]["uid"]));
    extra(CREDENTIAL_ID, format!("JTI={}", text(&claims["jti"])));
    Ok((user, matched))
}

/// The account and the bound object must still be the same ones.
fn check_alive(cluster: &Cluster, namespace: &str, private: &Value) -> Result<(), String> {
    let bound = [
        ("serviceaccount", "serviceaccounts", namespace),
        ("pod", "pods", namespace),
        ("secret", "secrets", namespace),
        ("node", "nodes", ""),
    ];
    for (key, plural, scope) in bound {
        let reference = &private[key];
        if reference.is_null() {
            continue;
        }
        let name = reference["name"].as_str().unwrap_or_default();
        let found = cluster.registry.resource("", plural).get(scope, name);
        // A pod's node may be replaced under the same name; only pod, account and secret bind a token's life.
        if key == "node" && !private["pod"].is_null() {
            continue;
        }
        match found {
            Some(object) if Some(&*object.header().uid) == reference["uid"].as_str() => {}
            _ => return Err(format!("the {key} {name:?} that the token is bound to is gone")),
        }
    }
    Ok(())
}

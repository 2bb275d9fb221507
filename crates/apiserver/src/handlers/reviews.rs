//! Resources that are questions: access reviews, token reviews, and tokens of service accounts. Nothing is stored.

use apimachinery::gvk::Gvk;
use apimachinery::status::Status;
use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::{Context, write};
use crate::auth::{self, Attributes, Decision, UserInfo, node, tokens};
use crate::{Body, respond};

/// `None` if the resource is no question; otherwise whether the verb is right.
pub fn dispatch(cx: &Context, verb: &str) -> Option<Result<(), Status>> {
    let info = &cx.served.info;
    let question = matches!(info.group.as_str(), "authentication.k8s.io" | "authorization.k8s.io");
    question.then(|| {
        if verb == "create" {
            Ok(())
        } else {
            Err(Status::method_not_allowed(&info.group_resource(), verb))
        }
    })
}

/// Answers a review with its status filled in.
pub async fn handle(cx: &Context, body: Body) -> Result<Response<Body>, Status> {
    let output = cx.output(false)?;
    let bytes = write::body(body).await?;
    let mut review = write::decode(cx, &cx.served.info.gvk, &bytes)?.value;
    match cx.served.info.plural.as_str() {
        "tokenreviews" if review["spec"]["token"].as_str().is_none_or(str::is_empty) => {
            return Err(Status::bad_request(
                "token is required for TokenReview in authentication",
            ));
        }
        "tokenreviews" => token_review(cx, &mut review),
        "selfsubjectreviews" => review["status"] = json!({"userInfo": user_value(&cx.user)}),
        "selfsubjectrulesreviews" => rules_review(cx, &mut review),
        "selfsubjectaccessreviews" => {
            let user = cx.user.clone();
            access_review(cx, &user, &mut review)?;
        }
        "subjectaccessreviews" | "localsubjectaccessreviews" => {
            let local = cx.served.info.plural.starts_with("local");
            let asked = review["spec"]["resourceAttributes"]["namespace"]
                .as_str()
                .unwrap_or_default();
            if local && asked != cx.target.namespace {
                return Err(Status::bad_request(
                    "spec.resourceAttributes.namespace must match metadata.namespace of a LocalSubjectAccessReview",
                ));
            }
            let user = user_of(&review["spec"]);
            if user.name.is_empty() && user.groups.is_empty() {
                return Err(Status::bad_request(
                    "spec.user: Invalid value: at least one of user or group must be specified",
                ));
            }
            access_review(cx, &user, &mut review)?;
        }
        _ => return Err(Status::path_not_found()),
    }
    Ok(respond::value(&cx.cluster, StatusCode::CREATED, &review, output))
}

fn user_value(user: &UserInfo) -> Value {
    let mut value = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        value["uid"] = user.uid.clone().into();
    }
    if !user.extra.is_empty() {
        value["extra"] = json!(user.extra);
    }
    value
}

fn strings(value: &Value) -> Vec<String> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|v| v.as_str().map(str::to_owned))
        .collect()
}

fn user_of(spec: &Value) -> UserInfo {
    let text = |key: &str| spec[key].as_str().unwrap_or_default().to_owned();
    UserInfo {
        name: text("user"),
        groups: strings(&spec["groups"]),
        uid: text("uid"),
        ..UserInfo::default()
    }
}

fn token_review(cx: &Context, review: &mut Value) {
    let audiences = strings(&review["spec"]["audiences"]);
    let token = review["spec"]["token"].as_str().unwrap_or_default();
    review["status"] = match tokens::authenticate(&cx.cluster, token, &audiences) {
        Ok((user, matched)) => json!({"authenticated": true, "user": user_value(&user), "audiences": matched}),
        Err(reason) => json!({"authenticated": false, "user": {}, "error": reason}),
    };
}

fn access_review(cx: &Context, user: &UserInfo, review: &mut Value) -> Result<(), Status> {
    let spec = &review["spec"];
    let (resource, other) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    let text = |from: &Value, key: &str| from[key].as_str().unwrap_or_default().to_owned();
    let attributes = match (resource.is_object(), other.is_object()) {
        (true, false) => Attributes {
            verb: text(resource, "verb"),
            group: text(resource, "group"),
            resource: text(resource, "resource"),
            subresource: text(resource, "subresource"),
            namespace: text(resource, "namespace"),
            name: text(resource, "name"),
            path: String::new(),
            field_selector: asked_fields(&resource["fieldSelector"])?,
        },
        (false, true) => Attributes {
            verb: text(other, "verb"),
            path: text(other, "path"),
            ..Attributes::default()
        },
        _ => {
            return Err(Status::bad_request(
                "exactly one of spec.nonResourceAttributes or spec.resourceAttributes must be specified",
            ));
        }
    };
    review["status"] = match auth::authorize(&cx.cluster, user, &attributes) {
        Decision::Allow(reason) if reason.is_empty() => json!({"allowed": true}),
        Decision::Allow(reason) => json!({"allowed": true, "reason": reason}),
        Decision::Deny(reason) if reason.is_empty() => json!({"allowed": false}),
        Decision::Deny(reason) => json!({"allowed": false, "reason": reason}),
    };
    Ok(())
}

/// The field selector of a review: raw, or as requirements, which are written as one.
fn asked_fields(selector: &Value) -> Result<String, Status> {
    let raw = selector["rawSelector"].as_str().unwrap_or_default();
    let requirements = selector["requirements"].as_array().map_or(&[][..], Vec::as_slice);
    if !raw.is_empty() && !requirements.is_empty() {
        return Err(Status::bad_request(
            "spec.resourceAttributes.fieldSelector.rawSelector: Forbidden: may not be specified together with requirements",
        ));
    }
    let mut terms = Vec::new();
    for requirement in requirements {
        let key = requirement["key"].as_str().unwrap_or_default();
        let values = strings(&requirement["values"]);
        // A field has one value: what cannot be said of it restricts nothing, as upstream ignores it.
        match (requirement["operator"].as_str(), values.as_slice()) {
            (Some("In"), [one]) => terms.push(format!("{key}={one}")),
            (Some("NotIn"), [one]) => terms.push(format!("{key}!={one}")),
            _ => {}
        }
    }
    Ok(if raw.is_empty() {
        terms.join(",")
    } else {
        raw.to_owned()
    })
}

fn rules_review(cx: &Context, review: &mut Value) {
    let namespace = review["spec"]["namespace"].as_str().unwrap_or_default().to_owned();
    let mut resources = Vec::new();
    let mut paths = Vec::new();
    if cx.user.in_group(auth::MASTERS) {
        resources.push(json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}));
        paths.push(json!({"verbs": ["*"], "nonResourceURLs": ["*"]}));
    }
    for rule in cx.cluster.rbac.rules(&cx.user, &namespace) {
        if rule.urls.is_empty() {
            resources.push(json!(rule));
        } else {
            paths.push(json!(rule));
        }
    }
    // What the node authorizer allows depends on pods and cannot be listed.
    let incomplete = cx.user.in_group(auth::NODES);
    review["status"] = json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": incomplete});
}

/// A token for the service account.
pub async fn token(cx: &Context, body: Body) -> Result<Response<Body>, Status> {
    let output = cx.output(false)?;
    let bytes = write::body(body).await?;
    let gvk = Gvk::new("authentication.k8s.io", "v1", "TokenRequest");
    let mut request = write::decode(cx, &gvk, &bytes)?.value;
    let (namespace, name) = (&cx.target.namespace, &cx.target.name);
    node::restrict_token(&cx.cluster, &cx.user, namespace, name, &request)?;
    if cx.dry_run()? {
        return Err(Status::bad_request(
            "dryRun is not supported for tokens: a token would be issued",
        ));
    }
    tokens::issue(&cx.cluster, namespace, name, &mut request)?;
    Ok(respond::value(&cx.cluster, StatusCode::CREATED, &request, output))
}

//! What happens to a certificate signing request next. Pure.
//!
//! # Source
//! `pkg/controller/certificates` (approver, signer, cleaner) and `pkg/apis/certificates` of Kubernetes 1.36.

use std::time::Duration;

use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use k8s_openapi::jiff::Timestamp;

use super::Asked;

const API_CLIENT: &str = "kubernetes.io/kube-apiserver-client";
const KUBELET_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";
const NODES: &str = "system:nodes";
const NODE_PREFIX: &str = "system:node:";
/// Life of a certificate whose request names none, and the longest that is given.
const TTL: Duration = Duration::from_secs(365 * 24 * 3600);
const TTL_MIN: Duration = Duration::from_secs(600);
/// How long requests are kept after their decision, or without one.
const DECIDED: Duration = Duration::from_secs(3600);
const PENDING: Duration = Duration::from_secs(24 * 3600);

/// The next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing until then.
    Wait(Duration),
    /// Approve, if the one who asked may create this subresource; else wait.
    Approve {
        subresource: &'static str,
        message: &'static str,
        wait: Duration,
    },
    /// The signer will not sign this.
    Fail(String),
    Sign {
        usages: Vec<String>,
        ttl: Duration,
    },
    /// It is old.
    Remove,
}

fn condition<'r>(request: &'r CertificateSigningRequest, kind: &str) -> Option<&'r CertificateSigningRequestCondition> {
    let conditions = request.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|c| c.type_ == kind)
}

/// Plans for `request`; `asked` is what its PEM says, or why it cannot be read.
pub fn plan(request: &CertificateSigningRequest, asked: Result<&Asked, &str>, now: Timestamp) -> Step {
    let left = match left(request, now) {
        Some(left) => left,
        None => return Step::Remove,
    };
    let spec = &request.spec;
    let issued = request
        .status
        .as_ref()
        .and_then(|s| s.certificate.as_ref())
        .is_some_and(|c| !c.0.is_empty());
    let ours = matches!(spec.signer_name.as_str(), API_CLIENT | KUBELET_CLIENT | KUBELET_SERVING);
    if issued || !ours || condition(request, "Denied").is_some() || condition(request, "Failed").is_some() {
        return Step::Wait(left);
    }
    if condition(request, "Approved").is_none() {
        let is_node = spec.signer_name == KUBELET_CLIENT
            && asked.is_ok_and(|asked| node_client(asked, spec.usages.as_deref().unwrap_or_default()).is_ok());
        return match asked {
            Ok(asked) if is_node && spec.username.as_deref() == Some(&asked.common_name) => Step::Approve {
                subresource: "selfnodeclient",
                message: "Auto approving self kubelet client certificate after SubjectAccessReview.",
                wait: left,
            },
            Ok(_) if is_node => Step::Approve {
                subresource: "nodeclient",
                message: "Auto approving kubelet client certificate after SubjectAccessReview.",
                wait: left,
            },
            _ => Step::Wait(left),
        };
    }
    let usages = spec.usages.clone().unwrap_or_default();
    let fits = asked
        .map_err(str::to_owned)
        .and_then(|asked| match spec.signer_name.as_str() {
            API_CLIENT => api_client(&usages),
            KUBELET_CLIENT => node_client(asked, &usages),
            _ => node_serving(asked, &usages, spec.username.as_deref().unwrap_or_default()),
        });
    match fits {
        Err(why) => Step::Fail(why),
        Ok(()) => Step::Sign {
            usages,
            ttl: match spec.expiration_seconds {
                None => TTL,
                Some(seconds) => Duration::from_secs(seconds.max(0) as u64).clamp(TTL_MIN, TTL),
            },
        },
    }
}

/// Time until the request goes; `None` if it is due.
fn left(request: &CertificateSigningRequest, now: Timestamp) -> Option<Duration> {
    let created = request.metadata.creation_timestamp.as_ref().map(|t| t.0);
    let decided = ["Approved", "Denied", "Failed"]
        .iter()
        .filter_map(|kind| condition(request, kind)?.last_update_time.as_ref())
        .map(|t| t.0)
        .min();
    let issued = request.status.as_ref().is_some_and(|s| s.certificate.is_some());
    let undecided = ["Approved", "Denied", "Failed"]
        .iter()
        .all(|kind| condition(request, kind).is_none());
    let (since, keep) = match decided {
        Some(at) => (at, DECIDED),
        None if undecided || !issued => (created.unwrap_or(now), PENDING),
        None => (created.unwrap_or(now), DECIDED),
    };
    keep.checked_sub(apimachinery::time::since(now, since))
        .filter(|d| !d.is_zero())
}

fn within(usages: &[String], needed: &[&str], allowed: &[&str]) -> bool {
    needed.iter().all(|n| usages.iter().any(|u| u == n))
        && usages
            .iter()
            .all(|u| needed.contains(&u.as_str()) || allowed.contains(&u.as_str()))
}

fn api_client(usages: &[String]) -> Result<(), String> {
    if within(usages, &["client auth"], &["digital signature", "key encipherment"]) {
        return Ok(());
    }
    Err("invalid usages for client certificate: [\"digital signature\" \"key encipherment\" \"client auth\"] are allowed, \"client auth\" is needed".into())
}

fn node_subject(asked: &Asked) -> Result<(), String> {
    if asked.organizations != [NODES] {
        return Err("subject organization is not system:nodes".into());
    }
    if !asked.common_name.starts_with(NODE_PREFIX) {
        return Err("subject common name does not begin with system:node:".into());
    }
    Ok(())
}

fn node_client(asked: &Asked, usages: &[String]) -> Result<(), String> {
    node_subject(asked)?;
    if asked.hosts > 0 || asked.others > 0 {
        return Err("DNS, IP, email and URI subjectAltNames are not allowed".into());
    }
    if !within(usages, &["digital signature", "client auth"], &["key encipherment"]) {
        return Err("usages did not match [\"client auth\",\"digital signature\"] or [\"client auth\",\"digital signature\",\"key encipherment\"]".into());
    }
    Ok(())
}

fn node_serving(asked: &Asked, usages: &[String], user: &str) -> Result<(), String> {
    node_subject(asked)?;
    if asked.hosts == 0 {
        return Err("at least one of DNS and IP subjectAltNames is required".into());
    }
    if asked.others > 0 {
        return Err("email and URI subjectAltNames are not allowed".into());
    }
    if !within(usages, &["digital signature", "server auth"], &["key encipherment"]) {
        return Err("usages did not match [\"digital signature\",\"server auth\"] or [\"digital signature\",\"key encipherment\",\"server auth\"]".into());
    }
    if user != asked.common_name {
        return Err("only the node itself may ask for its serving certificate".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn request(signer: &str, usages: Value, user: &str, status: Value) -> CertificateSigningRequest {
        serde_json::from_value(json!({
            "metadata": {"name": "r", "creationTimestamp": "2026-01-02T03:00:00Z"},
            "spec": {"request": "", "signerName": signer, "usages": usages, "username": user},
            "status": status,
        }))
        .unwrap()
    }

    fn node() -> Asked {
        Asked {
            common_name: "system:node:n1".into(),
            organizations: vec![NODES.into()],
            ..Asked::default()
        }
    }

    fn at(text: &str) -> Timestamp {
        apimachinery::time::parse(text).unwrap()
    }

    fn approved() -> Value {
        json!({"conditions": [{"type": "Approved", "status": "True", "lastUpdateTime": "2026-01-02T03:00:00Z"}]})
    }

    #[test]
    fn nodes_are_approved_by_rule_and_others_wait() {
        let now = at("2026-01-02T03:10:00Z");
        let usages = json!(["digital signature", "client auth"]);
        let step = |signer: &str, user: &str, asked: &Asked| match plan(
            &request(signer, usages.clone(), user, json!({})),
            Ok(asked),
            now,
        ) {
            Step::Approve { subresource, .. } => subresource.to_owned(),
            other => format!("{other:?}"),
        };
        assert_eq!(step(KUBELET_CLIENT, "system:node:n1", &node()), "selfnodeclient");
        assert_eq!(step(KUBELET_CLIENT, "bootstrap", &node()), "nodeclient");
        let waits = format!("{:?}", Step::Wait(Duration::from_secs(24 * 3600 - 600)));
        assert_eq!(step(API_CLIENT, "me", &node()), waits);
        let named = Asked { hosts: 1, ..node() };
        assert_eq!(step(KUBELET_CLIENT, "system:node:n1", &named), waits);
    }

    #[test]
    fn approved_requests_are_signed_if_they_fit_the_signer() {
        let now = at("2026-01-02T03:10:00Z");
        let check = |signer: &str, usages: Value, user: &str, asked: Result<&Asked, &str>, want: &str| {
            let step = match plan(&request(signer, usages, user, approved()), asked, now) {
                Step::Sign { ttl, .. } => format!("sign {}", ttl.as_secs()),
                Step::Fail(why) => why,
                other => format!("{other:?}"),
            };
            assert!(step.starts_with(want), "{step} is not {want}");
        };
        let client = json!(["client auth"]);
        let serving = json!(["digital signature", "server auth"]);
        let node_usages = json!(["digital signature", "client auth", "key encipherment"]);
        check(API_CLIENT, client, "u", Ok(&Asked::default()), "sign 31536000");
        check(
            API_CLIENT,
            serving.clone(),
            "u",
            Ok(&Asked::default()),
            "invalid usages",
        );
        check(KUBELET_CLIENT, node_usages.clone(), "u", Ok(&node()), "sign");
        check(
            KUBELET_CLIENT,
            node_usages,
            "u",
            Ok(&Asked::default()),
            "subject organization",
        );
        check(
            KUBELET_SERVING,
            serving.clone(),
            "system:node:n1",
            Ok(&node()),
            "at least one",
        );
        let named = Asked { hosts: 1, ..node() };
        check(KUBELET_SERVING, serving.clone(), "system:node:n1", Ok(&named), "sign");
        check(
            KUBELET_SERVING,
            serving.clone(),
            "other",
            Ok(&named),
            "only the node itself",
        );
        check(KUBELET_SERVING, serving, "u", Err("broken"), "broken");
        check("example.com/own", json!(["client auth"]), "u", Ok(&node()), "Wait");
    }

    #[test]
    fn old_requests_go() {
        let pending = request(API_CLIENT, json!([]), "u", json!({}));
        assert_eq!(plan(&pending, Err(""), at("2026-01-03T03:00:01Z")), Step::Remove);
        let mut done = request("example.com/own", json!([]), "u", approved());
        assert_eq!(
            plan(&done, Err(""), at("2026-01-02T03:59:00Z")),
            Step::Wait(Duration::from_secs(60))
        );
        done.status.as_mut().unwrap().conditions.as_mut().unwrap()[0].type_ = "Denied".into();
        assert_eq!(plan(&done, Err(""), at("2026-01-02T04:00:01Z")), Step::Remove);
    }
}

//! CertificateSigningRequests: what is refused, and who may decide.

mod common;

use apiserver::UserInfo;
use base64::Engine as _;
use common::{Api, api, call};
use serde_json::{Value, json};

const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";

fn pem(cn: &str, organization: &str) -> String {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, cn);
    params
        .distinguished_name
        .push(rcgen::DnType::OrganizationName, organization);
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    params.serialize_request(&key).unwrap().pem().unwrap()
}

fn request(name: &str, organization: &str, signer: &str) -> Value {
    let b64 = base64::engine::general_purpose::STANDARD.encode(pem("alice", organization));
    json!({"metadata": {"name": name}, "spec": {"request": b64, "signerName": signer, "usages": ["client auth"],
        "username": "somebody else"}})
}

fn message(status: &Value) -> &str {
    status["message"].as_str().unwrap_or_default()
}

async fn grant(api: &Api, user: &str, rules: Value) {
    const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
    let role = json!({"metadata": {"name": user}, "rules": rules});
    assert_eq!(api.post(&format!("{RBAC}/clusterroles"), role).await.0, 201);
    let binding = json!({"metadata": {"name": user}, "subjects": [{"kind": "User", "name": user}],
        "roleRef": {"kind": "ClusterRole", "name": user, "apiGroup": "rbac.authorization.k8s.io"}});
    assert_eq!(api.post(&format!("{RBAC}/clusterrolebindings"), binding).await.0, 201);
}

const CLIENT: &str = "kubernetes.io/kube-apiserver-client";

#[tokio::test]
async fn a_request_says_who_asked_and_never_changes() {
    let api = api().await;
    let (code, made) = api.post(REQUESTS, request("a", "dev", CLIENT)).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(made["spec"]["username"], "test", "not what the body said");
    assert_eq!(
        made["spec"]["groups"],
        json!(["system:masters", "system:authenticated"])
    );
    let changed = json!({"spec": {"usages": ["server auth"]}, "metadata": {"labels": {"x": "y"}},
        "status": {"conditions": [{"type": "Approved", "status": "True"}]}});
    let (code, after) = api.merge(&format!("{REQUESTS}/a"), changed).await;
    assert_eq!((code, &after["spec"]), (200, &made["spec"]), "{after}");
    assert_eq!(
        (&after["metadata"]["labels"]["x"], &after["status"]),
        (&json!("y"), &made["status"])
    );
    let (_, found) = api
        .get(&format!("{REQUESTS}?fieldSelector=spec.signerName%3D{CLIENT}"))
        .await;
    assert_eq!(found["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn what_cannot_be_signed_is_refused_by_name() {
    let api = api().await;
    let check = async |change: Value, code: u16, says: &str| {
        let mut body = request("bad", "dev", CLIENT);
        for (key, value) in change.as_object().unwrap() {
            body["spec"][key] = value.clone();
        }
        let (got, status) = api.post(REQUESTS, body).await;
        assert_eq!(got, code, "{status}");
        assert!(
            message(&status).contains(says),
            "{} does not say {says:?}",
            message(&status)
        );
    };
    check(
        json!({"request": "bm9uc2Vuc2U="}),
        422,
        "PEM block type must be CERTIFICATE REQUEST",
    )
    .await;
    check(json!({"usages": []}), 422, "spec.usages: Required value").await;
    check(
        json!({"usages": ["client auth", "flying"]}),
        422,
        "spec.usages[1]: Unsupported value: \"flying\"",
    )
    .await;
    check(
        json!({"signerName": "nodomain"}),
        422,
        "fully qualified domain and path",
    )
    .await;
    check(
        json!({"signerName": "kubernetes.io/legacy-unknown"}),
        422,
        "the legacy signerName is not allowed via this API version",
    )
    .await;
    check(
        json!({"expirationSeconds": 599}),
        422,
        "may not specify a duration less than 600 seconds",
    )
    .await;
    let (code, status) = api.post(REQUESTS, request("root", "system:masters", CLIENT)).await;
    assert_eq!(code, 403);
    assert!(
        message(&status).contains("with system:masters group is not allowed"),
        "{status}"
    );
}

#[tokio::test]
async fn approval_and_signing_are_rights_of_their_own() {
    let api = api().await;
    api.post(REQUESTS, request("a", "dev", CLIENT)).await;
    let all = json!({"apiGroups": ["certificates.k8s.io"], "verbs": ["*"],
        "resources": ["certificatesigningrequests", "certificatesigningrequests/approval", "certificatesigningrequests/status"]});
    let signers = |verb: &str, name: &str| json!({"apiGroups": ["certificates.k8s.io"], "verbs": [verb], "resources": ["signers"], "resourceNames": [name]});
    grant(&api, "none", json!([all])).await;
    grant(&api, "approver", json!([all, signers("approve", "kubernetes.io/*")])).await;
    grant(&api, "signer", json!([all, signers("sign", CLIENT)])).await;
    let put = async |user: &str, part: &str, status: Value| {
        let service = api.cluster.local_service(UserInfo::new(user, Vec::<String>::new()));
        let body = json!({"status": status}).to_string();
        let path = format!("{REQUESTS}/a/{part}");
        call(&service, "PATCH", &path, "application/merge-patch+json", body).await
    };
    let condition = |kind: &str| json!({"conditions": [{"type": kind, "status": "True", "reason": "Because"}]});
    let (code, status) = put("none", "approval", condition("Approved")).await;
    assert_eq!(code, 403, "{status}");
    assert!(
        message(&status).ends_with(&format!(
            "user not permitted to approve requests with signerName {CLIENT:?}"
        )),
        "{status}"
    );
    // Nor by the way of status.
    let (_, same) = put("signer", "status", condition("Approved")).await;
    assert!(
        same["status"]["conditions"].as_array().is_none_or(Vec::is_empty),
        "{same}"
    );
    let (code, approved) = put("approver", "approval", condition("Approved")).await;
    assert_eq!(code, 200, "{approved}");
    let first = &approved["status"]["conditions"][0];
    assert!(
        first["lastUpdateTime"].is_string() && first["lastTransitionTime"].is_string(),
        "{first}"
    );
    let (code, status) = put("approver", "approval", condition("Denied")).await;
    assert_eq!(code, 422);
    assert!(
        message(&status).contains("may not remove a condition of type \"Approved\""),
        "{status}"
    );

    let b64 = base64::engine::general_purpose::STANDARD.encode(api.cluster.ca_pem());
    let (code, status) = put("approver", "status", json!({"certificate": b64})).await;
    assert_eq!(code, 403, "{status}");
    assert!(
        message(&status).contains("user not permitted to sign requests"),
        "{status}"
    );
    let (code, status) = put("signer", "status", json!({"certificate": "bm9uc2Vuc2U="})).await;
    assert_eq!(code, 422, "{status}");
    let (code, signed) = put("signer", "status", json!({"certificate": b64})).await;
    assert_eq!(
        (code, signed["status"]["conditions"].as_array().unwrap().len()),
        (200, 1),
        "{signed}"
    );
    let (_, table) = {
        let request = http::Request::builder()
            .uri(format!("{REQUESTS}/a"))
            .header("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
            .body(common::body(""))
            .unwrap();
        use http_body_util::BodyExt;
        use tower::ServiceExt;
        let response = api.service.clone().oneshot(request).await.unwrap();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (0, serde_json::from_slice::<Value>(&bytes).unwrap())
    };
    assert_eq!(table["rows"][0]["cells"][5], "Approved,Issued");
}

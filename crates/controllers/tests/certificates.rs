//! From a request to a user: approved by hand or by rule, signed, and let in over TLS.

mod world;

use std::sync::Arc;

use k8s_openapi::ByteString;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use reconcile::{Client, HttpsConfig, Identity, Patch};
use serde_json::{Value, json};
use world::{World, typed};

struct Made {
    pem: String,
    key: String,
}

fn request(cn: &str, organization: &str) -> Made {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::OrganizationName, organization);
    params.distinguished_name.push(rcgen::DnType::CommonName, cn);
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    Made {
        pem: params.serialize_request(&key).unwrap().pem().unwrap(),
        key: key.serialize_pem(),
    }
}

async fn ask(w: &World, name: &str, pem: &str, signer: &str, usages: Value) {
    let mut request: CertificateSigningRequest = typed(&json!({"metadata": {"name": name},
        "spec": {"request": "", "signerName": signer, "usages": usages, "expirationSeconds": 3600}}));
    request.spec.request = ByteString(pem.as_bytes().to_vec());
    w.client.create(None, &request).await.unwrap();
}

async fn status(w: &World, name: &str) -> k8s_openapi::api::certificates::v1::CertificateSigningRequestStatus {
    let request: CertificateSigningRequest = w.client.get(None, name).await.unwrap();
    request.status.unwrap_or_default()
}

async fn approve(w: &World, name: &str) {
    let condition = json!({"type": "Approved", "status": "True", "reason": "KubectlApprove"});
    let patch = Patch::Merge(json!({"status": {"conditions": [condition]}}));
    let _: CertificateSigningRequest = w.client.patch(None, name, &patch, Some("approval")).await.unwrap();
}

#[tokio::test]
async fn an_approved_request_becomes_a_user() {
    let w = World::new().await;
    let made = request("alice", "dev");
    ask(
        &w,
        "alice",
        &made.pem,
        "kubernetes.io/kube-apiserver-client",
        json!(["client auth"]),
    )
    .await;
    approve(&w, "alice").await;
    w.until("the certificate", async || {
        status(&w, "alice").await.certificate.is_some()
    })
    .await;
    let cert_pem = String::from_utf8(status(&w, "alice").await.certificate.unwrap().0).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = format!("https://{}", listener.local_addr().unwrap());
    w.cluster.serve(listener);
    let client = Client::https(HttpsConfig {
        server,
        ca_pem: w.cluster.ca_pem().to_owned(),
        identity: Identity::ClientCert {
            cert_pem,
            key_pem: made.key,
        },
        connector: None,
    })
    .unwrap();
    let me: SelfSubjectReview = client
        .request(
            http::Method::POST,
            "/apis/authentication.k8s.io/v1/selfsubjectreviews",
            Some(&json!({"kind": "SelfSubjectReview", "apiVersion": "authentication.k8s.io/v1"})),
        )
        .await
        .unwrap();
    let user = me.status.unwrap().user_info.unwrap();
    assert_eq!(user.username.as_deref(), Some("alice"));
    assert_eq!(user.groups.unwrap(), ["dev", "system:authenticated"]);
}

#[tokio::test]
async fn a_nodes_request_passes_by_rule_and_a_wrong_one_fails_by_name() {
    let w = World::new().await;
    let signer = "kubernetes.io/kube-apiserver-client-kubelet";
    let usages = || json!(["digital signature", "client auth"]);
    let node = request("system:node:n1", "system:nodes");
    // The one who asks here may do everything, so the rule allows it.
    ask(&w, "n1", &node.pem, signer, usages()).await;
    w.until("approved and signed", async || {
        let status = status(&w, "n1").await;
        let approved = status
            .conditions
            .iter()
            .flatten()
            .any(|c| c.reason.as_deref() == Some("AutoApproved"));
        approved && status.certificate.is_some()
    })
    .await;
    let stranger = request("alice", "system:nodes");
    ask(&w, "stranger", &stranger.pem, signer, usages()).await;
    approve(&w, "stranger").await;
    w.until("failed", async || {
        let status = status(&w, "stranger").await;
        status.conditions.iter().flatten().any(|c| {
            c.type_ == "Failed" && c.message.as_deref() == Some("subject common name does not begin with system:node:")
        })
    })
    .await;
    let other = Arc::new(request("alice", "dev"));
    ask(&w, "other", &other.pem, "example.com/own", json!(["client auth"])).await;
    approve(&w, "other").await;
    // Another signer's request is left alone: one that came later is done, this one is not.
    ask(
        &w,
        "last",
        &request("bob", "dev").pem,
        "kubernetes.io/kube-apiserver-client",
        json!(["client auth"]),
    )
    .await;
    approve(&w, "last").await;
    w.until("the last one", async || status(&w, "last").await.certificate.is_some())
        .await;
    assert!(status(&w, "other").await.certificate.is_none());
}

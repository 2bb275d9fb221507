//! Approves the certificate requests of joining hosts: each account may ask for its own host's identity and no other.

use apiserver::Cluster;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use reconcile::{Client, Informers, Queue, Requeue, run_controller};
use stdx::Shutdown;

use super::{GROUP, NAMESPACE, USER, token::account};

/// Runs until `shutdown`.
pub async fn run(home: Client, informers: Informers, shutdown: Shutdown) {
    let requests = informers.get::<CertificateSigningRequest>();
    let queue: Queue<reconcile::Key> = Queue::new();
    let enqueue = queue.clone();
    requests.on_change(move |change| enqueue.add(change.key().clone()));
    let work = move |key: reconcile::Key| {
        let (home, requests) = (home.clone(), requests.clone());
        async move {
            let Some(request) = requests.by_key(&key) else {
                return Ok(Requeue::Done);
            };
            if !may(&request) {
                return Ok(Requeue::Done);
            }
            let mut approved = (*request).clone();
            let conditions = approved
                .status
                .get_or_insert_default()
                .conditions
                .get_or_insert_default();
            conditions.push(CertificateSigningRequestCondition {
                type_: "Approved".to_owned(),
                status: "True".to_owned(),
                reason: Some("HostMayJoin".to_owned()),
                message: Some("asked for by the account that `oaks host token` made for this host".to_owned()),
                ..Default::default()
            });
            let path = format!(
                "/apis/certificates.k8s.io/v1/certificatesigningrequests/{}/approval",
                key.name
            );
            home.request::<CertificateSigningRequest, _>(http::Method::PUT, &path, Some(&approved))
                .await?;
            tracing::info!(controller = "hosts", name = key.name, "identity of a host approved");
            Ok(Requeue::Done)
        }
    };
    run_controller("host-identities", queue, 1, work, shutdown).await;
}

/// Whether it waits for a decision, and asks for what its account stands for.
fn may(request: &CertificateSigningRequest) -> bool {
    let decided = request
        .status
        .as_ref()
        .and_then(|s| s.conditions.as_ref())
        .is_some_and(|c| !c.is_empty());
    let user = request.spec.username.as_deref().unwrap_or_default();
    let prefix = format!("system:serviceaccount:{NAMESPACE}:{}", account(""));
    let Some(host) = user.strip_prefix(&prefix).filter(|h| !h.is_empty()) else {
        return false;
    };
    let Ok(asked) = Cluster::read_certificate_request(&request.spec.request.0) else {
        return false;
    };
    let usages: Vec<&str> = request.spec.usages.iter().flatten().map(String::as_str).collect();
    let plain =
        asked.dns_names.is_empty() && asked.ip_addresses.is_empty() && asked.emails.is_empty() && asked.uris.is_empty();
    !decided
        && request.spec.signer_name == "kubernetes.io/kube-apiserver-client"
        && asked.common_name == format!("{USER}{host}")
        && asked.organizations == [GROUP]
        && plain
        && usages.iter().all(|u| ["digital signature", "client auth"].contains(u))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{ByteString, api::certificates::v1::CertificateSigningRequestSpec};
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    fn request(user: &str, cn: &str, organization: &str, usage: &str) -> CertificateSigningRequest {
        let mut params = CertificateParams::default();
        let mut name = DistinguishedName::new();
        name.push(DnType::OrganizationName, organization);
        name.push(DnType::CommonName, cn);
        params.distinguished_name = name;
        let pem = params
            .serialize_request(&KeyPair::generate().unwrap())
            .unwrap()
            .pem()
            .unwrap();
        CertificateSigningRequest {
            spec: CertificateSigningRequestSpec {
                request: ByteString(pem.into_bytes()),
                signer_name: "kubernetes.io/kube-apiserver-client".into(),
                username: Some(user.into()),
                usages: Some(vec![usage.into()]),
                ..Default::default()
            },
            ..Default::default()
        }
    }

    #[test]
    fn an_account_gets_its_own_hosts_identity_and_no_other() {
        let user = "system:serviceaccount:kube-system:host-join-b";
        assert!(may(&request(user, "oaks:host:b", "oaks:hosts", "client auth")));
        assert!(!may(&request(user, "oaks:host:c", "oaks:hosts", "client auth")));
        assert!(!may(&request(user, "oaks:host:b", "system:masters", "client auth")));
        assert!(!may(&request(user, "oaks:host:b", "oaks:hosts", "server auth")));
        let stranger = "system:serviceaccount:default:host-join-b";
        assert!(!may(&request(stranger, "oaks:host:b", "oaks:hosts", "client auth")));
    }
}

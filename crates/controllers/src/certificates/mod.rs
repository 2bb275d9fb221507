//! Certificate signing requests: approves those of nodes that rules allow, signs what is approved, removes what is old.
//!
//! The keys stay with the API server's process: this controller asks a [`Signer`]. It serves the signers
//! `kubernetes.io/kube-apiserver-client`, `-kubelet` and `kubelet-serving`; requests to other signers are left to others.

pub mod plan;

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use k8s_openapi::ByteString;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use reconcile::{DeleteParams, Error, Informer, Key, Queue, Requeue, ResourceId, run_controller};

use crate::Context;
use crate::common::uid_of;
use plan::{Step, plan};

const NAME: &str = "certificate-controller";

/// What a request asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// CN of the subject.
    pub common_name: String,
    /// O of the subject.
    pub organizations: Vec<String>,
    /// Number of DNS names, and of IP addresses.
    pub hosts: usize,
    /// Number of e-mail addresses, and of URIs.
    pub others: usize,
}

/// Holds the cluster's CA.
pub trait Signer: Send + Sync + 'static {
    /// Reads a request in PEM. The error is a sentence for people.
    fn read(&self, pem: &[u8]) -> Result<Asked, String>;
    /// Signs a request in PEM for these usages; returns PEM. The error is a sentence for people.
    fn sign(&self, pem: &[u8], usages: &[String], ttl: Duration) -> Result<String, String>;
}

struct Controller {
    context: Context,
    signer: Arc<dyn Signer>,
    requests: Informer<CertificateSigningRequest>,
}

pub(crate) async fn run(context: Context, signer: Arc<dyn Signer>) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        requests: context.informers.get(),
        context,
        signer,
    });
    let sink = queue.clone();
    this.requests.on_change(move |change| sink.add(change.key().clone()));
    let shutdown = this.context.shutdown.clone();
    if shutdown.or_stop(this.requests.wait_synced()).await.is_none() {
        return;
    }
    let work = move |key| {
        let this = this.clone();
        async move { this.reconcile(key).await }
    };
    run_controller(NAME, queue, 2, work, shutdown).await;
}

impl Controller {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let Some(request) = self.requests.by_key(&key) else {
            return Ok(Requeue::Done);
        };
        let asked = self.signer.read(&request.spec.request.0);
        match plan(&request, asked.as_ref().map_err(String::as_str), self.context.now()) {
            Step::Wait(delay) => return Ok(Requeue::After(delay)),
            Step::Remove => {
                let params = DeleteParams {
                    resource_version: request.metadata.resource_version.clone(),
                    ..DeleteParams::uid(uid_of(&*request))
                };
                let deleted = self
                    .context
                    .client
                    .delete::<CertificateSigningRequest>(None, &key.name, &params)
                    .await;
                return match deleted {
                    Err(error) if error.is_not_found() || error.is_conflict() => Ok(Requeue::Done),
                    other => other.map(|()| Requeue::Done),
                };
            }
            Step::Approve {
                subresource,
                message,
                wait,
            } => {
                if !self.may(&request, subresource).await? {
                    return Ok(Requeue::After(wait));
                }
                let condition = self.condition("Approved", "AutoApproved", message);
                self.put(&request, "approval", Some(condition), None).await?;
            }
            Step::Fail(why) => {
                let condition = self.condition("Failed", "SignerValidationFailure", &why);
                self.put(&request, "status", Some(condition), None).await?;
            }
            Step::Sign { usages, ttl } => match self.signer.sign(&request.spec.request.0, &usages, ttl) {
                Ok(pem) => self.put(&request, "status", None, Some(pem)).await?,
                Err(why) => {
                    let condition = self.condition("Failed", "SigningFailure", &why);
                    self.put(&request, "status", Some(condition), None).await?;
                }
            },
        }
        Ok(Requeue::Done)
    }

    fn condition(&self, kind: &str, reason: &str, message: &str) -> CertificateSigningRequestCondition {
        CertificateSigningRequestCondition {
            type_: kind.to_owned(),
            status: "True".to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            ..CertificateSigningRequestCondition::default()
        }
    }

    /// Whether the one who asked may create the subresource: the rule that lets a node's request pass by itself.
    async fn may(&self, request: &CertificateSigningRequest, subresource: &str) -> Result<bool, Error> {
        let spec = &request.spec;
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: spec.username.clone(),
                groups: spec.groups.clone(),
                uid: spec.uid.clone(),
                extra: spec.extra.clone(),
                resource_attributes: Some(ResourceAttributes {
                    group: Some("certificates.k8s.io".to_owned()),
                    resource: Some("certificatesigningrequests".to_owned()),
                    subresource: Some(subresource.to_owned()),
                    verb: Some("create".to_owned()),
                    version: Some("*".to_owned()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let path = ResourceId::of::<SubjectAccessReview>().path(None, None, None);
        let answer: SubjectAccessReview = self.context.client.request(Method::POST, &path, Some(&review)).await?;
        Ok(answer.status.is_some_and(|s| s.allowed))
    }

    async fn put(
        &self,
        request: &CertificateSigningRequest,
        subresource: &str,
        condition: Option<CertificateSigningRequestCondition>,
        certificate: Option<String>,
    ) -> Result<(), Error> {
        let mut update = request.clone();
        let status = update.status.get_or_insert_default();
        if let Some(condition) = condition {
            status.conditions.get_or_insert_default().push(condition);
        }
        if let Some(pem) = certificate {
            status.certificate = Some(ByteString(pem.into_bytes()));
        }
        let name = request.metadata.name.as_deref();
        let path = ResourceId::of::<CertificateSigningRequest>().path(None, name, Some(subresource));
        let written = self
            .context
            .client
            .request::<serde::de::IgnoredAny, _>(Method::PUT, &path, Some(&update))
            .await;
        match written {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }
}

//! CertificateSigningRequests: who asked, who may approve and sign, and what a request must look like.
//!
//! # Source
//! `pkg/apis/certificates/validation`, `pkg/registry/certificates` and `plugin/pkg/admission/certificates` of Kubernetes
//! 1.36.

use apimachinery::field::FieldError;
use apimachinery::status::Status;
use apimachinery::validate::names;
use apimachinery::{meta, time};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};

use super::Operation;
use crate::auth::{self, Attributes, MASTERS};
use crate::certificates;
use crate::handlers::Context;
use crate::strategy::Part;

const GROUP: &str = "certificates.k8s.io";
pub const API_CLIENT: &str = "kubernetes.io/kube-apiserver-client";
const LEGACY: &str = "kubernetes.io/legacy-unknown";
/// Shortest life that can be asked for.
const SECONDS_MIN: i64 = 600;
const USAGES: [&str; 23] = [
    "any",
    "cert sign",
    "client auth",
    "code signing",
    "content commitment",
    "crl sign",
    "data encipherment",
    "decipher only",
    "digital signature",
    "email protection",
    "encipher only",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "key agreement",
    "key encipherment",
    "microsoft sgc",
    "netscape sgc",
    "ocsp signing",
    "s/mime",
    "server auth",
    "signing",
    "timestamping",
];

pub fn is(cx: &Context) -> bool {
    cx.served.is(GROUP, "certificatesigningrequests")
}

/// Notes who asks, and when conditions changed.
pub fn complete(cx: &Context, operation: Operation, old: Option<&Value>, new: &mut Value) {
    match operation {
        Operation::Create => {
            let Some(spec) = new.get_mut("spec").and_then(Value::as_object_mut) else {
                return;
            };
            for key in ["username", "uid", "groups", "extra"] {
                spec.remove(key);
            }
            spec.insert("username".into(), cx.user.name.clone().into());
            spec.insert("groups".into(), json!(cx.user.groups));
            if !cx.user.uid.is_empty() {
                spec.insert("uid".into(), cx.user.uid.clone().into());
            }
            if !cx.user.extra.is_empty() {
                spec.insert("extra".into(), json!(cx.user.extra));
            }
        }
        Operation::Update(_) => {
            let now = time::now_rfc3339(&*cx.cluster.clock);
            let before = old.map(|o| o["status"]["conditions"].clone()).unwrap_or_default();
            let conditions = new["status"].get_mut("conditions").and_then(Value::as_array_mut);
            for condition in conditions.into_iter().flatten().filter(|c| c.is_object()) {
                if !condition["lastUpdateTime"].is_string() {
                    condition["lastUpdateTime"] = now.clone().into();
                }
                if !condition["lastTransitionTime"].is_string() {
                    let same = before.as_array().into_iter().flatten().find(|c| {
                        c["type"] == condition["type"]
                            && c["status"] == condition["status"]
                            && c["lastTransitionTime"].is_string()
                    });
                    condition["lastTransitionTime"] =
                        same.map_or_else(|| now.clone().into(), |c| c["lastTransitionTime"].clone());
                }
            }
        }
        Operation::Delete => {}
    }
}

fn bytes(value: &Value) -> Vec<u8> {
    value.as_str().and_then(|t| STANDARD.decode(t).ok()).unwrap_or_default()
}

/// Refuses what is malformed, and decisions that the user may not make.
pub fn check(cx: &Context, operation: Operation, old: Option<&Value>, new: &Value) -> Result<(), Status> {
    if !is(cx) || operation == Operation::Delete {
        return Ok(());
    }
    let name = meta::name(new);
    let mut errors = Vec::new();
    if operation == Operation::Create {
        spec(&mut errors, &new["spec"]);
    }
    status(&mut errors, operation, old, new);
    if !errors.is_empty() {
        return Err(Status::invalid(&cx.served.info.gvk, name, &errors));
    }
    let signer = new["spec"]["signerName"].as_str().unwrap_or_default();
    let refuse = |why: String| Err(Status::forbidden(&cx.target.group_resource(), name, &why));
    match operation {
        Operation::Create if signer == API_CLIENT => {
            let asked = certificates::read(&bytes(&new["spec"]["request"])).unwrap_or_default();
            if asked.organizations.iter().any(|o| o == MASTERS) {
                return refuse(format!(
                    "use of {API_CLIENT} signer with {MASTERS} group is not allowed"
                ));
            }
        }
        Operation::Update(Part::Approval) if !may(cx, "approve", signer) => {
            return refuse(format!(
                "user not permitted to approve requests with signerName {signer:?}"
            ));
        }
        Operation::Update(Part::Status) => {
            let certificate = |o: &Value| o["status"]["certificate"].clone();
            let failed = |o: &Value| condition(o, "Failed").is_some();
            let signs = old.is_some_and(|o| certificate(o) != certificate(new) || failed(o) != failed(new));
            if signs && !may(cx, "sign", signer) {
                return refuse(format!(
                    "user not permitted to sign requests with signerName {signer:?}"
                ));
            }
        }
        _ => {}
    }
    Ok(())
}

/// Whether the user may act for the signer, or for its whole domain.
fn may(cx: &Context, verb: &str, signer: &str) -> bool {
    let domain = signer.split('/').next().unwrap_or_default();
    [signer.to_owned(), format!("{domain}/*")].into_iter().any(|name| {
        let attributes = Attributes {
            verb: verb.into(),
            group: GROUP.into(),
            resource: "signers".into(),
            name,
            ..Attributes::default()
        };
        auth::authorize(&cx.cluster, &cx.user, &attributes).allowed()
    })
}

fn spec(errors: &mut Vec<FieldError>, spec: &Value) {
    if let Err(error) = certificates::read(&bytes(&spec["request"])) {
        errors.push(FieldError::invalid(
            "spec.request",
            spec["request"].clone(),
            &error.to_string(),
        ));
    }
    let usages = spec["usages"].as_array().map_or(&[][..], Vec::as_slice);
    if usages.is_empty() {
        errors.push(FieldError::required("spec.usages", ""));
    }
    for (i, usage) in usages.iter().enumerate() {
        let path = format!("spec.usages[{i}]");
        if !usage.as_str().is_some_and(|u| USAGES.contains(&u)) {
            errors.push(FieldError::not_supported(&path, usage.clone(), &USAGES));
        }
        if usages[..i].contains(usage) {
            errors.push(FieldError::duplicate(path, usage.clone()));
        }
    }
    let signer = spec["signerName"].as_str().unwrap_or_default();
    if signer == LEGACY {
        let detail = "the legacy signerName is not allowed via this API version";
        errors.push(FieldError::invalid("spec.signerName", signer, detail));
    } else {
        signer_name(errors, signer);
    }
    if let Some(seconds) = spec["expirationSeconds"].as_i64().filter(|s| *s < SECONDS_MIN) {
        let detail = "may not specify a duration less than 600 seconds (10 minutes)";
        errors.push(FieldError::invalid("spec.expirationSeconds", seconds, detail));
    }
}

fn signer_name(errors: &mut Vec<FieldError>, signer: &str) {
    const PATH: &str = "spec.signerName";
    if signer.is_empty() {
        errors.push(FieldError::required(PATH, ""));
        return;
    }
    let parts: Vec<&str> = signer.split('/').collect();
    let [domain, path] = parts.as_slice() else {
        let detail = "must be a fully qualified domain and path of the form 'example.com/signer-name'";
        errors.push(FieldError::invalid(PATH, signer, detail));
        return;
    };
    if !domain.contains('.') {
        let detail = "should be a domain with at least two segments separated by dots";
        errors.push(FieldError::invalid(PATH, *domain, detail));
    }
    for message in names::dns_subdomain(domain)
        .into_iter()
        .chain(names::dns_subdomain(path))
    {
        errors.push(FieldError::invalid(PATH, signer, &message));
    }
}

fn condition<'v>(object: &'v Value, kind: &str) -> Option<&'v Value> {
    object["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|c| c["type"] == kind)
}

fn status(errors: &mut Vec<FieldError>, operation: Operation, old: Option<&Value>, new: &Value) {
    let path = "status.conditions";
    let conditions = new["status"]["conditions"].as_array().map_or(&[][..], Vec::as_slice);
    for (i, c) in conditions.iter().enumerate() {
        let kind = c["type"].as_str().unwrap_or_default();
        if kind.is_empty() {
            errors.push(FieldError::required(format!("{path}[{i}].type"), ""));
        }
        let at = format!("{path}[{i}].status");
        match c["status"].as_str().unwrap_or_default() {
            "" => errors.push(FieldError::required(at, "")),
            "True" => {}
            other if matches!(kind, "Approved" | "Denied" | "Failed") => {
                errors.push(FieldError::not_supported(at, other, &["True"]));
            }
            "False" | "Unknown" => {}
            other => errors.push(FieldError::not_supported(at, other, &["True", "False", "Unknown"])),
        }
        if conditions[..i].iter().any(|before| before["type"] == c["type"]) {
            errors.push(FieldError::duplicate(format!("{path}[{i}].type"), kind));
        }
    }
    if condition(new, "Approved").is_some() && condition(new, "Denied").is_some() {
        let value = new["status"]["conditions"].clone();
        errors.push(FieldError::invalid(
            path,
            value,
            "Approved and Denied conditions are mutually exclusive",
        ));
    }
    let Some(old) = old else { return };
    for kind in ["Approved", "Denied", "Failed"] {
        let (before, after) = (condition(old, kind), condition(new, kind));
        if before.is_some() && after.is_none() {
            let detail = format!("updates may not remove a condition of type {kind:?}");
            errors.push(FieldError::forbidden(path, &detail));
        }
        let decision = kind != "Failed";
        if before.is_none() && after.is_some() && decision && operation != Operation::Update(Part::Approval) {
            let detail = format!("updates may not add a condition of type {kind:?}");
            errors.push(FieldError::forbidden(path, &detail));
        }
    }
    let certificate = |o: &Value| o["status"]["certificate"].as_str().unwrap_or_default().to_owned();
    let (before, after) = (certificate(old), certificate(new));
    if before != after {
        if !before.is_empty() {
            let detail = "updates may not set certificate content after it was already set";
            errors.push(FieldError::forbidden("status.certificate", detail));
        } else if let Err(why) = chain(&bytes(&new["status"]["certificate"])) {
            errors.push(FieldError::invalid("status.certificate", "<certificate data>", &why));
        }
    }
}

/// What is put in as certificate is one, or several, in PEM.
fn chain(pem: &[u8]) -> Result<(), String> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let mut any = false;
    for der in CertificateDer::pem_slice_iter(pem) {
        let der = der.map_err(|e| e.to_string())?;
        X509Certificate::from_der(&der).map_err(|e| e.to_string())?;
        any = true;
    }
    if any {
        Ok(())
    } else {
        Err("must contain at least one CERTIFICATE PEM block".into())
    }
}

//! Certificate signing requests (PKCS #10): what they ask for, and the certificates this cluster's CA makes of them.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use rcgen::{
    CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SubjectPublicKeyInfo,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use stdx::Clock;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Certificates are valid from a little earlier, for clients whose clocks are behind.
const BACKDATE: Duration = Duration::from_secs(300);

/// What a request asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CertificateRequest {
    /// CN of the subject; a user's name. Empty if there is none.
    pub common_name: String,
    /// O of the subject; a user's groups.
    pub organizations: Vec<String>,
    pub dns_names: Vec<String>,
    pub ip_addresses: Vec<IpAddr>,
    pub emails: Vec<String>,
    pub uris: Vec<String>,
}

/// Why a request cannot be read or signed. The texts of the first two are upstream's.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("PEM block type must be CERTIFICATE REQUEST")]
    Pem,
    #[error("{0}")]
    Malformed(String),
    #[error("the signature of the request does not fit its key: {0}")]
    Signature(String),
    #[error("the subject's attribute {0} is not one that is signed here: CN, O, OU, L, ST, C are")]
    Attribute(String),
    #[error("the subject names {0} groups (O); a certificate of this cluster carries at most two")]
    Groups(usize),
    #[error("usage {0:?} is not known")]
    Usage(String),
    #[error("the name {0:?} cannot stand in a certificate")]
    Name(String),
    #[error("making the certificate failed")]
    Certificate(#[source] rcgen::Error),
}

fn malformed(error: impl std::fmt::Display) -> RequestError {
    RequestError::Malformed(error.to_string())
}

fn der(pem: &[u8]) -> Result<CertificateSigningRequestDer<'static>, RequestError> {
    CertificateSigningRequestDer::from_pem_slice(pem).map_err(|_| RequestError::Pem)
}

fn parse(der: &[u8]) -> Result<X509CertificationRequest<'_>, RequestError> {
    let (rest, request) = X509CertificationRequest::from_der(der).map_err(malformed)?;
    if !rest.is_empty() {
        return Err(malformed("bytes follow the request"));
    }
    request
        .verify_signature()
        .map_err(|e| RequestError::Signature(e.to_string()))?;
    Ok(request)
}

/// Reads a request in PEM and checks that it is signed with its own key.
pub fn read(pem: &[u8]) -> Result<CertificateRequest, RequestError> {
    facts(&parse(&der(pem)?)?)
}

fn facts(request: &X509CertificationRequest<'_>) -> Result<CertificateRequest, RequestError> {
    let subject = &request.certification_request_info.subject;
    let text = |a: &x509_parser::x509::AttributeTypeAndValue<'_>| a.as_str().map(str::to_owned).map_err(malformed);
    let mut facts = CertificateRequest::default();
    if let Some(name) = subject.iter_common_name().next() {
        facts.common_name = text(name)?;
    }
    for organization in subject.iter_organization() {
        facts.organizations.push(text(organization)?);
    }
    for extension in request.requested_extensions().into_iter().flatten() {
        let ParsedExtension::SubjectAlternativeName(names) = extension else {
            continue;
        };
        for name in &names.general_names {
            match name {
                GeneralName::DNSName(name) => facts.dns_names.push((*name).to_owned()),
                GeneralName::RFC822Name(name) => facts.emails.push((*name).to_owned()),
                GeneralName::URI(name) => facts.uris.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => facts.ip_addresses.push(match bytes.len() {
                    4 => IpAddr::from(<[u8; 4]>::try_from(*bytes).map_err(malformed)?),
                    16 => IpAddr::from(<[u8; 16]>::try_from(*bytes).map_err(malformed)?),
                    _ => return Err(malformed("an IP address of neither 4 nor 16 bytes")),
                }),
                other => return Err(malformed(format!("a subject alternative name of kind {other:?}"))),
            }
        }
    }
    Ok(facts)
}

/// Signs a request in PEM with the cluster's CA: its subject and names, the given usages, valid from now for `ttl` or until
/// the CA ends. Returns PEM.
pub fn sign(
    pem: &[u8],
    usages: &[String],
    ttl: Duration,
    ca_pem: &str,
    issuer: &Issuer<'static, KeyPair>,
    clock: &dyn Clock,
) -> Result<String, RequestError> {
    let der = der(pem)?;
    let request = parse(&der)?;
    let facts = facts(&request)?;
    let info = &request.certification_request_info;
    let key = SubjectPublicKeyInfo::from_der(info.subject_pki.raw).map_err(RequestError::Certificate)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = subject(&info.subject)?;
    params.subject_alt_names = names(&facts)?;
    for usage in usages {
        add_usage(&mut params, usage)?;
    }
    let now: SystemTime = clock.now();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + ttl).min(ca_end(ca_pem)?).into();
    // A certificate of a signer never signs others.
    params.custom_extensions = vec![not_an_authority()];
    let certificate = params.signed_by(&key, issuer).map_err(RequestError::Certificate)?;
    Ok(certificate.pem())
}

fn not_an_authority() -> CustomExtension {
    // basicConstraints (RFC 5280, 4.2.1.9) with an empty sequence: no authority.
    let mut extension = CustomExtension::from_oid_content(&[2, 5, 29, 19], vec![0x30, 0x00]);
    extension.set_criticality(true);
    extension
}

fn ca_end(ca_pem: &str) -> Result<SystemTime, RequestError> {
    let der = CertificateDer::from_pem_slice(ca_pem.as_bytes()).map_err(malformed)?;
    let (_, ca) = X509Certificate::from_der(&der).map_err(malformed)?;
    let seconds = u64::try_from(ca.validity().not_after.timestamp()).unwrap_or_default();
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

fn subject(given: &x509_parser::x509::X509Name<'_>) -> Result<DistinguishedName, RequestError> {
    let mut name = DistinguishedName::new();
    // The builder keeps one value per attribute; the second spelling of the same OID carries a second group.
    let groups = [DnType::OrganizationName, DnType::CustomDnType(vec![2, 5, 4, 10])];
    let mut seen = 0;
    let total = given.iter_organization().count();
    if total > groups.len() {
        return Err(RequestError::Groups(total));
    }
    for attribute in given.iter_attributes() {
        let kind = match attribute.attr_type().to_id_string().as_str() {
            "2.5.4.3" => DnType::CommonName,
            "2.5.4.6" => DnType::CountryName,
            "2.5.4.7" => DnType::LocalityName,
            "2.5.4.8" => DnType::StateOrProvinceName,
            "2.5.4.11" => DnType::OrganizationalUnitName,
            "2.5.4.10" => {
                seen += 1;
                groups[seen - 1].clone()
            }
            other => return Err(RequestError::Attribute(other.to_owned())),
        };
        name.push(kind, attribute.as_str().map_err(malformed)?);
    }
    Ok(name)
}

fn names(facts: &CertificateRequest) -> Result<Vec<SanType>, RequestError> {
    let mut names: Vec<SanType> = facts.ip_addresses.iter().map(|ip| SanType::IpAddress(*ip)).collect();
    let bad = |name: &String| RequestError::Name(name.clone());
    for name in &facts.dns_names {
        names.push(SanType::DnsName(name.as_str().try_into().map_err(|_| bad(name))?));
    }
    for name in &facts.emails {
        names.push(SanType::Rfc822Name(name.as_str().try_into().map_err(|_| bad(name))?));
    }
    for name in &facts.uris {
        names.push(SanType::URI(name.as_str().try_into().map_err(|_| bad(name))?));
    }
    Ok(names)
}

fn add_usage(params: &mut CertificateParams, usage: &str) -> Result<(), RequestError> {
    let key = match usage {
        "signing" | "digital signature" => KeyUsagePurpose::DigitalSignature,
        "content commitment" => KeyUsagePurpose::ContentCommitment,
        "key encipherment" => KeyUsagePurpose::KeyEncipherment,
        "key agreement" => KeyUsagePurpose::KeyAgreement,
        "data encipherment" => KeyUsagePurpose::DataEncipherment,
        "encipher only" => KeyUsagePurpose::EncipherOnly,
        "decipher only" => KeyUsagePurpose::DecipherOnly,
        other => {
            let purpose = match other {
                "any" => ExtendedKeyUsagePurpose::Any,
                "server auth" => ExtendedKeyUsagePurpose::ServerAuth,
                "client auth" => ExtendedKeyUsagePurpose::ClientAuth,
                "code signing" => ExtendedKeyUsagePurpose::CodeSigning,
                "email protection" | "s/mime" => ExtendedKeyUsagePurpose::EmailProtection,
                "timestamping" => ExtendedKeyUsagePurpose::TimeStamping,
                "ocsp signing" => ExtendedKeyUsagePurpose::OcspSigning,
                _ => return Err(RequestError::Usage(other.to_owned())),
            };
            params.extended_key_usages.push(purpose);
            return Ok(());
        }
    };
    params.key_usages.push(key);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(change: impl FnOnce(&mut CertificateParams)) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "system:node:n1");
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
        change(&mut params);
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        params.serialize_request(&key).unwrap().pem().unwrap()
    }

    #[test]
    fn requests_are_read_and_damaged_ones_refused() {
        let pem = request(|p| {
            p.subject_alt_names = vec![
                SanType::DnsName("n1".try_into().unwrap()),
                SanType::IpAddress("10.0.0.1".parse().unwrap()),
            ];
        });
        let facts = read(pem.as_bytes()).unwrap();
        assert_eq!(
            (facts.common_name.as_str(), facts.organizations.len()),
            ("system:node:n1", 1)
        );
        assert_eq!(facts.dns_names, ["n1"]);
        assert_eq!(facts.ip_addresses, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert!(matches!(read(b"nonsense"), Err(RequestError::Pem)));
        // Another body under the same signature.
        let mut bytes = der(pem.as_bytes()).unwrap().to_vec();
        let at = bytes.windows(2).position(|w| w == b"n1").unwrap();
        bytes[at] = b'm';
        assert!(matches!(parse(&bytes), Err(RequestError::Signature(_))));
        bytes.truncate(40);
        assert!(matches!(parse(&bytes), Err(RequestError::Malformed(_))));
    }
}

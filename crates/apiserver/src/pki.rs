//! A cluster's keys: its certificate authority, the API server's own certificates, and the key that signs tokens.
//!
//! `ca.crt`, `ca.key`, `sa.key` and `secrets.key` live in the cluster's directory, mode 0600 in a directory of mode 0700. Everything else
//! is issued anew at each start, so that names follow the configuration.

use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use stdx::Clock;

use crate::admission::ServiceRange;
use crate::auth::jwt::{SigningKey, TokenError};
use crate::certificates::{self, RequestError};
use crate::cluster::ClusterConfig;
use crate::seal::{SealError, Sealer};

/// File of the key that seals secrets.
const SEAL_KEY: &str = "secrets.key";
const CA_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const SERVING_TTL: Duration = Duration::from_secs(365 * 24 * 3600);
/// Certificates are valid from a little earlier, for clients whose clocks are behind.
const BACKDATE: Duration = Duration::from_secs(300);

/// Why keys cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{action} {path:?} failed")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{what} failed")]
    Certificate { what: &'static str, source: rcgen::Error },
    #[error("the {what} on disk cannot be used")]
    Pem {
        what: &'static str,
        source: rustls_pki_types::pem::Error,
    },
    #[error("the key for secrets cannot be used")]
    Seal(#[source] SealError),
    #[error("the token key on disk cannot be used")]
    Token(#[source] TokenError),
    #[error("a certificate carries at most {max} groups, not {given}")]
    TooManyGroups { given: usize, max: usize },
    #[error("setting up TLS failed: {reason}")]
    Tls { reason: String },
}

/// Keys and certificates of one cluster.
pub struct Pki {
    pub ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
    pub tokens: SigningKey,
    /// Encrypts secrets in the store.
    pub sealer: Arc<Sealer>,
    /// For listeners: asks clients for certificates of this CA, takes connections without one.
    pub server: Arc<rustls::ServerConfig>,
    /// For connections to kubelets: presents the kubelet client certificate, trusts this CA.
    pub kubelet_client: Arc<rustls::ClientConfig>,
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn tls(error: impl std::fmt::Display) -> PkiError {
    PkiError::Tls {
        reason: error.to_string(),
    }
}

impl Pki {
    /// Reads the keys in `dir`, making what is missing, and issues the server's certificates. Blocks.
    pub fn open(
        dir: &Path,
        keys_dir: Option<&Path>,
        config: &ClusterConfig,
        services: ServiceRange,
        clock: &dyn Clock,
    ) -> Result<Self, PkiError> {
        let io = |action| {
            move |source| PkiError::Io {
                action,
                path: dir.to_owned(),
                source,
            }
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(io("creating"))?;
        let ca_key = key_file(&dir.join("ca.key"))?;
        let sa_key = key_file(&dir.join("sa.key"))?;
        let sealer = match keys_dir {
            None => seal_key(&dir.join(SEAL_KEY))?,
            Some(keys) => {
                fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(keys)
                    .map_err(io("creating"))?;
                move_key(&dir.join(SEAL_KEY), &keys.join(SEAL_KEY))?;
                seal_key(&keys.join(SEAL_KEY))?
            }
        };
        let certificate = dir.join("ca.crt");
        let ca_pem = match fs::read_to_string(&certificate) {
            Ok(pem) => pem,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let pem = authority(&config.name, &ca_key, clock)?;
                write_new(&certificate, pem.as_bytes())?;
                pem
            }
            Err(source) => {
                return Err(PkiError::Io {
                    action: "reading",
                    path: certificate,
                    source,
                });
            }
        };
        let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key).map_err(|source| PkiError::Certificate {
            what: "reading the CA certificate",
            source,
        })?;
        let tokens = SigningKey::from_pkcs8(sa_key.serialized_der()).map_err(PkiError::Token)?;

        let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes()).map_err(|source| PkiError::Pem {
            what: "CA certificate",
            source,
        })?;
        let mut roots = RootCertStore::empty();
        roots.add(ca).map_err(tls)?;
        let roots = Arc::new(roots);

        let sans = server_names(config, services);
        let (certificate, key) = issue(
            &issuer,
            "kube-apiserver",
            &[],
            &sans,
            SERVING_TTL,
            ExtendedKeyUsagePurpose::ServerAuth,
            clock,
        )?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .allow_unauthenticated()
            .build()
            .map_err(tls)?;
        let (chain, key) = identity(&certificate, &key)?;
        let mut server = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(tls)?;
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];

        let (certificate, key) = issue(
            &issuer,
            "kube-apiserver-kubelet-client",
            &[crate::auth::MASTERS],
            &[],
            SERVING_TTL,
            ExtendedKeyUsagePurpose::ClientAuth,
            clock,
        )?;
        let (chain, key) = identity(&certificate, &key)?;
        let kubelet_client = rustls::ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(tls)?;
        Ok(Pki {
            ca_pem,
            issuer,
            tokens,
            sealer: Arc::new(sealer),
            server: Arc::new(server),
            kubelet_client: Arc::new(kubelet_client),
        })
    }

    /// A client certificate: `(certificate, key)`, PEM.
    pub fn issue_client(
        &self,
        user: &str,
        groups: &[&str],
        ttl: Duration,
        clock: &dyn Clock,
    ) -> Result<(String, String), PkiError> {
        issue(
            &self.issuer,
            user,
            groups,
            &[],
            ttl,
            ExtendedKeyUsagePurpose::ClientAuth,
            clock,
        )
    }

    /// Signs a request in PEM (see [`crate::certificates::sign`]).
    pub fn sign_request(
        &self,
        pem: &[u8],
        usages: &[String],
        ttl: Duration,
        clock: &dyn Clock,
    ) -> Result<String, RequestError> {
        certificates::sign(pem, usages, ttl, &self.ca_pem, &self.issuer, clock)
    }

    /// A serving certificate: `(certificate, key)`, PEM.
    pub fn issue_serving(
        &self,
        cn: &str,
        organizations: &[&str],
        sans: &[String],
        ttl: Duration,
        clock: &dyn Clock,
    ) -> Result<(String, String), PkiError> {
        issue(
            &self.issuer,
            cn,
            organizations,
            sans,
            ttl,
            ExtendedKeyUsagePurpose::ServerAuth,
            clock,
        )
    }
}

fn server_names(config: &ClusterConfig, services: ServiceRange) -> Vec<String> {
    let mut sans: Vec<String> = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
        "127.0.0.1",
        "::1",
    ]
    .map(str::to_owned)
    .to_vec();
    sans.extend(services.nth(1).map(|ip: Ipv4Addr| ip.to_string()));
    sans.push(config.server_host().0.trim_matches(['[', ']']).to_owned());
    sans.extend(config.advertise.map(|a| a.ip().to_string()));
    sans.extend(config.cert_sans.iter().cloned());
    sans.retain(|s| !s.is_empty());
    sans.sort();
    sans.dedup();
    sans
}

fn identity(certificate: &str, key: &str) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), PkiError> {
    let pem = |what| move |source| PkiError::Pem { what, source };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(pem("new key"))?;
    Ok((chain.map_err(pem("new certificate"))?, key))
}

fn authority(cluster: &str, key: &KeyPair, clock: &dyn Clock) -> Result<String, PkiError> {
    let what = "making the CA certificate";
    let mut params = params(&format!("{cluster}-ca"), &[], &[], CA_TTL, clock)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    Ok(params
        .self_signed(key)
        .map_err(|source| PkiError::Certificate { what, source })?
        .pem())
}

fn issue(
    issuer: &Issuer<'static, KeyPair>,
    cn: &str,
    organizations: &[&str],
    sans: &[String],
    ttl: Duration,
    usage: ExtendedKeyUsagePurpose,
    clock: &dyn Clock,
) -> Result<(String, String), PkiError> {
    let failed = |source| PkiError::Certificate {
        what: "issuing a certificate",
        source,
    };
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = params(cn, organizations, sans, ttl, clock)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    let certificate = params.signed_by(&key, issuer).map_err(failed)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn params(
    cn: &str,
    organizations: &[&str],
    sans: &[String],
    ttl: Duration,
    clock: &dyn Clock,
) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    // The builder keeps one value per attribute; the second spelling of the same OID carries a second group.
    let kinds = [DnType::OrganizationName, DnType::CustomDnType(vec![2, 5, 4, 10])];
    if organizations.len() > kinds.len() {
        return Err(PkiError::TooManyGroups {
            given: organizations.len(),
            max: kinds.len(),
        });
    }
    for (kind, organization) in kinds.into_iter().zip(organizations) {
        name.push(kind, *organization);
    }
    name.push(DnType::CommonName, cn);
    params.distinguished_name = name;
    for san in sans {
        params.subject_alt_names.push(match san.parse::<IpAddr>() {
            Ok(ip) => SanType::IpAddress(ip),
            Err(_) => SanType::DnsName(san.as_str().try_into().map_err(|source| PkiError::Certificate {
                what: "reading a certificate name",
                source,
            })?),
        });
    }
    let now: SystemTime = clock.now();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + ttl).into();
    Ok(params)
}

/// Reads the key, or makes it.
fn key_file(path: &Path) -> Result<KeyPair, PkiError> {
    match fs::read_to_string(path) {
        Ok(pem) => KeyPair::from_pem(&pem).map_err(|source| PkiError::Certificate {
            what: "reading a key",
            source,
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|source| PkiError::Certificate {
                what: "making a key",
                source,
            })?;
            write_new(path, key.serialize_pem().as_bytes())?;
            Ok(key)
        }
        Err(source) => Err(PkiError::Io {
            action: "reading",
            path: path.to_owned(),
            source,
        }),
    }
}

/// Moves a key to where it shall be; nothing if it is there, or nowhere. Written whole before the old one goes.
fn move_key(from: &Path, to: &Path) -> Result<(), PkiError> {
    if to.exists() || !from.exists() {
        return Ok(());
    }
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| PkiError::Io { action, path, source }
    };
    let key = fs::read(from).map_err(io("reading", from))?;
    write_new(to, &key)?;
    fs::remove_file(from).map_err(io("removing", from))
}

/// Reads the key for secrets, or makes it.
fn seal_key(path: &Path) -> Result<Sealer, PkiError> {
    let key = match fs::read(path) {
        Ok(key) => key,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = Sealer::generate().map_err(PkiError::Seal)?.to_vec();
            write_new(path, &key)?;
            key
        }
        Err(source) => {
            return Err(PkiError::Io {
                action: "reading",
                path: path.to_owned(),
                source,
            });
        }
    };
    Sealer::new(&key).map_err(PkiError::Seal)
}

/// Writes a file whole or not at all: a temporary one, synced, then renamed.
fn write_new(path: &Path, content: &[u8]) -> Result<(), PkiError> {
    let temporary = path.with_extension("new");
    let io = |action| {
        move |source| PkiError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    };
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(io("creating"))?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(io("writing"))?;
    fs::rename(&temporary, path).map_err(io("renaming"))?;
    if let Some(dir) = path.parent() {
        fs::File::open(dir)
            .and_then(|d| d.sync_all())
            .map_err(io("syncing the directory of"))?;
    }
    Ok(())
}

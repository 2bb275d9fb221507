//! `oaks host join`: makes this machine a host of another one's platform.

use std::{
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use reconcile::{Client, HttpsConfig, Identity};
use serde_json::json;

use super::{GROUP, Invitation, Joined, USER};
use crate::{
    access::{chained, write_private},
    cli::Settings,
    keeper::{self, StartLock},
    process, up,
};

/// How long the server may take to sign.
const SIGNED_S: u64 = 30;
/// How long the identity lasts; joining again renews it.
const IDENTITY_S: i32 = 365 * 24 * 3600;

pub fn run(settings: &Settings, underlay: Ipv4Addr, token: &str) -> Result<()> {
    let steps = up::Steps::default();
    let paths = &settings.paths;
    let invitation = Invitation::parse(token)?;
    up::privileges()?;
    for name in ["server", "host"] {
        ensure!(
            process::find(paths, name).is_none(),
            "instance {} already runs here; `oaks down` first, or join as another one with --instance NAME",
            paths.instance
        );
    }
    ensure!(
        !paths.store().exists(),
        "{} holds a platform of its own; `oaks down --purge` removes it, or choose another --data-dir",
        paths.data.display()
    );
    UdpSocket::bind((underlay, 0))
        .with_context(|| format!("--underlay {underlay}: this machine has no such address (see `ip -4 addr`)"))?;
    machines::tree::Binaries::beside(&std::env::current_exe()?, settings.libexec.as_deref())?;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (certificate, key) = runtime.block_on(identity(&invitation))?;
    steps.say(&format!("{} may be a host of {}", invitation.name, invitation.server));
    let kubeconfig = kubeconfig(&invitation, &certificate, &key)?;
    write_private(&paths.host_kubeconfig(), kubeconfig.as_bytes())?;
    let joined = Joined {
        name: invitation.name.clone(),
        underlay,
        public_pool: invitation.public_pool,
    };
    write_private(&paths.joined(), &serde_json::to_vec_pretty(&joined)?)?;
    std::fs::create_dir_all(&paths.run).with_context(|| format!("creating {}", paths.run.display()))?;
    let _lock = StartLock::take(paths)?;
    keeper::allow(paths);
    let settings = Settings {
        public_pool: invitation.public_pool,
        ..settings.clone()
    };
    up::launch(&settings, "host")?;
    keeper::start(&settings)?;
    steps.say(&format!(
        "host agent ready: underlay {underlay}, uplink {}",
        settings.uplink
    ));
    println!("\nMachines are placed here from now on. `oaks status` shows them; `oaks down` takes them away.");
    Ok(())
}

/// A certificate for a key made here, which never leaves: `(certificate, key)`, PEM.
async fn identity(invitation: &Invitation) -> Result<(String, String)> {
    let home = Client::https(HttpsConfig {
        server: invitation.server.clone(),
        ca_pem: invitation.ca_pem.clone(),
        identity: Identity::Token(invitation.token.clone()),
        connector: None,
    })
    .map_err(chained)?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, GROUP);
    subject.push(DnType::CommonName, format!("{USER}{}", invitation.name));
    params.distinguished_name = subject;
    let request = params.serialize_request(&key)?.pem()?;
    let name = format!(
        "host-{}-{}",
        invitation.name,
        &uuid::Uuid::new_v4().simple().to_string()[..8]
    );
    let mut object = CertificateSigningRequest {
        spec: CertificateSigningRequestSpec {
            request: ByteString(request.into_bytes()),
            signer_name: "kubernetes.io/kube-apiserver-client".to_owned(),
            usages: Some(vec!["digital signature".to_owned(), "client auth".to_owned()]),
            expiration_seconds: Some(IDENTITY_S),
            ..Default::default()
        },
        ..Default::default()
    };
    object.metadata.name = Some(name.clone());
    home.create(None, &object).await.map_err(chained).with_context(|| {
        format!(
            "asking {} for an identity; if the token is too old, make another with `oaks host token {}`",
            invitation.server, invitation.name
        )
    })?;
    let end = Instant::now() + Duration::from_secs(SIGNED_S);
    loop {
        let now: CertificateSigningRequest = home.get(None, &name).await.map_err(chained)?;
        let status = now.status.unwrap_or_default();
        if let Some(certificate) = status.certificate {
            return Ok((String::from_utf8(certificate.0)?, key.serialize_pem()));
        }
        if let Some(no) = status.conditions.iter().flatten().find(|c| c.type_ != "Approved") {
            bail!(
                "the server refused the identity: {} {}",
                no.type_,
                no.message.as_deref().unwrap_or_default()
            );
        }
        ensure!(
            Instant::now() < end,
            "the server did not sign within {SIGNED_S} s; its log says why"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn kubeconfig(invitation: &Invitation, certificate: &str, key: &str) -> Result<String> {
    use base64::Engine as _;
    let coded = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let view = json!({"apiVersion": "v1", "kind": "Config", "current-context": "home",
        "clusters": [{"name": "home", "cluster": {"server": invitation.server, "certificate-authority-data": coded(&invitation.ca_pem)}}],
        "users": [{"name": "host", "user": {"client-certificate-data": coded(certificate), "client-key-data": coded(key)}}],
        "contexts": [{"name": "home", "context": {"cluster": "home", "user": "host"}}]});
    Ok(serde_json::to_string_pretty(&view)?)
}

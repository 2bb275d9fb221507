//! One hosted cluster: its objects, keys, resources and services.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::table::{KindDef, TypeTable};
use parking_lot::{Mutex, RwLock};
use serde_json::json;
use stdx::{Rng, SharedClock, Shutdown};
use store::Keyspace;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::admission::ServiceRange;
use crate::audit::{AuditConfig, Auditor, Log};
use crate::auth::{Rbac, UserInfo};
use crate::dialer::Dialer;
use crate::metrics::Metrics;
use crate::pki::Pki;
use crate::registry::{Registry, Resource};
use crate::served::{Api, Served};
use crate::{ApiServerConfig, Error, LocalService, auth, crds, nonresource, router, server};

/// How long issued admin credentials last.
const KUBECONFIG_TTL: Duration = Duration::from_secs(365 * 24 * 3600);

/// Short requests of one cluster at a time; more are told to come back (429).
const INFLIGHT_MAX: usize = 3000;

/// What a cluster is.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// DNS label; also the keyspace's name.
    pub name: String,
    /// Kinds served beside the built-in ones (the platform's own).
    pub extra_kinds: Vec<KindDef>,
    /// IPv4 range of ClusterIPs, `/12` to `/28`: `10.0.0.0/16`.
    pub service_cidr: String,
    /// Address in that range that automatic allocation leaves alone, for cluster DNS.
    pub dns_service_ip: Option<Ipv4Addr>,
    /// Where clients reach this API: `https://198.19.0.4:443`. Stands in kubeconfigs and as token issuer's fallback.
    pub server_url: String,
    /// Names and addresses of the serving certificate, besides the URL's host, loopback, and the `kubernetes` service.
    pub cert_sans: Vec<String>,
    /// Endpoint of the `kubernetes` service; absent: taken from `server_url` if its host is an address.
    pub advertise: Option<SocketAddr>,
    /// What is written to an audit log, and where; absent: nothing.
    pub audit: Option<AuditConfig>,
}

impl ClusterConfig {
    /// A cluster with AKS's default service range at `server_url`.
    pub fn new(name: impl Into<String>, server_url: impl Into<String>) -> Self {
        ClusterConfig {
            name: name.into(),
            extra_kinds: Vec::new(),
            service_cidr: "10.0.0.0/16".into(),
            dns_service_ip: Some(Ipv4Addr::new(10, 0, 0, 10)),
            server_url: server_url.into(),
            cert_sans: Vec::new(),
            advertise: None,
            audit: None,
        }
    }

    /// Host and port of `server_url`.
    pub fn server_host(&self) -> (&str, u16) {
        let rest = self
            .server_url
            .split_once("://")
            .map_or(self.server_url.as_str(), |(_, rest)| rest);
        let authority = rest.split('/').next().unwrap_or_default();
        match authority.rsplit_once(':') {
            Some((host, port)) if !host.ends_with(':') => (host, port.parse().unwrap_or(443)),
            _ => (authority, 443),
        }
    }

    /// Endpoint of the `kubernetes` service.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        let (host, port) = self.server_host();
        self.advertise
            .or_else(|| host.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, port)))
    }
}

pub(crate) fn check_name(name: &str) -> Result<(), Error> {
    let ok = !name.is_empty()
        && name.len() <= 63
        && !name.starts_with('-')
        && !name.ends_with('-')
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if ok {
        Ok(())
    } else {
        Err(Error::InvalidName(name.to_owned()))
    }
}

/// One hosted cluster's API.
pub struct Cluster {
    pub(crate) config: ClusterConfig,
    /// What is served now; the definitions' task alone replaces it.
    api: RwLock<Arc<Api>>,
    /// What is served without any definition.
    pub(crate) builtin: Arc<Api>,
    /// Newest revision of the definitions that `api` shows.
    pub(crate) settled: tokio::sync::watch::Sender<u64>,
    pub(crate) keyspace: Arc<dyn Keyspace>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) pki: Pki,
    pub(crate) rbac: Rbac,
    /// What nodes may read because of their pods.
    pub(crate) graph: auth::graph::Graph,
    pub(crate) metrics: Metrics,
    pub(crate) clock: SharedClock,
    pub(crate) dialer: Arc<dyn Dialer>,
    pub(crate) shutdown: Shutdown,
    pub(crate) service_range: ServiceRange,
    pub(crate) dns_service_ip: Option<Ipv4Addr>,
    pub(crate) namespaces: Arc<Resource>,
    pub(crate) service_accounts: Arc<Resource>,
    pub(crate) pods: Arc<Resource>,
    pub(crate) auditor: Option<Auditor>,
    pub(crate) quota_locks: crate::admission::quota::Locks,
    /// Slots of short requests.
    pub(crate) inflight: Semaphore,
    random: Mutex<Rng>,
}

impl Cluster {
    pub(crate) async fn open(
        server: &ApiServerConfig,
        keys_dir: Option<&std::path::Path>,
        config: ClusterConfig,
    ) -> Result<Arc<Self>, Error> {
        check_name(&config.name)?;
        let name = config.name.clone();
        let service_range = ServiceRange::parse(&config.service_cidr).ok_or_else(|| Error::InvalidConfig {
            cluster: name.clone(),
            field: "service_cidr",
            value: config.service_cidr.clone(),
            reason: "must be an IPv4 network of /12 to /28 such as 10.0.0.0/16",
        })?;
        if let Some(dns) = config.dns_service_ip
            && !service_range.contains(dns)
        {
            return Err(Error::InvalidConfig {
                cluster: name,
                field: "dns_service_ip",
                value: dns.to_string(),
                reason: "must lie in service_cidr",
            });
        }
        let (engine, clock) = (server.engine.clone(), server.clock.clone());
        let pki_dir: PathBuf = server.data_dir.join(&name).join("pki");
        let keys_dir = keys_dir.map(|dir| dir.join(&name));
        let dialer = server.dialer.clone();
        // Keys, disk and the first index are blocking work.
        let opened = tokio::task::spawn_blocking(move || {
            let store = |source| Error::Store {
                cluster: config.name.clone(),
                source,
            };
            let pki = Pki::open(&pki_dir, keys_dir.as_deref(), &config, service_range, &*clock).map_err(|source| {
                Error::Pki {
                    cluster: config.name.clone(),
                    source,
                }
            })?;
            let keyspace = engine.keyspace(&config.name).map_err(store)?;
            let registry = Registry::open(&*keyspace, pki.sealer.clone(), clock.clone()).map_err(store)?;
            let mut table = TypeTable::builtin();
            if !config.extra_kinds.is_empty() {
                table = table
                    .with_kinds(config.extra_kinds.clone())
                    .map_err(|(kind, source)| Error::Schema {
                        cluster: config.name.clone(),
                        kind: kind.to_string(),
                        source,
                    })?;
            }
            let documents = nonresource::documents(&table);
            let builtin = Arc::new(Api::new(table, &registry, documents));
            let metrics = Metrics::default();
            let auditor = match &config.audit {
                None => None,
                Some(audit) => Some(Auditor {
                    policy: audit.policy.clone(),
                    log: Log::open(audit.log.clone(), metrics.audit.clone()).map_err(|source| Error::Audit {
                        cluster: config.name.clone(),
                        path: audit.log.path.clone(),
                        source,
                    })?,
                }),
            };
            let cluster = Arc::new(Cluster {
                auditor,
                service_range,
                dns_service_ip: config.dns_service_ip,
                namespaces: registry.resource("", "namespaces"),
                service_accounts: registry.resource("", "serviceaccounts"),
                pods: registry.resource("", "pods"),
                rbac: Rbac::new(&registry),
                api: RwLock::new(builtin.clone()),
                builtin,
                settled: tokio::sync::watch::Sender::new(0),
                graph: auth::graph::Graph::new(&registry),
                metrics,
                shutdown: Shutdown::new(),
                inflight: Semaphore::new(INFLIGHT_MAX),
                quota_locks: Default::default(),
                random: Mutex::new(Rng::from_entropy()),
                config,
                keyspace,
                registry,
                pki,
                clock,
                dialer,
            });
            Ok::<_, Error>(cluster)
        });
        let cluster: Arc<Cluster> = opened.await.map_err(Error::Task)??;
        auth::bootstrap::ensure(&cluster).await.map_err(|source| Error::Store {
            cluster: cluster.config.name.clone(),
            source,
        })?;
        tokio::spawn(crate::expiry::run(Arc::downgrade(&cluster), cluster.shutdown.clone()));
        // Objects of custom kinds are served from the first request on.
        crds::begin(&cluster).await;
        Ok(cluster)
    }

    pub fn name(&self) -> &str {
        &self.config.name
    }

    pub fn config(&self) -> &ClusterConfig {
        &self.config
    }

    /// The cluster's types as they are now, its own kinds and those of definitions included.
    pub fn table(&self) -> Arc<TypeTable> {
        self.api().table.clone()
    }

    /// What is served now.
    pub(crate) fn api(&self) -> Arc<Api> {
        self.api.read().clone()
    }

    /// Puts another API in the place of the one before, which is returned.
    pub(crate) fn serve_api(&self, api: Arc<Api>) -> Arc<Api> {
        std::mem::replace(&mut *self.api.write(), api)
    }

    /// Newest revision of the cluster.
    pub fn revision(&self) -> u64 {
        self.registry.revision()
    }

    pub(crate) fn resource(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Served>> {
        self.api.read().resource(group, version, plural).cloned()
    }

    /// The API in this process with a fixed identity: no socket, no TLS; watch bodies stream. Authorization applies.
    pub fn local_service(self: &Arc<Self>, user: UserInfo) -> LocalService {
        let (cluster, user) = (self.clone(), Arc::new(user));
        LocalService::new(tower::service_fn(move |request| {
            let (cluster, user) = (cluster.clone(), user.clone());
            async move { Ok(router::handle(cluster, Some((*user).clone()), request).await) }
        }))
    }

    /// Serves the API with TLS (HTTP/1.1 and HTTP/2) until the cluster is deleted.
    pub fn serve(self: &Arc<Self>, listener: tokio::net::TcpListener) -> JoinHandle<()> {
        tokio::spawn(server::serve(self.clone(), listener))
    }

    /// The certificate authority of this cluster, PEM.
    pub fn ca_pem(&self) -> &str {
        &self.pki.ca_pem
    }

    /// A client certificate for `user` in `groups`: `(certificate, key)`, PEM.
    pub fn issue_client_cert(&self, user: &str, groups: &[&str], ttl: Duration) -> Result<(String, String), Error> {
        self.pki
            .issue_client(user, groups, ttl, &*self.clock)
            .map_err(|source| self.pki_error(source))
    }

    /// A serving certificate for `cn` with these names and addresses: `(certificate, key)`, PEM.
    pub fn issue_serving_cert(&self, cn: &str, sans: &[String], ttl: Duration) -> Result<(String, String), Error> {
        self.pki
            .issue_serving(cn, &[], sans, ttl, &*self.clock)
            .map_err(|source| self.pki_error(source))
    }

    /// What a certificate signing request in PEM asks for; checks that it is signed with its own key.
    pub fn read_certificate_request(pem: &[u8]) -> Result<crate::CertificateRequest, Error> {
        Ok(crate::certificates::read(pem)?)
    }

    /// Signs a request in PEM with this cluster's CA. Whether it should be signed is the caller's to decide. Returns PEM.
    pub fn sign_certificate_request(&self, pem: &[u8], usages: &[String], ttl: Duration) -> Result<String, Error> {
        Ok(self.pki.sign_request(pem, usages, ttl, &*self.clock)?)
    }

    fn pki_error(&self, source: crate::pki::PkiError) -> Error {
        Error::Pki {
            cluster: self.config.name.clone(),
            source,
        }
    }

    /// A kubeconfig with a fresh client certificate, valid for a year.
    pub fn kubeconfig(&self, context: &str, user: &str, groups: &[&str]) -> Result<String, Error> {
        use base64::Engine as _;
        let b64 = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let (certificate, key) = self.issue_client_cert(user, groups, KUBECONFIG_TTL)?;
        let account = format!("{context}-{}", user.replace(':', "-"));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": context, "preferences": {},
            "clusters": [{"name": context, "cluster": {
                "server": self.config.server_url, "certificate-authority-data": b64(self.ca_pem())}}],
            "contexts": [{"name": context, "context": {"cluster": context, "user": account}}],
            "users": [{"name": account, "user": {
                "client-certificate-data": b64(&certificate), "client-key-data": b64(&key)}}],
        });
        Ok(apimachinery::codec::to_yaml(&config))
    }

    /// Ends watches and listeners. The stored state stays.
    pub fn stop(&self) {
        self.shutdown.trigger();
    }

    pub(crate) fn random_below(&self, bound: u64) -> u64 {
        self.random.lock().below(bound)
    }

    pub(crate) fn random_suffix(&self, length: usize) -> String {
        self.random.lock().name_suffix(length)
    }

    pub(crate) fn new_uid(&self) -> String {
        uuid::Uuid::new_v4().to_string()
    }
}

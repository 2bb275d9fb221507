//! The Kubernetes API server: HTTP, authn/authz, registries, discovery; many clusters in one process.
//!
//! A request goes: [`server`] (TLS, connection) or [`Cluster::local_service`] (in process) -> [`router`] (who, what,
//! may they) -> [`handlers`] (verbs) -> [`admission`] and [`strategy`] (trees, writes only) -> the store. Reads never
//! leave memory: the store's committer keeps [`registry`] up to date before a writer is answered. Objects are bytes
//! ([`object`]); they are parsed for writes and for table cells only.
//!
//! Every hosted cluster has its own CA, token key, keyspace, RBAC and service addresses; nothing is shared but the
//! process, the type table and the store's committer.

mod admission;
pub mod audit;
mod auth;
mod certificates;
mod cluster;
mod crds;
mod dialer;
mod events;
mod expiry;
mod fields;
mod handlers;
mod metrics;
mod negotiate;
mod nonresource;
mod object;
mod pki;
mod registry;
mod request;
mod respond;
mod router;
mod seal;
mod served;
mod server;
mod strategy;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use stdx::SharedClock;
use store::Engine;

pub use auth::UserInfo;
pub use certificates::{CertificateRequest, RequestError};
pub use cluster::{Cluster, ClusterConfig};
pub use dialer::{DialTarget, Dialer, NoDialer, Stream, TcpDialer};
pub use pki::PkiError;

/// Any error, boxed.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A request or response body.
pub type Body = http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, BoxError>;
/// The API of one cluster as a service in this process.
pub type LocalService = tower::util::BoxCloneSyncService<http::Request<Body>, http::Response<Body>, BoxError>;

/// What an API server needs from its process.
pub struct ApiServerConfig {
    pub engine: Arc<dyn Engine>,
    /// Opens connections to nodes and pods for logs, exec and attach.
    pub dialer: Arc<dyn Dialer>,
    /// Keys and certificates live below `<data_dir>/<cluster>/pki`, readable by the owner only.
    pub data_dir: PathBuf,
    pub clock: SharedClock,
}

/// Why a cluster cannot be created, opened or deleted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("invalid cluster name {0:?}: must consist of lower case letters, digits and '-', at most 63")]
    InvalidName(String),
    #[error("invalid {field} {value:?} of cluster {cluster:?}: {reason}")]
    InvalidConfig {
        cluster: String,
        field: &'static str,
        value: String,
        reason: &'static str,
    },
    #[error("opening the keys of cluster {cluster:?} failed")]
    Pki { cluster: String, source: PkiError },
    #[error("the certificate signing request cannot be signed")]
    Request(#[from] RequestError),
    #[error("opening the objects of cluster {cluster:?} failed")]
    Store { cluster: String, source: store::Error },
    #[error("the schema of {kind} in cluster {cluster:?} cannot be used")]
    Schema {
        cluster: String,
        kind: String,
        source: apimachinery::structural::CompileError,
    },
    #[error("removing {path:?} failed")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("opening the audit log {path:?} of cluster {cluster:?} failed")]
    Audit {
        cluster: String,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("a task of the API server failed")]
    Task(#[source] tokio::task::JoinError),
}

/// The API servers of all clusters of a process.
pub struct ApiServer {
    config: ApiServerConfig,
    /// Where the keys that seal secrets live, a folder per cluster; absent: with the other keys.
    keys_dir: Option<PathBuf>,
    clusters: Mutex<BTreeMap<String, Arc<Cluster>>>,
    /// Serializes creation and deletion, so that a name is opened once.
    opening: tokio::sync::Mutex<()>,
}

impl ApiServer {
    pub fn new(config: ApiServerConfig) -> Arc<Self> {
        Self::build(config, None)
    }

    /// As [`ApiServer::new`], with the keys that seal secrets below `<keys_dir>/<cluster>` instead of the data directory: who
    /// copies the one has not the other. A key that still lies in the data directory is moved.
    pub fn with_keys(config: ApiServerConfig, keys_dir: PathBuf) -> Arc<Self> {
        Self::build(config, Some(keys_dir))
    }

    fn build(config: ApiServerConfig, keys_dir: Option<PathBuf>) -> Arc<Self> {
        Arc::new(ApiServer {
            config,
            keys_dir,
            clusters: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
        })
    }

    /// Creates the cluster, or opens what is on disk. Idempotent: a cluster that is open is returned as it is.
    ///
    /// # Errors
    /// `InvalidName`, `InvalidConfig`, and what disk and keys say.
    pub async fn create_cluster(&self, config: ClusterConfig) -> Result<Arc<Cluster>, Error> {
        let _opening = self.opening.lock().await;
        if let Some(open) = self.cluster(&config.name) {
            return Ok(open);
        }
        let name = config.name.clone();
        let cluster = Cluster::open(&self.config, self.keys_dir.as_deref(), config).await?;
        self.clusters.lock().insert(name, cluster.clone());
        Ok(cluster)
    }

    pub fn cluster(&self, name: &str) -> Option<Arc<Cluster>> {
        self.clusters.lock().get(name).cloned()
    }

    /// All open clusters by name.
    pub fn clusters(&self) -> Vec<Arc<Cluster>> {
        self.clusters.lock().values().cloned().collect()
    }

    /// Ends the cluster's watches and listeners and unloads it; what it stored stays, and [`ApiServer::create_cluster`]
    /// opens it again.
    pub async fn close_cluster(&self, name: &str) {
        let _opening = self.opening.lock().await;
        if let Some(cluster) = self.clusters.lock().remove(name) {
            cluster.shutdown.trigger();
        }
    }

    /// Ends the cluster's watches and listeners and deletes everything it stored. Succeeds when there is none.
    pub async fn delete_cluster(&self, name: &str) -> Result<(), Error> {
        let _opening = self.opening.lock().await;
        cluster::check_name(name)?;
        if let Some(cluster) = self.clusters.lock().remove(name) {
            cluster.shutdown.trigger();
        }
        let store = |source| Error::Store {
            cluster: name.to_owned(),
            source,
        };
        self.config.engine.drop_keyspace(name).await.map_err(store)?;
        // The key first: what is left of a deletion that was cut short cannot be read.
        let keys = self.keys_dir.iter().map(|dir| dir.join(name));
        for path in keys.chain([self.config.data_dir.join(name)]) {
            match tokio::fs::remove_dir_all(&path).await {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(Error::Io { path, source }),
                _ => {}
            }
        }
        Ok(())
    }
}

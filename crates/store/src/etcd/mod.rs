//! The etcd engine: keyspaces of several processes in one etcd (3.4 or newer).
//!
//! Below `prefix`: `n/<name>` says that a keyspace exists; `s/<name>/m` is its mark, rewritten by every transaction;
//! `s/<name>/d<key>` are its entries. The mark does four jobs: its creation revision tells a keyspace from a later one
//! of the same name, its modification revision is the keyspace's newest revision (so that a linearizable read of one
//! key tells how far a process is behind, deletions included), its value names the writer (so that a process finds the
//! attachments of its own transactions again), and its deletion tells every process that the keyspace is gone.
//!
//! Each keyspace has one watch ([`pump`]) that feeds observer and history in etcd's order, own writes included; a
//! writer is answered when its transaction has come back. Revisions are etcd's: one counter for all keyspaces.
//!
//! The calls to etcd run on a runtime of the engine's own, so that `keyspace` and `range` may block any thread.

mod client;
mod keyspace;
mod pump;
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use self::client::{Client, failed};
use self::keyspace::EtcdKeyspace;
use self::wire::{RangeRequest, TxnRequest};
use crate::{Engine, Error, Keyspace, check_name};

/// Operations that a transaction may have: etcd's default `--max-txn-ops` of 128 less the mark.
pub const ETCD_TXN_OPS_MAX: usize = 127;

/// Where etcd is.
#[derive(Clone, Debug, Default)]
pub struct EtcdConfig {
    /// `http://127.0.0.1:2379`; several are the members of one cluster.
    pub endpoints: Vec<String>,
    /// What all keys start with, such as `/oaks/`. Two platforms on one etcd need different ones.
    pub prefix: String,
    /// For `https` endpoints.
    pub tls: Option<EtcdTls>,
}

#[derive(Clone)]
pub struct EtcdTls {
    pub ca_pem: Vec<u8>,
    /// Client certificate and key.
    pub identity_pem: Option<(Vec<u8>, Vec<u8>)>,
}

impl std::fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdTls")
            .field("identity", &self.identity_pem.is_some())
            .finish_non_exhaustive()
    }
}

/// Engine over an etcd that other processes may use at the same time.
pub struct EtcdEngine {
    client: Client,
    prefix: String,
    /// Tells this process's transactions from those of others.
    writer: u64,
    open: Mutex<BTreeMap<String, Arc<EtcdKeyspace>>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl EtcdEngine {
    /// Connects and reads once, to fail early. Blocks. `writer` is drawn by the caller, differently by every process.
    ///
    /// # Errors
    /// `Io` when no endpoint answers within 8 s, or when certificate or URL are malformed.
    pub fn open(config: &EtcdConfig, writer: u64) -> Result<Arc<Self>, Error> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("store-etcd")
            .enable_all()
            .build()
            .map_err(|e| failed("starting the runtime of", Box::new(e)))?;
        let connected = {
            let _inside = runtime.enter();
            Client::new(config)
        };
        let client = match connected {
            Ok(client) => client,
            Err(error) => {
                runtime.shutdown_background();
                return Err(error);
            }
        };
        let engine = Arc::new(Self {
            client,
            prefix: config.prefix.clone(),
            writer,
            open: Mutex::default(),
            runtime: Some(runtime),
        });
        engine.names()?;
        Ok(engine)
    }

    fn runtime(&self) -> &tokio::runtime::Handle {
        // It is taken by `drop` alone.
        self.runtime
            .as_ref()
            .expect("the runtime lives as long as the engine")
            .handle()
    }

    fn names(&self) -> Result<Vec<String>, Error> {
        let (client, key) = (self.client.clone(), Bytes::from(format!("{}n/", self.prefix)));
        let skip = key.len();
        block_on(self.runtime(), async move {
            let request = RangeRequest {
                range_end: prefix_end(&key),
                key,
                keys_only: true,
                ..RangeRequest::default()
            };
            let found = client.range(request).await?;
            let name = |kv: &wire::KeyValue| String::from_utf8_lossy(&kv.key[skip..]).into_owned();
            Ok(found.kvs.iter().map(name).collect())
        })
    }
}

impl Drop for EtcdEngine {
    fn drop(&mut self) {
        // A runtime may not be dropped where another one runs; its tasks hold nothing that needs an end.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[async_trait]
impl Engine for EtcdEngine {
    fn keyspace(&self, name: &str) -> Result<Arc<dyn Keyspace>, Error> {
        check_name(name)?;
        let mut open = self.open.lock();
        if let Some(keyspace) = open.get(name)
            && !keyspace.is_dropped()
        {
            return Ok(keyspace.clone());
        }
        let opening = EtcdKeyspace::open(
            self.client.clone(),
            self.runtime().clone(),
            &self.prefix,
            name,
            self.writer,
        );
        let keyspace = block_on(self.runtime(), opening)?;
        open.insert(name.to_owned(), keyspace.clone());
        Ok(keyspace)
    }

    async fn drop_keyspace(&self, name: &str) -> Result<(), Error> {
        check_name(name)?;
        if let Some(keyspace) = self.open.lock().remove(name) {
            keyspace.mark_dropped();
        }
        let data = keyspace::data_prefix(&self.prefix, name);
        let request = TxnRequest {
            compare: Vec::new(),
            success: vec![
                wire::delete(data.clone(), prefix_end(&data)),
                wire::delete(keyspace::index_key(&self.prefix, name), Bytes::new()),
            ],
            failure: Vec::new(),
        };
        let client = self.client.clone();
        let dropping = self
            .runtime()
            .spawn(async move { client.idempotent_txn(request).await });
        dropping.await.map_err(|_| Error::Closed)?.map(drop)
    }

    /// Empty when etcd cannot be reached; the reason is logged.
    fn list_keyspaces(&self) -> Vec<String> {
        self.names().unwrap_or_else(|error| {
            tracing::error!(%error, "listing the keyspaces in etcd failed");
            Vec::new()
        })
    }
}

/// Runs `work` on `runtime` and blocks this thread for it, wherever it runs.
fn block_on<T: Send + 'static>(
    runtime: &tokio::runtime::Handle,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    let (done, answer) = std::sync::mpsc::sync_channel(1);
    runtime.spawn(async move {
        let _ = done.send(work.await);
    });
    answer.recv().map_err(|_| Error::Closed)?
}

/// The first key after all that start with `prefix`; a prefix ends in ASCII here.
fn prefix_end(prefix: &Bytes) -> Bytes {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end.into()
}

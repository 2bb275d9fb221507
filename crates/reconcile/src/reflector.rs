//! Keeps a [`Store`] equal to the server: list, watch from there, resume where a watch ended, list again on 410.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::Method;
use http_body_util::BodyExt;
use serde::Deserialize;
use serde_json::value::RawValue;
use stdx::{Backoff, BackoffPolicy, Rng, Shutdown};
use tokio::sync::watch;

use crate::client::NONE;
use crate::resource::query;
use crate::store::{Entry, Store};
use crate::{ApiStatus, Body, Client, Error, ErrorKind, ResourceId};

/// What the server is asked to end a watch after. Short enough that a silently dead one is noticed.
const WATCH_S: u64 = 300;
/// A watch that outlives its own deadline by this much is dead.
const WATCH_GRACE: Duration = Duration::from_secs(30);
/// A watch that lasted this long worked.
const LASTED: Duration = Duration::from_secs(5);
/// Largest single watch frame.
const FRAME_BYTES_MAX: usize = 16 << 20;
/// Delay between failures.
const RETRY: BackoffPolicy = BackoffPolicy::doubling(Duration::from_millis(50), Duration::from_secs(10));

/// A part of a resource.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Selection {
    /// One namespace; empty for all.
    pub namespace: String,
    /// Label selector, query form.
    pub labels: String,
    /// Field selector.
    pub fields: String,
}

/// One list-and-watch.
pub(crate) struct Reflector {
    pub client: Client,
    pub resource: ResourceId,
    pub selection: Selection,
    pub store: Arc<Store>,
    /// Number of completed lists; above 0 the store has been complete once.
    pub synced: watch::Sender<u64>,
}

#[derive(Deserialize)]
struct RawList<'a> {
    metadata: RawListMeta,
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawListMeta {
    resource_version: String,
}

#[derive(Deserialize)]
struct Frame<'a> {
    r#type: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Bookmark {
    metadata: RawListMeta,
}

/// How a watch ended.
enum Ended {
    /// The server closed it: go on from the last version.
    Closed,
    /// The version is too old: list again.
    Expired,
}

impl Reflector {
    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: Shutdown) {
        // Cancel safety: dropping the loop drops the open watch; the store stays as it is.
        shutdown.or_stop(self.follow()).await;
        self.store.clear_handlers();
    }

    async fn follow(&self) {
        let mut rng = Rng::from_entropy();
        let mut backoff = Backoff::new(RETRY);
        loop {
            let mut version = match self.list().await {
                Ok(version) => version,
                Err(error) => {
                    self.report(&error, "list failed");
                    tokio::time::sleep(backoff.next(&mut rng)).await;
                    continue;
                }
            };
            self.synced.send_modify(|n| *n += 1);
            loop {
                let before = version.clone();
                let opened = tokio::time::Instant::now();
                let outcome = self.watch(&mut version).await;
                // Neither a watch that brought something nor one that lasted is a failure to back off from.
                let useful = version != before || opened.elapsed() > LASTED;
                if useful {
                    backoff.reset();
                }
                match outcome {
                    Ok(Ended::Closed) => {
                        // A server that closes watches at once must not be hammered.
                        if !useful {
                            tokio::time::sleep(backoff.next(&mut rng)).await;
                        }
                    }
                    Ok(Ended::Expired) => {
                        tracing::debug!(resource = %self.resource, rv = version, "version expired, listing again");
                        break;
                    }
                    Err(error) => {
                        self.report(&error, "watch failed");
                        tokio::time::sleep(backoff.next(&mut rng)).await;
                    }
                }
            }
        }
    }

    fn report(&self, error: &Error, what: &'static str) {
        tracing::warn!(resource = %self.resource, error = %stdx::chain(error), what);
    }

    fn path(&self, extra: &[(&str, &str)]) -> String {
        let selectors = [
            ("labelSelector", self.selection.labels.as_str()),
            ("fieldSelector", &self.selection.fields),
        ];
        self.resource.path(Some(&self.selection.namespace), None, None)
            + &query(selectors.into_iter().chain(extra.iter().copied()))
    }

    /// Fills the store; returns the version to watch from.
    async fn list(&self) -> Result<String, Error> {
        let path = self.path(&[]);
        let bytes = self.client.call_bytes(Method::GET, &path, None, NONE).await?;
        let decode = |e| Error::new(format!("GET {path}"), ErrorKind::Decode(e));
        let list: RawList<'_> = serde_json::from_slice(&bytes).map_err(decode)?;
        let items = list.items.unwrap_or_default();
        let entries = items
            .iter()
            .map(|item| Entry::parse(Bytes::copy_from_slice(item.get().as_bytes())))
            .collect::<Result<Vec<_>, _>>()
            .map_err(decode)?;
        self.store.replace(entries);
        self.store.reached(&list.metadata.resource_version);
        Ok(list.metadata.resource_version)
    }

    /// Follows one watch to its end, moving `version` along.
    async fn watch(&self, version: &mut String) -> Result<Ended, Error> {
        let seconds = WATCH_S.to_string();
        let path = self.path(&[
            ("watch", "1"),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", &seconds),
            ("resourceVersion", version),
        ]);
        let body = match self.client.stream(&path).await {
            Ok(body) => body,
            Err(error) if error.is_gone() => return Ok(Ended::Expired),
            Err(error) => return Err(error),
        };
        let operation = format!("GET {path}");
        let mut lines = Lines::new(body);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(WATCH_S) + WATCH_GRACE;
        loop {
            let line = match tokio::time::timeout_at(deadline, lines.next()).await {
                Err(_) => return Ok(Ended::Closed),
                Ok(Ok(None)) => return Ok(Ended::Closed),
                Ok(Ok(Some(line))) => line,
                Ok(Err(kind)) => return Err(Error::new(operation.as_str(), kind)),
            };
            let decode = |e| Error::new(operation.as_str(), ErrorKind::Decode(e));
            let frame: Frame<'_> = serde_json::from_slice(&line).map_err(decode)?;
            match frame.r#type {
                "ADDED" | "MODIFIED" | "DELETED" => {
                    // Sliced, not copied: the entry keeps the frame's own allocation.
                    let entry = Entry::parse(line.slice_ref(frame.object.get().as_bytes())).map_err(decode)?;
                    version.clone_from(&entry.header.resource_version);
                    if frame.r#type == "DELETED" {
                        self.store.delete(&entry.header.key);
                    } else {
                        self.store.apply(entry);
                    }
                    self.store.reached(version);
                }
                "BOOKMARK" => {
                    let mark: Bookmark = serde_json::from_str(frame.object.get()).map_err(decode)?;
                    *version = mark.metadata.resource_version;
                    self.store.reached(version);
                }
                "ERROR" => {
                    let status: ApiStatus = serde_json::from_str(frame.object.get()).map_err(decode)?;
                    let error = Error::new(operation.as_str(), ErrorKind::Status(Box::new(status)));
                    if error.is_gone() {
                        return Ok(Ended::Expired);
                    }
                    return Err(error);
                }
                other => tracing::warn!(resource = %self.resource, r#type = other, "unknown watch event"),
            }
        }
    }
}

/// Splits a body at newlines.
struct Lines {
    body: Body,
    buffer: BytesMut,
    /// Bytes of `buffer` already searched.
    searched: usize,
}

impl Lines {
    fn new(body: Body) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            searched: 0,
        }
    }

    /// The next line that is not empty, copied to an allocation of its own size so that keeping it keeps nothing else.
    async fn next(&mut self) -> Result<Option<Bytes>, ErrorKind> {
        loop {
            while let Some(at) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') {
                let line = self.buffer.split_to(self.searched + at + 1);
                self.searched = 0;
                let line = line.trim_ascii();
                if !line.is_empty() {
                    return Ok(Some(Bytes::copy_from_slice(line)));
                }
            }
            self.searched = self.buffer.len();
            if self.searched > FRAME_BYTES_MAX {
                return Err(ErrorKind::TooLarge { limit: FRAME_BYTES_MAX });
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Err(ErrorKind::Transport(error)),
                None => {
                    // A last line without newline is a cut frame, unless it parses; never guess.
                    return Ok(None);
                }
            }
        }
    }
}

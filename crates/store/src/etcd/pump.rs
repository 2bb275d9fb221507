//! Follows one keyspace: one watch on all its keys, from where it was opened, for as long as it lives.
//!
//! A broken stream is opened again after the last revision that was passed. If etcd has compacted that revision
//! meanwhile, the state is read and compared with what is known, and the difference is published, each put at its own
//! revision: readers see fewer steps, never a wrong state, and never a step twice.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;

use super::keyspace::EtcdKeyspace;
use super::prefix_end;
use super::wire::{Event, KeyValue, WatchCreateRequest, WatchRequest};
use crate::{Batch, Error, Op, Revision};

const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_secs(2);

/// Why one stream ended.
enum Ended {
    /// The keyspace is gone, in etcd or in this process.
    Gone,
    /// The revision to go on from is no longer kept.
    Compacted,
    Broken(String),
}

/// Where the pump is.
struct Position {
    /// Newest revision that was passed on.
    at: i64,
    /// Revision of every key's last write.
    mods: HashMap<Bytes, i64>,
}

/// Runs until nobody holds the keyspace any more, or it is dropped.
pub(super) async fn run(keyspace: Weak<EtcdKeyspace>, from: i64) {
    let mut wait = RETRY_MIN;
    let mut position = None;
    loop {
        let Some(held) = keyspace.upgrade() else { return };
        if position.is_none() {
            // What is known at the start: needed to find deletions after a compaction.
            match held.read(b"", from, true).await {
                Ok(kvs) => {
                    let mods = kvs.into_iter().filter_map(|kv| {
                        let key = Bytes::copy_from_slice(held.entry_key(&kv.key)?);
                        Some((key, kv.mod_revision))
                    });
                    position = Some(Position {
                        at: from,
                        mods: mods.collect(),
                    });
                }
                Err(error) => {
                    tracing::warn!(keyspace = held.core.name, %error, "reading the keys from etcd failed, trying again");
                }
            }
        }
        if let Some(position) = &mut position {
            let before = position.at;
            drop(held);
            match follow(&keyspace, position).await {
                Ended::Gone => return,
                Ended::Compacted => {
                    let Some(held) = keyspace.upgrade() else { return };
                    match resync(&held, position).await {
                        Ok(()) => tracing::warn!(
                            keyspace = held.core.name,
                            revision = position.at,
                            "etcd had compacted what this process had not seen; the state was read anew"
                        ),
                        Err(Error::Dropped(_)) => return held.mark_dropped(),
                        Err(error) => tracing::warn!(keyspace = held.core.name, %error, "reading anew failed"),
                    }
                }
                Ended::Broken(reason) => tracing::warn!(reason, "the watch on etcd broke, opening it again"),
            }
            if position.at > before {
                wait = RETRY_MIN;
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RETRY_MAX);
    }
}

async fn follow(keyspace: &Weak<EtcdKeyspace>, position: &mut Position) -> Ended {
    let mut stream = {
        let Some(held) = keyspace.upgrade() else {
            return Ended::Gone;
        };
        let create = WatchCreateRequest {
            key: held.root.clone(),
            range_end: prefix_end(&held.root),
            start_revision: position.at + 1,
        };
        match held.client.watch(WatchRequest { create: Some(create) }).await {
            Ok(stream) => stream,
            Err(status) => return Ended::Broken(status.to_string()),
        }
    };
    loop {
        let response = match stream.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return Ended::Broken("etcd ended the stream".to_owned()),
            Err(status) => return Ended::Broken(status.to_string()),
        };
        if response.compact_revision > 0 {
            return Ended::Compacted;
        }
        if response.canceled {
            return Ended::Broken(response.cancel_reason);
        }
        let Some(held) = keyspace.upgrade() else {
            return Ended::Gone;
        };
        if held.is_dropped() {
            return Ended::Gone;
        }
        let revision = |event: &Event| event.kv.as_ref().map_or(0, |kv| kv.mod_revision);
        for events in response.events.chunk_by(|a, b| revision(a) == revision(b)) {
            let at = events.first().map_or(0, revision);
            if at <= position.at {
                continue;
            }
            if !pass_on(&held, position, at, events) {
                held.mark_dropped();
                return Ended::Gone;
            }
        }
    }
}

/// Publishes one revision. False when it dropped the keyspace.
fn pass_on(keyspace: &Arc<EtcdKeyspace>, position: &mut Position, at: i64, events: &[Event]) -> bool {
    let (mut ops, mut own) = (Vec::new(), None);
    for event in events {
        let Some(kv) = &event.kv else { continue };
        if keyspace.is_mark(&kv.key) {
            if event.is_delete() {
                return false;
            }
            own = keyspace.own_ops(&kv.value);
            continue;
        }
        let Some(key) = keyspace.entry_key(&kv.key).map(Bytes::copy_from_slice) else {
            continue;
        };
        if event.is_delete() {
            position.mods.remove(&key);
            ops.push(Op::delete(key));
        } else {
            position.mods.insert(key.clone(), at);
            ops.push(Op::put(key, kv.value.clone()));
        }
    }
    let ops = own.unwrap_or_else(|| ops.into());
    if !ops.is_empty() {
        keyspace.publish(Batch {
            revision: at as Revision,
            ops,
        });
    }
    position.at = at;
    keyspace.pass(at);
    true
}

/// Publishes the difference between what is known and what is there.
async fn resync(keyspace: &Arc<EtcdKeyspace>, position: &mut Position) -> Result<(), Error> {
    let now = keyspace.newest().await?;
    let mut found = keyspace.read(b"", now, false).await?;
    found.sort_by_key(|kv| kv.mod_revision);
    let mut missing = std::mem::take(&mut position.mods);
    let mut changed: Vec<(Bytes, KeyValue)> = Vec::new();
    for kv in found {
        let Some(key) = keyspace.entry_key(&kv.key).map(Bytes::copy_from_slice) else {
            continue;
        };
        if missing.remove(&key) != Some(kv.mod_revision) {
            changed.push((key.clone(), kv.clone()));
        }
        position.mods.insert(key, kv.mod_revision);
    }
    for same in changed.chunk_by(|(_, a), (_, b)| a.mod_revision == b.mod_revision) {
        let ops: Vec<Op> = same
            .iter()
            .map(|(key, kv)| Op::put(key.clone(), kv.value.clone()))
            .collect();
        let revision = same.first().map_or(0, |(_, kv)| kv.mod_revision) as Revision;
        keyspace.publish(Batch {
            revision,
            ops: ops.into(),
        });
    }
    if !missing.is_empty() {
        // When they went is not known; they are gone by now.
        let ops: Vec<Op> = missing.into_keys().map(Op::delete).collect();
        keyspace.publish(Batch {
            revision: now as Revision,
            ops: ops.into(),
        });
    }
    position.at = now;
    keyspace.pass(now);
    Ok(())
}

//! The one writer of a pod's status: the newest status wins, in between may be skipped, and a later pod of the same name
//! is never written to (uid precondition).

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Map, Value, json};
use tokio::{sync::watch, time::sleep};

use crate::{api::ApiError, kubelet::Core};

/// Waits between tries after an error, doubled up to the second.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);

#[derive(Clone, Default)]
struct Wanted {
    seq: u64,
    status: Option<Arc<PodStatus>>,
    urgent: bool,
}

/// Handle of the worker. Dropping it ends the writer after the last status is written.
pub struct Writer {
    tx: watch::Sender<Wanted>,
    done: watch::Receiver<u64>,
    seq: u64,
}

impl Writer {
    /// Starts the writer; `known` is what the API has.
    pub fn start(core: Arc<Core>, namespace: String, name: String, uid: String, known: PodStatus) -> Self {
        let (tx, rx) = watch::channel(Wanted::default());
        let (done_tx, done) = watch::channel(0);
        tokio::spawn(run(core, namespace, name, uid, known, rx, done_tx));
        Self { tx, done, seq: 0 }
    }

    /// Asks for `status` to be written; `urgent` = at once.
    pub fn write(&mut self, status: PodStatus, urgent: bool) {
        self.seq += 1;
        let seq = self.seq;
        let status = Some(Arc::new(status));
        self.tx.send_modify(|w| {
            // Company of an urgent one is urgent.
            let pending = w.seq > *self.done.borrow();
            *w = Wanted {
                seq,
                status,
                urgent: urgent || (pending && w.urgent),
            };
        });
    }

    /// Resolves when everything asked for so far is written, or never will be.
    pub fn flushed(&self) -> impl Future<Output = ()> + Send + 'static {
        let (mut done, seq) = (self.done.clone(), self.seq);
        async move {
            let _ = done.wait_for(|d| *d >= seq).await;
        }
    }
}

async fn run(
    core: Arc<Core>,
    namespace: String,
    name: String,
    uid: String,
    known: PodStatus,
    mut rx: watch::Receiver<Wanted>,
    done: watch::Sender<u64>,
) {
    let mut last = to_map(&known);
    let coalesce = Duration::from_millis(core.config.tuning.status_coalesce_ms);
    let mut retry = RETRY_FIRST;
    // The last status is still written after the handle is dropped: `changed` fails only when nothing new is there.
    while rx.changed().await.is_ok() {
        loop {
            if !rx.borrow().urgent {
                tokio::select! {
                    // Cancel safe: `wait_for` only looks.
                    _ = rx.wait_for(|w| w.urgent) => {}
                    () = sleep(coalesce) => {}
                }
            }
            let wanted = rx.borrow_and_update().clone();
            let Some(status) = wanted.status else { break };
            let next = to_map(&status);
            let Some(patch) = difference(&last, &next) else {
                done.send_replace(wanted.seq);
                break;
            };
            let patch = json!({"metadata": {"uid": uid}, "status": patch});
            match core.config.api.patch_pod_status(&namespace, &name, patch).await {
                Ok(_) => {
                    last = next;
                    retry = RETRY_FIRST;
                    done.send_replace(wanted.seq);
                    break;
                }
                Err(ApiError::NotFound { .. }) => return,
                // Another pod of this name by now; any other conflict is tried again like any other trouble.
                Err(ApiError::Conflict { .. }) if replaced(&core, &namespace, &name, &uid).await => return,
                Err(e) => {
                    tracing::warn!(ns = %namespace, pod = %name, error = %stdx::chain(&e), "status not written");
                    sleep(if matches!(e, ApiError::Refused { .. }) {
                        RETRY_MAX
                    } else {
                        retry
                    })
                    .await;
                    retry = (retry * 2).min(RETRY_MAX);
                    if rx.has_changed().is_err() && matches!(e, ApiError::Refused { .. }) {
                        return;
                    }
                }
            }
        }
    }
}

async fn replaced(core: &Core, namespace: &str, name: &str, uid: &str) -> bool {
    match core.config.api.pod(namespace, name).await {
        Ok(pod) => pod.metadata.uid.as_deref() != Some(uid),
        Err(e) => matches!(e, ApiError::NotFound { .. }),
    }
}

fn to_map(status: &PodStatus) -> Map<String, Value> {
    match serde_json::to_value(status) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// What to send so that `old` becomes `new`: changed keys whole, conditions one by one (they merge by type, and others
/// own some of them), null for what is gone. `None` = nothing differs.
fn difference(old: &Map<String, Value>, new: &Map<String, Value>) -> Option<Value> {
    /// Lists that merge by a key on the server: what is replaced must say so.
    const KEYED: &[&str] = &["podIPs", "hostIPs"];
    let mut out = Map::new();
    for (key, value) in new {
        if old.get(key) == Some(value) {
            continue;
        }
        if key == "conditions" {
            let before = old.get(key).and_then(Value::as_array);
            let known = |c: &Value| before.is_some_and(|b| b.contains(c));
            let changed: Vec<Value> = value
                .as_array()
                .into_iter()
                .flatten()
                .filter(|c| !known(c))
                .map(complete)
                .collect();
            if !changed.is_empty() {
                out.insert(key.clone(), Value::Array(changed));
            }
        } else if KEYED.contains(&key.as_str()) && old.contains_key(key) {
            let mut list = value.as_array().cloned().unwrap_or_default();
            list.insert(0, json!({"$patch": "replace"}));
            out.insert(key.clone(), Value::Array(list));
        } else {
            out.insert(key.clone(), value.clone());
        }
    }
    for key in old.keys() {
        // Only what this writer ever writes: the rest belongs to others.
        let mine = matches!(
            key.as_str(),
            "reason" | "message" | "podIP" | "podIPs" | "initContainerStatuses" | "ephemeralContainerStatuses"
        );
        if mine && !new.contains_key(key) {
            out.insert(key.clone(), Value::Null);
        }
    }
    (!out.is_empty()).then_some(Value::Object(out))
}

/// A condition with the keys that must go spelled out as null, since merging keeps what is not named.
fn complete(c: &Value) -> Value {
    let mut c = c.clone();
    if let Value::Object(map) = &mut c {
        for key in ["reason", "message"] {
            map.entry(key).or_insert(Value::Null);
        }
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sends_only_what_differs() {
        let map = |v: Value| v.as_object().cloned().unwrap();
        let old = map(
            json!({"phase": "Pending", "reason": "X", "hostIP": "1", "conditions": [{"type": "A", "status": "True"}, {"type": "B", "status": "False", "reason": "r"}]}),
        );
        let new = map(
            json!({"phase": "Running", "hostIP": "1", "conditions": [{"type": "A", "status": "True"}, {"type": "B", "status": "True"}]}),
        );
        assert_eq!(
            difference(&old, &new).unwrap(),
            json!({"phase": "Running", "reason": null, "conditions": [{"type": "B", "status": "True", "reason": null, "message": null}]})
        );
        assert_eq!(difference(&new, &new), None);
    }
}

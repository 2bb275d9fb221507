//! An API in memory.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use k8s_openapi::{
    api::{
        coordination::v1::Lease,
        core::v1::{ConfigMap, Event, Node, Pod, PodStatus, Secret, Service},
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use stdx::{SharedClock, clock::RuntimeClock};
use tokio::sync::mpsc;

use crate::{
    api::{ApiError, BoundToken, NodeApi, PodEvent, TokenAsk},
    clock,
};

#[derive(Default)]
struct State {
    pods: HashMap<(String, String), Arc<Pod>>,
    maps: HashMap<(String, String), ConfigMap>,
    secrets: HashMap<(String, String), Secret>,
    services: Vec<Arc<Service>>,
    node: Option<Node>,
    lease: Option<Lease>,
    events: Vec<Event>,
    watchers: Vec<mpsc::UnboundedSender<PodEvent>>,
    tokens: Vec<TokenAsk>,
    /// Every phase that was ever written, per pod name.
    phases: Vec<(String, String)>,
    /// The last status of deleted pods, per name.
    last: HashMap<String, PodStatus>,
}

pub struct FakeApi {
    state: Mutex<State>,
    uid: AtomicU64,
    clock: SharedClock,
}

impl Default for FakeApi {
    /// Must be made inside a tokio runtime, whose clock it follows.
    fn default() -> Self {
        let clock = Arc::new(RuntimeClock::new(std::time::SystemTime::now()));
        Self {
            state: Mutex::default(),
            uid: AtomicU64::default(),
            clock,
        }
    }
}

fn none(what: &str) -> ApiError {
    ApiError::NotFound { what: what.to_owned() }
}

impl FakeApi {
    fn tell(&self, s: &mut State, event: PodEvent) {
        s.watchers.retain(|w| w.send(event.clone()).is_ok());
    }

    /// Creates `default/<name>`, bound to `n1`.
    pub fn create_pod(&self, name: &str, mut spec: Value, metadata: Value) -> Arc<Pod> {
        let uid = format!("uid-{}", self.uid.fetch_add(1, Ordering::Relaxed));
        spec["nodeName"] = json!("n1");
        let mut meta = json!({"name": name, "namespace": "default", "uid": uid, "generation": 1});
        for (k, v) in metadata.as_object().into_iter().flatten() {
            meta[k] = v.clone();
        }
        let pod: Pod = serde_json::from_value(json!({"metadata": meta, "spec": spec, "status": {"phase": "Pending"}}))
            .expect("a pod");
        let pod = Arc::new(pod);
        let mut s = self.state.lock();
        s.pods.insert(("default".into(), name.into()), pod.clone());
        self.tell(&mut s, PodEvent::Present(pod.clone()));
        pod
    }

    /// Changes a pod as another client would.
    pub fn change_pod(&self, name: &str, change: impl FnOnce(&mut Pod)) {
        let mut s = self.state.lock();
        let Some(pod) = s.pods.get_mut(&("default".to_owned(), name.to_owned())) else {
            return;
        };
        change(Arc::make_mut(pod));
        let event = PodEvent::Present(pod.clone());
        self.tell(&mut s, event);
    }

    /// Asks for deletion with `grace_s`; 0 removes the object at once.
    pub fn remove_pod(&self, name: &str, grace_s: i64) {
        if grace_s == 0 {
            let mut s = self.state.lock();
            if let Some(pod) = s.pods.remove(&("default".to_owned(), name.to_owned())) {
                let uid = pod.metadata.uid.clone().unwrap_or_default();
                self.tell(&mut s, PodEvent::Gone { uid });
            }
            return;
        }
        self.change_pod(name, |p| {
            let at = Timestamp::from_second(clock::now(&self.clock).as_second() + grace_s).expect("a time");
            p.metadata.deletion_timestamp = Some(Time(at));
            p.metadata.deletion_grace_period_seconds = Some(grace_s);
        });
    }

    pub fn put_map(&self, name: &str, data: Value) {
        let map = serde_json::from_value(json!({"metadata": {"name": name}, "data": data})).expect("a configmap");
        self.state.lock().maps.insert(("default".into(), name.into()), map);
    }

    pub fn put_secret(&self, name: &str, data: &[(&str, &str)]) {
        let mut secret = Secret::default();
        let entries = data
            .iter()
            .map(|(k, v)| ((*k).to_owned(), k8s_openapi::ByteString(v.as_bytes().to_vec())));
        secret.data = Some(entries.collect());
        self.state
            .lock()
            .secrets
            .insert(("default".into(), name.into()), secret);
    }

    pub fn status(&self, name: &str) -> Option<PodStatus> {
        let s = self.state.lock();
        s.pods
            .get(&("default".to_owned(), name.to_owned()))
            .map(|p| p.status.clone().unwrap_or_default())
    }

    /// What a deleted pod's status was in the end.
    pub fn last_status(&self, name: &str) -> Option<PodStatus> {
        self.state.lock().last.get(name).cloned()
    }

    pub fn exists(&self, name: &str) -> bool {
        self.status(name).is_some()
    }

    /// Phases written for this pod, in order.
    pub fn phases(&self, name: &str) -> Vec<String> {
        self.state
            .lock()
            .phases
            .iter()
            .filter(|(n, _)| n == name)
            .map(|(_, p)| p.clone())
            .collect()
    }

    /// `(reason, message)` of every event about this object.
    pub fn events(&self, name: &str) -> Vec<(String, String)> {
        let s = self.state.lock();
        let about = s
            .events
            .iter()
            .filter(|e| e.involved_object.name.as_deref() == Some(name));
        about
            .map(|e| {
                (
                    e.reason.clone().unwrap_or_default(),
                    e.message.clone().unwrap_or_default(),
                )
            })
            .collect()
    }

    pub fn node_now(&self) -> Option<Node> {
        self.state.lock().node.clone()
    }

    pub fn lease_now(&self) -> Option<Lease> {
        self.state.lock().lease.clone()
    }

    pub fn tokens(&self) -> usize {
        self.state.lock().tokens.len()
    }

    /// Waits until `check` holds for the pod's status.
    ///
    /// # Panics
    /// After a minute (of tokio's clock).
    pub async fn until(&self, name: &str, what: &str, check: impl Fn(&PodStatus) -> bool) -> PodStatus {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(s) = self.status(name)
                && check(&s)
            {
                return s;
            }
            assert!(
                tokio::time::Instant::now() < deadline,
                "{name}: not {what}: {}\nevents: {:?}",
                serde_json::to_string_pretty(&self.status(name)).unwrap_or_default(),
                self.events(name)
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Just what the kubelet's patches use: null removes, conditions merge by type, lists may say they replace.
fn merge(into: &mut Value, patch: &Value) {
    let (Value::Object(into), Value::Object(patch)) = (into, patch) else {
        return;
    };
    for (k, v) in patch {
        if v.is_null() {
            into.remove(k);
        } else if k == "conditions" {
            let list = into.entry(k).or_insert_with(|| json!([]));
            for c in v.as_array().into_iter().flatten() {
                let Some(items) = list.as_array_mut() else { continue };
                match items.iter_mut().find(|i| i["type"] == c["type"]) {
                    Some(old) => merge(old, c),
                    None => {
                        let mut fresh = json!({});
                        merge(&mut fresh, c);
                        items.push(fresh);
                    }
                }
            }
        } else if let Value::Array(items) = v {
            let plain: Vec<Value> = items.iter().filter(|i| i.get("$patch").is_none()).cloned().collect();
            into.insert(k.clone(), Value::Array(plain));
        } else if v.is_object() && into.get(k).is_some_and(Value::is_object) {
            merge(into.get_mut(k).expect("just looked"), v);
        } else {
            into.insert(k.clone(), v.clone());
        }
    }
}

#[async_trait]
impl NodeApi for FakeApi {
    fn pods(&self, _node: &str) -> mpsc::Receiver<PodEvent> {
        let (tx, rx) = mpsc::channel(64);
        let (watch_tx, mut watch) = mpsc::unbounded_channel();
        {
            let mut s = self.state.lock();
            for pod in s.pods.values() {
                let _ = watch_tx.send(PodEvent::Present(pod.clone()));
            }
            let _ = watch_tx.send(PodEvent::Synced);
            s.watchers.push(watch_tx);
        }
        tokio::spawn(async move {
            while let Some(e) = watch.recv().await {
                if tx.send(e).await.is_err() {
                    return;
                }
            }
        });
        rx
    }

    async fn services(&self, namespace: &str) -> Result<Vec<Arc<Service>>, ApiError> {
        let s = self.state.lock();
        Ok(s.services
            .iter()
            .filter(|v| v.metadata.namespace.as_deref() == Some(namespace))
            .cloned()
            .collect())
    }

    async fn config_map(&self, namespace: &str, name: &str) -> Result<ConfigMap, ApiError> {
        let key = (namespace.to_owned(), name.to_owned());
        self.state.lock().maps.get(&key).cloned().ok_or_else(|| none(name))
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Secret, ApiError> {
        let key = (namespace.to_owned(), name.to_owned());
        self.state.lock().secrets.get(&key).cloned().ok_or_else(|| none(name))
    }

    async fn token(&self, ask: &TokenAsk) -> Result<BoundToken, ApiError> {
        let mut s = self.state.lock();
        s.tokens.push(ask.clone());
        let token = format!("token-{}", s.tokens.len());
        Ok(BoundToken {
            token,
            expires: clock::after_s(clock::now(&self.clock), ask.expiration_s),
        })
    }

    async fn pod(&self, namespace: &str, name: &str) -> Result<Pod, ApiError> {
        let key = (namespace.to_owned(), name.to_owned());
        self.state
            .lock()
            .pods
            .get(&key)
            .map(|p| (**p).clone())
            .ok_or_else(|| none(name))
    }

    async fn patch_pod_status(&self, namespace: &str, name: &str, patch: Value) -> Result<Pod, ApiError> {
        let mut s = self.state.lock();
        let key = (namespace.to_owned(), name.to_owned());
        let pod = s.pods.get_mut(&key).ok_or_else(|| none(name))?;
        if patch["metadata"]["uid"].as_str() != pod.metadata.uid.as_deref() {
            return Err(ApiError::Conflict {
                what: name.into(),
                reason: "uid".into(),
            });
        }
        let mut status = serde_json::to_value(&pod.status).unwrap_or_default();
        merge(&mut status, &patch["status"]);
        let refused = |e: serde_json::Error| ApiError::Refused {
            what: name.into(),
            reason: e.to_string(),
        };
        Arc::make_mut(pod).status = Some(serde_json::from_value(status).map_err(refused)?);
        let pod = pod.clone();
        if let Some(phase) = patch["status"]["phase"].as_str() {
            s.phases.push((name.into(), phase.into()));
        }
        self.tell(&mut s, PodEvent::Present(pod.clone()));
        Ok((*pod).clone())
    }

    async fn delete_pod(&self, namespace: &str, name: &str, uid: &str) -> Result<(), ApiError> {
        let mut s = self.state.lock();
        let key = (namespace.to_owned(), name.to_owned());
        let pod = s.pods.get(&key).ok_or_else(|| none(name))?;
        if pod.metadata.uid.as_deref() != Some(uid) {
            return Err(ApiError::Conflict {
                what: name.into(),
                reason: "uid".into(),
            });
        }
        let last = pod.status.clone().unwrap_or_default();
        s.last.insert(name.into(), last);
        s.pods.remove(&key);
        self.tell(&mut s, PodEvent::Gone { uid: uid.into() });
        Ok(())
    }

    async fn create_event(&self, event: &Event) -> Result<(), ApiError> {
        self.state.lock().events.push(event.clone());
        Ok(())
    }

    async fn patch_event(&self, _namespace: &str, _name: &str, _patch: Value) -> Result<(), ApiError> {
        Ok(())
    }

    async fn node(&self, name: &str) -> Result<Node, ApiError> {
        self.state.lock().node.clone().ok_or_else(|| none(name))
    }

    async fn create_node(&self, node: &Node) -> Result<Node, ApiError> {
        self.state.lock().node = Some(node.clone());
        Ok(node.clone())
    }

    async fn update_node(&self, node: &Node) -> Result<Node, ApiError> {
        self.create_node(node).await
    }

    async fn patch_node_status(&self, name: &str, patch: Value) -> Result<Node, ApiError> {
        let mut s = self.state.lock();
        let node = s.node.as_mut().ok_or_else(|| none(name))?;
        let mut whole = serde_json::to_value(&*node).unwrap_or_default();
        merge(&mut whole, &patch);
        *node = serde_json::from_value(whole).map_err(|e| ApiError::Refused {
            what: name.into(),
            reason: e.to_string(),
        })?;
        Ok(node.clone())
    }

    async fn delete_node(&self, _name: &str, _uid: &str) -> Result<(), ApiError> {
        self.state.lock().node = None;
        Ok(())
    }

    async fn lease(&self, name: &str) -> Result<Lease, ApiError> {
        self.state.lock().lease.clone().ok_or_else(|| none(name))
    }

    async fn create_lease(&self, lease: &Lease) -> Result<Lease, ApiError> {
        self.state.lock().lease = Some(lease.clone());
        Ok(lease.clone())
    }

    async fn update_lease(&self, lease: &Lease) -> Result<Lease, ApiError> {
        self.create_lease(lease).await
    }
}

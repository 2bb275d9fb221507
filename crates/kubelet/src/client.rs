//! [`NodeApi`] over `reconcile`: one informer of the node's pods, one of Services, everything else a call.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    coordination::v1::Lease,
    core::v1::{ConfigMap, Event, Node, Pod, Secret, Service, ServiceAccount},
};
use parking_lot::Mutex;
use reconcile::{Client, DeleteParams, Entry, Error, ErrorKind, Informer, Informers, Patch};
use serde_json::Value;
use tokio::sync::{Notify, mpsc};

use crate::api::{ApiError, BoundToken, NodeApi, PodEvent, TokenAsk};

/// Where leases of nodes live.
pub const LEASE_NAMESPACE: &str = "kube-node-lease";

/// Events of pods that wait for the kubelet; one per pod at most, the newest.
const PODS_AHEAD: usize = 64;

/// Cheap to clone through its `Arc`.
pub struct ClientApi {
    client: Client,
    informers: Informers,
    services: Informer<Service>,
}

impl ClientApi {
    /// Starts the informer of Services at once, so that the first pod does not wait for it. Must run in a tokio runtime.
    pub fn new(client: Client, informers: Informers) -> Arc<Self> {
        let services = informers.get::<Service>();
        Arc::new(Self {
            client,
            informers,
            services,
        })
    }
}

#[derive(Default)]
struct Dirty {
    /// Uid -> newest state; `None` = deleted.
    pods: HashMap<String, Option<Arc<Entry>>>,
    order: Vec<String>,
    synced: bool,
}

fn api(what: &str, name: &str) -> impl FnOnce(Error) -> ApiError {
    let what = format!("{what} {name}");
    move |e| {
        let reason = match &e.kind {
            ErrorKind::Status(s) => s.message.clone(),
            _ => stdx::chain(&e).to_string(),
        };
        match e.code() {
            Some(404) => ApiError::NotFound { what },
            Some(409) => ApiError::Conflict { what, reason },
            Some(429) => ApiError::Transient { what, reason },
            Some(400..=499) => ApiError::Refused { what, reason },
            _ => ApiError::Transient { what, reason },
        }
    }
}

#[async_trait]
impl NodeApi for ClientApi {
    fn pods(&self, node: &str) -> mpsc::Receiver<PodEvent> {
        let (tx, rx) = mpsc::channel(PODS_AHEAD);
        let informer = self.informers.get_selected::<Pod>(&format!("spec.nodeName={node}"));
        let dirty: Arc<Mutex<Dirty>> = Arc::default();
        let bell = Arc::new(Notify::new());
        informer.on_change({
            let (dirty, bell) = (dirty.clone(), bell.clone());
            move |change| {
                let mut d = dirty.lock();
                let mut mark = |uid: &str, entry: Option<Arc<Entry>>| {
                    if d.pods.insert(uid.to_owned(), entry).is_none() {
                        d.order.push(uid.to_owned());
                    }
                };
                if let Some(old) = &change.old
                    && change.new.as_ref().is_none_or(|new| new.header.uid != old.header.uid)
                {
                    mark(&old.header.uid, None);
                }
                if let Some(new) = &change.new {
                    mark(&new.header.uid, Some(new.clone()));
                }
                bell.notify_one();
            }
        });
        tokio::spawn({
            let (informer, dirty, bell) = (informer.clone(), dirty.clone(), bell.clone());
            async move {
                informer.wait_synced().await;
                dirty.lock().synced = true;
                bell.notify_one();
            }
        });
        tokio::spawn(async move {
            let mut told = false;
            loop {
                // Whatever the first list held was marked before `synced` was set.
                let (synced, batch) = {
                    let mut d = dirty.lock();
                    let pods = std::mem::take(&mut d.pods);
                    let order = std::mem::take(&mut d.order);
                    (d.synced, (pods, order))
                };
                let (mut pods, order) = batch;
                for uid in order {
                    let event = match pods.remove(&uid) {
                        Some(Some(entry)) => informer.typed(&entry).map(PodEvent::Present),
                        Some(None) => Some(PodEvent::Gone { uid }),
                        None => None,
                    };
                    if let Some(event) = event
                        && tx.send(event).await.is_err()
                    {
                        return;
                    }
                }
                if synced && !told {
                    told = true;
                    if tx.send(PodEvent::Synced).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    // Cancel safe: the permit of the bell stays.
                    () = bell.notified() => {}
                    () = tx.closed() => return,
                }
            }
        });
        rx
    }

    async fn services(&self, namespace: &str) -> Result<Vec<Arc<Service>>, ApiError> {
        if tokio::time::timeout(std::time::Duration::from_secs(10), self.services.wait_synced())
            .await
            .is_err()
        {
            let reason = "the first list has not arrived".into();
            return Err(ApiError::Transient {
                what: "services".into(),
                reason,
            });
        }
        Ok(self.services.list_in(namespace))
    }

    async fn config_map(&self, namespace: &str, name: &str) -> Result<ConfigMap, ApiError> {
        self.client
            .get(Some(namespace), name)
            .await
            .map_err(api("configmap", name))
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Secret, ApiError> {
        self.client
            .get(Some(namespace), name)
            .await
            .map_err(api("secret", name))
    }

    async fn token(&self, ask: &TokenAsk) -> Result<BoundToken, ApiError> {
        let spec = TokenRequestSpec {
            // `None` = the server's own audience.
            audiences: (!ask.audience.is_empty()).then(|| vec![ask.audience.clone()]),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: Some(ask.pod_name.clone()),
                uid: Some(ask.pod_uid.clone()),
            }),
            expiration_seconds: Some(ask.expiration_s),
        };
        let mut request = TokenRequest {
            spec: Some(spec),
            ..Default::default()
        };
        request.metadata.namespace = Some(ask.namespace.clone());
        let answer: TokenRequest = self
            .client
            .create_subresource::<ServiceAccount, _, _>(Some(&ask.namespace), &ask.service_account, "token", &request)
            .await
            .map_err(api("token of serviceaccount", &ask.service_account))?;
        let issued = answer.status.and_then(|s| Some((s.token?, s.expiration_timestamp?)));
        let (token, expires) = issued.ok_or_else(|| ApiError::Transient {
            what: format!("token of serviceaccount {}", ask.service_account),
            reason: "the answer has no token".into(),
        })?;
        Ok(BoundToken {
            token,
            expires: expires.0,
        })
    }

    async fn pod(&self, namespace: &str, name: &str) -> Result<Pod, ApiError> {
        self.client.get(Some(namespace), name).await.map_err(api("pod", name))
    }

    async fn patch_pod_status(&self, namespace: &str, name: &str, patch: Value) -> Result<Pod, ApiError> {
        let patch = Patch::Strategic(patch);
        self.client
            .patch(Some(namespace), name, &patch, Some("status"))
            .await
            .map_err(api("status of pod", name))
    }

    async fn delete_pod(&self, namespace: &str, name: &str, uid: &str) -> Result<(), ApiError> {
        let params = DeleteParams {
            grace_period_s: Some(0),
            ..DeleteParams::uid(uid)
        };
        self.client
            .delete::<Pod>(Some(namespace), name, &params)
            .await
            .map_err(api("pod", name))
    }

    async fn create_event(&self, event: &Event) -> Result<(), ApiError> {
        let name = event.metadata.name.as_deref().unwrap_or_default();
        self.client
            .create(event.metadata.namespace.as_deref(), event)
            .await
            .map(|_: Event| ())
            .map_err(api("event", name))
    }

    async fn patch_event(&self, namespace: &str, name: &str, patch: Value) -> Result<(), ApiError> {
        let patch = Patch::Merge(patch);
        let done: Result<Event, _> = self.client.patch(Some(namespace), name, &patch, None).await;
        done.map(|_| ()).map_err(api("event", name))
    }

    async fn node(&self, name: &str) -> Result<Node, ApiError> {
        self.client.get(None, name).await.map_err(api("node", name))
    }

    async fn create_node(&self, node: &Node) -> Result<Node, ApiError> {
        self.client
            .create(None, node)
            .await
            .map_err(api("node", node.metadata.name.as_deref().unwrap_or_default()))
    }

    async fn update_node(&self, node: &Node) -> Result<Node, ApiError> {
        self.client
            .update(None, node)
            .await
            .map_err(api("node", node.metadata.name.as_deref().unwrap_or_default()))
    }

    async fn patch_node_status(&self, name: &str, patch: Value) -> Result<Node, ApiError> {
        self.client
            .patch(None, name, &Patch::Strategic(patch), Some("status"))
            .await
            .map_err(api("status of node", name))
    }

    async fn delete_node(&self, name: &str, uid: &str) -> Result<(), ApiError> {
        self.client
            .delete::<Node>(None, name, &DeleteParams::uid(uid))
            .await
            .map_err(api("node", name))
    }

    async fn lease(&self, name: &str) -> Result<Lease, ApiError> {
        self.client
            .get(Some(LEASE_NAMESPACE), name)
            .await
            .map_err(api("lease", name))
    }

    async fn create_lease(&self, lease: &Lease) -> Result<Lease, ApiError> {
        let name = lease.metadata.name.clone().unwrap_or_default();
        self.client
            .create(Some(LEASE_NAMESPACE), lease)
            .await
            .map_err(api("lease", &name))
    }

    async fn update_lease(&self, lease: &Lease) -> Result<Lease, ApiError> {
        let name = lease.metadata.name.clone().unwrap_or_default();
        self.client
            .update(Some(LEASE_NAMESPACE), lease)
            .await
            .map_err(api("lease", &name))
    }
}

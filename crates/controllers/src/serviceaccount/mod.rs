//! Gives every active namespace its `default` ServiceAccount and the `kube-root-ca.crt` ConfigMap.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use reconcile::{Error, Informer, Key, Queue, Requeue, run_controller};

use crate::Context;

const NAME: &str = "serviceaccount-controller";
const WORKERS: usize = 2;
const ACCOUNT: &str = "default";
const CA_MAP: &str = "kube-root-ca.crt";
const CA_KEY: &str = "ca.crt";
const DESCRIPTION: &str = "kubernetes.io/description";
const DESCRIPTION_TEXT: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal \
    endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across \
    distributions of Kubernetes clusters.";

struct Controller {
    context: Context,
    namespaces: Informer<Namespace>,
    accounts: Informer<ServiceAccount>,
    maps: Informer<ConfigMap>,
}

pub(crate) async fn run(context: Context) {
    let queue = Queue::new();
    let this = Arc::new(Controller {
        namespaces: context.informers.get(),
        // Only the two objects of each namespace, not every account and map of the cluster.
        accounts: context.informers.get_selected(&format!("metadata.name={ACCOUNT}")),
        maps: context.informers.get_selected(&format!("metadata.name={CA_MAP}")),
        context,
    });
    let sink = queue.clone();
    this.namespaces.on_change(move |change| sink.add(change.key().clone()));
    // A change of ours comes back as an event and finds nothing to do; a deletion is made good.
    let sink = queue.clone();
    this.accounts
        .on_change(move |change| sink.add(Key::new("", change.key().ns.clone())));
    let sink = queue.clone();
    this.maps
        .on_change(move |change| sink.add(Key::new("", change.key().ns.clone())));
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.namespaces.wait_synced().await;
        this.accounts.wait_synced().await;
        this.maps.wait_synced().await;
    };
    if shutdown.or_stop(synced).await.is_none() {
        return;
    }
    let work = move |key| {
        let this = this.clone();
        async move { this.reconcile(key).await }
    };
    run_controller(NAME, queue, WORKERS, work, shutdown).await;
}

/// What the map of a namespace should hold, if it does not yet.
fn wanted_map(ca_pem: &str, old: Option<&ConfigMap>) -> Option<ConfigMap> {
    if ca_pem.is_empty() {
        return None;
    }
    let data = BTreeMap::from([(CA_KEY.to_owned(), ca_pem.to_owned())]);
    let mut map = old.cloned().unwrap_or_else(|| ConfigMap {
        metadata: ObjectMeta {
            name: Some(CA_MAP.to_owned()),
            ..ObjectMeta::default()
        },
        ..ConfigMap::default()
    });
    map.data = Some(data);
    let annotations = map.metadata.annotations.get_or_insert_default();
    annotations.insert(DESCRIPTION.to_owned(), DESCRIPTION_TEXT.to_owned());
    (old != Some(&map)).then_some(map)
}

impl Controller {
    async fn reconcile(&self, key: Key) -> Result<Requeue, Error> {
        let Some(namespace) = self.namespaces.by_key(&key) else {
            return Ok(Requeue::Done);
        };
        let terminating = namespace.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Terminating");
        if crate::common::is_deleting(&*namespace) || terminating {
            return Ok(Requeue::Done);
        }
        let (client, ns) = (&self.context.client, Some(key.name.as_str()));
        if self.accounts.get(&key.name, ACCOUNT).is_none() {
            let metadata = ObjectMeta {
                name: Some(ACCOUNT.to_owned()),
                ..ObjectMeta::default()
            };
            ignore_races(
                client
                    .create(
                        ns,
                        &ServiceAccount {
                            metadata,
                            ..ServiceAccount::default()
                        },
                    )
                    .await,
            )?;
        }
        let old = self.maps.get(&key.name, CA_MAP);
        if let Some(map) = wanted_map(&self.context.config.cluster_ca_pem, old.as_deref()) {
            let written = match &old {
                Some(_) => client.update(ns, &map).await,
                None => client.create(ns, &map).await,
            };
            ignore_races(written)?;
        }
        Ok(Requeue::Done)
    }
}

/// Somebody else made it, or the namespace goes: both come back as events where needed.
fn ignore_races<T>(result: Result<T, Error>) -> Result<(), Error> {
    match result {
        Err(e) if !e.is_already_exists() && !e.is_namespace_terminating() && !e.is_not_found() => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_made_once_and_made_good_after_a_change() {
        let map = wanted_map("PEM", None).unwrap();
        assert_eq!(wanted_map("PEM", Some(&map)), None);
        let mut broken = map.clone();
        broken.data = Some(BTreeMap::from([("ca.crt".to_owned(), "other".to_owned())]));
        assert_eq!(wanted_map("PEM", Some(&broken)), Some(map));
        assert_eq!(wanted_map("", None), None);
    }
}

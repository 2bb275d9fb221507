//! Removes pods nobody else can remove: pods of nodes that are gone, and pods that were being deleted before they ever
//! reached a node. Nobody is left to confirm their end, so they are deleted without grace.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use reconcile::{DeleteParams, Error, Informer, Key, Patch, Queue, Requeue, run_controller};
use serde_json::json;

use crate::Context;
use crate::common::{PodsByNode, is_deleting, is_terminal, name_of, uid_of};

const NAME: &str = "pod-garbage-collector";

/// What to look at.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Task {
    /// A node name that pods are bound to.
    Node(String),
    /// A pod that may never have reached a node.
    Pod(Key),
}

impl std::fmt::Display for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node {name}"),
            Self::Pod(key) => write!(f, "pod {key}"),
        }
    }
}

struct Controller {
    context: Context,
    nodes: Informer<Node>,
    pods: Informer<Pod>,
    on_node: Arc<PodsByNode>,
}

pub(crate) async fn run(context: Context) {
    let queue: Queue<Task> = Queue::new();
    let pods: Informer<Pod> = context.informers.get();
    let on_node = PodsByNode::follow(&pods);
    let this = Arc::new(Controller {
        nodes: context.informers.get(),
        on_node,
        pods,
        context,
    });
    let grace = this.context.config.node_gone_grace;
    let (sink, weak) = (queue.clone(), Arc::downgrade(&this));
    this.pods.on_change(move |change| {
        let (Some(this), Some(new)) = (weak.upgrade(), &change.new) else {
            return;
        };
        let Some(pod) = this.pods.typed(new) else { return };
        match pod
            .spec
            .as_ref()
            .and_then(|s| s.node_name.as_deref())
            .filter(|n| !n.is_empty())
        {
            // Before the nodes are known every node looks gone; the grace covers that.
            Some(node) if this.nodes.store().get(&Key::new("", node)).is_none() => {
                sink.add_after(Task::Node(node.to_owned()), grace);
            }
            Some(_) => {}
            None if new.header.deleting => sink.add(Task::Pod(change.key().clone())),
            None => {}
        }
    });
    let sink = queue.clone();
    this.nodes.on_change(move |change| {
        if change.is_deletion() {
            sink.add_after(Task::Node(change.key().name.clone()), grace);
        }
    });
    let shutdown = this.context.shutdown.clone();
    let synced = async {
        this.nodes.wait_synced().await;
        this.pods.wait_synced().await;
    };
    if shutdown.or_stop(synced).await.is_none() {
        return;
    }
    let work = move |task| {
        let this = this.clone();
        async move { this.reconcile(task).await }
    };
    run_controller(NAME, queue, 1, work, shutdown).await;
}

impl Controller {
    async fn reconcile(&self, task: Task) -> Result<Requeue, Error> {
        match task {
            Task::Node(name) => {
                let known = self.nodes.get("", &name).is_some();
                // The informer may lag; pods of a node that just came back must not be touched.
                if known || self.context.client.get_opt::<Node>(None, &name).await?.is_some() {
                    return Ok(Requeue::Done);
                }
                for key in self.on_node.on(&name) {
                    if let Some(pod) = self.pods.by_key(&key) {
                        self.remove(&pod, true).await?;
                    }
                }
            }
            Task::Pod(key) => {
                let unbound = |p: &Pod| {
                    p.spec
                        .as_ref()
                        .and_then(|s| s.node_name.as_deref())
                        .is_none_or(str::is_empty)
                };
                if let Some(pod) = self.pods.by_key(&key).filter(|p| is_deleting(&**p) && unbound(p)) {
                    self.remove(&pod, false).await?;
                }
            }
        }
        Ok(Requeue::Done)
    }

    async fn remove(&self, pod: &Pod, node_gone: bool) -> Result<(), Error> {
        let (client, ns, name) = (&self.context.client, pod.metadata.namespace.as_deref(), name_of(pod));
        if !is_terminal(pod) {
            let mut status = json!({"phase": "Failed"});
            if node_gone {
                status["conditions"] = json!([{
                    "type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC",
                    "message": "PodGC: node no longer exists",
                    "lastTransitionTime": apimachinery::time::rfc3339(self.context.now()),
                }]);
            }
            let patch = Patch::Strategic(json!({"metadata": {"uid": uid_of(pod)}, "status": status}));
            match client.patch::<Pod>(ns, name, &patch, Some("status")).await {
                Err(error) if error.is_not_found() || error.is_conflict() => return Ok(()),
                other => drop(other?),
            }
        }
        let params = DeleteParams {
            grace_period_s: Some(0),
            ..DeleteParams::uid(uid_of(pod))
        };
        match client.delete::<Pod>(ns, name, &params).await {
            Err(error) if !error.is_not_found() && !error.is_conflict() => Err(error),
            _ => {
                tracing::info!(pod = name, ns, node_gone, "removed a pod nobody else could");
                Ok(())
            }
        }
    }
}

//! Which node may read what: for every secret, config map, claim and service account, the nodes whose pods name it.
//!
//! The graph follows the pods' ring of events and is brought up to date by whoever asks, so it costs nothing while no node
//! asks and never lags behind a pod that is acknowledged. A pod is parsed when it is bound or its spec changes, not per
//! question.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use apimachinery::meta;
use parking_lot::Mutex;
use serde_json::Value;

use crate::object::Object;
use crate::registry::{EventKind, Next, Registry, Resource, Start};

/// Events taken from the ring at once.
const EVENTS_MAX: usize = 1024;
/// Pods that a kubelet makes of files name nothing that it may read.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// What a pod can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Named {
    Secret,
    ConfigMap,
    Claim,
    ServiceAccount,
}

type Target = (Named, Box<str>, Box<str>);

#[derive(Default)]
struct State {
    /// Next event to take; absent: the graph has to be built.
    cursor: Option<u64>,
    /// Target to the nodes that may read it, with the number of their pods that name it.
    edges: HashMap<Target, HashMap<Box<str>, usize>>,
    /// What each bound pod added, by its key: its node and targets.
    pods: HashMap<Box<str>, (Box<str>, Vec<Target>)>,
}

/// The graph of one cluster.
pub struct Graph {
    pods: Arc<Resource>,
    state: Mutex<State>,
}

impl Graph {
    pub fn new(registry: &Registry) -> Self {
        Graph {
            pods: registry.resource("", "pods"),
            state: Mutex::default(),
        }
    }

    /// Whether a pod on `node` names the object.
    pub fn reaches(&self, registry: &Registry, node: &str, named: Named, namespace: &str, name: &str) -> bool {
        let mut state = self.state.lock();
        self.catch_up(registry, &mut state);
        let target = (named, namespace.into(), name.into());
        state.edges.get(&target).is_some_and(|nodes| nodes.contains_key(node))
    }

    fn catch_up(&self, registry: &Registry, state: &mut State) {
        loop {
            let Some(cursor) = state.cursor else {
                self.rebuild(registry, state);
                continue;
            };
            match self.pods.events_from(cursor, EVENTS_MAX) {
                Next::Nothing => return,
                Next::FellOut { .. } => state.cursor = None,
                Next::Events(events) => {
                    for event in &events {
                        let key = key_of(&event.object);
                        if event.kind == EventKind::Deleted {
                            state.remove(&key);
                        } else if event.previous.as_ref().is_none_or(|old| !same(old, &event.object)) {
                            state.set(key, &event.object);
                        }
                    }
                    state.cursor = Some(cursor + events.len() as u64);
                }
            }
        }
    }

    fn rebuild(&self, registry: &Registry, state: &mut State) {
        *state = State::default();
        let view = registry.view(&self.pods);
        for (_, pod) in &view.objects {
            state.set(key_of(pod), pod);
        }
        // Nothing above the view's revision is in it, so the events after it are exactly what is missing.
        if let Start::At(cursor) = self.pods.start_after(view.revision) {
            state.cursor = Some(cursor);
        }
    }
}

fn key_of(pod: &Object) -> Box<str> {
    let header = pod.header();
    crate::registry::key(&header.namespace, &header.name).into()
}

/// The node a pod is bound to; empty if none.
pub fn node_of(pod: &Object) -> &str {
    pod.header().fields.first().map_or("", |f| f)
}

/// The spec is the same: its changes count generations, and so does binding.
fn same(old: &Object, new: &Object) -> bool {
    old.header().uid == new.header().uid
        && old.header().generation == new.header().generation
        && node_of(old) == node_of(new)
}

impl State {
    fn set(&mut self, key: Box<str>, pod: &Object) {
        self.remove(&key);
        let node: Box<str> = node_of(pod).into();
        if node.is_empty() {
            return;
        }
        let targets = targets(&pod.value());
        for target in &targets {
            *self
                .edges
                .entry(target.clone())
                .or_default()
                .entry(node.clone())
                .or_default() += 1;
        }
        self.pods.insert(key, (node, targets));
    }

    fn remove(&mut self, key: &str) {
        let Some((node, targets)) = self.pods.remove(key) else {
            return;
        };
        for target in targets {
            let Some(nodes) = self.edges.get_mut(&target) else {
                continue;
            };
            if let Some(count) = nodes.get_mut(&node) {
                *count -= 1;
                if *count == 0 {
                    nodes.remove(&node);
                }
            }
            if nodes.is_empty() {
                self.edges.remove(&target);
            }
        }
    }
}

/// Everything a pod names in its namespace, once each.
fn targets(pod: &Value) -> Vec<Target> {
    if meta::annotation(pod, MIRROR).is_some() {
        return Vec::new();
    }
    let namespace: Box<str> = meta::namespace(pod).into();
    let mut found: BTreeSet<(Named, Box<str>)> = BTreeSet::new();
    let mut add = |named: Named, name: &Value| {
        if let Some(name) = name.as_str().filter(|n| !n.is_empty()) {
            found.insert((named, name.into()));
        }
    };
    let spec = &pod["spec"];
    let list = |v: &'_ Value| -> Vec<Value> { v.as_array().cloned().unwrap_or_default() };
    let account = &spec["serviceAccountName"];
    if account.as_str().is_some_and(|a| !a.is_empty()) {
        add(Named::ServiceAccount, account);
    } else {
        add(Named::ServiceAccount, &"default".into());
    }
    for pull in list(&spec["imagePullSecrets"]) {
        add(Named::Secret, &pull["name"]);
    }
    for kind in ["containers", "initContainers", "ephemeralContainers"] {
        for container in list(&spec[kind]) {
            for from in list(&container["envFrom"]) {
                add(Named::Secret, &from["secretRef"]["name"]);
                add(Named::ConfigMap, &from["configMapRef"]["name"]);
            }
            for env in list(&container["env"]) {
                add(Named::Secret, &env["valueFrom"]["secretKeyRef"]["name"]);
                add(Named::ConfigMap, &env["valueFrom"]["configMapKeyRef"]["name"]);
            }
        }
    }
    for volume in list(&spec["volumes"]) {
        add(Named::Secret, &volume["secret"]["secretName"]);
        add(Named::ConfigMap, &volume["configMap"]["name"]);
        add(Named::Claim, &volume["persistentVolumeClaim"]["claimName"]);
        if volume["ephemeral"].is_object() {
            let claim = format!("{}-{}", meta::name(pod), volume["name"].as_str().unwrap_or_default());
            add(Named::Claim, &claim.into());
        }
        for source in list(&volume["projected"]["sources"]) {
            add(Named::Secret, &source["secret"]["name"]);
            add(Named::ConfigMap, &source["configMap"]["name"]);
        }
        add(Named::Secret, &volume["azureFile"]["secretName"]);
        add(Named::Secret, &volume["csi"]["nodePublishSecretRef"]["name"]);
        for kind in ["cephfs", "flexVolume", "iscsi", "rbd", "scaleIO", "storageos"] {
            add(Named::Secret, &volume[kind]["secretRef"]["name"]);
        }
    }
    found
        .into_iter()
        .map(|(named, name)| (named, namespace.clone(), name))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::object::Encoded;

    fn pod(name: &str, node: &str, generation: i64, spec: Value) -> Arc<Object> {
        let mut pod =
            json!({"metadata": {"name": name, "namespace": "n", "uid": name, "generation": generation}, "spec": spec});
        pod["spec"]["nodeName"] = node.into();
        Object::new(Encoded::new(&pod, crate::fields::selectable("", "pods")), 1)
    }

    #[test]
    fn edges_come_and_go_with_the_pods_that_make_them() {
        let spec = || {
            json!({"volumes": [{"secret": {"secretName": "s"}}, {"projected": {"sources": [{"configMap": {"name": "c"}}]}}],
            "containers": [{"env": [{"valueFrom": {"secretKeyRef": {"name": "s"}}}]}]})
        };
        let mut state = State::default();
        state.set("n/a".into(), &pod("a", "n1", 1, spec()));
        state.set("n/b".into(), &pod("b", "n1", 1, spec()));
        state.set("n/c".into(), &pod("c", "", 1, spec()));
        let secret = (Named::Secret, Box::from("n"), Box::from("s"));
        assert_eq!(state.edges[&secret], HashMap::from([("n1".into(), 2)]));
        assert!(
            state
                .edges
                .contains_key(&(Named::ServiceAccount, "n".into(), "default".into()))
        );
        state.remove("n/a");
        state.set("n/b".into(), &pod("b", "n2", 2, spec()));
        assert_eq!(state.edges[&secret], HashMap::from([("n2".into(), 1)]));
        state.remove("n/b");
        assert!(state.edges.is_empty() && state.pods.is_empty());
    }

    #[test]
    fn a_status_changes_no_edge() {
        let (old, new) = (pod("a", "n1", 1, json!({})), pod("a", "n1", 1, json!({})));
        assert!(same(&old, &new));
        assert!(!same(&old, &pod("a", "n1", 2, json!({}))));
        assert!(!same(&pod("a", "", 1, json!({})), &new));
    }
}

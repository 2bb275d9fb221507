//! The world as the scheduler believes it to be: nodes with their pods. A decided binding counts from the moment it is
//! decided ([`Cache::place`]), long before the API tells of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::model::{NodeInfo, PodInfo, Resources};

/// A node with what runs on it.
#[derive(Debug, Clone, Default)]
pub struct NodeState {
    /// The node.
    pub info: NodeInfo,
    /// Whether the API knows the node; pods can be bound to a name nobody registered.
    pub known: bool,
    /// Its pods by uid.
    pub pods: HashMap<String, Arc<PodInfo>>,
    /// Sum of requests.
    pub requested: Resources,
    /// Sum of what counts in comparisons: cpu in milli, memory in bytes.
    pub scored: (i64, i64),
    /// Pods per controller uid.
    pub owners: HashMap<String, i64>,
}

impl NodeState {
    fn add(&mut self, pod: Arc<PodInfo>) {
        self.requested.add(&pod.requests, 1);
        self.scored.0 += pod.score_requests.0;
        self.scored.1 += pod.score_requests.1;
        if let Some(owner) = &pod.owner {
            *self.owners.entry(owner.clone()).or_default() += 1;
        }
        self.pods.insert(pod.uid.clone(), pod);
    }

    fn remove(&mut self, uid: &str) -> Option<Arc<PodInfo>> {
        let pod = self.pods.remove(uid)?;
        self.requested.add(&pod.requests, -1);
        self.scored.0 -= pod.score_requests.0;
        self.scored.1 -= pod.score_requests.1;
        if let Some(owner) = &pod.owner
            && let Some(count) = self.owners.get_mut(owner)
        {
            *count -= 1;
            if *count == 0 {
                self.owners.remove(owner);
            }
        }
        Some(pod)
    }
}

/// Nodes, the pods on them, and namespace labels.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    nodes: Vec<NodeState>,
    index: HashMap<String, usize>,
    /// Uid of a placed pod to its node.
    placed: HashMap<String, String>,
    /// Uids of placed pods that keep others away.
    repelling: BTreeSet<String>,
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    /// Grows whenever something may have made room.
    generation: u64,
    /// Where the next search starts, so that load goes round.
    cursor: usize,
}

impl Cache {
    /// Adds or updates a node. Returns whether pods that found no place may now find one.
    pub fn set_node(&mut self, info: NodeInfo) -> bool {
        let at = self.slot(&info.name);
        let state = &mut self.nodes[at];
        if state.known && state.info == info {
            return false;
        }
        state.info = info;
        state.known = true;
        self.generation += 1;
        true
    }

    /// Forgets a node. Its pods stay counted until they are deleted, should it come back.
    pub fn remove_node(&mut self, name: &str) {
        if let Some(at) = self.index.get(name).copied() {
            self.nodes[at].known = false;
            if self.nodes[at].pods.is_empty() {
                self.drop_slot(at);
            }
        }
    }

    /// Sets or removes the labels of a namespace.
    pub fn set_namespace(&mut self, name: &str, labels: Option<BTreeMap<String, String>>) {
        match labels {
            Some(labels) => {
                self.namespaces.insert(name.to_owned(), labels);
            }
            None => {
                self.namespaces.remove(name);
            }
        }
    }

    /// Counts the pod on `node`, moving it if it was counted elsewhere.
    pub fn place(&mut self, pod: Arc<PodInfo>, node: &str) {
        self.take(&pod.uid);
        if !pod.anti_affinity.is_empty() {
            self.repelling.insert(pod.uid.clone());
        }
        self.placed.insert(pod.uid.clone(), node.to_owned());
        let at = self.slot(node);
        self.nodes[at].add(pod);
    }

    /// Stops counting the pod. Returns whether it was counted.
    pub fn remove_pod(&mut self, uid: &str) -> bool {
        let removed = self.take(uid);
        if removed {
            self.generation += 1;
        }
        removed
    }

    fn take(&mut self, uid: &str) -> bool {
        let Some(node) = self.placed.remove(uid) else {
            return false;
        };
        self.repelling.remove(uid);
        if let Some(at) = self.index.get(&node).copied() {
            self.nodes[at].remove(uid);
            if !self.nodes[at].known && self.nodes[at].pods.is_empty() {
                self.drop_slot(at);
            }
        }
        true
    }

    /// The node a pod is counted on.
    pub fn node_of(&self, uid: &str) -> Option<&str> {
        self.placed.get(uid).map(String::as_str)
    }

    /// The pod as it is counted.
    pub fn pod(&self, uid: &str) -> Option<&Arc<PodInfo>> {
        let at = self.index.get(self.placed.get(uid)?)?;
        self.nodes[*at].pods.get(uid)
    }

    /// Nodes the API knows, in a stable order.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeState> {
        self.nodes.iter().filter(|n| n.known)
    }

    /// Known nodes from the cursor on, once around.
    pub(crate) fn nodes_from_cursor(&self) -> impl Iterator<Item = &NodeState> {
        let start = if self.nodes.is_empty() {
            0
        } else {
            self.cursor % self.nodes.len()
        };
        self.nodes[start..]
            .iter()
            .chain(&self.nodes[..start])
            .filter(|n| n.known)
    }

    /// Moves the search on.
    pub fn advance(&mut self, by: usize) {
        self.cursor = self.cursor.wrapping_add(by.max(1));
    }

    /// Placed pods that keep others away, with the nodes they are on.
    pub(crate) fn repelling(&self) -> impl Iterator<Item = (&NodeState, &Arc<PodInfo>)> {
        self.repelling.iter().filter_map(|uid| {
            let at = self.index.get(self.placed.get(uid)?)?;
            let node = &self.nodes[*at];
            Some((node, node.pods.get(uid)?))
        })
    }

    /// Labels of every namespace.
    pub fn namespaces(&self) -> &BTreeMap<String, BTreeMap<String, String>> {
        &self.namespaces
    }

    /// Grows whenever something may have made room; a refusal holds until it does.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Says that something else may let refused pods in.
    pub fn touch(&mut self) {
        self.generation += 1;
    }

    fn slot(&mut self, name: &str) -> usize {
        if let Some(at) = self.index.get(name) {
            return *at;
        }
        let at = self.nodes.len();
        let info = NodeInfo {
            name: name.to_owned(),
            ..NodeInfo::default()
        };
        self.nodes.push(NodeState {
            info,
            ..NodeState::default()
        });
        self.index.insert(name.to_owned(), at);
        at
    }

    fn drop_slot(&mut self, at: usize) {
        let gone = self.nodes.swap_remove(at);
        self.index.remove(&gone.info.name);
        if let Some(moved) = self.nodes.get(at) {
            self.index.insert(moved.info.name.clone(), at);
        }
    }
}

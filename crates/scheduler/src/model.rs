//! Pods and nodes reduced to what placement looks at, parsed once per change.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use apimachinery::quantity::Quantity;
use apimachinery::selector::{LabelRequirement, LabelSelector, requirement};
use k8s_openapi::api::core::v1::{
    Container, Node, NodeSelectorTerm, Pod, PodAffinityTerm, ResourceRequirements, Taint, Toleration,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as WireQuantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector as WireSelector;
use reconcile::Key;

/// What a container without requests counts for when nodes are compared (not when they are filtered), as upstream.
const SCORE_CPU_MILLI: i64 = 100;
const SCORE_MEMORY_BYTES: i64 = 200 << 20;

/// Amounts of what nodes have and pods ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// Thousandths of a core.
    pub cpu_milli: i64,
    /// Bytes of memory.
    pub memory_bytes: i64,
    /// Bytes of local storage.
    pub ephemeral_bytes: i64,
    /// Extended resources and huge pages, in whole units.
    pub other: BTreeMap<String, i64>,
}

type WireResources = Option<BTreeMap<String, WireQuantity>>;

impl Resources {
    /// Reads a resource list; amounts that do not parse count as zero (the API server refuses them).
    pub fn parse(list: &WireResources) -> Self {
        let mut out = Self::default();
        for (name, quantity) in list.iter().flatten() {
            let Ok(quantity) = Quantity::parse(&quantity.0) else {
                continue;
            };
            match name.as_str() {
                "cpu" => out.cpu_milli = quantity.milli(),
                "memory" => out.memory_bytes = quantity.bytes(),
                "ephemeral-storage" => out.ephemeral_bytes = quantity.bytes(),
                "pods" => {}
                other => {
                    out.other.insert(other.to_owned(), quantity.units());
                }
            }
        }
        out
    }

    /// Adds `sign` times `more`.
    pub fn add(&mut self, more: &Self, sign: i64) {
        self.cpu_milli += sign * more.cpu_milli;
        self.memory_bytes += sign * more.memory_bytes;
        self.ephemeral_bytes += sign * more.ephemeral_bytes;
        for (name, amount) in &more.other {
            *self.other.entry(name.clone()).or_default() += sign * amount;
        }
    }

    fn max(&mut self, other: &Self) {
        self.cpu_milli = self.cpu_milli.max(other.cpu_milli);
        self.memory_bytes = self.memory_bytes.max(other.memory_bytes);
        self.ephemeral_bytes = self.ephemeral_bytes.max(other.ephemeral_bytes);
        for (name, amount) in &other.other {
            let mine = self.other.entry(name.clone()).or_default();
            *mine = (*mine).max(*amount);
        }
    }
}

/// A port on the node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// `0.0.0.0` for all addresses.
    pub address: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Port number.
    pub port: i32,
}

impl HostPort {
    /// Whether both cannot be on one node.
    pub fn conflicts(&self, other: &Self) -> bool {
        let everywhere = |p: &Self| p.address == "0.0.0.0";
        self.port == other.port
            && self.protocol == other.protocol
            && (self.address == other.address || everywhere(self) || everywhere(other))
    }
}

/// One alternative of a node affinity: all requirements must hold.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeTerm {
    labels: Vec<LabelRequirement>,
    /// Requirements on `metadata.name`.
    names: Vec<LabelRequirement>,
    /// A term that can match nothing: empty, or not understood.
    never: bool,
}

impl NodeTerm {
    fn parse(term: &NodeSelectorTerm) -> Self {
        let mut never = false;
        let mut parse = |list: &Option<Vec<k8s_openapi::api::core::v1::NodeSelectorRequirement>>| {
            let parsed: Vec<_> = list
                .iter()
                .flatten()
                .filter_map(|r| {
                    let parsed = requirement(&r.key, &r.operator, r.values.clone().unwrap_or_default());
                    never |= parsed.is_err();
                    parsed.ok()
                })
                .collect();
            parsed
        };
        let (labels, names) = (parse(&term.match_expressions), parse(&term.match_fields));
        let never = never || (labels.is_empty() && names.is_empty());
        Self { labels, names, never }
    }

    /// Whether the node satisfies the term.
    pub fn matches(&self, node: &NodeInfo) -> bool {
        let name = [("metadata.name", node.name.as_str())];
        !self.never
            && self.labels.iter().all(|r| r.matches(&node.labels))
            && self.names.iter().all(|r| r.matches(name.as_slice()))
    }
}

/// Which other pods a term is about, and over which nodes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodTerm {
    selector: LabelSelector,
    /// Namespaces by name.
    namespaces: BTreeSet<String>,
    /// Namespaces by label.
    namespace_selector: Option<LabelSelector>,
    /// Node label whose equal values make one place.
    pub topology_key: String,
}

impl PodTerm {
    fn parse(term: &PodAffinityTerm, namespace: &str) -> Self {
        let mut namespaces: BTreeSet<String> = term.namespaces.iter().flatten().cloned().collect();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.insert(namespace.to_owned());
        }
        Self {
            selector: selector(&term.label_selector),
            namespaces,
            namespace_selector: term
                .namespace_selector
                .is_some()
                .then(|| selector(&term.namespace_selector)),
            topology_key: term.topology_key.clone(),
        }
    }

    /// Whether `pod` is one of the pods the term is about.
    pub fn selects(&self, pod: &PodInfo, namespaces: &BTreeMap<String, BTreeMap<String, String>>) -> bool {
        let in_namespace = self.namespaces.contains(&pod.key.ns)
            || self
                .namespace_selector
                .as_ref()
                .is_some_and(|s| s.matches(&namespaces.get(&pod.key.ns)));
        in_namespace && self.selector.matches(&pod.labels)
    }
}

fn selector(typed: &Option<WireSelector>) -> LabelSelector {
    let value = serde_json::to_value(typed).unwrap_or_default();
    // The API server validates selectors; one that is bad all the same selects nothing.
    LabelSelector::from_object(&value).unwrap_or_else(|_| LabelSelector::nothing())
}

/// One topology spread constraint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Spread {
    /// Largest allowed difference to the least loaded place.
    pub max_skew: i64,
    /// Node label whose equal values make one place.
    pub topology_key: String,
    /// Refuse nodes rather than prefer others.
    pub hard: bool,
    /// Fewer places than this count as an empty one.
    pub min_domains: i64,
    /// Which pods are counted.
    pub selector: LabelSelector,
}

/// A pod as placement sees it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodInfo {
    /// Namespace and name.
    pub key: Key,
    /// Uid.
    pub uid: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// The node it is bound to; empty if none.
    pub node: String,
    /// What must fit.
    pub requests: Resources,
    /// What nodes are compared by: cpu in milli, memory in bytes.
    pub score_requests: (i64, i64),
    /// Ports it needs on the node.
    pub ports: Vec<HostPort>,
    /// `spec.nodeSelector`.
    pub node_selector: BTreeMap<String, String>,
    /// Required node affinity: one of the terms, if there are any terms.
    pub node_required: Option<Vec<NodeTerm>>,
    /// Preferred node affinity with weights.
    pub node_preferred: Vec<(i64, NodeTerm)>,
    /// Tolerations.
    pub tolerations: Vec<Toleration>,
    /// Places it must share.
    pub affinity: Vec<PodTerm>,
    /// Places it must not share.
    pub anti_affinity: Vec<PodTerm>,
    /// Places it likes (or, with a negative weight, dislikes) to share.
    pub pod_preferred: Vec<(i64, PodTerm)>,
    /// Explicit spread constraints.
    pub spread: Vec<Spread>,
    /// Uid of the controller; pods of one controller are spread by default.
    pub owner: Option<String>,
    /// Priority; higher is planned first.
    pub priority: i32,
    /// Scheduling gates hold it back.
    pub gated: bool,
    /// It has ended and needs nothing.
    pub terminal: bool,
    /// Deletion was asked for.
    pub deleting: bool,
    /// `spec.schedulerName`.
    pub scheduler: String,
    /// The reason and message its PodScheduled condition shows, if that is False.
    pub reported: Option<(String, String)>,
}

impl PodInfo {
    /// Reads a pod.
    pub fn parse(pod: &Pod) -> Self {
        let meta = &pod.metadata;
        let key = Key::new(
            meta.namespace.clone().unwrap_or_default(),
            meta.name.clone().unwrap_or_default(),
        );
        let mut info = Self {
            uid: meta.uid.clone().unwrap_or_default(),
            labels: meta.labels.clone().unwrap_or_default(),
            owner: meta
                .owner_references
                .iter()
                .flatten()
                .find(|o| o.controller == Some(true))
                .map(|o| o.uid.clone()),
            deleting: meta.deletion_timestamp.is_some(),
            key,
            ..Self::default()
        };
        if let Some(status) = &pod.status {
            info.terminal = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
            info.reported = status
                .conditions
                .iter()
                .flatten()
                .find(|c| c.type_ == "PodScheduled" && c.status == "False")
                .map(|c| {
                    (
                        c.reason.clone().unwrap_or_default(),
                        c.message.clone().unwrap_or_default(),
                    )
                });
        }
        let Some(spec) = &pod.spec else { return info };
        info.node = spec.node_name.clone().unwrap_or_default();
        info.scheduler = spec.scheduler_name.clone().unwrap_or_default();
        info.priority = spec.priority.unwrap_or_default();
        info.gated = spec.scheduling_gates.as_ref().is_some_and(|g| !g.is_empty());
        info.node_selector = spec.node_selector.clone().unwrap_or_default();
        info.tolerations = spec.tolerations.clone().unwrap_or_default();
        let (requests, score_requests) = requests(spec);
        (info.requests, info.score_requests) = (requests, score_requests);
        info.ports = spec
            .containers
            .iter()
            .flat_map(|c| c.ports.iter().flatten())
            .filter_map(|p| {
                let port = p.host_port.filter(|port| *port > 0)?;
                let address = p
                    .host_ip
                    .clone()
                    .filter(|ip| !ip.is_empty())
                    .unwrap_or_else(|| "0.0.0.0".to_owned());
                Some(HostPort {
                    address,
                    protocol: p.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                    port,
                })
            })
            .collect();
        info.spread = spec
            .topology_spread_constraints
            .iter()
            .flatten()
            .map(|c| Spread {
                max_skew: i64::from(c.max_skew),
                topology_key: c.topology_key.clone(),
                hard: c.when_unsatisfiable == "DoNotSchedule",
                min_domains: i64::from(c.min_domains.unwrap_or(1)),
                selector: selector(&c.label_selector),
            })
            .collect();
        let Some(affinity) = &spec.affinity else { return info };
        if let Some(node) = &affinity.node_affinity {
            info.node_required = node
                .required_during_scheduling_ignored_during_execution
                .as_ref()
                .map(|s| s.node_selector_terms.iter().map(NodeTerm::parse).collect());
            info.node_preferred = node
                .preferred_during_scheduling_ignored_during_execution
                .iter()
                .flatten()
                .map(|p| (i64::from(p.weight), NodeTerm::parse(&p.preference)))
                .collect();
        }
        let ns = info.key.ns.clone();
        let terms = |list: &Option<Vec<PodAffinityTerm>>| -> Vec<PodTerm> {
            list.iter().flatten().map(|t| PodTerm::parse(t, &ns)).collect()
        };
        if let Some(pods) = &affinity.pod_affinity {
            info.affinity = terms(&pods.required_during_scheduling_ignored_during_execution);
            for p in pods
                .preferred_during_scheduling_ignored_during_execution
                .iter()
                .flatten()
            {
                info.pod_preferred
                    .push((i64::from(p.weight), PodTerm::parse(&p.pod_affinity_term, &ns)));
            }
        }
        if let Some(pods) = &affinity.pod_anti_affinity {
            info.anti_affinity = terms(&pods.required_during_scheduling_ignored_during_execution);
            for p in pods
                .preferred_during_scheduling_ignored_during_execution
                .iter()
                .flatten()
            {
                info.pod_preferred
                    .push((-i64::from(p.weight), PodTerm::parse(&p.pod_affinity_term, &ns)));
            }
        }
        info
    }

    /// Equal for pods that placement cannot tell apart, so that one refusal answers for all of them.
    pub fn class(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.key.ns.hash(&mut hasher);
        self.labels.hash(&mut hasher);
        let r = &self.requests;
        (r.cpu_milli, r.memory_bytes, r.ephemeral_bytes, &r.other, &self.ports).hash(&mut hasher);
        (
            &self.node_selector,
            &self.node_required,
            &self.affinity,
            &self.anti_affinity,
        )
            .hash(&mut hasher);
        self.spread.hash(&mut hasher);
        for t in &self.tolerations {
            (&t.key, &t.operator, &t.value, &t.effect).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Whether the pod accepts the taint.
    pub fn tolerates(&self, taint: &Taint) -> bool {
        self.tolerations.iter().any(|t| tolerates(t, taint))
    }
}

/// Whether one toleration accepts the taint.
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    if (!effect.is_empty() && effect != taint.effect) || (!key.is_empty() && key != taint.key) {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or_default() {
        "Exists" => true,
        "" | "Equal" => {
            !key.is_empty()
                && toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
        }
        _ => false,
    }
}

/// What the pod needs at its largest moment, and what it counts for in comparisons.
fn requests(spec: &k8s_openapi::api::core::v1::PodSpec) -> (Resources, (i64, i64)) {
    let of = |c: &Container| {
        c.resources
            .as_ref()
            .map(|r: &ResourceRequirements| Resources::parse(&r.requests))
            .unwrap_or_default()
    };
    let with_floor = |mut r: Resources, set: &Container| {
        let has = |name| {
            set.resources
                .as_ref()
                .and_then(|r| r.requests.as_ref())
                .is_some_and(|l| l.contains_key(name))
        };
        if !has("cpu") {
            r.cpu_milli = SCORE_CPU_MILLI;
        }
        if !has("memory") {
            r.memory_bytes = SCORE_MEMORY_BYTES;
        }
        r
    };
    let total = |floor: bool| {
        let amount = |c: &Container| if floor { with_floor(of(c), c) } else { of(c) };
        let mut running = Resources::default();
        for container in &spec.containers {
            running.add(&amount(container), 1);
        }
        // Restartable init containers run beside everything that starts after them.
        let (mut sidecars, mut peak) = (Resources::default(), Resources::default());
        for container in spec.init_containers.iter().flatten() {
            let mut now = sidecars.clone();
            now.add(&amount(container), 1);
            if container.restart_policy.as_deref() == Some("Always") {
                sidecars = now.clone();
            }
            peak.max(&now);
        }
        running.add(&sidecars, 1);
        running.max(&peak);
        if let Some(pod_level) = spec.resources.as_ref().and_then(|r| r.requests.as_ref()) {
            let set = Resources::parse(&Some(pod_level.clone()));
            if pod_level.contains_key("cpu") {
                running.cpu_milli = set.cpu_milli;
            }
            if pod_level.contains_key("memory") {
                running.memory_bytes = set.memory_bytes;
            }
        }
        running.add(&Resources::parse(&spec.overhead), 1);
        running
    };
    let scored = total(true);
    (total(false), (scored.cpu_milli, scored.memory_bytes))
}

/// A node as placement sees it, without its pods.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeInfo {
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Taints.
    pub taints: Vec<Taint>,
    /// `spec.unschedulable`.
    pub unschedulable: bool,
    /// The node's Ready condition is there and not True.
    pub not_ready: bool,
    /// What pods may use.
    pub allocatable: Resources,
    /// How many pods may run.
    pub pods_max: i64,
    /// Backed by container groups rather than a machine.
    pub is_virtual: bool,
}

impl NodeInfo {
    /// Reads a node.
    pub fn parse(node: &Node) -> Self {
        let labels = node.metadata.labels.clone().unwrap_or_default();
        let taints = node.spec.as_ref().and_then(|s| s.taints.clone()).unwrap_or_default();
        let status = node.status.as_ref();
        let allocatable = status.and_then(|s| s.allocatable.clone().or_else(|| s.capacity.clone()));
        let pods_max = allocatable
            .as_ref()
            .and_then(|list| list.get("pods"))
            .and_then(|q| Quantity::parse(&q.0).ok())
            .map_or(0, |q| q.units());
        // Both generations of virtual nodes, by label or by the taint that existing manifests tolerate.
        let is_virtual = labels.get("type").is_some_and(|t| t == "virtual-kubelet")
            || labels.contains_key("virtualization")
            || taints
                .iter()
                .any(|t| t.key == "virtual-kubelet.io/provider" || t.key == "azure.com/aci");
        Self {
            name: node.metadata.name.clone().unwrap_or_default(),
            unschedulable: node.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or_default(),
            not_ready: status
                .and_then(|s| s.conditions.as_ref())
                .and_then(|list| list.iter().find(|c| c.type_ == "Ready"))
                .is_some_and(|c| c.status != "True"),
            allocatable: Resources::parse(&allocatable),
            pods_max,
            is_virtual,
            labels,
            taints,
        }
    }
}

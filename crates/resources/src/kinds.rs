//! The kinds, one struct each, and the table of them that the API server and the CRD generator read.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::site::{SiteSpec, SiteStatus};

/// API group of every platform kind.
pub const GROUP: &str = "oaks.internal";
/// The one served version.
pub const VERSION: &str = "v1alpha1";

/// Spec of a kind that ARM shows: nothing of what was sent is lost.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ArmSpec {
    /// ARM id in the casing of its first creation.
    pub id: String,
    /// The whole ARM body as sent (`location`, `tags`, `properties`, `identity`, `sku`, unknown fields included).
    #[serde(default)]
    pub body: Value,
}

/// Status of a kind that ARM shows.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ArmStatus {
    /// ARM's `provisioningState`: Creating, Updating, Deleting, Succeeded, Failed, Canceled.
    #[serde(default)]
    pub provisioning_state: String,
    #[serde(default)]
    pub observed_generation: i64,
    /// Read-only properties that GET merges over the body's `properties`.
    #[serde(default)]
    pub properties: Value,
    /// Why the state is Failed: ARM error code and message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ArmError>,
    /// What the reconciler is doing right now, in plain words, newest last (bounded to 16).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<String>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
pub struct ArmError {
    pub code: String,
    pub message: String,
}

/// How one kind is served: input for the built-in registration at home and for generated CRDs elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct KindInfo {
    pub kind: &'static str,
    pub plural: &'static str,
    pub singular: &'static str,
    pub short_names: &'static [&'static str],
    /// JSON pointer-like column paths: `(title, type, jsonPath)`.
    pub columns: &'static [(&'static str, &'static str, &'static str)],
}

macro_rules! kind {
    ($(#[$doc:meta])* $name:ident, $plural:literal, $spec:ty, $status:ty) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            #[serde(default = "api_version")]
            pub api_version: String,
            #[serde(default)]
            pub kind: String,
            #[serde(default)]
            pub metadata: ObjectMeta,
            #[serde(default)]
            pub spec: $spec,
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub status: Option<$status>,
        }

        impl $name {
            /// An object of this kind with `name` and `spec`, ready to be created.
            pub fn new(name: impl Into<String>, spec: $spec) -> Self {
                Self {
                    api_version: api_version(),
                    kind: stringify!($name).to_owned(),
                    metadata: ObjectMeta { name: Some(name.into()), ..Default::default() },
                    spec,
                    status: None,
                }
            }

            pub fn name(&self) -> &str {
                self.metadata.name.as_deref().unwrap_or_default()
            }
        }

        impl k8s_openapi::Resource for $name {
            const API_VERSION: &'static str = "oaks.internal/v1alpha1";
            const GROUP: &'static str = GROUP;
            const KIND: &'static str = stringify!($name);
            const VERSION: &'static str = VERSION;
            const URL_PATH_SEGMENT: &'static str = $plural;
            type Scope = k8s_openapi::ClusterResourceScope;
        }

        impl k8s_openapi::Metadata for $name {
            type Ty = ObjectMeta;
            fn metadata(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn metadata_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

fn api_version() -> String {
    format!("{GROUP}/{VERSION}")
}

kind!(ResourceGroup, "resourcegroups", ArmSpec, ArmStatus);
kind!(
    /// `Microsoft.Network/virtualNetworks`; subnets live in the body (`properties.subnets[]`).
    VirtualNetwork, "virtualnetworks", ArmSpec, ArmStatus
);
kind!(
    /// `Microsoft.Network/networkInterfaces`. The allocator writes `status.properties.ipConfigurations[]` =
    /// `{name, properties: {privateIPAddress, primary}}` and `status.properties.macAddress`.
    NetworkInterface, "networkinterfaces", ArmSpec, ArmStatus
);
kind!(
    /// `Microsoft.Network/publicIPAddresses`. The allocator writes `status.properties.ipAddress` from the edge's pool.
    PublicIPAddress, "publicipaddresses", ArmSpec, ArmStatus
);
kind!(
    /// `Microsoft.Network/loadBalancers`. Besides the ARM body, `spec.body.oaks.backends` holds the translated frontends
    /// (see [`crate::views::LbFrontend`]) that `managed-cluster` keeps equal to the Service's ready endpoints.
    LoadBalancer, "loadbalancers", ArmSpec, ArmStatus
);
kind!(
    /// `Microsoft.Network/networkSecurityGroups`; rules live in the body (`properties.securityRules[]`).
    NetworkSecurityGroup, "networksecuritygroups", ArmSpec, ArmStatus
);
kind!(
    /// `Microsoft.Network/applicationSecurityGroups`: a name for addresses; NICs' configurations say that they are in it.
    ApplicationSecurityGroup, "applicationsecuritygroups", ArmSpec, ArmStatus
);
kind!(
    /// `Microsoft.Network/privateDnsZones`; record sets and links live in the body (see [`crate::private_dns`]).
    PrivateDnsZone, "privatednszones", ArmSpec, ArmStatus
);
kind!(
    /// `Microsoft.Network/routeTables`; routes live in the body (`properties.routes[]`).
    RouteTable, "routetables", ArmSpec, ArmStatus
);
kind!(
    /// `Microsoft.Network/natGateways`.
    NatGateway, "natgateways", ArmSpec, ArmStatus
);
kind!(
    /// `Microsoft.Network/publicIPPrefixes`. The allocator writes `status.properties.ipPrefix`, a block of the edge's pool.
    PublicIPPrefix, "publicipprefixes", ArmSpec, ArmStatus
);
kind!(ManagedCluster, "managedclusters", ArmSpec, ArmStatus);
kind!(AgentPool, "agentpools", ArmSpec, ArmStatus);
kind!(
    /// `Microsoft.ContainerInstance/containerGroups`; also the record of a virtual node's pod.
    ContainerGroup, "containergroups", ArmSpec, ArmStatus
);
kind!(
    /// `Microsoft.Authorization/roleAssignments` at any scope.
    RoleAssignment, "roleassignments", ArmSpec, ArmStatus
);
kind!(
    /// One machine: a node of a cluster in namespaces of its own on some host.
    Machine, "machines", MachineSpec, MachineStatus
);
kind!(
    /// One physical host of the platform and its agent. A platform on a single host has none.
    Host, "hosts", HostSpec, HostStatus
);
kind!(
    /// One on-premises site of a virtual network.
    Site, "sites", SiteSpec, SiteStatus
);
kind!(
    /// One virtual node of a cluster, run by a host agent.
    VirtualNode, "virtualnodes", VirtualNodeSpec, MachineStatus
);
kind!(
    /// A long-running ARM operation; deleted an hour after it ended.
    Operation, "operations", OperationSpec, OperationStatus
);

/// How a node reaches its cluster. `secret` names a Secret in home's `kube-system` with the keys `ca.crt`, `tls.crt`,
/// `tls.key` (client certificate of `system:node:<name>`, group `system:nodes`).
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct NodeBootstrap {
    /// Name of the hosted cluster (`HostedCluster` key in the API server), for the Dialer and for logs.
    pub cluster: String,
    /// `https://198.19.0.4:443`: the cluster's address in the public pool.
    pub api_server: String,
    pub secret: String,
    pub service_cidr: String,
    /// Cluster DNS address, inside `service_cidr`.
    pub dns_service_ip: String,
    /// `cluster.local`.
    #[serde(default)]
    pub cluster_domain: String,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct MachineSpec {
    /// Kubernetes node name, also the host name inside.
    pub node_name: String,
    /// Home object name of the AgentPool.
    pub pool: String,
    /// Home object name of the NetworkInterface.
    pub nic: String,
    pub vm_size: String,
    /// From the vmSize table: capacity that the node advertises and that its cgroup enforces.
    pub cpu_milli: i64,
    pub memory_bytes: i64,
    pub max_pods: i64,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// `key=value:Effect`.
    #[serde(default)]
    pub taints: Vec<String>,
    pub bootstrap: NodeBootstrap,
    /// False = powered off, data kept.
    #[serde(default = "yes")]
    pub running: bool,
    /// Home object name of the Host that runs it: chosen once, when there are Hosts.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub host: String,
}

/// Written by the host's agent.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct HostSpec {
    /// IPv4 address that the other hosts reach this one at; empty until its agent has started.
    #[serde(default)]
    pub underlay: String,
    /// The host that the platform's own processes stand on: API endpoints are in its edge, virtual nodes are its.
    #[serde(default)]
    pub primary: bool,
    #[serde(default)]
    pub cpu_milli: i64,
    #[serde(default)]
    pub memory_bytes: i64,
}

/// Written by the platform.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct HostStatus {
    /// Joining, Ready, NotReady.
    #[serde(default)]
    pub phase: String,
    #[serde(default)]
    pub message: String,
    /// Unique among the hosts while they are there, 1 to 4095; 0 until it is given.
    #[serde(default)]
    pub number: u16,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct MachineStatus {
    /// Pending, Starting, Running, Stopping, Stopped, Failed.
    #[serde(default)]
    pub phase: String,
    #[serde(default)]
    pub message: String,
    /// Host agent that runs it.
    #[serde(default)]
    pub host: String,
    #[serde(default)]
    pub pid: i64,
    #[serde(default)]
    pub observed_generation: i64,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct VirtualNodeSpec {
    /// Kubernetes node name, for example `virtual-node-aci-linux`.
    pub node_name: String,
    /// Home object name of the ManagedCluster that owns it.
    pub managed_cluster: String,
    /// Home object name of the VirtualNetwork, and the delegated subnet's name in it.
    pub virtual_network: String,
    pub subnet: String,
    /// Home object name of the node's own NetworkInterface: its kubelet API answers at that address, which stands in the
    /// serving certificate.
    #[serde(default)]
    pub nic: String,
    /// ARM resource group id that groups are recorded under (the node resource group).
    pub group_scope: String,
    pub cpu_milli: i64,
    pub memory_bytes: i64,
    pub max_pods: i64,
    pub bootstrap: NodeBootstrap,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct OperationSpec {
    /// ARM id of the resource being changed.
    pub resource: String,
    /// `PUT`, `DELETE`, `POST <action>`.
    pub verb: String,
    /// Kind whose object carries the work (an agent pool's work shows at its ManagedCluster), by plural and object name.
    #[serde(default)]
    pub plural: String,
    #[serde(default)]
    pub object: String,
    /// The object's uid and the generation that this operation wrote: done when status has observed it, or when a deleted
    /// object of this uid is gone.
    #[serde(default)]
    pub uid: String,
    #[serde(default)]
    pub generation: i64,
    pub start_time: String,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct OperationStatus {
    /// InProgress, Succeeded, Failed, Canceled.
    pub status: String,
    #[serde(default)]
    pub end_time: Option<String>,
    #[serde(default)]
    pub error: Option<ArmError>,
}

const STATE: (&str, &str, &str) = ("State", "string", ".status.provisioningState");
const ID: (&str, &str, &str) = ("ID", "string", ".spec.id");
const PHASE: (&str, &str, &str) = ("Phase", "string", ".status.phase");
const NODE: (&str, &str, &str) = ("Node", "string", ".spec.nodeName");

/// Every platform kind, in dependency order (parents first).
pub const KINDS: &[KindInfo] = &[
    KindInfo {
        kind: "ResourceGroup",
        plural: "resourcegroups",
        singular: "resourcegroup",
        short_names: &["rg"],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "NetworkSecurityGroup",
        plural: "networksecuritygroups",
        singular: "networksecuritygroup",
        short_names: &["nsg"],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "ApplicationSecurityGroup",
        plural: "applicationsecuritygroups",
        singular: "applicationsecuritygroup",
        short_names: &["asg"],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "PrivateDnsZone",
        plural: "privatednszones",
        singular: "privatednszone",
        short_names: &[],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "RouteTable",
        plural: "routetables",
        singular: "routetable",
        short_names: &[],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "VirtualNetwork",
        plural: "virtualnetworks",
        singular: "virtualnetwork",
        short_names: &["vnet"],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "NetworkInterface",
        plural: "networkinterfaces",
        singular: "networkinterface",
        short_names: &["nic"],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "PublicIPAddress",
        plural: "publicipaddresses",
        singular: "publicipaddress",
        short_names: &["pip"],
        columns: &[STATE, ("Address", "string", ".status.properties.ipAddress"), ID],
    },
    KindInfo {
        kind: "NatGateway",
        plural: "natgateways",
        singular: "natgateway",
        short_names: &[],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "PublicIPPrefix",
        plural: "publicipprefixes",
        singular: "publicipprefix",
        short_names: &[],
        columns: &[STATE, ("Prefix", "string", ".status.properties.ipPrefix"), ID],
    },
    KindInfo {
        kind: "LoadBalancer",
        plural: "loadbalancers",
        singular: "loadbalancer",
        short_names: &["lb"],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "ManagedCluster",
        plural: "managedclusters",
        singular: "managedcluster",
        short_names: &["aks"],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "AgentPool",
        plural: "agentpools",
        singular: "agentpool",
        short_names: &["pool"],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "ContainerGroup",
        plural: "containergroups",
        singular: "containergroup",
        short_names: &["aci"],
        columns: &[STATE, ID],
    },
    KindInfo {
        kind: "RoleAssignment",
        plural: "roleassignments",
        singular: "roleassignment",
        short_names: &[],
        columns: &[ID],
    },
    KindInfo {
        kind: "Machine",
        plural: "machines",
        singular: "machine",
        short_names: &["vm"],
        columns: &[PHASE, NODE],
    },
    KindInfo {
        kind: "Host",
        plural: "hosts",
        singular: "host",
        short_names: &[],
        columns: &[
            PHASE,
            ("Underlay", "string", ".spec.underlay"),
            ("Message", "string", ".status.message"),
        ],
    },
    KindInfo {
        kind: "Site",
        plural: "sites",
        singular: "site",
        short_names: &[],
        columns: &[
            PHASE,
            ("Public-Key", "string", ".status.publicKey"),
            ("Message", "string", ".status.message"),
        ],
    },
    KindInfo {
        kind: "VirtualNode",
        plural: "virtualnodes",
        singular: "virtualnode",
        short_names: &["vn"],
        columns: &[PHASE, NODE],
    },
    KindInfo {
        kind: "Operation",
        plural: "operations",
        singular: "operation",
        short_names: &[],
        columns: &[("Status", "string", ".status.status")],
    },
];

/// OpenAPI v3 schema that every platform kind shares: metadata plus open `spec` and `status`.
/// Unknown fields are kept in both, since `spec.body` must hold whatever a client sent.
pub fn schema() -> Value {
    serde_json::json!({
        "type": "object",
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        }
    })
}

/// The column that ends every kind's table.
const AGE: (&str, &str, &str) = ("Age", "date", ".metadata.creationTimestamp");

/// [`KINDS`] as the API server registers them.
pub fn kind_defs() -> Vec<apimachinery::table::KindDef> {
    let column = |(name, ty, path): &(&str, &str, &str)| apimachinery::table::PrinterColumn {
        name: (*name).to_owned(),
        ty: (*ty).to_owned(),
        json_path: (*path).to_owned(),
        priority: 0,
        format: String::new(),
        description: String::new(),
    };
    let words = |w: &[&str]| w.iter().map(|s| (*s).to_owned()).collect();
    KINDS
        .iter()
        .map(|k| apimachinery::table::KindDef {
            group: GROUP.to_owned(),
            version: VERSION.to_owned(),
            kind: k.kind.to_owned(),
            plural: k.plural.to_owned(),
            singular: k.singular.to_owned(),
            namespaced: false,
            short_names: words(k.short_names),
            categories: words(&["oaks"]),
            columns: k.columns.iter().chain(&[AGE]).map(column).collect(),
            schema: schema().into(),
            status_subresource: true,
            more: apimachinery::table::KindMore::default(),
        })
        .collect()
}

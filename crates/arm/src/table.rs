//! The table of resource types that are served, and how each is stored. Everything generic in this crate reads it.

/// Where the objects of a type live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// One home object each, of this plural.
    Object { plural: &'static str },
    /// An element of an array in the parent's body. The parent is the single place of intent, so that writing the child
    /// alone and writing the whole parent cannot disagree.
    Embedded {
        plural: &'static str,
        /// `properties.<array>`.
        array: &'static str,
        /// True: elements are `{name, ...fields}`; false: `{name, properties: {...}}`.
        flat: bool,
    },
}

impl Storage {
    /// Plural of the home object that carries the intent.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Object { plural } | Self::Embedded { plural, .. } => plural,
        }
    }
}

/// One served type.
#[derive(Clone, Copy, Debug)]
pub struct ResourceType {
    /// `Microsoft.Network`.
    pub provider: &'static str,
    /// Type segments below the provider, outermost first.
    pub path: &'static [&'static str],
    pub storage: Storage,
    /// Versions to publish, newest first: `az resource show` takes the first stable one.
    pub versions: &'static [&'static str],
    /// False: written by the platform only; clients can read.
    pub writable: bool,
    /// Name of the top-level entity tag in a body: AKS says `eTag`, the others `etag`.
    pub etag: &'static str,
    /// POST actions.
    pub actions: &'static [&'static str],
}

impl ResourceType {
    /// `Microsoft.Network/virtualNetworks/subnets`.
    pub fn full(&self) -> String {
        format!("{}/{}", self.provider, self.path.join("/"))
    }
}

const NETWORK: &[&str] = &[
    "2025-09-01",
    "2025-07-01",
    "2024-07-01",
    "2024-05-01",
    "2023-11-01",
    "2023-05-01",
    "2022-01-01",
    "2021-08-01",
];
const PRIVATE_DNS: &[&str] = &["2024-06-01", "2020-06-01", "2020-01-01", "2018-09-01"];
const AKS: &[&str] = &[
    "2026-06-01",
    "2026-04-01",
    "2025-10-01",
    "2025-01-01",
    "2024-09-01",
    "2023-05-01",
    "2022-04-01",
];
const ACI: &[&str] = &[
    "2025-09-01",
    "2024-05-01-preview",
    "2023-05-01",
    "2022-09-01",
    "2021-09-01",
];

/// Record sets of one type, or links: elements of their zone's body.
const fn zone_child(path: &'static [&'static str], array: &'static str) -> ResourceType {
    ResourceType {
        provider: "Microsoft.Network",
        path,
        storage: Storage::Embedded {
            plural: "privatednszones",
            array,
            flat: false,
        },
        versions: PRIVATE_DNS,
        writable: true,
        etag: "etag",
        actions: &[],
    }
}

/// A part of a load balancer. ARM lets clients write pools and inbound NAT rules alone, the others with their load balancer.
const fn balancer_child(path: &'static [&'static str], array: &'static str, writable: bool) -> ResourceType {
    ResourceType {
        provider: "Microsoft.Network",
        path,
        storage: Storage::Embedded {
            plural: "loadbalancers",
            array,
            flat: false,
        },
        versions: NETWORK,
        writable,
        etag: "etag",
        actions: &[],
    }
}

/// Every served type, parents before children.
pub const TYPES: &[ResourceType] = &[
    ResourceType {
        provider: "Microsoft.Network",
        path: &["virtualNetworks"],
        storage: Storage::Object {
            plural: "virtualnetworks",
        },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["virtualNetworks", "subnets"],
        storage: Storage::Embedded {
            plural: "virtualnetworks",
            array: "subnets",
            flat: false,
        },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["virtualNetworks", "virtualNetworkPeerings"],
        storage: Storage::Embedded {
            plural: "virtualnetworks",
            array: "virtualNetworkPeerings",
            flat: false,
        },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["networkSecurityGroups"],
        storage: Storage::Object {
            plural: "networksecuritygroups",
        },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["networkSecurityGroups", "securityRules"],
        storage: Storage::Embedded {
            plural: "networksecuritygroups",
            array: "securityRules",
            flat: false,
        },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["applicationSecurityGroups"],
        storage: Storage::Object {
            plural: "applicationsecuritygroups",
        },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["routeTables"],
        storage: Storage::Object { plural: "routetables" },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["routeTables", "routes"],
        storage: Storage::Embedded {
            plural: "routetables",
            array: "routes",
            flat: false,
        },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["networkInterfaces"],
        storage: Storage::Object {
            plural: "networkinterfaces",
        },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["publicIPAddresses"],
        storage: Storage::Object {
            plural: "publicipaddresses",
        },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["loadBalancers"],
        storage: Storage::Object {
            plural: "loadbalancers",
        },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    balancer_child(
        &["loadBalancers", "frontendIPConfigurations"],
        "frontendIPConfigurations",
        false,
    ),
    balancer_child(&["loadBalancers", "backendAddressPools"], "backendAddressPools", true),
    balancer_child(&["loadBalancers", "loadBalancingRules"], "loadBalancingRules", false),
    balancer_child(&["loadBalancers", "probes"], "probes", false),
    balancer_child(&["loadBalancers", "inboundNatRules"], "inboundNatRules", true),
    balancer_child(&["loadBalancers", "outboundRules"], "outboundRules", false),
    ResourceType {
        provider: "Microsoft.Network",
        path: &["natGateways"],
        storage: Storage::Object { plural: "natgateways" },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["publicIPPrefixes"],
        storage: Storage::Object {
            plural: "publicipprefixes",
        },
        versions: NETWORK,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.Network",
        path: &["privateDnsZones"],
        storage: Storage::Object {
            plural: "privatednszones",
        },
        versions: PRIVATE_DNS,
        writable: true,
        etag: "etag",
        actions: &[],
    },
    zone_child(&["privateDnsZones", "virtualNetworkLinks"], "virtualNetworkLinks"),
    zone_child(&["privateDnsZones", "A"], "A"),
    zone_child(&["privateDnsZones", "AAAA"], "AAAA"),
    zone_child(&["privateDnsZones", "CNAME"], "CNAME"),
    zone_child(&["privateDnsZones", "MX"], "MX"),
    zone_child(&["privateDnsZones", "PTR"], "PTR"),
    zone_child(&["privateDnsZones", "SOA"], "SOA"),
    zone_child(&["privateDnsZones", "SRV"], "SRV"),
    zone_child(&["privateDnsZones", "TXT"], "TXT"),
    ResourceType {
        provider: "Microsoft.ContainerService",
        path: &["managedClusters"],
        storage: Storage::Object {
            plural: "managedclusters",
        },
        versions: AKS,
        writable: true,
        etag: "eTag",
        actions: &[
            "listClusterUserCredential",
            "listClusterAdminCredential",
            "start",
            "stop",
        ],
    },
    ResourceType {
        provider: "Microsoft.ContainerService",
        path: &["managedClusters", "agentPools"],
        storage: Storage::Embedded {
            plural: "managedclusters",
            array: "agentPoolProfiles",
            flat: true,
        },
        versions: AKS,
        writable: true,
        etag: "eTag",
        actions: &[],
    },
    ResourceType {
        provider: "Microsoft.ContainerInstance",
        path: &["containerGroups"],
        storage: Storage::Object {
            plural: "containergroups",
        },
        versions: ACI,
        writable: false,
        etag: "etag",
        actions: &[],
    },
];

/// Providers that answer without resource objects of their own: published types only.
pub const OTHER_TYPES: &[(&str, &str, &[&str])] = &[
    (
        "Microsoft.Resources",
        "resourceGroups",
        &["2024-11-01", "2022-09-01", "2021-04-01"],
    ),
    ("Microsoft.Resources", "deployments", crate::deployment::VERSIONS),
    ("Microsoft.Resources", "subscriptions", &["2022-12-01", "2019-11-01"]),
    (
        "Microsoft.Authorization",
        "roleAssignments",
        &["2022-04-01", "2020-04-01-preview"],
    ),
    (
        "Microsoft.Authorization",
        "roleDefinitions",
        &["2022-05-01-preview", "2022-04-01", "2018-01-01-preview"],
    ),
    ("Microsoft.Compute", "locations/usages", &["2024-11-01", "2022-08-01"]),
];

/// Canonical spelling of a provider namespace; `None` if nothing of it is served.
pub fn provider(ns: &str) -> Option<&'static str> {
    providers().into_iter().find(|p| p.eq_ignore_ascii_case(ns))
}

/// Every provider namespace, each once.
pub fn providers() -> Vec<&'static str> {
    let mut out: Vec<&'static str> = TYPES
        .iter()
        .map(|t| t.provider)
        .chain(OTHER_TYPES.iter().map(|t| t.0))
        .collect();
    out.sort_unstable();
    out.dedup();
    out
}

/// The type at `path` below `ns`, compared without regard to case.
pub fn find(ns: &str, path: &[&str]) -> Option<&'static ResourceType> {
    TYPES.iter().find(|t| {
        t.provider.eq_ignore_ascii_case(ns)
            && t.path.len() == path.len()
            && t.path.iter().zip(path).all(|(a, b)| a.eq_ignore_ascii_case(b))
    })
}

/// Top-level type stored under `plural`.
pub fn by_plural(plural: &str) -> Option<&'static ResourceType> {
    TYPES
        .iter()
        .find(|t| matches!(t.storage, Storage::Object { plural: p } if p == plural))
}

/// Plurals of every top-level type, in table order.
pub fn plurals() -> impl Iterator<Item = &'static str> {
    TYPES.iter().filter_map(|t| match t.storage {
        Storage::Object { plural } => Some(plural),
        Storage::Embedded { .. } => None,
    })
}

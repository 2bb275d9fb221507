//! What the instance metadata service tells a machine about itself.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// Where instance metadata is served in every virtual network.
pub const METADATA_SERVICE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// The machine behind a NIC; its addresses are the NIC's own.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceSpec {
    /// Name, and a GUID that stays for the machine's life.
    pub name: String,
    pub vm_id: String,
    /// ARM id, and its parts.
    pub resource_id: String,
    pub subscription: String,
    pub resource_group: String,
    pub location: String,
    pub vm_size: String,
    /// The agent pool, as a scale set's name.
    #[serde(default)]
    pub scale_set: String,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// Identities that its tokens can be of; the first is the one that is meant by a request that names none.
    #[serde(default)]
    pub identities: Vec<IdentitySpec>,
}

/// A managed identity.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentitySpec {
    pub client_id: String,
    pub object_id: String,
    /// ARM id of the user-assigned identity.
    pub resource_id: String,
}

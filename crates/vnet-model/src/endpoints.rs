//! Service endpoints of subnets: the services that have them, and the prefixes that they route directly.
//!
//! # Source
//! Azure Virtual Network, "Virtual network service endpoints": each service's name, and the tag that its addresses have.

use ipnet::Ipv4Net;

use crate::service_tags::ServiceTags;

/// Services by the name that a subnet gives, and their service tags.
pub const SERVICES: &[(&str, &str)] = &[
    ("Microsoft.AzureActiveDirectory", "AzureActiveDirectory"),
    ("Microsoft.AzureCosmosDB", "AzureCosmosDB"),
    ("Microsoft.CognitiveServices", "CognitiveServicesManagement"),
    ("Microsoft.ContainerRegistry", "AzureContainerRegistry"),
    ("Microsoft.EventHub", "EventHub"),
    ("Microsoft.KeyVault", "AzureKeyVault"),
    ("Microsoft.ServiceBus", "ServiceBus"),
    ("Microsoft.Sql", "Sql"),
    ("Microsoft.Storage", "Storage"),
    ("Microsoft.Storage.Global", "Storage"),
    ("Microsoft.Web", "AppService"),
];

/// The service's tag; `None` if it has no service endpoint.
pub fn tag_of(service: &str) -> Option<&'static str> {
    SERVICES
        .iter()
        .find(|(s, _)| s.eq_ignore_ascii_case(service))
        .map(|(_, tag)| *tag)
}

/// The prefixes of these services, disjoint and ascending; services without any are left out.
pub fn prefixes(services: &[String], tags: &ServiceTags) -> Vec<Ipv4Net> {
    let of = |s: &String| tag_of(s).and_then(|t| tags.get(t)).unwrap_or_default();
    let all: Vec<Ipv4Net> = services.iter().flat_map(of).copied().collect();
    let mut out = Ipv4Net::aggregate(&all);
    out.sort();
    out
}

//! Service endpoints and delegations of subnets: what is named is something that this platform knows.

use resources::views::{CONTAINER_GROUPS, SubnetView};
use vnet_model::{endpoints, service_tags::ServiceTags};

use crate::error::{Answer, Fault};

/// A subnet's endpoints and delegations; `at` is the place of its properties.
pub fn subnet(subnet: &SubnetView, at: &str, tags: &ServiceTags) -> Answer<()> {
    for (i, service) in subnet.service_endpoints.iter().enumerate() {
        let path = format!("{at}.serviceEndpoints[{i}].service");
        let Some(tag) = endpoints::tag_of(service) else {
            let served: Vec<&str> = endpoints::SERVICES.iter().map(|(s, _)| *s).collect();
            let problem = format!("'{service}' has no service endpoint; known are {}", served.join(", "));
            return Err(Fault::field("SubnetServiceEndpointInvalidService", path, problem));
        };
        if tags.get(tag).is_none() {
            let problem = format!(
                "'{service}' is not on this platform: its service tag {tag} stands for no address. An operator can give it some: oaks up --service-tag {tag}=PREFIX"
            );
            return Err(Fault::field("SubnetServiceEndpointInvalidService", path, problem));
        }
    }
    for (i, service) in subnet.delegations.iter().enumerate() {
        if !service.eq_ignore_ascii_case(CONTAINER_GROUPS) {
            let path = format!("{at}.delegations[{i}].properties.serviceName");
            let problem = format!("a subnet can be delegated to {CONTAINER_GROUPS} here, not to '{service}'");
            return Err(Fault::field("InvalidServiceNameOnDelegation", path, problem));
        }
    }
    Ok(())
}

/// Prefixes that the subnet's endpoints route directly.
pub fn prefixes(subnet: &SubnetView, tags: &ServiceTags) -> Vec<ipnet::Ipv4Net> {
    endpoints::prefixes(&subnet.service_endpoints, tags)
}

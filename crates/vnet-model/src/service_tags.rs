//! Service tags: names in security rules and routes that stand for a service's public addresses.
//!
//! Azure publishes the addresses behind its tags; a platform on machines of one's own has none of those services. What can
//! be true here is true: `AzureCloud` is this platform's own public addresses and everything that is configured; any other
//! tag stands for the prefixes that its operator gave it (a mirror, a registry, a database host), and one without prefixes
//! is refused by name, because a rule that silently matches nothing would be a hole or an outage.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// All public addresses of the platform.
pub const AZURE_CLOUD: &str = "AzureCloud";

/// Tags of the public cloud that an operator is likely to name, for the message about one that has no prefixes.
///
/// # Source
/// Azure Virtual Network, "Available service tags".
const PUBLISHED: &[&str] = &[
    "ActionGroup",
    "ApiManagement",
    "AppService",
    "AzureActiveDirectory",
    "AzureBackup",
    "AzureContainerRegistry",
    "AzureCosmosDB",
    "AzureDevOps",
    "AzureFrontDoor.Backend",
    "AzureKeyVault",
    "AzureMonitor",
    "AzurePlatformLKM",
    "AzureResourceManager",
    "AzureTrafficManager",
    "CognitiveServicesManagement",
    "EventHub",
    "GatewayManager",
    "MicrosoftContainerRegistry",
    "ServiceBus",
    "Sql",
    "Storage",
];

/// The prefixes behind each tag of this platform; names compare without regard to case.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct ServiceTags {
    /// Name as configured, to its prefixes (at least one).
    prefixes: BTreeMap<String, Vec<Ipv4Net>>,
}

#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum TagError {
    #[error("{text:?} is not NAME=PREFIX[,PREFIX...], such as Storage=10.9.0.0/24")]
    Form { text: String },
    #[error("service tag {tag}: {text:?} is not an IPv4 prefix without bits behind its length")]
    Prefix { tag: String, text: String },
    #[error("service tag {tag} is given by the platform itself or a second time")]
    Taken { tag: String },
}

impl ServiceTags {
    /// Tags from `NAME=PREFIX[,PREFIX...]`, one per text.
    pub fn parse<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Self, TagError> {
        let mut out = Self::default();
        for text in texts {
            let form = || TagError::Form { text: text.to_owned() };
            let (name, list) = text.split_once('=').ok_or_else(form)?;
            let starts = name.starts_with(|c: char| c.is_ascii_alphabetic());
            if !starts || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '.') {
                return Err(form());
            }
            let own = ["VirtualNetwork", "AzureLoadBalancer", "Internet", AZURE_CLOUD];
            let platform = ["AzurePlatformDNS", "AzurePlatformIMDS"];
            if own.iter().chain(&platform).any(|o| o.eq_ignore_ascii_case(name)) || out.get(name).is_some() {
                return Err(TagError::Taken { tag: name.to_owned() });
            }
            let prefix = |p: &str| {
                crate::rules::parse_prefix(p.trim()).map_err(|_| TagError::Prefix {
                    tag: name.to_owned(),
                    text: p.to_owned(),
                })
            };
            let prefixes = list.split(',').map(prefix).collect::<Result<_, _>>()?;
            out.prefixes.insert(name.to_owned(), prefixes);
        }
        Ok(out)
    }

    /// The same with `AzureCloud`: these ranges and those of every other tag.
    pub fn with_cloud(mut self, own: impl IntoIterator<Item = Ipv4Net>) -> Self {
        self.prefixes.remove(AZURE_CLOUD);
        let all: Vec<Ipv4Net> = self.prefixes.values().flatten().copied().chain(own).collect();
        self.prefixes.insert(AZURE_CLOUD.to_owned(), Ipv4Net::aggregate(&all));
        self
    }

    /// The prefixes behind a tag; `None` if it has none here.
    pub fn get(&self, tag: &str) -> Option<&[Ipv4Net]> {
        let found = self.prefixes.iter().find(|(n, _)| n.eq_ignore_ascii_case(tag));
        found.map(|(_, p)| p.as_slice())
    }

    /// Every tag with its prefixes, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[Ipv4Net])> {
        self.prefixes.iter().map(|(n, p)| (n.as_str(), p.as_slice()))
    }

    /// Whether Azure has a tag of that name, regional forms (`Storage.WestEurope`) included.
    pub fn is_published(tag: &str) -> bool {
        PUBLISHED.iter().any(|p| {
            p.eq_ignore_ascii_case(tag)
                || tag
                    .split_once('.')
                    .is_some_and(|(service, _)| p.eq_ignore_ascii_case(service))
        })
    }

    /// The configured tags in their command-line form.
    pub fn as_texts(&self) -> impl Iterator<Item = String> {
        self.iter().filter(|(n, _)| *n != AZURE_CLOUD).map(|(name, prefixes)| {
            let list: Vec<String> = prefixes.iter().map(ToString::to_string).collect();
            format!("{name}={}", list.join(","))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_configured_and_the_cloud_is_all_of_them() {
        let tags = ServiceTags::parse(["Storage=10.9.0.0/24,10.8.0.0/24", "Sql=10.9.1.0/24"]).unwrap();
        let pool = "198.19.0.0/16".parse().unwrap();
        let tags = tags.with_cloud([pool]);
        assert_eq!(tags.get("storage").unwrap().len(), 2);
        let cloud: Vec<String> = tags
            .get("AZURECLOUD")
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(cloud, ["10.8.0.0/24", "10.9.0.0/23", "198.19.0.0/16"]);
        assert_eq!(tags.get("AzureKeyVault"), None);
        let again: Vec<String> = tags.as_texts().collect();
        let again = ServiceTags::parse(again.iter().map(String::as_str)).unwrap();
        assert_eq!(again.with_cloud([pool]), tags);
    }

    #[test]
    fn mistakes_are_named() {
        for text in [
            "Storage",
            "Storage=",
            "=10.0.0.0/8",
            "Sto rage=10.0.0.0/8",
            "Storage=10.0.0.1/8",
        ] {
            assert!(ServiceTags::parse([text]).is_err(), "{text}");
        }
        for text in ["internet=10.0.0.0/8", "AzureCloud=10.0.0.0/8"] {
            assert!(
                matches!(ServiceTags::parse([text]), Err(TagError::Taken { .. })),
                "{text}"
            );
        }
        let twice = ServiceTags::parse(["Sql=10.0.0.0/8", "sql=10.0.0.0/8"]);
        assert!(matches!(twice, Err(TagError::Taken { .. })));
        assert!(ServiceTags::is_published("Storage.WestEurope") && !ServiceTags::is_published("Storrage"));
    }
}

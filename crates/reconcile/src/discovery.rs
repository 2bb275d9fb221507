//! What the server serves, in the preferred version of each group.

use std::time::Duration;

use http::Method;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use stdx::{Backoff, BackoffPolicy, Rng};

use crate::client::NONE;
use crate::{Client, Error, ResourceId, Retry};

/// Further attempts per document, and the delay between them.
const ATTEMPTS: u32 = 5;
const RETRY: BackoffPolicy = BackoffPolicy::doubling(Duration::from_millis(20), Duration::from_secs(1));

/// A served resource and its verbs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// The resource.
    pub resource: ResourceId,
    /// What can be done with it: `get`, `list`, `watch`, `delete`, ...
    pub verbs: Vec<String>,
}

impl Served {
    /// Whether the resource knows `verb`.
    pub fn can(&self, verb: &str) -> bool {
        self.verbs.iter().any(|v| v == verb)
    }
}

#[derive(Deserialize)]
struct GroupList {
    #[serde(default)]
    groups: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    preferred_version: GroupVersion,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct GroupVersion {
    group_version: String,
}

#[derive(Deserialize)]
struct ResourceList {
    #[serde(default)]
    resources: Vec<Resource>,
}

#[derive(Deserialize)]
struct Resource {
    name: String,
    kind: String,
    #[serde(default)]
    namespaced: bool,
    #[serde(default)]
    verbs: Vec<String>,
}

impl Client {
    /// Every top-level resource, each in its group's preferred version; subresources are left out.
    pub async fn discover(&self) -> Result<Vec<Served>, Error> {
        let groups: GroupList = self.patiently("/apis").await?;
        let mut versions = vec![String::from("v1")];
        versions.extend(groups.groups.into_iter().map(|g| g.preferred_version.group_version));
        let mut served = Vec::new();
        for version in versions {
            let path = if version.contains('/') {
                format!("/apis/{version}")
            } else {
                format!("/api/{version}")
            };
            let list: ResourceList = self.patiently(&path).await?;
            let (group, version) = apimachinery::meta::split_api_version(&version);
            served.extend(
                list.resources
                    .into_iter()
                    .filter(|r| !r.name.contains('/'))
                    .map(|r| Served {
                        resource: ResourceId {
                            group: group.to_owned(),
                            version: version.to_owned(),
                            plural: r.name,
                            kind: r.kind,
                            namespaced: r.namespaced,
                        },
                        verbs: r.verbs,
                    }),
            );
        }
        Ok(served)
    }

    /// Reads one document, trying again a few times: discovery is many calls, and one lost must not cost the others.
    async fn patiently<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let mut rng = Rng::from_entropy();
        let mut backoff = Backoff::new(RETRY);
        loop {
            match self.request(Method::GET, path, NONE).await {
                Err(error) if matches!(error.retry(), Retry::Soon(_)) && backoff.failures() < ATTEMPTS => {
                    tokio::time::sleep(backoff.next(&mut rng)).await;
                }
                other => return other,
            }
        }
    }
}

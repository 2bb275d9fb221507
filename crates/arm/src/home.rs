//! Home objects of every ARM-backed kind through one shape: they all have an [`ArmSpec`] and an [`ArmStatus`].
//!
//! Reads go to the API server itself, not to a cache, so that a client reads what it just wrote.

use http::Method;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use reconcile::{Client, DeleteParams, Error};
use resources::{ArmSpec, ArmStatus, GROUP, KINDS, VERSION, labels_of, object_name};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::error::Fault;

/// Turns a failed home request into an answer, and logs the cause.
impl From<Error> for Fault {
    fn from(e: Error) -> Self {
        tracing::error!(error = %stdx::error::chain(&e), "home request failed");
        if e.is_conflict() || e.is_already_exists() {
            let message = "The resource was changed by someone else at the same time. Read it again and repeat.";
            return Self::conflict("Conflict", message);
        }
        match e.status() {
            Some(s) if (400..500).contains(&s.code) => Self::bad_request("InvalidRequestContent", s.message.clone()),
            _ => Self::internal("the request"),
        }
    }
}

/// Any ARM-backed home object.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ArmObject {
    pub api_version: String,
    pub kind: String,
    pub metadata: ObjectMeta,
    pub spec: ArmSpec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<ArmStatus>,
}

impl ArmObject {
    /// A new object of the kind stored under `plural`, named after its id.
    pub fn new(plural: &str, spec: ArmSpec) -> Self {
        let kind = KINDS
            .iter()
            .find(|k| k.plural == plural)
            .map_or_else(String::new, |k| k.kind.to_owned());
        let labels = labels_of(&spec.id);
        let metadata = ObjectMeta {
            name: Some(object_name(&spec.id)),
            labels: (!labels.is_empty()).then_some(labels),
            ..Default::default()
        };
        Self {
            api_version: format!("{GROUP}/{VERSION}"),
            kind,
            metadata,
            spec,
            status: None,
        }
    }

    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    pub fn uid(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }

    pub fn is_deleting(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }

    /// `provisioningState` as ARM shows it: Deleting while a finalizer runs, never empty.
    pub fn state(&self) -> &str {
        if self.is_deleting() {
            return "Deleting";
        }
        let generation = self.metadata.generation.unwrap_or(0);
        match &self.status {
            None => "Creating",
            Some(s) if s.provisioning_state.is_empty() => "Creating",
            Some(s) if s.observed_generation < generation && is_terminal(&s.provisioning_state) => "Updating",
            Some(s) => &s.provisioning_state,
        }
    }

    /// An owner reference to this object.
    pub fn owner_reference(&self) -> OwnerReference {
        OwnerReference {
            api_version: self.api_version.clone(),
            kind: self.kind.clone(),
            name: self.name().to_owned(),
            uid: self.uid().to_owned(),
            controller: Some(true),
            block_owner_deletion: Some(false),
        }
    }
}

/// True for the states that end polling.
pub fn is_terminal(state: &str) -> bool {
    matches!(state, "Succeeded" | "Failed" | "Canceled")
}

/// Access to the home cluster. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Home {
    client: Client,
}

#[derive(Deserialize)]
struct ListOf<T> {
    items: Vec<T>,
}

const NOTHING: Option<&Value> = None;

impl Home {
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    fn path(plural: &str, name: &str) -> String {
        let slash = if name.is_empty() { "" } else { "/" };
        format!("/apis/{GROUP}/{VERSION}/{plural}{slash}{name}")
    }

    /// `None` if there is no object of that name.
    pub async fn get<T: DeserializeOwned>(&self, plural: &str, name: &str) -> Result<Option<T>, Error> {
        match self
            .client
            .request(Method::GET, &Self::path(plural, name), NOTHING)
            .await
        {
            Ok(v) => Ok(Some(v)),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Every object of a kind, in name order.
    pub async fn list<T: DeserializeOwned>(&self, plural: &str) -> Result<Vec<T>, Error> {
        let list: ListOf<T> = self
            .client
            .request(Method::GET, &Self::path(plural, ""), NOTHING)
            .await?;
        Ok(list.items)
    }

    pub async fn create<T: Serialize + DeserializeOwned>(&self, plural: &str, object: &T) -> Result<T, Error> {
        self.client
            .request(Method::POST, &Self::path(plural, ""), Some(object))
            .await
    }

    /// Replaces an object; refused with a conflict if its resourceVersion is not the newest.
    pub async fn update<T: Serialize + DeserializeOwned>(
        &self,
        plural: &str,
        name: &str,
        object: &T,
    ) -> Result<T, Error> {
        self.client
            .request(Method::PUT, &Self::path(plural, name), Some(object))
            .await
    }

    pub async fn update_status<T: Serialize + DeserializeOwned>(
        &self,
        plural: &str,
        name: &str,
        object: &T,
    ) -> Result<T, Error> {
        let path = format!("{}/status", Self::path(plural, name));
        self.client.request(Method::PUT, &path, Some(object)).await
    }

    /// Asks for deletion; fine if the object is gone already.
    pub async fn delete(&self, plural: &str, name: &str) -> Result<(), Error> {
        match self
            .client
            .delete_path(&Self::path(plural, name), &DeleteParams::default())
            .await
        {
            Err(e) if !e.is_not_found() => Err(e),
            _ => Ok(()),
        }
    }

    /// The object of an ARM id.
    pub async fn object(&self, plural: &str, id: &str) -> Result<Option<ArmObject>, Error> {
        self.get(plural, &object_name(id)).await
    }

    /// Every object of a kind with its ARM shape; those inside `group` (an ARM id) only, if given.
    pub async fn objects(&self, plural: &str, group: Option<&str>) -> Result<Vec<ArmObject>, Error> {
        let mut all: Vec<ArmObject> = self.list(plural).await?;
        if let Some(group) = group {
            all.retain(|o| is_within(&o.spec.id, group));
        }
        Ok(all)
    }
}

/// True if `id` is below `scope`, compared without regard to case.
pub fn is_within(id: &str, scope: &str) -> bool {
    let scope = scope.trim_end_matches('/');
    id.len() > scope.len()
        && id.as_bytes()[scope.len()] == b'/'
        && id.as_bytes()[..scope.len()].eq_ignore_ascii_case(scope.as_bytes())
}

/// True if two ids are the same resource.
pub fn same_id(a: &str, b: &str) -> bool {
    a.trim_end_matches('/').eq_ignore_ascii_case(b.trim_end_matches('/'))
}

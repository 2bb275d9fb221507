//! Names of kinds: group, version, kind.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

pub use crate::meta::{api_version, split_api_version};

/// A kind's full name. The core group is the empty string.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gvk {
    pub group: Arc<str>,
    pub version: Arc<str>,
    pub kind: Arc<str>,
}

impl Gvk {
    pub fn new(group: &str, version: &str, kind: &str) -> Gvk {
        Gvk {
            group: group.into(),
            version: version.into(),
            kind: kind.into(),
        }
    }

    /// `v1` or `apps/v1`, as objects carry it.
    pub fn api_version(&self) -> String {
        api_version(&self.group, &self.version)
    }

    /// The kind an object claims to be; `None` if either field is missing or empty.
    pub fn of(object: &Value) -> Option<Gvk> {
        let kind = object.get("kind")?.as_str().filter(|k| !k.is_empty())?;
        let (group, version) = split_api_version(object.get("apiVersion")?.as_str()?);
        (!version.is_empty()).then(|| Gvk::new(group, version, kind))
    }

    /// The same group and version with another kind.
    pub fn with_kind(&self, kind: &str) -> Gvk {
        Gvk {
            kind: kind.into(),
            ..self.clone()
        }
    }
}

impl fmt::Display for Gvk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, Kind={}", self.api_version(), self.kind)
    }
}

//! Which resource a call is about, and the URL path that says so.

use std::any::TypeId;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::{ClusterResourceScope, Metadata};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A typed kind the client can read and write: every top-level `k8s-openapi` struct, and the platform's own kinds.
pub trait Kind:
    Metadata<Ty = ObjectMeta, Scope: 'static> + Serialize + DeserializeOwned + Send + Sync + 'static
{
}

impl<K> Kind for K where
    K: Metadata<Ty = ObjectMeta, Scope: 'static> + Serialize + DeserializeOwned + Send + Sync + 'static
{
}

/// A served resource.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceId {
    /// API group, empty for the core group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Plural name, as in paths.
    pub plural: String,
    /// Kind.
    pub kind: String,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
}

impl ResourceId {
    /// The resource of a typed kind.
    pub fn of<K: Kind>() -> Self {
        Self {
            group: K::GROUP.to_owned(),
            version: K::VERSION.to_owned(),
            plural: K::URL_PATH_SEGMENT.to_owned(),
            kind: K::KIND.to_owned(),
            namespaced: TypeId::of::<K::Scope>() != TypeId::of::<ClusterResourceScope>(),
        }
    }

    /// `group/version`, or the version alone for the core group.
    pub fn api_version(&self) -> String {
        apimachinery::meta::api_version(&self.group, &self.version)
    }

    /// Path of a collection, object or subresource.
    pub fn path(&self, namespace: Option<&str>, name: Option<&str>, subresource: Option<&str>) -> String {
        let mut path = if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        };
        if let Some(namespace) = namespace.filter(|ns| self.namespaced && !ns.is_empty()) {
            path.push_str("/namespaces/");
            escape_into(&mut path, namespace, b"");
        }
        path.push('/');
        path.push_str(&self.plural);
        for part in [name, subresource].into_iter().flatten() {
            path.push('/');
            // A subresource may be a path of its own (`proxy/x`); names never hold a slash.
            escape_into(&mut path, part, b"/");
        }
        path
    }
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.plural)?;
        if !self.group.is_empty() {
            write!(f, ".{}", self.group)?;
        }
        Ok(())
    }
}

/// Appends `text` percent-encoded, except unreserved characters and those in `keep`.
pub(crate) fn escape_into(out: &mut String, text: &str, keep: &[u8]) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) || keep.contains(&byte) {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
}

/// Joins a query string from pairs, leaving out empty values.
pub(crate) fn query<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut out = String::new();
    for (key, value) in pairs {
        if value.is_empty() {
            continue;
        }
        out.push(if out.is_empty() { '?' } else { '&' });
        out.push_str(key);
        out.push('=');
        escape_into(&mut out, value, b"");
    }
    out
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::Deployment;
    use k8s_openapi::api::core::v1::{Namespace, Pod};

    use super::*;

    #[test]
    fn paths() {
        let pods = ResourceId::of::<Pod>();
        assert_eq!(pods.path(None, None, None), "/api/v1/pods");
        assert_eq!(
            pods.path(Some("a"), Some("b"), Some("log")),
            "/api/v1/namespaces/a/pods/b/log"
        );
        let deployments = ResourceId::of::<Deployment>();
        assert_eq!(
            deployments.path(Some("a"), None, None),
            "/apis/apps/v1/namespaces/a/deployments"
        );
        let namespaces = ResourceId::of::<Namespace>();
        assert!(!namespaces.namespaced);
        assert_eq!(
            namespaces.path(Some("ignored"), Some("x"), None),
            "/api/v1/namespaces/x"
        );
        assert_eq!(query([("a", "x=y,z"), ("b", ""), ("c", "1")]), "?a=x%3Dy%2Cz&c=1");
    }
}

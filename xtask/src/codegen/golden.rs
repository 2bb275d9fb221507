//! Golden objects: one fully populated object per kind, as JSON and as protobuf, packed into one file.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::sources::write_gz;

/// Kinds whose goldens are committed: those that are served, and what their subresources exchange.
const KINDS: &[&str] = &[
    "apps.v1.Deployment",
    "apps.v1.ReplicaSet",
    "authentication.k8s.io.v1.SelfSubjectReview",
    "authentication.k8s.io.v1.TokenRequest",
    "authentication.k8s.io.v1.TokenReview",
    "authorization.k8s.io.v1.LocalSubjectAccessReview",
    "authorization.k8s.io.v1.SelfSubjectAccessReview",
    "authorization.k8s.io.v1.SelfSubjectRulesReview",
    "authorization.k8s.io.v1.SubjectAccessReview",
    "autoscaling.v1.Scale",
    "coordination.k8s.io.v1.Lease",
    "core.v1.Binding",
    "core.v1.ConfigMap",
    "core.v1.Endpoints",
    "core.v1.Event",
    "core.v1.Namespace",
    "core.v1.Node",
    "core.v1.Pod",
    "core.v1.Secret",
    "core.v1.Service",
    "core.v1.ServiceAccount",
    "discovery.k8s.io.v1.EndpointSlice",
    "events.k8s.io.v1.Event",
    "policy.v1.Eviction",
    "rbac.authorization.k8s.io.v1.ClusterRole",
    "rbac.authorization.k8s.io.v1.ClusterRoleBinding",
    "rbac.authorization.k8s.io.v1.Role",
    "rbac.authorization.k8s.io.v1.RoleBinding",
];

/// Writes `golden.json.gz`: `{ "<group>.<version>.<Kind>": { "json": .., "pb": "<hex>" } }`.
pub fn generate(api: &Path, dir: &Path) -> Result<()> {
    let mut out = Map::new();
    for kind in KINDS {
        let base = api.join("testdata/HEAD");
        let object = std::fs::read(base.join(format!("{kind}.json"))).with_context(|| format!("golden {kind}"))?;
        let object: Value = serde_json::from_slice(&object)?;
        let pb = std::fs::read(base.join(format!("{kind}.pb")))?;
        let hex: String = pb.iter().map(|b| format!("{b:02x}")).collect();
        out.insert((*kind).into(), json!({ "json": object, "pb": hex }));
    }
    write_gz(
        &dir.join("golden.json.gz"),
        serde_json::to_string(&Value::Object(out))?.as_bytes(),
    )
}

//! Small helpers of this crate's unit tests.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

/// Pod `default/p` with uid `u1` and `spec`.
pub fn pod(spec: Value) -> Arc<Pod> {
    pod_with(json!({}), spec)
}

/// As [`pod`], with further metadata.
pub fn pod_with(metadata: Value, spec: Value) -> Arc<Pod> {
    let mut meta = json!({"name": "p", "namespace": "default", "uid": "u1", "generation": 1});
    for (k, v) in metadata.as_object().expect("metadata is an object") {
        meta[k] = v.clone();
    }
    Arc::new(
        serde_json::from_value(json!({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}))
            .expect("a pod"),
    )
}

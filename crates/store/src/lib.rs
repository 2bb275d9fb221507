//! Revisioned byte KV with transactions and watch. Knows no Kubernetes.

//! The Kubernetes API server: HTTP, authn/authz, registries, discovery; many clusters in one process.

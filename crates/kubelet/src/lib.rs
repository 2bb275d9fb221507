//! The node core and the kubelet HTTP API.

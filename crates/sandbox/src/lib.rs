//! Pod sandboxes, containers, images, streams and stats behind one set of traits, shaped after the CRI (v1, Kubernetes 1.36).
//!
//! `kubelet` drives a [`Runtime`]; it never learns which one. Implementations: the embedded engine (libcontainer through a
//! one-shot helper, overlay snapshots, supervised by the init) and `container-instances`' engine side.

pub mod api;

pub use api::*;

//! Pod sandboxes, containers, images, streams and stats behind one set of traits, shaped after the CRI (v1, Kubernetes 1.36).
//!
//! `kubelet` drives a [`Runtime`]; it never learns which one. Implementations: the embedded engine (libcontainer through a
//! one-shot helper, overlay snapshots, supervised by the init) and `container-instances`' engine side.
//!
//! The feature `engine` (default) is everything but [`supervisor`], which the tiny `oaks-init` is built from.

#[cfg(feature = "engine")]
pub mod api;
#[cfg(feature = "engine")]
pub mod embedded;
#[cfg(feature = "engine")]
pub mod images;
#[cfg(feature = "engine")]
pub mod runc;
pub mod supervisor;

#[cfg(feature = "engine")]
pub use api::*;
